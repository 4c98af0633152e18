"""`ldm eval quality`: how a model's pictures are distributed, and whether they are copies."""

from pathlib import Path
from typing import Annotated

import typer

from ldm.cli.common import Device, Dtype, Model, number, refuse_unwritable, whole
from ldm.cli.evaluate import judge, scenes_of


def quality(
    model: Model = None,
    n: Annotated[
        int, typer.Option("--n", "-n", parser=whole(20), metavar="N", help="held-out prompts, or pictures at most")
    ] = 500,
    seed: Annotated[
        int, typer.Option("--seed", parser=whole(0), metavar="N", help="of the first picture; the next ones count up")
    ] = 0,
    scheduler: Annotated[str | None, typer.Option("--scheduler", metavar="TEXT", help="absent = the model's")] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", parser=whole(), metavar="N", help="absent = the model's")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", parser=number, metavar="NUMBER", help="absent = the model's")
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="draw in the model's fast mode")] = False,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="the denoiser's YAML file, for an unusual corpus")
    ] = None,
    pictures: Annotated[
        Path | None, typer.Option("--pictures", metavar="FOLDER", help="judge these, and draw none")
    ] = None,
    classifier: Annotated[
        Path | None,
        typer.Option("--classifier", metavar="FOLDER", help="whose features; absent = the model's, or the box's"),
    ] = None,
    training: Annotated[
        int,
        typer.Option("--training-scenes", parser=whole(1), metavar="N", help="looked through for what was copied"),
    ] = 20_000,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="where table, figures and pictures go")
    ] = Path("out/quality"),
    as_json: Annotated[bool, typer.Option("--json", help="print the report as JSON in place of the table")] = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Compare pictures of held-out prompts with what a perfect model draws: FID, KID, precision, recall, near-copies of
    training scenes, and what the first stage keeps.
    """
    refuse_unwritable(output / "quality.json")
    from ldm.cli.opening import Opening, opened
    from ldm.evaluation.features import CLASSIFIER, open_classifier, read_pictures
    from ldm.evaluation.prompts import prompts
    from ldm.evaluation.quality import evaluate, judge_pictures
    from ldm.sources import model_in_the_box

    scenes = scenes_of(model, config)
    own = Path(model) if model and (Path(model) / CLASSIFIER).is_dir() else model_in_the_box()
    network = open_classifier(classifier or own)
    if pictures is not None:
        found = read_pictures(pictures, n)
        items = [judge_pictures(found, scenes, prompts(scenes, len(found)), network, training)]
        return judge(items, len(found), output, as_json)
    pipeline = opened(None, Opening(model=model, device=device, dtype=dtype, fast=fast))
    judged = evaluate(
        pipeline, scenes, prompts(scenes, n), network, seed,
        training=training, scheduler=scheduler, steps=steps, guidance=guidance,
    )  # fmt: skip
    judge(judged, n, output, as_json)
