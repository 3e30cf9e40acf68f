"""A start for score heads: they learn a ranking and their ratio, and nothing else changes."""

import pytest
import timm
import torch
import transformers

import squeezevit as sv
from squeezevit.core.trace import Trace
from squeezevit.errors import ConfigError
from squeezevit.train.warm import warm_heads_

KEEP, AT = 0.5, (1, 2)


def model(reducer: sv.DTPS) -> torch.nn.Module:
    torch.manual_seed(0)
    options = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
    return sv.reduce_(timm.create_model("vit_tiny_patch16_224", **options), reducer).train()


def batches(count: int, seed: int = 0):
    """Blobs, so that tokens differ."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield torch.nn.functional.interpolate(3 * torch.randn(16, 3, 8, 8, generator=generator), 64, mode="bicubic")


@pytest.mark.parametrize("kind", [sv.DTPS, sv.DynamicViT])
def test_heads_rank_as_the_guide_and_begin_at_their_ratio(kind):
    net = model(kind(keep=KEEP, at=AT))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    first = warm_heads_(net, batches(1))
    last = warm_heads_(net, batches(150))
    new = warm_heads_(net, batches(1, seed=9))  # of images it has not seen
    assert all(b > a + 0.08 for a, b in zip(first.agreement, last.agreement, strict=True)), (first, last)
    assert min(new.agreement) > 0.62 and max(last.loss) < min(first.loss)  # by chance it is 0.5
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("token_reducer.") for name in changed) and net.training
    with Trace(net) as t, torch.no_grad():
        for x in batches(1, seed=9):
            net(x)
    kept = [float(decision.mean()) for decision in t.decisions]
    assert kept == pytest.approx([KEEP, KEEP**2], abs=0.08)


def test_agreement_is_with_what_the_training_free_reducer_keeps(monkeypatch):
    """Heads that are told what `Squeeze` keeps agree wholly."""
    (images,) = batches(1)
    guide = sv.reduce_(sv.restore_(model(sv.DTPS(keep=KEEP, at=AT))).eval(), sv.Squeeze(keep=KEEP, at=AT, score="mrmr"))
    with Trace(guide) as t:
        guide(images)
    net = model(sv.DTPS(keep=KEEP, at=AT))
    for head, stage in zip(net.token_reducer, t.stages, strict=True):
        logit = torch.full((16, stage.n), -4.0).scatter(1, stage.kept, 4.0)
        told = torch.stack([logit, -logit], dim=-1).log_softmax(dim=-1)
        bias = head.out_conv[-2].bias  # as something must have a gradient
        monkeypatch.setattr(head, "forward", lambda x, told=told, bias=bias: told + 0 * bias)
    assert warm_heads_(net, [images]).agreement == [1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_heads_of_other_precisions_are_warmed_too(dtype):
    net = model(sv.DTPS(keep=KEEP, at=AT)).to(dtype)
    assert warm_heads_(net, (x.to(dtype) for x in batches(1))).loss


def test_gradients_hooks_and_modes_are_left_as_they_were():
    net, seen = model(sv.DTPS(keep=KEEP, at=AT)), []
    heads = list(net.token_reducer.parameters())
    heads[0].grad = torch.ones_like(heads[0])
    net.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        warm_heads_(net, batches(1))
    assert torch.equal(heads[0].grad, torch.ones_like(heads[0])) and all(p.grad is None for p in heads[1:]) and not seen


def test_a_tower_inside_a_model_is_warmed_by_its_images():
    part = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 64}
    sizes = {"vision_config": {**part, "image_size": 64, "patch_size": 8}, "text_config": {**part, "vocab_size": 64}}
    clip = transformers.CLIPModel(transformers.CLIPConfig(**sizes, projection_dim=16))
    assert warm_heads_(sv.reduce_(clip, sv.DTPS(keep=KEEP, at=AT)), batches(1)).loss


def test_what_cannot_be_warmed_is_refused():
    with pytest.raises(ConfigError, match="without their labels"):
        warm_heads_(model(sv.DTPS(keep=KEEP, at=AT)), [(next(batches(1)), 0)])
    frozen = model(sv.DTPS(keep=KEEP, at=AT)).requires_grad_(False)
    with pytest.raises(ConfigError, match=r"call requires_grad_\(True\) on model.token_reducer"):
        warm_heads_(frozen, batches(1))
    frozen.token_reducer.requires_grad_(True)
    assert warm_heads_(frozen, batches(1)).loss  # what the message says
    with pytest.raises(ConfigError, match="has no score heads to warm"):
        warm_heads_(model(sv.ETPS(keep=KEEP)), batches(1))
    with pytest.raises(ConfigError, match="there is no batch"):
        warm_heads_(model(sv.DTPS(keep=KEEP, at=AT)), [])
