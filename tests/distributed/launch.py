"""Starts the workers of tests/distributed once and keeps what they found: each start of a process costs seconds."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def torchrun(processes: int, script: Path, *arguments: str, seconds: int) -> str:
    """Run a script under torch.distributed.run; return what it printed, and after so many seconds what it had."""
    where = ["--nnodes=1", f"--nproc-per-node={processes}", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command = [sys.executable, "-m", "torch.distributed.run", *where]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    with subprocess.Popen(
        [*command, str(script), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            return process.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its workers
            try:
                return process.communicate(timeout=30)[0]
            except subprocess.TimeoutExpired:
                process.kill()
                return process.communicate()[0]


@functools.cache
def found(processes: int) -> dict[str, str]:
    """What each check of tests/distributed found on so many processes: "" where all is well, else what was raised."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.jsonl"
        output = torchrun(processes, Path(__file__).with_name("worker.py"), str(results), seconds=300)
        lines = results.read_text().splitlines() if results.exists() else []
    checks = dict(map(json.loads, lines))
    return checks | {"output": output[-4000:]}


def assert_passed(*names: str) -> None:
    """Fail with what the workers, two of them or four, raised; a check that they never came to has failed."""
    for processes in (2, 4):
        checks = found(processes)
        for name in names:
            assert name in checks, f"{name} did not end on {processes}. The workers printed:\n{checks['output']}"
            assert not checks[name], checks[name]
