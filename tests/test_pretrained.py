"""Hugging Face folders keep the reducer and its score heads."""

import json

import pytest
import torch

import squeezevit as sv
from squeezevit.errors import CheckpointError, ConfigError

transformers = pytest.importorskip("transformers")

SIZES = {
    "image_size": 64, "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 96,
}  # fmt: skip


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def classifier():
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, num_labels=5)).eval()


@torch.no_grad()
@pytest.mark.parametrize(
    "reducer", [sv.ETPS(keep=(0.5, 0.4), at=(1, 2), mass=True), sv.DTPS(keep=0.5, at=(1, 2)), sv.ToMe(r=(3, 0, 2, 1))], ids=repr
)
@pytest.mark.parametrize("shard", ["1GB", "50kB"])
def test_a_reduced_model_comes_back_from_its_folder(reducer, shard, images, tmp_path):
    model = sv.reduce_(classifier(), reducer)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert not hasattr(model.config, "squeezevit")
    loaded = sv.from_pretrained(transformers.AutoModelForImageClassification, tmp_path)
    assert isinstance(loaded, transformers.ViTForImageClassification)
    assert repr(loaded.squeezevit_state.reducer) == repr(reducer)
    assert torch.equal(loaded(images).logits, model(images).logits)
    assert torch.equal(sv.restore_(loaded)(images).logits, sv.restore_(model)(images).logits)


def test_a_restored_model_saves_as_it_always_did(tmp_path):
    sv.restore_(sv.reduce_(classifier(), sv.ETPS())).save_pretrained(tmp_path)
    assert "squeezevit" not in json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(ConfigError, match="holds no reducer"):
        sv.from_pretrained(transformers.ViTForImageClassification, tmp_path)


def test_score_heads_that_are_missing_are_an_error(tmp_path):
    sv.reduce_(classifier(), sv.DTPS(at=(1,))).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["squeezevit"]["at"] = [1, 2]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="lacks the score heads"):
        sv.from_pretrained(transformers.ViTForImageClassification, tmp_path)


def test_a_reducer_of_another_version_is_an_error(tmp_path):
    sv.reduce_(classifier(), sv.ETPS(at=(1,))).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["squeezevit"] = {"name": "Newer", "keep": 0.5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"no reducer of this version.*'Newer'"):
        sv.from_pretrained(transformers.ViTForImageClassification, tmp_path)
