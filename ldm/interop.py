"""To and from a diffusers pipeline, and any scheduler object of diffusers in place of the ones here.

diffusers and transformers are imported when a function needs them; nothing here is on the way of `ldm generate`.
Networks share their tensors with those they are made from: nothing is copied, and what one side trains in place, the
other side sees. Only tokenizers, a megabyte of text, pass through a temporary folder.
"""

import copy
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from ldm.borrowed import Borrowed
from ldm.checkpoints.components import CLASSES, FLAGS, TOKENIZERS, Components, Json, build, check_fit, class_of
from ldm.checkpoints.folder import parts_of
from ldm.checkpoints.load import Bare
from ldm.errors import ModelError, UsageError
from ldm.pipeline import Pipeline
from ldm.safety import check_preprocessor, preprocessor
from ldm.schedulers import from_config
from ldm.text.tokenizer import CLIPTokenizer
from ldm.text.transformers_text import KINDS, TransformersText, TransformersTextConfig

GIVEN = "the diffusers pipeline given"
NETWORK_FIELDS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
                  "rescale_betas_zero_snr")  # fmt: skip
"""What a scheduler's config says of the network and not of the scheduler."""
TEXTS = [name for name, part in CLASSES.items() if part.library != "diffusers"]
"""The classes whose configs are written by transformers, CLIP's two first."""
LEADS = ("text_model.", "vision_model.")
"""What versions of transformers put before the names of CLIP's tensors, or leave out."""


def with_scheduler(pipeline: Pipeline, scheduler: Any) -> Pipeline:
    """The same model, sampled by a scheduler object of diffusers, its subclass or its like; the given pipeline and
    scheduler stay as they are.

    The loop is diffusers': at each of the scheduler's timesteps, model_output = guided network(scale_model_input(x, t),
    t) and x = step(model_output, t, x); pictures are those of diffusers' pipelines for the same seeds. Every run has
    copies of its own, one for each picture with that picture's generator, so that threads and the other pictures of a
    batch change nothing; a scheduler that draws noise by a seed of its own, as DPMSolverSDEScheduler, gets the
    picture's. Requests may still name another scheduler. A Step's `sigma` is how many steps are left and its `x` is in
    the scheduler's frame; runs cannot be taken up again in the middle.

    UsageError: no scheduler; or, in a request, what only the schedulers here have (nfe, schedule_type), a scheduler
    that predicts another thing than the network, or steps that it refuses.
    """
    if isinstance(scheduler, str) or not all(hasattr(scheduler, name) for name in ("set_timesteps", "step", "config")):
        raise UsageError(
            f"{scheduler!r:.80} came in place of a scheduler; give an object of diffusers, such as "
            "DDIMScheduler.from_config(pipeline.components.scheduler_config), or put a name into the request"
        )
    wanted = list(inspect.signature(scheduler.step).parameters.values())[3:]
    if missing := [one.name for one in wanted if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]:
        raise UsageError(
            f"{type(scheduler).__name__} steps with {', '.join(missing)} beside the network's output, which this model "
            "has not; take another scheduler"
        )
    made = copy.copy(pipeline)
    made.sampler = Borrowed(copy.deepcopy(scheduler), pipeline.components.scheduler_config)
    made.refiner = pipeline.refiner and with_scheduler(pipeline.refiner, scheduler)
    return made


def from_diffusers(pipe: Any) -> Pipeline:
    """The Pipeline of a diffusers pipeline in memory: Stable Diffusion 1, 2, SDXL or its refiner, in any class of
    checkpoints.components.PIPELINES.

    Its networks share their tensors, where they are and in the type that they have; its tokenizers, its safety checker
    and its scheduler's config come with them. A scheduler that is not known here runs as it is (`with_scheduler`).
    Left behind, with a note: image encoders. Steps and guidance of a request are those of a model without
    generation_config.json, not those of diffusers' signatures.

    ModelError, saying what came: another pipeline (ControlNet, unCLIP), a part that is not one of ours, adapters or an
    IP-Adapter in it, weights that were moved away by offloading. UsageError: diffusers is not installed.
    """
    diffusers = _diffusers()
    if not isinstance(pipe, diffusers.DiffusionPipeline):
        raise UsageError(f"{type(pipe).__name__} came in place of a pipeline; give one of diffusers")
    entries = {name: list(entry) if isinstance(entry, tuple) else entry for name, entry in pipe.config.items()}
    classes, notes = parts_of(entries | {"_class_name": type(pipe).__name__}, Path(GIVEN))
    parts: dict[str, Any] = {"text_encoder": None, "tokenizer": None}
    for name in [name for name in classes if name not in TOKENIZERS]:
        parts[name] = _taken(name, classes[name], getattr(pipe, name), pipe)
    for name in [name for name in TOKENIZERS if name in classes]:
        if isinstance(parts[TOKENIZERS[name]], TransformersText):
            continue
        with TemporaryDirectory() as folder:
            getattr(pipe, name).save_pretrained(folder)
            window = parts[TOKENIZERS[name]].config.max_position_embeddings
            parts[name] = CLIPTokenizer.from_folder(folder, window)
    if "safety_checker" in parts and pipe.feature_extractor is not None:
        side = parts["safety_checker"].config.vision.image_size
        check_preprocessor(json.loads(pipe.feature_extractor.to_json_string()), side)
    config, foreign = _known_config(pipe.scheduler)
    low_res = getattr(pipe, "low_res_scheduler", None)
    components = Components(
        **parts,
        scheduler_config=config,
        notes=tuple(notes),
        name=Path(str(pipe.config.get("_name_or_path") or "unnamed")).name,
        flags={name: True for name in FLAGS if pipe.config.get(name) is True},
        low_res_scheduler_config=json.loads(low_res.to_json_string()) if low_res else {},
    )
    check_fit(components, GIVEN)
    made = Pipeline(components)
    return with_scheduler(made, pipe.scheduler) if foreign else made


def to_diffusers(pipeline: Pipeline) -> Any:
    """The pipeline of diffusers that has the parts of this one: what its class `components.pipeline` names.

    Networks share their tensors; the scheduler is that of the model's scheduler_config, or the one of `with_scheduler`.
    Learned words are in the tokenizers and text encoders. UsageError: diffusers is not installed, adapters are loaded,
    or the model has a refiner, which diffusers holds as a pipeline of its own.
    """
    diffusers, c = _diffusers(), pipeline.components
    if pipeline.refiner:
        raise UsageError(
            "the model has a refiner, which diffusers holds as a pipeline of its own; give Pipeline(model.components) "
            "and model.refiner one after the other"
        )
    if c.weights.loaded:
        raise UsageError(
            f"the model has adapters in its weights ({', '.join(c.weights.loaded)}); take them out with unload_lora(), "
            "or save the model and open that"
        )
    parts: dict[str, Any] = {name: _given(network) for name, network in c.networks.items()}
    for name, tokenizer in c.tokenizers.items():
        with TemporaryDirectory() as folder:
            tokenizer.save(folder)
            parts[name] = _transformers().CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    if isinstance(c.text_encoder, TransformersText):
        parts["tokenizer"] = c.text_encoder.tokenizer
    if c.safety_checker:
        fields = preprocessor(c.safety_checker.config.vision.image_size)
        del fields["image_processor_type"]
        parts["feature_extractor"] = _transformers().CLIPImageProcessor(**fields)
    for name, config in (("scheduler", c.scheduler_config), ("low_res_scheduler", c.low_res_scheduler_config)):
        if config:
            parts[name] = getattr(diffusers, config["_class_name"]).from_config(config)
    if isinstance(pipeline.sampler, Borrowed):
        parts["scheduler"] = copy.deepcopy(pipeline.sampler.scheduler)
    options = dict.fromkeys(FLAGS, False) | c.flags
    options |= {"requires_safety_checker": c.safety_checker is not None, "add_watermarker": False}
    kind = getattr(diffusers, c.pipeline)
    takes = {name: one for name, one in inspect.signature(kind).parameters.items()}
    absent = {name: None for name, one in takes.items() if one.default is inspect.Parameter.empty}
    return kind(**absent | {name: value for name, value in (parts | options).items() if name in takes})


def _diffusers() -> Any:
    try:
        import diffusers
        import transformers  # noqa: F401  # without it diffusers has no pipelines
    except ImportError as error:
        raise UsageError(
            "this needs the packages diffusers and transformers; install them: pip install diffusers transformers"
        ) from error
    return diffusers


def _transformers() -> Any:
    import transformers

    return transformers


def _taken(name: str, class_name: str, theirs: Any, pipe: Any) -> Any:
    """Our network of theirs, on the same tensors."""
    theirs = getattr(theirs, "_orig_mod", theirs)  # of torch.compile
    if getattr(theirs, "peft_config", None):
        raise ModelError(
            f"{GIVEN} has adapters in its {name} ({', '.join(theirs.peft_config)}); take them out with "
            "unload_lora_weights(), after fuse_lora() if they are to be kept"
        )
    if getattr(theirs, "encoder_hid_proj", None) is not None:
        raise ModelError(f"{GIVEN} has an IP-Adapter in its {name}; take it out with unload_ip_adapter()")
    if any(parameter.is_meta for parameter in theirs.parameters()):
        raise ModelError(f"the weights of the {name} of {GIVEN} are moved away; call its remove_all_hooks() first")
    own = theirs.config.to_json_string(use_diff=False) if class_name in TEXTS else theirs.to_json_string()
    config: Json = json.loads(own)
    config |= {"architectures": [class_name]} if class_name in TEXTS else {}  # null in networks made in memory
    if class_name in KINDS:
        return TransformersText(TransformersTextConfig.from_dict(config), theirs, pipe.tokenizer)
    with Bare():
        ours = build(class_name, config)
    _share(theirs, ours, f"the {name} of {GIVEN} does not fit its config")
    return ours.eval()


def _given(ours: nn.Module) -> Any:
    """Their network of ours, on the same tensors."""
    if isinstance(ours, TransformersText):
        return ours._whole[0]
    name, config = class_of(ours), ours.config.to_dict()  # type: ignore[union-attr,operator]
    with torch.device("meta"):
        theirs = _built(name, config)
    _share(ours, theirs, f"{name} of diffusers or transformers has other weights")
    for place, buffer in list(theirs.named_buffers()):  # in no file: the numbers of the places
        parent, _, leaf = place.rpartition(".")
        setattr(theirs.get_submodule(parent), leaf, torch.arange(buffer.shape[-1], device=theirs.device)[None])
    return theirs.eval()


def _built(name: str, config: Mapping[str, Any]) -> Any:
    """Their network of a class of CLASSES."""
    diffusers, transformers = _diffusers(), _transformers()
    if name in TEXTS[:2]:
        return getattr(transformers, name)(transformers.CLIPTextConfig.from_dict(config))
    if name in TEXTS:
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

        return StableDiffusionSafetyChecker(transformers.CLIPConfig.from_dict(config))
    return getattr(diffusers, name).from_config(config)


def _share(one: nn.Module, other: nn.Module, claim: str) -> None:
    """Gives `other` the tensors of `one`, name by name; versions of transformers differ in what they put before the
    names. ModelError, which begins with `claim`: names or shapes differ.
    """
    wanted, state = other.state_dict().keys(), {}
    for key, value in one.state_dict().items():
        spelt = [key, *(f"{lead}{key}" for lead in LEADS), *(key.removeprefix(lead) for lead in LEADS)]
        state[next((name for name in spelt if name in wanted), key)] = value
    try:
        other.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ModelError(f"{claim}: {' '.join(str(error).split())[:300]}") from error


def _known_config(scheduler: Any) -> tuple[Json, bool]:
    """The config of a scheduler, and False; or True, and one of a known class for the same network, where the
    scheduler is not known here. ModelError: and its config says nothing of the network.
    """
    config: Json = json.loads(scheduler.to_json_string())
    try:
        from_config(config)
    except ModelError:
        if "beta_start" not in config:
            raise
        own = {name: config[name] for name in NETWORK_FIELDS if config.get(name) is not None}
        config = {"_class_name": "DDIMScheduler", "clip_sample": False, **own}
        from_config(config)
        return config, True
    return config, False
