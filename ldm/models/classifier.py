"""A small network that says what a scene of the corpus shows. What it keeps of a picture before it speaks is the space
that pictures are compared in (`ldm.evaluation.features`), as Inception's is elsewhere.

Shapes: B batch, S side of the square picture, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import ModelError
from ldm.models.config import as_json, divisible, take_all
from ldm.models.layers import ResBlock

EPS = 1e-5  # of every GroupNorm here


@dataclass(frozen=True)
class SceneClassifierConfig:
    """Shape of a SceneClassifier. objects, backgrounds: names, in the order of their logits; most: objects in a scene.

    block_out_channels: widths at S / 4 before and after the first block, then at S / 8 ... Raises ModelError when a
    width does not divide into norm_num_groups.
    """

    objects: tuple[str, ...] = ()
    backgrounds: tuple[str, ...] = ()
    most: int = 4
    image_size: int = 64
    block_out_channels: tuple[int, ...] = (48, 64, 96)
    features: int = 128
    norm_num_groups: int = 8

    def __post_init__(self) -> None:
        groups = (self.norm_num_groups,) * len(self.block_out_channels)
        divisible("classifier config", self.block_out_channels, groups, "norm_num_groups")

    @classmethod
    def from_dict(cls, config: Mapping[str, object]) -> SceneClassifierConfig:
        """Reads a `config.json` that `to_dict` made. ModelError when it is none."""
        names = {}
        for key in ("objects", "backgrounds"):
            given = config.get(key)
            if not isinstance(given, list) or not given or not all(isinstance(name, str) for name in given):
                fault = f"{key} is no list of names"
                raise ModelError(f"classifier config: {fault}; name a folder that `ldm train classifier` made")
            names[key] = tuple(given)
        shape = take_all("classifier config", {k: v for k, v in config.items() if k not in names}, cls(), {})
        return cls(**shape | names)

    def to_dict(self) -> dict[str, object]:
        """For `config.json`."""
        return {"_class_name": "SceneClassifier", **as_json(self)}


class Said(NamedTuple):
    """What a classifier says of pictures, in logits: [B, objects], [B, backgrounds], [B, most] (1, 2 ... are drawn)."""

    objects: Tensor
    background: Tensor
    number: Tensor


class SceneClassifier(nn.Module):
    """Residual blocks (He et al. 2016), the mean over all places (Lin et al. 2014), and one linear layer a question."""

    def __init__(self, config: SceneClassifierConfig) -> None:
        super().__init__()
        self.config = config
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(3, widths[0], 7, stride=4, padding=3)
        self.blocks = nn.ModuleList(ResBlock(a, b, groups=groups, eps=EPS) for a, b in pairwise(widths))
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.features, 1)
        asked = len(config.objects), len(config.backgrounds), config.most
        self.objects, self.background, self.number = (nn.Linear(config.features, n) for n in asked)

    def features(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] in [-1, 1] -> [B, D], of mean 0 and variance 1 over the D numbers of each picture.

        So no classifier's distances are larger than another's for its scale alone: |f - g|^2 / D is from 0 to 4.
        """
        x = self.conv_in(images)
        for i, block in enumerate(self.blocks):
            x = block(F.avg_pool2d(x, 2) if i else x)
        pooled = F.silu(self.conv_out(F.silu(self.norm_out(x)))).mean((2, 3))
        return F.layer_norm(pooled, pooled.shape[1:])

    def forward(self, images: Tensor) -> Said:
        """[B, 3, S, S] in [-1, 1] -> what they show."""
        found = self.features(images)
        return Said(self.objects(found), self.background(found), self.number(found))
