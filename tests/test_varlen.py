"""functional/varlen.py: each sequence of a packed batch is attended to as if it were alone."""

import inspect
import itertools
import math

import pytest
import torch
from torch.nn.attention import varlen as stock
from torch.nn.attention.varlen import AuxRequest

import fastnn
from bench import memory
from fastnn import testing
from fastnn.functional import scaled_dot_product_attention as attention
from fastnn.functional import varlen_attn
from tests.test_attention import oracle, sensitivity

pytestmark = pytest.mark.usefixtures("one_thread")

LSE = AuxRequest(lse=True)
# The lengths of queries, and of keys where they are others.
BATCHES = {
    "mixed": ([3, 0, 1, 7, 13, 13, 13, 2, 0], None),
    "one long": ([1, 257, 5], None),
    "same": ([8, 8, 8], None),
    "one": ([11], None),
    "empty sequences": ([0, 0], None),
    "no sequence": ([], None),
    "other keys": ([5, 1, 1, 1, 0, 4, 9], [5, 17, 17, 31, 6, 0, 3]),
    "decoding": ([1, 1, 1], [130, 7, 1]),
}
OPTIONS = {
    "plain": {},
    "causal": {"window_size": (-1, 0)},
    "window": {"window_size": (3, 1)},
    "sliding": {"window_size": (5, 0), "scale": -0.3},
    "softcap": {"softcap": 1.5, "window_size": (-1, 2)},
}


def cumulative(lengths, dtype=torch.int32):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)


def packed(batch, dtype=torch.float32, heads=4, kv_heads=4, requires_grad=False):
    """Query, key and value, and the arguments that say what is where."""
    queries, keys = batch[0], batch[0] if batch[1] is None else batch[1]
    sizes = ((sum(queries), heads, 8), (sum(keys), kv_heads, 8), (sum(keys), kv_heads, 5))
    tensors = [testing.random(size, dtype, requires_grad=requires_grad) for size in sizes]
    return tensors, (cumulative(queries), cumulative(keys), max(queries, default=0), max(keys, default=0))


def sequences(tensors, batch):
    """The heads-first query, key and value of each sequence."""
    lengths = (batch[0], *[batch[0] if batch[1] is None else batch[1]] * 2)
    splits = (t.split(sizes) for t, sizes in zip(tensors, lengths, strict=True))
    return [tuple(t.transpose(0, 1) for t in one) for one in zip(*splits, strict=True)] if batch[0] else []


def alone(function, tensors, batch, options):
    """Output [T, H, Ev] and log-sum-exp [H, T] by one call for each sequence."""
    options = {("window" if name == "window_size" else name): value for name, value in options.items()}
    parts = [function(*one, **options) for one in sequences(tensors, batch)]
    outputs, lses = zip(*parts, strict=True)
    return torch.cat([output.transpose(0, 1) for output in outputs]), torch.cat(lses, 1)


def separate(query, key, value, **options):
    return attention(query.contiguous(), key.contiguous(), value.contiguous(), **options, return_lse=True)


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_each_sequence_is_attended_to_alone(batch, options, kv_heads):
    """Near the oracle, and to the last bit what separate calls give, gradients too."""
    tensors, where = packed(batch, kv_heads=kv_heads, requires_grad=True)
    options = {**options, "enable_gqa": kv_heads != 4}
    output, lse = varlen_attn(*tensors, *where, **options, return_aux=LSE)
    assert output.shape == (sum(batch[0]), 4, 5) and lse.shape == (4, sum(batch[0])) and lse.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(varlen_attn(*tensors, *where, **options), output)
        assert all(map(torch.equal, varlen_attn(*tensors, *where, **options, return_aux=LSE), (output, lse)))
    if not batch[0]:
        return

    bits, bits_lse = alone(separate, tensors, batch, options)
    assert torch.equal(output, bits) and torch.equal(lse, bits_lse)
    expected, expected_lse = alone(oracle, tensors, batch, options)
    size = alone(lambda *x, **o: (sensitivity(*x, **o), x[0][..., 0]), tensors, batch, options)[0]
    testing.assert_close_to_oracle(output, expected, size, c=4)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)

    grads = torch.randn_like(output), torch.randn_like(lse) * lse.isfinite()
    own = torch.autograd.grad((output, lse), tensors, grads)
    for grad, other in zip(own, torch.autograd.grad((bits, bits_lse), tensors, grads), strict=True):
        assert torch.equal(grad, other)
    double = [t.detach().double().requires_grad_() for t in tensors]
    wanted = torch.autograd.grad(alone(oracle, double, batch, options), double, [g.double() for g in grads])
    for grad, other in zip(own, wanted, strict=True):
        torch.testing.assert_close(grad.double(), other, rtol=2e-5, atol=2e-5 * max([1.0, *other.abs().flatten()]))


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_dtypes(dtype):
    batch = BATCHES["other keys"]
    tensors, where = packed(batch, dtype, kv_heads=2, requires_grad=True)
    options = {"window_size": (-1, 0), "enable_gqa": True}
    output, lse = varlen_attn(*tensors, *where, **options, return_aux=LSE)
    bits, bits_lse = alone(separate, tensors, batch, options)
    assert output.dtype == dtype and torch.equal(output, bits)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and torch.equal(lse, bits_lse)
    size = alone(lambda *x, **o: (sensitivity(*x, **o), x[0][..., 0]), tensors, batch, options)[0]
    testing.assert_close_to_oracle(output, alone(oracle, tensors, batch, options)[0], size, c=4)
    grad = torch.randn_like(output)
    for own, other in zip(
        torch.autograd.grad(output, tensors, grad), torch.autograd.grad(bits, tensors, grad), strict=True
    ):
        assert own.dtype == dtype and torch.equal(own, other)
    with torch.no_grad():
        own, own_lse = varlen_attn(*tensors, *where, **options, return_aux=LSE)
    assert torch.equal(own, output) and torch.equal(own_lse, lse) and own_lse.dtype == lse.dtype


def test_gradcheck():
    query, key, value = (torch.randn(6, heads, 2, dtype=torch.float64, requires_grad=True) for heads in (2, 1, 1))
    options = {"window_size": (1, 0), "enable_gqa": True, "softcap": 0.8}

    def output(query, key, value):  # alone, as the log-sum-exp of a query that sees no key is -inf
        return varlen_attn(query, key, value, cumulative([2, 0, 1, 3]), cumulative([1, 2, 0, 3]), 3, 3, **options)

    torch.autograd.gradcheck(output, (query, key, value))
    torch.autograd.gradgradcheck(output, (query, key, value))
    where = cumulative([3, 2, 1]), cumulative([3, 2, 1]), 3, 3
    torch.autograd.gradcheck(lambda *x: varlen_attn(*x, *where, **options, return_aux=LSE), (query, key, value))


def test_any_strides():
    """Query, key and value as one projection gives them, and with heads outside of positions."""
    batch = BATCHES["mixed"]
    qkv = torch.randn(52, 3, 4, 8, requires_grad=True)
    where = (cumulative(batch[0]), cumulative(batch[0]), 13, 13)
    expected = varlen_attn(*(t.contiguous() for t in qkv.unbind(1)), *where)
    for query, key, value in (qkv.unbind(1), [t.transpose(0, 1).contiguous().transpose(0, 1) for t in qkv.unbind(1)]):
        assert torch.equal(varlen_attn(query, key, value, *where), expected)
        with torch.no_grad():
            assert torch.equal(varlen_attn(query, key, value, *where), expected)
    wide = testing.laid_out(qkv.detach(), "strided").unbind(1)
    torch.testing.assert_close(varlen_attn(*wide, *where), expected)
    long = [t.long() if isinstance(t, torch.Tensor) else t for t in where]
    assert torch.equal(varlen_attn(*qkv.unbind(1), *long), expected)


def test_only_the_keys_that_are_used():
    batch, used = ([1, 1, 4, 2, 2], [9, 9, 20, 5, 5]), [9, 3, 11, 0, 5]
    (query, key, value), where = packed(batch, kv_heads=2)
    for i, (start, length) in enumerate(zip(itertools.accumulate([0, *batch[1][:-1]]), batch[1], strict=True)):
        key[start + used[i] : start + length] = math.nan
        value[start + used[i] : start + length] = math.nan
    seqused_k = torch.tensor(used, dtype=torch.int32)
    for options in OPTIONS.values():
        options = {**options, "enable_gqa": True}
        output, lse = varlen_attn(query, key, value, *where, seqused_k=seqused_k, **options, return_aux=LSE)
        kept = [t.split(batch[1]) for t in (key, value)]
        less = [torch.cat([t[:n] for t, n in zip(some, used, strict=True)]) for some in kept]
        expected, expected_lse = alone(separate, (query, *less), (batch[0], used), options)
        assert torch.equal(output, expected) and torch.equal(lse, expected_lse)
    with pytest.raises(RuntimeError, match="seqused_k must be None where a gradient is wanted"):
        varlen_attn(query.requires_grad_(), key, value, *where, seqused_k=seqused_k, enable_gqa=True)


def test_pages_are_gathered_as_the_error_says():
    pool_k, pool_v = torch.randn(6, 4, 2, 8), torch.randn(6, 4, 2, 5)
    table, used = torch.tensor([[4, 0, 2], [1, 5, 3]], dtype=torch.int32), torch.tensor([9, 6], dtype=torch.int32)
    query, cu_seq_q = torch.randn(3, 2, 8), cumulative([1, 2])
    with pytest.raises(NotImplementedError, match=r"block_table must be None.*key\[block_table\].flatten\(0, 2\)"):
        varlen_attn(query, pool_k, pool_v, cu_seq_q, None, 2, 12, seqused_k=used, block_table=table)
    key, value = pool_k[table].flatten(0, 2), pool_v[table].flatten(0, 2)
    output = varlen_attn(query, key, value, cu_seq_q, cumulative([12, 12]), 2, 12, seqused_k=used, window_size=(-1, 0))
    rows = [
        pool[pages].flatten(0, 1)[:n] for pool in (pool_k, pool_v) for pages, n in zip(table.long(), used, strict=True)
    ]
    for i, own in enumerate(output.split([1, 2])):
        one = [t.transpose(0, 1).contiguous() for t in (query.split([1, 2])[i], rows[i], rows[2 + i])]
        assert torch.equal(own.transpose(0, 1), attention(*one, window=(-1, 0)))


# ---- promises --------------------------------------------------------------------------------------------------------


def test_same_result_on_any_number_of_threads():
    for batch in (([300, 1, 1, 17, 64, 64], None), ([1, 1, 1, 40], [3000, 3000, 7, 900])):
        tensors, where = packed(batch, requires_grad=True)
        results = []
        for threads in (1, 2, 3, 7):
            with testing.threads(threads):
                output, lse = varlen_attn(*tensors, *where, window_size=(-1, 0), return_aux=LSE)
                grads = torch.autograd.grad((output.sum(), lse.sum()), tensors)
                with torch.no_grad():
                    results.append((output, lse, *grads, varlen_attn(*tensors, *where, window_size=(-1, 0))))
        assert torch.equal(results[0][0], results[0][-1])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradients_do_not_depend_on_the_batch():
    """Of sequences of the same lengths, too, where one call for all would add up in another order."""
    batch = [16] * 3, [600] * 3
    tensors, where = packed(batch, requires_grad=True)
    output, expected = varlen_attn(*tensors, *where), alone(separate, tensors, batch, {})[0]
    grads = (torch.autograd.grad(out.square().sum(), tensors) for out in (output, expected))
    assert torch.equal(output, expected) and all(map(torch.equal, *grads))


def test_the_gradients_are_joined_once():
    tensors, where = packed(BATCHES["mixed"], requires_grad=True)
    names = testing.aten_ops(lambda: varlen_attn(*tensors, *where).sum().backward())
    assert "aten::cat" in names and not [name for name in names if "slice_backward" in name or "add" in name]


def test_memory_holds_no_output_twice():
    (query, key, value), where = packed(([200 + i for i in range(20)], None), heads=8, kv_heads=8)
    whole = 4 * query.shape[0] * 8 * 5
    assert memory.extra(lambda: [varlen_attn(query, key, value, *where)]) < whole / 4
    (query, key, value), where = packed(([100] * 20, None), heads=8, kv_heads=8)
    assert memory.extra(lambda: [varlen_attn(query, key, value, *where)]) < 4 * query.shape[0] * 8 * 5 / 2


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="of torch 2.13")
def test_names_are_torch_s():
    own, theirs = (inspect.signature(f).parameters for f in (varlen_attn, stock.varlen_attn))
    assert list(own) == [*theirs, "softcap"]
    for name, parameter in theirs.items():
        assert (own[name].kind, own[name].default) == (parameter.kind, parameter.default)
    tensors, where = packed(BATCHES["mixed"])
    for num_splits in (1, 4):
        assert torch.equal(varlen_attn(*tensors, *where, num_splits=num_splits), varlen_attn(*tensors, *where))
    assert isinstance(varlen_attn(*tensors, *where, return_aux=AuxRequest()), torch.Tensor)


def test_compile():
    torch.compiler.reset()

    def step(query, key, value, where):
        return varlen_attn(query * 2, key, value, *where, window_size=(-1, 0)) * 2

    compiled = torch.compile(step, backend="eager")
    tensors, where = packed(([3, 2], None), requires_grad=True)
    own, expected = compiled(*tensors, where), step(*tensors, where)
    torch.testing.assert_close(own, expected)
    grads = (torch.autograd.grad(loss.sum(), tensors) for loss in (own, expected))
    for grad, other in zip(*grads, strict=True):
        torch.testing.assert_close(grad, other)


def test_what_no_kernel_takes():
    class Own(torch.Tensor):
        pass

    (query, key, value), where = packed(BATCHES["mixed"])
    own = varlen_attn(query.as_subclass(Own), key, value, *where, softcap=2.0)
    torch.testing.assert_close(own.as_subclass(torch.Tensor), varlen_attn(query, key, value, *where, softcap=2.0))
    meta = [t.to("meta") for t in (query, key, value)]
    assert varlen_attn(*meta, *where).shape == (52, 4, 5)
    fastnn.set_fallback("error")
    with pytest.raises(RuntimeError, match="no kernel takes this input"):
        varlen_attn(query.as_subclass(Own), key, value, *where)


# ---- mistakes --------------------------------------------------------------------------------------------------------

CU = cumulative([3, 4])
MISTAKES = {
    "query": (RuntimeError, r"query must be \[positions, heads, features\]", {"query": torch.zeros(7, 16)}),
    "value": (RuntimeError, r"value must have key's positions and heads, \[7, 2\]", {"value": torch.zeros(6, 2, 8)}),
    "heads": (ValueError, "key must have as many heads as query, 4; got 2.*enable_gqa", {"query": torch.zeros(7, 4, 8)}),
    "groups": (ValueError, "must divide those of query, 3; got 2", {"query": torch.zeros(7, 3, 8), "enable_gqa": True}),
    "dtype": (RuntimeError, "dtype of query", {"query": torch.zeros(7, 2, 8).double()}),
    "head_dim": (RuntimeError, "query's last dimension", {"query": torch.zeros(7, 2, 4)}),
    "dimensions": (RuntimeError, r"cu_seq_q must be \[N \+ 1\]", {"cu_seq_q": CU[None]}),
    "floating": (RuntimeError, r"int32 or int64; got \[3\] of torch.float32", {"cu_seq_k": CU.float()}),
    "none": (RuntimeError, "cu_seq_q must begin with 0 .*; got none", {"cu_seq_q": CU[:0]}),
    "start": (RuntimeError, "cu_seq_q must begin with 0 and end with query's 7 positions; got 3 and 7", {"cu_seq_q": CU[1:]}),
    "end": (RuntimeError, "cu_seq_k must begin with 0 and end with key's 7 positions; got 0 and 3", {"cu_seq_k": CU[:2]}),
    "fall": (RuntimeError, "cu_seq_k must not fall; got a sequence of length -1", {"cu_seq_k": torch.tensor([0, 5, 4, 7])}),
    "length": (RuntimeError, "cu_seq_k must be as long as cu_seq_q, 3; got 4", {"cu_seq_k": cumulative([3, 1, 3])}),
    "absent": (RuntimeError, "cu_seq_k must be a tensor where there is no block_table", {"cu_seq_k": None}),
    "max_q": (RuntimeError, "max_q must be no less than the longest sequence, 4; got 3", {"max_q": 3}),
    "max_k": (RuntimeError, "max_k must be no less than the longest sequence, 4; got 0", {"max_k": 0}),
    "used": (RuntimeError, "seqused_k must be 0 to the length", {"seqused_k": torch.tensor([3, 5])}),
    "used few": (RuntimeError, r"each of the 2 sequences of key; got \[3\]", {"seqused_k": torch.tensor([3])}),
    "used kind": (RuntimeError, r"seqused_k must be \[N\] of int32", {"seqused_k": torch.tensor([3.0, 4.0])}),
    "window": (ValueError, "window must be", {"window_size": (1, 2, 3)}),
    "softcap": (ValueError, "softcap must be", {"softcap": -1.0}),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    kind, text, changed = MISTAKES[name]
    arguments = {name: torch.zeros(7, 2, 8) for name in ("query", "key", "value")}
    arguments |= {"cu_seq_q": CU, "cu_seq_k": CU, "max_q": 4, "max_k": 4}
    varlen_attn(**arguments)
    with pytest.raises(kind, match=text):
        varlen_attn(**arguments | changed)
