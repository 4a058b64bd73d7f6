"""What the tests of precision share: the region, the modules, and the comparison of fastnn with stock torch and float64."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils import _pytree

import fastnn.nn as fnn
from fastnn import _fallback
from tests.modules import twins
from tests.test_nn import doubled, no_worse

LOW = [torch.bfloat16, torch.float16]
low_dtypes = pytest.mark.parametrize("low", LOW, ids=str)


def autocast(low, **options):
    return torch.autocast("cpu", low, **options)


def randn(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(*shape, device=device).to(dtype)


@pytest.fixture(autouse=True)
def _nothing_falls_back():
    """Every call here has a kernel."""
    before = sum(_fallback.calls.values())
    yield
    assert torch.cuda.is_available() or sum(_fallback.calls.values()) == before


@pytest.fixture(autouse=True)
def _no_fast_path():
    """torch's inference fast path knows no autocast of the CPU: it raises on padding, and changes the dtype of the rest."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def packed(x):
    return pack_padded_sequence(x, torch.tensor([5, 3, 2]))


def outcome(f, args, kwargs, train, parameters=()):
    """Results and, in training, the gradients of every floating tensor, taken outside of autocast."""
    leaves = [t for t in _pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.requires_grad]
    with torch.set_grad_enabled(train):
        results = _pytree.tree_leaves(f(*args, **kwargs))
    results = [t for t in results if isinstance(t, torch.Tensor) and t.is_floating_point()]
    if not train:
        return results, []

    def gradients():
        loss = sum((t.double() * torch.linspace(-1, 1, t.numel()).view(t.shape).to(t.device)).sum() for t in results)
        return torch.autograd.grad(loss, [*leaves, *parameters], allow_unused=True)

    return results, gradients


def compare(fast, stock, oracle, make, kwargs, train, region, parameters=((), (), ()), seed=1):
    """The same dtypes and no more error than stock's. Returns the gradients of the three."""
    found, grads = [], []
    for f, own, plain in zip((fast, stock, oracle), parameters, (False, False, True), strict=True):
        torch.manual_seed(seed)
        args = _pytree.tree_map(
            lambda t: t.requires_grad_(train and t.is_floating_point()) if isinstance(t, torch.Tensor) else t, make()
        )
        args = doubled(args) if plain else args
        with contextlib.nullcontext() if plain else region():
            results, gradients = outcome(f, args, kwargs, train, own)
        found.append(results)
        grads.append(list(gradients()) if train else [])
    no_worse(*found)
    return grads


def compare_training(fast, stock, oracle, make, kwargs, region, parameters):
    """compare, and the gradients: how often one rounding or another grows is luck, so of several inputs and all tensors."""
    rounds = [compare(fast, stock, oracle, make, kwargs, True, region, parameters, seed) for seed in range(4)]
    ratios = []
    for ours, theirs, exact in zip(*(zip(*grads, strict=True) for grads in zip(*rounds, strict=True)), strict=True):
        assert [None if t is None else t.dtype for t in ours] == [None if t is None else t.dtype for t in theirs]
        if ours[0] is not None:
            exact = torch.stack(exact)
            errors = [(torch.stack(t).double() - exact).norm() for t in (ours, theirs)]
            floor = 1e-6 * exact.norm() + 1e-30
            ratios.append((errors[0] + floor) / (errors[1] + floor))
    ratios = torch.stack(ratios)
    mean = ratios.log().mean().exp()
    assert mean <= 2 and ratios.max() <= 8, f"error {mean:.3g} times torch's, at most {ratios.max():.3g}"


TOKENS = lambda: (randn(2, 5, 16),)  # noqa: E731
ATTENTION = lambda: (randn(2, 5, 16),) * 3  # noqa: E731
STEPS = lambda: (randn(5, 3, 4),)  # noqa: E731
BATCH = lambda: (randn(3, 4),)  # noqa: E731
SMALL = {"dropout": 0.0, "batch_first": True}
SMOOTH = SMALL | {"activation": "gelu"}  # where no rounding switches a unit off
MODULES = {
    "Linear": ("Linear", (16, 8), {}, TOKENS, {}),
    "Conv1d": ("Conv1d", (4, 6, 3), {"padding": 1}, lambda: (randn(2, 4, 9),), {}),
    "Conv2d": ("Conv2d", (4, 6, 3), {"padding": 1}, lambda: (randn(2, 4, 7, 7),), {}),
    "MultiheadAttention": ("MultiheadAttention", (16, 2), SMALL, ATTENTION, {"need_weights": False}),
    "MultiheadAttention, weights": ("MultiheadAttention", (16, 2), SMALL | {"add_bias_kv": True}, ATTENTION, {}),
    "TransformerEncoderLayer": ("TransformerEncoderLayer", (16, 2, 32), SMOOTH, TOKENS, {}),
    "TransformerDecoderLayer": ("TransformerDecoderLayer", (16, 2, 32), SMOOTH, lambda: TOKENS() * 2, {}),
    "Transformer": ("Transformer", (16, 2, 1, 1, 32), SMOOTH, lambda: TOKENS() * 2, {}),
    "RNN": ("RNN", (4, 8, 2), {"bidirectional": True}, STEPS, {}),
    "GRU": ("GRU", (4, 8, 2), {}, STEPS, {}),
    "GRU, packed": ("GRU", (4, 8), {"bidirectional": True}, lambda: (packed(*STEPS()),), {}),
    "LSTM, packed": ("LSTM", (4, 8, 2), {}, lambda: (packed(*STEPS()),), {}),
    "LSTM, projected": ("LSTM", (4, 8, 2), {"proj_size": 3}, STEPS, {}),
    "RNNCell": ("RNNCell", (4, 8), {}, BATCH, {}),
    "GRUCell": ("GRUCell", (4, 8), {}, BATCH, {}),
    "LSTMCell": ("LSTMCell", (4, 8), {}, BATCH, {}),
}


def pair(name, device="cpu"):
    """fastnn's module, torch's, and torch's in float64."""
    kind, args, kwargs, *_ = MODULES[name]
    fast, stock = twins(getattr(fnn, kind)(*args, **kwargs), getattr(nn, kind)(*args, **kwargs))
    return fast.to(device), stock.to(device), copy.deepcopy(stock).double().to(device)


def cast_input(make, low):
    return lambda: _pytree.tree_map(lambda t: t.to(low) if t.is_floating_point() else t, make())
