"""recurrent_dropout, zoneout and layer_norm of the recurrent layers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fastnn
from fastnn import nn, testing

KINDS = ("RNN_TANH", "RNN_RELU", "GRU", "LSTM", "LSTM_PROJ")
P = 0.25
OPTIONS = ("recurrent_dropout",)

pytestmark = pytest.mark.usefixtures("one_thread")


def build(kind, inputs=5, hidden=6, library=nn, **kwargs):
    """A module of one of KINDS."""
    name = kind.split("_")[0]
    if name == "RNN":
        kwargs["nonlinearity"] = kind[4:].lower()
    if kind == "LSTM_PROJ":
        kwargs["proj_size"] = hidden // 2
    return getattr(library, name)(inputs, hidden, **kwargs)


def tensors(result):
    """Every tensor of a nested result."""
    if isinstance(result, PackedSequence):
        return [result.data]
    if isinstance(result, tuple | list):
        return [t for part in result for t in tensors(part)]
    return [result]


def states(module, batch, dtype=torch.float32):
    """Random hx for a module."""
    layers = module.num_layers * (2 if module.bidirectional else 1)
    h = torch.randn(layers, batch, module.proj_size or module.hidden_size, dtype=dtype)
    return (h, torch.randn(layers, batch, module.hidden_size, dtype=dtype)) if module.mode == "LSTM" else h


def seeded(call, *args):
    torch.manual_seed(7)
    return tensors(call(*args))


def same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_are_torchs(kind):
    """Without the options: torch's state_dict, text and results; the options at their defaults change no bit."""
    kwargs = dict(num_layers=2, bidirectional=True, dropout=0.5, batch_first=True)
    torch.manual_seed(1)
    stock = build(kind, library=torch.nn, **kwargs)
    torch.manual_seed(1)
    own = build(kind, **kwargs)
    torch.manual_seed(1)
    zero = build(kind, **kwargs, **dict.fromkeys(OPTIONS, 0.0))
    for module in (own, zero):
        assert repr(module) == repr(stock)
        assert list(module.state_dict()) == list(stock.state_dict())
        same(module.state_dict().values(), stock.state_dict().values())
    x = torch.randn(3, 4, 5)
    same(seeded(zero, x), seeded(own, x))
    for a, b in zip(seeded(own, x), seeded(stock, x), strict=True):
        torch.testing.assert_close(a, b)


# ------------------------------------------------------------------------------------------------ recurrent_dropout


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", (False, True))
def test_recurrent_dropout_is_the_plain_layer_on_dropped_weights(kind, packed):
    kwargs = dict(num_layers=2, bidirectional=True, dropout=0.5)
    own, plain = build(kind, recurrent_dropout=P, **kwargs), build(kind, **kwargs)
    plain.load_state_dict(own.state_dict())
    data = [torch.randn(n, 5) for n in (4, 2, 1)]
    x = pack_sequence(data) if packed else torch.stack([data[0]] * 3)
    hx = states(own, 3 if packed else 4)
    ys = seeded(own, x, hx)
    grads = dict(
        zip(dict(own.named_parameters()), torch.autograd.grad(ys[0].sin().sum(), own.parameters()), strict=True)
    )

    torch.manual_seed(7)
    masks = {}
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            if name.startswith("weight_hh"):
                masks[name] = F.dropout(torch.ones_like(weight), P)
                weight.mul_(masks[name])
    expected = tensors(plain(x, hx))  # from here on the generator gives the dropout between the layers
    same(ys, expected)
    theirs = torch.autograd.grad(expected[0].sin().sum(), plain.parameters())
    for (name, _), grad in zip(plain.named_parameters(), theirs, strict=True):
        torch.testing.assert_close(grads[name], grad * masks[name] if name in masks else grad)

    own.eval(), plain.eval()
    plain.load_state_dict(own.state_dict())
    same(tensors(own(x, hx)), tensors(plain(x, hx)))


@pytest.mark.parametrize("kind", KINDS)
def test_recurrent_dropout_runs_on_the_kernels(kind):
    own, x = build(kind, recurrent_dropout=P), torch.randn(4, 3, 5, requires_grad=True)
    testing.assert_own_kernels(lambda: own(x)[0].sum().backward())


def test_recurrent_dropout_is_drawn_at_each_call():
    own, x = build("GRU", 3, 200, recurrent_dropout=P), torch.randn(4, 3, 3)
    weight = own._dropped(own._weights())[1]
    kept = weight != 0
    assert abs(1 - kept.float().mean() - P) < 0.01
    torch.testing.assert_close(weight[kept], (own.weight_hh_l0 / (1 - P))[kept])
    same(seeded(own, x), seeded(own, x))
    assert not torch.equal(own(x)[0], own(x)[0])
    fastnn.freeze(own)  # in training mode: the copies that freeze keeps are not those of dropped weights
    with torch.no_grad():
        assert not torch.equal(own(x)[0], own(x)[0]) and own._pack is None
        own.eval()
        torch.testing.assert_close(own(x)[0], copy.deepcopy(fastnn.restore(own))(x)[0])


# ---------------------------------------------------------------------------------------------------- treated alike


@pytest.mark.parametrize("p", (-0.1, 1, 1.5, float("nan"), True, "0.1", None))
@pytest.mark.parametrize("name", OPTIONS)
def test_errors(name, p):
    with pytest.raises(ValueError, match=rf"^fastnn\.rnn: {name} must be a number in \[0, 1\); got "):
        nn.GRU(3, 4, **{name: p})
