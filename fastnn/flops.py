"""FLOPs of fastnn's operators, counted as ``torch.utils.flop_counter`` counts those of torch.

``FlopCounterMode(custom_mapping=fastnn.flops.formulas())`` counts a model that runs on fastnn. Importing this changes
nothing: torch's table is torch's, and :func:`register` writes into it only when somebody asks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils import flop_counter

Shape = Sequence[int]


def _linear(input: Shape, weight: Shape, *rest, **kwargs) -> int:
    return 2 * prod(input) * prod(weight[:-1])


def _linear_backward(grad_output, input, weight, bias, saved, activation, output_mask, **kwargs) -> int:
    return _linear(input, weight) * sum(output_mask[:2])


def _batched(shape: Shape) -> Shape:
    return shape if len(shape) == 4 else (1, *shape)


def _conv2d(input: Shape, weight: Shape, *rest, out_shape, **kwargs) -> int:
    output = out_shape[0] if isinstance(out_shape[0], Sequence) else out_shape  # conv2d_train returns two
    return flop_counter.conv_flop_count(_batched(input), weight, _batched(output))


def _conv2d_backward(grad_output, input, weight, bias, saved, *where, output_mask=None, **kwargs) -> int:
    # By torch's rule, which counts the gradient of a grouped weight as if there were one group.
    *_, output_mask = where if output_mask is None else (output_mask,)
    grad_output, input = _batched(grad_output), _batched(input)
    options = (None, None, None, False, None, 1)  # stride … groups: only `transposed` counts
    return flop_counter.conv_backward_flop(
        grad_output, input, weight, bias, *options, output_mask, out_val=(input, weight, None)
    )


def _attention(query: Shape, key: Shape, value: Shape, *rest, out_shape, **kwargs) -> int:
    # Scores that a mask, causality or a window hides count, as in torch.
    scores = prod(out_shape[0][:-1]) * key[-2]
    return 2 * scores * (query[-1] + value[-1])


def _attention_backward(grad_output, grad_lse, query, key, value, *rest, **kwargs) -> int:
    # Five products: the scores again, and the gradients of weights, value, query and key.
    return 2 * prod(grad_output[:-1]) * key[-2] * (3 * query[-1] + 2 * value[-1])


def _rnn(input: Shape, batch_sizes, hx: Shape, cx, weights: Sequence[Shape], *rest, **kwargs) -> int:
    return 2 * prod(input[:-1]) * sum(prod(w) for w in weights if len(w) == 2)


def _rnn_backward(grad_output, grad_h_n, grad_c_n, input, batch_sizes, hx, cx, weights, *rest, **kwargs) -> int:
    # The gradient of the state at every step, and those of the input and of the weights where they are wanted.
    of_input, _, _, of_weights = rest[-1]
    directions = hx[0] if len(hx) == 3 else 1
    all_of_them = _rnn(input, None, hx, None, weights)
    of_inputs = _rnn(input, None, hx, None, weights[:: len(weights) // directions])
    return all_of_them * (1 + of_weights) - of_inputs * (not of_input)


def formulas() -> dict[Any, Callable[..., int]]:
    """Return the formula of each operator of fastnn, for ``FlopCounterMode(custom_mapping=…)``.

    A multiplication and an addition are two FLOPs; bias, activation and softmax are none; a convolution counts as the
    direct sum, whatever algorithm runs. So counts torch, too.

    Returns:
        ``{torch.ops.fastnn.linear: formula, …}``; a formula takes the shapes of the operator's arguments.

    Source: ``torch.utils.flop_counter``.
    """
    ops = torch.ops.fastnn
    return {
        ops.linear: _linear,
        ops.linear_train: _linear,
        ops.linear_backward: _linear_backward,
        ops.conv2d: _conv2d,
        ops.conv2d_train: _conv2d,
        ops.conv2d_backward: _conv2d_backward,
        ops.attention: _attention,
        ops.attention_backward: _attention_backward,
        ops.attention_weights: _attention,
        ops.rnn: _rnn,
        ops.rnn_train: _rnn,
        ops.rnn_backward: _rnn_backward,
    }


def register() -> None:
    """Enter :func:`formulas` in torch's table: every ``FlopCounterMode`` of the process then counts fastnn."""
    for op, formula in formulas().items():
        if op not in flop_counter.flop_registry:
            flop_counter.register_flop_formula(op)(formula)


def _fused_attention(query: Shape, key: Shape, value: Shape, *rest, **kwargs) -> int:
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _lengths(tokens: torch.Tensor) -> list[int]:
    if tokens.is_nested:
        return tokens._nested_tensor_size()[:, 0].tolist()
    return [tokens.shape[-2]] * prod(tokens.shape[:-2])


def _native_attention(query, key, value, embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, *rest, **kwargs):
    lengths = _lengths(query)
    products = sum(lengths) * (qkv_weight.numel() + proj_weight.numel())
    return 2 * (products + 2 * embed_dim * sum(n * n for n in lengths))


def _native_layer(src, embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, *rest, **kwargs) -> int:
    feed_forward = rest[8].numel() + rest[10].numel()
    attention = _native_attention(src, src, src, embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight)
    return attention + 2 * sum(_lengths(src)) * feed_forward


_native_attention._get_raw = _native_layer._get_raw = True  # type: ignore[attr-defined]  # tensors, not shapes


def _uncounted() -> dict[Any, Callable[..., int]]:
    """Operators of torch that multiply and have no formula there: without them torch's part would look smaller."""
    ops = torch.ops.aten
    found = {
        ops._scaled_dot_product_flash_attention_for_cpu: _fused_attention,
        ops.mkldnn_rnn_layer: lambda input, *rest, **kwargs: 2 * prod(input[:-1]) * sum(map(prod, rest[:2])),
        ops._cudnn_rnn: lambda input, weights, *rest, **kwargs: _rnn(input, None, (), None, weights),
        ops._native_multi_head_attention: _native_attention,
        ops._transformer_encoder_layer_fwd: _native_layer,
        ops.mv: lambda matrix, *rest, **kwargs: 2 * prod(matrix),
        ops.addmv: lambda input, matrix, *rest, **kwargs: 2 * prod(matrix),
        ops.dot: lambda input, *rest, **kwargs: 2 * prod(input),
    }
    return {op: formula for op, formula in found.items() if op not in flop_counter.flop_registry}


@contextlib.contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Undo what a run leaves behind: random numbers drawn, and the statistics that modules in training keep."""
    buffers = [(b, b.clone()) for m in model.modules() if m.training for b in m.buffers(recurse=False)]
    gpus = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.no_grad(), torch.random.fork_rng(devices=gpus):
        try:
            yield
        finally:
            for buffer, kept in buffers:
                if not torch.equal(buffer, kept):
                    buffer.copy_(kept)


def measure(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, int]:
    """Run ``model(*args, **kwargs)`` once, without gradients, and count its FLOPs.

    The model runs in the mode that it is in, training or evaluation; random generators and the running statistics of
    modules in training are then as they were. What the call itself changes, such as a cache among its arguments, stays.

    Args:
        model: any module.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.

    Returns:
        ``{"fastnn::linear": FLOPs, "aten::bmm": FLOPs, …}``, the largest first.
    """
    counter = flop_counter.FlopCounterMode(display=False, custom_mapping=formulas() | _uncounted())
    with _as_it_was(model), counter:
        model(*args, **kwargs)
    counts = counter.get_flop_counts().get("Global", {})
    named = {op._qualified_op_name: flops for op, flops in counts.items() if flops}
    return dict(sorted(named.items(), key=lambda item: -item[1]))


def share(counts: Mapping[str, int]) -> float | None:
    """Return fastnn's part, 0 … 1, of what :func:`measure` counted; None where nothing was."""
    total = sum(counts.values())
    return sum(n for op, n in counts.items() if op.startswith("fastnn::")) / total if total else None


def table(counts: Mapping[str, int]) -> list[str]:
    """Tell what :func:`measure` counted, as lines of :func:`fastnn.explain`."""
    total = sum(counts.values())
    if not total:
        return ["no FLOPs counted in this call"]
    lines = [f"{100 * (share(counts) or 0):.1f} % of {total / 1e6:,.3g} MFLOPs of this call served by fastnn"]
    left = {op: n for op, n in counts.items() if not op.startswith("fastnn::")}
    return lines + [f"{100 * n / total:.1f} % in {op} served by torch" for op, n in left.items()]
