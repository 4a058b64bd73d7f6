"""fastnn::rnn on weights that rnn_pack packed before: the same sums, and what may not be taken for packed weights."""

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

from fastnn import functional, reference, testing
from tests.test_rnn import DTYPES, KINDS, check, layer, leaves, modules, packs, tensors, to


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", testing.available_isas())
@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights(kind, isa, dtype):
    """Panels made before, in each dtype: the right result, and nothing but the panels is read."""
    torch.manual_seed(0)
    with testing.forced_isa(isa):
        for steps, batch, inputs, hidden, directions, bias in (
            (1, 1, 5, 7, 1, True),
            (1, 3, 17, 33, 2, True),
            (1, 45, 3, 16, 1, False),
            (4, 1, 9, 8, 2, False),
            (7, 5, 1, 31, 2, True),
            (40, 2, 33, 17, 1, True),
        ):
            args = layer(kind, steps, batch, inputs, hidden, dtype, directions, bias)
            check(args)
            unread = (*args[:4], [torch.full_like(w, torch.nan) for w in args[4]], args[5])
            expected = torch.ops.fastnn.rnn(*args, packs(args))
            for y, z in zip(torch.ops.fastnn.rnn(*unread, packs(args)), expected, strict=True):
                assert torch.equal(y, z)
        x, _, hx, cx, weights, mode = layer(kind, 1, 3, 6, 9, dtype)  # one step of a cell
        cell = (x[0], None, hx[0], None if cx is None else cx[0], weights, mode)
        for y, z in zip(torch.ops.fastnn.rnn(*cell, packs(cell)), reference.rnn(*to(cell, torch.float64)), strict=True):
            testing.assert_close_to_oracle(y, z, torch.ones(()) + z.abs(), c=16.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind, hidden", (("RNN_TANH", 2048), ("GRU", 900)))
def test_frozen_weights_that_no_cache_holds(kind, hidden, dtype):
    """One or two long rows meet the matrix itself, though it came packed; more or shorter ones the panels."""
    torch.manual_seed(0)
    whole = layer(kind, 3, 3, 1030, hidden, dtype)
    packed = packs(whole)
    for steps, batch in ((1, 1), (1, 2), (1, 3), (3, 1)):
        args = (whole[0][:steps, :batch], None, whole[2][:, :batch], *whole[3:])
        runs = []
        for count in (1, 2):
            with testing.threads(count):
                runs.append(torch.ops.fastnn.rnn(*args, packed))
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
        exact = to(args, torch.float64)
        x, _, hx, _, (w_ih, w_hh, b_ih, b_hh), _ = exact
        magnitude = (
            (x.abs() @ w_ih.abs().t()).max() + (hx.abs() @ w_hh.abs().t()).max() + (b_ih.abs() + b_hh.abs()).max()
        )
        stock = reference.rnn(*args) if dtype not in testing.HALF_DTYPES else (None,) * 3
        for y, z, theirs in zip(runs[0], reference.rnn(*exact), stock, strict=True):
            testing.assert_close_to_oracle(y, z, magnitude, theirs)


def test_packed_weights_of_sequences_of_different_lengths():
    for kind in KINDS:
        torch.manual_seed(0)
        x, _, hx, cx, weights, mode = layer(kind, 6, 4, 5, 18, torch.float32, 2)
        sequence = pack_padded_sequence(x, [6, 4, 4, 1])
        check((sequence.data, sequence.batch_sizes, hx, cx, weights, mode))


def test_gradients_come_from_the_weights():
    """Where a gradient is wanted, what packed holds does not matter."""
    for kind in KINDS:
        args = layer(kind, 3, 2, 4, 5, torch.float64, 2)
        for t in leaves(args):
            t.requires_grad_()
        junk = [torch.full_like(t, torch.nan) for t in packs(to(args, torch.float64))]
        found = [torch.ops.fastnn.rnn(*args, packed) for packed in (None, junk)]
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)
        grads = [torch.autograd.grad(ys[0].sum(), leaves(args), create_graph=True) for ys in found]
        second = [torch.autograd.grad(sum(g.square().sum() for g in gs), leaves(args)) for gs in grads]
        for a, b in zip((*grads[0], *second[0]), (*grads[1], *second[1]), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_on_any_number_of_threads(kind):
    torch.manual_seed(0)
    _, own = modules(kind, 24, 130, bidirectional=True)
    x = pack_sequence([torch.randn(n, 24) for n in (9, 9, 8, 5, 5, 5, 4, 2, 2, 1)])
    with testing.threads(1):
        one = tensors(own(x))
    for count in (2, 3):
        with testing.threads(count):
            assert all(torch.equal(a, b) for a, b in zip(one, tensors(own(x)), strict=True))


def test_errors_of_packed_weights():
    args = layer("LSTM_PROJ", 3, 2, 4, 5, directions=2)
    good = packs(args)
    assert torch.equal(torch.ops.fastnn.rnn(*args, [])[0], torch.ops.fastnn.rnn(*args)[0])
    for packed in (good[:1], good + good[:1], [good[0], good[1][:-1]], [t.double() for t in good]):
        with pytest.raises(RuntimeError, match=r"fastnn\.rnn: packed must"):
            torch.ops.fastnn.rnn(*args, packed)
    with pytest.raises(RuntimeError, match="packed must be what rnn_pack made"):
        torch.ops.fastnn.rnn(*args, [t.repeat_interleave(2)[::2] for t in good])
    with pytest.raises(TypeError, match="packed must be a Tensor"):
        functional.rnn_tanh_cell(torch.zeros(1, 4), torch.zeros(1, 5), torch.zeros(5, 4), torch.zeros(5, 5), packed=1)
    weights, mode = args[4][:5], args[5]
    with pytest.raises(ValueError, match="mode must be one of"):
        torch.ops.fastnn.rnn_pack(weights, "ELU")
    for wrong in (
        weights[:1],
        [w.long() for w in weights],
        [*weights[:4], weights[4].T],
        [*weights[1:], weights[0]],
    ):
        with pytest.raises(RuntimeError, match=r"fastnn\.rnn"):
            torch.ops.fastnn.rnn_pack(wrong, mode)
