"""The judge, on pictures whose truth is known: the corpus' own, first-stage round trips, false captions, empty ones."""

import json
import random
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.emoji import BACKGROUNDS, CorpusConfig, EmojiScenes, SceneSpec
from ldm.errors import UsageError
from ldm.evaluation.alignment import (
    GlyphScenes,
    Judge,
    Judged,
    Report,
    Score,
    evaluate,
    glyph_prompts,
    ground_truth,
    prompts,
)
from ldm.evaluation.matching import shrunk
from ldm.evaluation.reconstruction import first_stage_psnr, psnr
from ldm.models.vae import AutoencoderKL, VAEConfig

VAE = Path(__file__).parents[1] / "weights" / "vae"  # a checkout without it is incomplete: its tests fail


@pytest.fixture(scope="module")
def scenes(noto_font):
    return EmojiScenes()


@pytest.fixture(scope="module")
def judge(scenes):
    """One judge for all tests: its templates are rendered once."""
    return Judge(scenes)


@pytest.fixture(scope="module")
def vae():
    from safetensors.torch import load_file

    model = AutoencoderKL(VAEConfig.from_dict(json.loads((VAE / "config.json").read_text())))
    model.load_state_dict({k: v.float() for k, v in load_file(VAE / "diffusion_pytorch_model.safetensors").items()})
    return model.eval()


def wrong(judge, scenes, specs, seed=1):
    """The captions of ground-truth scenes that the judge does not find wholly right."""
    drawn = ground_truth(scenes, specs, seed)
    return [scene.caption for scene in drawn if not judge.judge(scene.image, scene.spec).all_right]


# -- the prompts ------------------------------------------------------------------------------------------------------


def test_prompts_are_fixed_before_training():
    """70 % single, 30 % relations, all held out, canonical; the same for any seed and shares of a training run."""
    scenes = EmojiScenes()
    specs = prompts(scenes)
    assert len(specs) == 200 and sum(bool(s.relation) for s in specs) == 60
    assert all(scenes.is_held_out(s) and s.count == 1 and not s.size for s in specs)
    other = EmojiScenes(CorpusConfig(pairs=0.6, counts=0.0, sized=0.5), seed=9)
    assert prompts(other, 40) == specs[:40]
    assert [s.caption() for s in specs[:4]] == [
        "a violin on a brown background",
        "a hippopotamus on a red background",
        "a hot dog below a crayon on a green background",
        "a computer disk on a blue background",
    ]


# -- what is true is found --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [60, pytest.param(200, marks=pytest.mark.slow)])
def test_ground_truth_of_the_prompts(judge, scenes, count):
    """Background, objects, relation; of all 200 when there is time."""
    assert wrong(judge, scenes, prompts(scenes, count)) == []


def test_every_object_on_two_backgrounds(judge, scenes):
    """Also objects in nearly the colour of their background: a red diamond on red, a black nib on black."""
    colours = list(BACKGROUNDS)
    specs = [SceneSpec((name,), colours[(i + 3 * k) % 10]) for i, name in enumerate(scenes.names) for k in range(2)]
    near = [SceneSpec((n,), c) for n, c in (("diamond suit", "red"), ("black nib", "black"), ("hook", "yellow"))]
    assert wrong(judge, scenes, specs + near) == []


@pytest.mark.parametrize("n", [20, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["pair", "count"])
def test_random_scenes(judge, scenes, kind, n):
    rng = random.Random(kind)
    assert wrong(judge, scenes, [scenes.spec(rng, kind) for _ in range(n)]) == []


def test_sizes(judge, scenes):
    specs = [SceneSpec((name,), "pink", size=("small", "large")[i % 2]) for i, name in enumerate(scenes.names[::2])]
    assert wrong(judge, scenes, specs) == []


def test_the_places_seen_are_the_true_ones(judge, scenes):
    """Centres within 1.5 pixels of the boxes'."""
    for scene in ground_truth(scenes, prompts(scenes, 40), seed=2):
        verdict = judge.judge(scene.image, scene.spec)
        true = {
            n: ((x0 + x1) / 128, (y0 + y1) / 128) for n, (x0, y0, x1, y1) in zip(scene.names, scene.boxes, strict=True)
        }
        for sighting in verdict.seen:
            assert np.abs(np.subtract(sighting.centre, true[sighting.name])).max() <= 1.5 / 64


def test_pictures_of_another_size(judge, scenes):
    """A picture enlarged to 160 pixels, no multiple of the resolution it is compared at, says the same."""
    for scene in ground_truth(scenes, prompts(scenes, 20), seed=3):
        large = np.asarray(Image.fromarray(scene.image).resize((160, 160), Image.Resampling.BICUBIC))
        assert judge.judge(large, scene.spec).all_right


def test_first_stage_round_trips(judge, scenes, vae):
    """At least 90 % of single objects survive the model's own autoencoder: of the 70 held-out ones."""
    specs = [s for s in prompts(scenes, 100) if not s.relation]
    drawn = ground_truth(scenes, specs, seed=4)
    x = torch.from_numpy(np.stack([s.image for s in drawn])).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        y = torch.cat([vae.decode(vae.encode(part)) for part in x.split(8)])
    images = ((y.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    verdicts = [judge.judge(image, spec) for image, spec in zip(images, specs, strict=True)]
    assert np.mean([v.objects[0] for v in verdicts]) >= 0.9
    assert np.mean([v.background for v in verdicts]) >= 0.99


def test_first_stage_psnr_of_the_model_in_the_box(scenes, vae):
    assert first_stage_psnr(vae, scenes, 48) >= 24


# -- what is false is not ---------------------------------------------------------------------------------------------


def test_shuffled_captions_score_at_chance(judge, scenes):
    """Right exactly where the shuffled caption happens to be true too; a right answer for another reason would show."""
    specs = [s for s in prompts(scenes) if not s.relation]
    drawn = ground_truth(scenes, specs, seed=5)
    false = random.Random(0).sample(specs, len(specs))
    verdicts = [judge.judge(scene.image, spec) for scene, spec in zip(drawn, false, strict=True)]
    assert [v.objects[0] for v in verdicts] == [a.objects == b.objects for a, b in zip(specs, false, strict=True)]
    assert [v.background for v in verdicts] == [a.background == b.background for a, b in zip(specs, false, strict=True)]
    n = len(specs)
    for got, share in (
        (sum(v.objects[0] for v in verdicts), sum((k / n) ** 2 for k in Counter(s.objects for s in specs).values())),
        (sum(v.background for v in verdicts), sum((k / n) ** 2 for k in Counter(s.background for s in specs).values())),
    ):
        assert abs(got / n - share) <= 4 * (share * (1 - share) / n) ** 0.5
    top5 = np.mean([v.objects_top5[0] for v in verdicts])
    assert top5 <= 0.25  # five of 64 are 8 %, and similar objects are near each other


def test_relations_the_wrong_way_round(judge, scenes):
    """The same two objects, in each of the three other relations: both are seen, the relation is not."""
    others = {
        "to the left of": "to the right of",
        "to the right of": "above",
        "above": "below",
        "below": "to the left of",
    }
    specs = [s for s in prompts(scenes, 50) if s.relation]
    for scene in ground_truth(scenes, specs, seed=6):
        a = scene.spec
        verdict = judge.judge(scene.image, SceneSpec(a.objects, a.background, others[a.relation]))
        assert verdict.objects == (True, True) and not verdict.relation
        swapped = judge.judge(scene.image, SceneSpec(a.objects[::-1], a.background, a.relation))
        assert swapped.objects == (True, True) and not swapped.relation


def test_one_of_two_objects_is_no_relation(judge, scenes):
    scene = ground_truth(scenes, [SceneSpec(("owl", "pizza"), "white", "above")])[0]
    verdict = judge.judge(scene.image, SceneSpec(("owl", "taco"), "white", "above"))
    assert verdict.objects == (True, False) and not verdict.relation and verdict.background


def test_other_counts(judge, scenes):
    for true, asked in ((2, 3), (3, 2), (3, 4), (4, 3), (1, 2)):
        specs = [SceneSpec((name,), "green", count=true) for name in ("owl", "taco", "bell", "penguin")]
        for scene in ground_truth(scenes, specs, seed=7):
            assert not judge.judge(scene.image, SceneSpec(scene.spec.objects, "green", count=asked)).count


def test_an_empty_picture_shows_nothing(judge):
    """Plain colours hold no object, not even one in nearly that colour; noise has no background asked for."""
    for colour, rgb in BACKGROUNDS.items():
        plain = np.full((64, 64, 3), rgb, np.uint8)
        verdict = judge.judge(plain, SceneSpec(("diamond suit",), colour))
        assert verdict.background and verdict.seen == () and verdict.objects == verdict.objects_top5 == (False,)
        verdict = judge.judge(plain, SceneSpec(("owl", "taco"), colour, "above"))
        assert verdict.objects == (False, False) and not verdict.relation


def test_refuses_what_is_no_picture(judge):
    for bad in (np.zeros((64, 64, 3), np.float32), np.zeros((3, 64, 64), np.uint8), np.zeros((64, 32, 3), np.uint8)):
        with pytest.raises(UsageError, match="takes uint8"):
            judge.judge(bad, SceneSpec(("owl",), "red"))


def test_it_is_fast(judge, scenes):
    """Tens of milliseconds of CPU time a picture; the bound is loose because other tests run beside this one."""
    drawn = ground_truth(scenes, prompts(scenes, 30), seed=8)
    begun = time.process_time()
    for scene in drawn:
        judge.judge(scene.image, scene.spec)
    assert (time.process_time() - begun) / len(drawn) < 0.1


# -- an object that an adapter taught ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_anchor(noto_font):
    """The corpus and an anchor, which is none of its objects, under a made-up name."""
    anchor = EmojiScenes(CorpusConfig(objects=0, always=("anchor",))).sprite("anchor", 128)
    return GlyphScenes("zorbik", anchor)


def test_a_new_object_is_asked_for_in_contexts_held_out(with_anchor, scenes):
    """Seven of ten alone, three beside another, which takes turns; never in a context that may be trained on."""
    specs = glyph_prompts(with_anchor)
    assert (
        len(specs) == 200
        and sum(bool(s.relation) for s in specs) == 60
        and glyph_prompts(with_anchor, 40) == specs[:40]
    )
    trained, judged = (with_anchor.contexts(held_out) for held_out in (False, True))
    assert {s.background for s in specs if not s.relation} == set(judged[0]) == set(BACKGROUNDS) - set(trained[0])
    others = {name for s in specs for name in s.objects} - {"zorbik"}
    assert others == set(judged[1]) == set(scenes.names) - set(trained[1])
    assert min(map(len, (*trained, *judged))) >= 5 and all("zorbik" in s.objects for s in specs)
    assert {s.objects.index("zorbik") for s in specs if s.relation} == {0, 1}


def test_a_new_object_is_seen_where_it_is_and_nowhere_else(with_anchor, scenes):
    """All objects of the corpus are its rivals: the new one is found in its own scenes, and in none of theirs."""
    judge, specs = Judge(with_anchor), glyph_prompts(with_anchor, 20)
    assert wrong(judge, with_anchor, specs) == []
    for scene in ground_truth(scenes, prompts(scenes, 30)):
        asked = SceneSpec(("zorbik", *scene.spec.objects[1:]), scene.spec.background, scene.spec.relation)
        verdict = judge.judge(scene.image, asked)
        assert not verdict.objects[0] and verdict.relation != bool(asked.relation) and not verdict.all_right
        assert judge.judge(scene.image, scene.spec).all_right


def test_the_report_on_a_new_object(with_anchor):
    specs = glyph_prompts(with_anchor, 10)
    *rows, report = evaluate(Oracle(with_anchor, specs), with_anchor, 10)
    assert [r.spec for r in rows] == specs
    assert report.scores()[0] == Score("zorbik, alone or beside another", 10, 10, 0.7)


def test_refuses_a_new_object_that_is_none(with_anchor):
    for name, picture in (("owl", Image.new("RGBA", (8, 8), "red")), ("zorbik", Image.new("RGBA", (8, 8)))):
        with pytest.raises(UsageError, match="cannot be judged"):
            GlyphScenes(name, picture)


# -- figures ----------------------------------------------------------------------------------------------------------


def test_shrunk_is_the_mean_of_boxes():
    x = np.random.default_rng(0).random((3, 64, 64), np.float32)
    np.testing.assert_allclose(shrunk(x), x.reshape(3, 32, 2, 32, 2).mean((2, 4)), atol=1e-6)
    odd = np.random.default_rng(1).random((1, 80, 80), np.float32)
    fine = odd.repeat(2, 1).repeat(2, 2)  # 160 = 5 x 32
    np.testing.assert_allclose(shrunk(odd), fine.reshape(1, 32, 5, 32, 5).mean((2, 4)), atol=1e-6)


def test_psnr_in_closed_form():
    x = torch.zeros(1, 3, 8, 8)  # 127.5, which rounds to the even 128
    assert psnr(x, x + 10 / 127.5).item() == pytest.approx(20 * np.log10(255 / 10), abs=1e-4)  # 138 - 128
    assert psnr(x, x).item() == pytest.approx(148.13, abs=0.01)


def test_wilson_intervals():
    """Published examples: Newcombe 1998, Statistics in Medicine 17, table I, method 3."""
    for right, of, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert Score("", right, of).interval == pytest.approx((low, high), abs=6e-5)


class Oracle:
    """In a Pipeline's place: draws the ground truth of prompts it knows, with a first stage that loses nothing."""

    def __init__(self, scenes, known):
        self.scenes, self.known, self.calls = scenes, {s.caption(): s for s in known}, []
        self.vae = SimpleNamespace(encode=lambda x: x, decode=lambda z: z)

    def __call__(self, prompt, **fields):
        self.calls.append((prompt, fields))
        drawn = [self.scenes.draw(self.known[p], random.Random(s)) for p, s in zip(prompt, fields["seed"], strict=True)]
        return SimpleNamespace(images=np.stack([d.image for d in drawn]).astype(np.float32) / 255)


def test_evaluate_and_its_report(scenes, tmp_path):
    """A perfect model scores 100 %; every picture has its prompt and its seed; what is written reads back."""
    oracle = Oracle(scenes, prompts(scenes))
    *rows, report = evaluate(oracle, scenes, 12, seed=5, steps=3, batch_size=5)
    assert [len(prompt) for prompt, _ in oracle.calls] == [5, 5, 2]
    assert oracle.calls[1][1]["seed"] == (10, 11, 12, 13, 14) and oracle.calls[0][1]["num_inference_steps"] == 3
    assert all(isinstance(r, Judged) for r in rows) and isinstance(report, Report) and report.rows == tuple(rows)
    assert [(r.index, r.total, r.seed) for r in rows] == [(i, 12, 5 + i) for i in range(12)]
    assert [r.prompt for r in rows] == [s.caption() for s in prompts(scenes, 12)]
    assert {(s.name, s.right, s.of) for s in report.scores()} == {
        ("background", 12, 12), ("single object, top-1", 9, 9), ("single object, top-5", 9, 9),
        ("relation, both objects right", 3, 3), ("pair, both objects anywhere", 3, 3),
        ("pair, at least one object", 3, 3), ("all of the prompt", 12, 12),
    }  # fmt: skip
    assert report.psnr == pytest.approx(148.1, abs=0.1)
    report.save(tmp_path)
    read = json.loads((tmp_path / "alignment.json").read_text())
    assert len(read["pictures"]) == 12 and read["scores"][0]["share"] == 1.0
    assert read["pictures"][0]["seen"][0]["name"] == "violin"
    markdown = (tmp_path / "alignment.md").read_text().splitlines()
    assert len({line.count("|") for line in markdown}) == 1 and "| background | 12 | 100.0% |" in markdown[2]
    assert report.table().splitlines()[1].split()[:3] == ["background", "12", "100.0%"]
    with Image.open(tmp_path / "alignment.png") as sheet:
        assert sheet.width > 8 * 128 and sheet.height > 2 * 128
    with pytest.raises(UsageError, match="at least one"):
        next(evaluate(oracle, scenes, 0))
