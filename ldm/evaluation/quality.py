"""How a model's pictures are distributed: FID, KID, precision and recall against rendered scenes of the same prompts,
near-copies of training scenes, and what the first stage keeps.

for item in evaluate(pipeline, scenes, prompts(scenes), open_classifier("weights")):   # a number after every picture
    ...                                                                                # drawn, then one Report
print(item.table())

Every number stands beside that of other rendered scenes of the same prompts, which a perfect model would draw.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ldm.data.emoji import EmojiScenes
from ldm.data.words import SceneSpec
from ldm.errors import UsageError
from ldm.evaluation.distances import BLOCKS, Coverage, Estimate, coverage, fid, kid
from ldm.evaluation.drawing import AS_IT_IS, Drawing, drawn
from ldm.evaluation.features import fitted
from ldm.evaluation.memorisation import (
    TRAINING_SCENES,
    Memory,
    embedding,
    memory,
    nearest,
    renderings,
    to_own,
)
from ldm.evaluation.reconstruction import Kept, first_stage_kept
from ldm.evaluation.scores import save_report, table
from ldm.images import contact_sheet
from ldm.models.classifier import SceneClassifier
from ldm.pipeline import Pipeline

LEAST = 2 * BLOCKS  # pictures that are judged
ON_SHEET = 16  # pictures on the sheet, each beside its nearest training scenes
DRAWN, RENDERED, REFERENCE = "drawn", "rendered", "reference"


@dataclass(frozen=True)
class Figures:
    """A set of pictures beside rendered scenes."""

    fid: float
    kid: Estimate | None  # None: the prompts are not known
    coverage: Coverage
    memory: dict[str, Memory]  # by space


@dataclass(frozen=True)
class Judged:
    """A picture and what is nearest to it."""

    name: str  # the prompt, or the file's name
    seed: int | None  # of its noise; None: it was not drawn here
    image: Image.Image
    scenes: dict[str, int]  # the nearest training scene in each space
    distances: dict[str, float]  # to it
    own: dict[str, float]  # to the nearest rendering of its prompt; {}: that is not known


def evaluate(
    pipeline: Pipeline,
    scenes: EmojiScenes,
    specs: Sequence[SceneSpec],
    network: SceneClassifier,
    how: Drawing = AS_IT_IS,
    training: int = TRAINING_SCENES,
) -> Iterator["int | Report"]:
    """Draw these prompts, picture i from noise seed `how.seed + i`, and compare them with scenes of `scenes`.

    Yields the number of pictures drawn after each, and at the end one Report. training: how many of the first training
    scenes of the corpus are looked through for copies. UsageError for fewer than 20 prompts. LdmError when the emoji
    font is not found.
    """
    _enough(len(specs))
    images: list[Image.Image] = []
    for image in drawn(pipeline, specs, how):
        images.append(Image.fromarray(image))
        yield len(images)
    names = [spec.caption() for spec in specs]
    kept = first_stage_kept(pipeline.vae, scenes, network, len(specs))
    yield report(images, names, scenes, specs, network, training, seed=how.seed, kept=kept)


def judge_pictures(
    pictures: dict[str, Image.Image],
    scenes: EmojiScenes,
    specs: Sequence[SceneSpec],
    network: SceneClassifier,
    training: int = TRAINING_SCENES,
) -> "Report":
    """The same of existing pictures by name, whose prompts are not known one by one; together they are to be of
    `specs`, as many. Without KID, which must leave out the pairs of one prompt; what is a near-copy is decided by the
    distance to training scenes alone. UsageError for fewer than 20.
    """
    _enough(len(pictures))
    return report(list(pictures.values()), list(pictures), scenes, specs, network, training)


def _enough(n: int) -> None:
    if n < LEAST:
        raise UsageError(f"{n} pictures; give at least {LEAST}, and some hundreds for numbers that mean something")


def report(
    images: Sequence[Image.Image],
    names: Sequence[str],
    scenes: EmojiScenes,
    specs: Sequence[SceneSpec],
    network: SceneClassifier,
    training: int,
    *,
    seed: int | None = None,
    kept: Kept | None = None,
) -> "Report":
    """Compare pictures with rendered scenes. seed: of the first, where picture i was drawn for specs[i]."""
    side, embed = scenes.config.size, embedding(network)
    sets = {
        DRAWN: embed(fitted(images, side)),
        RENDERED: embed(renderings(scenes, specs, RENDERED)),
        REFERENCE: embed(renderings(scenes, specs, REFERENCE)),
    }
    near = nearest(sets, scenes, training, embed)
    paired = seed is not None
    own = to_own({name: sets[name] for name in (DRAWN, RENDERED)}, scenes, specs, embed) if paired else {}
    figures = {}
    for name in (DRAWN, RENDERED):
        ours, truth = sets[name]["features"], sets[REFERENCE]["features"]
        near_copies = {s: memory(near[name][s], near[REFERENCE][s], own.get(name, {}).get(s)) for s in near[name]}
        figures[name] = Figures(
            fid(ours, truth), kid(ours, truth) if paired else None, coverage(ours, truth), near_copies
        )
    rows = tuple(
        Judged(
            name,
            None if seed is None else seed + i,
            image,
            {space: int(found.scene[i]) for space, found in near[DRAWN].items()},
            {space: float(found.distance[i]) for space, found in near[DRAWN].items()},
            {space: float(distances[i]) for space, distances in own.get(DRAWN, {}).items()},
        )
        for i, (name, image) in enumerate(zip(names, images, strict=True))
    )
    other = sum(image.size != (side, side) for image in images)
    note = f"{other} of {len(images)} pictures were resized to {side} x {side}" if other else ""
    return Report(rows, scenes, training, figures[DRAWN], figures[RENDERED], kept, note)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


ROWS: tuple[tuple[str, Callable[[Figures], str], str], ...] = (
    ("FID", lambda f: f"{f.fid:.3g}", "as rendered"),
    ("KID, x 1000", lambda f: f"{1000 * f.kid.value:.3g} +- {1000 * f.kid.error:.2g}" if f.kid else "", "0"),
    ("precision", lambda f: _percent(f.coverage.precision), "as rendered"),
    ("recall", lambda f: _percent(f.coverage.recall), "as rendered"),
    ("near-copies, by pixels", lambda f: _percent(f.memory["pixels"].copies), "<= 1 %"),
    ("near-copies, by features", lambda f: _percent(f.memory["features"].copies), "<= 1 %"),
    ("nearer to training than to its prompt, by pixels", lambda f: _percent(f.memory["pixels"].nearer), "as rendered"),
    ("... by features", lambda f: _percent(f.memory["features"].nearer), "as rendered"),
    ("distance to training, of the null's, by pixels", lambda f: f"{f.memory['pixels'].ratio:.2f}", "1"),
    ("... by features", lambda f: f"{f.memory['features'].ratio:.2f}", "1"),
)
"""Name, what is shown of it, what a perfect model has."""


@dataclass(frozen=True)
class Report:
    """The figures of a model's pictures, those of rendered scenes in their place, and what the first stage keeps."""

    rows: tuple[Judged, ...]
    scenes: EmojiScenes  # whose training scenes were looked through
    training: int  # how many
    drawn: Figures
    rendered: Figures
    kept: Kept | None = None  # None: no model drew
    note: str = ""  # what was done to the pictures

    def cells(self) -> list[tuple[str, ...]]:
        """The table's rows, the heading first."""
        found: list[tuple[str, ...]] = [("measure", "pictures", "drawn", "rendered", "perfect")]
        n = str(len(self.rows))
        found += [(name, n, shown(self.drawn), shown(self.rendered), perfect) for name, shown, perfect in ROWS]
        if self.kept is not None:
            found.append(("first stage, PSNR", n, f"{self.kept.psnr:.1f} dB", "", ""))
            found.append(("first stage, SSIM", n, f"{self.kept.ssim:.3f}", "", "1"))
            found.append(("first stage, rFID", n, f"{self.kept.rfid:.3g}", "", "0"))
        return found

    def table(self) -> str:
        """The figures as text."""
        return "\n".join(filter(None, (table(self.cells()), self.note)))

    def to_dict(self) -> dict[str, object]:
        """All figures, and every picture's nearest training scenes, for JSON."""
        rows = [
            {"name": r.name, "seed": r.seed, "scenes": r.scenes, "distances": r.distances, "own": r.own}
            for r in self.rows
        ]
        return {
            "drawn": _as_json(self.drawn),
            "rendered": _as_json(self.rendered),
            "first_stage": None if self.kept is None else self.kept._asdict(),
            "training_scenes": self.training,
            "note": self.note,
            "pictures": rows,
        }

    def sheet(self, n: int = ON_SHEET) -> Image.Image:
        """The n pictures that are nearest to a training scene by pixels, the nearest first, each beside that scene and
        the nearest by features. A person sees at once whether one is a copy.
        """
        images, words = [], []
        for row in sorted(self.rows, key=lambda row: row.distances["pixels"])[:n]:
            images.append(row.image)
            words.append(f"drawn: {row.name}")
            for space, index in row.scenes.items():
                scene = self.scenes.scene(index)
                images.append(Image.fromarray(scene.image))
                words.append(f"{row.distances[space]:.2g} by {space}: {scene.caption}")
        return contact_sheet(images, words, columns=6)

    def save(self, folder: str | Path) -> None:
        """Write quality.json, quality.md and quality.png into a folder, each by rename."""
        save_report(Path(folder), "quality", self.to_dict(), self.cells(), self.sheet())


def _as_json(f: Figures) -> dict[str, object]:
    memory = {space: found._asdict() for space, found in f.memory.items()}
    return {"fid": f.fid, "kid": f.kid and f.kid._asdict(), **f.coverage._asdict(), "memorisation": memory}
