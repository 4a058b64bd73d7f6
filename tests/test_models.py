"""Hugging Face models, built from small configurations, through fastnn.accelerate."""

import logging
import os

import pytest
import torch

import fastnn
from tests import models

os.environ.setdefault("HF_HUB_OFFLINE", "1")
tf = pytest.importorskip("transformers", minversion="4.56")
pytestmark = pytest.mark.usefixtures("one_thread")
logging.getLogger("transformers").setLevel(logging.ERROR)

HEADS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SMALL = {"vocab_size": 50, **HEADS}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def ids(length=9):
    return torch.randint(3, 50, (2, length))


def text(**more):
    return {"input_ids": ids(), "attention_mask": torch.tensor([[1] * 9, [1] * 6 + [0] * 3]), **more}


def image():
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def clip():
    text_config = {**SMALL, "eos_token_id": 2, "bos_token_id": 1}
    vision_config = {**HEADS, "image_size": 32, "patch_size": 8}
    return tf.CLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=16)


def whisper():
    layers = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in PARTS.items()}
    where = {"num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 32, "decoder_start_token_id": 1}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "begin_suppress_tokens": None}
    return tf.WhisperConfig(vocab_size=50, d_model=32, dropout=0.0, **layers, **where, **ends)


PARTS = {"layers": 2, "attention_heads": 4, "ffn_dim": 64}


def wav2vec2():
    convolutions = {"conv_dim": (16, 16, 16), "conv_kernel": (10, 3, 2), "conv_stride": (5, 2, 2)}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    none = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "layerdrop")
    return tf.Wav2Vec2Config(
        **SMALL,
        **convolutions,
        **positions,
        num_feat_extract_layers=3,
        apply_spec_augment=False,
        **dict.fromkeys(none, 0.0),
    )


def segformer():
    stages = {"depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32], "patch_sizes": [7, 3]}
    more = {"strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 32}
    none = {"drop_path_rate": 0.0, "classifier_dropout_prob": 0.0}
    return tf.SegformerConfig(num_encoder_blocks=2, num_labels=5, **stages, **more, **none, **NO_DROPOUT)


GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "dropout": 0.0, "attention_dropout": 0.0}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
SWIN = {"patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}

# Each a model, and a call of it.
MODELS = {
    "BERT": (lambda: tf.BertForSequenceClassification(tf.BertConfig(**SMALL, **NO_DROPOUT)), text),
    "RoBERTa": (lambda: tf.RobertaModel(tf.RobertaConfig(**SMALL, **NO_DROPOUT)), text),
    "DistilBERT": (lambda: tf.DistilBertModel(tf.DistilBertConfig(vocab_size=50, **DISTIL)), text),
    "GPT-2 (Conv1D)": (lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=50, attn_pdrop=0.0, **GPT2)), text),
    "Llama (grouped queries)": (
        lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, num_key_value_heads=2, max_position_embeddings=64)),
        text,
    ),
    "Mistral (sliding window)": (
        lambda: tf.MistralForCausalLM(
            tf.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=4, max_position_embeddings=64)
        ),
        text,
    ),
    "T5 (relative bias)": (
        lambda: tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=50, decoder_start_token_id=0, **T5)),
        lambda: text(decoder_input_ids=ids(5)),
    ),
    "Whisper": (
        lambda: tf.WhisperForConditionalGeneration(whisper()),
        lambda: {"input_features": torch.randn(2, 16, 40), "decoder_input_ids": ids(5)},
    ),
    "Wav2Vec2": (lambda: tf.Wav2Vec2Model(wav2vec2()), lambda: {"input_values": torch.randn(2, 800)}),
    "CLIP": (lambda: tf.CLIPModel(clip()), lambda: text(**image())),
    "ViT": (lambda: tf.ViTModel(tf.ViTConfig(**HEADS, image_size=32, patch_size=8, **NO_DROPOUT)), image),
    "Swin": (
        lambda: tf.SwinModel(tf.SwinConfig(image_size=32, drop_path_rate=0.0, **SWIN, **NO_DROPOUT)),
        image,
    ),
    "SegFormer": (lambda: tf.SegformerForSemanticSegmentation(segformer()), image),
    "ResNet": (
        lambda: tf.ResNetForImageClassification(
            tf.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], num_labels=5)
        ),
        image,
    ),
    "MobileNetV2": (
        lambda: tf.MobileNetV2Model(tf.MobileNetV2Config(depth_multiplier=0.25, image_size=32, output_stride=8)),
        image,
    ),
    "ConvNeXt": (
        lambda: tf.ConvNextModel(tf.ConvNextConfig(hidden_sizes=[16, 32], depths=[2, 2], num_stages=2)),
        image,
    ),
}


def rows(names):
    return [
        pytest.param(n, id=n.split(" ")[0], marks=pytest.mark.works("Models", n, package="transformers")) for n in names
    ]


@pytest.mark.parametrize("name", rows(MODELS))
def test_model(name, record_property):
    make, call = MODELS[name]
    share = models.check(models.lively(make()), call(), deep=name == "MobileNetV2")
    record_property("FLOPs served", f"{100 * share:.0f} %")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, id=n.split(" ")[0], marks=pytest.mark.works("Models", f"{n}: generate", package="transformers"))
        for n in (
            "GPT-2 (Conv1D)",
            "Llama (grouped queries)",
            "Mistral (sliding window)",
            "T5 (relative bias)",
            "Whisper",
        )
    ],
)
def test_generate(name, record_property):
    """Greedy decoding gives the same tokens, with a cache that grows and with one of fixed size."""
    make, call = MODELS[name]
    model = models.lively(make())
    call = {k: v for k, v in call().items() if k != "decoder_input_ids"}
    if "attention_mask" in call:
        call["attention_mask"] = call["attention_mask"].flip(1)  # padded on the left
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    fast = fastnn.accelerate(model, freeze=True)
    fastnn.set_fallback("error")
    for more in ({}, {"cache_implementation": "static", "disable_compile": True}):
        expected, found = (m.generate(**call, **options, **more) for m in (model, fast))
        assert torch.equal(found, expected) and len(expected[0].unique()) > 1
    assert (
        fastnn.explain(
            fast, **call, **({"decoder_input_ids": ids(1)} if "T5" in name or name == "Whisper" else {})
        ).share
        > 0.9
    )
