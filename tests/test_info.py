"""python -m fastnn.info: what it tells, also where the extension is broken."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import fastnn
from fastnn import info

PACKAGE = Path(fastnn.__file__).parent


def run(path, **variables):
    environment = os.environ | {"PYTHONPATH": str(path)} | variables
    command = [sys.executable, "-m", "fastnn.info"]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=path, timeout=120)


def test_what_it_tells():
    found = info.collect()
    rows = dict(found.rows)
    assert set(rows) >= {
        "fastnn",
        "python",
        "system",
        "cpu",
        "torch",
        "threads",
        "extension",
        "kernels",
        "cuda",
        "fallback",
    }
    assert rows["fastnn"].startswith(fastnn.__version__)
    assert fastnn._library._C.cpu_isa() in rows["kernels"]
    assert "openmp" in rows and "environment" in rows


def test_as_a_command():
    result = run(PACKAGE.parent, FASTNN_CPU_ISA="baseline")
    assert result.returncode == 0, result.stdout + result.stderr  # so there is one OpenMP runtime, too
    assert "baseline, of" in result.stdout and "FASTNN_CPU_ISA=baseline" in result.stdout
    result = run(PACKAGE.parent, FASTNN_CPU_ISA="sse9")
    assert result.returncode == 1 and "problem: FASTNN_CPU_ISA=sse9 names no ISA" in result.stdout


def test_with_a_broken_extension(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "fastnn", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    for content in (None, b"no library"):
        if content:
            suffix = "".join(Path(fastnn._library._C.__file__).suffixes)
            (tmp_path / "fastnn" / f"_C{suffix}").write_bytes(content)
        result = run(tmp_path)
        assert result.returncode == 1
        assert "extension" in result.stdout and "does not load" in result.stdout
        assert "problem: fastnn: the compiled extension" in result.stdout and "pip install" in result.stdout
        assert not result.stderr


def test_a_second_openmp_runtime_is_a_problem(monkeypatch):
    assert info.cpu_model()
    monkeypatch.setattr(info, "openmp_runtimes", lambda: ["libgomp.so.1", "libiomp5.so"])
    assert any(p.startswith("2 OpenMP runtimes") for p in info.collect().problems)
