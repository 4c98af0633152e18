"""Where a model comes from: the one in the box, a folder, a single file, or the hub."""

from dataclasses import replace
from pathlib import Path

import torch

from ldm.checkpoints.components import Components, check_fit
from ldm.checkpoints.folder import open_folder
from ldm.errors import ModelError
from ldm.models.vae import AutoencoderKL

THE_BOX = "the model in the box"


def model_in_the_box() -> Path:
    """The folder of the model that comes with the package: inside it when installed, beside it in a checkout.
    ModelError: not there.
    """
    here = Path(__file__).resolve().parent
    for folder in (here / "weights", here.parent / "weights"):
        if (folder / "model_index.json").is_file():
            return folder
    raise ModelError("the model in the box is missing from this installation; reinstall it, or name a model folder")


def open_model(
    name: str | Path | None,
    dtype: torch.dtype,
    device: torch.device,
    *,
    variant: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    vae: str | Path | None = None,
    allow_pickle: bool = False,
    safety_checker: bool = True,
) -> Components:
    """The model of a folder, of a checkpoint file, of a hub id ("owner/name"), or the one in the box for None; the
    options are those of `Pipeline.from_pretrained`.
    """
    if name is None:
        whole = replace(open_folder(model_in_the_box(), dtype, device, variant), name=THE_BOX)
        return whole if vae is None else _with_vae(whole, vae, allow_pickle)
    if Path(name).is_file():
        from ldm.checkpoints.single_file import open_single_file

        return open_single_file(name, dtype, device, vae=vae, allow_pickle=allow_pickle)
    if Path(name).is_dir():
        whole = open_folder(Path(name), dtype, device, variant, allow_pickle, safety_checker)
    else:
        from ldm.checkpoints.hub import folder_of

        folder = folder_of(
            name, revision=revision, local_files_only=local_files_only, variant=variant, allow_pickle=allow_pickle
        )
        whole = open_folder(folder, dtype, device, variant, allow_pickle, safety_checker)
        whole = replace(whole, name=str(name))  # the cache's folder is called by a commit
    return whole if vae is None else _with_vae(whole, vae, allow_pickle)


def _with_vae(whole: Components, path: str | Path, allow_pickle: bool) -> Components:
    """The model with another autoencoder. A file does not say its scaling factor: it is the model's."""
    from ldm.checkpoints.single_file import open_vae

    like, weight = whole.vae, next(whole.vae.parameters())
    config = like.config if isinstance(like, AutoencoderKL) else None
    other = open_vae(path, weight.dtype, weight.device, config=config, allow_pickle=allow_pickle)
    changed = replace(whole, vae=other)
    check_fit(changed, f"{whole.name} with the autoencoder of {path}")
    return changed
