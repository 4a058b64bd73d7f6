"""Winograd's algorithm of fastnn.functional.conv2d, forced: its error against float64 within the stated bound, its edges."""

import itertools
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

import fastnn
from fastnn import _C, reference, testing
from fastnn.functional import conv2d

ISAS = testing.available_isas()
LAYOUTS = ("contiguous", "channels_last")
TILES = (2, 4)
NORMAL = {2: 4.0, 4: 8.0}  # the bound that normal data keeps; testing.WINOGRAD_BOUND is for any
ops = torch.ops.fastnn


@contextmanager
def forced(isa=None, algorithm=None):
    """Run one ISA's kernels, one algorithm."""
    with testing.forced_isa(isa or _C.cpu_isa()), testing.forced("conv2d", algorithm):
        yield


def pair(value):
    return (value, value) if isinstance(value, int) else value


def four(padding):
    return [size for size in pair(padding) for _ in range(2)]


def make(n, c, h, w, k, groups=1, dtype=torch.float32, layout="contiguous"):
    shapes = (n, c, h, w), (k, c // groups, 3, 3)
    return *(testing.random(shape, dtype, layout) for shape in shapes), testing.random((k,), dtype)


def grads_of(f, tensors, grad):
    leaves = [t.detach().requires_grad_() for t in tensors]
    return torch.autograd.grad(f(*leaves), leaves, grad)


def winograd(tile, isa=None):
    return forced(isa, f"winograd{tile}")


def check(tile, x, w, b, padding, groups=1, activation=None, name="conv2d", packed=None, bound=NORMAL):
    """Forward of one problem within the bound; the slope of an activation is at most 1.2."""
    sides = padding if isinstance(padding, list) else four(padding)
    double = [None if t is None else t.double() for t in (x, w, b)]
    oracle = reference.conv2d(*double, (1, 1), sides, (1, 1), groups, activation)
    magnitude = reference.winograd_magnitude(x, w, b, sides, groups, tile)
    ours = conv2d(x, w, b, 1, sides, 1, groups, activation=activation, packed=packed)
    assert ours.dtype == x.dtype
    testing.assert_close_to_oracle(
        ours, oracle, 1.2 * magnitude + (activation is not None) * 1e-3, c=bound[tile], name=name
    )
    return ours


# (n, c, h, w), k, padding, groups
PROBLEMS = [
    ((1, 16, 8, 8), 16, 1, 1),
    ((2, 3, 11, 13), 5, 0, 1),
    ((1, 40, 14, 14), 33, 1, 1),
    ((3, 8, 7, 7), 12, 1, 2),
    ((1, 130, 6, 5), 20, 1, 1),  # three blocks of channels
    ((1, 17, 30, 29), 19, 2, 1),  # more than one block of tiles
    ((2, 7, 1, 40), 9, (1, 0), 1),
    ((1, 33, 40, 3), 50, 1, 1),
    ((1, 1, 3, 3), 1, 0, 1),
    ((0, 4, 6, 6), 8, 1, 1),
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_kernel(isa, tile, layout):
    for dtype, (size, k, padding, groups) in itertools.product(testing.DTYPES, PROBLEMS):
        with winograd(tile, isa):
            x, w, b = make(*size, k, groups, dtype, layout)
            check(tile, x, w, b, padding, groups, name=f"{isa} {tile} {dtype} {layout} {size}->{k} {padding} {groups}")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_edge_of_the_tile(isa, tile, layout):
    """In float64 an element out of place shows at once, in float32 the vectors are other ones."""
    with winograd(tile, isa):
        for dtype in (torch.float64, torch.float32):
            for h, w in itertools.product(range(1, 15), repeat=2):
                pads = [(h + w) % 3, h % 2 + 1, w % 3, (h * w) % 2 + 1]
                x, weight, b = make(1 + h % 2, 3, h, w, 5, 1, dtype, layout)
                if h + pads[0] + pads[1] >= 3 and w + pads[2] + pads[3] >= 3:
                    check(tile, x, weight, b, pads, name=f"{isa} {tile} {dtype} {layout} {h}x{w} {pads}")
            for c, k in itertools.product(
                (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 65), (1, 3, 4, 8, 9, 16, 17, 33)
            ):
                x, weight, b = make(1, c, 5, 6, k, 1, dtype, layout)
                check(tile, x, weight, b, 1, name=f"{isa} {tile} {dtype} {layout} {c}->{k}")
            for n, groups in itertools.product((1, 3, 17), (1, 2, 3, 5)):
                x, weight, b = make(n, 3 * groups, 5, 4, 4 * groups, groups, dtype, layout)
                check(tile, x, weight, b, (1, 0), groups, name=f"{isa} {tile} {dtype} {layout} {n} {groups}")


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("activation", [None, *testing.ACTIVATIONS])
def test_every_activation(tile, activation):
    for isa, layout, dtype in itertools.product(ISAS, LAYOUTS, (torch.float32, torch.bfloat16)):
        x, w, b = make(2, 9, 7, 18, 21, 1, dtype, layout)
        with winograd(tile, isa):
            check(tile, x, w, b, 1, 1, activation, f"{isa} {layout} {dtype} {activation}")
            check(tile, x, w, None, 1, 1, activation, f"{isa} {layout} {dtype} {activation} no bias")
            # With the value before the activation, as training keeps it.
            y, z = ops.conv2d_train(x, w, b, [1, 1], [1] * 4, [1, 1], 1, activation)
            assert torch.equal(z, conv2d(x, w, b, 1, 1)) and z.stride() == y.stride()
            assert torch.equal(y, conv2d(x, w, b, 1, 1, activation=activation))


def rms(t):
    return t.double().square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", [torch.float32, *testing.HALF_DTYPES])
@pytest.mark.parametrize("tile", TILES)
def test_the_error_beside_the_direct_sums_and_torchs(tile, dtype):
    """Root mean squares. The half dtypes round their results much more coarsely than any algorithm errs."""
    for c, layout in itertools.product((32, 256), LAYOUTS):
        x, w, b = make(1, c, 20, 20, 32, 1, dtype, layout)
        oracle = reference.conv2d(x.double(), w.double(), b.double(), padding=(1,) * 4)
        with forced(None, "implicit"):
            direct = rms(conv2d(x, w, b, 1, 1).double() - oracle)
        torchs = rms(F.conv2d(x, w, b, 1, 1).double() - oracle)
        with winograd(tile):
            ours = rms(conv2d(x, w, b, 1, 1).double() - oracle)
        most = 1.05 if dtype in testing.HALF_DTYPES else {2: 3, 4: 8}[tile]
        assert ours <= most * max(direct, torchs), f"{c} {layout}: {ours:.3g}, direct {direct:.3g}, torch {torchs:.3g}"


@pytest.mark.parametrize("tile", TILES)
def test_the_bound_holds_for_inputs_made_to_break_it(tile):
    """Signs, powers of ten, a flat image, a spike in each place of the tile, weights that are one point's filter."""
    draws = {
        "signs": lambda *s: torch.randn(*s).sign(),
        "wide": lambda *s: torch.randn(*s) * 10 ** torch.empty(*s).uniform_(-6, 6),
        "flat": lambda *s: torch.full(s, 1 / 3),
        "uniform": lambda *s: torch.rand(*s),
        "alternating": lambda *s: torch.arange(s[-1]).remainder(2).mul(2).sub(1).expand(s) / 3.0,
    }
    with winograd(tile):
        for (one, draw), (other, draw_weight) in itertools.product(draws.items(), repeat=2):
            for c in (1, 3, 64):
                check(
                    tile,
                    draw(2, c, 13, 14),
                    draw_weight(9, c, 3, 3),
                    None,
                    1,
                    name=f"{one} {other} {c}",
                    bound=testing.WINOGRAD_BOUND,
                )
        for i in range(64):
            x = torch.full((1, 1, 8, 8), 1e-3)
            x.view(-1)[i] = 1e6
            check(tile, x, torch.randn(5, 1, 3, 3), None, 1, name=f"spike at {i}", bound=testing.WINOGRAD_BOUND)
        points = torch.tensor([0, 0.625, -0.625, 1.5, -1.5, 1, -1])
        rows = torch.stack([points.pow(0), points, points.square()], 1).sign()
        for row, column in itertools.product(rows, rows):
            x = torch.randn(2, 8, 9, 9).sign()
            check(
                tile,
                x,
                (row[:, None] * column).expand(3, 8, 3, 3),
                None,
                1,
                name=f"{row} {column}",
                bound=testing.WINOGRAD_BOUND,
            )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("side", ["after", "before"])
@pytest.mark.parametrize("tile", TILES)
def test_nothing_is_touched_out_of_bounds(isa, side, tile):
    for dtype, layout in itertools.product((torch.float32, torch.bfloat16, torch.float64), LAYOUTS):
        for size, k, padding, groups in PROBLEMS:
            x, w, b = (testing.guarded(t, side).requires_grad_() for t in make(*size, k, groups, dtype, layout))
            grad = testing.guarded(testing.random(F.conv2d(x, w, b, 1, padding, 1, groups).shape, dtype, layout), side)
            with testing.guarded_outputs(side), winograd(tile, isa):
                y = conv2d(x, w, b, 1, padding, 1, groups, activation="silu" if size[0] == 1 else None)
                grads = torch.autograd.grad(y, (x, w, b), grad)
                packed = ops.conv2d_pack(w.detach(), groups, layout == "channels_last")
                again = conv2d(x.detach(), w.detach(), b.detach(), 1, padding, 1, groups, packed=packed)
            assert all(t.isfinite().all() for t in (y, again, *grads)), (isa, dtype, layout, size)


# (n, c, h, w), k, padding, groups, dilation: a row of tiles within one group of columns, over several, with empty tiles
DILATED = [
    ((1, 5, 9, 11), 7, (2, 2), 1, (2, 2)),
    ((2, 18, 23, 14), 20, (3, 1), 2, (3, 2)),
    ((1, 3, 33, 35), 4, (12, 16), 1, (12, 16)),
    ((1, 17, 6, 70), 33, (1, 0), 1, (1, 5)),
    ((1, 4, 30, 5), 5, (0, 7), 1, (7, 7)),
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_dilation_makes_images_of_every_few_pixels(isa, tile, layout):
    """Each such image convolved by itself gives the same bits; the gradients are those of the direct sum."""
    for dtype, (size, k, padding, groups, (dy, dx)) in itertools.product(testing.DTYPES, DILATED):
        x, w, b = make(*size, k, groups, dtype, layout)
        name = (isa, tile, layout, dtype, size)
        with winograd(tile, isa):
            ours = conv2d(x, w, b, 1, padding, (dy, dx), groups, activation="gelu")
            padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
            for row, column in itertools.product(range(min(dy, ours.shape[2])), range(min(dx, ours.shape[3]))):
                part = testing.laid_out(padded[:, :, row::dy, column::dx], layout)
                alone = conv2d(part, w, b, 1, 0, 1, groups, activation="gelu")
                assert torch.equal(ours[:, :, row::dy, column::dx], alone), name
            packed = ops.conv2d_pack(w, groups, layout == "channels_last")
            assert torch.equal(conv2d(x, w, b, 1, padding, (dy, dx), groups, activation="gelu", packed=packed), ours)
            if dtype == torch.float64:
                grad = torch.randn_like(ours)
                grads = grads_of(lambda *t, a=(1, padding, (dy, dx), groups): conv2d(*t, *a), (x, w, b), grad)
                stock = grads_of(lambda *t, a=(1, padding, (dy, dx), groups): F.conv2d(*t, *a), (x, w, b), grad)
                torch.testing.assert_close(grads, stock, rtol=1e-11, atol=1e-11, msg=str(name))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("side", ["after", "before"])
@pytest.mark.parametrize("tile", TILES)
def test_nothing_is_touched_out_of_bounds_with_a_dilation(isa, side, tile):
    for dtype, layout in itertools.product((torch.float32, torch.bfloat16), LAYOUTS):
        for size, k, padding, groups, dilation in DILATED:
            x, w, b = (testing.guarded(t, side).requires_grad_() for t in make(*size, k, groups, dtype, layout))
            with testing.guarded_outputs(side), winograd(tile, isa):
                y = conv2d(x, w, b, 1, padding, dilation, groups)
                grad = testing.guarded(torch.ones_like(y), side)
                assert all(t.isfinite().all() for t in (y, *torch.autograd.grad(y, (x, w, b), grad)))


@pytest.mark.parametrize("tile", TILES)
def test_layouts_of_input_and_weight(tile):
    for dtype in testing.DTYPES:
        x, w, b = make(3, 6, 9, 10, 8, 2, dtype)
        every = (*testing.LAYOUTS, "channels_last")
        with winograd(tile):
            for one, other in itertools.product(every, ("contiguous", "transposed", "channels_last", "strided")):
                name = f"{dtype} {one} {other}"
                check(tile, testing.laid_out(x, one), testing.laid_out(w, other), b, 1, 2, name=name)
            check(tile, x[:, ::2, 1:-1, 2:], w.flip(0)[::2], b[:4], 1, name="slices")
            last = x.contiguous(memory_format=torch.channels_last)
            check(tile, last[:, 2:5, ::2], w, b, 1, name="channel slices")
            check(tile, x[:, :, :, :1].expand(3, 6, 9, 10), w, b, 1, 2, name="expanded columns")
            check(tile, x[:, :1].expand(3, 6, 9, 10), w, b, 1, 2, name="expanded channels")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_backward(isa, tile, layout):
    """The gradient of the input is the same algorithm with the filter turned; the others are as without it."""
    for dtype, activation, (size, k, padding, groups) in zip(
        itertools.cycle(testing.DTYPES), itertools.cycle([None, "relu", "gelu"]), PROBLEMS * 2, strict=False
    ):
        tensors = make(*size, k, groups, dtype, layout)
        grad = testing.random(F.conv2d(*tensors, 1, padding, 1, groups).shape, dtype, layout)
        with winograd(tile, isa):
            ours = grads_of(lambda *t, p=padding, g=groups: conv2d(*t, 1, p, 1, g), tensors, grad)
        with forced(isa, "implicit"):
            direct = grads_of(lambda *t, p=padding, g=groups: conv2d(*t, 1, p, 1, g), tensors, grad)
        assert torch.equal(ours[1], direct[1]) and torch.equal(ours[2], direct[2])
        x, w, _ = tensors
        turned = w.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flip(2, 3)
        rows, columns = (2 - p for p in pair(padding))
        sides = [rows, rows, columns, columns]
        oracle = torch.nn.grad.conv2d_input(x.shape, w.double(), grad.double(), 1, padding, 1, groups)
        magnitude = reference.winograd_magnitude(grad, turned, None, sides, groups, tile)
        name = f"{isa} {tile} {layout} {dtype} {size} {k}"
        testing.assert_close_to_oracle(ours[0], oracle, magnitude, c=NORMAL[tile], name=name)
        if activation:
            with winograd(tile, isa):
                x.requires_grad_()
                y = conv2d(x, *tensors[1:], 1, padding, 1, groups, activation=activation)
                assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_in_bands(isa, tile, layout):
    """Images, rows and groups in bands, whose filter is kept or not: the gradients are those of the direct sum."""
    for size, k, padding, groups in (
        ((9, 16, 31, 30), 32, 1, 1),
        ((1, 12, 131, 127), 20, 1, 1),
        ((1, 20, 101, 97), 32, 2, 2),
        ((3, 20, 79, 80), 32, 0, 4),
    ):
        x, w, b = make(*size, k, groups, torch.float64, layout)
        grad = testing.random(F.conv2d(x, w, b, 1, padding, 1, groups).shape, torch.float64, layout)
        with winograd(tile, isa):
            ours = grads_of(lambda *t, a=(1, padding, 1, groups): conv2d(*t, *a, activation="relu"), (x, w, b), grad)
        stock = grads_of(lambda *t, a=(1, padding, 1, groups): F.conv2d(*t, *a).relu(), (x, w, b), grad)
        torch.testing.assert_close(ours, stock, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tile", TILES)
def test_gradcheck(tile):
    for layout, groups in itertools.product(LAYOUTS, (1, 2)):
        x, w, b = (t.requires_grad_() for t in make(1, 2, 3, 5, 2, groups, torch.float64, layout))
        f = lambda x, w, b, g=groups: conv2d(x, w, b, 1, (1, 2), 1, g, activation="tanh")  # noqa: E731
        with winograd(tile):
            assert torch.autograd.gradcheck(f, (x, w, b))
            assert torch.autograd.gradgradcheck(f, (x, w, b))


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_and_runs_change_no_bit(tile, layout):
    for size, k, padding, groups in [
        ((2, 40, 30, 31), 50, 1, 1),
        ((1, 130, 14, 14), 70, 1, 1),
        ((1, 200, 5, 5), 90, 1, 1),
        ((3, 48, 9, 9), 48, 0, 2),
        ((1, 32, 61, 61), 32, 1, 1),
    ]:
        torch.manual_seed(1)
        x, w, b = (t.requires_grad_() for t in make(*size, k, groups, layout=layout))
        results = []
        for count in (1, 2, 2, 3, 5, 16):
            with testing.threads(count), winograd(tile):
                y = conv2d(x, w, b, 1, padding, 1, groups, activation="gelu")
                results.append((y, *torch.autograd.grad(y.square().sum(), (x, w, b))))
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True)), (size, k)


@pytest.mark.parametrize("isa", ISAS)
def test_packed_weights_give_the_same_bits(isa):
    for dtype, layout, tile in itertools.product(testing.DTYPES, LAYOUTS, TILES):
        for size, k, padding, groups in PROBLEMS:
            with winograd(tile, isa):
                x, w, b = make(*size, k, groups, dtype, layout)
                packed = ops.conv2d_pack(w, groups, layout == "channels_last", f"winograd{tile}")
                plain, frozen = (conv2d(x, w, b, 1, padding, 1, groups, packed=p) for p in (None, packed))
                assert torch.equal(plain, frozen), (isa, dtype, layout, tile, size)
                poisoned = conv2d(x, torch.full_like(w, torch.nan), b, 1, padding, 1, groups, packed=packed)
                assert torch.equal(poisoned, plain)  # the packed copy is what is read


def test_a_pack_of_another_kind_is_never_misread():
    """Made for another algorithm, layout or ISA, or with the switch turned since."""
    x, w, b = make(1, 32, 24, 24, 32)
    last = x.contiguous(memory_format=torch.channels_last)
    packs = []
    for isa, layout, algorithm in itertools.product(ISAS, (False, True), ("implicit", "winograd2", "winograd4")):
        with testing.forced_isa(isa):
            packs.append((isa, layout, algorithm, ops.conv2d_pack(w, 1, layout, algorithm)))
    for isa, algorithm in itertools.product(ISAS, (None, "implicit", "winograd2", "winograd4")):
        with forced(isa, algorithm):
            for input in (x, last):
                plain = conv2d(input, w, b, 1, 1)
                for *made_for, packed in packs:
                    if made_for[2] == "implicit" and made_for[0] != isa:
                        continue  # frozen modules keep these apart
                    given = conv2d(input, w, b, 1, 1, packed=packed)
                    assert torch.equal(given, plain), (isa, algorithm, made_for)
    with pytest.raises(ValueError, match=r"algorithm must be one of pointwise, .*got 'fft'"):
        ops.conv2d_pack(w, 1, False, "fft")
    with pytest.raises(ValueError, match="algorithm must fit the weight"):
        ops.conv2d_pack(torch.ones(32, 32, 5, 5), 1, False, "winograd4")
    torch.library.opcheck(ops.conv2d_pack, (w, 1, False, "winograd4"))


def chosen(n, c, h, w, k, groups=1, frozen=False, kernel=3, stride=1, dilation=1, padding=1, dtype=torch.float32):
    x, weight = torch.ones(n, c, h, w, dtype=dtype), torch.ones(k, c // groups, kernel, kernel, dtype=dtype)
    return _C._conv2d_algorithm(x, weight, pair(stride), four(padding), pair(dilation), groups, frozen)


def test_the_choice():
    for frozen in (False, True):
        for n, c, size in [(1, 64, 56), (1, 128, 28), (8, 256, 14), (1, 64, 224), (32, 32, 32), (4, 512, 28)]:
            assert chosen(n, c, size, size, c, frozen=frozen) == "winograd4", (n, c, size)
        assert chosen(1, 64, 30, 31, 64, 2, frozen) == "winograd4"
        assert chosen(1, 256, 28, 28, 256, frozen=frozen, dilation=2, padding=2) == "winograd4"
        assert (
            chosen(1, 128, 33, 33, 128, frozen=frozen, dilation=16, padding=16) == "implicit"
        )  # three pixels an image
        for other in (
            {"kernel": 1, "padding": 0},
            {"kernel": 5},
            {"stride": 2},
            {"stride": (1, 2)},
            {"dilation": 17},
            {"dtype": torch.float64},
            {"groups": 64},
        ):
            assert not chosen(1, 64, 56, 56, 64, frozen=frozen, **other).startswith("winograd"), other
        assert chosen(1, 3, 224, 224, 64, frozen=frozen) == chosen(1, 64, 56, 56, 8, frozen=frozen) == "implicit"
        assert chosen(1, 512, 1, 1, 512, frozen=frozen) == "implicit"  # one tile, most of it thrown away
    assert chosen(1, 512, 7, 7, 512, frozen=True) == "winograd2"  # a quarter of a tile of 4 is waste
    assert chosen(1, 512, 7, 7, 512) == "implicit"  # not worth making the filter
    for dtype in testing.HALF_DTYPES:
        assert chosen(1, 64, 56, 56, 64, dtype=dtype) == "winograd4"


def test_forced_where_it_does_not_fit():
    for algorithm in ("winograd2", "winograd4"):
        with forced(None, algorithm):
            for other in ({"kernel": 1, "padding": 0}, {"kernel": 5}, {"stride": 2}, {"dilation": 17}):
                assert chosen(1, 16, 50, 50, 16, **other) == "implicit"
            assert chosen(1, 16, 9, 9, 16) == chosen(1, 1, 3, 3, 1, dtype=torch.float64, padding=0) == algorithm


def test_training_runs_it_both_ways():
    """Forward and gradient of the input choose for themselves, by their own sizes."""
    x, w, b = (t.requires_grad_() for t in make(2, 32, 24, 24, 48))
    grad = torch.randn(2, 48, 24, 24)
    free = grads_of(lambda *t: conv2d(*t, 1, 1), (x, w, b), grad)
    assert chosen(2, 32, 24, 24, 48) == "winograd4"
    with winograd(4):
        assert torch.equal(conv2d(x, w, b, 1, 1), conv2d(x, w, b, 1, 1))
        forced_grads = grads_of(lambda *t: conv2d(*t, 1, 1), (x, w, b), grad)
    assert all(torch.equal(a, b) for a, b in zip(free, forced_grads, strict=True))
    with forced(None, "implicit"):
        direct = grads_of(lambda *t: conv2d(*t, 1, 1), (x, w, b), grad)
    assert not torch.equal(direct[0], free[0])


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_finite_stays_in_its_tiles(tile, layout):
    x, w, b = make(1, 16, 16, 16, 16, layout=layout)
    x[0, 3, 9, 9] = float("nan")
    with winograd(tile):
        bad = conv2d(x, w, b, 1, 1, activation="relu").isnan().any(1)[0]
    rows, columns = bad.any(1).nonzero(), bad.any(0).nonzero()
    assert bad[8:11, 8:11].all()
    for where in (rows, columns):
        assert where.min() >= 8 - (tile - 1) and where.max() <= 10 + (tile - 1)


def test_frozen_modules_pack_for_what_will_run():
    module = fastnn.nn.Conv2d(32, 32, 3, padding=1).requires_grad_(False)
    module._freeze()

    def packs():
        return {how[2] for how in module._pack[1]}

    big, small, tiny = torch.randn(1, 32, 24, 24), torch.randn(1, 32, 8, 8), torch.randn(32, 24, 24)
    module(big)
    assert packs() == {"winograd4"}
    module(tiny)
    assert packs() == {"winograd4"}
    module(small)
    assert chosen(1, 32, 8, 8, 32, frozen=True) == "winograd2" and packs() == {"winograd4", "winograd2"}
    kept = dict(module._pack[1])
    for x in (big, small, big):
        torch.testing.assert_close(module(x), F.conv2d(x, module.weight, module.bias, 1, 1), rtol=1e-4, atol=1e-4)
    assert all(module._pack[1][how] is pack for how, pack in kept.items())
    module.weight.mul_(2)
    module(big)
    assert packs() == {"winograd4"}  # those of the old weight are gone
    same = fastnn.nn.Conv2d(32, 32, 3, padding="same", padding_mode="reflect").requires_grad_(False)
    plain = same(big)
    same._freeze()
    assert torch.equal(same(big), plain) and same._pack is not None
