"""The data of a LoRA run: the same batches whatever is cached, left out, mirrored or shared among processes."""

import dataclasses
import json
import multiprocessing
import pickle
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import files
from PIL import Image, ImageOps
from test_data_check import PLANTED, sound
from test_pictures import patches
from torch import Tensor
from torch.utils.data import DataLoader

from ldm.checkpoints.components import Components
from ldm.checkpoints.folder import open_folder
from ldm.conditioning import encoder_of
from ldm.data.check import KINDS
from ldm.data.order import passes
from ldm.data.pictures import difference
from ldm.errors import LdmError, NumericalError, UsageError
from ldm.models.clip import CLIPTextConfig, CLIPTextModel
from ldm.models.unet import UNet
from ldm.pipeline import Pipeline
from ldm.training import lora_batches
from ldm.training.lora_batches import LoRABatch, LoRABatches
from ldm.training.lora_config import LoRAConfig
from ldm.training.lora_data import Material, draw_class, material, with_class

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = [(24, 24), (40, 20), (16, 16), (20, 24), (48, 16), (16, 40)]
Run = tuple[LoRAConfig, LoRABatches]


@pytest.fixture(scope="module")
def parts(model) -> Components:
    """The small model: 2 pixels a latent, and 16 x 16 pixels."""
    return open_folder(model, torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Six captioned pictures of several sizes."""
    return captioned(tmp_path_factory.mktemp("data") / "pictures")


def captioned(folder: Path, sizes: Iterable[tuple[int, int]] = SIZES, captions: bool = True) -> Path:
    folder.mkdir(parents=True)
    for seed, size in enumerate(sizes):
        patches(seed, size).save(folder / f"{seed}.png")
        if captions:
            (folder / f"{seed}.txt").write_text(f"an owl, number {seed}, on grass")
    return folder


def configured(data: Path, out: Path, **fields: Any) -> LoRAConfig:
    """A settled configuration."""
    given = {
        "resolution": 16, "bucket_step": 8, "min_side": 8, "train_batch_size": 2, "max_train_steps": 10, "seed": 3,
        "learning_rate": 1e-3, "max_timestep": 1000, "output_name": "x", "num_held_out": 0,
        "cache_dir": str(out / "cache"), "output_dir": str(out),
    }  # fmt: skip
    if "class_prompt" in fields:
        given["class_data_dir"] = str(out / "class")
    return LoRAConfig((str(data),), **given | fields)


def filled(config: LoRAConfig, parts: Components, found: Material | None = None) -> LoRABatches:
    batches = LoRABatches(config, parts, found or material(config, parts))
    told = list(batches.fill())
    assert told == [(i + 1, len(told)) for i in range(len(told))]
    return batches


def x0_of(batch: LoRABatch, parts: Components) -> Tensor:
    """What the trainer makes of a batch: pictures are encoded one at a time."""
    mean, std = batch.mean, batch.std
    if not len(std):
        with torch.no_grad():
            said = [parts.vae.posterior(picture[None]) for picture in mean]
        mean, std = torch.cat([mean for mean, _ in said]), torch.cat([(0.5 * logvar).exp() for _, logvar in said])
    return (mean + std * batch.sample) * parts.vae.config.scaling_factor


def states_of(batch: LoRABatch, parts: Components) -> Tensor:
    return batch.context if len(batch.context) else encoder_of(parts)(batch.captions).context


def same(one: LoRABatch, other: LoRABatch, *but: str) -> None:
    """Bit for bit, in all fields but these."""
    for name in LoRABatch._fields:
        a, b = getattr(one, name), getattr(other, name)
        assert name in but or (torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, Tensor) else a == b), name


# -- the stream -------------------------------------------------------------------------------------------------------


def test_shapes_types_and_ranges(data, parts, tmp_path):
    batches = filled(configured(data, tmp_path, min_timestep=100, max_timestep=110, train_batch_size=3), parts)
    seen = [batches[number] for number in range(40)]
    for batch in seen:
        n, (height, width) = 3, batch.mean.shape[2:]
        assert batch.mean.shape == batch.std.shape == batch.sample.shape == batch.noise.shape == (n, 4, height, width)
        assert batch.sizes.shape == (n, 6) and batch.sizes[:, 4:].tolist() == [[2 * height, 2 * width]] * n
        assert batch.context.shape == (n, 77, 32) and len(batch.captions) == n and batch.weight.tolist() == [1] * n
        assert all(getattr(batch, name).shape == (0,) for name in ("extra", "mask", "pooled"))
        assert {part.dtype for part in batch if isinstance(part, Tensor) and part is not batch.t} == {torch.float32}
        assert batch.t.dtype == torch.int64
    assert set(torch.cat([batch.t for batch in seen]).tolist()) == set(range(100, 110))
    assert len({tuple(batch.mean.shape[2:]) for batch in seen}) == len(batches.material.buckets.sizes) > 2
    rows = [row.flatten() for batch in seen for part in (batch.sample, batch.noise) for row in part]
    assert len({tuple(row[:4].tolist()) for row in rows}) == len(rows) == 240  # no dice are thrown twice
    noises = torch.cat(rows)
    assert noises.mean().abs() < 4 / len(noises) ** 0.5 and abs(noises.std() - 1) < 4 / (2 * len(noises)) ** 0.5


def test_any_number_of_processes_sees_the_same_samples(data, parts, tmp_path):
    """Four batches a step: of one process alone, of two, of four; each as another run computes it in another order."""
    config = configured(data, tmp_path, random_flip=True, caption_dropout_rate=0.3)
    batches, again = filled(config, parts), filled(config, parts)
    for step in (0, 1, 7):
        alone = passes(step, accumulation=4)
        two = [number for rank in range(2) for number in passes(step, rank, 2, 2)]
        four = [number for rank in range(4) for number in passes(step, rank, 4, 1)]
        assert sorted(two) == sorted(four) == list(alone)
        for number in two:
            same(batches[number], again[number])
    rows = [batch.captions for batch in (batches[n] for n in range(3))]
    other = filled(configured(data, tmp_path, seed=4), parts)
    assert rows != [other[n].captions for n in range(3)]
    assert not any(batches[n].noise.flatten()[0] == other[n].noise.flatten()[0] for n in range(3))


def test_workers_make_the_same_batches(data, parts, tmp_path):
    """None, two that are forked, and what a spawned one is sent: no network, no tensor."""
    config = configured(data, tmp_path, random_flip=True, caption_dropout_rate=0.3)
    batches = filled(config, parts)
    plain, forked = (
        list(DataLoader(batches, batch_size=None, sampler=range(8), num_workers=n, multiprocessing_context=context))
        for n, context in ((0, None), (2, multiprocessing.get_context("fork")))
    )
    sent = pickle.dumps(batches)
    assert len(sent) < 20_000 < sum(p.numel() for p in parts.vae.parameters()) * 4
    elsewhere = pickle.loads(sent)
    for number in range(8):
        assert isinstance(forked[number], LoRABatch)
        same(plain[number], batches[number])
        same(forked[number], batches[number])
        same(elsewhere[number], batches[number])
    assert len(batches.memo) == len(files(tmp_path / "cache")) - len([*(tmp_path / "cache").iterdir()])


@pytest.mark.slow  # 2 x 4 s to import torch; last run: passed
def test_spawned_workers_make_the_same_batches(data, parts, tmp_path):
    batches = filled(configured(data, tmp_path, random_flip=True), parts)
    spawn = multiprocessing.get_context("spawn")
    loader = DataLoader(batches, batch_size=None, sampler=range(6), num_workers=2, multiprocessing_context=spawn)
    for number, batch in enumerate(loader):
        same(batch, batches[number])


def test_no_option_changes_what_another_one_draws(data, parts, tmp_path):
    plain = filled(configured(data, tmp_path), parts)
    other = filled(
        configured(data, tmp_path, noise_offset=0.1, input_perturbation=0.1, random_flip=True, random_crop=True,
                   caption_dropout_rate=0.5, shuffle_caption=True, repeats=3), parts,
    )  # fmt: skip
    dropped, shifts = 0, []
    for number in range(12):
        one, two = plain[number], other[number]
        for name in ("sample", "t", "weight"):
            assert torch.equal(getattr(one, name), getattr(two, name)) or one.sample.shape != two.sample.shape
        if one.sample.shape == two.sample.shape:
            shift = (two.noise - one.noise) / 0.1
            assert torch.allclose(shift, shift[..., :1, :1].expand_as(shift), atol=1e-5)  # a channel as a whole
            shifts.append(shift[..., 0, 0].flatten())
        assert two.extra.shape == two.noise.shape and not torch.equal(two.extra, two.noise)
        dropped += two.captions.count("")
    assert 4 <= dropped <= 20  # of 24
    assert 0.7 < torch.cat(shifts).std() < 1.3


# -- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"random_flip": True, "caption_dropout_rate": 0.4, "caption_prefix": "sks,"}])
def test_a_hit_a_miss_and_no_cache_are_bit_equal(options, data, parts, tmp_path, monkeypatch):
    config = configured(data, tmp_path, **options)
    missed = filled(config, parts)
    kept = files(tmp_path / "cache")
    bare = filled(dataclasses.replace(config, no_cache=True, cache_dir=str(tmp_path / "none")), parts)
    monkeypatch.setattr(lora_batches, "posterior", lambda *_: pytest.fail("what is in the cache was encoded again"))
    monkeypatch.setattr(lora_batches, "encoder_of", lambda *_: pytest.fail("a text was encoded again"))
    hit = filled(config, parts)
    assert files(tmp_path / "cache") == kept and not (tmp_path / "none").exists()
    for number in range(12):
        one, two, three = missed[number], hit[number], bare[number]
        same(one, two)
        same(one, three, "mean", "std", "context")
        assert three.mean.shape[1] == 3 and len(three.std) == len(three.context) == 0 < len(one.context)
        assert torch.equal(x0_of(one, parts), x0_of(three, parts))
        assert torch.equal(one.context, states_of(three, parts))
    for one, two, three in zip(missed.held_out(), hit.held_out(), bare.held_out(), strict=True):
        same(one, two)
        same(one, three, "context")


def test_latents_and_states_are_those_of_the_networks(data, parts, tmp_path):
    """Against pictures that are resized and cut by hand, and encoders that are called by hand."""
    resized = {0: (16, 16), 1: (32, 16), 2: (16, 16), 3: (16, 19), 4: (48, 16), 5: (16, 40)}
    corners = {0: (0, 0), 1: (8, 0), 2: (0, 0), 3: (0, 2), 4: (16, 0), 5: (0, 12)}
    batches = filled(configured(data, tmp_path, train_batch_size=1, square=True), parts)
    seen = set()
    for number in range(6):
        batch = batches[number]
        name = int(batch.captions[0].split()[3].rstrip(","))
        left, top = corners[name]
        whole = Image.open(data / f"{name}.png").resize(resized[name], Image.Resampling.LANCZOS)
        x = np.array(whole.crop((left, top, left + 16, top + 16)), np.float32) / 255 * 2 - 1
        with torch.no_grad():
            mean, logvar = parts.vae.posterior(torch.from_numpy(x).permute(2, 0, 1)[None])
        states = encoder_of(parts)([f"an owl, number {name}, on grass"]).context
        assert torch.equal(batch.context, states)
        assert torch.allclose(batch.mean, mean, atol=1e-6) and torch.allclose(batch.std, (logvar / 2).exp(), atol=1e-6)
        seen.add(name)
    assert seen == set(range(6))


def test_other_networks_have_other_keys(data, parts, tmp_path):
    config = configured(data, tmp_path, train_batch_size=1)
    filled(config, parts)
    first = files(tmp_path / "cache")
    changed = dataclasses.replace(parts, vae=type(parts.vae)(parts.vae.config).eval())
    batches = filled(config, changed)
    assert len(files(tmp_path / "cache")) > len(first)
    assert torch.equal(
        x0_of(batches[0], changed), x0_of(filled(dataclasses.replace(config, no_cache=True), changed)[0], changed)
    )
    skipping = filled(dataclasses.replace(config, clip_skip=1), parts)
    expected = encoder_of(parts)(skipping[0].captions, 1).context
    assert torch.equal(skipping[0].context, expected) and not torch.equal(expected, states_of(batches[0], parts))


@pytest.mark.parametrize(
    "options", [{"shuffle_caption": True}, {"caption_tag_dropout_rate": 0.5}, {"train_text_encoder": True},
                {"placeholder_token": "<owl>"}],
)  # fmt: skip
def test_captions_that_cannot_be_kept_are_carried(options, data, parts, tmp_path):
    config = configured(data, tmp_path, **options)
    batches = filled(config, parts)
    said = {caption for number in range(12) for caption in batches[number].captions}
    assert len(batches[0].context) == len(batches[0].pooled) == 0 < len(batches[0].std)
    assert (len(said) > 6) == config.captions.by_tags and all("owl" in text or options for text in said)
    assert ("captions are encoded anew" in " ".join(batches.material.summary)) == config.captions.by_tags
    assert all(row.captions[0] == row.captions[0].strip() and "an owl, number" in row.captions[0]
               for row in batches.held_out())  # fmt: skip


def test_a_cache_that_is_lost_is_said(data, parts, tmp_path):
    config = configured(data, tmp_path)
    batches, empty = filled(config, parts), LoRABatches(config, parts, material(config, parts))
    for file in (tmp_path / "cache").rglob("*.safetensors"):
        file.unlink()
    assert batches[0].t.shape == (2,)  # in memory
    with pytest.raises(LdmError, match=r"lacks what was encoded for this run.*start the run again"):
        empty[0]
    with pytest.raises(LdmError, match="fill the cache first"):
        empty.held_out()


def test_memory_is_bounded(data, parts, tmp_path, monkeypatch):
    config = configured(data, tmp_path)
    batches = filled(config, parts)
    monkeypatch.setattr(lora_batches, "MEMO", 20_000)
    tight = filled(config, parts)
    held = sum(tensor.nbytes for made in tight.memo.values() for tensor in made.values())
    assert 10_000 < held <= 20_000 and len(tight.memo) < len(batches.memo)
    for number in range(6):
        same(tight[number], batches[number])


def test_latents_that_are_not_finite(data, parts, tmp_path):
    broken = type(parts.vae)(parts.vae.config).eval()
    torch.nn.init.constant_(broken.quant_conv.bias, float("nan"))
    with pytest.raises(NumericalError, match=r"latents of 0\.png are not finite in float32"):
        filled(configured(data, tmp_path), dataclasses.replace(parts, vae=broken))


# -- pictures ---------------------------------------------------------------------------------------------------------


def test_mirrors(data, parts, tmp_path):
    """Half of them, each as the picture mirrored in its file."""
    config = configured(data, tmp_path / "run", random_flip=True, train_batch_size=1)
    turned = captioned(tmp_path / "turned")
    for path in turned.glob("*.png"):
        ImageOps.mirror(Image.open(path)).save(path)
    flips = 0
    flipping, plain = filled(config, parts), filled(dataclasses.replace(config, random_flip=False), parts)
    mirrored = filled(configured(turned, tmp_path / "run", train_batch_size=1), parts)
    for number in range(60):
        one, straight, mirror = flipping[number], plain[number], mirrored[number]
        flips += (is_flipped := not torch.equal(one.mean, straight.mean))
        same(one, mirror if is_flipped else straight, *(("mean", "std") if is_flipped else ()))
        if is_flipped:  # resizing may round a level of 255 in another way
            assert torch.allclose(one.mean, mirror.mean, atol=0.02) and not torch.allclose(
                one.mean, straight.mean, atol=0.02
            )
    assert 18 <= flips <= 42


def test_random_cuts_are_not_kept(data, parts, tmp_path):
    config = configured(data, tmp_path, random_crop=True, square=True, train_batch_size=1)
    batches = filled(config, parts)
    whole = filled(dataclasses.replace(config, no_cache=True), parts)
    places = set()
    for number in range(30):
        batch = batches[number]
        assert batch.mean.shape == (1, 3, 16, 16) and len(batch.std) == 0 < len(batch.context)  # texts still are
        same(batch, whole[number], "context")
        places.add((batch.captions[0], *batch.sizes[0, 2:4].tolist()))
    assert len(places) > 12
    assert "their cuts are random" in " ".join(batches.material.summary)
    assert all(len(batch.std) for batch in batches.held_out())


def test_masks_count_by_area(parts, tmp_path):
    data = captioned(tmp_path / "data", [(16, 16), (24, 24)])
    mask = np.zeros((16, 16), dtype=np.uint8)
    mask[:, :7] = 255
    mask[3, 9] = 51
    Image.fromarray(mask).save(data / "0.mask.png")
    batches = filled(configured(data, tmp_path / "run", train_batch_size=1, random_flip=True), parts)
    expected = torch.zeros(1, 1, 8, 8)
    expected[..., :3], expected[..., 3], expected[..., 1, 4] = 1, 0.5, 0.2 / 4
    seen = {
        name: [b.mask for b in map(batches.__getitem__, range(12)) if name in b.captions[0]] for name in ("0,", "1,")
    }
    for found in seen["0,"]:
        assert torch.allclose(found, expected) or torch.allclose(found, expected.flip(-1))
    assert len({str(found) for found in seen["0,"]}) == 2
    assert all(torch.equal(found, torch.ones(1, 1, 8, 8)) for found in seen["1,"]) and seen["1,"]
    assert all(len(batch.mask) for batch in batches.held_out())


def test_alpha_may_be_the_mask(parts, tmp_path):
    data = captioned(tmp_path / "data", [(16, 16)])
    image = patches(0, (16, 16)).convert("RGBA")
    image.putalpha(Image.fromarray(np.repeat([[255] * 8 + [0] * 8], 16, 0).astype(np.uint8)))
    image.save(data / "0.png")
    plain = filled(configured(data, tmp_path / "run", train_batch_size=1), parts)
    masked = filled(configured(data, tmp_path / "run", train_batch_size=1, alpha_mask=True), parts)
    same(plain[0], masked[0], "mask")
    assert plain[0].mask.shape == (0,) and masked[0].mask[0, 0].tolist() == [[1] * 4 + [0] * 4] * 8
    assert difference(plain.material.manifest, masked.material.manifest) == "1 with another mask (0.png)"


def test_sdxl_is_told_sizes_and_the_pooled_text(parts, data, tmp_path):
    """Original height and width, top and left of the cut, height and width of the bucket (Podell et al., sec. 2.2)."""
    second = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=77, projection_dim=24,
        )
    ).eval()  # fmt: skip
    shape = dataclasses.replace(
        parts.unet.config, cross_attention_dim=64, addition_time_embed_dim=8, projection_class_embeddings_input_dim=72
    )
    xl = dataclasses.replace(parts, unet=UNet(shape), text_encoder_2=second, tokenizer_2=parts.tokenizer)
    batches = filled(configured(data, tmp_path, train_batch_size=1, square=True), xl)
    told = {}
    for number in range(6):
        batch = batches[number]
        said = encoder_of(xl)(batch.captions)
        assert torch.equal(batch.context, said.context) and batch.context.shape == (1, 77, 64)
        assert torch.equal(batch.pooled, said.pooled) and batch.pooled.shape == (1, 24)
        told[batch.captions[0].split()[3]] = batch.sizes[0].tolist()
    assert told == {
        "0,": [24, 24, 0, 0, 16, 16], "1,": [20, 40, 0, 8, 16, 16], "2,": [16, 16, 0, 0, 16, 16],
        "3,": [24, 20, 2, 0, 16, 16], "4,": [16, 48, 0, 16, 16, 16], "5,": [40, 16, 12, 0, 16, 16],
    }  # fmt: skip


def test_skip_trains_as_the_cleaned_folder(parts, tmp_path, monkeypatch):
    """Every planted defect at once: what is left out leaves no trace in 20 batches."""
    monkeypatch.setattr("ldm.inputs.LARGEST", 100_000)
    planted, cleaned = (sound(tmp_path / name) for name in ("planted", "cleaned"))
    for plant, *_ in PLANTED:
        plant(planted)
        plant(cleaned)
    defects = {path for _, path, kind, _ in PLANTED if KINDS[kind][0] == "defect"}
    for path in defects:
        for file in [
            cleaned / path,
            *cleaned.glob(f"{Path(path).stem}.txt"),
            *cleaned.glob(f"{Path(path).stem}.mask*"),
        ]:
            file.unlink()
    options = {"resolution": 64, "bucket_step": 16, "min_side": 64, "random_flip": True, "num_held_out": 2}
    config = configured(planted, tmp_path / "run", policy="skip", **options)
    with pytest.raises(LdmError, match=f"{len(defects)} defects in the data: .*--policy skip"):
        material(dataclasses.replace(config, policy="error"), parts)
    skipping = filled(config, parts)
    clean = filled(configured(cleaned, tmp_path / "run", **options), parts)
    for number in range(20):
        same(skipping[number], clean[number])
    assert skipping.material.manifest == clean.material.manifest
    assert skipping.material.buckets == clean.material.buckets
    assert [p.key for p in skipping.material.held_out] == [p.key for p in clean.material.held_out]
    for one, two in zip(skipping.held_out(), clean.held_out(), strict=True):
        same(one, two)
    told = [line for line in skipping.material.summary if line.startswith("left out: ")]
    assert len(told) == 10 and f"and {len(defects) - 10} more of this kind" in " ".join(skipping.material.summary)


# -- captions, held-out pictures, the summary -------------------------------------------------------------------------


def test_summary_of_a_sound_folder(data, parts, tmp_path):
    first, *more = material(configured(data, tmp_path), parts).summary
    assert (
        first == "6 images, 6 captions (.txt), 4 buckets: 16x16 (3), 16x8 (1), 24x8 (1), 8x16 (1)"
        or first.startswith("6 images, 6 captions (.txt), ")
    )
    assert more == ["no picture is held out: the held-out loss is of pictures that are trained on, at fixed noise"]


def test_instance_prompt_is_for_those_without_a_caption(parts, tmp_path):
    data = captioned(tmp_path / "data")
    for name in "14":
        (data / f"{name}.txt").unlink()
    prompt = "a photo of sks owl"
    found = material(configured(data, tmp_path / "run", instance_prompt=prompt), parts)
    assert [picture.caption == prompt for picture in found.pictures] == [False, True, False, False, True, False]
    assert "2 pictures without a caption: said to show 'a photo of sks owl'" in found.summary
    bare = captioned(tmp_path / "bare", captions=False)
    batches = filled(configured(bare, tmp_path / "run", instance_prompt=prompt, caption_suffix="here"), parts)
    assert {text for number in range(4) for text in batches[number].captions} == {f"{prompt} here"}


def test_one_picture_is_enough(parts, tmp_path):
    data = captioned(tmp_path / "data", [(16, 16)])
    batches = filled(configured(data, tmp_path / "run", train_batch_size=3, num_held_out=5), parts)
    assert batches.material.held_out == () and "there is one picture" in " ".join(batches.material.summary)
    assert batches[0].mean.shape == (3, 4, 8, 8) and len(batches[0].noise[:, 0, 0, 0].unique()) == 3
    assert "5 were to be held out, and one at least must be left to train on" in batches.material.summary


def test_words_beyond_the_window_are_said(parts, tmp_path):
    data = captioned(tmp_path / "data")
    (data / "3.txt").write_text("owl " * 60 + "and a hedgehog")
    told = " ".join(material(configured(data, tmp_path / "run"), parts).summary)
    assert "the caption of 3.png is longer than the text encoder's 75 tokens; not read: " in told
    assert "a hedgehog'" in told and "0.png" not in told


def test_held_out_pictures_are_never_trained_on(parts, tmp_path):
    data = captioned(tmp_path / "data", [(16, 16)] * 12)
    config = configured(data, tmp_path / "run", num_held_out=3)
    batches, other = filled(config, parts), filled(dataclasses.replace(config, repeats=7, random_flip=True), parts)
    held = {picture.caption for picture in batches.material.held_out}
    assert held == {picture.caption for picture in other.material.held_out} and len(held) == 3
    assert held != {p.caption for p in material(dataclasses.replace(config, seed=8), parts).held_out}
    seen = {caption for number in range(40) for caption in batches[number].captions}
    assert len(seen) == 9 and not seen & held
    fixed = batches.held_out()
    assert {caption for batch in fixed for caption in batch.captions} == held
    levels = torch.cat([batch.t for batch in fixed]).tolist()
    assert sorted(levels) == [level for level in (125, 375, 625, 875) for _ in range(3)]
    noises = torch.cat([batch.noise for batch in fixed])
    assert len({tuple(row.flatten()[:4].tolist()) for row in noises}) == 12  # no two alike
    for one, two, three in zip(fixed, batches.held_out(), other.held_out(), strict=True):
        same(one, two)
        same(one, three)


def test_held_out_noise_is_that_of_no_option(data, parts, tmp_path):
    config = configured(data, tmp_path)
    plain = filled(config, parts).held_out()
    options = {"seed": 9, "noise_offset": 0.3, "random_flip": True, "caption_dropout_rate": 0.9, "random_crop": True}
    other = filled(dataclasses.replace(config, input_perturbation=0.2, **options), parts).held_out()
    assert sum(len(batch.t) for batch in plain) == 4 * 6  # pictures that are trained on stand in
    for one, two in zip(plain, other, strict=True):
        same(one, two, "extra")
        assert torch.equal(two.extra, torch.zeros_like(two.noise))


@pytest.mark.parametrize(("total", "given", "held"), [(19, None, 0), (20, None, 2), (20, 5, 5), (20, 99, 19)])
def test_how_many_are_held_out(total, given, held, parts, tmp_path):
    data = captioned(tmp_path / "data", [(8, 8)] * total)
    found = material(configured(data, tmp_path / "run", num_held_out=given), parts)
    assert (len(found.held_out), len(found.pictures)) == (held, total - held)
    assert len(found.manifest) == total


# -- class pictures ---------------------------------------------------------------------------------------------------


@pytest.fixture
def prior(data, tmp_path) -> LoRAConfig:
    """Three class pictures are asked for."""
    options = {"class_prompt": "a (photo of) an owl", "num_class_images": 3, "prior_loss_weight": 0.4, "clip_skip": 1}
    return configured(data, tmp_path, **options, caption_prefix="sks,", caption_dropout_rate=0.5, random_flip=True)


def test_class_pictures_are_drawn_and_go_on_being_drawn(prior, parts, tmp_path):
    found, pipeline = material(prior, parts), Pipeline(parts)
    assert found.missing == 3 and "class pictures: none in" in found.summary[-1]
    with pytest.raises(UsageError, match="3 class pictures are missing"):
        LoRABatches(prior, parts, found)
    assert list(islice(draw_class(prior, pipeline, found), 2)) == [(1, 3), (2, 3)]  # and it is killed
    assert files(tmp_path / "class") == [f"class-0000{n}.{kind}" for n in (1, 2) for kind in ("png", "txt")]
    (tmp_path / "class" / "class-00001.png").unlink()
    assert list(draw_class(prior, pipeline, found)) == [(1, 2), (2, 2)]
    assert list(draw_class(prior, pipeline, found)) == []  # a second process finds them
    done = with_class(prior, found)
    assert done.missing == 0 and done == with_class(prior, done) == material(prior, parts)
    assert done.summary[-1] == "class pictures: 3 images, 3 captions (.txt); 1 bucket: 16x16 (3)"
    assert [key for key in done.manifest if "class" in key] == [f"class//class-0000{n}.png" for n in (1, 2, 3)]
    assert difference(found.manifest, done.manifest).startswith("3 new (class//class-00001.png, ")
    for number in (1, 2, 3):
        order = {"seed": prior.seed + number, "height": 16, "width": 16, "literal": True, "clip_skip": 2}
        expected = pipeline(prior.class_prompt, **order).images[0]
        assert np.array_equal(
            np.asarray(expected), np.asarray(Image.open(tmp_path / "class" / f"class-0000{number}.png"))
        )
        assert (tmp_path / "class" / f"class-0000{number}.txt").read_text() == prior.class_prompt + "\n"


def test_class_pictures_take_turns(prior, parts, tmp_path):
    captioned(tmp_path / "class", [(16, 16), (40, 20), (16, 16), (16, 16)], captions=False)
    (tmp_path / "class" / "2.txt").write_text("an owlet")
    found = material(prior, parts)
    assert found.missing == 0 and len(found.class_pictures) == 4  # what is there is used
    batches, without = (
        filled(prior, parts, found),
        filled(dataclasses.replace(prior, class_prompt="", class_data_dir=None), parts),
    )
    said = set[str]()
    for number in range(24):
        batch = batches[number]
        assert batch.weight.tolist() == pytest.approx([0.4 if number % 2 else 1.0] * 2)
        if number % 2:
            said |= set(batch.captions)
        else:
            assert all(caption == "" or caption.startswith("sks,") for caption in batch.captions)
            assert set(batch.captions) <= {"", *(f"sks, {p.caption}" for p in without.material.pictures)}
    assert said == {prior.class_prompt, "an owlet"}  # as they stand, and never dropped
    same(batches[0], without[0])
    assert all("owl" in text for batch in batches.held_out() for text in batch.captions)


def test_flagged_class_pictures_are_left_out(prior, parts, tmp_path, monkeypatch):
    verdicts = iter([True, False, True, False, False])
    monkeypatch.setattr("ldm.pipeline.flagged", lambda checker, images: (next(verdicts),))
    checked = dataclasses.replace(parts, safety_checker=torch.nn.Identity())
    assert len(list(draw_class(prior, Pipeline(checked), material(prior, parts)))) == 3
    assert [name for name in files(tmp_path / "class") if "png" in name] == [f"class-0000{n}.png" for n in (2, 4, 5)]
    monkeypatch.setattr("ldm.pipeline.flagged", lambda checker, images: (True,))
    monkeypatch.setattr("ldm.training.lora_data.MOST_DARK", 2)
    more = dataclasses.replace(prior, num_class_images=4)
    with pytest.raises(LdmError, match=r"checker flagged 3 pictures of 'a .photo of. an owl'; put pictures"):
        list(draw_class(more, Pipeline(checked), material(more, parts)))


# -- what is refused --------------------------------------------------------------------------------------------------

REFUSED = [
    ({"clip_skip": 9}, UsageError, "clip_skip is 9; the text encoder of this model takes 0 to 1"),
    ({"min_timestep": 500, "max_timestep": 500}, UsageError, "levels from 500 up to 500 are to be trained"),
    ({"max_timestep": 1001}, UsageError, "and that at most 1000"),
    ({"bucket_step": 7}, UsageError, "bucket_step is 7; it must be a multiple of 2"),
    ({"class_prompt": "an owl", "class_data_dir": "x", "num_class_images": 0}, UsageError, "none are to be drawn"),
    ({"min_side": 30}, LdmError, "defects in the data: .*a side must have 30 at least"),
    ({"min_side": 40, "policy": "skip"}, LdmError, "none of 6 pictures is without a defect"),
    ({"caption_column": "text", "image_column": "x", "data": "nowhere"}, UsageError, "nowhere is not there"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "kind", "said"), REFUSED, ids=[said[:30] for *_, said in REFUSED])
def test_refused(options, kind, said, data, parts, tmp_path):
    config = dataclasses.replace(configured(data, tmp_path), **options)
    with pytest.raises(kind, match=said) as caught:
        material(config, parts)
    assert "\n" not in str(caught.value) and files(tmp_path) == []


def test_folders_that_cannot_be_trained_on(parts, tmp_path):
    def refused(name: str, said: str, kind: type[LdmError] = UsageError, **options: Any) -> None:
        with pytest.raises(kind, match=said):
            material(configured(tmp_path / name, tmp_path / "run", **options), parts)

    (tmp_path / "empty").mkdir()
    refused("empty", "there are no pictures in .*empty; it takes .*png")
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "0.txt").write_text("an owl")
    refused("words", r"there are no pictures in .*words; 0\.txt: no picture has the name of this \.txt file")
    captioned(tmp_path / "bare", captions=False)
    refused("bare", "6 pictures and no caption; put what each shows into a .txt file .* --instance-prompt")
    captioned(tmp_path / "some")
    (tmp_path / "some" / "3.txt").unlink()
    refused("some", r"1 defect in the data: 3\.png: it has no caption", LdmError)
    captioned(tmp_path / "inside")
    for name in ("output_dir", "class_data_dir"):
        refused("inside", f"{name} is .*within the pictures' folder", **{name: str(tmp_path / "inside" / "run")})
    captioned(tmp_path / "thin", [(4, 64)])
    refused("thin", r"1 defect in the data: 0\.png: it has 4 x 64 pixels, and a side must have 8", LdmError, min_side=1)


def test_class_folder_that_cannot_be_written(data, parts, tmp_path):
    (tmp_path / "file").write_text("")
    config = configured(data, tmp_path, class_prompt="an owl", class_data_dir=str(tmp_path / "file" / "class"))
    with pytest.raises(LdmError, match=r"cannot write to .*; give another --class-data-dir"):
        list(draw_class(config, Pipeline(parts), material(config, parts)))


def test_a_changed_data_set_has_another_manifest(parts, tmp_path):
    data = captioned(tmp_path / "data")
    config = configured(data, tmp_path / "run", num_held_out=2)
    before = json.loads(json.dumps(material(config, parts).manifest))
    assert difference(before, material(config, parts).manifest) == ""
    patches(99, (16, 16)).save(data / "2.png")
    (data / "4.txt").write_text("a pizza")
    assert difference(before, material(config, parts).manifest) == (
        "1 with another content (2.png), 1 with another caption (4.png)"
    )
