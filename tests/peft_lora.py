"""diffusers' own LoRA training on networks of ours: what the tests and bench/lora_training.py hold ours against.

The recipe is that of examples/text_to_image/train_text_to_image_lora.py and its sibling for SDXL: PEFT's adapters on
the attention layers, pictures and texts encoded in every step.
"""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checkpoints.components import Components
from ldm.interop import to_diffusers
from ldm.lora import LoRA
from ldm.pipeline import Pipeline
from ldm.training.lora_batches import LoRABatch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the other libraries' own deprecations while they import
    import diffusers
    from peft import LoraConfig

TARGETS = {
    "unet": ["to_k", "to_q", "to_v", "to_out.0"],
    "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"],
    "text_encoder_2": ["q_proj", "k_proj", "v_proj", "out_proj"],
}


def with_peft(components: Components, prediction: str, names: set[str], **options: Any) -> Any:
    """A stock pipeline that shares its tensors with the components, PEFT's adapters in the networks of these names.

    options: of LoraConfig.
    """
    pipe = to_diffusers(Pipeline(components))
    pipe.scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config, prediction_type=prediction)
    for name, ends in TARGETS.items():
        if (network := getattr(pipe, name, None)) is not None:
            network.requires_grad_(False)
            if name in names:
                network.add_adapter(LoraConfig(init_lora_weights="gaussian", target_modules=ends, **options))
    pipe.vae.requires_grad_(False)
    return pipe


def twins(pipe: Any, lora: LoRA) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """The parameters of our adapter, each with PEFT's of the same meaning."""
    pairs = []
    for address, layer in lora.items():
        name, _, path = address.partition(".")
        network = getattr(pipe, name)
        if path.startswith("text_model.") and not hasattr(network, "text_model"):
            path = path.removeprefix("text_model.")  # which some versions of transformers leave out
        part = network.get_submodule(path)
        pairs += [(layer.down, part.lora_A["default"].weight), (layer.up, part.lora_B["default"].weight)]
        if layer.magnitude is not None:
            pairs.append((layer.magnitude, part.lora_magnitude_vector["default"].weight))
    return pairs


@torch.no_grad()
def give(pairs: list[tuple[nn.Parameter, nn.Parameter]]) -> None:
    """PEFT's adapter becomes ours."""
    for mine, other in pairs:
        other.copy_(mine.reshape(other.shape))


def apart(pairs: list[tuple[nn.Parameter, nn.Parameter]]) -> float:
    """The largest difference of two gradients, in units of the largest gradient. Where one has none, the other has none
    either.
    """
    found = [(mine.grad, other.grad) for mine, other in pairs]
    assert all((mine is None) == (other is None) for mine, other in found)
    given = [(mine, other.reshape(mine.shape)) for mine, other in found if mine is not None]
    largest = max(float(other.abs().max()) for _, other in given)
    return max(float((mine - other).abs().max()) for mine, other in given) / largest


def peft_loss(pipe: Any, batch: LoRABatch) -> Tensor:
    """The loss of their step on a batch, the dice of which are ours. Latents that the batch has are not encoded."""
    mean, std = batch.mean, batch.std
    if not len(std):
        posterior = pipe.vae.encode(mean).latent_dist
        mean, std = posterior.mean, posterior.std
    latents = (mean + std * batch.sample) * pipe.vae.config.scaling_factor
    noisy = pipe.scheduler.add_noise(latents, batch.noise, batch.t)
    context, added = _said(pipe, batch)
    kind = pipe.scheduler.config.prediction_type
    velocity = kind == "v_prediction"
    target = pipe.scheduler.get_velocity(latents, batch.noise, batch.t) if velocity else batch.noise
    output = pipe.unet(noisy, batch.t, context, added_cond_kwargs=added, return_dict=False)[0]
    return F.mse_loss(output.float(), target.float(), reduction="mean")


def _said(pipe: Any, batch: LoRABatch) -> tuple[Tensor, dict[str, Tensor] | None]:
    """The texts' states, and what SDXL is told beside them."""
    parts = [(pipe.tokenizer, pipe.text_encoder)]
    xl = hasattr(pipe, "text_encoder_2")
    parts += [(pipe.tokenizer_2, pipe.text_encoder_2)] if xl else []
    said = []
    for tokenizer, encoder in parts:
        window = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
        ids = tokenizer(list(batch.captions), return_tensors="pt", **window).input_ids
        said.append(encoder(ids, output_hidden_states=xl))
    if not xl:
        return said[0][0], None
    context = torch.cat([one.hidden_states[-2] for one in said], -1)
    return context, {"text_embeds": said[-1].text_embeds, "time_ids": batch.sizes}
