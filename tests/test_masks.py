"""Masks in words and as pictures; grown, faded and shrunk against the definitions, pixel by pixel."""

import numpy as np
import pytest
import torch
from matplotlib.path import Path as Outline
from PIL import Image, ImageDraw
from scipy import ndimage

from ldm.errors import UsageError
from ldm.inputs import source_of
from ldm.masks import SHAPES, box_of, faded, grown, length_of, mask_of, shrunk

WIDTH, HEIGHT = 48, 36
IMAGE = Image.new("RGB", (WIDTH, HEIGHT))
X, Y = np.arange(WIDTH)[None] + 0.5, np.arange(HEIGHT)[:, None] + 0.5
rng = np.random.default_rng(0)


def inside(words: str, image: Image.Image = IMAGE) -> np.ndarray:
    mask = mask_of(words, image)
    assert mask.dtype == torch.float32 and mask.shape == (image.height, image.width)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    return mask.numpy() == 1


# -- in words ---------------------------------------------------------------------------------------------------------


def test_boxes():
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[5:20, 10:30] = True
    assert np.array_equal(inside("box:10,5,30,20"), expected)
    assert np.array_equal(inside("box: 9.6, 4.51 ,30.5,20.4"), expected)  # by the pixels' centres
    assert np.array_equal(inside("box:25%,50%,75%,100%"), (X >= 12) & (X < 36) & (Y >= 18))
    assert np.array_equal(inside("box:-100,-5,1000,1e3"), np.ones((HEIGHT, WIDTH), bool))


@pytest.mark.parametrize("sides", [(10, 5, 30, 20), (0, 0, 48, 36), (3.3, 2.7, 40.1, 30.9), (-20, 10, 20, 60)])
def test_ellipses(sides):
    """A Pythagorean distance in units of the half axes."""
    left, top, right, bottom = sides
    far = np.hypot((X - (left + right) / 2) * 2 / (right - left), (Y - (top + bottom) / 2) * 2 / (bottom - top))
    assert (np.abs(far - 1) > 1e-9).all()
    assert np.array_equal(inside(f"ellipse:{left},{top},{right},{bottom}"), far < 1)


def test_a_disc_has_its_area():
    disc = inside("ellipse:100,100,500,500", Image.new("RGB", (600, 600)))
    assert abs(disc.sum() - np.pi * 200**2) < 200  # Gauss' circle problem: the error grows as r^(2/3)
    assert np.array_equal(disc, disc.T) and np.array_equal(disc, disc[::-1])


def outlined(corners: np.ndarray) -> np.ndarray:
    centres = np.stack(np.broadcast_arrays(X, Y), -1).reshape(-1, 2)
    return Outline(corners).contains_points(centres).reshape(HEIGHT, WIDTH)


@pytest.mark.parametrize("count", [3, 4, 7, 30])
def test_polygons(count):
    """Of random corners, some outside, with edges that cross: as matplotlib counts crossings."""
    for _ in range(10):
        corners = rng.uniform((-20, -20), (WIDTH + 20, HEIGHT + 20), (count, 2))
        expected = outlined(corners)
        words = "polygon:" + ",".join(repr(float(number)) for number in corners.ravel())
        if expected.any():
            assert np.array_equal(inside(words), expected)


def test_polygons_of_whole_numbers():
    """No pixel is lost or drawn twice where two meet: a box is one, two triangles are one box, a star has a hole."""
    assert np.array_equal(inside("polygon:10,5,30,5,30,20,10,20"), inside("box:10,5,30,20"))
    assert np.array_equal(inside("polygon:10,20,30,20,30,5,10,5"), inside("box:10,5,30,20"))
    one, two = inside("polygon:0,0,36,0,36,36"), inside("polygon:0,0,36,36,0,36")
    assert not (one & two).any() and np.array_equal(one | two, inside("box:0,0,36,36"))
    assert np.array_equal(inside("polygon:0,0,36,0,36,36+polygon:0,0,36,36,0,36"), inside("box:0,0,75%,100%"))
    star = [(24 + 17 * np.sin(a), 18 - 17 * np.cos(a)) for a in 2 * np.pi * np.arange(5) * 2 / 5]
    drawn = inside("polygon:" + ",".join(f"{n:.3f}" for corner in star for n in corner))
    assert not drawn[18, 24] and drawn[4, 24] and np.array_equal(drawn, outlined(np.round(star, 3)))


def test_alpha_and_unions():
    pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)
    image = Image.fromarray(pixels)
    mask = mask_of("alpha", image)
    assert torch.equal(mask, torch.from_numpy(255 - pixels[..., 3]).float() / 255)
    both = mask_of("alpha+box:0,0,10,10+ellipse:20,20,30,30", image)
    shapes = inside("box:0,0,10,10") | inside("ellipse:20,20,30,30")
    assert np.array_equal(both.numpy(), np.maximum(mask.numpy(), shapes))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("circle:1,2,3", "unknown shape of a mask 'circle'; known: alpha, box, ellipse, polygon"),
        ("elipse:1,2,3,4", "unknown shape of a mask 'elipse'; did you mean 'ellipse'?"),
        ("box:0,0,5,5+smile", "unknown shape of a mask 'smile'"),
        ("box:1,2,3", "a box or ellipse has the sides 1, 2, 3; give left,top,right,bottom"),
        ("ellipse:9,0,3,5", "the smaller ones first"),
        ("box:0,5,3,5", "the smaller ones first"),
        ("box:0,0,nan,5", "'nan' is no length; give pixels, as 128, or per cent of the image's side, as 25%"),
        ("box:0,0,inf,5", "'inf' is no length"),
        ("box:0,0,1e9%,5", "'1e9%' is no length"),
        ("box:a,0,1,5", "'a' is no length"),
        ("box:", "'' is no length"),
        ("polygon:1,2,3,4", "a polygon of 4 numbers; give x,y of three corners"),
        ("polygon:1,2,3,4,5,6,7", "a polygon of 7 numbers"),
        ("box:100,100,120,120", r"the mask 'box:100,100,120,120' holds no pixel of the image (48 x 36); change it"),
        ("ellipse:10.6,10.6,11.4,11.4", "holds no pixel"),
        ("box:0,0,5,5+box:-9,0,0,9", "the mask 'box:-9,0,0,9' holds no pixel"),
        ("alpha", "the mask 'alpha' holds no pixel"),
        ("https://example.org/mask.png", "unknown shape of a mask 'https'"),
        ("none.png", "the mask none.png cannot be used: No such file or directory"),
        ("a+b.png", "the mask a+b.png cannot be used: No such file"),
    ],
)
def test_words_that_are_no_mask(words, said):
    with pytest.raises(UsageError) as error:
        mask_of(words, IMAGE)
    assert said in str(error.value)


def test_lengths():
    assert [length_of(text, 200) for text in ("12", " 1.5 ", "25%", "-10 %", "100%")] == [12, 1.5, 50, -20, 200]
    assert set(SHAPES) == {"box", "ellipse", "polygon"}


# -- pictures ---------------------------------------------------------------------------------------------------------

GRAY = rng.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
FLAT = np.full((HEIGHT, WIDTH), 200, np.uint8)


def test_gray_pictures(tmp_path):
    """8 bits in every mode that holds gray, from files and memory, and as a Source."""
    expected = torch.from_numpy(GRAY / np.float32(255))
    image = Image.fromarray(GRAY)
    image.save(tmp_path / "mask+1.png")
    opaque = np.dstack([GRAY, np.full_like(GRAY, 255)])
    given = [image, image.convert("RGB"), image.convert("RGBA"), Image.fromarray(opaque, "LA"), image.convert("P")]
    for one in (*given, tmp_path / "mask+1.png", str(tmp_path / "mask+1.png"), source_of(image)):
        assert torch.equal(mask_of(one, IMAGE), expected)
    assert torch.equal(mask_of(Image.fromarray(GRAY > 99), IMAGE), torch.from_numpy(GRAY > 99).float())
    assert not mask_of(Image.new("L", IMAGE.size), IMAGE).any()  # a file may be empty


def test_a_file_called_as_a_word(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(GRAY).save("alpha", "PNG")
    assert torch.equal(mask_of("./alpha", IMAGE), mask_of(Image.fromarray(GRAY), IMAGE))


def test_transparent_pictures_of_one_colour():
    """As in OpenAI's edits: what is transparent is drawn anew; the colour below it does not count."""
    expected = torch.from_numpy((255 - GRAY) / np.float32(255))
    assert torch.equal(mask_of(Image.fromarray(np.dstack([FLAT, GRAY]), "LA"), IMAGE), expected)
    assert torch.equal(mask_of(Image.fromarray(np.dstack([FLAT, FLAT // 2, FLAT * 0, GRAY])), IMAGE), expected)
    hole = np.dstack([np.where(GRAY < 99, c, 255) for c in (0, 10, 20)] + [np.where(GRAY < 99, 0, 255)]).astype(
        np.uint8
    )
    assert torch.equal(mask_of(Image.fromarray(hole), IMAGE), torch.from_numpy(GRAY < 99).float())
    assert mask_of(Image.new("RGBA", IMAGE.size), IMAGE).eq(1).all()  # all of it transparent


def test_pictures_that_are_no_mask(tmp_path):
    coloured = np.dstack([GRAY, GRAY, GRAY])
    coloured[7, 9, 2] ^= 1
    Image.fromarray(coloured).save(tmp_path / "m.png")
    with pytest.raises(UsageError, match=r"^the mask m\.png has colours; give it in gray: white is drawn anew"):
        mask_of(tmp_path / "m.png", IMAGE)
    with pytest.raises(UsageError, match=r"^the mask is transparent in part and not of one colour"):
        mask_of(Image.fromarray(np.dstack([FLAT, GRAY, FLAT, FLAT])), IMAGE)
    with pytest.raises(UsageError, match=r"^the mask has 36 x 48 pixels and the image 48 x 36; give a mask of the im"):
        mask_of(Image.new("L", (HEIGHT, WIDTH)), IMAGE)
    deep = Image.fromarray(GRAY.astype(np.uint16) << 8)
    with pytest.raises(UsageError, match=r"^the mask has more than 8 bits a channel; add --convert-image"):
        mask_of(deep, IMAGE)
    assert torch.equal(mask_of(deep, IMAGE, convert=True), mask_of(Image.fromarray(GRAY), IMAGE))
    with pytest.raises(UsageError, match=r"^the mask is in CMYK"):
        mask_of(IMAGE.convert("CMYK"), IMAGE)


# -- what is made of them ---------------------------------------------------------------------------------------------


def spots(height: int = 40, width: int = 53) -> torch.Tensor:
    """A few gray spots on nothing, some at the border."""
    image = Image.new("L", (width, height))
    for _ in range(6):
        x, y, r = rng.integers(0, width), rng.integers(0, height), rng.integers(1, 6)
        ImageDraw.Draw(image).ellipse((x - r, y - r, x + r, y + r), fill=int(rng.integers(1, 256)))
    return torch.from_numpy(np.asarray(image) / np.float32(255))


def test_boxes_of_what_is_true():
    true = torch.zeros(40, 53, dtype=torch.bool)
    assert box_of(true) == (0, 0, 53, 40)
    true[10, 20] = true[12, 30] = True
    assert box_of(true) == (20, 10, 31, 13)
    assert box_of(true, 2) == (18, 8, 33, 15)
    assert box_of(true, 11) == (9, 0, 42, 24)
    assert box_of(~true, 5) == (0, 0, 53, 40)


@pytest.mark.parametrize("radius", [0, 1, 2, 3, 5, 8, 13, 60])
def test_grown_by_a_disc(radius):
    """The definition: the greatest, or least, value among the pixels of the picture within the disc."""
    dy, dx = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    disc = dx**2 + dy**2 <= radius**2
    for mask in (
        spots(),
        torch.from_numpy(rng.integers(0, 256, (40, 53), np.uint8) / np.float32(255)),
        torch.ones(5, 7),
    ):
        padded = np.pad(mask.numpy(), radius, constant_values=np.nan)
        around = np.lib.stride_tricks.sliding_window_view(padded, disc.shape)[:, :, disc]
        assert np.array_equal(grown(mask, radius).numpy(), np.nanmax(around, -1))
        assert np.array_equal(grown(mask, -radius).numpy(), np.nanmin(around, -1))


def test_grown_shapes():
    """A point grows to a disc of just the pixels within the radius, and shrinks to nothing; nothing stays nothing."""
    point = torch.zeros(101, 101)
    point[50, 50] = 1
    y, x = np.ogrid[-50:51, -50:51]
    for radius in (7, 20, 49):
        assert np.array_equal(grown(point, radius).numpy() == 1, np.hypot(x, y) <= radius)
    assert not grown(point, -1).any() and not grown(point * 0, 9).any() and grown(point * 0 + 1, -9).eq(1).all()


@pytest.mark.parametrize("pixels", [0, 1, 2, 7, 20, 100])
def test_faded_by_the_distance(pixels):
    """To the nearest pixel that is kept; beyond the picture's border nothing is."""
    bar = torch.zeros(40, 53)
    bar[:, 20:] = 0.25
    for mask in (spots(), (spots() == 0).float(), bar, bar.T.contiguous(), bar.flip(0, 1)):
        kept = np.argwhere(mask.numpy() == 0)
        places = np.argwhere(np.ones(mask.shape))
        far = np.sqrt(((places[:, None] - kept[None]) ** 2).sum(-1).min(1)).reshape(mask.shape)
        assert np.allclose(far, ndimage.distance_transform_edt(mask.numpy()))
        weights = faded(mask, pixels).numpy()
        assert weights.dtype == np.float32
        assert np.allclose(weights, np.minimum(far / (pixels + 1), 1), atol=1e-6)
        assert np.array_equal(weights == 0, mask.numpy() == 0)
        if pixels == 0:
            assert np.array_equal(weights, (mask > 0).numpy())


def test_faded_full_and_empty():
    for pixels in (0, 3, 500):
        assert faded(torch.full((9, 11), 0.1), pixels).eq(1).all()
        assert not faded(torch.zeros(9, 11), pixels).any()


def test_a_fade_is_a_ramp():
    bar = torch.zeros(1, 20)
    bar[:, 5:] = 1
    assert np.allclose(faded(bar, 4)[0, 4:11], [0, 0.2, 0.4, 0.6, 0.8, 1, 1])


@pytest.mark.parametrize("size", [(64, 64), (40, 53), (5, 3), (1, 17), (8, 9)])
def test_shrunk(size):
    mask = torch.from_numpy(rng.random(size, dtype=np.float32))
    small = shrunk(mask, 8)
    rows, columns = -(-size[0] // 8), -(-size[1] // 8)
    assert small.shape == (1, 1, rows, columns)
    for y in range(rows):
        for x in range(columns):
            assert small[0, 0, y, x] == mask[8 * y : 8 * y + 8, 8 * x : 8 * x + 8].max()
