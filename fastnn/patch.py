"""patch: fastnn's kernels for the functional calls of any library, inside a block."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from fastnn import _fallback
from fastnn.served import SERVED

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_BACKWARD = (torch.Tensor.backward, torch.autograd.backward, torch.autograd.grad)


class patch(TorchFunctionMode):
    """Serve the calls of torch's functions inside a block, or a decorated function, by fastnn's kernels.

    >>> with fastnn.patch() as p:
    ...     output = model(input)
    >>> print(p)

    For code that calls ``F.linear``, ``torch.matmul``, ``F.conv2d``, ``F.scaled_dot_product_attention``, ``torch.lstm``
    and the other functions of ``fastnn.served.SERVED`` itself, by a library's own modules, which :func:`fastnn.accelerate`
    does not know. Nothing is changed in torch: the block is a ``TorchFunctionMode``, and counts for the thread that
    entered it. Of nested blocks the inner one serves and counts. A backward needs no block, but where it runs a forward
    again (``torch.utils.checkpoint``) it belongs into the same one.

    Every function of torch that is called inside costs about 1 µs more, a served one 2: where modules can be swapped,
    :func:`fastnn.accelerate` is faster. Inside ``torch.compile`` it costs nothing, and is not counted.

    Attributes:
        served: how often fastnn computed each function.
        left: how often one of these functions was left to torch, by function and reason.
    """

    def __init__(self) -> None:
        super().__init__()
        self.served: Counter[str] = Counter()
        self.left: Counter[tuple[str, str]] = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        serve = SERVED.get(func)
        if serve is None:
            if func in _BACKWARD and not torch.compiler.is_compiling():
                return self._backward(func, *args, **(kwargs or {}))
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            result = serve(*args, **kwargs)
            return func(*args, **kwargs) if result is NotImplemented else result
        last = _fallback.last
        if last.passing:  # an inner block left it
            return func(*args, **kwargs)
        last.passing, last.reason = True, None
        try:
            if any(t not in _PLAIN for t in types):
                result, last.reason = NotImplemented, "a tensor subclass goes to its class"
            else:
                result = serve(*args, **kwargs)
            if result is NotImplemented:
                result = func(*args, **kwargs)
            if last.reason is None:
                self.served[func.__name__] += 1
            else:
                self.left[func.__name__, last.reason] += 1
            return result
        finally:
            last.passing = False

    def _backward(self, func, outputs, *inputs, **options):
        """Go backward inside the block, for a checkpoint's forward that is run again must find it.

        While a mode handles a function it is off; and with tensors, these functions would come back to it at once. So edges of
        the graph stand for the tensors where torch takes them.
        """
        given = [(x,) if isinstance(x, (torch.Tensor, GradientEdge)) else tuple(x) for x in (outputs, *inputs)]
        takes_edges = (
            options.get("inputs") is None and not options.get("materialize_grads") and not _fallback.last.passing
        )
        if not takes_edges or not all(type(t) in _PLAIN and t.requires_grad for tensors in given for t in tensors):
            return func(outputs, *inputs, **options)
        if func is torch.Tensor.backward:
            func = torch.autograd.backward
            options["grad_tensors"] = options.pop("gradient", None)
        edges = [[get_gradient_edge(t) for t in tensors] for tensors in given]
        with self:
            return func(*edges, **options)

    def __call__(self, function: Callable) -> Callable:
        """Decorate a function: its calls run inside the block."""

        @functools.wraps(function)
        def patched(*args: Any, **kwargs: Any):
            with self:
                return function(*args, **kwargs)

        return patched

    def __str__(self) -> str:
        rows = [f"{count:8} {name}: fastnn" for name, count in self.served.most_common()]
        rows += [f"{count:8} {name}: torch ({reason})" for (name, reason), count in self.left.most_common()]
        return "\n".join(rows) or "nothing that fastnn serves was called"
