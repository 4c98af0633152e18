"""The fast mode of a model: pictures in few steps, by a LoRA that was distilled for it, and a tiny autoencoder.

It lies in a folder of its own in the model's, which other tools pass over:

fast/pytorch_lora_weights.safetensors   for the U-Net, at strength 1; diffusers' `load_lora_weights` reads it too
fast/generation_config.json             the scheduler, steps and guidance that go with it
fast/vae/                               an AutoencoderTiny in the autoencoder's place; may be absent
"""

import shutil
from dataclasses import replace
from pathlib import Path

from ldm import loras
from ldm.adapters.strength import Strength
from ldm.checkpoints.components import DIFFUSION, Components, check_fit
from ldm.checkpoints.folder import FAST, GENERATION, INDEX, defaults_of
from ldm.checkpoints.safe import atomic_folder, write_manifest
from ldm.checkpoints.single_file import open_vae
from ldm.errors import ModelError, UsageError

LORA = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for
TINY = "vae"
NAME = "fast-mode"  # of the adapter among those that are loaded


def quickened(c: Components, model: Path, own_vae: bool = False) -> Components:
    """A model that was opened from the folder `model`, in its fast mode: with the LoRA loaded under the name NAME, the
    tiny autoencoder, and the fast mode's defaults in place of its own.

    own_vae: its autoencoder was chosen by the user, and stays. UsageError: it has no fast mode. ModelError: that is
    damaged, or is another model's.
    """
    place = model / FAST
    if not (place / LORA).is_file():
        raise UsageError(
            f"{c.name} has no fast mode ({FAST}/{LORA} is not there); draw without --fast (fast=True), or make one "
            "with `ldm train distill`"
        )
    changed = replace(c, generation=c.generation | defaults_of(place), fast=NAME)
    if (place / TINY).is_dir() and not own_vae:
        weight = next(c.vae.parameters())
        changed.vae = open_vae(place / TINY, weight.dtype, weight.device)
        factors = changed.vae.config.factor, c.vae.config.factor
        if factors[0] != factors[1]:
            raise ModelError(
                f"{place / TINY} makes {factors[0]} pixels of one, and {c.name} {factors[1]}; train it anew"
            )
        check_fit(changed, str(place))
    loras.load(changed, place / LORA, Strength.of(1), NAME)
    return changed


def refuse_no_model(model: str | Path) -> Path:
    """The folder that is to get a fast mode. ModelError: it is no model's."""
    if not (Path(model) / INDEX).is_file():
        raise ModelError(f"{model} is no model folder: it has no {INDEX}; name the folder that gets the fast mode")
    return Path(model)


def write_fast(model: str | Path, distilled: str | Path | None = None, decoder: str | Path | None = None) -> Path:
    """Give a model folder a fast mode, or a part of it, and write its manifest anew; returns the folder of that mode.

    distilled: the result of `ldm train distill`. decoder: that of `ldm train tiny-decoder`. What is not given stays as
    it is there. The mode is written whole or not at all; if the process ends before the manifest is written, `ldm
    verify` tells so. ModelError: `model` is no model folder, or a part is not where it should be.
    """
    model = refuse_no_model(model)
    parts = {LORA: distilled, GENERATION: distilled}
    parts |= {f"{TINY}/config.json": decoder, f"{TINY}/{DIFFUSION}.safetensors": decoder}
    with atomic_folder(model / FAST) as staging:
        for name, given in parts.items():
            file = model / FAST / name if given is None else Path(given) / Path(name).name
            if file.is_file():
                (staging / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(file, staging / name)
            elif given is not None:
                raise ModelError(f"there is no {file}; name the `result` folder of the run that made it")
    write_manifest(model)
    return model / FAST
