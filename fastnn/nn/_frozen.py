"""Weights that were declared constant for inference: packed once, packed again when an edit shows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastnn._library import _C


class Frozen:
    """Mixin of the modules whose kernel takes packed weights.

    ``_freeze()`` allows packing and ``_thaw()`` ends it. The packed copy is no part of ``state_dict``, of a pickle or of
    a deepcopy; it is checked against the weight's storage and version counter at every call, so it is never stale.
    """

    _frozen = False
    activation: str | None = None
    _pack: tuple | None = None

    def _freeze(self) -> None:
        self._frozen = True
        self._pack = None

    def _thaw(self) -> None:
        self.__dict__.pop("_frozen", None)
        self.__dict__.pop("_pack", None)

    def _packed(self, weight: Tensor, pack: Callable[..., Tensor], *arguments) -> Tensor | None:
        """``pack(weight, *arguments)``, kept; None where a gradient, a trace or a device without kernels forbids it."""
        if torch.compiler.is_compiling() or weight.device.type != "cpu":
            return None
        if torch.is_grad_enabled() and weight.requires_grad:
            return None
        version = 0 if weight.is_inference() else weight._version
        # Panels are as wide as the vectors of the ISA that runs, so it belongs to the stamp.
        stamp = (id(weight), weight.data_ptr(), version, weight.dtype, _C.cpu_isa(), arguments)
        if self._pack is None or self._pack[0] != stamp:
            with torch.no_grad():
                self._pack = (stamp, pack(weight.detach(), *arguments))
        return self._pack[1]

    def __getstate__(self):
        state = dict(self.__dict__)
        state.pop("_pack", None)
        return state
