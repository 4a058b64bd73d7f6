"""The CUDA kernels run on the CPU: the same text, compiled by the host's compiler against tests/cuda_host/shim.

`make check-cuda` runs every case under sanitizers and compiles for every architecture; here a part of the cases runs
without, so that a slip shows at once.
"""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CXX = os.environ.get("CXX", "g++")


@pytest.mark.skipif(
    platform.system() != "Linux" or not shutil.which(CXX) or not shutil.which("make"),
    reason="needs Linux, g++ and make",
)
def test_cuda_kernels_on_the_cpu():
    jobs = f"-j{min(os.cpu_count() or 1, 4)}"
    command = ["make", "-f", "tests/cuda_host/Makefile", jobs, "BUILD=build/cuda-quick", "SANITIZE=", "EVERY=4", "host"]
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS", "LD_PRELOAD"))
    }
    done = subprocess.run([*command, f"CXX={CXX}"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
