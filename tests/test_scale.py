"""On Ray: every photograph has its row whatever is killed, and a shard is seen only when whole. Searching what was written."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from typer.testing import CliRunner

import squeezevit as sv
from squeezevit import embed as here
from squeezevit.embed.reading import Patience, ahead
from squeezevit.errors import ConfigError, DataError, MissingExtraError, RunError
from squeezevit.scale import Cluster, embed, predict, stores
from squeezevit.scale.reading import content_of, items
from squeezevit.scale.search import about, features, nearest, questioner
from squeezevit.scale.sources import Part, Source, cut, found
from squeezevit.scale.table import Table, manifest
from squeezevit.scale.table import rows_of as shards_of
from squeezevit.scale.work import Decode

parquet = pytest.importorskip("pyarrow.parquet")
ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")
pa = pytest.importorskip("pyarrow")
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")

SIZES = {"patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2}
COUNT = 60
SETTINGS = here.Settings(4)
SMALL = Cluster(threads=1, shard=8)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5, **SIZES).eval()
    torch.nn.init.normal_(net.head.weight, std=0.5)
    folder = tmp_path_factory.mktemp("bundle") / "tiny"
    sv.save(net, folder, options=SIZES, classes=["a", "b", "c", "d", "e"])
    return folder


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (36, 40, 3), dtype=np.uint8))


def png(seed: int) -> bytes:
    content = io.BytesIO()
    picture(seed).save(content, "PNG")
    return content.getvalue()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Sixty small photographs in two folders, three of them spoilt."""
    root = tmp_path_factory.mktemp("photographs")
    for i in range(COUNT):
        folder = root / ("a" if i < 40 else "b")
        folder.mkdir(exist_ok=True)
        (folder / f"{i:03}.png").write_bytes(png(i))
    (root / "a/003.png").write_bytes(b"")
    (root / "a/020.png").write_bytes(png(20)[:200])
    (root / "b/050.png").write_text("no picture")
    return root


@pytest.fixture(scope="module")
def plain(bundle, photographs, tmp_path_factory) -> list[dict]:
    """What the command without Ray says."""
    out = tmp_path_factory.mktemp("plain") / "f.parquet"
    here.embed([photographs], here.open_engine(bundle, features=True), out, SETTINGS)
    return parquet.read_table(out).to_pylist()


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    """A bucket of an object store on this machine, whose address and keys the environment tells."""
    moto = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    server = moto.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    told = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.get_host_and_port()[1]}", "AWS_DEFAULT_REGION": "us-east-1"}
    told |= {"AWS_ACCESS_KEY_ID": "anyone", "AWS_SECRET_ACCESS_KEY": "anything"}
    with pytest.MonkeyPatch.context() as patched:
        for name, value in told.items():
            patched.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="photographs")
        yield "s3://photographs"
    server.stop()


@pytest.fixture(scope="module")
def local(store) -> Iterator[None]:
    """One Ray for all tests of this file that want one; its processes know the store."""
    ray.init("local", num_cpus=3, include_dashboard=False, logging_level="ERROR", log_to_driver=False, object_store_memory=2**28)
    yield
    ray.shutdown()


def rows_of(out: Path | str) -> list[dict]:
    """All rows, in the order of the manifest, which counts them rightly."""
    told, rows = manifest(str(out)), []
    for shard in told["shards"]:
        system, path = stores.opened(f"{out}/{shard['file']}")
        rows += parquet.read_table(path, filesystem=system).to_pylist()
    assert told["rows"] == len(rows) and told["ok"] == sum(row["status"] == "ok" for row in rows)
    return rows


def same(rows: list[dict], plain: list[dict], named: Callable[[str], str] = str) -> None:
    """Each photograph once, in order, with the features and the reasons of the command without Ray."""
    assert [row["file"] for row in rows] == [named(row["file"]) for row in plain]
    for row, other in zip(rows, plain, strict=True):
        assert (row["status"], row["reason"]) == (other["status"], other["reason"])
        assert (row["features"] is None) == (other["features"] is None)
    mine, theirs = ([r["features"] for r in t if r["features"]] for t in (rows, plain))
    assert np.allclose(mine, theirs, atol=1e-5)


def processes(name: str) -> list[int]:
    """Of Ray's workers, those that do this now."""
    import psutil

    return [p.pid for p in psutil.process_iter() if p.is_running() and any(name in part for part in _cmdline(p))]


def _cmdline(process: Any) -> list[str]:
    import psutil

    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_a_folder_in_a_store_gives_the_rows_of_the_plain_command(local, store, bundle, photographs, plain):
    for file in photographs.rglob("*.png"):
        stores.write(f"{store}/in/{file.relative_to(photographs)}", file.read_bytes())
    stores.write(f"{store}/in/.hidden/000.png", b"1")
    out = f"{store}/out"
    done = embed([f"{store}/in"], bundle, out, SETTINGS, cluster=SMALL)
    same(rows_of(out), plain, lambda name: f"{store}/in/{Path(name).relative_to(photographs)}")
    assert (done.rows, done.ok, done.shards, done.new_rows) == (COUNT, COUNT - 3, 8, COUNT)
    told = manifest(out)
    assert told["model"] == done.model and told["bundle"] == str(bundle) and len(told["shards"]) == 8
    again = embed([f"{store}/in"], bundle, out, SETTINGS, cluster=SMALL)
    assert (again.rows, again.new_rows, again.new_shards) == (COUNT, 0, 0)
    hits = nearest(out, features([f"{store}/in/b/045.png"], questioner(told), told), 3)
    assert hits[0][0].file == f"{store}/in/b/045.png" and hits[0][0].similarity > 0.9999


def test_a_full_disk_and_then_killed_workers(local, bundle, photographs, plain, tmp_path, monkeypatch):
    """The disk is full at the third shard; the run that goes on loses its actor, and then a decoding worker, to SIGKILL."""
    out, put, calls = tmp_path / "out", stores._put, []

    def full(system, path, content):
        calls.append(path)
        if len([call for call in calls if "part-" in call]) == 3:
            put(system, path, content[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        put(system, path, content)

    with monkeypatch.context() as patched:
        patched.setattr(stores, "_put", full)
        with pytest.raises(RunError, match=r"No space left.*2 of 8 shards are whole, and the same command goes on"):
            embed([str(photographs)], bundle, str(out), SETTINGS, cluster=SMALL)
    assert len(list(out.glob("part-*.parquet"))) == 2 and not list(out.rglob("*.new")) and not (out / "_manifest.json").exists()
    with pytest.raises(DataError, match=r"not whole.*run its command again"):
        about(str(out))
    killed, parents = [], set()

    def kill(what: str, done: int, total: int | None) -> None:
        assert total == COUNT
        parents.update(processes("MapBatches(Model)"))
        if done > 16 and not killed:
            killed.extend([*processes("MapBatches(Model)"), *processes("FlatMap(Decode)")])
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    done = embed([str(photographs)], bundle, str(out), SETTINGS, cluster=SMALL, progress=kill)
    assert killed and parents and done.new_shards == 6
    same(rows_of(out), plain)


def test_a_killed_driver_goes_on_and_spoilt_shards_are_made_again(local, bundle, photographs, plain, tmp_path):
    """SIGKILL of the process that writes, with a Ray of its own; two of its shards are then spoilt, and one is of another run."""
    out = tmp_path / "out"
    code = (
        "import os, signal, sys\n"
        "from squeezevit.scale import *\n"
        "from squeezevit.embed import Settings\n"
        "end = lambda what, done, total: done >= 24 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "embed(sys.argv[1:2], sys.argv[2], sys.argv[3], Settings(4), cluster=Cluster(threads=1, shard=8), progress=end)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, photographs, bundle, out], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    shards = sorted(out.glob("part-*.parquet"))
    assert len(shards) == 3 and not (out / "_manifest.json").exists()
    whole = shards[2].read_bytes()
    shards[0].write_bytes(shards[0].read_bytes()[:-100])
    shards[1].write_bytes(whole)  # another part
    done = embed([str(photographs)], bundle, str(out), SETTINGS, cluster=SMALL)
    assert done.new_shards == 7 and done.rows == COUNT
    same(rows_of(out), plain)


def tar_of(file: Path, numbers: range, spoil: Callable[[bytes], bytes] = bytes) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for i in numbers:
            for suffix, inside in (("cls", b"1"), ("png", png(i))):
                member = tarfile.TarInfo(f"{i:03}.{suffix}")
                member.size = len(inside)
                archive.addfile(member, io.BytesIO(inside))
    file.write_bytes(spoil(content.getvalue()))


def test_the_commands_on_webdataset_shards_one_of_them_cut_off(local, bundle, tmp_path):
    from squeezevit.cli import app

    tar_of(tmp_path / "0.tar", range(5))
    tar_of(tmp_path / "1.tar", range(5, 9), lambda content: content[: len(content) // 2])
    (tmp_path / "2.tar").write_bytes(b"")
    out = tmp_path / "classes"
    given = ["predict", f"{tmp_path}/*.tar", "--from", bundle, "--out", out, "--engine-on", "ray", "--threads", 1, "--top-k", 2]
    told = CliRunner().invoke(app.app, list(map(str, given)), catch_exceptions=False)
    assert told.exit_code == 0 and "3 shards" in told.output, told.output
    rows = rows_of(out)
    assert [row["file"] for row in rows[:5]] == [f"{tmp_path}/0.tar/{i:03}.png" for i in range(5)]
    assert rows[5]["file"] == f"{tmp_path}/1.tar/005.png" and rows[-1]["file"] == f"{tmp_path}/2.tar"
    broken = [row for row in rows if row["file"] == f"{tmp_path}/1.tar"]
    assert len(broken) == 1 and "this shard cannot be read after" in broken[0]["reason"]
    opened = here.open_engine(bundle)
    for i, row in enumerate(rows[:5]):
        how = opened.card.preprocessing
        logits = torch.tensor(opened.run(how(picture(i).convert("RGB"))[None])[0]).double()
        best = logits.softmax(0).max(0)
        assert row["class"] == "abcde"[int(best.indices)] and row["probability"] == pytest.approx(float(best.values), rel=1e-4)
        assert len(row["top_classes"]) == 2


def decoded(source: Source, parts: list[Part], bundle: Path, patience: float = 60.0) -> list[tuple[str, Any]]:
    """Names, and pixels or reasons, of all photographs, as the decoding tasks give them, in this process."""
    how = here.open_engine(bundle).card.preprocessing
    out = []
    for part in parts:
        rows = list(Decode(source, how, None, 4, 2, patience)(part.__dict__))
        assert [row["batch"] for row in rows] == list(range(len(rows))) and [row["last"] for row in rows][-1:] == [True]
        for row in rows:
            assert row["images"].shape == (4, 3, 32, 32) and row["images"].dtype == np.uint8
            told = json.loads(row["told"])
            images = iter(row["images"])
            out += [(name, next(images) if reason is None else reason) for name, reason in told]
    return out


def seeds(rows: list[tuple[str, Any]], bundle: Path) -> list[int | str]:
    """Which picture each row is, or why it is none."""
    how = here.open_engine(bundle).card.preprocessing
    known = {how.cut(picture(i)).tobytes(): i for i in range(COUNT)}
    return [row if isinstance(row, str) else known[row.tobytes()] for _, row in rows]


def listed(addresses: list[str], tmp_path: Path, rows: int = 5, column: str | None = None, names: str | None = None) -> Any:
    folder = tmp_path / "listing"
    folder.mkdir(exist_ok=True)
    return cut(*found(addresses, column, names), str(folder), rows)


def test_sources_of_files(bundle, photographs, tmp_path, monkeypatch):
    folder = listed([str(photographs)], tmp_path)
    assert len(folder[1]) == 12 and [part.rows for part in folder[1]] == [5] * 12
    assert seeds(decoded(*folder, bundle), bundle) == [
        "empty file (0 bytes)" if i == 3 else i if i not in (20, 50) else r for i, (_, r) in enumerate(decoded(*folder, bundle))
    ]
    monkeypatch.chdir(photographs)
    pattern = listed(["b/*[12].png"], tmp_path)
    assert [name for name, _ in decoded(*pattern, bundle)] == ["b/041.png", "b/042.png", "b/051.png", "b/052.png"][:0] + [
        f"b/0{i}.png" for i in (41, 42, 51, 52)
    ]
    (tmp_path / "list.txt").write_text("b/045.png\na/001.png\nb/gone.png\nb/045.png\n")
    rows = decoded(*listed([str(tmp_path / "list.txt")], tmp_path), bundle)
    assert seeds(rows, bundle) == [45, 1, "No such file or directory"] and rows[0][0] == "b/045.png"
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/odd\xff"))
    odd.mkdir()
    (odd / "1.png").write_bytes(png(1))
    assert seeds(decoded(*listed([str(odd)], tmp_path), bundle), bundle) == [1]


def test_sources_of_parquet(bundle, photographs, tmp_path):
    def table(name: str, columns: dict[str, Any]) -> str:
        parquet.write_table(pa.table(columns), tmp_path / f"{name}.parquet", row_group_size=3, write_page_checksum=True)
        return str(tmp_path / f"{name}.parquet")

    content = [png(i) for i in range(7)]
    bytes_ = table("bytes", {"id": [f"n{i}" for i in range(7)], "jpg": [*content[:6], None]})
    rows = decoded(*listed([bytes_], tmp_path), bundle)
    assert seeds(rows, bundle) == [0, 1, 2, 3, 4, 5, "nothing in this row"] and rows[3][0] == f"{bytes_}#1.0"
    assert [name for name, _ in decoded(*listed([bytes_], tmp_path, names="id"), bundle)] == [f"n{i}" for i in range(7)]
    paths = table("paths", {"where": ["a/001.png", str(photographs / "b/041.png")]})
    (tmp_path / "a").mkdir()
    (tmp_path / "a/001.png").write_bytes(content[1])
    assert seeds(decoded(*listed([paths], tmp_path), bundle), bundle) == [1, 41]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    hugging = pa.array([{"bytes": content[2], "path": "x.png"}, {"bytes": None, "path": str(photographs / "a/004.png")}], struct)
    assert seeds(decoded(*listed([table("hugging", {"image": hugging, "label": [1, 2]})], tmp_path), bundle), bundle) == [2, 4]
    two = table("two", {"a": content, "b": content})
    with pytest.raises(ConfigError, match=r"a \(binary\), b \(binary\); say by --column"):
        listed([two], tmp_path)
    with pytest.raises(ConfigError, match=r"--column c: .* choose one of them"):
        listed([two], tmp_path, column="c")
    assert seeds(decoded(*listed([two], tmp_path, column="b"), bundle), bundle) == list(range(7))
    spoilt = bytearray(Path(bytes_).read_bytes())
    spoilt[spoilt.index(content[4][20:60])] ^= 255
    Path(bytes_).write_bytes(spoilt)
    (tmp_path / "none.parquet").write_bytes(b"PAR1")
    told = seeds(decoded(*listed([bytes_, str(tmp_path / "none.parquet")], tmp_path, column="jpg"), bundle), bundle)
    assert told[:3] == [0, 1, 2] and "this shard cannot be read from its beginning" in told[3] and told[4] == "nothing in this row"
    assert "this shard cannot be read" in told[5] and len(told) == 6


@pytest.mark.parametrize("where", ["header", "between", "content"])
def test_a_spoilt_tar_never_loses_photographs_silently(where, tmp_path):
    """tarfile takes a header that it cannot read for the end."""

    def spoil(content: bytes) -> bytes:
        at = content.index(b"002.png")
        if where == "header":
            return content[:at] + b"\xff" * 500 + content[at + 500 :]
        return content[:at] if where == "between" else content[: at + 700]

    tar_of(tmp_path / "x.tar", range(4), spoil)
    read = list(items(Part(0, str(tmp_path / "x.tar")), Source("tar")))
    assert [Path(item.name).name for item in read] == ["000.png", "001.png", "x.tar"]
    assert "this shard cannot be read after 2 photographs" in (read[-1].reason or "")


def test_a_slow_file_delays_nobody_for_long(bundle, tmp_path, monkeypatch):
    """One that hangs is a row with the reason, one that is merely slow has its answer, and so have those behind them."""
    read, let_go = stores.read, threading.Event()

    def slow(address: str) -> bytes:
        if address.endswith("hangs.png"):
            let_go.wait(60)
        elif address.endswith("late.png"):
            time.sleep(0.3)
        return read(address)

    names = ["0.png", "hangs.png", "1.png", "late.png", "2.png", "3.png"]
    for i, name in enumerate(names):
        stores.write(f"file://{tmp_path}/{name}", png(i))
    monkeypatch.setattr(stores, "read", slow)
    (tmp_path / "list.txt").write_text("".join(f"file://{tmp_path}/{name}\n" for name in names))
    monkeypatch.setattr(stores, "read", read)
    source = listed([str(tmp_path / "list.txt")], tmp_path, rows=6)
    monkeypatch.setattr(stores, "read", slow)
    start = time.monotonic()
    rows = decoded(*source, bundle, patience=2.0)
    let_go.set()
    assert seeds(rows, bundle) == [0, "not read within 2 seconds", 2, 3, 4, 5] and time.monotonic() - start < 20


def test_reading_ahead_gives_up_one_item_and_keeps_the_order():
    hangs = threading.Event()
    wait = {3: 30.0, 5: 30.0}
    patience = Patience[int, int](0.5, lambda i: -i)
    out = list(ahead(lambda i: (hangs.wait(wait.get(i, 0.0)), i)[1], range(9), 2, 4, patience))
    hangs.set()
    assert out == [0, 1, 2, -3, 4, -5, 6, 7, 8]


def test_a_store_that_fails_is_asked_again(bundle, tmp_path, monkeypatch):
    calls = []

    def shaky(address: str) -> bytes:
        calls.append(address)
        if len(calls) < 3:
            raise OSError("Service Unavailable")
        return png(7)

    (tmp_path / "list.txt").write_text("s3://nowhere/7.png\n")
    source = listed([str(tmp_path / "list.txt")], tmp_path)
    monkeypatch.setattr(stores, "read", shaky)
    monkeypatch.setattr("squeezevit.scale.reading.PAUSE", 0.0)
    assert seeds(decoded(*source, bundle), bundle) == [7]
    monkeypatch.setattr(stores, "read", lambda address: (_ for _ in ()).throw(OSError("Service Unavailable")))
    assert seeds(decoded(*source, bundle), bundle) == ["it cannot be fetched: Service Unavailable"]


def test_a_file_is_seen_only_when_whole(tmp_path, monkeypatch):
    file, put = tmp_path / "x", stores._put
    stores.write(str(file), b"old")

    def torn(system, path, content):
        put(system, path, content[:1])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stores, "_put", torn)
    with pytest.raises(OSError, match="No space"):
        stores.write(str(file), b"new")
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]
    monkeypatch.undo()
    stores.write("memory://shelf/x", b"1")  # of fsspec
    assert stores.inside("memory://shelf") == [("memory://shelf/x", 1)] and stores.read("memory://shelf/x") == b"1"


def begun(out: Path, photographs: Path, **other: Any) -> Table:
    run = {"command": "embed", "model": "m", "preprocessing": {}, **other}
    return Table(str(out), run, lambda listing: cut(*found([str(photographs)], None, None), listing, 8))


def test_another_run_in_its_place_is_refused(photographs, tmp_path):
    table = begun(tmp_path / "t", photographs)
    with pytest.raises(ConfigError, match="another process is writing"):
        begun(tmp_path / "t", photographs)
    table.close()
    again = begun(tmp_path / "t", tmp_path / "gone")  # the photographs that it began with, not those that are there now
    assert again.parts == table.parts and again.id == table.id and len(again.parts) == 8
    again.close()
    with pytest.raises(ConfigError, match="holds a run with model m, and this one has n; run the command as it was begun"):
        begun(tmp_path / "t", photographs, model="n")
    (tmp_path / "u").mkdir()
    (tmp_path / "u/x.parquet").write_bytes(b"")
    with pytest.raises(ConfigError, match="Parquet files that are not of this run"):
        begun(tmp_path / "u", photographs)


def test_only_whole_shards_of_this_run_and_part_count(photographs, tmp_path):
    """Whatever lies in a shard's place: its footer says whose it is, and a shard that was cut off has none."""
    schema = pa.schema({"file": pa.string(), "status": pa.string(), "reason": pa.string()})

    def batch(*names: str) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, schema) as out:
            rows = [{"file": n, "status": "ok" if n < "x" else "unreadable", "reason": None} for n in names]
            out.write_table(pa.Table.from_pylist(rows, schema))
        return sink.getvalue().to_pybytes()

    table, other = begun(tmp_path / "t", photographs), begun(tmp_path / "other", photographs, model="n")
    told, failed = table.commit(0, [batch("a", "x"), batch("b")])
    assert (told["rows"], told["ok"], [row["file"] for row in failed]) == (3, 2, ["x"])
    for number in range(1, 5):
        table.commit(number, [batch(str(number))])
    other.commit(1, [batch("1")])
    files = [Path(table.address(number)) for number in range(5)]
    files[1].write_bytes(Path(other.address(1)).read_bytes())
    files[2].write_bytes(files[3].read_bytes())
    files[4].write_bytes(files[4].read_bytes()[:-1])
    done = table.done()
    assert set(done) == {0, 3} and done[0] == told
    with pytest.raises(KeyError):
        table.finish(done)
    for part in table.parts:
        done[part.number] = table.commit(part.number, [batch(str(part.number))])[0]
    table.finish(done)
    assert [row["file"] for row in rows_of(tmp_path / "t")] == [str(part.number) for part in table.parts]
    spoilt = bytearray(files[2].read_bytes())
    spoilt[10] ^= 255
    files[2].write_bytes(spoilt)
    with pytest.raises(DataError, match=r"part-0000002\.parquet is not as it was written"):
        list(shards_of(str(tmp_path / "t"), ["file"]))


def test_what_cannot_be_meant_is_refused_before_ray_starts(bundle, photographs, tmp_path, monkeypatch):
    monkeypatch.setattr("squeezevit.scale.job._ray", lambda cluster: (_ for _ in ()).throw(AssertionError("Ray was started")))
    out, given = str(tmp_path / "out"), [str(photographs)]
    tar_of(tmp_path / "0.tar", range(1))
    (tmp_path / "empty").mkdir()
    for call, kind, told in (
        (lambda: embed([str(tmp_path / "gone")], bundle, out), DataError, "does not exist"),
        (lambda: embed([str(tmp_path / "empty")], bundle, out), DataError, "holds nothing that can be read"),
        (lambda: embed([], bundle, out), DataError, "no photographs are given"),
        (lambda: embed([*given, str(tmp_path / "0.tar")], bundle, out), DataError, "hold files and tar"),
        (lambda: embed(given, bundle, out, cluster=Cluster(column="x")), ConfigError, "are of Parquet files"),
        (lambda: embed(["s3://me:secret@bucket/x"], bundle, out), ConfigError, "give them in the environment"),
        (lambda: embed(["nosuch://bucket/x"], bundle, out), ConfigError, "no file system that is installed"),
        (lambda: embed(given, bundle, out, engine="onnx"), ConfigError, "leave --engine out"),
        (lambda: predict(given, bundle, out, top_k=0), ConfigError, "top_k=0"),
        (lambda: embed(given, bundle, out, here.Settings(workers=0)), ConfigError, "workers=0"),
        (lambda: Cluster(actors=0), ConfigError, "actors=0"),
    ):
        with pytest.raises(kind, match=told):
            call()
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "pyarrow.fs", None)
        with pytest.raises(MissingExtraError, match=r"squeezevit\[ray\]"):
            embed(given, bundle, out)


@pytest.mark.parametrize("suffix", ["npy", "parquet"])
def test_search_is_exact_and_its_page_shows_the_pictures(suffix, bundle, photographs, plain, tmp_path):
    pytest.importorskip("faiss")
    from squeezevit.cli import app

    table, page = str(tmp_path / f"f.{suffix}"), tmp_path / "page.html"
    here.embed([photographs], here.open_engine(bundle, features=True), table, SETTINGS)
    told = about(table)
    queries = features([str(photographs / "a/007.png"), str(photographs / "b/058.png")], questioner(told, bundle), told)
    good = [row for row in plain if row["status"] == "ok"]
    rows = np.array([row["features"] for row in good])
    cosines = queries @ rows.T / np.linalg.norm(queries, axis=1)[:, None] / np.linalg.norm(rows, axis=1)
    for hits, similar in zip(nearest(table, queries, 100), cosines, strict=True):
        assert [hit.file for hit in hits] == [good[i]["file"] for i in np.argsort(-similar)]
        assert np.allclose([hit.similarity for hit in hits], np.sort(similar)[::-1], atol=1e-5)
    with pytest.raises(ConfigError, match="does not say where its bundle lies"):
        questioner(told)
    with pytest.raises(ConfigError, match="they do not compare"):
        questioner({**told, "model": "0" * 64}, bundle)
    with pytest.raises(DataError, match="cannot be read"):
        features([str(photographs / "b/050.png")], questioner(told, bundle), told)
    given = ["search", table, "--image", photographs / "a/007.png", "--from", bundle, "--out", page, "--top-k", 4]
    done = CliRunner().invoke(app.app, list(map(str, given)), catch_exceptions=False)
    assert done.exit_code == 0 and "007.png" in done.output
    assert page.read_text().count("data:image/jpeg") == 5 and page.read_text().count("<strong>") == 4


def test_relative_addresses_are_of_the_folder_where_the_run_began(bundle, photographs, tmp_path, monkeypatch):
    """Ray's workers begin in folders of their own."""
    (tmp_path / "pq/img").mkdir(parents=True)
    (tmp_path / "pq/img/1.png").write_bytes(png(1))
    parquet.write_table(pa.table({"where": ["img/1.png"]}), tmp_path / "pq/x.parquet")
    tar_of(tmp_path / "t.tar", range(2))
    monkeypatch.chdir(tmp_path)
    begun_with = [cut(*found([address], None, None), "listing", 5) for address in ("pq/*.parquet", "t.tar")]
    table = begun(Path("out"), photographs)
    names = [item.name for source, parts in begun_with for part in parts for item in items(part, source)]
    table.close()
    monkeypatch.chdir("/")
    rows = [row for source, parts in begun_with for row in decoded(source, parts, bundle)]
    assert seeds(rows, bundle) == [1, 0, 1] and [name for name, _ in rows] == names
    shown = [content_of(name, source)[0] for name, (source, _) in zip(names[:1], begun_with, strict=False)]
    assert shown == [str(tmp_path / "pq/img/1.png")]
    assert len([item for part in table.parts for item in items(part, table.source)]) == COUNT


def test_a_list_of_the_run_that_is_not_seen_ends_it(photographs, tmp_path):
    source, parts = listed([str(photographs)], tmp_path)
    (tmp_path / "listing/00000.parquet").unlink()
    with pytest.raises(RunError, match=r"the run's own list, cannot be read here .* every machine"):
        list(items(parts[0], source))


def test_folders_patterns_and_lists_say_what_they_take(photographs, tmp_path):
    for name in ("a.png", ".hid.png", "._a.png", "sub/b.png", "sub/.c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(1))
    assert found([f"{tmp_path}/*.png"], None, None)[1] == [f"{tmp_path}/a.png"]
    assert found([f"{tmp_path}/**/*.png"], None, None)[1] == [f"{tmp_path}/a.png", f"{tmp_path}/sub/b.png"]
    if sys.version_info < (3, 13):
        with pytest.raises(DataError, match=r"is no pattern .*; write \*\* alone between slashes"):
            found([f"{tmp_path}/**.png"], None, None)
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfb/1.png\n")
    assert found([str(tmp_path / "list.txt")], None, None)[1] == ["b/1.png"]
    tar_of(tmp_path / "t.tar", range(2))
    with pytest.raises(DataError, match=r"holds 2 images, as .*a.png, and 1 shards, as .*t.tar; give one kind"):
        found([str(tmp_path)], None, None)


def test_a_shard_without_features_hides_no_other(tmp_path):
    from squeezevit.scale.search import Hit

    rows = {"file": ["x", "y"], "status": ["failed", "ok"], "features": [None, [1.0, 0.0]]}
    kinds = pa.schema([("file", pa.string()), ("status", pa.string()), ("features", pa.list_(pa.float32()))])
    with parquet.ParquetWriter(tmp_path / "f.parquet", kinds) as out:
        for i in range(2):
            out.write_table(pa.table({k: v[i : i + 1] for k, v in rows.items()}, schema=kinds))
    from squeezevit.scale import search

    found_there = list(search._blocks(str(tmp_path / "f.parquet")))
    assert [names for names, _ in found_there] == [["y"]] and found_there[0][1].shape == (1, 2)
    assert nearest(str(tmp_path / "f.parquet"), np.array([[1.0, 0.0]], np.float32), 1) == [[Hit("y", 1.0)]]
    parquet.write_table(pa.table({"file": ["x"], "class": ["a"]}), tmp_path / "p.parquet")
    with pytest.raises(DataError, match="holds no features; give a table that `squeezevit embed` wrote"):
        about(str(tmp_path / "p.parquet"))


def test_a_file_system_without_locks_is_used_all_the_same(tmp_path, monkeypatch):
    import fcntl

    from squeezevit.embed.tables import locked

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (tmp_path / "x").open("wb") as file:
        assert locked(file)
