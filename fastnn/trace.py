"""What follows what: reads modules by symbolic tracing, so that freeze fuses only what no input can tell apart.

A module's ``forward`` is run on ``torch.fx`` proxies once for every way its conditions on tensors and optional
arguments can fall out. What is concluded holds on each of these paths. A module that cannot be traced stays as it is.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import itertools
import operator
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node, Proxy, Tracer
from torch.nn import functional as F

MAX_PATHS = 32
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Untraceable(Exception):
    """Raised with the reason why a module's paths cannot be listed."""


class _PathTracer(Tracer):
    """Tracer that answers conditions from a script of decisions, and takes True past its end."""

    def __init__(self, decisions: list[bool], is_leaf: Callable[[nn.Module], bool]):
        super().__init__()
        self.proxy_buffer_attributes = True
        self.decisions = decisions
        self.taken = 0
        self._is_leaf = is_leaf

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self._is_leaf(m)

    def to_bool(self, obj: Proxy) -> bool:
        if self.taken == len(self.decisions):
            if self.taken >= MAX_PATHS:
                raise Untraceable("a loop that depends on its input")
            self.decisions.append(True)
        self.taken += 1
        return self.decisions[self.taken - 1]


@contextlib.contextmanager
def _untouched(root: nn.Module) -> Iterator[None]:
    """Undo what running ``forward`` on proxies leaves behind: attributes, random numbers, prints, warnings; run no hook."""
    saved = []
    for m in root.modules():
        tables = {k: dict(m.__dict__[k]) for k in ("_parameters", "_buffers", "_modules")}
        saved.append((m, dict(m.__dict__), tables))
        m.__dict__.update({k: OrderedDict() for k in HOOKS if m.__dict__.get(k)})  # a hook is not to see a proxy
    try:
        with (
            torch.random.fork_rng(devices=[]),
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for m, attributes, tables in saved:
            m.__dict__.clear()
            m.__dict__.update(attributes)
            for k, table in tables.items():
                m.__dict__[k].clear()
                m.__dict__[k].update(table)


def _argument_choices(module: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield the concrete arguments to trace with: an optional argument may be its default or anything."""
    choices: dict[str, list[Any]] = {}
    for name, p in inspect.signature(module.forward).parameters.items():
        if p.default is None:
            choices[name] = [None, _ANYTHING]
        elif isinstance(p.default, bool):
            choices[name] = [True, False]
        elif p.default is not inspect.Parameter.empty:
            choices[name] = [_ANYTHING]
    if sum(len(v) - 1 for v in choices.values()) > 4:
        raise Untraceable("too many optional arguments")
    for values in itertools.product(*choices.values()):
        yield {k: v for k, v in zip(choices, values, strict=True) if v is not _ANYTHING}


_ANYTHING = object()


def paths(module: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> list[Graph]:
    """List the graph of every path through ``module.forward``.

    Args:
        module: the module to trace; it is left as it was.
        is_leaf: says which modules beneath it stay one call in the graph.

    Returns:
        One graph for each path that can end without an assertion failing.

    Raises:
        Untraceable: with the reason.
    """
    graphs: list[Graph] = []
    with _untouched(module):
        try:
            for concrete_args in _argument_choices(module):
                decisions: list[bool] = []
                while True:
                    tracer = _PathTracer(decisions, is_leaf)
                    with contextlib.suppress(AssertionError):  # the path that an assert forbids
                        graphs.append(tracer.trace(module, concrete_args or None))
                    if len(graphs) > MAX_PATHS:
                        raise Untraceable("too many paths")
                    del decisions[tracer.taken :]
                    while decisions and not decisions[-1]:
                        decisions.pop()
                    if not decisions:
                        break
                    decisions[-1] = False
        except Untraceable:
            raise
        except Exception as e:  # whatever user code does with a proxy
            raise Untraceable(f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}".rstrip(": ")) from None
    if not graphs:
        raise Untraceable("no path")
    return graphs


def calls(graph: Graph, module: nn.Module) -> list[tuple[Node, nn.Module]]:
    """List the module calls of a graph as (node, module)."""
    return [(n, module.get_submodule(n.target)) for n in graph.nodes if n.op == "call_module"]


def stock_leaf(m: nn.Module) -> bool:
    """Say whether a module is one call: those of torch and fastnn, containers apart."""
    return type(m).__module__.startswith(("torch.nn", "torch.ao.nn", "fastnn.")) and not isinstance(m, nn.Sequential)


def _constant_pad(node: Node, module: nn.Module) -> tuple[int, ...] | None:
    """Return (left, right, top, bottom) when a node pads its input with zeros."""
    if node.op == "call_module":
        m = module.get_submodule(node.target)
        if type(m) is nn.Identity:
            return (0, 0, 0, 0)
        return tuple(m.padding) if type(m) is nn.ZeroPad2d else None
    if node.op == "call_function" and node.target is F.pad:
        bound = inspect.signature(lambda input, pad, mode="constant", value=None: None).bind(*node.args, **node.kwargs)
        a = bound.arguments
        if a.get("mode", "constant") == "constant" and not a.get("value"):
            pad = a["pad"]
            if all(isinstance(p, int) for p in pad) and len(pad) in (2, 4):
                return tuple(pad) + (0,) * (4 - len(pad))
    return None


def _is_parameter(value: Any, name: str, module: nn.Module) -> bool:
    if getattr(module, name) is None:
        return value is None
    return isinstance(value, Node) and value.op == "get_attr" and value.target == name


def _pair(value: Any) -> tuple[Any, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)


def plain_linear(module: nn.Linear) -> bool:
    """Say whether a subclass of Linear computes no more than ``F.linear(input, weight, bias)``."""
    node = _only_call(module, F.linear)
    if node is None:
        return False
    args = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
    return (
        args["input"].op == "placeholder"
        and _is_parameter(args["weight"], "weight", module)
        and _is_parameter(args.get("bias"), "bias", module)
    )


def padded_conv2d(module: nn.Conv2d) -> tuple[int, ...] | None:
    """Return the zeros (left, right, top, bottom) that a subclass of Conv2d adds, if it only pads and convolves."""
    node = _only_call(module, torch.conv2d)
    if node is None or module.padding_mode != "zeros":
        return None
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    args = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    args |= dict(zip(names, node.args, strict=False)) | node.kwargs
    if not (_is_parameter(args["weight"], "weight", module) and _is_parameter(args["bias"], "bias", module)):
        return None
    if isinstance(args["padding"], str) or isinstance(module.padding, str):
        return None
    for name in ("stride", "padding", "dilation"):
        if _pair(args[name]) != _pair(getattr(module, name)):
            return None
    if args["groups"] != module.groups:
        return None
    total = (0, 0, 0, 0)
    source = args["input"]
    while source.op != "placeholder":
        pad = _constant_pad(source, module)
        if pad is None or min(pad) < 0:
            return None
        total = tuple(a + b for a, b in zip(total, pad, strict=True))
        source = source.args[0] if source.args else source.kwargs["input"]
    return total


def after_batch_norm(module: nn.BatchNorm2d) -> list[str] | None:
    """Name the children that a subclass of BatchNorm2d applies to what it normalized; None if it does anything else.

    In evaluation mode. Of ``BatchNorm2d`` itself: none of them.
    """
    if type(module) is nn.BatchNorm2d:
        return []
    try:
        graphs = paths(module, lambda m: m is not module)
    except Untraceable:
        return None
    if len(graphs) != 1 or module.training:
        return None
    node = next(n for n in graphs[0].nodes if n.op == "output").args[0]
    known, names = set(), []
    while isinstance(node, Node) and node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
        known.add(node)
        names.insert(0, node.target)
        node = node.args[0]
    if not (isinstance(node, Node) and node.target is F.batch_norm):
        return None
    known.add(node)
    given = inspect.signature(F.batch_norm).bind(*node.args, **node.kwargs)
    given.apply_defaults()
    args = given.arguments
    fits = args["input"].op == "placeholder" and not args["training"] and args["eps"] == module.eps
    fits = fits and all(_is_parameter(args[k], k, module) for k in ("running_mean", "running_var", "weight", "bias"))
    rest = [n for n in graphs[0].nodes if n not in known and n.op in ("call_function", "call_method", "call_module")]
    return names if fits and all(n.target in _CHECKS for n in rest) else None


_CHECKS = (getattr, operator.eq, torch._assert)  # what an assertion about the input leaves in a graph


def _only_call(module: nn.Module, function: Callable) -> Node | None:
    """Return the node that makes the output, if there is one path, alike in training, and it ends in ``function``."""
    found: list[Node] = []
    training = module.training
    try:
        for mode in (not training, training):
            module.training = mode
            graphs = paths(module, stock_leaf)
            if len(graphs) != 1 or sum(n.op == "placeholder" for n in graphs[0].nodes) != 1:
                return None
            node = next(n for n in graphs[0].nodes if n.op == "output").args[0]
            if not (isinstance(node, Node) and node.op == "call_function" and node.target is function):
                return None
            found.append(node)
    except Untraceable:
        return None
    finally:
        module.training = training
    return found[1] if str(found[0].graph) == str(found[1].graph) else None
