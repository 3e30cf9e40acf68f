"""Queries and keys that a stage needs are those its block's attention has computed, whoever changes them and however many run."""

import copy
import threading

import pytest
import torch
from torch import Tensor, nn

import squeezevit as sv
import zoo
from squeezevit.families import Keep, kept, projections

CASES = {  # (kind of model, reducer): projections of a block
    ("hf-siglip-tower", sv.ETPS(keep=0.6)): 2,
    ("hf-siglip-tower", sv.ToMe(r=9)): 2,
    ("hf-dinov3", sv.ETPS(keep=0.6)): 2,
    ("dinov3", sv.ETPS(keep=0.6)): 1,
    ("average-pool", sv.ETPS(keep=0.6, score="received", mass=True)): 1,
}


def computed(model: nn.Module, x: Tensor) -> int:
    """How many of all blocks' projections ran."""
    runs = []
    handles = [
        p.register_forward_pre_hook(lambda m, args: runs.append(m)) for block in zoo.blocks(model) for p in projections(block)
    ]
    zoo.run(model, x)
    for handle in handles:
        handle.remove()
    return len(runs)


@pytest.mark.parametrize(("case", "each"), CASES.items(), ids=str)
def test_nothing_is_projected_twice(case, each):
    kind, reducer = case
    model = zoo.reduce(zoo.build(kind), reducer)
    assert computed(model, zoo.images()) == each * len(zoo.blocks(model))
    hooks = [h for m in model.modules() for h in m._forward_hooks.values() if isinstance(h, Keep)]
    assert hooks and not any(h.outputs for h in hooks), "what was kept goes with its stage"
    sv.restore_(model)
    assert not any(isinstance(h, Keep) for m in model.modules() for h in m._forward_hooks.values())


def test_plain_models_with_a_class_token_keep_nothing():
    model = zoo.reduce(zoo.build("plain"), sv.ETPS(keep=0.6))
    assert not any(isinstance(h, Keep) for m in model.modules() for h in m._forward_hooks.values())


def test_a_later_hook_has_the_last_word():
    """A hook that doubles keys after they were kept: what it makes of them is what attention and scores see."""
    model = zoo.reduce(zoo.build("hf-siglip-tower"), sv.ETPS(keep=0.6))
    other = copy.deepcopy(model)
    for block in zoo.blocks(model):
        block.self_attn.k_proj.register_forward_hook(lambda m, args, out: 2 * out)
    for block in zoo.blocks(other):
        with torch.no_grad():
            block.self_attn.k_proj.weight.mul_(2), block.self_attn.k_proj.bias.mul_(2)
    with sv.trace(model) as t, sv.trace(other) as expected:
        zoo.run(model, zoo.images()), zoo.run(other, zoo.images())
    for a, b in zip(t.stages, expected.stages, strict=True):
        torch.testing.assert_close(a.scores, b.scores)


def test_threads_keep_apart():
    """The second thread runs a whole forward between the first one's attention and its stage."""
    model = zoo.reduce(zoo.build("hf-siglip-tower"), sv.ETPS(keep=0.6))
    x = [zoo.images(seed=1), zoo.images(seed=2)]
    expected = [zoo.run(model, v).last_hidden_state for v in x]
    ready, done, found = threading.Event(), threading.Event(), {}

    def pause(module: nn.Module, args: object, out: object) -> None:
        if threading.current_thread().name == "first" and not done.is_set():
            ready.set()
            assert done.wait(30)

    zoo.blocks(model)[1].self_attn.register_forward_hook(pause)

    def first() -> None:
        found[0] = zoo.run(model, x[0]).last_hidden_state

    thread = threading.Thread(target=first, name="first")
    thread.start()
    assert ready.wait(30) and kept(zoo.blocks(model)[1].self_attn.k_proj) is None
    found[1] = zoo.run(model, x[1]).last_hidden_state
    done.set()
    thread.join()
    for i in range(2):
        torch.testing.assert_close(found[i], expected[i], rtol=0, atol=0)
