"""Cases of the attention family on a GPU: against each backend of F.scaled_dot_product_attention that takes them.

Backends are forced one by one. One that takes no grouped keys gets them repeated beforehand (in training, in the call,
as models do). A window reaches them as an added mask made beforehand; a soft cap they have not: the formula stands there.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.cuda_problem import DTYPES, Arms, Case, sample
from fastnn.functional import scaled_dot_product_attention

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
SAMPLED = 64  # queries that are held against float64, of the first and the last group of heads
MOST_SCORES = 2 << 30  # elements that torch's formulas may make at once


class Shape(NamedTuple):
    """``heads/kv_heads`` of ``queries x keys``; ``window`` counts the keys before and behind the query's own."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    width: int
    causal: bool = False
    window: tuple[int, int] | None = None
    softcap: float | None = None
    mask: str | None = (
        None  # "bias": added, [heads, queries, keys]; "bool": which keys are no padding, [batch, 1, 1, keys]
    )

    def text(self) -> str:
        heads = f"{self.heads}/{self.kv_heads}" if self.kv_heads != self.heads else f"{self.heads}"
        lengths = f"{self.queries}" if self.queries == self.keys else f"{self.queries}x{self.keys}"
        text = f"{self.batch}x{heads}x{lengths} d{self.width}" + " causal" * self.causal
        text += f" window {self.window[0]},{self.window[1]}" if self.window else ""
        return text + " softcap" * bool(self.softcap) + (f" {self.mask}" if self.mask else "")


def scores(shape: Shape) -> int:
    """Return how many pairs of a query and a key one head has."""
    if shape.causal:
        return sum(min(query + 1, shape.keys) for query in range(shape.queries))
    if shape.window is None:
        return shape.queries * shape.keys
    total, ahead = 0, shape.keys - shape.queries
    for query in range(shape.queries):
        low, high = max(0, query + ahead - shape.window[0]), min(shape.keys - 1, query + ahead + shape.window[1])
        total += max(0, high - low + 1)
    return total


def flops(shape: Shape, direction: str) -> float:
    """Two products forward; five backward, the scores made again."""
    products = {"forward": 2, "backward": 5, "training": 7}[direction]
    return 2.0 * products * shape.batch * shape.heads * scores(shape) * shape.width


def moved(shape: Shape, size: int, direction: str) -> float:
    """Query, key, value, output and mask once; backward their gradients too."""
    queries = shape.batch * shape.heads * shape.queries * shape.width
    keys = shape.batch * shape.kv_heads * shape.keys * shape.width
    mask = {None: 0, "bias": shape.heads * shape.queries * shape.keys * size, "bool": shape.batch * shape.keys}
    once = (2 * queries + 2 * keys) * size + mask[shape.mask]
    again = (4 * queries + 4 * keys) * size + mask[shape.mask] * (2 if shape.mask == "bias" else 1)
    return float({"forward": once, "backward": again, "training": once + again}[direction])


def visible(shape: Shape, rows: torch.Tensor) -> torch.Tensor | None:
    """Return which keys the queries ``rows`` see, [rows, keys]; None: all."""
    if not shape.causal and shape.window is None:
        return None
    ahead = torch.arange(shape.keys, device=rows.device) - rows[:, None]
    seen = torch.ones_like(ahead, dtype=torch.bool)
    if shape.causal:
        seen &= ahead <= 0
    if shape.window is not None:
        ahead = ahead - (shape.keys - shape.queries)
        seen &= (ahead >= -shape.window[0]) & (ahead <= shape.window[1])
    return seen


def formula(query, key, value, softcap, seen, mask):
    """Attention as models write it, [..., L, E] with as many heads of keys as of queries."""
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    return scores.softmax(-1) @ value


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
        query, key, value, mask, is_causal=shape.causal, enable_gqa=shape.heads != shape.kv_heads,
        window=shape.window, softcap=shape.softcap,
    )  # fmt: skip


def repeated(shape, key, value):
    return (t.repeat_interleave(shape.heads // shape.kv_heads, 1) for t in (key, value))


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
            seen = visible(shape, torch.arange(shape.queries, device=query.device))
            kept["window"] = torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill_(
                ~seen, -math.inf
            )
        mask = kept["window"]
    gqa = shape.heads != shape.kv_heads and not repeat
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=shape.causal, enable_gqa=gqa)


def by_formula(shape, query, key, value, mask):
    key, value = repeated(shape, key, value)
    seen = visible(shape, torch.arange(shape.queries, device=query.device))
    return formula(query, key, value, shape.softcap, seen, mask)


def torchs(shape: Shape) -> dict:
    """Torch's ways of computing this."""
    if shape.softcap:
        return {"formula": partial(by_formula, shape)}
    found, kept = {}, {}
    for name, backend in BACKENDS.items():
        if name == "math" and shape.batch * shape.heads * shape.queries * shape.keys > MOST_SCORES:
            continue
        found[name] = partial(by_backend, shape, backend, False, kept)
        if shape.heads != shape.kv_heads and name in ("efficient", "cudnn"):
            found[f"{name}, repeated"] = partial(by_backend, shape, backend, True, kept)
    return found


# ---- float64 ---------------------------------------------------------------------------------------------------------


def check(shape: Shape, direction: str, tensors, found):
    """The first and the last group of heads in float64, one head at a time; of a forward some queries, else all."""
    query, key, value, mask, grad = (None if t is None else t.detach() for t in tensors)
    device, group = query.device, shape.heads // shape.kv_heads
    rows = sample(shape.queries, SAMPLED if direction == "forward" else shape.queries).to(device)
    seen = visible(shape, rows)
    output, *gradients = found if direction != "backward" else [None, *found]
    pairs = []
    for batch, kv in dict.fromkeys(((0, 0), (shape.batch - 1, shape.kv_heads - 1))):
        k, v = (t[batch, kv].double().requires_grad_(direction != "forward") for t in (key, value))
        sums = [torch.zeros_like(k), torch.zeros_like(v)]
        for head in range(kv * group, (kv + 1) * group):
            q = query[batch, head, rows].double().requires_grad_(direction != "forward")
            m = None if mask is None else mask[batch if mask.shape[0] > 1 else 0, head if mask.shape[1] > 1 else 0]
            m = m if m is None or m.shape[0] == 1 else m[rows]
            with torch.set_grad_enabled(direction != "forward"):
                exact = formula(q, k, v, shape.softcap, seen, m if m is None or m.dtype == torch.bool else m.double())
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


def build(shape: Shape, dtype: str, direction: str, device: str) -> Arms:
    kind, training = DTYPES[dtype], direction != "forward"

    def draw():
        def random(*size):
            return torch.randn(*size, device=device, dtype=torch.float32).to(kind)

        query = random(shape.batch, shape.heads, shape.queries, shape.width)
        key, value = (random(shape.batch, shape.kv_heads, shape.keys, shape.width) for _ in range(2))
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


def case(name, shape: Shape, dtype="bfloat16", direction="forward", first=False):
    size = DTYPES[dtype].itemsize
    make = partial(build, shape, dtype, direction)
    return Case("attention", name, dtype, direction, shape.text(), flops(shape, direction), moved(shape, size, direction),
                make, first)  # fmt: skip


def llama(length, keys=None, **options):
    """The heads of Llama 3 70B."""
    return Shape(1, 64, 8, length, keys or length, 128, **options)


K = 1024

CASES = [
    # those that the goals are told from
    *(
        case(f"dense.{n}k" + ".causal" * causal, llama(n * K, causal=causal), first=True)
        for n in (2, 4, 8, 16)
        for causal in (False, True)
    ),
    case("window.1k.16k", llama(16 * K, window=(K - 1, 0)), first=True),
    *(case(f"decode.{n}k", llama(1, n * K), first=True) for n in (4, 16, 64)),
    *(
        case(f"dense.{n}k" + ".causal" * causal, llama(n * K, causal=causal), direction="backward", first=True)
        for n in (4, 8)
        for causal in (False, True)
    ),
    # float16, narrow heads
    case("dense.4k", llama(4 * K), "float16"),
    case("dense.4k.causal", llama(4 * K, causal=True), "float16"),
    *(
        case(f"d64.{n}k" + ".causal" * causal, Shape(4, 16, 16, n * K, n * K, 64, causal))
        for n in (2, 8)
        for causal in (False, True)
    ),
    case("d64.2k.causal", Shape(4, 16, 16, 2 * K, 2 * K, 64, True), "float16"),
    # features
    case("window.256.4k", Shape(1, 16, 16, 4 * K, 4 * K, 64, window=(255, 0))),
    case("softcap.4k.causal", Shape(1, 16, 8, 4 * K, 4 * K, 128, True, softcap=50.0)),
    case("bias.2k", Shape(2, 16, 16, 2 * K, 2 * K, 64, mask="bias")),
    case("padding.512", Shape(32, 12, 12, 512, 512, 64, mask="bool")),
    case("d256.2k.causal", Shape(1, 16, 8, 2 * K, 2 * K, 256, True)),
    # decoding
    case("decode.b8.8k", Shape(8, 32, 8, 1, 8 * K, 128)),
    case("decode.mha.8k", Shape(4, 32, 32, 1, 8 * K, 128)),
    case("decode.16k", llama(1, 16 * K), "float16"),
    case("decode.16k", llama(1, 16 * K), "float32"),
    # gradients
    case("dense.4k.causal", llama(4 * K, causal=True), direction="training"),
    case("d64.2k.causal", Shape(4, 16, 16, 2 * K, 2 * K, 64, True), direction="backward"),
    case("window.1k.8k", llama(8 * K, window=(K - 1, 0)), direction="backward"),
    case("d64.2k.causal", Shape(4, 16, 16, 2 * K, 2 * K, 64, True), "float16", "training"),
    # float32
    case("dense.2k", Shape(1, 16, 16, 2 * K, 2 * K, 128), "float32"),
    case("d64.2k.causal", Shape(4, 16, 16, 2 * K, 2 * K, 64, True), "float32"),
    case("d64.1k.causal", Shape(2, 16, 16, K, K, 64, True), "float32", "training"),
    # sizes that no tile divides
    case("odd", Shape(3, 5, 5, 333, 777, 80)),
    case("odd", Shape(1, 7, 1, 129, 511, 37), "float32"),
]
