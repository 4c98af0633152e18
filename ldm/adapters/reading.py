"""Adapters from files and folders of every dialect. Nothing in them is executed or trusted: headers are validated
before any number is read, every number is looked at, and what is not understood is named, never dropped.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.adapters import kinds
from ldm.adapters.adapter import Adapter, Layer
from ldm.adapters.names import DIALECTS, PEFT_OWN, TEXT, TEXT_2, UNET, Book, dialect_of, split
from ldm.adapters.writing import ALPHAS, CONFIGURED, alpha_types
from ldm.checkpoints.families import recognise
from ldm.checkpoints.load import finite
from ldm.checkpoints.pickles import readable
from ldm.checkpoints.safe import Header, read_header, read_json
from ldm.errors import ModelError

Json = Mapping[str, Any]
CONFIG, SAVED = "adapter_config.json", ("adapter_model", "pytorch_lora_weights")
ENDINGS = (".safetensors", ".bin")
PEFT_TYPES = ("LORA", "LOHA", "LOKR", "IA3")
PEFT_STARTS = ("gaussian", "eva", "orthogonal")  # of init_lora_weights: those that leave the base weights as they are
PEFT_OTHER = ("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "use_bdlora", "use_qalora")
PATTERN = re.compile(r"\^?(?:[\w-]|\.\*|\\?\.)*\$?")  # expressions of a configuration that are understood
MOST_PATTERNS = 16  # how many such
NO_MODULE, BESIDE = "no such module in this model", "beside tensors of an unknown type"
SINGLE, FLAGS = ("alpha", "scalar", "on_input", "on_bias"), ("alpha", "on_input", "on_bias")


class Name(NamedTuple):
    """A module as a file names it. network: of Components, where the place of the file tells it, else ""."""

    network: str
    module: str


@dataclass(frozen=True, eq=False)
class Loose:
    """An adapter as its file spells it, not yet brought to a model.

    tensors: of each module, their names in the file, in a folder of a network's name behind that name and /. alphas:
    the types in which it stores them, None where it does not. strays: tensors of no layer -> why.
    """

    layers: Mapping[Name, Layer]
    tensors: Mapping[Name, tuple[str, ...]]
    alphas: Mapping[Name, torch.dtype | None]
    strays: Mapping[str, str]
    metadata: Mapping[str, str] = field(default_factory=dict)
    name: str = "unnamed"
    sha256: str = ""


@dataclass(frozen=True, eq=False)
class Read:
    """An adapter with the addresses of a model's modules. unmatched: tensors of the file that are not in it -> why."""

    adapter: Adapter
    unmatched: Mapping[str, str]
    loose: Loose


def read_adapter(path: str | Path, modules: Book, *, allow_pickle: bool = False) -> Read:
    """An adapter for a model, from a file or folder of any dialect: `matched` of `open_adapter`."""
    return matched(open_adapter(path, allow_pickle=allow_pickle), modules)


def matched(loose: Loose, modules: Book) -> Read:
    """The layers by the addresses of a model's modules. ModelError: two of them are for one module."""
    names: dict[str, Name] = {}
    unmatched = dict(loose.strays)
    for name in loose.layers:
        address = modules.address(name.module, name.network)
        if address is None:
            unmatched |= dict.fromkeys(loose.tensors[name], NO_MODULE)
        elif address in names:
            both = f"{names[address].module} and as {name.module}"
            raise ModelError(f"{loose.name} has {address} twice, as {both}; keep one of them")
        else:
            names[address] = name
    metadata = dict(loose.metadata)
    stored = {address: loose.alphas[name] for address, name in names.items()}
    if any(stored.values()):  # with it, what is written for kohya again is the same file
        metadata[ALPHAS] = alpha_types(stored)
    layers = {address: loose.layers[name] for address, name in names.items()}
    dialect = dialect_of(((name.module, address) for address, name in names.items()), modules)
    return Read(Adapter(layers, metadata, dialect, loose.name, loose.sha256), unmatched, loose)


def open_adapter(path: str | Path, *, allow_pickle: bool = False) -> Loose:
    """An adapter as it stands in a safetensors file, a pickle (where allow_pickle says so), PEFT's folder, a folder
    with such folders of its networks in it, or one with a pytorch_lora_weights.safetensors.

    ModelError: it is damaged, no adapter or of an unknown type; a number is not finite; a module's tensors disagree.
    """
    path = Path(path)
    layers: dict[Name, Layer] = {}
    tensors: dict[Name, tuple[str, ...]] = {}
    alphas: dict[Name, torch.dtype | None] = {}
    strays: dict[str, str] = {}
    metadata: dict[str, str] = {}
    hashes = []
    for file, network, config in _files(path):
        with readable(file, allow_pickle) as source:
            header = read_header(source)
            groups, left = _grouped(header, network, file)
            numbers, digest = _numbers(source, header)
        configs = _stated(header, file) if config is None else dict.fromkeys(("", network), _peft(config, file))
        begin = f"{network}/" if network else ""
        for name, group in groups.items():
            own = {ours: numbers[theirs] for ours, theirs in group.items()}
            layers[name] = _layer(name, own, configs, file)
            tensors[name] = tuple(begin + theirs for theirs in group.values())
            alphas[name] = own["alpha"].dtype if "alpha" in own else None
        strays |= {begin + theirs: why for theirs, why in left.items()}
        metadata |= header.metadata
        hashes.append(digest)
    sha256 = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    return Loose(layers, tensors, alphas, strays, metadata, _called(path), sha256)


def _called(path: Path) -> str:
    """What to call an adapter: files and folders that tools always call the same have the name of their folder."""
    path = path.resolve()
    while path.stem in (*SAVED, UNET, TEXT, TEXT_2):
        path = path.parent
    return path.name if path.is_dir() else path.stem


def _files(path: Path) -> list[tuple[Path, str, Json | None]]:
    """The files of an adapter: each with the network it is for ("" where its names tell) and PEFT's configuration."""
    if not path.is_dir():
        of_peft = path.stem == SAVED[0] and (config := path.with_name(CONFIG)).is_file()
        return [(path, _network(path.parent), read_json(config)) if of_peft else (path, "", None)]
    folders = [path, *(path / name for name in (UNET, TEXT, TEXT_2))]
    if found := [(f, file) for f in folders if (f / CONFIG).is_file() and (file := _saved(f, SAVED[0]))]:
        return [(file, _network(folder), read_json(folder / CONFIG)) for folder, file in found]
    if file := _saved(path, SAVED[1]):
        return [(file, "", None)]
    raise ModelError(
        f"{path} is no folder of an adapter; it holds neither {CONFIG} with {SAVED[0]}.safetensors, itself or in "
        f"{UNET}, {TEXT} and {TEXT_2}, nor {SAVED[1]}.safetensors; name a file"
    )


def _saved(folder: Path, stem: str) -> Path | None:
    return next((file for ending in ENDINGS if (file := folder / (stem + ending)).is_file()), None)


def _network(folder: Path) -> str:
    name = folder.resolve().name
    return name if name in (UNET, TEXT, TEXT_2) else ""


def _grouped(header: Header, network: str, file: Path) -> tuple[dict[Name, dict[str, str]], dict[str, str]]:
    """The tensors by module: ours -> its name in the file; and those of no layer, with the reason."""
    groups: dict[Name, dict[str, str]] = {}
    strays: dict[str, str] = {}
    for theirs in header.tensors:
        if (parts := split(theirs)) is None:
            strays[theirs] = f"of the unknown type {_type(theirs)}"
            continue
        module, ours = parts
        group = groups.setdefault(Name(network, module), {})
        if ours in group:
            raise ModelError(f"{file} has {theirs} and {group[ours]}, which are the same tensor; keep one of them")
        group[ours] = theirs
    odd = {
        name: f"of the unknown type {_type(next(iter(group.values())))}"
        for name, group in groups.items()
        if kinds.kind_of({PEFT_OWN.get(ours, ours) for ours in group}) is None
    }
    # a module of which the file has more than is known here is left out as a whole
    beside = {name.rpartition(".")[0] for name in (*strays, *(name.module for name in odd))}
    beside |= {module.rpartition(".")[0] for module in beside}
    odd |= {name: BESIDE for name in groups if name.module in beside and name not in odd}
    for name, reason in odd.items():
        strays |= dict.fromkeys(groups.pop(name).values(), reason)
    if not groups:
        raise _no_adapter(header, strays, file)
    return groups, strays


def _type(name: str) -> str:
    """The word of a tensor's name that says of what type its adapter is: "lora_xyz" of "a.b.lora_xyz.weight"."""
    return name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2][:80]


def _no_adapter(header: Header, strays: Mapping[str, str], file: Path) -> ModelError:
    facts = recognise(header)
    if "LoRA" not in facts.what:
        return ModelError(f"{file} holds no adapter, it is {facts.what}; take a LoRA file, or another one of LyCORIS")
    types = ", ".join(list(dict.fromkeys(map(_type, strays)))[:5])
    return ModelError(f"{file} is an adapter of an unknown type ({types}); known are {', '.join(kinds.KINDS)}")


def _numbers(path: Path, header: Header) -> tuple[dict[str, Tensor], str]:
    """All tensors of a file, in one piece of memory, and its sha256. ModelError names one that is not finite."""
    try:
        memory = torch.empty(path.stat().st_size, dtype=torch.uint8)
        with path.open("rb") as file:
            count = file.readinto(memory.numpy().data)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    begin = 8 + int.from_bytes(bytes(memory[:8].tolist()), "little")
    if count != len(memory) or begin + max(entry.end for entry in header.tensors.values()) != count:
        raise ModelError(f"{path} changed while it was read; read it again")
    found = {}
    with ThreadPoolExecutor(1) as beside:  # the hash takes longer than all the rest
        hashed = beside.submit(hashlib.sha256, memory.numpy().data)
        for name, entry in header.tensors.items():
            raw = memory[begin + entry.start : begin + entry.end]
            aligned = raw if (begin + entry.start) % entry.dtype.itemsize == 0 else raw.clone()
            found[name] = value = aligned.view(entry.dtype).reshape(entry.shape)
            if not finite(value):
                raise ModelError(f"{path} holds a NaN or infinity in {name}; train or fetch it again")
    return found, hashed.result().hexdigest()


# -- one layer --------------------------------------------------------------------------------------------------------


def _layer(name: Name, tensors: Mapping[str, Tensor], configs: Mapping[str, "Peft"], file: Path) -> Layer:
    """A layer of a module's tensors. configs: PEFT's, by network. ModelError: the tensors do not fit each other."""
    where = f"{file}: {name.module}"
    path, network = name.module.removeprefix(DIALECTS["peft"].heads[UNET]), name.network
    if not network and path.partition(".")[0] in (UNET, TEXT, TEXT_2):
        network, _, path = path.partition(".")
    config = configs.get(network)
    for key, value in tensors.items():
        if key in SINGLE and value.numel() != 1:
            raise ModelError(f"{where} has {key} of shape {tuple(value.shape)}; it is one number; fetch the file again")
        if not value.dtype.is_floating_point and key not in FLAGS:
            raise ModelError(f"{where} holds whole numbers in {key}; take the file in float16, bfloat16 or float32")
    alpha = float(tensors["alpha"]) if "alpha" in tensors else None
    ours = _from_peft({key: value for key, value in tensors.items() if key != "alpha"}, config, path, where)
    kind = kinds.kind_of(ours)
    assert kind, name  # _grouped has looked
    layer = Layer(kind, ours, alpha)
    if fault := kinds.check(layer):
        raise ModelError(f"{where}: {fault}; the file is damaged, fetch it again")
    return layer if alpha is not None or config is None else _scaled(layer, config, path)


def _from_peft(tensors: dict[str, Tensor], config: "Peft | None", path: str, where: str) -> dict[str, Tensor]:
    """Ours for what PEFT stores in other numbers: embeddings' factors are transposed and their roles the other way
    round, IA3 stores the gain itself, DoRA the magnitude as a row.
    """
    ours = {name: value for name, value in tensors.items() if name not in PEFT_OWN}
    if (first := tensors.get("lora_embedding_A")) is not None:
        ours["lora_up.weight"] = first.mT
    if (second := tensors.get("lora_embedding_B")) is not None:
        ours["lora_down.weight"] = second.mT
    if (magnitude := tensors.get("lora_magnitude_vector")) is not None:
        axes = ours["lora_down.weight"].ndim if "lora_down.weight" in ours else 2
        ours["dora_scale"] = magnitude.reshape(-1, *[1] * (axes - 1))
    if (gain := tensors.get("ia3_l")) is not None:
        feeds = gain.ndim == 2 and gain.shape[0] == 1
        if gain.ndim > 2:  # of a convolution: the shape does not tell
            if config is None:
                raise ModelError(f"{where} is IA3 of a convolution without {CONFIG} beside it; open PEFT's folder")
            feeds = bool(config.feeds.at(path))
        ours["weight"], ours["on_input"] = gain.float().flatten() - 1, torch.tensor(feeds)
        ours["on_bias"] = torch.tensor(not feeds)
    return ours


def _scaled(layer: Layer, config: "Peft", path: str) -> Layer:
    """The layer with the alpha that PEFT's configuration gives its module, such that alpha / rank is PEFT's factor."""
    stated = config.alphas.at(path)
    alpha = config.alpha if stated is None else stated
    if alpha is None or layer.kind not in ("lora", "loha", "lokr"):
        return layer
    if rank := kinds.rank(layer):
        return Layer(layer.kind, layer.tensors, alpha * math.sqrt(rank) if config.rslora else alpha)
    stated = config.ranks.at(path)  # LoKr of two full factors, which for PEFT have a rank all the same
    factor = alpha / (stated or config.rank or alpha)
    return Layer(layer.kind, {**layer.tensors, "lokr_w1": layer.tensors["lokr_w1"].float() * factor})


# -- PEFT's configuration ---------------------------------------------------------------------------------------------


class Patterns(NamedTuple):
    """PEFT's table of a number by module: the first pattern counts that is the module's path, the end of it, or an
    expression for one of these (peft.utils.other.get_pattern_key).

    names: pattern -> its place in the table and the number. expressions: those of the patterns that are no plain names,
    cut where they leave anything open.
    """

    names: Mapping[str, tuple[int, float]]
    expressions: Mapping[str, list[str]]

    def at(self, path: str) -> float | None:
        """What the table says of a module; None: nothing."""
        ends = [path, *(path[dot.end() :] for dot in re.finditer(r"\.", path))]
        hits = [self.names[end] for end in ends if end in self.names]
        for key, parts in self.expressions.items():
            begins = ends[:1] if key[:1] == "^" else ends
            if any(end.startswith(parts[0]) and _goes_on(parts[1:], end[len(parts[0]) :]) for end in begins):
                hits.append(self.names[key])
        return min(hits)[1] if hits else None


def _goes_on(parts: list[str], rest: str) -> bool:
    """Whether a text is these parts with anything before each, in linear time, as no file's `re` would promise."""
    for part in parts[:-1]:
        _, found, rest = rest.partition(part) if part else ("", "-", rest)
        if not found:
            return False
    return rest.endswith(parts[-1]) if parts else not rest


@dataclass(frozen=True)
class Peft:
    """What a configuration of PEFT says of the numbers. feeds: 1 for modules whose inputs IA3 scales."""

    alpha: float | None
    rank: float | None
    rslora: bool
    alphas: Patterns
    ranks: Patterns
    feeds: Patterns


def _peft(config: Json, file: Path) -> Peft:
    """PEFT's configuration. ModelError: it asks for what is not computed here, or is none."""
    fault = ""
    if (kind := str(config.get("peft_type") or "LORA").upper()) not in PEFT_TYPES:
        fault = f"of PEFT's type {kind!a:.40}; known are {', '.join(PEFT_TYPES)}"
    elif isinstance(start := config.get("init_lora_weights"), str) and start.lower() not in PEFT_STARTS:
        advice = "save it with path_initial_model_for_weight_conversion"
        fault = f"for base weights that init_lora_weights = {start!a:.40} changed; {advice}"
    elif other := next((name for name in PEFT_OTHER if config.get(name)), ""):
        fault = f"of PEFT's form {other}, which is not known here; take another file"
    if fault:
        raise ModelError(f"{file} is an adapter {fault}")
    feeds = config.get("feedforward_modules") or []
    feeds = feeds if isinstance(feeds, list) else [feeds]
    return Peft(
        _number(config.get("lora_alpha", config.get("alpha")), "alpha", file),
        _number(config.get("r"), "r", file),
        bool(config.get("use_rslora")),
        _patterns(config.get("alpha_pattern"), file),
        _patterns(config.get("rank_pattern"), file),
        _patterns(dict.fromkeys(map(str, feeds), 1), file),
    )


def _number(value: object, what: str, file: Path) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise ModelError(f"{file}: its configuration has {what} = {value!a:.40}; it is a number above 0; correct it")
    return float(value)


def _patterns(table: object, file: Path) -> Patterns:
    """ModelError: no table of numbers, or an expression in it could take long."""
    if not isinstance(table, dict | None):
        raise ModelError(f"{file}: its configuration has a {type(table).__name__} in place of a table; correct it")
    rows = {key: (place, _number(value, key, file) or 0.0) for place, (key, value) in enumerate((table or {}).items())}
    odd = [key for key in rows if not re.fullmatch(r"[\w.]*", key)]
    for key in odd:
        if not PATTERN.fullmatch(key) or len(odd) > MOST_PATTERNS:
            raise ModelError(f"{file}: its configuration has the pattern {key!a:.60}; write out the modules' names")
    return Patterns(rows, {key: key.strip("^$").replace("\\.", ".").split(".*") for key in odd})


def _stated(header: Header, file: Path) -> dict[str, Peft]:
    """PEFT's configurations in diffusers' metadata: network ("" for names without one) -> configuration."""
    text = header.metadata.get(CONFIGURED)
    try:
        said = json.loads(text) if text else {}
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: its {CONFIGURED} is no JSON ({error!s:.80}); fetch it again") from error
    if not isinstance(said, dict):
        raise ModelError(f"{file}: its {CONFIGURED} is a {type(said).__name__}, not a table; fetch it again")
    found: dict[str, dict[str, Any]] = {}
    for key, value in said.items():
        network, _, name = key.rpartition(".")
        found.setdefault(network, {})[name] = value
    return {network: _peft(config, file) for network, config in found.items()}
