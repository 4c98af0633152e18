"""Training a LoRA: what changes and what does not, runs that stop and go on, and the file in stock diffusers.

That loss and gradients are those of diffusers with peft is held in test_lora_oracle.py; several processes in
test_world.py.
"""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.adapters.matching import fit
from ldm.adapters.names import book_of
from ldm.adapters.reading import read_adapter
from ldm.checkpoints.components import Components
from ldm.checkpoints.safe import file_sha256
from ldm.errors import LdmError, NumericalError, UsageError
from ldm.interop import to_diffusers
from ldm.pipeline import Pipeline
from ldm.training.checkpointing import checkpoint_blocks
from ldm.training.loop import explained
from ldm.training.lora import LoRADiffusion, opened, steps, train_lora, trainee_of
from ldm.training.lora_batches import LoRABatches
from ldm.training.lora_config import LoRAConfig
from ldm.training.plan import Run
from ldm.training.record import rows_of
from ldm.training.state import newest, states

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six captioned pictures of 16 x 16 and 16 x 24 pixels."""
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(6):
        size = (16, 24 if i > 3 else 16, 3)
        Image.fromarray(draw.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"an owl, number {i}")
    return folder


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Plotting takes longer than these runs."""
    if request.function is not test_a_run_leaves_what_people_look_for:
        monkeypatch.setattr("ldm.training.record.plot", lambda log, path: None)


@pytest.fixture
def told(model: Path, pictures: Path, tmp_path: Path) -> dict[str, Any]:
    """Options of a run that takes a second."""
    return {
        "data": str(pictures), "model": str(model), "output_dir": str(tmp_path / "out"), "max_train_steps": 6,
        "train_batch_size": 2, "rank": 2, "resolution": 16, "bucket_step": 8, "min_side": 8, "validation_steps": 100,
        "validation_prompt": ("an owl",), "checkpointing_steps": 100, "logging_steps": 1, "device": "cpu",
        "lr_scheduler": "constant", "num_held_out": 1,
        "learning_rate": 0.01,
    }  # fmt: skip


def trained(told: dict[str, Any], **options: Any) -> Path:
    adapter = train_lora(**(told | options)).adapter
    assert adapter is not None
    return adapter


def begun(told: dict[str, Any], **options: Any) -> tuple[Run, LoRADiffusion, LoRABatches]:
    """A run that is ready for its first step, what it trains not attached yet."""
    run = opened(LoRAConfig(**(told | options)))
    for network in run.components.networks.values():
        network.requires_grad_(False)
    batches = LoRABatches(run.config, run.components, run.material)
    list(batches.fill())
    trainee, _ = trainee_of(run.config, run.components)
    return run, LoRADiffusion(run.config, run.components, trainee), batches


def bits(c: Components) -> dict[str, torch.Tensor]:
    return {f"{n}.{k}": v.clone() for n, net in c.networks.items() for k, v in net.state_dict().items()}


# -- what is trained ---------------------------------------------------------------------------------------------------


def test_a_run_leaves_what_people_look_for(told: dict[str, Any]) -> None:
    adapter = trained(told, validation_steps=3, checkpointing_steps=2, report_to="tensorboard")
    folder = Path(told["output_dir"])
    assert adapter == folder / "out.safetensors"
    names = {path.name for path in folder.iterdir()}
    assert {"out.safetensors", "README.md", "curve.png", "progress.png", "log.jsonl", "state-4", "state-6"} <= names
    assert [path.name for path in states(folder)] == ["state-4", "state-6"]
    assert [path.name for path in sorted((folder / "samples").iterdir())] == [f"{n:07}.png" for n in (0, 3, 6)]
    rows = rows_of(folder / "log.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(row["lr"] == 0.01 and row["skipped"] == 0 and np.isfinite(row["loss"]) for row in rows)
    assert [row["step"] for row in rows if "held_out_loss" in row] == [2, 3, 4, 6]
    with Image.open(folder / "progress.png") as sheet, Image.open(folder / "samples" / "0000000.png") as row:
        assert sheet.height > 3 * row.height
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "logs"))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [(row["step"], pytest.approx(row["loss"], rel=1e-5)) for row in rows]


def test_only_the_factors_change(told: dict[str, Any]) -> None:
    """In float32, over a base that is bit by bit as it was and gets no gradients."""
    run = opened(LoRAConfig(**told))
    before = bits(run.components)
    for _ in steps(run):
        pass
    assert all(map(torch.equal, bits(run.components).values(), before.values()))
    assert all(p.grad is None for network in run.components.networks.values() for p in network.parameters())
    book = book_of(run.components.networks)
    layers = fit(read_adapter(run.result.adapter, book), book.modules, "the model").adapter.layers
    assert layers and all(t.dtype == torch.float32 for layer in layers.values() for t in layer.tensors.values())
    assert all(layer.tensors["lora_up.weight"].abs().max() > 0 for layer in layers.values())


def test_a_base_of_sixteen_bits_learns_in_thirty_two(told: dict[str, Any]) -> None:
    for dtype in ("bf16", "fp16"):
        run, objective, batches = begun(told, dtype=dtype)
        with objective.trainee.attached(run.components.networks):
            loss, _ = objective(batches[0], 0)
            loss.backward()
        assert next(run.components.unet.parameters()).dtype != torch.float32
        for parameter in objective.trainee.parameters():
            assert parameter.dtype == parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()


def test_backward_stops_below_the_first_adapted_layer(told: dict[str, Any]) -> None:
    """What comes before it computes nothing that has gradients."""
    run, objective, batches = begun(told, targets=("up_blocks.*.attn2.to_q",))
    seen: dict[str, bool] = {}
    unet = run.components.unet

    def remember(name: str) -> Any:
        return lambda module, args, y: seen.update({name: (y[-1] if isinstance(y, list) else y).requires_grad})

    for name in ("conv_in", "time_embedding", "down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "conv_out"):
        unet.get_submodule(name).register_forward_hook(remember(name))
    with objective.trainee.attached(run.components.networks):
        objective(batches[0], 0)[0].backward()
    assert seen == dict.fromkeys(seen, False) | {"up_blocks.0": True, "conv_out": True}


@pytest.mark.parametrize("options", [{}, {"train_text_encoder": True, "targets": ("attention", "feed-forward")}])
def test_checkpointing_changes_no_gradient(told: dict[str, Any], options: dict[str, Any]) -> None:
    found = []
    for again in (False, True):
        run, objective, batches = begun(told, **options)
        if again:
            checkpoint_blocks(run.components.networks.values())
        with objective.trainee.attached(run.components.networks):
            for layer in objective.trainee.parameters():  # up is zero at first, and down would have no gradient
                torch.nn.init.normal_(layer, std=0.1, generator=torch.Generator().manual_seed(1))
            objective(batches[0], 0)[0].backward()
        found.append([p.grad for p in objective.trainee.parameters()])
    assert all(a is not None and a.abs().max() > 0 for a in found[0])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7 * float(a.abs().max()))


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"train_text_encoder": True, "lora_alpha": 1.0}])
def test_stock_diffusers_draws_the_same(told: dict[str, Any], model: Path, kind: dict[str, Any]) -> None:
    adapter = trained(told, learning_rate=0.05, **kind)
    ours, stock = Pipeline.from_pretrained(model), to_diffusers(Pipeline.from_pretrained(model))
    stock.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "guidance_scale": 5.0, "height": 16, "width": 16, "output_type": "np"}
    plain = ours("an owl", seed=3, **options).images
    ours.load_lora(adapter)
    stock.load_lora_weights(adapter)
    mine = ours("an owl", seed=3, **options).images
    theirs = stock("an owl", generator=torch.Generator().manual_seed(3), **options).images
    assert np.abs(mine - theirs).max() <= 1e-4 < 1e-2 < np.abs(mine - plain).max()


def test_the_samples_are_what_the_file_draws(told: dict[str, Any], model: Path) -> None:
    """The last row of pictures, drawn with the adapter attached, and the file loaded afresh."""
    adapter = trained(told, learning_rate=0.05, ema_decay=0.5)
    ours = Pipeline.from_pretrained(model)
    ours.load_lora(adapter)
    with Image.open(Path(told["output_dir"]) / "samples" / "0000006.png") as sheet:
        shown = np.asarray(sheet.convert("RGB")).astype(int)
    drawn = np.asarray(ours("an owl", seed=0).images[0]).astype(int).repeat(16, 0).repeat(16, 1)
    places = [
        np.abs(shown[y : y + 256, x : x + 256] - drawn).max()
        for y in range(shown.shape[0] - 255) for x in range(shown.shape[1] - 255)
    ] if min(shown.shape[:2]) >= 256 else [255]  # fmt: skip
    assert min(places) <= 1


# -- words, classes ----------------------------------------------------------------------------------------------------


def test_a_word_alone_and_with_an_adapter(told: dict[str, Any], model: Path) -> None:
    word = {"placeholder_token": "zorbik", "initializer_token": "owl", "instance_prompt": "", "num_vectors": 2}
    alone = train_lora(**(told | word | {"rank": 0}))
    assert alone.adapter is None and alone.embedding is not None
    pipeline = Pipeline.from_pretrained(model)
    assert pipeline.load_textual_inversion(alone.embedding) == "zorbik"
    both = train_lora(**(told | word | {"output_dir": told["output_dir"] + "2", "train_text_encoder": True}))
    assert both.adapter is not None and both.embedding is not None
    pipeline = Pipeline.from_pretrained(model)
    pipeline.load_textual_inversion(both.embedding)
    pipeline.load_lora(both.adapter)
    assert pipeline("a zorbik", seed=0).images


def test_the_class_is_drawn_and_weighed(told: dict[str, Any]) -> None:
    told |= {"class_prompt": "an owl", "num_class_images": 3, "prior_loss_weight": 0.25}
    told |= {"gradient_accumulation_steps": 2, "train_batch_size": 1}
    run = opened(LoRAConfig(**told))
    preparing = [p.preparing for p in steps(run) if p.preparing]
    assert preparing[:3] == ["class pictures"] * 3
    assert len(list((Path(told["output_dir"]) / "class").glob("*.png"))) == 3
    run, objective, batches = begun(told)
    with objective.trainee.attached(run.components.networks):
        for number, weight in ((0, 1.0), (1, 0.25)):
            batch = batches[number]
            assert batch.weight.tolist() == [weight]
            alone = objective.losses(batch).mean()
            assert torch.allclose(objective(batch, number)[0], weight * alone, rtol=1e-6)


# -- stopped and gone on -----------------------------------------------------------------------------------------------

HARD: dict[str, Any] = {
    "train_text_encoder": True, "placeholder_token": "zorbik", "gradient_accumulation_steps": 2, "random_flip": True,
    "caption_dropout_rate": 0.3, "shuffle_caption": True, "ema_decay": 0.9, "noise_offset": 0.1, "token_lr": 0.01,
    "input_perturbation": 0.1, "optimizer": "adamw", "lr_scheduler": "cosine", "lr_warmup_steps": 2,
}  # fmt: skip


def hashes(folder: Path) -> dict[str, str]:
    """Of the last state and the results; the file's time of day apart."""
    found = {str(path.relative_to(folder)): file_sha256(path) for path in states(folder)[-1].glob("*.safetensors")}
    return found | {path.name: file_sha256(path) for path in folder.glob("embeddings/*")}


@pytest.mark.parametrize("options", [HARD, HARD | {"optimizer": "prodigy", "learning_rate": 1.0, "token_lr": 1.0}])
def test_stopped_at_any_step_a_run_ends_as_if_unbroken(
    told: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    told |= options | {"max_train_steps": 5, "text_encoder_lr": None}
    trained(told)
    whole = hashes(Path(told["output_dir"]))
    told["output_dir"] = str(tmp_path / "again")
    for at in (2, 4):  # sent after a first step, the signal is heeded after the next
        for progress in steps(opened(LoRAConfig(**told))):
            if not progress.preparing and progress.step == at - 1:
                os.kill(os.getpid(), signal.SIGTERM)
        assert (progress.step, progress.stopped) == (at, signal.SIGTERM)
        assert progress.saved == newest(Path(told["output_dir"]))
    trained(told)
    assert hashes(Path(told["output_dir"])) == whole


def test_what_changed_is_named(told: dict[str, Any], pictures: Path, tmp_path: Path, model: Path) -> None:
    trained(told)
    with pytest.raises(LdmError, match=r"state-6 was saved by a run with rank 2, not 3; "):
        trained(told, rank=3)
    other = tmp_path / "other"
    shutil.copytree(pictures, other)
    (other / "0.txt").write_text("a pizza")
    with pytest.raises(LdmError, match=r"other pictures \(1 with another caption \(0.png\)\)"):
        trained(told, data=str(other))
    (other / "0.txt").write_text("an owl, number 0")
    before = trained(told).read_bytes()
    trained(told, data=str(other), max_train_steps=7)  # the same pictures elsewhere, and more steps
    assert newest(Path(told["output_dir"])).name == "state-7"
    fresh = trained(told, resume_from_checkpoint="no", rank=3)
    assert fresh.read_bytes() != before and [p.name for p in states(Path(told["output_dir"]))] == ["state-6"]
    assert [row["step"] for row in rows_of(Path(told["output_dir"]) / "log.jsonl")] == [1, 2, 3, 4, 5, 6]


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_steps_without_a_finite_loss_are_left_out(
    told: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As if they had not been, and counted; after a limit the run stops, the last state is sound."""
    plain = LoRADiffusion.forward

    def broken(self: LoRADiffusion, batch: Any, number: int) -> Any:
        loss, figures = plain(self, batch, number)
        return loss * (float("nan") if number in (2, 3) else 1.0), figures

    monkeypatch.setattr(LoRADiffusion, "forward", broken)
    trained(told, checkpointing_steps=2)
    rows = rows_of(Path(told["output_dir"]) / "log.jsonl")
    assert [row["skipped"] for row in rows] == [0, 0, 1, 2, 2, 2]
    assert [("loss" in row) for row in rows] == [True, True, False, False, True, True]
    assert "step 3 is left out" in caplog.text
    told["output_dir"] = str(tmp_path / "strict")
    with pytest.raises(NumericalError, match="not finite at step 4, for the 2th time; lower the learning rate"):
        trained(told, checkpointing_steps=2, max_skipped_steps=1)
    state = newest(Path(told["output_dir"]))
    assert state is not None and state.name == "state-2"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "a lower batch size"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "gradient checkpointing"),
        (MemoryError(), "a lower batch size"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "goes on from the last state"),
    ],
)  # fmt: skip
def test_what_gave_out_is_said(error: Exception, said: str) -> None:
    with pytest.raises(LdmError, match=said), explained():
        raise error
    with pytest.raises(RuntimeError, match="another"), explained():
        raise RuntimeError("another")


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"rank": -1}, UsageError, "rank is -1; it must be at least 0"),
    ({"rank": 0}, UsageError, "a rank of 0 trains no adapter"),
    ({"rank": 10_000}, UsageError, "rank"),
    ({"targets": ("attentoin",)}, UsageError, "attentoin"),
    ({"optimizer": "adam"}, UsageError, "adamw"),
    ({"no_unet": True}, UsageError, "leaves nothing to adapt"),
    ({"device": "tpu"}, UsageError, "auto, cpu or cuda"),
    ({"prediction_type": "v_prediktion"}, UsageError, "v_prediction"),
    ({"max_timestep": 2000}, UsageError, "1000"),
    ({"learning_rate": float("nan")}, UsageError, "learning_rate is nan"),
    ({"model": "nowhere"}, LdmError, "nowhere"),
    ({"data": "nowhere"}, UsageError, "nowhere"),
    ({"init_adapter": "nowhere.safetensors"}, LdmError, "nowhere"),
    ({"ema_decay": 1.0}, UsageError, "below 1"),
]


@pytest.mark.parametrize(("options", "kind", "said"), REFUSED, ids=[" ".join(o) for o, _, _ in REFUSED])
def test_bad_input_is_one_sentence(told: dict[str, Any], options: dict[str, Any], kind: type, said: str) -> None:
    with pytest.raises(kind, match=said) as caught:
        trained(told, **options)
    assert "\n" not in str(caught.value)
    assert not list(Path(told["output_dir"]).glob("*.safetensors"))


def test_unknown_options_name_the_nearest(told: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="max_train_steps"):
        train_lora(**told, max_train_step=3)


def test_it_is_a_public_name() -> None:
    import ldm as package

    assert package.train_lora is train_lora
