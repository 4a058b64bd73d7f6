"""The Transformer stacks and the whole Transformer (fastnn/nn/transformer.py) beside torch's."""

import copy
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastnn
import fastnn.nn as fnn
from fastnn import _fallback
from tests.modules import INF, bool_mask, operators, outcome, twins

pytestmark = pytest.mark.usefixtures("one_thread")


def both(name, *args, **kwargs):
    """One of fastnn's and one of torch's, with the same parameters."""
    return twins(getattr(fnn, name)(*args, **kwargs), getattr(nn, name)(*args, **kwargs))


def stack(name, layer_args, num_layers, norm=None, **kwargs):
    """A stack of each library's own layers."""
    fast, stock = both(name + "Layer", *layer_args, dropout=0.0, batch_first=True)
    fast = getattr(fnn, name)(fast, num_layers, copy.deepcopy(norm), **kwargs)
    return fast, getattr(nn, name)(stock, num_layers, copy.deepcopy(norm), **kwargs)


PADDING = torch.arange(5) >= torch.tensor([[2], [5], [1]])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:enable_nested_tensor")
@pytest.mark.parametrize("norm", [False, True], ids=["bare", "norm"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(
    ("padding", "check"),
    [(PADDING, True), (PADDING, False), (PADDING.flip(1), True), (torch.zeros(3, 5).masked_fill(PADDING, -INF), True)],
    ids=["left", "unchecked", "right", "floating"],
)
def test_padding_in_evaluation(norm, nested, check, padding):
    """Padded positions are zeros before the norm where torch makes a nested tensor, and only there."""
    norm = nn.Softmax(-1) if norm else None  # it maps zeros to something else
    fast, stock = stack("TransformerEncoder", (8, 2, 16), 2, norm, enable_nested_tensor=nested, mask_check=check)
    fast.eval(), stock.eval()
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        output = fast(x, src_key_padding_mask=padding)
        torch.testing.assert_close(output, stock(x, src_key_padding_mask=padding))
        zeros = bool((output[padding != 0] == 0).all())
        assert zeros == (nested and norm is None and bool(padding[0, -1]))
    torch.testing.assert_close(fast(x, src_key_padding_mask=padding), stock(x, src_key_padding_mask=padding))
    fast.train(), stock.train()
    with torch.no_grad():
        torch.testing.assert_close(fast(x, src_key_padding_mask=padding), stock(x, src_key_padding_mask=padding))


def test_nested_input():
    """Nested tensors go to torch's own path, on the record, or raise."""
    fast, stock = stack("TransformerEncoder", (8, 2, 16), 2)
    fast.eval().requires_grad_(False), stock.eval().requires_grad_(False)
    x = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)])
    before = sum(_fallback.calls.values())
    torch.testing.assert_close(fast(x).to_padded_tensor(0), stock(x).to_padded_tensor(0))
    assert sum(_fallback.calls.values()) == before + 2
    fastnn.set_fallback("error")
    try:
        with pytest.raises(RuntimeError, match="no kernel"):
            fast(x)
    finally:
        fastnn.set_fallback("torch")


def test_constructor_warns_as_torch():
    """enable_nested_tensor on layers that torch would not run on nested tensors."""
    for options in (
        {"batch_first": False},
        {"norm_first": True, "batch_first": True},
        {"bias": False, "batch_first": True},
    ):
        messages = []
        for library in (fnn, nn):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                encoder = library.TransformerEncoder(library.TransformerEncoderLayer(8, 2, 16, **options), 1)
            messages.append([str(w.message) for w in caught])
            assert not encoder.use_nested_tensor and encoder.enable_nested_tensor
        assert messages[0] == messages[1] and messages[0]


@pytest.mark.parametrize(
    ("kind", "hint"),  # a mask that is nearly causal with the hint that it is would be a lie
    [p for p in itertools.product(["float", "bool", "nearly", "none"], [None, True, False]) if p != ("nearly", True)],
)
@pytest.mark.parametrize("name", ["TransformerEncoder", "TransformerDecoder"])
def test_causal(name, kind, hint):
    """A causal mask, hinted at, found or neither; a mask that is not causal; no mask."""
    fast, stock = stack(name, (8, 2, 16), 2)
    x = torch.randn(2, 5, 8)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    if kind == "nearly":
        mask[0, 1] = 0
    mask = {"float": mask, "bool": mask < 0, "nearly": mask, "none": None}[kind]
    args = (x, torch.randn(2, 3, 8)) if "Decoder" in name else (x,)
    kwargs = {"tgt_mask": mask, "tgt_is_causal": hint} if "Decoder" in name else {"mask": mask, "is_causal": hint}
    if hint and mask is None:
        for module in (fast, stock):
            with pytest.raises(RuntimeError, match="attn_mask"):
                module(*args, **kwargs)
        return
    torch.testing.assert_close(fast(*args, **kwargs), stock(*args, **kwargs))
    if hint is None and kind != "none":
        used = operators(lambda: fast(*args, **kwargs))
        assert "aten::equal" in used


def test_custom_layer_gets_floating_masks():
    """What a user's layer was written against."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.self_attn = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, src, src_mask, src_key_padding_mask, is_causal):
            return src + (src_mask + src_key_padding_mask).exp().sum()

    x, mask, padding = torch.randn(1, 5, 8), bool_mask(5, 5), bool_mask(1, 5)
    layer = Layer()
    fast, stock = (lib.TransformerEncoder(layer, 2, enable_nested_tensor=False) for lib in (fnn, nn))
    torch.testing.assert_close(fast(x, mask, padding), stock(x, mask, padding))


@pytest.mark.parametrize(("batch_first", "norm_first", "bias"), list(itertools.product([True, False], repeat=3)))
def test_transformer(batch_first, norm_first, bias):
    """The whole model with every mask, in training and evaluation."""
    options = {"batch_first": batch_first, "norm_first": norm_first, "bias": bias}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast, stock = both("Transformer", 8, 2, 2, 2, 16, 0.0, F.gelu, **options, dtype=torch.float64)
    shape = (lambda n, t: (n, t, 8)) if batch_first else (lambda n, t: (t, n, 8))
    src, tgt = torch.randn(shape(3, 5), dtype=torch.float64), torch.randn(shape(3, 4), dtype=torch.float64)
    causal = fnn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
    assert torch.equal(causal, nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64))
    kwargs = {
        "src_mask": bool_mask(5, 5),
        "tgt_mask": causal,
        "memory_mask": bool_mask(4, 5),
        "src_key_padding_mask": PADDING,
        "tgt_key_padding_mask": torch.zeros(3, 4, dtype=torch.float64),
        "memory_key_padding_mask": PADDING,
    }
    for a, b in zip(outcome(fast, (src, tgt), kwargs), outcome(stock, (src, tgt), kwargs), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        fast.eval(), stock.eval()
        torch.testing.assert_close(fast(src, tgt, **kwargs), stock(src, tgt, **kwargs))
        torch.testing.assert_close(fast(src, tgt), stock(src, tgt))


def test_transformer_errors_and_custom_parts():
    fast, stock = both("Transformer", 8, 2, 1, 1, 16, batch_first=True)
    for args in ((torch.randn(2, 3, 8), torch.randn(3, 3, 8)), (torch.randn(2, 3, 7), torch.randn(2, 3, 7))):
        for module in (fast, stock):
            with pytest.raises(RuntimeError):
                module(*args)
    with pytest.raises(AssertionError):
        fnn.Transformer(9, 2)

    class Encoder(nn.Module):
        def forward(self, src, **kwargs):
            return 2 * src

    for part in ("custom_encoder", "custom_decoder"):
        model = fnn.Transformer(8, 2, 1, 1, 16, **{part: Encoder()})
        assert isinstance(getattr(model, part.removeprefix("custom_")), Encoder)


def test_second_derivatives():
    """Beside torch's, for every parameter of an encoder and a decoder layer."""
    results = []
    fast, stock = both("Transformer", 4, 2, 1, 1, 6, 0.0, "gelu", batch_first=True, dtype=torch.float64)
    src, tgt = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 2, 4, dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):  # torch's other CPU kernel has no second derivatives
        for module in (fast, stock):
            parameters = list(module.parameters())
            grads = torch.autograd.grad(module(src, tgt).sin().sum(), parameters, create_graph=True)
            results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), parameters))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [True, False])
def test_compile(training):
    """One graph of the whole model with masks, whose causality nobody hints at."""
    torch._dynamo.reset()
    fast, stock = both("Transformer", 8, 2, 1, 1, 16, 0.0, batch_first=True, dtype=torch.float64)
    fast.train(training), stock.train(training)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    src, tgt = torch.randn(3, 5, 8, dtype=torch.float64), torch.randn(3, 4, 8, dtype=torch.float64)
    kwargs = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64),
        "src_key_padding_mask": PADDING,
        "memory_key_padding_mask": PADDING,
    }
    with torch.set_grad_enabled(training):
        output, expected = compiled(src, tgt, **kwargs), stock(src, tgt, **kwargs)
    torch.testing.assert_close(output, expected)
    if training:
        gradients = [torch.autograd.grad(o.sum(), m.parameters()) for o, m in ((output, fast), (expected, stock))]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)


def test_frozen():
    """Frozen weights give the same, with the activation still fused, and edits show."""
    fast, stock = stack("TransformerEncoder", (16, 2, 32), 2)
    fast.eval().requires_grad_(False), stock.eval().requires_grad_(False)
    x = torch.randn(2, 3, 16)
    for module in fast.modules():
        if hasattr(module, "_freeze"):
            module._freeze()
    for _ in range(2):
        torch.testing.assert_close(fast(x), stock(x))
        assert all(layer.linear1._pack is not None for layer in fast.layers)
        for module in (fast, stock):
            module.layers[0].linear1.weight.mul_(0.5)
            module.layers[1].self_attn.in_proj_weight.mul_(0.5)
