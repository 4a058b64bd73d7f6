"""vmap: how a batch of calls becomes one call.

A rule takes ``call, size, dims, op, *tensors``: what runs the op on tensors (a Function of _transforms.py, or the kernel
itself), the size of the batch, and for each tensor the dimension that has it, or None. It returns the outputs and their
dimensions. A rule of a backward takes a ``Pull`` for the op, and ``grads, tensors, outputs`` in a row.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastnn import reference
from fastnn.functional._transforms import FROM_OUTPUT, Forward, run_backward


def _front(t: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """The batch as the first dimension, of every tensor."""
    if t is None:
        return None
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


def _fronts(tensors, dims, size):
    return [_front(t, dim, size) for t, dim in zip(tensors, dims, strict=True)]


def loop(call, size, dims, op, *tensors):
    """One call after another, where the op has no dimension for a batch."""
    each = [
        call(op, *(t if dim is None else t.select(dim, i) for t, dim in zip(tensors, dims, strict=True)))
        for i in range(size)
    ]
    return tuple(torch.stack(ys) for ys in zip(*each, strict=True)), 0


# ---- linear --------------------------------------------------------------------------------------------------------


def linear(call, size, dims, op, input, weight, bias):
    """An input's batch is one more of its leading dimensions, a weight's one more of its rows; both: a batched product."""
    x_dim, w_dim, b_dim = dims
    if w_dim is None and b_dim is None:
        return call(op, input.movedim(x_dim, 0), weight, bias), 0
    if x_dim is None and w_dim is not None:
        w, b = weight.movedim(w_dim, 0), _front(bias, b_dim, size)
        rows = w.shape[1:-1]
        b = None if b is None else b.reshape(size, -1).expand(size, rows.numel()).reshape(-1)
        outputs = call(op, input, w.flatten(0, -2), b)
        return tuple(y.unflatten(-1, (size, *rows)) for y in outputs), input.dim() - 1
    x, w = _front(input, x_dim, size), weight if w_dim is None else weight.movedim(w_dim, 0)
    if w_dim is None:
        (z,) = call(replace(op, activation=None), x, weight, None)
    else:
        rows = w.shape[1:-1]
        z = x.reshape(size, -1, x.shape[-1]) @ w.reshape(size, -1, w.shape[-1]).transpose(1, 2)
        z = z.reshape(*x.shape[:-1], *rows)
    if bias is not None:
        b = _front(bias, b_dim, size).reshape(size, -1)
        z = z + b.reshape(size, *(1,) * (z.dim() - 2), b.shape[1]) if z.dim() > 1 else z + b.squeeze(1)
    y = reference.activate(z, op.activation)
    return (y,) if op.activation in FROM_OUTPUT else (y, z), 0


def linear_backward(call, size, dims, pull, grad, input, weight, bias, *outputs):
    """The gradient of an input by one call. Those of weight and bias, one of each for each of the batch, by a product."""
    flat, (_, _, w_dim, b_dim) = (grad, input, weight, bias, *outputs), dims[:4]
    b = None if bias is None else bias if b_dim is None else bias.select(b_dim, 0)
    grad, x, *outputs = _fronts((grad, input, *outputs), (*dims[:2], *dims[4:]), size)
    if w_dim is None and not any(pull.wanted[1:]):
        return call(pull, grad, x, weight, b, *outputs), 0
    if pull.op.activation is not None and call is run_backward:  # the op itself: no place for another transform
        return loop(call, size, dims, pull, *flat)
    if pull.op.activation is not None:  # by way of the pre-activation, once more, as its derivatives may be asked for
        plain = replace(pull, op=replace(pull.op, activation=None))
        (z,), z_dim = linear(Forward.apply, size, (0, *dims[2:4]), plain.op, x, weight, bias)
        (dz,) = torch.func.vjp(lambda z: reference.activate(z, pull.op.activation), z.movedim(z_dim, 0))[1](grad)
        return linear_backward(call, size, (0, *dims[1:]), plain, dz, *flat[1:])
    w = _front(weight, w_dim, size)
    rows = w.shape[1:-1]
    dz = grad.reshape(size, -1, rows.numel())
    found = []
    if pull.wanted[0] and w_dim is None:
        found += call(replace(pull, wanted=(True, False, False)), grad, x, weight, b, *outputs)
    elif pull.wanted[0]:
        found.append((dz @ w.reshape(size, -1, w.shape[-1])).reshape(x.shape))
    if pull.wanted[1]:
        found.append((dz.transpose(1, 2) @ x.reshape(size, -1, x.shape[-1])).reshape(w.shape))
    if pull.wanted[2]:
        sums = dz.sum(1)
        found.append((sums if b.numel() == rows.numel() else sums.sum(1)).reshape(size, *b.shape))
    return tuple(found), 0


# ---- conv2d --------------------------------------------------------------------------------------------------------


def _images(t):
    """``[batch, N, ...]`` or ``[batch, ...]`` as images."""
    return t if t is None or t.dim() == 4 else t.flatten(0, 1)


def _channels(t):
    """``[batch, N, C, H, W]`` or ``[batch, C, H, W]`` as the channels of one image or of N."""
    return None if t is None else t.movedim(0, -4).flatten(-4, -3)


def _unfold(t, size, dim):
    return t.unflatten(dim, (size, t.shape[dim] // size))


def conv2d(call, size, dims, op, input, weight, bias):
    """An input's batch is more images. A weight's is more groups; over one input and no groups, more channels."""
    x_dim, w_dim, b_dim = dims
    if w_dim is None and b_dim is None:
        x = input.movedim(x_dim, 0)
        outputs = call(op, _images(x), weight, bias)
        return tuple(y.reshape(*x.shape[:-3], *y.shape[1:]) for y in outputs), 0
    w, b = _front(weight, w_dim, size).flatten(0, 1), None if bias is None else _front(bias, b_dim, size).flatten()
    if x_dim is not None or op.groups > 1:
        input, op = _channels(_front(input, x_dim, size)), replace(op, groups=op.groups * size)
    outputs = call(op, input, w, b)
    return tuple(_unfold(y, size, -3) for y in outputs), input.dim() - 3


def conv2d_backward(call, size, dims, pull, grad, input, weight, bias, *outputs):
    """The gradient of an input by one call on more images; those of weight and bias, one for each, by more groups."""
    grad, x, *outputs = _fronts((grad, input, *outputs), (*dims[:2], *dims[4:]), size)
    if dims[2] is None and not any(pull.wanted[1:]):
        of_one = None if bias is None else bias if dims[3] is None else bias.select(dims[3], 0)
        (found,) = call(pull, _images(grad), _images(x), weight, of_one, *map(_images, outputs))
        return (found.reshape(x.shape),), 0
    w, b = _front(weight, dims[2], size).flatten(0, 1), None if bias is None else _front(bias, dims[3], size).flatten()
    pull = replace(pull, op=replace(pull.op, groups=pull.op.groups * size))
    found = call(pull, _channels(grad), _channels(x), w, b, *map(_channels, outputs))
    where = pull.of_wanted((-3, 0, 0))
    return tuple(_unfold(g, size, dim) for g, dim in zip(found, where, strict=True)), tuple(
        x.dim() - 4 if dim else 0 for dim in where
    )


# ---- attention -----------------------------------------------------------------------------------------------------


def _leading(t, dim, rank, size, spread=False):
    """The batch before ``rank`` dimensions; a tensor without it is broadcast, or has it nonetheless where ``spread``."""
    if t is None or (dim is None and not spread):
        return t
    t = _front(t, dim, size)
    return t.reshape(size, *(1,) * (rank + 1 - t.dim()), *t.shape[1:])


def attention(call, size, dims, op, query, key, value, attn_mask, philox_seed):
    """The batch is one more of the leading dimensions. With dropout, whose mask counts them, a call for each."""
    tensors = (query, key, value, attn_mask)
    ranks = [t.dim() - (dim is not None) for t, dim in zip(tensors[:3], dims, strict=False)]
    if op.dropout_p > 0 or max(ranks) < 3:
        return loop(call, size, dims, op, *tensors, philox_seed)
    spread = (all(dim is None for dim in dims[:3]), False, False, False)
    folded = [_leading(t, dim, max(ranks), size, all_) for t, dim, all_ in zip(tensors, dims, spread, strict=False)]
    return call(op, *folded, philox_seed), 0


def attention_backward(call, size, dims, pull, *flat):
    """As the forward; a tensor whose gradient is wanted has one for each of the batch."""
    grads, tensors, outputs = pull.split(flat)
    ends = len(grads), len(grads) + len(tensors)
    if pull.op.dropout_p > 0 or outputs[0].dim() - (dims[ends[1]] is not None) < 3:
        return loop(call, size, dims, pull, *flat)
    of_grads, of_tensors, of_outputs = dims[: ends[0]], dims[ends[0] : ends[1]], dims[ends[1] :]
    rank = outputs[0].dim() - (of_outputs[0] is not None)
    folded = [
        _leading(t, dim, rank, size, want)
        for t, dim, want in zip(tensors[:4], of_tensors, (True, *pull.wanted[1:4]), strict=False)
    ]
    found = call(pull, *_fronts(grads, of_grads, size), *folded, tensors[4], *_fronts(outputs, of_outputs, size))
    shapes = [
        None if t is None else t.shape if dim is None else t.select(dim, 0).shape
        for t, dim in zip(tensors, of_tensors, strict=True)
    ]
    return tuple(g.reshape(size, *shape) for g, shape in zip(found, pull.of_wanted(shapes), strict=True)), 0


# ---- rnn -----------------------------------------------------------------------------------------------------------


def _inner(t, dim, size):
    """``[..., rows, features]`` with the batch inside the rows: those of one step stay together, in the order of lengths."""
    return None if t is None else _front(t, dim, size).movedim(0, -2).flatten(-3, -2)


def rnn(call, size, dims, op, *tensors):
    """A batch of inputs is more sequences, or more rows of a packed step. With weights of their own, a call for each."""
    if any(dim is not None for dim in dims[5:]):
        return loop(call, size, dims, op, *tensors)
    input, batch_sizes, *states = tensors[:5]
    folded = [_inner(t, dim, size) for t, dim in zip((input, *states), (dims[0], *dims[2:5]), strict=True)]
    sizes = None if batch_sizes is None else batch_sizes * size
    return _outer(call(op, folded[0], sizes, *folded[1:], *tensors[5:]), size)


def rnn_backward(call, size, dims, pull, *flat):
    """As the forward; with gradients of weights, one for each of the batch, a call for each."""
    grads, tensors, outputs = pull.split(flat)
    first, last = len(grads), len(grads) + len(tensors)
    if any(dim is not None for dim in dims[first + 5 : last]) or any(pull.wanted[5:]):
        return loop(call, size, dims, pull, *flat)
    folded = [t if t is None or t.dim() < 2 else _inner(t, dim, size) for t, dim in zip(flat, dims, strict=True)]
    if tensors[1] is not None:
        folded[first + 1] = tensors[1] * size
    folded[first + 5 : last] = tensors[5:]
    return _outer(call(pull, *folded), size)


def _outer(outputs, size):
    """The batch out of the rows again; what is empty has none."""
    dims = tuple(None if y.dim() < 2 else y.dim() - 1 for y in outputs)
    return tuple(y if y.dim() < 2 else y.unflatten(-2, (y.shape[-2] // size, size)) for y in outputs), dims
