"""`ldm data check`: every defect that is planted is found, with its path and the reason, and nothing in sound data."""

import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Done
from PIL import Image
from test_pictures import packed, patches

from ldm.data.check import HASH_BITS, KINDS, THUMB_LEVELS, Report, accepted, check, dhash, look
from ldm.data.emoji import CorpusConfig, EmojiScenes
from ldm.data.pictures import Picture, fingerprint
from ldm.data.sources import find
from ldm.errors import LdmError, UsageError
from ldm.inputs import IMAGE_SUFFIXES

SOUND = [f"sound-{i}.png" for i in range(6)]


def sound(folder: Path) -> Path:
    """Six pictures with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(SOUND):
        save(folder / name, patches(seed, (96, 80)))
    return folder


def save(path: Path, image: Image.Image, caption: str | bytes | None = "a soft pattern", **options: object) -> None:
    """A picture and its caption; none for None."""
    image.save(path, **options)
    captioned(path, caption)


def captioned(path: Path, caption: str | bytes | None = "a soft pattern") -> None:
    if caption is not None:
        path.with_suffix(".txt").write_bytes(caption if isinstance(caption, bytes) else caption.encode())


def raw(name: str, change: Callable[[bytes], bytes], seed: int) -> Callable[[Path], None]:
    """A picture whose bytes are changed."""

    def plant(folder: Path) -> None:
        save(folder / name, patches(seed, (96, 80)))
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return plant


def flipped(data: bytes) -> bytes:
    """One bit in the middle is another."""
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 8]) + data[len(data) // 2 + 1 :]


def huge(data: bytes) -> bytes:
    """A header that promises 60,000 x 60,000 pixels, with its checksum."""
    header = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + data[24:29]
    return data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:]


def near(folder: Path) -> None:
    """The same picture, smaller and through a coarse JPEG."""
    save(folder / "near.jpg", patches(0, (96, 80)).resize((84, 70), Image.Resampling.LANCZOS), quality=70)


def rotated(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    save(folder / "rotated.jpg", patches(22, (96, 80)), exif=exif)


def animated(folder: Path) -> None:
    frames = [patches(seed, (96, 80)) for seed in (23, 24)]
    save(folder / "animated.gif", frames[0], save_all=True, append_images=frames[1:])


def in_alpha(folder: Path) -> None:
    image = patches(25, (96, 80)).convert("RGBA")
    image.putpixel((3, 3), (0, 0, 0, 0))
    save(folder / "alpha.png", image)


def bad_mask(folder: Path) -> None:
    save(folder / "masked.png", patches(26, (96, 80)))
    Image.new("L", (80, 96)).save(folder / "masked.mask.png")


def copied(name: str) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        shutil.copy(folder / SOUND[1], folder / name)
        captioned(folder / name)

    return plant


def text(name: str, data: bytes, caption: str | None = "a soft pattern") -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        (folder / name).write_bytes(data)
        if Path(name).suffix in IMAGE_SUFFIXES:
            captioned(folder / name, caption)

    return plant


def picture(name: str, seed: int, **options: Any) -> Callable[[Path], None]:
    size = options.pop("size", (96, 80))
    mode = options.pop("mode", "RGB")
    return lambda folder: save(folder / name, patches(seed, size).convert(mode), **options)


def deep(folder: Path) -> None:
    save(folder / "deep.png", Image.fromarray(np.asarray(patches(27, (96, 80)).convert("L")).astype(np.uint16) * 257))


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
HTML = b"<!DOCTYPE html><title>404</title>"
WORDS = "an owl " * 80
# what is planted -> the file it is found in, its kind, and words of the reason
PLANTED: list[tuple[Callable[[Path], object], str, str, str]] = [
    (text("empty.png", b""), "empty.png", "empty", "no bytes"),
    (raw("bit.png", flipped, 10), "bit.png", "corrupt", "damaged"),
    (raw("cut.png", lambda data: data[: len(data) // 2], 11), "cut.png", "truncated", "cut short"),
    (raw("end.png", lambda data: data[:-12], 12), "end.png", "truncated", "cut short"),
    (raw("cut.jpg", lambda data: data[: len(data) // 2], 13), "cut.jpg", "truncated", "cut short"),
    (raw("cut.webp", lambda data: data[: len(data) // 2], 14), "cut.webp", "truncated", "cut short"),
    (raw("cut.gif", lambda data: data[: len(data) // 2], 15), "cut.gif", "truncated", "cut short"),
    (raw("cut.tif", lambda data: data[: len(data) // 2], 16), "cut.tif", "truncated", "cut short"),
    (raw("head.jpg", lambda data: data[:2] + bytes(300), 17), "head.jpg", "no-picture", "of a known kind"),
    (text("page.jpg", HTML), "page.jpg", "no-picture", "web page"),
    (text("pointer.png", LFS), "pointer.png", "no-picture", "git lfs pull"),
    (picture("png.jpg", 18, format="PNG"), "png.jpg", "suffix", "PNG, whose suffix is .png"),
    (picture("small.png", 19, size=(96, 63)), "small.png", "small", "96 x 63 pixels, and a side must have 64"),
    (
        picture("large.png", 20, size=(400, 300)),
        "large.png",
        "bomb",
        "400 x 300 pixels, and 100000 pixels are the most",
    ),
    (raw("huge.png", huge, 33), "huge.png", "bomb", "(3600000000 pixels) exceeds limit"),
    (lambda d: save(d / "float.tif", Image.new("F", (96, 80))), "float.tif", "mode", "'F'"),
    (picture("cmyk.jpg", 21, mode="CMYK"), "cmyk.jpg", "cmyk", "CMYK"),
    (deep, "deep.png", "16-bit", "8 bits"),
    (in_alpha, "alpha.png", "alpha", "on white"),
    (animated, "animated.gif", "animated", "the first is taken"),
    (rotated, "rotated.jpg", "rotated", "EXIF"),
    (copied("copy.png"), "sound-1.png", "duplicate", "as copy.png"),
    (near, "sound-0.png", "near-duplicate", "looks like near.jpg"),
    (bad_mask, "masked.png", "mask", "80 x 96 pixels, the picture of 96 x 80"),
    (picture("silent.png", 28, caption=None), "silent.png", "caption-missing", "no caption"),
    (picture("blank.png", 29, caption=" \n"), "blank.png", "caption-empty", "empty"),
    (picture("latin.png", 30, caption="caf\xe9".encode("latin-1")), "latin.png", "caption-encoding", "byte 4"),
    (picture("long.png", 31, caption=WORDS), "long.png", "caption-long", "160 tokens"),
    (text("alone.txt", b"a caption"), "alone.txt", "caption-alone", "no picture has the name"),
    (lambda d: Image.new("L", (9, 9)).save(d / "x.mask.png"), "x.mask.png", "mask-alone", "no picture has its name"),
    (text("movie.heic", b"1"), "movie.heic", "unknown", ".heic"),
    (lambda d: (d / "link.png").symlink_to("nowhere.png"), "link.png", "link", "nowhere.png"),
    (picture("Sound-2.png", 32), "sound-2.png", "case", "differs from Sound-2.png only in case"),
    (lambda d: os.mkfifo(d / "pipe.png"), "pipe.png", "unknown", "neither a file nor a folder"),
]


@pytest.fixture
def small_bombs(monkeypatch) -> None:
    """What is too large here is small enough for a test."""
    monkeypatch.setattr("ldm.inputs.LARGEST", 100_000)


def seen(report: Report) -> list[tuple[str, str]]:
    return [(finding.path, finding.kind) for finding in report.findings]


def test_every_planted_defect_is_found(tmp_path, small_bombs):
    """All at once in one folder: each with its path, kind and reason, and nothing else."""
    assert check(find(sound(tmp_path))).findings == ()
    for plant, *_ in PLANTED:
        plant(tmp_path)
    result = check(find(tmp_path))
    assert sorted(seen(result)) == sorted((path, kind) for _, path, kind, _ in PLANTED) and len(PLANTED) >= 30
    reasons = {(finding.path, finding.kind): finding.reason for finding in result.findings}
    for _, path, kind, words in PLANTED:
        assert words in reasons[path, kind], (path, reasons[path, kind])
    defects = {path for _, path, kind, _ in PLANTED if KINDS[kind][0] == "defect"}
    assert {finding.path for finding in result.defects} == defects
    assert not defects & {one.key for one in result.usable}


@pytest.mark.parametrize("number", range(len(PLANTED)), ids=[f"{kind}-{path}" for _, path, kind, _ in PLANTED])
def test_skip_is_the_cleaned_set(number, tmp_path, small_bombs):
    """The pictures that skip keeps are those of the folder from which the defects were taken out by hand."""
    plant, path, kind, _ = PLANTED[number]
    plant(sound(tmp_path))
    found = find(tmp_path)
    kept, result = accepted(found, "skip")
    assert seen(result) == [(path, kind)]
    if KINDS[kind][0] == "note":
        assert kept == found.pictures and accepted(found)[0] == kept
        return
    with pytest.raises(LdmError, match="1 defect in the data: ") as error:
        accepted(found)
    assert path in str(error.value) and "--policy skip" in str(error.value)
    for file in tmp_path.glob(f"{Path(path).stem}.*"):
        file.unlink()
    cleaned = find(tmp_path)
    assert kept == cleaned.pictures and check(cleaned).findings == ()
    assert fingerprint(kept) == fingerprint(cleaned.pictures)


def test_what_may_not_be_read(run):
    """A file, a caption and a folder without permission; for root there is no such thing, so it becomes nobody."""
    root = os.geteuid() == 0
    place = Path(tempfile.mkdtemp(dir="/tmp" if root else None))  # where nobody gets to, whatever TMPDIR is
    place.chmod(0o755)
    try:
        folder = sound(place / "d")
        (folder / "sub").mkdir()
        for name in (SOUND[0], "sound-1.txt", "sub"):
            (folder / name).chmod(0)
        if root:
            os.seteuid(65534)
        try:
            result = check(find(folder))
        finally:
            if root:
                os.seteuid(0)
    finally:
        shutil.rmtree(place)
    assert seen(result) == [("sound-0.png", "unreadable"), ("sound-1.png", "unreadable"), ("sub/", "unreadable")]
    assert all("Permission denied" in finding.reason for finding in result.findings)
    assert [one.key for one in result.usable] == SOUND[2:]


ROWS = [
    ('{"file_name": "sound-0.png", "text": "one"', "metadata-line", "it is no JSON"),
    ('["sound-0.png"]', "metadata-line", "no object"),
    ('{"name": "sound-0.png", "text": "one"}', "metadata-line", "neither image nor file_name is in ['name', 'text']"),
    (b'{"file_name": "sound-0.png", "text": "caf\xe9"}', "metadata-line", "not UTF-8: byte 42"),
    ('{"file_name": "gone.png", "text": "one"}', "metadata-missing", "gone.png, which is not there"),
    ('{"file_name": "../sound-0.png", "text": "one"}', "metadata-missing", "outside"),
    ('{"file_name": "/etc/passwd", "text": "one"}', "metadata-missing", "outside"),
    ('{"file_name": "./sound-5.png", "text": "one"}', "twice", "names sound-5.png, as metadata.jsonl:1 does"),
]


@pytest.mark.parametrize(("line", "kind", "words"), ROWS)
def test_rows_of_metadata(line, kind, words, tmp_path):
    """Each is named by file and line, and leaves the others as they are."""
    good = [json.dumps({"file_name": name, "text": "a pattern"}).encode() for name in SOUND[::-1]]
    (sound(tmp_path) / "metadata.jsonl").write_bytes(b"\n".join(good))
    clean = find(tmp_path)
    assert check(clean).findings == ()
    bad = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "metadata.jsonl").write_bytes(b"\n".join([*good, bad, b""]))
    found = find(tmp_path)
    (finding,) = check(found).findings
    assert (finding.path, finding.kind) == ("metadata.jsonl:7", kind) and words in finding.reason
    assert accepted(found, "skip")[0] == clean.pictures


def test_captions_in_rows(tmp_path):
    rows = zip(SOUND, ("one", None, " ", "\ud800", ["a", "b"]), strict=False)  # and no row for the last
    lines = [json.dumps({"file_name": name, "text": caption}) for name, caption in rows]
    (sound(tmp_path) / "metadata.jsonl").write_text("\n".join(lines))
    kinds = ["caption-missing", "caption-empty", "caption-encoding", "caption-missing", "unlisted"]
    assert seen(check(find(tmp_path))) == list(zip(SOUND[1:], kinds, strict=True))


def test_what_is_just_right(tmp_path):
    """The least side, the longest caption, an alpha that hides nothing, two JPEG in one file, a suffix in capitals."""
    save(tmp_path / "least.png", patches(0, (64, 96)))
    save(tmp_path / "long.png", patches(1, (96, 80)), "owl " * 75)
    save(tmp_path / "opaque.png", patches(2, (96, 80)).convert("RGBA"))
    save(tmp_path / "two.jpg", patches(3, (96, 80)), format="MPO", save_all=True, append_images=[patches(4, (96, 80))])
    save(tmp_path / "LOUD.JPEG", patches(5, (96, 80)))
    assert check(find(tmp_path)).findings == ()
    with Image.open(tmp_path / "two.jpg") as image:
        assert image.format == "MPO" and image.n_frames == 2
    captioned(tmp_path / "long.png", "owl " * 76)
    assert seen(check(find(tmp_path))) == [("long.png", "caption-long")]


def test_no_captions_at_all_is_no_defect(tmp_path):
    """Training may have one prompt for all of them."""
    for seed, name in enumerate(SOUND):
        save(tmp_path / name, patches(seed, (96, 80)), None)
    found = find(tmp_path)
    assert found.summary == "6 images, no captions" and check(found).findings == ()


def members(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_shards(tmp_path, small_bombs):
    """The defects in a tar are those in the folder, but for what a tar cannot hold; cut off, it says where."""
    folder = sound(tmp_path / "d")
    clean = check(find(packed(folder, tmp_path / "x.tar", members(folder))))
    assert clean.findings == () and len(clean.usable) == 6
    for plant, _, kind, _ in PLANTED:
        if kind not in ("unknown", "link"):
            plant(folder)
    in_folder, in_tar = (check(find(one)) for one in (folder, packed(folder, tmp_path / "x.tar", members(folder))))
    assert [(f"x.tar: {path}", kind) for path, kind in seen(in_folder)] == seen(in_tar)
    assert [one.key for one in in_tar.usable] == [one.key for one in in_folder.usable]


def test_shards_that_are_cut_or_none(tmp_path):
    folder = sound(tmp_path / "d")
    path = packed(folder, tmp_path / "x.tar", members(folder))
    last = find(path).pictures[-1]
    path.write_bytes(path.read_bytes()[: last.start + 100])
    result = check(find(path))
    assert seen(result) == [("x.tar: sound-5.png", "caption-missing"), ("x.tar: sound-5.png", "shard")]
    assert f"100 of {last.length} bytes" in result.findings[1].reason
    assert [one.key for one in result.usable] == SOUND[:5]
    packed(folder, tmp_path / "two.tar", [SOUND[0], SOUND[1], SOUND[0]])
    assert seen(check(find(tmp_path / "two.tar"))) == [("two.tar: sound-0.png", "twice")]
    (tmp_path / "no.tar").write_bytes(b"\x1f\x8b not a tar" * 99)
    with pytest.raises(UsageError, match=r"no pictures in .*no\.tar; no\.tar: it cannot be read after 0 files"):
        find(tmp_path / "no.tar")


# -- what looks alike -------------------------------------------------------------------------------------------------


def test_scenes_that_share_a_ground_are_no_duplicates(noto_font):
    """300 scenes, of which many share their ground or their object: none is taken for another."""
    scenes = EmojiScenes(CorpusConfig(size=64), 0)
    images = [Image.fromarray(scenes.scene(i).image) for i in range(300)]
    hashes = np.array([dhash(image) for image in images], dtype=np.uint64)
    alike = np.bitwise_count(hashes[:, None] ^ hashes) <= HASH_BITS
    thumbs = np.stack([np.asarray(image.resize((16, 16), Image.Resampling.BOX), float) for image in images])
    near = np.abs(thumbs[:, None] - thumbs).mean((2, 3, 4)) <= THUMB_LEVELS
    assert not np.triu(alike & near, 1).any()
    assert np.triu(alike, 1).sum() > 50 and np.triu(near, 1).any()  # either alone would tell of pairs


@pytest.mark.parametrize("seed", range(4))
def test_common_changes_leave_the_hash_near(seed, tmp_path):
    image = patches(seed, (160, 128))
    changes = {
        "smaller": image.resize((120, 96), Image.Resampling.LANCZOS),
        "brighter": image.point(lambda level: min(255, int(level * 1.03))),
        "gray-edge": image.crop((1, 1, 159, 127)),
    }
    save(tmp_path / "0.png", image)
    for name, changed in changes.items():
        save(tmp_path / f"{name}.png", changed)
    save(tmp_path / "jpeg.jpg", image, quality=60)
    save(tmp_path / "other.png", patches(seed + 100, (160, 128)))
    told = seen(check(find(tmp_path)))
    assert told == [
        (f"{name}", "near-duplicate") for name in ("brighter.png", "gray-edge.png", "jpeg.jpg", "smaller.png")
    ]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of tags that are odd, before it reads on
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".bmp", ".tif"])
def test_any_damage_ends_in_a_finding(suffix, tmp_path):
    """Random bytes changed, and cuts everywhere: a finding or a picture, never another error; cuts of PNG are seen."""
    patches(0, (96, 80)).save(tmp_path / f"x{suffix}")
    data = (tmp_path / f"x{suffix}").read_bytes()
    random = np.random.default_rng(0)
    silent = 0
    for trial in range(60):
        damaged = bytearray(data)
        for at in random.integers(0, len(data), 1 + trial % 4):
            damaged[at] ^= random.integers(1, 256)
        (tmp_path / f"x{suffix}").write_bytes(damaged)
        silent += not look(Picture(f"x{suffix}", tmp_path / f"x{suffix}")).findings
    if suffix == ".png":
        assert silent == 0
    for cut in random.integers(0, len(data) - 1, 40):
        (tmp_path / f"x{suffix}").write_bytes(data[:cut])
        found = look(Picture(f"x{suffix}", tmp_path / f"x{suffix}")).findings
        assert found or suffix == ".gif", cut


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(run) -> Iterator[Callable[..., Done]]:
    yield lambda *words: run("data", "check", *words)


def test_command(command, tmp_path):
    """A table for people, JSON for programs; 0 when nothing stops training, 1 when something does, 2 for misuse."""
    sound(Path("d"))
    assert command("d") == Done(0, "6 images, 6 captions (.txt)\nno defects, no notes\n", "")
    rotated(Path("d"))
    done = command("d")
    assert done.code == 0 and done.out.splitlines()[1:] == [
        "note  rotated  rotated.jpg  its EXIF says to turn or mirror it, and so it is",
        "no defects, 1 note",
    ]
    Path("d/\x1b[31m.png").write_bytes(b"")
    Path("d/\x1b[31m.txt").write_text("a caption")
    done = command("d")
    assert done.code == 1 and done.err == ""
    assert done.out.splitlines() == [
        "8 images, 8 captions (.txt)",
        r"defect  empty    \x1b[31m.png  it has no bytes",
        "note    rotated  rotated.jpg   its EXIF says to turn or mirror it, and so it is",
        "1 defect, 1 note",
    ]
    done = command("d", "--policy", "skip", "--json")
    told = json.loads(done.out)
    assert done.code == 0 and told["left_out"] == ["\x1b[31m.png"] and (told["images"], told["usable"]) == (8, 7)
    finding = {"path": "\x1b[31m.png", "kind": "empty", "severity": "defect", "reason": "it has no bytes"}
    assert told["summary"] == "8 images, 8 captions (.txt)" and told["findings"][0] == finding
    assert command("d", "--policy", "skip").out.endswith("1 defect, 1 note; 7 of 8 images are used\n")
    assert command("d", "--policy", "skip", "--min-side", "81").code == 1  # none is left
    done = command("d", "--policy", "ignore")
    assert done.code == 2 and "known: error, skip" in done.err
    done = command("nowhere")
    assert done.code == 2 and "nowhere is not there" in done.err


def test_command_takes_shards_and_columns(command):
    folder = sound(Path("d"))
    packed(folder, Path("x-0.tar"), members(folder)[:6])
    packed(folder, Path("x-1.tar"), members(folder)[6:])
    for words in (["x-{0..1}.tar"], ["x-0.tar", "x-1.tar"]):
        assert command(*words).out.startswith("6 images, 6 captions (.txt) in 2 tar shards\n")
    rows = [json.dumps({"picture": name, "prompt": "a pattern"}) for name in SOUND]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    assert "--caption-column prompt" in command("d").err
    done = command("d", "--image-column", "picture", "--caption-column", "prompt")
    assert done.out.startswith("6 images, 6 captions (metadata.jsonl)\n") and done.code == 0


def test_the_page_has_all_kinds():
    """The table of docs/command-line.md is that of the code, and every kind but that for nobody's files is planted."""
    page = (Path(__file__).parents[1] / "docs" / "command-line.md").read_text("utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \| (defect|note) \| (.+) \|$", page, re.MULTILINE)
    assert {kind: (severity, words) for kind, severity, words in rows} == KINDS
    planted = {kind for _, _, kind, _ in PLANTED} | {kind for _, kind, _ in ROWS}
    assert KINDS.keys() - planted == {"unreadable", "unlisted", "shard"}  # in tests of their own
