"""The networks against diffusers and transformers in the same process, and against published counts and key lists."""

import hashlib
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import ModelError, UsageError
from ldm.models.clip import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel
from ldm.models.discriminator import PatchGAN
from ldm.models.layers import attend
from ldm.models.presets import TEXT_ENCODERS, UNETS, VAES
from ldm.models.unet import CROSS, PLAIN, UNet, UNetConfig, init_for_training
from ldm.models.vae import AutoencoderKL, VAEConfig

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the other libraries' own deprecations while they import
    import diffusers
    import transformers

VISION_H = CLIPVisionConfig(
    hidden_size=1280,
    intermediate_size=5120,
    projection_dim=1024,
    num_hidden_layers=32,
    num_attention_heads=16,
    patch_size=14,
    hidden_act="gelu",
)
INPAINT = replace(UNETS["sd15"], in_channels=9)
KL_F4 = VAEConfig(latent_channels=3, block_out_channels=(128, 256, 512))
pytestmark = pytest.mark.usefixtures("one_thread")
OURS = {UNetConfig: UNet, VAEConfig: AutoencoderKL, CLIPTextConfig: CLIPTextModel, CLIPVisionConfig: CLIPVisionModel}


def ours(config) -> nn.Module:
    return OURS[type(config)](config)


def theirs(config) -> nn.Module:
    """The other library's network, from the config.json we would write for it."""
    d = config.to_dict()
    if "_class_name" in d:
        return getattr(diffusers, d["_class_name"]).from_config(d).eval()
    config_class = {"clip_text_model": transformers.CLIPTextConfig, "clip_vision_model": transformers.CLIPVisionConfig}
    return getattr(transformers, d["architectures"][0])(config_class[d["model_type"]](**d)).eval()


def on_meta(build, config) -> nn.Module:
    with torch.device("meta"):
        return build(config)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Keys and shapes; transformers 5 leaves out "text_model." in the class without projection, its files do not."""
    keys = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if isinstance(model, transformers.CLIPTextModel):
        return {f"text_model.{key}": value for key, value in keys.items()}
    return keys


def pair(config) -> tuple[nn.Module, nn.Module]:
    """Ours and theirs with the same random weights, no norm or bias left at its neutral value."""
    torch.manual_seed(0)
    them = theirs(config)
    with torch.no_grad():
        for parameter in them.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    us = ours(config).eval()
    us.load_state_dict(dict(zip(shapes(them), them.state_dict().values(), strict=True)))
    return us, them


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    assert a.shape == b.shape and a.dtype == b.dtype
    assert (a - b).abs().max() <= tolerance * b.abs().max()


# ---- published networks ------------------------------------------------------------------------------------------

PUBLISHED = [
    ("sd15", UNETS["sd15"], 859_520_964),
    ("sd15-inpaint", INPAINT, 859_535_364),
    ("sd21", UNETS["sd21"], 865_910_724),
    ("sdxl", UNETS["sdxl"], 2_567_463_684),
    ("sdxl-refiner", UNETS["sdxl-refiner"], 2_259_526_660),
    ("kl-f8", VAES["sd"], 83_653_863),
    ("kl-f4", KL_F4, 55_312_063),
    ("clip-l", TEXT_ENCODERS["clip-l"], 123_060_480),
    ("openclip-h", TEXT_ENCODERS["openclip-h"], 340_387_840),
    ("openclip-bigg", TEXT_ENCODERS["openclip-bigg"], 694_659_840),
    ("clip-vit-h", VISION_H, 632_076_800),
]


@pytest.mark.parametrize(("config", "count"), [row[1:] for row in PUBLISHED], ids=[row[0] for row in PUBLISHED])
def test_published_network(config, count):
    """The exact published parameter count; the keys and shapes of the other library's module."""
    us = on_meta(ours, config)
    assert sum(p.numel() for p in us.parameters()) == count
    assert shapes(us) == shapes(on_meta(theirs, config))


# Number of keys and the first 16 digits of the SHA-256 of the sorted lines "key [shape]", joined by newlines, of
# diffusers 0.42.1's modules with the published configs (Stable Diffusion 1.5, its inpainting form, 2.1, XL base, VAE).
HEADERS = [
    ("sd15", UNETS["sd15"], 686, "06ab0a594a10b99f"),
    ("sd15-inpaint", INPAINT, 686, "2737c4bf65acefd5"),
    ("sd21", UNETS["sd21"], 686, "102cedebfb24e477"),
    ("sdxl", UNETS["sdxl"], 1680, "1252d970e55232bb"),
    ("kl-f8", VAES["sd"], 248, "a8eb7356226250e7"),
]


def digest(lines) -> str:
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]


@pytest.mark.parametrize(("config", "n", "sha"), [row[1:] for row in HEADERS], ids=[row[0] for row in HEADERS])
def test_header_of_checkpoint(config, n, sha):
    found = shapes(on_meta(ours, config))
    assert (len(found), digest(f"{key} {list(shape)}" for key, shape in found.items())) == (n, sha)


def test_keys_of_clip_in_single_file():
    """The keys of Stable Diffusion 1's own file under cond_stage_model.transformer, without position_ids."""
    found = shapes(on_meta(ours, TEXT_ENCODERS["clip-l"]))
    assert (len(found), digest(found)) == (196, "9c3826a62ec9a483")


# ---- configs -----------------------------------------------------------------------------------------------------

SMALL = {
    "like-sd1": UNetConfig(
        down_block_types=(CROSS, CROSS, PLAIN),
        block_out_channels=(32, 64, 64),
        norm_num_groups=16,
        cross_attention_dim=24,
        num_heads=(4, 4, 4),
        transformer_layers_per_block=(1, 1, 1),
    ),
    "like-sd2": UNetConfig(
        in_channels=9,
        down_block_types=(CROSS, PLAIN),
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=24,
        num_heads=(2, 4),
        transformer_layers_per_block=(1, 1),
        use_linear_projection=True,
    ),
    "like-sdxl": UNetConfig(
        down_block_types=(PLAIN, CROSS, CROSS),
        block_out_channels=(32, 64, 96),
        cross_attention_dim=24,
        num_heads=(2, 4, 6),
        transformer_layers_per_block=(1, 2, 3),
        use_linear_projection=True,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    ),
    "like-refiner": UNetConfig(
        down_block_types=(PLAIN, CROSS, PLAIN),
        block_out_channels=(32, 64, 64),
        cross_attention_dim=24,
        num_heads=(2, 4, 4),
        transformer_layers_per_block=(2, 2, 2),
        use_linear_projection=True,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 5 * 8,
    ),
}
SMALL_VAE = VAEConfig(block_out_channels=(16, 32, 48), layers_per_block=1, norm_num_groups=8, scaling_factor=0.7)
SMALL_TEXT = CLIPTextConfig(99, 32, 64, 3, 4, 20, "gelu", 1e-4, 16, 98)
SMALL_VISION = CLIPVisionConfig(32, 64, 16, 2, 4, 3, 24, 8, "gelu", 1e-4)
CONFIGS = [*SMALL.values(), *UNETS.values(), *VAES.values(), *TEXT_ENCODERS.values(), VISION_H]
CONFIGS += [SMALL_VAE, replace(SMALL_VAE, mid_block_add_attention=False), SMALL_TEXT, SMALL_VISION]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_config_round_trip(config):
    """Through our own dict, and through the full dict that the other library makes of it."""
    assert type(config).from_dict(config.to_dict()) == config
    them = on_meta(theirs, config)
    full = them.config.to_dict() if hasattr(them.config, "to_dict") else dict(them.config)
    again = type(config).from_dict(full | {"architectures": config.to_dict().get("architectures")})
    assert again == config


@pytest.mark.parametrize(
    ("config_class", "library"),
    [
        (UNetConfig, lambda _: diffusers.UNet2DConditionModel()),
        (VAEConfig, lambda _: diffusers.AutoencoderKL()),
        (CLIPTextConfig, lambda _: transformers.CLIPTextModel(transformers.CLIPTextConfig())),
        (CLIPVisionConfig, lambda _: transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig())),
    ],
)
def test_absent_fields_are_the_other_librarys_defaults(config_class, library):
    assert shapes(on_meta(ours, config_class.from_dict({}))) == shapes(on_meta(library, None))


def test_one_number_for_all_levels():
    config = UNetConfig.from_dict({"attention_head_dim": 4, "transformer_layers_per_block": 2})
    assert config.num_heads == (4,) * 4 and config.transformer_layers_per_block == (2,) * 4


REFUSED = [
    (UNetConfig, "class_embed_type", "timestep"),
    (UNetConfig, "resnet_time_scale_shift", "scale_shift"),
    (UNetConfig, "class_embeddings_concat", True),
    (UNetConfig, "up_block_types", ["UpBlock2D"] * 4),
    (UNetConfig, "addition_embed_type", "image"),
    (UNetConfig, "num_attention_heads", 8),
    (UNetConfig, "time_cond_proj_dim", 256),
    (UNetConfig, "a_field_of_tomorrow", 1),
    (UNetConfig, "layers_per_block", [2, 2, 2, 2]),
    (UNetConfig, "_class_name", "UNet2DModel"),
    (VAEConfig, "_class_name", "AsymmetricAutoencoderKL"),
    (VAEConfig, "shift_factor", 0.1159),
    (VAEConfig, "latents_mean", [0.1, 0.2, 0.3, 0.4]),
    (VAEConfig, "use_quant_conv", False),
    (VAEConfig, "down_block_types", ["AttnDownEncoderBlock2D"]),
    (VAEConfig, "latent_channels", "four"),
    (CLIPTextConfig, "hidden_act", "relu"),
    (CLIPTextConfig, "model_type", "t5"),
    (CLIPTextConfig, "use_attention_mask", True),
    (CLIPVisionConfig, "model_type", "siglip_vision_model"),
]


@pytest.mark.parametrize(("config_class", "field", "value"), REFUSED)
def test_refuses_what_it_does_not_compute(config_class, field, value):
    """The message names the field and its value."""
    with pytest.raises(ModelError) as error:
        config_class.from_dict({field: value})
    found = str(error.value).replace("(", "[").replace(")", "]")
    assert field in found and repr(value) in found


@pytest.mark.parametrize(
    ("config_class", "change", "message"),
    [
        (UNetConfig, {"down_block_types": (CROSS, CROSS, CROSS, "AttnDownBlock2D")}, "AttnDownBlock2D"),
        (UNetConfig, {"block_out_channels": (320, 640, 1280)}, "block_out_channels has 3"),
        (UNetConfig, {"block_out_channels": (320, 640, 1280, 1000)}, "1000 channels .* 32 norm_num_groups"),
        (UNetConfig, {"num_heads": (8, 8, 8, 7)}, "1280 channels .* 7 attention heads"),
        (VAEConfig, {"norm_num_groups": 24}, "128 channels .* 24 norm_num_groups"),
        (CLIPTextConfig, {"num_attention_heads": 5}, "768 channels .* 5 heads"),
        (CLIPVisionConfig, {"patch_size": 30}, "224 .* 30 pixels a patch"),
    ],
)
def test_refuses_shapes_that_do_not_fit(config_class, change, message):
    with pytest.raises(ModelError, match=message):
        config_class(**change)


def test_harmless_fields_are_ignored():
    config = {"upcast_attention": True, "dropout": 0.1, "_diffusers_version": "0.6.0", "dual_cross_attention": False}
    assert UNetConfig.from_dict(config | {"cross_attention_dim": 768}) == UNetConfig()
    text = TEXT_ENCODERS["clip-l"].to_dict() | {"torch_dtype": "float16", "bos_token_id": 0, "initializer_factor": 1.0}
    assert CLIPTextConfig.from_dict(text) == TEXT_ENCODERS["clip-l"]


# ---- U-Net -------------------------------------------------------------------------------------------------------


def unet_inputs(
    config: UNetConfig, size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """x, t, context, pooled, sizes"""
    g = torch.Generator().manual_seed(1)
    x, t = torch.randn(2, config.in_channels, *size, generator=g), torch.tensor([10.0, 700.5])
    context = torch.randn(2, 7, config.cross_attention_dim, generator=g)
    if not config.addition_time_embed_dim:
        return x, t, context, None, None
    n = (config.projection_class_embeddings_input_dim - 16) // config.addition_time_embed_dim
    return x, t, context, torch.randn(2, 16, generator=g), torch.randint(0, 1024, (2, n), generator=g).float()


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_unet_equals_diffusers(name):
    us, them = pair(SMALL[name])
    for size in ((8, 8), (7, 13), (1, 3)):
        x, t, context, pooled, sizes = unet_inputs(SMALL[name], size)
        expected = them(x, t, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample
        prepared = us.prepare(context, pooled, sizes)
        close(us(x, t, prepared), expected)
        if pooled is None:
            assert torch.equal(us(x, t, prepared), us(x, t, context))


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_unet_in_channels_last(name):
    """The same numbers as in the contiguous format.

    In float64: where a norm's group has but a few pixels, the rounding of torch's two kernels is magnified to 1 % in
    float32, in diffusers' network as well.
    """
    us = pair(SMALL[name])[0].double()
    for size in ((8, 8), (7, 13), (1, 3)):
        x, t, context, pooled, sizes = (y if y is None else y.double() for y in unet_inputs(SMALL[name], size))
        prepared = us.prepare(context, pooled, sizes)
        close(us(x.to(memory_format=torch.channels_last), t, prepared), us(x, t, prepared), 1e-9)


@torch.no_grad()
def test_unet_residuals_equal_diffusers():
    config = SMALL["like-sd1"]
    us, them = pair(config)
    x, t, context, *_ = unet_inputs(config, (9, 6))
    seen: list[tuple[int, ...]] = []
    hooks = [
        level.register_forward_hook(lambda _m, _i, maps: seen.extend(y.shape for y in maps)) for level in us.down_blocks
    ]
    us(x, t, context)
    for hook in hooks:
        hook.remove()
    downs = [torch.randn(shape) for shape in [(2, 32, 9, 6), *seen]]
    mid = torch.randn(downs[-1].shape)
    expected = them(x, t, context, down_block_additional_residuals=downs, mid_block_additional_residual=mid).sample
    close(us(x, t, context, (downs, mid)), expected)
    assert not torch.allclose(us(x, t, context), expected)
    with pytest.raises(UsageError, match="residuals"):
        us(x, t, context, (downs[1:], mid))


def test_unet_refuses_wrong_text():
    us = ours(SMALL["like-sdxl"])
    x, t, context, pooled, sizes = unet_inputs(us.config, (4, 4))
    for wrong in ((context,), (context, pooled), (context[..., 1:], pooled, sizes), (context, pooled, sizes[:, 1:])):
        with pytest.raises(UsageError):
            us.prepare(*wrong)
    with pytest.raises(UsageError, match="SDXL"):
        us(x, t, context)


@torch.no_grad()
def test_unet_keeps_channels_last():
    """No map is copied back to the contiguous format on its way through the network."""
    us = ours(SMALL["like-sd2"]).to(memory_format=torch.channels_last)
    x, t, context, *_ = unet_inputs(us.config, (8, 8))
    formats = []
    for part in us.modules():
        if type(part).__name__ in ("ResBlock", "SpatialTransformer", "Upsample", "Downsample"):
            part.register_forward_hook(
                lambda _m, _i, y: formats.append(y.is_contiguous(memory_format=torch.channels_last))
            )
    us(x.to(memory_format=torch.channels_last), t, context)
    assert len(formats) == 14 and all(formats)


@pytest.mark.parametrize(("keys", "causal"), [(3, False), (77, False), (128, False), (129, False), (16, True)])
def test_attention_that_is_trained(keys, causal):
    """Spelled out where it is trained, it is torch's own attention: in what it gives, and in every gradient."""
    parts = [torch.randn(2, 3, n, 8, dtype=torch.float64, requires_grad=True) for n in (16, keys, keys)]
    wanted = F.scaled_dot_product_attention(*parts, is_causal=causal)
    weights = torch.randn_like(wanted)
    gradients = torch.autograd.grad((wanted * weights).sum(), parts)
    got = attend(*parts, causal=causal)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    for mine, theirs in zip(torch.autograd.grad((got * weights).sum(), parts), gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    assert torch.equal(attend(*(part.detach() for part in parts), causal=causal), wanted)


@torch.no_grad()
def test_unet_in_bfloat16():
    us, them = pair(SMALL["like-sd1"])
    x, t, context, *_ = unet_inputs(us.config, (8, 8))
    expected = us(x, t, context)
    result = us.bfloat16()(x.bfloat16(), t, context.bfloat16())
    assert result.dtype == torch.bfloat16
    close(result.float(), them.bfloat16()(x.bfloat16(), t, context.bfloat16()).sample.float(), 0.02)
    close(result.float(), expected, 0.05)


def test_init_for_training():
    """A fresh network predicts zero, its branches add nothing, and the first gradient reaches conv_out alone."""
    us = ours(SMALL["like-sd1"])
    init_for_training(us)
    x, t, context, *_ = unet_inputs(us.config, (8, 8))
    y = us(x, t, context)
    assert torch.equal(y, torch.zeros_like(y))
    block = us.down_blocks[0].resnets[0]
    h = torch.randn(2, 32, 8, 8)
    assert torch.equal(block(h, torch.randn(2, 128)), h)
    (y - 1).square().mean().backward()
    moved = {name.rpartition(".")[0] for name, p in us.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"conv_out"}


def test_unet_trains_on_raw_context():
    us, them = pair(SMALL["like-sd2"])
    x, t, context, *_ = unet_inputs(us.config, (5, 6))
    us(x, t, context).square().mean().backward()
    them(x, t, context).sample.square().mean().backward()
    theirs_by_name = dict(them.named_parameters())
    for name, parameter in us.named_parameters():
        expected = theirs_by_name[name].grad
        assert (parameter.grad - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-7, name


# ---- autoencoder -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL_VAE, replace(SMALL_VAE, mid_block_add_attention=False, layers_per_block=2)])
@torch.no_grad()
def test_vae_equals_diffusers(config):
    us, them = pair(config)
    images = torch.randn(2, 3, 20, 36)
    noise = torch.randn(2, 4, 5, 9)
    posterior = them.encode(images).latent_dist
    mean, logvar = us.posterior(images)
    close(mean, posterior.mean)
    close(logvar, posterior.logvar)
    close(us.encode(images), posterior.mean * 0.7)
    close(us.encode(images, noise), (posterior.mean + posterior.std * noise) * 0.7)
    close(us.decode(noise), them.decode(noise / 0.7).sample)
    decoded = us.to(memory_format=torch.channels_last).decode(noise.to(memory_format=torch.channels_last))
    assert decoded.is_contiguous(memory_format=torch.channels_last)
    close(decoded, them.decode(noise / 0.7).sample)


@torch.no_grad()
def test_vae_clamps_the_log_variance():
    us = ours(SMALL_VAE)
    us.quant_conv.bias.copy_(torch.tensor([0.0] * 4 + [-1e3, -1e3, 1e3, 1e3]))
    logvar = us.posterior(torch.randn(1, 3, 8, 8))[1]
    assert logvar.amin((0, 2, 3)).tolist() == logvar.amax((0, 2, 3)).tolist() == [-30, -30, 20, 20]


def test_vae_refuses_sizes_between():
    with pytest.raises(UsageError, match="multiples of 4"):
        ours(SMALL_VAE).encode(torch.zeros(1, 3, 8, 10))


# ---- CLIP --------------------------------------------------------------------------------------------------------


def prompts(eos: int) -> Tensor:
    """Ids that end in `eos`, the second padded with it, the third with the padding 0."""
    ids = torch.randint(3, 90, (3, 20), generator=torch.Generator().manual_seed(2))
    ids[0, 19], ids[1, 10:], ids[2, 5], ids[2, 6:] = eos, eos, eos, 0
    return ids


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("projection", [0, 16])
@pytest.mark.parametrize(("eos", "stored"), [(98, 98), (50, 50), (98, 2)], ids=["eos", "eos-not-largest", "legacy"])
@torch.no_grad()
def test_clip_text_equals_transformers(act, projection, eos, stored):
    us, them = pair(replace(SMALL_TEXT, hidden_act=act, projection_dim=projection, eos_token_id=stored))
    ids = prompts(eos)
    expected = them(ids, output_hidden_states=True)
    hidden, pooled = us(ids)
    close(hidden, expected.last_hidden_state)
    close(pooled, expected.text_embeds if projection else expected.pooler_output)
    for skip in (1, 2):
        raw, same = us(ids, skip=skip)
        close(raw, expected.hidden_states[-1 - skip])
        assert torch.equal(same, pooled)
    short, _ = us(ids[:, :4])
    close(short, hidden[:, :4])  # causal: what comes later changes nothing


def test_clip_text_refuses():
    us = ours(SMALL_TEXT)
    with pytest.raises(UsageError, match="21 tokens"):
        us(torch.zeros(1, 21, dtype=torch.long))
    for skip in (-1, 3):
        with pytest.raises(UsageError, match="clip_skip"):
            us(prompts(98), skip=skip)


@torch.no_grad()
def test_clip_vision_equals_transformers():
    us, them = pair(SMALL_VISION)
    images = torch.randn(3, 3, 24, 24)
    close(us(images), them(images).image_embeds)
    with pytest.raises(UsageError, match="24 x 24"):
        us(torch.zeros(1, 3, 24, 32))


def test_clip_initialisation():
    """The standard deviations of CLIP's own recipe (Radford et al. 2021), within the sampling error."""
    width, layers = 256, 2
    us = ours(CLIPTextConfig(2000, width, 4 * width, layers, 4, 77, projection_dim=128))
    deep = width**-0.5 * (2 * layers) ** -0.5
    layer = us.text_model.encoder.layers[0]
    expected = [
        (us.text_model.embeddings.token_embedding, 0.02),
        (layer.self_attn.q_proj, width**-0.5),
        (layer.self_attn.out_proj, deep),
        (layer.mlp.fc1, (2 * width) ** -0.5),
        (layer.mlp.fc2, deep),
        (us.text_projection, width**-0.5),
    ]
    for part, std in expected:
        assert part.weight.std().item() == pytest.approx(std, rel=0.02)


# ---- discriminator -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "field"), [(1, 16), (2, 34), (3, 70)])
def test_patchgan_receptive_field(layers, field):
    """The patch sizes of Isola et al. 2017 (app. 6.1.2): one logit depends on field x field pixels."""
    model = PatchGAN(width=8, layers=layers)
    for i, part in enumerate(model.layers):
        if isinstance(part, nn.GroupNorm):  # its statistics are of the whole image
            model.layers[i] = nn.Identity()
    images = torch.randn(1, 3, 128, 128, requires_grad=True)
    logits = model(images)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    touched = images.grad.abs().sum((0, 1)).nonzero()
    assert (touched.amax(0) - touched.amin(0) + 1).tolist() == [field, field]


@torch.no_grad()
def test_patchgan_shape_and_independence():
    model = PatchGAN(width=16)
    images = torch.randn(3, 3, 64, 48)
    logits = model(images)
    assert logits.shape == (3, 1, 6, 4)
    assert torch.equal(logits, model.eval()(images))
    assert torch.allclose(logits[1:2], model(images[1:2]), atol=1e-6)


def test_patchgan_parameters():
    """pix2pix's 70 x 70 discriminator on a pair of RGB images has 2.769 M (group and batch norm have equally many)."""
    assert sum(p.numel() for p in PatchGAN(in_channels=6).parameters()) == 2_768_705
