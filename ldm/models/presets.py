"""Shapes of the published networks, by the names people use for them."""

from dataclasses import replace

from ldm.models.clip import CLIPTextConfig
from ldm.models.unet import CROSS, PLAIN, UNetConfig
from ldm.models.vae import VAEConfig

UNETS: dict[str, UNetConfig] = {
    "sd15": UNetConfig(),
    "sd21": UNetConfig(sample_size=96, cross_attention_dim=1024, num_heads=(5, 10, 20, 20), use_linear_projection=True),
    "sdxl": UNetConfig(
        sample_size=128, down_block_types=(PLAIN, CROSS, CROSS), block_out_channels=(320, 640, 1280),
        cross_attention_dim=2048, num_heads=(5, 10, 20), transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True, addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    ),
    "sdxl-refiner": UNetConfig(
        sample_size=128, down_block_types=(PLAIN, CROSS, CROSS, PLAIN), block_out_channels=(384, 768, 1536, 1536),
        cross_attention_dim=1280, num_heads=(6, 12, 24, 24), transformer_layers_per_block=(4, 4, 4, 4),
        use_linear_projection=True, addition_time_embed_dim=256, projection_class_embeddings_input_dim=2560,
    ),
    "x4-upscaler": UNetConfig(
        in_channels=7, sample_size=128, down_block_types=(PLAIN, CROSS, CROSS, CROSS),
        block_out_channels=(256, 512, 512, 1024), cross_attention_dim=1024, use_linear_projection=True,
        only_cross_attention=(True, True, True, False), num_class_embeds=1000,
    ),
}  # fmt: skip
"""Podell et al. 2023, table 1; Rombach et al. 2022 for the others."""
UNETS |= {
    "sd15-inpaint": replace(UNETS["sd15"], in_channels=9),  # also sees the mask, and the latents of what it leaves
    "sd15-ip2p": replace(UNETS["sd15"], in_channels=8),  # also sees the latents of the picture to edit
    "sd2-inpaint": replace(UNETS["sd21"], in_channels=9, sample_size=64),
    "sdxl-inpaint": replace(UNETS["sdxl"], in_channels=9),
}

VAES: dict[str, VAEConfig] = {
    "sd": VAEConfig(),
    "sdxl": VAEConfig(sample_size=1024, scaling_factor=0.13025),
    "x4-upscaler": VAEConfig(block_out_channels=(128, 256, 512), sample_size=256, scaling_factor=0.08333),
}

TEXT_ENCODERS: dict[str, CLIPTextConfig] = {
    "clip-l": CLIPTextConfig(),
    # the last of 24 layers is left out of Stable Diffusion 2
    "openclip-h": CLIPTextConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu"
    ),
    "openclip-bigg": CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, hidden_act="gelu",
        projection_dim=1280,
    ),
}  # fmt: skip
