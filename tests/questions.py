"""One list of questions, asked by test_questions.py of every reducer in every kind of model. A question is a function of a `Case`.

A new method or family answers all of them by one more line in zoo.REDUCERS, or zoo.RIVALS, or zoo.KINDS.
"""

import copy
import io
import pickle
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

import squeezevit as sv
import zoo
from oracles import stage_counts
from squeezevit.core import proof
from squeezevit.core.block import state_of
from squeezevit.core.reducer import Reducer, Staged
from squeezevit.errors import UnsupportedError
from squeezevit.reducers.per_block import PerBlock

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@dataclass(frozen=True)
class Case:
    """One reducer in one kind of model."""

    model: str
    reducer_name: str

    def __str__(self) -> str:
        return f"{self.model}-{self.reducer_name}"

    @property
    def reducer(self) -> Reducer:
        return (zoo.REDUCERS | zoo.RIVALS)[self.reducer_name]

    @property
    def kind(self) -> zoo.Kind:
        return zoo.KINDS[self.model]

    def host(self, seed: int = 0, **options: Any) -> Any:
        return zoo.build(self.model, seed, **options)

    def reduced(self, seed: int = 0, **options: Any) -> Any:
        return zoo.reduce(self.host(seed, **options), self.reducer, seed)

    def run(self, model: nn.Module, x: Tensor) -> Tensor:
        """The model's output, nothing recorded for a backward."""
        with torch.no_grad():
            return self.kind.call(model, x)

    def run_resized(self, model: nn.Module, x: Tensor) -> Tensor:
        """The same with images of any size."""
        with torch.no_grad():
            return self.kind.call(model, x, **self.kind.resized)

    def tokens(self, model: nn.Module, x: Tensor) -> Tensor:
        """All tokens in the end, [B, P + N, C]."""
        seen: list[Tensor] = []
        handle = model.get_submodule(self.kind.final).register_forward_hook(lambda module, args, out: seen.append(out))
        self.run(model, x)
        handle.remove()
        return seen[0]

    def gradients(self, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        return gradients(model, x, self.kind.call)

    def brief(self) -> Any:
        """For questions that take a second: two blocks with a stage in each in one kind of model, in the others one stage.

        A second block then follows it only where it is told of the first, by masses or by the places of tokens.
        """
        reducer, depth = self.reducer, 2
        if self.model != THOROUGH:
            depth = 2 if reducer.weighs or self.kind.rotary else 1
            first = {"r": (9, 0)} if isinstance(reducer, PerBlock) else {"at": (0,)} if isinstance(reducer, Staged) else {}
            reducer = replace(reducer, **first)
        return zoo.reduce(self.host(depth=depth), reducer)


THOROUGH = "average-pool"  # where most can go wrong: masses reach the bias, the scores and the pooling
TOLD_PLACES = "dinov3"  # where one rival answers, too, by turns: blocks are told the place of every token
VARIANTS = (  # the code of another line of zoo.REDUCERS but for one step
    *("identity", "etps-received", "dtps-topk", "evit-normalize"),
    *("tofu", "merge-error", "shift"),
)
MAIN = tuple(name for name in zoo.REDUCERS if name not in VARIANTS)
Question = Callable[[Case], None]
QUESTIONS: list[tuple[Question, Case]] = []
_asked: list[Question] = []


def question_where(
    answers: Callable[[zoo.Kind], object], thorough: Sequence[str] = tuple(zoo.REDUCERS)
) -> Callable[[Question], Question]:
    """A question for those kinds of models that have what is asked about.

    One kind answers it with every reducer, each other kind with one that goes round: over all questions every kind meets every main
    reducer, and every question that is asked of all kinds meets each of them. thorough: the reducers of that one kind; empty: by
    turns there, too.
    """

    def register(ask: Question) -> Question:
        number = len(_asked)
        _asked.append(ask)
        for i, (model, kind) in enumerate(zoo.KINDS.items()):
            if not answers(kind):
                continue
            asked_thoroughly = model == THOROUGH and thorough
            chosen = thorough if asked_thoroughly else [MAIN[(i + number) % len(MAIN)]]
            if asked_thoroughly:
                chosen = [*chosen, *(name for name in zoo.RIVALS if thorough is not MAIN or name not in VARIANTS)]
            elif model == TOLD_PLACES:
                chosen = [*chosen, [*zoo.RIVALS][number % len(zoo.RIVALS)]]
            QUESTIONS.extend((ask, Case(model, reducer)) for reducer in chosen)
        return ask

    return register


question = question_where(lambda kind: True)
REPRESENTATIVES = {  # of all ways in which hosts differ for a compiler
    *("plain", THOROUGH, "attention-pool", "qk-norm", "registers", "eva02", "dinov3", "rope-mixed", "naflex-map", "torchvision"),
    *("beit", "relative"),
    *("hf-vit", "hf-deit", "hf-dinov2", "hf-dinov3", "hf-clip-tower", "hf-siglip-tower", "hf-mae", "hf-beit"),
    *("open_clip-tower", "open_clip-attention"),
}
representatives = [zoo.KINDS[name] for name in REPRESENTATIVES]
slow_question = question_where(lambda kind: kind in representatives, MAIN)  # one that takes seconds


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that undoing must bring back: classes, attributes and modes of all modules, and all tensors."""
    modules = {name: (type(m), sorted(vars(m)), m.training) for name, m in model.named_modules()}
    return {"modules": modules, "tensors": {k: v.clone() for k, v in model.state_dict().items()}}


def assert_same_snapshot(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a["modules"] == b["modules"]
    assert list(a["tensors"]) == list(b["tensors"])
    assert all(torch.equal(v, b["tensors"][k]) for k, v in a["tensors"].items())


def gradients(model: nn.Module, x: Tensor, call: Callable[..., Tensor] = nn.Module.__call__) -> dict[str, Tensor]:
    """Gradients of a fixed scalar of the output, for the input and every parameter that gets one; the model's are cleared."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    call(model, x).square().mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"": x.grad, **found}


def assert_same_gradients(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b)
    for name, grad in a.items():
        torch.testing.assert_close(grad, b[name], **CLOSE, msg=lambda text, name=name: f"gradient of {name or 'the input'}: {text}")


def planned_counts(reducer: Reducer, patches: int = zoo.PATCHES, depth: int = zoo.DEPTH) -> list[int]:
    """Patch tokens that leave each stage, by the oracle's arithmetic."""
    if isinstance(reducer, sv.Identity):
        return []
    if isinstance(reducer, PerBlock):
        counts = [patches]
        for _ in reducer.stages(depth):
            counts.append(counts[-1] - min(reducer.r, counts[-1] // 2))
        return counts[1:]
    return stage_counts(type(reducer).__name__.lower(), patches, reducer.keep, len(reducer.stages(depth)))


@question
def off_is_bit_equal(case):
    x, model = zoo.images(), case.host()
    dense, dense_tokens = case.run(model, x), case.tokens(model, x)
    sv.reduce_(model, zoo.switched_off(case.reducer))
    assert torch.equal(case.run(model, x), dense)
    assert torch.equal(case.tokens(model, x), dense_tokens)


@question
def keys_are_unchanged(case):
    model = case.host()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    sv.reduce_(model, case.reducer)
    after = model.state_dict()
    new = [k for k in after if k not in before]
    assert [k for k in after if k in before] == list(before)
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert all(k.startswith("token_reducer.") for k in new)
    assert bool(new) == case.reducer.learned


@question
def restore_is_bit_equal(case):
    x, model = zoo.images(), case.host()
    before, dense = snapshot(model), case.run(model, x)
    zoo.reduce(model, case.reducer)
    case.run(model, x)
    assert sv.restore_(model) is model
    assert_same_snapshot(snapshot(model), before)
    assert torch.equal(case.run(model, x), dense)


@question
def reducing_twice_replaces(case):
    x, model = zoo.images(), case.host()
    before, fresh = snapshot(model), case.run(case.reduced(), x)
    for other in (sv.ETPS(keep=0.3, at=(1,), mass=True), sv.DynamicViT(keep=0.5, at=(2,)), case.reducer):
        zoo.reduce(model, other)
        case.run(model, x)
    zoo.reduce(model, case.reducer)
    assert torch.equal(case.run(model, x), fresh)
    assert_same_snapshot(snapshot(sv.restore_(model)), before)


@question
def deepcopy_is_independent(case):
    x, model = zoo.images(), case.reduced()
    expected = case.run(model, x)
    twin = copy.deepcopy(model)
    assert torch.equal(case.run(twin, x), expected)
    if case.reducer.stages(zoo.DEPTH):
        with sv.trace(model) as t:
            case.run(twin, x)
        assert not t.stages
    sv.restore_(twin)
    assert torch.equal(case.run(model, x), expected)
    assert torch.equal(case.run(twin, x), case.run(case.host(), x))


@question
def pickles(case):
    x, model = zoo.images(), case.reduced()
    expected, buffer = case.run(model, x), io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for loaded in (pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert [type(m) for m in loaded.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(case.run(loaded, x), expected)
        assert torch.equal(case.run(sv.restore_(loaded), x), case.run(case.host(), x))


@question_where(lambda kind: kind.checkpointing is not None)
def activation_checkpointing_changes_nothing(case):
    x, model = zoo.images(), case.reduced().train()
    expected, expected_grads = case.kind.call(model, x).detach(), case.gradients(model, x)
    for reentrant in case.kind.reentrant:
        with case.kind.checkpointing(model, reentrant):
            if reentrant and case.reducer.masks:
                with pytest.raises(
                    UnsupportedError, match="reentrant activation checkpointing loses the gradient of the decisions"
                ):
                    case.gradients(model, x)
                continue
            torch.testing.assert_close(case.kind.call(model, x).detach(), expected, **CLOSE)
            assert_same_gradients(case.gradients(model, x), expected_grads)


class Entry(nn.Module):
    """A model as a module that takes images and returns its output."""

    def __init__(self, case: Case, model: nn.Module) -> None:
        super().__init__()
        self.call, self.model = case.kind.call, model

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.model, x)


@slow_question
def compiles_in_one_graph(case):
    """And the second call does not compile again."""
    x, model = zoo.images(), case.brief()
    expected = case.run(model, x)
    torch._dynamo.reset()
    backend = "aot_eager" if case.model == THOROUGH else "eager"  # which differ in nothing that a kind of model brings
    compiled = torch.compile(Entry(case, model), fullgraph=True, backend=backend)
    torch.testing.assert_close(zoo.run(compiled, x), expected, **CLOSE)
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(zoo.run(compiled, x), expected, **CLOSE)
    torch.testing.assert_close(case.run(model, x), expected, rtol=0, atol=0)


@question_where(lambda kind: kind in representatives, thorough=())
def exports_with_dynamic_batch(case):
    """Every reducer, in the kind that is asked thoroughly: tests/test_export.py."""
    model = case.brief()
    with torch.no_grad():
        program = torch.export.export(Entry(case, model), (zoo.images(3),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    exported = program.module()
    for count in (1, 2, 5):
        x = zoo.images(count, seed=count)
        torch.testing.assert_close(zoo.run(exported, x), case.run(model, x), **CLOSE)


class LowRank(nn.Module):
    """An adapter as PEFT's: a Linear kept inside, and a low-rank map beside it."""

    def __init__(self, base: nn.Linear, seed: int) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 4, bias=False), nn.Linear(4, base.out_features, bias=False)
        zoo.randomize(self.down, seed, gain=0.5)
        zoo.randomize(self.up, seed + 1, gain=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))

    def merged(self) -> nn.Linear:
        linear = copy.deepcopy(self.base)
        linear.weight.data += self.up.weight.data @ self.down.weight.data
        return linear


def adapt(model: nn.Module, leaves: tuple[str, ...], merge: bool = False) -> None:
    for i, block in enumerate(zoo.blocks(model)):
        for leaf in leaves:
            adapter = LowRank(block.get_submodule(leaf), seed=i)
            block.set_submodule(leaf, adapter.merged() if merge else adapter)


@question
def adapter_leaves_work_before_and_after(case):
    """Both ways equal the adapter merged into the weight: scores and keys come from the adapted projections."""
    x, before, after, merged = zoo.images(), case.host(), case.reduced(), case.host()
    plain = case.run(after, x)
    adapt(before, case.kind.adapted)
    zoo.reduce(before, case.reducer)
    adapt(after, case.kind.adapted)
    adapt(merged, case.kind.adapted, merge=True)
    zoo.reduce(merged, case.reducer)
    expected = case.run(merged, x)
    assert (expected - plain).abs().max() > 1e-2, "the adapter is too weak to show anything"
    torch.testing.assert_close(case.run(before, x), expected, **CLOSE)
    torch.testing.assert_close(case.run(after, x), expected, **CLOSE)


def adapt_attention(model: nn.Module, name: str) -> None:
    """PEFT's adapter around the attention, called `name`, of every block; it folds itself into the packed weight and back."""
    wanted = [block.get_submodule(name) for block in zoo.blocks(model)]
    paths = [path for path, module in model.named_modules() if any(module is attention for attention in wanted)]
    torch.manual_seed(1)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=paths, init_lora_weights=False), model).eval()


@question_where(lambda kind: kind.packed)
def adapters_of_packed_projections_are_right_or_refused(case):
    """q, k and v are rows of one parameter of torch's own attention: refused by reducers that score by them."""
    x, before, after, merged = zoo.images(), case.host(), case.reduced(), case.host()
    plain, name = case.run(after, x), case.kind.packed
    for model in (before, after, merged):
        adapt_attention(model, name)
    if case.reducer.scored and case.reducer.stages(zoo.DEPTH):
        for ask in (lambda: zoo.reduce(before, case.reducer), lambda: case.run(after, x)):
            with pytest.raises(UnsupportedError, match=r"MultiheadAttention has no plain rows to score by; .* merge it first"):
                ask()
        return
    for block in zoo.blocks(merged):
        adapted = block.get_submodule(name)
        adapted.merge()
        block.set_submodule(name, adapted.get_base_layer())
    expected = case.run(zoo.reduce(merged, case.reducer), x)
    assert (expected - plain).abs().max() > 1e-2, "the adapter is too weak to show anything"
    torch.testing.assert_close(case.run(zoo.reduce(before, case.reducer), x), expected, **CLOSE)
    torch.testing.assert_close(case.run(after, x), expected, **CLOSE)


def quantise(model: nn.Module, kept: tuple[str, ...] = ()) -> None:
    """The linear leaves of every block, but for those `kept`, become int8 ones."""
    config = torch.ao.quantization.default_dynamic_qconfig
    for block in zoo.blocks(model):
        leaves = {name: config for name, leaf in block.named_modules() if type(leaf) is nn.Linear and name not in kept}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.ao is deprecated in favour of torchao; its int8 leaves are still in use
            torch.ao.quantization.quantize_dynamic(block, leaves, dtype=torch.qint8, inplace=True)


@question
def int8_leaves_work_before_and_after(case):
    x, before, after = zoo.images(), case.host(), case.reduced()
    kept_plain = first_kept(case, after, x)
    quantise(before, case.kind.sliced)
    zoo.reduce(before, case.reducer)
    quantise(after, case.kind.sliced)
    assert torch.equal(case.run(before, x), case.run(after, x))
    assert case.run(after, x).isfinite().all()
    if kept_plain is not None:
        kept = first_kept(case, after, x)
        same = (kept[:, :, None] == kept_plain[:, None]).any(dim=2).float().mean()
        assert same > 0.9, f"int8 weights reserve other tokens than float ones ({same:.0%} the same)"


def first_kept(case: Case, model: nn.Module, x: Tensor) -> Tensor | None:
    with sv.trace(model) as t:
        case.run(model, x)
    return t.stages[0].kept if t.stages else None


@question_where(lambda kind: kind.features)
def forward_features_may_be_called_directly(case):
    model, x = case.reduced(), zoo.images()
    expected = case.run(model, x)
    for _ in range(2):  # also without a head in between, which would clear what masses a pooling needs
        tokens = zoo.run(model.forward_features, x)
    assert torch.equal(zoo.run(model.forward_head, tokens), expected)
    assert torch.equal(case.run(model, x), expected)


@question
def two_models_share_nothing(case):
    """A model runs inside the other's forward, between two stages, and neither notices."""
    x, y = zoo.images(2), zoo.images(3, seed=1)
    outer, inner, twin = case.reduced(), case.reduced(seed=1), copy.deepcopy(case.reduced())
    alone = case.run(outer, x), case.run(inner, y), case.run(twin, y)
    during = []
    zoo.blocks(outer)[2].register_forward_pre_hook(lambda *_: during.extend([case.kind.call(inner, y), case.kind.call(twin, y)]))
    assert torch.equal(case.run(outer, x), alone[0])
    assert torch.equal(during[0], alone[1])
    assert torch.equal(during[1], alone[2])


@question_where(lambda kind: kind.resizing is not None)
def image_and_batch_sizes_may_alternate(case):
    batches = [zoo.images(3), zoo.images(1, (48, 96)), zoo.images(2, 32), zoo.images(2)]
    fresh = [case.run_resized(case.reduced(**case.kind.resizing), x) for x in batches]
    model = case.reduced(**case.kind.resizing)
    for _ in range(2):
        for x, expected in zip(batches, fresh, strict=True):
            assert torch.equal(case.run_resized(model, x), expected)
            with_graph = case.kind.call(model, x, **case.kind.resized)  # which keeps masses alive
            if case.kind.biased:
                torch.testing.assert_close(with_graph.detach(), expected, **CLOSE)
            else:
                assert torch.equal(with_graph.detach(), expected)


@question
def token_counts_are_as_planned(case):
    model, x = case.reduced(), zoo.images()
    planned = planned_counts(case.reducer)
    with sv.trace(model) as t:
        tokens = case.tokens(model, x)
    leaving = [*planned, zoo.PATCHES][0 if not planned else len(planned) - 1]
    assert tokens.shape == (3, zoo.prefix(model) + leaving, zoo.DIM)
    assert t.tokens.shape == (3, leaving, zoo.DIM)
    assert [s.n_out for s in t.stages] == planned
    assert all(s.n_out - s.kept.shape[1] == isinstance(case.reducer, sv.EViT | sv.PruMerge) for s in t.stages)
    assert [s.kept.shape[1] + s.pruned.shape[1] for s in t.stages] == [zoo.PATCHES, *planned][: len(planned)]
    assert [s.block for s in t.stages] == list(case.reducer.stages(zoo.DEPTH))
    for s in t.stages:
        assert torch.equal(torch.cat([s.kept, s.pruned], 1).sort(dim=1).values, torch.arange(s.n).expand(3, -1))


@question
def batch_mates_never_matter(case):
    model, x = case.reduced(), zoo.images(4)
    together, groups = traced(case, model, x)
    for mates in ([2], [2, 0], [3, 3, 2, 1, 2]):
        output, found = traced(case, model, x[mates])
        torch.testing.assert_close(output, together[mates], **CLOSE)
        assert groups is None or torch.equal(found, groups[mates])


def traced(case: Case, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Output, and where there are stages the groups after each: [B, stages, N0]."""
    with sv.trace(model) as t:
        output = case.run(model, x)
    groups = [t.groups_after(j) for j in range(len(t.stages))]
    return output, torch.stack(groups, dim=1) if groups else None


@question
def autocast_stays_near_float32(case):
    model, host, x = case.reduced(), case.host(), zoo.images()
    expected, groups = traced(case, model, x)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            output, found = traced(case, model, x)
            assert output.dtype == case.run(host, x).dtype
        assert_near(output, expected, found, groups, dtype)


@question
def low_precision_weights_run(case):
    """Converted after reduce_ and before it."""
    expected, groups = traced(case, case.reduced(), zoo.images())
    for dtype in (torch.bfloat16, torch.float16):
        x, model = zoo.images().to(dtype), case.reduced().to(dtype)
        output, found = traced(case, model, x)
        assert output.dtype == dtype
        assert_near(output, expected, found, groups, dtype)
        assert torch.equal(case.run(zoo.reduce(case.host().to(dtype), case.reducer), x), output)


def assert_near(found: Tensor, expected: Tensor, groups: Tensor | None, expected_groups: Tensor | None, dtype: torch.dtype) -> None:
    """Rounding to dtype may swap tokens of nearly equal score; where it did not, only rounding itself is allowed for."""
    same = torch.ones(len(found), dtype=torch.bool) if groups is None else (groups == expected_groups).flatten(1).all(dim=1)
    distances = (found.float() - expected).norm(dim=1) / expected.norm(dim=1)
    allowed = torch.where(same, 0.05 if dtype == torch.bfloat16 else 0.005, 0.9)
    assert (distances < allowed).all(), f"{distances} of the float32 outputs away from them, where {same} have the same groups"


@question
def gradients_reach_input_and_parameters(case):
    """All that they reach in the host unreduced."""
    x, model = zoo.images(), case.reduced().train()
    found, dense = (case.gradients(m, x) for m in (model, case.host().train()))
    assert [name for name in found if not name.startswith("token_reducer.")] == list(dense)
    assert all(found[name].isfinite().all() for name in found)
    assert {name for name in dense if not found[name].any()} == {name for name in dense if not dense[name].any()}


@question
def inference_leaves_no_tensors_behind(case):
    model = case.reduced()
    own = {id(v) for v in [*model.parameters(), *model.buffers()]}
    case.run(model, zoo.images())
    assert [tuple(v.shape) for v in tensors_within(model) if id(v) not in own] == []


def tensors_within(root: object) -> list[Tensor]:
    """Every tensor that an object keeps alive through its attributes and containers, at any depth."""
    found, waiting, seen = [], [root], set()
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, type | ModuleType | FunctionType):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, Mapping):
            waiting.extend(item.values())
        elif isinstance(item, list | tuple | set):
            waiting.extend(item)
        else:
            waiting.extend(getattr(item, "__dict__", {}).values())
    return found


@question
def functional_call_with_other_weights(case):
    model, x = case.reduced(), zoo.images()
    other = case.reduced(seed=1)
    with torch.no_grad():
        output = torch.func.functional_call(Entry(case, model), dict(Entry(case, other).named_parameters()), (x,))
    torch.testing.assert_close(output, case.run(other, x), **CLOSE)


@slow_question
def macs_fall_and_nothing_else_changes(case):
    model, host, x = case.reduced(), case.host(), zoo.images()
    dense, before, expected = sv.macs(host), snapshot(model), case.run(model, x)
    assert sv.macs(model) < dense if case.reducer.stages(zoo.DEPTH) else sv.macs(model) == dense
    assert_same_snapshot(snapshot(model), before)
    assert torch.equal(case.run(model, x), expected)


@question
def threads_have_forwards_of_their_own(case):
    """The second thread runs whole forwards while the first stands between two blocks; both trace."""
    model, x = case.reduced(), [zoo.images(2), zoo.images(2, seed=1)]
    expected = [traced(case, model, v) for v in x]
    stands, done, found = threading.Event(), threading.Event(), {}

    def pause(*_: object) -> None:
        if threading.current_thread().name == "first" and not done.is_set():
            stands.set()
            assert done.wait(60)

    handle = zoo.blocks(model)[2].register_forward_pre_hook(pause)

    def run() -> None:
        found[0] = traced(case, model, x[0])

    first = threading.Thread(target=run, name="first")
    first.start()
    assert stands.wait(60)
    found[1] = traced(case, model, x[1])
    done.set()
    first.join()
    handle.remove()
    for i in range(2):
        assert torch.equal(found[i][0], expected[i][0])
        assert expected[i][1] is None or torch.equal(found[i][1], expected[i][1])


@question
def hooks_of_users_see_what_the_model_calls(case):
    """As often as unreduced, whether they were set before or after; nothing runs on random tokens inside reduce_."""
    x = zoo.images(2)
    host, before, after = case.host(), case.host(), case.reduced()
    calls = {name: [] for name in ("host", "before", "after")}

    def watch(model: nn.Module, seen: list[str]) -> None:
        for i, block in enumerate(zoo.blocks(model)):
            for name, module in block.named_modules():
                if name:
                    module.register_forward_hook(lambda *_, name=f"{i}.{name}": seen.append(name))
                    module.register_forward_pre_hook(lambda *_, name=f"{i}.{name}": seen.append(name))

    for model, seen in zip((host, before, after), calls.values(), strict=True):
        watch(model, seen)
    zoo.reduce(before, case.reducer)
    assert not calls["before"], "reduce_ called a user's hook"
    for model in (host, before, after):
        case.run(model, x)
    assert calls["before"] == calls["host"]
    assert calls["after"] == calls["host"]


@question
def scores_that_are_not_those_of_the_attention_are_refused(case):
    if not (case.reducer.scored and case.reducer.stages(zoo.DEPTH)):
        return
    host = case.host()
    base = type(zoo.blocks(host)[0])
    own = proof.cut

    def wrong(block_class: type) -> Any:
        handlers = own(block_class)
        attend = handlers.attention
        return replace(handlers, attention=lambda block, x, **rows: doubled(attend(block, x, **rows)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "cut", wrong)
        with pytest.raises(UnsupportedError, match=f"{base.__name__}, cannot be reduced: its scores would not be those"):
            sv.reduce_(host, case.reducer)
    sv.reduce_(host, case.reducer)


def doubled(a: Any) -> Any:
    """Evidence of another scale."""
    return a._replace(query=lambda n: 2 * a.query(n))


@question
def replaced_blocks_are_noticed(case):
    """Where later blocks or a pooling need what a stage left; else what is left of the stages runs."""
    stages = case.reducer.stages(zoo.DEPTH)
    if not stages:
        return
    model, x = case.reduced(), zoo.images(2)
    zoo.replace_block(model, stages[-1], zoo.blocks(case.host())[stages[-1]])
    pooled = state_of(model).pooled and case.reducer.weighs
    if case.kind.rotary or (case.reducer.weighs and stages[-1] < zoo.DEPTH - 1) or pooled:
        # a block that nobody told of the tokens that left fails in its library's words over rotary rows
        with pytest.raises((UnsupportedError, RuntimeError), match=r"call sv.reduce_ again|size|shape"):
            case.run(model, x)
        expected = case.run(case.reduced(), x)
        assert torch.equal(case.run(zoo.reduce(model, case.reducer), x), expected)
    else:
        assert case.run(model, x).isfinite().all()
