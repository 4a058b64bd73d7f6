"""Gradients of conv2d whose activation's derivative is taken in bands: exact, and the same on any number of threads."""

import pytest
import torch
import torch.nn.functional as F

from fastnn import testing
from fastnn.functional import conv2d
from tests.test_conv2d import ISAS, LAYOUTS, direct_sums, forced, make

# More than 2 MiB of grad_output, so that its activation's derivative is taken in bands: of images, of rows (with strides,
# dilations and padding past the window, whose halos differ), of groups, and of images and groups.
BANDS = [
    ((9, 8, 31, 30), 72, 3, 1, 1, 1, 1),
    ((1, 5, 131, 127), 40, 3, 1, 1, 1, 1),
    ((1, 4, 262, 259), 33, (5, 3), 2, (1, 0), 1, 1),
    ((2, 3, 120, 125), 40, (3, 2), 1, (9, 1), (4, 1), 1),
    ((1, 20, 190, 150), 20, 1, 1, 0, 1, 1),
    ((1, 3, 400, 397), 64, 2, 4, 0, 1, 1),
    ((1, 24, 160, 150), 24, 3, 1, 1, 1, 24),
    ((2, 24, 170, 165), 48, 3, 1, 2, 2, 3),
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_in_bands_are_exact(isa, layout):
    """Whole numbers, relu, each gradient also alone; float32 by the rule, and in turn bfloat16 and direct."""
    for i, (size, k, kernel, *geometry) in enumerate(BANDS):
        for dtype, algorithm in ((torch.float32, None), ((torch.bfloat16, None), (torch.float32, "direct"))[i % 2]):
            draw = lambda *a, **o: testing.integers(*a, -1, 1, **o)  # noqa: E731
            x, w, b = (t.requires_grad_() for t in make(*size, k, kernel, geometry[-1], dtype, layout, draw=draw))
            with forced(isa, algorithm), direct_sums():
                y = conv2d(x, w, b, *geometry, activation="relu")
                grad = testing.integers(y.shape, dtype, -1, 1)
                ours = torch.autograd.grad(y, (x, w, b), grad, retain_graph=True)
                alone = [torch.autograd.grad(y, one, grad, retain_graph=True)[0] for one in (x, w, b)]
            double = [t.detach().double().requires_grad_() for t in (x, w, b)]
            want = torch.autograd.grad(F.conv2d(*double, *geometry).relu(), double, grad.double())
            for what, one, other, exact in zip("xwb", ours, alone, want, strict=True):
                title = (isa, layout, dtype, algorithm, size, what)
                assert torch.equal(one, exact.to(dtype)), title
                assert torch.equal(one, other), title


@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_change_no_bit(layout):
    for size, k, kernel, *geometry in BANDS:
        x, w, b = (t.requires_grad_() for t in make(*size, k, kernel, geometry[-1], layout=layout))
        results = []
        for count in (1, 2, 3):
            with testing.threads(count):
                y = conv2d(x, w, b, *geometry, activation="gelu")
                results.append(torch.autograd.grad(y.square().sum(), (x, w, b)))
        for result in results[1:]:
            assert all(torch.equal(one, other) for one, other in zip(results[0], result, strict=True)), (size, k)
