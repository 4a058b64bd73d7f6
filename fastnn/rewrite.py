"""Rewrites a graph that Dynamo captured: what fastnn serves becomes fastnn's ops, and what stands around them is fused in.

Three passes: attention written by hand (``rewrite_attention.py``); each call of a function that ``served.py`` knows; bias,
batch norm and activation into the linear or conv2d before them. A node whose value is used elsewhere stays.
"""

from __future__ import annotations

import copy
import itertools
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from fastnn import _fallback
from fastnn.served import SERVED

# Products and convolutions that stay with torch and are worth telling about.
_TOLD = {"bmm", "baddbmm", "einsum", "conv1d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
_IN_PLACE = {
    getattr(operator, "i" + name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
}
_STATES = {"_enter_autocast", "_exit_autocast", "_set_grad_enabled", "set_grad_enabled", "_enter_inference_mode",
           "_exit_inference_mode", "batch_norm"}  # fmt: skip


@dataclass
class Served:
    """One call of a kernel: what stood there, the ops of fastnn that took its place, what was fused into it."""

    op: str
    kernel: str
    fused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return " + ".join([self.op, *self.fused]) + f" by fastnn.{self.kernel}"


@dataclass
class Report:
    """What became of one graph."""

    served: list[Served] = field(default_factory=list)
    left: Counter[tuple[str, str]] = field(default_factory=Counter)  # (op, reason) -> calls left to torch
    others: int = 0  # operations of kinds that fastnn has no kernel for
    error: str | None = None  # why the stock graph was compiled


def rewrite(gm: fx.GraphModule) -> tuple[fx.GraphModule, Report]:
    """Return a copy of a graph with fastnn's ops in it, and what was done.

    Args:
        gm: a graph of torch functions as Dynamo hands to a backend, with ``example_value`` in each node's ``meta``. It is
            left as it is.

    Returns:
        The copy, which shares ``gm``'s parameters, and the report.

    Raises:
        RuntimeError: under ``fastnn.set_fallback("error")``, for a call that is one of fastnn's and has no kernel.
    """
    from fastnn.rewrite_attention import fuse_attention  # which are built on this module
    from fastnn.rewrite_epilogue import fuse_epilogues

    graph = copy.deepcopy(gm.graph)
    new = fx.GraphModule(gm, graph)
    new.meta = dict(gm.meta)
    rewriter = Rewriter(new)
    with rewriter.tracing():
        rewriter.name_results_of_in_place_calls()
        fuse_attention(rewriter)
        rewriter.serve()
        fuse_epilogues(rewriter)
    rewriter.report.others = sum(rewriter.is_other(n) for n in graph.nodes)
    graph.lint()
    new.recompile()
    return new, rewriter.report


def called(node: fx.Node) -> str:
    """The name of what a node calls, the same for a function, a method and the form that works in place."""
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function":
        name = getattr(node.target, "__name__", "")
    else:
        return ""
    return name if name.startswith("_") else name.rstrip("_")


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def value(node: Any) -> Any:
    """What Dynamo computed for a node with fake tensors; None where it kept nothing."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def changes_its_input(node: fx.Node) -> bool:
    """Whether a call writes to a tensor it was given, or changes a state that others run under."""
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    if node.op not in ("call_method", "call_function"):
        return node.op == "call_module"
    if name in _STATES or name.startswith("__i") or name in ("setitem", "delitem", "__setitem__"):
        return True
    if name.endswith("_") and not name.endswith("__"):
        return True
    if node.op == "call_method":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    if isinstance(node.target, torch._ops.HigherOrderOperator) or node.target in _IN_PLACE:
        return True
    if getattr(node.target, "__module__", "") == "torch.nn.functional" and any(a is True for a in node.args[1:]):
        return True  # inplace, by position
    return bool(node.kwargs.get("inplace")) or "out" in node.kwargs


def works_in_place(node: fx.Node) -> bool:
    """Whether a call writes to its first argument and returns it."""
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).startswith("_")
    if node.op != "call_function" or isinstance(node.target, (torch._ops.OpOverload, torch._ops.HigherOrderOperator)):
        return False
    name = getattr(node.target, "__name__", "")
    return node.target in _IN_PLACE or (changes_its_input(node) and name not in _STATES and name != "setitem")


class _Recorder(TorchFunctionMode):
    """Records what a function calls, while it runs on fake tensors, as nodes of a graph."""

    def __init__(self, graph: fx.Graph, known: Iterable[tuple[Any, fx.Node]]):
        super().__init__()
        self.graph = graph
        self.known = {id(fake): node for fake, node in known}
        self.fakes = [fake for fake, _ in known]  # kept alive, or another would get the id
        self.added: list[fx.Node] = []

    def node(self, x: Any) -> Any:
        """The node that stands for a value; sizes are read off a tensor that has them."""
        if isinstance(x, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            if id(x) in self.known:
                return self.known[id(x)]
            for fake in self.fakes:
                for dim, size in enumerate(fake.shape if isinstance(fake, Tensor) else ()):
                    if isinstance(size, torch.SymInt) and isinstance(x, torch.SymInt) and size.node.expr == x.node.expr:
                        return self.add("call_method", "size", (self.known[id(fake)], dim), {}, size)
            raise NotImplementedError(f"the size {x} is no tensor's")
        return self.known[id(x)] if isinstance(x, Tensor) else x

    def add(self, op: str, target: Any, args: tuple, kwargs: dict, result: Any) -> fx.Node:
        node = self.graph.create_node(op, target, args, kwargs)
        node.meta["example_value"] = result
        self.added.append(node)
        self.known[id(result)] = node
        self.fakes.append(result)
        return node

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        leaves = [t for t in _pytree.tree_leaves(result) if isinstance(t, Tensor)]
        if not leaves or any(result is a for a in args):
            return result
        op, name = "call_function", getattr(func, "__name__", "")
        given, named = map_aggregate(tuple(args), self.node), map_aggregate(dict(kwargs), self.node)
        if name == "__get__":
            func, given = getattr, (*given, func.__self__.__name__)
        elif isinstance(func, torch._ops.OpOverloadPacket):
            func = func.default
        elif getattr(Tensor, name, None) is func:
            op, func = "call_method", name
        node = self.add(op, func, given, named, result)
        if not isinstance(result, Tensor):
            for i, part in enumerate(result):
                if isinstance(part, Tensor):
                    self.add("call_function", operator.getitem, (node, i), {}, part)
        return result


class Rewriter:
    """A graph being rewritten, and the report of it."""

    def __init__(self, gm: fx.GraphModule):
        self.gm, self.graph, self.report = gm, gm.graph, Report()
        self.entries: dict[fx.Node, Served] = {}  # by the node of fastnn's op
        values = [value(n) for n in gm.graph.nodes]
        self.fake_mode = next((v.fake_mode for v in values if hasattr(v, "fake_mode")), None)

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Run what follows as torch.compile traces: fastnn's functions call ops, and nothing is computed."""
        before = torch.compiler._is_compiling_flag
        torch.compiler._is_compiling_flag = True  # torch < 2.13 sets it for torch.export alone
        try:
            with torch.no_grad():
                yield
        finally:
            torch.compiler._is_compiling_flag = before

    def inline(self, function: Callable, args: Any, kwargs: dict, before: fx.Node) -> tuple[Any, list[fx.Node]]:
        """Put what ``function`` calls before a node. Returns its result in nodes, and the nodes that were added.

        The result is NotImplemented, and the graph as before, where the function says so or leaves its work to torch;
        ``_fallback.last.reason`` says why.
        """
        known: list[tuple[Any, fx.Node]] = []

        def fake(x):
            if not isinstance(x, fx.Node):
                return x
            v = value(x)
            if v is None:
                raise NotImplementedError(f"nothing is known about {x.name}")
            known.append((v, x))
            return v

        given, named = map_aggregate(tuple(args), fake), map_aggregate(dict(kwargs), fake)
        _fallback.last.reason = None
        recorder = _Recorder(self.graph, known)
        try:
            assert self.fake_mode is not None
            with self.graph.inserting_before(before), self.fake_mode, recorder:
                result = function(*given, **named)
            nodes = map_aggregate(result, recorder.node)
        except NotImplementedError as e:
            nodes, _fallback.last.reason = NotImplemented, str(e)
        except BaseException:
            self.erase(recorder.added)
            raise
        if nodes is NotImplemented or _fallback.last.reason is not None:
            self.erase(recorder.added)
            return NotImplemented, []
        for node in recorder.added:
            node.meta |= {
                k: v for k, v in before.meta.items() if k in ("stack_trace", "nn_module_stack", "source_fn_stack")
            }
        return nodes, recorder.added

    def erase(self, nodes: Iterable[fx.Node]) -> None:
        """Take nodes out, the last first, that nobody uses."""
        for node in sorted(set(nodes), reverse=True):
            if not node.users:
                self.graph.erase_node(node)

    def replace(self, node: fx.Node, new: Any) -> bool:
        """Let ``new``, a node or a tuple of them, stand for a node everywhere; False where the forms differ."""
        if isinstance(new, fx.Node):
            old = value(node)
            if not alike(old, value(new)):
                return False
            if old is not None:
                new.meta["example_value"] = old
            node.replace_all_uses_with(new)
            return True
        users = list(node.users)
        if not all(called(u) == "getitem" and u.args[0] is node and isinstance(u.args[1], int) for u in users):
            return False
        if not all(alike(value(u), value(new[u.args[1]])) for u in users):
            return False
        for user in users:
            user.replace_all_uses_with(new[user.args[1]])
            self.graph.erase_node(user)
        return True

    def cast(self, node: fx.Node, dtype: torch.dtype, before: fx.Node) -> fx.Node:
        with self.graph.inserting_before(before):
            new = self.graph.call_method("to", (node, dtype))
        new.meta["example_value"] = value(node).to(dtype)
        return new

    def quiet(self, first: fx.Node, last: fx.Node, own: Iterable[fx.Node]) -> bool:
        """Whether nothing but ``own`` nodes writes to a tensor between two nodes: then the first may be done at the last."""
        own = set(own)
        between = itertools.takewhile(lambda n: n is not last, following(first))
        return not any(changes_its_input(n) and n not in own for n in between)

    def enter(self, added: list[fx.Node], op: str) -> None:
        """Write down that fastnn serves a call now."""
        ops = [n for n in added if getattr(n.target, "namespace", "") == "fastnn"]
        names = Counter(n.target._opname for n in ops)
        entry = Served(op, ", fastnn.".join(f"{n} × {name}" if n > 1 else name for name, n in names.items()))
        self.report.served.append(entry)
        for node in ops:
            self.entries[node] = entry

    def is_other(self, node: fx.Node) -> bool:
        """Whether a node computes something that is none of fastnn's."""
        if node.op not in ("call_function", "call_method") or getattr(node.target, "namespace", "") == "fastnn":
            return False
        return called(node) not in ("getitem", "size", "getattr", *_TOLD)

    # ---- the passes -------------------------------------------------------------------------------------------------

    def name_results_of_in_place_calls(self) -> None:
        """After ``y.relu_()``, let who reads y read the result of that call: it is the same tensor, and the chain shows."""
        for node in self.graph.nodes:
            changed = node.args[0] if node.args else None
            if isinstance(changed, fx.Node) and isinstance(value(changed), Tensor) and works_in_place(node):
                changed.replace_all_uses_with(node, delete_user_cb=lambda user, node=node: node < user)

    def serve(self) -> None:
        """Replace each call of a function that fastnn serves."""
        for node in list(self.graph.nodes):
            if node._erased or node.op not in ("call_function", "call_method"):
                continue
            name = called(node)
            target = node.target if node.op == "call_function" else getattr(Tensor, str(node.target), None)
            function = SERVED.get(target) if getattr(target, "__hash__", None) else None
            if function is not None:
                args, kwargs, casts = self._at_one_dtype(node)
                new, added = self.inline(function, args, kwargs, node)
                if new is NotImplemented or not self.replace(node, new):
                    self.report.left[name, _fallback.last.reason or "its result would be of another form"] += 1
                    self.erase(added + casts)
                    continue
                self.enter(added, name)
                self.graph.erase_node(node)
            elif name in _TOLD:
                self.report.left[name, "no kernel for this form"] += 1

    def _at_one_dtype(self, node: fx.Node) -> tuple[Any, Any, list[fx.Node]]:
        """The arguments of a call, under autocast cast to the dtype that torch's own would compute in; and the casts."""
        casts: list[fx.Node] = []
        mask = argument(node, 3, "attn_mask") if called(node) == "scaled_dot_product_attention" else None
        results = [value(node), *(value(u) for u in node.users if called(u) == "getitem")]
        dtype = next((v.dtype for v in results if isinstance(v, Tensor)), None)
        if dtype not in _fallback._DTYPES:
            return node.args, node.kwargs, casts

        def cast(x):
            v = value(x)
            if not isinstance(v, Tensor) or v.dtype not in _fallback._DTYPES or v.dtype == dtype or x is mask:
                return x
            casts.append(self.cast(x, dtype, node))
            return casts[-1]

        return map_aggregate(node.args, cast), map_aggregate(node.kwargs, cast), casts


def only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def same(tensor: Tensor, shape: Iterable[Any]) -> bool:
    """Whether a tensor is known to have a shape; a symbolic size is only itself."""
    shape = list(shape)
    return len(shape) == tensor.dim() and all(_known(a) == _known(b) for a, b in zip(tensor.shape, shape, strict=True))


def _known(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def alike(old: Any, new: Any) -> bool:
    """Whether one value may stand for another, as far as is known."""
    if not isinstance(old, Tensor):
        return True
    if not isinstance(new, Tensor) or old.dtype != new.dtype or old.dim() != new.dim() or old.device != new.device:
        return False
    return all(a == b for a, b in zip(old.shape, new.shape, strict=True) if isinstance(a, int) and isinstance(b, int))


def following(node: fx.Node) -> Iterator[fx.Node]:
    while (node := node.next).op != "root":
        yield node
