"""How much of a picture the first stage keeps: PSNR, SSIM, and the FID of what comes back (rFID)."""

import random
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data.emoji import KINDS, CorpusConfig, EmojiScenes
from ldm.errors import UsageError
from ldm.evaluation.distances import fid
from ldm.evaluation.features import features, fitted
from ldm.models.classifier import SceneClassifier

SHARES = CorpusConfig().kinds  # of the scenes that a first stage is judged by
WINDOW, SIGMA = 11, 1.5  # of SSIM's Gaussian window, in pixels
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


class Autoencoder(Protocol):
    """Images [B, 3, H, W] in [-1, 1] -> latents -> images, deterministically; an AutoencoderKL is one."""

    def encode(self, images: Tensor, /) -> Tensor: ...
    def decode(self, latents: Tensor, /) -> Tensor: ...


def levels(images: Tensor) -> Tensor:
    """[-1, 1] -> the 256 levels of 8-bit pictures, as floats."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round()


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture [B], 8-bit pictures given in [-1, 1]; equal ones: 148 dB."""
    return 10 * torch.log10(255**2 / (levels(x) - levels(y)).square().flatten(1).mean(1).clamp(min=1e-10))


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity of each picture [B], at most 1, of 8-bit pictures [B, C, H, W] given in [-1, 1].

    Wang et al. 2004, eq. 13, in a Gaussian window of 11 x 11 with sigma 1.5, K1 = 0.01, K2 = 0.03: the mean over all
    places where the window is within the picture, and over the channels.
    """
    a, b = levels(x).double(), levels(y).double()
    mean_a, mean_b = _windowed(a), _windowed(b)
    both, apart = mean_a * mean_b, mean_a.square() + mean_b.square()
    covariance, variances = _windowed(a * b) - both, _windowed(a.square() + b.square()) - apart
    similar = (2 * both + C1) * (2 * covariance + C2) / ((apart + C1) * (variances + C2))
    return similar.flatten(1).mean(1).float()


def _windowed(images: Tensor) -> Tensor:
    """Weighted means around every place where the window fits: [B, C, H, W] -> [B, C, H - 10, W - 10]"""
    away = torch.arange(WINDOW, dtype=images.dtype) - WINDOW // 2
    weights = torch.exp(-away.square() / (2 * SIGMA**2))
    weights = weights / weights.sum()
    rows = F.conv2d(images.flatten(0, 1)[:, None], weights.view(1, 1, 1, -1))
    means = F.conv2d(rows, weights.view(1, 1, -1, 1)).squeeze(1)
    return means.view(*images.shape[:2], *means.shape[1:])


def held_out_scenes(scenes: EmojiScenes, n: int) -> Tensor:
    """n scenes [n, 3, S, S] in [-1, 1] of combinations held out of training, of all kinds in the shares that a corpus
    has by itself, so that first stages can be compared. UsageError: the corpus holds out none.
    """
    if not any(scenes.held_out_count(kind) for kind in ("single", "pair")):
        raise UsageError("the corpus holds out no scene; give it more objects or a larger held_out share")
    images = []
    for i in range(n):
        rng = random.Random(f"held-out scene {i}")
        spec = None
        while spec is None or not scenes.is_held_out(spec):
            spec = scenes.spec(rng, rng.choices(KINDS, SHARES)[0])
        images.append(scenes.draw(spec, rng).image)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.inference_mode()
def round_trip(vae: Autoencoder, images: Tensor) -> Tensor:
    """Images [n, 3, S, S] in [-1, 1] through the first stage and back, in its dtype, on its device; float32."""
    where = next(vae.parameters()) if isinstance(vae, torch.nn.Module) else images
    return torch.cat([vae.decode(vae.encode(x.to(where))).float().cpu() for x in images.split(16)])


def first_stage_psnr(vae: Autoencoder, scenes: EmojiScenes, n: int = 128) -> float:
    """Mean PSNR in dB of n held-out scenes that went through the first stage and back."""
    images = held_out_scenes(scenes, n)
    return float(psnr(images, round_trip(vae, images)).mean())


class Kept(NamedTuple):
    """What a first stage keeps of held-out scenes."""

    psnr: float  # mean, dB
    ssim: float  # mean, at most 1
    rfid: float  # FID of what came back against what went in; 0 for a first stage that keeps all


def first_stage_kept(vae: Autoencoder, scenes: EmojiScenes, network: SceneClassifier, n: int = 500) -> Kept:
    """PSNR and SSIM of n held-out scenes that went through the first stage and back, and their rFID."""
    images = held_out_scenes(scenes, n)
    back = round_trip(vae, images)
    both = (levels(each).byte().permute(0, 2, 3, 1).numpy() for each in (images, back))
    rfid = fid(*(features(network, fitted(each, network.config.image_size)) for each in both))
    return Kept(float(psnr(images, back).mean()), float(ssim(images, back).mean()), rfid)
