"""Single files for tests, of every family, at reduced width and true topology or at true size without numbers.

The networks are diffusers' and transformers'; the names are those of real files (data/single_files.json.gz, from
ostris/ai-toolkit, MIT; see NOTICE). Nothing here is written by what it tests.
"""

import gzip
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import copier
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.checkpoints.families import FAMILIES, Family
from ldm.models.presets import TEXT_ENCODERS, UNETS

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the other libraries' own deprecations while they import
    import diffusers
    import transformers
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

DATA = Path(__file__).parent / "data" / "single_files.json.gz"
LISTS: dict[str, dict[str, Any]] = json.loads(gzip.decompress(DATA.read_bytes()))
PREFIXES = {"unet_": "unet", "vae_": "vae", "te_": "text_encoder", "te0_": "text_encoder", "te1_": "text_encoder_2"}

SMALL_CLIP = replace(TEXT_ENCODERS["clip-l"], hidden_size=16, intermediate_size=32, num_attention_heads=2)
SMALL_H = replace(TEXT_ENCODERS["openclip-h"], hidden_size=24, intermediate_size=48, num_attention_heads=2)
SMALL_G = replace(
    TEXT_ENCODERS["openclip-bigg"], hidden_size=24, intermediate_size=48, num_attention_heads=2, projection_dim=20
)
NARROW = {"norm_num_groups": 4, "num_heads": (2, 2, 4, 4), "block_out_channels": (8, 16, 32, 32)}
XL = NARROW | {"addition_time_embed_dim": 4}
SMALL_UNETS = {
    "sd1": replace(UNETS["sd15"], **NARROW, cross_attention_dim=16),
    "sd2": replace(UNETS["sd21"], **NARROW, cross_attention_dim=24),
    "x4-upscaler": replace(
        UNETS["x4-upscaler"], **NARROW | {"block_out_channels": (8, 16, 16, 32)}, cross_attention_dim=24
    ),
    "sdxl": replace(
        UNETS["sdxl"],
        **XL | {"num_heads": (2, 2, 4), "block_out_channels": (8, 16, 32)},
        cross_attention_dim=16 + 24,
        projection_class_embeddings_input_dim=20 + 6 * 4,
    ),
    "sdxl-refiner": replace(
        UNETS["sdxl-refiner"], **XL, cross_attention_dim=24, projection_class_embeddings_input_dim=20 + 5 * 4
    ),
}
SMALL = {"clip-l": SMALL_CLIP, "openclip-h": SMALL_H, "openclip-bigg": SMALL_G}
CASES = [  # family and the input channels of its U-Net
    (name, channels) for name, family in FAMILIES.items() for channels in family.channels
]


def small_family(name: str) -> Family:
    """A family of FAMILIES with narrow networks; only the configurations of its parts are others."""
    family = FAMILIES[name]
    configs: dict[str, Any] = {"unet": SMALL_UNETS[name]}
    widths = (8, 16, 32, 32)[: len(family.parts["vae"].config.block_out_channels)]
    configs["vae"] = replace(family.parts["vae"].config, block_out_channels=widths, norm_num_groups=4)
    for part in family.parts.keys() - configs.keys():
        (preset,) = [key for key, config in TEXT_ENCODERS.items() if config == family.parts[part].config]
        configs[part] = SMALL[preset]
    return replace(family, parts={key: part._replace(config=configs[key]) for key, part in family.parts.items()})


def narrow_families(patch: pytest.MonkeyPatch) -> None:
    """Narrow networks in place of the published ones."""
    for name in list(FAMILIES):
        patch.setitem(FAMILIES, name, small_family(name))


class Model(NamedTuple):
    """The other libraries' networks of a model, by the names of Components."""

    family: Family
    networks: dict[str, nn.Module]

    @property
    def state(self) -> dict[str, dict[str, Tensor]]:
        """The keys and tensors of every network, in the form with `text_model.`"""
        states = {name: dict(network.state_dict()) for name, network in self.networks.items()}
        for name, state in states.items():
            if name.startswith("text") and not any(key.startswith("text_model.") for key in state):
                states[name] = {f"text_model.{key}": value for key, value in state.items()}
        return states


def theirs(config: Any) -> nn.Module:
    """The other library's network, from the config.json we would write for it."""
    d = config.to_dict()
    if "_class_name" in d:
        return getattr(diffusers, d["_class_name"]).from_config(d).eval()
    return getattr(transformers, d["architectures"][0])(transformers.CLIPTextConfig(**d)).eval()


MADE: dict[str, Callable[[], dict[str, nn.Module]]] = {}


def model_of(family: Family, in_channels: int, device: str = "cpu") -> Model:
    """Random networks, no norm or bias left at its neutral value; on "meta" without numbers. Made once, and copied."""
    configs = {name: part.config for name, part in family.parts.items()}
    configs["unet"] = replace(configs["unet"], in_channels=in_channels)
    if (key := repr((device, configs))) not in MADE:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            MADE[key] = copier(_made(configs, device))
    return Model(family, MADE[key]())


def _made(configs: Mapping[str, Any], device: str) -> dict[str, nn.Module]:
    with torch.device(device):
        networks = {name: theirs(config) for name, config in configs.items()}
        for network in networks.values() if device == "cpu" else ():
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return networks


def single_state(name: str, model: Model) -> dict[str, Tensor]:
    """The tensors of a single file: those of `model` under the names and in the shapes of real files, and the tensors
    that real files have besides.
    """
    return dict(_upscaler(model) if name == "x4-upscaler" else _listed(LISTS[name], model))


def _listed(lists: Mapping[str, Any], model: Model) -> Iterator[tuple[str, Tensor]]:
    states = model.state

    def find(key: str) -> Tensor:
        prefix = next(prefix for prefix in PREFIXES if key.startswith(prefix))
        return states[PREFIXES[prefix]][key.removeprefix(prefix)]

    for theirs, ours in lists["keymap"].items():
        value = find(ours)
        yield theirs, value[..., None, None] if theirs in lists["convolutions"] else value
    for theirs, parts in lists["fused"].items():
        yield theirs, torch.cat([find(part) for part in parts])
    second = states.get("text_encoder_2", {})
    where = "conditioner.embedders.1.model." if "text_encoder" in states else "conditioner.embedders.0.model."
    if second:
        yield where + "text_projection", second["text_projection.weight"].T
    width = states["text_encoder" if "text_encoder" in states else "text_encoder_2"]["text_model.final_layer_norm.bias"]
    for theirs, shape in lists["unmatched"].items():
        if theirs != where + "text_projection":
            sides = [side * len(width) // 1024 if side in (1024, 3072, 4096) else side for side in shape]
            yield theirs, torch.zeros(sides, dtype=torch.float32, device=width.device)


def _upscaler(model: Model) -> Iterator[tuple[str, Tensor]]:
    """The x4-upscaler has no list: blocks are numbered as its published configuration says (channel_mult 1 2 2 4,
    attention at 2 4 8), with what blocks of Stable Diffusion 2 hold; diffusers' converter says what they are to it.
    """
    real = LISTS["sd2"]
    text = {key: value for key, value in real.items() if key != "unmatched"} | {"unmatched": {}}
    for part in ("keymap", "fused"):
        text[part] = {key: value for key, value in real[part].items() if key.startswith("cond_stage_model.")}
    yield from _listed(text, model)
    unet = "model.diffusion_model."

    def leaves(block: str, but: str = "-") -> list[str]:
        start = f"{unet}{block}."
        return [key.removeprefix(start) for key in real["keymap"] if key.startswith(start) and but not in key]

    shortcut, plain = leaves("input_blocks.4.0"), leaves("input_blocks.4.0", "skip")
    attention, ends = leaves("input_blocks.4.1"), ("weight", "bias")
    names = [f"time_embed.{i}.{end}" for i in (0, 2) for end in ends] + ["label_emb.weight"]
    names += [f"{place}.{end}" for place in ("input_blocks.0.0", "out.0", "out.2") for end in ends]
    for place in ("middle_block.0", "middle_block.2"):
        names += [f"{place}.{leaf}" for leaf in plain]
    names += [f"middle_block.1.{leaf}" for leaf in attention]
    for level in range(4):
        for j in range(2):
            block = f"input_blocks.{3 * level + j + 1}"
            names += [f"{block}.0.{leaf}" for leaf in (shortcut if level in (1, 3) and j == 0 else plain)]
            names += [f"{block}.1.{leaf}" for leaf in (attention if level else [])]
        names += [f"input_blocks.{3 * level + 3}.0.op.{end}" for end in ends if level < 3]
        for j in range(3):
            block = f"output_blocks.{3 * level + j}"
            names += [f"{block}.0.{leaf}" for leaf in shortcut]
            names += [f"{block}.1.{leaf}" for leaf in (attention if level < 3 else [])]
        names += [f"output_blocks.{3 * level + 2}.2.conv.{end}" for end in ends if level < 3]
    gone = ("encoder.down.3.", "encoder.down.2.downsample.", "decoder.up.3.")  # a level less
    inside = [key.removeprefix("first_stage_model.") for key in real["keymap"] if key.startswith("first_stage_model.")]
    inside = [key for key in inside if not key.startswith(gone)]
    for part, prefix, keys, convert in (
        ("unet", unet, names, convert_ldm_unet_checkpoint),
        ("vae", "first_stage_model.", inside, convert_ldm_vae_checkpoint),
    ):
        numbered = {prefix + key: torch.tensor(i) for i, key in enumerate(keys)}
        converted = convert(numbered, model.networks[part].config)
        state = model.state[part]
        assert converted.keys() == state.keys() and len(converted) == len(keys)
        for ours, i in converted.items():
            value = state[ours]
            attends = part == "vae" and ".attentions." in ours and value.ndim == 2
            yield prefix + keys[int(i)], value[..., None, None] if attends else value


def write(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file, by the library itself."""
    save_file({name: value.contiguous().clone() for name, value in state.items()}, path, dict(metadata or {}))
    return path


def write_hollow(path: Path, state: Mapping[str, Tensor], dtype: str = "F16") -> Path:
    """A file of the shapes of meta tensors whose numbers are a hole on the disk: zeros that take no room."""
    header, end = {}, 0
    for name, value in state.items():
        start, end = end, end + 2 * value.numel()
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
    return path
