"""Every scheduler at several numbers of steps, from one seed, on one labelled sheet.

    python examples/schedulers_compared.py out/schedulers --steps 5 10 20

Those without fresh noise come to one picture as steps are added; those with it draw another one each time.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import ldm
from ldm.grid import plot
from ldm.images import save
from ldm.schedulers import SCHEDULERS


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the sheet."""
    parser = argparse.ArgumentParser(description="Compare the schedulers.")
    parser.add_argument("out", type=Path, help="folder of the sheet")
    parser.add_argument("--prompt", default="an owl on a yellow background")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20])
    chosen = parser.parse_args(arguments)

    pipeline = ldm.Pipeline.from_pretrained()
    cells = []
    for name in SCHEDULERS:
        for steps in chosen.steps:
            drawn = pipeline(chosen.prompt, seed=chosen.seed, scheduler=name, num_inference_steps=steps)
            cells += drawn.images
        print(name)
    sheet = plot(cells, [f"{n} steps" for n in chosen.steps], list(SCHEDULERS), f"{chosen.prompt}, seed {chosen.seed}")
    chosen.out.mkdir(parents=True, exist_ok=True)
    save(sheet, chosen.out / "schedulers.png")
    print(chosen.out / "schedulers.png")


if __name__ == "__main__":
    main()
