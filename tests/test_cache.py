"""The cache of latents and text embeddings: a hit is what was made, bit by bit, whatever happened to the files."""

import hashlib
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import files
from torch import Tensor

from ldm.data.buckets import Placement, Size
from ldm.data.cache import digest, kept, latents_key, posterior, text_key
from ldm.data.order import dice
from ldm.errors import LdmError
from ldm.models.vae import AutoencoderKL, VAEConfig

KEY, OTHER = (f"{n:064x}" for n in (1, 2))
PLACEMENT = Placement(Size(40, 32), Size(40, 32), Size(32, 32), 0, 4)


def tensors() -> dict[str, Tensor]:
    """What two encoders may give: several types, a scalar, an empty one, one that is not contiguous, NaN and -0."""
    return {
        "mean": torch.randn(4, 6, 8).transpose(0, 2),
        "half": torch.randn(7, dtype=torch.float16),
        "brain": torch.tensor([float("nan"), -0.0, 1e-40], dtype=torch.bfloat16),
        "eighth": torch.randn(5).to(torch.float8_e4m3fn),
        "pooled": torch.tensor(3.0, dtype=torch.float64),
        "none": torch.empty(0, 3),
        "ids": torch.arange(5),
    }


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """In names, types, shapes and bits."""
    return digest(one) == digest(other) and one.keys() == other.keys()


def never() -> dict[str, Tensor]:
    raise AssertionError("what is in the cache was made again")


def test_a_hit_is_what_was_made(tmp_path):
    made = tensors()
    first = kept(tmp_path, KEY, lambda: made)
    again = kept(tmp_path, KEY, never)
    for found in (first, again):
        assert found.keys() == made.keys()
        for name, value in made.items():
            assert found[name].dtype == value.dtype and found[name].shape == value.shape
            assert (
                found[name]
                .contiguous()
                .flatten()
                .view(torch.uint8)
                .equal(value.contiguous().flatten().view(torch.uint8))
            )
    assert files(tmp_path) == ["00", f"00/{KEY}.safetensors"]
    again["mean"].zero_()  # what is handed out is the caller's
    assert equal(kept(tmp_path, KEY, never), made)


def test_digest_is_sha256():
    row = torch.tensor([1.0, -2.0])
    expected = hashlib.sha256(b"\nw torch.float32 [2]\n" + np.array([1, -2], "<f4").tobytes()).hexdigest()
    assert digest({"w": row}) == expected
    others = [{"v": row}, {"w": row[None]}, {"w": row.double()}, {"w": row.view(torch.int32)}, {"w": -row}, {}]
    assert len({digest(other) for other in others} | {expected}) == 7
    assert digest({"a": row, "b": row[0]}) == digest({"b": row[0], "a": row})


def test_a_key_tells_everything_apart():
    def latents(content="c", placement=PLACEMENT, weights="w", dtype=torch.float32):
        return latents_key(content, placement, weights, dtype)

    def text(text="a cat", weights="w", dtype=torch.float32, clip_skip=0):
        return text_key(text, weights, dtype, clip_skip)

    keys = [
        latents(), latents("d"), latents(weights="v"), latents(dtype=torch.float16),
        *(latents(placement=replace(PLACEMENT, **change)) for change in (
            {"target": Size(24, 32)}, {"resized": Size(41, 32)}, {"left": 3}, {"top": 1}, {"flipped": True})),
        text(), text("a dog"), text(""), text("\ud800"),
        text(weights="v"), text(dtype=torch.float16), text(clip_skip=1),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys) == 16 and all(len(key) == 64 for key in keys)
    assert latents() == keys[0] and text() == keys[9]


def test_the_cached_loss_is_the_loss(tmp_path):
    """Uncached, missed and hit, with the sample's dice: the same bits of the loss and of its gradient."""
    torch.manual_seed(1)
    vae = AutoencoderKL(VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, sample_size=32))
    picture, weights = torch.rand(3, 32, 32) * 2 - 1, digest(vae.state_dict())
    key = latents_key("c", PLACEMENT, weights, torch.float32)

    def loss(parts: dict[str, Tensor]) -> list[Tensor]:
        factor = torch.ones(4, 1, 1, requires_grad=True)
        thrown = dice(3, 20, 1)
        drawn = [torch.from_numpy(thrown.standard_normal(parts["mean"].shape, np.float32)) for _ in range(2)]
        value = ((parts["mean"] + parts["std"] * drawn[0]) * factor - drawn[1]).square().mean()
        value.backward()
        assert factor.grad is not None
        return [value.detach(), factor.grad]

    results = [loss(posterior(vae, picture))]
    results += [loss(kept(tmp_path, key, make)) for make in (lambda: posterior(vae, picture), never)]
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))
    mean, logvar = vae.posterior(picture[None])
    again = kept(tmp_path, key, never)
    assert torch.equal(again["mean"], mean[0]) and torch.equal(again["std"], torch.exp(logvar[0] / 2))
    assert not again["mean"].requires_grad
    with torch.no_grad():
        next(vae.parameters()).mul_(1.001)
    assert digest(vae.state_dict()) != weights


def damages(data: bytes, other: bytes) -> list[bytes]:
    """What may be found in place of a file's bytes."""
    rng = np.random.default_rng(0)
    flipped = []
    for bit in rng.choice(8 * len(data), 90, replace=False).tolist():
        one = bytearray(data)
        one[bit // 8] ^= 1 << bit % 8
        flipped.append(bytes(one))
    cut = [data[:n] for n in rng.integers(0, len(data), 20).tolist()]
    return [b"", b"\0" * len(data), b"garbage", data + b"\0", other, *cut, *flipped]


def test_damage_is_made_good(tmp_path):
    """Emptied, cut short, one bit turned over, or another key's: made again, and whole from then on."""
    made = {"mean": torch.randn(4, 4), "std": torch.rand(4, 4)}
    kept(tmp_path, KEY, lambda: made)
    kept(tmp_path, OTHER, lambda: {"mean": torch.zeros(4, 4), "std": torch.zeros(4, 4)})
    path, other = (tmp_path / "00" / f"{key}.safetensors" for key in (KEY, OTHER))
    whole = path.read_bytes()
    calls: list[int] = []

    def make() -> dict[str, Tensor]:
        calls.append(n)
        return made

    for n, data in enumerate(damages(whole, other.read_bytes())):
        path.write_bytes(data)
        assert equal(kept(tmp_path, KEY, make), made)
        if calls[-1:] == [n]:
            assert path.read_bytes() == whole
    assert calls[:25] == list(range(25)) and len(calls) > 80  # a bit in the header's metadata or spaces is no harm


def forked(work) -> int:
    """The id of a process that does `work` and ends with 0 if all went well."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return child


def entry(n: int) -> dict[str, Tensor]:
    return {"mean": torch.full((256,), float(n)), "std": torch.arange(256.0) + n}


def hammer(folder: Path, seed: int, times: int) -> None:
    """Ask for entries at random; one in three is first damaged, as by a faulty disk."""
    rng = np.random.default_rng(seed)
    for _ in range(times):
        n = int(rng.integers(5))
        assert equal(kept(folder, f"{n:064x}", lambda n=n: entry(n)), entry(n))
        if rng.random() < 0.3:
            (folder / "00" / f"{n:064x}.safetensors").unlink(missing_ok=True)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of a fork with threads, from Python 3.12 on
def test_processes_at_once(tmp_path):
    children = [forked(lambda seed=seed: hammer(tmp_path, seed, 120)) for seed in range(3)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    for n in range(5):
        assert equal(kept(tmp_path, f"{n:064x}", lambda n=n: entry(n)), entry(n))
    assert len(files(tmp_path)) == 6  # a folder and five entries: nothing half-written lies about


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_killed_while_writing(tmp_path):
    """Whatever has the name of an entry is whole, after kill -9 at any moment."""
    for seed in range(12):
        child = forked(lambda seed=seed: hammer(tmp_path, seed, 10_000))
        time.sleep(0.005 + 0.003 * seed)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for path in (tmp_path / "00").glob("0*.safetensors"):
            assert equal(kept(tmp_path, path.stem, never), entry(int(path.stem, 16)))


def test_no_place_to_write(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LdmError, match=r"cannot write to .*file: .*give another cache folder"):
        kept(tmp_path / "file", KEY, tensors)
