"""fastnn/rewrite_epilogue.py: bias, batch norm and activation, in every spelling, fused into linear and conv2d."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.graphs import ACTIVATIONS, agrees, served, tensors

pytestmark = pytest.mark.usefixtures("one_thread")

SPELLINGS = {
    "relu method": ("relu", lambda y: y.relu()),
    "relu in place": ("relu", lambda y: F.relu(y, inplace=True)),
    "relu_": ("relu", torch.relu_),
    "relu_ as a statement": ("relu", lambda y: (y.relu_(), y)[1]),
    "relu by where": ("relu", lambda y: torch.where(y > 0, y, 0.0)),
    "gelu by keyword": ("gelu", lambda y: F.gelu(y, approximate="none")),
    "gelu by hand": ("gelu", lambda y: y * 0.5 * (1.0 + torch.erf(y / math.sqrt(2.0)))),
    "gelu_tanh by hand": (
        "gelu_tanh",
        lambda y: 0.5 * y * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (y + 0.044715 * torch.pow(y, 3.0)))),
    ),
    "silu by hand": ("silu", lambda y: y * torch.sigmoid(y)),
    "silu module": ("silu", nn.SiLU(inplace=True)),
    "sigmoid method": ("sigmoid", lambda y: y.sigmoid()),
    "sigmoid_": ("sigmoid", lambda y: y.sigmoid_()),
    "tanh method": ("tanh", lambda y: y.tanh()),
    "leaky_relu with its slope": ("leaky_relu", lambda y: F.leaky_relu(y, 0.01, True)),
    "elu module": ("elu", nn.ELU()),
    "relu6 module": ("relu6", nn.ReLU6(inplace=True)),
    "relu6 as hardtanh": ("relu6", lambda y: F.hardtanh(y, 0.0, 6.0)),
    "hardswish by hand": ("hardswish", lambda y: y * F.relu6(y + 3) / 6),
    "softplus with its beta": ("softplus", lambda y: F.softplus(y, 1, 20)),
    "mish by hand": ("mish", lambda y: y * torch.tanh(F.softplus(y))),
}
NONE = {
    "another slope": lambda y: F.leaky_relu(y, 0.2),
    "another alpha": lambda y: F.elu(y, alpha=0.5),
    "clamp at another bound": lambda y: y.clamp(0, 5),
    "quick gelu": lambda y: y * torch.sigmoid(1.702 * y),
    "a slope of its own at zero": lambda y: torch.maximum(y, y * 0),
    "dropout": lambda y: F.dropout(y, 0.5, False) * 2,
}


@pytest.mark.works("Compilation", 'backend="fastnn": twelve activations fused into linear and conv2d, in any spelling')
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_each_activation(name):
    f = ACTIVATIONS[name]
    x, w, b, image, kernel = tensors((3, 5), (4, 5), (4,), (2, 3, 6, 6), (4, 3, 3, 3))

    def model(x, w, b, image, kernel):
        return f(F.linear(x, w, b)), f(F.conv2d(image, kernel, b, padding=1))

    assert served(agrees(model, x, w, b, image, kernel)) == {f"linear + {name}": 1, f"conv2d + {name}": 1}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_each_spelling(spelling):
    name, f = SPELLINGS[spelling]
    report = agrees(lambda x, w, b: f(F.linear(x, w, b)), *tensors((3, 5), (4, 5), (4,)))
    assert served(report) == {f"linear + {name}": 1} and report.others == 0


@pytest.mark.parametrize("case", NONE)
def test_what_is_none_of_them_stays(case):
    report = agrees(lambda x, w: NONE[case](F.linear(x, w)), *tensors((3, 5), (4, 5)))
    assert served(report) == {"linear": 1} and report.others > 0


def test_where_no_gradient_is_wanted_the_values_alone_decide():
    def model(x, w):
        return F.linear(x, w).clamp(min=0)  # whose slope at 0 is 1, unlike relu's

    x, w = tensors((3, 5), (4, 5))
    assert served(agrees(model, x, w)) == {"linear": 1}
    assert served(agrees(model, x.detach(), w.detach())) == {"linear + relu": 1}


def test_what_is_used_elsewhere_is_not_fused_away():
    def twice(x, w, b):
        y = F.linear(x, w, b)
        return F.gelu(y), y

    def in_the_middle(x, w, b):
        y = F.linear(x, w, b)
        s = torch.sigmoid(y)
        return y * s, s

    def before_it_is_changed(x, w, b):
        y = F.linear(x, w, b)
        z = y * 2
        return y.relu_(), z

    for model in (twice, in_the_middle, before_it_is_changed):
        assert served(agrees(model, *tensors((3, 5), (4, 5), (4,)))) == {"linear": 1}, model.__name__


def test_the_longest_chain_that_is_one_is_taken():
    report = agrees(lambda x, w: torch.tanh(torch.sigmoid(F.linear(x, w))) + 1, *tensors((3, 5), (4, 5)))
    assert served(report) == {"linear + sigmoid": 1} and report.others == 2


def test_a_bias_added_after_a_product():
    x, w, b = tensors((3, 5), (5, 4), (4,))
    for model in (
        lambda x, w, b: torch.relu(x @ w + b),
        lambda x, w, b: torch.relu(b + torch.mm(x, w)),
        lambda x, w, b: torch.relu(x.matmul(w).add_(b)),
        lambda x, w, b: F.relu(torch.add(F.linear(x, w.t()), b)),
    ):
        (entry,) = agrees(model, x, w, b).served
        assert entry.fused == ["bias", "relu"]


def test_what_is_added_and_is_no_bias_stays():
    def row(x, w, b):
        return x @ w + b.sum()

    def matrix(x, w, b):
        return x @ w + b.expand(3, 4)

    def scaled(x, w, b):
        return torch.add(x @ w, b, alpha=2)

    def wider(x, w, b):
        return x @ w[:, :1] + b  # [3, 1] + [4]

    for model in (row, matrix, scaled, wider):
        report = agrees(model, *tensors((3, 5), (5, 4), (4,)))
        assert served(report) == {"matmul": 1}, model.__name__


def network(width=8):
    return nn.Sequential(nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.Conv2d(width, 4, 3),
                         nn.BatchNorm2d(4, affine=False), nn.SiLU())  # fmt: skip


def seasoned(module):
    """Statistics and factors that are no zeros and ones."""
    for m in module.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
            if m.affine:
                nn.init.normal_(m.weight), nn.init.normal_(m.bias)
    return module


def test_batch_norm_in_evaluation_is_folded_in():
    module = seasoned(network().double()).eval()
    report = agrees(module, *tensors((2, 3, 16, 16)))
    assert served(report) == {"conv2d + batch norm + relu": 1, "conv2d + batch norm + silu": 1}
    linear = seasoned(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh()).double()).eval()
    assert served(agrees(linear, *tensors((30, 5)))) == {"linear + batch norm + tanh": 1}


def test_batch_norm_in_training_stays_and_its_statistics_move():
    module, twin = (seasoned(network().double()) for _ in range(2))
    twin.load_state_dict(module.state_dict())
    (x,) = tensors((2, 3, 9, 9))
    from tests.graphs import outcome, rewritten

    reports = []
    torch.testing.assert_close(outcome(rewritten(module, reports), [x]), outcome(twin, [x]))
    torch.testing.assert_close(module.state_dict(), twin.state_dict())
    assert served(reports[0]) == {"conv2d": 2}


def test_a_batch_norm_that_would_cost_more_folded_stays():
    module = seasoned(nn.Sequential(nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64)).double()).eval()
    assert served(agrees(module, *tensors((1, 64, 3, 3)))) == {"conv2d": 1}


def test_nothing_is_moved_past_a_write():
    def model(x, w, b):
        y = F.linear(x, w, b)
        x.mul_(2)
        return torch.relu(y)

    x, w, b = tensors((3, 5), (4, 5), (4,))
    assert served(agrees(model, x.detach(), w.detach(), b.detach())) == {"linear": 1}


def test_calls_of_fastnn_itself_are_fused_too():
    from fastnn import functional

    report = agrees(lambda x, w, b: F.gelu(functional.linear(x, w, b)), *tensors((3, 5), (4, 5), (4,)))
    assert report.served[0].fused == ["gelu"]
