"""Lightning's Trainer on a model through fastnn.accelerate."""

import copy
import warnings

import pytest
import torch
from torch import nn

import fastnn
from tests.modules import no_worse

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it imports
    lightning = pytest.importorskip("lightning")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


class Net(lightning.LightningModule):
    """Convolution, recurrence, attention and linear, one after the other."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.rnn = nn.GRU(6 * 8, 16, batch_first=True)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.conv(x).relu().permute(0, 2, 1, 3).flatten(2)
        x, _ = self.rnn(x)
        x, _ = self.attention(x, x, x, need_weights=False)
        return self.head(x.mean(1))

    def training_step(self, batch, index):
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, index):
        self.log("accuracy", (self(batch[0]).argmax(-1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def fit(net, dtype):
    torch.manual_seed(2)
    data = torch.utils.data.TensorDataset(torch.randn(40, 1, 8, 8, dtype=dtype), torch.randint(4, (40,)))
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    trainer = lightning.Trainer(
        max_steps=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(net, loader, loader)
    return [trainer.callback_metrics["loss"], *(p.detach() for p in net.parameters())]


@pytest.mark.works("Models", "Trainer: fit and validate", package="lightning")
def test_trainer(record_property, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stock = Net()
    fast = fastnn.accelerate(copy.deepcopy(stock), inplace=True)
    oracle = copy.deepcopy(stock).double()
    share = fastnn.explain(fast, torch.randn(8, 1, 8, 8)).share
    assert share == 1
    record_property("FLOPs served", f"{100 * share:.0f} %")
    start = [p.detach().clone() for p in stock.parameters()]
    fastnn.set_fallback("error")
    trained = fit(fast, torch.float32)
    expected = fit(stock, torch.float32)
    no_worse(trained, expected, fit(oracle, torch.float64))
    assert not any(map(torch.equal, trained[1:], start))
    assert type(fastnn.restore(fast).rnn) is nn.GRU
