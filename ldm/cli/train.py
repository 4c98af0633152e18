"""`ldm train`: the stages of a model's life, from nothing or from where they were stopped."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ldm.cli.common import examples, needs, parse_settings, refuse_unwritable, say
from ldm.cli.following import begins, follow, leave, logged, tell_stopped

if TYPE_CHECKING:
    from ldm.training.config import LoopConfig

# command -> file and function of ldm.training that make the stage, the class its configuration is read as, and its help
STAGES = {
    "first-stage": ("first_stage", "FirstStageConfig", "Train the autoencoder: pictures to latents and back."),
    "clip": ("clip", "ClipConfig", "Train the text encoder, contrastively with an image encoder."),
    "denoiser": (
        "denoiser", "DenoiserConfig",
        "Train the U-Net on the latents and texts of the two other stages, and put the model together.",
    ),
    "classifier": (
        "classifier", "ClassifierConfig",
        "Train the network whose features pictures are compared by (ldm eval quality).",
    ),
    "distill": (
        "distill", "DistillConfig",
        "Teach a finished model to draw in few steps: a LoRA, by latent consistency distillation.",
    ),
    "tiny-decoder": (
        "tiny_decoder", "TinyDecoderConfig",
        "Train a small and quick autoencoder (TAESD's form) for the latents of a finished one.",
    ),
}  # fmt: skip

Config = Annotated[Path, typer.Option("--config", metavar="FILE", help="YAML file of the run, as in configs/")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="replace a field of the file (loop.steps=10); may be repeated"),
]

Where = Annotated[
    str | None, typer.Option("--device", metavar="NAME", help="cpu, cuda or auto; absent = the file's loop.device")
]


def stage_examples(name: str) -> str:
    """The Examples block of a stage's help page."""
    file = f"configs/cpu/{STAGES[name][0]}.yaml"
    again = f"ldm train {name} --config {file} --set loop.steps=10 --set loop.out=out/trial --device cpu"
    return examples(f"ldm train {name} --config {file}", again)


app = typer.Typer(
    help="Train a stage; the same command goes on where a run was stopped.",
    epilog=examples(*(f"ldm train {name} --config configs/cpu/{file}.yaml" for name, (file, *_) in STAGES.items())),
)


def register(name: str, told: str) -> None:
    """The command of a stage."""

    def command(config: Config, settings: Settings = None, device: Where = None) -> None:
        run(name, config, settings or [], device)

    app.command(name, help=told, epilog=stage_examples(name))(command)


for stage_name, (_, _, stage_help) in STAGES.items():
    register(stage_name, stage_help)


@app.command("ema", epilog=examples("ldm train ema runs/box/denoiser --sigma-rel 0.08 -o out/averaged"))
def ema(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="folder of a run that kept snapshots")],
    sigma_rel: Annotated[float, typer.Option("--sigma-rel", help="length of the average, as a share of the run")],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder; the result is put into `result` there")],
) -> None:
    """Put an average of another length together from a run's snapshots (post-hoc EMA), as its result."""
    needs("accelerate", "matplotlib")
    from ldm.training.posthoc import averaged, configuration, summands

    refuse_unwritable(output / "result" / "config.json")
    parts = summands(folder, sigma_rel)
    modules = {name: import_module(f"ldm.training.{file}") for name, (file, *_) in STAGES.items()}
    name, config = configuration(folder, {name: getattr(modules[name], kind) for name, (_, kind, _) in STAGES.items()})
    with logged():
        stage = getattr(modules[name], STAGES[name][0])(config)
        made = averaged(stage.model, parts)
        told = ", ".join(f"{figure} {value:.4g}" for figure, value in stage.held_out(made).items())
        say(f"{name}, the average of sigma_rel {sigma_rel}: held-out {told}")
        stage.export(made, output)
    print(output / "result")


def run(name: str, config: Path, settings: list[str], device: str | None) -> None:
    """Train one stage from its newest state to its end, and tell how it goes. Exit code 130 when stopped by
    Ctrl-C, 143 by SIGTERM."""
    needs("accelerate", "matplotlib")
    from ldm.training.config import read_config
    from ldm.training.loop import device_of, run_stage

    file, kind, _ = STAGES[name]
    module = import_module(f"ldm.training.{file}")
    chosen = parse_settings(settings) | ({"loop.device": device} if device else {})
    asked = read_config(config, getattr(module, kind), chosen)
    c: LoopConfig = asked.loop
    # Before any work: threads of OpenMP, which come with the first work, inherit from here that denormals are flushed.
    where = device_of(c.device, c.threads)
    out = Path(c.out)
    refuse_unwritable(out / "log.jsonl")
    begins(name, out, c.steps, where)
    say(f"states, samples, curve.png and log.jsonl go to {out}, the result to {out / 'result'}")
    try:
        with logged():
            stage = getattr(module, file)(asked)
            last = follow(run_stage(stage, asked), name, c.steps, c.batch_size * c.gradient_accumulation_steps)
    except KeyboardInterrupt:  # before the first step, or after the last
        tell_stopped(out)
        raise typer.Exit(130) from None
    leave(last, out)
    say(f"{name} is done")
    print(out / "result")
