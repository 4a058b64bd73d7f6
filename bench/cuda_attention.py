"""Cases of the attention family on a GPU: against each backend of F.scaled_dot_product_attention that takes them.

Backends are forced one by one. One that takes no grouped keys gets them repeated beforehand (in training, in the call,
as models do). A window reaches them as an added mask made beforehand; a soft cap they have not: the formula stands there.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.attention import formula, repeated, scores, text
from bench.cuda_problem import DTYPES, Arms, Case, sample
from fastnn.functional import scaled_dot_product_attention
from fastnn.testing import AttentionCase, seen

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
SAMPLED = 64  # queries that are held against float64, of the first and the last group of heads
MOST_SCORES = 2 << 30  # elements that torch's formulas may make at once


def flops(shape: AttentionCase, direction: str) -> float:
    """Two products forward; five backward, the scores made again."""
    products = {"forward": 2, "backward": 5, "training": 7}[direction]
    return 2.0 * products * shape.batch * shape.heads * scores(shape) * shape.head_dim


def moved(shape: AttentionCase, size: int, direction: str) -> float:
    """Query, key, value, output and mask once; backward the gradients of the first four too."""
    queries = shape.batch * shape.heads * shape.queries * shape.head_dim
    keys = shape.batch * (shape.kv_heads or shape.heads) * shape.keys * shape.head_dim
    mask = {None: 0, "bias": shape.heads * shape.queries * shape.keys * size, "bool": shape.batch * shape.keys}
    once = (2 * queries + 2 * keys) * size + mask[shape.mask]
    again = (4 * queries + 4 * keys) * size + mask[shape.mask]
    return float({"forward": once, "backward": again, "training": once + again}[direction])


# ---- the two sides ---------------------------------------------------------------------------------------------------


def results(function, direction, *tensors):
    """The results of a call: the output, but in training all, and behind a forward that has run the gradients alone."""
    query, key, value, mask, grad = tensors
    if direction == "forward":
        return [function(query, key, value, mask)]
    output = function(query, key, value, mask)
    return [output.detach(), *torch.autograd.grad(output, wanted(query, key, value, mask), grad)]


def wanted(*tensors):
    return [t for t in tensors if t is not None and t.requires_grad]


def backward_alone(function, tensors):
    """Run the forward; return the call of its backward."""
    query, key, value, mask, grad = tensors
    output = function(query, key, value, mask)
    return lambda: list(torch.autograd.grad(output, wanted(query, key, value, mask), grad, retain_graph=True))


def own(shape, query, key, value, mask):
    return scaled_dot_product_attention(
        query, key, value, mask, is_causal=shape.causal, enable_gqa=query.shape[1] != key.shape[1],
        window=shape.window, softcap=shape.softcap,
    )  # fmt: skip


def by_backend(shape, backend, repeat, kept, query, key, value, mask):
    """One backend of torch's operator. ``kept``: what a first call has made, repeated keys by the key's address."""
    if repeat:
        if key.requires_grad:
            key, value = repeated(shape, key, value)
        else:
            if key.data_ptr() not in kept:
                kept[key.data_ptr()] = tuple(repeated(shape, key, value))
            key, value = kept[key.data_ptr()]
    if shape.window is not None:
        if "window" not in kept:
            hidden = ~seen(shape, torch.arange(shape.queries, device=query.device))
            kept["window"] = torch.zeros_like(hidden, dtype=query.dtype).masked_fill_(hidden, -math.inf)
        mask = kept["window"]
    gqa = query.shape[1] != key.shape[1]
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=shape.causal, enable_gqa=gqa)


def by_formula(shape, query, key, value, mask):
    visible = seen(shape, torch.arange(shape.queries, device=query.device))
    return formula(query, *repeated(shape, key, value), shape.softcap, visible, mask)


def torchs(shape: AttentionCase) -> dict:
    """Torch's ways of computing this."""
    if shape.softcap:
        return {"formula": partial(by_formula, shape)}
    found, kept = {}, {}
    for name, backend in BACKENDS.items():
        if name == "math" and shape.batch * shape.heads * shape.queries * shape.keys > MOST_SCORES:
            continue
        found[name] = partial(by_backend, shape, backend, False, kept)
        if shape.kv_heads and name in ("efficient", "cudnn"):
            found[f"{name}, repeated"] = partial(by_backend, shape, backend, True, kept)
    return found


# ---- float64 ---------------------------------------------------------------------------------------------------------


def check(shape: AttentionCase, direction: str, tensors, found):
    """The first and the last group of heads in float64, one head at a time; of a forward some queries, else all."""
    query, key, value, mask, grad = (None if t is None else t.detach() for t in tensors)
    group = query.shape[1] // key.shape[1]
    rows = sample(shape.queries, SAMPLED if direction == "forward" else shape.queries).to(query.device)
    visible = seen(shape, rows)
    output, *gradients = found if direction != "backward" else [None, *found]
    pairs = []
    for batch, kv in dict.fromkeys(((0, 0), (shape.batch - 1, key.shape[1] - 1))):
        k, v = (t[batch, kv].double().requires_grad_(direction != "forward") for t in (key, value))
        sums = [torch.zeros_like(k), torch.zeros_like(v)]
        for head in range(kv * group, (kv + 1) * group):
            q = query[batch, head, rows].double().requires_grad_(direction != "forward")
            m = None if mask is None else mask[batch if mask.shape[0] > 1 else 0, head if mask.shape[1] > 1 else 0]
            m = m if m is None or m.shape[0] == 1 else m[rows]
            with torch.set_grad_enabled(direction != "forward"):
                exact = formula(
                    q, k, v, shape.softcap, visible, m if m is None or m.dtype == torch.bool else m.double()
                )
            if output is not None:
                pairs.append((output[batch, head, rows], exact.detach()))
            if direction != "forward":
                dq, dk, dv = torch.autograd.grad(exact, (q, k, v), grad[batch, head].double())
                pairs.append((gradients[0][batch, head], dq))
                sums[0] += dk
                sums[1] += dv
        if direction != "forward":
            pairs += [(gradients[1][batch, kv], sums[0]), (gradients[2][batch, kv], sums[1])]
    return pairs


# ---- cases -----------------------------------------------------------------------------------------------------------


def build(shape: AttentionCase, dtype: str, direction: str, device: str) -> Arms:
    kind, training = DTYPES[dtype], direction != "forward"

    def draw():
        def random(*size):
            return torch.randn(*size, device=device, dtype=torch.float32).to(kind)

        query = random(shape.batch, shape.heads, shape.queries, shape.head_dim)
        key, value = (random(shape.batch, shape.kv_heads or shape.heads, shape.keys, shape.head_dim) for _ in range(2))
        mask = None
        if shape.mask == "bias":
            mask = random(1, shape.heads, shape.queries, shape.keys)
        elif shape.mask == "bool":  # sentences of different lengths in one batch
            lengths = torch.linspace(shape.keys, max(1, shape.keys // 2), shape.batch, device=device).long()
            mask = (torch.arange(shape.keys, device=device) < lengths[:, None])[:, None, None]
        tensors = [t.requires_grad_(training) for t in (query, key, value)]
        return (*tensors, mask, random(*query.shape) if training else None)

    functions = {"own": partial(own, shape), **torchs(shape)}
    if direction == "backward":
        prepare, arms = backward_alone, functions
    else:
        prepare, arms = None, {name: partial(results, function, direction) for name, function in functions.items()}
    return Arms(draw, arms.pop("own"), arms, partial(check, shape, direction), prepare)


def case(shape: AttentionCase, dtype="bfloat16", direction="forward", first=False):
    work = flops(shape, direction), moved(shape, DTYPES[dtype].itemsize, direction)
    make = partial(build, shape, dtype, direction)
    return Case("attention", shape.name, dtype, direction, text(shape), *work, make, first)


def llama(name, length, keys=None, **options):
    """The heads of Llama 3 70B."""
    return AttentionCase(name, 1, 64, length, keys or length, 128, 8, **options)


def square(name, batch, heads, length, width, **options):
    return AttentionCase(name, batch, heads, length, length, width, **options)


K = 1024
D64 = square("d64.2k.causal", 4, 16, 2 * K, 64, causal=True)

CASES = [
    # those that the goals are told from
    *(
        case(llama(f"dense.{n}k" + ".causal" * causal, n * K, causal=causal), first=True)
        for n in (2, 4, 8, 16)
        for causal in (False, True)
    ),
    case(llama("window.1k.16k", 16 * K, window=(K - 1, 0)), first=True),
    *(case(llama(f"decode.{n}k", 1, n * K), first=True) for n in (4, 16, 64)),
    *(
        case(llama(f"dense.{n}k" + ".causal" * causal, n * K, causal=causal), direction="backward", first=True)
        for n in (4, 8)
        for causal in (False, True)
    ),
    # float16, narrow heads
    case(llama("dense.4k", 4 * K), "float16"),
    case(llama("dense.4k.causal", 4 * K, causal=True), "float16"),
    *(
        case(square(f"d64.{n}k" + ".causal" * causal, 4, 16, n * K, 64, causal=causal))
        for n in (2, 8)
        for causal in (False, True)
    ),
    case(D64, "float16"),
    # features
    case(square("window.256.4k", 1, 16, 4 * K, 64, window=(255, 0))),
    case(square("softcap.4k.causal", 1, 16, 4 * K, 128, kv_heads=8, causal=True, softcap=50.0)),
    case(square("bias.2k", 2, 16, 2 * K, 64, mask="bias")),
    case(square("padding.512", 32, 12, 512, 64, mask="bool")),
    case(square("d256.2k.causal", 1, 16, 2 * K, 256, kv_heads=8, causal=True)),
    # decoding
    case(AttentionCase("decode.b8.8k", 8, 32, 1, 8 * K, 128, 8)),
    case(AttentionCase("decode.mha.8k", 4, 32, 1, 8 * K, 128)),
    case(llama("decode.16k", 1, 16 * K), "float16"),
    case(llama("decode.16k", 1, 16 * K), "float32"),
    # gradients
    case(llama("dense.4k.causal", 4 * K, causal=True), direction="training"),
    case(D64, direction="backward"),
    case(llama("window.1k.8k", 8 * K, window=(K - 1, 0)), direction="backward"),
    case(D64, "float16", "training"),
    # float32
    case(square("dense.2k", 1, 16, 2 * K, 128), "float32"),
    case(D64, "float32"),
    case(square("d64.1k.causal", 2, 16, K, 64, causal=True), "float32", "training"),
    # sizes that no tile divides
    case(AttentionCase("odd", 3, 5, 333, 777, 80)),
    case(AttentionCase("odd", 1, 7, 129, 511, 37, 1), "float32"),
]
