"""Queries, keys and values by a layer each: no runtime has to take them out of one tensor by a pass over all of it."""

from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node

_aten = torch.ops.aten


def apart(program: ExportedProgram) -> ExportedProgram:
    """The program, in place, with each linear layer of fused queries, keys and values as three, of a third of its weights each.

    What is computed stays the same. The parts of weights are slices, which a runtime folds when it reads them. A layer stays as it
    is where anything but its three parts is used.
    """
    for module in (m for m in program.graph_module.modules() if isinstance(m, GraphModule)):
        for node in [n for n in module.graph.nodes if n.target is _aten.linear.default]:
            takers = [_taker(user) for user in node.users]
            if node.meta["val"].dim() == 3 and node.meta["val"].shape[-1] % 3 == 0 and all(takers):
                _split(module.graph, node, [taker for taker in takers if taker])
        module.graph.eliminate_dead_code()
        module.recompile()
    return program


def _taker(user: Node) -> tuple[list[Node], Node] | None:
    """From a user of [B, N, 3 * C]: the steps to the node that hands out three parts, and that node; None if there is none."""
    steps, node = [user], user
    while (
        node.target in (_aten.slice.Tensor, _aten.reshape.default, _aten.view.default, _aten.permute.default)
        and len(node.users) == 1
    ):
        node = next(iter(node.users))
        steps.append(node)
    *before, last = steps
    if last.target is _aten.chunk.default and last.args[1:] in ((3, -1), (3, 2)):
        return (before, last) if all(step.target is _aten.slice.Tensor and step.args[1] == 1 for step in before) else None
    if last.target is _aten.unbind.int and len(last.args) == 1 and len(before) == 2:
        shape, order = before[0].args[1], before[1].args[1]
        if before[1].target is _aten.permute.default and isinstance(shape, list) and len(shape) == 5 and shape[2] == 3:
            return (before, last) if order == [2, 0, 3, 1, 4] else None
    return None


def _split(graph: Graph, linear: Node, takers: list[tuple[list[Node], Node]]) -> None:
    width = linear.meta["val"].shape[-1] // 3
    source, *weights = linear.args
    with graph.inserting_before(linear):
        parts = []
        for i in range(3):
            own = [w and _put(graph, _aten.slice.Tensor, (w, 0, i * width, (i + 1) * width), like=linear) for w in weights]
            parts.append(_put(graph, _aten.linear.default, (source, *own), like=linear))
    for steps, hands_out in takers:
        for item in list(hands_out.users):
            part = parts[item.args[1]]  # type: ignore[index]
            with graph.inserting_before(item):
                if hands_out.target is _aten.unbind.int:
                    shape: Any = steps[0].args[1]
                    batch, tokens, _, heads, dim = shape
                    part = _put(graph, _aten.reshape.default, (part, [batch, tokens, heads, dim]), like=steps[0])
                    part = _put(graph, _aten.transpose.int, (part, 1, 2), like=steps[1])
                else:
                    for step in steps:
                        part = _put(graph, step.target, (part, *step.args[1:]), like=step)
            item.replace_all_uses_with(part)


def _put(graph: Graph, target: Any, args: tuple[Any, ...], like: Node) -> Node:
    """A node that comes from the same line of the model as another."""
    node = graph.call_function(target, args)
    fake = like.meta["val"].fake_mode
    with fake:
        value = target(*torch.fx.map_arg(args, lambda n: n.meta["val"]))
    node.meta = {**like.meta, "val": value}
    return node
