"""Which functions of torch fastnn serves: for each, one of the same signature that is computed by fastnn's kernels.

A function of the table returns NotImplemented for a form that is none of fastnn's (a product of two batches of matrices,
``out=``, a transposed convolution): then torch's own is to be called. What is of its form but has no kernel (a dtype, a
device) goes to torch by ``fastnn._fallback``, as in ``fastnn.functional``. All of them trace, with symbolic sizes too.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnn import _fallback, functional
from fastnn.functional.rnn import rnn

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _not(reason: str) -> Any:
    """NotImplemented, and the reason for whoever counts."""
    if not torch.compiler.is_dynamo_compiling():
        _fallback.last.reason = reason
    return NotImplemented


def _linear(input, weight, bias=None):
    return functional.linear(input, weight, bias)


def _mm(input, mat2, *rest, **others):
    if rest or others:
        return _not("out= or out_dtype=")
    if input.dim() != 2 or mat2.dim() != 2:
        return _not("not two matrices")
    return _product(input, mat2)


def _matmul(input, other, *rest, **others):
    if rest or others:
        return _not("out=")
    if not isinstance(input, Tensor) or not isinstance(other, Tensor):
        return _not("not two tensors")
    if input.dim() == 0 or other.dim() not in (1, 2):
        return _not("a product of batches of matrices")
    return _product(input, other)


def _rmatmul(self, other):
    return _matmul(other, self)


def _addmm(input, mat1, mat2, *rest, beta=1, alpha=1, **others):
    if rest or others:
        return _not("out= or out_dtype=")
    if beta != 1 or alpha != 1:
        return _not("beta or alpha")
    if mat1.dim() != 2 or mat2.dim() != 2:
        return _not("not two matrices")
    if input.dim() > 1:
        return _not("a matrix is added, not a bias")
    return _product(mat1, mat2, input)


def _einsum(equation, *operands):
    """Serve what is linear on one operand as it lies: ``abc,cde->abde`` or ``ab,cb->ac``."""
    if not isinstance(equation, str) or len(operands) != 2 or not all(isinstance(t, Tensor) for t in operands):
        return _not("not an equation of two tensors")
    (left, _, rest), (input, other) = equation.replace(" ", "").partition(","), operands
    right, _, out = rest.partition("->")
    count = (len(left) + len(right) - len(out)) // 2  # letters that are summed over
    rows, inner, columns = left[: len(left) - count], left[len(left) - count :], out[len(left) - count :]
    letters = rows + inner + columns
    if not (count and columns and letters.isalpha() and len(set(letters)) == len(letters) and out == rows + columns):
        return _not("not a product with one matrix")
    if right not in (inner + columns, columns + inner) or len(left) != input.dim() or len(right) != other.dim():
        return _not("not a product with one matrix")
    sizes = dict(zip(right, other.shape, strict=True))
    if any(sizes[letter] != size for letter, size in zip(inner, input.shape[len(rows) :], strict=True)):
        return _not("sizes that do not fit")  # or are broadcast: torch says
    if right == inner + columns:
        matrix = other.flatten(0, count - 1).flatten(1)
    else:
        matrix = other.flatten(len(columns)).flatten(0, -2).t()
    output = _product(input.flatten(len(rows)), matrix)
    return output if output is NotImplemented else output.unflatten(-1, [sizes[letter] for letter in columns])


WORTH = 2**18  # multiply-adds of a product: with fewer, the call costs more than the kernel saves
WORTH_A_GRADIENT = 2**22  # the nodes of the two transposes add to it


def _product(input, other, bias=None):
    """input @ other + bias: linear, the weight being ``other`` transposed."""
    if input.dtype not in _FLOATING or other.dtype not in _FLOATING:
        return _not("not of a floating dtype")
    if input.dtype != other.dtype and not torch.is_autocast_enabled(input.device.type):
        return _not("not of one dtype")
    inputs, elements = input.numel(), other.numel()
    if type(inputs) is int and type(elements) is int:  # of symbolic sizes nothing is asked
        rows = inputs // max(other.shape[0], 1)
        wanted = torch.is_grad_enabled() and (input.requires_grad or other.requires_grad)
        if rows * elements < (WORTH_A_GRADIENT if wanted else WORTH):
            return _not("too small to be worth the call")
    return functional.linear(input, other.t(), bias)  # a vector is its own transpose


def _conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    if isinstance(padding, (tuple, list)) and len(padding) > 2:
        return _not("padding of four sides")  # which fastnn's has and torch's has not
    return functional.conv2d(input, weight, bias, stride, padding, dilation, groups)


def _conv1d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    return functional.conv1d(input, weight, bias, stride, padding, dilation, groups)


def _convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    if transposed or input.dim() != 4 or weight.dim() != 4:
        return _not("transposed, or not of images")
    return _conv2d(input, weight, bias, stride, padding, dilation, groups)


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    if value is None:
        return _not("value is None")
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
    )


def _multi_head_attention(query, key, value, *args, **kwargs):
    if query.is_nested or key.is_nested or value.is_nested:
        return _not("nested tensors have no kernel")
    return functional.multi_head_attention_forward(query, key, value, *args, **kwargs)


def _stack(mode: str) -> Callable:
    """Serve torch.lstm and its sisters, which take a padded sequence or the data of a packed one."""

    def padded(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first):
        if input.dim() != 3:
            return _not("not a batch of sequences")
        return layers(input, None, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)

    def packed(data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional):
        if data.dim() != 2:
            return _not("not a packed sequence")
        return layers(data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional, False)

    def layers(input, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first):
        count = num_layers * (2 if bidirectional else 1)
        each = 4 if has_biases else 2
        projected = mode == "LSTM" and count > 0 and len(params) == count * (each + 1)
        if count == 0 or len(params) != count * (each + projected):
            return _not("not the weights of so many layers")
        if (len(hx) != 2) if mode == "LSTM" else (hx.dim() != 3):
            return _not("not the states of so many layers")
        h, c = hx if mode == "LSTM" else (hx, None)
        y = rnn(
            input,
            batch_sizes,
            h,
            c,
            params,
            mode,
            has_biases=has_biases,
            num_layers=num_layers,
            dropout=dropout,
            train=train,
            bidirectional=bidirectional,
            batch_first=batch_first,
        )
        return y if mode == "LSTM" else y[:2]

    def stack(*args, **kwargs):
        is_packed = "batch_sizes" in kwargs or (len(args) > 3 and isinstance(args[3], (list, tuple)))
        return (packed if is_packed else padded)(*args, **kwargs)

    return stack


def _cell(function: Callable) -> Callable:
    def cell(input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
        if input.dim() != 2:
            return _not("not a batch of one step")
        return function(input, hx, w_ih, w_hh, b_ih, b_hh)

    return cell


SERVED: dict[Callable, Callable] = {
    F.linear: _linear,
    torch.mm: _mm,
    Tensor.mm: _mm,
    torch.matmul: _matmul,
    torch.linalg.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.__rmatmul__: _rmatmul,
    operator.matmul: _matmul,  # in a graph of torch.fx
    torch.einsum: _einsum,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    torch.conv1d: _conv1d,
    torch.conv2d: _conv2d,  # which is F.conv2d
    torch.convolution: _convolution,
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head_attention,
    torch.lstm: _stack("LSTM"),  # which are those of torch._VF
    torch.gru: _stack("GRU"),
    torch.rnn_tanh: _stack("RNN_TANH"),
    torch.rnn_relu: _stack("RNN_RELU"),
    torch.lstm_cell: _cell(functional.lstm_cell),
    torch.gru_cell: _cell(functional.gru_cell),
    torch.rnn_tanh_cell: _cell(functional.rnn_tanh_cell),
    torch.rnn_relu_cell: _cell(functional.rnn_relu_cell),
}
