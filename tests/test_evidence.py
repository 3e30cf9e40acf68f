"""Queries and keys that a stage needs are those its block's attention has computed, whoever changes them and however many run."""

import copy
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import squeezevit as sv
import zoo
from squeezevit.core.cut import attention, attn_half, mlp_half, projections
from squeezevit.core.evidence import Recorder, recorded

CASES = {  # (kind of model, reducer): the norm before attention, and projections, of a block
    ("plain", sv.ETPS(keep=0.6)): 2,
    ("plain", sv.ToMe(r=9)): 2,
    ("res-post-norm", sv.TopK(keep=0.6)): 1,
    ("torchvision", sv.ETPS(keep=0.6)): 1,
    ("open_clip-tower", sv.EViT(keep=0.6)): 1,
    ("hf-siglip-tower", sv.ETPS(keep=0.6)): 3,
    ("hf-dinov3", sv.ToMe(r=9)): 3,
    ("qk-norm", sv.Squeeze(score="redundancy", keep=0.6)): 2,
    ("hf-dinov3", sv.ETPS(keep=0.6)): 3,
    ("dinov3", sv.ETPS(keep=0.6)): 2,
    ("average-pool", sv.ETPS(keep=0.6, score="received", mass=True)): 2,
}


def hooks(model: nn.Module) -> list[Recorder]:
    return [h for m in model.modules() for h in m._forward_hooks.values() if isinstance(h, Recorder)]


def computed(model: nn.Module, x: Tensor) -> int:
    """How many of all blocks' norms and projections ran."""
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
    assert hooks(model) and not any(h.outputs for h in hooks(model)), "what was kept goes with its stage"
    assert not hooks(sv.restore_(model))


@pytest.mark.parametrize(("kind", "reducer"), [("plain", sv.Random(keep=0.6)), ("dinov3", sv.DTPS(keep=0.6))], ids=str)
def test_where_nothing_is_scored_by_attention_nothing_is_kept(kind, reducer):
    assert not hooks(zoo.reduce(zoo.build(kind), reducer))


def test_what_the_host_changes_in_place_is_not_kept():
    """EVA with its biases apart adds them to what its projection put out."""
    model = zoo.build("eva02")
    for block in model.blocks:
        block.attn.qkv_bias_separate = True
    other = copy.deepcopy(model)
    sv.reduce_(model, sv.ETPS(keep=0.6)), sv.reduce_(other, sv.ETPS(keep=0.6))
    assert not hooks(model)
    for block in other.blocks:
        block.attn.qkv_bias_separate = False
    torch.testing.assert_close(zoo.run(model, zoo.images()), zoo.run(other, zoo.images()))


def test_blocks_of_ones_own_with_other_projections_are_reduced():
    class Own(type(zoo.build("plain").blocks[0])):
        """A block that derives from timm's and keeps its projection under a name of its own."""

    model = zoo.build("average-pool")
    for block in model.blocks:
        block.__class__ = Own
        block.attn.q_proj = None
    attn = model.blocks[1].attn
    attn.to_qkv, attn.qkv = attn.qkv, None
    assert projections(model.blocks[1]) == () and len(projections(model.blocks[0])) == 2


def test_a_block_of_ones_own_with_another_norm_is_reduced():
    class Own(type(zoo.build("plain").blocks[0])):
        """Cut by handlers of its own."""

    class Twice(type(zoo.build("plain").blocks[0])):
        """Norms prefix and patches one after the other, so that what its norm put out last is not what attention sees."""

    attn_half.register(Own, lambda block, x, bias=None: x + block.attn(block.before(x), attn_mask=bias))
    attention.register(
        Own, lambda block, x: attention.dispatch(Own.__base__)(SimpleNamespace(attn=block.attn, norm1=block.before), x)
    )
    Own.forward = lambda block, x: mlp_half(block, attn_half(block, x))
    attn_half.register(Twice, lambda block, x, bias=None: x + block.attn(norm_twice(block, x), attn_mask=bias))
    for base in (Own, Twice):
        model = zoo.build("plain")
        for block in model.blocks:
            block.__class__ = base
            if base is Own:
                block.before, block.norm1 = block.norm1, None
        expected = zoo.run(sv.reduce_(zoo.build("plain"), sv.ETPS(keep=0.6)), zoo.images())
        torch.testing.assert_close(zoo.run(sv.reduce_(model, sv.ETPS(keep=0.6)), zoo.images()), expected)
        assert bool(hooks(model)) == (base is Own), "the norm that runs twice is not kept"


def norm_twice(block: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([block.norm1(x[:, :1]), block.norm1(x[:, 1:])], dim=1)


@pytest.mark.parametrize("kind", ["plain", "eva02", "hf-dinov3"])
def test_what_runs_outside_of_the_block_is_not_kept(kind):
    model = zoo.reduce(zoo.build(kind), sv.ETPS(keep=0.6))
    expected = zoo.run(model, zoo.images())
    for block in zoo.blocks(model):
        for module in projections(block):
            module(torch.randn(2, 5, zoo.DIM))
    assert hooks(model) and not any(h.outputs for h in hooks(model))
    again = zoo.run(model, zoo.images())
    torch.testing.assert_close(
        *(getattr(o, "logits", getattr(o, "last_hidden_state", o)) for o in (again, expected)), rtol=0, atol=0
    )


def test_a_forward_that_fails_leaves_nothing_behind():
    model = zoo.reduce(zoo.build("hf-siglip-tower"), sv.ETPS(keep=0.6))
    handle = zoo.blocks(model)[1].self_attn.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        zoo.run(model, zoo.images())
    handle.remove()
    assert hooks(model) and not any(h.outputs or h.compiled is not None for h in hooks(model))


def fail(*_: object) -> None:
    raise MemoryError


def test_attention_compiled_alone_gives_the_same():
    model = zoo.reduce(zoo.build("hf-siglip-tower"), sv.ETPS(keep=0.6))
    expected = zoo.run(model, zoo.images()).last_hidden_state
    for block in zoo.blocks(model):
        block.self_attn.compile(backend="eager")
    zoo.run(model, zoo.images(seed=1))
    torch.testing.assert_close(zoo.run(model, zoo.images()).last_hidden_state, expected)
    assert not any(h.outputs or h.compiled is not None for h in hooks(model))


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
    assert ready.wait(30) and recorded(zoo.blocks(model)[1].self_attn.k_proj) is None
    found[1] = zoo.run(model, x[1]).last_hidden_state
    done.set()
    thread.join()
    for i in range(2):
        torch.testing.assert_close(found[i], expected[i], rtol=0, atol=0)
