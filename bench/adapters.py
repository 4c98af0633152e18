"""What adapters cost on Stable Diffusion 1.5 of random weights (float32), beside diffusers, by turns in one process.

    python bench/adapters.py [--rounds 7]

"copy": a copy in memory of the weights that the adapter changes. "switch": between two loaded adapters of rank 8,
back and forth, until the weights are ready; "new": to a strength that was not in use before. "file": from a kohya
file of 150 MB (rank 128, float16, U-Net and text encoder) to an adapter that is loaded; "ready": until it is in the
weights, too. "call": the U-Net once, with the adapter. diffusers keeps its adapters beside the weights, where each
call pays for them; "fuse" is what brings them in.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ldm.adapters.names import book_of
from ldm.checkpoints.components import Components
from ldm.checkpoints.families import FAMILIES
from ldm.checkpoints.safe import atomic_save_safetensors
from ldm.interop import to_diffusers
from ldm.models.clip import CLIPTextModel
from ldm.models.unet import UNet
from ldm.models.vae import AutoencoderKL
from ldm.pipeline import Pipeline
from ldm.text.tokenizer import CLIPTokenizer

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")  # kohya's targets
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "mlp.fc1", "mlp.fc2")


def model() -> Pipeline:
    """Stable Diffusion 1.5 of random weights."""
    family = FAMILIES["sd1"]
    parts = {name: part.config for name, part in family.parts.items()}
    networks = UNet(parts["unet"]), AutoencoderKL(parts["vae"]), CLIPTextModel(parts["text_encoder"])
    return Pipeline(Components(*networks, CLIPTokenizer.standard(), family.scheduler_config(4, "epsilon")))


def kohya(pipeline: Pipeline, path: Path, rank: int, seed: int) -> list[str]:
    """A kohya file for a model, and the addresses it is for."""
    book, draw = book_of(pipeline.components.networks), torch.Generator().manual_seed(seed)
    tensors, touched = {}, []
    for address, shape in book.modules.items():
        network = address.partition(".")[0]
        if not address.endswith({"unet": ATTENTION, "text_encoder": TEXT}.get(network, ())):
            continue
        name, kernel = book.spelled(address, "kohya"), shape[2:]
        down = torch.randn(rank, shape[1], *kernel, generator=draw) / shape[1] ** 0.5
        up = torch.randn(shape[0], rank, *kernel, generator=draw) / (10 * rank**0.5)
        tensors |= {f"{name}.lora_down.weight": down.half(), f"{name}.lora_up.weight": up.half()}
        tensors[f"{name}.alpha"] = torch.tensor(float(rank))
        touched.append(address)
    atomic_save_safetensors(tensors, path)
    return touched


def rounds(rows: dict[str, Callable[[], object]], count: int) -> dict[str, float]:
    """The median seconds of each, by turns."""
    taken: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(count + 1):
        for name, act in rows.items():
            begun = time.perf_counter()
            act()
            taken[name].append(time.perf_counter() - begun)
    return {name: statistics.median(times[1:]) for name, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    count = parser.parse_args().rounds
    ours = model()
    theirs = copy.deepcopy(to_diffusers(ours))
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        small, other, large = (Path(folder) / f"{name}.safetensors" for name in ("a", "b", "large"))
        touched = kohya(ours, small, 8, 0)
        kohya(ours, other, 8, 1)
        kohya(ours, large, 128, 2)
        networks = ours.components.networks
        weights = [networks[a.partition(".")[0]].get_submodule(a.partition(".")[2]).weight for a in touched]
        copies = [torch.empty_like(weight) for weight in weights]
        print(f"{len(touched)} modules, {sum(w.nbytes for w in weights) / 1e6:,.0f} MB of weights")
        print(f"large file: {large.stat().st_size / 1e6:,.0f} MB")
        x, t = torch.randn(2, 4, 64, 64), torch.tensor([500.0, 500.0])
        text = torch.randn(2, 77, 768)

        def copied() -> None:
            for weight, place in zip(weights, copies, strict=True):
                place.copy_(weight)

        def loaded() -> None:
            ours.unload_lora()
            begun.append(time.perf_counter())
            ours.load_lora(large)
            middle.append(time.perf_counter())
            assert ours.unet
            ready.append(time.perf_counter())

        def switched() -> None:
            first, second = (ours.components.weights.loaded[name].strength for name in ("a", "b"))
            ours.set_lora("a", second)
            ours.set_lora("b", first)
            assert ours.unet

        def renewed() -> None:
            strengths.append(strengths[-1] + 0.01)
            ours.set_lora("a", strengths[-1])
            assert ours.unet

        def fused() -> None:
            theirs.fuse_lora(adapter_names=["a"])
            theirs.unfuse_lora()

        def peft_loaded() -> None:
            theirs.delete_adapters(["large"]) if "large" in theirs.get_list_adapters().get("unet", []) else None
            theirs_begun.append(time.perf_counter())
            theirs.load_lora_weights(large, adapter_name="large")
            theirs_ready.append(time.perf_counter())

        strengths = [0.5]
        begun, middle, ready = [], [], []
        theirs_begun, theirs_ready = [], []
        rounds({"ours": loaded, "theirs": peft_loaded}, count)
        file = statistics.median(b - a for a, b in zip(begun[1:], middle[1:], strict=True))
        whole = statistics.median(b - a for a, b in zip(begun[1:], ready[1:], strict=True))
        peft = statistics.median(b - a for a, b in zip(theirs_begun[1:], theirs_ready[1:], strict=True))
        print(f"file    ldm {file:.3f} s (ready {whole:.3f} s)   diffusers {peft:.3f} s")
        ours.unload_lora()
        theirs.unload_lora_weights()
        ours.load_lora(small, 1.0, "a")
        ours.load_lora(other, 0.0, "b")
        theirs.load_lora_weights(small, adapter_name="a")
        found = rounds({"copy": copied, "ldm": switched, "diffusers": fused}, count)
        ours.unload_lora("b")
        found |= {"new": rounds({"copy": copied, "new": renewed}, count)["new"]}
        print(
            f"switch  ldm {found['ldm']:.3f} s, {found['ldm'] / found['copy']:.2f} of a copy ({found['copy']:.3f} s); "
            f"new {found['new']:.3f} s, {found['new'] / found['copy']:.2f} of it"
            f"   diffusers, fuse and unfuse {found['diffusers']:.3f} s"
        )
        unet = ours.unet
        call = rounds(
            {"ldm": lambda: unet(x, t, text), "diffusers": lambda: theirs.unet(x, t, text, return_dict=False)}, count
        )
        print(f"call    ldm {call['ldm']:.3f} s   diffusers {call['diffusers']:.3f} s, not fused")


if __name__ == "__main__":
    main()
