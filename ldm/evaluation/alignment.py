"""Does the picture show what the prompt says? Judged from the corpus' ground truth, without any network.

for item in evaluate(pipeline, EmojiScenes()):   # a Judged after every picture, then one Report
    ...
print(item.table())
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm.data.emoji import (
    BACKGROUNDS,
    RELATIONS,
    SIDES,
    SIDES_BY_COUNT,
    CorpusConfig,
    EmojiScenes,
    Glyph,
    Scene,
    SceneSpec,
)
from ldm.errors import UsageError
from ldm.evaluation.matching import SIDE, Array, Sighting, Templates, shrunk
from ldm.evaluation.reconstruction import first_stage_psnr
from ldm.evaluation.scores import Score, as_json, cells, save_report, table
from ldm.images import contact_sheet
from ldm.pipeline import Pipeline

PROMPT_SEED = 0
NEW_CONTEXTS = 0.5  # share of the contexts of an object taught by an adapter that it is judged in
PAIRS_OF_TEN = (2, 5, 8)  # which of every ten prompts are relations
TOLERANCE = 1.15  # how much smaller or larger than in training an object may be drawn
LEAST_FIT = 0.5  # of a copy that is counted
ON_SHEET = 40  # pictures on the sample sheet
TARGETS = {"background": 0.90, "object": 0.70, "relation": 0.20}


def prompts(scenes: EmojiScenes, n: int = 200, seed: int = PROMPT_SEED) -> list[SceneSpec]:
    """The fixed held-out prompts of a corpus, of every ten seven single objects and three relations, in turn.

    They depend on the corpus' objects and hold-out and on the seed alone, not on the shares of kinds or the seed of a
    training run; fewer are the first ones of more. A corpus holds out few single objects: after all came once they come
    again (each picture has its own noise).
    """
    pairs = [i % 10 in PAIRS_OF_TEN for i in range(n)]
    fixed = EmojiScenes(replace(scenes.config, sized=CorpusConfig.sized))
    kinds = {k: iter(fixed.held_out_specs(pairs.count(k), seed, "pair" if k else "single")) for k in (False, True)}
    return [next(kinds[k]) for k in pairs]


class GlyphScenes(EmojiScenes):
    """The corpus and one object more, known by a picture of it; a half of its contexts are held out.

    For judging what an adapter was taught: the 64 objects stay, as its rivals. A context is the background of an object
    alone, or the object beside it; `contexts` draws examples to train on, `glyph_prompts` takes the held-out ones.
    """

    def __init__(self, name: str, picture: Image.Image, config: CorpusConfig | None = None) -> None:
        """picture: what is opaque in it is the object. UsageError: nothing is, or the corpus has such a name."""
        super().__init__(replace(config or CorpusConfig(), held_out=NEW_CONTEXTS))
        self.name, ink = name, picture.convert("RGBa").convert("RGBA")
        box = ink.getchannel("A").getbbox()
        if box is None or name in self.glyphs:
            fault = "its picture is transparent" if box is None else "the corpus has an object of that name"
            raise UsageError(f"{name!r} cannot be judged: {fault}; give a PNG of the object on nothing, and a new name")
        self.rivals, self._ink = self.names, ink.crop(box)
        self.glyphs[name] = Glyph(name, "", "new")

    def contexts(self, held_out: bool) -> tuple[list[str], list[str]]:
        """The backgrounds that the object stands alone on, and the objects beside it, of one side of the hold-out."""
        alone = [c for c in BACKGROUNDS if self.is_held_out(SceneSpec((self.name,), c)) == held_out]
        beside = [n for n in self.rivals if self.is_held_out(SceneSpec((self.name, n), "", RELATIONS[0])) == held_out]
        return alone, beside

    def _render(self, name: str) -> Image.Image:
        return self._ink if name == self.name else super()._render(name)


def glyph_prompts(scenes: GlyphScenes, n: int = 200, seed: int = PROMPT_SEED) -> list[SceneSpec]:
    """n prompts for the object of a GlyphScenes in held-out contexts, of every ten seven alone and three in a relation.

    Backgrounds and neighbours take turns; relation, place in it and the background of a pair are decided by the seed.
    """
    rng = random.Random(f"glyph {seed}")
    backgrounds, others = (cycle(rng.sample(found, len(found))) for found in scenes.contexts(held_out=True))
    specs = []
    for i in range(n):
        if i % 10 in PAIRS_OF_TEN:
            pair = rng.sample((scenes.name, next(others)), 2)
            specs.append(SceneSpec((pair[0], pair[1]), rng.choice(list(BACKGROUNDS)), relation=rng.choice(RELATIONS)))
        else:
            specs.append(SceneSpec((scenes.name,), next(backgrounds)))
    return specs


def ground_truth(scenes: EmojiScenes, specs: Sequence[SceneSpec], seed: int = 0) -> list[Scene]:
    """A scene of the corpus for each spec: what a perfect model draws."""
    return [scenes.draw(spec, random.Random(f"ground truth {seed} {i}")) for i, spec in enumerate(specs)]


@dataclass(frozen=True)
class Verdict:
    """What of a spec a picture shows."""

    background: bool  # the nearest of the ten colours is the one asked for
    objects: tuple[bool, ...]  # of each object wanted: it is the best of all glyphs at one of the places looked at
    objects_top5: tuple[bool, ...]  # ... one of the best five
    relation: bool  # both objects are right, and stand as asked; True where no relation is asked
    count: bool  # as many as asked; told apart only where "two" to "four" are asked, True elsewhere
    seen_background: str
    seen: tuple[Sighting, ...]  # what it took for the objects, in reading order

    @property
    def all_right(self) -> bool:
        """Background, objects, relation and count."""
        return self.background and all(self.objects) and self.relation and self.count


class Judge:
    """Compares pictures with renders of every object of a corpus. Needs the emoji font."""

    def __init__(self, scenes: EmojiScenes) -> None:
        self.scenes = scenes
        self._templates: dict[tuple[float, float], Templates] = {}

    def templates(self, spec: SceneSpec) -> Templates:
        """All objects, in the sizes that a scene like this has."""
        low, high = SIDES[spec.size]
        if spec.relation or spec.count > 1:
            low, high = SIDES_BY_COUNT[spec.count if spec.count > 1 else 2]
        sizes = (low / TOLERANCE, min(high * TOLERANCE, 0.98))
        if sizes not in self._templates:
            self._templates[sizes] = Templates(self.scenes, *sizes)
        return self._templates[sizes]

    def judge(self, image: NDArray[np.uint8], spec: SceneSpec) -> Verdict:
        """The verdict on a square picture, uint8 [S, S, 3] of any S. UsageError for another shape or type."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[0] != image.shape[1] or image.shape[2] != 3:
            got = f"a picture of shape {list(image.shape)} and type {image.dtype}"
            raise UsageError(f"{got}; the judge takes uint8 [S, S, 3]")
        name, colour = background(image)
        difference = shrunk(image.transpose(2, 0, 1).astype(np.float32) / np.float32(255)) - colour[:, None, None]
        templates = self.templates(spec)
        if spec.relation:
            rankings = best_split(difference, colour, templates)
        else:
            rankings = [templates.ranking(difference, colour)]
        # Where no object has a gain, plain background explains the picture better than any of them: nothing is seen.
        best = [[s for s in ranking[:5] if s.gain > 0] for ranking in rankings]
        seen, counted = [sightings[0] for sightings in best if sightings], True
        if spec.count > 1 and seen:  # the object is the one whose copies together explain most
            sets = [templates.copies(s.name, difference, colour, LEAST_FIT) for s in best[0]]
            best[0] = [copies[0] for copies in sorted(sets, key=lambda c: -sum(s.gain for s in c)) if copies]
            seen = max(sets, key=lambda copies: sum(s.gain for s in copies))
            counted = len(seen) == spec.count
        elif spec.count > 1:
            counted = False
        top = {s.name for s in seen}
        right = tuple(name in top for name in spec.objects)
        related = not spec.relation or (all(right) and stands(spec, seen))
        five = tuple(any(name == s.name for sightings in best for s in sightings) for name in spec.objects)
        return Verdict(name == spec.background, right, five, related, counted, name, tuple(seen))


def background(image: NDArray[np.uint8]) -> tuple[str, Array]:
    """The nearest of the ten colours to most of the border's pixels, and those pixels' median, [3] in 0..1."""
    width = max(1, image.shape[0] // 32)
    inside = np.zeros(image.shape[:2], bool)
    inside[width:-width, width:-width] = True
    border = image[~inside].astype(np.float32)  # [n, 3]
    colours = np.array(list(BACKGROUNDS.values()), np.float32)
    nearest = ((border[:, None] - colours) ** 2).sum(2).argmin(1)
    winner = int(np.bincount(nearest, minlength=len(colours)).argmax())
    return list(BACKGROUNDS)[winner], np.median(border[nearest == winner], 0).astype(np.float32) / 255


def best_split(difference: Array, colour: Array, templates: Templates) -> list[list[Sighting]]:
    """The rankings of the two halves of a picture, left and right or upper and lower, whichever explains it better.

    It is cut where least of the foreground lies, near the middle.
    """
    ways = []
    for axis in (2, 1):
        energy = (difference**2).sum((0, 3 - axis))  # of each column, or row
        middle = np.arange(SIDE * 7 // 16, SIDE * 9 // 16 + 1)
        cut = int(middle[np.argmin([energy[c - 1 : c + 1].sum() for c in middle])])
        first = np.expand_dims(np.arange(SIDE) < cut, 2 - axis)  # [1, 32] for columns, [32, 1] for rows
        ways.append([templates.ranking(difference * part, colour) for part in (first, ~first)])
    return max(ways, key=lambda way: sum(ranking[0].gain for ranking in way))


def stands(spec: SceneSpec, seen: Sequence[Sighting]) -> bool:
    """Whether the two things seen are the spec's objects in its relation, on the longer axis between their centres."""
    at = {s.name: s.centre for s in seen}
    if set(at) != set(spec.objects):
        return False
    (x0, y0), (x1, y1) = (at[name] for name in spec.objects)
    across, down = x1 - x0, y1 - y0
    if abs(across) > abs(down):
        return spec.relation == ("to the left of" if across > 0 else "to the right of")
    return spec.relation == ("above" if down > 0 else "below")


@dataclass(frozen=True)
class Judged:
    """One drawn picture and its verdict. `index` (of `total`) counts from 0; the picture is of `prompt` and `seed`."""

    index: int
    total: int
    seed: int
    spec: SceneSpec
    image: NDArray[np.uint8]  # [S, S, 3]
    verdict: Verdict

    @property
    def prompt(self) -> str:
        """The canonical caption of the spec."""
        return self.spec.caption()


def evaluate(
    pipeline: Pipeline,
    scenes: EmojiScenes,
    n: int = 200,
    seed: int = 0,
    *,
    scheduler: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    batch_size: int = 8,
) -> Iterator["Judged | Report"]:
    """Draw the n fixed held-out prompts of a corpus, picture i from noise seed `seed + i`, and judge them.

    Of a GlyphScenes they are those of `glyph_prompts`.
    Yields a Judged after every picture (for progress), and at the end one Report. scheduler, steps, guidance: None
    leaves them to the model. UsageError for n < 1. LdmError when the emoji font is not found.
    """
    if n < 1:
        raise UsageError(f"{n} prompts were asked for; judge at least one")
    glyph = scenes.name if isinstance(scenes, GlyphScenes) else ""
    specs = glyph_prompts(scenes, n) if isinstance(scenes, GlyphScenes) else prompts(scenes, n)
    judge, rows = Judge(scenes), []
    for first in range(0, n, batch_size):
        part = specs[first : first + batch_size]
        seeds = tuple(range(seed + first, seed + first + len(part)))
        result = pipeline(
            [spec.caption() for spec in part],
            seed=seeds,
            output_type="np",
            scheduler=scheduler,
            num_inference_steps=steps,
            guidance_scale=guidance,
        )
        images = (np.asarray(result.images) * 255).round().astype(np.uint8)
        for i, (spec, image) in enumerate(zip(part, images, strict=True)):
            rows.append(Judged(first + i, n, seeds[i], spec, image, judge.judge(image, spec)))
            yield rows[-1]
    yield Report(tuple(rows), first_stage_psnr(pipeline.vae, scenes), glyph)


@dataclass(frozen=True)
class Report:
    """The verdicts on a model's pictures, and its first stage's PSNR on held-out scenes (dB)."""

    rows: tuple[Judged, ...]
    psnr: float
    glyph: str = ""  # the object that all of the pictures are asked to show, if there is one

    def scores(self) -> list[Score]:
        """What the pictures show, most basic first; kinds of prompt that were not asked are left out."""
        single = [r.verdict for r in self.rows if not r.spec.relation]
        pair = [r.verdict for r in self.rows if r.spec.relation]
        found = [dict(zip(r.spec.objects, r.verdict.objects, strict=True)) for r in self.rows]
        table: list[tuple[str, list[bool], float | None]] = [
            (f"{self.glyph}, alone or beside another", [f[self.glyph] for f in found if self.glyph], TARGETS["object"]),
            ("background", [r.verdict.background for r in self.rows], TARGETS["background"]),
            ("single object, top-1", [v.objects[0] for v in single], TARGETS["object"]),
            ("single object, top-5", [v.objects_top5[0] for v in single], None),
            ("relation, both objects right", [v.relation for v in pair], TARGETS["relation"]),
            ("pair, both objects anywhere", [all(v.objects) for v in pair], None),
            ("pair, at least one object", [any(v.objects) for v in pair], None),
            ("all of the prompt", [r.verdict.all_right for r in self.rows], None),
        ]
        return [Score(name, sum(flags), len(flags), target) for name, flags, target in table if flags]

    def cells(self) -> list[tuple[str, ...]]:
        """The table's rows, the heading first."""
        return [*cells(self.scores()), ("first stage, PSNR", "", f"{self.psnr:.1f} dB", "", ">= 24 dB")]

    def table(self) -> str:
        """The scores as text."""
        return table(self.cells())

    def to_dict(self) -> dict[str, object]:
        """Scores and every picture's verdict, for JSON."""
        rows = [
            {
                "prompt": r.prompt, "seed": r.seed, "background": r.verdict.background, "objects": r.verdict.objects,
                "objects_top5": r.verdict.objects_top5, "relation": r.verdict.relation,
                "seen_background": r.verdict.seen_background,
                "seen": [{"name": s.name, "box": s.box, "fit": s.fit} for s in r.verdict.seen],
            }
            for r in self.rows
        ]  # fmt: skip
        return {"scores": as_json(self.scores()), "first_stage_psnr": self.psnr, "pictures": rows}

    def sheet(self, n: int = ON_SHEET) -> Image.Image:
        """The first n pictures in order, uncurated, each with its prompt: of singles and relations in their shares."""
        return contact_sheet([Image.fromarray(r.image) for r in self.rows[:n]], [r.prompt for r in self.rows[:n]])

    def save(self, folder: str | Path) -> None:
        """Write alignment.json, alignment.md and alignment.png into a folder, each by rename."""
        save_report(Path(folder), "alignment", self.to_dict(), self.cells(), self.sheet())
