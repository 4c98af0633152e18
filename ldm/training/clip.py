"""The text encoder: a small CLIP (Radford et al. 2021), both towers trained contrastively on the corpus, the text tower
also to foretell the picture; it is then frozen.

Contrast alone asks of the words what tells one scene of a batch from another, which a bag of words does: which object
stands where need not be in it (Yuksekgonul et al. 2023, arXiv:2210.01936), nor what it looks like. So a denoiser of two
blocks reads the words too, and says what the first stage's latents are from noised ones. That is what the real denoiser
asks of the words, and it is learned here for a fraction of the cost.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from ldm.data.cache import of_networks
from ldm.data.emoji import EmojiScenes
from ldm.errors import UsageError
from ldm.models.clip import CLIPTextModel, CLIPVisionModel
from ldm.models.layers import TransformerBlock, to_map, to_tokens
from ldm.models.vae import AutoencoderKL, VAEConfig
from ldm.text.tokenizer import CLIPTokenizer
from ldm.training.config import ClipConfig
from ldm.training.first_stage import HELD_OUT_SEED, save_model, tile, to_signal, trained
from ldm.training.loop import RESULT, Batch, Stage, device_of, generator
from ldm.training.optimizers import Group

TOKENIZER_CAPTIONS = 20_000  # captions from which the vocabulary is learned
HELD_OUT_SCENES = 256
BLOCKS = 2  # of the denoiser that reads the words beside the image tower
LEAST_NOISE = 0.4  # of 1: where the words say little that the latents do not


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
    """What words and noised latents say of the picture: a denoiser of transformer blocks, a token for each place."""

    def __init__(self, channels: int, side: int, width: int, heads: int) -> None:
        super().__init__()
        self.places = nn.Embedding(side**2, width)
        self.seen = nn.Conv2d(channels + 1, width, 3, padding=1)
        self.blocks = nn.ModuleList(TransformerBlock(width, width, heads) for _ in range(BLOCKS))
        self.said = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, channels))
        nn.init.normal_(self.places.weight, std=0.1)

    def forward(self, x0: Tensor, noise: Tensor, share: Tensor, text: Tensor) -> Tensor:
        """What is said of x0 [B, C, H, W].

        x0, noise [B, C, H, W]; share [B] of noise, 0 none and 1 nothing else, on the circle that keeps the variance;
        text: hidden states of all tokens [B, T, D].
        """
        angle = (share * (math.pi / 2))[:, None, None, None]
        noised = angle.cos() * x0 + angle.sin() * noise
        told = torch.cat([noised, share[:, None, None, None].expand_as(noised[:, :1])], 1)
        x = to_tokens(self.seen(told)) + self.places.weight
        for block in self.blocks:
            assert isinstance(block, TransformerBlock)
            x = block(x, block.keys_values(text))
        return to_map(self.said(x), *x0.shape[2:])


class Towers(nn.Module):
    """Both towers, their temperature and the denoiser that reads the words: what the average is taken of."""

    def __init__(self, config: ClipConfig, latents: VAEConfig) -> None:
        super().__init__()
        self.text, self.vision = CLIPTextModel(config.text), CLIPVisionModel(config.vision)
        # Outside the text model: Stable Diffusion's encoder is CLIP's transformer without its projection.
        self.text_projection = nn.Linear(config.text.hidden_size, config.vision.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        side = config.corpus.size // latents.factor
        self.foretold = Foretold(
            latents.latent_channels, side, config.text.hidden_size, config.text.num_attention_heads
        )

    def forward(
        self, images: Tensor, ids: Tensor, x0: Tensor, noise: Tensor, share: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """images [B, 3, S, S] in [-1, 1], ids [B, T], the others as in Foretold -> unit vectors of images and of texts,
        each [B, D], and the mean squared error of what is foretold.
        """
        hidden, pooled = self.text(ids)
        texts, pictures = self.text_projection(pooled), self.vision(images)
        error = (self.foretold(x0, noise, share, hidden) - x0).square().mean()
        return pictures / pictures.norm(dim=-1, keepdim=True), texts / texts.norm(dim=-1, keepdim=True), error

    def scale(self) -> Tensor:
        """What similarities are multiplied with, at most 100 (sec. 2.5 there)."""
        return self.logit_scale.clamp(max=np.log(100)).exp()


class Contrastive(nn.Module):
    """Symmetric cross-entropy of the similarities of a batch, in which pairs with equal captions count as matches of
    each other, and the error of what the words foretell.
    """

    def __init__(self, config: ClipConfig, vae: AutoencoderKL) -> None:
        super().__init__()
        self.towers, self.config = Towers(config, vae.config), config
        self.vae = vae.requires_grad_(False)

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        images, ids = batch
        signal, numbers = to_signal(images), generator(self.config.loop.seed, step)
        x0 = self.vae.encode(signal)
        noise = torch.randn(x0.shape, generator=numbers).to(x0.device)
        share = LEAST_NOISE + (1 - LEAST_NOISE) * torch.rand(len(x0), generator=numbers).to(x0.device)
        pictures, texts, error = self.towers(signal, ids, x0, noise, share)
        with torch.autocast(signal.device.type, enabled=False):  # 8 bits would not tell similar pictures apart
            similar = self.towers.scale() * pictures.float() @ texts.float().T
        same = (ids[:, None] == ids[None]).all(-1).float()
        wanted = same / same.sum(1, keepdim=True)
        loss = sum(nn.functional.cross_entropy(logits, wanted) for logits in (similar, similar.T)) / 2
        right = same.gather(1, similar.argmax(1, keepdim=True)).mean()
        figures = {"retrieval": right.detach(), "foretold": error.detach()}
        return loss + self.config.foretold_weight * error, figures


def learn_tokenizer(scenes: EmojiScenes, config: ClipConfig) -> CLIPTokenizer:
    """A byte-level BPE in CLIP's form, learned from the corpus's captions. UsageError: too large for the encoder."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would not survive the fork of the workers
    specs = map(scenes.training_spec, range(TOKENIZER_CAPTIONS))
    captions = [spec.said(dice, scenes.synonyms) for spec, dice in specs]  # as `scene` says them, without drawing
    tokenizer = CLIPTokenizer.train(captions, config.vocab_size, config.text.max_position_embeddings)
    if len(tokenizer.vocab) > config.text.vocab_size:
        raise UsageError(
            f"the captions make {len(tokenizer.vocab)} tokens, and text.vocab_size is {config.text.vocab_size}; raise "
            "it, or lower vocab_size"
        )
    return tokenizer


def clip(config: ClipConfig) -> Stage:
    """The stage of a configuration. Its result holds `tokenizer/`, `text_encoder/` (frozen from here on) and
    `image_encoder/`.
    """
    torch.manual_seed(config.loop.seed)
    scenes = EmojiScenes(config.corpus, config.loop.seed)
    tokenizer = learn_tokenizer(scenes, config)
    vae = trained(Path(config.first_stage), "AutoencoderKL")
    assert isinstance(vae, AutoencoderKL)
    objective, base = Contrastive(config, vae), of_networks({"vae": vae})
    objective.vae.to(device_of(config.loop.device, config.loop.threads))
    images, ids = CaptionedBatches(EmojiScenes(config.corpus, HELD_OUT_SEED), tokenizer, HELD_OUT_SCENES)[0]

    x0 = vae.encode(to_signal(images.to(next(vae.parameters()).device))).cpu()
    noise = torch.randn(x0.shape, generator=generator(HELD_OUT_SEED, 0))
    share = torch.linspace(LEAST_NOISE, 1, HELD_OUT_SCENES)

    @torch.inference_mode()
    def similarities(towers: nn.Module) -> tuple[Tensor, float]:
        device = next(towers.parameters()).device
        pictures, texts, error = towers(*(v.to(device) for v in (to_signal(images), ids, x0, noise, share)))
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
    tables = [part.weight for part in objective.modules() if isinstance(part, nn.Embedding)]
    others = [p for p in objective.towers.parameters() if all(p is not table for table in tables)]
    rate = config.loop.learning_rate
    groups = (Group(others, rate), Group(tables, rate, orthogonal=False))
    return Stage(objective, objective.towers, batches, held_out, picture, export, groups, base=base)
