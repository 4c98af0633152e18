"""Pictures that people give to be edited: without loss where that can be, refused in one sentence where it cannot."""

import hashlib
import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from test_pictures import patches

from ldm import inputs
from ldm.errors import UsageError
from ldm.images import to_pil
from ldm.inputs import LARGEST, source_of, tensor_of

rng = np.random.default_rng(0)
GRAY = rng.integers(0, 256, (7, 9), dtype=np.uint8)
ALPHA = rng.integers(0, 256, (7, 9), dtype=np.uint8)
COLOURS = rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)
PALETTE = rng.integers(0, 256, (256, 3), dtype=np.uint8)
RGBA = np.dstack([COLOURS, ALPHA])


def loaded(path: Path) -> Image.Image:
    """Without a file that stays open."""
    return Image.open(io.BytesIO(path.read_bytes()))


def with_palette(mode: str = "P") -> Image.Image:
    image = Image.fromarray(GRAY)
    image.putpalette(PALETTE.tobytes())
    if mode == "PA":
        image = image.convert("PA")
        image.putalpha(Image.fromarray(ALPHA))
        assert image.mode == "PA"
    return image


PLAIN = {  # mode -> a picture of it, and the colours it stands for
    "1": (Image.fromarray(GRAY > 99), np.dstack([(GRAY > 99) * 255] * 3)),
    "L": (Image.fromarray(GRAY), np.dstack([GRAY] * 3)),
    "LA": (Image.fromarray(np.dstack([GRAY, ALPHA]), "LA"), np.dstack([GRAY, GRAY, GRAY, ALPHA])),
    "P": (with_palette(), PALETTE[GRAY]),
    "PA": (with_palette("PA"), np.dstack([PALETTE[GRAY], ALPHA])),
    "RGB": (Image.fromarray(COLOURS), COLOURS),
    "RGBA": (Image.fromarray(RGBA), RGBA),
}


@pytest.mark.parametrize("mode", PLAIN)
def test_what_becomes_rgb_without_loss(tmp_path, mode):
    """In memory, and in every lossless file that Pillow writes it to."""
    image, colours = PLAIN[mode]
    assert image.mode == mode
    given: list = [image]
    for suffix in ("png", "tif", "bmp"):
        try:
            image.save(tmp_path / f"x.{suffix}")
        except OSError:  # "cannot write mode PA as PNG"
            continue
        if loaded(tmp_path / f"x.{suffix}").mode == mode:
            given += [tmp_path / f"x.{suffix}", f"{tmp_path}/x.{suffix}"]
    assert len(given) > (mode != "PA") * 2
    for one in given:
        source = source_of(one)
        assert source.image.mode == ("RGBA" if colours.shape[2] == 4 else "RGB")
        assert np.array_equal(np.asarray(source.image), colours)
        assert source.name == ("" if one is image else Path(one).name)
        assert source_of(source) is source


def test_transparency_that_is_no_channel(tmp_path):
    """A palette with alpha, and one gray or colour that is meant to be transparent (PNG's tRNS)."""
    with_palette().save(tmp_path / "p.png", transparency=bytes(range(256)))
    assert np.array_equal(np.asarray(source_of(tmp_path / "p.png").image), np.dstack([PALETTE[GRAY], GRAY]))
    Image.fromarray(GRAY).save(tmp_path / "l.png", transparency=int(GRAY[0, 0]))
    alpha = np.where(GRAY[0, 0] == GRAY, 0, 255)
    assert np.array_equal(np.asarray(source_of(tmp_path / "l.png").image)[..., 3], alpha)


def test_the_digest_is_of_the_pixels(tmp_path):
    image = Image.fromarray(COLOURS)
    for name in ("a.png", "b.bmp", "c.tif"):
        image.save(tmp_path / name)
    known = {source_of(given).sha256 for given in (image, *tmp_path.iterdir())}
    assert known == {hashlib.sha256(b"RGB 9 x 7\n" + COLOURS.tobytes()).hexdigest()}
    other = COLOURS.copy()
    other[3, 4, 1] ^= 1
    others = [other, COLOURS.reshape(9, 7, 3), np.dstack([COLOURS, np.full_like(GRAY, 255)])]
    assert len(known | {source_of(Image.fromarray(array)).sha256 for array in others}) == 4


def test_the_picture_given_may_change_afterwards():
    image = Image.fromarray(COLOURS.copy())
    source = source_of(image)
    image.paste((1, 2, 3), (0, 0, 9, 7))
    assert np.array_equal(np.asarray(source.image), COLOURS)


def test_tensors_come_back_to_the_same_bytes():
    """All 256 values in every channel, colours of what is transparent too."""
    ramp = np.stack([np.roll(np.arange(256, dtype=np.uint8), 64 * i).reshape(16, 16) for i in range(4)], -1)
    for array in (ramp, ramp[..., :3]):
        tensor = tensor_of(Image.fromarray(array))
        assert tensor.shape == (1, array.shape[2], 16, 16) and tensor.dtype == torch.float32
        exact = 2 * array.astype(np.float64) / 255 - 1
        assert np.abs(tensor[0].permute(1, 2, 0).numpy() - exact).max() < 1e-7
        assert np.array_equal(np.asarray(to_pil(tensor)[0]), array)


# -- what is refused, and what --convert-image makes of it ------------------------------------------------------------

FRAMES = [Image.fromarray(np.full((8, 8, 3), 80 * i, np.uint8)) for i in range(3)]


def sixteen() -> np.ndarray:
    return rng.integers(0, 65536, (7, 9)).astype(np.uint16)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def turned(folder: Path) -> Path:
    exif = Image.Exif()
    exif[274] = 6  # Orientation, Exif 2.32: to be turned by 90 degrees clockwise
    patches(0).save(folder / "x.jpg", exif=exif)
    return folder / "x.jpg"


def cmyk(folder: Path) -> Path:
    patches(0).convert("CMYK").save(folder / "x.jpg")
    return folder / "x.jpg"


def animated(kind: str):
    def write(folder: Path) -> Path:
        FRAMES[0].save(
            folder / f"x.{kind}", save_all=True, append_images=FRAMES[1:], **{"webp": {"lossless": True}}.get(kind, {})
        )
        return folder / f"x.{kind}"

    return write


def deep(kind: str):
    def write(folder: Path) -> Path:
        Image.fromarray(sixteen()).save(folder / f"x.{kind}")
        return folder / f"x.{kind}"

    return write


def deep_rgb(folder: Path) -> Path:
    array = rng.integers(0, 65536, (5, 4, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in array)
    (folder / "x.png").write_bytes(png(4, 5, 16, 2, rows))
    return folder / "x.png"


def as_rgb(path: Path) -> np.ndarray:
    return np.asarray(loaded(path).convert("RGB"))


def upper(path: Path) -> np.ndarray:
    return np.dstack([np.asarray(loaded(path)) >> 8] * 3)


def upright(path: Path) -> np.ndarray:
    array = np.asarray(ImageOps.exif_transpose(loaded(path)))
    assert array.shape == (96, 64, 3)
    return array


REFUSED = {  # name -> how it is written, what is said, and what Pillow makes of it
    "gif": (animated("gif"), r"has several frames; add --convert-image to take its first frame$", as_rgb),
    "apng": (animated("png"), "has several frames;", as_rgb),
    "webp": (animated("webp"), "has several frames;", as_rgb),
    "pages": (animated("tif"), "has several frames;", as_rgb),
    "cmyk": (cmyk, r"is in CMYK, not in gray or RGB; add --convert-image to take it as RGB$", as_rgb),
    "16 bits": (deep("png"), r"has more than 8 bits a channel; add --convert-image to take the upper 8 bits$", upper),
    "16 bits TIFF": (deep("tif"), "has more than 8 bits a channel;", upper),
    "16 bits RGB": (deep_rgb, "has more than 8 bits a channel;", as_rgb),
    "turned": (turned, r"is to be shown turned, as its EXIF says; add --convert-image to take it upright$", upright),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_unless_converted(tmp_path, name):
    write, said, expected = REFUSED[name]
    path = write(tmp_path)
    with pytest.raises(UsageError, match=rf"^the image \S*{path.name} {said}"):
        source_of(path)
    with pytest.raises(UsageError, match=f"^the mask {path.parent}"):
        source_of(str(path), "mask")
    with Image.open(path) as image:
        if name == "16 bits RGB":  # of which Pillow has the upper 8 bits only, and no sign of the others
            assert np.array_equal(np.asarray(source_of(image).image), expected(path))
        else:
            with pytest.raises(UsageError, match=f"^the image {said.split(';')[0]};"):
                source_of(image)
    source = source_of(path, convert=True)
    assert source.image.mode == "RGB" and np.array_equal(np.asarray(source.image), expected(path))


def test_two_faults_are_one_sentence(tmp_path):
    exif = Image.Exif()
    exif[274] = 3
    patches(0).convert("CMYK").save(tmp_path / "x.jpg", exif=exif)
    said = "is in CMYK, not in gray or RGB and is to be shown turned.*; add --convert-image to take it as RGB and it up"
    with pytest.raises(UsageError, match=said):
        source_of(tmp_path / "x.jpg")


@pytest.mark.parametrize("mode", ["YCbCr", "HSV"])
def test_other_colours_of_memory(mode):
    image = patches(0).convert(mode)
    with pytest.raises(UsageError, match=f"is in {mode}, not"):
        source_of(image)
    assert np.array_equal(np.asarray(source_of(image, convert=True).image), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["F", "LAB"])
def test_what_nothing_converts(mode):
    image = Image.new(mode, (4, 4))
    for convert in (False, True):
        with pytest.raises(UsageError, match=f"the image cannot be used: its pixels are of the kind '{mode}'"):
            source_of(image, convert=convert)


def test_a_camera_file_of_two_pictures_is_no_animation(tmp_path):
    patches(0).save(tmp_path / "x.mpo", save_all=True, append_images=[patches(1)])
    path = (tmp_path / "x.mpo").rename(tmp_path / "x.jpg")
    assert loaded(path).format == "MPO"
    assert np.array_equal(np.asarray(source_of(path).image), as_rgb(path))


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def whole_png() -> bytes:
    data = io.BytesIO()
    patches(0).save(data, "PNG")
    return data.getvalue()


BROKEN = {
    "cut short": (lambda f: written(f / "x.png", whole_png()[:-100]), "it is cut short"),
    "damaged": (lambda f: written(f / "x.png", whole_png()[:60] + bytes(40) + whole_png()[100:]), "it is damaged"),
    "empty": (lambda f: written(f / "x.png", b""), "it has no bytes"),
    "text": (lambda f: written(f / "x.png", b"hello, this is no picture"), "it is no picture of a known kind"),
    "web page": (lambda f: written(f / "x.png", b"<!doctype html>"), "it is text"),
    "PostScript": (lambda f: written(f / "x.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n"), "it is no picture of a known kind"),
    "folder": (lambda f: f, "Is a directory"),
    "missing": (lambda f: f / "none.png", "No such file or directory"),
    "no path": (lambda f: "a\0b.png", "null byte"),
    "bomb": (lambda f: written(f / "x.png", png(100_000, 100_000, 8, 2, b"")), "too large to be decoded"),
    "GIF bomb": (lambda f: written(f / "x.gif", large_gif()), "too large to be decoded"),
}


def large_gif() -> bytes:
    data = io.BytesIO()
    FRAMES[0].save(data, "GIF")
    return data.getvalue()[:6] + b"\xff\xff\xff\xff" + data.getvalue()[10:]  # the size of its screen


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("convert", [False, True])
def test_what_cannot_be_decoded(tmp_path, monkeypatch, name, convert):
    """One sentence that says what came and what is taken; a bomb is known by its header."""
    write, said = BROKEN[name]
    path = write(tmp_path)
    if "bomb" in name:
        monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(UsageError) as error:
        source_of(path, "mask", convert)
    text = str(error.value)
    assert said in text and text.startswith("the mask ") and "\n" not in text
    assert text.endswith("give a sound picture (PNG, JPEG, WEBP, AVIF, BMP, GIF, TIFF)")


def test_pixels_are_counted_before_they_are_decoded(tmp_path, monkeypatch):
    """Pictures of memory too; some are decoded when they are first needed."""
    patches(0).save(tmp_path / "x.png")
    assert LARGEST == 178_956_970
    monkeypatch.setattr(inputs, "LARGEST", 96 * 64)
    assert source_of(tmp_path / "x.png").image.size == (96, 64)
    monkeypatch.setattr(inputs, "LARGEST", 96 * 64 - 1)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with Image.open(tmp_path / "x.png") as image:
        for given in (tmp_path / "x.png", image):
            with pytest.raises(UsageError, match="too large to be decoded: 96 x 64 pixels, and 6143 pixels are the"):
                source_of(given, convert=True)


def test_broken_pictures_of_memory(tmp_path):
    with pytest.raises(UsageError, match=r"^the image cannot be used: it has no pixels; give a sound picture"):
        source_of(Image.new("RGB", (0, 5)))
    path = written(tmp_path / "x.png", whole_png()[:-100])
    with Image.open(path) as image, pytest.raises(UsageError, match=r"^the image cannot be used: .*truncated"):
        source_of(image)


def test_opening_needs_no_torch():
    """`ldm data check` opens pictures with this."""
    done = subprocess.run(
        [sys.executable, "-c", "import sys, ldm.inputs, ldm.data.check; print('torch' in sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "False"
