"""The model folder of diffusers (`model_index.json` and a subfolder for each component): opened as a whole, and saved.

Names in the files are looked up in the tables below and never imported. What is saved opens in stock diffusers.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints.components import (
    CLASSES,
    FLAGS,
    NETWORKS,
    PIPELINES,
    TOKENIZERS,
    Components,
    Json,
    build,
    check_fit,
    class_of,
)
from ldm.checkpoints.safe import (
    atomic_folder,
    atomic_json,
    atomic_save_safetensors,
    load_into,
    read_json,
    write_manifest,
)
from ldm.errors import ModelError, NumericalError, UsageError
from ldm.text.tokenizer import CLIPTokenizer

SUPPORTED = {name for names in PIPELINES.values() for name in names}
SUPPORTED_SAID = "StableDiffusionPipeline, StableDiffusionXLPipeline and their kin"
STRANGERS = {  # the beginning of a pipeline's class -> what that model is
    "StableDiffusion3": "Stable Diffusion 3",
    "Flux": "Flux",
    "PixArt": "PixArt",
    "Kandinsky": "Kandinsky",
    "Wuerstchen": "Wuerstchen",
    "StableCascade": "Stable Cascade",
    "QwenImage": "Qwen-Image",
}
TOKENIZER_CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast")
UNUSED = ("safety_checker", "feature_extractor", "image_encoder", "watermarker")  # diffusers' own, not loaded
INDEX, SCHEDULER, GENERATION = "model_index.json", "scheduler/scheduler_config.json", "generation_config.json"
LOW_RES = "low_res_scheduler/scheduler_config.json"
DEFAULTS = ("num_inference_steps", "guidance_scale", "height", "width", "scheduler")
WRITTEN_FOR = "0.42.1"  # the version of diffusers whose form this is
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
CONTENTS = (
    f"a model folder holds {INDEX}, {SCHEDULER}, tokenizer/ with tokenizer.json or vocab.json and merges.txt, "
    f"and config.json with *.safetensors in unet/, vae/, text_encoder/"
)


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
    index = read_json(path / INDEX)
    classes, notes = _parts_of(index, path / INDEX)
    weights, absent, taken = {}, [], {}
    for name in [name for name in NETWORKS if name in classes]:
        absent += [] if (path / name / "config.json").is_file() else [f"{name}/config.json"]
        stem = CLASSES[classes[name]].stem
        found = find_weights(path / name, stem, variant)
        absent += [] if found else [f"{name}/{stem}.safetensors"]
        if found:
            weights[name], taken[name] = found
    for name in [name for name in TOKENIZERS if name in classes]:
        known = any((path / name / file).is_file() for file in ("tokenizer.json", "vocab.json"))
        absent += [] if known else [f"{name}/"]
    absent += [] if (path / SCHEDULER).is_file() else [SCHEDULER]
    if absent:
        raise ModelError(f"{path} is incomplete: it has no {', '.join(absent)}; {CONTENTS}")
    parts: dict[str, Any] = {}
    for name, files in weights.items():
        with torch.device("meta"):
            parts[name] = build(classes[name], read_json(path / name / "config.json"))
        load_into(parts[name], files, dtype, device)
        parts[name].eval()
    for name in [name for name in TOKENIZERS if name in classes]:
        if TOKENIZERS[name] not in parts:
            raise ModelError(f"{path} has {name}/ and no {TOKENIZERS[name]}/; {CONTENTS}")
        window = parts[TOKENIZERS[name]].config.max_position_embeddings
        parts[name] = CLIPTokenizer.from_folder(path / name, window)
    components = Components(
        **{"text_encoder": None, "tokenizer": None} | parts,
        scheduler_config=read_json(path / SCHEDULER),
        generation=_generation(read_json(path / GENERATION)) if (path / GENERATION).is_file() else {},
        notes=(*notes, *_variants(variant, taken)),
        name="unnamed" if path.resolve() == Path.home() else path.resolve().name,
        flags={name: True for name in FLAGS if index.get(name) is True},
        low_res_scheduler_config=read_json(path / LOW_RES) if (path / LOW_RES).is_file() else {},
    )
    check_fit(components, str(path))
    return components


def _parts_of(index: Json, path: Path) -> tuple[dict[str, str], list[str]]:
    """The class of every component that is opened, and notes on what is there and not used. ModelError for a pipeline
    or component class that we do not have, or without the parts that every model has.
    """
    name = index.get("_class_name")
    if name not in SUPPORTED:
        kind = next((what for start, what in STRANGERS.items() if str(name).startswith(start)), None)
        said = f"a {kind} model ({name})" if kind else f"of a {name!a:.80}"
        raise ModelError(f"{path} is {said}; supported are Stable Diffusion 1.x, 2.x and SDXL, as {SUPPORTED_SAID}")
    known = {name: (CLASSES[classes[0]].library, classes) for name, classes in NETWORKS.items()}
    known |= {name: ("transformers", TOKENIZER_CLASSES) for name in TOKENIZERS}
    found, notes = {}, []
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or entry == [None, None]:
            continue
        library, class_name = (*entry, None, None)[:2]
        if name in UNUSED:
            notes.append(f"the model's {name} ({class_name}) is not used")
        elif name in ("scheduler", "low_res_scheduler") and library == "diffusers":
            continue  # its class is the business of whoever reads scheduler_config
        elif name not in known or library != known[name][0] or class_name not in known[name][1]:
            rest = f"; use {' or '.join(known[name][1])} of {known[name][0]}" if name in known else ""
            raise ModelError(f"{path}: {name!a:.40} of class {f'{library}.{class_name}'!a:.80} is not supported{rest}")
        else:
            found[name] = str(class_name)
    encoder = "text_encoder" if "text_encoder" in found or "text_encoder_2" not in found else "text_encoder_2"
    tokenizer = next(name for name, of in TOKENIZERS.items() if of == encoder)
    if missing := [name for name in ("unet", "vae", encoder, tokenizer) if name not in found]:
        raise ModelError(f"{path} names no {', '.join(missing)}; {CONTENTS}")
    return found, notes


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
        pickles = [name for name in names if name.endswith(PICKLES)]
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
    check_fit(components, "the model to save")
    _generation(components.generation)
    if variant is not None and not re.fullmatch(r"\w+", variant, re.ASCII):
        raise UsageError(f"variant {variant!r}; it is a word such as fp16")
    if path.is_dir() and any(path.iterdir()) and not (path / INDEX).is_file():
        raise UsageError(f"{path} is a folder with other things in it and no {INDEX}; choose a new or empty folder")
    with atomic_folder(path) as staging:
        for name, network in components.networks.items():
            (staging / name).mkdir()
            atomic_json(staging / name / "config.json", components.configs[name])
            file = ".".join(filter(None, (CLASSES[class_of(network)].stem, variant, "safetensors")))
            atomic_save_safetensors(_finite(network, name, dtype), staging / name / file)
        for name, tokenizer in components.tokenizers.items():
            tokenizer.save(staging / name)
        schedulers = {SCHEDULER: components.scheduler_config, LOW_RES: components.low_res_scheduler_config}
        for place, config in schedulers.items():
            if config:
                (staging / place).parent.mkdir()
                atomic_json(staging / place, config)
        atomic_json(staging / INDEX, _index(components))
        if components.generation:
            atomic_json(staging / GENERATION, components.generation)
        _carry_over(path, staging)
        write_manifest(staging)


def _index(components: Components) -> Json:
    """model_index.json, with every entry that diffusers' pipeline of this name looks for."""
    optional = ["image_encoder", "feature_extractor"]
    flags: Json = {"requires_safety_checker": False}
    if components.is_xl:
        flags = {name: components.flags.get(name, False) for name in FLAGS}
        optional += ["text_encoder", "tokenizer"]
    else:
        optional += ["safety_checker"]
    index: Json = {"_class_name": components.pipeline, "_diffusers_version": WRITTEN_FOR}
    index |= {name: [None, None] for name in optional} | flags
    classes = {name: class_of(network) for name, network in components.networks.items()}
    index |= {name: [CLASSES[class_name].library, class_name] for name, class_name in classes.items()}
    index |= {name: ["transformers", TOKENIZER_CLASSES[0]] for name in components.tokenizers}
    schedulers = {"scheduler": components.scheduler_config, "low_res_scheduler": components.low_res_scheduler_config}
    return index | {name: ["diffusers", config["_class_name"]] for name, config in schedulers.items() if config}


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
