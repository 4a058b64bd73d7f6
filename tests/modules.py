"""What the tests of the modules share: masks of every kind, twins of fastnn's and torch's, all that comes of a call."""

import torch

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
