"""The memory of a call: it is counted (bench/memory.py); linear's and conv2d's is a few blocks, rnn's what it has to keep."""

from functools import partial

import pytest
import torch

from bench import memory
from fastnn import _C, testing
from fastnn.functional import linear
from fastnn.testing import CONV2D, LINEAR, RNN, RnnCase

OPS = torch.ops.fastnn


def test_the_memory_of_a_call_is_what_it_holds_beyond_its_results():
    x = torch.randn(1000)
    assert memory.extra(lambda: [x.exp()]) == 0
    assert memory.extra(lambda: [x.exp().exp()]) == 4000
    assert memory.extra(lambda: [x.exp().exp_(), None]) == 0
    assert memory.extra(lambda: [x.double().exp().float()]) == 12000
    assert memory.extra(lambda: [x.exp()]) == 0, "nothing is left counted"


def test_tensors_outlive_the_counting():
    kept, x = [], torch.randn(3000)
    assert memory.extra(lambda: kept.append(x.neg()) or []) == 12000
    torch.testing.assert_close(kept.pop(), -x)
    before = [torch.randn(100) for _ in range(3)]
    assert memory.extra(lambda: before.clear() or [x.neg()]) == 0, "what was there before does not count when it goes"


def test_buffers_of_kernels_are_counted():
    x, weight = torch.randn(64, 512), torch.randn(128, 512)
    with testing.threads(1):  # what several hold at the same time is chance
        taken = memory.extra(lambda: [linear(x, weight)])
        assert taken > 0
        _C.probe_scratch_reset()
        assert _C.probe_scratch_peak() == 0
        linear(x, weight)
        assert _C.probe_scratch_peak() == taken


# ---- the bound -------------------------------------------------------------------------------------------------------

# A call may hold, beyond inputs and results, twice what it needs: its weights packed once in the type of the sums, in
# whole panels of 32 outputs, and a few blocks of tiles, each half of a 512 KiB L2, or as large as the largest tensor where
# that is less, but a panel of 256 x 16 at least. What the forward saves for the backward is an input of the backward. On
# one thread: each more may have blocks of its own.
BLOCKS, BLOCK, PANEL = 4, 256 << 10, 16 << 10


def allowed(outputs: int, depth: int, *tensors: torch.Tensor) -> int:
    """Return the bound in bytes: ``depth`` is input channels times taps, of one group."""
    packed = 4 * -(-outputs // 32) * 32 * depth
    largest = 4 * max(tensor.numel() for tensor in tensors)
    return 2 * (packed + BLOCKS * min(BLOCK, max(PANEL, largest)))


def held(direction, ops, tensors, arguments, activation) -> tuple[int, torch.Tensor]:
    """Return the bytes that the forward or the backward holds at most, and the output."""
    forward, train, backward = ops
    if direction == "forward":
        results = []
        taken = memory.extra(lambda: results.append(forward(*tensors, *arguments, activation)) or results)
        return taken, results[0]
    output, saved = train(*tensors, *arguments, activation)
    saved = output if activation in ("relu", "relu6", "sigmoid", "tanh") else saved if activation else None
    grad, mask = torch.zeros_like(output), [True, True, tensors[2] is not None]
    return memory.extra(lambda: backward(grad, *tensors, saved, *arguments, activation, mask)), output


def check(found: dict[str, tuple[int, int]]) -> None:
    """Assert that no call holds more than its bound: ``found`` has both in bytes, by name."""
    over = {name: f"{taken >> 10} of {bound >> 10} KiB" for name, (taken, bound) in found.items() if taken > bound}
    assert not over, f"over the bound are {over}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_linear_holds_a_few_blocks(direction, dtype):
    zeros, found = partial(torch.zeros, dtype=getattr(torch, dtype)), {}
    for case in LINEAR if dtype == "float32" else LINEAR[::2]:
        x, weight = zeros(case.rows, case.in_features), zeros(case.out_features, case.in_features)
        if case.transposed:
            weight = weight.t().contiguous().t()
        tensors = (x, weight, zeros(case.out_features) if case.bias else None)
        with testing.threads(1):
            ops = (OPS.linear, OPS.linear_train, OPS.linear_backward)
            taken, output = held(direction, ops, tensors, (), case.activation)
        found[case.name] = taken, allowed(case.out_features, case.in_features, x, weight, output)
    check(found)


@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_conv2d_holds_a_few_blocks(direction, dtype, layout):
    zeros, found = partial(torch.zeros, dtype=getattr(torch, dtype)), {}
    for case in CONV2D if dtype == "float32" else CONV2D[::3]:
        x = zeros(case.batch, case.channels, case.height, case.width)
        weight = zeros(case.out_channels, case.channels // case.groups, *case.kernel)
        x, weight = (t.contiguous(memory_format=getattr(torch, layout)) for t in (x, weight))
        tensors = (x, weight, zeros(case.out_channels) if case.bias else None)
        geometry = ([case.stride] * 2, [case.padding] * 4, [case.dilation] * 2, case.groups)
        with testing.threads(1):
            ops = (OPS.conv2d, OPS.conv2d_train, OPS.conv2d_backward)
            taken, output = held(direction, ops, tensors, geometry, case.activation)
        algorithm = _C._conv2d_algorithm(x, weight, *geometry)
        taps = {"winograd2": 16, "winograd4": 36}.get(algorithm, weight[0, 0].numel())  # Winograd's are transformed
        found[case.name] = taken, allowed(case.out_channels, weight.shape[1] * taps, x, weight, output)
    check(found)


# ---- recurrent layers ------------------------------------------------------------------------------------------------

# Forward: the weights packed once, the states, and a block of steps' gates: 192 KiB, or 48 rows or a step where those are
# more; with layer norm a step's product with the state beside them. Backward: the gradient of every row's gates, and of
# what W_hr and W_hh gave where a projection or layer norm lies between; and what linear's backward holds for one product.
# 16-bit tensors are widened, and results rounded from copies. Of all that five quarters.
MODES = {"rnn_tanh": ("RNN_TANH", 1), "rnn_relu": ("RNN_RELU", 1), "gru": ("GRU", 3), "lstm": ("LSTM", 4)}
OPTIONS = {"plain": (False, False), "zoneout": (False, True), "layer norm": (True, False), "both": (True, True)}


def allowed_rnn(direction: str, case: RnnCase, steps: int, norm: bool, zoneout: bool, half: bool) -> int:
    """Return the bound in bytes for one layer of a case: five for each element of four bytes."""
    gates, width, state = MODES[case.kind][1], case.input_size, case.proj_size or case.hidden_size
    directions, rows, hidden = 1 + case.bidirectional, steps * case.batch, -(-case.hidden_size // 32) * 32
    padded = -(-state // 32) * 32
    weights = gates * hidden * (width + padded) + (hidden * padded if case.proj_size else 0)
    states = case.batch * (2 * padded + 3 * hidden)
    if direction == "forward":
        held = max(48 << 10, max(48, case.batch) * (gates * hidden + width))
        held += (case.batch + 10) * gates * hidden if norm else 0
        return 5 * (directions * (weights + states) + held)
    kept = (4 if gates == 3 else gates) * hidden
    kept += padded + hidden if case.proj_size else 0
    kept += gates * hidden + hidden if norm else 0
    kept += width + 4 * padded if half else 0
    tables = rows * (directions + 2) * 2  # pointers
    results = max(rows * width, weights) if half else 0
    return 5 * (directions * (weights + states + rows * kept) + tables + results + BLOCKS * BLOCK // 4)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_rnn_holds_what_it_has_to(direction, dtype, options):
    zeros, found = partial(torch.zeros, dtype=getattr(torch, dtype)), {}
    norm, zoneout = OPTIONS[options]
    for case in RNN if options == "plain" else RNN[::2]:
        mode, gates = MODES[case.kind]
        steps, hidden, directions = min(case.time or 1, 50), case.hidden_size, 1 + case.bidirectional
        state = case.proj_size or hidden
        weights = [zeros(gates * hidden, case.input_size), zeros(gates * hidden, state), *[zeros(gates * hidden)] * 2]
        weights += [zeros(state, hidden)] if case.proj_size else []
        norms = [zeros(gates * hidden)] * 2 + ([zeros(hidden)] * 2 if mode == "LSTM" else [])
        mask = torch.zeros(directions, steps * case.batch, state, dtype=torch.bool) if zoneout else None
        x, hx = zeros(steps, case.batch, case.input_size), zeros(directions, case.batch, state)
        cx = zeros(directions, case.batch, hidden) if mode == "LSTM" else None
        args = (x, None, hx, cx, weights * directions, mode)
        rest = (norms * directions if norm else None, mask, 0.0)
        with testing.threads(1):
            if direction == "forward":
                taken = memory.extra(lambda args=args, rest=rest: OPS.rnn(*args, None, *rest))
            else:
                *ys, reserve = OPS.rnn_train(*args, *rest)
                grads = [y if y.numel() else None for y in ys]
                call = partial(OPS.rnn_backward, *grads, *args[:5], ys[0], reserve, mode, *rest, [True] * 4)

                def flat(call=call):
                    *first, of_weights, of_norms = call()
                    return [t for t in (*first, *of_weights, *of_norms) if t is not None]

                taken = memory.extra(flat)
        found[case.name] = taken, allowed_rnn(direction, case, steps, norm, zoneout, dtype == "bfloat16")
    check(found)
