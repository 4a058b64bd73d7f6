"""docs/compatibility.md names what the tests prove, and nothing else."""

import importlib.util
import re

import pytest

from tests import conftest


def test_the_page_has_a_row_for_each_mark_and_no_other(request):
    if (
        request.config.option.keyword
        or request.config.option.markexpr
        or request.config.args_source.name != "TESTPATHS"
    ):
        pytest.skip("some tests were left out")
    found = set()
    for line in conftest.PAGE.read_text().splitlines():
        if line.startswith("## "):
            area = line[3:]
        elif line.startswith("| ") and not line.startswith("| what "):
            what, release = line.split(" | ")[:2]
            package = release.split()[0]
            if importlib.util.find_spec(package):  # the tests of what is not installed are not collected
                found.add((area, what[2:], package))
    assert found == request.config.stash[conftest.COLLECTED], "run: make compatibility"


def test_a_row_is_written_only_if_all_its_tests_passed():
    def row(passed):
        return {"tests": ["test_a.py::test_b"], "notes": ["share 97 %"], "passed": passed}

    text = conftest.page({("A", "good", "torch"): row(True), ("A", "bad", "torch"): row(False)})
    assert re.search(r"\| good \| torch [\d.]+ \| `test_a.py::test_b` \| share 97 % \|", text)
    assert "bad" not in text
