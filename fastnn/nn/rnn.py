"""RNN, LSTM, GRU and their cells: the modules of torch.nn on fastnn's kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastnn import _export, functional
from fastnn._library import _C
from fastnn.functional.rnn import rnn
from fastnn.nn._frozen import Frozen, parameters
from fastnn.nn._rnn_regularized import Regularized

_TRACES_PADDING = torch.__version__ < "2.13"  # Dynamo does, and fails; it breaks its graph there in newer ones


def break_at_padding() -> None:
    """Have Dynamo break its graph at ``pad_packed_sequence``: torch's own GRU makes it give up the frame before it."""
    torch._dynamo.disallow_in_graph(torch._VF._pad_packed_sequence)


break_at_padding._torchdynamo_disable = True  # type: ignore[attr-defined]  # torch.compiler.disable imports Dynamo


def _pack_stack(weights: list[Tensor], mode: str, count: int) -> list[Tensor]:
    """Pack the weights of ``count`` layers and directions."""
    each = len(weights) // count
    return [torch.ops.fastnn.rnn_pack(weights[i : i + each], mode) for i in range(0, len(weights), each)]


class _Recurrent(Frozen, Regularized):
    """What RNN, LSTM and GRU share. Not subclasses of torch.nn.LSTM and its sisters: on those Dynamo breaks the graph."""

    def flatten_parameters(self) -> None:
        """Nothing to do: the kernels pack what they need."""

    def _weights(self) -> list[Tensor]:
        # By name at each call, so that parametrizations, functional_call and assignments are seen.
        return parameters(self, self._flat_weights_names)

    def _packs(self, weights: list[Tensor]) -> list[Tensor] | None:
        """Return the packed weights of each layer and direction; None where they may not be kept."""
        if self._drops or not all(map(self._parameters.__contains__, self._flat_weights_names)):
            return None  # dropped or parametrized: other tensors at each call
        return self._packed(
            weights, _pack_stack, lambda: (self.mode, self.num_layers * (2 if self.bidirectional else 1))
        )

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        dtype = self._weights()[0].dtype
        if input.dtype != dtype and not torch._C._is_any_autocast_enabled():
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({dtype}). "
                f"Convert input: input.to({dtype}), or convert model: model.to({input.dtype})"
            )
        expected_dim = 2 if batch_sizes is not None else 3
        if input.dim() != expected_dim:
            raise RuntimeError(f"input must have {expected_dim} dimensions, got {input.dim()}")
        if self.input_size != input.size(-1):
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.size(-1)}"
            )

    def _check_state_dims(self, hx, is_batched: bool) -> None:
        wanted, words = (3, "batched 3-D") if is_batched else (2, "unbatched 2-D")
        if hx.dim() != wanted:
            raise RuntimeError(f"For {words} input, hx should also be {wanted}-D but got {hx.dim()}-D tensor")

    def _map(self, f, hx):
        return f(hx)

    def _zeros(self, input: Tensor, batch):
        layers = self.num_layers * (2 if self.bidirectional else 1)
        return input.new_zeros(layers, batch, self.proj_size or self.hidden_size)

    def forward(self, input, hx=None):
        """Run the layers over ``input``; arguments and results are those of the class of this name in ``torch.nn``."""
        packed = isinstance(input, PackedSequence)
        batch_sizes = sorted_indices = unsorted_indices = None
        is_batched, batch_dim = True, 0 if self.batch_first else 1
        if packed:
            if _TRACES_PADDING and torch.compiler.is_dynamo_compiling():
                break_at_padding()
            input, batch_sizes, sorted_indices, unsorted_indices = input
            batch = batch_sizes[0]
        else:
            if input.dim() not in (2, 3):
                raise ValueError(
                    f"{type(self).__name__}: Expected input to be 2D or 3D, got {input.dim()}D tensor instead"
                )
            is_batched = input.dim() == 3
            if not is_batched:
                input = input.unsqueeze(batch_dim)
            batch = input.size(batch_dim)
        if hx is None:
            hx = self._zeros(input, batch)
        else:
            if not packed:
                self._check_state_dims(hx, is_batched)
            if not is_batched:
                hx = self._map(lambda state: state.unsqueeze(1), hx)
            hx = self.permute_hidden(hx, sorted_indices)
        self.check_forward_args(input, hx, batch_sizes)

        h, c = hx if self.mode == "LSTM" else (hx, None)
        weights = self._weights()
        if self._drops:
            weights = self._dropped(weights)
        output, h_n, c_n = rnn(
            input,
            batch_sizes,
            h,
            c,
            weights,
            self.mode,
            has_biases=self.bias,
            num_layers=self.num_layers,
            dropout=self.dropout,
            train=self.training,
            bidirectional=self.bidirectional,
            batch_first=self.batch_first,
            packed=self._packs(weights) if self._frozen else None,
            norms=parameters(self, self._norm_names),
            zoneout=self.zoneout,
        )
        hidden = (h_n, c_n) if self.mode == "LSTM" else h_n
        if packed:
            output = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
            return output, self.permute_hidden(hidden, unsorted_indices)
        if not is_batched:
            output, hidden = output.squeeze(batch_dim), self._map(lambda state: state.squeeze(1), hidden)
        return output, hidden


class RNN(_Recurrent):
    r"""h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), or relu; arguments, shapes and state_dict of ``torch.nn.RNN``.

    Args:
        *args, **kwargs: as ``torch.nn.RNN``'s. The rest by keyword only.
        layer_norm: ``LN(W_ih x_t) ⊙ norm_ih + b_ih`` and ``LN(W_hh h_{t-1}) ⊙ norm_hh + b_hh`` stand for the two products
            with their biases. LN has mean 0 and variance 1 over all gates together, eps 1e-5. ``norm_ih_l0``,
            ``norm_hh_l0`` and so on are parameters, ones at first.
        recurrent_dropout: p of DropConnect. In training, once a call, ``W_hh ⊙ m / (1 - p)`` stands for
            the ``W_hh`` of each layer and direction, each entry of m being 0 with probability p, else 1.
        zoneout: p. In training ``m ⊙ h_{t-1} + (1 - m) ⊙ h_t`` stands for the ``h_t`` above, each entry
            of m being 1 with probability p, else 0, at each step; in evaluation its mean, ``p h_{t-1} + (1 - p) h_t``.

    Masks are drawn from torch's default generator.

    Raises:
        TypeError: ``layer_norm`` that is no bool.
        ValueError: ``recurrent_dropout`` or ``zoneout`` outside [0, 1), or what ``torch.nn.RNN`` refuses.

    Source: ``torch.nn.RNN``; layer_norm: Ba, Kiros and Hinton, arXiv 1607.06450; recurrent_dropout: Merity, Keskar and
    Socher, arXiv 1708.02182; zoneout: Krueger et al., arXiv 1606.01305; GRU and LSTM have them as in lmnt-com/haste.
    """

    # The constructor of torch.nn.RNN, whose super() would look for that class among ours.
    def __init__(self, *args, **kwargs) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if len(args) > 3:
            self.nonlinearity, args = args[3], args[:3] + args[4:]
        else:
            self.nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if self.nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{self.nonlinearity}'. Select from 'tanh' or 'relu'.")
        super().__init__("RNN_TANH" if self.nonlinearity == "tanh" else "RNN_RELU", *args, **kwargs)


class GRU(_Recurrent):
    r"""h_t = (1 - z) n + z h_{t-1}; arguments, shapes and state_dict of ``torch.nn.GRU``.

    ``layer_norm``, ``recurrent_dropout`` and ``zoneout`` are those of :class:`RNN`; the reset gate multiplies
    ``LN(W_hn h_{t-1}) ⊙ norm_hn + b_hn``, normalised together with the other gates.
    """

    def __init__(self, *args, **kwargs) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__("GRU", *args, **kwargs)


class LSTM(_Recurrent):
    r"""c_t = f c_{t-1} + i g, h_t = o tanh(c_t); arguments (proj_size too), shapes and state_dict of ``torch.nn.LSTM``.

    ``layer_norm``, ``recurrent_dropout`` and ``zoneout`` are those of :class:`RNN`. With layer_norm also
    ``h_t = o tanh(LN(c_t) ⊙ norm_c_weight + norm_c_bias)``, parameters that are ones and zeros at first. What
    is carried on as c_t has neither norm nor zoneout.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__("LSTM", *args, **kwargs)

    get_expected_cell_size = torch.nn.LSTM.get_expected_cell_size
    check_forward_args = torch.nn.LSTM.check_forward_args
    permute_hidden = torch.nn.LSTM.permute_hidden

    def _map(self, f, hx):
        return f(hx[0]), f(hx[1])

    def _zeros(self, input: Tensor, batch):
        layers = self.num_layers * (2 if self.bidirectional else 1)
        return super()._zeros(input, batch), input.new_zeros(layers, batch, self.hidden_size)

    def _check_state_dims(self, hx, is_batched: bool) -> None:
        wanted, words = (3, "batched 3-D") if is_batched else (2, "unbatched 2-D")
        if hx[0].dim() != wanted or hx[1].dim() != wanted:
            raise RuntimeError(
                f"For {words} input, hx and cx should also be {wanted}-D but got "
                f"({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
            )


def _check_cell(name: str, input: Tensor, states: dict[str, Tensor]) -> bool:
    """Whether a cell's arguments are batched; torch's errors where they have too many dimensions."""
    for what, tensor in {"input": input, **states}.items():
        if tensor.dim() not in (1, 2):
            raise ValueError(f"{name}: Expected {what} to be 1D or 2D, got {tensor.dim()}D instead")
    return input.dim() == 2


_CELL_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class _Cell(Frozen):
    """What RNNCell, GRUCell and LSTMCell share."""

    def _quick(self, mode: str, input: Tensor, hx: Tensor | None, cx: Tensor | None = None):
        """The step in one call, where all is plain; else None, and the long way finds out why."""
        if _export.tracing() or (self._frozen and self._pack is None):
            return None
        return _C.rnn_cell(self._parameters, input, hx, cx, mode, self._pack if self._frozen else None)

    def _step(self, function, mode: str, x: Tensor, hx):
        weights, packed = parameters(self, _CELL_WEIGHTS), None
        if self._frozen and all(
            map(self._parameters.__contains__, _CELL_WEIGHTS)
        ):  # not parametrized: other tensors at each call
            given = [w for w in weights if w is not None]
            packed = self._packed(given, torch.ops.fastnn.rnn_pack, lambda: (mode,)) if len(given) % 2 == 0 else None
        return function(x, hx, *weights, packed=packed)


class _OneState(_Cell):
    """What RNNCell and GRUCell share."""

    def _function(self):
        raise NotImplementedError

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step; arguments and results are those of the class of this name in ``torch.nn``."""
        h = self._quick(self._function()[1], input, hx)
        if h is not None:
            return h
        batched = _check_cell(type(self).__name__, input, {} if hx is None else {"hidden": hx})
        x = input if batched else input.unsqueeze(0)
        if hx is None:
            hx = x.new_zeros(x.size(0), self.hidden_size)
        elif not batched:
            hx = hx.unsqueeze(0)
        h = self._step(*self._function(), x, hx)
        return h if batched else h.squeeze(0)


class RNNCell(_OneState, torch.nn.RNNCell):
    r"""h' = tanh(W_ih x + b_ih + W_hh h + b_hh), or relu; arguments, shapes and state_dict of ``torch.nn.RNNCell``."""

    def _function(self):
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        if self.nonlinearity == "tanh":
            return functional.rnn_tanh_cell, "RNN_TANH"
        return functional.rnn_relu_cell, "RNN_RELU"


class GRUCell(_OneState, torch.nn.GRUCell):
    r"""h' = (1 - z) n + z h; arguments, shapes and state_dict of ``torch.nn.GRUCell``."""

    def _function(self):
        return functional.gru_cell, "GRU"


class LSTMCell(_Cell, torch.nn.LSTMCell):
    r"""c' = f c + i g, h' = o tanh(c'); arguments, shapes and state_dict of ``torch.nn.LSTMCell``."""

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """One step; arguments and results are those of ``torch.nn.LSTMCell``."""
        state = self._quick("LSTM", input, *((None, None) if hx is None else hx))
        if state is not None:
            return state
        states = {} if hx is None else {"hx[0]": hx[0], "hx[1]": hx[1]}
        batched = _check_cell(type(self).__name__, input, states)
        x = input if batched else input.unsqueeze(0)
        if hx is None:
            zeros = x.new_zeros(x.size(0), self.hidden_size)
            hx = (zeros, zeros)
        elif not batched:
            hx = (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
        h, c = self._step(functional.lstm_cell, "LSTM", x, hx)
        return (h, c) if batched else (h.squeeze(0), c.squeeze(0))
