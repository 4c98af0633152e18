"""What training a LoRA takes, counted and not computed: torch's fake tensors have shapes, types and devices alone."""

import copy
import math
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from ldm.checkpoints.components import Components
from ldm.data.buckets import Size
from ldm.lora import LoRA
from ldm.models.clip import CLIPTextModel
from ldm.runtime import latent_sides
from ldm.training.checkpointing import checkpoint_blocks
from ldm.training.frozen import sparing
from ldm.training.lora_config import LoRAConfig

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
ATTENTION: dict[Any, Callable[..., int]] = {  # the CPU's own, which torch's table lacks: by (query, key, value)
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_, **__: sdpa_flop_count(q.shape, k.shape, v.shape)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g.shape, q.shape, k.shape, v.shape)
    ),
}


class Counted(TorchDispatchMode):
    """Counts what is computed while it lasts. flops: of matrix products, convolutions and attention. now, peak: bytes
    of the tensors that are alive, without those of `known`. What a kernel allocates for itself is not seen.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.flops = 0.0
        self.alive: dict[int, object] = {id(storage): storage for storage in (t.untyped_storage() for t in known)}

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The operation itself; what it computed and made is counted."""
        out, packet = func(*args, **(kwargs or {})), func._overloadpacket
        if packet in ATTENTION:
            self.flops += ATTENTION[packet](*args, **(kwargs or {}))
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in self.alive:
                self._born(tensor.untyped_storage())
        return out

    def _born(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def dies(_: object) -> None:
            self.now -= size
            del self.alive[key]

        self.alive[key] = weakref.ref(storage, dies)
        self.now += size
        self.peak = max(self.peak, self.now)


class Work(NamedTuple):
    """What a computation takes. peak: the most bytes at once, beside the weights. flops: floating-point operations;
    forward: those before the backward pass.
    """

    peak: int
    flops: float
    forward: float


def clip_encoders(c: Components) -> dict[str, CLIPTextModel]:
    """The text encoders that can be trained, by their names in Components."""
    return {name: network for name, network in c.networks.items() if isinstance(network, CLIPTextModel)}


def adapted(config: LoRAConfig, c: Components) -> dict[str, nn.Module]:
    """The networks that a run adapts, by their names in Components."""
    encoders: Mapping[str, nn.Module] = clip_encoders(c) if config.train_text_encoder else {}
    return ({} if config.no_unet else {"unet": c.unet}) | dict(encoders)


def fresh(config: LoRAConfig, networks: Mapping[str, nn.Module]) -> LoRA:
    """The adapter of these networks that a run begins with; of none with rank 0. UsageError for targets that they have
    not.
    """
    if not config.rank:
        return LoRA({})
    return LoRA.for_model(
        networks, config.rank, config.lora_alpha, config.targets, rslora=config.use_rslora, dora=config.use_dora
    )


def shadow(network: nn.Module, of: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a network whose parameters and buffers are `of` the network's; none of its numbers are copied."""
    memo: dict[int, Any] = {id(p): nn.Parameter(of(p.detach()), requires_grad=False) for p in network.parameters()}
    return copy.deepcopy(network, memo | {id(buffer): of(buffer) for buffer in network.buffers()})


def on_meta(tensor: Tensor) -> Tensor:
    """A tensor of the same shape and type, without numbers."""
    return torch.empty_like(tensor, device="meta")


class Pass(NamedTuple):
    """What goes through the networks at once. x: noisy latents; ids: of the texts that are encoded, else `context`."""

    x: Tensor
    t: Tensor
    ids: Tensor
    context: Tensor
    pooled: Tensor
    sizes: Tensor

    @classmethod
    def zeros(cls, c: Components, pictures: int, size: Size) -> "Pass":
        """So many pictures of a size, where the U-Net is and in its type."""
        unet, weight = c.unet.config, c.unet.conv_in.weight
        tokens = getattr(c.text_encoder, "max_length", 0)  # of transformers' own; else CLIP's window
        tokens = tokens or max(encoder.config.max_position_embeddings for encoder in clip_encoders(c).values())
        pooled = unet.projection_class_embeddings_input_dim - 6 * unet.addition_time_embed_dim
        rows, columns = latent_sides(size.height, size.width, c.vae.config.factor)
        shapes = ((unet.in_channels, rows, columns), (), (tokens,), (tokens, unet.cross_attention_dim), (pooled,), (6,))
        kinds = (weight.dtype, torch.int64, torch.int64, weight.dtype, weight.dtype, torch.float32)
        return cls(
            *(torch.zeros(pictures, *s, device=weight.device, dtype=k) for s, k in zip(shapes, kinds, strict=True))
        )


def predicted(networks: Mapping[str, Any], given: Pass) -> Tensor:
    """What the U-Net makes of it; the texts go through the text encoders that are among the networks."""
    said = [network(given.ids)[0] for name, network in networks.items() if name != "unet"]
    context = torch.cat(said, -1).to(given.context.dtype) if said else given.context
    out: Tensor = networks["unet"](given.x, given.t, networks["unet"].prepare(context, given.pooled, given.sizes))
    return out


def step_work(config: LoRAConfig, c: Components, size: Size) -> Work:
    """One pass of a settled run through the networks and back, at pictures of this size. The gradients of what is
    trained are not counted: they are there already.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # which loads a computer algebra system

    weight, cast = c.unet.conv_in.weight, AUTOCAST.get(config.mixed_precision or "no")
    trained_text = clip_encoders(c) if config.trains_text else {}
    fake = FakeTensorMode()
    networks = {name: shadow(net, fake.from_tensor) for name, net in {"unet": c.unet, **trained_text}.items()}
    with fake:
        lora = fresh(config, {name: networks[name] for name in adapted(config, c)})
        for parameter in lora.parameters():
            parameter.grad = torch.zeros_like(parameter)
        if config.gradient_checkpointing:
            checkpoint_blocks(networks.values())
        for name in trained_text if config.placeholder_token else ():
            networks[name].text_model.embeddings.token_embedding.register_forward_hook(_with_gradient)
        given = Pass.zeros(c, config.train_batch_size or 1, size)
        known = [t for net in (*networks.values(), lora) for t in (*net.parameters(), *net.buffers())]
        known += [p.grad for p in lora.parameters() if p.grad is not None]
        with lora.attached(networks), sparing(networks.values()), Counted(known) as counted:
            with torch.autocast(weight.device.type, cast or torch.bfloat16, enabled=cast is not None):
                loss = F.mse_loss(predicted(networks, given).float(), given.x.float())
            forward = counted.flops
            loss.backward()
    return Work(counted.peak, counted.flops, forward)


def _with_gradient(table: nn.Module, args: object, y: Tensor) -> Tensor:
    return y.detach().requires_grad_()


def encoding_work(c: Components, size: Size) -> Work:
    """The autoencoder's latents of one picture."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    weight = next(c.vae.parameters())
    fake = FakeTensorMode()
    vae = shadow(c.vae, fake.from_tensor)
    with fake, torch.no_grad():
        picture = torch.zeros(1, 3, size.height, size.width, device=weight.device, dtype=weight.dtype)
        with Counted([*vae.parameters(), *vae.buffers()]) as counted:
            vae.posterior(picture)
    return Work(counted.peak, counted.flops, counted.flops)


def measured_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a plain matrix product, here and now: the best of four."""
    side = 4096 if device.type == "cuda" else 1024
    a, best = torch.ones(side, side, device=device, dtype=dtype), math.inf
    for _ in range(4):
        begun = time.perf_counter()
        (a @ a)[0, 0].item()  # which waits for the device
        best = min(best, time.perf_counter() - begun)
    return 2 * side**3 / best
