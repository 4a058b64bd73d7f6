"""What the tests of rewritten graphs share: Dynamo captures, fastnn rewrites, and the graph runs as it is, by no compiler."""

from collections import Counter
from unittest import mock

import torch
import torch.nn.functional as F

from fastnn import served as served_table
from fastnn.rewrite import rewrite

ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "hardswish": F.hardswish,
    "relu6": F.relu6,
    "softplus": F.softplus,
    "mish": F.mish,
}


def rewritten(function, reports, **options):
    """``function`` as Dynamo captures it, each graph rewritten; what was done is appended to ``reports``."""

    def backend(gm, example_inputs):
        before = str(gm.graph)
        with mock.patch.object(served_table, "WORTH", 0), mock.patch.object(served_table, "WORTH_A_GRADIENT", 0):
            new, report = rewrite(gm)  # tests are of tiny things, which would not be worth a call
        assert str(gm.graph) == before, "the graph that was handed in stays as it was"
        reports.append(report)
        return new

    torch.compiler.reset()
    return torch.compile(function, backend=backend, **options)


def outcome(function, args):
    """Results, and gradients of every floating input (and of a module's parameters)."""
    args = [a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in args]
    results = function(*args)
    results = [r for r in (results if isinstance(results, (tuple, list)) else [results]) if isinstance(r, torch.Tensor)]
    wanted = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    wanted += [p for p in getattr(function, "parameters", list)() if p.requires_grad]
    wanted = [t for t in wanted if any(r.requires_grad for r in results)]
    loss = sum(
        (r * torch.linspace(0.5, 1.5, r.numel(), dtype=r.dtype).view_as(r)).sum() for r in results if r.requires_grad
    )
    return results, torch.autograd.grad(loss, wanted, allow_unused=True) if wanted else ()


def agrees(function, *args, rtol=None, atol=None, **options):
    """Assert that the rewritten graphs give what ``function`` gives, gradients too; return the report (of the last graph)."""
    reports = []
    torch.testing.assert_close(
        outcome(rewritten(function, reports, fullgraph=True, **options), args),
        outcome(function, args),
        rtol=rtol,
        atol=atol,
    )
    return reports[-1]


def served(report):
    """``{"linear + relu": 2}``: what was served and fused, counted."""
    return dict(Counter(" + ".join([s.op, *s.fused]) for s in report.served))


def tensors(*shapes, dtype=torch.float64, requires_grad=True):
    return [torch.randn(shape, dtype=dtype, requires_grad=requires_grad) for shape in shapes]
