"""What a recipe says of the pictures it was given, what A1111 and ComfyUI say of theirs, and files of noise."""

import dataclasses
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm import images
from ldm.cli.opening import Recorded, recorded, with_files
from ldm.errors import LdmError, ModelError, UsageError
from ldm.infotext import comfy_fields, parse, request_fields, write
from ldm.inputs import source_of
from ldm.noise_files import GivenNoise, read_noise, write_noise
from ldm.recipe import Recipe, differences, fields_of, from_json, inputs_of, read, texts
from ldm.request import Request

PLAIN = {
    "prompt": "an owl", "negative_prompt": "", "seed": 42, "num_inference_steps": 20, "guidance_scale": 7.0,
    "height": 48, "width": 64, "scheduler": "ddim",
}  # fmt: skip
PHOTO = Image.linear_gradient("L").resize((64, 48)).convert("RGB")
MASK = Image.new("L", (64, 48), 255)


def recipe_with(request: Request) -> Recipe:
    """The recipe of a resolved request, as `ldm.recipe.recipe_of` makes it."""
    return Recipe(
        request=fields_of(request), model="m", components={"unet": "6" * 64}, scheduler={}, device="cpu", dtype="fp32",
        threads=1, versions={"ldm": "0.1.0"}, inputs=inputs_of(request),
    )  # fmt: skip


def edited(folder: Path, **fields: Any) -> Recipe:
    PHOTO.save(folder / "photo.png")
    MASK.save(folder / "mask.png")
    given = {"image": source_of(folder / "photo.png"), "mask_image": source_of(folder / "mask.png"), "strength": 0.75}
    return recipe_with(Request(**PLAIN | given | fields))


# -- the JSON form ----------------------------------------------------------------------------------------------------


def test_names_and_digests_of_what_was_given_are_kept(tmp_path: Path) -> None:
    """The file's name without the folder; the digest of its pixels, by hand."""
    recipe = edited(tmp_path, noise=GivenNoise("", torch.zeros(1, 4, 6, 8), "f" * 64))
    assert [recipe.request[name] for name in ("image", "mask_image", "noise")] == ["photo.png", "mask.png", "noise"]
    pixels = hashlib.sha256(b"RGB 64 x 48\n" + PHOTO.tobytes()).hexdigest()
    assert recipe.inputs["image"] == pixels and recipe.inputs.keys() == {"image", "mask_image", "noise"}
    form = texts(recipe)["ldm"]
    assert from_json(form) == recipe and json.loads(form)["version"] == 3
    assert str(tmp_path) not in form
    memory = recipe_with(Request(**PLAIN, image=source_of(PHOTO), mask_image="box:0,0,50%,9+alpha"))
    assert (memory.request["image"], memory.request["mask_image"]) == ("picture", "box:0,0,50%,9+alpha")
    assert memory.inputs == {"image": pixels} and from_json(texts(memory)["ldm"]) == memory
    corners = f"polygon:{','.join(['1.25'] * 200)}"  # a shape may be longer than a name
    long = replace(memory, request=memory.request | {"mask_image": corners})
    assert from_json(texts(long)["ldm"]) == long


@pytest.mark.parametrize("name", ["a\nb.png", "a\x1b[31m.png", "x" * 251 + ".png", "a\\b.png", "\udcff.png"])
def test_files_of_odd_names_make_recipes_that_are_read(name: str) -> None:
    source = source_of(PHOTO)._replace(name=name)
    recipe = recipe_with(Request(**PLAIN, image=source))
    assert from_json(texts(recipe)["ldm"]) == recipe
    assert recipe.request["image"].isprintable() and "\\" not in recipe.request["image"]


@pytest.mark.parametrize("version", [1, 2])
def test_older_recipes_are_read_as_before(version: int) -> None:
    form = json.loads(texts(recipe_with(Request(**PLAIN)))["ldm"]) | {"version": version}
    later = ("image", "mask_image", "noise", "strength", "seamless", "extend", "resample")
    form["request"] = {name: value for name, value in form["request"].items() if name not in later}
    with pytest.raises(ModelError, match="unknown field 'inputs'"):
        from_json(json.dumps(form))
    del form["inputs"]
    assert from_json(json.dumps(form)).inputs == {}
    form["request"]["image"] = "photo.png"
    with pytest.raises(ModelError, match=r"image of the recipe's request is 'photo\.png'"):
        from_json(json.dumps(form))


FAULTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "another folder": ({"image": "../photo.png"}, {}, "image of the recipe's request is '../photo.png'; .* without a"),
    "from the root": ({"image": "/etc/passwd"}, {}, "'/etc/passwd'"),
    "of Windows": ({"image": "C:\\photo.png"}, {}, "the name of a file"),
    "a folder": ({"image": ".."}, {}, "'..'"),
    "no name": ({"image": ""}, {}, "''"),
    "several": ({"image": ["a.png"]}, {}, "image of the recipe's request is a JSON list"),
    "a number": ({"image": 3}, {}, "is 3"),
    "no digest": ({"noise": "n.safetensors"}, {}, "noise of the recipe's request is 'n.safetensors'; .* inputs"),
    "a mask without one": ({"mask_image": "m.png"}, {"mask_image": None}, "mask_image of the recipe's request"),
    "a mask elsewhere": ({"mask_image": "/m.png"}, {}, "mask_image of the recipe's request is '/m.png'"),
    "no picture": ({"image": None}, {}, "image of the recipe's request is None"),
    "no digest at all": ({}, {"image": "1" * 63}, "inputs of the recipe is a JSON dict; it must be the SHA-256"),
    "another field": ({}, {"prompt": "1" * 64}, "inputs of the recipe is a JSON dict"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_recipe_names_no_file_but_beside_it(tmp_path: Path, name: str) -> None:
    fields, digests, said = FAULTS[name]
    form = json.loads(texts(edited(tmp_path))["ldm"])
    form["request"] |= fields
    form["inputs"] = {n: digest for n, digest in (form["inputs"] | digests).items() if digest}
    images.save(Image.new("RGB", (8, 8)), tmp_path / "a.png", {"ldm": json.dumps(form)})
    with pytest.raises(ModelError, match=said):
        read(tmp_path / "a.png")


def test_differences_tell_of_other_inputs(tmp_path: Path) -> None:
    then = edited(tmp_path)
    now = replace(then, inputs={"image": "1" * 64})
    was, mask = (then.inputs[name][:10] for name in ("image", "mask_image"))
    assert differences(now, then) == [
        f"the image is another (1111111111, was {was})", f"the mask_image is another (none, was {mask})"
    ]  # fmt: skip
    assert differences(then, then) == []


# -- looking for what is named ----------------------------------------------------------------------------------------


def test_what_is_named_is_looked_for_beside_the_picture_and_here(tmp_path: Path, monkeypatch) -> None:
    """Taken is what holds the same pixels, whatever file they are in; a file of that name alone is not."""
    beside, here = tmp_path / "beside", tmp_path / "here"
    beside.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    recipe = edited(beside)
    order = Request(**recorded(recipe))
    assert order.image == Recorded("photo.png", recipe.inputs["image"])
    assert inputs_of(with_files(order, beside)) == recipe.inputs
    (beside / "photo.png").rename(here / "photo.png")
    assert inputs_of(with_files(order, beside)) == recipe.inputs
    PHOTO.save(beside / "photo.png", compress_level=0)  # another file of the same pixels
    (here / "photo.png").write_bytes(b"no picture")
    assert inputs_of(with_files(order, beside)) == recipe.inputs
    PHOTO.rotate(180).save(beside / "photo.png")
    with pytest.raises(LdmError) as caught:
        with_files(order, beside)
    for part in ("the image 'photo.png'", recipe.inputs["image"][:10], "--image"):
        assert part in str(caught.value)
    given = replace(order, image="other.png")  # what is given stands, and is not looked at here
    assert with_files(given, beside).image == "other.png"
    (beside / "mask.png").unlink()
    with pytest.raises(LdmError, match=r"the mask 'mask\.png' .* name the file with --mask$"):
        with_files(given, beside)


# -- other tools' texts -----------------------------------------------------------------------------------------------


def test_parameters_have_a1111s_keys(tmp_path: Path) -> None:
    """In the order of its create_infotext: strength after the variation, what is of masks after RNG."""
    fields = edited(tmp_path, padding_mask_crop=32, clip_skip=2, noise_source="cpu").request
    assert write(fields, {"Version": "ldm 1"}) == (
        "an owl\nSteps: 20, Sampler: DDIM, CFG scale: 7, Seed: 42, Size: 64x48, Denoising strength: 0.75, "
        "Clip skip: 2, RNG: CPU, Inpaint area: Only masked, Masked area padding: 32, Version: ldm 1"
    )
    assert "Denoising" not in write(PLAIN, {}) and "Denoising" not in write(PLAIN | {"strength": 1.0}, {})
    assert "Denoising strength: 1, " in write(fields | {"strength": 1.0}, {})
    assert "Inpaint" not in write(fields | {"padding_mask_crop": None}, {})
    assert "Masked area padding: 0" in write(fields | {"padding_mask_crop": 0}, {})


HIRES = "Denoising strength: 0.4, Hires upscale: 2, Hires upscaler: Latent"


@pytest.mark.parametrize(
    ("keys", "notes"),
    [
        ("Denoising strength: 0.75", ["it was made from another picture, which is not in it; give it with --image and "
                                      "--strength 0.75"]),
        ("Denoising strength: 0.5, Mask blur: 4, Inpaint area: Only masked, Masked area padding: 32",
         ["it was made from another picture, which is not in it; give it with --image and --strength 0.5 and "
          "--only-masked 32", "not carried over: Mask blur"]),
        ("Denoising strength: much", ["it was made from another picture, which is not in it; give it with --image"]),
        (HIRES, ["not carried over: Denoising strength, Hires upscale, Hires upscaler"]),
        ("Denoising strength: 0.4, Hires resize: 8x8, Hires steps: 3",
         ["not carried over: Denoising strength, Hires resize-1, Hires resize-2, Hires steps"]),
    ],
)  # fmt: skip
def test_a_picture_of_a1111_that_was_made_from_another(keys: str, notes: list[str]) -> None:
    found, said = request_fields(f"an owl\nSteps: 20, Sampler: Euler, Schedule type: Karras, Seed: 1, {keys}")
    assert said == notes and not {"strength", "padding_mask_crop", "image"} & found.keys()
    assert Request(**found).strength is None


def test_our_own_text_without_the_recipe(tmp_path: Path) -> None:
    carried = texts(edited(tmp_path))["parameters"]
    assert parse(carried)["Denoising strength"] == "0.75"
    found, notes = request_fields(carried)
    assert Request(**found).image is None and any("--image and --strength 0.75" in note for note in notes)


@pytest.mark.parametrize(
    ("denoise", "note"),
    [
        (0.6, "it was made from another picture, which is not in it; give it with --image and --strength 0.6"),
        (1.0, "it was made from another picture, which is not in it; give it with --image"),
        (["4", 0], "it was made from another picture, which is not in it; give it with --image and --strength 0.3"),
    ],
)
def test_a_picture_of_comfyui_that_was_made_from_another(denoise: Any, note: str) -> None:
    sampler = {
        "seed": 1, "steps": 20, "cfg": 8.0, "sampler_name": "euler", "scheduler": "karras", "denoise": denoise,
        "positive": ["6", 0], "negative": ["6", 0], "latent_image": ["5", 0],
    }  # fmt: skip
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "photo.png"}},
        "3": {"class_type": "KSampler", "inputs": sampler},
        "4": {"class_type": "PrimitiveFloat", "inputs": {"value": 0.3}},
        "5": {"class_type": "VAEEncode", "inputs": {"pixels": ["1", 0], "vae": ["2", 0]}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "an owl"}},
    }
    found, notes = comfy_fields(json.dumps(graph))
    assert notes[0] == note and not any("did not begin" in text for text in notes)
    assert not {"strength", "image", "width"} & found.keys() and found["prompt"] == "an owl"


# -- files of noise ---------------------------------------------------------------------------------------------------


def test_noise_comes_back_from_its_file(tmp_path: Path) -> None:
    """Read by safetensors' own library, and by us from what that writes, in either shape."""
    noise, path = torch.randn(1, 4, 6, 8), tmp_path / "a.safetensors"
    write_noise(path, noise, {"prompt": "an owl", "steps": 4})
    assert torch.equal(load_file(path)["latents"], noise)
    found = read_noise(path)
    assert found.name == "a.safetensors" and torch.equal(found.latents, noise) and found.latents.dtype == torch.float32
    assert read_noise(found) is found
    save_file({"latents": noise[0]}, tmp_path / "b.safetensors")
    again = read_noise(str(tmp_path / "b.safetensors"))
    assert again.sha256 == found.sha256 and torch.equal(again.latents, noise)
    assert found.sha256 == hashlib.sha256(b"[1, 4, 6, 8]\n" + noise.numpy().tobytes()).hexdigest()
    write_noise(path, noise + 1, {})
    assert read_noise(path).sha256 != found.sha256
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


OTHERS: dict[str, dict[str, torch.Tensor]] = {
    "another name": {"noise": torch.zeros(1, 4, 2, 2)},
    "two tensors": {"latents": torch.zeros(1, 4, 2, 2), "more": torch.zeros(1)},
    "two pictures": {"latents": torch.zeros(2, 4, 2, 2)},
    "a matrix": {"latents": torch.zeros(4, 2)},
    "nothing in it": {"latents": torch.zeros(1, 4, 0, 2)},
    "half": {"latents": torch.zeros(1, 4, 2, 2, dtype=torch.float16)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_refused(tmp_path: Path, name: str) -> None:
    save_file(OTHERS[name], tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=r"a\.safetensors is no noise of one picture: it holds .*`ldm invert`"):
        read_noise(tmp_path / "a.safetensors")


def test_damaged_noise_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(ModelError, match=r"cannot read .*a\.safetensors"):
        read_noise(path)
    save_file({"latents": torch.full((1, 4, 2, 2), torch.nan)}, path)
    with pytest.raises(ModelError, match="not finite"):
        read_noise(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ModelError, match="truncated"):
        read_noise(path)
    with pytest.raises(UsageError, match="noise is SimpleNamespace; it must be the file"):
        read_noise(SimpleNamespace())  # type: ignore[arg-type]


def test_every_field_that_is_a_file_is_known() -> None:
    """A field of Request that takes any object is one that a recipe must not keep as it is."""
    from ldm.recipe import INPUTS

    assert [f.name for f in dataclasses.fields(Request) if "Any" in str(f.type)] == list(INPUTS)
