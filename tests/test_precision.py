"""autocast, GradScaler, default dtypes and torch's switches of precision: fastnn beside stock torch under the same ones."""

import contextlib
import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils import _pytree

import fastnn
import fastnn.functional as fF
import fastnn.nn as fnn
from fastnn import _fallback
from fastnn._library import _C
from tests.modules import operators, twins
from tests.test_nn import doubled, no_worse

pytestmark = pytest.mark.usefixtures("one_thread")

LOW = [torch.bfloat16, torch.float16]
low_dtypes = pytest.mark.parametrize("low", LOW, ids=str)


def autocast(low, **options):
    return torch.autocast("cpu", low, **options)


def randn(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(*shape, device=device).to(dtype)


@pytest.fixture(autouse=True)
def _nothing_falls_back():
    """Every call here has a kernel."""
    before = sum(_fallback.calls.values())
    yield
    assert torch.cuda.is_available() or sum(_fallback.calls.values()) == before


@pytest.fixture(autouse=True)
def _no_fast_path():
    """torch's inference fast path knows no autocast of the CPU: it raises on padding, and changes the dtype of the rest."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def packed(x):
    return pack_padded_sequence(x, torch.tensor([5, 3, 2]))


# ------------------------------------------------------------------------------------------------------- functions

FUNCTIONS = {
    "linear": (fF.linear, F.linear, lambda: (randn(6, 16), randn(8, 16), randn(8)), {}),
    "linear, no bias": (fF.linear, F.linear, lambda: (randn(2, 3, 16), randn(16)), {}),
    "conv2d": (
        fF.conv2d,
        F.conv2d,
        lambda: (randn(2, 4, 7, 7), randn(6, 2, 3, 3), randn(6)),
        {"padding": 1, "groups": 2},
    ),
    "attention": (
        fF.scaled_dot_product_attention,
        F.scaled_dot_product_attention,
        lambda: (randn(2, 3, 5, 8), randn(2, 3, 6, 8), randn(2, 3, 6, 8), randn(5, 6)),
        {},
    ),
    "causal attention": (
        fF.scaled_dot_product_attention,
        F.scaled_dot_product_attention,
        lambda: tuple(randn(2, 3, 5, 8) for _ in range(3)),
        {"is_causal": True},
    ),
}
CELLS = {
    "rnn_tanh_cell": (fF.rnn_tanh_cell, torch.rnn_tanh_cell, 1),
    "rnn_relu_cell": (fF.rnn_relu_cell, torch.rnn_relu_cell, 1),
    "gru_cell": (fF.gru_cell, torch.gru_cell, 3),
    "lstm_cell": (fF.lstm_cell, torch.lstm_cell, 4),
}
for _name, (_fast, _stock, _gates) in CELLS.items():
    _rest = [(8 * _gates, 4), (8 * _gates, 8), (8 * _gates,), (8 * _gates,)]

    def _make(name=_name, rest=_rest):
        h = randn(3, 8)
        return randn(3, 4), (h, randn(3, 8)) if name == "lstm_cell" else h, *(randn(*s) / 2 for s in rest)

    FUNCTIONS[_name] = (_fast, _stock, _make, {})


def outcome(f, args, kwargs, train, parameters=()):
    """Results and, in training, the gradients of every floating tensor, taken outside of autocast."""
    leaves = [t for t in _pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.requires_grad]
    with torch.set_grad_enabled(train):
        results = _pytree.tree_leaves(f(*args, **kwargs))
    results = [t for t in results if isinstance(t, torch.Tensor) and t.is_floating_point()]
    if not train:
        return results, []

    def gradients():
        loss = sum((t.double() * torch.linspace(-1, 1, t.numel()).view(t.shape).to(t.device)).sum() for t in results)
        return torch.autograd.grad(loss, [*leaves, *parameters], allow_unused=True)

    return results, gradients


def compare(fast, stock, oracle, make, kwargs, train, region, parameters=((), (), ()), seed=1):
    """The same dtypes and no more error than stock's. Returns the gradients of the three."""
    found, grads = [], []
    for f, own, plain in zip((fast, stock, oracle), parameters, (False, False, True), strict=True):
        torch.manual_seed(seed)
        args = _pytree.tree_map(
            lambda t: t.requires_grad_(train and t.is_floating_point()) if isinstance(t, torch.Tensor) else t, make()
        )
        args = doubled(args) if plain else args
        with contextlib.nullcontext() if plain else region():
            results, gradients = outcome(f, args, kwargs, train, own)
        found.append(results)
        grads.append(list(gradients()) if train else [])
    no_worse(*found)
    return grads


def compare_training(fast, stock, oracle, make, kwargs, region, parameters):
    """compare, and the gradients: how often one rounding or another grows is luck, so of several inputs and all tensors."""
    rounds = [compare(fast, stock, oracle, make, kwargs, True, region, parameters, seed) for seed in range(4)]
    ratios = []
    for ours, theirs, exact in zip(*(zip(*grads, strict=True) for grads in zip(*rounds, strict=True)), strict=True):
        assert [None if t is None else t.dtype for t in ours] == [None if t is None else t.dtype for t in theirs]
        if ours[0] is not None:
            exact = torch.stack(exact)
            errors = [(torch.stack(t).double() - exact).norm() for t in (ours, theirs)]
            floor = 1e-6 * exact.norm() + 1e-30
            ratios.append((errors[0] + floor) / (errors[1] + floor))
    ratios = torch.stack(ratios)
    mean = ratios.log().mean().exp()
    assert mean <= 2 and ratios.max() <= 8, f"error {mean:.3g} times torch's, at most {ratios.max():.3g}"


@pytest.mark.works("Precision", "`torch.autocast` on the CPU, bfloat16 and float16: functions")
@low_dtypes
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("given", ["float32", "low"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name, given, train, low):
    """Dtypes of results and gradients, and the error of both, beside the operator that each stands for."""
    fast, stock, make, kwargs = FUNCTIONS[name]
    if given == "low":
        of = make
        make = lambda: (of()[0].to(low), *of()[1:])  # noqa: E731
    grads = compare(fast, stock, stock, make, kwargs, train, lambda: autocast(low))
    if train:
        no_worse(*grads)


@pytest.mark.works("Precision", "`torch.autocast` on the CPU, bfloat16 and float16: functions")
@low_dtypes
@pytest.mark.parametrize("name", ["relu", "gelu", "silu", "sigmoid", "tanh", "softplus", "mish"])
def test_fused_activations(name, low):
    stock = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}.get(name) or getattr(F, name)
    grads = compare(
        lambda *args: fF.linear(*args, activation=name),
        lambda *args: stock(F.linear(*args)),
        lambda *args: stock(F.linear(*args)),
        lambda: (randn(6, 16), randn(8, 16), randn(8)),
        {},
        True,
        lambda: autocast(low),
    )
    no_worse(*grads)


@low_dtypes
def test_more_than_torch_has(low):
    """The log-sum-exp stays float32; the weights have the dtype that torch's softmax gives."""
    q, k, v = (randn(2, 3, 5, 8) for _ in range(3))
    with autocast(low):
        output, lse = fF.scaled_dot_product_attention(q, k, v, return_lse=True, softcap=5.0, window=2)
        second, weights = fF.attention_weights(q, k, v)
        softmax = torch.softmax(q @ k.mT, -1)
    assert (output.dtype, lse.dtype, second.dtype, weights.dtype) == (low, torch.float32, low, softmax.dtype)
    exact = torch.softmax(q.double() @ k.double().mT / 8**0.5, -1)
    torch.testing.assert_close(weights.double(), exact, rtol=0, atol=8 * torch.finfo(low).eps)


# --------------------------------------------------------------------------------------------------------- modules

TOKENS = lambda: (randn(2, 5, 16),)  # noqa: E731
ATTENTION = lambda: (randn(2, 5, 16),) * 3  # noqa: E731
STEPS = lambda: (randn(5, 3, 4),)  # noqa: E731
BATCH = lambda: (randn(3, 4),)  # noqa: E731
SMALL = {"dropout": 0.0, "batch_first": True}
SMOOTH = SMALL | {"activation": "gelu"}  # where no rounding switches a unit off
MODULES = {
    "Linear": ("Linear", (16, 8), {}, TOKENS, {}),
    "Conv1d": ("Conv1d", (4, 6, 3), {"padding": 1}, lambda: (randn(2, 4, 9),), {}),
    "Conv2d": ("Conv2d", (4, 6, 3), {"padding": 1}, lambda: (randn(2, 4, 7, 7),), {}),
    "MultiheadAttention": ("MultiheadAttention", (16, 2), SMALL, ATTENTION, {"need_weights": False}),
    "MultiheadAttention, weights": ("MultiheadAttention", (16, 2), SMALL | {"add_bias_kv": True}, ATTENTION, {}),
    "TransformerEncoderLayer": ("TransformerEncoderLayer", (16, 2, 32), SMOOTH, TOKENS, {}),
    "TransformerDecoderLayer": ("TransformerDecoderLayer", (16, 2, 32), SMOOTH, lambda: TOKENS() * 2, {}),
    "Transformer": ("Transformer", (16, 2, 1, 1, 32), SMOOTH, lambda: TOKENS() * 2, {}),
    "RNN": ("RNN", (4, 8, 2), {"bidirectional": True}, STEPS, {}),
    "GRU": ("GRU", (4, 8, 2), {}, STEPS, {}),
    "GRU, packed": ("GRU", (4, 8), {"bidirectional": True}, lambda: (packed(*STEPS()),), {}),
    "LSTM, packed": ("LSTM", (4, 8, 2), {}, lambda: (packed(*STEPS()),), {}),
    "LSTM, projected": ("LSTM", (4, 8, 2), {"proj_size": 3}, STEPS, {}),
    "RNNCell": ("RNNCell", (4, 8), {}, BATCH, {}),
    "GRUCell": ("GRUCell", (4, 8), {}, BATCH, {}),
    "LSTMCell": ("LSTMCell", (4, 8), {}, BATCH, {}),
}


def pair(name, device="cpu"):
    """fastnn's module, torch's, and torch's in float64."""
    kind, args, kwargs, *_ = MODULES[name]
    fast, stock = twins(getattr(fnn, kind)(*args, **kwargs), getattr(nn, kind)(*args, **kwargs))
    return fast.to(device), stock.to(device), copy.deepcopy(stock).double().to(device)


def cast_input(make, low):
    return lambda: _pytree.tree_map(lambda t: t.to(low) if t.is_floating_point() else t, make())


@pytest.mark.works("Precision", "`torch.autocast` on the CPU, bfloat16 and float16: modules")
@low_dtypes
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("given", ["float32", "low"])
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, given, mode, low):
    """Outputs, states and gradients have the dtypes that torch's have, and no more error; packed weights, too."""
    *_, make, kwargs = MODULES[name]
    modules = pair(name)
    for module in modules:
        module.train(mode == "train")
    if mode == "frozen":
        fastnn.freeze(modules[0])
    if given == "low":
        if "packed" in name:
            of = make
            make = lambda: (of()[0].to(low),)  # noqa: E731
        else:
            make = cast_input(make, low)
    if mode == "train":
        parameters = [list(m.parameters()) for m in modules]
        compare_training(*modules, make, kwargs, lambda: autocast(low), parameters)
        return
    for _ in range(2):  # the second time with what is packed by now
        compare(*modules, make, kwargs, False, lambda: autocast(low))


@pytest.mark.works("Precision", "`torch.autocast` on the CPU, bfloat16 and float16: modules")
@low_dtypes
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_lstm_over_a_padded_batch(train, low):
    """One operator of torch, whose results are all in autocast's dtype where the CPU has it; elsewhere torch raises."""
    fast, stock = twins(fnn.LSTM(4, 8, 2), nn.LSTM(4, 8, 2))
    exact = copy.deepcopy(stock).double()
    x = randn(5, 3, 4)
    with torch.set_grad_enabled(train), autocast(low):
        results = _pytree.tree_leaves(fast(x))
        try:
            expected = _pytree.tree_leaves(stock(x))
        except RuntimeError:
            expected = []
    assert [t.dtype for t in results] == [low] * 3
    assert all(t.dtype == low for t in expected)
    for result, right in zip(results, _pytree.tree_leaves(exact(x.double())), strict=True):
        torch.testing.assert_close(result.double(), right, rtol=0, atol=torch.finfo(low).eps)


@pytest.mark.works("Precision", "`torch.autocast` on the CPU, bfloat16 and float16: modules")
@low_dtypes
@pytest.mark.parametrize("given", list(itertools.product(["float32", "low"], repeat=2)), ids="-".join)
@pytest.mark.parametrize(
    "name", ["RNN", "GRU", "GRU, packed", "LSTM, packed", "LSTM, projected", "RNNCell", "GRUCell", "LSTMCell"]
)
def test_states(name, given, low):
    """States of float32 or autocast's dtype beside inputs of either."""
    *_, make, kwargs = MODULES[name]
    fast, stock, exact = pair(name)
    for module in (fast, stock, exact):
        module.eval()
    layers = fast.num_layers * (2 if fast.bidirectional else 1) if hasattr(fast, "num_layers") else None
    as_given = {"float32": torch.float32, "low": low}

    def with_states():
        x = make()[0].to(as_given[given[0]])
        lead = (3,) if layers is None else (layers, 3)
        h = randn(*lead, getattr(fast, "proj_size", 0) or 8, dtype=as_given[given[1]])
        return x, (h, randn(*lead, 8, dtype=as_given[given[1]])) if "LSTM" in name else h

    compare(fast, stock, exact, with_states, kwargs, False, lambda: autocast(low))


def test_every_module_is_here():
    """The table holds fastnn.nn, but for what is made of its rows."""
    rows = {kind for kind, *_ in MODULES.values()} | {"TransformerEncoder", "TransformerDecoder", "KVCache"}
    assert rows == set(fnn.__all__)


@low_dtypes
@pytest.mark.parametrize("name", ["Linear", "Conv2d", "MultiheadAttention", "GRU"])
def test_packed_weights_serve_under_autocast(name, low):
    """Packed once for calls in and out of the region; no weight is cast, and an edit shows."""
    kind, args, make, kwargs = {
        "Linear": ("Linear", (64, 96), lambda: (randn(48, 64),), {}),
        "Conv2d": ("Conv2d", (16, 24, 3), lambda: (randn(2, 16, 10, 10),), {}),
        "MultiheadAttention": ("MultiheadAttention", (64, 2), lambda: (randn(48, 1, 64),) * 3, {"need_weights": False}),
        "GRU": ("GRU", (16, 32), lambda: (randn(5, 3, 16),), {}),
    }[name]
    fast, x = getattr(fnn, kind)(*args).eval(), make()
    fastnn.freeze(fast)
    weights = sorted(p.numel() for p in fast.parameters() if p.dim() > 1)
    with torch.no_grad():
        fast(*x, **kwargs)
        packs = fast._pack[1]
        kept = {how: id(pack) for how, pack in packs.items()}
        with autocast(low), torch.profiler.profile(record_shapes=True) as profile:
            found = _pytree.tree_leaves(fast(*x, **kwargs))[0]
        cast = [e for e in profile.events() if e.name == "aten::_to_copy"]
        sizes = [torch.Size(e.input_shapes[0]).numel() for e in cast]
        assert not set(sizes) & set(weights)
        assert fast._pack[1] is packs and {how: id(pack) for how, pack in packs.items()} == kept
        for p in fast.parameters():
            p.mul_(0.5)
        with autocast(low):
            again = _pytree.tree_leaves(fast(*x, **kwargs))[0]
        expected = _pytree.tree_leaves(fast(*x, **kwargs))[0]
    assert not torch.equal(again, found)
    torch.testing.assert_close(again.float(), expected, rtol=0, atol=4 * torch.finfo(low).eps)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_varlen(train):
    """Sequences of different lengths give what each gives alone, in autocast's dtype."""
    q = randn(9, 2, 8).requires_grad_(train)
    ends = torch.tensor([0, 4, 9])
    with autocast(torch.bfloat16):
        found = fF.varlen_attn(q, q, q, ends, ends, 5, 5)
        alone = [fF.scaled_dot_product_attention(*(x.transpose(0, 1),) * 3) for x in q.split([4, 5])]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, torch.cat([x.transpose(0, 1) for x in alone]))


def test_padding_under_autocast():
    """No nested tensor, so no zeros at padded positions: what torch does on every device but, by mistake, the CPU."""
    layer = fnn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    encoder = fnn.TransformerEncoder(layer, 2).eval()
    torch.backends.mha.set_fastpath_enabled(True)
    x, padding = randn(1, 5, 16), torch.tensor([[False, False, True, True, True]])
    with torch.no_grad():
        assert (encoder(x, src_key_padding_mask=padding)[padding] == 0).all()
        with autocast(torch.bfloat16):
            assert (encoder(x, src_key_padding_mask=padding)[padding] != 0).all()


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


# ---------------------------------------------------------------------------------------------------------------- CUDA


@pytest.mark.cuda
@pytest.mark.skipif(
    not torch.cuda.is_available() or "linear" not in _C.cuda_ops, reason="needs a GPU and kernels for it"
)
@low_dtypes
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODULES)
def test_cuda(name, train, low):
    """As on the CPU; what has no kernel for a GPU goes to torch, cast as torch casts it."""
    *_, make, kwargs = MODULES[name]
    modules = pair(name, "cuda")
    for module in modules:
        module.train(train)
    of, region = (lambda: _pytree.tree_map(lambda t: t.cuda(), make())), (lambda: torch.autocast("cuda", low))
    if train:
        compare_training(*modules, of, kwargs, region, [list(m.parameters()) for m in modules])
    else:
        compare(*modules, of, kwargs, False, region)
