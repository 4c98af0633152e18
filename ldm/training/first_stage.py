"""Stage one: the KL autoencoder (Rombach et al. 2022, sec. 3.1), on L1 + edges + KL, then a hinge PatchGAN (Esser et
al. 2021).
"""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import Dataset

from ldm.checkpoints.components import CLASSES, build
from ldm.checkpoints.load import Bare, load_into
from ldm.checkpoints.safe import atomic_folder, atomic_json, atomic_save_safetensors, read_json
from ldm.data.emoji import EmojiScenes, Scene
from ldm.errors import UsageError
from ldm.evaluation.reconstruction import psnr
from ldm.models.discriminator import PatchGAN
from ldm.models.vae import AutoencoderKL
from ldm.training.config import FirstStageConfig
from ldm.training.loop import RESULT, Batch, Stage, device_of, generator
from ldm.training.world import joined

HELD_OUT_SEED = 1_000_003  # of scenes that no training run draws
SCALE_SCENES = 512  # scenes over which the scale factor is measured


class SceneBatches(Dataset[Batch]):
    """Batch i of a corpus: images uint8 [B, 3, S, S] of scenes i B ... i B + B - 1; the first `crops` batches are [B,
    3, C, C] cut around an object of each scene. A convolutional network learns from them what it learns from whole
    scenes, for less.
    """

    def __init__(self, scenes: EmojiScenes, batch_size: int, crop: int = 0, crops: int = 0) -> None:
        self.scenes, self.batch_size, self.crop, self.crops = scenes, batch_size, crop, crops

    def __getitem__(self, index: int) -> Batch:
        first = index * self.batch_size
        scenes = [self.scenes.scene(first + i) for i in range(self.batch_size)]
        images = [
            cut(scene, self.crop, first + i) if index < self.crops else scene.image for i, scene in enumerate(scenes)
        ]
        return (torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2),)


def cut(scene: Scene, side: int, seed: int) -> NDArray[np.uint8]:
    """A square of a scene, [side, side, 3], that overlaps one of its objects; which, and where, depends on the seed
    alone.
    """
    rng = random.Random(f"crop {seed}")
    left, top, right, bottom = rng.choice(scene.boxes)
    room = scene.image.shape[0] - side
    x = rng.randint(*sorted((left - side // 4, right + side // 4 - side)))
    y = rng.randint(*sorted((top - side // 4, bottom + side // 4 - side)))
    x, y = min(max(x, 0), room), min(max(y, 0), room)
    return scene.image[y : y + side, x : x + side]


def to_signal(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> float32 in [-1, 1], channels last."""
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def held_out_images(scenes: EmojiScenes, n: int) -> Tensor:
    """n scenes of another seed than any training run's, in [-1, 1]."""
    other = EmojiScenes(scenes.config, HELD_OUT_SEED)
    return to_signal(torch.from_numpy(np.stack([other[i][0] for i in range(n)])))


class FirstStage(nn.Module):
    """The losses of autoencoder and discriminator, in one backward pass.

    The discriminator's parameters are constants for the autoencoder's term and the reconstruction is a constant for the
    discriminator's, so one optimiser step is the simultaneous update of both players.
    """

    def __init__(self, config: FirstStageConfig, batches_per_step: int = 1) -> None:
        """batches_per_step: of all processes together."""
        super().__init__()
        self.config, self.batches_per_step = config, batches_per_step
        self.vae = AutoencoderKL(config.vae)
        self.discriminator = PatchGAN(config.vae.in_channels, config.disc_width, 2)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        c, x = self.config, to_signal(batch[0])
        mean, logvar = self.vae.posterior(x)
        noise = torch.randn(mean.shape, generator=generator(c.loop.seed, step)).to(mean.device)
        y = self.vae.decode(self.vae.config.scaling_factor * (mean + (0.5 * logvar).exp() * noise))
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        pixel, edge = multiscale_l1(x, y, c.scales), edge_l1(x, y)
        reconstruction = pixel + c.edge_weight * edge + c.square_weight * (x - y).square().mean()
        loss = reconstruction + c.kl_weight * kl
        figures = {
            "pixel": pixel.detach(),
            "edge": edge.detach(),
            "kl": kl.detach(),
            "psnr": psnr(x, y).mean().detach(),
        }
        if step // self.batches_per_step >= c.disc_start:
            weights = {name: p.detach() for name, p in self.discriminator.named_parameters()}
            generator_loss = -functional_call(self.discriminator, weights, (y,)).mean()
            weight = c.disc_weight * self.adaptive_weight(reconstruction, generator_loss)
            real, fake = self.discriminator(x), self.discriminator(y.detach())
            hinge = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
            loss = loss + weight * generator_loss + 0.5 * hinge
            figures |= {"hinge": hinge.detach(), "adversarial_weight": weight}
        return loss, figures

    def adaptive_weight(self, reconstruction: Tensor, adversarial: Tensor) -> Tensor:
        """|grad of the reconstruction| / |grad of the adversarial loss| at the decoder's last layer: Esser et al.
        2021, eq. 7.
        """
        last = self.vae.decoder.conv_out.weight
        norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)]
        ratio: Tensor = norms[0] / (norms[1] + 1e-4)
        return ratio.clamp(0, 1e4).detach()


def multiscale_l1(x: Tensor, y: Tensor, scales: int) -> Tensor:
    """Mean absolute error, summed over the image and its halvings."""
    total = (x - y).abs().mean()
    for _ in range(scales - 1):
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        total = total + (x - y).abs().mean()
    return total


def edge_l1(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute error of the differences between neighbouring pixels."""
    d = x - y
    return (d[..., 1:, :] - d[..., :-1, :]).abs().mean() + (d[..., 1:] - d[..., :-1]).abs().mean()


def first_stage(config: FirstStageConfig) -> Stage:
    """The stage of a configuration. Its result is a folder in diffusers' AutoencoderKL layout, with the measured
    scale factor.
    """
    c = config.loop
    if config.crops and not 0 < config.crop <= config.corpus.size:
        raise UsageError(f"crop is {config.crop}; it must be from 1 to {config.corpus.size}, the side of a picture")
    torch.manual_seed(c.seed)
    scenes = EmojiScenes(config.corpus, c.seed)
    passes = c.gradient_accumulation_steps * joined(device_of(c.device, c.threads)).num_processes
    objective = FirstStage(config, passes)
    fixed = held_out_images(scenes, 64)

    @torch.inference_mode()
    def held_out(vae: nn.Module) -> dict[str, float]:
        assert isinstance(vae, AutoencoderKL)
        y = vae.decode(vae.encode(fixed.to(vae.quant_conv.weight.device))).cpu()
        return {
            "loss": float(multiscale_l1(fixed, y, config.scales) + edge_l1(fixed, y)),
            "psnr": float(psnr(fixed, y).mean()),
        }

    @torch.inference_mode()
    def picture(vae: nn.Module) -> Image.Image:
        assert isinstance(vae, AutoencoderKL)
        x = fixed[:16]
        y = vae.decode(vae.encode(x.to(vae.quant_conv.weight.device))).cpu()
        return tile(torch.stack([x, y], 1).flatten(0, 1), 8)  # original and round trip, side by side

    def export(vae: nn.Module, folder: Path) -> None:
        assert isinstance(vae, AutoencoderKL)
        scaled = replace(config.vae, scaling_factor=measured_scale(vae, held_out_images(scenes, SCALE_SCENES)))
        save_model(vae, scaled.to_dict(), folder / RESULT, "diffusion_pytorch_model.safetensors")

    return Stage(
        objective,
        objective.vae,
        SceneBatches(scenes, c.batch_size, config.crop, config.crops * passes),
        held_out,
        picture,
        export,
        spare=True,  # the discriminator, before disc_start
    )


@torch.inference_mode()
def measured_scale(vae: AutoencoderKL, images: Tensor) -> float:
    """1 / standard deviation of the raw latents (samples of the posterior) of these images, to four digits: measured
    again elsewhere it is the same, and latents cached by it are found.
    """
    raw: list[Tensor] = []
    for part in images.split(64):
        mean, logvar = vae.posterior(part.to(vae.quant_conv.weight.device))
        raw.append(
            mean
            + (0.5 * logvar).exp()
            * torch.randn(mean.shape, generator=generator(HELD_OUT_SEED, len(raw))).to(mean.device)
        )
    return float(f"{1 / torch.cat(raw).std():.4g}")


def tile(images: Tensor, columns: int) -> Image.Image:
    """[N, 3, H, W] in [-1, 1] -> one picture, N / columns rows high."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte()
    grid = pixels.unflatten(0, (-1, columns))  # [R, C, 3, H, W]
    return Image.fromarray(grid.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).numpy())  # [R H, C W, 3]


def trained(folder: Path, class_name: str) -> nn.Module:
    """The frozen network of a stage that came before. UsageError when that stage has not ended yet."""
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"there is no trained {class_name} in {folder}; train it first (`ldm train first-stage`, `ldm train clip`)"
        )
    with Bare():
        model = build(class_name, read_json(folder / "config.json"))
    load_into(model, [folder / f"{CLASSES[class_name].stem}.safetensors"])
    return model.eval().requires_grad_(False)


def save_model(model: nn.Module, config: dict[str, object], folder: Path, name: str) -> None:
    """A model's weights and config.json, as a part of a diffusers folder; whole or not at all."""
    with atomic_folder(folder) as staging:
        atomic_json(staging / "config.json", config)
        atomic_save_safetensors(model.state_dict(), staging / name)
