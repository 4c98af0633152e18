"""`ldm schedulers`: the ways to step from noise to picture, and the noise levels to do it on."""

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ldm.cli.common import needs, refuse_unwritable, whole
from ldm.errors import choose

if TYPE_CHECKING:
    from rich.table import Table

    from ldm.schedulers import Scheduler

PLOTTED = (".png", ".svg", ".pdf")


def schedulers(
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="draw the noise levels each visits (.png, .svg, .pdf)")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", parser=whole(1, 1000), metavar="N", help="of the plot's runs")] = 20,
    model: Annotated[
        Path | None, typer.Option("--model", metavar="FOLDER", help="model folder; absent = the model in the box")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="both lists, with all names, as a JSON object on stdout")
    ] = False,
) -> None:
    """List the schedulers and the grids of noise levels, their names elsewhere and what they are."""
    if plot is not None:
        choose("plot suffix", plot.suffix.lower(), PLOTTED)
        needs("matplotlib")
        refuse_unwritable(plot)
        plot_levels(plot, steps, model)
        print(plot)
    elif as_json:
        print(json.dumps(told()))
    else:
        show(told())


def told() -> dict[str, list[dict[str, Any]]]:
    """The rows of both lists. calls: of the network in a step. noise: "none", "fresh" of a run that adds noise, "eta"
    of one that does once an eta is given.
    """
    from ldm.diffusion.grids import GRIDS
    from ldm.schedulers import SCHEDULERS

    return {
        "schedulers": [
            {
                "name": row.name, "a1111": row.label, "aliases": list(row.aliases), "diffusers": list(row.classes),
                "calls": row.calls[0], "noise": noise_of(row), "description": row.description,
            }
            for row in SCHEDULERS.values()
        ],
        "schedule_types": [
            {"name": row.name, "a1111": row.label, "aliases": list(row.aliases), "description": row.description}
            for row in GRIDS.values()
        ],
    }  # fmt: skip


def noise_of(row: "Scheduler") -> str:
    """Whether a run draws noise when nothing is said of it."""
    defaults = {name: p.default for name, p in inspect.signature(row.solver).parameters.items()}
    chosen = defaults | dict(row.fixed) | dict(row.defaults)
    if not row.noise or "sde" not in str(chosen.get("algorithm_type", "sde")):
        return "none"
    return "fresh" if chosen.get("eta", 1) else "eta"


def show(lists: dict[str, list[dict[str, Any]]]) -> None:
    """Both lists, for 80 columns and more."""
    from rich.console import Console
    from rich.text import Text

    console = Console(markup=False, highlight=False)
    table = listing("name, in A1111", "calls", "noise", "what it is, its class in diffusers")
    for row in lists["schedulers"]:
        name = Text.assemble((row["name"], "bold"), f"\n{row['a1111']}")
        table.add_row(name, str(row["calls"]), row["noise"], "\n".join([row["description"], *row["diffusers"][:1]]))
    console.print(table)
    table = listing("name", "in A1111", "what it is")
    for row in lists["schedule_types"]:
        table.add_row(Text(row["name"], "bold"), row["a1111"], row["description"])
    console.print("\nNoise levels that --schedule-type lays out in place of the model's own:\n")
    console.print(table)
    console.print("\nIt also takes leading, trailing and linspace, diffusers' timestep_spacing.")


def listing(*heads: str) -> "Table":
    """An empty table."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for head in heads:
        table.add_column(head, no_wrap=not head.startswith("what"))
    return table


def plot_levels(path: Path, steps: int, model: Path | None) -> None:
    """The noise levels (sigma, logarithmic) of runs on a model's schedule, as a figure: of every scheduler, and of
    Euler on every grid. Those that visit the same levels share a line.
    """
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from ldm.checkpoints.folder import SCHEDULER
    from ldm.checkpoints.safe import atomic_bytes, read_json
    from ldm.diffusion.grids import GRIDS
    from ldm.schedulers import SCHEDULERS, from_config
    from ldm.sources import model_in_the_box

    config = read_json((model or model_in_the_box()) / SCHEDULER)
    runs = {
        name: from_config(config, name) for name, row in SCHEDULERS.items() if steps <= 50 or row.family != "distilled"
    }
    runs |= {f"grid {name}": from_config(config, "euler", schedule_type=name) for name in GRIDS}
    alike: dict[tuple[tuple[int, float], ...], list[str]] = {}
    for name, sampling in runs.items():
        sigmas = sampling.levels(steps).sigmas
        shown = tuple((k, sigma) for k, sigma in enumerate(sigmas) if 0 < sigma < 1e4)  # not what stands for infinity
        alike.setdefault(shown, []).append(name)
    figure, axes = pyplot.subplots(figsize=(10, 5.5), layout="constrained")
    for i, (shown, names) in enumerate(alike.items()):
        line, label = ("-", "--", ":")[i % 3], ", ".join(names[:3]) + (f" and {len(names) - 3} more" * (len(names) > 3))
        axes.plot(*zip(*shown, strict=True), label=label, marker="o", markersize=4, alpha=0.7, linestyle=line)
    axes.set(xlabel="step", ylabel="sigma", yscale="log", title=f"noise levels of {steps} steps")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    data = io.BytesIO()
    figure.savefig(data, format=path.suffix[1:].lower(), dpi=110)
    pyplot.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_bytes(path, data.getvalue())
