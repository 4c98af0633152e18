"""Data sets of captioned pictures: one corpus in every form that `--data` takes, pixels as training sees them, and what
a set is known by.
"""

import csv
import json
import os
import pickle
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm import inputs
from ldm.data.pictures import Picture, difference, fingerprint, manifest
from ldm.data.shards import expanded, split_member
from ldm.data.sources import find
from ldm.errors import LdmError, UsageError

CAPTIONS = {
    "a.png": "an owl, wide awake",
    "b.jpg": 'a "red" door',
    "cats/7.webp": "eine Katze auf dem Dach, 猫",
    "cats/small/1.png": "a kitten",
    "z.bmp": "a square",
}


def patches(seed: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
    """Soft patches of colour, of which no two seeds look alike."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def drawn(folder: Path, captions: dict[str, str] = CAPTIONS) -> Path:
    """The corpus's pictures, without captions."""
    for seed, name in enumerate(captions):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        patches(seed).save(folder / name)
    return folder


def with_sidecars(folder: Path, suffix: str = ".txt") -> Path:
    for name, caption in CAPTIONS.items():
        (drawn(folder) / name).with_suffix(suffix).write_text(caption + "\n", "utf-8")
    return folder


def packed(folder: Path, path: Path, names: list[str] | None = None) -> Path:
    """The files of a folder as a tar, in any order."""
    with tarfile.open(path, "w") as tar:
        for name in names or [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]:
            tar.add(folder / name, name)
    return path


@pytest.fixture
def corpus(tmp_path) -> Path:
    return with_sidecars(tmp_path / "corpus")


def as_caption_files(folder: Path) -> Path:
    return with_sidecars(folder, ".caption")


def as_jsonl(folder: Path) -> Path:
    rows = [{"file_name": name, "text": caption, "width": 96} for name, caption in reversed(CAPTIONS.items())]
    (drawn(folder) / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return folder


def as_csv(folder: Path) -> Path:
    with (drawn(folder) / "metadata.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([("text", "file_name"), *((text, f"./{name}") for name, text in CAPTIONS.items())])
    return folder


def as_nested_jsonl(folder: Path) -> Path:
    """A file of metadata in each folder, with names relative to it, as the imagefolder of datasets has it."""
    as_jsonl(folder)
    rows = {name.removeprefix("cats/"): text for name, text in CAPTIONS.items() if name.startswith("cats/")}
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in CAPTIONS.items() if name not in rows]
    (folder / "metadata.jsonl").write_text("\n".join(line for line in lines if "cats" not in line))
    inner = [json.dumps({"image_file_name": name, "text": text}) for name, text in rows.items()]
    (folder / "cats" / "metadata.jsonl").write_text("\n".join(inner))
    return folder


def as_tar(folder: Path) -> Path:
    return packed(with_sidecars(folder), folder.with_suffix(".tar"))


def as_folder_with_a_tar(folder: Path) -> Path:
    (folder / "shards").mkdir(parents=True)
    packed(with_sidecars(folder.with_name("loose")), folder / "shards" / "0.tar")
    return folder


def as_tar_with_json(folder: Path) -> Path:
    for name, caption in CAPTIONS.items():
        (drawn(folder) / name).with_suffix(".json").write_text(json.dumps({"text": caption, "width": 96}))
    return packed(folder, folder.with_suffix(".tar"))


FORMS = {
    as_caption_files: "5 images, 5 captions (.caption)",
    as_jsonl: "5 images, 5 captions (metadata.jsonl)",
    as_csv: "5 images, 5 captions (metadata.csv)",
    as_nested_jsonl: "5 images, 5 captions (metadata.jsonl)",
    as_tar: "5 images, 5 captions (.txt) in 1 tar shard",
    as_folder_with_a_tar: "5 images, 5 captions (.txt) in 1 tar shard",
    as_tar_with_json: "5 images, 5 captions (.json) in 1 tar shard",
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_pictures(form, corpus, tmp_path):
    """Keys, captions, bytes and order, and so one fingerprint; and the form is said."""
    plain, other = find(corpus), find(form(tmp_path / "other"))
    assert plain.summary == "5 images, 5 captions (.txt)" and other.summary == FORMS[form]
    assert [(p.key, p.caption) for p in other.pictures] == sorted(CAPTIONS.items())
    assert [p.read() for p in other.pictures] == [(corpus / name).read_bytes() for name in sorted(CAPTIONS)]
    assert fingerprint(other.pictures) == fingerprint(plain.pictures)
    assert not plain.findings and not other.findings


def test_tables_give_the_same_pictures(corpus, tmp_path):
    """Parquet as `datasets` writes it, with pictures as bytes or as a struct; unpacked once."""
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    files = [(corpus / name).read_bytes() for name in sorted(CAPTIONS)]
    captions = [CAPTIONS[name] for name in sorted(CAPTIONS)]
    structs = [{"bytes": data, "path": None} for data in files]
    (tmp_path / "table").mkdir()
    for name, column, rows in (("0.parquet", "image", structs[:3]), ("1.parquet", "image", structs[3:])):
        text = captions[:3] if name == "0.parquet" else captions[3:]
        parquet.write_table(pa.table({column: rows, "text": text, "n": [0] * len(rows)}), tmp_path / "table" / name)
    found = find(tmp_path / "table", cache=tmp_path / "cache")
    assert found.summary == "5 images, 5 captions (text) in 2 parquet files"
    assert [p.read() for p in found.pictures] == files and [p.caption for p in found.pictures] == captions
    (made,) = (tmp_path / "cache").iterdir()
    before = made.stat().st_mtime_ns
    assert find(tmp_path / "table", cache=tmp_path / "cache") == found and made.stat().st_mtime_ns == before
    stolen = [{"bytes": None, "path": str(corpus / "a.png")}]  # a table does not say which files are read
    parquet.write_table(pa.table({"image": stolen, "text": ["x"]}), tmp_path / "x.parquet")
    assert find(tmp_path / "x.parquet", cache=tmp_path / "cache").pictures[0].read() == b""
    with pytest.raises(UsageError, match="no column 'caption' but image, text, n; name one with --caption-column"):
        find(tmp_path / "table", caption_column="caption", cache=tmp_path / "cache")


@pytest.mark.parametrize(("name", "package"), [("0.parquet", "pyarrow"), ("owner/name", "datasets")])
def test_a_missing_package_is_named(name, package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("0.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr("ldm.data.shards.find_spec", lambda name: None)
    with pytest.raises(LdmError, match=f"run: pip install {package}"):
        find(name)


def test_the_hub_is_asked_through_datasets(corpus, monkeypatch, tmp_path):
    """With a stand-in for the library, which is not installed everywhere: what it is asked, and what becomes of it."""

    class Table(list):
        column_names, _fingerprint = ("image", "text"), "f00d"

        def select_columns(self, names):
            assert names == ["image", "text"]
            return self

        def cast_column(self, name, kind):
            assert name == "image" and kind == {"decode": False}
            return self

    class Datasets:
        @staticmethod
        def load_dataset(name, split):
            assert (name, split) == ("owner/name", "train")
            data = {"bytes": (corpus / "a.png").read_bytes(), "path": None}
            local = {"bytes": None, "path": str(corpus / "b.jpg")}
            return Table([{"image": data, "text": "one"}, {"image": local, "text": None}])

        @staticmethod
        def Image(decode):
            return {"decode": decode}

    monkeypatch.setattr("ldm.data.shards._module", lambda name, purpose: Datasets)
    found = find("owner/name", cache=tmp_path / "cache")
    assert found.summary == "2 images, 1 caption (text) of owner/name on the hub"
    assert [(p.key, p.caption) for p in found.pictures] == [("00000000.png", "one"), ("00000001.jpg", "")]
    assert [p.read() for p in found.pictures] == [(corpus / name).read_bytes() for name in ("a.png", "b.jpg")]


# -- tar shards -------------------------------------------------------------------------------------------------------

MEMBERS = {  # webdataset's own answer (1.0.2, base_plus_ext), which the next test asks again where it is installed
    "a.png": ("a", ".png"),
    "x/y/a.left.png": ("x/y/a", ".left.png"),
    "x.y/a.txt": ("x.y/a", ".txt"),
    "x.y/a": None,
    "a": None,
    ".hidden": None,
    "x/._a.png": ("x/", "._a.png"),  # so it says; members whose names begin with a dot are passed over here
}


def test_samples_are_split_as_webdataset_does():
    assert {name: split_member(name) for name in MEMBERS} == MEMBERS


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the library leaves its file open
def test_webdataset_reads_the_same(corpus, tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed: pip install webdataset")
    from webdataset.tariterators import base_plus_ext

    assert {name: base_plus_ext(name) for name in MEMBERS} == {
        name: (parts[0], parts[1][1:]) if parts else (None, None) for name, parts in MEMBERS.items()
    }
    names = [member for name in CAPTIONS for member in (name, str(Path(name).with_suffix(".txt")))]
    path = packed(corpus, tmp_path / "x.tar", names)
    samples = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
    theirs = {s["__key__"]: (next(s[k] for k in s if k in ("png", "jpg", "webp", "bmp")), s["txt"]) for s in samples}
    ours = {p.key.rsplit(".", 1)[0]: (p.read(), f"{p.caption}\n".encode()) for p in find(path).pictures}
    assert ours == theirs


def test_members_that_are_none_of_the_pictures(corpus, tmp_path):
    """Folders, links, metadata and what systems add are passed over; "./" is no part of a name; order is by key."""
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(corpus / "cats", "cats", recursive=False)
        for name in ("__meta__/a.png", "x/._a.png", ".b.png", "./z.png", "a.png"):
            tar.add(corpus / "a.png", name)
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        tar.add(corpus / "a.txt", "a.txt")
        tar.add(corpus / "b.txt", "z.caption")
    found = find(tmp_path / "x.tar")
    assert [(p.key, p.caption) for p in found.pictures] == [("a.png", CAPTIONS["a.png"]), ("z.png", CAPTIONS["b.jpg"])]
    assert found.summary == "2 images, 2 captions (.caption, .txt) in 1 tar shard" and not found.findings


def test_braces():
    assert expanded("d-{008..010}.tar") == ["d-008.tar", "d-009.tar", "d-010.tar"]
    assert expanded("{a,b}/{0..1}.tar") == ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]
    assert expanded("plain{}.tar") == ["plain{}.tar"] and expanded("{2..1}") == []
    with pytest.raises(UsageError, match="more than 100000 files"):
        expanded("{0..99999999}.tar")


def test_several_shards(corpus, tmp_path):
    """Samples numbered anew in each shard are different pictures; a pattern and a list of paths are the same."""
    for shard in ("d-00", "d-01"):
        packed(corpus, tmp_path / f"{shard}.tar", ["a.png", "a.txt"])
    by_pattern = find(str(tmp_path / "d-{00..01}.tar"))
    assert [p.key for p in by_pattern.pictures] == ["d-00/a.png", "d-01/a.png"]
    assert by_pattern.summary == "2 images, 2 captions (.txt) in 2 tar shards"
    assert by_pattern == find([tmp_path / "d-00.tar", tmp_path / "d-01.tar"]) == find([*tmp_path.glob("d-*.tar")][::-1])
    (tmp_path / "more").mkdir()
    (tmp_path / "d-01.tar").rename(tmp_path / "more" / "d-00.tar")  # the same name elsewhere is another shard
    apart = find([tmp_path / "d-00.tar", tmp_path / "more" / "d-00.tar"])
    assert [p.key for p in apart.pictures] == ["d-00/a.png", "more/d-00/a.png"] and not apart.findings
    (tmp_path / "{a,b}").mkdir()  # a name that is there is no pattern
    assert find(with_sidecars(tmp_path / "{a,b}")).summary == "5 images, 5 captions (.txt)"
    with pytest.raises(UsageError, match=r"d-01\.tar is not there"):
        find(str(tmp_path / "d-{00..02}.tar"))


# -- order, pickles, refusals -----------------------------------------------------------------------------------------


def test_order_does_not_hang_on_the_file_system(corpus, monkeypatch):
    plain, scandir = find(corpus), os.scandir
    for seed in range(5):
        monkeypatch.setattr(os, "scandir", lambda p, s=seed: random.Random(s).sample([*scandir(p)], len([*scandir(p)])))
        assert find(corpus) == plain
    assert [p.key for p in plain.pictures] == sorted(CAPTIONS)


def test_pictures_are_small_pickles(corpus):
    found = find(corpus)
    again = pickle.loads(pickle.dumps(found.pictures))
    assert again == found.pictures and again[0].open().tobytes() == found.pictures[0].open().tobytes()
    assert len(pickle.dumps(found.pictures[0])) < 500
    (corpus / "a.png").write_bytes(b"")
    with pytest.raises(LdmError) as error:
        found.pictures[0].open()
    copy = pickle.loads(pickle.dumps(error.value))  # as it comes from a worker
    assert (str(copy), copy.kind) == ("a.png is no picture to train on: it has no bytes", "empty")


def test_links_in_a_circle_end(corpus):
    (corpus / "cats" / "again").symlink_to(corpus)
    assert len(find(corpus).pictures) <= 2 * len(CAPTIONS)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Path("d").mkdir(), "there are no pictures in d; it takes .avif"),
        (
            lambda: (Path("d").mkdir(), Path("d/a.txt").write_text("x")),
            "no pictures in d; a.txt: no picture has the name",
        ),
        (lambda: None, "d is not there; give a folder"),
        (lambda: Path("d").write_text("x"), "d: no folder; pictures come from one folder"),
        (lambda: (as_jsonl(Path("d")), as_csv(Path("d"))), "has both metadata.jsonl and metadata.csv; keep one"),
    ],
)
def test_refusals(make, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make()
    with pytest.raises(UsageError) as error:
        find("d")
    assert said in str(error.value)


def test_a_caption_column_of_another_name(tmp_path):
    as_jsonl(tmp_path)
    text = (tmp_path / "metadata.jsonl").read_text().replace('"text"', '"prompt"')
    (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises(UsageError, match="for example --caption-column prompt"):
        find(tmp_path)
    assert find(tmp_path, caption_column="prompt").pictures[0].caption == CAPTIONS["a.png"]


# -- pixels -----------------------------------------------------------------------------------------------------------


def opened(tmp_path: Path, image: Image.Image, name: str = "x.png", **options: object) -> np.ndarray:
    image.save(tmp_path / name, **options)
    shown = Picture(name, tmp_path / name).open()
    assert shown.mode == "RGB"
    return np.asarray(shown)


TURNS = {  # EXIF 2.32, table 6: where row 0 and column 0 of what is stored are to be seen
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", TURNS)
def test_turned_as_exif_says(orientation, tmp_path):
    image, exif = patches(0), Image.Exif()
    exif[0x112] = orientation
    assert np.array_equal(opened(tmp_path, image, exif=exif), TURNS[orientation](np.asarray(image)))


def test_transparent_is_white(tmp_path):
    """v a + 255 (1 - a), and white where alpha is 0; in a palette too."""
    image = patches(1).convert("RGBA")
    alpha = np.linspace(0, 255, 96, dtype=np.uint8)[None].repeat(64, 0)
    image.putalpha(Image.fromarray(alpha))
    share = alpha[..., None] / 255.0
    expected = np.asarray(patches(1)) * share + 255 * (1 - share)
    assert np.abs(opened(tmp_path, image) - expected).max() <= 1
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((0, 0), 1)
    shown = opened(tmp_path, palette, transparency=1)
    assert shown[0, 0].tolist() == [255, 255, 255] and shown[1, 1].tolist() == [255, 0, 0]


def test_sixteen_bits_are_scaled(tmp_path):
    """v / 257, rounded; a cut-off at 255, which is Pillow's, would be white almost everywhere."""
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    shown = opened(tmp_path, Image.fromarray(values))
    assert np.array_equal(shown, np.rint(values / 257)[..., None].repeat(3, 2))
    assert np.array_equal(opened(tmp_path, Image.fromarray(values), "x.tif"), shown)


def test_other_modes(tmp_path):
    cmyk = np.zeros((4, 4, 4), np.uint8)
    cmyk[..., 0] = 255  # cyan only
    assert opened(tmp_path, Image.fromarray(cmyk, "CMYK"), "x.tif")[0, 0].tolist() == [0, 255, 255]
    assert opened(tmp_path, Image.new("1", (4, 4), 1))[0, 0].tolist() == [255, 255, 255]
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    assert opened(tmp_path, frames[0], "x.gif", save_all=True, append_images=frames[1:])[0, 0].tolist() == [255, 0, 0]
    with pytest.raises(LdmError, match="pixels are of the kind 'F'"):
        opened(tmp_path, Image.new("F", (4, 4)), "x.tif")


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    """By its header: nothing of it is decoded. Pillow's own limits do not get in the way."""
    monkeypatch.setattr(inputs, "LARGEST", 96 * 64)
    assert opened(tmp_path, patches(0)).shape == (64, 96, 3)
    monkeypatch.setattr(inputs, "LARGEST", 96 * 64 - 1)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(LdmError, match=r"x\.png .*too large to be decoded: 96 x 64 pixels, and 6143"):
        Picture("x.png", tmp_path / "x.png").open()


def test_what_is_gone_or_shorter_is_named(corpus, tmp_path):
    picture = find(packed(corpus, tmp_path / "x.tar")).pictures[0]
    data = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(data[: picture.start + 10])
    with pytest.raises(LdmError, match=r"x\.tar ends within a\.png: 10 of its \d+ bytes"):
        picture.open()
    (tmp_path / "x.tar").unlink()
    with pytest.raises(LdmError, match=r"x\.tar cannot be read: No such file"):
        picture.read()


# -- masks ------------------------------------------------------------------------------------------------------------


def test_masks(corpus, tmp_path):
    """Beside the picture, in masks/, in a tar, or its alpha; and white everywhere for a picture without alpha."""
    mask = Image.new("L", (96, 64))
    mask.paste(255, (0, 0, 48, 64))
    mask.save(corpus / "a.mask.png")
    (corpus / "masks" / "cats").mkdir(parents=True)
    mask.save(corpus / "masks" / "cats" / "7.png")
    cut = patches(1).convert("RGBA")
    cut.putalpha(mask)
    cut.save(corpus / "b.png")
    (corpus / "b.jpg").unlink()
    for source in (corpus, packed(corpus, tmp_path / "x.tar")):
        found = find(source)
        assert len(found.pictures) == 5 and ", 2 masks" in found.summary and not found.findings
        shown = {p.key: p.open_mask() for p in found.pictures}
        assert [key for key, one in shown.items() if one] == ["a.png", "cats/7.webp"]
        assert all(one.mode == "L" and one.tobytes() == mask.tobytes() for one in shown.values() if one)
        alphas = {p.key: np.asarray(p.open_mask()) for p in find(source, alpha_masks=True).pictures}
        assert np.array_equal(alphas["b.png"], np.asarray(mask)) and (alphas["z.bmp"] == 255).all()
        assert np.array_equal(alphas["a.png"], np.asarray(mask))


# -- what a set is known by -------------------------------------------------------------------------------------------


def test_every_change_is_noticed_and_named(corpus):
    """The manifest goes through JSON, as it does when it is kept with a run."""
    before = manifest(find(corpus).pictures)
    known = fingerprint(before)
    assert fingerprint(find(corpus).pictures) == known and difference(before, before) == ""
    kept = json.loads(json.dumps(before))
    assert fingerprint(kept) == known and difference(kept, before) == ""
    os.utime(corpus / "a.png", (0, 0))
    assert fingerprint(find(corpus).pictures) == known  # a date is no content
    (corpus / "a.txt").write_text("another")
    after = manifest(find(corpus).pictures)
    assert difference(kept, after) == "1 with another caption (a.png)" and fingerprint(after) != known
    patches(9).save(corpus / "b.jpg")
    Image.new("L", (96, 64)).save(corpus / "z.mask.png")
    after = manifest(find(corpus).pictures)
    said = "1 with another content (b.jpg), 1 with another caption (a.png), 1 with another mask (z.bmp)"
    assert difference(kept, after) == said
    (corpus / "a.png").rename(corpus / "c.png")
    (corpus / "a.txt").rename(corpus / "c.txt")
    assert difference(kept, manifest(find(corpus).pictures)).startswith("1 gone (a.png), 1 new (c.png), ")
    backwards = dict(reversed(kept.items()))
    assert difference(kept, backwards) == "another order" and fingerprint(backwards) != known
