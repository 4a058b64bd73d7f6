"""The Transformer layers (fastnn/nn/transformer_layer.py) beside torch's."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastnn.nn as fnn
from tests.modules import MASKS, MATMULS, bool_mask, operators, outcome, twins

pytestmark = pytest.mark.usefixtures("one_thread")


def both(name, *args, **kwargs):
    """One of fastnn's and one of torch's, with the same parameters."""
    return twins(getattr(fnn, name)(*args, **kwargs), getattr(nn, name)(*args, **kwargs))


ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "F.relu": F.relu,
    "F.silu": F.silu,
    "GELU": nn.GELU(),
    "GELU tanh": nn.GELU("tanh"),
    "SiLU": nn.SiLU(),
    "ReLU": nn.ReLU(inplace=True),
    "LeakyReLU": nn.LeakyReLU(0.3),
    "lambda": lambda x: x.sin(),
}
_OPTIONS = {
    "activation": tuple(ACTIVATIONS),
    "norm_first": (True, False),
    "bias": (True, False),
    "batch_first": (True, False),
    "batched": (True, True, False),
    "mask": tuple(MASKS),
    "padding": tuple(MASKS),
    "memory_mask": tuple(MASKS),
    "memory_padding": tuple(MASKS),
}
_draw = random.Random(0)
COMBINATIONS = [{k: _draw.choice(v) for k, v in _OPTIONS.items()} for _ in range(60)]


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("c", COMBINATIONS, ids=lambda c: "-".join(map(str, c.values())).replace(" ", "_"))
@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_layer_options(name, c):
    """Outputs and all gradients (masks' included) for combinations of every option."""
    n, length, source, heads = 3, 4, 5, 2
    options = {k: c[k] for k in ("norm_first", "bias", "batch_first")}
    options |= {"activation": ACTIVATIONS[c["activation"]], "dropout": 0.0, "dtype": torch.float64}
    fast, stock = both(name, 6, heads, 10, **options)
    assert fast.norm_first == stock.norm_first and fast.activation is stock.activation
    assert getattr(fast, "activation_relu_or_gelu", None) == getattr(stock, "activation_relu_or_gelu", None)

    def make(size):
        shape = ((n, size) if c["batch_first"] else (size, n)) if c["batched"] else (size,)
        return torch.randn(*shape, 6, dtype=torch.float64, requires_grad=True)

    def padding(kind, size):
        return MASKS[kind](*((n, size) if c["batched"] else (size,)))

    mask = MASKS[c["mask"]](length, length)
    args, prefix = (make(length),), "src"
    kwargs = {}
    if "Decoder" in name:
        args, prefix = (*args, make(source)), "tgt"
        kwargs["memory_mask"] = MASKS[c["memory_mask"]]((n if c["batched"] else 1) * heads, length, source)
        kwargs["memory_key_padding_mask"] = padding(c["memory_padding"], source)
    kwargs |= {prefix + "_mask": mask, prefix + "_key_padding_mask": padding(c["padding"], length)}
    for m in kwargs.values():
        if m is not None and m.is_floating_point():
            m.requires_grad_()
    for a, b in zip(outcome(fast, args, kwargs), outcome(stock, args, kwargs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_unknown_activation(name):
    for library in (nn, fnn):
        with pytest.raises(RuntimeError, match="activation"):
            getattr(library, name)(8, 2, activation="tanh")


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_evaluation(norm_first, dtype):
    """torch's inference fast path gives the same where it is defined: bool masks that leave each query a key."""
    fast, stock = both("TransformerEncoderLayer", 16, 4, 32, batch_first=True, norm_first=norm_first, dtype=dtype)
    fast.eval(), stock.eval()
    x = torch.randn(3, 5, 16, dtype=dtype)
    padding, mask = torch.arange(5) >= torch.tensor([[2], [5], [1]]), torch.ones(5, 5, dtype=torch.bool).triu(1)
    tolerance = {} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.02}  # roundings of a residual of size 4
    with torch.no_grad():
        for kwargs in (
            {},
            {"src_key_padding_mask": padding},
            {"src_mask": mask},
            {"src_mask": mask, "is_causal": True},
        ):
            torch.testing.assert_close(fast(x, **kwargs), stock(x, **kwargs), **tolerance)


def test_evaluation_adds_floating_masks():
    """Evaluation gives what training without dropout gives."""
    fast, stock = both("TransformerEncoderLayer", 8, 2, 16, 0.0, batch_first=True)
    x, mask = torch.randn(2, 4, 8), torch.randn(4, 4)
    expected = stock(x, src_mask=mask)
    with torch.no_grad():
        torch.testing.assert_close(fast.eval()(x, src_mask=mask), expected)


def test_dropout():
    """Training drops, evaluation does not; one seed, one result; everything dropped leaves the residual."""
    fast, _ = both("TransformerEncoderLayer", 8, 2, 16, 0.5, batch_first=True, norm_first=True)
    x = torch.randn(2, 4, 8)
    assert not torch.equal(fast(x), fast(x))
    torch.manual_seed(1)
    first = fast(x)
    torch.manual_seed(1)
    assert torch.equal(first, fast(x))
    for module in fast.modules():
        if isinstance(module, nn.Dropout):
            module.p = 1.0
    torch.testing.assert_close(fast(x), x)
    assert torch.equal(fast.eval()(x), fast(x)) and not torch.equal(fast(x), x)


# ----------------------------------------------------------------------------------------------- the fused activation


@pytest.mark.parametrize("activation", ["relu", "gelu", "F.silu", "GELU tanh"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_hot_path(name, training, activation):
    """No matmul, attention or activation of ATen's, forward or backward."""
    fast, _ = both(name, 16, 2, 32, 0.0, ACTIVATIONS[activation], batch_first=True)
    fast.train(training).requires_grad_(training)
    args = (torch.randn(2, 3, 16),) * (2 if "Decoder" in name else 1)

    def call():
        output = fast(*args)
        if training:
            output.sum().backward()

    ran = set(operators(call))
    assert not ran & (MATMULS | {"aten::relu", "aten::gelu", "aten::silu"})
    assert not any(n.startswith("aten::") and ("attention" in n or "transformer" in n) for n in ran)


def test_activation_is_read_at_each_call():
    fast, stock = both("TransformerEncoderLayer", 8, 2, 16, 0.0, batch_first=True)
    x = torch.randn(2, 3, 8)
    for activation in (F.gelu, torch.tanh, nn.GELU("tanh"), nn.PReLU()):
        fast.activation = stock.activation = activation
        torch.testing.assert_close(fast(x), stock(x))


def test_hooks_see_the_value_before_the_activation():
    fast, stock = both("TransformerEncoderLayer", 8, 2, 16, 0.0, nn.GELU(), batch_first=True)
    x, seen = torch.randn(2, 3, 8), []
    for module in (fast, stock):
        module.linear1.register_forward_hook(lambda m, a, out: seen.append(out))
    torch.testing.assert_close(fast(x), stock(x))
    torch.testing.assert_close(seen[0], seen[1])
    fast, stock = both("TransformerEncoderLayer", 8, 2, 16, 0.0, nn.GELU(), batch_first=True)
    for module in (fast, stock):
        module.activation.register_forward_hook(lambda m, a, out: out + 1)
    torch.testing.assert_close(fast(x), stock(x))


def test_replaced_children():
    """Whatever stands in for a child is called; attention that is not fastnn's gets torch's floating masks."""

    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Recorder(nn.MultiheadAttention):
        def forward(self, *args, **kwargs):
            masks.append((kwargs["attn_mask"], kwargs["key_padding_mask"]))
            return super().forward(*args, **kwargs)

    x, mask, padding, masks = torch.randn(2, 3, 8), bool_mask(3, 3), bool_mask(2, 3), []
    fast, stock = both("TransformerEncoderLayer", 8, 2, 16, 0.0, batch_first=True)
    for module in (fast, stock):
        module.linear1.__class__ = Twice
    torch.testing.assert_close(fast(x), stock(x))
    for module in (fast, stock):
        module.self_attn = Recorder(8, 2, batch_first=True)
    fast.load_state_dict(stock.state_dict())
    torch.testing.assert_close(fast(x, mask, padding), stock(x, mask, padding))
    for ours, theirs in zip(*masks, strict=True):
        assert torch.equal(ours, theirs)
