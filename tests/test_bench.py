"""bench/: a row of each family can be run, says its error and its memory, and compares with an earlier run."""

import importlib
import json
import math
import subprocess
import sys
import time

import pytest
import torch

from bench import conv2d, language_model, linear, measure, peak, peer, rnn, run, table, variants
from bench.problem import Built, Problem
from fastnn import reference, testing

ARGUMENTS = ("--quick", "--threads", "1", "--family")


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
    rows = run.main([*ARGUMENTS, family, "--only", f"^{smallest.id}$", "--no-onnx", *arguments])
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


def row(name, torch=1.0, onnx=None, frozen=None, group="", floor=2.0, fastnn=1.0):
    """A row as measure makes them, from the seconds of each provider."""
    seconds = {"fastnn": fastnn, "frozen": frozen, "torch": torch, "onnx": onnx}
    times = {
        key: {"p50": value, "ratio": value / fastnn, "ratio_frozen": value / (frozen or fastnn)}
        for key, value in seconds.items()
        if value is not None
    }
    return {"id": name, "group": group, "times": times, "floor": floor}


def test_what_is_behind_is_told():
    told = table.Table(["fastnn", "torch"]).summary([row("good", 2.0), row("bad", 0.5)])
    assert "torch/fastnn 1.00×" in told
    assert "behind torch: bad 0.50" in told and "good" not in told.split("behind")[1]
    assert "nothing behind torch" in table.Table(["fastnn", "torch"]).summary([row("good", 2.0)])


def test_peers_with_frozen_weights_are_told_from_the_frozen_column():
    rows = [row("a", torch=2.0, onnx=0.5, frozen=0.25, group="1x1"), row("b", torch=2.0, onnx=0.5, frozen=1.0)]
    assert [table.best(r) for r in rows] == ["onnx", "onnx"]
    assert [table.against_best(r) for r in rows] == [2.0, 0.5]
    told = table.Table(["fastnn", "frozen", "torch", "onnx"]).summary(rows)
    assert "torch/fastnn 2.00×" in told and "torch/frozen 4.00×" in told and "onnx/frozen 1.00×" in told
    assert "behind the best peer: b 0.50" in told and "nothing behind torch" in told
    assert "1x1: torch/fastnn 2.00×" in told
    without = row("c", torch=2.0)  # a family that has no frozen module
    assert table.against_best(without) == 2.0 and table.own(without) == "fastnn"
    slower = row("d", torch=2.0, onnx=0.5, frozen=4.0)  # a module's call costs more than its packed weights save
    assert table.against_best(slower) == 0.5 and table.own(slower) == "fastnn"


def test_the_floor_of_short_problems_is_told_apart():
    rows = [row("long", floor=2.0, fastnn=1e-3, frozen=5e-4), row("short", floor=8.0, fastnn=1e-5, frozen=1e-5)]
    told = table.Table(["fastnn", "frozen", "torch"]).floors(rows)
    assert told.startswith("fastnn 4.00×, 2.00× where it is 20 µs or more (1); frozen 2.83×, 1.00×")


def test_error_sees_a_wrong_output_and_a_wrong_gradient():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.5

    x = torch.randn(5, requires_grad=True)
    built = Built((x,), Wrong.apply, torch.clone)

    def error(function, training):
        exact = measure.oracle(built, (x,), [0], training)
        return measure.error(measure.results(function, (x,), [0], training), exact)

    assert error(built.torch, True) == 0
    assert error(built.fastnn, False) == 0
    assert error(built.fastnn, True) > 0.4
    assert error(lambda x: x + 1, False) > 0.1
    fine, hole = torch.ones(2), torch.tensor([1.0, float("nan")])
    assert all(math.isnan(measure.error(found, [fine, fine])) for found in ([fine, hole], [hole, fine]))


def test_the_machine_and_its_floor():
    machine = peak.Machine(torch.float32, 1)
    assert 1e8 < machine.flops < 1e13 and 1e8 < machine.bandwidth < 1e13 and machine.cache > 0
    assert math.isclose(machine.floor(machine.flops, 0), 1)
    assert machine.floor(0, machine.cache / 2) == 0
    assert machine.floor(0, 1e12) == 1e12 / machine.bandwidth


def test_what_others_use_is_told_apart():
    if not sys.platform.startswith("linux"):
        pytest.skip("read from /proc")
    burn = "import time; end = time.time() + 30\nwhile time.time() < end: pass"
    process = subprocess.Popen([sys.executable, "-c", burn])
    try:
        others, without = peak.Others(), peak.Others(lambda: [process.pid])
        time.sleep(1)
        seen, rest = others.cores(), without.cores()
        assert seen - rest > 0.1
    finally:
        process.kill()
        process.wait()
    told = table.Table(["fastnn", "torch"]).summary([row("a", 2.0) | {"others": 0.6}, row("b", 2.0) | {"others": 0.1}])
    assert "other processes used the machine during 1 of 2" in told


def test_runtimes_in_their_own_processes(capsys):
    kinds = [kind for kind in peer.RUNTIMES if peer.available(kind)]
    if not kinds:
        pytest.skip("neither ONNX Runtime nor OpenVINO is installed")
    names = ["tiny.relu", "dlrm.click", "bert.pooler"]  # one process for all
    rows = run.main([*ARGUMENTS, "linear", "--only", *names])
    assert [row["id"] for row in rows] == ["bert.pooler", "dlrm.click", "tiny.relu"]
    printed = capsys.readouterr().out
    for kind in kinds:
        assert all(row["errors"][kind] < 1e-5 and row["times"][kind]["p50"] > 0 for row in rows)
        assert f"{kind}/frozen" in printed and rows[0][peer.RUNTIMES[kind]] in printed


def test_a_runtime_that_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setattr(peer, "available", lambda kind: kind == "onnx")
    bench, setting = measure.Bench(run.parse([])), measure.Setting("linear", "float32", "forward", 1, None)
    assert bench.peers(setting) == ["onnx"] and bench.peers(setting._replace(direction="training")) == []
    assert measure.Bench(run.parse(["--no-onnx"])).peers(setting) == []


def test_each_activation_has_its_onnx_nodes():
    if not peer.available("onnx"):
        pytest.skip("onnx and onnxruntime are not installed")
    import onnxruntime

    x = torch.linspace(-8, 8, 99)
    for name in {case.activation for case in (*testing.LINEAR, *testing.CONV2D)}:
        model, feeds = peer.model(peer.activation(name, "X"), {"X": x.numpy()}, {})
        found = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, feeds)[0]
        torch.testing.assert_close(torch.from_numpy(found), reference.activate(x, name), rtol=1e-5, atol=1e-6)


class Broken:
    """A peer that takes no problem."""

    def __init__(self, kind):
        self.kind, self.id = kind, 0

    def load(self, *problem):
        raise RuntimeError(f"{self.kind}: it is out of order")

    def close(self):
        pass


def test_a_peer_that_fails_is_a_note(monkeypatch, capsys):
    monkeypatch.setattr(peer, "Peer", Broken)
    (row,) = run.main([*ARGUMENTS, "linear", "--only", "tiny.relu", "--compile", "--no-onnx"])
    assert "compile" not in row["times"] and "out of order" in row["note"]
    assert "out of order" in capsys.readouterr().out


def test_a_peer_whose_process_ends_says_so():
    child = peer.Peer("onnx")
    child._child.kill()
    with pytest.raises(RuntimeError, match="onnx: its process ended with -9"):
        child.results()
    child.close()


def test_torch_compile_is_a_peer_of_cells_and_not_of_sequences(monkeypatch):
    monkeypatch.setattr(peer, "Peer", Broken)
    rows = run.main([*ARGUMENTS, "rnn", "--only", "^rnn.cell$", "^kws.rnn", "--compile", "--no-onnx"])
    assert {row["id"]: bool(row["note"]) for row in rows} == {"rnn.cell": True, "kws.rnn.b1": False}


def test_torch_compile_in_its_own_process():
    child = peer.Peer("compile")
    try:
        child.load("linear", "tiny", "float32", False, 1)
        (problem,) = [problem for problem in linear.PROBLEMS if problem.id == "tiny"]
        built = problem.build(torch.float32)
        exact = measure.oracle(built, built.tensors, [], False)
        assert measure.error([torch.from_numpy(array) for array in child.results()], exact) < 1e-5
        assert child.turn(2) > 0
        with pytest.raises(RuntimeError, match="compile: StopIteration"):
            child.load("linear", "no such problem", "float32", False, 1)
    finally:
        child.close()


@pytest.mark.parametrize("kind", peer.RUNTIMES)
@pytest.mark.parametrize("family", run.FAMILIES)
def test_each_onnx_model_computes_the_same(family, kind):
    if not peer.available(kind):
        pytest.skip(f"onnx and {peer.RUNTIMES[kind]} are not installed")
    child = peer.Peer(kind)
    try:
        for problem in importlib.import_module(f"bench.{family}").PROBLEMS:
            built = problem.build(torch.float32) if problem.flops < 5e7 and problem.elements < 2e6 else None
            if built and built.onnx:
                child.load(*built.onnx(), 1)
                exact = measure.oracle(built, built.tensors, [], False)
                (found,) = map(torch.from_numpy, child.results())
                assert found.shape == exact[0].shape and measure.error([found], exact) < 1e-5, problem.id
                assert child.turn(2) > 0
    finally:
        child.close()


@pytest.mark.parametrize("family", [linear, conv2d, rnn])
def test_the_frozen_module_computes_the_same(family):
    torch.set_num_threads(1)
    for problem in family.PROBLEMS:
        if problem.flops < 5e6:
            built = problem.build(torch.float32)
            exact = measure.oracle(built, built.tensors, [], False)
            with torch.no_grad():
                found = measure.first(built.frozen()(*built.tensors[: built.inputs]))
            assert measure.error([found], exact) < 1e-5, problem.id


def test_beside_its_own_float32():
    (row,) = run_one("linear", "--dtype", "bfloat16", "--own-float32")
    assert set(row["times"]) == {"fastnn", "frozen", "float32", "frozen32"}
    assert table.ratio(row, "float32") > 0 and table.ratio(row, "frozen32", "frozen") > 0


def test_parts_are_the_whole():
    arguments = [*ARGUMENTS, "linear", "--no-onnx", "--only", "^tiny", "odd.skinny", "odd.tail", "--part"]
    whole = [p.id for p in linear.PROBLEMS if run.chosen(p, run.parse([*arguments, "1/1"]))]
    found = [row["id"] for i in (1, 2) for row in run.main([*arguments, f"{i}/2"])]
    assert sorted(found) == sorted(whole) and len(whole) >= 4


def test_kept_runs_are_shown_and_drawn(tmp_path, capsys):
    file, chart = tmp_path / "kept.json", tmp_path / "chart.png"
    kept = run_one("conv2d", "--json", str(file))
    printed = capsys.readouterr().out
    assert run.main(["--show", str(file)]) == kept
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1] in printed and kept[0]["id"] in shown
    pytest.importorskip("matplotlib")
    run.main(["--show", str(file), "--plot", str(chart)])
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_matplotlib_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        run.main(["--show", "none.json", "--plot", "none.png"])


# ---- variants --------------------------------------------------------------------------------------------------------


def test_each_variant_beside_the_pick(capsys):
    rows = run.main([*ARGUMENTS, "conv2d", "--variants", "--only", "tiny.8x64x64"])
    assert [row["weights"] for row in rows] == ["plain", "frozen"] * 2  # NCHW, channels_last
    for row in rows:
        assert {row["pick"], "direct"} <= {*row["times"], *row["hopeless"]} and row["over"] >= 1
    assert "picks within 5 % of the best" in capsys.readouterr().out


def test_an_op_of_one_algorithm_is_left_out(capsys):
    assert run.main([*ARGUMENTS, "rnn", "--variants", "--only", "^kws"]) == []
    assert "cannot be forced" in capsys.readouterr().out


def test_variants_of_linear():
    problem = next(problem for problem in linear.PROBLEMS if problem.id == "tiny.8x64x64")
    for frozen, names in ((False, {"gemm", "dot"}), (True, {"gemm", "dot", "packed"})):
        row = variants.measure("linear", problem, "float32", "forward", 1, frozen, True)
        assert set(row["times"]) | set(row["hopeless"]) == {"pick", *names} and row["pick"] in names


# ---- a whole program -------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(language_model, "BATCH", 4)
    monkeypatch.setattr(language_model, "LENGTH", 16)


def test_the_language_model_loses_the_same(small, capsys):
    stock, fast = language_model.main(["--steps", "4", "--threads", "1"])
    assert len(fast.losses) == len(stock.losses) == 4 + language_model.WARM and fast.losses[-1] < fast.losses[0]
    assert type(fast.model.lstm).__module__ == "fastnn.nn.rnn" and type(stock.model.lstm) is torch.nn.LSTM
    assert "tokens/s" in capsys.readouterr().out


def test_a_language_model_that_loses_something_else_is_told(small, monkeypatch):
    class Linear(torch.nn.Linear):
        def forward(self, input):
            return super().forward(input) * 1.0001

    monkeypatch.setattr(language_model.fastnn.nn, "Linear", Linear)
    with pytest.raises(SystemExit, match="further apart than rounding"):
        language_model.main(["--steps", "4", "--threads", "1"])
