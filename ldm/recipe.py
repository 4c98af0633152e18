"""The recipe of a picture: everything that decided it, kept inside its file, read back, and compared.

A picture carries two texts (ldm.images.TEXTS): A1111's "parameters", for people and other tools, and "ldm", the JSON
form of a Recipe, from which the same picture is drawn again. Nothing here imports torch but what opens a picture.
"""

import dataclasses
import hashlib
import json
import math
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.adapters.strength import tags
from ldm.errors import LdmError, ModelError, UsageError
from ldm.foreign import brief, json_object
from ldm.infotext import comfy_fields, parse, request_fields, write
from ldm.request import Request

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.pipeline import Pipeline

VERSION = 3  # of the JSON form; a change that an older reader would misread raises it
LARGEST_JSON = 1_000_000  # characters
DEEPEST = 8  # nesting of a scheduler's or adapter's configuration
LONGEST_NAME = 200
LISTS = ("timesteps", "sigmas")  # fields of Request that have several values for one picture
DIGEST = re.compile(r"[0-9a-f]{64}")
SHORT = re.compile(r"[0-9a-f]{12}")  # of A1111's hash of an adapter
INPUTS = {"image": "picture", "mask_image": "picture", "noise": "noise"}
"""Fields of Request that are files -> what stands for one without a name."""
SHAPE = re.compile(r"alpha(\+|$)|(box|ellipse|polygon):")  # a mask in words (ldm.masks), which is no file
NOT_KEPT = ("output_type", "num_images_per_prompt")  # fields of Request that say nothing of one picture
CHOSEN = ("prompt", "negative_prompt", "seed", "num_inference_steps", "guidance_scale", "height", "width", "scheduler")
"""Fields that every recipe says. The others may be missing: one that Request gained later changes nothing unsaid."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decided one picture.

    request: the fields of Request for this picture alone, with every choice made (prompt str, seed int), without
    NOT_KEPT. model: a name; of a path only the last part is kept. components: unet, vae, tokenizer ... -> the SHA-256
    of each, in hex. scheduler: the model's scheduler_config.json. threads: of the CPU. versions: ldm, torch,
    python, cpu (its instruction set). adapters: what each is, in order. inputs: field of Request (of INPUTS) -> the
    SHA-256 of what was given there; the field keeps its file's name. Numbers that JSON has not (-inf) become text.
    """

    request: dict[str, Any]
    model: str
    components: dict[str, str]
    scheduler: dict[str, Any]
    device: str
    dtype: str
    threads: int
    versions: dict[str, str]
    adapters: tuple[dict[str, Any], ...] = ()
    inputs: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        name = re.split(r"[/\\]", self.model.rstrip("/\\"))[-1][:LONGEST_NAME]
        object.__setattr__(self, "model", "".join(c if c.isprintable() else "?" for c in name) or "unnamed")
        object.__setattr__(self, "scheduler", _plain(self.scheduler))
        object.__setattr__(self, "adapters", tuple(_plain(adapter) for adapter in self.adapters))


@dataclass(frozen=True)
class Found:
    """What a picture says of how it was made.

    source: "ldm", "a1111" or "comfyui". request: fields of Request, valid together. recipe: ours, where it is. notes: a
    sentence for each thing that could not be carried over.
    """

    source: str
    request: dict[str, Any]
    recipe: Recipe | None
    notes: tuple[str, ...]


def _plain(value: Any, depth: int = 0) -> Any:
    """The value as JSON keeps it, without the "_name_or_path" that diffusers notes, for that is a path of a machine.
    ModelError: nested too deeply.
    """
    if depth > DEEPEST:
        raise ModelError(f"a configuration is nested more than {DEEPEST} deep; no scheduler or adapter has such")
    if isinstance(value, Mapping):
        return {str(key): _plain(v, depth + 1) for key, v in value.items() if key != "_name_or_path"}
    if isinstance(value, list | tuple):
        return [_plain(v, depth + 1) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def fields_of(request: Request) -> dict[str, Any]:
    """The fields of one picture's Request (of `Request.singles`) that a Recipe keeps; of a picture or noise that was
    opened, the name of its file.
    """
    kept = {f.name: getattr(request, f.name) for f in dataclasses.fields(Request) if f.name not in NOT_KEPT}
    return kept | {name: _file_name(kept[name].name) or INPUTS[name] for name in inputs_of(request)}


def inputs_of(request: Request) -> dict[str, str]:
    """The SHA-256 of what a resolved request is given: of its Source, its mask's, its GivenNoise."""
    given = {name: getattr(request, name) for name in INPUTS}
    return {name: value.sha256 for name, value in given.items() if hasattr(value, "sha256")}


def _file_name(text: str) -> str:
    """The last part of a path, as it may be shown and looked for."""
    return "".join(c if c.isprintable() else "?" for c in re.split(r"[/\\]", text)[-1])[:LONGEST_NAME]


def recipe_of(pipeline: "Pipeline", request: Request, components: Mapping[str, str]) -> Recipe:
    """The recipe of one picture that `pipeline` draws now. request: of `Request.singles`; components: of `digests`."""
    import torch

    from ldm import __version__
    from ldm.runtime import short_name

    versions = {"ldm": __version__, "torch": torch.__version__, "python": platform.python_version()}
    scheduler = pipeline.sampling(request).scheduler.name  # not the alias that may have been typed
    return Recipe(
        request=fields_of(request) | {"scheduler": scheduler},
        model=pipeline.components.name,
        components=dict(components),
        scheduler=dict(pipeline.components.scheduler_config),
        device=pipeline.device.type,
        dtype=short_name(pipeline.dtype),
        threads=torch.get_num_threads(),
        versions=versions | {"cpu": torch.backends.cpu.get_cpu_capability()},
        adapters=tuple(row | _a1111_hash(pipeline, row) for row in pipeline.adapters_of(request)),
        inputs=inputs_of(request),
    )


def _a1111_hash(pipeline: "Pipeline", row: Mapping[str, Any]) -> dict[str, str]:
    """The "hash" by which A1111 knows a LoRA: 12 digits of the sha256 of its tensors, that is of the file behind the
    header, as its metadata states it. None where it does not.
    """
    loaded = pipeline.components.weights.loaded.get(row["name"]) if row["type"] == "lora" else None
    digest = loaded.adapter.metadata.get("sshs_model_hash", "")[:12] if loaded else ""
    return {"hash": digest} if SHORT.fullmatch(digest) else {}


def digests(pipeline: "Pipeline") -> dict[str, str]:
    """SHA-256 of the numbers and the configuration of every component, in hex: of the weights without adapters,
    whatever file they came from.

    Taken as float32, so that a file's own precision is not heard; a network cast to fewer bits is another.
    """
    configs = {name: json.dumps(c, sort_keys=True).encode() for name, c in pipeline.components.configs.items()}
    with pipeline.components.weights.using(()), ThreadPoolExecutor() as pool:  # hashing lets other threads run
        tensors = {name: network.state_dict() for name, network in pipeline.components.networks.items()}
        hashed = {name: [configs[name], *pool.map(_digest, state.items())] for name, state in tensors.items()}
    for name, tokenizer in pipeline.components.tokenizers.items():
        words = [tokenizer.vocab, tokenizer.merges, tokenizer.pad, tokenizer.added]
        hashed[name] = [json.dumps(words).encode()]
    if vocabulary := getattr(pipeline.components.text_encoder, "vocabulary", None):
        hashed["tokenizer"] = [vocabulary.encode()]
    second = digests(pipeline.refiner) if pipeline.refiner else {}
    known = {name: hashlib.sha256(b"".join(parts)).hexdigest() for name, parts in hashed.items()}
    return known | {f"refiner_{name}": digest for name, digest in second.items()}


def _digest(entry: "tuple[str, Tensor]") -> bytes:
    name, tensor = entry
    numbers = tensor.detach().float().cpu().contiguous().numpy()
    return f"{name} {list(numbers.shape)} ".encode() + hashlib.sha256(numbers.data).digest()


def texts(recipe: Recipe) -> dict[str, str]:
    """What `ldm.images.save` keeps in the picture: "parameters", and "ldm" in ASCII."""
    digest = recipe.components.get("unet", "")
    version = f"ldm {recipe.versions.get('ldm', '')}".strip()
    prompt, hashes = _tagged(recipe)
    extra = {"Model hash": digest[:10], "Model": recipe.model, "Lora hashes": hashes, "Version": version}
    form = {"version": VERSION} | {f.name: getattr(recipe, f.name) for f in dataclasses.fields(Recipe)}
    told = recipe.request | {"prompt": prompt}
    return {"parameters": write(told, extra), "ldm": json.dumps(form, allow_nan=False)}


def _tagged(recipe: Recipe) -> tuple[str, str]:
    """The prompt as A1111 needs it, with a tag for every adapter that it does not name yet; and its "Lora hashes"."""
    rows = [{"hash": "", **row} for row in recipe.adapters if row.get("type") == "lora"]
    said = recipe.request
    prompt, plain = said["prompt"], said.get("literal") or said.get("profile") == "diffusers"
    if rows and not plain:
        named = {tag.name for tag in tags(prompt)[1]}
        prompt += "".join(f"<lora:{row['name']}:{row['strength']}>" for row in rows if row["name"] not in named)
    hashes = [f"{re.sub('[:,]', '', row['name'])}: {row['hash']}" for row in rows if row["hash"]]
    return prompt, ", ".join(hashes)


def from_json(text: str) -> Recipe:
    """The recipe of its JSON form. ModelError, in one sentence: another version, a field that is missing, unknown or of
    the wrong kind, a request that Request refuses, over 1,000,000 characters, or nested too deeply.
    """
    form = json_object(text, "the recipe", largest=LARGEST_JSON)
    version = form.pop("version", None)
    if type(version) is not int or not 1 <= version <= VERSION:
        raise ModelError(f"the recipe is of version {brief(version)} and only 1 to {VERSION} are read; update ldm")
    known = [name for name in CHECKS if name != "inputs" or version > 2]
    _same_names("the recipe", form, known, known)
    form = {"inputs": {}} | form
    for name, (check, kind) in CHECKS.items():
        if not check(form[name]):
            raise ModelError(f"{name} of the recipe is {brief(form[name])}; it must be {kind}")
    if version == 1:
        form["request"] = _of_version_1(form["request"])
    known = [field.name for field in dataclasses.fields(Request) if field.name not in NOT_KEPT]
    _same_names("the recipe's request", form["request"], CHOSEN, known)
    unsaid = next((name for name in CHOSEN if form["request"][name] is None), None)
    single = {name: value for name, value in form["request"].items() if name not in LISTS}
    _refuse_files(form["request"], form["inputs"])
    if unsaid or any(isinstance(value, list | dict) for value in single.values()):
        raise ModelError(f"the recipe's request is not of one picture: {unsaid or 'a field'} is not one value")
    try:
        request = Request(**form["request"])
    except UsageError as error:
        raise ModelError(f"the recipe's request cannot be carried out: {str(error)[:300]}") from None
    return Recipe(**form | {"request": fields_of(request), "adapters": tuple(form["adapters"])})


def _refuse_files(request: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
    """ModelError where a request names what is no plain name of a file, or a file whose digest is not recorded: a
    stranger's recipe opens nothing but what lies beside it and is what it says.
    """
    for name in INPUTS:
        value = request.get(name)
        if name in inputs:
            taken = isinstance(value, str) and value not in ("", ".", "..") and value == _file_name(value)
        else:
            shape = name == "mask_image" and isinstance(value, str) and SHAPE.match(value)
            taken = value is None or bool(shape)
        if not taken:
            raise ModelError(
                f"{name} of the recipe's request is {brief(value)}; it must be the name of a file, without a folder, "
                "whose sha256 stands in the recipe's inputs"
            )


def _of_version_1(request: Mapping[str, Any]) -> dict[str, Any]:
    """The request of a recipe of version 1, which knew no syntax of prompts, counted clip_skip as diffusers does, for
    the prompt alone, and drew the CPU's noise: what the profile "diffusers" is today. A row of its own was DPM++ 2M
    with Karras' levels.
    """
    karras = {"scheduler": "dpm++2m", "schedule_type": "karras"} if request.get("scheduler") == "dpm++2m_karras" else {}
    return {**request, "profile": "diffusers", "noise_source": "cpu", **karras}


def _same_names(what: str, table: Mapping[str, Any], needed: Sequence[str], known: Sequence[str]) -> None:
    """ModelError when a needed name is missing, or one that is there is not known."""
    if missing := [name for name in needed if name not in table]:
        raise ModelError(f"{what} has no {', '.join(missing)}; the picture's text is damaged")
    if strange := next((name for name in table if name not in known), None):
        raise ModelError(f"{what} has the unknown field {brief(strange)}; it is damaged, or of a newer ldm")


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= LONGEST_NAME and value.isprintable()


def _is_names(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_name(key) and _is_name(text) for key, text in value.items())


def _is_digests(value: Any) -> bool:
    return _is_names(value) and "unet" in value and all(DIGEST.fullmatch(digest) for digest in value.values())


def _is_inputs(value: Any) -> bool:
    return _is_names(value) and value.keys() <= INPUTS.keys() and all(map(DIGEST.fullmatch, value.values()))


CHECKS: dict[
    str, tuple[Callable[[Any], bool], str]
] = {  # field of the JSON form -> what holds of it, and how that is said
    "request": (lambda v: isinstance(v, dict), "the fields of a request"),
    "model": (_is_name, "a name"),
    "components": (_is_digests, "the SHA-256 of each component in hex, the unet among them"),
    "scheduler": (lambda v: isinstance(v, dict), "a configuration"),
    "device": (_is_name, "a name, for example 'cpu'"),
    "dtype": (_is_name, "a name, for example 'fp32'"),
    "threads": (lambda v: type(v) is int and 0 < v <= 65_536, "a whole number from 1 to 65536"),
    "versions": (_is_names, "a name and a version for each"),
    "adapters": (lambda v: isinstance(v, list) and all(isinstance(a, dict) for a in v), "a list of adapters"),
    "inputs": (_is_inputs, f"the SHA-256 in hex of some of {', '.join(INPUTS)}"),
}


def read(path: str | Path) -> Found:
    """How a picture was made, by the best of what it carries: our JSON, A1111's text, ComfyUI's graph.

    ModelError: the file cannot be read, or what it carries is damaged, named with the file. LdmError: it carries none.
    """
    from ldm.images import read_text

    carried = read_text(path)
    try:
        if "ldm" in carried:
            recipe = from_json(carried["ldm"])
            return Found("ldm", dict(recipe.request), recipe, ())
        if len(parse(carried.get("parameters", ""))) > 2:  # more than the two prompts, which any text would have
            fields, notes = request_fields(carried["parameters"])
            return Found("a1111", fields, None, tuple(notes))
        if "prompt" in carried:
            fields, notes = comfy_fields(carried["prompt"])
            return Found("comfyui", fields, None, tuple(notes))
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    raise LdmError(
        f"{path} carries no recipe (or lost it on the way, as on many web sites); read are pictures of ldm, of A1111 "
        f"('parameters') and of ComfyUI ('prompt')"
    )


def differences(a: Recipe, b: Recipe) -> list[str]:
    """A short sentence for each thing in which `a` (now) differs from `b` (then); none for equal recipes."""
    found = [f"the model is called {a.model}, was {b.model}"] if a.model != b.model else []
    for name, now, then in unequal(a.components, b.components):
        found.append(f"the {name} is another ({(now or 'none')[:10]}, was {(then or 'none')[:10]})")
    for name, now, then in unequal(a.inputs, b.inputs):
        found.append(f"the {name} is another ({(now or 'none')[:10]}, was {(then or 'none')[:10]})")
    for name, now, then in unequal(a.request, b.request):
        found.append(f"{name} {brief(now)}, was {brief(then)}")
    for name, now, then in unequal(a.scheduler, b.scheduler):
        found.append(f"{brief(name)[1:-1]} of the scheduler {brief(now)}, was {brief(then)}")
    found += [
        f"{n} {getattr(a, n)}, was {getattr(b, n)}" for n in ("device", "dtype") if getattr(a, n) != getattr(b, n)
    ]
    if a.threads != b.threads:
        found.append(f"{a.threads} thread{'s' * (a.threads != 1)}, was {b.threads}")
    for name, now, then in unequal(a.versions, b.versions):
        found.append(f"{name} {now or 'unknown'}, was {then or 'unknown'}")
    if a.adapters != b.adapters:
        now, then = ([brief(row.get("name", "unnamed")) for row in recipe.adapters] for recipe in (a, b))
        found.append(f"the adapters are others ({', '.join(now) or 'none'}; were {', '.join(then) or 'none'})")
    return found


def unequal(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Name and both values (None where missing) of the entries that differ, as JSON would keep them."""
    a, b = _plain(a), _plain(b)
    for name in dict.fromkeys((*b, *a)):
        if a.get(name) != b.get(name):
            yield name, a.get(name), b.get(name)
