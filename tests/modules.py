"""What the tests of the modules share: masks of every kind, twins of fastnn's and torch's, all that comes of a call."""

import torch
from torch.utils import _pytree

INF = float("inf")
MATMULS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::matmul", "aten::linear"}


def bool_mask(*shape):
    """About a third masked, the first key never."""
    mask = torch.rand(shape) < 0.35
    mask[..., 0] = False
    return mask


MASKS = {
    "none": lambda *shape: None,
    "bool": bool_mask,
    "float": lambda *shape: torch.randn(shape, dtype=torch.float64),
    "inf": lambda *shape: torch.zeros(shape, dtype=torch.float64).masked_fill(bool_mask(*shape), -INF),
}


def twins(fast, stock):
    """Give fastnn's and torch's module the same parameters, none of them zero or one (biases are born zero)."""
    with torch.no_grad():
        for p in stock.parameters():
            p.normal_(0, 0.5)
    fast.load_state_dict(stock.state_dict())
    return fast, stock


def outcome(module, args, kwargs):
    """The outputs of a call, and the gradients with respect to every leaf."""
    results = module(*args, **kwargs)
    results = results if isinstance(results, tuple) else (results,)
    leaves = {id(t): t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.requires_grad}
    loss = sum(f(t).sum() for f, t in zip((torch.sin, torch.square), results, strict=False) if t is not None)
    return *results, *torch.autograd.grad(loss, [*leaves.values(), *module.parameters()], allow_unused=True)


def operators(call):
    """Names of the operators that ran, with how often."""
    with torch.profiler.profile() as profile:
        call()
    return {e.key: e.count for e in profile.key_averages()}


def floats(tree):
    """All floating tensors in a nest of tuples, PackedSequences and dicts."""
    return [t for t in _pytree.tree_leaves(tree) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def same(fast, stock):
    fast, stock = _pytree.tree_leaves(fast), _pytree.tree_leaves(stock)
    assert len(fast) == len(stock)
    for a, b in zip(fast, stock, strict=True):
        if not isinstance(b, torch.Tensor):
            assert a == b
        elif not torch.equal(a, b):  # assert_close takes its time
            torch.testing.assert_close(a, b, equal_nan=True)


def no_worse(fast, stock, oracle):
    """Each tensor's largest error against float64: twice torch's own, and some roundings of the largest value.

    The largest of all of them: gradients that cancel (of a key's bias, or behind a norm) carry the others' roundings.
    """
    scale = max(t.detach().abs().nan_to_num(0.0).max() for t in floats(oracle) if t.numel())
    for a, b, exact in zip(*map(_pytree.tree_leaves, (fast, stock, oracle)), strict=True):
        if not (isinstance(b, torch.Tensor) and b.is_floating_point() and b.numel()):
            same(a, b)
            continue
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(a.isnan(), exact.isnan())
        ours, theirs = ((t.double() - exact).abs().nan_to_num(0.0).max() for t in (a, b))
        limit = 2 * theirs + 16 * torch.finfo(a.dtype).eps * scale
        assert ours <= limit, f"error {ours:.3g}, torch's {theirs:.3g}"


def doubled(tree):
    """The same tensors in float64, leaves as they are leaves."""

    def convert(t):
        is_float = isinstance(t, torch.Tensor) and t.is_floating_point()
        return t.detach().double().requires_grad_(t.requires_grad) if is_float else t

    return _pytree.tree_map(convert, tree)
