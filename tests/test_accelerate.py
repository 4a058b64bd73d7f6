"""accelerate, explain, restore: what is swapped stays the same module in everything but its speed."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import fastnn

x4 = torch.randn(2, 3, 8, 8)
tokens = torch.randn(2, 5, 16)
MODULES = {
    "Linear": (lambda: nn.Linear(16, 8), (tokens,)),
    "Conv2d": (lambda: nn.Conv2d(3, 8, 3, padding=1, stride=2), (x4,)),
    "Conv2d circular": (lambda: nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), (x4,)),
    "RNN": (lambda: nn.RNN(16, 8, 2, batch_first=True, nonlinearity="relu"), (tokens,)),
    "GRU": (lambda: nn.GRU(16, 8, bidirectional=True), (tokens,)),
    "LSTM": (lambda: nn.LSTM(16, 8, proj_size=4), (tokens,)),
    "RNNCell": (lambda: nn.RNNCell(16, 8), (tokens[0],)),
    "GRUCell": (lambda: nn.GRUCell(16, 8), (tokens[0],)),
    "LSTMCell": (lambda: nn.LSTMCell(16, 8), (tokens[0],)),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(16, 4, batch_first=True), (tokens, tokens, tokens)),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), (tokens,)),
    "TransformerDecoderLayer": (lambda: nn.TransformerDecoderLayer(16, 4, 32), (tokens, tokens)),
    "TransformerEncoder": (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32), 2), (tokens,)),
    "TransformerDecoder": (lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 32), 2), (tokens, tokens)),
    "Transformer": (lambda: nn.Transformer(16, 4, 1, 1, 32), (tokens, tokens)),
}


def outputs(module, *args, **kwargs):
    result = module(*args, **kwargs)
    return [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]


def assert_same(actual, expected, tolerance=1e-5):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore:.*nested_tensor.*")
def test_every_class_is_swapped_and_restored(name):
    make, args = MODULES[name]
    stock = make().eval()
    model = nn.ModuleDict({"m": stock})
    expected = outputs(stock, *args)
    fast = fastnn.accelerate(model)
    kind = type(stock).__name__
    assert type(fast["m"]) is getattr(fastnn.nn, kind)
    assert type(model["m"]) is type(stock), "the model that was given stays as it is"
    assert_same(outputs(fast["m"], *args), expected)
    assert list(fast.state_dict()) == list(model.state_dict())
    assert all(p is q for p, q in zip(fast.parameters(), model.parameters(), strict=True))

    fastnn.freeze(fast)
    with torch.no_grad():
        assert_same(outputs(fast["m"], *args), expected)
        assert_same(outputs(copy.deepcopy(fast)["m"], *args), expected)
        assert_same(outputs(pickle.loads(pickle.dumps(fast))["m"], *args), expected)
    assert fastnn.restore(fast) is fast
    assert repr(fast) == repr(model)
    for a, b in zip(fast.modules(), model.modules(), strict=True):
        assert type(a) is type(b) and a.__dict__.keys() == b.__dict__.keys()
    assert_same(outputs(fast["m"], *args), expected, 0)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore:.*nested_tensor.*")
def test_gradients_are_the_same(name):
    make, args = MODULES[name]
    stock = make()
    for m in stock.modules():
        if isinstance(m, (nn.Dropout, nn.MultiheadAttention)):
            m.p = m.dropout = 0.0
    fast = fastnn.accelerate(stock)
    found = []
    for module in (stock, fast):
        module.zero_grad(set_to_none=True)
        sum(t.square().sum() for t in outputs(module, *args)).backward()
        found.append([p.grad for p in module.parameters()])
    assert_same(found[1], found[0], 1e-3)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.shared = self.layers[0]
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.layers[2].weight

    def forward(self, x):
        x = self.conv(x).mean((-1, -2))
        return self.tied(self.shared(self.layers(x)))


def test_in_place_and_as_a_copy():
    net = Net()
    fast = fastnn.accelerate(net)
    assert fast is not net and type(net.conv) is nn.Conv2d
    conv = net.conv
    assert fastnn.accelerate(net, inplace=True) is net
    assert net.conv is conv and type(conv) is fastnn.nn.Conv2d, "the very same object, of another class"
    assert_same(outputs(net, x4), outputs(fast, x4), 0)
    assert fastnn.accelerate(nn.Linear(2, 2), inplace=True).weight.shape == (2, 2)


def test_shared_modules_and_tied_weights_stay_so():
    fast = fastnn.accelerate(Net())
    assert fast.shared is fast.layers[0] and type(fast.shared) is fastnn.nn.Linear
    assert fast.tied.weight is fast.layers[2].weight
    assert {r.name: r.note for r in fastnn.explain(fast)}["layers.0"] == "also shared"


def test_flags_stay():
    net = Net().eval().double()
    net.conv.weight.requires_grad_(False)
    fast = fastnn.accelerate(net)
    assert not fast.conv.training and not fast.conv.weight.requires_grad and fast.conv.weight.dtype == torch.float64
    assert fastnn.accelerate(nn.Linear(2, 2, device="meta")).weight.device.type == "meta"


def test_a_copy_and_its_model_share_their_weights():
    net = Net()
    fast = fastnn.accelerate(net)
    with torch.no_grad():
        net.conv.weight.mul_(2)
    assert_same(outputs(fast, x4), outputs(net, x4))
    net.load_state_dict(Net().state_dict())
    assert_same(outputs(fast, x4), outputs(net, x4))


def test_an_optimizer_made_before_still_trains():
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    fastnn.accelerate(net, inplace=True)
    before = net(x4).square().mean()
    before.backward()
    optimizer.step()
    assert net(x4).square().mean() < before


def test_hooks_run():
    net, seen = Net(), []
    net.conv.register_forward_hook(lambda m, a, o: seen.append(("forward", type(m))))
    net.conv.register_forward_pre_hook(lambda m, a: seen.append(("pre", type(m))))
    net.conv.register_full_backward_hook(lambda m, gi, go: seen.append(("backward", type(m))))
    net.conv.register_state_dict_post_hook(lambda m, d, p, l: seen.append(("state_dict", type(m))))
    fast = fastnn.accelerate(net)
    fast(x4).sum().backward()
    fast.state_dict()
    cls = fastnn.nn.Conv2d
    assert seen == [("pre", cls), ("forward", cls), ("backward", cls), ("state_dict", cls)]


def test_parametrizations_stay():
    net = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(4, 4)), parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))
    )
    net.eval()
    fast = fastnn.accelerate(net)
    assert isinstance(fast[0], fastnn.nn.Linear) and isinstance(fast[1], fastnn.nn.Conv2d)
    assert_same([fast[0](tokens[..., :4]), fast[1](x4)], [net[0](tokens[..., :4]), net[1](x4)])
    fast[0](tokens[..., :4]).sum().backward()
    assert net[0].parametrizations.weight.original0.grad is not None
    fastnn.restore(fast)
    assert type(fast[0]).__bases__ == (nn.Linear,)
    fastnn.accelerate(fast, inplace=True)
    nn.utils.parametrize.remove_parametrizations(fast[0], "weight")
    assert type(fast[0]) is fastnn.nn.Linear
    assert type(fastnn.restore(fast)[0]) is nn.Linear


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Padded(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(
            F.pad(x, (0, 1, 2, 1)), self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )

    def extra(self):
        return "still here"


class OwnAttention(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def test_subclasses():
    net = nn.Sequential(Padded(3, 8, 3, stride=2), Doubled(4, 4), OwnAttention(8, 2))
    fast = fastnn.accelerate(net)
    assert isinstance(fast[0], (Padded, fastnn.nn.Conv2d)) and fast[0].extra() == "still here"
    assert_same([fast[0](x4)], [net[0](x4)])
    assert_same([pickle.loads(pickle.dumps(fast[0]))(x4), copy.deepcopy(fast[0])(x4)], [net[0](x4)] * 2)
    assert_same([fast[1](x4[..., :4])], [net[1](x4[..., :4])])
    notes = {r.name: (r.served, r.note) for r in fastnn.explain(fast)}
    assert notes["0"] == (True, "") and notes["1"] == (True, "linear")
    assert notes["2"] == (True, "multi_head_attention_forward") and notes["2.out_proj"][0]
    fastnn.restore(fast)
    assert type(fast[1]) is Doubled and type(fast[2]) is OwnAttention
    assert type(fast[0]) is Padded and "_zeros" not in fast[0].__dict__


def test_filter_fn():
    net = Net()
    fast = fastnn.accelerate(net, filter_fn=lambda module, name: name != "conv")
    assert type(fast.conv) is nn.Conv2d and type(fast.tied) is fastnn.nn.Linear
    assert {r.name: r.note for r in fastnn.explain(fast)}["conv"] == "filter_fn said no"
    assert "_fastnn_reason" not in fastnn.restore(fast).conv.__dict__


def test_explain():
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.LazyLinear(4), nn.Linear(4, 4, dtype=torch.complex64))
    before = fastnn.explain(net)
    assert [r.served for r in before] == [False] * 4 and before.rows[0].note == "not accelerated"
    fast = fastnn.accelerate(net)
    rows = list(fastnn.explain(fast))
    assert [r.served for r in rows] == [True, False, False, False]
    assert [r.kind for r in rows] == ["Linear", "LayerNorm", "LazyLinear", "Linear"]
    assert rows[1].note == "fastnn has no LayerNorm"
    assert rows[2].note.startswith("lazy") and "complex64" in rows[3].note
    text = str(fastnn.explain(fast))
    assert (
        "served by" in text
        and "LayerNorm" in text
        and "1 of 2 Linear served by fastnn" in fastnn.explain(fast).summary()
    )
    own = fastnn.explain(fastnn.nn.Linear(2, 2))
    assert own.rows[0].served and len(own) == 1


def test_explain_counts_the_calls_that_torch_served():
    from fastnn import _fallback

    _fallback.calls.clear()
    model = fastnn.accelerate(nn.Linear(4, 4))
    fastnn.functional.linear(torch.ones(2, 4, dtype=torch.complex64), torch.ones(4, 4, dtype=torch.complex64))
    explanation = fastnn.explain(model)
    assert sum(explanation.calls_by_torch.values()) == 1 and "1 calls of linear went to torch" in str(explanation)
    _fallback.calls.clear()


def test_restore_leaves_what_was_built_as_fastnn():
    model = nn.Sequential(fastnn.nn.Linear(4, 4, activation="relu"), nn.Linear(4, 4))
    fastnn.restore(fastnn.accelerate(model, inplace=True))
    assert type(model[0]) is fastnn.nn.Linear and model[0].activation == "relu" and type(model[1]) is nn.Linear


def test_twice_is_once():
    fast = fastnn.accelerate(fastnn.accelerate(Net()))
    assert type(fastnn.restore(fast).conv) is nn.Conv2d


def test_saved_and_loaded():
    net = Net()
    fast = fastnn.accelerate(net, freeze=True)
    buffer = io.BytesIO()
    torch.save(fast.state_dict(), buffer)
    buffer.seek(0)
    other = Net()
    other.load_state_dict(torch.load(buffer))
    assert_same(outputs(other, x4), outputs(net, x4), 0)


def test_errors():
    for function in (fastnn.accelerate, fastnn.explain, fastnn.restore, fastnn.freeze):
        with pytest.raises(
            TypeError, match=rf"fastnn\.{function.__name__}: mod(el|ule) must be a torch.nn.Module; got int"
        ):
            function(3)
    model = nn.Sequential(nn.Linear(2, 2))
    model.lock = io.TextIOWrapper(io.BytesIO())
    with pytest.raises(RuntimeError, match="inplace=True"):
        fastnn.accelerate(model)
    assert type(fastnn.accelerate(model, inplace=True)[0]) is fastnn.nn.Linear


def test_functional_call_and_compile():
    net = Net().eval()
    fast = fastnn.accelerate(net)
    other = {k: v + 1 for k, v in net.state_dict().items() if not k.startswith(("shared", "tied.weight"))}
    assert_same(
        [torch.func.functional_call(fast, other, (x4,), tie_weights=True)],
        [torch.func.functional_call(net, other, (x4,), tie_weights=True)],
    )
    assert_same([torch.compile(fast, backend="aot_eager", fullgraph=True)(x4)], [net(x4)])


def test_hugging_face_models_attend_by_fastnn():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=50
    )
    model = transformers.BertModel(config).eval()
    ids = torch.randint(50, (2, 7))
    with torch.no_grad():
        expected = outputs(model, input_ids=ids)
        fast = fastnn.accelerate(model, freeze=True)
        assert model.config._attn_implementation == "sdpa" and fast.config._attn_implementation == "fastnn"
        assert_same(outputs(fast, input_ids=ids), expected)
        explanation = fastnn.explain(fast)
        assert "attention of BertModel served by fastnn" in str(explanation)
        assert sum(r.kind == "GELUActivation" and r.note.startswith("fused") for r in explanation) == 2
        fastnn.restore(fast)
        assert fast.config._attn_implementation == "sdpa"
        assert_same(outputs(fast, input_ids=ids), expected, 0)
