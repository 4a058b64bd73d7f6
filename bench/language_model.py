"""Trains one language model with torch's modules and with fastnn's, step by step in turn, and prints both speeds.

    python bench/language_model.py                         60 steps of each, on all threads
    python bench/language_model.py --steps 200 --threads 1

Two LSTM layers guess the next character of Python's standard library. Both models start from the same weights, read the
same text and carry their state from step to step. A step is forward, backward, clipping of the gradients and Adam; times
are medians over steps, and the ratio is the median of torch's time over fastnn's in the same step.

Both losses are right, and differ by rounding, which training carries on. How far, torch tells: a third model, of torch's
modules, starts from the same weights, each moved by one unit in its last place. The program ends with 1 where the losses
of fastnn and torch lie further apart than ``ALLOWED`` times those of torch and the third (or one rounding of a loss).
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fastnn.nn
from bench.measure import percentiles
from bench.peak import Others
from bench.table import BUSY
from fastnn.info import cpu_model

FILES = "argparse difflib doctest enum inspect mailbox pickletools pydoc subprocess tarfile typing"  # 1 MB together
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))  # every other character is read as a space
EMBEDDING, HIDDEN, BATCH, LENGTH = 64, 256, 32, 64
WARM = 3  # steps before the clock counts
ALLOWED = 8


class Model(nn.Module):
    """Embedding, two LSTM layers and a linear layer; ``layers`` is torch.nn or fastnn.nn."""

    def __init__(self, layers):
        super().__init__()
        self.embedding = nn.Embedding(len(ALPHABET), EMBEDDING)
        self.lstm = layers.LSTM(EMBEDDING, HIDDEN, 2)
        self.head = layers.Linear(HIDDEN, len(ALPHABET))

    def forward(self, text: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        output, state = self.lstm(self.embedding(text), state)
        return self.head(output), state


class Run:
    """A model in training: the loss and the seconds of each step."""

    def __init__(self, layers, weights: dict[str, Tensor]):
        self.model = Model(layers)
        self.model.load_state_dict(weights)
        self.optimizer = torch.optim.Adam(self.model.parameters(), 2e-3)
        self.state: tuple[Tensor, Tensor] | None = None
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, text: Tensor) -> None:
        """Train on ``text`` [LENGTH + 1, BATCH]: each character is to be guessed from those before it."""
        start = time.perf_counter()
        scores, state = self.model(text[:-1], self.state)
        loss = F.cross_entropy(scores.flatten(0, 1), text[1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)
        self.state = tuple(t.detach() for t in state)

    def apart(self, other: Run) -> float:
        """Return the largest difference between the losses of two runs."""
        return max(abs(a - b) for a, b in zip(self.losses, other.losses, strict=True))


def library() -> Tensor:
    """Return modules of the standard library as indices into the alphabet, BATCH streams of text side by side."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = "".join((folder / f"{name}.py").read_text(encoding="utf-8", errors="replace") for name in FILES.split())
    index = {c: i for i, c in enumerate(ALPHABET)}
    streams = torch.tensor([index.get(c, index[" "]) for c in text[: len(text) // BATCH * BATCH]])
    return streams.view(BATCH, -1).T.contiguous()


def main(argv: list[str] | None = None) -> tuple[Run, Run]:
    """Train, print what is found, and return torch's run and fastnn's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help=f"measured steps, 2 or more, after {WARM} others")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)

    text = library()
    starts = [i % (len(text) // LENGTH - 1) * LENGTH for i in range(WARM + options.steps)]
    windows = [text[start : start + LENGTH + 1] for start in starts]
    torch.manual_seed(0)
    weights = Model(nn).state_dict()
    runs = {"torch": Run(nn, weights), "fastnn": Run(fastnn.nn, weights)}
    others = Others()
    for i, window in enumerate(windows):
        for run in list(runs.values())[:: -1 if i % 2 else 1]:
            run.step(window)
    busy = others.cores()
    moved = Run(nn, {name: weight.nextafter(torch.tensor(torch.inf)) for name, weight in weights.items()})
    for window in windows:
        moved.step(window)

    seconds = {name: run.seconds[WARM:] for name, run in runs.items()}
    print(f"2 LSTM layers of {HIDDEN} over characters, batch {BATCH}, {LENGTH} steps back; {options.threads} "
          f"thread{'s' * (options.threads > 1)} on {cpu_model()}; torch {torch.__version__}")  # fmt: skip
    for name in runs:
        told = percentiles(seconds[name], seconds, "fastnn")
        speed = {key: BATCH * LENGTH / told[key] for key in ("p50", "p80", "p20")}
        print(f"{name:6}  {speed['p50']:8.0f} tokens/s (p20–p80 of the steps' times: {speed['p80']:.0f}–{speed['p20']:.0f})"
              f", time over fastnn's {told['ratio']:.2f}")  # fmt: skip
    if busy > BUSY:
        print(f"(other processes used {busy:.1f} cores: these times are not worth much)")
    stock, fast = runs.values()
    rounding = max(stock.apart(moved), torch.finfo(torch.float32).eps * max(stock.losses))
    apart, bound = fast.apart(stock), ALLOWED * rounding
    print(f"loss {stock.losses[0]:.3f} to {stock.losses[-1]:.3f}; largest difference of the {len(windows)} losses "
          f"{apart:.1e}; bound {bound:.1e}, {ALLOWED} times what one rounding of the weights makes of torch's")  # fmt: skip
    if not apart <= bound:
        sys.exit("bench/language_model.py: the losses lie further apart than rounding explains.")
    return stock, fast


if __name__ == "__main__":
    main()
