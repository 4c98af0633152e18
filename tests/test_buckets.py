"""Buckets against the tables that were published, placements against Pillow, torchvision's and diffusers' rules."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from ldm.data.buckets import Bucketing, Buckets, Size, assign, bucket_of, coverage, pixels, place, prepare, table
from ldm.errors import UsageError

# The sample output in the README of NovelAI/novelai-aspect-ratio-bucketing: at most 512 * 768 pixels, sides to 1024.
NOVELAI = {
    (256, 1024), (320, 1024), (384, 1024), (384, 960), (384, 896), (448, 832), (512, 768), (512, 704), (512, 512),
    (576, 640), (640, 576), (704, 512), (768, 512), (832, 448), (896, 384), (960, 384), (1024, 384), (1024, 320),
    (1024, 256),
}  # fmt: skip
# Podell et al. 2023 (SDXL), appendix I, the upright half: width -> heights.
SDXL = {
    512: (2048, 1984, 1920, 1856), 576: (1792, 1728, 1664), 640: (1600, 1536), 704: (1472, 1408, 1344),
    768: (1344, 1280), 832: (1216, 1152), 896: (1152, 1088), 960: (1088, 1024), 1024: (1024,),
}  # fmt: skip


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def signal(image: Image.Image) -> torch.Tensor:
    """[3, H, W] in [-1, 1], as torchvision's ToTensor and Normalize(0.5, 0.5)."""
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - 0.5) / 0.5


# -- sizes ------------------------------------------------------------------------------------------------------------


def test_table_is_novelais():
    """But for the square: theirs is set by hand, kohya's is the largest that fits."""
    assert set(table(512 * 768, 64, 256, 1024)) == NOVELAI - {(512, 512)} | {(576, 576)}


def test_table_is_in_the_sdxl_papers():
    """Ours are the largest height of each of its widths, and the same turned; its others have fewer pixels."""
    published = {(w, h) for w, heights in SDXL.items() for h in heights}
    largest = {(w, max(heights)) for w, heights in SDXL.items()}
    ours = set(table(1024**2, 64, *Bucketing(1024).sides))
    assert {size for size in ours if size[0] < 1024} >= largest - {(1024, 1024)}
    assert ours <= published | {(h, w) for w, h in published}
    assert all((h, w) in ours for w, h in ours)


def test_table_of_512_by_hand():
    upright = {
        (256, 1024),
        (256, 960),
        (256, 896),
        (256, 832),
        (320, 768),
        (320, 704),
        (384, 640),
        (448, 576),
        (512, 512),
    }
    assert set(table(512**2, 64, *Bucketing().sides)) == upright | {(h, w) for w, h in upright}


def test_enlarging_takes_the_nearest_aspect():
    """NovelAI's rule, in its own words: argmin(abs(bucket_aspects - image_aspect))."""
    options = Bucketing(upscale=True)
    sizes = table(512**2, 64, *options.sides)
    aspects = np.array([w / h for w, h in sizes])
    for width, height in np.random.default_rng(0).integers(20, 3000, (500, 2)).tolist():
        assert bucket_of(Size(width, height), options, sizes) == sizes[np.abs(aspects - width / height).argmin()]


@pytest.mark.parametrize("options", [Bucketing(), Bucketing(1024), Bucketing(64, 8), Bucketing(200, 24)])
def test_nothing_is_enlarged(options):
    sizes, most = table(options.resolution**2, options.step, *options.sides), options.sides[1]
    for width, height in np.random.default_rng(0).integers(options.step, 3000, (500, 2)).tolist():
        bucket = bucket_of(Size(width, height), options, sizes)
        assert options.step <= bucket.width <= min(width, most) and options.step <= bucket.height <= min(height, most)
        assert bucket.width * bucket.height <= options.resolution**2
        assert bucket.width % options.step == bucket.height % options.step == 0
        if width >= most and height >= most:  # whatever its aspect, the picture covers the nearest
            assert bucket in sizes


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((4000, 3000), (576, 448)),  # 1.286 is nearer to 4:3 than 640 / 384
        ((512, 512), (512, 512)),
        ((500, 333), (448, 320)),  # smaller than 640x384 and 576x448: its own size, rounded down
        ((644, 444), (576, 384)),  # 285,936 pixels, and 4 too few for 576x448: shrunk to 616x425
        ((200, 200), (192, 192)),
        ((130, 64), (128, 64)),
        ((2000, 140), (1024, 128)),  # cut to the longest side
        ((9000, 65), (1024, 64)),
        ((511, 2000), (256, 1024)),
    ],
)
def test_pictures_by_hand(size, bucket):
    assert bucket_of(Size(*size), Bucketing(), table(512**2, 64, 256, 1024)) == bucket


def test_square_alone():
    """min_side = max_side = resolution is diffusers' scripts' one size."""
    options = Bucketing(512, min_side=512, max_side=512, upscale=True)
    assert assign([(100, 900), (512, 512), (900, 100)], options) == Buckets((Size(512, 512),), ((0, 1, 2),))


def test_assign_and_its_sentence():
    sizes = [(512, 512)] * 3 + [(2000, 1000)] * 2 + [(700, 700)]
    buckets = assign(sizes, Bucketing())
    assert buckets.sizes == ((512, 512), (704, 320))
    assert buckets.members == ((0, 1, 2, 5), (3, 4))
    assert str(buckets) == "2 buckets: 512x512 (4), 704x320 (2)"
    assert str(assign([(64, 64)], Bucketing(64, 8))) == "1 bucket: 64x64 (1)"
    many = assign([(64 * i, 64) for i in range(1, 13)], Bucketing())
    assert str(many).startswith("12 buckets: 64x64 (1), ") and str(many).endswith(" (1), 4 smaller ones")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: assign([], Bucketing()), "no pictures"),
        (lambda: assign([(512, 512), (700, 40)], Bucketing()), "picture 2 has 700x40 pixels"),
        (lambda: Bucketing(32), "step of the buckets is 64; it must be 1 to the resolution, 32"),
        (lambda: Bucketing(512, step=0), "step of the buckets is 0"),
        (lambda: Bucketing(512, min_side=1024), "sides of 1024 to 1024"),
        (lambda: Bucketing(512, max_side=256), "sides of 256 to 256"),
        (lambda: Bucketing(512, min_side=8), "the least must be at least the step"),
        (lambda: place(Size(9, 9), Size(8, 8), None, random_crop=True), "without dice"),
        (lambda: pixels(noise(9, 8), place(Size(8, 8), Size(8, 8))), "of 9x8 pixels where 8x8 were expected"),
    ],
)
def test_refusals(call, said):
    with pytest.raises(UsageError, match=said):
        call()


# -- placements -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "bucket", "time_ids"),
    [  # diffusers' train_text_to_image_sdxl.py with --center_crop: Resize(1024), then int(round((side - 1024) / 2))
        ((1500, 1000), (1024, 1024), (1000, 1500, 0, 256, 1024, 1024)),  # 1536x1024
        ((1000, 1500), (1024, 1024), (1500, 1000, 256, 0, 1024, 1024)),
        ((2051, 2048), (1024, 1024), (2048, 2051, 0, 1, 1024, 1024)),  # 1025.5 -> 1026x1024; 2 / 2
        ((1027, 1024), (1024, 1024), (1024, 1027, 0, 2, 1024, 1024)),  # round(1.5) is 2, round(0.5) is 0: half to even
        ((1025, 1024), (1024, 1024), (1024, 1025, 0, 0, 1024, 1024)),
        ((1600, 1200), (1152, 896), (1200, 1600, 0, 22, 896, 1152)),  # 1194.7 -> 1195x896; 43 / 2 = 21.5
    ],
)
def test_size_conditioning(size, bucket, time_ids):
    assert place(Size(*size), Size(*bucket)).time_ids == time_ids


def test_resized_covers_the_bucket():
    """One side fits, the other reaches beyond; the aspect is kept to half a pixel (kohya's int(side * scale + 0.5))."""
    for width, height, w, h in np.random.default_rng(1).integers(8, 2000, (500, 4)).tolist():
        placement = place(Size(width, height), Size(w, h))
        scale = max(w / width, h / height)
        assert placement.resized == (int(width * scale + 0.5), int(height * scale + 0.5))
        assert placement.resized >= (w, h) and (placement.resized.width == w or placement.resized.height == h)
        assert placement.left + w <= placement.resized.width and placement.top + h <= placement.resized.height


def test_pixels_are_pillows():
    image = noise(150, 100)
    found, placement = prepare(image, Size(64, 64))
    assert placement.resized == (96, 64) and (placement.top, placement.left) == (0, 16)
    expected = signal(image.resize((96, 64), Image.Resampling.LANCZOS).crop((16, 0, 80, 64)))
    assert found.dtype == torch.float32 and found.shape == (3, 64, 64) and found.min() < -0.3 and found.max() > 0.3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_own_size_is_not_resampled():
    image = noise(64, 64)
    torch.testing.assert_close(prepare(image, Size(64, 64))[0], signal(image), rtol=0, atol=1e-7)


def test_mirrored_then_cut():
    """In diffusers' order: `left` counts from the edge of the mirrored picture."""
    image, rng = noise(100, 64), np.random.default_rng(0)
    drawn = [prepare(image, Size(64, 64), rng, random_crop=True, random_flip=True) for _ in range(20)]
    assert {placement.flipped for _, placement in drawn} == {False, True}
    for found, placement in drawn:
        whole = signal(image).flip(2) if placement.flipped else signal(image)
        assert torch.equal(found, whole[:, :, placement.left : placement.left + 64])


def test_random_placements_are_uniform():
    rng = np.random.default_rng(0)
    drawn = [place(Size(20, 24), Size(16, 16), rng, random_crop=True, random_flip=True) for _ in range(2000)]
    assert {p.resized for p in drawn} == {(16, 19)}
    counts = np.zeros((4, 2))
    for p in drawn:
        counts[p.top, int(p.flipped)] += 1
        assert p.left == 0
    assert stats.chisquare(counts.ravel()).pvalue > 1e-3  # all eight alike: cut and mirroring are independent, too


def test_one_option_does_not_change_the_other():
    def at(crop: bool, flip: bool) -> list[tuple[int, bool]]:
        rng = [np.random.default_rng(i) for i in range(30)]
        drawn = [place(Size(30, 16), Size(16, 16), dice, crop, flip) for dice in rng]
        return [(p.left, p.flipped) for p in drawn]

    both = at(True, True)
    assert at(True, False) == [(left, False) for left, _ in both]
    assert at(False, True) == [(7, flipped) for _, flipped in both]
    assert at(False, False) == [(7, False)] * 30


def test_masks_follow_their_pictures():
    """A picture that is its own mask: the two agree after any placement, but for the filters' blur at the edges."""
    shape = np.zeros((90, 160), dtype=np.uint8)
    shape[20:50, 30:110] = 255
    mask, rng = Image.fromarray(shape), np.random.default_rng(2)
    for _ in range(10):
        found, placement = prepare(mask.convert("RGB"), Size(64, 56), rng, random_crop=True, random_flip=True)
        covered = coverage(mask, placement)
        assert covered.shape == (1, 56, 64) and covered.min() == 0 and covered.max() == 1
        assert (covered - (found[:1] + 1) / 2).abs().max() < 0.12
        assert torch.equal(covered > 0.5, found[:1] > 0)
    unchanged = coverage(mask, place(Size(160, 90), Size(160, 90)))
    assert torch.equal(unchanged[0], torch.from_numpy(shape) / 255)
