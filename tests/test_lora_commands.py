"""`ldm lora`: each command against what it is to be, on files as trainers write them; and its refusals."""

import json
from pathlib import Path

import pytest
import torch
from helpers import Done, refused
from safetensors.torch import load_file, save_file

from ldm.adapters.names import book_of
from ldm.adapters.strength import Strength
from ldm.pipeline import Pipeline

pytestmark = pytest.mark.usefixtures("quick")


def kohya(model: Path, path: Path, seed: int, rank: int = 2, alpha: float = 1.0) -> Path:
    """A file of kohya's for the attention of a model and its text encoder."""
    book, draw = book_of(Pipeline.from_pretrained(model).components.networks), torch.Generator().manual_seed(seed)
    tensors = {}
    for address, shape in book.modules.items():
        if address.endswith(("attn1.to_q", "attn2.to_k", "q_proj")):
            name = book.spelled(address, "kohya")
            tensors[f"{name}.lora_down.weight"] = torch.randn(rank, shape[1], generator=draw)
            tensors[f"{name}.lora_up.weight"] = torch.randn(shape[0], rank, generator=draw) * 0.1
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return path


@pytest.fixture
def ink(model, tmp_path) -> Path:
    return kohya(model, tmp_path / "ink.safetensors", 1)


def reported(done: Done) -> dict[str, object]:
    assert done.code == 0, done.err
    return json.loads(done.out)  # type: ignore[no-any-return]


def networks(model: Path, *adapters: tuple[Path, str]) -> dict[str, torch.Tensor]:
    """Every weight of a model with adapters in it."""
    pipeline = Pipeline.from_pretrained(model)
    for path, strength in adapters:
        pipeline.load_lora(path, Strength.of(strength))
    assert pipeline.unet
    found = pipeline.components.networks.items()
    return {f"{name}.{key}": value for name, part in found for key, value in part.state_dict().items()}


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], bound: float) -> bool:
    return a.keys() == b.keys() and all((a[k] - b[k]).abs().max() <= bound * b[k].abs().max() for k in a)


def test_info_says_what_it_is_and_how_much_it_changes(run, model, ink):
    rows = reported(run("lora", "info", ink, "--model", model, "--json"))
    assert (rows["dialect"], rows["types"], rows["rank"], rows["alpha"]) == ("kohya", "lora", "2", "1")
    base, changed = networks(model), networks(model, (ink, "1"))
    for row in rows["layers"]:  # type: ignore[attr-defined]
        key = f"{row['name']}.weight"
        assert row["matched"]
        assert row["norm"] == pytest.approx(float((changed[key] - base[key]).norm()), rel=1e-5)
        assert row["relative"] == pytest.approx(row["norm"] / float(base[key].norm()), rel=1e-5)
    shown = run("lora", "info", ink, "--model", model, "--layers")
    assert shown.code == 0 and shown.out.count("of the weight") == len(rows["layers"])  # type: ignore[arg-type]


def test_converted_there_and_back_it_is_the_same_file(run, model, ink, tmp_path):
    for there in ("peft", "diffusers", "comfy"):
        between, back = (
            tmp_path / f"{there}{'' if there == 'peft' else '.safetensors'}",
            tmp_path / f"{there}-k.safetensors",
        )
        reported(run("lora", "convert", ink, between, "--to", there, "--model", model, "--json"))
        reported(run("lora", "convert", between, back, "--to", "kohya", "--model", model, "--json"))
        first, second = load_file(ink), load_file(back)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[k], second[k]) and first[k].dtype == second[k].dtype for k in first)


def test_merged_is_what_is_drawn_with(run, model, ink, tmp_path):
    other = kohya(model, tmp_path / "other.safetensors", 2)
    done = run("lora", "merge", f"{ink}:0.5", f"{other}:te=0:unet=-1", "--model", model, "-o", "merged", "--json")
    assert reported(done)["files"] == 3
    merged, wanted = networks(tmp_path / "merged"), networks(model, (ink, "0.5"), (other, "te=0:unet=-1"))
    assert merged.keys() == wanted.keys() and all(torch.equal(merged[key], wanted[key]) for key in merged)


def test_combined_is_the_sum_and_resized_the_nearest(run, model, ink, tmp_path):
    other = kohya(model, tmp_path / "other.safetensors", 2)
    both = tmp_path / "both.safetensors"
    reported(run("lora", "combine", f"{ink}:0.5", f"{other}:-2", "-o", both, "--model", model, "--json"))
    whole = networks(model, (ink, "0.5"), (other, "-2"))
    assert close(networks(model, (both, "1")), whole, 1e-6)
    small = tmp_path / "small.safetensors"
    reported(run("lora", "resize", both, "-o", small, "--rank", "2", "--model", model, "--json"))
    base, cut = networks(model), networks(model, (small, "1"))
    for key in base:
        change = (whole[key] - base[key]).double()
        if change.ndim > 1 and change.abs().max() > 0:
            left, values, right = torch.linalg.svd(change.flatten(1), full_matrices=False)
            best = (left[:, :2] * values[:2]) @ right[:2]
            assert (cut[key] - base[key] - best.reshape(change.shape)).abs().max() <= 1e-5 * change.abs().max()


def test_extracted_is_what_was_merged(run, model, ink, tmp_path):
    run("lora", "merge", ink, "--model", model, "-o", "tuned")
    out = tmp_path / "out.safetensors"
    rows = reported(run("lora", "extract", model, "tuned", "-o", out, "--rank", "2", "--json"))
    assert "0.00% of a layer's change in the middle" in str(rows["error"])
    assert close(networks(model, (out, "1")), networks(tmp_path / "tuned"), 1e-5)


def test_any_type_becomes_a_plain_lora(run, model, tmp_path):
    """A LoHa of rank 1 is of rank 1: nothing is lost. Its file would be refused for diffusers as it is."""
    name, draw = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q", torch.Generator().manual_seed(0)
    halves = {f"hada_w{n}_{half}": (32, 1) if half == "a" else (1, 32) for n in (1, 2) for half in "ab"}
    loha = {f"{name}.{key}": torch.randn(*shape, generator=draw) for key, shape in halves.items()}
    save_file(loha, tmp_path / "loha.safetensors")
    refused(run("lora", "convert", "loha.safetensors", "out.safetensors", "--model", model), 1, "loha", "--as-lora")
    done = run("lora", "convert", "loha.safetensors", "out.safetensors", "--model", model, "--as-lora", "1", "--json")
    assert "0.00%" in str(reported(done)["error"])
    a, b = (networks(model, (tmp_path / f"{name}.safetensors", "1")) for name in ("loha", "out"))
    assert close(a, b, 1e-6)


def test_refusals(run, model, ink, tmp_path):
    refused(run("lora", "convert", ink, "out.safetensors", "--to", "koya"), 2, "did you mean 'kohya'")
    refused(run("lora", "convert", ink, "out", "--to", "kohya"), 2, "a file that ends in .safetensors")
    refused(run("lora", "convert", ink, "out.safetensors", "--to", "peft"), 2, "a folder")
    refused(run("lora", "convert", ink, ink, "--to", "kohya"), 2, "exists", "--overwrite")
    refused(run("lora", "resize", ink, "-o", "out.safetensors"), 2, "--rank", "--keep")
    refused(run("lora", "resize", ink, "-o", "out.safetensors", "--keep", "sv_fro"), 2, "MEASURE=VALUE")
    refused(run("lora", "combine", f"{ink}:0@0,1@1", "-o", "out.safetensors", "--model", model), 2, "not one number")
    refused(run("lora", "merge", f"{ink}:0@0,1@1", "--model", model, "-o", "out"), 2, "changes over a run")
    refused(run("lora", "extract", model, model, "-o", "out.safetensors"), 1, "do not differ")
    refused(run("lora", "convert", ink, "out.safetensors"), 1, "--model")
    refused(run("lora", "merge", ink, "-o", "out"), 1, "ink is for")
    refused(run("lora", "info", "none.safetensors"), 1, "none.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ink.safetensors"]
