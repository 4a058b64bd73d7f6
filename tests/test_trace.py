"""Symbolic tracing: every path, nothing left behind, and the subclasses that only pad and convolve."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastnn import trace


def count(module):
    return len(trace.paths(module.eval(), trace.stock_leaf))


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, scale=None, double=False):
        x = self.linear(x)
        if scale is not None:
            if scale > 1:
                x = x * scale
            assert scale < 100
        return x + x if double else x


def test_every_path_is_found():
    assert count(nn.Sequential(nn.Linear(4, 4), nn.ReLU())) == 1
    assert count(Branches()) == 2 * (1 + 2)  # double × (no scale, a scale on either side of 1)


class Loop(nn.Module):
    def forward(self, x):
        while x.sum() > 0:
            x = x - 1
        return x


class Lengths(nn.Module):
    def forward(self, x):
        return [row + 1 for row in x]


class Boolean(nn.Module):
    def forward(self, x, a=None, b=None, c=None, d=None, e=None):
        return x


@pytest.mark.parametrize(("module", "why"), [(Loop(), "loop"), (Lengths(), "iterated"), (Boolean(), "optional")])
def test_what_cannot_be_traced_says_why(module, why):
    with pytest.raises(trace.Untraceable, match=why):
        trace.paths(module, trace.stock_leaf)


class SideEffects(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.last = None

    def forward(self, x):
        print("running")
        self.calls += 1
        self.last = self.linear(x + torch.rand(4))
        return self.last


def test_tracing_leaves_nothing_behind(capsys):
    module = SideEffects()
    before, generator = dict(module.__dict__), torch.get_rng_state()
    trace.paths(module, trace.stock_leaf)
    assert module.__dict__ == before and module.last is None and module.calls == 0
    assert torch.equal(torch.get_rng_state(), generator)
    assert capsys.readouterr().out == ""


class Same(nn.Conv2d):
    """TensorFlow's padding for an even image and stride 2: one row and one column of zeros at the end."""

    def forward(self, x):
        return F.conv2d(
            F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class PadFirst(nn.Conv2d):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.pad = nn.ZeroPad2d((2, 1, 0, 3))

    def forward(self, x):
        return super().forward(self.pad(x))


class Standardized(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight / self.weight.std(), self.bias)


class PadsWithOnes(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.pad(x, (1, 1), value=1.0))


class Noisy(nn.Conv2d):
    def forward(self, x):
        return super().forward(x + torch.rand_like(x) if self.training else x)


class Named(nn.Conv2d):
    def extra(self):
        return 1


@pytest.mark.parametrize(
    ("cls", "zeros"),
    [
        (Same, (0, 1, 0, 1)),
        (PadFirst, (2, 1, 0, 3)),
        (Named, (0, 0, 0, 0)),
        (Standardized, None),
        (PadsWithOnes, None),
        (Noisy, None),
    ],
)
def test_convolutions_that_only_pad(cls, zeros):
    module = cls(3, 8, 3, stride=2).eval()
    assert trace.padded_conv2d(module) == zeros
    assert not module.training


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Plain(nn.Linear):
    def forward(self, x):
        return super().forward(x)


def test_linears_that_are_plain():
    assert trace.plain_linear(Plain(3, 4)) and trace.plain_linear(Plain(3, 4, bias=False))
    assert not trace.plain_linear(Scaled(3, 4))
