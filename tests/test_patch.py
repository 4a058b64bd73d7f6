"""fastnn.patch: what a block changes, that nothing stays, what it lives together with, and libraries inside it."""

import os
import sys
import threading
import typing

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

import fastnn
from fastnn import served
from fastnn.testing import assert_own_kernels

pytestmark = pytest.mark.usefixtures("one_thread")
TAKES_NAMES = torch.__version__ >= (2, 13)  # torch.autograd.grad: its inputs may be a dictionary


@pytest.fixture
def small_products(monkeypatch):
    monkeypatch.setattr(served, "WORTH", 0)
    monkeypatch.setattr(served, "WORTH_A_GRADIENT", 0)


class Net(nn.Module):
    """Functional calls of every family."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.weight = nn.Parameter(torch.randn(8, 16) / 3)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.cell = nn.GRUCell(16, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)

    def forward(self, x):
        x = F.relu(self.conv(x)).flatten(2).mT @ self.weight
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x, _ = self.lstm(F.scaled_dot_product_attention(x, x, x))
        return self.layer(x).mean(1) + self.cell(x[:, 0])


FAMILIES = {
    "conv2d": 1,
    "matmul": 1,
    "multi_head_attention_forward": 2,
    "scaled_dot_product_attention": 1,
    "lstm": 1,
    "linear": 2,
    "gru_cell": 1,
}


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def x():
    return torch.randn(2, 3, 8, 8)


def train(model, x):
    """The output, and the gradients."""
    model.zero_grad()
    output = model(x)
    output.square().sum().backward()
    return [output.detach(), *(p.grad.clone() for p in model.parameters())]


def close(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.works("Patching", "the functional calls of any module, in a `with fastnn.patch()` block, training")
def test_a_block_serves_every_family(small_products, net, x, record_property):
    expected = train(net, x)
    with fastnn.patch() as p:
        actual = train(net, x)
    close(actual, expected)
    assert p.served == FAMILIES and not p.left
    record_property("calls", f"{p.served.total()} of {p.served.total()}")

    def forward():
        with fastnn.patch():
            net(x)

    assert_own_kernels(forward)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_fast_paths_of_torch_are_ours_too(small_products, net, x, guard):
    net.eval()
    with guard():
        expected = net(x)
        with fastnn.patch() as p:
            actual = net(x)
        assert_own_kernels(fastnn.patch()(lambda: net(x)))
    close(actual, expected)
    assert p.served == FAMILIES


@pytest.mark.parametrize("nested", [True, False])
def test_a_transformer_encoder_in_evaluation(nested):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    x, padding = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        expected = encoder(x, src_key_padding_mask=padding)
        with fastnn.patch() as p:
            actual = encoder(x, src_key_padding_mask=padding)
    close(actual[~padding], expected[~padding])  # what stands at padding is nobody's business
    assert p.served == {"multi_head_attention_forward": 2, "linear": 4}


def test_nothing_stays(net, x):
    before = (F.linear, torch.matmul, F.conv2d, dict(vars(F)), _get_current_function_mode_stack())
    with pytest.raises(KeyError), fastnn.patch():
        net(x)
        raise KeyError
    with pytest.raises(RuntimeError), fastnn.patch():
        F.linear(torch.randn(2, 3), torch.randn(2, 4))
    assert (F.linear, torch.matmul, F.conv2d, dict(vars(F)), _get_current_function_mode_stack()) == before
    with fastnn.patch() as p:
        pass
    net(x)
    assert not p.served and str(p) == "nothing that fastnn serves was called"


def test_what_it_tells():
    x, w, batch = torch.randn(4, 8), torch.randn(8, 8), torch.randn(2, 8, 8)
    with fastnn.patch() as p:
        F.linear(x, w), F.linear(x, w), F.linear(x.long(), w.long()), batch @ batch, x @ w, x + x
    assert p.served == {"linear": 2}
    assert p.left == {
        ("linear", "dtype torch.int64 has no kernel"): 1,
        ("matmul", "a product of batches of matrices"): 1,
        ("matmul", "too small to be worth the call"): 1,
    }
    lines = str(p).splitlines()
    assert len(lines) == 4
    assert lines[0].split() == ["2", "linear:", "fastnn"]
    assert any(line.split(maxsplit=1) == ["1", "matmul: torch (a product of batches of matrices)"] for line in lines)


def test_error_instead_of_a_fallback():
    x, batch = torch.randn(4, 8), torch.randn(2, 8, 8)
    fastnn.set_fallback("error")
    with fastnn.patch():
        batch @ batch  # no function of fastnn: nothing falls back
        F.linear(x, x)
        with pytest.raises(RuntimeError, match=r"fastnn\.linear: no kernel takes this input: dtype torch\.int64"):
            F.linear(x.long(), x.long())


def test_nested_blocks_and_the_same_one_twice():
    x = torch.randn(4, 8)
    with fastnn.patch() as outer:
        F.linear(x, x)
        with fastnn.patch() as inner:
            F.linear(x, x)
            F.linear(x.long(), x.long())
        with outer:
            F.linear(x, x)
            F.linear(x.long(), x.long())
        F.linear(x, x)
    assert outer.served == {"linear": 3} and outer.left.total() == 1
    assert inner.served == {"linear": 1} and inner.left.total() == 1
    assert not _get_current_function_mode_stack()


def test_decorates_functions():
    p = fastnn.patch()

    @p
    def power(x, n):
        """Recursive."""
        return x if n == 1 else F.linear(power(x, n - 1), x)

    x = torch.randn(4, 4)
    close(power(x, n=3), x @ x.mT @ x.mT)
    assert p.served == {"linear": 2} and power.__doc__ == "Recursive." and power.__name__ == "power"
    assert not _get_current_function_mode_stack()


def test_a_block_is_its_threads():
    x, inside, done = torch.randn(4, 8), threading.Event(), threading.Event()
    counts = {}

    def other():
        inside.wait(60)
        F.linear(x, x)  # while the first thread is in its block
        with fastnn.patch() as p:
            F.linear(x, x), F.linear(x.long(), x.long())
        counts["other"] = (p.served.total(), p.left.total())
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with fastnn.patch() as p:
        inside.set()
        assert done.wait(60)
        F.linear(x, x)
    thread.join()
    assert counts["other"] == (1, 1) and p.served == {"linear": 1} and not p.left


def test_autocast(net, x):
    with torch.autocast("cpu", torch.bfloat16):
        expected = train(net, x)
        with fastnn.patch() as p:
            actual = train(net, x)
    assert [t.dtype for t in actual] == [t.dtype for t in expected]
    close(actual, expected, 0.2)
    assert p.served["linear"] == 2 and p.served["conv2d"] == 1


@pytest.mark.works("Patching", "`torch.compile`d functions called inside a block, and blocks inside compiled functions")
def test_compiled_functions(small_products, net, x, monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "allow_rnn", True)
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    expected = train(net, x)
    close(train(compiled, x), expected)
    for _ in range(3):
        with fastnn.patch():
            close(train(compiled, x), expected)
        close(train(compiled, x), expected)
    assert len(graphs) == 2  # one for each side
    targets = [{str(node.target) for node in graph.graph.nodes} for graph in graphs]
    for op in ("linear", "conv2d", "attention", "rnn"):
        assert f"fastnn.{op}" not in targets[0] and f"fastnn.{op}" in targets[1]

    @torch.compile(backend=backend, fullgraph=True)
    def inner(x, w):
        with fastnn.patch():
            y = F.linear(x, w)
        return F.linear(y, w)

    w = torch.randn(4, 4)
    close(inner(w, w), w @ w.mT @ w.mT)
    called = [str(node.target) for node in graphs[-1].graph.nodes if node.op == "call_function"]
    assert called.count("fastnn.linear") == 1 and sum("built-in function linear" in target for target in called) == 1


class Rows(Dataset):
    """Calls a served function in the worker."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return F.linear(torch.full((1, 8), float(index)), torch.ones(8, 8))


@pytest.mark.works("Patching", "`DataLoader` workers beside and inside a block")
def test_workers_of_a_data_loader():
    with fastnn.patch() as p:
        rows = list(DataLoader(Rows(), batch_size=2, num_workers=1))
        F.linear(rows[0], torch.ones(8, 8))
    close(torch.cat(rows), torch.arange(4.0).mul(8).view(4, 1, 1).expand(4, 1, 8))
    assert p.served == {"linear": 1}  # a worker counts for itself


class Seen(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def test_other_modes(small_products, net, x):
    expected = net(x)
    with torch.device("cpu"), FlopCounterMode(display=False), fastnn.patch() as p:
        close(net(x), expected)
        assert torch.zeros(2).device.type == "cpu"
    assert p.served == FAMILIES
    with fastnn.patch() as p, Seen() as seen:  # the inner mode sees first, and passes on
        close(net(x), expected)
    assert p.served == FAMILIES and set(FAMILIES) <= set(seen.names)
    with Seen() as seen, fastnn.patch() as p:
        close(net(x), expected)
    assert p.served == FAMILIES and not set(FAMILIES) & set(seen.names)
    with fastnn.patch() as p, torch.device("meta"):
        assert Net()(torch.randn(2, 3, 8, 8)).shape == expected.shape
    assert p.served == FAMILIES
    with fastnn.patch() as p:
        state = {name: parameter * 2 for name, parameter in net.named_parameters()}
        actual = torch.func.functional_call(net, state, (x,))
    close(actual, torch.func.functional_call(net, state, (x,)), 1e-3)
    assert p.served == FAMILIES


class Logged(torch.Tensor):
    """A subclass with a mind of its own."""

    calls: typing.ClassVar = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls.append(func)
        return super().__torch_function__(func, types, args, kwargs)


def test_a_subclass_goes_to_its_class():
    x, w = torch.randn(4, 8).as_subclass(Logged), torch.randn(4, 8)
    Logged.calls.clear()
    with fastnn.patch() as p:
        output = F.linear(x, w)
    assert type(output) is Logged and Logged.calls == [F.linear]
    assert p.left == {("linear", "a tensor subclass goes to its class"): 1} and not p.served


@pytest.mark.works("Patching", "`torch.utils.checkpoint`: the forward that is run again is served, too")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("backward", ["tensor", "backward", "grad"])
def test_checkpoints(net, x, reentrant, backward):
    if reentrant and backward == "grad":
        pytest.skip("torch refuses torch.autograd.grad through a reentrant checkpoint")
    x.requires_grad_()
    expected = train(net, x)
    net.zero_grad()
    weights = list(net.parameters())
    with fastnn.patch() as p:
        output = checkpoint(net, x, use_reentrant=reentrant)
        loss = output.square().sum()
        if backward == "grad":
            gradients = torch.autograd.grad(loss, weights, torch.ones(()))
        else:
            loss.backward() if backward == "tensor" else torch.autograd.backward([loss], [torch.ones(())])
            gradients = [w.grad for w in weights]
    close([output.detach(), *gradients], expected)
    assert p.served["lstm"] == 2  # forward, and again in the backward


def test_backward_has_all_its_forms():
    w, v = torch.randn(3, requires_grad=True), torch.randn(3)

    def gradients():
        w.grad = None
        hidden = w * w
        y = hidden * v
        y.backward(torch.ones(3), retain_graph=True, inputs=[w])
        y.sum().backward(create_graph=True)
        first = w.grad.clone()
        given = torch.autograd.grad(y, [w, hidden], torch.ones(3), create_graph=True)
        unused = torch.autograd.grad(given[0].sum(), [w, hidden], allow_unused=True, materialize_grads=True)
        named = torch.autograd.grad(y, {"w": w}, torch.ones(3), retain_graph=True) if TAKES_NAMES else {}
        return [first, *given, *unused, *named.values()]

    expected = gradients()
    with fastnn.patch():
        close(gradients(), expected, 0)
        for wrong in (lambda: v.sum().backward(), lambda: (w * w).backward(), lambda: torch.autograd.grad(v, w)):
            with pytest.raises(RuntimeError):
                wrong()


def test_second_derivatives(small_products):
    def f(x, w):
        return torch.tanh(x @ w + F.linear(x, w)).sum(0) @ w.mT

    x, w = (torch.randn(4, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    with fastnn.patch() as p:
        assert torch.autograd.gradgradcheck(f, (x, w))
    assert not p.left and p.served["linear"] > 1 and p.served["matmul"] > 2


# ------------------------------------------------------------------------------------------- libraries


@pytest.fixture(scope="module")
def keras():
    if "keras" not in sys.modules:
        os.environ.setdefault("KERAS_BACKEND", "torch")  # read once, at its import
    keras = pytest.importorskip("keras", minversion="3")
    if keras.backend.backend() != "torch":
        pytest.skip("Keras was imported with another backend")
    return keras


def keras_model(keras, layer, shape):
    keras.utils.set_random_seed(0)
    images = len(shape) == 3
    inputs = keras.Input(shape)
    outputs = {
        "Dense": lambda l: l.Dense(24, activation="relu"),
        "Conv2D": lambda l: l.Conv2D(8, 3, strides=2, padding="same"),
        "SeparableConv2D": lambda l: l.SeparableConv2D(8, 3),
        "LSTM": lambda l: l.LSTM(8, return_sequences=True),
        "GRU": lambda l: l.GRU(8),
        "Bidirectional": lambda l: l.Bidirectional(l.LSTM(4)),
        "MultiHeadAttention": lambda l: l.MultiHeadAttention(2, 8),
    }[layer](keras.layers)(*[inputs] * (2 if layer == "MultiHeadAttention" else 1))
    assert images or outputs.ndim in (2, 3)
    return keras.Model(inputs, keras.layers.Dense(4)(keras.layers.Flatten()(outputs)))


KERAS = {  # what one call is made of; Keras computes recurrent layers as a loop of products, the input's in one
    "Dense": ((6, 16), {"matmul": 2}),
    "Conv2D": ((12, 12, 3), {"conv2d": 1, "matmul": 1}),
    "SeparableConv2D": ((8, 8, 3), {"conv2d": 2, "matmul": 1}),
    "LSTM": ((6, 16), {"matmul": 1 + 6 + 1}),
    "GRU": ((6, 16), {"matmul": 1 + 6 + 1}),
    "Bidirectional": ((6, 16), {"matmul": 2 * (1 + 6) + 1}),
    "MultiHeadAttention": ((6, 16), {"einsum": 4, "scaled_dot_product_attention": 1, "matmul": 1}),
}


@pytest.mark.works("Patching", "Keras 3 on torch: Dense, Conv2D, LSTM, GRU, MultiHeadAttention; `fit`", package="keras")
@pytest.mark.parametrize("layer", KERAS)
def test_keras(small_products, keras, layer, record_property):
    shape, calls = KERAS[layer]
    model = keras_model(keras, layer, shape)
    x, y = torch.randn(8, *shape), torch.randn(8, 4)
    expected = keras_train(model, x)
    with fastnn.patch() as p:
        actual = keras_train(model, x)
    close(actual, expected)
    assert p.served == calls and not p.left
    record_property(layer, ", ".join(f"{count} {name}" for name, count in calls.items()))

    start, losses = model.get_weights(), []
    for patched in (False, True):
        model.set_weights(start)
        model.compile(keras.optimizers.SGD(0.05), "mse", jit_compile=False)
        run = lambda: model.fit(x.numpy(), y.numpy(), batch_size=4, epochs=3, shuffle=False, verbose=0)  # noqa: E731
        p = fastnn.patch()
        losses.append((p(run) if patched else run)().history["loss"])
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert p.served == {name: 7 * count for name, count in calls.items()} and not p.left  # Keras builds with one call


def keras_train(model, x):
    weights = [v.value for v in model.trainable_variables]
    output = model(x, training=True)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), weights)]


SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


@pytest.mark.works("Patching", "Hugging Face models left as they are, `eager` and `sdpa`", package="transformers")
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["Bert", "Llama", "GPT2"])
def test_hugging_face(kind, implementation, small_products):
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64) if kind == "GPT2" else SMALL
    config = getattr(transformers, f"{kind}Config")(**sizes, attn_implementation=implementation)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    ids, mask = torch.randint(3, 50, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model
            for name, parameter in model.named_parameters():  # which the output does not see
                parameter.requires_grad_("pooler" not in name)

        def forward(self, mask):
            return model(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]

        def parameters(self):
            return (p for p in super().parameters() if p.requires_grad)

    hidden = Hidden()
    expected = train(hidden, mask)
    with fastnn.patch() as p:
        actual = train(hidden, mask)
    close(actual, expected, 1e-3)
    linears = {"Bert": 6 * 2 + 1, "Llama": 7 * 2, "GPT2": 0}[kind]
    assert p.served["linear"] == linears
    assert p.served["addmm"] == (4 * 2 if kind == "GPT2" else 0)
    assert p.served["scaled_dot_product_attention"] == (2 if implementation == "sdpa" else 0)
    if implementation == "eager":
        assert p.left["matmul", "a product of batches of matrices"] >= 4


@pytest.mark.works("Patching", "timm models left as they are", package="timm")
@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "convnext_atto"])
def test_timm(name, small_products, record_property):
    timm = pytest.importorskip("timm")
    size = 64
    options = dict(img_size=size, depth=2) if name.startswith("vit") else {}
    model = timm.create_model(name, pretrained=False, num_classes=10, **options).eval()
    x = torch.randn(2, 3, size, size)
    expected = train(model, x)
    with fastnn.patch() as p:
        actual = train(model, x)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-3 * e.abs().max().item())
    modules = [type(m) for m in model.modules()]
    assert p.served["conv2d"] == sum(issubclass(t, nn.Conv2d) for t in modules)
    assert p.served["linear"] == sum(issubclass(t, nn.Linear) for t in modules)
    assert p.served["scaled_dot_product_attention"] == (2 if name.startswith("vit") else 0) and not p.left
    record_property(name, f"{p.served.total()} of {p.served.total()} calls")
