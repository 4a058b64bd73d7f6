"""Trains a small convolutional network on scikit-learn's handwritten digits, with torch's modules and with fastnn's.

python examples/cnn.py            both, side by side
python examples/cnn.py --stock    torch's own modules only
"""

from __future__ import annotations

import torch
from side_by_side import Run, arguments, contestants, race
from sklearn.datasets import load_digits
from torch import Tensor, nn


class Net(nn.Module):
    """Two 3×3 convolutions with ReLU and 2×2 pooling, then two linear layers; ``layers`` is torch.nn or fastnn.nn."""

    def __init__(self, layers):
        super().__init__()
        self.conv1 = layers.Conv2d(1, 32, 3, padding=1)
        self.conv2 = layers.Conv2d(32, 64, 3, padding=1)
        self.fc1 = layers.Linear(64 * 2 * 2, 128)
        self.fc2 = layers.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.conv1(images).relu(), 2)
        x = nn.functional.max_pool2d(self.conv2(x).relu(), 2)
        return self.fc2(self.fc1(x.flatten(1)).relu())


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images [N, 1, 8, 8] and labels to train on, and a fifth held out."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[360:], order[:360]
    return images[train], labels[train], images[test], labels[test]


def main(argv: list[str] | None = None) -> list[Run]:
    options = arguments(__doc__.splitlines()[0], epochs=20, argv=argv)
    images, labels, test_images, test_labels = digits()

    def batches(epoch: int) -> list[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch))
        return [(images[i], labels[i]) for i in order.split(32)]

    runs = contestants(Net, lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9), options)
    return race(runs, options.epochs, batches, [(test_images, test_labels)])


if __name__ == "__main__":
    main()
