"""Hostile files of every kind, made by code, at every door: one clear sentence, at once, nothing run, nothing changed.

The corpus is opened in a child process that watches itself (`python tests/test_hostile.py FOLDER`): audit hooks see
every import, process, socket, file written and code object run, and canaries lie where the payloads point.
"""

import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import small_model
from safetensors.torch import save as packed_tensors
from torch import nn

from ldm.checkpoints.components import Components
from ldm.checkpoints.folder import open_folder, save_folder
from ldm.checkpoints.load import load_into
from ldm.checkpoints.pickles import as_safetensors
from ldm.checkpoints.safe import check_manifest, read_header, read_json, write_manifest
from ldm.checkpoints.shards import read_index
from ldm.checkpoints.single_file import open_single_file, open_vae
from ldm.errors import LdmError
from ldm.models.clip import CLIPVisionConfig
from ldm.models.safety import SafetyChecker, SafetyConfig
from ldm.text.inversion import read_embedding

CPU = 0.1  # seconds of processor time, the best of three
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
CANARY = "canary"  # a payload that runs leaves a file of this name in the current folder
COMMAND = f"touch {CANARY}"
CODE = f"open('{CANARY}', 'w')"


class Case(NamedTuple):
    """A hostile thing: what makes it in an empty folder (and returns its path), who opens it, what the error says."""

    make: Callable[[Path], Path]
    doors: tuple[str, ...]
    said: str


# -- safetensors ------------------------------------------------------------------------------------------------------


def packed(header: object, data: bytes = bytes(8), length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def w(**changes: object) -> dict[str, object]:
    return {"w": F32 | changes}


def named(name: str) -> dict[str, object]:
    return {name: F32}


def empties(count: int) -> bytes:
    field = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return b"{" + b",".join(b'"t%d":%b' % (number, field) for number in range(count)) + b"}"


def pair(**second: object) -> dict[str, object]:
    return {"a": F32, "b": F32 | second}


WHOLE = packed(w())
NESTED = b"[" * 100_000
ZIP = io.BytesIO()
with zipfile.ZipFile(ZIP, "w") as _archive:
    _archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
TAR = io.BytesIO()
with tarfile.open(fileobj=TAR, mode="w") as _tar:
    _tar.addfile(tarfile.TarInfo("storages"))


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (COMMAND,)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4265146304\n"
HTML = b"<!DOCTYPE html><html><head><title>404</title></head><body>Not found</body></html>"
SAFETENSORS: dict[str, tuple[bytes | object, str]] = {
    "nothing": (b"", "is empty"),
    "four bytes": (WHOLE[:4], "not a safetensors file"),
    "the length alone": (WHOLE[:8], "not a safetensors file"),
    "one byte of the header": (WHOLE[:9], "not a safetensors file"),
    "half of the header": (WHOLE[:30], "its header ends at byte"),
    "the header without its end": (WHOLE[:-9], "its header ends at byte"),
    "no data": (WHOLE[:-8], "truncated, its tensors need 8 bytes and it has 0"),
    "one byte missing": (WHOLE[:-1], "truncated, its tensors need 8 bytes and it has 7"),
    "length 0": (packed(w(), length=0), "no valid JSON"),
    "length 1": (packed(w(), length=1), "no valid JSON"),
    "length one short": (packed(w(), length=len(WHOLE) - 17), "other fields|no valid JSON"),
    "length one long": (packed(w(), length=len(WHOLE) - 15), "goes on behind its end"),
    "length beyond the file": (packed(w(), length=500), "header ends at byte 508"),
    "length 2^63": (packed(w(), length=2**63), "not a safetensors file"),
    "length 2^64 - 1": (packed(w(), length=2**64 - 1), "not a safetensors file"),
    "claim of 100 MB in a small file": (packed(w(), length=99_999_990), "not a safetensors file"),
    "100,000 empty tensors": (packed(empties(100_000), b""), "more than 65,536 tensors"),
    "5 MB of spaces": (packed(b"{" + b" " * 5_000_000), "no valid JSON"),
    "a name of 5 MB": (packed(named("w" * 5_000_000)), "characters outside"),
    "300,000 lists": (packed(b'{"w":[' + b"[]," * 300_000 + b"0]}"), "other fields"),
    "100,000 metadata": (packed(b'{"__metadata__":{%b}}' % b",".join(b'"%d":""' % i for i in range(100_000)), b""),
                         "__metadata__ is not a table"),
    "deep in a tensor": (packed(b'{"w":' + NESTED), "other fields"),
    "deep in a shape": (packed(b'{"w":{"dtype":"F32","shape":' + NESTED), "other fields"),
    "deep in the metadata": (packed(b'{"__metadata__":{"a":' + NESTED), "__metadata__"),
    "metadata in metadata": (packed({"__metadata__": {"a": {"b": "c"}}} | w()), "__metadata__"),
    "metadata by an escaped name": (packed(b'{"\\u005f_metadata__":{"a":1}}', b""), "__metadata__"),
    "metadata of half a character": (packed(b'{"__metadata__":{"a":"\\ud800"}}', b""), "surrogates not allowed"),
    "metadata twice": (packed(b'{"__metadata__":{},"__metadata__":{}}', b""), "twice"),
    "metadata with a name twice": (packed(b'{"__metadata__":{"a":"1","a":"2"}}', b""), "twice"),
    "NaN in a shape": (packed(w(shape=[float("nan")])), "impossible shape"),
    "infinite offset": (packed(w(data_offsets=[0, float("inf")])), "impossible data_offsets"),
    "a number of 5,000 digits": (packed(b'{"w":{"dtype":"F32","shape":[' + b"9" * 5000 + b"]}}"), "other fields"),
    "a number of 100 digits": (packed(w(data_offsets=[10**100, 10**100 + 8])), "impossible data_offsets"),
    "offsets of 2^63": (packed(w(data_offsets=[2**63, 2**63 + 8])), "impossible data_offsets"),
    "offsets of 2^62": (packed(w(data_offsets=[2**62, 2**62 + 8])), "leaves a gap"),
    "tensor twice": (packed(b'{"w":%b,"w":%b}' % ((json.dumps(F32).encode(),) * 2)), "twice"),
    "tensor twice by an escape": (packed(b'{"w":%b,"\\u0077":%b}' % ((json.dumps(F32).encode(),) * 2)), "twice"),
    "field twice": (packed(b'{"w":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}'), "twice"),
    "same bytes twice": (packed(pair()), "overlaps"),
    "overlap": (packed(pair(data_offsets=[4, 12]), bytes(12)), "overlaps"),
    "gap": (packed(pair(data_offsets=[12, 20]), bytes(20)), "gap"),
    "gap before the first": (packed(w(data_offsets=[8, 16]), bytes(16)), "gap"),
    "backwards": (packed(w(data_offsets=[8, 0])), "has -8"),
    "negative offsets": (packed(w(data_offsets=[-8, 0])), "impossible data_offsets"),
    "offsets with a fraction": (packed(w(data_offsets=[0.0, 8.0])), "impossible data_offsets"),
    "offsets as text": (packed(w(data_offsets=["0", "8"])), "impossible data_offsets"),
    "offsets that are true": (packed(w(data_offsets=[False, 8])), "impossible data_offsets"),
    "negative side": (packed(w(shape=[-2])), "impossible shape"),
    "sides that overflow": (packed(w(shape=[2**31 - 1] * 8)), "needs"),
    "sides that multiply to 2^64 + 2": (packed(w(shape=[2**31, 2**33])), "impossible shape"),
    "nine axes": (packed(w(shape=[1] * 8 + [2])), "impossible shape"),
    "no shape": (packed(w(shape=None)), "impossible shape"),
    "numbers of another width": (packed(w(dtype="F64")), "needs 16 bytes and has 8"),
    "an odd width": (packed(w(shape=[1])), "needs 4 bytes and has 8"),
    "no such dtype": (packed(w(dtype="F4")), "unknown dtype"),
    "dtype to be imported": (packed(w(dtype="os.system")), "unknown dtype"),
    "data where none is due": (packed(w(shape=[0])), "needs 0 bytes and has 8"),
    "unknown field": (packed(w(pickle="x")), "other fields"),
    "terminal codes": (packed(named("w\x1b[2J\x1b]0;owned\x07")), "characters outside"),
    "a path": (packed(named("../../../etc/passwd")), "characters outside"),
    "NUL": (packed(named("w\0")), "characters outside"),
    "text turned round": (packed(named("w\u202egnp.exe")), "characters outside"),
    "several lines": (packed(named("w\nerror: all is well")), "characters outside"),
    "no name": (packed(named("")), "characters outside"),
    "bytes behind": (WHOLE + b"\0", "followed by foreign bytes"),
    "a zip archive behind": (WHOLE + ZIP.getvalue(), "followed by foreign bytes"),
    "a page before": (HTML + WHOLE, "HTML page"),
    "not UTF-8": (packed(b'{"w\xff":{}}'), "damaged"),
    "UTF-16": (packed("{}".encode("utf-16-le")), "damaged|not a safetensors file"),
    "comment": (packed(b'{/**/"w":{}}'), "no valid JSON"),
    "comma at the end": (WHOLE.replace(b"]}}", b"]},"), "no valid JSON"),
    "a list": (packed([1]), "not a safetensors file"),
    "LFS pointer": (LFS, "git-lfs pointer"),
    "page of a server": (HTML, "HTML page"),
    "GGUF": (b"GGUF\3\0\0\0" + bytes(64), "GGUF"),
    "zip": (ZIP.getvalue(), "zip archive"),
    "tar": (TAR.getvalue(), "tar archive"),
    "gzip": (b"\x1f\x8b\x08" + bytes(64), "gzip"),
    "Keras": (b"\x89HDF\r\n\x1a\n" + bytes(64), "HDF5"),
    **{f"pickle, protocol {p}": (pickle.dumps(Payload(), p), "pickled") for p in range(6)},
    **{f"pickle of a dict, protocol {p}": (pickle.dumps({"w": Payload()}, p), "pickled") for p in range(6)},
    "whole numbers": (packed(w(dtype="I32")), "without floating-point"),
    "truth values": (packed(w(dtype="BOOL", shape=[8])), "without floating-point|of another shape"),
    "another model": (packed({"a": F32, "conv.weight": F32 | {"data_offsets": [8, 16]}}, bytes(16)),
                      "1 missing .w.; 2 unexpected .a, conv.weight"),
    "no tensors": (packed(b"{}", b""), "not a safetensors file|missing"),
}  # fmt: skip


# -- pickles ----------------------------------------------------------------------------------------------------------


def zipped(program: bytes, how: int = zipfile.ZIP_STORED, **more: bytes) -> bytes:
    """torch's form of a checkpoint around any program."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as archive:
        for name, content in {"archive/data.pkl": program, "archive/version": b"3\n", **more}.items():
            archive.writestr(name, content)
    return file.getvalue()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def short(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


P2, P4 = b"\x80\x02", b"\x80\x04"
SYSTEM = P2 + b"cposix\nsystem\n" + text(COMMAND) + b"\x85R."
PROGRAMS: dict[str, tuple[bytes, str]] = {
    "os.system": (SYSTEM, "posix.system"),
    "eval": (P2 + b"c__builtin__\neval\n" + text(CODE) + b"\x85R.", "builtins.eval"),
    "exec": (P2 + b"cbuiltins\nexec\n" + text(CODE) + b"\x85R.", "builtins.exec"),
    "Popen": (P2 + b"csubprocess\nPopen\n]" + text("touch") + b"a" + text(CANARY) + b"a\x85R.", "subprocess.Popen"),
    "runpy": (P2 + b"crunpy\n_run_code\n" + text(CODE) + b"}\x86R.", "runpy._run_code"),
    "getattr": (P2 + b"c__builtin__\ngetattr\ncposix\nsystem\n" + text("__call__") + b"\x86R.", "builtins.getattr"),
    "a dotted name": (P2 + b"ccollections\nabc.sys.modules\n.", "collections.abc.sys.modules"),
    "import": (P2 + b"cevil\npayload\n)R.", "evil.payload"),
    "INST": (b"(dp0\n(S'" + COMMAND.encode() + b"'\niposix\nsystem\n.", "posix.system|instruction"),
    "OBJ": (P2 + b"(cposix\nsystem\n" + text(COMMAND) + b"o.", "posix.system"),
    "OBJ of a tensor": (P2 + b"(ctorch\nTensor\no.", "instruction OBJ"),
    "NEWOBJ": (P2 + b"csubprocess\nPopen\n" + text(COMMAND) + b"\x85\x81.", "subprocess.Popen"),
    "NEWOBJ_EX": (P4 + b"ctorch\nTensor\n)}\x92.", "instruction NEWOBJ_EX"),
    "STACK_GLOBAL": (P4 + short("posix") + short("system") + b"\x93" + short(COMMAND) + b"\x85R.", "instruction"),
    "STACK_GLOBAL by the memo": (P4 + short("system") + b"\x940" + short("posix") + b"h\0\x93.", "instruction"),
    "STACK_GLOBAL, nested": (P4 + short("os") + short("path.os.system") + b"\x93.", "instruction"),
    "memo of a class": (P2 + b"cposix\nsystem\nq\x010h\x01" + text(COMMAND) + b"\x85R.", "posix.system"),
    "BUILD": (P2 + b"cevil\nThing\n)\x81}" + text("__dict__") + b"}sb.", "evil.Thing"),
    "BUILD of a setstate": (P2 + b"cevil\nThing\n)\x81}" + text("__setstate__") + b"cposix\nsystem\nsb" + b".", "evil"),
    "EXT1": (P2 + b"\x82\x01.", "instruction EXT1"),
    "EXT4": (P2 + b"\x84\x01\0\0\0.", "instruction EXT4"),
    "persistent": (b"Pposix.system\n.", "instruction PERSID|not a safetensors"),
    "frames": (P4 + b"\x95" + struct.pack("<Q", 2**62) + b".", "pickle has no end|instruction"),
    "a string of 4 GB": (P2 + b"X\xff\xff\xff\xff.", "pickle has no end"),
    "a string of 2^62": (P4 + b"\x8d" + struct.pack("<Q", 2**62) + b".", "pickle has no end|instruction"),
    "a number of 2 GB": (P2 + b"\x8b\xff\xff\xff\x7f.", "pickle has no end|instruction"),
    "a decimal of 10,000 digits": (b"(dp0\nI" + b"9" * 10_000 + b"\n.", "pickle has no end|instruction"),
    "no end": (P2 + b"}q\0", "pickle has no end"),
    "no such instruction": (P2 + b"\xff.", "pickle has no end"),
}
BOMB = zipped(pickle.dumps({}, 2), zipfile.ZIP_DEFLATED, **{"archive/data/0": bytes(20_000_000)})
MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
PICKLES: dict[str, tuple[bytes, str]] = {
    **{f"{name}, alone": (program, said) for name, (program, said) in PROGRAMS.items()},
    **{f"{name}, zipped": (zipped(program), said) for name, (program, said) in PROGRAMS.items()},
    **{f"system, protocol {p}": (pickle.dumps(Payload(), p), "posix.system|instruction") for p in range(6)},
    "torch's old form": (MAGIC + SYSTEM + pickle.dumps([], 2), "posix.system"),
    "behind torch's old form": (MAGIC + pickle.dumps({}, 2) + SYSTEM, "posix.system"),
    "nothing on the stack": (P2 + b"R.", "something else|pickle has no end"),
    "a pickle of no weights": (pickle.dumps({"a": 1}, 2), "something else than a checkpoint"),
    "zip bomb": (BOMB, "compressed or repeated parts"),
    "zip in zip": (zipped(b"", **{"model.pt": zipped(SYSTEM)}).replace(b"data.pkl", b"data.txt"), "without a check"),
    "no program": (ZIP.getvalue().replace(b"data.pkl", b"data.txt"), "without a checkpoint"),
    "two programs": (zipped(b"\x80\x02}.", **{"other/data.pkl": SYSTEM}), "without a checkpoint"),
    "a program elsewhere": (zipped(b"").replace(b"archive/data.pkl", b"../hive/data.pkl"), "without a checkpoint"),
    "TorchScript": (zipped(b"\x80\x02}.", **{"archive/constants.pkl": b"", "archive/code/x.py": b""}), "TorchScript"),
    "half a zip archive": (ZIP.getvalue()[:60], "damaged zip"),
    "a zip archive without its list": (ZIP.getvalue()[:-10], "damaged zip"),
    "tar, torch's first form": (TAR.getvalue(), "tar archive"),
    "page of a server, as pickle": (HTML, "HTML page"),
    "LFS pointer, as pickle": (LFS, "git-lfs pointer"),
    "nothing, as pickle": (b"", "empty"),
}  # fmt: skip


# -- JSON and indices of shards ---------------------------------------------------------------------------------------


def holed(name: str, start: bytes, size: int) -> Callable[[Path], Path]:
    """A file of a large size that takes no room."""

    def make(folder: Path) -> Path:
        (folder / name).write_bytes(start)
        os.truncate(folder / name, size)
        return folder / name

    return make


def content(name: str, value: object) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
        return folder / name

    return make


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "config.json")
    return folder / "config.json"


def link(target: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "config.json").symlink_to(target)
        return folder / "config.json"

    return make


JSONS: dict[str, tuple[bytes, str]] = {
    "NaN": (b'{"beta_start": NaN}', "NaN"),
    "a name twice": (b'{"a": 1, "a": 2}', "twice"),
    "a name twice, inside": (b'{"a": [{"b": 1, "b": 2}]}', "twice"),
    "deep lists": (b'{"a":' + NESTED, "not valid JSON"),
    "deep tables": (b'{"a":' * 100_000, "not valid JSON"),
    "a list of JSON": (b"[]", "holds a JSON list"),
    "null": (b"null", "NoneType|null"),
    "no JSON": (b"import os", "not valid JSON"),
    "other letters": (b'{"a": "\xff"}', "not valid JSON"),
    "mark of a byte order": (b"\xef\xbb\xbf{}", "not valid JSON"),
    "5,000 digits": (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    "empty": (b"", "not valid JSON"),
    "2 MB": (b'{"a": [' + b"0," * 1_000_000 + b"0]}", "has at most"),
}
INDICES: dict[str, tuple[object, str]] = {
    "outside": ({"weight_map": {"w": "../outside.safetensors"}}, "lie beside"),
    "absolute": ({"weight_map": {"w": "/etc/passwd"}}, "lie beside"),
    "absolute weights": ({"weight_map": {"w": "/tmp/x.safetensors"}}, "lie beside"),
    "by a subfolder": ({"weight_map": {"w": "unet/../../x.safetensors"}}, "lie beside"),
    "missing shard": ({"weight_map": {"w": "gone.safetensors"}}, "lacks 1 of 1 shards"),
    "pickled shard": ({"weight_map": {"w": "model.bin"}}, "lie beside"),
    "terminal codes of a shard": ({"weight_map": {"w": "a\x1b[2J.safetensors"}}, "lie beside"),
    "NUL in a shard": ({"weight_map": {"w": "a\0.safetensors"}}, "lie beside"),
    "a number for a shard": ({"weight_map": {"w": 1}}, "no weight_map"),
    "a list for the map": ({"weight_map": ["a.safetensors"]}, "no weight_map"),
    "no map": ({}, "no weight_map"),
    "tensor listed twice": (b'{"weight_map": {"w": "a.safetensors", "w": "b.safetensors"}}', "twice"),
}


# -- model folders: the small model with one thing changed ------------------------------------------------------------

Change = Callable[[Path], object]
INDEX, UNET, TEXT, VAE = "model_index.json", "unet/config.json", "text_encoder/config.json", "vae/config.json"
FILTER = "safety_checker/config.json"
TOKENS = "tokenizer/tokenizer_config.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def fields(file: str, **values: object) -> Change:
    return lambda model: (model / file).write_text(json.dumps(json.loads((model / file).read_text()) | values))


def bytes_of(file: str, value: bytes) -> Change:
    return lambda model: (model / file).write_bytes(value)


def without(*files: str) -> Change:
    return lambda model: [shutil.rmtree(model / f) if (model / f).is_dir() else (model / f).unlink() for f in files]


def linked(file: str, target: str) -> Change:
    return lambda model: ((model / file).unlink(), (model / file).symlink_to(target))


def both(*changes: Change) -> Change:
    return lambda model: [change(model) for change in changes]


def with_index(**table: object) -> Change:
    index = "unet/diffusion_pytorch_model.safetensors.index.json"
    return both(without(WEIGHTS), bytes_of(index, json.dumps(table).encode()))


VOCAB = b'{"model": {"type": "WordLevel", "vocab": {}}, "added_tokens": []}'
FOLDERS: dict[str, tuple[Change, str]] = {
    "pipeline to be imported": (fields(INDEX, _class_name="evil.Pipeline"), "evil.Pipeline"),
    "pipeline of its own code": (fields(INDEX, _class_name=["evil", "Pipeline"]), "supported are"),
    "pipeline with terminal codes": (fields(INDEX, _class_name="Flux\x1b[2J"), "Flux"),
    "SD3": (fields(INDEX, _class_name="StableDiffusion3Pipeline"), "Stable Diffusion 3"),
    "component to be imported": (fields(INDEX, vae=["evil", "Thing"]), "not supported"),
    "component of os": (fields(INDEX, unet=["os", "system"]), "not supported"),
    "component of its own code": (fields(INDEX, unet=["unet", "MyUNet"]), "not supported"),
    "another component": (fields(INDEX, evil=["evil", "Thing"]), "not supported"),
    "component of tables": (fields(INDEX, unet=[{}, {}]), "not supported"),
    "component of three": (fields(INDEX, evil=["diffusers", "a", "b"]), "not supported"),
    "component without a class": (fields(INDEX, unet=[]), "not supported|names no unet"),
    "component as text": (fields(INDEX, unet="diffusers.UNet2DConditionModel"), "names no unet"),
    "tokenizer of its own code": (fields(INDEX, tokenizer=["evil", "T"]), "not supported"),
    "index of the model a list": (bytes_of(INDEX, b"[]"), "holds a JSON list"),
    "index of the model a page": (bytes_of(INDEX, HTML), "not valid JSON"),
    "index of the model deep": (bytes_of(INDEX, NESTED), "not valid JSON"),
    "no index of the model": (without(INDEX), "is no model folder"),
    "100 MB of config": (holed(UNET, b"{", 100_000_000), "100,000,000 bytes"),
    "config deep": (bytes_of(UNET, b'{"a":' + NESTED), "not valid JSON"),
    "config a list": (bytes_of(VAE, b"[1]"), "holds a JSON list"),
    "config of NaN": (bytes_of(UNET, b'{"sample_size": NaN}'), "NaN"),
    "config a pipe": (lambda m: (m / UNET).unlink() or os.mkfifo(m / UNET), "unet/config.json"),
    "config a device": (linked(UNET, "/dev/zero"), "unet/config.json"),
    "config a loop": (linked(UNET, "config.json"), "unet/config.json"),
    "scheduler config a list": (bytes_of("scheduler/scheduler_config.json", b"[]"), "holds a JSON list"),
    "scheduler without a class": (bytes_of("scheduler/scheduler_config.json", b"{}"), "_class_name"),
    "defaults of other fields": (bytes_of("generation_config.json", b'{"__class__": "x"}'), "__class__"),
    "channels as text": (fields(UNET, block_out_channels="16,32"), "block_out_channels"),
    "channels as a table": (fields(UNET, block_out_channels={"a": 1}), "block_out_channels"),
    "channels as lists": (fields(UNET, block_out_channels=[[16], [32]]), "block_out_channels"),
    "channels with terminal codes": (fields(UNET, block_out_channels="\x1b[2J"), "block_out_channels"),
    "channels that are true": (fields(UNET, in_channels=True), "in_channels"),
    "channels of 10^6 digits": (fields(UNET, in_channels="9" * 900_000), "in_channels"),
    "no channels": (fields(UNET, block_out_channels=[0, 0]), "channels"),
    "negative channels": (fields(UNET, block_out_channels=[-16, -32]), "channels"),
    "fewer than no latents": (fields(VAE, latent_channels=-4), "latent_channels|channels"),
    "2^40 channels": (fields(UNET, block_out_channels=[2**40, 2**40]), "unet/|U-Net"),
    "2^60 channels": (fields(UNET, block_out_channels=[2**60, 2**60]), "unet/|U-Net"),
    "2^70 channels": (fields(UNET, block_out_channels=[2**70, 2**70]), "unet/|U-Net"),
    "no groups": (fields(UNET, norm_num_groups=0), "norm_num_groups|do not divide"),
    "a factor of 10^400": (fields(VAE, scaling_factor=10**400), "vae/config.json"),
    "an infinite factor": (fields(VAE, scaling_factor=float("inf")), "scaling_factor"),
    "10^6 layers": (fields(UNET, layers_per_block=10**6), "layers_per_block"),
    "no layers": (fields(UNET, layers_per_block=-1), "layers_per_block"),
    "10^6 depths": (fields(UNET, transformer_layers_per_block=10**6), "transformer_layers_per_block"),
    "10^4 levels": (fields(UNET, block_out_channels=[16] * 10**4, down_block_types=["DownBlock2D"] * 10**4), "U-Net"),
    "10^6 layers of the VAE": (fields(VAE, layers_per_block=10**6), "layers_per_block"),
    "10^6 layers of text": (fields(TEXT, num_hidden_layers=10**6), "num_hidden_layers"),
    "a window of 2^40": (fields(TEXT, max_position_embeddings=2**40), "text_encoder/"),
    "a vocabulary of 2^60": (fields(TEXT, vocab_size=2**60), "text_encoder/|vocab_size"),
    "no heads": (fields(TEXT, num_attention_heads=0), "num_attention_heads|heads"),
    "filter of 2^60 numbers": (fields(FILTER, projection_dim=2**60), "safety_checker/"),
    "filter of -1 numbers": (fields(FILTER, projection_dim=-1), "safety_checker/"),
    "filter of lists": (fields(FILTER, vision_config=[1]), "safety_checker/"),
    "filter to be imported": (fields(INDEX, safety_checker=["evil", "Filter"]), "not supported"),
    "activation to be imported": (fields(TEXT, hidden_act="evil.act"), "hidden_act"),
    "block to be imported": (fields(UNET, down_block_types=["evil.Block", "DownBlock2D"]), "evil.Block"),
    "field of code": (fields(UNET, auto_map={"AutoModel": "evil.Model"}), "auto_map"),
    "field with terminal codes": (fields(UNET, **{"\x1b[2J": 1}), "not supported"),
    "no tokenizer": (without("tokenizer"), "no tokenizer/"),
    "tokenizer a file": (both(without("tokenizer"), bytes_of("tokenizer", b"")), "no tokenizer/"),
    "tokenizer of another kind": (bytes_of("tokenizer/tokenizer.json", VOCAB), "no CLIP tokenizer"),
    "tokenizer a list": (bytes_of("tokenizer/tokenizer.json", b"[]"), "holds a JSON list"),
    "tokenizer of nothing": (bytes_of("tokenizer/tokenizer.json", b"{}"), "no CLIP tokenizer"),
    "tokenizer of a model as text": (bytes_of("tokenizer/tokenizer.json", b'{"model": "BPE"}'), "no CLIP tokenizer"),
    "vocabulary of words": (both(without("tokenizer/tokenizer.json"), bytes_of("tokenizer/vocab.json", b'{"a": "b"}')),
                            "no CLIP tokenizer"),
    "vocabulary of negative ids": (both(without("tokenizer/tokenizer.json"),
                                        bytes_of("tokenizer/vocab.json", b'{"a": -1}')), "tokenizer"),
    "merges of bytes": (both(without("tokenizer/tokenizer.json"), bytes_of("tokenizer/merges.txt", b"\xff\xfe")),
                        "no CLIP tokenizer"),
    "no merges": (without("tokenizer/tokenizer.json", "tokenizer/merges.txt"), "no CLIP tokenizer"),
    "tokenizer config a list": (bytes_of("tokenizer/tokenizer_config.json", b"[]"), "holds a JSON list"),
    "padding of no word": (fields("tokenizer/special_tokens_map.json", pad_token="gone"), "tokenizer|pad_token"),
    "padding of a table": (fields("tokenizer/special_tokens_map.json", pad_token={"x": 1}), "no CLIP tokenizer"),
    "a window of no tokens": (fields("tokenizer/tokenizer_config.json", model_max_length=-5), "tokenizer|model_max"),
    "no weights": (without(WEIGHTS), "is incomplete"),
    "weights a pointer": (bytes_of(WEIGHTS, LFS), "git-lfs"),
    "weights a page": (bytes_of(WEIGHTS, HTML), "HTML page"),
    "weights a pickle": (bytes_of(WEIGHTS, SYSTEM), "pickled"),
    "weights a folder": (both(without(WEIGHTS), lambda m: (m / WEIGHTS).mkdir()), "diffusion_pytorch_model"),
    "weights a device": (linked(WEIGHTS, "/dev/zero"), "not a regular file"),
    "weights a pipe": (both(without(WEIGHTS), lambda m: os.mkfifo(m / WEIGHTS)), "not a regular file"),
    "weights a loop": (linked(WEIGHTS, Path(WEIGHTS).name), "cannot read"),
    "weights nowhere": (linked(WEIGHTS, "/no/such/file"), "cannot read"),
    "weights of another part": (lambda m: shutil.copy(m / "vae" / Path(WEIGHTS).name, m / WEIGHTS), "missing"),
    "weights a pickle by its name": (lambda m: (m / WEIGHTS).rename(m / "unet/diffusion_pytorch_model.bin"), "pickled"),
    "pickle with terminal codes": (lambda m: (m / WEIGHTS).rename(m / "unet/\x1b[2J.bin"), "pickled"),
    "shards outside": (with_index(weight_map={"w": "../../outside.safetensors"}), "lie beside"),
    "shards absolute": (with_index(weight_map={"w": "/etc/passwd"}), "lie beside"),
    "shards missing": (with_index(weight_map={"w": "gone.safetensors"}), "lacks 1 of 1 shards"),
    "shards with terminal codes": (with_index(weight_map={"w": "\x1b[2J.safetensors"}), "unet"),
    "shards of no map": (with_index(metadata={}), "no weight_map"),
    "a shard twice": (both(with_index(weight_map={"v": "a.safetensors", "w": "b.safetensors"}), *(bytes_of(
        f"unet/{name}.safetensors", packed({"conv_in.bias": F32})) for name in "ab")), "twice"),
}  # fmt: skip
HARMLESS: dict[str, Change] = {  # what must switch nothing, and be no reason to refuse
    "requires_safety_checker": fields(INDEX, requires_safety_checker=False, safety_concept=None),
    "trust_remote_code": both(fields(INDEX, trust_remote_code=True), fields(TOKENS, trust_remote_code=True)),
    "custom_pipeline": fields(INDEX, custom_pipeline="evil", _name_or_path="evil/model"),
    "auto_map of the tokenizer": fields(TOKENS, auto_map={"AutoTokenizer": ["evil.T", None]}),
    "code beside it": both(*(bytes_of(file, CODE.encode()) for file in ("unet/unet.py", "pipeline.py", "evil.py"))),
    "allow_pickle": fields(INDEX, allow_pickle=True, use_safetensors=False, weights_only=False),
    "its own path": fields(UNET, _name_or_path="/etc/passwd", _class_name="UNet2DConditionModel"),
}  # fmt: skip


def changed(change: Change) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        shutil.copytree(MODEL, folder / "model")
        change(folder / "model")
        return folder / "model"

    return make


MODEL = Path(sys.argv[1] if __name__ == "__main__" else ".") / "model"
WEIGHT_DOORS = ("load", "header", "single", "vae", "embedding")
CASES: dict[str, Case] = {
    **{f"weights: {k}": Case(content("model.safetensors", v), WEIGHT_DOORS, s) for k, (v, s) in SAFETENSORS.items()},
    "weights: claim of 100 MB, and they are there": Case(
        holed("model.safetensors", packed(w(), length=99_999_990), 100_000_000), WEIGHT_DOORS, "not a safetensors file"
    ),
    "weights: claim of 30 MB of nothing": Case(
        holed("model.safetensors", packed(w(), length=30_000_000), 30_000_100), WEIGHT_DOORS, "goes on behind its end"
    ),
    "weights: a folder": Case(
        lambda folder: (folder / "model.safetensors").mkdir() or folder / "model.safetensors",
        ("load", "header", "single", "embedding"),
        "not a regular file",
    ),
    **{f"pickle: {k}": Case(content("model.ckpt", v), ("pickle", "single pickle"), s) for k, (v, s) in PICKLES.items()},
    **{
        f"pickle, not allowed: {k}": Case(content("model.ckpt", v), ("single", "embedding"), "--allow-pickle")
        for k, (v, _) in PICKLES.items()
        if v[:2] in (b"PK", P2)
    },
    **{f"JSON: {k}": Case(content("config.json", v), ("json",), said) for k, (v, said) in JSONS.items()},
    "JSON: 100 MB": Case(holed("config.json", b"{", 100_000_000), ("json",), "100,000,000 bytes"),
    "JSON: a pipe": Case(pipe, ("json",), "not a regular file"),
    "JSON: a device": Case(link("/dev/zero"), ("json",), "not a regular file"),
    "JSON: a loop": Case(link("config.json"), ("json",), "cannot read"),
    "JSON: missing": Case(lambda folder: folder / "config.json", ("json",), "cannot read"),
    **{f"index: {k}": Case(content("model.safetensors.index.json", v), ("index",), s) for k, (v, s) in INDICES.items()},
    **{f"folder: {k}": Case(changed(change), ("folder",), said) for k, (change, said) in FOLDERS.items()},
}


# -- the child that opens it all --------------------------------------------------------------------------------------

ALARMING = (
    "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.kill", "subprocess.", "socket.", "pty.",
    "pickle.", "ctypes.", "webbrowser.", "urllib.", "http.", "ftplib.", "sqlite3.", "winreg.",
)  # fmt: skip
CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "shutil.")
OWN = {
    *sys.stdlib_module_names,
    "torch",
    "numpy",
    "ldm",
    "safetensors",
    "tokenizers",
    "transformers",
    "huggingface_hub",
}


class Watch:
    """Audit hook: what happened since `seen` was emptied that opening a file has no business to do."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.on, self.seen = folder, False, list[str]()

    def outside(self, path: object) -> bool:
        name = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
        return bool(name) and not Path(name).resolve().is_relative_to(self.folder)

    def __call__(self, event: str, values: tuple[Any, ...]) -> None:
        if not self.on:
            return
        self.on = False
        writes = event == "open" and isinstance(values[2], int) and values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        reads = event == "open" and str(values[0]).endswith(("/passwd", "/outside.safetensors"))
        runs = event == "exec" and self.outside(getattr(values[0], "co_filename", "")) is False
        foreign = event == "import" and values[0].split(".")[0] not in OWN
        if event.startswith(ALARMING) or (writes and self.outside(values[0])) or reads or runs or foreign:
            self.seen.append(f"{event} {values!r:.200}")
        if event.startswith(CHANGES) and any(self.outside(value) for value in values[:2]):
            self.seen.append(f"{event} {values!r:.200}")
        self.on = True


DEEDS: dict[str, Callable[[], object]] = {  # what the watch must see, but the last
    "system": lambda: os.system("true"),
    "process": lambda: subprocess.run(["true"]),
    "socket": lambda: socket.socket().close(),
    "exec": lambda: exec("1"),
    "eval": lambda: eval("1"),
    "import": lambda: __import__("harmless"),
    "unpickling": lambda: pickle.loads(b"cbuiltins\nprint\n."),
    "reading": lambda: open("/etc/passwd").close(),
    "writing": lambda: open("/dev/null", "w").close(),
    "own file": lambda: open("own", "w").close(),
}


def seen_by(watch: Watch) -> dict[str, bool]:
    """Which of DEEDS the watch reports."""
    found = {}
    Path("harmless.py").touch()
    for name, deed in DEEDS.items():
        watch.seen, watch.on = [], True
        deed()
        watch.on = False
        found[name] = bool(watch.seen)
    return found


Entry = tuple[str, int, int, int]


def state_of(folder: Path) -> list[Entry]:
    """Everything in a folder: names, kinds, sizes, and when it was changed."""
    found = [(path, path.lstat()) for path in sorted(folder.rglob("*"))]
    return [(str(path), about.st_mode, about.st_size, about.st_mtime_ns) for path, about in found]


def elsewhere() -> list[Entry]:
    """What lies in the current folder, where canaries would, and among the temporary files."""
    return [(str(file), 0, 0, 0) for folder in (Path.cwd(), Path(tempfile.gettempdir())) for file in folder.iterdir()]


def late(*_: object) -> None:
    raise TimeoutError("two seconds of processor time are over")


def open_pickle(path: Path) -> None:
    with as_safetensors(path):
        pass


class Target(nn.Module):
    """The model into which weights are loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 2.0]))


def record(door: Callable[[Path], object], path: Path, watch: Watch, target: nn.Module) -> dict[str, Any]:
    """What happens when a door opens a path, and the processor time: the least of three where the first is much."""
    before, held = [*state_of(path.parent), *elsewhere()], (id(target.w), target.w.tolist())
    result: dict[str, Any] = {"cpu": 1e9, "events": []}
    for _ in range(3):
        signal.setitimer(signal.ITIMER_PROF, 2)
        watch.seen, watch.on, start = [], True, time.process_time()
        try:
            door(path)
            result |= {"kind": None, "text": "", "ours": False}
        except BaseException as error:
            result |= {"kind": type(error).__name__, "text": str(error), "ours": isinstance(error, LdmError)}
        result["cpu"] = min(result["cpu"], time.process_time() - start)
        watch.on = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        result["events"] += watch.seen
        if result["kind"] == "TimeoutError" or result["cpu"] < 0.8 * CPU:
            break
    result["left"] = [entry[0] for entry in (*state_of(path.parent), *elsewhere()) if entry not in before]
    result["changed"] = (id(target.w), target.w.tolist()) != held
    return result


def model_with_a_filter(folder: Path) -> Path:
    """The small model, and a safety checker of some random weights."""
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, projection_dim=8, num_hidden_layers=1, num_attention_heads=2,
        image_size=32, patch_size=16,
    )  # fmt: skip
    components = open_folder(small_model(folder))
    save_folder(replace(components, safety_checker=SafetyChecker(SafetyConfig(vision))), folder, torch.float32)
    return folder


def alike(a: Components, b: Components) -> bool:
    """Whether two models have the same weights, configurations, words and safety."""
    weights = all(
        torch.equal(one, other)
        for name, network in a.networks.items()
        for one, other in zip(network.parameters(), b.networks[name].parameters(), strict=True)
    )
    same = (a.configs, a.scheduler_config, a.flags) == (b.configs, b.scheduler_config, b.flags)
    return weights and same and a.tokenizer.vocab == b.tokenizer.vocab and "safety_checker" in b.networks


def main(root: Path) -> None:
    """Makes and opens every case below `root`, and prints one JSON object: "case @ door" -> what happened."""
    torch.set_num_threads(1)
    for name in ("here", "temporary", "cases"):
        (root / name).mkdir()
    (root / "cases/outside.safetensors").write_bytes(WHOLE)
    (root / "here/evil.py").write_text(CODE)
    os.chdir(root / "here")
    sys.path.insert(0, str(root / "here"))
    tempfile.tempdir = str(root / "temporary")
    target = Target()
    doors: dict[str, Callable[[Path], object]] = {
        "load": lambda path: load_into(target, path),
        "header": read_header,
        "single": open_single_file,
        "vae": open_vae,
        "embedding": read_embedding,
        "pickle": open_pickle,
        "single pickle": lambda path: open_single_file(path, allow_pickle=True),
        "json": read_json,
        "index": read_index,
        "folder": open_folder,
    }
    sys.dont_write_bytecode = True
    watch, found = Watch(root), {}
    signal.signal(signal.SIGPROF, late)
    open_folder(model_with_a_filter(MODEL))
    for number, sample in enumerate((WHOLE, HTML, zipped(SYSTEM))):  # what modules load when first used, they load now
        (root / f"{number}.safetensors").write_bytes(sample)
        for door in doors.values():
            with suppress(LdmError):
                door(root / f"{number}.safetensors")
    sys.addaudithook(watch)
    usual = record(open_folder, MODEL, watch, target)["cpu"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number, (name, case) in enumerate(CASES.items()):
        folder = root / "cases" / str(number)
        folder.mkdir()
        path = case.make(folder)
        for door in case.doors:
            found[f"{name} @ {door}"] = {"path": str(path)} | record(doors[door], path, watch, target)
    model = open_folder(MODEL)
    for name, change in HARMLESS.items():
        (root / "cases" / name).mkdir()
        path = changed(change)(root / "cases" / name)
        opened: list[Components] = []
        result = record(lambda path, opened=opened: opened.append(open_folder(path)), path, watch, target)
        same = [opened and alike(model, opened[0])]
        found[f"harmless: {name}"] = result | {"same": same}
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
    print(json.dumps({"records": found, "grown": grown, "usual": usual, "seen": seen_by(watch)}))


# -- what is held of it -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> dict[str, Any]:
    """What the child saw, by "case @ door"."""
    root = tmp_path_factory.mktemp("hostile").resolve()
    plain = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__, root], env=plain, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def faults_of(case: Case, door: str, seen: dict[str, Any], usual: float) -> list[str]:
    """What is wrong with how a door took a hostile file. usual: seconds for the model of which a folder is a variation,
    much of which is opened before the fault in it is met.
    """
    text, faults = seen["text"], []
    accepted = seen["kind"] is None
    if accepted and not (door == "header" and re.search("floating|missing|another shape", case.said)):
        faults.append("it was opened")
    elif not accepted:
        faults += [] if seen["ours"] else [f"{seen['kind']}, no error of ours: {text[:200]}"]
        names_it = seen["path"] in text or Path(seen["path"]).name in text
        faults += [] if names_it else [f"does not name the file: {text[:300]}"]
        faults += [] if text.isprintable() else [f"control characters: {text[:300]!a}"]
        faults += [] if len(text) < 900 else [f"{len(text):,} characters"]
        main_door = door == case.doors[0]
        faults += [] if not main_door or re.search(case.said, text) else [f"says otherwise: {text[:300]}"]
    faults += [f"did: {event}" for event in dict.fromkeys(seen["events"])]
    most = 1.5 * (CPU + (usual if door == "folder" else 0))  # neighbours cost caches
    faults += [f"took {seen['cpu']:.2f} s"] if seen["cpu"] > most else []
    faults += [f"left {seen['left'][:3]}"] if seen["left"] else []
    faults += ["changed the model"] if seen["changed"] else []
    return faults


@pytest.mark.parametrize("name", CASES)
def test_hostile_files_get_one_sentence_and_nothing_else(corpus, name: str) -> None:
    """An error of ours that names the file and what is wrong; no code, process, socket or foreign file touched."""
    case = CASES[name]
    records, usual = corpus["records"], corpus["usual"]
    found = {door: faults_of(case, door, records[f"{name} @ {door}"], usual) for door in case.doors}
    assert not any(found.values()), "\n" + "\n".join(
        f"{door}: {fault}" for door, all_ in found.items() for fault in all_
    )


def test_the_corpus_is_large_and_stays_small_in_memory(corpus) -> None:
    assert len(CASES) >= 200 and len({door for case in CASES.values() for door in case.doors}) == 10
    assert corpus["grown"] < 200, f"{corpus['grown']:.0f} MB"


@pytest.mark.parametrize("name", HARMLESS)
def test_no_field_switches_anything(corpus, name: str) -> None:
    seen = corpus["records"][f"harmless: {name}"]
    assert seen["kind"] is None and seen["same"] == [True], seen["text"]
    assert not seen["events"] and not seen["left"]


def test_the_watch_sees(corpus) -> None:
    """The hook can fail: each deed that would be a fault is reported, and a file written in its own place is not."""
    assert corpus["seen"] == {name: name != "own file" for name in DEEDS}


# -- mutants and flipped bits -----------------------------------------------------------------------------------------


class Bag:
    """Stands for a model of exactly the tensors that a header names, and keeps what it is given."""

    def __init__(self, shapes: dict[str, list[int]]) -> None:
        self.shapes, self.given = shapes, dict[str, torch.Tensor]()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: torch.empty(shape, device="meta") for name, shape in self.shapes.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor], assign: bool) -> None:
        assert assign
        self.given = state


WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}


WORDS = (b"F16", b"F32", b"F64", b"BF16", b"I32", b"0", b"1", b"9", b"-1", b"1e1", b"a.bias", b"dtype", b"null", b"b")
SWAPS = (  # that leave a file whole, and mean something else
    (b"F16", b"I16"), (b'F32","shape":[]', b'I32","shape":[]'), (b"[3,2]", b"[2,3]"), (b"[2,0]", b"[0,2]"),
    (b"pt", b"tf"),
)  # fmt: skip


def mutants(count: int) -> Iterator[bytes]:
    """A valid file with one to four changes to its length, its header, or where it ends."""
    rng = random.Random(7)
    tensors = {
        "a.weight": torch.randn(3, 2),
        "a.bias": torch.ones(4).half(),
        "b": torch.zeros(2, 0),
        "c": torch.ones(()),
    }
    good = packed_tensors(tensors, {"format": "pt"})
    end = 8 + int.from_bytes(good[:8], "little")
    letters = [m.start() for m in re.finditer(rb"(?<=[\w.])[a-z](?=\":{)|(?<=\")[abc](?=\.)", good[:end])]
    spots = [m.start() for m in re.finditer(rb'[\d"\[\]{},:]', good[:end])]
    for _ in range(count):
        mutant = bytearray(good)
        for _ in range(rng.choice([1, 1, 2, 3, 4])):
            kind, spot = rng.random(), rng.choice(spots) if rng.random() < 0.6 else rng.randrange(end)
            if kind < 0.1:
                mutant[rng.choice(letters) % len(mutant)] = rng.choice(b"abcXYZ09._-:/ ")
            elif kind < 0.2:
                mutant = mutant.replace(*rng.choice(SWAPS))
            elif kind < 0.4:
                mutant[spot % len(mutant)] = rng.randrange(256)
            elif kind < 0.5:
                mutant[rng.randrange(8)] = rng.choice([0, 1, good[0] - 1, good[0], 255, rng.randrange(256)])
            elif kind < 0.65:
                word = rng.choice(WORDS)
                mutant[spot : spot + len(word)] = word
            elif kind < 0.75:
                start = rng.randrange(8, end)
                length = rng.randrange(1, 30)
                mutant[spot : spot + length] = mutant[start : start + length]
            elif kind < 0.85:
                digits = [i for i in spots if i < len(mutant) and chr(mutant[i]).isdigit()]
                mutant[rng.choice(digits or [8])] = ord(rng.choice("0123456789"))
            elif kind < 0.93:
                other = rng.choice(spots) % len(mutant)
                mutant[spot % len(mutant)], mutant[other] = mutant[other], mutant[spot % len(mutant)]
            else:
                del mutant[rng.randrange(len(mutant)) :]
                mutant += bytes(9)
        yield bytes(mutant)


def check_mutant(path: Path, mutant: bytes) -> bool:
    """Whether a mutant is taken; then what is loaded must be what its header says, read here without our code."""
    with path.open("r+b") as file:  # to empty a file before costs ten times as much as all else here
        file.write(mutant)
        file.truncate()
    try:
        header = read_header(path)
    except LdmError as error:
        assert str(path) in str(error) and str(error).isprintable() and len(str(error)) < 500
        return False
    length = int.from_bytes(mutant[:8], "little")
    said = json.loads(mutant[8 : 8 + length])
    assert said.pop("__metadata__", {}) == header.metadata
    assert header.tensors.keys() == said.keys() and all(
        len(header.tensors[n].shape) == len(said[n]["shape"]) for n in said
    )
    bag = Bag({name: field["shape"] for name, field in said.items()})
    if any(field["dtype"] not in WIDTHS for field in said.values()):
        with pytest.raises(LdmError, match="without floating-point numbers"):
            load_into(bag, path)
        return True
    load_into(bag, path)
    assert bag.given.keys() == said.keys()
    for name, field in said.items():
        start, stop = field["data_offsets"]
        tensor = bag.given[name]
        assert list(tensor.shape) == field["shape"] and tensor.dtype.itemsize == WIDTHS[field["dtype"]]
        assert {"torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}.get(
            str(tensor.dtype), field["dtype"]
        ) == field["dtype"]
        held = tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        assert held == mutant[8 + length :][start:stop]
    return True


@pytest.mark.parametrize("count", [2_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_mutants_are_refused_or_read_as_they_say(tmp_path, count: int) -> None:
    (tmp_path / "model.safetensors").touch()
    taken = sum(check_mutant(tmp_path / "model.safetensors", mutant) for mutant in mutants(count))
    assert count / 20 < taken < count / 3


@pytest.mark.parametrize("count", [100, pytest.param(1_000, marks=pytest.mark.slow)])
def test_every_flipped_bit_is_found_by_the_manifest(model, tmp_path, count: int) -> None:
    folder, rng = tmp_path / "model", random.Random(3)
    shutil.copytree(model, folder)
    write_manifest(folder)
    files = sorted(folder.rglob("*.safetensors"))
    assert check_manifest(folder) == {}
    for _ in range(count):
        path = rng.choice(files)
        name, whole = path.relative_to(folder).as_posix(), path.read_bytes()
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        assert check_manifest(folder) == {name: "changed"}
        path.write_bytes(whole)
    assert check_manifest(folder) == {}


# -- without a network ------------------------------------------------------------------------------------------------


def test_local_models_are_opened_without_sockets(no_sockets, model, tmp_path) -> None:
    """Folders, as they are and through the hub's door; single files and their configurations; a picture drawn."""
    from ldm.checkpoints.hub import folder_of
    from ldm.pipeline import Pipeline

    with pytest.raises(AssertionError, match="a socket was used"):
        socket.create_connection(("127.0.0.1", 9))
    components = open_folder(folder_of(model))
    pipeline = Pipeline.from_pretrained(model)
    assert len(pipeline("an owl", num_inference_steps=1).images) == 1
    assert components.networks.keys() == open_folder(model).networks.keys()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
