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
from squeezevit.core import ops
from squeezevit.core.reducer import Reducer, Reduction, Stage
from squeezevit.errors import ConfigError
from squeezevit.reducers.catalog import method, methods
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
    "mctf-one": (sv.MCTF(r=(1, 2, 30, 30), temperatures=(2, 5, 3)), lambda r, s, g: oracle.mctf(g, (2, 5, 3))),
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
    with torch.no_grad():
        sv.reduce_(model, reducer)(zoo.images(2))
    blocks = [v.stage.block for v in seen]
    assert blocks == list(reducer.stages(zoo.DEPTH)) and {v.stage.depth for v in seen} == {zoo.DEPTH}
    for v in seen:
        for image in range(2):
            assert_as_taken(v, image, expected(reducer, v.stage, given(v, image, reducer)))
