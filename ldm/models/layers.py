"""The parts that the U-Net and the autoencoder are made of.

Attribute names are the key names of diffusers' checkpoints, so those load without any mapping.
Shapes: B batch, C channels, H W height and width of a feature map, L = H*W, T text tokens, D text width, E width of
the time embedding.
Every part keeps its input's memory format: a channels_last map stays so, and its tokens [B, L, C] are a view of it.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KeysValues = tuple[Tensor, Tensor]
"""The keys and values of one attention layer, each [B, heads, T, C / heads]."""
TextKeysValues = tuple[KeysValues | None, KeysValues]
"""Those of the text for both attentions of a TransformerBlock; None where the first is among the pixels."""

FEW = 128  # keys of an attention that is short


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of t (Vaswani et al. 2017, sec. 3.5), cosines first. [B] -> [B, dim] float32"""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def to_tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, L, C]"""
    return x.flatten(2).transpose(1, 2)


def to_map(x: Tensor, height: int, width: int) -> Tensor:
    """[B, L, C] -> [B, C, H, W], a channels_last view."""
    return x.reshape(len(x), height, width, -1).permute(0, 3, 1, 2)


class TimestepMLP(nn.Module):
    """[B, d_in] -> [B, E]"""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(d_in, d_out)
        self.linear_2 = nn.Linear(d_out, d_out)

    def forward(self, x: Tensor) -> Tensor:
        """[B, d_in] -> [B, E]"""
        y: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return y


class ResBlock(nn.Module):
    """Two normalised convolutions beside a shortcut (Ho et al. 2020, app. B). [B, c_in, H, W] -> [B, c_out, H, W]

    groups: of the GroupNorms, a divisor of c_in and c_out. d_time: width E of the time embedding (autoencoder: None).
    """

    def __init__(self, c_in: int, c_out: int, *, groups: int, eps: float, d_time: int | None = None) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(d_time, c_out) if d_time is not None else None
        self.norm2 = nn.GroupNorm(groups, c_out, eps=eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """x [B, c_in, H, W]; temb [B, E], the SiLU of the time embedding (taken once, outside, for all blocks)."""
        h: Tensor = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            h = h + self.time_emb_proj(temb)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """Attention of queries [B, heads, L, d] to keys and values [B, heads, T, d], as [B, heads, L, d].

    causal: query i attends to the keys up to i.

    Where it is trained on the CPU and T is short it is spelled out: the way back through torch's fused kernel takes
    1.3 to 4 times as long in float32, 6 to 10 times in bfloat16 (64 maps of 8 x 8 and 4 x 4, two cores of Zen 5).
    """
    if q.requires_grad and q.device.type == "cpu" and k.shape[2] <= FEW:
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        if causal:
            scores = scores + scores.new_full(scores.shape[-2:], -math.inf).triu(1)
        return torch.softmax(scores, dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, eq. 1); a caller may keep the keys and values of a context."""

    def __init__(self, dim: int, context_dim: int, heads: int, *, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(context_dim, dim, bias=bias)
        self.to_v = nn.Linear(context_dim, dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-1], self.heads, -1).transpose(1, 2)

    def keys_values(self, context: Tensor) -> KeysValues:
        """What is attended to. [B, T, D] -> two of [B, heads, T, C / heads]"""
        return self._split(self.to_k(context)), self._split(self.to_v(context))

    def forward(self, x: Tensor, keys_values: KeysValues | None = None) -> Tensor:
        """[B, L, C] -> [B, L, C]; without `keys_values`, self-attention."""
        keys, values = self.keys_values(x) if keys_values is None else keys_values
        y = attend(self._split(self.to_q(x)), keys, values)
        out: Tensor = self.to_out[0](y.transpose(1, 2).flatten(2))
        return out


class GEGLU(nn.Module):
    """A linear layer gated by the GELU of another (Shazeer 2020). [B, L, d_in] -> [B, L, d_out]"""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(d_in, 2 * d_out)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, d_in] -> [B, L, d_out]"""
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """[B, L, C] -> [B, L, C]; checkpoints number its parts 0 and 2, with a dropout between."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, C] -> [B, L, C]"""
        y: Tensor = self.net(x)
        return y


class TransformerBlock(nn.Module):
    """Attention among the pixels, attention to the text, feed-forward; each pre-normed and residual.

    only_text: the first attention, too, is to the text.
    """

    def __init__(self, dim: int, context_dim: int, heads: int, *, only_text: bool = False) -> None:
        super().__init__()
        self.only_text = only_text
        self.norm1, self.attn1 = nn.LayerNorm(dim), Attention(dim, context_dim if only_text else dim, heads)
        self.norm2, self.attn2 = nn.LayerNorm(dim), Attention(dim, context_dim, heads)
        self.norm3, self.ff = nn.LayerNorm(dim), FeedForward(dim)

    def keys_values(self, context: Tensor) -> TextKeysValues:
        """What is attended to in the text [B, T, D]."""
        return self.attn1.keys_values(context) if self.only_text else None, self.attn2.keys_values(context)

    def forward(self, x: Tensor, text: TextKeysValues) -> Tensor:
        """x [B, L, C], the text's keys and values -> [B, L, C]"""
        x = x + self.attn1(self.norm1(x), text[0])
        x = x + self.attn2(self.norm2(x), text[1])
        y: Tensor = x + self.ff(self.norm3(x))
        return y


class SpatialTransformer(nn.Module):
    """TransformerBlocks over the pixels of a feature map. [B, C, H, W] -> [B, C, H, W]"""

    def __init__(
        self, dim: int, context_dim: int, heads: int, depth: int, *, groups: int, linear: bool, only_text: bool = False
    ) -> None:
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(groups, dim, eps=1e-6)
        self.proj_in = nn.Linear(dim, dim) if linear else nn.Conv2d(dim, dim, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(dim, context_dim, heads, only_text=only_text) for _ in range(depth)
        )
        self.proj_out = nn.Linear(dim, dim) if linear else nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, text: Sequence[TextKeysValues]) -> Tensor:
        """x [B, C, H, W], text: one entry a block -> [B, C, H, W]"""
        height, width = x.shape[-2:]
        y = self.norm(x)
        y = self.proj_in(to_tokens(y)) if self.linear else to_tokens(self.proj_in(y))
        for block, keys_values in zip(self.transformer_blocks, text, strict=True):
            y = block(y, keys_values)
        y = to_map(self.proj_out(y), height, width) if self.linear else self.proj_out(to_map(y, height, width))
        return x + y


class Downsample(nn.Module):
    """Half the resolution by a strided convolution. [B, C, H, W] -> [B, C, ceil(H/2), ceil(W/2)]

    padded: pad right and bottom only, as the autoencoders of Rombach et al. were trained; then floor(H/2).
    """

    def __init__(self, dim: int, *, padded: bool = False) -> None:
        super().__init__()
        self.padded = padded
        self.conv = nn.Conv2d(dim, dim, 3, stride=2, padding=0 if padded else 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H/2, W/2]"""
        y: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)) if self.padded else x)
        return y


class Upsample(nn.Module):
    """Nearest neighbour, then a convolution. [B, C, h, w] -> [B, C, *size]"""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """size: (H, W) of the result; without it, twice that of x."""
        height, width = size or (2 * x.shape[-2], 2 * x.shape[-1])
        y: Tensor = self.conv(F.interpolate(x, size=(height, width), mode="nearest"))
        return y
