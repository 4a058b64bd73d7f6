"""ring_attention on four processes and on two, against torch's attention over the whole sequence in one."""

import pytest

from tests.distributed.launch import assert_passed


@pytest.mark.works("Distributed", "context parallelism: `fastnn.distributed.ring_attention`, also causal, zigzag, GQA")
def test_it_gives_what_one_process_gives():
    assert_passed("the_ring_gives_what_one_process_gives", "the_ring_has_other_keys_than_queries_and_a_soft_cap")


@pytest.mark.works("Distributed", "context parallelism with masks of padding, biases that train, and dropout")
def test_masks_and_dropout():
    assert_passed("the_ring_takes_masks", "the_ring_drops_weights")


def test_second_derivatives_are_refused():
    assert_passed("the_ring_refuses_second_derivatives")


def test_lower_precision():
    assert_passed("the_ring_is_as_exact_as_torch_in_lower_precision")


def test_errors():
    assert_passed("the_ring_says_what_is_wrong")


def test_shard_positions():
    assert_passed("the_shards_are_the_sequence")
