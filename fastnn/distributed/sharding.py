"""How DTensor runs the ops on its shards: which placements of the arguments give which placements of the results.

Imported by the first call that meets a tensor of a subclass after ``torch.distributed.tensor`` was imported
(``fastnn._fallback.takes_class``). Importing it registers the rules; where none fits, DTensor gathers what it must.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from fastnn.functional._attention import Options

_ops = torch.ops.fastnn


def _rule(name: str) -> Callable:
    """Register what is decorated as the rule of an op. Every argument from the first option on may change its answer."""

    def register(rule: Callable) -> Callable:
        op = getattr(_ops, name).default
        register_sharding(op)(rule)
        tensors = [isinstance(_plain(a.type), torch.TensorType) for a in op._schema.arguments]
        known = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
        # What register_sharding derives would leave activation, stride and is_causal out of the key of DTensor's cache.
        known[op] = type(known[op])(tensors.index(False), None, True)
        return rule

    return register


def _plain(kind):
    return kind.getElementType() if isinstance(kind, torch.OptionalType) else kind


def _given(placements, *tensors) -> list:
    return [p if t is not None else None for p, t in zip(placements, tensors, strict=True)]


def _wanted(grads, output_mask) -> list:
    return [grad if wanted else None for grad, wanted in zip(grads, output_mask, strict=True)]


def _grad_of(placement):
    """A gradient lies as its tensor does; where others are sharded, that of a whole tensor is a sum of shares."""
    return placement if isinstance(placement, Shard) else Partial()


# ---- linear and conv2d: rows of the placements of input, weight, bias and output -----------------------------------


def _linear_rows(input, weight, bias) -> Iterator[tuple]:
    last, whole = input.ndim - 1, Replicate()
    yield whole, whole, whole, whole
    for dim in range(last):
        yield Shard(dim), whole, whole, Shard(dim)
    if weight.ndim == 2:
        yield whole, Shard(0), _of_features(bias, weight), Shard(last)
    yield Shard(last), Shard(weight.ndim - 1), Partial(), Partial()


def _conv2d_rows(input, weight, bias, groups: int) -> Iterator[tuple]:
    channels, whole = input.ndim - 3, Replicate()
    yield whole, whole, whole, whole
    if channels == 1:
        yield Shard(0), whole, whole, Shard(0)
    if groups == 1:
        yield whole, Shard(0), _of_features(bias, weight), Shard(channels)
        yield Shard(channels), Shard(1), Partial(), Partial()


def _of_features(bias, weight):
    """The bias goes with the rows of the weight; one of a single element is broadcast."""
    return Shard(0) if bias is not None and tuple(bias.shape) == (weight.shape[0],) else Replicate()


def _forward(rows, bias, activation, outputs: int = 1) -> list:
    """An activation cannot be applied to shares of a sum."""
    return [
        ([output] * outputs, [x, w, *_given([b], bias)])
        for x, w, b, output in rows
        if activation is None or not output.is_partial()
    ]


def _backward(rows, bias, saved, output_mask) -> list:
    found = []
    for x, w, b, output in rows:
        if isinstance(x, Shard) and isinstance(w, Shard):  # along what is summed over: the sum is whole
            b = output = Replicate()
            grads = [x, w, b]
        elif isinstance(output, Shard):
            grads = [_grad_of(x), _grad_of(w), _grad_of(b)]
        else:
            grads = [x, w, b]
        found.append((_wanted(grads, output_mask), [output, x, w, *_given([b, output], bias, saved)]))
    return found


@_rule("linear")
def _(input, weight, bias, activation=None, packed=None):
    return _forward(_linear_rows(input, weight, bias), bias, activation)


@_rule("linear_train")
def _(input, weight, bias, activation):
    return _forward(_linear_rows(input, weight, bias), bias, activation, 2)


@_rule("linear_backward")
def _(grad_output, input, weight, bias, saved, activation, output_mask):
    return _backward(_linear_rows(input, weight, bias), bias, saved, output_mask)


@_rule("conv2d")
def _(input, weight, bias, stride, padding, dilation, groups, activation=None, packed=None):
    return _forward(_conv2d_rows(input, weight, bias, groups), bias, activation)


@_rule("conv2d_train")
def _(input, weight, bias, stride, padding, dilation, groups, activation):
    return _forward(_conv2d_rows(input, weight, bias, groups), bias, activation, 2)


@_rule("conv2d_backward")
def _(grad_output, input, weight, bias, saved, stride, padding, dilation, groups, activation, output_mask):
    return _backward(_conv2d_rows(input, weight, bias, groups), bias, saved, output_mask)


# ---- attention: rows of the placements of query, key, value, attn_mask and output ----------------------------------
# A row's last entry says which dimension it is, counted back from the scores: 0 rows, 1 heads, 2 batch …; None: no shard.


def _attention_rows(query, key, value, attn_mask, options: Options) -> Iterator[tuple]:
    whole = Replicate()
    yield whole, whole, whole, whole, whole, None
    lead = max(t.ndim for t in (query, key, value)) - 2
    for back in range(lead, 0, -1):  # the batch first
        sizes = [_size(t, back) for t in (query, key, value)]
        if options.enable_gqa and back == 1:
            ways, whole_groups = _ways(query, key, value), {sizes[0], *(size for size in sizes[1:] if size > 1)}
            if any(size % ways for size in whole_groups):
                continue
            placements = [
                Shard(t.ndim - 3) if size > 1 else whole for t, size in zip((query, key, value), sizes, strict=True)
            ]
        else:
            placements = [_along(t, back, max(sizes)) for t in (query, key, value)]
        yield *placements, _along(attn_mask, back, max(sizes)), Shard(lead - back), back
    if not options.is_causal and options.window is None:
        rows = query.shape[-2]
        yield Shard(query.ndim - 2), whole, whole, _along(attn_mask, 0, rows), Shard(lead), 0


def _size(tensor, back: int) -> int:
    return tensor.shape[-2 - back] if tensor.ndim >= 2 + back else 1


def _along(tensor, back: int, size: int):
    """The shard of a tensor along a dimension of that size; a tensor that is broadcast along it stays whole."""
    if tensor is None or size == 1 or _size(tensor, back) != size:
        return Replicate()
    return Shard(tensor.ndim - 2 - back)


def _ways(query, key, value) -> int:
    """Over how many processes heads may come to be spread: the dimensions of the mesh on which not all is whole or batch."""
    ways = 1
    for dim, size in enumerate(query.mesh.shape):
        settled = all(
            p.is_replicate() or (isinstance(p, Shard) and p.dim < t.ndim - 3)
            for t in (query, key, value)
            for p in [t.placements[dim]]
        )
        ways *= 1 if settled else size
    return ways


@_rule("attention")
def _(query, key, value, attn_mask=None, *rest):
    options = Options(*rest)
    return [
        ([out, out], [q, k, v, *_given([mask, Replicate()], attn_mask, options.philox_seed)])
        for q, k, v, mask, out, _ in _attention_rows(query, key, value, attn_mask, options)
    ]


@_rule("attention_weights")
def _(query, key, value, attn_mask=None, *rest):
    found, options = [], Options(*rest)
    for q, k, v, mask, out, back in _attention_rows(query, key, value, attn_mask, options):
        if options.average and back == 1:
            continue  # the mean is over the heads
        weights = Shard(out.dim - 1) if options.average and back == 0 else out
        found.append(([out, out, weights], [q, k, v, *_given([mask, Replicate()], attn_mask, options.philox_seed)]))
    return found


@_rule("attention_backward")
def _(grad_output, grad_lse, query, key, value, attn_mask, output, lse, *rest):
    found, options, output_mask = [], Options(*rest[:-1]), rest[-1]
    for *placements, out, back in _attention_rows(query, key, value, attn_mask, options):
        grads = placements if back is None else [_grad_of(p) for p in placements]
        q, k, v, mask = placements
        inputs = [out, *_given([out], grad_lse), q, k, v, *_given([mask], attn_mask), out, out]
        found.append((_wanted(grads, output_mask), [*inputs, *_given([Replicate()], options.philox_seed)]))
    return found


from fastnn.distributed import sharding_rnn  # noqa: E402, F401
