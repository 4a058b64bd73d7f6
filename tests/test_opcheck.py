"""torch.library.opcheck, all of its tests, over every op that fastnn registers: an op without samples here fails."""

import importlib
import itertools
import pkgutil

import pytest
import torch

import fastnn

for module in pkgutil.walk_packages(fastnn.__path__, "fastnn."):  # any of them may register an op
    importlib.import_module(module.name)

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
OPS = torch.ops.fastnn
REGISTERED = sorted(n for n in torch._C._dispatch_get_all_op_names() if n.startswith("fastnn::"))
TRACED = {"conv2d_backward", "attention_backward", "attention_weights", "attention_weights_backward", "rnn_backward"}
VARIANTS = [(torch.float32, True), (torch.bfloat16, False)]


def draw(dtype, grad, *shapes):
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_(grad) for shape in shapes]


def leaf(view, grad):
    """A view as an argument: its strides are kept."""
    return view.detach().requires_grad_(grad)


def second(dtype, grad):
    """Whether gradients are wanted that torch's operators compute: they take seconds to trace, so of one sample of an op."""
    return grad and dtype == torch.float32


def linear(dtype, grad):
    x, w, b = draw(dtype, grad, (2, 3, 4), (5, 4), (5,))
    yield x, w, b, "gelu"
    yield x, w, None
    yield leaf(x[:0], grad), w, b, "relu"
    yield leaf(x.transpose(0, 1), grad), leaf(w.t().contiguous().t(), grad), b
    yield x[0].detach(), w.detach(), b.detach(), "tanh", OPS.linear_pack(w)


def linear_train(dtype, grad):
    for x, w, b, *rest in linear(dtype, False):
        yield x, w, b, rest[0] if rest else None


def linear_backward(dtype, grad):
    for x, w, b, activation in linear_train(dtype, False):
        output, saved = OPS.linear_train(x, w, b, activation)
        if grad and b is not None:
            for t in (x, w, b):
                t.requires_grad_()
        given = torch.randn_like(output).requires_grad_(grad)
        yield given, x, w, b, saved if activation else None, activation, [True, True, b is not None]
    yield given, x, w, b, saved, activation, [False, True, False]


def linear_pack(dtype, grad):
    (w,) = draw(dtype, False, (5, 4))
    yield (w,)
    yield (w.t(),)
    yield (w[:0],)


PLAIN, GROUPED = ([1, 1], [1, 1, 1, 1], [1, 1], 1), ([2, 1], [1, 0, 2, 1], [1, 2], 2)


def conv2d(dtype, grad):
    x, w, b = draw(dtype, grad, (2, 4, 5, 6), (4, 4, 3, 3), (4,))
    few = leaf(w[:, :2].contiguous(), grad)
    yield x, w, b, *PLAIN, "gelu"
    yield x, few, None, *GROUPED
    yield leaf(x[0], grad), few, b, *GROUPED, "silu"
    yield leaf(x[:0], grad), w, b, *PLAIN, "relu"
    yield *(leaf(t.contiguous(memory_format=torch.channels_last), grad) for t in (x, w)), b, *PLAIN
    yield leaf(x.transpose(2, 3), grad), leaf(w.transpose(0, 1), grad), b, *PLAIN
    yield *(t.detach() for t in (x, w, b)), *PLAIN, "relu", OPS.conv2d_pack(w, 1, False)


def conv2d_train(dtype, grad):
    for *args, rest in ((*sample[:7], sample[7:8]) for sample in conv2d(dtype, False)):
        yield *args, *(rest or [None])


def conv2d_backward(dtype, grad):
    for i, (x, w, b, *geometry, activation) in enumerate(conv2d_train(dtype, False)):
        output, saved = OPS.conv2d_train(x, w, b, *geometry, activation)
        saved, given = saved if activation else None, torch.randn_like(output)
        if i == 4:
            given, x, w, b = (leaf(t, second(dtype, grad)) for t in (given, x, w, b))
        yield given, x, w, b, saved, *geometry, activation, [True, True, b is not None]
    yield given, x, w, b, saved, *geometry, activation, [False, True, False]


def conv2d_pack(dtype, grad):
    (w,) = draw(dtype, False, (4, 2, 3, 3))
    for groups, channels_last in ((1, False), (1, True), (2, False)):
        yield w, groups, channels_last
    if dtype == torch.float32:
        yield w, 1, False, "winograd4"


def attention(dtype, grad):
    q, k, v, mask = draw(dtype, grad, (2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6), (4, 5, 7))
    one = [leaf(t[0, 0], grad) for t in (q, k, v)]
    yield q, k, v, mask, 0.0, False, None, True
    yield q, k, v, mask > -1, 0.0, False, 0.3, True, [2, 3], 2.0
    yield q, k, v, None, 0.3, False, None, True, None, None, torch.tensor([5])
    yield *one, None, 0.0, True
    yield *(leaf(t[:, :2].transpose(1, 2).contiguous().transpose(1, 2), grad) for t in (q, k, v)), None, 0.0, True
    yield tuple(draw(dtype, grad, (0, 2, 5, 8), (0, 2, 7, 8), (0, 2, 7, 6)))
    yield leaf(q[:, :2, :1], grad), *(leaf(t[:1], grad) for t in (k, v))


def attention_weights(dtype, grad):
    for i, sample in enumerate(attention(dtype, False)):
        defaults = (None, 0.0, False, None, False, None, None, None)
        q, k, v, mask, *options = (*sample, *defaults[len(sample) - 3 :])
        if i == 0:
            q, k, v, mask = (leaf(t, second(dtype, grad)) for t in (q, k, v, mask))
        yield q, k, v, mask, *options, bool(i % 2 and q.dim() > 2)


def attention_backward(dtype, grad):
    for i, sample in enumerate(attention(dtype, False)):
        defaults = (None, 0.0, False, None, False, None, None, None)
        q, k, v, mask, *options = (*sample, *defaults[len(sample) - 3 :])
        output, lse = OPS.attention(q, k, v, mask, *options)
        wanted = [True, True, True, mask is not None and mask.is_floating_point()]
        tensors = [torch.randn_like(output), torch.randn_like(lse), q, k, v, mask]
        if i == 0:
            tensors = [leaf(t, second(dtype, grad)) for t in tensors]
        yield *tensors, output, lse, *options, wanted
    yield tensors[0], None, q, k, v, mask, output, lse, *options, [False, True, False, False]


def attention_weights_backward(dtype, grad):
    for *args, average in itertools.islice(attention_weights(dtype, grad), 2):  # torch's operators: seconds each
        mask = args[3]
        wanted = [True, True, mask is not None and mask.is_floating_point()]
        weights = OPS.attention_weights(*args, average)[2]
        yield leaf(torch.randn_like(weights), args[0].requires_grad), *args, average, wanted


def layer(dtype, grad, mode, directions=1, bias=True, projection=None, batch=2):
    """The tensors of one layer of two steps, three features and a state of four."""
    gates, state = {"GRU": 12, "LSTM": 16}.get(mode, 4), projection or 4
    shapes = [(gates, 3), (gates, state), *[(gates,)] * 2 * bias, *[(projection, 4)] * bool(projection)]
    x, hx, cx = draw(dtype, grad, (2, batch, 3), (directions, batch, state), (directions, batch, 4))
    return x, None, hx, cx if mode == "LSTM" else None, draw(dtype, grad, *shapes * directions), mode


def rnn_train(dtype, grad):
    yield layer(dtype, grad, "LSTM", 2)
    yield layer(dtype, grad, "RNN_RELU", bias=False)
    yield layer(dtype, grad, "LSTM", projection=2)
    yield layer(dtype, grad, "LSTM", batch=0)
    x, _, *rest = layer(dtype, grad, "RNN_TANH")
    yield leaf(x.transpose(0, 1), grad), None, *rest
    yield leaf(x.flatten(0, 1)[:3], grad), torch.tensor([2, 1]), *rest  # packed sequences
    x, _, hx, _, weights, mode = layer(dtype, grad, "GRU")
    yield leaf(x[0], grad), None, leaf(hx[0], grad), None, weights, mode  # a cell
    norms = draw(dtype, grad, (12,), (12,))
    yield x, None, hx, None, weights, mode, norms, torch.rand(1, 4, 4) > 0.5, 0.2


def rnn(dtype, grad):
    for *args, mode, norms, mask, p in (with_defaults(sample) for sample in rnn_train(dtype, grad)):
        yield *args, mode, None, norms, mask, p
    args = layer(dtype, False, "LSTM", 2)
    yield *args, [OPS.rnn_pack(args[4][i : i + 4], "LSTM") for i in (0, 4)]


def with_defaults(sample):
    return (*sample, None, None, 0.0) if len(sample) == 6 else sample


def rnn_backward(dtype, grad):
    for i, sample in enumerate(rnn_train(dtype, False)):
        x, sizes, hx, cx, weights, mode, norms, mask, p = with_defaults(sample)
        *ys, reserve = OPS.rnn_train(*sample)
        given = [torch.randn_like(y) if y.numel() else None for y in ys]
        if i == 4:
            given[0], x, hx, *weights = (leaf(t, second(dtype, grad)) for t in (given[0], x, hx, *weights))
        rest = norms, mask, p, [True, True, mode == "LSTM", True]
        yield *given, x, sizes, hx, cx, weights, ys[0], reserve, mode, *rest


def rnn_pack(dtype, grad):
    for sample in list(rnn_train(dtype, False))[1:4]:
        yield sample[4:6]


@pytest.mark.parametrize("name", REGISTERED)
@pytest.mark.parametrize("dtype, grad", VARIANTS, ids=("float32-grad", "bfloat16"))
def test_every_op(name, dtype, grad):
    samples = list(globals()[name.removeprefix("fastnn::")](dtype, grad))  # a KeyError: the op has none
    op = getattr(OPS, name.removeprefix("fastnn::")).default
    wanting = False
    for sample in samples:
        checks = torch.library.opcheck(op, sample)
        assert len(checks) == 4 and set(checks.values()) == {"SUCCESS"}
        wanting |= any(t.requires_grad for t in torch.utils._pytree.tree_leaves(sample) if isinstance(t, torch.Tensor))
    asked = second(dtype, grad) if name.removeprefix("fastnn::") in TRACED else grad
    assert wanting == (asked and not name.endswith(("_pack", "linear_train", "conv2d_train")))


def test_options_by_name():
    """Fakes and rules of vmap take them in order; torch brings what is given by name into it."""
    q, k, v = draw(torch.float32, True, (2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6))
    options = {"enable_gqa": True, "softcap": 2.0, "scale": 0.3}
    for op, more in ((OPS.attention, {}), (OPS.attention_weights, {"average": True})):
        torch.library.opcheck(op.default, [t.detach() for t in (q, k, v)], options | more)
        found = torch.func.vmap(lambda *ts, op=op, more=more: op(*ts, **options, **more))(q, k, v)
        torch.testing.assert_close(found, op(q, k, v, **options, **more))
