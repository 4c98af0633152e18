"""What a run leaves to be read: figures as JSONL and a curve, pictures, TensorBoard's events if asked."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.checkpoints.safe import atomic_write
from ldm.errors import LdmError
from ldm.images import contact_sheet

ROWS = 8  # of progress.png
LOG, SAMPLES = "log.jsonl", "samples"


class Record:
    """A run's folder: log.jsonl, curve.png, samples/<step>.png; with report_to "tensorboard" its event files in logs/.

    LdmError: tensorboard was asked for and is not installed.
    """

    def __init__(self, folder: Path, report_to: str = "none") -> None:
        self.folder, self.log = folder, folder / LOG
        (folder / SAMPLES).mkdir(parents=True, exist_ok=True)
        self.events = _events(folder / "logs") if report_to == "tensorboard" else None

    def write(self, step: int, figures: dict[str, float]) -> None:
        """One line of the log."""
        with self.log.open("a") as file:
            file.write(json.dumps({"step": step} | {name: float(f"{v:.6g}") for name, v in figures.items()}) + "\n")
        if self.events is not None:
            for name, value in figures.items():
                self.events.add_scalar(name, value, step)
            self.events.flush()

    def picture(self, step: int, image: Image.Image) -> None:
        """What the model draws after a step, and the curve until then."""
        with atomic_write(self.folder / SAMPLES / f"{step:07}.png") as file:
            image.save(file, "PNG")
        if step:
            plot(self.log, self.folder / "curve.png")

    def sheet(self) -> None:
        """All pictures below each other, of many some, as progress.png."""
        paths = sorted((self.folder / SAMPLES).glob("*.png"))
        chosen = sorted({round(i * (len(paths) - 1) / max(1, ROWS - 1)) for i in range(ROWS)}) if paths else []
        shown = [Image.open(paths[i]).convert("RGB") for i in chosen]
        if shown:
            labels = [f"step {int(paths[i].stem)}" for i in chosen]
            with atomic_write(self.folder / "progress.png") as file:
                contact_sheet(shown, labels, 1, max(shown[0].size)).save(file, "PNG")


def _events(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise LdmError("tensorboard is not installed; pip install tensorboard, or leave out --report-to") from None
    return SummaryWriter(str(folder))


def rows_of(log: Path) -> list[dict[str, float]]:
    """A log's lines by step; of steps that a resumed run did again, the later ones count. A last line that was cut
    short is left out.
    """
    rows = {}
    for line in log.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # the run was killed while it wrote
            continue
        rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def plot(log: Path, path: Path) -> None:
    """The curves of a run's log, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = rows_of(log) if log.is_file() else []
    figure = pyplot.figure(figsize=(8, 4.5))
    axes = figure.add_axes((0.09, 0.11, 0.89, 0.86))
    for name in ("loss", "held_out_loss"):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=name.replace("_", " "), marker="." if "held" in name else "")
            axes.set(yscale="log")
            axes.legend()
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    with atomic_write(path) as file:
        figure.savefig(file, dpi=110, format="png")
    pyplot.close(figure)
