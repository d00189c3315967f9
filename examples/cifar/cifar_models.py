"""Image classifiers with new weights for images of 32 x 32 pixels.

None of them draws random numbers during training (they have no dropout), so a checkpoint needs no generator state.
"""

from torch import nn
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

PLAIN, WIDE = [64, 128, 256, 512], [256, 512, 1024, 2048]
RESNETS = {
    # He et al. 2015, https://arxiv.org/abs/1512.03385, table 1.
    "resnet18": {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": PLAIN},
    "resnet34": {"layer_type": "basic", "depths": [3, 4, 6, 3], "hidden_sizes": PLAIN},
    "resnet50": {"layer_type": "bottleneck", "depths": [3, 4, 6, 3], "hidden_sizes": WIDE},
    "resnet101": {"layer_type": "bottleneck", "depths": [3, 4, 23, 3], "hidden_sizes": WIDE},
}
MODELS = (*RESNETS, "vit-tiny", "small")
FROM_CONFIG = ("vit-tiny", "small")
"""Models that are fully described by their configuration, so that `from_pretrained` loads them."""


def make_model(name: str, num_labels: int) -> PreTrainedModel:
    config = make_config(name, num_labels)
    if isinstance(config, ViTConfig):
        return ViTForImageClassification(config)
    model = ResNetForImageClassification(config)
    if name in RESNETS:
        keep_the_size(model)
    return model


def make_config(name: str, num_labels: int) -> PreTrainedConfig:
    if name in RESNETS:
        return ResNetConfig(**RESNETS[name], num_labels=num_labels)
    if name == "vit-tiny":
        # The widths of DeiT-Ti (Touvron et al. 2020, https://arxiv.org/abs/2012.12877, table 1), on patches of 4 pixels.
        return ViTConfig(
            image_size=32,
            patch_size=4,
            hidden_size=192,
            num_hidden_layers=12,
            num_attention_heads=3,
            intermediate_size=768,
            num_labels=num_labels,
        )
    # Half a millisecond for an image, forward and backward, on one core.
    return ResNetConfig(
        embedding_size=32,
        layer_type="basic",
        depths=[1, 1, 1],
        hidden_sizes=[32, 64, 128],
        num_labels=num_labels,
    )


def keep_the_size(model: ResNetForImageClassification) -> None:
    """Replace the first layers, which are made for 224 pixels and would reduce 32 x 32 to 8 x 8 before the first stage."""
    stem = model.resnet.embedder
    original = stem.embedder.convolution
    stem.embedder.convolution = nn.Conv2d(
        original.in_channels, original.out_channels, kernel_size=3, padding=1, bias=False
    )
    stem.pooler = nn.Identity()
