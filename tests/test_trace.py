"""What a trace says: groups after every stage against a walk of each patch, the grid restored, and when nothing is recorded."""

import pytest
import torch

import oracles
import squeezevit as sv
import zoo
from squeezevit.core.macs import fake_trace
from squeezevit.errors import ConfigError
from squeezevit.train.losses import keep_ratio_loss

STAGED = [name for name, reducer in zoo.REDUCERS.items() if reducer.stages(zoo.DEPTH)]
KEEPING_ALL = [name for name in STAGED if name not in ("topk", "dynamicvit", "random")]
DISCARDING = [name for name in STAGED if name not in KEEPING_ALL]


def traced(name: str, x: torch.Tensor, model: str = "registers", **options):
    """Trace and final patch tokens of one forward."""
    reduced = zoo.reduce(zoo.build(model, **options), zoo.REDUCERS[name])
    with sv.trace(reduced) as t:
        tokens = zoo.run(reduced.forward_features, x)
    return t, tokens[:, reduced.num_prefix_tokens :]


def as_lists(t) -> list:
    """The stages as `oracles.groups` walks them."""
    return [
        type(
            "Stage",
            (),
            {"kept": s.kept.tolist(), "pruned": s.pruned.tolist(), "hosts": None if s.hosts is None else s.hosts.tolist()},
        )
        for s in t.stages
    ]


@pytest.mark.parametrize("size", [64, (40, 96)], ids=["square", "not-square"])
@pytest.mark.parametrize("name", STAGED)
def test_groups_follow_every_patch_through_the_stages(name, size):
    x = zoo.images(2, size)
    t, tokens = traced(name, x, img_size=size)
    patches = x.shape[2] * x.shape[3] // zoo.PATCH**2
    stages = as_lists(t)
    for j in range(len(stages)):
        groups = t.groups_after(j)
        assert groups.shape == (2, patches)
        assert groups.dtype == torch.int64
        assert groups.tolist() == oracles.groups(stages[: j + 1], patches)
    assert torch.equal(t.groups, t.groups_after(len(stages) - 1))
    assert t.groups.max() == tokens.shape[1] - 1


@pytest.mark.parametrize("name", KEEPING_ALL)
def test_every_patch_has_a_token_and_every_token_a_patch(name):
    t, tokens = traced(name, zoo.images(2))
    for groups in t.groups.tolist():
        assert sorted(set(groups)) == list(range(tokens.shape[1]))


@pytest.mark.parametrize("name", DISCARDING)
def test_dropped_patches_have_none(name):
    t, tokens = traced(name, zoo.images(2))
    for groups in t.groups.tolist():
        assert sorted(set(groups)) == list(range(-1, tokens.shape[1]))
        assert groups.count(-1) == zoo.PATCHES - tokens.shape[1]


@pytest.mark.parametrize("size", [64, (40, 96)], ids=["square", "not-square"])
@pytest.mark.parametrize("name", STAGED)
def test_scatter_back_gives_every_patch_its_groups_token(name, size):
    x = zoo.images(2, size)
    t, tokens = traced(name, x, img_size=size)
    for fill in (0.0, -7.0):
        grid = t.scatter_back(tokens, fill=fill)
        assert grid.shape == (2, x.shape[2] * x.shape[3] // zoo.PATCH**2, zoo.DIM)
        for image, groups, found in zip(tokens, t.groups.tolist(), grid, strict=True):
            for patch, group in enumerate(groups):
                assert torch.equal(found[patch], torch.full((zoo.DIM,), fill) if group < 0 else image[group])


def test_scatter_back_takes_other_channels_and_gradients():
    t, tokens = traced("etps", zoo.images(2))
    logits = torch.randn(2, tokens.shape[1], 3, requires_grad=True)
    t.scatter_back(logits).sum().backward()
    sizes = torch.stack([g.bincount(minlength=tokens.shape[1]) for g in t.groups])
    assert torch.equal(logits.grad, sizes[..., None].expand_as(logits).float())


@pytest.mark.parametrize(
    ("name", "options"),
    [("tome", {"method": "tome", "r": 9}), ("etps-mass", {"method": "etps", "keep": 0.6, "at": (1, 2, 3), "mass": True})],
)
def test_masses_are_the_sizes_of_the_groups(name, options):
    t, tokens = traced(name, zoo.images(2), model="average-pool")
    expected = oracles.forward(zoo.build("average-pool"), zoo.images(2), **options)
    sizes = torch.stack([g.bincount(minlength=tokens.shape[1]) for g in t.groups])
    assert torch.equal(expected.mass[:, 1:].long(), sizes)


@pytest.mark.parametrize("name", STAGED)
def test_a_trace_prints_what_became_of_the_tokens(name):
    t, _ = traced(name, zoo.images(2))
    first, head, *rows = str(t).splitlines()
    assert first == f"trace of {zoo.REDUCERS[name]}, 2 images" and head.split()[0] == "block"
    assert len({len(line) for line in (head, *rows)}) == 1  # columns are aligned
    for j, (s, row) in enumerate(zip(t.stages, rows, strict=True)):
        images = t.groups_after(j).tolist()
        largest = max(image.count(group) for image in images for group in image if group >= 0)
        gone = sum(image.count(-1) for image in images) / sum(map(len, images))
        assert row.split() == [str(s.block), str(s.n), str(s.n_out), str(largest), f"{100 * gone:.1f}", "%"]


def test_a_trace_prints_before_anything_was_recorded():
    model = sv.reduce_(zoo.build("plain"), sv.TopK(keep=0.5))
    assert repr(sv.trace(model)) == (
        f"trace of {sv.TopK(keep=0.5)}: nothing was recorded; run the model inside `with sv.trace(model) as t:`"
    )
    assert "it has no stages" in repr(sv.trace(sv.reduce_(zoo.build("plain"), sv.Identity())))
    assert fake_trace(model).stages and repr(fake_trace(model)).splitlines()[-1].split()[-2:] == ["-", "-"]


@pytest.mark.parametrize("name", STAGED)
@pytest.mark.parametrize("model", ["plain", "attention-pool"])
def test_one_token_left(model, name):
    reducer = sv.ToMe(r=64) if name == "tome" else type(zoo.REDUCERS[name])(keep=0.01)
    reduced = zoo.reduce(zoo.build(model, img_size=(8, 24)), reducer)
    with sv.trace(reduced) as t:
        tokens = zoo.run(reduced.forward_features, zoo.images(2, (8, 24)))
    left = tokens.shape[1] - reduced.num_prefix_tokens
    assert left == (2 if name.startswith("evit") else 1)  # EViT's fused token stands beside the last reserved one
    assert tokens.isfinite().all()
    assert t.scatter_back(tokens[:, reduced.num_prefix_tokens :]).shape == (2, 3, zoo.DIM)


@pytest.mark.parametrize("name", STAGED)
def test_one_patch_to_begin_with(name):
    reduced = zoo.reduce(zoo.build("plain", img_size=8), zoo.REDUCERS[name])
    x = zoo.images(2, 8)
    with sv.trace(reduced) as t:
        output = zoo.run(reduced, x)
    assert torch.equal(output, zoo.run(zoo.build("plain", img_size=8), x))
    assert t.groups.tolist() == [[0], [0]]


@pytest.mark.parametrize("prefix", [("plain", 1), ("distilled", 2), ("registers", 5), ("attention-pool", 0)], ids=lambda p: p[0])
def test_prefix_is_told(prefix):
    name, count = prefix
    t = sv.trace(sv.reduce_(zoo.build(name), sv.ETPS()))
    assert t.prefix == count


def test_scores_are_of_the_patches_and_kept_are_the_highest():
    t, _ = traced("etps", zoo.images(2))
    for s in t.stages:
        assert s.scores.shape == (2, s.n)
        assert not s.scores.requires_grad
        assert (s.scores.gather(1, s.kept).amin(1) >= s.scores.gather(1, s.pruned).amax(1)).all()


def test_stages_tell_their_block_and_counts():
    t, tokens = traced("evit", zoo.images(2))
    assert [s.block for s in t.stages] == [1, 2, 3]
    assert [s.n for s in t.stages[1:]] == [s.n_out for s in t.stages[:-1]]
    assert t.stages[-1].n_out == tokens.shape[1]


def test_a_switched_off_reducer_traces_everything_as_kept():
    reduced = sv.reduce_(zoo.build("plain"), sv.ETPS(keep=1.0))
    with sv.trace(reduced) as t:
        tokens = zoo.run(reduced.forward_features, zoo.images(2))
    assert t.groups.tolist() == [list(range(zoo.PATCHES))] * 2
    assert torch.equal(t.scatter_back(tokens[:, 1:]), tokens[:, 1:])


def test_nothing_is_recorded_outside_the_block():
    reduced = sv.reduce_(zoo.build("plain"), sv.ETPS())
    t = sv.trace(reduced)
    zoo.run(reduced, zoo.images(1))
    assert t.stages == []
    with t:
        zoo.run(reduced, zoo.images(2))
    inside = t.groups
    zoo.run(reduced, zoo.images(3))
    assert torch.equal(t.groups, inside)


def test_the_last_forward_counts():
    reduced = sv.reduce_(zoo.build("plain"), sv.ETPS())
    with sv.trace(reduced) as t:
        zoo.run(reduced, zoo.images(1))
        zoo.run(reduced, zoo.images(4))
    assert t.groups.shape == (4, zoo.PATCHES)


def test_nested_traces_give_back_to_the_outer_one():
    reduced = sv.reduce_(zoo.build("plain"), sv.ETPS())
    with sv.trace(reduced) as outer:
        zoo.run(reduced, zoo.images(1))
        with sv.trace(reduced) as inner:
            zoo.run(reduced, zoo.images(2))
        assert len(outer.stages[0].kept) == 1
        assert len(inner.stages[0].kept) == 2
        zoo.run(reduced, zoo.images(3))
    assert len(outer.stages[0].kept) == 3
    assert len(inner.stages[0].kept) == 2


def test_a_forward_that_fails_leaves_nothing_of_an_earlier_one():
    """Stages of two forwards would make groups of neither."""
    model, x = zoo.reduce(zoo.build("plain"), sv.ETPS(keep=0.5, at=(0, 2))), zoo.images()
    with sv.trace(model) as t:
        zoo.run(model, x)
        handle = model.blocks[1].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            zoo.run(model, x)
        handle.remove()
    assert [s.block for s in t.stages] == [0] and t.tokens is None


def test_pooling_by_a_trace_of_nothing_is_refused():
    model = zoo.reduce(zoo.build("plain"), sv.ETPS(keep=0.5, at=(0,)))
    t, tokens = sv.trace(model), model.forward_features(zoo.images())[:, 1:]
    with pytest.raises(ConfigError, match=r"nothing was traced; run the model inside .* before pool"):
        sv.pool(tokens, t)
    sv.plan(model, sv.ETPS, macs=0.8)  # which reduces it anew
    with t:
        tokens = model.forward_features(zoo.images())[:, 1:]
    assert sv.pool(tokens, t).shape == (len(tokens), zoo.DIM)


def test_pooling_in_masked_training_is_refused():
    model = zoo.reduce(zoo.build("plain"), sv.DTPS(keep=0.5, at=(0,))).train()
    with sv.trace(model) as t:
        tokens = model.forward_features(zoo.images())[:, 1:]
    with pytest.raises(ConfigError, match="in masked training all tokens stay"):
        sv.pool(tokens, t)


def test_decisions_are_of_every_stage():
    """Also where the first keeps all: targets are told apart by their place."""
    reducer = sv.DTPS(keep=(1.0, 0.5, 0.5), at=(0, 1, 2))
    model = zoo.reduce(zoo.build("plain"), reducer).train()
    with sv.trace(model) as t:
        model(zoo.images())
    assert len(t.decisions) == 3 and bool((t.decisions[0] == 1).all())
    assert keep_ratio_loss(t.decisions, reducer.targets(3)).isfinite()


def test_an_error_inside_ends_the_trace():
    reduced = sv.reduce_(zoo.build("plain"), sv.ETPS())
    t = sv.trace(reduced)
    with pytest.raises(ZeroDivisionError), t:
        raise ZeroDivisionError
    zoo.run(reduced, zoo.images(1))
    assert t.stages == []


def test_a_traced_model_compiles_and_the_trace_is_right():
    reduced, x = sv.reduce_(zoo.build("plain", depth=2), sv.ETPS()), zoo.images(2)
    with sv.trace(reduced) as expected:
        zoo.run(reduced, x)
    torch._dynamo.reset()
    compiled = torch.compile(reduced, backend="eager")
    with sv.trace(reduced) as t:
        zoo.run(compiled, x)
    assert torch.equal(t.groups, expected.groups)


def test_tracing_changes_no_output():
    reduced, x = zoo.reduce(zoo.build("average-pool"), sv.ETPS(mass=True)), zoo.images(2)
    expected = zoo.run(reduced, x)
    with sv.trace(reduced):
        assert torch.equal(zoo.run(reduced, x), expected)


def test_an_unreduced_model_cannot_be_traced():
    for model in (zoo.build("plain"), sv.restore_(sv.reduce_(zoo.build("plain"), sv.ETPS())), torch.nn.Linear(2, 2)):
        with pytest.raises(ConfigError, match=rf"this {type(model).__name__} is not reduced; call sv.reduce_"):
            sv.trace(model)


@pytest.mark.parametrize("stage", [-1, 3, 7])
def test_a_stage_that_did_not_run(stage):
    t, _ = traced("etps", zoo.images(1))
    with pytest.raises(ConfigError, match=rf"no stage {stage} in this trace \(3 were traced, of ETPS"):
        t.groups_after(stage)


def test_groups_before_any_forward():
    with sv.trace(sv.reduce_(zoo.build("plain"), sv.ETPS())) as t:
        pass
    with pytest.raises(ConfigError, match="run the model inside"):
        _ = t.groups
    with pytest.raises(ConfigError, match="run the model inside"):
        t.scatter_back(torch.zeros(1, 9, 4))


def test_groups_of_a_reducer_without_stages_are_the_patches():
    model = sv.reduce_(zoo.build("plain"), sv.Identity())
    with sv.trace(model) as t:
        tokens = zoo.run(model.forward_features, zoo.images(2))
    assert torch.equal(t.scatter_back(tokens[:, t.prefix :]), tokens[:, t.prefix :])


@pytest.mark.parametrize("shape", [(2, 16, 48), (16, 48), (2, 20, 48)], ids=str)
def test_scatter_back_names_a_wrong_count(shape):
    t, tokens = traced("etps", zoo.images(2))
    assert tokens.shape[1] == 15
    with pytest.raises(ConfigError, match=r"takes the 15 patch tokens that left the last stage.*tokens\[:, 5:\]") as error:
        t.scatter_back(torch.zeros(shape))
    assert str(list(shape)) in str(error.value)
