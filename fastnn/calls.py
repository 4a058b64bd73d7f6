"""Modules that call torch's functions themselves: finds them, and lets fastnn serve the calls.

A module of somebody's own may multiply by ``F.linear`` or attend by ``F.scaled_dot_product_attention`` in its ``forward``.
``fastnn.accelerate`` gives such a module a class whose ``forward`` is the former one inside :class:`fastnn.patch`.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator

from torch import nn

from fastnn.patch import patch
from fastnn.served import SERVED

# A product by ``matmul`` is mostly one of batches, which no kernel serves: by itself it is not worth a block.
_WORTH = {f: f.__name__ for f in SERVED if "matmul" not in f.__name__}
_DEPTH = 3  # functions that call functions that call functions


class Calls(nn.Module):
    """Mixin of modules whose own calls of torch's functions are served by fastnn."""


def inside(forward: Callable) -> Callable:
    """Return ``forward`` inside a block of :class:`fastnn.patch`, with its own signature."""

    @functools.wraps(forward)
    def served(self, *args, **kwargs):
        with patch():
            return forward(self, *args, **kwargs)

    return served


@functools.cache
def functions(cls: type[nn.Module]) -> tuple[str, ...]:
    """Name the functions that fastnn serves and that the methods of ``cls`` call, as its code shows.

    Args:
        cls: a module's class.

    Returns:
        Names such as ``("conv2d", "scaled_dot_product_attention")``. A name that only looks like a call is harmless: the
        block around ``forward`` then serves nothing.
    """
    found: set[str] = set()
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for value in vars(base).values():
            value = getattr(value, "__func__", value)  # of static and class methods
            if isinstance(value, types.FunctionType):
                found.update(_called(value, _DEPTH, set()))
    return tuple(sorted(found))


def _called(function: types.FunctionType, depth: int, seen: set[int]) -> Iterator[str]:
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None)
    if code is None or id(code) in seen:
        return
    seen.add(id(code))
    names = set(_names(code))
    values = [function.__globals__[name] for name in names & function.__globals__.keys()]
    for value in values:
        if isinstance(value, types.ModuleType):
            if value.__name__.split(".")[0] == "torch":  # torch, torch.nn, F: what is looked up there
                found = (getattr(value, name, None) for name in names)
                values += [v for v in found if not any(v is known for known in values)]
        elif isinstance(value, (types.FunctionType, types.BuiltinFunctionType)) and value in _WORTH:
            yield _WORTH[value]
        elif isinstance(value, types.FunctionType) and depth and not value.__module__.startswith("torch."):
            yield from _called(value, depth - 1, seen)


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
