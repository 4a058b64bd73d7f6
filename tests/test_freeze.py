"""freeze: what is folded and fused, what must not be, and that no edit of a weight is ever missed."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastnn
from fastnn.freeze import FoldedBatchNorm2d, FusedActivation, activation_of

x = torch.randn(2, 3, 9, 9)


def lively(model):
    """Give every batch norm statistics that matter, and switch to evaluation."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None:
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
            if m.affine:
                nn.init.normal_(m.weight)
                nn.init.normal_(m.bias)
    return model.eval()


def frozen(model, *args, **kwargs):
    """Return the frozen model, after a look at its output."""
    fast = fastnn.accelerate(model, freeze=True)
    with torch.no_grad():
        torch.testing.assert_close(fast(*args, **kwargs), model(*args, **kwargs), atol=1e-5, rtol=1e-4)
    return fast


def kinds(model, cls):
    return [name for name, m in model.named_modules() if type(m) is cls]


ACTIVATIONS = [
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.GELU(),
    nn.GELU("tanh"),
    nn.SiLU(),
    nn.Sigmoid(),
    nn.Tanh(),
    nn.LeakyReLU(),
    nn.ELU(),
    nn.Hardswish(),
    nn.ReLU6(),
    nn.Softplus(),
    nn.Mish(),
]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_convolution_norm_and_activation_become_one(activation):
    model = lively(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), copy.deepcopy(activation), nn.Conv2d(8, 4, 1)))
    fast = frozen(model, x)
    assert kinds(fast, FoldedBatchNorm2d) == ["1"] and kinds(fast, FusedActivation) == ["2"]
    assert list(fast.state_dict()) == list(model.state_dict())
    fused = frozen(nn.Sequential(nn.Linear(9, 4), copy.deepcopy(activation)).eval(), x)
    assert kinds(fused, FusedActivation) == ["1"]


OTHERS = [nn.LeakyReLU(0.1), nn.ELU(0.5), nn.Softplus(2), nn.ReLU6(), nn.Hardtanh(), nn.PReLU(), nn.Softmax(-1)]
OTHERS[3].max_val = 5.0


@pytest.mark.parametrize("activation", OTHERS, ids=str)
def test_activations_that_no_kernel_has_stay(activation):
    assert activation_of(activation) is None
    assert kinds(frozen(nn.Sequential(nn.Linear(9, 4), activation).eval(), x), FusedActivation) == []


@pytest.mark.parametrize(
    "options", [{"bias": False}, {"groups": 3}, {"padding": 1, "padding_mode": "reflect"}, {"stride": 2}]
)
@pytest.mark.parametrize("norm", [{}, {"affine": False}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_folding(options, norm, dtype):
    model = lively(nn.Sequential(nn.Conv2d(3, 6, 3, **options), nn.BatchNorm2d(6, **norm))).to(dtype)
    fast = frozen(model, x.to(dtype))
    assert kinds(fast, FoldedBatchNorm2d) == ["1"]
    with torch.no_grad():
        channels_last = x.to(dtype).contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(fast(channels_last), model(channels_last), atol=1e-5, rtol=1e-4)


def test_folding_in_bfloat16():
    model = lively(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))).bfloat16()
    fast = fastnn.accelerate(model, freeze=True)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.bfloat16().double())
        error, stock = ((f(x.bfloat16()).double() - exact).abs().max() for f in (fast, model))
    assert error <= 2 * stock


class Block(nn.Module):
    """The shape of EfficientNet's blocks: one activation for two convolutions, a switch that a default hides."""

    def __init__(self):
        super().__init__()
        self.expand, self.bn0 = nn.Conv2d(3, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.depthwise, self.bn1 = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12)
        self.project, self.bn2 = nn.Conv2d(12, 3, 1, bias=False), nn.BatchNorm2d(3)
        self.act = nn.ReLU6()

    def forward(self, inputs, drop_rate=None):
        y = self.act(self.bn0(self.expand(inputs)))
        y = self.act(self.bn1(self.depthwise(y)))
        y = self.bn2(self.project(y))
        if drop_rate:
            y = y * (1 - drop_rate)
        return y + inputs


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())

    def forward(self, inputs):
        y = inputs
        for block, rate in zip(self.blocks, [None, 0.5], strict=True):
            y = block(y, drop_rate=rate)
        return torch.stack([self.head(row.unsqueeze(0)) for row in y])


def test_what_follows_is_read_off_forward():
    fast = frozen(lively(Block()), x)
    assert len(kinds(fast, FoldedBatchNorm2d)) == 3 and kinds(fast, FusedActivation) == ["act"]
    rows = {r.name: r.note for r in fastnn.explain(fast)}
    assert rows["bn1"] == "folded into depthwise" and rows["act"] == "fused into expand, depthwise"
    assert rows["expand"] == "batch norm + relu6" and rows["project"] == "batch norm"


def test_parts_of_a_model_that_cannot_be_traced():
    fast = frozen(lively(Untraceable()), x)
    assert len(kinds(fast, FoldedBatchNorm2d)) == 6
    assert kinds(fast, FusedActivation) == ["blocks.0.act", "blocks.1.act", "head.1"]


class SkipsNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, inputs, norm=True):
        y = self.conv(inputs)
        return self.bn(y) if norm else y


class UsesOutputTwice(SkipsNorm):
    def forward(self, inputs):
        y = self.conv(inputs)
        return self.bn(y) + y


class UsesNormTwice(SkipsNorm):
    def forward(self, inputs):
        return self.bn(self.conv(inputs)) + self.bn(inputs)


class SharesActivation(SkipsNorm):
    def forward(self, inputs):
        return self.act(self.act(self.conv(inputs)) + inputs)


class BranchesOnData(SkipsNorm):
    def forward(self, inputs):
        y = self.conv(inputs)
        return self.act(y) if inputs.sum() > 1e9 else y


@pytest.mark.parametrize("cls", [SkipsNorm, UsesOutputTwice, UsesNormTwice, SharesActivation, BranchesOnData])
def test_what_is_not_certain_stays(cls):
    fast = frozen(lively(cls()), x)
    assert not kinds(fast, FoldedBatchNorm2d) and not kinds(fast, FusedActivation)
    told = [r.note for r in fastnn.explain(fast) if "not folded" in r.note or "not fused" in r.note]
    assert bool(told) == (cls in (UsesNormTwice, SharesActivation, BranchesOnData))


class CallsAPart(nn.Module):
    """Cannot be traced as a whole, and calls the convolution that lies in another module."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
        self.again = self.block[0]

    def forward(self, inputs):
        return torch.cat([self.block(inputs), self.again(inputs)] * sum(1 for _ in inputs))


def test_a_part_that_others_call_stays():
    assert not kinds(frozen(lively(CallsAPart()), x), FusedActivation)


def test_a_function_after_a_kernel_stays_and_is_told():
    class Functional(SkipsNorm):
        def forward(self, inputs):
            return F.relu(self.conv(inputs))

    rows = {r.name: r.note for r in fastnn.explain(frozen(Functional().eval(), x))}
    assert "relu after it is a function" in rows["conv"]


def test_hooks_see_what_they_saw():
    model = lively(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Sequential(nn.Conv2d(8, 8, 1)), nn.ReLU()))
    seen = []
    for m in (model[0], model[2]):
        m.register_forward_hook(lambda m, a, o: seen.append(o))
    with torch.no_grad():
        model(x)
        fast = fastnn.accelerate(model, freeze=True)
        assert not kinds(fast, FoldedBatchNorm2d) and not kinds(fast, FusedActivation)
        fast(x)
    torch.testing.assert_close(seen[:2], seen[2:], atol=1e-5, rtol=1e-4)


def test_training_mode():
    model = lively(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    fast = frozen(model, x)
    fast.train()
    with pytest.raises(RuntimeError, match=r"fastnn\.freeze: .* fastnn\.restore\(model\)"):
        fast(x)
    fast[1].eval()
    with pytest.raises(RuntimeError, match="fused ReLU in training mode"):
        fast(x)
    fastnn.restore(fast).train()
    torch.testing.assert_close(fast(x), model.train()(x))
    with pytest.warns(UserWarning, match="1 BatchNorm2d in training mode"):
        fast = fastnn.accelerate(model, freeze=True)
    assert {r.name: r.note for r in fastnn.explain(fast)}["1"].endswith("not folded: in training mode")
    torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-4)


def test_norms_without_statistics_stay():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False)).eval()
    assert not kinds(frozen(model, x), FoldedBatchNorm2d)


def edits(model):
    """Yield after each way of editing a weight that its version counter, its storage or its identity shows."""
    with torch.no_grad():
        model[0].weight.mul_(2)
        yield "in place"
        model[0].bias.add_(1)
        yield "bias"
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(model[1], name).mul_(1.5)
            yield name
        model.load_state_dict({k: v * 0.5 if v.is_floating_point() else v for k, v in model.state_dict().items()})
        yield "load_state_dict"
        model[3].weight.zero_()
        yield "linear"
        del model[3].bias
        model[3].bias = nn.Parameter(torch.ones(4))
        yield "another parameter"


def test_edits_after_freezing_are_seen():
    fast = fastnn.accelerate(
        lively(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Linear(7, 4))), freeze=True
    )
    with torch.no_grad():
        fast(x)
        for edit in edits(fast):
            expected = fastnn.restore(copy.deepcopy(fast))(x)
            torch.testing.assert_close(fast(x), expected, atol=1e-5, rtol=1e-4, msg=edit)
        fast.double()
        torch.testing.assert_close(fast(x.double()), fastnn.restore(copy.deepcopy(fast))(x.double()))


def test_a_new_weight_in_the_place_of_the_old_is_seen():
    layer = fastnn.freeze(fastnn.nn.Linear(64, 64, bias=False))
    with torch.no_grad():
        for i in range(20):  # the allocator hands the same memory out again
            layer.weight = None
            layer.weight = nn.Parameter(torch.full((64, 64), float(i)))
            assert layer(torch.ones(1, 64))[0, 0] == 64 * i


def test_gradients_of_a_frozen_model():
    model = lively(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Linear(7, 4)))
    fast = frozen(model, x)
    found = []
    for m in (model, fast):
        m.zero_grad(set_to_none=True)
        inputs = x.clone().requires_grad_()
        m(inputs).square().sum().backward()
        found.append([inputs.grad, *(p.grad for p in m.parameters())])
    torch.testing.assert_close(found[1], found[0], atol=1e-3, rtol=1e-3)
    for p in fast.parameters():
        p.requires_grad_(False)
    with torch.inference_mode():
        fast(x)
    inputs = x.clone().requires_grad_()
    fast(inputs).square().sum().backward()
    torch.testing.assert_close(inputs.grad, found[0][0], atol=1e-3, rtol=1e-3)


def test_frozen_models_compile_copy_and_pickle():
    model = lively(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Linear(7, 4)))
    fast = frozen(model, x)
    with torch.no_grad():
        expected = model(x)
        for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            torch.testing.assert_close(other(x), expected, atol=1e-5, rtol=1e-4)
            assert other[0]._fold.norm is other[1]
            fastnn.restore(other)
            torch.testing.assert_close(other(x), expected, atol=0, rtol=0)
            assert repr(other) == repr(model)
        compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, atol=1e-5, rtol=1e-4)


def test_freezing_one_module():
    layer = fastnn.nn.Linear(8, 8, activation="gelu")
    assert fastnn.freeze(layer) is layer and layer._frozen
    with torch.no_grad():
        inputs = torch.randn(3, 8)
        torch.testing.assert_close(layer(inputs), F.gelu(F.linear(inputs, layer.weight, layer.bias)))
    assert not fastnn.restore(layer)._frozen and layer.activation == "gelu"


class Tagger(nn.Module):
    """Recurrent layers and a cell among other modules."""

    def __init__(self):
        super().__init__()
        self.embed, self.act = nn.Linear(5, 6), nn.ReLU()
        self.encoder = nn.LSTM(6, 7, num_layers=2, bidirectional=True, batch_first=True)
        self.decoder, self.gate = nn.GRU(14, 8, batch_first=True), nn.GRUCell(8, 8)

    def forward(self, inputs):
        y = self.decoder(self.encoder(self.act(self.embed(inputs)))[0])[0]
        return self.gate(y[:, -1])


def test_recurrent_layers_of_a_model():
    model, inputs = Tagger().eval(), torch.randn(3, 4, 5)
    fast = frozen(model, inputs)
    recurrent = (fast.encoder, fast.decoder, fast.gate)
    assert all(m._pack for m in recurrent) and kinds(fast, FusedActivation) == ["act"]
    assert all(r.served for r in fastnn.explain(fast)) and list(fast.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        for m in recurrent:
            for p in m.parameters():
                p.mul_(0.9)
        expected = fastnn.restore(copy.deepcopy(fast))(inputs)
        torch.testing.assert_close(fast(inputs), expected, atol=1e-5, rtol=1e-4)
        twin = pickle.loads(pickle.dumps(fast))
        torch.testing.assert_close(twin(inputs), expected, atol=1e-5, rtol=1e-4)
        compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(inputs), expected, atol=1e-5, rtol=1e-4)
    fastnn.restore(fast)
    assert [type(m) for m in recurrent] == [nn.LSTM, nn.GRU, nn.GRUCell]
    assert not any("_pack" in m.__dict__ or "_frozen" in m.__dict__ for m in fast.modules())
    with torch.no_grad():
        torch.testing.assert_close(fast(inputs), expected, atol=1e-5, rtol=1e-4)


class NormAct(nn.BatchNorm2d):
    """A batch norm with an activation of its own, as timm's."""

    def __init__(self, features, act, more=None):
        super().__init__(features)
        self.drop, self.act, self.more = nn.Identity(), act, more

    def forward(self, x):
        torch._assert(x.ndim == 4, "images")
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return self.act(self.drop(x)) if self.more is None else self.act(x) * self.more


@pytest.mark.parametrize(
    ("act", "more", "folded", "fused"),
    [
        (nn.ReLU(), None, True, True),
        (nn.Identity(), None, True, False),
        (nn.Softshrink(), None, True, False),
        (nn.SiLU(), 2.0, False, False),
    ],
    ids=str,
)
def test_batch_norms_with_an_activation_of_their_own(act, more, folded, fused):
    """Folded where they only apply their children after it, and the activation is fused where a kernel has it."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), NormAct(8, act, more), nn.Tanh(), nn.Conv2d(8, 4, 1)).eval()
    with torch.no_grad():
        for t in (*net[1].parameters(), net[1].running_mean):
            t.normal_()
    fast, x = fastnn.accelerate(net, freeze=True), torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-5)
        again = fastnn.freeze(fast)
        torch.testing.assert_close(again(x), net(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(copy.deepcopy(fast)(x), net(x), rtol=1e-4, atol=1e-5)
    notes = {r.name: r.note for r in fastnn.explain(fast)}
    assert ("not folded: NormAct may do more than normalize" in notes["1"]) is not folded
    assert notes["1"].startswith("folded") is folded
    assert notes.get("1.act", "").startswith("fused") is fused
    assert notes.get("2", "").startswith("fused") is isinstance(act, nn.Identity), (
        "nothing may overtake another activation"
    )
    fastnn.restore(fast)
    for a, b in zip(fast.modules(), net.modules(), strict=True):
        assert type(a) is type(b) and a.__dict__.keys() == b.__dict__.keys()
    with torch.no_grad():
        assert torch.equal(fast(x), net(x))
