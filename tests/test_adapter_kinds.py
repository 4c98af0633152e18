"""The mathematics of adapters against LyCORIS' own modules, PEFT's, and the papers' formulas written out.

LyCORIS' and PEFT's weights are what their `forward` does to unit inputs: LyCORIS' get_merged_weight multiplies LoHa and
LoKr by alpha / rank twice.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import lycoris.modules.boft
import lycoris.modules.diag_oft
import lycoris.modules.full
import lycoris.modules.glora
import lycoris.modules.ia3
import lycoris.modules.locon
import lycoris.modules.loha
import lycoris.modules.lokr
import lycoris.modules.norms
import peft
import pytest
import torch
from torch import Tensor, nn

from ldm.adapters.adapter import Layer
from ldm.adapters.kinds import (
    KINDS,
    TENSORS,
    bias_delta,
    check,
    delta,
    factors,
    fits,
    kind_of,
    rank,
    scale,
    shape,
)

RANK = 4
ALPHAS = None, 1.0, RANK / 2, float(RANK), 2.0 * RANK
BASES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(24, 32),
    "conv": lambda: nn.Conv2d(24, 32, 3, stride=2, padding=1),
    "conv1x1": lambda: nn.Conv2d(24, 32, 1),
}
BOTH = {"factor": 2, "unbalanced_factorization": True, "decompose_both": True}
FORMS: dict[str, tuple[str, type, dict[str, Any]]] = {  # LyCORIS' module and its options
    "lora": ("lora", lycoris.modules.locon.LoConModule, {}),
    "lora tucker": ("lora", lycoris.modules.locon.LoConModule, {"use_tucker": True}),
    "lora rank-stabilised": ("lora", lycoris.modules.locon.LoConModule, {"rs_lora": True}),
    "loha": ("loha", lycoris.modules.loha.LohaModule, {}),
    "loha tucker": ("loha", lycoris.modules.loha.LohaModule, {"use_tucker": True}),
    "lokr": ("lokr", lycoris.modules.lokr.LokrModule, {"factor": 2}),
    "lokr tucker": ("lokr", lycoris.modules.lokr.LokrModule, {"factor": 2, "use_tucker": True}),
    "lokr both": ("lokr", lycoris.modules.lokr.LokrModule, {**BOTH, "lora_dim": 2}),
    "lokr both tucker": ("lokr", lycoris.modules.lokr.LokrModule, {**BOTH, "lora_dim": 2, "use_tucker": True}),
    "lokr first": ("lokr", lycoris.modules.lokr.LokrModule, {**BOTH, "lora_dim": 6}),
    "lokr full": ("lokr", lycoris.modules.lokr.LokrModule, {"full_matrix": True}),
    "glora": ("glora", lycoris.modules.glora.GLoRAModule, {}),
    "ia3 outputs": ("ia3", lycoris.modules.ia3.IA3Module, {"train_on_input": False}),
    "ia3 inputs": ("ia3", lycoris.modules.ia3.IA3Module, {"train_on_input": True}),
}
MAGNITUDES: dict[str, dict[str, Any]] = {
    "dora": {"weight_decompose": True},
    "dora of inputs": {"weight_decompose": True, "wd_on_out": False},
}


def filled(module: nn.Module) -> None:
    """Numbers of about the size that training leaves; magnitudes and gains stay positive."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith(("dora_scale", "rescale")):
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
            elif parameter.ndim:
                parameter.normal_(std=0.3)


def trained(form: str, base: nn.Module, alpha: float | None, **options: Any) -> tuple[nn.Module, Layer]:
    """LyCORIS' module over a base, in float64, and the layer that its saved tensors are, in float32."""
    kind, made_by, own = FORMS[form]
    options = {"lora_dim": RANK, **own, **options}
    module = made_by("name", base, alpha=alpha, **options).double().eval()
    filled(module)
    return module, stored(kind, module)


def stored(kind: str, module: nn.Module, dtype: torch.dtype = torch.float32) -> Layer:
    tensors = {name: tensor.detach().to(dtype) for name, tensor in module.state_dict().items()}
    alpha = tensors.pop("alpha", None)
    return Layer(kind, tensors, None if alpha is None else float(alpha))


def base_of(name: str) -> nn.Module:
    """A module of that sort in float64, with numbers that float32 holds."""
    return BASES[name]().double().requires_grad_(False).apply(rounded)


def rounded(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.copy_(parameter.float())


def effect(module: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
    """The weight of a linear map without bias, from what it does to unit inputs."""
    unit = torch.eye(weight[0].numel(), dtype=weight.dtype).unflatten(1, weight.shape[1:])
    return (module(unit) - module(torch.zeros_like(unit))).flatten(1).T.reshape(weight.shape)


def of_forward(module: nn.Module, base: nn.Module) -> Tensor:
    """W1 - W0 of a module of LyCORIS or PEFT over a base. A kernel sees one position only, so stride and padding are
    taken away for the moment.
    """
    for part in (base, *module.modules()):
        if isinstance(part, nn.Conv2d):
            part.padding, part.stride = (0, 0), (1, 1)
    if isinstance(base, nn.Conv2d):
        module.kw_dict = getattr(module, "kw_dict", {}) | {"padding": (0, 0), "stride": (1, 1)}
    return effect(module, base.weight) - base.weight


def close(ours: Tensor, theirs: Tensor, within: float = 1e-6) -> None:
    assert ours.shape == theirs.shape
    assert ours.isfinite().all()
    error = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
    assert error <= within, f"{error:.2e}"


@pytest.mark.parametrize("base_name", BASES)
@pytest.mark.parametrize("form", FORMS)
def test_lycoris_agrees(form, base_name):
    """Every form on every sort of module with every alpha, as its module draws with it."""
    for alpha in ALPHAS:
        base = base_of(base_name)
        module, layer = trained(form, base, alpha)
        assert check(layer) is None
        assert kind_of(set(layer.tensors)) == layer.kind
        assert fits(layer, base.weight.shape)
        close(delta(layer, base.weight.float()), of_forward(module, base))


@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("base_name", BASES)
@pytest.mark.parametrize("form", [form for form in FORMS if FORMS[form][0] in ("lora", "loha", "lokr")])
def test_lycoris_magnitudes_agree(form, base_name, magnitude):
    """DoRA over LoRA, LoHa and LoKr, the norm over either axis: in float64, and the weights in float32."""
    kind = FORMS[form][0]
    for alpha in (None, 2.0 * RANK):
        base = base_of(base_name)
        module, layer = trained(form, base, alpha, **MAGNITUDES[magnitude])
        assert check(layer) is None
        theirs = of_forward(module, base)
        close(delta(stored(kind, module, torch.float64), base.weight), theirs, 1e-12)
        close(base.weight + delta(layer, base.weight.float()), base.weight + theirs)


def test_every_form_of_lokr_was_met():
    """Either half whole or factored, and the second with a core: what LyCORIS made above."""
    met = set()
    for form, base in itertools.product(FORMS, BASES):
        if FORMS[form][0] == "lokr":
            met.add(frozenset(trained(form, base_of(base), 1.0)[1].tensors))
    assert met == {frozenset(form) for form in KINDS["lokr"].forms} and len(met) == 6


@pytest.mark.parametrize("base_name", BASES)
def test_a_trained_scalar_multiplies(base_name):
    """LyCORIS' use_scalar, as its modules hold it before they fold it into a factor on saving."""
    for form in ("lora", "loha", "lokr", "glora"):
        base = base_of(base_name)
        module, layer = trained(form, base, 2.0, use_scalar=True)
        with torch.no_grad():
            module.scalar.fill_(0.375)
        unfolded = Layer(layer.kind, dict(layer.tensors) | {"scalar": torch.tensor(0.375)}, 2.0)
        own = {name: p.detach().float() for name, p in module.named_parameters() if name in layer.tensors}
        assert scale(Layer(layer.kind, own, 2.0)) * 0.375 == scale(unfolded)
        close(
            delta(Layer(layer.kind, {**own, "scalar": torch.tensor(0.375)}, 2.0), base.weight), of_forward(module, base)
        )


@pytest.mark.parametrize("bound", [0.0, 0.003])
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("base_name", BASES)
@pytest.mark.parametrize("made_by", [lycoris.modules.diag_oft.DiagOFTModule, lycoris.modules.boft.ButterflyOFTModule])
def test_lycoris_rotations_agree(made_by, base_name, rescaled, bound):
    """OFT and BOFT, free and bounded. LyCORIS inverts in float32 whatever it is given, and takes BOFT's difference from
    the turned weight, so it is the weights that agree to a part in a million."""
    base = base_of(base_name).float()
    module = made_by("name", base, lora_dim=8, constraint=bound, rescaled=rescaled).eval()
    filled(module)
    layer = stored("oft", module)
    assert check(layer) is None
    assert kind_of(set(layer.tensors)) == "oft"
    assert fits(layer, base.weight.shape)
    assert layer.alpha == pytest.approx(bound)
    theirs, _ = module.get_diff_weight()
    close(base.weight + delta(layer, base.weight), base.weight + theirs)


@pytest.mark.parametrize("base_name", BASES)
def test_lycoris_differences_agree(base_name):
    """Full differences and those of norms, of weight and of bias."""
    base = base_of(base_name)
    weight, bias = base.weight.clone(), base.bias.clone()
    module = lycoris.modules.full.FullModule("name", base)
    filled(module)
    change, change_b = module.weight.detach().clone(), module.bias.detach().clone()
    module.apply_to()
    layer = stored("full", module)
    assert kind_of(set(layer.tensors)) == "full" and check(layer) is None and fits(layer, weight.shape)
    close(delta(layer, weight), change)
    close(bias_delta(layer, bias, weight), change_b)

    norm = nn.GroupNorm(4, 32)
    module = lycoris.modules.norms.NormModule("name", norm)
    filled(module)
    layer = stored("norm", module)
    assert kind_of(set(layer.tensors)) == "norm" and check(layer) is None and fits(layer, norm.weight.shape)
    x = torch.randn(2, 32, 5, 5)
    with torch.no_grad():
        theirs = module(x)
        norm.weight += delta(layer, norm.weight)
        norm.bias += bias_delta(layer, norm.bias, norm.weight)
        close(module.org_forward(x), theirs)


def of_peft(config: Any, base: nn.Module) -> nn.Module:
    """PEFT's layer over a base module, in float64, its tensors filled."""
    model = peft.get_peft_model(nn.ModuleDict({"base": base}), config)
    layer = model.base_model.model["base"].double().eval()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
            elif "base_layer" not in name:
                parameter.normal_(std=0.3)
    return layer


def named(layer: nn.Module, *renamed: tuple[str, str]) -> dict[str, Tensor]:
    """The adapter's tensors of PEFT's layer, without its name for the adapter and with ours for the rest."""
    tensors = {}
    for name, parameter in layer.named_parameters():
        if "base_layer" not in name:
            name = name.replace(".default", "")
            for theirs, ours in renamed:
                name = name.replace(theirs, ours)
            tensors[name] = parameter.detach().float()
    return tensors


LORA = ("lora_A", "lora_down"), ("lora_B", "lora_up"), ("lora_magnitude_vector.weight", "dora_scale")


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}], ids=str)
@pytest.mark.parametrize("base_name", BASES)
def test_peft_lora_agrees(base_name, options):
    base = base_of(base_name)
    weight, bias = base.weight.clone(), base.bias.clone()
    layer = of_peft(peft.LoraConfig(r=RANK, lora_alpha=6, target_modules=["base"], **options), base)
    tensors = named(layer, *LORA)
    if "dora_scale" in tensors:
        tensors["dora_scale"] = tensors["dora_scale"].reshape(-1, *[1] * (weight.ndim - 1))
    ours = Layer("lora", tensors, 6.0 * math.sqrt(RANK) if "use_rslora" in options else 6.0)
    assert check(ours) is None
    close(delta(ours, weight), of_forward(layer, layer.base_layer))
    if "lora_bias" in options:
        theirs = layer(torch.zeros(1, *weight.shape[1:], dtype=torch.float64)).flatten()
        close(bias + bias_delta(ours, bias, weight), theirs)
    else:
        assert bias_delta(ours, bias, weight) is None


@pytest.mark.parametrize(
    "config",
    [
        peft.LoHaConfig(r=RANK, alpha=6, target_modules=["base"]),
        peft.LoHaConfig(r=RANK, alpha=6, target_modules=["base"], use_effective_conv2d=True),
        peft.LoKrConfig(r=2, alpha=6, target_modules=["base"]),
        peft.LoKrConfig(r=2, alpha=6, target_modules=["base"], decompose_both=True, decompose_factor=8),
        peft.LoKrConfig(r=2, alpha=6, target_modules=["base"], decompose_factor=2, use_effective_conv2d=True),
    ],
    ids=["loha", "loha tucker", "lokr", "lokr both", "lokr tucker"],
)
@pytest.mark.parametrize("base_name", BASES)
def test_peft_hadamard_and_kronecker_agree(base_name, config):
    base = base_of(base_name)
    weight = base.weight.clone()
    layer = of_peft(config, base)
    tensors = named(layer)
    kind = kind_of(set(tensors))
    assert kind is not None and rank(Layer(kind, tensors)) == config.r and check(Layer(kind, tensors)) is None
    close(delta(Layer(kind, tensors, 6.0), weight), of_forward(layer, layer.base_layer))


def test_peft_scales_whole_kronecker_factors():
    """There PEFT takes alpha / rank and LyCORIS 1: whoever reads PEFT's file puts the number into a factor."""
    base = base_of("linear")
    weight = base.weight.clone()
    layer = of_peft(peft.LoKrConfig(r=RANK, alpha=6, target_modules=["base"]), base)
    tensors = named(layer)
    assert set(tensors) == {"lokr_w1", "lokr_w2"}
    tensors["lokr_w1"] *= 6 / RANK
    close(delta(Layer("lokr", tensors, 6.0), weight), of_forward(layer, layer.base_layer))


@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("base_name", BASES)
def test_peft_ia3_agrees(base_name, inputs):
    """PEFT stores the gain itself, and scales the bias with the outputs."""
    base = base_of(base_name)
    weight, bias = base.weight.clone(), base.bias.clone()
    layer = of_peft(peft.IA3Config(target_modules=["base"], feedforward_modules=["base"] if inputs else []), base)
    gain = named(layer)["ia3_l"]
    tensors = {"weight": gain - 1, "on_input": torch.tensor(inputs), "on_bias": torch.tensor(True)}
    ours = Layer("ia3", tensors)
    assert check(ours) is None and fits(ours, weight.shape)
    close(delta(ours, weight), of_forward(layer, layer.base_layer))
    change = bias_delta(ours, bias, weight)
    if inputs:
        assert change is None
    else:
        layer.merge()
        close(change, layer.base_layer.bias - bias)


def test_peft_oft_agrees():
    """PEFT turns inputs where LyCORIS turns outputs: the same mathematics on the transposed weight."""
    base = base_of("linear")
    weight = base.weight.clone()
    config = peft.OFTConfig(r=0, oft_block_size=8, target_modules=["base"], use_cayley_neumann=False)
    layer = of_peft(config, base)
    upper = named(layer)["oft_R.weight"]
    blocks = torch.zeros(24 // 8, 8, 8)
    blocks[:, *torch.triu_indices(8, 8, 1)] = upper
    close(delta(Layer("oft", {"oft_blocks": blocks}), weight.T).T, of_forward(layer, layer.base_layer))


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) / 2


def test_published_formulas():
    """Each paper's equation, written out in float64: our float64 agrees to 1e-12, our float32 to 1e-6."""
    o, i, k, r = 12, 8, 3, 2
    weight = numbers(o, i, k, k)
    up, down, core = numbers(o, r, 1, 1), numbers(r, i, k, k), numbers(r, r, k, k)
    a1, b1, a2, b2 = numbers(o, r), numbers(r, i * k * k), numbers(o, r), numbers(r, i * k * k)
    left, right = numbers(r, o), numbers(r, i)
    w1, w2 = numbers(3, 2), numbers(4, 4, k, k)
    kron = torch.einsum("ac,bdkl->abcdkl", w1, w2).reshape(weight.shape)
    ga1, ga2, gb2 = numbers(i, r, 1, 1), numbers(r, i, 1, 1), numbers(r, i, k, k)
    gain = numbers(1, i, 1, 1)
    change = torch.einsum("or,rikl->oikl", up[..., 0, 0], down)
    inputs = numbers(1, i, 1, 1).abs()
    outputs = numbers(o, 1, 1, 1).abs()
    sum_ = weight + change
    glora = torch.einsum("oxkl,xr,ri->oikl", weight, ga1[..., 0, 0], ga2[..., 0, 0])
    glora = glora + torch.einsum("or,rikl->oikl", up[..., 0, 0], gb2)
    lora = {"lora_down.weight": down, "lora_up.weight": up}
    hada = torch.einsum("mnkl,mo,ni->oikl", core, left, right)
    cases: list[tuple[Layer, Tensor]] = [
        (Layer("lora", lora, 3.0), 1.5 * change),
        (
            Layer("lora", {"lora_down.weight": right[..., None, None], "lora_mid.weight": core, "lora_up.weight": up}),
            torch.einsum("or,rskl,si->oikl", up[..., 0, 0], core, right),
        ),
        (
            Layer("loha", {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}, 1.0),
            0.5 * torch.einsum("or,ri,os,si->oi", a1, b1, a2, b2).reshape(weight.shape),
        ),
        (
            Layer("loha", {f"hada_w{n}_{h}": t for n in (1, 2) for h, t in (("a", left), ("b", right))}
                  | {"hada_t1": core, "hada_t2": core}),
            hada * hada,
        ),
        (Layer("lokr", {"lokr_w1": w1, "lokr_w2": w2}, 16.0), kron),
        (
            Layer("lokr", {"lokr_w1": w1, "lokr_w2_a": numbers(4, r), "lokr_w2_b": numbers(r, 4, k, k)}, 1.0), None,
        ),
        (Layer("ia3", {"weight": gain, "on_input": torch.tensor(1)}), weight * gain),
        (Layer("glora", {"a1.weight": ga1, "a2.weight": ga2, "b1.weight": up, "b2.weight": gb2}), glora),
        (Layer("glora", {"a1.weight": ga2, "a2.weight": ga1, "b1.weight": gb2, "b2.weight": up}), glora),
        (
            Layer("lora", lora | {"dora_scale": outputs}),
            outputs * sum_ / torch.einsum("oikl,oikl->o", sum_, sum_).sqrt()[:, None, None, None] - weight,
        ),
        (
            Layer("lora", lora | {"dora_scale": inputs}),
            inputs * sum_ / torch.einsum("oikl,oikl->i", sum_, sum_).sqrt()[:, None, None] - weight,
        ),
    ]  # fmt: skip
    for layer, expected in cases:
        if expected is None:
            t = layer.tensors
            second = torch.einsum("br,rdkl->bdkl", t["lokr_w2_a"], t["lokr_w2_b"])
            expected = 0.5 * torch.einsum("ac,bdkl->abcdkl", w1, second).reshape(weight.shape)
        assert check(layer) is None, layer.kind
        assert delta(layer, weight).dtype == torch.float64
        close(delta(layer, weight), expected, 1e-12)
        assert delta(layer, weight.float()).dtype == torch.float32
        close(delta(layer, weight.float()), expected, 1e-6)


def test_square_glora_is_read_by_its_rank():
    """Where both orders of the factors fit the weight, the short axis is the rank."""
    weight, up, down = numbers(8, 8), numbers(8, 2), numbers(2, 8)
    expected = 2 * (torch.einsum("ox,xr,ri->oi", weight, up, down) + torch.einsum("or,ri->oi", up, down))
    for first, second in ((up, down), (down, up)):
        tensors = {"a1.weight": first, "a2.weight": second, "b1.weight": first, "b2.weight": second}
        assert rank(Layer("glora", tensors)) == 2
        close(delta(Layer("glora", tensors, 4.0), weight), expected, 1e-12)


def turns(blocks: Tensor) -> Tensor:
    """The block-diagonal matrix of (I + Q)(I - Q)^-1 with Q = B - B^T."""
    one = torch.eye(blocks.shape[-1], dtype=torch.float64)
    return torch.block_diag(*((one + b - b.T) @ torch.linalg.inv(one - b + b.T) for b in blocks))


def test_published_rotations():
    """OFT as one orthogonal matrix; BOFT as the product of its butterflies, whose permutations are index arithmetic."""
    weight = numbers(16, 5)
    blocks = numbers(4, 4, 4)
    turned = turns(blocks)
    close(turned @ turned.T, torch.eye(16), 1e-12)
    close(delta(Layer("oft", {"oft_blocks": blocks}), weight), turned.T @ weight - weight, 1e-12)
    whole = torch.stack([turned[n : n + 4, n : n + 4] for n in range(0, 16, 4)])
    close(delta(Layer("oft", {"oft_diag": whole}), weight), turned.T @ weight - weight, 1e-12)

    size = (blocks - blocks.mT).square().sum().sqrt()
    bounded = Layer("oft", {"oft_blocks": blocks}, 0.05)
    close(delta(bounded, weight), turns(blocks * 0.05 * 16 / size).T @ weight - weight, 1e-12)

    levels = numbers(3, 4, 4, 4)
    bounded = Layer("oft", {"oft_blocks": levels}, 0.05)
    same = Layer("oft", {"oft_blocks": levels * 0.05 * 16 / (levels - levels.mT).square().sum().sqrt()})
    close(delta(bounded, weight), delta(same, weight), 1e-12)
    expected = weight
    for level, stage in enumerate(levels):
        half = 2 << level  # rows n and n + half of a group of 2 * half stand side by side
        order = [g * 2 * half + side * half + n for g in range(8 // half) for n in range(half) for side in (0, 1)]
        permute = torch.eye(16, dtype=torch.float64)[order]
        expected = permute.T @ turns(stage) @ permute @ expected
    gain = numbers(16, 1)
    close(delta(Layer("oft", {"oft_blocks": levels}), weight), expected - weight, 1e-12)
    close(delta(Layer("oft", {"oft_blocks": levels, "rescale": gain}), weight), gain * expected - weight, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_halves_are_computed_in_float32(form, dtype):
    """Half precision costs the rounding of what is stored and nothing more."""
    base = base_of("conv")
    module, _ = trained(form, base, 2.0)
    half = stored(FORMS[form][0], module, dtype)
    same = Layer(half.kind, {name: tensor.double() for name, tensor in half.tensors.items()}, half.alpha)
    weight = base.weight.to(dtype)
    ours = delta(half, weight)
    assert ours.dtype == torch.float32
    close(ours, delta(same, weight.double()))


def test_a_magnitude_over_nothing_is_finite():
    """A row of zeros has no direction: it stays a row of zeros."""
    weight = torch.zeros(6, 4)
    tensors = {
        "lora_down.weight": torch.ones(2, 4),
        "lora_up.weight": torch.zeros(6, 2),
        "dora_scale": torch.ones(6, 1),
    }
    assert torch.equal(delta(Layer("lora", tensors), weight), weight)


def test_factors_make_the_difference():
    for base_name, alpha in itertools.product(BASES, ALPHAS):
        base = base_of(base_name)
        _, layer = trained("lora", base, alpha)
        up, down = factors(layer)
        assert up.shape == (32, RANK) and down.shape == (RANK, base.weight[0].numel())
        close((up @ down).reshape(base.weight.shape), delta(layer, base.weight))
    half = factors(Layer("lora", {name: tensor.half() for name, tensor in layer.tensors.items()}, layer.alpha))
    assert {part.dtype for part in half} == {torch.float32}
    _, tucker = trained("lora tucker", base_of("conv"), 1.0)
    _, dora = trained("lora", base_of("linear"), 1.0, weight_decompose=True)
    _, loha = trained("loha", base_of("linear"), 1.0)
    assert [factors(layer) for layer in (tucker, dora, loha)] == [None, None, None]


def lora(o: int = 6, i: int = 4, r: int = 2, **more: Tensor) -> dict[str, Tensor]:
    return {"lora_down.weight": torch.ones(r, i), "lora_up.weight": torch.ones(o, r), **more}


def test_bias():
    weight, bias = torch.zeros(6, 4), torch.arange(6.0)
    own = {"lora_up.bias": torch.full((6,), 4.0), "diff_b": torch.ones(6)}
    assert torch.equal(bias_delta(Layer("lora", lora(**own), 1.0), bias, weight), torch.full((6,), 3.0))
    assert torch.equal(bias_delta(Layer("bias", {"diff_b": bias}), None, weight), bias)
    assert torch.equal(delta(Layer("bias", {"diff_b": bias}), weight), weight)
    gains = {"weight": torch.full((6,), 0.5), "on_input": torch.tensor(0)}
    assert bias_delta(Layer("ia3", gains), bias, weight) is None
    scaled = Layer("ia3", gains | {"on_bias": torch.tensor(True)})
    assert torch.equal(bias_delta(scaled, bias, weight), bias / 2)
    assert bias_delta(scaled, None, weight) is None


def test_no_alpha_is_the_rank():
    assert [scale(Layer("lora", lora(), alpha)) for alpha in (None, 0.0, 1.0, 2.0, 8.0)] == [1.0, 1.0, 0.5, 1.0, 4.0]
    whole = {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(3, 3)}
    assert scale(Layer("lokr", whole, 1e10)) == 1.0 and rank(Layer("lokr", whole)) is None
    assert scale(Layer("full", {"diff": torch.ones(3, 3)}, 5.0)) == 1.0


def test_shapes():
    conv = {"lora_down.weight": torch.ones(2, 4, 3, 3), "lora_up.weight": torch.ones(6, 2, 1, 1)}
    assert shape(Layer("lora", lora())) == (6, 4)
    assert shape(Layer("lora", conv)) == (6, 4, 3, 3)
    assert shape(Layer("ia3", {"weight": torch.ones(1, 6, 1, 1), "on_input": torch.tensor(0)})) == (6, None)
    assert shape(Layer("ia3", {"weight": torch.ones(4), "on_input": torch.tensor(1)})) == (None, 4)
    assert shape(Layer("oft", {"oft_blocks": torch.ones(3, 2, 2)})) == (6, None)
    assert shape(Layer("norm", {"w_norm": torch.ones(6)})) == (6,)
    assert fits(Layer("lora", lora()), (6, 4, 1, 1)) and fits(Layer("lora", conv), (6, 4, 3, 3))
    pointwise = {"lora_down.weight": torch.ones(2, 4, 1, 1), "lora_up.weight": torch.ones(6, 2, 1, 1)}
    assert fits(Layer("lora", pointwise), (6, 4))
    for wrong in ((4, 6), (6, 8), (6, 4, 3, 3), (6,), (24,)):
        assert not fits(Layer("lora", lora()), wrong)
    assert not fits(Layer("lora", conv), (6, 36, 1, 1))
    assert not fits(Layer("norm", {"w_norm": torch.ones(6)}), (6, 1))
    assert not fits(Layer("oft", {"oft_blocks": torch.ones(3, 2, 2)}), (6,))
    assert fits(Layer("bias", {"diff_b": torch.ones(6)}), (6,)) and fits(
        Layer("bias", {"diff_b": torch.ones(6)}), (6, 4)
    )
    wide = {"hada_w1_a": torch.ones(6, 2), "hada_w1_b": torch.ones(2, 36)}
    loha = wide | {name.replace("w1", "w2"): tensor for name, tensor in wide.items()}
    for inputs, whether in ((4, True), (9, False), (36, False)):
        layer = Layer("loha", loha | {"dora_scale": torch.ones(1, inputs, 1, 1)})
        assert check(layer) is None and fits(layer, (6, 4, 3, 3)) is whether
    assert not fits(Layer("ia3", {"weight": torch.ones(4), "on_input": torch.tensor(1)}), (4, 6, 3, 3))


ONE = torch.ones


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (Layer("lora", {"lora_down.weight": ONE(8, 4), "lora_up.weight": ONE(6, 4)}),
         "its ranks disagree: lora_down has 8, lora_up has 4"),
        (Layer("lora", {"lora_down.weight": ONE(2, 4)}), "lora_up.weight is missing"),
        (Layer("lora", lora(), math.nan), "its alpha is nan"),
        (Layer("lora", lora(), -math.inf), "its alpha is -inf"),
        (Layer("lora", lora(r=0)), "lora_down.weight, lora_up.weight is empty"),
        (Layer("lora", lora(hada_w1_a=ONE(2, 2))), "hada_w1_a is not of lora"),
        (Layer("lora", {"lora_down.weight": ONE(4), "lora_up.weight": ONE(6, 2)}),
         "lora_down.weight is of shape [4], which needs 2 axes"),
        (Layer("lora", {"lora_down.weight": ONE(2, 4, 3, 3), "lora_up.weight": ONE(6, 2, 3, 3)}),
         "lora_up.weight is of shape [6, 2, 3, 3], which needs 2 axes"),
        (Layer("lora", lora(diff_b=ONE(5))), "its outputs disagree: lora_up has 6, diff_b has 5"),
        (Layer("lora", lora(dora_scale=ONE(5, 1))),
         "dora_scale is of shape [5, 1], the layer's weight [6, 4]"),
        (Layer("lora", lora(dora_scale=ONE(1, 3))),
         "dora_scale is of shape [1, 3], the layer's weight [6, 4]"),
        (Layer("loha", {f"hada_w{n}_{h}": t for n in (1, 2) for h, t in (("a", ONE(4 + n, 2)), ("b", ONE(2, 4)))}),
         "its outputs disagree: hada_w1_a has 5, hada_w2_a has 6"),
        (Layer("loha", {"hada_w1_a": ONE(6, 2), "hada_w1_b": ONE(2, 4)}), "hada_w2_a, hada_w2_b is missing"),
        (Layer("lokr", {"lokr_w1": ONE(2, 2), "lokr_w2": ONE(3, 3), "diff_b": ONE(7)}),
         "its outputs disagree: lokr has 6, the tensors beside it 7"),
        (Layer("oft", {"oft_blocks": ONE(3, 6, 2, 2)}),
         "oft_blocks is of shape [3, 6, 2, 2], which makes no butterflies"),
        (Layer("oft", {"oft_blocks": ONE(2, 4, 3, 3)}),
         "oft_blocks is of shape [2, 4, 3, 3], which makes no butterflies"),
        (Layer("oft", {"oft_blocks": ONE(3, 2, 4)}), "its sizes disagree: oft_blocks has 2, oft_blocks has 4"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_is_wrong_is_said(layer, said):
    assert check(layer) == said


def test_names_say_the_kind():
    for name, kind in KINDS.items():
        for form in kind.forms:
            assert kind_of(set(form)) == name
        assert kind.marks <= TENSORS
    assert kind_of({"diff", "diff_b"}) == "full"
    assert kind_of({"lora_up.weight"}) == "lora"
    assert kind_of({"weight"}) is None and kind_of({"alpha", "dora_scale"}) is None
