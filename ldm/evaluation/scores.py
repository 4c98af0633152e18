"""Shares of pictures with what is known of them: as a table, as Markdown, as JSON, and in a folder."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ldm.checkpoints.safe import atomic_json, atomic_text
from ldm.images import save

Cells = Sequence[tuple[str, ...]]
"""The rows of a table, the heading first."""


@dataclass(frozen=True)
class Score:
    """`right` of `of` pictures, with the binomial 95 % interval of Wilson (1927) for the share."""

    name: str
    right: int
    of: int
    target: float | None = None

    @classmethod
    def counted(cls, name: str, flags: Sequence[bool], target: float | None = None) -> "Score":
        """Of verdicts, one a picture."""
        return cls(name, sum(flags), len(flags), target)

    @property
    def share(self) -> float:
        """right / of."""
        return self.right / self.of

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper bound: p + z^2/2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2), over 1 + z^2/n, at z = 1.96."""
        z2 = 1.959964**2 / self.of
        middle = self.share + z2 / 2
        half = math.sqrt(z2 * (self.share * (1 - self.share) + z2 / 4))
        return max(0.0, (middle - half) / (1 + z2)), min(1.0, (middle + half) / (1 + z2))


def cells(scores: Sequence[Score]) -> list[tuple[str, ...]]:
    """A row for each score."""
    rows: list[tuple[str, ...]] = [("score", "pictures", "right", "95 % interval", "target")]
    for s in scores:
        low, high = s.interval
        target = "" if s.target is None else f">= {s.target:.0%}"
        rows.append((s.name, str(s.of), f"{s.share:.1%}", f"{low:.1%} .. {high:.1%}", target))
    return rows


def table(rows: Cells) -> str:
    """As text."""
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def markdown(rows: Cells) -> str:
    """As a Markdown table, names to the left, intervals in the middle, all else to the right."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    sides = ("---", "--:", "--:", ":-:", *("--:",) * len(rows[0]))[: len(rows[0])]
    return "\n".join([head, f"|{'|'.join(sides)}|", *body])


def as_json(scores: Sequence[Score]) -> list[dict[str, object]]:
    """For JSON."""
    return [
        {"name": s.name, "right": s.right, "of": s.of, "share": s.share, "interval": s.interval, "target": s.target}
        for s in scores
    ]


def save_report(
    folder: Path, name: str, report: Mapping[str, object], rows: Cells, sheet: Image.Image, notes: str = ""
) -> None:
    """Write NAME.json, NAME.md and NAME.png into a folder, each by rename. notes: a line below the table."""
    folder.mkdir(parents=True, exist_ok=True)
    atomic_json(folder / f"{name}.json", report)
    atomic_text(folder / f"{name}.md", "\n\n".join(filter(None, (markdown(rows), notes))) + "\n")
    save(sheet, folder / f"{name}.png")
