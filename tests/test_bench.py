"""The limit slices as the reducer counts, timings compare like with like, and plans meet their budget."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import squeezevit as sv
from squeezevit.bench import machine
from squeezevit.bench.limit import Slice, SliceBefore
from squeezevit.bench.machine import header, write_json
from squeezevit.bench.run import _limit, measure
from squeezevit.bench.timing import Timings, alternate
from squeezevit.budget.plan import plan_macs
from squeezevit.budget.solve import TOLERANCE
from squeezevit.core.macs import fake_trace, token_counts
from squeezevit.core.running import share_weights
from squeezevit.data.probe import cosine, extract, fit_probe
from squeezevit.errors import ConfigError
from squeezevit.export import quantised


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=96, depth=4, embed_dim=48, num_heads=3, num_classes=10).eval()


@pytest.mark.parametrize(
    "reducer", [sv.ETPS(0.5), sv.ETPS(0.5, mass=True), sv.DTPS(0.5), sv.EViT(0.5), sv.TopK(0.5), sv.ToMe(3)], ids=repr
)
def test_the_limit_has_the_same_counts_at_the_same_places(model, reducer):
    bound = _limit(sv.reduce_(model, reducer), reducer, None)
    counts = token_counts(model)
    blocks = [s.block for s in fake_trace(model).stages]
    sv.reduce_(model, bound)
    assert token_counts(model) == counts
    assert [s.block for s in fake_trace(model).stages] == blocks
    assert bound.place == reducer.place


def test_the_limit_keeps_the_first_tokens_untouched(model):
    images = torch.randn(2, 3, 96, 96)
    sv.reduce_(model, SliceBefore(at=(2,), counts=(5,)))
    with torch.no_grad(), sv.trace(model) as t:
        model(images)
    assert t.stages[0].kept[0].tolist() == [0, 1, 2, 3, 4]
    assert isinstance(SliceBefore(at=(2,), counts=(5,)), Slice)


def test_a_reducer_costs_no_fewer_macs_than_its_limit(model):
    for reducer in (sv.ETPS(0.5), sv.DTPS(0.5), sv.ToMe(3)):
        own = sv.macs(sv.reduce_(model, reducer))
        assert own > sv.macs(sv.reduce_(model, _limit(model, reducer, None)))


def test_alternate_runs_every_case_once_a_round_and_turns_the_order_round():
    calls = []
    times = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=1)
    assert calls == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert {name: len(seconds) for name, seconds in times.seconds.items()} == {"a": 3, "b": 3}


def test_ratios_are_taken_within_rounds():
    times = Timings({"a": [1.0, 20.0, 3.0], "b": [2.0, 10.0, 6.0]})
    assert times.ratio("a", "b") == 0.5
    assert times.best_ratio("a", "b") == 0.5
    assert times.best("b") == 2.0


def test_measure_reports_each_reducer_and_leaves_the_model_unreduced(model):
    images = torch.randn(2, 3, 96, 96)
    expected = model(images)
    identity, etps = measure(model, [sv.Identity(), sv.ETPS(0.5)], batch_size=2, rounds=2)
    assert identity.overhead is None and identity.macs_share == 1 and identity.tokens == ()
    assert etps.tokens == (36, 18, 9, 5) and etps.macs < identity.macs and etps.overhead > 0
    assert torch.equal(model(images), expected)


def test_variants_share_their_weights(model):
    copy = share_weights(model)
    assert copy is not model and copy.blocks[0] is not model.blocks[0]
    assert copy.blocks[0].attn.qkv.weight is model.blocks[0].attn.qkv.weight


@pytest.mark.parametrize(("method", "share"), [("etps+mass", 0.65), ("dynamicvit", 0.5)])
def test_plan_meets_its_share_of_macs(method, share):
    model = timm.create_model("deit_tiny_patch16_224").eval()
    dense = sv.macs(model)
    reducer = plan_macs(model, method, share)
    assert not hasattr(model, "squeezevit_state")
    assert abs(sv.macs(sv.reduce_(model, reducer)) / dense - share) <= TOLERANCE + 0.002


def test_plan_says_what_can_be_reached(model):
    with pytest.raises(ConfigError, match=r"topk cannot reach 10\.0%.*the least is"):
        plan_macs(model, "topk", 0.1)
    with pytest.raises(ConfigError, match=r"share 1\.5"):
        plan_macs(model, "topk", 1.5)
    with pytest.raises(ConfigError, match="'nonsense' is not known"):
        plan_macs(model, "nonsense", 0.5)


def test_fractional_r_is_spread_evenly():
    found = sv.ToMe().at_strength(0.5, patches=10, depth=12)  # 2.5 a block
    assert sum(found.r) == 30
    assert set(found.r) == {2, 3}
    assert sv.ToMe().at_strength(0.0, patches=10, depth=3).r == (0, 0, 0)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_variants_are_measured():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=24, num_heads=1, num_classes=0)
    (speed,) = measure(model, [sv.ETPS(keep=0.5, at=(0,))], 2, rounds=1, limits=False, compiled="default")
    assert speed.images_per_second > 0
    with pytest.raises(ConfigError, match=r"compiled='fast' is no mode of torch.compile; choose from default, reduce-overhead"):
        measure(model, [sv.ETPS(keep=0.5)], 2, rounds=1, compiled="fast")


def test_a_results_file_says_when_how_and_on_what_and_holds_numbers(tmp_path):
    write_json(tmp_path / "r.json", {**header(), "rows": [{"n": np.float32(0.5), "right": np.bool_(True), "reducer": sv.ToMe(3)}]})
    content = json.loads((tmp_path / "r.json").read_text())
    assert list(content) == ["created", "command", "machine", "versions", "rows"]
    assert content["machine"]["device"] == "cpu" and content["versions"]["torch"] == torch.__version__.split("+")[0]
    assert content["rows"] == [{"n": 0.5, "right": True, "reducer": "ToMe(r=3)"}]


def test_a_probe_is_fitted_on_some_features_and_judges_others():
    labels, noise = np.arange(40) % 2 == 0, np.random.RandomState(0).randn(40, 3).astype(np.float32)
    features = noise + 9 * labels[:, None]
    probe = fit_probe(features[:30], labels[:30], features[30:], labels[30:])
    assert probe.hits(probe.features).all() and probe.hits(-probe.features + 9).mean() < 0.2
    assert probe.strength == fit_probe(features[:30], labels[:30], features[30:], labels[30:]).strength
    expected = torch.nn.functional.cosine_similarity(torch.from_numpy(features), torch.from_numpy(noise)).numpy()
    assert np.allclose(cosine(features, noise), expected, atol=1e-6)
    said = []
    found = extract(torch.nn.Flatten(), [torch.ones(2, 3), torch.zeros(1, 3)], lambda *step: said.append(step), "ones")
    assert found.shape == (3, 3) and said == [("ones", 1, 2), ("ones", 2, 2)]


@pytest.mark.parametrize("device", ["cuda:1", "mps", "xpu"])
def test_every_accelerator_is_waited_for(device, monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    alternate({"a": lambda: waited.append("ran")}, rounds=1, warmup=0, device=device)
    assert waited == [torch.device(device), "ran", torch.device(device)]


@pytest.mark.parametrize(
    ("flags", "bits"), [("flags : fpu avx2 avx512f", 7), ("flags : fpu avx2 avx512_vnni", 8), ("Features : fp asimddp", 8), ("", 7)]
)
def test_what_the_processor_can_do_decides_the_bits_of_int8(flags, bits, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda self: f"processor : 0\n{flags}\nmodel name : X: 1\n")
    assert quantised.weight_bits() == bits
    found = machine.machine()
    assert found["cpu"] == "X: 1" and found.get("instructions", "") == " ".join(
        w for w in flags.split()[2:] if w not in ("fpu", "fp")
    )
