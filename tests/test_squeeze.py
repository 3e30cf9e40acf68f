"""The parts of TPS as choices: the known combinations, the redundancy rank by an oracle, presets."""

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models._features import FeatureGetterNet

import squeezevit as sv
import zoo
from squeezevit.budget.calibrate import calibrate
from squeezevit.budget.plan import like
from squeezevit.core import kernels
from squeezevit.core.macs import token_counts
from squeezevit.core.reducer import Carry, Stage
from squeezevit.core.trace import StageTrace
from squeezevit.errors import ConfigError
from squeezevit.reducers.catalog import label_of, method


@pytest.mark.parametrize("kind", ["plain", "average-pool", "registers"])
@pytest.mark.parametrize(
    ("squeeze", "known"),
    [(sv.Squeeze(0.6), sv.ETPS(0.6)), (sv.Squeeze(0.6, fuse="mass"), sv.ETPS(0.6, mass=True))],
    ids=["etps", "etps-mass"],
)
def test_known_combinations(kind, squeeze, known):
    model, x = zoo.build(kind), zoo.images()
    assert torch.equal(zoo.run(sv.reduce_(model, squeeze), x), zoo.run(sv.reduce_(model, known), x))


def test_random_ranks_the_same_places_in_every_image():
    model = sv.reduce_(zoo.build("plain"), sv.Squeeze(0.5, score="random"))
    with sv.trace(model) as t:
        zoo.run(model, zoo.images(3))
    assert all((s.kept == s.kept[:1]).all() for s in t.stages)


def test_scores_may_be_a_function():
    """Here of the position, so that the last tokens stay."""
    model = sv.reduce_(
        zoo.build("plain"), sv.Squeeze(0.5, at=(1,), score=lambda s: torch.arange(s.n).float().expand(len(s.tokens), -1))
    )
    with sv.trace(model) as t:
        zoo.run(model, zoo.images(2))
    assert t.stages[0].kept.tolist() == [list(range(zoo.PATCHES // 2, zoo.PATCHES))] * 2


def test_matching_on_keys_finds_other_hosts_and_fuses_tokens():
    model, x = zoo.build("plain"), zoo.images(2)
    found = {}
    for match in ("tokens", "keys"):
        with sv.trace(sv.reduce_(model, sv.Squeeze(0.5, at=(1,), match=match))) as t:
            zoo.run(model, x)
        found[match] = t.stages[0]
    assert torch.equal(found["tokens"].kept, found["keys"].kept)
    assert not torch.equal(found["tokens"].hosts, found["keys"].hosts)
    qkv = []
    handle = sv.restore_(model).blocks[1].attn.qkv.register_forward_hook(lambda module, given, out: qkv.append(out))
    zoo.run(model, x)
    handle.remove()
    keys = qkv[0].unflatten(-1, (3, zoo.HEADS, -1))[:, 1:, 1].mean(dim=2).double().numpy()  # (B, N, d)
    s = found["keys"]
    for b in range(2):
        unit = keys[b] / np.linalg.norm(keys[b], axis=1, keepdims=True)
        expected = (unit[s.pruned[b]] @ unit[s.kept[b]].T).argmax(axis=1)
        assert s.hosts[b].tolist() == expected.tolist()


def test_matching_on_normed_tokens():
    """As they came into the block, behind the norm in front of its attention."""
    model, x = zoo.build("plain"), zoo.images(2)
    with sv.trace(sv.reduce_(model, sv.Squeeze(0.5, at=(1,), match="normed"))) as t:
        zoo.run(model, x)
    came: list[torch.Tensor] = []
    handle = sv.restore_(model).blocks[1].norm1.register_forward_hook(lambda module, given, out: came.append(out))
    zoo.run(model, x)
    handle.remove()
    s, normed = t.stages[0], torch.nn.functional.normalize(came[0][:, 1:].double(), dim=-1)
    for b in range(2):
        assert s.hosts[b].tolist() == (normed[b, s.pruned[b]] @ normed[b, s.kept[b]].T).argmax(dim=1).tolist()


def test_mrmr_is_redundancy_by_the_fifth_root_of_attention():
    model, x, found = zoo.build("registers"), zoo.images(2), {}
    for score in ("redundancy", "cls", "mrmr"):
        with sv.trace(sv.reduce_(model, sv.Squeeze(0.5, at=(1,), score=score))) as t:
            zoo.run(model, x)
        found[score] = t.stages[0].scores.double()
    torch.testing.assert_close(found["mrmr"], found["redundancy"] * found["cls"] ** 0.2, rtol=1e-5, atol=1e-7)


def uniqueness_oracle(x, importance):
    """One token at a time, in float64."""
    out = np.full(importance.shape, 2.0)
    for b, i, j in np.ndindex(*importance.shape, importance.shape[1]):
        if importance[b, j] > importance[b, i] or (importance[b, j] == importance[b, i] and j < i):
            cosine = x[b, i] @ x[b, j] / np.linalg.norm(x[b, i]) / np.linalg.norm(x[b, j])
            out[b, i] = min(out[b, i], 1 - cosine)
    return out


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 5), st.integers(0, 10**6))
def test_uniqueness_equals_the_oracle(batch, n, channels, seed):
    """With ties in importance, which are broken by position."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, n, channels, generator=generator)
    importance = torch.randint(0, 3, (batch, n), generator=generator).float()
    expected = uniqueness_oracle(x.double().numpy(), importance.numpy())
    np.testing.assert_allclose(sv.ops.uniqueness(x, importance).numpy(), expected, atol=1e-5)


def test_a_pruned_token_has_a_more_important_twin_that_stays():
    """Two clusters of equal tokens: one of each cluster stays, and every other goes to its own."""
    x = torch.eye(4)[[0, 0, 1, 1, 0, 1]][None]
    importance = torch.tensor([[0.1, 0.5, 0.2, 0.1, 0.3, 0.9]])
    kept, pruned = sv.ops.split(sv.ops.uniqueness(x, importance), 2)
    assert kept.tolist() == [[1, 5]] and pruned.tolist() == [[0, 2, 3, 4]]


def test_without_a_bias_masses_still_weigh_in_the_fuse():
    model, x = zoo.build("plain"), zoo.images(2)
    outputs = [
        zoo.run(sv.reduce_(model, sv.Squeeze(0.5, at=(1, 2), **options)), x)
        for options in ({}, {"fuse": "mass"}, {"fuse": "mass", "bias": False})
    ]
    assert min((a - b).abs().max() for a, b in ((outputs[0], outputs[2]), (outputs[1], outputs[2]))) > 1e-3


@pytest.mark.parametrize("kind", ["plain", "registers"])
def test_fused_tokens_have_the_mean_length_of_those_in_them(kind):
    """Of what came in, by mass, token after token in float64; and nothing else differs from fusing by mass."""
    model, x, found, came = zoo.build(kind), zoo.images(2), {}, {}

    def ahead_of_the_mlp(reducer: sv.Squeeze) -> tuple[StageTrace, torch.Tensor]:
        taken: list[torch.Tensor] = []
        handle = sv.reduce_(model, reducer).blocks[1].norm2.register_forward_hook(lambda m, given, out: taken.append(given[0]))
        with sv.trace(model) as t:
            zoo.run(model, x)
        handle.remove()
        return t.stages[0], taken[0].double()

    for fuse in ("mass", "length"):
        found[fuse], came[fuse] = ahead_of_the_mlp(sv.Squeeze(0.4, at=(1, 2), fuse=fuse))
    first = found["length"]
    assert torch.equal(first.hosts, found["mass"].hosts) and torch.equal(first.kept, found["mass"].kept)
    prefix = came["mass"].shape[1] - first.kept.shape[1]
    whole, stretched = ahead_of_the_mlp(sv.Squeeze(1.0, at=(1,), fuse="length"))[1], 0
    for b, j in np.ndindex(*first.kept.shape):
        members = [int(first.kept[b, j]), *first.pruned[b][first.hosts[b] == j].tolist()]
        tokens = whole[b, [prefix + i for i in members]]
        mean = tokens.mean(dim=0)
        expected = mean * tokens.norm(dim=1).mean() / mean.norm()
        torch.testing.assert_close(came["length"][b, prefix + j], expected, rtol=1e-5, atol=1e-6)
        if len(members) == 1:
            assert torch.equal(came["length"][b, prefix + j], tokens[0])
        else:
            stretched += bool((came["length"][b, prefix + j] - came["mass"][b, prefix + j]).abs().max() > 1e-4)
    assert stretched > 2
    assert torch.equal(came["length"][:, :prefix], whole[:, :prefix])


def test_the_second_stage_weighs_lengths_by_mass():
    """Two tokens of lengths 1 and 3 that stand for 3 patches and 1: their mean is 1.5 long."""
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 3.0], [-1.0, 0.0]]])
    mass = torch.tensor([[3.0, 1.0, 1.0]])
    s = Stage(tokens, 0, 2, 1, True, Carry(7, mass=mass), attend=lambda: None)
    kept, pruned, hosts = torch.tensor([[0, 2]]), torch.tensor([[1]]), torch.tensor([[0]])
    merged, total = s.merge_by_mass(s.keep(kept), s.take(pruned), kept, pruned, hosts)
    out = s.at_mean_length(merged, kept, pruned, hosts, total)
    torch.testing.assert_close(out[0].norm(dim=1), torch.tensor([1.5, 1.0]))
    torch.testing.assert_close(out[0, 0], 1.5 * merged[0, 0] / merged[0, 0].norm())


@pytest.mark.parametrize("kind", ["plain", "registers", "distilled"])
def test_the_last_blocks_patch_tokens_change_nothing_that_a_class_token_reads(kind):
    model, x = zoo.build(kind), zoo.images(2)
    whole = zoo.run(model, x)
    last = len(model.blocks) - 1
    for options in ({}, {"fuse": "mass"}, {"fuse": "length"}):
        torch.testing.assert_close(zoo.run(sv.reduce_(model, sv.Squeeze(0.1, at=(last,), **options)), x), whole, rtol=0, atol=1e-6)


def test_the_preset_for_class_tokens_leaves_a_tenth_behind_the_last_attention():
    model = timm.create_model("vit_small_patch16_224").eval()
    own, other = (sv.preset(name, macs=0.5, model=model) for name in ("class-token", "training-free"))
    assert own.stages(12) == (0, 3, 6, 9, 11) and sv.ETPS(at="quarters+last").stages(4) == (0, 1, 2, 3)
    *_, before, after = token_counts(sv.reduce_(model, own))
    assert after == pytest.approx(0.1 * before, abs=1) and before > token_counts(sv.reduce_(model, other))[-1] - 1
    assert sv.macs(sv.reduce_(model, own)) / sv.macs(sv.restore_(model)) == pytest.approx(0.5, abs=0.005)


def averaged(**options):
    """A model that takes the mean of its patch tokens."""
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4, global_pool="avg", **options).eval()


def with_a_large_offset():
    model = averaged(num_classes=1)
    model.head.bias.data.fill_(100.0)
    return model


def llava():
    tower = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 64}
    words = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 64}
    text = transformers.LlamaConfig(**words)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**tower, patch_size=16), text_config=text, vision_feature_layer=-1,
        image_token_index=5, image_seq_length=16,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config).eval()


def clip():
    tower = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    sizes = {"vision_config": {**tower, "image_size": 64, "patch_size": 16}, "text_config": {**tower, "vocab_size": 64}}
    return transformers.CLIPModel(transformers.CLIPConfig(**sizes, projection_dim=16)).eval()


def without_numbers():
    with torch.device("meta"):
        return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4)


READ_ELSEWHERE = {
    "average-pool": lambda: zoo.build("average-pool"),
    "attention-pool": lambda: zoo.build("attention-pool"),
    "a head of zeros": lambda: averaged(weight_init="jax"),
    "a large offset": with_a_large_offset,
    "a feature pyramid": lambda: FeatureGetterNet(averaged(), out_indices=[1, 3], output_fmt="NLC"),
    "a language model": llava,
    "the meta device": without_numbers,
}


@pytest.mark.parametrize("kind", READ_ELSEWHERE)
def test_a_preset_for_class_tokens_is_refused_where_patches_are_read(kind):
    """By every way in: the preset, a plan, a reducer that was planned for another model, and a search."""
    model = READ_ELSEWHERE[kind]()
    message = r"leaves few patch tokens behind the last attention.* take at='quarters', as the method 'training-free' has it"
    elsewhere = sv.ETPS(keep=0.5, at="quarters+last")
    for way in (
        lambda: sv.preset("class-token", macs=0.6, model=model),
        lambda: sv.plan(model, elsewhere, macs=0.6),
        lambda: sv.reduce_(model, elsewhere),
    ):
        with pytest.raises(ConfigError, match=message):
            way()
    assert "squeezevit_state" not in vars(model)
    if kind != "the meta device":
        sv.reduce_(model, replace(elsewhere, at="quarters"))  # what the message says


def test_where_a_model_is_read_is_tried_on_the_model_as_written():
    """A compiled model that has run would run past the hook; one with NaN in it tells nothing."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4).eval()
    model.compile(backend="eager")
    with torch.no_grad():
        model(zoo.images(1, 64))
    sv.reduce_(model, sv.ETPS(keep=0.5, at="quarters+last"))
    sv.restore_(model).head.bias.data[0] = float("nan")
    with pytest.raises(ConfigError, match="puts out numbers that are not finite, so that nothing can be tried"):
        sv.reduce_(model, sv.ETPS(keep=0.5, at="quarters+last"))


def test_models_that_read_their_class_token_are_told_from_others():
    for model in (zoo.build("plain"), zoo.build("distilled"), zoo.build("registers"), zoo.build("hf-clip-tower"), clip()):
        sv.reduce_(model, sv.ETPS(keep=0.5, at="quarters+last"))
    with pytest.raises(ConfigError, match="is to put patch tokens out"):
        sv.reduce_(zoo.build("hf-vit"), sv.ETPS(keep=0.5, at="quarters+last"), grid=True)
    with pytest.raises(ConfigError, match="which a search would move"):
        calibrate(zoo.build("plain"), method("class-token").template(), 0.6, [zoo.images()])


@pytest.mark.parametrize(("depth", "share"), [(2, 0.95), (2, 0.9), (4, 0.95), (12, 0.99), (12, 0.95), (12, 0.9)])
def test_mild_budgets_are_met_for_class_tokens_too(depth, share):
    model = timm.create_model("vit_tiny_patch16_224", img_size=96, depth=depth).eval()
    reducer = sv.preset("class-token", macs=share, model=model)
    assert sv.macs(sv.reduce_(model, reducer)) / sv.macs(sv.restore_(model)) == pytest.approx(share, abs=0.006)
    assert label_of(reducer) == method("class-token").label


def test_a_keep_ratio_for_class_tokens_is_that_of_the_other_stages():
    model = timm.create_model("vit_tiny_patch16_224", img_size=64).eval()
    assert like(model, "class-token", 0.6).keep == (0.6, 0.6, 0.6, 0.6, 0.1)
    assert like(model, "class-token", (0.9, 0.8, 0.7, 0.6, 0.5)).keep == (0.9, 0.8, 0.7, 0.6, 0.5)


def test_tokens_that_cancel_are_not_stretched_without_bound():
    """Of a token and its opposite nothing but rounding is left, which is no direction."""
    v = torch.randn(16, generator=torch.Generator().manual_seed(0))
    tokens = torch.stack([v, -v * (1 + 1e-6)])[None].requires_grad_()
    s = Stage(tokens, 0, 2, 1, True, Carry(2), attend=lambda: None)
    kept, pruned, hosts = torch.tensor([[0]]), torch.tensor([[1]]), torch.tensor([[0]])
    merged, total = s.merge_by_mass(s.keep(kept), s.take(pruned), kept, pruned, hosts)
    out = s.at_mean_length(merged, kept, pruned, hosts, total)
    assert out[0, 0].norm() <= 4.001 * merged[0, 0].norm()
    out.sum().backward()
    assert tokens.grad.abs().max() < 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "best"}, "score='best' is not known; choose one of 'auto'"),
        ({"match": "values"}, "match='values'"),
        ({"fuse": "sum"}, "fuse='sum'.*'cosine', 'mass', 'length'"),
        ({"bias": 1}, "bias=1"),
        ({"at": "all"}, "at='all'"),
    ],
)
def test_choices_that_cannot_be_meant(options, message):
    with pytest.raises(ConfigError, match=message):
        sv.Squeeze(**options)


def test_every_block():
    assert sv.ETPS(at="quarters").stages(12) == (0, 3, 6, 9) and sv.ETPS(at="quarters").stages(2) == (0, 1)
    assert sv.ETPS(at="every").stages(12) == tuple(range(12))
    assert sv.TopK(at="every").stages(1) == (0,)
    with pytest.raises(ConfigError, match="2 ratios"):
        sv.ETPS(keep=(0.5, 0.5), at="every").stages(12)


@pytest.mark.parametrize("share", [0.65, 0.5, 0.35])
def test_presets_meet_their_share(share):
    model = timm.create_model("vit_small_patch16_224").eval()
    dense = sv.macs(model)
    reducer = sv.preset("training-free", macs=share, model=model)
    assert replace(reducer, keep=0.7) == method("training-free").template()
    assert sv.macs(sv.reduce_(model, reducer)) / dense == pytest.approx(share, abs=0.005)


def test_presets_that_are_none():
    with pytest.raises(ConfigError, match="'fast' is not known; choose from training-free"):
        sv.preset("fast")
    model = zoo.build("plain")
    for share, complaint in (
        (0.01, "cannot reach 1.0% of the multiply-adds"),
        (1.2, "is no budget"),
        (float("nan"), "is no budget"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            sv.preset("training-free", macs=share, model=model)
    with pytest.raises(
        ConfigError, match=r"is planned for a model: give it, as sv.preset\('training-free', macs=0.5, model=model\)"
    ):
        sv.preset("training-free")


def test_the_stage_asks_for_the_kernel(monkeypatch):
    """Where the Triton kernel may run it gets what the plain path would, masses from the first stage on."""
    monkeypatch.setattr(kernels, "usable", lambda *tensors: True)
    monkeypatch.setattr(kernels, "squeeze", lambda *args: args)
    x, kept, pruned = torch.rand(2, 8, 4), torch.tensor([[0, 2, 5, 6]] * 2), torch.tensor([[1, 3, 4]] * 2)
    stage = Stage(x, 1, 4, 0, True, Carry(7), attend=lambda: None)
    assert stage.squeeze(kept, pruned) == (x, 1, kept, pruned, None, None)
    mass = stage.squeeze(kept, pruned, by_mass=True)[4]
    assert mass.dtype == torch.float32 and torch.equal(mass, torch.ones(2, 8))
