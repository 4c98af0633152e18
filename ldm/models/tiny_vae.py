"""The tiny autoencoder TAESD (Ollin Boer Bohan 2023, github.com/madebyollin/taesd): AutoencoderKL's latents, fast.

Images [B, 3, fH, fW] in [-1, 1] <-> latents [B, c, H, W] of about unit variance, where f = 2 ** (levels - 1).
Attribute names are the key names of diffusers' checkpoints, so those load without any mapping.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.errors import ModelError
from ldm.models.config import as_json, refuse_unmodelled, same_length, take_all
from ldm.models.vae import refuse_uneven

LIMIT = 3.0  # latents are squashed softly into (-LIMIT, LIMIT) before they are decoded
LOGVAR = -30.0  # of the posterior, which has no width: AutoencoderKL's smallest


@dataclass(frozen=True)
class TinyVAEConfig:
    """Shape of an AutoencoderTiny; the defaults are TAESD's and TAESDXL's. Field names and meanings are diffusers'.

    scaling_factor: 1, for its latents are those that the U-Net sees. num_encoder_blocks, num_decoder_blocks: residual
    blocks a level. Raises ModelError when a half has levels of different widths, or the halves differ in levels.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        kind, halves = "tiny VAE config", ("encoder_block_out_channels", "decoder_block_out_channels")
        same_length(kind, self, *halves, "num_encoder_blocks", "num_decoder_blocks")
        widths = self.encoder_block_out_channels, self.decoder_block_out_channels
        if any(len(set(half)) != 1 for half in widths):
            raise ModelError(f"{kind}: block_out_channels {widths}; all levels of a half have one width; correct them")

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel along each side."""
        return 1 << (len(self.num_decoder_blocks) - 1)

    @property
    def block_out_channels(self) -> tuple[int, ...]:
        """The widths of the decoder, under AutoencoderKL's name."""
        return self.decoder_block_out_channels

    @classmethod
    def from_dict(cls, config: Mapping[str, object]) -> TinyVAEConfig:
        """Reads diffusers' `vae/config.json`. ModelError for any setting whose numbers would not be ours."""
        kind, defaults = "tiny VAE config", cls()
        refuse_unmodelled(kind, config, FIXED, frozenset(vars(defaults)) | HARMLESS)
        return cls(**take_all(kind, config, defaults, {}))

    def to_dict(self) -> dict[str, object]:
        """The `config.json` with which stock diffusers builds the same network."""
        return {"_class_name": "AutoencoderTiny", **as_json(self)}


FIXED: dict[str, tuple[object, ...]] = {
    "_class_name": ("AutoencoderTiny",),
    "act_fn": ("relu",),
    "upsample_fn": ("nearest",),
    "upsampling_scaling_factor": (2,),
    "shift_factor": (None, 0, 0.0),
}
HARMLESS = frozenset({"block_out_channels", "force_upcast", "latent_magnitude", "latent_shift"})
"""What diffusers derives from other fields, or needs only to store latents as bytes."""


class Block(nn.Module):
    """Three convolutions beside a shortcut. [B, C, H, W] -> [B, C, H, W]"""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(dim, dim), nn.ReLU(), _conv(dim, dim), nn.ReLU(), _conv(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]"""
        return torch.relu(self.conv(x) + x)


class Half(nn.Module):
    """The encoder or the decoder: a chain of layers, numbered as in the checkpoints."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H', W']"""
        y: Tensor = self.layers(x)
        return y


def _conv(c_in: int, c_out: int, stride: int = 1, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1, stride=stride, bias=bias)


def _encoder(c: TinyVAEConfig) -> Half:
    width, layers = c.encoder_block_out_channels[0], list[nn.Module]()
    for level, count in enumerate(c.num_encoder_blocks):
        layers.append(_conv(width, width, 2, bias=False) if level else _conv(c.in_channels, width))
        layers += [Block(width) for _ in range(count)]
    return Half([*layers, _conv(width, c.latent_channels)])


def _decoder(c: TinyVAEConfig) -> Half:
    width = c.decoder_block_out_channels[0]
    layers: list[nn.Module] = [_conv(c.latent_channels, width), nn.ReLU()]
    for count in c.num_decoder_blocks:
        layers += [*(Block(width) for _ in range(count)), nn.Upsample(scale_factor=2), _conv(width, width, bias=False)]
    return Half([*layers[:-2], _conv(width, c.out_channels)])  # the last level keeps its size


class AutoencoderTiny(nn.Module):
    """AutoencoderKL's interface over a network twenty times cheaper; its posterior has no width."""

    def __init__(self, config: TinyVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = _encoder(config), _decoder(config)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The latents, unscaled, and the log-variance of AutoencoderKL's narrowest posterior.

        images [B, 3, fH, fW] in [-1, 1] -> two of [B, c, H, W]. Raises UsageError when a side is no multiple of f.
        """
        refuse_uneven(images, self.config.factor)
        mean: Tensor = self.encoder(images.add(1).div(2))
        return mean, torch.full_like(mean, LOGVAR)

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled latents [B, c, H, W] of images [B, 3, fH, fW] in [-1, 1]; `noise` changes nothing."""
        return self.posterior(images)[0] * self.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, fH, fW], about [-1, 1] (not clamped), of scaled latents [B, c, H, W]."""
        z = torch.tanh(latents / self.config.scaling_factor / LIMIT) * LIMIT
        images: Tensor = self.decoder(z)
        return images.mul(2).sub(1)
