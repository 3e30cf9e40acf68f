"""Budgets become reducers: shares of multiply-adds exactly, shares of time by what was measured."""

import json
import math
import re
from dataclasses import dataclass, replace
from functools import partial

import pytest
import timm
import torch

import squeezevit as sv
import zoo
from squeezevit import cli
from squeezevit.budget import latency
from squeezevit.budget import meter as meters
from squeezevit.budget.calibrate import calibrate
from squeezevit.budget.latency import Clock, Profile
from squeezevit.budget.meter import Meter, Setting
from squeezevit.budget.plan import like, make_plan, plan_macs
from squeezevit.core.macs import fake_trace, token_counts
from squeezevit.core.reducer import Reducer, Reduction
from squeezevit.errors import ConfigError

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

    def measured(meter, reducer, *progress):
        stages = fake_trace(sv.reduce_(meter.model, reducer), None).stages
        sv.restore_(meter.model)
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


def test_plan_is_the_reducer_of_make_plan(deit):
    assert sv.plan(deit, sv.EViT, macs=0.5) == make_plan(deit, sv.EViT, macs=0.5).reducer


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


@pytest.mark.parametrize(
    ("curve", "share", "size"), [*((curve, 0.4, 224) for curve in CURVES), ("lorentzian", 0.65, 224), ("linear", 0.8, 112)]
)
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
    with pytest.raises(
        ConfigError, match=r"is planned for a model: give it, as sv\.preset\('training-free', macs=0\.5, model=model\)"
    ):
        sv.preset("training-free", macs=0.5)


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
    assert latency.ratio(Meter(deit), weaker)[1] > 0.6, "more tokens would miss the budget"


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
        ({"images_per_second": float("inf")}, "images_per_second=inf is no budget"),
        ({"macs": float("nan")}, "macs=nan"),
        ({"macs": "50%"}, r"macs='50%' is no budget; give a share"),
        ({"latency": True}, "latency=True is no budget"),
        ({"macs": 0.5, "batch_size": 0}, "batch_size=0 is no number of images"),
        ({"macs": 0.5, "precision": "half"}, "precision='half'"),
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


@dataclass(frozen=True)
class Stranger(Reducer):
    """A method of somebody else's: one stage, and a number of tokens instead of ratios."""

    left: int = 30
    wide: bool = False

    def stages(self, depth):
        return (1,)

    def count(self, stage, n, n0):
        return min(self.left, n)

    def reduce(self, s):
        everything = torch.arange(s.n).expand(len(s.tokens), -1)
        kept, pruned = everything[:, : s.k], everything[:, s.k :]
        return Reduction(s.keep(kept), kept, pruned)

    def at_strength(self, strength, patches, depth):
        return replace(self, left=max(round(patches * (1 - strength)), 1))


def test_a_strangers_reducer_is_planned_by_its_strength():
    model, told = zoo.build("plain"), []
    found = make_plan(model, Stranger(wide=True), macs=0.6, progress=lambda *step: told.append(step))
    assert found.reducer.wide and abs(found.macs_share - 0.6) < 0.02
    assert {what for what, _, _ in told} == {"counting multiply-adds"} and told[-1][1:] == (17, 17)
    with pytest.raises(ConfigError, match=r"Stranger cannot reach 5\.0%"):
        sv.plan(model, Stranger, macs=0.05)


def test_names_classes_and_reducers_are_planned_alike():
    model = zoo.build("plain", depth=2)
    by_name = sv.plan(model, "topk", macs=0.7)
    assert by_name == sv.plan(model, sv.TopK(keep=0.1), macs=0.7) == plan_macs(model, "topk", 0.7)
    assert len(sv.plan(model, "preset", macs=0.7).keep) == 2, "a name brings its curve"
    assert isinstance(sv.plan(model, "preset", macs=0.7, at="auto").keep, float), "but where stages of one ratio are looked for"
    for nothing in (3, int, None, model):
        with pytest.raises(ConfigError, match=r"^a \w+ is not a reducer; give the model first, then a method's name, a class"):
            sv.plan(model, nothing, macs=0.7)
    with pytest.raises(ConfigError, match="a str is not a model"):
        sv.plan("vit", sv.ETPS, macs=0.7)


def test_a_reducer_by_name_and_keep_ratio():
    """ToMe has none: it costs what eTPS costs there."""
    model = zoo.build("plain")
    assert like(model, "evit", 0.6, (1, 2)) == sv.EViT(keep=0.6, at=(1, 2)) and like(model, "identity", 0.6) == sv.Identity()
    found = like(model, "tome", 0.6, (1, 2))
    with Meter(model) as meter:
        assert isinstance(found, sv.ToMe) and meter.share(found) == pytest.approx(
            meter.share(sv.ETPS(keep=0.6, at=(1, 2))), abs=0.02
        )
    assert not hasattr(model, "squeezevit_state")


def test_the_meter_proves_blocks_once_for_ratios_alone(monkeypatch):
    model, proved = zoo.build("plain"), []
    monkeypatch.setattr(meters, "reduce_as_needed_", lambda model, reducer: proved.append(reducer) or sv.reduce_(model, reducer))
    with Meter(model) as meter:
        counts = [meter.counts(sv.ETPS(keep=keep)) for keep in (0.5, 0.6, 0.5)]
        assert len(proved) == 1 and counts[0] == counts[2] == (64, 32, 16, 8) and counts[1] == (64, 39, 24, 15)
        assert meter.share(sv.TopK(keep=0.5)) < meter.share(sv.TopK(keep=0.6)) < 1 == meter.share(sv.Identity())
        assert meter.patches == 64 and meter.depth == 4
        assert meter.dense == sv.macs(zoo.build("plain")), "whatever was in the model before"
    assert not hasattr(model, "squeezevit_state")


@pytest.mark.parametrize("kind", ["hf-vit", "hf-clip", "torchvision", "plain"])
def test_sizes_that_a_model_takes_are_planned_and_others_refused(kind, monkeypatch, tmp_path):
    """Models of Hugging Face stretch their positions, and must be asked to."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(latency, "_SECONDS", 1e-9)
    model, size = zoo.build(kind), 96
    if kind in ("torchvision", "plain"):
        for how in ({"macs": 0.6}, {"latency": 0.6}):
            with pytest.raises(ConfigError, match="does not run on images of 96 x 96 pixels"):
                sv.plan(model, sv.TopK, image_size=size, **how)
        with pytest.raises(ConfigError, match="does not run on images of 96 x 96 pixels"):
            calibrate(model, sv.TopK(), 0.6, [zoo.images(2, size)])
        return
    found = make_plan(model, sv.TopK, macs=0.6, image_size=size)
    assert abs(found.macs_share - 0.6) < 0.02 and sv.preset("training-free", 0.6, model, size).keep[0] < 1
    with Meter(model, Setting(image_size=size)) as meter:
        times = latency.profile(meter, sv.TopK(keep=0.5))
        assert times.tokens[-1] == (size // zoo.PATCH) ** 2 + 1 and latency.ratio(meter, found.reducer)[0] > 0
    assert calibrate(model, sv.TopK(), 0.6, [zoo.images(2, size)], image_size=size, most=1).tried == 1


PROFILE = Profile(4, 1, (9, 65), (0.5, 4.0), (0.5, 4.0), 3.0, 0.01)  # of zoo's models


@pytest.fixture
def profiles(monkeypatch, tmp_path):
    """What is measured next on an imagined device; and the folder of profiles."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder, measured = tmp_path / "squeezevit" / "profiles", []
    monkeypatch.setattr(latency, "profile", lambda *setting: measured.pop(0))
    monkeypatch.setattr(latency, "ratio", lambda meter, reducer, *progress: pytest.fail("no plan is measured"))
    return folder, measured


def clock_of(model, **options):
    return Clock(Meter(model), sv.ETPS(keep=0.5), **options)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:60],
        lambda text: "",
        lambda text: "[]",
        lambda text: '{"x": 1}',
        lambda text: "[" * 100_000,
        lambda text: "\x00\xff",
        lambda text: text.replace('"depth": 4', '"depth": 12'),
        lambda text: text.replace("65", "785"),
        lambda text: text.replace("[0.5, 4.0]", "[0.5]"),
        lambda text: text.replace("[0.5, 4.0]", "[-0.5, 4.0]"),
        lambda text: text.replace("[0.5, 4.0]", '["1", "4"]'),
        lambda text: text.replace("[9, 65]", "[]").replace("[0.5, 4.0]", "[]"),
        lambda text: text.replace('"rest": 3.0', '"rest": NaN'),
        lambda text: text.replace('"spread": 0.0', '"spread": 1.5'),
    ],
)
def test_a_profile_that_cannot_be_is_measured_again(profiles, caplog, damage):
    folder, measured = profiles
    model = zoo.build("plain")
    measured.append(PROFILE)
    assert clock_of(model).profile == PROFILE
    (file,) = folder.iterdir()
    whole = file.read_text()
    assert damage(whole) != whole
    file.write_text(damage(whole), encoding="latin-1")
    measured.append(PROFILE)
    assert clock_of(model).own and not measured
    assert f"the profile {file} cannot be used" in caplog.text and "measuring again" in caplog.text
    assert file.read_text() == whole and list(folder.iterdir()) == [file]
    assert clock_of(model).profile == PROFILE and not clock_of(model).own


@pytest.mark.parametrize("where", [".", "squeezevit", "squeezevit/profiles"])
def test_without_a_folder_for_profiles_it_is_measured_each_time(profiles, tmp_path, monkeypatch, caplog, where):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = tmp_path / "cache" / where
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("x")
    profiles[1].extend([PROFILE, PROFILE])
    for _ in range(2):
        clock = clock_of(zoo.build("plain"))
        assert clock.profile == PROFILE and not clock.kept and str(clock.file) not in clock.source()
    assert caplog.text.count("it will be measured again the next time") == 2


def test_a_profile_is_written_whole_or_not_at_all(profiles, monkeypatch):
    folder, measured = profiles
    measured.append(PROFILE)

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(latency.Path, "replace", full)
    assert not clock_of(zoo.build("plain")).kept and list(folder.iterdir()) == []


def test_what_an_old_profile_says_is_out_of_reach_is_measured_again(profiles, monkeypatch):
    """It may be from a busy hour."""
    model = zoo.build("plain")
    busy = replace(PROFILE, rest=300.0)
    profiles[1].append(busy)
    clock_of(model)
    profiles[1].append(PROFILE)
    monkeypatch.setattr(latency, "ratio", lambda meter, reducer, *progress: (0.6 * 35, 0.6))
    told = []
    found = make_plan(model, sv.ETPS, latency=0.6, progress=lambda *step: told.append(step))
    assert not profiles[1] and found.predicted == pytest.approx(0.6, abs=0.02)
    assert all(what == "choosing the strength" and 0 < done <= most for what, done, most in told) and told[-1][1:] == (13, 13)
    profiles[1].append(busy)
    with pytest.raises(ConfigError, match=r"timed just now and kept in .*\.json; fresh=True \(--fresh\) times them again"):
        make_plan(model, sv.ETPS, latency=0.6, fresh=True)
    profiles[1].append(busy)
    with pytest.raises(
        ConfigError, match=r"cannot reach 123,457 images/s .*; the most predicted is 0\.\d+ images/s \(3\d\d s a batch"
    ):
        make_plan(model, sv.ETPS, images_per_second=123456.7)


def test_times_that_never_settle_are_not_kept_and_refuse_nothing_by_themselves(profiles, monkeypatch, caplog):
    model = zoo.build("plain")
    busy = replace(PROFILE, rest=300.0, spread=1.5)
    profiles[1].extend([busy, busy])
    plans = []

    def measured(meter, reducer, *progress):
        plans.append(reducer)
        share = PROFILE.seconds(reducer, reducer.stages(4), meter.counts(reducer)) / 35
        return 335 * share, share

    monkeypatch.setattr(latency, "ratio", measured)
    found = make_plan(model, sv.ETPS, latency=0.7)
    assert found.measured == pytest.approx(0.7, rel=0.03) and plans[0].keep == 1e-4, "the strongest first"
    assert not profiles[0].exists() and "differ by up to 2.5 x from round to round" in caplog.text
    with pytest.raises(
        ConfigError, match=r"cannot reach 10\.0%.*the least measured is \d\d\.\d%.*busy.*plan again when it is quiet"
    ):
        make_plan(model, sv.ETPS, latency=0.1)


def test_rounds_that_disagree_are_measured_again(monkeypatch):
    """A busy spell ends; the best times are over all rounds."""
    factors, asked, told = [9.0, 3.0, 1.0, 1.0, 1.0], [], []

    def alternate(cases, rounds, **options):
        asked.append(rounds)
        slow = factors.pop(0)
        return latency.Timings({name: [slow * seconds] * rounds for name, seconds in cases.items()})

    monkeypatch.setattr(latency, "_SECONDS", 1e-9)
    monkeypatch.setattr(latency, "alternate", alternate)
    run = partial(latency.settled, {"a": 2.0, "b": 5.0}, torch.device("cpu"), "timing", lambda *step: told.append(step))
    times, differs = run()
    assert asked == [1, 2, 2, 2, 2] and differs == 0, "the first is not counted"
    assert times.best("a") == 2 and times.best("b") == 5 and told[-1] == ("timing", 100, 100)
    factors += [9.0, 32.0, 16.0, 8.0, 4.0, 2.0, 1.0]
    times, differs = run()
    assert not factors and differs == 7 and times.best("b") == 5, "three times as many and no more"


def test_a_profile_says_what_two_whole_models_took():
    """Whether blocks are slower in the model than alone, faster, or stages cost something."""
    counts, at, probe = (64, 32, 16), (1, 2), sv.ETPS()
    alone = replace(PROFILE, rest=0.0, stage=0.0)
    blocks, left = alone.seconds(sv.Identity(), (), counts[:1]), alone.seconds(probe, at, counts)
    for whole, reduced in ((blocks + 10, left + 15), (1.5 * blocks + 10, 1.5 * left + 10), (0.8 * blocks, 0.8 * left + 1)):
        found = latency.fitted(alone, whole, reduced, probe, at, counts)
        assert found.seconds(sv.Identity(), (), counts[:1]) == pytest.approx(whole)
        assert found.seconds(probe, at, counts) == pytest.approx(reduced)
        assert found.rest >= 0 and found.stage >= 0


@pytest.mark.parametrize("kind", ["plain", "average-pool"])
def test_a_real_profile_is_measured_once_and_kept(kind, monkeypatch, tmp_path):
    """On a tiny model: figures are positive and rising, the file is read again, and `fresh` measures anew."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(latency, "_SECONDS", 0.05)
    monkeypatch.setattr(latency, "_AGREE", math.inf)  # however busy this machine is
    model, probe = zoo.build(kind), sv.ETPS(keep=0.5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = Clock(Meter(model), probe).profile
    (file,) = (tmp_path / "squeezevit" / "profiles").iterdir()
    values = json.loads(file.read_text())
    assert values["tokens"][-1] == zoo.PATCHES + model.num_prefix_tokens and values["depth"] == zoo.DEPTH
    assert all(list(values[k]) == sorted(values[k]) and values[k][0] > 0 for k in ("attention", "mlp"))
    monkeypatch.setattr(latency, "profile", lambda *setting: pytest.fail("measured again"))
    assert Clock(Meter(model), probe).profile == found
    for setting, fresh in ((Setting(), True), (Setting(precision="bf16"), False)):
        with pytest.raises(pytest.fail.Exception):
            Clock(Meter(model, setting), probe, fresh)
    with Meter(model) as meter:
        seconds, share = latency.ratio(meter, probe)
    assert seconds > 0 and share > 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not hasattr(model, "squeezevit_state") and not model.training


def test_a_plan_keeps_how_diffrate_merges():
    """Pure pruning stays so; the default merges by the searched rates."""
    model = zoo.build("plain")
    assert sv.plan(model, sv.DiffRate(merge=0.0), macs=0.6).merge == 0.0
    found = sv.plan(model, sv.DiffRate, macs=0.6)
    assert isinstance(found.merge, tuple) and sv.plan(model, sv.plan(model, sv.DiffRate, macs=0.8), macs=0.6) == found
    assert sv.plan(model, sv.DiffRate.searched("deit_small", 2.9), macs=0.6) == found  # of another depth


def test_a_learned_reducer_is_not_searched_by_fresh_heads():
    with pytest.raises(ConfigError, match="every candidate would have fresh ones; calibrate a reducer that learns nothing"):
        calibrate(zoo.build("plain"), sv.DTPS(), 0.6, [zoo.images()])


def test_learned_heads_are_there_while_a_meter_holds_the_model():
    model = sv.reduce_(zoo.build("plain"), sv.DTPS(keep=0.5))
    heads = model.token_reducer
    with Meter(model) as meter:
        assert meter.hold(sv.DTPS(keep=0.7)).token_reducer is heads
    assert model.token_reducer is heads
