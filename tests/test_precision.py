"""float32, bfloat16 and float16: what each is near to, what stays in float32, and what becomes of numbers that leave
their range: a picture from a wider type and a note, or an error and no file; never a black picture.
"""

import copy
import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import files, pixels, refused
from torch import Tensor

from ldm.checkpoints.folder import open_folder
from ldm.decoding import decoded, decoder_in
from ldm.errors import NumericalError
from ldm.models.layers import Attention, timestep_embedding
from ldm.models.tiny_vae import AutoencoderTiny, TinyVAEConfig
from ldm.models.unet import UNet
from ldm.models.vae import AutoencoderKL
from ldm.pipeline import Pipeline
from ldm.preview import fit_latent_to_rgb
from ldm.runtime import decoding_types, working_bytes

pytestmark = pytest.mark.usefixtures("one_thread")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
EPS = {BF16: 2.0**-8, FP16: 2.0**-11}  # half the distance of 1 to the next number
LARGEST = torch.finfo(FP16).max  # 65,504
OVERFLOW = 3e4  # how much larger a poisoned decoder's first map is: its weights are finite in float16, its sums are not
GPU = (FP16, BF16, FP32)  # in which CUDA decodes what is opened in float16


def far(a: Tensor, b: Tensor) -> float:
    """The largest difference as a share of the largest value."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


@pytest.fixture
def pipeline(model: Path) -> Pipeline:
    return Pipeline(open_folder(model, FP32, torch.device("cpu")))


def poisoned(vae: AutoencoderKL) -> AutoencoderKL:
    """In float16, with a first map beyond its range. Every branch normalises what it reads, and so does the end, so
    that nothing else changes much: as in SDXL's autoencoder, whose residuals grow alike.
    """
    bad = copy.deepcopy(vae)
    bad.decoder.conv_in.weight.data *= OVERFLOW
    bad.decoder.conv_in.bias.data *= OVERFLOW
    return bad.half()


@pytest.fixture
def latents() -> Tensor:
    return torch.randn(3, 4, 6, 5)


# -- decoding ----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_an_overflow_is_decoded_in_the_next_type(pipeline: Pipeline, latents: Tensor) -> None:
    bad = poisoned(pipeline.vae)
    before = {name: (value.data_ptr(), value.clone()) for name, value in bad.state_dict().items()}
    assert not torch.isfinite(bad.decode(latents.half())).all()  # the poison works
    expected = copy.deepcopy(bad).float().decode(latents)
    again = "a picture was not finite when decoded in float16, and was decoded again in {}"
    for types, near in (((FP16, BF16, FP32), 4 * EPS[BF16]), ((FP16, FP32), 1e-6), ((FP32,), 1e-6)):
        images, notes = decoded(bad, latents, types)
        assert images.dtype == FP32 and torch.isfinite(images).all()
        assert far(images, expected) <= near, types
        assert notes == ((again.format({BF16: "bfloat16"}.get(types[1], "float32")),) if len(types) > 1 else ())
    after = bad.state_dict()
    assert before.keys() == after.keys()
    for name, (place, value) in before.items():  # neither moved nor changed
        assert after[name].data_ptr() == place and torch.equal(after[name], value) and value.dtype == FP16


@torch.inference_mode()
def test_each_picture_by_itself(pipeline: Pipeline, latents: Tensor) -> None:
    """What is finite stays as it was decoded first: a picture's pixels do not hang on those beside it."""
    bad = poisoned(pipeline.vae)
    latents[[0, 2]] *= 1e-3
    bad.decoder.conv_in.bias.data.zero_()
    alone = [decoded(bad, row[None], (FP16, FP32)) for row in latents]
    assert [len(notes) for _, notes in alone] == [0, 1, 0]
    images, notes = decoded(bad, latents, (FP16, FP32))
    assert torch.equal(images, torch.cat([image for image, _ in alone])) and len(notes) == 1
    assert torch.equal(images[[0, 2]], bad.decode(latents[[0, 2]].half()).float())
    assert torch.equal(images[1:2], copy.deepcopy(bad).float().decode(latents[1:2]))


@torch.inference_mode()
def test_bfloat16_is_retried_too(pipeline: Pipeline, latents: Tensor) -> None:
    pipeline.vae.bfloat16().decoder.conv_in.register_forward_hook(
        lambda part, given, y: y * (math.inf if y.dtype == BF16 else 1)
    )
    images, notes = decoded(pipeline.vae, latents, (BF16, FP32))
    assert torch.isfinite(images).all()
    assert notes == ("a picture was not finite when decoded in bfloat16, and was decoded again in float32",)


@pytest.mark.parametrize("types", [GPU, (BF16, FP32), (FP32,)], ids=str)
def test_what_is_finite_in_no_type(pipeline: Pipeline, latents: Tensor, types: tuple[torch.dtype, ...]) -> None:
    pipeline.vae.decoder.conv_out.bias.data[1] = math.nan
    with pytest.raises(NumericalError, match=r"^decode: the picture is not finite, even in float32; use another"):
        decoded(pipeline.vae.to(types[0]), latents, types)
    latents[1, 0, 0, 0] = math.inf
    with pytest.raises(NumericalError, match=r"^decode: the latents are not finite"):
        decoded(pipeline.vae, latents, types)


@pytest.mark.parametrize(
    ("dtype", "xl", "upcast", "bf16", "types"),
    [
        (FP32, True, True, True, (FP32,)),
        (BF16, True, True, True, (BF16, FP32)),
        (FP16, False, True, True, GPU),  # a config that does not say force_upcast means True, and nothing by it
        (FP16, True, False, True, GPU),  # SDXL with the autoencoder that was mended for float16
        (FP16, True, True, True, (BF16, FP32)),
        (FP16, True, True, False, (FP32,)),  # CUDA before Ampere
        (FP16, False, False, False, (FP16, FP32)),
        (BF16, True, True, False, (BF16, FP32)),
    ],
)
def test_types_on_cuda(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, xl: bool, upcast: bool, bf16: bool, types: Any
) -> None:
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: bf16)
    weight = SimpleNamespace(device=torch.device("cuda"), dtype=dtype)
    vae = SimpleNamespace(parameters=lambda: iter([weight]), config=SimpleNamespace(force_upcast=upcast))
    unet = SimpleNamespace(config=SimpleNamespace(projection_class_embeddings_input_dim=2816 * xl))
    assert decoding_types(unet, vae) == types


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_the_cpu_decodes_in_float32(pipeline: Pipeline, latents: Tensor, dtype: torch.dtype) -> None:
    """With the weights that the type left, and not a bit less; the estimate counts the copy of the decoder."""
    pipeline.to(dtype=dtype)
    with torch.inference_mode():
        expected = torch.cat([copy.deepcopy(pipeline.vae).float().decode(row[None]) for row in latents])
    assert torch.equal(pipeline.decode(latents), expected)
    tiny = AutoencoderTiny(TinyVAEConfig()).to(dtype)
    assert decoder_in(tiny, FP32).decode(latents[:1]).dtype == FP32
    assert {p.dtype for p in tiny.parameters()} == {dtype}
    single, half = (working_bytes(pipeline.unet, vae, 64, 64, 1) for vae in (copy.deepcopy(tiny).float(), tiny))
    copied = 4 * sum(p.numel() for p in tiny.decoder.parameters())
    assert half - single == (0 if dtype == FP32 else copied)


@torch.inference_mode()
def test_a_preview_of_what_overflows(pipeline: Pipeline) -> None:
    bad = poisoned(pipeline.vae)
    with pytest.raises(NumericalError, match="no preview can be made"):
        fit_latent_to_rgb(bad)
    assert all(torch.isfinite(part).all() for part in fit_latent_to_rgb(decoder_in(bad, FP32)))


# -- the commands ------------------------------------------------------------------------------------------------------


@pytest.fixture
def opens(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    """The model that every command opens."""
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda *_, **__: pipeline)
    return pipeline


def test_the_note_is_said_once(opens: Pipeline, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pictures from a decoder that overflows, as CUDA would decode them: both sound, and one line about it."""
    opens.vae = opens.components.vae = poisoned(opens.vae)
    monkeypatch.setattr("ldm.pipeline.decoding_types", lambda unet, vae: GPU)
    done = run("generate", "an owl", "-n", "2", "--seed", "1", "-o", "{seed}.png")
    note = "a picture was not finite when decoded in float16, and was decoded again in bfloat16"
    assert done.code == 0 and done.err.splitlines() == [f"note: {note}", "seed 1", "seed 2"]
    assert run("grid", "an owl", "--x", "seed=1,2", "-o", "sheet.png").err.splitlines()[0] == f"note: {note}"
    assert [opens("an owl", seed=seed).notes for seed in (1, 2)] == [(note,)] * 2
    monkeypatch.setattr("ldm.pipeline.decoding_types", decoding_types)
    sound = opens("an owl", seed=1, output_type="np")
    assert sound.notes == () and sound.latents.shape == (1, 4, 8, 8)
    for path in ("1.png", "2.png"):
        assert np.ptp(pixels(path)) > 32
    assert np.abs(pixels("1.png") - 255 * np.asarray(sound.images)[0]).max() <= 4


def test_no_file_of_a_picture_that_is_not_finite(opens: Pipeline, run: Any, tmp_path: Path) -> None:
    opens.vae.decoder.conv_out.bias.data[0] = math.nan
    refused(run("generate", "an owl", "--seed", "1", "--gif", "--strip"), 1, "decode: ", "not finite, even in float32")
    assert files(tmp_path) == []


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_nan_at_any_step(opens: Pipeline, run: Any, tmp_path: Path, scheduler: str, dtype: torch.dtype) -> None:
    """The step, the scheduler and the type are named, and no file is written."""
    bad, calls = 0, list[int]()

    def poison(network: UNet, given: Any, output: Tensor) -> Tensor:
        calls.append(len(calls) + 1)
        return output * (math.nan if calls[-1] == bad else 1)

    opens.to(dtype=dtype).unet.register_forward_hook(poison)
    name = str(dtype).removeprefix("torch.")
    for bad in range(1, 5):  # the hook reads it
        calls.clear()
        done = run("generate", "an owl", "--steps", "4", "--seed", "1", "--scheduler", scheduler)
        refused(done, 1, f"not finite after step {bad} of {scheduler} in {name}; use dtype fp32")
        assert len(calls) == bad and files(tmp_path) == []


# -- how near ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_types_are_near_float32(pipeline: Pipeline, dtype: torch.dtype) -> None:
    """The latents and the picture of a guided run: within 4 roundings of the type, of the largest value. The state of a
    run is float32 in any case, and so, on the CPU, is decoding.
    """
    options: dict[str, Any] = {"seed": 3, "num_inference_steps": 5, "guidance_scale": 3.0, "output_type": "np"}
    exact = pipeline("an owl", **options)
    rounded = pipeline.to(dtype=dtype)("an owl", **options)
    assert rounded.latents.dtype == FP32
    assert 0 < far(rounded.latents, exact.latents) <= 4 * EPS[dtype]
    assert np.abs(np.asarray(rounded.images) - np.asarray(exact.images)).max() <= 4 * EPS[dtype]


# -- what stays in float32 ---------------------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_attention_holds_scores_beyond_float16(dtype: torch.dtype) -> None:
    """diffusers' `upcast_attention` (Stable Diffusion 2.1) is for scores taken in float16; here they never are."""
    attention = Attention(32, 32, 2)
    attention.to_q.weight.mul_(300)
    attention.to_k.weight.mul_(300)
    attention.to(dtype)
    x = torch.randn(1, 50, 32).to(dtype)
    q, k, v = (attention._split(part(x)) for part in (attention.to_q, attention.to_k, attention.to_v))
    scores = q.double() @ k.double().mT
    assert scores.abs().max() > LARGEST and q.abs().max() < LARGEST
    if dtype == FP16:
        assert not torch.isfinite(torch.softmax(q @ k.mT, -1)).all()
    expected = torch.softmax(scores / 4, -1) @ v.double()
    exact = copy.deepcopy(attention.to_out[0]).double()(expected.transpose(1, 2).flatten(2))
    assert far(attention(x), exact) <= 4 * EPS[dtype]


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_norms_hold_sums_beyond_float16(dtype: torch.dtype) -> None:
    """Of values whose sum, and whose squares, float16 cannot hold."""
    x = (2e4 + 1e4 * torch.randn(2, 8, 16, 16)).clamp(-6e4, 6e4).to(dtype)
    for norm, exact in (
        (torch.nn.GroupNorm(2, 8), lambda x: torch.nn.functional.group_norm(x, 2)),
        (torch.nn.LayerNorm(16), lambda x: torch.nn.functional.layer_norm(x, (16,))),
    ):
        assert far(norm.to(dtype)(x), exact(x.double())) <= 2 * EPS[dtype]


@torch.inference_mode()
def test_times_and_sizes_are_heard_in_full(pipeline: Pipeline) -> None:
    """Times and SDXL's sizes are not rounded before their sinusoids: bfloat16 lacks most whole numbers beyond 256."""
    t = torch.arange(1000)
    angles = t[:, None].double() * 10000 ** (-torch.arange(16).double() / 16)
    assert far(timestep_embedding(t, 32), torch.cat([angles.cos(), angles.sin()], -1)) <= 1e-4
    assert torch.tensor(997.0, dtype=BF16) == torch.tensor(996.0, dtype=BF16)
    unet, x, text = pipeline.unet.bfloat16(), torch.randn(1, 4, 4, 4).to(BF16), torch.randn(1, 7, 32).to(BF16)
    assert not torch.equal(unet(x, torch.tensor([996]), text), unet(x, torch.tensor([997]), text))
    added = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 32 + 48}
    xl = UNet(dataclasses.replace(unet.config, **added)).bfloat16()
    pooled, sizes = text[:, 0], torch.tensor([[511.0, 511, 0, 0, 511, 511]])
    told = [xl.prepare(text, pooled, size).added[0] for size in (sizes, sizes + 1)]
    assert not torch.equal(*told)


@torch.inference_mode()
def test_float16_is_as_near_as_diffusers(pipeline: Pipeline) -> None:
    """A U-Net whose config asks for `upcast_attention`, with scores beyond float16, beside diffusers' own processor
    that heeds it.
    """
    import diffusers
    from diffusers.models.attention_processor import AttnProcessor

    us, largest = pipeline.unet, list[float]()
    for name, part in us.named_modules():
        if name.endswith(("attn1.to_q", "attn1.to_k")):
            part.weight.mul_(400)
            part.register_forward_hook(lambda part, given, y: largest.append(float(y.square().sum(-1).max())))
    them = diffusers.UNet2DConditionModel.from_config(us.config.to_dict() | {"upcast_attention": True}).eval()
    them.load_state_dict(us.state_dict())
    them.set_attn_processor(AttnProcessor())
    x, t, text = torch.randn(1, 4, 5, 7), torch.tensor([501]), torch.randn(1, 7, 32)
    exact = us(x, t, text)
    assert min(largest) > LARGEST  # of q . q and k . k, over the channels
    assert far(exact, them(x, t, text).sample) <= 1e-5
    ours, theirs = (net.half()(x.half(), t, text.half()) for net in (us, them))
    assert far(ours, exact) <= max(8 * EPS[FP16], 2 * far(theirs.sample, exact))
