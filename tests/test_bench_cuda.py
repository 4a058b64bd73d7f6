"""bench/cuda.py without a GPU: its cases, its counts, its method on the CPU, its tables and goals, and its way on after a crash."""

import contextlib
import importlib
import json
import math
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import cuda, cuda_attention, cuda_linear, cuda_measure, cuda_table
from bench.attention import scores, text
from bench.cuda_problem import DTYPES, TOLERANCE, Case, sample
from fastnn.testing import AttentionCase, seen

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = {"linear": cuda_linear, "attention": cuda_attention}


# ---- cases -----------------------------------------------------------------------------------------------------------


def test_each_case_has_its_name_and_its_work():
    cases = cuda.chosen(cuda.parse([]))
    assert {case.family for case in cases} == set(cuda.FAMILIES) == set(FAMILIES)
    keys = [case.key for case in cases]
    assert len(set(keys)) == len(keys)
    for case in cases:
        assert case.flops > 0 and case.moved > 0 and case.dtype in DTYPES and case.dtype in TOLERANCE
        assert case.direction in ("forward", "backward", "training")
    first = [case.first for case in cases]
    assert first == sorted(first, reverse=True), "what the goals are told from is run first"
    for group in (True, False):  # and neither family waits for the other
        members = [case.family for case in cases if case.first == group]
        assert set(members[:4]) == set(cuda.FAMILIES)


def test_each_goal_is_told_from_cases_that_are_run_first():
    cases = cuda.chosen(cuda.parse([]))
    for goal in cuda_table.GOALS:
        matching = [case for case in cases if re.fullmatch(goal.pattern, " ".join(case.key))]
        assert matching, goal.text
        assert any(case.first for case in matching), goal.text


def test_cases_can_be_chosen():
    found = cuda.chosen(cuda.parse(["--family", "linear", "--only", r"^linear thin\.1 ", "--dtype", "bfloat16"]))
    assert [case.key for case in found] == [("linear", "thin.1", "bfloat16", "forward")]


def test_the_counts_of_linear():
    case = cuda_linear.case("x", 3, 5, 7, "bfloat16")
    assert case.flops == 2 * 3 * 5 * 7 and case.moved == 2 * (3 * 7 + 5 * 7 + 3 * 5 + 5)
    training = cuda_linear.case("x", 3, 5, 7, "float32", direction="training")
    assert training.flops == 3 * case.flops and training.moved == 3 * 2 * case.moved


SHAPES = [
    AttentionCase("", 1, 2, 5, 9, 8),
    AttentionCase("", 2, 4, 6, 6, 8, 2, causal=True),
    AttentionCase("", 1, 2, 9, 12, 16, 1, window=(3, 1)),
    AttentionCase("", 1, 2, 12, 9, 16, 1, window=(3, 0)),
    AttentionCase("", 1, 2, 12, 4, 16, window=(-1, -1)),
    AttentionCase("", 1, 2, 12, 9, 16, window=(2, -1), causal=True),
    AttentionCase("", 1, 2, 1, 20, 8),
    AttentionCase("", 1, 1, 7, 4, 8, causal=True),
]


@pytest.mark.parametrize("shape", SHAPES, ids=text)
def test_the_counts_of_attention(shape):
    visible = seen(shape)
    pairs = shape.queries * shape.keys if visible is None else visible.sum().item()
    assert scores(shape) == pairs
    product = 2 * shape.batch * shape.heads * pairs * shape.head_dim
    assert [cuda_attention.flops(shape, d) / product for d in ("forward", "backward", "training")] == [2, 5, 7]
    arms = cuda_attention.build(shape, "float16", "forward", "cpu")
    tensors = arms.draw()
    inputs = sum(t.numel() for t in tensors if t is not None)
    assert cuda_attention.moved(shape, 2, "forward") == 2 * (inputs + tensors[0].numel())


def test_the_counts_of_masks():
    bias, padding = (AttentionCase("", 2, 3, 4, 5, 8, mask=mask) for mask in ("bias", "bool"))
    plain = cuda_attention.moved(bias._replace(mask=None), 2, "forward")
    assert cuda_attention.moved(bias, 2, "forward") == plain + 3 * 4 * 5 * 2
    assert cuda_attention.moved(padding, 2, "forward") == plain + 2 * 5


def test_samples_hold_the_ends():
    assert sample(5, 8).tolist() == [0, 1, 2, 3, 4]
    found = sample(1000, 8).tolist()
    assert len(set(found)) == 8 and found == sorted(found) and found[0] == 0 and found[-1] == 999


# ---- the method, on the CPU ------------------------------------------------------------------------------------------


def small(family, direction="forward", dtype="float32", **options):
    if family == "linear":
        return cuda_linear.case("small", 65, 70, 33, dtype, options.get("activation"), direction)
    return cuda_attention.case(AttentionCase("small", 2, 4, 66, 66, 8, 2, **options), dtype, direction)


@pytest.fixture
def measure(monkeypatch, one_thread):
    for name, seconds in (("PASS", 1e-5), ("TURN", 1e-4), ("LONGEST", 0.01)):
        monkeypatch.setattr(cuda_measure, name, seconds)
    return cuda_measure.Measure(cuda_measure.Host(), quick=True, small=True)


CASES = {
    "linear": small("linear"),
    "gelu": small("linear", activation="gelu"),
    "bfloat16": small("linear", dtype="bfloat16", activation="silu"),
    "linear training": small("linear", "training", activation="gelu"),
    "identity training": small("linear", "training"),
    "attention": small("attention"),
    "causal": small("attention", causal=True),
    "window": small("attention", window=(5, 0)),
    "softcap": small("attention", softcap=2.0, causal=True),
    "bias": small("attention", mask="bias"),
    "padding": small("attention", mask="bool"),
    "decode": cuda_attention.case(AttentionCase("small", 1, 4, 1, 300, 8, 2)),
    "attention backward": small("attention", "backward", causal=True),
    "window backward": small("attention", "backward", window=(9, 0)),
    "attention training": small("attention", "training", mask="bias"),
    "bfloat16 training": small("attention", "training", "bfloat16"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_method(name, measure):
    case = CASES[name]
    row = measure.row(case)
    assert "failed" not in row, row["failed"]
    assert not row["wrong"] and row["errors"]["fastnn"] <= TOLERANCE[case.dtype]
    assert row["errors"]["torch"] <= TOLERANCE[case.dtype]
    assert 0 < row["times"]["fastnn"]["p20"] <= row["times"]["fastnn"]["p50"] <= row["times"]["fastnn"]["p80"]
    assert row["times"]["fastnn"]["ratio"] == 1 and row["times"]["torch"]["ratio"] > 0
    assert row["best"] in row["peers"] and row["floor"] > 0 and row["calls"] >= row["sets"] >= 2
    assert row.get("deterministic", True) is True and ("deterministic" in row) == (case.direction != "forward")
    assert json.loads(json.dumps(row)) == row
    assert case.id in cuda_table.line(row)


def spoilt(case, spoil):
    """The case with another own side: ``spoil(results)`` stands for it."""
    inner = case.build

    def build(device):
        arms = inner(device)
        own, prepare = arms.own, arms.prepare

        def prepared(function, tensors):
            call = prepare(function, tensors)
            return (lambda: spoil(call())) if function is own else call

        if prepare:
            arms.prepare = prepared
        else:
            arms.own = lambda *tensors: spoil(own(*tensors))
        return arms

    return Case(case.family, case.id, case.dtype, case.direction, case.shape, case.flops, case.moved, build)


def scale(results, which):
    return [t * 1.5 if i == which else t for i, t in enumerate(results)]


def hole(results):
    results[0].flatten()[-1] = math.nan
    return results


GRADIENTS = {"linear training": 4, "attention training": 4, "attention backward": 3}


@pytest.mark.parametrize("name, which", [(name, which) for name, count in GRADIENTS.items() for which in range(count)])
def test_a_wrong_result_is_told(name, which, measure):
    row = measure.row(spoilt(CASES[name], partial(scale, which=which)))
    assert row["wrong"] and "WRONG" in cuda_table.line(row) and math.isnan(cuda_table.ratio(row))


@pytest.mark.parametrize("name", ["linear", "attention", "decode"])
def test_a_hole_in_the_output_is_told(name, measure):
    row = measure.row(spoilt(CASES[name], hole))
    assert row["wrong"] and math.isnan(row["errors"]["fastnn"])


def test_random_gradients_are_told(measure):
    row = measure.row(spoilt(CASES["linear training"], lambda results: [t + torch.rand(()) * 1e-6 for t in results]))
    assert row["deterministic"] is False and "NOT DETERMINISTIC" in cuda_table.line(row)
    assert (
        not row["wrong"]
        and not cuda_table.right(row)
        and "1 cases: 0 right, 1 wrong, 0 failed" in cuda_table.tables([row])
    )


def test_what_raises_is_a_row_and_the_bench_goes_on(measure, tmp_path, monkeypatch, capsys):
    def broken(results):
        raise RuntimeError("out of order\nand more")

    cases = [spoilt(small("linear"), broken), small("attention")]
    monkeypatch.setattr(cuda, "chosen", lambda options: cases)
    file = tmp_path / "rows.json"
    assert cuda.main(["--json", str(file), "--no-kernels"], measure) == 1
    failed, fine = json.loads(file.read_text())
    assert failed["failed"] == "RuntimeError: out of order" and "times" in fine
    printed = capsys.readouterr().out
    assert "failed: RuntimeError: out of order" in printed and "2 cases: 1 right, 0 wrong, 1 failed" in printed


def test_a_peer_that_raises_is_left_out(measure):
    row = measure.row(small("attention"))
    assert {"cudnn", "efficient"} <= set(row["refused"]), "they have no kernel for the CPU"
    assert row["best"] in ("flash", "math")
    case = small("linear")
    inner = case.build

    def build(device):
        arms = inner(device)
        arms.peers = {"eager": lambda *tensors: 1 / 0}
        return arms

    case.build = build
    assert "none of torch's ways runs" in measure.row(case)["failed"]


def test_another_way_to_call_a_peer_is_tried_where_it_is_needed(measure):
    case = small("linear")
    inner = case.build

    def build(device):
        arms = inner(device)
        eager = arms.peers["eager"]
        arms.peers = {"a": eager, "a, repeated": eager, "b": lambda *tensors: 1 / 0, "b, repeated": eager}
        return arms

    case.build = build
    row = measure.row(case)
    assert set(row["peers"]) == {"a", "b, repeated"} and set(row["refused"]) == {"b"}


def test_the_time_that_is_up(measure, capsys):
    assert cuda.main(["--only", "odd.small float64", "--budget", "0", "--no-kernels"], measure) == 0
    assert "the time is up: 1 of 1 cases were not run" in capsys.readouterr().out


def test_a_run_that_ended_goes_on(measure, tmp_path, monkeypatch):
    cases = [small("linear"), small("attention"), small("linear", activation="relu", dtype="float64")]
    monkeypatch.setattr(cuda, "chosen", lambda options: cases)
    file = tmp_path / "rows.json"
    row = measure.row(cases[0])
    killed = dict(zip(("family", "id", "dtype", "direction"), cases[1].key, strict=True)) | {"running": True}
    cuda.write([row, killed | {"machine": "cpu", "torch": "", "shape": ""}], str(file))
    assert cuda.main(["--json", str(file), "--resume", "--no-kernels"], measure) == 1
    rows = json.loads(file.read_text())
    assert [cuda_table.key(row) for row in rows] == [case.key for case in cases]
    assert rows[0] == row and "crashed" in rows[1]["failed"] and "times" in rows[2]


def test_a_lost_device_ends_the_process(measure, tmp_path, monkeypatch):
    class Lost(cuda_measure.Host):
        def free(self):
            raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(cuda, "chosen", lambda options: [small("linear"), small("attention")])
    file = tmp_path / "rows.json"
    lost = cuda_measure.Measure(Lost(), quick=True, small=True)
    assert cuda.main(["--json", str(file)], lost) == cuda.LOST
    (row,) = json.loads(file.read_text())
    assert "illegal memory access" in row["failed"]
    assert cuda.main(["--json", str(file), "--resume", "--no-kernels"], measure) == 1
    assert len(json.loads(file.read_text())) == 2


class Graph:
    """A graph whose replay writes nothing, or what was captured."""

    writes = False

    def replay(self):
        if self.writes:
            for result, value in Graph.captured:
                result.copy_(value)


@pytest.mark.parametrize("writes", [True, False])
@pytest.mark.parametrize("name", ["linear", "attention training"])
def test_captured_results_are_poisoned_before_they_are_judged(name, writes, measure, monkeypatch):
    monkeypatch.setattr(Graph, "writes", writes)
    monkeypatch.setattr(Graph, "captured", [], raising=False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    class Half(cuda_measure.Host):  # the GPU's way of recording a pass, everything else the CPU's
        stream = None
        record = cuda_measure.Gpu.record

    fill = cuda_measure.Measure._error

    def judged(self, arms, tensors, pass_):
        Graph.captured = [(result, result.clone()) for result in pass_.results]
        return fill(self, arms, tensors, pass_)

    monkeypatch.setattr(cuda_measure.Measure, "_error", judged)
    measure.machine = Half()
    row = measure.row(CASES[name])
    assert row["how"]["fastnn"] == "graph", row
    assert row["wrong"] is not writes and math.isnan(row["errors"]["fastnn"]) is not writes


def test_what_cannot_be_captured_is_called_one_by_one(measure, monkeypatch):
    def refuse(graph, stream):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", refuse)

    class Half(cuda_measure.Host):
        stream = None
        record = cuda_measure.Gpu.record

    measure.machine = Half()
    row = measure.row(small("linear"))
    assert row["how"]["fastnn"].startswith("loop: RuntimeError: operation not permitted") and not row["wrong"]


def test_tf32_is_for_that_dtype_alone():
    assert not torch.backends.cuda.matmul.allow_tf32
    with cuda_measure.precision("tf32"):
        assert torch.backends.cuda.matmul.allow_tf32
        with cuda_measure.precision("float32"):
            assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a GPU, and torch sees none here"):
        cuda.main([])


# ---- tables and goals ------------------------------------------------------------------------------------------------


def row(family, id, dtype="bfloat16", direction="forward", ratio=1.0, ours=1e-3, **more):
    """A row as measure makes them, for a machine of 1 PF/s and 4 TB/s."""
    times = {name: {"p20": s, "p50": s, "p80": s} for name, s in (("fastnn", ours), ("torch", ours * ratio))}
    times["fastnn"]["ratio"], times["torch"]["ratio"] = 1, ratio
    return {
        "family": family, "id": id, "dtype": dtype, "direction": direction, "shape": "a shape", "machine": "a GPU",
        "torch": "2.11", "times": times, "errors": {"fastnn": 1e-3, "torch": 1e-3}, "best": "cudnn", "wrong": False,
        "how": {"fastnn": "graph", "torch": "graph"}, "flops": 1e11, "bytes": 1e9, "bandwidth": 4e12, "peak": 1e15,
        "gemm": 8e14, "floor": 2.5e-4,
    } | more  # fmt: skip


def verdicts(rows):
    lines = cuda_table.goals(rows).splitlines()[1:]
    assert len(lines) == len(cuda_table.GOALS)
    return lines


def test_goals_without_rows_are_not_measured():
    assert all(line.endswith("not measured") for line in verdicts([]))


def test_goals_are_met_by_every_row_of_theirs_or_not():
    square, fused, thin, single, dense, window, backward, bits, decode = verdicts(
        [
            row("linear", "square.4096", ratio=0.95),
            row("linear", "square.8192", ratio=0.89),
            row("linear", "fused", ratio=1.3),
            *(row("linear", f"thin.{m}", ratio=1.6) for m in (1, 2, 4, 8, 16)),
            row("linear", "thin.32", ratio=0.5),  # of another goal's rows: none's
            row("linear", "square.4096", "float32", failed="it raised"),
            row("attention", "dense.4k", ratio=0.9),
            row("attention", "dense.4k.causal", ratio=0.9, wrong=True),
            row("attention", "window.1k.16k", ratio=7.0),
            row("attention", "dense.4k", direction="backward", ratio=0.7, deterministic=True),
            row("attention", "odd", direction="training", ratio=0.7, deterministic=False),
            row("attention", "decode.4k", ours=3e-4),
            row("attention", "decode.64k", ours=3.4e-4),
        ]
    )
    assert square.endswith("2 of 2   not met") and "0.89×" in square and "0.95×" in square
    assert fused.endswith("1 of 1   met") and thin.endswith("5 of 5   met")
    assert single.endswith("0 of 1   not met (1 wrong or failed)")
    assert dense.endswith("1 of 2   not met (1 wrong or failed)")
    assert window.endswith("met") and "not met" not in window
    assert backward.endswith("not met") and bits.endswith("not met") and " 0 " in bits
    assert decode.endswith("2 of 2   not met") and "74%" in decode and "83%" in decode


def test_the_tables_of_a_kept_run(tmp_path, capsys):
    rows = [
        row("linear", "square.4096", ratio=2.0, bytes=1e8),
        row("linear", "fused", ratio=0.5, kernels=["void fastnn::cuda::linear_mma_kernel<(int)128, (int)64>(Params)"]),
        row("attention", "decode.4k", flops=1e6, how={"fastnn": "loop: a reason", "torch": "graph"}),
        row("attention", "dense.4k", "float32", failed="RuntimeError: no kernel"),
        {"family": "attention", "id": "odd", "dtype": "float32", "direction": "forward", "shape": "", "running": True},
    ]
    file = tmp_path / "kept.json"
    cuda.write(rows, str(file))
    assert cuda.main(["--show", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "geometric mean 1.00× (0.50–2.00, 2)" in printed
    assert "100.0 TF/s" in printed and "1000 GB/s" in printed and "linear_mma_kernel<128,64>" in printed
    assert "failed: RuntimeError: no kernel" in printed and "failed: not finished" in printed
    assert "(fastnn loop: a reason)" in printed and "copy 4.00 TB/s" in printed and "8192³ 800.00 TF/s" in printed
    assert "5 cases: 3 right, 0 wrong, 2 failed" in printed and "not measured" in printed


def test_short_names_of_kernels():
    assert cuda_table.short("void fastnn::cuda::k<float, (int)128, 64, (bool)1>(fastnn::cuda::P)") == "k<128,64,1>"
    assert cuda_table.short("sm90_xmma_gemm_bf16") == "sm90_xmma_gemm_bf16"
    assert cuda_table.short("fastnn::cuda::merge(P)") == "merge"


def test_tables_need_neither_fastnn_nor_torch(tmp_path):
    file = tmp_path / "kept.json"
    cuda.write([row("linear", "square.4096")], str(file))
    code = (
        "import sys; sys.modules['torch'] = sys.modules['fastnn'] = None\n"
        f"from bench import cuda; sys.exit(cuda.main(['--show', {str(file)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "square.4096" in done.stdout, done.stderr


def test_the_script_does_not_hide_the_package_named_cuda():
    """Run as a script, its folder must not be on the path: cuda-python's package has its name."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench/cuda.py"), "--list", "--only", "thin.1 bfloat16"],
        capture_output=True, text=True, env={"PATH": "", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith("linear thin.1 bfloat16 forward"), done.stderr
    assert importlib.import_module("bench.cuda") is cuda
