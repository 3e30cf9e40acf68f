"""`squeezevit train`: short real runs, and everything that can interrupt or spoil one."""

import csv
import hashlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import squeezevit as sv
from squeezevit.bundle import read_card
from squeezevit.checkpoint import save_checkpoint
from squeezevit.cli import main
from squeezevit.core.attach import state_of
from squeezevit.errors import CheckpointError, ConfigError, DataError, SqueezeViTError, TrainingError
from squeezevit.train import build, checkpoints, data, loop, sharding
from squeezevit.train.config import Config, load_config, recipes, to_dict, to_yaml
from squeezevit.train.loop import train

TINY = [
    "model.name=vit_tiny_patch16_224",
    "model.image_size=32",
    "model.options={patch_size: 8, embed_dim: 48, depth: 4, num_heads: 3}",
    "data.workers=0",
    "device=cpu",
    "optimizer.lr=1e-3",
    "reducer.keep=0.5",
    "reducer.at=1,2",
    "batch_size=8",
    "epochs=2",
    "tensorboard=false",
]
forks = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
PLAIN = ["augment.color_jitter=0", "augment.hflip=0", "augment.crop_scale=1,1", "augment.smoothing=0"]


def write_images(folder: Path, names, rng, brightness: int) -> None:
    folder.mkdir(parents=True)
    for name in names:
        noise = rng.normal(brightness, 40, (36, 36, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noise).save(folder / f"{name}.png")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes told apart by brightness: 2 x 16 to train on, 2 x 7 (no multiple of anything) to validate."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, n in (("train", 16), ("val", 7)):
        for name, brightness in (("ant", 90), ("bee", 160)):
            write_images(root / split / name, range(n), rng, brightness)
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory, photos):
    """A file of starting weights whose classifier fits, for distillation."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "start.safetensors"
    save_checkpoint(build.create_model(load_config(None, {}, TINY).model, 2), file)
    return file


def config(photos, out, *settings) -> Config:
    return load_config(None, {"data.folder": str(photos), "out": str(out)}, [*TINY, *settings])


def interrupt_at(update: int, number: int = signal.SIGTERM):
    """A progress callback that sends this process a signal after so many updates."""
    seen = []

    def report(p):
        seen.append(p)
        if p.row is None and p.epoch * p.updates + p.update == update:
            os.kill(os.getpid(), number)

    return report


def table(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text().splitlines()))


def untimed(row):
    return {k: v for k, v in row.items() if k not in ("images_per_second", "seconds")}


def same_weights(a: Path, b: Path) -> bool:
    left, right = load_file(a), load_file(b)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def python(*argv, processes: int = 1, environment=None, **options):
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "--no-python", sys.executable]
    line = [sys.executable, *(launch if processes > 1 else []), *map(str, argv)]
    path = os.pathsep.join([str(Path(loop.__file__).parents[2]), str(Path(__file__).parent)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **(environment or {})}
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def command(*argv, **options):
    return python("-m", "squeezevit", "train", *argv, **options)


def elsewhere(function, *argv, **options):
    """Run a function of this file in other processes."""
    return python("-c", f"import sys, test_train; test_train.{function.__name__}(*sys.argv[1:])", *argv, **options)


def as_options(settings):
    return [part for s in settings for part in ("--set", s)]


@pytest.mark.parametrize(
    "settings",
    [
        ["reducer.method=etps", "reducer.anneal_epochs=1", "augment.mixup=0.8", "augment.cutmix=1", "ema.decay=0.9"],
        ["reducer.method=dtps", "augment.auto_augment=rand-m9-mstd0.5-inc1", "augment.erase=0.5", "accumulate=2"],
        ["reducer.method=dtps", "reducer.options={train: topk}", "checkpoint_activations=true", "precision=bf16"],
        ["reducer.method=tome", "augment.repeats=3", "tensorboard=true", "optimizer.layer_decay=0.8", "optimizer.clip=1"],
    ],
    ids=["etps", "dtps-masked", "dtps-topk", "tome"],
)
def test_short_runs_learn_and_leave_what_they_should(photos, weights, tmp_path, settings):
    settings += [f"model.checkpoint={weights}", "loss.logits=0.5", "loss.tokens=0.5", "epochs=4"]
    seen = []
    result = train(config(photos, tmp_path, *settings), progress=seen.append)
    rows = table(tmp_path / "log.csv")
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert all(row["val_images"] == "14" for row in rows)
    assert {"loss", "task", "logits", "tokens", "top1", "top5", "dense_top1", "images_per_second"} <= rows[0].keys()
    masked = "reducer.method=dtps" in settings and "reducer.options={train: topk}" not in settings
    assert ("keep_ratio" in rows[0]) == masked
    assert float(rows[-1]["task"]) < float(rows[0]["task"])
    assert result.best > 0.5 and result.signal is None
    assert (tmp_path / "best" / "model.safetensors").is_file() and (tmp_path / "last" / "state.pt").is_file()
    for name in ("best", "last"):  # bundles, from which nothing need be typed again
        again = sv.load(tmp_path / name).state_dict()
        assert all(torch.equal(again[key], value) for key, value in load_file(tmp_path / name / "model.safetensors").items())
    assert (tmp_path / "last" / "ema.safetensors").is_file() == ("ema.decay=0.9" in settings)
    assert (tmp_path / "classes.txt").read_text().split() == ["ant", "bee"]
    assert seen[-1].seconds_left >= 0 and len(seen) == 4 * 4 + 4
    assert load_config(tmp_path / "config.yaml") == config(photos, tmp_path, *settings)


def test_validation_is_at_the_final_ratio_and_counts_what_a_plain_loop_counts(photos, tmp_path, monkeypatch):
    used = []
    score = loop._Run._score

    def scored(run, net):
        used.append(state_of(net).reducer.keep if "squeezevit_state" in vars(net) else "dense")
        return score(run, net)

    monkeypatch.setattr(loop._Run, "_score", scored)
    ratios = []
    monkeypatch.setattr(
        loop, "retune_", lambda net, reducer: (ratios.append(reducer.keep), setattr(state_of(net), "reducer", reducer))
    )
    c = config(photos, tmp_path, "reducer.anneal_epochs=1", "epochs=1")
    result = train(c)
    assert ratios[0] == 1 and ratios[:4] == sorted(ratios[:4], reverse=True) and ratios[4] == 0.5
    assert used == [0.5, "dense"]
    net, _ = build.build_model(replace(c, model=replace(c.model, checkpoint=str(tmp_path / "last" / "model.safetensors"))), 2)
    _, val = data.open_folder(photos)
    val.transform = loop.eval_transform(net, 32)
    with torch.no_grad():
        hits = [net.eval()(s.image[None]).argmax().item() == s.label for s in (val[i] for i in range(len(val)))]
    assert result.rows[0]["top1"] == pytest.approx(sum(hits) / 14)


def test_learning_rates_of_heads_and_backbone_really_apply(photos, tmp_path):
    settings = [
        "reducer.method=dtps",
        "optimizer.heads_lr_scale=10",
        "optimizer.backbone_lr_scale=1e-3",
        "optimizer.weight_decay=0",
    ]
    settings += ["save_every=1", "epochs=1", "schedule.min_lr=0"]
    c = config(photos, tmp_path, *settings, "schedule.name=constant")
    data.seed_everything(c.seed)
    before = {k: v.clone() for k, v in build.build_model(c, 2)[0].state_dict().items()}
    row = train(c).rows[0]
    assert row["lr_heads"] == pytest.approx(1e-2) and row["lr"] == pytest.approx(1e-6)
    after = load_file(tmp_path / "last" / "model.safetensors")
    moved = {k: (after[k] - before[k]).abs().max().item() for k in before}  # Adam moves by about lr an update
    assert max(v for k, v in moved.items() if not k.startswith("token_reducer.")) < 1e-5
    assert max(v for k, v in moved.items() if k.startswith("token_reducer.")) > 5e-3


def test_frozen_layers_stay_bit_equal(photos, tmp_path):
    c = config(photos, tmp_path, "freeze=2", "epochs=1")
    data.seed_everything(c.seed)
    before = {k: v.clone() for k, v in build.build_model(c, 2)[0].state_dict().items()}
    train(c)
    after = load_file(tmp_path / "last" / "model.safetensors")
    frozen = {k for k in before if torch.equal(before[k], after[k])}
    expected = {k for k in before if k.startswith(("patch_embed", "pos_embed", "cls_token", "blocks.0.", "blocks.1."))}
    assert frozen == expected


@pytest.mark.parametrize("update", [3, 4, 6])  # inside an epoch, at its end before validation, in the next one
def test_a_resumed_run_is_bit_equal(photos, tmp_path, update):
    settings = ["reducer.method=dtps", "augment.mixup=0.8", "augment.erase=0.5", "ema.decay=0.9", "model.drop_path=0.1"]
    whole, broken = (config(photos, tmp_path / name, *settings) for name in ("whole", "broken"))
    expected = train(whole)
    first = train(broken, progress=interrupt_at(update))
    assert first.signal == signal.SIGTERM
    second = train(replace(broken, save_every=2), resume=True)
    for name in ("model", "ema"):
        assert same_weights(tmp_path / "whole/last" / f"{name}.safetensors", tmp_path / "broken/last" / f"{name}.safetensors")
    assert [untimed(row) for row in second.rows] == [untimed(row) for row in expected.rows]


def test_sigterm_to_the_command_then_resume(photos, tmp_path):
    """With reading processes, which must neither die of the signal nor change the result, and with noise in the model."""
    tiny = [s for s in TINY if s not in ("data.workers=0", "epochs=2")]
    settings = [*tiny, "data.workers=1", "epochs=12", "save_every=1", "reducer.method=dtps"]
    process = command("--data", photos, "--out", tmp_path / "a", *as_options(settings), start_new_session=True)
    while not (tmp_path / "a" / "last").exists() and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 143, output
    assert "--resume goes on" in output
    with pytest.raises(ConfigError, match="holds a run already"):
        train(load_config(tmp_path / "a" / "config.yaml"))
    train(load_config(tmp_path / "a" / "config.yaml", {}, ["data.workers=0"]), resume=True)
    train(config(photos, tmp_path / "b", "epochs=12", "reducer.method=dtps"))
    assert same_weights(tmp_path / "a/last/model.safetensors", tmp_path / "b/last/model.safetensors")


@pytest.mark.parametrize("moment", ["filling", "between the renames"])
def test_killed_while_writing_the_previous_checkpoint_counts(tmp_path, monkeypatch, moment):
    folder = tmp_path / "last"
    checkpoints.write_folder(folder, lambda f: (f / "x").write_text("old"))

    class Killed(BaseException):
        pass

    def die(*args):
        raise Killed

    if moment == "filling":
        with pytest.raises(Killed):
            checkpoints.write_folder(folder, die)
    else:
        rename = Path.rename
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Path, "rename", lambda a, b: rename(a, b) if a == folder else die())
            checkpoints.write_folder(folder, lambda f: (f / "x").write_text("new"))
    assert (checkpoints.find_folder(folder) / "x").read_text() == "old"
    checkpoints.write_folder(folder, lambda f: (f / "x").write_text("newer"))
    assert (checkpoints.find_folder(folder) / "x").read_text() == "newer"
    assert [p.name for p in tmp_path.iterdir()] == ["last"]


def die_while_writing_the_second_state(settings, out):
    save = checkpoints.save_state

    def save_half(state, path):
        if (Path(out) / "last").exists():
            path.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        save(state, path)

    with mock.patch.object(checkpoints, "save_state", save_half):
        train(load_config(settings))


def test_sigkill_while_writing_then_resume(photos, tmp_path):
    whole, killed = (config(photos, tmp_path / name, "save_every=2", "reducer.method=dtps") for name in ("whole", "killed"))
    (tmp_path / "killed.yaml").write_text(to_yaml(killed))
    process = elsewhere(die_while_writing_the_second_state, tmp_path / "killed.yaml", killed.out)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == -signal.SIGKILL, output
    assert (tmp_path / "killed/last.new/state.pt").read_bytes() == b"half"
    assert checkpoints.load_state(tmp_path / "killed/last/state.pt")["update"] == 2
    train(killed, resume=True)
    train(whole)
    assert same_weights(tmp_path / "whole/last/model.safetensors", tmp_path / "killed/last/model.safetensors")


def test_a_full_disk_leaves_the_last_good_checkpoint(photos, tmp_path, monkeypatch):
    c = config(photos, tmp_path)
    train(c, progress=interrupt_at(2))
    good = {p.name: p.read_bytes() for p in (tmp_path / "last").iterdir()}

    def full(state, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(TrainingError, match=r"No space left.*untouched.*--resume"):
        patch.setattr(checkpoints, "save_state", full)
        train(c, resume=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "last").iterdir()} == good
    assert not (tmp_path / "last.new").exists()
    assert len(train(c, resume=True).rows) == 2


def test_resume_refuses_another_configuration_data_or_file(photos, tmp_path):
    c = config(photos, tmp_path / "out")
    train(c, progress=interrupt_at(2))
    changed = replace(c, epochs=3, optimizer=replace(c.optimizer, lr=0.5))
    with pytest.raises(ConfigError, match=r"epochs \(2, now 3\), optimizer.lr \(0.001, now 0.5\)"):
        train(changed, resume=True)
    (tmp_path / "out/last/state.pt").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"state\.pt is not what was written"):
        train(c, resume=True)
    (tmp_path / "out/last/SHA256SUMS").unlink()
    with pytest.raises(CheckpointError, match="training state"):
        train(c, resume=True)


def zeroed_page(run: Path) -> None:
    content = bytearray((run / "last/state.pt").read_bytes())
    content[8192 : 2 * 8192] = bytes(8192)
    (run / "last/state.pt").write_bytes(content)


def flipped_bit(run: Path) -> None:
    content = bytearray((run / "last/model.safetensors").read_bytes())
    content[-1000] ^= 1
    (run / "last/model.safetensors").write_bytes(content)


SPOILT = {
    "a flipped bit": (flipped_bit, r"model\.safetensors is not what was written"),
    "a zeroed page": (zeroed_page, r"state\.pt is not what was written"),
    "the weights of best": (
        lambda run: shutil.copy(run / "best/model.safetensors", run / "last/model.safetensors"),
        r"model\.safetensors is not what was written.*comes from another checkpoint",
    ),
    "all of best": (
        lambda run: [shutil.copy(run / f"best/{name}", run / f"last/{name}") for name in ("model.safetensors", "SHA256SUMS")],
        r"last holds more than was written: SHA256SUMS does not list state\.pt; take out what does not belong there, or put the",
    ),
    "a file gone": (lambda run: (run / "last/model.safetensors").unlink(), "last does not hold what was written"),
    "no sums": (lambda run: (run / "last/SHA256SUMS").unlink(), "last lacks SHA256SUMS"),
    "spoilt sums": (lambda run: (run / "last/SHA256SUMS").write_bytes(b"\xff\x00 x"), "last does not hold what was written"),
}


def test_a_checkpoint_that_is_not_as_written_is_refused(photos, tmp_path):
    """Whatever a disk, a copy or somebody's hand did to it; put back, it resumes to the same bits."""
    c = config(photos, tmp_path / "out")
    train(c, progress=interrupt_at(6))
    for kind, (spoil, message) in SPOILT.items():
        shutil.copytree(c.out, tmp_path / kind)
        spoil(tmp_path / kind)
        with pytest.raises(CheckpointError, match=message):
            train(replace(c, out=str(tmp_path / kind)), resume=True)
    flipped_bit(tmp_path / "out")
    starting = replace(c, out=str(tmp_path / "new"), model=replace(c.model, checkpoint=f"{c.out}/last/model.safetensors"))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not what was written"):
        train(starting)
    flipped_bit(tmp_path / "out")  # back again
    train(c, resume=True)
    train(config(photos, tmp_path / "whole"))
    assert same_weights(tmp_path / "out/last/model.safetensors", tmp_path / "whole/last/model.safetensors")
    listed = dict(reversed(line.split()) for line in (tmp_path / "out/last/SHA256SUMS").read_text().splitlines())
    assert listed == {
        name: sha256(tmp_path / "out/last" / name) for name in ("classes.txt", "model.safetensors", "squeezevit.json", "state.pt")
    }


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def as_written_before(run: Path, classes: list[str] | None) -> None:
    """Make a checkpoint what the first version wrote: no sums, no names, fewer facts and fields."""
    state = checkpoints.load_state(run / "last/state.pt")
    for name in ("train_list", "val_list"):
        del state["data"][name]
    for name in ("upright", "classes"):
        del state["config"]["data"][name]
    del state["classes"]
    checkpoints.save_state({**state, "format": 1}, run / "last/state.pt")
    for folder in ("last", "best"):
        (run / folder / "SHA256SUMS").unlink(missing_ok=True)
    if classes is not None:
        (run / "classes.txt").write_text("".join(f"{name}\n" for name in classes))


def test_runs_of_the_first_version_go_on_as_they_began(tmp_path, caplog):
    """Photographs as stored, classes in the order of text: as bits say, whatever today's defaults are."""
    rng, names = np.random.default_rng(0), ["1", "2", "10"]
    for split, n in (("train", 8), ("val", 3)):
        for i, name in enumerate(names):
            write_images(tmp_path / "set" / split / name, range(n), rng, 60 + 60 * i)
            lying = Image.open(tmp_path / "set" / split / name / "0.png")
            lying.getexif()[0x0112] = 6
            lying.save(tmp_path / "set" / split / name / "0.png", exif=lying.getexif())
    (tmp_path / "text.txt").write_text("\n".join(sorted(names)))
    as_text = [f"data.classes={tmp_path / 'text.txt'}", "data.upright=false"]
    train(config(tmp_path / "set", tmp_path / "whole", *as_text))
    train(config(tmp_path / "set", tmp_path / "old", *as_text), progress=interrupt_at(4))
    as_written_before(tmp_path / "old", sorted(names))
    for interruption in (interrupt_at(5), None):  # what it went on from then is no checkpoint of the first version any more
        train(config(tmp_path / "set", tmp_path / "old"), resume=True, progress=interruption)
        assert "as they are stored" in caplog.text
        caplog.clear()
    assert same_weights(tmp_path / "old/last/model.safetensors", tmp_path / "whole/last/model.safetensors")
    assert (tmp_path / "old/classes.txt").read_text().split() == sorted(names)
    train(config(tmp_path / "set", tmp_path / "today"))
    assert (tmp_path / "today/classes.txt").read_text().split() == names
    assert not same_weights(tmp_path / "today/last/model.safetensors", tmp_path / "whole/last/model.safetensors")


def test_a_resume_on_other_classes_or_images_is_refused(photos, tmp_path):
    """A renamed folder would permute all labels, a renamed image the order; put back, the run goes on."""
    root = tmp_path / "set"
    shutil.copytree(photos, root)
    c = config(root, tmp_path / "out")
    train(c, progress=interrupt_at(2))

    def rename(old, new):
        for split in ("train", "val"):
            (root / split / old).rename(root / split / new)

    rename("ant", "zebra")
    with pytest.raises(DataError, match=r"classes of .* ant gone, zebra new; give the folders their old names back"):
        train(c, resume=True)
    rename("zebra", "ant")
    image = root / "train/ant/3.png"
    image.rename(root / "train/bee/33.png")
    (root / "train/bee/3.png").rename(image)
    with pytest.raises(DataError, match=r"is not what .* was trained on: .*put the images back"):
        train(c, resume=True)
    image.rename(root / "train/bee/3.png")
    (root / "train/bee/33.png").rename(image)
    assert train(c, resume=True).signal is None


def test_numbered_classes_count_as_numbers_and_a_file_may_say_otherwise(tmp_path, caplog):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("1", "2", "10"):
            write_images(tmp_path / split / name, range(2), rng, 90)
        paths = sorted((tmp_path / split).glob("*/*.png"))
        lines = "".join(f"{split}/{p.parent.name}/{p.name},{p.parent.name}\n" for p in paths)
        (tmp_path / f"{split}.csv").write_text(f"path,label\n{lines}")
    (tmp_path / "classes.txt").write_text("10\n2\n1\n")
    for _ in ("tables", "folders"):
        train_images, val_images = data.open_folder(tmp_path)
        assert train_images.classes == val_images.classes == ["1", "2", "10"]
        train_images.warn()
        assert "natural order, 1, 2, 10" in caplog.text
        caplog.clear()
        train_images, val_images = data.open_folder(tmp_path, tmp_path / "classes.txt")
        assert train_images.classes == val_images.classes == ["10", "2", "1"]
        assert {train_images.classes[label] for path, label in train_images.samples if Path(path).parent.name == "10"} == {"10"}
        train_images.warn()
        assert not caplog.text
        for split in ("train", "val"):
            (tmp_path / f"{split}.csv").unlink(missing_ok=True)


def test_names_that_are_no_text_do_not_end_a_run(photos, tmp_path):
    """An unreadable image and a class folder: both are spelt out where text is written."""
    shutil.copytree(photos, tmp_path / "set")
    try:
        for split in ("train", "val"):
            (tmp_path / "set" / split / "bee").rename(os.fsdecode(os.fsencode(tmp_path / "set" / split) + b"/caf\xe9"))
        Path(os.fsdecode(os.fsencode(tmp_path / "set/train/ant") + b"/\xe9.png")).write_bytes(b"bad")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    c = config(tmp_path / "set", tmp_path / "out", "data.max_unreadable=0.5", "epochs=1")
    train(c, progress=interrupt_at(2))
    assert len(train(c, resume=True).rows) == 1
    assert (tmp_path / "out/classes.txt").read_text(encoding="utf-8").split() == ["ant", r"caf\udce9"]
    (row,) = table(tmp_path / "out/unreadable.csv")
    assert row["path"].endswith(r"\udce9.png")


@pytest.fixture
def fork():
    """Run a function in a process of its own, which ends with the test at the latest."""
    children = []

    def start(function) -> int:
        child = os.fork()
        if not child:
            try:
                function()
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
        return child

    yield start
    for child in children:
        with suppress(ChildProcessError):
            if os.waitpid(child, os.WNOHANG) == (0, 0):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)


@forks
def test_a_folder_takes_one_run_at_a_time(photos, tmp_path, fork):
    """Also where the run that had it was killed and its reading processes are still there."""
    c = config(photos, tmp_path / "out", "epochs=1")
    Path(c.out).mkdir()
    reads, writes = os.pipe()

    def hold() -> None:
        lock = checkpoints.hold(Path(c.out))
        if os.fork():  # its reading process waits, too
            os.write(writes, b"!")
        time.sleep(20)
        assert lock is not None

    holder = fork(hold)
    os.read(reads, 1)
    with pytest.raises(ConfigError, match=rf"out=.* is in use by process {holder} on .*choose another folder"):
        train(c)
    assert not (tmp_path / "out/last").exists()
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert train(c).signal is None


@forks
def test_two_writers_never_mix_a_checkpoint(tmp_path, fork):
    """The second one is refused, by a message that does not speak of room, and the first one's is whole."""
    folder = tmp_path / "last"
    began, goes_on = os.pipe(), os.pipe()

    def slowly(new: Path) -> None:
        (new / "model").write_text("first")
        os.write(began[1], b"!")
        os.read(goes_on[0], 1)
        (new / "state").write_text("first")

    first = fork(lambda: checkpoints.write_folder(folder, slowly))
    os.read(began[0], 1)
    with pytest.raises(TrainingError, match=r"being written by another process.*one of its own") as caught:
        checkpoints.write_folder(folder, lambda new: (new / "model").write_text("second"))
    assert "room" not in str(caught.value)
    os.write(goes_on[1], b"!")
    assert os.waitpid(first, 0)[1] == 0
    assert {(folder / name).read_text() for name in ("model", "state")} == {"first"}
    checkpoints.write_folder(folder, lambda new: (new / "model").write_text("second"))
    assert (folder / "model").read_text() == "second"


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OSError(28, "No space left on device"), "make room"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "make room"),
        (PermissionError(13, "Permission denied"), "make the folder writable"),
        (FileNotFoundError(2, "No such file or directory"), "stays where it is"),
        (RuntimeError("unexpected"), "stays where it is"),
    ],
)
def test_a_checkpoint_that_cannot_be_written_says_what_is_in_the_way(tmp_path, error, remedy):
    def fails(new):
        raise error

    with pytest.raises(TrainingError, match=remedy) as caught:
        checkpoints.write_folder(tmp_path / "last", fails)
    assert ("make room" in str(caught.value)) == (remedy == "make room")


@forks
@pytest.mark.parametrize("moment", ["an update", "writing"])
def test_a_killed_reading_process_is_a_clear_error(photos, tmp_path, monkeypatch, moment):
    """As by a machine short of memory; torch tells of it by a signal, at any line."""
    c = config(photos, tmp_path / "out", "data.workers=1", "save_every=1")

    def kill(*ignored):
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
        for _ in range(500):
            time.sleep(0.01)

    save = checkpoints.save_state
    with monkeypatch.context() as patch, pytest.raises(DataError, match=r"died .*Killed.*--resume") as caught:
        if moment == "writing":
            patch.setattr(checkpoints, "save_state", lambda *state: kill() if (tmp_path / "out/last").exists() else save(*state))
        train(c, progress=kill if moment == "an update" else None)
    assert "room" not in str(caught.value)
    train(replace(c, data=replace(c.data, workers=0)), resume=True)
    train(config(photos, tmp_path / "whole"))
    assert same_weights(tmp_path / "out/last/model.safetensors", tmp_path / "whole/last/model.safetensors")


def test_a_process_that_loses_the_others_says_so():
    lost = RuntimeError("[third_party/gloo/pair.cc:561] Connection closed by peer [127.0.0.1]:6801")
    with pytest.raises(TrainingError, match=r"another of the 2 processes .*closed by peer.*--resume"), loop._connected(2):
        raise lost
    for processes, error in ((1, lost), (2, RuntimeError("of our own"))):
        with pytest.raises(RuntimeError) as caught, loop._connected(processes):
            raise error
        assert caught.value is error


@pytest.mark.skipif(torch.cuda.is_available(), reason="the second launch would take its device")
@pytest.mark.parametrize(
    ("launch", "reason"),
    [({"OMPI_COMM_WORLD_SIZE": "2"}, "1 found on cpu"), ({"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, ".* expected, but not set")],
)
def test_processes_that_do_not_find_each_other_are_refused(photos, tmp_path, monkeypatch, launch, reason):
    """As on an accelerator that takes one process only: they would write over each other."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=rf"2 processes were launched.* do not find each other \({reason}.*device=cpu"):
        train(config(photos, tmp_path / "out", "device=auto"))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def few_photos(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("few"), np.random.default_rng(0)
    for split, n in (("train", 4), ("val", 1)):
        for name, brightness in (("ant", 90), ("bee", 160)):
            write_images(root / split / name, range(n), rng, brightness)
    return root


SMALLEST = [
    "model.options={patch_size: 16, embed_dim: 24, depth: 2, num_heads: 3}",
    "reducer.at=1",
    "batch_size=4",
    "save_every=1",
    "ema.decay=0.9",
]


def copies_at_every_change(c: Config, into: Path, threads: int) -> None:
    """Run in a process of its own, leaving what a kill would leave before each call that changes files, each state once."""
    torch.set_num_threads(threads)  # sums of another order have other bits
    out, seen, busy = Path(c.out), set(), []

    def before(event: str, args: tuple) -> None:
        if busy or event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
            return
        if event == "open" and not str(args[0]).startswith(c.out):
            return
        busy.append(event)
        lies = tuple((str(p.relative_to(out)), p.read_bytes() if p.is_file() else b"") for p in sorted(out.rglob("*")))
        if lies and lies not in seen:
            seen.add(lies)
            shutil.copytree(out, into / f"{len(seen):03}")
        busy.clear()

    sys.addaudithook(before)
    train(c)


def test_a_run_killed_before_any_call_on_files_resumes_to_the_same_bits(few_photos, tmp_path):
    c = config(few_photos, tmp_path / "whole", *SMALLEST, "reducer.method=dtps", "augment.mixup=0.8", "epochs=1")
    killed = tmp_path / "killed"
    # not a fork: autograd refuses to work in one whose parent has used it on another device, as tensors without values are on one
    child = multiprocessing.get_context("spawn").Process(target=copies_at_every_change, args=(c, killed, torch.get_num_threads()))
    child.start()
    child.join()
    assert child.exitcode == 0
    expected = table(Path(c.out) / "log.csv")
    moments = sorted(killed.iterdir())
    assert len(moments) > 20
    assert any((m / "last.new").exists() and (m / "last.old").exists() and not (m / "last").exists() for m in moments)
    for moment in moments:
        train(replace(c, out=str(moment)), resume=True)
        for name in ("last/model", "last/ema", "best/model", "best/ema"):
            assert same_weights(moment / f"{name}.safetensors", Path(c.out) / f"{name}.safetensors"), (moment.name, name)
        assert [untimed(row) for row in table(moment / "log.csv")] == [untimed(row) for row in expected]
        assert sorted(p.name for p in moment.iterdir()) == sorted(p.name for p in Path(c.out).iterdir())


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, to be given a size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def size(number: int, option: str = "") -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"{option}size={number}", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True) if shutil.which("mount") else None
        if done is None or done.returncode:
            pytest.skip(f"no file system can be mounted here: {'no mount' if done is None else done.stderr.strip()}")
        return folder

    yield size
    if os.path.ismount(folder):
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_really_full_disk_leaves_the_last_good_checkpoint(few_photos, tmp_path, small_disk):
    """At any size, from one that holds nothing; with room it goes on to the same bits."""
    whole = config(few_photos, tmp_path / "whole", *SMALLEST)
    train(whole)
    needed = sum(f.stat().st_size + 4096 for f in Path(whole.out).rglob("*"))
    small_disk(2**12)
    failed = []
    for share in (0.02, 0.3, 0.6, 0.9, 1.2, 3):
        out = small_disk(int(share * needed), "remount,") / str(share)
        try:
            train(replace(whole, out=str(out)))
        except (TrainingError, ConfigError) as error:
            failed.append(share)
            assert "make room" in str(error), (share, error)
            good = checkpoints.find_folder(out / "last")
            assert (good is None) or checkpoints.read_state(good)
            small_disk(10 * needed, "remount,")
            train(replace(whole, out=str(out)), resume=True)
        assert same_weights(out / "last/model.safetensors", tmp_path / "whole/last/model.safetensors")
        shutil.rmtree(out)
    assert failed[:3] == [0.02, 0.3, 0.6] and 3 not in failed


def test_corrupt_images_are_skipped_counted_and_listed_up_to_a_share(photos, tmp_path):
    rng = np.random.default_rng(1)
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            write_images(tmp_path / "set" / split / name, range(8), rng, 120)
        (tmp_path / "set" / split / "ant" / "3.png").write_bytes(b"no image")
    row = train(config(tmp_path / "set", tmp_path / "a", "data.max_unreadable=0.1")).rows[-1]
    assert (row["unreadable"], row["val_images"]) == (2, 15)
    listed = table(tmp_path / "a/unreadable.csv")
    assert [Path(r["path"]).name for r in listed] == ["3.png", "3.png"] and all(r["reason"] for r in listed)
    with pytest.raises(DataError, match=r"of 32 images cannot be read.*max_unreadable=0.01"):
        train(config(tmp_path / "set", tmp_path / "b"))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(photos, tmp_path, monkeypatch):
    c = config(photos, tmp_path, "save_every=2")
    criterion = loop._Run._criterion

    def broken(run):
        inner = criterion(run)
        return lambda logits, labels: inner(logits, labels) * (float("nan") if getattr(run, "update", 0) == 3 else 1)

    monkeypatch.setattr(loop._Run, "_criterion", broken)
    with pytest.raises(TrainingError, match=r"loss, task became nan at update 4 of epoch 1; the checkpoint before.*smaller"):
        train(c)
    kept = load_file(tmp_path / "last/model.safetensors")
    assert all(v.isfinite().all() for v in kept.values())
    assert checkpoints.load_state(tmp_path / "last/state.pt")["update"] == 2


@pytest.mark.parametrize("launcher", ["torchrun", "torchrun --device cpu", "accelerate"])
def test_two_processes_follow_the_same_curve_as_one(photos, tmp_path, launcher):
    """As one run, whether they are told to use the CPU or find nothing else."""
    settings = [*TINY, *PLAIN, "accumulate=2", "optimizer.clip=1"]
    result = train(load_config(None, {"data.folder": str(photos), "out": str(tmp_path / "one")}, settings))
    if "--device cpu" not in launcher:
        settings.remove("device=cpu")
    line = ["--data", photos, "--out", tmp_path / "two", *as_options(settings)]
    environment = {"CUDA_VISIBLE_DEVICES": ""}
    if launcher == "accelerate":  # of all its ways the only one that starts several processes on a CPU without MPI
        options = ["--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
        shards = ["--use_fsdp", "--fsdp_version=2", *options, "--module", "squeezevit", "train"]
        process = python("-m", "accelerate.commands.launch", *shards, *line, environment=environment)
    else:
        process = command(*line, processes=2, environment=environment)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert output.count("Best top-1") == 1
    rows = table(tmp_path / "two/log.csv")
    for one, two in zip(result.rows, rows, strict=True):
        assert float(two["loss"]) == pytest.approx(one["loss"], rel=1e-4)
        assert two["val_images"] == "14"
        assert float(two["top1"]) == pytest.approx(one["top1"], abs=1e-6)
    one, two = (load_file(tmp_path / name / "last/model.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(one[k], two[k], atol=1e-4) for k in one)


def decide_without_noise(logits, hard):
    soft = logits.softmax(-1)
    return torch.nn.functional.one_hot(soft.argmax(-1), 2) - soft.detach() + soft


def go_on_sharded(*outs):
    """Resume each run; a SIGTERM stops it behind the update that follows. torchrun's processes start one process group only."""
    without_noise = mock.patch.object(torch.nn.functional, "gumbel_softmax", decide_without_noise)
    one_group = mock.patch.object(torch.distributed, "destroy_process_group")
    with without_noise, one_group, mock.patch.object(sharding, "shard_", wraps=sharding.shard_) as shard_:
        for out in outs:
            assert train(load_config(Path(out) / "config.yaml"), resume=True, progress=interrupt_at(6)).signal == signal.SIGTERM
        whole_rows = load_config(Path(outs[0]) / "config.yaml", {"out": f"{outs[0]}-adafactor"}, ["optimizer.name=adafactor"])
        with pytest.raises(ConfigError, match=r"optimizer.name='adafactor' cannot update shards of parameters"):
            train(whole_rows)
    assert shard_.call_count == len(outs) + 1
    torch.distributed.destroy_process_group()


def test_shards_follow_the_same_curve_and_their_checkpoints_fit_one_process(photos, weights, tmp_path, monkeypatch):
    """One process to update 3, two with shards to update 7, over a validation, then one again: as one process all the way."""
    monkeypatch.setattr(torch.nn.functional, "gumbel_softmax", decide_without_noise)
    methods = {  # tokens are compared by a mean over those kept, which with decisions depends on how a batch is split
        "etps": ["optimizer.clip=1", "ema.decay=0.9"],
        "dtps": ["accumulate=2", "loss.tokens=0"],
    }
    common = [f"model.checkpoint={weights}", "loss.logits=0.5", "loss.tokens=0.5", *PLAIN]
    runs = {m: config(photos, tmp_path / m, f"reducer.method={m}", *common, *options) for m, options in methods.items()}
    for run in runs.values():
        train(run, progress=interrupt_at(2))
    fsdp2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    process = elsewhere(go_on_sharded, *(run.out for run in runs.values()), processes=2, environment=fsdp2)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    for method, run in runs.items():
        assert checkpoints.load_state(tmp_path / method / "last/state.pt")["update"] == 3  # of the second epoch
        expected = train(replace(run, out=str(tmp_path / f"{method}-whole"))).rows
        for mixed, one in zip(train(run, resume=True).rows, expected, strict=True):
            assert untimed(mixed) == pytest.approx(untimed(one), rel=1e-4)
        for file in (tmp_path / f"{method}-whole/last").glob("*.safetensors"):
            one, mixed = load_file(file), load_file(tmp_path / method / "last" / file.name)
            assert one.keys() == mixed.keys() and all(torch.allclose(one[k], mixed[k], atol=1e-4) for k in one)


@pytest.mark.parametrize(
    ("launcher", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP version 1, which is not supported.*--fsdp_version 2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "launched with DEEPSPEED, which is not supported"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "launched with MEGATRON_LM, which is not supported"),
    ],
)
def test_other_launchers_are_refused_before_any_work(photos, tmp_path, monkeypatch, launcher, message):
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        train(config(photos, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_tables_of_labels_give_the_same_run_as_folders(photos, tmp_path):
    for split in ("train", "val"):
        paths = sorted((photos / split).glob("*/*.png"))
        (photos / f"{split}.csv").write_text("path,label\n" + "".join(f"{p.relative_to(photos)},{p.parent.name}\n" for p in paths))
    try:
        tables = train(config(photos, tmp_path / "tables", "epochs=1"))
    finally:
        for split in ("train", "val"):
            (photos / f"{split}.csv").unlink()
    folders = train(config(photos, tmp_path / "folders", "epochs=1"))
    assert tables.rows[0]["loss"] == folders.rows[0]["loss"] and tables.rows[0]["top1"] == folders.rows[0]["top1"]


@pytest.mark.parametrize("name", recipes())
def test_recipes_load_and_build(name):
    c = load_config(name, {"data.folder": "photos"}, ["model.pretrained=false"])
    assert load_config(None, to_dict(c)) == c
    small = ["model.image_size=32", "model.options={depth: 12, embed_dim: 48, num_heads: 3}"]
    net, reducer = build.build_model(load_config(name, {"model.pretrained": False}, small), 10)
    assert state_of(net).reducer == reducer and reducer.stages(12) == (3, 6, 9)
    optimizer = build.make_optimizer(net, c.optimizer)
    schedule = build.make_schedule(optimizer, c, 100)
    schedule.step_update(c.epochs * 100)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(c.schedule.min_lr * optimizer.param_groups[0]["lr_scale"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"epochs: 3\nout: caf\xe9\n", r"mine\.yaml is not UTF-8 text \(.* at byte 18\); save it as UTF-8"),
        (b"\x00", "is not YAML"),
        (b"{" * 9000, "nested too deep"),
        (b"a: " + b"9" * 5000, r"is not YAML \(Exceeds the limit"),
        (b"a: &a [" + b"1," * 99 + b"]\nb: &b [" + b"*a," * 99 + b"]\nc: [" + b"*b," * 99 + b"]", "more than 10,000 values"),
        (b"- 1", "holds a list, not names and values"),
        (b'"\\x1b[31m' + b"x" * 500 + b'": 1', r"^.{0,90}x\.\.\. is no field"),
    ],
    ids=["latin 1", "zero", "deep", "huge", "endless", "list", "name"],
)
def test_bad_recipes_are_clear_errors_on_one_screen(tmp_path, content, message):
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(tmp_path / "mine.yaml")
    assert len(str(caught.value)) < 1500 and "\x1b" not in str(caught.value)
    with pytest.raises(ConfigError, match="neither a YAML file nor a recipe"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config("x" * 5000)


def test_fewer_epochs_than_a_recipe_anneals_shorten_that_in_proportion(tmp_path, caplog):
    """`finetune-small --epochs 1`: 2 of 15 epochs of annealing become 2/15 of one."""
    c = load_config("finetune-small", {"epochs": 1})
    assert (c.reducer.anneal_epochs, c.schedule.warmup_epochs) == (0.1333, 0.0667)
    assert "epochs=1 instead of the recipe's 15" in caplog.text and "reducer.anneal_epochs=0.1333 (of 2)" in caplog.text
    assert load_config("finetune-small", {}, ["epochs=1"]) == c
    (tmp_path / "mine.yaml").write_text(to_yaml(c))
    caplog.clear()
    assert load_config(tmp_path / "mine.yaml") == c
    assert load_config("finetune-small", {"epochs": 2}).reducer.anneal_epochs == 2
    assert not caplog.text
    with pytest.raises(ConfigError, match=r"anneal_epochs=3 is longer than epochs=1"):
        load_config("finetune-small", {"epochs": 1}, ["reducer.anneal_epochs=3"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optimiser.lr=1", r"optimiser.* is no field.*optimizer\.lr"),
        ("lr=1", r"lr is no field.*did you mean optimizer\.lr"),
        ("optimizer.lr=-1", r"optimizer\.lr=-1 cannot be used; give a number above 0"),
        ("optimizer.lr=fast", r"optimizer\.lr='fast' cannot be used"),
        (
            "epochs=9" + "9" * 100,
            r"epochs=9{50,57}\.\.\. cannot be used; give a whole number of 1 or more, below 9,223,372,036,854,775,808",
        ),
        ("model.image_size=" + "9" * 10, r"image_size=9999999999 cannot be used; give a whole number from 1 to 8192"),
        ("data.workers=100000", r"workers=100000 cannot be used; give a whole number from 0 to 256"),
        ("augment.repeats=100000", r"repeats=100000 cannot be used; give a whole number from 1 to 100"),
        ("epochs=0x" + "f" * 5000, r"epochs=a number of thousands of digits cannot be used"),
        ("seed=" + "9" * 5000, r"is not YAML \(Exceeds the limit"),
        ("optimizer.lr=1" + "0" * 400, r"optimizer\.lr=10+\.\.\. cannot be used; give a number above 0"),
        ("model.options=" + "[" * 5000, r"nested too deep"),
        ("model.options={a: " + "[" * 20 + "]" * 20 + "}", r"nested deeper than 16 levels"),
        ("model.options={a: &a [*a]}", r"nested deeper than 16 levels"),
        ("model.options={a: 2020-01-01}", r"holds a date"),
        ("model.options={a: 2020-13-45}", r"is not YAML \(month must be"),
        ("model.options={a: !!int ''}", r"is not YAML"),
        ("data.classes=nowhere.txt", r"nowhere\.txt cannot be read \(.*No such file"),
        ("epochs=1.5", r"epochs=1\.5 cannot be used; give a whole number of 1 or more"),
        ("precision=fp8", r"precision='fp8' .*one of fp32, bf16, fp16"),
        ("augment.erase=2", r"augment\.erase=2 .*from 0 to 1"),
        ("optimizer=adamw", r"optimizer='adamw' is a section"),
        ("epochs", r"--set 'epochs' has no value"),
        ("schedule.warmup_epochs=9", r"warmup_epochs=9 is longer than epochs=2"),
        ("reducer.method=tps", r"method 'tps' is not known"),
        ("reducer.options={keeps: 1}", r"do not fit etps .* its fields are keep"),
        ("model.name=vit_tinny", r"no model of timm.*near it: vit_tiny"),
        ("model.num_classes=3", r"num_classes=3, but the data have 2 classes"),
        ("model.options={depht: 3}", r"timm cannot build"),
        ("batch_size=7", r"does not divide"),
        ("batch_size=64", r"more than the 32 training images"),
        ("optimizer.name=adamm", r"optimizer\.name='adamm'"),
        ("freeze=4", r"freeze=4 leaves nothing"),
        ("augment.crop_scale=1", r"crop_scale=.* is no range"),
        ("loss.logits=0.5", r"classifier for 2 classes is untrained"),
        ("device=cuda", r"device='cuda' is not there"),
    ],
)
def test_bad_configurations_are_refused_before_any_work(photos, tmp_path, setting, message):
    if setting == "device=cuda" and torch.cuda.is_available():
        pytest.skip("it is there")
    extra = ["accumulate=2"] if setting == "batch_size=7" else []
    with pytest.raises(SqueezeViTError, match=message):
        train(config(photos, tmp_path / "out", *extra, setting))
    assert not (tmp_path / "out").exists()


def test_a_teacher_that_does_not_fit_is_refused_before_any_work(photos, tmp_path, weights):
    wider = "teacher={name: vit_tiny_patch16_224, image_size: 32, options: {patch_size: 8, embed_dim: 96, depth: 1}}"
    with pytest.raises(ConfigError, match="96 channels, the model's 48"):
        train(config(photos, tmp_path / "out", "loss.tokens=0.5", wider))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: None, "neither train/"),
        (lambda root: (root / "train").mkdir(), "no class folders"),
        (lambda root: write_images(root / "train" / "ant", [1], np.random.default_rng(0), 90), "nothing for split='val'"),
        (lambda root: [write_images(root / s / "ant", [1], np.random.default_rng(0), 9) for s in ("train", "val")], "single class"),
        (lambda root: (root / "train.csv").write_text("file,label\na.png,1\n"), "columns file, label"),
        (lambda root: (root / "train.csv").write_text("path,label\na.png,\n"), "line 2: label is empty"),
        (
            lambda root: [
                (root / f"{s}.csv").write_text(f"path,label\na.png,1\nb.png,{n}\n") for s, n in (("train", 2), ("val", 3))
            ],
            "line 3: the label '3' has no training image",
        ),
    ],
    ids=["empty", "no classes", "no validation", "single class", "columns", "no label", "wrong label"],
)
def test_bad_folders_are_refused_before_any_work(tmp_path, spoil, message):
    root = tmp_path / "set"
    root.mkdir()
    spoil(root)
    with pytest.raises(DataError, match=message):
        train(config(root, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_classes_that_differ_between_the_splits_are_a_mistake(tmp_path):
    rng = np.random.default_rng(0)
    for split, names in (("train", ("ant", "bee")), ("val", ("ant", "wasp"))):
        for name in names:
            write_images(tmp_path / split / name, [1], rng, 90)
    with pytest.raises(DataError, match="bee, wasp"):
        data.open_folder(tmp_path)


def test_heads_are_warmed_before_the_training(photos, tmp_path, caplog):
    """The first update then begins with other heads, and a run that goes on from a checkpoint does not warm them again."""
    learned = ["reducer.method=dtps", "epochs=1", "batch_size=8"]
    with caplog.at_level("INFO"):
        cold, warm = (train(config(photos, tmp_path / str(n), *learned, f"reducer.warm_steps={n}")) for n in (0, 5))
    assert caplog.text.count("score heads warmed on 5 batches") == 1
    assert cold.rows[0]["keep_ratio"] != warm.rows[0]["keep_ratio"]
    caplog.clear()
    train(config(photos, tmp_path / "5", *learned, "reducer.warm_steps=5"), resume=True)
    assert "warmed" not in caplog.text
    with pytest.raises(ConfigError, match="has no score heads to warm"):
        train(config(photos, tmp_path / "no", "reducer.warm_steps=5"))


def test_the_command_trains_prints_and_explains(photos, tmp_path, capsys):
    def run(*argv):
        with pytest.raises(SystemExit) as stop:
            main(["train", *map(str, argv)])
        return stop.value.code or 0

    options = ["--data", photos, "--out", tmp_path, *as_options([*TINY, "epochs=1"])]
    assert run(*options) == 0
    out, err = capsys.readouterr()
    assert "Best top-1" in out and "epoch 1/1" in err
    assert run(*options) == 2 and "--resume" in capsys.readouterr().err
    again = ["--from", tmp_path, "--data", photos, "--out", tmp_path / "again"]
    assert run(*again, "--epochs", 1, "--set", "data.workers=0", "--set", "batch_size=4") == 0  # goes on from its best/
    first, second = (read_card(folder / "best") for folder in (tmp_path, tmp_path / "again"))
    assert (first.host, first.reducer, first.preprocessing) == (second.host, second.reducer, second.preprocessing)
    capsys.readouterr()
    assert run(*again, "--method", "topk", "--keep", 0.6, "--print-config") == 0
    said = yaml.safe_load(capsys.readouterr().out)
    assert said["reducer"]["method"] == "topk" and said["model"]["checkpoint"] == str(tmp_path / "best/model.safetensors")
    for wrong, message in {
        ("--from", tmp_path, "--model", "vit_tiny_patch16_224"): "leave model.name out",
        ("--from", tmp_path / "last" / "nothing"): "is no bundle",
    }.items():
        assert run(*wrong, "--data", photos, "--out", tmp_path / "no") == 2 and message in " ".join(capsys.readouterr().err.split())
    assert run("--recipe", "dtps-deit-small", "--keep", "0.7,0.6,0.5", "--print-config") == 0
    text = capsys.readouterr().out
    (tmp_path / "mine.yaml").write_text(text)
    assert to_yaml(load_config(tmp_path / "mine.yaml")) == text and "0.99996" in text
    assert run("--recipe", "dtps-deit-smal") == 2 and "recipes are" in capsys.readouterr().err


def test_a_model_that_diverged_is_neither_scored_nor_saved(photos, tmp_path):
    """One huge step: the loss before it was finite, what it leaves is not."""
    huge = ["epochs=1", "batch_size=32", "optimizer.name=sgd", "optimizer.lr=1e30", "schedule.warmup_epochs=0"]
    with pytest.raises(TrainingError, match=r"outputs of 14 of 14 validation images are not finite; there is no checkpoint yet"):
        train(config(photos, tmp_path / "run", *huge))
    assert not (tmp_path / "run" / "best").exists() and not (tmp_path / "run" / "last").exists()


def test_options_take_numbers_with_an_exponent():
    c = load_config(None, {"out": "1e5"}, [*TINY, "optimizer.options={eps: 1e-8}"])
    assert c.optimizer.options == {"eps": 1e-8}
    build.make_optimizer(build.create_model(c.model, 2), c.optimizer)
    assert "eps: 1.0e-08" in to_yaml(c) and "out: '1e5'" in to_yaml(c)


def test_a_teacher_gets_images_as_it_wants_them(weights):
    """The oracle: the teacher's own normalisation of the pixels that the student's came from."""
    given = ["loss.logits=1", "teacher.name=vit_tiny_patch16_224", f"teacher.checkpoint={weights}"]
    c = load_config(None, {}, [*TINY, *given])
    c = replace(c, teacher=replace(c.teacher, options=c.model.options))
    student = build.create_model(c.model, 2)
    teacher = build.build_teacher(c, student, 2)
    assert teacher.patch_embed.img_size == (32, 32)  # the student's, though nobody said so
    assert build.pixels_between(student, teacher) is None
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    student.pretrained_cfg = {**student.pretrained_cfg, "mean": mean, "std": std}
    mean, std = (torch.tensor(v)[:, None, None] for v in (mean, std))
    pixels = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(build.pixels_between(student, teacher)((pixels - mean) / std), (pixels - 0.5) / 0.5)
    with pytest.raises(ConfigError, match=r"teacher.image_size=64, but the model is trained on 32"):
        build.build_teacher(replace(c, teacher=replace(c.teacher, image_size=64)), student, 2)
