"""The examples train, and with torch's modules and with fastnn's they lose the same."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
pytest.importorskip("sklearn")
cnn = pytest.importorskip("cnn")
transformer = pytest.importorskip("transformer")


def test_cnn(capsys):
    stock, fast = cnn.main(["--epochs", "3"])
    assert stock.name == "stock" and fast.name == "fastnn"
    assert stock.losses == pytest.approx(fast.losses, abs=1e-4), "the curves differ by rounding only"
    assert fast.accuracy > 0.5 and fast.losses[-1] < fast.losses[0]
    assert "largest difference" in capsys.readouterr().out


def test_transformer(monkeypatch, capsys):
    monkeypatch.setattr(transformer, "STEPS", 3)
    monkeypatch.setattr(transformer, "LENGTH", 32)
    stock, fast = transformer.main(["--epochs", "2"])
    assert len(fast.losses) == 6 and fast.losses[-1] < fast.losses[0]
    assert stock.losses == pytest.approx(fast.losses, abs=1e-4), "dropout included"


def test_stock_alone(monkeypatch, capsys):
    (run,) = cnn.main(["--epochs", "1", "--stock"])
    assert type(run.model.conv1).__module__.startswith("torch.nn")
    assert "fastnn" not in capsys.readouterr().out
