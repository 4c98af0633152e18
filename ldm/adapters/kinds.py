"""The mathematics of every kind of adapter: what its tensors do to the weight W0 of the module it is for.

`delta` is W1 - W0 at strength 1, with alpha / rank inside; at strength s a weight is W0 + s * delta. Of the kinds that
are not linear in their tensors (DoRA, OFT, BOFT) this is the straight line from W0 to W1, as ComfyUI draws it too.

    lora   up down                          Hu et al. 2021, arXiv:2106.09685; Tucker form: Yeh et al. 2024
    loha   (a1 b1) * (a2 b2)                Hyeon-Woo et al. 2022 (FedPara), arXiv:2108.06098, proposition 1
    lokr   w1 (x) w2                        Yeh et al. 2024 (LyCORIS), arXiv:2309.14859
    ia3    w * W0 on inputs or outputs      Liu et al. 2022, arXiv:2205.05638, in LyCORIS' form: w is the gain less 1
    glora  W0 A + B                         Chavan et al. 2023, arXiv:2306.07967, with C = D = E = 0
    oft    R W0 - W0                        Qiu et al. 2023, arXiv:2306.07280; butterflies: Liu et al. 2024 (BOFT),
                                            arXiv:2311.06243
    full, norm, bias                        the difference itself

with lora, loha and lokr under a magnitude where dora_scale is stored (Liu et al. 2024, arXiv:2402.09353, eq. 5).
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ldm.adapters.adapter import Layer

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """One kind of adapter. Axes are written as letters, one an axis: r is the rank, o and i are outputs and inputs,
    a star stands for a convolution's kernel; behind the letters, axes of length 1 may follow; "" is any shape.

    forms: the tensors it needs, in each of its forms, with their axes. optional: those it may have. outputs, inputs:
    the letters whose product is the length of that axis of the weight; inputs None where the tensors do not say.
    change: (tensors, W0, layer) -> W1 - W0 without alpha / rank, of as many elements as W0.
    """

    forms: tuple[Mapping[str, str], ...]
    change: Callable[[Tensors, Tensor, Layer], Tensor]
    outputs: str = "o"
    inputs: str | None = "i"
    optional: Mapping[str, str] = field(default_factory=dict)

    @property
    def marks(self) -> frozenset[str]:
        """The names of tensors that no other kind has: one of them says what a module's adapter is."""
        return frozenset(name for form in self.forms for name in form) - {"weight"}


def _tucker(core: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """core [m, n, kh, kw] between up [o, m] and down [n, i]: [o, i, kh, kw] (Tucker 1966; Yeh et al. 2024)."""
    return torch.einsum("mn...,om,ni->oi...", core, up, down)


def _product(up: Tensor, down: Tensor, core: Tensor | None) -> Tensor:
    """A factor of LoHa or LoKr. up [o, r], but [r, o] beside a core [r, r, kh, kw]; down [r, i]."""
    return up @ down.flatten(1) if core is None else _tucker(core, up.T, down).flatten(1)


def _lora(t: Tensors, _: Tensor, __: Layer) -> Tensor:
    up, down, core = t["lora_up.weight"].flatten(1), t["lora_down.weight"].flatten(1), t.get("lora_mid.weight")
    return up @ down if core is None else _tucker(core, up, down)


def _loha(t: Tensors, _: Tensor, __: Layer) -> Tensor:
    first, second = (_product(t[f"hada_w{n}_a"], t[f"hada_w{n}_b"], t.get(f"hada_t{n}")) for n in (1, 2))
    return first * second


def _lokr(t: Tensors, _: Tensor, __: Layer) -> Tensor:
    first, second = (
        t[f"lokr_w{n}"].flatten(1)
        if f"lokr_w{n}" in t
        else _product(t[f"lokr_w{n}_a"], t[f"lokr_w{n}_b"], t.get(f"lokr_t{n}"))
        for n in (1, 2)
    )
    return torch.kron(first, second)  # of kernels too: they are the fastest axes of w2 and of the weight


def _ia3(t: Tensors, base: Tensor, _: Layer) -> Tensor:
    return base * _along(t["weight"], base, int(bool(t["on_input"])))


def _glora(t: Tensors, base: Tensor, layer: Layer) -> Tensor:
    a1, a2, b1, b2 = (t[f"{name}.weight"].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    if a1.shape[1] != rank(layer):  # LyCORIS once numbered the factors the other way round; so ComfyUI
        a1, a2, b1, b2 = a2, a1, b2, b1
    return torch.einsum("oi...,ij->oj...", base, a1 @ a2) + (b1 @ b2).reshape(base.shape)


def _oft(t: Tensors, base: Tensor, layer: Layer) -> Tensor:
    """Blocks of outputs are turned by R = (I + Q) / (I - Q), Q = B - B^T (Cayley); alpha * outputs bounds the norm of
    Q (Qiu et al. 2023; kohya, LyCORIS). oft_diag is R itself (A1111). As LyCORIS trains them, OFT multiplies by
    R^T and BOFT by R.
    """
    change = torch.zeros_like(base)
    if "oft_diag" in t:
        turns = t["oft_diag"] - torch.eye(t["oft_diag"].shape[-1]).to(base)
    else:
        turns = _cayley(t["oft_blocks"], (layer.alpha or 0.0) * base.shape[0])
    if turns.ndim == 3:
        change = torch.einsum("knm,kn...->km...", turns, base.unflatten(0, turns.shape[:2])).flatten(0, 1)
    else:
        for level, turn in enumerate(turns):  # rows that lie 2^level half-blocks apart meet
            half = turn.shape[-1] // 2 << level
            met = (base + change).unflatten(0, (-1, 2, half)).transpose(1, 2).flatten(0, 2)
            turned = torch.einsum("kmn,kn...->km...", turn, met.unflatten(0, turn.shape[:2])).flatten(0, 1)
            change = change + turned.unflatten(0, (-1, half, 2)).transpose(1, 2).flatten(0, 2)
    if "rescale" in t:
        gain = _along(t["rescale"], base, 0)
        change = gain * change + (gain - 1) * base
    return change


def _cayley(blocks: Tensor, limit: float) -> Tensor:
    """R - I = 2 Q / (I - Q). blocks [..., m, m]; limit of the Frobenius norm of all Q together, 0 for none."""
    skew = blocks - blocks.mT
    size = float(skew.norm())
    if 0 < limit < size:
        skew = skew * (limit / size)
    turn: Tensor = torch.linalg.solve(torch.eye(skew.shape[-1]).to(skew) - skew, 2 * skew)
    return turn


def _along(vector: Tensor, base: Tensor, axis: int) -> Tensor:
    """A vector of any shape, made to broadcast along one axis of the weight."""
    return vector.reshape([-1 if n == axis else 1 for n in range(base.ndim)])


_LOHA = {f"hada_w{n}_{half}": axes for n in (1, 2) for half, axes in (("a", "or"), ("b", "ri*"))}
_LOHA_TUCKER = _LOHA | dict.fromkeys(("hada_w1_a", "hada_w2_a"), "ro") | dict.fromkeys(("hada_t1", "hada_t2"), "rr*")
_LOKR_1 = {"lokr_w1": "ac"}, {"lokr_w1_a": "ar", "lokr_w1_b": "rc"}
_LOKR_2 = (
    {"lokr_w2": "bd*"},
    {"lokr_w2_a": "br", "lokr_w2_b": "rd*"},
    {"lokr_w2_a": "rb", "lokr_w2_b": "rd", "lokr_t2": "rr*"},
)
_BIAS = {"diff_b": "o"}
_MAGNITUDE = _BIAS | {"dora_scale": "", "scalar": ""}

KINDS: Mapping[str, Kind] = {
    "lora": Kind(
        (
            {"lora_down.weight": "ri*", "lora_up.weight": "or"},
            {"lora_down.weight": "ri", "lora_up.weight": "or", "lora_mid.weight": "rr*"},
        ),
        _lora,
        optional=_MAGNITUDE | {"lora_up.bias": "o"},
    ),
    "loha": Kind((_LOHA, _LOHA_TUCKER), _loha, optional=_MAGNITUDE),
    "lokr": Kind(tuple(w1 | w2 for w1 in _LOKR_1 for w2 in _LOKR_2), _lokr, "ab", "cd", _MAGNITUDE),
    "ia3": Kind(({"weight": "", "on_input": ""},), _ia3, "", None, _BIAS | {"on_bias": ""}),
    "glora": Kind(
        (
            {"a1.weight": "ir", "a2.weight": "ri", "b1.weight": "or", "b2.weight": "ri*"},
            {"a1.weight": "ri", "a2.weight": "ir", "b1.weight": "ri*", "b2.weight": "or"},
        ),
        _glora,
        optional=_BIAS | {"scalar": ""},
    ),
    "oft": Kind(
        ({"oft_blocks": "nmm"}, {"oft_blocks": "lnmm"}, {"oft_diag": "nmm"}), _oft, "nm", None, _BIAS | {"rescale": "o"}
    ),
    "full": Kind(({"diff": "o*"},), lambda t, _, __: t["diff"], inputs="", optional=_BIAS),
    "norm": Kind(({"w_norm": "o"},), lambda t, _, __: t["w_norm"], inputs="", optional={"b_norm": "o"}),
    "bias": Kind((_BIAS,), lambda _, base, __: torch.zeros_like(base), inputs=None),
}
"""Every kind, by the name that Layer.kind has. ia3 may have on_bias beside it, one truth value: PEFT scales the bias
with the outputs, LyCORIS does not. BOFT is the form of oft with four axes."""

TENSORS = frozenset(name for kind in KINDS.values() for form in (*kind.forms, kind.optional) for name in form)
"""The names of all tensors of all kinds; alpha, which is a number, is not among them."""

_NOUNS = {"r": "ranks", "o": "outputs", "i": "inputs", "k": "kernels"}
Sizes = dict[str, tuple[int, ...]]


def kind_of(names: Collection[str]) -> str | None:
    """The kind that a module's tensors are of, from their names ("lora_down.weight", ...); None if of no kind."""
    return next((name for name, kind in KINDS.items() if not kind.marks.isdisjoint(names)), None)


def _bind(form: Iterable[tuple[str, str]], tensors: Tensors) -> Sizes:
    """What length each letter stands for; "k" for the kernel. ValueError if two tensors disagree."""
    found: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for name, axes in form:
        letters, shape = axes.rstrip("*"), tuple(tensors[name].shape)
        rest = shape[len(letters) :]
        if axes and (len(shape) < len(letters) or ("*" not in axes and math.prod(rest) != 1)):
            raise ValueError(f"{name} is of shape {list(shape)}, which needs {len(letters)} axes")
        if "*" in axes and rest:
            found.setdefault("k", []).append((name, rest))
        for letter, size in zip(letters, shape, strict=False):
            found.setdefault(letter, []).append((name, (size,)))
    for letter, sizes in found.items():
        if len({size for _, size in sizes}) > 1:
            said = ", ".join(f"{name.removesuffix('.weight')} has {'x'.join(map(str, n))}" for name, n in sizes)
            raise ValueError(f"its {_NOUNS.get(letter, 'sizes')} disagree: {said}")
    return {letter: sizes[0][1] for letter, sizes in found.items()}


def _sizes(layer: Layer) -> Sizes:
    """The lengths of the axes of a layer's form. ValueError says what is wrong with its tensors."""
    kind, names = KINDS[layer.kind], layer.tensors.keys()
    whole = [form for form in kind.forms if form.keys() <= names]
    if not whole:
        nearest = max(kind.forms, key=lambda form: len(form.keys() & names))
        raise ValueError(f"{', '.join(sorted(nearest.keys() - names))} is missing")
    whole = [form for form in whole if len(form) == max(map(len, whole))]
    if strange := names - whole[0].keys() - kind.optional.keys():
        raise ValueError(f"{', '.join(sorted(strange))} is not of {layer.kind}")
    beside = [(name, axes) for name, axes in kind.optional.items() if name in names]
    fits, faults = [], []
    for form in whole:
        try:
            fits.append(_bind([*form.items(), *beside], layer.tensors))
        except ValueError as fault:
            faults.append(fault)
    if not fits:
        raise faults[0]
    return min(fits, key=lambda sizes: sizes.get("r", (0,)))  # a square GLoRA layer fits both its forms: r is the short


def check(layer: Layer) -> str | None:
    """What is wrong with a layer, in words; None if nothing is. The numbers in its tensors are not looked at."""
    if layer.alpha is not None and not math.isfinite(layer.alpha):
        return f"its alpha is {layer.alpha}"
    if empty := [name for name, tensor in layer.tensors.items() if tensor.numel() == 0]:
        return f"{', '.join(empty)} is empty"
    try:
        sizes = _sizes(layer)
    except ValueError as fault:
        return str(fault)
    outputs, *inputs = shape(layer)
    if "o" in sizes and outputs != sizes["o"][0]:
        return f"its outputs disagree: {layer.kind} has {outputs}, the tensors beside it {sizes['o'][0]}"
    if "l" in sizes and (sizes["m"][0] % 2 or sizes["n"][0] % 2 ** (sizes["l"][0] - 1)):
        return f"oft_blocks is of shape {list(layer.tensors['oft_blocks'].shape)}, which makes no butterflies"
    magnitude = layer.tensors.get("dora_scale")
    if magnitude is not None:
        known = math.prod(n or 1 for n in inputs) if _of_inputs(magnitude) else outputs
        if not known or known % magnitude.numel() or (not _of_inputs(magnitude) and known != magnitude.numel()):
            return f"dora_scale is of shape {list(magnitude.shape)}, the layer's weight {list(shape(layer))}"
    return None


def rank(layer: Layer) -> int | None:
    """The rank; None where the kind, or LoKr with two full factors, has none. ValueError: see `check`."""
    return _sizes(layer).get("r", (None,))[0]


def shape(layer: Layer) -> tuple[int | None, ...]:
    """Of the weight the layer is for, as its tensors tell it: (O, I, kh, kw), (O, I) or (O,).

    None is a length that they do not tell; a shape that ends in it may have more axes. LoHa and LoKr outside Tucker
    form tell I * kh * kw as one length. ValueError: see `check`.
    """
    kind, sizes = KINDS[layer.kind], _sizes(layer)
    if layer.kind == "ia3":
        gains = layer.tensors["weight"].numel()
        return (None, gains) if bool(layer.tensors["on_input"]) else (gains, None)
    outputs = math.prod(sizes[letter][0] for letter in kind.outputs)
    if kind.inputs is None:
        return outputs, None
    return outputs, *([math.prod(sizes[c][0] for c in kind.inputs)] if kind.inputs else []), *sizes.get("k", ())


def fits(layer: Layer, weight: Sequence[int]) -> bool:
    """Whether the layer is for a weight of that shape. A linear layer also fits a 1x1 convolution, and the reverse."""
    known, magnitude = shape(layer), layer.tensors.get("dora_scale")
    if magnitude is not None and (len(weight) < 2 or magnitude.numel() != weight[int(_of_inputs(magnitude))]):
        return False
    if None in known:
        axes = len(weight) > 1 or layer.kind == "bias"
        return axes and all(told in (None, size) for told, size in zip(known, weight, strict=False))
    told = tuple(n for n in known if n is not None)
    same_axes = len(told) == len(weight) or 1 in (len(told), len(weight))
    return told == tuple(weight) if same_axes else (told[0], math.prod(told)) == (weight[0], math.prod(weight))


def scale(layer: Layer) -> float:
    """What multiplies the product of the factors: alpha / rank, and LyCORIS' trained scalar where it is stored.

    No alpha, or 0, means the rank (kohya, LyCORIS). 1 without a rank: so for LoKr with two full factors, whatever its
    alpha (LyCORIS), and for OFT, whose alpha is a bound. ValueError: see `check`.
    """
    ranks = rank(layer)
    gain = (layer.alpha or ranks) / ranks if ranks else 1.0
    return gain * (float(layer.tensors["scalar"]) if "scalar" in layer.tensors else 1.0)


def _of_inputs(magnitude: Tensor) -> bool:
    """dora_scale [O], [O, 1, ...] is of outputs (the paper, PEFT, LyCORIS), [1, I, ...] of inputs (LyCORIS)."""
    return magnitude.ndim > 1 and magnitude.shape[0] == 1 and magnitude.numel() > 1


def _wide(layer: Layer, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """A layer's tensors and the weight, all in the type that is computed in."""
    base = weight.detach()
    base = base if base.dtype == torch.float64 else base.float()
    return {name: tensor.detach().to(base) for name, tensor in layer.tensors.items()}, base


def delta(layer: Layer, weight: Tensor) -> Tensor:
    """W1 - W0 at strength 1. weight: W0, of a shape that the layer `fits`. Of its shape; float32, or float64 as it is.

    Under a magnitude m, W1 = m * (W0 + change) / |W0 + change|, the norm over all axes but that of m.
    """
    tensors, base = _wide(layer, weight)
    change = KINDS[layer.kind].change(tensors, base, layer).reshape(base.shape) * scale(layer)
    if "dora_scale" not in tensors:
        return change
    axis = int(_of_inputs(tensors["dora_scale"]))
    others = [n for n in range(base.ndim) if n != axis]
    norm: Tensor = torch.linalg.vector_norm(base + change, dim=others, keepdim=True)
    gain = _along(tensors["dora_scale"], base, axis) / norm.clamp_min(torch.finfo(base.dtype).eps)
    return gain * change + (gain - 1) * base


def bias_delta(layer: Layer, bias: Tensor | None, weight: Tensor) -> Tensor | None:
    """b1 - b0 at strength 1 [O], None if the layer leaves the bias alone. bias: b0 [O], None if the module has none.

    weight is W0, for its type and device. diff_b and b_norm are the difference; lora_up.bias takes alpha / rank
    (PEFT's lora_bias); IA3 scales the bias if on_bias says so.
    """
    tensors, base = _wide(layer, weight)
    parts = [tensors[name] for name in ("diff_b", "b_norm") if name in tensors]
    if "lora_up.bias" in tensors:
        parts.append(tensors["lora_up.bias"] * scale(layer))
    if bias is not None and bool(tensors.get("on_bias", False)) and not bool(tensors["on_input"]):
        parts.append(tensors["weight"].flatten() * bias.detach().to(base))
    return torch.stack([part.flatten() for part in parts]).sum(0) if parts else None


def factors(layer: Layer) -> tuple[Tensor, Tensor] | None:
    """up [O, r], alpha / rank in it, and down [r, I * kh * kw] with delta = up @ down; float32. None if there are none:
    of all kinds but lora, in Tucker form, and under a magnitude.
    """
    if layer.kind != "lora" or not layer.tensors.keys().isdisjoint(("lora_mid.weight", "dora_scale")):
        return None
    up, down = (layer.tensors[f"lora_{half}.weight"].detach().flatten(1).float() for half in ("up", "down"))
    return up * scale(layer), down
