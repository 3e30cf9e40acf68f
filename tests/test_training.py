"""Training with learned heads against the slow transcription of oracles_training.py, and what it promises beside equality."""

import copy
import math
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import oracles
import oracles_training
import squeezevit as sv
import zoo
from squeezevit.errors import ConfigError, UnsupportedError
from squeezevit.train import losses

METHODS = {"dtps": sv.DTPS, "dynamicvit": sv.DynamicViT}
AT = sv.DTPS().stages(zoo.DEPTH)
SCHEDULES = {"every-block": {"at": (0, 1, 2, 3)}, "last-block": {"at": (3,)}, "per-stage": {"at": (0, 2), "keep": (0.8, 0.3)}}
EACH_METHOD = pytest.mark.parametrize("method", list(METHODS))
EACH_MODEL = pytest.mark.parametrize("kind", list(zoo.MODELS))
# Without a norm before it the attention of "res-post-norm" has logits so far apart that 1e-6 times their exp is no longer little
SAME_MASKED = [kind for kind in zoo.MODELS if kind != "res-post-norm"]
LOW_PRECISION = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def training(kind: str, method: str, seed: int = 0, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    """A tiny reduced model in training mode."""
    return zoo.reduce(zoo.build(kind, seed), METHODS[method](**{"keep": 0.6, **options}), seed).to(dtype).train()


def bias_heads(model: nn.Module, keep: float, drop: float) -> None:
    """Every head of the model says "keep" and "drop" with these logits, plus what it sees."""
    for head in model.token_reducer:
        last = [m for m in head.out_conv.modules() if isinstance(m, nn.Linear)][-1]
        with torch.no_grad():
            last.bias.copy_(torch.tensor([keep, drop]))


def traced(model: nn.Module, x: Tensor, seed: int = 0) -> SimpleNamespace:
    """One forward of the library under a seed, in the words of the oracle."""
    torch.manual_seed(seed)
    with sv.trace(model) as t:
        logits = model(x)
    parameters = dict(model.named_parameters())
    return SimpleNamespace(
        logits=logits, decisions=list(t.decisions), stage_logits=list(t.logits), tokens=t.tokens, parameters=parameters, trace=t
    )


def transcribed(
    model: nn.Module, x: Tensor, method: str, seed: int = 0, at: tuple[int, ...] = AT, policy_form: str = "additive"
) -> SimpleNamespace:
    """The oracle's forward of a copy of the library's model under the same seed."""
    plain, heads = zoo.build_like(model), copy.deepcopy(list(model.token_reducer))
    torch.manual_seed(seed)
    found = oracles_training.forward(plain, heads, x, method, at, policy_form)
    found.parameters = dict(plain.named_parameters())
    for j, head in enumerate(heads):
        found.parameters.update({f"token_reducer.{j}.{name}": p for name, p in head.named_parameters()})
    return found


def objectives(found: SimpleNamespace, keep_ratio, distillation) -> dict[str, Tensor]:
    """Numbers to differentiate: of the output, of all that the trace gives, and both losses.

    Thousands of terms that may nearly cancel are added in float64, and those of the tokens squared, so that how a processor
    rounds is not what is compared.
    """
    draws = torch.Generator().manual_seed(7)

    def probe(values: Tensor) -> Tensor:
        return torch.randn(values.shape, generator=draws, dtype=torch.float64).to(values.dtype)

    stages = range(len(found.decisions))
    return {
        "output": (found.logits * probe(found.logits)).double().sum(),
        "decisions": sum((found.decisions[j] * probe(found.decisions[j])).double().sum() for j in stages),
        "stage logits": sum((found.stage_logits[j] * probe(found.stage_logits[j])).double().sum() for j in stages),
        "tokens": (found.tokens * probe(found.tokens)).double().square().sum().sqrt(),
        "keep ratio": keep_ratio(found.decisions, [0.6 ** (j + 1) for j in stages]),
        "distillation": distillation(
            found.logits, probe(found.logits), found.tokens, probe(found.tokens), found.decisions[-1].detach()
        ),
    }


def gradients(objective: Tensor, found: SimpleNamespace, x: Tensor) -> dict[str, Tensor]:
    """Of the images and of every parameter, by name; zeros where the objective does not reach."""
    sources = {"images": x, **found.parameters}
    results = torch.autograd.grad(objective, list(sources.values()), retain_graph=True, allow_unused=True)
    return {name: torch.zeros_like(s) if g is None else g for (name, s), g in zip(sources.items(), results, strict=True)}


def head_gradients(objective: Tensor, found: SimpleNamespace) -> list[tuple[str, Tensor | None]]:
    """(name, gradient) of each parameter of each head."""
    heads = {name: p for name, p in found.parameters.items() if name.startswith("token_reducer.")}
    return list(zip(heads, torch.autograd.grad(objective, list(heads.values()), retain_graph=True, allow_unused=True), strict=True))


def assert_near(found: Tensor, wanted: Tensor, tolerance: float, what: str, floor: float = 0.0) -> None:
    """The largest difference is below `tolerance` of the largest value (or of `floor`, where all of them are smaller)."""
    assert found.shape == wanted.shape, f"{what}: {tuple(found.shape)}, not {tuple(wanted.shape)}"
    error = (found.double() - wanted.double()).abs().max().item()
    size = max(wanted.double().abs().max().item(), floor)
    assert error <= tolerance * size, f"{what}: differs by {error:.2e} of {size:.2e}"


def assert_equals_oracle(
    model: nn.Module, method: str, seed: int = 0, tolerance: float = 1e-4, at: tuple[int, ...] = AT
) -> SimpleNamespace:
    """Outputs, decisions, head logits, tokens, both losses and the gradients of each with respect to everything."""
    x = zoo.images(3, seed=seed).to(next(model.parameters()).dtype).requires_grad_()
    found, wanted = traced(model, x, seed), transcribed(model, x, method, seed, at)
    assert set(found.parameters) == set(wanted.parameters)
    assert_near(found.logits, wanted.logits, tolerance, "output")
    assert_near(found.tokens, wanted.tokens, tolerance, "tokens")
    for j, (decision, logits) in enumerate(zip(wanted.decisions, wanted.stage_logits, strict=True)):
        assert torch.equal(found.decisions[j] > 0.5, decision > 0.5), f"other tokens kept at stage {j}"
        assert_near(found.decisions[j], decision, tolerance, f"decisions {j}")
        assert_near(found.stage_logits[j], logits, tolerance, f"logits {j}")
    expected = objectives(wanted, oracles_training.keep_ratio_loss, oracles_training.distillation_loss)
    for name, objective in objectives(found, losses.keep_ratio_loss, losses.distillation_loss).items():
        if name == "distillation":
            tolerance = max(tolerance, 1e-5)  # taken in float32 whatever comes in
        assert_near(objective, expected[name], tolerance, name)
        gradient, gradient_wanted = gradients(objective, found, x), gradients(expected[name], wanted, x)
        largest = max(g.abs().max().item() for g in gradient_wanted.values())
        for parameter, value in gradient_wanted.items():
            assert_near(gradient[parameter], value, tolerance, f"gradient of {name}: {parameter}", floor=largest / 30)
    return wanted


def noiseless(logits: Tensor, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1) -> Tensor:
    """`F.gumbel_softmax` without the Gumbel noise."""
    soft = (logits / tau).softmax(dim)
    if not hard:
        return soft
    return F.one_hot(soft.argmax(dim), logits.shape[-1]).to(soft.dtype) - soft.detach() + soft


class KeepBest:
    """A stand-in for `F.gumbel_softmax` that keeps, of the tokens it kept before, as many of the best as it is told."""

    def __init__(self, counts: list[int]) -> None:
        self.counts, self.alive = list(counts), None

    def __call__(self, logits: Tensor, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1) -> Tensor:
        odds = logits.detach()[..., 0] - logits.detach()[..., 1]
        if self.alive is not None:
            odds = odds.masked_fill(~self.alive, -torch.inf)
        best = odds.topk(self.counts.pop(0), dim=-1).indices
        self.alive = torch.zeros_like(odds).scatter(1, best, 1.0) > 0
        soft = logits.softmax(dim)
        return torch.stack([self.alive, ~self.alive], dim=-1).to(soft.dtype) - soft.detach() + soft


@pytest.mark.parametrize("progress", [0, 0.25, 0.5, 1])
def test_annealing_follows_a_cosine_from_everything_to_the_reducer_itself(progress):
    """As EViT trains (Liang et al. 2022, section 4); what samples its own counts stays as it is."""
    left = (1 + math.cos(math.pi * progress)) / 2
    for reducer in (sv.ETPS(keep=0.6), sv.EViT(keep=(0.7, 0.4), at=(0, 2)), sv.TopK(0.5), sv.DTPS(keep=0.5, train="topk")):
        softened = reducer.annealed(progress)
        keep, wanted = (k if isinstance(k, tuple) else (k,) for k in (softened.keep, reducer.keep))
        assert keep == pytest.approx([k + (1 - k) * left for k in wanted], abs=1e-12)
        assert type(softened.keep) is type(reducer.keep) and replace(softened, keep=reducer.keep) == reducer
        assert (softened == reducer) == (progress == 1)
    for masked in (sv.DTPS(keep=0.5), sv.DynamicViT(keep=0.5), sv.Identity()):
        assert masked.annealed(progress) == masked


def test_annealing_of_tome_begins_at_one_token_a_block():
    assert [sv.ToMe(r=8).annealed(p).r for p in (0, 0.5, 1)] == [1, 4, 8]
    assert [sv.ToMe(r=(8, 0, 3, 1)).annealed(p).r for p in (0, 0.5, 1)] == [(1, 0, 1, 1), (4, 0, 2, 1), (8, 0, 3, 1)]


@pytest.mark.parametrize("progress", [-0.1, 1.1, float("nan")])
def test_annealing_takes_a_share_of_the_way(progress):
    for reducer in (sv.ETPS(), sv.ToMe(r=2)):
        with pytest.raises(ConfigError, match="is no share of the way; give a number from 0 to 1"):
            reducer.annealed(progress)


@pytest.mark.parametrize("seed", range(3))
@EACH_MODEL
@EACH_METHOD
def test_training_equals_oracle(method, kind, seed):
    assert_equals_oracle(training(kind, method, seed), method, seed)


@EACH_MODEL
@EACH_METHOD
def test_double_precision_training_equals_oracle_more_closely(method, kind):
    assert_equals_oracle(training(kind, method, 3, torch.float64), method, 3, tolerance=1e-8)


@pytest.mark.parametrize("schedule", list(SCHEDULES))
@EACH_METHOD
def test_schedules_equal_oracle(method, schedule):
    options = SCHEDULES[schedule]
    model = training("registers", method, 4, torch.float64, **options)
    assert_equals_oracle(model, method, 4, tolerance=1e-8, at=options["at"])


@pytest.mark.parametrize("kind", ["plain", "average-pool", "attention-pool"])
@EACH_METHOD
def test_heads_that_drop_everything_keep_the_best_token(method, kind):
    model = training(kind, method, 1, torch.float64)
    bias_heads(model, -50.0, 50.0)
    wanted = assert_equals_oracle(model, method, 5, tolerance=1e-8)
    odds = wanted.stage_logits[0][..., 0] - wanted.stage_logits[0][..., 1]
    for decision in wanted.decisions:
        assert (decision > 0.5).sum(dim=1).tolist() == [1, 1, 1]
        assert torch.equal(decision.argmax(dim=1), odds.argmax(dim=1))


@EACH_METHOD
def test_heads_that_keep_everything_change_nothing(method):
    model = training("plain", method)
    bias_heads(model, 50.0, -50.0)
    x = zoo.images(2)
    assert_near(traced(model, x).logits, zoo.build_like(model)(x), 1e-5, "output")


@EACH_METHOD
def test_same_decisions_masked_or_dropped_as_evaluated(method, monkeypatch):
    """Noise replaced by the ranking that evaluation uses: the library against itself."""
    for kind in SAME_MASKED:
        model, x = training(kind, method), zoo.images(3)
        counts = oracles.stage_counts(method, zoo.PATCHES, 0.6, len(model.token_reducer))
        with monkeypatch.context() as patch:
            patch.setattr(F, "gumbel_softmax", KeepBest(counts))
            masked = traced(model, x)
        assert [(d > 0.5).sum(dim=1).tolist() for d in masked.decisions] == [[count] * 3 for count in counts]
        assert_near(masked.logits, zoo.run(model.eval(), x), 1e-5, kind)


@pytest.mark.parametrize("kind", SAME_MASKED)
@EACH_METHOD
def test_same_decisions_masked_or_dropped_as_sampled(method, kind):
    """Sampled decisions, of another count in each image, against tokens that the oracle of evaluation really drops."""
    model, x = training(kind, method, dtype=torch.float64), zoo.images(3).double()
    found = traced(model, x, seed=2)
    for b in range(3):
        counts = [zoo.PATCHES, *(int((d[b] > 0.5).sum()) for d in found.decisions)]
        keeps = [later / sooner for sooner, later in pairwise(counts)]
        scores, alive = [], torch.arange(zoo.PATCHES)
        for decision in found.decisions:
            scores.append(decision[b, alive].detach()[None])
            alive = alive[decision[b, alive] > 0.5]
        dropped = oracles.forward(zoo.build_like(model), x[b : b + 1], method, keep=keeps, at=AT, score=scores)
        assert [len(stage.kept[0]) for stage in dropped.stages] == counts[1:]
        assert_near(found.logits[b], dropped.logits[0], 1e-5, f"image {b}")
        assert_near(found.tokens[b, alive], dropped.features[0, model.num_prefix_tokens :], 1e-4, f"tokens of image {b}")


@EACH_METHOD
def test_decisions_only_ever_drop(method):
    model = training("plain", method)
    decisions = traced(model, zoo.images(3)).decisions
    for sooner, later in zip([torch.ones_like(decisions[0]), *decisions], decisions, strict=False):
        assert torch.isclose(later, later.round(), atol=1e-6).all()
        assert (later <= sooner + 1e-6).all()
        assert ((later > 0.5).sum(dim=1) < (sooner > 0.5).sum(dim=1)).all()


@EACH_METHOD
def test_one_gumbel_softmax_per_stage_is_all_the_chance(method, monkeypatch):
    calls, real = [], F.gumbel_softmax

    def spy(logits, *args, **options):
        calls.append((tuple(logits.shape), options))
        return real(logits, *args, **options)

    monkeypatch.setattr(F, "gumbel_softmax", spy)
    traced(training("distilled", method), zoo.images(2), seed=3)
    state = torch.get_rng_state()
    assert calls == [((2, zoo.PATCHES, 2), {"hard": True})] * 3
    torch.manual_seed(3)
    for _ in range(3):
        real(torch.zeros(2, zoo.PATCHES, 2), hard=True)
    assert torch.equal(torch.get_rng_state(), state)


@EACH_METHOD
def test_seed_decides(method):
    model, x = training("plain", method), zoo.images(2)
    first, again, other = (traced(model, x, seed) for seed in (0, 0, 1))
    assert torch.equal(first.logits, again.logits)
    assert not torch.equal(first.decisions[0] > 0.5, other.decisions[0] > 0.5)


@EACH_METHOD
def test_an_image_does_not_depend_on_its_batch(method, monkeypatch):
    monkeypatch.setattr(F, "gumbel_softmax", noiseless)
    for kind in ("plain", "average-pool"):
        model, x = training(kind, method), zoo.images(4)
        together = traced(model, x)
        assert len({tuple((d > 0.5).sum(dim=1).tolist()) for d in together.decisions}) > 1
        for b in range(4):
            alone = traced(model, x[b : b + 1])
            assert_near(alone.logits[0], together.logits[b], 1e-5, "output")
            for mine, ours in zip(alone.decisions, together.decisions, strict=True):
                assert torch.equal(mine[0] > 0.5, ours[b] > 0.5)


@EACH_METHOD
def test_return_type_and_other_modes_are_the_hosts(method):
    x = zoo.images(2)
    model = training("distilled", method)
    assert isinstance(model(x), Tensor)
    model.set_distilled_training()
    outputs = model(x)
    assert isinstance(outputs, tuple)
    assert [o.shape for o in outputs] == [(2, zoo.CLASSES)] * 2
    assert model.forward_features(x).shape == (2, 2 + zoo.PATCHES, zoo.DIM)


@EACH_METHOD
def test_evaluation_after_training_counts_exactly(method):
    model, x = training("plain", method), zoo.images(2)
    before = zoo.run(model.eval(), x)
    model.train()(x).sum().backward()
    with sv.trace(model.eval()) as t:
        after = zoo.run(model, x)
    assert torch.equal(before, after)
    assert [s.kept.shape for s in t.stages] == [(2, count) for count in oracles.stage_counts(method, zoo.PATCHES, 0.6, 3)]
    assert torch.equal(copy.deepcopy(model)(x), after)


@EACH_METHOD
def test_copies_after_a_training_forward(method):
    """As an exponential moving average takes them."""
    model, x = training("plain", method), zoo.images(2)
    model(x).sum().backward()
    twin = copy.deepcopy(model)
    assert torch.equal(traced(model, x).logits, traced(twin, x).logits)


@EACH_METHOD
def test_every_head_learns_from_the_output_and_from_the_keep_ratio(method):
    found = traced(training("plain", method), zoo.images(2))
    for objective in (found.logits.square().sum(), losses.keep_ratio_loss(found.decisions, [0.6, 0.36, 0.216])):
        for name, gradient in head_gradients(objective, found):
            assert gradient is not None, name
            assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("train", ["masked", "topk"])
@EACH_METHOD
def test_heads_without_a_gradient_into_the_backbone(method, train):
    """What is put out is the same, and so are the heads' own gradients; the backbone has none from scores."""
    x, found = zoo.images(2), {}
    for detach in (False, True):
        found[detach] = traced(training("plain", method, train=train, detach=detach), x)
        of_scores = found[detach].stage_logits[-1].square().sum()
        block = [p for name, p in found[detach].parameters.items() if name.startswith("blocks.0.")]
        gradients = torch.autograd.grad(of_scores, block, retain_graph=True, allow_unused=True)
        assert all(g is None for g in gradients) if detach else all(g is not None and g.abs().max() > 0 for g in gradients)
    assert torch.equal(found[True].logits, found[False].logits)
    own, other = (head_gradients(found[d].logits.square().sum(), found[d])[-1][1] for d in (True, False))
    torch.testing.assert_close(own, other)


@pytest.mark.parametrize("kind", ["plain", "average-pool", "attention-pool"])
@LOW_PRECISION
@EACH_METHOD
def test_autocast_stays_finite(method, dtype, kind):
    """Also with heads that drop all but one token, whose log-probabilities are -100."""
    for drop in (0.0, 50.0):
        model, x = training(kind, method), zoo.images(2).requires_grad_()
        bias_heads(model, -drop, drop)
        with torch.autocast("cpu", dtype):
            found = traced(model, x)
            loss = losses.keep_ratio_loss(found.decisions, [0.6, 0.36, 0.216]) + losses.distillation_loss(
                found.logits, torch.randn(2, zoo.CLASSES), found.tokens, torch.randn(2, zoo.PATCHES, zoo.DIM), found.decisions[-1]
            )
            loss = loss + F.cross_entropy(found.logits.float(), torch.tensor([1, 2]))
        loss.backward()
        for values in (found.logits, found.tokens, *found.decisions, *found.stage_logits, x.grad):
            assert values.isfinite().all()
        for name, parameter in model.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), name
        assert {v.dtype for v in (*found.decisions, *found.stage_logits)} == {torch.float32}


@pytest.mark.parametrize("kind", ["plain", "average-pool", "attention-pool", "registers"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@EACH_METHOD
def test_pruned_tokens_are_not_seen_again(method, dtype, kind):
    """Their content is replaced on the way into the next stage's block: 1e-6 of the attention may differ, or how it rounds.

    Kept tokens changed by 1e-6 of themselves move the output by as much: 1e-5, in bfloat16 and float16 one unit in the last place.
    """
    model, x = training(kind, method), zoo.images(2)
    with torch.no_grad(), nullcontext() if dtype is None else torch.autocast("cpu", dtype):
        reference = traced(model, x)
        gone = torch.cat([torch.zeros(2, model.num_prefix_tokens), 1 - reference.decisions[0].round()], dim=1)[..., None] > 0.5

        def replace(block: nn.Module, args: tuple) -> tuple:
            tokens = args[0]
            noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(9)).to(tokens.dtype)
            return (torch.where(gone, noise * tokens.std(), tokens), *args[1:])

        handle = model.blocks[AT[0] + 1].register_forward_pre_hook(replace)
        changed = traced(model, x)
        handle.remove()
    assert not torch.allclose(changed.tokens[gone[:, model.num_prefix_tokens :, 0]], reference.tokens[gone[:, -zoo.PATCHES :, 0]])
    for mine, ours in zip(changed.decisions, reference.decisions, strict=True):
        assert torch.equal(mine > 0.5, ours > 0.5)
    assert_near(changed.logits, reference.logits, 2 * torch.finfo(dtype).eps if dtype else 2e-5, "output", floor=1.0)


@pytest.mark.parametrize("inside", [True, False], ids=["traced-backward", "untraced-backward"])
@pytest.mark.parametrize("kind", ["plain", "average-pool"])
@EACH_METHOD
def test_activation_checkpointing_changes_nothing(method, kind, inside):
    model, x, results = training(kind, method), zoo.images(2), []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        torch.manual_seed(1)
        with sv.trace(model) as t:
            output = model(x)
            loss = output.square().sum() + losses.keep_ratio_loss(t.decisions, [0.6, 0.36, 0.216]) + t.tokens.square().mean()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        assert len(t.decisions) == len(t.logits) == 3
        results.append({"output": output, **{name: p.grad.clone() for name, p in model.named_parameters()}})
    for name, value in results[0].items():
        assert_near(results[1][name], value, 1e-5, name, floor=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@EACH_METHOD
def test_two_forwards_before_a_backward(method, checkpointing):
    """Siamese training: what one forward leaves behind never reaches the gradients of the other; at worst it is refused."""
    model = training("plain", method)
    model.set_grad_checkpointing(checkpointing)
    pair = [zoo.images(2, seed=seed) for seed in (0, 1)]
    for seed, x in enumerate(pair):
        torch.manual_seed(seed)
        model(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    outputs = []
    for seed, x in enumerate(pair):
        torch.manual_seed(seed)
        outputs.append(model(x))
    with pytest.raises(UnsupportedError, match="recomputed") if checkpointing else nullcontext():
        sum(output.square().sum() for output in outputs).backward()
    for name, parameter in model.named_parameters():
        if not checkpointing:
            assert_near(parameter.grad, expected[name], 1e-5, name, floor=1e-3)


@pytest.mark.parametrize("kind", ["plain", "average-pool"])
def test_the_authors_softmax_differs_by_less_than_its_eps_can_do(kind):
    """Ours adds log(policy + 1e-6), DynamicViT's adds 1e-6 / T to every weight: each lets a dropped token have about 1e-6."""
    model, x = training(kind, "dtps", dtype=torch.float64), zoo.images(3).double()
    ours, theirs = (transcribed(model, x, "dtps", policy_form=form) for form in oracles_training.POLICIES)
    for mine, other in zip(ours.decisions, theirs.decisions, strict=True):
        assert torch.equal(mine > 0.5, other > 0.5)
    assert_near(ours.logits, theirs.logits, 1e-4, "output")
    assert not torch.equal(ours.logits, theirs.logits)


def test_losses_equal_oracle_on_their_own():
    """Also where a whole image has one token left, and where targets differ by stage."""
    kept = (torch.rand(4, 20) > 0.6).float()
    kept[0] = 0
    kept[0, 3] = 1
    decisions = [torch.rand(4, 20) for _ in range(2)]
    found = losses.keep_ratio_loss(decisions, (0.7, 0.49))
    assert_near(found, oracles_training.keep_ratio_loss(decisions, (0.7, 0.49)), 1e-6, "keep ratio")
    arguments = torch.randn(4, 7), torch.randn(4, 7), torch.randn(4, 20, 12), torch.randn(4, 20, 12), kept
    assert_near(losses.distillation_loss(*arguments), oracles_training.distillation_loss(*arguments), 1e-6, "distillation")
    same = arguments[0], arguments[0], arguments[2], arguments[2], kept
    assert losses.distillation_loss(*same).abs() < 1e-6


@pytest.mark.parametrize("kind", ["plain", "registers", "average-pool", "attention-pool"])
def test_training_by_topk_drops_what_evaluation_drops(kind, monkeypatch):
    """Counts always; tokens and output too once the noise is switched off."""
    model, x = training(kind, "dtps", train="topk"), zoo.images(2)
    counts = oracles.stage_counts("dtps", zoo.PATCHES, 0.6, 3)
    with sv.trace(model) as t:
        output = model(x)
        features = model.forward_features(x)
    assert features.shape[1] == model.num_prefix_tokens + counts[-1]
    assert [s.kept.shape for s in t.stages] == [(2, count) for count in counts]
    for decision, count in zip(t.decisions, counts, strict=True):
        assert decision.shape == (2, zoo.PATCHES)
        assert ((decision - decision.round()).abs() < 1e-6).all()
        assert decision.round().sum(dim=1).tolist() == [count] * 2
    found = SimpleNamespace(parameters=dict(model.named_parameters()))
    for name, gradient in head_gradients(output.square().sum(), found):
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() > 0, name
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, *args, **options: self.fill_(1.0))
    quiet = zoo.run(model, x)
    assert_near(quiet, zoo.run(model.eval(), x), 1e-5, "output")


@pytest.mark.parametrize("method", ["dtps", "dynamicvit"])
def test_training_by_topk_tells_what_keeping_a_pruned_token_would_have_done(method):
    """Without a gradient for the tokens that leave, heads learn to drop what matters: when it is gone, the others are blamed."""
    model = training("plain", method, train="topk", at=(1,))
    with sv.trace(model) as t:
        output = model(zoo.images(2))
    (gradient,) = torch.autograd.grad(output.square().sum(), t.logits)
    assert (gradient.gather(1, t.stages[0].pruned[..., None].expand(-1, -1, 2)).abs() > 0).all()
