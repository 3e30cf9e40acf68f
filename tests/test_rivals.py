"""Each rival method against the loops of oracles_rivals.py, at every stage that runs in whole models."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import oracles_rivals as oracle
import squeezevit as sv
import zoo
from oracles_rivals import Given, Taken
from squeezevit.budget.plan import like, plan_macs
from squeezevit.core.reducer import Reducer, Reduction, Stage
from squeezevit.errors import ConfigError
from squeezevit.reducers.catalog import from_dict, label_of, method
from squeezevit.reducers.diffrate import SEARCHED

KINDS = ("average-pool", "registers", "plain")
Oracle = Callable[[Reducer, Stage, Given], Taken]


def scored(reducer: Any, s: Stage, g: Given) -> Taken:
    """TopK by how far the MLP puts out from what it takes in."""
    shift = oracle.shift(g)
    kept = oracle.first_of({i: shift[i] for i in g.patches}, g.count)
    taken = oracle.dropped(g, [i for i in g.patches if i not in kept])
    return replace(taken, scores={i: shift[i] for i in g.patches})


CASES: dict[str, tuple[Reducer, Oracle]] = {
    "pitome": (sv.PiToMe(keep=0.85), lambda r, s, g: oracle.pitome(g, 0.9, always=False)),
    "pitome-paper": (sv.PiToMe(keep=0.7, margin=0.5, protect="always"), lambda r, s, g: oracle.pitome(g, 0.5, always=True)),
    "pitome-half": (sv.PiToMe(keep=0.1, at=(1, 3)), lambda r, s, g: oracle.pitome(g, 0.9, always=False)),
    "tofu": (sv.ToFu(r=9), lambda r, s, g: oracle.tofu(g)),
    "merge-error": (sv.MergeError(r=9), lambda r, s, g: oracle.merge_error(g)),
    "mctf": (sv.MCTF(r=9), lambda r, s, g: oracle.mctf(g, (1, 20, 40))),
    "mctf-one": (sv.MCTF(r=(1, 20, 30, 3), temperatures=(2, 5, 0.5)), lambda r, s, g: oracle.mctf(g, (2, 5, 0.5))),
    "diffrate": (sv.DiffRate(keep=0.8, merge=0.4), lambda r, s, g: oracle.diffrate(g, r.merged(s.index, s.n, s.k))),
    "diffrate-prunes": (
        sv.DiffRate(keep=0.8, merge=(0, 1, 0.3, 0)),
        lambda r, s, g: oracle.diffrate(g, r.merged(s.index, s.n, s.k)),
    ),
    "atc": (sv.ATC(keep=0.6), lambda r, s, g: oracle.atc(g, "average")),
    "atc-complete": (sv.ATC(keep=0.6, linkage="complete", at=(1,)), lambda r, s, g: oracle.atc(g, "complete")),
    "atc-single": (sv.ATC(keep=0.5, linkage="single", at=(1,)), lambda r, s, g: oracle.atc(g, "single")),
    "zero-tprune": (
        sv.ZeroTPrune(keep=0.7, at=(0, 1, 3)),
        lambda r, s, g: oracle.zero_tprune(g, r.twins(s.n, s.k), (30, 5, 5, 1)[s.block]),
    ),
    "visionzip": (sv.VisionZip(keep=0.6), lambda r, s, g: oracle.visionzip(g, r.spaced(s.k))),
    "visionzip-dominant": (sv.VisionZip(keep=0.6, contextual=0), lambda r, s, g: oracle.visionzip(g, 0)),
    "prumerge": (sv.PruMerge(keep=0.6, neighbours=7), lambda r, s, g: oracle.prumerge(g, min(7, s.n - 1))),
    "saint": (sv.SAINT(keep=0.8, threshold=0.4), lambda r, s, g: oracle.saint(g, 0.4, 10)),
    "shift": (sv.TopK(keep=0.6, score="shift"), scored),
}


@dataclass(frozen=True)
class Seen:
    """What one stage was given, and what it made of it."""

    stage: Stage
    query: Tensor
    key: Tensor
    reduction: Reduction


def watched(monkeypatch: pytest.MonkeyPatch, reducer: Reducer) -> list[Seen]:
    """Every stage of this kind of reducer from now on."""
    seen: list[Seen] = []
    own = type(reducer).reduce

    def reduce(self: Reducer, s: Stage) -> Reduction:
        reduction, a = own(self, s), s.attend()
        seen.append(Seen(s, a.query(None), a.key(), reduction))
        return reduction

    monkeypatch.setattr(type(reducer), "reduce", reduce)
    return seen


def given(seen: Seen, image: int, reducer: Reducer) -> Given:
    def plain(x: Tensor) -> np.ndarray:
        return x[image].detach().double().numpy()

    s = seen.stage
    ahead = None if s.ahead is None else plain(s.ahead)
    return Given(
        plain(s.tokens),
        s.prefix,
        s.k,
        plain(seen.query),
        plain(seen.key),
        plain(s.masses()),
        s.block,
        s.depth,
        ahead,
        reducer.biases,
    )


def assert_as_taken(seen: Seen, image: int, taken: Taken) -> None:
    """Who stays, who goes where, tokens, sizes and scores."""
    s, r = seen.stage, seen.reduction
    kept = (r.kept[image] + s.prefix).tolist()
    assert sorted(kept) == taken.kept
    gone = (r.pruned[image] + s.prefix).tolist()
    assert sorted(gone) == sorted(taken.into)
    hosts = [] if r.hosts is None else r.hosts[image].tolist()
    for i, host in zip(gone, [*hosts, *[None] * (len(gone) - len(hosts))], strict=True):
        assert taken.into[i] == (None if host is None else kept[host]), f"token {i}"
    assert torch.equal(r.tokens[:, : s.prefix], s.tokens[:, : s.prefix])
    expected = [taken.tokens[i] for i in kept] + ([] if taken.extra is None else [taken.extra])
    torch.testing.assert_close(r.tokens[image, s.prefix :].double(), torch.tensor(np.array(expected)), rtol=1e-4, atol=1e-4)
    if r.mass is not None:
        assert (r.mass[image, : s.prefix] == 1).all()
        sizes = torch.tensor([taken.size[i] for i in kept]).double()
        torch.testing.assert_close(r.mass[image, s.prefix :].double(), sizes, rtol=1e-4, atol=1e-4)
    if taken.scores:
        scores = torch.tensor([taken.scores[i] for i in range(s.prefix, len(s.tokens[image]))]).double()
        torch.testing.assert_close(r.scores[image].double(), scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_stage_equals_oracle(name, kind, monkeypatch):
    reducer, expected = CASES[name]
    seen, model = watched(monkeypatch, reducer), zoo.build(kind)
    images = 2 if kind == KINDS[0] else 1
    with torch.no_grad():
        sv.reduce_(model, reducer)(zoo.images(images))
    blocks = [v.stage.block for v in seen]
    assert blocks == list(reducer.stages(zoo.DEPTH)) and {v.stage.depth for v in seen} == {zoo.DEPTH}
    for v in seen:
        for image in range(images):
            assert_as_taken(v, image, expected(reducer, v.stage, given(v, image, reducer)))


ROWS = ("pitome", "tofu", "mctf", "diffrate", "atc", "zero-tprune", "merge-error", "saint", "shift", "visionzip", "prumerge")


@pytest.mark.parametrize("name", ROWS)
def test_a_row_keeps_its_name_and_its_options(name):
    reducer = method(name).template()
    assert label_of(reducer) == method(name).label
    assert from_dict({"name": type(reducer).__name__, **reducer.__dict__}) == reducer


@pytest.mark.parametrize("name", ["pitome", "mctf", "diffrate"])
def test_a_budget_is_met(name):
    """By a strength of each method's own."""
    model = zoo.build("plain")
    dense = sv.macs(model)
    reducer = plan_macs(model, name, 0.6)
    assert sv.macs(sv.reduce_(model, reducer)) / dense == pytest.approx(0.6, abs=0.03)
    assert label_of(reducer) == method(name).label


def test_a_keep_ratio_for_every_block_is_what_costs_as_much_as_etps():
    """0.7 in each block would leave one token in four."""
    model = zoo.build("plain")
    found, wanted = like(model, "saint", 0.8), sv.ETPS(keep=0.8)
    costs = [sv.macs(sv.reduce_(model, reducer)) for reducer in (found, wanted)]
    assert costs[0] == pytest.approx(costs[1], rel=0.05)
    assert like(model, "saint", 0.7, (1, 3)) == sv.SAINT(keep=0.7, at=(1, 3))


@pytest.mark.parametrize(("model", "gmacs"), [(model, gmacs) for model, rates in SEARCHED.items() for gmacs in rates])
def test_searched_rates_give_the_searched_counts(model, gmacs):
    """Block by block the least of what pruning leaves, merging leaves, and came in; without the class token."""
    reducer, n = sv.DiffRate.searched(model, gmacs), 196
    for block, (pruned, merged) in enumerate(zip(*SEARCHED[model][gmacs], strict=True)):
        k = reducer.count(block, n, 196)
        assert k == min(n, pruned - 1, merged - 1)
        assert n - k - reducer.merged(block, n, k) == n - min(n, max(pruned - 1, k)), "dropped without a host"
        n = k


def test_searched_rates_cost_what_they_were_searched_for():
    import timm

    model = sv.reduce_(timm.create_model("deit_small_patch16_224"), sv.DiffRate.searched("deit_small", 2.9))
    assert sv.macs(model) / 1e9 == pytest.approx(2.9, abs=0.06)
    with pytest.raises(ConfigError, match=r"no rates were searched for 'deit_small' at 2 GMACs; there are 'deit_tiny' at 0\.6, "):
        sv.DiffRate.searched("deit_small", 2)


def test_strength_runs_through_the_searched_rates():
    template = sv.DiffRate()
    for i, (_, counts) in enumerate(sorted(SEARCHED["deit_small"].items(), reverse=True)):
        found, n = template.at_strength((i + 1) / 6, 196, 12), 196
        for block in range(12):
            n = found.count(block, n, 196)
            assert n == min(min(c) for c in zip(*(side[: block + 1] for side in counts), strict=True)) - 1
    assert template.at_strength(0.0, 196, 12).keep == (1.0,) * 12
    assert template.at_strength(1.0, 196, 12).count(0, 196, 196) == 1
    assert template.at_strength(0.4, 64, 4).stages(4) == (0, 1, 2, 3)


def test_patches_without_a_host_count_nowhere():
    """DiffRate merges some and drops some: groups, the grid and the pooling tell them apart."""
    model, x = sv.reduce_(zoo.build("average-pool"), sv.DiffRate(keep=0.5, merge=0.5, at=(1,))), zoo.images(2)
    with sv.trace(model) as t:
        tokens = zoo.run(model.forward_features, x)[:, t.prefix :]
    assert (t.groups < 0).sum(dim=1).tolist() == [16, 16] and t.sizes.sum(dim=1).tolist() == [48, 48]
    grid = t.scatter_back(tokens)
    assert (grid.abs().sum(dim=-1) == 0).sum(dim=1).tolist() == [16, 16]
    assert "25.0 %" in repr(t)


def test_shift_runs_without_attention_evidence():
    """Where attention cannot be scored, as with an adapter around torch's own, and where nothing of it is computed twice."""
    for reducer in (sv.TopK(score="shift"), sv.ETPS(score="shift", mass=True), sv.EViT(score="shift"), sv.Squeeze(score="shift")):
        assert reducer.place == "after" and not reducer.scored
    assert sv.Squeeze(score="shift", match="keys").scored and sv.ETPS().place == "between" and sv.ETPS().scored
    model = zoo.build("plain")
    with pytest.raises(ConfigError, match="stage 0 is not behind its block, where alone the shift is known"):
        zoo.run(sv.reduce_(model, sv.Squeeze(score=lambda s: s.shift())), zoo.images(1))


def test_a_stage_behind_the_last_block_leaves_what_is_pooled():
    model, x = zoo.build("average-pool"), zoo.images(2)
    dense = zoo.run(model.forward_features, x)
    with sv.trace(sv.reduce_(model, sv.TopK(keep=0.25, score="shift", at=(3,)))) as t:
        left = zoo.run(model.forward_features, x)
    rows = t.stages[0].kept[..., None].expand(-1, -1, zoo.DIM) + 1
    torch.testing.assert_close(left[:, 1:], dense.gather(1, rows), rtol=1e-5, atol=1e-5)


BAD: tuple[tuple[Callable[[], Any], str], ...] = (
    (lambda: sv.PiToMe(margin=2), "PiToMe: margin=2 is no cosine"),
    (lambda: sv.PiToMe(protect="never"), "PiToMe: protect='never' is not known"),
    (lambda: sv.ToFu(r=-1), "ToFu: r=-1 is not a number of tokens"),
    (lambda: sv.MCTF(temperatures=(1, 0, 3)), "temperatures=.1, 0, 3. are not three numbers above 0"),
    (lambda: sv.DiffRate(merge=1.5), "DiffRate: merge=1.5 is not a share"),
    (lambda: sv.DiffRate(keep=0.5, merge=(0.5, 0.5), at=(1,)), "merge=.0.5, 0.5. has 2 shares but at=.1,. has 1 stages"),
    (lambda: sv.ATC(linkage="ward"), "ATC: linkage='ward' is not known"),
    (lambda: sv.ZeroTPrune(similar=True), "ZeroTPrune: similar=True is not a share"),
    (lambda: sv.SAINT(threshold=7), "SAINT: threshold=7 is out of range"),
    (lambda: sv.VisionZip(contextual=-0.1), "VisionZip: contextual=-0.1 is not a share"),
    (lambda: sv.PruMerge(neighbours=0), "PruMerge: neighbours=0 is no number of tokens"),
    (lambda: sv.MCTF(r=(3, 3)).stages(4), "MCTF: r=.3, 3. has 2 entries, but the model has 4 blocks"),
)


@pytest.mark.parametrize(("make", "says"), BAD, ids=range(len(BAD)))
def test_options_that_cannot_be_meant(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


@pytest.mark.parametrize("name", [name for name in CASES if "-" not in name])
def test_down_to_one_token(name):
    """Every stage takes as many as it can, until nothing is left to take."""
    reducer = CASES[name][0]
    reducer = replace(reducer, keep=1e-3, at="every", **({"merge": 0.5} if name == "diffrate" else {})) if hasattr(
        reducer, "keep"
    ) else replace(reducer, r=60)  # fmt: skip
    model = sv.reduce_(zoo.build("average-pool", depth=12), reducer)
    with sv.trace(model) as t:
        assert zoo.run(model, zoo.images(2)).isfinite().all()
    assert t.stages[-1].n_out == 1
