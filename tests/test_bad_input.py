"""What cannot be meant or cannot be right: each gives one message that names the value and the remedy, and changes nothing."""

import math
from fractions import Fraction

import numpy as np
import pytest
import timm
import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, DiffParallelScalingBlock, ParallelScalingBlock, ParallelThingsBlock
from torch import nn

import squeezevit as sv
import zoo
from questions import assert_same_snapshot, snapshot
from squeezevit.errors import ConfigError, SqueezeViTError, UnsupportedError

STAGED = [sv.ETPS, sv.DTPS, sv.EViT, sv.DynamicViT, sv.TopK, sv.Random]
staged = pytest.mark.parametrize("method", STAGED, ids=lambda method: method.__name__)


def refused(kind: type[SqueezeViTError], call, *parts: str) -> str:
    """The message of the error of this kind that the call raises; it has these parts and fits on one screen."""
    with pytest.raises(kind) as error:
        call()
    message = str(error.value)
    assert [part for part in parts if part not in message] == [], message
    assert len(message) < 700
    return message


def refused_by(model: nn.Module, reducer, kind: type[SqueezeViTError], *parts: str) -> str:
    """The same for `reduce_`, which must leave the model exactly as it was."""
    before = snapshot(model)
    message = refused(kind, lambda: sv.reduce_(model, reducer), *parts)
    assert_same_snapshot(snapshot(model), before)
    return message


NO_RATIO = [
    0,
    0.0,
    -0.1,
    1.1,
    2,
    math.nan,
    math.inf,
    -math.inf,
    "0.5",
    "",
    True,
    False,
    None,
    {},
    {0.5},
    1j,
    object,
    [0.5, 0],
    (0.5, "0.5"),
    [None],
]


@staged
@pytest.mark.parametrize("keep", NO_RATIO, ids=repr)
def test_keep_that_is_no_ratio(method, keep):
    refused(
        ConfigError, lambda: method(keep=keep), f"{method.__name__}: keep={keep!r}", "give a number above 0 and at most 1, as 0.7"
    )


@staged
@pytest.mark.parametrize("keep", [[], ()], ids=repr)
def test_keep_that_is_empty(method, keep):
    refused(ConfigError, lambda: method(keep=keep), f"{method.__name__}: keep={keep!r} is empty", "or one per stage")


@staged
def test_keep_of_the_wrong_length(method):
    parts = (
        f"{method.__name__}: keep=(0.7, 0.5) has 2 ratios",
        "has 3 stages",
        "give one ratio per stage, or a single one for all",
    )
    refused(ConfigError, lambda: method(keep=(0.7, 0.5), at=(1, 2, 3)), *parts, "at=(1, 2, 3)")
    refused_by(zoo.build("plain"), method(keep=(0.7, 0.5)), ConfigError, *parts)


@pytest.mark.parametrize("keep", [1, 1.0, 0.5, np.float32(0.5), np.float64(0.5), Fraction(1, 2), torch.tensor(0.5)], ids=repr)
def test_every_kind_of_number_is_a_keep(keep):
    reducer = sv.ETPS(keep=keep)
    assert reducer.keep == float(keep)
    assert isinstance(reducer.keep, float)
    assert hash(reducer) == hash(sv.ETPS(keep=float(keep)))


def test_lists_become_tuples_and_reducers_compare_by_value():
    assert sv.ETPS(keep=[0.7, 0.5], at=[1, 2]) == sv.ETPS(keep=(0.7, 0.5), at=(1, 2))
    assert sv.ETPS(at=range(1, 10, 4)).at == (1, 5, 9)
    assert hash(sv.ToMe(r=[1, 2])) == hash(sv.ToMe(r=(1, 2)))
    for reducer in zoo.REDUCERS.values():
        assert eval(repr(reducer), vars(sv)) == reducer


@pytest.mark.parametrize("keep", [1e-3, 1e-9, 1e-12, 1e-300, 5e-324])
@staged
def test_keep_so_small_that_none_would_stay_keeps_one(method, keep):
    model = zoo.reduce(zoo.build("plain"), method(keep=keep, at=(2,)))
    with sv.trace(model) as t:
        assert zoo.run(model, zoo.images(2)).isfinite().all()
    assert t.stages[0].kept.shape == (2, 1)


NO_STAGES = [
    (),
    [],
    (6, 3),
    (3, 3),
    (3, 6, 6),
    (-1,),
    (-3, 3),
    (1.0,),
    (1.5, 2),
    ("3",),
    "3,6,9",
    "",
    (True, 3),
    1.5,
    (None,),
    {3, 6},
    -1,
]


@staged
@pytest.mark.parametrize("at", NO_STAGES, ids=repr)
def test_at_that_is_no_list_of_stages(method, at):
    refused(
        ConfigError,
        lambda: method(at=at),
        f"{method.__name__}: at={at!r}",
        "0-based block indices in ascending order, each once, as (3, 6, 9)",
    )


@staged
@pytest.mark.parametrize("at", [(4,), (1, 12), (1, 2, 10**9)], ids=repr)
def test_at_beyond_the_model(method, at):
    refused_by(
        zoo.build("plain"),
        method(at=at),
        ConfigError,
        method.__name__,
        f"at={at!r} names block {at[-1]}",
        "the model has 4 blocks, 0 to 3",
        "choose stages below 4",
    )


@pytest.mark.parametrize("r", [-1, 1.5, "8", True, None, [], (), (3, -1), (3, 1.0), {3}], ids=repr)
def test_r_that_is_no_number_of_tokens(r):
    refused(ConfigError, lambda: sv.ToMe(r=r), f"ToMe: r={r!r}", "give an integer of 0 or more, or one per block")


def test_r_of_the_wrong_length():
    parts = ("ToMe: r=(3, 3) has 2 entries", "the model has 4 blocks", "give one per block, or one number")
    refused_by(zoo.build("plain"), sv.ToMe(r=(3, 3)), ConfigError, *parts)


@pytest.mark.parametrize("method", [sv.ETPS, sv.EViT, sv.TopK], ids=lambda method: method.__name__)
@pytest.mark.parametrize("score", ["class", "", None, 3, ["cls"]], ids=repr)
def test_score_that_is_not_known(method, score):
    refused(
        ConfigError, lambda: method(score=score), f"{method.__name__}: score={score!r}", "choose one of 'auto', 'cls', 'received'"
    )


@pytest.mark.parametrize("method", [sv.ETPS, sv.EViT, sv.TopK], ids=lambda method: method.__name__)
@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2}], ids=["no-prefix", "registers-only"])
def test_class_score_without_a_class_token(method, options):
    """Token 0 is then a patch or a register, whose attention means nothing."""
    refused_by(
        zoo.build("attention-pool", **options), method(score="cls"), SqueezeViTError, method.__name__, "class token", "received"
    )


@pytest.mark.parametrize("seed", [1.5, "1", None, True], ids=repr)
def test_seed_that_is_no_integer(seed):
    refused(ConfigError, lambda: sv.Random(seed=seed), f"Random: seed={seed!r} is not an integer", "seed=0")


@pytest.mark.parametrize("reducer", [sv.ETPS, "etps", None, 0.5], ids=repr)
def test_what_is_no_reducer(reducer):
    refused_by(zoo.build("plain"), reducer, ConfigError, f"a {type(reducer).__name__} is not a reducer", "sv.ETPS(keep=0.7)")


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(2, 2),
        lambda: timm.create_model("resnet18"),
    ],
    ids=["linear", "resnet"],
)
def test_models_that_are_not_known(make):
    model = make()
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    refused_by(
        model,
        sv.ETPS(at=(0,)),
        UnsupportedError,
        name,
        "is not a model that SqueezeViT knows",
        "`squeezevit families`",
        "squeezevit.extend.describe",
    )


def test_a_wrapped_model_is_found_inside():
    wrapped = nn.Sequential(nn.Identity(), zoo.build("plain"))
    refused_by(wrapped, sv.ETPS(), UnsupportedError, "torch.nn.modules.container.Sequential", "give model[1] to sv.reduce_")


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1), "embed_dim": 24, "num_heads": (1, 2)}, "within windows"),
        ("samvit_base_patch16_224", {"depth": 1, "embed_dim": 24, "num_heads": 2}, "within windows"),
    ],
)
def test_models_that_cannot_be_reduced(name, options, why):
    model = timm.create_model(name, **options)
    refused_by(model, sv.ETPS(at=(0,)), UnsupportedError, type(model).__name__, "cannot be reduced", why)


@pytest.mark.parametrize(
    "kind", [ParallelScalingBlock, DiffParallelScalingBlock, ParallelThingsBlock], ids=lambda kind: kind.__name__
)
@pytest.mark.parametrize("reducer", [sv.ETPS(at=(1, 2)), sv.DTPS(at=(1, 2)), sv.Random(at=(1,))], ids=lambda r: type(r).__name__)
def test_blocks_that_run_both_halves_at_once(kind, reducer):
    options = {"num_heads": 2} if kind is DiffParallelScalingBlock else {}
    model = zoo.build("plain", block_fn=kind, **options)
    refused_by(
        model,
        reducer,
        UnsupportedError,
        "block 1 is a timm.models.vision_transformer." + kind.__name__,
        "side by side",
        "register attn_half, mlp_half and attention",
    )


class Altered(Block):
    """Looks like timm's block and is not: half a residual is missing."""

    def forward(self, x, attn_mask=None, is_causal=False):
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask)))
        return 0.5 * x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class Swapped(Block):
    """MLP first."""

    def forward(self, x, attn_mask=None, is_causal=False):
        x = x + self.mlp(self.norm2(x))
        return x + self.attn(self.norm1(x), attn_mask=attn_mask)


class DeafAttention(Attention):
    """Takes a mask and does not listen to it."""

    def forward(self, x, attn_mask=None, is_causal=False):
        return super().forward(x)


class WindowedAttention(Attention):
    """Tokens see the other half of the tokens, and no mask is passed on."""

    def forward(self, x, attn_mask=None, is_causal=False):
        half = x.shape[1] // 2
        return torch.cat([super().forward(x[:, :half]), super().forward(x[:, half:])], dim=1)


@pytest.mark.parametrize("index", [1, 3])
@pytest.mark.parametrize("kind", [Altered, Swapped], ids=lambda kind: kind.__name__)
def test_a_host_block_that_differs_from_its_halves(kind, index):
    """Also where the reducer's first stage is an ordinary block: nothing may be touched before all are proved."""
    model = zoo.build("plain")
    model.blocks[index] = zoo.randomize(kind(zoo.DIM, zoo.HEADS)).eval()
    refused_by(
        model,
        sv.ETPS(at=(0, index)),
        UnsupportedError,
        f"block {index}, test_bad_input.{kind.__name__}",
        "its two halves do not add up",
        "differ by",
        "register attn_half, mlp_half and attention",
    )


@pytest.mark.parametrize(
    ("kind", "complaint"), [(DeafAttention, "does not take an additive bias"), (WindowedAttention, "differ by")]
)
def test_attention_that_does_not_take_a_bias(kind, complaint):
    model = zoo.build("plain")
    model.blocks[2].attn = zoo.randomize(kind(zoo.DIM, zoo.HEADS)).eval()
    for reducer in (sv.Random(keep=0.5), sv.ETPS(keep=0.5, mass=True, at=(1,))):
        refused_by(model, reducer, UnsupportedError, "block 2, timm.models.vision_transformer.Block", complaint)


def test_windowed_attention_after_the_last_stage():
    """The block itself is not touched, but it would cut its windows out of what is left of the grid."""
    model = zoo.build("plain")
    model.blocks[2].attn = zoo.randomize(WindowedAttention(zoo.DIM, zoo.HEADS)).eval()
    refused_by(model, sv.Random(keep=0.5, at=(1,)), UnsupportedError, "block 2, timm.models.vision_transformer.Block")


class OwnAttention(Attention):
    """The same numbers, but who knows from which queries and keys."""

    def forward(self, x, attn_mask=None, is_causal=False):
        return super().forward(x, attn_mask=attn_mask)


def test_attention_without_known_rows():
    """Refused where a score needs them, and only there."""
    model = zoo.build("plain")
    model.blocks[1].attn = zoo.randomize(OwnAttention(zoo.DIM, zoo.HEADS)).eval()
    parts = ("attention of class test_bad_input.OwnAttention", "no plain rows to score by", "DTPS, Random")
    for reducer in (sv.ETPS(), sv.EViT(), sv.TopK(), sv.ToMe(r=4)):
        refused_by(model, reducer, UnsupportedError, *parts)
    for reducer in (sv.DTPS(), sv.Random()):
        assert zoo.run(zoo.reduce(model, reducer), zoo.images(1)).isfinite().all()


def test_attention_without_known_rows_after_the_last_stage():
    """Nobody asks for its rows."""
    model = zoo.build("plain")
    model.blocks[3].attn = zoo.randomize(OwnAttention(zoo.DIM, zoo.HEADS)).eval()
    assert zoo.run(sv.reduce_(model, sv.ETPS(at=(1, 2))), zoo.images(1)).isfinite().all()


@pytest.mark.parametrize("reducer", [sv.ETPS(mass=True), sv.ToMe(r=4)], ids=lambda r: type(r).__name__)
def test_prr_pooling_cannot_respect_masses(reducer):
    model = zoo.build("plain", global_pool="prr")
    refused_by(
        model,
        reducer,
        UnsupportedError,
        "VisionTransformer cannot keep masses",
        "'prr' pooling",
        "choose a reducer without, as sv.ETPS()",
    )
    assert zoo.run(sv.reduce_(model, sv.ETPS()), zoo.images(1)).isfinite().all()


def test_a_refusal_keeps_the_reducer_that_was_in():
    model = zoo.reduce(zoo.build("average-pool"), sv.DTPS(keep=0.5))
    before, expected = snapshot(model), zoo.run(model, zoo.images(2))
    refused(ConfigError, lambda: sv.reduce_(model, sv.ETPS(at=(99,))))
    refused(UnsupportedError, lambda: sv.reduce_(zoo.build("plain", block_fn=ParallelThingsBlock), sv.ETPS()))
    assert_same_snapshot(snapshot(model), before)
    assert torch.equal(zoo.run(model, zoo.images(2)), expected)


def test_a_name_that_is_taken():
    model = zoo.build("plain")
    model.token_reducer = nn.Linear(2, 2)
    refused_by(model, sv.DTPS(), UnsupportedError, "already has a token_reducer of class Linear", "rename it first")
    sv.restore_(sv.reduce_(model, sv.ETPS()))
    assert isinstance(model.token_reducer, nn.Linear)


@pytest.mark.parametrize("name", ["etps", "etps-mass", "dtps", "tome"])
def test_attention_masks_are_refused(name):
    model = zoo.reduce(zoo.build("plain"), zoo.REDUCERS[name])
    n, x = zoo.PATCHES + 1, zoo.images(1)
    hides = torch.zeros(1, 1, n, n)
    torch.testing.assert_close(zoo.run(lambda x: model(x, attn_mask=hides), x), zoo.run(model, x))  # nothing yet
    hides[..., -1] = -1e4
    for options in ({"attn_mask": hides}, {"is_causal": True}):
        refused(
            UnsupportedError,
            lambda options=options: model(x, **options),
            f"was called with a mask ({next(iter(options))})",
            "sv.restore_ it first",
        )
    assert zoo.run(model, x).shape == (1, zoo.CLASSES)


@pytest.mark.parametrize("name", ["etps-mass", "tome", "dtps"])
def test_a_block_called_on_its_own_where_state_is_needed(name):
    model, tokens = zoo.reduce(zoo.build("plain"), zoo.REDUCERS[name]), torch.randn(1, 30, zoo.DIM)
    refused(
        UnsupportedError,
        lambda: zoo.run(model.blocks[3], tokens),
        "block 3 ran without the blocks before it",
        type(zoo.REDUCERS[name]).__name__,
        "call the whole model",
    )


@pytest.mark.parametrize("name", ["etps", "evit", "topk", "random"])
def test_a_block_called_on_its_own_where_none_is_needed(name):
    model, tokens = zoo.reduce(zoo.build("plain"), zoo.REDUCERS[name]), torch.randn(1, 31, zoo.DIM)
    assert zoo.run(model.blocks[3], tokens).shape == (1, 1 + 18 + (name == "evit"), zoo.DIM)
