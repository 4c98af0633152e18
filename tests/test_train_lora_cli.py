"""`ldm train-lora`: every option by every name, what it says before, while and after it trains, how it is stopped, and
the README.md it leaves.
"""

import json
import os
import shlex
import signal
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import typer
import yaml
from helpers import Done, files, pixels, refused
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image
from safetensors.torch import load_file
from typer.main import get_command

import ldm.training.lora
from ldm.checkpoints.folder import open_folder
from ldm.cli import app
from ldm.data.buckets import Buckets, Size
from ldm.data.pictures import Picture
from ldm.errors import LdmError
from ldm.training.card import write_card
from ldm.training.lora_config import NAMED, LoRAConfig
from ldm.training.plan import settled

pytestmark = pytest.mark.usefixtures("quick")
COMMAND = get_command(app).commands["train-lora"]
FIELDS = {field.name: field for field in fields(LoRAConfig)}
THEIRS = """pretrained_model_name_or_path revision variant dataset_name train_data_dir image_column caption_column
validation_prompt output_dir seed resolution random_flip train_batch_size num_train_epochs max_train_steps
gradient_accumulation_steps gradient_checkpointing learning_rate snr_gamma lr_scheduler lr_warmup_steps
dataloader_num_workers adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm prediction_type report_to
mixed_precision checkpointing_steps checkpoints_total_limit resume_from_checkpoint noise_offset rank instance_prompt
class_prompt class_data_dir num_class_images prior_loss_weight train_text_encoder text_encoder_lr lr_num_cycles lr_power
cache_dir placeholder_token initializer_token num_vectors validation_steps lora_alpha use_dora"""
"""Options of diffusers' scripts train_text_to_image_lora, train_dreambooth_lora(_sdxl) and textual_inversion (0.42)
that mean the same here.
"""


@pytest.fixture
def zorps(tmp_path) -> Path:
    """A folder beside the run's with four captioned pictures."""
    folder, noise = tmp_path / "zorps", np.random.default_rng(0)
    folder.mkdir()
    for i in range(4):
        Image.fromarray(noise.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a zorp, {i}")
    return folder


# -- options ----------------------------------------------------------------------------------------------------------


def other_than(name: str) -> Any:
    """A value that is not the field's default."""
    default = FIELDS[name].default
    if name in NAMED:
        return next(value for value in NAMED[name] if value != default)
    special = {"data": ("a", "b"), "targets": ("to_q", "to_k"), "validation_prompt": ("x", "y z"), "ema_decay": 0.5,
               "resume_from_checkpoint": "no", "lora_alpha": 2.5, "snr_gamma": 5.0}  # fmt: skip
    special |= {"learning_rate": 0.5, "text_encoder_lr": 0.25, "no_unet": True, "train_text_encoder": True}
    if name in special:
        return special[name]
    kind = str(FIELDS[name].type)
    if "bool" in kind:
        return True
    return "words" if "str" in kind else 0.125 if "float" in kind else 9


EVERY = {name: other_than(name) for name in FIELDS}


@pytest.fixture
def asked(monkeypatch) -> Iterator[list[LoRAConfig]]:
    """The configurations that commands would have run."""
    found: list[LoRAConfig] = []

    def opened(config: LoRAConfig) -> None:
        found.append(config)
        raise LdmError("enough")

    monkeypatch.setattr(ldm.training.lora, "opened", opened)
    yield found


def test_options_files_and_settings_say_the_same(run, asked):
    """Of every field, by its option in hyphens and in underscores, in a YAML file, and by --set."""
    wanted = LoRAConfig(**EVERY)
    assert all(getattr(wanted, name) != field.default for name, field in FIELDS.items())
    flags = {p.name: p.opts[0] for p in COMMAND.params if p.name in FIELDS}
    assert flags == {name: f"--{name.replace('_', '-')}" for name in FIELDS}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in EVERY.items()}
    for spell in (lambda flag: flag, lambda flag: "--" + flag[2:].replace("-", "_")):
        words = [
            word
            for name, value in EVERY.items()
            for one in (value if isinstance(value, tuple) else (value,))
            for word in (spell(flags[name]), *([] if one is True else [one]))
        ]
        run("train-lora", *words)
    Path("a.yaml").write_text(yaml.safe_dump(plain))
    run("train-lora", "--config", "a.yaml")
    settings = [word for name, value in plain.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    run("train-lora", *settings)
    run("train-lora", "--config", "a.yaml", "--rank", "9", "--set", "use_dora=false", "-o", "c")
    assert asked == [*[wanted] * 4, replace(wanted, rank=9, use_dora=False, output_dir="c")]


def test_names_that_diffusers_scripts_have(run, asked):
    """And others that the fields name, such as --lr."""
    kinds = {p.opts[0]: p for p in COMMAND.params}
    for name in (*THEIRS.split(), *(other for field in FIELDS.values() for other in field.metadata["flags"])):
        context = typer.Context(COMMAND)
        context.token_normalize_func = COMMAND.context_settings["token_normalize_func"]
        own = f"--{context.token_normalize_func(name)}"
        assert own in kinds or f"-{name}" in kinds["--output-dir"].opts, name
    run("train-lora", "--train_data_dir", "a", "--steps", "3", "--lr", "2", "--batch-size", "5", "--token", "<z>")
    (found,) = asked
    assert (found.data, found.max_train_steps, found.learning_rate) == (("a",), 3, 2.0)
    assert (found.train_batch_size, found.placeholder_token) == (5, "<z>")


def test_names_are_completed():
    options = {p.name: p for p in COMMAND.params}
    for name, known in NAMED.items():
        said = [item.value for item in options[name].shell_complete(typer.Context(COMMAND), known[-1][:2])]
        assert said == [value for value in known if value.startswith(known[-1][:2])], name


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], ("no pictures", "--data")),
        (["--data", "x", "--rank", "0"], ("a rank of 0",)),
        (["--data", "x", "--optimizer", "adamm"], ("'adamm'", "'adamw'")),
        (["--data", "x", "--rank", "few"], ("'few' is no whole number",)),
        (["--data", "x", "--max_trane_steps", "3"], ("--max-trane-steps", "--max-train-steps")),
        (["--data", "x", "--set", "rnak=3"], ("'rnak'", "'rank'")),
        (["--data", "x", "--set", "rank=few"], ("rank", "'few'")),
        (["--config", "bad.yaml"], ("bad.yaml", "'rnak'", "'rank'")),
        (["--config", "worse.yaml"], ("worse.yaml", "seed is -1")),
        (["--config", "none.yaml"], ("none.yaml",)),
    ],
)
def test_what_is_wrong_is_said(run, asked, tmp_path, words, said):
    Path("bad.yaml").write_text("{data: x, rnak: 3}")
    Path("worse.yaml").write_text("{data: x, seed: -1}")
    refused(run("train-lora", *words), 2, *said)
    assert asked == [] and files(tmp_path) == ["bad.yaml", "worse.yaml"]


def test_before_any_work(run, asked, monkeypatch, tmp_path):
    """An output folder that cannot be, and packages that are missing."""
    Path("file").write_text("mine")
    refused(run("train-lora", "--data", "x", "-o", "file"), 1, "cannot write file/log.jsonl", "file is not a folder")
    monkeypatch.setattr("ldm.cli.common.find_spec", lambda name: None if name == "accelerate" else True)
    refused(run("train-lora", "--data", "x"), 1, "accelerate is not installed", "'ldm-toolkit[train]'")
    assert asked == [] and files(tmp_path) == ["file"]


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(run, model, zorps) -> Any:
    """The command on those pictures."""

    def command(*words: object) -> Done:
        small = ["--rank", "2", "--train-batch-size", "2", "--checkpointing-steps", "9", "--device", "cpu"]
        done: Done = run("train-lora", "--data", "zorps", "--model", model, *small, *words)
        return done

    return command


def test_a_dry_run_tells_and_leaves_nothing(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.training.plan.measured_rate", lambda *_: 1e9)
    before = files(tmp_path)
    done = trained("--dry-run", "--json", "-o", "out/zorp", "--max_train_steps", "6")
    told = json.loads(done.out)
    assert (done.code, done.err) == (0, "")
    assert told["config"]["rank"] == 2 and told["epochs"] == 3 and told["bytes"]["step"] > told["bytes"]["trained"]
    monkeypatch.setattr("ldm.training.plan.step_work", lambda *_: ldm.training.counting.Work(1 << 30, 4e9, 1e9))
    done = trained("--dry-run", "-o", "out/zorp", "--max_train_steps", "6")
    rows = {line[:9].strip(): line[9:] for line in done.out.splitlines()}
    assert done.code == 0 and {"model", "data", "trains", "steps", "memory", "time", "files"} <= rows.keys()
    assert rows["steps"].startswith("6 of 2 pictures: each comes 3.0 times") and "1,024 MiB a step" in rows["memory"]
    assert files(tmp_path) == before


def test_it_trains_is_stopped_and_goes_on(trained, run, model, monkeypatch, tmp_path):
    """SIGTERM and Ctrl-C after a step: 143 and 130, where it goes on, and the end is as if unbroken. Then the command
    it tells draws with it.
    """
    whole, words = ldm.training.lora.steps, ["--max-train-steps", "6", "--validation-steps", "6"]
    assert trained(*words, "-o", "unbroken").out == "unbroken/unbroken.safetensors\n"

    def stopped(run: Any) -> Iterator[Any]:
        for progress in whole(run):
            yield progress
            if not progress.preparing and (number := sent.pop(progress.step, 0)):
                os.kill(os.getpid(), number)

    sent = {1: signal.SIGTERM, 3: signal.SIGINT}
    monkeypatch.setattr(ldm.training.lora, "steps", stopped)
    for code, step in ((143, 2), (130, 4)):
        done = trained(*words, "-o", "out/zorp")
        assert (done.code, done.out) == (code, ""), done.err
        assert f"stopped; the same command goes on from step {step} (out/zorp/state-{step})" in done.err
    monkeypatch.setattr(ldm.training.lora, "steps", whole)
    done = trained(*words, "-o", "out/zorp", "--json")
    assert done.code == 0 and "goes on from step 4 of 6 (out/zorp/state-4)" in done.err, done.err
    told = json.loads(done.out)
    assert told["adapter"] == "out/zorp/zorp.safetensors" and told["embedding"] is None and told["steps"] == 6
    assert told["figures"]["loss"] > 0 and str(tmp_path) not in Path("out/zorp/README.md").read_text()
    one, other = (load_file(path) for path in ("unbroken/unbroken.safetensors", told["adapter"]))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    (line,) = [line for line in done.err.splitlines() if line.startswith("draw with it: ")]
    drawing = shlex.split(line.removeprefix("draw with it: "))[1:]
    assert drawing[-1] == "a zorp, 0" and run(*drawing, "--seed", "7", "-o", "with.png").code == 0
    assert run("generate", "a zorp, 0", "--model", model, "--seed", "7", "-o", "without.png").code == 0
    assert not np.array_equal(pixels("with.png"), pixels("without.png"))


@pytest.mark.parametrize("words", [[], ["--resume-from-checkpoint", "no"]], ids=" ".join)
def test_stopped_before_the_first_step(trained, monkeypatch, words):
    def steps(run: Any) -> Iterator[Any]:
        yield ldm.training.lora.Progress(1, {}, None, preparing="latents", of=3)
        raise KeyboardInterrupt

    monkeypatch.setattr(ldm.training.lora, "steps", steps)
    done = trained("-o", "out/zorp", *words)
    assert (done.code, done.out) == (130, "")
    assert (
        f"stopped; {' without '.join(['the same command', *[' '.join(words)] * bool(words)])} begins anew" in done.err
    )


# -- the model card ---------------------------------------------------------------------------------------------------

HOSTILE = [
    "</script><b onclick=x>bold</b> <img src=x>",
    "[click](https://bad.example) ![p](https://bad.example/p.png) <https://bad.example> www.bad.example",
    "```\n# heading\n---\nlicense: evil\n---\n| a | b |",
    "`code` ``more`` ````` $(rm) '\"\\ $x$ &lt; \u202e\x1b[31m\ud800",
]


@pytest.mark.parametrize("caption", HOSTILE)
def test_the_card_shows_captions_as_they_are(model, tmp_path, caption):
    """Rendered as CommonMark and read as the hub reads it, nothing that a caption says is done."""
    c = open_folder(model, torch.float32)
    config = settled(LoRAConfig("x", output_dir=str(tmp_path), output_name="zorp", placeholder_token="<z>",
                                instance_prompt=caption, class_prompt=caption), c)  # fmt: skip
    picture, sizes = Picture("0.png", tmp_path / "0.png", caption=caption), Buckets((Size(16, 16),), ((0,),))
    data = SimpleNamespace(pictures=(picture,), held_out=(), class_pictures=(), buckets=sizes)
    made = SimpleNamespace(adapter=tmp_path / "zorp.safetensors", embedding=tmp_path / "zorp-word.safetensors")
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/0000300.png").write_bytes(b"")
    (tmp_path / "log.jsonl").write_text('{"step": 300, "loss": 0.25, "held_out_loss": 0.5}\n{"step": 3')
    write_card(SimpleNamespace(config=config, components=c, material=data, result=made), tmp_path)
    text = (tmp_path / "README.md").read_text("utf-8")
    card = ModelCard(text)
    assert str(tmp_path) not in text and "license" not in card.data.to_dict()
    assert card.data.tags == ["text-to-image", "diffusers", "lora", "diffusers-training", "textual_inversion"]
    assert (card.data.library_name, card.data.instance_prompt) == ("diffusers", "<z>")
    (shown,) = card.data.widget
    assert shown["output"] == {"url": "samples/0000300.png"} and shown["text"].startswith("<z>, ")
    tokens = MarkdownIt("commonmark").enable("table").parse(card.text)
    inner = [child for token in tokens for child in token.children or ()]
    kinds = {token.type for token in (*tokens, *inner)}
    assert not kinds & {"html_block", "html_inline", "link_open", "hr", "code_block"}
    assert [token.attrs["src"] for token in inner if token.type == "image"] == ["samples/0000300.png"]
    blocks = [token for token in tokens if token.type == "fence"]
    assert [token.info for token in blocks] == ["sh", "python"]
    assert shlex.split(blocks[0].content)[-1] == shown["text"]
    compile(blocks[1].content, "card", "exec")
    assert repr(shown["text"]) in blocks[1].content
    assert [token.tag for token in tokens if token.type == "heading_open"] == ["h1", "h2", "h2"]
    cells = [token.content for token in tokens if token.type == "inline"]
    assert {"0.25", "0.5", "loss at the end"} <= {*cells}


def test_the_card_of_a_model_of_the_hub(model, tmp_path):
    """base_model is its name there; a path is none."""
    config = LoRAConfig("x", output_dir=str(tmp_path), instance_prompt="a zorp")
    for name, base in (("owner/name", "owner/name"), ("folder", None), ("the model in the box", None)):
        c = replace(open_folder(model, torch.float32), name=name)
        sizes = Buckets((Size(16, 16),), ((0,),))
        data = SimpleNamespace(pictures=(Picture("0", Path("0")),), held_out=(), class_pictures=(), buckets=sizes)
        made = SimpleNamespace(adapter=tmp_path / "zorp.safetensors", embedding=None)
        write_card(SimpleNamespace(config=settled(config, c), components=c, material=data, result=made), tmp_path)
        card = ModelCard((tmp_path / "README.md").read_text("utf-8"))
        assert card.data.base_model == base and card.data.instance_prompt == "a zorp"
        assert ("--model" in card.text) == (name != "the model in the box")
