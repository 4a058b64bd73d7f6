"""fastnn/nn/_frozen.py: packed weights are used when they may be, and never after the weight has changed."""

import copy
import io

import pytest
import torch

import fastnn


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
