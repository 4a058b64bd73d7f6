"""What spreads a model of torch over processes spreads one of fastnn: four of them, against torch's model in one.

The checks are in tests/distributed; one start of four processes runs all of them.
"""

import re
from pathlib import Path

import pytest

from tests.distributed.launch import ROOT, assert_passed, torchrun


@pytest.mark.works("Distributed", "`DistributedDataParallel`, with `no_sync` and `Join`")
def test_distributed_data_parallel():
    assert_passed(
        "distributed_data_parallel",
        "distributed_data_parallel_accumulates_under_no_sync",
        "distributed_data_parallel_with_uneven_inputs",
    )


@pytest.mark.works("Distributed", "FSDP2 (`fully_shard`), with replicas, with mixed precision")
def test_fully_sharded_data_parallel():
    assert_passed(
        "fully_sharded_data_parallel",
        "fully_sharded_data_parallel_with_replicas",
        "fully_sharded_data_parallel_in_mixed_precision",
    )


@pytest.mark.works("Distributed", "`torch.distributed.checkpoint`: saved sharded, loaded into torch's model")
def test_sharded_checkpoint():
    assert_passed("a_sharded_checkpoint_loads_into_torchs_model")


@pytest.mark.works("Distributed", "tensor parallelism: `ColwiseParallel`, `RowwiseParallel`, activations fused")
def test_tensor_parallel():
    assert_passed(
        "tensor_parallel",
        "tensor_parallel_of_an_accelerated_model",
        "tensor_parallel_with_dtensors_between_the_layers",
        "tensor_parallel_fuses_the_activation",
        "tensor_parallel_of_frozen_layers",
    )


@pytest.mark.works("Distributed", "tensor parallelism: `SequenceParallel`")
def test_sequence_parallel():
    assert_passed("sequence_parallel")


@pytest.mark.works("Distributed", "FSDP2 and tensor parallelism on a mesh of two dimensions")
def test_sharded_weights_of_a_tensor_parallel_model():
    assert_passed("sharded_weights_of_a_tensor_parallel_model")


@pytest.mark.works("Distributed", "pipeline stages: `ScheduleGPipe`, `Schedule1F1B`")
def test_pipeline():
    assert_passed("pipeline")


@pytest.mark.parametrize("processes", [2, 4])
def test_the_example_loses_the_same_in_every_way(processes):
    """The first and last loss of each way are those of a process that trains alone, and losses fall."""
    script = ROOT / "examples" / "distributed" / "train.py"
    output = torchrun(processes, Path(script), "--steps", "8", seconds=240)
    table = {
        way: (float(first), float(last))
        for way, first, last in re.findall(r"(\w+) +(\d+\.\d+) +(\d+\.\d+) .* s", output)
    }
    assert set(table) == {"single", "ddp", "fsdp", "tp", "cp", "pp"}, output
    first, last = table["single"]
    assert last < first - 0.5
    for way in table:
        assert table[way] == pytest.approx((first, last), abs=2e-4), output
