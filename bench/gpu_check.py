"""On a machine with a GPU: build the extension for it, run every test marked cuda, run bench/cuda.py. (make gpu-check)

    python bench/gpu_check.py --out DIR                 all of it, within --limit seconds (540)
    python bench/gpu_check.py --out DIR --stage test    one of build, test, bench

Writes to DIR: build.log, tests.log, tests.jsonl (a line a test), bench.log, bench.json, bench.txt (the tables and the
goals), summary.json. Each is written as things happen. A stage that fails is told, and the next ones run all the same;
the exit status is then 1. What crashes or hangs costs one test or one case: another process goes on behind it.

It needs nothing but what is there: a torch that sees the GPU, nvcc and a C++ compiler to build, pytest to test. In the
environment: TORCH_CUDA_ARCH_LIST (the GPU's own), MAX_JOBS (every core), FASTNN_CXXFLAGS (-O1: the CPU kernels are not
timed here, and compile in a quarter of the time; the next make compiles them again as they should be).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # in place of this folder, whose cuda.py would stand before the package of that name
    sys.path[0] = str(ROOT)

from bench import cuda_table, gpu_progress  # noqa: E402

STAGES = ("build", "test", "bench")
STALL = 90.0  # seconds without a line of progress after which a process is taken to hang
STARTS = 25  # processes of a stage at most
PROBE = """
import json, torch
from torch.utils.cpp_extension import CUDA_HOME
there = torch.version.cuda is not None and torch.cuda.is_available()
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda, "home": CUDA_HOME,
                  "capability": torch.cuda.get_device_capability() if there else None,
                  "gpu": torch.cuda.get_device_name() if there else None}))
"""


def main(argv: list[str] | None = None) -> int:
    """Run the stages and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/gpu-check"), metavar="DIR")
    parser.add_argument("--stage", choices=STAGES)
    parser.add_argument("--limit", type=float, default=540.0, metavar="SECONDS", help="of all stages together")
    parser.add_argument("--budget", type=float, default=150.0, metavar="SECONDS", help="of the benchmark")
    options = parser.parse_args(argv)
    machine = probe()
    options.out.mkdir(parents=True, exist_ok=True)
    stages = STAGES if options.stage is None else (options.stage,)
    check = Check(options.out.resolve(), machine, time.monotonic() + options.limit, options.budget, stages)
    print(
        f"{machine['gpu']}, capability {'.'.join(map(str, machine['capability']))}; torch {machine['torch']}",
        flush=True,
    )
    for stage in stages:
        check.stage(stage)
    print("\n" + check.told(), flush=True)
    return int(not all(stage["ok"] for stage in check.summary["stages"].values()))


def probe() -> dict:
    """Return what torch says of the machine; where that is no GPU, end with one sentence."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, cwd=ROOT)
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        why = (done.stderr.strip().splitlines() or ["no word of why"])[-1]
        raise SystemExit(f"gpu-check: {sys.executable} cannot import torch ({why}).") from None
    if found["capability"] is None:
        raise SystemExit(
            f"gpu-check: torch {found['torch']} sees no GPU here. It needs a machine that has one, and a torch for it "
            "(VENV= takes your own in place of .venv's)."
        )
    return found


def architecture(capability: tuple[int, int], known: str) -> str:
    """Return which of setup.py's architectures (``known``) is that GPU's: its own, its family's, or the nearest below."""
    major, minor = capability
    entries = [(int(m[1]), int(m[2]), m[3], m[0]) for m in re.finditer(r"(\d+)\.(\d)([af]?)(?:\+PTX)?", known)]
    own = [text for a, b, _, text in entries if (a, b) == (major, minor)]
    family = [text for a, b, suffix, text in entries if a == major and b <= minor and suffix == "f"]
    below = [text for a, b, suffix, text in entries if a == major and b <= minor and not suffix]
    return (own or family or below[::-1] or [f"{major}.{minor}"])[0].removesuffix("+PTX")


def architectures_of_setup() -> str:
    return re.search(r'^CUDA_ARCHS = "(.*?)"', (ROOT / "setup.py").read_text(), re.M)[1]


def toolkit(home: str | None, usual: str = "/usr/local/cuda") -> str | None:
    """Return where CUDA's toolkit is: ``home``, unless the nvcc there is a link or a script and the headers lie elsewhere."""
    found = [Path(home), (Path(home) / "bin" / "nvcc").resolve().parent.parent] if home else []
    found = [path for path in (*found, Path(usual)) if (path / "bin" / "nvcc").exists()]
    whole = [path for path in found if (path / "include" / "cuda_runtime.h").exists()]
    return str((whole or found)[0]) if found else None


def marked() -> list[str]:
    """Return the files that hold tests marked cuda: the others may want packages that are not here."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [path.relative_to(ROOT).as_posix() for path in files if "pytest.mark.cuda" in path.read_text()]


class Check:
    """The stages, and what is written of them.

    Args:
        out: the folder that everything is written to.
        machine: what :func:`probe` found.
        until: the time (monotonic) when all must be over.
        budget: seconds of the benchmark.
        stages: those that will be run: where the benchmark is not among them, the tests have its time too.
    """

    def __init__(self, out: Path, machine: dict, until: float, budget: float, stages: tuple[str, ...] = STAGES):
        self.out, self.machine, self.until, self.budget, self.stages = out, machine, until, budget, stages
        self.summary: dict = {"machine": machine, "stages": {}}

    def left(self) -> float:
        return self.until - time.monotonic()

    def stage(self, name: str) -> None:
        """Run a stage, whatever happens in it."""
        print(f"\n== {name}, {self.left():.0f} s left", flush=True)
        start = time.monotonic()
        try:
            ok, said = getattr(self, name)()
        except Exception as failure:
            ok, said = False, f"{type(failure).__name__}: {failure}"
        self.summary["stages"][name] = {"ok": ok, "said": said, "seconds": round(time.monotonic() - start, 1)}
        (self.out / "summary.json").write_text(json.dumps(self.summary, indent=1) + "\n")
        print(f"{name}: {'ok' if ok else 'FAILED'}: {said}", flush=True)

    def told(self) -> str:
        lines = []
        for name, stage in self.summary["stages"].items():
            lines.append(f"{name:6} {'ok' if stage['ok'] else 'FAILED':7} {stage['seconds']:6.1f} s  {stage['said']}")
        return "\n".join([*lines, f"written to {self.out}"])

    # ---- stages: each returns whether all is well, and one line

    def build(self) -> tuple[bool, str]:
        home = toolkit(self.machine["home"])
        if home is None:
            return False, "nvcc was not found; CUDA_HOME says where CUDA's toolkit is"
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or architecture(
            tuple(self.machine["capability"]), architectures_of_setup()
        )
        environment = os.environ | {
            "FASTNN_CUDA": "1",
            "CUDA_HOME": home,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",  # ninja may lie there
            "TORCH_CUDA_ARCH_LIST": archs,
            "MAX_JOBS": os.environ.get("MAX_JOBS") or str(os.cpu_count() or 4),
            "FASTNN_CXXFLAGS": os.environ.get("FASTNN_CXXFLAGS", "-O1"),
        }
        (ROOT / "build" / ".built").unlink(missing_ok=True)  # the next make compiles with its own flags
        log = self.out / "build.log"
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        status = self.watched(command, log, self.left() - 10, environment=environment)
        text = log.read_text(errors="replace")
        told = f"for {archs}, MAX_JOBS={environment['MAX_JOBS']}"
        if status != 0:
            errors = [line for line in text.splitlines() if re.search(r"\berror\b|Error:|FAILED|^fastnn: ", line)]
            print("\n".join(errors[:20] or text.splitlines()[-20:]))
            return False, f"{told}: {'out of time' if status is None else f'status {status}'}, see build.log"
        return self.extension(told)

    def extension(self, told: str = "") -> tuple[bool, str]:
        """Whether the extension loads and holds CUDA kernels."""
        code = "from fastnn import _C; print(' '.join(_C.cuda_ops))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            return False, f"{told}: the extension does not load: {(done.stderr.strip().splitlines() or ['?'])[-1]}"
        ops = done.stdout.split()
        return bool(ops), f"{told}: CUDA kernels of {', '.join(ops)}" if ops else f"{told}: no CUDA kernels in it"

    def test(self) -> tuple[bool, str]:
        if importlib.util.find_spec("pytest") is None:
            return False, f"pytest is not installed for {sys.executable} (it needs pytest>=8)"
        ok, said = self.extension("fastnn")
        if not ok:
            return False, said
        log, progress = self.out / "tests.log", self.out / "tests.jsonl"
        progress.unlink(missing_ok=True)
        log.unlink(missing_ok=True)
        options = ["-q", "-m", "cuda", "-p", "bench.gpu_progress", "--tb=short"]
        command = [sys.executable, "-m", "pytest", *options, *marked()]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"FASTNN_PROGRESS": str(progress), "PYTHONPATH": path}
        settle = partial(gpu_progress.settle, progress)
        finished = self.again(lambda first: command, log, progress, self.end_of_tests(), settle, environment)
        found = gpu_progress.read(progress)
        counts = Counter(line["outcome"] for line in found.values())
        bad = [test for test, line in found.items() if line["outcome"] not in ("passed", "skipped")]
        for test in bad[:30]:
            print(f"  {found[test]['outcome']}: {test}\n    {found[test].get('message', '').splitlines()[-1:]}")
        said = (
            ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()) or "no test ran, see tests.log"
        )
        return finished and not bad and counts["passed"] > 0, said + ("" if finished else "; not all of them")

    def end_of_tests(self) -> float:
        """Return the time (monotonic) until which tests may run."""
        if "bench" not in self.stages:
            return self.until - 5
        return max(self.until - self.budget - 30, time.monotonic() + min(90.0, self.left() / 2))

    def bench(self) -> tuple[bool, str]:
        ok, said = self.extension("fastnn")
        if not ok:
            return False, said
        log, rows = self.out / "bench.log", self.out / "bench.json"
        log.unlink(missing_ok=True)
        rows.unlink(missing_ok=True)
        until = min(time.monotonic() + self.budget + 20, self.until - 10)
        script = [sys.executable, "bench/cuda.py"]

        def command(first):
            seconds = max(1.0, until - 20 - time.monotonic())
            return [*script, "--json", str(rows), "--budget", f"{seconds:.0f}", *([] if first else ["--resume"])]

        finished = self.again(command, log, rows, until, lambda status: None, os.environ)
        if not rows.exists():
            return False, "no case was measured, see bench.log"
        shown = subprocess.run([*script, "--show", str(rows)], capture_output=True, text=True, cwd=ROOT)
        (self.out / "bench.txt").write_text(shown.stdout + shown.stderr)
        print(shown.stdout + shown.stderr, flush=True)
        cases = json.loads(rows.read_text())
        bad = sum(not cuda_table.right(row) for row in cases)
        said = f"{len(cases)} cases, {bad} failed or wrong" + ("" if finished else "; not all of them")
        return bool(cases) and not bad and shown.returncode == 0, said

    # ---- processes

    def again(self, command: Callable, log: Path, progress: Path, until: float, settle: Callable, environment) -> bool:
        """Run a command, and again while it ends before its time and got further; whether it came to its end.

        Args:
            command: makes the command, told whether it is the first.
            progress: the file that grows or changes as the command gets on.
            settle: called after each process with its status, None if it hung or its time was up.
        """
        for start in range(STARTS):
            before = progress.read_bytes() if progress.exists() else None
            status = self.watched(command(start == 0), log, until - time.monotonic(), progress, environment)
            settle(status)
            if status in (0, 1, 5):  # 5: nothing was left
                return True
            if time.monotonic() > until - 15:
                return False
            print(f"  ended with {status}: another process goes on", flush=True)
            if (progress.read_bytes() if progress.exists() else None) == before:
                return False
        return False

    def watched(self, command, log: Path, seconds: float, progress: Path | None = None, environment=None) -> int | None:
        """Run a command, its output to a log, and return its status; None where it was ended, late or hanging."""
        if seconds < 5:
            return None
        with log.open("a") as out:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
            end, moved, seen = time.monotonic() + seconds, time.monotonic(), None
            while True:
                try:
                    return process.wait(0.3)
                except subprocess.TimeoutExpired:
                    pass
                if progress and progress.exists() and (now := progress.stat().st_mtime_ns) != seen:
                    moved, seen = time.monotonic(), now
                if time.monotonic() > end or (progress and time.monotonic() - moved > STALL):
                    os.killpg(process.pid, signal.SIGKILL)  # its own group, with the compilers it started
                    process.wait()
                    out.write(f"\ngpu-check: ended after {seconds:.0f} s or {STALL:.0f} s without progress\n")
                    return None


if __name__ == "__main__":
    raise SystemExit(main())
