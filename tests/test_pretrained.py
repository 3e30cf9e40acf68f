"""Hugging Face folders keep the reducer and its score heads."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with learned heads in several files."""
    path = tmp_path_factory.mktemp("hf") / "model"
    sv.reduce_(classifier(), sv.DTPS(at=(1,))).save_pretrained(path, max_shard_size="50kB")
    return path


def load(path, **options):
    return sv.from_pretrained(transformers.ViTForImageClassification, path, **options)


def edited(folder, tmp_path, name, change):
    """A copy of the folder in which one file's JSON is another."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    text = (copy / name).read_text()
    changed = change(json.loads(text)) if callable(change) else change
    (copy / name).write_text(changed if isinstance(changed, str) else json.dumps(changed))
    return copy


@pytest.mark.parametrize("values", ["ETPS(keep=0.5)", 3, [1], {}, {"name": ["DTPS"]}, {"name": "DTPS", "keep": {}}], ids=repr)
def test_what_describes_no_reducer(folder, tmp_path, values):
    with pytest.raises(ConfigError):
        load(edited(folder, tmp_path, "config.json", lambda config: {**config, "squeezevit": values}))


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("whole", [False, True], ids=["sharded", "whole"])
@pytest.mark.parametrize(
    "text", ["{", "{}", "[]", "7", "[" * 100_000, '{"weight_map": []}', '{"weight_map": {"a": 1}}'], ids=lambda t: t[:20]
)
def test_an_index_that_is_none(folder, tmp_path, text, whole):
    copy = edited(folder, tmp_path, INDEX, text)
    if whole:
        sv.reduce_(classifier(), sv.DTPS(at=(1,))).save_pretrained(copy)
        (copy / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=INDEX):
        load(copy)


@pytest.mark.parametrize("file", ["/etc/passwd", "../elsewhere/model.safetensors", "..\\model.safetensors", "..", ""])
@pytest.mark.parametrize("key", ["token_reducer.0.in_conv.0.weight", "classifier.bias"])
def test_an_index_that_leaves_its_folder(folder, tmp_path, file, key):
    shutil.copytree(folder, tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="none of its own folder"):
        load(edited(folder, tmp_path, INDEX, lambda index: {**index, "weight_map": {**index["weight_map"], key: file}}))


def test_files_that_are_not_there_or_broken(folder, tmp_path):
    index = json.loads((folder / INDEX).read_text())
    file = index["weight_map"]["token_reducer.0.in_conv.0.weight"]
    copy = edited(folder, tmp_path, INDEX, lambda index: index)
    (copy / file).write_bytes(b"cut short")
    with pytest.raises(CheckpointError):
        load(copy)


def test_a_stale_index_beside_the_one_file(folder, tmp_path, images):
    copy = shutil.copytree(folder, tmp_path / "copy")
    model = sv.reduce_(classifier(), sv.DTPS(at=(1,)))
    model.save_pretrained(copy)
    shutil.copy(folder / INDEX, copy / INDEX)
    assert torch.equal(load(copy)(images).logits, model(images).logits)


@pytest.mark.parametrize("shape", [(7,), None], ids=["other-shape", "integers"])
def test_score_heads_that_do_not_fit(tmp_path, shape):
    sv.reduce_(classifier(), sv.DTPS(at=(1,))).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    key = "token_reducer.0.in_conv.0.weight"
    state[key] = state[key].long() if shape is None else torch.zeros(shape)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks the score heads.*0\.in_conv\.0\.weight"):
        load(tmp_path)


def test_the_loading_info_comes_with_the_model(folder, images):
    model, info = load(folder, output_loading_info=True)
    assert torch.equal(model(images).logits, load(folder)(images).logits)
    assert not info["unexpected_keys"] and not info["missing_keys"]
