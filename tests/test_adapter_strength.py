"""How strong an adapter is, where and when: A1111's rules, loractl's documented examples, the block weights' lists."""

import hashlib
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import pixels, texts_in
from safetensors.torch import save_file

from ldm.adapters.strength import LISTS, Factors, Strength, Tag, file_option, tags
from ldm.checkpoints.spelling import unet_rules
from ldm.errors import UsageError
from ldm.infotext import request_fields
from ldm.models.presets import UNETS
from ldm.models.unet import UNet

A1111_TAG = re.compile(r"<(\w+):([^>]+)>")  # modules/extra_networks.py, whose matches leave nothing behind


def constant(weight):
    return ((0.0, weight),)


# -- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "encoders", "unet"),
    [  # extra_networks_lora.py: te by name, else the first number, else 1; unet by name, else the second, else te
        ("0.8", 0.8, 0.8),
        ("0.8:0.5", 0.8, 0.5),
        ("te=0:unet=1", 0, 1),
        ("unet=0.5", 1, 0.5),
        ("te=0.5", 0.5, 0.5),
        ("0.8:te=0", 0, 0),
        ("0.8:0.3:te=0", 0, 0.3),
        ("0.8:unet=0", 0.8, 0),
        ("te=0.2:0.8:0.3", 0.2, 0.3),
        ("-1", -1, -1),
        ("+.5:1e-3", 0.5, 0.001),
        (" 1. : -0 ", 1, 0),
    ],
)
def test_numbers_are_a1111s(text, encoders, unet):
    strength = Strength.parse(text)
    assert (strength.text, strength.unet, strength.blocks) == (encoders, constant(unet), ())


@pytest.mark.parametrize(
    ("text", "encoders", "unet"),
    [  # loractl's README and tests
        ("0@0,1@0.5,0@1", 0, ((0, 0), (0.5, 1), (1, 0))),
        ("0.25@0.5,1@1", 0.25, ((0.5, 0.25), (1, 1))),
        ("0.5@3,1@6,1@0", 1, ((0, 1), (3, 0.5), (6, 1))),
        ("1@0;0.5@3;1@6", 1, ((0, 1), (3, 0.5), (6, 1))),
        ("1:0@5,1@6", 1, ((5, 0), (6, 1))),
        ("te=1:unet=0@0,1@1", 1, ((0, 0), (1, 1))),
        ("te=0@0,1@1:unet=1", 0, constant(1)),
        ("te=0.5@0,1@1", 0.5, ((0, 0.5), (1, 1))),
        ("unet=0.5@0,1@1", 1, ((0, 0.5), (1, 1))),
        ("0.8@0.15,0@0.3", 0.8, ((0.15, 0.8), (0.3, 0))),
        ("0@0,1", 0, ((0, 0), (1, 1))),  # "implicit 1s"
        ("0.5@0.3", 0.5, constant(0.5)),
    ],
)
def test_points_are_loractls(text, encoders, unet):
    strength = Strength.parse(text)
    assert (strength.text, strength.unet) == (encoders, unet)


@pytest.mark.parametrize(
    ("text", "weights"),
    [  # its tests, in a run of 31 steps: {step: weight}
        ("1.0", {0: 1.0, 15: 1.0, 30: 1.0}),
        ("0.75@0;0.5@3;1@6", {0: 0.75, 3: 0.5, 6: 1.0, 9: 1.0}),
        ("0.5@5,1.0@10", {0: 0.5, 5: 0.5, 8: 0.8, 15: 1.0}),
        ("0@0,1@0.5,0@1", {0: 0.0, 15: 1.0, 30: 0.0}),
        ("0@7,1@7", {6: 0.0, 7: 1.0}),
    ],
)
def test_weights_of_steps_are_loractls(text, weights):
    strength = Strength.parse(text)
    assert {i: strength.at(i / 30, 31).unet for i in weights} == weights


def test_between_points_it_is_numpys_interpolation():
    rng = np.random.default_rng(0)
    for _ in range(50):
        places, weights = rng.uniform(0, 1, rng.integers(2, 7)), rng.uniform(-2, 2, 7)
        order = np.argsort(places)
        strength = Strength(tuple(zip(places.tolist(), weights.tolist(), strict=False)))
        for share in (0.0, 1.0, *rng.uniform(0, 1, 20).tolist(), *places.tolist()):
            expected = np.interp(share, places[order], weights[: len(places)][order])
            assert strength.at(share).unet == pytest.approx(expected, abs=1e-12)


def test_a_jump_holds_at_every_step_of_every_run():
    for steps in range(2, 100):
        for at in range(2, steps):
            strength = Strength.parse(f"0@{at},1@{at}")
            assert [strength.at(i / (steps - 1), steps).unet for i in (at - 1, at)] == [0.0, 1.0]


def test_steps_by_number_need_how_many_there_are():
    strength = Strength.parse("0@5,1@6")
    with pytest.raises(UsageError, match="0@5,1@6 counts steps"):
        strength.at(0.5)
    assert strength.at(0.0, 1).unet == 0.0


def test_what_a_strength_may_be_given_as():
    assert Strength.of(0.8) == Strength.of("0.8") == Strength.parse("0.8:0.8") == Strength(constant(0.8), 0.8)
    assert Strength.of({"text": 0.5, "unet": "0@0,1@1", "mid_block": 0}) == Strength.parse("0.5:0@0,1@1:mid_block=0")
    assert Strength.of(Strength.parse("2")) == Strength.of({"te": 2})
    assert len({Strength.of(1), Strength(), Strength.parse("unet=1@0,1@1"), Strength.parse("-0:unet=1:te=1")}) == 1
    assert hash(Strength.parse("0@0,1@1:mid_block=0").at(0.5)) == hash(Factors(0.5, 0.0, (("unet.mid_block", 0.0),)))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "'' is no strength"),
        ("much", "'much' is no strength"),
        ("nan", "no strength"),
        ("inf", "no strength"),
        ("\N{FULLWIDTH DIGIT ONE}", "no strength"),
        ("1_0", "no strength"),
        ("0x1", "no strength"),
        ("0.8:", "no strength"),
        ("1,1", "begins with a weight without a place"),
        ("0@0@1", "'0@1' is no strength"),
        ("0@0,@1", "'' is no strength"),
        ("0@-1,1@1", "-1.0 is no place"),
        ("0@0,1@1001", "1001.0 is no place"),
        ("1:2:3", "3 parts without a name"),
        ("100.1", "strength 100.1 .* not between -100 and 100"),
        ("1e999", "strength inf"),
        ("te=1:te=1", "'te' twice"),
        ("te=0=1", "'0=1' is no strength"),
        ("hr=1", "unknown part of an adapter's strength 'hr='"),
        ("donw_blocks.2=0", "did you mean 'down_blocks'"),
        ("unet.te=0", "unknown part of an adapter's strength 'unet.te='"),
        ("te.x=0", "unknown part of an adapter's strength 'te.x='"),
        ("unet.text_encoder=0", "unknown part of an adapter's strength"),
        ("down blocks=0", "is no module path"),
        ("mid_block.=0", "is no module path"),
        ("mid_block=0@0,1@1", "'0@0,1@1' is no strength"),
        ("lbw=1,1,1", "lbw has 3 .* 12, 17, 20, 26"),
        ("lbw=R" + ",1" * 16, "'R' is no strength"),
        ("lbw=OUTALL", "lbw has 1"),
    ],
)
def test_what_is_no_strength_is_refused_in_one_sentence(text, says):
    with pytest.raises(UsageError, match=says) as refusal:
        Strength.parse(text)
    assert "\n" not in str(refusal.value)


def test_values_that_are_no_strength_are_refused():
    for value in (float("nan"), float("inf"), True, None, 101, {"unet": None}, {"nope": 1}, [1]):
        with pytest.raises(UsageError):
            Strength.of(value)
    for fields in ({"unet": ()}, {"text": float("nan")}, {"blocks": (("vae.x", 1),)}, {"blocks": (("te", 1),)}):
        with pytest.raises(UsageError):
            Strength(**fields)


# -- blocks -----------------------------------------------------------------------------------------------------------


def test_the_longest_whole_path_holds():
    text = "0.5:2:unet.down_blocks.1=0:down_blocks.1.attentions.0=3:text_encoder.text_model.encoder.layers.1=4"
    factors = Strength.parse(text).at(0.0)
    expected = {
        "unet.down_blocks.1.resnets.0.conv1": 0.0,
        "unet.down_blocks.1.attentions.0": 6.0,
        "unet.down_blocks.1.attentions.0.proj_in": 6.0,
        "unet.down_blocks.1.attentions.01.proj_in": 0.0,
        "unet.down_blocks.10.attentions.0": 2.0,
        "unet.down_blocks": 2.0,
        "unet": 2.0,
        "text_encoder.text_model.encoder.layers.1.mlp.fc1": 2.0,
        "text_encoder.text_model.encoder.layers.10.mlp.fc1": 0.5,
        "text_encoder_2.text_model.encoder.layers.1.mlp.fc1": 0.5,
    }
    assert {address: factors.of(address) for address in expected} == expected


def test_text_encoders_are_apart():
    factors = Strength.parse("0.5:text_encoder=0").at(0.0)
    assert [factors.of(f"{name}.text_model") for name in ("text_encoder", "text_encoder_2", "unet")] == [0, 0.5, 0.5]


def extension_factor(key, numbers):
    """The rule of sd-webui-lora-block-weight: the last of BLOCKS in a key of CompVis' names, 1 where there is none.
    Written down from BLOCKID12, 17, 20, 26 and to26 of its scripts/lora_block_weight.py.
    """
    ids = {
        12: "BASE IN04 IN05 IN07 IN08 M00 OUT00 OUT01 OUT02 OUT03 OUT04 OUT05",
        17: "BASE IN01 IN02 IN04 IN05 IN07 IN08 M00 OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11",
        20: "BASE IN00 IN01 IN02 IN03 IN04 IN05 IN06 IN07 IN08 M00 "
        "OUT00 OUT01 OUT02 OUT03 OUT04 OUT05 OUT06 OUT07 OUT08",
        26: "BASE IN00 IN01 IN02 IN03 IN04 IN05 IN06 IN07 IN08 IN09 IN10 IN11 M00 "
        "OUT00 OUT01 OUT02 OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11",
    }[len(numbers)].split()
    said = dict(zip(ids, numbers, strict=True))
    if match := re.match(r"(input|output)_blocks\.(\d+)\.", key):
        return said.get(f"{'IN' if match[1] == 'input' else 'OUT'}{int(match[2]):02}", 0)
    return said.get("M00", 0) if key.startswith("middle_block.") else 1


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
@pytest.mark.parametrize("count", [12, 17, 20, 26])
def test_lists_of_block_weights_reach_the_modules_they_reach_there(name, count):
    with torch.device("meta"):
        modules = [path for path, module in UNet(UNETS[name]).named_modules() if not [*module.children()]]
    rules = {rule.ours: rule.theirs for rule in unet_rules(UNETS[name])}
    numbers = [(i + 1) / 32 for i in range(count)]
    factors = Strength.parse("lbw=" + ",".join(map(str, numbers))).at(0.0)
    for path in modules:
        ours = max((known for known in rules if f"{path}.".startswith(f"{known}.")), key=len, default=None)
        if ours is not None:
            assert factors.of(f"unet.{path}") == extension_factor(rules[ours] + path[len(ours) :] + ".", numbers), path
    assert factors.of("text_encoder.text_model.x") == factors.of("text_encoder_2.text_model.x") == numbers[0]


def test_lists_of_block_weights_have_their_lengths():
    assert {count: len(names) for count, names in LISTS.items()} == {12: 12, 17: 17, 20: 20, 26: 26}
    ones = Strength.parse("0.5:lbw=" + ",".join("1" * 26)).at(0.0)
    assert {ones.of(f"unet.{path}") for path in ("conv_in", "mid_block.x", "up_blocks.3.resnets.2", "conv_out")} == {
        0.5
    }


# -- text and back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shortest"),
    [
        ("0.80", "0.8"),
        ("0.8:0.8", "0.8"),
        ("te=0.8:unet=0.5", "0.8:0.5"),
        ("0@0;1@1", "0@0,1"),
        ("1:0@0,1@0.5", "1:0@0,1@0.5"),
        ("0@5,1@6", "0@5,1@6"),
        ("1:mid_block=.5", "mid_block=0.5"),
        ("0.5@0,0.5@1:unet.mid_block=0", "0.5:mid_block=0"),
        ("lbw=1,0,0,0,0,0.5,1,1,1,1,1,1", "lbw=1,0,0,0,0,0.5,1,1,1,1,1,1"),
        ("2:lbw=0" + ",1" * 16, "2:lbw=0" + ",1" * 16),
        ("lbw=0" + ",0" * 25, "lbw=0" + ",0" * 11),
        ("-0", "0"),
        ("0.1:1e-7", "0.1:1e-07"),
    ],
)
def test_shown_without_what_goes_without_saying(text, shortest):
    assert str(Strength.parse(text)) == shortest
    assert Strength.parse(shortest) == Strength.parse(text)


PIECES = [
    *"0123456789.+-@,;:= ", "te=", "unet=", "text=", "lbw=", "mid_block", "down_blocks.1", "unet.", "text_encoder",
    "0@0,1@0.5", "0.8", "1e2", "nan", "lbw=" + ",".join("0" * 12), "te=1", "1@3;2@9", "up_blocks=2", "é", "\n", "=0",
]  # fmt: skip


def test_any_text_is_a_strength_that_comes_back_or_is_refused():
    rng, read, began = random.Random(6), 0, time.process_time()
    for _ in range(2000):
        text = rng.choice(("", ":")).join(rng.choices(PIECES, k=rng.randint(1, 5)))
        try:
            strength = Strength.parse(text)
        except UsageError as error:
            assert "\n" not in str(error)
            continue
        read += 1
        assert Strength.parse(str(strength)) == strength, text
        assert all(abs(strength.at(share, 20).unet) <= 100 for share in (0.0, 0.4, 1.0)), text
    assert read > 250
    assert time.process_time() - began < 5


def test_strengths_of_any_numbers_come_back():
    rng = random.Random(7)
    paths = ["unet.mid_block", "unet.up_blocks.1", "text_encoder", "text_encoder_2.text_model", "unet.conv_in"]
    for _ in range(500):
        points = [
            (round(rng.uniform(0, rng.choice((1, 30))), 3), rng.uniform(-100, 100)) for _ in range(rng.randint(1, 5))
        ]
        blocks = [(path, rng.uniform(-2, 2)) for path in rng.sample(paths, rng.randint(0, 3))]
        strength = Strength(tuple(points), rng.choice((points[0][1], rng.gauss(0, 1))), tuple(blocks))
        assert Strength.parse(str(strength)) == strength


@pytest.mark.parametrize(
    "text",
    ["1" * 200_000 + "x", "1," * 100_000, "0@0," * 50_000, ":" * 200_000, "a." * 100_000 + "=1", "te=1:" * 50_000,
     "x" * 200_000 + "=1", "=" * 200_000, "lbw=" + "1," * 100_000],
)  # fmt: skip
def test_long_texts_are_refused_soon(text):
    began = time.process_time()
    with pytest.raises(UsageError) as refusal:
        Strength.parse(text)
    assert len(str(refusal.value)) < 1000
    assert time.process_time() - began < 2


# -- tags -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("an owl", {}),
        ("an owl <lora:ink:0.8>", {"ink": "0.8"}),
        ("<lora:ink>an owl", {"ink": "1"}),
        ("a <lora:ink:0.8:0.5> b, <lyco:Some Style v1.2:te=0:unet=1>c", {"ink": "0.8:0.5", "Some Style v1.2": "0:1"}),
        ("(owl<lora:a-b_c:-1>:1.2) <lora:x:0@0,1@0.5:mid_block=0>", {"a-b_c": "-1", "x": "0@0,1@0.5:mid_block=0"}),
        ("1 < 2 > 0 <3 <lora:x:1>\nnext", {"x": "1"}),
    ],
)
def test_tags_leave_the_words_that_a1111_sees(prompt, expected):
    words, found = tags(prompt)
    assert words == A1111_TAG.sub("", prompt)
    assert found == tuple(Tag(name, Strength.parse(text)) for name, text in expected.items())


@pytest.mark.parametrize(
    "prompt", ["<hypernet:a:1> x", "<LORA:a:1>", "< lora:a:1>", "<lora>", "a <b> c", "<lora :x:1>"]
)
def test_what_is_no_tag_stays(prompt):
    assert tags(prompt) == (prompt, ())


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("<lora:>", "'<lora:>' names no adapter"),
        ("<lora::1>", "names no adapter"),
        ("<lora:x:much>", "in the tag '<lora:x:much>': 'much' is no strength"),
        ("<lora:x:>", "'' is no strength"),
        ("<lora:../x:1>", "names no adapter"),
        (r"<lora:a\b:1>", "names no adapter"),
        ("<lora:.hidden:1>", "names no adapter"),
        ("<lora:a\nb:1>", "names no adapter"),
        (f"<lora:{'x' * 201}:1>", "names no adapter"),
        ("a <lora:x and <lora:y:1>", "names no adapter"),
        ("a <lora:x:0.8", "'<lora:x:0.8' is never closed"),
        ("<lora:y:1> <lyco:x", "'<lyco:x' is never closed"),
        ("<lora:x:1> <lyco:x:0.5>", "adapter 'x' 2 times"),
    ],
)
def test_malformed_tags_are_refused(prompt, says):
    with pytest.raises(UsageError, match=re.escape(says)) as refusal:
        tags(prompt)
    assert "\n" not in str(refusal.value)


def test_many_tags_are_read_soon():
    began = time.process_time()
    assert len(tags("".join(f"<lora:a{i}:1>" for i in range(5000)))[1]) == 5000
    for prompt in ("<lora:" * 50_000, "<lora:x" * 50_000, "<" * 200_000 + ">", "<lora:x:1>" * 20_000):
        if prompt.startswith("<lora"):
            with pytest.raises(UsageError):
                tags(prompt)
        else:
            assert tags(prompt) == (prompt, ())
    assert time.process_time() - began < 4


# -- files ------------------------------------------------------------------------------------------------------------


def test_the_file_of_an_option_is_the_longest_that_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a:0.5").touch()
    Path("folder").mkdir()
    Path("ink.pt").touch()
    expected = {
        "ink.safetensors": ("ink.safetensors", None),
        "ink.safetensors:0.8": ("ink.safetensors", "0.8"),
        "x:y.safetensors:0.8:0@0,1@0.5": ("x:y.safetensors", "0.8:0@0,1@0.5"),
        "C:/loras/ink.safetensors:te=0": ("C:/loras/ink.safetensors", "te=0"),
        "a:0.5": ("a:0.5", None),
        "a:0.5:2": ("a:0.5", "2"),
        "folder:mid_block=0": ("folder", "mid_block=0"),
        "ink.pt:0.8": ("ink.pt", "0.8"),
        "missing:0.8:0.5": ("missing", "0.8:0.5"),
        "missing": ("missing", None),
    }
    for text, (path, strength) in expected.items():
        assert file_option(text) == (Path(path), None if strength is None else Strength.parse(strength)), text


@pytest.mark.parametrize("text", ["", ":0.8", "ink.safetensors:", "ink.safetensors:much", "x\0:y", "a" * 5000 + ":b"])
def test_options_that_are_none_are_refused(text):
    with pytest.raises(UsageError):
        file_option(text)


def test_nothing_here_needs_torch():
    code = "import sys; import ldm.adapters.strength; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


# -- at the command ---------------------------------------------------------------------------------------------------

DRAW = ["--steps", "3", "--seed", "7", "--scheduler", "ddim"]
HASH = "0123456789ab"
SITE = "unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2"


@pytest.fixture
def drawing(run, quick, model, tmp_path, monkeypatch):
    """A folder with adapters for the small model in kohya's form, and the command that draws with it into a file."""
    monkeypatch.chdir(tmp_path)
    Path("loras").mkdir()
    for i, name in enumerate(("ink", "loras/oil", "loras/oil-2")):
        torch.manual_seed(i)
        tensors = {f"lora_{SITE}_to_q.lora_down.weight": torch.randn(4, 32)}
        tensors[f"lora_{SITE}_to_q.lora_up.weight"] = 3 * torch.randn(32, 4)
        tensors["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = torch.randn(4, 32)
        tensors["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"] = torch.randn(64, 4)
        save_file(tensors, f"{name}.safetensors", {"sshs_model_hash": HASH * 5 + "0123"})
    return lambda out, *words: run("generate", *words, *DRAW, "--model", model, "-o", out)


def drawn(drawing, out, *words):
    done = drawing(out, *words)
    assert done.code == 0, done.err
    return pixels(out)


def test_a_flag_and_a_tag_draw_the_same(drawing):
    plain = drawn(drawing, "plain.png", "an owl")
    flagged = drawn(drawing, "flag.png", "an owl", "--lora", "ink.safetensors:0.8")
    assert not np.array_equal(plain, flagged)
    tag = "an owl<lora:ink:0.8>"
    assert np.array_equal(flagged, drawn(drawing, "tag.png", tag, "--lora", "ink.safetensors"))
    assert np.array_equal(flagged, drawn(drawing, "dir.png", tag, "--lora-dir", "."))
    assert np.array_equal(plain, drawn(drawing, "off.png", "an owl<lora:ink:0>", "--lora", "ink.safetensors"))
    assert np.array_equal(plain, drawn(drawing, "zero.png", "an owl", "--lora", "ink.safetensors:0"))
    late = drawn(drawing, "late.png", "an owl", "--lora", "ink.safetensors:0:0@0,0.8@1")
    assert not np.array_equal(late, plain) and not np.array_equal(late, flagged)


def test_a_tag_stays_text_where_prompts_are_literal(drawing):
    drawn(drawing, "literal.png", "an <lora:nothing:0.8> owl", "--literal")
    refused = drawing("b.png", "an owl", "--negative", "<lora:ink:1> rain", "--lora", "ink.safetensors")
    assert refused.code == 2 and "negative prompt" in refused.err
    refused = drawing("b.png", "an owl <lora:ink:much>", "--lora", "ink.safetensors")
    assert refused.code == 2 and "in the tag '<lora:ink:much>': 'much' is no strength" in refused.err
    refused = drawing("b.png", "an owl", "--lora", "ink.safetensors:much")
    assert refused.code == 2 and "'much' is no strength" in refused.err
    refused = drawing("b.png", "an owl", "--lora-dir", "nowhere")
    assert refused.code == 2 and "--lora-dir nowhere is no folder" in refused.err


def test_a_recipe_names_its_adapters_and_wants_them_back(drawing, run, model):
    first = drawn(drawing, "a.png", "an owl <lora:oil:0.5>", "--lora-dir", "loras", "--lora", "ink.safetensors:0.8")
    carried = texts_in("a.png")
    rows = json.loads(carried["ldm"])["adapters"]
    assert [(row["type"], row["name"], row["strength"]) for row in rows] == [
        ("lora", "ink", "0.8"),
        ("lora", "oil", "0.5"),
    ]
    digests = [
        hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in ("ink.safetensors", "loras/oil.safetensors")
    ]
    assert [row["sha256"] for row in rows] == digests
    assert carried["parameters"].startswith("an owl <lora:oil:0.5><lora:ink:0.8>\nSteps: 3")
    Path("ink.safetensors").rename("renamed.safetensors")
    files = ["--lora", "renamed.safetensors", "--lora", "loras/oil.safetensors"]
    again = ["--from", "a.png", "--model", str(model)]
    assert run("generate", *again, *files, "-o", "b.png").code == 0 and np.array_equal(first, pixels("b.png"))
    assert json.loads(texts_in("b.png")["ldm"])["adapters"] == rows
    assert run("verify", "a.png", "--model", model, *reversed_pairs(files)).code == 0
    for missing, digest in ((["--lora", "renamed.safetensors"], digests[1]), (["--lora-dir", "loras"], digests[0])):
        refused = run("verify", "a.png", "--model", model, *missing)
        assert refused.code == 1 and digest in refused.err and "--lora" in refused.err
    weaker = ["--lora", "renamed.safetensors:0.1", "--lora-dir", "loras"]
    assert run("generate", *again, *weaker, "-o", "c.png").code == 0 and not np.array_equal(first, pixels("c.png"))
    Path("loras/oil-2.safetensors").replace("loras/oil.safetensors")  # another of that name
    assert digests[1] in run("generate", *again, *files[:2], "--lora-dir", "loras", "-o", "d.png").err
    assert run("generate", "a taco", *again, *files[:2], "-o", "e.png").code == 0  # a prompt that does not name it
    assert [row["name"] for row in json.loads(texts_in("e.png")["ldm"])["adapters"]] == ["ink"]


def reversed_pairs(words):
    return [*words[2:], *words[:2]]


def test_a1111s_hashes_of_adapters_go_both_ways(drawing):
    drawn(drawing, "a.png", "an owl", "--lora", "ink.safetensors:0.8", "--lora", "loras/oil.safetensors")
    text = texts_in("a.png")["parameters"]
    assert f'Lora hashes: "ink: {HASH}, oil: {HASH}", ' in text
    fields, notes = request_fields(text)
    assert fields["prompt"] == "an owl<lora:ink:0.8><lora:oil:1>"
    named = f"it was made with the adapters ink (hash {HASH}), oil (hash {HASH}); give their files with --lora"
    assert any(note.startswith(named) for note in notes)
    assert request_fields("<lora:a b:1> x, <hypernet:h:1>\nSteps: 2, Seed: 1, Size: 64x64")[1][-2:] == [
        "it was made with the adapters a b; give their files with --lora or their --lora-dir",
        "the prompt calls for networks that are not loaded: <hypernet:h:1>",
    ]
