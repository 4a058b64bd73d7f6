"""Compiled autograd: backwards of fastnn traced as they run, each node of C++ one op in the graph."""

import pytest
import torch
from torch import nn
from torch._dynamo import compiled_autograd
from torch._dynamo.utils import counters

import fastnn.functional as FF
import fastnn.nn as fnn
from fastnn.functional.attention_weights import attention_weights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    counters.clear()


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def gradients_agree(forward, leaves, loss=None, dynamic=None):
    """Assert that a backward under compiled autograd, in one graph, gives the gradients that autograd gives."""
    torch.manual_seed(0)
    expected = torch.autograd.grad((loss or forward)(), leaves)
    torch.manual_seed(0)
    value = forward()
    with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True, dynamic=dynamic)):
        value.backward()
    torch.testing.assert_close([t.grad for t in leaves], list(expected))
    assert counters["compiled_autograd"]["captures"] >= 1
    for t in leaves:
        t.grad = None


@pytest.mark.works("Compilation", "compiled autograd, of compiled modules and of modules as they are")
@pytest.mark.parametrize("whole", [True, False], ids=["compiled", "eager"])
def test_modules(whole):
    model = nn.Sequential(fnn.Conv2d(3, 4, 3, activation="relu"), nn.Flatten(2), fnn.GRU(36, 8, batch_first=True))
    attend, out = fnn.MultiheadAttention(8, 2, batch_first=True), fnn.Linear(8, 2, activation="gelu")
    x = torch.randn(2, 3, 8, 8)

    def loss():
        y, _ = model(x)
        return out(attend(y, y, y, need_weights=False)[0]).square().mean()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True) if whole else loss
    gradients_agree(compiled, [*model.parameters(), *attend.parameters(), *out.parameters()], loss)
    assert counters["compiled_autograd"]["captures"] == 1


def test_arguments_of_the_nodes():
    """What the nodes keep beside tensors: geometry, activation, scale, window, a seed, sizes of a packed sequence."""
    lstm, gru = fnn.LSTM(4, 4), fnn.GRU(4, 4)
    x, w, image, kernel = leaf(2, 5, 4), leaf(4, 4), leaf(2, 3, 7, 7), leaf(4, 3, 3, 3)
    heads, mask, steps = leaf(2, 2, 5, 4), leaf(5, 5), leaf(6, 4)

    def forward():
        attended, lse = FF.scaled_dot_product_attention(heads, heads, heads, mask, scale=0.3, return_lse=True)
        near = FF.scaled_dot_product_attention(heads, heads, heads, None, 0.25, True, window=(2, 0), softcap=5.0)
        sequence = nn.utils.rnn.PackedSequence(steps, torch.tensor([2, 2, 1, 1]))
        results = (
            *(attended, lse, near, *attention_weights(heads, heads, heads, average=True)),
            FF.linear(x, w, activation="leaky_relu"),
            FF.conv2d(image, kernel, None, 2, (1, 0), activation="silu"),
            lstm(sequence)[0].data,
            gru(x)[1],  # the last state alone
        )
        return sum(t.square().sum() for t in results)

    gradients_agree(forward, [x, w, image, kernel, heads, mask, steps, *lstm.parameters(), *gru.parameters()])


def test_a_second_batch_and_a_frozen_weight():
    w = leaf(4, 4)
    for batch in (3, 5):
        x = leaf(batch, 4)
        gradients_agree(lambda x=x: FF.linear(x, w.detach(), activation="gelu").square().sum(), [x], dynamic=True)
        gradients_agree(lambda x=x: FF.linear(x, w, activation="gelu").square().sum(), [x, w], dynamic=True)
    assert counters["compiled_autograd"]["captures"] <= 4
