"""Where a model comes from: the one in the box, a folder, a single file, or the hub."""

from dataclasses import replace
from pathlib import Path

import torch

from ldm.checkpoints.components import Components, check_fit
from ldm.checkpoints.folder import open_folder
from ldm.errors import ModelError, UsageError
from ldm.fast import quickened
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
    fast: bool = False,
) -> Components:
    """The model of a folder, of a checkpoint file, of a hub id ("owner/name"), or the one in the box for None; the
    options are those of `Pipeline.from_pretrained`.
    """
    if name is not None and Path(name).is_file():
        from ldm.checkpoints.single_file import open_single_file

        if fast:
            raise UsageError(
                f"{name} is a single file, and a fast mode lies in a model folder; name one, or draw without"
            )
        return open_single_file(name, dtype, device, vae=vae, allow_pickle=allow_pickle)
    if name is None:
        folder, title = model_in_the_box(), THE_BOX
    elif Path(name).is_dir():
        folder, title = Path(name), ""
    else:
        from ldm.checkpoints.hub import folder_of

        folder = folder_of(
            name, revision=revision, local_files_only=local_files_only, variant=variant, allow_pickle=allow_pickle
        )
        title = str(name)  # the cache's folder is called by a commit
    whole = open_folder(folder, dtype, device, variant, allow_pickle, safety_checker)
    whole = replace(whole, name=title) if title else whole
    whole = whole if vae is None else _with_vae(whole, vae, allow_pickle)
    return quickened(whole, folder, own_vae=vae is not None) if fast else whole


def _with_vae(whole: Components, path: str | Path, allow_pickle: bool) -> Components:
    """The model with another autoencoder. A file does not say its scaling factor: it is the model's."""
    from ldm.checkpoints.single_file import open_vae

    like, weight = whole.vae, next(whole.vae.parameters())
    config = like.config if isinstance(like, AutoencoderKL) else None
    other = open_vae(path, weight.dtype, weight.device, config=config, allow_pickle=allow_pickle)
    changed = replace(whole, vae=other)
    check_fit(changed, f"{whole.name} with the autoencoder of {path}")
    return changed
