"""What pictures carry, against an independent reading of A1111's rules, samples of other tools, and hostile data."""

import dataclasses
import json
import random
import re
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from ldm import images, names
from ldm.diffusion.grids import GRIDS
from ldm.diffusion.spacing import SPACINGS
from ldm.errors import LdmError, ModelError, UsageError
from ldm.infotext import TIMED, comfy_fields, parse, request_fields, write
from ldm.names import SAMPLERS
from ldm.recipe import Recipe, differences, fields_of, from_json, read, texts
from ldm.request import Request
from ldm.schedulers import SCHEDULERS, from_config

SUFFIXES = (".png", ".jpg", ".webp", ".avif")
PROMPTS = [
    'a cat, a dog: both "quoted", back\\slash, 1:2, (big:1.2)',
    "first line, with: colon\nsecond line\n\nfourth, {a|b} <tag>",
    "an owl 🦉 and 👩‍👩‍👧, „Öl“, ſ",  # noqa: RUF001
    "一只猫头鹰，红色背景：夜晚",  # noqa: RUF001
    "一" * 300 + "\u3000" * 200 + "。",  # read with the other byte order, these have plain letters
    "an owl\nSteps: 99, Sampler: Heun, CFG scale: 1, Seed: 2, Size: 8x8",
]
RECIPE = Recipe(
    request=fields_of(
        Request(
            prompt="an owl", negative_prompt="", seed=42, num_inference_steps=20, guidance_scale=7.0, height=48,
            width=64, scheduler="dpm++2m", schedule_type="karras", clip_skip=2, noise_source="cpu",
        )
    ),
    model="emoji-64",
    components={"unet": "6" * 64, "vae": "a" * 64, "text_encoder": "b" * 64, "tokenizer": "c" * 64},
    scheduler={"_class_name": "DDIMScheduler", "beta_end": 0.012, "trained_betas": None},
    device="cpu", dtype="fp32", threads=2,
    versions={"ldm": "0.1.0", "torch": "2.13.0", "python": "3.11.7", "cpu": "AVX512"},
)  # fmt: skip
A1111 = """masterpiece, (owl:1.2), <lora:style:0.8>
on a branch
Negative prompt: lowres, bad anatomy
blurry
Steps: 28, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 3141592653, Size: 512x768, \
Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, Variation seed: 7, Variation seed strength: 0.25, \
Denoising strength: 0.45, Clip skip: 2, Hires upscale: 2, Hires steps: 10, Hires upscaler: Latent, \
Lora hashes: "style: 0123456789ab, other: ba9876543210", Version: v1.10.1"""
COMFY = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 156680208700286, "steps": 20, "cfg": 8.0, "sampler_name": "dpmpp_2m", "scheduler": "karras",
            "denoise": 1.0, "model": ["10", 0], "positive": ["11", 0], "negative": ["7", 0],
            "latent_image": ["5", 0],
        },
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "v1-5.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 384, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": ["12", 0], "clip": ["13", 0]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "text, watermark", "clip": ["4", 1]}},
    "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "prefix": "C"}, "is_changed": [float("nan")]},
    "10": {"class_type": "LoraLoader", "inputs": {"lora_name": "s.safetensors", "model": ["4", 0], "clip": ["4", 1]}},
    "11": {"class_type": "ControlNetApply", "inputs": {"conditioning": ["6", 0], "control_net": ["x", 0]}},
    "12": {"class_type": "PrimitiveString", "inputs": {"value": "a glass bottle"}},
    "13": {"class_type": "CLIPSetLastLayer", "inputs": {"stop_at_clip_layer": -2, "clip": ["10", 1]}},
}  # fmt: skip


def with_prompt(prompt: str, negative: str = "") -> Recipe:
    return replace(RECIPE, request=RECIPE.request | {"prompt": prompt, "negative_prompt": negative})


def as_a1111_reads(text: str) -> dict[str, str]:
    """The rules of A1111, as they are described, by other means than ours."""
    *lines, last = text.strip().split("\n")
    pairs = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)').findall(last)
    if len(pairs) < 3:
        lines, pairs = [*lines, last], []
    sides: list[list[str]] = [[], []]
    for line in lines:
        if line.startswith("Negative prompt:"):
            sides[1].append(line[len("Negative prompt:") :].strip())
        else:
            sides[bool(sides[1])].append(line.strip())
    found = {"Prompt": "\n".join(sides[0]), "Negative prompt": "\n".join(sides[1])}
    for key, value in pairs:
        if value.startswith('"') and value.endswith('"'):
            value = json.loads(value)
        if re.match(r"^\d+x\d+$", value):
            found[f"{key}-1"], found[f"{key}-2"] = value.split("x")
        else:
            found[key] = value
    return found


def written(**fields: Any) -> str:
    return texts(replace(RECIPE, request=RECIPE.request | fields))["parameters"]


def test_parameters_have_the_form_of_a1111() -> None:
    """Keys in the order of A1111's create_infotext; what it leaves out at its default is left out."""
    varied = {"variation_strength": 0.25, "variation_seed": 9}
    recipe = replace(with_prompt("an owl\nat night", "rain"), model='a "b", c: d')
    assert texts(replace(recipe, request=recipe.request | varied))["parameters"] == (
        "an owl\nat night\nNegative prompt: rain\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 42, Size: 64x48, "
        'Model hash: 6666666666, Model: "a \\"b\\", c: d", Variation seed: 9, Variation seed strength: 0.25, '
        "Clip skip: 2, RNG: CPU, Version: ldm 0.1.0"
    )
    model = "Size: 64x48, Model hash: 6666666666, Model: emoji-64"
    assert written(scheduler="ddim", schedule_type=None, clip_skip=None) == (
        f"an owl\nSteps: 20, Sampler: DDIM, CFG scale: 7, Seed: 42, {model}, RNG: CPU, Version: ldm 0.1.0"
    )
    assert written(
        scheduler="euler_a", schedule_type="sgm_uniform", profile="a1111", noise_source="gpu", eta=0.5,
        eta_noise_seed_delta=31337, literal=True, prompt="an (owl)",
    ) == (
        f"an (owl)\nSteps: 20, Sampler: Euler a, Schedule type: SGM Uniform, CFG scale: 7, Seed: 42, {model}, "
        "Clip skip: 2, ENSD: 31337, RNG: NV, Emphasis: None, Eta: 0.5, Profile: a1111, Version: ldm 0.1.0"
    )  # fmt: skip
    assert "Clip skip: 2, RNG: CPU, Profile: diffusers" in written(clip_skip=1, profile="diffusers")
    assert not {"Clip skip", "Emphasis"} & parse(written(clip_skip=1, literal=True)).keys()
    assert write({"prompt": "x", "num_inference_steps": 4, "seed": 1}, {"Own": "1", "Version": "z"}).endswith(
        "\nSteps: 4, Seed: 1, Own: 1, Version: z"
    )
    with pytest.raises(UsageError, match="2 keys"):
        write({"prompt": "x", "seed": 1, "num_inference_steps": None}, {"Version": "z"})


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_recipes_come_back_from_pictures(tmp_path: Path, suffix: str) -> None:
    picture = Image.new("RGB", (8, 8), "red")
    for i, prompt in enumerate(PROMPTS):
        for negative in ("", 'rain, "snow": 雪\nfog'):
            recipe, path = with_prompt(prompt, negative), tmp_path / f"{i}{suffix}"
            carried = texts(recipe)
            images.save(picture, path, carried)
            assert images.read_text(path) == carried and carried["ldm"].isascii()
            found = read(path)
            assert (found.source, found.recipe, found.notes) == ("ldm", recipe, ())
            assert found.request == recipe.request and Request(**found.request).prompt == prompt
            theirs = as_a1111_reads(carried["parameters"])
            assert theirs == parse(carried["parameters"])
            assert (theirs["Prompt"], theirs["Negative prompt"]) == (prompt, negative)
            assert (theirs["Seed"], theirs["Size-1"], theirs["Size-2"], theirs["RNG"]) == ("42", "64", "48", "CPU")
            images.save(picture, path, {"parameters": carried["parameters"]})
            assert read(path).source == "a1111" and read(path).recipe is None
            plain = {field.name: field.default for field in dataclasses.fields(Request)}
            said = {name: value for name, value in recipe.request.items() if value and value != plain[name]}
            assert read(path).request == said | {"negative_prompt": negative}


def test_half_surrogates_do_not_stop_a_picture_from_being_saved(tmp_path: Path) -> None:
    for suffix in SUFFIXES:
        images.save(Image.new("RGB", (8, 8)), tmp_path / f"a{suffix}", texts(with_prompt("an \ud800 owl")))
        assert read(tmp_path / f"a{suffix}").request["prompt"] == "an \ud800 owl"
        assert images.read_text(tmp_path / f"a{suffix}")["parameters"].startswith("an ? owl\nSteps: 20,")


COMFY_SAMPLERS = (  # its comfy/samplers.py
    "euler", "euler_cfg_pp", "euler_ancestral", "euler_ancestral_cfg_pp", "heun", "heunpp2", "dpm_2",
    "dpm_2_ancestral", "lms", "dpm_fast", "dpm_adaptive", "dpmpp_2s_ancestral", "dpmpp_2s_ancestral_cfg_pp",
    "dpmpp_sde", "dpmpp_sde_gpu", "dpmpp_2m", "dpmpp_2m_cfg_pp", "dpmpp_2m_sde", "dpmpp_2m_sde_gpu",
    "dpmpp_2m_sde_heun", "dpmpp_2m_sde_heun_gpu", "dpmpp_3m_sde", "dpmpp_3m_sde_gpu", "ddpm", "lcm", "ipndm",
    "ipndm_v", "deis", "res_multistep", "er_sde", "seeds_2", "seeds_3", "sa_solver", "ddim", "uni_pc", "uni_pc_bh2",
)  # fmt: skip
COMFY_SCHEDULES = (
    "normal", "karras", "exponential", "sgm_uniform", "simple", "ddim_uniform", "beta", "linear_quadratic",
    "kl_optimal",
)  # fmt: skip
SD1 = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def test_samplers_are_the_schedulers() -> None:
    """The tables that need no torch have a row for each scheduler and each grid, and say of it what is so."""
    assert SAMPLERS.keys() == SCHEDULERS.keys()
    assert {row.name: row.label or row.name for row in GRIDS.values()} == names.GRIDS
    assert names.SPACINGS == SPACINGS
    for name, row in SAMPLERS.items():
        scheduler, there = SCHEDULERS[name], from_config(SD1, name, a1111=True)
        assert row.a1111 == (scheduler.label or name)
        assert (row.eta, row.noise) == ("eta" in scheduler.options, bool(scheduler.noise))
        assert (row.exact, name in TIMED) == (not there.note, there.family == "compvis")
        assert row.comfy in ("", *COMFY_SAMPLERS) and row.comfy != "ddim"
    there = [row.comfy for row in SAMPLERS.values() if row.comfy]
    assert len(set(there)) == len(there)


@pytest.mark.parametrize("name", SAMPLERS)
def test_names_come_back(name: str) -> None:
    """Of each scheduler with each grid, from our text of A1111's form, from A1111's own, from ComfyUI's graph."""
    row, plain = SAMPLERS[name], {"prompt": "x", "negative_prompt": "", "seed": 1, "num_inference_steps": 2}
    for grid in (None, *GRIDS):
        for profile in (None, "a1111"):
            if (name in TIMED and grid) or (profile and not grid and row.exact):  # such are not drawn
                continue
            said = plain | {"scheduler": name, "noise_source": "gpu"}
            said |= {key: value for key, value in (("schedule_type", grid), ("profile", profile)) if value}
            found = request_fields(write(said, {"Version": "ldm 1"}))[0]
            lost = {"schedule_type"} if (grid, profile) == ("uniform", None) else set()  # as no grid is written so too
            assert found == {key: value for key, value in said.items() if key not in lost}
        label = GRIDS[grid].label if grid else "Automatic"
        if label and row.a1111 == SCHEDULERS[name].label:
            found, notes = request_fields(f"x\nSteps: 2, Sampler: {row.a1111}, Schedule type: {label}, Seed: 1")
            heeded = {"schedule_type": grid} if grid and row.exact and name not in TIMED else {}
            assert found == plain | {"scheduler": name, "profile": "a1111", "noise_source": "gpu"} | heeded
            assert len(notes) == (not row.exact)
    for schedule in COMFY_SCHEDULES if row.comfy else ():
        found, notes = comfy_fields(graph_of(row.comfy, schedule))
        assert (found["scheduler"], found["profile"], found["noise_source"]) == (name, "a1111", "cpu")
        assert found.get("schedule_type") == (schedule if schedule in GRIDS and name != "lcm" else None)
        assert any("linear_quadratic" in note for note in notes) == (schedule == "linear_quadratic")


def graph_of(sampler: str, schedule: str, words: str = "a glass bottle") -> str:
    graph = json.loads(json.dumps(COMFY))
    graph["3"]["inputs"] |= {"sampler_name": sampler, "scheduler": schedule}
    graph["12"]["inputs"]["value"] = words
    return json.dumps(graph)


@pytest.mark.parametrize(
    ("sampler", "scheduler", "grid", "note"),
    [
        ("DPM++ 2M Karras", "dpm++2m", "karras", None),
        ("DPM++ 2M SDE Heun Exponential", "dpm++2m_sde_heun", "exponential", None),
        ("DPM++ 2M, Schedule type: Automatic", "dpm++2m", None, None),
        ("DPM++ 2M, Schedule type: karras", "dpm++2m", "karras", None),  # of 1.6 to 1.8
        ("DPM++ 2M", "dpm++2m", "uniform", None),  # before 1.9
        ("Euler a, Schedule type: Automatic", "euler_a", None, None),
        ("DDIM, Schedule type: Karras", "ddim", None, None),  # which does not heed it
        ("dpmpp_2m_karras", "dpm++2m", "karras", None),  # of nodes of ComfyUI that write this text
        (
            "Euler, Schedule type: Turbo",
            "euler",
            None,
            "the schedule 'turbo' is not known here; the usual one of euler",
        ),
        ("UniPC, Schedule type: Karras", "unipc", None, "UniPC runs here as in diffusers"),
        ("DPM adaptive", None, None, "'DPM adaptive' is not known here"),
        ("DPM++ 2M SDE, Schedule type: Karras, Eta: 0.5", "dpm++2m_sde", "karras", "Eta 0.5 was left out"),
        ("Euler, Schedule type: Karras, Emphasis: No norm", "euler", "karras", "emphasis Original, not 'No norm'"),
        ("Euler, Schedule type: Karras, Schedule rho: 5", "euler", "karras", "not carried over: Schedule rho"),
        ("Euler, Schedule type: Karras, Pad conds: True", "euler", "karras", "not carried over: Pad conds"),
        ("Euler, Schedule type: Karras, Profile: x", "euler", "karras", "not carried over: Profile"),
    ],
)
def test_names_of_samplers_are_understood(
    sampler: str, scheduler: str | None, grid: str | None, note: str | None
) -> None:
    found, notes = request_fields(f"an owl\nSteps: 20, Sampler: {sampler}, Seed: 1, RNG: CPU")
    assert (found.get("scheduler"), found.get("schedule_type"), "eta" in found) == (scheduler, grid, False)
    assert len(notes) == (note is not None) and all(note in text for text in notes if note)


@pytest.mark.parametrize(
    ("keys", "fields"),
    [
        ("", {"noise_source": "gpu"}),
        ("RNG: GPU", {"noise_source": "gpu"}),
        ("RNG: NV", {"noise_source": "gpu"}),
        ("RNG: CPU", {"noise_source": "cpu"}),
        ("Version: ComfyUI", {"noise_source": "cpu"}),
        ("ENSD: 31337, Eta: 0.4", {"eta_noise_seed_delta": 31337, "eta": 0.4}),
        ("Clip skip: 2", {"clip_skip": 2}),
        ("Emphasis: None", {"literal": True}),
        ("Emphasis: Original", {}),
        ("RNG: CPU, Version: ldm 1", {"profile": None, "noise_source": "cpu"}),
        ("RNG: NV, Profile: a1111, Version: ldm 1", {"profile": "a1111", "noise_source": "gpu"}),
        ("Clip skip: 2, Emphasis: None, RNG: CPU, Profile: diffusers, Version: ldm 1",
         {"profile": "diffusers", "noise_source": "cpu", "clip_skip": 1}),
    ],
)  # fmt: skip
def test_what_decides_a_picture_of_a1111(keys: str, fields: dict[str, Any]) -> None:
    text = ", ".join(filter(None, ["an (owl)\nSteps: 20, Sampler: Euler a, Schedule type: Karras, Seed: 1", keys]))
    plain = {
        "prompt": "an (owl)", "negative_prompt": "", "num_inference_steps": 20, "seed": 1, "scheduler": "euler_a",
        "schedule_type": "karras", "profile": "a1111", "noise_source": "gpu",
    }  # fmt: skip
    found, notes = request_fields(text)
    assert found == {name: value for name, value in (plain | fields).items() if value is not None}
    assert len(notes) == ("ldm" in keys)


def test_a_picture_of_a1111(tmp_path: Path) -> None:
    assert parse(A1111) == as_a1111_reads(A1111)
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", A1111)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=chunks)
    found = read(tmp_path / "a.png")
    assert found.source == "a1111"
    assert found.request == {
        "prompt": "masterpiece, (owl:1.2), <lora:style:0.8>\non a branch",
        "negative_prompt": "lowres, bad anatomy\nblurry",
        "num_inference_steps": 28, "guidance_scale": 6.5, "seed": 3141592653, "width": 512, "height": 768,
        "scheduler": "dpm++2m", "schedule_type": "karras", "clip_skip": 2, "variation_seed": 7,
        "variation_strength": 0.25, "profile": "a1111", "noise_source": "gpu",
    }  # fmt: skip
    assert found.notes == (
        "it was made with the model 'v1-5-pruned-emaonly', hash '6ce0161689'",
        "A1111 turns the noise of variations column by column, here it is turned as a whole",
        "not carried over: Denoising strength, Hires upscale, Hires steps, Hires upscaler",
        "it was made with the adapters style (hash 0123456789ab), other (hash ba9876543210); give their files with "
        "--lora or their --lora-dir",
    )


def test_values_out_of_range_are_noted_and_left_out() -> None:
    line = "Steps: 9999, Sampler: Euler, CFG scale: high, Seed: -1, Size: 64x99999, Clip skip: 1, ENSD: -3, RNG: CPU"
    found, notes = request_fields(f"x\n{line}")
    assert found == {
        "prompt": "x", "negative_prompt": "", "scheduler": "euler", "schedule_type": "uniform", "width": 64,
        "clip_skip": 1, "profile": "a1111", "noise_source": "cpu",
    }  # fmt: skip
    assert [re.match(r"\w+( scale)?", note)[0] for note in notes] == [  # type: ignore[index]
        "CFG scale", "num_inference_steps", "seed", "height", "eta_noise_seed_delta"
    ]  # fmt: skip
    assert parse("Steps: 1, Seed: 2") == {"Prompt": "Steps: 1, Seed: 2", "Negative prompt": ""}  # two are too few


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_a_picture_of_comfyui(tmp_path: Path, suffix: str) -> None:
    path, picture = tmp_path / f"a{suffix}", Image.new("RGB", (8, 8))
    if suffix == ".png":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text("prompt", json.dumps(COMFY))
        chunks.add_text("workflow", "{}")
        picture.save(path, pnginfo=chunks)
    else:
        exif = Image.Exif()
        exif[0x0110], exif[0x010F] = f"prompt:{json.dumps(COMFY)}", "workflow:{}"
        picture.save(path, exif=exif)
    assert images.read_text(path).keys() == {"prompt", "workflow"}
    found = read(path)
    assert (found.source, found.recipe) == ("comfyui", None)
    assert found.request == {
        "prompt": "a glass bottle", "negative_prompt": "text, watermark", "num_inference_steps": 20,
        "guidance_scale": 8.0, "seed": 156680208700286, "width": 512, "height": 384, "scheduler": "dpm++2m",
        "schedule_type": "karras", "clip_skip": 2, "profile": "a1111", "noise_source": "cpu",
    }  # fmt: skip
    assert found.notes == (
        "ComfyUI begins with a trace more noise and rounds timesteps, so the picture is a little different here",
        "it was made with the model 'v1-5.safetensors'",
        "not carried over: LoraLoader",
    )


@pytest.mark.parametrize(
    ("sampler", "schedule", "words", "fields", "said"),
    [
        ("ddim", "ddim_uniform", "a", {"scheduler": "euler", "schedule_type": "ddim_uniform"}, ()),
        ("euler_ancestral", "normal", "a", {"scheduler": "euler_a"}, ("fresh noise of euler_ancestral",)),
        ("dpmpp_2m_sde", "karras", "a", {"scheduler": "dpm++2m_sde"}, ()),
        ("dpmpp_2m_sde_gpu", "karras", "a", {"scheduler": "dpm++2m_sde"}, ("fresh noise of dpmpp_2m_sde_gpu",)),
        ("dpmpp_3m_sde", "karras", "a", {"scheduler": "dpm++3m_sde"}, ("levels of dpmpp_3m_sde with karras",)),
        ("euler", "beta", "a", {"schedule_type": "beta"}, ("levels of euler with beta",)),
        ("uni_pc", "normal", "a", {"scheduler": "unipc_bh1"}, ("uni_pc runs here as in diffusers",)),
        ("lcm", "sgm_uniform", "a", {"scheduler": "lcm", "schedule_type": None}, ("lcm runs here", "fresh noise")),
        ("euler", "normal", "an (owl:1.2)", {"literal": None}, ("weighs words in brackets otherwise",)),
        ("euler", "normal", "an [owl|cat]", {"literal": True}, ()),
        ("euler", "normal", "an owl AND a cat", {"literal": True}, ()),
        ("euler", "normal", r"an \(owl\)", {"literal": None, "prompt": r"an \(owl\)"}, ()),
    ],
)
def test_what_is_otherwise_in_comfyui(
    sampler: str, schedule: str, words: str, fields: dict[str, Any], said: tuple[str, ...]
) -> None:
    found, notes = comfy_fields(graph_of(sampler, schedule, words))
    assert {name: found.get(name) for name in fields} == fields
    noted = [note for note in notes if "a trace more" not in note and "made with" not in note and "Lora" not in note]
    assert len(noted) == len(said) and all(any(part in note for note in noted) for part in said), noted


def test_graphs_of_comfyui_of_other_shapes() -> None:
    graph = json.loads(json.dumps(COMFY))
    second = {"class_type": "KSamplerAdvanced", "inputs": graph["3"]["inputs"] | {"latent_image": ["20", 0]}}
    upscale = {"class_type": "LatentUpscale", "inputs": {"samples": ["3", 0], "width": 9, "height": 9}}
    found, notes = comfy_fields(json.dumps({"2": second, "20": upscale} | graph))
    assert found["width"] == 512 and notes[0].startswith("the graph has 2 samplers")
    advanced = graph["3"]["inputs"] | {"noise_seed": 2**64 - 1, "add_noise": "disable", "negative": ["30", 0]}
    del advanced["seed"]
    graph["3"] = {"class_type": "KSamplerAdvanced", "inputs": advanced}
    graph["5"]["inputs"]["batch_size"] = 4
    graph["30"] = {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["6", 0]}}
    found, notes = comfy_fields(json.dumps(graph))
    assert "seed" not in found and found["negative_prompt"] == ""
    for part in ("it is one of a batch", "its latents did not begin", "seed is 18446744073709551615"):
        assert any(part in note for note in notes), part
    graph["6"]["inputs"]["text"] = ["6", 0]  # in a circle
    graph["5"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["5", 0], "vae": ["4", 2]}}
    found, notes = comfy_fields(json.dumps(graph))
    assert not {"prompt", "width"} & found.keys() and "it was made from another picture" in notes[0]
    with pytest.raises(ModelError, match="no KSampler"):
        comfy_fields(json.dumps({"1": {"inputs": {}}, "2": None}))


def test_the_json_form_is_complete_and_private() -> None:
    home = {
        "_name_or_path": "/home/ann/models/x",
        "lambda_min_clipped": -float("inf"),
        "deep": [{"_name_or_path": "/x"}],
    }
    recipe = replace(RECIPE, model="/home/ann/models/my\x1bmodel/", scheduler=RECIPE.scheduler | home)
    carried = texts(recipe)
    assert not any("ann" in text or "/" in text for text in carried.values())
    form = json.loads(carried["ldm"], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert form.keys() == {"version", *(field.name for field in fields(Recipe))}
    assert form["request"].keys() == {f.name for f in fields(Request)} - {"output_type", "num_images_per_prompt"}
    assert (form["model"], form["scheduler"]["lambda_min_clipped"]) == ("my?model", "-inf")
    assert from_json(carried["ldm"]) == recipe
    adapted = replace(RECIPE, adapters=({"name": "style", "scale": 0.5},))
    assert from_json(texts(adapted)["ldm"]) == adapted != RECIPE


VERSION_1: dict[str, Any] = {
    "version": 1, "model": "m", "components": {"unet": "0" * 64}, "scheduler": {}, "threads": 1, "device": "cpu",
    "dtype": "fp32", "versions": {}, "adapters": [],
    "request": {
        "prompt": "an (owl)", "negative_prompt": "", "seed": 1, "num_inference_steps": 4, "guidance_scale": 5.0,
        "height": 32, "width": 32, "scheduler": "ddim",
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ({}, {}),
        ({"clip_skip": 1, "eta": 0.5}, {"clip_skip": 1, "eta": 0.5}),
        ({"clip_skip": 0}, {"clip_skip": 0}),
        ({"scheduler": "dpm++2m"}, {"scheduler": "dpm++2m"}),
        ({"scheduler": "dpm++2m_karras"}, {"scheduler": "dpm++2m", "schedule_type": "karras"}),
    ],
)
def test_recipes_of_version_1_stay_readable(then: dict[str, Any], now: dict[str, Any]) -> None:
    """A form as version 1 writes it, with only what a request must say. It drew as diffusers does: prompts as they
    stand, the CPU's noise, and clip_skip counted from 0, for the prompt alone.
    """
    recipe = from_json(json.dumps(VERSION_1 | {"request": VERSION_1["request"] | then}))
    drawn = {"profile": "diffusers", "noise_source": "cpu"}
    assert recipe.request == fields_of(Request(**VERSION_1["request"] | drawn | now))
    assert from_json(texts(recipe)["ldm"]) == recipe


def test_lists_of_levels_are_kept() -> None:
    for name, values in (("timesteps", (999.0, 500.5, 1)), ("sigmas", (14.6, 0.03))):
        recipe = replace(RECIPE, request=RECIPE.request | {name: values})
        assert from_json(texts(recipe)["ldm"]) == recipe
        assert differences(recipe, RECIPE) == [f"{name} a JSON list, was a JSON list"]


ABSENT = object()
FAULTS: list[tuple[str, Any, str]] = [
    ("version", 4, "version 4 and only 1 to 3 .* update ldm"),
    ("version", 0, "version 0"),
    ("version", True, "version True"),
    ("version", ABSENT, "version None"),
    ("device", ABSENT, "has no device"),
    ("extra", 1, "unknown field 'extra'"),
    ("\x1b[31m", 1, r"unknown field '\\x1b\[31m'"),
    ("model", "a\x1b[2Jb", r"model of the recipe is 'a\\x1b\[2Jb'; it must be a name"),
    ("model", "a" * 10_000, "a{59}...; it must be a name"),
    ("threads", True, "threads of the recipe is True"),
    ("threads", 2.0, "threads of the recipe is 2.0"),
    ("components", {"unet": "6" * 63}, "SHA-256"),
    ("components", {"vae": "6" * 64}, "SHA-256"),
    ("versions", {"torch": 2}, "versions of the recipe is a JSON dict"),
    ("adapters", {}, "a list of adapters"),
    ("scheduler", {"a": [[[[[[[[[1]]]]]]]]]}, "nested more than 8 deep"),
    ("request", [], "request of the recipe is a JSON list"),
    ("request.seed", ABSENT, "request has no seed"),
    ("request.height", None, "height is not one value"),
    ("request.seed", [1, 2], "not of one picture"),
    ("request.prompt", ["a", "b"], "not of one picture"),
    ("request.sigmas", {"a": 1}, "sigmas are"),
    ("request.timesteps", ["1"], "timesteps are"),
    ("request.clip_skip", 0, "clip_skip is 0"),
    ("request.profile", "a1112", "unknown profile 'a1112'"),
    ("request.sede", 1, "unknown field 'sede'"),
    ("request.output_type", "pil", "unknown field 'output_type'"),
    ("request.num_inference_steps", 10**9, "num_inference_steps is 1000000000"),
    ("request.guidance_scale", "7", "guidance_scale is '7'"),
    ("request.prompt", " ", "prompt is ' '"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "said"), FAULTS)
def test_another_form_is_refused_by_name(tmp_path: Path, name: str, value: Any, said: str) -> None:
    form = json.loads(texts(RECIPE)["ldm"])
    *outer, key = name.split(".")
    table = form[outer[0]] if outer else form
    table[key] = value
    if value is ABSENT:
        del table[key]
    images.save(Image.new("RGB", (8, 8)), tmp_path / "a.png", texts(RECIPE) | {"ldm": json.dumps(form)})
    with pytest.raises(ModelError, match=said) as caught:
        read(tmp_path / "a.png")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'a.png'}: ") and message.isprintable() and len(message) < 500


OWN, GRAPH = texts(RECIPE)["ldm"], json.dumps(COMFY)
ABSURD = {
    "deep": "[" * 100_000,
    "deep table": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "50 MB": json.dumps({"a": "x" * 50_000_000}),
    "long number": OWN.replace(": 42", f": {'9' * 5000}"),
    "long fraction": OWN.replace("0.012", f"{'9' * 900_000}.5"),
    "cut": OWN[:-5],
    "list": f"[{OWN}]",
    "nothing": "",
}


@pytest.mark.parametrize("name", [*ABSURD, "NaN", "infinite"])
def test_absurd_json_is_one_sentence(name: str) -> None:
    numbers = {"NaN": OWN.replace("0.012", "NaN"), "infinite": OWN.replace("0.012", "-1e999")}
    for reader in (from_json, comfy_fields):
        text = (ABSURD | numbers)[name]
        begun = time.process_time()
        with pytest.raises(ModelError) as caught:
            reader(text)
        assert time.process_time() - begun < 1
        assert str(caught.value).isprintable() and len(str(caught.value)) < 200


def test_long_texts_take_time_in_proportion() -> None:
    """The pattern of A1111 itself takes minutes for these."""
    for part in ("a ", "a-b: ", 'ab:"\\",', "<lora:", "Negative prompt:\n", "ab: \\", "   ", "一"):
        begun = time.process_time()
        request_fields(part * (300_000 // len(part)))
        assert time.process_time() - begun < 1


def test_pictures_without_a_recipe_are_told_so(tmp_path: Path) -> None:
    images.save(Image.new("RGB", (8, 8)), tmp_path / "a.png")
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0On the beach: summer, sun"
    exif[0x0110] = "Camera 7"
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=exif)
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("ldm", "x" * 50_000_000)
    Image.new("RGB", (8, 8)).save(tmp_path / "large.png", pnginfo=chunks)
    for name in ("a.png", "a.jpg", "large.png"):
        with pytest.raises(LdmError, match=r"carries no recipe.* of A1111 .* of ComfyUI") as caught:
            read(tmp_path / name)
        assert not isinstance(caught.value, ModelError)
    with pytest.raises(ModelError, match=r"absent\.png"):
        read(tmp_path / "absent.png")


def test_differences_name_what_differs() -> None:
    assert differences(RECIPE, RECIPE) == []
    now = replace(
        RECIPE,
        request=RECIPE.request | {"prompt": "an owl \x1b[31m", "guidance_scale": 5.5},
        components={k: v for k, v in RECIPE.components.items() if k != "tokenizer"} | {"unet": "1a2b3c4d5e" + "0" * 54},
        scheduler={"_class_name": "DDIMScheduler", "beta_end": 0.02, "trained_betas": None},
        threads=1, dtype="bf16", versions=RECIPE.versions | {"torch": "2.14.0"}, adapters=({"name": "style"},),
    )  # fmt: skip
    assert differences(now, RECIPE) == [
        "the unet is another (1a2b3c4d5e, was 6666666666)",
        "the tokenizer is another (none, was cccccccccc)",
        r"prompt 'an owl \x1b[31m', was 'an owl'",
        "guidance_scale 5.5, was 7.0",
        "beta_end of the scheduler 0.02, was 0.012",
        "dtype bf16, was fp32",
        "1 thread, was 2",
        "torch 2.14.0, was 2.13.0",
        "the adapters are others ('style'; were none)",
    ]


def test_reading_texts_needs_no_torch() -> None:
    code = "import sys, ldm.recipe, ldm.infotext; sys.exit('torch' in sys.modules or 'PIL' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1], timeout=60)


NASTY = [
    "\x1b[31m", "\0", "\ud800", '"', "\\", "\n", ", ", ": ", "x", "1" * 30, "-1", "NaN", "1e999", "{", "]", "null",
    "true", "Steps: 1, Seed: 2, Size: 1x1", "Negative prompt:", "\u202e", "🦉", "\uff19", "[]", '["3", 0]', "KSampler",
    "a" * 5000,
]  # fmt: skip
VALUES: list[Any] = [None, True, -1, 0, 2**64, 1e308, "", "\x1b]0;x\7", [], ["3", 0], ["4"], {}, {"a": {}}, "x" * 5000]


def mutated_text(rng: random.Random, text: str) -> str:
    for _ in range(rng.randint(1, 4)):
        i, n = rng.randrange(len(text) + 1), rng.choice((0, 0, 1, 3, 40))
        text = text[:i] + rng.choice((*NASTY, text[i : i + n] * 3, "")) + text[i + n :]
    return text


def mutated_json(rng: random.Random, value: Any) -> str:
    value = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, 3)):
        at = value
        while isinstance(at, dict | list) and at:
            key = rng.choice(list(at)) if isinstance(at, dict) else rng.randrange(len(at))
            if rng.random() < 0.4 or not isinstance(at[key], dict | list):
                at[key] = json.loads(json.dumps(rng.choice(VALUES)))
                break
            at = at[key]
    return json.dumps(value)


def hostile_texts(rng: random.Random) -> dict[Any, list[str]]:
    forms = {from_json: OWN, comfy_fields: GRAPH, request_fields: A1111}
    cases = {reader: [mutated_text(rng, text) for _ in range(2000)] for reader, text in forms.items()}
    for reader in (from_json, comfy_fields):
        cases[reader] += [mutated_json(rng, json.loads(forms[reader])) for _ in range(1500)]
    return cases


def refused(action: Any) -> bool:
    """Whether it was refused, in a sentence that may be printed. What it gives otherwise is a valid request."""
    try:
        found = action()
    except LdmError as error:
        assert str(error).isprintable() and len(str(error)) < 600, error
        return True
    if isinstance(found, Recipe):
        assert from_json(texts(found)["ldm"]) == found
        assert all(said.isprintable() and len(said) < 500 for said in differences(found, RECIPE))
    given, notes = found if isinstance(found, tuple) else (found.request, getattr(found, "notes", ()))
    assert isinstance(Request(**given), Request)
    assert all(note.isprintable() and len(note) < 800 for note in notes), notes
    return False


def test_hostile_texts_give_clear_errors_or_valid_requests() -> None:
    cases = hostile_texts(random.Random(0))
    assert sum(map(len, cases.values())) == 9000
    outcomes = {reader.__name__: [refused(lambda: reader(text)) for text in found] for reader, found in cases.items()}  # noqa: B023
    assert not any(outcomes["request_fields"])  # any text can be read
    assert all(0.05 < sum(said) / len(said) < 0.99 for name, said in outcomes.items() if name != "request_fields")


def test_damaged_files_give_clear_errors_or_valid_requests(tmp_path: Path) -> None:
    rng, outcomes = random.Random(0), list[bool]()
    picture = Image.new("RGB", (8, 8), "red")
    for suffix in SUFFIXES:
        images.save(picture, tmp_path / f"a{suffix}", texts(RECIPE))
        whole = (tmp_path / f"a{suffix}").read_bytes()
        for _ in range(250):
            data = bytearray(whole)
            for _ in range(rng.randint(1, 6)):
                i = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(200, len(data)))
                data[i : i + rng.choice((0, 1, 1, 4))] = rng.randbytes(rng.choice((0, 1, 1, 4)))
            path = tmp_path / f"damaged-{len(outcomes)}"  # to write over one file would wait for the disk
            path.write_bytes(data[: rng.choice((len(data), len(data), rng.randrange(len(data))))])
            outcomes.append(refused(lambda: read(path)))  # noqa: B023  # called at once
    assert len(outcomes) == 1000 and 50 < sum(outcomes) < 990
