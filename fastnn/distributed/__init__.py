"""More than one process, on torch.distributed: attention over a ring of sequence shards, and DTensor's way through the ops.

Every wrapper of torch works on fastnn's modules as it is (DistributedDataParallel, fully_shard, parallelize_module,
pipeline stages): there is nothing to call here for them.
"""

from fastnn.distributed.ring import ring_attention, shard_positions

__all__ = ["ring_attention", "shard_positions"]
