"""The lists of problems: enough of them, of many models, each under its own name."""

import pytest

from fastnn import cases, reference


@pytest.mark.parametrize("family, least", [("LINEAR", 30), ("CONV2D", 40)])
def test_the_problems_of_a_family(family, least):
    problems = getattr(cases, family)
    names = [case.name for case in problems]
    assert len(set(names)) == len(names) >= least
    assert len({name.split(".")[0] for name in names}) >= 12, "many models"
    assert {case.activation for case in problems} <= set(reference.ACTIVATIONS)


def test_awkward_sizes_are_among_them():
    rows = {case.rows for case in cases.LINEAR}
    assert {1, 3, 7} <= rows and {7, 10, 1000} <= {case.out_features for case in cases.LINEAR}
    assert any(case.in_features % 8 and case.out_features % 8 for case in cases.LINEAR)
    assert {1, 3, 7} <= {case.batch for case in cases.CONV2D}
    kernels = {(case.kernel[0], case.stride) for case in cases.CONV2D}
    assert {(1, 1), (1, 2), (3, 1), (3, 2), (5, 1), (7, 1), (7, 2), (16, 16)} <= kernels
    assert {1, 2, 12} <= {case.dilation for case in cases.CONV2D}
    assert any(1 < case.groups < case.channels for case in cases.CONV2D)
