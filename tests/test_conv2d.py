"""fastnn.functional.conv2d and fastnn.nn.Conv2d against the float64 oracle and torch's own error."""

import copy
import itertools
import pickle
import random
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch.testing._internal.common_methods_invocations import op_db

import fastnn
from fastnn import _C, reference, testing
from fastnn.functional import conv2d

ISAS = testing.available_isas()
ALGORITHMS = ("pointwise", "implicit", "direct")
LAYOUTS = ("contiguous", "channels_last")
ops = torch.ops.fastnn


@contextmanager
def direct_sums():
    """Without Winograd: only direct sums of whole numbers are exact."""
    fastnn.backends.winograd = False
    try:
        yield
    finally:
        fastnn.backends.winograd = True


@contextmanager
def forced(isa=None, algorithm=None):
    """Run one ISA's kernels, one algorithm."""
    with testing.forced_isa(isa or _C.cpu_isa()), testing.forced("conv2d", algorithm):
        yield


def four(padding):
    rows, columns = (padding, padding) if isinstance(padding, int) else padding
    return rows, rows, columns, columns


def pair(value):
    return (value, value) if isinstance(value, int) else value


def make(n, c, h, w, k, kernel, groups=1, dtype=torch.float32, layout="contiguous", bias=True, draw=testing.random):
    return (
        draw((n, c, h, w), dtype, layout=layout),
        draw((k, c // groups, *pair(kernel)), dtype, layout=layout),
        draw((k,), dtype) if bias else None,
    )


def check(x, w, b, stride=1, padding=0, dilation=1, groups=1, activation=None, name="conv2d", packed=None):
    """Forward of one problem against the oracle; the sum's magnitude bounds every activation's error (slope <= 1.2)."""
    geometry = pair(stride), four(padding), pair(dilation), groups
    double = [None if t is None else t.double() for t in (x, w, b)]
    oracle = reference.conv2d(*double, *geometry, activation)
    magnitude = reference.conv2d(*(None if t is None else t.abs() for t in double), *geometry)
    stock = reference.activate(F.conv2d(x, w, b, stride, padding, dilation, groups), activation)
    ours = conv2d(x, w, b, stride, padding, dilation, groups, activation=activation, packed=packed)
    testing.assert_close_to_oracle(ours, oracle, 1.2 * magnitude + 1e-3, stock, name=name)
    return ours


# (n, c, h, w), k, kernel, stride, padding, dilation, groups: every kernel, its tails and its borders.
PROBLEMS = [
    ((2, 3, 11, 13), 5, 1, 1, 0, 1, 1),
    ((1, 37, 7, 7), 19, 1, 1, 0, 1, 1),
    ((3, 8, 5, 9), 12, 1, 2, 1, 1, 2),
    ((1, 3, 19, 23), 17, 7, 2, 3, 1, 1),
    ((2, 16, 9, 10), 33, 3, 1, 1, 1, 1),
    ((1, 100, 6, 5), 20, 3, 1, 1, 1, 1),  # more than one block of depth
    ((1, 6, 17, 40), 8, (2, 5), (1, 3), (1, 0), (2, 1), 2),
    ((2, 9, 12, 15), 9, 3, 1, 1, 1, 9),
    ((1, 17, 14, 14), 17, 5, 2, 2, 1, 17),
    ((1, 5, 16, 35), 15, 3, (2, 1), 1, (1, 2), 5),
    ((1, 33, 7, 7), 33, 3, 1, 1, 1, 33),  # depthwise along channels; the next two along rows
    ((1, 10, 3, 70), 10, 3, 1, 1, 1, 10),
    ((2, 9, 2, 3), 9, 5, 2, 3, 1, 9),
    ((2, 3, 9, 61), 14, 3, 2, 1, 1, 1),  # few channels, wide rows
    ((1, 10, 4, 31), 8, (3, 2), 1, (1, 2), 1, 2),
    ((2, 16, 8, 9), 24, 3, 1, 2, 1, 4),
    ((1, 24, 7, 8), 8, 3, 2, 1, 1, 8),
    ((1, 2, 1, 1), 3, 3, 1, 1, 1, 1),
    ((1, 4, 3, 30), 4, (3, 7), 1, (0, 3), 1, 1),
    ((1, 24, 6, 28), 24, 3, 1, 1, 1, 3),  # eight channels a group: rows as one line; the next with two phases
    ((2, 32, 9, 14), 20, 3, 2, 1, 1, 4),
    ((1, 17, 3, 130), 5, (3, 2), 1, 1, 1, 1),
    ((1, 30, 2, 300), 6, (2, 3), (1, 2), 1, 1, 1),  # rows too long for a block
    ((1, 800, 7, 7), 9, 1, 1, 0, 1, 1),  # one pixel in the last panel, two blocks of depth
    ((1, 40, 9, 33), 3, 3, 1, 1, 1, 1),  # few output channels of many
    ((2, 33, 8, 31), 2, 3, 2, 1, 1, 1),
    ((2, 7, 33, 37), 3, 1, 1, 0, 1, 1),  # 1x1 to few channels: two chunks of pixels; groups
    ((1, 10, 3, 5), 8, 1, 1, 0, 1, 2),
    ((1, 3, 12, 45), 5, 4, 4, 1, 1, 1),  # four phases of a row at once
    ((2, 13, 19, 15), 21, 3, 1, 1, 1, 1),  # the weight's gradient as a GEMM: two blocks of pixels, images in one panel
    ((3, 40, 7, 7), 30, 1, 1, 0, 1, 1),
    ((2, 64, 9, 9), 64, 3, 2, 1, 1, 2),
    ((1, 2, 21, 12), 19, (7, 9), (1, 2), (3, 0), 1, 1),
    ((1, 27, 7, 9), 45, 3, 1, 1, 1, 9),  # groups that share what is worked out for a tap
    ((2, 5, 8, 9), 40, 5, 1, 2, 1, 1),
    ((1, 4, 30, 33), 40, 4, 4, 0, 1, 1),  # windows apart: some pixels in none; gaps between them, images in one tile
    ((3, 3, 13, 11), 9, (4, 5), (5, 6), (1, 2), 1, 1),
    ((2, 20, 8, 5), 35, (2, 1), (3, 1), 0, 1, 1),
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("algorithm", [None, *ALGORITHMS])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_kernel(isa, algorithm, layout):
    for dtype, (size, k, kernel, *geometry) in itertools.product(testing.DTYPES, PROBLEMS):
        with forced(isa, algorithm):
            x, w, b = make(*size, k, kernel, geometry[-1], dtype, layout)
            activation = "silu" if size[0] == 1 else None
            check(x, w, b, *geometry, activation, f"{isa} {algorithm} {dtype} {size}->{k} {kernel} {geometry}")


@pytest.mark.parametrize("activation", testing.ACTIVATIONS)
def test_every_activation(activation):
    for dtype, layout, groups in itertools.product(testing.DTYPES, LAYOUTS, (1, 9)):
        for isa in ISAS:
            with forced(isa):
                x, w, b = make(2, 9, 6, 17, 18, 3, groups, dtype, layout)
                check(x, w, b, 1, 1, 1, groups, activation, f"{isa} {activation} {dtype} {layout} {groups}")


def random_problem(draw):
    """One problem that F.conv2d takes, small, of any geometry."""
    while True:
        groups = draw.choice([1, 1, 2, 3, 4])
        c, k = (groups * draw.choice([1, 1, 2, 3, 4, 5, 8, 17]) for _ in range(2))
        kernel = draw.choice([(1, 1), (1, 1), (3, 3), (3, 3), (2, 4), (5, 1), (3, 2)])
        stride, padding = draw.choice([1, 1, 2, 3, (2, 1), (1, 2), (3, 4)]), draw.choice([0, 1, 2, (0, 3)])
        if kernel == (1, 1) and draw.random() < 0.5:
            stride, padding = 1, 0
        dilation = draw.choice([1, 1, 2, (1, 3)])
        h, w = draw.choice([1, 3, 5, 7, 9, 14, 17, 23]), draw.choice([1, 2, 3, 5, 7, 8, 9, 14, 16, 17, 19, 33, 40])
        reach = [(s - 1) * d + 1 for s, d in zip(kernel, pair(dilation), strict=True)]
        if h + 2 * pair(padding)[0] >= reach[0] and w + 2 * pair(padding)[1] >= reach[1]:
            return (draw.choice([1, 2, 3]), c, h, w), k, kernel, stride, padding, dilation, groups


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_numbers_are_exact(isa, layout):
    """Forward and gradients, to the last bit, over geometries, sizes around every tile and forced algorithms."""
    draw = random.Random(f"{isa} {layout}")
    for i in range(120):
        size, k, kernel, *geometry = random_problem(draw)
        dtype = torch.float64 if i % 4 == 0 else torch.float32
        x, w, b = make(*size, k, kernel, geometry[-1], dtype, layout, draw=testing.integers)
        leaves = [t.requires_grad_() for t in (x, w, b)]
        algorithm = draw.choice([None, *ALGORITHMS])
        name = f"{isa} {algorithm} {layout} {dtype} {size}->{k} {kernel} {geometry}"
        # In float64: torch's float32 kernel ends the process where a channels_last kernel lies wholly in the padding.
        double = [t.detach().double().contiguous().requires_grad_() for t in leaves]
        stock = F.conv2d(*double, *geometry)
        grad = testing.integers(stock.shape, dtype)
        with forced(isa, algorithm), direct_sums():
            ours = conv2d(x, w, b, *geometry)
            assert torch.equal(ours.double(), stock), name
            grads = torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(stock, double, grad.double())
            for what, one, want in zip("xwb", *grads, strict=True):
                assert torch.equal(one.double(), want), f"{name} d{what}"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_numbers_are_exact_at_every_edge_of_the_tile(isa, layout):
    """Output channels and pixels around one and two tiles; channels around a block of depth."""
    with forced(isa), direct_sums():
        for k, columns in itertools.product(
            (1, 2, 3, 5, 6, 7, 8, 9, 11, 13, 15, 16, 17, 31, 33), (1, 7, 8, 9, 15, 16, 17, 31, 33)
        ):
            x, w, b = make(1, 3, 2, columns, k, (2, 1), layout=layout, draw=testing.integers)
            assert torch.equal(conv2d(x, w, b), F.conv2d(x, w, b)), (isa, layout, k, columns)
        for c in (1, 2, 42, 43, 86, 127, 129):
            x, w, b = make(2, c, 4, 9, 13, 3, layout=layout, draw=testing.integers)
            assert torch.equal(conv2d(x, w, b, 1, 1), F.conv2d(x, w, b, 1, 1)), (isa, layout, c)
        for c in (1, 7, 8, 9, 15, 17, 31, 33, 64):
            for size in (1, 4, 7, 8, 9, 30, 33):
                x, w, b = make(1, c, 3, size, c, 3, c, layout=layout, draw=testing.integers)
                for stride in (1, 2, (1, 3)):
                    ours, stock = conv2d(x, w, b, stride, 1, 1, c), F.conv2d(x, w, b, stride, 1, 1, c)
                    assert torch.equal(ours, stock), (isa, layout, c, size, stride)


@pytest.mark.parametrize("isa", ISAS)
def test_depthwise_is_exact_at_every_size(isa):
    """Images around a vector of pixels, channels around a vector: along channels, along rows, and strided gradients."""
    draw = random.Random(isa)
    with testing.forced_isa(isa):
        for height, width in itertools.product((1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 21), repeat=2):
            channels, kernel = draw.choice((1, 3, 7, 8, 9, 16, 17)), draw.choice((1, 2, 3, 5, 7))
            stride, padding, dilation = draw.choice((1, 1, 2, 3)), draw.randint(0, 4), draw.choice((1, 1, 2))
            if min(height, width) + 2 * padding < (kernel - 1) * dilation + 1:
                continue
            dtype, geometry = draw.choice((torch.float32, torch.float64)), (stride, padding, dilation, channels)
            x, w, b = make(2, channels, height, width, channels, kernel, channels, dtype, draw=testing.integers)
            leaves = [t.requires_grad_() for t in (x, w, b)]
            stock, ours = F.conv2d(*leaves, *geometry), conv2d(*leaves, *geometry)
            name = f"{isa} {dtype} {channels}x{height}x{width} {kernel} {geometry}"
            assert torch.equal(ours, stock), name
            grad = testing.integers(stock.shape, dtype)
            for one, want in zip(*(torch.autograd.grad(y, leaves, grad) for y in (ours, stock)), strict=True):
                assert torch.equal(one, want), name


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_few_channels_are_exact_at_every_width(isa, layout):
    """Rows around one, two and four vectors of pixels, output channels around the tile, strides, dilation, groups."""
    draw = random.Random(f"{isa} {layout}")
    with testing.forced_isa(isa):
        for width in (*range(1, 30), 31, 32, 33, 47, 63, 64, 65, 130):
            channels, out, groups = draw.randint(1, 10), draw.randint(1, 19), draw.choice((1, 1, 2, 3))
            kernel, stride = (draw.randint(1, 4), draw.randint(1, 7)), (draw.randint(1, 3), draw.randint(1, 3))
            padding, dilation, height = (draw.randint(0, 2), draw.randint(0, 3)), (1, draw.choice((1, 1, 2))), 9
            if width + 2 * padding[1] < (kernel[1] - 1) * dilation[1] + 1:
                continue
            dtype, geometry = draw.choice((torch.float32, torch.float64)), (stride, padding, dilation, groups)
            x, w, b = make(
                2, channels * groups, height, width, out * groups, kernel, groups, dtype, layout, draw=testing.integers
            )
            leaves = [t.requires_grad_() for t in (x, w, b)]
            # The oracle in NCHW: torch's channels_last kernel ends the process where a kernel lies wholly in the padding.
            plain = [t.detach().contiguous().requires_grad_() for t in leaves]
            stock, ours = F.conv2d(*plain, *geometry), conv2d(*leaves, *geometry)
            name = f"{isa} {dtype} {channels}x{width}->{out} {kernel} {geometry}"
            assert torch.equal(ours, stock), name
            grad = testing.integers(stock.shape, dtype)
            grads = torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(stock, plain, grad)
            for one, want in zip(*grads, strict=True):
                assert torch.equal(one, want), name


@pytest.mark.parametrize("dtype", testing.HALF_DTYPES)
def test_whole_numbers_are_exact_in_half_dtypes(dtype):
    for isa, layout, algorithm in itertools.product(ISAS, LAYOUTS, ALGORITHMS):
        for size, k, kernel, *geometry in PROBLEMS:
            x, w, b = make(
                *size, k, kernel, geometry[-1], dtype, layout, draw=lambda *a, **o: testing.integers(*a, -1, 1, **o)
            )
            with forced(isa, algorithm):
                ours = conv2d(x, w, b, *geometry)
            assert torch.equal(ours, F.conv2d(x.float(), w.float(), b.float(), *geometry).to(dtype)), (
                isa,
                algorithm,
                size,
            )


def test_the_choice_of_algorithm():
    def chosen(c, k, kernel, groups=1, stride=(1, 1), layout="contiguous"):
        x, w, _ = make(1, c, 8, 8, k, kernel, groups, layout=layout)
        return _C._conv2d_algorithm(x, w, stride, [kernel // 2] * 4, (1, 1), groups)

    assert chosen(16, 32, 1) == "pointwise"
    assert chosen(16, 32, 1, stride=(2, 2)) == chosen(8, 8, 3) == chosen(40, 40, 3, 4) == "implicit"
    assert chosen(16, 16, 3, 16) == chosen(16, 32, 3, 16) == chosen(32, 32, 3, 8) == "direct"
    assert chosen(32, 32, 3, 8, layout="channels_last") == "direct"
    assert chosen(64, 64, 3) == chosen(64, 64, 3, 2) == "winograd2"
    assert chosen(32, 64, 3, 8, layout="channels_last") == "implicit"  # eight output channels fill a vector
    with pytest.raises(
        ValueError, match="must be one of pointwise, implicit, direct, winograd2, winograd4, linear; got 'fft'"
    ):
        _C._force_conv2d_algorithm("fft")


WHOLE = [(1, 5, 1, 1, 7), (3, 67, 1, 1, 40), (2, 4, 3, 2, 9), (5, 6, 7, 7, 3), (1, 1, 4, 9, 1)]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_a_window_as_large_as_the_image_is_linears_problem(isa, dtype):
    """Forward and gradients, to the last bit; both ways of laying out, and mixtures, which are no rows."""
    with testing.forced_isa(isa):
        for n, c, h, w, k in WHOLE:
            values = [
                testing.integers(shape, dtype, -1, 1) for shape in ((n, c, h, w), (k, c, h, w), (k,), (n, k, 1, 1))
            ]
            for one, other in itertools.product(LAYOUTS, LAYOUTS):
                x, weight = strides(one, values[0]), strides(other, values[1])
                same = one == other or (h, w) == (1, 1)
                assert (_C._conv2d_algorithm(x, weight, (1, 1), [0] * 4, (1, 1), 1) == "linear") is same or c == 1
                ours = grads_and_output(lambda *t: conv2d(*t, activation="relu"), x, weight, *values[2:])
                stock = grads_and_output(lambda *t: F.conv2d(*t).relu(), *(t.double() for t in values))
                assert all(torch.equal(a, b.to(dtype)) for a, b in zip(ours, stock, strict=True)), (one, other, c, h, w)
            packed = ops.conv2d_pack(values[1], 1, False)
            assert torch.equal(
                conv2d(*values[:3], packed=packed), F.conv2d(*(t.double() for t in values[:3])).to(dtype)
            )
    with testing.forced("conv2d", "implicit"):
        assert _C._conv2d_algorithm(values[0], values[1], (1, 1), [0] * 4, (1, 1), 1) == "implicit"


def grads_and_output(f, x, weight, bias, grad):
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    output = f(*leaves)
    return output.detach(), *torch.autograd.grad(output, leaves, grad)


def strides(layout, tensor):
    return testing.laid_out(tensor, layout)


@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_layouts_of_input_and_weight(dtype):
    x, w, b = make(3, 6, 9, 10, 8, 3, 2, dtype)
    every = (*testing.LAYOUTS, "channels_last")
    for one, other in itertools.product(every, ("contiguous", "transposed", "channels_last")):
        check(strides(one, x), strides(other, w), b, 1, 1, 1, 2, name=f"{one} {other}")
    check(x[:, ::2, 1:-1, 2:], w[:, :, :2].repeat(1, 1, 1, 1)[:, :3], b, 2, 1, name="slices")
    check(x.contiguous(memory_format=torch.channels_last)[:, 2:5, ::2], w, b[::1], 1, 1, name="channel slices")
    check(x, w, torch.cat([b, b])[::2], 1, 1, 1, 2, name="bias with a stride")
    check(x.flip(0)[:, :, :1].expand(3, 6, 9, 10), w, b, 1, 1, 1, 2, name="expanded rows")
    check(x[:, :, :, :1].expand(3, 6, 9, 10), w, b, 1, 1, 1, 2, name="expanded columns")
    check(x[:, :1].expand(3, 6, 9, 10), w, b, 1, 1, 1, 2, name="expanded channels")


def test_memory_format_of_the_result_is_torchs():
    for layout, other in itertools.product(LAYOUTS, LAYOUTS):
        for size, k, kernel, stride, padding, dilation, groups in PROBLEMS:
            x, w = (
                strides(layout, testing.random(size)),
                strides(other, testing.random((k, size[1] // groups, *pair(kernel)))),
            )
            ours, stock = (
                conv2d(x, w, None, stride, padding, dilation, groups),
                F.conv2d(x, w, None, stride, padding, dilation, groups),
            )
            for f in (torch.contiguous_format, torch.channels_last):
                assert ours.is_contiguous(memory_format=f) == stock.is_contiguous(memory_format=f), (
                    layout,
                    other,
                    size,
                )


def test_unbatched_and_empty():
    x, w, b = make(1, 4, 6, 7, 5, 3)
    check(x[0], w, b, 1, 1, activation="gelu", name="unbatched")
    assert conv2d(x[0].requires_grad_(), w, b).shape == (5, 4, 5)
    for shape, weight, padding in [
        ((0, 4, 6, 7), (5, 4, 3, 3), 0),
        ((2, 0, 6, 7), (5, 0, 3, 3), 1),
        ((0, 4, 6, 7), (4, 1, 3, 3), 1),
    ]:
        groups = shape[1] // weight[1] if weight[1] else 1
        for layout in LAYOUTS:
            x = strides(layout, torch.randn(shape)).requires_grad_()
            w, b = torch.randn(weight, requires_grad=True), torch.randn(weight[0], requires_grad=True)
            ours, stock = conv2d(x, w, b, 1, padding, 1, groups), F.conv2d(x, w, b, 1, padding, 1, groups)
            assert torch.equal(ours, stock)
            leaves = (x, w, b)
            grads = torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(stock.sum(), leaves)
            for one, want in zip(*grads, strict=True):
                assert torch.equal(one, want)


def test_named_padding():
    for kernel, dilation in itertools.product([1, 2, 3, (2, 5), (4, 1)], [1, 2, (3, 1)]):
        for layout, groups in itertools.product(LAYOUTS, (1, 6)):
            x, w, b = make(2, 6, 7, 9, 6, kernel, groups, torch.float64, layout)
            for padding in ("same", "valid"):
                if padding == "valid" and any(
                    (s - 1) * d >= n for s, d, n in zip(pair(kernel), pair(dilation), (7, 9), strict=True)
                ):
                    continue
                ours, stock = (
                    conv2d(x, w, b, 1, padding, dilation, groups),
                    F.conv2d(x, w, b, 1, padding, dilation, groups),
                )
                assert ours.shape == stock.shape
                torch.testing.assert_close(ours, stock)


def test_forms_of_the_arguments():
    x, w, _ = make(1, 2, 7, 8, 3, 3)
    for stride, padding, dilation in [
        ([2, 1], [0, 1], [1, 2]),
        ((2,), (1,), (1,)),
        (torch.tensor(2), torch.tensor(1), 1),
    ]:
        assert torch.allclose(
            conv2d(x, w, None, stride, padding, dilation), F.conv2d(x, w, None, stride, padding, dilation), atol=1e-5
        )
    assert torch.allclose(conv2d(input=x, weight=w, padding=1), F.conv2d(input=x, weight=w, padding=1), atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("side", ["after", "before"])
def test_nothing_is_touched_out_of_bounds(isa, side):
    for dtype, layout, algorithm in itertools.product(testing.DTYPES, LAYOUTS, (None, *ALGORITHMS)):
        if algorithm and dtype == torch.float16:
            continue  # as bfloat16
        for size, k, kernel, *geometry in PROBLEMS:
            x, w, b = (
                testing.guarded(t, side).requires_grad_() for t in make(*size, k, kernel, geometry[-1], dtype, layout)
            )
            grad = testing.guarded(testing.random(F.conv2d(x, w, b, *geometry).shape, dtype, layout), side)
            with testing.guarded_outputs(side), forced(isa, algorithm):
                y = conv2d(x, w, b, *geometry, activation="silu" if size[0] == 1 else None)
                grads = torch.autograd.grad(y, (x, w, b), grad)
                packed = ops.conv2d_pack(w.detach(), geometry[-1], layout == "channels_last")
                again = conv2d(x.detach(), w.detach(), b.detach(), *geometry, packed=packed)
            assert all(t.isfinite().all() for t in (y, again, *grads)), (isa, dtype, layout, algorithm, size)


def grads_of(f, tensors, grad):
    leaves = [t.detach().requires_grad_() for t in tensors]
    return torch.autograd.grad(f(*leaves), leaves, grad)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("algorithm", [None, "direct"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_backward(isa, algorithm, layout):
    for dtype, activation, problem in zip(
        itertools.cycle(testing.DTYPES), itertools.cycle([None, "relu", "gelu"]), PROBLEMS * 2, strict=False
    ):
        with forced(isa, algorithm):
            check_backward(dtype, activation, layout, *problem, name=f"{isa} {algorithm}")


def check_backward(dtype, activation, layout, size, k, kernel, *arguments, name):
    """Gradients of one problem against the oracle's, with torch's own error beside them."""
    tensors = make(*size, k, kernel, arguments[-1], dtype, layout)
    stride, padding, dilation, groups = arguments
    geometry = pair(stride), four(padding), pair(dilation), groups
    grad = testing.random(F.conv2d(*tensors, *arguments).shape, dtype, layout)
    double = [t.double() for t in tensors]
    ours = grads_of(lambda *t: conv2d(*t, *arguments, activation=activation), tensors, grad)
    oracle = grads_of(lambda *t: reference.conv2d(*t, *geometry, activation), double, grad.double())
    stock = grads_of(lambda *t: reference.activate(F.conv2d(*t, *arguments), activation), tensors, grad)
    sizes = grads_of(lambda *t: reference.conv2d(*t, *geometry), [t.abs() for t in double], grad.double().abs())
    scale = 1.2
    if activation == "gelu":  # the sums' own error, times f'' <= 1.2
        z = reference.conv2d(*(t.abs() for t in double), *geometry)
        scale += 1.2 * z.max().item()
    if dtype in testing.HALF_DTYPES:  # the gradient behind the activation is rounded to the dtype, as in torch
        scale += 2 * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps / 8
    for what, one, want, its, magnitude in zip("xwb", ours, oracle, stock, sizes, strict=True):
        title = f"{name} {layout} {dtype} {activation} {size} {k} {kernel} {arguments} d{what}"
        testing.assert_close_to_oracle(one, want, magnitude * scale + 1e-3, its, name=title)


@pytest.mark.parametrize("activation", [None, *testing.ACTIVATIONS])
def test_gradcheck(activation):
    x, w, b = (t.requires_grad_() for t in make(2, 4, 4, 3, 4, 2, 2, torch.float64))
    f = lambda x, w, b: conv2d(x, w, b, (2, 1), 1, 1, 2, activation=activation)  # noqa: E731
    assert torch.autograd.gradcheck(f, (x, w, b))
    assert torch.autograd.gradgradcheck(f, (x, w, b))


def test_gradcheck_of_every_kind():
    kinds = [((1, 2, 4, 5), 2, 3, 1, 1, 1, 2), ((1, 3, 3, 4), 2, 1, 1, 0, 1, 1), ((2, 2, 5, 4), 2, 2, 3, 1, 2, 1)]
    for layout, problem in itertools.product(LAYOUTS, kinds):
        size, k, kernel, *geometry = problem
        x, w, _ = (t.requires_grad_() for t in make(*size, k, kernel, geometry[-1], torch.float64, layout))
        assert torch.autograd.gradcheck(lambda x, w, g=geometry: conv2d(x, w, None, *g), (x, w))
        assert torch.autograd.gradgradcheck(lambda x, w, g=geometry: conv2d(x, w, None, *g), (x, w))
    x, w, b = (t.requires_grad_() for t in make(1, 2, 4, 4, 2, 2, dtype=torch.float64))
    assert torch.autograd.gradgradcheck(
        lambda x, w, b: conv2d(x[0], w, b, padding="same", activation="tanh"), (x, w, b)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_change_no_bit(layout):
    for size, k, kernel, *geometry in [
        ((2, 40, 30, 31), 50, 3, 1, 1, 1, 1),
        ((1, 130, 14, 14), 70, 1, 1, 0, 1, 1),
        ((3, 48, 28, 28), 48, 5, 2, 2, 1, 48),
        ((2, 32, 25, 25), 64, 3, 1, 1, 1, 8),
        ((1, 3, 64, 64), 24, 7, 2, 3, 1, 1),
    ]:
        results = []
        for count in (1, 2, 3, 5):
            torch.manual_seed(1)
            x, w, b = (t.requires_grad_() for t in make(*size, k, kernel, geometry[-1], layout=layout))
            with testing.threads(count):
                y = conv2d(x, w, b, *geometry, activation="gelu")
                results.append((y, *torch.autograd.grad(y.square().sum(), (x, w, b))))
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True)), (size, k, kernel)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole(backend):
    module = torch.nn.Sequential(
        fastnn.nn.Conv2d(2, 6, 3, padding="same", activation="gelu"), fastnn.nn.Conv2d(6, 6, 3, 2, 1, groups=6)
    )
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    x = torch.randn(3, 2, 7, 8, requires_grad=True)
    torch.testing.assert_close(compiled(x), module(x))
    inputs = (x, *module.parameters())
    for ours, eager in zip(
        torch.autograd.grad(compiled(x).sum(), inputs), torch.autograd.grad(module(x).sum(), inputs), strict=True
    ):
        torch.testing.assert_close(ours, eager)


def test_no_aten_convolution_runs():
    for groups, layout in itertools.product((1, 6), LAYOUTS):
        module = fastnn.nn.Conv2d(6, 6, 3, groups=groups, activation="silu")
        x = strides(layout, torch.randn(2, 6, 9, 9)).requires_grad_()
        testing.assert_own_kernels(lambda x=x, module=module: module(x).sum().backward())


def test_opinfo_samples():
    """Every sample that PyTorch tests F.conv2d with."""
    (info,) = [op for op in op_db if op.name == "nn.functional.conv2d"]
    for dtype in testing.DTYPES:
        for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
            stock = F.conv2d(sample.input, *sample.args, **sample.kwargs)
            ours = conv2d(sample.input, *sample.args, **sample.kwargs)
            assert ours.shape == stock.shape and ours.requires_grad == stock.requires_grad
            loose = {"rtol": 2e-2, "atol": 2e-1} if dtype in testing.HALF_DTYPES else {"rtol": 1e-4, "atol": 1e-3}
            torch.testing.assert_close(ours, stock, **loose)
            leaves = [t for t in (sample.input, *sample.args) if isinstance(t, torch.Tensor) and t.requires_grad]
            leaves += [t for t in sample.kwargs.values() if isinstance(t, torch.Tensor) and t.requires_grad]
            grad = torch.randn_like(stock)
            for a, b in zip(
                torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(stock, leaves, grad), strict=True
            ):
                torch.testing.assert_close(a, b, **loose)
    for error in info.error_inputs("cpu"):
        sample = error.sample_input
        with pytest.raises(error.error_type):
            conv2d(sample.input, *sample.args, **sample.kwargs)


IMAGE, WEIGHT = torch.ones(1, 3, 5, 5), torch.ones(4, 3, 3, 3)


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        ((IMAGE, WEIGHT, None, 2, "same"), RuntimeError, "stride must be 1 with padding='same'"),
        (
            (IMAGE, WEIGHT, None, 1, "full"),
            RuntimeError,
            "padding must be an int, a pair, 'same' or 'valid'; got 'full'",
        ),
        ((IMAGE, WEIGHT, None, 1, -1), RuntimeError, "padding must not be negative"),
        ((IMAGE, WEIGHT, None, 0), RuntimeError, "stride must be positive"),
        ((IMAGE, WEIGHT, None, 1, 0, 0), RuntimeError, "dilation must be positive"),
        ((IMAGE, WEIGHT, None, 1, 0, 1, 0), RuntimeError, "groups must be positive"),
        ((IMAGE, WEIGHT, None, 1, 0, 1, 2), RuntimeError, "input must have 6 channels"),
        (
            (IMAGE, torch.ones(5, 3, 3, 3), None, 1, 0, 1, 2),
            RuntimeError,
            "weight must have a positive multiple of groups",
        ),
        ((IMAGE, WEIGHT[:0]), RuntimeError, "weight must have a positive multiple of groups"),
        ((IMAGE, WEIGHT[:, :, :0]), RuntimeError, "kernel size above zero"),
        ((IMAGE, WEIGHT, None, (1, 1, 1)), RuntimeError, "stride must be an int or a pair"),
        ((IMAGE, WEIGHT, None, 1.5), TypeError, "stride must be an int or a pair"),
        ((IMAGE, WEIGHT, None, "1"), TypeError, "stride must be an int or a pair"),
        ((IMAGE, WEIGHT, torch.ones(3)), RuntimeError, r"bias must be \[4\]"),
        ((IMAGE, WEIGHT, torch.ones(4, 1)), RuntimeError, r"bias must be \[4\]"),
        ((IMAGE, WEIGHT, torch.ones(4).double()), RuntimeError, "bias must have the dtype of input"),
        ((IMAGE.double(), WEIGHT), RuntimeError, "weight must have the dtype of input"),
        ((IMAGE[0, 0], WEIGHT), RuntimeError, "input must be"),
        ((IMAGE, WEIGHT[0]), RuntimeError, "weight must be"),
        ((IMAGE[:, :, :2, :2], WEIGHT), RuntimeError, "no smaller than the dilated kernel"),
        ((IMAGE[:, :, :0], WEIGHT, None, 1, 2), RuntimeError, "must not be empty"),
        (([1.0], WEIGHT), TypeError, "input must be a Tensor; got list"),
        ((IMAGE, WEIGHT, 1.0), TypeError, "bias must be a Tensor"),
    ],
)
def test_errors_are_of_torchs_kind(args, error, text):
    with pytest.raises(error):
        F.conv2d(*args)
    with pytest.raises(error, match=f"fastnn.conv2d: .*{text}"):
        conv2d(*args)


def test_unknown_activation():
    with pytest.raises(ValueError, match=r"activation must be None or one of relu, gelu.*got 'swish'"):
        conv2d(IMAGE, WEIGHT, activation="swish")


def test_fallback_serves_what_has_no_kernel():
    x, w = torch.ones(1, 2, 4, 4, dtype=torch.complex64), torch.ones(3, 2, 3, 3, dtype=torch.complex64)
    torch.testing.assert_close(conv2d(x, w, padding="same"), F.conv2d(x, w, padding="same"))
    fastnn.set_fallback("error")
    try:
        with pytest.raises(RuntimeError, match=r"dtype torch.complex64 has no kernel"):
            conv2d(x, w)
    finally:
        fastnn.set_fallback("torch")


def test_meta_device():
    image, weight = (torch.empty(s, device="meta") for s in ((2, 4, 5, 6), (8, 2, 3, 3)))
    assert conv2d(image, weight, None, 2, 1, 1, 2).shape == (2, 8, 3, 3)
    last = conv2d(image.to(memory_format=torch.channels_last), weight, groups=2)
    assert last.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="input must have 2 channels"):
        conv2d(image, weight)


# ---------------------------------------------------------------------------------------------------- module


def test_module_is_torchs_with_an_activation():
    stock, ours = torch.nn.Conv2d(4, 6, 3, 2, 1, groups=2), fastnn.nn.Conv2d(4, 6, 3, 2, 1, groups=2)
    assert isinstance(ours, torch.nn.Conv2d) and repr(ours) == repr(stock)
    assert repr(fastnn.nn.Conv2d(5, 3, 1, activation="relu")).endswith("stride=(1, 1), activation='relu')")
    ours.load_state_dict(stock.state_dict())
    stock.load_state_dict(ours.state_dict())
    for x in (
        torch.randn(2, 4, 7, 8),
        torch.randn(4, 7, 8),
        torch.randn(2, 4, 7, 8).to(memory_format=torch.channels_last),
    ):
        torch.testing.assert_close(ours(x), stock(x))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, "same"])
def test_padding_modes(mode, padding):
    stock = torch.nn.Conv2d(2, 3, (3, 2), padding=padding, padding_mode=mode)
    ours = fastnn.nn.Conv2d(2, 3, (3, 2), padding=padding, padding_mode=mode)
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(2, 2, 6, 7)
    assert repr(ours) == repr(stock)
    torch.testing.assert_close(ours(x), stock(x))


def test_frozen_weights_are_packed_once_and_never_stale():
    for groups, layout in itertools.product((1, 8), LAYOUTS):
        module = fastnn.nn.Conv2d(8, 24, 3, padding=1, groups=groups)
        module._freeze()
        x = strides(layout, torch.randn(2, 8, 9, 9))
        stock = lambda m=module, x=x, g=groups: F.conv2d(x, m.weight, m.bias, 1, 1, 1, g)  # noqa: E731
        with torch.no_grad():
            torch.testing.assert_close(module(x), stock())
            (first,) = module._pack[1].values()
            module(x)
            assert next(iter(module._pack[1].values())) is first and len(module._pack[1]) == 1
            module.weight.mul_(2)
            torch.testing.assert_close(module(x), stock())
            module.weight.data = torch.randn_like(module.weight)
            torch.testing.assert_close(module(x), stock())
            for isa in ISAS:
                with testing.forced_isa(isa):
                    torch.testing.assert_close(module(x), stock())
            other = strides(LAYOUTS[layout == "contiguous"], x)
            torch.testing.assert_close(module(other), stock())
        assert module(x).requires_grad  # with gradients the weight itself is used
        for clone in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert clone._frozen and clone._pack is None
            with torch.no_grad():
                assert torch.equal(clone(x), module(x))
        module._thaw()
        assert not module._frozen and "_pack" not in module.__dict__


@pytest.mark.parametrize("isa", ISAS)
def test_packed_weights_give_the_same_bits(isa):
    for dtype, layout, algorithm in itertools.product(testing.DTYPES, LAYOUTS, (None, "implicit", "direct")):
        for size, k, kernel, *geometry in PROBLEMS:
            with forced(isa, algorithm), direct_sums():
                x, w, b = make(*size, k, kernel, geometry[-1], dtype, layout)
                packed = ops.conv2d_pack(w, geometry[-1], layout == "channels_last")
                plain, frozen = conv2d(x, w, b, *geometry), conv2d(x, w, b, *geometry, packed=packed)
                assert torch.equal(plain, frozen), (isa, dtype, layout, algorithm, size)
                poisoned = conv2d(x, torch.full_like(w, torch.nan), b, *geometry, packed=packed)
                assert torch.equal(poisoned, plain)  # the packed copy is what is read
    with pytest.raises(RuntimeError, match="packed must be what conv2d_pack made"):
        conv2d(IMAGE, WEIGHT, packed=torch.ones(3).double())
