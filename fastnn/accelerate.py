"""Swaps the modules of a model for fastnn's, in place on the instance, and back.

A module is swapped by changing its class: the object stays the one that hooks, optimizers and other modules hold, and
keeps its parameters, buffers, hooks, names and flags. Torch's own parametrizations do the same.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

import fastnn.nn
from fastnn import _fallback, huggingface, trace
from fastnn.freeze import _BEFORE
from fastnn.freeze import freeze as _freeze
from fastnn.freeze import notes as _freeze_notes
from fastnn.freeze import unfreeze as _unfreeze

if TYPE_CHECKING:
    from fastnn.compile import CompiledExplanation

_FAST: dict[type, type] = {
    getattr(nn, name): getattr(fastnn.nn, name) for name in fastnn.nn.__all__ if hasattr(nn, name)
}
_FAST[NonDynamicallyQuantizableLinear] = fastnn.nn.attention.NonDynamicallyQuantizableLinear
_OWN = tuple(set(_FAST.values()))
# The op that a family's kernels belong to, where it has some for CUDA too.
_OPS = {nn.Linear: "linear", NonDynamicallyQuantizableLinear: "linear", nn.MultiheadAttention: "attention"}
_STOCK = "_fastnn_stock"  # on a swapped module: the class it had, and the attributes it got
_REASON = "_fastnn_reason"  # on a module left alone: why, where that cannot be read off it later
_ATTENTION = "_fastnn_attention"  # on a Hugging Face model: the attention it had


class PaddedConv2d(fastnn.nn.Conv2d):
    """A convolution that adds zeros of its own to the padding: what subclasses for TensorFlow's ``SAME`` do.

    ``output = conv2d(pad(input, (left, right, top, bottom)), weight, bias)``, where the kernel does the padding.
    """

    _zeros: tuple[int, int, int, int]

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        (rows, columns), (left, right, top, bottom) = self.padding, self._zeros
        return self._convolve(input, weight, bias, (rows + top, rows + bottom, columns + left, columns + right))


@functools.cache
def _fast_subclass(stock: type, fast: type) -> type:
    """Make the class that a user's subclass of a torch module becomes: its own but for ``forward``."""

    def reduce(self, protocol):
        return (_blank, (stock, fast), *super(cls, self).__reduce_ex__(protocol)[2:])

    cls = type(stock.__name__, (fast, stock), {"__module__": stock.__module__, "__reduce_ex__": reduce})
    return cls


def _blank(stock: type, fast: type) -> nn.Module:
    cls = _fast_subclass(stock, fast)
    return cls.__new__(cls)


def _family(cls: type) -> type | None:
    """Return the torch class that fastnn has a module for and ``cls`` descends from."""
    return next((c for c in cls.__mro__ if c in _FAST), None)


def _plan(module: nn.Module) -> tuple[type, dict[str, Any]] | str | None:
    """Say what a module becomes (class, attributes), or why nothing, or None where fastnn has no such kind."""
    cls = parametrize.type_before_parametrizations(module)
    family = _family(cls)
    if family is None:
        return None
    if isinstance(module, _OWN):
        return "fastnn's own"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "lazy: run the model once, then accelerate it"
    reason = _fallback.why_not(*module.parameters(recurse=False), op=_OPS.get(family, ""))
    if reason:
        return reason
    if cls in _FAST:
        return _FAST[cls], _attributes(_FAST[cls])
    if parametrize.is_parametrized(module):
        return f"{cls.__name__} is a parametrized subclass of {family.__name__}"
    if issubclass(cls, nn.Linear) and trace.plain_linear(module):
        return _fast_subclass(cls, fastnn.nn.Linear), _attributes(fastnn.nn.Linear)
    if issubclass(cls, nn.Conv2d):
        zeros = trace.padded_conv2d(module)
        if zeros is not None:
            fast = PaddedConv2d if any(zeros) else fastnn.nn.Conv2d
            return _fast_subclass(cls, fast), _attributes(fast) | ({"_zeros": zeros} if any(zeros) else {})
    return f"{cls.__name__} overrides torch.nn.{family.__name__}: its forward may do something else"


def _attributes(fast: type) -> dict[str, Any]:
    """Return what a module of fastnn has and torch's has not."""
    return {"activation": None} if issubclass(fast, (fastnn.nn.Linear, fastnn.nn.Conv2d)) else {}


def _set_class(module: nn.Module, cls: type) -> None:
    """Give a module another class; one with parametrizations keeps its properties."""
    if parametrize.is_parametrized(module):
        own = {k: v for k, v in type(module).__dict__.items() if k not in ("__dict__", "__weakref__", "__doc__")}
        cls = type(f"Parametrized{cls.__name__}", (cls,), own)
    module.__class__ = cls


def _shared_copy(model: nn.Module) -> nn.Module:
    """Copy the modules of a model; the copy holds the very same parameters and buffers."""
    memo: dict[int, Any] = {}
    for m in model.modules():
        values = [*m.__dict__.values(), *m._parameters.values(), *m._buffers.values()]
        memo |= {id(v): v for v in values if isinstance(v, Tensor)}
    try:
        return copy.deepcopy(model, memo)
    except Exception as e:
        raise RuntimeError(
            f"fastnn.accelerate: model must be copyable; got {type(e).__name__}: {e}. "
            "Use inplace=True to swap its modules where they are."
        ) from e


def _check_module(function: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastnn.{function}: model must be a torch.nn.Module; got {type(model).__name__}.")


def accelerate(
    model: nn.Module,
    *,
    inplace: bool = False,
    freeze: bool = False,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> nn.Module:
    """Return the model with every module that fastnn can serve swapped for fastnn's.

    A swapped module keeps its parameters, buffers, hooks, flags and its names in the ``state_dict``. Hugging Face
    models also get fastnn's attention through ``transformers``' attention interface. ``explain`` tells what happened,
    ``restore`` undoes it.

    Args:
        model: any ``torch.nn.Module``.
        inplace: swap in ``model`` itself. Otherwise ``model`` stays as it is, and the result is a copy of its modules
            that holds the very same parameters and buffers: no memory is doubled, an edit of a weight is seen by both.
        freeze: declare the weights constant for inference, see :func:`fastnn.freeze`.
        filter_fn: ``filter_fn(module, name)``; False leaves that module alone.

    Returns:
        The model, swapped.

    Raises:
        TypeError: if ``model`` is no module.
        RuntimeError: if ``inplace`` is False and the model cannot be copied.
    """
    _check_module("accelerate", model)
    if not inplace:
        model = _shared_copy(model)
    plans = []
    for name, m in model.named_modules():
        m.__dict__.pop(_REASON, None)
        if filter_fn is not None and _family(type(m)) and not filter_fn(m, name):
            m.__dict__[_REASON] = "filter_fn said no"
            continue
        plan = _plan(m)
        if isinstance(plan, tuple):
            plans.append((m, *plan))
    for m, cls, attributes in plans:
        stock = parametrize.type_before_parametrizations(m)
        _set_class(m, cls)
        m.__dict__.update(attributes)
        m.__dict__[_STOCK] = (stock, tuple(attributes))
    former = huggingface.switch(model)
    if former is not None:
        model.__dict__[_ATTENTION] = former
    if freeze:
        _freeze(model)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Give the stock modules back, where they are: undo ``accelerate`` and ``freeze``.

    Args:
        model: what ``accelerate`` or ``freeze`` returned.

    Returns:
        The same model. Modules that were built as fastnn's stay fastnn's.

    Raises:
        TypeError: if ``model`` is no module.
    """
    _check_module("restore", model)
    _unfreeze(model)
    for m in model.modules():
        m.__dict__.pop(_REASON, None)
        if _ATTENTION in m.__dict__:
            huggingface.restore(m, m.__dict__.pop(_ATTENTION))
        if _STOCK in m.__dict__:
            stock, added = m.__dict__.pop(_STOCK)
            for name in added:
                m.__dict__.pop(name, None)
            _set_class(m, stock)
    return model


@dataclass(frozen=True)
class Row:
    """One module of :func:`explain`: where it is, what it was, whether fastnn serves it, and why or what was fused."""

    name: str
    kind: str
    served: bool
    note: str


class Explanation:
    """What fastnn serves in a model, by module; prints as a table.

    Iterating yields :class:`Row`. ``calls_by_torch`` counts, for the whole process, the calls that no kernel served:
    ``{(op, reason): count}``.
    """

    def __init__(self, rows: list[Row], attention: list[str]):
        self.rows = rows
        self.attention = attention
        self.calls_by_torch = Counter(_fallback.calls)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def summary(self) -> str:
        """Return what was swapped and fused, in a few lines."""
        kinds = Counter(r.kind for r in self.rows)
        served = Counter(r.kind for r in self.rows if r.served)
        fused = Counter(r.note.split(" ")[0] for r in self.rows if r.note.startswith(("folded", "fused")))
        lines = [f"{served[k]} of {n} {k} served by fastnn" for k, n in kinds.items() if served[k]]
        lines += [f"{n} {k} left to torch: {self._first_reason(k)}" for k, n in kinds.items() if not served[k]]
        if fused:
            lines.append(", ".join(f"{n} modules {what} into the kernel before them" for what, n in fused.items()))
        return "\n".join(lines + self.attention)

    def _first_reason(self, kind: str) -> str:
        return next(r.note for r in self.rows if r.kind == kind)

    def __str__(self) -> str:
        cells = [("module", "kind", "served by", "note")]
        cells += [(r.name or "(model)", r.kind, "fastnn" if r.served else "torch", r.note) for r in self.rows]
        widths = [max(len(c[i]) for c in cells) for i in range(3)]
        lines = ["  ".join([*(c[i].ljust(widths[i]) for i in range(3)), c[3]]).rstrip() for c in cells]
        lines.insert(1, "  ".join("-" * w for w in [*widths, 4]))
        lines += self.attention
        lines += [f"{n} calls of {op} went to torch: {why}" for (op, why), n in sorted(self.calls_by_torch.items())]
        return "\n".join(lines)

    __repr__ = __str__


def explain(model: nn.Module | None = None) -> Explanation | CompiledExplanation:
    """Tell what fastnn serves in a model, what not, and why.

    Args:
        model: any module, accelerated or not; or one that ``torch.compile`` made or compiled with ``backend="fastnn"``, after
            its first call. None: every graph that the backend compiled in this process, those of functions too.

    Returns:
        A table to print, or to iterate over by :class:`Row`: every module that holds parameters or was fused. Of what was
        compiled a list, or to iterate over by :class:`fastnn.rewrite.Report`: every graph.

    Raises:
        TypeError: if ``model`` is no module.
    """
    if model is None or hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        from fastnn.compile import compiled_graphs  # not at the top: it imports Dynamo

        return compiled_graphs(model)
    _check_module("explain", model)
    notes = _freeze_notes(model)
    names: dict[int, list[str]] = {}
    for name, m in model.named_modules(remove_duplicate=False):
        names.setdefault(id(m), []).append(name)
    rows = []
    for name, m in model.named_modules():
        note = notes.get(id(m), "")
        cls = parametrize.type_before_parametrizations(m)
        if len(names[id(m)]) > 1:
            note = "; ".join([note, "also " + ", ".join(names[id(m)][1:])]).lstrip("; ")
        if isinstance(m, _OWN):
            rows.append(Row(name, m.__dict__.get(_STOCK, (cls,))[0].__name__, True, note))
        elif note.startswith(("folded", "fused")):
            rows.append(Row(name, m.__dict__[_BEFORE].__name__, True, note))
        elif note or _family(cls) or m._parameters:
            plan = m.__dict__.get(_REASON) or _plan(m)
            why = plan if isinstance(plan, str) else "not accelerated" if plan else ""
            if not why and m._parameters:
                why = f"fastnn has no {cls.__name__}"
            rows.append(Row(name, cls.__name__, False, "; ".join(s for s in (why, note) if s)))
    return Explanation(rows, list(_attention(model)))


def _attention(model: nn.Module) -> Iterator[str]:
    """Tell, for each Hugging Face model in ``model``, who computes its attention."""
    for name, m in model.named_modules():
        if any(c.__name__ == "PreTrainedModel" for c in type(m).__mro__):
            if getattr(m.config, "_attn_implementation", None) == huggingface.NAME:
                by = "fastnn"
            else:
                by = f"torch: {huggingface.why_not(m) or 'not accelerated'}"
            yield f"attention of {name or type(m).__name__} served by {by}"
