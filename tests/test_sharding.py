"""The ops on DTensor's shards: what they give, forward and backward, and where it lies, against whole tensors of torch."""

import pytest

from tests.distributed.launch import assert_passed


@pytest.mark.works("Distributed", "DTensor: `linear` on shards of batch, features or both")
def test_linear():
    assert_passed("linear_on_shards", "linear_on_a_mesh_of_two_dimensions")


@pytest.mark.works("Distributed", "DTensor: attention on shards of batch, heads or queries")
def test_attention():
    assert_passed("attention_on_shards", "attention_with_a_mask_on_shards", "grouped_heads_on_a_mesh_of_two_dimensions")


def test_attention_weights():
    assert_passed("attention_weights_on_shards")


@pytest.mark.works("Distributed", "DTensor: `conv2d` on shards of batch or channels")
def test_conv2d():
    assert_passed("conv2d_on_shards")


def test_the_rules_are_there_when_a_dtensor_comes_and_not_before():
    assert_passed(
        "importing_fastnn_leaves_dtensor_alone", "the_rules_are_known_to_a_compiled_function_that_comes_first"
    )
