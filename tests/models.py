"""What the tests of whole models share: one check of a model, accelerated, frozen, trained and restored."""

import copy

import torch
from torch.nn.utils import parametrize
from torch.utils import _pytree

import fastnn
from tests.modules import doubled, no_worse


def lively(model):
    """Give the parameters the sizes of a trained model's, so that every path counts in the output."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, p[0].numel() ** -0.5)
            else:
                p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def tensors(output):
    """The floating tensors of whatever a model returned, key-value caches apart."""
    if isinstance(output, dict):
        output = {k: v for k, v in output.items() if k != "past_key_values"}
    return [t for t in _pytree.tree_leaves(output) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def gradients(model, call):
    """Outputs and the gradients of all parameters, in training mode."""
    outputs = tensors(model.train()(**call))
    loss = sum(t.sin().sum() for t in outputs)
    return outputs, torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)


def kinds(model):
    """The classes of all modules, and the attention implementations of those that have one."""
    classes = [parametrize.type_before_parametrizations(m) for m in model.modules()]
    return classes, [
        m.config._attn_implementation
        for m in model.modules()
        if hasattr(getattr(m, "config", None), "_attn_implementation")
    ]


def check(model, call, least=0.9, deep=False):
    """A model through fastnn: outputs as good as torch's, plain and frozen; gradients; all of it on the kernels; undone.

    Args:
        least: that fastnn's share of the FLOPs must reach.
        deep: gradients are compared in float64. Dozens of batch norms one after the other amplify roundings so much that
            in float32 neither torch's gradients nor fastnn's have a digit to count on.

    Returns fastnn's share of the FLOPs.
    """
    fastnn.set_fallback("error")
    oracle, exact = copy.deepcopy(model).double(), doubled(call)
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    former = kinds(model)
    fast, frozen = fastnn.accelerate(model), fastnn.accelerate(model, freeze=True)
    with torch.no_grad():
        expected, answer = tensors(model(**call)), tensors(oracle(**exact))
        assert answer and all(t.isfinite().all() for t in answer)
        no_worse(tensors(fast(**call)), expected, answer)
        for _ in range(2):  # the second call has its weights packed
            no_worse(tensors(frozen(**call)), expected, answer)
    share = fastnn.explain(fast, **call).share
    assert share >= least, fastnn.explain(fast, **call)
    assert fastnn.explain(model, **call).share == 0

    if deep:
        found, expected_too = (gradients(m, exact) for m in (fastnn.accelerate(copy.deepcopy(oracle)), oracle))
        torch.testing.assert_close(found, expected_too, rtol=1e-6, atol=1e-6)
    else:
        no_worse(*(gradients(copy.deepcopy(m), c) for m, c in ((fast, call), (model, call), (oracle, exact))))

    for swapped in (fast, frozen):
        fastnn.restore(swapped)
        state = swapped.state_dict()
        assert state.keys() == kept.keys() and all(torch.equal(state[k], kept[k]) for k in kept)
        assert kinds(swapped) == former
        with torch.no_grad():
            assert all(map(torch.equal, tensors(swapped(**call)), expected))
    return share
