"""Stable Diffusion 1.5, 2.1-v and SDXL at their true sizes, with random weights in float16: written by diffusers as a
folder, and in the names of real files as a single file; the latents of a guided run are diffusers' own.

Each program runs in a process of its own, one after the other, for SDXL in float32 takes 14 GB.
"""

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ldm.text.tokenizer import CLIPTokenizer

PADS = {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}
FAMILIES = {"sd1": "PNDMScheduler", "sd2": "DDIMScheduler", "sdxl": "EulerDiscreteScheduler"}
REQUEST = {"num_inference_steps": 4, "guidance_scale": 5.0, "height": 256, "width": 256}
PROMPT, NEGATIVE, SEED = "a photo of a red owl, (oil painting:1.2)", "blurred", 7
NEAR = 1e-4  # of the largest value


def make(family: str, place: Path) -> None:
    """Write place/folder and place/single.safetensors."""
    import diffusers
    import transformers
    from safetensors.torch import save_file
    from singles import Model, single_state, theirs

    from ldm.checkpoints.families import FAMILIES as OURS

    torch.manual_seed(0)
    known = OURS[family]
    networks = {}
    for name, part in known.parts.items():
        networks[name] = theirs(part.config)
        with torch.no_grad():
            for parameter in networks[name].parameters():
                if parameter.ndim == 1:  # nothing is left at its neutral value
                    parameter.add_(0.02 * torch.randn_like(parameter))
        networks[name].half()
    tokenizers = {}
    for name in PADS if family == "sdxl" else ["tokenizer"]:
        CLIPTokenizer.standard("!" if family == "sd2" else PADS[name]).save(place / name)
        tokenizers[name] = transformers.CLIPTokenizer.from_pretrained(place / name)
    kind = "v_prediction" if family == "sd2" else "epsilon"
    config = {key: value for key, value in known.scheduler_config(4, kind).items() if not key.startswith("_")}
    scheduler = getattr(diffusers, FAMILIES[family]).from_config(config)
    if family == "sdxl":
        pipe = diffusers.StableDiffusionXLPipeline(**networks, **tokenizers, scheduler=scheduler, add_watermarker=False)
    else:
        pipe = diffusers.StableDiffusionPipeline(
            **networks, **tokenizers, scheduler=scheduler, safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip
    pipe.save_pretrained(place / "folder")
    state = single_state(family, Model(known, networks))
    metadata = {"modelspec.prediction_type": "v"} if family == "sd2" else {}
    save_file({key: value.half().contiguous() for key, value in state.items()}, place / "single.safetensors", metadata)


def reference(place: Path) -> None:
    """diffusers' latents."""
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(
        place / "folder", dtype=torch.float32, use_safetensors=True, add_watermarker=False
    )
    generator = torch.Generator().manual_seed(SEED)
    latents = pipe(PROMPT, negative_prompt=NEGATIVE, **REQUEST, generator=generator, output_type="latent").images
    torch.save(latents, place / "theirs.pt")


def ours(place: Path, name: str) -> None:
    """Our latents, from the folder or the single file, and the highest memory that opening took."""
    from ldm.pipeline import Pipeline

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    opened = Pipeline.from_pretrained(place / name, dtype="fp32", device="cpu")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    done = opened(PROMPT, negative_prompt=NEGATIVE, **REQUEST, seed=SEED, profile="diffusers", output_type="latent")
    weights = sum(p.nbytes for network in opened.components.networks.values() for p in network.parameters())
    (place / f"{name}.json").write_text(json.dumps({"peak": peak * 1024, "weights": weights}))
    torch.save(done.latents, place / f"{name}.pt")


def child(call: str) -> None:
    """Runs a function of this file in a process of its own."""
    script = f"from pathlib import Path; import test_true_sizes as t; t.{call}"
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request, tmp_path_factory) -> Iterator[tuple[str, Path]]:
    import shutil

    place = tmp_path_factory.mktemp(request.param)
    child(f"make({request.param!r}, Path({str(place)!r}))")
    child(f"reference(Path({str(place)!r}))")
    yield request.param, place
    shutil.rmtree(place)  # gigabytes


@pytest.mark.slow
@pytest.mark.parametrize("form", ["folder", "single.safetensors"])
def test_latents_are_those_of_diffusers(family, form):
    name, place = family
    child(f"ours(Path({str(place)!r}), {form!r})")
    expected, drawn = (torch.load(place / f"{which}.pt", weights_only=True) for which in ("theirs", form))
    assert expected.abs().max() > 0.5
    assert (drawn - expected).abs().max() <= NEAR * expected.abs().max()
    memory = json.loads((place / f"{form}.json").read_text())
    apart = (drawn - expected).abs().max() / expected.abs().max()
    peak, weights = (round(memory[name] / 2**20) for name in ("peak", "weights"))
    print(f"{name} {form}: {apart:.1e} apart; opening took {peak} MiB for {weights} MiB of weights")
