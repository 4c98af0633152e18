"""Does a model draw its training scenes again? Each picture is compared with many of them, and with what its prompt
may mean.

The corpus is endless, but the prompts are held-out combinations: no training scene shows what one of them asks for. So
a picture that is nearly a training scene was copied, wholly or in part, and how near a picture comes to one by chance
is known: rendered scenes of the same prompts, which a perfect model would draw, tell (the null). A picture is a near-
copy if it is nearer to some training scene than all but 1 % of rendered scenes are, and nearer to it than to any
rendering of its own prompt. That a distance means little by itself, but much beside others of its kind, is the lesson
of Carlini et al. 2023 (arXiv:2301.13188, sec. 4.2); nearest neighbours in a space of features are Somepalli et al.'s
2023 (arXiv:2212.03860).

In two spaces: pixels (root mean square differences of pictures of 32 x 32, colours 0 .. 1), where an object in another
place is far away, and the classifier's features, where it is near.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ldm.data.emoji import EmojiScenes
from ldm.data.words import SceneSpec
from ldm.evaluation.drawing import ground_truth
from ldm.evaluation.features import Pictures, features, fitted
from ldm.evaluation.matching import shrunk
from ldm.models.classifier import SceneClassifier

TRAINING_SCENES = 20_000
RENDERINGS = 16  # of each prompt: about as many as an object has places
NULL_SHARE = 0.01  # of rendered scenes are as near to a training scene as a near-copy
CHUNK = 1000  # training scenes at a time

Vectors = NDArray[np.float32]
"""[n, D]; the distance of two rows is Euclidean."""
Spaces = dict[str, Vectors]
"""The same pictures in "pixels" and "features"."""
Embed = Callable[[Pictures], Spaces]


def embedding(network: SceneClassifier) -> Embed:
    """What puts pictures [n, S, S, 3] into both spaces."""

    def embed(pictures: Pictures) -> Spaces:
        small = shrunk(pictures.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)).reshape(len(pictures), -1)
        pixels = small / np.float32(np.sqrt(small.shape[1]))
        return {"pixels": pixels, "features": features(network, fitted(pictures, network.config.image_size))}

    return embed


class Nearest(NamedTuple):
    """The nearest training scene of each picture: its index in the corpus, and how far away it is."""

    scene: NDArray[np.int64]  # [n]
    distance: Vectors  # [n]


def nearest(sets: Mapping[str, Spaces], scenes: EmojiScenes, n: int, embed: Embed) -> dict[str, dict[str, Nearest]]:
    """Of each picture of some sets the nearest of training scenes 0 .. n - 1 of a corpus, in each space; by set, by
    space. The scenes are not kept.
    """
    best = {
        name: {
            space: Nearest(np.zeros(len(q), np.int64), np.full(len(q), np.inf, np.float32)) for space, q in s.items()
        }
        for name, s in sets.items()
    }
    for first in range(0, n, CHUNK):
        training = embed(np.stack([scenes.scene(i).image for i in range(first, min(first + CHUNK, n))]))
        for name, space in product(sets, training):
            rows, here, found = sets[name][space], training[space], best[name][space]
            index = ((here * here).sum(1) / 2 - rows @ here.T).argmin(1)  # (|q - t|^2 - |q|^2) / 2
            distance = np.linalg.norm(rows - here[index], axis=1)  # once more, for the sum above cancels
            nearer = distance < found.distance
            found.scene[nearer], found.distance[nearer] = first + index[nearer], distance[nearer]
    return best


def to_own(
    sets: Mapping[str, Spaces], scenes: EmojiScenes, specs: Sequence[SceneSpec], embed: Embed
) -> dict[str, dict[str, Vectors]]:
    """Of each picture of some sets, number i of which is of specs[i], the distance to the nearest of RENDERINGS scenes
    of its spec; by set, by space.
    """
    turns = [embed(renderings(scenes, specs, f"own {turn}")) for turn in range(RENDERINGS)]
    return {
        name: {
            space: np.min([np.linalg.norm(rows - own[space], axis=1) for own in turns], axis=0)
            for space, rows in each.items()
        }
        for name, each in sets.items()
    }


def renderings(scenes: EmojiScenes, specs: Sequence[SceneSpec], name: str) -> Pictures:
    """A scene of each spec, what a perfect model draws; others for another name. [n, S, S, 3]"""
    return np.stack([scene.image for scene in ground_truth(scenes, specs, name)])


class Memory(NamedTuple):
    """How near a set of pictures comes to training scenes in one space, each number beside that of rendered scenes."""

    copies: float  # share of near-copies; of rendered scenes at most 1 %, but for chance
    nearer: float | None  # share nearer to a training scene than to any rendering of its own prompt; None: not known
    ratio: float  # median distance to the nearest training scene over that of the null; of rendered scenes about 1


def memory(found: Nearest, null: Nearest, own: Vectors | None) -> Memory:
    """own: distances [n] to the nearest rendering of each picture's prompt; None where the prompts are not known."""
    strange = np.ones(len(found.distance), bool) if own is None else found.distance < own
    close = found.distance < np.quantile(null.distance, NULL_SHARE)
    ratio = float(np.median(found.distance) / np.median(null.distance))
    return Memory(float((close & strange).mean()), None if own is None else float(strange.mean()), ratio)
