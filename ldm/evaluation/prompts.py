"""What a model is asked to draw when it is judged: fixed prompts in the six categories of GenEval (Ghosh et al. 2023,
arXiv:2310.11513), others for the corpus' sizes and styles, and the prompts for an object that an adapter taught.

The prompts depend on the objects, the salt and the hold-out of a corpus alone, not on its shares, the seed or the shape
of a training run.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations, cycle, product

from PIL import Image

from ldm.data.emoji import CorpusConfig, EmojiScenes
from ldm.data.glyphs import COLOURED_SHAPES, COLOURS, STYLES_OF, Glyph
from ldm.data.words import AND, COUNTS, RELATIONS, SIZES, SceneSpec
from ldm.errors import UsageError

PROMPTS = 500
PLAIN = SceneSpec((), "")
NEW_CONTEXTS = 0.5  # share of the contexts of an object taught by an adapter that it is judged in
PAIRS_OF_TEN = (2, 5, 8)  # which of every ten prompts for such an object are relations


@dataclass(frozen=True)
class Category:
    """What the prompts of a category are made of. The ways of saying it, scenes of nothing yet, take turns."""

    share: int  # among those of its table
    objects: int  # in a prompt: one or two
    ways: tuple[SceneSpec, ...] = (PLAIN,)
    shapes: bool = False  # of simple shapes in a colour, otherwise of emoji

    def known_to(self, c: CorpusConfig) -> bool:
        """Whether a corpus has such scenes."""
        way = self.ways[0]
        return all(
            share for named, share in ((self.shapes, c.shapes), (way.size, c.sized), (way.style, c.styled)) if named
        )


CATEGORIES: dict[str, Category] = {  # of 500 prompts
    "single object": Category(100, 1),
    "two objects": Category(80, 2, (replace(PLAIN, relation=AND),)),
    "counting": Category(80, 1, tuple(replace(PLAIN, count=count) for count in COUNTS)),
    "colours": Category(80, 1, shapes=True),
    "position": Category(80, 2, tuple(replace(PLAIN, relation=relation) for relation in RELATIONS)),
    "attribute binding": Category(
        80, 2, tuple(replace(PLAIN, relation=relation) for relation in (AND, *RELATIONS)), shapes=True
    ),
}
LOOKS: dict[str, Category] = {  # a size or style of a single object
    **{size: Category(1, 1, (replace(PLAIN, size=size),)) for size in SIZES},
    **{
        kind: Category(1, 1, tuple(replace(PLAIN, style=style) for style in styles))
        for kind, styles in STYLES_OF.items()
    },
}


def category_of(spec: SceneSpec) -> str:
    """The category, a key of CATEGORIES or LOOKS, that a scene of one or two objects belongs to."""
    if spec.size or spec.style:
        return spec.size or spec.style.partition(" ")[0]
    shapes = spec.objects[0] in COLOURED_SHAPES
    if not spec.relation:
        return "counting" if spec.count else "colours" if shapes else "single object"
    return "attribute binding" if shapes else "two objects" if spec.relation == AND else "position"


def prompts(scenes: EmojiScenes, n: int = PROMPTS, *, seen: bool = False, looks: bool = False) -> list[SceneSpec]:
    """The fixed prompts of a corpus: held-out combinations, in canonical words.

    The categories take turns, so that the first n hold each in its share; a corpus without shapes has those of emoji
    alone. seen: combinations that training may see, of the same categories in the same turns. looks: sizes and styles
    of a single object, those of LOOKS that the corpus has, instead of GenEval's categories.
    UsageError: the corpus has no combination for one of them, or no such look.
    """
    asked = LOOKS if looks else CATEGORIES
    shares = {name: c.share for name, c in asked.items() if c.known_to(scenes.config)}
    if not shares:
        raise UsageError("the corpus has neither sizes nor styles to be asked for; leave looks (--looks) out")
    found = {name: prompts_of(scenes, name, seen=seen) for name in shares}
    return [next(found[name]) for name in turns(shares, n)]


def turns(shares: Mapping[str, int], n: int) -> list[str]:
    """n names, each as often as its share says, evenly spread: the next one is whose part is the most overdue."""
    total, given = sum(shares.values()), dict.fromkeys(shares, 0)
    order = []
    for i in range(1, n + 1):
        order.append(max(shares, key=lambda name: shares[name] * i - given[name] * total))
        given[order[-1]] += 1
    return order


def prompts_of(scenes: EmojiScenes, name: str, *, seen: bool = False) -> Iterator[SceneSpec]:
    """The prompts of one category of CATEGORIES or LOOKS, endless: none of its combinations of words comes a second
    time before all came once (a corpus holds out only some dozens of coloured shapes on backgrounds).
    """
    category, rng = (CATEGORIES | LOOKS)[name], random.Random(f"{name}, {'seen' if seen else 'held out'}")
    ways, found = cycle(category.ways), list(_combinations(scenes, category))
    rng.shuffle(found)
    held_out = [words for words in found if scenes.is_held_out(_spec(words, category.ways[0])) != seen]
    if not held_out:
        raise UsageError(f"the corpus has no combination for {name!r}; give it more objects or another held_out share")
    for objects, background in cycle(held_out):
        turned = tuple(rng.sample(objects, len(objects)))
        visible = [c for c in COLOURS if not any(o.startswith(c) and o in COLOURED_SHAPES for o in objects)]
        stands_on = background or rng.choice(visible)
        yield _spec((turned, stands_on), next(way for way in ways if way.style != f"tinted {stands_on}"))


Words = tuple[tuple[str, ...], str]
"""Objects and the background they stand on, "" where any may be."""


def _combinations(scenes: EmojiScenes, category: Category) -> Iterator[Words]:
    """All that may be held out or not: a visible object on a background, or two objects that share no word."""
    names = COLOURED_SHAPES if category.shapes else scenes.names
    if category.objects == 1:
        yield from (((n,), c) for n, c in product(names, COLOURS) if not category.shapes or n.split()[0] != c)
    for pair in combinations(names, 2) if category.objects == 2 else ():
        if not category.shapes or not {*pair[0].split()} & {*pair[1].split()}:
            yield pair, ""


def _spec(words: Words, way: SceneSpec) -> SceneSpec:
    return replace(way, objects=words[0], background=words[1])


class GlyphScenes(EmojiScenes):
    """The corpus and one object more, known by a picture of it; a half of its contexts are held out.

    For judging what an adapter was taught: the objects of the corpus stay, as its rivals. A context is the background
    of an object alone, or the object beside it; `contexts` draws examples to train on, `glyph_prompts` takes the
    held-out ones.
    """

    def __init__(self, name: str, picture: Image.Image, config: CorpusConfig | None = None) -> None:
        """picture: what is opaque in it is the object. UsageError: nothing is, or the corpus has such a name."""
        super().__init__(replace(config or CorpusConfig(), held_out=NEW_CONTEXTS))
        self.name, made = name, picture.convert("RGBa").convert("RGBA")
        box = made.getchannel("A").getbbox()
        if box is None or name in (*self.glyphs, *COLOURED_SHAPES):
            fault = "its picture is transparent" if box is None else "the corpus has an object of that name"
            raise UsageError(f"{name!r} cannot be judged: {fault}; give a PNG of the object on nothing, and a new name")
        self.rivals, self._ink = self.names, made.crop(box)
        self.glyphs[name] = Glyph(name, "", "new")

    def contexts(self, held_out: bool) -> tuple[list[str], list[str]]:
        """The backgrounds that the object stands alone on, and the emoji beside it, of one side of the hold-out."""
        alone = [c for c in COLOURS if self.is_held_out(SceneSpec((self.name,), c)) == held_out]
        beside = [n for n in self.rivals if self.is_held_out(SceneSpec((self.name, n), "", RELATIONS[0])) == held_out]
        return alone, beside

    def ink(self, name: str) -> Image.Image:
        """The object as large as it is known, cropped to its ink. RGBA."""
        return self._ink if name == self.name else super().ink(name)


def glyph_prompts(scenes: GlyphScenes, n: int = PROMPTS, *, seen: bool = False) -> list[SceneSpec]:
    """n prompts for the object of a GlyphScenes in held-out contexts, of every ten seven alone and three in a relation.

    Backgrounds and neighbours take turns; relation, place in it and the background of a pair are decided once for all.
    seen: the contexts that may be trained on instead. UsageError: there are none, as for some in a thousand names.
    """
    rng = random.Random("glyph, seen" if seen else "glyph, held out")
    contexts = scenes.contexts(held_out=not seen)
    if not all(contexts):
        raise UsageError(f"{scenes.name!r} has no context of its own to be judged in; choose another name for it")
    backgrounds, others = (cycle(rng.sample(found, len(found))) for found in contexts)
    alone = (SceneSpec((scenes.name,), colour) for colour in backgrounds)
    return [_beside(scenes.name, next(others), rng) if i % 10 in PAIRS_OF_TEN else next(alone) for i in range(n)]


def _beside(name: str, other: str, rng: random.Random) -> SceneSpec:
    objects = tuple(rng.sample((name, other), 2))
    return SceneSpec(objects, rng.choice(list(COLOURS)), relation=rng.choice(RELATIONS))
