"""CLIP's text and image transformers (Radford et al. 2021, sec. 2.4).

Attribute names are the key names of transformers' checkpoints ("text_model." and "vision_model." form).
Shapes: B batch, T tokens, D hidden width, D' projection width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import ModelError, UsageError
from ldm.models.config import divisible, refuse_unmodelled, take_all
from ldm.models.layers import attend


def quick_gelu(x: Tensor) -> Tensor:
    """The sigmoid approximation of GELU (Hendrycks & Gimpel 2016, sec. 2) that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}
TEXT_ABSENT: dict[str, object] = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "projection_dim": 512,
    "eos_token_id": 49407,
}
"""What transformers takes for a field that config.json lacks, where that is not the default here."""


@dataclass(frozen=True)
class CLIPTextConfig:
    """Shape of a CLIP text transformer; the defaults are CLIP ViT-L/14's, as in Stable Diffusion 1.

    Field names and meanings are transformers'. projection_dim: width of the pooled vector's projection, 0 for none.
    eos_token_id: the token whose place is pooled; 2 stands for "the largest id", as in configs of before 2023.
    Raises ModelError for an unknown hidden_act or a width that does not divide into heads.
    """

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 0
    eos_token_id: int = 2

    def __post_init__(self) -> None:
        _check("CLIP text config", self.hidden_size, self.num_attention_heads, self.hidden_act)

    @classmethod
    def from_dict(cls, config: Mapping[str, object]) -> CLIPTextConfig:
        """Reads transformers' `text_encoder/config.json`. ModelError for any setting whose numbers would not be ours.

        The projection is there only when `architectures` names CLIPTextModelWithProjection.
        """
        kind = "CLIP text config"
        fixed = {"model_type": ("clip_text_model",), "use_attention_mask": (None, False)}
        refuse_unmodelled(kind, config, fixed, frozenset(config))
        projected = "CLIPTextModelWithProjection" in str(config.get("architectures"))
        values = take_all(kind, config, cls(), TEXT_ABSENT)
        return cls(**values | ({} if projected else {"projection_dim": 0}))

    def to_dict(self) -> dict[str, object]:
        """The `config.json` with which stock transformers builds the same network."""
        architecture = "CLIPTextModelWithProjection" if self.projection_dim else "CLIPTextModel"
        return vars(self) | {
            "architectures": [architecture],
            "model_type": "clip_text_model",
            "dtype": "float32",  # transformers else takes that of the files, float16, beside diffusers' float32 U-Net
            "projection_dim": self.projection_dim or self.hidden_size,
        }


@dataclass(frozen=True)
class CLIPVisionConfig:
    """Shape of a CLIP image transformer; the defaults are transformers' (ViT-B/32), whose field names these are.

    image_size, patch_size: pixels along a side. Raises ModelError when one does not divide into the other.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _check("CLIP vision config", self.hidden_size, self.num_attention_heads, self.hidden_act)
        divisible("CLIP vision config", (self.image_size,), (self.patch_size,), "pixels a patch")

    @classmethod
    def from_dict(cls, config: Mapping[str, object]) -> CLIPVisionConfig:
        """Reads transformers' `image_encoder/config.json`. ModelError for settings whose numbers would not be ours."""
        kind = "CLIP vision config"
        refuse_unmodelled(kind, config, {"model_type": ("clip_vision_model",)}, frozenset(config))
        return cls(**take_all(kind, config, cls(), {}))

    def to_dict(self) -> dict[str, object]:
        """The `config.json` with which stock transformers builds the same network."""
        return vars(self) | {"architectures": ["CLIPVisionModelWithProjection"], "model_type": "clip_vision_model"}


def _check(kind: str, width: int, heads: int, act: str) -> None:
    divisible(kind, (width,), (heads,), "heads")
    if act not in ACTIVATIONS:
        raise ModelError(f"{kind}: hidden_act = {act!r} is not supported, only {' or '.join(map(repr, ACTIVATIONS))}")


class Attention(nn.Module):
    """Multi-head self-attention; causal: a token sees only itself and those before it. [B, T, D] -> [B, T, D]"""

    def __init__(self, dim: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]"""
        q, k, v = (
            project(x).reshape(*x.shape[:-1], self.heads, -1).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = attend(q, k, v, causal=self.causal)
        out: Tensor = self.out_proj(y.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    """[B, T, D] -> [B, T, D]"""

    def __init__(self, dim: int, hidden: int, act: str) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.act = ACTIVATIONS[act]

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]"""
        y: Tensor = self.fc2(self.act(self.fc1(x)))
        return y


class Layer(nn.Module):
    """A pre-norm transformer layer. [B, T, D] -> [B, T, D]"""

    def __init__(self, c: CLIPTextConfig | CLIPVisionConfig, causal: bool) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.self_attn = Attention(c.hidden_size, c.num_attention_heads, causal)
        self.layer_norm2 = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.mlp = MLP(c.hidden_size, c.intermediate_size, c.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]"""
        x = x + self.self_attn(self.layer_norm1(x))
        y: Tensor = x + self.mlp(self.layer_norm2(x))
        return y


class Encoder(nn.Module):
    """The stack of layers that both towers share. [B, T, D] -> the states before and after every layer."""

    def __init__(self, c: CLIPTextConfig | CLIPVisionConfig, causal: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(c, causal) for _ in range(c.num_hidden_layers))

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, T, D] -> num_hidden_layers + 1 of [B, T, D]"""
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return states


class TextEmbeddings(nn.Module):
    """Token plus position. ids [B, T] -> [B, T, D]"""

    def __init__(self, c: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(c.vocab_size, c.hidden_size)
        self.position_embedding = nn.Embedding(c.max_position_embeddings, c.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, T] -> [B, T, D]. UsageError when T exceeds the window."""
        length, window = ids.shape[1], self.position_embedding.num_embeddings
        if length > window:
            raise UsageError(f"{length} tokens; the text encoder takes at most {window}; shorten the prompt")
        tokens: Tensor = self.token_embedding(ids)
        return tokens + self.position_embedding.weight[:length]


class TextTower(nn.Module):
    """The parts of the text transformer, under the name checkpoints give them; CLIPTextModel runs them."""

    def __init__(self, c: CLIPTextConfig) -> None:
        super().__init__()
        self.embeddings = TextEmbeddings(c)
        self.encoder = Encoder(c, causal=True)
        self.final_layer_norm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)


class CLIPTextModel(nn.Module):
    """Token ids -> hidden states for cross-attention and one pooled vector a prompt."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = TextTower(config)
        width = config.projection_dim
        self.text_projection = nn.Linear(config.hidden_size, width, bias=False) if width else None
        _init(self, config)

    def forward(self, ids: Tensor, skip: int = 0) -> tuple[Tensor, Tensor]:
        """ids [B, T] -> hidden states [B, T, D] and pooled vectors [B, D'] (D without a projection).

        skip: how many of the last layers the hidden states leave out. 0 is normalised by `text_model.final_layer_norm`
        (Stable Diffusion 1); above 0 is raw (1 is SDXL's), and the caller normalises where a model wants that.
        pooled: always of the last layer, normalised, at the end-of-text token, projected if there is a projection.
        """
        layers = self.config.num_hidden_layers
        if not 0 <= skip < layers:
            raise UsageError(f"clip_skip {skip} of a text encoder of {layers} layers; choose 0 to {layers - 1}")
        states = self.text_model.encoder(self.text_model.embeddings(ids))
        last: Tensor = self.text_model.final_layer_norm(states[-1])
        legacy = self.config.eos_token_id == 2
        end = ids.argmax(-1) if legacy else (ids == self.config.eos_token_id).int().argmax(-1)
        pooled = last[torch.arange(len(ids), device=ids.device), end]
        if self.text_projection is not None:
            pooled = self.text_projection(pooled)
        return (last if skip == 0 else states[-1 - skip]), pooled


class VisionEmbeddings(nn.Module):
    """A class token and one token a patch, plus position. [B, 3, H, W] -> [B, 1 + patches, D]"""

    def __init__(self, c: CLIPVisionConfig) -> None:
        super().__init__()
        patch, patches = c.patch_size, (c.image_size // c.patch_size) ** 2
        self.class_embedding = nn.Parameter(torch.empty(c.hidden_size).normal_(std=c.hidden_size**-0.5))
        self.patch_embedding = nn.Conv2d(c.num_channels, c.hidden_size, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding(patches + 1, c.hidden_size)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 1 + patches, D]"""
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.expand(len(images), 1, -1), patches], dim=1)
        return tokens + self.position_embedding.weight


class VisionTower(nn.Module):
    """The parts of the image transformer, under the name checkpoints give them. [B, 3, H, W] -> [B, D]"""

    def __init__(self, c: CLIPVisionConfig) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(c)
        self.pre_layrnorm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)  # transformers' spelling
        self.encoder = Encoder(c, causal=False)
        self.post_layernorm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> the class token [B, D]"""
        states = self.encoder(self.pre_layrnorm(self.embeddings(images)))
        y: Tensor = self.post_layernorm(states[-1][:, 0])
        return y


class CLIPVisionModel(nn.Module):
    """Images -> vectors in the space of the projected text vectors."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = VisionTower(config)
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        _init(self, config)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, image_size, image_size] -> [B, D'], any length. UsageError for another size."""
        side = self.config.image_size
        if images.shape[-2:] != (side, side):
            height, width = images.shape[-2:]
            raise UsageError(f"image of {height} x {width} pixels; the encoder takes {side} x {side}; resize it")
        y: Tensor = self.visual_projection(self.vision_model(images))
        return y


def _init(model: nn.Module, c: CLIPTextConfig | CLIPVisionConfig) -> None:
    """CLIP's initialisation: what feeds the residual stream shrinks with its depth (Radford et al. 2019, sec. 2.3)."""
    wide, deep = c.hidden_size**-0.5, (2 * c.num_hidden_layers) ** -0.5
    stds = {"q_proj": wide, "k_proj": wide, "v_proj": wide, "out_proj": wide * deep, "fc1": wide * 0.5**0.5}
    stds |= {"fc2": wide * deep, "text_projection": wide, "visual_projection": wide}
    for name, part in model.named_modules():
        if isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=0.02)
        elif isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=stds[name.rpartition(".")[2]])
            if part.bias is not None:
                nn.init.zeros_(part.bias)
