"""Weights in and out: every file format and key name taken, every other file refused, the model then left as it was."""

import io
import pickle
import sys
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import nn

import oracles
import squeezevit as sv
import zoo
from questions import assert_same_snapshot, snapshot
from squeezevit import sums
from squeezevit.checkpoint import save_checkpoint
from squeezevit.errors import CheckpointError, MissingExtraError

LEARNED = pytest.mark.parametrize("reducer", [sv.DTPS(keep=0.5), sv.DynamicViT(keep=0.5)], ids=["dtps", "dynamicvit"])


def other(name: str = "plain", **options) -> nn.Module:
    """A model to load into: same kind, other weights."""
    return zoo.build(name, seed=9, **options)


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())


def as_the_authors_name(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k.replace("token_reducer.", "score_predictor."): v for k, v in state.items()}


def save(state: object, path: Path, **options) -> Path:
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path, **options)
    return path


@pytest.mark.parametrize("name", list(zoo.KINDS))
def test_weights_of_every_kind_go_back(name):
    model, target = zoo.build(name), other(name)
    assert_same_weights(sv.load_checkpoint_(target, model.state_dict()), model)


@pytest.mark.parametrize("name", list(zoo.MODELS))
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
def test_files_of_the_host_library(tmp_path, name, suffix):
    model, target = zoo.build(name), other(name)
    path = save(model.state_dict(), tmp_path / f"weights{suffix}")
    assert sv.load_checkpoint_(target, path) is target
    assert_same_weights(target, model)


def test_the_old_torch_format_and_a_path_as_text(tmp_path):
    model, target = zoo.build("plain"), other()
    path = save(model.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same_weights(sv.load_checkpoint_(target, str(path)), model)


@pytest.mark.parametrize("key", ["model", "state_dict", "model_ema", "state_dict_ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_training_checkpoints(tmp_path, key, prefix):
    model = zoo.build("plain")
    state = {prefix + k: v for k, v in model.state_dict().items()}
    path = save({"epoch": 3, key: state, "optimizer": {"lr": 0.1}, "best": None}, tmp_path / "last.pth")
    assert_same_weights(sv.load_checkpoint_(other(), path), model)


@pytest.mark.parametrize("ema", ["model_ema", "state_dict_ema"])
def test_averaged_weights_are_preferred(ema):
    model, raw = zoo.build("plain"), zoo.build("plain", seed=5)
    content = {"model": raw.state_dict(), "state_dict": raw.state_dict(), ema: model.state_dict()}
    assert_same_weights(sv.load_checkpoint_(other(), content), model)


@pytest.mark.parametrize("name", list(zoo.MODELS))
@pytest.mark.parametrize("reducer", ["dtps", "dynamicvit", "etps-mass"])
def test_own_files_round_trip(tmp_path, name, reducer):
    model = zoo.reduce(zoo.build(name), zoo.REDUCERS[reducer])
    save_checkpoint(model, tmp_path / "own.safetensors")
    target = sv.load_checkpoint_(sv.reduce_(other(name), zoo.REDUCERS[reducer]), tmp_path / "own.safetensors")
    assert_same_weights(target, model)
    assert torch.equal(zoo.run(target, zoo.images(2)), zoo.run(model, zoo.images(2)))
    with safetensors.safe_open(tmp_path / "own.safetensors", "pt") as file:
        assert file.metadata()["squeezevit.reducer"] == repr(zoo.REDUCERS[reducer])


def test_own_file_of_an_unreduced_model_with_tied_weights(tmp_path):
    model = zoo.build("plain")
    model.blocks[1].mlp = model.blocks[0].mlp
    save_checkpoint(model, tmp_path / "own.safetensors")
    assert_same_weights(sv.load_checkpoint_(other(), tmp_path / "own.safetensors"), model)


@LEARNED
@pytest.mark.parametrize("nested", [False, True], ids=["bare", "nested"])
def test_authors_names_then_agree_with_their_evaluation_path(tmp_path, reducer, nested):
    """The heads reach the oracle from the file by the authors' names, and the model through `load_checkpoint_`."""
    trained = zoo.reduce(zoo.build("plain"), reducer)
    state = as_the_authors_name(trained.state_dict())
    assert "score_predictor.2.out_conv.4.bias" in state
    path = save({"model": state} if nested else state, tmp_path / "authors.pth")
    model = sv.load_checkpoint_(sv.reduce_(other(), reducer), path)
    heads = [authors_head(state, j) for j in range(3)]
    x = zoo.images(2)
    method = type(reducer).__name__.lower()
    expected = oracles.forward(zoo.build("plain"), x, method, keep=0.5, at=(1, 2, 3), heads=heads)
    torch.testing.assert_close(zoo.run(model, x).double(), expected.logits, rtol=1e-5, atol=1e-5)


def authors_head(state: dict[str, torch.Tensor], stage: int) -> nn.Module:
    """Their `PredictorLG`, its weights read by their names; the oracle runs it."""
    C = zoo.DIM
    head = nn.Module()
    head.in_conv = nn.Sequential(nn.LayerNorm(C), nn.Linear(C, C), nn.GELU())
    head.out_conv = nn.Sequential(nn.Linear(C, C // 2), nn.GELU(), nn.Linear(C // 2, C // 4), nn.GELU(), nn.Linear(C // 4, 2))
    prefix = f"score_predictor.{stage}."
    head.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    return head


def test_authors_layer_scale_names():
    model = zoo.build("layer-scale")
    state = {k.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2"): v for k, v in model.state_dict().items()}
    assert "blocks.0.gamma_1" in state
    assert_same_weights(sv.load_checkpoint_(other("layer-scale"), state), model)


@pytest.mark.parametrize(("name", "prefix"), [("plain", 1), ("distilled", 2), ("registers", 0), ("attention-pool", 0)])
@pytest.mark.parametrize("size", [96, (48, 80)], ids=["larger", "not-square"])
def test_position_embedding_is_resampled_for_another_grid(name, prefix, size):
    model, target = zoo.build(name), other(name, img_size=size)
    sv.load_checkpoint_(target, model.state_dict())
    grid = target.patch_embed.grid_size
    expected = resample_abs_pos_embed(model.pos_embed, list(grid), num_prefix_tokens=prefix)
    assert torch.equal(target.pos_embed, expected)
    state = target.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items() if k != "pos_embed")


def test_a_loaded_state_dict_is_not_aliased():
    state = zoo.build("plain").state_dict()
    model = sv.load_checkpoint_(other(), state)
    state["head.bias"].fill_(7)
    assert not model.head.bias.eq(7).any()


def refuse(model: nn.Module, source: object, *parts: str) -> str:
    """The message of the CheckpointError that `source` gives, which must have these parts; the model stays as it was."""
    before = snapshot(model)
    with pytest.raises(CheckpointError) as error:
        sv.load_checkpoint_(model, source)
    assert_same_snapshot(snapshot(model), before)
    message = str(error.value)
    assert [part for part in parts if part not in message] == []
    assert len(message) < 2000
    return message


class Malicious:
    """Pickled, it creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", ["pickle", "torch", "torch-old", "inside-a-state-dict"])
def test_pickled_code_is_refused_and_never_run(tmp_path, how):
    trap, path = tmp_path / "it-ran", tmp_path / "evil.pth"
    evil = Malicious(trap)
    if how == "pickle":
        path.write_bytes(pickle.dumps(evil))
    elif how == "inside-a-state-dict":
        torch.save({**zoo.build("plain").state_dict(), "extra": evil}, path)
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=how == "torch")
    pickle.loads(pickle.dumps(evil))
    assert trap.exists(), "the trap is not set"
    trap.unlink()
    refuse(other(), path, str(path), "pickled Python objects", "sv.load_checkpoint_(model, state_dict)")
    assert not trap.exists()


def test_a_whole_pickled_model_is_refused(tmp_path):
    path = save(zoo.build("plain"), tmp_path / "model.pth")
    refuse(other(), path, str(path), "pickled Python objects")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", "-old.pth"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_truncated_files(tmp_path, suffix, share):
    old = suffix == "-old.pth"
    state = zoo.build("plain", depth=1).state_dict()
    whole = save(state, tmp_path / f"whole{suffix}", **({"_use_new_zipfile_serialization": False} if old else {})).read_bytes()
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(whole[: int(len(whole) * share)])
    refuse(other(depth=1), path, str(path))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("cut", range(1, 1200, 111))
def test_old_files_cut_anywhere(tmp_path, cut):
    """Where the unpickler meets the end decides what it raises; all of it is a broken file to the user."""
    buffer = io.BytesIO()
    torch.save(zoo.build("plain", depth=1).state_dict(), buffer, _use_new_zipfile_serialization=False)
    path = tmp_path / "cut.pth"
    path.write_bytes(buffer.getvalue()[:cut])
    refuse(other(depth=1), path, str(path))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "content", [b"hello world\n", b"<!DOCTYPE html>", b"{}", b"\x89PNG\r\n\x1a\n", b"PK\x03\x04", b"version https://git-lfs"]
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_of_something_else(tmp_path, suffix, content):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    refuse(other(), path, str(path))


def test_no_file_and_a_folder(tmp_path):
    for path in (tmp_path, tmp_path / "absent.pth", tmp_path / "absent.safetensors"):
        refuse(other(), path, str(path), "is not a file", ".safetensors")


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), 7, None], ids=["list", "tensor", "number", "nothing"])
def test_a_file_without_a_state_dict(tmp_path, content):
    path = save(content, tmp_path / "weights.pth")
    refuse(other(), path, str(path), f"holds a {type(content).__name__}, not a state dict", "model.state_dict()")


@pytest.mark.parametrize("content", [{}, {"epoch": 3, "args": {"lr": 1}}, {"model": {}}, {"state_dict": {"a": 1}}], ids=repr)
def test_a_state_dict_without_weights(content):
    message = refuse(other(), content, "holds no weights", "state_dict")
    if "epoch" in content:
        assert "'epoch', 'args'" in message


def test_keys_that_are_no_names():
    refuse(other(), {0: torch.zeros(1), 1: torch.zeros(1)}, "the given state dict")


def test_missing_unexpected_and_misshaped_keys_are_listed():
    state = zoo.build("plain").state_dict()
    del state["blocks.2.mlp.fc1.weight"], state["norm.bias"]
    state.update({"stranger.weight": torch.zeros(2), "head.bias": torch.zeros(7)})
    refuse(
        other(),
        state,
        "the given state dict does not fit this VisionTransformer",
        "2 missing: blocks.2.mlp.fc1.weight, norm.bias",
        "1 unexpected: stranger.weight",
        "1 mis-shaped: head.bias [7] here, [10] in the model",
        "Build the model that the checkpoint was saved from",
    )


def test_a_dinov2_file_brings_a_mask_token_that_no_model_needs():
    model = zoo.build("layer-scale")
    state = {**model.state_dict(), "mask_token": torch.zeros(1, zoo.DIM)}
    assert_same_weights(sv.load_checkpoint_(other("layer-scale"), state), model)


ODD = {
    "meta": (lambda x: x.to("meta"), "no plain numbers: head.bias (without values)"),
    "sparse": (lambda x: x.to_sparse(), "no plain numbers: head.bias (sparse)"),
    "nested": (lambda x: torch.nested.nested_tensor([x]), "no plain numbers: head.bias (nested)"),
    "quantised": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "no plain numbers: head.bias (quantised)"),
    "complex": (lambda x: x.to(torch.complex64), "head.bias complex64 here, float32 in the model"),
    "integer": (lambda x: x.to(torch.int64), "1 of another kind of number: head.bias int64 here, float32 in the model"),
    "boolean": (lambda x: x.bool(), "head.bias bool here, float32 in the model"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, that quantised and nested tensors are old and new
@pytest.mark.parametrize(
    ("kind", "saved"), [(kind, saved) for kind in ODD for saved in (False, True) if (kind, saved) != ("nested", True)]
)
def test_entries_that_are_no_plain_numbers_of_the_models_kind(tmp_path, kind, saved):
    make, part = ODD[kind]
    state = zoo.build("plain", num_classes=3).state_dict()
    state = {**state, "head.bias": make(state["head.bias"])}
    source = save(state, tmp_path / "odd.pth") if saved else state
    refuse(other(num_classes=3), source, str(tmp_path) if saved else "the given state dict", part)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8])
def test_a_file_of_integers_alone(dtype):
    state = {k: (v * 50).to(dtype) for k, v in zoo.build("plain").state_dict().items()}
    refuse(other(), state, "of another kind of number: cls_token int", "Save its weights as floating-point numbers")


def test_integers_stay_where_the_model_has_them():
    norm = nn.BatchNorm1d(2)
    state = {**nn.BatchNorm1d(2).state_dict(), "num_batches_tracked": torch.tensor(7, dtype=torch.int32)}
    assert sv.load_checkpoint_(norm, state).num_batches_tracked.item() == 7
    refuse(norm, {**state, "num_batches_tracked": torch.tensor(7.5)}, "num_batches_tracked float32 here, int64 in the model")


def test_an_error_while_loading_undoes_what_was_loaded():
    class Late(nn.Linear):
        def _load_from_state_dict(self, state, prefix, *args):
            super()._load_from_state_dict(state, prefix, *args)
            if state[prefix + "bias"].eq(0).all():
                raise RuntimeError("zero bias")

    model = nn.Sequential(nn.Linear(2, 2), Late(2, 2))
    refuse(
        model,
        nn.Sequential(zeros(2), zeros(2)).state_dict(),
        "cannot be loaded into this Sequential, which is as before: zero bias",
    )


def zeros(size: int) -> nn.Linear:
    linear = nn.Linear(size, size)
    nn.init.zeros_(linear.bias)
    return linear


def test_two_names_of_one_parameter():
    state = zoo.build("plain").state_dict()
    refuse(other(), {**state, "module.head.bias": torch.zeros(10)}, "more than one entry for head.bias")


def test_names_are_quoted_short_and_printable():
    message = refuse(
        other(), {**zoo.build("plain").state_dict(), "\x1b[31m" + "x" * 10_000: torch.zeros(1)}, "1 unexpected: \\x1b[31mxxx"
    )
    assert "\x1b" not in message


def test_a_file_that_is_not_what_was_summed_up_is_refused(tmp_path):
    model = torch.nn.Linear(2, 1)
    save_checkpoint(model, tmp_path / "model.safetensors")
    sums.write(tmp_path)
    sv.load_checkpoint_(model, tmp_path / "model.safetensors")
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[-1] ^= 1  # one bit of one weight
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="is not what was written: SHA256SUMS beside it has another sum"):
        sv.load_checkpoint_(model, tmp_path / "model.safetensors")


def test_a_path_too_long_for_the_system_is_no_checkpoint():
    with pytest.raises(CheckpointError, match="is not a file; give the path"):
        sv.load_checkpoint_(torch.nn.Linear(2, 1), "a" * 5000)


@pytest.mark.parametrize("source", [None, 3, torch.ones(2), ["w"]], ids=repr)
def test_what_is_neither_a_path_nor_a_state_dict(source):
    with pytest.raises(CheckpointError, match="is no checkpoint; give the path of a file, or a state dict"):
        sv.load_checkpoint_(torch.nn.Linear(2, 1), source)


def test_long_lists_are_cut():
    refuse(other(), {"stranger": torch.zeros(1)}, "missing: cls_token, pos_embed", "more", "1 unexpected: stranger")


@pytest.mark.parametrize(
    "make",
    [
        lambda: zoo.build("plain", embed_dim=24),
        lambda: zoo.build("plain", depth=2),
        lambda: zoo.build("plain", num_classes=3),
        lambda: zoo.build("distilled"),
        lambda: zoo.build("layer-scale"),
        lambda: zoo.build("attention-pool"),
        lambda: zoo.build("plain", embed_dim=24, img_size=96),
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)),
        lambda: nn.Linear(2, 2),
    ],
    ids=["width", "depth", "classes", "distilled", "layer-scale", "no-class-token", "width-and-grid", "convolutions", "linear"],
)
def test_a_checkpoint_of_another_architecture(tmp_path, make):
    path = save(make().state_dict(), tmp_path / "other.pth")
    refuse(other(), path, str(path), "this VisionTransformer", "uild the model")


@pytest.mark.parametrize(
    "state",
    [
        {"pos_embed": torch.zeros(5)},
        {"pos_embed": torch.zeros(1, 60, 48)},
        {"pos_embed": torch.zeros(1, 1, 48)},
        {"patch_embed.proj.weight": torch.zeros(48, 7)},
        {"patch_embed.proj.weight": torch.zeros(3)},
        {"visual.class_embedding": torch.zeros(1)},
        {"encoder": torch.zeros(1)},
        {"preprocessor.patchifier.proj.weight": torch.zeros(1)},
        {"vision_encoder.mask_token": torch.zeros(1)},
    ],
    ids=lambda state: f"{next(iter(state))}-{list(next(iter(state.values())).shape)}",
)
def test_entries_the_hosts_converter_stumbles_over(state):
    """timm tells other libraries' files by a key or two, and fails in its own words where the rest is not as it expects."""
    refuse(other(), {**zoo.build("plain").state_dict(), **state}, "the given state dict")


def test_heads_without_a_place_for_them():
    state = zoo.reduce(zoo.build("plain"), sv.DTPS()).state_dict()
    for model in (other(), sv.reduce_(other(), sv.ETPS())):
        refuse(model, as_the_authors_name(state), "unexpected: token_reducer.0.in_conv", "sv.reduce_ with DTPS or DynamicViT")


def test_other_number_of_heads():
    state = zoo.reduce(zoo.build("plain"), sv.DTPS(at=(1, 2))).state_dict()
    refuse(sv.reduce_(other(), sv.DTPS()), state, "missing: token_reducer.2.in_conv")
    refuse(sv.reduce_(other(), sv.DTPS(at=(2,))), state, "unexpected: token_reducer.1.in_conv", "as many stages")


def test_a_place_for_heads_without_heads():
    refuse(
        sv.reduce_(other(), sv.DTPS()),
        zoo.build("plain").state_dict(),
        "missing: token_reducer.0",
        "load it first, then call sv.reduce_",
    )


def test_safetensors_not_installed(tmp_path, monkeypatch):
    path = save(zoo.build("plain").state_dict(), tmp_path / "weights.safetensors")
    for name in [name for name in sys.modules if name.split(".")[0] == "safetensors"]:
        monkeypatch.setitem(sys.modules, name, None)
    for use in (lambda: sv.load_checkpoint_(other(), path), lambda: save_checkpoint(other(), path)):
        with pytest.raises(MissingExtraError, match=r'needs the package safetensors: pip install "squeezevit\[timm\]"'):
            use()


def test_weights_of_half_precision_keep_the_models_dtype():
    model = zoo.build("plain").bfloat16()
    target = sv.load_checkpoint_(other(), model.state_dict())
    assert target.head.weight.dtype == torch.float32
    assert torch.equal(target.head.weight, model.head.weight.float())


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_a_wrapped_model_takes_its_own_weights(wrap):
    """Whose keys begin with what the wrapper is called by."""
    target, model = wrap(other()), wrap(zoo.build("plain"))
    assert sv.load_checkpoint_(target, model.state_dict()) is target
    assert_same_weights(target, model)


def test_a_model_without_numbers_takes_none():
    with torch.device("meta"):
        model = nn.Linear(2, 1)
    with pytest.raises(CheckpointError, match="is on the meta device"):
        sv.load_checkpoint_(model, {"weight": torch.ones(1, 2), "bias": torch.zeros(1)})
