"""`ldm eval`: judge a model."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ldm.cli.common import Device, Dtype, Model, examples, number, progress_bar, refuse_unwritable, say, whole
from ldm.errors import UsageError

if TYPE_CHECKING:
    from ldm.data.emoji import CorpusConfig, EmojiScenes

Seed = Annotated[
    int, typer.Option("--seed", parser=whole(0), metavar="N", help="of the first picture; the next ones count up")
]
SchedulerName = Annotated[str | None, typer.Option("--scheduler", metavar="TEXT", help="absent = the model's")]
Steps = Annotated[int | None, typer.Option("--steps", parser=whole(), metavar="N", help="absent = the model's")]
Guidance = Annotated[
    float | None, typer.Option("--guidance", parser=number, metavar="NUMBER", help="absent = the model's")
]
Fast = Annotated[bool, typer.Option("--fast", help="draw in the model's fast mode")]
Config = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="the denoiser's YAML file, for an unusual corpus")
]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="where table, verdicts and pictures go")]
AsJson = Annotated[bool, typer.Option("--json", help="print the report as JSON in place of the table")]

app = typer.Typer(help="Judge a model.", epilog=examples("ldm eval alignment"))


@app.callback()
def group() -> None:
    """Judge a model."""


@app.command(
    epilog=examples(
        "ldm eval alignment",
        "ldm eval alignment --model path/to/model-folder --n 50 -o out/judged --json",
        "ldm eval alignment --lora zorbik.safetensors --glyph zorbik=zorbik.png",
    )
)
def alignment(
    model: Model = None,
    n: Annotated[int, typer.Option("--n", "-n", parser=whole(1), metavar="N", help="prompts")] = 500,
    seed: Seed = 0,
    seen: Annotated[
        bool, typer.Option("--seen", help="ask for combinations that training may see, instead of those held out of it")
    ] = False,
    looks: Annotated[
        bool, typer.Option("--looks", help="ask for sizes and styles in place of GenEval's categories")
    ] = False,
    scheduler: SchedulerName = None,
    steps: Steps = None,
    guidance: Guidance = None,
    config: Config = None,
    lora: Annotated[
        list[Path] | None, typer.Option("--lora", metavar="FILE[:STRENGTH]", help="draw with it; may be repeated")
    ] = None,
    fast: Fast = False,
    glyph: Annotated[
        str | None,
        typer.Option("--glyph", metavar="NAME=PICTURE", help="ask for an object that it taught instead"),
    ] = None,
    output: Output = Path("out/alignment"),
    as_json: AsJson = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Judge whether pictures show what their prompts say, in GenEval's categories or in sizes and styles."""
    refuse_unwritable(output / "alignment.json")
    from ldm.cli.opening import Opening, opened
    from ldm.evaluation.alignment import evaluate
    from ldm.evaluation.drawing import Drawing

    scenes = scenes_of(model, config)
    scenes = with_glyph(glyph, scenes.config) if glyph else scenes
    pipeline = opened(None, Opening(model=model, device=device, dtype=dtype, lora=lora, fast=fast))
    how = Drawing(seed, scheduler, steps, guidance)
    judge(evaluate(pipeline, scenes, n, how, seen=seen, looks=looks), n, output, as_json)


@app.command(epilog=examples("ldm eval inpainting", "ldm eval inpainting --model path/to/model-folder -n 20 --json"))
def inpainting(
    model: Model = None,
    n: Annotated[int, typer.Option("--n", "-n", parser=whole(1), metavar="N", help="pictures to edit")] = 100,
    seed: Seed = 0,
    config: Config = None,
    output: Output = Path("out/inpainting"),
    as_json: AsJson = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Judge whether inpainting replaces an object by the one it is told, and keeps the rest to the byte."""
    refuse_unwritable(output / "inpainting.json")
    from ldm.cli.opening import Opening, opened
    from ldm.evaluation.inpainting import evaluate

    scenes = scenes_of(model, config)
    pipeline = opened(None, Opening(model=model, device=device, dtype=dtype))
    judge(evaluate(pipeline, scenes, n, seed), n, output, as_json)


@app.command(epilog=examples("ldm eval quality", "ldm eval quality --pictures out/drawn --json"))
def quality(
    model: Model = None,
    n: Annotated[
        int, typer.Option("--n", "-n", parser=whole(20), metavar="N", help="held-out prompts, or pictures at most")
    ] = 500,
    seed: Seed = 0,
    scheduler: SchedulerName = None,
    steps: Steps = None,
    guidance: Guidance = None,
    fast: Fast = False,
    config: Config = None,
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
    output: Output = Path("out/quality"),
    as_json: AsJson = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Compare pictures of held-out prompts with what a perfect model draws: FID, KID, precision, recall, near-copies of
    training scenes, and what the first stage keeps.
    """
    refuse_unwritable(output / "quality.json")
    from ldm.cli.opening import Opening, opened
    from ldm.evaluation.drawing import Drawing
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
    how = Drawing(seed, scheduler, steps, guidance)
    judge(evaluate(pipeline, scenes, prompts(scenes, n), network, how, training), n, output, as_json)


def judge(items: Iterable[Any], n: int, output: Path, as_json: bool) -> None:
    """Draw and judge n pictures behind a bar; keep the report, which comes last, and tell it. Ctrl-C keeps nothing, and
    leaves with 130.
    """
    report, done = None, 0
    try:
        with progress_bar() as bar:
            task = bar.add_task("drawing and judging", total=n + 1)
            for done, report in enumerate(items):  # noqa: B007  # the last is wanted
                bar.advance(task)
    except KeyboardInterrupt:
        say(f"stopped after some {done} of {n} pictures: a report is made of all of them, so none was written")
        raise typer.Exit(130) from None
    assert report is not None
    report.save(output)
    print(json.dumps(report.to_dict()) if as_json else report.table())
    say(f"the table, the verdicts and the pictures are in {output}")


def scenes_of(model: str | None, config: Path | None) -> "EmojiScenes":
    """The corpus that a model's pictures are judged by, and of its seed the scenes that it saw last: of the denoiser's
    YAML file if one is named, else what its vocabulary.json says, else the usual one. UsageError: the model was trained
    on another.
    """
    from ldm.checkpoints.safe import read_json
    from ldm.data.emoji import CorpusConfig, EmojiScenes
    from ldm.sources import model_in_the_box
    from ldm.training.config import DenoiserConfig, checked, read_config

    path = (Path(model) if model else model_in_the_box()) / "vocabulary.json"
    known = read_json(path) if path.is_file() else {}
    said, seed = known.get("corpus", {}), known.get("seed", 0)
    if config:
        asked = read_config(config, DenoiserConfig)
        corpus, seed = asked.corpus, asked.loop.seed
    elif isinstance(said, dict):
        corpus = checked(said, CorpusConfig, f"corpus of {path}")
    else:
        raise UsageError(f"{path}: its corpus is {said!r}, not fields; name the denoiser's YAML file with --config")
    scenes = EmojiScenes(corpus, seed)
    refuse_other_corpus(path, known, scenes)
    return scenes


def with_glyph(said: str, config: "CorpusConfig") -> "EmojiScenes":
    """The corpus and one object more, from NAME=PICTURE. UsageError: it is not so written, or no picture is there."""
    from ldm.evaluation.prompts import GlyphScenes
    from ldm.inputs import DecodeError, decoded

    name, _, path = said.partition("=")
    if not name or not path:
        raise UsageError(f"--glyph is {said!r}; write NAME=PICTURE, for example zorbik=zorbik.png")
    if not Path(path).is_file():
        raise UsageError(f"--glyph is to be {path}, and no such file is there; give a PNG of the object on nothing")
    try:
        picture = decoded(Path(path).read_bytes())
    except DecodeError as error:
        raise UsageError(f"--glyph is to be {path}: {error}; give a PNG of the object on nothing") from error
    return GlyphScenes(name, picture, config)


def refuse_other_corpus(path: Path, known: dict[str, Any], scenes: "EmojiScenes") -> None:
    """UsageError when a model's vocabulary.json lists other objects than this corpus: verdicts would mean nothing."""
    listed = known.get("objects")
    names = [each.get("name") for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
    if known and names != scenes.names:
        raise UsageError(f"{path} lists other objects than the corpus; name the denoiser's YAML file with --config")
