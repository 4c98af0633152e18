"""Pictures of any size: exactly as large as asked for, and the very pixels of the size that fills their latents."""

import dataclasses
import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import files, pixels, refused, texts_in
from PIL import Image

from ldm.checkpoints.folder import open_folder
from ldm.errors import UsageError
from ldm.models.clip import CLIPTextConfig, CLIPTextModel
from ldm.models.tiny_vae import AutoencoderTiny, TinyVAEConfig
from ldm.models.unet import CROSS, PLAIN, UNet, UNetConfig
from ldm.models.vae import AutoencoderKL, VAEConfig
from ldm.pipeline import Pipeline
from ldm.runtime import latent_sides, working_bytes

pytestmark = pytest.mark.usefixtures("one_thread")
UNET = UNetConfig(
    sample_size=4, block_out_channels=(8, 8, 16, 16), down_block_types=(PLAIN, CROSS, PLAIN, CROSS), layers_per_block=1,
    num_heads=(2, 2, 2, 2), transformer_layers_per_block=(1, 1, 1, 1), cross_attention_dim=32, norm_num_groups=4,
)  # fmt: skip
F8 = VAEConfig(block_out_channels=(4, 4, 4, 8), layers_per_block=1, norm_num_groups=2)
Size = tuple[int, int]


@pytest.fixture(scope="module")
def pipeline(model: Path) -> Pipeline:
    """A model of the depth and factor of Stable Diffusion: four levels, and 8 pixels a latent."""
    torch.manual_seed(1)
    parts = open_folder(model, torch.float32, torch.device("cpu"))
    return Pipeline(dataclasses.replace(parts, unet=UNet(UNET).eval(), vae=AutoencoderKL(F8).eval()))


def drawn(pipeline: Pipeline, size: Size, output_type: str = "np", **options: Any) -> Any:
    """What one step draws; size: (height, width)."""
    options = {"prompt": "an owl", "num_inference_steps": 1, "guidance_scale": 1, "seed": 3} | options
    return pipeline(height=size[0], width=size[1], output_type=output_type, **options)


@pytest.mark.parametrize("count", [320, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_sizes(pipeline: Pipeline, count: int) -> None:
    """Each has exactly the size asked for, in every kind of picture, and none is constant: decoded from noise, every
    fortieth drawn.
    """
    shallow = dataclasses.replace(
        UNET, block_out_channels=(8,), down_block_types=(PLAIN,), num_heads=(2,), transformer_layers_per_block=(1,)
    )
    narrow = VAEConfig(
        block_out_channels=(2, 2, 2, 4), layers_per_block=1, norm_num_groups=1, mid_block_add_attention=False
    )
    nets = {"unet": UNet(shallow).eval(), "vae": AutoencoderKL(narrow).eval()}
    pipeline = Pipeline(dataclasses.replace(pipeline.components, **nets))
    numbers, wrong = random.Random(0), []
    for i in range(count):
        height, width, kind = numbers.randint(1, 48), numbers.randint(1, 48), ("pil", "pt", "np")[i % 3]
        latents = torch.randn(1, 4, (height + 7) // 8, (width + 7) // 8)
        if i % 40:
            (picture,) = pipeline.pictures(latents, kind, (height, width))
        else:
            result = drawn(pipeline, (height, width), kind)
            (picture,) = result.images
            assert result.latents.shape == latents.shape
        found = (*picture.size[::-1], 3) if isinstance(picture, Image.Image) else tuple(picture.shape)
        expected = (3, height, width) if kind == "pt" else (height, width, 3)
        if found != expected or np.ptp(np.asarray(picture)) == 0:
            wrong.append((height, width, kind, found))
    assert wrong == []


@pytest.mark.parametrize("size", [(16, 24), (9, 24), (16, 17), (13, 19), (1, 24), (1, 1)], ids=str)
def test_a_picture_is_part_of_the_one_that_fills_its_latents(pipeline: Pipeline, size: Size) -> None:
    """Upper left, bit for bit, of what the autoencoder makes of its latents; so a multiple of 8 is all of that."""
    whole = tuple(8 * -(-side // 8) for side in size)
    options = {"guidance_scale": 5.0, "num_inference_steps": 3}
    small, large = (drawn(pipeline, each, **options) for each in (size, whole))
    assert torch.equal(small.latents, large.latents)
    assert large.images.shape == (1, *whole, 3)
    assert np.array_equal(small.images, large.images[:, : size[0], : size[1]])
    with torch.inference_mode():
        expected = (pipeline.vae.decode(large.latents) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(large.images, expected)
    given = drawn(pipeline, size, latents=torch.randn(1, 4, *latent_sides(*size, 8)))
    assert given.images.shape == (1, *size, 3)
    assert drawn(pipeline, size, "latent").images.shape == (1, 4, whole[0] // 8, whole[1] // 8)


def test_every_latent_size_is_diffusers(pipeline: Pipeline) -> None:
    """All residues of both sides, modulo the 8 latents of the deepest pixel, from a single latent on."""
    import diffusers

    them = diffusers.UNet2DConditionModel.from_config(pipeline.unet.config.to_dict()).eval()
    them.load_state_dict(pipeline.unet.state_dict())
    context, t, far = torch.randn(1, 7, 32), torch.tensor([501]), dict[Size, float]()
    with torch.inference_mode():
        for height, width in itertools.product(range(1, 9), repeat=2):
            x = torch.randn(1, 4, height, width)
            expected = them(x, t, context).sample
            result = pipeline.unet(x, t, context)
            assert result.shape == expected.shape == x.shape
            far[height, width] = float((result - expected).abs().max() / expected.abs().max())
    assert max(far.values()) <= 1e-5, far


def test_tiny_autoencoders_too(pipeline: Pipeline) -> None:
    kept, pipeline.vae = pipeline.vae, AutoencoderTiny(TinyVAEConfig(
        encoder_block_out_channels=(4,) * 4, decoder_block_out_channels=(4,) * 4, num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    ))  # fmt: skip
    try:
        assert drawn(pipeline, (13, 21)).images.shape == (1, 13, 21, 3)
    finally:
        pipeline.vae = kept


# -- the smallest ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["first level", "third level", "autoencoder", "none"])
def lone(request: pytest.FixtureRequest, pipeline: Pipeline) -> tuple[Pipeline, int]:
    """Models some of whose GroupNorms have one channel a group, and the smallest longer side in pixels."""
    groups = {"first level": (4, 8, 8, 8), "third level": (8, 8, 4, 8)}.get(request.param, (8, 8, 8, 8))
    unet = UNet(dataclasses.replace(UNET, block_out_channels=groups)).eval()
    vae = dataclasses.replace(F8, block_out_channels=(4, 4, 4, 4), norm_num_groups=4)
    decoder = AutoencoderKL(vae).eval() if request.param == "autoencoder" else pipeline.vae
    parts = dataclasses.replace(pipeline.components, unet=unet, vae=decoder)
    # A level is one pixel up to 2 ** level latents, and the next one down reads a narrow level's channels too.
    least = {"first level": 2 * 8 + 1, "third level": 8 * 8 + 1, "autoencoder": 8 + 1, "none": 1}[request.param]
    return Pipeline(parts), least


def test_the_smallest(lone: tuple[Pipeline, int]) -> None:
    """What is drawn, and what is refused in one sentence, is told apart at the pixel where the network gives up."""
    pipeline, least = lone
    assert drawn(pipeline, (1, least)).images.shape == (1, 1, least, 3)
    assert drawn(pipeline, (least, 1)).images.shape == (1, least, 1, 3)
    if least > 1:
        with pytest.raises(UsageError, match=rf"size {least - 1}x1; the longer side must be at least {least} for this"):
            drawn(pipeline, (1, least - 1))
        with pytest.raises(ValueError, match="more than 1 value per channel"), torch.inference_mode():
            x = torch.randn(1, 4, 1, least // 8)
            pipeline.vae.decode(pipeline.unet(x, torch.tensor([1]), torch.randn(1, 7, 32)))


# -- what else hears of the size ---------------------------------------------------------------------------------------


def test_sdxl_is_told_the_true_size(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = CLIPTextConfig(
        vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, projection_dim=32,
    )  # fmt: skip
    parts, added = pipeline.components, {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 32 + 48}
    unet = UNet(dataclasses.replace(UNET, cross_attention_dim=64, **added)).eval()
    second = {"text_encoder_2": CLIPTextModel(clip).eval(), "tokenizer_2": parts.tokenizer}
    xl, heard = Pipeline(dataclasses.replace(parts, unet=unet, **second)), []
    prepare = unet.prepare
    monkeypatch.setattr(unet, "prepare", lambda *told: heard.append(told[2]) or prepare(*told))
    assert drawn(xl, (13, 21), guidance_scale=5).images.shape == (1, 13, 21, 3)
    assert heard[0].tolist() == [[13, 21, 0, 0, 13, 21]] * 2


def test_the_safety_checker_sees_the_picture(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is cut off is not judged, and a flagged picture of any size is black."""
    seen: list[Any] = []
    monkeypatch.setattr("ldm.pipeline.flagged", lambda checker, images: seen.extend(images) or (True,))
    monkeypatch.setattr(pipeline.components, "safety_checker", torch.nn.Identity())
    result = drawn(pipeline, (13, 21), "pil")
    assert [image.size for image in seen] == [(21, 13)] == [image.size for image in result.images]
    assert result.flagged == (True,) and not np.asarray(result.images[0]).any()


def test_the_estimate_counts_whole_latents(pipeline: Pipeline) -> None:
    """511 pixels take what 512 take but for the picture itself: 3 channels, 8 bytes each."""
    odd, whole = (working_bytes(pipeline.unet, pipeline.vae, side, side, 1) for side in (511, 512))
    assert whole - odd == (512**2 - 511**2) * 3 * 8


def test_a_part_larger_than_the_images_is_refused(pipeline: Pipeline) -> None:
    with pytest.raises(UsageError, match=r"latents of 24x16 pixels for a picture of 25x16; give larger ones"):
        pipeline.pictures(torch.zeros(1, 4, 2, 3), size=(16, 25))


@pytest.mark.usefixtures("quick")
def test_the_commands_draw_any_size(run, draw, model: Path, tmp_path: Path) -> None:
    """The file, its text, its strip and animation, drawing it again, and a sheet over sizes."""
    draw("an owl", "--size", "17x13", "--seed", "7", "-o", "a.png", "--strip", "--gif", "--steps", "3")
    assert pixels("a.png").shape == (13, 17, 3)
    assert "Size: 17x13" in texts_in("a.png")["parameters"]
    with Image.open("a.gif") as gif, Image.open("a.strip.png") as strip:
        assert gif.size == (17, 13) and strip.size == (3 * 17 + 4 * 2, 13 + 2 * 2)
    done = run("verify", "a.png", "--model", model)
    assert (done.code, done.out) == (0, "equal: every pixel is as it was drawn\n")
    draw("--from", "a.png", "-o", "b.png")
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    done = run("grid", "--x", "width=5,17", "--y", "height=1..3", "an owl", "--model", model, "-o", "sheet.png")
    assert done.code == 0, done.err
    refused(run("generate", "a", "--size", "0x13", "--model", model, "-o", "c.png"), 2, "width is 0")
    assert files(tmp_path) == ["a.gif", "a.png", "a.strip.png", "b.png", "sheet.png"]
