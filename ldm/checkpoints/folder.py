"""The model folder of diffusers (`model_index.json` and a subfolder for each component): opened as a whole, and saved.

Names in the files are looked up in the tables below and never imported. What is saved opens in stock diffusers.
"""

import operator
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.checkpoints.safe import (
    atomic_folder,
    atomic_json,
    atomic_save_safetensors,
    load_into,
    read_json,
    write_manifest,
)
from ldm.errors import ModelError, NumericalError, UsageError
from ldm.models.clip import CLIPTextConfig, CLIPTextModel
from ldm.models.unet import UNet, UNetConfig
from ldm.models.vae import AutoencoderKL, VAEConfig
from ldm.text.tokenizer import CLIPTokenizer

Json = dict[str, Any]


class Part(NamedTuple):
    """A component with weights: whose class it is in model_index.json, its weights file's stem, how it is built."""

    library: str
    class_name: str
    stem: str
    build: Callable[[Mapping[str, object]], nn.Module]


PARTS = {
    "unet": Part(
        "diffusers", "UNet2DConditionModel", "diffusion_pytorch_model", lambda c: UNet(UNetConfig.from_dict(c))
    ),
    "vae": Part(
        "diffusers", "AutoencoderKL", "diffusion_pytorch_model", lambda c: AutoencoderKL(VAEConfig.from_dict(c))
    ),
    "text_encoder": Part(
        "transformers", "CLIPTextModel", "model", lambda c: CLIPTextModel(CLIPTextConfig.from_dict(c))
    ),
}
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # diffusers' own, not loaded
INDEX, SCHEDULER, GENERATION = "model_index.json", "scheduler/scheduler_config.json", "generation_config.json"
DEFAULTS = ("num_inference_steps", "guidance_scale", "height", "width", "scheduler")
WRITTEN_FOR = "0.42.1"  # the version of diffusers whose form this is
CONTENTS = (
    f"a model folder holds {INDEX}, {SCHEDULER}, tokenizer/ with tokenizer.json or vocab.json and merges.txt, "
    f"and config.json with *.safetensors in {', '.join(f'{name}/' for name in PARTS)}"
)


@dataclass
class Components:
    """The parts of a latent diffusion model.

    scheduler_config: scheduler_config.json as it stands. generation: the request fields (those of DEFAULTS) that suit
    the model. notes: what the user should hear about how the folder was opened, each said once. name: what to call it;
    no path.
    """

    unet: UNet
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler_config: Json
    generation: Json = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    name: str = "unnamed"

    @property
    def configs(self) -> dict[str, Json]:
        """The `config.json` of every network, by the name of its folder."""
        return {name: getattr(self, name).config.to_dict() for name in PARTS}


def open_folder(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    variant: str | None = None,
) -> Components:
    """Opens a model folder; networks come in eval mode.

    dtype: of the weights; None keeps the files'. variant: "fp16" takes `*.fp16.safetensors`; where the one asked for is
    absent, what is there is taken, and a note says so. ModelError when the folder is missing or incomplete, names a
    component we do not have, or holds parts that do not fit each other.
    """
    path = Path(path)
    if not path.is_dir():
        raise ModelError(f"there is no model folder {path}; {CONTENTS}")
    if not (path / INDEX).is_file():
        raise ModelError(f"{path} is no model folder: it has no {INDEX}; {CONTENTS}")
    notes = _check_index(path / INDEX)
    weights, absent, taken = {}, [], {}
    for name, part in PARTS.items():
        absent += [] if (path / name / "config.json").is_file() else [f"{name}/config.json"]
        found = find_weights(path / name, part.stem, variant)
        absent += [] if found else [f"{name}/{part.stem}.safetensors"]
        if found:
            weights[name], taken[name] = found
    tokens = path / "tokenizer"
    absent += [] if (path / SCHEDULER).is_file() else [SCHEDULER]
    absent += [] if (tokens / "tokenizer.json").is_file() or (tokens / "vocab.json").is_file() else ["tokenizer/"]
    if absent:
        raise ModelError(f"{path} is incomplete: it has no {', '.join(absent)}; {CONTENTS}")
    models: dict[str, Any] = {}
    for name, part in PARTS.items():
        with torch.device("meta"):
            models[name] = part.build(read_json(path / name / "config.json"))
        load_into(models[name], weights[name], dtype, device)
        models[name].eval()
    window = models["text_encoder"].config.max_position_embeddings
    components = Components(
        tokenizer=CLIPTokenizer.from_folder(tokens, window),
        scheduler_config=read_json(path / SCHEDULER),
        generation=_generation(read_json(path / GENERATION)) if (path / GENERATION).is_file() else {},
        notes=(*notes, *_variants(variant, taken)),
        name="unnamed" if path.resolve() == Path.home() else path.resolve().name,
        **models,
    )
    _check_fit(components, str(path))
    return components


def _check_index(path: Path) -> list[str]:
    """Notes on what is there and not used. ModelError for a pipeline or component class that we do not have."""
    index = read_json(path)
    name = index.get("_class_name")
    if name not in PIPELINES:
        raise ModelError(f"{path} is of a {name!a:.80}; supported are {' and '.join(PIPELINES)}")
    known: dict[str, tuple[str, tuple[str, ...]]]
    known = {name: (part.library, (part.class_name,)) for name, part in PARTS.items()}
    known["tokenizer"] = ("transformers", TOKENIZERS)
    notes = []
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or entry == [None, None]:
            continue
        library, class_name = (*entry, None, None)[:2]
        if name in UNUSED:
            notes.append(f"the model's {name} ({class_name}) is not used")
        elif name == "scheduler" and library == "diffusers":
            continue  # its class is the business of whoever reads scheduler_config
        elif name not in known or library != known[name][0] or class_name not in known[name][1]:
            rest = f"; use {' or '.join(known[name][1])} of {known[name][0]}" if name in known else ""
            raise ModelError(f"{path}: {name!a:.40} of class {f'{library}.{class_name}'!a:.80} is not supported{rest}")
    return notes


def find_weights(folder: Path, stem: str, variant: str | None) -> tuple[list[Path], str | None] | None:
    """The safetensors files (shards in order) of a component and the variant they are; None when there are none.

    The variant asked for comes first, then the plain files, fp16, bf16, then any other. ModelError when shards are
    missing, the index is damaged, or there are only pickles.
    """
    whole = re.compile(rf"{stem}(?:\.(\w+))?\.safetensors", re.ASCII)
    index = re.compile(rf"{stem}\.safetensors\.index(?:\.(\w+))?\.json", re.ASCII)
    names = sorted(item.name for item in folder.iterdir()) if folder.is_dir() else []
    variants = {match[1]: name for pattern in (index, whole) for name in names if (match := pattern.fullmatch(name))}
    if not variants:
        pickles = [name for name in names if name.endswith((".bin", ".ckpt", ".pt", ".pth"))]
        if pickles:
            raise ModelError(f"{folder} has only pickled weights ({pickles[0]}), which can run code; take safetensors")
        return None
    chosen = next(name for name in (variant, None, "fp16", "bf16", *sorted(filter(None, variants))) if name in variants)
    file = folder / variants[chosen]
    return (_shards(file) if file.suffix == ".json" else [file]), chosen


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ModelError(f"{index} has no weight_map of file names; fetch it again")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{index} names the file {name!a:.80}; shards lie beside their index as *.safetensors")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ModelError(f"{index.parent} lacks {len(missing)} of {len(names)} shards, first {missing[0]}; fetch them")
    return [index.parent / name for name in names]


def _variants(asked: str | None, taken: Mapping[str, str | None]) -> list[str]:
    """One note for each variant that was taken in place of the one asked for."""
    others = [used for used in dict.fromkeys(taken.values()) if used != asked]
    places = {used: ", ".join(name for name, variant in taken.items() if variant == used) for used in others}
    return [f"no {asked or 'plain'} weights of {places[used]}; took the {used or 'plain'} ones" for used in others]


def _generation(values: Json) -> Json:
    unknown = [name for name in values if name not in DEFAULTS]
    if unknown:
        raise ModelError(f"{GENERATION} has the field {unknown[0]!a:.60}; known: {', '.join(DEFAULTS)}")
    return values


def _check_fit(c: Components, where: str) -> None:
    """ModelError when the parts cannot work together."""
    if not isinstance(c.scheduler_config.get("_class_name"), str):
        raise ModelError(f"{where}: {SCHEDULER} has no _class_name; it names a scheduler of diffusers")
    unet, vae, text = c.unet.config, c.vae.config, c.text_encoder.config
    wrong = [
        f"{left} {a} and {right} {b}"
        for left, a, right, b, fits in (
            ("unet in_channels", unet.in_channels, "vae latent_channels", vae.latent_channels, operator.eq),
            ("unet out_channels", unet.out_channels, "vae latent_channels", vae.latent_channels, operator.eq),
            ("unet cross_attention_dim", unet.cross_attention_dim, "text width", text.hidden_size, operator.eq),
            ("tokenizer size", len(c.tokenizer), "text_encoder vocab_size", text.vocab_size, operator.le),
        )
        if not fits(a, b)
    ]
    if wrong:
        raise ModelError(f"{where} holds parts of different models: {'; '.join(wrong)}; take all of one model")


def save_folder(
    components: Components, path: str | Path, dtype: torch.dtype | None = torch.float16, variant: str | None = None
) -> None:
    """Writes a model folder, whole or not at all, which stock diffusers' StableDiffusionPipeline opens too.

    dtype: of the weights in the files; None keeps theirs. variant: puts it into their names ("fp16": diffusers then
    wants `variant="fp16"`). Components of a model already at `path` are replaced, other files there (model card,
    licence) are carried over. UsageError when `path` is a folder of something else; ModelError when parts do not fit;
    NumericalError when a weight is not finite, or no longer is in `dtype`; LdmError when it cannot be written.
    """
    path = Path(path)
    _check_fit(components, "the model to save")
    _generation(components.generation)
    if variant is not None and not re.fullmatch(r"\w+", variant, re.ASCII):
        raise UsageError(f"variant {variant!r}; it is a word such as fp16")
    if path.is_dir() and any(path.iterdir()) and not (path / INDEX).is_file():
        raise UsageError(f"{path} is a folder with other things in it and no {INDEX}; choose a new or empty folder")
    with atomic_folder(path) as staging:
        for name, part in PARTS.items():
            (staging / name).mkdir()
            atomic_json(staging / name / "config.json", components.configs[name])
            file = ".".join(filter(None, (part.stem, variant, "safetensors")))
            atomic_save_safetensors(_finite(getattr(components, name), name, dtype), staging / name / file)
        components.tokenizer.save(staging / "tokenizer")
        (staging / "scheduler").mkdir()
        atomic_json(staging / SCHEDULER, components.scheduler_config)
        atomic_json(staging / INDEX, _index(components))
        if components.generation:
            atomic_json(staging / GENERATION, components.generation)
        _carry_over(path, staging)
        write_manifest(staging)


def _index(components: Components) -> Json:
    index: Json = {"_class_name": PIPELINES[0], "_diffusers_version": WRITTEN_FOR}
    index |= {name: [None, None] for name in UNUSED} | {"requires_safety_checker": False}
    index |= {name: [part.library, part.class_name] for name, part in PARTS.items()}
    index["scheduler"] = ["diffusers", components.scheduler_config["_class_name"]]
    index["tokenizer"] = ["transformers", TOKENIZERS[0]]
    return index


def _finite(model: nn.Module, name: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The model's tensors in `dtype`; NumericalError names the first that is not finite in it."""
    state = {key: value.detach().to(dtype) for key, value in model.state_dict().items()}
    for key, value in state.items():
        if not torch.isfinite(value).all():
            raise NumericalError(f"{name} {key} is not finite in {value.dtype}; save in float32 if it is in the model")
    return state


def _carry_over(old: Path, new: Path) -> None:
    """Copies what the old folder has beside the files of the new one; hidden files and outdated ones stay behind."""
    ours = {item.name for item in new.iterdir()} | {GENERATION, "manifest.sha256"}
    for item in old.iterdir() if old.is_dir() else ():
        if item.name in ours or item.name.startswith("."):
            continue
        if item.is_dir():
            shutil.copytree(item, new / item.name, symlinks=True)
        else:
            shutil.copy2(item, new / item.name, follow_symlinks=True)
