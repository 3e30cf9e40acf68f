"""What a configuration means: model, reducer, teacher, optimiser and schedule."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from timm.models import group_parameters
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from squeezevit.budget.plan import like, plan
from squeezevit.checkpoint import load_checkpoint_, read_checkpoint, reduce_with_weights_
from squeezevit.core.attach import restore_
from squeezevit.core.cut import description_of
from squeezevit.core.reducer import Reducer
from squeezevit.data import models
from squeezevit.data.folder import data_config
from squeezevit.errors import ConfigError
from squeezevit.reducers.catalog import method
from squeezevit.train.config import Config, ModelConfig, OptimizerConfig, ReducerConfig

_HEADS = "token_reducer."


def build_model(config: Config, classes: int) -> tuple[nn.Module, Reducer]:
    """The reduced model with its starting weights, and the reducer. Raises ConfigError or CheckpointError where they do not fit."""
    method(config.reducer.method)  # an unknown one is refused before a hub is asked
    net = create_model(config.model, classes)
    reducer = make_reducer(config.reducer, net)
    reduce_with_weights_(net, reducer, _weights(config.model, net), str(config.model.checkpoint))
    return net, reducer


def build_teacher(config: Config, student: nn.Module, classes: int) -> nn.Module | None:
    """The model to distil from, in evaluation mode: the configured one, or the student's starting weights unreduced."""
    if not config.distills:
        return None
    if config.teacher is None:
        _require_trained_head(config.model, student, classes)
        teacher = restore_(copy.deepcopy(student))
    else:
        size, own = data_config(student, config.model.image_size)["input_size"][-1], config.teacher.image_size
        if own not in (None, size):
            raise ConfigError(f"teacher.image_size={own}, but the model is trained on {size} pixels a side; leave it out")
        named = replace(config.teacher, image_size=size)
        teacher = create_model(named, classes)
        weights = _weights(named, teacher)
        if weights is not None:
            load_checkpoint_(
                teacher, {k: v for k, v in weights.items() if not k.startswith(_HEADS)}, str(config.teacher.checkpoint)
            )
    return teacher.eval().requires_grad_(False)


def pixels_between(student: nn.Module, teacher: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """What makes the teacher's images of the student's, where the two are normalised by other means and deviations."""
    (mean, std), (wanted_mean, wanted_std) = (
        [torch.tensor(found[name])[:, None, None] for name in ("mean", "std")] for found in map(data_config, (student, teacher))
    )
    if torch.equal(mean, wanted_mean) and torch.equal(std, wanted_std):
        return None
    scale, shift = std / wanted_std, (mean - wanted_mean) / wanted_std
    return lambda images: images * scale.to(images) + shift.to(images)


def create_model(config: ModelConfig, classes: int) -> nn.Module:
    """A timm model with `classes` outputs, without the checkpoint's weights. Raises ConfigError where timm cannot build it."""
    if config.pretrained and config.checkpoint is not None:
        raise ConfigError(f"model.pretrained and model.checkpoint={config.checkpoint} both bring weights; give one of them")
    if config.num_classes not in (None, classes):
        raise ConfigError(
            f"model.num_classes={config.num_classes}, but the data have {classes} classes; leave it out, or mend the class folders"
        )
    options: dict[str, Any] = {"num_classes": classes, **config.options}
    if config.image_size is not None:
        options["img_size"] = config.image_size
    if config.drop_path:
        options["drop_path_rate"] = config.drop_path
    return models.create_model(config.name, config.pretrained, options, "model.name")


def make_reducer(config: ReducerConfig, model: nn.Module) -> Reducer:
    """The configured reducer. Raises ConfigError for an unknown method, keep ratio or option."""
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in config.options.items()}
    row = method(config.method)
    if config.macs is not None and (both := {"keep", "r", "at"} & {*values}):
        raise ConfigError(f"reducer.options says {', '.join(sorted(both))}, which reducer.macs is to find; leave one of them out")
    reducer = row.template() if config.macs is not None else like(model, config.method, config.keep, config.at)
    try:
        reducer = replace(reducer, **values)
        return reducer if config.macs is None else plan(model, reducer, macs=config.macs, at=config.at, curve=row.curve)
    except TypeError as error:
        known = ", ".join(vars(reducer)) or "none"
        raise ConfigError(
            f"reducer.options={config.options} do not fit {config.method} ({error}); its fields are {known}"
        ) from error


def freeze_(model: nn.Module, blocks: int) -> None:
    """Fix the embeddings and the first blocks. Raises ConfigError where the model has no more blocks than that."""
    if not blocks:
        return
    depth = len(description_of(model).blocks)
    if blocks >= depth:
        raise ConfigError(f"freeze={blocks} leaves nothing to train of {depth} blocks; give at most {depth - 1}")
    timm_model: Any = model
    layers = group_parameters(model, timm_model.group_matcher(), reverse=True)  # 0 the embeddings, 1 the first block
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(layers[name] > blocks)


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """A timm optimiser whose groups carry `lr_scale`, which timm's schedules multiply by. Raises ConfigError on unknown names."""
    try:
        return create_optimizer_v2(param_groups(model, config), opt=config.name, lr=config.lr, **config.options)
    except (ValueError, TypeError, AssertionError) as error:
        raise ConfigError(
            f"optimizer.name={config.name!r} with {config.options} cannot be built ({error}); see timm.optim"
        ) from error


def param_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """timm's groups by weight decay and layer, each split into the score heads and the rest, with their scales of lr."""
    model_: Any = model
    names = model_.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    groups = (
        param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=names)
        if config.layer_decay is None
        else param_groups_layer_decay(model, config.weight_decay, names, layer_decay=config.layer_decay)
    )
    heads = {id(p) for name, p in model.named_parameters() if name.startswith(_HEADS)}
    out = []
    for group in groups:
        for of_heads, scale in ((True, config.heads_lr_scale), (False, config.backbone_lr_scale)):
            params: list[Tensor] = [p for p in group["params"] if (id(p) in heads) == of_heads]
            if params:
                own = 1.0 if of_heads else group.get("lr_scale", 1.0)  # score heads are no layer of the depth
                out.append({**group, "params": params, "lr_scale": own * scale, "score_heads": of_heads})
    return out


def make_schedule(optimizer: Optimizer, config: Config, updates: int) -> Scheduler:
    """timm's schedule, to be stepped with the number of updates done, `updates` in an epoch."""
    schedule = config.schedule
    warmup: Any = schedule.warmup_epochs  # timm says int, but part of an epoch is as good
    return create_scheduler_v2(
        optimizer, schedule.name, config.epochs, min_lr=schedule.min_lr, warmup_lr=schedule.warmup_lr,
        warmup_epochs=warmup, step_on_epochs=False, updates_per_epoch=updates,
    )[0]  # fmt: skip


def _weights(config: ModelConfig, model: nn.Module) -> dict[str, Tensor] | None:
    """The checkpoint's weights, with the model's own classifier where a new one is asked for."""
    if config.checkpoint is None:
        return None
    weights = read_checkpoint(config.checkpoint)
    if config.new_head:
        own, timm_model = model.state_dict(), cast(Any, model)
        classifiers = timm_model.pretrained_cfg.get("classifier") or "head"
        prefixes = tuple(f"{name}." for name in ([classifiers] if isinstance(classifiers, str) else classifiers))
        weights = {k: v for k, v in weights.items() if not k.startswith(prefixes)}
        weights.update({k: v for k, v in own.items() if k.startswith(prefixes)})
    return weights


def _require_trained_head(config: ModelConfig, model: nn.Module, classes: int) -> None:
    pretrained_classes = cast(Any, model).pretrained_cfg.get("num_classes")
    if config.checkpoint is not None and not config.new_head:
        return
    if config.pretrained and pretrained_classes == classes:
        return
    raise ConfigError(
        f"loss.logits and loss.tokens distil from the starting weights of {config.name}, but their classifier for {classes} "
        "classes is untrained; train it first (reducer.method=identity) and give that as model.checkpoint, or give a teacher, or "
        "set both weights to 0"
    )
