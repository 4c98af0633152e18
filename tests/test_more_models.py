"""The rarer networks and text encoders against diffusers, transformers and open_clip, in the same process."""

import importlib.util
import json
import sys
import types
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_models import close, digest, on_meta, ours, pair, shapes, theirs
from torch import nn

from ldm.checkpoints.load import load_into
from ldm.errors import ModelError, UsageError
from ldm.models.clip import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig
from ldm.models.presets import TEXT_ENCODERS, UNETS, VAES
from ldm.models.safety import SafetyChecker, SafetyConfig
from ldm.models.tiny_vae import AutoencoderTiny, TinyVAEConfig
from ldm.models.unet import CROSS, PLAIN, UNet, UNetConfig
from ldm.models.vae import AutoencoderKL, VAEConfig
from ldm.safety import check_preprocessor, clip_pixels, flagged, preprocessor
from ldm.text.transformers_text import KINDS, TransformersText, TransformersTextConfig

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the other libraries' own deprecations while they import
    import diffusers
    import transformers
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from diffusers.pipelines.stable_diffusion.safety_checker import cosine_distance
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


def shaken(model: nn.Module) -> nn.Module:
    """The network with random weights, no norm or bias left at its neutral value."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


pytestmark = pytest.mark.usefixtures("one_thread")

# ---- U-Nets ------------------------------------------------------------------------------------------------------

X4_UPSCALER = {  # unet/config.json of the published model
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.8.0.dev0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [256, 512, 512, 1024],
    "center_input_sample": False,
    "cross_attention_dim": 1024,
    "down_block_types": [PLAIN, CROSS, CROSS, CROSS],
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 7,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "num_class_embeds": 1000,
    "only_cross_attention": [True, True, True, False],
    "out_channels": 4,
    "sample_size": 128,
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
X4_VAE = {  # its vae/config.json
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.8.0.dev0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 256,
    "scaling_factor": 0.08333,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}


def test_published_configs_are_the_presets():
    assert UNetConfig.from_dict(X4_UPSCALER) == UNETS["x4-upscaler"]
    assert VAEConfig.from_dict(X4_VAE) == VAES["x4-upscaler"]
    assert VAES["x4-upscaler"].factor == 4


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (UNETS["x4-upscaler"], 473_398_020),
        (UNETS["sd15-inpaint"], 859_535_364),
        (UNETS["sd15-ip2p"], 859_532_484),  # a further channel is 9 x 320 weights
        (UNETS["sd2-inpaint"], 865_925_124),
        (UNETS["sdxl-inpaint"], 2_567_478_084),
        (UNETS["sdxl-refiner"], 2_259_526_660),
        (VAES["x4-upscaler"], 55_325_927),  # KL-f4's 55,312,063, and a fourth latent channel
    ],
)  # fmt: skip
def test_published_network(config, count):
    us = on_meta(ours, config)
    assert sum(p.numel() for p in us.parameters()) == count
    assert shapes(us) == shapes(on_meta(theirs, config))


@pytest.mark.parametrize(
    ("config", "cls"), [(X4_UPSCALER, diffusers.UNet2DConditionModel), (X4_VAE, diffusers.AutoencoderKL)]
)
def test_published_config_builds_what_diffusers_builds(config, cls):
    own = UNet if cls is diffusers.UNet2DConditionModel else AutoencoderKL
    config_class = UNetConfig if own is UNet else VAEConfig
    assert shapes(on_meta(own, config_class.from_dict(config))) == shapes(on_meta(cls.from_config, config))


def test_header_of_instruct_pix2pix():
    """Keys and shapes of diffusers' module with the published config, by their digest, as in test_models."""
    found = shapes(on_meta(ours, UNETS["sd15-ip2p"]))
    assert (len(found), digest(f"{key} {list(shape)}" for key, shape in found.items())) == (686, "6d95078065c2debc")


def reduced(name: str, divisor: int, heads: tuple[int, ...]) -> UNetConfig:
    """The topology of a published U-Net at a fraction of its width."""
    c = UNETS[name]
    widths = tuple(width // divisor for width in c.block_out_channels)
    small = replace(c, block_out_channels=widths, norm_num_groups=8, cross_attention_dim=24, num_heads=heads)
    return (
        replace(small, addition_time_embed_dim=8, projection_class_embeddings_input_dim=16 + 5 * 8)
        if (c.addition_time_embed_dim)
        else small
    )


REDUCED = {
    "sd15-inpaint": reduced("sd15-inpaint", 10, (8,) * 4),
    "sd15-ip2p": reduced("sd15-ip2p", 10, (8,) * 4),
    "sd2-inpaint": reduced("sd2-inpaint", 10, (2, 4, 8, 8)),
    "sdxl-refiner": reduced("sdxl-refiner", 16, (6, 12, 24, 24)),
    "x4-upscaler": reduced("x4-upscaler", 8, (8,) * 4),
}


def conditions(config: UNetConfig) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """What `prepare` takes beside the text, and the same for diffusers."""
    g = torch.Generator().manual_seed(3)
    if config.num_class_embeds:
        labels = torch.tensor([20, 350])
        return {"labels": labels}, {"class_labels": labels}
    if config.addition_time_embed_dim:
        pooled = torch.randn(2, 16, generator=g)
        sizes = torch.tensor([[1024.0, 768, 0, 12, 6.0], [512, 512, 3, 0, 2.5]])
        return {"pooled": pooled, "sizes": sizes}, {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
    return {}, {}


@pytest.mark.parametrize("name", REDUCED)
@torch.no_grad()
def test_unet_equals_diffusers(name):
    config = REDUCED[name]
    us, them = pair(config)
    mine, their = conditions(config)
    for size in ((16, 16), (9, 14)):
        g = torch.Generator().manual_seed(1)
        x, t = torch.randn(2, config.in_channels, *size, generator=g), torch.tensor([10.0, 700.5])
        context = torch.randn(2, 7, 24, generator=g)
        close(us(x, t, us.prepare(context, **mine)), them(x, t, context, **their).sample)


ALL_TEXT = replace(REDUCED["x4-upscaler"], only_cross_attention=(True,) * 4, num_class_embeds=0)


@torch.no_grad()
def test_one_bool_for_all_levels():
    """`only_cross_attention: true` is every level's, but not the mid block's, in diffusers too."""
    given = ALL_TEXT.to_dict() | {"only_cross_attention": True}
    assert UNetConfig.from_dict(given) == ALL_TEXT
    them = shaken(diffusers.UNet2DConditionModel.from_config(given))
    us = ours(ALL_TEXT).eval()
    us.load_state_dict(them.state_dict())
    assert us.mid_block.attentions[0].transformer_blocks[0].attn1.to_k.in_features == 128
    x, t, context = torch.randn(2, 7, 8, 8), torch.tensor([3.0, 999.0]), torch.randn(2, 5, 24)
    close(us(x, t, context), them(x, t, context).sample)


@pytest.mark.parametrize("config", [*REDUCED.values(), ALL_TEXT])
def test_config_round_trip(config):
    assert UNetConfig.from_dict(config.to_dict()) == config
    assert UNetConfig.from_dict(dict(on_meta(theirs, config).config)) == config
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()


def test_only_cross_attention_is_one_a_level():
    with pytest.raises(ModelError, match="only_cross_attention has 3"):
        replace(REDUCED["x4-upscaler"], only_cross_attention=(True, True, False))


@torch.no_grad()
def test_text_is_looked_at_once_a_prompt():
    """A step computes nothing that depends on the text or the labels alone."""
    us = ours(REDUCED["x4-upscaler"]).eval()
    context = torch.randn(2, 7, 24)
    prepared = us.prepare(context, labels=torch.tensor([20, 20]))
    seen = []
    for name, part in us.named_modules():
        if isinstance(part, nn.Embedding) or (isinstance(part, nn.Linear) and part.in_features == 24):
            part.register_forward_hook(lambda _m, _i, _y, name=name: seen.append(name))
    us(torch.randn(2, 7, 8, 8), torch.tensor([5.0, 5.0]), prepared)
    assert seen == []
    us.prepare(context, labels=torch.tensor([20, 20]))
    # 16 transformers (6 down, 1 mid, 9 up), of which the 10 of levels 1 and 2 look at the text twice
    assert len(seen) == 1 + 2 * 16 + 2 * 10 and "class_embedding" in seen


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 1000]), torch.tensor([-1, 0])])
def test_labels_are_asked_for(labels):
    us = ours(REDUCED["x4-upscaler"])
    with pytest.raises(UsageError, match="0 to 999"):
        us.prepare(torch.zeros(2, 7, 24), labels=labels)


# ---- tiny autoencoder --------------------------------------------------------------------------------------------

TAESD = {  # config.json of the published model
    "_class_name": "AutoencoderTiny",
    "_diffusers_version": "0.20.0.dev0",
    "act_fn": "relu",
    "decoder_block_out_channels": [64, 64, 64, 64],
    "encoder_block_out_channels": [64, 64, 64, 64],
    "force_upcast": False,
    "in_channels": 3,
    "latent_channels": 4,
    "latent_magnitude": 3,
    "latent_shift": 0.5,
    "num_decoder_blocks": [3, 3, 3, 1],
    "num_encoder_blocks": [1, 3, 3, 3],
    "out_channels": 3,
    "scaling_factor": 1.0,
    "upsampling_scaling_factor": 2,
}
TINY = TinyVAEConfig(
    latent_channels=5,
    encoder_block_out_channels=(8, 8, 8),
    decoder_block_out_channels=(12, 12, 12),
    num_encoder_blocks=(1, 2, 1),
    num_decoder_blocks=(2, 1, 1),
    scaling_factor=0.7,
)


def tiny_pair(config: TinyVAEConfig) -> tuple[AutoencoderTiny, nn.Module]:
    them = shaken(diffusers.AutoencoderTiny.from_config(config.to_dict()))
    us = AutoencoderTiny(config).eval()
    us.load_state_dict(them.state_dict())
    return us, them


def test_taesd_is_the_default():
    assert TinyVAEConfig.from_dict(TAESD) == TinyVAEConfig() == TinyVAEConfig.from_dict({})
    us, them = on_meta(AutoencoderTiny, TinyVAEConfig()), on_meta(diffusers.AutoencoderTiny.from_config, TAESD)
    assert sum(p.numel() for p in us.parameters()) == 2_445_063
    assert shapes(us) == shapes(them)
    assert TinyVAEConfig().factor == 8 and TINY.factor == 4


@pytest.mark.parametrize("config", [TinyVAEConfig(), TINY], ids=["taesd", "small"])
def test_tiny_vae_config_round_trip(config):
    assert TinyVAEConfig.from_dict(config.to_dict()) == config
    assert (
        TinyVAEConfig.from_dict(dict(on_meta(diffusers.AutoencoderTiny.from_config, config.to_dict()).config)) == config
    )


@pytest.mark.parametrize("config", [TinyVAEConfig(), TINY], ids=["taesd", "small"])
@torch.no_grad()
def test_tiny_vae_equals_diffusers(config):
    """As diffusers' pipelines call it: latents divided by scaling_factor before decode, multiplied after encode."""
    us, them = tiny_pair(config)
    images = torch.rand(2, 3, 24, 40) * 2 - 1
    latents = 4 * torch.randn(2, config.latent_channels, 3, 5)  # large enough to be squashed
    encoded = them.encode(images).latents
    close(us.encode(images), encoded * config.scaling_factor)
    mean, logvar = us.posterior(images)
    close(mean, encoded)
    assert mean.shape == logvar.shape and set(logvar.flatten().tolist()) == {-30.0}
    assert torch.equal(us.encode(images, torch.randn_like(mean)), us.encode(images))
    close(us.decode(latents), them.decode(latents / config.scaling_factor).sample)
    decoded = us.to(memory_format=torch.channels_last).decode(latents.to(memory_format=torch.channels_last))
    assert decoded.is_contiguous(memory_format=torch.channels_last)


def test_tiny_vae_refuses():
    with pytest.raises(UsageError, match="multiples of 8"):
        AutoencoderTiny(TinyVAEConfig()).encode(torch.zeros(1, 3, 16, 20))
    for change in ({"act_fn": "gelu"}, {"shift_factor": 0.1}, {"_class_name": "AutoencoderKL"}, {"new_field": 1}):
        with pytest.raises(ModelError, match=next(iter(change))):
            TinyVAEConfig.from_dict(TAESD | change)
    with pytest.raises(ModelError, match="one width"):
        TinyVAEConfig(encoder_block_out_channels=(64, 64, 32, 64))
    with pytest.raises(ModelError, match="num_decoder_blocks has 3"):
        TinyVAEConfig(num_decoder_blocks=(3, 3, 1))


# ---- safety checker ----------------------------------------------------------------------------------------------

VISION = CLIPVisionConfig(32, 64, 16, 2, 4, 3, 24, 8, "quick_gelu", 1e-5)
SAFETY = {  # safety_checker/config.json of the published model, without its text half, which nothing reads
    "_name_or_path": "clip-vit-large-patch14/",
    "architectures": ["SafetyChecker"],
    "initializer_factor": 1.0,
    "logit_scale_init_value": 2.6592,
    "model_type": "clip",
    "projection_dim": 768,
    "torch_dtype": "float32",
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_act": "quick_gelu",
        "image_size": 224,
        "patch_size": 32,
    },
    "vision_config_dict": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
    },
}


def their_checker(config: dict[str, object]) -> nn.Module:
    return StableDiffusionSafetyChecker(transformers.CLIPConfig(**config))


def nested(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers 5 leaves out one of the two "vision_model." of the published file."""
    return {f"vision_model.{key}" if key.startswith("vision_model.") else key: value for key, value in state.items()}


def safety_pair() -> tuple[SafetyChecker, nn.Module]:
    torch.manual_seed(0)
    config = SafetyConfig(VISION)
    them = shaken(their_checker(config.to_dict()))
    us = SafetyChecker(config).eval()
    us.load_state_dict(nested(them.state_dict()))
    return us, them


def test_published_safety_checker():
    """Parameters: CLIP ViT-L/14's image half with its projection, and 20 concepts with their thresholds."""
    config = SafetyConfig.from_dict(SAFETY)
    assert config == SafetyConfig() == SafetyConfig.from_dict(config.to_dict())
    us, them = on_meta(SafetyChecker, config), on_meta(their_checker, config.to_dict())
    assert shapes(us) == {key: tuple(value.shape) for key, value in nested(them.state_dict()).items()}
    assert sum(p.numel() for p in us.parameters()) == 303_966_208 + 20 * 768 + 20
    assert SafetyConfig.from_dict(json.loads(them.config.to_json_string())) == config


@pytest.mark.parametrize("names", [dict, nested], ids=["as transformers 5 writes", "as published"])
def test_safety_checker_opens(tmp_path, names):
    us, them = safety_pair()
    them.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(names(load_file(file)), file)
    found = on_meta(SafetyChecker, SafetyConfig.from_dict(json.loads((tmp_path / "config.json").read_text())))
    load_into(found, file)
    assert all(torch.equal(value, found.state_dict()[key]) for key, value in us.state_dict().items())


@torch.no_grad()
def test_similarities_equal_diffusers():
    us, them = safety_pair()
    pixels = torch.randn(5, 3, 24, 24)
    vectors = them.visual_projection(them.vision_model(pixels)[1])
    for found, expected in zip(us.similarities(pixels), (them.concept_embeds, them.special_care_embeds), strict=True):
        close(found, cosine_distance(vectors, expected))


@torch.no_grad()
def test_verdicts_equal_diffusers():
    """At, just above and just below the thresholds, with and without a special concept that lowers them."""
    us, them = safety_pair()
    pixels = torch.randn(8, 3, 24, 24)
    concepts, special = us.similarities(pixels)
    verdicts = set()
    for margin in (-0.02, -0.0106, -0.0096, -0.0094, -0.0006, -0.0004, 0.0004, 0.0006, 0.02):
        for strictness in (-0.01, -0.0004, 0.0006):
            for model in (us, them):
                model.concept_embeds_weights.copy_(concepts[3] - margin)
                model.special_care_embeds_weights.copy_(special[3] - strictness)
            expected = them(clip_input=pixels, images=np.zeros((8, 2, 2, 3)))[1]
            assert us(pixels).tolist() == expected
            verdicts.add((margin, strictness, expected[3]))
    assert {verdict for margin, _, verdict in verdicts if margin == -0.0094} == {False, True}  # the lowered bar decides
    assert {verdict for *_, verdict in verdicts} == {False, True}


PICTURES = [(64, 64), (300, 200), (224, 500), (513, 511), (16, 48), (225, 224)]


@pytest.mark.parametrize("size", PICTURES)
def test_clip_pixels_equal_transformers(size):
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (size[1] // 4 + 1, size[0] // 4 + 1, 3), np.uint8))
    picture = small.resize(size, Image.Resampling.BILINEAR)
    expected = CLIPImageProcessorPil()(picture, return_tensors="pt").pixel_values
    assert clip_pixels([picture]).dtype == torch.float32
    assert (clip_pixels([picture, picture])[1:] - expected).abs().max() <= 1e-5
    grey = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=24)(picture.convert("L"), return_tensors="pt")
    assert (clip_pixels([picture.convert("L")], 24) - grey.pixel_values).abs().max() <= 1e-5


def test_preprocessor_config():
    written = preprocessor()
    assert json.loads(CLIPImageProcessorPil(**written).to_json_string()) == written
    old = {"size": 224, "crop_size": 224, "feature_extractor_type": "CLIPFeatureExtractor", "resample": 3}
    for config in (written, {}, old):
        check_preprocessor(config)
    for change in ({"image_mean": [0.5, 0.5, 0.5]}, {"size": 336}, {"do_resize": False}, {"resample": 2}):
        with pytest.raises(ModelError, match=next(iter(change))):
            check_preprocessor(written | change)


@torch.no_grad()
def test_flagged():
    """Each picture is judged alone, as diffusers judges it."""
    us, them = safety_pair()
    rng = np.random.default_rng(1)
    pictures = [Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)) for _ in range(4)]
    concepts, _ = us.similarities(clip_pixels(pictures, 24))
    for model in (us, them):
        model.concept_embeds_weights.copy_(concepts[2] - 0.001)
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=24)(pictures, return_tensors="pt").pixel_values
    expected = them(clip_input=pixels, images=np.zeros((4, 2, 2, 3)))[1]
    assert flagged(us, pictures) == tuple(expected) and expected[2]


@pytest.mark.parametrize("change", [{"vision_config": 3}, {"projection_dim": "768"}])
def test_safety_config_refuses(change):
    with pytest.raises(ModelError, match="safety checker config"):
        SafetyConfig.from_dict(SAFETY | change)


# ---- T5 and BERT -------------------------------------------------------------------------------------------------

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["a", "taco", "on", "the", "red", "moon", "owl", "##s", "blue"]
PROMPTS = ["a taco on the moon", "", "Owls on the red moon", "a taco on the moon"]


def bert_tokenizer(**options: object):
    return transformers.BertTokenizer(vocab={word: i for i, word in enumerate(SPECIAL + WORDS)}, **options)


def t5_tokenizer(**options: object):
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{word.strip('#')}" for word in WORDS), "s", "a", "o", "w", "l"]
    vocab = [(piece, -float(i)) for i, piece in enumerate(dict.fromkeys(pieces))]
    return transformers.T5Tokenizer(vocab=vocab, extra_ids=0, **options)


SMALL_BERT = {
    "vocab_size": 14,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
}
SMALL_T5 = {
    "vocab_size": 32,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
}


def folder_of(tmp_path: Path, name: str, mask: bool = False, **tokens: object) -> tuple[Path, nn.Module, object]:
    """A model folder's text_encoder/ and tokenizer/, written by transformers, and its objects."""
    torch.manual_seed(0)
    if name == "BertModel":
        config, tokenizer = transformers.BertConfig(**SMALL_BERT, use_attention_mask=mask), bert_tokenizer(**tokens)
    else:
        config, tokenizer = transformers.T5Config(**SMALL_T5, use_attention_mask=mask), t5_tokenizer(**tokens)
    model = shaken(getattr(transformers, name)(config))
    model.save_pretrained(tmp_path / "text_encoder")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path, model, tokenizer


def opened(folder: Path, **options: object) -> TransformersText:
    return TransformersText.from_folder(folder / "text_encoder", folder / "tokenizer", **options)


def fault(call) -> str:
    """What a ModelError says."""
    with pytest.raises(ModelError) as error:
        call()
    return str(error.value)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_text_equals_transformers(tmp_path, no_sockets, name, mask):
    """Bit for bit, one prompt a call, padded and cut to the window."""
    folder, them, tokenizer = folder_of(tmp_path, name, mask, model_max_length=7)
    us = opened(folder)
    said = us(PROMPTS)
    assert us.max_length == 7 and said.pooled is None and said.context.shape == (4, 7, 16)
    with torch.no_grad():
        for prompt, row in zip(PROMPTS, said.context, strict=True):
            tokens = tokenizer(prompt, padding="max_length", max_length=7, truncation=True, return_tensors="pt")
            seen = tokens.attention_mask if mask else None
            assert torch.equal(them(tokens.input_ids, attention_mask=seen).last_hidden_state[0], row)
            assert torch.equal(us([prompt]).context[0], row)
    assert us.config.hidden_size == 16 and us.config.vocab_size == them.config.vocab_size


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore")  # diffusers' remarks on a text encoder that is not CLIP's
def test_text_equals_stock_pipeline(tmp_path, name, mask):
    folder, them, tokenizer = folder_of(tmp_path, name, mask, model_max_length=12)
    small = replace(REDUCED["sd15-ip2p"], in_channels=4, cross_attention_dim=16)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=theirs(replace(VAEConfig(), block_out_channels=(8, 8), norm_num_groups=4)),
        text_encoder=them,
        tokenizer=tokenizer,
        unet=theirs(small),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with torch.no_grad():
        positive, negative = pipeline.encode_prompt("a taco on the moon", "cpu", 1, True, negative_prompt="blue owls")
    said = opened(folder)(["a taco on the moon", "blue owls"]).context
    assert torch.equal(said[:1], positive) and torch.equal(said[1:], negative)


@pytest.mark.parametrize(("name", "window"), [("T5EncoderModel", 77), ("BertModel", 32)])
def test_window_of_a_tokenizer_that_states_none(tmp_path, name, window):
    assert opened(folder_of(tmp_path, name)[0]).max_length == window


def test_tokenizer_of_older_folders(tmp_path):
    """BERT's vocab.txt alone."""
    folder, _, _ = folder_of(tmp_path, "BertModel", model_max_length=32)
    expected = opened(folder)(PROMPTS).context
    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    (folder / "tokenizer" / "vocab.txt").write_text("".join(f"{word}\n" for word in SPECIAL + WORDS))
    assert torch.equal(opened(folder)(PROMPTS).context, expected)


def test_bert_window_is_at_most_its_positions(tmp_path):
    assert opened(folder_of(tmp_path, "BertModel", model_max_length=512)[0]).max_length == 40


@pytest.mark.parametrize("name", KINDS)
def test_dropped_words(tmp_path, name):
    """What is dropped, and what is kept: the kept part alone gives the same states."""
    us = opened(folder_of(tmp_path, name, model_max_length=6)[0])
    assert us.room == (5 if name == "T5EncoderModel" else 4)
    long = "a taco on the red red owls"
    kept = {"T5EncoderModel": "a taco on the red", "BertModel": "a taco on the"}[name]
    assert us.dropped([long, kept, ""]) == (tuple(long.split()[len(kept.split()) :]), (), ())
    assert torch.equal(us([long]).context, us([kept]).context)
    assert us.dropped(["a taco on owls"]) == ((() if name == "T5EncoderModel" else ("owls",)),)


@pytest.mark.parametrize("name", KINDS)
def test_saved_as_transformers_reads_it(tmp_path, name):
    """Keys are those of the files; config, weights and tokenizer go back to stock transformers."""
    folder, them, tokenizer = folder_of(tmp_path / "a", name, True, model_max_length=9)
    us, copy = opened(folder), tmp_path / "b"
    stored = load_file(folder / "text_encoder" / "model.safetensors")
    assert us.state_dict().keys() == stored.keys()
    assert all(torch.equal(value, stored[key]) for key, value in us.state_dict().items())
    (copy / "text_encoder").mkdir(parents=True)
    save_file(us.state_dict(), copy / "text_encoder" / "model.safetensors", {"format": "pt"})
    (copy / "text_encoder" / "config.json").write_text(json.dumps(us.config.to_dict()))
    us.save_tokenizer(copy / "tokenizer")
    again = getattr(transformers, name).from_pretrained(copy / "text_encoder", local_files_only=True)
    words = getattr(transformers, KINDS[name].tokenizer).from_pretrained(copy / "tokenizer", local_files_only=True)
    assert words(PROMPTS).input_ids == tokenizer(PROMPTS).input_ids and words.model_max_length == 9
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), them.state_dict().values(), strict=True))
    assert again.config.use_attention_mask is True


@pytest.mark.parametrize("name", KINDS)
def test_text_moves_and_changes_type(tmp_path, name):
    us = opened(folder_of(tmp_path, name)[0], dtype=torch.bfloat16)
    assert us(["a taco"]).context.dtype == torch.bfloat16
    expected = opened(tmp_path)(["a taco"]).context
    apart = (us.to("cpu", torch.float32)(["a taco"]).context - expected).abs().max() / expected.abs().max()
    assert apart <= 0.02  # some roundings of 2^-9 each; 0.006 for T5 and 0.009 for BERT


def test_t5_in_float16_equals_transformers(tmp_path):
    """In both, the layers whose results leave float16's range stay in float32."""
    folder, _, tokenizer = folder_of(tmp_path, "T5EncoderModel", model_max_length=9)
    them = transformers.T5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float16)
    said = opened(folder, dtype=torch.float16)(["a taco"]).context
    tokens = tokenizer("a taco", padding="max_length", max_length=9, return_tensors="pt")
    with torch.no_grad():
        assert said.dtype == torch.float16 and torch.equal(said, them(tokens.input_ids)[0].half())


def test_both_names_of_t5s_embedding_and_no_pooler(tmp_path):
    """Files with T5's embedding twice, and BERT files without the pooler, which nothing needs."""
    folder, _, _ = folder_of(tmp_path / "t5", "T5EncoderModel")
    file = folder / "text_encoder" / "model.safetensors"
    expected, stored = opened(folder)(["a taco"]).context, load_file(file)
    assert "shared.weight" in stored and "encoder.embed_tokens.weight" not in stored
    save_file(stored | {"encoder.embed_tokens.weight": stored["shared.weight"].clone()}, file)
    us = opened(folder)
    assert torch.equal(us(["a taco"]).context, expected) and us.state_dict().keys() == stored.keys()

    folder, _, _ = folder_of(tmp_path / "bert", "BertModel")
    file = folder / "text_encoder" / "model.safetensors"
    expected = opened(folder)(["a taco"]).context
    save_file({key: value for key, value in load_file(file).items() if not key.startswith("pooler.")}, file)
    assert torch.equal(opened(folder)(["a taco"]).context, expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["GPT2Model"]}, "GPT2Model"),
        ({"architectures": None}, "T5EncoderModel or BertModel"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_size": 15}, "15"),
        ({"hidden_act": "os.system"}, "os.system"),
        ({"num_hidden_layers": 3}, "missing"),
    ],
)
def test_bert_refuses(tmp_path, change, said):
    folder, _, _ = folder_of(tmp_path, "BertModel")
    file = folder / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert said in fault(lambda: opened(folder))


def test_config_can_switch_nothing(tmp_path, no_sockets):
    """Fields by which transformers would fetch or run code, and files that it would follow, change nothing."""
    folder, _, _ = folder_of(tmp_path, "BertModel")
    expected = opened(folder)(["a taco"]).context
    file = folder / "text_encoder" / "config.json"
    evil = {
        "auto_map": {"AutoModel": "evil.Model"},
        "_attn_implementation": "kernels-community/flash-attn",
        "transformers_weights": "evil.bin",
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | evil))
    (folder / "text_encoder" / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/evil"}')
    tokens = folder / "tokenizer" / "tokenizer_config.json"
    evil = {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}, "tokenizer_class": "EvilTokenizer"}
    tokens.write_text(json.dumps(json.loads(tokens.read_text()) | evil))
    assert torch.equal(opened(folder)(["a taco"]).context, expected)


def test_text_refuses(tmp_path):
    folder, _, _ = folder_of(tmp_path, "BertModel")
    us = opened(folder)
    for call in (lambda: us([]), lambda: us(["a"], 2), lambda: us(["\ud800"]), lambda: us.dropped(["\ud800"])):
        with pytest.raises(UsageError):
            call()
    assert us(["a"], 0).context.shape == (1, 32, 16)
    words = folder / "tokenizer" / "tokenizer.json"
    for wrong, said in (("{}", "model"), ("junk", "JSON"), (json.dumps({"model": {"type": "BPE"}}), "WordPiece")):
        words.write_text(wrong)
        assert "no BertTokenizer" in (sentence := fault(lambda: opened(folder))) and said in sentence
    words.unlink()
    assert "no tokenizer.json or vocab.txt" in fault(lambda: opened(folder))
    bert_tokenizer(extra_special_tokens=["<one>"]).save_pretrained(folder / "tokenizer")
    assert "15 tokens" in fault(lambda: opened(folder))
    (folder / "text_encoder" / "model.safetensors").unlink()
    assert "cannot read" in fault(lambda: opened(folder))


def test_absent_fields_are_transformers_defaults():
    for name, kind in KINDS.items():
        found = TransformersTextConfig.from_dict({"architectures": [name]}).fields
        theirs_ = getattr(transformers, kind.config)()
        assert {field: getattr(theirs_, field, False) for field in found} == found


def test_without_transformers(tmp_path, monkeypatch):
    folder, _, _ = folder_of(tmp_path, "BertModel")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "needs the package transformers" in fault(lambda: opened(folder))


# ---- open_clip ---------------------------------------------------------------------------------------------------


@pytest.fixture
def text_transformer(monkeypatch):
    """open_clip's TextTransformer, without the package's image half, which would want torchvision."""
    found = importlib.util.find_spec("open_clip")
    if found is None or not found.submodule_search_locations:
        pytest.skip("open_clip is not installed: pip install --no-deps open_clip_torch==3.3.0")
    package = types.ModuleType("open_clip")
    package.__path__ = list(found.submodule_search_locations)
    misc = types.ModuleType("torchvision.ops.misc")
    misc.FrozenBatchNorm2d = nn.Identity
    for name in [name for name in sys.modules if name.split(".")[0] in ("open_clip", "torchvision")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "open_clip", package)
    for name, module in (("torchvision", None), ("torchvision.ops", None), ("torchvision.ops.misc", misc)):
        monkeypatch.setitem(sys.modules, name, module or types.ModuleType(name))
    yield importlib.import_module("open_clip.transformer").TextTransformer
    for name in [name for name in sys.modules if name.startswith("open_clip.")]:
        del sys.modules[name]


def from_open_clip(state: dict[str, torch.Tensor], layers: int, projected: bool) -> dict[str, torch.Tensor]:
    """open_clip's names and forms -> ours: queries, keys and values apart, the projection transposed."""
    found = {
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
    }
    for end in ("weight", "bias"):
        found[f"text_model.final_layer_norm.{end}"] = state[f"ln_final.{end}"]
        for i in range(layers):
            own, their = f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}"
            parts = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
            parts["self_attn.out_proj"] = "attn.out_proj"
            found |= {f"{own}.{a}.{end}": state[f"{their}.{b}.{end}"] for a, b in parts.items()}
            fused = state[f"{their}.attn.in_proj_{end}"].chunk(3)
            found |= {f"{own}.self_attn.{q}_proj.{end}": part for q, part in zip("qkv", fused, strict=True)}
    if projected:
        found["text_projection.weight"] = state["text_projection"].T
    return found


def compare_with_open_clip(text_transformer, config: CLIPTextConfig, theirs_deeper: int) -> list[float]:
    """The largest differences, relative to the largest values: last states with the norm, the raw states one and two
    layers before, pooled vectors.
    """
    torch.manual_seed(0)
    width = config.projection_dim or config.hidden_size
    them = text_transformer(
        context_length=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        layers=config.num_hidden_layers + theirs_deeper,
        output_dim=width,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in them.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    with torch.device("meta"):
        us = CLIPTextModel(config).eval()
    projected = bool(config.projection_dim)
    us.load_state_dict(from_open_clip(them.state_dict(), config.num_hidden_layers, projected), assign=True)
    ids = torch.randint(1, config.vocab_size - 2, (2, config.max_position_embeddings))
    ids[0, 9], ids[0, 10:], ids[1, -1] = config.vocab_size - 1, 0, config.vocab_size - 1
    states: list[torch.Tensor] = []
    for block in them.transformer.resblocks:
        block.register_forward_hook(lambda _m, _i, y: states.append(y))
    with torch.no_grad():
        pooled = them(ids)
        (last, ours_pooled), (one, _), (two, _) = us(ids), us(ids, skip=1), us(ids, skip=2)
        n = config.num_hidden_layers
        pairs = [(last, them.ln_final(states[n - 1])), (one, states[n - 2]), (two, states[n - 3])]
    pairs += [(ours_pooled, pooled)] if projected else []
    assert all(a.shape == b.shape for a, b in pairs)
    return [float((a - b).abs().max() / b.abs().max()) for a, b in pairs]


OPEN_CLIP = {
    "like-h": (CLIPTextConfig(99, 64, 256, 3, 4, 20, "gelu", eos_token_id=98), 1),
    "like-bigg": (CLIPTextConfig(99, 60, 240, 4, 5, 20, "gelu", projection_dim=60, eos_token_id=98), 0),
    "projected-narrower": (CLIPTextConfig(99, 64, 256, 4, 4, 20, "gelu", projection_dim=48, eos_token_id=2), 0),
}


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_text_equals_open_clip(text_transformer, name):
    assert max(compare_with_open_clip(text_transformer, *OPEN_CLIP[name])) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("name", "deeper"), [("openclip-h", 1), ("openclip-bigg", 0)])
def test_true_size_text_equals_open_clip(text_transformer, name, deeper):
    """ViT-H-14's text tower, of whose 24 layers Stable Diffusion 2 leaves out the last, and ViT-bigG-14's."""
    assert max(compare_with_open_clip(text_transformer, TEXT_ENCODERS[name], deeper)) <= 1e-5
