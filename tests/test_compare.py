"""Methods on one's own model: ranks by an independent test, rows by the model's own outputs, the page by what it says."""

import copy
import json
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from scipy import stats

import squeezevit as sv
from squeezevit.cli import main
from squeezevit.compare import Asked, compare, largest, ranks, write_page
from squeezevit.compare.ranks import p_value
from squeezevit.errors import ConfigError, UnsupportedError

FAST = {"shares": (0.65,), "batch_sizes": (2,), "rounds": 1}


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return timm.create_model("test_vit", img_size=64, num_classes=3).eval()


def images(n: int) -> torch.Tensor:
    return torch.randn(n, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_labels_are_one_for_each_image(net):
    for labels in (np.zeros((4, 1), int), torch.zeros(3)):
        with pytest.raises(ConfigError, match=r"labels are \[.*\] for 4 images; give one for each, \[4\]"):
            compare(net, [images(4)], None, labels)


def test_p_values_are_those_of_a_paired_test():
    for n in (40, 400):
        difference = np.random.default_rng(0).normal(0.1, 1, n)
        assert p_value(difference) == pytest.approx(stats.ttest_1samp(difference, 0).pvalue, rel=1e-9)
    assert p_value(np.zeros(5)) == 1 and p_value(np.full(1, 0.1)) == 1


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 16, 32])
def test_few_images_tell_equal_methods_apart_no_more_often_than_they_say(n):
    """One difference among 20 equal methods may be told in 5 % of comparisons; by signs alone 5 images cannot tell any."""
    rng = np.random.default_rng(0)
    told = [max(ranks({str(i): rng.normal(size=n) for i in range(20)}).values()) > 1 for _ in range(60)]
    assert np.mean(told) <= 0.1
    assert p_value(np.full(n, 0.1)) >= 2.0 ** (1 - n)


def test_ranks_are_by_pairs_corrected_for_their_number():
    """The oracle: Holm's procedure written out on scipy's p-values."""
    rng = np.random.default_rng(1)
    values = {name: rng.normal(mean, 1, 500) for name, mean in (("a", 0.5), ("b", 0.45), ("c", 0.2), ("d", 0.0), ("e", 0.02))}
    names = list(values)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    tested = sorted((stats.ttest_rel(values[a], values[b]).pvalue, a, b) for a, b in pairs)
    told, better = True, {name: set() for name in names}
    for i, (p, a, b) in enumerate(tested):
        told = told and p <= 0.05 / (len(tested) - i)
        if told:
            worse, best = sorted((a, b), key=lambda name: values[name].mean())
            better[worse].add(best)
    assert ranks(values) == {name: 1 + len(better[name]) for name in names}
    assert len(set(ranks(values).values())) > 1 and ranks({"only": np.ones(3)}) == {"only": 1}


def test_rows_are_of_the_model_s_own_outputs(net):
    x, labels = images(12), np.arange(12) % 3
    own = sv.ETPS(keep=0.6, at=(1, 3))
    results = compare(net, x.split(5), Asked(("topk", "tome"), **FAST), labels, largest, 64, own)
    assert [row["method"] for row in results["rows"]] == ["own", "topk", "tome"] and not results["left_out"]
    with torch.inference_mode():
        dense = net(x)
        for row in results["rows"]:
            reducer = own if row["method"] == "own" else eval(f"sv.{row['reducer_full']}")
            found = sv.reduce_(net, reducer)(x)
            sv.restore_(net)
            near = torch.nn.functional.cosine_similarity(found, dense)
            right = (found.argmax(1).numpy() == labels).mean()
            assert row["cosine"] == pytest.approx(near.mean().item(), abs=1e-5)
            assert row["accuracy"] == pytest.approx(right) and row["same"] == pytest.approx(
                (found.argmax(1) == dense.argmax(1)).float().mean().item()
            )
            assert row["loss"] == pytest.approx(results["dense"]["accuracy"] - right)
            assert set(row["times"]) == {"2"} and row["times"]["2"]["ms"] > 0
    assert [("cosine_rank" in row, row["share"]) for row in results["rows"]] == [(False, None), (True, 0.65), (True, 0.65)]
    assert "squeezevit_state" not in vars(net)


def test_what_cannot_be_compared_is_refused_or_left_out(net):
    for wrong, message in {
        ("dtps",): "dtps scores by heads that are learned",
        ("identity",): "leaves nothing to compare",
    }.items():
        with pytest.raises(ConfigError, match=message):
            Asked(wrong)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        Asked(shares=(1.5,))
    with pytest.raises(ConfigError, match="numbers of 1 or more"):
        Asked(batch_sizes=(0,))
    with pytest.raises(ConfigError, match="no method can be compared at"):
        compare(net, [images(2)], Asked(("etps",), (0.05,), (1,), 1))
    results = compare(net, [images(2)], Asked(("etps", "training-free"), (0.4,), (1,), 1))
    assert [row["method"] for row in results["rows"]] == ["training-free"]
    assert [one["method"] for one in results["left_out"]] == ["etps"] and "cannot reach" in results["left_out"][0]["reason"]
    dense = timm.create_model("test_vit", img_size=64, num_classes=0, global_pool="").eval()
    with pytest.raises(UnsupportedError, match="not a row for each"):
        compare(dense, [images(2)], Asked(("topk",), **FAST))


@pytest.mark.parametrize("labelled", [True, False])
def test_the_command_writes_a_page(labelled, tmp_path, capsys):
    rng, folder = np.random.default_rng(0), tmp_path / "photos"
    for kind in ("ant", "bee") if labelled else (".",):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for i in range(3):
            Image.fromarray(rng.integers(0, 255, (70, 90, 3), dtype=np.uint8)).save(folder / kind / f"{i}.png")
    (folder / "ant" if labelled else folder).joinpath("broken.png").write_bytes(b"no image")
    options = ["--model", "test_vit", "--image-size", "64", "--num-classes", "2", "--methods", "training-free,topk,tome"]
    options += ["--macs", "0.65", "--batch-sizes", "1", "--rounds", "1", "--data", str(folder), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        main(["compare", *options])
    said = capsys.readouterr()
    assert not stop.value.code, said.err
    results, page = json.loads((tmp_path / "out/compare.json").read_text()), (tmp_path / "out/compare.html").read_text()
    assert results["images"] == (6 if labelled else 3) and len(results["unreadable"]) == 1
    assert ("accuracy" in results["dense"]) == labelled
    assert "broken.png" in said.err and "training-free" in said.out and ("accuracy" in said.out) == labelled
    rows = re.findall(r"<tr( data-of=\"0.65\")?><th scope=\"row\"", page)  # a tick at a share hides the unreduced row with none
    assert [bool(row) for row in rows] == [False, True, True, True] and "are few" in page and page.count("<svg role") == 1
    assert not re.search(r"(?:src|href)=\"(?!#|data:)", page)  # it loads nothing


def test_the_page_names_who_is_first_and_what_was_left_out(net, tmp_path):
    results = compare(net, images(6).split(3), Asked(("etps", "topk", "tome"), (0.65, 0.3), (1,), 1), image_size=64)
    write_page(results, tmp_path / "page.html", "a model <of mine>")
    page = (tmp_path / "page.html").read_text()
    assert "a model &lt;of mine&gt;" in page and "First in cosine, or not told from the first" in page
    assert all(one["reason"].split(";")[0][:40] in page for one in results["left_out"])


def test_a_reducer_of_one_s_own_keeps_its_heads():
    model = sv.reduce_(timm.create_model("test_vit", img_size=64, num_classes=3).eval(), sv.DTPS(keep=0.5))
    torch.manual_seed(1)
    for p in model.token_reducer.parameters():
        torch.nn.init.normal_(p)
    x, own = images(8), sv.DTPS(keep=0.5)
    unreduced = sv.restore_(copy.deepcopy(model))
    with torch.no_grad():
        near = torch.nn.functional.cosine_similarity(model(x), unreduced(x), dim=1)
    row = compare(model, [x], Asked(("topk",), **FAST), own=own)["rows"][0]
    assert row["method"] == "own" and row["cosine"] == pytest.approx(near.mean().item(), abs=1e-6)
