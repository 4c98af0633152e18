"""Which choices make the model in the box better: every row of a table is trained, twice or more, and judged.

    python bench/recipes.py configs/experiments.yaml -o runs/experiments     # goes on where it was stopped
    python bench/recipes.py configs/experiments.yaml -o runs/experiments --table

The YAML file names a base (the three stages' configurations, small) and rows, each of which changes one thing in it:
fields of a stage or of the corpus, how pictures are drawn, or the length of the denoiser's average (`sigma_rel`).
Held-out losses compare only rows of one first stage and one target.
A stage whose configuration two rows share is trained once for each seed. Written after each run: OUT/results.jsonl.
"""

import argparse
import copy
import hashlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ldm.data.emoji import CorpusConfig, EmojiScenes
from ldm.evaluation.alignment import Report, evaluate
from ldm.evaluation.drawing import Drawing
from ldm.pipeline import Pipeline
from ldm.training.config import checked
from ldm.training.loop import RESULT
from ldm.training.posthoc import averaged, summands

Fields = dict[str, Any]
STAGES = ("first_stage", "clip", "denoiser")
JUDGED = ("drawing", "sigma_rel")


def changed(base: Fields, changes: Fields) -> Fields:
    """Nested fields with dotted ones put in place: {"loop.steps": 10}."""
    fields = copy.deepcopy(base)
    for key, value in changes.items():
        *parents, last = key.split(".")
        inner = fields
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return fields


def digest(fields: Any) -> str:
    """What tells one configuration from another."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]


def trained(name: str, fields: Fields, out: Path) -> Path:
    """The result folder of a stage, trained by its command unless it was before. SystemExit with its exit code when it
    is stopped or fails.
    """
    folder = out / f"{name}-{digest(fields)}"
    if not (folder / RESULT).is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(changed(fields, {"loop.out": str(folder)})), "utf-8")
        command = [sys.executable, "-m", "ldm", "train", name.replace("_", "-"), "--config", str(config)]
        if code := subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
            raise SystemExit(code)
    return folder / RESULT


def runs(plan: Fields) -> Iterator[tuple[str, int, dict[str, Fields], Fields]]:
    """(row, seed, fields of each stage, what is judged), row by row. What is judged has `drawing` and `sigma_rel`."""
    for row in [{"row": "base"}, *plan["rows"]]:
        for seed in plan["seeds"]:
            common = {"loop.seed": seed} | {
                f"corpus.{k}": v for k, v in (plan["corpus"] | row.get("corpus", {})).items()
            }
            stages = {name: changed(plan["base"][name], common | row.get(name, {})) for name in STAGES}
            yield row["row"], seed, stages, {key: row[key] for key in JUDGED if key in row}


def measured(stages: dict[str, Fields], judged: Fields, plan: Fields, out: Path) -> Fields:
    """The scores of a row's model; `seconds` are those of the training that was not done before."""
    begun = time.perf_counter()
    vae = trained("first_stage", stages["first_stage"], out)
    words = trained("clip", stages["clip"] | {"first_stage": str(vae)}, out)
    model = trained("denoiser", stages["denoiser"] | {"first_stage": str(vae), "clip": str(words)}, out)
    seconds = time.perf_counter() - begun
    scenes = EmojiScenes(checked(stages["denoiser"]["corpus"], CorpusConfig, "corpus"))
    pipeline = Pipeline.from_pretrained(str(model))
    if "sigma_rel" in judged:
        average = averaged(pipeline.unet, summands(model.parent, judged["sigma_rel"]))
        pipeline.unet.load_state_dict(average.state_dict())
    *_, report = evaluate(pipeline, scenes, plan["prompts"], Drawing(**judged.get("drawing", {})))
    assert isinstance(report, Report)
    scores = {score.name: score.share for score in report.scores()}
    log = [json.loads(line) for line in (model.parent / "log.jsonl").read_text().splitlines()]
    loss = next(row["held_out_loss"] for row in reversed(log) if "held_out_loss" in row)
    return {"seconds": seconds, "psnr": report.psnr, "held_out_loss": None if judged else loss, "scores": scores}


def table(results: list[Fields], plan: Fields) -> str:
    """Markdown: means over the seeds, of scores with their range."""
    shown = plan["shown"]
    lines = ["| row | seeds | minutes | PSNR | held-out loss | " + " | ".join(shown) + " |"]
    lines.append("|---|--:|--:|--:|--:|" + "--:|" * len(shown))
    for row in dict.fromkeys(result["row"] for result in results):
        own = [result for result in results if result["row"] == row]
        figures = [[r["seconds"] / 60 for r in own], [r["psnr"] for r in own], [r["held_out_loss"] for r in own]]
        cells = ["" if None in v else f"{statistics.mean(v):.{d}f}" for v, d in zip(figures, (1, 1, 3), strict=True)]
        for name in shown:
            scores = [100 * r["scores"][name] for r in own if name in r["scores"]]
            cells.append(f"{statistics.mean(scores):.0f} ({min(scores):.0f}..{max(scores):.0f})" if scores else "")
        lines.append(f"| {row} | {len(own)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Train and judge what is missing; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--table", action="store_true", help="print the table of what was run, and run nothing")
    parser.add_argument("--seeds", type=int, nargs="+", help="of these seeds alone: as one of several processes")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so long")
    args = parser.parse_args()
    plan = yaml.safe_load(args.plan.read_text("utf-8"))
    kept, begun = args.out / "results.jsonl", time.monotonic()
    results = [json.loads(line) for line in kept.read_text().splitlines()] if kept.is_file() else []
    known = {result["of"]: result for result in results}
    shown = []
    for row, seed, stages, judged in runs(plan):
        of = digest([row, stages, judged, plan["prompts"]])
        if of not in known:
            others = args.seeds and seed not in args.seeds
            if args.table or others or time.monotonic() - begun > 60 * args.minutes:
                continue
            known[of] = {"row": row, "seed": seed, "of": of, **measured(stages, judged, plan, args.out)}
            print(json.dumps(known[of]), flush=True)
            with kept.open("a") as file:
                file.write(json.dumps(known[of]) + "\n")
        shown.append(known[of])
    print(table(shown, plan))


if __name__ == "__main__":
    main()
