"""What an adapter is, whatever file it came from.

The names of its tensors are those of kohya and LyCORIS, which most files use:

lora   lora_down.weight [r, I] or [r, I, kh, kw], lora_up.weight [O, r] or [O, r, 1, 1], lora_mid.weight [r, r, kh, kw]
       where a convolution is in Tucker form (down and up then 1x1)
loha   hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b; hada_t1, hada_t2 in Tucker form
lokr   lokr_w1, or lokr_w1_a and lokr_w1_b; lokr_w2, or lokr_w2_a and lokr_w2_b; lokr_t2 in Tucker form
ia3    weight, on_input (one truth value)
glora  a1.weight, a2.weight, b1.weight, b2.weight
oft    oft_blocks [n, m, m], or oft_diag, the rotations themselves; BOFT: oft_blocks [l, n, m, m]; rescale
full   diff
norm   w_norm, b_norm

lora, loha and lokr may have dora_scale beside them, these and glora a trained scalar; each may have diff_b, the
difference of the bias. PEFT's lora may have the bias of lora_up as lora_up.bias, its ia3 on_bias, a truth value.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Layer:
    """What an adapter does to one module.

    kind: of ldm.adapters.kinds.KINDS. tensors: by the names above, in the types of the file. alpha: the file's number,
    None where it says none: what that means is the kind's to say (the rank, mostly: no scaling).
    """

    kind: str
    tensors: Mapping[str, Tensor]
    alpha: float | None = None


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter as a whole. It is never changed.

    layers: by address, the name of the network in Components and the module's path in it, such as
    "unet.mid_block.attentions.0.proj_in" or "text_encoder_2.text_model.encoder.layers.0.mlp.fc1". metadata: of the
    file. dialect: the one it was written in, of ldm.adapters.names.DIALECTS. sha256: of the file, in hex; "" without.
    """

    layers: Mapping[str, Layer]
    metadata: Mapping[str, str] = field(default_factory=dict)
    dialect: str = ""
    name: str = "unnamed"
    sha256: str = ""
