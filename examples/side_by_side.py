"""Trains one model with torch's modules and with fastnn's, in turns on the same batches; prints both side by side."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parent.parent))  # fastnn beside this folder, where none is installed


@dataclass
class Run:
    """One of the two: its model, its optimizer, and what it has shown so far."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    accuracy: float = 0.0
    seconds: float = 0.0

    def train(self, batches: Iterable[tuple[Tensor, Tensor]], seed: int) -> float:
        """Take a step on each batch; return the mean loss. The seed is that of the dropout."""
        torch.manual_seed(seed)
        self.model.train()
        start = time.perf_counter()
        losses = []
        for inputs, targets in batches:
            self.optimizer.zero_grad(set_to_none=True)
            loss = nn.functional.cross_entropy(self.model(inputs).flatten(0, -2), targets.flatten())
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        self.seconds += time.perf_counter() - start
        self.losses += losses
        return sum(losses) / len(losses)

    @torch.inference_mode()
    def test(self, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
        """Return the share of right answers."""
        self.model.eval()
        right = total = 0
        for inputs, targets in batches:
            right += (self.model(inputs).argmax(-1) == targets).sum().item()
            total += targets.numel()
        self.accuracy = right / total
        return self.accuracy


def race(
    runs: list[Run],
    epochs: int,
    batches: Callable[[int], list[tuple[Tensor, Tensor]]],
    held_out: list[tuple[Tensor, Tensor]],
    what: str = "epoch",
) -> list[Run]:
    """Train the runs in turns, one epoch each, and print loss, test accuracy and time side by side.

    Args:
        runs: the models, with the same initial weights.
        epochs: how many.
        batches: gives the batches of an epoch; every run sees the same.
        held_out: batches to test on.
        what: what to call an epoch in the table.

    Returns:
        The runs.
    """
    print(f"{what:>6}" + "".join(f" | {r.name:>8}  loss  accuracy     time" for r in runs))
    for epoch in range(epochs):
        data = batches(epoch)
        line = f"{epoch + 1:6d}"
        for run in runs:
            loss = run.train(data, seed=epoch)
            accuracy = run.test(held_out)
            line += f" | {loss:14.6f}  {accuracy:7.2%} {run.seconds:7.2f} s"
        print(line, flush=True)
    if len(runs) == 2:
        a, b = runs
        apart = max(abs(x - y) for x, y in zip(a.losses, b.losses, strict=True))
        print(f"largest difference of the {len(a.losses)} losses: {apart:.1e}")
        print(f"{b.name} trained {a.seconds / b.seconds:.2f} times as fast as {a.name}")
    return runs


def arguments(description: str, epochs: int, argv: list[str] | None) -> argparse.Namespace:
    """Read the command line that the examples share."""
    parser = argparse.ArgumentParser(description=description)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--stock", action="store_true", help="train torch's own modules only")
    only.add_argument("--fastnn", action="store_true", help="train fastnn's modules only")
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    return options


def contestants(
    build: Callable[[object], nn.Module], optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer], options
) -> list[Run]:
    """Build the model once with each package of modules, and give both the same initial weights.

    Args:
        build: makes the model out of ``torch.nn`` or ``fastnn.nn``.
        optimizer: makes its optimizer.
        options: the command line.
    """
    torch.manual_seed(0)
    stock = build(nn)
    runs = [] if options.fastnn else [Run("stock", stock, optimizer(stock.parameters()))]
    if not options.stock:
        import fastnn.nn

        model = build(fastnn.nn)
        model.load_state_dict(stock.state_dict())
        runs.append(Run("fastnn", model, optimizer(model.parameters())))
    return runs
