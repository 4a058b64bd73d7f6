"""Recurrent layers and cells on DTensor's shards of the batch, against torch's on the whole."""

import pytest

from tests.distributed.launch import assert_passed


@pytest.mark.works("Distributed", "DTensor: `RNN`, `GRU`, `LSTM` and their cells on shards of the batch")
def test_layers_and_cells():
    assert_passed("recurrent_layers_on_shards", "recurrent_cells_on_shards")
