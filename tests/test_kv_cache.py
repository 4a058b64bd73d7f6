"""nn/kv_cache.py: attention over a cache, step by step, is attention over the whole sequence, and nothing is copied."""

import itertools
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fastnn
from bench import memory
from fastnn import testing
from fastnn.functional import scaled_dot_product_attention as attention
from fastnn.nn import KVCache
from tests.test_attention import oracle, sensitivity

OPTIONS = {
    "plain": {},
    "window": {"window": (3, 0)},
    "one number": {"window": 4},
    "left only": {"window": (5, -1)},
    "softcap": {"softcap": 1.5},
    "scale": {"scale": -0.3},
}
PARTS = {"step by step": [1] * 13, "prompt, then steps": [9, 1, 1, 1, 1], "in chunks": [4, 5, 0, 3, 1]}

pytestmark = pytest.mark.usefixtures("one_thread")


def tensors(length, dtype=torch.float32, heads=6, kv_heads=2, batch=2):
    """Query, key and value of a whole sequence."""
    sizes = ((heads, 8), (kv_heads, 8), (kv_heads, 5))
    return [testing.random((batch, count, length, width), dtype) for count, width in sizes]


def filled(key, value, room=3):
    """A cache that has room for more, where what is not there is NaN."""
    cache = KVCache(*key.shape[:2], key.shape[2] + room, key.shape[3], value.shape[3], dtype=key.dtype)
    cache._key.fill_(math.nan)
    cache._value.fill_(math.nan)
    cache.append(key, value)
    return cache


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_parts_are_causal_attention_over_the_whole(dtype, options, parts):
    query, key, value = tensors(sum(parts), dtype)
    cache = filled(key[:, :, :0], value[:, :, :0], sum(parts) + 2)
    splits = zip(*(t.split(parts, 2) for t in (query, key, value)), strict=True)
    results = [cache.attend(*part, **options, return_lse=True) for part in splits]
    output, lse = (torch.cat(some, 2) for some in zip(*results, strict=True))
    whole = {"is_causal": True, "enable_gqa": True, **options}
    expected, expected_lse = oracle(query, key, value, **whole)
    size = sensitivity(query, key, value, **whole)
    testing.assert_close_to_oracle(output, expected, size, c=4)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


def test_a_long_prompt_then_steps():
    test_parts_are_causal_attention_over_the_whole(torch.float32, {}, [250, 97, 1, 1, 1])


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("length", [1, 4])
def test_a_cache_is_the_keys_and_values_that_are_there(length, kv_heads):
    """To the last bit, with every option, though the buffer is longer than what is there."""
    query = testing.random((2, 6, length, 8))
    _, key, value = tensors(9, kv_heads=kv_heads)
    cache = filled(key, value)
    mask, causal = torch.rand(length, 9) > 0.3, {"window": (-1, 0)}
    for options, same in (
        ({}, {}),
        ({"is_causal": True}, causal),
        ({"is_causal": True, "attn_mask": mask}, {"attn_mask": mask, **causal}),
        ({"is_causal": True, "window": (2, 5)}, {"window": (2, 0)}),
        ({"window": (2, 1), "softcap": 1.5, "scale": 0.2}, {"window": (2, 1), "softcap": 1.5, "scale": 0.2}),
        ({"enable_gqa": True}, {}),
    ):
        expected = attention(query, key, value, enable_gqa=True, **same)
        assert torch.equal(attention(query, cache, **options), expected)
        output, lse = attention(query, cache, None, **options, return_lse=True)
        assert torch.equal(output, expected) and lse.shape == (2, 6, length)


def test_truncate_forgets_what_was_rejected():
    query, key, value = tensors(12)
    cache = filled(key[:, :, :9], value[:, :, :9])
    cache.truncate(5)
    assert cache.length == 5
    cache.append(key[:, :, 9:], value[:, :, 9:])
    kept = [0, 1, 2, 3, 4, 9, 10, 11]
    assert torch.equal(cache.keys, key[:, :, kept]) and torch.equal(cache.values, value[:, :, kept])
    cache.reset()
    assert cache.length == 0 and cache.keys.shape == (2, 2, 0, 8) and cache.values.shape == (2, 2, 0, 5)
    assert (attention(query, cache, is_causal=True) == 0).all(), "no key is there"
    cache.append(key, value)
    assert torch.equal(cache.keys, key)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_reorder_follows_the_beams(dtype):
    _, key, value = tensors(7, batch=4)
    cache = filled(key, value)
    for indices in ([2, 2, 0, 1], [3, 0, 1, 2]):
        cache.reorder(torch.tensor(indices, dtype=dtype))
        key, value = key[indices], value[indices]
        assert torch.equal(cache.keys, key) and torch.equal(cache.values, value) and cache.length == 7


def test_any_strides_are_appended():
    cache = KVCache(2, 3, 10, 8)
    packed = torch.randn(2, 4, 2, 3, 8)  # positions, then key and value, then heads: how a projection gives them
    key, value = packed.permute(2, 0, 3, 1, 4)
    cache.append(key, value)
    assert torch.equal(cache.keys, key) and torch.equal(cache.values, value)
    one = torch.randn(2, 1, 1, 8).expand(2, 3, 2, 8)
    cache.append(one, one)
    assert torch.equal(cache.keys, torch.cat([key, one], 2))


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_nothing_that_is_there_is_copied():
    _, key, value = tensors(6)
    cache = KVCache(2, 2, 8, 8, 5)
    places = cache._key.data_ptr(), cache._value.data_ptr()
    for start, stop in itertools.pairwise([0, 3, 4, 6]):
        keys, values = cache.append(key[:, :, start:stop], value[:, :, start:stop])
        assert (keys.data_ptr(), values.data_ptr()) == places
        assert keys.stride() == cache._key.stride() and values.stride() == cache._value.stride()
        assert torch.equal(keys, key[:, :, :stop]) and torch.equal(values, value[:, :, :stop])
        assert keys.data_ptr() == cache.keys.data_ptr() and values.data_ptr() == cache.values.data_ptr()


def test_the_memory_of_a_step_does_not_grow():
    """An append takes none; attention keeps the sums of each thousand of keys or so, 1 of 200 of what it reads."""
    cache = KVCache(1, 2, 4096, 64)
    query, key, value = torch.randn(1, 8, 1, 64), torch.randn(1, 2, 1, 64), torch.randn(1, 2, 1, 64)
    for length in (1000, 2000, 4000):
        cache.append(*(torch.randn(1, 2, length - cache.length, 64) for _ in range(2)))
        there = 4 * (cache.keys.numel() + cache.values.numel())
        assert memory.extra(lambda: cache.append(key, value) and []) == 0
        assert memory.extra(lambda: [cache.attend(query, key, value)]) < there / 100
        cache.truncate(length)


# ---- grad modes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_cache_serves_every_mode_whatever_it_was_made_in(made):
    query, key, value = tensors(2)
    with made():
        cache = KVCache(2, 2, 8, 8, 5)
        cache.append(key, value)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            cache.attend(query, key, value)
            cache.reorder(torch.tensor([1, 0]))
    assert cache.length == 8 and not cache.keys.requires_grad


def test_no_gradient_reaches_a_cache():
    query, key, value = tensors(3)
    cache = KVCache(2, 2, 8, 8, 5)
    for name, new in (
        ("key", (key.requires_grad_(), value.detach())),
        ("value", (key.detach(), value.requires_grad_())),
    ):
        with pytest.raises(RuntimeError, match=f"fastnn.KVCache: {name} must not require a gradient"):
            cache.append(*new)
        assert cache.length == 0
        key, value = key.detach(), value.detach()
    with torch.no_grad():
        cache.append(key.requires_grad_(), value)
    assert not cache.keys.requires_grad
    query.requires_grad_()
    (grad,) = torch.autograd.grad(attention(query, cache, is_causal=True).sum(), query)
    leaf = query.detach().requires_grad_()
    expected = attention(leaf, key.detach(), value.detach(), is_causal=True, enable_gqa=True)
    assert torch.equal(grad, torch.autograd.grad(expected.sum(), leaf)[0])


def test_compile():
    torch.compiler.reset()
    graphs = CompileCounterWithBackend("aot_eager")

    def step(cache, *part):
        return cache.attend(*part, window=(7, 0), softcap=3.0)

    compiled = torch.compile(step, fullgraph=True, backend=graphs)
    query, key, value = tensors(20)
    own, stock = KVCache(2, 2, 32, 8, 5), KVCache(2, 2, 32, 8, 5)
    for part in zip(*(t.split([5, 3] + [1] * 12, 2) for t in (query, key, value)), strict=True):
        torch.testing.assert_close(compiled(own, *part), step(stock, *part))
        assert own.length == stock.length and torch.equal(own.keys, stock.keys)
    assert graphs.frame_count <= 4, "the length is no constant of the graph"


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_more_than_there_is_room_for():
    _, key, value = tensors(5)
    cache = KVCache(2, 2, 8, 8, 5)
    cache.append(key, value)
    before = cache.keys.clone()
    with pytest.raises(RuntimeError, match=r"no more than the 3 positions.*max_length=8; got 5. Make the cache"):
        cache.append(key, value)
    assert cache.length == 5 and torch.equal(cache.keys, before)
    cache.append(key[:, :, :3], value[:, :, :3])
    assert cache.length == cache.max_length == 8
    cache.append(key[:, :, :0], value[:, :, :0])


K, V = (2, 2, 1, 8), (2, 2, 1, 5)
MISTAKES = {
    "dimensions": ((2, 2, 8), V, r"key must be \[2, 2, new, 8\]; got \[2, 2, 8\]"),
    "batch": ((1, 2, 1, 8), V, r"key must be \[2, 2, new, 8\]; got \[1, 2, 1, 8\]"),
    "heads": (K, (2, 1, 1, 5), r"value must be \[2, 2, new, 5\]; got \[2, 1, 1, 5\]"),
    "head_dim": ((2, 2, 1, 1), V, "key must be"),
    "value_dim": (K, (2, 2, 1, 8), "value must be"),
    "positions": (K, (2, 2, 2, 5), r"value must have key's 1 positions; got \[2, 2, 2, 5\]"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    key, value, text = MISTAKES[name]
    with pytest.raises(RuntimeError, match=f"fastnn.KVCache: {text}"):
        KVCache(2, 2, 4, 8, 5).append(torch.zeros(key), torch.zeros(value))


def test_other_mistakes():
    cache = KVCache(2, 2, 4, 8, 5)
    key, value = torch.zeros(K), torch.zeros(V)
    for bad, text in (
        (key.double(), "have the cache's dtype, torch.float32"),
        (key.to("meta"), "be on the cache's device"),
    ):
        with pytest.raises(RuntimeError, match=f"fastnn.KVCache: key must {text}"):
            cache.append(bad, value)
    with pytest.raises(ValueError, match="fastnn.KVCache: length must be between 0 and 0"):
        cache.truncate(1)
    with pytest.raises(ValueError, match="fastnn.KVCache: max_length must be 0 or more; got -1"):
        KVCache(2, 2, -1, 8)
    cache.append(key, value)
    for bad in (torch.tensor([0]), torch.tensor([[0, 1]])):
        with pytest.raises(RuntimeError, match=r"fastnn.KVCache: indices must be \[2\]"):
            cache.reorder(bad)
    for bad in ([0, 2], [-1, 0]):
        with pytest.raises(IndexError):
            cache.reorder(torch.tensor(bad))
    with pytest.raises(TypeError, match="fastnn.attention: value must be a Tensor"):
        attention(key, key)
    with pytest.raises(RuntimeError, match="must divide"):
        attention(torch.zeros(2, 3, 1, 8), cache)
    with pytest.raises(ValueError, match="window must be"):
        attention(key, cache, is_causal=True, window=(1, 2, 3))


def test_what_no_kernel_takes():
    query, key, value = tensors(4)
    cache = filled(key, value)

    class Own(torch.Tensor):
        pass

    expected = attention(query, cache, is_causal=True)
    torch.testing.assert_close(
        attention(query.as_subclass(Own), cache, is_causal=True).as_subclass(torch.Tensor), expected
    )
    fastnn.set_fallback("error")
    with pytest.raises(RuntimeError, match="no kernel takes this input"):
        attention(query.as_subclass(Own), cache)
    whole = KVCache(1, 1, 4, 2, dtype=torch.int64, device="meta")
    assert whole.keys.dtype == torch.int64 and whole.values.device.type == "meta"
