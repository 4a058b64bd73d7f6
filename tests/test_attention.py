"""functional/attention.py: the kernels against fastnn.reference in float64, beside torch's own error."""

import itertools
import math
import resource

import pytest
import torch
import torch.nn.functional as F
from torch.testing._internal.common_methods_invocations import op_db

import fastnn
from fastnn import reference, testing
from fastnn.functional import scaled_dot_product_attention as attention
from tests import attention_dropout

OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": -0.3},
    "window": {"window": (3, 1)},
    "one-sided": {"window": (-1, 0)},
    "causal-window": {"is_causal": True, "window": 4},
    "softcap": {"softcap": 1.5},
    "softcap-causal": {"softcap": 1.5, "is_causal": True},
}


def tensors(shape, dtype=torch.float32, layout="contiguous", requires_grad=False):
    """Query [lead, L, E], key [lead, S, E] and value [lead, S, Ev] for shape (*lead, L, S, E, Ev)."""
    *lead, length, keys, width, value_width = shape
    return [
        testing.random((*lead, *size), dtype, layout, requires_grad)
        for size in ((length, width), (keys, width), (keys, value_width))
    ]


def normal(window):
    return (window, window) if isinstance(window, int) else window


def oracle(query, key, value, attn_mask=None, **options):
    options["window"] = normal(options.get("window"))
    double = [None if t is None else t.double() if t.is_floating_point() else t for t in (query, key, value, attn_mask)]
    return reference.attention(*double, **options)


def sensitivity(query, key, value, attn_mask=None, **options):
    """What one rounding of every score and value can move each output by, in units of eps."""
    scale = options.get("scale") or 1 / math.sqrt(max(query.shape[-1], 1))
    enable_gqa = options.get("enable_gqa", False)
    repeat = query.shape[-3] // key.shape[-3] if enable_gqa else 1
    scores = (
        query.double().abs() @ key.double().abs().repeat_interleave(repeat, -3).transpose(-2, -1) * abs(scale)
        if enable_gqa
        else query.double().abs() @ key.double().abs().transpose(-2, -1) * abs(scale)
    )
    if attn_mask is not None and attn_mask.is_floating_point():
        scores = scores + attn_mask.double().abs().nan_to_num(0, 0, 0)
    largest = scores.amax(-1, keepdim=True) if scores.shape[-1] else scores.sum(-1, keepdim=True)
    return (1 + largest) * oracle(query, key, value.abs(), attn_mask, **options)[0]


def check(query, key, value, attn_mask=None, stock=None, **options):
    output, lse = attention(query, key, value, attn_mask, **options, return_lse=True)
    expected, expected_lse = oracle(query, key, value, attn_mask, **options)
    size = sensitivity(query, key, value, attn_mask, **options)
    testing.assert_close_to_oracle(output, expected, size, stock, c=4, name="output")
    seen = expected_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen) and (lse[~seen] == -math.inf).all()
    torch.testing.assert_close(lse[seen].double(), expected_lse[seen], rtol=1e-5, atol=1e-5)
    assert torch.equal(attention(query, key, value, attn_mask, **options), output)
    return output


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", testing.available_isas())
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_every_edge_of_the_tile(isa, dtype):
    sizes = [
        (length, keys) for length in (0, 1, 2, 5, 6, 7, 8, 9, 13, 15) for keys in (0, 1, 7, 8, 9, 16, 33, 127, 129)
    ]
    with testing.forced_isa(isa):
        for (length, keys), (name, options) in zip(sizes, itertools.cycle(OPTIONS.items())):
            check(*tensors((2, length, keys, 8, 16), dtype), **options)
            check(*tensors((length, keys, 5, 3), dtype), **OPTIONS["plain"])
        for width, value_width in itertools.product((0, 1, 7, 8, 9, 15, 17, 33), (0, 1, 8, 15, 31, 33)):
            for length in (1, 3, 11):
                check(*tensors((2, length, 19, width, value_width), dtype))


@pytest.mark.parametrize("isa", testing.available_isas())
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_long_sequences(isa, options):
    with testing.forced_isa(isa):
        for length, keys in ((257, 300), (300, 257), (97, 1100), (1, 1500), (8, 1025), (64, 1024), (505, 505)):
            check(*tensors((2, length, keys, 16, 24)), **options)


@pytest.mark.parametrize("case", testing.ATTENTION, ids=lambda case: case.name)
def test_shapes_of_models(case):
    if case.batch * case.heads * case.queries * case.keys > 4e6:  # one head of keys, and the queries' that share it
        case = case._replace(batch=1, heads=case.heads // (case.kv_heads or case.heads), kv_heads=1)
    query = testing.random((case.batch, case.queries, case.heads, case.head_dim)).transpose(1, 2)
    shape = (case.batch, case.kv_heads or case.heads, case.keys)
    key, value = testing.random((*shape, case.head_dim)), testing.random((*shape, case.value_dim or case.head_dim))
    gqa = query.shape[1] != key.shape[1]
    options = {"is_causal": case.causal, "window": case.window, "softcap": case.softcap, "enable_gqa": gqa}
    stock = None  # torch has no soft cap
    if not case.softcap:
        stock = F.scaled_dot_product_attention(query, key, value, testing.seen(case), enable_gqa=gqa)
    output = check(query, key, value, None, stock, **options)
    if stock is not None:
        expected = oracle(query, key, value, **options)[0]
        own, theirs = testing.max_error(output, expected), testing.max_error(stock, expected)
        assert own <= 2 * theirs + torch.finfo(torch.float32).eps, (own, theirs)


@pytest.mark.parametrize(
    "shape", [(2, 3, 5, 7), (1, 3, 5, 7), (2, 1, 1, 7), (3, 5, 1), (5, 7), (7,), (1,), ()], ids=str
)
@pytest.mark.parametrize("kind", ["bool", "additive", "float32", "infinite"])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_masks(shape, kind, dtype):
    query, key, value = tensors((2, 3, 5, 7, 8, 8), dtype)
    mask = torch.rand(shape) > 0.4
    if kind != "bool":
        additive = testing.random(shape, torch.float32 if kind == "float32" else dtype)
        mask = additive.masked_fill(~mask, -math.inf) if kind == "infinite" else additive
    stock = F.scaled_dot_product_attention(query, key, value, mask) if mask.dim() >= 2 else None
    check(query, key, value, mask, stock)
    check(query[..., :1, :], key, value, mask[..., :1, :] if mask.dim() > 1 else mask)
    wide = torch.nn.functional.pad(mask, (1, 1)) if mask.dim() > 1 else None
    if wide is not None:  # rows that lie apart, columns that lie apart
        check(query, key, value, wide[..., 1:-1])
        check(query, key, value, testing.laid_out(mask, "transposed"))
        check(query, key, value, mask, softcap=2.0, window=3)


def test_a_query_that_sees_nothing_gives_zeros_as_torch_does():
    query, key, value = tensors((2, 3, 20, 30, 8, 8), requires_grad=True)
    mask = torch.ones(20, 30, dtype=torch.bool)
    mask[4] = mask[17] = False
    output, lse = attention(query, key, value, mask, return_lse=True)
    assert (output[:, :, [4, 17]] == 0).all() and (lse[:, :, [4, 17]] == -math.inf).all()
    grads = torch.autograd.grad(output.sum(), (query, key, value))
    expected = torch.autograd.grad(F.scaled_dot_product_attention(query, key, value, mask).sum(), (query, key, value))
    for grad, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, other)
    assert (attention(query, key[..., :0, :], value[..., :0, :]) == 0).all()
    far = attention(query[..., :1, :], key, value, mask[4:5])
    assert (far == 0).all()


def test_nan_and_infinity():
    query, key, value = tensors((1, 2, 9, 40, 8, 8))
    query[0, 0, 3, 2] = math.nan
    query[0, 1, 5] = math.inf
    stock = F.scaled_dot_product_attention(query, key, value)
    output = attention(query, key, value)
    torch.testing.assert_close(output, stock, equal_nan=True)
    one = attention(query[:, :, 3:4], key, value)
    torch.testing.assert_close(one, stock[:, :, 3:4], equal_nan=True)


def test_large_scores_do_not_overflow():
    query, key, value = tensors((2, 30, 50, 16, 16))
    output = attention(query * 300, key * 300, value)
    torch.testing.assert_close(output, oracle(query * 300, key * 300, value)[0].float(), atol=2e-2, rtol=1e-2)
    assert output.isfinite().all()


def test_uniform_weights_of_whole_numbers_are_exact():
    value = testing.integers((2, 3, 64, 24))
    zeros = torch.zeros(2, 3, 64, 16)
    for length in (1, 5, 40):
        expected = value.mean(-2, keepdim=True).expand(2, 3, length, 24)
        assert torch.equal(attention(zeros[..., :length, :], zeros, value), expected)


def test_broadcast_leading_dimensions():
    def random(*shape):
        return testing.random(shape)

    for query, key, value in (
        (random(5, 8), random(7, 8), random(7, 4)),
        (random(3, 5, 8), random(7, 8), random(7, 4)),
        (random(2, 1, 5, 8), random(1, 3, 7, 8), random(2, 3, 7, 4)),
        (random(5, 8), random(2, 3, 7, 8), random(3, 7, 4)),
        (random(2, 2, 2, 3, 5, 8), random(2, 1, 2, 3, 7, 8), random(3, 7, 4)),
        (random(2, 3, 5, 8), random(2, 1, 7, 8), random(2, 1, 7, 4)),
        (random(0, 3, 5, 8), random(0, 3, 7, 8), random(0, 3, 7, 4)),
    ):
        leaves = [t.requires_grad_() for t in (query, key, value)]
        stock = F.scaled_dot_product_attention(*leaves)
        output = attention(*leaves)
        torch.testing.assert_close(output, stock)
        grad = torch.randn_like(stock)
        for own, other in zip(
            torch.autograd.grad(output, leaves, grad), torch.autograd.grad(stock, leaves, grad), strict=True
        ):
            torch.testing.assert_close(own, other)


@pytest.mark.parametrize("length", [1, 3, 40])
@pytest.mark.parametrize("key_heads, value_heads", [(2, 2), (1, 1), (3, 3), (6, 6), (2, 3), (1, 6)])
def test_grouped_queries(length, key_heads, value_heads):
    query = testing.random((2, 6, length, 8), requires_grad=True)
    key = testing.random((2, key_heads, 33, 8), requires_grad=True)
    value = testing.random((2, value_heads, 33, 5), requires_grad=True)
    stock = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    output = attention(query, key, value, enable_gqa=True)
    torch.testing.assert_close(output, stock)
    grad = torch.randn_like(stock)
    leaves = (query, key, value)
    for own, other in zip(
        torch.autograd.grad(output, leaves, grad), torch.autograd.grad(stock, leaves, grad), strict=True
    ):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_layouts(layout, dtype):
    for length in (1, 4, 23):
        leaves = tensors((2, 3, length, 37, 9, 11), dtype, layout, requires_grad=True)
        dense = [t.detach().contiguous().requires_grad_() for t in leaves]
        output, expected = attention(*leaves), attention(*dense)
        torch.testing.assert_close(
            output,
            expected,
            rtol=3e-3 if dtype in testing.HALF_DTYPES else 1e-5,
            atol=1e-3 if dtype in testing.HALF_DTYPES else 1e-6,
        )
        grad = testing.laid_out(torch.randn_like(expected), layout)
        for own, other in zip(
            torch.autograd.grad(output, leaves, grad), torch.autograd.grad(expected, dense, grad), strict=True
        ):
            torch.testing.assert_close(
                own,
                other,
                rtol=2e-2 if dtype in testing.HALF_DTYPES else 1e-4,
                atol=2e-2 if dtype in testing.HALF_DTYPES else 1e-5,
            )


def test_output_lies_as_query_does():
    apart = torch.randn(2, 7, 3, 8).transpose(1, 2)
    for query in (apart, apart.contiguous(), apart[0]):
        output = attention(query, query, query)
        assert output.stride() == F.scaled_dot_product_attention(query, query, query).stride()


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", testing.available_isas())
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_backward_against_the_oracle(isa, options):
    with testing.forced_isa(isa):
        for dtype, shape in itertools.chain(
            itertools.product(testing.DTYPES, [(2, 13, 35, 9, 17), (2, 200, 130, 16, 8)]),
            ((torch.float32, (1, 2, keys, 5, 3)) for keys in (1, 15, 16, 17, 95, 96, 97)),
            ((torch.float32, (1, length, 3, 8, 8)) for length in (1, 6, 95, 96, 97)),
        ):
            leaves = tensors(shape, dtype, requires_grad=True)
            output, lse = attention(*leaves, **options, return_lse=True)
            double = [t.detach().double().requires_grad_() for t in leaves]
            expected, expected_lse = oracle(*double, **options)
            grads = testing.random(output.shape, dtype), testing.random(lse.shape, lse.dtype)
            seen = expected_lse.isfinite()
            own = torch.autograd.grad((output, lse), leaves, (grads[0], grads[1] * seen))
            wanted = torch.autograd.grad(
                (expected, expected_lse), double, (grads[0].double(), grads[1].double() * seen)
            )
            tolerance = {torch.float32: 2e-5, torch.float64: 1e-13, torch.float16: 8e-3, torch.bfloat16: 6e-2}[dtype]
            for name, grad, other in zip(("query", "key", "value"), own, wanted, strict=True):
                assert grad.dtype == dtype and grad.shape == other.shape
                scale = max(1.0, other.abs().max().item())
                error = (grad.double() - other).abs().max().item() / scale
                assert error <= tolerance, (name, dtype, shape, error)


@pytest.mark.parametrize(
    "shape", [(5, 3, 40, 110), (1, 3, 40, 110), (5, 1, 1, 110), (3, 40, 1), (40, 110), (1, 1), (110,), ()], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_of_an_additive_mask(shape, dtype):
    leaves = tensors((5, 3, 40, 110, 8, 8), dtype, requires_grad=True)  # up to 15 heads add to one place
    mask = testing.random(shape, dtype, requires_grad=True)
    for options in ({}, {"softcap": 1.5}, {"window": 5}):
        output = attention(*leaves, mask, **options)
        double = [t.detach().double().requires_grad_() for t in (*leaves, mask)]
        expected, _ = oracle(*double[:3], double[3], **options)
        grad = testing.random(output.shape, dtype)
        own = torch.autograd.grad(output, (*leaves, mask), grad)
        wanted = torch.autograd.grad(expected, double, grad.double())
        for mine, other in zip(own, wanted, strict=True):
            assert mine.dtype == dtype
            scale = max(1.0, other.abs().max().item())
            assert (mine.double() - other).abs().max().item() / scale <= (2e-5 if dtype == torch.float32 else 6e-2)
        alone = torch.autograd.grad(attention(*leaves, mask, **options), mask, grad)[0]
        assert torch.equal(alone, own[3])


def test_only_what_is_wanted_is_computed():
    query, key, value = tensors((2, 3, 9, 20, 8, 8))
    mask = torch.randn(9, 20)
    every = [t.clone().requires_grad_() for t in (query, key, value, mask)]
    grad = torch.randn(2, 3, 9, 8)
    expected = torch.autograd.grad(attention(*every), every, grad)
    for i, wanted in enumerate(expected):
        some = [t.clone().requires_grad_(i == j) for j, t in enumerate((query, key, value, mask))]
        assert torch.equal(torch.autograd.grad(attention(*some), some[i], grad)[0], wanted)


def small(*shape, requires_grad=True):
    return torch.randn(shape, dtype=torch.float64, requires_grad=requires_grad)


GRADCHECKS = {
    "plain": ((2, 3, 3), {}),
    "causal": ((2, 4, 3), {"is_causal": True}),
    "window": ((2, 4, 5), {"window": (1, 1)}),
    "softcap": ((1, 3, 4), {"softcap": 0.8}),
}


@pytest.mark.parametrize("name", GRADCHECKS)
def test_gradcheck(name):
    (heads, length, keys), options = GRADCHECKS[name]
    inputs = small(heads, length, 3), small(heads, keys, 3), small(heads, keys, 2)

    def both(*inputs):
        return attention(*inputs, **options, return_lse=True)

    torch.autograd.gradcheck(both, inputs)
    torch.autograd.gradgradcheck(both, inputs)


@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 1), (4,)], ids=str)
def test_gradcheck_of_masks_and_groups(shape):
    inputs = small(2, 3, 3), small(1, 4, 3), small(1, 4, 2), small(*shape)

    def grouped(*inputs):
        return attention(*inputs, enable_gqa=True)

    torch.autograd.gradcheck(grouped, inputs)
    torch.autograd.gradgradcheck(grouped, inputs)
    mask = torch.rand(3, 4) > 0.3
    torch.autograd.gradgradcheck(lambda *x: attention(*x, mask, enable_gqa=True), inputs[:3])


def test_gradcheck_with_dropout():
    inputs = small(2, 3, 3), small(2, 5, 3), small(2, 5, 2)

    def dropped(*inputs):
        torch.manual_seed(3)
        return attention(*inputs, dropout_p=0.4)

    torch.autograd.gradcheck(dropped, inputs)
    torch.autograd.gradgradcheck(dropped, inputs)


# ---- dropout ---------------------------------------------------------------------------------------------------------


def call_op(query, key, value, mask=None, p=0.0, seed=None, **options):
    return torch.ops.fastnn.attention(query, key, value, mask, p, philox_seed=seed, **options)


@pytest.mark.parametrize("isa", testing.available_isas())
def test_dropout_is_the_reference_s(isa):
    seed = torch.tensor([0x123456789ABCDEF])
    with testing.forced_isa(isa):
        for shape in ((2, 3, 40, 150, 8, 8), (2, 1, 5, 70, 8, 8), (2, 1, 1, 600, 8, 8), (1, 1, 1, 1100, 4, 4)):
            leaves = tensors(shape, requires_grad=True)
            double = [t.detach().double().requires_grad_() for t in leaves]
            output, lse = call_op(*leaves, p=0.3, seed=seed)
            expected, expected_lse = reference.attention(*double, dropout_p=0.3, philox_seed=seed)
            torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
            grad = torch.randn_like(output)
            own = torch.autograd.grad(output, leaves, grad)
            for mine, other in zip(own, torch.autograd.grad(expected, double, grad.double()), strict=True):
                torch.testing.assert_close(mine.double(), other, rtol=1e-4, atol=1e-4)


def test_philox_known_answers():
    """The vectors of Random123's kat_vectors for philox4x32 with 10 rounds."""
    kept = reference.attention_dropout_mask(torch.tensor([0]), 0.5, (1, 1, 32))
    # Counter (0, 0, 0, 0), key (0, 0): 6627e8d5 e169c58d bc57ac4c 9b00dbd8 are keys 0, 8, 16, 24 of head 0, query 0.
    words = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert kept[0, 0, ::8].tolist() == [word >= 2**31 for word in words]


def test_dropout():
    attention_dropout.check_that_it_follows_torch_s_generator("cpu")
    attention_dropout.check_that_it_drops_the_share_it_says("cpu")


# ---- promises --------------------------------------------------------------------------------------------------------


def test_same_result_on_any_number_of_threads():
    cases = [((2, 3, 300, 300, 16, 16), {"is_causal": True}), ((1, 1, 1000, 700, 8, 8), {}), ((1, 2, 1, 3000, 64, 64), {}),
             ((1, 2, 40, 2000, 32, 32), {"window": (700, -1)}), ((9, 2, 49, 49, 8, 8), {})]  # fmt: skip
    for shape, options in cases:
        leaves = tensors(shape, requires_grad=True)
        mask = None if "is_causal" in options else torch.randn(shape[-4], shape[-3], requires_grad=True)
        wanted = leaves + ([mask] if mask is not None else [])
        results = []
        for threads in (1, 2, 3, 7, 2):
            with testing.threads(threads):
                torch.manual_seed(1)
                output, lse = attention(*leaves, mask, 0.1, **options, return_lse=True)
                grads = torch.autograd.grad((output.sum(), lse.sum()), wanted)
                results.append((output, lse, *grads))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("isa", testing.available_isas())
@pytest.mark.parametrize("side", ["after", "before"])
def test_nothing_outside_the_tensors_is_touched(isa, side):
    with testing.forced_isa(isa):
        for dtype, length, keys, width in itertools.product(testing.DTYPES, (1, 3, 14), (1, 17, 97), (1, 8, 19)):
            leaves = tensors((2, length, keys, width, width), dtype)
            masks = (None, torch.rand(length, keys) > 0.2, testing.random((2, length, keys), dtype))
            mask = masks[(length + keys + width) % 3]
            plain = [t.requires_grad_(t.is_floating_point()) for t in (*leaves, *([] if mask is None else [mask]))]
            near = [testing.guarded(t, side) for t in plain]
            wanted = attention(*plain)
            grad = torch.randn_like(wanted)
            expected = torch.autograd.grad(wanted, [t for t in plain if t.requires_grad], grad)
            with testing.guarded_outputs(side):
                output = attention(*near)
                grads = torch.autograd.grad(output, [t for t in near if t.requires_grad], testing.guarded(grad, side))
            assert torch.equal(output, wanted)
            assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_no_matrix_of_scores_in_memory():
    length = 12000  # a float32 score matrix would be 576 MB
    leaves = [torch.randn(1, 1, length, 8, requires_grad=True) for _ in range(3)]
    attention(*(t[..., :100, :] for t in leaves)).sum().backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    attention(*leaves, is_causal=True).sum().backward()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_no_operator_of_torch_does_the_work():
    leaves = tensors((2, 3, 40, 50, 8, 8), requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attention(*leaves, dropout_p=0.1).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"fastnn::attention", "fastnn::attention_backward"} <= names
    banned = ("matmul", "bmm", "::mm", "addmm", "softmax", "scaled_dot_product", "einsum", "mkldnn", "baddbmm")
    assert not [name for name in names if any(word in name for word in banned)]


# ---- the operator in torch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend):
    def loss(query, key, value, mask):
        output, lse = attention(query, key, value, mask, window=9, softcap=3.0, return_lse=True)
        output = output + attention(query, key, value, is_causal=True, enable_gqa=True)
        return (output * output).sum() + lse.sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for length in (6, 9) if backend == "aot_eager" else (6,):
        leaves = [*tensors((2, 3, length, 11, 8, 8), requires_grad=True), torch.randn(length, 11, requires_grad=True)]
        own, expected = compiled(*leaves), loss(*leaves)
        torch.testing.assert_close(own, expected)
        for a, b in zip(torch.autograd.grad(own, leaves), torch.autograd.grad(expected, leaves), strict=True):
            torch.testing.assert_close(a, b)
    if backend == "aot_eager":
        with torch.no_grad():
            torch.testing.assert_close(compiled(*leaves), loss(*leaves))


def test_compile_with_dropout():
    torch.compiler.reset()
    leaves = tensors((2, 3, 6, 11, 8, 8), requires_grad=True)
    compiled = torch.compile(lambda *x: attention(*x, dropout_p=0.5), fullgraph=True, backend="aot_eager")
    torch.manual_seed(4)
    first = compiled(*leaves)
    first.sum().backward()
    torch.manual_seed(4)
    assert torch.equal(compiled(*leaves), first)


def test_meta():
    query, key, value = (t.to("meta") for t in tensors((2, 3, 6, 11, 8, 4)))
    output, lse = attention(query, key, value, dropout_p=0.1, return_lse=True)
    assert output.device.type == "meta" and output.shape == (2, 3, 6, 4) and lse.shape == (2, 3, 6)


(OPINFO,) = [op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention"]


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_samples_of_torch(dtype):
    """No farther from float64 than twice torch's own distance, and the rounding of the result."""
    for sample in OPINFO.sample_inputs("cpu", dtype, requires_grad=True):
        arguments, options = [sample.input, *sample.args], dict(sample.kwargs)
        if options.get("dropout_p", 0.0) > 0:
            assert attention(*arguments, **options).shape == F.scaled_dot_product_attention(*arguments, **options).shape
            options["dropout_p"] = 0.0  # other random numbers than torch's; test_dropout_is_the_reference_s has them
        results = []
        for function, kind in (
            (attention, dtype),
            (F.scaled_dot_product_attention, dtype),
            (F.scaled_dot_product_attention, torch.float64),
        ):
            keyed = {k: as_leaf(v, kind) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
            leaves = [as_leaf(t, kind) for t in arguments]
            output = function(*leaves, **keyed)
            torch.manual_seed(0)
            grad = torch.randn(output.shape, dtype=torch.float64).to(dtype).to(kind)
            wanted = [t for t in (*leaves, *keyed.values()) if isinstance(t, torch.Tensor) and t.requires_grad]
            results.append((output, *torch.autograd.grad(output, wanted, grad)))
        sizes = gradient_sizes(grad, *(t.detach() for t in leaves), **keyed)
        for i, (own, stock, exact) in enumerate(zip(*results, strict=True)):
            assert own.dtype == stock.dtype and own.shape == stock.shape
            error, theirs = ((t.detach().double() - exact.detach()).abs().max() for t in (own, stock))
            allowed = 2 * theirs + 4 * torch.finfo(dtype).eps * sizes[i].max()
            assert error <= allowed, (i, sample, error, allowed)


def gradient_sizes(grad, query, key, value, attn_mask=None, **options):
    """What is summed for output and the gradients of query, key, value and mask: dS = P (dP - delta) cancels, parts do not."""
    options.pop("dropout_p", None)
    repeat = query.shape[-3] // key.shape[-3] if options.pop("enable_gqa", False) else 1
    keys, values = (t.repeat_interleave(repeat, -3) if repeat > 1 else t for t in (key, value))
    scale = options.get("scale") or 1 / math.sqrt(query.shape[-1])
    weights = reference.attention(query, keys, torch.eye(key.shape[-2], dtype=query.dtype), attn_mask, **options)[0]
    rounding = 1 + (query.abs() @ keys.abs().mT).max() * scale
    products = grad.abs() @ values.abs().mT
    parts = weights * (products + (weights * products).sum(-1, keepdim=True)) * rounding
    output = weights @ values.abs() * rounding
    sizes = [parts @ keys.abs() * scale, parts.mT @ query.abs() * scale, weights.mT @ grad.abs() * rounding]
    sizes[1:] = [(t.unflatten(-3, (-1, repeat)).sum(-3) if repeat > 1 else t) for t in sizes[1:]]
    shapes = [query.shape, key.shape, value.shape]
    if attn_mask is not None and attn_mask.is_floating_point():
        sizes.append(parts)
        shapes.append(attn_mask.shape)
    return [output] + [size.sum_to_size(shape) for size, shape in zip(sizes, shapes, strict=True)]


def as_leaf(tensor, dtype):
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)


# ---- mistakes --------------------------------------------------------------------------------------------------------


def random(*shape):
    return torch.randn(shape)


MISTAKES = {
    "mask and causal": (RuntimeError, "attn_mask must be None", lambda: ((3, 5), (3, 5), (3, 5)), {"attn_mask": torch.ones(3, 3), "is_causal": True}),
    "one dimension": (RuntimeError, "at least 2 dimensions", lambda: ((5,), (5,), (5,)), {}),
    "head_dim": (RuntimeError, "query's last dimension", lambda: ((3, 5), (3, 4), (3, 5)), {}),
    "positions": (RuntimeError, "as many positions", lambda: ((3, 5), (3, 5), (4, 5)), {}),
    "heads": (RuntimeError, "must match", lambda: ((2, 3, 5), (3, 3, 5), (3, 3, 5)), {}),
    "groups": (RuntimeError, "must divide", lambda: ((6, 3, 5), (4, 3, 5), (4, 3, 5)), {"enable_gqa": True}),
    "no heads": (IndexError, "dimension of heads", lambda: ((3, 5), (3, 5), (3, 5)), {"enable_gqa": True}),
    "mask dtype": (RuntimeError, "attn_mask must be of bool", lambda: ((3, 5), (3, 5), (3, 5)), {"attn_mask": torch.ones(3, 3).long()}),
    "mask shape": (RuntimeError, "attn_mask must be broadcastable", lambda: ((3, 5), (3, 5), (3, 5)), {"attn_mask": torch.ones(2, 3)}),
    "dropout": (RuntimeError, "dropout_p must be", lambda: ((3, 5), (3, 5), (3, 5)), {"dropout_p": 1.5}),
    "softcap": (ValueError, "softcap must be", lambda: ((3, 5), (3, 5), (3, 5)), {"softcap": -1.0}),
    "window": (ValueError, "window must be", lambda: ((3, 5), (3, 5), (3, 5)), {"window": (1, 2, 3)}),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    kind, text, shapes, options = MISTAKES[name]
    with pytest.raises(kind, match=text):
        attention(*(torch.randn(shape) for shape in shapes()), **options)


def test_mistakes_of_dtype_and_type():
    query, key, value = tensors((3, 4, 5, 5))
    with pytest.raises(RuntimeError, match="fastnn.attention: key must have the dtype of query"):
        attention(query, key.double(), value)
    with pytest.raises(TypeError, match="fastnn.attention: key must be a Tensor; got int"):
        attention(query, 3, value)
    with pytest.raises(TypeError):
        attention(query, key, value, dropout_p="half")


class Own(torch.Tensor):
    """A subclass of which no kernel knows."""


def test_fallback():
    query, key, value = tensors((2, 3, 4, 8, 8))
    own = query.as_subclass(Own)
    expected = attention(query, key, value)
    torch.testing.assert_close(attention(own, key, value).as_subclass(torch.Tensor), expected)
    mine = attention(own, key, value, window=1, softcap=2.0, return_lse=True)
    for a, b in zip(mine, attention(query, key, value, window=1, softcap=2.0, return_lse=True), strict=True):
        torch.testing.assert_close(a.as_subclass(torch.Tensor), b)
    fastnn.set_fallback("error")
    with pytest.raises(RuntimeError, match="fastnn.attention: no kernel takes this input"):
        attention(own, key, value)


@pytest.mark.parametrize("length", [7, 300])
@pytest.mark.parametrize("hidden", [-1e9, -1e30, torch.finfo(torch.float32).min])
def test_a_row_masked_by_a_number_is_the_mean_of_the_values(hidden, length):
    """Least finite numbers are what people mask with; times log2(e) they would be -infinity, and less themselves NaN."""
    q, k, v = (torch.randn(1, 2, length, 16, requires_grad=True) for _ in range(3))
    mask = torch.zeros(length, length)
    mask[2], mask[:, -1] = hidden, hidden
    grad = torch.randn(1, 2, length, 16)
    grad[:, :, 2] = 0  # nobody looks at such a row, and its gradient must not spoil the others'
    own, stock = (
        (y := f(q, k, v, mask), *torch.autograd.grad(y, (q, k, v), grad))
        for f in (attention, F.scaled_dot_product_attention)
    )
    torch.testing.assert_close(own, stock, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fastnn.functional.attention_weights(q, k, v, mask)[0], stock[0], rtol=1e-4, atol=1e-5)
