"""The command `ldm`, one file per command group. Heavy packages are imported inside the commands, never for help."""

import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.main import get_command

from ldm import __version__
from ldm.cli.common import examples, missing, printable, say
from ldm.cli.convert import convert
from ldm.cli.data import app as data
from ldm.cli.doctor import doctor
from ldm.cli.editing import edit, invert
from ldm.cli.evaluate import app as evaluate
from ldm.cli.gallery import gallery
from ldm.cli.generate import generate
from ldm.cli.grid import grid
from ldm.cli.info import info
from ldm.cli.lora import app as lora
from ldm.cli.merge import merge
from ldm.cli.schedulers import schedulers
from ldm.cli.train import app as train
from ldm.cli.train_lora import own_name, train_lora
from ldm.cli.verify import verify
from ldm.errors import LdmError

app = typer.Typer(
    rich_markup_mode="rich",
    epilog=examples(
        'ldm generate "a taco on a red background"',
        'ldm generate "an owl" "a pizza" -n 4 --seed 7 -o out/',
        "ldm generate --help",
    ),
)
app.add_typer(train, name="train")
app.add_typer(data, name="data")
app.add_typer(evaluate, name="eval")
app.add_typer(lora, name="lora")
app.command(
    epilog=examples(
        'ldm generate "a taco on a red background"',
        'ldm generate "an owl on a blue background" -n 4 --seed 7 -o owls/',
        'ldm generate "an owl" "a pizza" --steps 30 --scheduler dpm++2m -o "out/{index:03}-{seed}.png"',
        'ldm generate "a cat" --model path/to/model-folder --size 512x512 --dtype bf16 -o cat.jpg',
        'ldm generate "a {red|green} owl" -n 4 --strip --gif',
        'ldm generate "a taco|on a red background|in front of a blue background" --matrix --seed 7',
        "ldm generate --prompts-file prompts.txt -o owls/ --json",
        'ldm generate "an owl" --seed 7 --variation-strength 0.2 -n 4',
        "ldm generate --from out/an-owl-7.png --steps 50",
        'ldm generate "a sunny beach" --image photo.png --strength 0.6',
        'ldm generate "a pizza" --image photo.png --mask box:25%,25%,75%,75% --mask-feather 4',
        'ldm generate "a wide landscape" --image photo.png --extend left=128,right=128 --fill smooth',
    )
)(generate)
app.command(
    epilog=examples(
        'ldm edit photo.png "an owl in the snow" --source "an owl"',
        'ldm edit out/an-owl-7.png "a red owl" --guidance 2 -o red-owl.png',
    )
)(edit)
app.command(
    epilog=examples(
        'ldm invert photo.png "an owl"',
        'ldm invert photo.png "an owl" -o owl.safetensors --steps 20 --json',
    )
)(invert)
app.command(
    epilog=examples(
        'ldm grid "an owl on a blue background" --x steps=5,10,20 --y guidance=1..7:2 --seed 7',
        'ldm grid "a taco" --x scheduler=ddim,euler,dpm++2m --y seed=1..3 -o schedulers.png',
    )
)(grid)
app.command(
    name="train-lora",
    context_settings={"token_normalize_func": own_name},
    epilog=examples(
        "ldm train-lora --data my-pictures -o out/mine",
        "ldm train-lora --data my-pictures --rank 8 --max-train-steps 500 -o out/mine --dry-run",
        'ldm train-lora --data photos --instance-prompt "a sks dog" --class-prompt "a dog" -o out/sks',
        'ldm train-lora --data photos --placeholder-token "<zorp>" --rank 0 -o out/word',
        "ldm train-lora --config run.yaml --set learning_rate=5e-4",
    ),
)(train_lora)
app.command(
    epilog=examples(
        "ldm verify out/an-owl-7.png", "ldm verify owl.png --model path/to/model-folder --json", "ldm verify weights"
    )
)(verify)
app.command(
    epilog=examples("ldm info out/an-owl-7.png", "ldm info weights", "ldm info model.safetensors --tensors --json")
)(info)
app.command(
    epilog=examples(
        "ldm convert model.safetensors model-folder",
        "ldm convert model-folder model.safetensors --dtype fp16",
        "ldm convert model.ckpt model.safetensors --allow-pickle",
    )
)(convert)
app.command(
    epilog=examples(
        "ldm merge a.safetensors b.safetensors --alpha 0.4 -o both.safetensors",
        "ldm merge a/ b/ c/ --add-difference --alpha 1 -o sum/",
    )
)(merge)
app.command(epilog=examples("ldm gallery out", 'ldm gallery out -o page.html --title "Owls" --overwrite'))(gallery)
app.command(epilog=examples("ldm schedulers", "ldm schedulers --plot levels.png --steps 10"))(schedulers)
app.command(epilog=examples("ldm doctor", "ldm doctor --json"))(doctor)


def _version(asked: bool) -> None:
    if asked:
        print(f"ldm {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show the version and exit")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error; may stand anywhere")] = False,
) -> None:
    """Latent diffusion from end to end: draw, look, train, judge."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command (of sys.argv when None) and leave with its code: 0 done, 1 failed, 2 wrongly used, 130 Ctrl-C.

    An error is one sentence on stderr, with the traceback before it after --debug.
    """
    words = list(sys.argv[1:] if args is None else args) or ["--help"]
    options = words[: words.index("--")] if "--" in words else words
    debug = "--debug" in options
    if options[:1] not in (["train"], ["train-lora"]):
        # How long torch's threads spin while they wait for each other, before they let others run. By its default a
        # busy neighbour on the cores makes drawing some twenty times slower; training wants the cores to itself.
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    words = [word for word in options if word != "--debug"] + words[len(options) :]
    try:
        command = tidied(get_command(app))
        code = 0 if helped(command, words) else command.main(words, prog_name="ldm", standalone_mode=False)
    except Exception as error:  # the last door: whatever went wrong is said, and is the exit code
        if debug:
            traceback.print_exc()
        sentence, code = verdict(error)
        say(f"error: {printable(' '.join(sentence.split()))}")
    sys.exit(code if isinstance(code, int) else 0)


def helped(command: Any, words: Sequence[str]) -> bool:
    """Whether the words are `[COMMAND ...] --help`, whose page is then shown: without the parser, for what it loads to
    read values is a third of the cost.
    """
    context, rest = typer.Context(command, info_name="ldm"), list(words)
    while rest and rest[0] in getattr(command, "commands", {}):
        command, name = command.commands[rest[0]], rest.pop(0)
        context = typer.Context(command, parent=context, info_name=name)
    if rest != ["--help"] or "_LDM_COMPLETE" in os.environ:  # a shell asks how a line may go on
        return False
    print(command.get_help(context))
    return True


def tidied(command: Any) -> Any:
    """The command and those in it, with help pages as people read them: typer shows types (`<bool>` beside every flag,
    `<list[str]>` beside what already has a name), breaks lines where docstrings do, and spaces examples out.
    """
    help_option = command.get_help_option(typer.Context(command))
    help_option.help = "show this page and exit"
    for parameter in (*command.params, help_option):
        if parameter.param_type_name == "argument":
            parameter.display_type_rich = lambda ctx: None
        elif parameter.is_flag:
            parameter.metavar = ""
        parameter.help = COMPLETION.get(parameter.name, parameter.help)
    command.help = re.sub(r"(?<=\S)\n[ \t]*(?=\S)", " ", command.help or "")
    command.epilog = (command.epilog or "").replace("\n\n", "\n")
    for inner in getattr(command, "commands", {}).values():
        tidied(inner)
    return command


def verdict(error: Exception) -> tuple[str, int]:
    """What is said of an error, and the exit code it gives."""
    if isinstance(error, LdmError):
        return str(error), error.exit_code
    if isinstance(error, USAGE):
        misuse: Any = error
        where = misuse.ctx.command_path if misuse.ctx else "ldm"
        said = misuse.format_message().rstrip(".").replace(". Did you mean", "; did you mean")
        return f"{said[:1].lower()}{said[1:]}{' ' if said.endswith('?') else '; '}see {where} --help", misuse.exit_code
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("ldm."):
        return missing(error.name.partition(".")[0]), 1
    if isinstance(error, OSError) and error.strerror:
        named = f"{error.filename}: " if error.filename else ""
        return f"{named}{error.strerror.lower()}; run again with --debug to see where", 1
    return f"{type(error).__name__}: {error}; this is a fault of ldm, run again with --debug to see where", 1


# What typer's own options do, said as ours say it.
COMPLETION = {
    "install_completion": "set up completion for the shell you are in",
    "show_completion": "print what sets it up",
}
# What the parser raises. Typer brings its own copy of click in newer versions and exports this one subclass of it.
USAGE = typer.BadParameter.__mro__[1]
