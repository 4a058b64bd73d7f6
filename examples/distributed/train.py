"""Trains one small transformer on several processes, spread over them in each of five ways; README.md has the line.

    single  every process trains the whole by itself: what the others are compared with
    ddp     each takes a share of the batch                            DistributedDataParallel
    fsdp    and keeps a share of the weights                           fully_shard
    tp      each takes a share of every layer's heads and features     parallelize_module
    cp      each takes a share of the positions                        fastnn.distributed.ring_attention
    pp      each takes a share of the layers                           ScheduleGPipe

The modules are fastnn's; what spreads them is torch's own. Each way sees the same batches and starts from the same weights,
so each loses the same but for rounding.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

sys.path += [
    str(folder) for folder in Path(__file__).resolve().parents[1:3]
]  # the other examples; fastnn, if not installed
from transformer import ALPHABET, library_source

import fastnn
from fastnn.distributed import ring_attention, shard_positions

WIDTH, HEAD_DIM, DEPTH = 128, 32, 4
LENGTH, BATCH = 64, 8

Step = Callable[[Tensor, Tensor], Tensor]  # forward and backward of one batch; gives the mean loss of the whole batch


class Embedding(nn.Module):
    """Characters and learned positions. ``held``: the positions of the sequence that are given; None: all."""

    def __init__(self):
        super().__init__()
        self.characters = nn.Embedding(len(ALPHABET), WIDTH)
        self.positions = nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.02)
        self.held: Tensor | None = None

    def forward(self, text: Tensor) -> Tensor:
        return self.characters(text) + (self.positions if self.held is None else self.positions[self.held])


class Attention(nn.Module):
    """Causal attention of as many heads as the projections give."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.out = (fastnn.nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.attend = fastnn.functional.scaled_dot_product_attention

    def forward(self, x: Tensor) -> Tensor:
        heads = (
            project(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for project in (self.query, self.key, self.value)
        )
        return self.out(self.attend(*heads, is_causal=True).transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention_norm, self.norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.up = fastnn.nn.Linear(WIDTH, 4 * WIDTH, activation="gelu")
        self.down = fastnn.nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(self.up(self.norm(x)))


def layers() -> list[nn.Module]:
    head = nn.Sequential(nn.LayerNorm(WIDTH), fastnn.nn.Linear(WIDTH, len(ALPHABET)))
    return [Embedding(), *(Block() for _ in range(DEPTH)), head]


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def by(model: nn.Module, share: Callable[[Tensor], Tensor] = lambda t: t, mean: bool = False) -> Step:
    """The step of a model that is called as any other, on this process's share; ``mean``: of the shares' losses."""

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        loss = loss_of(model(share(inputs)), share(targets))
        loss.backward()
        loss = loss.detach()
        if mean:
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        return loss

    return step


def single(model: nn.Sequential, mesh: DeviceMesh) -> tuple[Step, Iterable[nn.Parameter]]:
    return by(model), model.parameters()


def ddp(model: nn.Sequential, mesh: DeviceMesh) -> tuple[Step, Iterable[nn.Parameter]]:
    rows = slice(mesh.get_rank(), None, mesh.size())
    return by(DistributedDataParallel(model), lambda t: t[rows], mean=True), model.parameters()


def fsdp(model: nn.Sequential, mesh: DeviceMesh) -> tuple[Step, Iterable[nn.Parameter]]:
    rows = slice(mesh.get_rank(), None, mesh.size())
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return by(model, lambda t: t[rows], mean=True), model.parameters()


def tp(model: nn.Sequential, mesh: DeviceMesh) -> tuple[Step, Iterable[nn.Parameter]]:
    plan = {f"attention.{name}": ColwiseParallel() for name in ("query", "key", "value")}
    plan |= {"attention.out": RowwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
    for block in model[1:-1]:
        parallelize_module(block, mesh, plan)
    parallelize_module(model[-1], mesh, {"1": ColwiseParallel(output_layouts=Replicate())})
    return by(model), model.parameters()


def cp(model: nn.Sequential, mesh: DeviceMesh) -> tuple[Step, Iterable[nn.Parameter]]:
    held = shard_positions(LENGTH, zigzag=True).to(model[0].positions.device)
    model[0].held = held
    for block in model[1:-1]:
        block.attention.attend = functools.partial(ring_attention, zigzag=True)
    # Every process has all weights and the gradients of its positions: DistributedDataParallel takes their mean.
    return by(DistributedDataParallel(model), lambda t: t[:, held], mean=True), model.parameters()


def pp(model: nn.Sequential, mesh: DeviceMesh) -> tuple[Step, Iterable[nn.Parameter]]:
    rank, size = mesh.get_rank(), mesh.size()
    numbers = torch.arange(len(model)).tensor_split(size)[rank].tolist()
    part, device = nn.Sequential(*(model[i] for i in numbers)), model[0].positions.device
    schedule = ScheduleGPipe(PipelineStage(part, rank, size, device), n_microbatches=4, loss_fn=loss_of)

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        losses: list[Tensor] = []
        last = {"target": targets, "losses": losses} if rank == size - 1 else {}
        # torch < 2.13 wants the first stage's input contiguous.
        schedule.step(*((inputs.contiguous(),) if rank == 0 else ()), **last)
        loss = torch.stack(losses).mean().detach() if losses else torch.zeros((), device=device)
        dist.broadcast(loss, size - 1)
        return loss

    return step, part.parameters()


WAYS = {"single": single, "ddp": ddp, "fsdp": fsdp, "tp": tp, "cp": cp, "pp": pp}


def batches(steps: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows of the standard library's source, and their next characters."""
    text, generator = library_source(500_000), torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(len(text) - LENGTH - 1, (BATCH, 1), generator=generator)
        rows = text[starts + torch.arange(LENGTH + 1)].to(device)
        yield rows[:, :-1], rows[:, 1:]


def train(way: str, steps: int, mesh: DeviceMesh, device: torch.device) -> list[float]:
    """Train a new model in one way; return the losses."""
    torch.manual_seed(0)
    step, parameters = WAYS[way](nn.Sequential(*layers()).to(device), mesh)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    losses = []
    for inputs, targets in batches(steps, device):
        optimizer.zero_grad(set_to_none=True)
        losses.append(step(inputs, targets).item())
        optimizer.step()
        if mesh.get_rank() == 0 and len(losses) % 10 == 0:
            print(f"{way:>6}  step {len(losses):4}  loss {losses[-1]:.4f}", flush=True)
    return losses


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--parallel", nargs="+", choices=WAYS, default=list(WAYS), help="one after the other; default: all"
    )
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args(argv)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    losses, seconds = {}, {}
    for way in options.parallel:
        start = time.perf_counter()
        losses[way] = train(way, options.steps, mesh, device)
        seconds[way] = time.perf_counter() - start
    if mesh.get_rank() == 0:
        print(f"{mesh.size()} processes, {device.type}\n   way  first loss  last loss     time")
        for way in options.parallel:
            print(f"{way:>6}  {losses[way][0]:10.4f} {losses[way][-1]:10.4f} {seconds[way]:7.2f} s")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
