"""fastnn/rewrite_attention.py: attention written by hand becomes one call of the kernel, and what only looks like it stays."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.graphs import agrees, outcome, rewritten, served, tensors

pytestmark = pytest.mark.usefixtures("one_thread")
INF = float("inf")


def heads(requires_grad=True, dtype=torch.float64):
    return tensors((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6), dtype=dtype, requires_grad=requires_grad)


def hidden(*shape):
    """True hides; never the first key."""
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False
    return mask


SPELLINGS = {
    "operators": lambda q, k, v, m, a: ((q @ k.transpose(-2, -1)) / math.sqrt(4)).softmax(-1) @ v,
    "functions": lambda q, k, v, m, a: torch.matmul(F.softmax(torch.mul(torch.matmul(q, k.mT), 0.3), dim=-1), v),
    "queries scaled": lambda q, k, v, m, a: torch.softmax((q * 0.5).matmul(k.permute(0, 1, 3, 2)), dim=3).matmul(v),
    "both scaled": lambda q, k, v, m, a: ((q * 0.7) @ (k / 1.4).transpose(2, 3)).softmax(dim=-1) @ v,
    "not scaled": lambda q, k, v, m, a: (q @ k.mT).softmax(-1) @ v,
    "three dimensions": lambda q, k, v, m, a: torch.bmm(
        torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).softmax(-1), v.flatten(0, 1)
    ),
    "one head of keys": lambda q, k, v, m, a: (q @ k[:, :1].mT).softmax(-1) @ v[:, :1],
    "softmax of scores by its own dtype": lambda q, k, v, m, a: (
        F.softmax((q @ k.mT).double(), dim=-1, dtype=torch.float64).to(v.dtype) @ v
    ),
    "dropout that drops nothing": lambda q, k, v, m, a: F.dropout((q @ k.mT).softmax(-1), 0.5, False) @ v,
}
MASKED = {
    "added": lambda q, k, v, m, a: (q @ k.mT * 0.5 + a).softmax(-1) @ v,
    "added in place": lambda q, k, v, m, a: (q @ k.mT).mul_(0.5).add_(a).softmax(-1) @ v,
    "added from the left": lambda q, k, v, m, a: (a + q @ k.mT).softmax(-1) @ v,
    "baddbmm": lambda q, k, v, m, a: (
        torch.baddbmm(a[0, 0], q.flatten(0, 1), k.flatten(0, 1).mT, alpha=0.5).softmax(-1) @ v.flatten(0, 1)
    ),
    "masked_fill": lambda q, k, v, m, a: (q @ k.mT / 2).masked_fill(m, -INF).softmax(-1) @ v,
    "masked_fill_": lambda q, k, v, m, a: (q @ k.mT / 2).masked_fill_(m == 1, torch.finfo(q.dtype).min).softmax(-1) @ v,
    "filled with a number": lambda q, k, v, m, a: (q @ k.mT / 2).masked_fill(m, -1e9).softmax(-1) @ v,
    "where": lambda q, k, v, m, a: torch.where(~m, q @ k.mT, -INF).softmax(-1) @ v,
    "where the other way": lambda q, k, v, m, a: torch.where(m, -1e30, q @ k.mT).softmax(-1) @ v,
    "where with a tensor": lambda q, k, v, m, a: (
        torch.where(~m, q @ k.mT, torch.full([], -1e30, dtype=q.dtype)).softmax(-1) @ v
    ),
    "two fills": lambda q, k, v, m, a: (
        (q @ k.mT).masked_fill(m, -INF).masked_fill(m[:, :, :1].flip(0), -INF).softmax(-1) @ v
    ),
    "a fill, then added": lambda q, k, v, m, a: ((q @ k.mT).masked_fill(m, -1e10) + a).softmax(-1) @ v,
}


@pytest.mark.works("Compilation", 'backend="fastnn": attention written by hand, in many spellings, becomes one kernel')
@pytest.mark.parametrize("spelling", [*SPELLINGS, *MASKED])
def test_each_spelling(spelling):
    mask, added = hidden(2, 1, 5, 7), torch.randn(2, 1, 5, 7, dtype=torch.float64, requires_grad=True)
    report = agrees((SPELLINGS | MASKED)[spelling], *heads(), mask, added)
    assert served(report) == {"attention by hand" + (" + mask" if spelling in MASKED else ""): 1}
    assert not report.left


def test_a_soft_cap():
    report = agrees(lambda q, k, v: (torch.tanh(q @ k.mT * 0.5 / 3.0) * 3.0).softmax(-1) @ v, *heads())
    assert served(report) == {"attention by hand + softcap": 1}


def test_heads_are_split_and_joined_as_models_do():
    def model(x, w_qkv, w_o):
        q, k, v = (x @ w_qkv).view(2, 6, 3, 2, 4).permute(2, 0, 3, 1, 4)
        q = q * 4**-0.5
        attn = (q @ k.transpose(-2, -1)).softmax(dim=-1)
        return (attn @ v).transpose(1, 2).contiguous().view(2, 6, 8) @ w_o

    report = agrees(model, *tensors((2, 6, 8), (8, 24), (8, 8)))
    assert served(report) == {"attention by hand": 1, "matmul": 2}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_softmax_in_float32(dtype):
    def model(q, k, v):
        scores = torch.matmul(q, k.transpose(2, 3)) * 0.5
        return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)

    q, k, v = heads(dtype=dtype)
    reports = []
    (y,), grads = outcome(rewritten(model, reports), (q, k, v))
    exact, exact_grads = outcome(model, [t.detach().double().requires_grad_() for t in (q, k, v)])
    (stock,), stock_grads = outcome(model, (q, k, v))
    assert served(reports[0]) == {"attention by hand": 1} and y.dtype == dtype
    for own, torchs, true in zip((y, *grads), (stock, *stock_grads), (*exact, *exact_grads), strict=True):
        error, its_error = ((t.double() - true).abs().max() for t in (own, torchs))
        assert error <= 2 * its_error + torch.finfo(dtype).eps * true.abs().max()


def test_dropout_keeps_the_mean_and_drops():
    def model(q, k, v):
        return F.dropout((q @ k.mT).softmax(-1), 0.5, True) @ v

    q, k, v = heads(requires_grad=False)
    reports = []
    compiled = rewritten(model, reports)
    v = torch.ones_like(v)
    sample = torch.stack([compiled(q, k, v) for _ in range(200)])
    assert served(reports[0]) == {"attention by hand + dropout": 1}
    assert (sample.mean() - 1).abs() < 0.05 and sample.std() > 0.1


def test_a_row_without_keys():
    """Filled with a finite number, a row of nothing but hidden keys is the mean of the values, as its softmax was."""
    mask = torch.zeros(5, 7, dtype=torch.bool)
    mask[2] = True
    q, k, v = heads(requires_grad=False, dtype=torch.float32)
    for fill in (-1e4, -1e9, torch.finfo(torch.float32).min):
        agrees(lambda q, k, v, fill=fill: (q @ k.mT).masked_fill(mask, fill).softmax(-1) @ v, q, k, v)
    added = torch.zeros(5, 7).masked_fill(mask, torch.finfo(torch.float32).min)
    agrees(lambda q, k, v: (q @ k.mT + added).softmax(-1) @ v, q, k, v)
    empty = rewritten(lambda q, k, v: (q @ k.mT).masked_fill(mask, -INF).softmax(-1) @ v, [])(q, k, v)
    assert torch.equal(empty[:, :, 2], torch.zeros(2, 3, 6)), "what scaled_dot_product_attention gives, not NaN"


REFUSED = {
    "its weights are used elsewhere": lambda q, k, v: (lambda p: (p @ v, p))((q @ k.mT).softmax(-1)),
    "its scores are used elsewhere": lambda q, k, v: (lambda s: (s.softmax(-1) @ v, s.sum()))(q @ k.mT),
    "masked scores are filled with -3, which hides nothing": lambda q, k, v: (
        (q @ k.mT).masked_fill(torch.ones(5, 7, dtype=torch.bool).triu(), -3.0).softmax(-1) @ v
    ),
    "a mask makes the scores larger": lambda q, k, v: (q[:1] @ k[:1].mT + torch.zeros(2, 1, 5, 7)).softmax(-1) @ v,
    "a tensor is changed, or autocast entered or left, in its midst": lambda q, k, v: (
        lambda s: (v.mul_(2), s.softmax(-1) @ v)[1]
    )(q @ k.mT),
}
NOT_ATTENTION = {
    "softmax over the queries": lambda q, k, v: (q @ k.mT).softmax(-2) @ v,
    "softmax over the heads": lambda q, k, v: (q @ k.mT).softmax(1) @ v,
    "no softmax": lambda q, k, v: (q @ k.mT).sigmoid() @ v,
    "a factor after the mask": lambda q, k, v: ((q @ k.mT + 1.0) * 2).softmax(-1) @ v,
    "a factor that is a tensor": lambda q, k, v: (q @ k.mT * q.mean()).softmax(-1) @ v,
    "weights scaled": lambda q, k, v: ((q @ k.mT).softmax(-1) * 2) @ v,
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_may_not_be_fused_is_left_and_told(reason):
    report = agrees(REFUSED[reason], *heads(requires_grad=False))
    assert report.left[("attention by hand", reason)] == 1 and not report.served


@pytest.mark.parametrize("case", NOT_ATTENTION)
def test_what_is_no_attention_stays(case):
    report = agrees(NOT_ATTENTION[case], *heads())
    assert not report.served and report.left["matmul", "a product of batches of matrices"] == 2


def test_sizes_may_be_symbols():
    reports = []
    compiled = rewritten(SPELLINGS["operators"], reports, dynamic=True, fullgraph=True)
    for length in (5, 6, 9):
        q, k, v = tensors((2, 3, length, 4), (2, 3, length, 4), (2, 3, length, 6))
        torch.testing.assert_close(outcome(lambda q, k, v: compiled(q, k, v, None, None), (q, k, v)),
                                   outcome(lambda q, k, v: SPELLINGS["operators"](q, k, v, None, None), (q, k, v)))  # fmt: skip
    assert [served(r) for r in reports] == [{"attention by hand": 1}]
