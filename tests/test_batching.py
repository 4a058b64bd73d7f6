"""vmap over every op: a batch of calls is one call, and gives what the calls give."""

import pytest
import torch
from torch.func import grad, hessian, jacfwd, vmap

from fastnn import functional, reference
from tests.test_transforms import CASES, MAPPED, batches, each, everything, loss, own_kernels, randn, states_and_weights  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.usefixtures("own_kernels")
@pytest.mark.works("Transforms", "vmap over every op, per-sample gradients, ensembles: any tensor may have the batch")
@pytest.mark.parametrize("transform", MAPPED)
@pytest.mark.parametrize("name", CASES)
def test_vmap(name, transform):
    (own, stock), make = CASES[name]
    for dims, tensors in batches(make()):
        found = vmap(MAPPED[transform](own, tensors), dims)(*tensors)
        expected = each(MAPPED[transform](stock, tensors), dims, tensors)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, msg=lambda m, dims=dims: f"{dims}: {m}")


@pytest.mark.usefixtures("own_kernels")
@pytest.mark.parametrize("name", ("linear-gelu", "conv2d", "attention-mask", "rnn-packed"))
def test_transforms_nest(name):
    """grad of vmap, vmap of vmap over different tensors and places, vmap of hessian."""
    (own, stock), make = CASES[name]
    tensors = make()
    one = tuple(torch.stack([t, t.cos()], -1) if i == 0 else t for i, t in enumerate(tensors))
    two = tuple(torch.stack([t, t.sin()]) if i in (0, 2) else t for i, t in enumerate(one))
    inner = (-1, *[None] * (len(tensors) - 1))
    outer = tuple(0 if i in (0, 2) else None for i in range(len(tensors)))
    nests = [
        lambda f: grad(loss(vmap(f, inner, out_dims=1)), everything(one))(*one),
        lambda f: vmap(vmap(f, inner), outer)(*two),
        lambda f: vmap(hessian(loss(f), (0, 2)), inner)(*one),
        lambda f: jacfwd(vmap(grad(loss(f), (0, 2)), inner), (0, 2))(*one),
    ]
    for nest in nests:
        torch.testing.assert_close(nest(own), nest(stock), rtol=1e-9, atol=1e-9)


@pytest.mark.works("Transforms", "torch.autograd.functional.jacobian and hessian, vectorized")
@pytest.mark.filterwarnings("error:There is a performance drop")
def test_vectorized_jacobians_of_autograd():
    for name in ("linear-gelu", "conv2d", "attention", "lstm", "rnn-packed"):
        (own, stock), make = CASES[name]
        tensors = make()
        found = torch.autograd.functional.jacobian(own, tensors, vectorize=True)
        expected = torch.autograd.functional.jacobian(stock, tensors)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("average", (False, True))
@pytest.mark.works(
    "Transforms", "randomness of vmap: the mask of attention's dropout is an error, the same or different"
)
def test_dropout_under_vmap(average):
    query, key, value = (torch.stack([t] * 3) for t in CASES["attention"][1]())

    def attend(query, key, value):
        if average:
            return functional.attention_weights(query, key, value, dropout_p=0.5, average=True)[0]
        return functional.scaled_dot_product_attention(query, key, value, dropout_p=0.5)

    with pytest.raises(RuntimeError, match="randomness"):
        vmap(attend)(query, key, value)
    same, different = (vmap(attend, randomness=how)(query, key, value) for how in ("same", "different"))
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
    assert not torch.equal(different[0], different[1]) and not torch.equal(different[1], different[2])
    for how in ("same", "different"):  # each sample's gradient is that of its own mask
        torch.manual_seed(3)
        seeds = vmap(lambda _: torch.randint(2**63 - 1, (1,)), randomness=how)(query)
        torch.manual_seed(3)
        found = vmap(grad(lambda q, *a: attend(q, *a).sin().sum()), randomness=how)(query, key, value)
        for i in range(3):
            formula = lambda q: reference.attention(q, key[0], value[0], None, 0.5, philox_seed=seeds[i])[0]  # noqa: E731
            torch.testing.assert_close(found[i], grad(loss(formula))(query[0]))


def test_the_ops_themselves_under_vmap():
    """As a compiled graph calls them: below the Functions of Python."""
    ops = torch.ops.fastnn
    x, w, b = randn(3, 2, 4), randn(5, 4), randn(3, 5)
    calls = [
        (ops.linear, (0, None, 0), (x, w, b)),
        (
            lambda x, w: ops.conv2d(x, w, None, [1, 1], [0] * 4, [1, 1], 1),
            (0, 1),
            (randn(3, 2, 2, 4, 4), randn(2, 3, 2, 2, 2)),
        ),
        (ops.attention, (0, None, 1), (randn(3, 2, 4, 2), randn(2, 3, 2), randn(2, 3, 3, 2))),
        (ops.attention_weights, (None, 0, None), (randn(2, 4, 2), randn(3, 2, 3, 2), randn(2, 3, 2))),
        (
            lambda x, h, *w: ops.rnn(x, None, h, None, w, "GRU")[:2],
            (2, None, None, None, None, None),
            (randn(2, 2, 3, 2), *states_and_weights("GRU", 2, 2, 2)),
        ),
    ]
    for op, dims, tensors in calls:
        torch.testing.assert_close(vmap(op, dims)(*tensors), each(op, dims, tensors))
