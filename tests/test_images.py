"""Pictures against diffusers' VaeImageProcessor, and files read back by Pillow."""

import os
import stat
import struct

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from ldm import images
from ldm.errors import LdmError, ModelError, NumericalError, UsageError

PARAMETERS = "an owl 🦉, „Öl“\nNegative prompt: rain\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 42"


def noise(count: int = 3, height: int = 6, width: int = 9, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values beyond [-1, 1] and all the values halfway between two of the 256 levels."""
    x = torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(0))
    x[0].view(-1)[:128] = (torch.arange(128) + 0.5) / 255 * 2 - 1
    return x.to(dtype)


def coloured(width: int, height: int, colour: str) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_become_the_pictures_of_diffusers(dtype: torch.dtype) -> None:
    x, oracle = noise(dtype=dtype), VaeImageProcessor()
    assert np.array_equal(images.to_numpy(x), oracle.postprocess(x, output_type="np"))
    for mine, theirs in zip(images.to_pil(x), oracle.postprocess(x, output_type="pil"), strict=True):
        assert mine.mode == theirs.mode == "RGB" and mine.tobytes() == theirs.tobytes()


def test_pictures_become_the_tensors_of_diffusers_and_back() -> None:
    pictures = images.to_pil(noise())
    x = images.to_tensor(pictures)
    assert torch.equal(x, VaeImageProcessor(vae_scale_factor=1).preprocess(pictures))
    assert [p.tobytes() for p in images.to_pil(x)] == [p.tobytes() for p in pictures]
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert images.to_tensor([clear, coloured(2, 2, "white").convert("L")]).eq(1).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_no_picture_is_made_of_numbers_that_are_not_finite(value: float) -> None:
    x = noise(dtype=torch.float16)
    x[1, 0, 0, 0] = value
    with pytest.raises(NumericalError, match="float16"):
        images.to_pil(x)


@pytest.mark.parametrize("batch", [[], [coloured(2, 3, "red"), coloured(3, 2, "red")]])
def test_a_batch_of_pictures_has_one_size(batch: list[Image.Image]) -> None:
    with pytest.raises(UsageError):
        images.to_tensor(batch)


def test_a_grid_places_every_picture() -> None:
    colours = ["red", "lime", "blue", "cyan", "black"]
    sheet = images.grid([coloured(4, 3, colour) for colour in colours], columns=3, padding=2)
    assert sheet.size == (3 * 6 + 2, 2 * 5 + 2)
    for i, colour in enumerate(colours):
        x, y = 2 + i % 3 * 6, 2 + i // 3 * 5
        assert sheet.crop((x, y, x + 4, y + 3)).tobytes() == coloured(4, 3, colour).tobytes()
    pixels = np.asarray(sheet).reshape(-1, 3)
    assert (pixels != 255).any(axis=1).sum() == 5 * 12  # and paints nothing else
    assert images.grid([coloured(4, 3, "red")], columns=8, padding=0).size == (4, 3)
    with pytest.raises(UsageError):
        images.grid([], columns=3)


def test_labels_are_wrapped_below_their_pictures() -> None:
    pictures = [coloured(64, 20, "red"), coloured(64, 20, "blue")]
    plain = images.grid(pictures, 2)
    one = np.asarray(images.grid(pictures, 2, labels=["owl", ""]))
    long = images.grid(pictures, 2, labels=["an owl to the left of a pizza", "Donaudampfschifffahrtsgesellschaft"])
    assert one.shape[0] == plain.height + 14 and long.height >= plain.height + 28
    ink = (one != 255).any(axis=2)
    assert ink[22:, :66].any() and not ink[22:, 68:].any()  # "owl" under the first picture, nothing by the second
    assert (np.asarray(long)[22:, 66:68] == 255).all()  # nothing runs into the neighbouring cell
    with pytest.raises(UsageError, match="1 labels for 2"):
        images.grid(pictures, 2, labels=["owl"])


def test_a_contact_sheet_enlarges_small_pictures_by_whole_factors() -> None:
    picture = images.to_pil(noise(1, 10, 20))[0]
    sheet = images.contact_sheet([picture], ["a red thing"], side=64)
    assert sheet.crop((8, 8, 8 + 60, 8 + 30)).tobytes() == picture.resize((60, 30), Image.Resampling.NEAREST).tobytes()
    wide = images.contact_sheet([coloured(512, 100, "red")], ["x"], side=64)
    assert wide.width == 64 + 16


@pytest.mark.parametrize(
    ("suffix", "kind"), [(".png", "PNG"), (".JPG", "JPEG"), (".jpeg", "JPEG"), (".webp", "WEBP"), (".avif", "AVIF")]
)
def test_saved_files_hold_the_picture_and_its_text(tmp_path, suffix: str, kind: str) -> None:
    smooth = images.to_pil(torch.linspace(-1, 1, 64).expand(1, 3, 64, 64))[0]
    path = tmp_path / f"picture{suffix}"
    images.save(smooth, path, {"parameters": PARAMETERS})
    assert os.listdir(tmp_path) == [path.name]  # and no temporary file
    with Image.open(path) as read:
        assert read.format == kind and read.size == (64, 64)
        error = np.abs(np.asarray(read.convert("RGB"), dtype=int) - np.asarray(smooth, dtype=int)).max()
    assert error == 0 if kind == "PNG" else error <= 4
    assert images.read_text(path) == {"parameters": PARAMETERS}
    images.save(smooth, path)
    assert images.read_text(path) == {}


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".avif"])
def test_every_format_takes_both_texts(tmp_path, suffix: str) -> None:
    path, texts = tmp_path / f"a{suffix}", {"parameters": PARAMETERS, "ldm": '{"seed": 1}'}
    images.save(coloured(2, 2, "red"), path, texts)
    assert images.read_text(path) == texts
    if suffix != ".png":  # the standard's types, without which other readers do not take the bytes for a text
        with Image.open(path) as read:
            tiff = read.info["exif"].removeprefix(b"Exif\0\0")
        assert struct.unpack(">2sHLHHHLL", tiff[:22]) == (b"MM", 42, 8, 1, 0x8769, 4, 1, 26)
        assert struct.unpack(">H", tiff[26:28]) == (2,)
        rows = [struct.unpack(">HHLL", tiff[at : at + 12]) for at in (28, 40)]
        values = [tiff[start : start + size] for _, _, size, start in rows]
        assert [row[:2] for row in rows] == [(0x927C, 7), (0x9286, 7)]
        assert values == [b'ldm\0{"seed": 1}', b"UNICODE\0" + PARAMETERS.encode("utf-16-be")]
    with pytest.raises(UsageError, match="unknown text key 'seed'"):
        images.save(coloured(2, 2, "red"), tmp_path / f"b{suffix}", {"seed": "1"})
    assert not (tmp_path / f"b{suffix}").exists()


@pytest.mark.parametrize(
    "comment",
    [
        b"UNICODE\0" + PARAMETERS.encode("utf-16-le"),
        b"UNICODE\0" + PARAMETERS.encode("utf-16"),  # begins with the mark of its byte order
        b"UNICODE\0" + b"\xfe\xff" + PARAMETERS.encode("utf-16-be"),
        b"ASCII\0\0\0" + PARAMETERS.encode() + b"\0",
    ],
)
def test_comments_of_other_writers_are_read(tmp_path, comment: bytes) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = comment
    coloured(2, 2, "red").save(tmp_path / "a.jpg", exif=exif)
    assert images.read_text(tmp_path / "a.jpg") == {"parameters": PARAMETERS}
    exif.get_ifd(0x8769)[0x9286] = b"JIS\0\0\0\0\0" + comment
    exif.get_ifd(0x8769)[0x927C] = b"Nikon\0\2"
    coloured(2, 2, "red").save(tmp_path / "a.jpg", exif=exif)
    assert images.read_text(tmp_path / "a.jpg") == {}


def test_text_that_follows_the_pixels_is_read(tmp_path) -> None:
    images.save(coloured(2, 2, "red"), tmp_path / "a.png", {"parameters": PARAMETERS})
    data = (tmp_path / "a.png").read_bytes()
    start, end = data.index(b"iTXt") - 4, data.index(b"IDAT") - 4
    (tmp_path / "a.png").write_bytes(data[:start] + data[end:-12] + data[start:end] + data[-12:])
    assert images.read_text(tmp_path / "a.png") == {"parameters": PARAMETERS}


def test_text_too_long_for_the_format_is_said(tmp_path, monkeypatch) -> None:
    for suffix, length in ((".jpg", 40_000), (".png", 4_000_001)):
        with pytest.raises(
            LdmError, match=r"(takes 80,.* a JPEG file holds 65,533; save as \.png|longer than 4,000,000)"
        ):
            images.save(coloured(2, 2, "red"), tmp_path / f"a{suffix}", {"parameters": "x" * length})
    images.save(coloured(2, 2, "red"), tmp_path / "a.webp", {"parameters": "x" * 40_000})
    images.save(coloured(2, 2, "red"), tmp_path / "a.jpg", {"parameters": "x" * 32_000})
    assert len(images.read_text(tmp_path / "a.jpg")["parameters"]) == 32_000
    monkeypatch.setattr(images.features, "check", lambda name: False)
    with pytest.raises(LdmError, match=r"a\.avif cannot be written, .* without AVIF; save as \.png"):
        images.save(coloured(2, 2, "red"), tmp_path / "a.avif")


def test_files_that_cannot_be_written_or_read_are_said_plainly(tmp_path) -> None:
    with pytest.raises(UsageError, match=r"did you mean '\.png'"):
        images.save(coloured(2, 2, "red"), tmp_path / "a.pnq")
    with pytest.raises(LdmError, match=r"cannot write .*nowhere"):
        images.save(coloured(2, 2, "red"), tmp_path / "nowhere" / "a.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for name in ("broken.png", "absent.png"):
        with pytest.raises(ModelError, match=name):
            images.read_text(tmp_path / name)


def test_files_get_the_permissions_of_the_umask(tmp_path) -> None:
    before = os.umask(0o027)
    try:
        images.save(coloured(2, 2, "red"), tmp_path / "a.png")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.png").stat().st_mode) == 0o640
