"""bench/: a row of each family can be run, says its error, and compares with an earlier run."""

import importlib
import json
import math

import pytest
import torch

from bench import peak, peer, run
from bench.problem import Problem
from fastnn import testing


@pytest.mark.parametrize("family", run.FAMILIES)
def test_problems_of_a_family(family):
    problems = importlib.import_module(f"bench.{family}").PROBLEMS
    assert problems and all(isinstance(problem, Problem) for problem in problems)
    names = [problem.id for problem in problems]
    assert len(set(names)) == len(names)
    assert {case.name for case in testing.CASES[family]} <= set(names), "a case of fastnn.testing is not run"
    assert all(problem.flops > 0 and problem.elements > 0 for problem in problems)


def run_one(family, *arguments):
    """Run the family's smallest problem."""
    problems = importlib.import_module(f"bench.{family}").PROBLEMS
    smallest = min(problems, key=lambda problem: problem.flops)
    rows = run.main(["--family", family, "--quick", "--threads", "1", "--only", smallest.id, "--no-onnx", *arguments])
    return [row for row in rows if row["id"] == smallest.id]


@pytest.mark.parametrize("direction", ["forward", "training"])
@pytest.mark.parametrize("family", run.FAMILIES)
def test_a_quick_run_of_a_family(family, direction, capsys):
    (row,) = run_one(family, "--direction", direction)
    assert row["errors"]["fastnn"] < 1e-4 and row["errors"]["torch"] < 1e-4
    for provider in ("fastnn", "torch"):
        time = row["times"][provider]
        assert 0 < time["p20"] <= time["p50"] <= time["p80"]
    assert row["times"]["fastnn"]["ratio"] == 1
    printed = capsys.readouterr().out
    assert row["id"] in printed and "geometric mean" in printed and "error" in printed


def test_json_and_compare(tmp_path, capsys):
    file = tmp_path / "old.json"
    rows = run_one("linear", "--json", str(file))
    assert json.loads(file.read_text())[0]["id"] == rows[0]["id"]
    run_one("linear", "--compare", str(file))
    assert " was " in capsys.readouterr().out


def test_what_is_behind_is_told():
    def row(name, ratio):
        times = {"fastnn": {"p50": 1.0, "ratio": 1.0}, "torch": {"p50": ratio, "ratio": ratio}}
        return {"id": name, "times": times, "floor": 2.0}

    told = run.summary([row("good", 2.0), row("bad", 0.5)], [])
    assert "1.00× torch" in told and "behind torch: bad 0.50" in told and "good" not in told.split("behind")[1]


def test_error_sees_a_wrong_output_and_a_wrong_gradient():
    from bench.problem import Built

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.5

    x = torch.randn(5, requires_grad=True)
    built = Built((x,), Wrong.apply, torch.clone)
    assert run.error(built.torch, built, (x,), [0], True) == 0
    assert run.error(built.fastnn, built, (x,), [0], False) == 0
    assert run.error(built.fastnn, built, (x,), [0], True) > 0.4
    assert run.error(lambda x: x + 1, built, (x,), [0], False) > 0.1


def test_the_machine_and_its_floor():
    machine = peak.Machine(torch.float32, 1)
    assert 1e8 < machine.flops < 1e13 and 1e8 < machine.bandwidth < 1e13 and machine.cache > 0
    assert math.isclose(machine.floor(machine.flops, 0), 1)
    assert machine.floor(0, machine.cache / 2) == 0
    assert machine.floor(0, 1e12) == 1e12 / machine.bandwidth


def test_onnx_runtime_in_its_own_process():
    if not peer.available():
        pytest.skip("onnx and onnxruntime are not installed")
    (row,) = run.main(["--family", "linear", "--quick", "--threads", "1", "--only", "tiny.relu"])
    assert row["errors"]["onnx"] < 1e-5 and row["times"]["onnx"]["p50"] > 0
