"""The text encoder: a small CLIP (Radford et al. 2021), both towers trained contrastively on the corpus, the text tower
also to foretell the picture; it is then frozen.

Contrast alone asks of the words what tells one scene of a batch from another, which a bag of words does: which object
stands where need not be in it (Yuksekgonul et al. 2023, arXiv:2210.01936). So each place of the picture also reads the
text once, by cross-attention, and says what is there. That is what the denoiser asks of the words at its noisiest, and
it is learned here for a fraction of the cost.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from ldm.data.emoji import EmojiScenes
from ldm.models.clip import CLIPTextModel, CLIPVisionModel
from ldm.models.layers import Attention
from ldm.text.tokenizer import CLIPTokenizer
from ldm.training.config import ClipConfig
from ldm.training.first_stage import HELD_OUT_SEED, save_model, tile, to_signal
from ldm.training.loop import RESULT, Batch, Stage

TOKENIZER_CAPTIONS = 20_000  # captions from which the vocabulary is learned
HELD_OUT_SCENES = 256
PLACES, PIXELS = 8, 4  # along one side: places of a foretold picture, and its pixels of each


class CaptionedBatches(Dataset[Batch]):
    """Batch i of a corpus: images uint8 [B, 3, S, S] and caption token ids int64 [B, T] of scenes i B ... i B + B -
    1.
    """

    def __init__(self, scenes: EmojiScenes, tokenizer: CLIPTokenizer, batch_size: int) -> None:
        self.scenes, self.tokenizer, self.batch_size = scenes, tokenizer, batch_size

    def __getitem__(self, index: int) -> Batch:
        first = index * self.batch_size
        images, captions = zip(*(self.scenes[first + i] for i in range(self.batch_size)), strict=True)
        return torch.from_numpy(np.stack(images)), self.tokenizer(list(captions)).ids


class Foretold(nn.Module):
    """What a text says of the picture, place by place: [B, T, D] -> [B, 3, S, S] for S = PLACES * PIXELS."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(PLACES**2, width) * 0.1)
        self.attention = Attention(width, width, heads)
        self.said = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, 3 * PIXELS**2)
        )

    def forward(self, text: Tensor) -> Tensor:
        """Hidden states of a text, all of its tokens, to the mean of the pictures that it may mean."""
        asked = self.places.expand(len(text), -1, -1)
        heard = self.attention(asked, self.attention.keys_values(text))
        blocks: Tensor = nn.functional.pixel_shuffle(self.said(heard).mT.unflatten(2, (PLACES, PLACES)), PIXELS)
        return blocks


class Towers(nn.Module):
    """Both towers and their temperature: what the average is taken of."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.text, self.vision = CLIPTextModel(config.text), CLIPVisionModel(config.vision)
        # Outside the text model: Stable Diffusion's encoder is CLIP's transformer without its projection.
        self.text_projection = nn.Linear(config.text.hidden_size, config.vision.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        self.foretold = Foretold(config.text.hidden_size, config.text.num_attention_heads)

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """images [B, 3, S, S] in [-1, 1], ids [B, T] -> unit vectors of images and of texts, each [B, D], and the mean
        squared error of the foretold pictures.
        """
        hidden, pooled = self.text(ids)
        texts, pictures = self.text_projection(pooled), self.vision(images)
        foretold = self.foretold(hidden)
        error = (foretold - nn.functional.adaptive_avg_pool2d(images, foretold.shape[-1])).square().mean()
        return pictures / pictures.norm(dim=-1, keepdim=True), texts / texts.norm(dim=-1, keepdim=True), error

    def scale(self) -> Tensor:
        """What similarities are multiplied with, at most 100 (sec. 2.5 there)."""
        return self.logit_scale.clamp(max=np.log(100)).exp()


class Contrastive(nn.Module):
    """Symmetric cross-entropy of the similarities of a batch, in which pairs with equal captions count as matches of
    each other, and the error of the foretold pictures.
    """

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.towers, self.weight = Towers(config), config.foretold_weight

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        images, ids = batch
        pictures, texts, error = self.towers(to_signal(images), ids)
        similar = self.towers.scale() * pictures @ texts.T
        same = (ids[:, None] == ids[None]).all(-1).float()
        wanted = same / same.sum(1, keepdim=True)
        loss = sum(nn.functional.cross_entropy(logits, wanted) for logits in (similar, similar.T)) / 2
        right = same.gather(1, similar.argmax(1, keepdim=True)).mean()
        return loss + self.weight * error, {"retrieval": right.detach(), "foretold": error.detach()}


def learn_tokenizer(scenes: EmojiScenes, config: ClipConfig) -> CLIPTokenizer:
    """A byte-level BPE in CLIP's form, learned from the corpus's captions."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would not survive the fork of the workers
    specs = map(scenes.training_spec, range(TOKENIZER_CAPTIONS))
    captions = [spec.said(dice, scenes.synonyms) for spec, dice in specs]  # as `scene` says them, without drawing
    return CLIPTokenizer.train(captions, config.vocab_size, config.text.max_position_embeddings)


def clip(config: ClipConfig) -> Stage:
    """The stage of a configuration. Its result holds `tokenizer/`, `text_encoder/` (frozen from here on) and
    `image_encoder/`.
    """
    torch.manual_seed(config.loop.seed)
    scenes = EmojiScenes(config.corpus, config.loop.seed)
    tokenizer = learn_tokenizer(scenes, config)
    objective = Contrastive(config)
    images, ids = CaptionedBatches(EmojiScenes(config.corpus, HELD_OUT_SEED), tokenizer, HELD_OUT_SCENES)[0]

    @torch.inference_mode()
    def similarities(towers: nn.Module) -> tuple[Tensor, float]:
        device = next(towers.parameters()).device
        pictures, texts, error = towers(to_signal(images).to(device), ids.to(device))
        return torch.mm(texts, pictures.T).cpu(), float(error)

    def held_out(towers: nn.Module) -> dict[str, float]:
        similar, error = similarities(towers)
        same = (ids[:, None] == ids[None]).all(-1)
        assert isinstance(towers, Towers)
        scaled = similar * float(towers.scale())
        loss = nn.functional.cross_entropy(scaled, same.float() / same.sum(1, keepdim=True))
        retrieval = float(same.gather(1, similar.argmax(1, keepdim=True)).float().mean())
        return {"loss": float(loss), "retrieval": retrieval, "foretold": error}

    def picture(towers: nn.Module) -> Image.Image:
        best = similarities(towers)[0][:12].topk(7).indices  # each row: the scene itself, then what its caption finds
        shown = torch.cat([torch.arange(12)[:, None], best], 1).flatten()
        return tile(to_signal(images)[shown], 8)

    def export(towers: nn.Module, folder: Path) -> None:
        assert isinstance(towers, Towers)
        ends: Sequence[tuple[nn.Module, dict[str, object], str]] = (
            (towers.text, config.text.to_dict(), "text_encoder"),
            (towers.vision, config.vision.to_dict(), "image_encoder"),
        )
        for model, described, name in ends:
            save_model(model, described, folder / RESULT / name, "model.safetensors")
        tokenizer.save(folder / RESULT / "tokenizer")

    batches = CaptionedBatches(scenes, tokenizer, config.loop.batch_size)
    return Stage(objective, objective.towers, batches, held_out, picture, export)
