"""`ldm merge` against the formulas, written out here on the names of the original files and of model folders."""

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import WINDOW, files, refused, small_model
from safetensors import safe_open
from safetensors.torch import load_file
from singles import model_of, single_state, small_family, write, write_hollow
from torch import Tensor

from ldm.checkpoints.families import FAMILIES
from ldm.checkpoints.folder import open_folder, save_folder
from ldm.checkpoints.single_file import open_single_file, save_single_file
from ldm.errors import ModelError, UsageError
from ldm.merging import Share, add_difference, block_names, blocks_of, merge, mixture, parse_blocks, plan, weighted_sum
from ldm.models.presets import UNETS
from ldm.models.unet import UNet
from ldm.text.tokenizer import CLIPTokenizer

State = dict[str, Tensor]
UNET, TEXT, VAE = "model.diffusion_model.", "cond_stage_model.", "first_stage_model."
PUBLISHED = FAMILIES["sd1"]
NARROW = {name: small_family(name) for name in ("sd1", "sdxl")}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def narrow(monkeypatch) -> None:
    """The families as they are, with narrow networks."""
    for name in NARROW:
        monkeypatch.setitem(FAMILIES, name, NARROW[name])
    monkeypatch.setattr(CLIPTokenizer, "standard", staticmethod(cache(CLIPTokenizer.standard)))


@pytest.fixture(scope="session")
def base() -> State:
    """A narrow Stable Diffusion 1 in the names of real files."""
    return single_state("sd1", model_of(NARROW["sd1"], 4))


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> list[Path]:
    """Three small models of one shape and vocabulary."""
    place = tmp_path_factory.mktemp("merged")
    first = small_model(place / "a")
    for name in "bc":
        save_folder(shaken(open_folder(first)), place / name, torch.float32)
    return [place / name for name in "abc"]


def shaken(components: Any) -> Any:
    """The model with other numbers everywhere."""
    for network in components.networks.values():
        for parameter in network.parameters():
            parameter.data = parameter.data + 0.1 * torch.randn(parameter.shape)
    return components


def other(state: State) -> State:
    """Other numbers in the same places."""
    return {k: v + 0.1 * torch.randn(v.shape) if v.is_floating_point() else v for k, v in state.items()}


@pytest.fixture
def merged(run):
    """`ldm merge`, which must succeed: its report."""

    def command(*words: object) -> dict[str, Any]:
        done = run("merge", *words, "--json")
        assert done.code == 0, done.err
        report: dict[str, Any] = json.loads(done.out)
        return report

    return command


def weights(folder: Path | str) -> State:
    """All tensors of a model folder, by address."""
    found: State = {}
    for path in sorted(Path(folder).glob("*/*.safetensors")):
        found |= {f"{path.parent.name}.{key}": value for key, value in load_file(path).items()}
    return found


def near(found: Tensor, exact: Tensor, scale: Tensor | None = None) -> None:
    """Within three roundings to float32 of a value of float64, at the size of what was summed."""
    largest = float((exact if scale is None else scale).abs().max())
    assert (found.double() - exact).abs().max() <= 3 * 2**-24 * largest


def mbw(key: str, numbers: list[float]) -> float:
    """The alpha of a tensor as sdweb-merge-block-weighted has it: base first, then the blocks in order."""
    blocks, half = numbers[1:], len(numbers) // 2 - 1
    if not key.startswith(UNET):
        return numbers[0]
    if "time_embed" in key:
        return blocks[0]
    if ".out." in key:
        return blocks[-1]
    for pattern, first in ((r"\.input_blocks\.(\d+)\.", 0), (r"\.output_blocks\.(\d+)\.", half + 1)):
        if match := re.search(pattern, key):
            return blocks[first + int(match[1])]
    return blocks[half] if ".middle_block." in key else numbers[0]


# -- the formulas -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_formulas(dtype):
    tensors = [torch.randn(64, 5).to(dtype) for _ in range(3)]
    a, b, c = (tensor.double() for tensor in tensors)
    for shares in ((0.2, 0.5, 0.3), (1.5, -0.5, 0.0), (0.0, 0.0, 1.0)):
        exact = shares[0] * a + shares[1] * b + shares[2] * c
        near(weighted_sum(tensors, shares), exact, 3 * torch.maximum(a.abs(), torch.maximum(b.abs(), c.abs())))
    near(add_difference(tensors, (1, 0.7, -0.7)), a + 0.7 * (b - c), 3 * torch.stack([a, b, c]).abs())
    assert torch.equal(weighted_sum(tensors, (0.0, 1.0, 0.0)), tensors[1].float())
    tensors[0].fill_(torch.nan)
    assert weighted_sum(tensors, (0.0, 0.5, 0.5)).isfinite().all()  # what has no weight is not read


@pytest.mark.parametrize("name,count", [("sd15", 26), ("sd21", 26), ("sdxl", 20), ("sdxl-refiner", 26)])
def test_blocks_are_those_of_mbw(name, count):
    """Every key of the published U-Nets lies in the block that its name in the original file says."""
    c = UNETS[name]
    assert len(block_names(c)) == count
    with torch.device("meta"):
        keys = list(UNet(c).state_dict())
    found = blocks_of(keys, c)
    assert {*found.values()} | {"BASE"} == {*block_names(c)}
    told = {"conv_in.weight": "IN00", "time_embedding.linear_1.bias": "IN00", "mid_block.resnets.1.conv1.weight": "M00",
            "down_blocks.0.resnets.1.conv1.bias": "IN02", "down_blocks.0.downsamplers.0.conv.weight": "IN03",
            "up_blocks.0.resnets.0.conv1.weight": "OUT00", "conv_out.bias": f"OUT{count // 2 - 2:02}"}  # fmt: skip
    assert {key: found[key] for key in told} == told
    if "xl" in name:
        assert [key for key in keys if found[key] == "BASE"] == [key for key in keys if key.startswith("add_emb")]


# -- folders ----------------------------------------------------------------------------------------------------------


def test_weighted_sum_of_folders(merged, run, folders):
    """Every number of the U-Net and the text encoder; the autoencoder is A's to the bit; the result draws."""
    before = {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}
    report = merged(*folders[:2], "-o", "net", "--alpha", "0.3")
    a, b, found = (weights(folder) for folder in (*folders[:2], "net"))
    assert found.keys() == a.keys() and report["tensors"] == len(a) and report["dtype"] == "float32"
    for key, value in found.items():
        if key.startswith("vae."):
            assert torch.equal(value, a[key])
        else:
            near(value, 0.7 * a[key].double() + 0.3 * b[key].double())
    merged(*folders, "-o", "three", "--weights", "1,5,4", "--normalize", "--vae", "merge")
    c = weights(folders[2])
    for key, value in weights("three").items():
        near(value, 0.1 * a[key].double() + 0.5 * b[key].double() + 0.4 * c[key].double(), a[key].abs() + b[key].abs())
    assert before == {path: path.read_bytes() for path in before}  # the inputs are as they were
    assert run("verify", "net").code == 0
    assert run("generate", "an owl", "--model", "net", "--steps", "1", "-o", "owl.png").code == 0


def test_ends_are_the_models(merged, folders):
    """Weights 0 and 1 give A and B to the bit, in networks of all kinds."""
    a, b, c = map(weights, folders)
    for words, expected in (
        (["--alpha", "0"], a), (["--alpha", "1"], b), (["--weights", "0,1"], b), (["--weights", "1,0"], a),
    ):  # fmt: skip
        merged(*folders[:2], "-o", "net", *words, "--vae", "merge", "--overwrite")
        assert all(torch.equal(value, expected[key]) for key, value in weights("net").items())
    merged(*folders, "-o", "net", "--weights", "0,0,1", "--vae", "merge", "--overwrite")
    assert all(torch.equal(value, c[key]) for key, value in weights("net").items())


def test_add_difference(merged, folders):
    """A + alpha (B - C): as the formula; B = C or alpha 0 leave A to the bit; with C = A it is a weighted sum."""
    a, b, c = map(weights, folders)
    merged(*folders, "-o", "net", "--add-difference", "--alpha", "0.8")
    for key, value in weights("net").items():
        exact = a[key].double() + 0.8 * (b[key].double() - c[key].double()) * (not key.startswith("vae."))
        near(value, exact, a[key].abs() + b[key].abs() + c[key].abs())
    for three, alpha in (([0, 1, 1], "0.8"), ([0, 1, 2], "0")):
        merged(*(folders[i] for i in three), "-o", "same", "--add-difference", "--alpha", alpha, "--overwrite")
        assert all(torch.equal(value, a[key]) for key, value in weights("same").items())
    merged(folders[0], folders[1], folders[0], "-o", "sum", "--add-difference", "--alpha", "0.8", "--vae", "merge")
    for key, value in weights("sum").items():
        near(value, 0.2 * a[key].double() + 0.8 * b[key].double(), a[key].abs() + b[key].abs())


def test_parts_are_taken_whole(merged, run, folders, tmp_path):
    """A letter takes a network as it is; with B's text encoder come B's words."""
    a, b, c = map(weights, folders)
    merged(*folders, "-o", "net", "--unet", "C", "--text-encoder", "B")
    whole = {"unet": c, "text_encoder": b, "vae": a}
    assert all(torch.equal(value, whole[key.partition(".")[0]][key]) for key, value in weights("net").items())
    merged(*folders[:2], "-o", "mixed", "--alpha", "0.5", "--text-encoder", "A", "--vae", "B")
    for key, value in weights("mixed").items():
        if key.startswith("unet."):
            near(value, (a[key].double() + b[key].double()) / 2)
        else:
            assert torch.equal(value, (b if key.startswith("vae.") else a)[key])
    foreign = open_folder(folders[1])
    vocab = dict(foreign.tokenizer.vocab)
    vocab["!"], vocab['"'] = vocab['"'], vocab["!"]
    foreign.tokenizer = CLIPTokenizer(vocab, foreign.tokenizer.merges, WINDOW)
    save_folder(foreign, tmp_path / "words", torch.float32)
    refused(run("merge", folders[0], "words", "-o", "x", "--alpha", "0.5"), 1, "tokenizers with other words")
    merged(folders[0], "words", "-o", "own", "--alpha", "0.5", "--text-encoder", "B")
    assert open_folder(Path("own")).tokenizer.vocab == vocab


def test_beginnings_of_names(merged, run, folders):
    """The longest beginning of a name counts, then its block, then BASE; all else has the common alpha."""
    a, b = weights(folders[0]), weights(folders[1])
    given = "M00=0.9,unet.mid_block=0.2,unet.mid_block.resnets.0=1,OUT01=0,text_encoder.text_model.encoder.layers.1=1"
    report = merged(*folders[:2], "-o", "net", "--alpha", "0.4", "--blocks", given)
    for key, value in weights("net").items():
        alpha = 0.0 if key.startswith(("vae.", "unet.up_blocks.0.resnets.1", "unet.up_blocks.0.attentions.1",
                                       "unet.up_blocks.0.upsamplers")) else 0.4  # fmt: skip
        alpha = 0.2 if key.startswith("unet.mid_block.") else alpha
        alpha = (
            1.0 if key.startswith(("unet.mid_block.resnets.0.", "text_encoder.text_model.encoder.layers.1.")) else alpha
        )
        near(value, (1 - alpha) * a[key].double() + alpha * b[key].double(), a[key].abs() + b[key].abs())
    done = run("merge", *folders[:2], "-o", "dry", "--alpha", "0.4", "--blocks", given, "--dry-run", "--json")
    rows = json.loads(done.out)
    assert rows == {"was": report["was"], "plan": report["plan"]} and not Path("dry").exists()
    counts = {name: sum(r["tensors"] for r in rows["plan"] if r["network"] == name) for name in ("unet", "vae")}
    assert counts == {name: sum(key.startswith(f"{name}.") for key in a) for name in counts}
    shown = run("merge", *folders[:2], "-o", "dry", "--alpha", "0.4", "--blocks", given, "--dry-run").out
    assert re.search(r"unet\.mid_block +0\.8 A \+ 0\.2 B", shown) and re.search(r"unet OUT01 +1 A", shown)
    assert re.search(r"\bvae +A ", shown)


# -- single files -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_block_weights_on_original_names(merged, name, base):
    """26 and 20 numbers, each on the tensors that sdweb-merge-block-weighted gives it, by their original names."""
    a = base if name == "sd1" else single_state(name, model_of(NARROW[name], 4))
    b = other(a)
    write(Path("a.safetensors"), a)
    write(Path("b.safetensors"), b)
    numbers = [round(i / 40, 3) for i in range({"sd1": 26, "sdxl": 20}[name])]
    words = ["--blocks", ",".join(map(str, numbers)), "--vae", "merge"]
    merged("a.safetensors", "b.safetensors", "-o", "out.safetensors", *words)
    found = load_file("out.safetensors")
    assert sum(key.startswith(UNET) for key in found) == sum(key.startswith(UNET) for key in a)
    for key, value in found.items():
        alpha = mbw(key, numbers)
        exact = (1 - alpha) * a[key].double() + alpha * b[key].double()
        near(value.reshape(exact.shape), exact, a[key].abs() + b[key].abs())
    if name == "sd1":  # a file and a folder, into a folder: the same numbers
        save_folder(open_single_file("b.safetensors"), "b", None)
        merged("a.safetensors", "b", "-o", "net", *words)
        save_single_file(open_folder(Path("net")), "again.safetensors")
        again = load_file("again.safetensors")
        assert found.keys() == again.keys() and all(torch.equal(found[key], again[key]) for key in found)


def test_each_block_alone(base):
    """A block has the tensors that its name says, by their original names, and together they have every one."""
    c = NARROW["sd1"].parts["unet"].config
    with torch.device("meta"):
        keys = list(UNet(c).state_dict())
    blocks = blocks_of(keys, c)
    originals = [key.removeprefix(UNET) for key in base if key.startswith(UNET)]
    starts = {f"{stem}{i:02}": [f"{kind}_blocks.{i}."] for stem, kind in (("IN", "input"), ("OUT", "output"))
              for i in range(12)}  # fmt: skip
    starts["M00"] = ["middle_block."]
    starts["IN00"].append("time_embed.")
    starts["OUT11"].append("out.")
    counts = {name: sum(key.startswith(tuple(begin)) for key in originals) for name, begin in starts.items()}
    assert Counter(blocks.values()) == counts and min(counts.values()) > 0
    assert sum(counts.values()) == len(keys) == len(originals)


@pytest.mark.slow
def test_pickles(merged, run, base):
    """Only when allowed; the same numbers as of safetensors."""
    torch.save({"state_dict": base}, "a.ckpt")
    write(Path("a.safetensors"), base)
    refused(run("merge", "a.safetensors", "a.ckpt", "-o", "x", "--alpha", "1"), 1, "a.ckpt", "--allow-pickle")
    merged("a.safetensors", "a.ckpt", "-o", "x.safetensors", "--alpha", "1", "--vae", "merge", "--allow-pickle")
    assert all(
        torch.equal(value.reshape(base[key].shape), base[key]) for key, value in load_file("x.safetensors").items()
    )


def test_numbers_are_rounded_once(merged, folders, tmp_path):
    """--dtype of the result; without it A's types. The sum is taken in float32, also of halves."""
    save_folder(open_folder(folders[0]), tmp_path / "half", torch.float16)
    a, b = weights(tmp_path / "half"), weights(folders[1])
    exact = {key: (a[key].float() * 0.7).add(b[key], alpha=0.3) for key in a}
    dtypes = {"": torch.float16, "fp32": torch.float32, "bf16": torch.bfloat16}
    for name, dtype in dtypes.items():
        words = ["--dtype", name] if name else []
        report = merged("half", folders[1], "-o", "net", "--alpha", "0.3", *words, "--overwrite")
        found = weights("net")
        assert report["dtype"] == str(dtype).removeprefix("torch.")
        expected = {key: a[key] if key.startswith("vae.") else exact[key] for key in a}
        assert all(torch.equal(value, expected[key].to(dtype)) for key, value in found.items())
    merged(folders[1], "half", "-o", "net", "--alpha", "0", "--dtype", "fp16", "--overwrite")
    assert all(torch.equal(value, b[key].half()) for key, value in weights("net").items())


@pytest.mark.parametrize("channels", [9, pytest.param(8, marks=pytest.mark.slow)])
def test_inpainting_takes_four_channels(base, channels, tmp_path, monkeypatch):
    """A for inpainting (9 channels) or instruct-pix2pix (8), the others common: 4 channels are merged, as in A1111."""
    monkeypatch.chdir(tmp_path)
    first = UNET + "input_blocks.0.0.weight"
    wide = base | {first: torch.randn(len(base[first]), channels, 3, 3)}
    b, c = other(base), other(base)
    opened = [open_single_file(write(Path(f"{i}.safetensors"), state)) for i, state in enumerate((wide, b, c))]
    for order in ((1, 0), (1, 1, 0), (0, 0, 1)):
        mix = mixture(len(order), weights=[1.0, *[0.0] * (len(order) - 1)])
        with pytest.raises(ModelError, match="only A may be of another one than text-to-image"):
            plan([opened[i] for i in order], mix)
    found = merge(opened, mixture(3, alpha=1, difference=True)).unet.conv_in.weight
    near(found[:, :4], wide[first][:, :4].double() + b[first].double() - c[first].double(), 4 * wide[first])
    assert torch.equal(found[:, 4:], wide[first][:, 4:])
    halves = merge([open_single_file("0.safetensors"), *opened[1:]], mixture(3, weights=(0.5, 0.5, 0)), torch.float16)
    assert torch.equal(halves.unet.conv_in.weight[:, 4:], wide[first][:, 4:].half())
    assert torch.equal(halves.unet.conv_in.weight[:, :4], (wide[first][:, :4] * 0.5).add(b[first], alpha=0.5).half())
    save_single_file(halves, "out.safetensors")
    assert load_file("out.safetensors")[first].shape[1] == channels


def metadata(path: str) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        found: dict[str, str] = file.metadata()
        return found


def test_recipe_in_the_file(merged, base):
    """What A1111 writes: hashes, method, multiplier, and the recipes of what was merged before."""
    write(Path("a.safetensors"), base)
    write(Path("b.safetensors"), other(base), {"sd_merge_recipe": "[" * 5000, "sd_merge_models": "no JSON"})
    merged("a.safetensors", "b.safetensors", "-o", "one.safetensors", "--alpha", "0.3", "--dtype", "fp16")
    merged(
        "one.safetensors", "b.safetensors", "a.safetensors", "-o", "two.safetensors", "--add-difference", "--alpha", "2"
    )
    hashes = {n: hashlib.sha256(Path(f"{n}.safetensors").read_bytes()).hexdigest() for n in ("a", "b", "one")}
    one, two = (metadata(f"{name}.safetensors") for name in ("one", "two"))
    recipe = json.loads(one["sd_merge_recipe"])
    assert recipe["type"] == "ldm" and recipe["interp_method"] == "Weighted sum" and recipe["multiplier"] == 0.3
    assert [recipe[f"{rank}_model_hash"] for rank in ("primary", "secondary", "tertiary")] == [
        hashes["a"],
        hashes["b"],
        None,
    ]
    assert recipe["save_as_half"] is True and recipe["is_inpainting"] is False and recipe["custom_name"] == "one"
    assert recipe["weights"] == [0.7, 0.3] and recipe["networks"]["vae"] == "A"
    told = json.loads(one["sd_merge_models"])
    part = Path("a.safetensors").read_bytes()[0x100000:0x110000]
    legacy = hashlib.sha256(part).hexdigest()[:8]
    assert told[hashes["a"]] == {"name": "a.safetensors", "legacy_hash": legacy, "sd_merge_recipe": None}
    assert told.keys() == {hashes["a"], hashes["b"]} and one["modelspec.merged_from"] == "a, b"
    later, last = json.loads(two["sd_merge_models"]), json.loads(two["sd_merge_recipe"])
    assert later[hashes["one"]]["sd_merge_recipe"] == recipe and later.keys() == {*hashes.values()}
    assert (
        last["interp_method"] == "Add difference"
        and last["tertiary_model_hash"] == hashes["a"]
        and last["multiplier"] == 2
    )
    assert one["modelspec.architecture"] == "stable-diffusion-v1" and one["modelspec.title"] == "one"


# -- refusals ---------------------------------------------------------------------------------------------------------


WRONG: tuple[tuple[int, dict[str, Any], str], ...] = (  # models, what is said of the mixture, what is answered
    (2, {}, "nothing says how much"),
    (1, {"alpha": 0.5}, "1 models to merge; give two to 26"),
    (3, {"alpha": 0.5}, "there are 3; give a weight for each"),
    (2, {"weights": (0.5, 0.3, 0.2)}, "3 weights for 2 models"),
    (2, {"weights": (0.5, 0.3)}, "sum to 0.8, not to 1; change them, or normalize"),
    (2, {"weights": (0.5, -0.5), "normalize": True}, "sum to 0, not to 1; change them$"),
    (2, {"weights": (0.5, 0.5), "alpha": 0.5}, "give one of them"),
    (2, {"weights": (0.5, 0.5), "blocks": {"M00": 1.0}}, "give one of them"),
    (2, {"alpha": 0.5, "normalize": True}, "only weights can be normalized"),
    (2, {"alpha": float("nan")}, "a weight is nan"),
    (2, {"alpha": 0.5, "blocks": {"M00": float("inf")}}, "a weight is inf"),
    (2, {"alpha": 0.5, "difference": True}, "three models and an alpha, not 2 models$"),
    (3, {"weights": (1, 1, -1), "difference": True}, "not 3 models and weights"),
    (2, {"alpha": 0.5, "blocks": {"BASE": 0.5}}, "leave the other alpha out"),
    (2, {"alpha": 0.5, "take": {"vae": "C"}}, "source of the vae 'C'.*known: A, B, merge"),
    (2, {"alpha": 0.5, "take": {"safety_checker": "B"}}, "part of a model 'safety_checker'"),
    (2, {"alpha": 0.5, "take": {"unet": "A", "text_encoder": "B"}}, "taken whole from one model"),
)


@pytest.mark.parametrize("count,said,answer", WRONG)
def test_words_that_do_not_go_together(count, said, answer):
    with pytest.raises(UsageError, match=answer):
        mixture(count, **said)


def test_block_weights_that_are_none(folders):
    models = [open_folder(folder) for folder in folders[:2]]
    for text, answer in (
        ("0.1,0.2", "2 block weights; this U-Net takes 10: BASE, IN00 to IN03, M00, OUT00 to OUT03"),
        ("M00=1,M00=0", "'M00=0'; write each name once"),
        ("M00=1,0.5", "'0.5'; write each name once"),
        ("M00=half", "'half' is no number"),
    ):
        with pytest.raises(UsageError, match=answer):
            parse_blocks(text, models[0].unet.config)
    for name in ("M01", "unet.mid", "vae", "vae.encoder", "unet.mid_block."):
        with pytest.raises(UsageError, match=rf"'{name}' is no block .* begin with unet or text_encoder"):
            plan(models, mixture(2, alpha=0.1, blocks={name: 1.0}))


def test_command_refuses(run, folders):
    """In one sentence, with nothing written."""
    a, b, _ = folders
    two = ["merge", a, b, "-o", "x"]
    refused(run(*two), 2, "alpha or weights")
    refused(run(*two, "--weights", "half"), 2, "'half' is no number")
    refused(run(*two, "--alpha", "much"), 2, "much")
    refused(run(*two, "--alpha", "0.1", "--prediction-type", "epsilon"), 2, "--prediction-type", "folders")
    refused(run(*two, "--alpha", "0.1", "--dtype", "int3"), 2, "int3")
    refused(run("merge", a, b, "-o", a, "--alpha", "0.1"), 2, "over itself")
    refused(run("merge", a, b, "-o", "x.ckpt", "--alpha", "0.1"), 2, "only safetensors")
    refused(run("merge", a, b, "-o", "x.safetensors", "--alpha", "0.1"), 1, "save a folder instead")
    refused(run("merge", a, "gone", "-o", "x", "--alpha", "0.1"), 1, "no gone")
    assert files(Path()) == []
    Path("x.safetensors").write_text("mine")
    refused(run("merge", a, b, "-o", "x.safetensors", "--alpha", "0.1"), 2, "x.safetensors exists", "--overwrite")


def test_models_that_do_not_fit(run, base, folders):
    """Another family, prediction or noise schedule, and what they are, in one sentence."""
    marks = {name: torch.empty(0) for name in ("v_pred", "ztsnr")}
    write(Path("sd1.safetensors"), base)
    write(Path("v.safetensors"), base | {"v_pred": marks["v_pred"]})
    write(Path("zero.safetensors"), base | marks)
    sd1, v, zero = (open_single_file(f"{name}.safetensors") for name in ("sd1", "v", "zero"))
    small, mix = open_folder(folders[0]), mixture(2, alpha=0.5)
    for pair, said in (
        ((sd1, small), r"B \(a\) and A \(sd1\) are of no published family and of the family Stable Diffusion 1;"),
        ((sd1, v), r"predict v_prediction and epsilon; .* prediction type"),
        ((v, zero), r"have other noise schedules"),
    ):
        with pytest.raises(ModelError, match=said):
            plan(pair, mix)
    own = mixture(2, alpha=0.5, take={"unet": "A"})  # where no U-Net of another prediction comes in, it fits
    assert {address.partition(".")[0] for address in plan((sd1, v), own)} == {"text_encoder"}
    small.text_encoder.config = replace(small.text_encoder.config, hidden_act="gelu")
    with pytest.raises(ModelError, match=r"differ in text_encoder hidden_act gelu and quick_gelu"):
        plan([open_folder(folders[0]), small], mix)
    words = ["sd1.safetensors", "v.safetensors", "-o", "x", "--alpha", "0.5", "--prediction-type", "epsilon"]
    done = run("merge", *words, "--dry-run")
    assert done.code == 0, done.err  # what the files do not say, or say wrongly, can be said
    assert not Path("x").exists()


@pytest.mark.slow
def test_families_are_named(run, base):
    write(Path("sd1.safetensors"), base)
    write(Path("sdxl.safetensors"), single_state("sdxl", model_of(NARROW["sdxl"], 4)))
    words = ["merge", "sd1.safetensors", "sdxl.safetensors", "-o", "x", "--alpha", "0.5"]
    refused(run(*words), 1, "B (sdxl) and A (sd1) are of the family SDXL and of the family Stable Diffusion 1;")


def test_result_that_is_not_finite(run, folders, tmp_path):
    """Named, with its type, before anything is written."""
    for name, factor in (("a", 1), ("b", 1e7)):
        components = open_folder(folders[0])
        components.unet.conv_in.bias.data *= factor
        save_folder(components, tmp_path / name, torch.float32)
    words = ["merge", "a", "b", "-o", "net", "--alpha", "0.9"]
    refused(run(*words, "--dtype", "fp16"), 1, "unet.conv_in.bias", "not finite in torch.float16", "fp32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert run(*words).code == 0


def test_stopped(run, folders, monkeypatch):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ldm.merging.weighted_sum", stop)
    done = run("merge", *folders[:2], "-o", "x", "--alpha", "0.5")
    assert (done.code, done.out, done.err) == (130, "", "stopped: nothing was written\n")
    assert files(Path()) == []


# -- in Python --------------------------------------------------------------------------------------------------------


def test_in_python(folders):
    """`plan` says of every tensor what `merge` does to it; A's networks become the result."""
    models = [open_folder(folder) for folder in folders]
    blocks = parse_blocks("M00=0.25", models[0].unet.config)
    mix = mixture(3, alpha=0.5, difference=True, blocks=blocks)
    shares = plan(models, mix)
    assert shares["unet.conv_in.bias"] == Share("", (1.0, 0.5, -0.5))
    assert shares["unet.mid_block.resnets.0.conv1.bias"] == Share("M00", (1.0, 0.25, -0.25))
    addresses = {f"{n}.{k}" for n in ("unet", "text_encoder") for k in getattr(models[0], n).state_dict()}
    assert shares.keys() == addresses  # no number is in a buffer, where it would be left out
    bias = [model.unet.conv_in.bias.clone() for model in models]
    result = merge(models, mix)
    assert result.unet is models[0].unet and torch.equal(result.unet.conv_in.bias, bias[0] + 0.5 * (bias[1] - bias[2]))
    assert mixture(3, weights=(1, 2, 5), normalize=True).weights == (0.125, 0.25, 0.625)


MEASURED = """
import json, resource, sys
from ldm.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    print(json.dumps({"code": end.code, "peak": int(status["VmHWM"].split()[0]) * 1024}), file=sys.stderr)
"""


@pytest.mark.slow
def test_memory_is_that_of_the_models(tmp_path):
    """Two files of Stable Diffusion 1's true size: with both of them mapped, less than half a GB beside."""
    state = single_state("sd1", model_of(PUBLISHED, 4, "meta"))
    paths = [write_hollow(tmp_path / f"{name}.safetensors", state) for name in "ab"]
    size = sum(path.stat().st_size for path in paths)
    words = ["merge", *map(str, paths), "-o", str(tmp_path / "out.safetensors"), "--alpha", "0.5", "--json"]
    done = subprocess.run([sys.executable, "-c", MEASURED, *words], capture_output=True, text=True, timeout=600)
    told = json.loads(done.stderr.splitlines()[-1])
    assert told["code"] == 0, done.stderr
    assert size > 4e9 and told["peak"] < size + 5e8, f"{told['peak']:,} bytes for {size:,}"
