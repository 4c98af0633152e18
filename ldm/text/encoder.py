"""Prompts -> what the denoiser is conditioned on."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.errors import UsageError
from ldm.models.clip import CLIPTextModel
from ldm.text.tokenizer import CLIPTokenizer
from ldm.text.weighting import Piece, chunks


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

    def padded(self, tokens: int, empty: "Conditioning") -> "Conditioning":
        """With the states of `empty`, [1, T', D], behind its own until there are `tokens`. UsageError where they do not
        come out even.
        """
        times, rest = divmod(tokens - self.context.shape[1], empty.context.shape[1])
        if times < 0 or rest:
            shape = list(self.context.shape)
            fault = f"embeddings of shape {shape} with others of {[shape[0], tokens, shape[2]]}"
            raise UsageError(f"{fault}; give equal ones")
        more = empty.context.expand(len(self), -1, -1)
        return Conditioning(torch.cat([self.context, *[more] * times], 1), self.pooled)

    @staticmethod
    def cat(parts: Sequence["Conditioning"]) -> "Conditioning":
        """One batch of several, in order. UsageError unless all or none of them have a pooled vector."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        if len(pooled) not in (0, len(parts)):
            raise UsageError(f"{len(pooled)} of {len(parts)} conditionings have a pooled vector; all or none may")
        return Conditioning(torch.cat([part.context for part in parts]), torch.cat(pooled) if pooled else None)


def emphasised(states: Tensor, weights: Sequence[float]) -> Tensor:
    """States [1, T, D] times a weight for each token, and then all by one number, so that their mean is what it was:
    A1111's emphasis "Original". Computed in float32.

    Where the means of the tokens have different signs and all but cancel, as in some models of SDXL's kind, that number
    is anything; A1111 then draws artefacts (stable-diffusion-webui, pull request 14874). It is left out where it is
    none that means of one sign could give: where the mean has changed by more than the least or the greatest weight.
    """
    if all(weight == 1 for weight in weights):
        return states
    plain = states.float()
    scaled = plain * torch.tensor(weights, device=states.device)[:, None]
    before, after = float(plain.mean()), float(scaled.mean())
    if before and min(weights) <= after / before <= max(weights):
        scaled *= before / after if after else 1.0
    return scaled.to(states.dtype)


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
        """Context [B, T, D] and pooled vectors [B, D'] of the prompts as they stand, in the model's type and on its
        device; T is the window, and what does not fit is not read.

        clip_skip, as in diffusers: None takes the last layer (penultimate: the one before it); k leaves out k layers
        more. The final norm is applied in either case, but for penultimate states. UsageError for no prompts at all, or
        a clip_skip beyond the layers.
        """
        # One prompt a call: matrix products sum in another order for another batch size, and an image may not depend
        # on its neighbours to the last bit.
        return self.states(prompts, clip_skip, 1)

    def states(self, prompts: Sequence[str], clip_skip: int | None = None, at_once: int | None = None) -> Conditioning:
        """The same with gradients, for training: so many prompts a call of the network, by default all, and then the
        last bits depend on the other prompts. Equal ones, such as the negative ones, are encoded once.
        """
        if not prompts:
            raise UsageError("no prompts; give at least one (it may be empty)")
        unique = list(dict.fromkeys(prompts))
        parts = [self._encode(ids, clip_skip) for ids in self.tokenizer(unique).ids.split(at_once or len(unique))]
        return Conditioning.cat(parts).select([unique.index(prompt) for prompt in prompts])

    @torch.no_grad()
    def read(self, pieces: Sequence[Piece], clip_skip: int | None = None) -> Conditioning:
        """Context [1, n T, D] of one prompt of any length and weights, in as many windows as it takes, and the pooled
        vector [1, D'] of the first. clip_skip as above.
        """
        windows = chunks(pieces, self._ids, self.room, self.tokenizer.comma_id)
        said = [self._encode(self.tokenizer.window([index for index, _ in chunk]), clip_skip) for chunk in windows]
        contexts = [
            emphasised(one.context, [1.0, *(weight for _, weight in chunk), *[1.0] * (self.room + 1 - len(chunk))])
            for one, chunk in zip(said, windows, strict=True)
        ]
        return Conditioning(torch.cat(contexts, 1), said[0].pooled)

    def _ids(self, text: str) -> list[tuple[int, ...]]:
        return [word.ids for word in self.tokenizer.words(text)]

    def _encode(self, ids: Tensor, clip_skip: int | None) -> Conditioning:
        """Windows of ids [B, T]."""
        skip = (clip_skip or 0) + self.penultimate
        context, pooled = self.model(ids.to(next(self.model.parameters()).device), skip=skip)
        if skip and not self.penultimate:
            context = self.model.text_model.final_layer_norm(context)
        return Conditioning(context, pooled)

    @property
    def room(self) -> int:
        """How many tokens of text fit beside the two that begin and end it."""
        return self.tokenizer.room

    @property
    def depth(self) -> int:
        """How many layers may be left out at most."""
        return self.model.config.num_hidden_layers - 1 - self.penultimate

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
        return _side_by_side([part(prompts, clip_skip) for part in self.parts])

    def states(self, prompts: Sequence[str], clip_skip: int | None = None) -> Conditioning:
        """The same with gradients, as of TextEncoder."""
        return _side_by_side([part.states(prompts, clip_skip) for part in self.parts])

    def read(self, pieces: Sequence[Piece], clip_skip: int | None = None) -> Conditioning:
        """Context [1, n T, D1 + D2 + ...] and pooled vector [1, D'] of one prompt; otherwise as TextEncoder."""
        said = [part.read(pieces, clip_skip) for part in self.parts]
        longest = max(one.context.shape[1] for one in said)
        for i, one in enumerate(said):
            if one.context.shape[1] < longest:  # where the tokenizers differ in more than their padding
                said[i] = one.padded(longest, self.parts[i]([""], clip_skip))
        return _side_by_side(said)

    @property
    def room(self) -> int:
        """The least of the parts' rooms."""
        return min(part.room for part in self.parts)

    @property
    def depth(self) -> int:
        """The least of the parts' depths."""
        return min(part.depth for part in self.parts)

    def dropped(self, prompts: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """For each prompt the words that a part does not see."""
        rows = zip(*(part.dropped(prompts) for part in self.parts), strict=True)
        return tuple(max(row, key=len) for row in rows)


def _side_by_side(said: Sequence[Conditioning]) -> Conditioning:
    """What several encoders say of the same prompts, as one."""
    return Conditioning(torch.cat([one.context for one in said], -1), said[-1].pooled)
