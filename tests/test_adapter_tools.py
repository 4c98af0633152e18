"""New adapters from old ones, against singular values and sums computed another way."""

import copy
import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from ldm.adapters.adapter import Adapter, Layer
from ldm.adapters.kinds import bias_delta, delta, rank, scale
from ldm.adapters.tools import Fitted, Keep, as_lora, combine, extract, resize
from ldm.errors import ModelError, UsageError


class Block(nn.Module):
    """A linear layer, two convolutions and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(24, 36)
        self.conv = nn.Conv2d(12, 16, 3)
        self.proj = nn.Conv2d(12, 20, 1)
        self.norm = nn.GroupNorm(2, 12)
        self.words = nn.Embedding(9, 6)


def model(seed: int = 0) -> dict[str, nn.Module]:
    torch.manual_seed(seed)
    return {"unet": nn.Sequential(Block()), "text_encoder": nn.Sequential(Block())}


def weight(networks: Mapping[str, nn.Module], address: str) -> Tensor:
    network, _, path = address.partition(".")
    found = networks[network].get_submodule(path).weight
    assert isinstance(found, nn.Parameter)
    return found.detach().double()


def best(matrix: Tensor, kept: int) -> tuple[Tensor, float]:
    """The nearest matrix of a rank to one [o, ...], and how far it is, relative (Eckart and Young 1936)."""
    left, middle, right = torch.linalg.svd(matrix.double().flatten(1), full_matrices=False)
    near = (left[:, :kept] * middle[:kept]) @ right[:kept]
    return near.reshape(matrix.shape), float(middle[kept:].norm() / middle.norm())


TO_Q, CONV, PROJ = "unet.0.to_q", "unet.0.conv", "text_encoder.0.proj"


def lora(shape: tuple[int, ...], r: int, alpha: float | None = None, **more: Tensor) -> Layer:
    outputs, *rest = shape
    factors = {
        "lora_down.weight": torch.randn(r, *rest),
        "lora_up.weight": torch.randn(outputs, r, *[1] * (len(rest) - 1)),
    }
    return Layer("lora", factors | more, alpha)


def every_kind() -> dict[str, Adapter]:
    """An adapter of each kind; where it has a convolution, in each of its forms."""
    torch.manual_seed(1)
    r = torch.randn
    tucker = {"lora_down.weight": r(3, 12, 1, 1), "lora_mid.weight": r(3, 3, 3, 3), "lora_up.weight": r(16, 3, 1, 1)}
    loha = {"hada_w1_a": r(16, 2), "hada_w1_b": r(2, 108), "hada_w2_a": r(16, 2), "hada_w2_b": r(2, 108)}
    kinds = {
        "lora": {TO_Q: lora((36, 24), 7, 3.0), CONV: lora((16, 12, 3, 3), 6, 2.0), PROJ: lora((20, 12, 1, 1), 5)},
        "tucker": {CONV: Layer("lora", tucker, 1.5)},
        "dora": {TO_Q: lora((36, 24), 3, 2.0, dora_scale=torch.rand(36, 1) + 0.5)},
        "loha": {CONV: Layer("loha", loha, 1.0)},
        "lokr": {TO_Q: Layer("lokr", {"lokr_w1": r(4, 4), "lokr_w2_a": r(9, 2), "lokr_w2_b": r(2, 6)}, 1.0)},
        "ia3": {TO_Q: Layer("ia3", {"weight": r(36), "on_input": torch.tensor(False)})},
        "glora": {
            TO_Q: Layer(
                "glora",
                {"a1.weight": r(24, 2), "a2.weight": r(2, 24), "b1.weight": r(36, 2), "b2.weight": r(2, 24)},
                1.0,
            )
        },
        "oft": {CONV: Layer("oft", {"oft_blocks": r(4, 4, 4)}, 0.0)},
        "full": {PROJ: Layer("full", {"diff": r(20, 12, 1, 1)}), CONV: Layer("full", {"diff": r(16, 12, 3, 3)})},
    }
    return {kind: Adapter(layers, name=kind) for kind, layers in kinds.items()}


@pytest.mark.parametrize("kind", every_kind())
def test_the_nearest_lora_of_a_rank_and_its_error(kind: str) -> None:
    networks, adapter = model(), every_kind()[kind]
    found = as_lora(adapter, Keep(2), networks)
    assert found.errors.keys() == found.adapter.layers.keys() == adapter.layers.keys() and not found.dropped
    for address, layer in adapter.layers.items():
        base, new = weight(networks, address), found.adapter.layers[address]
        near, error = best(delta(layer, base), 2)
        assert (new.kind, rank(new), new.alpha) == ("lora", 2, 2.0)
        got = delta(new, base)
        assert (got - near).norm() <= 1e-5 * near.norm()
        told = found.errors[address]
        assert told == pytest.approx(error, abs=1e-6)
        whole = delta(layer, base)
        assert float((whole - got).norm() / whole.norm()) == pytest.approx(told, abs=1e-6)


@pytest.mark.parametrize("kind", every_kind())
def test_without_a_rank_nothing_is_lost(kind: str) -> None:
    networks, adapter = model(), every_kind()[kind]
    found = as_lora(adapter, Keep(), networks)
    for address, layer in adapter.layers.items():
        base = weight(networks, address)
        whole = delta(layer, base)
        assert (delta(found.adapter.layers[address], base) - whole).norm() <= 3e-6 * whole.norm()
        assert found.errors[address] <= 3e-6
        assert rank(found.adapter.layers[address]) == torch.linalg.matrix_rank(whole.flatten(1), rtol=1e-5)


def test_plain_lora_of_no_higher_rank_stays_as_it_is() -> None:
    adapter = every_kind()["lora"]
    for keep in (Keep(), Keep(7), Keep(100)):
        found = as_lora(adapter, keep)
        assert all(found.adapter.layers[a].tensors == layer.tensors for a, layer in adapter.layers.items())
        assert [layer.alpha for layer in found.adapter.layers.values()] == [3.0, 2.0, None]
    tucker = every_kind()["tucker"].layers[CONV]
    plain = as_lora(Adapter({CONV: tucker}), Keep(3)).adapter.layers[CONV]
    assert torch.equal(plain.tensors["lora_up.weight"] * 2, tucker.tensors["lora_up.weight"]) and plain.alpha == 3.0


def test_what_needs_the_model_says_so() -> None:
    for kind, adapter in every_kind().items():
        if kind in ("lora", "tucker", "full"):
            whole, alone = (as_lora(adapter, Keep(2), networks) for networks in (model(), None))
            assert whole.errors == pytest.approx(alone.errors)
            continue
        with pytest.raises(ModelError, match=r"only be computed beside the weights.*name the model"):
            as_lora(adapter, Keep(2))
    with pytest.raises(ModelError, match=r"unet\.9\.to_q, which the model has not"):
        as_lora(Adapter({"unet.9.to_q": lora((36, 24), 2)}), Keep(2), model())
    with pytest.raises(ModelError, match=r"shape \[36, 25\], the model has \[36, 24\]"):
        as_lora(Adapter({TO_Q: lora((36, 25), 2)}), Keep(2), model())


def test_norms_and_biases_stay_beside_it_or_are_named() -> None:
    layers = {
        TO_Q: lora((36, 24), 3, 1.5, **{"lora_up.bias": torch.ones(36)}),
        CONV: Layer("full", {"diff": torch.randn(16, 12, 3, 3), "diff_b": torch.randn(16)}),
        "unet.0.norm": Layer("norm", {"w_norm": torch.randn(12), "b_norm": torch.randn(12)}),
        PROJ: Layer("bias", {"diff_b": torch.randn(20)}),
    }
    adapter, networks = Adapter(layers), model()
    for keep in (Keep(2), Keep(3)):
        kept = as_lora(adapter, keep, networks)
        assert kept.adapter.layers.keys() == layers.keys() and not kept.dropped
        for address, layer in layers.items():
            base = weight(networks, address)
            one, two = (bias_delta(item, None, base) for item in (layer, kept.adapter.layers[address]))
            assert one is not None and two is not None
            torch.testing.assert_close(one, two)
        assert kept.errors.keys() == {TO_Q, CONV}
        bare = as_lora(adapter, keep, networks, biases=False)
        assert bare.dropped == (f"{TO_Q} (bias)", f"{CONV} (bias)", "unet.0.norm (norm)", f"{PROJ} (bias)")
        assert bare.adapter.layers.keys() == {TO_Q, CONV}
        assert all(bias_delta(layer, None, weight(networks, a)) is None for a, layer in bare.adapter.layers.items())


VALUES = [8.0, 4.0, 2.0, 1.0, 0.5]  # singular values: the sum is 15.5, the sum of squares 85.25


@pytest.mark.parametrize(
    ("keep", "count"),
    [
        (Keep(3), 3),
        (Keep(9), 5),
        (Keep(measure="sv_ratio", target=3.99), 2),  # those above 8 / 3.99
        (Keep(measure="sv_ratio", target=4.01), 3),
        (Keep(measure="sv_cumulative", target=12 / 15.5 - 1e-3), 2),
        (Keep(measure="sv_cumulative", target=12 / 15.5 + 1e-3), 3),
        (Keep(measure="sv_fro", target=math.sqrt(84 / 85.25) - 1e-3), 3),
        (Keep(measure="sv_fro", target=math.sqrt(84 / 85.25) + 1e-3), 4),
        (Keep(2, "sv_fro", 1.0), 2),  # never more than the rank
        (Keep(measure="sv_fro", target=1.0), 5),
        (Keep(), 5),
    ],
)
def test_how_much_is_kept(keep: Keep, count: int) -> None:
    torch.manual_seed(2)
    left, right = (torch.linalg.qr(torch.randn(size, 5, dtype=torch.float64))[0] for size in (36, 24))
    up = left * torch.tensor(VALUES, dtype=torch.float64)
    layer = Layer("lora", {"lora_up.weight": up * 2.5, "lora_down.weight": right.T}, 2.0)  # alpha / rank = 1 / 2.5
    assert keep.count(torch.tensor(VALUES, dtype=torch.float64)) == count
    found = resize(Adapter({TO_Q: layer}, {"ss_network_dim": "5", "sshs_model_hash": "0", "ss_steps": "9"}), keep)
    new = found.adapter.layers[TO_Q]
    assert rank(new) == count and scale(new) == pytest.approx(1 / 2.5)
    near, error = best(left @ torch.diag(torch.tensor(VALUES, dtype=torch.float64)) @ right.T, count)
    assert (delta(new, torch.zeros(36, 24)) - near).abs().max() < 1e-5
    assert found.errors[TO_Q] == pytest.approx(error, abs=1e-6)
    assert found.adapter.metadata == {"ss_steps": "9"}  # the others were true of the old tensors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "a rank of 0"),
        ({"measure": "sv_fro", "target": 1.1}, r"1.1 is not possible; it is in \(0, 1\]"),
        ({"measure": "sv_ratio", "target": 0.5}, "at least 1"),
        ({"measure": "sv_fr", "target": 0.5}, "did you mean 'sv_fro'"),
    ],
)
def test_impossible_wishes(options: dict[str, float | str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Keep(**options)  # type: ignore[arg-type]


def tuned(networks: Mapping[str, nn.Module], adapter: Adapter) -> dict[str, nn.Module]:
    """A model that has learnt exactly an adapter."""
    new = {name: copy.deepcopy(network) for name, network in networks.items()}
    for address, layer in adapter.layers.items():
        network, _, path = address.partition(".")
        module = new[network].get_submodule(path)
        base = module.weight.detach().clone()
        module.weight.data += delta(layer, base)
        change = bias_delta(layer, module.bias, base)
        if change is not None:
            module.bias.data += change
    return new


def test_extract_finds_the_lora_again() -> None:
    base, adapter = model(), every_kind()["lora"]
    found = extract(base, tuned(base, adapter), Keep(7), name="it")
    assert found.adapter.name == "it" and found.adapter.layers.keys() == adapter.layers.keys()
    for address, layer in adapter.layers.items():
        before = weight(base, address).float()
        wanted = delta(layer, before)
        assert (delta(found.adapter.layers[address], before) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    cut = extract(base, tuned(base, adapter), Keep(4))
    for address, layer in adapter.layers.items():
        assert cut.errors[address] == pytest.approx(best(delta(layer, weight(base, address)), 4)[1], abs=1e-5)


def test_extract_keeps_or_names_what_is_no_lora() -> None:
    base = model()
    new = {name: copy.deepcopy(network) for name, network in base.items()}
    block = new["unet"].get_submodule("0")
    for name in ("norm.weight", "norm.bias", "conv.bias", "to_q.weight", "to_q.bias", "words.weight"):
        block.get_parameter(name).data += 0.5
    found = extract(base, new, Keep(2))
    assert {a: layer.kind for a, layer in found.adapter.layers.items()} == {
        TO_Q: "lora", CONV: "bias", "unet.0.norm": "norm",
    }  # fmt: skip
    assert found.dropped == ("unet.0.words (embedding)",) and found.errors.keys() == {TO_Q}
    again = tuned(base, found.adapter)["unet"].state_dict()
    for name, value in new["unet"].state_dict().items():
        assert "words" in name or (again[name] - value).abs().max() < 1e-6
    bare = extract(base, new, Keep(2), biases=False)
    assert bare.adapter.layers.keys() == {TO_Q}
    assert set(bare.dropped) == {f"{TO_Q} (bias)", f"{CONV} (bias)", "unet.0.norm (norm)", "unet.0.words (embedding)"}


def test_models_that_cannot_be_compared() -> None:
    base, other = model(), model()
    with pytest.raises(ModelError, match="do not differ"):
        extract(base, other, Keep(2))
    other["unet"][0].to_q = nn.Linear(24, 37)  # type: ignore[index,union-attr]
    with pytest.raises(ModelError, match=r"unet\.0\.to_q\.weight is not of one shape"):
        extract(base, other, Keep(2))


def total(parts: list[tuple[Adapter, float]], address: str, base: Tensor) -> Tensor:
    terms = [gain * delta(adapter.layers[address], base) for adapter, gain in parts if address in adapter.layers]
    return torch.stack(terms).sum(0)


def test_combining_is_linear_and_exact() -> None:
    torch.manual_seed(3)
    networks, kinds = model(), every_kind()
    biased = {
        TO_Q: lora((36, 24), 2, 5.0, **{"lora_up.bias": torch.randn(36)}),
        "unet.0.norm": Layer("norm", {"w_norm": torch.randn(12)}),
        "text_encoder.0.norm": Layer("bias", {"diff_b": torch.randn(12)}),
    }
    plain = [(kinds["lora"], 0.7), (kinds["tucker"], -1.2), (Adapter(biased), 0.4), (kinds["full"], 0.3)]
    mixed = [*plain, *((kinds[kind], 0.5) for kind in ("dora", "loha", "lokr", "ia3", "glora", "oft"))]
    for parts, base in ((plain, None), (mixed, networks)):
        found = combine(parts, networks=base)
        assert found.adapter.layers.keys() == {a for adapter, _ in parts for a in adapter.layers} and not found.errors
        for address, layer in found.adapter.layers.items():
            old = weight(networks, address)
            wanted = total(parts, address, old)
            assert (delta(layer, old) - wanted).norm() <= 5e-6 * wanted.norm(), address
            biases = [
                gain * bias
                for adapter, gain in parts
                if address in adapter.layers and (bias := bias_delta(adapter.layers[address], None, old)) is not None
            ]
            change = bias_delta(layer, None, old)
            assert (change is None) == (not biases)
            if change is not None:
                torch.testing.assert_close(change, torch.stack(biases).sum(0), rtol=1e-5, atol=1e-6)
    whole = combine(plain[:1] * 2)
    assert [rank(layer) for layer in whole.adapter.layers.values()] == [14, 12, 10]


def test_combining_to_a_rank_is_the_nearest_and_says_the_error() -> None:
    networks, kinds = model(), every_kind()
    parts = [(kinds["lora"], 0.7), (kinds["dora"], -0.5)]
    found: Fitted = combine(parts, Keep(4), networks)
    for address, layer in found.adapter.layers.items():
        base = weight(networks, address)
        near, error = best(total(parts, address, base), 4)
        assert rank(layer) == 4 and found.errors[address] == pytest.approx(error, abs=1e-6)
        assert (delta(layer, base) - near).norm() <= 1e-5 * near.norm()


def test_combining_adapters_of_two_models() -> None:
    one, two = Adapter({TO_Q: lora((36, 24), 2)}, {"a": "1", "b": "2"}), Adapter({TO_Q: lora((36, 32), 2)}, {"a": "1"})
    with pytest.raises(ModelError, match=r"different models: unet.0.to_q is of shapes \[36, 24\] and \[36, 32\]"):
        combine([(one, 1.0), (two, 1.0)])
    same = Adapter(one.layers, {"a": "1", "b": "3", "ss_network_dim": "2"})
    assert combine([(one, 1.0), (same, 1.0)]).adapter.metadata == {"a": "1"}
    thin = Adapter({TO_Q: lora((36, 24, 1, 1), 2)})  # a 1x1 convolution is a matrix, too
    wide = combine([(one, 1.0), (thin, 1.0)]).adapter.layers[TO_Q]
    assert wide.tensors["lora_down.weight"].shape == (4, 24, 1, 1)
