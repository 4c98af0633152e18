"""`ldm train-lora`: teach a model a subject or a style. Its options are made from the fields of LoRAConfig, so that the
two cannot drift apart.
"""

import inspect
import json
import shlex
from dataclasses import Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from ldm.cli.common import needs, parse_settings, printable, refuse_unwritable, say
from ldm.cli.following import begins, follow, leave, logged, tell_stopped
from ldm.cli.options import KINDS, completing, taken_by
from ldm.training.lora_config import NAMED, LoRAConfig

if TYPE_CHECKING:
    from ldm.training.loop import Progress
    from ldm.training.plan import Run

OTHER_NAMES = {name: field.name.replace("_", "-") for field in fields(LoRAConfig) for name in field.metadata["flags"]}
"""Names of options beside their own; those of a letter are shown on the help page, the rest would fill it."""
SET = "replace one field, also of --config (rank=8, random_flip=false); may be repeated"


def own_name(token: str) -> str:
    """The name of an option here, of one that diffusers' scripts may have for it, with underscores."""
    name = token.replace("_", "-")
    return OTHER_NAMES.get(name, name) if len(name) > 1 else name


def train_lora(
    *,
    config: Annotated[Path | None, typer.Option("--config", metavar="FILE", help="YAML file of these options")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=SET)] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what would be done, with estimated memory and time, and stop")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout at the end")] = False,
    **given: Any,
) -> None:
    """Teach a model a subject or a style from captioned pictures.

    One file comes of it, whose path goes to stdout: a LoRA that all tools read. The same command goes on where a run
    was stopped; Ctrl-C ends it after a step, its state saved. What is left out, the model chooses. Options may also be
    spelt as in diffusers' scripts (--train_data_dir, --max_train_steps).
    """
    needs("accelerate", "matplotlib")
    asked = gathered(config, settings or [], given)
    refuse_unwritable(Path(asked.output_dir) / "log.jsonl")
    from ldm.training.loop import is_main
    from ldm.training.lora import opened
    from ldm.training.plan import estimate, planned

    run = opened(asked)
    if dry_run:
        plan = estimate(run.config, run.components, run.material)
        print(json.dumps(plan.told()) if as_json else printable(str(plan)))
        return
    main = is_main()
    if main:
        say(printable(str(planned(run.config, run.components, run.material))))
    last = carry_out(run, main)
    if main:
        tell(run, last, as_json)


def gathered(config: Path | None, settings: list[str], given: dict[str, Any]) -> LoRAConfig:
    """The configuration of a file, with what was typed in place of its fields. UsageError for what it cannot be."""
    from ldm.training.config import checked, read_config

    typed = {name: value for name, value in given.items() if value is not None and value != []}
    chosen = parse_settings(settings, "rank=8") | typed
    if config is not None:
        return read_config(config, LoRAConfig, chosen)
    return checked(chosen, LoRAConfig, "--set" if settings else "")


def carry_out(run: "Run", main: bool) -> "Progress | None":
    """Train to the end, and tell how it goes; -> the last that was told. Exit code 128 + the signal that ended it.

    main: whether this process of the run is the one that speaks.
    """
    from ldm.training.lora import steps

    c, folder = run.config, Path(run.config.output_dir)
    total, batch = c.max_train_steps or 1, (c.train_batch_size or 1) * c.gradient_accumulation_steps
    again = "the same command"
    if c.resume_from_checkpoint == "no":
        again += " without --resume-from-checkpoint no"
    elif main:
        begins("train-lora", folder, total, run.components.unet.conv_in.weight.device)
    try:
        with logged():
            last = follow(steps(run), "training", total, batch, quiet=not main)
    except KeyboardInterrupt:  # before the first step, or after the last
        tell_stopped(folder, again, quiet=not main)
        raise typer.Exit(130) from None
    leave(last, folder, again, quiet=not main)
    return last


def tell(run: "Run", last: "Progress | None", as_json: bool) -> None:
    """What there is now, on stdout, and how it is used, on stderr."""
    c, made = run.config, run.result
    paths = [path for path in (made.adapter, made.embedding) if path is not None]
    if as_json:
        figures = last.figures if last is not None else {}
        named = {name: None if path is None else str(path) for name, path in made._asdict().items()}
        print(json.dumps({**named, "output_dir": c.output_dir, "steps": c.max_train_steps, "figures": figures}))
    else:
        print(*paths, sep="\n")
    words = ["ldm", "generate", *(["--model", c.model] if c.model else [])]
    words += ["--lora", str(made.adapter)] if made.adapter else []
    words += ["--embedding", str(made.embedding)] if made.embedding else []
    say(f"how it came about: {c.output_dir}/progress.png, curve.png, log.jsonl; how to use it: README.md there")
    say(f"draw with it: {printable(shlex.join([*words, prompt_of(run)]))}")


def prompt_of(run: "Run") -> str:
    """A prompt that shows what was learned."""
    c, first = run.config, run.material.pictures[0].caption.split("\n")[0]
    whole = " ".join(filter(None, (c.caption_prefix, c.instance_prompt or first, c.caption_suffix)))
    said = (*c.validation_prompt, whole)[0]
    return said if not c.placeholder_token or c.placeholder_token in said else f"{c.placeholder_token}, {said}"


def parameter_of(field: "Field[Any]", hint: Any) -> inspect.Parameter:
    """The command's parameter that stands for a field of LoRAConfig; None where nothing was typed."""
    kind, taken = taken_by(hint)
    metavar, parser = KINDS[kind]
    letters = [f"-{name}" for name in field.metadata["flags"] if len(name) == 1]
    shown: dict[str, Any] = {"help": field.metadata["help"], "rich_help_panel": field.metadata["panel"]}
    if kind is not bool:
        completion = completing(NAMED[field.name]) if field.name in NAMED else None
        shown |= {"metavar": metavar, "parser": parser, "autocompletion": completion}
    info: Any = typer.Option(f"--{own_name(field.name)}", *letters, **shown)
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[taken, info]
    )


def signature() -> inspect.Signature:
    """The command's own options, and the fields of LoRAConfig."""
    hints = get_type_hints(LoRAConfig)
    own = [p for p in inspect.signature(train_lora).parameters.values() if p.kind is not p.VAR_KEYWORD]
    return inspect.Signature([*own, *(parameter_of(field, hints[field.name]) for field in fields(LoRAConfig))])


train_lora.__signature__ = signature()  # type: ignore[attr-defined]  # typer reads the options off it
