"""Precision of whole models: autocast's rules, GradScaler, default dtypes and torch's switches, beside stock torch."""

import contextlib
import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree

import fastnn
import fastnn.functional as fF
import fastnn.nn as fnn
from tests.modules import operators, twins
from tests.precision import (  # noqa: F401  fixtures of every test
    LOW,
    MODULES,
    STEPS,
    _no_fast_path,
    _nothing_falls_back,
    autocast,
    cast_input,
    compare,
    compare_training,
    low_dtypes,
    pair,
    randn,
)
from tests.test_nn import doubled, no_worse

pytestmark = pytest.mark.usefixtures("one_thread")


# --------------------------------------------------------------------------------------------------- whole models


class Convnet(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        return self.head(self.body(x))


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.rnn = nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.rnn(self.encoder(x))[0].mean(1))


WHOLE = {"convnet": (Convnet, lambda: randn(4, 3, 12, 12)), "transformer": (Tagger, lambda: randn(4, 5, 16))}


def train(model, x, region, steps=6, scaler=None, spoil=None):
    """Losses of a few steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    target, losses = torch.arange(len(x)) % 4, []
    for step in range(steps):
        optimizer.zero_grad()
        with region():
            loss = F.cross_entropy(model(x * (torch.inf if step == spoil else 1)).float(), target)
        losses.append(loss.item())
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert all(p.grad.dtype == p.dtype for p in model.parameters())
    return torch.tensor(losses)


@pytest.mark.works("Precision", "`torch.autocast` and `accelerate`: training, evaluation, `freeze`")
@low_dtypes
@pytest.mark.parametrize("name", WHOLE)
def test_accelerated(name, low):
    """A model trained beside the stock one: the same losses, and after it the same answers, frozen too."""
    make, inputs = WHOLE[name]
    stock, x = make(), inputs()
    fast = fastnn.accelerate(copy.deepcopy(stock))
    exact = copy.deepcopy(stock)
    ours, theirs = train(fast, x, lambda: autocast(low)), train(stock, x, lambda: autocast(low))
    right = train(exact, x, contextlib.nullcontext)
    assert theirs[-1] < theirs[0]
    assert (ours - right).abs().max() <= 2 * (theirs - right).abs().max() + 8 * torch.finfo(low).eps

    fast.load_state_dict(stock.state_dict())
    oracle = copy.deepcopy(stock).double()
    for module in (fast, stock, oracle):
        module.eval()
    for _ in ("as it is", "frozen", "and packed"):
        with torch.inference_mode():
            with autocast(low):
                ours, theirs = fast(x), stock(x)
            no_worse([ours], [theirs], [oracle(x.double())])
        fastnn.freeze(fast)


@pytest.mark.works("Precision", '`torch.amp.GradScaler("cpu")` with float16 autocast')
@pytest.mark.parametrize("name", WHOLE)
def test_grad_scaler(name):
    """Losses as stock's; a step whose gradients are not finite is left out, and the scale falls."""
    make, inputs = WHOLE[name]
    stock, x = make(), inputs()
    if name == "convnet":
        stock.body[1].momentum = 0.0  # an infinite batch stays in no running mean
    fast = fastnn.accelerate(copy.deepcopy(stock))
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in range(2)]
    ours, theirs = (
        train(model, x, lambda: autocast(torch.float16), scaler=scaler, spoil=2)
        for model, scaler in zip((fast, stock), scalers, strict=True)
    )
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2, equal_nan=True)
    assert ours[2].isnan() and ours[[0, 1, 3, 4, 5]].isfinite().all()
    assert [s.get_scale() for s in scalers] == [2.0**9] * 2


# ------------------------------------------------------------------------------------------------ rules of the region


@low_dtypes
@pytest.mark.parametrize("name", MODULES)
def test_float64_is_never_cast(name, low):
    *_, make, kwargs = MODULES[name]
    fast, x = pair(name)[0].double().eval(), doubled(make())
    expected = fast(*x, **kwargs)
    with autocast(low):
        found = fast(*x, **kwargs)
        with pytest.raises(RuntimeError, match="dtype"):  # as in torch, whose words for it differ
            fast.float()(*x, **kwargs)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_nested_regions():
    """enabled=False ends it, a region inside has its own dtype."""
    layer, x = fnn.Linear(16, 8), randn(4, 16)
    plain = layer(x)
    with autocast(torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        with autocast(torch.bfloat16, enabled=False):
            assert torch.equal(layer(x), plain)
        with autocast(torch.float16, cache_enabled=False):
            assert fF.linear(x, layer.weight * 1).dtype == torch.float16
        assert layer(x).dtype == torch.bfloat16
    assert torch.equal(layer(x), plain)


@pytest.mark.parametrize("cache_enabled", [True, False])
def test_weights_are_cast_once(cache_enabled):
    """And at each call with cache_enabled=False; an edit inside the region shows there alone, as in torch."""
    fast, stock = twins(fnn.Linear(16, 8), nn.Linear(16, 8))
    x = randn(4, 16).to(torch.bfloat16)
    counts = []
    for layer in (fast, stock):

        def calls(layer=layer):
            with autocast(torch.bfloat16, cache_enabled=cache_enabled):
                for _ in range(3):
                    layer(x)

        counts.append(operators(calls).get("aten::_to_copy", 0))
    assert counts[0] == counts[1] == (2 if cache_enabled else 6)


def test_inference_mode_inside_and_outside():
    layer, x = fnn.Linear(16, 8), randn(4, 16)
    for outer, inner in itertools.permutations((torch.inference_mode, lambda: autocast(torch.bfloat16))):
        with outer(), inner():
            y = layer(x)
        assert y.dtype == torch.bfloat16 and y.is_inference()
    with autocast(torch.bfloat16):
        layer(x).sum().backward()
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.works("Precision", "`torch.amp.custom_fwd` and `custom_bwd`")
def test_custom_function():
    """A user's Function with a fastnn call inside: in its own dtype, or without autocast, forward and backward."""

    class Twice(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return fF.linear(x, weight) * 2

        @staticmethod
        @torch.amp.custom_bwd(device_type="cpu")
        def backward(ctx, grad):
            x, weight = ctx.saved_tensors
            assert grad.dtype == torch.float32
            return fF.linear(grad, weight.mT) * 2, fF.linear(grad.mT, x.mT) * 2

    x, weight = randn(4, 16).bfloat16().requires_grad_(), randn(8, 16).requires_grad_()
    with autocast(torch.bfloat16):
        y = Twice.apply(x, weight)
        y.sum().backward()
    assert y.dtype == torch.float32 and x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(y, F.linear(x.float(), weight) * 2)
    torch.testing.assert_close(weight.grad, 2 * x.detach().float().sum(0).expand(8, 16), rtol=1e-5, atol=1e-5)


@pytest.mark.works("Precision", "Gradients of gradients, taken inside an autocast region")
@low_dtypes
@pytest.mark.parametrize("name", ["Linear", "Conv2d", "MultiheadAttention, weights", "GRU", "LSTM, projected"])
def test_second_derivatives(name, low):
    """A gradient penalty with backward inside the region: as torch's without autocast, but for roundings."""
    *_, make, kwargs = MODULES[name]
    fast, _, exact = pair(name)
    found = []
    for module, region in ((fast, lambda: autocast(low)), (exact, contextlib.nullcontext)):
        torch.manual_seed(1)
        args = tuple(t.detach().clone().requires_grad_() for t in make())
        args = doubled(args) if module is exact else args
        with region():
            results = [t for t in _pytree.tree_leaves(module(*args, **kwargs)) if t is not None]
            loss = sum(t.double().square().mean() for t in results)
            grads = torch.autograd.grad(loss, args, create_graph=True)
            sum(g.double().square().mean() for g in grads).backward()
        found.append([p.grad for p in module.parameters()])
    scale = max(g.abs().max() for g in found[1])
    for ours, right in zip(*found, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - right).abs().max() <= 16 * torch.finfo(low).eps * scale


@pytest.fixture(scope="module")
def compiled():
    """Compiled once, run by several tests: a step with a region inside, and one for a region around."""
    torch.compiler.reset()
    fast, stock = (lib.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True) for lib in (fnn, nn))
    fast.load_state_dict(stock.state_dict())

    def inside(x):
        with torch.autocast("cpu", torch.bfloat16):
            return fast(x)

    graphs = [torch.compile(f, backend="aot_eager", fullgraph=True) for f in (inside, fast)]
    yield fast, stock, graphs
    torch.compiler.reset()


@pytest.mark.works("Precision", "`torch.autocast` around and inside of what `torch.compile(fullgraph=True)` compiles")
@pytest.mark.parametrize("where", ["inside", "around"])
def test_compiled(compiled, where):
    fast, stock, graphs = compiled
    graph = graphs[where == "around"]
    exact = copy.deepcopy(stock).double()

    def region():
        return autocast(torch.bfloat16) if where == "around" else contextlib.nullcontext()

    def make():
        return (randn(2, 5, 16),)

    # stock and ours differ in where the region is, not in what is inside of it
    def run(x):
        with region():
            return graph(x)

    def stock_run(x):
        with autocast(torch.bfloat16):
            return stock(x)

    parameters = [list(m.parameters()) for m in (fast, stock, exact)]
    compare_training(run, stock_run, exact, make, {}, contextlib.nullcontext, parameters)
    compare(run, stock_run, exact, make, {}, False, contextlib.nullcontext)


@pytest.mark.parametrize("name", ["Conv2d", "LSTM, projected", "GRU", "LSTMCell", "MultiheadAttention, weights"])
def test_compiled_modules(name):
    """The graph holds the casts: dtypes and values of the eager call."""
    *_, make, kwargs = MODULES[name]
    fast = pair(name)[0]
    x = make()
    graph = torch.compile(fast, backend="aot_eager", fullgraph=True)
    with autocast(torch.bfloat16):
        expected, found = fast(*x, **kwargs), graph(*x, **kwargs)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.compiler.reset()


# ------------------------------------------------------------------------------------------------------- default dtype


@pytest.mark.works("Precision", "`torch.set_default_dtype`: float64, bfloat16, float16")
@pytest.mark.parametrize("dtype", [torch.float64, *LOW], ids=str)
@pytest.mark.parametrize("name", [*MODULES, "LSTM"])
def test_default_dtype(name, dtype):
    """Made, called and differentiated under another default."""
    kind, args, options, make, kwargs = MODULES.get(name) or ("LSTM", (4, 8, 2), {}, STEPS, {})
    torch.set_default_dtype(dtype)
    try:
        fast, stock = twins(getattr(fnn, kind)(*args, **options), getattr(nn, kind)(*args, **options))
        assert {p.dtype for p in fast.parameters()} == {dtype}
        exact = copy.deepcopy(stock).double()
        parameters = [list(m.parameters()) for m in (fast, stock, exact)]
        of = cast_input(make, dtype) if "packed" not in name else lambda: (make()[0].to(dtype),)
        compare_training(fast, stock, exact, of, kwargs, contextlib.nullcontext, parameters)
    finally:
        torch.set_default_dtype(torch.float32)


# ------------------------------------------------------------------------------------------------------------ switches


def mkldnn_bfloat16():
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    return lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "none")


def matmul_medium():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    return lambda: torch.set_float32_matmul_precision(before)


def deterministic():
    torch.use_deterministic_algorithms(True)
    return lambda: torch.use_deterministic_algorithms(False)


def flush():
    torch.set_flush_denormal(True)
    return lambda: torch.set_flush_denormal(False)


@pytest.mark.works(
    "Precision",
    "`set_float32_matmul_precision`, `fp32_precision`, `use_deterministic_algorithms`, `set_flush_denormal`",
)
@pytest.mark.parametrize("switch", [mkldnn_bfloat16, matmul_medium, deterministic, flush], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", WHOLE)
def test_switches(name, switch):
    """fastnn's CPU kernels stay at float32's precision, and give the same bits from run to run."""
    make, inputs = WHOLE[name]
    stock, x = make(), inputs()
    models = [fastnn.accelerate(copy.deepcopy(stock)) for _ in range(2)]
    expected = train(copy.deepcopy(stock), x, contextlib.nullcontext)
    restore = switch()
    try:
        first, second = (train(model, x, contextlib.nullcontext) for model in models)
    finally:
        restore()
    torch.testing.assert_close(first, expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(first, second)
