"""Modules that drop in for those of torch.nn: the same arguments, the same state_dict, fastnn's kernels; and KVCache."""

from fastnn.nn.attention import MultiheadAttention
from fastnn.nn.conv1d import Conv1d
from fastnn.nn.conv2d import Conv2d
from fastnn.nn.kv_cache import KVCache
from fastnn.nn.linear import Linear
from fastnn.nn.rnn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from fastnn.nn.transformer import Transformer, TransformerDecoder, TransformerEncoder
from fastnn.nn.transformer_layer import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Conv1d",
    "Conv2d",
    "GRUCell",
    "KVCache",
    "LSTMCell",
    "Linear",
    "MultiheadAttention",
    "RNNCell",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
