"""Cases of the linear family on a GPU: against F.linear and the activation behind it, and cuBLASLt's own epilogues."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from bench.cuda_problem import DTYPES, Arms, Case, sample
from fastnn import reference
from fastnn.functional import linear

SAMPLED = 64  # rows, in training columns too, that are held against float64


def gradients(function, training, x, weight, bias, grad):
    """The results of a call: the output, in training the gradients too."""
    if not training:
        return [function(x, weight, bias)]
    output = function(x, weight, bias)
    return [output.detach(), *torch.autograd.grad(output, (x, weight, bias), grad)]


def eager(activation, x, weight, bias):
    return reference.ACTIVATIONS[activation](F.linear(x, weight, bias))


def epilogue(activation, x, weight, bias):
    """cuBLASLt with the activation in its epilogue, of which torch knows two."""
    return torch._addmm_activation(bias, x, weight.t(), use_gelu=activation == "gelu_tanh")


def check(activation, training, tensors, results):
    """Sampled rows, and in training sampled columns, in float64."""
    x, weight, bias, grad = (None if t is None else t.detach() for t in tensors)
    rows, columns = (sample(n, SAMPLED).to(x.device) for n in (x.shape[0], weight.shape[0]))
    wide = weight.double()
    z = (x[rows].double() @ wide.t() + bias.double()).requires_grad_(training)
    with torch.enable_grad():
        y = reference.ACTIVATIONS[activation](z)
    pairs = [(results[0][rows], y.detach())]
    if not training:
        return pairs
    (dz,) = torch.autograd.grad(y, z, grad[rows].double())
    pairs.append((results[1][rows], dz @ wide))
    wide = x.double()
    z = (wide @ weight[columns].double().t() + bias[columns].double()).requires_grad_()
    with torch.enable_grad():
        y = reference.ACTIVATIONS[activation](z)
    (dz,) = torch.autograd.grad(y, z, grad[:, columns].double())
    pairs += [(results[2][columns], dz.t() @ wide), (results[3][columns], dz.sum(0))]
    return pairs


def build(m, n, k, activation, dtype, training, device):
    kind = DTYPES[dtype]

    def draw():
        def random(*shape, scale=1.0):
            return torch.randn(*shape, device=device, dtype=torch.float32).mul_(scale).to(kind)

        tensors = [random(m, k), random(n, k, scale=k**-0.5), random(n)]
        tensors = [t.requires_grad_(training) for t in tensors]
        return (*tensors, random(m, n) if training else None)

    def own(x, weight, bias):
        return linear(x, weight, bias, activation=activation)

    functions = {"eager": partial(eager, activation)}
    if activation in ("relu", "gelu_tanh") and not training:
        functions["epilogue"] = partial(epilogue, activation)
    peers = {name: partial(gradients, function, training) for name, function in functions.items()}
    return Arms(draw, partial(gradients, own, training), peers, partial(check, activation, training))


def case(name, m, n, k, dtype="bfloat16", activation=None, direction="forward", first=False):
    training = direction == "training"
    size = DTYPES[dtype].itemsize
    times = 3 if training else 1
    moved = size * (m * k + n * k + m * n + n) * times
    make = partial(build, m, n, k, activation, dtype, training)
    shape = f"{m}x{k}->{n} {activation or ''}".strip()
    return Case("linear", name, dtype, direction, shape, 2.0 * m * n * k * times, moved, make, first)


THIN = (1, 2, 4, 8, 16, 32, 64)

CASES = [
    # those that the goals are told from
    case("square.4096", 4096, 4096, 4096, first=True),
    case("square.8192", 8192, 8192, 8192, first=True),
    case("fused", 8192, 4096, 1024, activation="gelu", first=True),
    *(case(f"thin.{m}", m, 14336, 4096, first=m <= 16) for m in THIN),
    case("square.4096", 4096, 4096, 4096, "float32", first=True),
    # cuBLASLt has these activations in its epilogue too
    case("square.4096.gelu_tanh", 4096, 4096, 4096, activation="gelu_tanh"),
    case("fused.gelu_tanh", 8192, 4096, 1024, activation="gelu_tanh"),
    case("fused.relu", 8192, 4096, 1024, activation="relu"),
    case("square.4096", 4096, 4096, 4096, "float16"),
    case("square.8192", 8192, 8192, 8192, "float16"),
    case("square.4096", 4096, 4096, 4096, "tf32"),
    case("square.2048", 2048, 2048, 2048, "float64"),
    # training: the forward and the gradients of input, weight and bias
    case("bert.up", 4096, 4096, 1024, activation="gelu", direction="training"),
    case("square.4096", 4096, 4096, 4096, direction="training"),
    case("square.4096", 4096, 4096, 4096, "float32", direction="training"),
    case("square.4096", 4096, 4096, 4096, "tf32", direction="training"),
    # layers of models: 4096 tokens
    case("bert.up", 4096, 4096, 1024, activation="gelu"),
    case("bert.down", 4096, 1024, 4096),
    case("bert.up", 4096, 4096, 1024, "float16", "gelu"),
    case("gpt2.up", 4096, 3072, 768, activation="gelu_tanh"),
    case("gpt2.qkv", 4096, 2304, 768),
    case("llama.qkv", 4096, 6144, 4096),
    case("llama.gate", 4096, 14336, 4096, activation="silu"),
    case("llama.down", 4096, 4096, 14336),
    case("bert.up", 4096, 4096, 1024, "float32", "gelu"),
    case("bert.up", 4096, 4096, 1024, "tf32", "gelu"),
    # a decoder's other layers, and float32
    *(case(f"thin.down.{m}", m, 4096, 14336) for m in (1, 16)),
    *(case(f"thin.qkv.{m}", m, 6144, 4096) for m in (1, 16)),
    *(case(f"thin.{m}", m, 14336, 4096, "float16") for m in (1, 16)),
    *(case(f"thin.{m}", m, 4096, 4096, "float32") for m in (1, 16)),
    # sizes that no tile divides
    case("odd.large", 4095, 4097, 4093),
    case("odd.middle", 1000, 333, 777, activation="relu"),
    case("odd.small", 129, 77, 1023, "float16", "silu"),
    case("odd.middle", 1000, 333, 777, "float32", "relu"),
    case("odd.small", 129, 77, 1023, "float64"),
    case("odd.middle", 1000, 333, 777, activation="gelu", direction="training"),
]
