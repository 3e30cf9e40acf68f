"""Schedules searched on images: never worse than where the search began, at the MACs asked for, and reported on other images."""

from itertools import count

import pytest
import torch
from PIL import Image

import squeezevit as sv
import zoo
from squeezevit import cli
from squeezevit.budget import calibrate as job
from squeezevit.budget.calibrate import calibrate
from squeezevit.budget.meter import Meter
from squeezevit.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def model():
    return zoo.build("layer-scale", depth=6)


def test_the_search_keeps_what_helps_and_meets_the_share(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    images, others = [zoo.images(6), zoo.images(6, seed=1)], [zoo.images(8, seed=2)]
    seen = []
    found = calibrate(
        model, sv.ETPS(mass=True), 0.6, images, others, most=12, progress=lambda done, most: seen.append((done, most))
    )
    assert found.searched[0] > found.searched[1], "on these weights there is something to find"
    assert abs(found.macs_share - 0.6) < 0.02  # 64 patches: a token is more than a point
    assert found.reducer.mass and found.default.at == (1, 3, 4)
    assert seen[-1] == (found.tried, 12) and found.tried <= 12
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not hasattr(model, "squeezevit_state") and not model.training
    again = calibrate(model, sv.ETPS(mass=True), 0.6, images, others, most=12)
    assert again == found, "the search is deterministic"


def test_fidelity_is_the_cosine_with_the_unreduced_features(model):
    x, y = zoo.images(5), zoo.images(7, seed=3)
    found = calibrate(model, sv.TopK(at=(2, 4)), 0.6, [x], [y], most=8)
    for images, figures in ((x, found.searched), (y, found.held_out)):
        for reducer, figure in zip((found.reducer, found.default), figures, strict=True):
            dense = zoo.run(sv.restore_(model), images)
            cosine = torch.cosine_similarity(zoo.run(sv.reduce_(model, reducer), images), dense)
            assert cosine.mean().item() == pytest.approx(figure, abs=1e-6)
    sv.restore_(model)


def test_the_search_begins_at_the_templates_own_ratios(model):
    """In their proportions, whatever the share."""
    search = job._Search(Meter(model), sv.Squeeze(keep=(0.9, 0.7, 0.5), at=(0, 2, 4)), 0.6, [zoo.images(2)])
    at, weights = search.start
    assert at == (0, 2, 4) and weights == pytest.approx([0.274, 0.926, 1.8], abs=2e-3)
    keep = search.reducer(search.start).keep
    assert 1 > keep[0] > keep[1] > keep[2]


def test_changes_are_valid_schedules_and_one_step_away(model):
    search = job._Search(Meter(model), sv.ETPS(at=(1, 3, 4)), 0.6, [zoo.images(2)])
    changes = list(search.changes(search.start))
    assert len(changes) == len(set(changes))
    for at, weights in changes:
        assert len(at) == len(weights) and list(at) == sorted(set(at)) and at[0] > 0 and at[-1] < 6
    assert ((2, 3, 4), (1.0, 1.0, 1.0)) in changes
    assert ((1, 3, 4), (1.6, 1.0, 1.0)) in changes
    assert ((1, 2, 3, 4), (1.0, 1.0, 1.0, 1.0)) in changes
    assert ((1, 4), (1.0, 1.0)) in changes


def test_a_share_that_is_none(model):
    with pytest.raises(ConfigError, match="share=50: give a share of the multiply-adds above 0 and at most 1"):
        calibrate(model, sv.ETPS(), 50, [zoo.images(2)])


def test_a_share_that_not_even_the_template_reaches(model):
    with pytest.raises(ConfigError, match=r"cannot reach 5\.0% of the multiply-adds"):
        calibrate(model, sv.ETPS(at=(4,)), 0.05, [zoo.images(2)])


def test_the_command_searches_on_a_folder(tmp_path, capsys, monkeypatch):
    colours = count(7)
    for i in range(9):
        noise = torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(next(colours)))
        (tmp_path / "photos" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.fromarray((noise * 255).byte().numpy()).save(tmp_path / "photos" / str(i % 2) / f"{i}.png")
    (tmp_path / "photos" / "broken.png").write_bytes(b"not a picture")
    monkeypatch.setattr(job.calibrate, "__defaults__", (*job.calibrate.__defaults__[:2], 3, None))
    options = ["plan", "--model", "test_vit", "--images", "10"]
    with pytest.raises(SystemExit, match="0"):
        cli.main([*options, "--macs", "0.6", "--calibrate", str(tmp_path / "photos"), "--json", str(tmp_path / "found.json")])
    said = capsys.readouterr().out
    assert "images not searched on" in said and "of the multiply-adds, 3 candidates" in said and (tmp_path / "found.json").is_file()
    with pytest.raises(SystemExit, match="2"):
        cli.main([*options, "--latency", "0.6", "--calibrate", str(tmp_path / "photos")])
    assert "give --macs, no other budget and no --curve" in " ".join(capsys.readouterr().err.split())


def test_a_folder_without_images_is_named(tmp_path):
    from squeezevit.data.folder import sample_images

    with pytest.raises(DataError, match="holds 0 images"):
        sample_images(tmp_path, 8, lambda image: image)


def test_a_sample_reaches_the_last_photographs_of_a_folder(tmp_path):
    """Where a folder holds less than twice what is wanted, too: its first ones alone would be of its first classes."""
    from PIL import Image

    from squeezevit.data.folder import sample_images

    for shade in range(7):
        Image.new("L", (4, 4), 30 * shade).save(tmp_path / f"{shade}.png")
    shades = sample_images(tmp_path, 4, lambda image: round(image.getpixel((0, 0))[0] / 30))
    assert shades == [0, 1, 3, 5]
