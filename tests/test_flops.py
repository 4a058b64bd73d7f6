"""fastnn's FLOPs are counted as torch counts its own (fastnn/flops.py), and explain tells the share."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

import fastnn
from fastnn import flops, functional

pytestmark = pytest.mark.usefixtures("one_thread")


def counted(call):
    """FLOPs of a call and of its backward, by operator."""
    with FlopCounterMode(display=False, custom_mapping=flops.formulas() | flops._uncounted()) as counter:
        output = call()
    forward = dict(counter.get_flop_counts()["Global"])
    with FlopCounterMode(display=False, custom_mapping=flops.formulas()) as counter:
        output.sum().backward()
    return forward, dict(counter.get_flop_counts()["Global"])


def names(counts):
    return {op._qualified_op_name for op in counts}


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


CALLS = {
    "linear": (lambda lib: lib.linear, lambda: (leaf(3, 4, 5), leaf(6, 5), leaf(6))),
    "linear of a vector": (lambda lib: lib.linear, lambda: (leaf(5), leaf(6, 5))),
    "linear, only the weight": (lambda lib: lib.linear, lambda: (torch.randn(7, 5), leaf(6, 5))),
    "conv2d": (lambda lib: lib.conv2d, lambda: (leaf(2, 4, 9, 8), leaf(6, 4, 3, 3), leaf(6), 2, 1)),
    "conv2d in groups": (lambda lib: lib.conv2d, lambda: (leaf(2, 4, 9, 8), leaf(6, 2, 3, 3), None, 1, 0, 2, 2)),
    "conv2d, unbatched": (lambda lib: lib.conv2d, lambda: (leaf(4, 9, 8), leaf(6, 4, 3, 3))),
    "conv2d, only the input": (lambda lib: lib.conv2d, lambda: (leaf(2, 4, 9, 8), torch.randn(6, 4, 3, 3))),
    "conv1d": (lambda lib: lib.conv1d, lambda: (leaf(2, 4, 9), leaf(6, 4, 3), leaf(6), 2, 1)),
}


@pytest.mark.parametrize("name", CALLS)
def test_as_torch_counts(name):
    """Forward and backward of linear and convolutions: the number that torch's mode finds for torch's call."""
    function, args = CALLS[name]
    args = args()
    found, expected = (counted(lambda lib=lib: function(lib)(*args)) for lib in (functional, F))
    for ours, theirs in zip(found, expected, strict=True):
        assert sum(ours.values()) == sum(theirs.values()) > 0
        assert all(op.startswith("fastnn::") for op in names(ours))


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_an_activation_counts_nothing(name):
    function, args = CALLS[name]
    args = args()
    plain, fused = (counted(lambda a=a: function(functional)(*args, activation=a)) for a in (None, "gelu"))
    assert [sum(c.values()) for c in plain] == [sum(c.values()) for c in fused]
    assert f"fastnn::{name}_train" in names(fused[0])


@pytest.mark.parametrize("heads", [4, 2])
def test_attention(heads):
    """By hand: 2 products forward, 5 backward; as torch counts its fused kernels, which the CPU's has no formula for."""
    b, h, length, s, e, v = 2, 4, 5, 7, 8, 6
    q, k, w = leaf(b, h, length, e), leaf(b, heads, s, e), leaf(b, heads, s, v)
    whole = [
        (b, h, s, size) for size in (e, v)
    ]  # of keys and values with all heads, which older formulas of torch want
    scores = 2 * b * h * length * s
    forward, backward = counted(lambda: functional.scaled_dot_product_attention(q, k, w, enable_gqa=heads != h))
    assert sum(forward.values()) == scores * (e + v) == flop_counter.sdpa_flop_count(q.shape, *whole)
    shape = (b, h, length, v)
    assert sum(backward.values()) == scores * (3 * e + 2 * v)
    assert sum(backward.values()) == flop_counter.sdpa_backward_flop_count(shape, q.shape, *whole)


def test_attention_weights():
    """The gradient through the weights is a formula of torch's operators, and counts as theirs."""
    q, k, v = leaf(2, 4, 5, 8), leaf(2, 4, 7, 8), leaf(2, 4, 7, 8)
    scores = 2 * 2 * 4 * 5 * 7
    forward, backward = counted(lambda: functional.attention_weights(q, k, v)[1])
    assert sum(forward.values()) == scores * 16 and names(forward) == {"fastnn::attention_weights"}
    assert sum(backward.values()) > 0 and names(backward) == {"aten::bmm"}


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}, {"bias": False}], ids=str)
def test_rnn(kind, options):
    """By hand: every weight at every step; backward those of the input, where it is wanted, the state and the weights."""
    module = getattr(fastnn.nn, kind)(5, 6, **options)
    weights = [p for n, p in module.named_parameters() if n.startswith("weight")]
    rows, size = 3 * 4, sum(w.numel() for w in weights)
    first = sum(w.numel() for n, w in module.named_parameters() if n.startswith("weight_ih_l0"))
    for x in (torch.randn(3, 4, 5), leaf(3, 4, 5)):
        forward, backward = counted(lambda x=x: module(x)[0])
        assert sum(forward.values()) == 2 * rows * size and names(forward) <= {"fastnn::rnn", "fastnn::rnn_train"}
        assert sum(backward.values()) == 2 * rows * (2 * size - (0 if x.requires_grad else first))


def test_rnn_cell_and_packed():
    cell = fastnn.nn.LSTMCell(5, 6)
    forward, _ = counted(lambda: cell(torch.randn(3, 5))[0])
    assert sum(forward.values()) == 2 * 3 * 24 * 11
    packed = nn.utils.rnn.pack_sequence([torch.randn(4, 5), torch.randn(2, 5)])
    forward, _ = counted(lambda: fastnn.nn.GRU(5, 6)(packed)[0].data)
    assert sum(forward.values()) == 2 * 6 * 18 * 11


STOCK = {
    "LSTM": (lambda: nn.LSTM(8, 6, 2, bidirectional=True), lambda: torch.randn(5, 3, 8)),
    "GRU": (lambda: nn.GRU(8, 6), lambda: torch.randn(5, 3, 8)),
    "LSTM with projection": (lambda: nn.LSTM(8, 6, proj_size=3), lambda: torch.randn(5, 3, 8)),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2),
        lambda: torch.randn(5, 3, 8),
    ),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10)),
        lambda: torch.randn(2, 3, 6, 6),
    ),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", STOCK)
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_share(name, training):
    """A stock model counts the same as its accelerated twin, its fused kernels too: 0 and 1 of the same sum."""
    make, x = STOCK[name]
    stock, x = make().train(training), x()
    before = fastnn.explain(stock, x)
    after = fastnn.explain(fastnn.accelerate(stock), x)
    assert before.share == 0 and after.share == 1
    assert sum(before.flops.values()) == sum(after.flops.values()) > 0


def test_nested_tensors_count_their_own_lengths():
    """In evaluation torch takes the padding out: the fast path's FLOPs are those of the tokens left."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1).eval()
    hidden = torch.tensor([[False] * 5, [False] * 2 + [True] * 3])
    found = fastnn.explain(encoder, torch.randn(2, 5, 8), src_key_padding_mask=hidden).flops
    assert sum(found.values()) == 2 * 7 * (4 * 64 + 2 * 8 * 16) + 4 * 8 * (25 + 4)


def test_explain_tells_what_is_left():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x, *, power):
            return torch.bmm(self.linear(x), x.mT) ** power

    net = fastnn.accelerate(Net())
    explanation = fastnn.explain(net, torch.randn(2, 4, 8), power=2)
    assert explanation.flops == {"fastnn::linear": 1024, "aten::bmm": 512}
    assert explanation.share == 2 / 3
    for text in (str(explanation), explanation.summary()):
        assert "66.7 % of 0.00154 MFLOPs of this call served by fastnn" in text
        assert "33.3 % in aten::bmm served by torch" in text
    assert fastnn.explain(net).share is None and "MFLOPs" not in str(fastnn.explain(net))
    nothing = fastnn.explain(nn.ReLU(), torch.randn(3))
    assert nothing.share is None and nothing.flops == {} and "no FLOPs" in str(nothing)


def test_explain_leaves_everything_as_it_was():
    """Generators, the mode, running statistics, gradients."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(64, 2))
    fast = fastnn.accelerate(net)
    kept, x = copy.deepcopy(net.state_dict()), torch.randn(2, 3, 6, 6)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert fastnn.explain(fast, x).share == 1
    assert torch.equal(torch.rand(3), expected)
    assert all(m.training for m in fast.modules())
    assert all(torch.equal(v, kept[k]) for k, v in fast.state_dict().items())
    assert all(p.grad is None for p in fast.parameters())
    with pytest.raises(RuntimeError):
        fastnn.explain(fast, torch.randn(2, 5, 6, 6))
    assert all(torch.equal(v, kept[k]) for k, v in fast.state_dict().items())


def test_register():
    """Only when asked; every mode counts then; once more does nothing."""
    code = """
import torch, fastnn
from torch.utils import flop_counter
def count():
    with flop_counter.FlopCounterMode(display=False) as counter:
        fastnn.functional.linear(torch.ones(2, 3), torch.ones(4, 3))
    return counter.get_total_flops()
assert count() == 0 and not any("fastnn" in str(op) for op in flop_counter.flop_registry)
fastnn.flops.register()
fastnn.flops.register()
assert count() == 48
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_operator_has_a_formula():
    """Those that pack weights multiply nothing; one is a formula of torch's operators."""
    ops = {n.split("::")[1].split(".")[0] for n in torch._C._dispatch_get_all_op_names() if n.startswith("fastnn::")}
    have = {op._qualified_op_name.split("::")[1] for op in flops.formulas()}
    assert {op for op in ops if not op.endswith("_pack")} == have | {"attention_weights_backward"}
