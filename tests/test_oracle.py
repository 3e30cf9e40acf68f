"""Whole models against the slow transcriptions of oracles.py, and those against the hosts' own forward."""

from typing import Any

import pytest
import torch

import oracles
import squeezevit as sv
import zoo
from squeezevit.core.reducer import Reducer

MODELS = pytest.mark.parametrize("model", list(zoo.MODELS))
KEEPS = (0.7, 0.5, 0.3)
METHODS = {
    "etps": lambda keep: sv.ETPS(keep=keep),
    "etps-received": lambda keep: sv.ETPS(keep=keep, score="received"),
    "etps-mass": lambda keep: sv.ETPS(keep=keep, mass=True),
    "etps-mass-received": lambda keep: sv.ETPS(keep=keep, mass=True, score="received"),
    "dtps": lambda keep: sv.DTPS(keep=keep),
    "dynamicvit": lambda keep: sv.DynamicViT(keep=keep),
    "evit": lambda keep: sv.EViT(keep=keep),
    "evit-normalize": lambda keep: sv.EViT(keep=keep, normalize=True),
    "topk": lambda keep: sv.TopK(keep=keep),
    "tome": lambda keep: sv.ToMe(r={0.7: 5, 0.5: 9, 0.3: 13}[keep]),
    "random": lambda keep: sv.Random(keep=keep, seed=1),
}
SCHEDULES = {
    "per-stage": sv.ETPS(keep=(0.9, 0.4), at=(0, 3)),
    "first-and-last-block": sv.ETPS(keep=0.5, at=(0, 3), mass=True),
    "first-block-dtps": sv.DTPS(keep=(0.8, 0.5, 0.9), at=(0, 1, 3)),
    "last-block-dtps": sv.DTPS(keep=0.5, at=(3,)),
    "last-block-evit": sv.EViT(keep=0.5, at=(3,)),
    "every-block-evit": sv.EViT(keep=0.6, at=(0, 1, 2, 3), normalize=True),
    "down-to-one": sv.ETPS(keep=0.01, at=(1, 2)),
    "down-to-one-mass": sv.ETPS(keep=0.01, at=(1, 2), mass=True),
    "down-to-one-dtps": sv.DTPS(keep=0.01, at=(1, 2)),
    "down-to-one-evit": sv.EViT(keep=0.01, at=(1, 2, 3), normalize=True),
    "down-to-one-topk": sv.TopK(keep=0.01, at=(1, 2)),
    "tome-as-many-as-there-are": sv.ToMe(r=60),
    "tome-per-block": sv.ToMe(r=(0, 7, 0, 20)),
    "one-stage-off": sv.ETPS(keep=(0.5, 1.0, 0.5), at=(0, 1, 2), mass=True),
    "first-stage-off-dtps": sv.DTPS(keep=(1.0, 0.5), at=(1, 2)),
}


def options(reducer: Reducer, model: torch.nn.Module, t: Any = None) -> dict[str, Any]:
    """The same method in the oracle's words; chance is taken from the trace."""
    if isinstance(reducer, sv.ToMe):
        return {"method": "tome", "r": reducer.r}
    found = {"method": type(reducer).__name__.lower(), "keep": reducer.keep, "at": reducer.stages(len(model.blocks))}
    if isinstance(reducer, sv.Random):
        return {**found, "method": "topk", "score": [s.scores for s in t.stages]}
    if reducer.learned:
        return {**found, "heads": list(model.token_reducer)}
    if isinstance(reducer, sv.ETPS):
        return {**found, "mass": reducer.mass, "score": reducer.score}
    return {**found, "normalize": reducer.normalize} if isinstance(reducer, sv.EViT) else found


def assert_equals_oracle(host: torch.nn.Module, reducer: Reducer, x: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Tokens, logits, masses' effect and every decision; `host` is left reduced."""
    plain = zoo.build_like(host)
    zoo.reduce(host, reducer)
    with sv.trace(host) as t:
        logits = zoo.run(host, x)
    features = zoo.run(host.forward_features, x)
    expected = oracles.forward(plain, x, **options(reducer, host, t))
    for found, wanted in zip([s for s in t.stages if s.pruned.shape[1]], [s for s in expected.stages if s.pruned[0]], strict=True):
        assert found.block == wanted.block
        assert found.kept.tolist() == wanted.kept
        assert found.pruned.tolist() == wanted.pruned
        assert (found.hosts is None and wanted.hosts is None) or found.hosts.tolist() == wanted.hosts
        if wanted.scores is not None:
            torch.testing.assert_close(found.scores.double(), wanted.scores, rtol=1e-4, atol=1e-5)
    for values, wanted in ((features, expected.features), (logits, expected.logits)):
        size = max(1.0, wanted.abs().max().item())  # tokens that no final norm has scaled are larger, and so is their noise
        torch.testing.assert_close(values.double(), wanted, rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize(
    ("depth", "at"),
    [(1, (0,)), (2, (0, 1)), (3, (0, 1, 2)), (4, (1, 2, 3)), (12, (3, 6, 9)), (24, (6, 12, 18)), (40, (10, 20, 30))],
)
def test_stages_without_being_told(depth, at):
    assert sv.ETPS().stages(depth) == sv.DTPS(at=None).stages(depth) == at
    assert sv.ToMe(r=2).stages(depth) == tuple(range(depth))


@pytest.mark.parametrize(
    ("keep", "n", "up", "down"),
    [(0.55, 100, 55, 55), (0.07, 100, 7, 7), (0.29, 100, 29, 29), (0.7, 196, 138, 137), (0.001, 10, 1, 1)],
)
def test_counts_are_those_of_the_decimals_written(keep, n, up, down):
    """0.55 * 100 is 55.000000000000007 in binary, 0.29 * 100 is 28.999999999999996."""
    for method in (sv.ETPS, sv.EViT, sv.TopK, sv.Random):
        assert method(keep=keep).count(0, n, n) == up
    for method in (sv.DTPS, sv.DynamicViT):
        assert method(keep=keep).count(0, n, n) == down


def test_counts_from_stage_to_stage():
    """eTPS rounds up from the count before, dTPS down from the first: 0.7 * 138 = 96.6, 0.49 * 196 = 96.04."""
    assert [sv.ETPS(keep=0.7).count(j, n, 196) for j, n in enumerate((196, 138, 97))] == [138, 97, 68]
    assert [sv.DTPS(keep=0.7).count(j, n, 196) for j, n in enumerate((196, 137, 96))] == [137, 96, 67]
    assert sv.DTPS(keep=0.7).count(2, 343, 1000) == 343
    assert sv.DTPS(keep=(0.5, 1.0)).count(1, 3, 100) == 3
    assert [sv.ToMe(r=(0, 8, 30)).count(j, n, 64) for j, n in enumerate((64, 20))] == [56, 10]


@MODELS
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("method", list(METHODS))
def test_model_equals_oracle(model, method, keep):
    assert_equals_oracle(zoo.build(model), METHODS[method](keep), zoo.images(2))


@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize("model", ["distilled", "attention-pool", "average-pool"])
def test_schedule_equals_oracle(model, schedule):
    assert_equals_oracle(zoo.build(model), SCHEDULES[schedule], zoo.images(2))


@pytest.mark.parametrize("method", list(METHODS))
def test_non_square_grid_equals_oracle(method):
    model = zoo.build("registers", img_size=(40, 72))
    assert_equals_oracle(model, METHODS[method](0.5), zoo.images(2, (40, 72)))


@pytest.mark.parametrize("method", list(METHODS))
def test_double_precision_equals_oracle_more_closely(method):
    """Tokens are never rounded to float32; scores and masses are, which enter as weights where a method weighs by them."""
    weighed = METHODS[method](0.5).weighs or method.startswith("evit")
    tolerance = 1e-6 if weighed else 1e-9
    assert_equals_oracle(zoo.build("average-pool").double(), METHODS[method](0.5), zoo.images(2).double(), tolerance)


@pytest.mark.parametrize("pooling", ["avg", "avgmax", "max", "map"])
@pytest.mark.parametrize("prefix", [False, True], ids=["patches", "with-prefix"])
@pytest.mark.parametrize("reducer", ["etps-mass", "tome"])
def test_pooling_weighs_by_mass(reducer, pooling, prefix):
    """Every pooling, with and without gradients: what the head gets equals the pool of each token repeated mass times."""
    model = zoo.reduce(zoo.build("average-pool", global_pool=pooling, pool_include_prefix=prefix), zoo.REDUCERS[reducer])
    x = zoo.images(2)
    with sv.trace(model) as t:
        tokens = zoo.run(model.forward_features, x)
    first = 1 - prefix
    expected = []
    for image, groups in zip(tokens, t.groups, strict=True):
        repeats = torch.cat([torch.ones(1, dtype=torch.long), groups.bincount(minlength=tokens.shape[1] - 1)])[first:]
        assert repeats.sum() == zoo.PATCHES + prefix
        many = image[first:].repeat_interleave(repeats, dim=0)[None]
        average, peak = many.mean(dim=1), many.amax(dim=1)
        if pooling == "map":
            pooled = model.attn_pool(many)
        else:
            pooled = {"avg": average, "max": peak, "avgmax": (average + peak) / 2}[pooling]
        expected.append(model.head(model.fc_norm(pooled)))
    expected = torch.cat(expected).detach()
    torch.testing.assert_close(model(x).detach(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(zoo.run(model, x), expected, rtol=1e-5, atol=1e-5)


@MODELS
def test_oracle_without_reduction_is_the_host(model):
    host, x = zoo.build(model), zoo.images(2)
    expected = oracles.forward(host, x, "identity")
    torch.testing.assert_close(zoo.run(host, x).double(), expected.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", [m for m in zoo.MODELS if m != "attention-pool"])
@pytest.mark.parametrize(("method", "place"), [("topk", "between"), ("dynamicvit", "before")])
def test_oracle_of_dropping_is_the_host_with_a_mask(model, method, place):
    """Two ways to the same numbers that share nothing: tokens removed, and tokens kept but hidden from attention."""
    host, x = zoo.build(model), zoo.images(2)
    heads = zoo.reduce(zoo.build(model), sv.DynamicViT(keep=0.5)).token_reducer
    expected = oracles.forward(host, x, method, keep=0.5, at=(1, 2, 3), heads=list(heads))
    masked = oracles.masked_topk_forward(host, x, [s.kept for s in expected.stages], (1, 2, 3), place)
    torch.testing.assert_close(masked, expected.logits, rtol=1e-9, atol=1e-9)


def test_sure_heads_still_rank():
    """log p(keep) of a head that is sure of every token rounds to 0 for all of them; its log-odds do not."""
    model = zoo.reduce(zoo.build("plain"), sv.DTPS(keep=0.5, at=(1,)))
    last = model.token_reducer[0].out_conv[4]
    with torch.no_grad():
        last.bias += torch.tensor([40.0, -40.0])
    with sv.trace(model) as t:
        zoo.run(model, zoo.images())
    scores = t.stages[0].scores
    assert scores.min() > 20
    assert all(len(set(row.tolist())) == zoo.PATCHES for row in scores)
