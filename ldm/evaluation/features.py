"""What pictures are compared by: the features of the model's own classifier (`ldm train classifier`)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ldm.checkpoints.load import Bare, load_into
from ldm.checkpoints.safe import read_json
from ldm.errors import LdmError, UsageError
from ldm.inputs import IMAGE_SUFFIXES, decoded, to_rgb
from ldm.models.classifier import SceneClassifier, SceneClassifierConfig

CLASSIFIER = "classifier"  # folder of it within a model's
Pictures = NDArray[np.uint8]
"""[n, S, S, 3]"""


def open_classifier(folder: str | Path) -> SceneClassifier:
    """The classifier of a folder, or of the folder classifier/ in it, in float32 on the CPU.
    LdmError: there is none, or it is damaged."""
    folder = Path(folder)
    folder = folder / CLASSIFIER if (folder / CLASSIFIER).is_dir() else folder
    if not (folder / "model.safetensors").is_file():
        raise LdmError(f"{folder} holds no classifier; train one with `ldm train classifier` and name its folder")
    with Bare():
        network = SceneClassifier(SceneClassifierConfig.from_dict(read_json(folder / "config.json")))
    load_into(network, folder / "model.safetensors", torch.float32)
    return network.eval().requires_grad_(False)


@torch.inference_mode()
def features(network: SceneClassifier, pictures: Pictures, batch_size: int = 128) -> NDArray[np.float32]:
    """[n, S, S, 3] -> [n, D] (`SceneClassifier.features`). UsageError unless S is the classifier's image_size."""
    side = network.config.image_size
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[1:] != (side, side, 3):
        got = f"pictures of shape {list(pictures.shape)} and type {pictures.dtype}"
        raise UsageError(f"{got}; the classifier takes uint8 [n, {side}, {side}, 3]")
    where = next(network.parameters()).device
    found = np.empty((len(pictures), network.config.features), np.float32)
    for first in range(0, len(pictures), batch_size):
        part = torch.from_numpy(pictures[first : first + batch_size]).to(where).permute(0, 3, 1, 2)
        found[first : first + batch_size] = network.features(part.float() / 127.5 - 1).cpu().numpy()
    return found


def fitted(pictures: Sequence[Image.Image] | Pictures, side: int) -> Pictures:
    """Square pictures of any sizes as [n, side, side, 3], those that have another by a bicubic filter that is wide
    enough not to alias (Parmar et al. 2022, arXiv:2104.11222). UsageError for one that is not square.
    """
    if isinstance(pictures, np.ndarray):
        if pictures.shape[1:3] == (side, side):
            return pictures
        pictures = [Image.fromarray(picture) for picture in pictures]
    if odd := next((image.size for image in pictures if image.width != image.height), None):
        raise UsageError(f"a picture of {odd[0]} x {odd[1]} pixels; only square ones are compared")
    sized = (image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC) for image in pictures)
    return np.stack([np.asarray(image) for image in sized])


def read_pictures(folder: str | Path, most: int | None = None) -> dict[str, Image.Image]:
    """The pictures of a folder, not of those in it, by name in the names' order; at most so many. UsageError: there
    are none. LdmError, which names it, for a file that is no picture.
    """
    folder = Path(folder)
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in IMAGE_SUFFIXES)[:most]
    if not paths:
        raise UsageError(f"{folder} holds no pictures ({', '.join(sorted(IMAGE_SUFFIXES))}); name a folder of some")
    found = {}
    for path in paths:
        try:
            found[path.name] = to_rgb(decoded(path.read_bytes()))
        except LdmError as error:
            raise LdmError(f"{path} cannot be compared: {error}") from error
    if odd := next((name for name, image in found.items() if image.width != image.height), None):
        size = "{} x {}".format(*found[odd].size)
        raise UsageError(f"{folder / odd} has {size} pixels; only square pictures are compared: cut it or take it away")
    return found
