"""What tests/ and bench/ share: the shapes people run, the measure of error, guard pages, forced variants.

Nothing here is imported by ``import fastnn``.
"""

from __future__ import annotations

import ctypes
import mmap
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from fastnn.cases import (  # noqa: F401
    ATTENTION,
    CONV2D,
    LINEAR,
    RNN,
    AttentionCase,
    Conv2dCase,
    LinearCase,
    RnnCase,
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALF_DTYPES = (torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "transposed", "strided", "offset", "expanded")  # and "channels_last", for four dimensions
ACTIVATIONS = (
    "relu",
    "gelu",
    "gelu_tanh",
    "silu",
    "sigmoid",
    "tanh",
    "leaky_relu",
    "elu",
    "hardswish",
    "relu6",
    "softplus",
    "mish",
)


CASES = {"linear": LINEAR, "conv2d": CONV2D, "rnn": RNN, "attention": ATTENTION}


def seen(case: AttentionCase, queries: torch.Tensor | None = None) -> torch.Tensor | None:
    """Return which keys each query sees through causality and the window, [queries, keys]; None: all.

    Args:
        case: the problem.
        queries: the positions of some queries; the result lies on their device.
    """
    if not case.causal and case.window is None:
        return None
    queries = torch.arange(case.queries) if queries is None else queries
    ahead = torch.arange(case.keys, device=queries.device) - queries[:, None]
    seen = torch.ones_like(ahead, dtype=torch.bool)
    if case.causal:
        seen &= ahead <= 0
    if case.window is not None:  # the last query stands at the last key
        left, right = (case.keys + case.queries if side < 0 else side for side in case.window)
        ahead -= case.keys - case.queries
        seen &= (-left <= ahead) & (ahead <= right)
    return seen


def edges(*tiles: int) -> list[int]:
    """Return the sizes where a kernel tiled by ``tiles`` can go wrong: 0, 1, a prime, and each side of each tile."""
    sizes = {0, 1, 2, 3, 7}
    for tile in tiles:
        sizes |= {tile - 1, tile, tile + 1, 2 * tile - 1, 2 * tile + 1}
    return sorted(sizes)


# --------------------------------------------------------------------------------------------------- tensors


def random(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, layout: str = "contiguous", requires_grad: bool = False
) -> torch.Tensor:
    """Draw a standard normal tensor from torch's global generator, laid out in memory as ``layout`` says.

    Args:
        shape: the sizes; they are the same for every layout.
        dtype: the dtype.
        layout: one of :data:`LAYOUTS` or ``"channels_last"``. See :func:`laid_out`.
        requires_grad: whether the result is a leaf that wants a gradient.
    """
    return laid_out(torch.randn(shape, dtype=torch.float64).to(dtype), layout).requires_grad_(requires_grad)


def integers(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, low: int = -4, high: int = 4, layout: str = "contiguous"
) -> torch.Tensor:
    """Draw whole numbers in [low, high]: short sums of their products are exact, in any order of summation."""
    return laid_out(torch.randint(low, high + 1, shape).to(dtype), layout)


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """Return the same values in another memory layout.

    ``transposed``: the last two axes swapped in memory; ``strided``: every second element of a wider row (the gaps are
    NaN); ``offset``: dense, starting one element past an aligned address; ``expanded``: stride 0 on the first axis (all
    its slices become the first one); ``channels_last``: as torch's.
    """
    if layout == "contiguous":
        return tensor.contiguous()
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return tensor if tensor.dim() < 2 else tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "strided":
        wide = tensor.new_full((*tensor.shape, 2), float("nan") if tensor.is_floating_point() else 0)
        wide[..., 0] = tensor
        return wide[..., 0]
    if layout == "offset":
        flat = tensor.new_empty(tensor.numel() + 1)
        return flat[1:].view(tensor.shape).copy_(tensor)
    if layout == "expanded":
        return tensor[:1].clone().expand(tensor.shape) if tensor.dim() and tensor.shape[0] else tensor
    raise ValueError(f"fastnn.testing.laid_out: layout must be one of {LAYOUTS} or 'channels_last'; got {layout!r}.")


# ----------------------------------------------------------------------------------------------- guard pages

_libc = ctypes.CDLL(None, use_errno=True)
_PROT_NONE = 0


def guarded(tensor: torch.Tensor, side: str = "after") -> torch.Tensor:
    """Copy a tensor to memory that ends at (``"after"``) or begins behind (``"before"``) a page without access.

    Strides are kept. Every byte near the tensor that belongs to none of its elements is 0xff, which is NaN in each
    floating dtype, so a read out of bounds either ends the process or shows in the result.

    Args:
        tensor: any strided CPU tensor.
        side: on which side of the data the page without access lies.
    """
    if side not in ("after", "before"):
        raise ValueError(f"fastnn.testing.guarded: side must be 'after' or 'before'; got {side!r}.")
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    page = mmap.PAGESIZE
    inner = max(1, -(-extent * tensor.element_size() // page)) * page
    memory = mmap.mmap(-1, inner + 2 * page, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = b"\xff" * len(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (start, start + page + inner):
        if _libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), _PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect failed")
    whole = torch.frombuffer(memory, dtype=torch.uint8, offset=page, count=inner).view(tensor.dtype)  # owns memory
    begin = whole.numel() - extent if side == "after" else 0
    copy = whole.as_strided(tensor.shape, tensor.stride(), begin)
    if 0 in tensor.stride():  # writing through an expanded view would be ambiguous: write its one real slice
        index = tuple(slice(0, 1) if s == 0 else slice(None) for s in tensor.stride())
        copy[index].copy_(tensor.detach()[index])
    else:
        copy.copy_(tensor.detach())
    return copy.requires_grad_(tensor.requires_grad)


@contextmanager
def guarded_outputs(side: str = "after") -> Iterator[None]:
    """Make every tensor that torch allocates on the CPU inside the block lie against a page without access.

    Operators allocate their outputs and saved tensors themselves, so the guard sits in the allocator (the extension
    installs one for the time of the block). Fresh memory is NaN: an output that was not written shows.
    """
    from fastnn import _C

    _C._guard_allocations(side)
    try:
        yield
    finally:
        _C._guard_allocations("off")


# --------------------------------------------------------------------------------------------------- variants


def available_isas() -> list[str]:
    """Return the instruction sets that this machine has and the extension was built for, plainest first."""
    from fastnn import _C

    return list(_C.cpu_isas())


@contextmanager
def forced_isa(name: str) -> Iterator[None]:
    """Run the kernels of one instruction set inside the block."""
    from fastnn import _C

    before = _C.cpu_isa()
    _C._set_cpu_isa(name)
    try:
        yield
    finally:
        _C._set_cpu_isa(before)


ALGORITHMS = {
    "linear": ("gemm", "dot", "packed", "stream"),
    "conv2d": ("pointwise", "implicit", "direct", "winograd2", "winograd4", "linear"),
}


@contextmanager
def forced(op: str, algorithm: str | None) -> Iterator[None]:
    """Run one of an op's ``ALGORITHMS`` inside the block, where it fits the problem; None: the op's own choice."""
    from fastnn import _C

    force = getattr(_C, f"_force_{op}_algorithm")
    force(algorithm)
    try:
        yield
    finally:
        force(None)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch, and so fastnn, use ``count`` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------------ error


def compute_eps(dtype: torch.dtype) -> float:
    """Return the rounding unit of the sums: float32's for the half dtypes, which are summed in float32."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


WINOGRAD_BOUND = {2: 4.0, 4: 32.0}
"""Winograd's F(m x m, 3 x 3) errs by at most ``WINOGRAD_BOUND[m] · eps · reference.winograd_magnitude``."""


def bound(dtype: torch.dtype, oracle: torch.Tensor, magnitude: torch.Tensor, c: float = 8.0) -> torch.Tensor:
    """Return the error allowed at each element: ``c·eps·magnitude`` for the sums, one rounding for the store.

    Args:
        dtype: dtype of the result.
        oracle: the result in float64.
        magnitude: the same sum over absolute values, ``|input| @ |weight|ᵀ + |bias|`` for linear.
        c: how many roundings of the whole magnitude the sum may lose.
    """
    info = torch.finfo(dtype)
    return c * compute_eps(dtype) * magnitude.double() + info.eps * oracle.abs() + info.smallest_normal * info.eps


def max_error(actual: torch.Tensor, oracle: torch.Tensor, magnitude: torch.Tensor | None = None) -> float:
    """Return the largest error of a result, as a share of its magnitude (of the oracle's largest value where None)."""
    if actual.numel() == 0:
        return 0.0
    scale = oracle.abs().amax() if magnitude is None else magnitude.double()
    return ((actual.double() - oracle).abs() / scale.clamp_min(torch.finfo(torch.float64).tiny)).max().item()


def assert_close_to_oracle(
    actual: torch.Tensor,
    oracle: torch.Tensor,
    magnitude: torch.Tensor,
    stock: torch.Tensor | None = None,
    c: float = 8.0,
    name: str = "result",
) -> None:
    """Assert that a result is right: near the float64 oracle, and no worse than twice torch's own distance from it.

    Args:
        actual: what the kernel gave, in its own dtype.
        oracle: the same in float64, from :mod:`fastnn.reference` or from torch.
        magnitude: the size of what was summed, see :func:`bound`; broadcasts against the oracle.
        stock: what torch gave for the same input in the same dtype.
        c: see :func:`bound`.
        name: what to call the result in the message.
    """
    assert actual.shape == oracle.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    if stock is not None:
        assert actual.dtype == stock.dtype, f"{name}: dtype {actual.dtype}, torch gives {stock.dtype}"
        assert actual.device == stock.device, f"{name}: device {actual.device}, torch gives {stock.device}"
    if actual.numel() == 0:
        return
    actual, oracle = actual.detach(), oracle.detach().double()
    magnitude = magnitude.detach().double().expand(oracle.shape)
    special = ~oracle.to(actual.dtype).isfinite()  # NaN, infinities, and what overflows this dtype
    expected = oracle.to(actual.dtype)[special]
    torch.testing.assert_close(
        actual[special], expected, equal_nan=True, msg=lambda m: f"{name}, NaN and infinities: {m}"
    )
    error = (actual.double() - oracle).abs().masked_fill(special, 0)
    excess = error - bound(actual.dtype, oracle, magnitude, c).masked_fill(special, 0)
    if not (excess <= 0).all():  # the form that a stray NaN fails
        bad = ~(excess <= 0)
        at = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: {int(bad.sum())} of {bad.numel()} elements are off; first at {at}: got {actual[at].item()!r}, "
            f"expected {oracle[at].item()!r}, error {error[at].item():.3g} "
            f"= {error[at].item() / max(magnitude[at].item() * compute_eps(actual.dtype), 1e-300):.3g} eps·magnitude, "
            f"allowed {c:g} and one rounding"
        )
    if stock is not None and actual.dtype != torch.float64:  # in float64 the oracle errs as much as either
        tiny = torch.finfo(torch.float64).tiny
        rounding = torch.finfo(actual.dtype).eps * oracle.abs().masked_fill(special, 0)
        ours = ((error - rounding).clamp_min(0) / magnitude.clamp_min(tiny)).max().item()
        theirs = (stock.detach().double() - oracle).abs().masked_fill(special, 0) / magnitude.clamp_min(tiny)
        limit = 2 * theirs.nan_to_num(0).max().item() + 4 * compute_eps(actual.dtype)
        assert ours <= limit, f"{name}: error {ours:.3g} of the magnitude; torch's own is {(limit / 2):.3g}"


# --------------------------------------------------------------------------------------------------- profiling

_ATEN_KERNELS = re.compile(
    r"aten::(_?addmm|addmm_|_addmm_activation|mm|bmm|baddbmm_?|addbmm|matmul|dot|vdot|mv|addmv_?|addr|einsum|linear|bilinear"
    r"|_?convolution.*|convolution_overrideable|_?conv(1d|2d|3d|_).*|conv2d|thnn_conv.*|_?slow_conv.*|_nnpack.*"
    r"|.*mkldnn.*|_?rnn.*|.*lstm.*|.*gru.*|_?scaled_dot_product.*|_native_multi_head.*|_transformer.*)$"
)


def aten_ops(function: Callable[[], object]) -> set[str]:
    """Run a function under torch's profiler and return the names of the ``aten::`` operators that ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return {event.key for event in profile.key_averages() if event.key.startswith("aten::")}


def assert_own_kernels(function: Callable[[], object]) -> None:
    """Assert that no matmul, convolution, RNN or attention operator of ATen runs in a function, backward included."""
    found = sorted(op for op in aten_ops(function) if _ATEN_KERNELS.match(op))
    assert not found, f"the work ended in torch's own operators: {', '.join(found)}"
