"""fastnn/reference.py against torch in float64: the oracle of the other tests is itself tested."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastnn import reference


def draw(*shape, requires_grad=True):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=requires_grad)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", [name for name in reference.ACTIVATIONS if name])
def test_activations_are_torchs_with_its_default_parameters(activation):
    x = torch.linspace(-6, 8, 101, dtype=torch.float64)
    name, options = ("gelu", {"approximate": "tanh"}) if activation == "gelu_tanh" else (activation, {})
    close(reference.activate(x, activation), getattr(F, name)(x, **options))


def test_an_unknown_activation_is_a_value_error():
    with pytest.raises(ValueError, match="activation must be None or one of relu, .*; got 'step'"):
        reference.activate(torch.zeros(1), "step")


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 0, 7), (2, 3, 7)])
def test_linear(shape):
    x, w, b = draw(*shape), draw(5, 7), draw(5)
    close(reference.linear(x, w, b), F.linear(x, w, b))
    close(reference.linear(x, w[0]), F.linear(x, w[0]))
    close(reference.linear(x, w, None, "silu"), F.silu(F.linear(x, w)))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride, dilation", [((1, 1), (1, 1)), ((2, 3), (1, 2))])
def test_conv2d(groups, stride, dilation):
    x, w, b = draw(2, 4, 11, 9), draw(6, 4 // groups, 3, 2), draw(6)
    padded = F.pad(x, (0, 3, 1, 2))
    expected = F.conv2d(padded, w, b, stride, 0, dilation, groups)
    close(reference.conv2d(x, w, b, stride, (1, 2, 0, 3), dilation, groups), expected)
    close(reference.conv2d(x[0], w, None, stride, (1, 2, 0, 3), dilation, groups, "relu"),
          (expected - b[:, None, None]).relu()[0])  # fmt: skip


@pytest.mark.parametrize("mask", [None, "bool", "additive"])
@pytest.mark.parametrize("causal", [False, True])
def test_attention(mask, causal):
    if mask and causal:
        pytest.skip("torch takes one or the other")
    q, k, v = draw(2, 4, 5, 8), draw(2, 2, 7, 8), draw(2, 2, 7, 6)
    given = {None: None, "bool": torch.rand(5, 7) > 0.3, "additive": draw(2, 1, 5, 7)}[mask]
    expected = F.scaled_dot_product_attention(q, k, v, given, is_causal=causal, enable_gqa=True)
    output, lse = reference.attention(q, k, v, given, is_causal=causal, enable_gqa=True)
    close(output, expected)
    assert lse.shape == q.shape[:-1] and lse.isfinite().all()


def test_attention_window_is_a_mask_aligned_to_the_last_position_and_the_cap_is_tanh():
    q, k, v = draw(1, 1, 3, 4), draw(1, 1, 5, 4), draw(1, 1, 5, 4)
    position = torch.arange(3)[:, None] + 2
    mask = (torch.arange(5) >= position - 1) & (torch.arange(5) <= position)
    close(reference.attention(q, k, v, window=(1, 0))[0], F.scaled_dot_product_attention(q, k, v, mask))
    scores = 2 * torch.tanh(q @ k.transpose(-1, -2) / 2 / 2)
    output, lse = reference.attention(q, k, v, softcap=2.0)
    close(output, scores.softmax(-1) @ v)
    close(lse, scores.logsumexp(-1))


def test_a_row_that_sees_nothing_is_zero_and_its_gradient_is_finite():
    q, k, v = draw(1, 1, 2, 4), draw(1, 1, 3, 4), draw(1, 1, 3, 4)
    output, lse = reference.attention(q, k, v, torch.tensor([[True] * 3, [False] * 3]))
    assert output[0, 0, 1].eq(0).all() and lse[0, 0, 1] == -math.inf
    assert all(g.isfinite().all() for g in torch.autograd.grad(output.sum(), (q, k, v)))


def test_dropout_words_are_philox():
    """The published known answer of Philox4x32-10 for counter 0 and key 0 decides keys 0, 8, 16 and 24 of row 0."""
    for key, word in ((0, 0x6627E8D5), (8, 0xE169C58D), (16, 0xBC57AC4C), (24, 0x9B00DBD8)):
        for offset, kept in ((-0.5, True), (2, False)):
            mask = reference.attention_dropout_mask(torch.tensor([0]), (word + offset) / 2**32, (1, 1, 32))
            assert bool(mask[0, 0, key]) == kept


def test_dropout_keeps_its_share():
    mask = reference.attention_dropout_mask(torch.tensor([1234567890123]), 0.25, (4, 64, 512))
    assert abs(mask.double().mean().item() - 0.75) < 0.01


@pytest.mark.parametrize("kind", ["RNN_TANH", "RNN_RELU", "GRU", "LSTM"])
@pytest.mark.parametrize("directions", [1, 2])
def test_rnn(kind, directions):
    name, options = (kind, {}) if kind in ("GRU", "LSTM") else ("RNN", {"nonlinearity": kind[4:].lower()})
    module = getattr(torch.nn, name)(3, 5, bidirectional=directions == 2, dtype=torch.float64, **options)
    x, h, c = draw(6, 4, 3), draw(directions, 4, 5), draw(directions, 4, 5)
    lstm = kind == "LSTM"
    expected, state = module(x, (h, c) if lstm else h)
    output, h_n, c_n = reference.rnn(x, None, h, c if lstm else None, list(module.parameters()), kind)
    close(output, expected)
    close(h_n, state[0] if lstm else state)
    if lstm:
        close(c_n, state[1])


def test_rnn_of_a_packed_sequence():
    module = torch.nn.LSTM(3, 5, proj_size=2, bidirectional=True, dtype=torch.float64)
    sequences = [draw(length, 3, requires_grad=False) for length in (6, 4, 4, 1)]
    packed = torch.nn.utils.rnn.pack_sequence(sequences)
    h, c = draw(2, 4, 2), draw(2, 4, 5)
    expected, (h_n, c_n) = module(packed, (h, c))
    output, h_own, c_own = reference.rnn(packed.data, packed.batch_sizes, h, c, list(module.parameters()), "LSTM")
    close(output, expected.data)
    close(h_own, h_n)
    close(c_own, c_n)


@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, True), (False, True, False)])
def test_vjp_of_vjp_is_autograds_double_backward(wanted):
    def f(x, w, b):
        y = torch.tanh(x @ w.T + b)
        return y, (y * x.sum()).sum(0)

    x, w, b = draw(4, 3), draw(5, 3), draw(5)
    gs = draw(4, 5), draw(5)
    first = torch.autograd.grad(f(x, w, b), (x, w, b), gs, create_graph=True)
    grad_grads = [draw(*g.shape, requires_grad=False) if want else None for g, want in zip(first, wanted, strict=True)]
    pairs = [(g, gg) for g, gg in zip(first, grad_grads, strict=True) if gg is not None]
    expected = torch.autograd.grad([g for g, _ in pairs], (*gs, x, w, b), [gg for _, gg in pairs], allow_unused=True)
    for_gs, for_inputs = reference.vjp_of_vjp(f, (x, w, b), gs, wanted, grad_grads)
    for actual, right in zip((*for_gs, *for_inputs), expected, strict=True):
        assert (actual is None) == (right is None)
        if right is not None:
            close(actual, right)


def test_vjp_of_vjp_takes_absent_inputs_and_functions_without_a_second_derivative():
    x, g = draw(4), draw(4)
    for_gs, for_inputs = reference.vjp_of_vjp(
        lambda x, b: x * 2, (x, None), (g,), (True, False), (torch.ones(4).double(), None)
    )
    close(for_gs[0], torch.full((4,), 2.0, dtype=torch.float64))
    assert for_inputs[1] is None
    assert for_inputs[0] is None or not for_inputs[0].any()
