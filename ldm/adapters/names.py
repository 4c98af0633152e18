"""How every tool spells the modules and the tensors of an adapter.

A tensor's name in a file is that of a module and then a suffix. The module's is a head, which says of what network it
is, and its path in that network: in diffusers' and transformers' names, as ours, or in those of the code the model was
published with. Some tools write dots as underscores; here, all are read so.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import NamedTuple

from torch import nn

from ldm.checkpoints.families import FAMILIES
from ldm.checkpoints.load import Bare
from ldm.checkpoints.spelling import Spelling, openclip_rules, unet_rules
from ldm.checkpoints.spelling import spelled as spelled_keys
from ldm.models.clip import CLIPTextConfig, CLIPTextModel
from ldm.models.unet import UNet, UNetConfig

Modules = Mapping[str, tuple[int, ...]]
"""Address -> shape of the module's weight. Addresses: see ldm.adapters.adapter.Adapter."""
UNET, TEXT, TEXT_2 = "unet", "text_encoder", "text_encoder_2"


class Dialect(NamedTuple):
    """How a tool writes a module's name.

    whose: the tool. heads: what names of a network begin with. form: of the path, one of those in Book.forms, or "ours"
    where a network has none of that name. flat: with underscores for dots.
    """

    whose: str
    heads: Mapping[str, str]
    form: str = "ours"
    flat: bool = False


def _heads(unet: str, text: str, text_2: str) -> dict[str, str]:
    return {UNET: unet, TEXT: text, TEXT_2: text_2}


_NETWORKS = _heads("unet.", "text_encoder.", "text_encoder_2.")
DIALECTS: dict[str, Dialect] = {
    "kohya": Dialect("kohya's", _heads("lora_unet_", "lora_te_", "lora_te2_"), flat=True),
    "kohya-sgm": Dialect("kohya's for SDXL", _heads("lora_unet_", "lora_te1_", "lora_te2_"), form="sgm", flat=True),
    "peft": Dialect("PEFT's, a folder a network", dict.fromkeys(_NETWORKS, "base_model.model.")),
    "diffusers": Dialect("diffusers'", _NETWORKS),
    "diffusers-old": Dialect("diffusers' of 2023", _NETWORKS, form="processor"),
    "comfy": Dialect(
        "ComfyUI's",
        _heads("diffusion_model.", "text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer."),
        form="sgm",
    ),
}
"""kohya writes "kohya" for Stable Diffusion 1 and 2, "kohya-sgm" for SDXL. A name of "peft" leaves open of what network
it is. "diffusers-old" has names for the attention layers alone.
"""
PEFT_HEAD = "base_model_model_"
_EITHER = (TEXT, TEXT_2)  # SDXL's refiner has the second alone
HEADS: dict[str, tuple[str, ...]] = {  # beginning of a module's name, flat -> its network: the first that there is
    "lora_unet_": (UNET,),
    "oft_unet_": (UNET,),  # kohya's OFT
    "lycoris_unet_": (UNET,),
    "lycoris_": (UNET,),  # LyCORIS' own wrapper, as SimpleTuner uses it
    "unet_": (UNET,),
    "diffusion_model_": (UNET,),
    "model_diffusion_model_": (UNET,),
    "lora_te_": _EITHER,
    "lora_te1_": (TEXT,),
    "lora_te2_": (TEXT_2,),
    "text_encoder_": (TEXT,),
    "text_encoder_1_": (TEXT,),
    "text_encoder_2_": (TEXT_2,),
    **{
        f"{begin}clip_{size}_{end}": (TEXT_2 if size == "g" else TEXT,)
        for size in "lhg"
        for begin in ("text_encoders_", "")
        for end in ("transformer_", "")
    },
    "cond_stage_model_transformer_": (TEXT,),
    "cond_stage_model_model_": (TEXT,),
    "conditioner_embedders_0_transformer_": (TEXT,),
    "conditioner_embedders_0_model_": _EITHER,
    "conditioner_embedders_1_model_": (TEXT_2,),
}
_BY_LENGTH = sorted(HEADS.items(), key=lambda item: -len(item[0]))
CLIP_H = 1024  # width of the text encoder that ComfyUI calls clip_h

_LORA = {
    "lora_down.weight": "lora_down lora.down lora_A lora_linear_layer.down down",
    "lora_up.weight": "lora_up lora.up lora_B lora_linear_layer.up up",
    "lora_mid.weight": "lora_mid lora.mid",
}
SUFFIXES: dict[str, str] = {f"{word}.weight": ours for ours, words in _LORA.items() for word in words.split()}
SUFFIXES |= {"lora_up.bias": "lora_up.bias", "lora_B.bias": "lora_up.bias", "lora.up.bias": "lora_up.bias"}
SUFFIXES |= dict.fromkeys(("lora_magnitude_vector", "lora_magnitude_vector.weight"), "lora_magnitude_vector")
_SAME = (
    ("alpha", "scalar", "dora_scale", "diff", "diff_b", "w_norm", "b_norm", "weight", "on_input", "on_bias"),
    ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "oft_blocks", "oft_diag", "rescale"),
    ("lora_embedding_A", "lora_embedding_B", "ia3_l"),
)
SUFFIXES |= {name: name for row in _SAME for name in row}
"""End of a tensor's name -> what ldm.adapters.adapter calls it. Those of PEFT_OWN are other numbers than ours, which
ldm.adapters.reading computes. `down.weight` alone follows a module named `..._lora`.
"""
PEFT_OWN = {
    "lora_embedding_A": "lora_up.weight",
    "lora_embedding_B": "lora_down.weight",
    "lora_magnitude_vector": "dora_scale",
    "ia3_l": "on_input",
}
"""PEFT's tensors that hold other numbers than any of ours -> what they become."""
ADAPTER_NAME = re.compile(
    r"\.(lora_(?:embedding_)?[AB]|lora_magnitude_vector|hada_[wt]\w+|lokr_[wt]\w+|ia3_l)\.(?!(?:weight|bias)$)\w+"
)
"""PEFT's own name of an adapter in the name of a tensor, such as `default`."""


def split(name: str) -> tuple[str, str] | None:
    """A tensor's name as that of the module and what we call the tensor; None where its end is not in SUFFIXES."""
    words = ADAPTER_NAME.sub(r".\1", name).split(".")
    for count in (3, 2, 1):
        suffix = ".".join(words[-count:])
        if suffix in SUFFIXES and len(words) > count:
            return ".".join(words[:-count]), SUFFIXES[suffix]
    return None


PROCESSORS = (  # of our attention's layers, in diffusers' files of 2023
    (re.compile(r"(attn[12])\.(to_[qkv])"), r"\1.processor.\2_lora"),
    (re.compile(r"(attn[12])\.to_out\.0"), r"\1.processor.to_out_lora"),
    (re.compile(r"(self_attn)\.([qkv])_proj"), r"\1.to_\2_lora"),
    (re.compile(r"(self_attn)\.out_proj"), r"\1.to_out_lora"),
)


def _processors(paths: list[str]) -> dict[str, str]:
    found = {}
    for path in paths:
        for pattern, theirs in PROCESSORS:
            if pattern.search(path):
                found[path] = pattern.sub(theirs, path)
    return found


def _openclip(paths: list[str], config: CLIPTextConfig) -> dict[str, str]:
    """open_clip's names of what is one module there, too: its queries, keys and values are not."""
    known = {rule.ours: rule.theirs for rule in openclip_rules(config) if rule.third is None}
    return {path: known[path] for path in paths if path in known}


def _forms(network: str, paths: list[str], config: object) -> Iterator[tuple[str, dict[str, str]]]:
    """The forms that paths of a network have: name of the form -> our path -> theirs."""
    yield "ours", {path: path for path in paths}
    if network not in (UNET, TEXT, TEXT_2):
        return
    yield "processor", _processors(paths)
    if isinstance(config, UNetConfig):
        rules = spelled_keys(paths, Spelling("", unet_rules), config)
        yield "sgm", {path: rule.theirs for path, rule in rules.items()}
    if isinstance(config, CLIPTextConfig):
        yield "flat", {path: path.removeprefix("text_model.") for path in paths}
        yield "openclip", _openclip(paths, config)


class Book:
    """All spellings of a model's modules, both ways."""

    def __init__(self, modules: Modules, configs: Mapping[str, object]) -> None:
        """configs: of the networks, by the names of Components; UNetConfig and CLIPTextConfig have spellings of their
        own, others are known by their own paths alone.
        """
        self.modules = modules
        paths: dict[str, list[str]] = {}
        for address in modules:
            network, _, path = address.partition(".")
            paths.setdefault(network, []).append(path)
        self.forms = {name: dict(_forms(name, found, configs.get(name))) for name, found in paths.items()}
        self._tables = {  # network -> path in any form, flat -> address
            name: {flat(theirs): f"{name}.{ours}" for form in forms.values() for ours, theirs in form.items()}
            for name, forms in self.forms.items()
        }
        words = modules.get(f"{TEXT}.text_model.embeddings.token_embedding", ())
        self._clip = "clip_h" if words[1:] == (CLIP_H,) else "clip_l"

    @property
    def kohya(self) -> str:
        """The dialect in which kohya writes adapters of this model."""
        return "kohya-sgm" if TEXT_2 in self.forms else "kohya"

    def address(self, module: str, network: str = "") -> str | None:
        """The module that a tool means by this name, in whatever dialect; None: no module of this model.

        network: of what network a name without a head is, where the place of the file tells; else the only one that
        has such a path.
        """
        name = flat(module).removeprefix(PEFT_HEAD)
        for head, owners in _BY_LENGTH:
            if name.startswith(head):
                owner = next((owner for owner in owners if owner in self._tables), "")
                return self._tables.get(owner, {}).get(name[len(head) :])
        tables = [self._tables.get(network, {})] if network else self._tables.values()
        found = [table[name] for table in tables if name in table]
        return found[0] if len(found) == 1 else None

    def spelled(self, address: str, dialect: str) -> str:
        """The name of a module in a dialect of DIALECTS. KeyError: the dialect has none for it."""
        row = DIALECTS[dialect]
        network, _, path = address.partition(".")
        forms = self.forms[network]
        name = row.heads[network].replace("clip_l", self._clip) + forms.get(row.form, forms["ours"])[path]
        return flat(name) if row.flat else name


def flat(name: str) -> str:
    """Underscores for dots."""
    return name.replace(".", "_")


def modules_of(networks: Mapping[str, nn.Module]) -> Modules:
    """Everything in these networks that has a weight, norms and embeddings too. networks: as in Components."""
    return {
        f"{name}.{path}": tuple(module.weight.shape)
        for name, network in networks.items()
        for path, module in network.named_modules()
        if isinstance(module._parameters.get("weight"), nn.Parameter)
    }


def book_of(networks: Mapping[str, nn.Module]) -> Book:
    """The spellings of the modules of these networks."""
    return Book(modules_of(networks), {name: getattr(network, "config", None) for name, network in networks.items()})


@cache
def book_of_family(family: str) -> Book:
    """The spellings of the U-Net and the text encoders of a family of FAMILIES, of which no weights are needed."""
    configs = {name: part.config for name, part in FAMILIES[family].parts.items() if name in (UNET, TEXT, TEXT_2)}
    with Bare():
        return book_of({name: (UNet if name == UNET else CLIPTextModel)(config) for name, config in configs.items()})


def modules_of_family(family: str) -> Modules:
    """`modules_of` the U-Net and the text encoders of a family of FAMILIES."""
    return book_of_family(family).modules


def dialect_of(names: Iterable[tuple[str, str]], book: Book) -> str:
    """The dialect that these names fit best; "" for none. names: of modules, in a file and our address."""
    counts = dict.fromkeys(DIALECTS, 0)
    for name, address in names:
        network, _, path = address.partition(".")
        for key, row in DIALECTS.items():
            forms = book.forms[network]
            theirs = forms.get(row.form, forms["ours"]).get(path)
            counts[key] += network in row.heads and name.startswith(row.heads[network])
            counts[key] += theirs is not None and name.endswith(flat(theirs) if row.flat else theirs)
    best = max(counts, key=lambda key: counts[key])
    return best if counts[best] else ""
