"""Beside diffusers in one process: its scheduler objects draw in our pipeline what they draw in its own, and models go
to it and come back on the same tensors.
"""

import copy
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from torch import Tensor

from ldm.errors import LdmError, ModelError, UsageError
from ldm.interop import from_diffusers, to_diffusers, with_scheduler
from ldm.pipeline import Pipeline
from ldm.request import Request
from ldm.text.tokenizer import CLIPTokenizer

PROMPTS, NEGATIVE = ["a red owl", "two tacos"], "ugly text"
SIDE = 16
NEAR = 1e-5  # of the largest value
OPTIONS = {"num_inference_steps": 3, "guidance_scale": 4.0, "height": SIDE, "width": SIDE}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
# What stock diffusers says of itself, nothing of ours.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context"),
    pytest.mark.filterwarnings("ignore:Should have t[ab]:UserWarning"),  # torchsde's, of the ends of its path
]


# -- diffusers' pipelines of a few thousand random weights -------------------------------------------------------------


def unet(**options: Any) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), layers_per_block=1,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), norm_num_groups=8, sample_size=8, attention_head_dim=8,
        **options,
    )  # fmt: skip


def vae() -> diffusers.AutoencoderKL:
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return diffusers.AutoencoderKL(
        **blocks, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, sample_size=SIDE
    )


def words(folder: Any, pad: str) -> transformers.CLIPTokenizer:
    made = CLIPTokenizer.train(["a red owl", "two tacos", "ugly text"] * 2, 540, 77)
    CLIPTokenizer(made.vocab, made.merges, 77, pad).save(folder)
    return transformers.CLIPTokenizer.from_pretrained(folder)


def text(size: int, width: int, projection: int = 0) -> transformers.PreTrainedModel:
    config = transformers.CLIPTextConfig(
        vocab_size=size, hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=projection or 512, hidden_act="gelu" if projection else "quick_gelu", eos_token_id=size - 1,
        bos_token_id=size - 2, pad_token_id=size - 1,
    )  # fmt: skip
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config)


def theirs(family: str, folder: Any, **scheduler: Any) -> Any:
    torch.manual_seed(3)
    ddim = diffusers.DDIMScheduler(**BETAS, **scheduler, clip_sample=False, set_alpha_to_one=False)
    parts: dict[str, Any] = {"vae": vae(), "scheduler": ddim}
    if family != "refiner":
        parts["tokenizer"] = words(folder / "tokenizer", "<|endoftext|>")
        parts["text_encoder"] = text(len(parts["tokenizer"]), 16)
    if family == "sd":
        rest = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        made = diffusers.StableDiffusionPipeline(**parts, **rest, unet=unet(cross_attention_dim=16))
    else:
        parts["tokenizer_2"] = words(folder / "tokenizer_2", "!")
        parts["text_encoder_2"] = text(len(parts["tokenizer_2"]), 24, 12)
        added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
        if family == "sdxl":
            network = unet(cross_attention_dim=40, projection_class_embeddings_input_dim=12 + 6 * 4, **added)
            made = diffusers.StableDiffusionXLPipeline(**parts, unet=network, add_watermarker=False)
        else:
            network = unet(cross_attention_dim=24, projection_class_embeddings_input_dim=12 + 5 * 4, **added)
            made = diffusers.StableDiffusionXLImg2ImgPipeline(
                **parts, unet=network, text_encoder=None, tokenizer=None, requires_aesthetics_score=True,
                force_zeros_for_empty_prompt=False, add_watermarker=False,
            )  # fmt: skip
    for part in made.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def pipes(tmp_path_factory) -> dict[str, Any]:
    return {family: theirs(family, tmp_path_factory.mktemp(family)) for family in ("sd", "sdxl", "refiner")}


@pytest.fixture(scope="module")
def stock(pipes) -> Any:
    return pipes["sd"]


@pytest.fixture(scope="module")
def ours(stock) -> Pipeline:
    return from_diffusers(stock)


def noise(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def near(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= NEAR * other.abs().max())


def by_them(pipe: Any, scheduler: Any, seeds: tuple[int, ...] = (7, 8), **options: Any) -> Tensor:
    """Latents of diffusers' own pipeline, with this scheduler for once."""
    before, pipe.scheduler = pipe.scheduler, copy.deepcopy(scheduler)
    made = pipe(PROMPTS[: len(seeds)], generator=noise(*seeds), output_type="latent", **OPTIONS | options).images
    pipe.scheduler = before
    return made


def settings(scheduler: Any) -> dict[str, Any]:
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_")}


# -- schedulers -------------------------------------------------------------------------------------------------------

SCHEDULERS: dict[str, dict[str, Any]] = {
    # known here by other code: the numbers are those of diffusers' own
    "PNDMScheduler": {"skip_prk_steps": True},  # asks for the second time twice
    "HeunDiscreteScheduler": {"use_karras_sigmas": True},
    "KDPM2AncestralDiscreteScheduler": {},
    "LCMScheduler": {},
    "TCDScheduler": {},  # diffusers' pipelines give it eta 0, its own step 0.3
    "DPMSolverMultistepScheduler": {"algorithm_type": "sde-dpmsolver++"},
    # not known here
    "DDIMParallelScheduler": {},
    "IPNDMScheduler": {},
    "SASolverScheduler": {},
    "CMStochasticIterativeScheduler": {},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_draw_as_in_diffusers(stock, ours, name):
    """Two pictures at once, with guidance rescaled; each is the same to the bit when it is drawn alone."""
    scheduler = getattr(diffusers, name).from_config(stock.scheduler.config, **SCHEDULERS[name])
    expected = by_them(stock, scheduler, guidance_rescale=0.5, negative_prompt=[NEGATIVE] * 2)
    asked = Request(tuple(PROMPTS), negative_prompt=NEGATIVE, guidance_rescale=0.5, seed=7, **OPTIONS)
    drawing = with_scheduler(ours, scheduler)
    steps = list(drawing.sample(asked))
    assert [step.index for step in steps] == [0, 1, 2]
    assert near(steps[-1].latents, expected)
    alone = drawing(replace(asked, prompt=PROMPTS[1], seed=8), output_type="latent")
    assert torch.equal(alone.latents[0], steps[-1].latents[1])
    assert alone.request.scheduler == name


def test_a_brownian_path_is_of_the_pictures_seed(stock, ours):
    """Without a seed of its own the scheduler draws one from torch's global generator."""
    pytest.importorskip("torchsde", reason="torchsde is not installed: pip install torchsde")
    kind, config = diffusers.DPMSolverSDEScheduler, stock.scheduler.config
    drawn = with_scheduler(ours, kind.from_config(config))(PROMPTS, seed=7, output_type="latent", **OPTIONS)
    for i, seed in enumerate((7, 8)):
        options = {"prompt_embeds": stock.encode_prompt(PROMPTS[i], "cpu", 1, False)[0]}
        scheduler = kind.from_config(config, noise_sampler_seed=seed)
        before, stock.scheduler = stock.scheduler, scheduler
        expected = stock(generator=noise(seed), output_type="latent", **options, **OPTIONS).images
        stock.scheduler = before
        assert near(drawn.latents[i : i + 1], expected)


def test_cosine_schedulers_of_networks_that_predict_v(tmp_path):
    pipe = theirs("sd", tmp_path, prediction_type="v_prediction")
    scheduler = diffusers.CosineDPMSolverMultistepScheduler(prediction_type="v_prediction")
    drawn = with_scheduler(from_diffusers(pipe), scheduler)(PROMPTS, seed=7, output_type="latent", **OPTIONS)
    assert near(drawn.latents, by_them(pipe, scheduler))


def test_schedulers_of_flow_matching(stock, ours):
    """diffusers' pipelines of these families have no place for them, so the loop is written out."""
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
    model = Pipeline(replace(ours.components, scheduler_config=flow))
    for scheduler in (diffusers.FlowMatchHeunDiscreteScheduler(), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)):
        drawn = with_scheduler(model, scheduler)(PROMPTS[0], seed=7, **OPTIONS | {"guidance_scale": 1.0})
        embeds, _ = stock.encode_prompt(PROMPTS[0], "cpu", 1, False)
        x = torch.randn(1, 4, 8, 8, generator=noise(7)[0])
        own = copy.deepcopy(scheduler)
        own.set_timesteps(3)
        with torch.no_grad():
            for t in own.timesteps:
                x = own.step(stock.unet(x, t, embeds).sample, t, x).prev_sample
        assert near(drawn.latents, x)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_estimates_on_the_way(ours, name):
    """Those of the same scheduler here; of the two, the first says them itself."""
    drawing = with_scheduler(ours, getattr(diffusers, name).from_config(ours.components.scheduler_config))
    asked = Request(PROMPTS[0], seed=7, **OPTIONS)
    estimates = ([step.x0 for step in pipe.sample(replace(asked, scheduler=name))] for pipe in (drawing, ours))
    assert all(near(one, other) for one, other in zip(*estimates, strict=True))


class Restless(diffusers.DDIMScheduler):
    """A user's own."""

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, eta: float = 0.0, generator: Any = None,
             return_dict: bool = True) -> Any:  # fmt: skip
        there = super().step(model_output, timestep, sample, eta, generator=generator).prev_sample
        return (there + 0.05 * torch.randn(sample.shape, generator=generator),)


def test_a_subclass_of_ones_own_in_threads(stock, ours):
    scheduler = Restless.from_config(stock.scheduler.config)
    before = json.dumps(vars(scheduler), default=str)
    drawing = with_scheduler(ours, scheduler)
    asked = {"seed": 7, "eta": 0.7, "output_type": "latent", **OPTIONS}
    before_stock, stock.scheduler = stock.scheduler, copy.deepcopy(scheduler)
    expected = stock(PROMPTS[:1], eta=0.7, generator=noise(7)[0], **OPTIONS, output_type="latent").images
    stock.scheduler = before_stock
    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(lambda _: drawing(PROMPTS[0], **asked).latents, range(4)))
    assert near(drawn[0], expected) and all(torch.equal(one, drawn[0]) for one in drawn)
    assert json.dumps(vars(scheduler), default=str) == before
    assert ours(PROMPTS[0], **asked).request.scheduler == "ddim"  # the given pipeline stays as it is
    assert not near(ours(PROMPTS[0], **asked).latents, drawn[0])
    named = drawing(PROMPTS[0], scheduler="euler", **asked | {"eta": None})
    assert torch.equal(named.latents, ours(PROMPTS[0], scheduler="euler", **asked | {"eta": None}).latents)


def test_times_and_levels_of_ones_own(stock, ours):
    euler = diffusers.EulerDiscreteScheduler.from_config(stock.scheduler.config)
    ddpm = diffusers.DDPMScheduler.from_config(stock.scheduler.config)
    for scheduler, own in ((ddpm, {"timesteps": [900, 500, 100]}), (euler, {"sigmas": [14.0, 3.0, 0.5]})):
        given = next(iter(own.values()))
        expected = by_them(stock, scheduler, **own)
        drawn = with_scheduler(ours, scheduler)(PROMPTS, seed=7, **own, **OPTIONS | {"num_inference_steps": None})
        assert drawn.request.num_inference_steps == len(given)
        assert near(drawn.latents, expected)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_the_refiner_takes_over(pipes, name):
    """As in diffusers, whose base hands over x in the scheduler's own frame; here latents are in the network's."""
    base, refiner = (copy.copy(pipes[family]) for family in ("sdxl", "refiner"))
    models = from_diffusers(base), from_diffusers(refiner)
    scheduler = getattr(diffusers, name).from_config(base.scheduler.config)
    both = with_scheduler(Pipeline(models[0].components, models[1]), scheduler)
    base.scheduler, refiner.scheduler = copy.deepcopy(scheduler), copy.deepcopy(scheduler)
    options = {key: OPTIONS[key] for key in ("guidance_scale",)} | {"num_inference_steps": 6}
    half = base(PROMPTS[:1], denoising_end=0.7, generator=noise(7), height=SIDE, width=SIDE, output_type="latent",
                **options).images  # fmt: skip
    whole = refiner(PROMPTS[:1], image=half, denoising_start=0.7, negative_prompt=[NEGATIVE], generator=noise(7),
                    output_type="latent", **options).images  # fmt: skip
    asked = {"refiner_start": 0.7, "seed": 7, "output_type": "latent", **OPTIONS | options}
    first = both(PROMPTS[0], denoising_end=0.7, **asked)
    sigma = float(base.scheduler.sigmas[base.scheduler.step_index])
    frame = (1 + sigma**2) ** -0.5 if name.startswith("Euler") else 1.0
    assert near(first.latents, half * frame)
    done = both.refiner(PROMPTS[0], latents=first.latents, denoising_start=0.7, negative_prompt=NEGATIVE, **asked)
    assert near(done.latents, whole)
    steps = list(both.sample(Request(PROMPTS[0], **asked)))
    assert [step.index for step in steps] == list(range(6))


class Still:
    """The least that a scheduler is; not of diffusers."""

    config: dict[str, Any] = {}  # noqa: RUF012

    told: list[int] = []  # noqa: RUF012

    def set_timesteps(self, n: int, device: Any = None) -> None:
        self.timesteps, self.begin = torch.linspace(999, 0, n), 0

    def set_begin_index(self, index: int) -> None:
        self.begin = index

    def step(self, output: Tensor, t: Tensor, sample: Tensor) -> tuple[Tensor]:
        self.told.append(self.begin)
        return (sample,)


def test_what_is_refused_of_schedulers(stock, ours, monkeypatch):
    config = stock.scheduler.config

    def drawing(name: str, **options: Any) -> Pipeline:
        return with_scheduler(ours, getattr(diffusers, name).from_config(config, **options))

    with pytest.raises(UsageError, match=r"'euler' came in place of a scheduler.*from_config"):
        with_scheduler(ours, "euler")
    with pytest.raises(UsageError, match="RePaintScheduler steps with original_image, mask beside"):
        with_scheduler(ours, diffusers.RePaintScheduler())
    with pytest.raises(UsageError, match="predicts 'epsilon'; make it with"):
        drawing("SASolverScheduler", prediction_type="v_prediction")(PROMPTS[0])
    with pytest.raises(UsageError, match="nfe is 8, and SASolverScheduler"):
        drawing("SASolverScheduler")(PROMPTS[0], nfe=8)
    with pytest.raises(UsageError, match="schedule_type is karras"):
        drawing("SASolverScheduler")(PROMPTS[0], schedule_type="karras")
    with pytest.raises(UsageError, match=r"LCMScheduler of diffusers lays no such run out: .*60"):
        drawing("LCMScheduler")(PROMPTS[0], num_inference_steps=60)
    with pytest.raises(UsageError, match=r"eta is 0.5, but IPNDMScheduler of diffusers has none"):
        drawing("IPNDMScheduler")(PROMPTS[0], eta=0.5)
    with pytest.raises(UsageError, match="noise_source cpu"):
        drawing("LCMScheduler")(PROMPTS[0], noise_source="gpu", **OPTIONS)
    asked = Request(PROMPTS[0], seed=7, **OPTIONS)
    euler = drawing("EulerDiscreteScheduler")
    with pytest.raises(UsageError, match="cannot be taken up again"):
        list(euler.sample(asked, resume=next(iter(euler.sample(asked)))))
    assert euler.notes == ours.notes
    assert "not those the model was trained on" in " ".join(with_scheduler(ours, diffusers.DDIMScheduler()).notes)
    monkeypatch.setitem(sys.modules, "diffusers", None)  # none of it is needed for this
    drawn = with_scheduler(ours, Still())(PROMPTS[0], seed=7, **OPTIONS)
    begun = torch.randn(1, 4, 8, 8, generator=noise(7)[0])
    assert torch.equal(drawn.latents, begun) and Still.told == [0, 0, 0]
    part = {"denoising_start": 0.5, "latents": begun, **OPTIONS | {"num_inference_steps": 4}}  # 999 666, then 333 0
    assert near(with_scheduler(ours, Still())(PROMPTS[0], seed=7, **part).latents, begun)
    assert Still.told[3:] == [2, 2]


# -- pipelines --------------------------------------------------------------------------------------------------------

NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2", "safety_checker")


@pytest.mark.parametrize("family", ["sd", "sdxl", "refiner"])
def test_there_and_back_on_the_same_tensors(pipes, family):
    pipe = pipes[family]
    ours = from_diffusers(pipe)
    assert not any(network.training for network in ours.components.networks.values())
    again = to_diffusers(ours)
    again.set_progress_bar_config(disable=True)
    assert type(again) is type(pipe)
    assert again.config.keys() >= {key for key in pipe.config if not key.startswith("_")}
    for name in NETWORKS:
        one, other = getattr(pipe, name, None), getattr(again, name, None)
        assert type(one) is type(other)
        if one is None:
            continue
        states = one.state_dict(), other.state_dict()
        assert list(states[0]) == list(states[1])
        assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
        assert all(value.data_ptr() == states[1][key].data_ptr() for key, value in states[0].items())
        assert not other.training and not any(buffer.is_meta for buffer in other.buffers())
    for flag in ("force_zeros_for_empty_prompt", "requires_aesthetics_score", "requires_safety_checker"):
        assert again.config.get(flag) == pipe.config.get(flag)
    assert settings(again.scheduler) == settings(pipe.scheduler)
    options = {"num_inference_steps": 3, "guidance_scale": 4.0}
    size = {"height": SIDE, "width": SIDE}
    if family == "refiner":
        begun = torch.randn(1, 4, 8, 8, generator=noise(3)[0])
        given = {"image": begun, "denoising_start": 0.5, "output_type": "latent", "negative_prompt": [NEGATIVE]}
        expected = pipe(PROMPTS[:1], generator=noise(7), **given, **options | {"num_inference_steps": 6}).images
        assert torch.equal(
            again(PROMPTS[:1], generator=noise(7), **given, **options | {"num_inference_steps": 6}).images, expected
        )
        asked = {"latents": begun, "denoising_start": 0.5, "negative_prompt": NEGATIVE, "num_inference_steps": 6}
        assert near(ours(PROMPTS[0], seed=7, **size, **options | asked).latents, expected)
        return
    expected = pipe(PROMPTS, generator=noise(7, 8), output_type="pt", **options, **size).images
    assert torch.equal(again(PROMPTS, generator=noise(7, 8), output_type="pt", **options, **size).images, expected)
    assert near(ours(PROMPTS, seed=7, output_type="pt", **options, **size).images, expected)


def test_a_folder_opens_as_diffusers_opens_it(model):
    """Ours from the folder, given to diffusers, is diffusers' from the folder."""
    mine = to_diffusers(Pipeline.from_pretrained(model, device="cpu"))
    stock = diffusers.StableDiffusionPipeline.from_pretrained(model, use_safetensors=True)
    for name in ("unet", "vae", "text_encoder"):
        one, other = getattr(mine, name).state_dict(), getattr(stock, name).state_dict()
        assert one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())
    for pipe in (mine, stock):
        pipe.set_progress_bar_config(disable=True)
    assert torch.equal(by_them(mine, mine.scheduler), by_them(stock, stock.scheduler))


def test_a_safety_checker_and_learned_words_go_along(tmp_path):
    pipe = theirs("sd", tmp_path)
    pipe.tokenizer.add_tokens(["<owlish>"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer), mean_resizing=False)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 8}  # fmt: skip
    checker = StableDiffusionSafetyChecker(transformers.CLIPConfig(vision_config=vision, projection_dim=8)).eval()
    side = {"height": 16, "width": 16}
    parts = pipe.components | {
        "safety_checker": checker,
        "feature_extractor": transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=side),
    }
    checked = diffusers.StableDiffusionPipeline(**parts)
    checked.set_progress_bar_config(disable=True)
    ours = from_diffusers(checked)
    again = to_diffusers(ours)
    again.set_progress_bar_config(disable=True)
    for threshold in (2.0, -2.0):  # no cosine is above the one, and every one is above the other
        with torch.no_grad():
            checker.concept_embeds_weights.fill_(threshold)
        expected = checked("an <owlish> owl", generator=noise(7), **OPTIONS)
        assert expected.nsfw_content_detected == [threshold < 0]
        drawn = ours("an <owlish> owl", seed=7, **OPTIONS)
        assert drawn.flagged == (threshold < 0,)
        assert np.abs(np.asarray(drawn.images[0], int) - np.asarray(expected.images[0], int)).max() <= 1
        back = again("an <owlish> owl", generator=noise(7), **OPTIONS)
        assert back.nsfw_content_detected == expected.nsfw_content_detected
        assert np.array_equal(np.asarray(back.images[0]), np.asarray(expected.images[0]))


def test_a_scheduler_that_is_not_known_here_comes_along(stock):
    before = stock.scheduler
    stock.scheduler = diffusers.SASolverScheduler.from_config(before.config)
    ours = from_diffusers(stock)
    assert near(ours(PROMPTS, seed=7, **OPTIONS).latents, by_them(stock, stock.scheduler))
    assert ours(PROMPTS[0], scheduler="ddim", seed=7, **OPTIONS).request.scheduler == "ddim"
    again = to_diffusers(ours)
    assert type(again.scheduler) is diffusers.SASolverScheduler
    assert settings(again.scheduler) == settings(stock.scheduler)
    stock.scheduler = diffusers.IPNDMScheduler()  # says nothing of the network
    with pytest.raises(ModelError, match="'IPNDMScheduler', whose noise schedule is not known"):
        from_diffusers(stock)
    stock.scheduler = before


def test_what_is_refused_of_pipelines(stock, ours, tmp_path, monkeypatch):
    controlled = diffusers.StableDiffusionControlNetPipeline(
        **stock.components | {"controlnet": diffusers.ControlNetModel.from_unet(stock.unet)},
        requires_safety_checker=False,
    )
    with pytest.raises(ModelError, match=r"StableDiffusionControlNetPipeline.*supported are .*SDXL"):
        from_diffusers(controlled)
    with pytest.raises(UsageError, match="UNet2DConditionModel came in place of a pipeline"):
        from_diffusers(stock.unet)
    changed = theirs("sd", tmp_path)
    changed.unet.peft_config = {"style": None}  # what peft leaves there
    with pytest.raises(ModelError, match=r"adapters in its unet \(style\); .*unload_lora_weights"):
        from_diffusers(changed)
    del changed.unet.peft_config
    changed.unet.encoder_hid_proj = torch.nn.Identity()
    with pytest.raises(ModelError, match=r"IP-Adapter in its unet; .*unload_ip_adapter"):
        from_diffusers(changed)
    changed.unet.encoder_hid_proj = None
    changed.vae.to("meta")
    with pytest.raises(ModelError, match=r"weights of the vae .* are moved away"):
        from_diffusers(changed)
    refined = Pipeline(ours.components, ours)
    with pytest.raises(UsageError, match="refiner, which diffusers holds as a pipeline of its own"):
        to_diffusers(refined)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for door, given in ((from_diffusers, stock), (to_diffusers, ours)):
        with pytest.raises(LdmError, match="pip install diffusers transformers"):
            door(given)
