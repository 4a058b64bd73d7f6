"""The house keeps its order: where torch may be included, what a stub exports, a test for each file, short files."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = [path for path in sorted((ROOT / "csrc").rglob("*")) if path.suffix in (".cpp", ".h", ".inl", ".cu", ".cuh")]
STUBS = sorted(path for isa in ("baseline", "avx2", "avx512") for path in (ROOT / "csrc/cpu").glob(f"*_{isa}.cpp"))
SOURCES = [
    *CSRC,
    *(path for folder in ("fastnn", "bench", "examples", "tests") for path in (ROOT / folder).rglob("*.py")),
]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", [path for path in CSRC if path.parent.name != "bindings"], ids=name)
def test_torch_is_included_only_in_bindings(path):
    found = re.findall(r'#\s*include\s*[<"]((?:torch|ATen|c10|pybind11|Python)[/.][^>"]*)', path.read_text())
    assert not found


@pytest.mark.parametrize("path", [path for path in CSRC if "include" in path.parts], ids=name)
def test_contracts_include_nothing_of_the_kernels(path):
    assert not re.findall(r'#\s*include\s*[<"](cpu|cuda|bindings)/', path.read_text())
    assert "immintrin" not in path.read_text()


@pytest.mark.parametrize("path", [path for path in CSRC if path.suffix in (".cu", ".cuh")], ids=name)
def test_ptx_stands_in_two_files(path):
    assert path.name in ("ptx.cuh", "ptx_sm90.cuh") or not re.search(r"\basm\b", path.read_text())


def test_each_cuda_kernel_has_a_row_that_says_where_it_has_run():
    cuda = "".join(path.read_text() for path in CSRC if path.suffix in (".cu", ".cuh"))
    section = (
        (ROOT / "bench/results/BENCH.md").read_text().partition("### What has run on a GPU")[2].partition("\n## ")[0]
    )
    told = {kernel for row in section.splitlines() if row[:1] == "|" for kernel in re.findall(r"`(\w+)`", row)}
    assert told == set(re.findall(r"__global__ void[^;{]*?\b(\w+_kernel)\(", cuda))


@pytest.mark.parametrize("path", CSRC, ids=name)
def test_the_sources_are_cxx17(path):
    """torch 2.11 compiles extensions as C++17; later ones ask for C++20, so a slip would not show."""
    code = re.sub(r"//.*", "", path.read_text())
    assert not re.search(r"\b(requires|concept|consteval|constinit|co_await|char8_t)\b|<=>|std::span\b", code)


@pytest.mark.parametrize("path", STUBS, ids=name)
def test_a_stub_is_its_region_and_one_table(path):
    text = path.read_text()
    op, isa = path.stem.rsplit("_", 1)
    lines = [line for line in text.splitlines() if line and not line.startswith("//")]
    includes = [line.split('"')[1] for line in lines if line.startswith("#include")]
    region = [file for file in includes if not file.endswith("_kernels.h")]
    assert (
        region[0] == f"cpu/isa_{isa}.h"
        and region[-1] == "cpu/isa_end.h"
        and all(file.endswith(".inl") for file in region[1:-1])
    ), "the region opens, holds the kernels, closes"
    assert len(lines) <= 12, "a stub is a few lines"
    assert len(re.findall(r"^const \w+ \w+ =", text, re.M)) == 1 and f" {op}_{isa} =" in text


def tool(*command) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("path", STUBS, ids=name)
def test_a_compiled_stub_exports_one_symbol(path):
    """One table; and code that the linker may take from any stub (templates of the standard library, Scratch) is code
    for any CPU."""
    objects = list((ROOT / "build").glob(f"temp.*/csrc/cpu/{path.stem}.o"))
    if not objects or not shutil.which("nm") or not shutil.which("objdump"):
        pytest.skip("not built here, or no binutils")
    newest = max(objects, key=lambda file: file.stat().st_mtime)
    symbols = [line.split(maxsplit=2) for line in tool("nm", "-g", "--defined-only", newest).splitlines()]
    strong = [symbol for _, kind, symbol in symbols if kind not in "VWu"]
    assert len(strong) == 1 and strong[0].endswith(f"{path.stem}E"), strong
    isa = path.stem.rsplit("_", 1)[1]
    if platform.machine() != "x86_64" or isa == "baseline":
        return
    own = f"6fastnn3cpu{len(isa)}{isa}"  # in the ISA's namespace: no other stub has it
    shared = [symbol for _, kind, symbol in symbols if kind == "W" and own not in symbol]
    code = tool("objdump", "-d", "--no-show-raw-insn", newest) if shared else ""
    for function in code.split("\n\n"):
        if any(f"<{symbol}>:" in function for symbol in shared):
            found = re.search(r"\t(v[a-z0-9]+) .*%[xyz]mm", function)
            assert not found, f"{function.splitlines()[0]} uses {found.group(1)}: it would crash a CPU without it"


@pytest.mark.parametrize("path", [p for p in CSRC if p.suffix in (".inl", ".cuh")], ids=name)
def test_a_kernel_file_opens_with_what_it_does(path):
    head = path.read_text().split("#pragma once")[0]
    assert head.startswith("// "), "the formula, the tiling, what bounds it"
    assert len(head.splitlines()) <= 22, "a head comment has at most 20 lines"


LIMITS = {
    "csrc/bindings": 450,
    "csrc/cpu": 500,
    "csrc/cuda": 500,
    "csrc/include": 250,
    "fastnn/functional": 300,
    "fastnn": 450,
}


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_files_are_short(path):
    limit = next((lines for folder, lines in LIMITS.items() if name(path).startswith(folder)), 800)
    assert len(path.read_text().splitlines()) <= limit


def test_each_file_of_the_package_has_its_test():
    """fastnn/functional/linear.py and fastnn/nn/linear.py share tests/test_linear.py: one stem, one test."""
    stems = {path.stem.lstrip("_") for path in (ROOT / "fastnn").rglob("*.py") if path.stem != "__init__"}
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    assert not stems - tests, f"no tests/test_<stem>.py for {sorted(stems - tests)}"


def test_no_file_is_named_utils():
    assert not [name(path) for path in SOURCES if "util" in path.stem or "helper" in path.stem]


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_no_path_of_a_machine(path):
    if path == Path(__file__).resolve():
        return
    assert not re.findall(r"""["' (=](/home/|/work/|/root/|/Users/|/opt/)""", path.read_text())


def test_no_flag_that_ties_the_build_to_this_machine():
    text = (ROOT / "setup.py").read_text() + (ROOT / "Makefile").read_text()
    assert "-march" not in text and "-std=" not in text and "-ffast-math" not in text
