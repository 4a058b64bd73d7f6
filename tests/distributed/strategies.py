"""Checks that DTensor runs the ops on shards: what it gives, and that it gathers nothing where no gathering is needed."""

import itertools
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor

import fastnn
from fastnn import functional

R, P, S = Replicate(), Partial(), Shard


def mesh():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def rand(*shape):
    return torch.randn(shape, dtype=torch.float64)


def compare(ours, stock, tensors, placements, at, expected=None):
    """Output and gradients of ``ours`` on shards and of ``stock`` on whole tensors.

    ``placements``: of the tensors, for each dimension of the mesh one of them, or a tuple. ``expected``: where output and
    gradients must lie.
    """
    placements = [p if isinstance(p, tuple) else (p,) for p in placements]
    whole = [t if t is None else t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]
    shards = [
        t if t is None else distribute_tensor(t.detach(), at, p).requires_grad_(t.requires_grad)
        for t, p in zip(whole, placements, strict=True)
    ]
    want, found = stock(*whole), ours(*shards)
    grad = torch.randn_like(want)
    assert isinstance(found, DTensor)
    want = [want, *torch.autograd.grad(want, [t for t in whole if t is not None and t.requires_grad], grad)]
    found_grads = torch.autograd.grad(
        found.full_tensor(), [t for t in shards if t is not None and t.requires_grad], grad
    )
    found = [found, *found_grads]
    if expected is not None:
        expected = [p if isinstance(p, tuple) else (p,) for p in expected]
        assert [t.placements for t in found] == expected, ([t.placements for t in found], expected)
    torch.testing.assert_close([t.full_tensor() for t in found], want, rtol=1e-11, atol=1e-11)


def the_rules_are_known_to_a_compiled_function_that_comes_first():
    """Nothing has met a DTensor yet: tracing must find the rules, too."""
    assert "fastnn.distributed.sharding" not in sys.modules

    def ours(x, w, b):
        return functional.linear(x, w, b, activation="gelu")

    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    tensors = rand(8, 4), rand(12, 4), rand(12)
    compare(compiled, lambda *t: F.gelu(F.linear(*t)), tensors, (R, S(0), S(0)), mesh(), [S(1), P, S(0), S(0)])


def linear_on_shards():
    at, tensors = mesh(), (rand(4, 8, 8), rand(12, 8), rand(12))
    for activation, stock in ((None, lambda y: y), ("relu", F.relu), ("gelu", F.gelu)):

        def ours(x, w, b=None):
            return functional.linear(x, w, b, activation=activation)

        def torchs(x, w, b=None):
            return stock(F.linear(x, w, b))

        whole_sum = P if activation is None else R
        for placements, expected in (
            ((R, R, R), (R, R, R, R)),
            ((S(0), R, R), (S(0), S(0), P, P)),
            ((S(1), R, R), (S(1), S(1), P, P)),
            ((R, S(0), S(0)), (S(2), P, S(0), S(0))),
            ((S(2), S(1), R), (whole_sum, S(2), S(1), R)),
            ((S(0), S(0), S(0)), None),
        ):
            compare(ours, torchs, tensors, placements, at, expected)
        compare(ours, torchs, tensors[:2], (S(2), S(1)), at, (whole_sum, S(2), S(1)))
        compare(ours, torchs, (rand(6, 5), rand(7, 5), rand(7)), (S(0), R, R), at, (S(0), S(0), P, P))  # uneven
        compare(ours, torchs, (rand(4, 8), rand(8)), (S(0), R), at)  # a weight of one dimension
        compare(ours, torchs, (rand(4, 8), rand(12, 8), rand(1)), (R, S(0), R), at)  # a broadcast bias


def linear_on_a_mesh_of_two_dimensions():
    at = init_device_mesh("cpu", (2, dist.get_world_size() // 2))
    tensors = rand(4, 8, 8), rand(12, 8), rand(12)
    columns = ((S(0), R), (R, S(0)), (R, S(0)))
    compare(functional.linear, F.linear, tensors, columns, at, ((S(0), S(2)), (S(0), P), (P, S(0)), (P, S(0))))
    rows = ((S(0), S(2)), (R, S(1)), (R, R))
    compare(functional.linear, F.linear, tensors, rows, at, ((S(0), P), (S(0), S(2)), (P, S(1)), (P, R)))


def attention_on_shards():
    at = mesh()
    q, k, v = rand(4, 8, 12, 6), rand(4, 8, 12, 6), rand(4, 8, 12, 6)
    for kv_heads, is_causal in itertools.product((8, 4, 2, 1), (False, True)):
        options = dict(is_causal=is_causal, enable_gqa=kv_heads < 8)

        def ours(q, k, v):
            return functional.scaled_dot_product_attention(q, k, v, **options)

        def stock(q, k, v):
            return F.scaled_dot_product_attention(q, k, v, **options)

        tensors = (q, k[:, :kv_heads], v[:, :kv_heads])
        heads = None if kv_heads < dist.get_world_size() else (S(1),) * 4  # 2 heads on 4 processes: gathered
        heads = (S(1), S(1), P, P) if kv_heads == 1 else heads
        keys = R if kv_heads == 1 else S(1)
        compare(ours, stock, tensors, (R, R, R), at, (R,) * 4)
        compare(ours, stock, tensors, (S(0),) * 3, at, (S(0),) * 4)
        compare(ours, stock, tensors, (S(1), keys, keys), at, heads)
        compare(ours, stock, tensors, (S(2), R, R), at, None if is_causal else (S(2), S(2), P, P))
        compare(ours, stock, tensors, (S(3),) * 3, at)
    compare(
        functional.scaled_dot_product_attention, F.scaled_dot_product_attention, (q, k[:1], v[:1]), (S(0), R, R), at
    )


def attention_with_a_mask_on_shards():
    at, tensors = mesh(), (rand(4, 4, 8, 6), rand(4, 4, 8, 6), rand(4, 4, 8, 6))
    for mask, (batch, heads, rows) in (
        (rand(8, 8), (P, P, S(0))),
        (rand(4, 1, 8, 8), (S(0), P, S(2))),
        (rand(4, 4, 1, 8), (S(0), S(1), P)),
    ):
        for placement, of_mask in ((R, R), (S(0), batch), (S(1), heads)):
            given = (*(placement,) * 3, of_mask if of_mask != P else R)
            expected = (*(placement,) * 4, of_mask)
            compare(
                functional.scaled_dot_product_attention,
                F.scaled_dot_product_attention,
                (*tensors, mask),
                given,
                at,
                expected,
            )
        given = (S(2), R, R, rows if rows != P else R)
        compare(
            functional.scaled_dot_product_attention,
            F.scaled_dot_product_attention,
            (*tensors, mask),
            given,
            at,
            (S(2), S(2), P, P, rows),
        )


def grouped_heads_on_a_mesh_of_two_dimensions():
    """Two heads of keys fit the two processes that share heads, where there are four in all."""
    at = init_device_mesh("cpu", (2, dist.get_world_size() // 2))

    def ours(q, k, v):
        return functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def stock(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    tensors = (rand(4, 8, 6, 4), rand(4, 2, 6, 4), rand(4, 2, 6, 4))
    compare(ours, stock, tensors, ((S(0), S(1)),) * 3, at, ((S(0), S(1)),) * 4)


def attention_weights_on_shards():
    at, tensors = mesh(), (rand(4, 4, 8, 6), rand(4, 4, 8, 6), rand(4, 4, 8, 6))
    # The gradient of weights is a formula in torch's operators, whose matmul of older ones does not take sharded heads.
    spread = (R, S(0), S(1)) if torch.__version__ >= (2, 13) else (R, S(0))
    for average, placement in itertools.product((False, True), spread):

        def ours(q, k, v):
            output, weights = functional.attention_weights(q, k, v, average=average)
            return (output.square().sum() + weights.square().sum()).reshape(1)

        def stock(q, k, v):
            weights = torch.softmax(q @ k.transpose(-1, -2) / 6**0.5, -1)
            output = weights @ v
            weights = weights.mean(1) if average else weights
            return (output.square().sum() + weights.square().sum()).reshape(1)

        compare(ours, stock, tensors, (placement,) * 3, at)


def conv2d_on_shards():
    at, tensors = mesh(), (rand(4, 4, 9, 9), rand(8, 4, 3, 3), rand(8))
    for (activation, torchs), stride in itertools.product(((None, lambda y: y), ("gelu", F.gelu)), (1, 2)):

        def ours(x, w, b=None):
            return functional.conv2d(x, w, b, stride, 1, activation=activation)

        def stock(x, w, b=None):
            return torchs(F.conv2d(x, w, b, stride, 1))

        whole_sum = P if activation is None else R
        for placements, expected in (
            ((R, R, R), (R, R, R, R)),
            ((S(0), R, R), (S(0), S(0), P, P)),
            ((R, S(0), S(0)), (S(1), P, S(0), S(0))),
            ((S(1), S(1), R), (whole_sum, S(1), S(1), R)),
            ((S(2), R, R), None),
        ):
            compare(ours, stock, tensors, placements, at, expected)

    def depthwise(convolve):
        return lambda x, w: convolve(x, w, None, 1, 1, 1, 4)

    compare(depthwise(functional.conv2d), depthwise(F.conv2d), (tensors[0], rand(4, 1, 3, 3)), (S(1), S(0)), at)


def recurrent_layers_on_shards():
    at, x = mesh(), rand(8, 5, 4)
    for kind in ("RNN", "GRU", "LSTM"):
        stock = getattr(nn, kind)(4, 6, 2, batch_first=True, bidirectional=True, dtype=torch.float64)
        ours = getattr(fastnn.nn, kind)(4, 6, 2, batch_first=True, bidirectional=True, dtype=torch.float64)
        ours.load_state_dict(stock.state_dict())
        distribute_module(ours, at)
        shards = distribute_tensor(x, at, [S(0)]).requires_grad_()
        whole = x.clone().requires_grad_()
        (found, state), (want, whole_state) = ours(shards), stock(whole)
        states = zip(state, whole_state, strict=True) if kind == "LSTM" else [(state, whole_state)]
        assert found.placements == (S(0),)
        for one, other in states:
            assert one.placements == (S(1),)
            torch.testing.assert_close(one.full_tensor(), other)
        torch.testing.assert_close(found.full_tensor(), want)
        found.square().sum().backward(), want.square().sum().backward()
        assert shards.grad.placements == (S(0),)
        torch.testing.assert_close(shards.grad.full_tensor(), whole.grad)
        for one, other in zip(ours.parameters(), stock.parameters(), strict=True):
            torch.testing.assert_close(one.grad.full_tensor(), other.grad)

    layer = distribute_module(fastnn.nn.GRU(4, 6, dtype=torch.float64), at)
    try:
        layer(x)
    except RuntimeError as error:
        assert "fastnn.rnn: input must be a DTensor where weights or states are; got a plain Tensor." in str(error)
    else:
        raise AssertionError("nothing was raised")


def recurrent_cells_on_shards():
    at, x = mesh(), rand(8, 4)
    for kind in ("RNNCell", "GRUCell", "LSTMCell"):
        stock = getattr(nn, kind)(4, 6, dtype=torch.float64)
        ours = getattr(fastnn.nn, kind)(4, 6, dtype=torch.float64)
        ours.load_state_dict(stock.state_dict())
        distribute_module(ours, at)
        found, want = ours(distribute_tensor(x, at, [S(0)])), stock(x)
        found, want = (found[1], want[1]) if kind == "LSTMCell" else (found, want)
        assert found.placements == (S(0),)
        torch.testing.assert_close(found.full_tensor(), want)
        found.square().sum().backward(), want.square().sum().backward()
        for one, other in zip(ours.parameters(), stock.parameters(), strict=True):
            torch.testing.assert_close(one.grad.full_tensor(), other.grad)


def second_derivatives_on_shards():
    tensors = rand(4, 8), rand(6, 8)

    def twice(linear):
        def function(x, w):
            (grad,) = torch.autograd.grad(linear(x, w).square().sum(), x, create_graph=True)
            return grad.square().sum().reshape(1)

        return function

    def ours(x, w):
        return functional.linear(x, w, activation="tanh")

    compare(twice(ours), twice(lambda x, w: F.linear(x, w).tanh()), tensors, (S(0), R), mesh())


def options_of_attention_on_shards():
    """What changes between two calls of the same shapes reaches the kernel."""
    at = mesh()
    q, k, v = rand(2, 4, 8, 6), rand(2, 4, 8, 6), rand(2, 4, 8, 6)
    ahead = torch.arange(8) - torch.arange(8)[:, None]
    for left, scale in itertools.product((0, 1, 3), (None, 0.5)):

        def ours(q, k, v):
            return functional.scaled_dot_product_attention(q, k, v, window=(left, 0), scale=scale)

        def stock(q, k, v):
            return F.scaled_dot_product_attention(q, k, v, (ahead <= 0) & (ahead >= -left), scale=scale)

        compare(ours, stock, (q, k, v), (S(1),) * 3, at, (S(1),) * 4)


CHECKS = [
    the_rules_are_known_to_a_compiled_function_that_comes_first,
    linear_on_shards,
    linear_on_a_mesh_of_two_dimensions,
    attention_on_shards,
    attention_with_a_mask_on_shards,
    grouped_heads_on_a_mesh_of_two_dimensions,
    attention_weights_on_shards,
    conv2d_on_shards,
    recurrent_layers_on_shards,
    recurrent_cells_on_shards,
    second_derivatives_on_shards,
    options_of_attention_on_shards,
]
