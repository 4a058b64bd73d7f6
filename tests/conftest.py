"""What every test starts from: the same random numbers, torch's own thread count, torch as the fallback.

And docs/compatibility.md: one row for each ``@pytest.mark.works(area, what, package="torch")``, written by the tests that
prove it. ``make compatibility`` runs the marked tests and writes the file. A row's last column holds what its tests
recorded with ``record_property(name, value)``. A row of which a test failed, or none ran, is not written.
"""

import importlib.metadata
from pathlib import Path

import pytest
import torch

from tests import torchvision_schemas

torchvision_schemas.declare()


@pytest.fixture(autouse=True)
def _same_start():
    from fastnn import _fallback

    torch.manual_seed(0)
    threads, mode = torch.get_num_threads(), _fallback.get_fallback()
    yield
    torch.set_num_threads(threads)
    _fallback.set_fallback(mode)


@pytest.fixture
def one_thread():
    torch.set_num_threads(1)  # for tests of tiny things


PAGE = Path(__file__).parent.parent / "docs" / "compatibility.md"
HEAD = """\
# What fastnn works with

Written by the tests that prove it (`make compatibility`): each row is a feature or a library, the release it was tested
with, and the tests, which compare with stock torch, forward and backward.
"""
ROWS = pytest.StashKey[dict]()
COLLECTED = pytest.StashKey[set]()


def _rows(item):
    for mark in item.iter_markers("works"):
        area, what = mark.args
        yield area, what, mark.kwargs.get("package", "torch"), f"{item.path.name}::{item.originalname}"


def pytest_addoption(parser):
    parser.addoption("--compatibility", metavar="FILE", help="write the table of the marked tests")


def pytest_collection_modifyitems(config, items):
    config.stash[COLLECTED] = {row[:3] for item in items for row in _rows(item)}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    rows = item.config.stash.setdefault(ROWS, {})
    for area, what, package, test in _rows(item):
        row = rows.setdefault((area, what, package), {"tests": [], "notes": [], "passed": True})
        row["passed"] &= not report.failed
        if report.when == "call" and report.passed:
            row["tests"] += [test] if test not in row["tests"] else []
            row["notes"] += [f"{name} {value}" for name, value in report.user_properties]
    return report


def pytest_sessionfinish(session, exitstatus):
    path = session.config.getoption("--compatibility")
    if path:
        Path(path).write_text(page(session.config.stash.get(ROWS, {})))


def page(rows) -> str:
    text = [HEAD]
    for area in dict.fromkeys(key[0] for key in sorted(rows)):
        text += [f"## {area}\n", "| what | with | proven by | measured |", "|---|---|---|---|"]
        for (at, what, package), row in sorted(rows.items()):
            if at == area and row["passed"] and row["tests"]:
                release = f"{package} {importlib.metadata.version(package).split('+')[0]}"
                tests = ", ".join(f"`{test}`" for test in row["tests"])
                text.append(f"| {what} | {release} | {tests} | {', '.join(dict.fromkeys(row['notes']))} |")
        text.append("")
    return "\n".join(text)
