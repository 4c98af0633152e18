"""Every family of Stable Diffusion, as diffusers writes its folders, at reduced width and true topology: the latents of
guided runs are those of diffusers' own pipelines.
"""

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from singles import CASES, model_of, narrow_families, single_state, write
from torch import Tensor

from ldm.checkpoints.families import FAMILIES
from ldm.checkpoints.folder import save_folder
from ldm.checkpoints.single_file import open_single_file
from ldm.errors import UsageError
from ldm.pipeline import Pipeline
from ldm.request import Request
from ldm.text.tokenizer import CLIPTokenizer

CAPTIONS = ["a photo of a red owl on a blue background", "two tacos above a green banana", "ugly blurred text"] * 3
PROMPTS, NEGATIVE = ["a red owl", "two tacos"], "ugly text"
CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
SIDE = 64
NEAR = 1e-4  # of the largest value
# What stock diffusers says of itself, nothing of ours.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),
]
UNETS: dict[str, dict[str, Any]] = {  # the true topologies, narrower
    "sd1": {"attention_head_dim": 4, "cross_attention_dim": 32, "sample_size": 8,
            "down_block_types": (CROSS, CROSS, CROSS, PLAIN), "block_out_channels": (32, 32, 64, 64)},
    "sd2": {"attention_head_dim": (2, 4, 8, 8), "cross_attention_dim": 32, "sample_size": 8,
            "use_linear_projection": True, "upcast_attention": True,
            "down_block_types": (CROSS, CROSS, CROSS, PLAIN), "block_out_channels": (32, 32, 64, 64)},
    "sdxl": {"attention_head_dim": (2, 4, 8), "cross_attention_dim": 80, "sample_size": 8,
             "use_linear_projection": True, "transformer_layers_per_block": (1, 2, 3),
             "down_block_types": (PLAIN, CROSS, CROSS), "block_out_channels": (32, 32, 64),
             "addition_embed_type": "text_time", "addition_time_embed_dim": 16,
             "projection_class_embeddings_input_dim": 40 + 6 * 16},
    "refiner": {"attention_head_dim": (2, 4, 8, 8), "cross_attention_dim": 48, "sample_size": 8,
                "use_linear_projection": True, "transformer_layers_per_block": (1, 2, 2, 1),
                "down_block_types": (PLAIN, CROSS, CROSS, PLAIN), "block_out_channels": (32, 32, 64, 64),
                "addition_embed_type": "text_time", "addition_time_embed_dim": 16,
                "projection_class_embeddings_input_dim": 40 + 5 * 16},
}  # fmt: skip
SHARED = {"layers_per_block": 2, "norm_num_groups": 16}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def unet(family: str) -> diffusers.UNet2DConditionModel:
    up = [block.replace("Down", "Up") for block in reversed(UNETS[family]["down_block_types"])]
    return diffusers.UNet2DConditionModel(**UNETS[family], **SHARED, up_block_types=up)


def vae(scale: float) -> diffusers.AutoencoderKL:
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    widths = (8, 8, 16, 16)
    return diffusers.AutoencoderKL(
        **blocks,
        block_out_channels=widths,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=SIDE,
        scaling_factor=scale,
    )


def tokenizer(folder: Path, pad: str = "<|endoftext|>") -> transformers.CLIPTokenizer:
    made = CLIPTokenizer.train(CAPTIONS, 580, 77)
    CLIPTokenizer(made.vocab, made.merges, 77, pad).save(folder)
    return transformers.CLIPTokenizer.from_pretrained(folder)


def text(width: int, layers: int, act: str, projection: int = 0) -> transformers.PreTrainedModel:
    config = transformers.CLIPTextConfig(
        vocab_size=580, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, hidden_act=act,
        num_attention_heads=4, max_position_embeddings=77, projection_dim=projection or 512, eos_token_id=579,
        bos_token_id=578, pad_token_id=579,
    )  # fmt: skip
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(config).eval()


def theirs(family: str, folder: Path) -> diffusers.DiffusionPipeline:
    """diffusers' pipeline of a family, of random weights."""
    torch.manual_seed(3)
    parts: dict[str, Any] = {"unet": unet(family), "vae": vae(0.13 if "sd" not in family else 0.18)}
    euler = diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading")
    if family in ("sd1", "sd2"):
        kind = {"prediction_type": "v_prediction"} if family == "sd2" else {}
        parts |= {"text_encoder": text(32, 3, "gelu" if kind else "quick_gelu")}
        parts |= {"tokenizer": tokenizer(folder / "t", "!" if kind else "<|endoftext|>")}
        scheduler = diffusers.DDIMScheduler(**BETAS, **kind, clip_sample=False, set_alpha_to_one=False)
        made = diffusers.StableDiffusionPipeline(
            **parts, scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    else:
        parts |= {"text_encoder_2": text(48, 3, "gelu", 40), "tokenizer_2": tokenizer(folder / "t2", "!")}
        if family == "sdxl":
            parts |= {"text_encoder": text(32, 3, "quick_gelu"), "tokenizer": tokenizer(folder / "t")}
            made = diffusers.StableDiffusionXLPipeline(**parts, scheduler=euler, add_watermarker=False)
        else:
            made = diffusers.StableDiffusionXLImg2ImgPipeline(
                **parts, text_encoder=None, tokenizer=None, scheduler=euler, requires_aesthetics_score=True,
                force_zeros_for_empty_prompt=False, add_watermarker=False,
            )  # fmt: skip
    for network in parts.values():
        if isinstance(network, torch.nn.Module):
            network.eval()
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> dict[str, tuple[diffusers.DiffusionPipeline, Path]]:
    """diffusers' pipelines, and the folders they write."""
    place = tmp_path_factory.mktemp("families")
    made = {}
    for family in UNETS:
        pipe = theirs(family, place / family)
        pipe.save_pretrained(place / family / "model")
        made[family] = (pipe, place / family / "model")
    return made


def near(ours: Tensor, reference: Tensor) -> bool:
    return bool((ours - reference).abs().max() <= NEAR * reference.abs().max())


def noise(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("negative", [None, NEGATIVE])
def test_text_to_image(stock, family, negative):
    """Four guided steps; SDXL's absent negative prompt is zeros, as diffusers' default."""
    pipe, folder = stock[family]
    ours = Pipeline.from_pretrained(folder, device="cpu")
    options = {"num_inference_steps": 4, "guidance_scale": 6.0, "height": SIDE, "width": SIDE}
    said = {"negative_prompt": [negative] * 2} if negative else {}
    expected = pipe(PROMPTS, **said, **options, generator=noise(7, 8), output_type="latent").images
    drawn = ours(PROMPTS, negative_prompt=negative or "", **options, seed=7, output_type="latent")
    assert near(drawn.latents, expected)
    pictures = pipe(PROMPTS[:1], **options, generator=noise(7), output_type="pt").images
    assert (ours(PROMPTS[0], **options, seed=7, output_type="pt").images - pictures).abs().max() <= 1e-4


def test_sizes_and_crops_of_sdxl(stock):
    pipe, folder = stock["sdxl"]
    ours = Pipeline.from_pretrained(folder, device="cpu")
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": SIDE, "width": 96, "output_type": "latent"}
    expected = pipe(
        PROMPTS[:1], original_size=(512, 256), crops_coords_top_left=(32, 16), **options, generator=noise(7)
    ).images
    told = {"original_height": 512, "original_width": 256, "crop_top": 32, "crop_left": 16}
    assert near(ours(PROMPTS[0], **told, **options, seed=7).latents, expected)
    assert not near(ours(PROMPTS[0], **options, seed=7).latents, expected)
    skipped = pipe(PROMPTS[:1], clip_skip=1, **options, generator=noise(7)).images
    assert near(ours(PROMPTS[0], clip_skip=1, profile="diffusers", **options, seed=7).latents, skipped)


def test_base_hands_over_to_refiner(stock):
    """denoising_end of the base and denoising_start of the refiner, each with its own conditioning."""
    (base, base_folder), (refiner, refiner_folder) = stock["sdxl"], stock["refiner"]
    options = {"num_inference_steps": 10, "guidance_scale": 4.0, "output_type": "latent"}
    size = {"height": SIDE, "width": SIDE}
    half = base(PROMPTS[:1], denoising_end=0.7, **options, **size, generator=noise(7)).images
    whole = refiner(PROMPTS[:1], image=half, denoising_start=0.7, negative_prompt=[NEGATIVE], **options,
                    generator=noise(9)).images  # fmt: skip
    first = Pipeline.from_pretrained(base_folder, device="cpu")
    second = Pipeline.from_pretrained(refiner_folder, device="cpu")
    ours = first(PROMPTS[0], denoising_end=0.7, **options, **size, seed=7)
    done = second(
        PROMPTS[0], latents=ours.latents, denoising_start=0.7, negative_prompt=NEGATIVE, **options, **size, seed=9
    )
    assert near(done.latents, whole)
    both = Pipeline(first.components, refiner=second)
    asked = {"refiner_start": 0.7, "negative_prompt": NEGATIVE, **options, **size, "seed": 7}
    once = both(PROMPTS[0], **asked)
    by_hand = second(PROMPTS[0], denoising_start=0.7, latents=first(PROMPTS[0], **asked, denoising_end=0.7).latents,
                     **asked)  # fmt: skip
    assert torch.equal(once.latents, by_hand.latents)
    steps = list(both.sample(both.resolve(Request(PROMPTS[0], **asked))))
    assert [step.index for step in steps] == list(range(10))
    assert torch.equal(first(PROMPTS[0], **asked).latents, both(PROMPTS[0], **asked | {"refiner_start": 1.0}).latents)
    scored = second(PROMPTS[0], latents=ours.latents, denoising_start=0.7, negative_prompt=NEGATIVE, **options, **size,
                    seed=9, aesthetic_score=9.0)  # fmt: skip
    assert not near(scored.latents, whole)
    with pytest.raises(UsageError, match="denoising_start wants the latents"):
        second(PROMPTS[0], denoising_start=0.7, **options, **size)
    with pytest.raises(UsageError, match="no step of 10 lies between"):
        first(PROMPTS[0], denoising_start=0.01, denoising_end=0.02, latents=ours.latents, **options, **size)


@pytest.mark.parametrize("family", list(UNETS))
def test_folders_come_back(stock, family, tmp_path):
    """What we write opens in stock diffusers, in the same class and with the same numbers."""
    pipe, folder = stock[family]
    ours = Pipeline.from_pretrained(folder, device="cpu")
    ours.save_pretrained(tmp_path / "ours", dtype="fp32")
    again = type(pipe).from_pretrained(tmp_path / "ours", use_safetensors=True)
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours", use_safetensors=True)) is type(pipe)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        one, other = getattr(pipe, name, None), getattr(again, name, None)
        assert (one is None) == (other is None)
        if one is not None:
            states = one.state_dict(), other.state_dict()
            assert states[0].keys() == states[1].keys()
            assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    for flag in ("force_zeros_for_empty_prompt", "requires_aesthetics_score"):
        assert pipe.config.get(flag) == again.config.get(flag)
    configs = ({k: v for k, v in p.scheduler.config.items() if not k.startswith("_")} for p in (pipe, again))
    assert next(configs) == next(configs)


def test_the_safety_checker_is_honoured(stock, tmp_path):
    """diffusers' verdicts and its black pictures; no entry of a folder switches it off, its user may."""
    pipe, _ = stock["sd1"]
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
              "image_size": 24, "patch_size": 8}  # fmt: skip
    checker = StableDiffusionSafetyChecker(transformers.CLIPConfig(vision_config=vision, projection_dim=16)).eval()
    side = {"height": 24, "width": 24}
    extractor = transformers.CLIPImageProcessor(size={"shortest_edge": 24}, crop_size=side)
    parts = {
        name: part for name, part in pipe.components.items() if name not in ("safety_checker", "feature_extractor")
    }
    options = {"num_inference_steps": 2, "guidance_scale": 6.0, "height": SIDE, "width": SIDE}
    clean = pipe(PROMPTS * 2, **options, generator=noise(1, 2, 3, 4)).images
    pixels = [extractor(image, return_tensors="pt").pixel_values for image in clean]
    with torch.no_grad():
        vectors = torch.cat([checker.visual_projection(checker.vision_model(one)[1]) for one in pixels])
        checker.concept_embeds.normal_()
        near = torch.nn.functional.cosine_similarity(vectors[:, None], checker.concept_embeds[None], dim=-1)
        checker.concept_embeds_weights.fill_(2.0)
        checker.concept_embeds_weights[0] = near[:, 0].sort().values[1:3].mean()  # two of the four are above
        checker.special_care_embeds_weights.fill_(2.0)
    checked = diffusers.StableDiffusionPipeline(**parts, safety_checker=checker, feature_extractor=extractor)
    checked.set_progress_bar_config(disable=True)
    checked.save_pretrained(tmp_path / "model")
    index = json.loads((tmp_path / "model/model_index.json").read_text())
    (tmp_path / "model/model_index.json").write_text(json.dumps(index | {"requires_safety_checker": False}))
    expected = checked(PROMPTS * 2, **options, generator=noise(1, 2, 3, 4))
    ours = Pipeline.from_pretrained(tmp_path / "model", device="cpu")
    drawn = ours(PROMPTS * 2, **options, seed=1)
    assert list(drawn.flagged) == expected.nsfw_content_detected and sum(drawn.flagged) == 2
    for picture, flag, plain in zip(drawn.images, drawn.flagged, clean, strict=True):
        difference = np.abs(np.asarray(picture, int) - (0 if flag else np.asarray(plain, int)))
        assert difference.max() <= 1
    free = Pipeline.from_pretrained(tmp_path / "model", device="cpu", safety_checker=False)
    assert free(PROMPTS[0], **options, seed=1).flagged == ()
    ours.save_pretrained(tmp_path / "again", dtype="fp32")
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "again", use_safetensors=True)
    again.set_progress_bar_config(disable=True)
    verdicts = again(PROMPTS * 2, **options, generator=noise(1, 2, 3, 4)).nsfw_content_detected
    assert verdicts == expected.nsfw_content_detected


AGAIN = [("sd2", 4), ("sd2", 9), ("sdxl", 8)]  # of the same pipelines as others


@pytest.mark.parametrize(
    ("family", "channels"), [pytest.param(*case, marks=pytest.mark.slow) if case in AGAIN else case for case in CASES]
)
def test_stock_diffusers_ignores_nothing_that_we_write(family, channels, monkeypatch, tmp_path):
    """Every entry of model_index.json is a parameter of the pipeline that it names."""
    narrow_families(monkeypatch)
    path = write(tmp_path / "x.safetensors", single_state(family, model_of(FAMILIES[family], channels)))
    save_folder(open_single_file(path), tmp_path / "model", None)
    index = json.loads((tmp_path / "model/model_index.json").read_text())
    takes = inspect.signature(getattr(diffusers, index["_class_name"]).__init__).parameters.keys()
    assert {entry for entry in index if not entry.startswith("_")} <= takes
