"""fastnn.functional.linear and fastnn.nn.Linear against the float64 oracle and torch's own error."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.testing._internal.common_methods_invocations import op_db

import fastnn
from fastnn import _C, reference, testing
from fastnn.functional import linear

ISAS = testing.available_isas()
ops = torch.ops.fastnn


def check(x, w, b, activation=None, name="linear", packed=None):
    """Forward of one problem against the oracle; the sum's magnitude bounds the error of every activation (slope <= 1.2)."""
    oracle = reference.linear(x.double(), w.double(), None if b is None else b.double(), activation)
    magnitude = reference.linear(x.double().abs(), w.double().abs(), None if b is None else b.double().abs())
    stock = reference.activate(F.linear(x, w, b), activation)
    ours = linear(x, w, b, activation=activation, packed=packed)
    testing.assert_close_to_oracle(ours, oracle, 1.2 * magnitude + 1e-3, stock, name=name)


def make(m, n, k, dtype=torch.float32, layout="contiguous", bias=True, weight=None):
    return (
        testing.random((m, k), dtype, layout),
        testing.random((n, k), dtype, weight or layout),
        testing.random((n,), dtype) if bias else None,
    )


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("activation", [None, *testing.ACTIVATIONS])
@pytest.mark.parametrize("isa", ISAS)
def test_every_activation(isa, activation, dtype):
    with testing.forced_isa(isa):
        for m, n, k in [(1, 9, 40), (5, 17, 3), (37, 50, 129)]:  # dot products, and tiles with tails
            check(*make(m, n, k, dtype), activation, name=f"{isa} {activation} {m}x{n}x{k}")


@pytest.mark.parametrize("activation", testing.ACTIVATIONS)
def test_activation_at_extremes(activation):
    z = torch.tensor(
        [0.0, -0.0, 1e-30, -1e-30, 1e-6, 3.0, -3.0, 6.0, 20.0, 20.5, -20.0, 88.0, -88.0, -104.0, 1e4, -1e4]
    )
    z = torch.cat(
        [z, torch.tensor([float("inf"), float("-inf"), float("nan"), 3e38, -3e38]), torch.linspace(-12, 12, 4001)]
    )
    one = torch.ones(1, 1)
    for isa in ISAS:
        with testing.forced_isa(isa):
            ours = linear(z[:, None], one, activation=activation)[:, 0]
        oracle = reference.activate(z.double(), activation)
        torch.testing.assert_close(ours.double(), oracle.float().double(), rtol=2e-6, atol=4e-7, equal_nan=True)


@pytest.mark.parametrize("isa", ISAS)
def test_whole_numbers_are_exact_at_every_edge_of_the_tile(isa):
    """Tile heights 1..15, widths around one and two vectors, depths around a K block: equal to the last bit."""
    with testing.forced_isa(isa):
        for dtype in (torch.float32, torch.float64):
            for m in (1, 2, 3, 4, 5, 6, 7, 12, 13, 15, 17, 29):
                for n in (1, 3, 4, 5, 8, 9, 15, 16, 17, 31, 33, 65):
                    for k in (1, 2, 7, 8, 63, 65):
                        x, w = testing.integers((m, k), dtype), testing.integers((n, k), dtype)
                        assert torch.equal(linear(x, w), x @ w.t()), (isa, dtype, m, n, k)
            for k in (383, 384, 385, 768, 775, 1031, 1543):  # around a K block, which the ISA's width decides
                for m, n in [(1, 5), (6, 16), (23, 35), (300, 40)]:
                    x, w = testing.integers((m, k), dtype), testing.integers((n, k), dtype)
                    assert torch.equal(linear(x, w), x @ w.t()), (isa, dtype, m, n, k)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", testing.HALF_DTYPES)
def test_whole_numbers_are_exact_in_half_dtypes(isa, dtype):
    with testing.forced_isa(isa):
        for m, n, k in [(1, 3, 5), (7, 17, 33), (30, 50, 61), (19, 130, 600), (200, 40, 1700)]:
            x, w = testing.integers((m, k), dtype, -1, 1), testing.integers((n, k), dtype, -1, 1)
            assert torch.equal(linear(x, w), (x.float() @ w.float().t()).to(dtype)), (isa, m, n, k)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("algorithm", testing.ALGORITHMS["linear"])
def test_every_algorithm_is_exact(isa, algorithm):
    """Forced where another would be picked: rows and columns around every tile, depths around a vector and a K block."""
    outputs = (16, 17, 31, 50, 64, 67, 131) if algorithm == "stream" else (1, 2, 7, 12, 17, 50, 64, 67, 131)
    layout = "transposed" if algorithm == "stream" else "contiguous"
    with testing.forced_isa(isa), testing.forced("linear", algorithm):
        for dtype in testing.DTYPES:
            low, high = (-1, 1) if dtype in testing.HALF_DTYPES else (-4, 4)
            for m, n, k in itertools.product((1, 2, 3, 4, 7, 16, 19), outputs, (1, 9, 40)):
                x, w = testing.integers((m, k), dtype, low, high), testing.integers((n, k), dtype, low, high, layout)
                packed = ops.linear_pack(w) if algorithm == "packed" else None
                assert _C._linear_algorithm(x, w, packed is not None) == algorithm
                exact = (x.double() @ w.double().t()).to(dtype)
                assert torch.equal(linear(x, w, packed=packed), exact), (dtype, m, n, k)
            for m, n, k in [(3, 25, 300), (9, 20, 517), (33, 20, 1700)]:
                x, w = testing.integers((m, k), dtype, -1, 1), testing.integers((n, k), dtype, -1, 1, layout)
                packed = ops.linear_pack(w) if algorithm == "packed" else None
                assert torch.equal(linear(x, w, packed=packed), (x.double() @ w.double().t()).to(dtype))


# ---- stream: a weight that lies as [in_features, out_features] ---------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_streamed_blocks_of_columns_are_exact(isa, dtype):
    """Widths around a block of columns, that of one row and that of eight, and a rest of less than a vector behind it."""
    with testing.forced_isa(isa), testing.forced("linear", "stream"):
        for m, n in [(1, 4096), (1, 4099), (1, 8197), (1, 4160), (2, 2055), (3, 1350), (5, 1031), (8, 2063), (8, 513)]:
            x, w = testing.integers((m, 21), dtype, -1, 1), testing.integers((n, 21), dtype, -1, 1, "transposed")
            b = testing.integers((n,), dtype)
            assert _C._linear_algorithm(x, w) == "stream"
            assert torch.equal(linear(x, w, b), (x.double() @ w.double().t() + b.double()).to(dtype)), (m, n)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_streamed_activations_and_strides(isa, dtype):
    """Every activation, and what its gradient needs; inputs of any strides; rows of the weight that lie apart."""
    with testing.forced_isa(isa), testing.forced("linear", "stream"):
        for activation, (m, n, k) in itertools.product([None, *testing.ACTIVATIONS], [(1, 19, 70), (9, 50, 33)]):
            x, w, b = make(m, n, k, dtype, weight="transposed")
            check(x, w, b, activation, f"{isa} {activation} {m}x{n}x{k}")
            if activation:
                y, z = ops.linear_train(x, w, b, activation)
                assert torch.equal(z, linear(x, w, b)) and torch.equal(y, linear(x, w, b, activation=activation))
        for layout in testing.LAYOUTS:
            for m, n, k in [(1, 40, 129), (5, 17, 3)]:
                check(*make(m, n, k, dtype, layout, weight="transposed"), name=f"{isa} {layout} {m}x{n}x{k}")
        wide = testing.random((33, 70), dtype)[:, 3:40].t()
        x, b = testing.random((4, 33), dtype), testing.random((74,), dtype)[::2]
        assert _C._linear_algorithm(x, wide) == "stream"
        check(x, wide, b)
        check(x[0], wide, b)


def test_a_long_streamed_sum_errs_no_more_than_torchs():
    """Sums over thousands of rows, in float32 and float64."""
    with testing.forced("linear", "stream"):
        for m, n, k, dtype in [
            (1, 40, 20000, torch.float32),
            (8, 33, 9001, torch.float32),
            (2, 64, 5000, torch.float64),
        ]:
            check(*make(m, n, k, dtype, weight="transposed"), "gelu", name=f"{m}x{n}x{k}")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("side", ["after", "before"])
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_a_stream_touches_nothing_out_of_bounds(isa, side, dtype):
    with testing.forced_isa(isa), testing.forced("linear", "stream"):
        for m, n, k in [(1, 16, 1), (1, 17, 33), (3, 25, 70), (8, 67, 9), (9, 129, 11), (1, 4101, 5)]:
            x, w, b = (testing.guarded(t, side) for t in make(m, n, k, dtype, weight="transposed"))
            assert _C._linear_algorithm(x, w) == "stream"
            with testing.guarded_outputs(side):
                y, z = ops.linear_train(x, w, b, "gelu")
            assert y.isfinite().all() and z.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit_of_a_stream(dtype):
    with testing.forced("linear", "stream"):
        for shape in [(1, 5003, 300), (3, 700, 1000), (8, 65, 5000), (12, 130, 700)]:
            x, w, b = make(*shape, dtype, weight="transposed")
            results = []
            for count in (1, 2, 3, 5, 16):
                with testing.threads(count):
                    results.append(linear(x, w, b, activation="gelu"))
            assert all(torch.equal(results[0], result) for result in results[1:]), shape


def test_gradients_of_a_weight_that_lies_transposed():
    """dX reads it along its rows, dW is laid out as it: to the last bit, few rows and many."""
    for m, n, k in [(1, 130, 70), (3, 64, 200), (8, 33, 17), (40, 50, 60)]:
        x, w, grad = testing.integers((m, k)), testing.integers((n, k), layout="transposed"), testing.integers((m, n))
        dx, dw, db = ops.linear_backward(grad, x, w, grad[0], None, None, [True, True, True])
        assert torch.equal(dx, grad @ w) and torch.equal(dw, grad.t() @ x) and torch.equal(db, grad.sum(0))
        assert dw.stride() == w.stride()


def test_no_aten_matmul_runs_for_a_weight_that_lies_transposed():
    weight = torch.randn(33, 40, requires_grad=True)
    for rows in (1, 30):
        x = torch.randn(rows, 33, requires_grad=True)
        testing.assert_own_kernels(lambda x=x: linear(x, weight.t()).square().sum().backward())


def test_the_choice_of_a_stream():
    def chosen(m, n, k, dtype=torch.float32, frozen=False):
        return _C._linear_algorithm(torch.empty(m, k, dtype=dtype), torch.empty(k, n, dtype=dtype).t(), frozen)

    for dtype in testing.DTYPES:
        for n, k in [(768, 768), (3072, 768), (768, 3072), (50257, 768), (64, 64)]:
            assert chosen(1, n, k, dtype) == chosen(2, n, k, dtype) == "stream"
            assert chosen(64, n, k, dtype) == "gemm" and chosen(64, n, k, dtype, frozen=True) == "packed"
            names = [chosen(m, n, k, dtype) for m in range(1, 130)]
            assert n == 64 or names == sorted(
                names, reverse=True
            )  # tiny panels pay for each tile: there it may come back
    assert chosen(1, 15, 768) == "gemm"  # less than a vector of AVX-512
    assert _C._linear_algorithm(torch.empty(1, 768), torch.empty(3072, 768)) == "dot"  # the other way round


def chosen(m, n, k, dtype=torch.float32, frozen=False):
    return _C._linear_algorithm(torch.empty(m, k, dtype=dtype), torch.empty(n, k, dtype=dtype), frozen)


def test_the_choice_of_algorithm():
    assert chosen(1, 768, 768) == chosen(1, 768, 768, frozen=True) == "dot"  # a weight read once is not worth packing
    assert chosen(512, 10, 768) == chosen(512, 10, 768, frozen=True) == "dot"  # ten outputs leave a panel empty
    assert chosen(128, 768, 768) == chosen(128, 50, 13) == "gemm"
    assert chosen(128, 768, 768, frozen=True) == chosen(6, 256, 256, frozen=True) == "packed"
    for dtype in testing.DTYPES:
        names = [chosen(m, 768, 768, dtype) for m in range(1, 130)]
        assert names == sorted(names)  # more rows never bring the dot products back
    x, w = torch.empty(40, 3).t(), torch.empty(5, 40)
    assert _C._linear_algorithm(x, w) == "gemm" == _C._linear_algorithm(x.contiguous(), torch.empty(40, 5).t())
    with testing.forced("linear", "packed"):
        assert chosen(1, 8, 8) == "gemm" and chosen(1, 8, 8, frozen=True) == "packed"
    with testing.forced("linear", "dot"):
        assert _C._linear_algorithm(x, w) == "gemm" and chosen(500, 500, 50, frozen=True) == "dot"
    with pytest.raises(ValueError, match="algorithm must be one of gemm, dot, packed, stream; got 'fft'"):
        _C._force_linear_algorithm("fft")


def test_a_frozen_weight_is_packed_only_for_who_reads_it():
    module = fastnn.freeze(fastnn.nn.Linear(64, 64).eval())
    with torch.no_grad():
        one = module(torch.randn(1, 64))
        assert one.shape == (1, 64) and module._pack is None
        module(torch.randn(64, 64))
        assert len(module._pack[1]) == 1


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_layouts_and_leading_dimensions(dtype, layout):
    for m, n, k in [(1, 9, 40), (5, 17, 3), (40, 50, 129)]:
        check(*make(m, n, k, dtype, layout), name=f"{layout} {m}x{n}x{k}")
    x = testing.random((2, 3, 4, 21), dtype).transpose(0, 2)
    w, b = testing.random((7, 21), dtype), testing.random((14,), dtype)[::2]
    check(x, w, b)
    check(x[0, 0, 0], w, b)
    testing.assert_close_to_oracle(linear(x, w[0]), F.linear(x.double(), w[0].double()), torch.full((), 40.0))


def test_empty():
    for shape, n in [((0, 5), 3), ((5, 0), 3), ((2, 0, 4), 3), ((5, 4), 0)]:
        x, w, b = torch.randn(shape, requires_grad=True), torch.randn(n, shape[-1], requires_grad=True), torch.randn(n)
        ours, stock = linear(x, w, b), F.linear(x, w, b)
        assert torch.equal(ours, stock)
        grads = (torch.autograd.grad(y.sum(), (x, w)) for y in (ours, stock))
        assert all(torch.equal(one, want) for one, want in zip(*grads, strict=True))


def test_bias_of_one_element_is_broadcast():
    x, w, b = torch.randn(3, 4), torch.randn(5, 4), torch.randn(1, requires_grad=True)
    ours, stock = linear(x, w, b), F.linear(x, w, b)
    torch.testing.assert_close(ours, stock)
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), b), torch.autograd.grad(stock.sum(), b))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("side", ["after", "before"])
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_nothing_is_touched_out_of_bounds(isa, side, dtype):
    with testing.forced_isa(isa):
        shapes = [(1, 1, 1), (1, 17, 33), (3, 5, 70), (7, 9, 11), (19, 33, 65), (5, 40, 300), (30, 3, 70)]
        shapes += [(1, 5, 16), (2, 6, 71), (4, 9, 130), (6, 70, 9), (12, 16, 64), (261, 4, 34)]  # of the backward
        for m, n, k in shapes:
            tensors = [testing.guarded(t, side) for t in make(m, n, k, dtype)]
            x, w, b = (t.requires_grad_() for t in tensors)
            grad = testing.guarded(testing.random((m, n), dtype), side)
            with testing.guarded_outputs(side):
                y = linear(x, w, b, activation="gelu")
                grads = torch.autograd.grad(y, (x, w, b), grad)
                packed = linear(x.detach(), w.detach(), b.detach(), packed=ops.linear_pack(w.detach()))
            assert all(t.isfinite().all() for t in (y, packed, *grads))


def grads_of(f, x, w, b, grad):
    leaves = [t.detach().clone().requires_grad_() if t.stride() == t.contiguous().stride() else t.detach().requires_grad_()
              for t in (x, w, b)]  # fmt: skip
    return torch.autograd.grad(f(*leaves), leaves, grad)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu", "softplus"])
def test_backward(isa, dtype, activation):
    # The last two have more rows than one block: the weight's gradient is accumulated, that of half dtypes in float32.
    for m, n, k in [(1, 5, 7), (2, 33, 40), (3, 17, 20), (33, 40, 70), (150, 19, 31), (257, 7, 40), (600, 33, 19)]:
        x, w, b = make(m, n, k, dtype)
        grad = testing.random((m, n), dtype)
        with testing.forced_isa(isa):
            ours = grads_of(lambda x, w, b: linear(x, w, b, activation=activation), x, w, b, grad)
        double = [t.double() for t in (x, w, b, grad)]
        oracle = grads_of(lambda x, w, b: reference.linear(x, w, b, activation), *double)
        stock = grads_of(lambda x, w, b: reference.activate(F.linear(x, w, b), activation), x, w, b, grad)
        g, scale = double[3].abs() * 1.2, 1.0
        if dtype in testing.HALF_DTYPES:  # g is rounded to the dtype before it is summed, as in torch
            scale += 2 * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps / 8
        magnitudes = (g @ double[1].abs(), g.t() @ double[0].abs(), g.sum(0))
        for name, one, want, its, size in zip("xwb", ours, oracle, stock, magnitudes, strict=True):
            testing.assert_close_to_oracle(one, want, size * scale + 1e-3, its, name=f"{isa} {m}x{n}x{k} d{name}")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_gradients_of_whole_numbers_are_exact_at_every_edge(isa, dtype):
    """Few rows (streamed) and more (tiles), around a vector and around the accumulators' chunk: to the last bit."""
    high = 2 if dtype in testing.HALF_DTYPES else 5
    with testing.forced_isa(isa):
        for m in (1, 2, 3, 4, 5, 8, 13):
            for n, k in [(1, 1), (3, 7), (4, 8), (5, 9), (8, 16), (6, 17), (9, 31), (2, 64), (7, 65), (3, 71), (2, 257),
                         (5, 320), (3, 323), (2, 1029), (33, 40)]:  # fmt: skip
                x, w, grad = (testing.integers(size, dtype, high=high) for size in ((m, k), (n, k), (m, n)))
                dx, dw, db = ops.linear_backward(grad, x, w, grad[0], None, None, [True, True, True])
                g, wide = grad.double(), f"{isa} {dtype} {m}x{n}x{k}"
                assert torch.equal(dx, (g @ w.double()).to(dtype)), wide
                assert torch.equal(dw, (g.t() @ x.double()).to(dtype)), wide
                assert torch.equal(db, g.sum(0).to(dtype)), wide


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("k", [1024, 1028, 1031])
def test_a_large_gradient_of_the_weight_is_written_past_the_cache(isa, k):
    """Where its rows are whole vectors, for some ISA or all, and where they are not: to the last bit, on one thread and two."""
    n = 2200
    for m, dtype, count in itertools.product((1, 3, 8), (torch.float32, torch.float64), (1, 2)):
        x, w, grad = testing.integers((m, k), dtype), torch.zeros(n, k, dtype=dtype), testing.integers((m, n), dtype)
        with testing.forced_isa(isa), testing.threads(count):
            _, dw, _ = ops.linear_backward(grad, x, w, None, None, None, [False, True, False])
        assert torch.equal(dw, grad.t() @ x), (m, dtype, count)


@pytest.mark.parametrize("activation", [None, *testing.ACTIVATIONS])
def test_gradcheck(activation):
    x, w, b = (t.requires_grad_() for t in make(4, 3, 5, torch.float64))
    f = lambda x, w, b: linear(x, w, b, activation=activation)  # noqa: E731
    assert torch.autograd.gradcheck(f, (x, w, b))
    assert torch.autograd.gradgradcheck(f, (x, w, b))
    assert torch.autograd.gradcheck(lambda x, w: linear(x, w, None, activation=activation), (x, w.detach()))


def test_gradients_with_odd_strides():
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    w = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: linear(x, w.t(), activation="tanh").t().sum(1), (x, w))
    assert torch.autograd.gradcheck(lambda x, w: linear(x[:, ::2], w.t()[:, ::2]).expand(2, 5, 4), (x, w))


@pytest.mark.parametrize("shape", [(3, 200, 300), (1, 900, 1031), (64, 300, 700), (257, 65, 128), (500, 7, 90)])
def test_threads_change_no_bit(shape):
    results = []
    for count in (1, 2, 3, 5):
        torch.manual_seed(1)
        x, w, b = (t.requires_grad_() for t in make(*shape))
        with testing.threads(count):
            y = linear(x, w, b, activation="gelu")
            results.append((y, *torch.autograd.grad(y.square().sum(), (x, w, b))))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole(backend):
    module = fastnn.nn.Linear(6, 5, activation="gelu")
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    x = torch.randn(3, 6, requires_grad=True)
    torch.testing.assert_close(compiled(x), module(x))
    inputs = (x, *module.parameters())
    for ours, eager in zip(
        torch.autograd.grad(compiled(x).sum(), inputs), torch.autograd.grad(module(x).sum(), inputs), strict=True
    ):
        torch.testing.assert_close(ours, eager)


def test_no_aten_matmul_runs():
    module = fastnn.nn.Linear(33, 40, activation="silu")
    for rows in (1, 30):
        x = torch.randn(rows, 33, requires_grad=True)
        testing.assert_own_kernels(lambda x=x: module(x).sum().backward())


def test_opinfo_samples():
    """Every sample that PyTorch tests F.linear with, its error inputs included."""
    (info,) = [op for op in op_db if op.name == "nn.functional.linear"]
    for dtype in testing.DTYPES:
        for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
            stock = F.linear(sample.input, *sample.args, **sample.kwargs)
            ours = linear(sample.input, *sample.args, **sample.kwargs)
            assert ours.stride() == stock.stride() and ours.requires_grad == stock.requires_grad
            torch.testing.assert_close(ours, stock)
            leaves = [t for t in (sample.input, *sample.args) if isinstance(t, torch.Tensor) and t.requires_grad]
            grad = torch.randn_like(stock)
            for a, b in zip(
                torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(stock, leaves, grad), strict=True
            ):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        ((torch.ones(3, 4), torch.ones(5, 3)), RuntimeError, "in_features = 3"),
        ((torch.ones(3, 4), torch.ones(5, 4), torch.ones(4)), RuntimeError, r"bias must be \[out_features\]"),
        ((torch.ones(3, 4), torch.ones(5, 4).double()), RuntimeError, "dtype of input"),
        ((torch.tensor(1.0), torch.ones(5, 4)), RuntimeError, "at least one dimension"),
        (([1.0], torch.ones(5, 4)), TypeError, "input must be a Tensor; got list"),
        ((torch.ones(3, 4), torch.ones(5, 4), 1.0), TypeError, "bias must be a Tensor"),
    ],
)
def test_errors_are_of_torchs_kind(args, error, text):
    with pytest.raises(error):
        F.linear(*args)
    with pytest.raises(error, match=f"fastnn.linear: .*{text}"):
        linear(*args)


def test_unknown_activation():
    with pytest.raises(ValueError, match="activation must be None or one of relu, gelu.*got 'swish'"):
        linear(torch.ones(1, 2), torch.ones(3, 2), activation="swish")


def test_fallback_serves_what_has_no_kernel():
    x, w = torch.ones(2, 3, dtype=torch.int64), torch.ones(4, 3, dtype=torch.int64)
    assert torch.equal(linear(x, w), F.linear(x, w))
    fastnn.set_fallback("error")
    with pytest.raises(RuntimeError, match="dtype torch.int64 has no kernel"):
        linear(x, w)

    class Logged(torch.Tensor):
        pass

    fastnn.set_fallback("torch")
    assert type(linear(torch.ones(2, 3).as_subclass(Logged), torch.ones(4, 3))) is Logged


def test_meta_device():
    assert linear(torch.empty(2, 3, device="meta"), torch.empty(4, 3, device="meta")).shape == (2, 4)
    with pytest.raises(RuntimeError, match="in_features"):
        linear(torch.empty(2, 3, device="meta"), torch.empty(4, 5, device="meta"))


# ---------------------------------------------------------------------------------------------------- module


def test_module_is_torchs_with_an_activation():
    stock, ours = torch.nn.Linear(5, 3), fastnn.nn.Linear(5, 3)
    assert isinstance(ours, torch.nn.Linear) and repr(ours) == repr(stock)
    assert repr(fastnn.nn.Linear(5, 3, activation="relu")).endswith("bias=True, activation='relu')")
    ours.load_state_dict(stock.state_dict())
    stock.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5)
    torch.testing.assert_close(ours(x), stock(x))


def test_frozen_weights_are_packed_once_and_never_stale():
    module = fastnn.nn.Linear(40, 30)
    module._freeze()
    x = torch.randn(20, 40)
    with torch.no_grad():
        torch.testing.assert_close(module(x), F.linear(x, module.weight, module.bias))
        (first,) = module._pack[1].values()
        module(x)
        assert next(iter(module._pack[1].values())) is first and len(module._pack[1]) == 1
        module.weight.mul_(2)
        torch.testing.assert_close(module(x), F.linear(x, module.weight, module.bias))
        module.weight.data = torch.randn(30, 40)
        torch.testing.assert_close(module(x), F.linear(x, module.weight, module.bias))
        for isa in ISAS:
            with testing.forced_isa(isa):
                torch.testing.assert_close(module(x), F.linear(x, module.weight, module.bias))
    y = module(x)  # with gradients the weight itself is used
    assert y.requires_grad
    for clone in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert clone._frozen and clone._pack is None
        with torch.no_grad():
            assert torch.equal(clone(x), module(x))
    module._thaw()
    assert not module._frozen and "_pack" not in module.__dict__


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_packed_weights_give_the_same_sums(isa, dtype):
    with testing.forced_isa(isa):
        for m, n, k in [(1, 5, 7), (3, 17, 300), (20, 33, 257), (40, 1, 3), (5, 4, 0)]:
            x, w, b = make(m, n, k, dtype)
            check(x, w, b, "silu", f"{isa} {m}x{n}x{k}", ops.linear_pack(w))
        with pytest.raises(RuntimeError, match="packed must be what linear_pack made"):
            linear(torch.ones(5, 4, dtype=dtype), torch.ones(3, 4, dtype=dtype), packed=torch.ones(3))
