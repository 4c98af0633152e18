"""Prompts from wildcards, matrices and files, against Python's own generator, A1111's examples and JSON."""

import itertools
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from ldm.errors import UsageError
from ldm.prompts import expand, matrix, read_prompts, read_wildcards
from ldm.request import Request

LISTS = {
    "colours": ("red", "green", "blue"),
    "animals/small": ("a {grey|white} mouse", "a __colours__ frog"),
    "empty": (),
    "loop": ("to __back__",),
    "back": ("and __loop__",),
    "broken": ("a {red",),
} | {f"twice{i}": (f"__twice{i + 1}__ __twice{i + 1}__" if i < 9 else "x",) for i in range(10)} | {
    f"deep{i}": (f"__deep{i + 1}__" if i < 11 else "x",) for i in range(12)
}  # fmt: skip


# -- wildcards --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "an owl", "a taco|on fire", r"a \(round\) taco, (big:1.2), [x]", "a __ b __ c", "____", "snake_case", "",
        "一只🦉\n\t\\", "3::red", "$5 or $$",
    ],
)  # fmt: skip
def test_text_without_wildcards_is_unchanged(text):
    assert expand(text, 7, LISTS) == text


def test_escapes_stand_for_themselves():
    assert expand(r"\{a\|b\} {x\|y|x\|y} \(", 0, {}) == r"{a|b} x|y \("


@pytest.mark.parametrize("text", ["a {red|green|blue} owl", "a __colours__ owl"])
def test_choices_follow_the_numbers_of_the_seed(text):
    """Choice n is made by number n of Python's generator, whose sequence is the same in every version."""
    for seed in range(50):
        pick = LISTS["colours"][int(random.Random(seed).random() * 3)]
        assert expand(text, seed, LISTS) == f"a {pick} owl"


def test_other_words_change_no_choice():
    def choices(text: str) -> list[str]:
        return [expand(text, seed, LISTS).split()[-1] for seed in range(30)]

    assert choices("{a|b} {1|2|3}") == choices("quite {c|d} words and {1|2|3}")
    assert len(set(choices("{a|b} {1|2|3}"))) == 3


def test_everything_is_chosen_at_some_time():
    found = {expand("{|{dark|light} }{red|__animals/small__}", seed, LISTS) for seed in range(400)}
    animals = ["a grey mouse", "a white mouse", *(f"a {colour} frog" for colour in LISTS["colours"])]
    assert found == {tone + what for tone in ("", "dark ", "light ") for what in ("red", *animals)}


@pytest.mark.parametrize(
    ("text", "share"),
    [("{3::red|blue}", 0.75), ("{ .5::red|0.5::blue}", 0.5), ("{red|3::{blue|blue}}", 0.25), ("{0::blue|2::red}", 1.0)],
)
def test_weights(text, share):
    counts = Counter(expand(text, seed, {}) for seed in range(2000))
    assert set(counts) <= {"red", "blue"}
    assert abs(counts["red"] / 2000 - share) < 4 * (share * (1 - share) / 2000) ** 0.5 + 1e-9


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a {red|blue owl", r"the { at character 3 of the prompt 'a {red\|blue owl' is never closed"),
        ("a red} owl", "the } at character 6 of the prompt .* closes nothing"),
        ("{a|{b}", "character 1 .* never closed"),
        ("__colors__", r"unknown wildcard 'colors', \d+ are known; did you mean 'colours'"),
        ("__zzzzzz__", "unknown wildcard 'zzzzzz'.* that has zzzzzz.txt"),
        ("{x|__colors__}" * 20, "unknown wildcard 'colors'"),
        ("__empty__", "the wildcard 'empty' is empty"),
        ("__loop__", "loop -> back -> loop go in a circle"),
        ("__broken__", "character 3 of a line of the wildcard 'broken'"),
        ("__twice0__", "more than 1000 choices"),
        ("__deep0__", "deep9 -> deep10 are more than 10 deep"),
        ("{" * 5000 + "}" * 5000, "more than 10 deep"),
        ("{-1::a|b}", "weight -1; it must be a number from 0 to 1,000,000"),
        ("{1.2.3::a|b}", "weight 1.2.3"),
        ("{1" + "0" * 400 + "::a|b}", "it must be a number from 0"),
        ("{0::a|0::b}", "weights are all 0"),
        ("{2$$a|b}", r"has '{2\$\$'; only one choice"),
        ("{ 1-2$$ and $$a|b}", "only one choice"),
        ("${season=!{a|b}}", r"has '\${'"),
    ],
)
def test_faults_of_wildcards(text, said):
    with pytest.raises(UsageError, match=said):
        expand(text, 0, LISTS)


def test_wildcards_of_a_folder(tmp_path):
    inside, outside = tmp_path / "lists", tmp_path / "outside"
    (inside / "animals").mkdir(parents=True)
    outside.mkdir()
    (outside / "secret.txt").write_text("a secret\n")
    (inside / "colours.txt").write_bytes(b"\xef\xbb\xbfred\r\n\r\n# comment\n  dark green \nbl\xc3\xa5")
    (inside / "animals" / "v1.2.txt").write_text("owl # night")
    (inside / "none.txt").write_text("\n#\n")
    (inside / "notes.md").write_text("no list")
    os.symlink(outside / "secret.txt", inside / "secret.txt")
    os.symlink(outside, inside / "folder")
    os.symlink(inside, inside / "animals" / "round")
    os.symlink("colours.txt", inside / "colors.txt")
    colours = ("red", "dark green", "blå")
    assert read_wildcards(inside) == {
        "animals/v1.2": ("owl # night",), "colors": colours, "colours": colours, "none": ()
    }  # fmt: skip


def test_faults_of_a_folder(tmp_path):
    with pytest.raises(UsageError, match="nowhere is not a folder"):
        read_wildcards(tmp_path / "nowhere")
    (tmp_path / "old.txt").write_bytes("one\nblå\n".encode("latin-1"))
    with pytest.raises(UsageError, match=r"old\.txt, line 2: this is not UTF-8"):
        read_wildcards(tmp_path)


# -- the matrix -------------------------------------------------------------------------------------------------------


def test_matrix_in_the_order_of_a1111():
    expected = ["a taco", "a taco, on fire", "a taco, at night", "a taco, on fire, at night"]
    assert matrix("a taco|on fire|at night") == expected
    assert matrix(" a taco, | on fire ,| at night") == expected
    assert matrix("a|b|c|d")[4:6] == ["a, d", "a, b, d"]
    assert matrix(" as it is, ") == [" as it is, "]
    assert len(set(matrix("|".join("abcdefghij")))) == 512


def test_matrix_leaves_wildcards_whole():
    combinations = matrix(r"a {red|{dark|light} blue} owl|x\|y")
    assert combinations == ["a {red|{dark|light} blue} owl", r"a {red|{dark|light} blue} owl, x\|y"]
    assert expand(combinations[1], 1, {}).endswith(" owl, x|y")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("|".join("abcdefghijk"), "11 parts of a prompt are 1,024 pictures; give at most 10"),
        ("a|" * 20_000 + "a", r"are 2\^20000 pictures"),
        ("a||b", "a part .* is empty"),
        ("|b", "a part .* is empty"),
        ("a {b|c", "never closed"),
    ],
)
def test_faults_of_a_matrix(text, said):
    with pytest.raises(UsageError, match=said):
        matrix(text)


# -- files of prompts -------------------------------------------------------------------------------------------------


def test_a_prompt_a_line():
    lines = ["\ufeffan owl\n", "\n", "# birds\n", '  {"prompt": "x"} \r\n', "a taco # hot"]
    found = [{"prompt": "an owl"}, {"prompt": '{"prompt": "x"}'}, {"prompt": "a taco # hot"}]
    assert list(read_prompts(lines, "txt", "stdin")) == found


def test_an_object_a_line():
    rows = [
        {"prompt": "一只🦉", "steps": 30, "guidance": 2, "negative": "rain", "n": 4},
        {"prompt": ["a", "b"], "seed": [1, 2], "height": 64, "scheduler": None},
    ]
    lines = [json.dumps(rows[0], ensure_ascii=False) + "\n", " \n", json.dumps(rows[1])]
    first, second = read_prompts(lines, "jsonl", "p.jsonl")
    assert Request(**first) == Request(
        prompt="一只🦉", num_inference_steps=30, guidance_scale=2, negative_prompt="rain", num_images_per_prompt=4
    )
    assert second == rows[1]


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_lines_are_read_one_by_one(kind):
    """An endless file, and a fault in it that is reported only when its line is reached."""
    line = {"txt": "an owl", "jsonl": '{"prompt": "an owl"}'}[kind]
    endless = read_prompts(itertools.repeat(line), kind, "endless")
    assert list(itertools.islice(endless, 1000)) == [{"prompt": "an owl"}] * 1000


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("an owl", "this is not JSON .*column 1"),
        ('{"prompt": "a",}', "this is not JSON"),
        ('["a"]', "no JSON object"),
        ('"a"', "no JSON object"),
        ("{}", "there is no prompt"),
        ('{"steps": 3}', "there is no prompt"),
        ('{"prompt": null}', "there is no prompt"),
        ('{"prompt": " "}', "prompt is ' '; it must be words"),
        ('{"prompt": 3}', "prompt is 3"),
        ('{"prompt": [["a"]]}', "it must be words"),
        ('{"prompt": "a", "stepz": 3}', "unknown field 'stepz'; did you mean 'steps'"),
        ('{"prompt": "a", "Seed": 3}', "unknown field 'Seed'; did you mean 'seed'"),
        ('{"prompt": "a", "steps": "3"}', "num_inference_steps is '3'; it must be a whole number from 1 to 1000"),
        ('{"prompt": "a", "steps": 0}', "num_inference_steps is 0"),
        ('{"prompt": "a", "seed": true}', "seed is True"),
        ('{"prompt": "a", "n": null}', "num_images_per_prompt is None"),
        ('{"prompt": "a", "eta": {"b": 1}}', "eta is {'b': 1}"),
        ('{"prompt": "a", "prompt": "b"}', "'prompt' is said twice"),
        ('{"prompt": "a", "steps": 3, "num_inference_steps": 3}', "'num_inference_steps' is said twice"),
        ('{"prompt": "a", "guidance": NaN}', "NaN is no number"),
        ('{"prompt": "a", "guidance": -Infinity}', "-Infinity is no number"),
        ('{"prompt": "a", "guidance": 1e999}', "guidance_scale is inf"),
        ('{"prompt": "a", "guidance": 1' + "0" * 400 + "}", "."),
        ('{"prompt": "a", "guidance": 1' + "0" * 5000 + "}", "a number that is too long"),
        ('{"prompt": "a", "x": ' + "[" * 100_000, "nested too deep|not JSON"),
        ('{"prompt": "a \\ud83e owl"}', "half a surrogate pair"),
    ],
)
def test_faults_of_a_line_are_named(line, said):
    lines = iter(['{"prompt": "an owl"}', "", line])
    prompts = read_prompts(lines, "jsonl", "p.jsonl")
    assert next(prompts) == {"prompt": "an owl"}
    with pytest.raises(UsageError, match=rf"^p\.jsonl, line 3: .*({said})"):
        next(prompts)


def test_faults_of_text(tmp_path):
    file = tmp_path / "old.txt"
    file.write_bytes("an owl\nblå\n".encode("latin-1"))
    with file.open(encoding="utf-8") as lines, pytest.raises(UsageError, match="old is not UTF-8 text"):
        list(read_prompts(lines, "txt", "old"))
    with pytest.raises(UsageError, match="unknown kind of prompts 'json'; did you mean 'jsonl'"):
        list(read_prompts([], "json", "p.json"))  # type: ignore[arg-type]


def test_prompts_need_no_torch():
    script = "import sys, ldm.prompts; print({'torch', 'numpy', 'PIL'} & set(sys.modules))"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n", done.stderr
