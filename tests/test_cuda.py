"""linear on a GPU: skipped where there is none, or where the extension was built without CUDA."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import fastnn
from fastnn import _C, reference, testing
from fastnn.functional import linear

HERE = torch.cuda.is_available() and "linear" in _C.cuda_ops
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not HERE, reason="needs a GPU and an extension that was built with CUDA"),
]
SHAPES = [(1, 1, 1), (1, 4096, 257), (7, 100, 33), (8, 512, 1000), (64, 64, 64), (129, 77, 200), (512, 1024, 768)]


@pytest.fixture(autouse=True)
def no_fallback():
    fastnn.set_fallback("error")  # conftest.py sets it back


def operands(rows, width, features, dtype, layout="contiguous"):
    generator = torch.Generator("cuda").manual_seed(rows * 7 + width)

    def draw(*shape):
        x = torch.randn(*shape, generator=generator, device="cuda", dtype=torch.float32).to(dtype)
        if layout == "transposed" and x.dim() == 2:
            x = x.t().contiguous().t()
        if layout == "strided" and x.dim() == 2:
            x = torch.cat((x, x), 1)[:, ::2]
        return x.requires_grad_()

    return draw(rows, width), draw(features, width), draw(features)


def near(own, exact, size, dtype):
    """Within a few roundings of the dtype, and of sums in float32, of the size of what is summed."""
    eps = torch.finfo(dtype).eps + (torch.finfo(torch.float32).eps * 4 if dtype != torch.float64 else 0)
    assert own.dtype == dtype and own.is_cuda
    assert ((own.double() - exact).abs() <= 2 * eps * (size + exact.abs() + 1)).all()


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_forward_and_gradients(dtype, layout):
    for shape, activation in itertools.product(SHAPES, (None, "gelu", "relu")):
        x, w, b = operands(*shape, dtype, layout)
        y = linear(x, w, b, activation=activation)
        grad = torch.randn_like(y)
        grads = torch.autograd.grad(y, (x, w, b), grad)
        wide = [t.detach().double().requires_grad_() for t in (x, w, b)]
        exact = reference.linear(*wide, activation)
        wanted = torch.autograd.grad(exact, wide, grad.double())
        a, c, _ = (t.detach().double().abs() for t in (x, w, b))
        near(y, exact, a @ c.t(), dtype)
        g = grad.double().abs() * 1.2  # the steepest activation
        near(grads[0], wanted[0], g @ c, dtype)
        near(grads[1], wanted[1], g.t() @ a, dtype)
        near(grads[2], wanted[2], g.sum(0), dtype)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_exact_on_small_integers(dtype):
    for rows, width, features in SHAPES[:6]:
        x = testing.integers((rows, width), torch.float32, -2, 2)
        w = testing.integers((features, width), torch.float32, -2, 2)
        exact = (x.double() @ w.double().t()).to(dtype)
        assert torch.equal(linear(x.to("cuda", dtype), w.to("cuda", dtype)).cpu(), exact)


@pytest.fixture
def matmul_precision():
    before = torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.usefixtures("matmul_precision")
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_float32_precision(layout):
    """Full precision, errors at most twice torch's on FMAs; one rounding to TF32 where torch's settings allow it."""
    for rows, width, features in [(9, 40, 70), (300, 2048, 200), (256, 8192, 512), (129, 333, 131)]:
        x, w, b = (t.detach() for t in operands(rows, width, features, torch.float32, layout))
        exact, size = F.linear(x.double(), w.double(), b.double()), F.linear(x.double().abs(), w.double().abs())
        torch.backends.cuda.matmul.allow_tf32 = False
        own, plain = linear(x, w, b), F.linear(x, w, b)
        error = ((own - exact) / size).square().mean().sqrt()
        assert error <= 2 * ((plain - exact) / size).square().mean().sqrt() + 2**-25
        assert ((own - exact).abs() <= 2**-20 * size + 2**-23 * exact.abs()).all()
        torch.backends.cuda.matmul.allow_tf32 = True
        assert ((linear(x, w, b) - exact).abs() <= 2**-10 * size + 2**-22 * exact.abs()).all()


@pytest.mark.usefixtures("matmul_precision")
def test_tf32_is_used_where_it_is_allowed():
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("TF32 needs compute capability 8.0")
    x, w, _ = (t.detach() for t in operands(256, 1024, 256, torch.float32))
    torch.backends.cuda.matmul.allow_tf32 = False
    full = linear(x, w)
    torch.backends.cuda.matmul.allow_tf32 = True
    assert not torch.equal(linear(x, w), full)


@pytest.mark.usefixtures("matmul_precision")
@pytest.mark.parametrize("allow_tf32", [False, True])
def test_infinities_and_nan(allow_tf32):
    torch.backends.cuda.matmul.allow_tf32 = allow_tf32
    for value, other in itertools.product(
        [float("inf"), float("-inf"), float("nan"), 3.4e38, 1e-38, 0.0], [float("inf"), float("nan"), 1.0, 0.0, 1e-39]
    ):
        x, w, _ = (t.detach() for t in operands(200, 96, 150, torch.float32))
        x[5, 33], w[140, 33] = value, other
        y, exact = linear(x, w).double(), F.linear(x.double(), w.double())
        overflows = exact.isfinite() & (F.linear(x.double().abs(), w.double().abs()) > 3e38)
        assert torch.equal(y.isnan() & ~overflows, exact.isnan())
        assert torch.equal(y[exact.isinf()], exact[exact.isinf()])
        fine = exact.isfinite() & ~overflows
        size = F.linear(x.double().abs(), w.double().abs())
        assert ((y - exact).abs()[fine] <= (2**-10 if allow_tf32 else 2**-20) * size[fine] + 1e-37).all()


@pytest.mark.usefixtures("matmul_precision")
@pytest.mark.parametrize("sizes", [(1e-38, 1e37), (1e37, 1e-39), (1e-20, 1e-20), (1e-30, 1e-6), (1e18, 1e18)])
def test_magnitudes(sizes):
    torch.backends.cuda.matmul.allow_tf32 = False
    x, w, _ = (t.detach() for t in operands(64, 96, 150, torch.float32))
    x, w = x * sizes[0], w * sizes[1]
    exact, size = F.linear(x.double(), w.double()), F.linear(x.double().abs(), w.double().abs())
    assert ((linear(x, w) - exact).abs() <= 2**-20 * size + 96 * 2**-149).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_few_rows(dtype):
    """Every number of rows up to 70, with the weight as it is and transposed."""
    for rows, transposed in itertools.product([*range(9, 36), 48, 63, 64, 65, 70], [False, True]):
        x = testing.integers((rows, 1032), torch.float32, -2, 2)
        w = testing.integers((1000, 1032), torch.float32, -2, 2)
        exact = (x.double() @ w.double().t()).to(dtype)
        weight = w.to("cuda", dtype)
        weight = weight.t().contiguous().t() if transposed else weight
        assert torch.equal(linear(x.to("cuda", dtype), weight).cpu(), exact)


def test_the_same_from_run_to_run():
    x, w, b = operands(3, 8192, 64, torch.bfloat16)
    runs = [torch.autograd.grad(linear(x, w, b).sum(), (x, w, b)) for _ in range(3)]
    for other in runs[1:]:
        assert all(torch.equal(p, q) for p, q in zip(runs[0], other, strict=True))


def test_current_stream():
    """Two streams at once, each waiting for its own input."""
    x, w, b = (t.detach() for t in operands(512, 1024, 768, torch.float16))
    expected = linear(x, w, b)
    torch.cuda.synchronize()
    results = []
    for _ in range(2):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            late = x * 0
            torch.cuda._sleep(10_000_000)
            late.copy_(x)
            results.append(linear(late, w, b))
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for y in results)


def test_captured_in_a_graph():
    x, w, b = operands(5, 4096, 96, torch.bfloat16)  # few rows: split along K, with a workspace
    grad = torch.randn(5, 96, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            torch.autograd.grad(linear(x, w, b, activation="gelu"), (x, w, b), grad)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x, w, b, activation="gelu")
        grads = torch.autograd.grad(y, (x, w, b), grad)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    again = linear(x, w, b, activation="gelu")
    assert torch.equal(y, again)
    for p, q in zip(grads, torch.autograd.grad(again, (x, w, b), grad), strict=True):
        assert torch.equal(p, q)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one():
    x, w, b = (t.detach().to("cuda:1") for t in operands(64, 128, 64, torch.float32))
    y = linear(x, w, b)
    assert y.device == x.device
    torch.testing.assert_close(y, F.linear(x, w, b))


def test_opcheck():
    for activation in (None, "silu"):
        args = (*operands(6, 40, 24, torch.float32), activation)
        torch.library.opcheck(torch.ops.fastnn.linear.default, args)


def test_no_silent_way_to_torch():
    x, w, b = operands(64, 64, 64, torch.float16)
    testing.assert_own_kernels(lambda: linear(x, w, b, activation="gelu").sum().backward())


def test_accelerate_takes_the_modules_that_have_kernels():
    model = torch.nn.ModuleList([torch.nn.Linear(8, 8), torch.nn.MultiheadAttention(8, 2), torch.nn.Conv2d(3, 4, 1)])
    served = {row.kind: row.served for row in fastnn.explain(fastnn.accelerate(model.to("cuda")))}
    assert served == {
        "Linear": True,
        "MultiheadAttention": True,
        "NonDynamicallyQuantizableLinear": True,
        "Conv2d": "conv2d" in _C.cuda_ops,
    }
