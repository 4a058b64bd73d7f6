"""functional/attention_weights.py: output and weights against fastnn.reference in float64, beside torch's own error."""

import itertools
import math

import pytest
import torch

import fastnn
from fastnn import reference, testing
from fastnn.functional import attention_weights, scaled_dot_product_attention

OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": -0.3},
    "window": {"window": (3, 1)},
    "softcap-causal": {"softcap": 1.5, "is_causal": True},
}


def tensors(shape, dtype=torch.float32, layout="contiguous", requires_grad=False):
    """Query [lead, L, E], key [lead, S, E] and value [lead, S, Ev] for shape (*lead, L, S, E, Ev)."""
    *lead, length, keys, width, value_width = shape
    return [
        testing.random((*lead, *size), dtype, layout, requires_grad)
        for size in ((length, width), (keys, width), (keys, value_width))
    ]


def formula(*inputs, **options):
    """Output and weights by fastnn.reference."""
    output, _, weights = reference.attention_weights(*inputs, **options)
    return output, weights


def softmaxed(query, key, attn_mask=None, scale=None):
    """The weights as torch.nn.functional.multi_head_attention_forward computes them, in query's dtype."""
    scores = query * (scale or 1 / math.sqrt(query.shape[-1])) @ key.transpose(-2, -1)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1)


def double(*inputs):
    return [t.detach().double() if t is not None and t.is_floating_point() else t for t in inputs]


def check(query, key, value, attn_mask=None, average=False, stock=None, **options):
    output, weights = attention_weights(query, key, value, attn_mask, average=average, **options)
    assert weights.dtype == query.dtype and weights.is_contiguous()
    exact = double(query, key, value, attn_mask)
    expected_output, expected = formula(*exact, **options)
    # One rounding of every score moves a weight by the size of its largest score.
    sizes = exact[0].abs() @ exact[1].abs().transpose(-2, -1) * abs(options.get("scale") or 1)
    if attn_mask is not None and attn_mask.is_floating_point():
        sizes = sizes + exact[3].abs().nan_to_num(0, 0, 0)
    largest = sizes.amax(-1, keepdim=True) if sizes.shape[-1] else sizes.sum(-1, keepdim=True)
    magnitude = (1 + largest) * expected
    if average:
        expected, magnitude = expected.mean(-3), magnitude.mean(-3)
    testing.assert_close_to_oracle(weights, expected, magnitude, stock, c=4, name="averaged" if average else "weights")
    alone = scaled_dot_product_attention(query, key, value, attn_mask, **options)
    assert torch.equal(output.isnan(), expected_output.isnan())
    assert torch.equal(output.nan_to_num(0), alone)
    return weights


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", testing.available_isas())
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_every_edge_of_the_tile(isa, dtype):
    lengths = (0, 1, 2, 5, 6, 7, 8, 9, 13, 15)
    with testing.forced_isa(isa):
        for length, keys in itertools.product(lengths, (0, 1, 7, 8, 9, 16, 33, 127, 129)):
            check(*tensors((length, keys, 5, 3), dtype))
            check(*tensors((2, length, keys, 8, 16), dtype), average=keys % 2 == 1)
        for width, length in itertools.product((0, 1, 7, 8, 9, 15, 17, 33), (1, 3, 11)):
            check(*tensors((2, length, 19, width, 4), dtype))


@pytest.mark.parametrize("isa", testing.available_isas())
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_long_sequences(isa, options):
    with testing.forced_isa(isa):
        for length, keys in ((257, 300), (300, 257), (97, 1100), (1, 1500), (64, 1024), (205, 205)):
            for average in (False, True):
                check(*tensors((3, length, keys, 16, 24)), average=average, **options)


@pytest.mark.parametrize("dtype", [torch.float32, *testing.HALF_DTYPES], ids=str)
@pytest.mark.parametrize("average", [False, True])
def test_error_beside_torch(dtype, average):
    """No farther from float64 than twice what torch's matmul and softmax are, as torch.nn.MultiheadAttention has them."""
    for case in testing.ATTENTION:
        scores = case.batch * case.heads * case.queries * case.keys
        if case.causal or case.window or case.softcap or case.kv_heads or scores > 4e6:
            continue
        # Of few weights, the largest error is chance.
        batch = case.batch * max(1, 500_000 // max(scores, case.batch * case.heads * case.keys * case.head_dim))
        query = testing.random((batch, case.queries, case.heads, case.head_dim), dtype).transpose(1, 2)
        shape = (batch, case.heads, case.keys)
        key, value = testing.random((*shape, case.head_dim), dtype), testing.random((*shape, case.head_dim), dtype)
        stock = softmaxed(query, key)
        weights = check(query, key, value, None, average, stock.mean(-3) if average else stock)
        exact = softmaxed(query.double(), key.double())
        exact, stock = (exact.mean(-3), stock.mean(-3)) if average else (exact, stock)
        own, theirs = (testing.max_error(t, exact) for t in (weights, stock))
        assert own <= 2 * theirs + torch.finfo(dtype).eps, (case.name, own, theirs)


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 3, 5, 7), (2, 1, 1, 7), (3, 5, 1), (5, 7), (7,), ()], ids=str)
@pytest.mark.parametrize("kind", ["bool", "additive", "float32", "infinite"])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_masks(shape, kind, dtype):
    query, key, value = tensors((2, 3, 5, 7, 8, 8), dtype)
    mask = torch.rand(shape) > 0.4
    if kind != "bool":
        additive = testing.random(shape, torch.float32 if kind == "float32" else dtype)
        mask = additive.masked_fill(~mask, -math.inf) if kind == "infinite" else additive
    for average in (False, True):
        check(query, key, value, mask, average)
        check(query, key, value, testing.laid_out(mask, "transposed"), average, softcap=2.0, window=(3, 3))


@pytest.mark.parametrize("average", [False, True])
def test_a_query_that_sees_nothing_gives_nan_as_softmax_does(average):
    query, key, value = tensors((2, 3, 20, 300, 8, 8))
    mask = torch.ones(2, 1, 20, 300, dtype=torch.bool)
    mask[0, :, 4] = mask[1, :, 17] = False
    stock = softmaxed(query, key, mask)
    expected = stock @ value
    for length in (20, 5):  # 5 rows: without packing
        part = slice(length)
        output, weights = attention_weights(query[:, :, part], key, value, mask[:, :, part], average=average)
        torch.testing.assert_close(output, expected[:, :, part], equal_nan=True)
        wanted = stock.mean(1) if average else stock
        torch.testing.assert_close(weights, wanted[..., part, :], equal_nan=True)
    output, weights = attention_weights(query, key[:, :, :0], value[:, :, :0], average=average)
    assert weights.shape == (*((2, 20) if average else (2, 3, 20)), 0) and (output == 0).all()


def test_nan_and_infinity():
    query, key, value = tensors((1, 2, 9, 40, 8, 8))
    query[0, 0, 3, 2] = math.nan
    query[0, 1, 5] = math.inf
    torch.testing.assert_close(attention_weights(query, key, value)[1], softmaxed(query, key), equal_nan=True)


def test_broadcast_leading_dimensions():
    def random(*shape):
        return testing.random(shape)

    for query, key, value in (
        (random(5, 8), random(7, 8), random(7, 4)),
        (random(3, 5, 8), random(7, 8), random(7, 4)),
        (random(2, 1, 5, 8), random(1, 3, 7, 8), random(2, 3, 7, 4)),
        (random(2, 2, 2, 3, 5, 8), random(2, 1, 2, 3, 7, 8), random(3, 7, 4)),
        (random(2, 3, 5, 8), random(2, 1, 7, 8), random(2, 1, 7, 4)),
        (random(0, 3, 5, 8), random(0, 3, 7, 8), random(0, 3, 7, 4)),
    ):
        check(query, key, value)
        if query.dim() > 2:
            check(query, key, value, average=True)
    query, key, value = random(5, 8), random(7, 8), random(2, 3, 7, 4)  # what only the values have
    weights = attention_weights(query, key, value)[1]
    torch.testing.assert_close(weights, softmaxed(query, key).expand(2, 3, 5, 7))
    output, weights = attention_weights(query, key, value, dropout_p=0.5)
    torch.testing.assert_close(weights @ value, output)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("key_heads", [1, 2, 3, 6])
def test_grouped_queries(key_heads, average):
    query, key, value = (testing.random((2, n, 33, 8)) for n in (6, key_heads, key_heads))
    weights = attention_weights(query, key, value, enable_gqa=True, average=average)[1]
    expected = softmaxed(query, key.repeat_interleave(6 // key_heads, 1))
    torch.testing.assert_close(weights, expected.mean(1) if average else expected)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_layouts(layout, dtype):
    for length in (1, 4, 23):
        check(*tensors((2, 3, length, 37, 9, 11), dtype, layout))
        check(*tensors((2, 3, length, 37, 9, 11), dtype, layout), average=True)


# ---- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", testing.available_isas())
@pytest.mark.parametrize("average", [False, True])
def test_dropout_is_the_reference_s(isa, average):
    seed = torch.tensor([0x123456789ABCDEF])
    with testing.forced_isa(isa):
        for shape in ((2, 3, 40, 150, 8, 8), (2, 1, 5, 70, 8, 8), (1, 1, 1, 1100, 4, 4)):
            query, key, value = tensors(shape)
            options = {"average": average, "dropout_p": 0.3, "philox_seed": seed}
            own = torch.ops.fastnn.attention_weights(query, key, value, **options)
            expected = reference.attention_weights(*double(query, key, value), **options)
            for a, b in zip(own, expected, strict=True):
                torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_dropped_weights_are_those_that_multiplied_the_values():
    query, key, value = tensors((2, 3, 40, 150, 8, 8))
    torch.manual_seed(7)
    output, weights = attention_weights(query, key, value, dropout_p=0.4)
    torch.testing.assert_close(weights @ value, output)
    assert 0.38 < (weights == 0).double().mean() < 0.42
    kept = attention_weights(query, key, value)[1]
    torch.testing.assert_close(weights[weights != 0], (kept / 0.6)[weights != 0])
    torch.manual_seed(7)
    again = attention_weights(query, key, value, dropout_p=0.4, average=True)
    assert torch.equal(again[0], output)
    torch.testing.assert_close(again[1], weights.mean(1))
    output, weights = attention_weights(query, key, value, dropout_p=1.0)
    assert (output == 0).all() and (weights == 0).all()


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_backward_against_the_oracle(options, average):
    for dtype in testing.DTYPES:
        leaves = tensors((2, 3, 35, 35, 9, 17), dtype, requires_grad=True)
        exact = [t.requires_grad_() for t in double(*leaves)]
        results = attention_weights(*leaves, average=average, **options)
        expected = formula(*exact, average=average, **options)
        grads = [testing.random(t.shape, dtype) for t in results]
        own = torch.autograd.grad(results, leaves, grads)
        wanted = torch.autograd.grad(expected, exact, [t.double() for t in grads])
        tolerance = {torch.float32: 2e-5, torch.float64: 1e-13, torch.float16: 8e-3, torch.bfloat16: 6e-2}[dtype]
        for mine, other in zip(own, wanted, strict=True):
            assert mine.dtype == dtype and mine.shape == other.shape
            error = (mine.double() - other).abs().max().item() / max(1.0, other.abs().max().item())
            assert error <= tolerance, (dtype, error)


def test_only_the_gradients_that_arrive_are_computed():
    """Without one for the weights the backward is attention's, to the last bit, and nothing else."""
    query, key, value = tensors((2, 3, 40, 50, 8, 8), requires_grad=True)
    mask = torch.randn(40, 50, requires_grad=True)
    leaves = [query, key, value, mask]
    grad = torch.randn(2, 3, 40, 8)
    output, _ = attention_weights(*leaves)
    expected = torch.autograd.grad(scaled_dot_product_attention(*leaves), leaves, grad)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        own = torch.autograd.grad(output, leaves, grad)
    assert all(torch.equal(a, b) for a, b in zip(own, expected, strict=True))
    names = {event.key for event in profile.key_averages()}
    assert "fastnn::attention_backward" in names and "fastnn::attention_weights_backward" not in names
    testing.assert_own_kernels(lambda: attention_weights(*leaves)[0].sum().backward())
    _, weights = attention_weights(*leaves)
    only_weights = torch.autograd.grad(weights.square().sum(), leaves, allow_unused=True)
    exact = [t.requires_grad_() for t in double(*leaves)]
    wanted = torch.autograd.grad(formula(*exact)[1].square().sum(), exact, allow_unused=True)
    for a, b in zip(only_weights, wanted, strict=True):
        assert b is None or torch.allclose(a.double(), b, rtol=1e-4, atol=1e-5)
    assert only_weights[2] is None or (only_weights[2] == 0).all()


def small(*shape, requires_grad=True):
    return torch.randn(shape, dtype=torch.float64, requires_grad=requires_grad)


GRADCHECKS = {
    "plain": ((2, 3, 3), {}),
    "average": ((2, 3, 3), {"average": True}),
    "causal": ((2, 4, 3), {"is_causal": True, "average": True}),
    "window": ((2, 4, 5), {"window": (1, 1)}),
    "softcap": ((1, 3, 4), {"softcap": 0.8}),
    "dropout": ((2, 3, 5), {"dropout_p": 0.4, "average": True}),
}


@pytest.mark.parametrize("name", GRADCHECKS)
def test_gradcheck(name):
    (heads, length, keys), options = GRADCHECKS[name]
    inputs = small(heads, length, 3), small(heads, keys, 3), small(heads, keys, 2)

    def both(*inputs):
        torch.manual_seed(3)
        return attention_weights(*inputs, **options)

    torch.autograd.gradcheck(both, inputs)
    torch.autograd.gradgradcheck(both, inputs)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 1), (4,)], ids=str)
def test_gradcheck_of_masks_and_groups(shape, average):
    inputs = small(2, 3, 3), small(1, 4, 3), small(1, 4, 2), small(*shape)

    def grouped(*inputs):
        return attention_weights(*inputs, enable_gqa=True, average=average)

    torch.autograd.gradcheck(grouped, inputs)
    torch.autograd.gradgradcheck(grouped, inputs, fast_mode=True)
    mask = torch.rand(3, 4) > 0.3
    mask[:, 0] = True
    torch.autograd.gradgradcheck(lambda *x: grouped(*x, mask), inputs[:3], fast_mode=True)


# ---- promises --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", [False, True])
def test_same_result_on_any_number_of_threads(average):
    cases = [
        ((2, 3, 300, 300, 16, 16), {"is_causal": True}),
        ((1, 1, 700, 500, 8, 8), {}),
        ((1, 4, 1, 3000, 64, 64), {}),
    ]
    for shape, options in cases:
        leaves = tensors(shape)
        results = []
        for threads in (1, 2, 3, 7, 2):
            with testing.threads(threads):
                torch.manual_seed(1)
                results.append(attention_weights(*leaves, None, 0.1, average=average, **options))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("isa", testing.available_isas())
@pytest.mark.parametrize("side", ["after", "before"])
def test_nothing_outside_the_tensors_is_touched(isa, side):
    with testing.forced_isa(isa):
        for dtype, length, keys, width in itertools.product(testing.DTYPES, (1, 3, 14), (1, 17, 130), (1, 8, 19)):
            plain = tensors((2, length, keys, width, width), dtype)
            masks = (None, torch.rand(length, keys) > 0.2, testing.random((2, length, keys), dtype))
            mask = masks[(length + keys + width) % 3]
            plain += [] if mask is None else [mask]
            near = [testing.guarded(t, side) for t in plain]
            for average in (False, True):
                expected = attention_weights(*plain, average=average)
                with testing.guarded_outputs(side):
                    own = attention_weights(*near, average=average)
                torch.testing.assert_close(own, expected, rtol=0, atol=0, equal_nan=True)


def test_no_operator_of_torch_does_the_work():
    leaves = tensors((2, 3, 40, 50, 8, 8))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attention_weights(*leaves, dropout_p=0.1, average=True)
    names = {event.key for event in profile.key_averages()}
    assert "fastnn::attention_weights" in names
    banned = (
        "matmul",
        "mm",
        "softmax",
        "scaled_dot_product",
        "einsum",
        "dropout",
        "mean",
        "masked_fill",
        "copy",
        "add",
    )
    assert not [name for name in names if any(word in name for word in banned)]


# ---- the operator in torch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend, average):
    def loss(query, key, value, mask):
        output, weights = attention_weights(query, key, value, mask, window=9, softcap=3.0, average=average)
        return (output * output).sum() + weights.sin().sum()

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
    compiled = torch.compile(lambda *x: attention_weights(*x, dropout_p=0.5), fullgraph=True, backend="aot_eager")
    torch.manual_seed(4)
    output, weights = compiled(*leaves)
    (output.sum() + weights.sum()).backward()
    torch.testing.assert_close(weights @ leaves[2], output)
    torch.manual_seed(4)
    assert torch.equal(compiled(*leaves)[1], weights)


def test_meta():
    query, key, value = (t.to("meta") for t in tensors((2, 3, 6, 11, 8, 4)))
    output, weights = attention_weights(query, key, value, dropout_p=0.1)
    assert weights.device.type == "meta" and output.shape == (2, 3, 6, 4) and weights.shape == (2, 3, 6, 11)
    assert attention_weights(query, key, value, average=True)[1].shape == (2, 6, 11)


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_mistakes():
    query, key, value = tensors((3, 4, 5, 6, 6))
    for kind, text, arguments, options in (
        (RuntimeError, "attn_mask must be None", (query, key, value, torch.ones(4, 5)), {"is_causal": True}),
        (RuntimeError, "dropout_p must be", (query, key, value), {"dropout_p": 1.5}),
        (RuntimeError, "key must have the dtype of query", (query, key.double(), value), {}),
        (RuntimeError, "dimension of heads to average", (query[0], key[0], value[0]), {"average": True}),
        (ValueError, "window must be", (query, key, value), {"window": (1, 2, 3)}),
        (TypeError, "key must be a Tensor; got int", (query, 3, value), {}),
    ):
        with pytest.raises(kind, match=text):
            attention_weights(*arguments, **options)


class Own(torch.Tensor):
    """A subclass of which no kernel knows."""


def test_fallback():
    query, key, value = tensors((2, 3, 4, 8, 8))
    own = query.as_subclass(Own)
    for options in ({}, {"average": True}, {"is_causal": True, "softcap": 2.0}):
        for a, b in zip(
            attention_weights(own, key, value, **options), attention_weights(query, key, value, **options), strict=True
        ):
            torch.testing.assert_close(a.as_subclass(torch.Tensor), b)
    fastnn.set_fallback("error")
    with pytest.raises(RuntimeError, match="fastnn.attention_weights: no kernel takes this input"):
        attention_weights(own, key, value)
