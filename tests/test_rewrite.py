"""fastnn/rewrite.py: calls that fastnn serves become its ops in a captured graph; the rest, and the graph's meaning, stay."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastnn
from fastnn.rewrite import rewrite
from tests.graphs import agrees, outcome, rewritten, served, tensors

pytestmark = pytest.mark.usefixtures("one_thread")

CALLS = {
    "linear": (lambda x, w, b: F.linear(x, w, b), [(2, 3, 5), (4, 5), (4,)]),
    "linear without bias": (lambda x, w: F.linear(input=x, weight=w), [(3, 5), (4, 5)]),
    "linear with a vector": (lambda x, w: F.linear(x, w), [(3, 5), (5,)]),
    "mm": (lambda x, w: torch.mm(x, w), [(3, 5), (5, 4)]),
    "mm method": (lambda x, w: x.mm(w.t()), [(3, 5), (4, 5)]),
    "addmm": (lambda b, x, w: torch.addmm(b, x, w), [(4,), (3, 5), (5, 4)]),
    "addmm method": (lambda b, x, w: b.addmm(x, w), [(4,), (3, 5), (5, 4)]),
    "matmul": (lambda x, w: torch.matmul(x, w), [(2, 3, 5), (5, 4)]),
    "@": (lambda x, w: x @ w, [(2, 3, 5), (5, 4)]),
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b, 2, 1, 1, 2), [(2, 4, 7, 6), (6, 2, 3, 3), (6,)]),
    "conv2d padded the same": (lambda x, w: torch.conv2d(x, w, padding="same"), [(2, 4, 7, 6), (6, 4, 3, 5)]),
    "scaled_dot_product_attention": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3),
        [(2, 3, 5, 4)] * 3,
    ),
    "gru_cell": (
        lambda x, h, *w: torch.gru_cell(x, h, *w),
        [(3, 4), (3, 5), (15, 4), (15, 5), (15,), (15,)],
    ),
    "lstm_cell": (
        lambda x, h, c, *w: torch.lstm_cell(x, (h, c), *w),
        [(3, 4), (3, 5), (3, 5), (20, 4), (20, 5), (20,), (20,)],
    ),
    "gru": (
        lambda x, h, *w: torch.gru(x, h, w, True, 1, 0.0, True, False, True),
        [(3, 6, 4), (1, 3, 5), (15, 4), (15, 5), (15,), (15,)],
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_each_call(call):
    function, shapes = CALLS[call]
    report = agrees(function, *tensors(*shapes))
    assert len(report.served) == 1 and not report.left
    if call not in ("conv2d padded the same", "lstm_cell"):  # sizes that decide are known there
        assert len(agrees(function, *tensors(*shapes), dynamic=True).served) == 1


LEFT = {
    "a product of batches of matrices": (lambda: lambda x, y: x @ y, [(2, 3, 5), (2, 5, 4)]),
    "no kernel for this form": (lambda: torch.bmm, [(2, 3, 5), (2, 5, 4)]),
    "beta or alpha": (lambda: lambda b, x, w: torch.addmm(b, x, w, alpha=2), [(4,), (3, 5), (5, 4)]),
    "a matrix is added, not a bias": (lambda: torch.addmm, [(3, 4), (3, 5), (5, 4)]),
}


@pytest.mark.parametrize("reason", LEFT)
def test_what_stays_with_torch_is_told(reason):
    function, shapes = LEFT[reason]
    report = agrees(function(), *tensors(*shapes))
    assert not report.served and [why for _, why in report.left] == [reason]


def test_a_dtype_without_kernel_is_left_or_an_error():
    x, w = torch.randint(-3, 3, (4, 8)), torch.randint(-3, 3, (5, 8))
    report = agrees(F.linear, x, w)
    assert dict(report.left) == {("linear", "dtype torch.int64 has no kernel"): 1}
    assert not agrees(torch.matmul, x, w.t().contiguous()).served
    fastnn.set_fallback("error")
    with pytest.raises(Exception, match=r"fastnn\.linear: no kernel takes this input: dtype torch\.int64"):
        rewritten(F.linear, [])(x, w)


def test_complex_numbers_stay():
    x, w = (torch.randn(s, dtype=torch.complex64) for s in ((3, 5), (4, 5)))
    assert dict(agrees(F.linear, x, w).left) == {("linear", "dtype torch.complex64 has no kernel"): 1}


@pytest.mark.works("Precision", 'backend="fastnn" under torch.autocast, around the call or in the graph')
@pytest.mark.parametrize("inside", [True, False])
def test_autocast(inside):
    def model(x, w, b, image, kernel, q):
        y = F.gelu(F.linear(x, w, b)), F.conv2d(image, kernel).relu(), F.scaled_dot_product_attention(q, q, q)
        return *y, torch.softmax(q @ q.mT, -1) @ q, F.linear(x.double(), w.double())

    def call(function, *args):
        with torch.autocast("cpu", torch.bfloat16):
            return function(*args)

    args = tensors((3, 5), (4, 5), (4,), (2, 3, 6, 6), (4, 3, 3, 3), (2, 3, 5, 4), dtype=torch.float32)
    reports = []
    if inside:
        own = rewritten(lambda *args: call(model, *args), reports, fullgraph=True)
    else:
        compiled = rewritten(model, reports, fullgraph=True)

        def own(*args):
            return call(compiled, *args)

    (results, grads), (stock, stock_grads) = outcome(own, args), outcome(lambda *args: call(model, *args), args)
    assert [t.dtype for t in results] == [t.dtype for t in stock]
    torch.testing.assert_close((results, grads), (stock, stock_grads), rtol=0.03, atol=0.03)
    assert served(reports[0])["linear + gelu"] == served(reports[0])["conv2d + relu"] == 1
    assert {s.op for s in reports[0].served} >= {"scaled_dot_product_attention", "attention by hand"}


def test_autocast_entered_in_the_midst_is_a_wall():
    def model(x, w):
        y = F.linear(x, w)
        with torch.autocast("cpu", torch.bfloat16):
            return torch.relu(y) @ w

    report = agrees(model, *tensors((3, 4), (4, 4), dtype=torch.float32), rtol=0.02, atol=0.02)
    assert served(report) == {"linear": 1, "matmul": 1}


def test_gradients_off_in_a_part_of_the_graph():
    def model(x, w):
        with torch.no_grad():
            y = F.linear(x, w)
        return F.linear(x, w) * y

    assert served(agrees(model, *tensors((3, 4), (4, 4)))) == {"linear": 2}


@pytest.mark.parametrize("need_weights", [True, False])
def test_multi_head_attention(need_weights):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=need_weights)

    report = agrees(Model().double(), *tensors((2, 5, 8)))
    assert [s.op for s in report.served] == ["multi_head_attention_forward"]


def test_the_rows_of_a_product_may_come_from_anywhere():
    """Views, expanded and permuted operands reach the kernel as they are."""
    report = agrees(lambda x, w: x.permute(2, 0, 1)[::2] @ w.expand(4, 6), *tensors((3, 4, 5), (1, 6)))
    assert served(report) == {"matmul": 1}


def test_a_graph_without_anything_of_ours():
    report = agrees(lambda x: x.sin().sum(0), *tensors((3, 4)))
    assert (report.served, dict(report.left), report.others) == ([], {}, 2)


def test_a_graph_without_values_is_left_as_it_is():
    gm = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU()))
    new, report = rewrite(gm)  # modules, and nothing that Dynamo knew
    x = torch.randn(2, 3)
    assert torch.equal(new(x), gm(x)) and not report.served
