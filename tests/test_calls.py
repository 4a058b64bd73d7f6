"""Modules that call torch's functions themselves (fastnn/calls.py), as accelerate serves them."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import linear as multiply

import fastnn
from fastnn import calls
from tests.modules import no_worse, operators

pytestmark = pytest.mark.usefixtures("one_thread")


class Attention(nn.Module):
    """Attends by the function, as many libraries' modules do."""

    def __init__(self, dim=16, heads=2):
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), heads

    def forward(self, x, causal: bool = False):
        return self.out(self._attend(*self.qkv(x).view(*x.shape[:-1], 3, self.heads, -1).movedim(-3, 0), causal))

    def _attend(self, q, k, v, causal):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


class Scaled(nn.Conv2d):
    """A convolution whose forward does more than convolve."""

    def forward(self, x):
        return self._conv_forward(x, self.weight / self.weight.norm(), self.bias)


def through(x, weight):
    return multiply(x, weight)


class Far(nn.Module):
    """The call is in a function of this file."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 16))

    def forward(self, x):
        return through(x, self.weight)


class Quiet(nn.Module):
    """Nothing that fastnn serves, whatever its names."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        return torch.matmul(self.linear(x), x.mT)


CASES = {
    "attention": (Attention, (2, 5, 16), ("scaled_dot_product_attention",)),
    "subclass": (lambda: Scaled(3, 4, 3), (2, 3, 8, 8), ("conv2d",)),
    "function": (Far, (2, 16), ("linear",)),
}


def test_functions():
    for make, _, expected in CASES.values():
        assert calls.functions(type(make())) == expected
    assert calls.functions(Quiet) == ()


@pytest.mark.parametrize("name", CASES)
def test_served(name):
    """All FLOPs on fastnn's kernels; outputs and gradients as good as torch's; restored to the bit."""
    make, shape, expected = CASES[name]
    stock, x = make(), torch.randn(shape, requires_grad=True)
    fast = fastnn.accelerate(stock)
    fastnn.set_fallback("error")
    assert fastnn.explain(fast, x).share == 1 and fastnn.explain(stock, x).share == 0
    row = next(iter(fastnn.explain(fast)))
    assert row.served and row.kind == type(stock).__name__ and row.note == "; ".join(expected)

    def outcome(module, x):
        output = module(x)
        return output, torch.autograd.grad(output.sin().sum(), [x, *module.parameters()])

    exact = x.detach().double().requires_grad_()
    no_worse(outcome(fast, x), outcome(stock, x), outcome(copy.deepcopy(stock).double(), exact))
    restored = fastnn.restore(fast)
    assert type(restored) is type(stock) and torch.equal(restored(x), stock(x))
    assert restored.__dict__.keys() == stock.__dict__.keys()


def test_what_it_still_is():
    """An instance of its class, with the same signature; it pickles, copies and compiles."""
    stock, x = Attention().eval(), torch.randn(2, 5, 16)
    fast = fastnn.accelerate(stock)
    assert isinstance(fast, Attention) and type(fast).__name__ == "Attention"
    assert inspect.signature(fast.forward) == inspect.signature(stock.forward)
    expected = fast(x, causal=True)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(twin(x, causal=True), expected)
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, causal=True), expected)
    torch.testing.assert_close(expected, stock(x, causal=True))
    assert type(fastnn.restore(fastnn.accelerate(fast))) is Attention


def test_filter_fn():
    fast = fastnn.accelerate(nn.Sequential(Attention()), filter_fn=lambda module, name: name != "0")
    assert type(fast[0]) is Attention and type(fast[0].qkv) is fastnn.nn.Linear
    assert next(r for r in fastnn.explain(fast) if r.name == "0").note == "filter_fn said no"


def test_quiet_modules_stay_as_they_are():
    assert type(fastnn.accelerate(Quiet())) is Quiet


@pytest.mark.parametrize("value", ["relu", nn.ReLU(), None], ids=str)
def test_an_attribute_named_activation_stays_its_owners(value):
    """A stock layer on which somebody keeps an ``activation``: neither applied by the kernel nor lost."""
    stock = nn.Sequential(nn.Linear(4, 5), nn.Unflatten(1, (5, 1, 1)), nn.Conv2d(5, 3, 1), nn.Flatten())
    stock[0].activation = stock[2].activation = value
    x, fast = torch.randn(2, 4), copy.deepcopy(stock).eval()
    own = fast[0].activation
    fast = fastnn.accelerate(fast, inplace=True, freeze=True)
    assert fast[0].activation is own and fast[2].activation is own
    with torch.no_grad():
        torch.testing.assert_close(fast(x), stock(x))
    assert fastnn.explain(fast, x).share == 1
    assert {"aten::addmm", "aten::convolution"}.isdisjoint(operators(lambda: fast(x)))
    fastnn.restore(fast)
    assert type(fast[0]) is nn.Linear and type(fast[2]) is nn.Conv2d
    assert fast[0].activation is own and fast[2].activation is own
    assert fast[0].__dict__.keys() == stock[0].__dict__.keys()


def test_recurrent_layers_may_keep_one_too():
    stock = nn.GRU(4, 5)
    stock.activation = nn.ReLU()
    fast = fastnn.accelerate(stock, inplace=True)
    assert type(fast) is fastnn.nn.GRU and type(fast.activation) is nn.ReLU
