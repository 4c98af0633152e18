"""Model files: hostile ones are refused, good ones exchanged with safetensors and diffusers, writing all or nothing."""

import errno
import json
import os
import random
import shutil
import stat
import subprocess
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from ldm.checkpoints import safe
from ldm.checkpoints.components import Components
from ldm.checkpoints.folder import open_folder, save_folder
from ldm.checkpoints.load import load_into
from ldm.checkpoints.safe import (
    atomic_bytes,
    atomic_folder,
    atomic_json,
    atomic_save_safetensors,
    atomic_write,
    check_manifest,
    read_header,
    read_json,
    write_manifest,
)
from ldm.errors import LdmError, ModelError, NumericalError, UsageError
from ldm.models.clip import CLIPTextConfig, CLIPTextModel
from ldm.models.unet import CROSS, PLAIN, UNet, UNetConfig
from ldm.models.vae import AutoencoderKL, VAEConfig
from ldm.text.encoder import TextEncoder
from ldm.text.tokenizer import CLIPTokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the other libraries' own deprecations while they import
    import diffusers

pytestmark = pytest.mark.usefixtures("one_thread")
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def packed(header: object, data: bytes = bytes(8)) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def field(**changes: object) -> dict[str, object]:
    return {"w": F32 | changes}


# -- reading ----------------------------------------------------------------------------------------------------------

HOSTILE = {
    "empty": (b"", r"empty \(0 bytes\)"),
    "two bytes": (b"{}", "not a safetensors file"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git-lfs pointer"),
    "HTML": (b"\n<!DOCTYPE html><html><body>404</body></html>", "HTML page"),
    "HTML without doctype": (b"<HTML><head></head></HTML>", "HTML page"),
    "zip": (b"PK\x03\x04" + bytes(60), "zip archive"),
    "pickle": (b"\x80\x02}q\x00(X\x01\x00\x00\x00w" + bytes(40), "pickled"),
    "GGUF": (b"GGUF\x03\x00\x00\x00" + bytes(40), "GGUF"),
    "zeros": (bytes(64), "not a safetensors file"),
    "header length of 2**63": ((2**63).to_bytes(8, "little") + b"{}" + bytes(20), "not a safetensors file"),
    "header longer than the file": ((500).to_bytes(8, "little") + b"{}" + bytes(20), "header ends at byte 508.*has 30"),
    "header shorter than it is": ((9).to_bytes(8, "little") + packed(field())[8:], "damaged"),
    "half of the data": (packed(field(), bytes(4)), "truncated, its tensors need 8 bytes and it has 4"),
    "foreign bytes behind": (packed(field(), bytes(9)), "followed by foreign bytes"),
    "not UTF-8": (packed(b'{"\xff\xfe": 1}'), "damaged"),
    "not JSON": (packed(b"{'w': 1}"), "damaged"),
    "deep nesting": (packed(b'{"w":' + b"[" * 100_000), "damaged"),
    "no table for a tensor": (packed({"w": [1]}), "other fields"),
    "duplicate name": (packed(json.dumps({"v": F32, "w": F32}).replace('"v"', '"w"').encode()), "twice"),
    "duplicate field": (packed(b'{"w":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}'), "twice"),
    "extra field": (packed(field(note="x")), "other fields"),
    "missing field": (packed({"w": {"dtype": "F32", "shape": [2]}}), "other fields"),
    "unknown dtype": (packed(field(dtype="F33")), "unknown dtype 'F33'"),
    "dtype of another kind": (packed(field(dtype=["F32"])), "unknown dtype"),
    "negative side": (packed(field(shape=[-2])), "impossible shape"),
    "fractional side": (packed(field(shape=[2.0])), "impossible shape"),
    "boolean side": (packed(field(shape=[True, 2])), "impossible shape"),
    "huge side": (packed(field(shape=[2**40])), "impossible shape"),
    "ten dimensions": (packed(field(shape=[1] * 9 + [2])), "impossible shape"),
    "shape larger than its bytes": (packed(field(shape=[3])), "needs 12 bytes and has 8"),
    "offsets backwards": (packed(field(data_offsets=[8, 0])), "needs 8 bytes and has -8"),
    "negative offsets": (packed(field(data_offsets=[-8, 0])), "impossible data_offsets"),
    "three offsets": (packed(field(data_offsets=[0, 4, 8])), "impossible data_offsets"),
    "overlap": (packed({"a": F32, "b": F32 | {"data_offsets": [4, 12]}}, bytes(12)), "b overlaps"),
    "the same bytes twice": (packed({"a": F32, "b": F32}), "b overlaps"),
    "gap": (packed({"a": F32, "b": F32 | {"data_offsets": [12, 20]}}, bytes(20)), "b leaves a gap"),
    "gap at the start": (packed(field(data_offsets=[4, 12]), bytes(12)), "w leaves a gap"),
    "terminal codes in a name": (packed({"w\x1b[31m": F32}), r"'w\\x1b\[31m'"),
    "path in a name": (packed({"../../w w": F32}), "characters outside"),
    "very long name": (packed({"w" * 600: F32}), "characters outside"),
    "metadata of numbers": (packed({"__metadata__": {"format": 1}} | field()), "__metadata__"),
    "metadata as list": (packed({"__metadata__": ["pt"]} | field()), "__metadata__"),
    "too many tensors": (
        packed({f"w{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(65_537)}, b""),
        "more than 65,536 tensors",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_by_what_is_wrong_with_them(tmp_path, case: str) -> None:
    content, words = HOSTILE[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=words) as caught:
        read_header(path)
    assert str(path) in str(caught.value) and "\x1b" not in str(caught.value) and len(str(caught.value)) < 400
    with pytest.raises(ModelError, match=words):
        load_into(nn.Linear(2, 2), path)


def test_missing_files_and_folders_are_said_plainly(tmp_path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(ModelError, match="cannot read"):
            read_header(path)


def test_mutated_files_raise_nothing_but_model_errors(tmp_path) -> None:
    path, rng = tmp_path / "model.safetensors", random.Random(0)
    good = safetensors.torch.save({"a": torch.randn(3, 2), "b": torch.ones(4, dtype=torch.float16)}, {"format": "pt"})
    refused = 0
    for _ in range(600):
        mutant = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            mutant[rng.randrange(len(good) if rng.random() < 0.2 else 160)] = rng.randrange(256)
        path.write_bytes(bytes(mutant[: rng.choice([len(good), len(good), rng.randrange(len(good))])]))
        try:
            read_header(path)
        except ModelError:
            refused += 1
        else:
            with safetensors.safe_open(path, "pt"):  # what we accept, the library accepts
                pass
    assert refused > 300


TENSORS = {
    "bf16": torch.randn(3, 5).to(torch.bfloat16),
    "f16": torch.randn(7).half(),
    "f32.odd": torch.randn(1, 3),
    "f64": torch.randn(2, 2, dtype=torch.float64),
    "f8": torch.randn(3).to(torch.float8_e4m3fn),
    "i64": torch.arange(4),
    "bool": torch.tensor([True, False, True]),
    "scalar": torch.tensor(1.5),
    "none": torch.empty(0, 4),
    "transposed": torch.randn(4, 6).T,
    "part": torch.randn(10)[3:7],
    "learned": nn.Parameter(torch.randn(2)),
}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def test_written_files_are_those_of_the_library(tmp_path) -> None:
    path = tmp_path / "ours.safetensors"
    atomic_save_safetensors(TENSORS, path, {"made": "today"})
    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].shape == tensor.shape and loaded[name].dtype == tensor.dtype
        assert bits(loaded[name]) == bits(tensor)
    header = read_header(path)
    assert header.metadata == {"format": "pt", "made": "today"}
    assert all(entry.start % entry.dtype.itemsize == 0 for entry in header.tensors.values())
    first = path.read_bytes()
    atomic_save_safetensors(dict(reversed(TENSORS.items())), path, {"made": "today"})
    assert path.read_bytes() == first
    safetensors.torch.save_file({k: v.contiguous().clone() for k, v in TENSORS.items()}, path, {"format": "pt"})
    theirs = read_header(path)
    assert {k: v[:2] for k, v in theirs.tensors.items()} == {k: v[:2] for k, v in header.tensors.items()}


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"a": "\xff"}', b"[" * 100_000])
def test_damaged_json_is_refused(tmp_path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        read_json(tmp_path / "config.json")
    with pytest.raises(ModelError, match="No such file"):
        read_json(tmp_path / "none.json")


# -- loading ----------------------------------------------------------------------------------------------------------

VAE = VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, sample_size=16)
TEXT = CLIPTextConfig(
    vocab_size=520,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=12,
    eos_token_id=519,
)
UNET = UNetConfig(
    sample_size=8,
    down_block_types=(CROSS, PLAIN),
    block_out_channels=(8, 16),
    layers_per_block=1,
    norm_num_groups=4,
    cross_attention_dim=16,
    num_heads=(2, 2),
    transformer_layers_per_block=(1, 1),
)


def on_meta(build) -> nn.Module:
    with torch.device("meta"):
        return build()


def same(a: nn.Module, b: nn.Module, dtype: torch.dtype = torch.float32) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(
        mine[k].dtype == dtype and torch.equal(mine[k], theirs[k].to(dtype)) for k in mine
    )


def test_models_on_meta_are_filled_and_cast(tmp_path) -> None:
    model, path = AutoencoderKL(VAE), tmp_path / "vae.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    for dtype in (None, torch.float32, torch.float16, torch.bfloat16):
        loaded = on_meta(lambda: AutoencoderKL(VAE))
        load_into(loaded, path, dtype)
        assert same(loaded, model, dtype or torch.float32)
        assert all(p.requires_grad and not p.is_meta for p in loaded.parameters())
    before = path.read_bytes()
    load_into(loaded, path)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()  # mapped memory is private: training must not write into the file
    assert path.read_bytes() == before


def test_shards_are_joined_and_duplicates_refused(tmp_path) -> None:
    model = CLIPTextModel(TEXT)
    state = model.state_dict()
    names, paths = sorted(state), [tmp_path / f"{i}.safetensors" for i in range(3)]
    for i, path in enumerate(paths):
        safetensors.torch.save_file({name: state[name] for name in names[i::3]}, path)
    loaded = on_meta(lambda: CLIPTextModel(TEXT))
    load_into(loaded, paths)
    assert same(loaded, model)
    with pytest.raises(ModelError, match="missing"):
        load_into(on_meta(lambda: CLIPTextModel(TEXT)), paths[:2])
    with pytest.raises(ModelError, match="twice"):
        load_into(on_meta(lambda: CLIPTextModel(TEXT)), [*paths, paths[0]])


def test_both_spellings_of_clip_keys_are_read(tmp_path) -> None:
    model, path = CLIPTextModel(TEXT), tmp_path / "clip.safetensors"
    nested = model.state_dict()
    flat = {key.removeprefix("text_model."): value for key, value in nested.items()}
    stray = torch.arange(12)[None]
    strays = {"text_model.embeddings.position_ids": stray}, {"embeddings.position_ids": stray}
    for state in (nested, flat, nested | strays[0], flat | strays[1]):
        safetensors.torch.save_file(state, path)
        loaded = on_meta(lambda: CLIPTextModel(TEXT))
        load_into(loaded, path)
        assert same(loaded, model)
    safetensors.torch.save_file(nested | {"final_layer_norm.bias": torch.zeros(16)}, path)
    with pytest.raises(ModelError, match="the same weights twice"):
        load_into(on_meta(lambda: CLIPTextModel(TEXT)), path)


@pytest.mark.parametrize("convolutions", [False, True])
def test_old_names_of_the_vae_are_read_as_diffusers_reads_them(tmp_path, convolutions: bool) -> None:
    model, path = AutoencoderKL(VAE), tmp_path / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for key, value in model.state_dict().items():
        for ours, theirs in old.items():
            if f"attentions.0.{ours}." in key:
                key = key.replace(ours, theirs)
                value = value[:, :, None, None] if convolutions and value.ndim == 2 else value
        state[key] = value
    assert sum("proj_attn" in key for key in state) == 4
    safetensors.torch.save_file(state, path, {"format": "pt"})
    loaded = on_meta(lambda: AutoencoderKL(VAE))
    load_into(loaded, path)
    assert same(loaded, model)
    if not convolutions:  # diffusers itself reshapes only when it converts single files
        atomic_json(tmp_path / "config.json", VAE.to_dict())
        assert same(loaded, diffusers.AutoencoderKL.from_pretrained(tmp_path, use_safetensors=True))


def test_weights_of_another_model_are_refused_and_change_nothing(tmp_path) -> None:
    model, path = CLIPTextModel(TEXT), tmp_path / "clip.safetensors"
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wider = CLIPTextModel(replace(TEXT, vocab_size=600, num_hidden_layers=3)).state_dict()
    del wider["text_model.final_layer_norm.weight"]
    wider["text_model.final_layer_norm.bias"] = torch.zeros(16, dtype=torch.int8)
    safetensors.torch.save_file(wider, path)
    with pytest.raises(ModelError) as caught:
        load_into(model, path)
    for words in (
        "1 missing (text_model.final_layer_norm.weight)",
        "16 unexpected (text_model.encoder.layers.2.",
        ", ...)",
        "1 of another shape (text_model.embeddings.token_embedding.weight (600, 16) for (520, 16))",
        "1 without floating-point numbers (text_model.final_layer_norm.bias is I8)",
    ):
        assert words in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# -- writing ----------------------------------------------------------------------------------------------------------


class FullDisk:
    """A file that takes 100 bytes and then says, as the kernel would, that the disk is full."""

    def __init__(self, handle: int, mode: str) -> None:
        self.file = os.fdopen(handle, mode)

    def __enter__(self) -> "FullDisk":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> int:
        self.file.write(bytes(data)[:100])
        if len(bytes(data)) > 100:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(data)

    def flush(self) -> None:
        self.file.flush()

    def fileno(self) -> int:
        return self.file.fileno()


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch) -> None:
    path = tmp_path / "model.safetensors"
    atomic_save_safetensors({"w": torch.ones(4)}, path)
    before = path.read_bytes()
    monkeypatch.setattr(safe, "open", FullDisk, raising=False)
    for name in (path.name, "new.safetensors"):
        with pytest.raises(LdmError, match=f"cannot write .*{name}: No space left"):
            atomic_save_safetensors({"w": torch.zeros(1000)}, tmp_path / name)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]
    atomic_bytes(path, b"small")
    assert path.read_bytes() == b"small"  # the stand-in itself writes what fits


@pytest.mark.parametrize("refusing", ["fsync", "replace"])
def test_a_refusing_system_leaves_the_old_file(tmp_path, monkeypatch, refusing: str) -> None:
    (tmp_path / "a.json").write_text("old")

    def refuse(*_: object) -> None:
        assert (tmp_path / "a.json").read_text() == "old"
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, refusing, refuse)
    with pytest.raises(LdmError, match="broken"):
        atomic_json(tmp_path / "a.json", {"new": 1})
    assert os.listdir(tmp_path) == ["a.json"] and (tmp_path / "a.json").read_text() == "old"


def test_an_exception_inside_the_block_leaves_the_old_file(tmp_path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "a") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"
    with pytest.raises(LdmError, match="cannot write"):
        atomic_bytes(tmp_path / "none" / "a", b"")
    with pytest.raises(ValueError, match="JSON"):
        atomic_json(tmp_path / "a", {"x": float("nan")})


def test_files_are_synced_before_and_folders_after_the_rename(tmp_path, monkeypatch) -> None:
    calls: list[str] = []
    fsync, rename = os.fsync, os.replace

    def watched(handle: int) -> None:
        calls.append("dir" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append("rename") or rename(a, b))
    atomic_bytes(tmp_path / "a", b"x")
    assert calls == ["file", "rename", "dir"]


def test_permissions_follow_the_umask_and_links_are_replaced(tmp_path) -> None:
    (tmp_path / "target").write_text("shared")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    before = os.umask(0o026)
    try:
        atomic_save_safetensors({"w": torch.ones(1)}, tmp_path / "w.safetensors")
        atomic_bytes(tmp_path / "link", b"mine")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "w.safetensors").stat().st_mode) == 0o640
    assert not (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "shared"


def tree(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch) -> None:
    path = tmp_path / "deep" / "model"
    with atomic_folder(path) as staging:
        (staging / "a").write_text("1")
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), atomic_folder(path) as staging:
        (staging / "b").write_text("2")
        raise ZeroDivisionError
    with pytest.raises(LdmError, match=r"cannot write .*model"), atomic_folder(path) as staging:
        raise OSError(errno.ENOSPC, "full")
    assert tree(tmp_path) == {"deep/model/a": b"1"} and os.listdir(path.parent) == ["model"]
    rename = Path.rename

    def only_once(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError(errno.EBUSY, "busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", only_once)  # the old folder has been moved away; the new one cannot come
    with pytest.raises(LdmError, match="busy"), atomic_folder(path) as staging:
        (staging / "b").write_text("2")
    monkeypatch.undo()
    assert tree(tmp_path) == {"deep/model/a": b"1"} and os.listdir(path.parent) == ["model"]
    (tmp_path / "link").symlink_to(path, target_is_directory=True)
    with atomic_folder(tmp_path / "link") as staging:
        (staging / "b").write_text("2")
    assert tree(path) == {"b": b"2"} and (tmp_path / "link").is_symlink() and os.listdir(path.parent) == ["model"]
    with pytest.raises(LdmError, match="a file of that name"), atomic_folder(path / "b"):
        pass


def test_a_power_cut_takes_nothing_that_was_written(tmp_path, monkeypatch) -> None:
    """All contents and names of a new folder are synced before it gets its name; then that name, and those of the
    folders made for it.
    """
    events: list[object] = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append(os.fstat(handle).st_ino), fsync(handle)))
    monkeypatch.setattr(Path, "rename", lambda self, to: (events.append("rename"), rename(self, to))[1])
    path = tmp_path / "new" / "deep" / "model"
    with atomic_folder(path) as staging:
        (staging / "unet").mkdir()
        for name in ("a", "unet/b"):
            (staging / name).write_text(name)
    named = max(i for i, event in enumerate(events) if event == "rename")  # the first finds no old folder
    assert {item.stat().st_ino for item in (path, *path.rglob("*"))} <= set(events[:named])
    assert {folder.stat().st_ino for folder in (path.parent, path.parent.parent, tmp_path)} == set(events[named + 1 :])
    events.clear()
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    atomic_bytes(path / "c", b"c")
    assert events == [(path / "c").stat().st_ino, "rename", path.stat().st_ino]


def test_a_lone_number_may_lie_with_any_stride(tmp_path) -> None:
    """torch calls it contiguous: every third element of one, say."""
    lone = torch.tensor([2.5])[::3]
    assert lone.stride() == (3,)
    atomic_save_safetensors({"a": lone, "b": lone[:0], "c": lone[0]}, tmp_path / "a.safetensors")
    found = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert {name: value.tolist() for name, value in found.items()} == {"a": [2.5], "b": [], "c": 2.5}


def test_manifests_are_read_by_sha256sum_and_find_every_difference(tmp_path) -> None:
    (tmp_path / "unet").mkdir()
    for name in ("unet/a.bin", "b.txt", "c d.txt", "e.txt", "f\u2028g\x1c.txt"):
        (tmp_path / name).write_text(name)
    write_manifest(tmp_path)
    assert check_manifest(tmp_path) == {}
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--strict", "--quiet", "-c", "manifest.sha256"], cwd=tmp_path, check=True)
    (tmp_path / "unet/a.bin").write_bytes(b"unet/a.bim")  # one bit
    (tmp_path / "b.txt").unlink()
    (tmp_path / "new.txt").touch()
    assert check_manifest(tmp_path) == {"b.txt": "missing", "new.txt": "unlisted", "unet/a.bin": "changed"}
    (tmp_path / "manifest.sha256").write_text("nonsense\n")
    with pytest.raises(ModelError, match="sha256"):
        check_manifest(tmp_path)
    (tmp_path / "manifest.sha256").unlink()
    with pytest.raises(ModelError, match="cannot check"):
        check_manifest(tmp_path)


# -- model folders ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def components() -> Components:
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.train(["an owl on a red background"] * 2, vocab_size=520, max_length=12)
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", steps_offset=1, clip_sample=False)
    return Components(
        unet=UNet(UNET).eval(),
        vae=AutoencoderKL(VAE).eval(),
        text_encoder=CLIPTextModel(TEXT).eval(),
        tokenizer=tokenizer,
        scheduler_config=json.loads(scheduler.to_json_string()),
        generation={"num_inference_steps": 20, "guidance_scale": 5.0, "height": 16, "width": 16, "scheduler": "ddim"},
    )


@pytest.fixture(scope="module")
def saved(components: Components, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_folder(components, folder, dtype=None)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def stock(folder: Path, variant: str | None = None) -> diffusers.StableDiffusionPipeline:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, variant=variant, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def equal(a: Components, b: Components, dtype: torch.dtype = torch.float32) -> bool:
    return (
        a.networks.keys() == b.networks.keys()
        and all(same(network, b.networks[name], dtype) for name, network in a.networks.items())
        and (a.tokenizer.vocab, a.tokenizer.merges) == (b.tokenizer.vocab, b.tokenizer.merges)
        and a.configs == b.configs
        and a.generation == b.generation
    )


def test_a_saved_folder_opens_again(components: Components, folder: Path, tmp_path) -> None:
    again = open_folder(folder)
    assert equal(again, components) and again.scheduler_config == components.scheduler_config and again.notes == ()
    assert not again.unet.training and check_manifest(folder) == {}
    assert read_json(folder / "model_index.json")["safety_checker"] == [None, None]
    save_folder(components, tmp_path / "half")
    assert equal(open_folder(tmp_path / "half"), components, torch.float16)
    assert equal(open_folder(tmp_path / "half", torch.bfloat16), open_folder(tmp_path / "half"), torch.bfloat16)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_stock_diffusers_opens_what_we_save(components: Components, tmp_path, variant: str | None) -> None:
    save_folder(components, tmp_path / "model", dtype=None, variant=variant)
    header = read_header(tmp_path / "model" / "text_encoder" / f"model{f'.{variant}' if variant else ''}.safetensors")
    assert all(key.startswith("text_model.") for key in header.tensors)
    pipe = stock(tmp_path / "model", variant)
    assert isinstance(pipe.scheduler, diffusers.DDIMScheduler) and pipe.safety_checker is None
    prompts = ["an owl on a red background", "a background " * 20]
    encoder = TextEncoder(components.tokenizer, components.text_encoder)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([500, 20])
    with torch.no_grad():
        context = encoder(prompts).context
        pairs = [
            (context, pipe.encode_prompt(prompts, "cpu", 1, False)[0]),
            (components.unet(x, t, context), pipe.unet(x, t, context).sample),
            (components.vae.decode(x), pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample),
        ]
    for ours, theirs in pairs:
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    if variant is None:
        drawn = pipe(prompts, num_inference_steps=2, height=16, width=16, output_type="np").images
        assert drawn.shape == (2, 16, 16, 3)


def test_folders_of_stock_diffusers_open(components: Components, folder: Path, tmp_path) -> None:
    pipe = stock(folder)
    pipe.save_pretrained(tmp_path / "theirs")
    expected = replace(components, generation={})
    assert equal(open_folder(tmp_path / "theirs"), expected)
    pipe.save_pretrained(tmp_path / "shards", variant="fp16", max_shard_size="20KB")
    assert len(list((tmp_path / "shards" / "unet").glob("*-of-*.safetensors"))) > 1
    for asked, notes in (("fp16", 0), (None, 1)):
        opened = open_folder(tmp_path / "shards", variant=asked)
        assert equal(opened, expected) and len(opened.notes) == notes
    assert opened.notes == ("no plain weights of unet, vae, text_encoder; took the fp16 ones",)
    some = sorted((tmp_path / "shards" / "unet").glob("*-of-*.safetensors"))[1]
    some.unlink()
    with pytest.raises(ModelError, match=f"lacks 1 of .* shards, first {some.name}"):
        open_folder(tmp_path / "shards")


def test_another_variant_is_taken_and_said_once(components: Components, folder: Path) -> None:
    stem = folder / "unet" / "diffusion_pytorch_model"
    shutil.copy(f"{stem}.safetensors", f"{stem}.fp16.safetensors")
    opened = open_folder(folder, variant="fp16")
    assert equal(opened, components) and opened.notes == ("no fp16 weights of vae, text_encoder; took the plain ones",)


@pytest.mark.parametrize(
    "lost",
    [
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae",
        "tokenizer",
        "scheduler/scheduler_config.json",
        "text_encoder/model.safetensors",
    ],
)
def test_incomplete_folders_are_refused_by_what_is_missing(folder: Path, lost: str) -> None:
    shutil.rmtree(folder / lost) if (folder / lost).is_dir() else (folder / lost).unlink()
    with pytest.raises(ModelError, match=f"{lost}.*a model folder holds"):
        open_folder(folder)


def test_a_missing_folder_is_refused(tmp_path) -> None:
    with pytest.raises(ModelError, match=r"there is no model folder .*a model folder holds"):
        open_folder(tmp_path / "none")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": "FluxPipeline"}, "FluxPipeline"),
        ({"_class_name": None}, "StableDiffusionPipeline"),
        ({"unet": ["os", "system"]}, r"os\.system.*UNet2DConditionModel"),
        ({"unet": ["diffusers", "UNet3DConditionModel"]}, "UNet3DConditionModel"),
        ({"text_encoder": ["transformers", "BertModel"]}, r"transformers\.CLIPTokenizer.*use BertTokenizer"),
        ({"text_encoder": ["transformers", "GPT2Model"]}, "GPT2Model"),
        ({"tokenizer": ["transformers", "T5Tokenizer"]}, "T5Tokenizer"),
        ({"scheduler": ["subprocess", "Popen"]}, "Popen"),
        ({"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}, "text_encoder_2"),
    ],
)
def test_classes_we_do_not_know_are_refused_by_name(folder: Path, changes: dict[str, object], words: str) -> None:
    atomic_json(folder / "model_index.json", read_json(folder / "model_index.json") | changes)
    with pytest.raises(ModelError, match=words):
        open_folder(folder)


def test_what_is_not_used_is_reported(folder: Path) -> None:
    encoder = {"image_encoder": ["transformers", "CLIPVisionModelWithProjection"]}
    atomic_json(folder / "model_index.json", read_json(folder / "model_index.json") | encoder)
    assert open_folder(folder).notes == ("the model's image_encoder (CLIPVisionModelWithProjection) is not used",)


def test_pickles_are_refused_unread(folder: Path) -> None:
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"\x80\x02cposix\nsystem\n")
    with pytest.raises(ModelError, match="pickled checkpoint"):
        open_folder(folder)


@pytest.mark.parametrize("name", ["../../../secret.safetensors", "/etc/secret.safetensors", "a.bin", 7])
def test_shards_may_not_lie_outside_their_folder(folder: Path, name: object) -> None:
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    atomic_json(folder / "unet/diffusion_pytorch_model.safetensors.index.json", {"weight_map": {"w": name}})
    with pytest.raises(ModelError, match=r"index\.json"):
        open_folder(folder)


def test_parts_of_different_models_are_refused(components: Components, folder: Path, tmp_path) -> None:
    longer = CLIPTokenizer.train(["an owl on a red background"] * 2, vocab_size=525, max_length=12)
    with pytest.raises(ModelError, match="tokenizer size 525 and text_encoder vocab_size 520"):
        save_folder(replace(components, tokenizer=longer), tmp_path / "x")
    wide = UNet(replace(UNET, cross_attention_dim=32))
    with pytest.raises(ModelError, match="cross_attention_dim 32 and text width 16"):
        save_folder(replace(components, unet=wide), tmp_path / "x")
    assert not (tmp_path / "x").exists()
    longer.save(folder / "tokenizer")
    with pytest.raises(ModelError, match="tokenizer size 525"):
        open_folder(folder)


def test_a_scheduler_config_names_its_class(components: Components, folder: Path, tmp_path) -> None:
    nameless = {"num_train_timesteps": 1000}
    atomic_json(folder / "scheduler" / "scheduler_config.json", nameless)
    with pytest.raises(ModelError, match="_class_name"):
        open_folder(folder)
    with pytest.raises(ModelError, match="_class_name"):
        save_folder(replace(components, scheduler_config=nameless), tmp_path / "x")


def test_generation_defaults_hold_only_request_fields(components: Components, folder: Path, tmp_path) -> None:
    atomic_json(folder / "generation_config.json", {"allow_pickle": True})
    with pytest.raises(ModelError, match="allow_pickle"):
        open_folder(folder)
    with pytest.raises(ModelError, match="steps"):
        save_folder(replace(components, generation={"steps": 3}), tmp_path / "x")


def test_saving_replaces_a_model_carries_other_files_over_and_spares_other_folders(
    components: Components, folder: Path, tmp_path
) -> None:
    (folder / "README.md").write_text("model card")
    (folder / "unet" / "stale.safetensors").write_bytes(b"")
    opened = open_folder(folder)  # mapped from the very files that are now replaced
    save_folder(opened, folder)
    assert (folder / "README.md").read_text() == "model card" and not (folder / "unet/stale.safetensors").exists()
    assert check_manifest(folder) == {} and equal(open_folder(folder), components, torch.float16)
    assert equal(opened, components) and os.listdir(tmp_path) == ["model"]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="other things"):
        save_folder(components, tmp_path / "home")
    with pytest.raises(UsageError, match="variant"):
        save_folder(components, tmp_path / "new", variant="../x")
    assert tree(tmp_path / "home") == {"thesis.tex": b"years of work"}


def test_weights_that_overflow_are_not_saved(components: Components, folder: Path) -> None:
    before = tree(folder)
    opened = open_folder(folder)
    with torch.no_grad():
        opened.unet.conv_in.weight[0, 0, 0, 0] = 70_000.0  # float16 ends at 65,504
    with pytest.raises(NumericalError, match=r"unet conv_in\.weight is not finite in torch\.float16"):
        save_folder(opened, folder)
    assert tree(folder) == before
    save_folder(opened, folder, dtype=torch.bfloat16)
