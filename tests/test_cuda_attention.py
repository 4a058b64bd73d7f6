"""attention on a GPU: skipped where there is none, or where the extension was built without CUDA."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import fastnn
from fastnn import _C, reference, testing
from fastnn.functional import attention_weights
from fastnn.functional import scaled_dot_product_attention as attention
from tests import attention_dropout

DEVICE = "cuda"
HERE = torch.cuda.is_available() and "attention" in _C.cuda_ops
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not HERE, reason="needs a GPU and an extension that was built with CUDA"),
]

OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": -0.3},
    "window": {"window": (37, 5)},
    "one-sided": {"window": (-1, 0)},
    "causal-window": {"is_causal": True, "window": 20},
    "softcap": {"softcap": 1.5},
    "softcap-causal": {"softcap": 1.5, "is_causal": True},
}
# batch, heads, heads of key and value, queries, keys, width, width of value: tiles of 16, 64 and 128 rows, of 32 and 64
# keys, of 32 to 256 columns, and each side of their edges.
SHAPES = [
    (2, 3, 3, 65, 70, 32, 32),
    (1, 4, 2, 128, 128, 64, 64),
    (1, 2, 1, 129, 257, 96, 96),
    (1, 2, 2, 200, 63, 128, 128),
    (1, 2, 1, 33, 100, 192, 192),
    (1, 2, 2, 64, 65, 256, 256),
    (1, 3, 1, 7, 300, 80, 80),
    (2, 2, 2, 1, 1, 8, 8),
    (1, 1, 1, 17, 31, 40, 72),
    (1, 2, 2, 50, 45, 72, 33),
    (1, 1, 1, 20, 19, 300, 270),
]


@pytest.fixture(autouse=True)
def no_fallback():
    fastnn.set_fallback("error")  # conftest.py sets it back


def draw(*shape, dtype=torch.float32, layout="contiguous", requires_grad=False):
    x = torch.randn(shape, device=DEVICE, dtype=torch.float32).to(dtype)
    if layout == "positions":  # heads inside positions, as projections leave them
        x = x.transpose(-3, -2).contiguous().transpose(-3, -2)
    else:
        x = testing.laid_out(x, layout)
    return x.requires_grad_(requires_grad)


def tensors(shape, dtype=torch.float32, layout="contiguous", requires_grad=False):
    batch, heads, kv_heads, length, keys, width, value_width = shape
    return [
        draw(batch, *size, dtype=dtype, layout=layout, requires_grad=requires_grad)
        for size in ((heads, length, width), (kv_heads, keys, width), (kv_heads, keys, value_width))
    ]


def wide(*tensors):
    """The same in float64, as leaves."""
    return [
        t.detach().double().requires_grad_(t.requires_grad) if t is not None and t.is_floating_point() else t
        for t in tensors
    ]


def oracle(query, key, value, mask=None, **options):
    """The formula; of tensors in float64."""
    window = options.pop("window", None)
    options["window"] = (window, window) if isinstance(window, int) else window
    options.setdefault("enable_gqa", query.dim() > 2 and query.shape[-3] != key.shape[-3])
    return reference.attention(query, key, value, mask, **options)


def near(own, exact, size, dtype, largest=1.0, c=8.0):
    """Within a rounding of the weights and of the result, in the dtype, and ``c`` of sums and exponentials in float32."""
    eps = torch.finfo(dtype).eps
    sums = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    assert own.dtype == dtype and own.device.type == DEVICE and own.shape == exact.shape
    excess = (own.double() - exact).abs() - (2 * eps + c * sums * (1 + largest)) * size - eps * exact.abs()
    assert (excess <= torch.finfo(dtype).tiny).all(), f"{excess.max().item():.3g} beyond the bound"


def check(query, key, value, mask=None, **options):
    """The output and the log-sum-exp against the formula in float64."""
    gqa = {"enable_gqa": query.shape[-3] != key.shape[-3]} if query.dim() > 2 else {}
    output, lse = attention(query, key, value, mask, **options, **gqa, return_lse=True)
    exact, exact_lse = oracle(*wide(query, key, value, mask), **options)
    size = oracle(*wide(query, key, value.detach().abs(), mask), **options)[0]
    scale = abs(options.get("scale") or 1 / math.sqrt(max(query.shape[-1], 1)))
    largest = 0.0
    if query.numel() and key.numel():
        largest = query.double().norm(dim=-1).max().item() * key.double().norm(dim=-1).max().item() * scale
    near(output, exact, size, query.dtype, largest)
    seen = exact_lse.isfinite()
    assert lse.dtype == (torch.float64 if query.dtype == torch.float64 else torch.float32)
    assert torch.equal(lse.isfinite(), seen) and (lse[~seen] == -math.inf).all()
    torch.testing.assert_close(lse[seen].double(), exact_lse[seen], rtol=1e-5, atol=2e-5)
    assert torch.equal(attention(query, key, value, mask, **options, **gqa), output)
    return output


TOLERANCE = {torch.float32: 3e-5, torch.float64: 1e-12, torch.float16: 8e-3, torch.bfloat16: 6e-2}


def check_gradients(leaves, mask=None, **options):
    """The gradients of output and log-sum-exp against those of the formula in float64."""
    gqa = {"enable_gqa": leaves[0].shape[-3] != leaves[1].shape[-3]}
    dtype = leaves[0].dtype
    output, lse = attention(*leaves, mask, **options, **gqa, return_lse=True)
    double = wide(*leaves, mask)
    exact, exact_lse = oracle(*double, **options, **gqa)
    grads = draw(*output.shape, dtype=dtype), draw(*lse.shape, dtype=lse.dtype) * exact_lse.isfinite()
    wanted = [t for t in (*leaves, mask) if t is not None and t.requires_grad]
    own = torch.autograd.grad((output, lse), wanted, grads)
    exact_lse = exact_lse.masked_fill(~exact_lse.isfinite(), 0)
    true = torch.autograd.grad(
        (exact, exact_lse), [t for t in double if t is not None and t.requires_grad], [g.double() for g in grads]
    )
    for i, (mine, other, leaf) in enumerate(zip(own, true, wanted, strict=True)):
        assert mine.dtype == leaf.dtype and mine.shape == leaf.shape
        error = (mine.double() - other).abs().max().item() if mine.numel() else 0.0
        scale = max(1.0, other.abs().max().item()) if mine.numel() else 1.0
        assert error <= TOLERANCE[dtype] * scale, (i, error, scale)
    return own


# ---- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_forward(dtype, name):
    for shape in SHAPES:
        check(*tensors(shape, dtype), **OPTIONS[name])


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_gradients(dtype, name):
    for shape in SHAPES:
        check_gradients(tensors(shape, dtype, requires_grad=True), **OPTIONS[name])


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_every_edge_of_a_tile(dtype):
    sizes = (0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)
    options = itertools.cycle(OPTIONS.values())
    for length, keys in itertools.product(sizes, (0, 1, 31, 32, 33, 64, 65, 128, 129)):
        check(*tensors((1, 2, 2, length, keys, 64, 64), dtype), **next(options))
    for width, value_width in itertools.product((1, 2, 7, 8, 31, 33, 63, 65, 127, 129), (1, 8, 33, 64, 129)):
        check(*tensors((1, 1, 1, 20, 40, width, value_width), dtype))


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_no_rows_and_no_keys(dtype):
    for shape in ((0, 2, 2, 4, 5, 8, 8), (1, 2, 2, 0, 5, 8, 8), (1, 2, 2, 4, 0, 8, 8), (1, 2, 2, 4, 5, 8, 0)):
        leaves = tensors(shape, dtype, requires_grad=True)
        output = attention(*leaves)
        assert output.shape == (*shape[:2], shape[3], shape[6]) and (output == 0).all()
        assert all((g == 0).all() for g in torch.autograd.grad(output.sum(), leaves))


@pytest.mark.parametrize(
    "shape", [(2, 4, 50, 70), (1, 4, 50, 70), (2, 1, 1, 70), (4, 50, 1), (50, 70), (1, 1), (70,), ()], ids=str
)
@pytest.mark.parametrize("kind", ["bool", "additive", "float32", "infinite"])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_masks(shape, kind, dtype):
    leaves = tensors((2, 4, 2, 50, 70, 64, 48), dtype, requires_grad=True)
    mask = torch.rand(shape, device=DEVICE) > 0.3
    if kind != "bool":
        additive = draw(*shape, dtype=torch.float32 if kind == "float32" else dtype)
        mask = additive.masked_fill(~mask, -math.inf) if kind == "infinite" else additive
    for options in ({}, {"softcap": 2.0, "window": 30}):
        check(*(t.detach() for t in leaves), mask, **options)
    check_gradients(leaves, mask)
    if mask.dim() > 1:  # rows that lie apart, columns that lie apart
        check(*(t.detach() for t in leaves), F.pad(mask, (1, 1))[..., 1:-1])
        check(*(t.detach() for t in leaves), mask.mT.contiguous().mT)


@pytest.mark.parametrize("shape", [(2, 4, 50, 70), (4, 1, 70), (2, 1, 50, 1), (50, 70), (1, 1), (70,), ()], ids=str)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_gradient_of_a_mask(shape, dtype):
    leaves = tensors((2, 4, 2, 50, 70, 32, 32), dtype, requires_grad=True)
    for options in ({}, {"softcap": 1.5}, {"window": 9}):
        mask = draw(*shape, dtype=dtype, requires_grad=True)
        own = check_gradients(leaves, mask, **options)
        output, lse = attention(*leaves, mask, **options, enable_gqa=True, return_lse=True)
        alone = torch.autograd.grad(output, mask, torch.ones_like(output))[0]
        assert alone.shape == own[3].shape


def test_only_what_is_wanted_is_computed():
    every = [*tensors((2, 3, 3, 40, 70, 64, 64), torch.float16), draw(40, 70, dtype=torch.float16)]
    grad = draw(2, 3, 40, 64, dtype=torch.float16)
    leaves = [t.clone().requires_grad_() for t in every]
    expected = torch.autograd.grad(attention(*leaves), leaves, grad)
    for i, wanted in enumerate(expected):
        some = [t.clone().requires_grad_(i == j) for j, t in enumerate(every)]
        assert torch.equal(torch.autograd.grad(attention(*some), some[i], grad)[0], wanted)


def test_a_query_that_sees_nothing_gives_zeros():
    leaves = tensors((2, 3, 3, 20, 30, 64, 64), requires_grad=True)
    mask = torch.ones(20, 30, dtype=torch.bool, device=DEVICE)
    mask[4] = mask[17] = False
    output, lse = attention(*leaves, mask, return_lse=True)
    assert (output[:, :, [4, 17]] == 0).all() and (lse[:, :, [4, 17]] == -math.inf).all()
    grads = torch.autograd.grad(output.sum(), leaves)
    assert all(g.isfinite().all() for g in grads) and (grads[0][:, :, [4, 17]] == 0).all()


@pytest.mark.parametrize("shape", [(2, 4, 2, 90, 130, 64, 64), (1, 8, 1, 1, 900, 64, 64), (1, 2, 2, 7, 70, 300, 8)])
@pytest.mark.parametrize("hidden", ["least", -1e9, -1e30])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_a_row_masked_by_a_number_is_the_mean_of_the_values(dtype, hidden, shape):
    """Times log2(e) the least finite number would be -infinity, and less itself NaN."""
    leaves, (length, keys) = tensors(shape, dtype, requires_grad=True), shape[3:5]
    wider = torch.float64 if dtype == torch.float64 else torch.float32
    grad = draw(*shape[:2], length, shape[6], dtype=dtype)
    grad[..., 0, :] = 0  # nobody looks at such a row, and its gradient must not spoil the others'
    for mask_dtype in {dtype, wider}:
        number = torch.finfo(mask_dtype).min if hidden == "least" else hidden
        if number < torch.finfo(mask_dtype).min:
            continue  # -infinity there
        for others in (number, -math.inf):  # what else hides keys, in the same row and in those that see some
            mask = torch.zeros(length, keys, device=DEVICE, dtype=mask_dtype)
            mask[0], mask[:, -3:] = number, others
            mask[-1, :-5] = number  # a row all of whose first tiles are hidden
            own, lse = attention(*leaves, mask, enable_gqa=True, return_lse=True)
            with torch.no_grad():
                same, weights = attention_weights(*leaves, mask, enable_gqa=True)
            # The numbers swallow the scores in the type that the kernels sum in.
            query, key, value = (t.detach().to(wider).requires_grad_() for t in leaves)
            k, v = (t.repeat_interleave(shape[1] // shape[2], 1) for t in (key, value))
            right = (query @ k.mT / math.sqrt(shape[5]) + mask).softmax(-1)
            exact = right @ v
            assert lse.isfinite().all()
            largest = 60.0 if number < -1e6 else -number  # a number that does not swallow scores rounds them
            near(weights, right.double(), right.double(), dtype, largest)
            for output in (own, same):
                near(output, exact.double(), (right @ v.abs()).double(), dtype, largest)
            if length > 1:
                mine = torch.autograd.grad(own, leaves, grad)
                true = torch.autograd.grad(exact, (query, key, value), grad.to(wider))
                for a, b in zip(mine, true, strict=True):
                    scale = max(1.0, b.abs().max().item())
                    assert (a.to(wider) - b).abs().max() <= TOLERANCE[dtype] * scale


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_large_scores_and_special_values(dtype):
    query, key, value = tensors((1, 2, 2, 30, 90, 64, 64), dtype)
    output = attention(query * 60, key * 60, value)
    exact = oracle(*wide(query * 60, key * 60, value))[0]
    assert output.isfinite().all()
    torch.testing.assert_close(output.double(), exact, rtol=3e-2, atol=3e-2)
    query[0, 0, 3, 2] = math.nan
    output = attention(query, key, value)
    assert output[0, 0, 3].isnan().all() and output[0, 1].isfinite().all() and output[0, 0, 4:].isfinite().all()


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_uniform_weights_of_whole_numbers_are_exact(dtype):
    value = torch.randint(-4, 5, (2, 3, 64, 40), device=DEVICE).to(dtype)
    zeros = torch.zeros(2, 3, 64, 64, device=DEVICE, dtype=dtype)
    for length in (1, 5, 40):
        expected = value.double().mean(-2, keepdim=True).expand(2, 3, length, 40).to(dtype)
        assert torch.equal(attention(zeros[..., :length, :], zeros, value), expected)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 2, 8, 17])
def test_decoding(length, dtype):
    """A few queries, many keys in splits, grouped heads in one tile, and the window aligned to the last position."""
    for heads, kv_heads, width in ((8, 1, 128), (6, 2, 64), (4, 4, 256)):
        query, key, value = tensors((2, heads, kv_heads, length, 3001, width, width), dtype)
        for options in ({}, {"window": (-1, 0)}, {"window": (700, 0)}, {"softcap": 3.0}):
            check(query, key, value, **options)
        padding = (torch.arange(3001, device=DEVICE) < torch.tensor([[3001], [17]], device=DEVICE))[:, None, None]
        check(query, key, value, padding)
    check(*tensors((1, 1, 1, length, 40000, 64, 64), dtype))


@pytest.mark.parametrize("layout", ["positions", *testing.LAYOUTS])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_layouts(layout, dtype):
    for length, width in ((1, 64), (40, 64), (23, 9)):
        leaves = tensors((2, 3, 3, length, 70, width, width), dtype, layout, requires_grad=True)
        check(*(t.detach() for t in leaves))
        check_gradients(leaves)


def test_output_lies_as_query_does():
    apart = draw(2, 7, 3, 64).transpose(1, 2)
    for query in (apart, apart.contiguous(), apart[0]):
        output = attention(query, query, query)
        assert output.stride() == F.scaled_dot_product_attention(query, query, query).stride()


def test_broadcast_leading_dimensions():
    for query, key, value in (
        ((50, 8), (70, 8), (70, 4)),
        ((3, 50, 8), (70, 8), (70, 4)),
        ((2, 1, 50, 8), (1, 3, 70, 8), (2, 3, 70, 4)),
        ((50, 8), (2, 3, 70, 8), (3, 70, 4)),
        ((2, 2, 2, 3, 50, 8), (2, 1, 2, 3, 70, 8), (3, 70, 4)),
    ):
        leaves = [draw(*shape, requires_grad=True) for shape in (query, key, value)]
        output, double = attention(*leaves), wide(*leaves)
        exact = reference.attention(*double)[0]
        torch.testing.assert_close(output.double(), exact, rtol=1e-5, atol=1e-5)
        grad = draw(*output.shape)
        true = torch.autograd.grad(exact, double, grad.double())
        for mine, other in zip(torch.autograd.grad(output, leaves, grad), true, strict=True):
            torch.testing.assert_close(mine.double(), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [1, 3, 40])
@pytest.mark.parametrize("key_heads, value_heads", [(2, 2), (1, 1), (3, 3), (6, 6), (2, 3), (1, 6)])
def test_grouped_queries(length, key_heads, value_heads):
    leaves = [
        draw(2, heads, size, width, requires_grad=True)
        for heads, size, width in ((6, length, 64), (key_heads, 33, 64), (value_heads, 33, 40))
    ]
    output, double = attention(*leaves, enable_gqa=True), wide(*leaves)
    exact = reference.attention(*double, enable_gqa=True)[0]
    torch.testing.assert_close(output.double(), exact, rtol=1e-5, atol=1e-5)
    grad = draw(*output.shape)
    true = torch.autograd.grad(exact, double, grad.double())
    for mine, other in zip(torch.autograd.grad(output, leaves, grad), true, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-4, atol=1e-4)


def test_rows_beyond_two_to_the_31():
    """Offsets in elements do not fit in 32 bits."""
    rows, width = 2**24 + 77, 128
    if torch.cuda.mem_get_info()[0] < 3 * rows * width * 2:
        pytest.skip("needs 13 GB of the GPU's memory")
    query = torch.randn(1, 1, rows, width, device=DEVICE, dtype=torch.bfloat16)
    key, value = (draw(1, 1, 64, width, dtype=torch.bfloat16) for _ in range(2))
    output = attention(query, key, value)
    for part in (slice(0, 100), slice(rows - 100, rows)):
        exact, size = (oracle(*wide(query[:, :, part], key, v))[0] for v in (value, value.abs()))
        near(output[:, :, part], exact, size, torch.bfloat16, 30.0)


# ---- dropout ---------------------------------------------------------------------------------------------------------


def call_op(query, key, value, mask=None, p=0.0, seed=None, **options):
    return torch.ops.fastnn.attention(query, key, value, mask, p, philox_seed=seed, **options)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_dropout_is_the_reference_s(dtype):
    seed = torch.tensor([0x123456789ABCDEF], device=DEVICE)
    for shape in (
        (2, 3, 3, 40, 150, 64, 64),
        (2, 4, 2, 5, 70, 32, 32),
        (2, 8, 1, 1, 900, 128, 128),
        (1, 2, 2, 130, 129, 8, 8),
    ):
        leaves = tensors(shape, dtype, requires_grad=True)
        double, gqa = wide(*leaves), {"enable_gqa": shape[1] != shape[2]}
        output, lse = call_op(*leaves, p=0.3, seed=seed, **gqa)
        exact, exact_lse = reference.attention(*double, dropout_p=0.3, philox_seed=seed, **gqa)
        size = reference.attention(*double[:2], double[2].abs(), dropout_p=0.3, philox_seed=seed, **gqa)[0]
        near(output, exact, size, dtype, 60.0)
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=2e-5)
        grad = draw(*output.shape, dtype=dtype)
        true = torch.autograd.grad(exact, double, grad.double())
        for mine, other in zip(torch.autograd.grad(output, leaves, grad), true, strict=True):
            scale = max(1.0, other.abs().max().item())
            assert (mine.double() - other).abs().max().item() <= TOLERANCE[dtype] * scale


def test_dropout():
    attention_dropout.check_that_it_follows_torch_s_generator(DEVICE)
    attention_dropout.check_that_it_drops_the_share_it_says(DEVICE)


# ---- promises --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_the_same_from_run_to_run(dtype):
    for shape, options in (
        ((2, 4, 2, 300, 300, 64, 64), {"is_causal": True}),
        ((1, 8, 1, 1, 5000, 128, 128), {}),
        ((1, 2, 2, 40, 2000, 32, 32), {"window": (700, -1)}),
    ):
        leaves = tensors(shape, dtype, requires_grad=True)
        mask = None if "is_causal" in options else draw(shape[3], shape[4], dtype=dtype, requires_grad=True)
        wanted = leaves + ([mask] if mask is not None else [])
        runs = []
        for _ in range(4):
            torch.manual_seed(1)
            output, lse = attention(*leaves, mask, 0.1, **options, enable_gqa=True, return_lse=True)
            runs.append((output, lse, *torch.autograd.grad((output.sum(), lse.sum()), wanted)))
        for other in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_current_stream():
    """Two streams at once, each waiting for its own input."""
    query, key, value = tensors((2, 8, 2, 500, 500, 64, 64), torch.float16)
    few = query[:, :, :1]
    expected = [attention(q, key, value, enable_gqa=True) for q in (query, few)]
    torch.cuda.synchronize()
    results = []
    for _ in range(2):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            late = query * 0
            torch.cuda._sleep(10_000_000)
            late.copy_(query)
            results.append([attention(q, key, value, enable_gqa=True) for q in (late, late[:, :, :1])])
    torch.cuda.synchronize()
    for found in results:
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def captured(step):
    """A graph of what ``step`` does, and what it returned."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


@pytest.mark.parametrize("length", [1, 100])
def test_captured_in_a_graph(length):
    leaves = tensors((2, 8, 2, length, 1500, 64, 64), torch.bfloat16, requires_grad=True)  # one query: keys in splits
    grad = draw(2, 8, length, 64, dtype=torch.bfloat16)

    def step():
        output = attention(*leaves, window=(400, 0), enable_gqa=True)
        return [output, *torch.autograd.grad(output, leaves, grad)]

    graph, results = captured(step)
    with torch.no_grad():
        for leaf in leaves:
            leaf.copy_(torch.randn_like(leaf))
    for result in results:
        result.detach().fill_(math.nan)
    graph.replay()
    for mine, other in zip(results, step(), strict=True):
        assert torch.equal(mine, other)


def test_dropout_in_a_graph_draws_anew_with_each_replay():
    query, key = (draw(1, 2, 200, 64, requires_grad=True) for _ in range(2))
    value = torch.eye(200, device=DEVICE).expand(1, 2, 200, 200).clone().requires_grad_()  # the output is the weights

    def step():
        output = attention(query, key, value, dropout_p=0.5)
        return output, *torch.autograd.grad(output, (query, key, value), torch.ones_like(output))

    graph, (output, *grads) = captured(step)
    seen = []
    for _ in range(3):
        graph.replay()
        seen.append(output.detach().clone())
        assert abs((output == 0).double().mean().item() - 0.5) < 0.02
        # The backward of the same replay dropped the same weights: value's gradient is their sum over the queries.
        sums = output.sum(-2).unsqueeze(-1).expand_as(grads[2])
        torch.testing.assert_close(grads[2], sums, rtol=1e-4, atol=1e-5)
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one():
    query, key, value = (t.to("cuda:1") for t in tensors((1, 2, 2, 40, 70, 64, 64)))
    output = attention(query, key, value, dropout_p=0.0)
    assert output.device == query.device
    torch.testing.assert_close(output, F.scaled_dot_product_attention(query, key, value), rtol=1e-4, atol=1e-4)
    assert attention(query, key, value, dropout_p=0.3).device == query.device


def test_devices_must_be_the_same():
    query, key, value = tensors((1, 2, 2, 4, 5, 8, 8))
    with pytest.raises(RuntimeError, match="device"):
        attention(query, key.cpu(), value)
    with pytest.raises(RuntimeError, match="device"):
        attention(query, key, value, torch.ones(4, 5, dtype=torch.bool))


def test_no_silent_way_to_torch():
    leaves = tensors((2, 4, 2, 40, 50, 64, 64), torch.float16, requires_grad=True)
    mask = draw(40, 50, dtype=torch.float16, requires_grad=True)

    def work():
        attention(*leaves, mask, dropout_p=0.1, enable_gqa=True).sum().backward()
        attention(*leaves, is_causal=True, softcap=2.0, enable_gqa=True).sum().backward()

    testing.assert_own_kernels(work)
    names = testing.aten_ops(work)
    assert not [name for name in names if "softmax" in name or "tanh" in name]


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_weights(dtype):
    query, key, value = tensors((2, 3, 3, 50, 70, 64, 64), dtype)
    for average, options in itertools.product(
        (False, True), ({}, {"is_causal": True}, {"softcap": 2.0, "window": (9, 3)})
    ):
        output, weights = attention_weights(query, key, value, **options, average=average)
        exact, _, true = reference.attention_weights(*wide(query, key, value), **options, average=average)
        near(weights, true, true, dtype, 60.0)
        size = reference.attention(*wide(query, key, value.abs()), **options)[0]
        near(output, exact, size, dtype, 60.0)


# ---- the operator in torch -------------------------------------------------------------------------------------------


def small(*shape):
    return torch.randn(shape, dtype=torch.float64, device=DEVICE, requires_grad=True)


@pytest.mark.parametrize("name", ["plain", "causal", "window", "softcap"])
def test_gradcheck(name):
    inputs = small(2, 3, 3), small(2, 4, 3), small(2, 4, 2)
    options = {"plain": {}, "causal": {"is_causal": True}, "window": {"window": (1, 1)}, "softcap": {"softcap": 0.8}}[
        name
    ]

    def both(*inputs):
        return attention(*inputs, **options, return_lse=True)

    torch.autograd.gradcheck(both, inputs)
    torch.autograd.gradgradcheck(both, inputs)


def test_gradcheck_of_masks_groups_and_dropout():
    inputs = small(2, 3, 3), small(1, 4, 3), small(1, 4, 2), small(3, 4)

    def grouped(*inputs):
        torch.manual_seed(3)
        return attention(*inputs, dropout_p=0.3, enable_gqa=True)

    torch.autograd.gradcheck(grouped, inputs)
    torch.autograd.gradgradcheck(grouped, inputs)


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad):
    for shape, options in (
        ((1, 2, 2, 5, 7, 8, 4), {}),
        ((1, 2, 2, 6, 6, 8, 8), {"is_causal": True}),
        ((2, 4, 2, 5, 9, 8, 4), {"window": [2, 1], "softcap": 2.0, "scale": 0.3, "enable_gqa": True}),
        ((1, 2, 2, 1, 20, 8, 8), {}),
        ((1, 2, 2, 5, 7, 8, 8), {"dropout_p": 0.3, "philox_seed": torch.tensor([5], device=DEVICE)}),
    ):
        torch.library.opcheck(torch.ops.fastnn.attention.default, tuple(tensors(shape, requires_grad=grad)), options)


def test_opcheck_of_the_backward():
    query, key, value = tensors((2, 3, 3, 5, 7, 8, 4))
    mask = draw(5, 7)
    output, lse = call_op(query, key, value, mask)
    torch.library.opcheck(
        torch.ops.fastnn.attention_backward.default,
        (torch.randn_like(output), torch.randn_like(lse), query, key, value, mask, output, lse,
         0.0, False, None, False, None, None, None, [True] * 4),
    )  # fmt: skip


def test_compile():
    def loss(query, key, value, mask):
        output, lse = attention(query, key, value, mask, window=9, softcap=3.0, return_lse=True)
        return (output * output).sum() + lse.sum() + attention(query, key, value, is_causal=True).sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = [*tensors((2, 3, 3, 6, 11, 8, 8), requires_grad=True), draw(6, 11, requires_grad=True)]
    own, expected = compiled(*leaves), loss(*leaves)
    torch.testing.assert_close(own, expected)
    for a, b in zip(torch.autograd.grad(own, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b)
    dropped = torch.compile(lambda *x: attention(*x, dropout_p=0.5), fullgraph=True, backend="aot_eager")
    dropped(*leaves[:3]).sum().backward()
