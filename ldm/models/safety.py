"""Stable Diffusion's safety checker: CLIP's image vector against vectors of concepts that are not to be shown.

Rombach et al. 2022's release; described by Rando et al. 2022, "Red-Teaming the Stable Diffusion Safety Filter".
Attribute names are the key names of diffusers' checkpoints, so those load without any mapping.
Shapes: B batch, D' projection width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import ModelError
from ldm.models.clip import CLIPVisionConfig, VisionTower

CONCEPTS, SPECIAL = 17, 3  # concepts in every published checker, and those that lower the bar for all the others
LOWERED = 0.01  # by how much


VIT_L_14 = CLIPVisionConfig(
    hidden_size=1024, intermediate_size=4096, projection_dim=768, num_hidden_layers=24, num_attention_heads=16,
    patch_size=14,
)  # fmt: skip


@dataclass(frozen=True)
class SafetyConfig:
    """Shape of a SafetyChecker: that of its image encoder; the default is CLIP ViT-L/14's."""

    vision: CLIPVisionConfig = VIT_L_14

    @classmethod
    def from_dict(cls, config: Mapping[str, object]) -> SafetyConfig:
        """Reads diffusers' `safety_checker/config.json`. ModelError for any setting whose numbers would not be ours.

        Files of 2022 say some fields again in `vision_config_dict`, which then holds.
        """
        parts = [config.get(name) or {} for name in ("vision_config", "vision_config_dict")]
        width = config.get("projection_dim", 512)
        if not all(isinstance(part, Mapping) for part in parts) or type(width) is not int:
            raise ModelError("safety checker config: vision_config and projection_dim are no table and no number")
        merged = {name: value for part in parts for name, value in dict(part).items()}  # type: ignore[call-overload]
        return cls(replace(CLIPVisionConfig.from_dict(merged), projection_dim=width))

    def to_dict(self) -> dict[str, object]:
        """The `config.json` with which stock diffusers builds the same network."""
        return {
            "architectures": ["StableDiffusionSafetyChecker"],
            "model_type": "clip",
            "projection_dim": self.vision.projection_dim,
            "vision_config": self.vision.to_dict(),
        }


class SafetyChecker(nn.Module):
    """Normalised pictures -> whether each shows what is not to be shown."""

    def __init__(self, config: SafetyConfig) -> None:
        super().__init__()
        self.config = config
        width = config.vision.projection_dim
        self.vision_model = nn.ModuleDict({"vision_model": VisionTower(config.vision)})  # nested so in the files
        self.visual_projection = nn.Linear(config.vision.hidden_size, width, bias=False)
        self.concept_embeds, self.concept_embeds_weights = _fixed(CONCEPTS, width), _fixed(CONCEPTS)
        self.special_care_embeds, self.special_care_embeds_weights = _fixed(SPECIAL, width), _fixed(SPECIAL)

    def similarities(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines with the concepts [B, 17] and with the special ones [B, 3], float32, of pictures [B, 3, side, side]
        as `ldm.safety.clip_pixels` makes them.
        """
        vectors = F.normalize(self.visual_projection(self.vision_model["vision_model"](pixels)))
        concepts, special = (vectors @ F.normalize(e).T for e in (self.concept_embeds, self.special_care_embeds))
        return concepts.float(), special.float()

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, side, side] -> bool [B]: True where a concept is closer than its threshold.

        A picture near a special concept is held to thresholds lower by 0.01. Scores are rounded to a thousandth.
        """
        concepts, special = self.similarities(pixels)
        lowered = LOWERED * _above(special - self.special_care_embeds_weights.float())
        return _above(concepts - self.concept_embeds_weights.float() + lowered[:, None])


def _fixed(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape), requires_grad=False)


def _above(scores: Tensor) -> Tensor:
    """Whether a score of each row, rounded to three digits, is above 0. [B, N] -> bool [B]"""
    return ((scores * 1000).round() > 0).any(dim=1)
