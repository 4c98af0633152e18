"""Training low-rank adapters (Hu et al. 2021, arXiv:2106.09685): W = W0 + alpha / r * up @ down, W0 frozen.

The factors are a module of their own, whose parameters are float32 over networks of any type. While it is attached,
forward hooks add the branch's output to that of every module it is for; the networks themselves never change. What is
trained is drawn with, written and read as an Adapter like any other.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.adapters import kinds
from ldm.adapters.adapter import Adapter, Layer
from ldm.errors import ModelError, UsageError

APART = ("vae", "safety_checker")  # networks that adapters leave alone
TARGETS: Mapping[str, tuple[str, ...]] = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj"),
    "feed-forward": ("ff.net.0.proj", "ff.net.2", "fc1", "fc2"),
    "projections": ("proj_in", "proj_out"),  # with the two above: what kohya trains
    "convolutions": ("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv"),
}
"""Sets of modules under one word: the endings of their names, in the U-Net and in the text encoders."""
TRAINED = ("lora_down.weight", "lora_up.weight", "dora_scale")
"""The tensors of an adapter's layer that are trained."""
Base = nn.Linear | nn.Conv2d


class LowRank(nn.Module):
    """The branch of one linear layer or convolution.

    down [r, I] or [r, I, kh, kw]; up [O, r] or [O, r, 1, 1]; magnitude None, or DoRA's [O, 1] or [O, 1, 1, 1] (Liu et
    al. 2024, arXiv:2402.09353). Parameters are float32 copies of these. alpha: alpha / r multiplies the branch.
    """

    def __init__(self, down: Tensor, up: Tensor, alpha: float, magnitude: Tensor | None = None) -> None:
        super().__init__()
        self.down, self.up = _parameter(down), _parameter(up)
        self.magnitude = None if magnitude is None else _parameter(magnitude)
        self.alpha = alpha

    @classmethod
    def beside(cls, base: Base, rank: int, alpha: float, dora: bool) -> "LowRank":
        """A branch that adds nothing yet: down is drawn (Kaiming uniform, a = sqrt(5)), up is zero."""
        weight = base.weight.detach().float()
        down = nn.init.kaiming_uniform_(weight.new_empty(rank, *weight.shape[1:]), a=math.sqrt(5))
        up = weight.new_zeros(len(weight), rank, *[1] * (weight.ndim - 2))
        return cls(down, up, alpha, _norm(weight) if dora else None)

    def forward(self, base: Base, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        """y = base(x) with the branch `scale` strong, of y's type. Outside autocast the branch is in float32."""
        down, up, share = self.down, self.up, self.alpha / len(self.down)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(down.dtype)
        if self.magnitude is None:
            share *= scale
        # The factor goes where there are fewest numbers, between the two.
        if isinstance(base, nn.Conv2d):
            inner = F.conv2d(x, down, None, base.stride, base.padding, base.dilation) * share
            branch = F.conv2d(inner, up)
        else:
            inner = F.linear(x, down) * share
            if self.magnitude is None and inner.dtype == y.dtype:  # product and sum at once
                return torch.addmm(y.flatten(0, -2), inner.flatten(0, -2), up.t()).reshape(y.shape)
            branch = F.linear(inner, up)
        if self.magnitude is None:
            return y + branch.to(y.dtype)
        gain = self._gain(base, self.magnitude).reshape(-1, *[1] * (up.ndim - 2))  # along the channels of y
        bare = y if base.bias is None else y - base.bias.reshape(gain.shape)
        return y + scale * ((gain - 1) * bare + gain * branch).to(y.dtype)

    def _gain(self, base: Base, magnitude: Tensor) -> Tensor:
        """magnitude / |W0 + alpha / r * up @ down| over all axes but the outputs'. The norm counts as a constant: its
        gradient is left out (section 4.3 of the paper).
        """
        with torch.no_grad(), torch.autocast(base.weight.device.type, enabled=False):
            change = (self.up.flatten(1) @ self.down.flatten(1)).reshape(base.weight.shape)
            norm = _norm(base.weight.float() + self.alpha / len(self.down) * change)
        return magnitude / norm.clamp_min(torch.finfo(norm.dtype).eps)


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().to(torch.float32, copy=True))


def _norm(weight: Tensor) -> Tensor:
    """The norms of a weight's rows, [O, 1] or [O, 1, 1, 1]."""
    norm: Tensor = torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.ndim)), keepdim=True)
    return norm


class LoRA(nn.Module):
    """Branches by the address of the module that each is for: "unet.mid_block.attentions.0.proj_in".

    The networks are no part of it: it can be copied (a running average), saved and moved by itself.
    """

    def __init__(self, layers: Mapping[str, LowRank]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({address.replace(".", "/"): layer for address, layer in layers.items()})

    @classmethod
    def for_model(
        cls,
        networks: Mapping[str, nn.Module],
        rank: int,
        alpha: float | None = None,
        targets: Sequence[str] = ("attention",),
        *,
        ranks: Mapping[str, int] | None = None,
        alphas: Mapping[str, float] | None = None,
        rslora: bool = False,
        dora: bool = False,
    ) -> "LoRA":
        """Fresh branches for the linear layers and convolutions that `targets` name; they change no output yet.

        networks: by their names in Components; those of APART are left alone. alpha: None for the rank. targets: words
        of TARGETS, or endings of addresses, in which * stands for anything ("to_q", "down_blocks.0.*.to_v"). ranks,
        alphas: others for the addresses with such endings; of several the last counts. rslora: alpha / sqrt(rank)
        instead of alpha / rank (Kalajdzievski 2023, arXiv:2312.03732). dora: train magnitudes as well. UsageError: a
        rank below 1, an ending that no module has.
        """
        modules: dict[str, Base] = {
            f"{network}.{path}": part
            for network, model in networks.items()
            if network not in APART
            for path, part in model.named_modules()
            if isinstance(part, nn.Linear) or (isinstance(part, nn.Conv2d) and part.groups == 1)
        }
        wanted = {address for word in targets for address in _named(word, modules)}
        own_rank = {address: r for word, r in (ranks or {}).items() for address in _named(word, modules)}
        own_alpha = {address: a for word, a in (alphas or {}).items() for address in _named(word, modules)}
        layers = {}
        for address in (address for address in modules if address in wanted):
            r = own_rank.get(address, rank)
            if r < 1:
                raise UsageError(f"a rank of {r} was asked for {address}; it is at least 1")
            share = own_alpha.get(address, r if alpha is None else alpha) * (math.sqrt(r) if rslora else 1)
            layers[address] = LowRank.beside(modules[address], r, share, dora)
        return cls(layers)

    @classmethod
    def from_adapter(cls, adapter: Adapter, networks: Mapping[str, nn.Module]) -> "LoRA":
        """Branches that go on from an adapter. ModelError if it is not plain LoRA or DoRA for these networks."""
        layers = {}
        for address, layer in adapter.layers.items():
            weight = _module(networks, address).weight
            if others := sorted(layer.tensors.keys() - set(TRAINED)):
                raise ModelError(f"training goes on from plain LoRA and DoRA only; {address} has {', '.join(others)}")
            if fault := kinds.check(layer):
                raise ModelError(f"{address} of adapter {adapter.name!r} is damaged: {fault}")
            down, up = (layer.tensors[name] for name in TRAINED[:2])
            magnitude = layer.tensors.get(TRAINED[2])
            if not kinds.fits(layer, weight.shape):
                raise ModelError(f"{address} of adapter {adapter.name!r} is not for a weight of {list(weight.shape)}")
            if magnitude is not None and len(magnitude) != len(weight):
                raise ModelError(f"training goes on from magnitudes of outputs only; those of {address} are of inputs")
            r, ones = len(down), [1] * (weight.ndim - 2)
            layers[address] = LowRank(
                down.reshape(r, *weight.shape[1:]).to(weight.device),
                up.reshape(-1, r, *ones).to(weight.device),
                kinds.scale(layer) * r,
                None if magnitude is None else magnitude.reshape(-1, 1, *ones).to(weight.device),
            )
        return cls(layers)

    def items(self) -> Iterator[tuple[str, LowRank]]:
        """Address and branch of every module that is adapted."""
        for key, layer in self.layers.items():
            assert isinstance(layer, LowRank)
            yield key.replace("/", "."), layer

    @contextmanager
    def attached(self, networks: Mapping[str, nn.Module], scale: float = 1.0) -> Iterator[None]:
        """While it lasts, the networks draw with the adapter `scale` strong, and only it is given gradients.

        Keys and values of a text that were prepared outside do not count as drawn with it.
        """
        modules = [(_module(networks, address), layer) for address, layer in self.items()]
        frozen = [p for network in networks.values() for p in network.parameters() if p.requires_grad]
        handles = [module.register_forward_hook(partial(_add, layer, scale)) for module, layer in modules]
        try:
            for parameter in frozen:
                parameter.requires_grad_(False)
            yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter in frozen:
                parameter.requires_grad_(True)

    def adapter(self) -> Adapter:
        """What has been trained so far, as an Adapter of its own: training on does not change it."""
        layers = {}
        for address, layer in self.items():
            parts = zip(TRAINED, (layer.down, layer.up, layer.magnitude), strict=True)
            tensors = {name: part.detach().clone() for name, part in parts if part is not None}
            layers[address] = Layer("lora", tensors, float(layer.alpha))
        return Adapter(layers)


def _add(layer: LowRank, scale: float, module: Base, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
    changed: Tensor = layer(module, args[0], y, scale)
    return changed


def _module(networks: Mapping[str, nn.Module], address: str) -> Base:
    """The module at an address. ModelError if there is none that can be adapted."""
    name, _, path = address.partition(".")
    try:
        module = networks[name].get_submodule(path)
    except (KeyError, AttributeError):
        module = None
    if not isinstance(module, Base):
        raise ModelError(f"the model has no linear layer or convolution {address}, which the adapter is for")
    return module


def _named(word: str, addresses: Iterable[str]) -> list[str]:
    """The addresses with an ending, or one of those that a word of TARGETS stands for. UsageError if there are none."""
    endings = TARGETS.get(word, (word,))
    found = [a for a in addresses if any(fnmatchcase(f".{a}", f"*.{ending}") for ending in endings)]
    if not found:
        known = ", ".join(TARGETS)
        raise UsageError(f"{word!r} is the ending of no linear layer or convolution of the model; words are {known}")
    return found
