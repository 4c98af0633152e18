"""A step of LoRA training on Stable Diffusion 1.5 of random weights (float32, CPU), beside diffusers' own, by turns in
one process; and the peak memory of each, in processes of their own.

    python bench/lora_training.py                       # pictures of 256 x 256, batches of 1, rank 4
    python bench/lora_training.py --rounds 9 --side 512 --rank 16

"diffusers": the step of its examples/text_to_image/train_text_to_image_lora.py (tests/peft_lora.py), which encodes
pictures and texts in every step. "uncached": ours, doing the same (`--no-cache`). "cached": ours as it is, with latents
and text states that are kept. Each is the loss, backward, clipping and AdamW on the same weights. First it is looked
whether losses and gradients agree; they must, to 1e-4 of the largest.
"""

import argparse
import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[1:1] = [str(ROOT), str(ROOT / "tests")]

from adapters import model, rounds  # noqa: E402  # of this folder
from peft_lora import apart, give, peft_loss, twins, with_peft  # noqa: E402

from ldm.checkpoints.components import Components  # noqa: E402
from ldm.conditioning import encoder_of  # noqa: E402
from ldm.data.cache import posterior  # noqa: E402
from ldm.training.frozen import sparing  # noqa: E402
from ldm.training.lora import LoRADiffusion, Trainee, loop_config, trainee_of  # noqa: E402
from ldm.training.lora_batches import LoRABatch  # noqa: E402
from ldm.training.lora_config import LoRAConfig  # noqa: E402
from ldm.training.optimizers import make_optimizer  # noqa: E402

WAYS = ("diffusers", "uncached", "cached")
NEAR = 1e-4  # of the largest gradient
CAPTION = "a photo of a red owl on the moon, oil painting"
NONE = torch.empty(0)
Step = Callable[[], object]


def batch_of(side: int) -> LoRABatch:
    """A picture and its dice, nothing of it encoded."""
    draw = torch.Generator().manual_seed(1)
    latents = (1, 4, side // 8, side // 8)
    return LoRABatch(
        mean=torch.rand((1, 3, side, side), generator=draw) * 2 - 1, std=NONE,
        sample=torch.randn(latents, generator=draw), noise=torch.randn(latents, generator=draw), extra=NONE,
        t=torch.tensor([500]), weight=torch.ones(1), mask=NONE, sizes=torch.zeros(1, 6), context=NONE, pooled=NONE,
        captions=[CAPTION],
    )  # fmt: skip


def kept(c: Components, batch: LoRABatch) -> LoRABatch:
    """The same batch as it comes from the cache."""
    said, latents = encoder_of(c)([CAPTION]), posterior(c.vae, batch.mean[0])
    return batch._replace(mean=latents["mean"][None], std=latents["std"][None], context=said.context)


def adapted(c: Components, trainee: Trainee, rank: int) -> Any:
    """diffusers' pipeline on the same weights, with the same adapter in its U-Net."""
    pipe = with_peft(c, "epsilon", {"unet"}, r=rank, lora_alpha=rank)
    pipe.unet.train()
    give(twins(pipe, trainee.lora))
    return pipe


def step_of(way: str, c: Components, config: LoRAConfig, batch: LoRABatch) -> Step:
    """A step of training, from the same first numbers whichever way."""
    trainee, groups = trainee_of(config, c)
    if way == "diffusers":
        pipe = adapted(c, trainee, config.rank)
        parameters = [p for p in pipe.unet.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, config.learning_rate)
        return lambda: stepped(lambda: peft_loss(pipe, batch), parameters, optimizer)
    objective, parameters = LoRADiffusion(config, c, trainee), list(trainee.parameters())
    optimizer = make_optimizer(config.optimizer, groups, loop_config(config))
    given = kept(c, batch) if way == "cached" else batch

    def step() -> None:
        with trainee.attached(c.networks), sparing(c.networks.values()):
            stepped(lambda: objective(given, 0)[0], parameters, optimizer)

    return step


def stepped(loss: Callable[[], Tensor], parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """What all do with a loss."""
    loss().backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def agreement(c: Components, config: LoRAConfig, batch: LoRABatch) -> tuple[float, float]:
    """How far our loss and our gradients are from theirs, relative to the loss and to the largest gradient, for an
    adapter that has learned something.
    """
    trainee, _ = trainee_of(config, c)
    assert trainee.lora is not None
    with torch.no_grad():
        for _, layer in trainee.lora.items():
            layer.up.normal_(std=0.02)
    pipe = adapted(c, trainee, config.rank)
    expected = peft_loss(pipe, batch)
    expected.backward()
    with trainee.attached(c.networks), sparing(c.networks.values()):
        loss, _ = LoRADiffusion(config, c, trainee)(kept(c, batch), 0)
        loss.backward()
    return abs(loss.item() / expected.item() - 1), apart(twins(pipe, trainee.lora))


def peak(way: str, options: list[str]) -> float:
    """The most memory, in GB, of a process that opens the model and takes two steps."""
    command = [sys.executable, __file__, *options, "--alone", way]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--alone", choices=WAYS, help="two steps of one way; prints the peak memory in GB")
    asked = parser.parse_args()
    torch.set_flush_denormal(True)  # as our training has it; it helps both
    c = model().components
    for network in c.networks.values():
        network.requires_grad_(False)
    config = LoRAConfig("none", targets=("attention",), rank=asked.rank, learning_rate=1e-4, device="cpu")
    batch = batch_of(asked.side)
    if asked.alone:
        step = step_of(asked.alone, c, config, batch)
        step(), step()
        lines = Path("/proc/self/status").read_text().splitlines()
        print(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e9)
        return
    options = ["--side", str(asked.side), "--rank", str(asked.rank)]
    print(f"{asked.side} x {asked.side}, rank {asked.rank}, {torch.get_num_threads()} threads, {asked.rounds} rounds")
    loss, gradient = agreement(c, config, batch)
    print(f"apart       loss {loss:.1e}   gradients {gradient:.1e}")
    assert max(loss, gradient) <= NEAR
    taken = rounds({way: step_of(way, c, config, batch) for way in WAYS}, asked.rounds)
    del c
    gc.collect()
    memory = {way: peak(way, options) for way in WAYS}
    for way in WAYS:
        print(f"{way:<10}  {taken[way]:6.2f} s   {taken['diffusers'] / taken[way]:.2f} x   {memory[way]:.2f} GB")


if __name__ == "__main__":
    main()
