"""Every class of fastnn.nn beside the class of that name in torch.nn: built alike, called alike, treated alike."""

import copy
import inspect
import io
import pickle
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.testing._internal.common_modules import module_db
from torch.utils import _pytree

import fastnn
import fastnn.nn as fnn
from tests.modules import doubled, floats, no_worse, same

pytestmark = pytest.mark.usefixtures("one_thread")


class Spec(NamedTuple):
    """A small instance: constructor arguments, and the shapes of the positional inputs (nested as in the call)."""

    args: tuple
    kwargs: dict
    inputs: tuple


LAYER = {"dim_feedforward": 16, "dropout": 0.0, "batch_first": True}
SPECS = {
    "Linear": Spec((5, 3), {}, ((4, 5),)),
    "Conv1d": Spec((4, 6, 3), {"padding": 1, "groups": 2}, ((2, 4, 7),)),
    "Conv2d": Spec((4, 6, 3), {"padding": 1, "groups": 2}, ((2, 4, 7, 5),)),
    "RNN": Spec((5, 6), {"num_layers": 2, "bidirectional": True}, ((3, 2, 5), (4, 2, 6))),
    "GRU": Spec((5, 6), {"num_layers": 2, "batch_first": True}, ((2, 3, 5), (2, 2, 6))),
    "LSTM": Spec((5, 6), {"num_layers": 2, "proj_size": 4}, ((3, 2, 5), ((2, 2, 4), (2, 2, 6)))),
    "RNNCell": Spec((5, 6), {"nonlinearity": "relu"}, ((2, 5), (2, 6))),
    "GRUCell": Spec((5, 6), {}, ((2, 5), (2, 6))),
    "LSTMCell": Spec((5, 6), {}, ((2, 5), ((2, 6), (2, 6)))),
    "MultiheadAttention": Spec((8, 2), {"batch_first": True, "kdim": 6}, ((2, 3, 8), (2, 5, 6), (2, 5, 8))),
    "TransformerEncoderLayer": Spec((8, 2), LAYER, ((2, 3, 8),)),
    "TransformerDecoderLayer": Spec((8, 2), LAYER, ((2, 3, 8), (2, 5, 8))),
    "TransformerEncoder": Spec(("TransformerEncoderLayer", 2), {"enable_nested_tensor": False}, ((2, 3, 8),)),
    "TransformerDecoder": Spec(("TransformerDecoderLayer", 2), {}, ((2, 3, 8), (2, 5, 8))),
    "Transformer": Spec((8, 2, 2, 1, 16, 0.0), {"batch_first": True}, ((2, 3, 8), (2, 5, 8))),
}
NAMES = list(SPECS)
MODULE_INFOS = {info.module_cls.__name__: info for info in module_db if info.module_cls.__name__ in SPECS}


def build(library, name, **where):
    """Build the spec's instance from ``torch.nn`` or ``fastnn.nn``; ``where`` holds device and dtype."""
    args, kwargs, _ = SPECS[name]
    if isinstance(args[0], str):  # a stack of layers
        args, where = (build(library, args[0], **where), *args[1:]), {}
    return getattr(library, name)(*args, **kwargs, **where)


def pair(name, **where):
    """Build both, with the same parameters."""
    fast, stock = build(fnn, name, **where), build(nn, name, **where)
    fast.load_state_dict(stock.state_dict())
    return fast, stock


def inputs(name, dtype=torch.float32, device="cpu", requires_grad=False):
    def make(shape):
        if isinstance(shape[0], tuple):
            return tuple(make(s) for s in shape)
        return torch.randn(shape, dtype=dtype, device=device, requires_grad=requires_grad)

    return tuple(make(shape) for shape in SPECS[name].inputs)


def derivatives(module, args, kwargs, second=False):
    """Outputs, first and (of their squares' sum) second derivatives with respect to inputs and parameters."""
    outputs = module(*args, **kwargs)
    wanted = [t for t in floats((args, kwargs)) if t.requires_grad] + list(module.parameters())
    loss = sum(out.sin().sum() for out in floats(outputs))
    grads = torch.autograd.grad(loss, wanted, create_graph=second, allow_unused=True)
    if not second:
        return outputs, grads
    loss = sum(g.square().sum() for g in grads if g is not None and g.requires_grad)
    return outputs, grads, torch.autograd.grad(loss, wanted, allow_unused=True)


# ------------------------------------------------------------------------------------------- torch's own samples


def fastnn_layers(value):
    """A constructor argument of a sample: layers of torch.nn (what the stacks take) as their fastnn namesakes."""
    if not isinstance(value, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        return value
    attention, name = value.self_attn, type(value).__name__
    layer = getattr(fnn, name)(
        attention.embed_dim,
        attention.num_heads,
        value.linear1.out_features,
        value.dropout.p,
        value.activation,
        value.norm1.eps,
        attention.batch_first,
        value.norm_first,
        value.linear1.bias is not None,
        dtype=value.linear1.weight.dtype,
    )
    layer.load_state_dict(value.state_dict())
    return layer


def samples(name, dtype):
    """PyTorch's ModuleInfo samples, none skipped: fastnn's module, torch's with the same weights, and a call."""
    info = MODULE_INFOS[name]
    for sample in info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=True):
        args, kwargs = sample.constructor_input.args, dict(sample.constructor_input.kwargs)
        if not isinstance(next(iter(args), None), nn.Module):
            kwargs["dtype"] = dtype
        stock = info.module_cls(*args, **kwargs)
        fast = getattr(fnn, name)(*map(fastnn_layers, args), **kwargs)
        fast.load_state_dict(stock.state_dict())
        yield fast, stock, (sample.forward_input.args, sample.forward_input.kwargs)


@pytest.mark.parametrize("name", list(MODULE_INFOS))  # torch has none for TransformerDecoder
@pytest.mark.filterwarnings("ignore")
def test_module_info(name):
    """PyTorch's samples in float64: outputs and gradients, second derivatives of every eighth, evaluation."""
    count = 0
    for fast, stock, call in samples(name, torch.float64):
        second = count % 8 == 0
        count += 1
        with sdpa_kernel(SDPBackend.MATH):  # torch's other CPU kernel has no second derivatives
            same(derivatives(fast, *call, second), derivatives(stock, *call, second))
        fast.eval(), stock.eval()
        with torch.no_grad():
            same(fast(*call[0], **call[1]), stock(*call[0], **call[1]))
    assert count


@pytest.mark.parametrize("name", list(MODULE_INFOS))
@pytest.mark.filterwarnings("ignore")
def test_module_info_float32(name):
    """PyTorch's samples in float32: no further from the answer in float64 than torch is."""
    for fast, stock, call in samples(name, torch.float32):
        result, expected = fast(*call[0], **call[1]), stock(*call[0], **call[1])
        args, kwargs = doubled(call)
        no_worse(result, expected, stock.double()(*args, **kwargs))


@pytest.mark.parametrize("name", [n for n, info in MODULE_INFOS.items() if info.module_error_inputs_func])
def test_module_info_errors(name):
    """PyTorch's samples of wrong calls raise the same type of exception."""
    info = MODULE_INFOS[name]
    wrong = info.module_error_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=False, training=True)
    for sample in wrong:
        made, call = sample.module_error_input.constructor_input, sample.module_error_input.forward_input
        with pytest.raises(sample.error_type):
            module = getattr(fnn, name)(*made.args, **made.kwargs)
            module(*call.args, **call.kwargs)


# ----------------------------------------------------------------------------------------------------- built alike


def test_every_class():
    """fastnn.nn offers the classes of the table, and they are what is tested here."""
    public = {n for n, c in vars(fnn).items() if inspect.isclass(c) and issubclass(c, nn.Module)}
    assert public == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_signature(name):
    """The constructor takes what torch's takes, in the same places, with the same defaults; forward's names agree."""
    fast, stock = getattr(fnn, name), getattr(nn, name)
    for method in ("__init__", "forward"):
        expected = inspect.signature(getattr(stock, method)).parameters
        found = inspect.signature(getattr(fast, method)).parameters
        if any(
            p.kind == p.VAR_POSITIONAL for p in expected.values()
        ):  # nn.RNN and its sisters say only *args, **kwargs
            continue
        for position, (key, parameter) in enumerate(expected.items()):
            assert key in found, f"{method}: {key}"
            assert found[key].default == parameter.default or found[key].default is parameter.default
            assert list(found).index(key) == position
    assert issubclass(fast, (stock, nn.RNNBase))


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_repr_and_seed(name):
    torch.manual_seed(1)
    fast = build(fnn, name)
    torch.manual_seed(1)
    stock = build(nn, name)
    assert repr(fast) == repr(stock)
    assert list(fast.state_dict()) == list(stock.state_dict())
    same(fast.state_dict(), stock.state_dict())  # one seed, one initialisation
    assert [n for n, _ in fast.named_modules()] == [n for n, _ in stock.named_modules()]
    assert [n for n, _ in fast.named_parameters()] == [n for n, _ in stock.named_parameters()]
    assert set(vars(stock)) <= set(vars(fast))

    torch.manual_seed(2)
    other_fast, other_stock = build(fnn, name), build(nn, name)
    other_fast.load_state_dict(stock.state_dict(), strict=True)
    other_stock.load_state_dict(fast.state_dict(), strict=True)
    same(other_fast.state_dict(), other_stock.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_meta(name):
    """Built on the meta device, run there, then given memory and weights."""
    fast, stock = build(fnn, name, device="meta"), build(nn, name)
    with torch.device("meta"):
        assert all(p.is_meta for p in build(fnn, name).parameters())
    assert all(p.is_meta for p in fast.parameters())
    args = inputs(name)
    expected = stock(*args)
    abstract = fast(*_pytree.tree_map(lambda t: t.to("meta"), args))
    assert [t.shape for t in floats(abstract)] == [t.shape for t in floats(expected)]
    assert all(t.is_meta for t in floats(abstract))
    fast = fast.to_empty(device="cpu")
    fast.load_state_dict(stock.state_dict())
    same(fast(*args), expected)


# ---------------------------------------------------------------------------------------------------- called alike


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_dtypes(name, dtype):
    """Converted modules give torch's dtype and values (the half dtypes against torch's in float32)."""
    fast, stock = pair(name)
    fast, args = fast.to(dtype), inputs(name, dtype)
    stock = stock.to(dtype)
    outputs = fast(*args)
    assert all(t.dtype == dtype for t in floats(outputs))
    if dtype.itemsize > 2:
        same(outputs, stock(*args))
        return
    expected = stock.float()(*_pytree.tree_map(lambda t: t.float(), args))
    for a, b in zip(floats(outputs), floats(expected), strict=True):
        torch.testing.assert_close(a.float(), b, atol=16 * torch.finfo(dtype).eps, rtol=16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", NAMES)
def test_hooks(name):
    """Forward pre-hooks, forward hooks (which may replace the output) and backward hooks run, once."""
    fast, stock = pair(name)
    ran = []
    fast.register_forward_pre_hook(lambda m, a: ran.append("pre"))
    fast.register_forward_hook(lambda m, a, out: ran.append("forward"))
    fast.register_full_backward_pre_hook(lambda m, g: ran.append("backward pre"))
    fast.register_full_backward_hook(lambda m, gi, go: ran.append("backward"))
    args = inputs(name, requires_grad=True)
    same(derivatives(fast, args, {}), derivatives(stock, args, {}))
    assert ran == ["pre", "forward", "backward pre", "backward"]
    handle = fast.register_forward_hook(lambda m, a, out: floats(out)[0] * 0 + 7)
    assert (fast(*inputs(name)) == 7).all()
    handle.remove()
    fast.register_forward_pre_hook(lambda m, a: _pytree.tree_map(lambda t: 2 * t, a))
    same(fast(*args), stock(*_pytree.tree_map(lambda t: 2 * t, args)))


@pytest.mark.parametrize("name", [n for n in NAMES if "Transformer" in n])
def test_hooks_of_children(name):
    """Hooks on children run as often as in torch, see and may change the same values."""
    results = []
    for module in pair(name):
        seen = []
        for child_name, child in module.named_modules():
            if child_name and not child_name.endswith("out_proj"):
                child.register_forward_hook(lambda m, a, out, n=child_name: seen.append((n, floats(out)[0].detach())))
        torch.manual_seed(3)
        module(*inputs(name))
        results.append(seen)
    assert [n for n, _ in results[0]] == [n for n, _ in results[1]]
    same([t for _, t in results[0]], [t for _, t in results[1]])


@pytest.mark.parametrize("name", NAMES)
def test_no_grad_and_frozen_parameters(name):
    fast, stock = pair(name)
    args = inputs(name)
    for module in (fast, stock):
        module.requires_grad_(False)
    same(fast(*args), stock(*args))
    assert not any(t.requires_grad for t in floats(fast(*args)))
    with torch.inference_mode():
        same(fast.eval()(*args), stock.eval()(*args))


@pytest.mark.parametrize("name", NAMES)
def test_compile(name):
    """One graph, forward and training."""
    torch._dynamo.reset()
    fast, stock = pair(name)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    args = inputs(name, requires_grad=True)
    same(derivatives_of(compiled, fast, args), derivatives_of(stock, stock, args))
    with torch.no_grad():
        fast.eval(), stock.eval()
        same(compiled(*args), stock(*args))


def derivatives_of(call, module, args):
    """As :func:`derivatives`, through a compiled ``call`` of ``module``."""
    outputs = call(*args)
    wanted = list(floats(args)) + list(module.parameters())
    loss = sum(out.sin().sum() for out in floats(outputs))
    return outputs, torch.autograd.grad(loss, wanted, allow_unused=True)


# --------------------------------------------------------------------------------------------------- treated alike


@pytest.mark.parametrize("name", NAMES)
def test_copies(name):
    """deepcopy, pickle and torch.save give an equal module with weights of its own."""
    fast, _ = pair(name)
    args = inputs(name)
    expected = fast(*args)
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(fast),
        pickle.loads(pickle.dumps(fast)),
        torch.load(buffer, weights_only=False),
    ):
        assert type(other) is type(fast) and repr(other) == repr(fast)
        same(other(*args), expected)
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
    same(fast(*args), expected)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_read_at_each_call(name):
    """Edits in place, through ``.data``, by load_state_dict (both kinds) and by functional_call all take effect."""
    fast, stock = pair(name, dtype=torch.float64)
    args = inputs(name, torch.float64)
    fast(*args)
    with torch.no_grad():
        for module in (fast, stock):
            for p in module.parameters():
                p.mul_(0.5)
    same(fast(*args), stock(*args))
    for module in (fast, stock):
        for p in module.parameters():
            p.data = p.data + 0.25
    same(fast(*args), stock(*args))
    torch.manual_seed(5)
    new = build(nn, name, dtype=torch.float64).state_dict()
    for assign in (False, True):
        state = {k: v + assign for k, v in new.items()}
        for module in (fast, stock):
            module.load_state_dict(copy.deepcopy(state), assign=assign)
        same(fast(*args), stock(*args))
    replaced = {k: v.detach() * 2 for k, v in fast.named_parameters()}
    before = fast(*args)
    same(
        torch.func.functional_call(fast, replaced, args),
        torch.func.functional_call(stock, replaced, args),
    )
    same(fast(*args), before)


@pytest.mark.parametrize("name", NAMES)
def test_frozen(name):
    """Frozen, with packed copies kept: the same answers, and every edit takes effect."""
    fast, stock = pair(name, dtype=torch.float64)
    fastnn.freeze(fast.eval()), stock.eval()
    args = inputs(name, torch.float64)
    with torch.no_grad():
        same(fast(*args), stock(*args))
        assert all(m._pack for m in fast.modules() if isinstance(m, (fnn.Linear, fnn.RNN, fnn.LSTM, fnn.LSTMCell)))
        for key, p in fast.named_parameters():
            for q in (p, stock.get_parameter(key)):
                q.mul_(0.5)
            same(fast(*args), stock(*args))
        state = {k: torch.randn_like(v) for k, v in stock.state_dict().items()}
        for module in (fast, stock):
            module.load_state_dict(copy.deepcopy(state), assign=True)
        same(fast(*args), stock(*args))
    same(derivatives(fast, args, {}), derivatives(stock, args, {}))
    with torch.no_grad():
        same(copy.deepcopy(fast)(*args), stock(*args))
        same(fastnn.restore(fast)(*args), stock(*args))


class _Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("name", NAMES)
def test_parametrize(name):
    """A parametrization of each parameter of each child takes effect, gets its gradient, and can be removed."""
    fast, stock = pair(name, dtype=torch.float64)
    args = inputs(name, torch.float64, requires_grad=True)
    for module in (fast, stock):
        for child in list(module.modules()):
            for key in [k for k, p in child.named_parameters(recurse=False)]:
                parametrize.register_parametrization(child, key, _Doubled())
    result, expected = derivatives(fast, args, {}), derivatives(stock, args, {})
    same(result, expected)
    for module in (fast, stock):
        for child in list(module.modules()):
            if parametrize.is_parametrized(child):
                for key in list(child.parametrizations):
                    parametrize.remove_parametrizations(child, key)
    same(fast(*args), result[0])


@pytest.mark.parametrize("name", NAMES)
def test_training_step(name):
    """Three steps of SGD leave the same weights."""
    fast, stock = pair(name, dtype=torch.float64)
    args = inputs(name, torch.float64)
    for module in (fast, stock):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            sum(out.square().mean() for out in floats(module(*args))).backward()
            optimizer.step()
    same(fast.state_dict(), stock.state_dict())


def test_a_cell_wants_both_states_or_none():
    cell, x, h = fastnn.nn.LSTMCell(3, 4), torch.randn(2, 3), torch.randn(2, 4)
    torch.testing.assert_close(cell(x), cell(x, (torch.zeros(2, 4), torch.zeros(2, 4))))
    for states in ((h, None), (None, h)):
        with pytest.raises((AttributeError, RuntimeError)):
            cell(x, states)
