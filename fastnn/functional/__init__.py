"""Functions with the signatures of torch.nn.functional, served by fastnn's kernels."""

from fastnn.functional.attention import scaled_dot_product_attention
from fastnn.functional.attention_weights import attention_weights
from fastnn.functional.conv2d import conv2d
from fastnn.functional.linear import linear
from fastnn.functional.multihead_attention import multi_head_attention_forward
from fastnn.functional.rnn import gru_cell, lstm_cell, rnn_relu_cell, rnn_tanh_cell
from fastnn.functional.varlen import varlen_attn

__all__ = [
    "attention_weights",
    "conv2d",
    "gru_cell",
    "linear",
    "lstm_cell",
    "multi_head_attention_forward",
    "rnn_relu_cell",
    "rnn_tanh_cell",
    "scaled_dot_product_attention",
    "varlen_attn",
]
