"""One owner of a model's weights: the base, and on top of it what the adapters in use add. W = W0 + sum of s * delta.

Adapted weights lie in tensors of their own, and a parameter points either to them or to the base, which is never
written to: without adapters, and wherever their strength is 0, the base is in use to the last bit. The two settings
used last stay made where memory allows, so that going back and forth between them costs nothing.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ldm.adapters.adapter import Adapter, Layer
from ldm.adapters.kinds import bias_delta, delta, factors
from ldm.adapters.strength import Factors, Strength
from ldm.errors import ModelError, UsageError, choose
from ldm.memory import available_bytes

MADE = 2  # adapted tensors of a parameter that are kept where memory allows
BIASES = frozenset({"diff_b", "b_norm", "lora_up.bias", "on_bias"})


class Model(Protocol):
    """What has networks: Components."""

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """The networks by name."""


class Loaded(NamedTuple):
    """An adapter and how strongly it is in use where nothing else is said."""

    adapter: Adapter
    strength: Strength


Cast = tuple[Loaded, ...]
"""The adapters of a run, in order."""
Setting = tuple[tuple[Adapter, Factors], ...]
"""The adapters in use at one moment of it."""
Parts = tuple[tuple[Layer, float], ...]
"""What is added to one module, and how strongly."""
Place = tuple[str, str]
"""A parameter: the address of its module, and "weight" or "bias"."""


@dataclass
class _Slot:
    """A parameter that adapters change: its base, the adapted tensors by what they are made of, the last used at the
    end, and what is in it now.
    """

    parameter: nn.Parameter
    base: Tensor
    made: dict[Parts, Tensor] = field(default_factory=dict)
    now: Parts = ()

    @property
    def held(self) -> Tensor:
        """What the parameter points to, unless somebody else has changed it."""
        return self.made[self.now] if self.now else self.base

    def put(self, parts: Parts) -> None:
        """Let the parameter point to the base, or to what was made of these parts."""
        self.now = parts
        if parts:
            self.made[parts] = self.made.pop(parts)
        self.parameter.data = self.held

    def place(self, more: bool) -> Tensor:
        """A tensor to make another one in: new if `more` may be kept, else the one that was used longest ago."""
        full = len(self.made) >= (MADE if more else 1)
        return self.made.pop(next(iter(self.made))) if full else torch.empty_like(self.base)


class Weights:
    """The weights of a model and the adapters that are loaded into it.

    loaded: by name; another table with every change, so that threads may read it. They may draw with different
    adapters at once: `using` lets one setting in at a time.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.loaded: dict[str, Loaded] = {}
        self._slots: dict[Place, _Slot] = {}
        self._now: Setting = ()
        self._users = 0
        self._turn = threading.Condition()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_turn"}  # a lock is of one process

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state, _turn=threading.Condition(), _users=0)

    def load(self, name: str, adapter: Adapter, strength: Strength) -> None:
        """Add an adapter that fits the model, in place of one of that name; the next `using` brings it into use."""
        with self._turn:
            self.loaded = {**self.loaded, name: Loaded(adapter, strength)}

    def set(self, name: str, strength: Strength) -> None:
        """Say how strong an adapter is from the next `using` on. UsageError: as `known`."""
        with self._turn:
            self.loaded = {**self.loaded, name: self.loaded[self.known(name)]._replace(strength=strength)}

    def known(self, name: str) -> str:
        """`name`, if an adapter of that name is loaded. UsageError, naming the nearest, otherwise."""
        if not self.loaded:
            raise UsageError(f"no adapter is loaded, so none is called {name!a:.60}; give its file with --lora")
        return choose("adapter", name, self.loaded)

    def unload(self, name: str | None = None) -> None:
        """Take an adapter out, or all of them, and let go of what no other one changes. UsageError: as `known`."""
        with self._turn:
            gone = {*self.loaded} if name is None else {self.known(name)}
            self.loaded = {name: one for name, one in self.loaded.items() if name not in gone}
            cast = self.cast()
        layers = [adapter.layers for adapter, _ in cast]
        with self.using(at(cast)), self._turn:  # nobody else changes the weights meanwhile
            for (address, leaf), slot in list(self._slots.items()):
                left = {own[address] for own in layers if address in own}
                slot.made = {parts: made for parts, made in slot.made.items() if left >= {layer for layer, _ in parts}}
                if not left:
                    del self._slots[address, leaf]

    def cast(self, said: Mapping[str, Strength] | None = None) -> Cast:
        """What is loaded. said: strengths by name, for a run, in place of those it was loaded with."""
        return tuple(one._replace(strength=(said or {}).get(name, one.strength)) for name, one in self.loaded.items())

    @contextmanager
    def using(self, setting: Setting) -> Iterator[None]:
        """The networks with these adapters, for as long as the block lasts. It waits while others use another setting.

        ModelError: somebody else has replaced the adapted weights.
        """
        with self._turn:
            while self._users and setting != self._now:
                self._turn.wait()
            if setting != self._now:
                self._change(setting)
            self._users += 1
        try:
            yield
        finally:
            with self._turn:
                self._users -= 1
                self._turn.notify_all()

    def rest(self) -> None:
        """Bring into use what is loaded, so that the networks can be called from outside."""
        with self.using(at(self.cast())):
            pass

    def bare(self) -> None:
        """Bring the base back and forget what was made, so that networks can be moved or changed."""
        with self.using(()), self._turn:
            self._slots.clear()

    def _change(self, setting: Setting) -> None:
        wanted: dict[Place, list[tuple[Layer, float]]] = {place: [] for place in self._slots}
        for adapter, strengths in setting:
            for address, layer in adapter.layers.items():
                if strength := strengths.of(address):
                    wanted.setdefault((address, "weight"), [])  # of which a bias may be made
                    for leaf in leaves(layer):
                        wanted.setdefault((address, leaf), []).append((layer, strength))
        changed = {place: tuple(parts) for place, parts in wanted.items() if tuple(parts) != self._slot(place).now}
        new = [place for place, parts in changed.items() if parts and parts not in self._slots[place].made]
        spare = _spare([self._slots[place].base for place in new])
        with torch.inference_mode(False):
            try:
                for place in new:
                    self._adapt(place, changed[place], spare)
            except BaseException:
                changed, setting = dict.fromkeys(self._slots, ()), ()
                raise
            finally:
                for place, parts in changed.items():
                    self._slots[place].put(parts)
                self._now = setting

    def _slot(self, place: Place) -> _Slot:
        """The slot of a parameter. ModelError: it was replaced while an adapter was in it."""
        address, leaf = place
        if place not in self._slots:
            network, _, path = address.partition(".")
            parameter = getattr(self.model.networks[network].get_submodule(path), leaf)
            self._slots[place] = _Slot(parameter, parameter.data)
        slot = self._slots[place]
        if slot.parameter.data_ptr() != slot.held.data_ptr():
            if slot.now:
                raise ModelError(
                    f"{address}.{leaf} was replaced while an adapter was in it; take adapters out before networks are "
                    "loaded anew, and move them by Pipeline.to"
                )
            slot.base, slot.made = slot.parameter.data, {}
        return slot

    @torch.no_grad()
    def _adapt(self, place: Place, parts: Parts, spare: bool) -> None:
        """Make the adapted tensor of a parameter. spare: there is memory for a second one."""
        slot, (address, leaf) = self._slots[place], place
        adapted = slot.place(spare)
        if leaf == "weight":
            _add(adapted, slot.base, parts)
        else:
            weight, bias = self._slots[address, "weight"].base, slot.base
            for layer, strength in parts:
                change = bias_delta(layer, slot.base, weight)
                assert change is not None  # `leaves` told of one
                bias = bias.to(change) + strength * change
            adapted.copy_(bias)
        slot.made[parts] = adapted


def _spare(bases: Sequence[Tensor]) -> bool:
    """Whether memory has room for as much again and for as much beside it, so that who goes back and forth between two
    settings need not make them anew. On the CPU alone: elsewhere memory is too dear.
    """
    cpu = all(base.device.type == "cpu" for base in bases)
    return cpu and available_bytes(torch.device("cpu")) > 2 * sum(base.nbytes for base in bases)


def at(cast: Cast, step: int = 0, steps: int = 1) -> Setting:
    """What is in use at a step of a run, counted from 0, of so many steps. Strength 0 is as if not there."""
    share = step / (steps - 1) if steps > 1 else 0.0
    return tuple((adapter, strength.at(share, steps)) for adapter, strength in cast)


def leaves(layer: Layer) -> tuple[str, ...]:
    """The parameters of its module that a layer changes."""
    biased = not BIASES.isdisjoint(layer.tensors)
    return (*(("weight",) if layer.kind != "bias" else ()), *(("bias",) if biased else ()))


def _add(adapted: Tensor, base: Tensor, parts: Parts) -> None:
    """adapted = base + sum of s * delta, computed in float32 at least."""
    pairs = [(pair, strength) for layer, strength in parts if (pair := factors(layer))]
    wide = torch.promote_types(base.dtype, torch.float32)
    given = base.to(wide)
    if len(pairs) < len(parts) or not base.is_contiguous():
        adapted.copy_(sum((strength * delta(layer, given) for layer, strength in parts), given))
        return
    result = adapted if adapted.dtype == wide else torch.empty_like(given)
    for (up, down), strength in pairs:
        scaled, down = strength * up.to(base.device, wide), down.to(base.device, wide)
        torch.addmm(given.flatten(1), scaled, down, out=result.flatten(1))
        given = result
    if result is not adapted:
        adapted.copy_(result)
