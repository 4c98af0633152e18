"""The cross-attention U-Net of Latent Diffusion (Rombach et al. 2022, sec. 3.3; its SDXL form: Podell et al. 2023).

Attribute names are the key names of diffusers' checkpoints, so those load without any mapping.
Shapes: B batch, C channels, H W latent height and width, L = H*W, T text tokens, D text width, E time-embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import ModelError, UsageError
from ldm.models.config import as_json, divisible, refuse_unmodelled, same_length, spread, take_all
from ldm.models.layers import (
    Downsample,
    ResBlock,
    SpatialTransformer,
    TextKeysValues,
    TimestepMLP,
    TransformerBlock,
    Upsample,
    timestep_embedding,
)

PLAIN, CROSS = "DownBlock2D", "CrossAttnDownBlock2D"
LevelText = tuple[tuple[TextKeysValues, ...], ...]
"""The text's keys and values for one level: a tuple a SpatialTransformer, in it one entry a TransformerBlock."""
Residuals = tuple[Sequence[Tensor], Tensor]
"""What ControlNet adds (Zhang et al. 2023): one tensor for every skip, in their order, and one for the mid block."""


@dataclass(frozen=True)
class UNetConfig:
    """Shape of a U-Net; the defaults are Stable Diffusion 1.5's. Field names and meanings are diffusers', except:

    num_heads: attention heads of every level, which diffusers' json calls `attention_head_dim`.
    The up blocks mirror the down blocks, the mid block attends like the last level.
    use_linear_projection: SD2 and SDXL; proj_in and proj_out are linear, not 1x1 convolutions.
    only_cross_attention: the x4-upscaler; a level whose first attentions, too, are to the text; () for none. The mid
    block's never are.
    num_class_embeds: the x4-upscaler; how many class labels there are (its levels of noise in the small image); 0 for
    models without.
    addition_time_embed_dim: SDXL; width of the embedding of each size number; 0 for models without.
    projection_class_embeddings_input_dim: SDXL; width of the pooled text vector and all size embeddings together.
    Raises ModelError for unknown block types, lists of unequal length, and widths that do not divide.
    """

    in_channels: int = 4
    out_channels: int = 4
    sample_size: int = 64
    down_block_types: tuple[str, ...] = (CROSS, CROSS, CROSS, PLAIN)
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    cross_attention_dim: int = 768
    num_heads: tuple[int, ...] = (8, 8, 8, 8)
    transformer_layers_per_block: tuple[int, ...] = (1, 1, 1, 1)
    use_linear_projection: bool = False
    only_cross_attention: tuple[bool, ...] = ()
    num_class_embeds: int = 0
    addition_time_embed_dim: int = 0
    projection_class_embeddings_input_dim: int = 0

    def __post_init__(self) -> None:
        kind, widths = "U-Net config", self.block_out_channels
        for block in self.down_block_types:
            if block not in (PLAIN, CROSS):
                raise ModelError(f"{kind}: down_block_types has {block!r}; supported are {PLAIN} and {CROSS}")
        lists = ["block_out_channels", "down_block_types", "num_heads", "transformer_layers_per_block"]
        same_length(kind, self, *lists, *(["only_cross_attention"] if self.only_cross_attention else []))
        divisible(kind, widths, (self.norm_num_groups,) * len(widths), "norm_num_groups")
        attends = [block == CROSS for block in self.down_block_types[:-1]] + [True]
        heads = tuple(n if attend else 1 for n, attend in zip(self.num_heads, attends, strict=True))
        divisible(kind, widths, heads, "attention heads")

    @property
    def up_block_types(self) -> tuple[str, ...]:
        """diffusers' names of the up blocks, lowest resolution first."""
        return tuple(block.replace("Down", "Up") for block in reversed(self.down_block_types))

    @classmethod
    def from_dict(cls, config: Mapping[str, object]) -> UNetConfig:
        """Reads diffusers' `unet/config.json`. ModelError for any setting whose numbers would not be ours."""
        kind, defaults = "U-Net config", cls(only_cross_attention=(False,) * 4)
        types = config.get("down_block_types")
        levels = len(types) if isinstance(types, (list, tuple)) else len(defaults.down_block_types)
        given = {name: value for name, value in config.items() if name not in SDXL_ONLY or config.get(ADDED)}
        given["num_heads"] = spread(config, "attention_head_dim", 8, levels)
        depths, only = "transformer_layers_per_block", "only_cross_attention"
        given |= {depths: spread(config, depths, 1, levels), only: spread(config, only, False, levels)}
        values = take_all(kind, given, defaults, ABSENT)
        found = cls(**values | {only: values[only] if any(values[only]) else ()})
        known = frozenset(vars(found)) | HARMLESS
        refuse_unmodelled(kind, config, FIXED | {"up_block_types": (found.up_block_types,)}, known)
        return found

    def to_dict(self) -> dict[str, object]:
        """The `config.json` with which stock diffusers builds the same network."""
        config = as_json(self)
        config["attention_head_dim"] = config.pop("num_heads")
        config |= {"_class_name": "UNet2DConditionModel", "up_block_types": list(self.up_block_types)}
        config |= {ADDED: "text_time"} if self.projection_class_embeddings_input_dim else {}
        return {name: value for name, value in config.items() if value or name not in OPTIONAL}


ADDED = "addition_embed_type"
SDXL_ONLY = ("addition_time_embed_dim", "projection_class_embeddings_input_dim")
OPTIONAL = (*SDXL_ONLY, "only_cross_attention", "num_class_embeds")  # absent from config.json where they are empty
ABSENT: dict[str, object] = {"cross_attention_dim": 1280}
"""What diffusers takes for a field that config.json lacks, where that is not the default here."""
HARMLESS = frozenset(
    {
        "attention_head_dim",  # read as num_heads
        "addition_embed_type_num_heads",  # of another addition_embed_type
        "dropout",  # 0 when sampling
        "mid_block_only_cross_attention",  # of another mid_block_type
        "upcast_attention",  # the fused attention accumulates its scores in float32 in any case
    }
)
FIXED: dict[str, tuple[object, ...]] = {
    "_class_name": ("UNet2DConditionModel",),
    ADDED: (None, "text_time"),
    "act_fn": ("silu", "swish"),
    "attention_type": ("default",),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "downsample_padding": (1,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "norm_eps": (1e-5,),
    "resnet_out_scale_factor": (1,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
}
"""Fields of diffusers' config that we do not vary, and the values for which our computation is right."""


def transformers(c: UNetConfig, level: int, count: int) -> nn.ModuleList:
    """`count` SpatialTransformers with the width, heads and depth of a level."""
    width, heads, depth = c.block_out_channels[level], c.num_heads[level], c.transformer_layers_per_block[level]
    groups, linear = c.norm_num_groups, c.use_linear_projection
    only = level >= 0 and any(c.only_cross_attention[level : level + 1])  # not in the mid block, which has level -1
    return nn.ModuleList(
        SpatialTransformer(width, c.cross_attention_dim, heads, depth, groups=groups, linear=linear, only_text=only)
        for _ in range(count)
    )


def res_blocks(c: UNetConfig, channels: Sequence[tuple[int, int]]) -> nn.ModuleList:
    """ResBlocks of these (in, out) widths."""
    E = 4 * c.block_out_channels[0]
    return nn.ModuleList(ResBlock(a, b, groups=c.norm_num_groups, eps=1e-5, d_time=E) for a, b in channels)


class DownLevel(nn.Module):
    """One resolution on the way down: ResBlocks, each with a transformer if the level attends, then a halving."""

    def __init__(self, c: UNetConfig, level: int, c_in: int) -> None:
        super().__init__()
        n, c_out = c.layers_per_block, c.block_out_channels[level]
        attends, last = c.down_block_types[level] == CROSS, level == len(c.block_out_channels) - 1
        self.resnets = res_blocks(c, [(c_in if j == 0 else c_out, c_out) for j in range(n)])
        self.attentions = transformers(c, level, n if attends else 0)
        self.downsamplers = nn.ModuleList([] if last else [Downsample(c_out)])

    def forward(self, x: Tensor, temb: Tensor, text: LevelText) -> list[Tensor]:
        """x [B, c_in, H, W], temb [B, E] -> the maps after each step, which are the skips; the last is the result."""
        maps = []
        for j, resnet in enumerate(self.resnets):
            x = resnet(x, temb)
            x = self.attentions[j](x, text[j]) if text else x
            maps.append(x)
        for downsample in self.downsamplers:
            maps.append(downsample(x))
        return maps


class MidLevel(nn.Module):
    """The lowest resolution: ResBlock, transformer, ResBlock. [B, C, H, W] -> [B, C, H, W]"""

    def __init__(self, c: UNetConfig) -> None:
        super().__init__()
        width = c.block_out_channels[-1]
        self.attentions = transformers(c, -1, 1)
        self.resnets = res_blocks(c, [(width, width)] * 2)

    def forward(self, x: Tensor, temb: Tensor, text: LevelText) -> Tensor:
        """x [B, C, H, W], temb [B, E] -> [B, C, H, W]"""
        x = self.attentions[0](self.resnets[0](x, temb), text[0])
        x = self.resnets[1](x, temb)
        return x


class UpLevel(nn.Module):
    """One resolution on the way up; each ResBlock also takes a skip, and the doubling comes last."""

    def __init__(self, c: UNetConfig, level: int, c_in: int, skips: Sequence[int]) -> None:
        """skips: the widths of the skips in the order in which they are taken, layers_per_block + 1 of them."""
        super().__init__()
        c_out = c.block_out_channels[level]
        channels = [((c_in if j == 0 else c_out) + skip, c_out) for j, skip in enumerate(skips)]
        self.resnets = res_blocks(c, channels)
        self.attentions = transformers(c, level, len(skips) if c.down_block_types[level] == CROSS else 0)
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if level > 0 else [])

    def forward(self, x: Tensor, temb: Tensor, text: LevelText, skips: list[Tensor]) -> Tensor:
        """x [B, c_in, H, W], temb [B, E] -> [B, c_out, 2H, 2W] (the top level: H, W). Takes its skips off the end."""
        for j, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), temb)
            x = self.attentions[j](x, text[j]) if text else x
        for upsample in self.upsamplers:
            x = upsample(x, skips[-1].shape[-2:])  # odd sizes: as large as the next skip, not twice
        return x


@dataclass(frozen=True)
class Prepared:
    """What a U-Net computes once per prompt. It holds results of the weights: make a new one when those change.

    text: for every level in the order of computation (down, mid, up), its text keys and values.
    added: what joins the time embedding, each [B, E]: that of the class labels, that of SDXL's pooled text and sizes.
    """

    text: tuple[LevelText, ...]
    added: tuple[Tensor, ...] = ()


class UNet(nn.Module):
    """Noisy latents, noise level and text -> the prediction (epsilon, v or x0, as the model was trained)."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = c = config
        widths, n, E = c.block_out_channels, c.layers_per_block, 4 * c.block_out_channels[0]
        self.conv_in = nn.Conv2d(c.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepMLP(widths[0], E)
        d_added = c.projection_class_embeddings_input_dim
        self.add_embedding = TimestepMLP(d_added, E) if d_added else None
        self.class_embedding = nn.Embedding(c.num_class_embeds, E) if c.num_class_embeds else None

        inputs = widths[:1] + widths[:-1]
        self.down_blocks = nn.ModuleList(DownLevel(c, i, c_in) for i, c_in in enumerate(inputs))
        self.mid_block = MidLevel(c)

        # conv_in gives the first skip, then every level one a ResBlock and one for its halving (the last level: none)
        skips = [widths[0]] + [out for i, out in enumerate(widths) for _ in range(n + (i < len(widths) - 1))]
        self.up_blocks = nn.ModuleList()
        width = widths[-1]
        for i in reversed(range(len(widths))):
            self.up_blocks.append(UpLevel(c, i, width, [skips.pop() for _ in range(n + 1)]))
            width = widths[i]

        self.conv_norm_out = nn.GroupNorm(c.norm_num_groups, width, eps=1e-5)
        self.conv_out = nn.Conv2d(width, c.out_channels, 3, padding=1)

    def _levels(self) -> list[nn.Module]:
        return [*self.down_blocks, self.mid_block, *self.up_blocks]

    def prepare(
        self, context: Tensor, pooled: Tensor | None = None, sizes: Tensor | None = None, labels: Tensor | None = None
    ) -> Prepared:
        """Everything that does not depend on the latents, once per prompt.

        context [B, T, D]: the text's hidden states. SDXL also needs pooled [B, D'] and sizes [B, 6]: original height
        and width, crop top and left, target height and width in pixels (its refiner: 5, the aesthetic score in place
        of the target); the x4-upscaler labels [B], whole numbers: the timestep to whose noise the small image was
        brought. UsageError when they do not fit.
        """
        c = self.config
        if context.shape[-1] != c.cross_attention_dim:
            widths = f"text of width {context.shape[-1]}; this U-Net takes {c.cross_attention_dim}"
            raise UsageError(f"{widths}; use its own text encoder")
        text = tuple(_keys_values(level, context) for level in self._levels())
        added = []
        if self.class_embedding is not None:
            if labels is None or not 0 <= int(labels.min()) <= int(labels.max()) < c.num_class_embeds:
                wanted = f"labels (an upscaler's noise levels) from 0 to {c.num_class_embeds - 1}"
                raise UsageError(f"this U-Net also needs {wanted}; give them to prepare()")
            added.append(self.class_embedding(labels))
        if self.add_embedding is not None:
            added.append(self.add_embedding(self._sizes(pooled, sizes).to(context.dtype)))
        return Prepared(text, tuple(added))

    def _sizes(self, pooled: Tensor | None, sizes: Tensor | None) -> Tensor:
        """What SDXL is told beside the text: the pooled text and the sinusoids of the sizes, [B, D' + 256 * sizes]."""
        c = self.config
        if pooled is None or sizes is None:
            raise UsageError("this U-Net (SDXL) also needs the pooled text and the image sizes; give both to prepare()")
        numbers = timestep_embedding(sizes.flatten(), c.addition_time_embed_dim).reshape(len(sizes), -1)
        added = torch.cat([pooled, numbers.to(pooled.dtype)], dim=-1)
        if added.shape[-1] != c.projection_class_embeddings_input_dim:
            raise UsageError(
                f"pooled text of width {pooled.shape[-1]} and {sizes.shape[-1]} sizes make {added.shape[-1]} numbers; "
                f"this U-Net takes {c.projection_class_embeddings_input_dim}"
            )
        return added

    def forward(self, x: Tensor, t: Tensor, context: Tensor | Prepared, residuals: Residuals | None = None) -> Tensor:
        """x [B, in_channels, H, W] of any H and W, t [B] in [0, 1000) -> [B, out_channels, H, W]

        context: `prepare(...)`, or the text [B, T, D] itself (as in training), which gives the same numbers.
        residuals: added to the skips and to the mid block's result. UsageError when their number is wrong.
        """
        prepared = self.prepare(context) if isinstance(context, Tensor) else context
        n = len(self.down_blocks)
        temb = self.time_embedding(timestep_embedding(t, self.config.block_out_channels[0]).to(x.dtype))
        for embedding in prepared.added:
            temb = temb + embedding
        temb = F.silu(temb)

        x = self.conv_in(x)
        skips = [x]
        for level, text in zip(self.down_blocks, prepared.text[:n], strict=True):
            skips += level(skips[-1], temb, text)
        x = self.mid_block(skips[-1], temb, prepared.text[n])
        if residuals is not None:
            downs, mid = residuals
            if len(downs) != len(skips):
                raise UsageError(f"{len(downs)} residuals for a U-Net with {len(skips)} skips; give one for each")
            skips = [skip + residual for skip, residual in zip(skips, downs, strict=True)]
            x = x + mid
        for level, text in zip(self.up_blocks, prepared.text[n + 1 :], strict=True):
            x = level(x, temb, text, skips)
        x = self.conv_out(F.silu(self.conv_norm_out(x)))
        return x


def _keys_values(level: nn.Module, context: Tensor) -> LevelText:
    """The text's keys and values for all transformers of a level."""
    return tuple(
        tuple(block.keys_values(context) for block in part.modules() if isinstance(block, TransformerBlock))
        for part in level.modules()
        if isinstance(part, SpatialTransformer)
    )


@torch.no_grad()
def init_for_training(unet: UNet) -> None:
    """Zeroes conv_out and the last layer of every ResBlock and transformer: prediction and branches start at zero.

    In place, for a fresh network only. After Dhariwal & Nichol 2021 (their published code's `zero_module`).
    """
    for part in unet.modules():
        if isinstance(part, ResBlock):
            _zero(part.conv2)
        elif isinstance(part, SpatialTransformer):
            _zero(part.proj_out)
    _zero(unet.conv_out)


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        parameter.zero_()
