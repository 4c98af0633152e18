"""Whether pictures show what is not to be shown, as a model's own safety checker sees it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.models.config import refuse_unmodelled
from ldm.models.safety import SafetyChecker

SIDE = 224  # of CLIP's pictures, in pixels
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's (Radford et al. 2021)


def preprocessor(side: int = SIDE) -> dict[str, Any]:
    """`feature_extractor/preprocessor_config.json`: what `clip_pixels` does, in transformers' words."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,  # Pillow's number of the bicubic filter
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }


def check_preprocessor(config: Mapping[str, object], side: int = SIDE) -> None:
    """ModelError when a preprocessor_config.json asks for other pictures than `clip_pixels` makes."""
    fixed: dict[str, tuple[object, ...]] = {name: (value,) for name, value in preprocessor(side).items()}
    fixed |= {name: (*fixed[name], side) for name in ("size", "crop_size")}  # in older files a number
    fixed |= {"image_mean": (MEAN,), "image_std": (STD,)}
    del fixed["image_processor_type"]  # it has had several names
    refuse_unmodelled("feature extractor config", config, fixed, frozenset(config))


def clip_pixels(images: Sequence[Image.Image], side: int = SIDE) -> Tensor:
    """Pictures of any sizes -> float32 [B, 3, side, side] with CLIP's mean and deviation.

    The shorter side is brought to `side` by Pillow's bicubic filter and the middle cut out, as transformers'
    CLIPImageProcessor does.
    """
    return torch.stack([_clip_pixels(image.convert("RGB"), side) for image in images])


def _clip_pixels(image: Image.Image, side: int) -> Tensor:
    short = min(image.size)
    width, height = (side if length == short else int(side * length / short) for length in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    small = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
    pixels = (np.asarray(small, dtype=np.float32) / 255 - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def flagged(checker: SafetyChecker, images: Sequence[Image.Image]) -> tuple[bool, ...]:
    """The checker's verdict on each picture, seen alone: True where it shows what is not to be shown."""
    weight, side = checker.visual_projection.weight, checker.config.vision.image_size
    return tuple(bool(checker(clip_pixels([image], side).to(weight))) for image in images)
