"""PEFT's LoRA on models through fastnn.accelerate: adapters before and after, training them alone, merging."""

import copy

import pytest
import torch

import fastnn
from tests import models
from tests.modules import no_worse
from tests.test_models import MODELS

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.works("Models", "LoRA: before and after accelerate, trained, merged", package="peft"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

TARGETS = {"BERT": ["query", "value"], "GPT-2 (Conv1D)": ["c_attn"], "Wav2Vec2": ["q_proj", "v_proj"]}


def adapted(model, name):
    """The same adapters at every call; none of them zero."""
    torch.manual_seed(1)
    options = {"lora_dropout": 0.0, "init_lora_weights": False, "fan_in_fan_out": name.startswith("GPT-2")}
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=TARGETS[name], **options)).eval()


def answer(model, call):
    with torch.no_grad():
        return models.tensors(model(**call))


def trained(model, call, steps=3):
    """What is left of the adapters after some steps of SGD: all parameters that changed."""
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(wanted, lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        models.tensors(model.train()(**call))[0].square().mean().backward()
        optimizer.step()
    return {k: p.detach() for k, p in model.named_parameters() if not torch.equal(p, before[k])}


@pytest.mark.parametrize("name", TARGETS, ids=[n.split(" ")[0] for n in TARGETS])
def test_lora(name, record_property):
    make, call = MODELS[name]
    base, call = models.lively(make()), call()
    stock = adapted(copy.deepcopy(base), name)
    after = fastnn.accelerate(stock)  # adapters first
    before = adapted(fastnn.accelerate(copy.deepcopy(base)), name)  # and last: they are stock modules
    oracle, exact = copy.deepcopy(stock).double(), models.doubled(call)
    right, expected = answer(oracle, exact), answer(stock, call)
    assert (right[0] - answer(copy.deepcopy(base).double(), exact)[0]).abs().max() > 1e-3, "the adapters do something"
    for fast in (before, after):
        no_worse(answer(fast, call), expected, right)
    share = fastnn.explain(after, **call).share
    assert share > 0.99 > fastnn.explain(before, **call).share > 0.7
    assert fastnn.explain(fastnn.accelerate(before, inplace=True), **call).share > 0.99
    record_property("FLOPs served", f"{100 * share:.0f} %")

    runs = [trained(copy.deepcopy(m), c) for m, c in ((after, call), (before, call), (stock, call), (oracle, exact))]
    assert all(run.keys() == runs[2].keys() and run and all("lora_" in k for k in run) for run in runs)
    for run in runs[:2]:
        no_worse(*(list(r.values()) for r in (run, runs[2], runs[3])))

    for fast in (before, after):
        merged = copy.deepcopy(fast).merge_and_unload()
        no_worse(answer(merged, call), answer(copy.deepcopy(stock).merge_and_unload(), call), right)
        assert fastnn.explain(merged, **call).share > 0.99
        assert fastnn.restore(merged).state_dict().keys() == base.state_dict().keys()
    restored = fastnn.restore(after)
    assert all(map(torch.equal, answer(restored, call), expected))
    assert models.kinds(restored) == models.kinds(stock)
