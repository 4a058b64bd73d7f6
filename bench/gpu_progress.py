"""A plugin of pytest for bench/gpu_check.py: each test's outcome is on disk before the next one begins.

A kernel that reads out of bounds ends a GPU for its process. So a test that failed is followed by a look at the device:
where it is lost the process ends, and the next one, which finds the file, runs what is left.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

LOST = 3
FILE = Path(os.environ.get("FASTNN_PROGRESS", os.devnull))
_found: dict[str, dict] = {}


def read(file: Path) -> dict[str, dict]:
    """Return what is known of each test, the last line of each; one that began and has no outcome is ``running``."""
    lines = file.read_text().splitlines() if file.exists() else []
    told = [json.loads(line) for line in lines if line.endswith("}")]
    return {line["test"]: line for line in told}


def tell(file: Path, **line) -> None:
    with file.open("a") as out:
        out.write(json.dumps(line) + "\n")


def settle(file: Path, status: int | None) -> None:
    """Tell of the test that ran when its process ended with that status; None: it was ended, as it hung."""
    for test in [test for test, line in read(file).items() if line["outcome"] == "running"]:
        tell(file, test=test, outcome="hung" if status is None else f"crashed ({status})")


def lost() -> str | None:
    """Return why the device cannot be used any more, or None."""
    try:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception as failure:
        return str(failure).splitlines()[0]
    return None


def pytest_collection_modifyitems(config, items):
    known = read(FILE)
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in known])
    items[:] = [item for item in items if item.nodeid not in known]


def pytest_runtest_logstart(nodeid, location):
    _found[nodeid] = {"outcome": "passed", "seconds": 0.0}
    tell(FILE, test=nodeid, outcome="running")


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report):
    found = _found[report.nodeid]
    found["seconds"] = round(found["seconds"] + report.duration, 3)
    if report.outcome != "passed" and found["outcome"] == "passed":
        found["outcome"] = report.outcome
        text = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr or "")
        found["message"] = "\n".join(text.splitlines()[-12:])[-1500:]


def pytest_runtest_logfinish(nodeid, location):
    found = _found.pop(nodeid)
    reason = lost() if found["outcome"] == "failed" else None
    if reason:
        found["lost"] = reason
    tell(FILE, test=nodeid, **found)
    if reason:
        print(f"\nthe device is lost to this process: {reason}\n{found.get('message', '')}", flush=True)
        sys.stderr.flush()
        os._exit(LOST)
