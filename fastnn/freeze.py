"""Declares weights constant for inference: packs them, folds batch norms into convolutions, fuses activations.

Parameters, buffers and names stay where they are, so the ``state_dict`` of a frozen model is what it was. What is
derived from them (packed and folded copies) is kept apart, compared with its sources' version counters at each call,
and made anew when they changed. With gradients wanted, it is computed from the parameters by differentiable operations.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator

from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.nn import functional as F
from torch.nn.utils import parametrize

import fastnn.nn
from fastnn import huggingface, trace
from fastnn.nn._frozen import Fold

_NOTE = "_fastnn_note"  # on a module: what freeze did with it, or why not
PRODUCERS = (fastnn.nn.Linear, fastnn.nn.Conv1d, fastnn.nn.Conv2d, huggingface.Conv1D)  # what applies activations
_AFTER = "_fastnn_after"  # on a folded batch norm: the names of its children that it applies, in order
_BEFORE = "_fastnn_before"  # on a folded batch norm or fused activation: the class it had

_ACTIVATIONS: dict[str, tuple[str, Callable[[nn.Module], bool]]] = {
    "torch.nn.modules.activation.ReLU": ("relu", lambda m: True),
    "torch.nn.modules.activation.GELU": ("gelu", lambda m: m.approximate in ("none", "tanh")),
    "torch.nn.modules.activation.SiLU": ("silu", lambda m: True),
    "torch.nn.modules.activation.Sigmoid": ("sigmoid", lambda m: True),
    "torch.nn.modules.activation.Tanh": ("tanh", lambda m: True),
    "torch.nn.modules.activation.LeakyReLU": ("leaky_relu", lambda m: m.negative_slope == 0.01),
    "torch.nn.modules.activation.ELU": ("elu", lambda m: m.alpha == 1.0),
    "torch.nn.modules.activation.Hardswish": ("hardswish", lambda m: True),
    "torch.nn.modules.activation.ReLU6": ("relu6", lambda m: (m.min_val, m.max_val) == (0.0, 6.0)),
    "torch.nn.modules.activation.Softplus": ("softplus", lambda m: (m.beta, m.threshold) == (1, 20)),
    "torch.nn.modules.activation.Mish": ("mish", lambda m: True),
    "transformers.activations.GELUActivation": ("gelu", lambda m: getattr(m, "act", None) is F.gelu),
    "transformers.activations.NewGELUActivation": ("gelu_tanh", lambda m: True),
    "transformers.activations.GELUTanh": ("gelu_tanh", lambda m: True),
    "transformers.activations.SiLUActivation": ("silu", lambda m: True),
    "transformers.activations.MishActivation": ("mish", lambda m: True),
}


def activation_of(module: nn.Module) -> str | None:
    """Return the name under which fastnn's kernels fuse an activation module, or None."""
    name, fits = _ACTIVATIONS.get(f"{type(module).__module__}.{type(module).__name__}", (None, None))
    if name is None or not fits(module):
        return None
    return "gelu_tanh" if getattr(module, "approximate", None) == "tanh" else name


def _refuse_training(module: nn.Module, what: str) -> None:
    if module.training:
        raise RuntimeError(
            f"fastnn.freeze: a frozen model must be in evaluation mode; got a {what} in training mode. "
            "Call fastnn.restore(model) to train it again, or model.eval()."
        )


class FoldedBatchNorm2d(nn.BatchNorm2d):
    """A batch norm whose work the convolution before it does; applies what a subclass applies after it, mostly nothing."""

    def forward(self, input: Tensor) -> Tensor:
        _refuse_training(self, "folded BatchNorm2d")
        for name in self.__dict__[_AFTER]:
            input = getattr(self, name)(input)
        return input


class FusedActivation(nn.Module):
    """An activation that the kernel before it applies; returns its input."""

    def forward(self, input: Tensor) -> Tensor:
        _refuse_training(self, f"fused {self.__dict__[_BEFORE].__name__}")
        return input

    def extra_repr(self) -> str:
        return self.__dict__[_BEFORE].__name__


def _has_hooks(module: nn.Module) -> bool:
    return any(module.__dict__.get(name) for name in trace.HOOKS)


def _is_kernel(module: nn.Module) -> bool:
    return isinstance(module, PRODUCERS)


def _is_producer(module: nn.Module) -> bool:
    """Say whether a kernel of this module could do what follows it."""
    return (
        _is_kernel(module)
        and module.activation is None
        and not _has_hooks(module)
        and not parametrize.is_parametrized(module)
    )


def _cannot_fold(norm: nn.BatchNorm2d) -> str | None:
    if norm.training:
        return "in training mode"
    if norm.running_mean is None:
        return "it keeps no running statistics"
    if _has_hooks(norm) or parametrize.is_parametrized(norm):
        return "it has hooks or parametrizations"
    return None


class _Region:
    """A module whose every path is known: which modules it calls, and what follows what."""

    def __init__(self, module: nn.Module, graphs: list[Graph], hidden: set[int]):
        self.module = module
        self.inside = {id(m) for m in module.modules()}
        self.hidden = hidden  # modules that something opaque in here may call as well
        self.followers: dict[int, set[int | None]] = {}
        self.feeders: dict[int, set[int | None]] = {}
        for graph in graphs:
            called = dict(trace.calls(graph, module))
            for node, m in called.items():
                self.followers.setdefault(id(m), set()).add(self._follower(node, called))
                self.feeders.setdefault(id(m), set()).add(self._feeder(node, called))

    @staticmethod
    def _sole_input(node: Node) -> Node | None:
        values = [*node.args, *node.kwargs.values()]
        return values[0] if len(values) == 1 and isinstance(values[0], Node) else None

    def _feeder(self, node: Node, called: dict[Node, nn.Module]) -> int | None:
        source = self._sole_input(node)
        return id(called[source]) if source in called else None

    def _follower(self, node: Node, called: dict[Node, nn.Module]) -> int | None:
        users = list(node.users)
        if len(users) != 1 or users[0] not in called or self._sole_input(users[0]) is not node:
            return None
        return id(called[users[0]])

    def owns(self, owners: dict[int, set[int]], key: int) -> bool:
        """Say whether nothing but this region can call a module."""
        return key not in self.hidden and owners.get(key, set()) <= self.inside

    def functional_follower(self, graphs: list[Graph], module: nn.Module) -> str | None:
        for graph in graphs:
            for node, m in trace.calls(graph, self.module):
                for user in node.users if m is module else ():
                    if user.op == "call_function" and len(node.users) == 1:
                        return getattr(user.target, "__name__", None)
        return None


def _regions(root: nn.Module) -> Iterator[tuple[_Region, list[Graph]]]:
    """Find the largest modules that can be traced; a module beneath that cannot be stays one call in its parent."""
    traced: dict[int, list[Graph]] = {}
    opaque: dict[int, str] = {}
    wanted: dict[int, bool] = {}

    def is_leaf(m: nn.Module) -> bool:
        return _is_kernel(m) or trace.stock_leaf(m) or id(m) in opaque or not wanted[id(m)]

    def visit(m: nn.Module) -> bool:
        if id(m) not in wanted:
            beneath = [visit(c) for c in m.children()]
            wanted[id(m)] = any(beneath) or _is_producer(m)
            if any(beneath) and not trace.stock_leaf(m):
                if not _is_callable(m):
                    pass
                elif any(c.__name__ == "PreTrainedModel" for c in type(m).__mro__):
                    opaque[id(m)] = "a Hugging Face model is not traced as a whole"
                else:
                    try:
                        traced[id(m)] = trace.paths(m, is_leaf)
                    except trace.Untraceable as e:
                        opaque[id(m)] = str(e)
                        if any(activation_of(c) or type(c) is nn.BatchNorm2d for c in m.children()):
                            m.__dict__[_NOTE] = f"nothing fused, its forward cannot be traced: {str(e)[:100]}"
        return wanted[id(m)]

    visit(root)
    seen: set[int] = set()

    def collect(m: nn.Module) -> Iterator[tuple[_Region, list[Graph]]]:
        if id(m) in seen:
            return
        seen.add(id(m))
        if id(m) not in traced:
            for c in m.children():
                yield from collect(c)
            return
        closed = [d for d in m.modules() if d is not m and _is_callable(d) and (id(d) in opaque or trace.stock_leaf(d))]
        hidden = {id(x) for d in closed for x in d.modules() if x is not d}
        yield _Region(m, traced[id(m)], hidden), traced[id(m)]
        for d in closed:
            if id(d) in opaque:
                yield from collect(d)

    yield from collect(root)


def _is_callable(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _fuse(root: nn.Module) -> None:
    """Fold batch norms and fuse activations wherever every path and every owner agrees."""
    names = {id(m): name or type(m).__name__ for name, m in root.named_modules()}
    owners: dict[int, set[int]] = {}
    for m in root.modules():
        for c in m._modules.values():
            if c is not None:
                owners.setdefault(id(c), set()).add(id(m))
    observers = [{id(x) for x in m.modules()} for m in root.modules() if _has_hooks(m)]
    modules = {id(m): m for m in root.modules()}

    def unseen(first: int, second: int) -> bool:
        return all((first in o) == (second in o) for o in observers)

    for region, graphs in _regions(root):
        ours = functools.partial(region.owns, owners)

        tails = {k: modules[k] for k in region.followers if k in modules and _is_producer(modules[k]) and ours(k)}
        for key, conv in list(tails.items()):
            follower = _only(region.followers[key])
            norm = modules.get(follower)
            if not isinstance(conv, fastnn.nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d):
                continue
            if isinstance(norm, FoldedBatchNorm2d):
                continue
            why = _cannot_fold(norm)
            after = trace.after_batch_norm(norm) if why is None else None
            if why is None and after is None:
                why = f"{type(norm).__name__} may do more than normalize"
            if why is None and (region.feeders[follower] != {key} or not ours(follower) or not unseen(key, follower)):
                why = "it also follows something else, or is called from elsewhere"
            if why is not None:
                norm.__dict__[_NOTE] = f"not folded: {why}"
                continue
            _fold(conv, norm, names, after)
            left = [m for m in map(norm.get_submodule, after) if type(m) is not nn.Identity]
            if not left:
                tails[follower] = conv
                continue
            act = left[0]
            sole = len(left) == 1 and owners[id(act)] == {follower} and unseen(key, id(act)) and not _has_hooks(act)
            if sole and activation_of(act):
                _apply([conv], act, names)
        for key, module in modules.items():
            name = activation_of(module)
            if name is None or key not in region.feeders:
                continue
            feeders = region.feeders[key]
            producers = {f: tails.get(f) for f in feeders}
            fits = all(
                p is not None and region.followers[f] == {key} and unseen(f, key) and p.activation is None
                for f, p in producers.items()
            )
            if not fits or _has_hooks(module) or not ours(key):
                if any(p is not None for p in producers.values()):
                    module.__dict__[_NOTE] = "not fused: it also follows something else, or is called from elsewhere"
                continue
            _apply(list(producers.values()), module, names)
        for key, producer in tails.items():
            if producer.activation is None and modules[key] is producer:
                after = region.functional_follower(graphs, producer)
                if after in _FUNCTIONS:
                    _add_note(producer, f"{after} after it is a function, not a module: not fused")


_FUNCTIONS = {"relu", "gelu", "silu", "sigmoid", "tanh", "leaky_relu", "elu", "hardswish", "relu6", "softplus", "mish"}


def _only(values: set[int | None]) -> int | None:
    return next(iter(values)) if len(values) == 1 else None


def _add_note(module: nn.Module, text: str) -> None:
    old = module.__dict__.get(_NOTE)
    module.__dict__[_NOTE] = f"{old} + {text}" if old else text


def _apply(producers: list[nn.Module], activation: nn.Module, names: dict[int, str]) -> None:
    """Let the kernels of ``producers`` apply the activation."""
    name = activation_of(activation)
    for producer in producers:
        producer.activation = name
        producer.__dict__["_fastnn_fused"] = name
        _add_note(producer, name)
    activation.__dict__[_BEFORE] = type(activation)
    activation.__dict__[_NOTE] = f"fused into {', '.join(names[id(p)] for p in producers)}"
    activation.__class__ = FusedActivation


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d, names: dict[int, str], after: list[str]) -> None:
    conv.__dict__["_fold"] = Fold(norm)
    _add_note(conv, "batch norm")
    norm.__dict__[_BEFORE] = type(norm)
    norm.__dict__[_AFTER] = after
    norm.__dict__[_NOTE] = f"folded into {names[id(conv)]}"
    norm.__class__ = FoldedBatchNorm2d


def freeze(module: nn.Module) -> nn.Module:
    """Declare the weights of fastnn's modules constant for inference, in place.

    Weights of linear, convolution, attention and recurrent modules are packed once. A ``BatchNorm2d`` that only follows
    one convolution is folded into it; an activation that only follows convolutions and linear layers is computed by
    their kernels. Which module follows which is read off ``forward`` by symbolic tracing; where that fails nothing is
    fused, and :func:`fastnn.explain` says so. Parameters and the ``state_dict`` stay as they are: an edit of a weight
    is seen at the next call.

    Args:
        module: a module or a whole model, in evaluation mode.

    Returns:
        The same module. Packed weights serve under ``torch.inference_mode()`` and ``torch.no_grad()``.

    Raises:
        TypeError: if ``module`` is no module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"fastnn.freeze: module must be a torch.nn.Module; got {type(module).__name__}.")
    _fuse(module)
    for m in module.modules():
        if hasattr(m, "_freeze"):
            m._freeze()
    training = sum(1 for m in module.modules() if m.__dict__.get(_NOTE) == "not folded: in training mode")
    if training:
        warnings.warn(
            f"fastnn.freeze: {training} BatchNorm2d in training mode were not folded; call model.eval() before.",
            stacklevel=2,
        )
    return module


def unfreeze(module: nn.Module) -> None:
    """Undo :func:`freeze`, in place."""
    for m in module.modules():
        m.__dict__.pop(_NOTE, None)
        m.__dict__.pop("_fold", None)
        m.__dict__.pop(_AFTER, None)
        if m.__dict__.pop("_fastnn_fused", None):
            m.activation = None
        before = m.__dict__.pop(_BEFORE, None)
        if before is not None:
            m.__class__ = before
        if hasattr(m, "_thaw"):
            m._thaw()


def notes(module: nn.Module) -> dict[int, str]:
    """Return what freeze noted, by ``id`` of the module."""
    return {id(m): m.__dict__[_NOTE] for m in module.modules() if _NOTE in m.__dict__}
