"""`ldm info`: what any file is, from its header alone; foreign words are shown, never obeyed."""

import hashlib
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import refused
from safetensors.torch import save_file

Shapes = dict[str, tuple[int, ...]]
UNET = "model.diffusion_model."
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
ATTENTION = "down_blocks_0_attentions_0_transformer_blocks_0"
SD1: Shapes = {  # names and shapes as they stand in the published files, a few of each
    f"{UNET}input_blocks.0.0.weight": (320, 4, 3, 3), f"{UNET}out.2.weight": (4, 320, 3, 3),
    f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
    "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
    "first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3),
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
    "cond_stage_model.transformer.text_model.final_layer_norm.weight": (768,),
}  # fmt: skip
SD2: Shapes = {
    f"{UNET}input_blocks.0.0.weight": (320, 9, 3, 3),
    f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
    "cond_stage_model.model.ln_final.weight": (1024,), "model_ema.diffusion_modelinput_blocks00weight": (320, 9, 3, 3),
    "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3), "alphas_cumprod": (1000,),
}  # fmt: skip
SDXL: Shapes = {
    f"{UNET}input_blocks.0.0.weight": (320, 4, 3, 3),
    f"{UNET}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, 2048),
    "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": (768,),
    "conditioner.embedders.1.model.ln_final.weight": (1280,),
    "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
}  # fmt: skip
REFINER: Shapes = {
    f"{UNET}input_blocks.0.0.weight": (384, 4, 3, 3), "conditioner.embedders.0.model.ln_final.weight": (1280,),
    f"{UNET}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (768, 1280),
    f"{UNET}label_emb.0.0.weight": (1536, 2560),
}  # fmt: skip


def header_only(path: Path, shapes: Shapes, metadata: dict[str, str] | None = None, code: str = "F16") -> Path:
    """A safetensors file whose tensors are a hole of zeros: true sizes, no room on the disk."""
    size = {"F16": 2, "F32": 4, "BF16": 2}[code]
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + size * torch.Size(shape).numel()
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
    return path


@pytest.fixture
def told(run):
    """What `ldm info FILE --json` says."""

    def ask(path: Path, *words: str) -> dict[str, Any]:
        done = run("info", path, "--json", *words)
        assert done.code == 0, done.err
        found: dict[str, Any] = json.loads(done.out)
        return found

    return ask


MODELS = {  # shapes, metadata -> family, task, prediction type
    "sd1": (SD1, {}, "Stable Diffusion 1", "text-to-image", "epsilon (usual"),
    "sd1, stated": (SD1, {"modelspec.prediction_type": "v"}, "Stable Diffusion 1", "text-to-image", "v_prediction"),
    "sd2-inpainting": (SD2, {}, "Stable Diffusion 2", "inpainting", "epsilon (usual"),
    "sdxl": (SDXL, {"modelspec.prediction_type": "epsilon"}, "SDXL", "text-to-image", "epsilon"),
    "sdxl, by its keys": (SDXL | {"v_pred": (0,), "ztsnr": (0,)}, {}, "SDXL", "text-to-image", "v_prediction"),
    "refiner": (REFINER, {}, "SDXL refiner", "text-to-image", "epsilon (usual"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models_in_one_file(told, tmp_path, name):
    shapes, metadata, family, task, prediction = MODELS[name]
    rows = told(header_only(tmp_path / "x.safetensors", shapes, metadata))
    assert (rows["family"], rows["task"]) == (family, task) and rows["prediction type"].startswith(prediction)
    assert rows["tensors"] == len(shapes)
    count = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert rows["parameters"] == f"{count:,} in float16"
    assert rows["shapes"]["channels in"] == shapes[f"{UNET}input_blocks.0.0.weight"][1]
    assert rows.get("zero terminal SNR") == ("yes" if "ztsnr" in shapes else None)
    parts = [int(said.split()[0].replace(",", "")) for said in rows["parts"].values()]
    assert sum(parts) == count and "unet" in rows["parts"] and ("EMA" in rows["parts"]) == (name == "sd2-inpainting")


LORAS: dict[str, tuple[dict[str, torch.Tensor], dict[str, str], dict[str, str]]] = {  # tensors, metadata -> rows
    "kohya": (
        {f"lora_unet_{ATTENTION}_attn2_to_k.lora_down.weight": torch.ones(8, 768),
         f"lora_unet_{ATTENTION}_attn2_to_k.lora_up.weight": torch.ones(320, 8),
         f"lora_unet_{ATTENTION}_attn2_to_k.alpha": torch.tensor(4.0),
         "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": torch.ones(16, 768),
         "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight": torch.ones(768, 16),
         "lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha": torch.tensor(1, dtype=torch.int64)},
        {}, {"kind": "a LoRA in kohya's names", "family": "Stable Diffusion 1", "rank": "8 to 16", "alpha": "1 to 4",
             "layers": "1 of the denoiser, 1 of text encoders"}),
    "kohya SDXL": (
        {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight": torch.ones(8, 2048),
         "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": torch.ones(8, 768)},
        {}, {"family": "SDXL", "rank": "8", "alpha": "not in the file, so that of the rank"}),
    "text encoder alone": (
        {"lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": torch.ones(8, 1280)},
        {}, {"family": "SDXL", "layers": "0 of the denoiser, 1 of text encoders"}),
    "its own word": (
        {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(8, 768)},
        {"ss_base_model_version": "sd_v1"}, {"family": "sd_v1 (its own word)"}),
    "LoHa": (
        {f"lora_unet_{ATTENTION}_attn2_to_k.hada_w1_a": torch.ones(320, 4),
         f"lora_unet_{ATTENTION}_attn2_to_k.hada_w1_b": torch.ones(4, 768)},
        {}, {"form": "LoHa", "rank": "4", "family": "Stable Diffusion 1"}),
    "LoKr": (
        {f"lora_unet_{ATTENTION}_attn2_to_k.lokr_w1": torch.ones(8, 8),
         f"lora_unet_{ATTENTION}_attn2_to_k.lokr_w2_a": torch.ones(40, 4),
         f"lora_unet_{ATTENTION}_attn2_to_k.lokr_w2_b": torch.ones(4, 128)},
        {}, {"form": "LoKr", "rank": "4", "family": "Stable Diffusion 2"}),
    "PEFT": (
        {f"base_model.model.{BLOCK}.attn2.to_k.lora_A.weight": torch.ones(4, 768),
         f"base_model.model.{BLOCK}.attn2.to_k.lora_B.weight": torch.ones(320, 4)},
        {}, {"kind": "a LoRA in PEFT's names", "rank": "4", "family": "Stable Diffusion 1"}),
    "diffusers": (
        {f"unet.{BLOCK}.attn2.to_k.lora.down.weight": torch.ones(4, 1024),
         f"unet.{BLOCK}.attn2.to_k.lora.up.weight": torch.ones(320, 4),
         "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.down.weight": torch.ones(4, 1024)},
        {"lora_adapter_metadata": '{"unet.r": 4, "unet.lora_alpha": 2, "text_encoder.lora_alpha": 3.5}'},
        {"kind": "a LoRA in diffusers' names", "rank": "4", "alpha": "2 to 3.5", "family": "Stable Diffusion 2",
         "layers": "1 of the denoiser, 1 of text encoders"}),
    "old diffusers": (
        {f"unet.{BLOCK}.attn2.processor.to_k_lora.down.weight": torch.ones(4, 768)},
        {"lora_adapter_metadata": "{{{"}, {"rank": "4", "family": "Stable Diffusion 1"}),
    "Flux": (
        {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(16, 3072)}, {}, {"family": "Flux"}),
}  # fmt: skip


@pytest.mark.parametrize("name", LORAS)
def test_loras(told, tmp_path, name):
    tensors, metadata, expected = LORAS[name]
    save_file(tensors, tmp_path / "lora.safetensors", metadata or None)
    rows = told(tmp_path / "lora.safetensors")
    assert {key: rows.get(key) for key in expected} == expected
    assert "LoRA" in rows["kind"] and rows.get("metadata", {}) == metadata


def test_folder_of_peft(told, tmp_path):
    """A folder with one file of weights is told as that, with the alpha that PEFT keeps beside it."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(LORAS["PEFT"][0], folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 16, "peft_type": "LORA"}')
    rows = told(folder)
    assert (rows["file"], rows["alpha"], rows["rank"]) == ("adapter_model.safetensors", "16", "4")


def test_parts(told, model, tmp_path):
    """The networks of a model folder, a TAESD, a ControlNet, an embedding, and what nobody knows."""
    assert "U-Net" in told(next((model / "unet").glob("*.safetensors")))["kind"]
    rows = told(next((model / "vae").glob("*.safetensors")))
    assert "VAE" in rows["kind"] and rows["shapes"]["latent channels"] == 4
    rows = told(model / "text_encoder")
    assert "text encoder" in rows["kind"] and rows["shapes"] == {"words": 514, "width of a word": 32}
    control = {"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3), "conv_in.weight": (320, 4, 3, 3),
               "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (320, 1024)}  # fmt: skip
    rows = told(header_only(tmp_path / "c.safetensors", control))
    assert "ControlNet" in rows["kind"] and rows["family"] == "Stable Diffusion 2"
    taesd = {"decoder.layers.0.weight": (64, 4, 3, 3), "encoder.layers.3.conv.0.weight": (64, 64, 3, 3),
             "decoder.layers.3.conv.0.weight": (64, 64, 3, 3)}  # fmt: skip
    assert "TAESD" in told(header_only(tmp_path / "t.safetensors", taesd))["kind"]
    rows = told(header_only(tmp_path / "e.safetensors", {"<cat-toy>": (3, 768)}))
    assert (
        "embedding" in rows["kind"] and rows["vectors"] == "3 of 768 numbers" and rows["family"] == "Stable Diffusion 1"
    )
    rows = told(header_only(tmp_path / "p.safetensors", {"clip_l": (2, 768), "clip_g": (2, 1280)}))
    assert rows["vectors"] == "2 of 768 numbers, 2 of 1280 numbers" and rows["family"] == "SDXL"
    rows = told(header_only(tmp_path / "x.safetensors", {"layer.weight": (3, 5)}, code="BF16"), "--tensors")
    assert rows["listing"] == {"layer.weight": "bfloat16 3x5"} and "family" not in rows


def test_hash(run, told, tmp_path):
    """Small files are hashed, large ones when asked; what is not done is said. The short form is A1111's ten digits."""
    small = tmp_path / "small.safetensors"
    save_file({"x": torch.arange(9.0)}, small)
    expected = hashlib.sha256(small.read_bytes()).hexdigest()
    rows = told(small)
    assert (rows["sha256"], rows["short hash"], rows["bytes"]) == (expected, expected[:10], small.stat().st_size)
    large = header_only(tmp_path / "large.safetensors", {"x": (2**29 + 1,)}, code="F16")
    began = time.perf_counter()
    assert told(large)["sha256"] is None and "short hash" not in told(large)
    assert time.perf_counter() - began < 1  # two runs, one gigabyte, nothing of it read
    assert "the file is large; add --hash" in run("info", large).out


def test_hash_of_a_large_file(told, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["ldm.cli.info"], "QUICK", 10)  # ldm.cli.info is the command
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.arange(9.0)}, path)
    assert told(path)["sha256"] is None
    assert told(path, "--hash")["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("opened"),)


def test_pickles_are_named_and_not_opened(told, tmp_path):
    for name, old in (("a.ckpt", False), ("b.pt", True), ("c.bin", False), ("d.weights", False)):
        torch.save({"x": Bomb()}, tmp_path / name, _use_new_zipfile_serialization=not old)
        rows = told(tmp_path / name)
        assert "pickled file" in rows["kind"] and "--allow-pickle" in rows["to convert"]
        assert rows["sha256"] == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    assert not (tmp_path / "opened").exists()


HOSTILE = "red\x1b[31m\r\n\x07\u202eevil\u2066\x9b2J"


def test_hostile_text_is_shown(run, told, tmp_path):
    """Escapes and direction marks in metadata are printed as what they are; lines stay lines; JSON holds them whole."""
    metadata = {"modelspec.license": HOSTILE, "modelspec.title": HOSTILE * 40, f"ss_{HOSTILE}": "x",
                "modelspec.prediction_type": HOSTILE, "ss_base_model_version": HOSTILE}  # fmt: skip
    path = header_only(tmp_path / "x.safetensors", {"lora_te_x.lora_down.weight": (4, 8)}, metadata, "F32")
    done = run("info", path)
    assert done.code == 0
    assert all(c.isprintable() or c == "\n" for c in done.out) and r"\x1b[31m" in done.out
    assert max(map(len, done.out.splitlines())) < 300
    assert told(path)["metadata"] == metadata


def test_long_metadata_is_cut_for_people_only(run, told, tmp_path):
    metadata = {f"ss_{i:03}": "x" * 500 for i in range(60)} | {"modelspec.title": "Owls"}
    path = header_only(tmp_path / "x.safetensors", {"lora_te_x.lora_down.weight": (4, 8)}, metadata)
    lines = run("info", path).out.splitlines()
    assert len(lines) < 40 and "49 more, which --json shows" in lines[-1]
    assert any("modelspec.title: Owls" in line for line in lines)  # before all that a trainer says
    assert told(path)["metadata"] == metadata


def test_model_folder(run, told, model, tmp_path):
    """Licence of the card, manifest, what is missing, what is pickled; names that lead out of it are not followed."""
    net = Path(shutil.copytree(model, tmp_path / "net"))
    (net / "README.md").write_text("---\ntags: [x]\nlicense: openrail++\n---\n# Owls\nlicense: no\n")
    rows = told(net, "--tensors")
    assert rows["licence"] == "openrail++" and rows["manifest"] == f"compare with: ldm verify {net}"
    assert (
        rows["shapes"] == {"channels in": 4, "width of the text": 32} and rows["pipeline"] == "StableDiffusionPipeline"
    )
    assert rows["listing"]["unet/conv_in.weight"] == "float32 16x4x3x3"
    (weights,) = (net / "vae").glob("*.safetensors")
    weights.rename(weights.with_suffix(".bin"))
    shutil.rmtree(net / "text_encoder")
    rows = told(net)
    assert "pickle" in rows["vae"] and rows["text_encoder"] == "missing"
    index = json.loads((net / "model_index.json").read_text("utf-8"))
    for name in ("../net/unet", "/etc", "..", HOSTILE):
        (net / "model_index.json").write_text(json.dumps(index | {name: ["diffusers", "UNet2DConditionModel"]}))
        done = run("info", net)
        assert done.code in (0, 1) and all(c.isprintable() or c == "\n" for c in done.out + done.err)
        assert "Traceback" not in done.err and "27," not in done.err
    for text in ('{"_class_name": {"a": [1]}}', '{"_class_name": 5, "unet": 7}', "{}"):
        (net / "model_index.json").write_text(text)
        assert run("info", net).code == 0
    (net / "unet/config.json").write_text('{"cross_attention_dim": [768], "in_channels": "4"}')
    assert run("info", net).code == 0


def test_what_is_nothing(run, tmp_path):
    (tmp_path / "text.txt").write_text("words")
    (tmp_path / "empty").mkdir()
    (tmp_path / "page.safetensors").write_text("<!doctype html>")
    (tmp_path / "none").write_bytes(b"")
    for name, said in (("text.txt", "text.txt"), ("empty", "no model_index.json"), ("page.safetensors", "HTML"),
                       ("none", "none"), ("/dev/null", "/dev/null"),
                       ("gone.ckpt", "there is no gone.ckpt")):  # fmt: skip
        refused(run("info", name), 1, said)
