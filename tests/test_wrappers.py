"""What wraps modules: each wrapper around each family's module, against the stock module in float64, gradients too."""

import copy
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.testing._internal.logging_tensor import LoggingTensor
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import fastnn
from fastnn import _fallback

pytestmark = pytest.mark.usefixtures("one_thread")


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


# name -> stock module, its input, and the name of a weight that wrappers reparametrize
FAMILIES = {
    "linear": (lambda: nn.Linear(4, 3), lambda: (randn(5, 4),), "weight"),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3, padding=1), lambda: (randn(2, 2, 5, 4),), "weight"),
    "lstm": (lambda: nn.LSTM(4, 3, 2), lambda: (randn(3, 2, 4),), "weight_hh_l0"),
    "gru-cell": (lambda: nn.GRUCell(4, 3), lambda: (randn(2, 4),), "weight_ih"),
    "attention": (
        lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        lambda: (randn(2, 3, 4),) * 3,
        "in_proj_weight",
    ),
}
EVERY = pytest.mark.parametrize("name", FAMILIES)


def pair(name):
    """A stock module, and its twin on fastnn's kernels."""
    stock = FAMILIES[name][0]().double()
    fast = fastnn.accelerate(copy.deepcopy(stock))  # which shares its parameters with what it is given
    assert type(fast).__module__.startswith("fastnn.")
    return fast, stock


def inputs(name):
    return FAMILIES[name][1]()


def floats(results):
    return [t for t in torch.utils._pytree.tree_leaves(results) if isinstance(t, torch.Tensor)]


def outcome(call, args, leaves):
    """Results, and the gradients of the first argument and of the leaves. Equal arguments stay one tensor."""
    first = args[0].clone().requires_grad_()
    args = tuple(first if t is args[0] else t for t in args)
    for leaf in leaves:
        leaf.grad = None
    results = floats(call(*args))
    sum(t.sin().sum() for t in results).backward()
    return results, [t.grad for t in (first, *leaves)]


def assert_same(fast, stock, args, calls=(None, None)):
    before = _fallback.calls.total()
    found = outcome(calls[0] or fast, args, list(fast.parameters()))
    assert _fallback.calls.total() == before, "torch served a call that has a kernel"
    expected = outcome(calls[1] or stock, args, list(stock.parameters()))
    torch.testing.assert_close(found, expected)


@EVERY
@pytest.mark.works("Transforms", "torch.func.functional_call and torch.nn.utils.stateless")
def test_functional_call(name):
    fast, stock = pair(name)
    args = inputs(name)
    state = {key: torch.randn_like(p).requires_grad_() for key, p in stock.named_parameters()}
    from torch.nn.utils import stateless

    for call in (torch.func.functional_call, stateless._functional_call):
        results = [outcome(lambda *a, m=m: call(m, state, a), args, list(state.values())) for m in (fast, stock)]
        torch.testing.assert_close(*results)


@EVERY
@pytest.mark.works("Transforms", "stack_module_state: an ensemble of modules under vmap, with gradients of each")
def test_ensembles(name):
    pairs = [pair(name) for _ in range(3)]
    args = inputs(name)
    modules = [fast for fast, _ in pairs]
    state, buffers = torch.func.stack_module_state(modules)

    def loss(state, buffers, *args):
        results = floats(torch.func.functional_call(modules[0], (state, buffers), args))
        return sum(t.sin().sum() for t in results), results

    dims = (0, 0, *(None for _ in args))
    grads, results = torch.func.vmap(torch.func.grad(loss, has_aux=True), dims)(state, buffers, *args)
    for i, (_, stock) in enumerate(pairs):
        expected = floats(stock(*args))
        torch.testing.assert_close([t[i] for t in results], expected)
        wanted = torch.autograd.grad(sum(t.sin().sum() for t in expected), list(stock.parameters()))
        torch.testing.assert_close([grads[key][i] for key, _ in stock.named_parameters()], list(wanted))


@EVERY
@pytest.mark.works("Transforms", "per-sample gradients of modules: vmap of grad of functional_call")
def test_per_sample_gradients(name):
    if name == "lstm":
        batch_dim = 1
    else:
        batch_dim = 0
    fast, stock = pair(name)
    args = inputs(name)

    def of(module):
        def loss(state, *args):
            return sum(t.sin().sum() for t in floats(torch.func.functional_call(module, state, args)))

        return loss

    state = {key: p.detach() for key, p in stock.named_parameters()}
    before = _fallback.calls.total()
    # Self-attention sees that its three arguments are one: so here.
    call = (lambda s, x: of(fast)(s, x, x, x)) if name == "attention" else of(fast)
    plain = (lambda s, x: of(stock)(s, x, x, x)) if name == "attention" else of(stock)
    found = torch.func.vmap(torch.func.grad(call), (None, batch_dim))(state, args[0])
    assert _fallback.calls.total() == before
    for i in range(args[0].shape[batch_dim]):
        expected = torch.func.grad(plain)(state, args[0].select(batch_dim, i))
        torch.testing.assert_close({key: g[i] for key, g in found.items()}, expected)


@EVERY
@pytest.mark.parametrize("reentrant", (True, False))
@pytest.mark.works("Transforms", "torch.utils.checkpoint, reentrant and not")
def test_checkpoint(name, reentrant):
    fast, stock = pair(name)
    calls = [lambda *args, m=m: checkpoint(m, *args, use_reentrant=reentrant) for m in (fast, stock)]
    assert_same(fast, stock, inputs(name), calls)


def seeded(wrap):
    def call(module, name):
        torch.manual_seed(5)  # some start from random vectors
        return wrap(module, name)

    return call


REPARAMETRIZED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": seeded(parametrizations.spectral_norm),
    "orthogonal": seeded(parametrizations.orthogonal),
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": seeded(nn.utils.spectral_norm),
    "prune": lambda module, name: prune.l1_unstructured(module, name, 0.4),
    "custom mask": lambda module, name: prune.custom_from_mask(module, name, getattr(module, name) > 0),
}


@EVERY
@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.works(
    "Transforms", "parametrizations (weight_norm, spectral_norm, orthogonal), their older forms, and pruning"
)
@pytest.mark.parametrize("how", REPARAMETRIZED)
def test_reparametrized_weights(name, how):
    fast, stock = pair(name)
    args = inputs(name)
    for module in (fast, stock):
        REPARAMETRIZED[how](module, FAMILIES[name][2])

    def cached(module):  # spectral_norm takes a step at each look at the weight, and torch looks more often
        def call(*args):
            with nn.utils.parametrize.cached():
                return module(*args)

        return call

    if name == "lstm" and how in ("old weight_norm", "old spectral_norm", "prune", "custom mask"):
        # torch's LSTM reads the weights that it was built with; the formula is that of the weights of today.
        plain = copy.deepcopy(FAMILIES[name][0]().double())
        for hook in fast._forward_pre_hooks.values():
            hook(fast, args)
        with torch.no_grad():
            for key, p in plain.named_parameters():
                p.copy_(getattr(fast, key))
        torch.testing.assert_close(floats(fast.eval()(*args)), floats(plain(*args)))
        return
    assert_same(fast, stock, args, [cached(m) for m in (fast, stock)])
    if how in ("prune", "custom mask"):
        for module in (fast, stock):
            prune.remove(module, FAMILIES[name][2])
        assert_same(fast, stock, args)


@EVERY
@pytest.mark.works("Transforms", "hooks: forward, backward, of every module; saved_tensors_hooks, save_on_cpu")
def test_hooks(name):
    fast, stock = pair(name)
    args = inputs(name)
    seen = []
    for module in (fast, stock):
        module.register_forward_hook(
            lambda m, a, out: torch.utils._pytree.tree_map(lambda t: t if t is None else t * 2, out)
        )
        module.register_full_backward_hook(lambda m, gi, go: seen.append(floats(go)))
        module.register_full_backward_pre_hook(lambda m, go: tuple(None if g is None else g * 3 for g in go))
    every = nn.modules.module.register_module_forward_hook(lambda m, a, out: seen.append(floats(out)))
    try:
        assert_same(fast, stock, args)
    finally:
        every.remove()
    kept = []

    def saving(module):
        def call(*args):
            with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t.clone(), lambda t: t):
                return module(*args)

        return call

    def on_cpu(module):
        def call(*args):
            with torch.autograd.graph.save_on_cpu():
                return module(*args)

        return call

    assert_same(fast, stock, args, [saving(m) for m in (fast, stock)])
    assert_same(fast, stock, args, [on_cpu(m) for m in (fast, stock)])
    assert kept and seen


@EVERY
@pytest.mark.works("Transforms", "skip_init, parameters_to_vector, AveragedModel (SWA and EMA)")
def test_averaged_and_flattened_parameters(name):
    from torch.nn.utils import parameters_to_vector, vector_to_parameters
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    fast, stock = pair(name)
    args = inputs(name)
    averaged = [AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9)) for m in (fast, stock)]
    for module in (fast, stock):
        vector = parameters_to_vector(module.parameters())
        vector_to_parameters(vector.cos(), module.parameters())
    for average, module in zip(averaged, (fast, stock), strict=True):
        average.update_parameters(module)
        average.update_parameters(module)
    assert_same(*averaged, args)
    assert_same(fast, stock, args)


def test_skip_init():
    layer = nn.utils.skip_init(fastnn.nn.Linear, 4, 3, activation="relu")
    nn.init.ones_(layer.weight), nn.init.zeros_(layer.bias)
    assert torch.equal(layer(torch.ones(2, 4)), torch.full((2, 3), 4.0))


@pytest.mark.works("Transforms", "lazy modules, accelerated once they are materialised")
def test_lazy_modules():
    net = nn.Sequential(nn.LazyConv2d(3, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)).double()
    x = randn(2, 2, 5, 5)
    net(x)
    fast = fastnn.accelerate(net)
    assert type(fast[0]) is fastnn.nn.Conv2d and type(fast[3]) is fastnn.nn.Linear
    assert_same(fast, net, (x,))
    early = fastnn.accelerate(nn.Sequential(nn.LazyLinear(2)))
    assert early(torch.randn(3, 4)).shape == (3, 2)


class Logged(torch.Tensor):
    """A subclass with a __torch_function__ of its own."""

    seen: ClassVar[list] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


@EVERY
@pytest.mark.works(
    "Transforms", "tensor subclasses: __torch_function__, __torch_dispatch__ wrappers, masked, nested, quantized"
)
def test_subclasses(name):
    fast, stock = pair(name)
    args = inputs(name)
    Logged.seen.clear()
    wrapped = args[0].as_subclass(Logged)
    found, expected = (floats(m(*[wrapped] * len(args))) for m in (fast, stock))
    assert Logged.seen and all(type(t) is Logged for t in found)
    torch.testing.assert_close(
        [t.as_subclass(torch.Tensor) for t in found], [t.as_subclass(torch.Tensor) for t in expected]
    )
    for wrap, unwrap in (
        (lambda t: TwoTensor(t, t + 1), lambda t: (t.a, t.b)),
        (LoggingTensor, lambda t: (t.elem,)),
    ):
        with torch.no_grad():
            results = floats(fast(*[wrap(args[0])] * len(args)))
            plain = [floats(stock(*[t] * len(args))) for t in unwrap(wrap(args[0]))]
        assert all(type(t) is type(wrap(args[0])) for t in results)
        for i, t in enumerate(results):
            torch.testing.assert_close(list(unwrap(t)), [p[i] for p in plain])


@pytest.mark.filterwarnings("ignore:The PyTorch API of", "ignore:.*prototype")
@pytest.mark.works("Transforms", "tensor subclasses: __torch_function__, __torch_dispatch__ wrappers, masked, nested")
def test_masked_and_nested_tensors():
    """Torch serves them, and the call is counted."""
    fast, stock = pair("linear")
    nested = torch.nested.nested_tensor([randn(2, 4), randn(3, 4)], layout=torch.jagged)
    strided = torch.nested.nested_tensor([randn(2, 4), randn(3, 4)])
    for t in (nested, strided):
        before = _fallback.calls.total()
        for y, z in zip(fast(t).unbind(), stock(t).unbind(), strict=True):
            torch.testing.assert_close(y, z)
        assert _fallback.calls.total() == before + 1
    masked = torch.masked.masked_tensor(randn(2, 4), torch.tensor([[True] * 4, [True, False, True, False]]))
    errors = []
    for module in (fast, stock):
        with pytest.raises(Exception) as raised:  # torch has no matmul of masked tensors: nor have we
            module(masked)
        errors.append(type(raised.value))
    assert errors[0] is errors[1]
