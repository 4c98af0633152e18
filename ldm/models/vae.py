"""The KL autoencoder of Latent Diffusion (Rombach et al. 2022, sec. 3.1; Kingma & Welling 2014).

Images [B, 3, fH, fW] in [-1, 1] <-> latents [B, c, H, W] of about unit variance, where f = 2 ** (levels - 1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import UsageError
from ldm.models.config import as_json, divisible, refuse_unmodelled, take_all
from ldm.models.layers import Attention, Downsample, KeysValues, ResBlock, Upsample, to_map, to_tokens

EPS = 1e-6  # of every GroupNorm here; the U-Net's ResBlocks use 1e-5
BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}  # at every level
ABSENT: dict[str, object] = {"block_out_channels": (64,), "layers_per_block": 1, "sample_size": 32}
"""What diffusers takes for a field that config.json lacks, where that is not the default here."""


@dataclass(frozen=True)
class VAEConfig:
    """Shape of an AutoencoderKL; the defaults are Stable Diffusion's KL-f8. Field names and meanings are diffusers'.

    scaling_factor: 1 / standard deviation of the raw latents. sample_size: image side it was trained on.
    force_upcast: its activations overflow float16 (SDXL); the networks ignore it, whoever picks a dtype must not.
    Raises ModelError when a width does not divide into norm_num_groups.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    sample_size: int = 512
    scaling_factor: float = 0.18215
    mid_block_add_attention: bool = True
    force_upcast: bool = True

    def __post_init__(self) -> None:
        groups = (self.norm_num_groups,) * len(self.block_out_channels)
        divisible("VAE config", self.block_out_channels, groups, "norm_num_groups")

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel along each side."""
        return 1 << (len(self.block_out_channels) - 1)

    @classmethod
    def from_dict(cls, config: Mapping[str, object]) -> VAEConfig:
        """Reads diffusers' `vae/config.json`. ModelError for any setting whose numbers would not be ours."""
        kind, defaults = "VAE config", cls()
        values = take_all(kind, config, defaults, ABSENT)
        refuse_unmodelled(kind, config, _fixed(len(values["block_out_channels"])), frozenset(vars(defaults)))
        return cls(**values)

    def to_dict(self) -> dict[str, object]:
        """The `config.json` with which stock diffusers builds the same network."""
        levels = len(self.block_out_channels)
        blocks = {name: [block] * levels for name, block in BLOCKS.items()}
        return {"_class_name": "AutoencoderKL", **as_json(self), **blocks, "act_fn": "silu"}


def _fixed(levels: int) -> dict[str, tuple[object, ...]]:
    """Fields of diffusers' config that we do not vary, and the values for which our computation is right."""
    return {
        "_class_name": ("AutoencoderKL",),
        **{name: ((block,) * levels,) for name, block in BLOCKS.items()},
        "act_fn": ("silu", "swish"),
        "shift_factor": (None, 0, 0.0),
        "latents_mean": (None,),
        "latents_std": (None,),
        "use_quant_conv": (True,),
        "use_post_quant_conv": (True,),
    }


class MapAttention(Attention):
    """One-head self-attention over a feature map. [B, C, H, W] -> [B, C, H, W]"""

    def __init__(self, dim: int, groups: int) -> None:
        super().__init__(dim, dim, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, dim, eps=EPS)

    def forward(self, x: Tensor, keys_values: KeysValues | None = None) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]"""
        return x + to_map(super().forward(to_tokens(self.group_norm(x)), keys_values), x.shape[-2], x.shape[-1])


class Middle(nn.Module):
    """The lowest resolution: ResBlock, attention (if any), ResBlock. [B, C, H, W] -> [B, C, H, W]"""

    def __init__(self, dim: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([MapAttention(dim, groups)] if attention else [])
        self.resnets = nn.ModuleList(ResBlock(dim, dim, groups=groups, eps=EPS) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]"""
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        x = self.resnets[1](x)
        return x


class Level(nn.Module):
    """ResBlocks, then another resolution unless it is the last level. [B, c_in, H, W] -> [B, c_out, H', W']"""

    def __init__(
        self, c_in: int, c_out: int, count: int, groups: int, samplers: str, sampler: Callable[[int], nn.Module] | None
    ) -> None:
        """samplers: the name of the part that changes the resolution. sampler: makes it; None in the last level."""
        super().__init__()
        self.resnets = nn.ModuleList(
            ResBlock(c_in if j == 0 else c_out, c_out, groups=groups, eps=EPS) for j in range(count)
        )
        self.add_module(samplers, nn.ModuleList([sampler(c_out)] if sampler else []))

    def forward(self, x: Tensor) -> Tensor:
        """[B, c_in, H, W] -> [B, c_out, H/2 or H or 2H, W/2 or W or 2W]"""
        for parts in self.children():
            for part in parts.children():
                x = part(x)
        return x


def levels(
    widths: Sequence[int], count: int, groups: int, samplers: str, sampler: Callable[[int], nn.Module]
) -> nn.ModuleList:
    """A Level for each width; the first begins with its own."""
    return nn.ModuleList(
        Level(c_in, c_out, count, groups, samplers, sampler if i < len(widths) - 1 else None)
        for i, (c_in, c_out) in enumerate(zip([widths[0], *widths], widths, strict=False))
    )


class Encoder(nn.Module):
    """Images [B, 3, fH, fW] -> [B, 2c, H, W], mean and log-variance before quant_conv."""

    def __init__(self, c: VAEConfig) -> None:
        super().__init__()
        widths, groups = c.block_out_channels, c.norm_num_groups
        self.conv_in = nn.Conv2d(c.in_channels, widths[0], 3, padding=1)
        halving = partial(Downsample, padded=True)
        self.down_blocks = levels(widths, c.layers_per_block, groups, "downsamplers", halving)
        self.mid_block = Middle(widths[-1], groups, c.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * c.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, fH, fW] -> [B, 2c, H, W]"""
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        x = self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))
        return x


class Decoder(nn.Module):
    """Latents after post_quant_conv [B, c, H, W] -> images [B, 3, fH, fW]."""

    def __init__(self, c: VAEConfig) -> None:
        super().__init__()
        widths, groups = c.block_out_channels[::-1], c.norm_num_groups
        self.conv_in = nn.Conv2d(c.latent_channels, widths[0], 3, padding=1)
        self.mid_block = Middle(widths[0], groups, c.mid_block_add_attention)
        self.up_blocks = levels(widths, c.layers_per_block + 1, groups, "upsamplers", Upsample)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], c.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """[B, c, H, W] -> [B, 3, fH, fW]"""
        z = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            z = level(z)
        z = self.conv_out(F.silu(self.conv_norm_out(z)))
        return z


def refuse_uneven(images: Tensor, factor: int) -> None:
    """UsageError unless both sides of the images [B, 3, H, W] are multiples of `factor`."""
    height, width = images.shape[-2:]
    if height % factor or width % factor:
        raise UsageError(f"image of {height} x {width} pixels; the sides must be multiples of {factor}; resize it")


class AutoencoderKL(nn.Module):
    """Encoder to a diagonal Gaussian over latents, and decoder; encode and decode scale the raw latents."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        c = config.latent_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * c, 2 * c, 1)
        self.post_quant_conv = nn.Conv2d(c, c, 1)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z | image), unscaled; log-variance clamped to [-30, 20].

        images [B, 3, fH, fW] in [-1, 1] -> two of [B, c, H, W]. Raises UsageError when a side is no multiple of f.
        """
        refuse_uneven(images, self.config.factor)
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled latents [B, c, H, W] of images [B, 3, fH, fW] in [-1, 1].

        The posterior's mean, or with `noise` ~ N(0, 1) [B, c, H, W] a sample of it.
        """
        mean, logvar = self.posterior(images)
        z = mean if noise is None else mean + (0.5 * logvar).exp() * noise
        return z * self.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, fH, fW], about [-1, 1] (not clamped), of scaled latents [B, c, H, W]."""
        images: Tensor = self.decoder(self.post_quant_conv(latents / self.config.scaling_factor))
        return images
