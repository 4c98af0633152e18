"""Models of the hub: what is fetched, from where, and what is said when it cannot be; never over the network.

A server of this process plays the hub; the model it offers is small and made here.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from ldm.checkpoints.folder import open_folder
from ldm.checkpoints.hub import files_of, folder_of
from ldm.errors import LdmError, ModelError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server offers and what it was asked for."""

    models: dict[str, Path] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    broken: bool = False
    asked: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    address: str = ""

    @property
    def fetched(self) -> list[str]:
        """The files whose contents were asked for, sorted."""
        return sorted(line.split("/", 5)[5] for line in self.asked if line.startswith("GET") and "/resolve/" in line)


def answer(hub: Hub, path: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body, in the hub's form (recorded from the requests of huggingface_hub 2.4)."""
    parts = path.strip("/").split("/")
    api = parts[:2] == ["api", "models"]
    owner, name = (parts[2:4] if api else parts[:2]) if len(parts) > 3 else ("", "")
    folder, rest = hub.models.get(f"{owner}/{name}"), parts[4:] if api else parts[2:]
    if hub.broken:
        return 503, {}, b""
    if folder is None:
        return 404, {"X-Error-Code": "RepoNotFound"}, b""
    if f"{owner}/{name}" in hub.gated:
        return 403, {"X-Error-Code": "GatedRepo"}, b""
    if len(rest) < 2 or rest[1] not in ("main", COMMIT):
        return 404, {"X-Error-Code": "RevisionNotFound"}, b""
    files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    if rest[0] == "revision":
        about = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
        return 200, {}, json.dumps(about).encode()
    oids = {name: hashlib.sha1(file.read_bytes()).hexdigest() for name, file in files.items()}
    if rest[0] == "tree":
        rows = [{"type": "file", "path": n, "size": f.stat().st_size, "oid": oids[n]} for n, f in files.items()]
        return 200, {}, json.dumps(rows).encode()
    wanted = "/".join(rest[2:])
    if wanted not in files:
        return 404, {"X-Error-Code": "EntryNotFound"}, b""
    return 200, {"ETag": f'"{oids[wanted]}"', "X-Repo-Commit": COMMIT}, files[wanted].read_bytes()


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[Hub]:
    """A hub on this machine, asked in place of the real one, with an empty cache."""
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            state.asked.append(f"{self.command} {path}")
            if "some/model" in path:
                state.tokens.add(self.headers.get("Authorization"))
            status, headers, body = answer(state, path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    state.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", state.address)
    template = state.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no token"))
    disable_progress_bars()
    yield state
    enable_progress_bars()
    server.shutdown()
    server.server_close()


@pytest.fixture
def offered(hub, model, tmp_path) -> Path:
    """The small model as a repository "some/model" with everything that is not needed beside it."""
    folder = tmp_path / "repository"
    shutil.copytree(model, folder)
    for extra in (
        "README.md", "v1-5-pruned.safetensors", "v1-5.ckpt", "unet/diffusion_pytorch_model.bin", "unet/model.onnx",
        "unet/diffusion_flax_model.msgpack", "text_encoder/pytorch_model.bin", "text_encoder/evil.py", "picture.png",
        "vae/diffusion_pytorch_model.non_ema.safetensors", "image_encoder/model.safetensors", "unet/model.safetensors",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
    ):  # fmt: skip
        (folder / extra).parent.mkdir(exist_ok=True)
        (folder / extra).write_bytes(b"not needed")
    index = json.loads((folder / "model_index.json").read_text())
    index["image_encoder"] = ["transformers", "CLIPVisionModelWithProjection"]
    (folder / "model_index.json").write_text(json.dumps(index))
    hub.models["some/model"] = folder
    return folder


NEEDED = [
    "generation_config.json", "model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json",
    "text_encoder/model.safetensors", "tokenizer/merges.txt", "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "tokenizer/vocab.json", "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors", "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
]  # fmt: skip


def test_folders_are_taken_as_they_are(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("some/model").mkdir(parents=True)
    assert folder_of("some/model") == Path("some/model")
    assert folder_of(tmp_path) == tmp_path


@pytest.mark.parametrize("name", ["model", "a/b/c", "./no", "/no/such", "~/x", "../a/b", "a/", "", "a/b\n", "a" * 5000])
def test_what_is_neither_a_folder_nor_a_hub_name(tmp_path, monkeypatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"there is no model folder .*owner/name") as caught:
        folder_of(name)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_only_what_is_needed_is_fetched_once(hub, offered, model) -> None:
    """Configs, tokenizer, one safetensors file a network; then nothing more, also when the hub is gone."""
    folder = folder_of("some/model")
    assert hub.fetched == [file for file in NEEDED if (offered / file).exists()]
    assert sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()) == hub.fetched
    opened, here = open_folder(folder), open_folder(model)
    assert all(torch.equal(a, b) for a, b in zip(opened.unet.parameters(), here.unet.parameters(), strict=True))
    hub.asked.clear()
    assert folder_of("some/model") == folder and hub.fetched == []
    hub.broken = True
    assert folder_of("some/model") == folder
    hub.asked.clear()
    assert folder_of("some/model", local_files_only=True) == folder
    assert folder_of("some/model", revision=COMMIT, local_files_only=True) == folder
    assert hub.asked == []


def test_offline_needs_no_socket(hub, offered, monkeypatch) -> None:
    folder = folder_of("some/model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def refuse(*_: object) -> None:
        raise AssertionError("a socket was opened")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(f"socket.socket.{name}", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    assert folder_of("some/model") == folder
    assert open_folder(folder).unet is not None
    for options in ({}, {"local_files_only": True}):
        with pytest.raises(ModelError, match=r"other/model is not in the cache of the hub, and it works offline"):
            folder_of("other/model", **options)
    with pytest.raises(ModelError, match="not in the cache"):
        folder_of("some/model", revision="v2")


def test_variants_and_shards(hub, offered) -> None:
    """The variant asked for, with the index and all shards; the other components in the variant that they have."""
    unet = offered / "unet"
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    for extra in ("-00001-of-00002", "-00002-of-00002"):
        for variant in (".fp16", ".bf16", ""):
            (unet / f"diffusion_pytorch_model{variant}{extra}.safetensors").write_text(variant + extra)
    for variant in (".fp16", ".bf16", ""):
        (unet / f"diffusion_pytorch_model.safetensors.index{variant}.json").write_text(f'{{"a": "{variant}"}}')
    (offered / "vae/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"x")
    folder_of("some/model", variant="fp16")
    weights = [file for file in hub.fetched if not file.endswith(("config.json", ".txt")) and "/" in file]
    assert [file for file in weights if not file.startswith("tokenizer")] == [
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ]


def test_pickles_only_where_allowed(hub, offered) -> None:
    (offered / "unet/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(
        ModelError, match=r"only pickled weights of its unet \(diffusion_pytorch_model.bin\).*--allow-pi"
    ):
        folder_of("some/model")
    assert hub.fetched == ["model_index.json"]
    folder_of("some/model", allow_pickle=True)
    assert [file for file in hub.fetched if file.endswith(".bin")] == ["unet/diffusion_pytorch_model.bin"]


def test_a_part_in_the_cache_is_said(hub, offered) -> None:
    folder = folder_of("some/model")
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no weights of its 'unet'; .*connect"):
        folder_of("some/model", local_files_only=True)
    assert folder_of("some/model") == folder and (folder / "unet/diffusion_pytorch_model.safetensors").is_file()


def test_what_goes_wrong_is_said_in_one_sentence(hub, offered, tmp_path) -> None:
    hub.models |= {"some/gated": offered, "some/bare": tmp_path / "bare"}
    hub.gated.add("some/gated")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/v1-5.safetensors").write_bytes(b"x")
    cases = [
        ("none/such", {}, ModelError, "the hub has no model none/such, or it is private; check the name"),
        ("some/gated", {}, ModelError, "some/gated is gated; accept its terms"),
        ("some/model", {"revision": "v9"}, ModelError, "some/model has no revision 'v9'"),
        ("some/model", {"revision": "f" * 40}, ModelError, "some/model has no revision"),
        ("some/bare", {}, ModelError, "some/bare is no model folder: it has no model_index.json"),
        ("a--b/c..d", {}, ModelError, "a--b/c..d' is no name of a hub model"),
    ]
    for name, options, kind, said in cases:
        with pytest.raises(kind) as caught:
            folder_of(name, **options)
        assert said in str(caught.value) and len(str(caught.value).splitlines()) == 1
    hub.broken = True
    with pytest.raises(LdmError, match=r"other/model is not in the cache, and the hub cannot be reached|answered 503"):
        folder_of("other/model")


def test_the_token_is_sent(hub, offered, monkeypatch) -> None:
    folder_of("some/model", token="hf_given")
    assert hub.tokens == {"Bearer hf_given"}
    hub.tokens.clear()
    monkeypatch.setenv("HF_TOKEN", "hf_environment")
    folder_of("some/model")
    assert hub.tokens == {"Bearer hf_environment"}


@pytest.mark.slow
def test_the_environment_is_honoured(hub, offered, tmp_path) -> None:
    """HF_ENDPOINT, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE as a user sets them, in processes of their own."""
    script = "import sys; from ldm.checkpoints.hub import folder_of; print(folder_of(sys.argv[1]))"
    plain = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    own = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_x"}

    def run(name: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", script, name]
        return subprocess.run(command, env=plain | own | more, capture_output=True, text=True, timeout=120)

    folder = Path(run("some/model").stdout.strip())
    assert folder.is_relative_to(tmp_path / "home/hub") and (folder / "unet/config.json").is_file()
    assert hub.tokens == {"Bearer hf_x"}
    hub.asked.clear()
    assert run("some/model", HF_HUB_OFFLINE="1").stdout.strip() == str(folder)
    assert "works offline" in run("other/model", HF_HUB_OFFLINE="1").stderr
    assert hub.asked == []


HOSTILE_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "../../etc": ["diffusers", "AutoencoderKL"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "os": "system",
    "requires_safety_checker": False,
}


def test_a_hostile_index_fetches_nothing_else() -> None:
    """Names are looked up among the repository's own files, whatever model_index.json calls its components."""
    names = ["../../etc/passwd.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "os/config.json"]
    names += ["unet/x\x1b.json", "unet/deep/config.json", "unet/[a-z].json", "unet/model.py"]
    with pytest.raises(ModelError, match=r"no weights of its '../../etc'"):
        files_of("a/b", HOSTILE_INDEX, names, None, False)
    del HOSTILE_INDEX["../../etc"]
    assert files_of("a/b", HOSTILE_INDEX, names, None, False) == [
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]
