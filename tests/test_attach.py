"""Getting in and out: what reduce_ may not touch, what stays of the host, and the state that reduced blocks share."""

import copy
import logging
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import timm
import torch
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import squeezevit as sv
import zoo
from questions import CLOSE, assert_same_gradients, assert_same_snapshot, gradients, snapshot, tensors_within
from squeezevit.errors import SqueezeViTError, UnsupportedError
from squeezevit.reducers.learned import ScoreHeads

pytestmark = pytest.mark.usefixtures("no_gumbel_noise")

STATEFUL = pytest.mark.parametrize("name", ["etps-mass", "tome", "dtps"])
WEIGHING = pytest.mark.parametrize("name", ["etps-mass", "tome"])


def python(code: str, *arguments: str) -> str:
    """Output of a fresh interpreter that sees this checkout."""
    source = str(Path(sv.__file__).parents[1])
    code = f"import sys; sys.path[:0] = [{source!r}, {str(Path(__file__).parent)!r}]\n{code}"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_needs_torch_alone_and_takes_a_fraction_of_its_time():
    """It adds no package to those torch has loaded, and none of the parts of torch that are slow."""
    added, seconds = python(
        "import time; a = time.perf_counter(); import torch; b = time.perf_counter(); before = set(sys.modules)\n"
        "c = time.perf_counter(); import squeezevit; d = time.perf_counter(); new = set(sys.modules) - before\n"
        "packages = {n.split('.')[0] for n in new} - set(sys.stdlib_module_names) - {'squeezevit', 'torch', 'triton'}\n"
        "print([*packages, *(n for n in new if n.startswith(('torch._dynamo', 'torch._inductor', 'torch.onnx')))])\n"
        "print((d - c) / (b - a))"
    ).split("\n", 1)
    assert added == "[]"
    assert float(seconds) < 0.5


def test_the_family_is_loaded_when_its_host_is():
    assert python("import squeezevit.core.cut as f; f.load_families(); print('timm' in sys.modules)").split() == ["False"]
    code = "import squeezevit as sv, timm\nprint(type(sv.reduce_(timm.create_model('test_vit', depth=4), sv.ETPS())).__name__)"
    assert python(code).split() == ["VisionTransformer"]


def test_a_pickle_opens_in_a_process_that_has_imported_nothing(tmp_path):
    model = zoo.reduce(zoo.build("average-pool"), zoo.REDUCERS["etps-mass"])
    x = zoo.images(1)
    torch.save((model, x, zoo.run(model, x)), tmp_path / "model.pt")
    code = "import torch\nm, x, y = torch.load(sys.argv[1], weights_only=False)\nprint((m(x) - y).abs().max().item() < 1e-5)"
    assert python(code, str(tmp_path / "model.pt")).split() == ["True"]


@pytest.mark.parametrize("name", [name for name, reducer in zoo.REDUCERS.items() if not reducer.learned])
def test_random_numbers_are_untouched(name):
    model, x = zoo.build("plain"), zoo.images(1)
    before = torch.get_rng_state()
    sv.reduce_(model, zoo.REDUCERS[name])
    zoo.run(model, x)
    sv.macs(model)
    sv.restore_(model)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", list(zoo.REDUCERS))
@pytest.mark.parametrize("training", [True, False])
def test_training_flags_are_untouched(name, training):
    model = zoo.build("plain").train(training)
    model.blocks[1].attn.attn_drop.train(not training)
    before = {n: m.training for n, m in model.named_modules()}
    sv.reduce_(model, zoo.REDUCERS[name])
    zoo.run(model, zoo.images(1))
    assert {n: m.training for n, m in model.named_modules() if n in before} == before
    assert all(m.training == training for n, m in model.named_modules() if n not in before)


@pytest.mark.parametrize(("model", "kind"), [("average-pool", Block), ("res-post-norm", ResPostBlock)])
def test_classes_keep_their_name_and_kin(model, kind):
    """Wrap policies look for both; every block of a class shares one subclass, in every model."""
    reduced = zoo.reduce(zoo.build(model), sv.ToMe(r=4))
    assert isinstance(reduced, VisionTransformer)
    assert type(reduced).__name__ == "VisionTransformer"
    for block in reduced.blocks:
        assert isinstance(block, kind)
        assert type(block).__name__ == kind.__name__
        assert type(block).__module__ == kind.__module__
        assert type(block) is type(zoo.reduce(zoo.build(model, seed=1), sv.ETPS(mass=True)).blocks[2])


@pytest.mark.parametrize("name", ["etps", "evit", "random"])
def test_only_stages_are_touched_where_later_blocks_need_nothing(name):
    reduced = sv.reduce_(zoo.build("average-pool"), type(zoo.REDUCERS[name])(at=(1, 3)))
    assert [type(block) is Block for block in reduced.blocks] == [True, False, True, False]


def test_parameters_stay_the_same_objects():
    model = zoo.build("plain")
    before = [id(p) for p in model.parameters()]
    sv.reduce_(model, sv.ETPS(mass=True))
    assert [id(p) for p in model.parameters()] == before
    assert [id(p) for p in sv.restore_(model).parameters()] == before


def test_printing_shows_the_stages_and_the_hosts_own_text():
    class Told(Block):
        def extra_repr(self):
            return "told=1"

    model = zoo.build("plain", block_fn=Told)
    text = str(sv.reduce_(model, sv.ETPS(keep=0.5, at=(1, 3), mass=True)))
    assert text.count("told=1") == 4
    assert text.count("squeezevit:") == 3
    for part in (
        "told=1, squeezevit: stage 0 of ETPS(keep=0.5",
        "squeezevit: reduced tokens of ETPS",
        "squeezevit: stage 1 of ETPS",
    ):
        assert part in text
    assert "squeezevit" not in str(sv.restore_(model))


def test_hooks_of_the_host_still_run():
    model, calls = zoo.build("plain"), []
    for module in (model.blocks[2], model.blocks[2].attn, model.blocks[2].mlp):
        module.register_forward_hook(lambda module, args, output: calls.append((type(module).__name__, output.shape[1])))
    sv.reduce_(model, sv.ETPS(keep=0.5, at=(2,)))
    calls.clear()  # the proof has run attention and MLP too
    zoo.run(model, zoo.images(1))
    assert calls == [("Attention", 65), ("Mlp", 33), ("Block", 33)]


@pytest.mark.parametrize("name", ["etps-mass", "dtps"])
def test_meta_device(name, caplog):
    """Nothing can be proved without numbers: a warning says so; after loading weights a second reduce_ proves it."""
    with torch.device("meta"):
        model = VisionTransformer(img_size=64, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=10)
    with caplog.at_level(logging.WARNING, logger="squeezevit"):
        sv.reduce_(model, zoo.REDUCERS[name])
    assert "block 1 is on the meta device" in caplog.text
    assert all(p.is_meta for p in model.parameters())
    assert model(torch.zeros(2, 3, 64, 64, device="meta")).shape == (2, 10)
    model = model.to_empty(device="cpu")
    sv.load_checkpoint_(model, zoo.reduce(zoo.build("plain"), zoo.REDUCERS[name]).state_dict())
    x = zoo.images(1)
    assert torch.equal(
        zoo.run(sv.reduce_(model.eval(), zoo.REDUCERS[name]), x), zoo.run(zoo.reduce(zoo.build("plain"), zoo.REDUCERS[name]), x)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_heads_are_born_where_the_blocks_are(dtype):
    model = sv.reduce_(zoo.build("plain").to(dtype).train(), sv.DTPS())
    assert isinstance(model.token_reducer, ScoreHeads)
    assert {p.dtype for p in model.token_reducer.parameters()} == {dtype}
    assert all(m.training for m in model.token_reducer.modules())


def test_score_heads_run_whole_where_a_part_is_not_plain():
    """Hooks, a forward of one's own and adapters are called; plain heads give the same without the repeated product."""
    head = ScoreHeads([0.5], 16)[0].eval()
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(torch.randn_like(p))  # fresh heads say nearly the same of every token
    x, kept = torch.randn(2, 7, 16), (torch.rand(2, 7) > 0.3).float()
    plain = head(x, kept), head(x)
    seen = []
    for module in (head.out_conv, head.out_conv[0]):
        handle = module.register_forward_hook(lambda m, args, out: seen.append(out.shape))
        for found, expected in zip((head(x, kept), head(x)), plain, strict=True):
            torch.testing.assert_close(found, expected)
        handle.remove()
    assert seen == [(2, 7, 2)] * 2 + [(2, 7, 8)] * 2
    own, head.out_conv[0].forward = head.out_conv[0].forward, lambda x: torch.zeros(*x.shape[:-1], 8)
    assert not torch.allclose(head(x), plain[1])
    head.out_conv[0].forward = own
    torch.testing.assert_close(head(x), plain[1])


def test_heads_that_fit_are_kept():
    model = zoo.reduce(zoo.build("plain"), sv.DTPS(keep=0.5))
    heads = model.token_reducer
    weights = [p.clone() for p in heads.parameters()]
    for again in (sv.DTPS(keep=0.5), sv.DTPS(keep=0.3), sv.DynamicViT(keep=0.5), sv.DTPS(at=(0, 1, 3))):
        sv.reduce_(model, again)
        assert model.token_reducer is heads
    assert all(torch.equal(a, b) for a, b in zip(weights, heads.parameters(), strict=True))
    sv.reduce_(model, sv.DTPS(at=(1, 2)))
    assert model.token_reducer is not heads
    assert len(model.token_reducer) == 2


def test_restoring_what_is_not_reduced_is_harmless():
    for model in (zoo.build("plain"), nn.Linear(2, 2)):
        before = snapshot(model)
        assert sv.restore_(model) is model
        assert_same_snapshot(snapshot(model), before)


def test_a_model_inside_another_can_be_reduced_and_restored():
    """From inside and from outside: a wrapper's restore_ undoes all of it, learned heads too."""
    wrapper = nn.ModuleDict({"encoder": zoo.build("average-pool"), "other": nn.Linear(2, 2)})
    before = snapshot(wrapper)
    for name in ("etps-mass", "dtps"):
        zoo.reduce(wrapper["encoder"], zoo.REDUCERS[name])
        sv.restore_(wrapper)
        assert_same_snapshot(snapshot(wrapper), before)


def test_a_block_used_twice_is_refused():
    """It would be two places at once."""
    model = zoo.build("plain")
    model.blocks[2] = model.blocks[1]
    before = snapshot(model)
    with pytest.raises(SqueezeViTError, match=r"uses one block at several depths.*give each its own copy"):
        sv.reduce_(model, sv.ETPS(at=(1, 2, 3)))
    assert_same_snapshot(snapshot(model), before)


@STATEFUL
def test_copying_in_the_middle_of_a_forward(name):
    """An EMA copy, taken by a hook, neither shares nor brings along what is in the slots; nor does a copy inside a trace."""
    model, x, twins = zoo.reduce(zoo.build("average-pool"), zoo.REDUCERS[name]), zoo.images(2), []
    expected = zoo.run(model, x)
    handle = model.blocks[3].register_forward_pre_hook(lambda *_: twins.append(copy.deepcopy(model)))
    with sv.trace(model) as t:
        assert torch.equal(zoo.run(model, x), expected)
        handle.remove()
        recorded = t.groups
        own = {id(p) for p in twins[0].parameters()}
        assert [v.shape for v in tensors_within(twins[0]) if id(v) not in own] == []
        zoo.run(twins[0], zoo.images(5))
    assert torch.equal(t.groups, recorded)
    assert torch.equal(zoo.run(twins[0], x), expected)


@STATEFUL
def test_saving_in_the_middle_of_a_forward(name):
    """A pickled model is as large as one that has never run."""
    model, sizes = zoo.reduce(zoo.build("average-pool"), zoo.REDUCERS[name]), []
    before = len(pickle.dumps(model))

    def save(module: nn.Module, args: object) -> None:
        if module is model.blocks[3]:
            sizes.append(len(pickle.dumps(model)))

    handle = register_module_forward_pre_hook(save)
    try:
        zoo.run(model, zoo.images(64))
    finally:
        handle.remove()
    assert sizes == [pytest.approx(before, abs=200)]


@WEIGHING
def test_a_loss_that_was_never_backwarded_does_not_disturb_the_next(name):
    model, x = zoo.reduce(zoo.build("average-pool"), zoo.REDUCERS[name]).train(), zoo.images(2)
    expected = gradients(model, x)
    model(zoo.images(3, seed=1))
    found = gradients(model, x)
    assert all(torch.equal(v, found[k]) for k, v in expected.items())


@pytest.mark.parametrize(
    ("name", "reentrant"), [("etps-mass", False), ("etps-mass", True), ("tome", False), ("dtps", False), ("no bias", False)]
)
def test_two_checkpointed_forwards_before_one_backward_are_an_error(name, reentrant):
    """The second forward has replaced what the first one's backward needs; silence would mean wrong gradients."""
    reducer = sv.Squeeze(keep=0.5, at=(0, 2), fuse="mass", bias=False) if name == "no bias" else zoo.REDUCERS[name]
    model = zoo.reduce(zoo.build("average-pool"), reducer).train()
    tokens = [torch.randn(2, 65, zoo.DIM, requires_grad=True) for _ in range(2)]

    def forward(x):
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=reentrant)
        return x.sum()

    first, second = forward(tokens[0]), forward(tokens[1])
    with pytest.raises(
        UnsupportedError,
        match=r"recomputed in backward after another forward.*call backward after each forward, or switch it off",
    ):
        (first + second).backward()
    forward(tokens[0]).backward()


def test_two_checkpointed_forwards_before_one_backward_where_nothing_is_weighed():
    """Siamese training: nothing is left behind that the second forward could replace."""
    for name in ("etps", "topk", "evit"):
        model = zoo.reduce(zoo.build("plain"), zoo.REDUCERS[name]).train()
        x, y = zoo.images(2), zoo.images(2, seed=1)
        loss = model(x).square().sum() + model(y).square().sum()
        expected = torch.autograd.grad(loss, list(model.blocks.parameters()))
        model.set_grad_checkpointing()
        (model(x).square().sum() + model(y).square().sum()).backward()
        for parameter, grad in zip(model.blocks.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, grad, **CLOSE)


@STATEFUL
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("span", ["whole-model", "two-segments"])
def test_checkpointing_of_more_than_one_block(name, reentrant, span):
    """As gradient caching does: recomputed blocks hand each other the slots anew."""
    kind = "average-pool" if span == "whole-model" else "plain"
    model, x = zoo.reduce(zoo.build(kind), zoo.REDUCERS[name]).train(), zoo.images(2).requires_grad_()
    expected = torch.autograd.grad(model(x).square().sum(), [x, *model.blocks.parameters()])
    if span == "whole-model":
        loss = checkpoint(model, x, use_reentrant=reentrant).square().sum()
    else:
        tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
        if name == "dtps" and reentrant:  # the second segment would learn nothing about the first's decisions
            with pytest.raises(UnsupportedError, match="reentrant activation checkpointing loses the gradient"):
                checkpoint_sequential(model.blocks, 2, tokens, use_reentrant=True)
            return
        tokens = checkpoint_sequential(model.blocks, 2, tokens, use_reentrant=reentrant)
        loss = model.forward_head(model.norm(tokens)).square().sum()
    loss.backward()
    for found, wanted in zip([x.grad, *(p.grad for p in model.blocks.parameters())], expected, strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE)


@STATEFUL
def test_an_evaluation_between_forward_and_backward(name):
    model, x = zoo.reduce(zoo.build("average-pool"), zoo.REDUCERS[name]).train(), zoo.images(2)
    expected = gradients(model, x)
    x = x.requires_grad_()
    loss = model(x).square().mean()
    model.eval()
    zoo.run(model, zoo.images(3, seed=1))
    loss.backward()
    torch.testing.assert_close(x.grad, expected[""], **CLOSE)


@WEIGHING
def test_a_head_gets_the_masses_of_its_own_features(name):
    """Features computed for two batches, then pooled: right, or an error, but never pooled by another batch's masses."""
    model = zoo.reduce(zoo.build("average-pool"), zoo.REDUCERS[name])
    x, y = zoo.images(2), zoo.images(2, seed=1)
    expected = zoo.run(model, x)
    first = zoo.run(model.forward_features, x)
    zoo.run(model.forward_features, y)
    assert_right_or_refused(model, first, expected)
    first = zoo.run(model.forward_features, x)
    zoo.run(model.forward_head, first)
    assert_right_or_refused(model, first, expected)


ROUTES = {
    "copied": lambda model, x: model.forward_features(x).clone(),
    "subset": lambda model, x: model.forward_features(torch.cat([x, x]))[:2],
    "block-by-block": lambda model, x: model.norm(model.blocks(model.norm_pre(model._pos_embed(model.patch_embed(x))))),
    "intermediates": lambda model, x: model.forward_intermediates(x, output_fmt="NLC")[0],
    "compiled": lambda model, x: torch.compile(model.forward_features, backend="eager")(x),
}


@WEIGHING
@pytest.mark.parametrize("route", list(ROUTES))
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_features_by_other_routes_are_pooled_by_mass_or_refused(name, route, grad):
    """Whatever became of the tokens between the blocks and the head, they are never pooled as if each were one patch."""
    torch._dynamo.reset()
    model, x = zoo.reduce(zoo.build("average-pool"), zoo.REDUCERS[name]).train(grad), zoo.images(2)
    expected = zoo.run(zoo.reduce(zoo.build("average-pool"), zoo.REDUCERS[name]), x)
    with torch.set_grad_enabled(grad):
        assert_right_or_refused(model, ROUTES[route](model, x), expected)


def assert_right_or_refused(model: nn.Module, features: torch.Tensor, expected: torch.Tensor) -> None:
    try:
        found = model.forward_head(features).detach()
    except SqueezeViTError:
        return
    torch.testing.assert_close(found, expected, **CLOSE)


@STATEFUL
def test_threads_sharing_a_model_are_right_or_refused(name):
    """As in a server: the second forward begins while the first is between two stages, and waits there until the first is done."""
    model, inputs = zoo.reduce(zoo.build("average-pool"), zoo.REDUCERS[name]), [zoo.images(2), zoo.images(2, seed=1)]
    expected, found = [zoo.run(model, x) for x in inputs], {}
    first_waits, second_waits, first_is_done = (threading.Event() for _ in range(3))

    def meet(*_: object) -> None:
        if threading.current_thread().name == "first":
            first_waits.set()
            second_waits.wait(30)
        else:
            second_waits.set()
            first_is_done.wait(30)

    def work(i: int) -> None:
        try:
            found[i] = zoo.run(model, inputs[i])
        except SqueezeViTError as error:
            found[i] = error
        first_is_done.set()

    model.blocks[3].register_forward_pre_hook(meet)
    threads = [threading.Thread(target=work, args=(i,), name=("first", "second")[i]) for i in range(2)]
    threads[0].start()
    first_waits.wait(30)
    threads[1].start()
    for thread in threads:
        thread.join()
    for i, wanted in enumerate(expected):
        if not isinstance(found[i], SqueezeViTError):
            torch.testing.assert_close(found[i], wanted, **CLOSE)


def test_what_a_training_forward_leaves_is_small():
    model = zoo.reduce(zoo.build("average-pool"), zoo.REDUCERS["etps-mass"]).train()
    own = {id(p) for p in model.parameters()}
    model(zoo.images(4)).sum().backward()
    left = [v for v in tensors_within(model) if id(v) not in own and all(v is not p.grad for p in model.parameters())]
    assert all(v.grad_fn is None for v in left), "a graph is kept alive"
    assert sum(v.numel() for v in left) <= 4 * 3 * 2 * 65


@pytest.mark.parametrize("name", ["etps", "etps-mass", "dtps", "tome"])
def test_per_sample_gradients(name):
    """torch.func's vmap of grad, as differential privacy uses it, gives the gradients of one image at a time."""
    model, x = zoo.reduce(zoo.build("average-pool"), zoo.REDUCERS[name]), zoo.images(3)
    weights = {k: p.detach() for k, p in model.named_parameters()}

    def loss(weights, image):
        return torch.func.functional_call(model, weights, (image[None],)).square().sum()

    for image in x:
        found = torch.func.grad(loss)(weights, image)["blocks.0.norm1.weight"]
        wanted = torch.autograd.grad(model(image[None]).square().sum(), model.blocks[0].norm1.weight)[0]
        torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at every input's
@pytest.mark.parametrize(("name", "training"), [("etps-mass", False), ("etps-mass", True), ("tome", False), ("dtps", True)])
def test_blocks_compiled_one_by_one(name, training):
    """What compiled blocks leave behind reaches the eager ones and the pooling; the model itself has never run uncompiled."""
    model, twin = (zoo.reduce(zoo.build("average-pool", depth=2), zoo.REDUCERS[name]).train(training) for _ in range(2))
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)
    for x in (zoo.images(2), zoo.images(2, seed=1)):
        torch.testing.assert_close(zoo.run(model, x), zoo.run(twin, x), **CLOSE)
        assert_same_gradients(gradients(model, x), gradients(twin, x))


@STATEFUL
@pytest.mark.parametrize("frozen", [(0, 1), (3,), (0, 1, 2, 3)], ids=str)
def test_blocks_of_mixed_modes(name, frozen):
    """Fine-tuning with some blocks frozen in evaluation mode, as is usual for those with dropout."""
    model, twin = (zoo.reduce(zoo.build("average-pool"), zoo.REDUCERS[name]).train() for _ in range(2))
    for i in frozen:
        model.blocks[i].eval()
    for x in (zoo.images(2), zoo.images(2, seed=1)):
        torch.testing.assert_close(zoo.run(model, x), zoo.run(twin, x), **CLOSE)
        assert_same_gradients(gradients(model, x), gradients(twin, x))
    model.set_grad_checkpointing()
    assert_same_gradients(gradients(model, x), gradients(twin, x))


@pytest.mark.parametrize("name", ["etps-mass", "dtps", "evit"])
def test_compiled_training(name):
    model, x = zoo.reduce(zoo.build("average-pool", depth=2), zoo.REDUCERS[name]).train(), zoo.images(2)
    expected = gradients(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = x.requires_grad_()
    compiled(x).square().mean().backward()
    torch.testing.assert_close(x.grad, expected[""], **CLOSE)
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[key], **CLOSE)


def test_the_real_compiler():
    """Inductor once, on the reducer with most to get wrong: masses, bias, weighted pooling."""
    model, x = zoo.reduce(zoo.build("average-pool", depth=1), sv.ETPS(keep=0.5, mass=True)), zoo.images(2)
    torch._dynamo.reset()
    torch.testing.assert_close(zoo.run(torch.compile(model, fullgraph=True), x), zoo.run(model, x), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_proof_holds_under_autocast(dtype):
    model = zoo.build("plain")
    with torch.autocast("cpu", dtype):
        sv.reduce_(model, sv.ETPS(mass=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_proof_holds_in_every_precision(dtype):
    sv.reduce_(zoo.build("plain").to(dtype), sv.ETPS(mass=True))


def test_the_proof_runs_whatever_the_default_device_and_dtype_are():
    model = zoo.build("plain")
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            sv.reduce_(model, sv.ETPS())
    finally:
        torch.set_default_dtype(dtype)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", list(zoo.REDUCERS))
def test_a_batch_of_no_image(name):
    """The host takes it, so a filter upstream may leave one."""
    model = zoo.build("average-pool")
    assert zoo.run(model, zoo.images(0)).shape == zoo.run(zoo.reduce(model, zoo.REDUCERS[name]), zoo.images(0)).shape == (0, 10)


def test_inference_mode_throughout():
    with torch.inference_mode():
        model = zoo.reduce(zoo.build("average-pool"), zoo.REDUCERS["etps-mass"])
        expected = model(zoo.images(2))
    assert torch.equal(zoo.run(zoo.reduce(zoo.build("average-pool"), zoo.REDUCERS["etps-mass"]), zoo.images(2)), expected)


REAL = [
    "vit_small_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch16_clip_224",
    "vit_base_patch16_siglip_224",
    "vit_base_patch16_224.mae",
    "vit_base_patch16_rpn_224",
]


def small(name: str) -> VisionTransformer:
    """The library's own constructor with its own options, at a width and depth that a test can afford."""
    size = 56 if "patch14" in name else 64
    return zoo.randomize(timm.create_model(name, img_size=size, embed_dim=48, depth=3, num_heads=3)).eval()


@pytest.mark.parametrize("name", REAL)
def test_real_models_made_small(name):
    model = small(name)
    x = zoo.images(2, model.patch_embed.img_size)
    dense = zoo.run(model, x)
    for reducer in (sv.ETPS(keep=0.5, mass=True), sv.DTPS(keep=0.5), sv.ToMe(r=4)):
        assert not torch.allclose(zoo.run(zoo.reduce(model, reducer), x), dense)
        assert torch.equal(zoo.run(sv.reduce_(model, zoo.switched_off(reducer)), x), dense)
    assert torch.equal(zoo.run(sv.restore_(model), x), dense)


def test_a_real_model_of_parallel_blocks_is_refused():
    with pytest.raises(UnsupportedError, match=r"block 0 is a timm\.models\.vision_transformer\.ParallelThingsBlock"):
        sv.reduce_(small("vit_small_patch16_18x2_224"), sv.ETPS())


def test_a_block_runs_the_handlers_that_were_proved():
    """Also where they are registered after a block of the class was reduced: the reduced class is not one of the old cut."""
    from squeezevit.extend import attn_half, mlp_half

    class Block(timm.models.vision_transformer.Block):
        pass

    model = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=48, num_heads=3, block_fn=Block).eval()
    sv.reduce_(model, sv.TopK(keep=0.5, at=(1,)))
    calls = []
    old = attn_half.dispatch(Block)
    attn_half.register(Block, lambda block, x, bias=None: calls.append(1) or old(block, x, bias))
    mlp_half.register(Block, mlp_half.dispatch(Block))
    sv.reduce_(model, sv.TopK(keep=0.5, at=(1,)))
    calls.clear()
    model(torch.randn(1, 3, 224, 224))
    assert calls
