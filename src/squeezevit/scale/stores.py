"""File systems by their addresses: this machine's, s3, gs and whatever else pyarrow or fsspec opens."""

import os
from functools import cache
from pathlib import Path
from typing import Any

from squeezevit.errors import ConfigError, MissingExtraError

_PUT = ("s3", "gcs", "gs", "abfs", "az")  # stores that show an object only when all of it has arrived


def arrow(module: str) -> Any:
    """A module of pyarrow. Raises MissingExtraError where it is not installed."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(f'tables of shards need pyarrow ({error}): run `pip install "squeezevit[ray]"`') from error


def opened(address: str) -> tuple[Any, str]:
    """The pyarrow file system of an address, and the path in it. Raises ConfigError where there is no such file system.

    Addresses without a scheme are of this machine. Keys and end points of stores are those of the environment.
    """
    if "://" not in address:
        return arrow("pyarrow.fs").LocalFileSystem(), Path(address).absolute().as_posix()
    scheme, _, rest = address.partition("://")
    if scheme == "file":
        return arrow("pyarrow.fs").LocalFileSystem(), rest
    if "?" in rest or "@" in rest.partition("/")[0]:
        raise ConfigError(
            f"{scheme}://... carries keys or options, which would be written into the table; give them in the environment, "
            "as AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL"
        )
    place, _, below = rest.partition("/")
    system, head = _store(scheme, place)
    return system, f"{head}/{below}".strip("/") if head else below


@cache
def _store(scheme: str, place: str) -> tuple[Any, str]:
    """The file system of a bucket, asked once for where it lies."""
    fs = arrow("pyarrow.fs")
    try:
        return fs.FileSystem.from_uri(f"{scheme}://{place}")
    except (arrow("pyarrow").ArrowInvalid, NotImplementedError):
        pass  # none of pyarrow's own
    except OSError as error:
        raise ConfigError(f"{scheme}://{place} cannot be opened ({error}); check its name, your keys and the network") from error
    try:
        import fsspec

        system, path = fsspec.core.url_to_fs(f"{scheme}://{place}")
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{scheme}:// is no file system that is installed here ({error}); install its package") from error
    return fs.PyFileSystem(fs.FSSpecHandler(system)), path


def read(address: str) -> bytes:
    """All of a file. Raises OSError."""
    system, path = opened(address)
    with system.open_input_file(path) as file:
        return bytes(file.readall())


def is_folder(address: str) -> bool:
    system, path = opened(address)
    return bool(system.get_file_info(path).type == arrow("pyarrow.fs").FileType.Directory)


def exists(address: str) -> bool:
    system, path = opened(address)
    return bool(system.get_file_info(path).type != arrow("pyarrow.fs").FileType.NotFound)


def inside(folder: str, recursive: bool = True) -> list[tuple[str, int]]:
    """Addresses and bytes of the files in a folder, sorted; none where there is no such folder. What is hidden is passed over."""
    fs = arrow("pyarrow.fs")
    system, path = opened(folder)
    found = system.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=recursive))
    length = len(path.strip("/"))
    files = ((file.path.strip("/")[length:].lstrip("/"), file.size) for file in found if file.type == fs.FileType.File)
    seen = ((below, size) for below, size in files if not any(part.startswith(".") for part in below.split("/")))
    return [(beneath(folder, below), size) for below, size in sorted(seen)]


def beneath(folder: str, name: str) -> str:
    """The address of a file in a folder."""
    return f"{folder.rstrip('/')}/{name}" if folder.rstrip("/") else f"/{name}"


def within(base: str, address: str) -> str:
    """An address that may be a path from `base`, which is a folder of this machine or of a store."""
    if "://" in address or not base:
        return address
    return beneath(base, address) if "://" in base else Path(base, address).as_posix()


def make(folder: str) -> None:
    system, path = opened(folder)
    system.create_dir(path, recursive=True)


def write(address: str, content: bytes, beside: str | None = None) -> None:
    """Write a file that nobody sees before it is whole: beside it and renamed, or at once where the store is such.

    beside: the folder where it is written first, None: its own. Raises OSError; what was there before is then still there.
    """
    system, path = opened(address)
    if any(name in system.type_name for name in _PUT):
        _put(system, path, content)
        return
    new = f"{path}.new" if beside is None else f"{opened(beside)[1]}/{path.rpartition('/')[2]}.new"
    try:
        _put(system, new, content)
        if system.type_name == "local":
            _sync(new)
        system.move(new, path)
    except BaseException:
        if system.get_file_info(new).type == arrow("pyarrow.fs").FileType.File:
            system.delete_file(new)
        raise
    if system.type_name == "local":
        _sync(path.rpartition("/")[0])


def _put(system: Any, path: str, content: bytes) -> None:
    with system.open_output_stream(path) as file:
        file.write(content)


def _sync(path: str) -> None:
    """Bring a file or a folder to the disk, so that a name never stands for less than was written."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
