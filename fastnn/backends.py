"""Switches of the kernels, in the manner of ``torch.backends``.

``fastnn.backends.winograd`` (bool, True at first): whether a 3 x 3 convolution of stride 1 may run by Winograd's
algorithm, where that is faster. It takes a half to a quarter of the multiplications. Its rounding error is larger than
that of the direct sum (``fastnn.testing.WINOGRAD_BOUND`` states the bound), and an infinity or NaN in the input
reaches all outputs of its tile, up to three pixels further than the kernel does. Setting it to False turns it off at
once, for every thread, in frozen modules too. Results are deterministic either way.
"""

import sys
import types

from fastnn._library import _C


class _Backends(types.ModuleType):
    """The module itself, so that an assignment to its attribute reaches the kernels."""

    @property
    def winograd(self) -> bool:
        return _C.winograd()

    @winograd.setter
    def winograd(self, allowed: bool) -> None:
        if not isinstance(allowed, bool):
            raise TypeError(f"fastnn.backends.winograd: value must be a bool; got {type(allowed).__name__}.")
        _C.set_winograd(allowed)


winograd: bool
sys.modules[__name__].__class__ = _Backends
