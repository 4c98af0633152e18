"""Adapters written in every dialect do in stock diffusers and PEFT what folding them into the weights does."""

import copy
import gzip
import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from singles import LISTS, SMALL_CLIP, SMALL_G, SMALL_UNETS, theirs
from torch import Tensor, nn

from ldm.adapters.adapter import Adapter, Layer
from ldm.adapters.kinds import delta
from ldm.adapters.names import Book, book_of, book_of_family
from ldm.adapters.reading import read_adapter
from ldm.adapters.writing import hashes, write_adapter
from ldm.errors import ModelError, UsageError
from ldm.models.clip import CLIPTextConfig, CLIPTextModel
from ldm.models.unet import CROSS, PLAIN, UNet, UNetConfig

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the other libraries' own deprecations while they import
    import diffusers
    from peft import PeftModel, get_peft_model_state_dict

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
TEXT = CLIPTextConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, eos_token_id=2
)
U_NET = UNetConfig(
    sample_size=8, block_out_channels=(16, 32), down_block_types=(PLAIN, CROSS), layers_per_block=1, num_heads=(2, 2),
    transformer_layers_per_block=(1, 1), cross_attention_dim=32, norm_num_groups=8,
)  # fmt: skip
XL = {
    "unet": replace(SMALL_UNETS["sdxl"], transformer_layers_per_block=(1, 1, 2)),
    "text_encoder": replace(SMALL_CLIP, num_hidden_layers=2),
    "text_encoder_2": replace(SMALL_G, num_hidden_layers=2),
}
BLOCK = "unet.down_blocks.1.attentions.0"
U_NET_LAYERS = [
    f"{BLOCK}.transformer_blocks.0.{name}" for name in ("attn1.to_q", "attn2.to_k", "attn1.to_out.0", "ff.net.0.proj")
]
CONVOLUTIONS = [
    f"{BLOCK}.proj_in",
    "unet.up_blocks.1.resnets.0.conv1",
    "unet.down_blocks.0.downsamplers.0.conv",
    "unet.conv_in",
]
TEXT_LAYERS = [
    f"text_encoder.text_model.encoder.layers.{i}.{name}" for i, name in enumerate(("self_attn.out_proj", "mlp.fc1"))
]


@pytest.fixture(scope="module")
def sd1() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"unet": theirs(U_NET), "text_encoder": theirs(TEXT)}


@pytest.fixture(scope="module")
def sdxl() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {name: theirs(config) for name, config in XL.items()}


@pytest.fixture(scope="module")
def book() -> Book:
    return book_of({"unet": UNet(U_NET), "text_encoder": CLIPTextModel(TEXT)})


@pytest.fixture(scope="module")
def xl_book() -> Book:
    return book_of({name: UNet(c) if name == "unet" else CLIPTextModel(c) for name, c in XL.items()})


def lora(shape: tuple[int, ...], rank: int, alpha: float | None, dora: bool = False) -> Layer:
    """A random layer for a weight [O, I] or [O, I, kh, kw] that changes it by about as much as it is."""
    outputs, *rest = shape
    ends = [1] * (len(rest) - 1)
    tensors = {
        "lora_down.weight": torch.randn(rank, *rest) / 8,
        "lora_up.weight": torch.randn(outputs, rank, *ends) / 8,
    }
    if dora:
        tensors["dora_scale"] = torch.rand(outputs, 1, *ends) + 0.5
    return Layer("lora", tensors, alpha)


def random(book: Book, addresses: list[str], rank: int, alpha: float | None, dora: bool = False) -> Adapter:
    torch.manual_seed(1)
    return Adapter({address: lora(book.modules[address], rank, alpha, dora) for address in addresses}, name="random")


def inner(network: nn.Module, address: str) -> nn.Module:
    """A module of the other libraries' network; a CLIPTextModel has no `text_model.` since transformers 5."""
    path = address.partition(".")[2]
    return network.get_submodule(path if hasattr(network, "text_model") else path.removeprefix("text_model."))


def folded(networks: Mapping[str, nn.Module], adapter: Adapter) -> dict[str, nn.Module]:
    """The networks with the adapter in their weights: what every way of loading it must give."""
    whole = {name: copy.deepcopy(network) for name, network in networks.items()}
    for address, layer in adapter.layers.items():
        weight = inner(whole[address.partition(".")[0]], address).weight
        weight.data += delta(layer, weight)
    return whole


def outputs(networks: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """What the networks give for fixed inputs."""
    torch.manual_seed(2)
    found = {}
    with torch.no_grad():
        for name, network in networks.items():
            if name == "unet":
                c = network.config
                added = (
                    {"text_embeds": torch.randn(1, 20), "time_ids": torch.randn(1, 6)}
                    if c.addition_embed_type
                    else None
                )
                context = torch.randn(1, 7, c.cross_attention_dim)
                found[name] = network(torch.randn(1, 4, 8, 8), 500, context, added_cond_kwargs=added).sample
            else:
                found[name] = network(torch.arange(3, 12)[None]).last_hidden_state
    return found


def same(one: Mapping[str, Tensor], two: Mapping[str, Tensor], tolerance: float = 1e-5) -> None:
    for name in one:
        assert (one[name] - two[name]).abs().max() <= tolerance * two[name].abs().max(), name


def stock(
    networks: Mapping[str, nn.Module], path: Path, peft: bool = False, saved: Path | None = None
) -> dict[str, nn.Module]:
    """Copies of the networks into which stock diffusers, or PEFT, has loaded the file, and written it to `saved`."""
    whole = {name: copy.deepcopy(network) for name, network in networks.items()}
    if peft:
        for name, network in whole.items():
            place = path / name if (path / name).is_dir() else path
            if place != path or name == "unet":
                loaded = PeftModel.from_pretrained(network, place)
                if saved:
                    loaded.save_pretrained(saved / name)
        return whole
    if "text_encoder_2" in whole:
        pipe = diffusers.StableDiffusionXLPipeline(None, tokenizer=None, tokenizer_2=None, scheduler=None, **whole)
    else:
        pipe = diffusers.StableDiffusionPipeline(
            None, tokenizer=None, scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False, **whole
        )  # fmt: skip
    pipe.load_lora_weights(path.parent, weight_name=path.name)
    if saved:
        layers = {
            f"{name}_lora_layers": get_peft_model_state_dict(n, adapter_name="default_0") for name, n in whole.items()
        }
        configs = {f"{name}_lora_adapter_metadata": n.peft_config["default_0"].to_dict() for name, n in whole.items()}
        pipe.save_lora_weights(saved, **layers, **configs)
    return whole


@pytest.mark.parametrize("text", [False, True], ids=["unet", "unet+text"])
@pytest.mark.parametrize(
    "alpha", [1.0, pytest.param(2.0, marks=pytest.mark.slow), pytest.param(4.0, marks=pytest.mark.slow), 8.0]
)
@pytest.mark.parametrize("dialect", ["diffusers", "kohya", "peft", "comfy"])
def test_stock_tools_read_what_is_written(
    sd1: dict[str, nn.Module], book: Book, tmp_path: Path, dialect: str, alpha: float, text: bool
) -> None:
    adapter = random(book, [*U_NET_LAYERS, *CONVOLUTIONS, *(TEXT_LAYERS if text else [])], 4, alpha)
    path = tmp_path / ("folder" if dialect == "peft" else "file.safetensors")
    write_adapter(adapter, path, book, dialect)
    wanted = outputs(folded(sd1, adapter))
    assert not torch.allclose(wanted["unet"], outputs(sd1)["unet"], rtol=1e-2)
    if dialect != "comfy":  # which is no library
        same(outputs(stock(sd1, path, dialect == "peft")), wanted)
    back = read_adapter(path, book)
    assert not back.unmatched and back.adapter.layers.keys() == adapter.layers.keys()
    same(outputs(folded(sd1, back.adapter)), wanted, 1e-6)


def mixed(book: Book, dora: bool) -> Adapter:
    """Another rank and alpha in every layer, some without alpha."""
    torch.manual_seed(3)
    addresses = [*U_NET_LAYERS, *CONVOLUTIONS, *TEXT_LAYERS]
    alphas = [1.0, 3.0, None, 0.5, 8.0, 2.0, None, 7.0, 5.0, 2.0]
    pairs = zip(addresses, alphas, strict=True)
    return Adapter({a: lora(book.modules[a], 2 + i % 5, alpha, dora) for i, (a, alpha) in enumerate(pairs)})


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dialect", ["diffusers", "peft"])
def test_every_layer_keeps_a_rank_and_alpha_of_its_own(
    sd1: dict[str, nn.Module], book: Book, tmp_path: Path, dialect: str, dora: bool
) -> None:
    # not through kohya's names, where diffusers gives attention of Stable Diffusion 1 a wrong alpha if they differ
    adapter = mixed(book, dora)
    path = tmp_path / ("folder" if dialect == "peft" else "file.safetensors")
    write_adapter(adapter, path, book, dialect)
    wanted = outputs(folded(sd1, adapter))
    same(outputs(stock(sd1, path, dialect == "peft")), wanted)
    same(outputs(folded(sd1, read_adapter(path, book).adapter)), wanted, 1e-6)


@pytest.mark.parametrize("dialect", ["diffusers", "peft"])
def test_what_stock_tools_make_of_it_comes_back(
    sd1: dict[str, nn.Module], book: Book, tmp_path: Path, dialect: str
) -> None:
    adapter = mixed(book, False)
    path = tmp_path / ("folder" if dialect == "peft" else "file.safetensors")
    write_adapter(adapter, path, book, dialect)
    stock(sd1, path, dialect == "peft", tmp_path / "theirs")
    back = read_adapter(tmp_path / "theirs", book)
    assert not back.unmatched and back.adapter.layers.keys() == adapter.layers.keys()
    same(outputs(folded(sd1, back.adapter)), outputs(folded(sd1, adapter)), 1e-6)


@pytest.mark.parametrize("dialect", ["diffusers", "kohya", "peft"])
def test_sdxl_with_both_text_encoders(sdxl: dict[str, nn.Module], xl_book: Book, tmp_path: Path, dialect: str) -> None:
    unet = [f"unet.{name}" for name in (
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v", "mid_block.attentions.0.proj_out",
        "up_blocks.0.attentions.2.transformer_blocks.1.attn1.to_out.0", "up_blocks.1.upsamplers.0.conv",
        "down_blocks.1.resnets.0.conv_shortcut",
    )]  # fmt: skip
    layer = "text_model.encoder.layers.1.self_attn"
    adapter = random(xl_book, [*unet, f"text_encoder.{layer}.out_proj", f"text_encoder_2.{layer}.out_proj"], 4, 2.0)
    path = tmp_path / ("folder" if dialect == "peft" else "file.safetensors")
    write_adapter(adapter, path, xl_book, dialect)
    wanted = outputs(folded(sdxl, adapter))
    same(outputs(stock(sdxl, path, dialect == "peft")), wanted)
    same(outputs(folded(sdxl, read_adapter(path, xl_book).adapter)), wanted, 1e-6)


def test_a_file_of_kohyas_comes_back_from_peft_bit_by_bit(book: Book, tmp_path: Path) -> None:
    torch.manual_seed(4)
    types = [torch.int64, torch.float32, torch.float16, torch.bfloat16, None]
    tensors: dict[str, Tensor] = {}
    stored = {}
    for i, address in enumerate([*U_NET_LAYERS, *CONVOLUTIONS, *TEXT_LAYERS]):
        name = address.replace("text_encoder.", "lora_te_").replace("unet.", "lora_unet_").replace(".", "_")
        layer = lora(book.modules[address], 2 + i % 3, None)
        tensors |= {f"{name}.{key}": value.to(torch.float16) for key, value in layer.tensors.items()}
        stored[address] = types[i % 5]
        if (kind := types[i % 5]) is not None:
            tensors[f"{name}.alpha"] = torch.tensor(1 + i % 4).to(kind)
    said = {"ss_network_dim": "4", "ss_tag_frequency": '{"a": {"cat, sitting": 3}}', "ss_output_name": "猫"}
    save_file(tensors, tmp_path / "kohya.safetensors", said)
    adapter = read_adapter(tmp_path / "kohya.safetensors", book).adapter
    write_adapter(adapter, tmp_path / "peft", book, "peft")
    write_adapter(read_adapter(tmp_path / "peft", book).adapter, tmp_path / "back.safetensors", book, "kohya")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        assert back[name].dtype == value.dtype and back[name].shape == value.shape, name
        assert torch.equal(back[name], value), name
    assert said.items() <= metadata_of(tmp_path / "back.safetensors").items()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "family"), [("lora_kohya_sd15_conv4", "sd1"), ("lora_kohya_sdxl_dim8_alpha4", "sdxl")]
)
@pytest.mark.parametrize("dialect", ["diffusers", "peft", "comfy"])
def test_whole_files_of_kohyas_come_back_bit_by_bit(tmp_path: Path, layout: str, family: str, dialect: str) -> None:
    torch.manual_seed(4)
    listed = json.loads(gzip.decompress((Path(__file__).parent / "data" / "lora_headers.json.gz").read_bytes()))
    tensors = {
        name: (torch.randn(shape) if shape else torch.tensor(4)).to(getattr(torch, dtype))
        for name, (shape, dtype) in listed["files"][layout]["keys"].items()
    }
    book = book_of_family(family)
    save_file(tensors, tmp_path / "kohya.safetensors")
    write_adapter(read_adapter(tmp_path / "kohya.safetensors", book).adapter, tmp_path / "x", book, dialect)
    write_adapter(read_adapter(tmp_path / "x", book).adapter, tmp_path / "back.safetensors", book, "kohya")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        assert back[name].dtype == value.dtype and torch.equal(back[name], value), name


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sdxl-refiner"])
def test_comfy_finds_every_module(tmp_path: Path, family: str) -> None:
    # comfy/lora.py: "diffusion_model." and "text_encoders." with the keys of its own networks, less ".weight"
    theirs = {
        ours.removeprefix("unet_"): name.removeprefix("model.").removesuffix(".weight")
        for name, ours in LISTS[family]["keymap"].items()
        if ours.startswith("unet_") and name.endswith(".weight")
    }
    clips = {"sd1": {"": "clip_l"}, "sd2": {"": "clip_h"}, "sdxl": {"": "clip_l", "_2": "clip_g"}}
    book = book_of_family(family)
    wanted = {f"unet.{ours.removesuffix('.weight')}": name for ours, name in theirs.items()}
    for which, clip in clips.get(family, {"_2": "clip_g"}).items():
        for layer, name in ((0, "self_attn.q_proj"), (3, "self_attn.out_proj"), (9, "mlp.fc2")):
            path = f"text_model.encoder.layers.{layer}.{name}"
            wanted[f"text_encoder{which}.{path}"] = f"text_encoders.{clip}.transformer.{path}"
    layers = {a: Layer("bias", {"diff_b": torch.zeros(book.modules[a][0])}) for a in wanted}
    write_adapter(Adapter(layers), tmp_path / "x.safetensors", book, "comfy")
    assert set(load_file(tmp_path / "x.safetensors")) == {f"{name}.diff_b" for name in wanted.values()}


LYCORIS = {  # of a linear layer [32, 32]
    "loha": {f"hada_w{n}_{half}": (32, 2) if half == "a" else (2, 32) for n in (1, 2) for half in "ab"},
    "lokr": {"lokr_w1": (4, 4), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 8)},
    "oft": {"oft_blocks": (4, 8, 8)},
    "glora": {"a1.weight": (32, 2), "a2.weight": (2, 32), "b1.weight": (32, 2), "b2.weight": (2, 32)},
    "full": {"diff": (32, 32), "diff_b": (32,)},
}


@pytest.mark.parametrize("dialect", ["kohya", "comfy"])
def test_every_kind_has_a_place_in_kohyas_and_comfys_files(book: Book, tmp_path: Path, dialect: str) -> None:
    torch.manual_seed(5)
    for kind, shapes in LYCORIS.items():
        layer = Layer(
            kind, {name: torch.randn(shape) for name, shape in shapes.items()}, None if kind == "full" else 0.5
        )
        address = f"{BLOCK}.transformer_blocks.0.attn1.to_out.0"
        adapter = Adapter(
            {address: layer, f"{BLOCK}.norm": Layer("norm", {"w_norm": torch.ones(32), "b_norm": torch.ones(32)})}
        )
        write_adapter(adapter, tmp_path / f"{kind}.safetensors", book, dialect)
        back = read_adapter(tmp_path / f"{kind}.safetensors", book)
        assert not back.unmatched and back.adapter.layers.keys() == adapter.layers.keys()
        for name, value in back.adapter.layers.items():
            assert (value.kind, value.alpha) == (adapter.layers[name].kind, adapter.layers[name].alpha)
            assert all(torch.equal(tensor, adapter.layers[name].tensors[key]) for key, tensor in value.tensors.items())
        for other in ("diffusers", "peft"):
            with pytest.raises(ModelError, match=rf"{kind}, norm; write it as plain LoRA \(`--as-lora RANK`\)"):
                write_adapter(adapter, tmp_path / other, book, other)
            assert not (tmp_path / other).exists()


def test_what_a_file_says_of_itself(book: Book, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    adapter = replace(
        random(book, U_NET_LAYERS, 4, 2.0), metadata={"ss_steps": "10", "modelspec.author": "me", "format": "pt"}
    )
    write_adapter(
        adapter, path, book, "diffusers", architecture="stable-diffusion-v1", metadata={"modelspec.license": "MIT"}
    )
    said = metadata_of(path)
    wanted = {
        "ss_network_module": "networks.lora", "ss_network_dim": "4", "ss_network_alpha": "2", "ss_network_args": "{}",
        "ss_v2": "False", "ss_base_model_version": "sd_v1", "ss_steps": "10", "modelspec.author": "me",
        "modelspec.architecture": "stable-diffusion-v1/lora", "modelspec.license": "MIT", "modelspec.title": "random",
    }  # fmt: skip
    assert wanted.items() <= said.items()
    config = json.loads(said["lora_adapter_metadata"])
    assert (config["unet.r"], config["unet.lora_alpha"]) == (4, 2)
    raw = path.read_bytes()
    assert said["sshs_model_hash"] == hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()
    again = tmp_path / "again.safetensors"  # what is read keeps its words
    write_adapter(read_adapter(path, book).adapter, again, book, "kohya")
    assert {k: v for k, v in said.items() if k.startswith(("ss_", "modelspec"))}.items() <= metadata_of(again).items()


def test_the_hash_of_old_web_interfaces(tmp_path: Path) -> None:
    tensors = {"a.lora_up.weight": torch.randn(700, 512), "a.alpha": torch.tensor(4)}
    save_file(tensors, tmp_path / "x", {"ss_v2": "False"})  # kohya's: without what else stands in the metadata
    piece = (tmp_path / "x").read_bytes()[1 << 20 :][: 1 << 16]
    found = hashes(tensors, {"ss_v2": "False", "modelspec.title": "x"})
    assert found["sshs_legacy_hash"] == hashlib.sha256(piece).hexdigest()[:8] and len(piece) == 1 << 16


@pytest.mark.parametrize("dialect", ["diffusers", "kohya", "peft", "comfy"])
def test_half_precision_leaves_alpha_as_it_is(book: Book, tmp_path: Path, dialect: str) -> None:
    adapter = random(book, U_NET_LAYERS, 4, 0.1)
    write_adapter(adapter, tmp_path / "x", book, dialect, dtype=torch.float16)
    for address, layer in read_adapter(tmp_path / "x", book).adapter.layers.items():
        assert layer.alpha == (float(torch.tensor(0.1)) if dialect in ("kohya", "comfy") else 0.1)
        for name, value in layer.tensors.items():
            assert torch.equal(value, adapter.layers[address].tensors[name].half())


def test_what_cannot_be_written(book: Book, tmp_path: Path) -> None:
    path = tmp_path / "x"
    good = random(book, U_NET_LAYERS, 4, 2.0)
    address, layer = next(iter(good.layers.items()))

    def other(name: str = "", value: object = None, at: str = address) -> Adapter:
        return Adapter({**good.layers, at: replace(layer, tensors=layer.tensors | ({name: value} if name else {}))})

    up, magnitude = layer.tensors["lora_up.weight"], torch.ones(32, 1)
    cases: list[tuple[Adapter, str, dict[str, Any], str]] = [
        (Adapter({}, name="none"), "kohya", {}, "none has no layers"),
        (other(at="unet.nowhere"), "kohya", {}, "unet.nowhere is not in the model"),
        (other(at="unet.conv_in"), "kohya", {}, "unet.conv_in is not of the shape"),
        (other("lora_up.weight", up * float("nan")), "kohya", {}, "to_q is not finite in torch.float32"),
        (other("lora_up.weight", up * 1e6), "peft", {"dtype": torch.float16}, "to_q is not finite in torch.float16"),
        (other("dora_scale", magnitude), "diffusers", {}, "DoRA in some layers of a network only"),
        (other("dora_scale", magnitude.T), "peft", {}, "DoRA over inputs"),
        (other("diff_b", magnitude.flatten()), "peft", {}, "bias difference"),
        (other("lora_mid.weight", torch.ones(4, 4, 1, 1)), "diffusers", {}, "Tucker"),
    ]
    for adapter, dialect, options, said in cases:
        with pytest.raises(ModelError, match=said):
            write_adapter(adapter, path, book, dialect, **options)
    with pytest.raises(UsageError, match="diffusers, kohya, peft, comfy"):
        write_adapter(good, path, book, "kohia")
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    with pytest.raises(UsageError, match="other things in it"):
        write_adapter(good, tmp_path / "mine", book, "peft")
    write_adapter(good, path, book, "peft")
    bias = torch.randn(32)
    write_adapter(other("lora_up.bias", bias), path, book, "peft")  # PEFT's lora_bias is in all layers of a network
    back = read_adapter(path, book).adapter.layers
    assert torch.equal(back[address].tensors["lora_up.bias"], bias)
    assert all("lora_up.bias" in found.tensors for found in back.values())
