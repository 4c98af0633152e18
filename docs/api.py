"""Writes docs/api.md: the public names with their signatures, fields and docstrings, as the source has them.

    python docs/api.py            # write it
    python docs/api.py --check    # exit code 1 when it is stale

Signatures and fields are read from the source with `ast`, so that the page does not depend on the version of Python.
"""

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("api.md")
WIDTH = 110  # of a signature; a longer one has a parameter a line
HEADING = """# Python

*Made by `docs/api.py` from the docstrings; do not edit.*

Tensors are written with their shapes: B pictures, C channels, H W height and width, T tokens, D text width.
`import ldm` loads no torch; the public names of `ldm` itself load with their first use.
"""
# title, what it holds, and (module, names) in the order of the page
SECTIONS: tuple[tuple[str, str, tuple[tuple[str, tuple[str, ...]], ...]], ...] = (
    ("Drawing", "Words in, pictures out.", (("ldm", ("Pipeline", "Request", "Result")),)),
    ("Teaching", "Pictures in, an adapter out; [with examples](training.md).", (("ldm", ("train_lora",)),)),
    (
        "Errors",
        "What can go wrong, said in one sentence. All are an `LdmError`.",
        (("ldm.errors", ("LdmError", "UsageError", "ModelError", "NumericalError")),),
    ),
    (
        "Schedulers",
        "A solver is the rule of one step; `solve` walks x down a list of noise levels by it and yields a `Step` each.",
        (
            ("ldm.schedulers", ("SCHEDULERS", "Step", "Scheduler", "find", "Sampling", "from_config", "solve")),
            ("ldm.schedulers.solver", ("Leg", "Past")),
            ("ldm.schedulers.ddpm", ("ddpm",)),
            ("ldm.schedulers.ddim", ("ddim", "euler", "euler_ancestral", "lcm", "tcd")),
            ("ldm.schedulers.second_order", ("heun", "dpm2", "dpmpp_2s_ancestral", "dpmpp_sde")),
            ("ldm.schedulers.linear_multistep", ("pndm", "lms", "deis")),
            ("ldm.schedulers.dpm_solver", ("multistep", "singlestep")),
            ("ldm.schedulers.unipc", ("unipc",)),
        ),
    ),
    (
        "Editing",
        "A picture, what is drawn anew of it, and how the rest is kept; [with examples](editing.md).",
        (
            ("ldm.inputs", ("Source", "source_of")),
            ("ldm.masks", ("mask_of", "grown", "faded", "shrunk")),
            ("ldm.canvas", ("Canvas", "canvas_of", "margins", "window", "fitted", "filled")),
            ("ldm.editing", ("length",)),
            ("ldm.diffusion.guidance", ("held", "guided_by_image")),
            ("ldm.diffusion.strength", ("stronger", "freed")),
            ("ldm.schedulers.laps", ("Lap", "laps", "walked")),
            ("ldm.schedulers.inversion", ("invert",)),
            ("ldm.noise_files", ("GivenNoise", "read_noise", "write_noise")),
            ("ldm.models.seamless", ("seamless",)),
        ),
    ),
    (
        "Beside diffusers",
        "Its schedulers in our runs, its pipelines as ours, ours as its; [with examples](interop.md).",
        (("ldm.interop", ("with_scheduler", "from_diffusers", "to_diffusers")),),
    ),
    (
        "Mathematics",
        "What training and sampling share. x = x0 + sigma * noise.",
        (
            ("ldm.diffusion", ("NoiseSchedule", "Denoiser", "Estimate", "Prediction", "PREDICTIONS", "c_in")),
            ("ldm.diffusion", ("Levels", "Spacing", "levels", "guided", "guided_rescaled")),
            ("ldm.diffusion.grids", ("grid", "find_grid")),
            ("ldm.diffusion.spacing", ("respaced",)),
            ("ldm.diffusion", ("DiffusionLoss", "min_snr_weights")),
        ),
    ),
    (
        "Pictures",
        "Tensors and files, sheets and animations.",
        (
            ("ldm.images", ("to_pil", "to_tensor", "grid", "contact_sheet", "save", "read_text")),
            ("ldm.preview", ("fit_latent_to_rgb", "preview_image", "half_blocks", "strip", "animation", "chosen")),
            ("ldm.grid", ("plot", "axes")),
            ("ldm.gallery", ("find_pictures", "describe", "gallery", "command_of")),
        ),
    ),
    (
        "Recipes",
        "How a picture was made, inside its file.",
        (
            ("ldm.recipe", ("Recipe", "Found", "read", "recipe_of", "digests", "texts", "from_json", "differences")),
            ("ldm.infotext", ("write", "parse", "request_fields", "comfy_fields")),
        ),
    ),
    (
        "Prompts",
        "Wildcards, matrices and files of prompts.",
        (("ldm.prompts", ("expand", "matrix", "read_prompts", "read_wildcards")),),
    ),
    (
        "Adapters",
        "LoRA and its relatives: their files, how strong they are, new ones from old; [with examples](adapters.md).",
        (
            ("ldm.adapters.adapter", ("Adapter", "Layer")),
            ("ldm.adapters.strength", ("Strength",)),
            ("ldm.adapters.names", ("book_of",)),
            ("ldm.adapters.reading", ("read_adapter", "Read")),
            ("ldm.adapters.matching", ("fit",)),
            ("ldm.adapters.writing", ("write_adapter",)),
            ("ldm.adapters.kinds", ("delta",)),
            ("ldm.adapters.tools", ("as_lora", "resize", "extract", "combine", "Keep", "Fitted")),
            ("ldm.lora", ("LoRA",)),
        ),
    ),
    (
        "Merging models",
        "One model of several; [with examples](merging.md).",
        (("ldm.merging", ("mixture", "merge", "summary", "Mix")),),
    ),
    (
        "Models and files",
        "The networks, and folders in diffusers' layout.",
        (
            ("ldm.checkpoints.folder", ("Components", "open_folder", "save_folder")),
            ("ldm.models.unet", ("UNet",)),
            ("ldm.models.vae", ("AutoencoderKL",)),
            ("ldm.text.encoder", ("TextEncoder", "Conditioning")),
        ),
    ),
    (
        "Training and judging",
        "Needs the extra `train`; scenes need the Noto Color Emoji font.",
        (
            ("ldm.training.config", ("read_config", "LoopConfig", "FirstStageConfig", "ClipConfig", "DenoiserConfig")),
            ("ldm.training.lora", ("opened", "steps")),
            ("ldm.training.plan", ("Run", "Trained")),
            ("ldm.training.loop", ("run_stage", "Progress", "Stage")),
            ("ldm.training.first_stage", ("first_stage",)),
            ("ldm.training.clip", ("clip",)),
            ("ldm.training.denoiser", ("denoiser",)),
            ("ldm.data.emoji", ("CorpusConfig", "EmojiScenes", "Scene")),
            ("ldm.data.words", ("SceneSpec",)),
            ("ldm.evaluation.alignment", ("evaluate", "Report")),
            ("ldm.evaluation.inpainting", ("evaluate", "Report", "Job")),
        ),
    ),
)
HOMES = {"Denoiser": "ldm.diffusion.prediction", "PREDICTIONS": "ldm.diffusion.prediction"}  # of names that are values


def page() -> str:
    """The whole page."""
    return "\n".join([HEADING, *(line for section in SECTIONS for line in section_lines(*section))])


def section_lines(title: str, intro: str, groups: Iterable[tuple[str, tuple[str, ...]]]) -> Iterator[str]:
    """A section: its heading, its names."""
    yield f"## {title}\n\n{intro}\n"
    for module, names in groups:
        for name in names:
            yield f"### `{module}.{name}`\n"
            yield from name_lines(module, name)


def name_lines(module: str, name: str) -> Iterator[str]:
    """What there is to say of one public name."""
    if name == "SCHEDULERS":
        yield from scheduler_lines()
        return
    thing = getattr(import_module(module), name)
    if name in HOMES:
        yield from value_lines(HOMES[name], name)
        return
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(thing))).body
    if isinstance(tree, ast.FunctionDef):
        yield code(signature(tree))
        yield said(tree, name)
    elif isinstance(tree, ast.ClassDef):
        yield from class_lines(tree, inspect.getsource(thing).splitlines())


def class_lines(tree: ast.ClassDef, source: list[str]) -> Iterator[str]:
    """A class: how it is made, what it is, its fields, its public methods."""
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    made = next((node for node in functions if node.name == "__init__"), None)
    bases = ", ".join(ast.unparse(base) for base in tree.bases)
    called = f"\n{call(tree.name, parameters(made), '')}" if made is not None and parameters(made) else ""
    yield code(f"class {tree.name}" + (f"({bases})" if bases else "") + called)
    yield said(tree, tree.name)
    fields = [node for node in tree.body if isinstance(node, ast.AnnAssign)]
    if any(option_of(field) for field in fields):
        yield from option_lines(fields)
    elif fields and made is None:
        lines = source[fields[0].lineno - 1 : fields[-1].end_lineno]
        yield code(textwrap.dedent("\n".join(lines)))
    for node in functions:
        marks = [ast.unparse(mark) for mark in node.decorator_list]
        public = not node.name.startswith("_") or node.name == "__call__"
        if public and "overload" not in marks and ast.get_docstring(node):
            yield f"#### `{tree.name}.{node.name}`\n"
            yield code(signature(node, marks))
            yield said(node, f"{tree.name}.{node.name}")


def option_of(field: ast.AnnAssign) -> ast.Call | None:
    """The call that a field of Request is made with."""
    call = field.value
    return call if isinstance(call, ast.Call) and ast.unparse(call.func) in ("_option", "_edit") else None


def option_lines(fields: Iterable[ast.AnnAssign]) -> Iterator[str]:
    """The fields of Request as a table, with their options of the command line."""
    yield "| field | type | default | option | what it is |\n|---|---|---|---|---|"
    for field in fields:
        call = option_of(field)
        assert call is not None, ast.unparse(field)
        default, text, *flag = (ast.literal_eval(value) for value in call.args)
        name = ast.unparse(field.target)
        word = flag[0] if flag else name.replace("_", "-")
        option = {"prompt": "", "output_type": ""}.get(name, f"`-{word}`" if len(word) == 1 else f"`--{word}`")
        kind = ast.unparse(field.annotation).replace("|", "&#124;")  # as code in a table, that of every Markdown
        yield f"| `{name}` | <code>{kind}</code> | `{default!r}` | {option} | {escaped(text)} |"
    yield ""


def value_lines(home: str, name: str) -> Iterator[str]:
    """A constant or an alias as its module writes it, and the docstring after it."""
    source = inspect.getsource(import_module(home))
    body = ast.parse(source).body
    at = next(
        i
        for i, node in enumerate(body)
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and name in map(ast.unparse, node.targets if isinstance(node, ast.Assign) else [node.target])
    )
    yield code(str(ast.get_source_segment(source, body[at])))
    after = body[at + 1] if at + 1 < len(body) else None
    if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
        yield f"{escaped(inspect.cleandoc(after.value.value))}\n"


def scheduler_lines() -> Iterator[str]:
    """Where the table of schedulers stands."""
    yield "A dict of rows by their name, each a `Scheduler`: [the table](schedulers.md#the-schedulers).\n"


def signature(node: ast.FunctionDef, marks: Iterable[str] = ()) -> str:
    """The head of a function as one would read it: without self, string annotations unquoted."""
    returns = plain(node.returns) if node.returns else "None"
    if {"property", "cached_property"} & {*marks}:
        return f"{node.name}: {returns}"
    head = "".join(f"@{mark}\n" for mark in marks if mark in ("classmethod", "staticmethod"))
    return f"{head}def {call(node.name, parameters(node), f' -> {returns}')}"


def call(name: str, own: list[str], returns: str) -> str:
    """A name with its parameters, on a line each where they are long together."""
    line = f"{name}({', '.join(own)}){returns}"
    inner = "".join(f"    {parameter},\n" for parameter in own)
    return line if len(line) <= WIDTH else f"{name}(\n{inner}){returns}"


def parameters(node: ast.FunctionDef) -> list[str]:
    """The parameters of a function, without self and cls, each as it is written."""
    a = node.args
    positional = [*a.posonlyargs, *a.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(a.defaults)) + list(a.defaults)
    shown = [parameter(arg, default) for arg, default in zip(positional, defaults, strict=True)]
    if positional and positional[0].arg in ("self", "cls"):
        shown = shown[1:]
    if a.vararg or a.kwonlyargs:
        shown.append(f"*{parameter(a.vararg, None)}" if a.vararg else "*")
    shown += [parameter(arg, default) for arg, default in zip(a.kwonlyargs, a.kw_defaults, strict=True)]
    return [*shown, f"**{parameter(a.kwarg, None)}"] if a.kwarg else shown


def parameter(arg: ast.arg, default: ast.expr | None) -> str:
    """`name: type = default`."""
    kind = f": {plain(arg.annotation)}" if arg.annotation else ""
    equals = " = " if kind else "="
    return f"{arg.arg}{kind}" + (equals + ast.unparse(default).replace("'", '"') if default else "")


def plain(annotation: ast.expr) -> str:
    """An annotation without the quotes of a forward reference."""
    quoted = isinstance(annotation, ast.Constant) and isinstance(annotation.value, str)
    return str(annotation.value) if quoted else ast.unparse(annotation)  # type: ignore[attr-defined]


def said(node: ast.FunctionDef | ast.ClassDef, name: str) -> str:
    """The docstring as Markdown. ValueError where there is none: everything public says what it is."""
    text = ast.get_docstring(node)
    if not text:
        raise ValueError(f"{name} has no docstring")
    # A line "name: what it is" after a whole sentence begins a line of its own on the page as well.
    return re.sub(r"(?<=[.;)])\n(?=[a-z_]\w*(?:, [a-z_]\w*)*: )", "<br>\n", escaped(text)) + "\n"


def escaped(text: str) -> str:
    """Plain text as Markdown shows it unchanged; what stands in backticks is code already."""
    parts = re.split(r"(`[^`]*`)", text)
    plain_parts = (re.sub(r"([\\*]|(?<!\w)_|_(?!\w)|__|^#|^>)", r"\\\1", p, flags=re.M) for p in parts[::2])
    parts[::2] = [part.replace(r"\__", r"\_\_").replace("<", "&lt;") for part in plain_parts]
    return "".join(parts)


def code(text: str) -> str:
    """A block of Python that nothing runs."""
    return f"```py\n{text}\n```\n"


def main(arguments: list[str]) -> int:
    """Write the page, or with --check compare it."""
    fresh: Any = page()
    if "--check" not in arguments:
        PAGE.write_text(fresh, "utf-8")
        print(PAGE)
        return 0
    if PAGE.is_file() and PAGE.read_text("utf-8") == fresh:
        return 0
    print(f"{PAGE.name} is stale; run: python docs/api.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
