"""What a forward leaves belongs to that forward: threads, replicas, traces, compiled pieces, and models that change afterwards."""

import copy
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import timm
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import squeezevit as sv
import zoo
from squeezevit.core.block import state_of
from squeezevit.errors import ConfigError, UnsupportedError

pytestmark = [
    pytest.mark.filterwarnings("ignore:the score heads"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # asked by peft
    pytest.mark.filterwarnings("ignore:_compile flag:DeprecationWarning"),  # given by transformers
]
REDUCERS = ("etps", "etps-mass", "dtps", "tome", "preset", "evit")
FAMILIES = ("average-pool", "dinov3", "hf-siglip", "open_clip-attention", "torchvision")


def hammer(model: nn.Module, call: Callable[[nn.Module, Tensor], Tensor], forwards: int) -> tuple[int, int]:
    """Wrong answers and right ones of four threads, which change hands as often as they can."""
    images = [zoo.images(1, seed=i) for i in range(4)]
    with torch.no_grad():
        expected = [call(model, x) for x in images]

    def work(i: int) -> list[bool]:
        with torch.no_grad():
            return [torch.allclose(call(model, images[i]), expected[i], rtol=1e-5, atol=1e-5) for _ in range(forwards)]

    with short_turns(), ThreadPoolExecutor(4) as pool:
        found = [right for rights in pool.map(work, range(4)) for right in rights]
    return found.count(False), found.count(True)


@contextmanager
def short_turns() -> Iterator[None]:
    """Threads take turns every few microseconds, so that they meet everywhere."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["etps-mass", "tome", "dtps"])
def test_threads_simply_work(family, name):
    model = zoo.reduce(zoo.build(family), zoo.REDUCERS[name])
    assert hammer(model, lambda m, x: zoo.KINDS[family].call(m, x), 15) == (0, 60)


def test_grids_are_laid_out_by_the_forward_they_belong_to():
    model = sv.reduce_(zoo.build("hf-dinov2"), sv.ETPS(keep=0.5, at=(1, 2)), grid=True)
    assert hammer(model, lambda m, x: m.dinov2(x).last_hidden_state, 30) == (0, 120)
    assert state_of(model).trace is None


def test_traces_hold_the_groups_of_their_own_thread():
    model = sv.reduce_(zoo.build("plain"), sv.ETPS(keep=0.5, at=(1, 2)))

    def groups(m: nn.Module, x: Tensor) -> Tensor:
        with sv.trace(m) as t:
            m(x)
        return t.groups.float()

    assert hammer(model, groups, 30) == (0, 120)


def test_a_trace_in_one_thread_does_not_see_another():
    model = sv.reduce_(zoo.build("plain"), sv.ETPS(keep=0.5))
    with sv.trace(model) as t:
        thread = threading.Thread(target=zoo.run, args=(model, zoo.images(2)))
        thread.start()
        thread.join()
    assert not t.stages
    with pytest.raises(ConfigError, match=r"there is no stage -1 in this trace"):
        _ = t.groups


def test_traces_may_be_left_in_any_order():
    model = sv.reduce_(zoo.build("plain"), sv.ETPS(keep=0.5))
    a, b = sv.trace(model), sv.trace(model)
    a.__enter__(), b.__enter__(), a.__exit__(None, None, None)
    zoo.run(model, zoo.images(1))
    b.__exit__(None, None, None)
    assert len(b.stages) == 3 and not a.stages and state_of(model).trace is None
    with a, a:
        zoo.run(model, zoo.images(1))
    assert len(a.stages) == 3 and state_of(model).trace is None


def test_a_trace_left_in_another_thread_is_an_error():
    model = sv.reduce_(zoo.build("plain"), sv.ETPS(keep=0.5))
    t = sv.trace(model)
    threads = ThreadPoolExecutor(1)
    threads.submit(t.__enter__).result()
    with pytest.raises(ConfigError, match="opened in another thread"):
        t.__exit__(None, None, None)
    threads.submit(t.__exit__, None, None, None).result()
    threads.shutdown()


@pytest.mark.parametrize("name", REDUCERS)
def test_replicas_as_data_parallel_makes_them(name):
    """Modules whose dictionaries are shallow copies, as `nn.parallel.replicate` makes them, each in a thread."""
    model, x = zoo.reduce(zoo.build("average-pool"), zoo.REDUCERS[name]), zoo.images(4)
    expected = zoo.run(model, x)

    def replica(module: nn.Module) -> nn.Module:
        twin = module._replicate_for_data_parallel()
        for child_name, child in module._modules.items():
            twin._modules[child_name] = None if child is None else replica(child)
        for parameter_name, parameter in module._parameters.items():
            setattr(twin, parameter_name, None if parameter is None else parameter.detach())
        twin._buffers = dict(module._buffers)
        return twin

    with short_turns(), ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            parts = list(pool.map(zoo.run, [replica(model) for _ in range(2)], x.chunk(2)))
            torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-5, atol=1e-5)


def test_a_thread_that_trains_and_one_that_evaluates():
    model = zoo.reduce(zoo.build("average-pool"), zoo.REDUCERS["etps-mass"])
    x, y = zoo.images(2), zoo.images(2, seed=1)
    expected = zoo.run(model, y)
    loss = model(x).square().mean()
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(zoo.run, model, y).result(), expected)
    loss.backward()
    assert all(p.grad is not None for p in model.blocks.parameters())


def test_pieces_compiled_apart_refuse_a_second_thread():
    """They cannot tell their forwards apart; in one thread they are right."""
    model = zoo.reduce(zoo.build("average-pool"), zoo.REDUCERS["etps-mass"])
    x = zoo.images(1)
    expected = zoo.run(model, x)
    for block in model.blocks:
        block.compile(backend="eager")
    torch.testing.assert_close(zoo.run(model, x), expected)
    stands, done, found = threading.Event(), threading.Event(), []

    def pause(*_: object) -> None:
        if threading.current_thread().name == "first":
            stands.set()
            assert done.wait(60)

    handle = model.norm.register_forward_pre_hook(pause)  # after the blocks, before the pooling

    def first() -> None:
        try:
            found.append(zoo.run(model, x))
        except UnsupportedError as error:
            found.append(error)

    thread = threading.Thread(target=first, name="first")
    thread.start()
    assert stands.wait(60)
    try:
        second = zoo.run(model, zoo.images(1, seed=1))
    except UnsupportedError as error:
        second = error
    done.set()
    thread.join()
    handle.remove()
    assert any(isinstance(result, UnsupportedError) and "compiled apart" in str(result) for result in (found[0], second))
    torch.testing.assert_close(zoo.run(model, x), expected)


def test_pieces_compiled_apart_never_answer_wrongly():
    """Not even where they meet before it is known that there are such pieces."""
    model = zoo.reduce(zoo.build("average-pool"), zoo.REDUCERS["etps-mass"])
    images = [zoo.images(1, seed=i) for i in range(4)]
    expected = [zoo.run(model, x) for x in images]
    for block in model.blocks:
        block.compile(backend="eager")

    def work(i: int) -> list[bool]:
        """Whether each answer is wrong."""
        found = []
        for _ in range(10):
            try:
                found.append(not torch.allclose(zoo.run(model, images[i]), expected[i], rtol=1e-5, atol=1e-5))
            except Exception as error:
                found.append(not isinstance(error, UnsupportedError) and type(error).__module__.startswith("squeezevit"))
        return found

    with ThreadPoolExecutor(4) as pool:
        assert not any(wrong for part in pool.map(work, range(4)) for wrong in part)
    torch.testing.assert_close(zoo.run(model, images[0]), expected[0])


def test_threads_do_not_notice_that_another_compiles():
    """torch says that it compiles to all threads while one of them does."""
    model = zoo.reduce(zoo.build("average-pool"), zoo.REDUCERS["etps-mass"])
    met = []

    def compiler(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        met.append(hammer(model, zoo.run, 10))
        return module.forward

    torch.compile(lambda x: x + 1, backend=compiler)(torch.ones(2))
    assert met == [(0, 40)]


def test_the_whole_model_compiled_works_in_threads():
    torch._dynamo.reset()
    model = zoo.reduce(zoo.build("average-pool"), zoo.REDUCERS["etps-mass"])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    zoo.run(compiled, zoo.images(1))
    assert hammer(compiled, lambda m, x: m(x), 15) == (0, 60)


@pytest.mark.parametrize("family", ["average-pool", "hf-siglip", "open_clip-average"])
@pytest.mark.parametrize("name", ["etps-mass", "tome", "preset"])
def test_fewer_blocks_than_were_reduced_are_noticed(family, name):
    """As in depth pruning: the last stage is gone, and nobody wrote the weights that pooling needs."""
    model = zoo.reduce(zoo.build(family), zoo.REDUCERS[name])
    last = zoo.blocks(model)[-1]
    parent = next(m for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential) and last in set(m.children()))
    del parent[2:]
    with pytest.raises(UnsupportedError, match=r"nobody wrote them: .* call sv.reduce_ again|call sv.reduce_ again"):
        zoo.KINDS[family].call(model, zoo.images(1))


def test_another_attention_function_is_proved_or_refused():
    def plain(module, q, k, v, attention_mask, scaling=None, **kwargs):
        """One that ignores masks."""
        return nn.functional.scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("squeezevit_plain", plain)
    model = zoo.reduce(zoo.build("hf-vit"), sv.ToMe(r=9))
    expected = zoo.run(model, zoo.images(1)).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(zoo.run(model, zoo.images(1)).logits, expected, rtol=1e-5, atol=1e-5)
    for name, complaint in (("squeezevit_plain", "does not take an additive bias"), ("flex_attention", "takes no additive bias")):
        model.set_attn_implementation(name)
        with pytest.raises(UnsupportedError, match=complaint):
            zoo.run(model, zoo.images(1))


def test_a_swapped_attention_is_proved_again():
    class Deaf(nn.Module):
        """An attention that takes a mask and does not heed it."""

        def __init__(self, own: nn.Module) -> None:
            super().__init__()
            self.own = own

        def forward(self, x: Tensor, attn_mask: Tensor | None = None, **kwargs: object) -> Tensor:
            return self.own(x)

    model = zoo.reduce(zoo.build("average-pool"), zoo.REDUCERS["etps-mass"])
    model.blocks[2].attn = Deaf(model.blocks[2].attn)
    with pytest.raises(UnsupportedError, match=r"does not take an additive bias|has no plain rows"):
        zoo.run(model, zoo.images(1))


class PoolsByItself(VisionTransformer):
    """As fine-tuning codes of masked autoencoders do."""

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        return super().forward_features(x, attn_mask)[:, 1:].mean(dim=1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x)


@pytest.mark.parametrize("method", ["forward_features", "forward_head"])
def test_pooling_that_is_not_the_librarys_is_refused_with_masses(method):
    kind = type("Own", (VisionTransformer,), {method: getattr(PoolsByItself, method)})
    model = zoo.randomize(zoo.timm_vit(cls=kind)).eval()
    with pytest.raises(UnsupportedError, match=f"Own.{method} is its own, not the library's"):
        sv.reduce_(model, sv.ETPS(mass=True))
    sv.reduce_(model, sv.ETPS())


@pytest.mark.parametrize("name", REDUCERS)
def test_pooling_by_size_is_the_mean_over_patches(name):
    model, x = zoo.reduce(zoo.build("plain"), zoo.REDUCERS[name]), zoo.images(2)
    with torch.no_grad(), sv.trace(model) as t:
        tokens = model.forward_features(x)[:, zoo.prefix(model) :]
    assert t.sizes.shape == tokens.shape[:2]
    assert torch.equal(t.sizes.sum(dim=1), (t.groups >= 0).sum(dim=1).float())
    on_patches = t.scatter_back(tokens)
    counted = (t.groups >= 0)[..., None]
    torch.testing.assert_close(sv.pool(tokens, t), (on_patches * counted).sum(1) / counted.sum(1))
    with pytest.raises(ConfigError, match=r"leave out the 1 prefix tokens: tokens\[:, 1:\]"):
        sv.pool(model.forward_features(x), t)


def test_scatter_back_takes_an_intermediate_stage():
    """And the message for one that is taken for the last says which it is; its remedy works."""
    model, x = sv.reduce_(zoo.build("plain"), sv.ETPS(keep=0.5, at=(1, 2, 3))), zoo.images(1)
    with torch.no_grad(), sv.trace(model) as t:
        tokens = model.forward_intermediates(x, [2], output_fmt="NLC", intermediates_only=True)[0]
        model(x)
    with pytest.raises(ConfigError, match=r"these left stage 1: scatter_back\(tokens, stage=1\)"):
        t.scatter_back(tokens)
    grid = t.scatter_back(tokens, stage=1)
    assert torch.equal(grid, tokens.gather(1, t.groups_after(1)[..., None].expand_as(grid)))


@pytest.mark.parametrize("saved", ["token_reducer", "token_reducer.0"])
def test_peft_trains_score_heads(saved):
    model = sv.reduce_(zoo.build("hf-vit"), sv.DTPS(keep=0.6))
    lora = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["classifier", saved])
    adapted = get_peft_model(model, lora).train()
    heads = [p for n, p in adapted.named_parameters() if "token_reducer" in n and p.requires_grad]
    with sv.trace(model) as t:
        loss = adapted(pixel_values=zoo.images(2)).logits.square().mean()
    (loss + sv.losses.keep_ratio_loss(t.decisions, sv.DTPS(keep=0.6).targets(3))).backward()
    assert heads and all(p.grad is not None for p in heads)


def test_an_adapter_brings_its_score_heads_back(tmp_path):
    """The way of docs/models.md: the same reducer first, then the adapter's folder."""
    reducer, x = sv.DTPS(keep=0.6), zoo.images(2)
    model = sv.reduce_(zoo.build("hf-vit"), reducer)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["token_reducer"])).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
        expected = adapted(pixel_values=x).logits
        adapted.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(sv.reduce_(zoo.build("hf-vit"), reducer), tmp_path).eval()
        assert torch.equal(again(pixel_values=x).logits, expected)


def test_peft_that_freezes_score_heads_is_told():
    model = sv.reduce_(zoo.build("hf-vit"), sv.DTPS(keep=0.6))
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"])).train()
    with pytest.warns(UserWarning, match=r"score heads at model.token_reducer are frozen .* modules_to_save=\['token_reducer'\]"):
        adapted(pixel_values=zoo.images(2))


@pytest.mark.parametrize("model", ["vit_base_patch16_224", VisionTransformer, None, 3], ids=str)
def test_what_is_no_model_is_refused(model):
    with pytest.raises(UnsupportedError, match="is not a model; build one first"):
        sv.reduce_(model, sv.ETPS())
    with pytest.raises(ConfigError, match="is not reduced"):
        sv.trace(model)


def test_tracers_that_cannot_follow_are_refused():
    model = sv.reduce_(zoo.build("torchvision"), sv.ETPS(keep=0.5))
    with pytest.raises(UnsupportedError, match=r"traced by torch.fx"):
        torch.fx.symbolic_trace(model.encoder.layers)
    with pytest.raises(UnsupportedError, match=r"torch.jit.script cannot compile"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer ones of torch say that they are not for long
        torch.jit.script(model)
    torch.fx.symbolic_trace(sv.restore_(model).encoder.layers[0].mlp)


def test_the_path_in_a_refusal_is_python():
    model = nn.Sequential(nn.Identity(), timm.create_model("vit_tiny_patch16_224", depth=2))
    with pytest.raises(UnsupportedError, match=r"give model\[1\] to sv.reduce_"):
        sv.reduce_(model, sv.ETPS())
    sv.reduce_(eval("model[1]", {"model": model}), sv.ETPS(at=(1,)))


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_another_scale_of_attention_is_respected(factor):
    """The scores are those of the attention that runs: scaling it is the same as scaling the queries' weights."""
    model, other, x = zoo.build("plain"), zoo.build("plain"), zoo.images(2)
    for block, twin in zip(model.blocks, other.blocks, strict=True):
        block.attn.fused_attn = False  # the fused one has a scale of its own
        block.attn.scale *= factor
        with torch.no_grad():
            twin.attn.qkv.weight[: zoo.DIM] *= factor
            twin.attn.qkv.bias[: zoo.DIM] *= factor
    outputs = [zoo.run(sv.reduce_(m, sv.ETPS(keep=0.5)), x) for m in (model, other)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def test_pruned_heads_are_respected():
    model = zoo.build("plain")
    width, keep = zoo.DIM // zoo.HEADS, 10
    rows = torch.arange(3 * zoo.DIM).view(3, zoo.HEADS, width)[:, :, :keep].flatten()
    columns = torch.arange(zoo.DIM).view(zoo.HEADS, width)[:, :keep].flatten()
    for block in model.blocks:
        a = block.attn
        a.qkv.weight, a.qkv.bias = nn.Parameter(a.qkv.weight[rows]), nn.Parameter(a.qkv.bias[rows])
        a.proj.weight = nn.Parameter(a.proj.weight[:, columns])
        a.qkv.out_features, a.proj.in_features, a.head_dim, a.attn_dim = len(rows), len(columns), keep, len(columns)
    twin = copy.deepcopy(model)
    seen: list[Tensor] = []
    sv.reduce_(model, sv.TopK(keep=0.5, at=(1,)))
    model.blocks[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad(), sv.trace(model) as t:
        model(zoo.images(2))
    a, h = twin.blocks[1].attn, twin.blocks[1].norm1(seen[0])
    q, k, _ = a.qkv(h).reshape(2, h.shape[1], 3, zoo.HEADS, keep).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(2, 3) * keep**-0.5).softmax(dim=-1).mean(dim=1)[:, 0, 1:]
    torch.testing.assert_close(t.stages[0].scores, weights, rtol=1e-4, atol=1e-6)


def test_a_call_that_fails_leaves_no_flags():
    """The next call of the tower alone is not averaged, and its masks are looked at."""
    name = "hf-ijepa"
    model, x = zoo.reduce(zoo.build(name), zoo.REDUCERS["etps-mass"]), zoo.images(1)
    with pytest.raises(RuntimeError, match="size"):
        model(torch.randn(1, 3, 7, 9))
    run = state_of(model).forward
    assert not run.averaging and not run.unmasked
    expected = zoo.run(zoo.reduce(zoo.build(name), zoo.REDUCERS["etps-mass"]).ijepa, x).last_hidden_state
    assert torch.equal(zoo.run(model.ijepa, x).last_hidden_state, expected)


def test_heads_that_an_adapter_holds_are_kept_or_refused_by_name():
    """Planning leaves the model as it was, and undoing leaves nothing behind."""
    model = sv.reduce_(zoo.build("hf-vit"), sv.DTPS(keep=0.6))
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["token_reducer"]))
    held = model.token_reducer
    sv.reduce_(model, sv.DTPS(keep=0.5))
    assert model.token_reducer is held and sv.plan(model, sv.DTPS, macs=0.8).learned and model.token_reducer is held
    with pytest.raises(UnsupportedError, match=r"held by a ModulesToSaveWrapper, .* merge or unload the adapter first"):
        sv.reduce_(model, sv.DTPS(keep=0.5, at=(0,)))
    assert not [key for key in sv.restore_(model).state_dict() if "token_reducer" in key]


def test_heads_made_in_inference_mode_can_be_trained():
    with torch.inference_mode():
        model = sv.reduce_(zoo.build("plain"), sv.DTPS(keep=0.6))
    assert not any(p.is_inference() for p in model.token_reducer.parameters())


def test_a_copy_of_what_was_compiled_is_a_copy():
    """A compiled call is of the original's weights."""
    model = zoo.reduce(zoo.build("plain"), sv.ETPS(keep=0.5))
    x = zoo.images(1)
    expected = zoo.run(model, x)
    model.compile(backend="eager")
    zoo.run(model, x)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    torch.testing.assert_close(zoo.run(copied, x), expected)


@pytest.mark.parametrize("compiled", ["by method", "in a wrapper"])
@pytest.mark.parametrize("reducer", [sv.ETPS(keep=0.3, mass=True), sv.TopK(keep=0.5)], ids=["mass", "grid"])
def test_an_averaging_model_averages_by_weight_whatever_is_compiled(compiled, reducer):
    sizes = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 56, "patch_size": 8}
    torch.manual_seed(0)
    model = transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**sizes, num_labels=5)).eval()
    sv.reduce_(model, reducer, grid=isinstance(reducer, sv.TopK))
    x = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        expected = model(x).logits
        if compiled == "by method":
            model.dinov2.compile(backend="eager")
        else:
            model.dinov2 = torch.compile(model.dinov2, backend="eager")
        torch.testing.assert_close(model(x).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooling", ["max", "avgmax", "avg"])
@pytest.mark.parametrize("family", ["plain", "naflex"])
def test_masked_tokens_are_in_no_pooling(family, pooling):
    """In masked training; the oracle pools those that the policy keeps."""
    options = {"class_token": False, "global_pool": pooling, "fc_norm": False, "num_classes": 0}
    if family == "naflex":
        model = timm.models.naflexvit.NaFlexVit(embed_dim=48, depth=4, num_heads=3, patch_size=8, **options)
    else:
        model = timm.create_model("test_vit", img_size=64, **options)
    sv.reduce_(model, sv.DTPS(keep=0.5)).train()
    x = torch.randn(2, 3, 64, 64)
    torch.manual_seed(0)
    with torch.no_grad(), sv.trace(model) as t:
        found = model(x)
    (decision, tokens) = t.decisions[-1] > 0.5, t.tokens
    for image in range(2):
        kept = tokens[image][decision[image]]
        expected = {"max": kept.amax(0), "avg": kept.mean(0)}
        expected["avgmax"] = 0.5 * (expected["max"] + expected["avg"])
        torch.testing.assert_close(found[image], expected[pooling], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pooling", ["avg", "map"])
def test_patches_that_hold_no_token_are_in_no_pooling(pooling):
    options = {"class_token": False, "global_pool": pooling, "fc_norm": False, "img_size": 64}
    model = sv.reduce_(timm.create_model("test_vit", **options).eval(), sv.TopK(keep=0.5, score="received"), grid=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(model.forward_head(model.forward_intermediates(x)[0]), expected)
        with pytest.raises(UnsupportedError, match="have lost the weights"):
            model.forward_head(model.forward_features(x).clone())


def test_features_begin_a_forward_of_their_own():
    """In one trace, a whole forward and then a part of one."""
    model = sv.reduce_(timm.create_model("test_vit", img_size=64, depth=8).eval(), sv.ETPS(keep=0.5), grid=True)
    x, y = torch.randn(2, 3, 64, 64), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        alone = model.forward_intermediates(y, [3], stop_early=True)
        with sv.trace(model) as t:
            model(x)
            found = model.forward_intermediates(y, [3], stop_early=True)
        assert len(t.stages) == 1
        torch.testing.assert_close((found[0], found[1][0]), (alone[0], alone[1][0]))
        by_position = model.forward_intermediates(y, [3], False, False, True, "NLC")
        torch.testing.assert_close(by_position[1][0], model.forward_intermediates(y, [3], stop_early=True, output_fmt="NLC")[1][0])


def test_what_was_wrapped_since_is_left_as_it_is():
    model = zoo.reduce(zoo.build("plain"), sv.ETPS(keep=0.5))
    x = zoo.images(1)
    expected = zoo.run(model, x)
    nn.utils.parametrize.register_parametrization(model, "cls_token", nn.Identity())
    for change in (sv.restore_, lambda m: sv.reduce_(m, sv.ToMe(r=4))):
        with pytest.raises(UnsupportedError, match=r"became a Parametrized\w+ after sv.reduce_"):
            change(model)
    torch.testing.assert_close(zoo.run(model, x), expected)
    nn.utils.parametrize.remove_parametrizations(model, "cls_token")
    assert type(sv.restore_(model)) is type(zoo.build("plain"))


def test_several_reduced_models_in_one_are_told_apart():
    both = nn.ModuleList([zoo.reduce(zoo.build("plain"), sv.ETPS(keep=keep)) for keep in (0.5, 0.6)])
    with pytest.raises(ConfigError, match="holds 2 models that are reduced; give the one that is meant"):
        sv.trace(both)
    assert state_of(both[1]).reducer == sv.ETPS(keep=0.6)


def test_a_score_that_is_a_function_is_not_saved_as_text(tmp_path):
    model = sv.reduce_(zoo.build("hf-vit"), sv.Squeeze(keep=0.5, score=lambda s: s.tokens[:, s.prefix :, 0]))
    with pytest.raises(ConfigError, match=r"has a function as score, which config.json cannot hold"):
        model.save_pretrained(tmp_path)
    assert not hasattr(model.config, "squeezevit")
