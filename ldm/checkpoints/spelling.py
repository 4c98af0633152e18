"""How single files of other programs spell our networks.

Rules are tables (theirs, ours) by module path, made from a network's configuration. One table serves both ways: for
each of our keys it says where in such a file the numbers lie, and so where they go when one is written.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

from ldm.checkpoints.load import ALIASES
from ldm.models.clip import CLIPTextConfig
from ldm.models.tiny_vae import TinyVAEConfig
from ldm.models.unet import CROSS, UNetConfig
from ldm.models.vae import VAEConfig


class Rule(NamedTuple):
    """A module path, or whole key, of their file and ours. third: of the rows of theirs, which holds queries (0), keys
    (1) and values (2); transpose: theirs is our matrix transposed; conv: theirs is a 1x1 convolution, ours its matrix.
    """

    theirs: str
    ours: str
    third: int | None = None
    transpose: bool = False
    conv: bool = False


class Spelling(NamedTuple):
    """One way to spell a network: the beginning of all its names, and the rules for the rest."""

    prefix: str
    rules: Callable[[Any], list[Rule]]


class Part(NamedTuple):
    """A network of a family: its configuration, how it is spelled (written in the first way), and for a text encoder
    the padding token of its tokenizer.
    """

    config: Any
    spellings: tuple[Spelling, ...]
    pad: str = ""


RESNET = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
)


def unet_rules(c: UNetConfig) -> list[Rule]:
    """The U-Net of CompVis' and Stability's code: blocks are numbered through, not by level."""
    n, last = c.layers_per_block, len(c.block_out_channels) - 1
    plain = [
        ("time_embed.0", "time_embedding.linear_1"),
        ("time_embed.2", "time_embedding.linear_2"),
        ("label_emb", "class_embedding"),
        ("label_emb.0.0", "add_embedding.linear_1"),
        ("label_emb.0.2", "add_embedding.linear_2"),
        ("input_blocks.0.0", "conv_in"),
        ("middle_block.1", "mid_block.attentions.0"),
        ("out.0", "conv_norm_out"),
        ("out.2", "conv_out"),
    ]
    resnets = [("middle_block.0", "mid_block.resnets.0"), ("middle_block.2", "mid_block.resnets.1")]
    for i in range(last + 1):
        first, attends = i * (n + 1), c.down_block_types[last - i] == CROSS
        for j in range(n):
            resnets.append((f"input_blocks.{first + j + 1}.0", f"down_blocks.{i}.resnets.{j}"))
            plain.append((f"input_blocks.{first + j + 1}.1", f"down_blocks.{i}.attentions.{j}"))
        for j in range(n + 1):
            resnets.append((f"output_blocks.{first + j}.0", f"up_blocks.{i}.resnets.{j}"))
            plain.append((f"output_blocks.{first + j}.1", f"up_blocks.{i}.attentions.{j}"))
        plain.append((f"input_blocks.{first + n + 1}.0.op", f"down_blocks.{i}.downsamplers.0.conv"))
        plain.append((f"output_blocks.{first + n}.{1 + attends}.conv", f"up_blocks.{i}.upsamplers.0.conv"))
    plain += [(f"{theirs}.{a}", f"{ours}.{b}") for theirs, ours in resnets for a, b in RESNET]
    return [Rule(theirs, ours) for theirs, ours in plain]


def vae_rules(c: VAEConfig) -> list[Rule]:
    """The autoencoder of the same code: its attention is of 1x1 convolutions, its decoder counts levels from below."""
    rules, top = (
        [Rule("quant_conv", "quant_conv"), Rule("post_quant_conv", "post_quant_conv")],
        len(c.block_out_channels),
    )
    for half, down, sample, count in (("encoder", "down", "downsample", 0), ("decoder", "up", "upsample", 1)):
        plain = [("conv_in", "conv_in"), ("conv_out", "conv_out"), ("norm_out", "conv_norm_out")]
        plain += [("mid.block_1", "mid_block.resnets.0"), ("mid.block_2", "mid_block.resnets.1")]
        attention, ours = "mid.attn_1", "mid_block.attentions.0"
        plain.append((f"{attention}.norm", f"{ours}.group_norm"))
        for a, b in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
            plain.append((f"{attention}.{a}", f"{ours}.{b}"))
            rules.append(Rule(f"{half}.{attention}.{a}.weight", f"{half}.{ours}.{b}.weight", conv=True))
        for i in range(top):
            level = f"{down}.{top - 1 - i if count else i}"
            plain.append((f"{level}.{sample}.conv", f"{down}_blocks.{i}.{sample}rs.0.conv"))
            for j in range(c.layers_per_block + count):
                plain.append((f"{level}.block.{j}", f"{down}_blocks.{i}.resnets.{j}"))
                plain.append((f"{level}.block.{j}.nin_shortcut", f"{down}_blocks.{i}.resnets.{j}.conv_shortcut"))
        rules += [Rule(f"{half}.{theirs}", f"{half}.{ours}") for theirs, ours in plain]
    return rules


def own_vae_rules(c: object) -> list[Rule]:
    """The autoencoders of diffusers, as ours."""
    return [Rule(name, name) for name in ("encoder", "decoder", "quant_conv", "post_quant_conv")]


def old_vae_rules(c: object) -> list[Rule]:
    """AutoencoderKL as diffusers wrote it until 2023."""
    attention = [f"{half}.mid_block.attentions.0" for half in ("encoder", "decoder")]
    return own_vae_rules(c) + [Rule(f"{head}.{a}", f"{head}.{b}") for head in attention for a, b in ALIASES.items()]


def taesd_rules(c: TinyVAEConfig, encoder: str, decoder: str) -> list[Rule]:
    """TAESD as its authors number it: the decoder's first layer, which limits its input, has no weights.

    encoder, decoder: what the names of each half begin with.
    """
    most = 3 * (sum(c.num_decoder_blocks) + sum(c.num_encoder_blocks))
    halves = (("encoder", encoder, 0), ("decoder", decoder, 1))
    return [Rule(f"{begin}{i + skip}", f"{half}.layers.{i}") for half, begin, skip in halves for i in range(most)]


def clip_rules(c: CLIPTextConfig) -> list[Rule]:
    """transformers' CLIP, as ours."""
    return [Rule("text_model", "text_model")]


def flat_clip_rules(c: CLIPTextConfig) -> list[Rule]:
    """transformers' CLIP without `text_model.`"""
    return [Rule(name, f"text_model.{name}") for name in ("embeddings", "encoder", "final_layer_norm")]


OPENCLIP_LAYER = (
    ("ln_1", "layer_norm1"),
    ("attn.out_proj", "self_attn.out_proj"),
    ("ln_2", "layer_norm2"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
)


def openclip_rules(c: CLIPTextConfig) -> list[Rule]:
    """open_clip's text tower: queries, keys and values in one tensor, the projection multiplied from the right."""
    rules = [
        Rule("token_embedding", "text_model.embeddings.token_embedding"),
        Rule("positional_embedding", "text_model.embeddings.position_embedding.weight"),
        Rule("ln_final", "text_model.final_layer_norm"),
        Rule("text_projection", "text_projection.weight", transpose=True),
    ]
    for i in range(c.num_hidden_layers):
        theirs, ours = f"transformer.resblocks.{i}", f"text_model.encoder.layers.{i}"
        rules += [Rule(f"{theirs}.{a}", f"{ours}.{b}") for a, b in OPENCLIP_LAYER]
        rules += [
            Rule(f"{theirs}.attn.in_proj_{leaf}", f"{ours}.self_attn.{part}_proj.{leaf}", third)
            for third, part in enumerate("qkv")
            for leaf in ("weight", "bias")
        ]
    return rules


def plain_openclip_rules(c: CLIPTextConfig) -> list[Rule]:
    """The same with the projection as transformers has it, as some programs write it."""
    return [rule for rule in openclip_rules(c) if not rule.transpose] + [Rule("text_projection", "text_projection")]


def spelled(keys: Iterable[str], spelling: Spelling, config: object) -> dict[str, Rule]:
    """Each of our keys with the rule for it alone: `theirs` is its name in their file. KeyError without a rule."""
    table = {rule.ours: rule for rule in spelling.rules(config)}
    found = {}
    for key in keys:
        head = key
        while head not in table:
            if "." not in head:
                raise KeyError(key)
            head = head.rpartition(".")[0]
        found[key] = table[head]._replace(theirs=spelling.prefix + table[head].theirs + key[len(head) :], ours=key)
    return found


def located(keys: Collection[str], part: Part, names: Collection[str]) -> dict[str, Rule]:
    """`spelled` in the spelling of a part under which most of our keys are among the file's names."""
    best: dict[str, Rule] = {}
    hits = -1
    for spelling in part.spellings:
        found = spelled(keys, spelling, part.config)
        if (count := sum(rule.theirs in names for rule in found.values())) > hits:
            best, hits = found, count
        if hits == len(keys):
            break
    return best
