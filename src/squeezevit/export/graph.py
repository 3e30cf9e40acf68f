"""From a model to a program: one function from images to numbers, captured by torch.export, with or without scattering."""

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from squeezevit.core import ops
from squeezevit.core.cut import description_of
from squeezevit.core.running import embedded, images, share_weights, without_hooks
from squeezevit.core.trace import Trace, trace
from squeezevit.data.classifier import without_classifier_
from squeezevit.errors import UnsupportedError
from squeezevit.export.apart import apart

_WORDLESS = ("aten._assert_", "aten.sym_constrain_range", "aten.alias.")
_MASK = "create_bidirectional_mask"
_LOUD = ("onnx_ir", "onnxscript", "torch.onnx", "torch.export", "nncf", "root")  # what they log is for their own developers


class Exportable(nn.Module):
    """A model, or the part of it that takes images, as images [B, 3, H, W] -> its output; its weights are the model's own.

    tokens: beside that, of a reduced model, the patch tokens that are left, after the final norm: [B, K, C]. groups: then, after
    each stage, the token that each patch ended in, -1 where it was dropped: [B, N0] int64. features: what goes into the classifier,
    in place of what comes from it.
    """

    def __init__(self, model: nn.Module, groups: bool = False, tokens: bool = False, features: bool = False) -> None:
        super().__init__()
        self.model = share_weights(model).eval()
        if features:
            without_classifier_(self.model)
        self.about, self.groups, self.tokens = description_of(self.model), groups, tokens

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if not (self.groups or self.tokens):
            return (self._run(images),)
        with trace(self.model) as t:
            out = self._run(images)
        groups = (t.groups_after(j) for j in range(len(t.stages) if self.groups else 0))
        return (out, self._tokens(t), *groups) if self.tokens else (out, *groups)

    def names(self, outputs: int) -> list[str]:
        """What so many outputs are called, in their order."""
        first = ["out", "tokens"] if self.tokens else ["out"]
        return [*first, *(f"groups_{j + 1}" for j in range(outputs - len(first)))]

    def _tokens(self, t: Trace) -> Tensor:
        if t.tokens is None:
            raise UnsupportedError(f"{type(self.model).__name__} tells no trace its patch tokens, which are to be an output")
        return t.tokens

    def _run(self, images: Tensor) -> Tensor:
        runs: Any = self.about.tower or self.model
        out = embedded(self.model, runs(*self.about.given(images), **self.about.named(images)))
        return out if isinstance(out, Tensor) else out[0]


def capture(
    module: Exportable, batch: int | None, size: tuple[int, int], scatter: bool = True, folds: bool = False
) -> ExportedProgram:
    """A program for so many images (None: any number) of one size; scatter=False: without a node that scatters.

    folds: what runs it computes once what depends on weights alone, so that queries, keys and values may be `apart`.

    Raises UnsupportedError where torch.export cannot capture the model, or where something in it scatters all the same.
    """
    x = images(module.model, batch or 2, size)
    shapes = None if batch else ({0: Dim("batch", min=1, max=4096)},)
    try:
        with quietly(), torch.no_grad(), without_hooks(module.model), _form(scatter), _unmasked(module.model):
            program = torch.export.export(module, (x,), dynamic_shapes=shapes, strict=False)
            program = apart(_plain(program)) if folds else program
            table = ({} if scatter else _PRODUCTS) | (_CROWDED if _crowded(program) else {})
            program = _plain(_replaced(program, table))
    except Exception as error:  # whatever the capture stumbles over
        raise UnsupportedError(
            f"torch.export cannot capture this {type(module.model).__name__} at {size[0]} x {size[1]} pixels ({reason(error)}); "
            "export the unreduced model to see whether its library or the reducer is the cause, and try a fixed batch_size"
        ) from error
    if not scatter and (left := scatters(program)):
        raise UnsupportedError(f"scatter=False cannot replace {', '.join(left)} in this model; export it with scatter=True")
    return program


def write_traced(module: Exportable, batch: int | None, size: tuple[int, int], file: Path, outputs: list[str]) -> None:
    """Write ONNX by torch's older exporter, which traces one forward; batch None: any number of images.

    Raises UnsupportedError where the exporter cannot.
    """
    x, axes = images(module.model, batch or 2, size), {name: {0: "batch"} for name in ("images", *outputs)}
    try:
        with quietly(), torch.no_grad(), without_hooks(module.model), _unmasked(module.model):
            torch.onnx.export(
                module, (x,), file, dynamo=False, input_names=["images"], output_names=outputs, dynamic_axes=None if batch else axes
            )
    except Exception as error:
        raise UnsupportedError(
            f"torch's older ONNX exporter cannot write this {type(module.model).__name__} ({reason(error)}); use exporter='dynamo'"
        ) from error


def scatters(program: ExportedProgram) -> list[str]:
    """What in a program scatters, by the names of torch's operators."""
    names = {str(n.target) for graph in _graphs(program) for n in graph.nodes if n.op == "call_function"}
    return sorted(n for n in names if any(part in n for part in ("scatter", "index_put", "index_add")))


def reason(error: BaseException) -> str:
    """The first line of what a converter stumbled over, at the bottom of all that it wrapped around that."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def quietly() -> Iterator[None]:
    """No warning, no progress bar and no log of the libraries that convert: what goes wrong there, they raise."""
    loggers = [logging.getLogger(name) for name in _LOUD]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def _form(scatter: bool) -> Iterator[None]:
    ops.set_scatter(scatter)
    try:
        yield
    finally:
        ops.set_scatter(True)


@contextmanager
def _unmasked(model: nn.Module) -> Iterator[None]:
    """While they are exported Hugging Face's towers make a mask of nothing but True, as long as the full grid; none is the same."""
    classes = {c for m in model.modules() for c in type(m).__mro__ if c.__module__.startswith("transformers.")}
    places: list[Any] = [m for c in classes if hasattr(m := sys.modules[c.__module__], _MASK)]
    before = {place: getattr(place, _MASK) for place in places}
    try:
        for place in before:
            setattr(place, _MASK, lambda *args, **kwargs: None)
        yield
    finally:
        for place, function in before.items():
            setattr(place, _MASK, function)


def _graphs(program: ExportedProgram) -> list[Any]:
    return [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]


def _plain(program: ExportedProgram) -> ExportedProgram:
    """The program without what formats have no word for: checks, which the capture has passed, and second names of a tensor."""
    for module in (m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)):
        for node in [n for n in module.graph.nodes if n.op == "call_function"]:
            if str(node.target) == "aten.alias.default":
                node.replace_all_uses_with(node.args[0])
            if str(node.target).startswith(_WORDLESS):
                module.graph.erase_node(node)
        module.graph.eliminate_dead_code()
        module.recompile()
    return program


def _replaced(program: ExportedProgram, table: dict[Any, Callable[..., Any]]) -> ExportedProgram:
    found = {n.target for graph in _graphs(program) for n in graph.nodes}
    return program.run_decompositions(dict(table)) if found & {*table} else program


def _crowded(program: ExportedProgram) -> bool:
    """Whether an attention has as many tokens as heads, which OpenVINO takes for each other where the batch is fixed."""
    inputs = [n.args[0] for graph in _graphs(program) for n in graph.nodes if n.target is _ATTENTION]
    return any(_as_many(getattr(node, "meta", {}).get("val")) for node in inputs)


def _as_many(query: Any) -> bool:
    return isinstance(query, Tensor) and query.dim() == 4 and query.shape[1] == query.shape[2]


def _by_head(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Attention whose heads are images of their own, so that a runtime cannot take tokens for heads."""
    if not _as_many(query) or is_causal or enable_gqa or (attn_mask is not None and attn_mask.dtype == torch.bool):
        return NotImplemented
    q, k, v = (x.flatten(0, 1) for x in (query, key, value))  # [B * H, T, D]
    weights = (q * (query.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(1, 2)
    if attn_mask is not None:
        weights = weights + attn_mask.expand(*query.shape[:3], key.shape[2]).flatten(0, 1)
    return (weights.softmax(dim=-1) @ v).unflatten(0, query.shape[:2])


def _scatter_add(x: Tensor, dim: int, index: Tensor, rows: Tensor) -> Tensor:
    return x + _brought(_one_hot(x, dim, index), dim, rows).to(x.dtype)


def _scatter(x: Tensor, dim: int, index: Tensor, rows: Tensor) -> Tensor:
    hot = _one_hot(x, dim, index)
    return torch.where(hot.sum(-2).movedim(-1, dim) > 0, _brought(hot, dim, rows).to(x.dtype), x)


def _scatter_value(x: Tensor, dim: int, index: Tensor, value: Any) -> Tensor:
    return torch.where(_one_hot(x, dim, index).sum(-2).movedim(-1, dim) > 0, _number(value, x), x)


def _select_scatter(x: Tensor, rows: Tensor, dim: int, index: int) -> Tensor:
    place = torch.arange(x.shape[dim], device=x.device) == index % x.shape[dim]
    return torch.where(place.view(-1, *[1] * (x.dim() - 1 - dim % x.dim())), rows.unsqueeze(dim), x)


def _where_scalar(condition: Tensor, x: Tensor, other: Any) -> Tensor:
    return torch.where(condition, x, _number(other, x))


def _number(value: Any, like: Tensor) -> Tensor:
    """As a tensor: converters have no word for a number in its place."""
    return torch.full((1,), value, dtype=like.dtype, device=like.device)


def _brought(hot: Tensor, dim: int, rows: Tensor) -> Tensor:
    """What comes to each place: sums of entries, and 0 where none goes."""
    nothing = torch.zeros(1, dtype=rows.dtype, device=rows.device)
    return torch.where(hot, rows.movedim(dim, -1)[..., None], nothing).sum(-2).movedim(-1, dim)


def _one_hot(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """Which place along `dim` each entry goes to: [..., R, K] bool."""
    return index.movedim(dim, -1)[..., None] == torch.arange(x.shape[dim], device=x.device)


_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_CROWDED: dict[Any, Callable[..., Any]] = {_ATTENTION: _by_head}
_PRODUCTS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.scatter_add.default: _scatter_add,
    torch.ops.aten.scatter.src: _scatter,
    torch.ops.aten.scatter.value: _scatter_value,
    torch.ops.aten.select_scatter.default: _select_scatter,
    torch.ops.aten.where.ScalarOther: _where_scalar,
}
