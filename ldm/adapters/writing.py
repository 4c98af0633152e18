"""Adapters to files, in the dialects of the tools that read them.

Numbers are written as they are. What a dialect has no place for in its tensors stands in the metadata: PEFT's
configuration in diffusers' files, and how alpha was stored, so that a file of kohya's comes back bit by bit.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ldm.adapters import kinds
from ldm.adapters.adapter import Adapter, Layer
from ldm.adapters.names import TEXT, TEXT_2, UNET, Book
from ldm.checkpoints.load import finite
from ldm.checkpoints.safe import CODES, DTYPES, atomic_folder, atomic_json, atomic_save_safetensors
from ldm.errors import ModelError, UsageError, choose

WRITTEN = ("diffusers", "kohya", "peft", "comfy")
"""The dialects that are written. Every one of names.DIALECTS is read."""
ALPHAS = "ldm.alphas"
"""Metadata: in what type the file that an adapter was read from stores alpha. JSON, code of the type ("I64"; "" where a
module has no alpha) -> addresses, in place of which one of them has "*": all others.
"""
CONFIGURED = "lora_adapter_metadata"  # where diffusers looks for PEFT's configurations
OWN = ("format", ALPHAS, CONFIGURED, "sshs_model_hash", "sshs_legacy_hash")  # metadata that each writing makes anew
PEFT = {
    "lora_down.weight": "lora_A.weight",
    "lora_up.weight": "lora_B.weight",
    "lora_up.bias": "lora_B.bias",
    "dora_scale": "lora_magnitude_vector",
}
DIFFUSERS = {  # by network; without lora_linear_layer its loader of text encoders takes some files for no LoRA
    UNET: PEFT | {name: name.replace("lora_", "lora.") for name in PEFT if name.startswith("lora_")},
} | dict.fromkeys(
    (TEXT, TEXT_2),
    {name: name.replace("lora_", "lora_linear_layer.") for name in PEFT if name.startswith("lora_")}
    | {"dora_scale": "lora_magnitude_vector.weight"},  # so transformers wants it
)
SAVED, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PARTS = {SAVED, CONFIG, UNET, TEXT, TEXT_2}  # of a folder of PEFT's
AS_LORA = "write it as plain LoRA (`--as-lora RANK`), or for kohya or comfy"
BASES = {  # architecture -> kohya's ss_base_model_version and ss_v2
    "stable-diffusion-v1": ("sd_v1", "False"),
    "stable-diffusion-v2-512": ("sd_v2", "True"),
    "stable-diffusion-v2-768-v": ("sd_v2_v", "True"),
    "stable-diffusion-xl-v1-base": ("sdxl_base_v1-0", "False"),
}


def write_adapter(
    adapter: Adapter,
    path: str | Path,
    book: Book,
    dialect: str = "diffusers",
    *,
    dtype: torch.dtype | None = None,
    architecture: str = "",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes an adapter: a file, or for "peft" a folder, in which each network has one of its own, but a U-Net alone.

    book: the names of the modules of a model that it is for. dtype: of all numbers but alpha; None keeps theirs.
    architecture: of the model, in the words of Family.architectures. metadata: entries beside those of the adapter,
    before which they come. diffusers' and PEFT's files hold plain LoRA and DoRA, the others every kind.

    ModelError: the dialect cannot hold a layer, or has no name for its module, or a number is not finite in `dtype`.
    LdmError: the file cannot be written. UsageError: no dialect of WRITTEN, or a folder of other things at `path`.
    """
    choose("dialect to write", dialect, WRITTEN)
    if not adapter.layers:
        raise ModelError(f"{adapter.name} has no layers; there is nothing to write")
    for address, layer in adapter.layers.items():
        if address not in book.modules or not kinds.fits(layer, book.modules[address]):
            fault = "is not of the shape that" if address in book.modules else "is not in the model that"
            raise ModelError(f"{address} {fault} {adapter.name} is for; name the model it is for")
    if other := [address for address in adapter.layers if address.partition(".")[0] not in (UNET, TEXT, TEXT_2)]:
        raise ModelError(f"{adapter.name} is for {other[0]}, and files of adapters hold U-Nets and text encoders alone")
    told = _told(adapter, architecture) | dict(metadata or {})
    if dialect in ("kohya", "comfy"):
        return _save(_kohya(adapter, book, book.kohya if dialect == "kohya" else dialect, dtype), path, told)
    told |= {ALPHAS: adapter.metadata[ALPHAS]} if ALPHAS in adapter.metadata else {}
    groups = _groups(adapter, dialect)
    configs = {network: peft_config(layers) for network, layers in groups.items()}
    files = {network: _peft(network, layers, book, dialect, dtype) for network, layers in groups.items()}
    if dialect == "diffusers":
        told[CONFIGURED] = json.dumps(
            {f"{n}.{key}": value for n, config in configs.items() for key, value in config.items()}
        )
        return _save({name: value for tensors in files.values() for name, value in tensors.items()}, path, told)
    path = Path(path)
    if path.is_dir() and (others := {item.name for item in path.iterdir()} - PARTS):
        raise UsageError(f"{path} is a folder with other things in it ({min(others)}); choose a new or empty folder")
    with atomic_folder(path) as folder:
        for network, tensors in files.items():
            place = folder if files.keys() == {UNET} else folder / network
            place.mkdir(exist_ok=True)
            _save(tensors, place / SAVED, told)
            atomic_json(place / CONFIG, {"peft_type": "LORA", "inference_mode": True, **configs[network]})
    return None


def _save(tensors: Mapping[str, Tensor], path: str | Path, told: Mapping[str, str]) -> None:
    atomic_save_safetensors(tensors, path, {**told, **hashes(tensors, told)})


# -- names and numbers ------------------------------------------------------------------------------------------------


def _kohya(adapter: Adapter, book: Book, dialect: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors under kohya's and LyCORIS' names, alpha among them as the file has it that was read."""
    types = _alpha_types(adapter)
    tensors: dict[str, Tensor] = {}
    for address, layer in adapter.layers.items():
        if "on_bias" in layer.tensors and bool(layer.tensors["on_bias"]):
            raise ModelError(
                f"{address} is IA3 that scales a bias, which only PEFT knows; write it as plain LoRA instead"
            )
        name = book.spelled(address, dialect)
        tensors |= {
            f"{name}.{own}": _cast(address, value, dtype) for own, value in layer.tensors.items() if own != "on_bias"
        }
        code = types.get(address, types.get("*"))
        if layer.alpha is not None and (code != "" or layer.alpha != kinds.rank(layer)):
            first = next(value.dtype for value in layer.tensors.values() if value.is_floating_point())
            tensors[f"{name}.alpha"] = _alpha(layer.alpha, DTYPES.get(code or "", dtype or first))
    return tensors


def _alpha(alpha: float, dtype: torch.dtype) -> Tensor:
    """A number in this type, or in float32 where it would change."""
    stored = torch.tensor(alpha).to(dtype)
    return stored if float(stored) == alpha else torch.tensor(alpha)


def _alpha_types(adapter: Adapter) -> dict[str, str]:
    """ALPHAS by address, "*" for the others; nothing where the metadata is not what is written there."""
    try:
        said = json.loads(adapter.metadata.get(ALPHAS, "{}"))
        listed = [(code, addresses) for code, addresses in said.items() if code in DTYPES or code == ""]
        return {str(address): code for code, addresses in listed for address in addresses}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}


def alpha_types(stored: Mapping[str, torch.dtype | None]) -> str:
    """The text of ALPHAS from the type that each address' alpha has; None for one without."""
    codes = {address: "" if dtype is None else CODES[dtype] for address, dtype in stored.items()}
    [(usual, _)] = Counter(codes.values()).most_common(1) or [("F32", 0)]
    others = {code: [address for address in codes if codes[address] == code] for code in set(codes.values()) - {usual}}
    return json.dumps({usual: ["*"], **others}, sort_keys=True)


def _groups(adapter: Adapter, dialect: str) -> dict[str, dict[str, Layer]]:
    """The layers by network and path. ModelError where one is of a kind that PEFT's LoRA is not."""
    groups: dict[str, dict[str, Layer]] = {}
    strange: dict[str, None] = {}
    for address, layer in adapter.layers.items():
        network, _, path = address.partition(".")
        groups.setdefault(network, {})[path] = layer
        magnitude = layer.tensors.get("dora_scale")
        names = {
            f"{layer.kind}": layer.kind != "lora",
            "lora in Tucker form": "lora_mid.weight" in layer.tensors,
            "lora with a bias difference": layer.kind == "lora" and "diff_b" in layer.tensors,
            "lora with a scalar": layer.kind == "lora" and "scalar" in layer.tensors,
            "DoRA over inputs": magnitude is not None and len(magnitude) == 1 < magnitude.numel(),
            "LoRA of an embedding": path.endswith("embedding"),
        }
        strange |= dict.fromkeys(name for name, is_so in names.items() if is_so)
    for layers in groups.values():
        if len({"dora_scale" in layer.tensors for layer in layers.values()}) > 1:
            strange["DoRA in some layers of a network only"] = None
    if strange:
        raise ModelError(f"files of {dialect} cannot hold {', '.join(strange)}; {AS_LORA}")
    return groups


def peft_config(layers: Mapping[str, Layer]) -> dict[str, Any]:
    """PEFT's LoraConfig of a network's LoRA layers, by path in it: every rank and alpha of its own in a pattern.

    A path of a text encoder is without `text_model.`: PEFT takes it as the end of one, so it fits both of transformers'
    forms.
    """
    short = {path.removeprefix("text_model."): layer for path, layer in layers.items()}
    ranks = {path: int(kinds.rank(layer) or 0) for path, layer in short.items()}
    alphas = {path: _whole(layer.alpha or ranks[path]) for path, layer in short.items()}
    (rank, _), (alpha, _) = (Counter(numbers.values()).most_common(1)[0] for numbers in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {path: number for path, number in ranks.items() if number != rank},
        "alpha_pattern": {path: number for path, number in alphas.items() if number != alpha},
        "target_modules": list(short),
        "use_dora": any("dora_scale" in layer.tensors for layer in short.values()),
        "use_rslora": False,
        "lora_bias": any("lora_up.bias" in layer.tensors for layer in short.values()),
        "bias": "none",
    }


def _whole(number: float) -> float:
    return int(number) if number == int(number) else number


def _peft(
    network: str, layers: Mapping[str, Layer], book: Book, dialect: str, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """The tensors of a network under PEFT's names, or under those that diffusers gives them."""
    words = DIFFUSERS[network] if dialect == "diffusers" else PEFT
    flat = dialect == "peft" and f"{network}.text_projection" not in book.modules  # transformers' CLIPTextModel since 5
    biased = any("lora_up.bias" in layer.tensors for layer in layers.values())
    tensors = {}
    for path, layer in layers.items():
        address = f"{network}.{path}"
        outputs, *rest = book.modules[address]
        held = dict(layer.tensors)
        if biased and "lora_up.bias" not in held:  # PEFT has it in every layer or in none
            held["lora_up.bias"] = torch.zeros(outputs, dtype=held["lora_up.weight"].dtype)
        shapes = {
            "lora_down.weight": (-1, *rest),
            "lora_up.weight": (outputs, -1, *[1] * (len(rest) - 1)),
            "dora_scale": (1, outputs, 1, 1) if len(rest) > 1 else (outputs,),
        }
        name = book.spelled(address, dialect)
        name = name.replace("base_model.model.text_model.", "base_model.model.") if flat else name
        for own, value in held.items():
            tensors[f"{name}.{words[own]}"] = _cast(address, value, dtype).reshape(shapes.get(own, (-1,)))
    return tensors


def _cast(address: str, value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor as it is stored. ModelError: it is not finite there."""
    stored = value.detach().to("cpu", dtype if value.is_floating_point() else None).contiguous()
    if not finite(stored):
        raise ModelError(f"{address} is not finite in {stored.dtype}; write it in float32 if it is in the adapter")
    return stored


# -- metadata ---------------------------------------------------------------------------------------------------------


def _told(adapter: Adapter, architecture: str) -> dict[str, str]:
    """The metadata: of the adapter what is there, of kohya's and Stability AI's the least that other tools look for."""
    layers = adapter.layers.values()
    ranked = [(rank, layer.alpha or rank) for layer in layers if (rank := kinds.rank(layer))]
    dims, alphas = ({str(_whole(pair[at])) for pair in ranked} for at in (0, 1))
    algorithms = {layer.kind for layer in layers} - {"norm", "bias"}
    arguments = {"algo": "/".join(sorted(algorithms))} if algorithms != {"lora"} else {}
    arguments |= {"dora_wd": "True"} if any("dora_scale" in layer.tensors for layer in layers) else {}
    base, second = BASES.get(architecture, ("", ""))
    told = {
        "ss_network_module": "lycoris.kohya" if arguments else "networks.lora",
        "ss_network_dim": dims.pop() if len(dims) == 1 else "Dynamic" if dims else "",
        "ss_network_alpha": alphas.pop() if len(alphas) == 1 else "Dynamic" if alphas else "",
        "ss_network_args": json.dumps(arguments),
        "ss_base_model_version": base,
        "ss_v2": second,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora" if architecture else "",
        "modelspec.title": adapter.name,
    }
    kept = {key: value for key, value in adapter.metadata.items() if key not in OWN}
    return {key: value for key, value in told.items() if value} | kept


def hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """kohya's two hashes of a LoRA file (library/train_util.py, precalculate_safetensors_hashes), by which A1111 and
    others know it again: the sha256 of all that follows the header, and the first 8 digits of that of the 64 KiB behind
    the first MiB of the file as it would be with the metadata of its training alone.
    """
    data = save(dict(tensors), {key: value for key, value in metadata.items() if key.startswith("ss_")})
    begin = 8 + int.from_bytes(data[:8], "little")
    return {
        "sshs_model_hash": hashlib.sha256(memoryview(data)[begin:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8],
    }
