"""Weights that were declared constant for inference: packed once, packed again when an edit shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fastnn import _export
from fastnn._library import _C


def parameters(module: torch.nn.Module, names: Iterable[str]) -> list[Tensor | None]:
    """``getattr(module, name)`` of each, past the search for a parameter, which costs as much as a small kernel."""
    own = module._parameters
    return [own[name] if name in own else getattr(module, name) for name in names]


class Frozen:
    """Mixin of the modules whose kernel takes packed weights.

    ``_freeze()`` allows packing and ``_thaw()`` ends it. The packed copy is no part of ``state_dict``, of a pickle or
    of a deepcopy; it is checked against the weights' storages and version counters at every call, so it is never stale.
    """

    _frozen = False
    _pack: tuple | None = None

    def _freeze(self) -> None:
        self._frozen = True
        self._pack = None

    def _thaw(self) -> None:
        self.__dict__.pop("_frozen", None)
        self.__dict__.pop("_pack", None)

    def _packed(
        self, weights: Tensor | list[Tensor], pack: Callable, arguments: Callable[[], tuple | None] = tuple
    ) -> Tensor | list[Tensor] | None:
        """``pack(weights, *arguments())``, kept; None where a gradient, a trace or a device without kernels forbids it.

        ``weights`` is what ``pack`` takes, one tensor or a list; an edit of any of them makes everything anew. Each
        answer of ``arguments``, which is asked only where packing is allowed, has a copy of its own; None: nothing to pack.
        """
        if _export.tracing():
            return None
        alone = not isinstance(weights, list)
        given = [weights] if alone else weights
        kept = self._pack
        if kept is not None and _C.fresh(kept[0], given):
            stamp = kept[0]
        else:
            stamp = _C.stamp(given)
            if stamp is None:
                return None
        how = arguments()
        if how is None:
            return None
        if kept is None or kept[0] is not stamp or how not in kept[1]:
            with torch.inference_mode(False), torch.no_grad():
                if kept is None or kept[0] is not stamp:
                    # The weights are kept too: while they and their storages live, no other has their identity and address.
                    kept = self._pack = (stamp, {}, [w.detach() for w in given], given)
                kept[1][how] = pack(kept[2][0] if alone else kept[2], *how)
        return kept[1][how]

    def __prepare_scriptable__(self):
        raise RuntimeError(
            "fastnn: torch.jit.script must get modules of torch alone, its language has no fastnn in it; got a "
            f"{type(self).__name__} of fastnn. Use torch.jit.trace or torch.export.export, or script fastnn.restore(model)."
        )

    def __getstate__(self):
        above = getattr(super(), "__getstate__", None)  # object has one from Python 3.11 on
        state = dict(self.__dict__ if above is None else above())
        state.pop("_pack", None)
        return state


class Fold:
    """A convolution's weight and bias with a batch norm multiplied in.

    ``weight * s[:, None, None, None]`` and ``(bias - running_mean) * s + norm.bias``, with
    ``s = norm.weight / sqrt(running_var + eps)``. The cache is no part of a pickle or of a deepcopy.
    """

    def __init__(self, norm: torch.nn.BatchNorm2d):
        self.norm = norm
        self._folded: tuple[Tensor, Tensor] | None = None
        self._marks: list[tuple] = []  # what the sources showed when they were folded
        self._kept: list[Tensor] = []  # and their storages: while these live, no other source has their address

    def __getstate__(self):
        return {"norm": self.norm, "_folded": None, "_marks": [], "_kept": []}

    def tensors(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the folded weight and bias: kept while no source changes, by autograd where a gradient is wanted."""
        parameters, buffers = self.norm._parameters, self.norm._buffers
        given = [
            weight,
            bias,
            parameters["weight"],
            parameters["bias"],
            buffers["running_mean"],
            buffers["running_var"],
        ]
        given = [t for t in given if t is not None]
        if _export.tracing() or (torch.is_grad_enabled() and any(t.requires_grad for t in given)):
            return self._compute(weight, bias, weight.dtype)
        try:
            marks = [(t.data_ptr(), t._version) for t in given]
        except RuntimeError:  # inference tensors count no versions
            marks = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in given]
        if self._folded is None or marks != self._marks:
            # No inference tensors: what is kept may meet autograd later, where only the input wants a gradient.
            with torch.inference_mode(False), torch.no_grad():
                self._folded = self._compute(weight, bias, torch.float64)
                self._kept = [t.detach() for t in given]
            self._marks = marks
        return self._folded

    def _compute(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        norm = self.norm
        scale = torch.rsqrt(norm.running_var.to(dtype) + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight.to(dtype)
        shift = -norm.running_mean.to(dtype) if bias is None else bias.to(dtype) - norm.running_mean.to(dtype)
        shift = shift * scale
        if norm.bias is not None:
            shift = shift + norm.bias.to(dtype)
        folded = weight.to(dtype) * scale[:, None, None, None]
        return folded.to(weight.dtype), shift.to(weight.dtype)
