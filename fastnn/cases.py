"""The problems of models that people run, with awkward ones among them.

Names are ``model.layer[.variant]``; ``.bN`` is a batch of N where the model's usual one is 1. Nothing here is imported by
``import fastnn``.
"""

from __future__ import annotations

from typing import NamedTuple


class LinearCase(NamedTuple):
    """``rows`` vectors of ``in_features`` to ``out_features``."""

    name: str
    rows: int
    in_features: int
    out_features: int
    activation: str | None = None
    bias: bool = True
    transposed: bool = False  # the weight lies as [in_features, out_features], as GPT-2's Conv1D has it


class Conv2dCase(NamedTuple):
    """One convolution of an image ``[batch, channels, height, width]``."""

    name: str
    batch: int
    channels: int
    height: int
    width: int
    out_channels: int
    kernel: tuple[int, int]
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    activation: str | None = None
    bias: bool = True


class RnnCase(NamedTuple):
    """A whole sequence; ``kind`` is rnn_tanh, rnn_relu, gru or lstm; ``time=0`` stands for one call of the cell."""

    name: str
    kind: str
    batch: int
    time: int
    input_size: int
    hidden_size: int
    layers: int = 1
    bidirectional: bool = False
    proj_size: int = 0


class AttentionCase(NamedTuple):
    """Scaled dot product attention; ``kv_heads < heads`` is GQA.

    ``mask``: padding of sentences, "bool" or "additive"; or "bias", added to the scores and trained, the same for the
    whole batch. ``window`` and ``softcap`` are those of :func:`fastnn.functional.scaled_dot_product_attention`.
    """

    name: str
    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    kv_heads: int | None = None  # None: as many as heads
    value_dim: int | None = None  # None: head_dim
    causal: bool = False
    mask: str | None = None
    window: tuple[int, int] | None = None
    softcap: float | None = None


LINEAR = (
    # transformers: encoders of text, images and speech
    LinearCase("bert.qkv", 128, 768, 2304),
    LinearCase("bert.up", 128, 768, 3072, "gelu"),
    LinearCase("bert.down", 128, 3072, 768),
    LinearCase("bert.up.b8", 1024, 768, 3072, "gelu"),
    LinearCase("bert.pooler", 1, 768, 768, "tanh"),
    LinearCase("bert.classes.b32", 32, 768, 2),
    LinearCase("minilm.qkv.b1", 24, 384, 1152),
    LinearCase("minilm.up.b1", 24, 384, 1536, "gelu"),
    LinearCase("minilm.down.b1", 24, 1536, 384),
    LinearCase("minilm.up.b32", 480, 384, 1536, "gelu"),
    LinearCase("vit.qkv", 197, 768, 2304),
    LinearCase("vit.down", 197, 3072, 768),
    LinearCase("whisper.tiny.up", 1500, 384, 1536, "gelu"),
    LinearCase("whisper.tiny.logits.decode", 1, 384, 51865, None, False),
    LinearCase("wav2vec.project", 49, 512, 768),
    LinearCase("conformer.up", 199, 256, 1024, "silu"),
    # transformers: decoders
    LinearCase("gpt2.qkv.decode", 1, 768, 2304),
    LinearCase("gpt2.up.decode", 1, 768, 3072, "gelu_tanh"),
    LinearCase("gpt2.up.prefill", 64, 768, 3072, "gelu_tanh"),
    LinearCase("gpt2.c_fc.decode", 1, 768, 3072, "gelu_tanh", transposed=True),
    LinearCase("gpt2.c_proj.decode.b4", 4, 3072, 768, transposed=True),
    LinearCase("llama3.q.decode", 1, 2048, 2048, None, False),
    LinearCase("llama3.kv.decode", 1, 2048, 512, None, False),
    LinearCase("llama3.gate.decode", 1, 2048, 8192, "silu", False),
    LinearCase("llama3.down.decode", 1, 8192, 2048, None, False),
    LinearCase("llama3.down.decode.b3", 3, 8192, 2048, None, False),
    LinearCase("llama3.kv.prefill", 128, 2048, 512, None, False),
    LinearCase("llama3.gate.prefill", 64, 2048, 8192, "silu", False),
    LinearCase("llama.gate.decode", 1, 2048, 5632, "silu", False),
    LinearCase("llama.o.decode.b8", 8, 2048, 2048, None, False),
    # heads of image and sound models
    LinearCase("resnet50.fc", 1, 2048, 1000),
    LinearCase("resnet18.fc.b7", 7, 512, 1000),
    LinearCase("mobilenetv2.classifier", 32, 1280, 1000),
    LinearCase("vit.head", 1, 768, 1000),
    LinearCase("digits.hidden", 256, 64, 128, "relu"),
    LinearCase("digits.head", 256, 128, 10),
    LinearCase("kws.head", 1, 128, 12),
    LinearCase("deepspeech.dense", 64, 2048, 2048, "relu6"),
    LinearCase("deepspeech.letters", 64, 2048, 29),
    LinearCase("xvector.embed.b3", 3, 3000, 512, "relu"),
    # pixels and patches as rows
    LinearCase("convnext.expand", 3136, 96, 384, "gelu"),
    LinearCase("mixer.tokens", 768, 196, 384, "gelu"),
    # tables and recommendations
    LinearCase("dlrm.bottom", 128, 13, 512, "relu"),
    LinearCase("dlrm.top", 128, 479, 1024, "relu"),
    LinearCase("dlrm.click", 128, 256, 1, "sigmoid"),
    LinearCase("tabular.first", 512, 54, 128, "relu"),
    LinearCase("tabular.hidden.b3", 3, 105, 64, "relu"),
    LinearCase("tabular.classes", 512, 128, 7),
    # sizes that no model asked for
    LinearCase("square.1024", 1024, 1024, 1024),
    LinearCase("tiny", 1, 16, 16),
    LinearCase("tiny.relu", 4, 32, 32, "relu"),
    LinearCase("tiny.8x64x64", 8, 64, 64),
    LinearCase("odd.primes", 127, 257, 509, "silu"),
    LinearCase("odd.primes.b7", 7, 1009, 1013),
    LinearCase("odd.tail", 13, 769, 17),
    LinearCase("odd.thin", 4096, 3, 5, "relu"),
    LinearCase("odd.skinny", 512, 64, 1),
)

CONV2D = (
    # ResNet-50, ResNet-18
    Conv2dCase("resnet50.stem", 1, 3, 224, 224, 64, (7, 7), 2, 3, activation="relu"),
    Conv2dCase("resnet50.3x3.56", 1, 64, 56, 56, 64, (3, 3), 1, 1, activation="relu"),
    Conv2dCase("resnet50.3x3.14", 1, 256, 14, 14, 256, (3, 3), 1, 1, activation="relu"),
    Conv2dCase("resnet50.3x3.7", 1, 512, 7, 7, 512, (3, 3), 1, 1, activation="relu"),
    Conv2dCase("resnet50.3x3.28.b8", 8, 128, 28, 28, 128, (3, 3), 1, 1, activation="relu"),
    Conv2dCase("resnet50.3x3.s2", 1, 128, 56, 56, 128, (3, 3), 2, 1, activation="relu"),
    Conv2dCase("resnet50.1x1.56", 1, 256, 56, 56, 64, (1, 1), activation="relu"),
    Conv2dCase("resnet50.1x1.14", 1, 256, 14, 14, 1024, (1, 1)),
    Conv2dCase("resnet50.1x1.s2", 1, 256, 56, 56, 512, (1, 1), 2),
    Conv2dCase("resnet50.1x1.7.b8", 8, 2048, 7, 7, 512, (1, 1), activation="relu"),
    Conv2dCase("resnet18.3x3.28.b3", 3, 128, 28, 28, 128, (3, 3), 1, 1, activation="relu"),
    Conv2dCase("resnet18.3x3.s2", 1, 64, 56, 56, 128, (3, 3), 2, 1, activation="relu"),
    Conv2dCase("resnet18.1x1.s2", 1, 64, 56, 56, 128, (1, 1), 2),
    # VGG-16
    Conv2dCase("vgg16.first", 1, 3, 224, 224, 64, (3, 3), 1, 1, activation="relu"),
    Conv2dCase("vgg16.3x3.112", 1, 64, 112, 112, 128, (3, 3), 1, 1, activation="relu"),
    Conv2dCase("vgg16.3x3.28", 1, 256, 28, 28, 512, (3, 3), 1, 1, activation="relu"),
    Conv2dCase("vgg16.3x3.14", 1, 512, 14, 14, 512, (3, 3), 1, 1, activation="relu"),
    # MobileNet
    Conv2dCase("mobilenetv2.stem", 1, 3, 224, 224, 32, (3, 3), 2, 1, activation="relu6"),
    Conv2dCase("mobilenetv2.expand", 1, 24, 56, 56, 144, (1, 1), activation="relu6"),
    Conv2dCase("mobilenetv2.depthwise", 1, 144, 56, 56, 144, (3, 3), 1, 1, groups=144, activation="relu6"),
    Conv2dCase("mobilenetv2.depthwise.7", 1, 960, 7, 7, 960, (3, 3), 1, 1, groups=960, activation="relu6"),
    Conv2dCase("mobilenetv2.depthwise.s2", 1, 96, 112, 112, 96, (3, 3), 2, 1, groups=96, activation="relu6"),
    Conv2dCase("mobilenetv2.project", 1, 144, 56, 56, 24, (1, 1)),
    Conv2dCase("mobilenetv2.last", 1, 320, 7, 7, 1280, (1, 1), activation="relu6"),
    Conv2dCase("mobilenetv3.stem", 1, 3, 224, 224, 16, (3, 3), 2, 1, activation="hardswish"),
    Conv2dCase("mobilenetv3.depthwise5.b3", 3, 120, 28, 28, 120, (5, 5), 1, 2, groups=120, activation="hardswish"),
    Conv2dCase("mobilenetv3.squeeze", 1, 672, 1, 1, 168, (1, 1), activation="relu"),
    # EfficientNet
    Conv2dCase("efficientnet.expand", 1, 40, 28, 28, 240, (1, 1), activation="silu"),
    Conv2dCase("efficientnet.project", 1, 672, 14, 14, 112, (1, 1)),
    Conv2dCase("efficientnet.depthwise5", 1, 240, 28, 28, 240, (5, 5), 1, 2, groups=240, activation="silu"),
    Conv2dCase("efficientnet.depthwise5.s2", 1, 672, 14, 14, 672, (5, 5), 2, 2, groups=672, activation="silu"),
    # ConvNeXt, ViT
    Conv2dCase("convnext.stem", 1, 3, 224, 224, 96, (4, 4), 4),
    Conv2dCase("convnext.down", 1, 96, 56, 56, 192, (2, 2), 2),
    Conv2dCase("convnext.depthwise7", 1, 96, 56, 56, 96, (7, 7), 1, 3, groups=96),
    Conv2dCase("convnext.depthwise7.14", 1, 384, 14, 14, 384, (7, 7), 1, 3, groups=384),
    Conv2dCase("vit.patches", 1, 3, 224, 224, 768, (16, 16), 16),
    # masks and boxes: UNet, DeepLab, YOLO
    Conv2dCase("unet.first", 1, 1, 128, 128, 32, (3, 3), 1, 1, activation="relu"),
    Conv2dCase("unet.3x3.128", 1, 32, 128, 128, 32, (3, 3), 1, 1, activation="relu"),
    Conv2dCase("unet.3x3.concat", 1, 128, 64, 64, 64, (3, 3), 1, 1, activation="relu"),
    Conv2dCase("unet.mask", 1, 32, 128, 128, 2, (1, 1)),
    Conv2dCase("deeplab.dilated", 1, 256, 28, 28, 256, (3, 3), 1, 2, 2, activation="relu"),
    Conv2dCase("deeplab.pyramid", 1, 320, 33, 33, 128, (3, 3), 1, 12, 12, activation="relu"),
    Conv2dCase("deeplab.depthwise.dilated", 1, 576, 33, 33, 576, (3, 3), 1, 4, 4, groups=576, activation="relu6"),
    Conv2dCase("yolo.stem", 1, 3, 320, 320, 16, (3, 3), 2, 1, activation="silu"),
    Conv2dCase("yolo.3x3.40", 1, 64, 40, 40, 64, (3, 3), 1, 1, activation="silu"),
    Conv2dCase("yolo.3x3.s2", 1, 64, 40, 40, 128, (3, 3), 2, 1, activation="silu"),
    Conv2dCase("yolo.boxes", 1, 128, 20, 20, 255, (1, 1)),
    # groups
    Conv2dCase("resnext.grouped", 1, 256, 28, 28, 256, (3, 3), 1, 1, groups=32, activation="relu"),
    Conv2dCase("resnext.grouped.s2", 1, 512, 28, 28, 512, (3, 3), 2, 1, groups=32, activation="relu"),
    Conv2dCase("regnet.grouped", 1, 208, 14, 14, 208, (3, 3), 1, 1, groups=13, activation="relu"),
    Conv2dCase("shufflenet.1x1.grouped", 1, 240, 28, 28, 240, (1, 1), groups=3, activation="relu"),
    # digits, sound
    Conv2dCase("digits.conv1", 64, 1, 8, 8, 32, (3, 3), 1, 1, activation="relu"),
    Conv2dCase("digits.conv2", 64, 32, 4, 4, 64, (3, 3), 1, 1, activation="relu"),
    Conv2dCase("kws.conv", 1, 1, 49, 10, 64, (10, 4), 2, 1, activation="relu"),
    Conv2dCase("kws.depthwise", 1, 64, 25, 5, 64, (3, 3), 1, 1, groups=64, activation="relu"),
    Conv2dCase("deepspeech.conv", 1, 1, 161, 101, 32, (41, 11), 2, activation="relu6"),
    Conv2dCase("wav2vec.conv", 1, 512, 1, 399, 512, (1, 3), 2, activation="gelu"),
    # sizes that no model asked for
    Conv2dCase("tiny.1x16x16", 1, 1, 16, 16, 8, (3, 3), 1, 1, activation="relu"),
    Conv2dCase("tiny.8x64x64", 1, 8, 64, 64, 8, (3, 3), 1, 1, activation="relu"),
    Conv2dCase("odd.primes", 3, 13, 29, 31, 17, (3, 5), 1, 2, activation="silu"),
    Conv2dCase("odd.3x3.b7", 7, 37, 15, 13, 41, (3, 3), 1, 1, activation="relu"),
    Conv2dCase("odd.depthwise.b3", 3, 37, 17, 23, 37, (3, 3), 1, 1, groups=37),
    Conv2dCase("odd.wide", 1, 5, 1, 1021, 7, (1, 9)),
)

RNN = (
    # speech and sound, from single words to sentences
    RnnCase("kws.gru.b1", "gru", 1, 98, 40, 64),
    RnnCase("kws.rnn.b1", "rnn_tanh", 1, 98, 40, 64),
    RnnCase("kws.gru.b64", "gru", 64, 49, 10, 154),
    RnnCase("kws.lstm.b7", "lstm", 7, 49, 10, 118),
    RnnCase("deepspeech.rnn", "rnn_relu", 8, 100, 512, 512),
    RnnCase("deepspeech.bigru", "gru", 8, 50, 512, 512, 1, True),
    RnnCase("speaker.lstm", "lstm", 1, 160, 40, 256, 3),
    RnnCase("speaker.lstm.proj", "lstm", 1, 80, 40, 768, 3, False, 256),
    RnnCase("tacotron2.encoder", "lstm", 1, 60, 512, 256, 1, True),
    RnnCase("tacotron2.attention.cell", "lstm", 1, 0, 768, 1024),
    RnnCase("tacotron2.decoder.cell", "lstm", 1, 0, 1536, 1024),
    RnnCase("tacotron2.decoder.cell.b8", "lstm", 8, 0, 1536, 1024),
    RnnCase("wavernn.cell", "gru", 1, 0, 512, 512),
    RnnCase("silero.v4.cell", "lstm", 1, 0, 64, 64),
    RnnCase("silero.v5.cell", "lstm", 1, 0, 128, 128),
    RnnCase("rnnoise.cell", "gru", 1, 0, 114, 96),
    # text, letter by letter and word by word
    RnnCase("charrnn.lstm", "lstm", 50, 50, 65, 128, 2),
    RnnCase("charrnn.cell", "rnn_tanh", 1, 0, 65, 128),
    RnnCase("ptb.lstm", "lstm", 20, 35, 650, 650, 2),
    RnnCase("awd.lstm.last", "lstm", 20, 35, 1150, 400),
    RnnCase("lstm.tagger", "lstm", 16, 40, 100, 128, 2, True),
    RnnCase("bigru.classifier", "gru", 32, 40, 300, 128, 1, True),
    RnnCase("seq2seq.gru.b3", "gru", 3, 20, 256, 512),
    RnnCase("seq2seq.cell.b8", "gru", 8, 0, 256, 512),
    # series, sessions, games, images
    RnnCase("series.lstm", "lstm", 64, 60, 1, 50),
    RnnCase("series.gru.b1", "gru", 1, 168, 7, 32),
    RnnCase("gru4rec.cell.b64", "gru", 64, 0, 100, 100),
    RnnCase("impala.cell.b64", "lstm", 64, 0, 257, 256),
    RnnCase("mnist.rows", "rnn_tanh", 64, 28, 28, 128),
    RnnCase("mnist.pixels", "rnn_relu", 8, 784, 1, 100),
    RnnCase("crnn.text", "lstm", 1, 26, 512, 256, 1, True),
    # plain sizes
    RnnCase("gru.256.b1", "gru", 1, 64, 256, 256),
    RnnCase("gru.400.b1", "gru", 1, 50, 400, 400),
    RnnCase("rnn.128.b1", "rnn_tanh", 1, 128, 128, 128),
    RnnCase("lstm.256.b1", "lstm", 1, 64, 256, 256),
    RnnCase("lstm.512.b32", "lstm", 32, 32, 512, 512),
    RnnCase("lstm.proj", "lstm", 8, 50, 256, 512, 1, False, 128),
    RnnCase("gru.cell", "gru", 1, 0, 128, 128),
    RnnCase("lstm.cell.b32", "lstm", 32, 0, 256, 256),
    RnnCase("rnn.cell", "rnn_tanh", 1, 0, 64, 64),
    RnnCase("rnn.cell.b8", "rnn_relu", 8, 0, 128, 256),
    RnnCase("rnn.cell.b64", "rnn_tanh", 64, 0, 256, 256),
    # sizes that no model asked for
    RnnCase("odd.primes", "gru", 5, 23, 37, 61),
    RnnCase("odd.primes.b7", "lstm", 7, 11, 53, 101),
    RnnCase("odd.rnn.b3", "rnn_tanh", 3, 29, 31, 67, 1, True),
    RnnCase("odd.cell.b3", "gru", 3, 0, 41, 83),
    RnnCase("odd.tail", "lstm", 3, 17, 13, 19),
)

ATTENTION = (
    # encoders of text
    AttentionCase("minilm.b1", 1, 12, 24, 24, 32, mask="additive"),
    AttentionCase("minilm.16.b32", 32, 12, 16, 16, 32, mask="additive"),
    AttentionCase("minilm.b32", 32, 12, 32, 32, 32, mask="additive"),
    AttentionCase("minilm.64.b32", 32, 12, 64, 64, 32, mask="additive"),
    AttentionCase("bert.128", 1, 12, 128, 128, 64),
    AttentionCase("bert.512", 1, 12, 512, 512, 64, mask="bool"),
    AttentionCase("bert.128.b8", 8, 12, 128, 128, 64),
    AttentionCase("t5.encoder", 1, 8, 256, 256, 64, mask="bias"),
    AttentionCase("clip.text", 1, 8, 77, 77, 64, causal=True),
    AttentionCase("modernbert.window", 1, 12, 1024, 1024, 64, window=(64, 64)),
    # of images and sound
    AttentionCase("vit.197", 1, 12, 197, 197, 64),
    AttentionCase("swin.stage1", 64, 3, 49, 49, 32, mask="bias"),
    AttentionCase("swin.stage2.b4", 64, 6, 49, 49, 32, mask="bias"),
    AttentionCase("whisper.tiny.encoder", 1, 6, 1500, 1500, 64),
    AttentionCase("conformer.b3", 3, 4, 199, 199, 64, mask="bool"),
    AttentionCase("flux.1024", 1, 6, 1024, 1024, 128),  # a quarter of its heads
    AttentionCase("stablediffusion.self", 1, 8, 1024, 1024, 40),
    AttentionCase("stablediffusion.cross", 1, 8, 1024, 77, 40),
    # decoders that read a prompt
    AttentionCase("gpt2.64.causal", 1, 12, 64, 64, 64, causal=True),
    AttentionCase("gpt2.512.causal", 1, 12, 512, 512, 64, causal=True),
    AttentionCase("gpt2.1024.causal", 1, 12, 1024, 1024, 64, causal=True),
    AttentionCase("llama.512.causal", 1, 32, 512, 512, 64, 8, causal=True),
    AttentionCase("gptneo.window", 1, 12, 2048, 2048, 64, window=(255, 0)),
    AttentionCase("gemma2.512.causal", 1, 8, 512, 512, 256, 4, causal=True, softcap=50.0),
    # and that write
    AttentionCase("gpt2.decode", 1, 12, 1, 1024, 64),
    AttentionCase("llama.decode", 1, 32, 1, 2048, 64, 8),
    AttentionCase("llama.decode.b4", 4, 32, 1, 1024, 128, 8),
    AttentionCase("llama3.decode.4096", 1, 32, 1, 4096, 64, 8),
    AttentionCase("llama3.speculate", 1, 32, 8, 2048, 64, 8, window=(-1, 0)),
    AttentionCase("falcon.decode", 1, 71, 1, 1024, 64, 1),
    AttentionCase("gemma2.decode", 1, 8, 1, 2048, 256, 4, softcap=50.0),
    AttentionCase("whisper.tiny.cross.decode", 1, 6, 1, 1500, 64),
    AttentionCase("t5.cross.decode.b7", 7, 8, 1, 128, 64),
    # sizes that no model asked for
    AttentionCase("odd.decode", 1, 1, 1, 4099, 64),
    AttentionCase("odd.primes", 2, 3, 61, 127, 37, value_dim=41),
    AttentionCase("odd.primes.b7", 7, 1, 67, 131, 29),
    AttentionCase("odd.causal", 1, 3, 131, 257, 53, causal=True),
    AttentionCase("odd.short", 3, 5, 7, 3, 16, causal=True),
)
