"""fastnn/compile.py: torch.compile(model, backend="fastnn") on models that know nothing of fastnn."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

import fastnn
from fastnn import compile as fastnn_compile
from tests.graphs import ACTIVATIONS, outcome, served

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    counters.clear()
    fastnn_compile._graphs.clear()


@pytest.fixture
def aot(monkeypatch):
    """AOTAutograd in the place of inductor, whose C++ takes long: graphs are traced forward and backward as for inductor."""
    from torch._dynamo.backends.debugging import aot_eager

    calls = []

    def compile_fx(gm, example_inputs, config_patches=None):
        calls.append(config_patches)
        return aot_eager(gm, example_inputs)

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    return calls


def agrees(model, *args, rtol=1e-4, atol=1e-5, **options):
    """Assert that ``backend="fastnn"`` gives what the model gives, gradients too; return the reports of its graphs."""
    compiled = torch.compile(model, backend=fastnn_compile.backend, **options)
    compiled.parameters = getattr(model, "parameters", list)
    torch.testing.assert_close(outcome(compiled, args), outcome(model, args), rtol=rtol, atol=atol)
    return fastnn.explain(compiled if isinstance(model, nn.Module) else None).reports


def all_served(reports):
    assert not any(r.error for r in reports), reports
    return dict(sum((Counter(served(r)) for r in reports), Counter()))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in ACTIVATIONS)

    def forward(self, x):
        for layer, f in zip(self.layers, ACTIVATIONS.values(), strict=True):
            x = f(layer(x))
        return x


class Block(nn.Module):
    def __init__(self, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, stride, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, 1, 1, groups=2, bias=False), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class Convnet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.Hardswish(inplace=True)
        )
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Attention(nn.Module):
    """As in the models that came before scaled_dot_product_attention."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.register_buffer("causal", torch.ones(64, 64).tril().view(1, 1, 64, 64))

    def forward(self, x):
        b, t, c = x.size()
        q, k, v = (y.view(b, t, 4, c // 4).transpose(1, 2) for y in self.qkv(self.norm(x)).split(c, dim=2))
        att = (q @ k.transpose(-2, -1)) * (1.0 / 8**0.5)
        att = att.masked_fill(self.causal[:, :, :t, :t] == 0, float("-inf"))
        att = F.softmax(att, dim=-1)
        y = (att @ v).transpose(1, 2).contiguous().view(b, t, c)
        x = x + self.proj(y)
        return x + self.down(F.gelu(self.up(x)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 12, 2, batch_first=True, bidirectional=True)
        self.gru, self.rnn, self.cell = nn.GRU(24, 8), nn.RNN(8, 8, nonlinearity="relu"), nn.LSTMCell(8, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, tokens):
        y, _ = self.lstm(self.embedding(tokens))
        y, _ = self.gru(y.transpose(0, 1))
        y, h = self.rnn(y)
        h, _ = self.cell(y[-1], (h[0], h[0]))
        return self.out(h)


@pytest.mark.works("Compilation", 'backend="fastnn": unedited multi-layer perceptron, training')
def test_mlp(aot):
    assert all_served(agrees(Mlp(), torch.randn(4, 16), fullgraph=True)) == {f"linear + {f}": 1 for f in ACTIVATIONS}


@pytest.mark.works(
    "Compilation", 'backend="fastnn": unedited convnet with batch norm and residuals, training and evaluation'
)
def test_convnet(aot):
    model, x = Convnet(), torch.randn(2, 3, 12, 12)
    assert all_served(agrees(model.eval(), x, fullgraph=True)) == {
        "conv2d + batch norm + hardswish": 1,
        "conv2d + batch norm + relu": 2,
        "conv2d + batch norm": 2,
        "linear": 1,
    }
    fastnn_compile._graphs.clear()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 0.0  # both runs, compiled and stock, start from the same statistics
    assert all_served(agrees(model.train(), x, fullgraph=True, rtol=1e-3, atol=1e-4)) == {"conv2d": 5, "linear": 1}


@pytest.mark.works("Compilation", 'backend="fastnn": unedited decoder whose attention is written by hand, training')
def test_attention_by_hand(aot):
    assert all_served(agrees(Attention(), torch.randn(2, 9, 32), fullgraph=True)) == {
        "linear": 3,
        "linear + gelu": 1,
        "attention by hand + mask": 1,
    }


@pytest.mark.works("Compilation", 'backend="fastnn": unedited RNN, GRU, LSTM and cells in one graph, training')
def test_recurrent(aot):
    reports = agrees(Recurrent(), torch.randint(20, (3, 7)), fullgraph=True)
    assert all_served(reports) == {"lstm": 1, "gru": 1, "rnn_relu": 1, "lstm_cell": 1, "linear": 1}
    assert reports[0].served[0].kernel == "2 × rnn"


def test_packed_sequences(aot):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(4, 5, bidirectional=True)

        def forward(self, x, lengths):
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
            return nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0])[0]

    model = Model()
    compiled = torch.compile(model, backend=fastnn_compile.backend)
    x, lengths = torch.randn(6, 3, 4), torch.tensor([4, 6, 2])
    torch.testing.assert_close(compiled(x, lengths), model(x, lengths))


@pytest.mark.works(
    "Compilation", 'backend="fastnn": unedited BERT, both of its attentions, training', package="transformers"
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hugging_face(aot, attention):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                     intermediate_size=64, max_position_embeddings=32, attn_implementation=attention,
                                     hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
    model = transformers.BertModel(config)
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    tokens = torch.randint(50, (2, 9))
    compiled = torch.compile(model, backend=fastnn_compile.backend)
    own, stock = (m(tokens, attention_mask=mask).last_hidden_state for m in (compiled, model))
    torch.testing.assert_close(own, stock, rtol=1e-4, atol=1e-5)
    weights = [p for n, p in model.named_parameters() if "pooler" not in n]
    grads = [torch.autograd.grad((y * torch.linspace(0, 1, 32)).sum(), weights) for y in (own, stock)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)
    found = all_served(fastnn.explain(compiled).reports)
    assert found["linear + gelu"] == 2 and found["linear"] >= 10
    assert found["scaled_dot_product_attention" if attention == "sdpa" else "attention by hand + mask"] == 2


@pytest.mark.works(
    "Compilation", 'backend="fastnn" with options= and mode=, inductor all the way, forward and backward'
)
def test_all_the_way_through_inductor():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
            self.lstm, self.attention = nn.LSTM(8, 32, batch_first=True), Attention()

        def forward(self, x):
            y = F.silu(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
            return self.attention(self.lstm(y)[0]).tanh()

    model, x = Model().eval(), torch.randn(2, 3, 5, 5, requires_grad=True)
    reports = agrees(model, x, fullgraph=True, options={"epilogue_fusion": False})
    assert all_served(reports) == {"conv2d + batch norm + silu": 1, "lstm": 1, "linear": 3, "linear + gelu": 1,
                                   "attention by hand + mask": 1}  # fmt: skip


@pytest.mark.works("Compilation", 'backend="fastnn": a second batch size compiles nothing anew')
def test_dynamic_sizes_compile_once(aot):
    compiled, model = torch.compile(model := Attention(), backend=fastnn_compile.backend, dynamic=True), model
    for shape in ((2, 9, 32), (3, 9, 32), (2, 17, 32), (5, 4, 32)):
        x = torch.randn(shape)
        torch.testing.assert_close(outcome(compiled, [x]), outcome(model, [x]), rtol=1e-4, atol=1e-5)
    assert len(fastnn.explain(compiled)) == 1 and counters["stats"]["unique_graphs"] == 1


def test_where_rewriting_fails_the_stock_graph_is_compiled(aot, monkeypatch):
    def broken(gm):
        raise ValueError("no luck\nat all")

    monkeypatch.setattr(fastnn_compile, "rewrite", broken)
    (report,) = agrees(Mlp(), torch.randn(4, 16))
    assert report.error == "ValueError: no luck" and not report.served
    assert "compiled as it was, since the rewritten graph failed: ValueError: no luck" in str(fastnn.explain())
    fastnn.set_fallback("error")
    torch.compiler.reset()
    with pytest.raises(Exception, match="no luck"):
        torch.compile(Mlp(), backend=fastnn_compile.backend)(torch.randn(4, 16))


def test_where_the_rewritten_graph_does_not_compile_only_that_graph_is_stock(aot, monkeypatch):
    import torch._inductor.compile_fx

    compile_fx = torch._inductor.compile_fx.compile_fx

    def refuses_gelu(gm, example_inputs, config_patches=None):
        if any("gelu" in n.args for n in gm.graph.nodes):  # an argument of fastnn::linear
            raise RuntimeError("no gelu today")
        return compile_fx(gm, example_inputs, config_patches)

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", refuses_gelu)
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)

    def model(x):
        y = F.gelu(a(x))
        torch._dynamo.graph_break()
        return F.relu(b(y))

    first, second = agrees(model, torch.randn(3, 4))
    assert first.error == "RuntimeError: no gelu today" and not first.served
    assert served(second) == {"linear + relu": 1} and second.error is None


def test_set_fallback_error_reaches_the_caller(aot):
    fastnn.set_fallback("error")
    x = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(Exception, match=r"fastnn\.linear: no kernel takes this input: dtype torch\.int64"):
        torch.compile(F.linear, backend=fastnn_compile.backend)(x, x)


def test_mode_and_options_are_inductors(aot):
    model, x = nn.Linear(3, 4), torch.randn(2, 3)
    for given, wanted in (
        ({}, {}),
        ({"mode": "default"}, {}),
        (
            {"options": {"max-autotune": True, "epilogue_fusion": False}},
            {"max_autotune": True, "epilogue_fusion": False},
        ),
        ({"mode": "max-autotune-no-cudagraphs"}, torch._inductor.list_mode_options("max-autotune-no-cudagraphs")),
    ):
        torch.compiler.reset()
        torch.compile(model, backend=fastnn_compile.backend, **given)(x)
        assert aot[-1] == wanted, given


def test_recurrent_modules_are_let_in_for_this_backend_alone(aot):
    from torch._dynamo import config

    model, x = nn.LSTM(4, 5), torch.randn(3, 2, 4)
    torch.compile(model, backend=fastnn_compile.backend, fullgraph=True)(x)
    assert not config.allow_rnn and repr(config.allow_rnn) == "False" and config.get_config_copy()["allow_rnn"] is False
    torch.compiler.reset()
    counters.clear()
    torch.compile(model, backend="eager")(x)
    assert any("RNN, GRU, or LSTM" in reason for reason in counters["graph_break"])
    counters.clear()
    torch.compiler.reset()
    wide = nn.LSTM(4, 5, dtype=torch.complex64)  # no kernel takes it: inductor would unroll its steps
    torch.compile(wide, backend=fastnn_compile.backend)(x.to(torch.complex64))
    assert any("RNN, GRU, or LSTM" in reason for reason in counters["graph_break"])
    with config.patch(allow_rnn=True):
        assert config.allow_rnn is True
    assert not config.allow_rnn


def test_compiled_in_place_and_explained(aot):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.down(F.relu(self.up(x)))

    model = Model()
    assert "no graph" in str(fastnn.explain())
    model.compile(backend=fastnn_compile.backend)
    model(torch.randn(2, 3))
    other = torch.compile(nn.Linear(2, 2), backend=fastnn_compile.backend)
    other(torch.randn(2, 2))
    text = str(fastnn.explain(model))
    assert "graph 0: 2 calls served by fastnn, 0 of its kind left to torch, 0 other operations by inductor" in text
    assert "1 × linear + relu by fastnn.linear" in text and "graph 1" not in text
    assert len(fastnn.explain(other)) == 1 and len(fastnn.explain()) == 2
    f = torch.compile(lambda x: torch.bmm(x, x), backend=fastnn_compile.backend)
    f(torch.randn(2, 3, 3))
    assert "1 × bmm left to torch: no kernel for this form" in str(fastnn.explain())


def run(code, *path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT))), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.works("Compilation", 'torch.compile(model, backend="fastnn") by its name alone, with no import of fastnn')
def test_the_name_is_known_where_fastnn_is_installed(tmp_path):
    import tomllib

    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["torch_dynamo_backends"]
    folder = tmp_path / "fastnn-0.1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: fastnn\nVersion: 0.1.0\n")
    (folder / "entry_points.txt").write_text(
        "[torch_dynamo_backends]\n" + "".join(f"{name} = {where}\n" for name, where in points.items())
    )
    code = """
import sys, torch
assert "fastnn" in torch._dynamo.list_backends() and "fastnn" not in sys.modules
model = torch.nn.LSTM(3, 4)
compiled = torch.compile(model, backend="fastnn", fullgraph=True)
x = torch.randn(5, 2, 3)
torch.testing.assert_close(compiled(x), model(x))
import fastnn
print(fastnn.explain(compiled))
"""
    assert "1 × lstm by fastnn.rnn" in run(code, tmp_path)


def test_importing_fastnn_imports_no_dynamo():
    code = """
import sys, fastnn
assert not {"torch._dynamo", "torch._inductor", "fastnn.compile"} & set(sys.modules)
assert callable(fastnn.compile.backend) and "torch._inductor.compile_fx" not in sys.modules
"""
    run(code)


# ---- fastnn's own modules under any backend --------------------------------------------------------------------------

fnn = fastnn.nn
MODULES = {
    "Linear": (lambda: fnn.Linear(8, 4, activation="gelu"), lambda n, t: [torch.randn(n, t, 8)]),
    "Conv1d": (lambda: fnn.Conv1d(3, 4, 3, padding=1), lambda n, t: [torch.randn(n, 3, t)]),
    "Conv2d": (lambda: fnn.Conv2d(3, 4, 3, padding=1, activation="silu"), lambda n, t: [torch.randn(n, 3, t, 6)]),
    "RNN": (lambda: fnn.RNN(8, 5, 2, batch_first=True), lambda n, t: [torch.randn(n, t, 8)]),
    "GRU": (lambda: fnn.GRU(8, 5, bidirectional=True), lambda n, t: [torch.randn(t, n, 8)]),
    "LSTM": (lambda: fnn.LSTM(8, 5, 2, proj_size=3), lambda n, t: [torch.randn(t, n, 8)]),
    "LSTM with layer norm": (lambda: fnn.LSTM(8, 5, layer_norm=True), lambda n, t: [torch.randn(t, n, 8)]),
    "RNNCell": (lambda: fnn.RNNCell(8, 5), lambda n, t: [torch.randn(n, 8)]),
    "GRUCell": (lambda: fnn.GRUCell(8, 5), lambda n, t: [torch.randn(n, 8)]),
    "LSTMCell": (lambda: fnn.LSTMCell(8, 5), lambda n, t: [torch.randn(n, 8)]),
    "MultiheadAttention": (
        lambda: fnn.MultiheadAttention(8, 2, batch_first=True),
        lambda n, t: [x := torch.randn(n, t, 8), x, x],
    ),
    # which has encoder and decoder, and the layers of both, in it
    "Transformer": (
        lambda: fnn.Transformer(8, 2, 1, 1, 16, 0.0, batch_first=True),
        lambda n, t: [torch.randn(n, 5, 8), torch.randn(n, t, 8)],
    ),
}


@pytest.mark.works(
    "Compilation", "every module whole (fullgraph), training, and once for all batch sizes and lengths (dynamic)"
)
@pytest.mark.parametrize("name", MODULES)
def test_each_module_compiles_whole_and_once(name):
    from torch._dynamo.testing import CompileCounterWithBackend

    build, inputs = MODULES[name]
    module, counter = build(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    compiled.parameters = module.parameters
    frames = []
    for n, t in ((2, 7), (4, 7), (6, 9)):
        x = inputs(n, t)
        torch.testing.assert_close(outcome(compiled, x), outcome(module, x), rtol=1e-4, atol=1e-5)
        frames.append(counter.frame_count)
    # Twice at first where an option is a float: Dynamo takes it for a symbol, and starts again with its value.
    assert frames[0] <= 2 and frames == frames[:1] * 3


def test_every_module_is_there():
    kinds = {type(m).__name__ for build, _ in MODULES.values() for m in build().modules()}
    assert kinds >= set(fnn.__all__) - {"KVCache"}  # tests/test_kv_cache.py has that one
