"""conv1d: the function and the module (fastnn/functional/conv1d.py, fastnn/nn/conv1d.py) against torch's."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastnn
from fastnn.functional import conv1d
from tests.modules import no_worse

pytestmark = pytest.mark.usefixtures("one_thread")


def case(n, c, length, k, s, groups=1, bias=True, dtype=torch.float64, requires_grad=True):
    lead = [] if n is None else [n]
    shapes = [(*lead, c, length), (k, c // groups, s), (k,)]
    tensors = [torch.randn(shape, dtype=dtype, requires_grad=requires_grad) for shape in shapes]
    return tensors if bias else [*tensors[:2], None]


SHAPES = [
    (2, 4, 11, 6, 3),
    (1, 1, 1, 1, 1),
    (None, 4, 9, 5, 4),
    (3, 8, 17, 8, 5),
    (2, 6, 13, 9, 2, 3),
    (2, 5, 12, 5, 7, 5),
    (0, 4, 9, 3, 2),
]
WHERE = [
    {},
    {"stride": 2, "padding": 1},
    {"stride": (3,), "padding": (2,), "dilation": (1,)},
    {"padding": 6, "dilation": 2},
    {"padding": "same"},
    {"padding": "valid", "dilation": 1},
]


@pytest.mark.parametrize("where", WHERE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_function(shape, where):
    """Outputs and gradients in float64, or torch's error."""
    args = case(*shape)
    groups = shape[5] if len(shape) > 5 else 1
    try:
        expected = F.conv1d(*args, groups=groups, **where)
    except RuntimeError:
        with pytest.raises(RuntimeError, match=r"fastnn\.conv"):
            conv1d(*args, groups=groups, **where)
        return
    found = conv1d(*args, groups=groups, **where)
    torch.testing.assert_close(found, expected)
    assert found.stride() == expected.stride() or found.numel() == 0
    grads = [torch.autograd.grad(t.sin().sum(), args) for t in (found, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_worse_than_torch(dtype):
    """Shapes of Whisper, Wav2Vec2 (features, positions), of a text model and a keyword spotter, made small."""
    for shape, where in (
        ((2, 80, 60, 48, 3), {"padding": 1}),
        ((2, 48, 60, 48, 3), {"padding": 1, "stride": 2}),
        ((2, 1, 400, 32, 10), {"stride": 5}),
        ((1, 48, 49, 48, 32, 4), {"padding": 16, "groups": 4}),
        ((4, 64, 40, 64, 7, 64), {"padding": 3, "groups": 64}),
        ((2, 32, 16, 64, 1), {}),
    ):
        args = case(*shape, dtype=dtype, requires_grad=False)
        exact = [t.double() for t in args]
        no_worse(conv1d(*args, **where), F.conv1d(*args, **where), F.conv1d(*exact, **where))


def test_layout():
    """Whatever lies in memory, the output is contiguous, as torch's."""
    x = torch.randn(2, 9, 4).mT
    weight = torch.randn(3, 6, 4).mT
    for given, kernel in itertools.product((x, x.contiguous(), x[:1].expand(2, -1, -1)), (weight, weight.contiguous())):
        found = conv1d(given, kernel)
        assert found.is_contiguous()
        torch.testing.assert_close(found, F.conv1d(given, kernel))


def test_activation():
    x, weight, bias = case(2, 4, 11, 6, 3)
    torch.testing.assert_close(conv1d(x, weight, bias, activation="gelu"), F.gelu(F.conv1d(x, weight, bias)))
    layer = fastnn.nn.Conv1d(4, 6, 3, activation="relu", dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.conv1d(x, layer.weight, layer.bias).relu())
    assert "activation='relu'" in repr(layer)


def test_errors():
    x, weight, _ = case(2, 4, 11, 6, 3)
    with pytest.raises(RuntimeError, match=r"fastnn\.conv1d: input must be \[C, L\] or \[N, C, L\]; got \[4\]"):
        conv1d(x[0, :, 0], weight)
    with pytest.raises(RuntimeError, match=r"fastnn\.conv1d: weight must be"):
        conv1d(x, weight[0])
    with pytest.raises(RuntimeError, match=r"fastnn\.conv1d: stride must be an int or a sequence of one; got \(1, 2\)"):
        conv1d(x, weight, stride=(1, 2))
    with pytest.raises(TypeError, match="input must be a Tensor; got list"):
        conv1d([1.0], weight)


@pytest.mark.parametrize("padding_mode", ["zeros", "circular", "reflect", "replicate"])
def test_frozen(padding_mode):
    """Packed weights: the same, and new after an edit; an activation after it is fused."""
    net = nn.Sequential(
        nn.Conv1d(8, 16, 3, padding=1, padding_mode=padding_mode), nn.GELU(), nn.Conv1d(16, 8, 2)
    ).eval()
    fast = fastnn.accelerate(net, freeze=True)
    x = torch.randn(2, 8, 30)
    for given in (x, x, torch.randn(2, 30, 8).mT, x[0]):
        with torch.no_grad():
            torch.testing.assert_close(fast(given), net(given))
    assert fast[0]._pack is not None and fast[0].activation == "gelu"
    with torch.no_grad():
        net[0].weight.mul_(2)
        torch.testing.assert_close(fast(x), net(x))
    fastnn.restore(fast)
    assert type(fast[0]) is nn.Conv1d and type(fast[1]) is nn.GELU and torch.equal(fast(x), net(x))
    assert fast[0].__dict__.keys() == net[0].__dict__.keys()


def test_weight_norm():
    """Parametrized as Wav2Vec2's positions are."""
    net = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3), dim=2)
    fast, x = fastnn.accelerate(net), torch.randn(2, 4, 9)
    assert isinstance(fast, fastnn.nn.Conv1d)
    torch.testing.assert_close(fast(x), net(x))
