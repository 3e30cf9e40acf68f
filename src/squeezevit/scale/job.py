"""The run: Ray Data takes parts through tasks that decode and actors that hold the model; this process writes the shards."""

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from squeezevit.embed.engines import choose
from squeezevit.embed.job import SHOWN, Settings, card_sum, told
from squeezevit.embed.reading import at_least, usable_cores
from squeezevit.embed.tables import Row
from squeezevit.errors import ConfigError, DataError, MissingExtraError, RunError, SqueezeViTError
from squeezevit.export.engines import identity
from squeezevit.scale.sources import Part, cut, found
from squeezevit.scale.table import Table
from squeezevit.scale.work import Decode, Model, Task, files_of

Report = Any  # (what is done, photographs done, photographs in all or None where nobody knows)
THREADS_THAT_FETCH = 8  # of a task that reads from a store, which answers late
_QUIET = {"RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}  # what Ray says of itself


@dataclass(frozen=True)
class Cluster:
    """Where a run runs, and how it is cut.

    address: of a Ray that is there ("auto", or its head), None: one on this machine, for this run. actors: that hold the model;
    None: one a GPU with device "cuda", otherwise one a machine. device: of the actors. threads: of each actor's model, None: all
    cores that there are for it. shard: photographs of a shard, where the source is not cut already. patience: seconds for one
    photograph to arrive. column, names: of Parquet files. Raises ConfigError on what cannot be.
    """

    address: str | None = None
    actors: int | None = None
    device: str = "cpu"
    threads: int | None = None
    shard: int = 2048
    patience: float = 120.0
    column: str | None = None
    names: str | None = None

    def __post_init__(self) -> None:
        for name in ("actors", "threads", "shard", "patience"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name}={value}: it must be more than 0")


@dataclass(frozen=True)
class Outcome:
    """What a run did: photographs, those with an answer, and shards, of the whole table; how many of them this run made.

    failed: the first rows of this run without an answer. seconds: of this run; starting: until its first batch had its answers.
    """

    out: str
    rows: int
    ok: int
    shards: int
    new_rows: int
    new_shards: int
    failed: tuple[Row, ...]
    seconds: float
    starting: float
    model: str
    engine: str


def embed(
    sources: Sequence[str], bundle: str | Path, out: str, settings: Settings | None = None, engine: str | None = None,
    cluster: Cluster | None = None, progress: Report = None,
) -> Outcome:  # fmt: skip
    """The features of photographs as a table of Parquet shards in the folder `out`: file, status, reason, features.

    sources: files, folders, patterns, lists (.txt), Parquet files with bytes or paths, WebDataset shards (.tar); of this machine or
    of a store (s3://, gs://, whatever fsspec opens). A run that was ended goes on by the same call, with the photographs that it
    began with. What cannot be read is a row with the reason.

    Raises ConfigError and DataError before any work, as `squeezevit.embed.embed` does; RunError where Ray or the disk fails, which
    leaves what is whole.

    >>> embed(["s3://bucket/photographs"], "my-vit", "s3://bucket/features").ok  # doctest: +SKIP
    9999871
    """
    return _Run("embed", None, sources, bundle, out, settings or Settings(), engine, cluster or Cluster(), progress)()


def predict(
    sources: Sequence[str], bundle: str | Path, out: str, settings: Settings | None = None, engine: str | None = None,
    top_k: int = 5, cluster: Cluster | None = None, progress: Report = None,
) -> Outcome:  # fmt: skip
    """The likely classes of photographs: file, status, reason, class, probability, and the `top_k` likeliest; as `embed`."""
    if top_k < 1:
        raise ConfigError(f"top_k={top_k}: it must be at least 1")
    return _Run("predict", top_k, sources, bundle, out, settings or Settings(), engine, cluster or Cluster(), progress)()


@dataclass
class _Run:
    command: str
    top: int | None
    sources: Sequence[str]
    bundle: str | Path
    out: str
    settings: Settings
    asked: str | None  # the engine
    cluster: Cluster
    progress: Report
    failed: list[Row] = field(default_factory=list)
    new: int = 0
    first: float | None = None  # when the first batch came

    def __call__(self) -> Outcome:
        started = time.perf_counter()
        if self.settings.workers == 0:
            raise ConfigError("workers=0: on Ray photographs are decoded by tasks; give at least 1, or leave it out")
        path, card, self.engine = choose(self.bundle, self.asked, self.top is None, self.cluster.device)
        if self.top is not None:
            if card.classes is None:
                raise ConfigError(f"the model of {path} has no classes, so there is nothing to predict; use `squeezevit embed`")
            self.top = min(self.top, len(card.classes))
        self.path, self.how = path, self.settings.preprocessing(card)
        self.batch = self.settings.batch_size or card.exported.get("batch") or 16
        self.id, self.card = identity(card.engine, path), card_sum(card)
        self.table = Table(self.out, self._about(), self._begin)
        try:
            self.shards = self.table.done()
            self.old, before = sum(shard["rows"] for shard in self.shards.values()), len(self.shards)
            todo = [part for part in self.table.parts if part.number not in self.shards]
            if todo:
                with _ray(self.cluster) as ray:
                    self._do(ray, todo)
            ok = sum(shard["ok"] for shard in self.shards.values())
            if not ok:
                raise DataError(f"none of the photographs of {', '.join(self.sources)} gives an answer; {self._first_failure()}")
            self.table.finish(self.shards)
        finally:
            self.table.close()
        rows = sum(shard["rows"] for shard in self.shards.values())
        return Outcome(
            self.out, rows, ok, len(self.shards), self.new, len(self.shards) - before, tuple(self.failed),
            time.perf_counter() - started, (self.first or started) - started, self.id, self.engine,
        )  # fmt: skip

    def _about(self) -> Row:
        """What must be the same for a run to go on; also what a reader must know, and where to find the model again."""
        return {
            "command": self.command, "sources": list(self.sources), **told(self.id, self.how, self.settings.draft),
            "engine": self.engine, "card": self.card, "bundle": str(Path(self.bundle).absolute()), "batch size": self.batch,
            "shard": self.cluster.shard, "column": self.cluster.column, "names": self.cluster.names,
        } | ({} if self.top is None else {"top-k": self.top})  # fmt: skip

    def _begin(self, listing: str) -> Any:
        source, files = found(self.sources, self.cluster.column, self.cluster.names)
        return cut(source, files, listing, self.cluster.shard)

    def _do(self, ray: Any, todo: Sequence[Part]) -> None:
        """Shards as their last batches arrive: a batch that comes twice, as after a worker's death, counts once."""
        open_parts: dict[int, dict[int, bytes]] = {}
        lasts: dict[int, int] = {}
        workers = self._workers(ray)
        task = Task(str(self.path), self.engine, workers.threads, self.cluster.device, self.how, self.batch, self.top)
        rows = [part.rows for part in self.table.parts]
        self.total = None if None in rows else sum(filter(None, rows))
        self._report()
        with _told(ray, self.out):
            for row in _results(ray, self._decode(), task, files_of(self.path), todo, workers):
                self.first, number = self.first or time.perf_counter(), int(row["part"])
                if number in self.shards:
                    continue
                batches = open_parts.setdefault(number, {})
                batches[int(row["batch"])] = row["rows"]
                if row["last"]:
                    lasts[number] = int(row["batch"])
                if len(batches) == lasts.get(number, -1) + 1:
                    self._commit(number, [batches[i] for i in range(len(batches))])
                    del open_parts[number]
        if open_parts or len(self.shards) < len(self.table.parts):
            raise RunError(f"Ray ended before {len(todo)} parts were done; {len(self.shards)} are, and the same command goes on")

    def _commit(self, number: int, batches: list[bytes]) -> None:
        try:
            self.shards[number], failed = self.table.commit(number, batches)
        except OSError as error:
            raise RunError(
                f"{self.table.address(number)} could not be written ({error}); make room, or see to the store: {len(self.shards)} "
                f"of {len(self.table.parts)} shards are whole, and the same command goes on"
            ) from error
        self.failed += failed[: SHOWN - len(self.failed)]
        self.new += self.shards[number]["rows"]
        self._report()

    def _report(self) -> None:
        if self.progress is not None:
            doing = {"embed": "embedding", "predict": "predicting"}[self.command]
            self.progress(doing, self.old + self.new, self.total)

    def _first_failure(self) -> str:
        if self.failed:
            return f"{self.failed[0]['file']}: {self.failed[0]['reason']}"
        return f"the shards in {self.out} have the reasons; remove it to begin anew"

    def _decode(self) -> Decode:
        far = any("://" in address for address in self.sources) or self.table.source.kind == "parquet"
        least = at_least(self.how, self.settings.draft)
        return Decode(self.table.source, self.how, least, self.batch, THREADS_THAT_FETCH if far else 1, self.cluster.patience)

    def _workers(self, ray: Any) -> "_Workers":
        total, nodes = ray.cluster_resources(), sum(node["Alive"] for node in ray.nodes())
        gpu = self.cluster.device != "cpu"
        actors = self.cluster.actors or (int(total.get("GPU", 0)) if gpu else nodes) or 1
        if gpu and actors > total.get("GPU", 0):
            raise ConfigError(f"{actors} actors want a GPU each, and Ray has {total.get('GPU', 0):g}; choose fewer, or device=cpu")
        if self.cluster.address is None:
            return _Workers(actors, self.cluster.threads or max(usable_cores() // actors, 1), 1, gpu, self.settings.workers)
        cores = int(total.get("CPU", 0))
        threads = self.cluster.threads or (1 if gpu else max(3 * cores // 4 // actors, 1))
        if actors * threads + 1 > cores:
            raise ConfigError(
                f"{actors} actors of {threads} threads leave none of Ray's {cores} cores for decoding; choose fewer of either"
            )
        return _Workers(actors, threads, threads, gpu, self.settings.workers)


@dataclass(frozen=True)
class _Workers:
    """actors, threads of the model of each, cores that Ray keeps for each, whether each has a GPU; decoding tasks at most."""

    actors: int
    threads: int
    cores: int
    gpu: bool
    decoding: int | None


def _results(
    ray: Any, decode: Decode, task: Task, files: dict[str, bytes], todo: Sequence[Part], workers: _Workers
) -> Iterator[dict[str, Any]]:
    """The batches of rows, in any order. Blocks are of one batch, so that this is what waits, whatever a part holds."""
    data = ray.data
    context = data.DataContext.get_current()
    context.target_max_block_size = decode.batch * 3 * decode.how.crop[0] * decode.how.crop[1]
    context.enable_progress_bars = context.print_on_execution_start = False
    rows = [asdict(part) for part in todo]
    parts = data.from_items(rows, override_num_blocks=len(rows))
    decoded = parts.flat_map(decode, compute=data.TaskPoolStrategy(size=workers.decoding), num_cpus=1)
    pool = data.ActorPoolStrategy(size=workers.actors)
    answered = decoded.map_batches(
        Model, batch_size=1, compute=pool, fn_constructor_args=(task, ray.put(files)), num_cpus=workers.cores,
        num_gpus=1 if workers.gpu else 0,
    )  # fmt: skip
    yield from answered.iter_rows()


@contextmanager
def _ray(cluster: Cluster) -> Iterator[Any]:
    """Ray, with its data; one that is there already is left as it was."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingExtraError(f'running on Ray needs {error.name}: run `pip install "squeezevit[ray]"`') from error
    mine = not ray.is_initialized()
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        if mine and cluster.address is None:
            cores = usable_cores() + (cluster.actors or 1)  # a slot for each actor, which computes while others decode
            ray.init("local", num_cpus=cores, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
        elif mine:
            ray.init(cluster.address, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise RunError(
            f"Ray cannot be reached at {cluster.address or 'this machine'} ({error}); start it, or give --ray"
        ) from error
    try:
        yield ray
    finally:
        if mine:
            ray.shutdown()


@contextmanager
def _told(ray: Any, out: str) -> Iterator[None]:
    """Say what ended a run, and that what is whole stays."""
    try:
        yield
    except ray.exceptions.RayError as error:
        ours = next((e for e in _causes(error) if isinstance(e, SqueezeViTError)), None)
        if ours is not None:
            raise ours from error
        last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise RunError(f"Ray gave up ({last}); the shards of {out} are whole, and the same command goes on") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        cause = getattr(error, "cause", None)
        error = cause if isinstance(cause, BaseException) else error.__cause__
