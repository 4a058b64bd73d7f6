"""ONNX: both of torch's exporters write models of fastnn's modules in ONNX's own operators, for any batch and length."""

import io

import pytest
import torch
from torch import nn
from torch.export import Dim

import fastnn
from fastnn import functional, reference

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # what the exporters say of themselves
]
ATTENTION = functional.scaled_dot_product_attention
DYNAMIC = Dim.DYNAMIC


def work(area="Leaving Python", package="onnxruntime", *, what):
    return pytest.mark.works(area, what, package=package)


class Each(nn.Module):
    """Gives what each function gives, for the same arguments."""

    def __init__(self, *functions):
        super().__init__()
        self.functions = functions
        self.children_ = nn.ModuleList(f for f in functions if isinstance(f, nn.Module))

    def forward(self, *args):
        return [f(*args) for f in self.functions]


def flat(outputs):
    return [t for t in torch.utils._pytree.tree_leaves(outputs) if t is not None]


def check(model, args, others=(), program=None, **options):
    """Export the model, or a program of it, read the operators, and compare ONNX Runtime's outputs with those of the model."""
    file = io.BytesIO()
    with torch.no_grad():
        model = model.eval()
        before = dict(fastnn._fallback.calls)
        fastnn.set_fallback("error")  # an export is none
        torch.onnx.export(
            program or model, args if program is None else (), file, **({"dynamo": True, "verbose": False} | options)
        )
        assert fastnn._fallback.calls == before
        graph = onnx.load_from_string(file.getvalue())
        onnx.checker.check_model(graph, full_check=True)
        assert {entry.domain for entry in graph.opset_import} <= {"", "pkg.onnxscript.torch_lib.common"}
        operators = [node.op_type for node in graph.graph.node]
        assert not any(node.domain for node in graph.graph.node) and not graph.functions
        session = ort.InferenceSession(file.getvalue(), ort_options(), providers=["CPUExecutionProvider"])
        names = [i.name for i in session.get_inputs()]
        for some in (args, *others):
            found = session.run(None, {n: x.numpy() for n, x in zip(names, some, strict=True)})
            for got, expected in zip(found, flat(model(*some)), strict=True):
                torch.testing.assert_close(torch.from_numpy(got), expected, rtol=2e-5, atol=2e-5)
    return operators


def ort_options():
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return options


@work(what="ONNX export (dynamo=True), linear with each activation, dynamic batch and length")
def test_linear_and_every_activation():
    layers = [fastnn.nn.Linear(8, 6, activation=a) for a in reference.ACTIVATIONS]
    layers += [fastnn.nn.Linear(8, 6, bias=False, activation="gelu")]
    x = torch.randn(3, 4, 8) * 3
    others = [(torch.randn(shape),) for shape in ((1, 1, 8), (5, 2, 8))]
    operators = check(Each(*layers), (x,), others, dynamic_shapes=(({0: DYNAMIC, 1: DYNAMIC},),))
    assert operators.count("MatMul") + operators.count("Gemm") == len(layers)


@work(what="ONNX export (dynamo=True), conv2d with each padding, dynamic batch and size")
def test_conv2d_and_every_padding():
    def sides(x):
        return functional.conv2d(x, layers[0].weight, None, 2, (1, 0, 2, 1), activation="silu")

    layers = [
        fastnn.nn.Conv2d(4, 6, 3, activation="relu"),
        fastnn.nn.Conv2d(4, 6, 3, padding="same", bias=False),
        fastnn.nn.Conv2d(4, 6, 4, padding="same", dilation=2),  # an odd padding: more of it at the end
        fastnn.nn.Conv2d(4, 6, 3, padding="valid", groups=2),
        fastnn.nn.Conv2d(4, 6, (3, 1), stride=(2, 1), padding=(1, 0)),
        fastnn.nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", groups=4),
    ]
    x = torch.randn(2, 4, 12, 9)
    others = [(torch.randn(shape),) for shape in ((1, 4, 9, 9), (3, 4, 10, 14))]
    operators = check(Each(*layers, sides), (x,), others, dynamic_shapes=(({0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC},),))
    assert operators.count("Conv") == 7


def cnn():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.SiLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    ).eval()
    for norm in model[1], model[4]:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return model


@work(what="ONNX export of an accelerated and a frozen CNN (batch norms folded)")
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_a_frozen_cnn(dynamo):
    fast = fastnn.accelerate(cnn(), freeze=True)
    x, y = torch.randn(2, 3, 10, 10), torch.randn(5, 3, 10, 10)
    fast(x)  # what is packed must not get into the file
    axes = {"dynamic_shapes": ({0: DYNAMIC},)} if dynamo else {"input_names": ["x"], "dynamic_axes": {"x": {0: "n"}}}
    operators = check(fast, (x,), [(y,)], dynamo=dynamo, **axes)
    assert operators.count("Conv") == 2 and "BatchNormalization" not in operators


@work(what="ONNX export (dynamo=True), attention: masks, causal, GQA, window, soft cap; dynamic batch and length")
def test_attention():
    def calls(q, k, v, mask, bias):
        kv = (k[:, :2], v[:, :2])
        return [
            ATTENTION(q, k, v),
            ATTENTION(q, k, v, mask),
            ATTENTION(q, k, v, bias, scale=0.3),
            ATTENTION(q, k, v, is_causal=True),
            ATTENTION(q, *kv, enable_gqa=True),
            ATTENTION(q, *kv, is_causal=True, enable_gqa=True, window=(2, 0)),
            ATTENTION(q, k, v, window=3),
            ATTENTION(q, k, v, mask, softcap=2.0),
            ATTENTION(q, k, v, bias, return_lse=True),
            functional.attention_weights(q, k, v, bias),
            functional.attention_weights(q, k, v, mask, average=True),
        ]

    def inputs(batch, length, keys):
        q, k, v = (torch.randn(batch, 4, n, 8) for n in (length, keys, keys))
        mask = torch.rand(batch, 1, length, keys) < 0.7
        mask[..., 0] = True
        return q, k, v, mask, torch.randn(batch, 4, length, keys)

    sizes = {0: Dim.AUTO, 2: Dim.AUTO}, {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
    shapes = ((sizes[0], sizes[0], sizes[0], sizes[1], sizes[1]),)
    others = [inputs(1, 3, 9), inputs(3, 8, 4)]
    operators = check(Each(calls), inputs(2, 5, 7), others, dynamic_shapes=shapes)
    assert "Softmax" in operators


class SelfAttention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.options = options

    def forward(self, x, padding):
        return self.attention(x, x, x, key_padding_mask=padding, **self.options)


@work(what="ONNX export (dynamo=True), MultiheadAttention and transformer layers, dynamic batch and length")
def test_multihead_attention_and_transformer_layers():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = SelfAttention(need_weights=False), SelfAttention(average_attn_weights=False)
            encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation="gelu")
            self.encoder = nn.TransformerEncoder(encoder, 1, enable_nested_tensor=False)
            self.decoder = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True, norm_first=True)

        def forward(self, x, padding):
            memory = self.encoder(x, src_key_padding_mask=padding)
            return self.one(x, padding), self.two(x, padding), memory, self.decoder(x, memory)

    def inputs(batch, length):
        return torch.randn(batch, length, 16), torch.arange(length).expand(batch, length) >= length - 2

    stock = Model().eval()
    fast = fastnn.accelerate(stock, freeze=True)
    assert not [row for row in fastnn.explain(fast) if not row.served and row.kind != "LayerNorm"]
    shapes = ({0: Dim.AUTO, 1: Dim.AUTO},) * 2
    check(fast, inputs(2, 5), [inputs(1, 4), inputs(3, 9)], dynamic_shapes=shapes)


class States(nn.Module):
    """The layers of a model that keeps states."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(6, 5, bias=False)
        self.rnn = nn.RNN(6, 5, nonlinearity="relu", bidirectional=True)
        self.tanh = nn.RNN(6, 5)

    def forward(self, x):
        h = x.new_zeros(1, x.shape[1], 5) + 0.5
        return self.lstm(x), self.gru(x, h), self.rnn(x), self.tanh(x, h)


@work(what="ONNX export (dynamo=True), LSTM, GRU and RNN as ONNX's own operators, dynamic batch and length")
def test_recurrent_layers():
    fast = fastnn.accelerate(States().eval(), freeze=True)
    others = [(torch.randn(1, 9, 6),), (torch.randn(6, 1, 6),)]
    operators = check(fast, (torch.randn(3, 4, 6),), others, dynamic_shapes=({0: DYNAMIC, 1: DYNAMIC},))
    assert {name: operators.count(name) for name in ("LSTM", "GRU", "RNN")} == {"LSTM": 2, "GRU": 1, "RNN": 2}


@work(what="ONNX export (dynamo=True), recurrent cells, LSTM with proj_size, layer norm and zoneout")
def test_cells_and_what_onnx_has_no_operator_for():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.cells = nn.ModuleList([fastnn.nn.LSTMCell(6, 5), fastnn.nn.GRUCell(6, 5), fastnn.nn.RNNCell(6, 5)])
            self.projected = fastnn.nn.LSTM(6, 5, proj_size=3)
            self.normed = fastnn.nn.GRU(6, 5, layer_norm=True, zoneout=0.1)

        def forward(self, x):
            return [cell(x[0]) for cell in self.cells], self.projected(x), self.normed(x)

    check(Model(), (torch.randn(3, 4, 6),), [(torch.randn(3, 7, 6),)], dynamic_shapes=({1: DYNAMIC},))


class Families(nn.Module):
    """Each family once; the recurrent layer takes the positions of an image."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = fastnn.nn.Conv2d(3, 8, 3, padding=1), fastnn.nn.Linear(8, 16, activation="gelu")
        self.attention = fastnn.nn.MultiheadAttention(16, 2, batch_first=True)
        self.lstm = fastnn.nn.LSTM(16, 6, bidirectional=True, batch_first=True)

    def forward(self, image):
        x = self.linear(self.conv(image).flatten(2).mT)
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.lstm(x)


@work(what="ONNX export of a torch.export.ExportedProgram after run_decompositions(fastnn.decompositions())")
def test_a_program():
    model, image = Families().eval(), torch.randn(2, 3, 3, 4)
    program = torch.export.export(model, (image,), dynamic_shapes=({0: DYNAMIC},))
    plain = program.run_decompositions(fastnn.decompositions())
    operators = check(model, (image,), [(torch.randn(5, 3, 3, 4),)], program=plain)
    assert {"Conv", "MatMul", "Softmax", "LSTM"} <= set(operators)
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match="No ONNX function found for .*fastnn"):
        torch.onnx.export(program, (), io.BytesIO(), dynamo=True, verbose=False)  # as docs/deploy.md says


@work(what="ONNX export (dynamo=False, TorchScript), all four families")
def test_the_torchscript_exporter():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.cnn = cnn()
            self.attention = SelfAttention(need_weights=False)
            self.states = States()
            self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

        def forward(self, image, x, padding):
            capped = ATTENTION(x, x, x, softcap=3.0, window=(2, 0))
            attended = self.layer(self.attention(x, padding)[0])
            return self.cnn(image), attended, capped, self.states(x[..., :6])[:2]

    def inputs(batch, length):
        padding = torch.arange(length).expand(batch, length) >= length - 2
        return torch.randn(batch, 3, 8, 8), torch.randn(batch, length, 16), padding

    fast = fastnn.accelerate(Model().eval())
    operators = check(fast, inputs(2, 5), dynamo=False, opset_version=17)
    assert "LSTM" in operators and "GRU" in operators
