"""Stable Diffusion 1.5 for inpainting at its true size, 9 channels, with random weights in float16, written by
diffusers as a folder: what our pipeline draws in a picture is what diffusers' draws.

Each program runs in a process of its own, one after the other.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

PARAMETERS = 859_535_364  # of the published U-Net: the four channels' 859_520_964 and 5 * 9 * 320 more
REQUEST = {"num_inference_steps": 4, "strength": 0.75, "guidance_scale": 5.0}
PROMPT, NEGATIVE, SEED, SIDE = "a photo of a red owl", "blurred", 7, 256
NEAR = 1e-4  # of the largest value of the latents; of pictures in 0..1


def pictures() -> dict[str, Image.Image]:
    """A picture, and a mask that is not aligned to the latents."""
    coarse = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[37:201, 50:150] = 255
    image = Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return {"image": image, "mask_image": Image.fromarray(mask)}


def make(place: Path) -> None:
    """Write place/model."""
    import diffusers
    import transformers
    from singles import theirs

    from ldm.checkpoints.families import FAMILIES
    from ldm.text.tokenizer import CLIPTokenizer

    torch.manual_seed(0)
    family = FAMILIES["sd1"]
    configs = {name: part.config for name, part in family.parts.items()}
    networks = {}
    for name, config in (configs | {"unet": replace(configs["unet"], in_channels=9)}).items():
        networks[name] = theirs(config)
        with torch.no_grad():
            for parameter in networks[name].parameters():
                if parameter.ndim == 1:  # nothing is left at its neutral value
                    parameter.add_(0.02 * torch.randn_like(parameter))
        networks[name].half()
    CLIPTokenizer.standard("<|endoftext|>").save(place / "words")
    config = {key: value for key, value in family.scheduler_config(9, "epsilon").items() if not key.startswith("_")}
    diffusers.StableDiffusionInpaintPipeline(
        **networks, tokenizer=transformers.CLIPTokenizer.from_pretrained(place / "words"), safety_checker=None,
        scheduler=diffusers.DDIMScheduler.from_config(config), feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(place / "model")  # fmt: skip


def reference(place: Path) -> None:
    """diffusers' latents and picture."""
    import diffusers

    pipe = diffusers.StableDiffusionInpaintPipeline.from_pretrained(place / "model", dtype=torch.float32)
    last = []

    def keep(_, index, time, held):
        last[:] = [held["latents"]]
        return held

    images = pipe(
        PROMPT, negative_prompt=NEGATIVE, **pictures(), **REQUEST, height=SIDE, width=SIDE, output_type="pt",
        generator=torch.Generator().manual_seed(SEED), callback_on_step_end=keep,
    ).images  # fmt: skip
    torch.save((last[0], images), place / "theirs.pt")


def ours(place: Path) -> None:
    """Our latents and picture."""
    from ldm.pipeline import Pipeline

    opened = Pipeline.from_pretrained(place / "model", dtype="fp32", device="cpu")
    asked = {"seed": SEED, "scheduler": "ddim", "profile": "diffusers", "output_type": "pt", **REQUEST}
    done = opened(PROMPT, negative_prompt=NEGATIVE, **pictures(), **asked)
    (place / "ours.json").write_text(json.dumps(sum(parameter.numel() for parameter in opened.unet.parameters())))
    torch.save((done.latents, done.images), place / "ours.pt")


def child(call: str, place: Path) -> None:
    """Runs a function of this file in a process of its own."""
    script = f"from pathlib import Path; import test_editing_true_sizes as t; t.{call}(Path({str(place)!r}))"
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow  # last result: latents 3.1e-06 apart, pictures 5.0e-06; 3 minutes, 5 GB
def test_an_inpainted_picture_is_that_of_diffusers(tmp_path):
    for call in ("make", "reference", "ours"):
        child(call, tmp_path)
    shutil.rmtree(tmp_path / "model")  # gigabytes
    (latents, images), (expected, pictures) = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("ours", "theirs")
    )
    assert json.loads((tmp_path / "ours.json").read_text()) == PARAMETERS
    assert expected.abs().max() > 0.5 and pictures.std() > 0.01
    assert (latents - expected).abs().max() <= NEAR * expected.abs().max()
    assert (images - pictures).abs().max() <= NEAR
    apart = (latents - expected).abs().max() / expected.abs().max(), (images - pictures).abs().max()
    print("latents {:.1e} apart, pictures {:.1e}".format(*apart))
