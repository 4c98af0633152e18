"""New adapters from old ones: as plain LoRA, of another rank, from two models, several as one.

All of them cut a singular value decomposition short. Of all matrices of rank r the first r terms are the nearest, and
what they miss is the root of the sum of the squares of the other singular values (Eckart and Young 1936), so the error
that is told is exact. What is kept is stored in float32, the root of each singular value in either factor.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm.adapters import kinds
from ldm.adapters.adapter import Adapter, Layer
from ldm.adapters.names import TEXT, TEXT_2, UNET
from ldm.errors import ModelError, UsageError, choose

Networks = Mapping[str, nn.Module]
PLAIN, BIASES = {"lora_up.weight", "lora_down.weight"}, {"diff_b", "lora_up.bias"}
# beginnings of metadata that new tensors make untrue
STALE = ("ss_network_", "sshs_", "modelspec.hash", "ldm.alphas", "lora_adapter_metadata")

MEASURES: Mapping[str, tuple[str, Callable[[Tensor, float], int]]] = {
    "sv_ratio": ("at least 1", lambda s, target: int((s > s[0] / target).sum())),
    "sv_fro": ("in (0, 1]", lambda s, target: 1 + int(torch.searchsorted(s.square().cumsum(0), target**2 * s @ s))),
    "sv_cumulative": ("in (0, 1]", lambda s, target: 1 + int(torch.searchsorted(s.cumsum(0), target * s.sum()))),
}
"""How many of the singular values s, the largest first, are kept, in kohya's words (networks/resize_lora.py): those
larger than the first / target; as few as hold this part of the Frobenius norm, or of the sum of all.
"""


@dataclass(frozen=True)
class Keep:
    """How much of a layer is kept. rank: at most so many singular values. measure: of MEASURES, with its target.

    With none of them all but rounding errors is kept: nothing is lost. UsageError: a value out of range.
    """

    rank: int | None = None
    measure: str = ""
    target: float = 0.0

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"a rank of {self.rank} is not possible; it is at least 1")
        if self.measure:
            allowed, _ = MEASURES[choose("measure of singular values", self.measure, MEASURES)]
            if not (self.target >= 1 if self.measure == "sv_ratio" else 0 < self.target <= 1):
                raise UsageError(f"{self.measure} of {self.target} is not possible; it is {allowed}")

    def count(self, values: Tensor) -> int:
        """How many of these singular values [n], the largest first, are kept: at least one."""
        if self.measure:
            wanted = MEASURES[self.measure][1](values, self.target)
        else:
            wanted = int((values > values[0] * len(values) * torch.finfo(torch.float32).eps).sum())
        if self.rank is not None:
            wanted = min(wanted, self.rank) if self.measure else self.rank
        return max(1, min(wanted, len(values)))


class Fitted(NamedTuple):
    """A new adapter, and how good it is.

    errors: by address, |delta - new delta| / |delta| in the Frobenius norm. dropped: addresses of what it cannot hold
    and so has not, in words such as "unet.conv_norm_out (norm)".
    """

    adapter: Adapter
    errors: Mapping[str, float]
    dropped: tuple[str, ...] = ()


def as_lora(adapter: Adapter, keep: Keep, networks: Networks | None = None, biases: bool = True) -> Fitted:
    """Every layer as plain LoRA with alpha = rank. Those that are so already and have no higher rank stay as they are.

    networks: of the model the adapter is for. All kinds but plain LoRA and full differences need them, for their
    weights, or for the shape that a module has: ModelError without. biases: keep the changes of norms and biases, which
    no LoRA can be, beside it; else they are dropped.
    """
    return _each(adapter, keep, networks, biases, alpha_is_rank=True)


def resize(adapter: Adapter, keep: Keep, networks: Networks | None = None) -> Fitted:
    """`as_lora` that keeps alpha / rank of every LoRA layer, as kohya's resize_lora.py does."""
    return _each(adapter, keep, networks, biases=True, alpha_is_rank=False)


def extract(base: Networks, tuned: Networks, keep: Keep, name: str = "extracted", biases: bool = True) -> Fitted:
    """The difference of two models as LoRA with alpha = rank: of every linear layer and convolution that differs.

    base, tuned: networks by the names of Components; the U-Net and the text encoders that both have are looked at.
    biases: also the differences of norms and biases, exactly, which few other tools read. What embeddings have learnt
    is dropped. ModelError: two networks of one name are not of one shape, or nothing differs.
    """
    fitted = _gathered(_differences(base, tuned), keep, biases, alpha_is_rank=True)
    if not fitted.adapter.layers:
        held = f", but for {', '.join(fitted.dropped)}" if fitted.dropped else ""
        raise ModelError(f"the two models do not differ in what a LoRA can hold{held}; name two that do")
    return fitted._replace(adapter=replace(fitted.adapter, name=name))


def combine(
    parts: Sequence[tuple[Adapter, float]],
    keep: Keep | None = None,
    networks: Networks | None = None,
    name: str = "combined",
) -> Fitted:
    """One adapter that does what these do together, each times its weight, where they are applied at strength 1.

    Its factors are theirs side by side, so it is the sum exactly, and its ranks are the sums of theirs. keep: cut it
    down behind that; errors are then those of the cut. networks: as in `as_lora`. What all files say in their metadata
    is kept. ModelError: two of them are for modules of different shapes.
    """
    plain = [(as_lora(adapter, Keep(), networks).adapter.layers, weight) for adapter, weight in parts]
    addresses = dict.fromkeys(address for layers, _ in plain for address in layers)
    joined = {
        address: _sum(address, [(layers[address], weight) for layers, weight in plain if address in layers])
        for address in addresses
    }
    said = [set(adapter.metadata.items()) for adapter, _ in parts]
    whole = Adapter(joined, _fresh(dict(set.intersection(*said) if said else ())), name=name)
    return Fitted(whole, {}) if keep is None else as_lora(whole, keep, networks)


class _Target(NamedTuple):
    """What a layer is for: its weight and bias, as far as they are known."""

    weight: Tensor
    bias: Tensor | None = None

    @classmethod
    def of(cls, module: nn.Module) -> "_Target":
        weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
        if weight is None:
            raise KeyError
        return cls(weight.detach(), None if bias is None else bias.detach())


def _target(address: str, layer: Layer, networks: Networks | None) -> _Target | None:
    """None: the layer can not be computed without its weight."""
    if networks is None:
        known = [n or 0 for n in kinds.shape(layer)]
        alone = layer.kind in ("lora", "full", "norm", "bias") and "dora_scale" not in layer.tensors
        return _Target(torch.zeros(1).expand(known)) if alone else None
    network, _, path = address.partition(".")
    try:
        found = _Target.of(networks[network].get_submodule(path))
    except (KeyError, AttributeError) as error:
        raise ModelError(f"the adapter is for {address}, which the model has not; name the model it is for") from error
    if not kinds.fits(layer, found.weight.shape):
        told, here = list(kinds.shape(layer)), list(found.weight.shape)
        raise ModelError(
            f"the adapter is for {address} of shape {told}, the model has {here}; name the model it is for"
        )
    return found


def _each(adapter: Adapter, keep: Keep, networks: Networks | None, biases: bool, alpha_is_rank: bool) -> Fitted:
    """`_fitted` of every layer."""
    targets = {address: _target(address, layer, networks) for address, layer in adapter.layers.items()}
    unknown = [adapter.layers[address].kind for address, target in targets.items() if target is None]
    if unknown:
        names = ", ".join(dict.fromkeys("DoRA" if kind == "lora" else kind for kind in unknown))
        fault = f"{len(unknown)} layers of {adapter.name} ({names}) can only be computed beside the weights they change"
        raise ModelError(f"{fault}; name the model that the adapter is for")
    found = _gathered(
        ((address, layer, targets[address]) for address, layer in adapter.layers.items()), keep, biases, alpha_is_rank
    )
    layers = found.adapter.layers
    return found._replace(adapter=Adapter(layers, _fresh(adapter.metadata), adapter.dialect, adapter.name))


def _gathered(
    items: Iterable[tuple[str, Layer, _Target | None]], keep: Keep, biases: bool, alpha_is_rank: bool
) -> Fitted:
    """`_fitted` of every layer, by address; those without a target are dropped."""
    layers: dict[str, Layer] = {}
    errors: dict[str, float] = {}
    dropped: list[str] = []
    for address, layer, target in items:
        new, error, lost = _fitted(layer, target, keep, biases, alpha_is_rank) if target else (None, None, "embedding")
        dropped += [f"{address} ({lost})"] if lost else []
        layers |= {address: new} if new else {}
        errors |= {} if error is None else {address: error}
    return Fitted(Adapter(layers), errors, tuple(dropped))


def _fresh(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata without what was true of the old tensors alone."""
    return {key: value for key, value in metadata.items() if not key.startswith(STALE)}


def _fitted(
    layer: Layer, target: _Target, keep: Keep, biases: bool, alpha_is_rank: bool
) -> tuple[Layer | None, float | None, str]:
    """A layer as LoRA, the error of its weight if it has one, and what of it is dropped, in a word."""
    bias = kinds.bias_delta(layer, target.bias, target.weight)
    if layer.kind == "bias" or target.weight.ndim < 2:
        if not biases:
            return None, None, layer.kind
        change = {} if bias is None else {"b_norm": bias}
        norm = Layer("norm", {"w_norm": kinds.delta(layer, target.weight)} | change)
        return layer if layer.kind in ("norm", "bias") else norm, None, ""
    beside = {"diff_b": bias} if bias is not None and biases else {}
    lost = "bias" if bias is not None and not biases else ""
    factors, error = _factors(layer), 0.0
    if factors is None or keep.measure or factors[0].shape[1] > (keep.rank or math.inf):
        left, middle, right = _svd(*factors) if factors else _svd(kinds.delta(layer, target.weight).flatten(1))
        kept = keep.count(middle)
        error = float(middle[kept:].norm() / middle.norm().clamp_min(torch.finfo(middle.dtype).tiny))
        root = middle[:kept].sqrt()
        factors = left[:, :kept] * root, root[:, None] * right[:kept]
    elif layer.tensors.keys() <= PLAIN | BIASES:
        held = {name: tensor for name, tensor in layer.tensors.items() if biases or name in PLAIN}
        return replace(layer, tensors=held), error, lost
    scale = 1.0 if alpha_is_rank or layer.kind != "lora" else kinds.scale(layer) or 1.0
    return _plain(*factors, target.weight.shape, scale, beside), error, lost


def _factors(layer: Layer) -> tuple[Tensor, Tensor] | None:
    """`kinds.factors`, of Tucker form too: its core [r, r, kh, kw] goes into down."""
    core = layer.tensors.get("lora_mid.weight")
    if core is None:
        return kinds.factors(layer)
    rest = {name: tensor for name, tensor in layer.tensors.items() if name != "lora_mid.weight"}
    down = torch.einsum("mn...,ni->mi...", core.float(), rest["lora_down.weight"].float().flatten(1))
    return kinds.factors(replace(layer, tensors=rest | {"lora_down.weight": down}))


def _svd(*product: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [o, n], S [n] and V^T [n, i] of a matrix, or of the product of two, made small by QR before."""
    if len(product) == 2:
        up, down = (factor.double() for factor in product)
        basis, small = torch.linalg.qr(up)
        left, middle, right = _svd(small @ down)
        return basis @ left, middle, right
    [matrix] = product
    if matrix.shape[1] > matrix.shape[0]:
        basis, small = torch.linalg.qr(matrix.T)
        left, middle, right = torch.linalg.svd(small.T)
        return left, middle, right @ basis.T
    left, middle, right = torch.linalg.svd(matrix, full_matrices=False)
    return left, middle, right


def _plain(up: Tensor, down: Tensor, shape: Sequence[int], scale: float, beside: dict[str, Tensor]) -> Layer:
    """The LoRA layer whose change is up [o, r] times down [r, i], for a weight of this shape; scale: its alpha / r."""
    ends = [1] * (len(shape) - 2)
    tensors = {
        "lora_up.weight": (up / scale).float().reshape(*up.shape, *ends).contiguous(),
        "lora_down.weight": down.float().reshape(-1, *shape[1:]).contiguous(),
    }
    return Layer("lora", tensors | beside, scale * up.shape[1])


def _differences(base: Networks, tuned: Networks) -> Iterator[tuple[str, Layer, _Target | None]]:
    """What was learnt of each module that differs: address, the differences in float32, what they are for."""
    for network in [name for name in (UNET, TEXT, TEXT_2) if name in base and name in tuned]:
        after = dict(tuned[network].named_modules())
        for path, old in base[network].named_modules():
            address = f"{network}.{path}"
            weight, bias = (_change(address, name, old, after.get(path)) for name in ("weight", "bias"))
            target = None if isinstance(old, nn.Embedding) or weight is bias is None else _Target.of(old)
            if weight is None and bias is not None:
                yield address, Layer("bias", {"diff_b": bias}), target
            elif weight is not None:
                kind, *names = ("full", "diff", "diff_b") if weight.ndim > 1 else ("norm", "w_norm", "b_norm")
                changes = zip(names, (weight, bias), strict=True)
                yield address, Layer(kind, {name: change for name, change in changes if change is not None}), target


def _change(address: str, name: str, old: nn.Module, new: nn.Module | None) -> Tensor | None:
    """The difference of a parameter of two modules; None if there is none, or no such parameter."""
    one, two = (None if module is None else module._parameters.get(name) for module in (old, new))
    if one is None and two is None:
        return None
    if one is None or two is None or one.shape != two.shape:
        raise ModelError(f"{address}.{name} is not of one shape in both models; name two of one architecture")
    return None if torch.equal(one, two) else two.detach().float() - one.detach().float()


def _sum(address: str, parts: Sequence[tuple[Layer, float]]) -> Layer:
    """The sum of layers for one module, each times its weight; all plain LoRA, or differences."""
    known = {tuple(n or 0 for n in kinds.shape(layer)) for layer, _ in parts if layer.kind != "bias"}
    if len({(shape[0], math.prod(shape)) for shape in known}) > 1:
        shapes = " and ".join(str(list(shape)) for shape in sorted(known))
        raise ModelError(f"the adapters are for different models: {address} is of shapes {shapes} in them")
    shape = max(known, key=len, default=(1, 1))  # of a 1x1 convolution, that with the kernel
    weight = torch.zeros(shape)
    changes = [(kinds.bias_delta(layer, None, weight), gain) for layer, gain in parts]
    biases = [gain * change for change, gain in changes if change is not None]
    bias = torch.stack(biases).sum(0) if biases else None
    pairs = [(found, gain) for layer, gain in parts if (found := kinds.factors(layer))]
    if pairs:
        up = torch.cat([gain * factors[0] for factors, gain in pairs], 1)
        down = torch.cat([factors[1] for factors, _ in pairs])
        return _plain(up, down, shape, 1.0, {} if bias is None else {"diff_b": bias})
    if not known:
        return Layer("bias", {} if bias is None else {"diff_b": bias})
    total = torch.stack([gain * kinds.delta(layer, weight) for layer, gain in parts if layer.kind == "norm"]).sum(0)
    return Layer("norm", {"w_norm": total} | ({} if bias is None else {"b_norm": bias}))
