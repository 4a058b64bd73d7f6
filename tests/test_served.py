"""Each function that fastnn serves, against torch's own: values, gradients, errors, and what is left to torch."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.common_methods_invocations import op_db

import fastnn
from fastnn import served
from fastnn.served import SERVED
from fastnn.testing import assert_own_kernels, random

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    monkeypatch.setattr(served, "WORTH", 0)
    monkeypatch.setattr(served, "WORTH_A_GRADIENT", 0)


def weights(mode: str, layers: int = 1, directions: int = 1, biases: bool = True, projected: int = 0, size: int = 5):
    module = {"LSTM": nn.LSTM, "GRU": nn.GRU}.get(mode, nn.RNN)
    options = {"proj_size": projected} if projected else {}
    return list(
        module(size, 4, num_layers=layers, bias=biases, bidirectional=directions == 2, **options).double().parameters()
    )


def states(mode: str, count: int, batch: int = 3, projected: int = 0):
    h = random((count, batch, projected or 4), torch.float64, requires_grad=True)
    return (h, random((count, batch, 4), torch.float64, requires_grad=True)) if mode == "LSTM" else h


def d(*shape, layout="contiguous"):
    return random(shape, torch.float64, layout, requires_grad=True)


def heads(e=8, kdim=None, **options):
    """Arguments of multi_head_attention_forward."""
    separate = {}
    if kdim is not None:
        separate = dict(
            use_separate_proj_weight=True, q_proj_weight=d(e, e), k_proj_weight=d(e, kdim), v_proj_weight=d(e, kdim)
        )
    args = [d(3, 2, e), d(5, 2, kdim or e), d(5, 2, kdim or e), e, 2, None if separate else d(3 * e, e), d(3 * e)]
    return [*args, None, None, False, 0.0, d(e, e), d(e)], {**separate, **options}


RNN = {"LSTM": torch.lstm, "GRU": torch.gru, "RNN_TANH": torch.rnn_tanh, "RNN_RELU": torch.rnn_relu}
CELLS = {
    torch.lstm_cell: "LSTM",
    torch.gru_cell: "GRU",
    torch.rnn_tanh_cell: "RNN_TANH",
    torch.rnn_relu_cell: "RNN_RELU",
}


def problems():
    """(function, arguments by position, by keyword): what fastnn computes."""
    yield F.linear, [d(3, 4), d(5, 4), d(5)], {}
    yield F.linear, [d(2, 3, 4), d(5, 4)], dict(bias=d(5))
    yield F.linear, [d(4)], dict(weight=d(4))
    for mm in (torch.mm, Tensor.mm):
        yield mm, [d(3, 4), d(4, 5)], {}
        yield mm, [d(3, 4, layout="transposed")], dict(mat2=d(4, 5, layout="transposed"))
    for matmul in (torch.matmul, torch.linalg.matmul, Tensor.matmul, Tensor.__matmul__):
        yield matmul, [d(3, 4), d(4, 5)], {}
        yield matmul, [d(2, 3, 4), d(4, 5)], {}
        yield matmul, [d(4), d(4, 5, layout="transposed")], {}
        yield matmul, [d(3, 4), d(4)], {}
        yield matmul, [d(4), d(4)], {}
        yield matmul, [d(2, 3, 4), d(4, 1, layout="strided")], {}
    yield Tensor.__rmatmul__, [d(4, 5), d(3, 4)], {}
    for addmm in (torch.addmm, Tensor.addmm):
        yield addmm, [d(5), d(3, 4), d(4, 5)], {}
        yield addmm, [d(1), d(3, 4), d(4, 5)], dict(beta=1, alpha=1.0)
        yield addmm, [d(), d(3, 4)], dict(mat2=d(4, 5, layout="transposed"))
    yield torch.einsum, ["abc,cde->abde", d(2, 3, 4), d(4, 5, 2)], {}
    yield torch.einsum, ["abcd, cde -> abe", d(2, 3, 4, 2), d(4, 2, 5)], {}
    yield torch.einsum, ["ab,cb->ac", d(3, 4), d(5, 4)], {}
    yield torch.einsum, ["abc,debc->ade", d(3, 4, 2), d(5, 2, 4, 2)], {}
    yield torch.einsum, ["a,ba->b", d(4), d(5, 4)], {}
    for conv in (F.conv2d, torch.conv2d):
        yield conv, [d(2, 4, 7, 6), d(6, 2, 3, 3), d(6)], dict(stride=2, padding=(1, 0), groups=2)
        yield conv, [d(4, 7, 6), d(6, 4, 3, 3)], dict(padding="same", dilation=2)
        yield conv, [d(2, 4, 7, 6, layout="channels_last"), d(6, 4, 1, 1), None, (1,), [0]], {}
    yield F.conv1d, [d(2, 4, 7), d(6, 2, 3), d(6)], dict(stride=2, padding=(1,), groups=2)
    yield torch.conv1d, [d(4, 7), d(6, 4, 3)], dict(padding="same", dilation=2)
    rest = [None, [2, 1], [1, 1], [1, 1], False, [0, 0], 1]
    yield torch.convolution, [d(2, 4, 7, 6), d(6, 4, 3, 3), *rest], {}
    for options in (dict(is_causal=True), dict(scale=0.3), dict(attn_mask=d(3, 5)), dict(enable_gqa=False)):
        yield F.scaled_dot_product_attention, [d(2, 4, 3, 8), d(2, 4, 5, 8), d(2, 4, 5, 6)], options
    yield F.scaled_dot_product_attention, [d(2, 4, 3, 8), d(2, 2, 5, 8), d(2, 2, 5, 8)], dict(enable_gqa=True)
    mask = torch.tensor([[True, True, False, True, True]] * 3)
    yield F.scaled_dot_product_attention, [d(4, 3, 8), d(4, 5, 8), d(4, 5, 8), mask, 0.0, False], {}
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for options in (
        dict(need_weights=False),
        dict(average_attn_weights=False),
        dict(need_weights=False, is_causal=True, attn_mask=torch.ones(3, 5, dtype=torch.bool).triu(1)),
        dict(key_padding_mask=padding, attn_mask=torch.zeros(3, 5, dtype=torch.bool)),
        dict(attn_mask=d(4, 3, 5), training=False),
        dict(kdim=6),
    ):
        args, options = heads(**options)
        yield F.multi_head_attention_forward, args, options
    args, options = heads()
    args[:3] = [args[0]] * 3
    args[7:10] = [d(1, 1, 8), d(1, 1, 8), True]
    yield F.multi_head_attention_forward, args, options
    args, options = heads()
    args[1] = args[2]
    yield F.multi_head_attention_forward, args, options
    args, options = heads(key_padding_mask=padding[1])
    args[:3] = [x.detach()[:, 0].requires_grad_() for x in args[:3]]
    yield F.multi_head_attention_forward, args, options
    sizes = torch.tensor([3, 2, 2])
    for mode, function in RNN.items():
        yield function, [d(6, 3, 5), states(mode, 1), weights(mode), True, 1, 0.0, True, False, False], {}
        deep = weights(mode, 2, 2, biases=False)
        yield function, [d(3, 6, 5), states(mode, 4), deep, False, 2, 0.0, False, True, True], {}
        yield function, [d(7, 5), sizes, states(mode, 2), weights(mode, 2), True, 2, 0.0, True, False], {}
        named = dict(has_biases=True, num_layers=1, dropout=0.0, train=True, bidirectional=False)
        yield function, [d(7, 5), sizes, states(mode, 1), weights(mode)], named
        yield function, [d(6, 3, 5), states(mode, 1), weights(mode)], {**named, "batch_first": False}
    narrow = weights("LSTM", projected=2)
    yield torch.lstm, [d(6, 3, 5), states("LSTM", 1, 3, 2), narrow, True, 1, 0.0, True, False, False], {}
    for cell, mode in CELLS.items():
        state = tuple(s[0] for s in states(mode, 1)) if mode == "LSTM" else states(mode, 1)[0]
        yield cell, [d(3, 5), state, *weights(mode)], {}
        yield cell, [d(3, 5), state, *weights(mode, biases=False)], {}


def name(function) -> str:
    return getattr(function, "__qualname__", function.__name__)


PROBLEMS = [pytest.param(*problem, id=f"{name(problem[0])}-{i}") for i, problem in enumerate(problems())]


def leaves(tree) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def gradients(result, args, kwargs):
    outputs = [y for y in leaves(result) if y.requires_grad]
    inputs = [x for x in leaves((args, kwargs)) if x.requires_grad]
    torch.manual_seed(1)
    weighted = [(y * torch.randn_like(y)).sum() for y in outputs]
    return torch.autograd.grad(sum(weighted), inputs, allow_unused=True)


def assert_same(actual, expected, **tolerance):
    assert len(leaves(actual)) == len(leaves(expected))
    for a, e in zip(leaves(actual), leaves(expected), strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype
        torch.testing.assert_close(a, e, equal_nan=True, **tolerance)


@pytest.mark.parametrize("function, args, kwargs", PROBLEMS)
def test_values_and_gradients(function, args, kwargs):
    expected = function(*args, **kwargs)
    actual = SERVED[function](*args, **kwargs)
    assert actual is not NotImplemented
    assert type(actual) is type(expected)
    assert_same(actual, expected)
    assert_same(gradients(actual, args, kwargs), gradients(expected, args, kwargs))


@pytest.mark.parametrize("function, args, kwargs", PROBLEMS)
def test_runs_on_own_kernels_and_traces(function, args, kwargs):
    # Of the first result: a gradient of attention's weights is computed by torch's operators.
    assert_own_kernels(lambda: gradients(leaves(SERVED[function](*args, **kwargs))[0], args, kwargs))
    tensors = [t.detach() for t in leaves((args, kwargs))]
    flat, spec = torch.utils._pytree.tree_flatten((args, kwargs))

    def traced(*tensors):
        given = iter(tensors)
        a, k = torch.utils._pytree.tree_unflatten([next(given) if isinstance(x, Tensor) else x for x in flat], spec)
        return leaves(SERVED[function](*a, **k))

    symbolic = not any(t.dtype == torch.int64 for t in tensors)  # the sizes of a packed sequence are data
    graph = make_fx(traced, tracing_mode="symbolic" if symbolic else "fake", _allow_non_fake_inputs=True)(*tensors)
    called = {str(node.target) for node in graph.graph.nodes}
    assert any(target.startswith("fastnn.") for target in called)
    assert_same(graph(*tensors), traced(*tensors))


def test_every_function_has_a_problem():
    assert set(SERVED) <= {problem.values[0] for problem in PROBLEMS} | {__import__("operator").matmul}


LEFT = [
    (torch.mm, [d(3, 4), d(4, 5)], dict(out=torch.empty(3, 5, dtype=torch.float64))),
    (torch.mm, [d(3, 4), d(4)], {}),
    (torch.mm, [torch.ones(2, 2, dtype=torch.int64)] * 2, {}),
    (torch.mm, [d(3, 4), d(4, 5).detach().float()], {}),
    (torch.matmul, [d(3, 4), d(4, 5)], dict(out=torch.empty(3, 5, dtype=torch.float64))),
    (torch.matmul, [d(2, 3, 4), d(2, 4, 5)], {}),
    (torch.matmul, [d(4), d(2, 4, 5)], {}),
    (torch.matmul, [d(), d(4)], {}),
    (Tensor.matmul, [d(3, 4), 2.0], {}),
    (Tensor.__rmatmul__, [d(2, 4, 5), d(2, 3, 4)], {}),
    (torch.addmm, [d(3, 5), d(3, 4), d(4, 5)], {}),
    (torch.addmm, [d(5), d(3, 4), d(4, 5)], dict(beta=0.5)),
    (torch.addmm, [d(5), d(3, 4), d(4, 5)], dict(alpha=2)),
    (torch.addmm, [d(5), d(3, 4), d(2, 4, 5)], {}),
    (torch.addmm, [d(5), d(3, 4), d(4, 5)], dict(out=torch.empty(3, 5, dtype=torch.float64))),
    (torch.einsum, ["abc,abd->acd", d(2, 3, 4), d(2, 3, 5)], {}),
    (torch.einsum, ["ab,bc", d(3, 4), d(4, 5)], {}),
    (torch.einsum, ["ab,bc->ca", d(3, 4), d(4, 5)], {}),
    (torch.einsum, ["ab,ab->", d(3, 4), d(3, 4)], {}),
    (torch.einsum, ["aa,ab->ab", d(4, 4), d(4, 5)], {}),
    (torch.einsum, ["...a,ab->...b", d(3, 4), d(4, 5)], {}),
    (torch.einsum, ["ab,bc->ac", [d(3, 4), d(4, 5)]], {}),
    (torch.einsum, ["ab,bc->ac", d(3, 1), d(4, 5)], {}),
    (torch.einsum, ["a->", d(4)], {}),
    (torch.einsum, ["ab,bc,cd->ad", d(3, 4), d(4, 5), d(5, 2)], {}),
    (torch.conv2d, [d(2, 4, 7, 6), d(6, 4, 3, 3)], dict(padding=(1, 1, 1, 1))),
    (torch.convolution, [d(2, 4, 7, 6), d(4, 6, 3, 3), None, [1, 1], [0, 0], [1, 1], True, [0, 0], 1], {}),
    (torch.convolution, [d(2, 4, 7), d(6, 4, 3), None, [1], [0], [1], False, [0], 1], {}),
    (F.scaled_dot_product_attention, [d(4, 3, 8), d(4, 5, 8), None], {}),
    (torch.gru, [d(6, 5), states("GRU", 1)[:, 0], weights("GRU"), True, 1, 0.0, True, False, False], {}),
    (torch.lstm, [d(6, 3, 5), states("LSTM", 1)[:1], weights("LSTM"), True, 1, 0.0, True, False, False], {}),
    (torch.lstm, [d(6, 3, 5), states("LSTM", 1), weights("LSTM"), False, 1, 0.0, True, False, False], {}),
    (torch.lstm, [d(6, 3, 5), states("LSTM", 1), weights("LSTM"), True, 2, 0.0, True, False, False], {}),
    (torch.gru_cell, [d(5), states("GRU", 1)[0, 0], *weights("GRU")], {}),
]


def outcome(call):
    try:
        return call()
    except Exception as error:
        return type(error)


@pytest.mark.parametrize(
    "function, args, kwargs", [pytest.param(*p, id=f"{name(p[0])}-{i}") for i, p in enumerate(LEFT)]
)
def test_what_is_left_to_torch(function, args, kwargs):
    assert SERVED[function](*args, **kwargs) is NotImplemented


@pytest.mark.parametrize(
    "function, args, kwargs", [pytest.param(*p, id=f"{name(p[0])}-{i}") for i, p in enumerate(LEFT)]
)
def test_what_is_left_to_torch_is_as_without(function, args, kwargs):
    if "out" in kwargs:
        args = [a.detach() for a in args]
    expected = outcome(lambda: function(*args, **kwargs))
    with fastnn.patch() as p:
        actual = outcome(lambda: function(*args, **kwargs))
    if isinstance(expected, type):
        assert actual is expected
    else:
        assert_same(actual, expected, rtol=0, atol=0)
        assert sum(p.left.values()) == 1 and not p.served


WRONG = [
    (F.linear, [d(3, 4), d(5, 3)]),
    (F.linear, [d(3, 4), d(5, 4), d(4)]),
    (F.linear, [d(3, 4), d(5, 4).detach().float()]),
    (F.linear, [d(3, 4)]),
    (F.linear, [d(3, 4), 2]),
    (torch.mm, [d(3, 4), d(3, 4)]),
    (torch.matmul, [d(2, 3, 4), d(3, 4)]),
    (torch.addmm, [d(4), d(3, 4), d(4, 5)]),
    (torch.einsum, ["ab,bc->ac", d(3, 4), d(3, 5)]),
    (torch.einsum, ["ab,bc->ac", d(3, 4, 2), d(4, 5)]),
    (torch.conv2d, [d(2, 4, 7, 6), d(6, 3, 3, 3)]),
    (torch.conv1d, [d(2, 4, 7), d(6, 3, 3)]),
    (torch.conv1d, [d(4), d(6, 4, 3)]),
    (torch.conv1d, [d(2, 4, 7), d(6, 4, 3), None, 1, (1, 1)]),
    (torch.conv2d, [d(2, 4, 7, 6), d(6, 4, 3, 3), None, 0]),
    (torch.conv2d, [d(2, 4, 7, 6), d(6, 4, 3, 3), None, 1, "all"]),
    (F.scaled_dot_product_attention, [d(4, 3, 8), d(4, 5, 7), d(4, 5, 8)]),
    (F.scaled_dot_product_attention, [d(4, 3, 8), d(4, 5, 8), d(4, 5, 8), d(3, 5), 0.0, True]),
    (F.multi_head_attention_forward, [d(3, 2, 8), d(5, 2, 8), d(4, 2, 8), *heads()[0][3:]]),
    (F.multi_head_attention_forward, [d(3, 2, 8), d(5, 2, 8), d(5, 2, 8), 6, *heads()[0][4:]]),
    (F.multi_head_attention_forward, [d(3, 2, 8), d(5, 2, 8), d(5, 2, 8), 8, 3, *heads()[0][5:]]),
    (F.multi_head_attention_forward, [*heads()[0][:7], d(1, 1, 8), *heads()[0][8:]]),
    (torch.gru, [d(6, 3, 5), states("GRU", 1, 2), weights("GRU"), True, 1, 0.0, True, False, False]),
    (torch.lstm, [d(6, 3, 6), states("LSTM", 1), weights("LSTM"), True, 1, 0.0, True, False, False]),
    (torch.lstm, [d(0, 3, 5), states("LSTM", 1), weights("LSTM"), True, 1, 0.0, True, False, False]),
    (torch.gru_cell, [d(3, 5), states("GRU", 1, 2)[0], *weights("GRU")]),
]


@pytest.mark.parametrize("function, args", [pytest.param(*p, id=f"{name(p[0])}-{i}") for i, p in enumerate(WRONG)])
def test_errors_are_of_torchs_types(function, args):
    expected = outcome(lambda: function(*args))
    assert isinstance(expected, type)
    with fastnn.patch():
        assert outcome(lambda: function(*args)) is expected


OPS = {
    "addmm",
    "mm",
    "matmul",
    "__rmatmul__",
    "einsum",
    "nn.functional.linear",
    "nn.functional.conv1d",
    "nn.functional.conv2d",
    "nn.functional.scaled_dot_product_attention",
    "nn.functional.multi_head_attention_forward",
}


@pytest.mark.works("Patching", "PyTorch's own samples (OpInfo) of the functions served, with gradients")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("op", [op for op in op_db if op.name in OPS], ids=lambda op: op.formatted_name)
def test_opinfo(op, dtype, record_property):
    total = served = 0
    given = op.sample_inputs("cpu", dtype, requires_grad=True)
    for sample in (s for one in given for s in (one, one.noncontiguous())):
        args = (sample.input, *sample.args)
        total += 1
        torch.manual_seed(0)
        expected = op(*args, **sample.kwargs)
        torch.manual_seed(0)
        with fastnn.patch() as p:
            actual = op(*args, **sample.kwargs)
        served += sum(p.served.values())
        drops = op.name.endswith("multi_head_attention_forward") and sample.args[9] > 0
        if drops or sample.kwargs.get("dropout_p"):  # the masks are others
            assert [y.shape for y in leaves(actual)] == [y.shape for y in leaves(expected)]
            continue
        tolerance = {} if dtype == torch.float64 else dict(rtol=1e-4, atol=1e-4)
        assert_same(actual, expected, **tolerance)
        if any(y.requires_grad for y in leaves(expected)):
            args = (args, sample.kwargs)
            assert_same(gradients(actual, *args), gradients(expected, *args), **tolerance)
    assert served or op.name in ("addmm", "einsum")  # their samples add matrices, and contract in other ways
    record_property(op.name, f"{served} of {total}")


@pytest.mark.parametrize(
    "op", [op for op in op_db if op.name in OPS and op.error_inputs_func], ids=lambda op: op.formatted_name
)
def test_opinfo_errors(op):
    """PyTorch's own samples of wrong calls raise the same type of exception."""
    for error in op.error_inputs("cpu"):
        sample = error.sample_input
        with fastnn.patch(), pytest.raises(error.error_type):
            op(sample.input, *sample.args, **sample.kwargs)


def test_a_product_is_served_where_it_pays(monkeypatch):
    monkeypatch.undo()
    x, small, large = torch.randn(8, 256), torch.randn(256, 8), torch.randn(256, 256)
    for mm in (torch.mm, torch.matmul, lambda x, w: torch.addmm(w.new_zeros(w.shape[1]), x, w)):
        with fastnn.patch() as p:
            mm(x, small), mm(x, large), mm(x[:2], torch.randn(256, 1024)), mm(x[:2], torch.randn(1024, 256).t())
        assert sum(p.served.values()) == 3 and sum(p.left.values()) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 3, 40])
def test_the_gradient_of_a_matrix_is_laid_out_as_the_matrix(rows, dtype):
    """autograd copies a gradient that is not."""
    x, weight = (random(shape, dtype, requires_grad=True) for shape in ((rows, 24), (24, 56)))
    output = fastnn.functional.linear(x, weight.t())
    grad = torch.autograd.grad(output, weight, torch.ones_like(output))[0]
    assert grad.stride() == weight.stride()
    exact = x.detach().double().t() @ torch.ones(rows, 56, dtype=torch.float64)
    tolerance = dict(rtol=1e-2, atol=1e-2) if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(grad, exact.to(dtype), **tolerance)
    torch.library.opcheck(torch.ops.fastnn.linear.default, (x, weight.detach().t().requires_grad_(), None))


def test_fake_tensors():
    with FakeTensorMode(), fastnn.patch() as p:
        output = torch.empty(3, 4) @ torch.empty(4, 5)
    assert output.shape == (3, 5) and p.served["matmul"] == 1
