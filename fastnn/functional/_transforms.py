"""The ops under torch.func's transforms and in forward-mode AD.

The Autograd key of an op holds a C++ Function, which knows neither. A call under a transform, or with a tangent, runs one
of the two Functions here in its place: the same kernels, differentiable any number of times, with rules for vmap and jvp.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastnn import _fallback, reference

Tensors = tuple[Tensor | None, ...]


def active() -> bool:
    """Whether a transform is at work, or forward mode."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def call(op: Op, *tensors: Tensor | None, name: str | None = None) -> tuple[Tensor, ...] | None:
    """The outputs of an op under a transform or with a tangent; None elsewhere, and where no kernel takes the tensors.

    ``name``, where given, is that of the op whose kernels are to take all of them.
    """
    if not active() or not all(map(_plain, tensors)):
        return None
    if name is not None and _fallback.why_not(*tensors, op=name) is not None:
        return None
    return Forward.apply(op, *tensors)


def _plain(t: Tensor | None) -> bool:
    """Whether a tensor's class leaves the functions of torch as they are; as ``plain`` of csrc/bindings/checks.h."""
    return t is None or type(t) in (Tensor, torch.nn.Parameter) or _fallback.takes_class(type(t))


def vjp(f: Callable[..., Tensors], args: Tensors, cotangents: Tensors, wanted: Sequence[bool]) -> Tensors:
    """The gradients of f at ``args``, those that are wanted; an output whose cotangent is None has none."""
    pull, _ = _linearised(f, args, wanted, [c is not None for c in cotangents])
    return pull(tuple(c for c in cotangents if c is not None))


def jvp(f: Callable[..., Tensors], args: Tensors, tangents: Tensors) -> Tensors:
    """The tangents of f's outputs: its vector-Jacobian product is linear in the vector, and jvp is that map transposed.

    Forward mode inside forward mode is refused by torch; this works wherever a gradient does.
    """
    pull, outputs = _linearised(f, args, [t is not None for t in tangents])
    _, push = torch.func.vjp(pull, tuple(torch.zeros_like(y) for y in outputs))
    return push(tuple(t for t in tangents if t is not None))[0]


def _linearised(f, args, wanted, used=None):
    chosen = [i for i, want in enumerate(wanted) if want]
    # What a backward saved under a transform that has ended: torch's vjp cannot return it, and a formula may.
    args = [t if t is None else torch._C._functorch.unwrap_if_dead(t) for t in args]

    def of_chosen(*xs):
        full = list(args)
        for i, x in zip(chosen, xs, strict=True):
            full[i] = x
        outputs = f(*full)
        return outputs if used is None else tuple(y for y, use in zip(outputs, used, strict=True) if use)

    outputs, pull = torch.func.vjp(of_chosen, *(args[i] for i in chosen))
    return pull, outputs


# Around a kernel in the forward of a Function: a result that it makes as a view is to be no view of autograd's.
below_autograd = torch._C._AutoDispatchBelowADInplaceOrView


def _below():
    """Torch turns forward mode off while a jvp runs; the tangents of the levels below are wanted."""
    return forward_ad._set_fwd_grad_enabled(True)


def _primals(ctx) -> Tensors:
    return tuple(None if t is None else forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors)


class Op:
    """What the transforms need to know of an op. A subclass holds the arguments that are no tensors."""

    results = 1  # how many outputs are the op's own

    def forward(self, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """The kernel: results, and after them what the backward reads beside the tensors."""
        raise NotImplementedError

    def backward(self, wanted: Sequence[bool], grads: Tensors, tensors: Tensors, outputs: Tensors) -> Tensors:
        """The backward's kernel: the gradient of each tensor, whatever where it is not wanted."""
        raise NotImplementedError

    def formula(self, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """The results as fastnn/reference.py has them."""
        raise NotImplementedError

    def constant(self, outputs: Tensors) -> Tensors:
        """Those of the outputs that have no derivative."""
        return outputs[self.results :]

    def jvp(self, tensors: Tensors, tangents: Tensors) -> Tensors:
        """The tangents of the results."""
        return jvp(self.formula, tensors, tangents)

    # The rules of vmap, as fastnn/functional/_batching.py tells.
    batch: Callable
    batch_backward: Callable


@dataclass(frozen=True)
class Pull:
    """A backward: of which op, by which tensors, and how many gradients and tensors there are."""

    op: Op
    wanted: tuple[bool, ...]
    grads: int

    def split(self, flat: Sequence) -> tuple[Sequence, Sequence, Sequence]:
        end = self.grads + len(self.wanted)
        return flat[: self.grads], flat[self.grads : end], flat[end:]

    def of_wanted(self, values: Sequence) -> tuple:
        return tuple(value for value, want in zip(values, self.wanted, strict=True) if want)

    def formula(self, *args: Tensor | None) -> Tensors:
        grads, tensors, _ = self.split(args)
        return vjp(self.op.formula, tensors, grads, self.wanted)


def batched_backward(info, dims: tuple, pull: Pull, *flat: Tensor | None):
    """vmap of an op's backward itself: None for what is not wanted."""
    found, dims = pull.op.batch_backward(run_backward, info.batch_size, dims, pull, *flat)
    each = iter(zip(found, dims if isinstance(dims, tuple) else [dims] * len(found), strict=True))
    return tuple(zip(*(next(each) if want else (None, None) for want in pull.wanted), strict=True))


def run_forward(op: Op, *tensors: Tensor | None) -> tuple:
    """What :class:`Forward` runs."""
    return op.forward(*tensors)


def run_backward(pull: Pull, *flat: Tensor | None) -> tuple:
    """What :class:`Backward` runs."""
    return pull.of_wanted(pull.op.backward(pull.wanted, *pull.split(flat)))


class Forward(torch.autograd.Function):
    """An op: ``apply(op, *tensors)``."""

    @staticmethod
    def forward(op: Op, *tensors):
        return op.forward(*tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op, *tensors = inputs
        ctx.set_materialize_grads(False)
        constant = ctx.op.constant(output)
        ctx.mark_non_differentiable(*constant)
        ctx.live = [not any(y is c for c in constant) for y in output]
        ctx.save_for_backward(*tensors, *output)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, *grads):
        saved, wanted = ctx.saved_tensors, tuple(ctx.needs_input_grad[1:])
        grads = grads[: ctx.op.results]
        if all(g is None for g in grads):
            return (None,) * (1 + len(wanted))
        found = iter(Backward.apply(Pull(ctx.op, wanted, len(grads)), *grads, *saved))
        return None, *(next(found) if want else None for want in wanted)

    @staticmethod
    def jvp(ctx, _, *tangents):
        with _below():
            found = (*ctx.op.jvp(_primals(ctx), tangents), *(None,) * len(ctx.live))
        return tuple(t if live else None for t, live in zip(found, ctx.live, strict=False))

    @staticmethod
    def vmap(info, in_dims, op, *tensors):
        return op.batch(Forward.apply, info.batch_size, in_dims[1:], op, *tensors)


class Backward(torch.autograd.Function):
    """The backward of an op: ``apply(pull, *grads, *tensors, *outputs)`` gives the gradients that are wanted."""

    @staticmethod
    def forward(pull: Pull, *flat):
        return run_backward(pull, *flat)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.pull, *flat = inputs
        ctx.count = len(flat)
        ctx.set_materialize_grads(False)
        args = flat[: ctx.pull.grads + len(ctx.pull.wanted)]
        ctx.save_for_backward(*args)
        ctx.save_for_forward(*args)

    @staticmethod
    def backward(ctx, *grad_grads):
        args = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1 : 1 + len(args)]
        found = iter(vjp(ctx.pull.formula, args, grad_grads, wanted))
        return None, *(next(found) if want else None for want in wanted), *(None,) * (ctx.count - len(args))

    @staticmethod
    def jvp(ctx, _, *tangents):
        args = _primals(ctx)
        with _below():
            return jvp(ctx.pull.formula, args, tangents[: len(args)])

    @staticmethod
    def vmap(info, in_dims, pull, *flat):
        return pull.op.batch_backward(Backward.apply, info.batch_size, in_dims[1:], pull, *flat)


def jvp_of_product(op: Op, product: Op, tensors: Tensors, tangents: Tensors) -> tuple[Tensor]:
    """The tangent of ``f(product(input, weight) + bias)``, by the kernel: a product is linear in each of its factors."""
    (input, weight, bias), (d_input, d_weight, d_bias) = tensors, tangents
    terms = [] if d_input is None else [Forward.apply(product, d_input, weight, None)[0]]
    terms += [] if d_weight is None else [Forward.apply(product, input, d_weight, None)[0]]
    z = Forward.apply(product, input, weight, bias)[0] if op.activation or not terms else None
    terms += [] if d_bias is None else [product.shift(torch.zeros_like(z) if not terms else terms.pop(), d_bias)]
    tangent = sum(terms[1:], terms[0])
    if op.activation:  # elementwise: its Jacobian is its own transpose
        tangent = torch.func.vjp(lambda z: reference.activate(z, op.activation), z)[1](tangent)[0]
    return (tangent,)


# The activations whose derivative the kernels read off the output; of the others training keeps the pre-activation, too.
# As kActivations of csrc/include/fastnn/types.h has them.
FROM_OUTPUT = (None, "relu", "sigmoid", "tanh", "leaky_relu", "elu", "relu6")


_library = torch.library.Library("fastnn", "IMPL")


def register_old_vmap(name: str) -> None:
    """Let the rule of an op serve the older vmap, too: that of ``torch.autograd.grad(…, is_grads_batched=True)``."""
    op = getattr(torch.ops.fastnn, name).default

    def kernel(*args):
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        flat, spec = tree_flatten(args)
        # One without a batch at this level comes back with a batch of one.
        flat = [torch._remove_batch_dim(t, level, 1, 0) if isinstance(t, Tensor) else t for t in flat]
        size = max(t.shape[0] for t in flat if isinstance(t, Tensor))
        dims = tuple(0 if isinstance(t, Tensor) and t.shape[0] == size else None for t in flat)
        flat = [t if d == 0 or not isinstance(t, Tensor) else t.squeeze(0) for t, d in zip(flat, dims, strict=True)]
        shape = None

        def call(*flat):
            nonlocal shape
            found, shape = tree_flatten(op(*tree_unflatten(flat, spec)))
            call.kept = [t is not None for t in found]
            return tuple(t for t in found if t is not None)

        found = iter(torch.func.vmap(call, dims)(*flat))
        found = [torch._add_batch_dim(next(found), 0, level) if kept else None for kept in call.kept]
        return tree_unflatten(found, shape)

    _library.impl(name, kernel, "Batched")
