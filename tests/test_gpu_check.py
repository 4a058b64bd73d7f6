"""bench/gpu_check.py without a GPU: whose architecture, one sentence where there is none, and the way on after a crash."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import gpu_check, gpu_progress
from bench.gpu_check import Check, architecture

ROOT = Path(__file__).resolve().parent.parent
MACHINE = {"gpu": "a GPU", "capability": [9, 0], "torch": "2.11", "cuda": "13.0", "home": None}


@pytest.mark.parametrize(
    "capability, expected",
    [((7, 5), "7.5"), ((8, 0), "8.0"), ((8, 6), "8.6"), ((8, 7), "8.6"), ((8, 9), "8.9"), ((9, 0), "9.0a"),
     ((10, 0), "10.0f"), ((10, 3), "10.0f"), ((12, 0), "12.0f"), ((12, 1), "12.0f"), ((7, 0), "7.0"), ((13, 0), "13.0")],
)  # fmt: skip
def test_the_architecture_is_the_gpu_s(capability, expected):
    assert architecture(capability, gpu_check.architectures_of_setup()) == expected


def clean() -> dict:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def test_without_a_gpu_one_sentence_says_so(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench/gpu_check.py"), "--out", str(tmp_path / "out")],
        capture_output=True, text=True, env=clean(), cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("gpu-check: torch ") and "sees no GPU here" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_without_torch_one_sentence_says_so(monkeypatch):
    monkeypatch.setattr(gpu_check, "PROBE", "import no_such_torch")
    with pytest.raises(SystemExit, match="cannot import torch .ModuleNotFoundError: No module named 'no_such_torch'"):
        gpu_check.probe()


@pytest.fixture
def check(tmp_path):
    return Check(tmp_path, MACHINE, time.monotonic() + 60, 10)


def test_a_stage_that_fails_does_not_stop_the_next(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_check, "probe", lambda: MACHINE)
    monkeypatch.setattr(Check, "build", lambda self: (False, "no compiler"))
    monkeypatch.setattr(Check, "test", lambda self: 1 / 0)
    monkeypatch.setattr(Check, "bench", lambda self: (True, "87 cases"))
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 1
    stages = json.loads((tmp_path / "out/summary.json").read_text())["stages"]
    assert [stages[name]["ok"] for name in gpu_check.STAGES] == [False, False, True]
    printed = capsys.readouterr().out
    assert "no compiler" in printed and "ZeroDivisionError" in printed and "87 cases" in printed
    assert gpu_check.main(["--out", str(tmp_path / "out"), "--stage", "bench"]) == 0


def test_the_toolkit_is_where_its_headers_are(tmp_path):
    script, whole, linked = (tmp_path / name for name in ("script", "whole", "linked"))
    for home in (script, whole, linked):
        (home / "bin").mkdir(parents=True)
    (whole / "include").mkdir()
    (whole / "include/cuda_runtime.h").touch()
    (whole / "bin/nvcc").touch()
    (script / "bin/nvcc").touch()
    (linked / "bin/nvcc").symlink_to(whole / "bin/nvcc")
    none = str(tmp_path / "none")
    assert gpu_check.toolkit(str(whole), none) == gpu_check.toolkit(str(linked), none) == str(whole)
    assert gpu_check.toolkit(str(script), str(whole)) == gpu_check.toolkit(None, str(whole)) == str(whole)
    assert gpu_check.toolkit(str(script), none) == str(script) and gpu_check.toolkit(none, none) is None


def test_without_nvcc_the_build_says_so(check, monkeypatch):
    monkeypatch.setattr(gpu_check, "toolkit", lambda home: None)
    assert check.build() == (False, "nvcc was not found; CUDA_HOME says where CUDA's toolkit is")


def test_without_pytest_the_tests_say_so(check, monkeypatch):
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None)
    ok, said = check.test()
    assert not ok and "pytest is not installed" in said


def test_an_extension_without_cuda_is_told(check):
    from fastnn import _C

    ok, said = check.extension("fastnn")
    assert ok is bool(_C.cuda_ops) and ("no CUDA kernels" in said) is not ok


def test_what_hangs_or_crashes_is_ended_and_tried_again(check, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "STALL", 1.0)
    log, progress, statuses = tmp_path / "log", tmp_path / "progress", []
    codes = iter(["import os; os.abort()", "import time; time.sleep(60)", "print('the end')"])

    def command(first):
        return [sys.executable, "-c", f"open({str(progress)!r}, 'a').write('a line'); " + next(codes)]

    assert check.again(command, log, progress, time.monotonic() + 60, statuses.append, os.environ)
    assert statuses == [-6, None, 0] and log.read_text().rstrip().endswith("the end")


def test_what_makes_no_progress_is_not_tried_again(check, tmp_path):
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    statuses = []
    assert not check.again(lambda first: command, tmp_path / "log", tmp_path / "no", check.until, statuses.append, None)
    assert statuses == [3]


TESTS = """
import os, pytest
@pytest.mark.parametrize("i", range(3))
def test_fine(i): pass
def test_crash(): os.abort()
def test_false(): assert 1 == 2, "one is not two"
@pytest.mark.skip(reason="a reason")
def test_skip(): pass
def test_lost(monkeypatch):
    import torch
    from bench import gpu_progress
    gpu_progress.lost = lambda: "an illegal memory access"
    assert False
def test_last(): pass
"""


def test_each_test_s_outcome_is_on_disk_and_a_crash_costs_one(check, tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    progress, statuses = tmp_path / "tests.jsonl", []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.gpu_progress", "-p", "no:cacheprovider", "-c",
               str(tmp_path / "none.ini"), "--rootdir", str(tmp_path), str(tmp_path / "test_some.py")]  # fmt: skip
    (tmp_path / "none.ini").write_text("[pytest]\n")
    environment = os.environ | {"FASTNN_PROGRESS": str(progress), "PYTHONPATH": str(ROOT)}

    def settle(status):
        statuses.append(status)
        gpu_progress.settle(progress, status)

    assert check.again(lambda first: command, tmp_path / "log", progress, check.until, settle, environment), statuses
    found = {test.split("::")[-1]: line for test, line in gpu_progress.read(progress).items()}
    outcomes = {name: line["outcome"] for name, line in found.items()}
    assert outcomes == {
        "test_fine[0]": "passed", "test_fine[1]": "passed", "test_fine[2]": "passed", "test_crash": "crashed (-6)",
        "test_false": "failed", "test_skip": "skipped", "test_lost": "failed", "test_last": "passed",
    }  # fmt: skip
    assert "one is not two" in found["test_false"]["message"] and found["test_skip"]["message"].endswith("a reason")
    assert found["test_lost"]["lost"] == "an illegal memory access"
    assert statuses == [-6, gpu_progress.LOST, 0]


def test_a_test_that_hung_is_told(tmp_path):
    progress = tmp_path / "tests.jsonl"
    gpu_progress.tell(progress, test="a", outcome="passed")
    gpu_progress.tell(progress, test="b", outcome="running")
    gpu_progress.settle(progress, None)
    assert {test: line["outcome"] for test, line in gpu_progress.read(progress).items()} == {"a": "passed", "b": "hung"}


def test_the_tests_leave_time_for_the_benchmark_where_it_follows(tmp_path):
    until = time.monotonic() + 540
    assert Check(tmp_path, MACHINE, until, 150).end_of_tests() == until - 180
    assert Check(tmp_path, MACHINE, until, 150, ("test",)).end_of_tests() == until - 5
    now = time.monotonic()  # a build that took long leaves the tests a part all the same
    assert Check(tmp_path, MACHINE, now + 100, 150).end_of_tests() == pytest.approx(now + 50, abs=1)


def test_the_files_of_the_tests_that_need_a_gpu_are_found():
    assert "tests/test_cuda.py" in gpu_check.marked() and len(gpu_check.marked()) < 8
