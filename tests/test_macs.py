"""Multiply-adds against the published table, against arithmetic by hand, and what counting must leave alone."""

import re
from functools import cache

import pytest
import timm
import torch

import squeezevit as sv
import zoo
from oracles import head_macs, stage_counts, tokens_per_block, vit_macs
from questions import assert_same_snapshot, planned_counts, quantise, snapshot
from squeezevit.core.macs import token_counts
from squeezevit.errors import ConfigError, UnsupportedError

pytestmark = pytest.mark.usefixtures("no_gumbel_noise")

POINTS = [((3, 6, 9), 0.7), ((3, 5, 7, 9), 0.7), ((2, 4, 6, 8), 0.7), ((3, 6, 9), 0.5), ((3, 5, 7, 9), 0.5), ((2, 4, 6, 8), 0.5)]
PUBLISHED = {  # GMACs, Wei et al. 2023, in the order of POINTS
    ("deit_small_patch16_224", "DTPS"): (2.99, 2.71, 2.42, 2.24, 2.00, 1.64),
    ("deit_small_patch16_224", "ETPS"): (3.01, 2.73, 2.44, 2.30, 2.06, 1.71),
    ("deit_tiny_patch16_224", "DTPS"): (0.81, 0.73, 0.65, 0.61, 0.55, 0.45),
    ("deit_tiny_patch16_224", "ETPS"): (0.82, 0.74, 0.66, 0.63, 0.57, 0.47),
}
TABLE = [
    pytest.param(model, method, at, keep, gmacs, id=f"{model}-{method}-{''.join(map(str, at))}-{keep}")
    for (model, method), column in PUBLISHED.items()
    for (at, keep), gmacs in zip(POINTS, column, strict=True)
]


@cache
def deit(name: str) -> torch.nn.Module:
    return timm.create_model(name).eval()


@pytest.mark.parametrize(("model", "method", "at", "keep", "gmacs"), TABLE)
def test_published_operating_points(model, method, at, keep, gmacs):
    found = sv.macs(sv.reduce_(deit(model), getattr(sv, method)(keep=keep, at=at))) / 1e9
    assert found == pytest.approx(gmacs, abs=0.02)


@pytest.mark.parametrize(("model", "macs"), [("deit_small_patch16_224", 4_598_882_304), ("deit_tiny_patch16_224", 1_253_683_200)])
def test_unreduced_deit(model, macs):
    """Layer by layer by hand; 4.6 and 1.3 in the papers."""
    dim, heads = {"deit_small_patch16_224": (384, 6), "deit_tiny_patch16_224": (192, 3)}[model]
    assert sv.macs(sv.restore_(deit(model))) == macs == vit_macs(12, dim, heads, 4 * dim, 1, 196, 768, 1000, [196] * 12, [196] * 12)


def host_macs(model: torch.nn.Module, at: tuple[int, ...], counts: list[int], place: str) -> int:
    """The host's own part, with `counts` patch tokens left after the stages `at`."""
    attention, mlp = tokens_per_block(zoo.DEPTH, zoo.PATCHES, at, counts, place)
    prefix, inputs = model.num_prefix_tokens, 3 * zoo.PATCH**2
    return vit_macs(zoo.DEPTH, zoo.DIM, zoo.HEADS, 4 * zoo.DIM, prefix, zoo.PATCHES, inputs, zoo.CLASSES, attention, mlp)


def score_macs(tokens: int) -> int:
    """The product of the class token's query with every token's key; attention has computed both."""
    return tokens * zoo.DIM


def received_macs(tokens: int) -> int:
    """Products of the queries and keys that attention has computed, and the mean over queries, head by head."""
    return tokens**2 * zoo.DIM + zoo.HEADS * tokens**2


OWN_COST = {  # of one stage: N patch tokens in, K reserved, P prefix tokens
    "random": lambda n, k, p: 0,
    "topk": lambda n, k, p: score_macs(n + p),
    "etps": lambda n, k, p: score_macs(n + p) + (n - k) * k * zoo.DIM,
    "etps-received": lambda n, k, p: received_macs(n + p) + (n - k) * k * zoo.DIM,
    "etps-mass": lambda n, k, p: score_macs(n + p) + (n - k) * k * zoo.DIM,
    "evit": lambda n, k, p: score_macs(n + p) + (n - k) * zoo.DIM,
    "dynamicvit": lambda n, k, p: head_macs(zoo.DIM, n),
    "dtps": lambda n, k, p: head_macs(zoo.DIM, n) + (n - k) * k * zoo.DIM,
    "tome": lambda n, k, p: (n // 2) * (n - n // 2) * (zoo.DIM // zoo.HEADS),
}


@pytest.mark.parametrize("model", ["plain", "distilled", "registers"])
@pytest.mark.parametrize("name", list(OWN_COST))
def test_host_and_own_cost_add_up(model, name):
    """Exactly: no product of the host or of the reducer is forgotten or counted twice."""
    host, reducer = zoo.build(model), zoo.REDUCERS[name]
    counts = planned_counts(reducer)
    own, incoming = 0, zoo.PATCHES
    for count in counts:
        kept = count - (1 if name == "evit" else 0)
        own += OWN_COST[name](incoming, kept, host.num_prefix_tokens)
        incoming = count
    heads = 2 if model == "distilled" else 1
    expected = host_macs(host, reducer.stages(zoo.DEPTH), counts, reducer.place) + own + (heads - 1) * zoo.DIM * zoo.CLASSES
    assert sv.macs(sv.reduce_(host, reducer)) == expected


@pytest.mark.parametrize("model", list(zoo.MODELS))
def test_every_kind_of_model_can_be_counted(model):
    host = zoo.build(model)
    dense = sv.macs(host)
    assert sv.macs(sv.reduce_(host, sv.ETPS(keep=0.5))) < 0.75 * dense
    assert sv.macs(sv.reduce_(host, sv.ETPS(keep=0.5, mass=True))) < 0.75 * dense


@pytest.mark.parametrize("size", [96, (48, 80), [32, 64]], ids=str)
def test_image_size(size):
    height, width = (size, size) if isinstance(size, int) else size
    model = sv.reduce_(zoo.build("plain", dynamic_img_size=True), sv.Random(keep=0.5))
    counts = stage_counts("topk", height * width // zoo.PATCH**2, 0.5, 3)
    assert token_counts(model, size) == (height * width // zoo.PATCH**2, *counts)
    assert sv.macs(model, size) == sv.macs(sv.reduce_(zoo.build("plain", img_size=(height, width)), sv.Random(keep=0.5)))
    assert sv.macs(model) == sv.macs(sv.reduce_(zoo.build("plain"), sv.Random(keep=0.5)))


@pytest.mark.parametrize("name", list(zoo.REDUCERS))
def test_token_counts(name):
    reducer = zoo.REDUCERS[name]
    expected = (zoo.PATCHES, *planned_counts(reducer)) if reducer.stages(zoo.DEPTH) else ()
    assert token_counts(sv.reduce_(zoo.build("distilled"), reducer)) == expected


@pytest.mark.parametrize("size", [65, 96, (64, 32)], ids=str)
def test_a_size_the_model_does_not_take(size):
    height, width = (size, size) if isinstance(size, int) else size
    with pytest.raises(ConfigError, match=rf"images of {height} x {width} pixels") as error:
        sv.macs(sv.reduce_(zoo.build("plain"), sv.ETPS()), size)
    assert "the size that it was built for, (64, 64)" in str(error.value)


@pytest.mark.parametrize("size", ["224", (64,), (64, 64, 3), 64.0, 0, -64, (64, 0), True, ("64", "64")], ids=repr)
def test_what_is_no_size(size):
    for count in (sv.macs, token_counts):
        with pytest.raises(ConfigError, match=re.escape(f"image_size={size!r} is no size; give pixels a side, as 224")):
            count(sv.reduce_(zoo.build("plain"), sv.ETPS()), size)


def test_quantised_leaves_are_not_blamed_on_the_size():
    model = sv.reduce_(zoo.build("plain"), sv.ETPS())
    quantise(model)
    with pytest.raises(ConfigError, match="some of its layers are quantised; count before quantising"):
        sv.macs(model)


def test_unknown_model():
    with pytest.raises(UnsupportedError, match="Linear is not a model that SqueezeViT knows"):
        sv.macs(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["etps-mass", "dtps", "tome"])
@pytest.mark.parametrize("count", [sv.macs, token_counts], ids=lambda f: f.__name__)
def test_counting_leaves_the_model_alone(name, count):
    """Modes of all modules, weights, outputs, random numbers, and the gradients of a forward that ran before."""
    model, x = zoo.reduce(zoo.build("average-pool"), zoo.REDUCERS[name]).train(), zoo.images()
    model.blocks[0].mlp.eval()
    before, seed = snapshot(model), torch.get_rng_state()
    expected = model(x).detach()
    loss = model(x).sum()
    count(model)
    loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "token_reducer" not in n)
    assert_same_snapshot(snapshot(model), before)
    assert torch.equal(torch.get_rng_state(), seed)
    assert torch.equal(model(x).detach(), expected)


@pytest.mark.parametrize("count", [sv.macs, token_counts], ids=lambda f: f.__name__)
def test_counting_leaves_an_open_trace_alone(count):
    model = sv.reduce_(zoo.build("plain"), sv.ETPS())
    with sv.trace(model) as t:
        zoo.run(model, zoo.images(3))
        kept = [s.kept for s in t.stages]
        count(model)
    assert all(a is s.kept for a, s in zip(kept, t.stages, strict=True)), "the trace now holds the fake image's tokens"


def test_counting_takes_no_memory_for_images():
    """A billion pixels are counted, not computed."""
    model = zoo.build("plain", depth=1, dynamic_img_size=True)
    assert sv.macs(model, 8192) > 10**13


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_precision_changes_no_count(dtype):
    for name in ("etps-mass", "dtps", "tome"):
        model = zoo.reduce(zoo.build("average-pool"), zoo.REDUCERS[name])
        assert sv.macs(model) == sv.macs(model.to(dtype))


def test_frozen_weights_change_no_count():
    model = zoo.reduce(zoo.build("average-pool"), zoo.REDUCERS["dtps"])
    assert sv.macs(model) == sv.macs(model.requires_grad_(False))
