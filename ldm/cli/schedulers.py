"""`ldm schedulers`: the ways to step from noise to picture."""

from pathlib import Path
from typing import Annotated

import typer

from ldm.cli.common import needs, refuse_unwritable, whole
from ldm.errors import choose

PLOTTED = (".png", ".svg", ".pdf")


def schedulers(
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="draw the noise levels each visits (.png, .svg, .pdf)")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", parser=whole(1, 1000), metavar="N", help="of the plot's runs")] = 20,
    model: Annotated[
        Path | None, typer.Option("--model", metavar="FOLDER", help="model folder; absent = the model in the box")
    ] = None,
) -> None:
    """List the schedulers, their other names and what they are."""
    from rich.console import Console
    from rich.table import Table

    from ldm.schedulers import SCHEDULERS

    if plot is not None:
        choose("plot suffix", plot.suffix.lower(), PLOTTED)
        needs("matplotlib")
        refuse_unwritable(plot)
        plot_levels(plot, steps, model)
        print(plot)
        return
    table = Table("name", "also known as", "what it is", box=None, header_style="bold", pad_edge=False)
    for row in SCHEDULERS.values():
        table.add_row(row.name, ", ".join((*row.aliases, row.diffusers_class)), row.description)
    Console(markup=False, highlight=False).print(table)


def plot_levels(path: Path, steps: int, model: Path | None) -> None:
    """The noise levels (sigma, logarithmic) of every scheduler's run on a model's schedule, as a figure."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from ldm.checkpoints.folder import SCHEDULER
    from ldm.checkpoints.safe import atomic_bytes, read_json
    from ldm.schedulers import SCHEDULERS, from_config
    from ldm.sources import model_in_the_box

    config = read_json((model or model_in_the_box()) / SCHEDULER)
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    for i, name in enumerate(SCHEDULERS):
        sampling = from_config(config, name)
        sigmas = sampling.scheduler.levels(sampling.schedule, steps, sampling.spacing).sigmas
        shown = [(k, sigma) for k, sigma in enumerate(sigmas) if 0 < sigma < 1e4]  # not 0, nor what stands for infinity
        line = ("-", "--", ":")[i % 3]
        axes.plot(*zip(*shown, strict=True), label=name, marker="o", markersize=4, alpha=0.7, linestyle=line)
    axes.set(xlabel="step", ylabel="sigma", yscale="log", title=f"noise levels of {steps} steps")
    axes.grid(alpha=0.3)
    axes.legend()
    data = io.BytesIO()
    figure.savefig(data, format=path.suffix[1:].lower(), dpi=110)
    pyplot.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_bytes(path, data.getvalue())
