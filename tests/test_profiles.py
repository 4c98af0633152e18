"""Profiles: whole runs as other tools make them, latents and all.

"a1111" against an emulation of stable-diffusion-webui 1.10 written here from its formulas and those of k-diffusion,
"diffusers" against the stock pipeline. Both run diffusers' and transformers' networks, opened from the same folder.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchsde
import torchsde._brownian.brownian_interval as torchsde_interval
from scipy.integrate import quad
from torch import Tensor

from ldm.checkpoints.components import Components
from ldm.checkpoints.folder import save_folder
from ldm.models.clip import CLIPTextConfig, CLIPTextModel
from ldm.models.unet import CROSS, UNet, UNetConfig
from ldm.models.vae import AutoencoderKL, VAEConfig
from ldm.pipeline import Pipeline
from ldm.request import Request
from ldm.text.tokenizer import CLIPTokenizer

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Should have t[ab]:UserWarning"),  # torchsde, of the last digit of a level
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]
ROOM, SIDE, GUIDANCE = 14, 8, 3.5  # tokens of a window beside its two ends; latents; CFG scale
SD1 = {
    "_class_name": "PNDMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
    "clip_sample": False,
}  # fmt: skip
ZERO_SNR = SD1 | {
    "_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction",
    "skip_prk_steps": None,
}  # fmt: skip
UNET = UNetConfig(
    sample_size=SIDE, block_out_channels=(16, 32), down_block_types=(CROSS, "DownBlock2D"), layers_per_block=1,
    num_heads=(2, 2), transformer_layers_per_block=(1, 1), cross_attention_dim=32, norm_num_groups=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the topology of Stable Diffusion 1 and random weights: 6 x 6 latents, windows of 16 tokens."""
    torch.manual_seed(1)
    tokenizer = CLIPTokenizer.train(["a taco on red", "an owl, blue", "a pizza", "an owl at night"], 560, ROOM + 2)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=ROOM + 2,
    )  # fmt: skip
    vae = VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, sample_size=2 * SIDE)
    parts = Components(
        UNet(UNET), AutoencoderKL(vae), CLIPTextModel(text), tokenizer, SD1, {"guidance_scale": GUIDANCE}
    )
    with torch.no_grad():
        parts.unet.conv_out.weight *= 8  # an untrained network says next to nothing of its input
        parts.text_encoder.text_model.final_layer_norm.bias += 0.5  # else the mean is 0, and what restores it is noise
        for weight in (w for name, w in parts.unet.named_parameters() if "attn2" in name):
            weight *= 3
    path = tmp_path_factory.mktemp("model") / "sd1"
    save_folder(parts, path, torch.float32)
    return path


# -- stable-diffusion-webui and k-diffusion, from their formulas -------------------------------------------------------

Pieces = Sequence[tuple[str, float]]
Denoise = Callable[[Tensor, float], Tensor]  # x, sigma -> x0
Fresh = Callable[[float, float], Tensor]


def nv(seed: int, draw: int, shape: Sequence[int]) -> Tensor:
    """modules/rng_philox.py: Philox4x32-10 with counter (draw, 0, element, 0), Box-Muller's sine branch."""
    n, low = math.prod(shape), np.uint64(0xFFFFFFFF)
    c = [np.full(n, draw, np.uint64), np.zeros(n, np.uint64), np.arange(n, dtype=np.uint64), np.zeros(n, np.uint64)]
    key = [seed % 2**32, seed >> 32]
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        high = (a >> np.uint64(32), b >> np.uint64(32))
        c = [high[1] ^ c[1] ^ np.uint64(key[0]), b & low, high[0] ^ c[3] ^ np.uint64(key[1]), a & low]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    u, v = (c[0] + 0.5) / 2**32, (c[1] + 0.5) / 2**32 * 2 * math.pi
    return torch.from_numpy((np.sqrt(-2 * np.log(u)) * np.sin(v)).reshape(tuple(shape))).float()


class WebUI:
    """The model as stable-diffusion-webui 1.10 runs it, with its default options."""

    def __init__(self, folder: Path) -> None:
        from diffusers import StableDiffusionPipeline

        self.pipe: Any = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
        self.pipe.set_progress_bar_config(disable=True)
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.alphas_cumprod = (1 - betas).cumprod(0).float()
        self.sigmas = ((1 - self.alphas_cumprod) / self.alphas_cumprod) ** 0.5
        self.log_sigmas = self.sigmas.log()

    def context(self, pieces: Pieces, clip_skip: int = 1) -> Tensor:
        """modules/sd_hijack_clip.py: windows of ROOM tokens, comma backtrack 20, emphasis "Original"."""
        tokenizer = self.pipe.tokenizer
        bos, eos, comma = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.get_vocab()[",</w>"]
        chunks: list[list[tuple[int, float]]] = [[]]
        last = -1
        for text, weight in pieces:
            for token in tokenizer(text, add_special_tokens=False).input_ids:
                chunk = chunks[-1]
                if token == comma:
                    last = len(chunk)
                elif len(chunk) == ROOM and last != -1 and ROOM - last <= 20:
                    chunks[-1:] = [chunk[: last + 1], chunk[last + 1 :]]
                    last = -1
                if len(chunks[-1]) == ROOM:
                    chunks.append([])
                    last = -1
                chunks[-1].append((token, weight))
        said = []
        for chunk in chunks:
            padding = ROOM - len(chunk)
            ids = torch.tensor([[bos, *(token for token, _ in chunk), *[eos] * (padding + 1)]])
            z = self.pipe.text_encoder(ids, output_hidden_states=True).hidden_states[-clip_skip]
            z = self.pipe.text_encoder.final_layer_norm(z)
            mean = z.mean()
            z = z * torch.tensor([1.0, *(weight for _, weight in chunk), *[1.0] * (padding + 1)])[:, None]
            said.append(z * (mean / z.mean()))
        return torch.cat(said, 1)

    def network(self, x: Tensor, t: float, context: Tensor) -> Tensor:
        return self.pipe.unet(x, torch.tensor(t), context).sample

    def guided(
        self, network: Callable[[Tensor], Tensor], said: Sequence[tuple[Tensor, float]], aside: Tensor
    ) -> Tensor:
        """modules/sd_samplers_cfg_denoiser.py: combine_denoised."""
        negative = network(aside)
        total = negative
        for context, weight in said:
            total = total + (network(context) - negative) * (weight * GUIDANCE)
        return total

    def denoiser(self, steps: Sequence[Sequence[tuple[Tensor, float]]], aside: Tensor) -> Denoise:
        """k_diffusion/external.py: CompVisDenoiser; steps: what is said in each call, the last of them ever after."""
        calls = 0

        def network(x: Tensor, sigma: float, context: Tensor) -> Tensor:
            return x - sigma * self.network(x / (sigma**2 + 1) ** 0.5, self.sigma_to_t(sigma), context)

        def denoise(x: Tensor, sigma: float) -> Tensor:
            nonlocal calls
            said = steps[min(calls, len(steps) - 1)]
            calls += 1
            return self.guided(lambda context: network(x, sigma, context), said, aside)

        return denoise

    def sigma_to_t(self, sigma: float) -> float:
        """DiscreteSchedule.sigma_to_t without quantising."""
        log_sigma = math.log(sigma)
        low = int(((log_sigma - self.log_sigmas) >= 0).cumsum(0).argmax().clamp(max=998))
        a, b = float(self.log_sigmas[low]), float(self.log_sigmas[low + 1])
        w = min(max((a - log_sigma) / (a - b), 0), 1)
        return (1 - w) * low + w * (low + 1)

    def t_to_sigma(self, t: float) -> float:
        low, w = math.floor(t), t % 1
        return math.exp((1 - w) * self.log_sigmas[low] + w * self.log_sigmas[math.ceil(t)])

    def levels(self, grid: str, n: int) -> list[float]:
        """modules/sd_schedulers.py."""
        least, most = float(self.sigmas[0]), float(self.sigmas[-1])
        ramp = torch.linspace(0, 1, n, dtype=torch.float64)
        found: dict[str, Callable[[], list[float]]] = {
            "Uniform": lambda: [self.t_to_sigma(float(t)) for t in torch.linspace(999, 0, n)],
            "Karras": lambda: ((most ** (1 / 7) + ramp * (least ** (1 / 7) - most ** (1 / 7))) ** 7).tolist(),
            "Exponential": lambda: torch.linspace(math.log(most), math.log(least), n).exp().tolist(),
            "SGM Uniform": lambda: [self.t_to_sigma(float(t)) for t in torch.linspace(999, 0, n + 1)[:-1]],
            "Simple": lambda: [float(self.sigmas[-(1 + int(i * 1000 / n))]) for i in range(n)],
        }
        return [*found[grid](), 0.0]


def slope(x: Tensor, sigma: float, x0: Tensor) -> Tensor:
    return (x - x0) / sigma


def ancestral(sigma: float, following: float, eta: float) -> tuple[float, float]:
    up = min(following, eta * (following**2 * (sigma**2 - following**2) / sigma**2) ** 0.5)
    return (following**2 - up**2) ** 0.5, up


def euler(denoise: Denoise, x: Tensor, sigmas: Sequence[float], fresh: Fresh, eta: float = 0.0) -> Tensor:
    """sample_euler; with eta sample_euler_ancestral."""
    for sigma, following in pairwise(sigmas):
        down, up = ancestral(sigma, following, eta)
        x = x + slope(x, sigma, denoise(x, sigma)) * (down - sigma)
        x = x + fresh(sigma, following) * up if up else x
    return x


def heun(denoise: Denoise, x: Tensor, sigmas: Sequence[float], fresh: Fresh) -> Tensor:
    for sigma, following in pairwise(sigmas):
        d = slope(x, sigma, denoise(x, sigma))
        if following:
            ahead = x + d * (following - sigma)
            d = (d + slope(ahead, following, denoise(ahead, following))) / 2
        x = x + d * (following - sigma)
    return x


def dpm_2(denoise: Denoise, x: Tensor, sigmas: Sequence[float], fresh: Fresh, eta: float = 0.0) -> Tensor:
    """sample_dpm_2; with eta sample_dpm_2_ancestral."""
    for sigma, following in pairwise(sigmas):
        d = slope(x, sigma, denoise(x, sigma))
        down, up = ancestral(sigma, following, eta)
        if down:
            middle = math.exp((math.log(sigma) + math.log(down)) / 2)
            ahead = x + d * (middle - sigma)
            d = slope(ahead, middle, denoise(ahead, middle))
        x = x + d * (down - sigma)
        x = x + fresh(sigma, following) * up if up else x
    return x


def dpmpp_2s(denoise: Denoise, x: Tensor, sigmas: Sequence[float], fresh: Fresh, eta: float = 1.0) -> Tensor:
    for sigma, following in pairwise(sigmas):
        x0 = denoise(x, sigma)
        down, up = ancestral(sigma, following, eta)
        if down:
            h = math.log(sigma / down)
            middle = sigma * math.exp(-h / 2)
            x0 = denoise(middle / sigma * x - math.expm1(-h / 2) * x0, middle)
            x = down / sigma * x - math.expm1(-h) * x0
        else:
            x = x0
        x = x + fresh(sigma, following) * up if following else x
    return x


def dpmpp_sde(denoise: Denoise, x: Tensor, sigmas: Sequence[float], fresh: Fresh) -> Tensor:
    for sigma, following in pairwise(sigmas):
        x0 = denoise(x, sigma)
        if not following:
            return x0
        middle = math.exp((math.log(sigma) + math.log(following)) / 2)
        down, up = ancestral(sigma, middle, 1)
        ahead = down / sigma * x + (1 - down / sigma) * x0 + fresh(sigma, middle) * up
        x0 = denoise(ahead, middle)  # r = 1/2 leaves nothing of the first one
        down, up = ancestral(sigma, following, 1)
        x = down / sigma * x + (1 - down / sigma) * x0 + fresh(sigma, following) * up
    return x


def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Sequence[float], fresh: Fresh) -> Tensor:
    old, before = None, 0.0
    for sigma, following in pairwise(sigmas):
        x0 = used = denoise(x, sigma)
        if not following:
            return x0
        h = math.log(sigma / following)
        if old is not None:
            r = before / h
            used = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * old
        x = following / sigma * x - math.expm1(-h) * used
        old, before = x0, h
    return x


def dpmpp_2m_sde(denoise: Denoise, x: Tensor, sigmas: Sequence[float], fresh: Fresh, kind: str = "midpoint") -> Tensor:
    old, before = None, 0.0
    for sigma, following in pairwise(sigmas):
        x0 = denoise(x, sigma)
        if not following:
            return x0
        h = math.log(sigma / following)
        gain = -math.expm1(-2 * h)
        x = following / sigma * math.exp(-h) * x + gain * x0
        if old is not None:
            factor = gain / 2 if kind == "midpoint" else gain / (-2 * h) + 1
            x = x + factor * h / before * (x0 - old)
        x = x + fresh(sigma, following) * following * gain**0.5
        old, before = x0, h
    return x


def dpmpp_3m_sde(denoise: Denoise, x: Tensor, sigmas: Sequence[float], fresh: Fresh) -> Tensor:
    past: list[tuple[Tensor, float]] = []  # x0 and h of the steps before, newest first
    for sigma, following in pairwise(sigmas):
        x0 = denoise(x, sigma)
        if not following:
            return x0
        h = math.log(sigma / following)
        x = math.exp(-2 * h) * x - math.expm1(-2 * h) * x0
        phi_2 = math.expm1(-2 * h) / (2 * h) + 1
        if past:
            r0 = past[0][1] / h
            d1 = (x0 - past[0][0]) / r0
            if len(past) > 1:
                r1, phi_3 = past[1][1] / h, phi_2 / (2 * h) - 0.5
                other = (past[0][0] - past[1][0]) / r1
                d2 = (d1 - other) / (r0 + r1)
                d1 = d1 + (d1 - other) * r0 / (r0 + r1)
                x = x - phi_3 * d2
            x = x + phi_2 * d1
        x = x + fresh(sigma, following) * following * (-math.expm1(-2 * h)) ** 0.5
        past = [(x0, h), *past][:2]
    return x


def lms(denoise: Denoise, x: Tensor, sigmas: Sequence[float], fresh: Fresh) -> Tensor:
    slopes: list[Tensor] = []
    for i, sigma in enumerate(sigmas[:-1]):
        slopes = [slope(x, sigma, denoise(x, sigma)), *slopes][:4]
        for j, d in enumerate(slopes):
            others = [sigmas[i - k] for k in range(len(slopes)) if k != j]

            def basis(s: float, own: float = sigmas[i - j], others: Sequence[float] = others) -> float:
                return math.prod((s - other) / (own - other) for other in others)

            x = x + quad(basis, sigma, sigmas[i + 1], epsrel=1e-4)[0] * d
    return x


@pytest.fixture(scope="module")
def webui(folder: Path) -> WebUI:
    return WebUI(folder)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(folder, device="cpu")


def brownian(seed: int, x: Tensor, sigmas: Sequence[float], patch: pytest.MonkeyPatch) -> Fresh:
    """modules/sd_samplers_common.py: a Brownian tree of the image's own seed, whose numbers are those of "NV"."""
    patch.setattr(
        torchsde_interval, "_randn", lambda size, dtype, device, seed: nv(int(seed), 0, tuple(size)).to(dtype)
    )
    least, most = sigmas[-2], sigmas[0]
    tree = torchsde.BrownianTree(torch.tensor(least), torch.zeros_like(x[0]), torch.tensor(most), entropy=seed)

    def fresh(sigma: float, following: float) -> Tensor:
        a, b = torch.tensor(following), torch.tensor(sigma)
        return (-tree(a, b) / (b - a).abs().sqrt())[None]  # towards lower levels the sign turns

    return fresh


def never(sigma: float, following: float) -> Tensor:
    raise AssertionError("a deterministic run drew noise")


def far(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    assert ours.shape == theirs.shape and torch.isfinite(theirs).all()
    return float((ours - theirs).abs().max() / theirs.abs().max())


SHAPE = (4, SIDE, SIDE)
PROMPT, WORDS = "an (owl:1.4), [a taco]", (("an ", 1), ("owl", 1.4), (", ", 1), ("a taco", 1 / 1.1))
RUNS: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {  # "Sampler" -> k-diffusion's function
    "Euler": (euler, {}),
    "Euler a": (euler, {"eta": 0.7}),
    "Heun": (heun, {}),
    "LMS": (lms, {}),
    "DPM2": (dpm_2, {}),
    "DPM2 a": (dpm_2, {"eta": 1.0}),
    "DPM++ 2S a": (dpmpp_2s, {}),
    "DPM++ SDE": (dpmpp_sde, {}),
    "DPM++ 2M": (dpmpp_2m, {}),
    "DPM++ 2M SDE": (dpmpp_2m_sde, {}),
    "DPM++ 2M SDE Heun": (dpmpp_2m_sde, {"kind": "heun"}),
    "DPM++ 3M SDE": (dpmpp_3m_sde, {}),
}
AUTOMATIC = {  # of modules/sd_samplers_kdiffusion.py; else it is "Uniform"
    "DPM2": "Karras", "DPM2 a": "Karras", "DPM++ 2S a": "Karras", "DPM++ SDE": "Karras", "DPM++ 2M": "Karras",
    "DPM++ 2M SDE": "Exponential", "DPM++ 2M SDE Heun": "Exponential", "DPM++ 3M SDE": "Exponential",
}  # fmt: skip
DISCARD = ("DPM2", "DPM2 a", "DPM++ 3M SDE")


@pytest.mark.parametrize(
    ("sampler", "grid"),
    [*((name, "Automatic") for name in RUNS), ("Euler", "SGM Uniform"), ("DPM++ 2M", "Simple"), ("DPM2", "Uniform")],
)
@torch.inference_mode()
def test_a_run_of_webui(
    pipeline: Pipeline, webui: WebUI, monkeypatch: pytest.MonkeyPatch, sampler: str, grid: str
) -> None:
    """Noise "NV", weights, clip skip 2, schedule, solver, ENSD: latents of the whole run."""
    seed, n, delta = 2**31 + 5, 6, 31337
    solver, options = RUNS[sampler]
    found = webui.levels(AUTOMATIC.get(sampler, "Uniform") if grid == "Automatic" else grid, n + (sampler in DISCARD))
    sigmas = [*found[:-2], found[-1]] if sampler in DISCARD else found
    x = nv(seed, 0, SHAPE)[None] * sigmas[0]
    draws = iter(nv(seed + delta, draw, SHAPE)[None] for draw in range(n))
    fresh: Fresh = lambda sigma, following: next(draws)  # noqa: E731
    if "SDE" in sampler:
        fresh = brownian(seed, x, sigmas, monkeypatch)
    denoise = webui.denoiser([[(webui.context(WORDS, 2), 1.0)]], webui.context([("red", 1)], 2))
    theirs = solver(denoise, x, sigmas, fresh, **options)
    ours = pipeline(
        PROMPT, negative_prompt="red", seed=seed, num_inference_steps=n, guidance_scale=GUIDANCE, scheduler=sampler,
        schedule_type=None if grid == "Automatic" else grid, clip_skip=2, eta_noise_seed_delta=delta,
        eta=options["eta"] if sampler == "Euler a" else None, profile="a1111", output_type="latent",
    )  # fmt: skip
    assert far(ours.latents, theirs) < 1e-4
    assert ours.request.noise_source == "gpu" and len(sigmas) == n + 1


LONG = "an owl, blue, (a pizza on red, a taco:1.3) at night"
LONG_WORDS = (("an owl, blue, ", 1), ("a pizza on red, a taco", 1.3), (" at night", 1))


@pytest.mark.parametrize(
    ("prompt", "steps", "negative", "aside"),
    [
        (LONG, [[(LONG_WORDS, 1.0)]], "red", (("red", 1),)),
        ("a taco", [[((("a taco", 1),), 1.0)]], LONG, LONG_WORDS),
        (
            "an (owl:1.4), [a taco] AND [a pizza:an owl:2] :0.6",
            [*[[(WORDS, 1.0), ((("a pizza", 1),), 0.6)]] * 3, [(WORDS, 1.0), ((("an owl", 1),), 0.6)]],
            "red", (("red", 1),),
        ),
    ],
    ids=["long", "long negative", "composed"],
)  # fmt: skip
@torch.inference_mode()
def test_words_of_webui(
    pipeline: Pipeline,
    webui: WebUI,
    prompt: str,
    steps: Sequence[Sequence[tuple[Pieces, float]]],
    negative: str,
    aside: Pieces,
) -> None:
    """Windows cut at commas, the negative prompt of its own length; parts joined by AND; and a word that changes after
    the third step, for steps are counted from 0 there and compared with <=.
    """
    sigmas, said = webui.levels("Uniform", 5), [[(webui.context(w), k) for w, k in parts] for parts in steps]
    assert webui.context(LONG_WORDS).shape[1] == 3 * (ROOM + 2)
    theirs = euler(webui.denoiser(said, webui.context(aside)), nv(7, 0, SHAPE)[None] * sigmas[0], sigmas, never)
    order = Request(
        prompt, negative_prompt=negative, seed=7, num_inference_steps=5, guidance_scale=GUIDANCE, scheduler="Euler",
        schedule_type="uniform", noise_source="gpu", output_type="latent",
    )  # fmt: skip
    assert far(pipeline(replace(order, profile="a1111")).latents, theirs) < 1e-4
    assert far(pipeline(order).latents, theirs) > 1e-4  # filled up, and changed where the documentation says


@pytest.mark.parametrize(("sampler", "source"), [("DDIM", "gpu"), ("DDIM", "cpu"), ("PLMS", "gpu")])
@torch.inference_mode()
def test_ddim_and_plms_of_webui(pipeline: Pipeline, webui: WebUI, sampler: str, source: str) -> None:
    """modules/sd_samplers_timesteps_impl.py: every (1000 // n)-th time from 1, which is where the run ends, so that it
    has one step less than asked for; unit noise at the beginning, and eta 0.
    """
    n, alphas, said, aside = 7, webui.alphas_cumprod.double(), webui.context(WORDS), webui.context([("", 1)])
    times = [1 + t for t in range(0, 1000, 1000 // n)]
    x = (
        nv(7, 0, SHAPE)[None]
        if source == "gpu"
        else torch.randn(SHAPE, generator=torch.Generator().manual_seed(7))[None]
    )

    def noise(x: Tensor, i: int) -> Tensor:
        return webui.guided(lambda context: webui.network(x, times[i], context), [(said, 1.0)], aside)

    def down(x: Tensor, e: Tensor, i: int) -> Tensor:
        a, a_next = alphas[times[i]], alphas[times[i - 1]]
        return (a_next.sqrt() * (x - (1 - a).sqrt() * e) / a.sqrt() + (1 - a_next).sqrt() * e).float()

    past: list[Tensor] = []
    for i in range(len(times) - 1, 0, -1):
        e = used = noise(x, i)
        past = [e, *past][:4]
        if sampler == "PLMS" and len(past) == 1:
            used = (e + noise(down(x, e, i), i - 1)) / 2
        elif sampler == "PLMS":
            weights = {2: (3, -1), 3: (23, -16, 5), 4: (55, -59, 37, -9)}[len(past)]
            used = sum(w * old for w, old in zip(weights, past, strict=True)) / sum(weights)  # type: ignore[assignment]
        x = down(x, used, i)
    ours = pipeline(
        PROMPT, seed=7, num_inference_steps=n, guidance_scale=GUIDANCE, scheduler=sampler, profile="a1111",
        noise_source=None if source == "gpu" else source, output_type="latent",
    )  # fmt: skip
    assert far(ours.latents, x) < 1e-4


# -- what differs, and is said -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sampler", "noted"), [("UniPC", True), ("LCM", True), ("DDPM", True), ("Euler a", False)])
def test_samplers_that_run_as_in_diffusers_say_so(pipeline: Pipeline, sampler: str, noted: bool) -> None:
    order = pipeline.resolve(Request("an owl", seed=1, num_inference_steps=3, scheduler=sampler, profile="a1111"))
    notes = [note for note in pipeline.remarks(order) if "it runs as in diffusers" in note]
    assert len(notes) == noted and all(sampler in note for note in notes)
    assert not pipeline.remarks(replace(order, profile=None))


def test_zero_terminal_snr_begins_at_a_level_that_is_finite(pipeline: Pipeline) -> None:
    """k-diffusion's levels want one; the stand-in is diffusers' 4096, and the picture is about that of DDIM there."""
    there = Pipeline(replace(pipeline.components, scheduler_config=ZERO_SNR))
    order: dict[str, Any] = {"seed": 7, "num_inference_steps": 40, "guidance_scale": 1.0, "profile": "a1111"}
    drawn = {
        name: there("an owl", scheduler=name, output_type="latent", **order).latents
        for name in ("Euler", "DDIM", "DPM++ 2M", "Euler a")
    }
    sampling = there.sampling(Request("an owl", scheduler="Euler", profile="a1111"))
    assert sampling.levels(4).sigmas[0] == pytest.approx(math.sqrt(2**24 - 1))
    assert all(torch.isfinite(latents).all() for latents in drawn.values())
    assert far(drawn["Euler"], drawn["DDIM"]) < 0.2 < far(drawn["Euler a"], drawn["DDIM"])
    assert not there.remarks(there.resolve(Request("an owl", scheduler="Euler", **order)))


def test_clip_skip_of_sdxl_is_not_heeded_and_said_so(pipeline: Pipeline) -> None:
    """As there, where the option is read by the encoder of Stable Diffusion 1 alone; without the profile it counts."""
    parts, sizes = pipeline.components, {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 20 + 24}
    clip = CLIPTextConfig(
        vocab_size=len(parts.tokenizer), hidden_size=24, intermediate_size=48, num_hidden_layers=3, hidden_act="gelu",
        num_attention_heads=2, max_position_embeddings=ROOM + 2, projection_dim=20,
    )  # fmt: skip
    unet = UNet(replace(UNET, cross_attention_dim=32 + 24, **sizes)).eval()
    xl = Pipeline(replace(parts, unet=unet, text_encoder_2=CLIPTextModel(clip).eval(), tokenizer_2=parts.tokenizer))
    order = Request("an (owl:1.2)", seed=7, num_inference_steps=2, scheduler="Euler", guidance_scale=3.0)
    for profile, heeded in (("a1111", False), (None, True)):
        drawn = [xl(replace(order, profile=profile, clip_skip=k, output_type="latent")) for k in (None, 1, 2)]
        assert torch.equal(drawn[0].latents, drawn[1].latents)
        assert torch.equal(drawn[0].latents, drawn[2].latents) != heeded
        notes = [note for one in drawn for note in xl.remarks(one.request)]
        assert [note[:27] for note in notes] == ([] if heeded else ["clip_skip 2 was not heeded:"])


# -- diffusers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "theirs"),
    [("ddim", "DDIMScheduler"), ("euler_a", "EulerAncestralDiscreteScheduler"), ("unipc", "UniPCMultistepScheduler"),
     ("dpm++2m", "DPMSolverMultistepScheduler")],
)  # fmt: skip
@torch.inference_mode()
def test_a_run_of_diffusers(pipeline: Pipeline, webui: WebUI, scheduler: str, theirs: str) -> None:
    """The stock pipeline: brackets are text, clip_skip leaves out layers of the prompt alone, torch's own noise."""
    import diffusers

    stock, before = webui.pipe, webui.pipe.scheduler
    said = {}  # as its clip_skip has it, which with transformers 5 it cannot itself
    for name, text, layer in (("prompt_embeds", "an (owl), [a|b]", -2), ("negative_prompt_embeds", "red", -1)):
        ids = stock.tokenizer(text, padding="max_length", max_length=ROOM + 2, return_tensors="pt").input_ids
        states = stock.text_encoder(ids, output_hidden_states=True).hidden_states[layer]
        said[name] = stock.text_encoder.final_layer_norm(states)
    try:
        stock.scheduler = getattr(diffusers, theirs).from_config(before.config)
        expected = stock(
            **said, num_inference_steps=6, guidance_scale=GUIDANCE, generator=torch.Generator().manual_seed(7),
            output_type="latent", height=2 * SIDE, width=2 * SIDE,
        ).images  # fmt: skip
    finally:
        stock.scheduler = before
    order = Request(
        "an (owl), [a|b]", negative_prompt="red", clip_skip=1, num_inference_steps=6, guidance_scale=GUIDANCE, seed=7,
        scheduler=scheduler, output_type="latent", profile="diffusers",
    )  # fmt: skip
    assert far(pipeline(order).latents, expected) < 1e-5
    for other in (replace(order, profile=None, clip_skip=2), replace(order, profile="a1111", clip_skip=2)):
        assert far(pipeline(other).latents, expected) > 1e-3
