"""The training run: updates, validation of the reduced and the dense model after each epoch, checkpoints, interruption.

All randomness of an update follows from (seed, number of the update, process), so that a resumed run is the same run; no
generator's state is saved. Everything is reduced over the processes of `accelerate launch` or `torchrun`.
"""

import copy
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from types import FrameType
from typing import IO, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from squeezevit.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MissingExtraError,
    SqueezeViTError,
    TrainingError,
    UnsupportedError,
)

try:
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, broadcast, gather_object
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy
    from timm.utils import ModelEmaV3
    from torchmetrics.classification import MulticlassAccuracy
except ImportError as missing:
    raise MissingExtraError(f'training needs {missing.name}: run `pip install "squeezevit[train]"`') from missing

from squeezevit import bundle, reducers
from squeezevit.checkpoint import load_checkpoint_, save_checkpoint
from squeezevit.core.attach import restore_, retune_
from squeezevit.core.running import evaluation_mode, unwrapped
from squeezevit.data.folder import data_config, eval_transform, given_classes, half_the_cores, natural_order, reading
from squeezevit.train import build, checkpoints, data, log, sharding
from squeezevit.train.config import AugmentConfig, Config, differences, to_dict, to_yaml
from squeezevit.train.objective import Objective
from squeezevit.train.warm import warm_heads_

FREE = ("out", "device", "data.workers", "save_every", "tensorboard")  # what a resumed run may change
_MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
_BEFORE = {"classes": None, "upright": False}  # of the data, as runs had it whose checkpoints do not say
_NEEDED = {"config", "data", "optimizer", "scaler", "epoch", "update", "best", "rows", "sums", "seconds", "unreadable"}
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # how launchers say how many they started
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Update:
    """What a run reports after each update; `row` after each epoch, with the columns of log.csv."""

    epoch: int  # 0-based
    epochs: int
    update: int  # done in this epoch
    updates: int  # of an epoch
    losses: dict[str, float]  # means of this epoch: "loss", and its unweighted parts
    kept: list[float]  # mean share of the patches left by each stage
    images_per_second: float
    seconds_left: float
    row: dict[str, Any] | None = None


class Result(NamedTuple):
    """`rows`: those of log.csv. `signal`: the number of the one that interrupted the run, None where it is complete."""

    rows: list[dict[str, Any]]
    best: float  # top-1 of the reduced model
    signal: int | None
    main: bool  # whether this is the first of several processes


def train(config: Config, resume: bool = False, progress: Callable[[Update], None] | None = None) -> Result:
    """Fine-tune as configured, into the folder `config.out`; see docs/training.md for what lies there.

    SIGTERM and SIGINT write a checkpoint after the current update and end the run. With `resume` it goes on from there, on a CPU
    to the same bits as without the interruption; where `out` is still empty it begins. Seeds the global random generators.
    Raises ConfigError, DataError and CheckpointError before the first update where configuration, data and checkpoint do not fit,
    files of the checkpoint are not as they were written, or another run is using `out`; DataError where a reading process dies;
    TrainingError where the loss is not finite or a checkpoint cannot be written; the last good checkpoint then stays.

    >>> train(load_config("finetune-small", {"data.folder": "photos"}))  # doctest: +SKIP
    """
    died = reading(str(config.data.folder), data.READERS_REMEDY)
    with died, _accelerator(config) as accelerator, _Signals() as signals:
        run = _Run(config, accelerator, signals, progress if accelerator.is_main_process else None)
        try:
            with _connected(accelerator.num_processes):
                run.run(resume)
        finally:
            run.close()
        return Result(run.rows, run.best, run.stopped, accelerator.is_main_process)


class _Stop(Exception):
    """A signal reached one of the processes."""


class _Signals:
    """Notes the first SIGINT or SIGTERM; a second one does what it always did."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(number, self._before[number])


class _Run:
    """One run's model, optimiser and place in the schedule."""

    def __init__(
        self, config: Config, accelerator: Accelerator, signals: _Signals, progress: Callable[[Update], None] | None
    ) -> None:
        self.config, self.accelerator, self.signals, self.progress = config, accelerator, signals, progress
        self.out = Path(config.out)
        self.epoch = self.update = 0  # the next one; update counts within the epoch
        self.rows: list[dict[str, Any]] = []
        self.best = -1.0
        self.sums: dict[str, float] = {}  # over the updates of this epoch, by column of log.csv
        self.seconds = 0.0
        self.unreadable: dict[str, str] = {}  # of all processes up to the last epoch, and of this one since
        self.gathered = 0  # how many of them all processes know
        self.stopped: int | None = None
        self.board = log.Board(None, 0)
        self.lock: IO[str] | None = None

    def start(self, resume: bool) -> None:
        accelerator = self.accelerator
        if self.out.is_dir():
            self._on_main(self._hold)
        last = self._previous(resume)
        state = None if last is None else self._read(last)
        config = self.config
        data.seed_everything(config.seed)
        self._open_data(last, state)
        net, self.reducer = build.build_model(config, self.classes)
        self._set_transforms(net)
        self.card = self._card(net) if accelerator.is_main_process else None
        self.teacher = build.build_teacher(config, net, self.classes)
        adapt = None if self.teacher is None else build.pixels_between(net, self.teacher)
        self.objective = Objective(self._criterion(), config.loss, self.teacher, adapt)
        net.to(accelerator.device).train()
        if self.teacher is not None:
            self.teacher.to(accelerator.device)
        self._rehearse(net)
        if state is None:
            self._warm(net)
        self.dense = restore_(copy.deepcopy(net))
        self.ema = None if config.ema.decay is None else ModelEmaV3(net, config.ema.decay, use_warmup=config.ema.warmup)
        build.freeze_(net, config.freeze)
        if config.checkpoint_activations:
            cast(Any, net).set_grad_checkpointing(True)
        if last is not None and state is not None:
            self._load(last, state, net)
        self.model = net
        self.sharded = sharding.wanted() and accelerator.distributed_type != DistributedType.NO
        if self.sharded:
            sharding.shard_([*self.saved.values(), self.dense], accelerator)
        optimizer = build.make_optimizer(net, config.optimizer)
        if state is not None:
            _load_optimizer(optimizer, state["optimizer"], f"{last}/state.pt")
        self.schedule = build.make_schedule(optimizer, config, self.updates)
        self.schedule.step_update(self.done)
        if not self.sharded:
            self.model = accelerator.prepare_model(net)
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        if state is not None and accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        accelerator.wait_for_everyone()
        self._on_main(lambda: self._begin_folder(last))

    def close(self) -> None:
        """Give the folder back."""
        self.board.close()
        if self.lock is not None:
            self.lock.close()

    def run(self, resume: bool) -> None:
        try:
            self.start(resume)
        except _Stop:  # before there is anything to keep
            self.stopped = self.signals.received or signal.SIGTERM
            return
        try:
            while self.epoch < self.config.epochs:
                self._train_epoch()
                self._finish_epoch(self._validate())
        except _Stop:
            self._save("last")
            self.stopped = self.signals.received or signal.SIGTERM  # another process may have got it

    @property
    def done(self) -> int:
        return self.epoch * self.updates + self.update

    @property
    def net(self) -> nn.Module:
        return unwrapped(self.model)

    @property
    def saved(self) -> dict[str, nn.Module]:
        """What a checkpoint holds the weights of, by the file's name."""
        return {"model": self.net} if self.ema is None else {"model": self.net, "ema": self.ema.module}

    def _previous(self, resume: bool) -> Path | None:
        """The checkpoint to go on from. Raises ConfigError where there is one that nobody asked for."""
        last = checkpoints.find_folder(self.out / "last")
        if last is not None and not resume:
            raise ConfigError(f"out={self.config.out} holds a run already; continue it with --resume, or choose another folder")
        return last

    def _read(self, last: Path) -> dict[str, Any]:
        """The state of a checkpoint that is whole and of this configuration; what it does not tell stays as it was then."""
        state = checkpoints.read_state(last)
        if missing := sorted(_NEEDED - state.keys()):
            raise CheckpointError(f"{last}/state.pt lacks {', '.join(missing)}; begin a new run in another folder")
        if self.config.data.upright and not state["config"]["data"].get("upright", _BEFORE["upright"]):
            if self.accelerator.is_main_process:
                logger.warning("%s was trained on photographs as they are stored, and goes on so: data.upright=false", last)
            self.config = replace(self.config, data=replace(self.config.data, upright=False))
        old = {**state["config"], "data": {**_BEFORE, **state["config"]["data"]}}
        old["reducer"] = {"warm_steps": 0, **old["reducer"]}
        changed = [d for d in differences(old, to_dict(self.config)) if d.split(" ")[0] not in FREE]
        if changed:
            raise ConfigError(
                f"{last} was trained with another configuration: {', '.join(changed)}; resume with the old values, or begin a new "
                f"run in another folder from model.checkpoint={last / 'model.safetensors'}"
            )
        return state

    def _on_main(self, action: Callable[[], None]) -> None:
        """Do something in the first process only; what it raises of ours all processes raise, so that none waits for ever."""
        error: SqueezeViTError | None = None
        if self.accelerator.is_main_process:
            try:
                action()
            except SqueezeViTError as raised:
                error = raised
        first: SqueezeViTError | None = next(filter(None, gather_object([error])), None)
        if first is not None:
            raise first

    def _hold(self) -> None:
        try:
            self.lock = checkpoints.hold(self.out)
        except OSError as error:
            raise _unwritable(self.out, error) from error

    def _open_data(self, last: Path | None, state: dict[str, Any] | None) -> None:
        config, processes = self.config, self.accelerator.num_processes
        train, val = self._open_folder(last, state)
        self.classes = len(train.classes)
        parts = processes * config.accumulate
        if config.batch_size % parts:
            raise ConfigError(
                f"batch_size={config.batch_size} does not divide into {processes} processes x accumulate={config.accumulate}; "
                f"give a multiple of {parts}"
            )
        here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))  # of the processes, those on this machine
        workers = half_the_cores(here) if config.data.workers is None else config.data.workers
        self.split = data.Split(config.batch_size // parts, config.accumulate, processes, self.accelerator.process_index, workers)
        if _mixes(config.augment) and self.split.batch % 2:
            raise ConfigError(f"mixup and cutmix need pairs, but a process computes {self.split.batch} images; make that even")
        self.updates = data.epoch_length(len(train), config.augment.repeats) // self.split.whole
        if not self.updates:
            raise ConfigError(f"batch_size={config.batch_size} is more than the {len(train)} training images; give a smaller one")
        self.train_images, self.val_images = data.TrainImages(train, config.seed), data.ValImages(val)
        self.names = train.classes
        if state is not None:
            self._require_same_data(last, state)

    def _open_folder(self, last: Path | None, state: dict[str, Any] | None) -> tuple[data.ImageFolder, data.ImageFolder]:
        """Images with the classes numbered as in the state, where there is one; DataError where they are others."""
        wanted, main = self.config.data, self.accelerator.is_main_process
        if wanted.folder is None:
            raise ConfigError("data.folder is not given; point to a folder of images with --data")
        train, val = data.open_folder(wanted.folder, wanted.classes, wanted.upright)
        names = None if state is None else state.get("classes") or self._written_classes()
        if names is not None and {*names} != {*train.classes}:
            gone, new = (natural_order(set(a) - set(b)) for a, b in ((names, train.classes), (train.classes, names)))
            raise DataError(
                f"the classes of {wanted.folder} are not those {last} was trained on: {', '.join(gone[:5]) or 'none'} gone, "
                f"{', '.join(new[:5]) or 'none'} new; give the folders their old names back, or begin a new run in another folder"
            )
        if names is not None and names != train.classes:
            train, val = data.open_folder(wanted.folder, names, wanted.upright)
        if main:
            train.warn()
        return train, val

    def _written_classes(self) -> list[str] | None:
        """Of a run whose states did not name them yet."""
        file = self.out / "classes.txt"
        return given_classes(file) if file.is_file() else None

    def _require_same_data(self, last: Path | None, state: dict[str, Any]) -> None:
        facts = self._data_facts()
        other = [name for name, value in state["data"].items() if facts.get(name) != value]
        if other:
            raise DataError(
                f"{self.config.data.folder} is not what {last} was trained on: {state['data']}, now {facts}; put the images back "
                "as they were, or begin a new run in another folder"
            )

    def _set_transforms(self, net: nn.Module) -> None:
        size = self.config.model.image_size
        self.size: tuple[int, int] = data_config(net, size)["input_size"][-2:]
        self.train_images.source.transform = data.train_transform(net, self.config.augment, size)
        self.val_images.source.transform = eval_transform(net, size)

    def _criterion(self) -> Callable[[Tensor, Tensor], Tensor]:
        augment = self.config.augment
        self.mixup = None
        if _mixes(augment):
            self.mixup = Mixup(augment.mixup, augment.cutmix, label_smoothing=augment.smoothing, num_classes=self.classes)
            return cast(Callable[[Tensor, Tensor], Tensor], SoftTargetCrossEntropy())
        return nn.CrossEntropyLoss(label_smoothing=augment.smoothing)

    @torch.no_grad()
    def _rehearse(self, net: nn.Module) -> None:
        """One step on empty images, so that what does not fit is known before any work is done."""
        images = torch.zeros(2, 3, *self.size, device=self.accelerator.device)
        with self.accelerator.autocast():
            self.objective(net, *self._targets(images, torch.tensor([0, 1], device=images.device)))

    def _warm(self, net: nn.Module) -> None:
        """Let learned heads begin with a ranking, the same in all processes, before anything is trained."""
        if not (steps := self.config.reducer.warm_steps):
            return
        told = warm_heads_(net, self._warm_batches(steps))
        for parameter in cast(Any, net).token_reducer.parameters():
            parameter.data.copy_(broadcast(parameter.data))
        if self.accelerator.is_main_process:
            shares = ", ".join(f"{100 * share:.0f} %" for share in told.agreement)
            logger.info("score heads warmed on %d batches: of the tokens that the guide keeps they keep %s", steps, shares)

    def _warm_batches(self, steps: int) -> Iterator[Tensor]:
        """Images of the first epochs, as training augments them. Raises _Stop where a signal has reached a process."""
        device, done = self.accelerator.device, 0
        for epoch in count():
            for part in data.train_batches(self.train_images, self.size, self.split, epoch, self.config.augment.repeats, 0):
                received = torch.tensor(float(self.signals.received is not None), device=device)
                if self.accelerator.reduce(received, "sum").item():
                    raise _Stop
                yield part.images.to(device)
                done += 1
                if done == steps:
                    return

    def _load(self, last: Path, state: dict[str, Any], net: nn.Module) -> None:
        load_checkpoint_(net, last / "model.safetensors")
        if self.ema is not None:
            load_checkpoint_(self.ema.module, last / "ema.safetensors")
        self.epoch, self.update, self.best, self.rows = state["epoch"], state["update"], state["best"], state["rows"]
        self.sums, self.seconds, self.unreadable = state["sums"], state["seconds"], state["unreadable"]
        self.gathered = len(self.unreadable)

    def _data_facts(self) -> dict[str, Any]:
        train, val = self.train_images.source, self.val_images.source
        listings = {f"{name}_list": data.listing(images)[:16] for name, images in (("train", train), ("val", val))}
        return {"train": len(train), "val": len(val), "classes": len(self.names), **listings}

    def _begin_folder(self, last: Path | None) -> None:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if self.lock is None:
                self._hold()
            if checkpoints.find_folder(self.out / "last") != last:
                raise ConfigError(f"out={self.config.out} got a run while this one was built; choose another folder")
            for name in ("best", "last"):
                checkpoints.tidy(self.out / name)
            checkpoints.write_file(self.out / "config.yaml", to_yaml(self.config))
            checkpoints.write_file(self.out / "classes.txt", "".join(f"{name}\n" for name in self.names))
            log.write_log(self.out, self.rows)
            log.write_unreadable(self.out, self.unreadable)
            self.board = log.Board(self.out / "tensorboard" if self.config.tensorboard else None, self.done)
        except OSError as error:
            raise _unwritable(self.out, error) from error

    def _train_epoch(self) -> None:
        images, repeats = self.train_images, self.config.augment.repeats
        batches = data.train_batches(images, self.size, self.split, self.epoch, repeats, self.update)
        self.model.train()
        start = time.perf_counter()
        while self.update < self.updates:
            values, failures, stop = self._step(list(islice(batches, self.split.accumulate)))
            for name, value in values.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
            self.update += 1
            now = time.perf_counter()
            self.seconds, start = self.seconds + now - start, now
            self.board.add("update", values, self.done)
            self._report()
            if stop:
                raise _Stop
            self._check_unreadable(failures)
            if self.config.save_every and self.update % self.config.save_every == 0 and self.update < self.updates:
                self._save("last")

    def _step(self, parts: list[data.Part]) -> tuple[dict[str, float], int, bool]:
        """One update: means over all processes, unreadable images of all of them so far, whether a signal came."""
        accelerator, config = self.accelerator, self.config
        self._retune()
        data.seed_everything(config.seed, self.done, self.split.rank)
        sums: dict[str, Tensor] = {}
        for i, part in enumerate(parts):
            self.unreadable.update(part.failed)
            images, targets = part.images.to(accelerator.device), part.labels.to(accelerator.device)
            with nullcontext() if i + 1 == len(parts) else accelerator.no_sync(self.model):
                with accelerator.autocast():
                    losses = self.objective(self.model, *self._targets(images, targets))
                accelerator.backward(losses.total / len(parts))
            kept = {f"kept_{j + 1}": share for j, share in enumerate(losses.kept)}
            for name, value in {"loss": losses.total.detach(), **losses.parts, **kept}.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value / len(parts)
        new = len(self.unreadable) - self.gathered
        own = [torch.tensor(float(v), device=accelerator.device) for v in (new, self.signals.received is not None)]
        means = accelerator.reduce(torch.stack([*(v.float() for v in sums.values()), *own]), "mean").tolist()
        values = dict(zip(sums, means, strict=False))
        self._require_finite(values)
        if config.optimizer.clip is not None:
            if self.sharded:  # accelerate's own looks for a model that it prepared
                accelerator.unscale_gradients()
                nn.utils.clip_grad_norm_(self.model.parameters(), config.optimizer.clip)
            else:
                accelerator.clip_grad_norm_(self.model.parameters(), config.optimizer.clip)
        self._update()
        self.optimizer.zero_grad()
        self.schedule.step_update(self.done + 1)
        if self.ema is not None:
            self.ema.update(self.net, self.done + 1)
        return values, self.gathered + round(means[-2] * accelerator.num_processes), means[-1] > 0

    def _update(self) -> None:
        try:
            self.optimizer.step()
        except (torch.OutOfMemoryError, torch.distributed.DistError):
            raise
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            if not self.sharded:
                raise
            raise ConfigError(
                f"optimizer.name={self.config.optimizer.name!r} cannot update shards of parameters ({error}); choose one that "
                "works entry by entry, as adamw, lion or sgd, or launch without shards"
            ) from error

    def _targets(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return (images, labels) if self.mixup is None else self.mixup(images, labels)

    def _retune(self, final: bool = False) -> None:
        """Give the model the keep ratios of now, or the final ones."""
        updates = self.config.anneal_epochs * self.updates
        if updates:
            retune_(self.net, self.reducer if final else self.reducer.annealed(min(self.done / updates, 1.0)))

    def _require_finite(self, values: dict[str, float]) -> None:
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise TrainingError(
                f"{', '.join(bad)} became {values[bad[0]]} at update {self.update + 1} of epoch {self.epoch + 1}; {self._remedy()}"
            )

    def _remedy(self) -> str:
        """What to do where numbers are not finite."""
        last = checkpoints.find_folder(self.out / "last")
        return (
            f"{f'the checkpoint before, {last}, is good' if last else 'there is no checkpoint yet'}. Try a smaller "
            f"optimizer.lr (now {self.config.optimizer.lr:g}), optimizer.clip=1, a longer schedule.warmup_epochs, or "
            "precision=bf16 or fp32 instead of fp16"
        )

    def _validate(self) -> dict[str, float]:
        """Accuracies of the reduced model, of the same weights unreduced, and of their moving average, reduced."""
        self._retune(final=True)
        scores = self._score(self.net)
        if wrong := scores.pop("nonfinite"):
            raise TrainingError(f"outputs of {wrong} of {scores['val_images']} validation images are not finite; {self._remedy()}")
        if self.config.reducer.method == "identity":
            dense = scores
        else:
            weights = self.net.state_dict()
            self.dense.load_state_dict({name: weights[name] for name in self.dense.state_dict()})
            dense = self._score(self.dense)
        scores.update({f"dense_{name}": dense[name] for name in ("top1", "top5")})
        if self.ema is not None:
            ema = self._score(self.ema.module)
            scores.update({f"ema_{name}": ema[name] for name in ("top1", "top5")})
        return scores

    @torch.no_grad()
    def _score(self, model: nn.Module) -> dict[str, float]:
        """Top-1 and top-5 of all readable images, each counted once, their number, and how many of them have outputs not finite.

        Those count as wrong.
        """
        device = self.accelerator.device
        top = {k: MulticlassAccuracy(self.classes, top_k=min(k, self.classes), average="micro").to(device) for k in (1, 5)}
        images, nonfinite = 0, 0
        with evaluation_mode(model), self.accelerator.autocast():
            for batch in data.val_batches(self.val_images, self.size, self.split):
                self.unreadable.update(batch.failed)
                logits, there = model(batch.images.to(device)).float(), (batch.labels >= 0).to(device)
                logits, labels = logits[there], batch.labels.to(device)[there]
                lost = ~logits.isfinite().all(dim=1)
                logits[lost] = 1 - nn.functional.one_hot(labels[lost], self.classes).float()
                if there.any():
                    for accuracy in top.values():
                        accuracy.update(logits, labels)
                images, nonfinite = images + int(there.sum()), nonfinite + int(lost.sum())
                self._stop_if_signalled()
        total, wrong = self.accelerator.reduce(torch.tensor([images, nonfinite], device=device), "sum").tolist()
        if not total:
            raise DataError(f"none of the {len(self.val_images.source)} validation images is readable: replace them")
        return {"top1": float(top[1].compute()), "top5": float(top[5].compute()), "val_images": total, "nonfinite": wrong}

    def _stop_if_signalled(self) -> None:
        flag = torch.tensor(float(self.signals.received is not None), device=self.accelerator.device)
        if self.accelerator.reduce(flag, "sum") > 0:
            raise _Stop

    def _finish_epoch(self, scores: dict[str, float]) -> None:
        self._gather_unreadable()
        means = {name: total / self.updates for name, total in self.sums.items()}
        speed = self.updates * self.config.batch_size / self.seconds
        row = {
            "epoch": self.epoch + 1, "update": self.done, **self._rates(), **means, **scores,
            "images_per_second": speed, "seconds": self.seconds, "unreadable": len(self.unreadable),
        }  # fmt: skip
        self.rows.append(row)
        self._report(row)
        self.board.add("epoch", row, self.done)
        self.epoch, self.update, self.sums, self.seconds = self.epoch + 1, 0, {}, 0.0
        if scores["top1"] > self.best:
            self.best = scores["top1"]
            self._save("best")
        self._save("last")
        self._on_main(self._write_logs)
        self._check_unreadable(len(self.unreadable))

    def _gather_unreadable(self) -> None:
        self.unreadable = dict(gather_object(list(self.unreadable.items())))
        self.gathered = len(self.unreadable)

    def _write_logs(self) -> None:
        try:
            log.write_log(self.out, self.rows)
            log.write_unreadable(self.out, self.unreadable)
        except OSError as error:
            raise checkpoints.failure(self.out / "log.csv", error, checkpoints.find_folder(self.out / "last")) from error

    def _rates(self) -> dict[str, float]:
        """Learning rates of the backbone and, where there are any, of the score heads."""
        rates = {"lr_heads" if g["score_heads"] else "lr": g["lr"] for g in self.optimizer.param_groups}  # the last layer's
        return dict(sorted(rates.items()))

    def _check_unreadable(self, failures: int) -> None:
        total = len(self.train_images.source) + len(self.val_images.source)
        if failures > self.config.data.max_unreadable * total:
            path, reason = next(iter(self.unreadable.items()), ("in another process", "see there"))
            self._save("last")
            raise DataError(
                f"{failures} of {total} images cannot be read so far, more than data.max_unreadable="
                f"{self.config.data.max_unreadable:g}; the first: {path} ({reason}). Replace or remove them, or allow more"
            )

    def _save(self, name: str) -> None:
        """Write model, average, and, for "last", all that a resumed run needs. All processes take part, as shards are gathered."""
        self._retune(final=True)
        self._gather_unreadable()
        main = self.accelerator.is_main_process
        weights = {file: sharding.whole(model.state_dict(), main) for file, model in self.saved.items()}
        optimizer = sharding.whole(self.optimizer.state_dict(), main) if name == "last" else None
        self._on_main(lambda: self._write(name, weights, optimizer))

    def _write(self, name: str, weights: dict[str, dict[str, Tensor]], optimizer: dict[str, Any] | None) -> None:
        for of_model in weights.values():
            if bad := next((key for key, value in of_model.items() if not value.isfinite().all()), None):
                raise TrainingError(f"{bad} is not finite after update {self.update} of epoch {self.epoch + 1}; {self._remedy()}")
        checkpoints.write_folder(self.out / name, lambda folder: self._fill(folder, weights, optimizer))

    def _card(self, net: nn.Module) -> bundle.Card | None:
        """What makes a checkpoint a bundle; None, with a warning, where the model's constructor cannot be written down."""
        wanted = self.config.model
        options = {"name": wanted.name, **wanted.options}
        try:
            found = bundle.card_of(net, options=options, image_size=wanted.image_size, classes=self.names)
        except (ConfigError, UnsupportedError) as error:
            logger.warning("checkpoints of this run are no bundles, and are loaded by --model and --checkpoint: %s", error)
            return None
        upright = replace(found.preprocessing, upright=self.config.data.upright)
        return replace(found, reducer=reducers.to_dict(self.reducer), preprocessing=upright)

    def _fill(self, folder: Path, weights: dict[str, dict[str, Tensor]], optimizer: dict[str, Any] | None) -> None:
        if self.card is not None:
            bundle.describe_(folder, replace(self.card, measured={"best top-1": self.best, "epoch": self.epoch}))
        for file, model in self.saved.items():
            save_checkpoint(model, folder / f"{file}.safetensors", weights[file])
        if optimizer is not None:
            scaler = self.accelerator.scaler
            state = {
                "config": to_dict(self.config), "data": self._data_facts(), "classes": self.names, "optimizer": optimizer,
                "scaler": None if scaler is None else scaler.state_dict(), "epoch": self.epoch, "update": self.update,
                "best": self.best, "rows": self.rows, "sums": self.sums, "seconds": self.seconds, "unreadable": self.unreadable,
            }  # fmt: skip
            checkpoints.save_state(state, folder / "state.pt")

    def _report(self, row: dict[str, Any] | None = None) -> None:
        if self.progress is None:
            return
        means = {name: total / self.update for name, total in self.sums.items()}
        per_update = self.seconds / self.update
        self.progress(
            Update(
                self.epoch, self.config.epochs, self.update, self.updates,
                {k: v for k, v in means.items() if not k.startswith("kept_")},
                [v for k, v in means.items() if k.startswith("kept_")],
                self.config.batch_size / per_update, (self.config.epochs * self.updates - self.done) * per_update, row,
            )
        )  # fmt: skip


@contextmanager
def _connected(processes: int) -> Iterator[None]:
    """Say what it means that another process cannot be reached any more."""
    try:
        yield
    except RuntimeError as error:
        if processes == 1 or not (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
            raise
        raise TrainingError(
            f"another of the {processes} processes of this run ended ({' '.join(str(error).split())[:150]}): what it said tells "
            "why; then --resume goes on from the last checkpoint"
        ) from error


def _load_optimizer(optimizer: Optimizer, state: dict[str, Any], where: str) -> None:
    try:
        optimizer.load_state_dict(sharding.cut(state, optimizer))
    except (ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{where} has the state of another optimiser ({error}); begin a new run in another folder") from error


def _unwritable(out: Path, error: OSError) -> ConfigError:
    remedy = "make room, or choose another disk" if error.errno in checkpoints.FULL else "choose a folder of your own"
    return ConfigError(f"out={out} cannot be written ({error.strerror}); {remedy}")


def _mixes(config: AugmentConfig) -> bool:
    return config.mixup > 0 or config.cutmix > 0


@contextmanager
def _accelerator(config: Config) -> Iterator[Accelerator]:
    """Accelerate's view of the processes, left behind so that the next run in this process may have another."""
    sharding.wanted()  # refuses what it cannot do before accelerate prepares for it
    launched = max(int(os.environ.get(name) or 1) for name in _SIZES)
    accelerator = _joined(config, launched)
    accelerator.gradient_accumulation_steps = 1  # whatever the launcher was told: `_step` does it
    try:
        if config.device not in ("auto", accelerator.device.type):
            raise ConfigError(f"device={config.device!r} is not there (found {accelerator.device.type}); choose auto or cpu")
        if accelerator.num_processes != launched:
            raise _apart(launched, config, f"{accelerator.num_processes} found on {accelerator.device.type}")
        if config.precision == "fp16" and accelerator.device.type != "cuda":
            raise ConfigError(f"precision='fp16' does not train on {accelerator.device.type}; choose bf16 or fp32")
        yield accelerator
    finally:
        accelerator.end_training()
        AcceleratorState._reset_state(reset_partial_state=True)


def _joined(config: Config, launched: int) -> Accelerator:
    """accelerate looks for processes on a CPU only where it is told to use that, so "auto" is settled before."""
    unused = config.anneal_epochs > 0  # heads get no gradient while nothing is removed
    try:
        return Accelerator(
            cpu=config.device == "cpu" or (config.device == "auto" and not torch.accelerator.is_available()),
            mixed_precision=_MIXED[config.precision],
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused)],
        )
    except (RuntimeError, ValueError) as error:  # more processes than devices, addresses that nobody answers
        AcceleratorState._reset_state(reset_partial_state=True)
        if launched == 1:
            raise
        raise _apart(launched, config, " ".join(str(error).split())[:150]) from error


def _apart(launched: int, config: Config, reason: str) -> ConfigError:
    return ConfigError(
        f"{launched} processes were launched, but with device={config.device} they do not find each other ({reason}); launch as "
        "many as there are devices with torchrun, choose device=cpu, or launch one process"
    )
