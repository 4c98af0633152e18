"""Does the picture show what the prompt says? Judged from the corpus' ground truth, without any network.

for item in evaluate(pipeline, EmojiScenes()):   # a Judged after every picture, then one Report
    ...
print(item.table())
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm.data.emoji import EmojiScenes
from ldm.data.words import SceneSpec
from ldm.errors import UsageError
from ldm.evaluation.classes import Classes
from ldm.evaluation.drawing import AS_IT_IS, Drawing, drawn
from ldm.evaluation.judging import Judge, Verdict
from ldm.evaluation.prompts import CATEGORIES, LOOKS, PROMPTS, GlyphScenes, category_of, glyph_prompts, prompts
from ldm.evaluation.reconstruction import first_stage_psnr
from ldm.evaluation.scores import Cells, Score, as_json, cells, save_report, table
from ldm.images import contact_sheet
from ldm.pipeline import Pipeline

ON_SHEET = 40  # pictures on the sample sheet
BACKGROUND = "background"
TARGETS = {"single object": 0.85, "counting": 0.60, "position": 0.60, BACKGROUND: 0.97}
TAUGHT = 0.70  # of the pictures that are to show what an adapter taught
PSNR_TARGET = 26  # dB


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
    n: int = PROMPTS,
    how: Drawing = AS_IT_IS,
    *,
    seen: bool = False,
    looks: bool = False,
) -> Iterator["Judged | Report"]:
    """Draw the first n of the fixed held-out prompts of a corpus, picture i from noise seed `how.seed + i`, and judge
    them.

    Of a GlyphScenes they are those of `glyph_prompts`. seen: combinations that training may see, in place of those held
    out of it. looks: sizes and styles, in place of GenEval's categories.
    Yields a Judged after every picture (for progress), and at the end one Report. UsageError for n < 1, and for the
    looks of a GlyphScenes. LdmError when the emoji font is not found.
    """
    if n < 1:
        raise UsageError(f"{n} prompts were asked for; judge at least one")
    taught = scenes if isinstance(scenes, GlyphScenes) else None
    if taught and looks:
        raise UsageError(f"{taught.name!r} has prompts of its own, without sizes and styles; leave looks (--looks) out")
    specs = glyph_prompts(taught, n, seen=seen) if taught else prompts(scenes, n, seen=seen, looks=looks)
    judge, rows, psnr = Judge(scenes), [], first_stage_psnr(pipeline.vae, scenes)
    for i, (spec, image) in enumerate(zip(specs, drawn(pipeline, specs, how), strict=True)):
        rows.append(Judged(i, n, how.seed + i, spec, image, judge.judge(image, spec)))
        yield rows[-1]
    yield Report(tuple(rows), psnr, judge.classes, taught.name if taught else "", seen)


@dataclass(frozen=True)
class Report:
    """The verdicts on a model's pictures, and its first stage's PSNR on held-out scenes (dB)."""

    rows: tuple[Judged, ...]
    psnr: float
    classes: Classes  # of objects that count for each other
    glyph: str = ""  # the object that all of the pictures are asked to show, if there is one
    seen: bool = False  # whether the prompts are combinations that training may see

    def categories(self, exactly: bool = False) -> list[Score]:
        """Of each category that was asked: objects up to classes or exactly, relation and number."""
        of_it: dict[str, list[bool]] = {name: [] for name in CATEGORIES | LOOKS}
        for row in self.rows:
            of_it[category_of(row.spec)].append(row.verdict.exactly_right if exactly else row.verdict.right)
        return [Score.counted(name, flags, TARGETS.get(name)) for name, flags in of_it.items() if flags]

    def mean(self, exactly: bool = False) -> float:
        """The mean of the categories: of GenEval's the overall score."""
        shares = [score.share for score in self.categories(exactly)]
        return sum(shares) / len(shares)

    def scores(self, exactly: bool = False) -> list[Score]:
        """What the pictures show, with objects right up to classes, or exactly."""
        verdicts = [r.verdict for r in self.rows]
        whole = [v.background and (v.exactly_right if exactly else v.right) for v in verdicts]
        found = [
            *self.categories(exactly),
            Score.counted(BACKGROUND, [v.background for v in verdicts], TARGETS[BACKGROUND]),
        ]
        if self.glyph:
            taught = [(v.exact if exactly else v.objects)[r.spec.objects.index(self.glyph)]
                      for r, v in zip(self.rows, verdicts, strict=True)]  # fmt: skip
            found = [Score.counted(f"{self.glyph}, alone or beside another", taught, TAUGHT), *found]
        return [*found, Score.counted("all of the prompt", whole)]

    def cells(self) -> Cells:
        """The table's rows, the heading first."""
        exactly = ["exactly", *(f"{score.share:.1%}" for score in self.scores(exactly=True))]
        return [
            *((*row, exact) for row, exact in zip(cells(self.scores()), exactly, strict=True)),
            ("mean of the categories", "", f"{self.mean():.1%}", "", "", f"{self.mean(exactly=True):.1%}"),
            ("first stage, PSNR", "", f"{self.psnr:.1f} dB", "", f">= {PSNR_TARGET} dB", ""),
        ]

    def notes(self) -> str:
        """Which prompts these are, and which objects count for each other."""
        alike = "; ".join(", ".join(members) for members in self.classes) or "none"
        said = "that training may see" if self.seen else "held out of training"
        return f"Prompts: combinations {said}. Objects that cannot be told apart at this size: {alike}."

    def table(self) -> str:
        """The scores as text."""
        return f"{table(self.cells())}\n{self.notes()}"

    def to_dict(self) -> dict[str, object]:
        """Scores and every picture's verdict, for JSON."""
        rows = [
            {
                "prompt": r.prompt, "category": category_of(r.spec), "seed": r.seed, "right": r.verdict.right,
                "exactly_right": r.verdict.exactly_right, "background": r.verdict.background,
                "objects": r.verdict.objects, "objects_exactly": r.verdict.exact, "relation": r.verdict.relation,
                "count": r.verdict.count, "seen_background": r.verdict.seen_background,
                "seen": [{"name": s.name, "box": s.box, "fit": s.fit} for s in r.verdict.seen],
            }
            for r in self.rows
        ]  # fmt: skip
        return {
            "prompts": "seen" if self.seen else "held out",
            "scores": as_json(self.scores()),
            "scores_exactly": as_json(self.scores(exactly=True)),
            "mean_of_categories": self.mean(),
            "mean_of_categories_exactly": self.mean(exactly=True),
            "first_stage_psnr": self.psnr,
            "classes": self.classes,
            "pictures": rows,
        }

    def sheet(self, n: int = ON_SHEET) -> Image.Image:
        """The first n pictures in order, uncurated, each with its prompt: of all categories in their shares."""
        return contact_sheet([Image.fromarray(r.image) for r in self.rows[:n]], [r.prompt for r in self.rows[:n]])

    def save(self, folder: str | Path) -> None:
        """Write alignment.json, alignment.md and alignment.png into a folder, each by rename."""
        save_report(Path(folder), "alignment", self.to_dict(), self.cells(), self.sheet(), self.notes())
