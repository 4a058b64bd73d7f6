"""timm's models, small ones, through fastnn.accelerate."""

import pytest
import torch

import fastnn
from tests import models

timm = pytest.importorskip("timm")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of timm, about itself
]

VIT = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 4}
SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "drop_path_rate": 0.0}
MODELS = {
    "ResNet": ("resnet18", {"channels": (16, 16, 32, 32)}, 64),
    "EfficientNet": ("test_efficientnet", {}, 64),
    "MobileNetV3 (SAME padding)": ("tf_mobilenetv3_small_minimal_100", {}, 64),
    "ViT (fused attention)": ("vit_tiny_patch16_224", VIT, 32),
    "BEiT (relative bias)": ("beit_base_patch16_224", VIT, 32),
    "EVA-02 (rotary)": ("eva02_tiny_patch14_224", {**VIT, "img_size": 28, "patch_size": 7}, 28),
    "Swin": ("swin_tiny_patch4_window7_224", SWIN, 32),
    "Swin (fused attention)": ("swin_tiny_patch4_window7_224", SWIN, 32),
    "ConvNeXt": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32)}, 64),
    "NFNet (standardized weights)": ("test_nfnet", {}, 32),
}


def build(name):
    timm.layers.set_fused_attn(True, experimental="fused" in name)
    variant, options, size = MODELS[name]
    model = timm.create_model(variant, pretrained=False, num_classes=10, **options)
    return models.lively(model), {"x": torch.randn(4, 3, size, size)}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, id=n, marks=pytest.mark.works("Models", n, package="timm")) for n in MODELS],
)
def test_model(name, record_property):
    # Swin multiplies batches of matrices by itself unless timm is told to use fused attention.
    share = models.check(*build(name), least=0.85 if name == "Swin" else 0.99)
    record_property("FLOPs served", f"{100 * share:.0f} %")


def test_freeze_folds_its_batch_norms():
    """``BatchNormAct2d``, a batch norm that applies an activation too: both are done by the convolution before it."""
    model, _ = build("EfficientNet")
    notes = {r.name: (r.kind, r.note) for r in fastnn.explain(fastnn.accelerate(model, freeze=True))}
    norms = [note for kind, note in notes.values() if kind == "BatchNormAct2d"]
    assert norms and all(note.startswith("folded") for note in norms)
    assert sum(note.startswith("fused") for kind, note in notes.values() if kind == "SiLU") >= 5
