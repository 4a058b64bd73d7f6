"""What a new user does: the commands of the README, a wheel in a new environment, an install without torch."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def run(*command, **options) -> subprocess.CompletedProcess:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """A wheel made of this tree as ``pip wheel`` makes it; objects that are compiled already are not compiled again."""
    folder = tmp_path_factory.mktemp("wheel")
    environment = os.environ | {"MAX_JOBS": os.environ.get("MAX_JOBS", "2"), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", folder, ROOT,
        env=environment)  # fmt: skip
    (file,) = folder.glob("fastnn-*.whl")
    return file


def test_a_wheel_installs_and_imports_in_a_new_environment(wheel, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env/bin/python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    # torch and what it needs come from here: a path file instead of gigabytes of copies
    (site / "torch_from_outside.pth").write_text("\n".join(sysconfig.get_path(name) for name in ("purelib", "platlib")))
    # Away from this tree: where pip sees its metadata on the path, it takes fastnn for installed.
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run(python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", wheel, cwd=tmp_path, env=clean)
    code = (
        "import fastnn, torch; from fastnn import functional as f\n"
        "assert f.linear(torch.ones(2, 3), torch.ones(4, 3)).eq(3).all()\n"
        "assert 'fastnn' in torch._dynamo.list_backends()\n"
        "print(fastnn.__file__, fastnn.__version__)"
    )
    file, version = run(python, "-c", code, cwd=tmp_path, env=clean).stdout.split()
    assert Path(file).is_relative_to(site)
    assert version in wheel.name


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    import zipfile

    names = zipfile.ZipFile(wheel).namelist()
    folders = {name.split("/")[0] for name in names}
    assert folders == {"fastnn", next(name for name in folders if name.endswith(".dist-info"))}
    assert sum(name.endswith(".so") for name in names) == 1
    for path in (ROOT / "fastnn").rglob("*.py"):
        assert path.relative_to(ROOT).as_posix() in names


def test_without_torch_setup_says_one_line(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "torch.utils.cpp_extension", None)
    monkeypatch.setattr(sys, "argv", ["setup.py", "--version"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path("setup.py")
    assert "pip install --no-build-isolation ." in str(stop.value) and "\n" not in str(stop.value)


def test_an_old_setuptools_is_told_in_one_line(monkeypatch):
    import setuptools

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "__version__", "65.5.0")
    with pytest.raises(SystemExit, match=r"^fastnn: building needs setuptools >= 77, and this is 65.5.0. Run: pip"):
        runpy.run_path("setup.py")


def test_versions_agree():
    import fastnn

    assert re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M).group(1) == fastnn.__version__


def commands() -> list[str]:
    """Every line of the README and CONTRIBUTING that starts with make."""
    text = README + (ROOT / "CONTRIBUTING.md").read_text()
    return sorted(set(re.findall(r"^(make [^#\n]*?)\s*(?:#.*)?$", text, re.M)))


@pytest.mark.skipif(not shutil.which("make"), reason="no make here")
@pytest.mark.parametrize("command", [*commands(), "make lint", "make clean", "make test VENV= PYTHON=python3"])
def test_make_knows_what_the_documents_name(command):
    clean = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "VENV")}
    run("bash", "-c", command.replace("make", "make -n", 1), cwd=ROOT, env=clean)


def test_the_readme_names_both_commands():
    assert {"make demo", "make test"} <= set(commands())
    assert "pip install --no-build-isolation ." in README


@pytest.mark.parametrize("block", re.findall(r"^```python\n(.*?)^```", README, re.M | re.S))
def test_the_readmes_example_runs(block):
    exec(compile(block, "README.md", "exec"), {})


def test_links_of_the_documents_lead_somewhere():
    for document in ("README.md", "CONTRIBUTING.md", "csrc/README.md", "bench/results/BENCH.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / document).read_text()):
            assert (ROOT / document).parent.joinpath(target).exists(), f"{document}: {target}"


def test_ci_runs_make_test():
    text = (ROOT / ".ci/run").read_text()
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert re.findall(r"^make .*", text, re.M) == ["make test </dev/null"]


def test_cuda_is_built_where_it_can_be_and_refused_in_words():
    """FASTNN_CUDA: what setup.py says before it builds anything."""
    import torch

    def asked(value):
        command = (sys.executable, "setup.py", "--version")
        return subprocess.run(
            command, cwd=ROOT, env=os.environ | {"FASTNN_CUDA": value}, capture_output=True, text=True
        )

    assert "FASTNN_CUDA must be 0, 1 or auto; got 'yes'" in asked("yes").stderr
    off = asked("0")
    assert off.returncode == 0 and "builds the CPU kernels alone: FASTNN_CUDA is 0." in off.stdout
    if torch.version.cuda is None:
        assert "FASTNN_CUDA is 1, but torch" in asked("1").stderr
        assert "is built without CUDA." in asked("auto").stdout


# ---- what setup.py says and hands to the compilers, before anything is compiled --------------------------------------


@pytest.fixture
def set_up(monkeypatch, tmp_path):
    """Runs setup.py with a torch of our making and no build; returns what it handed to setuptools."""
    import setuptools
    import torch
    from torch.utils import cpp_extension

    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    (home / "bin/nvcc").write_text("")

    def run_it(cuda=None, home=home, **environment):
        handed = {}
        for name in ("FASTNN_CUDA", "TORCH_CUDA_ARCH_LIST", "FASTNN_CXXFLAGS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", None if home is None else str(home))
        monkeypatch.setattr(setuptools, "setup", lambda **options: handed.update(options))
        runpy.run_path("setup.py")
        (extension,) = handed["ext_modules"]
        return extension

    return run_it


def is_cuda(extension) -> bool:
    return any(source.endswith(".cu") for source in extension.sources)


def generated(extension) -> list[str]:
    return [flag for flag in extension.extra_compile_args["nvcc"] if flag.startswith("-gencode")]


def test_a_torch_without_cuda_gets_the_cpu_kernels_and_a_reason(set_up, capsys):
    extension = set_up(cuda=None)
    assert not is_cuda(extension) and "-DFASTNN_CUDA" not in extension.extra_compile_args
    assert re.fullmatch(
        r"fastnn: builds the CPU kernels alone: torch \S+ is built without CUDA\.\n", capsys.readouterr().out
    )
    with pytest.raises(SystemExit, match=r"^fastnn: FASTNN_CUDA is 1, but torch \S+ is built without CUDA\.$"):
        set_up(cuda=None, FASTNN_CUDA="1")


@pytest.mark.parametrize("where", ["none", "empty"])
def test_without_nvcc_the_cpu_kernels_are_built_and_a_reason_is_given(set_up, capsys, tmp_path, where):
    home = None if where == "none" else tmp_path  # a folder without bin/nvcc
    assert not is_cuda(set_up(cuda="13.0", home=home))
    assert "CPU kernels alone: nvcc was not found (CUDA_HOME says where it is)." in capsys.readouterr().out
    with pytest.raises(SystemExit, match="FASTNN_CUDA is 1, but nvcc was not found"):
        set_up(cuda="13.0", home=home, FASTNN_CUDA="1")


@pytest.mark.parametrize("asked", ["auto", "1", None])
def test_where_torch_and_nvcc_are_there_cuda_is_built(set_up, capsys, asked):
    extension = set_up(cuda="13.0", **({} if asked is None else {"FASTNN_CUDA": asked}))
    assert is_cuda(extension) and capsys.readouterr().out == ""
    assert {"csrc/cuda/linear.cu", "csrc/cuda/attention.cu", "csrc/cpu/linear.cpp"} <= set(extension.sources)
    assert "-DFASTNN_CUDA" in extension.extra_compile_args["cxx"]
    assert generated(extension) == [
        f"-gencode=arch=compute_{number},code={kind}_{number}"
        for number, kind in (("75", "sm"), ("80", "sm"), ("80", "compute"), ("86", "sm"), ("89", "sm"), ("90a", "sm"),
                             ("100f", "sm"), ("120f", "sm"))
    ]  # fmt: skip


def test_cuda_can_be_refused(set_up, capsys):
    assert not is_cuda(set_up(cuda="13.0", FASTNN_CUDA="0"))
    assert "CPU kernels alone: FASTNN_CUDA is 0." in capsys.readouterr().out
    with pytest.raises(SystemExit, match="FASTNN_CUDA must be 0, 1 or auto; got 'on'"):
        set_up(cuda="13.0", FASTNN_CUDA="on")


@pytest.mark.parametrize(
    "text, numbers",
    [
        ("9.0a", ["sm_90a"]),
        ("8.0+PTX", ["sm_80", "compute_80"]),
        ("8.0;9.0a+PTX", ["sm_80", "sm_90a", "compute_90a"]),
        (" 7.5  10.0f; 12.1 ", ["sm_75", "sm_100f", "sm_121"]),
    ],
)
def test_the_architectures_asked_for(set_up, text, numbers):
    found = generated(set_up(cuda="13.0", TORCH_CUDA_ARCH_LIST=text))
    assert found == [f"-gencode=arch=compute_{n.split('_')[1]},code={n}" for n in numbers]


def test_no_architecture_asked_for_is_all_of_them(set_up):
    every = generated(set_up(cuda="13.0"))
    assert generated(set_up(cuda="13.0", TORCH_CUDA_ARCH_LIST="  ")) == every and len(every) == 8


@pytest.mark.parametrize("text", ["90", "sm_90", "9.0b", "9.0 +PTX", "native", "9.0,8.0"])
def test_architectures_that_are_none_are_refused(set_up, text):
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST must list numbers such as 8.0, 9.0a or 8.6.PTX; got '"):
        set_up(cuda="13.0", TORCH_CUDA_ARCH_LIST=text)


def test_flags_of_the_caller_come_last(set_up):
    assert set_up(FASTNN_CXXFLAGS="-O1 -DX='a b'").extra_compile_args[-2:] == ["-O1", "-DX=a b"]
    assert set_up(cuda="13.0", FASTNN_CXXFLAGS="-O1").extra_compile_args["cxx"][-2:] == ["-O1", "-DFASTNN_CUDA"]
