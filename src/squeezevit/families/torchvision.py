"""torchvision's VisionTransformer, whose attention is torch's own `nn.MultiheadAttention`."""

from torch import Tensor, nn
from torchvision.models.vision_transformer import EncoderBlock, VisionTransformer

from squeezevit.families import Host, attention, attn_half, host, mlp_half, multihead, output, projections
from squeezevit.families.tokens import Tower
from squeezevit.reducer import Attention


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


@host.register
def _(model: VisionTransformer) -> Host:
    first = next(m for m in model.conv_proj.modules() if isinstance(m, nn.Conv2d))
    return Host(
        blocks=tuple(model.encoder.layers),
        prefix=1,
        class_token=True,
        dim=model.hidden_dim,
        channels=first.in_channels,
        image_size=(model.image_size, model.image_size),
        mixins=((model.encoder, Tower),),
        grids=True,
    )
