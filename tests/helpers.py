"""What the tests of the commands share: a small model, how a command ended, and what it left behind."""

import copy
import copyreg
import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ldm.adapters.adapter import Adapter, Layer
from ldm.adapters.names import book_of
from ldm.adapters.writing import write_adapter
from ldm.checkpoints.components import Components
from ldm.checkpoints.folder import save_folder
from ldm.models.clip import CLIPTextConfig, CLIPTextModel
from ldm.models.unet import CROSS, PLAIN, UNet, UNetConfig
from ldm.models.vae import AutoencoderKL, VAEConfig
from ldm.text.tokenizer import CLIPTokenizer

T = TypeVar("T")
WINDOW, SIDE = 77, 16  # tokens and pixels of the small model


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def files(folder: Path) -> list[str]:
    """Everything in a folder, hidden files too."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def refused(done: Done, code: int, *said: str) -> None:
    """One sentence on stderr that says these things, nothing on stdout, and this exit code."""
    assert done.code == code, done
    assert done.out == ""
    assert done.err.startswith("error: ") and len(done.err.splitlines()) == 1, done.err
    assert "Traceback" not in done.err
    for words in said:
        assert words in done.err, (words, done.err)


def without_sockets(patch: pytest.MonkeyPatch) -> None:
    """Every attempt to reach another machine, or to look one up, fails, also where nobody asked to stay offline."""

    def refuse(*arguments: object, **_: object) -> None:
        raise AssertionError(f"a socket was used: {arguments!r:.200}")

    for name in ("connect", "connect_ex", "bind", "sendto", "sendmsg"):
        patch.setattr(f"socket.socket.{name}", refuse)
    for name in ("create_connection", "getaddrinfo", "gethostbyname", "socketpair"):
        patch.setattr(f"socket.{name}", refuse)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        patch.delenv(name, raising=False)
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def pixels(path: Path | str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


VELOCITY = {
    "_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True, "steps_offset": 1,
}  # fmt: skip


def of_velocity(model: Path, folder: Path) -> Path:
    """A copy of a model that predicts v with zero terminal SNR, and draws in three steps with guidance 2.5."""
    shutil.copytree(model, folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(VELOCITY))
    (folder / "generation_config.json").write_text('{"num_inference_steps": 3, "guidance_scale": 2.5}')
    return folder


def small_model(folder: Path, tokens: int = 514, widths: tuple[int, ...] = (8, 16)) -> Path:
    """Write a model of some thousand random weights that draws 16 x 16 pixels. Beyond 514 tokens some are words.
    widths: the channels of the autoencoder's levels; each level more doubles the pictures.
    """
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.train(["a taco", "an owl", "a pizza", "an owl"], tokens, WINDOW)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=WINDOW, eos_token_id=2,
    )  # fmt: skip
    unet = UNetConfig(
        sample_size=8, block_out_channels=(16, 32), down_block_types=(PLAIN, CROSS), layers_per_block=1,
        num_heads=(2, 2), transformer_layers_per_block=(1, 1), cross_attention_dim=32, norm_num_groups=8,
    )  # fmt: skip
    side = SIDE * 2 ** (len(widths) - 2)
    vae = VAEConfig(block_out_channels=widths, layers_per_block=1, norm_num_groups=4, sample_size=side)
    scheduler = {
        "_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
    }  # fmt: skip
    parts = Components(
        UNet(unet), AutoencoderKL(vae), CLIPTextModel(text), tokenizer, scheduler, {"num_inference_steps": 2}
    )
    save_folder(parts, folder, torch.float32)
    return folder


HELD: list[Any] = []  # what the pickles of `copier` leave out


def held(number: int) -> Any:
    """A copy of a tensor that was left out; a tokenizer itself, which never changes."""
    part = HELD[number]
    return copy.deepcopy(part) if isinstance(part, Tensor) else part


def copier(whole: T) -> Callable[[], T]:
    """Makes copies of a model, or of a network, each in a fifth of the time of `copy.deepcopy`."""

    def left_out(part: object) -> tuple[Callable[[int], Any], tuple[int]]:
        HELD.append(part)
        return held, (len(HELD) - 1,)

    pickler = pickle.Pickler(pickled := io.BytesIO(), pickle.HIGHEST_PROTOCOL)
    pickler.dispatch_table = copyreg.dispatch_table | dict.fromkeys((Tensor, nn.Parameter, CLIPTokenizer), left_out)
    pickler.dump(whole)
    return lambda: pickle.loads(pickled.getvalue())


def write_adapters(parts: Components, folder: Path) -> None:
    """Write ink.safetensors, paper.safetensors (LoRA, in diffusers' names) and loha.safetensors (in kohya's), of random
    numbers, for the attention of a model.
    """
    book, draw = book_of(parts.networks), torch.Generator().manual_seed(1)
    ends = ("attn1.to_q", "attn2.to_k", "q_proj")

    def random(kind: str, *names: str) -> Adapter:
        """Layers of factors [O, 4] and [4, I] in turn."""
        layers = {}
        for address, shape in book.modules.items():
            if address.endswith(ends):
                sizes = [(shape[0], 4), (4, shape[1])] * (len(names) // 2)
                tensors = {n: torch.randn(size, generator=draw) * 0.2 for n, size in zip(names, sizes, strict=True)}
                layers[address] = Layer(kind, tensors, 4.0)
        return Adapter(layers)

    for name in ("ink", "paper"):
        write_adapter(random("lora", "lora_up.weight", "lora_down.weight"), folder / f"{name}.safetensors", book)
    halves = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    write_adapter(random("loha", *halves), folder / "loha.safetensors", book, "kohya")


def texts_in(path: str | Path) -> dict[str, str]:
    """What Pillow finds in a picture: the two texts we write, and everything else as it stands."""
    with Image.open(path) as image:
        image.load()
        if image.format == "PNG":
            return {key: str(value) for key, value in image.info.items()}
        inner = image.getexif().get_ifd(0x8769)
        found = {str(tag): repr(value) for tag, value in inner.items()}
    written = (("parameters", 0x9286, b"UNICODE\0", "utf-16-be"), ("ldm", 0x927C, b"ldm\0", "utf-8"))
    for key, tag, start, code in written:
        if tag in inner:
            assert inner[tag].startswith(start)
            found[key] = inner[tag][len(start) :].decode(code)
    return found


def told(rows: list[dict[str, Any]], *names: str) -> list[Any]:
    """One field of each picture, or several of them."""
    return [row[names[0]] if len(names) == 1 else tuple(row[name] for name in names) for row in rows]
