"""The lists of problems: enough of them, of many models, each under its own name."""

import pytest
import torch

from fastnn import cases, reference, testing


@pytest.mark.parametrize("family, least", [("LINEAR", 30), ("CONV2D", 40), ("RNN", 25), ("ATTENTION", 25)])
def test_the_problems_of_a_family(family, least):
    problems = getattr(cases, family)
    names = [case.name for case in problems]
    assert len(set(names)) == len(names) >= least
    assert len({name.split(".")[0] for name in names}) >= 12, "many models"
    if family in ("LINEAR", "CONV2D"):
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
    for kind in ("rnn", "gru", "lstm"):
        mine = [case for case in cases.RNN if case.kind.startswith(kind)]
        assert {1, 8, 64} <= {case.batch for case in mine if not case.time}, "cells"
        assert {1, 3, 7} & {case.batch for case in mine if case.time}
    assert {True, False} == {case.bidirectional for case in cases.RNN} and any(case.proj_size for case in cases.RNN)
    assert {case.mask for case in cases.ATTENTION} == {None, "bool", "additive", "bias"}
    assert {32, 40, 64, 128, 256} <= {case.head_dim for case in cases.ATTENTION}
    assert {1, 8} <= {case.queries for case in cases.ATTENTION}, "decoders"
    for what in ("causal", "window", "softcap", "kv_heads", "value_dim"):
        assert any(getattr(case, what) for case in cases.ATTENTION), what


def test_what_a_query_sees():
    def rows(**options):
        case = cases.AttentionCase("", 1, 1, 2, 4, 8, **options)
        return ["".join("01"[cell] for cell in row) for row in testing.seen(case).int()]

    assert testing.seen(cases.AttentionCase("", 1, 1, 2, 4, 8)) is None
    assert rows(causal=True) == ["1000", "1100"]
    assert rows(window=(-1, 0)) == ["1110", "1111"]
    assert rows(window=(1, 0)) == ["0110", "0011"]
    assert rows(window=(0, -1), causal=True) == ["0000", "0000"]
    assert testing.seen(cases.AttentionCase("", 1, 1, 9, 4, 8, window=(-1, -1))).all()
    windowed = cases.AttentionCase("", 1, 1, 4, 6, 8, window=(2, 0))
    assert torch.equal(testing.seen(windowed, torch.tensor([3, 1])), testing.seen(windowed)[[3, 1]])
