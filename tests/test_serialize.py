"""Modules that are copied, pickled, saved, sent to other processes and shared with them; and what torch.jit makes of them."""

import copy
import importlib
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import multiprocessing, nn, package

import fastnn

ROOT = Path(fastnn.__file__).parent.parent
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="forks")


def works(what, package="torch"):
    return pytest.mark.works("Leaving Python", what, package=package)


class Doubled(nn.Linear):
    """A user's subclass, which computes no more than Linear: it is swapped for a class made of both."""

    def forward(self, input):
        return nn.functional.linear(input, self.weight, self.bias)


class Model(nn.Module):
    """Every family, and a subclass."""

    def __init__(self, width=16):
        super().__init__()
        self.first = Doubled(width, width)
        self.cnn = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.lstm = nn.LSTM(width, 8, batch_first=True)
        self.cell = nn.GRUCell(width, 4)

    def forward(self, x, image):
        x = self.first(x)
        return self.attention(x, x, x, need_weights=False)[0], self.lstm(x)[0], self.cell(x[:, 0]), self.cnn(image)


def inputs():
    return torch.randn(3, 5, 16), torch.randn(2, 3, 6, 6)


@pytest.fixture(params=["accelerated", "frozen"])
def fast(request, one_thread):
    stock = Model().eval()
    stock.cnn[1].running_var.uniform_(0.5, 2)
    fast = fastnn.accelerate(stock, freeze=request.param == "frozen")
    run(fast, inputs())  # frozen weights are packed by now
    return fast


def run(model, args):
    with torch.no_grad():
        return list(model(*args))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


WAYS = {
    "copy.deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save and torch.load": saved,
}


@pytest.mark.parametrize("way", WAYS)
@works("copy.deepcopy, pickle, torch.save of accelerated and of frozen models")
def test_a_copy_computes_the_same_and_goes_its_own_way(fast, way):
    args = inputs()
    expected = run(fast, args)
    twin = WAYS[way](fast)
    assert [type(m) for m in twin.modules()] == [type(m) for m in fast.modules()]
    same(run(twin, args), expected)

    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(0.5)
    stock = Model().eval()
    stock.load_state_dict(twin.state_dict())
    for got, wanted in zip(run(twin, args), run(stock, args), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    same(run(fast, args), expected)  # the edit of one is not seen by the other

    assert type(fastnn.restore(twin).first) is Doubled and not isinstance(twin.lstm, fastnn.nn.LSTM)
    for got, wanted in zip(run(twin, args), run(stock, args), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@works("torch.package of an accelerated model whose code goes along")
def test_a_package(monkeypatch, tmp_path, one_thread):
    (tmp_path / "users_code.py").write_text(
        "from torch import nn\n"
        "class Own(nn.Linear):\n"
        "    def forward(self, input):\n"
        "        return nn.functional.linear(input, self.weight, self.bias)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module("users_code").Own
    fast = fastnn.accelerate(own(4, 4).eval(), freeze=True)
    file, x = io.BytesIO(), torch.randn(4, 4)
    with package.PackageExporter(file) as exporter:
        exporter.extern(["fastnn.**", "torch.**"])
        exporter.intern("users_code")
        exporter.save_pickle("model", "model.pkl", fast)
    twin = package.PackageImporter(io.BytesIO(file.getvalue())).load_pickle("model", "model.pkl")
    assert isinstance(twin, fastnn.nn.Linear) and not isinstance(twin, own), "its class comes from the package"
    assert torch.equal(twin(x), fast(x))


def test_no_packed_weight_is_saved(one_thread):
    model = fastnn.freeze(fastnn.nn.Linear(64, 64).eval())
    before = len(pickle.dumps(model))
    run(model, (torch.randn(8, 64),))
    assert model._pack is not None and len(pickle.dumps(model)) == before


@works("torch.load(weights_only=True) of a state_dict, both ways between torch's modules and fastnn's")
def test_a_state_dict_goes_both_ways(fast, tmp_path):
    args = inputs()
    torch.save(fast.state_dict(), tmp_path / "weights.pt")
    state = torch.load(tmp_path / "weights.pt", weights_only=True)
    stock = Model().eval()
    stock.load_state_dict(state)
    for got, wanted in zip(run(fast, args), run(stock, args), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)

    other = Model().eval()
    fast.load_state_dict(other.state_dict())  # what frozen modules packed is now another model's
    for got, wanted in zip(run(fast, args), run(other, args), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def python(code):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, env=environment)
    assert found.returncode == 0, found.stderr
    return found.stdout


@works("torch.load of an accelerated model in a process that has not imported fastnn")
def test_a_saved_model_brings_fastnn_with_it(fast, tmp_path):
    args = inputs()
    torch.save(fast, tmp_path / "model.pt")
    torch.save((args, run(fast, args)), tmp_path / "case.pt")
    found = python(
        f"""
import sys, torch
torch.set_num_threads(1)
assert 'fastnn' not in sys.modules
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
args, expected = torch.load({str(tmp_path / "case.pt")!r})
with torch.no_grad():
    print(all(map(torch.equal, model(*args), expected)), 'fastnn' in sys.modules)
"""
    )
    assert found.split() == ["True", "True"]


def outputs(case):
    model, args = case
    return run(model, args)


def train(case):
    """Hogwild: steps on weights that another process trains, too."""
    model, seed = case
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, image = torch.randn(8, 5, 16), torch.randn(2, 3, 6, 6)
    for _ in range(5):
        optimizer.zero_grad()
        sum(y.square().mean() for y in model(x, image)).backward()
        optimizer.step()


@pytest.fixture(scope="module", params=["spawn", pytest.param("fork", marks=LINUX)])
def pool(request):
    torch.set_num_threads(2)
    wide = torch.randn(256, 512)
    fastnn.functional.linear(wide, torch.randn(512, 512))  # the parent's threads run before it forks
    with multiprocessing.get_context(request.param).Pool(2, torch.set_num_threads, (1,)) as pool:
        yield pool


@works("torch.multiprocessing: Pool by spawn and by fork, accelerated and frozen models in, outputs out")
@pytest.mark.parametrize("freeze", [False, True], ids=["accelerated", "frozen"])
def test_a_pool_of_processes(pool, freeze):
    model, args = fastnn.accelerate(Model().eval(), freeze=freeze), inputs()
    expected = run(model, args)
    for found in pool.map_async(outputs, [(model, args)] * 3).get(timeout=240):
        same(found, expected)


@works("share_memory and Hogwild training of one accelerated model by two processes, spawn and fork")
def test_two_processes_train_one_model(pool):
    model, args = fastnn.accelerate(Model()).share_memory(), inputs()
    stock = fastnn.restore(copy.deepcopy(model))
    loss = sum(y.square().mean() for y in run(model, args))
    pool.map_async(train, [(model, 1), (model, 2)], chunksize=1).get(timeout=240)
    after = sum(y.square().mean() for y in run(model, args))
    assert after < loss, "the parent sees what the children learned"
    for seed in (1, 2):
        train((stock, seed))  # one after the other, and with torch's kernels: less than the rest of the way away
    for p, q, name in zip(model.parameters(), stock.parameters(), dict(model.named_parameters()), strict=True):
        assert p.is_shared() and torch.allclose(p, q, atol=0.05), name


@works("torch.jit.trace of accelerated and of frozen models, saved and loaded")
@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and tells of every size that Python reads
def test_a_trace_consists_of_the_ops(fast, tmp_path):
    args = inputs()
    traced = torch.jit.trace(fast, args)
    ops = {node.kind() for node in traced.inlined_graph.nodes()}
    assert {"fastnn::linear", "fastnn::conv2d", "fastnn::attention", "fastnn::rnn"} <= ops
    traced.save(tmp_path / "traced.pt")
    torch.save((args, run(fast, args)), tmp_path / "case.pt")
    with torch.no_grad():
        for p in traced.parameters():
            p.mul_(0.5)  # the trace holds the parameters themselves and nothing that was packed or folded of them
        for got, wanted in zip(traced(*args), run(fast, args), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    found = python(
        f"""
import torch, fastnn
torch.set_num_threads(1)
model = torch.jit.load({str(tmp_path / "traced.pt")!r})
args, expected = torch.load({str(tmp_path / "case.pt")!r})
with torch.no_grad():
    print(all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(model(*args), expected)))
"""
    )
    assert found.split() == ["True"]


def test_script_is_refused_in_one_sentence(fast):
    with pytest.raises(RuntimeError, match="fastnn: torch.jit.script must .*fastnn.restore"):
        torch.jit.script(fast)
    torch.jit.script(fastnn.restore(fast).cell)
