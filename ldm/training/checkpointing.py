"""Gradient checkpointing (Chen et al. 2016, arXiv:1604.06174): blocks keep only what they are given, and compute the
rest again in the backward pass.
"""

from collections.abc import Iterable
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from ldm.models.clip import Layer
from ldm.models.layers import ResBlock, SpatialTransformer

BLOCKS = (ResBlock, SpatialTransformer, Layer)
"""What is computed again as a whole: the parts of a U-Net's levels, and the layers of a text encoder."""


def checkpoint_blocks(networks: Iterable[nn.Module]) -> None:
    """From now on these networks' blocks keep only their inputs for the backward pass. Their numbers stay the same."""
    for network in networks:
        for block in network.modules():
            if isinstance(block, BLOCKS):  # no dice are thrown within
                kept = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
                setattr(block, "forward", kept)  # noqa: B010  # a method, which mypy lets nobody assign
