"""A step of LoRA training is that of stock diffusers and PEFT: the same loss, the same gradients."""

from dataclasses import replace

import pytest
import torch
from peft_lora import apart, give, peft_loss, twins, with_peft
from singles import small_family

from ldm.checkpoints.components import Components
from ldm.models.clip import CLIPTextModel
from ldm.models.unet import UNet
from ldm.models.vae import AutoencoderKL
from ldm.text.tokenizer import CLIPTokenizer
from ldm.training.frozen import sparing
from ldm.training.lora import LoRADiffusion, trainee_of
from ldm.training.lora_batches import LoRABatch
from ldm.training.lora_config import LoRAConfig

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
RANK, ALPHA, NEAR = 4, 6.0, 1e-5
LAYERS = {"sd1": (1, 1, 1, 1), "sdxl": (1, 1, 2)}  # transformer blocks a level: not SDXL's 70 in all
NONE = torch.empty(0)


def components(name: str) -> Components:
    """A small model of a family, random to the last bias."""
    torch.manual_seed(0)
    family = small_family(name)
    parts = {part: entry.config for part, entry in family.parts.items()}
    tokenizer = CLIPTokenizer.train(["a taco", "an owl"], 520, 77)
    fewer = {"vocab_size": len(tokenizer), "num_hidden_layers": 3, "eos_token_id": 2}
    texts = {part: CLIPTextModel(replace(c, **fewer)) for part, c in parts.items() if "text" in part}
    unet = UNet(replace(parts["unet"], layers_per_block=1, transformer_layers_per_block=LAYERS[name]))
    second = {"tokenizer_2": tokenizer} if "text_encoder_2" in texts else {}
    made = Components(
        unet=unet, vae=AutoencoderKL(parts["vae"]), tokenizer=tokenizer, **texts, **second,
        scheduler_config=family.scheduler_config(4, "epsilon"),
    )  # fmt: skip
    for network in made.networks.values():
        for parameter in network.requires_grad_(False).parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made


def batch_of(c: Components, pictures: bool) -> LoRABatch:
    """Two pictures, or their latents, wider than high."""
    height, width = 2 * c.vae.config.factor, 4 * c.vae.config.factor
    latents = (2, 4, 2, 4)
    return LoRABatch(
        mean=torch.rand(2, 3, height, width) * 2 - 1 if pictures else torch.randn(latents),
        std=NONE if pictures else torch.rand(latents),
        sample=torch.randn(latents), noise=torch.randn(latents), extra=NONE, t=torch.tensor([20, 700]),
        weight=torch.ones(2), mask=NONE,
        sizes=torch.tensor([[height, width, 0, 3, height, width], [300, 500, 2, 0, height, width]]).float(),
        context=NONE, pooled=NONE, captions=["a taco", "a red owl on the moon"],
    )  # fmt: skip


CASES = [
    ("sd1", "epsilon", False, {}),
    ("sd1", "v_prediction", False, {"use_rslora": True}),
    ("sd1", "epsilon", True, {"use_dora": True}),
    ("sd1", "v_prediction", True, {}),
    ("sdxl", "epsilon", False, {"use_dora": True}),
    ("sdxl", "v_prediction", True, {"use_rslora": True}),
]


@pytest.mark.parametrize(("family", "prediction", "text", "options"), CASES)
def test_loss_and_gradients_are_those_of_diffusers_and_peft(family, prediction, text, options, monkeypatch):
    c = components(family)
    config = LoRAConfig(
        "pictures", rank=RANK, lora_alpha=ALPHA, targets=("attention",), prediction_type=prediction,
        train_text_encoder=text, **options,
    )  # fmt: skip
    trainee, _ = trainee_of(config, c)
    with torch.no_grad():
        for _, layer in trainee.lora.items():
            layer.up.normal_(std=0.1)  # as if it had been trained: at zero, half of the gradients are
            if layer.magnitude is not None:
                layer.magnitude.mul_(1 + 0.1 * torch.rand_like(layer.magnitude))
    networks = {address.partition(".")[0] for address, _ in trainee.lora.items()}
    assert networks == {"unet"} | (set(c.networks) - {"vae"} if text else set())
    pipe = with_peft(c, prediction, networks, r=RANK, lora_alpha=ALPHA, **options)
    pairs = twins(pipe, trainee.lora)
    assert sum(p.requires_grad for name in c.networks for p in getattr(pipe, name).parameters()) == len(pairs)
    give(pairs)
    batch = batch_of(c, pictures=not options)
    expected = peft_loss(pipe, batch)
    expected.backward()
    monkeypatch.setattr("ldm.training.frozen.MANY", 0)  # small convolutions, too, as products
    with trainee.attached(c.networks), sparing(c.networks.values()):
        loss, _ = LoRADiffusion(config, c, trainee)(batch, 0)
        loss.backward()
    assert abs(loss.item() / expected.item() - 1) <= NEAR
    assert apart(pairs) <= NEAR
    idle = sum(other.grad is None for _, other in pairs)
    assert idle == (8 if text and family == "sdxl" else 0)  # the last layer of SDXL's first encoder, which nobody hears
