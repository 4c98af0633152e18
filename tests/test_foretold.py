"""The text encoder foretells the picture, place by place: what it says, what it is judged by, and that it makes the
words tell left from right, which contrast alone need not.
"""

import random
from itertools import permutations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from ldm.data.emoji import CorpusConfig, EmojiScenes
from ldm.data.words import SceneSpec
from ldm.models.clip import CLIPTextConfig, CLIPVisionConfig
from ldm.text.tokenizer import CLIPTokenizer
from ldm.training.clip import PIXELS, PLACES, CaptionedBatches, Contrastive, Foretold
from ldm.training.config import ClipConfig, LoopConfig

pytestmark = pytest.mark.usefixtures("one_thread")
SIDE = PLACES * PIXELS


def config(weight: float, size: int = SIDE) -> ClipConfig:
    text = CLIPTextConfig(
        vocab_size=560, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=24, eos_token_id=2,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, projection_dim=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=size, patch_size=size // 2,
    )  # fmt: skip
    return ClipConfig(LoopConfig("out"), CorpusConfig(size=size), 560, weight, text, vision)


def objective(weight: float, size: int = SIDE) -> Contrastive:
    torch.manual_seed(0)
    return Contrastive(config(weight, size))


def batch(size: int = SIDE, n: int = 6) -> tuple[Tensor, Tensor]:
    numbers = torch.Generator().manual_seed(1)
    images = torch.randint(256, (n, 3, size, size), generator=numbers, dtype=torch.uint8)
    return images, torch.randint(3, 560, (n, 24), generator=numbers)


def test_every_place_says_its_own_part_of_the_picture() -> None:
    """Row by row: place k the square of PIXELS at row k // PLACES and column k % PLACES, from all of the words."""
    torch.manual_seed(0)
    foretold = Foretold(32, 4)
    text = torch.randn(2, 7, 32)
    before = foretold(text).detach()
    assert before.shape == (2, 3, SIDE, SIDE)
    for place in (0, 5, 8, 63):
        with torch.no_grad():
            foretold.places[place] += 1.0
        changed = (foretold(text) - before).detach().abs().amax((0, 1)) > 1e-6
        before = foretold(text).detach()
        row, column = divmod(place, PLACES)
        wanted = torch.zeros(SIDE, SIDE, dtype=torch.bool)
        wanted[row * PIXELS : (row + 1) * PIXELS, column * PIXELS : (column + 1) * PIXELS] = True
        assert torch.equal(changed, wanted)
    for token in range(7):
        other = text.clone()
        other[:, token] += 1.0
        assert float((foretold(other) - before).detach().abs().amax((1, 2, 3)).min()) > 1e-4


@pytest.mark.parametrize("size", [SIDE, 2 * SIDE])
def test_the_error_is_that_of_the_picture_made_small(size: int) -> None:
    """Mean squared, against means of boxes; it is added to the contrast with its weight and figures are both."""
    images, ids = batch(size)
    plain, weighted = objective(0.0, size), objective(20.0, size)
    (loss, figures), (more, same) = plain((images, ids), 0), weighted((images, ids), 0)
    assert float(figures["foretold"]) == float(same["foretold"]) > 0
    assert float((more - loss).detach()) == pytest.approx(20 * float(same["foretold"]), rel=1e-4)
    towers = plain.towers
    x = images.double() / 127.5 - 1
    boxes = x.reshape(6, 3, SIDE, size // SIDE, SIDE, size // SIDE).mean((3, 5))
    hidden, pooled = towers.text(ids)
    error = (towers.foretold(hidden).double() - boxes).square().mean()
    assert float(figures["foretold"]) == pytest.approx(float(error.detach()), rel=1e-5)
    similar = normalize(towers.text_projection(pooled)) @ normalize(towers.vision(x.float())).T / 0.07
    each = torch.arange(6)
    wanted = (cross_entropy(similar, each) + cross_entropy(similar.T, each)) / 2
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-4)


def test_without_a_weight_nothing_learns_to_foretell() -> None:
    plain, weighted = objective(0.0), objective(20.0)
    for one in (plain, weighted):
        one(batch(), 0)[0].backward()
    assert all(p.grad is None or not p.grad.any() for p in plain.towers.foretold.parameters())
    assert all(p.grad is not None and bool(p.grad.any()) for p in weighted.towers.foretold.parameters())
    assert plain.towers.text_projection.weight.grad is not None


# -- what it teaches ---------------------------------------------------------------------------------------------------

COLOURS = ("red", "green", "blue", "yellow", "purple", "black")
UNSEEN = {"red", "blue"}  # which are never together in a scene that is trained on


def beside(left: str, right: str) -> SceneSpec:
    return SceneSpec((f"{left} square", f"{right} square"), "white", "to the left of")


def test_words_tell_left_from_right() -> None:
    """After 180 steps the foretold pictures have each colour on its side, also of two that never stood together. What
    is compared is a share of the true difference of the halves.
    """
    scenes, dice = EmojiScenes(CorpusConfig(size=SIDE, wander=0.0)), random.Random(0)
    specs = [beside(*pair) for pair in permutations(COLOURS, 2)]
    tokenizer = CLIPTokenizer.train([spec.caption() for spec in specs], 560, 24)
    pictures = torch.stack([torch.from_numpy(scenes.draw(s, dice).image.transpose(2, 0, 1).copy()) for s in specs])
    ids = tokenizer([spec.caption() for spec in specs]).ids
    unseen = torch.tensor([{name.split()[0] for name in spec.objects} == UNSEEN for spec in specs])
    made, errors = objective(20.0), list[float]()
    optimizer = torch.optim.AdamW(made.parameters(), lr=4e-3)
    for step in range(180):
        loss, figures = made((pictures[~unseen], ids[~unseen]), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(float(figures["foretold"]))
    assert errors[-1] < 0.15 * errors[10]
    with torch.no_grad():
        foretold = made.towers.foretold(made.towers.text(ids)[0])
    true, said = (halves(images) for images in (pictures / 127.5 - 1, foretold))
    agreement = (true * said).sum(1) / true.square().sum(1)
    assert float(agreement[~unseen].min()) > 0.5
    assert int(unseen.sum()) == 2 and float(agreement[unseen].min()) > 0.25
    assert float(agreement.max()) < 1.5


def halves(images: Tensor) -> Tensor:
    """[N, 3, S, S] -> how the colour on the left differs from that on the right, [N, 3]."""
    left, right = images.mean(2).tensor_split(2, dim=2)
    return left.mean(2) - right.mean(2)


def test_batches_are_scenes_and_their_words() -> None:
    """Batch i: scenes i B ... i B + B - 1, as training draws them, natural words and all."""
    scenes = EmojiScenes(CorpusConfig(size=SIDE, objects=0, shapes=1.0, styled=0.0), seed=2)
    tokenizer = CLIPTokenizer.train([scenes.scene(i).caption for i in range(60)], 560, 24)
    images, ids = CaptionedBatches(scenes, tokenizer, 4)[3]
    for i in range(4):
        scene = scenes.scene(12 + i)
        assert torch.equal(images[i], torch.from_numpy(scene.image.transpose(2, 0, 1).copy()))
        assert torch.equal(ids[i], tokenizer([scene.caption]).ids[0])
    assert images.dtype == torch.uint8 and ids.dtype == torch.int64
