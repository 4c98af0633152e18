"""Previews against closed forms, an escape-code parser written here, and Pillow reading the files back."""

import io
import re
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ldm.errors import NumericalError, UsageError
from ldm.models.vae import AutoencoderKL, VAEConfig
from ldm.preview import animation, chosen, fit_latent_to_rgb, half_blocks, preview_image, strip

CODE = re.compile(r"\x1b\[([\d;]*)m|(.)", re.S)
WHITE = (255, 255, 255)


class LinearDecoder(nn.Module):
    """Each latent pixel becomes 4 x 4 pixels of one colour, its linear map, and a pattern whose mean is 0."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.config = SimpleNamespace(latent_channels=6)
        self.weight = nn.Parameter(torch.randn(6, 3, generator=generator) * scale)
        self.bias = nn.Parameter(torch.randn(3, generator=generator))

    def decode(self, latents: Tensor) -> Tensor:
        colours = torch.einsum("nchw,cr->nrhw", latents, self.weight) + self.bias[:, None, None]
        pattern = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(2 * latents.shape[2], 2 * latents.shape[3])
        return F.interpolate(colours, scale_factor=4) + pattern


def small_vae() -> AutoencoderKL:
    torch.manual_seed(2)
    return AutoencoderKL(VAEConfig(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, sample_size=16))


def random_picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def gradient(side: int, shift: int) -> Image.Image:
    """Smooth and colourful: thousands of different colours."""
    y, x = np.mgrid[:side, :side] * 255 // (side - 1)
    return Image.fromarray(np.stack([x, y, np.abs(x - y + shift) % 256], -1).astype(np.uint8))


# -- latents -> colours -----------------------------------------------------------------------------------------------


def test_fit_recovers_a_linear_decoder():
    vae = LinearDecoder()
    weight, bias = fit_latent_to_rgb(vae)  # type: ignore[arg-type]
    torch.testing.assert_close(weight, vae.weight.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bias, vae.bias.detach(), rtol=1e-4, atol=1e-5)


def test_fit_explains_colours_that_it_did_not_see():
    """Smooth latents of another kind and size, decoded by a random network, which is far from linear: the fit still
    errs less than the mean does.
    """
    vae = small_vae()
    weight, bias = fit_latent_to_rgb(vae)
    generator = torch.Generator().manual_seed(9)
    latents = F.interpolate(torch.randn(4, 4, 3, 3, generator=generator), (12, 12), mode="bilinear")
    with torch.no_grad():
        colours = F.avg_pool2d(vae.decode(latents), 2)
    guess = torch.einsum("nchw,cr->nrhw", latents, weight) + bias[:, None, None]
    spread = (colours - colours.mean((0, 2, 3), keepdim=True)).square().mean()
    assert (colours - guess).square().mean() < 0.9 * spread
    assert not weight.requires_grad and weight.dtype == torch.float32


def test_fit_depends_on_vae_and_seed_alone():
    torch.manual_seed(3)
    vae = small_vae()
    first = fit_latent_to_rgb(vae)
    torch.rand(5)
    again, other = fit_latent_to_rgb(vae), fit_latent_to_rgb(vae, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_fit_refuses_a_decoder_that_overflows():
    with pytest.raises(NumericalError, match="not finite"):
        fit_latent_to_rgb(LinearDecoder(scale=float("inf")))  # type: ignore[arg-type]


def test_preview_is_the_map():
    weight = torch.tensor([[1.0, 0.0, -1.0], [0.0, 0.5, 0.0]])
    bias = torch.tensor([0.0, 0.0, 1.0])
    latents = torch.tensor([[[0.0, 1.0, -3.0]], [[2.0, -2.0, 0.0]]], dtype=torch.bfloat16)
    picture = preview_image(latents, (weight, bias))
    assert (picture.size, picture.mode) == ((3, 1), "RGB")
    assert np.asarray(picture).tolist() == [[[128, 255, 255], [255, 0, 128], [0, 128, 255]]]  # clamped to [-1, 1]


def test_preview_refuses_other_latents():
    to_rgb = torch.zeros(4, 3), torch.zeros(3)
    for shape in [(1, 4, 8, 8), (3, 8, 8)]:
        with pytest.raises(UsageError, match=r"a preview takes \[4, height, width\]"):
            preview_image(torch.zeros(shape), to_rgb)
    with pytest.raises(NumericalError, match="not finite"):
        preview_image(torch.full((4, 2, 2), torch.nan), to_rgb)


# -- the terminal -----------------------------------------------------------------------------------------------------


def terminal_pixels(text: str) -> list[list[tuple[int, ...] | None]]:
    """What a terminal shows: two rows of pixels a line; None is its own background. Each line must end in a reset."""
    rows = []
    for line in text.split("\n"):
        upper, lower, grounds = [], [], {38: None, 48: None}
        for codes, character in CODE.findall(line):
            if character:
                assert character == "\u2580"
                upper.append(grounds[38])
                lower.append(grounds[48])
            elif codes == "0":
                grounds = {38: None, 48: None}
            else:
                numbers = [int(number) for number in codes.split(";")]
                for ground, two, *colour in zip(*[iter(numbers)] * 5, strict=True):
                    assert ground in grounds and two == 2
                    grounds[ground] = tuple(colour)
        assert grounds == {38: None, 48: None}
        rows += [upper, lower]
    return rows


@pytest.mark.parametrize("height", [6, 7])
def test_half_blocks_are_the_pixels(height):
    image = random_picture(5, height)
    image.paste((9, 9, 9), (1, 0, 4, 4))  # equal neighbours
    expected = [[tuple(pixel) for pixel in row] for row in np.asarray(image).tolist()]
    assert terminal_pixels(half_blocks(image, 5)) == expected + [[None] * 5] * (height % 2)


@pytest.mark.parametrize(
    ("size", "columns", "shown"),
    [
        ((100, 50), 40, (40, 20)),
        ((16, 12), 48, (48, 36)),
        ((16, 12), 47, (32, 24)),
        ((500, 3), 10, (10, 1)),
        ((3, 9), 1, (1, 3)),
    ],
)
def test_half_blocks_keep_the_aspect(size, columns, shown):
    text = half_blocks(random_picture(*size), columns)
    rows = terminal_pixels(text)
    assert {len(row) for row in rows} == {shown[0]} and len(rows) == shown[1] + shown[1] % 2


def test_half_blocks_enlarge_without_blur():
    image = random_picture(4, 4)
    rows = terminal_pixels(half_blocks(image, 9))
    assert rows == [[tuple(p) for p in np.asarray(image)[y // 2, [0, 0, 1, 1, 2, 2, 3, 3]].tolist()] for y in range(8)]


def test_half_blocks_without_colour():
    image = Image.new("L", (4, 3))
    image.putdata([255, 255, 0, 0, 255, 0, 255, 0, 255, 0, 0, 255])
    assert half_blocks(image, 4, colour=False) == "█▀▄ \n▀  ▀"
    grey = half_blocks(Image.new("RGB", (64, 64), (64, 64, 64)), 64, colour=False)
    lit = 2 * grey.count("█") + grey.count("▀") + grey.count("▄")
    assert abs(lit / 64**2 - 64 / 255) < 0.02 and "\x1b" not in grey


def test_half_blocks_need_a_column():
    with pytest.raises(UsageError, match="0 columns"):
        half_blocks(random_picture(2, 2), 0)


# -- strip and animation ----------------------------------------------------------------------------------------------


def test_strip_is_one_row_with_white_gaps():
    pictures = [random_picture(5, 4), random_picture(3, 4)]
    row = np.asarray(strip(pictures))
    assert row.shape == (4 + 2 * 2, 2 * 5 + 3 * 2, 3)
    assert (row[2:6, 2:7] == np.asarray(pictures[0])).all()
    assert (row[2:6, 10:13] == np.asarray(pictures[1])).all()  # in the middle of its cell
    rest = row.copy()
    rest[2:6, 2:7] = rest[2:6, 10:13] = 255
    assert (rest == 255).all()


def test_strip_of_a_height():
    row = strip([Image.new("RGB", (8, 4), "red"), Image.new("RGB", (40, 20), "blue")], height=10)
    assert row.size == (2 * 20 + 3 * 2, 10 + 2 * 2)
    assert [row.getpixel((x, 7)) for x in (2, 21, 22, 23, 24, 43)] == [
        (255, 0, 0), (255, 0, 0), WHITE, WHITE, (0, 0, 255), (0, 0, 255)
    ]  # fmt: skip
    for images, height in [([], None), ([], 5), ([random_picture(2, 2)], 0)]:
        with pytest.raises(UsageError, match="at least one"):
            strip(images, height)


def test_animation_is_read_back():
    frames = [gradient(48, shift) for shift in (0, 60, 120, 180)]
    with Image.open(io.BytesIO(animation(frames))) as gif:
        assert (gif.format, gif.n_frames, gif.info["loop"], gif.size) == ("GIF", 4, 0, (48, 48))
        durations = []
        for i, frame in enumerate(frames):
            gif.seek(i)
            durations.append(gif.info["duration"])
            shown, true = (np.asarray(image.convert("RGB"), dtype=float) for image in (gif, frame))
            blocks = (shown - true).reshape(12, 4, 12, 4, 3).mean((1, 3))  # the eye's view of diffused errors
            assert np.abs(blocks).mean() < 2 and np.abs(shown - true).mean() < 10
    assert durations == [100, 100, 100, 2000]


def test_animation_of_equal_frames_lasts_as_long():
    still, other = gradient(16, 0), gradient(16, 99)
    with Image.open(io.BytesIO(animation([still, other, other, other]))) as gif:
        assert gif.n_frames == 2
        gif.seek(1)
        assert gif.info["duration"] == 2200


def test_animation_takes_one_size():
    for images in ([], [random_picture(2, 2), random_picture(2, 3)]):
        with pytest.raises(UsageError, match="all of one size"):
            animation(images)


# -- which steps ------------------------------------------------------------------------------------------------------


def test_chosen_steps_are_even():
    assert chosen(9, 3) == [0, 4, 8]
    assert chosen(5, 8) == chosen(5, 5) == [0, 1, 2, 3, 4]
    assert chosen(10, 1) == [9]
    assert chosen(1, 1) == [0]
    for steps in range(3, 60):
        for most in range(2, steps):
            found = chosen(steps, most)
            gaps = {b - a for a, b in pairwise(found)}
            assert len(found) == most and (found[0], found[-1]) == (0, steps - 1)
            assert max(gaps) - min(gaps) <= 1 <= min(gaps)


def test_chosen_needs_steps():
    for steps, most in [(0, 1), (1, 0)]:
        with pytest.raises(UsageError, match="at least one of each"):
            chosen(steps, most)
