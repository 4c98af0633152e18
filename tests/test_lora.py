"""Low-rank training: what is attached is what is folded, PEFT's DoRA step for step, and a base that nothing touches."""

import copy
import itertools
import math
from collections.abc import Mapping

import peft
import pytest
import torch
from torch import Tensor, nn

from ldm.adapters.adapter import Adapter, Layer
from ldm.adapters.kinds import check, delta, scale
from ldm.errors import ModelError, UsageError
from ldm.lora import TARGETS, LoRA
from ldm.models.clip import CLIPTextConfig, CLIPTextModel
from ldm.models.unet import CROSS, PLAIN, UNet, UNetConfig

TEXT = "text_encoder.text_model.encoder.layers"
TIMES = torch.tensor([7, 500])
CONFIG = CLIPTextConfig(
    vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=12, eos_token_id=2,
)  # fmt: skip


def networks(linear: bool = False) -> dict[str, nn.Module]:
    """A U-Net with every sort of layer, and a text encoder."""
    unet = UNetConfig(
        sample_size=8, block_out_channels=(16, 32), down_block_types=(CROSS, PLAIN), layers_per_block=1,
        num_heads=(2, 2), transformer_layers_per_block=(1, 1), cross_attention_dim=16, norm_num_groups=8,
        use_linear_projection=linear,
    )  # fmt: skip
    return {"unet": UNet(unet), "text_encoder": CLIPTextModel(CONFIG)}


def drawn(models: Mapping[str, nn.Module], dtype: torch.dtype = torch.float32) -> Tensor:
    """What both networks say of fixed inputs: the text's states are the U-Net's context."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, 40, (2, 12), generator=generator)
    x = torch.randn(2, 4, 8, 8, generator=generator).to(dtype)
    context = models["text_encoder"](tokens)[0]
    return models["unet"](x, TIMES, context)


def trained(models: Mapping[str, nn.Module], targets: tuple[str, ...] = tuple(TARGETS), **options: object) -> LoRA:
    """An adapter with numbers in it, as training would leave them."""
    lora = LoRA.for_model(models, 4, 6.0, targets, **options)
    shaken(lora)
    return lora


def shaken(lora: LoRA) -> None:
    with torch.no_grad():
        for _, layer in lora.items():
            layer.up.normal_(std=0.05)
            if layer.magnitude is not None:
                layer.magnitude.mul_(1 + 0.1 * torch.rand_like(layer.magnitude))


def folded(models: Mapping[str, nn.Module], adapter: Adapter, strength: float) -> dict[str, nn.Module]:
    """Copies of the networks with W0 + strength * delta in their weights."""
    copies = copy.deepcopy(dict(models))
    with torch.no_grad():
        for address, layer in adapter.layers.items():
            name, _, path = address.partition(".")
            weight = copies[name].get_submodule(path).weight
            weight += strength * delta(layer, weight)
    return copies


def close(ours: Tensor, theirs: Tensor, within: float) -> None:
    assert ours.shape == theirs.shape and ours.isfinite().all()
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error <= within, f"{error:.2e}"


@pytest.mark.parametrize("strength", [1.0, 0.5, -1.25])
@pytest.mark.parametrize("dora", [False, True])
def test_attached_is_folded(dora, strength):
    """The branch beside the layers draws what the weights with it inside draw; in float64 to rounding."""
    models = networks()
    lora = trained(models, dora=dora)
    bare = drawn(models)
    exact = {name: model.double() for name, model in copy.deepcopy(models).items()}
    theirs = drawn(folded(exact, lora.adapter(), strength), torch.float64)
    for name in ("unet", "text_encoder"):
        models[name].double()
    wide = copy.deepcopy(lora).double()
    with wide.attached(models, strength):
        ours = drawn(models, torch.float64)
    close(ours, theirs, 1e-6)
    assert (theirs - bare).abs().max() > 0.1 * bare.abs().max()


def test_attached_is_folded_in_every_layer():
    """Alone, each layer's branch is W0 + delta to 1e-6 in float32: strides, kernels, biases and memory formats."""
    bases = {
        "linear": nn.Linear(24, 16), "bare": nn.Linear(24, 16, bias=False), "conv": nn.Conv2d(24, 16, 3, padding=1),
        "strided": nn.Conv2d(24, 16, 3, stride=2), "pointwise": nn.Conv2d(24, 16, 1),
        "dilated": nn.Conv2d(24, 16, (3, 1), dilation=2),
    }  # fmt: skip
    models = {"some": nn.ModuleDict(bases)}
    for dora in (False, True):
        lora = trained(models, tuple(bases), dora=dora)
        for name, base in folded(models, lora.adapter(), 1.0)["some"].items():
            x = torch.randn(2, 24) if isinstance(base, nn.Linear) else torch.randn(2, 24, 9, 9)
            with lora.attached(models):
                close(models["some"][name](x), base(x), 1e-6)
                if x.ndim == 4:
                    y = models["some"][name](x.contiguous(memory_format=torch.channels_last))
                    assert y.is_contiguous(memory_format=torch.channels_last)
                    close(y, base(x), 1e-6)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("base", [lambda: nn.Linear(24, 16), lambda: nn.Conv2d(24, 16, 3, stride=2, padding=1)])
def test_peft_takes_the_same_steps(base, dora):
    """From the same factors: the same outputs, the same gradients, and so the same adapter after ten steps."""
    base = base()
    models = {"some": nn.ModuleDict({"base": copy.deepcopy(base)})}
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["base"], use_dora=dora)
    theirs = peft.get_peft_model(nn.ModuleDict({"base": base}), config).base_model.model["base"]
    lora = LoRA.for_model(models, 4, 6.0, ("base",), dora=dora)
    (_, ours), = lora.items()  # fmt: skip
    pairs = [(ours.down, theirs.lora_A["default"].weight), (ours.up, theirs.lora_B["default"].weight)]
    if dora:
        pairs.append((ours.magnitude, theirs.lora_magnitude_vector["default"].weight))
        close(ours.magnitude.flatten(), pairs[-1][1].flatten(), 1e-6)
    with torch.no_grad():
        ours.up.normal_(std=0.1)
        for own, other in pairs[:2]:
            other.copy_(own)
    x = torch.randn(5, 24, *[9, 9] if isinstance(base, nn.Conv2d) else [])
    for _ in range(10):
        with lora.attached(models):
            y = models["some"]["base"](x)
        close(y, theirs(x), 1e-5)
        for loss in (y.square().mean(), theirs(x).square().mean()):
            loss.backward()
        with torch.no_grad():
            for own, other in pairs:
                close(own.grad.flatten(), other.grad.flatten(), 1e-5)
                for parameter in (own, other):
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None


def test_fresh_branches_add_nothing():
    """Hu et al. 2021, section 4.1: up is zero; down is drawn within sqrt(1 / fan_in)."""
    models = networks()
    lora = LoRA.for_model(models, 4)
    before = drawn(models)
    with lora.attached(models):
        assert torch.equal(drawn(models), before)
    for _, layer in lora.items():
        bound = 1 / math.sqrt(layer.down[0].numel())
        assert not layer.up.any() and 0.7 * bound < layer.down.abs().max() <= bound


def test_only_the_adapter_is_trained():
    """Of networks that could be trained themselves: gradients in all branches and nowhere else, weights to the bit."""
    models = networks()
    models["unet"].conv_in.requires_grad_(False)
    flags = [p.requires_grad for model in models.values() for p in model.parameters()]
    before = {name: copy.deepcopy(model.state_dict()) for name, model in models.items()}
    bare = drawn(models)
    lora = trained(models, dora=True)
    optimizer = torch.optim.AdamW(lora.parameters(), 1e-2)
    for _ in range(2):
        with lora.attached(models):
            loss = drawn(models).square().mean()
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in lora.parameters())
    assert all(p.grad is None for model in models.values() for p in model.parameters())
    assert flags == [p.requires_grad for model in models.values() for p in model.parameters()]
    for name, model in models.items():
        state = model.state_dict()
        assert list(state) == list(before[name])
        assert all(torch.equal(state[key], before[name][key]) for key in state)
        assert not any(part._forward_hooks for part in model.modules())
    assert torch.equal(drawn(models), bare)


def test_an_error_inside_detaches_too():
    models = networks()
    bare = drawn(models)
    with pytest.raises(RuntimeError, match="halt"), trained(models).attached(models):
        raise RuntimeError("halt")
    assert torch.equal(drawn(models), bare)
    assert all(p.requires_grad for p in models["unet"].parameters())


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_below_float32_above(dtype, dora):
    """Parameters and gradients are float32 over a base of half precision, with autocast and without."""
    base = nn.ModuleDict({"linear": nn.Linear(24, 24), "conv": nn.Conv2d(24, 16, 3)}).to(dtype)
    models = {"some": base}
    lora = trained(models, ("linear", "conv"), dora=dora)
    wide = folded({"some": copy.deepcopy(base).float()}, lora.adapter(), 1.0)["some"]
    x = torch.randn(2, 5, 5, 24).to(dtype)
    expected = wide["conv"](wide["linear"](x.float()).permute(0, 3, 1, 2))
    for autocast in (False, True):
        with lora.attached(models), torch.autocast("cpu", dtype, enabled=autocast):
            y = base["conv"](base["linear"](x).permute(0, 3, 1, 2))
        assert y.dtype == dtype
        close(y.float(), expected, 0.02 if dtype == torch.bfloat16 else 0.003)
        y.float().square().mean().backward()
    for parameter in lora.parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()


def test_it_learns_what_is_of_its_rank():
    """A difference of rank 2 is found by an adapter of rank 2."""
    torch.manual_seed(1)
    base = nn.Linear(16, 12)
    goal = base.weight.detach() + torch.randn(12, 2) @ torch.randn(2, 16) / 4
    models = {"some": nn.ModuleDict({"base": base})}
    lora = LoRA.for_model(models, 2, targets=("base",))
    optimizer = torch.optim.Adam(lora.parameters(), 0.03)
    x = torch.randn(256, 16)
    for _ in range(300):
        with lora.attached(models):
            loss = (base(x) - nn.functional.linear(x, goal, base.bias)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    (layer,) = lora.adapter().layers.values()
    close(base.weight.detach() + delta(layer, base.weight), goal, 1e-3)


def test_a_running_average_is_of_the_adapter_alone():
    models = networks()
    lora = trained(models)
    average = copy.deepcopy(lora)
    shaken(lora)
    size = sum(p.numel() for p in models["unet"].parameters())
    assert sum(p.numel() for p in average.parameters()) < size / 2
    with average.attached(models):
        assert not any("LoRA" in type(part).__name__ for model in models.values() for part in model.modules())
        ours = drawn(models)
    close(ours, drawn(folded(models, average.adapter(), 1.0)), 1e-4)


def test_targets_ranks_and_alphas():
    models = networks(linear=True)
    lora = LoRA.for_model(
        models, 8, 4.0, ("attention", "unet.down_blocks.*.conv1"), ranks={"attn2.to_k": 2, "*conv1": 3},
        alphas={"down_blocks.*": 1.0, f"{TEXT}.1.*": 16.0},
    )  # fmt: skip
    layers = lora.adapter().layers
    assert {address.rpartition(".")[2] for address in layers} == {
        "to_q", "to_k", "to_v", "0", "q_proj", "k_proj", "v_proj", "out_proj", "conv1",
    }  # fmt: skip
    convolutions = [address for address in layers if address.endswith("conv1")]
    assert convolutions == ["unet.down_blocks.0.resnets.0.conv1", "unet.down_blocks.1.resnets.0.conv1"]
    block = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
    expected = {
        f"{block}.attn1.to_k": (8, 1.0), f"{block}.attn2.to_k": (2, 1.0), convolutions[0]: (3, 1.0),
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (2, 4.0),
        f"{TEXT}.0.self_attn.q_proj": (8, 4.0), f"{TEXT}.1.self_attn.q_proj": (8, 16.0),
    }  # fmt: skip
    assert {a: (len(layers[a].tensors["lora_down.weight"]), layers[a].alpha) for a in expected} == expected
    assert all(check(layer) is None for layer in layers.values())


def test_scaling():
    """alpha / r; without alpha 1; rank-stabilised alpha / sqrt(r), in the file as the alpha that gives it."""
    models = networks()
    for options, expected in (
        ({"alpha": 4.0}, 0.25), ({}, 1.0), ({"alpha": 4.0, "rslora": True}, 1.0), ({"rslora": True}, 4.0)
    ):  # fmt: skip
        for layer in LoRA.for_model(models, 16, **options).adapter().layers.values():
            assert scale(layer) == expected


def test_every_word_of_targets_names_what_kohya_and_lycoris_adapt():
    models = networks()
    found = {word: set(LoRA.for_model(models, 1, targets=(word,)).adapter().layers) for word in TARGETS}
    for one, other in itertools.combinations(found.values(), 2):
        assert not one & other
    every = {f"unet.{n}" for n, m in models["unet"].named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    left = every - set().union(*found.values())
    ends = {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}
    assert left == {f"unet.{name}" for name in ends}


def test_what_cannot_be_asked_for():
    models = networks()
    with pytest.raises(UsageError, match="'to_x' is the ending of no"):
        LoRA.for_model(models, 4, targets=("attention", "to_x"))
    with pytest.raises(UsageError, match="'time_x' is the ending of no"):
        LoRA.for_model(models, 4, ranks={"time_x": 2})
    with pytest.raises(UsageError, match="a rank of 0 was asked for unet"):
        LoRA.for_model(models, 0)
    attached = LoRA.for_model(models, 4).attached({"unet": models["unet"]})
    with pytest.raises(ModelError, match=r"no linear layer or convolution text_encoder\."), attached:
        pass
    assert not any(part._forward_hooks for part in models["unet"].modules())


@pytest.mark.parametrize("dora", [False, True])
def test_going_on_from_an_adapter(dora):
    """What was taken out goes back in to the bit, and stays as it was when either is trained on."""
    models = networks()
    lora = trained(models, dora=dora)
    adapter = lora.adapter()
    kept = copy.deepcopy({address: dict(layer.tensors) for address, layer in adapter.layers.items()})
    again = LoRA.from_adapter(adapter, models)
    with lora.attached(models):
        first = drawn(models)
    with again.attached(models):
        assert torch.equal(drawn(models), first)
    for one in (lora, again):
        shaken(one)
    for address, layer in adapter.layers.items():
        assert all(torch.equal(layer.tensors[name], tensor) for name, tensor in kept[address].items())
    halves = {a: Layer("lora", {n: t.half() for n, t in v.tensors.items()}, v.alpha) for a, v in adapter.layers.items()}
    half = LoRA.from_adapter(Adapter(halves), models)
    assert {p.dtype for p in half.parameters()} == {torch.float32}


def test_flat_factors_of_a_convolution_are_taken():
    """A file may store a 1x1 convolution's factors as those of a linear layer, and say nothing of alpha."""
    models = networks()
    address = "unet.mid_block.attentions.0.proj_in"
    tensors = {
        "lora_down.weight": torch.randn(2, 32),
        "lora_up.weight": torch.randn(32, 2),
        "dora_scale": torch.ones(32),
    }
    lora = LoRA.from_adapter(Adapter({address: Layer("lora", tensors)}), models)
    with lora.attached(models):
        ours = drawn(models)
    close(ours, drawn(folded(models, lora.adapter(), 1.0)), 1e-5)
    assert lora.adapter().layers[address].tensors["lora_up.weight"].shape == (32, 2, 1, 1)


ROW = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
FACTORS = {"lora_down.weight": torch.ones(2, 32), "lora_up.weight": torch.ones(32, 2)}


@pytest.mark.parametrize(
    ("address", "layer", "said"),
    [
        ("unet.nowhere", Layer("lora", FACTORS), "no linear layer or convolution unet.nowhere"),
        ("vae.encoder.conv_in", Layer("lora", FACTORS), "no linear layer or convolution vae.encoder.conv_in"),
        (ROW, Layer("full", {"diff": torch.ones(32, 32)}), "plain LoRA and DoRA only; .* has diff"),
        (ROW, Layer("lora", FACTORS | {"diff_b": torch.ones(32)}), "plain LoRA and DoRA only; .* has diff_b"),
        (ROW, Layer("lora", {"lora_up.weight": torch.ones(32, 2)}), "is damaged: lora_down.weight is missing"),
        (ROW, Layer("lora", FACTORS | {"lora_up.weight": torch.ones(16, 2)}), "not for a weight of"),
        (ROW, Layer("lora", FACTORS | {"dora_scale": torch.ones(1, 32)}), "magnitudes of outputs only"),
    ],
)
def test_what_cannot_be_gone_on_from(address, layer, said):
    with pytest.raises(ModelError, match=said):
        LoRA.from_adapter(Adapter({address: layer}), networks())
