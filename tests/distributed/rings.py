"""Checks of ring_attention on rings of four and of two processes."""

import itertools
import re

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

from fastnn import reference
from fastnn.distributed import ring_attention, shard_positions


def groups():
    """All four processes, and the pair that this one is in."""
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("apart", "together"))
    return [None, pairs["apart"].get_group(), pairs["together"].get_group()]


def tensors(dtype, heads, kv_heads, length, keys, value_dim):
    """Whole query, key and value; heads inside positions, as a model's projections give them."""
    shapes = [(2, length, heads, 8), (2, keys, kv_heads, 8), (2, keys, kv_heads, value_dim)]
    return [torch.randn(shape, dtype=dtype).transpose(1, 2) for shape in shapes]


def of_whole(function, whole, grad):
    leaves = [t.detach().clone().requires_grad_() for t in whole]
    output = function(*leaves)
    return [output, *torch.autograd.grad(output, leaves, grad)]


def of_ring(whole, grad, zigzag, group, **options):
    """Output and gradients of this process's shards, and the same shards of what belongs to the whole."""
    rows = shard_positions(grad.shape[-2], zigzag=zigzag, group=group)
    columns = shard_positions(whole[1].shape[-2], zigzag=zigzag, group=group)
    places = (rows, columns, columns)
    leaves = [t[..., at, :].detach().requires_grad_() for t, at in zip(whole, places, strict=True)]
    output = ring_attention(*leaves, zigzag=zigzag, group=group, **options)
    found = [output, *torch.autograd.grad(output, leaves, grad[..., rows, :])]
    return found, lambda results: [t[..., at, :] for t, at in zip(results, (rows, *places), strict=True)]


def the_ring_gives_what_one_process_gives():
    for group in groups():
        for is_causal, zigzag, kv_heads in itertools.product((False, True), (False, True), (4, 2, 1)):
            whole = tensors(torch.float64, 4, kv_heads, 16, 16, 6)
            grad = torch.randn(2, 4, 16, 6, dtype=torch.float64)
            options = dict(is_causal=is_causal, scale=0.3, enable_gqa=kv_heads < 4)
            want = of_whole(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options), whole, grad)
            found, shards = of_ring(whole, grad, zigzag, group, **options)
            torch.testing.assert_close(found, shards(want), rtol=1e-12, atol=1e-12)


def the_ring_has_other_keys_than_queries_and_a_soft_cap():
    for group in groups():
        whole = tensors(torch.float64, 2, 2, 8, 24, 8)
        grad = torch.randn(2, 2, 8, 8, dtype=torch.float64)
        want = of_whole(lambda q, k, v: reference.attention(q, k, v, softcap=0.7)[0], whole, grad)
        found, shards = of_ring(whole, grad, False, group, softcap=0.7)
        torch.testing.assert_close(found, shards(want), rtol=1e-12, atol=1e-12)


def the_ring_is_as_exact_as_torch_in_lower_precision():
    for dtype, is_causal in itertools.product((torch.float32, torch.bfloat16, torch.float16), (False, True)):
        whole = tensors(dtype, 4, 4, 64, 64, 8)
        grad = torch.randn(2, 4, 64, 8, dtype=dtype)

        def attend(q, k, v):
            return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)

        exact = of_whole(attend, [t.double() for t in whole], grad.double())
        torchs = of_whole(attend, whole, grad)
        found, shards = of_ring(whole, grad, is_causal, None, is_causal=is_causal)
        for ours, oracle, stock, whole_oracle in zip(found, shards(exact), torchs, exact, strict=True):
            assert ours.dtype == dtype
            error, torch_error = (ours.double() - oracle).abs().max(), (stock.double() - whole_oracle).abs().max()
            assert error <= 2 * torch_error, (dtype, is_causal, error.item(), torch_error.item())


def the_ring_says_what_is_wrong():
    q, k = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 3, 8)
    for text, call in (
        ("key must have query's 4 positions where is_causal; got 3", lambda: ring_attention(q, k, k, is_causal=True)),
        ("an even number with zigzag; got 3", lambda: ring_attention(k, k, k, is_causal=True, zigzag=True)),
        ("must have a kernel; got: dtype torch.int64", lambda: ring_attention(q.long(), k.long(), k.long())),
    ):
        try:
            call()
        except RuntimeError as error:
            assert re.search(f"^fastnn.ring_attention: .*{re.escape(text)}", str(error)), error
        else:
            raise AssertionError(f"nothing was raised: {text}")
    try:
        shard_positions(12, zigzag=True)
    except ValueError as error:
        assert str(error) == "fastnn.shard_positions: length must be a multiple of 8; got 12. Pad the sequence."
    else:
        raise AssertionError("nothing was raised")


def the_shards_are_the_sequence():
    for zigzag in (False, True):
        own = shard_positions(16, zigzag=zigzag)
        everything = [torch.empty_like(own) for _ in range(4)]
        dist.all_gather(everything, own)
        assert torch.equal(torch.cat(everything).sort().values, torch.arange(16))
    assert own.tolist() == [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]][dist.get_rank()]


CHECKS = [
    the_ring_gives_what_one_process_gives,
    the_ring_has_other_keys_than_queries_and_a_soft_cap,
    the_ring_is_as_exact_as_torch_in_lower_precision,
    the_ring_says_what_is_wrong,
    the_shards_are_the_sequence,
]
