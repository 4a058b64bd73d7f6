"""fastnn.backends: the switches reach the kernels at once."""

import threading

import pytest
import torch

import fastnn
from fastnn import _C, testing
from fastnn.functional import conv2d


@pytest.fixture(autouse=True)
def _as_before():
    yield
    fastnn.backends.winograd = True


X, W = torch.randn(1, 32, 24, 24), torch.randn(32, 32, 3, 3)


def algorithm():
    return _C._conv2d_algorithm(X, W, (1, 1), (1, 1, 1, 1), (1, 1), 1)


def test_winograd_is_on_and_can_be_turned_off():
    assert fastnn.backends.winograd is True and algorithm() == "winograd4"
    fast = conv2d(X, W, padding=1)
    fastnn.backends.winograd = False
    assert fastnn.backends.winograd is False and _C.winograd() is False and algorithm() == "implicit"
    direct = conv2d(X, W, padding=1)
    with testing.forced("conv2d", "implicit"):
        assert torch.equal(direct, conv2d(X, W, padding=1))
    assert not torch.equal(direct, fast)
    fastnn.backends.winograd = True
    assert torch.equal(conv2d(X, W, padding=1), fast)


def test_gradients_obey():
    def gradient():
        x = X.clone().requires_grad_()
        return torch.autograd.grad(conv2d(x, W, padding=1).sum(), x)[0]

    fast = gradient()
    fastnn.backends.winograd = False
    assert not torch.equal(gradient(), fast)


def test_frozen_modules_obey():
    module = fastnn.nn.Conv2d(32, 32, 3, padding=1).requires_grad_(False)
    plain = {}
    for allowed in (True, False):
        fastnn.backends.winograd = allowed
        plain[allowed] = module(X)
    module._freeze()
    for allowed in (False, True, False):
        fastnn.backends.winograd = allowed
        assert torch.equal(module(X), plain[allowed])


def test_every_thread_sees_it():
    fastnn.backends.winograd = False
    seen = []
    thread = threading.Thread(target=lambda: seen.append((fastnn.backends.winograd, algorithm())))
    thread.start()
    thread.join()
    assert seen == [(False, "implicit")]


@pytest.mark.parametrize("value", [1, None, "off"])
def test_a_switch_takes_a_bool(value):
    with pytest.raises(TypeError, match=r"fastnn.backends.winograd: value must be a bool; got"):
        fastnn.backends.winograd = value
    assert fastnn.backends.winograd is True
