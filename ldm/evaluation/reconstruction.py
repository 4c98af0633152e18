"""How much of a picture the first stage keeps."""

import random
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ldm.data.emoji import EmojiScenes


class Autoencoder(Protocol):
    """Images [B, 3, H, W] in [-1, 1] -> latents -> images, deterministically; an AutoencoderKL is one."""

    def encode(self, images: Tensor, /) -> Tensor: ...
    def decode(self, latents: Tensor, /) -> Tensor: ...


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture [B], 8-bit pictures given in [-1, 1]; equal ones: 148 dB."""
    a, b = (((v.clamp(-1, 1) + 1) * 127.5).round() for v in (x, y))
    return 10 * torch.log10(255**2 / (a - b).square().flatten(1).mean(1).clamp(min=1e-10))


def held_out_scenes(scenes: EmojiScenes, n: int) -> Tensor:
    """n scenes [n, 3, S, S] in [-1, 1] of combinations held out of training, of the corpus' kinds and sizes."""
    images = []
    for i in range(n):
        rng = random.Random(f"held-out scene {i}")
        spec = scenes.spec(rng)
        while not scenes.is_held_out(spec):
            spec = scenes.spec(rng)
        images.append(scenes.draw(spec, rng).image)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.inference_mode()
def first_stage_psnr(vae: Autoencoder, scenes: EmojiScenes, n: int = 128) -> float:
    """Mean PSNR in dB of n held-out scenes that went through the first stage and back, in its dtype, on its device."""
    images = held_out_scenes(scenes, n)
    where = next(vae.parameters()) if isinstance(vae, torch.nn.Module) else images
    parts = [psnr(x, vae.decode(vae.encode(x.to(where))).float().cpu()) for x in images.split(16)]
    return float(torch.cat(parts).mean())
