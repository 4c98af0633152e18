"""The processes of a run: what they agree on, and how they share the frozen networks among them.

One process, several on a machine (torchrun, `accelerate launch`) and several machines do the same: every process takes
each n-th batch of one stream, gradients are averaged (DDP), and the main process alone writes.
"""

import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from ldm.checkpoints.safe import read_json
from ldm.errors import LdmError, UsageError
from ldm.models.layers import TransformerBlock
from ldm.training.checkpointing import BLOCKS
from ldm.training.state import ABOUT, newest

T = TypeVar("T")
log = logging.getLogger(__name__)
PATIENCE = timedelta(hours=12)  # for which processes wait: the main one may have class pictures to draw
FOREIGN = ("FSDP", "DEEPSPEED", "MEGATRON_LM")  # what accelerate can do that cuts up what is trained


def joined(device: torch.device) -> PartialState:
    """This process among those of its run, which the first call brings together. device: "cpu", or "cuda", of which
    each process then has its own. UsageError where `accelerate launch` was told to cut up what is trained.
    """
    for kind in FOREIGN:
        if os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() == "true":
            raise UsageError(
                f"accelerate was configured for {kind}, which would cut up the little that is trained here; launch "
                "with --multi_gpu, and give --fsdp to the command to share the frozen networks"
            )
    state = PartialState(cpu=device.type == "cpu", timeout=PATIENCE)
    if state.num_processes == 1 and os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_ADDR" in os.environ:
        log.warning(
            "accelerate launch --cpu starts one process, whatever --num_processes says; for several give --multi_gpu "
            "in its place (on CPUs too), or use torchrun --standalone --nproc_per_node"
        )
    return state


def told_by_main(make: Callable[[], T]) -> T:
    """What `make` gives in the main process, in all of them; the others wait for it."""
    state = PartialState()
    told = [make() if state.is_main_process else None]
    if state.num_processes > 1:
        broadcast_object_list(told)
    return told[0]  # type: ignore[return-value]  # the main one's own


def common_state(folder: Path, passes: int) -> Path | None:
    """The newest sound state in a run's folder, the same one for all processes; None where there is none.

    passes: batches of each process in a step. LdmError: a process does not see it, or it is of a run whose processes
    take another number of batches in a step together.
    """
    found, state = told_by_main(lambda: newest(folder)), PartialState()
    if found is None:
        return None
    if not found.is_dir():
        raise LdmError(
            f"process {state.process_index} does not see {found}, which the main process goes on from; give an output "
            "folder on a disk that all machines share"
        )
    now, before = passes * state.num_processes, read_json(found / ABOUT).get("run", {}).get("batches_per_step")
    if isinstance(before, int) and before != now:
        each, rest = divmod(before, state.num_processes)
        fitting = f"a number of processes that {before} can be divided by" if rest else f"{each} of the latter"
        raise LdmError(
            f"{found} is of a run with batches_per_step {before}, and this one would have {now} (processes times "
            f"gradient_accumulation_steps: {state.num_processes} x {passes}); go on with {fitting}, or give another "
            "output folder"
        )
    return found


def agreed(accelerator: Accelerator, bad: bool, number: int) -> tuple[bool, int]:
    """Whether a step went wrong in any process, and the signal that any of them was sent: all do the same."""
    if accelerator.num_processes == 1:
        return bad, number
    told = torch.tensor([int(bad), number], device=accelerator.device)
    seen = accelerator.gather(told[None])
    return bool(seen[:, 0].any()), int(seen[:, 1].max())


def averaged(accelerator: Accelerator, figures: Mapping[str, Tensor]) -> dict[str, float]:
    """The means over all processes; those that are not finite are left out."""
    own = torch.stack([one.detach().to(accelerator.device, torch.float32) for one in figures.values()])
    means = accelerator.reduce(own, "mean").tolist()
    return {name: mean for name, mean in zip(figures, means, strict=True) if math.isfinite(mean)}


def shard_frozen(networks: Iterable[nn.Module], device: torch.device) -> None:
    """Each process keeps its share of the blocks' weights, and has all of a block while that computes (FSDP2: Zhao et
    al. 2023, arXiv:2304.11277). Numbers stay the same. From then on all processes must call the networks together.

    Whole stays what is outside the blocks of a level or layer, and the projections of the text to keys and values,
    which are called without their block: of SD1.5's U-Net 9 %, of SDXL's 14 %. device: of this process.
    """
    if (processes := PartialState().num_processes) == 1:
        log.warning("fsdp has no effect: there is one process; start several with torchrun or accelerate launch")
        return
    mesh = init_device_mesh(device.type, (processes,))
    for network in networks:
        own = set(network.parameters())
        blocks = [part for part in network.modules() if isinstance(part, BLOCKS)]
        whole = {p for part in network.modules() if isinstance(part, TransformerBlock) for p in _text_weights(part)}
        for block in blocks:
            own -= set(block.parameters())
            fully_shard(block, mesh=mesh, ignored_params=whole)
        fully_shard(network, mesh=mesh, ignored_params=own | whole)  # blocks under one root are gathered ahead
        for part in network.modules():
            if isinstance(part, FSDPModule):  # once as for training: buffers made under inference_mode were of no use
                part.unshard()
                part.reshard()


def _text_weights(block: TransformerBlock) -> list[nn.Parameter]:
    """What `keys_values` uses."""
    parts = [block.attn2, *[block.attn1] * block.only_text]
    return [p for part in parts for linear in (part.to_k, part.to_v) for p in linear.parameters()]
