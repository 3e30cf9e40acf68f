"""All that a writer of methods and families imports.

A method is a frozen dataclass over `Staged` (keep ratios at a few stages) or `Reducer` (anything else) that writes `reduce`:

    @dataclass(frozen=True)
    class FarFromMean(Staged):
        scored: ClassVar[bool] = False                       # asks for no attention

        def reduce(self, s: Stage) -> Reduction:
            patches = s.tokens[:, s.prefix :]                # [B, N, C]
            scores = (patches - patches.mean(dim=1, keepdim=True)).norm(dim=-1)
            kept, pruned = ops.split(scores, s.k)            # [B, K], [B, N - K]
            tokens, hosts, _ = s.squeeze(kept, pruned)
            return Reduction(tokens, kept, pruned, hosts, scores)

    register(Method("far", "far from mean", FarFromMean))    # a row of the catalogue

`squeezevit --import MODULE bench --methods far`, and so every other command, knows it then; so does an installed package with an
entry point of the group "squeezevit.methods". What else a reducer may say of itself (how a budget is met, annealing, learned heads,
masses) are methods and properties of `Reducer` with defaults.

A family registers, by the class of a block, the two halves of its forward, which call the block's own children:

    @attn_half.register
    def _(block: MyBlock, x, bias=None):
        return x + block.attn(block.norm1(x), mask=bias)      # bias [B, 1, 1, T] or [B, 1, T, T], added to attention logits

    @mlp_half.register
    def _(block: MyBlock, x):
        return x + block.mlp(block.norm2(x))

    @attention.register                                       # only for reducers that score by attention
    def _(block: MyBlock, x) -> Attention: ...

and by the class of a model `describe`, which names its blocks and its token layout. `sv.reduce_` compares the halves with the
whole, and the scores with the attention that really runs, and refuses a block where they differ. examples/new_method.py and
examples/new_family.py run in CI.
"""

from squeezevit.core import ops
from squeezevit.core.block import Mixin
from squeezevit.core.cut import (
    ANY_PAIRS,
    Description,
    TakesNoMask,
    arguments,
    attention,
    attn_half,
    convert,
    describe,
    fingerprint,
    mlp_half,
    pairs,
    projections,
    trial_patches,
)
from squeezevit.core.evidence import Attention, is_plain, output
from squeezevit.core.reducer import Carry, Heads, Reducer, Reduction, Scored, Stage, Staged
from squeezevit.families import multihead
from squeezevit.reducers.catalog import Look, Method, register

__all__ = [
    "ANY_PAIRS",
    "Attention",
    "Carry",
    "Description",
    "Heads",
    "Look",
    "Method",
    "Mixin",
    "Reducer",
    "Reduction",
    "Scored",
    "Stage",
    "Staged",
    "TakesNoMask",
    "arguments",
    "attention",
    "attn_half",
    "convert",
    "describe",
    "fingerprint",
    "is_plain",
    "mlp_half",
    "multihead",
    "ops",
    "output",
    "pairs",
    "projections",
    "register",
    "trial_patches",
]
