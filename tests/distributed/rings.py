"""Checks of ring_attention on rings of four, two and one of the processes."""

import itertools
import re

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

from fastnn import reference
from fastnn.distributed import ring_attention, shard_positions


def groups():
    """All processes, of four both pairs that this one is in, and itself alone."""
    pairs = init_device_mesh("cpu", (2, dist.get_world_size() // 2, 1), mesh_dim_names=("apart", "together", "alone"))
    return [None, *pairs.get_all_groups()]


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


def masks():
    """Of 16 queries and keys: padded keys, whole blocks of them; a query that sees no key; biases, broadcast and not."""
    padding = torch.arange(16) >= torch.tensor([13, 0])[:, None, None, None]
    seen = torch.rand(4, 16, 16) > 0.5
    seen[:, 3] = False
    bias = torch.randn(2, 1, 16, 16, dtype=torch.float64)
    return [~padding, seen, bias, bias.masked_fill(padding, -torch.inf), bias[0, 0, :1], bias[:, :, :, :1]]


def the_ring_takes_masks():
    for group, (mask, is_causal, zigzag) in itertools.product(
        groups(), itertools.product(masks(), (False, True), (False, True))
    ):
        whole = tensors(torch.float64, 4, 2, 16, 16, 6)
        grad = torch.randn(2, 4, 16, 6, dtype=torch.float64)
        if mask.dtype != torch.bool:
            whole.append(mask)
        window = (-1, 0) if is_causal else None
        want = of_whole(
            lambda q, k, v, m=mask: reference.attention(q, k, v, m, enable_gqa=True, window=window)[0], whole, grad
        )
        rows = shard_positions(16, zigzag=zigzag, group=group)
        leaves = [t[..., rows, :].clone().requires_grad_() for t in whole[:3]]
        own = mask[..., rows, :] if mask.shape[-2] > 1 else mask
        if mask.dtype != torch.bool:
            leaves.append(own.clone().requires_grad_())
            own = leaves[-1]
        output = ring_attention(*leaves[:3], own, is_causal=is_causal, enable_gqa=True, zigzag=zigzag, group=group)
        found = [output, *torch.autograd.grad(output, leaves, grad[..., rows, :])]
        shards = [t[..., rows, :] for t in want[:4]]
        if mask.dtype != torch.bool and mask.shape[-2] > 1:
            shards.append(want[4][..., rows, :])
        elif mask.dtype != torch.bool:  # of one row for all queries, each process has a share
            dist.all_reduce(found[4], group=group)
            shards.append(want[4])
        torch.testing.assert_close(found, shards, rtol=1e-12, atol=1e-12)


def the_ring_drops_weights():
    for group, zigzag in itertools.product(groups()[:2], (False, True)):
        q, k, v = tensors(torch.float64, 4, 4, 16, 16, 6)
        rows = shard_positions(16, zigzag=zigzag, group=group)
        shards = [t[..., rows, :].clone().requires_grad_() for t in (q, k, v)]
        options = dict(is_causal=True, zigzag=zigzag, group=group)
        unit = torch.eye(16, dtype=torch.float64).expand(2, 4, 16, 16)[..., rows, :]
        torch.manual_seed(3)
        weights = ring_attention(*shards[:2], unit, dropout_p=0.4, **options)
        torch.manual_seed(3)
        output = ring_attention(*shards, dropout_p=0.4, **options)

        seen = rows[:, None] >= torch.arange(16)
        kept = weights.detach() != 0
        share = kept.sum() / (seen.sum() * 8)
        assert not kept[..., ~seen].any() and 0.45 < share < 0.75, share
        everywhere = [torch.empty_like(kept) for _ in range(dist.get_world_size(group))]
        dist.all_gather(everywhere, kept, group=group)
        assert not torch.equal(everywhere[0][0, 0, -1], everywhere[1][0, 0, -1]), "each process drops its own"

        leaves = [shards[0].detach().requires_grad_(), k.clone().requires_grad_(), v.clone().requires_grad_()]
        scores = (leaves[0] @ leaves[1].mT / 8**0.5).masked_fill(~seen, -torch.inf).softmax(-1)
        expected = (scores * kept / 0.6) @ leaves[2]
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
        grad = torch.randn_like(expected)
        want = torch.autograd.grad(expected, leaves, grad)
        for t in want[1:]:
            dist.all_reduce(t, group=group)
        want = [want[0], *(t[..., rows, :] for t in want[1:])]
        torch.testing.assert_close(list(torch.autograd.grad(output, shards, grad)), want, rtol=1e-12, atol=1e-12)


def the_ring_refuses_second_derivatives():
    """Also where the gradient that comes in is a constant."""
    q, k, v = (t.requires_grad_() for t in tensors(torch.float64, 2, 2, 4, 4, 8))
    for grad_grad in (lambda out: out.sum(), lambda out: out.square().sum()):
        (grad,) = torch.autograd.grad(grad_grad(ring_attention(q, k, v)), q, create_graph=True)
        try:
            (grad.sum() + q.square().sum()).backward()
        except RuntimeError as error:
            assert re.search(r"^fastnn.ring_attention: .* must not be differentiated; got a second deriv", str(error))
        else:
            raise AssertionError("nothing was raised")


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
            error, torch_error = ((t.double() - e).square().mean() for t, e in ((ours, oracle), (stock, whole_oracle)))
            assert error <= 1.5**2 * torch_error, (dtype, is_causal, error.item(), torch_error.item())


def the_ring_says_what_is_wrong():
    q, k, size = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 3, 8), dist.get_world_size()
    for text, call in (
        ("key must have query's 4 positions where is_causal; got 3", lambda: ring_attention(q, k, k, is_causal=True)),
        ("an even number with zigzag; got 3", lambda: ring_attention(k, k, k, is_causal=True, zigzag=True)),
        (f"and the keys of all, [4, {3 * size}]; got [4, 3].", lambda: ring_attention(q, k, k, torch.ones(4, 3) > 0)),
        ("must have a kernel; got: dtype torch.int64", lambda: ring_attention(q.long(), k.long(), k.long())),
    ):
        try:
            call()
        except RuntimeError as error:
            assert re.search(f"^fastnn.ring_attention: .*{re.escape(text)}", str(error)), error
        else:
            raise AssertionError(f"nothing was raised: {text}")
    try:
        shard_positions(14, zigzag=True)
    except ValueError as error:
        assert (
            str(error) == f"fastnn.shard_positions: length must be a multiple of {2 * size}; got 14. Pad the sequence."
        )
    else:
        raise AssertionError("nothing was raised")


def the_shards_are_the_sequence():
    for zigzag in (False, True):
        own = shard_positions(16, zigzag=zigzag)
        everything = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(everything, own)
        assert torch.equal(torch.cat(everything).sort().values, torch.arange(16))
    of_two = [[0, 1, 2, 3, 12, 13, 14, 15], [4, 5, 6, 7, 8, 9, 10, 11]]
    of_four = [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]]
    assert own.tolist() == {2: of_two, 4: of_four}[dist.get_world_size()][dist.get_rank()]


CHECKS = [
    the_ring_gives_what_one_process_gives,
    the_ring_has_other_keys_than_queries_and_a_soft_cap,
    the_ring_takes_masks,
    the_ring_drops_weights,
    the_ring_refuses_second_derivatives,
    the_ring_is_as_exact_as_torch_in_lower_precision,
    the_ring_says_what_is_wrong,
    the_shards_are_the_sequence,
]
