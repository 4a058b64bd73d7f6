"""fastnn/nn/_frozen.py: packed weights are used when they may be, and never after the weight has changed."""

import copy
import io
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree

import fastnn
from fastnn import testing


@pytest.fixture
def layer():
    layer = fastnn.nn.Linear(64, 48).requires_grad_(False)
    layer._freeze()
    return layer


X = torch.randn(16, 64)


def packs(layer, monkeypatch):
    """Count how often the weight is packed from now on."""
    count = []
    usual = type(layer)._packed
    monkeypatch.setattr(
        type(layer), "_packed", lambda self, w, pack: usual(self, w, lambda t: (count.append(1), pack(t))[1])
    )
    return count


def test_the_weight_is_packed_once(layer, monkeypatch):
    count = packs(layer, monkeypatch)
    first, second = layer(X), layer(X)
    assert len(count) == 1 and torch.equal(first, second)
    torch.testing.assert_close(first, torch.nn.functional.linear(X, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "edit",
    [
        lambda layer: layer.weight.mul_(2),
        lambda layer: layer.weight.copy_(torch.ones_like(layer.weight)),
        lambda layer: layer.load_state_dict(fastnn.nn.Linear(64, 48).state_dict()),
        lambda layer: setattr(layer, "weight", torch.nn.Parameter(torch.ones(48, 64), requires_grad=False)),
        lambda layer: setattr(layer.weight, "data", torch.ones(48, 64)),
        lambda layer: layer.double(),
        lambda layer: layer.half(),
    ],
    ids=["in place", "copy", "state_dict", "replaced", "data", "double", "half"],
)
def test_an_edit_shows(layer, edit):
    layer(X)
    with torch.no_grad():
        edit(layer)
        x = X.to(layer.weight.dtype)
        expected = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
        tolerance = 1e-2 if x.dtype == torch.float16 else 1e-4
        torch.testing.assert_close(layer(x).double(), expected, rtol=tolerance, atol=tolerance)


def test_nothing_is_packed_where_a_gradient_is_wanted(layer, monkeypatch):
    layer.requires_grad_(True)
    count = packs(layer, monkeypatch)
    layer(X).sum().backward()
    assert not count and layer.weight.grad is not None
    with torch.no_grad():
        layer(X)
    assert len(count) == 1


def test_copies_and_pickles_hold_no_packed_weight(layer):
    layer(X)
    assert layer._pack is not None
    twin = copy.deepcopy(layer)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert set(layer.state_dict()) == {"weight", "bias"}
    for other in (twin, loaded):
        assert other._pack is None and other._frozen
        assert torch.equal(other(X), layer(X))
    assert file.getbuffer().nbytes < 2 * layer.weight.nbytes


def test_thaw_ends_it(layer):
    layer(X)
    layer._thaw()
    assert not layer._frozen and layer._pack is None and "_pack" not in layer.__dict__


# ------------------------------------------------------------- modules with several weights, layers and directions

SEQUENCE = torch.randn(5, 3, 6)
RECURRENT = {
    "RNN": (torch.nn.RNN, fastnn.nn.RNN, dict(num_layers=2, nonlinearity="relu"), SEQUENCE),
    "GRU": (torch.nn.GRU, fastnn.nn.GRU, dict(num_layers=2, bidirectional=True), SEQUENCE),
    "LSTM": (torch.nn.LSTM, fastnn.nn.LSTM, dict(num_layers=2, bidirectional=True, proj_size=4), SEQUENCE),
    "GRU without bias": (torch.nn.GRU, fastnn.nn.GRU, dict(bias=False, batch_first=True), SEQUENCE),
    "RNNCell": (torch.nn.RNNCell, fastnn.nn.RNNCell, {}, SEQUENCE[0]),
    "GRUCell": (torch.nn.GRUCell, fastnn.nn.GRUCell, {}, SEQUENCE[0]),
    "LSTMCell": (torch.nn.LSTMCell, fastnn.nn.LSTMCell, {}, SEQUENCE[0]),
    "GRUCell without bias": (torch.nn.GRUCell, fastnn.nn.GRUCell, dict(bias=False), SEQUENCE[0]),
}


@pytest.fixture(params=RECURRENT)
def recurrent(request):
    """A frozen module, torch's with the same weights, the packed copies it will keep, and an input."""
    stock, own, kwargs, x = RECURRENT[request.param]
    stock, own = stock(6, 7, **kwargs).eval(), own(6, 7, **kwargs).eval()
    own.load_state_dict(stock.state_dict())
    own._freeze()
    slots = getattr(own, "num_layers", 1) * (2 if getattr(own, "bidirectional", False) else 1)
    return own, stock, slots, x


def agree(own, stock, x):
    with torch.no_grad():
        for a, b in zip(_pytree.tree_leaves(own(x)), _pytree.tree_leaves(stock(x)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def copies(module):
    packed = next(iter(module._pack[1].values()))
    return packed if isinstance(packed, list) else [packed]


def test_one_packed_copy_for_each_layer_and_direction(recurrent):
    own, stock, slots, x = recurrent
    agree(own, stock, x)
    first = copies(own)
    agree(own, stock, x)
    assert len(first) == slots and all(a is b for a, b in zip(first, copies(own), strict=True))


EDITS = {
    "in place": lambda module, name: getattr(module, name).mul_(0.5),
    "data": lambda module, name: setattr(getattr(module, name), "data", getattr(module, name).data * 2),
    "view": lambda module, name: getattr(module, name)[0].fill_(1),
    "parameter": lambda module, name: setattr(
        module, name, torch.nn.Parameter(torch.ones_like(getattr(module, name)) / 4)
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_any_weight_or_bias_shows(recurrent, edit):
    own, stock, _, x = recurrent
    agree(own, stock, x)
    for name in own.state_dict():
        before = copies(own)
        with torch.no_grad():
            for module in (own, stock):
                EDITS[edit](module, name)
        agree(own, stock, x)
        assert not any(a is b for a, b in zip(before, copies(own), strict=True))


def test_new_weights_show(recurrent):
    own, stock, _, x = recurrent
    agree(own, stock, x)
    for assign in (False, True):
        # Of the size that the modules start with: larger ones multiply rounding errors from step to step.
        state = {name: torch.randn_like(t) / 4 for name, t in stock.state_dict().items()}
        for module in (own, stock):
            module.load_state_dict(copy.deepcopy(state), assign=assign)
        agree(own, stock, x)
    agree(own.double(), stock.double(), x.double())
    for isa in testing.available_isas():
        with testing.forced_isa(isa):
            agree(own, stock, x.double())
    other = {name: torch.randn_like(t) / 4 for name, t in stock.state_dict().items()}
    with torch.no_grad():
        a, b = (torch.func.functional_call(module, other, x.double()) for module in (own, stock))
    for y, z in zip(_pytree.tree_leaves(a), _pytree.tree_leaves(b), strict=True):
        torch.testing.assert_close(y, z)
    agree(own, stock, x.double())


def test_recurrent_copies_pack_for_themselves(recurrent):
    own, stock, slots, x = recurrent
    agree(own, stock, x)
    file = io.BytesIO()
    torch.save(own, file)
    file.seek(0)
    assert set(own.state_dict()) == set(stock.state_dict())
    for twin in (copy.deepcopy(own), pickle.loads(pickle.dumps(own)), torch.load(file, weights_only=False)):
        assert twin._frozen and twin._pack is None
        agree(twin, stock, x)
        assert len(copies(twin)) == slots
        with torch.no_grad():
            next(twin.parameters()).zero_()
        agree(own, stock, x)
    own._thaw()
    assert not own._frozen and "_pack" not in own.__dict__
    agree(own, stock, x)


def test_nothing_recurrent_is_packed_where_it_may_not_be(recurrent):
    own, stock, _, x = recurrent
    grads = []
    for module in (own, stock):  # a gradient is wanted
        ys = _pytree.tree_leaves(module(x))
        grads.append(torch.autograd.grad(sum(y.sin().sum() for y in ys), list(module.parameters())))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    assert own._pack is None
    torch._dynamo.reset()
    agree(torch.compile(own, fullgraph=True, backend="aot_eager"), stock, x)
    assert own._pack is None
    meta = copy.deepcopy(own).to("meta")
    with torch.no_grad():
        meta(x.to("meta"))
    assert meta._pack is None
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = copy.deepcopy(own)
        fake.load_state_dict({k: mode.from_tensor(v) for k, v in own.state_dict().items()}, assign=True)
        fake(mode.from_tensor(x))
    assert fake._pack is None
    for module in (own, stock):
        name = next(name for name in reversed(list(module.state_dict())) if "weight" in name)
        torch.nn.utils.parametrize.register_parametrization(module, name, Halved())
    agree(own, stock, x)
    assert own._pack is None


class Halved(torch.nn.Module):
    def forward(self, weight):
        return weight / 2


def test_gradients_of_the_input_alone(recurrent):
    """The weights want no gradient and are packed; the op computes from the weights all the same."""
    own, stock, _, x = recurrent
    grads = []
    for module in (own, stock):
        module.requires_grad_(False)
        inputs = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(sum(y.sin().sum() for y in _pytree.tree_leaves(module(inputs))), inputs)
        grads.append(grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_frozen_packed_sequence_and_inference_mode():
    for name in ("GRU", "LSTM"):
        stock, own, kwargs, _ = RECURRENT[name]
        stock, own = stock(6, 7, **kwargs), own(6, 7, **kwargs)
        own.load_state_dict(stock.state_dict())
        fastnn.freeze(own)
        x = torch.nn.utils.rnn.pack_sequence([torch.randn(n, 6) for n in (2, 5, 1)], enforce_sorted=False)
        with torch.inference_mode():
            (a, h), (b, k) = own(x), stock(x)
        torch.testing.assert_close(a.data, b.data, rtol=1e-5, atol=1e-5)
        for y, z in zip(_pytree.tree_leaves(h), _pytree.tree_leaves(k), strict=True):
            torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-5)
        assert len(copies(own)) == 4
        inputs = (
            SEQUENCE.clone().requires_grad_()
        )  # what was packed in inference mode serves, or does not disturb, later
        own(inputs)[0].sum().backward()
        assert inputs.grad is not None
        agree(own, stock, SEQUENCE)


def test_weights_of_a_transform_are_not_packed():
    """torch.func.vmap over the weights of many models, frozen or not."""
    x = torch.randn(4, 64)
    layers = [fastnn.nn.Linear(64, 48) for _ in range(3)]
    stacked, _ = torch.func.stack_module_state(layers)
    layers[0]._freeze()
    with torch.no_grad():
        y = torch.func.vmap(lambda state: torch.func.functional_call(layers[0], state, x))(stacked)
        for i, layer in enumerate(layers):
            torch.testing.assert_close(y[i], layer(x), rtol=1e-5, atol=1e-5)


def test_another_view_of_the_same_memory_shows():
    layer = fastnn.nn.Linear(64, 64, bias=False)
    layer._freeze()
    with torch.no_grad():
        before = layer(X)
        layer.weight.data = layer.weight.data.t()
        torch.testing.assert_close(layer(X), X @ layer.weight.t(), rtol=1e-5, atol=1e-5)
        assert not torch.equal(layer(X), before)
