"""torchvision's VisionTransformer, whose attention is torch's own `nn.MultiheadAttention`."""

from torch import Tensor, nn
from torchvision.models.vision_transformer import EncoderBlock, VisionTransformer

from squeezevit.core.cut import Description, attention, attn_half, describe, mlp_half, projections
from squeezevit.core.evidence import Attention, output
from squeezevit.families import multihead
from squeezevit.families.tokens import Tower


@attn_half.register
def _(block: EncoderBlock, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return block.dropout(multihead.attend(block.self_attention, block.ln_1(x), bias)) + x


@mlp_half.register
def _(block: EncoderBlock, x: Tensor) -> Tensor:
    return x + block.mlp(block.ln_2(x))


@attention.register
def _(block: EncoderBlock, x: Tensor) -> Attention:
    return multihead.scores(block.self_attention, output(block.ln_1, x))


@projections.register
def _(block: EncoderBlock) -> tuple[nn.Module, ...]:
    return (block.ln_1,)  # queries and keys come from rows of a parameter


@describe.register
def _(model: VisionTransformer) -> Description:
    first = next(m for m in model.conv_proj.modules() if isinstance(m, nn.Conv2d))
    return Description(
        blocks=tuple(model.encoder.layers),
        prefix=1,
        class_token=True,
        dim=model.hidden_dim,
        channels=first.in_channels,
        image_size=(model.image_size, model.image_size),
        mixins=((model.encoder, Tower),),
        grids=True,
    )
