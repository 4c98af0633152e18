"""Names of modules and tensors in adapters: every dialect's, both ways, against names that others published."""

import gzip
import json
from pathlib import Path

import pytest
from helpers import small_model

from ldm.adapters import kinds
from ldm.adapters.names import (
    DIALECTS,
    PEFT_OWN,
    SUFFIXES,
    Book,
    book_of,
    book_of_family,
    dialect_of,
    modules_of_family,
    split,
)
from ldm.checkpoints.families import FAMILIES
from ldm.checkpoints.folder import open_folder

KEYS = json.loads(gzip.decompress((Path(__file__).parent / "data" / "single_files.json.gz").read_bytes()))
NETWORKS = {"unet_": "unet", "te_": "text_encoder", "te0_": "text_encoder", "te1_": "text_encoder_2"}
OLD = (".attn1.", ".attn2.", ".self_attn.")  # of what the dialect of 2023 has names for
CLIP = "text_model.encoder.layers.0"
TO_K = "transformer_blocks.0.attn2.to_k"
DEEP = f"down_blocks.1.attentions.0.{TO_K}"


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Book:
    """The book of a model with two levels and one block a level."""
    return book_of(open_folder(small_model(tmp_path_factory.mktemp("small"))).networks)


def spellings(book: Book, dialect: str) -> dict[tuple[str, str], str]:
    """(network where the name does not tell it, name) -> address, for all the addresses the dialect has names for."""
    found = {}
    for address in book.modules:
        network = address.partition(".")[0]
        if dialect == "diffusers-old" and not any(part in f"{address}." for part in OLD):
            with pytest.raises(KeyError):
                book.spelled(address, dialect)
        elif network in DIALECTS[dialect].heads:
            key = (network if dialect == "peft" else "", book.spelled(address, dialect))
            assert key not in found, f"{address} and {found[key]} are both {key}"
            found[key] = address
    return found


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("family", [*FAMILIES, "small"])
def test_every_spelling_comes_back_and_is_no_others(family, dialect, request):
    book = request.getfixturevalue("small") if family == "small" else book_of_family(family)
    found = spellings(book, dialect)
    expected = {a for a in book.modules if a.partition(".")[0] in DIALECTS[dialect].heads}
    if dialect == "diffusers-old":
        assert 10 < len(found) < len(expected)
    else:
        assert set(found.values()) == expected
    assert {name: book.address(name[1], name[0]) for name in found} == found


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_dialect_is_told_from_the_names(dialect):
    book = book_of_family("sdxl")
    assert dialect_of([(name, a) for (_, name), a in spellings(book, dialect).items()], book) == dialect
    assert dialect_of([], book) == ""


@pytest.mark.parametrize("family", KEYS)
def test_names_of_the_published_code(family):
    """ComfyUI and kohya call the U-Net's modules as the single files do, whose keys ai-toolkit maps to diffusers'."""
    book, hits = book_of_family(family), 0
    for theirs, ours in KEYS[family]["keymap"].items():
        prefix = next((prefix for prefix in NETWORKS if ours.startswith(prefix)), "")
        module, _, leaf = theirs.rpartition(".")
        if not prefix or leaf != "weight" or "resblocks.23." in theirs:  # a layer that Stable Diffusion 2 leaves out
            continue
        address = NETWORKS[prefix] + "." + ours.removeprefix(prefix).removesuffix(".weight")
        address = address.replace("text_encoder.", "text_encoder_2.") if family == "sdxl-refiner" else address
        if address not in book.modules or book.modules[address] == ():
            continue
        assert book.address(module) == address
        hits += 1
        if prefix == "unet_":
            path = module.removeprefix("model.diffusion_model.")
            assert book.spelled(address, "comfy") == f"diffusion_model.{path}"
            assert book.spelled(address, "kohya-sgm") == "lora_unet_" + path.replace(".", "_")
            assert book.address(f"diffusion_model.{path}") == book.address(f"lora_unet_{path}") == address
    assert hits > 300


NAMES = [  # family, name in a file, address, network that the place of the file tells
    ("sd1", f"lora_unet_{DEEP.replace('.', '_')}", f"unet.{DEEP}", ""),
    ("sd1", "lora_te_text_model_encoder_layers_0_self_attn_q_proj", f"text_encoder.{CLIP}.self_attn.q_proj", ""),
    ("sdxl", "lora_te1_text_model_encoder_layers_0_mlp_fc1", f"text_encoder.{CLIP}.mlp.fc1", ""),
    ("sdxl", "lora_te2_text_model_encoder_layers_0_mlp_fc1", f"text_encoder_2.{CLIP}.mlp.fc1", ""),
    ("sdxl", "lora_te2_text_projection", "text_encoder_2.text_projection", ""),
    ("sdxl-refiner", "lora_te_text_model_encoder_layers_0_mlp_fc1", f"text_encoder_2.{CLIP}.mlp.fc1", ""),
    ("sdxl", "lora_unet_label_emb_0_2", "unet.add_embedding.linear_2", ""),
    ("sd1", "oft_unet_conv_in", "unet.conv_in", ""),
    ("sd1", "lycoris_mid_block_resnets_0_conv1", "unet.mid_block.resnets.0.conv1", ""),
    ("sd1", f"unet.{DEEP}", f"unet.{DEEP}", ""),
    ("sd1", DEEP, f"unet.{DEEP}", ""),
    ("sd1", f"base_model.model.{DEEP}", f"unet.{DEEP}", ""),
    ("sd1", f"base_model.model.{CLIP}.mlp.fc1", f"text_encoder.{CLIP}.mlp.fc1", ""),
    ("sd1", "base_model.model.encoder.layers.0.mlp.fc1", f"text_encoder.{CLIP}.mlp.fc1", ""),
    ("sdxl", f"base_model.model.{CLIP}.mlp.fc1", None, ""),  # of both text encoders
    ("sdxl", f"base_model.model.{CLIP}.mlp.fc1", f"text_encoder_2.{CLIP}.mlp.fc1", "text_encoder_2"),
    ("sdxl", "encoder.layers.20.mlp.fc1", "text_encoder_2.text_model.encoder.layers.20.mlp.fc1", ""),
    ("sd1", f"unet.{DEEP.replace('.to_k', '.processor.to_k_lora')}", f"unet.{DEEP}", ""),
    ("sd1", DEEP.replace(".to_k", ".processor.to_out_lora"), f"unet.{DEEP.replace('to_k', 'to_out.0')}", ""),
    ("sd1", f"text_encoder.{CLIP}.self_attn.to_out_lora", f"text_encoder.{CLIP}.self_attn.out_proj", ""),
    ("sd1", "diffusion_model.input_blocks.4.1.proj_in", "unet.down_blocks.1.attentions.0.proj_in", ""),
    ("sd1", "diffusion_model.down_blocks.1.attentions.0.proj_in", "unet.down_blocks.1.attentions.0.proj_in", ""),
    ("sdxl", f"text_encoders.clip_g.transformer.{CLIP}.mlp.fc2", f"text_encoder_2.{CLIP}.mlp.fc2", ""),
    ("sdxl", f"clip_l.transformer.{CLIP}.mlp.fc2", f"text_encoder.{CLIP}.mlp.fc2", ""),
    ("sd2", f"text_encoders.clip_h.transformer.{CLIP}.mlp.fc2", f"text_encoder.{CLIP}.mlp.fc2", ""),
    ("sd2", "cond_stage_model.model.transformer.resblocks.0.mlp.c_fc", f"text_encoder.{CLIP}.mlp.fc1", ""),
    ("sd1", "lora_unet_double_blocks_0_img_attn_proj", None, ""),  # Flux
    ("sd1", "lora_te2_text_model_encoder_layers_0_mlp_fc1", None, ""),
    ("sd1", "", None, ""),
    ("sd1", "unet.", None, ""),
]


@pytest.mark.parametrize(("family", "name", "address", "network"), NAMES)
def test_names_as_tools_write_them(family, name, address, network):
    assert book_of_family(family).address(name, network) == address


def test_the_width_of_the_text_tells_what_comfyui_calls_its_encoder():
    address = f"text_encoder.{CLIP}.mlp.fc1"
    assert book_of_family("sd1").spelled(address, "comfy").startswith("text_encoders.clip_l.transformer.text_model.")
    assert book_of_family("sd2").spelled(address, "comfy").startswith("text_encoders.clip_h.transformer.text_model.")


def test_kohya_writes_another_dialect_for_sdxl():
    written = {family: book_of_family(family).kohya for family in FAMILIES}
    assert written == {
        "sd1": "kohya", "x4-upscaler": "kohya", "sdxl": "kohya-sgm", "sdxl-refiner": "kohya-sgm", "sd2": "kohya"
    }  # fmt: skip


TENSORS = [  # name in a file, module and what we call the tensor
    ("lora_unet_x.lora_down.weight", ("lora_unet_x", "lora_down.weight")),
    ("lora_unet_x.alpha", ("lora_unet_x", "alpha")),
    ("lora_unet_x.dora_scale", ("lora_unet_x", "dora_scale")),
    ("unet.a.to_q.lora.up.weight", ("unet.a.to_q", "lora_up.weight")),
    ("unet.a.to_q.lora_A.weight", ("unet.a.to_q", "lora_down.weight")),
    ("a.to_q.lora_B.default.weight", ("a.to_q", "lora_up.weight")),
    ("a.to_q.lora_B.weight", ("a.to_q", "lora_up.weight")),
    ("a.to_q.lora_B.bias", ("a.to_q", "lora_up.bias")),
    ("a.to_q.lora_magnitude_vector", ("a.to_q", "lora_magnitude_vector")),
    ("a.to_q.lora_magnitude_vector.default.weight", ("a.to_q", "lora_magnitude_vector")),
    ("a.q_proj.lora_linear_layer.down.weight", ("a.q_proj", "lora_down.weight")),
    ("a.processor.to_q_lora.down.weight", ("a.processor.to_q_lora", "lora_down.weight")),
    ("base_model.model.a.hada_w1_a", ("base_model.model.a", "hada_w1_a")),
    ("base_model.model.a.lokr_t2.default", ("base_model.model.a", "lokr_t2")),
    ("lora_unet_x.a1.weight", ("lora_unet_x", "a1.weight")),
    ("lora_unet_x.diff_b", ("lora_unet_x", "diff_b")),
    ("lora_unet_x.weight", ("lora_unet_x", "weight")),
    ("lora_unet_x.lora_xyz", None),
    ("alpha", None),
    ("", None),
]


@pytest.mark.parametrize(("name", "parts"), TENSORS)
def test_tensors_of_every_dialect(name, parts):
    assert split(name) == parts


def test_every_tensor_of_every_kind_is_known():
    assert set(SUFFIXES.values()) == kinds.TENSORS | {"alpha"} | PEFT_OWN.keys()


def test_modules_are_all_that_have_a_weight():
    """Counts and shapes of Stable Diffusion 1's, as its published files have them."""
    keymap = KEYS["sd1"]["keymap"].values()
    published = {name.removeprefix("unet_") for name in keymap if name.startswith("unet_") and name.endswith(".weight")}
    modules = modules_of_family("sd1")
    assert {f"unet.{name.removesuffix('.weight')}" for name in published} == {m for m in modules if m[:5] == "unet."}
    assert modules[f"unet.{DEEP}"] == (640, 768) and modules["unet.conv_in"] == (320, 4, 3, 3)
    assert modules["text_encoder.text_model.embeddings.token_embedding"] == (49408, 768)
