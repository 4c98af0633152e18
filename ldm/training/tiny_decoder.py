"""A tiny autoencoder in place of the first stage: TAESD's form (Ollin Boer Bohan 2023), for the same latents.

Its decoder makes the pictures of the frozen first stage's latents, its encoder those latents of the pictures; the two
share nothing, and each is trained on its own error. The decoder aims at the pictures themselves, not at what the first
stage makes of their latents: the target is better, and costs nothing to compute.
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from ldm.checkpoints.components import DIFFUSION
from ldm.checkpoints.single_file import open_vae
from ldm.data.cache import of_networks
from ldm.data.emoji import CorpusConfig, EmojiScenes
from ldm.errors import UsageError
from ldm.evaluation.reconstruction import psnr
from ldm.fast import refuse_no_model, write_fast
from ldm.models.tiny_vae import AutoencoderTiny, TinyVAEConfig
from ldm.models.vae import AutoencoderKL, VAEConfig
from ldm.training.config import LoopConfig
from ldm.training.first_stage import SceneBatches, edge_l1, held_out_images, save_model, tile, to_signal
from ldm.training.loop import RESULT, Batch, Stage, generator

HELD_OUT_SCENES = 64


@dataclass(frozen=True)
class TinyDecoderConfig:
    """`ldm train tiny-decoder`: an AutoencoderTiny for the latents of a finished first stage. Loss weights are relative
    to the mean absolute error of a pixel in [-1, 1].
    """

    loop: LoopConfig
    first_stage: str  # folder with the trained autoencoder (`ldm train first-stage`'s result, a model's vae/)
    weights: str = ""  # model folder whose fast mode the result becomes a part of when the run ends; "" = only in `out`
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    width: int = 24  # channels of the decoder at all levels
    encoder_width: int = 16
    blocks: int = 2  # residual blocks a level; one where the picture has its full size, as in TAESD
    square_weight: float = 1.0  # of the squared error, which is what PSNR measures
    edge_weight: float = 0.5  # of the error of horizontal and vertical differences

    def __post_init__(self) -> None:
        for name in ("width", "encoder_width", "blocks"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")


def shape_of(config: TinyDecoderConfig, vae: VAEConfig) -> TinyVAEConfig:
    """TAESD's form for the latents of an autoencoder: their channels, and a level for each of its."""
    deep = (config.blocks,) * (len(vae.block_out_channels) - 1)
    return TinyVAEConfig(
        in_channels=vae.in_channels,
        out_channels=vae.out_channels,
        latent_channels=vae.latent_channels,
        encoder_block_out_channels=(config.encoder_width,) * len(vae.block_out_channels),
        decoder_block_out_channels=(config.width,) * len(vae.block_out_channels),
        num_encoder_blocks=(1, *deep),
        num_decoder_blocks=(*deep, 1),
    )


class TinyAutoencoding(nn.Module):
    """The losses of both halves. Latents are in the U-Net's frame, scaled: so an AutoencoderTiny takes and gives them
    (its scaling_factor is 1).
    """

    def __init__(self, config: TinyDecoderConfig, vae: AutoencoderKL) -> None:
        super().__init__()
        self.config, self.vae = config, vae.requires_grad_(False)
        self.tiny = AutoencoderTiny(shape_of(config, vae.config))
        self.tiny.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        c, x = self.config, to_signal(batch[0])
        with torch.no_grad():
            mean, logvar = self.vae.posterior(x)
            noise = torch.randn(mean.shape, generator=generator(c.loop.seed, step)).to(mean.device)
            wanted, z = (self.vae.config.scaling_factor * one for one in (mean, mean + (0.5 * logvar).exp() * noise))
        y = self.tiny.decode(z)
        pixel, square = (x - y).abs().mean(), (x - y).square().mean()
        latent = (self.tiny.encode(x) - wanted).square().mean()
        loss = pixel + c.square_weight * square + c.edge_weight * edge_l1(x, y) + latent
        figures = {"pixel": pixel, "latent": latent, "psnr": psnr(x, y).mean()}
        return loss, {name: figure.detach() for name, figure in figures.items()}


def tiny_decoder(config: TinyDecoderConfig) -> Stage:
    """The stage of a configuration. Its result is a folder in diffusers' AutoencoderTiny layout, in float16; `weights`
    names a model whose fast mode that becomes a part of. Held-out figures are PSNR in dB to the pictures: `psnr` of the
    first stage's latents decoded by the tiny decoder, `full_psnr` by the first stage's own, `round_trip_psnr` of the
    tiny encoder's latents decoded by the tiny decoder. Errors as of `open_vae`; UsageError for a tiny autoencoder.
    """
    if config.weights:
        refuse_no_model(config.weights)
    torch.manual_seed(config.loop.seed)
    vae = open_vae(config.first_stage, torch.float32)
    if not isinstance(vae, AutoencoderKL):
        raise UsageError(
            f"{config.first_stage} is a tiny autoencoder itself; name the first stage that it is to replace"
        )
    scenes = EmojiScenes(config.corpus, config.loop.seed)
    objective = TinyAutoencoding(config, vae)
    fixed = held_out_images(scenes, HELD_OUT_SCENES)
    with torch.inference_mode():
        latents = torch.cat([vae.encode(part) for part in fixed.split(16)])
        full = torch.cat([vae.decode(part) for part in latents.split(16)])

    def decoded(tiny: nn.Module, z: Tensor) -> Tensor:
        assert isinstance(tiny, AutoencoderTiny)
        where = next(tiny.parameters())
        return torch.cat([tiny.decode(part.to(where)).cpu() for part in z.split(16)])

    @torch.inference_mode()
    def held_out(tiny: nn.Module) -> dict[str, float]:
        assert isinstance(tiny, AutoencoderTiny)
        y = decoded(tiny, latents)
        own = tiny.encode(fixed.to(next(tiny.parameters())))
        pictures = {"psnr": y, "full_psnr": full, "round_trip_psnr": decoded(tiny, own)}
        figures = {name: float(psnr(fixed, picture).mean()) for name, picture in pictures.items()}
        return {"loss": float((fixed - y).abs().mean())} | figures

    @torch.inference_mode()
    def picture(tiny: nn.Module) -> Image.Image:
        rows = (fixed[:12], full[:12], decoded(tiny, latents[:12]))
        return tile(torch.stack(rows, 1).flatten(0, 1), 12)  # original, first stage, tiny, side by side

    def export(tiny: nn.Module, folder: Path) -> None:
        assert isinstance(tiny, AutoencoderTiny)
        half = copy.deepcopy(tiny).half()
        save_model(half, tiny.config.to_dict(), folder / RESULT, f"{DIFFUSION}.safetensors")
        if config.weights:
            write_fast(config.weights, decoder=folder / RESULT)

    batches = SceneBatches(scenes, config.loop.batch_size)
    base = of_networks({"vae": vae})
    return Stage(objective, objective.tiny, batches, held_out, picture, export, base=base)
