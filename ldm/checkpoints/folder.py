"""The model folder of diffusers (`model_index.json` and a subfolder for each component): opened as a whole, and saved.

Names in the files are looked up in the tables below and never imported. What is saved opens in stock diffusers.
"""

import re
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints.components import (
    CLASSES,
    FLAGS,
    MODEL,
    NETWORKS,
    PIPELINES,
    TOKENIZER_CLASSES,
    TOKENIZERS,
    Components,
    Json,
    build,
    check_fit,
    class_of,
)
from ldm.checkpoints.load import Bare, finite, load_into
from ldm.checkpoints.pickles import readable, refuse_pickle
from ldm.checkpoints.safe import atomic_folder, atomic_json, read_json, write_manifest
from ldm.checkpoints.shards import choose_file, read_index, save_sharded
from ldm.errors import ModelError, NumericalError, UsageError
from ldm.models.clip import CLIPTextModel
from ldm.safety import check_preprocessor, preprocessor
from ldm.text.tokenizer import CLIPTokenizer
from ldm.text.transformers_text import KINDS, TransformersText

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
VOCABULARIES = ("tokenizer.json", "vocab.json", *(kind.vocabulary for kind in KINDS.values()))
UNUSED = ("image_encoder", "watermarker")  # diffusers' own, not loaded
READ_ELSEWHERE = ("scheduler", "low_res_scheduler", "feature_extractor")  # by their files; their class says no more
INDEX, SCHEDULER, GENERATION = "model_index.json", "scheduler/scheduler_config.json", "generation_config.json"
LOW_RES = "low_res_scheduler/scheduler_config.json"
FAST = "fast"  # the folder of a model's fast mode: ldm.fast
DEFAULTS = ("num_inference_steps", "guidance_scale", "height", "width", "scheduler")
WRITTEN_FOR = "0.42.1"  # the version of diffusers whose form this is
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
PICKLED_STEMS = {MODEL: "pytorch_model"}  # where transformers calls a pickled file otherwise
SD_ABSENT, XL_ABSENT = ("safety_checker", "feature_extractor", "image_encoder"), ("image_encoder", "feature_extractor")
UPSCALER = "StableDiffusionUpscalePipeline"
AESTHETIC = ("StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline")  # take the flag of that name
ABSENT = {name: XL_ABSENT if is_xl else SD_ABSENT for (is_xl, _), names in PIPELINES.items() for name in names} | {
    UPSCALER: ("safety_checker", "feature_extractor", "watermarker"),
    "StableDiffusionXLImg2ImgPipeline": (*XL_ABSENT, "text_encoder", "tokenizer"),
    "StableDiffusionXLInstructPix2PixPipeline": (),
}
"""What a pipeline of diffusers looks for in model_index.json though it may be absent."""
PREPROCESSOR = "feature_extractor/preprocessor_config.json"
CONTENTS = (
    f"a model folder holds {INDEX}, {SCHEDULER}, tokenizer/ with tokenizer.json or vocab.json and merges.txt, "
    f"and config.json with *.safetensors in unet/, vae/, text_encoder/"
)


def open_folder(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    variant: str | None = None,
    allow_pickle: bool = False,
    safety_checker: bool = True,
) -> Components:
    """Opens a model folder; networks come in eval mode.

    dtype: of the weights; None keeps the files'. variant: "fp16" takes `*.fp16.safetensors`; where the one asked for is
    absent, what is there is taken, and a note says so. allow_pickle: take `*.bin` where there is nothing else.
    safety_checker: open the model's own, if it has one. ModelError when the folder is missing or incomplete, names a
    component we do not have, or holds parts that do not fit each other.
    """
    path = Path(path)
    if not path.is_dir():
        raise ModelError(f"there is no model folder {path}; {CONTENTS}")
    if not (path / INDEX).is_file():
        raise ModelError(f"{path} is no model folder: it has no {INDEX}; {CONTENTS}")
    index = read_json(path / INDEX)
    classes, notes = parts_of(index, path / INDEX)
    if not safety_checker:
        classes.pop("safety_checker", None)
    files = _files_of(path, classes, variant, allow_pickle)
    parts = {name: open_network(path / name, classes[name], files[name][0], dtype, device) for name in files}
    for name in [name for name in TOKENIZERS if name in classes]:
        if TOKENIZERS[name] not in parts:
            raise ModelError(f"{path} has {name}/ and no {TOKENIZERS[name]}/; {CONTENTS}")
        encoder = parts[TOKENIZERS[name]]
        if isinstance(encoder, CLIPTextModel):  # others have theirs
            parts[name] = CLIPTokenizer.from_folder(path / name, encoder.config.max_position_embeddings)
    if "safety_checker" in parts and (path / PREPROCESSOR).is_file():
        check_preprocessor(read_json(path / PREPROCESSOR), parts["safety_checker"].config.vision.image_size)
    components = Components(
        **{"text_encoder": None, "tokenizer": None} | parts,
        scheduler_config=read_json(path / SCHEDULER),
        generation=defaults_of(path),
        notes=(*notes, *_variants(variant, {name: taken for name, (_, taken) in files.items()})),
        name="unnamed" if path.resolve() == Path.home() else path.resolve().name,
        flags={name: True for name in FLAGS if index.get(name) is True},
        low_res_scheduler_config=read_json(path / LOW_RES) if (path / LOW_RES).is_file() else {},
    )
    check_fit(components, str(path))
    return components


def _files_of(
    path: Path, classes: Mapping[str, str], variant: str | None, allow_pickle: bool
) -> dict[str, tuple[list[Path], str | None]]:
    """The weights files of every network, and the variant they are. ModelError names all that the folder lacks."""
    found, absent = {}, []
    for name in [name for name in NETWORKS if name in classes]:
        absent += [] if (path / name / "config.json").is_file() else [f"{name}/config.json"]
        stem = CLASSES[classes[name]].stem
        files = find_weights(path / name, stem, variant, allow_pickle)
        absent += [] if files else [f"{name}/{stem}.safetensors"]
        if files:
            found[name] = files
    for name in [name for name in TOKENIZERS if name in classes]:
        known = any((path / name / file).is_file() for file in VOCABULARIES)
        absent += [] if known else [f"{name}/"]
    absent += [] if (path / SCHEDULER).is_file() else [SCHEDULER]
    if absent:
        raise ModelError(f"{path} is incomplete: it has no {', '.join(absent)}; {CONTENTS}")
    return found


def open_network(
    folder: Path, class_name: str, files: list[Path], dtype: torch.dtype | None, device: str | torch.device
) -> Any:
    """The network of a component's folder, of a class of CLASSES, with the weights of these files (those of
    `find_weights`), in eval mode. ModelError: its config.json is not ours to compute, or the weights do not fit it.
    """
    with ExitStack() as opened:  # what a pickle was converted to is gone afterwards
        weights = [opened.enter_context(readable(file, file.suffix in PICKLES)) for file in files]
        if class_name in KINDS:
            return TransformersText.from_folder(folder, folder.parent / "tokenizer", dtype, device, weights)
        network = _built(folder / "config.json", class_name)
        load_into(network, weights, dtype, device)
    return network.eval()


def _built(path: Path, class_name: str) -> Any:
    """The network of a config.json, without numbers. ModelError names the file."""
    config = read_json(path)
    try:
        with Bare():
            return build(class_name, config)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{path} describes no network that can be built ({reason!a}); correct it") from error


def parts_of(index: Json, path: Path) -> tuple[dict[str, str], list[str]]:
    """The class of every component that is opened, and notes on what is there and not used. ModelError for a pipeline
    or component class that we do not have, or without the parts that every model has.
    """
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in SUPPORTED:
        kind = next((what for start, what in STRANGERS.items() if str(name).startswith(start)), None)
        said = f"a {kind} model ({name!a:.80})" if kind else f"of a {name!a:.80}"
        raise ModelError(f"{path} is {said}; supported are Stable Diffusion 1.x, 2.x and SDXL, as {SUPPORTED_SAID}")
    known = {name: (CLASSES[classes[0]].library, classes) for name, classes in NETWORKS.items()}
    for name, encoder in TOKENIZERS.items():
        entry = index.get(encoder)
        reads = entry[1] if isinstance(entry, list) and len(entry) == 2 and entry[1] in NETWORKS[encoder] else None
        known[name] = ("transformers", TOKENIZER_CLASSES[str(reads or NETWORKS[encoder][0])])
    found, notes = {}, []
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or entry == [None, None]:
            continue
        library, class_name = (*entry, None, None)[:2]
        if name in UNUSED:
            notes.append(f"the model's {name} ({ascii(class_name)[1:-1]:.60}) is not used")
        elif name in READ_ELSEWHERE and library in ("diffusers", "transformers"):
            continue
        elif name not in known or library != known[name][0] or class_name not in known[name][1]:
            rest = f"; use {' or '.join(known[name][1])} of {known[name][0]}" if name in known else ""
            raise ModelError(f"{path}: {name!a:.40} of class {f'{library}.{class_name}'!a:.80} is not supported{rest}")
        else:
            found[name] = str(class_name)
    first = "text_encoder" if "text_encoder" in found or "text_encoder_2" not in found else "text_encoder_2"
    tokenizer = next(name for name, of in TOKENIZERS.items() if of == first)
    if missing := [name for name in ("unet", "vae", first, tokenizer) if name not in found]:
        raise ModelError(f"{path} names no {', '.join(missing)}; {CONTENTS}")
    return found, notes


def find_weights(
    folder: Path, stem: str, variant: str | None, allow_pickle: bool = False
) -> tuple[list[Path], str | None] | None:
    """The weights files (shards in order) of a component and the variant they are; None when there are none.

    The variant asked for comes first, then the plain files, fp16, bf16, then any other; safetensors before pickles.
    ModelError when shards are missing, the index is damaged, or there are only pickles and they are not allowed.
    """
    names = sorted(item.name for item in folder.iterdir()) if folder.is_dir() else []
    for form, kind in ((stem, "safetensors"), (PICKLED_STEMS.get(stem, stem), "bin"))[: 1 + allow_pickle]:
        if found := choose_file(names, form, variant, kind):
            file = folder / found[0]
            return (read_index(file, kind) if file.suffix == ".json" else [file]), found[1]
    if pickle := next((name for name in names if name.endswith(PICKLES)), None):
        raise refuse_pickle(folder / pickle)
    return None


def _variants(asked: str | None, taken: Mapping[str, str | None]) -> list[str]:
    """One note for each variant that was taken in place of the one asked for."""
    others = [used for used in dict.fromkeys(taken.values()) if used != asked]
    places = {used: ", ".join(name for name, variant in taken.items() if variant == used) for used in others}
    return [f"no {asked or 'plain'} weights of {places[used]}; took the {used or 'plain'} ones" for used in others]


def defaults_of(folder: Path) -> Json:
    """What a folder's generation_config.json says, {} without one. ModelError: a field that is not of DEFAULTS."""
    return _generation(read_json(folder / GENERATION), folder) if (folder / GENERATION).is_file() else {}


def _generation(values: Json, folder: Path) -> Json:
    unknown = [name for name in values if name not in DEFAULTS]
    if unknown:
        raise ModelError(f"{folder / GENERATION} has the field {unknown[0]!a:.60}; known: {', '.join(DEFAULTS)}")
    return values


def refuse_other_folder(path: Path) -> None:
    """UsageError for a folder that a model may not take: one of other things."""
    if path.is_dir() and any(path.iterdir()) and not (path / INDEX).is_file():
        raise UsageError(f"{path} is a folder with other things in it and no {INDEX}; choose a new or empty folder")


def save_folder(
    components: Components,
    path: str | Path,
    dtype: torch.dtype | None = torch.float16,
    variant: str | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Writes a model folder, whole or not at all, which stock diffusers' StableDiffusionPipeline opens too.

    dtype: of the weights in the files; None keeps theirs. variant: puts it into their names ("fp16": diffusers then
    wants `variant="fp16"`). max_shard_size: of one weights file, in bytes or as "300MB". Parts of a model already at
    `path` are replaced, other files there (model card, licence) are carried over. UsageError when `path` is a folder of
    something else; ModelError when parts do not fit; NumericalError when a weight is not finite, or no longer is in
    `dtype`; LdmError when it cannot be written.
    """
    path = Path(path)
    check_fit(components, "the model to save")
    _generation(components.generation, path)
    if variant is not None and not re.fullmatch(r"\w+", variant, re.ASCII):
        raise UsageError(f"variant {variant!r}; it is a word such as fp16")
    refuse_other_folder(path)
    with atomic_folder(path) as staging:
        for name, network in components.networks.items():
            (staging / name).mkdir()
            atomic_json(staging / name / "config.json", components.configs[name])
            stem = CLASSES[class_of(network)].stem
            save_sharded(_finite(network, name, dtype), staging / name, stem, variant, max_shard_size)
        for name, tokenizer in components.tokenizers.items():
            tokenizer.save(staging / name)
        if isinstance(components.text_encoder, TransformersText):
            components.text_encoder.save_tokenizer(staging / "tokenizer")
        if components.safety_checker:
            (staging / PREPROCESSOR).parent.mkdir()
            atomic_json(staging / PREPROCESSOR, preprocessor(components.safety_checker.config.vision.image_size))
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
    """model_index.json, with the entries that diffusers' pipeline of this name looks for, and no others."""
    name = components.pipeline
    classes = {part: class_of(network) for part, network in components.networks.items()}
    index: Json = {"_class_name": name, "_diffusers_version": WRITTEN_FOR} | {key: [None, None] for key in ABSENT[name]}
    if "safety_checker" in index and name != UPSCALER:
        index["requires_safety_checker"] = components.safety_checker is not None
    if components.is_xl:
        index[FLAGS[0]] = components.flags.get(FLAGS[0], False)
    if name in AESTHETIC:
        index[FLAGS[1]] = components.flags.get(FLAGS[1], False)
    index |= {part: [CLASSES[class_name].library, class_name] for part, class_name in classes.items()}
    for part, encoder in TOKENIZERS.items():
        if encoder in classes:
            index[part] = ["transformers", TOKENIZER_CLASSES[classes[encoder]][0]]
    index |= {"feature_extractor": ["transformers", "CLIPImageProcessor"]} if components.safety_checker else {}
    schedulers = {"scheduler": components.scheduler_config, "low_res_scheduler": components.low_res_scheduler_config}
    return index | {part: ["diffusers", config["_class_name"]] for part, config in schedulers.items() if config}


def _finite(model: nn.Module, name: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The model's tensors in `dtype`; NumericalError names the first that is not finite in it."""
    state = {key: value.detach().to(dtype) for key, value in model.state_dict().items()}
    for key, value in state.items():
        if not finite(value):
            raise NumericalError(f"{name} {key} is not finite in {value.dtype}; save in float32 if it is in the model")
    return state


def _carry_over(old: Path, new: Path) -> None:
    """Copies what the old folder has beside the files of the new one; hidden files and outdated ones stay behind, such
    as a fast mode, which was distilled for the old weights.
    """
    ours = {item.name for item in new.iterdir()} | {GENERATION, FAST, "manifest.sha256"}
    for item in old.iterdir() if old.is_dir() else ():
        if item.name in ours or item.name.startswith("."):
            continue
        if item.is_dir():
            shutil.copytree(item, new / item.name, symlinks=True)
        else:
            shutil.copy2(item, new / item.name, follow_symlinks=True)
