"""Recurrent layers and cells against the float64 formula, torch's own error beside it."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import fastnn
from fastnn import functional, nn, reference, testing

KINDS = ("RNN_TANH", "RNN_RELU", "GRU", "LSTM", "LSTM_PROJ")
GATES = {"RNN_TANH": 1, "RNN_RELU": 1, "GRU": 3, "LSTM": 4}
DTYPES = testing.DTYPES


def modules(kind, input_size, hidden_size, dtype=torch.float32, **kwargs):
    """torch's module and fastnn's with the same weights."""
    name = kind.split("_")[0]
    if name == "RNN":
        kwargs["nonlinearity"] = kind[4:].lower()
    if kind == "LSTM_PROJ":
        kwargs["proj_size"] = max(hidden_size // 2, 1)
    stock = getattr(torch.nn, name)(input_size, hidden_size, **kwargs).to(dtype)
    own = getattr(nn, name)(input_size, hidden_size, **kwargs).to(dtype)
    own.load_state_dict(stock.state_dict())
    return stock, own


def tensors(result):
    """Every tensor of a nested result."""
    if isinstance(result, PackedSequence):
        return [result.data]
    if isinstance(result, tuple | list):
        return [t for part in result for t in tensors(part)]
    return [result]


def layer(kind, steps, batch, input_size, hidden_size, dtype=torch.float32, directions=1, bias=True, draw=None):
    """Arguments of the op for one layer; `draw(shape)` makes the values."""
    draw = draw or (lambda shape: torch.randn(shape, dtype=torch.float64))
    mode = "LSTM" if kind == "LSTM_PROJ" else kind
    state = max(hidden_size // 2, 1) if kind == "LSTM_PROJ" else hidden_size
    gates, scale = GATES[mode], hidden_size**-0.5
    weights = []
    for _ in range(directions):
        weights += [draw((gates * hidden_size, input_size)) * scale, draw((gates * hidden_size, state)) * scale]
        weights += [draw((gates * hidden_size,)), draw((gates * hidden_size,))] if bias else []
        weights += [draw((state, hidden_size)) * scale] if kind == "LSTM_PROJ" else []
    cx = draw((directions, batch, hidden_size)).to(dtype) if mode == "LSTM" else None
    x, hx = draw((steps, batch, input_size)), draw((directions, batch, state))
    return x.to(dtype), None, hx.to(dtype), cx, [w.to(dtype) for w in weights], mode


def to(args, dtype):
    """The op's arguments in another dtype."""
    x, sizes, hx, cx, weights, mode = args
    return x.to(dtype), sizes, hx.to(dtype), None if cx is None else cx.to(dtype), [w.to(dtype) for w in weights], mode


def leaves(args):
    return [t for t in (args[0], args[2], args[3], *args[4]) if t is not None]


def packs(args):
    """What rnn_pack makes of the weights of each direction."""
    hx, weights, mode = args[2], args[4], args[5]
    each = len(weights) // (hx.shape[0] if hx.dim() == 3 else 1)
    return [torch.ops.fastnn.rnn_pack(weights[i : i + each], mode) for i in range(0, len(weights), each)]


def check(args, c=16.0):
    """The op against the formula in float64, on the weights themselves and on packed ones."""
    oracle = reference.rnn(*to(args, torch.float64))
    for packed in (None, packs(args)):
        for name, y, z in zip(("output", "h_n", "c_n"), torch.ops.fastnn.rnn(*args, packed), oracle, strict=True):
            # States are of order one; a step adds roundings of sums over I + P terms, and later steps carry them on.
            testing.assert_close_to_oracle(y, z, torch.ones(()) + z.abs(), c=c * args[0].shape[0] ** 0.5, name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_module_against_torch_and_float64(kind, dtype):
    for bidirectional, batch_first, bias, layers in (
        (False, False, True, 1),
        (True, False, False, 2),
        (True, True, True, 2),
    ):
        torch.manual_seed(0)
        kwargs = dict(num_layers=layers, bidirectional=bidirectional, batch_first=batch_first, bias=bias)
        stock, own = modules(kind, 13, 19, dtype, **kwargs)
        exact = copy.deepcopy(stock).double()
        x = torch.randn(4, 6, 13, dtype=torch.float64).to(dtype)
        results = {}
        for name, module in (("stock", stock), ("own", own), ("exact", exact)):
            xi = x.to(torch.float64 if name == "exact" else dtype).clone().requires_grad_()
            ys = tensors(module(xi))
            torch.manual_seed(1)
            grads = [torch.randn(y.shape, dtype=torch.float64).to(dtype).to(y.dtype) for y in ys]
            results[name] = ys + list(torch.autograd.grad(ys, [xi, *module.parameters()], grads))
        for i, (s, o, e) in enumerate(zip(*results.values(), strict=True)):
            assert s.stride() == o.stride() or i > 0
            if dtype not in testing.HALF_DTYPES:
                testing.assert_close_to_oracle(o, e, e.abs().amax() + 1, s, c=16.0, name=f"{kind} {kwargs} {i}")
            elif kind != "RNN_RELU" or i < 2:  # rounding may move relu's argument across zero: see the exact test
                error, theirs = ((t.double() - e).abs().max() for t in (o, s))
                assert error <= 2 * theirs + 4 * torch.finfo(dtype).eps * e.abs().max(), (kind, kwargs, i)


@pytest.mark.parametrize("isa", testing.available_isas())
@pytest.mark.parametrize("kind", KINDS)
def test_edges(kind, isa):
    torch.manual_seed(0)
    with testing.forced_isa(isa):
        for hidden in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33):
            check(layer(kind, 3, 7, 5, hidden))
        for inputs in (1, 2, 7, 8, 9, 16, 17, 31):
            check(layer(kind, 6, 3, inputs, 9, directions=2))
        for batch in (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 25):
            check(layer(kind, 3, batch, 6, 11))
            check(layer(kind, 1, batch, 9, 17, bias=False))
        for steps in (1, 2, 3, 16, 17, 18, 53):
            check(layer(kind, steps, 1, 23, 29, directions=2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", testing.available_isas())
def test_exact_on_small_integers(isa, dtype):
    draw = lambda shape: testing.integers(shape, torch.float64, -1, 1)  # noqa: E731
    torch.manual_seed(0)
    with testing.forced_isa(isa):
        for steps, batch, inputs, hidden in ((1, 1, 3, 5), (2, 5, 7, 3), (3, 25, 2, 2), (2, 13, 17, 9), (3, 7, 1, 4)):
            x, sizes, hx, cx, weights, mode = layer("RNN_RELU", steps, batch, inputs, hidden, directions=2, draw=draw)
            weights = [w.sign() for w in weights]
            args = to((x, sizes, hx, cx, weights, mode), dtype)
            wide = to(args, torch.float64)
            for t in leaves(args) + leaves(wide):
                t.requires_grad_()
            own, exact = torch.ops.fastnn.rnn(*args), reference.rnn(*wide)
            grads = [testing.integers(y.shape, dtype, -1, 1) for y in own[:2]]
            own_grads = torch.autograd.grad(own[:2], leaves(args), grads)
            exact_grads = torch.autograd.grad(exact[:2], leaves(wide), [g.double() for g in grads])
            limit = 256 if dtype is torch.bfloat16 else 2048  # whole numbers that the dtype holds
            for y, z in zip((*own, *own_grads), (*exact, *exact_grads), strict=True):
                held = z.abs() <= limit
                assert held.double().mean() > 0.8 if z.numel() else True
                assert torch.equal(y.double()[held], z[held])


# steps, batch, inputs, hidden, directions: the backward of csrc/cpu/thin.inl, its columns whole panels, with a tail, or not
FEW_ROWS = (
    (1, 1, 9, 24, 1),
    (1, 8, 40, 32, 1),
    (2, 3, 16, 25, 2),
    (4, 2, 7, 48, 2),
    (7, 1, 70, 16, 1),
    (1, 5, 33, 140, 1),
    (1, 8, 131, 16, 2),
    (1, 8, 1029, 16, 2),
)


@pytest.mark.parametrize("isa", testing.available_isas())
@pytest.mark.parametrize("kind", KINDS)
def test_backward_of_every_variant(kind, isa):
    with testing.forced_isa(isa):
        for steps, batch, inputs, hidden, directions in (
            (1, 1, 3, 2, 1),
            (4, 7, 9, 17, 2),
            (9, 2, 17, 8, 1),
            (2, 13, 5, 33, 2),
            (1, 11, 9, 21, 1),
            *FEW_ROWS,
        ):
            torch.manual_seed(0)
            args = to(layer(kind, steps, batch, inputs, hidden, directions=directions), torch.float32)
            exact = to(args, torch.float64)
            for a in (args, exact):
                for t in leaves(a):
                    t.requires_grad_()
            own, oracle = torch.ops.fastnn.rnn(*args), reference.rnn(*exact)
            grads = [torch.randn_like(y) for y in own]
            wanted = [i for i, y in enumerate(own) if y.requires_grad and y.numel()]
            gs = torch.autograd.grad([own[i] for i in wanted], leaves(args), [grads[i] for i in wanted])
            zs = torch.autograd.grad([oracle[i] for i in wanted], leaves(exact), [grads[i].double() for i in wanted])
            for g, z in zip(gs, zs, strict=True):
                testing.assert_close_to_oracle(g, z, z.abs().amax() + 1, c=64, name=f"{kind} {g.shape}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("enforce_sorted", (True, False))
def test_packed_sequence(kind, enforce_sorted):
    lengths = [9, 7, 7, 4, 1, 1] if enforce_sorted else [4, 9, 1, 7, 1, 7]
    for bidirectional, with_state in itertools.product((False, True), (False, True)):
        torch.manual_seed(0)
        stock, own = modules(kind, 5, 18, torch.float64, num_layers=2, bidirectional=bidirectional)
        data = [torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in lengths]
        state = None
        if with_state:
            d = 4 if bidirectional else 2
            state = torch.randn(d, 6, own.proj_size or 18, dtype=torch.float64, requires_grad=True)
            if own.mode == "LSTM":
                state = (state, torch.randn(d, 6, 18, dtype=torch.float64, requires_grad=True))
        found = []
        for module in (stock, own):
            y, h = module(pack_sequence(data, enforce_sorted), state)
            assert isinstance(y, PackedSequence)
            ys = [y.data, *tensors(h)]
            torch.manual_seed(1)
            grads = [torch.randn_like(t) for t in ys]
            wanted = data + list(module.parameters()) + (tensors(state) if with_state else [])
            found.append((y, ys + list(torch.autograd.grad(ys, wanted, grads))))
        for a, b in zip(found[0][1], found[1][1], strict=True):
            torch.testing.assert_close(b, a)
        (a, la), (b, lb) = (pad_packed_sequence(y) for y, _ in found)
        assert torch.equal(la, lb)
        torch.testing.assert_close(b, a)


@pytest.mark.parametrize("kind", KINDS)
def test_same_on_any_number_of_threads(kind):
    for steps, batch, inputs, hidden, directions in (
        (12, 1, 40, 200, 1),
        (5, 37, 24, 96, 2),
        (6, 64, 16, 32, 1),
        (3, 13, 64, 160, 2),
        (1, 30, 120, 170, 1),
        (1, 2, 300, 330, 1),
        (4, 2, 100, 250, 2),
    ):
        torch.manual_seed(0)
        args = layer(kind, steps, batch, inputs, hidden, torch.float32, directions)
        for t in leaves(args):
            t.requires_grad_()
        runs = []
        packed = packs(to(args, torch.float32))
        for count in (1, 2, 3, 5):
            with testing.threads(count):
                ys = [y for y in torch.ops.fastnn.rnn(*args) if y.numel()]
                runs.append(ys + list(torch.autograd.grad(sum((y * y).sum() for y in ys), leaves(args))))
                with torch.no_grad():
                    runs[-1] += torch.ops.fastnn.rnn(*args, packed)
        for run in runs[1:]:
            for a, b in zip(runs[0], run, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("side", ("before", "after"))
@pytest.mark.parametrize("isa", testing.available_isas())
@pytest.mark.parametrize("kind", KINDS)
def test_guard_pages(kind, isa, side):
    shapes = (
        (1, 1, 3, 5),
        (1, 3, 8, 8),
        (3, 7, 5, 9),
        (20, 1, 9, 17),
        (2, 13, 17, 7),
        (1, 11, 9, 21),
        *(few[:4] for few in FEW_ROWS),
    )
    with testing.forced_isa(isa), testing.guarded_outputs(side):
        for (steps, batch, inputs, hidden), dtype in itertools.product(shapes, DTYPES):
            x, sizes, hx, cx, weights, mode = layer(kind, steps, batch, inputs, hidden, dtype, 2)
            args = (
                testing.guarded(x, side),
                sizes,
                testing.guarded(hx, side),
                cx if cx is None else testing.guarded(cx, side),
            )
            args = (*args, [testing.guarded(w, side) for w in weights], mode)
            for t in leaves(args):
                t.requires_grad_()
            ys = [y for y in torch.ops.fastnn.rnn(*args) if y.numel()]
            grads = torch.autograd.grad(ys, leaves(args), [torch.ones_like(y) for y in ys])
            with torch.no_grad():
                packed = [testing.guarded(t, side) for t in packs(args)]
                ys += torch.ops.fastnn.rnn(*args, packed)
            assert all(t.isfinite().all() for t in (*ys, *grads, *packed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", (False, True))
def test_gradcheck_and_gradgradcheck(kind, packed):
    torch.manual_seed(0)
    x, sizes, hx, cx, weights, mode = layer(kind, 3, 2, 2, 3, torch.float64, 2)
    if packed:
        sequence = pack_padded_sequence(x, [3, 1])
        x, sizes = sequence.data, sequence.batch_sizes
    inputs = [t.requires_grad_() for t in leaves((x, sizes, hx, cx, weights))]

    def f(x, hx, *rest):
        cell, ws = (rest[0], rest[1:]) if mode == "LSTM" else (None, rest)
        ys = torch.ops.fastnn.rnn(x, sizes, hx, cell, list(ws), mode)
        return ys if mode == "LSTM" else ys[:2]

    fast = dict(fast_mode=True)
    assert torch.autograd.gradcheck(f, inputs, **fast)
    assert torch.autograd.gradgradcheck(f, inputs, **fast)


@pytest.mark.parametrize("kind", KINDS)
def test_partial_gradients(kind):
    args = layer(kind, 4, 3, 5, 6, torch.float64, 2)
    everything = leaves(args)
    for t in everything:
        t.requires_grad_()
    full = torch.autograd.grad(torch.ops.fastnn.rnn(*args)[0].sin().sum(), everything)
    for i, t in enumerate(everything):
        for other in everything:
            other.requires_grad_(other is t)
        (grad,) = torch.autograd.grad(torch.ops.fastnn.rnn(*args)[0].sin().sum(), (t,))
        torch.testing.assert_close(grad, full[i])
    x, sizes, hx, cx, weights, mode = args
    for index in range(2 if mode != "LSTM" else 3):  # the gradient of one output alone
        for t in everything:
            t.requires_grad_()
        own = torch.autograd.grad(torch.ops.fastnn.rnn(*args)[index].sin().sum(), everything)
        oracle = torch.autograd.grad(reference.rnn(*args)[index].sin().sum(), everything)
        for a, b in zip(own, oracle, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_compile(kind):
    torch._dynamo.reset()
    kwargs = dict(num_layers=2, bidirectional=True, batch_first=True)
    _, own = modules(kind, 5, 8, **kwargs)
    compiled = torch.compile(own, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 4, 5, requires_grad=True)
    for a, b in zip(tensors(compiled(x)), tensors(own(x)), strict=True):
        assert torch.equal(a, b)
    grads = [torch.autograd.grad(tensors(m(x))[0].sin().sum(), [x, *own.parameters()]) for m in (own, compiled)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        assert torch.equal(compiled(x)[0], own(x)[0])


def test_compile_packs_and_pads():
    torch._dynamo.reset()
    _, own = modules("GRU", 4, 5, bidirectional=True)

    def f(x, lengths):
        return pad_packed_sequence(own(pack_padded_sequence(x, lengths, enforce_sorted=False))[0])[0].tanh()

    x, lengths = torch.randn(6, 3, 4, requires_grad=True), torch.tensor([4, 6, 2])
    compiled = torch.compile(f, backend="aot_eager")
    grads = [torch.autograd.grad(g(x, lengths).sum(), [x, *own.parameters()]) for g in (f, compiled)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_compile_inductor_training():
    torch._dynamo.reset()
    _, own = modules("LSTM", 5, 8)
    cell = nn.GRUCell(8, 8)
    f = lambda x: cell(own(x)[0][-1])  # noqa: E731
    x = torch.randn(3, 4, 5, requires_grad=True)
    grads = [torch.autograd.grad(g(x).sum(), [x, *own.parameters()]) for g in (f, torch.compile(f, fullgraph=True))]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def cells(kind, inputs, hidden, dtype=torch.float32, **kwargs):
    name = kind.split("_")[0] + "Cell"
    if name == "RNNCell":
        kwargs["nonlinearity"] = kind[4:].lower()
    stock, own = (getattr(m, name)(inputs, hidden, **kwargs).to(dtype) for m in (torch.nn, nn))
    own.load_state_dict(stock.state_dict())
    return stock, own


@pytest.mark.parametrize("kind", KINDS[:4])
def test_cells(kind):
    for inputs, hidden, batch, bias, dtype in itertools.product((1, 16), (5, 16), (1, 33), (True, False), DTYPES):
        torch.manual_seed(0)
        stock, own = cells(kind, inputs, hidden, dtype, bias=bias)
        x = torch.randn(batch, inputs, dtype=torch.float64).to(dtype).requires_grad_()
        state = torch.randn(batch, hidden, dtype=torch.float64).to(dtype).requires_grad_()
        state = (state, state * 0.5) if kind == "LSTM" else state
        exact = copy.deepcopy(stock).double()
        wide = [t.double() for t in tensors(state)]
        oracle = tensors(exact(x.double(), tuple(wide) if kind == "LSTM" else wide[0]))
        for a, b, z in zip(tensors(stock(x, state)), tensors(own(x, state)), oracle, strict=True):
            testing.assert_close_to_oracle(b, z, z.abs() + 1, a if dtype.itemsize > 2 else None, name=f"{kind} {dtype}")
        assert torch.equal(
            tensors(own(x))[0],
            tensors(own(x, tuple(t * 0 for t in wide_like(state, own, x))))[0]
            if kind == "LSTM"
            else own(x, torch.zeros_like(state)),
        )
        if dtype == torch.float64:
            grads = [
                torch.autograd.grad(sum(t.sin().sum() for t in tensors(m(x, state))), [x, *m.parameters()])
                for m in (stock, own)
            ]
            for a, b in zip(*grads, strict=True):
                torch.testing.assert_close(b, a)
        for a, b in zip(tensors(own(x[0])), tensors(own(x[:1])), strict=True):
            assert torch.equal(a, b[0])


def wide_like(state, own, x):
    return [torch.zeros(x.shape[0], own.hidden_size, dtype=x.dtype)] * 2


def test_cell_functions_have_torchs_signature():
    x, h = torch.randn(3, 4), torch.randn(3, 5)
    for name, gates in (("rnn_tanh_cell", 1), ("rnn_relu_cell", 1), ("gru_cell", 3), ("lstm_cell", 4)):
        w_ih, w_hh, b = torch.randn(5 * gates, 4), torch.randn(5 * gates, 5), torch.randn(5 * gates)
        state = (h, h) if name == "lstm_cell" else h
        for biases in ({}, {"b_ih": b, "b_hh": b}):
            own = getattr(functional, name)(x, state, w_ih, w_hh, **biases)
            stock = getattr(torch, name)(x, state, w_ih, w_hh, **biases)
            torch.testing.assert_close(own, stock)
        mode = {"gru_cell": "GRU", "lstm_cell": "LSTM"}.get(name, name[:8].upper())
        packed = torch.ops.fastnn.rnn_pack([w_ih, w_hh, b, b], mode)
        for call in (getattr(functional, name), torch.compile(getattr(functional, name), backend="aot_eager")):
            torch.testing.assert_close(call(x, state, w_ih, w_hh, b, b, packed=packed), stock)
    one = functional.rnn_tanh_cell(x, h, w_ih[:5], w_hh[:5], b[:5])
    torch.testing.assert_close(one, torch.tanh(x @ w_ih[:5].T + b[:5] + h @ w_hh[:5].T))


@pytest.mark.parametrize("kind", KINDS)
def test_no_operator_of_torch_does_the_work(kind):
    _, own = modules(kind, 8, 16, num_layers=2, bidirectional=True)
    x = torch.randn(5, 3, 8, requires_grad=True)
    testing.assert_own_kernels(lambda: tensors(own(x))[0].sum().backward())


def test_no_operator_of_torch_in_cells():
    for kind in KINDS[:4]:
        _, own = cells(kind, 8, 16)
        x = torch.randn(3, 8, requires_grad=True)
        testing.assert_own_kernels(lambda own=own, x=x: tensors(own(x))[0].sum().backward())


@pytest.mark.parametrize("kind", KINDS)
def test_module_face(kind):
    stock, own = modules(kind, 3, 4, num_layers=2, bidirectional=True, dropout=0.5, batch_first=True)
    assert repr(own) == repr(stock)
    assert list(own.state_dict()) == list(stock.state_dict())
    stock.load_state_dict(own.state_dict())
    assert [[t.shape for t in ts] for ts in own.all_weights] == [[t.shape for t in ts] for ts in stock.all_weights]
    own.flatten_parameters()
    x = torch.randn(2, 5, 3)
    torch.manual_seed(3)
    a = stock(x)[0]
    torch.manual_seed(3)
    torch.testing.assert_close(own(x)[0], a)  # the same dropout
    own.eval()
    y = own(x)[0]
    file = io.BytesIO()
    torch.save(own, file)
    file.seek(0)
    for twin in (copy.deepcopy(own), pickle.loads(pickle.dumps(own)), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x)[0], y)
    seen = []
    own.register_forward_hook(lambda *a: seen.append(1))
    own(x)
    assert seen
    weights = {name: torch.zeros_like(p) for name, p in own.named_parameters()}
    assert torch.func.functional_call(own, weights, x)[0].abs().max() == 0
    meta = type(own)(3, 4, device="meta", **({"nonlinearity": "relu"} if kind == "RNN_RELU" else {}))
    assert meta(torch.randn(5, 2, 3, device="meta"))[0].shape == (5, 2, 4)
    assert own.double()(x.double())[0].dtype == torch.float64


def test_unbatched_and_states():
    for kind, batch_first in itertools.product(KINDS, (False, True)):
        stock, own = modules(kind, 3, 6, num_layers=2, bidirectional=True, batch_first=batch_first)
        state = torch.randn(4, own.proj_size or 6)
        state = (state, torch.randn(4, 6)) if own.mode == "LSTM" else state
        x = torch.randn(5, 3)
        for a, b in zip(tensors(stock(x, state)), tensors(own(x, state)), strict=True):
            torch.testing.assert_close(b, a)
        for a, b in zip(tensors(stock(x)), tensors(own(x)), strict=True):
            torch.testing.assert_close(b, a)
        x = torch.randn(5, 0, 3) if not batch_first else torch.randn(0, 5, 3)
        assert own(x)[0].shape == stock(x)[0].shape


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(layout):
    for kind in KINDS:
        _, own = modules(kind, 6, 7)
        x = testing.random((4, 3, 6), layout=layout, requires_grad=True)
        dense = x.detach().contiguous().requires_grad_()
        a, b = own(x)[0], own(dense)[0]
        assert torch.equal(a, b)
        assert torch.equal(
            *(
                torch.autograd.grad(y, t, testing.laid_out(torch.ones_like(y), layout))[0]
                for y, t in ((a, x), (b, dense))
            )
        )


def test_errors():
    for name, module in (("GRU", nn.GRU), ("RNN", nn.RNN)):
        with pytest.raises(ValueError, match="proj_size"):
            module(3, 4, proj_size=2)
    with pytest.raises(ValueError, match="Unknown nonlinearity"):
        nn.RNN(3, 4, nonlinearity="sin")
    for kind in KINDS:
        stock, own = modules(kind, 3, 4)
        state = (torch.zeros(1, 2, own.proj_size or 4), torch.zeros(1, 2, 4))
        state = state if own.mode == "LSTM" else state[0]
        wrong = [
            (torch.randn(5, 2, 7),),
            (torch.randn(1, 5, 2, 3),),
            (torch.randn(5, 2, 3, dtype=torch.float64),),
            (torch.randn(5, 3, 3), state),
            (torch.randn(5, 3), state),
            (torch.randn(0, 2, 3),),
        ]
        for args in wrong:
            with pytest.raises((RuntimeError, ValueError)) as expected:
                stock(*args)
            with pytest.raises(expected.type):
                own(*args)
    with pytest.raises(ValueError, match="mode must be one of"):
        torch.ops.fastnn.rnn(
            torch.randn(2, 1, 3), None, torch.zeros(1, 1, 4), None, [torch.randn(4, 3), torch.randn(4, 4)], "ELU"
        )
    good = layer("GRU", 3, 2, 4, 5)
    for position, value in (
        (0, torch.randn(3, 2, 9)),
        (2, torch.zeros(1, 3, 5)),
        (4, good[4][:1]),
        (3, good[2]),
        (1, torch.tensor([1, 2])),
    ):
        args = list(good)
        args[position] = value
        with pytest.raises(RuntimeError, match=r"fastnn\.rnn: "):
            torch.ops.fastnn.rnn(*args)
    for sizes in ([3, 2], [1, 4], [5, 0]):
        with pytest.raises(RuntimeError, match="batch_sizes must be"):
            torch.ops.fastnn.rnn(
                torch.randn(5, 4), torch.tensor(sizes), torch.zeros(1, sizes[0], 5), None, good[4], "GRU"
            ) if sizes != [3, 2] else torch.ops.fastnn.rnn(
                torch.randn(6, 4), torch.tensor(sizes), torch.zeros(1, 3, 5), None, good[4], "GRU"
            )


def test_fallback_to_torch():
    stock, own = modules("LSTM", 3, 4, num_layers=2)

    class Tagged(torch.Tensor):
        pass

    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(own(x.as_subclass(Tagged))[0].as_subclass(torch.Tensor), stock(x)[0])
    fastnn.set_fallback("error")
    try:
        with pytest.raises(RuntimeError, match="no kernel"):
            own(x.as_subclass(Tagged))
    finally:
        fastnn.set_fallback("torch")


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_an_empty_batch(kind):
    made = modules(kind, 3, 4, bidirectional=True)
    name = {"RNN_TANH": "RNNCell", "RNN_RELU": "RNNCell", "GRU": "GRUCell"}.get(kind, "LSTMCell")
    for shape, pair in (((2, 0, 3), made), ((0, 3), [getattr(m, name)(3, 4) for m in (torch.nn, nn)])):
        found = []
        for module in pair:
            x = torch.randn(shape, requires_grad=True)
            outputs = tensors(module(x))
            grads = torch.autograd.grad(sum(y.sum() for y in outputs), (x, *module.parameters()))
            found.append([*outputs, *grads])
        torch.testing.assert_close(*found)


def test_module_info_samples():
    from torch.testing._internal.common_modules import module_db

    done = 0
    for info in module_db:
        own_class = getattr(nn, info.module_cls.__name__, None)
        if own_class is None or not info.name.startswith("nn.") or "RNN" not in info.name + str(own_class.__mro__):
            continue
        for dtype, training in ((torch.float32, True), (torch.float64, False)):
            for sample in info.module_inputs_func(
                info, device="cpu", dtype=dtype, requires_grad=True, training=training
            ):
                c, f = sample.constructor_input, sample.forward_input
                stock = info.module_cls(*c.args, **c.kwargs).to(dtype)
                own = own_class(*c.args, **c.kwargs).to(dtype)
                own.load_state_dict(stock.state_dict())
                a, b = tensors(stock(*f.args, **f.kwargs)), tensors(own(*f.args, **f.kwargs))
                for y, z in zip(a, b, strict=True):
                    torch.testing.assert_close(z, y)
                grads = [
                    torch.autograd.grad(sum(y.sum() for y in ys), list(m.parameters()))
                    for ys, m in ((a, stock), (b, own))
                ]
                for y, z in zip(*grads, strict=True):
                    torch.testing.assert_close(z, y)
                done += 1
    assert done >= 100


def test_reads_its_weights_at_each_call():
    _, own = modules("GRU", 3, 4)
    x = torch.randn(5, 2, 3)
    with torch.no_grad():
        before = own(x)[0]
        own.weight_hh_l0.mul_(2)
        assert not torch.equal(own(x)[0], before)
        own.weight_hh_l0.data = own.weight_hh_l0.data / 2
        assert torch.equal(own(x)[0], before)
        torch.nn.utils.parametrize.register_parametrization(own, "weight_ih_l0", torch.nn.Identity())
        assert torch.equal(own(x)[0], before)
