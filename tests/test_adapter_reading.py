"""Adapters from files and folders of every dialect, beside the tools that write them; what fits which model."""

import copy
import gzip
import json
import math
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm.adapters import kinds
from ldm.adapters.matching import family_of, fit, report
from ldm.adapters.names import TEXT, TEXT_2, UNET, Book, book_of, book_of_family
from ldm.adapters.reading import Read, _patterns, open_adapter, read_adapter
from ldm.checkpoints.families import FAMILIES
from ldm.checkpoints.safe import atomic_save_safetensors
from ldm.errors import ModelError
from ldm.models.clip import CLIPTextConfig, CLIPTextModel
from ldm.models.unet import CROSS, PLAIN, UNet, UNetConfig

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the other libraries' own deprecations while they import
    import peft
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.loaders import StableDiffusionLoraLoaderMixin
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
    from peft.utils.other import get_pattern_key

pytestmark = pytest.mark.usefixtures("one_thread")
HEADERS: dict[str, Any] = json.loads(
    gzip.decompress((Path(__file__).parent / "data" / "lora_headers.json.gz").read_bytes())
)["files"]
UNET_CONFIG = UNetConfig(
    sample_size=8, block_out_channels=(16, 32), down_block_types=(PLAIN, CROSS), layers_per_block=1, num_heads=(2, 2),
    transformer_layers_per_block=(1, 1), cross_attention_dim=32, norm_num_groups=8,
)  # fmt: skip
TEXT_CONFIG = CLIPTextConfig(
    vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, eos_token_id=2
)
Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
K = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
KOHYA_Q = f"lora_unet_{Q.replace('.', '_')}"
FC1 = "text_model.encoder.layers.0.mlp.fc1"


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {UNET: UNet(UNET_CONFIG), TEXT: CLIPTextModel(TEXT_CONFIG)}


@pytest.fixture(scope="module")
def book(networks) -> Book:
    return book_of(networks)


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    atomic_save_safetensors(tensors, path, metadata)
    return path


def layout(name: str, path: Path) -> dict[str, Tensor]:
    """A file of random numbers in a published layout, its alphas from 1 to 5; returns what is in it."""
    pool, tensors = torch.rand(2**18).half(), {}
    for n, (key, (shape, dtype)) in enumerate(HEADERS[name]["keys"].items()):
        if shape:
            tensors[key] = pool[n : n + math.prod(shape)].reshape(shape)
        else:
            tensors[key] = torch.tensor(n % 5 + 1, dtype=getattr(torch, dtype))
    save(path, tensors)
    return tensors


def pair(module: str, out: int, inner: int, rank: int = 2, names: str = "lora_down lora_up") -> dict[str, Tensor]:
    down, up = names.split()
    return {
        f"{module}.{down}.weight": torch.randn(rank, inner),
        f"{module}.{up}.weight": torch.randn(out, rank),
    }


def equal(read: Read, tensors: dict[str, Tensor]) -> None:
    """An adapter holds these tensors, of plain LoRA by ours: address and name."""
    found = {f"{address} {name}": value for address, layer in read.adapter.layers.items()
             for name, value in layer.tensors.items()}  # fmt: skip
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


# -- published layouts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADERS)
def test_every_published_layout_matches_whole(name, tmp_path):
    family = "sdxl" if "sdxl" in name else "sd1"
    tensors, book = layout(name, tmp_path / "a.safetensors"), book_of_family(family)
    read = read_adapter(tmp_path / "a.safetensors", book)
    assert read.unmatched == {}
    assert read.adapter.dialect == book.kohya
    applied = fit(read, book.modules, "the model")
    assert applied.left == {}
    modules = {key.partition(".")[0] for key in tensors}
    assert len(applied.adapter.layers) == len(modules)
    for key, value in tensors.items():  # each number, in the module that is called so in kohya's files
        module, _, tensor = key.partition(".")
        address = book.address(module)
        assert address and book.spelled(address, book.kohya) == module
        layer = applied.adapter.layers[address]
        assert layer.alpha == float(value) if tensor == "alpha" else torch.equal(layer.tensors[tensor], value)
    types = {HEADERS[name]["keys"][key][1] for key in tensors if key.endswith("alpha")}
    stated = json.loads(read.adapter.metadata["ldm.alphas"])  # for who writes the file again
    assert {{"I64": "int64", "F32": "float32"}[code] for code in stated} == types
    assert {layer.kind for layer in applied.adapter.layers.values()} == {
        next((kind for kind in ("loha", "lokr") if kind in name), "lora")
    }
    assert family_of(read.loose) == FAMILIES[family].title
    assert sum(len(layer.tensors) + 1 for layer in applied.adapter.layers.values()) == len(tensors)


def test_sha256_and_name_and_metadata_are_those_of_the_file(tmp_path, book):
    import hashlib

    path = save(tmp_path / "ink.safetensors", pair(KOHYA_Q, 32, 32), {"ss_network_dim": "2"})
    adapter = read_adapter(path, book).adapter
    assert adapter.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (adapter.name, adapter.metadata) == ("ink", {"format": "pt", "ss_network_dim": "2"})


# -- diffusers as oracle ----------------------------------------------------------------------------------------------


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' own PEFT names -> address and our name."""
    ends = ((".lora_A.weight", " lora_down.weight"), (".lora_B.weight", " lora_up.weight"))
    ends += ((".lora_A.default.weight", ends[0][1]), (".lora_B.default.weight", ends[1][1]))
    found = {}
    for name, value in state.items():
        theirs, ours = next(row for row in ends if name.endswith(row[0]))
        found[name.removesuffix(theirs) + ours] = value
    return found


def of_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What diffusers makes of a file's tensors before it gives them to PEFT."""
    unet = {name: value for name, value in state.items() if name.startswith("unet.")}
    text = {name: value for name, value in state.items() if name.startswith("text_encoder.")}
    return renamed(convert_unet_state_dict_to_peft(unet) | (convert_state_dict_to_peft(text) if text else {}))


def test_old_processors_are_read_as_diffusers_reads_them(tmp_path, book):
    """The files of 2023: attention processors with layers of their own, made by hand in diffusers' names."""
    tensors = {}
    for address, shape in book.modules.items():
        try:
            name = book.spelled(address, "diffusers-old")
        except KeyError:
            continue
        tensors |= pair(name, shape[0], shape[1], names="down up")
    assert f"unet.{K.replace('.to_k', '.processor.to_k_lora')}.down.weight" in tensors
    assert f"unet.{K.replace('.to_k', '.processor.to_out_lora')}.up.weight" in tensors
    assert "text_encoder.text_model.encoder.layers.1.self_attn.to_out_lora.up.weight" in tensors
    path = save(tmp_path / "pytorch_lora_weights.safetensors", tensors)
    state = StableDiffusionLoraLoaderMixin.lora_state_dict(str(tmp_path))[0]
    for read in (read_adapter(path, book), read_adapter(tmp_path, book)):
        assert (read.unmatched, read.adapter.dialect, read.adapter.name) == ({}, "diffusers-old", tmp_path.name)
        equal(read, of_diffusers(state))


def test_kohyas_files_are_read_as_diffusers_reads_them(tmp_path):
    """Stable Diffusion 1 at true size, every attention and feed-forward layer, text encoder and U-Net."""
    tensors = layout("lora_kohya_sd15_dim8_alpha4", tmp_path / "a.safetensors")
    state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(str(tmp_path / "a.safetensors"))
    read = read_adapter(tmp_path / "a.safetensors", book_of_family("sd1"))
    theirs = of_diffusers(state)
    assert len(theirs) == 2 * len(tensors) / 3 and len(alphas) == len(tensors) / 3
    equal(read, theirs)


@pytest.mark.parametrize("metadata", [True, False])
def test_what_diffusers_saves_keeps_its_alphas(metadata, tmp_path, book):
    """Its writer of today, with ranks and alphas by pattern; without its metadata alpha is the rank, so None."""
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q", "to_k"],
        rank_pattern={"attn2.to_k": 2},
        alpha_pattern={"attn2.to_k": 3},
    )
    unet = UNet2DConditionModel.from_config(UNET_CONFIG.to_dict())
    unet.add_adapter(config)
    for parameter in unet.parameters():
        nn.init.normal_(parameter)
    layers = peft.get_peft_model_state_dict(unet)
    extra = _collate_lora_metadata({"unet": unet}) if metadata else {}
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, **extra)
    read = read_adapter(tmp_path, book)
    equal(read, {f"unet.{name}": value for name, value in renamed(layers).items()})
    assert (read.unmatched, read.adapter.dialect) == ({}, "diffusers")
    for address, layer in read.adapter.layers.items():
        module = unet.get_submodule(address.removeprefix("unet."))
        theirs = module.get_delta_weight("default").detach()
        scale = 1 if metadata else module.r["default"] / module.lora_alpha["default"]
        torch.testing.assert_close(kinds.delta(layer, torch.zeros_like(theirs)), theirs * scale)
    known = {layer.alpha for layer in read.adapter.layers.values()}
    assert known == ({3.0, 6.0} if metadata else {None})


# -- PEFT as oracle ---------------------------------------------------------------------------------------------------

PEFT: dict[str, Callable[[], Any]] = {
    "patterns": lambda: peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q", "to_k", "conv1"], rank_pattern={"attn2.to_k": 2},
        alpha_pattern={"attn2.to_k": 3, "^down_blocks.*to_q": 5},
    ),
    "rslora": lambda: peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules=["to_q"], rank_pattern={"attn2.to_q": 3}
    ),
    "dora": lambda: peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["to_q", "conv1"]),
    "bias": lambda: peft.LoraConfig(r=4, lora_alpha=6, lora_bias=True, target_modules=["proj_in", "to_out.0"]),
    "loha": lambda: peft.LoHaConfig(r=4, alpha=6, target_modules=["to_q", "conv1"], alpha_pattern={"conv1": 2}),
    "loha tucker": lambda: peft.LoHaConfig(r=4, alpha=6, use_effective_conv2d=True, target_modules=["conv1"]),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=6, target_modules=["to_q", "conv1"], rank_pattern={"conv1": 3}),
    "lokr full": lambda: peft.LoKrConfig(r=64, alpha=6, target_modules=["to_q", "conv1"], rank_pattern={"conv1": 96}),
    "lokr tucker": lambda: peft.LoKrConfig(
        r=2, alpha=6, use_effective_conv2d=True, decompose_both=True, target_modules=["to_q", "conv1"]
    ),
    "ia3": lambda: peft.IA3Config(
        target_modules=["to_q", "ff.net.2", "conv1", "conv2"], feedforward_modules=["ff.net.2", "conv2"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PEFT)
def test_pefts_folders_change_weights_as_peft_does(name, tmp_path, networks, book):
    base = networks[UNET]
    model = peft.get_peft_model(copy.deepcopy(base), PEFT[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter) if parameter.requires_grad else 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a bias has one axis
        model.save_pretrained(tmp_path / "ink" / "unet")
    read = read_adapter(tmp_path / "ink" / "unet", book)
    assert (read.unmatched, read.adapter.dialect, read.adapter.name) == ({}, "peft", "ink")
    merged = dict(model.merge_and_unload().named_modules())
    changed = {
        f"unet.{path}"
        for path, module in base.named_modules()
        if "weight" in module._parameters and not torch.equal(module.weight, merged[path].weight)
    }
    assert read.adapter.layers.keys() == changed and len(changed) >= 8
    for address, layer in read.adapter.layers.items():
        before, after = base.get_submodule(address[5:]), merged[address[5:]]
        assert kinds.fits(layer, before.weight.shape)
        wanted = after.weight - before.weight
        assert torch.linalg.norm(kinds.delta(layer, before.weight) - wanted) <= 1e-6 * torch.linalg.norm(wanted)
        moved = kinds.bias_delta(layer, before.bias, before.weight)
        if before.bias is not None:
            theirs = after.bias - before.bias
            torch.testing.assert_close(torch.zeros_like(theirs) if moved is None else moved, theirs)


def test_a_folder_of_pefts_folders(tmp_path, networks, pickles_here):
    """Three networks beside each other, of which two have the same names; one of them alone, its file, its pickle."""
    every = {**networks, TEXT_2: networks[TEXT]}
    book = book_of(every)
    for alpha, (name, network) in enumerate(every.items(), 3):
        config = peft.LoraConfig(
            r=2, lora_alpha=alpha, target_modules=["to_q"] if name == UNET else ["fc1"], init_lora_weights=False
        )
        peft.get_peft_model(copy.deepcopy(network), config).save_pretrained(tmp_path / name)
    whole = read_adapter(tmp_path, book)
    assert whole.unmatched == {}
    alphas = {address.partition(".")[0]: layer.alpha for address, layer in whole.adapter.layers.items()}
    assert alphas == {UNET: 3, TEXT: 4, TEXT_2: 5}
    saved = tmp_path / TEXT_2 / "adapter_model.safetensors"
    torch.save(load_file(saved), saved.with_suffix(".bin"))
    for path in (saved.parent, saved, saved.with_suffix(".bin")):
        read = read_adapter(path, book, allow_pickle=True)
        assert read.adapter.layers.keys() == {a for a in whole.adapter.layers if a.startswith(TEXT_2)}, path
        for address, layer in read.adapter.layers.items():
            assert layer.alpha == 5
            torch.testing.assert_close(dict(layer.tensors), dict(whole.adapter.layers[address].tensors))
    without = read_adapter(tmp_path, book_of(networks))
    assert len(without.unmatched) == 4 and all(name.startswith("text_encoder_2/base") for name in without.unmatched)
    assert [row.matched for row in report(without)].count(False) == 2


def test_patterns_mean_what_they_mean_to_peft():
    """Thousands of random tables and paths, of names that are parts of each other."""
    draw, hits = random.Random(0), 0
    for _ in range(5000):
        path = ".".join(draw.choices(["a", "b", "ab", "to_q"], k=draw.randint(1, 5)))
        table = {}
        for number in range(1, draw.randint(2, 4)):
            middle = "".join(draw.choices(["a", "b", "ab", r"\.", ".*", "to_q"], k=draw.randint(1, 4)))
            table[draw.choice(["^", "", ""]) + middle + draw.choice(["$", "", ""])] = number
        theirs = table.get(get_pattern_key(list(table), path))
        assert _patterns(table, Path("x")).at(path) == theirs, (table, path)
        hits += theirs is not None
    assert hits > 1000


def test_pefts_embeddings(tmp_path, networks, book):
    model = peft.get_peft_model(
        copy.deepcopy(networks[TEXT]),
        peft.LoraConfig(r=2, lora_alpha=3, target_modules=["token_embedding"], init_lora_weights=False),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it also saves the embedding itself
        model.save_pretrained(tmp_path, save_embedding_layers=False)
    [(address, layer)] = read_adapter(tmp_path, book).adapter.layers.items()
    theirs = model.base_model.model.text_model.embeddings.token_embedding.get_delta_weight("default")
    assert address == "text_encoder.text_model.embeddings.token_embedding"
    torch.testing.assert_close(kinds.delta(layer, torch.zeros(book.modules[address])), theirs.detach())


# -- refusals ---------------------------------------------------------------------------------------------------------


def bad(name: str, value: float) -> dict[str, Tensor]:
    tensors = pair(KOHYA_Q, 32, 32)
    tensors[f"{KOHYA_Q}.{name}"].view(-1)[3] = value
    return tensors


REFUSED: dict[str, tuple[Callable[[], dict[str, Tensor]], str]] = {
    "NaN": (lambda: bad("lora_up.weight", float("nan")), rf"holds a NaN or infinity in {KOHYA_Q}.lora_up.weight"),
    "infinite": (lambda: bad("lora_down.weight", float("-inf")), r"holds a NaN or infinity in .*lora_down.weight"),
    "ranks": (
        lambda: pair(KOHYA_Q, 32, 32) | {f"{KOHYA_Q}.lora_up.weight": torch.ones(32, 3)},
        rf"{KOHYA_Q}: its ranks disagree: .*2.*3",
    ),
    "half a pair": (lambda: {f"{KOHYA_Q}.lora_up.weight": torch.ones(32, 3)}, r"lora_down.weight is missing"),
    "unknown type": (
        lambda: {f"{KOHYA_Q}.lora_xyz": torch.ones(2), f"{KOHYA_Q}.lora_abc.weight": torch.ones(2)},
        r"of an unknown type \(lora_xyz, lora_abc\); known are lora, loha",
    ),
    "checkpoint": (
        lambda: {f"unet.{Q}.weight": torch.ones(2, 2), "unet.down_blocks.0.resnets.0.conv1.weight": torch.ones(2, 2)},
        r"holds no adapter, it is the U-Net of a model folder",
    ),
    "embedding": (lambda: {"emb_params": torch.ones(2, 768)}, r"holds no adapter, it is an embedding"),
    "same tensor": (
        lambda: pair(KOHYA_Q, 32, 32) | {f"{KOHYA_Q}.lora_A.weight": torch.ones(2, 32)}, r"which are the same tensor"
    ),
    "same module": (
        lambda: pair(KOHYA_Q, 32, 32) | pair(f"unet.{Q}", 32, 32), rf"has unet.{Q} twice, as .* and as .*; keep one"
    ),
    "whole numbers": (
        lambda: {name: value.to(torch.int8) for name, value in pair(KOHYA_Q, 32, 32).items()}, r"whole numbers in lora_"
    ),
    "two alphas": (
        lambda: pair(KOHYA_Q, 32, 32) | {f"{KOHYA_Q}.alpha": torch.ones(2)}, r"has alpha of shape \(2,\); it is one"
    ),
    "IA3 of a convolution alone": (
        lambda: {"base_model.model.conv_in.ia3_l": torch.ones(1, 4, 1, 1)}, r"without adapter_config.json beside it"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name, tmp_path, book):
    make, said = REFUSED[name]
    path = save(tmp_path / "a.safetensors", make())
    with pytest.raises(ModelError, match=said) as error:
        read_adapter(path, book)
    assert str(tmp_path) in str(error.value) or name == "same module"
    assert "\n" not in str(error.value)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown type": ({"peft_type": "VERA"}, "of PEFT's type 'VERA'; known are LORA"),
    "changed base": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4' changed"),
    "unknown form": ({"layer_replication": [[0, 4]]}, "of PEFT's form layer_replication"),
    "no alpha": ({"lora_alpha": "six"}, "alpha = 'six'; it is a number"),
    "no table": ({"alpha_pattern": [1]}, "has a list in place of a table"),
    "slow pattern": ({"rank_pattern": {"(a+)+b": 3}}, r"the pattern '\(a\+\)\+b'; write out the modules' names"),
    "many patterns": ({"alpha_pattern": {f"a.*{n}": 3 for n in range(17)}}, "write out the modules' names"),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("place", ["folder", "metadata"])
def test_refusals_of_configurations(name, place, tmp_path, book):
    config, said = CONFIGS[name]
    config = {"r": 2, "lora_alpha": 3} | config
    tensors = pair(f"base_model.model.{Q}" if place == "folder" else f"unet.{Q}", 32, 32, names="lora_A lora_B")
    stated = {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in config.items()})}
    save(tmp_path / "adapter_model.safetensors", tensors, None if place == "folder" else stated)
    if place == "folder":
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=said):
        read_adapter(tmp_path / "adapter_model.safetensors", book)


@pytest.mark.parametrize("text", ["[1]", "{", "[" * 100_000])
def test_metadata_that_is_no_table(text, tmp_path, book):
    path = save(tmp_path / "a.safetensors", pair(f"unet.{Q}", 32, 32), {"lora_adapter_metadata": text})
    with pytest.raises(ModelError, match=r"its lora_adapter_metadata is (no JSON|a list)"):
        read_adapter(path, book)


def test_folders_and_pickles_that_are_refused(tmp_path, book):
    with pytest.raises(ModelError, match="is no folder of an adapter; it holds neither"):
        read_adapter(tmp_path, book)
    with pytest.raises(ModelError, match="No such file"):
        read_adapter(tmp_path / "none.safetensors", book)
    torch.save(pair(KOHYA_Q, 32, 32), tmp_path / "a.pt")
    with pytest.raises(ModelError, match="--allow-pickle"):
        read_adapter(tmp_path / "a.pt", book)


def test_what_is_not_understood_is_named(tmp_path, book):
    """A module that is not there, a type that is not known, and a layer of which only a part is known."""
    tensors = pair(KOHYA_Q, 32, 32) | pair("lora_unet_elsewhere", 32, 32) | {"bundle_emb.ink.vectors": torch.ones(2)}
    half = f"lora_unet_{K.replace('.', '_')}"
    tensors |= pair(half, 32, 32) | {f"{half}.lora_E.weight": torch.ones(2)}
    read = read_adapter(save(tmp_path / "a.safetensors", tensors), book)
    assert list(read.adapter.layers) == [f"unet.{Q}"]
    assert read.unmatched.keys() == {name for name in tensors if not name.startswith(KOHYA_Q)}
    assert read.unmatched["lora_unet_elsewhere.lora_up.weight"] == "no such module in this model"
    assert read.unmatched[f"{half}.lora_E.weight"] == "of the unknown type lora_E"
    assert read.unmatched[f"{half}.lora_up.weight"] == "beside tensors of an unknown type"
    assert read.unmatched["bundle_emb.ink.vectors"] == "of the unknown type vectors"
    with pytest.raises(
        ModelError, match=r"a fits Tiny only in part, 6 of its .*lora_E.weight \(of the .* and 3 more; allow"
    ):
        fit(read, book.modules, "Tiny")
    applied = fit(read, book.modules, "Tiny", partial=True)
    assert list(applied.adapter.layers) == [f"unet.{Q}"] and applied.left == read.unmatched


# -- models -----------------------------------------------------------------------------------------------------------


def of_family(tmp_path: Path, family: str, network: str) -> Path:
    """A file in kohya's dialect with every key and query of the attention of a family's network, rank 1."""
    book, tensors = book_of_family(family), {}
    for address, shape in book.modules.items():
        if address.startswith(f"{network}.") and address.endswith(("to_q", "to_k", "q_proj")):
            tensors |= pair(book.spelled(address, book.kohya), shape[0], shape[1], rank=1)
    return save(tmp_path / f"{family}.safetensors", tensors)


WIDTHS = {"sd1": 768, "sd2": 1024, "sdxl": 2048, "sdxl-refiner": 1280, "x4-upscaler": 1024}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_told_by_shapes(family, tmp_path, book):
    loose = open_adapter(of_family(tmp_path, family, "unet"))
    assert family_of(loose) == FAMILIES[family].title
    for other, width in WIDTHS.items():
        modules = book_of_family(other)
        read, title = read_adapter(tmp_path / f"{family}.safetensors", modules), FAMILIES[other].title
        if other == family:
            assert fit(read, modules.modules, title).left == {}
            continue
        with pytest.raises(ModelError) as error:
            fit(read, modules.modules, title, partial=True)
        said = f"{family} is for {FAMILIES[family].title} "
        if width != WIDTHS[family]:
            said += f"(to_k in = {WIDTHS[family]}), the model is {title} ({width}); take an adapter for {title}"
        assert str(error.value).startswith(said)


def test_families_of_text_encoders_alone(tmp_path):
    assert family_of(open_adapter(of_family(tmp_path, "sdxl", "text_encoder_2"))) == "SDXL"
    tensors = pair("lora_te_text_model_encoder_layers_0_mlp_fc1", 3072, 768)
    assert family_of(open_adapter(save(tmp_path / "a.safetensors", tensors))) == "Stable Diffusion 1"
    tensors = pair("lora_te1_text_model_encoder_layers_0_mlp_fc1", 3072, 768)
    assert family_of(open_adapter(save(tmp_path / "a.safetensors", tensors))) == "SDXL"
    tensors = pair("lora_te_text_model_encoder_layers_0_mlp_fc1", 4096, 1024)
    assert family_of(open_adapter(save(tmp_path / "a.safetensors", tensors))) == "Stable Diffusion 2"


def test_a_model_outside_the_families(tmp_path, book):
    loose = open_adapter(save(tmp_path / "a.safetensors", pair(KOHYA_Q, 32, 32)))
    assert family_of(loose) is None
    assert family_of(loose, {"Tiny": book}) == "Tiny"


def test_what_no_layer_fits_is_refused(tmp_path, book):
    path = save(tmp_path / "a.safetensors", pair("lora_unet_elsewhere", 32, 32) | pair(KOHYA_Q, 32, 48))
    for partial in (False, True):
        with pytest.raises(
            ModelError, match=rf"a is for another model than Tiny.*{Q} \(of shape \(32, 48\), not \(32, 32\)"
        ):
            fit(read_adapter(path, book), book.modules, "Tiny", partial)


def test_matrices_fit_convolutions_of_one_pixel(tmp_path):
    """proj_in is a 1x1 convolution in Stable Diffusion 1, a matrix in 2: files hold either."""
    for family, shape in (("sd1", ()), ("sd2", (1, 1))):
        book = book_of_family(family)
        name = "lora_unet_mid_block_attentions_0_proj_in"
        tensors = {
            f"{name}.lora_down.weight": torch.ones(2, 1280, *shape),
            f"{name}.lora_up.weight": torch.ones(1280, 2, *shape),
        }
        applied = fit(read_adapter(save(tmp_path / "a.safetensors", tensors), book), book.modules, "the model")
        assert applied.left == {}


def test_an_inpainting_model_takes_the_rest_of_a_plain_ones_adapter(tmp_path):
    """conv_in has other channels there; that is no other family."""
    modules = dict(book_of_family("sd1").modules) | {"unet.conv_in": (320, 9, 3, 3)}
    layout("lycoris_locon_sd15", tmp_path / "a.safetensors")
    read = read_adapter(tmp_path / "a.safetensors", book_of_family("sd1"))
    with pytest.raises(ModelError, match=r"only in part, 1 of its.*unet.conv_in \(of shape \(320, 4, 3, 3\), not"):
        fit(read, modules, "the model")
    assert len(fit(read, modules, "the model", partial=True).adapter.layers) == len(read.adapter.layers) - 1


# -- the report -------------------------------------------------------------------------------------------------------


def test_reports_state_the_norms_of_the_full_products(tmp_path, networks, book):
    weight = networks[UNET].get_submodule(Q).weight.detach()
    tensors = pair(KOHYA_Q, 32, 32, rank=3) | {f"{KOHYA_Q}.alpha": torch.tensor(6.0)} | pair("lora_unet_none", 8, 8)
    gains = {"lora_unet_conv_in.weight": torch.full((16,), 0.5), "lora_unet_conv_in.on_input": torch.tensor(False)}
    conv = networks[UNET].conv_out.weight
    tensors |= gains | {"lora_unet_conv_out.diff": torch.ones(conv.shape)}
    read = read_adapter(save(tmp_path / "a.safetensors", tensors), book)
    product = 2 * tensors[f"{KOHYA_Q}.lora_up.weight"] @ tensors[f"{KOHYA_Q}.lora_down.weight"]
    for given in (networks, None):
        rows = {row.name: row for row in report(read, given)}
        row = rows[f"unet.{Q}"]
        assert (row.kind, row.rank, row.alpha, row.matched) == ("lora", 3, 6.0, True)
        assert row.norm == pytest.approx(float(product.norm()), rel=1e-6)
        assert row.relative == (pytest.approx(float(product.norm() / weight.norm()), rel=1e-6) if given else None)
        assert rows["unet.conv_out"].norm == pytest.approx(conv.numel() ** 0.5)
        assert rows["unet.conv_in"].relative == (pytest.approx(0.5) if given else None)
        assert (rows["unet.conv_in"].norm is None) == (given is None)
        last = list(rows.values())[-1]
        assert (last.name, last.matched, last.relative) == ("lora_unet_none", False, None)


# -- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_file_of_150_megabytes_is_read_within_a_second(tmp_path):
    """Stable Diffusion 1, 792 tensors of kohya's at rank 64 in float32: hashed, every number looked at."""
    keys = HEADERS["lora_kohya_sd15_dim8_alpha4"]["keys"]
    tensors = {
        key: torch.rand([64 if side == 8 else side for side in shape]) if shape else torch.tensor(4)
        for key, (shape, _) in keys.items()
    }
    path, book = save(tmp_path / "a.safetensors", tensors), book_of_family("sd1")
    assert path.stat().st_size > 145e6
    spent = []
    for _ in range(3):
        before = time.process_time()
        assert read_adapter(path, book).unmatched == {}
        spent.append(time.process_time() - before)
    assert min(spent) < 1, spent
