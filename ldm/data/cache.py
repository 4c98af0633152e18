"""Latents and text embeddings on disk, found again by what they were computed from; one file each.

A file's name is the SHA-256 of everything its tensors depend on: the picture's bytes, its placement and the
autoencoder, or the text and the text encoder. So nothing has to be invalidated, data sets share what they have in
common, and what two processes write at once is the same. Latents are kept as mean and deviation: what is drawn from
them stays a matter of the sample's dice.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from ldm.checkpoints.safe import atomic_save_safetensors, read_header
from ldm.data.buckets import Placement
from ldm.errors import LdmError, ModelError
from ldm.models.tiny_vae import AutoencoderTiny
from ldm.models.vae import AutoencoderKL

VERSION = 1  # of what is computed for a key; raised when the same key would mean other tensors
SEAL = "sha256"


def digest(tensors: Mapping[str, Tensor], of: str = "") -> str:
    """The SHA-256 in hex of tensors: their names, types, shapes and bits; of a model's state_dict: of its weights."""
    known = hashlib.sha256(of.encode())
    for name, tensor in sorted(tensors.items()):
        known.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        known.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return known.hexdigest()


def of_networks(networks: Mapping[str, nn.Module]) -> str:
    """The digest of all numbers of some networks, by name."""
    parts = ((name, network.state_dict().items()) for name, network in networks.items())
    return digest({f"{name}.{key}": tensor for name, tensors in parts for key, tensor in tensors})


def latents_key(content: str, placement: Placement, weights: str, dtype: torch.dtype) -> str:
    """The key of a picture's latents: the digest of its bytes (as `ldm.data.pictures.manifest` has it), its placement
    (bucket, cut, mirroring), the autoencoder's `digest` and the type it computes in.
    """
    return _key("latents", content, asdict(placement), weights, str(dtype))


def text_key(text: str, weights: str, dtype: torch.dtype, clip_skip: int = 0) -> str:
    """The key of a text's embeddings: the text as it is said, the `digest` of all text encoders and vocabularies, the
    type they compute in, the layers left out.
    """
    return _key("text", text, weights, str(dtype), clip_skip)


def _key(*facts: Any) -> str:
    return hashlib.sha256(json.dumps([VERSION, *facts], sort_keys=True).encode()).hexdigest()


def kept(folder: str | Path, key: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors under a key, on the CPU: read, or made and written. Either way the same, bit by bit.

    A file that is damaged, whole or in a single bit, is made again. Any number of processes may ask at once. LdmError
    when the system refuses to write (disk full, no permission).
    """
    path = Path(folder) / key[:2] / f"{key}.safetensors"
    found = _read(path, key)
    if found is None:
        found = {name: tensor.detach().cpu().contiguous() for name, tensor in make().items()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LdmError(f"cannot write to {folder}: {error.strerror or error}; give another cache folder") from error
        seal = torch.frombuffer(bytearray.fromhex(digest(found, key)), dtype=torch.uint8)
        atomic_save_safetensors({**found, SEAL: seal}, path)
    return found


def _read(path: Path, key: str) -> dict[str, Tensor] | None:
    """What `kept` wrote under this key. None: there is nothing, or it is damaged."""
    if not path.is_file():
        return None
    try:
        read_header(path)
        tensors = load(path.read_bytes())
    except (ModelError, SafetensorError, OSError):
        return None
    seal = tensors.pop(SEAL, torch.empty(0, dtype=torch.uint8))
    return tensors if seal.numpy().tobytes().hex() == digest(tensors, key) else None


@torch.no_grad()
def posterior(vae: AutoencoderKL | AutoencoderTiny, picture: Tensor) -> dict[str, Tensor]:
    """A picture [3, H, W] in [-1, 1] as {"mean", "std"} [C, h, w] of its latents, unscaled, in the autoencoder's type.

    One picture at a time: how a convolution rounds may depend on how many there are, and a cached latent must not.
    """
    weight = next(vae.parameters())
    mean, logvar = vae.posterior(picture[None].to(weight.device, weight.dtype))
    return {"mean": mean[0], "std": (0.5 * logvar[0]).exp()}
