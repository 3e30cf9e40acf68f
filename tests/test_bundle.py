"""A model and all that belongs to it in one folder: the same numbers again, and nothing that is not as it was written."""

import copy
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
import torchvision
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import squeezevit as sv
import zoo
from squeezevit.bundle import CARD, Card, read_card
from squeezevit.bundle.hosts import preprocessing
from squeezevit.data.classifier import without_classifier_
from squeezevit.data.folder import eval_transform
from squeezevit.data.libraries import create
from squeezevit.data.pixels import Preprocessing
from squeezevit.embed import open_engine
from squeezevit.errors import CheckpointError, ConfigError, SqueezeViTError, UnsupportedError

SIZES = {"patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
HUGGING = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
HOW = {"resize": 32, "crop": (32, 32), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def timm_model(**options) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5, **SIZES, **options).eval()


def hugging() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ViTConfig(**HUGGING, intermediate_size=96, num_labels=5, attn_implementation="eager")
    return transformers.ViTForImageClassification(config).eval()


def of_torchvision() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.VisionTransformer(32, 8, 4, 3, 48, 96, num_classes=5).eval()


@pytest.fixture
def open_clip_name(tmp_path: Path) -> str:
    vision = {"image_size": 32, "layers": 4, "width": 48, "head_width": 16, "patch_size": 8}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": {"width": 32, "heads": 2, "layers": 1}}
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/tiny-for-bundles.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "configs")
    return "tiny-for-bundles"


HOSTS = {
    "timm": (timm_model, {"options": SIZES}),
    "transformers": (hugging, {"preprocessing": HOW}),
    "torchvision": (of_torchvision, {"preprocessing": HOW}),
}
ELSEWHERE = """
import sys, torch, squeezevit as sv
folder, threads = sys.argv[1:]
torch.set_num_threads(int(threads))  # other sums where they differ
with torch.no_grad():
    torch.save(sv.load(folder + "/b")(torch.load(folder + "/x.pt")), folder + "/y.pt")
"""
REDUCERS = {**{name: zoo.REDUCERS[name] for name in ("etps", "dtps", "tome", "etps-mass", "evit")}, "none": None}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", REDUCERS)
def test_the_same_numbers_again_wherever_the_folder_lies(host, name, tmp_path):
    make, given = HOSTS[host]
    model, x = make(), zoo.images(2, size=32)
    if REDUCERS[name] is not None:
        zoo.reduce(model, REDUCERS[name])
    with torch.no_grad():
        expected = first(model(x))
        sv.save(model, tmp_path / "here", classes=list("abcde"), **given)
        shutil.move(tmp_path / "here", tmp_path / "there")
        again = sv.load(tmp_path / "there")
        assert torch.equal(first(again(x)), expected)
    assert type(again).__name__ == type(model).__name__ and not again.training
    card = read_card(tmp_path / "there")
    assert card.classes == tuple("abcde") and (tmp_path / "there/classes.txt").read_text() == "a\nb\nc\nd\ne\n"
    assert {f.name for f in (tmp_path / "there").iterdir()} == {CARD, "model.safetensors", "classes.txt", "SHA256SUMS"}


def first(out):
    return out if isinstance(out, torch.Tensor) else next(iter(out.values()))


def test_a_model_of_open_clip(open_clip_name, tmp_path):
    torch.manual_seed(0)
    model = sv.reduce_(open_clip.create_model(open_clip_name, pretrained=None).eval(), sv.ETPS(keep=0.5))
    with pytest.raises(ConfigError, match="open_clip does not say how this CLIP was built; give options="):
        sv.save(model, tmp_path / "b")
    sv.save(model, tmp_path / "b", options={"name": open_clip_name})
    x = zoo.images(2, size=32)
    with torch.no_grad():
        assert torch.equal(sv.load(tmp_path / "b").encode_image(x), model.encode_image(x))
    assert read_card(tmp_path / "b").preprocessing.mean[0] == pytest.approx(0.48145466)


def test_another_process_gives_the_same_numbers(tmp_path):
    model, x = sv.reduce_(timm_model(), sv.DTPS(keep=0.5)), zoo.images(1, size=32)
    sv.save(model, tmp_path / "b", options=SIZES)
    torch.save(x, tmp_path / "x.pt")
    threads = str(torch.get_num_threads())
    subprocess.run([sys.executable, "-c", ELSEWHERE, tmp_path, threads], check=True)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "y.pt"), model(x))


def test_half_precision_and_grids_stay(tmp_path):
    model = sv.reduce_(
        transformers.Dinov2Model(transformers.Dinov2Config(**HUGGING, mlp_ratio=2)).eval().bfloat16(), sv.ETPS(0.5), grid=True
    )
    sv.save(model, tmp_path / "b", preprocessing=HOW)
    again, x = sv.load(tmp_path / "b"), zoo.images(1, size=32).bfloat16()
    with torch.no_grad():
        assert torch.equal(again(x).last_hidden_state, model(x).last_hidden_state)
    assert next(again.parameters()).dtype == torch.bfloat16


def saved(tmp_path: Path) -> Path:
    sv.save(sv.reduce_(timm_model(), sv.ETPS(keep=0.5)), tmp_path / "b", options=SIZES, classes=list("abcde"))
    return tmp_path / "b"


SPOILT = {
    "a flipped bit": (lambda b: spoil(b / "model.safetensors"), "model.safetensors is not what was written"),
    "no weights": (lambda b: (b / "model.safetensors").unlink(), "does not hold what was written"),
    "other classes": (lambda b: (b / "classes.txt").write_text("b\na\n"), "classes.txt is not what was written"),
    "another card": (lambda b: card(b, grid=True), "squeezevit.json is not what was written"),
    "another version": (lambda b: card(b, format=99), r"is of format 99, this version reads 1"),
    "an unknown engine": (lambda b: rewritten(b, engine="warp"), "engine 'warp' is not known"),
    "an unknown field": (lambda b: rewritten(b, colour="red"), "describes no model of this version"),
    "a list of dtypes": (lambda b: rewritten(b, dtype=["float32"]), "describes no model of this version .*dtype is a list"),
    "no host": (lambda b: rewritten(b, host=None), "describes no model of this version .*host is a NoneType"),
    "a reducer in words": (lambda b: rewritten(b, reducer="ETPS"), "describes no model of this version .*reducer is a str"),
    "an engine in a list": (lambda b: rewritten(b, engine=["torch"]), "describes no model of this version .*engine is a list"),
    "no card": (lambda b: (b / CARD).unlink(), "is no bundle: there is no squeezevit.json"),
    "no JSON": (lambda b: (b / CARD).write_text("{"), "cannot be read"),
    "a list": (lambda b: (b / CARD).write_text("[]"), "is of format None"),
    "no sums": (lambda b: (b / "SHA256SUMS").unlink(), "lacks SHA256SUMS"),
}


def spoil(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def card(bundle: Path, **values) -> None:
    (bundle / CARD).write_text(json.dumps({**json.loads((bundle / CARD).read_text()), **values}))


def rewritten(bundle: Path, **values) -> None:
    """As one who makes the sums fit."""
    card(bundle, **values)
    sums_again(bundle)


@pytest.mark.parametrize("case", SPOILT)
def test_what_is_not_as_it_was_written_is_refused(case, tmp_path):
    bundle, (change, message) = saved(tmp_path), SPOILT[case]
    change(bundle)
    with pytest.raises(CheckpointError, match=message):
        sv.load(bundle)


def test_what_others_leave_in_the_folder_is_in_nobody_s_way(tmp_path):
    bundle = saved(tmp_path)
    (bundle / ".DS_Store").touch()
    (bundle / "predictions.csv").write_text("file,class\n")
    assert isinstance(sv.load(bundle), torch.nn.Module)
    sv.save(timm_model(), bundle, options=SIZES)  # takes the old one's place, and names no classes
    assert (bundle / "predictions.csv").read_text() == "file,class\n" and not (bundle / "classes.txt").exists()
    assert isinstance(sv.load(bundle), torch.nn.Module)


def test_the_same_weights_are_the_same_file(tmp_path):
    """Its sum is the model's id, by which features are added to a table and runs go on."""
    bundle = saved(tmp_path)
    for i in range(6):
        sv.save(sv.load(bundle), tmp_path / f"again{i}", options=SIZES)
    assert len({(folder / "model.safetensors").read_bytes() for folder in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("abcde", "classes='abcde' is one text; give a list"),
        (["a", "b", "c", "d", "a"], "classes names 'a' twice"),
        (["a", "b", "c", "d", ""], "does not go into a line of a file"),
        (["a", "b", "c", "d", "e\nf"], r"'e\\nf', which does not go into a line"),
    ],
)
def test_names_that_are_none_are_refused(classes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        sv.save(timm_model(), tmp_path / "b", options=SIZES, classes=classes)


def test_what_a_config_calls_its_classes_is_kept(tmp_path):
    many = [f"class {i}" for i in range(12)]  # "10" stands before "2" in text
    for names, kept in (
        ({0: "cat", 1: "dog"}, ("cat", "dog")),
        ({0: "LABEL_0", 1: "LABEL_1"}, None),
        ({0: "two\nlines", 1: ""}, None),
        ({str(i): name for i, name in enumerate(many)}, tuple(many)),
    ):
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**HUGGING, num_labels=len(names))).eval()
        model.config.id2label = names
        sv.save(model, tmp_path / "b", preprocessing=HOW)
        assert read_card(tmp_path / "b").classes == kept


def test_a_model_is_saved_as_transformers_reads_it_from_a_file(tmp_path):
    """Its weights lie in memory as they lie in the file, which changes a last bit."""
    hugging().save_pretrained(tmp_path / "hub")
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path / "hub").eval()
    sv.save(sv.reduce_(model, sv.ETPS(keep=0.5)), tmp_path / "b", preprocessing=HOW)
    x = zoo.images(1, size=32)
    with torch.no_grad():
        torch.testing.assert_close(sv.load(tmp_path / "b")(x).logits, model(x).logits)


def test_weights_without_a_classifier_are_given_none_that_nobody_trained(tmp_path):
    """Nor a pooler: features are the same whenever they are read."""
    backbone = transformers.ViTModel(transformers.ViTConfig(**HUGGING), add_pooling_layer=False).eval()
    backbone.save_pretrained(tmp_path / "hub")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "hub")
    x = zoo.images(2, size=32)
    with torch.no_grad():
        first, again = (create(f"hf:{tmp_path / 'hub'}", True, {}).model(x).logits for _ in range(2))
        torch.testing.assert_close(first, backbone(x).last_hidden_state[:, 0])
    assert torch.equal(first, again)
    hugging().save_pretrained(tmp_path / "hub")
    weights = load_file(tmp_path / "hub/model.safetensors")
    save_file({k: v for k, v in weights.items() if k != "classifier.weight"}, tmp_path / "hub/model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"its weights lack classifier\.weight, which would be random"):
        create(f"hf:{tmp_path / 'hub'}", True, {})


def test_sums_that_are_cut_vouch_for_nothing(tmp_path):
    bundle = saved(tmp_path)
    lines = (bundle / "SHA256SUMS").read_text().splitlines(True)
    (bundle / "SHA256SUMS").write_text("".join(line for line in lines if "safetensors" not in line))
    spoil(bundle / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"SHA256SUMS has no sum of model\.safetensors"):
        sv.load(bundle)


def test_features_are_what_goes_into_a_classifier_however_it_is_held():
    sizes = {"architecture": "vit_tiny_patch16_224", "num_labels": 5, "model_args": {**SIZES, "img_size": 32}}
    model = transformers.TimmWrapperForImageClassification(transformers.TimmWrapperConfig(**sizes)).eval()
    without_classifier_(model)
    assert model(zoo.images(2, size=32)).logits.shape == (2, 48)
    odd = hugging()
    odd.classifier = torch.nn.Conv1d(1, 1, 1)
    with pytest.raises(ConfigError, match="is none that can be left out"):
        without_classifier_(odd)


@pytest.mark.parametrize("kind", ["dynamic size", "no pooler"])
def test_how_a_model_was_built_is_told_from_it(kind, tmp_path):
    if kind == "dynamic size":
        model, how = (
            timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **SIZES).eval(),
            {"options": SIZES, "image_size": 64},
        )
    else:
        model, how = (
            transformers.ViTModel(transformers.ViTConfig(**HUGGING), add_pooling_layer=False).eval(),
            {"preprocessing": HOW},
        )
    sv.save(model, tmp_path / "b", **how)
    x = zoo.images(1, size=64 if kind == "dynamic size" else 32)
    with torch.no_grad():
        told, again = (m(x) for m in (model, sv.load(tmp_path / "b")))
    assert torch.equal(told if kind == "dynamic size" else told.last_hidden_state, again if kind == "dynamic size" else again[0])


def test_an_unknown_reducer_is_refused(tmp_path):
    bundle = saved(tmp_path)
    card(bundle, reducer={"name": "TeleTPS", "keep": 0.5})
    sums_again(bundle)
    with pytest.raises(ConfigError, match="describes no reducer of this version"):
        sv.load(bundle)


def sums_again(bundle: Path) -> None:
    from squeezevit import sums

    (bundle / sums.NAME).unlink()
    sums.write(bundle)


REFUSED = {
    "timm": (timm_model, {}, ConfigError, "give options= what timm.create_model was called with"),
    "no preprocessing": (hugging, {}, ConfigError, "transformers does not say how photographs are made ready"),
    "too few classes": (timm_model, {"options": SIZES, "classes": ["a"]}, ConfigError, "1 names, and the model has 5 outputs"),
    "another library": (lambda: nn.Linear(2, 2), {}, SqueezeViTError, "cannot be saved as a bundle"),
    "options of transformers": (hugging, {"options": {"x": 1}, "preprocessing": HOW}, ConfigError, "leave options out"),
    "a function": (timm_model, {"options": {**SIZES, "norm_layer": nn.LayerNorm}}, ConfigError, "do not go into a file"),
    "another size": (hugging, {"preprocessing": HOW, "image_size": 64}, ConfigError, "give one of them, or the same size"),
    "odd preprocessing": (hugging, {"preprocessing": 3}, ConfigError, "preprocessing=3 is not known"),
    "no model": (lambda: "deit", {}, UnsupportedError, "is not a model"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_saved_leaves_nothing_behind(case, tmp_path):
    make, given, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        sv.save(make(), tmp_path / "b", **given)
    assert list(tmp_path.iterdir()) == []


def test_another_folder_is_not_overwritten_and_an_old_bundle_is(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="is there and is no bundle; choose another folder"):
        sv.save(timm_model(), tmp_path / "mine", options=SIZES)
    bundle = saved(tmp_path)
    sv.save(timm_model(), bundle, options=SIZES)
    assert read_card(bundle).reducer is None
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"


def test_an_old_bundle_comes_back_where_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    bundle, x, rename = saved(tmp_path), zoo.images(1, size=32), Path.rename

    def fails(self, target):
        if Path(target) == bundle and not self.name.endswith(".old"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(ConfigError, match="could not be written"):
        sv.save(timm_model(), bundle, options=SIZES)
    assert [file.name for file in tmp_path.iterdir()] == ["b"]
    with torch.no_grad():
        assert torch.equal(sv.load(bundle)(x), sv.reduce_(timm_model(), sv.ETPS(keep=0.5))(x))


def test_a_run_s_folder_is_its_best_bundle_in_every_engine(tmp_path):
    """Its id is that of the weights in it: another run has another."""
    ids = []
    for seed, name in enumerate(("one", "two")):
        model = timm_model()
        zoo.randomize(model, seed)
        sv.save(model, tmp_path / name / "best", options=SIZES)
        ids += [open_engine(tmp_path / name).id, open_engine(tmp_path / name / "best").id]
    assert ids[0] == ids[1] != ids[2] == ids[3]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_small_patch16_224", "vit_base_patch16_siglip_224"])
@pytest.mark.parametrize("size", [(640, 480), (300, 301), (100, 700), (33, 47)])
def test_preprocessing_is_timm_s_to_the_last_bit(name, size):
    from squeezevit.bundle.hosts import preprocessing

    model = timm.create_model(name, depth=1)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
    assert np.array_equal(preprocessing(model, None, None)(image), eval_transform(model)(image).numpy())


@pytest.mark.parametrize("processor", [transformers.ViTImageProcessor(), transformers.BitImageProcessor()])
def test_preprocessing_is_that_of_transformers(processor):
    from squeezevit.bundle.hosts import preprocessing

    model, image = hugging(), Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 70, 3), dtype=np.uint8))
    found = preprocessing(model, processor, None)(image)
    expected = processor(image, return_tensors="np")["pixel_values"][0]
    assert np.abs(found - expected).max() < 0.02  # transformers resizes tensors, a step of 255 is 0.016


def test_preprocessing_is_that_of_torchvision():
    from squeezevit.bundle.hosts import preprocessing

    how = torchvision.models.ViT_B_16_Weights.IMAGENET1K_V1.transforms()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 280, 3), dtype=np.uint8))
    assert np.array_equal(preprocessing(of_torchvision(), how, None)(image), how(image).numpy())


def test_preprocessing_that_cannot_be_meant():
    for values in ({"resize": 0}, {"resize": 16}, {"mean": (0.5,)}, {"std": (0, 1, 1)}, {"interpolation": "magic"}, {"crop": "a"}):
        with pytest.raises(ConfigError):
            Preprocessing(**{**HOW, **values})


def asked(capsys, *line: object) -> tuple[int, str]:
    """The exit code of a command line, and all that it said."""
    from squeezevit import cli

    with pytest.raises(SystemExit) as ended:
        cli.main([*map(str, line)])
    said = capsys.readouterr()
    return ended.value.code or 0, " ".join((said.out + said.err).split())


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Two in each of five class folders."""
    rng = np.random.default_rng(0)
    for name in "abcde":
        (tmp_path / "photos/val" / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(rng.integers(0, 255, (50, 60, 3), dtype=np.uint8)).save(tmp_path / f"photos/val/{name}/{i}.png")
    return tmp_path / "photos"


def test_commands_take_a_bundle(tmp_path, photographs, capsys):
    bundle = saved(tmp_path)
    code, said = asked(capsys, "eval", "--from", bundle, "--data", photographs, "--workers", 0, "--json", tmp_path / "e.json")
    assert code == 0, said
    written = json.loads((tmp_path / "e.json").read_text())
    assert written["reducer"] == repr(sv.ETPS(keep=0.5)) and [row["images"] for row in written["rows"]] == [10, 10]
    code, said = asked(
        capsys, "bench", "--from", bundle, "--methods", "identity", "--rounds", 1, "--batch-size", 1, "--json", tmp_path / "b.json"
    )
    assert code == 0, said
    assert [row["method"] for row in json.loads((tmp_path / "b.json").read_text())["rows"]] == ["identity", "bundle"]
    code, said = asked(capsys, "plan", "--from", bundle, "--macs", 0.6)
    assert code == 0 and "To use it: sv.reduce_(model, sv.ETPS(keep=" in said
    code, said = asked(capsys, "show", photographs / "val/a/0.png", "--from", bundle, "--out", tmp_path, "--image-size", 32)
    assert code == 0 and (tmp_path / "0-etps.png").is_file(), said


CONTRADICTIONS = {
    "--model": ("deit_small_patch16_224", "brings the model and its weights; leave --model out"),
    "--checkpoint": ("x.pth", "leave --checkpoint out"),
    "--num-classes": ("5", "leave --num-classes out"),
    "--method": ("dtps", "brings its reducer, ETPS(keep=0.5, at=None, score='auto', mass=False); leave --method out"),
    "--keep": ("0.7", "leave --keep out"),
    "--at": ("1,2", "leave --at out"),
    "--macs": ("0.5", "leave --macs out"),
    "--time": ("0.5", "leave --time out"),
    "--image-size": ("64", "is for 32 x 32 pixels; leave --image-size out"),
    "--classes": ("names.txt", "the bundle brings its classes; leave --classes out"),
}


@pytest.mark.parametrize("option", CONTRADICTIONS)
def test_what_contradicts_a_bundle_is_refused(option, tmp_path, photographs, capsys):
    value, message = CONTRADICTIONS[option]
    code, said = asked(capsys, "eval", "--from", saved(tmp_path), "--data", photographs, option, value)
    assert code == 2 and message in said


def test_an_unreduced_bundle_takes_a_reducer_by_budget(tmp_path, photographs, capsys):
    sv.save(timm_model(), tmp_path / "b", options=SIZES)
    code, said = asked(
        capsys, "eval", "--from", tmp_path / "b", "--data", photographs, "--method", "tome", "--macs", "70%", "--workers", 0,
        "--json", tmp_path / "e.json",
    )  # fmt: skip
    assert code == 0, said
    assert json.loads((tmp_path / "e.json").read_text())["rows"][1]["macs_share"] == pytest.approx(0.7, abs=0.05)
    code, said = asked(capsys, "eval", "--from", tmp_path / "b", "--data", photographs, "--keep", 0.5, "--macs", 0.5)
    assert code == 2 and "--keep and a budget both say how much is kept" in said


def test_models_of_other_libraries_by_name(tmp_path, photographs, open_clip_name, capsys):
    """A folder stands for a hub; photographs are made ready as its processor says, not as timm would."""
    hugging().save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    model = ["--model", f"hf:{tmp_path / 'vit'}", "--pretrained"]
    code, said = asked(capsys, "eval", *model, "--data", photographs, "--workers", 0, "--json", tmp_path / "e.json")
    assert code == 0, said
    how, right = Preprocessing((32, 32), (32, 32), "bilinear", (0.5,) * 3, (0.5,) * 3), 0
    for label, name in enumerate("abcde"):
        for i in range(2):
            x = torch.from_numpy(how(Image.open(photographs / f"val/{name}/{i}.png").convert("RGB")))
            right += int(hugging()(x[None]).logits.argmax()) == label
    dense = json.loads((tmp_path / "e.json").read_text())["rows"][0]
    assert dense["top1"] == right / 10 and dense["images"] == 10
    for line in (
        ["bench", "--model", f"open_clip:{open_clip_name}", "--methods", "identity,etps", "--rounds", 1, "--batch-size", 1],
        ["plan", "--model", "torchvision:vit_b_32", "--macs", 0.7],
    ):
        code, said = asked(capsys, *line)
        assert code == 0, said
    for name, message in {
        "hf:/no/such": "--model hf:/no/such cannot be built",
        "torchvision:vit_q_1": "--model torchvision:vit_q_1 cannot be built",
        "open_clip:nothing": "--model open_clip:nothing cannot be built",
        "google/vit-base": "a model of transformers is --model hf:google/vit-base",
    }.items():
        code, said = asked(capsys, "plan", "--model", name, "--macs", 0.7)
        assert code == 2 and message in said
    code, said = asked(capsys, "plan", *model[:2], "--macs", 0.7, "--image-size", 64)
    assert code == 2 and "takes its size and classes from its config; leave --image-size out" in said


def test_a_card_s_fields_are_all_written(tmp_path):
    written = json.loads((saved(tmp_path) / CARD).read_text())
    assert {*written} == {*Card.__dataclass_fields__}
    assert written["versions"]["torch"] == torch.__version__.split("+")[0] or written["versions"]["torch"]


@pytest.mark.parametrize(
    "reducer", [sv.DTPS(keep=0.5, train="topk"), sv.TopK(keep=0.5, score="received"), sv.ETPS(keep=0.5, at=(1,))]
)
def test_training_goes_on_with_all_that_a_bundle_says(reducer, tmp_path):
    from squeezevit.train.build import make_reducer
    from squeezevit.train.config import load_config
    from squeezevit.train.start import from_bundle

    bundle = tmp_path / "b"
    sv.save(sv.reduce_(timm_model(), reducer), bundle, options=SIZES, classes=list("edcba"))
    found = load_config(None, from_bundle(bundle, {}))
    assert make_reducer(found.reducer, timm_model()) == reducer
    assert Path(found.data.classes).read_text() == "e\nd\nc\nb\na\n" and found.data.upright
    assert "data.classes" not in from_bundle(bundle, {"model.new_head": True})
    assert "pretrained_cfg_overlay" not in found.model.options
    other = Preprocessing(36, (32, 32), "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    sv.save(sv.reduce_(timm_model(), reducer), bundle, options=SIZES, preprocessing=other)
    options = load_config(None, from_bundle(bundle, {})).model.options
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, **options)
    assert preprocessing(net, None, None) == other


@pytest.mark.parametrize("host", HOSTS)
def test_a_model_that_was_loaded_knows_its_bundle(host, tmp_path):
    """Its preprocessing, its classes and how it is built are not asked for again, whichever way it goes on."""
    make, known = HOSTS[host]
    how = Preprocessing(36, (32, 32), "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    sv.save(sv.reduce_(make(), sv.ETPS(keep=0.5)), tmp_path / "b", **{**known, "preprocessing": how}, classes=list("edcba"))
    model = sv.load(tmp_path / "b")
    sv.save(model, tmp_path / "again")
    sv.save(copy.deepcopy(model), tmp_path / "copied", image_size=32)
    cards = [read_card(tmp_path / name) for name in ("b", "again", "copied")]
    assert cards[0] == cards[1] == cards[2] and cards[0].classes == tuple("edcba") and cards[0].preprocessing == how
    with pytest.raises(ConfigError, match="classes gives 2 names"):
        sv.save(model, tmp_path / "again", classes=["x", "y"])
    if host == "timm":
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 60, 3), dtype=np.uint8))
        assert np.array_equal(eval_transform(model, None)(picture).numpy(), how(picture))
        model.set_input_size(img_size=48)
        sv.save(model, tmp_path / "again")
        assert read_card(tmp_path / "again").preprocessing.crop == (48, 48), "another size than it was loaded for"
        model.reset_classifier(5)
        sv.save(model, tmp_path / "again")
        assert read_card(tmp_path / "again").classes is None, "names of a head that is gone"
        model.reset_classifier(7)
        sv.save(model, tmp_path / "again")
        assert sv.load(tmp_path / "again").num_classes == 7


def test_a_loaded_model_of_open_clip_knows_its_name(open_clip_name, tmp_path):
    model = open_clip.create_model(open_clip_name).eval()
    sv.save(model, tmp_path / "b", options={"name": open_clip_name})
    sv.save(sv.load(tmp_path / "b"), tmp_path / "again")
    assert read_card(tmp_path / "again") == read_card(tmp_path / "b")


def test_commands_measure_at_the_size_of_the_bundle(tmp_path, photographs, capsys):
    """Though the model takes others."""
    model = timm_model(dynamic_img_size=True)
    sv.save(model, tmp_path / "b", options=SIZES, image_size=64)
    expected, measured = sv.macs(timm_model(dynamic_img_size=True), 64), ["--batch-size", 1]
    code, said = asked(
        capsys, "bench", "--from", tmp_path / "b", "--methods", "identity", "--rounds", 1, *measured, "--json", tmp_path / "b.json"
    )
    assert code == 0, said
    assert json.loads((tmp_path / "b.json").read_text())["rows"][0]["macs"] == expected
    code, said = asked(capsys, "plan", "--from", tmp_path / "b", "--macs", 0.6, "--json", tmp_path / "p.json")
    assert code == 0, said
    planned = json.loads((tmp_path / "p.json").read_text())["reducer"]
    assert planned == repr(sv.plan(timm_model(dynamic_img_size=True), "etps", macs=0.6, image_size=64))
    sv.save(timm_model(), tmp_path / "small", options=SIZES)
    code, said = asked(
        capsys, "show", photographs / "val/a/0.png", "--from", tmp_path / "small", "--out", tmp_path, "--json", tmp_path / "s.json"
    )
    assert code == 0, said
    assert json.loads((tmp_path / "s.json").read_text())["rows"][0]["grid"] == [4, 5]


@pytest.mark.skipif(not hasattr(signal, "SIGTERM"), reason="no such signal")
def test_a_command_that_is_terminated_leaves_nothing_half_written(tmp_path, monkeypatch, capsys):
    bundle = saved(tmp_path)
    monkeypatch.setattr(
        importlib.import_module("squeezevit.export.job"), "capture", lambda *given, **how: os.kill(os.getpid(), signal.SIGTERM)
    )
    before = signal.getsignal(signal.SIGTERM)
    code, said = asked(capsys, "export", "--from", bundle, "--out", tmp_path / "out", "--to", "program", "--batch-size", 1)
    assert code == 143 and signal.getsignal(signal.SIGTERM) is before, said
    assert {file.name for file in tmp_path.iterdir()} == {bundle.name}


def test_an_export_does_not_take_the_place_of_weights(tmp_path):
    bundle = saved(tmp_path)
    with pytest.raises(ConfigError, match="holds a bundle with weights, which an export would replace; choose another folder"):
        sv.export(sv.load(bundle), bundle, to="program", batch_size=1)
    sv.load(bundle)


def test_images_are_made_as_the_model_s_library_says(tmp_path):
    from squeezevit.cli import inputs

    how = Preprocessing(**HOW, upright=False)
    make, upright = inputs._images_of(hugging(), how, "hf:x", 32, True)
    picture = Image.fromarray(np.full((32, 32, 3), 255, np.uint8))
    assert not upright and torch.equal(make(picture), torch.ones(3, 32, 32))
    with pytest.raises(ConfigError, match="hf:x is for 32 x 32 pixels"):
        inputs._images_of(hugging(), how, "hf:x", 64, True)
    sv.save(sv.reduce_(hugging(), sv.ETPS(keep=0.5)), tmp_path / "b", preprocessing=HOW)
    net, make, upright = inputs.with_weights(inputs.Wanted(tmp_path / "b"), "cpu")
    assert upright and torch.equal(make(picture), torch.ones(3, 32, 32)) and "squeezevit_state" not in vars(net)


def test_saving_draws_from_no_generator_of_another_device(tmp_path, monkeypatch):
    model = sv.reduce_(timm.create_model("test_vit").eval(), sv.Random(keep=0.5))
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("seeds the generators of every device"))
    before = torch.get_rng_state()
    sv.save(model, tmp_path / "b")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_place_that_cannot_be_taken_is_refused_before_any_work(tmp_path, monkeypatch):
    model = sv.reduce_(timm_model(), sv.ETPS(keep=0.5))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ConfigError, match=r"is the folder that you are in, in whose place no .* can be put; name a folder in it"):
        sv.save(model, ".", options=SIZES)
    with pytest.raises(ConfigError, match="/proc is a mounted file system"):
        sv.save(model, "/proc", options=SIZES)
    sv.save(model, tmp_path / "real", options=SIZES)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    sv.save(model, tmp_path / "link", options=SIZES, classes=list("abcde"))
    assert (tmp_path / "link").is_symlink() and read_card(tmp_path / "real").classes == tuple("abcde")
    assert {p.name for p in tmp_path.iterdir()} == {"here", "real", "link"}
