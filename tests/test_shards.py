"""Weights in one file or in several: diffusers and transformers read what is written, and indices are not trusted."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldm.checkpoints.load import load_into
from ldm.checkpoints.shards import choose_file, read_index, save_sharded
from ldm.errors import ModelError, UsageError
from ldm.models.vae import AutoencoderKL, VAEConfig

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the other libraries' own deprecations while they import
    import diffusers
    import transformers

VAE = VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, sample_size=16)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def names_in(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


@pytest.mark.parametrize(("variant", "dot"), [(None, ""), ("fp16", ".fp16")])
def test_diffusers_reads_and_writes_the_same_shards(tmp_path, variant: str | None, dot: str) -> None:
    """The names and the index are those that diffusers itself writes at that size; each reads the other's."""
    model = AutoencoderKL(VAE)
    (tmp_path / "config.json").write_text(json.dumps(VAE.to_dict()))
    files = save_sharded(model.state_dict(), tmp_path, "diffusion_pytorch_model", variant, "40KB")
    count = len(files) - 1
    assert count > 2
    assert files[0].name == f"diffusion_pytorch_model{dot}-00001-of-{count:05d}.safetensors"
    assert files[-1].name == f"diffusion_pytorch_model.safetensors.index{dot}.json"
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 40_000 for file in files[:-1])
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path, variant=variant, use_safetensors=True)
    assert same(theirs.state_dict(), model.state_dict())

    theirs.save_pretrained(tmp_path / "theirs", variant=variant, max_shard_size="40KB")
    ours = json.loads(files[-1].read_text())
    index = json.loads((tmp_path / "theirs" / files[-1].name).read_text())
    assert ours["metadata"] == index["metadata"] and list(ours["weight_map"]) == list(index["weight_map"])
    chosen = choose_file(names_in(tmp_path / "theirs"), "diffusion_pytorch_model", None)
    assert chosen == (files[-1].name, variant)
    with torch.device("meta"):
        loaded = AutoencoderKL(VAE)
    load_into(loaded, read_index(tmp_path / "theirs" / chosen[0]))
    assert same(loaded.state_dict(), model.state_dict())


def test_transformers_reads_our_shards(tmp_path) -> None:
    config = transformers.CLIPTextConfig(
        vocab_size=100, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.CLIPTextModel(config)
    config.save_pretrained(tmp_path)
    assert len(save_sharded(model.state_dict(), tmp_path, "model", None, 9_000)) > 2
    assert same(transformers.CLIPTextModel.from_pretrained(tmp_path).state_dict(), model.state_dict())


def test_sizes(tmp_path) -> None:
    """What fits is one plain file; a tensor larger than a file may be has one of its own, and all are kept in order."""
    tensors = {name: torch.full((size,), float(size)) for name, size in (("a", 10), ("b", 300), ("c", 10), ("d", 10))}
    assert [file.name for file in save_sharded(tensors, tmp_path, "model")] == ["model.safetensors"]
    assert same(load_file(tmp_path / "model.safetensors"), tensors)
    files = save_sharded(tensors, tmp_path, "model", None, "0.1KB")
    assert [list(load_file(file)) for file in files[:-1]] == [["a"], ["b"], ["c", "d"]]
    index = json.loads(files[-1].read_text())
    assert index["metadata"]["total_size"] == 330 * 4 and set(index["weight_map"]) == set(tensors)
    for same_size in (100, "100", "100B", "0.1 kb"):
        assert [file.name for file in save_sharded(tensors, tmp_path, "model", None, same_size)] == [
            file.name for file in files
        ]
    assert [file.name for file in save_sharded({}, tmp_path, "none")] == ["none.safetensors"]
    for wrong in (0, -5, "", "five", "5 GiB", "1e3", "9" * 30):
        with pytest.raises(UsageError, match="largest file"):
            save_sharded(tensors, tmp_path, "model", None, wrong)


FILES = [
    "model.safetensors", "model.fp16.safetensors", "model.safetensors.index.bf16.json", "model.zeta.safetensors",
    "model.bf16-00001-of-00002.safetensors", "pytorch_model.bin", "pytorch_model.fp16.bin", "model_ema.safetensors",
    "model.onnx", "model.safetensors.bak", "xmodel.safetensors",
]  # fmt: skip


@pytest.mark.parametrize(
    ("gone", "variant", "chosen"),
    [
        (0, None, "model.safetensors"),
        (0, "fp16", "model.fp16.safetensors"),
        (0, "bf16", "model.safetensors.index.bf16.json"),
        (0, "zeta", "model.zeta.safetensors"),
        (0, "none", "model.safetensors"),
        (1, None, "model.fp16.safetensors"),
        (2, None, "model.safetensors.index.bf16.json"),
        (3, None, "model.zeta.safetensors"),
        (4, None, None),
    ],
)
def test_the_variant_asked_for_comes_first(gone: int, variant: str | None, chosen: str | None) -> None:
    """...then the plain one, fp16, bf16, any other, as those before are gone."""
    found = choose_file(FILES[gone:], "model", variant)
    assert (found and found[0]) == chosen


def test_pickles_and_whole_files() -> None:
    assert choose_file(FILES, "pytorch_model", "fp16", "bin") == ("pytorch_model.fp16.bin", "fp16")
    assert choose_file(FILES, "model", None, "bin") is None
    both = ["model.safetensors.index.json", "model.safetensors", "diffusion_pytorch_model.safetensors"]
    assert choose_file(both, "model", None) == ("model.safetensors", None)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"w": "../model.safetensors"}, "lie beside their index"),
        ({"w": "/etc/passwd"}, "lie beside their index"),
        ({"w": "..\\model.safetensors"}, "lie beside their index"),
        ({"w": "model.bin"}, "lie beside their index"),
        ({"w": "a\x1b[31m.safetensors"}, r"\\x1b"),
        ({"w": "a\0.safetensors"}, r"\\x00"),
        ({"w": "gone.safetensors", "v": "here.safetensors"}, "lacks 1 of 2 shards, first gone.safetensors"),
        ({"w": 1}, "no weight_map"),
        ({}, "no weight_map"),
        ([], "no weight_map"),
    ],
)
def test_an_index_names_only_files_beside_it(tmp_path, table: object, said: str) -> None:
    (tmp_path / "here.safetensors").touch()
    (tmp_path / "folder.safetensors").mkdir()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    with pytest.raises(ModelError, match=said) as caught:
        read_index(index)
    assert "\x1b" not in str(caught.value)
