"""Draws docs/convergence.png, how fast the schedulers converge, and writes docs/schedulers.md, the tables of them.

    python docs/convergence.py            # both, about a minute
    python docs/convergence.py --check    # exit code 1 when the page is stale; draws nothing

The picture needs no model: the denoiser of a mixture of Gaussians is known in closed form, and so is the solution, to
nine digits, from a Runge-Kutta run of 400 steps. Runs go from the highest to the lowest level of Stable Diffusion's
schedule; the last step of a real run, to 0, is left out, for it is everybody's Euler step.
"""

import io
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.checkpoints.safe import atomic_bytes
from ldm.diffusion import Estimate, NoiseSchedule
from ldm.diffusion.grids import GRIDS, grid
from ldm.schedulers import SCHEDULERS, Scheduler

PAGE, PICTURE = (Path(__file__).with_name(name) for name in ("schedulers.md", "convergence.png"))
SCHEDULE = NoiseSchedule.scaled_linear()
LOW, HIGH = float(SCHEDULE.sigmas[0]), float(SCHEDULE.sigmas[-1])
ORDERS = {
    "ddim": 1, "ddpm": 1, "euler": 1, "euler_ancestral": 1, "lcm": 1, "tcd": 1, "pndm": 4, "lms": 4, "heun": 2,
    "dpm2": 2, "dpmpp_2s_ancestral": 2, "dpmpp_sde": 2, "deis": 2, "unipc": 2, "multistep": 2, "singlestep": 2,
}  # fmt: skip
"""Solver -> its order as its authors count it, where no option says another."""
HEADING = """# Schedulers

*Made by `docs/convergence.py` from the tables in `ldm/schedulers` and `ldm/diffusion/grids.py`; do not edit.*

A scheduler is a solver and the noise levels it visits. `--scheduler` takes any name of the first table below, in any
case, also with a grid behind it: `"DPM++ 2M Karras"`, `dpmpp_2m_karras`. `--schedule-type` takes any name of the
second, or `leading`, `trailing`, `linspace`, diffusers' spacings of the times; without it the model's own configuration
says which.

| for | take |
|---|---|
| good pictures in 20 steps | `dpm++2m`, with the grid `karras` |
| good pictures in 10 steps | `unipc`, or `dpm++2m` with the grid `ays` on Stable Diffusion and SDXL |
| the same picture, only finer, with more steps | any that draws no noise |
| another picture with every number of steps, often richer | `euler_a`, `dpm++sde`, `dpm++2m_sde` |
| turning a picture into noise and back | `ddim` |
| models distilled to few steps | `lcm`, `tcd`, or `euler` with `trailing` or `sgm_uniform`, as the model's page says |
| sampling as the model was trained | `ddpm`, a step for each of its timesteps |

## How fast they converge

![error against network calls, for the deterministic schedulers and for the grids](convergence.png)

Each line is a scheduler (above) or a grid (below), the number at its end the order in which its error fell over the
last doubling; two names share a line where their numbers are the same. The denoiser is that of a mixture of Gaussians,
so that the error is known; a trained network adds errors of its own, which no scheduler mends, so look for what is low
early, at 12 to 24 calls, rather than at the far end.
"""
CALLS = (6, 12, 24, 48, 96, 192, 384)  # all divisible by the 2 and 3 steps of singlestep turns
MEANS = torch.tensor([[-1.0, 0.0], [0.6, 0.9], [0.7, -0.5]], dtype=torch.float64)
WEIGHTS, DEVIATION = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64), 0.25
Curve = tuple[list[int], list[float]]  # network calls and errors of the runs of one line


class Draws(Exception):
    """The scheduler is not deterministic."""


def denoise(x: Tensor, sigma: float) -> Estimate:
    """E[x0 | x] where x0 is of the mixture and x = x0 + sigma * noise: [B, 1, 1, 2], float64."""
    variance = DEVIATION**2 + sigma**2
    away = x.flatten(1)[:, None] - MEANS  # [B, component, 2]
    share = (WEIGHTS.log() - away.square().sum(-1) / (2 * variance)).softmax(1)
    return Estimate((share[..., None] * (MEANS + DEVIATION**2 / variance * away)).sum(1).view_as(x))


def exact(x: Tensor, steps: int = 400) -> Tensor:
    """The solution of dx / dlog(sigma) = x - x0 from HIGH to LOW, by the classical method of order 4."""

    def slope(at: Tensor, u: float) -> Tensor:
        return at - denoise(at, math.exp(u)).x0

    h = math.log(LOW / HIGH) / steps
    for i in range(steps):
        u = math.log(HIGH) + i * h
        k1 = slope(x, u)
        k2 = slope(x + h / 2 * k1, u + h / 2)
        k3 = slope(x + h / 2 * k2, u + h / 2)
        k4 = slope(x + h * k3, u + h)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def levels(name: str, n: int) -> list[float]:
    """n steps of a grid from HIGH, that end at LOW."""
    sigmas = grid(name, n, LOW, HIGH, SCHEDULE).tolist()
    return grid(name, n + 1, LOW, HIGH, SCHEDULE).tolist() if sigmas[-1] == LOW else [*sigmas, LOW]


def curve(row: Scheduler, grid_name: str, x: Tensor, there: Tensor, counts: Sequence[int] = CALLS) -> Curve:
    """The errors (root mean square) of a scheduler's runs, as it is without options. Draws: they are random."""

    def noise(sigma: float, sigma_next: float) -> Tensor:
        raise Draws

    calls, errors = [], []
    for most in counts:
        *_, step = row.bound({}, SCHEDULE)(denoise, x, levels(grid_name, most // row.calls[0]), noise, None)
        calls.append(step.calls)
        errors.append(float((step.x - there).square().mean().sqrt()))
    return calls, errors


def by_scheduler(modules: Sequence[str], grid_name: str, x: Tensor, there: Tensor) -> Iterator[tuple[str, Curve]]:
    """The deterministic schedulers whose solvers lie in these files of ldm/schedulers."""
    for row in SCHEDULERS.values():
        if row.solver.__module__.rpartition(".")[2] in modules:
            try:
                yield row.name, curve(row, grid_name, x, there)
            except Draws:
                continue


def by_grid(scheduler: str, x: Tensor, there: Tensor) -> Iterator[tuple[str, Curve]]:
    """The grids that begin at HIGH and are made for every model, walked by one scheduler."""
    for name, row in GRIDS.items():
        if "xl" not in row.needs and math.isclose(levels(name, 6)[0], HIGH):
            yield name, curve(SCHEDULERS[scheduler], name, x, there)


def panel(axes: Any, title: str, lowest: float, lines: Iterable[tuple[str, Curve]]) -> None:
    """One panel: a line a scheduler or grid, down to the error `lowest`; at its end its name, and its order there."""
    found: list[tuple[list[str], Curve]] = []
    for name, (calls, errors) in lines:
        same = next((names for names, (_, known) in found if np.allclose(errors, known, rtol=1e-4, atol=0)), None)
        if same is None:
            found.append(([name], (calls, errors)))
        else:
            same.append(name)
    found.sort(key=lambda one: one[1][1][-1])
    height, apart = -math.inf, 0.045 * math.log10(1 / lowest)
    for i, (names, (calls, errors)) in enumerate(found):
        axes.plot(calls, errors, marker="o", markersize=3, linewidth=1.4, color=f"C{i}")
        height = max(math.log10(errors[-1]), height + apart)  # the labels keep apart
        order = math.log(errors[-2] / errors[-1]) / math.log(calls[-1] / calls[-2])
        label = f"{' = '.join(names[:2])}  {order:.1f}" if len(names[0]) < 8 else f"{names[0]}  {order:.1f}"
        axes.annotate(
            label, (calls[-1], errors[-1]), (CALLS[-1] * 1.25, 10**height), fontsize=9, color=f"C{i}", va="center",
            annotation_clip=False,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=(5, CALLS[-1] * 1.15), ylim=(lowest, 1))
    axes.set_title(title, fontsize=10.5)
    axes.set_xticks(CALLS, [str(calls) for calls in CALLS])
    axes.minorticks_off()
    axes.grid(alpha=0.25)


def draw() -> None:
    """docs/convergence.png: 900 pixels wide, 64 colours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    x = HIGH * torch.randn(32, 1, 1, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    there = exact(x)
    plain = ("ddim", "ddpm", "second_order", "linear_multistep")
    panels = (
        ("Euler, Heun, linear multistep (grid: karras)", 3e-8, by_scheduler(plain, "karras", x, there)),
        ("DPM-Solver, UniPC (grid: karras)", 3e-8, by_scheduler(("dpm_solver", "unipc"), "karras", x, there)),
        ("grids (scheduler: euler)", 3e-6, by_grid("euler", x, there)),
        ("grids (scheduler: dpm++2m)", 3e-6, by_grid("dpm++2m", x, there)),
    )
    figure, rows = pyplot.subplots(2, 2, figsize=(9, 8.4), dpi=100, layout="constrained")
    for axes, shown in zip(rows.flat, panels, strict=True):
        panel(axes, *shown)
    figure.supxlabel("network calls")
    figure.supylabel("error at the lowest level, root mean square (of the data itself: 0.7)")
    data = io.BytesIO()
    figure.savefig(data, format="png")
    pyplot.close(figure)
    with Image.open(data) as image:
        small = image.convert("RGB").quantize(64, dither=Image.Dither.NONE)
    data = io.BytesIO()
    small.save(data, "PNG", optimize=True)
    atomic_bytes(PICTURE, data.getvalue())


def draws(row: Scheduler) -> bool:
    """Whether the scheduler, as it is without options, draws noise."""
    x = HIGH * torch.ones(1, 1, 1, 2, dtype=torch.float64)
    try:
        curve(row, "karras", x, x, CALLS[:1])
    except Draws:
        return True
    return False


def page() -> str:
    """The whole page."""
    return "\n".join([HEADING, *scheduler_lines(), *grid_lines()])


def scheduler_lines() -> Iterator[str]:
    """The table of schedulers."""
    yield "## The schedulers\n\nNetwork calls are those of a step. A class of diffusers stands at its first name."
    yield "\n| name | A1111, others | diffusers | order | calls | noise | what it is |\n|---|---|---|--:|--:|---|---|"
    classes: set[str] = set()
    for row in SCHEDULERS.values():
        order = row.fixed.get("solver_order", ORDERS[row.solver.__name__])
        noise = (row.noise if draws(row) else "none") + " (`eta`)" * ("eta" in row.options)
        theirs = [name.removesuffix("Scheduler") for name in row.classes if name not in classes]
        classes |= set(row.classes)
        named = [", ".join(filter(None, (row.label, *row.aliases))), ", ".join(f"`{name}`" for name in theirs)]
        cells = [f"`{row.name}`", *named, str(order), str(row.calls[0]), noise, row.description]
        yield f"| {' | '.join(cells)} |"
    yield (
        "\n`fresh` noise is a new tensor for every step; `brownian` noise is the way along one path, the same for any"
        "\nnumber of steps of one seed; `eta` makes it more or less.\n"
    )


def grid_lines() -> Iterator[str]:
    """The table of grids."""
    yield "## The grids of noise levels\n\n| name | A1111 | diffusers | what it is |\n|---|---|---|---|"
    for row in GRIDS.values():
        cells = [f"`{row.name}`", row.label, f"`{row.field}`" if row.field else "", row.description]
        yield f"| {' | '.join(cells)} |"
    yield (
        "\nA grid fills the range of levels that the model was trained on, or with the schedulers of diffusers' Euler"
        "\nfamily, as there, the range that the spacing would visit. No level is visited twice: of a model with T"
        "\ntimesteps `simple` has at most T steps and `ddim_uniform` T - 1.\n"
    )


def main(arguments: Sequence[str]) -> int:
    """Draw the picture and write the page, or with --check compare the page."""
    fresh = page()
    if "--check" in arguments:
        if PAGE.is_file() and PAGE.read_text("utf-8") == fresh:
            return 0
        print(f"{PAGE.name} is stale; run: python docs/convergence.py", file=sys.stderr)
        return 1
    PAGE.write_text(fresh, "utf-8")
    draw()
    print(PAGE, PICTURE, PICTURE.stat().st_size)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
