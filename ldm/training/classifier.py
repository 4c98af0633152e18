"""The network that pictures are compared by: it learns to say what scenes of the corpus show (`ldm.models.classifier`).

Which objects are there is asked by a softmax over all of them whose target is 1 / k for each of the k that are, which
learns many rare labels sooner than a sigmoid for each (Mahajan et al. 2018, arXiv:1805.00932, sec. 2.2).
"""

import copy
import dataclasses
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from ldm.checkpoints.safe import write_manifest
from ldm.data.emoji import CorpusConfig, EmojiScenes, Scene
from ldm.data.glyphs import COLOURED_SHAPES, COLOURS
from ldm.data.words import COUNTS
from ldm.evaluation.features import CLASSIFIER
from ldm.models.classifier import Said, SceneClassifier, SceneClassifierConfig
from ldm.training.config import LoopConfig
from ldm.training.first_stage import HELD_OUT_SEED, save_model, tile, to_signal
from ldm.training.loop import RESULT, Batch, Stage

HELD_OUT_SCENES = 512
ROWS, COLUMNS = 8, 8  # of the sample picture


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """`ldm train classifier`: the features that pictures are compared by. Its labels are the corpus' own."""

    loop: LoopConfig
    corpus: CorpusConfig = dataclasses.field(default_factory=CorpusConfig)
    block_out_channels: tuple[int, ...] = SceneClassifierConfig.block_out_channels
    features: int = SceneClassifierConfig.features
    norm_num_groups: int = SceneClassifierConfig.norm_num_groups
    weights: str = ""  # model folder that it is put into, as classifier/, when the run ends; "" = only into `out`


class LabelledBatches(Dataset[Batch]):
    """Batch i of a corpus: images uint8 [B, 3, S, S] of scenes i B ... i B + B - 1, and what `labels` says of them."""

    def __init__(self, scenes: EmojiScenes, config: SceneClassifierConfig, batch_size: int) -> None:
        self.scenes, self.config, self.batch_size = scenes, config, batch_size

    def __getitem__(self, index: int) -> Batch:
        first = index * self.batch_size
        scenes = [self.scenes.scene(first + i) for i in range(self.batch_size)]
        images = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2)
        return images, *labels(scenes, self.config)


def labels(scenes: list[Scene], config: SceneClassifierConfig) -> tuple[Tensor, Tensor, Tensor]:
    """What scenes show: bool [B, objects] which are there, int64 [B] the background, int64 [B] how many, less one."""
    places = {name: i for i, name in enumerate(config.objects)}
    there = torch.zeros(len(scenes), len(places), dtype=torch.bool)
    for row, scene in zip(there, scenes, strict=True):
        row[[places[name] for name in scene.names]] = True
    ground = torch.tensor([config.backgrounds.index(scene.spec.background) for scene in scenes])
    return there, ground, torch.tensor([len(scene.names) - 1 for scene in scenes])


def loss_of(said: Said, there: Tensor, ground: Tensor, count: Tensor) -> Tensor:
    """The sum of the cross-entropies of the three questions, each a mean over the batch."""
    wanted = there / there.sum(1, keepdim=True)
    objects = F.cross_entropy(said.objects, wanted)
    return objects + F.cross_entropy(said.background, ground) + F.cross_entropy(said.number, count)


def right(said: Said, there: Tensor, ground: Tensor, count: Tensor) -> dict[str, Tensor]:
    """Shares of pictures [] of which it says what is true: all of the k objects are its k likeliest, and so on."""
    k = there.sum(1, keepdim=True)
    least = said.objects.sort(1, descending=True).values.gather(1, k - 1)  # the k-th likeliest
    objects = ((said.objects >= least) == there).all(1)
    rows = {
        "objects": objects,
        "background": said.background.argmax(1) == ground,
        "count": said.number.argmax(1) == count,
    }
    return {name: row.float().mean() for name, row in rows.items()}


class Classification(nn.Module):
    """The loss of a batch, and the shares of its pictures that are understood."""

    def __init__(self, config: SceneClassifierConfig) -> None:
        super().__init__()
        self.classifier = SceneClassifier(config)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it

    def forward(self, batch: Batch, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of `LabelledBatches[number]`, and figures."""
        images, *truth = batch
        said = self.classifier(to_signal(images))
        return loss_of(said, *truth), {name: share.detach() for name, share in right(said, *truth).items()}


def classifier(config: ClassifierConfig) -> Stage:
    """The stage of a configuration. Its result holds config.json, which names the labels, and model.safetensors, in
    float16.
    """
    torch.manual_seed(config.loop.seed)
    scenes = EmojiScenes(config.corpus, config.loop.seed)
    shape = SceneClassifierConfig(
        (*scenes.names, *COLOURED_SHAPES), tuple(COLOURS), max(COUNTS), config.corpus.size, config.block_out_channels,
        config.features, config.norm_num_groups,
    )  # fmt: skip
    objective = Classification(shape)
    images, *truth = LabelledBatches(EmojiScenes(config.corpus, HELD_OUT_SEED), shape, HELD_OUT_SCENES)[0]
    fixed = to_signal(images)

    @torch.inference_mode()
    def held_out(network: nn.Module) -> dict[str, float]:
        device = next(network.parameters()).device
        parts = [network(part.to(device)) for part in fixed.split(64)]
        said = Said(*(torch.cat(logits).cpu() for logits in zip(*parts, strict=True)))
        figures = {"loss": loss_of(said, *truth), **right(said, *truth)}
        return {name: float(value) for name, value in figures.items()}

    @torch.inference_mode()
    def picture(network: nn.Module) -> Image.Image:
        assert isinstance(network, SceneClassifier)
        device = next(network.parameters()).device
        found = torch.cat([network.features(part.to(device)).cpu() for part in fixed.split(64)])
        order = torch.cdist(found[:ROWS], found).argsort(1)[:, :COLUMNS]  # each row: a scene, then those like it
        return tile(fixed[order.flatten()], COLUMNS)

    def export(network: nn.Module, folder: Path) -> None:
        half = copy.deepcopy(network).half()
        model = Path(config.weights) if config.weights else None
        for place in (folder / RESULT, *([model / CLASSIFIER] if model else [])):
            save_model(half, shape.to_dict(), place, "model.safetensors")
        if model:
            write_manifest(model)

    batches = LabelledBatches(scenes, shape, config.loop.batch_size)
    return Stage(objective, objective.classifier, batches, held_out, picture, export)
