"""`ldm generate`: every place an order may come from says the same, nothing is lost or written elsewhere, and programs
and people are told what they need.
"""

import errno
import inspect
import io
import json
import os
import pty
import random
import re
import stat
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import Done, files, pixels, refused, texts_in, told
from typer.main import get_command

from ldm.cli import app
from ldm.cli.options import NOT_HERE
from ldm.cli.orders import BESIDE, config_fields
from ldm.errors import LdmError
from ldm.pipeline import Pipeline
from ldm.prompts import FIELDS
from ldm.request import Request, flag_of, make_request

pytestmark = pytest.mark.usefixtures("quick")
SAMPLE: dict[str, Any] = {  # another value than the default for every field
    "prompt": ("an owl", "a pizza"), "negative_prompt": "red", "num_images_per_prompt": 3, "seed": 0,
    "variation_strength": 0.5, "variation_seed": 9, "num_inference_steps": 7, "guidance_scale": 2.5,
    "guidance_rescale": 0.5, "guidance_start": 0.25, "guidance_stop": 0.75, "height": 64, "width": 32,
    "scheduler": "euler_a", "eta": 0.25, "clip_skip": 1,
    "nfe": 12, "schedule_type": "karras", "literal": True, "profile": "a1111", "noise_source": "gpu",
    "eta_noise_seed_delta": 31337, "original_height": 128, "original_width": 96, "crop_top": 4, "crop_left": 2,
    "aesthetic_score": 7.5, "negative_aesthetic_score": 1.5, "denoising_start": 0.25, "denoising_end": 0.75,
    "refiner_start": 0.5, "image": "photo.png", "strength": 0.5, "mask_image": "box:1,2,3,4", "mask_invert": True,
    "mask_grow": 3, "mask_feather": 2, "extend": "left=8", "fill": "mirror", "fit": "crop", "resample": 3,
    "resample_jump": 2, "image_guidance_scale": 1.25, "convert_image": True,
}  # fmt: skip
ONE_OF: list[dict[str, Any]] = [  # what each says how many steps there are, in place of SAMPLE's nfe; and what else
    {"nfe": 12, "noise": "n.safetensors"}, {"timesteps": (999.0, 3.5), "source_prompt": "a taco"},
    {"sigmas": (9.0, 2.0), "seamless": "xy"}, {"timestep_respacing": "10,15", "padding_mask_crop": 8},
]  # fmt: skip


# -- one order, many doors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", ONE_OF, ids=[next(iter(one)) for one in ONE_OF])
def test_flags_keys_fields_and_arguments_are_those_of_request(run, model, monkeypatch, tmp_path, steps):
    """The same values, said by flags, YAML, --set, a line of jsonl and keyword arguments, are the same Request."""
    names = {field.name for field in fields(Request)}
    every = {name for one in ONE_OF for name in one}
    assert SAMPLE.keys() | every == names - {*NOT_HERE} == {*FIELDS.values()} - {*NOT_HERE}
    sample = {name: value for name, value in SAMPLE.items() if name not in every} | steps
    embeds = {f"{half}{kind}_embeds" for half in ("", "negative_") for kind in ("prompt", "pooled_prompt")}
    own = {"self", "prompt", "generator", "latents", "fields"} | embeds
    assert inspect.signature(Pipeline.__call__).parameters.keys() == own and own & names == {"prompt"}
    asked: list[Request] = []

    def resolve(self: Pipeline, request: Request, *_: Any) -> Request:
        asked.append(request)
        raise LdmError("enough")

    monkeypatch.setattr(Pipeline, "resolve", resolve)
    flags = {p.name: p.opts[0] for p in get_command(app).commands["generate"].params if p.name in names}
    assert flags == {f.name: flag_of(f) for f in fields(Request) if f.name not in NOT_HERE} | {"prompt": "prompt"}
    typed = []
    for name, value in sample.items():
        several = value if isinstance(value, tuple) else (value,)
        typed += [word for one in several for word in (flags[name], *([] if one is True else [one]))]
    typed = typed[4:]  # the two prompts are arguments
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in sample.items()}
    names_of_flags = {field: key for key, field in FIELDS.items()}
    short = {names_of_flags[name]: value for name, value in plain.items()}
    assert {"negative", "n", "steps", "guidance"} <= short.keys()
    Path("long.yaml").write_text(yaml.safe_dump(plain))
    Path("short.yaml").write_text(yaml.safe_dump(short))
    Path("a.jsonl").write_text(json.dumps(short))
    settings = [word for name, value in plain.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    doors = [
        [*sample["prompt"], *typed], ["--config", "long.yaml"], ["--config", "short.yaml"], settings,
        ["--prompts-file", "a.jsonl"],
    ]  # fmt: skip
    for words in doors:
        refused(run("generate", "--model", model, *words), 1, "enough")
    with pytest.raises(LdmError, match="enough"):
        Pipeline.from_pretrained(model)(**sample)
    assert asked == [Request(**sample)] * (len(doors) + 1)
    assert make_request(None, sample) == Request(**sample)


def test_later_places_win(draw, planned):
    """A recipe, then the file, then --set, then the flags."""
    draw("an owl", "--guidance", "2", "--steps", "4", "--seed", "7", "-o", "a.png")
    Path("a.yaml").write_text("guidance_scale: 3\nseed: 8\nnegative: red\noutput: b.png\n")
    options = ["--from", "a.png", "--config", "a.yaml", "--set", "seed=9", "--set", "guidance=4", "--guidance", "5"]
    wanted = [("an owl", "red", 5.0, 4, 9)]
    names = ("prompt", "negative_prompt", "guidance_scale", "num_inference_steps", "seed")
    for count, expected in ((0, 2.0), (2, 3.0), (4, 3.0), (6, 4.0), (8, 5.0)):
        assert told(planned(*options[: 2 + count]), "guidance_scale") == [expected]
    assert told(planned(*options), *names) == wanted
    assert told(planned(*options), "path") == ["b.png"] and told(planned(*options, "-o", "c.png"), "path") == ["c.png"]


def test_prompts_from_standard_input(planned, run, model, monkeypatch):
    def typed(text: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))

    typed("an owl\n\n# no prompt\na pizza\n")
    rows = planned("a taco", "-", "--seed", "7")
    assert told(rows, "prompt", "seed") == [("a taco", 7), ("an owl", 8), ("a pizza", 9)]
    typed("\n# nothing\n")
    refused(run("generate", "-", "--model", model), 2, "standard input has no prompt")


def test_prompts_from_files(planned):
    """One seed counts on from line to line; a line's own fields come before those of the command."""
    Path("a.txt").write_text("\ufeffan owl\n# no prompt\n\na {red|green} pizza\n", "utf-8")
    rows = planned("a taco", "--prompts-file", "a.txt", "-n", "2", "--seed", "7", "--literal")
    assert told(rows, "seed") == [7, 8, 9, 10, 11, 12]
    assert told(rows, "prompt") == ["a taco"] * 2 + ["an owl"] * 2 + ["a {red|green} pizza"] * 2
    lines = [
        {"prompt": "an owl"},
        {"prompt": ["a pizza", "a taco"], "steps": 5, "n": 2},
        {"prompt": "b", "seed": 3},
        {"prompt": "c", "scheduler": "euler", "negative_prompt": "red", "width": 8},
    ]
    Path("a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = planned("--prompts-file", "a.jsonl", "--seed", "7", "--steps", "4", "--negative", "blue")
    assert told(rows, "seed") == [7, 8, 9, 10, 11, 3, 13]
    assert told(rows, "num_inference_steps") == [4, 5, 5, 5, 5, 4, 4]
    assert told(rows, "scheduler", "negative_prompt", "width")[-2:] == [("ddim", "blue", 16), ("euler", "red", 8)]
    rows = planned("--prompts-file", "a.txt", "--seed", "7", "--variation-strength", "0.5", "--variation-seed", "1")
    assert told(rows, "seed", "variation_seed") == [(7, 1), (7, 2)]
    Path("b.jsonl").write_text('{"prompt": "a", "variation_seed": 9}\n{"prompt": "b", "variation_strength": 0}')
    rows = planned("--prompts-file", "b.jsonl", "--seed", "7", "--variation-strength", "0.5")
    assert told(rows, "seed", "variation_seed", "variation_strength") == [(7, 9, 0.5), (7, None, 0)]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": "a", "stepz": 3}', ("line 3", "'stepz'", "'steps'")),
        ("a.jsonl", '{"prompt": "a", "steps": 0}', ("line 1", "num_inference_steps is 0")),
        ("a.jsonl", '{"prompt": "a"}\nan owl', ("line 2", "not JSON")),
        ("a.jsonl", '{"steps": 3}', ("line 1", "no prompt")),
        ("a.jsonl", '{"prompt": "x", "output_type": "pt"}', ("line 1", "unknown field 'output_type'")),
        ("a.txt", "\n\n", ("a.txt has no prompt",)),
        ("b.txt", "an owl", ("a.txt cannot be read", "no such file")),
    ],
)
def test_lines_that_are_wrong(run, model, tmp_path, name, text, said):
    Path(name).write_text(text)
    refused(run("generate", "--model", model, "--prompts-file", name.replace("b.", "a.")), 2, *said)
    assert files(tmp_path) == [name]


def test_matrix(planned):
    """The order is A1111's: part i after the first is there where bit i is set. As there, a prompt's combinations share
    their seeds, so that only the words change.
    """
    combinations = ["a", "a, b", "a, c", "a, b, c"]
    assert told(planned("a|b|c", "--matrix"), "prompt") == combinations
    assert told(planned("a|b|c"), "prompt") == ["a|b|c"]
    Path("a.txt").write_text("a|b|c\nd|e\n")
    rows = planned("--prompts-file", "a.txt", "--matrix", "--seed", "1", "--negative", "red")
    drawn = [*((text, 1, "red") for text in combinations), ("d", 2, "red"), ("d, e", 2, "red")]
    assert told(rows, "prompt", "seed", "negative_prompt") == drawn
    twice = told(planned("a|b", "c", "--matrix", "-n", "2", "--seed", "5"), "prompt", "seed")
    assert twice == [("a", 5), ("a", 6), ("a, b", 5), ("a, b", 6), ("c", 7), ("c", 8)]
    (one, other) = told(planned("a|b", "--matrix"), "seed")
    assert one == other
    varied = planned(
        "a|b", "--matrix", "-n", "2", "--seed", "5", "--variation-strength", "0.5", "--variation-seed", "1"
    )
    assert told(varied, "prompt", "seed", "variation_seed") == [
        ("a", 5, 1),
        ("a", 5, 2),
        ("a, b", 5, 1),
        ("a, b", 5, 2),
    ]


def test_wildcards_follow_the_pictures_own_seed(planned, draw, run, model):
    """The choice is Python's generator's for that seed, in a batch and alone; a recipe keeps what was chosen."""
    Path("lists").mkdir()
    Path("lists/place.txt").write_text("at home\n# no\nin a tree\n")
    words = ["a {red|green|blue} owl __place__", "--wildcards", "lists"]
    together = told(planned(*words, "--seed", "7", "-n", "8"), "prompt")
    for seed, prompt in enumerate(together, 7):
        numbers = random.Random(seed)
        colour = ("red", "green", "blue")[int(3 * numbers.random())]
        assert prompt == f"a {colour} owl {('at home', 'in a tree')[int(2 * numbers.random())]}"
        assert told(planned(*words, "--seed", seed), "prompt") == [prompt]
    assert len(set(together)) > 2
    assert told(planned(*words, "--literal"), "prompt") == words[:1]
    refused(run("generate", words[0], "--model", model), 2, "unknown wildcard 'place'")
    draw(*words, "--seed", "7", "-o", "a.png")
    assert told(planned("--from", "a.png", "--seed", "8"), "prompt") == together[:1]
    draw("a {red|green} owl", "--literal", "--seed", "7", "-o", "b.png")
    assert told(planned("--from", "b.png"), "prompt") == ["a {red|green} owl"]
    assert told(planned("a {red|red} taco", "--from", "b.png"), "prompt") == ["a red taco"]


@pytest.mark.parametrize(
    ("text", "words", "said"),
    [
        ("stepz: 3", [], ("'stepz'", "'steps'", "a.yaml")),
        ("output_type: pt", [], ("'output_type'",)),
        ("1: 2", [], ("'1'",)),
        ("seed: many", [], ("seed is 'many'", "whole number")),
        ("width: 1.5", [], ("width is 1.5",)),
        ("prompt: {a: b}", [], ("prompt is {'a': 'b'}",)),
        ("output: 5", [], ("'output' is 5", "text")),
        ("device: [cpu]", [], ("'device' is ['cpu']", "text")),
        ("- 1", [], ("list",)),
        ("seed: 7\na: [", [], ("a.yaml, line 2", "YAML")),
        ("seed: 7", ["--set", "steps"], ("--set 'steps'", "--set steps=30")),
        ("seed: 1", ["--set", "seed"], ("'seed'", "KEY=VALUE")),
        ("seed: 1", ["--set", "sead=2"], ("--set", "'sead'", "'seed'")),
        ("seed: 1", ["--set", "model=3"], ("--set 'model' is 3",)),
        ("seed: 1", ["--set", "guidance=high"], ("guidance_scale is 'high'",)),
    ],
)
def test_configurations_that_are_wrong(run, model, tmp_path, text, words, said):
    Path("a.yaml").write_text(text)
    prompt = [] if "prompt" in text else ["a"]
    refused(run("generate", *prompt, "--model", model, "--config", "a.yaml", *words), 2, *said)
    assert files(tmp_path) == ["a.yaml"]


def test_a_configuration_alone_draws(run, model):
    """Everything may stand in the file, the model and the place too."""
    known = {"prompt": "an owl", "seed": 7, "model": str(model), "device": "cpu", "dtype": "fp32", "output": "x/a.webp"}
    assert known.keys() > {*BESIDE} - {"vae", "refiner", "variant", "revision"}
    Path("a.yaml").write_text(yaml.safe_dump(known))
    assert config_fields(Path("a.yaml"), []) == known
    assert run("generate", "--config", "a.yaml") == Done(0, "x/a.webp\n", "seed 7\n")
    refused(run("generate", "--config", "none.yaml"), 2, "none.yaml")


# -- places -----------------------------------------------------------------------------------------------------------


def test_patterns_name_the_files(draw, tmp_path):
    done = draw("an owl", "a pizza", "--seed", "7", "-o", "new/{index:04}-{seed}-{prompt}.jpg")
    assert done.out.splitlines() == ["new/0000-7-an-owl.jpg", "new/0001-8-a-pizza.jpg"]
    for output in ("./plain", "../" + tmp_path.name + "/plain", tmp_path / "plain"):
        assert draw("an owl", "--seed", "7", "-o", output).out.startswith(f"{Path(output)}/an-owl-7")
    hostile = ["../../x", "/etc/passwd", "..", "a/../../b", "C:\\x\\..\\y", "~/x", "\x00\x1b[2J", "con", "{seed}"]
    draw(*hostile, "--literal", "--seed", "1", "-o", "in/{prompt}-{seed}.png")
    made = files(tmp_path / "in")
    assert len(made) == len(hostile) and all("/" not in name and name.isprintable() for name in made)
    assert {path.name for path in tmp_path.iterdir()} == {"new", "plain", "in"}


def test_nothing_is_replaced_unasked(run, model, monkeypatch, tmp_path):
    """Exit code 2 where nobody can be asked, before anything is drawn; --overwrite replaces."""
    Path("a.png").write_text("mine")
    Path("b.strip.png").symlink_to("nowhere")
    words = ["generate", "an owl", "--model", model, "--seed", "7"]
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "sample", None)  # drawing would fail
        refused(run(*words, "-o", "a.png"), 2, "a.png exists", "--overwrite")
        refused(run(*words, "-o", "b.png", "--strip"), 2, "b.strip.png exists", "--overwrite")
    assert files(tmp_path) == ["a.png", "b.strip.png"] and Path("a.png").read_text() == "mine"
    assert run(*words, "-o", "a.png", "--overwrite").code == 0
    assert pixels("a.png").shape == (16, 16, 3)


@pytest.mark.parametrize(("answer", "code"), [("n", 1), ("", 1), ("y", 0), ("Yes", 0)])
def test_a_person_is_asked(run, model, monkeypatch, answer, code):
    Path("a.png").write_text("mine")
    keyboard, terminal = pty.openpty()
    os.write(keyboard, f"{answer}\n".encode())
    with os.fdopen(terminal) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr("ldm.cli.places.terminal", lambda: True)
        done = run("generate", "an owl", "--model", model, "--seed", "7", "-o", "a.png")
    os.close(keyboard)
    assert (done.code, done.out) == (code, "" if code else "a.png\n"), done.err
    assert done.err.startswith("a.png exists; replace?")
    assert (Path("a.png").read_bytes() == b"mine") == bool(code)


def test_a_disk_that_fills_up(run, model, monkeypatch, tmp_path):
    """The first picture is whole, the second leaves nothing behind, and what is needed is said."""
    written = []
    sync = os.fsync

    def full(handle: int) -> None:
        written.extend([handle] * stat.S_ISREG(os.fstat(handle).st_mode))
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    monkeypatch.setattr(os, "fsync", full)
    done = run("generate", "an owl", "-n", "3", "--seed", "7", "--model", model, "-o", "out/")
    assert (done.code, done.out) == (1, "out/an-owl-7.png\n")
    assert done.err.startswith("seed 7\nerror: the disk is full: out/an-owl-8.png needs some 768 bytes")
    assert "1 of 3 pictures" in done.err and "Traceback" not in done.err
    assert files(tmp_path) == ["out", "out/an-owl-7.png"]
    assert pixels("out/an-owl-7.png").shape == (16, 16, 3) and "ldm" in texts_in("out/an-owl-7.png")


# -- how it is told ---------------------------------------------------------------------------------------------------


def test_json_is_all_there_is_on_stdout(draw):
    words = ["--seed", "7", "--variation-strength", "0.1", "--json", "--gif", "-o", "{index}.png"]
    done = draw("an owl", "a pizza", *words)
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert told(rows, "path", "index", "gif") == [("0.png", 0, "0.gif"), ("1.png", 1, "1.gif")]
    keys = {"path", "index", "seconds", "flagged", "gif", "request", "inputs", "components"}
    assert all(row.keys() == keys for row in rows)
    for row in rows:
        recipe = json.loads(texts_in(row["path"])["ldm"])
        assert (row["request"], row["components"]) == (recipe["request"], recipe["components"])
        assert f"seed 7, variation {row['request']['variation_seed']}\n" in done.err


def test_quiet_and_verbose(draw):
    assert draw("an owl", "--seed", "7", "-q", "-o", "a.png") == Done(0, "a.png\n", "")
    loud = draw("an owl", "--seed", "7", "-v", "-o", "b.png")
    assert loud.out == "b.png\n" and "seed 7\n" in loud.err
    assert re.search(r"^ddim, 2 steps in \d+\.\d\d s", loud.err, re.MULTILINE)
    assert "small on cpu, torch.float32" in loud.err


def test_dry_run_draws_nothing(draw, monkeypatch, tmp_path):
    """Everything that is decided, and the memory it takes; nothing is drawn or written."""
    monkeypatch.setattr(Pipeline, "sample", None)  # drawing would fail
    words = ["an owl", "a pizza", "-n", "5", "--seed", "7", "--dry-run", "-o", "new/"]
    text = draw(*words).out
    for said in ("small", "cpu", "float32", "MiB", "20 in all", "16x16, 2 steps of ddim", "seed 7", "new/an-owl-7.png",
                 "and 2 more"):  # fmt: skip
        assert said in text, said
    plan = json.loads(draw(*words, "--json").out)
    assert told(plan["pictures"], "seed") == [*range(7, 17)]
    assert all(plan["bytes"][name] > 0 for name in ("weights", "work", "free"))
    assert (plan["model"], plan["device"], plan["dtype"], files(tmp_path)) == ("small", "cpu", "float32", [])
