"""torch.func's transforms and forward-mode AD over every op: as stock torch has them, in float64."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from fastnn import _fallback, functional, reference
from fastnn.functional.rnn import rnn

pytestmark = pytest.mark.usefixtures("one_thread")


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def activated(activation):
    own = lambda x, w, b: functional.linear(x, w, b, activation=activation)  # noqa: E731
    return own, lambda x, w, b: reference.activate(F.linear(x, w, b), activation)


def convolved(activation=None, **options):
    own = lambda x, w, b: functional.conv2d(x, w, b, activation=activation, **options)  # noqa: E731
    return own, lambda x, w, b: reference.activate(F.conv2d(x, w, b, **options), activation)


def attended(**options):
    own = lambda *args: functional.scaled_dot_product_attention(*args, **options)  # noqa: E731

    def stock(*args):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the others have no forward mode
            return F.scaled_dot_product_attention(*args, **options)

    return own, stock


def attended_by_formula(**options):
    own = lambda *args: functional.scaled_dot_product_attention(*args, return_lse=True, **options)  # noqa: E731
    return own, lambda *args: reference.attention(*args, **options)


def weighed(average):
    own = lambda *args: functional.attention_weights(*args, average=average)  # noqa: E731
    return own, lambda *args: reference.attention_weights(*args, average=average)[::2]


def layers(mode, batch_sizes=None, **options):
    stack = {
        "RNN_TANH": torch._VF.rnn_tanh,
        "RNN_RELU": torch._VF.rnn_relu,
        "LSTM": torch._VF.lstm,
        "GRU": torch._VF.gru,
    }
    count = 2 if mode == "LSTM" else 1
    rest = [True, options.get("num_layers", 1), 0.0, False, options.get("bidirectional", False)]
    sizes = None if not batch_sizes else torch.tensor(batch_sizes)

    def own(x, *tensors):
        cx = tensors[1] if count == 2 else None
        return tuple(y for y in rnn(x, sizes, tensors[0], cx, tensors[count:], mode, **options) if y is not None)

    def stock(x, *tensors):
        states, weights = tensors[:2] if count == 2 else tensors[0], list(tensors[count:])
        if sizes is None:
            return stack[mode](x, states, weights, *rest, False)
        return reference.rnn(x, sizes, states, None, weights, mode)[:2]  # torch's reads memory that a transform hides

    return own, stock


def states_and_weights(mode, batch, size, hidden, num_layers=1, directions=1):
    gates = {"LSTM": 4, "GRU": 3}.get(mode, 1) * hidden
    states = [randn(num_layers * directions, batch, hidden) for _ in range(2 if mode == "LSTM" else 1)]
    weights = []
    for layer in range(num_layers):
        for _ in range(directions):
            inputs = size if layer == 0 else hidden * directions
            weights += [randn(gates, inputs), randn(gates, hidden), randn(gates), randn(gates)]
    return *states, *weights


def cell(name):
    own, stock = getattr(functional, name), getattr(torch, name)
    if name != "lstm_cell":
        return own, stock
    return tuple(lambda x, h, c, *w, f=f: f(x, (h, c), *w) for f in (own, stock))


def of_cell(gates, states=1):
    return (
        randn(2, 3),
        *(randn(2, 2) for _ in range(states)),
        randn(2 * gates, 3),
        randn(2 * gates, 2),
        randn(2 * gates),
    )


QKV = (2, 3, 4), (2, 5, 4), (2, 5, 3)
# name -> what makes (own, stock), and the tensors
CASES = {
    "linear": (activated(None), lambda: (randn(3, 4), randn(2, 4), randn(2))),
    "linear-vector": ((functional.linear, F.linear), lambda: (randn(2, 4), randn(4))),
    "linear-gelu": (activated("gelu"), lambda: (randn(2, 3, 2), randn(2, 2), randn(2))),
    "linear-tanh": (activated("tanh"), lambda: (randn(3, 4), randn(2, 4), randn(2))),
    "conv2d": (convolved(stride=2, padding=1), lambda: (randn(2, 2, 4, 3), randn(2, 2, 3, 2), randn(2))),
    "conv2d-unbatched-silu": (convolved("silu"), lambda: (randn(2, 3, 3), randn(2, 2, 2, 2), randn(2))),
    "conv2d-groups-tanh": (convolved("tanh", groups=2), lambda: (randn(1, 4, 3, 3), randn(4, 2, 2, 2), randn(4))),
    "attention": (attended(), lambda: tuple(randn(*s) for s in QKV)),
    "attention-no-heads": (attended(is_causal=True), lambda: (randn(3, 2), randn(4, 2), randn(4, 3))),
    "attention-mask": (attended(), lambda: (*(randn(*s) for s in QKV), randn(3, 5))),
    "attention-groups": (
        attended(enable_gqa=True),
        lambda: (randn(1, 4, 2, 2), randn(1, 2, 3, 2), randn(1, 2, 3, 2)),
    ),
    "attention-lse": (attended_by_formula(window=(2, 1), softcap=2.0), lambda: tuple(randn(*s) for s in QKV)),
    "attention-weights": (weighed(True), lambda: (*(randn(*s) for s in QKV), randn(3, 5))),
    "lstm": (layers("LSTM"), lambda: (randn(3, 2, 2), *states_and_weights("LSTM", 2, 2, 2))),
    "gru": (
        layers("GRU", num_layers=2, bidirectional=True),
        lambda: (randn(2, 2, 2), *states_and_weights("GRU", 2, 2, 2, 2, 2)),
    ),
    "rnn-packed": (layers("RNN_TANH", [3, 2, 1]), lambda: (randn(6, 2), *states_and_weights("RNN_TANH", 3, 2, 2))),
    "rnn-relu": (layers("RNN_RELU"), lambda: (randn(2, 1, 2), *states_and_weights("RNN_RELU", 1, 2, 2))),
    "lstm-cell": (cell("lstm_cell"), lambda: of_cell(4, 2)),
    "gru-cell": (cell("gru_cell"), lambda: of_cell(3)),
    "rnn-cell": (cell("rnn_tanh_cell"), lambda: of_cell(1)),
}
SMALL = [name for name in CASES if name not in ("gru", "lstm", "conv2d-unbatched-silu")]


def loss(f):
    def call(*tensors):
        results = f(*tensors)
        return sum(
            (y.sin() * (i + 1)).sum() for i, y in enumerate(results if isinstance(results, tuple) else (results,))
        )

    return call


def everything(tensors):
    return tuple(range(len(tensors)))


def few(tensors):
    """Of a stack of layers, the input, a state and a weight of each kind: enough for second derivatives."""
    return everything(tensors)[:6]


FIRST = {
    "vjp": lambda f, ts: (lambda out, pull: (out, pull(out)))(*vjp(f, *ts)),
    "grad": lambda f, ts: grad(loss(f), everything(ts))(*ts),
    "jvp": lambda f, ts: jvp(f, ts, tuple(t.cos() for t in ts)),
    "jvp of each": lambda f, ts: [
        jvp(lambda x, i=i: f(*ts[:i], x, *ts[i + 1 :]), (t,), (t.cos(),)) for i, t in enumerate(ts)
    ],
    "jacrev": lambda f, ts: jacrev(f, everything(ts))(*ts),
    "jacfwd": lambda f, ts: jacfwd(f, everything(ts))(*ts),
}
SECOND = {
    "hessian": lambda f, ts: hessian(loss(f), few(ts))(*ts),
    "jacrev of jacrev": lambda f, ts: jacrev(jacrev(loss(f), few(ts)), few(ts))(*ts),
    "jacfwd of jacfwd": lambda f, ts: jacfwd(jacfwd(loss(f), few(ts)), few(ts))(*ts),
    "jacrev of jacfwd": lambda f, ts: jacrev(jacfwd(loss(f), few(ts)), few(ts))(*ts),
    "vjp of vjp": lambda f, ts: FIRST["vjp"](lambda *a: vjp(f, *a)[1](f(*ts)), ts),
    "jvp of vjp": lambda f, ts: jvp(lambda *a: vjp(loss(f), *a)[1](a[0].new_ones(())), ts, tuple(t.cos() for t in ts)),
}


@pytest.fixture
def own_kernels():
    before = _fallback.calls.total()
    yield
    assert _fallback.calls.total() == before, "torch served a call that has a kernel"


def compare(transform, name):
    (own, stock), make = CASES[name]
    tensors = make()
    torch.testing.assert_close(transform(own, tensors), transform(stock, tensors), rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("own_kernels")
@pytest.mark.works("Transforms", "grad, vjp, jvp, jacrev, jacfwd of torch.func over every op")
@pytest.mark.parametrize("transform", FIRST)
@pytest.mark.parametrize("name", CASES)
def test_first_derivatives(name, transform):
    compare(FIRST[transform], name)


@pytest.mark.usefixtures("own_kernels")
@pytest.mark.works("Transforms", "hessian and every order of two jacobians over every op")
@pytest.mark.parametrize("transform", SECOND)
@pytest.mark.parametrize("name", SMALL)
def test_second_derivatives(name, transform):
    compare(SECOND[transform], name)


def batches(tensors, size=3):
    """Which of the tensors have a batch, and where: none but one, all but one, all."""
    count = len(tensors)
    for chosen in {
        *itertools.combinations(range(count), 1),
        *itertools.combinations(range(count), count - 1),
        tuple(range(count)),
    }:
        if chosen:
            dims = tuple((0 if i % 2 else -1) if i in chosen else None for i in range(count))
            yield (
                dims,
                tuple(
                    t if d is None else torch.stack([t * (1 + k / 8) for k in range(size)], d)
                    for t, d in zip(tensors, dims, strict=True)
                ),
            )


def each(f, dims, tensors, size=3):
    """What vmap means: f on one after another."""
    rows = [f(*(t if d is None else t.select(d, i) for t, d in zip(tensors, dims, strict=True))) for i in range(size)]
    return torch.utils._pytree.tree_map(lambda *ys: torch.stack(ys), *rows)


MAPPED = {
    "vmap": lambda f, ts: f,
    "vmap of grad": lambda f, ts: grad(loss(f), everything(ts)),
    "vmap of jvp": lambda f, ts: lambda *a: jvp(f, a, tuple(t.cos() for t in a)),
}


@pytest.mark.usefixtures("own_kernels")
@pytest.mark.works("Transforms", "forward-mode AD (torch.autograd.forward_ad): the kernel's result, its tangent")
@pytest.mark.parametrize("name", CASES)
def test_dual_tensors(name):
    (own, stock), make = CASES[name]
    tensors = make()
    with forward_ad.dual_level():
        for chosen in (*((i,) for i in range(len(tensors))), everything(tensors)):
            duals = [forward_ad.make_dual(t, t.cos()) if i in chosen else t for i, t in enumerate(tensors)]
            found, expected = (
                [forward_ad.unpack_dual(y) for y in (ys if isinstance(ys, tuple) else (ys,))]
                for ys in (own(*duals), stock(*duals))
            )
            for y, z in zip(found, expected, strict=True):
                torch.testing.assert_close(y.primal, z.primal, rtol=1e-9, atol=1e-9)
                assert y.tangent is not None, "dropped"
                tangent = torch.zeros_like(z.primal) if z.tangent is None else z.tangent
                torch.testing.assert_close(y.tangent, tangent, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("own_kernels")
@pytest.mark.works(
    "Transforms", "gradcheck and gradgradcheck with forward mode, batched gradients and batched tangents"
)
@pytest.mark.parametrize(
    "name", [name for name in SMALL if name not in ("attention-groups", "attention-mask", "conv2d")]
)
def test_gradcheck(name):
    (own, _), make = CASES[name]
    tensors = tuple(t.requires_grad_() for t in make())
    modes = dict(check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert torch.autograd.gradcheck(own, tensors, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradcheck(own, tensors, **modes)
    assert torch.autograd.gradgradcheck(own, tensors, fast_mode=True, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.works(
    "Transforms", "torch.func under torch.compile(fullgraph=True): vmap by the kernels, gradients by torch's operators"
)
def test_transforms_under_compile():
    x, w, b = torch.randn(3, 2, 4), torch.randn(5, 4), torch.randn(5)
    for name, transform in MAPPED.items():
        own, stock = activated("relu")
        dims = (0, None, None)
        found = torch.compile(vmap(transform(own, (x, w, b)), dims), fullgraph=True, backend="aot_eager")(x, w, b)
        torch.testing.assert_close(
            found, vmap(transform(stock, (x, w, b)), dims)(x, w, b), msg=lambda m, n=name: f"{n}: {m}"
        )
    _fallback.set_fallback("error")
    torch.compile(vmap(lambda x: functional.linear(x, w, b)), fullgraph=True, backend="aot_eager")(x)
    with pytest.raises(Exception, match="torch.func has no kernel while torch.compile traces"):
        torch.compile(grad(loss(lambda x: functional.linear(x, w, b))), fullgraph=True, backend="aot_eager")(x)


def test_what_has_no_kernel_goes_to_torch_under_a_transform_too():
    x, w = torch.randn(3, 2, 4, dtype=torch.complex64), torch.randn(5, 4, dtype=torch.complex64)
    before = _fallback.calls["linear", "dtype torch.complex64 has no kernel"]
    assert torch.equal(vmap(functional.linear, (0, None))(x, w), vmap(F.linear, (0, None))(x, w))
    assert _fallback.calls["linear", "dtype torch.complex64 has no kernel"] == before + 1

    class Loud(torch.Tensor):
        pass

    before = _fallback.calls["linear", "tensor subclass has no kernel"]
    with forward_ad.dual_level():
        functional.linear(forward_ad.make_dual(x.real, x.real).as_subclass(Loud), w.real)
    assert _fallback.calls["linear", "tensor subclass has no kernel"] == before + 1


OPINFO = {
    "nn.functional.linear": functional.linear,
    "nn.functional.conv1d": functional.conv1d,
    "nn.functional.conv2d": functional.conv2d,
    "nn.functional.scaled_dot_product_attention": functional.scaled_dot_product_attention,
}


def samples(name):
    """PyTorch's own samples of an op, as they are and with gaps in memory: our function, torch's, and their tensors."""
    from torch.testing._internal.common_methods_invocations import op_db

    (op,) = (op for op in op_db if op.name == name and not op.variant_test_name)
    for given in op.sample_inputs("cpu", torch.float64, requires_grad=False):
        for sample in (given, given.noncontiguous()):
            args, kwargs = (sample.input, *sample.args), dict(sample.kwargs)
            if "dropout_p" in kwargs:
                kwargs["dropout_p"] = 0.0  # two masks cannot be compared
            where = [i for i, t in enumerate(args) if isinstance(t, torch.Tensor) and t.is_floating_point()]

            def of(f, *chosen, args=args, kwargs=kwargs, where=where):
                full = list(args)
                for i, t in zip(where, chosen, strict=True):
                    full[i] = t
                with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                    return f(*full, **kwargs)

            yield partial(of, OPINFO[name]), partial(of, op.op), tuple(args[i] for i in where)


@pytest.mark.usefixtures("own_kernels")
@pytest.mark.works(
    "Transforms", "PyTorch's own samples (OpInfo) of linear, conv1d, conv2d, attention through torch.func"
)
@pytest.mark.parametrize("name", OPINFO)
def test_opinfo_samples(name):
    for own, stock, tensors in samples(name):
        for transform in ("vjp", "grad", "jvp"):
            torch.testing.assert_close(FIRST[transform](own, tensors), FIRST[transform](stock, tensors), msg=transform)
        if stock(*tensors).numel() <= 64:
            torch.testing.assert_close(jacrev(own)(*tensors), jacrev(stock)(*tensors))
        for dims, batched in batches(tensors, 2):
            torch.testing.assert_close(vmap(own, dims)(*batched), each(stock, dims, batched, 2))


# What PyTorch runs the samples of its operators through: of the function and its tensors, and of it under vmap.
COMPOSED = {
    "jvp of vjp": (SECOND["jvp of vjp"], None),
    "vjp of vjp": (SECOND["vjp of vjp"], None),
    "vmap of vjp": (None, FIRST["vjp"]),
    "vmap of jvp": (None, FIRST["jvp"]),
    "vmap of vjp of vjp": (None, SECOND["vjp of vjp"]),
    "vmap of jvp of vjp": (None, SECOND["jvp of vjp"]),
    "vjp of vmap": (FIRST["vjp"], lambda f, ts: f(*ts)),
    "jvp of vmap": (FIRST["jvp"], lambda f, ts: f(*ts)),
}


@pytest.mark.usefixtures("own_kernels")
@pytest.mark.works("Transforms", "PyTorch's own samples (OpInfo) through vmap, vjp and jvp inside one another")
@pytest.mark.parametrize("transform", COMPOSED)
@pytest.mark.parametrize("name", OPINFO)
def test_opinfo_samples_composed(name, transform):
    outer, inner = COMPOSED[transform]
    for own, stock, tensors in itertools.islice(samples(name), 0, None, 2):
        if inner is not None:
            dims, tensors = max(batches(tensors, 2), key=lambda b: -b[0].count(None))
            own = vmap(lambda *ts, f=own: inner(f, ts), dims)
            stock = lambda *ts, f=stock, dims=dims: each(lambda *a: inner(f, a), dims, ts, 2)  # noqa: E731
        if outer is None:
            torch.testing.assert_close(own(*tensors), stock(*tensors))
        else:
            torch.testing.assert_close(outer(own, tensors), outer(stock, tensors))
