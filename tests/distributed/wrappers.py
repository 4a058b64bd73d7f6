"""Checks that what spreads a model of torch spreads one of fastnn: DDP, FSDP2, tensor parallelism, pipelines."""

import copy
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import fastnn
from tests.distributed.strategies import mesh


class Families(nn.Module):
    """A module of each family, of torch.nn: images to rows of features to a class."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True)
        self.recurrent = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))

    def forward(self, x):
        x = F.relu(self.conv(x)).mean(-1).transpose(1, 2)
        return self.head(self.recurrent(self.encoder(x))[0])


def twins(dtype=torch.float64):
    """A model of torch's modules, and a copy with weights of its own whose modules are fastnn's."""
    torch.manual_seed(1)
    stock = Families().to(dtype)
    fast = fastnn.accelerate(copy.deepcopy(stock), inplace=True)
    assert all(
        row.served for row in fastnn.explain(fast) if row.kind in ("Linear", "Conv2d", "GRU", "MultiheadAttention")
    )
    return stock, fast


def batch(rows=8, dtype=torch.float64):
    return torch.randn(rows, 3, 6, 6, dtype=dtype)


def own(x):
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def whole(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def assert_same_grads(fast, stock, **tolerance):
    grads = {name: p.grad for name, p in stock.named_parameters()}
    found = {name.removeprefix("module."): whole(p.grad) for name, p in fast.named_parameters()}
    torch.testing.assert_close(found, grads, **tolerance)


def distributed_data_parallel():
    stock, fast = twins()
    fast, x = DistributedDataParallel(fast), batch()
    want, found = stock(x), fast(own(x))
    torch.testing.assert_close(found, own(want))
    want.square().mean().backward(), found.square().mean().backward()
    assert_same_grads(fast, stock)


def distributed_data_parallel_accumulates_under_no_sync():
    stock, fast = twins()
    fast, x = DistributedDataParallel(fast), batch(16)
    stock(x).square().mean().backward()
    first, second = own(x).chunk(2)
    with fast.no_sync():
        fast(first).square().mean().div(2).backward()
    fast(second).square().mean().div(2).backward()
    assert_same_grads(fast, stock)


def distributed_data_parallel_with_uneven_inputs():
    """Process r has r + 1 batches; to the last step only the last brings one, and DDP divides by their number as ever."""
    stock, fast = twins()
    fast, x = DistributedDataParallel(fast), batch(2)
    with Join([fast]):
        for _ in range(dist.get_rank() + 1):
            fast.zero_grad()
            fast(x).square().mean().backward()
    stock(x).square().mean().div(dist.get_world_size()).backward()
    if dist.get_rank() == dist.get_world_size() - 1:
        assert_same_grads(fast, stock)


def sharded(model, **options):
    for layer in (model.conv, model.encoder, model.recurrent, model.head):
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def fully_sharded_data_parallel():
    """FSDP2: forward, gradients, a step of the optimizer, and what is saved loads into torch's model."""
    stock, fast = twins()
    sharded(fast, mesh=mesh())
    assert all(isinstance(p, DTensor) for p in fast.parameters())
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in (stock, fast)]
    for _ in range(2):
        x = batch()
        want, found = stock(x), fast(own(x))
        torch.testing.assert_close(found, own(want))
        want.square().mean().backward(), found.square().mean().backward()
        assert_same_grads(fast, stock)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    state = get_model_state_dict(fast, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        torch.testing.assert_close(state, stock.state_dict())
        stock.load_state_dict(state)


def fully_sharded_data_parallel_with_replicas():
    stock, fast = twins()
    sharded(fast, mesh=init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicas", "shards")))
    x = batch()
    stock(x).square().mean().backward(), fast(own(x)).square().mean().backward()
    assert_same_grads(fast, stock)


def fully_sharded_data_parallel_in_mixed_precision():
    """Computes in bfloat16 from float32 weights; as exact as torch's modules under the same policy."""
    stock, fast = twins(torch.float32)
    exact, policy = copy.deepcopy(stock).double(), MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    x = batch(dtype=torch.float32)
    exact(x.double()).square().mean().backward()
    errors = []
    for model in (stock, fast):
        sharded(model, mesh=mesh(), mp_policy=policy)
        output = model(own(x))
        assert output.dtype == torch.bfloat16
        output.float().square().mean().backward()
        grads = {name: whole(p.grad) for name, p in model.named_parameters()}
        assert all(grad.dtype == torch.float32 for grad in grads.values())
        distances = [(grads[name] - p.grad).norm() / p.grad.norm() for name, p in exact.named_parameters()]
        errors.append(torch.stack(distances).mean().item())
    assert 0 < errors[1] < 1.5 * errors[0], errors


def a_sharded_checkpoint_loads_into_torchs_model():
    stock, fast = twins()
    sharded(fast, mesh=mesh())
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    checkpoint.save(fast.state_dict(), checkpoint_id=folder[0])
    loaded = {name: torch.zeros_like(t) for name, t in stock.state_dict().items()}
    checkpoint.load(loaded, checkpoint_id=folder[0])
    torch.testing.assert_close(loaded, stock.state_dict(), rtol=0, atol=0)


class Block(nn.Module):
    """A transformer block with projections of its own; ``heads`` of 4 features. ``linear``: the class of its layers."""

    def __init__(self, linear=nn.Linear, attend=F.scaled_dot_product_attention, heads=4):
        super().__init__()
        width = 4 * heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (linear(width, width) for _ in range(4))
        self.up, self.act, self.down = linear(width, 32), nn.GELU(), linear(32, width)
        self.attend = attend

    def forward(self, x):
        h = self.norm1(x)
        q, k, v = (project(h).unflatten(-1, (-1, 4)).transpose(1, 2) for project in (self.query, self.key, self.value))
        x = x + self.out(self.attend(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
        return x + self.down(self.act(self.up(self.norm2(x))))


def blocks(linear=fastnn.nn.Linear):
    torch.manual_seed(1)
    stock = Block().double()
    fast = Block(linear, fastnn.functional.scaled_dot_product_attention).double()
    fast.load_state_dict(stock.state_dict())
    return stock, fast


def plan(columns=ColwiseParallel, rows=RowwiseParallel):
    return {name: columns() for name in ("query", "key", "value", "up")} | {name: rows() for name in ("out", "down")}


def assert_same_block(fast, stock, x, own=lambda t: t):
    want, found = stock(x), whole(fast(own(x)))
    torch.testing.assert_close(found, own(want))
    want.square().mean().backward(), found.square().mean().backward()
    assert_same_grads(fast, stock)


def tensor_parallel():
    stock, fast = blocks()
    parallelize_module(fast, mesh(), plan())
    assert fast.up.weight.placements == (Shard(0),) and fast.down.weight.placements == (Shard(1),)
    assert_same_block(fast, stock, torch.randn(2, 6, 16, dtype=torch.float64))


def tensor_parallel_of_an_accelerated_model():
    """Accelerated before and after it was parallelized."""
    for after in (False, True):
        stock, fast = blocks(nn.Linear)
        at = mesh()
        if after:
            fast = fastnn.accelerate(parallelize_module(fast, at, plan()), inplace=True)
        else:
            fast = parallelize_module(fastnn.accelerate(fast, inplace=True), at, plan())
        assert isinstance(fast.up, fastnn.nn.Linear) and isinstance(fast.up.weight, DTensor)
        assert_same_block(fast, stock, torch.randn(2, 6, 16, dtype=torch.float64))


def tensor_parallel_with_dtensors_between_the_layers():
    """Heads stay a DTensor from the projections through attention to the output."""
    stock, fast = blocks()
    placements = []

    def attend(q, k, v, is_causal):
        output = fastnn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        placements.append((q.placements, output.placements))
        return output

    fast.attend = attend
    parallelize_module(fast, mesh(), plan(lambda: ColwiseParallel(use_local_output=False)))
    assert_same_block(fast, stock, torch.randn(2, 6, 16, dtype=torch.float64))
    assert placements == [((Shard(1),), (Shard(1),))]


def tensor_parallel_fuses_the_activation():
    """What follows a sum over the processes waits for the sum."""
    torch.manual_seed(1)
    stock = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.ReLU()).double()
    up, down = fastnn.nn.Linear(8, 16, activation="gelu"), fastnn.nn.Linear(16, 8, activation="relu")
    fast = nn.Sequential(up, nn.Identity(), down).double()
    fast.load_state_dict(stock.state_dict())
    parallelize_module(fast, mesh(), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    assert_same_block(fast, stock, torch.randn(3, 8, dtype=torch.float64))


def sequence_parallel():
    """Norms and sums on shards of the positions, attention and the features between them on shards of the heads."""
    stock, fast = blocks()
    between = plan(rows=lambda: RowwiseParallel(output_layouts=Shard(1), use_local_output=False))
    between |= {name: ColwiseParallel(input_layouts=Shard(1)) for name in ("query", "key", "value", "up")}
    between |= {"norm1": SequenceParallel(), "norm2": SequenceParallel()}
    at = mesh()
    parallelize_module(fast, at, between)
    enter = PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),))
    parallelize_module(fast, at, enter)
    assert_same_block(fast, stock, torch.randn(2, 8, 16, dtype=torch.float64))


def tensor_parallel_of_frozen_layers():
    stock, fast = blocks()
    fastnn.freeze(fast)
    parallelize_module(fast, mesh(), plan())
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fast(x), stock(x))


def sharded_weights_of_a_tensor_parallel_model():
    """FSDP2 over one dimension of the mesh, tensor parallelism over the other."""
    stock, fast = blocks()
    at = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(fast, at["tensor"], plan())
    fully_shard(fast, mesh=at["data"])
    half = at["data"].get_local_rank()
    assert_same_block(fast, stock, torch.randn(4, 6, 16, dtype=torch.float64), lambda t: t.chunk(2)[half])


def pipeline():
    """A stage of accelerated modules on each process, by both schedules."""
    for schedule in (ScheduleGPipe, Schedule1F1B):
        torch.manual_seed(1)
        stock = nn.Sequential(
            nn.Linear(8, 16),
            nn.TransformerEncoderLayer(16, 2, 16, 0.0, batch_first=True),
            nn.TransformerEncoderLayer(16, 2, 16, 0.0, "gelu", batch_first=True),
            nn.Linear(16, 8),
        ).double()
        fast = fastnn.accelerate(copy.deepcopy(stock), inplace=True)
        x, target = torch.randn(8, 5, 8, dtype=torch.float64), torch.randn(8, 5, 8, dtype=torch.float64)
        rank, size = dist.get_rank(), dist.get_world_size()
        mine = slice(rank * 4 // size, (rank + 1) * 4 // size)
        stage = PipelineStage(fast[mine], rank, size, torch.device("cpu"))
        losses = []
        last = dict(target=target, losses=losses) if rank == size - 1 else {}
        found = schedule(stage, n_microbatches=4, loss_fn=F.mse_loss).step(*((x,) if rank == 0 else ()), **last)
        want = stock(x)
        loss = F.mse_loss(want, target)
        loss.backward()
        if rank == size - 1:
            torch.testing.assert_close(found, want)
            torch.testing.assert_close(torch.stack(losses).mean(), loss)
        assert_same_grads(fast[mine], stock[mine])


CHECKS = [
    distributed_data_parallel,
    distributed_data_parallel_accumulates_under_no_sync,
    distributed_data_parallel_with_uneven_inputs,
    fully_sharded_data_parallel,
    fully_sharded_data_parallel_with_replicas,
    fully_sharded_data_parallel_in_mixed_precision,
    a_sharded_checkpoint_loads_into_torchs_model,
    tensor_parallel,
    tensor_parallel_of_an_accelerated_model,
    tensor_parallel_with_dtensors_between_the_layers,
    tensor_parallel_fuses_the_activation,
    sequence_parallel,
    tensor_parallel_of_frozen_layers,
    sharded_weights_of_a_tensor_parallel_model,
    pipeline,
]
