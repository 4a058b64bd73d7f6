"""fastnn.nn.MultiheadAttention (fastnn/nn/attention.py) beside torch's outside of its inference fast path."""

import itertools
import random
import warnings

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastnn
import fastnn.nn as fnn
from fastnn import _fallback, testing
from tests.modules import MASKS, MATMULS, bool_mask, operators, outcome, twins

pytestmark = pytest.mark.usefixtures("one_thread")


def pair(*args, dtype=torch.float64, **kwargs):
    kwargs["dtype"] = dtype
    return twins(fnn.MultiheadAttention(*args, **kwargs), nn.MultiheadAttention(*args, **kwargs))


_OPTIONS = {
    "bias": (True, False),
    "add_bias_kv": (False, True),
    "add_zero_attn": (False, True),
    "batch_first": (True, False),
    "kind": ("self", "self", "key is value", "all differ", "kdim vdim"),
    "batched": (True, True, False),
    "padding": tuple(MASKS),
    "mask": tuple(MASKS),
    "mask_dim": (2, 3),
    "need_weights": (False, False, True),
    "average": (True, False),
}
_draw = random.Random(0)
COMBINATIONS = [{k: _draw.choice(v) for k, v in _OPTIONS.items()} for _ in range(150)]


def make_call(c, dtype=torch.float64):
    """Inputs and keywords of one combination, with leaves that want gradients."""
    n, length, embed, heads = 3, 4, 6, 2
    source = length if c["kind"] == "self" else 5
    kdim, vdim = (7, 8) if c["kind"] == "kdim vdim" else (embed, embed)

    def make(size, features):
        shape = ((n, size) if c["batch_first"] else (size, n)) if c["batched"] else (size,)
        return torch.randn(*shape, features, dtype=dtype, requires_grad=True)

    query = make(length, embed)
    key = query if c["kind"] == "self" else make(source, kdim)
    value = key if c["kind"] in ("self", "key is value") else make(source, vdim)
    padding = MASKS[c["padding"]](*((n, source) if c["batched"] else (source,)))
    heads_of_batch = n * heads if c["batched"] else heads
    shape = (length, source) if c["mask_dim"] == 2 else (heads_of_batch, length, source)
    mask = MASKS[c["mask"]](*shape)
    kwargs = {
        "key_padding_mask": padding,
        "attn_mask": mask,
        "need_weights": c["need_weights"],
        "average_attn_weights": c["average"],
    }
    for m in (padding, mask):
        if m is not None and m.is_floating_point():
            m.requires_grad_()
    module = {k: c[k] for k in ("bias", "add_bias_kv", "add_zero_attn", "batch_first")}
    if c["kind"] == "kdim vdim":
        module |= {"kdim": kdim, "vdim": vdim}
    return (embed, heads), module, (query, key, value), kwargs


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("combination", COMBINATIONS, ids=lambda c: "-".join(map(str, c.values())).replace(" ", "_"))
def test_options(combination):
    """Outputs, weights and all gradients (masks' included) for combinations of every option."""
    module, options, args, kwargs = make_call(combination)
    fast, stock = pair(*module, **options)
    for a, b in zip(outcome(fast, args, kwargs), outcome(stock, args, kwargs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("call", [{"need_weights": False}, {}, {"average_attn_weights": False}], ids=str)
def test_error_beside_torch(dtype, batch_first, call):
    """Against the float64 answer, no worse than twice torch's own error."""
    fast, stock = pair(96, 4, batch_first=batch_first, dtype=dtype)
    oracle = nn.MultiheadAttention(96, 4, batch_first=batch_first, dtype=torch.float64)
    oracle.load_state_dict(stock.state_dict())
    x = torch.randn(3, 50, 96).to(dtype)
    padding = torch.zeros(3 if batch_first else 50, 50 if batch_first else 3, dtype=torch.bool)
    padding[0, -padding.shape[1] // 3 :] = True
    call = {"key_padding_mask": padding, **call}
    exact = oracle(x.double(), x.double(), x.double(), **call)
    for a, b, expected in zip(fast(x, x, x, **call), stock(x, x, x, **call), exact, strict=True):
        if expected is not None:
            ours, theirs = ((t.double() - expected).abs().max() for t in (a, b))
            assert ours <= 2 * theirs + torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("padding", [False, True])
def test_evaluation(padding):
    """torch's inference fast path gives the same where it is defined: bool masks that leave each query a key."""
    fast, stock = pair(8, 2, batch_first=True, dtype=torch.float32)
    fast.eval(), stock.eval()
    x = torch.randn(3, 5, 8)
    kwargs = {"key_padding_mask": torch.arange(5) >= torch.tensor([[2], [5], [1]])} if padding else {}
    with torch.no_grad():
        for weights in ({"need_weights": False}, {"need_weights": True}, {"average_attn_weights": False}):
            for a, b in zip(fast(x, x, x, **kwargs, **weights), stock(x, x, x, **kwargs, **weights), strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("training", [True, False])
def test_floating_masks_and_hidden_rows(training):
    """Evaluation adds floating masks as training does; a row without keys is zero before the output projection."""
    fast, stock = pair(8, 2, batch_first=True)
    x, mask = torch.randn(2, 4, 8, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    expected = stock(x, x, x, attn_mask=mask, need_weights=False)[0]
    hidden = torch.zeros(2, 4, dtype=torch.bool)
    hidden[1] = True
    with torch.no_grad():
        fast.train(training)
        torch.testing.assert_close(fast(x, x, x, attn_mask=mask, need_weights=False)[0], expected)
        output = fast(x, x, x, key_padding_mask=hidden, need_weights=False)[0]
        torch.testing.assert_close(output[1], fast.out_proj.bias.expand(4, 8))
        for average in (True, False):
            call = {"key_padding_mask": hidden, "average_attn_weights": average}
            output, weights = fast(x, x, x, **call)
            assert output[1].isnan().all() and weights[1].isnan().all()
            torch.testing.assert_close((output, weights), stock(x, x, x, **call), equal_nan=True)
    gradients = [
        torch.autograd.grad(m(x, x, x, key_padding_mask=hidden)[0].sum(), m.in_proj_weight)[0] for m in (fast, stock)
    ]
    torch.testing.assert_close(*gradients, equal_nan=True)


def test_causal_hint():
    """The hint stands for the mask, or for no mask at all where another mask or the weights are wanted as well."""
    fast, stock = pair(8, 2, batch_first=True)
    x, mask = torch.randn(2, 5, 8, dtype=torch.float64), nn.Transformer.generate_square_subsequent_mask(5).double()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected = stock(x, x, x, attn_mask=mask, need_weights=False)[0]
    torch.testing.assert_close(fast(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0], expected)
    torch.testing.assert_close(fast(x, x, x, attn_mask=mask < 0, is_causal=True)[0], expected)
    for need_weights in (True, False):
        call = {"key_padding_mask": padding, "attn_mask": mask < 0, "is_causal": True, "need_weights": need_weights}
        torch.testing.assert_close(fast(x, x, x, **call), stock(x, x, x, **call))


def _wrong():
    x, y, odd = torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.randn(2, 3, 7)
    yield "query of 4 dimensions", (x[None],) * 3, {}
    yield "query of 1 dimension", (x[0, 0],) * 3, {}
    yield "key unbatched", (x, x[0], x[0]), {}
    yield "query's features", (odd, odd, odd), {}
    yield "value's length", (x, x, y), {}
    yield "batch sizes", (x, y[:1], y[:1]), {}
    yield "padding's dimensions", (x, x, x), {"key_padding_mask": torch.zeros(3, dtype=torch.bool)}
    yield "padding's shape", (x, x, x), {"key_padding_mask": torch.zeros(2, 4, dtype=torch.bool)}
    yield "padding's batch", (x, x, x), {"key_padding_mask": torch.zeros(3, 3, dtype=torch.bool)}
    yield "padding's type", (x, x, x), {"key_padding_mask": torch.zeros(2, 3, dtype=torch.int32)}
    yield "mask's dimensions", (x, x, x), {"attn_mask": torch.zeros(3)}
    yield "mask's shape", (x, x, x), {"attn_mask": torch.zeros(3, 4)}
    yield "mask's heads", (x, x, x), {"attn_mask": torch.zeros(3, 3, 3)}
    yield "unbatched mask's heads", (x[0], x[0], x[0]), {"attn_mask": torch.zeros(3, 3, 3)}
    yield "mask's type", (x, x, x), {"attn_mask": torch.zeros(3, 3, dtype=torch.int64)}
    yield "hint without a mask", (x, x, x), {"is_causal": True}
    yield "dtype", (x.double(),) * 3, {}


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(("args", "kwargs"), [w[1:] for w in _wrong()], ids=[w[0] for w in _wrong()])
def test_errors(args, kwargs, need_weights):
    """The same mistake raises the same type of exception."""
    fast, stock = pair(8, 2, batch_first=True, dtype=torch.float32)
    with pytest.raises(Exception) as expected:
        stock(*args, need_weights=need_weights, **kwargs)
    with pytest.raises(expected.type, match="fastnn") as found:
        fast(*args, need_weights=need_weights, **kwargs)
    assert found.type is expected.type


@pytest.mark.parametrize("arguments", [(0, 2), (8, 0), (8, 3)])
def test_constructor_errors(arguments):
    with pytest.raises(Exception) as expected:
        nn.MultiheadAttention(*arguments)
    with pytest.raises(expected.type):
        fnn.MultiheadAttention(*arguments)


def test_mismatched_masks_warn():
    fast, _ = pair(8, 2, batch_first=True)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    bool_padding, mask = torch.zeros(2, 3, dtype=torch.bool), torch.zeros(3, 3, dtype=torch.float64)
    with pytest.warns(UserWarning, match="mismatched"):
        fast(x, x, x, key_padding_mask=bool_padding, attn_mask=mask)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast(x, x, x, key_padding_mask=bool_padding, attn_mask=mask < 0)


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout(need_weights):
    """Attention weights are dropped and the rest scaled, in training only."""
    fast, _ = pair(8, 2, dropout=0.25, batch_first=True)
    x = torch.randn(4, 32, 8, dtype=torch.float64)
    call = {"need_weights": need_weights, "average_attn_weights": False}
    first, weights = fast(x, x, x, **call)
    assert not torch.equal(first, fast(x, x, x, **call)[0])
    torch.manual_seed(7)
    first = fast(x, x, x, **call)[0]
    torch.manual_seed(7)
    assert torch.equal(first, fast(x, x, x, **call)[0])
    mean = sum(fast(x, x, x, **call)[0] for _ in range(100)) / 100
    kept = fast.eval()(x, x, x, **call)
    assert torch.equal(kept[0], fast(x, x, x, **call)[0])
    assert (mean - kept[0]).abs().mean() < 0.2 * (first - kept[0]).abs().mean()
    if need_weights:
        dropped = weights == 0
        assert 0.22 < dropped.double().mean() < 0.28
        torch.testing.assert_close(weights[~dropped], (kept[1] / 0.75)[~dropped])
    fast.train().dropout = 1.0
    torch.testing.assert_close(fast(x, x, x, **call)[0], fast.out_proj.bias.expand(4, 32, 8))


@pytest.mark.parametrize("need_weights", [True, False])
def test_second_derivatives(need_weights):
    fast, _ = pair(4, 2, batch_first=True)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    names, values = zip(*fast.named_parameters(), strict=True)

    def call(x, mask, *parameters):
        state = dict(zip(names, parameters, strict=True))
        call = {"attn_mask": mask, "need_weights": need_weights}
        return [t for t in torch.func.functional_call(fast, state, (x, x, x), call) if t is not None]

    assert torch.autograd.gradcheck(call, (x, mask, *values), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, mask, *values), fast_mode=True)


def test_second_derivatives_beside_torch():
    fast, stock = pair(6, 2, kdim=5)
    q, kv = torch.randn(3, 2, 6, dtype=torch.float64), torch.randn(4, 2, 5, dtype=torch.float64)
    v = torch.randn(4, 2, 6, dtype=torch.float64)
    results = []
    with sdpa_kernel(SDPBackend.MATH):  # torch's other CPU kernel has no second derivatives
        for m in (fast, stock):
            ps = list(m.parameters())
            grads = torch.autograd.grad(m(q, kv, v, need_weights=False)[0].sin().sum(), ps, create_graph=True)
            results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), ps))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("call", [{"need_weights": False}, {}, {"average_attn_weights": False}], ids=str)
def test_hot_path(batch_first, training, call):
    """One projection for queries, keys and values, and nothing of ATen's matmuls or attention, forward or backward."""
    fast, _ = pair(32, 4, batch_first=batch_first, dtype=torch.float32)
    fast.train(training).requires_grad_(training)
    x = torch.randn(3, 5, 32, requires_grad=training)

    padding = torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 5])

    def run():
        output = fast(x, x, x, key_padding_mask=padding if batch_first else None, **call)[0]
        if training:
            output.sum().backward()

    ran = operators(run)
    assert ran["fastnn::linear"] == 2
    assert ran["fastnn::attention" if "need_weights" in call else "fastnn::attention_weights"] == 1
    assert not (MATMULS | {"aten::softmax", "aten::_softmax", "aten::dropout", "aten::mean"}) & set(ran)
    assert "fastnn::attention_weights_backward" not in ran
    assert not any("attention" in name and name.startswith("aten::") for name in ran)


def test_frozen():
    """Frozen weights are packed, an edit shows, and a copy packs for itself."""
    fast, stock = pair(16, 2, batch_first=True, dtype=torch.float32)
    x = torch.randn(2, 3, 16)
    fast.eval().requires_grad_(False), stock.eval()
    for m in fast.modules():
        m._freeze()
    for _ in range(2):
        torch.testing.assert_close(fast(x, x, x, need_weights=False)[0], stock(x, x, x, need_weights=False)[0])
        assert fast._pack is not None and fast.out_proj._pack is not None
        with torch.no_grad():
            for m in (fast, stock):
                m.in_proj_weight.mul_(0.5)
                m.out_proj.weight.add_(0.25)


@pytest.mark.parametrize("need_weights", [True, False])
def test_threads(need_weights):
    """The same result on any number of threads, to the last bit."""
    fast, _ = pair(64, 4, batch_first=True, dtype=torch.float32)
    x = torch.randn(4, 70, 64, requires_grad=True)
    results = []
    for count in (1, 2, 3):
        with testing.threads(count):
            output, weights = fast(x, x, x, need_weights=need_weights)
            results.append((output, weights, *torch.autograd.grad(output.sin().sum(), [x, *fast.parameters()])))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize(("n", "length", "source"), [(0, 3, 4), (2, 0, 4), (0, 0, 0)])
@pytest.mark.parametrize("need_weights", [True, False])
def test_empty(n, length, source, need_weights):
    fast, stock = pair(8, 2, batch_first=True)
    q, kv = torch.randn(n, length, 8, dtype=torch.float64), torch.randn(n, source, 8, dtype=torch.float64)
    for a, b in zip(
        fast(q, kv, kv, need_weights=need_weights), stock(q, kv, kv, need_weights=need_weights), strict=True
    ):
        assert a is b is None or a.shape == b.shape


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(layout):
    """Inputs of any strides."""
    fast, stock = pair(8, 2)
    x = testing.random((4, 3, 8), torch.float64, layout)
    torch.testing.assert_close(fast(x, x, x, need_weights=False), stock(x, x, x, need_weights=False))
    torch.testing.assert_close(fast(x, x, x), stock(x, x, x))


def test_nested():
    """Nested tensors go to torch's own path, on the record, or raise."""
    fast, stock = pair(8, 2, batch_first=True, dtype=torch.float32)
    fast.eval().requires_grad_(False), stock.eval().requires_grad_(False)
    x = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)])
    before = sum(_fallback.calls.values())
    output = fast(x, x, x, need_weights=False)[0]
    torch.testing.assert_close(output.to_padded_tensor(0), stock(x, x, x, need_weights=False)[0].to_padded_tensor(0))
    assert sum(_fallback.calls.values()) == before + 1
    fastnn.set_fallback("error")
    try:
        with pytest.raises(RuntimeError, match="no kernel"):
            fast(x, x, x, need_weights=False)
    finally:
        fastnn.set_fallback("torch")


@pytest.mark.parametrize("options", list(itertools.product([True, False], repeat=3)), ids=str)
def test_compile(options):
    """One graph with masks and weights."""
    torch._dynamo.reset()
    batch_first, need_weights, self_attention = options
    fast, stock = pair(8, 2, batch_first=batch_first)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    q = torch.randn(3, 3, 8, dtype=torch.float64)
    kv = q if self_attention else torch.randn(3, 3, 8, dtype=torch.float64)
    kwargs = {"key_padding_mask": bool_mask(3, 3), "attn_mask": bool_mask(3, 3), "need_weights": need_weights}
    torch.testing.assert_close(compiled(q, kv, kv, **kwargs), stock(q, kv, kv, **kwargs))
