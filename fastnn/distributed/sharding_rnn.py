"""How DTensor runs recurrent layers on its shards: over the batch, or whole."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.utils._pytree import tree_map


class _Layout:
    """Which dimensions of the mesh spread the batch of one call: those of its input. Else everything is whole."""

    def __init__(self, given: dict):
        x = given["input"]
        if not isinstance(x, DTensor):
            raise RuntimeError(
                "fastnn.rnn: input must be a DTensor where weights or states are; got a plain Tensor. Use distribute_tensor."
            )
        self.mesh, self.step = x.device_mesh, x.ndim == 2
        self.batch, self.states = (0, 0) if self.step else (1, 1)
        # Rows of a PackedSequence and of a zoneout mask are steps and batch in one.
        whole = given["batch_sizes"] is not None or given["zoneout_mask"] is not None
        self.sharded = [not whole and p.is_shard(self.batch) for p in x.placements]

    def placements(self, spread) -> list:
        return [spread if sharded else Replicate() for sharded in self.sharded]

    def local(self, tensor, spread):
        """This process's part; a plain tensor, such as the zeros that a module starts from, is the same everywhere."""
        if not isinstance(tensor, Tensor):
            return tensor
        if not isinstance(tensor, DTensor):
            tensor = DTensor.from_local(tensor, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
        placements = self.placements(spread)
        if list(tensor.placements) != placements:  # torch < 2.13 cannot redistribute a parameter to what it is
            tensor = tensor.redistribute(self.mesh, placements)
        return tensor.to_local()

    def whole(self, local, spread, shape):
        if local is None:
            return None
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        placements = self.placements(spread)
        return DTensor.from_local(
            local, self.mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(strides)
        )


def _localized(func, args, kwargs) -> tuple[dict, _Layout, tuple]:
    given = {a.name: a.default_value for a in func._schema.arguments}
    given |= dict(zip(given, args, strict=False)) | (kwargs or {})
    layout = _Layout(given)
    rows, states = Shard(layout.batch), Shard(layout.states)
    along: dict[str, Placement] = {
        "input": rows,
        "output": rows,
        "grad_output": rows,
        "hx": states,
        "cx": states,
        "grad_h_n": states,
    }
    along |= {"grad_c_n": states, "reserve": Shard(1)}
    if layout.step:
        along["grad_h_n"] = Replicate()
    local = {}
    for name, value in given.items():
        local[name] = tree_map(lambda t: layout.local(t, along.get(name, Replicate())), value)
    return given, layout, func(*local.values())


def forward(cls, func, types, args=(), kwargs=None):
    """``fastnn::rnn`` and ``fastnn::rnn_train``."""
    with torch.no_grad():
        given, layout, (output, h_n, c_n, *reserve) = _localized(func, args, kwargs)
        x, hx, cx = given["input"], given["hx"], given["cx"]
        states, whole = Shard(layout.states), Replicate()
        results = [
            layout.whole(output, Shard(layout.batch), [*x.shape[:-1], output.shape[-1]]),
            layout.whole(h_n, whole, h_n.shape) if layout.step else layout.whole(h_n, states, hx.shape),
            layout.whole(c_n, whole, c_n.shape) if cx is None else layout.whole(c_n, states, cx.shape),
        ]
        for kept in reserve:  # read by the backward alone, in which each process finds its own
            results.append(layout.whole(kept, Shard(1), [kept.shape[0], x.shape[:-1].numel(), kept.shape[-1]]))
        return tuple(results)


def backward(cls, func, types, args=(), kwargs=None):
    """``fastnn::rnn_backward``."""
    with torch.no_grad():
        given, layout, (grad_input, grad_hx, grad_cx, *lists) = _localized(func, args, kwargs)
        states = Shard(layout.states)
        return (
            layout.whole(grad_input, Shard(layout.batch), given["input"].shape),
            layout.whole(grad_hx, states, given["hx"].shape),
            layout.whole(grad_cx, states, None if grad_cx is None else given["cx"].shape),
            *([layout.whole(grad, Partial(), grad.shape) for grad in grads] for grads in lists),
        )


torch.library.register_torch_dispatch("fastnn::rnn", DTensor, forward)
torch.library.register_torch_dispatch("fastnn::rnn_train", DTensor, forward)
torch.library.register_torch_dispatch("fastnn::rnn_backward", DTensor, backward)
