"""torch.export and AOTInductor: programs for any batch and length, with fastnn's ops or without; and docs/deploy.md."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim, export

import fastnn
from fastnn import functional

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::FutureWarning")]
AUTO, DYNAMIC = Dim.AUTO, Dim.DYNAMIC


def works(what, package="torch"):
    return pytest.mark.works("Leaving Python", what, package=package)


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, query, key, value):
        return functional.scaled_dot_product_attention(query, key, value, **self.options)


class SelfAttention(nn.Module):
    def __init__(self, need_weights):
        super().__init__()
        self.attention, self.need_weights = fastnn.nn.MultiheadAttention(16, 2, batch_first=True), need_weights

    def forward(self, x):
        return self.attention(x, x, x, need_weights=self.need_weights)[0]


def convolutions():
    return nn.Sequential(
        fastnn.nn.Conv2d(3, 8, 3, padding="same", activation="relu"),
        fastnn.nn.Conv2d(8, 4, 3, stride=2, padding=(1, 2)),
        fastnn.nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", groups=2),
    )


def frozen():
    stock = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.GELU()).eval()
    return fastnn.accelerate(stock, freeze=True)


def heads(kv_heads=4):
    return lambda n, length: [torch.randn(n, h, length, 8) for h in (4, kv_heads, kv_heads)]


def rows(*features):
    return lambda n, length: [torch.randn(n, length, *features)]


def images(n, length):
    return [torch.randn(n, 3, length + 4, length + 6)]


ROWS, IMAGES = {0: DYNAMIC, 1: DYNAMIC}, {0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC}
HEADS = ({0: AUTO, 2: AUTO},) * 3
CASES = {
    "linear": (lambda: fastnn.nn.Linear(8, 4, activation="gelu"), rows(8), (ROWS,)),
    "conv2d": (convolutions, images, (IMAGES,)),
    "frozen": (frozen, images, (IMAGES,)),
    "attention, causal": (lambda: Attention(is_causal=True), heads(), HEADS),
    "attention, window and soft cap": (lambda: Attention(window=(3, 0), softcap=5.0), heads(), HEADS),
    "attention, grouped": (lambda: Attention(enable_gqa=True), heads(2), HEADS),
    "MultiheadAttention": (lambda: SelfAttention(False), rows(16), (ROWS,)),
    "MultiheadAttention, weights": (lambda: SelfAttention(True), rows(16), (ROWS,)),
    "TransformerEncoderLayer": (
        lambda: fastnn.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
        rows(16),
        (ROWS,),
    ),
    "LSTM": (lambda: fastnn.nn.LSTM(8, 6, 2, bidirectional=True, batch_first=True), rows(8), (ROWS,)),
    "GRU, layer norm and zoneout": (
        lambda: fastnn.nn.GRU(8, 6, layer_norm=True, zoneout=0.1, batch_first=True),
        rows(8),
        (ROWS,),
    ),
    "RNN": (lambda: fastnn.nn.RNN(8, 6, nonlinearity="relu", batch_first=True), rows(8), (ROWS,)),
    "LSTMCell": (lambda: fastnn.nn.LSTMCell(8, 6), lambda n, length: [torch.randn(n, 8)], ({0: DYNAMIC},)),
    "GRUCell": (lambda: fastnn.nn.GRUCell(8, 6), lambda n, length: [torch.randn(n, 8)], ({0: DYNAMIC},)),
}
UNROLLED = {"LSTM", "GRU, layer norm and zoneout", "RNN"}  # torch's own decompositions: a program for one length


def ops_of(program):
    return {str(node.target) for node in program.graph.nodes if "fastnn" in str(node.target)}


def compare(program, model, args, **bounds):
    with torch.no_grad():
        found, expected = (torch.utils._pytree.tree_leaves(f(*args)) for f in (program.module(), model))
        for got, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(got, wanted, **bounds)


@works("torch.export, dynamic batch and length; run_decompositions, with fastnn's ops and without")
@pytest.mark.parametrize("case", CASES)
def test_a_program_serves_every_size(case):
    make, inputs, shapes = CASES[case]
    model = make().eval()
    args = inputs(3, 5)
    program = export(model, tuple(args), dynamic_shapes=shapes)
    for sizes in program.range_constraints.values():
        assert sizes.lower <= 3 and sizes.upper > 10**9, "no size became a number"
    assert ops_of(program)
    for size in ((3, 5), (1, 7), (4, 1), (5, 9)):
        compare(program, model, inputs(*size))

    functionalized = program.run_decompositions()
    assert ops_of(functionalized) == ops_of(program)
    compare(functionalized, model, inputs(2, 6))
    plain = program.run_decompositions(fastnn.decompositions())
    assert not ops_of(plain)
    compare(plain, model, inputs(2, 5 if case in UNROLLED else 6), rtol=1e-4, atol=1e-5)


@works("torch.export(strict=True)")
@pytest.mark.parametrize("case", ["conv2d", "frozen", "MultiheadAttention", "LSTM", "GRUCell"])
def test_a_program_of_strict_export(case):
    make, inputs, shapes = CASES[case]
    model = make().eval()
    program = export(model, tuple(inputs(3, 5)), dynamic_shapes=shapes, strict=True)
    for size in ((3, 5), (1, 7), (5, 9)):
        compare(program, model, inputs(*size))


@works("torch.export.save and load in another process, unflatten; an error without fastnn")
def test_a_saved_program_needs_fastnn_imported(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.cnn, self.attention, self.lstm = frozen(), SelfAttention(True), fastnn.nn.LSTM(16, 4)

        def forward(self, image, x):
            x = self.attention(x)
            return self.cnn(image), x, self.lstm(x)[0]

    model, shapes = Model().eval(), (IMAGES, {0: AUTO, 1: AUTO})
    program = export(model, (*images(2, 5), torch.randn(2, 5, 16)), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "model.pt2")
    args = (*images(1, 8), torch.randn(3, 4, 16))
    torch.save((args, [y.detach() for y in model(*args)]), tmp_path / "case.pt")
    code = f"""
import sys, torch
torch.set_num_threads(1)
{{}}
program = torch.export.load({str(tmp_path / "model.pt2")!r})
args, expected = torch.load({str(tmp_path / "case.pt")!r})
for module in program.module(), torch.export.unflatten(program):
    print(all(map(torch.equal, module(*args), expected)))
"""
    environment = os.environ | {"PYTHONPATH": str(Path(fastnn.__file__).parent.parent)}

    def python(code):
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, env=environment
        )

    found = python(code.format("import fastnn"))
    assert found.stdout.split() == ["True", "True"], found.stderr
    found = python(code.format(""))
    assert found.returncode == 1 and "torch.ops.fastnn." in found.stderr


PAGE = (ROOT / "docs" / "deploy.md").read_text()
BLOCKS = {section.split("\n")[0]: re.findall(r"```python\n(.*?)```", section, re.S) for section in PAGE.split("\n## ")}


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}

    def run(*sections):
        for section in sections:
            for block in BLOCKS[section]:
                exec(compile(block, "docs/deploy.md", "exec"), names)
        return names

    return run


@pytest.mark.filterwarnings("ignore")
def test_docs_saved_modules(page):
    page("# Leaving Python", "Saved modules and other processes")


@works("AOTInductor: aoti_compile_and_package, dynamic batch")
@pytest.mark.filterwarnings("ignore")
def test_docs_export_and_aotinductor(page, monkeypatch):
    monkeypatch.setattr("torch._inductor.config.aot_inductor.compile_wrapper_opt_level", "O0")  # a short test
    names = page("# Leaving Python", "torch.export", "AOTInductor")
    for n in (1, 4, 7):
        x = torch.randn(n, 3, 16, 16)
        torch.testing.assert_close(names["compiled"](x), names["fast"](x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_docs_onnx(page):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    session = pytest.importorskip("onnxruntime").InferenceSession
    names = page("# Leaving Python", "ONNX")
    x = torch.randn(3, 3, 16, 16)
    for file in ("model.onnx", "program.onnx"):
        (found,) = session(file, providers=["CPUExecutionProvider"]).run(None, {"input": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), names["fast"](x).detach(), rtol=1e-4, atol=1e-4)


def test_every_block_of_the_page_is_run():
    assert set(BLOCKS) == {
        "# Leaving Python",
        "torch.export",
        "AOTInductor",
        "ONNX",
        "Saved modules and other processes",
    }
    assert all(BLOCKS.values())
