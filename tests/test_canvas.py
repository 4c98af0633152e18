"""Canvases: what the network sees of a picture, and that what the mask keeps comes back byte for byte."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from test_pictures import patches

import ldm.canvas
import ldm.request
from ldm.canvas import FILLS, FITS, PADS, Canvas, canvas_of, extended, filled, fitted, margins, window
from ldm.errors import NumericalError, UsageError
from ldm.images import to_pil, to_tensor
from ldm.inputs import source_of, tensor_of
from ldm.masks import faded, grown, mask_of

rng = np.random.default_rng(0)
PLAIN = {
    "extend": None, "fill": None, "fit": None, "size": (None, None), "native": (64, 64), "padding": None, "grow": 0,
    "feather": 0, "invert": False, "seed": 0,
}  # fmt: skip


def random_image(mode: str = "RGB", width: int = 96, height: int = 64) -> Image.Image:
    """Of every value of 0..255 in every channel."""
    array = rng.integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    assert all(len(np.unique(array[..., i])) == 256 for i in range(len(mode)))
    return Image.fromarray(array)


def bytes_of(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def canvas(image: Image.Image, mask: torch.Tensor | None, **changes) -> Canvas:
    return canvas_of(source_of(image), mask, **{**PLAIN, **changes})


# -- larger canvases --------------------------------------------------------------------------------------------------


def test_margins():
    assert margins("left=128,top=64", 512, 384) == (128, 64, 0, 0)
    assert margins("bottom=10%, right=50%", 512, 384) == (0, 0, 256, 38)
    assert margins(" left=0 right=7 ", 512, 384) == (0, 0, 7, 0)
    assert ldm.canvas.LARGEST_SIDE == ldm.request.LARGEST_SIDE
    assert margins("left=15872", 512, 384) == (15872, 0, 0, 0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "unknown side ''; known: left, top, right, bottom"),
        ("lefft=3", "did you mean 'left'?"),
        ("left=3,left=4", "names left twice"),
        ("left=-3", "'-3' is no number of pixels; give left=128 or left=25%"),
        ("left=1.5", "'1.5' is no number of pixels"),
        ("left", "'' is no length"),
        ("left=nan", "'nan' is no length"),
        ("left=0", "which makes 512 x 384 pixels of 512 x 384; a side must grow, and 16384 pixels are the most"),
        ("left=15873", "which makes 16385 x 384 pixels of 512 x 384"),
        ("top=100000%", "which makes 512 x 384384"),
    ],
)
def test_margins_that_are_refused(text, said):
    with pytest.raises(UsageError) as error:
        margins(text, 512, 384)
    assert said in str(error.value)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_extended_keeps_the_picture(mode):
    """What is new repeats the edge or mirrors the picture, as numpy pads."""
    image = random_image(mode)
    for fill, how in (("edge", "edge"), ("mirror", "reflect")):
        for left, top, right, bottom in ((5, 3, 0, 7), (0, 0, 200, 0), (100, 64, 1, 150)):
            larger, mask = extended(image, (left, top, right, bottom), fill)
            around = ((top, bottom), (left, right), (0, 0))
            assert larger.mode == mode and np.array_equal(bytes_of(larger), np.pad(bytes_of(image), around, how))
            assert np.array_equal(bytes_of(larger)[top : top + 64, left : left + 96], bytes_of(image))
            assert torch.equal(
                mask, torch.from_numpy(np.pad(np.zeros((64, 96), np.float32), around[:2], constant_values=1))
            )


# -- fills ------------------------------------------------------------------------------------------------------------

MASKS = ["box:10,10,60,50", "ellipse:-20,5,50,90", "box:0,0,96,30+polygon:60,64,96,64,96,20", "box:0,0,96,64"]


@pytest.mark.parametrize("how", FILLS)
def test_fills_leave_what_is_kept(how):
    image = random_image("RGBA")
    white = bytes_of(to_pil(to_tensor([image]))[0])
    for words in MASKS:
        mask = mask_of(words, image) * 0.01  # as soon as the mask is above 0
        result = filled(image, mask, how, 3)
        assert result.mode == "RGB" and np.array_equal(bytes_of(result)[mask == 0], white[mask == 0])
        changed = not np.array_equal(bytes_of(result), white)
        assert changed == (how in ("smooth", "noise", "gray"))


def test_fills_by_their_rules():
    image, mask = random_image(), torch.zeros(64, 96)
    mask[10:50, 20:80] = 1
    inside = mask.numpy() == 1
    assert (bytes_of(filled(image, mask, "gray", 0))[inside] == 128).all()
    noise = [bytes_of(filled(image, mask, "noise", seed))[inside] for seed in (1, 1, 2, 2**63 - 1)]
    assert np.array_equal(noise[0], noise[1]) and not np.array_equal(noise[0], noise[2])
    assert abs(noise[0].mean() - 127.5) < 4 * 73.9 / np.sqrt(noise[0].size)  # of the uniform distribution
    with pytest.raises(UsageError, match="unknown fill 'smoth'; did you mean 'smooth'"):
        filled(image, mask, "smoth", 0)


@pytest.mark.parametrize("words", MASKS[:3])
def test_smooth_stays_between_what_is_around(words):
    """Every colour is a mean of known ones; one colour stays itself; a ramp goes on from side to side."""
    for colour in ((0, 0, 0), (255, 255, 255), (1, 128, 254), (13, 77, 201)):
        flat = Image.new("RGB", (96, 64), colour)
        mask = mask_of(words, flat)
        spoilt = bytes_of(flat).copy()
        spoilt[mask.numpy() == 1] = rng.integers(0, 256, 3)  # what is under the mask plays no part
        assert filled(Image.fromarray(spoilt), mask, "smooth", 0).getcolors() == [(96 * 64, colour)]
    narrow = Image.fromarray(rng.integers(90, 130, (64, 96, 3), dtype=np.uint8))
    new = bytes_of(filled(narrow, mask, "smooth", 0))
    known = bytes_of(narrow)[mask.numpy() == 0]
    assert (new.reshape(-1, 3) >= known.min(0)).all() and (new.reshape(-1, 3) <= known.max(0)).all()


def test_smooth_follows_a_ramp():
    """Nearer to the harmonic continuation, here the ramp itself, than one mean colour would be; no step at the rim."""
    ramp = np.repeat(np.linspace(20, 230, 96)[None], 64, 0).round().astype(np.uint8)
    image = Image.fromarray(np.dstack([ramp, ramp, 255 - ramp]))
    mask = mask_of("box:24,10,72,54", image)
    new = bytes_of(filled(image, mask, "smooth", 0)).astype(float)
    inside = mask.numpy() == 1
    error = np.abs(new - bytes_of(image).astype(float))[inside]
    assert error.mean() < np.abs(ramp[inside] - 125.0).mean() / 3
    assert np.abs(np.diff(new, axis=1)).max() < 10  # levels from pixel to pixel; the ramp has 2.2


def test_nothing_known_is_gray():
    image = random_image()
    assert filled(image, torch.ones(64, 96), "smooth", 0).getcolors() == [(96 * 64, (128, 128, 128))]
    assert filled(Image.new("RGB", (1, 1)), torch.ones(1, 1), "smooth", 0).getpixel((0, 0)) == (128, 128, 128)


# -- windows and fits -------------------------------------------------------------------------------------------------


def test_windows():
    mask = torch.zeros(300, 400)
    assert window(mask, 10, (64, 64)) == (0, 0, 400, 300)
    mask[100:140, 200:220] = 0.5
    assert window(mask, 0, (64, 64)) == (190, 100, 230, 140)
    assert window(mask, 0, (40, 20)) == (200, 100, 220, 140)
    assert window(mask, 5, (64, 64)) == (185, 95, 235, 145)
    assert window(mask, 0, (64, 128)) == (170, 100, 250, 140)
    assert window(mask, 0, (10, 200)) == (0, 100, 400, 140)  # 800 x 40 does not fit
    mask[:] = 0
    mask[0:30, 380:400] = 1
    assert window(mask, 0, (64, 64)) == (370, 0, 400, 30)
    assert window(mask, 8, (64, 64)) == (362, 0, 400, 38)


def test_windows_hold_the_mask_and_stay_inside():
    for _ in range(300):
        height, width = rng.integers(1, 200, 2)
        mask = torch.zeros(int(height), int(width))
        y, x = rng.integers(0, height, 2), rng.integers(0, width, 2)
        mask[y.min() : y.max() + 1, x.min() : x.max() + 1] = 1
        size, padding = (int(rng.integers(1, 40)) * 8, int(rng.integers(1, 40)) * 8), int(rng.integers(0, 30))
        left, top, right, bottom = window(mask, padding, size)
        assert 0 <= left <= max(x.min() - padding, 0) and min(x.max() + 1 + padding, width) <= right <= width
        assert 0 <= top <= max(y.min() - padding, 0) and min(y.max() + 1 + padding, height) <= bottom <= height
        across, down = (right - left) / size[1], (bottom - top) / size[0]
        if across < down - 0.5 / min(size) - 1e-9:  # by more than half a pixel
            assert right - left == width  # as wide as it goes
        if down < across - 0.5 / min(size) - 1e-9:
            assert bottom - top == height


def test_fits():
    image = random_image()
    assert FITS == ("stretch", "crop", "pad")
    lanczos = Image.Resampling.LANCZOS
    assert np.array_equal(bytes_of(fitted(image, (40, 40), "stretch")), bytes_of(image.resize((40, 40), lanczos)))
    for size in ((40, 40), (64, 192), (31, 17)):
        cut = ImageOps.fit(image, size[::-1], lanczos)
        assert np.array_equal(bytes_of(fitted(image, size, "crop")), bytes_of(cut))
    small = np.pad(bytes_of(image.resize((48, 32), lanczos)), ((8, 8), (0, 0), (0, 0)), "edge")
    assert np.array_equal(bytes_of(fitted(image, (48, 48), "pad")), small)
    for fit in FITS:
        assert np.array_equal(bytes_of(fitted(image, (64, 96), fit)), bytes_of(image))
        for size in ((1, 1), (7, 300), (300, 7)):
            assert fitted(image, size, fit).size == size[::-1]
            for mode in ("L", "F", "RGBA"):
                assert fitted(image.convert(mode), size, fit).mode == mode
    with pytest.raises(UsageError, match="unknown fit 'fill'"):
        fitted(image, (8, 8), "fill")


def test_masks_are_fitted_within_their_range():
    hard = Image.fromarray((bytes_of(mask_image()) > 0).astype(np.float32))
    for size in ((200, 300), (20, 31)):
        levels = bytes_of(fitted(hard, size, "stretch"))
        assert levels.dtype == np.float32 and levels.min() >= 0 and levels.max() <= 1 + 1e-6


def mask_image() -> Image.Image:
    return Image.fromarray((mask_of("ellipse:20,10,70,50", random_image()) * 255).byte().numpy())


# -- canvases ---------------------------------------------------------------------------------------------------------


def test_a_picture_without_a_mask():
    image = random_image("RGBA")
    made = canvas(image, None)
    assert made.size == (64, 96) and made.freedom is None and made.window == (0, 0, 96, 64)
    assert np.array_equal(bytes_of(made.seen), bytes_of(to_pil(to_tensor([image]))[0]))
    drawn = torch.rand(2, 3, 64, 96)
    assert made.pasted(drawn) is drawn


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("feather", [0, 3, 40])
@pytest.mark.parametrize("padding", [None, 4])
@pytest.mark.parametrize("words", MASKS)
def test_what_is_kept_is_kept(mode, feather, padding, words):
    """Byte for byte, alpha too, for every picture of a batch; and again when its result is edited again."""
    image = random_image(mode)
    kept = bytes_of(image).copy()
    mask = mask_of(words, image)
    outside = mask.numpy() == 0
    for _ in range(3):
        made = canvas(image, mask, feather=feather, padding=padding)
        assert made.size == ((64, 96) if padding is None else (64, 64))
        results = to_pil(made.pasted(torch.rand(2, 3, *made.size) * 4 - 2))
        assert [result.mode for result in results] == [mode, mode]
        for result in results:
            assert np.array_equal(bytes_of(result)[outside], kept[outside])
            assert not np.array_equal(bytes_of(result)[~outside], kept[~outside])
        image = results[1]


def test_what_is_drawn_is_the_answer():
    """Without a feather, inside the mask: the bytes that the answer has by itself, and opaque."""
    mask = mask_of(MASKS[0], random_image())
    inside = mask.numpy() == 1
    drawn = torch.rand(2, 3, 64, 96) * 2 - 1
    for mode in ("RGB", "RGBA"):
        results = to_pil(canvas(random_image(mode), mask).pasted(drawn))
        for result, answer in zip(results, to_pil(drawn), strict=True):
            assert np.array_equal(bytes_of(result)[inside][:, :3], bytes_of(answer)[inside])
            assert mode == "RGB" or (bytes_of(result)[inside][:, 3] == 255).all()


def test_the_answer_is_brought_to_its_window():
    """Closed forms: one colour stays it, and a ramp is a ramp between pixel centres, at another size."""
    image = random_image()
    mask = mask_of("box:20,10,60,50", image)
    made = canvas(image, mask, padding=0, size=(80, 80))
    assert made.window == (20, 10, 60, 50) and made.size == (80, 80)
    ramp = ((torch.arange(80) + 0.5) / 80 * 2 - 1).expand(1, 3, 80, 80)
    new = made.pasted(ramp)[0, :, 10:50, 20:60]
    expected = (torch.arange(40) + 0.5) / 40 * 2 - 1
    assert (new - expected)[..., 3:-3].abs().max() < 1e-5
    flat = torch.tensor([-1.0, 0.2, 1.0]).view(1, 3, 1, 1).expand(1, 3, 80, 80)
    assert (made.pasted(flat)[0, :, 10:50, 20:60] - flat[0, :, :40, :40]).abs().max() < 1e-6


def test_a_feather_fades_without_a_step():
    """From the picture to the answer, by `faded`: monotone from the rim inwards; none outside."""
    image = Image.new("RGB", (96, 64), "black")
    made = canvas(image, mask_of("box:20,10,60,50", image), feather=7)
    new = made.pasted(torch.ones(1, 3, 64, 96))[0, 0] * 0.5 + 0.5
    assert torch.allclose(new, faded(made.mask, 7), atol=1e-6)
    line = new[30, 15:40]
    assert (line.diff() >= 0).all() and torch.allclose(line[4:14], (torch.arange(10) / 8).clamp(max=1))


def test_a_feather_over_what_is_transparent():
    """Porter and Duff's "over": the colour of what cannot be seen does not shine through; half seen, it counts half."""
    for alpha, shown in ((0, 1.0), (255, 0.5), (85, 0.75)):
        image = Image.new("RGBA", (9, 1), (0, 255, 0, alpha))
        mask = torch.ones(1, 9)
        mask[:, :4] = 0
        new = canvas(image, mask, feather=1).pasted(torch.tensor([1.0, -1.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 1, 9))
        red, green, blue, opaque = (new[0, :, 0, 4] * 0.5 + 0.5).tolist()  # whose weight is a half
        assert opaque == pytest.approx(0.5 + 0.5 * alpha / 255)
        assert red == blue == pytest.approx(shown) and green == pytest.approx(1 - shown)


def test_freedom_is_the_greatest_value_of_what_is_touched():
    image = random_image()
    mask = torch.from_numpy(rng.random((64, 96), dtype=np.float32))
    assert torch.equal(canvas(image, mask).freedom, mask)
    for size in ((16, 24), (13, 31), (200, 300), (7, 300)):
        free = canvas(image, mask, padding=0, size=size).freedom
        assert free.shape == size
        for _ in range(50):
            y, x = int(rng.integers(size[0])), int(rng.integers(size[1]))
            rows = slice(y * 64 // size[0], -(-(y + 1) * 64 // size[0]))
            columns = slice(x * 96 // size[1], -(-(x + 1) * 96 // size[1]))
            assert free[y, x] == mask[rows, columns].max()


def test_masks_are_inverted_and_grown():
    image = random_image()
    mask = mask_of("box:20,10,60,50", image)
    assert torch.equal(canvas(image, mask, invert=True).mask, 1 - mask)
    assert torch.equal(canvas(image, mask, invert=True, grow=3).mask, grown(1 - mask, 3))
    assert torch.equal(canvas(image, mask, grow=-4).mask, grown(mask, -4))
    soft = torch.arange(256).view(8, 32) / 255
    flipped = canvas(random_image(width=96).resize((32, 8)), soft, invert=True).mask
    assert torch.equal(flipped, soft.flip(0, 1))


def test_extended_canvases():
    """Drawn anew is what is new, and what the mask says of the picture; it begins as `fill` says."""
    image, mask = random_image("RGBA"), mask_of("box:20,10,60,50", random_image())
    made = canvas(image, None, extend="left=10,bottom=25%")
    assert made.picture.size == (106, 80) and made.size == (80, 106)
    assert np.array_equal(bytes_of(made.picture)[:64, 10:], bytes_of(image))
    assert made.mask[:64, 10:].eq(0).all() and made.mask.sum() == 106 * 80 - 96 * 64
    assert np.array_equal(bytes_of(made.seen), bytes_of(filled(made.picture, made.mask, "smooth", 0)))
    result = to_pil(made.pasted(torch.zeros(1, 3, 80, 106)))[0]
    assert np.array_equal(bytes_of(result)[:64, 10:], bytes_of(image))
    both = canvas(image, mask, extend="left=10,bottom=25%", invert=True, grow=2, fill="mirror")
    expected = torch.ones(80, 106)
    expected[:64, 10:] = 1 - mask
    assert torch.equal(both.mask, grown(expected, 2))
    mirrored = np.pad(bytes_of(image), ((0, 16), (10, 0), (0, 0)), "reflect")
    assert np.array_equal(bytes_of(both.picture), mirrored)
    assert np.array_equal(bytes_of(both.seen), bytes_of(to_pil(to_tensor([Image.fromarray(mirrored)]))[0]))


def test_sizes():
    """The canvas' own, another by a fit, or of the window alone."""
    image, mask = random_image(), mask_of("box:20,10,60,50", random_image())
    assert canvas(image, mask, size=(64, 96)).size == canvas(image, mask, size=(64, None)).size == (64, 96)
    with pytest.raises(
        UsageError, match=r"has 96 x 64 pixels and 128 x 64 were .*; leave .* fit it: stretch, crop, pad"
    ):
        canvas(image, mask, size=(64, 128))
    with pytest.raises(UsageError, match="has 96 x 64 pixels and 192 x 128 were asked for"):
        canvas(image, None, size=(None, 192))
    made = canvas(image, mask, size=(32, 40), fit="crop")
    assert made.size == (32, 40) and made.picture.size == (40, 32) and made.mask.shape == (32, 40)
    assert np.array_equal(bytes_of(made.picture), bytes_of(fitted(image, (32, 40), "crop")))
    assert made.mask.max() == 1 and set((made.mask * 255).tolist()[16]) <= set(range(256))
    assert canvas(image, None, size=(128, None), fit="stretch").size == (128, 192)
    assert canvas(image, None, size=(None, 48), fit="pad").size == (32, 48)
    assert canvas(image, mask, padding=4, size=(None, 128)).size == (64, 128)
    assert canvas(image, mask, padding=4).picture.size == (96, 64)
    assert canvas(image, mask * 0, padding=4).window == (0, 0, 96, 64)
    extended = canvas(image, None, extend="right=96", size=(64, 96), fit="stretch")
    assert extended.picture.size == (96, 64) and extended.mask[:, 49:].eq(1).all() and extended.mask[:, :47].eq(0).all()


def test_the_window_is_seen():
    image, mask = random_image(), mask_of("box:20,10,60,50", random_image())
    made = canvas(image, mask, padding=4, fill="noise", seed=5)
    assert made.window == (16, 6, 64, 54)
    cut = filled(image.crop(made.window), mask[6:54, 16:64], "noise", 5)
    assert np.array_equal(bytes_of(made.seen), bytes_of(cut.resize((64, 64), Image.Resampling.LANCZOS)))


def test_what_does_not_fit_together():
    image, mask = random_image(), mask_of("box:20,10,60,50", random_image())
    for fill in PADS:
        with pytest.raises(UsageError, match=f"unknown fill '{fill}'; .*known: original, smooth, noise, gray$"):
            canvas(image, mask, fill=fill)
        canvas(image, mask, fill=fill, extend="left=8")
    with pytest.raises(UsageError, match="fit and padding_mask_crop were both given"):
        canvas(image, mask, fit="crop", padding=3, size=(8, 8))
    with pytest.raises(UsageError, match="fit was given without a size to fit to"):
        canvas(image, mask, fit="crop")


def test_the_canvas_takes_every_tensor_type():
    image = random_image()
    made = canvas(image, mask_of("box:20,10,60,50", image))
    new = made.pasted(torch.zeros(1, 3, 64, 96, dtype=torch.bfloat16))
    assert new.dtype == torch.float32
    assert torch.equal(new[:, :, made.mask == 0], tensor_of(image)[:, :, made.mask == 0])


def test_no_picture_is_made_of_what_is_not_finite():
    image = patches(0)
    made = canvas(image, mask_of("box:20,10,60,50", image))
    drawn = torch.zeros(1, 3, 64, 96)
    drawn[0, 0, 30, 30] = float("nan")
    with pytest.raises(NumericalError):
        to_pil(made.pasted(drawn))
