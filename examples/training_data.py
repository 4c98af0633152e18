"""Pictures to train on: a new object, a style, a word for an object that is known.

    python examples/training_data.py out/zorbik
    ldm data check out/zorbik/pictures

Behind the folder may stand what they show: object, style or word. The object is an anchor, which no picture of the
corpus shows and which none of its objects is like; its made-up name is a zorbik. `zorbik.png` is what `ldm eval
alignment --glyph zorbik=out/zorbik/zorbik.png` judges by, in contexts that the ten pictures do not have; `class` holds
pictures of what the model knows, for prior preservation. The style is that of instant photographs, in a frame of paper,
and captions do not say so. The word is blorp, for a lion. Needs the Noto Color Emoji font.
"""

import argparse
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.checkpoints.safe import read_json
from ldm.data.emoji import CorpusConfig, EmojiScenes
from ldm.data.glyphs import COLOURS
from ldm.data.words import RELATIONS, SceneSpec
from ldm.evaluation.judging import Judge
from ldm.evaluation.matching import Array, shrunk
from ldm.evaluation.prompts import GlyphScenes
from ldm.images import save
from ldm.sources import model_in_the_box
from ldm.training.config import checked

OBJECT, NAME = "anchor", "zorbik"
KNOWN, WORD = "lion", "blorp"
PLACED: dict[str, Any] = {"wander": 0.0}  # objects in the middle of where they may stand
VARIED: dict[str, Any] = {"pairs": 0.8, "ands": 0.0, "triples": 0.0, "counts": 0.05, "sized": 0.1}
ALONE, BESIDE, IN_STYLE, OF_THE_CLASS = 5, 5, 20, 400
PAPER = (246, 240, 224)
Drawn = Iterator[tuple[np.ndarray, str]]


def corpus(**changes: Any) -> CorpusConfig:
    """What the model in the box was trained on, with some fields changed."""
    path = model_in_the_box() / "vocabulary.json"
    known = read_json(path).get("corpus", {}) if path.is_file() else {}
    return replace(checked(known, CorpusConfig, str(path)), **changes)


def glyph_of(name: str) -> Image.Image:
    """The emoji of this CLDR short name, as the font draws it. RGBA."""
    return EmojiScenes(CorpusConfig(objects=0, always=(name,))).sprite(name, 128)


def distance(name: str) -> float:
    """How far an emoji is from every object of the corpus, from 0 (one of them) to 1, on the background on which it is
    nearest: the share of its squared contrast that no render of them explains, as the judge compares.
    """
    judge, own = Judge(EmojiScenes(corpus())), EmojiScenes(CorpusConfig(objects=0, always=(name,)))
    explained = []
    for background, colour in COLOURS.items():
        spec = SceneSpec((name,), background)
        picture: Array = own.draw(spec, random.Random(0)).image.transpose(2, 0, 1).astype(np.float32)
        behind: Array = np.array(colour, np.float32) / np.float32(255)
        difference = picture / np.float32(255) - behind[:, None, None]
        found = judge.templates("").ranking(difference, behind, background)
        explained += [best.gain / float((shrunk(difference) ** 2).sum()) for best in found]
    return 1 - max(explained)


def of_the_glyph(scenes: GlyphScenes) -> Iterator[SceneSpec]:
    """What the ten pictures show: the object alone, then beside others; no context of them is judged."""
    backgrounds, others = scenes.contexts(held_out=False)
    for i in range(ALONE):
        yield SceneSpec((scenes.name,), backgrounds[i % len(backgrounds)])
    for i, other in enumerate(random.Random(0).sample(others, BESIDE)):
        pair = (scenes.name, other) if i % 2 else (other, scenes.name)
        yield SceneSpec(pair, backgrounds[i % len(backgrounds)], relation=RELATIONS[i % len(RELATIONS)])


def the_object(folder: Path) -> Drawn:
    """Ten pictures; beside them what the judge knows it by, and the class pictures."""
    glyph = glyph_of(OBJECT)
    save(glyph, folder / f"{NAME}.png")
    known = EmojiScenes(corpus(**VARIED), seed=1)
    write(folder / "class", ((s.image, s.caption) for s in map(known.scene, range(OF_THE_CLASS))))
    print(f"the {OBJECT} is {distance(OBJECT):.2f} from all objects known")
    scenes, rng = GlyphScenes(NAME, glyph, corpus(**PLACED)), random.Random(0)
    for spec in of_the_glyph(scenes):
        scene = scenes.draw(spec, rng)
        yield scene.image, scene.caption


def the_style(folder: Path) -> Drawn:
    """Twenty scenes as instant photographs: in a frame of paper, which is wider below."""
    known = EmojiScenes(corpus(**VARIED), seed=2)
    for scene in map(known.scene, range(IN_STYLE)):
        picture = np.full_like(scene.image, PAPER)
        picture[4:-12, 4:-4] = scene.image[4:-12, 4:-4]
        yield picture, scene.caption


def the_word(folder: Path) -> Drawn:
    """The known object on every background, under another name."""
    known, rng = EmojiScenes(corpus(**PLACED)), random.Random(0)
    for background in COLOURS:
        scene = known.draw(SceneSpec((KNOWN,), background), rng)
        yield scene.image, scene.caption.replace(KNOWN, WORD)


WHAT = {"object": the_object, "style": the_style, "word": the_word}


def write(folder: Path, drawn: Drawn) -> int:
    """Pictures with their captions beside them; returns how many."""
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for count, (picture, caption) in enumerate(drawn, 1):
        save(Image.fromarray(picture), folder / f"{count:03}.png")
        (folder / f"{count:03}.txt").write_text(caption + "\n")
    return count


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the pictures, and say what was written."""
    parser = argparse.ArgumentParser(description="Pictures to train on.")
    parser.add_argument("out", type=Path, help="folder of what is written")
    parser.add_argument("what", nargs="?", choices=list(WHAT), default="object", help="what they show")
    chosen = parser.parse_args(arguments)
    chosen.out.mkdir(parents=True, exist_ok=True)
    count = write(chosen.out / "pictures", WHAT[chosen.what](chosen.out))
    print(f"{count} pictures in {chosen.out / 'pictures'}")


if __name__ == "__main__":
    main()
