"""Whole models in one file, as CompVis' and Stability's code wrote them and most tools share them: opened and saved.

All that such a file does not say, configurations, tokenizer and scheduler, comes from its family (families.py), so
nothing is fetched. Also VAEs and TAESDs in files of their own.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ldm.checkpoints.components import CLASSES, TOKENIZERS, Components, check_fit
from ldm.checkpoints.families import (
    FAMILIES,
    HARMLESS,
    KL,
    TAESD,
    TINY,
    VAE_ALONE,
    VAE_PREFIXES,
    Facts,
    Family,
    recognise,
)
from ldm.checkpoints.folder import find_weights, open_network
from ldm.checkpoints.load import Bare, Piece, Wanted, check, finite, listed, load_pieces
from ldm.checkpoints.pickles import readable
from ldm.checkpoints.safe import Header, atomic_save_safetensors, read_header, read_json
from ldm.checkpoints.spelling import Part, Rule, Spelling, located, spelled, taesd_rules
from ldm.errors import ModelError, NumericalError, UsageError
from ldm.models.clip import CLIPTextConfig, CLIPTextModel
from ldm.models.presets import VAES
from ldm.models.tiny_vae import AutoencoderTiny, TinyVAEConfig
from ldm.models.unet import UNet, UNetConfig
from ldm.models.vae import AutoencoderKL, VAEConfig
from ldm.schedulers.config import network_of
from ldm.text.tokenizer import CLIPTokenizer

VAE = AutoencoderKL | AutoencoderTiny
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}  # diffusers' word -> that of modelspec.prediction_type
MODELS = {UNetConfig: UNet, VAEConfig: AutoencoderKL, CLIPTextConfig: CLIPTextModel, TinyVAEConfig: AutoencoderTiny}
FREE = {"sample_size", "in_channels", "eos_token_id", "force_upcast"}  # of configs: what may differ in a family
UNET = "model.diffusion_model."
SPEC = {
    "modelspec.sai_model_spec": "1.0.0",
    "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
}
"""Metadata of the Stability AI model specification; the implementation is whose names the tensors have."""


class Plan(NamedTuple):
    """A network to be loaded: built on the meta device, the rule that finds each of its keys, and where those lie that
    are in the file.
    """

    model: nn.Module
    rules: Mapping[str, Rule]
    pieces: Mapping[str, Piece]


def open_single_file(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    *,
    prediction_type: str | None = None,
    ema: bool = False,
    allow_pickle: bool = False,
    vae: str | Path | None = None,
) -> Components:
    """Opens a file of a family of FAMILIES; networks come in eval mode.

    dtype: of the weights; None keeps the file's. prediction_type: "epsilon" or "v_prediction", against what the file
    says or where it says nothing; without it, the family's own. ema: the averaged weights of the U-Net instead of those
    last trained. allow_pickle: also open .ckpt and .pt. vae: a file or folder (`open_vae`) in place of the file's.

    Every key is compared before anything is allocated. UsageError: another prediction_type. ModelError: the file is
    damaged, or pickled without allow_pickle; it is a LoRA, a VAE or of no family (it says what it is, and what to do);
    keys are missing or unexpected; it has no EMA weights, or no VAE, where they are wanted.
    """
    path = Path(path)
    if prediction_type not in (None, *PREDICTIONS):
        raise UsageError(f"prediction_type {prediction_type!r}; it is {' or '.join(PREDICTIONS)}")
    with readable(path, allow_pickle) as file:
        header = read_header(file)
        facts = recognise(header)
        if facts.family is None:
            raise ModelError(f"{path} is {facts.what}, not a whole model; {facts.advice}")
        family = FAMILIES[facts.family]
        prediction, notes = _prediction(facts, family, prediction_type)
        unet, said = family.unet(facts.in_channels, prediction), f"{path} is {facts.what}"
        plans = _plans(file, header, family, unet, said, ema=ema, vae=vae is None)
        idle = (*(VAE_PREFIXES if vae else ()), *((UNET,) if ema else ()))
        passed = _checked(header, plans.values(), f"{said} with other keys than those have", idle)
        notes += [f"passed over {len(passed)} keys that drawing does not need ({listed(passed)})"] if passed else []
        parts: dict[str, Any] = {}
        if vae is not None:
            config = family.parts["vae"].config
            parts["vae"] = open_vae(vae, dtype, device, config=config, allow_pickle=allow_pickle)
        for name, plan in plans.items():
            load_pieces(plan.model, plan.pieces, dtype, device)
            parts[name] = plan.model.eval()
    for name in [name for name, encoder in TOKENIZERS.items() if encoder in parts]:
        parts[name] = CLIPTokenizer.standard(family.parts[TOKENIZERS[name]].pad)
    components = Components(
        **{"text_encoder": None, "tokenizer": None} | parts,
        scheduler_config=family.scheduler_config(facts.in_channels, prediction, facts.zero_snr),
        notes=tuple(notes),
        name=path.stem,
        flags=dict(family.flags),
        low_res_scheduler_config=dict(family.low_res),
    )
    check_fit(components, str(path))
    return components


def _prediction(facts: Facts, family: Family, asked: str | None) -> tuple[str, list[str]]:
    """What the U-Net predicts: as asked, as the file says, or as is usual; and a note where that is a guess."""
    usual = family.channels[facts.in_channels]
    if asked is None and facts.prediction is None and usual == "v_prediction" and family.sides:  # there are both
        guess = f"the file does not say what its U-Net predicts; taken as {usual}, that of the 768-pixel models"
        return usual, [f"{guess} (should pictures come out as noise, open it with prediction_type epsilon)"]
    return asked or facts.prediction or usual, []


def _plans(
    path: Path, header: Header, family: Family, unet: UNetConfig, said: str, *, ema: bool, vae: bool
) -> dict[str, Plan]:
    """The networks of a model, by the names of Components. ModelError, beginning with `said`, where one is absent."""
    parts = {name: part for name, part in family.parts.items() if vae or name != "vae"}
    parts["unet"] = parts["unet"]._replace(config=unet)
    plans = {name: _plan(path, header, part) for name, part in parts.items()}
    if ema:
        plans["unet"] = _averaged(path, header, plans["unet"].model, parts["unet"])
    lacking = [name for name, plan in plans.items() if not plan.pieces]
    if lacking:
        remedy = {"unet": "open it without ema", "vae": "give one (vae=)"}.get(lacking[0], "take a whole model")
        weights = "EMA weights" if lacking[0] == "unet" else f"weights of the {lacking[0]}"
        raise ModelError(f"{said} without {weights}; {remedy}")
    return plans


def _plan(path: Path, header: Header, part: Part) -> Plan:
    """One network and where the file has it."""
    with Bare():
        model = MODELS[type(part.config)](part.config)
    rules = located(model.state_dict().keys(), part, header.tensors.keys())
    return Plan(model, rules, _pieces(path, header, rules))


def _averaged(path: Path, header: Header, model: nn.Module, part: Part) -> Plan:
    """The U-Net from its exponential moving average, which has names without dots."""
    rules = spelled(model.state_dict().keys(), part.spellings[0], part.config)
    flat = {
        key: rule._replace(theirs="model_ema." + rule.theirs.removeprefix("model.").replace(".", ""))
        for key, rule in rules.items()
    }
    return Plan(model, flat, _pieces(path, header, flat))


def _pieces(path: Path, header: Header, rules: Mapping[str, Rule]) -> dict[str, Piece]:
    """Where each key lies that is in the file."""
    pieces = {}
    for key, rule in rules.items():
        entry = header.tensors.get(rule.theirs)
        if entry is not None:
            size, rest = divmod(entry.shape[0], 3) if entry.shape else (0, 1)
            # three that do not divide evenly are taken whole, and so refused for their shape
            rows = None if rule.third is None or rest else range(rule.third * size, (rule.third + 1) * size)
            pieces[key] = Piece(path, rule.theirs, entry, rows, rule.transpose)
    return pieces


def _checked(header: Header, plans: Iterable[Plan], claim: str, idle: tuple[str, ...] = ()) -> list[str]:
    """The names that are passed over: harmless ones, and those that begin with one of `idle`. ModelError, beginning
    with `claim`, unless the others are those that the networks want, in their shapes.
    """
    wanted, used = [], set()
    for plan in plans:
        for key, value in plan.model.state_dict().items():
            wanted.append(Wanted(plan.rules[key].theirs, tuple(value.shape), plan.pieces.get(key)))
        used |= {piece.name for piece in plan.pieces.values()}
    rest = [name for name in header.tensors if name not in used]
    passed = [name for name in rest if name.startswith(idle) or HARMLESS.fullmatch(name)]
    check(wanted, sorted(set(rest) - set(passed)), claim)
    return passed


def open_vae(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    *,
    config: VAEConfig | None = None,
    allow_pickle: bool = False,
) -> VAE:
    """Opens a VAE, in eval mode: a folder of diffusers (or `vae/` in it), a file of its own in the original names or in
    diffusers', that of a whole model's file; or a TAESD: diffusers' file, or its authors' two (give either of them).

    config: that of the model it is for, since no file says its scaling_factor; without it, that of Stable Diffusion 1
    and 2. ModelError: it is something else, or does not fit.
    """
    path = Path(path)
    if path.is_dir():
        return _vae_of_folder(path, dtype, device, allow_pickle)
    with ExitStack() as opened:
        file = opened.enter_context(readable(path, allow_pickle))
        header = read_header(file)
        facts = recognise(header)
        if facts.family is not None:
            tensors = {name: entry for name, entry in header.tensors.items() if name.startswith(VAE_PREFIXES)}
            header, config = Header(tensors, header.metadata), config or FAMILIES[facts.family].parts["vae"].config
        elif facts.what not in (KL, TINY):
            raise ModelError(f"{path} is {facts.what}, not a VAE; {facts.advice}")
        deep = any("encoder.down.3." in name or "encoder.down_blocks.3." in name for name in header.tensors)
        config = config or VAES["sd" if deep else "x4-upscaler"]
        if facts.what == TINY:
            plan = _tiny(path, file, header, lambda twin: opened.enter_context(readable(twin, allow_pickle)))
        else:
            plan = _plan(file, header, Part(config, VAE_ALONE))
        _checked(header, [plan], f"{path} is {facts.what} with other keys than those have")
        load_pieces(plan.model, plan.pieces, dtype, device)
    return plan.model.eval()  # type: ignore[return-value]


def _vae_of_folder(path: Path, dtype: torch.dtype | None, device: str | torch.device, allow_pickle: bool) -> VAE:
    folder = path / "vae" if (path / "vae").is_dir() else path
    config = read_json(folder / "config.json")
    name = str(config.get("_class_name"))
    if name not in ("AutoencoderKL", "AutoencoderTiny"):
        raise ModelError(f"{folder} holds a {name!a:.60}; a VAE is an AutoencoderKL or AutoencoderTiny")
    files = find_weights(folder, CLASSES[name].stem, None, allow_pickle)
    if files is None:
        raise ModelError(f"{folder} has no {CLASSES[name].stem}.safetensors; fetch it")
    return open_network(folder, name, files[0], dtype, device)  # type: ignore[no-any-return]


def _tiny(path: Path, file: Path, header: Header, opened: Callable[[Path], Path]) -> Plan:
    """A TAESD; of its authors' two files, the other one is looked for beside `path`, whose contents `file` holds.
    opened: the other one as safetensors.
    """
    config = TinyVAEConfig()
    if "3.conv.0.weight" not in header.tensors:
        return _plan(file, header, Part(config, TAESD))
    here, there = ("encoder", "decoder") if "0.weight" in header.tensors else ("decoder", "encoder")
    twin = path.with_name(path.name.replace(here, there))
    if twin == path or not twin.is_file():
        raise ModelError(
            f"{path} is the {here} of a TAESD; put its {there} beside it, named {there} in place of {here}"
        )
    alone = Part(config, (Spelling("", lambda c: taesd_rules(c, "", "")),))
    model, rules, _ = _plan(file, header, alone)
    pieces: dict[str, Piece] = {}
    other = opened(twin)
    for half, source, found in ((here, file, header), (there, other, read_header(other))):
        pieces |= _pieces(source, found, {key: rule for key, rule in rules.items() if key.startswith(half)})
        header.tensors.update(found.tensors)  # for the names that neither half knows
    return Plan(model, rules, pieces)


def family_of(components: Components) -> str:
    """The name in FAMILIES of the family whose single files can hold a model. ModelError when there is none: a single
    file holds no configuration, so only what the published models have in common can be told from it.
    """
    networks = {name: network for name, network in components.networks.items() if name != "safety_checker"}
    told, fewest = "the model to save", len(networks)
    for key, family in FAMILIES.items():
        if family.parts.keys() != networks.keys() or components.unet.config.in_channels not in family.channels:
            continue
        others = [name for name, part in family.parts.items() if not _alike(networks[name].config, part.config)]
        if not others:
            return key
        if len(others) < fewest:
            told, fewest = f"the model to save has another {' and '.join(others)} than {family.title}", len(others)
    raise ModelError(
        f"{told} and is of no family whose single files say what it is ({', '.join(FAMILIES)}); save a folder instead"
    )


def known_family(components: Components) -> Family | None:
    """The published family that a model is of; None for one of its own kind."""
    try:
        return FAMILIES[family_of(components)]
    except ModelError:
        return None


def _alike(a: object, b: Any) -> bool:
    """Whether two configurations make the same network."""
    return type(a) is type(b) and all(value == getattr(b, name) for name, value in vars(a).items() if name not in FREE)


def save_single_file(
    components: Components,
    path: str | Path,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes one safetensors file in the original names, whole or not at all, which other tools open too.

    dtype: of the weights in the file; None keeps theirs. metadata: added to that of the model specification
    ("modelspec.title", "modelspec.license", ...). Prediction and zero terminal SNR are told in it, and where they are
    not the family's usual ones by the empty tensors `v_pred` and `ztsnr` that other tools look for. What Components do
    not keep is not written: of Stable Diffusion 2's text encoder the projection and the last layer (nor do diffusers'
    own scripts), `logit_scale`, constants of training, EMA weights; the safety checker has no place in such a file.

    ModelError: the model is of no family, or has learned words, or another noise schedule than its family;
    NumericalError: a weight is not finite, or no longer is in `dtype`; LdmError: it cannot be written.
    """
    check_fit(components, "the model to save")
    key = family_of(components)
    family, in_channels = FAMILIES[key], components.unet.config.in_channels
    schedule, prediction = network_of(components.scheduler_config)
    usual, _ = network_of(family.scheduler_config(in_channels, family.channels[in_channels]))
    betas = (usual.with_zero_terminal_snr() if schedule.zero_terminal_snr else usual).betas
    if prediction not in PREDICTIONS or betas.shape != schedule.betas.shape or not np.allclose(betas, schedule.betas):
        fault = f"the model to save has another noise schedule or prediction ({prediction}) than {family.title}"
        raise ModelError(f"{fault}, which such a file cannot say; save a folder instead")
    tensors: dict[str, Tensor] = {}
    for name, part in family.parts.items():
        tensors |= _theirs(getattr(components, name), name, part, dtype)
    marks = {
        "v_pred": prediction == "v_prediction" != family.channels[in_channels],
        "ztsnr": schedule.zero_terminal_snr,
    }
    tensors |= {name: torch.empty(0) for name, marked in marks.items() if marked}
    side = components.unet.config.sample_size * components.vae.config.factor
    told = SPEC | {
        "modelspec.architecture": family.architectures[prediction],
        "modelspec.title": components.name,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": PREDICTIONS[prediction],
    }
    atomic_save_safetensors(tensors, path, told | dict(metadata or {}), dtype)


def _theirs(model: nn.Module, name: str, part: Part, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors of a network under their names and in their shapes. NumericalError: one is not finite in `dtype`."""
    state = {key: value.detach() for key, value in model.state_dict().items()}
    rows: dict[str, list[tuple[int, Tensor]]] = {}
    for key, rule in spelled(state.keys(), part.spellings[0], part.config).items():
        value = state[key]
        if not finite(value.to(dtype)):
            kind = dtype or value.dtype
            raise NumericalError(f"{name} {key} is not finite in {kind}; save in float32 if it is in the model")
        value = value.T if rule.transpose else value[..., None, None] if rule.conv else value
        rows.setdefault(rule.theirs, []).append((rule.third or 0, value))
    ordered = {
        theirs: [value for _, value in sorted(parts, key=lambda item: item[0])] for theirs, parts in rows.items()
    }
    return {theirs: torch.cat(parts) if len(parts) > 1 else parts[0] for theirs, parts in ordered.items()}
