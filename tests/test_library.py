"""The extension in a process: one OpenMP runtime, forks, the ISA asked for, one clear error when it is broken."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastnn
from fastnn import _library, functional, testing

ROOT = Path(__file__).resolve().parent.parent
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def python(code: str, timeout: float = 240, **environment) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter that sees this fastnn."""
    environment = os.environ | {"PYTHONPATH": str(Path(fastnn.__file__).parent.parent)} | environment
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, env=environment, cwd="/"
    )


WORK = """
import torch, fastnn
from fastnn.functional import linear
torch.set_num_threads(2)
x, w = torch.randn(256, 512), torch.randn(512, 512)
y = linear(x, w)
"""


@LINUX
def test_one_openmp_runtime_in_the_process():
    found = python(WORK + "print(open('/proc/self/maps').read())")
    assert found.returncode == 0, found.stderr
    runtimes = set(re.findall(r"\S*/(lib(?:gomp|iomp5|omp)[^/\s]*\.so[^/\s]*)", found.stdout))
    assert len(runtimes) == 1, runtimes


def test_threads_really_run():
    """A build without OpenMP, or a pool of its own, would run on one thread or start more than torch's."""
    code = WORK + (
        "import os\n"
        "one = len(os.listdir('/proc/self/task'))\n"
        "torch.mm(x, w); two = len(os.listdir('/proc/self/task'))\n"
        "print(one, two)"
    )
    found = python(code, OMP_NUM_THREADS="2")
    assert found.returncode == 0, found.stderr
    before, after = map(int, found.stdout.split())
    assert before == after >= 2


@LINUX
def test_a_forked_child_computes_and_does_not_hang():
    code = WORK + (
        "import os, sys\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(0 if (linear(x, w).numpy() == y.numpy()).all() else 3)  # torch.equal would hang here\n"
        "_, status = os.waitpid(child, 0)\n"
        "assert torch.equal(linear(x, w), y)\n"
        "sys.exit(os.waitstatus_to_exitcode(status))"
    )
    assert python(code, timeout=120).returncode == 0


class Dataset(torch.utils.data.Dataset):
    """Items that a worker process computes with a kernel."""

    def __init__(self):
        self.weight = testing.integers((64, 64))

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return functional.linear(torch.full((300, 64), float(index)), self.weight)


@LINUX
def test_dataloader_workers_compute():
    dataset = Dataset()
    expected = torch.stack([dataset[i] for i in range(8)])  # the parent has used its threads before it forks
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=4, num_workers=2, timeout=120, multiprocessing_context="fork"
    )
    assert torch.equal(torch.cat(list(loader)), expected)


@pytest.mark.parametrize("isa", testing.available_isas())
def test_the_isa_of_the_environment_is_used(isa):
    found = python("from fastnn._library import _C; print(_C.cpu_isa())", FASTNN_CPU_ISA=isa)
    assert found.stdout.strip() == isa, found.stderr


def test_the_best_isa_is_the_default():
    environment = {"FASTNN_CPU_ISA": ""}
    assert (
        python("from fastnn._library import _C; print(_C.cpu_isa())", **environment).stdout.strip()
        == (testing.available_isas()[-1])
    )


def test_an_isa_can_be_forced_and_given_back():
    before = _library._C.cpu_isa()
    for isa in testing.available_isas():
        with testing.forced_isa(isa):
            assert _library._C.cpu_isa() == isa
    assert _library._C.cpu_isa() == before
    with pytest.raises(ValueError, match="mmx"):
        _library._C._set_cpu_isa("mmx")


def package_without(tmp_path: Path, extension: bytes | None) -> str:
    """Copy the Python files, with no extension or with one made of these bytes; return the folder to import from."""
    source, target = Path(fastnn.__file__).parent, tmp_path / "fastnn"
    for path in source.rglob("*.py"):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    if extension is not None:
        (target / Path(_library._C.__file__).name).write_bytes(extension)
    return str(tmp_path)


@pytest.mark.parametrize("extension", [None, b"", b"not a library"], ids=["missing", "empty", "broken"])
def test_an_extension_that_does_not_load_gives_one_clear_error(tmp_path, extension):
    found = python("import fastnn", PYTHONPATH=package_without(tmp_path, extension))
    assert found.returncode == 1
    last = found.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: fastnn: ") and "pip install --no-build-isolation" in last
    assert "circular" not in last, "not the fault"


def test_importing_fastnn_changes_nothing_in_torch():
    code = """
import torch, torch.nn.functional as F
def picture():
    classes = torch.nn.Linear, torch.nn.Conv2d, torch.nn.LSTM, torch.nn.GRU, torch.nn.MultiheadAttention
    spaces = (torch, F, torch.nn, torch.Tensor, *classes)
    functions = {(i, k): id(v) for i, space in enumerate(spaces) for k, v in vars(space).items() if callable(v)}
    return functions, (torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_dtype())
before = picture()
import fastnn
after = picture()
changed = [k for k in before[0] if before[0][k] != after[0].get(k)]
assert not changed and before[1] == after[1], changed
"""
    found = python(code)
    assert found.returncode == 0, found.stderr


def test_import_needs_nothing_but_torch():
    code = """
import sys
class Only:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('sklearn', 'transformers', 'onnx', 'onnxruntime', 'pytest', 'scipy'):
            raise ImportError(name)
sys.meta_path.insert(0, Only())
import fastnn
"""
    found = python(code)
    assert found.returncode == 0, found.stderr
