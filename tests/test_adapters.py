"""Adapters in a model: attached, folded and merged are one; they come and go without a trace; each run has its own."""

import copy
import itertools
import pickle
import random
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.adapters.adapter import Adapter, Layer
from ldm.adapters.names import book_of
from ldm.adapters.strength import Strength
from ldm.adapters.writing import write_adapter
from ldm.errors import ModelError, UsageError
from ldm.interop import to_diffusers
from ldm.lora import LoRA
from ldm.pipeline import Pipeline
from ldm.recipe import digests

pytestmark = pytest.mark.usefixtures("one_thread")
ATTENTION, TEXT = ("to_q", "to_k", "to_v", "to_out.0"), ("_proj", "fc1", "fc2")
FIELDS: Mapping[str, Any] = {"seed": 3, "num_inference_steps": 4, "output_type": "latent"}


@pytest.fixture
def pipeline(model) -> Pipeline:
    return Pipeline.from_pretrained(model)


def adapter(pipeline: Pipeline, name: str, seed: int, rank: int = 2, convs: bool = True) -> Adapter:
    """Random LoRA layers for attention, the text encoder and the convolutions of a model."""
    draw = torch.Generator().manual_seed(seed)
    layers = {}
    for address, (outputs, inputs, *kernel) in ranked(pipeline).items():
        wanted = address.endswith((*ATTENTION, *TEXT)) or (convs and bool(kernel) and ".resnets." in address)
        if wanted and address.startswith(("unet.", "text_encoder.")):
            down = torch.randn(rank, inputs, *kernel, generator=draw)
            up = torch.randn(outputs, rank, *[1] * len(kernel), generator=draw)
            layers[address] = Layer("lora", {"lora_down.weight": down, "lora_up.weight": up * 0.05}, float(rank))
    return Adapter(layers, name=name)


def ranked(pipeline: Pipeline) -> dict[str, tuple[int, ...]]:
    """The modules that have matrices for weights."""
    modules = book_of(pipeline.components.networks).modules
    return {address: shape for address, shape in modules.items() if len(shape) > 1}


def written(pipeline: Pipeline, folder: Path, name: str, seed: int) -> Path:
    """A file of such an adapter."""
    write_adapter(adapter(pipeline, name, seed), folder / f"{name}.safetensors", book_of(pipeline.components.networks))
    return folder / f"{name}.safetensors"


def drawn(pipeline: Pipeline, prompt: str = "an owl", **fields: Any) -> Tensor:
    return pipeline(prompt, **{**FIELDS, **fields}).latents


def state(pipeline: Pipeline) -> dict[str, Tensor]:
    """Every number of the networks, and where it lies."""
    networks = pipeline.components.networks.items()
    return {f"{name}.{key}": value for name, network in networks for key, value in network.state_dict().items()}


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(("dtype", "bounds"), [(torch.float64, (1e-9, 1e-9)), (torch.float32, (1e-6, 2e-6))], ids=str)
def test_attached_folded_and_merged_are_one(pipeline, tmp_path, dtype, bounds):
    """The forward branch of training, the weights in use while drawing, and a model that was saved and opened again:
    the states of the text, and the network's output. It is deep enough for float32 itself to round by 1e-6.
    """
    path, x, t = (
        written(pipeline, tmp_path, "ink", 1),
        torch.randn(2, 4, 8, 8, dtype=dtype),
        torch.tensor([20.0, 700.0]),
    )

    def made(drawer: Pipeline) -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            text = drawer.text_encoder(["an owl", "a taco"]).context.to(dtype)
            return text, drawer.unet(x, t, text)

    for network in pipeline.components.networks.values():
        network.to(dtype)
    base = made(pipeline)
    branch = LoRA.from_adapter(adapter(pipeline, "ink", 1), pipeline.components.networks).to(dtype)
    with branch.attached(pipeline.components.networks, 0.7):
        attached = made(pipeline)
    assert all(map(torch.equal, made(pipeline), base))
    pipeline.load_lora(path, 0.7)
    folded = made(pipeline)
    for one, two, none, bound in zip(attached, folded, base, bounds, strict=True):
        assert (two - none).abs().max() > 0.01 * two.abs().max()
        assert (one - two).abs().max() <= bound * two.abs().max()
    if dtype == torch.float32:
        pipeline.save_pretrained(tmp_path / "merged")
        assert all(map(torch.equal, made(Pipeline.from_pretrained(tmp_path / "merged")), folded))


def test_every_weight_is_base_and_changes(pipeline, tmp_path):
    """W0 + sum of s (alpha / r) up down in float64, and nothing beside the modules that it is for."""
    first, second = adapter(pipeline, "a", 1), adapter(pipeline, "b", 2, rank=3)
    before = {key: value.clone() for key, value in state(pipeline).items()}
    weights = pipeline.components.weights
    weights.load("a", first, Strength.of("te=0.5:unet=-0.8"))
    weights.load("b", second, Strength.of("1:mid_block=0"))
    assert pipeline.unet
    for key, value in state(pipeline).items():
        address = key.removesuffix(".weight")
        wanted = before[key].double()
        for one, text, unet in ((first, 0.5, -0.8), (second, 1.0, 0.0 if address.startswith("unet.mid") else 1.0)):
            if key.endswith(".weight") and address in one.layers:
                tensors = one.layers[address].tensors
                up, down = (tensors[f"lora_{half}.weight"].double().flatten(1) for half in ("up", "down"))
                strength = text if address.startswith("text_encoder") else unet
                wanted = wanted + strength * (up @ down).reshape(wanted.shape)
        assert (value - wanted).abs().max() <= 1e-6 * wanted.abs().max(), key


@pytest.mark.parametrize("strength", [0, "0", {"te": 0, "unet": 0}, "1:lbw=" + ",".join("0" * 26)])
def test_strength_nought_is_the_base(pipeline, tmp_path, strength):
    before, base = state(pipeline), drawn(pipeline)
    pipeline.load_lora(written(pipeline, tmp_path, "ink", 1), strength)
    assert torch.equal(drawn(pipeline), base)
    assert all(value.data_ptr() == before[key].data_ptr() for key, value in state(pipeline).items())


def test_unloading_brings_the_base_back_whatever_came_before(pipeline, tmp_path):
    before = {key: value.clone() for key, value in state(pipeline).items()}
    files = [written(pipeline, tmp_path, f"{name}", seed) for seed, name in enumerate("abc")]
    alone = {}
    for path in files:
        pipeline.load_lora(path, 0.6)
        alone[path.stem] = drawn(pipeline)
        pipeline.unload_lora()
    dice = random.Random(5)
    for order in itertools.permutations(files):
        for path in order:
            pipeline.load_lora(path, dice.choice([-0.5, 0.6, "0@0,1@1", "mid_block=0"]))
            drawn(pipeline, num_inference_steps=2)
        for path in dice.sample(order, 3)[:2]:
            pipeline.unload_lora(path.stem)
        [left] = pipeline.components.weights.loaded
        pipeline.set_lora(left, 0.6)
        assert torch.equal(drawn(pipeline), alone[left])
        pipeline.unload_lora(left)
        assert equal(state(pipeline), before)


def test_a_change_between_two_draws_leaves_nothing_stale(pipeline, model, tmp_path):
    """Keys and values of the text are computed from the weights of the draw: a fresh pipeline draws the same."""
    path = written(pipeline, tmp_path, "ink", 1)
    pipeline.load_lora(path, 1.0)
    drawn(pipeline)
    pipeline.set_lora("ink", 0.25)
    fresh = Pipeline.from_pretrained(model)
    fresh.load_lora(path, 0.25)
    assert torch.equal(drawn(pipeline), drawn(fresh))


def test_a_run_keeps_the_adapters_it_began_with(pipeline, tmp_path):
    path = written(pipeline, tmp_path, "ink", 1)
    base = drawn(pipeline)
    pipeline.load_lora(path)
    adapted = drawn(pipeline)
    request = pipeline.resolve(pipeline("an owl", **FIELDS).request)
    steps = pipeline.sample(request)
    next(steps)
    pipeline.unload_lora()
    assert torch.equal(drawn(pipeline), base)  # another run, in the middle of the first
    for step in steps:
        last = step
    assert torch.equal(last.latents, adapted)
    assert torch.equal(drawn(pipeline), base)


def test_a_schedule_changes_the_weights_from_step_to_step(pipeline, tmp_path):
    """0@0,1@1 of five steps: as five runs that go on from each other with constant strengths. (Text: 0 all along.)"""
    path = written(pipeline, tmp_path, "ink", 1)
    pipeline.load_lora(path, "0@0,1@1")
    whole = [
        step.x for step in pipeline.sample(pipeline(**{**FIELDS, "prompt": "an owl", "num_inference_steps": 5}).request)
    ]
    request = pipeline.resolve(pipeline(**{**FIELDS, "prompt": "an owl", "num_inference_steps": 5}).request)
    last = None
    for i, strength in enumerate((0, 0.25, 0.5, 0.75, 1)):
        pipeline.set_lora("ink", {"te": 0, "unet": strength})
        last = next(pipeline.sample(request, resume=last))
        assert torch.equal(last.x, whole[i])


def test_prompts_name_adapters(pipeline, tmp_path):
    base = drawn(pipeline)
    pipeline.load_lora(written(pipeline, tmp_path, "ink", 1), 0.7)
    adapted = drawn(pipeline)
    pipeline.set_lora("ink", 0)
    assert torch.equal(drawn(pipeline, "an owl<lora:ink:0.7>"), adapted)
    assert torch.equal(drawn(pipeline), base)
    pipeline.set_lora("ink", 0.7)
    assert torch.equal(drawn(pipeline, "an owl<lora:ink:0>"), base)
    pipeline.unload_lora()
    with pytest.raises(UsageError, match="no adapter is loaded, so none is called 'ink'"):
        drawn(pipeline, "an owl<lora:ink:1>")
    pipeline.lora_dir = tmp_path
    assert torch.equal(drawn(pipeline, "an owl<lora:ink:0.7>"), adapted)
    with pytest.raises(UsageError, match="did you mean 'ink'"):
        drawn(pipeline, "an owl <lora:inc:1>")
    with pytest.raises(UsageError, match="negative prompt names an adapter"):
        drawn(pipeline, negative_prompt="<lora:ink:1>")
    with pytest.raises(UsageError, match="different adapters or strengths"):
        pipeline(["an owl <lora:ink:1>", "an owl"], **FIELDS)
    literal = pipeline("an owl <lora:ink:0.7>", literal=True, **FIELDS)
    assert literal.request.prompts == ("an owl <lora:ink:0.7>",)


def test_threads_with_different_adapters_do_not_meet(pipeline, tmp_path):
    for seed, name in enumerate("ab"):
        pipeline.load_lora(written(pipeline, tmp_path, name, seed), 0)
    prompts = ["an owl", "an owl<lora:a:1>", "an owl<lora:b:-1>", "an owl<lora:a:0@0,1@1>"] * 2
    alone = {prompt: drawn(pipeline, prompt) for prompt in prompts}
    results: dict[int, Tensor] = {}

    def work(i: int) -> None:
        results[i] = drawn(pipeline, prompts[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert all(torch.equal(results[i], alone[prompt]) for i, prompt in enumerate(prompts))


class Yielding(threading.Condition):
    """A condition after which the others always come first."""

    def __exit__(self, *fault: Any) -> None:
        super().__exit__(*fault)
        time.sleep(0.001)


@pytest.mark.parametrize("attempt", range(4))
def test_adapters_come_and_go_while_others_draw(pipeline, tmp_path, attempt):
    """A run keeps what it began with though it is unloaded meanwhile, over and over; the base is whole in the end."""
    pipeline.components.weights._turn = Yielding()
    path, before = written(pipeline, tmp_path, "a", 1), {key: value.clone() for key, value in state(pipeline).items()}
    pipeline.load_lora(path)
    request, results = pipeline("an owl", **{**FIELDS, "num_inference_steps": 12}), list[Tensor]()
    adapted, runs = request.latents, [pipeline.sample(request.request) for _ in range(3)]
    for run in runs:
        next(run)  # each has its adapters now

    def walk(run: Any) -> None:
        results.append([step.latents for step in run][-1])

    threads = [threading.Thread(target=walk, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    loaded = pipeline.components.weights.loaded["a"]
    while any(thread.is_alive() for thread in threads):
        pipeline.unload_lora()
        pipeline.components.weights.load("a", *loaded)
    pipeline.unload_lora()
    assert len(results) == 3 and all(torch.equal(result, adapted) for result in results)
    assert pipeline.unet and equal(state(pipeline), before)


def test_two_runs_by_turns(pipeline, tmp_path):
    pipeline.load_lora(written(pipeline, tmp_path, "a", 1), 0)
    prompts = ("an owl", "an owl<lora:a:1>")
    alone = [drawn(pipeline, prompt) for prompt in prompts]
    runs = [pipeline.sample(pipeline(prompt, **FIELDS).request) for prompt in prompts]
    for steps in zip(*runs, strict=True):
        last = steps
    assert all(torch.equal(step.latents, whole) for step, whole in zip(last, alone, strict=True))


def nan(tensors: Mapping[str, Tensor], i: int) -> dict[str, Tensor]:
    return {name: tensor * float("nan") if i == 3 else tensor for name, tensor in tensors.items()}


def wide(tensors: Mapping[str, Tensor], i: int) -> dict[str, Tensor]:
    return {**tensors, "lora_down.weight": tensors["lora_down.weight"].repeat_interleave(3, 1)}


BREAKERS: dict[str, tuple[Callable[[Mapping[str, Tensor], int], Mapping[str, Tensor]], str]] = {
    "a number that is none": (nan, "not finite|NaN"),
    "other widths": (wide, "model"),
    "one layer too wide": (lambda tensors, i: tensors if i else wide(tensors, i), "only in part"),
}


@pytest.mark.parametrize("case", BREAKERS)
def test_a_failed_load_changes_nothing(pipeline, tmp_path, case):
    from safetensors.torch import save_file

    pipeline.load_lora(written(pipeline, tmp_path, "good", 1), 0.5)
    before, loaded = drawn(pipeline), dict(pipeline.components.weights.loaded)
    change, said = BREAKERS[case]
    book = book_of(pipeline.components.networks)
    layers = adapter(pipeline, "bad", 2).layers
    tensors = {
        f"{book.spelled(address, 'kohya')}.{name}": tensor.contiguous()
        for i, (address, layer) in enumerate(layers.items())
        for name, tensor in change(layer.tensors, i).items()
    }
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(ModelError, match=said) as error:
        pipeline.load_lora(tmp_path / "bad.safetensors")
    assert "\n" not in str(error.value)
    assert pipeline.components.weights.loaded == loaded
    assert torch.equal(drawn(pipeline), before)


def test_moving_saving_and_copying(pipeline, model, tmp_path):
    """Other types are cast from the base; hashes are those of the base; copies have weights of their own."""
    path = written(pipeline, tmp_path, "ink", 1)
    base, known = drawn(pipeline), digests(pipeline)
    pipeline.load_lora(path, 0.7)
    adapted = drawn(pipeline)
    assert digests(pipeline) == known
    copied = pickle.loads(pickle.dumps(copy.deepcopy(pipeline.components)))
    pipeline.unload_lora()
    assert torch.equal(drawn(pipeline), base)
    other = Pipeline(copied)
    assert torch.equal(drawn(other), adapted)
    other.to(dtype="bf16")
    small = Pipeline.from_pretrained(model, dtype="bf16")
    small.load_lora(path, 0.7)
    assert torch.equal(drawn(other), drawn(small))
    address = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = state(small)[f"{address}.weight"]
    tensors = adapter(pipeline, "ink", 1).layers[address].tensors
    wide = state(Pipeline.from_pretrained(model, dtype="bf16"))[f"{address}.weight"].float()
    wide = torch.addmm(wide, 0.7 * tensors["lora_up.weight"], tensors["lora_down.weight"])
    assert torch.equal(weight, wide.bfloat16())
    other.unload_lora()
    assert equal(state(other), state(Pipeline.from_pretrained(model, dtype="bf16")))


def test_weights_that_somebody_replaced_are_refused(pipeline, tmp_path):
    pipeline.load_lora(written(pipeline, tmp_path, "ink", 1))
    drawn(pipeline)
    pipeline.components.unet.to(torch.bfloat16)
    with pytest.raises(ModelError, match="was replaced while an adapter was in it"):
        pipeline.set_lora("ink", 0.5)
        drawn(pipeline)


def test_diffusers_gets_no_adapted_networks(pipeline, tmp_path):
    pipeline.load_lora(written(pipeline, tmp_path, "ink", 1))
    with pytest.raises(UsageError, match="adapters"):
        to_diffusers(pipeline)
    pipeline.unload_lora()
    assert to_diffusers(pipeline)


@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
def test_stock_diffusers_draws_the_same_picture(pipeline, model, tmp_path, dialect):
    """A file of ours, U-Net and text encoder. (Of kohya files it drops text layers that have no out_proj.)"""
    path, book = tmp_path / "ink.safetensors", book_of(pipeline.components.networks)
    write_adapter(adapter(pipeline, "ink", 1), path, book, dialect)
    stock = to_diffusers(Pipeline.from_pretrained(model))
    stock.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "guidance_scale": 5.0, "height": 16, "width": 16, "output_type": "np"}

    def theirs() -> Tensor:
        return torch.from_numpy(stock("an owl", generator=torch.Generator().manual_seed(3), **options).images)

    base = theirs()
    stock.load_lora_weights(path)
    pipeline.load_lora(path)
    wanted, ours = theirs(), torch.from_numpy(pipeline("an owl", seed=3, **options).images)
    assert (wanted - base).abs().max() > 0.01
    assert (ours - wanted).abs().max() <= 1e-4


@pytest.mark.parametrize("spare", [True, False])
def test_the_two_settings_used_last_stay_made(pipeline, tmp_path, monkeypatch, spare):
    """Going back and forth finds the same tensors again; where memory is short there is one, and no more. Either way
    the numbers are the same each time.
    """
    monkeypatch.setattr("ldm.adapters.weights._spare", lambda bases: spare)
    path = written(pipeline, tmp_path, "ink", 1)
    pipeline.load_lora(path)
    where: dict[float, set[int]] = {}
    numbers: dict[float, dict[str, Tensor]] = {}
    for strength in (0.5, 0.7, 0.5, 0.7, 0.9, 0.5, 0.9, 0.5):
        pipeline.set_lora("ink", strength)
        attention = pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1
        where.setdefault(strength, set()).add(attention.to_q.weight.data_ptr())
        numbers.setdefault(strength, {key: value.clone() for key, value in state(pipeline).items()})
        assert equal(state(pipeline), numbers[strength])
    assert len(set().union(*where.values())) == (2 if spare else 1)
    pipeline.unload_lora()
    assert not pipeline.components.weights._slots


def test_a_refiner_draws_without_adapters(pipeline, model, tmp_path):
    """What a tag names is the first model's; the second hears the words alone."""
    path = written(pipeline, tmp_path, "ink", 1)
    both = Pipeline(pipeline.components, refiner=Pipeline.from_pretrained(model))
    both.lora_dir = tmp_path
    fields = {**FIELDS, "refiner_start": 0.5}
    tagged = both("an owl<lora:ink:0.7>", **fields).latents
    base = both("an owl", **fields).latents
    both.load_lora(path, 0.7)
    assert torch.equal(both("an owl", **fields).latents, tagged)
    assert not torch.equal(tagged, base)


def test_branches_and_files_leave_the_autoencoder_alone(pipeline, tmp_path):
    branch = LoRA.for_model(pipeline.components.networks, 2)
    assert {address.partition(".")[0] for address, _ in branch.items()} == {"unet", "text_encoder"}
    other = Adapter({"vae.decoder.conv_in": Layer("full", {"diff": torch.zeros(16, 4, 3, 3)})})
    with pytest.raises(ModelError, match="hold U-Nets and text encoders alone"):
        write_adapter(other, tmp_path / "vae.safetensors", book_of(pipeline.components.networks), "kohya")
