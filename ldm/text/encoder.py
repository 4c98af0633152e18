"""Prompts -> what the denoiser is conditioned on."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.errors import UsageError
from ldm.models.clip import CLIPTextModel
from ldm.text.tokenizer import CLIPTokenizer


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What the text encoders say of a batch of prompts.

    context: hidden states [B, T, D], to which the denoiser attends. pooled: one vector a prompt [B, D'], for SDXL.
    """

    context: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.context)

    def select(self, indices: slice | Sequence[int]) -> "Conditioning":
        """The prompts at `indices`, in that order."""
        chosen = indices if isinstance(indices, slice) else list(indices)
        return Conditioning(self.context[chosen], None if self.pooled is None else self.pooled[chosen])

    def repeat(self, n: int) -> "Conditioning":
        """Every prompt n times in a row: [B, ...] -> [B * n, ...]."""
        return self.select([i for i in range(len(self)) for _ in range(n)])

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "Conditioning":
        """The same on another device or in another type."""
        pooled = None if self.pooled is None else self.pooled.to(device, dtype)
        return Conditioning(self.context.to(device, dtype), pooled)

    @staticmethod
    def cat(parts: Sequence["Conditioning"]) -> "Conditioning":
        """One batch of several, in order. UsageError unless all or none of them have a pooled vector."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        if len(pooled) not in (0, len(parts)):
            raise UsageError(f"{len(pooled)} of {len(parts)} conditionings have a pooled vector; all or none may")
        return Conditioning(torch.cat([part.context for part in parts]), torch.cat(pooled) if pooled else None)


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """A tokenizer and the CLIP text model that goes with it.

    penultimate: SDXL's way; the states before the last layer, without the final norm.
    """

    tokenizer: CLIPTokenizer
    model: CLIPTextModel
    penultimate: bool = False

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], clip_skip: int | None = None) -> Conditioning:
        """Context [B, T, D] and pooled vectors [B, D'] of the prompts, in the model's type and on its device.

        clip_skip, as in diffusers: None takes the last layer (penultimate: the one before it); k leaves out k layers
        more. The final norm is applied in either case, but for penultimate states. UsageError for no prompts at all, or
        a clip_skip beyond the layers.
        """
        if not prompts:
            raise UsageError("no prompts; give at least one (it may be empty)")
        unique = list(dict.fromkeys(prompts))
        device = next(self.model.parameters()).device
        # One prompt a call: matrix products sum in another order for another batch size, and an image may not depend
        # on its neighbours to the last bit. Equal prompts, such as the negative ones, are encoded once.
        skip = (clip_skip or 0) + self.penultimate
        parts = [self._encode(row[None].to(device), skip) for row in self.tokenizer(unique).ids]
        return Conditioning.cat(parts).select([unique.index(prompt) for prompt in prompts])

    def _encode(self, ids: Tensor, skip: int) -> Conditioning:
        context, pooled = self.model(ids, skip=skip)
        if skip and not self.penultimate:
            context = self.model.text_model.final_layer_norm(context)
        return Conditioning(context, pooled)

    @property
    def room(self) -> int:
        """How many tokens of text fit beside the two that begin and end it."""
        return self.tokenizer.max_length - 2

    def dropped(self, prompts: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """For each prompt the words beyond the window, which the model does not see; () where all of it fits."""
        return self.tokenizer(prompts).dropped


@dataclass(frozen=True, eq=False)
class JoinedEncoders:
    """Several text encoders that read the same prompt, as in SDXL (Podell et al. 2023, sec. 2.1): their states side by
    side, and the pooled vector of the last.
    """

    parts: tuple[TextEncoder, ...]

    def __call__(self, prompts: Sequence[str], clip_skip: int | None = None) -> Conditioning:
        """Context [B, T, D1 + D2 + ...] and pooled vectors [B, D']; otherwise as TextEncoder."""
        said = [part(prompts, clip_skip) for part in self.parts]
        return Conditioning(torch.cat([one.context for one in said], -1), said[-1].pooled)

    @property
    def room(self) -> int:
        """The least of the parts' rooms."""
        return min(part.room for part in self.parts)

    def dropped(self, prompts: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """For each prompt the words that a part does not see."""
        rows = zip(*(part.dropped(prompts) for part in self.parts), strict=True)
        return tuple(max(row, key=len) for row in rows)
