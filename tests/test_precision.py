"""autocast over every function and module: fastnn beside stock torch in the same region."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree

import fastnn
import fastnn.functional as fF
import fastnn.nn as fnn
from fastnn._library import _C
from tests.modules import twins
from tests.precision import (  # noqa: F401  fixtures of every test
    MODULES,
    _no_fast_path,
    _nothing_falls_back,
    autocast,
    cast_input,
    compare,
    compare_training,
    low_dtypes,
    pair,
    randn,
)
from tests.test_nn import no_worse

pytestmark = pytest.mark.usefixtures("one_thread")


# ------------------------------------------------------------------------------------------------------- functions

FUNCTIONS = {
    "linear": (fF.linear, F.linear, lambda: (randn(6, 16), randn(8, 16), randn(8)), {}),
    "linear, no bias": (fF.linear, F.linear, lambda: (randn(2, 3, 16), randn(16)), {}),
    "conv2d": (
        fF.conv2d,
        F.conv2d,
        lambda: (randn(2, 4, 7, 7), randn(6, 2, 3, 3), randn(6)),
        {"padding": 1, "groups": 2},
    ),
    "attention": (
        fF.scaled_dot_product_attention,
        F.scaled_dot_product_attention,
        lambda: (randn(2, 3, 5, 8), randn(2, 3, 6, 8), randn(2, 3, 6, 8), randn(5, 6)),
        {},
    ),
    "causal attention": (
        fF.scaled_dot_product_attention,
        F.scaled_dot_product_attention,
        lambda: tuple(randn(2, 3, 5, 8) for _ in range(3)),
        {"is_causal": True},
    ),
}
CELLS = {
    "rnn_tanh_cell": (fF.rnn_tanh_cell, torch.rnn_tanh_cell, 1),
    "rnn_relu_cell": (fF.rnn_relu_cell, torch.rnn_relu_cell, 1),
    "gru_cell": (fF.gru_cell, torch.gru_cell, 3),
    "lstm_cell": (fF.lstm_cell, torch.lstm_cell, 4),
}
for _name, (_fast, _stock, _gates) in CELLS.items():
    _rest = [(8 * _gates, 4), (8 * _gates, 8), (8 * _gates,), (8 * _gates,)]

    def _make(name=_name, rest=_rest):
        h = randn(3, 8)
        return randn(3, 4), (h, randn(3, 8)) if name == "lstm_cell" else h, *(randn(*s) / 2 for s in rest)

    FUNCTIONS[_name] = (_fast, _stock, _make, {})


@pytest.mark.works("Precision", "`torch.autocast` on the CPU, bfloat16 and float16: functions")
@low_dtypes
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("given", ["float32", "low"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name, given, train, low):
    """Dtypes of results and gradients, and the error of both, beside the operator that each stands for."""
    fast, stock, make, kwargs = FUNCTIONS[name]
    if given == "low":
        of = make
        make = lambda: (of()[0].to(low), *of()[1:])  # noqa: E731
    grads = compare(fast, stock, stock, make, kwargs, train, lambda: autocast(low))
    if train:
        no_worse(*grads)


@pytest.mark.works("Precision", "`torch.autocast` on the CPU, bfloat16 and float16: functions")
@low_dtypes
@pytest.mark.parametrize("name", ["relu", "gelu", "silu", "sigmoid", "tanh", "softplus", "mish"])
def test_fused_activations(name, low):
    stock = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}.get(name) or getattr(F, name)
    grads = compare(
        lambda *args: fF.linear(*args, activation=name),
        lambda *args: stock(F.linear(*args)),
        lambda *args: stock(F.linear(*args)),
        lambda: (randn(6, 16), randn(8, 16), randn(8)),
        {},
        True,
        lambda: autocast(low),
    )
    no_worse(*grads)


@low_dtypes
def test_more_than_torch_has(low):
    """The log-sum-exp stays float32; the weights have the dtype that torch's softmax gives."""
    q, k, v = (randn(2, 3, 5, 8) for _ in range(3))
    with autocast(low):
        output, lse = fF.scaled_dot_product_attention(q, k, v, return_lse=True, softcap=5.0, window=2)
        second, weights = fF.attention_weights(q, k, v)
        softmax = torch.softmax(q @ k.mT, -1)
    assert (output.dtype, lse.dtype, second.dtype, weights.dtype) == (low, torch.float32, low, softmax.dtype)
    exact = torch.softmax(q.double() @ k.double().mT / 8**0.5, -1)
    torch.testing.assert_close(weights.double(), exact, rtol=0, atol=8 * torch.finfo(low).eps)


# --------------------------------------------------------------------------------------------------------- modules


@pytest.mark.works("Precision", "`torch.autocast` on the CPU, bfloat16 and float16: modules")
@low_dtypes
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("given", ["float32", "low"])
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, given, mode, low):
    """Outputs, states and gradients have the dtypes that torch's have, and no more error; packed weights, too."""
    *_, make, kwargs = MODULES[name]
    modules = pair(name)
    for module in modules:
        module.train(mode == "train")
    if mode == "frozen":
        fastnn.freeze(modules[0])
    if given == "low":
        if "packed" in name:
            of = make
            make = lambda: (of()[0].to(low),)  # noqa: E731
        else:
            make = cast_input(make, low)
    if mode == "train":
        parameters = [list(m.parameters()) for m in modules]
        compare_training(*modules, make, kwargs, lambda: autocast(low), parameters)
        return
    for _ in range(2):  # the second time with what is packed by now
        compare(*modules, make, kwargs, False, lambda: autocast(low))


@pytest.mark.works("Precision", "`torch.autocast` on the CPU, bfloat16 and float16: modules")
@low_dtypes
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_lstm_over_a_padded_batch(train, low):
    """One operator of torch, whose results are all in autocast's dtype where the CPU has it; elsewhere torch raises."""
    fast, stock = twins(fnn.LSTM(4, 8, 2), nn.LSTM(4, 8, 2))
    exact = copy.deepcopy(stock).double()
    x = randn(5, 3, 4)
    with torch.set_grad_enabled(train), autocast(low):
        results = _pytree.tree_leaves(fast(x))
        try:
            expected = _pytree.tree_leaves(stock(x))
        except RuntimeError:
            expected = []
    assert [t.dtype for t in results] == [low] * 3
    assert all(t.dtype == low for t in expected)
    for result, right in zip(results, _pytree.tree_leaves(exact(x.double())), strict=True):
        torch.testing.assert_close(result.double(), right, rtol=0, atol=torch.finfo(low).eps)


@pytest.mark.works("Precision", "`torch.autocast` on the CPU, bfloat16 and float16: modules")
@low_dtypes
@pytest.mark.parametrize("given", list(itertools.product(["float32", "low"], repeat=2)), ids="-".join)
@pytest.mark.parametrize(
    "name", ["RNN", "GRU", "GRU, packed", "LSTM, packed", "LSTM, projected", "RNNCell", "GRUCell", "LSTMCell"]
)
def test_states(name, given, low):
    """States of float32 or autocast's dtype beside inputs of either."""
    *_, make, kwargs = MODULES[name]
    fast, stock, exact = pair(name)
    for module in (fast, stock, exact):
        module.eval()
    layers = fast.num_layers * (2 if fast.bidirectional else 1) if hasattr(fast, "num_layers") else None
    as_given = {"float32": torch.float32, "low": low}

    def with_states():
        x = make()[0].to(as_given[given[0]])
        lead = (3,) if layers is None else (layers, 3)
        h = randn(*lead, getattr(fast, "proj_size", 0) or 8, dtype=as_given[given[1]])
        return x, (h, randn(*lead, 8, dtype=as_given[given[1]])) if "LSTM" in name else h

    compare(fast, stock, exact, with_states, kwargs, False, lambda: autocast(low))


def test_every_module_is_here():
    """The table holds fastnn.nn, but for what is made of its rows."""
    rows = {kind for kind, *_ in MODULES.values()} | {"TransformerEncoder", "TransformerDecoder", "KVCache"}
    assert rows == set(fnn.__all__)


@low_dtypes
@pytest.mark.parametrize("name", ["Linear", "Conv2d", "MultiheadAttention", "GRU"])
def test_packed_weights_serve_under_autocast(name, low):
    """Packed once for calls in and out of the region; no weight is cast, and an edit shows."""
    kind, args, make, kwargs = {
        "Linear": ("Linear", (64, 96), lambda: (randn(48, 64),), {}),
        "Conv2d": ("Conv2d", (16, 24, 3), lambda: (randn(2, 16, 10, 10),), {}),
        "MultiheadAttention": ("MultiheadAttention", (64, 2), lambda: (randn(48, 1, 64),) * 3, {"need_weights": False}),
        "GRU": ("GRU", (16, 32), lambda: (randn(5, 3, 16),), {}),
    }[name]
    fast, x = getattr(fnn, kind)(*args).eval(), make()
    fastnn.freeze(fast)
    weights = sorted(p.numel() for p in fast.parameters() if p.dim() > 1)
    with torch.no_grad():
        fast(*x, **kwargs)
        packs = fast._pack[1]
        kept = {how: id(pack) for how, pack in packs.items()}
        with autocast(low), torch.profiler.profile(record_shapes=True) as profile:
            found = _pytree.tree_leaves(fast(*x, **kwargs))[0]
        cast = [e for e in profile.events() if e.name == "aten::_to_copy"]
        sizes = [torch.Size(e.input_shapes[0]).numel() for e in cast]
        assert not set(sizes) & set(weights)
        assert fast._pack[1] is packs and {how: id(pack) for how, pack in packs.items()} == kept
        for p in fast.parameters():
            p.mul_(0.5)
        with autocast(low):
            again = _pytree.tree_leaves(fast(*x, **kwargs))[0]
        expected = _pytree.tree_leaves(fast(*x, **kwargs))[0]
    assert not torch.equal(again, found)
    torch.testing.assert_close(again.float(), expected, rtol=0, atol=4 * torch.finfo(low).eps)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_varlen(train):
    """Sequences of different lengths give what each gives alone, in autocast's dtype."""
    q = randn(9, 2, 8).requires_grad_(train)
    ends = torch.tensor([0, 4, 9])
    with autocast(torch.bfloat16):
        found = fF.varlen_attn(q, q, q, ends, ends, 5, 5)
        alone = [fF.scaled_dot_product_attention(*(x.transpose(0, 1),) * 3) for x in q.split([4, 5])]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, torch.cat([x.transpose(0, 1) for x in alone]))


def test_padding_under_autocast():
    """No nested tensor, so no zeros at padded positions: what torch does on every device but, by mistake, the CPU."""
    layer = fnn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    encoder = fnn.TransformerEncoder(layer, 2).eval()
    torch.backends.mha.set_fastpath_enabled(True)
    x, padding = randn(1, 5, 16), torch.tensor([[False, False, True, True, True]])
    with torch.no_grad():
        assert (encoder(x, src_key_padding_mask=padding)[padding] == 0).all()
        with autocast(torch.bfloat16):
            assert (encoder(x, src_key_padding_mask=padding)[padding] != 0).all()


# ---------------------------------------------------------------------------------------------------------------- CUDA


@pytest.mark.cuda
@pytest.mark.skipif(
    not torch.cuda.is_available() or "linear" not in _C.cuda_ops, reason="needs a GPU and kernels for it"
)
@low_dtypes
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODULES)
def test_cuda(name, train, low):
    """As on the CPU; what has no kernel for a GPU goes to torch, cast as torch casts it."""
    *_, make, kwargs = MODULES[name]
    modules = pair(name, "cuda")
    for module in modules:
        module.train(train)
    of, region = (lambda: _pytree.tree_map(lambda t: t.cuda(), make())), (lambda: torch.autocast("cuda", low))
    if train:
        compare_training(*modules, of, kwargs, region, [list(m.parameters()) for m in modules])
    else:
        compare(*modules, of, kwargs, False, region)
