"""Trains a small transformer to guess the next character of Python's library, with torch's modules and with fastnn's.

    python examples/transformer.py            both, side by side
    python examples/transformer.py --stock    torch's own modules only

Dropout is drawn from torch's generator by the ``nn.Dropout`` modules of the layers, so both models drop the same units.
The attention weights themselves are not dropped: inside a fused kernel each library draws its own. Activations are
``[length, batch, width]``: that way both keep them in one order in memory, which is the order in which dropout draws.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from side_by_side import Run, arguments, contestants, race
from torch import Tensor, nn

LENGTH = 128
BATCH = 8
STEPS = 20  # in an epoch
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))  # every other character is read as a space


class Model(nn.Module):
    """An encoder of two causal layers over characters with learned positions. ``layers``: torch.nn or fastnn.nn."""

    def __init__(self, layers, width: int = 256):
        super().__init__()
        self.characters = nn.Embedding(len(ALPHABET), width)
        self.positions = nn.Parameter(torch.randn(LENGTH, width) * 0.02)
        self.dropout = nn.Dropout(0.1)
        layer = layers.TransformerEncoderLayer(width, 4, 4 * width, 0.1, "gelu", norm_first=True)
        layer.self_attn.dropout = 0.0
        self.encoder = layers.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = layers.Linear(width, len(ALPHABET))
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH), persistent=False)

    def forward(self, text: Tensor) -> Tensor:
        x = self.dropout(self.characters(text.T) + self.positions.unsqueeze(1))
        return self.head(self.encoder(x, mask=self.mask, is_causal=True).transpose(0, 1))


def library_source(limit: int = 2_000_000) -> Tensor:
    """Return the text of the standard library's modules as indices into the alphabet."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = "".join(f.read_text(encoding="utf-8", errors="replace") for f in files)[:limit]
    index = {c: i for i, c in enumerate(ALPHABET)}
    return torch.tensor([index.get(c, 1) for c in text])


def windows(text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Cut inputs and their next characters, [len(starts), LENGTH] each."""
    rows = text[starts[:, None] + torch.arange(LENGTH + 1)]
    return rows[:, :-1], rows[:, 1:]


def main(argv: list[str] | None = None) -> list[Run]:
    options = arguments(__doc__.splitlines()[0], epochs=8, argv=argv)
    text = library_source()
    train, test = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    held_out = [windows(test, s) for s in torch.linspace(0, len(test) - LENGTH - 1, 32).long().split(BATCH)]

    def batches(epoch: int) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(epoch)
        starts = torch.randint(len(train) - LENGTH - 1, (STEPS, BATCH), generator=generator)
        return [windows(train, s) for s in starts]

    runs = contestants(Model, lambda p: torch.optim.AdamW(p, lr=1e-3), options)
    return race(runs, options.epochs, batches, held_out, what=f"{STEPS} steps"[:6])


if __name__ == "__main__":
    main()
