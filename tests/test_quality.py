"""The statistics of a model's pictures: the classifier that gives the features, copies found, and the report."""

import dataclasses
import json
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import typer
from helpers import files, small_model
from PIL import Image
from typer.testing import CliRunner

from ldm.checkpoints.safe import check_manifest, read_json
from ldm.cli.evaluate import quality
from ldm.data.emoji import CorpusConfig, EmojiScenes
from ldm.data.glyphs import COLOURED_SHAPES, COLOURS
from ldm.data.words import SceneSpec
from ldm.errors import LdmError, ModelError, UsageError
from ldm.evaluation.distances import fid
from ldm.evaluation.drawing import Drawing
from ldm.evaluation.features import features, fitted, open_classifier, read_pictures
from ldm.evaluation.memorisation import Nearest, embedding, memory, nearest, renderings, to_own
from ldm.evaluation.prompts import prompts
from ldm.evaluation.quality import Report, evaluate, judge_pictures
from ldm.evaluation.reconstruction import first_stage_kept, first_stage_psnr, held_out_scenes, psnr, ssim
from ldm.models.classifier import SceneClassifier, SceneClassifierConfig
from ldm.pipeline import Pipeline
from ldm.sources import model_in_the_box
from ldm.training.classifier import ClassifierConfig, LabelledBatches, classifier, labels, loss_of, right
from ldm.training.config import LoopConfig, checked, read_config
from ldm.training.first_stage import save_model
from ldm.training.loop import run_stage

pytestmark = pytest.mark.usefixtures("one_thread")
CORPUS = CorpusConfig(objects=28)
N, TRAINING = 24, 120  # pictures, training scenes
SMALL = {"block_out_channels": (8, 16), "features": 24, "norm_num_groups": 4}


@pytest.fixture(scope="module")
def scenes(noto_font):
    return EmojiScenes(CORPUS)


def shape(scenes, **options):
    names = (*scenes.names, *COLOURED_SHAPES)
    return SceneClassifierConfig(names, tuple(COLOURS), image_size=scenes.config.size, **options)


@pytest.fixture(scope="module")
def network(scenes):
    """Random weights: features that tell pictures apart, and mean nothing."""
    torch.manual_seed(0)
    return SceneClassifier(shape(scenes, **SMALL)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def specs(scenes):
    return prompts(scenes, N)


# -- the classifier ---------------------------------------------------------------------------------------------------


def test_the_default_fits_its_share_of_the_box():
    """At most 300,000 parameters with the labels of the whole corpus: 0.6 MB in float16."""
    config = shape(EmojiScenes())
    assert len(config.objects) == 220
    assert sum(p.numel() for p in SceneClassifier(config).parameters()) <= 300_000


def test_features_are_of_one_picture_and_one_scale(network, scenes, specs):
    """The same alone or among others; mean 0, variance 1 over the numbers of each; other pictures have others."""
    drawn = renderings(scenes, specs[:6], "test")
    found = features(network, drawn, batch_size=4)
    assert found.shape == (6, 24) and found.dtype == np.float32
    np.testing.assert_allclose(found[4:5], features(network, drawn[4:5]), atol=1e-5)
    np.testing.assert_allclose((found.mean(1), found.var(1)), (np.zeros(6), np.ones(6)), atol=5e-3)
    assert np.linalg.norm(found[:, None] - found[None], axis=2)[~np.eye(6, dtype=bool)].min() > 1e-3
    signal = torch.from_numpy(drawn).permute(0, 3, 1, 2) / 127.5 - 1
    said = network(signal)
    assert [tuple(logits.shape) for logits in said] == [(6, len(scenes.names) + 60), (6, 10), (6, 4)]
    expected = network.background.weight @ torch.from_numpy(found.T) + network.background.bias[:, None]
    torch.testing.assert_close(said.background, expected.T, atol=1e-5, rtol=1e-4)


def test_pictures_of_another_size_or_kind_are_refused(network):
    for bad in (
        np.zeros((2, 32, 32, 3), np.uint8),
        np.zeros((2, 64, 64, 3), np.float32),
        np.zeros((64, 64, 3), np.uint8),
    ):
        with pytest.raises(UsageError, match=r"takes uint8 \[n, 64, 64, 3\]"):
            features(network, bad)


def test_a_classifier_is_read_as_it_was_written(network, scenes, specs, tmp_path):
    """From its folder or from the model's that holds it; what is none is refused."""
    save_model(network, network.config.to_dict(), tmp_path / "classifier", "model.safetensors")
    drawn = renderings(scenes, specs[:3], "test")
    for place in (tmp_path, tmp_path / "classifier"):
        again = open_classifier(place)
        assert again.config == network.config
        np.testing.assert_array_equal(features(again, drawn), features(network, drawn))
    with pytest.raises(LdmError, match="ldm train classifier"):
        open_classifier(tmp_path / "nothing")
    good = network.config.to_dict()
    for wrong in ({"objects": []}, {"backgrounds": [1]}, {"features": "many"}, {"norm_num_groups": 5}):
        with pytest.raises(ModelError, match="classifier config"):
            SceneClassifierConfig.from_dict(good | wrong)


def test_labels_are_what_the_scenes_show(scenes):
    config = shape(scenes)
    drawn = [scenes.scene(i) for i in range(60)]
    there, ground, count = labels(drawn, config)
    for scene, row, colour, number in zip(drawn, there, ground, count, strict=True):
        assert {name for name, seen in zip(config.objects, row, strict=True) if seen} == {*scene.spec.objects}
        assert config.backgrounds[colour] == scene.spec.background and number + 1 == len(scene.boxes)
    images, *truth = LabelledBatches(scenes, config, 20)[2]
    assert torch.equal(images[7].permute(1, 2, 0), torch.from_numpy(scenes.scene(47).image.copy()))
    assert all(torch.equal(a[40:], b) for a, b in zip((there, ground, count), truth, strict=True))


def test_what_is_right_and_what_it_costs():
    """An object is right among the k likeliest; the least loss is the entropy of the k objects, log k each."""
    there = torch.tensor([[True, False, True], [False, True, False], [True, True, False]])
    ground, count = torch.tensor([0, 1, 1]), torch.tensor([1, 0, 1])
    logits = torch.tensor([[9.0, -9.0, 9.0], [-20.0, 20.0, -20.0], [2.0, -1.0, 1.0]])
    said = SimpleNamespace(objects=logits, background=40 * F.one_hot(ground), number=-40.0 * F.one_hot(count))
    said.background = said.background.float()
    found = {name: float(share) for name, share in right(said, there, ground, count).items()}
    assert found == {"objects": pytest.approx(2 / 3), "background": 1, "count": 0}
    perfect = SimpleNamespace(objects=30.0 * there, background=said.background, number=40.0 * F.one_hot(count))
    expected = 2 * np.log(2) / 3
    assert float(loss_of(perfect, there, ground, count)) == pytest.approx(expected, abs=1e-5)


def run_of(out, corpus=CORPUS, steps=3, **options):
    loop = LoopConfig(
        str(out), steps=steps, batch_size=options.pop("batch_size", 4), optimizer="muon", learning_rate=0.015,
        warmup_steps=min(steps, 20), ema_decay=0.95, workers=0, threads=1, device="cpu", save_every=steps,
        sample_every=steps, weight_decay=0.05,
    )  # fmt: skip
    config = ClassifierConfig(loop, corpus, **options)
    return classifier(config), config


@pytest.fixture
def few_scenes(monkeypatch):
    monkeypatch.setattr("ldm.training.classifier.HELD_OUT_SCENES", 64)
    monkeypatch.setattr("ldm.training.record.plot", lambda *_: None)
    yield
    torch.set_flush_denormal(False)  # training sets it


def test_a_run_leaves_the_classifier_in_the_models_folder(few_scenes, noto_font, tmp_path):
    """In half precision, listed in the manifest; the model opens as before, and what saves it again keeps it."""
    model = small_model(tmp_path / "model")
    corpus = dataclasses.replace(CORPUS, size=32)
    stage, config = run_of(tmp_path / "run", corpus, **SMALL, weights=str(model))
    *_, last = run_stage(stage, config)
    assert {"held_out_objects", "held_out_background", "held_out_count", "held_out_loss"} <= {*last.figures}
    result, joined = tmp_path / "run" / "result", model / "classifier"
    assert files(result) == files(joined) == ["config.json", "model.safetensors"]
    assert (result / "model.safetensors").read_bytes() == (joined / "model.safetensors").read_bytes()
    weights = sum(p.numel() for p in stage.model.parameters())
    assert (joined / "model.safetensors").stat().st_size < 2 * weights + 5000
    found = open_classifier(model).config
    assert found.image_size == 32 and found.objects[-60:] == COLOURED_SHAPES and found.most == 4
    assert check_manifest(model) == {} and "classifier" not in read_json(model / "model_index.json")
    pipeline = Pipeline.from_pretrained(model)
    pipeline.save_pretrained(tmp_path / "again")
    pipeline.save_pretrained(model)
    assert files(joined) == ["config.json", "model.safetensors"] and check_manifest(model) == {}
    assert not (tmp_path / "again" / "classifier").exists()
    with Image.open(tmp_path / "run" / "samples" / "0000003.png") as image:
        assert image.size == (8 * 32, 8 * 32)


@pytest.mark.slow  # it imports diffusers; last run 2026-11-22, passed
def test_diffusers_passes_over_the_classifier(network, tmp_path):
    from diffusers import StableDiffusionPipeline

    model = small_model(tmp_path / "model")
    save_model(network, network.config.to_dict(), model / "classifier", "model.safetensors")
    theirs = StableDiffusionPipeline.from_pretrained(model, local_files_only=True)
    assert "classifier" not in theirs.components and theirs.unet is not None


def test_the_shipped_recipe_is_read():
    config = read_config("configs/cpu/classifier.yaml", ClassifierConfig)
    known = checked(read_json(model_in_the_box() / "vocabulary.json")["corpus"], CorpusConfig, "the corpus")
    assert config.corpus == known and config.features == 128


# -- pictures ---------------------------------------------------------------------------------------------------------


def test_pictures_are_brought_to_one_size():
    """Those of the size stay to the byte; fine patterns become gray and not something else; odd ones are refused."""
    exact = RNG.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    assert fitted(exact, 16) is exact
    np.testing.assert_array_equal(fitted([Image.fromarray(each) for each in exact], 16), exact)
    checks = np.repeat(255 * (np.indices((64, 64)).sum(0) % 2).astype(np.uint8)[None, ..., None], 3, 3)
    assert np.abs(fitted(checks, 16).astype(int)[:, 2:-2, 2:-2] - 127).max() <= 2
    with pytest.raises(UsageError, match="20 x 10"):
        fitted([Image.new("RGB", (20, 10))], 16)


RNG = np.random.default_rng(0)


def test_pictures_are_read_from_a_folder(tmp_path):
    for i, name in enumerate(("b.png", "a.jpg", "c.webp")):
        Image.new("RGB", (8, 8), (80 * i, 0, 0)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    assert list(read_pictures(tmp_path)) == ["a.jpg", "b.png", "c.webp"]
    assert list(read_pictures(tmp_path, 2)) == ["a.jpg", "b.png"]
    (tmp_path / "d.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(LdmError, match=r"d\.png cannot be compared"):
        read_pictures(tmp_path)
    with pytest.raises(UsageError, match="holds no pictures"):
        read_pictures(tmp_path / "none")


# -- copies -----------------------------------------------------------------------------------------------------------


def noisy(pictures, sigma=6.0):
    """As a first stage of some 32 dB leaves them."""
    return (pictures + RNG.normal(0, sigma, pictures.shape)).round().clip(0, 255).astype(np.uint8)


def test_the_nearest_training_scenes_are_found(network, scenes, specs, monkeypatch):
    """By comparing with all, in both spaces and over the borders of chunks; a training scene finds itself."""
    embed = embedding(network)
    monkeypatch.setattr("ldm.evaluation.memorisation.CHUNK", 30)
    training = np.stack([scenes.scene(i).image for i in range(100)])
    own, queries = embed(training), embed(renderings(scenes, specs[:10], "test"))
    found = nearest({"drawn": queries, "copies": embed(training[[3, 95]])}, scenes, 100, embed)
    for space, rows in queries.items():
        apart = np.linalg.norm(rows[:, None].astype(np.float64) - own[space][None], axis=2)
        np.testing.assert_array_equal(found["drawn"][space].scene, apart.argmin(1))
        np.testing.assert_allclose(found["drawn"][space].distance, apart.min(1), atol=1e-5)
        assert found["copies"][space].scene.tolist() == [3, 95]
        np.testing.assert_allclose(found["copies"][space].distance, 0, atol=1e-5)
    small = training.reshape(100, 32, 2, 32, 2, 3).mean((2, 4)) / 255
    rms = np.sqrt(((small[0] - small[1]) ** 2).mean())
    assert np.linalg.norm(own["pixels"][0] - own["pixels"][1]) == pytest.approx(rms, rel=1e-4)


def test_a_rendering_is_near_to_others_of_its_prompt(network, scenes, specs):
    """An object that has few places stands, of sixteen other renderings, in one of them where it stands here."""
    still = [SceneSpec((name,), "pink", size="large") for name in scenes.names[:8]]  # four places
    embed = embedding(network)
    found = to_own({"a": embed(renderings(scenes, still, "a"))}, scenes, still, embed)["a"]
    assert (found["pixels"] == 0).mean() >= 0.75


def test_memory_of_known_distances():
    """Null: 1 .. 100, so that what is nearer than 1.99 is as near as the nearest 1 %."""
    at = np.zeros(100, np.int64)
    null = Nearest(at, np.arange(1, 101, dtype=np.float32))
    drawn = Nearest(at[:4], np.array([0.5, 1.0, 30.0, 80.0], np.float32))
    own = np.array([9.0, 0.1, 40.0, 2.0], np.float32)
    found = memory(drawn, null, own)
    assert (found.copies, found.nearer) == (0.25, 0.5) and found.ratio == pytest.approx(15.5 / 50.5)
    assert memory(drawn, null, None)[:2] == (0.5, None)


# -- the report -------------------------------------------------------------------------------------------------------


class Painter:
    """In a Pipeline's place: what it draws for the i-th prompt is drawn[i]; its first stage keeps levels of 8."""

    def __init__(self, pictures, first_seed=5):
        self.pictures, self.first, self.vae = (
            pictures,
            first_seed,
            SimpleNamespace(encode=self.encode, decode=lambda z: z),
        )

    @staticmethod
    def encode(x):
        return ((x + 1) * 16).round() / 16 - 1

    def __call__(self, words, seed, **drawing):
        assert len(words) == len(seed)
        return SimpleNamespace(images=[Image.fromarray(self.pictures[number - self.first]) for number in seed])


def judged(painter, scenes, specs, network):
    *numbers, report = evaluate(painter, scenes, specs, network, Drawing(seed=5), TRAINING)
    assert numbers == list(range(1, len(specs) + 1)) and isinstance(report, Report)
    return report


def test_a_perfect_painter_scores_as_rendered_scenes_do(network, scenes, specs, tmp_path):
    report = judged(Painter(renderings(scenes, specs, "perfect")), scenes, specs, network)
    drawn, rendered = report.drawn, report.rendered
    assert drawn.fid < 2 * rendered.fid and abs(drawn.kid.value) <= 4 * drawn.kid.error
    assert min(drawn.coverage) >= min(rendered.coverage) - 0.15
    assert all(memory.copies <= 0.1 and 0.8 < memory.ratio < 1.25 for memory in drawn.memory.values())
    assert drawn.memory["pixels"].nearer <= 0.3
    report.save(tmp_path)
    assert files(tmp_path) == ["quality.json", "quality.md", "quality.png"]
    read = json.loads((tmp_path / "quality.json").read_text())
    assert read["drawn"]["fid"] == drawn.fid and read["training_scenes"] == TRAINING and len(read["pictures"]) == N
    first = read["pictures"][0]
    assert first["name"] == specs[0].caption() and first["seed"] == 5 and {*first["own"]} == {"pixels", "features"}
    table = report.table()
    assert all(row[0] in table and f"| {row[0]} |" in (tmp_path / "quality.md").read_text() for row in report.cells())
    assert "near-copies, by pixels" in table and "first stage, SSIM" in table and "resized" not in table
    with Image.open(tmp_path / "quality.png") as sheet:
        assert sheet.width > 6 * 128 and sheet.height > 8 * 128


def test_a_painter_of_its_training_scenes_is_seen(network, scenes, specs):
    """Also behind a first stage: every picture is a near-copy, and the sheet begins with the nearest."""
    training = np.stack([scenes.scene(i).image for i in range(50, 50 + N)])
    report = judged(Painter(noisy(training)), scenes, specs, network)
    assert report.drawn.memory["pixels"].copies >= 0.95 and report.drawn.memory["pixels"].ratio < 0.3
    same = [np.array_equal(scenes.scene(row.scenes["pixels"]).image, training[i]) for i, row in enumerate(report.rows)]
    assert all(same)  # there may be two that are equal
    assert report.rendered.memory["pixels"].copies <= 0.1


def test_a_careless_painter_is_far_from_rendered_scenes(network, scenes, specs):
    """Half of the kinds dropped is lost recall; noise is distance, and no copy."""
    perfect = renderings(scenes, specs, "perfect")
    noise = judged(Painter(RNG.integers(0, 256, perfect.shape, dtype=np.uint8)), scenes, specs, network)
    assert noise.drawn.fid > 3 * noise.rendered.fid and noise.drawn.kid.value > 4 * noise.drawn.kid.error
    assert noise.drawn.coverage.recall == 0 and noise.drawn.memory["pixels"].copies == 0
    same = judged(Painter(np.repeat(perfect[:1], N, 0)), scenes, specs, network)
    assert same.drawn.coverage.recall < 0.2 < same.rendered.coverage.recall


def test_existing_pictures_are_judged(network, scenes, specs):
    """In any order, as well as drawn: what depends on their prompts is left out, and what is near to training scenes is
    counted alike of them and of rendered ones. Of another size they are resized, and the report says so.
    """
    drawn = renderings(scenes, specs, "perfect")
    known = judged(Painter(drawn), scenes, specs, network)
    pictures = {f"{i:02}.png": Image.fromarray(drawn[i]) for i in RNG.permutation(N)}
    found = judge_pictures(pictures, scenes, specs, network, TRAINING)
    assert found.drawn.fid == pytest.approx(known.drawn.fid, rel=1e-3) and found.drawn.coverage == known.drawn.coverage
    for figures, drawn_here in ((found.drawn, known.drawn), (found.rendered, known.rendered)):
        assert figures.kid is None and figures.memory["pixels"].nearer is None
        assert figures.memory["pixels"].copies >= drawn_here.memory["pixels"].copies
    assert found.kept is None and found.rows[0].own == {} and found.note == ""
    large = {name: image.resize((128, 128)) for name, image in pictures.items()}
    resized = judge_pictures(large, scenes, specs, network, TRAINING)
    assert resized.note == f"{N} of {N} pictures were resized to 64 x 64" and resized.note in resized.table()
    assert "first stage" not in resized.table()
    for few in ({}, dict(list(pictures.items())[:19])):
        with pytest.raises(UsageError, match="at least 20"):
            judge_pictures(few, scenes, specs, network)
    with pytest.raises(UsageError, match="at least 20"):
        next(evaluate(Painter(drawn), scenes, specs[:5], network))


def test_what_the_first_stage_keeps(network, scenes):
    """The mean PSNR is first_stage_psnr's, the SSIM that of the same pictures; one that keeps all has an rFID of 0."""
    painter = Painter([])
    found = first_stage_kept(painter.vae, scenes, network, 24)
    x = held_out_scenes(scenes, 24)
    y = painter.encode(x)
    assert found.psnr == first_stage_psnr(painter.vae, scenes, 24) == pytest.approx(float(psnr(x, y).mean()))
    assert found.ssim == pytest.approx(float(ssim(x, y).mean())) and 0.8 < found.ssim < 1 and found.rfid > 1e-3
    whole = first_stage_kept(SimpleNamespace(encode=lambda x: x, decode=lambda z: z), scenes, network, 24)
    assert whole == (pytest.approx(148.13, abs=0.01), 1, pytest.approx(0, abs=1e-4))


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command(noto_font, tmp_path, monkeypatch):
    """Draws with a small model and compares with scenes of its size; --pictures draws nothing."""
    app = typer.Typer()
    app.command()(quality)
    scenes = EmojiScenes(dataclasses.replace(CORPUS, size=16))
    monkeypatch.setattr(import_module("ldm.cli.evaluate"), "scenes_of", lambda *_: scenes)  # the name is also an app's
    model = small_model(tmp_path / "model")
    torch.manual_seed(0)
    network = SceneClassifier(shape(scenes, **SMALL))
    save_model(network, network.config.to_dict(), model / "classifier", "model.safetensors")
    common = ["--model", str(model), "-n", "20", "--training-scenes", "40"]
    done = CliRunner().invoke(app, [*common, "--steps", "1", "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "FID" in done.stdout and "first stage, rFID" in done.stdout
    assert files(tmp_path / "out") == ["quality.json", "quality.md", "quality.png"]
    (tmp_path / "drawn").mkdir()
    for i, picture in enumerate(renderings(scenes, prompts(scenes, 22), "test")):
        Image.fromarray(picture).resize((32, 32)).save(tmp_path / "drawn" / f"{i:02}.png")
    words = [*common, "--pictures", str(tmp_path / "drawn"), "--json", "-o", str(tmp_path / "out2")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert len(found["pictures"]) == 20 and found["first_stage"] is None and "20 of 20" in found["note"]
    done = CliRunner().invoke(app, [*common[:3], "5", *common[4:]])
    assert done.exit_code == 2


# -- trained ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # half a minute; last run 2026-11-22, passed
def test_a_trained_classifier_knows_the_scenes(few_scenes, noto_font, tmp_path):
    """A small one on a small corpus says what scenes show, and its features put nothing beside nothing: blurred
    pictures are farther from rendered scenes than others of those, and wrong objects farther than wrong places.
    """
    corpus = CorpusConfig(objects=6, shapes=0.0, styled=0.0)
    stage, config = run_of(tmp_path, corpus, 250, batch_size=32, block_out_channels=(32, 48, 64), features=64)
    *_, last = run_stage(stage, config)
    assert last.figures["held_out_objects"] >= 0.8 and last.figures["held_out_background"] >= 0.97
    scenes, network = EmojiScenes(corpus), open_classifier(tmp_path / "result")
    specs = prompts(scenes, 200)
    embed = embedding(network)
    found, others = (embed(renderings(scenes, specs, name))["features"] for name in ("a", "b"))
    names = dict(zip(scenes.names, [*scenes.names[1:], scenes.names[0]], strict=True))
    wrong = [dataclasses.replace(spec, objects=tuple(names[name] for name in spec.objects)) for spec in specs]
    strange = embed(renderings(scenes, wrong, "a"))["features"]
    moved = np.linalg.norm(found - others, axis=1)
    assert np.median(np.linalg.norm(found - strange, axis=1)) > 2 * np.median(moved)
    rendered = renderings(scenes, specs, "a")
    blurred = np.stack([np.asarray(Image.fromarray(p).resize((16, 16)).resize((64, 64))) for p in rendered])
    assert fid(embed(blurred)["features"], others) > 3 * fid(found, others)
