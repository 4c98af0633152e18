"""The second table: faces, creatures and people, of which a corpus without `people` must not know."""

import hashlib
import random
import re
from importlib.resources import files

import numpy as np
import pytest

from ldm.data.emoji import SIDES, CorpusConfig, EmojiScenes
from ldm.data.glyphs import COLOURED_SHAPES, COLOURS, SHAPES, Sprites, all_glyphs
from ldm.data.words import COUNTS, SIZES, SceneSpec, plural, with_article

PEOPLE = {g.name: g for g in all_glyphs(people=True)[len(all_glyphs()) :]}
FLAGSHIP = CorpusConfig(size=128, objects=818, people=True, spread=0.12, grid=4)


def rows(name: str) -> list[list[str]]:
    text = files("ldm.data").joinpath(name).read_text("utf-8")
    return [line.split("\t") for line in text.splitlines() if not line.startswith("#")]


def test_without_people_the_corpus_is_the_one_that_models_were_trained_on():
    """Names in order, which of them a corpus draws, what it holds out: digests of before there were others."""
    scenes = EmojiScenes()
    held = [str(int(scenes.is_held_out(SceneSpec((n,), c)))) for n in scenes.names for c in COLOURS]
    said = ["\n".join(g.name for g in all_glyphs()), "\n".join(scenes.names), "".join(held)]
    assert [hashlib.sha256(text.encode()).hexdigest()[:16] for text in said] == DIGESTS
    assert not PEOPLE.keys() & set(scenes.names)


DIGESTS = ["14718d88f1a1fb07", "b2d8c7030b2a4e16", "99a9b671191a4956"]


def test_every_row_is_drawn():
    """Four columns, a code point and a name that no other row of either table has; the filter leaves none out."""
    table, other = rows("emoji_more.tsv"), rows("emoji.tsv")
    assert all(len(row) == 4 for row in table) and [row[2] for row in table] == list(PEOPLE)
    for column in (0, 2):
        assert len({row[column] for row in table + other}) == len(table) + len(other)
    assert not PEOPLE.keys() & {*COLOURED_SHAPES, *SHAPES}
    assert len(EmojiScenes(FLAGSHIP).names) == len(all_glyphs(people=True)) == 822


def test_synonyms_name_one_object_only():
    """As in the first table, and across both; none is a word with a meaning of its own here."""
    both = rows("emoji.tsv") + rows("emoji_more.tsv")
    said = [word for row in both for word in filter(None, row[3].split("|"))]
    assert len(said) == len({*said}) and not {*said} & {row[2] for row in both}
    own = {*COLOURS, *SHAPES, *SIZES, *COUNTS.values()}
    new = [word for g in PEOPLE.values() for word in g.synonyms]
    assert len(new) >= 10 and all(re.fullmatch(r"[a-z]+( [a-z]+)*", word) for word in new)
    assert not own & {part for word in new for part in word.split()}


def test_nothing_is_drawn_that_must_not_be():
    """Unicode's blocks of hands and gestures, skin tones, families and religious signs; the groups are those wanted."""
    codes = {int(g.code, 16) for g in PEOPLE.values()}
    gestures = {0x261D, *range(0x1F446, 0x1F451), *range(0x270A, 0x270E), *range(0x1F590, 0x1F597), 0x1F64F, 0x1F90C,
                *range(0x1F645, 0x1F648), *range(0x1F64B, 0x1F64F), 0x1F90F, *range(0x1F918, 0x1F920),
                *range(0x1FAF0, 0x1FAF9), 0x1F4AA, 0x1F926, 0x1F937, *range(0x1F3FB, 0x1F400)}  # fmt: skip
    religious = {0x1F47C, 0x1F607, 0x1F473, 0x1F9D5, 0x1F472, 0x1F54B, 0x1F6D0}
    families = {0x1F46A, *range(0x1F46B, 0x1F46E), 0x1F48F, 0x1F491}
    assert not codes & (gestures | religious | families)
    groups = {g.subgroup.split("-")[0] for g in PEOPLE.values()}
    assert groups == {"face", "cat", "monkey", "heart", "body", "person"}


@pytest.mark.usefixtures("noto_font")
def test_the_font_has_all_of_them():
    """Each has ink, in colour or grey of its own: none is another's picture, or the box of a code point it lacks."""
    sprites = Sprites(PEOPLE)
    pictures = {name: sprites.ink(name) for name in PEOPLE}
    assert len({(image.size, image.tobytes()) for image in pictures.values()}) == len(pictures)
    assert all(max(image.size) > 90 and np.asarray(image)[..., 3].mean() > 25 for image in pictures.values())


def test_they_are_said_as_in_english():
    said = {"child": "children", "man": "men", "old woman": "old women", "older person": "older people", "elf": "elves",
            "foot": "feet", "tooth": "teeth", "merperson": "merpeople", "superhero": "superheroes", "fairy": "fairies",
            "pile of poo": "piles of poo", "princess": "princesses", "baby": "babies", "boy": "boys"}  # fmt: skip
    assert said.keys() <= PEOPLE.keys()
    assert {name: plural(name) for name in said} == said
    vowels = {name for name in PEOPLE if with_article(name).startswith("an ")}
    assert vowels == {name for name in PEOPLE if name[0] in "aeiou"}  # of these names, sounds and letters agree


@pytest.mark.usefixtures("noto_font")
def test_spread_and_grid_at_128_pixels():
    """Sizes are between 88 % and all of what the caption says, and boxes begin at multiples of the grid."""
    scenes = EmojiScenes(FLAGSHIP)
    seen = set[int]()
    for i in range(40):
        size = ("small", "", "large")[i % 3]
        spec = SceneSpec((list(PEOPLE)[i],), "blue", size=size)
        scene = scenes.draw(spec, random.Random(i))
        ((left, top, right, bottom),) = scene.boxes
        longest = max(right - left, bottom - top)
        assert 0.88 * SIDES[size] * 128 - 1 <= longest <= SIDES[size] * 128 + 1
        assert min(left, top) >= 0 and max(right, bottom) <= 128
        assert scene.image.shape == (128, 128, 3) and f"{size} {spec.objects[0]}".strip() in scene.caption
        seen.add(longest)
    assert len(seen) > 12
