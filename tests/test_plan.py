"""Budgets become reducers: shares of multiply-adds exactly, shares of time by what was measured."""

import json
import math
import re
from dataclasses import replace

import pytest
import timm
import torch

import squeezevit as sv
import zoo
from squeezevit import cli, latency
from squeezevit.errors import ConfigError
from squeezevit.latency import Profile
from squeezevit.macs import token_counts
from squeezevit.plan import make_plan, plan_macs

REDUCERS = [sv.ETPS, sv.ETPS(mass=True), sv.DTPS, sv.EViT, sv.TopK, sv.ToMe, sv.Random, sv.ETPS(at=(2, 4, 6, 8))]


@pytest.fixture(scope="module")
def deit():
    return timm.create_model("deit_tiny_patch16_224").eval()


@pytest.fixture
def linear(monkeypatch, tmp_path):
    """A device on which a block takes as long as it has tokens, and a stage a tenth of that; measuring finds 10 % more."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    profile = Profile(12, 1, (50, 197), (25.0, 98.5), (25.0, 98.5), 100.0, 0.1)
    calls = []

    def measured(model, reducer, *setting):
        stages = latency.fake_trace(sv.reduce_(model, reducer), None).stages
        sv.restore_(model)
        counts = (196, *(s.n_out for s in stages))
        calls.append(reducer)
        seconds = 1.1 * profile.seconds(reducer, [s.block for s in stages], counts)
        return seconds, seconds / profile.seconds(sv.Identity(), (), (196,))

    monkeypatch.setattr(latency, "profile", lambda *setting: profile)
    monkeypatch.setattr(latency, "ratio", measured)
    return calls


@pytest.mark.parametrize(("reducer", "share"), [*((r, 0.5) for r in REDUCERS), (sv.ETPS, 0.65), (sv.ToMe, 0.65)], ids=repr)
def test_a_share_of_macs_is_met_within_half_a_point(deit, reducer, share):
    found = make_plan(deit, reducer, macs=share)
    assert not hasattr(deit, "squeezevit_state")
    assert abs(found.macs_share - share) <= 0.005
    assert sv.macs(sv.reduce_(deit, found.reducer)) / sv.macs(sv.restore_(deit)) == found.macs_share
    kind = reducer if isinstance(reducer, type) else type(reducer)
    assert isinstance(found.reducer, kind)
    if not isinstance(reducer, type):
        assert replace(found.reducer, keep=reducer.keep) == reducer, "other options stay"
    assert sv.plan(deit, reducer, macs=share) == found.reducer


def test_stages_may_be_given_or_moved_forward_to_reach_a_budget(deit):
    assert sv.plan(deit, sv.TopK, macs=0.5, at=(2, 5)).at == (2, 5)
    assert sv.plan(deit, sv.TopK, macs=0.5, at="auto").at == (3, 6, 9)
    with pytest.raises(ConfigError, match=r"TopK cannot reach 20\.0%"):
        sv.plan(deit, sv.TopK, macs=0.2)
    found = make_plan(deit, sv.TopK, macs=0.2, at="auto")
    assert found.reducer.at == (1, 4, 7) and abs(found.macs_share - 0.2) < 0.005


CURVES = {  # the share of tokens left on the way down, and the way of a share
    "geometric": (lambda way: math.exp(-way), lambda left: -math.log(left)),
    "linear": (lambda way: max(1 - way, 0), lambda left: 1 - left),
    "cosine": (lambda way: (1 + math.cos(math.pi * min(way, 1))) / 2, lambda left: math.acos(2 * left - 1) / math.pi),
    "lorentzian": (lambda way: 1 / (1 + way * way), lambda left: math.sqrt(1 / left - 1)),
}


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize(("share", "size"), [(0.65, 224), (0.4, 224), (0.8, 112)])
def test_tokens_fall_along_a_curve_over_all_blocks(curve, share, size):
    """To the token, also where there are 49: rounding up at one block does not move the next."""
    model = timm.create_model("deit_tiny_patch16_224", img_size=size).eval()
    found = make_plan(model, sv.ETPS(mass=True), macs=share, curve=curve)
    assert abs(found.macs_share - share) <= 0.01 and found.reducer.at == "every" and found.reducer.mass
    counts = token_counts(sv.reduce_(model, found.reducer))
    falls, way = CURVES[curve]
    steepness = way(counts[6] / counts[0]) / 6
    expected = [max(counts[0] * falls(steepness * i), 1) for i in range(13)]
    assert counts == pytest.approx(expected, abs=0.6 + 0.02 * counts[0])


@pytest.mark.parametrize(("at", "stages"), [((2, 5, 8), (2, 5, 8)), (None, (0, 3, 6, 9))])
def test_tokens_fall_along_a_curve_over_chosen_stages(deit, at, stages):
    """Those asked for, or the reducer's own."""
    found = make_plan(deit, sv.ETPS(at="quarters"), macs=0.5, at=at, curve="lorentzian")
    assert abs(found.macs_share - 0.5) <= 0.01 and found.reducer.stages(12) == stages
    counts = token_counts(sv.reduce_(deit, found.reducer))
    falls, way = CURVES["lorentzian"]
    steepness = way(counts[1] / counts[0])
    assert counts == pytest.approx([196 * falls(steepness * i) for i in range(len(stages) + 1)], abs=1 + 0.02 * 196)
    sv.restore_(deit)


def test_a_plan_that_fails_leaves_the_model_unreduced(deit):
    for method in ("tome", "training-free", "etps"):
        with pytest.raises(ConfigError):
            plan_macs(deit, method, 0.5, image_size=65)
        assert not hasattr(deit, "squeezevit_state")


def test_the_preset_by_name_or_by_budget_is_the_same(deit):
    """Its ratios differ from stage to stage: gentle at first where little is to go."""
    reducer = plan_macs(deit, "training-free", 0.5)
    assert reducer == sv.preset("training-free", macs=0.5, model=deit)
    assert reducer.keep[0] > max(reducer.keep[1:]) + 0.1 and len(reducer.keep) == 4
    typical = sv.preset("training-free", macs=0.5).keep
    assert typical == pytest.approx(reducer.keep, abs=0.02)


@pytest.mark.parametrize("options", [[], ["--at", "0,3,6,9"]])
def test_the_command_plans_the_preset_along_its_curve(options, tmp_path):
    file = tmp_path / "plan.json"
    with pytest.raises(SystemExit, match="0"):
        cli.main(["plan", "--method", "training-free", "--macs", "0.5", "--json", str(file), *options])
    found = json.loads(file.read_text())["reducer"]
    first, *later = map(float, re.search(r"keep=\(([^)]*)\)", found)[1].split(","))
    assert len(later) == 3 and first > max(later) + 0.1


def test_a_curve_that_cannot_be(deit):
    with pytest.raises(ConfigError, match=r"curve='steep' is not known; choose from geometric, linear, cosine"):
        sv.plan(deit, sv.ETPS, macs=0.5, curve="steep")
    with pytest.raises(ConfigError, match=r"curve='linear' .* but at='auto' looks for stages of one; leave one out"):
        sv.plan(deit, sv.ETPS, macs=0.5, curve="linear", at="auto")
    with pytest.raises(ConfigError, match=r"ToMe has no keep ratios to spread \(curve='linear'\)"):
        sv.plan(deit, sv.ToMe, macs=0.5, curve="linear")


def test_a_profile_adds_halves_stages_and_the_rest():
    p = Profile(3, 1, (3, 5, 9), (1.0, 2.0, 4.0), (10.0, 20.0, 60.0), 100.0, 0.5)
    assert p.seconds(sv.Identity(), (), (8,)) == 100 + 3 * 64
    # block 0 whole; attention of block 1 sees 8, its MLP 6 patches (7 tokens, half-way between 5 and 9); block 2 has 6
    assert p.seconds(sv.ETPS(), (1,), (8, 6)) == 100 + 64 + 8 * 0.5 + (4 + 40) + (3 + 40)
    assert p.seconds(sv.DTPS(), (1,), (8, 6)) == 100 + 64 + 8 * 0.5 + (3 + 40) + (3 + 40)
    assert p.seconds(sv.ETPS(), (1,), (8, 8)) == 100 + 3 * 64, "a stage that removes nothing costs nothing"
    assert p.seconds(sv.ETPS(), (0,), (8, 1)) == 100 + 8 * 0.5 + (4 + 10) + 2 * 11, "below the first count"


@pytest.mark.parametrize("reducer", [sv.ETPS, sv.DTPS, sv.ToMe])
def test_a_share_of_time_is_met_and_verified(deit, linear, reducer):
    """The first plan misses by the tenth that the prediction knows nothing of; the second does not."""
    found = make_plan(deit, reducer, latency=0.6, batch_size=4)
    assert len(linear) == 2
    assert found.measured == pytest.approx(0.6, rel=0.03) and found.predicted == pytest.approx(0.6, rel=0.03)
    weaker = replace(found.reducer, r=tuple(max(r - 1, 0) for r in found.reducer.r)) if reducer is sv.ToMe else None
    weaker = weaker or replace(found.reducer, keep=found.reducer.keep + 0.05)
    assert latency.ratio(deit, weaker)[1] > 0.6, "more tokens would miss the budget"


def test_images_per_second_are_met_and_a_budget_above_the_model_keeps_all(deit, linear):
    dense = 100 + 12 * 197
    found = make_plan(deit, sv.ETPS, images_per_second=8 / (0.7 * dense), batch_size=8)
    assert found.seconds == pytest.approx(0.7 * dense, rel=0.03)
    generous = make_plan(deit, sv.ETPS, images_per_second=8 / (2 * dense), batch_size=8)
    assert generous.reducer.keep == 1 and generous.macs_share == 1


def test_times_out_of_reach_are_named(deit, linear):
    with pytest.raises(ConfigError, match=r"ETPS cannot reach 10\.0% of the unreduced.*the least predicted is \d+\.\d%"):
        sv.plan(deit, sv.ETPS, latency=0.1)
    assert linear == []


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, r"give one budget.*not none"),
        ({"macs": 0.5, "latency": 0.5}, "not macs, latency"),
        ({"macs": 1.5}, r"macs=1\.5 is no budget; give a share"),
        ({"latency": 0}, "latency=0 is no budget"),
        ({"images_per_second": -1}, "images_per_second=-1 is no budget; give a number"),
        ({"macs": float("nan")}, "macs=nan"),
        ({"macs": 0.5, "at": "late"}, "at='late'"),
    ],
)
def test_budgets_that_cannot_be_meant(deit, budget, message):
    with pytest.raises(ConfigError, match=message):
        sv.plan(deit, sv.ETPS, **budget)


@pytest.mark.parametrize("reducer", [sv.Identity, sv.Identity()])
def test_reducers_without_strength_are_refused(deit, reducer):
    with pytest.raises(ConfigError, match="no keep ratio to plan"):
        sv.plan(deit, reducer, macs=0.5)
    with pytest.raises(ConfigError, match="has no stages to choose"):
        sv.plan(deit, sv.ToMe, macs=0.5, at="auto")


@pytest.mark.parametrize("kind", ["plain", "average-pool"])
def test_a_real_profile_is_measured_once_and_kept(kind, monkeypatch, tmp_path):
    """On a tiny model: figures are positive and rising, the file is read again, and `fresh` measures anew."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(latency, "_SECONDS", 0.05)
    model = zoo.build(kind)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = latency.cached_profile(model, sv.ETPS(keep=0.5), batch_size=1)
    (file,) = (tmp_path / "squeezevit" / "profiles").iterdir()
    values = json.loads(file.read_text())
    assert values["tokens"][-1] == zoo.PATCHES + model.num_prefix_tokens and values["depth"] == zoo.DEPTH
    assert all(list(values[k]) == sorted(values[k]) and values[k][0] > 0 for k in ("attention", "mlp"))
    monkeypatch.setattr(latency, "profile", lambda *setting: pytest.fail("measured again"))
    assert latency.cached_profile(model, sv.ETPS(keep=0.5), batch_size=1) == found
    for other in ({"fresh": True}, {"precision": "bf16"}):
        with pytest.raises(pytest.fail.Exception):
            latency.cached_profile(model, sv.ETPS(keep=0.5), batch_size=1, **other)
    seconds, share = latency.ratio(model, sv.ETPS(keep=0.5), batch_size=1)
    assert seconds > 0 and share > 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not hasattr(model, "squeezevit_state") and not model.training
