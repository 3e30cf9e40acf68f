"""Families against each other, against the full grid, and among the libraries that people put around them."""

import copy
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import timm
import torch
import torch.distributed.fsdp as fsdp
import torch.nn.functional as F
import torchvision
import transformers
from open_clip.transformer import QuickGELU
from open_clip.transformer import VisionTransformer as OpenClipTower
from timm.layers import LayerNorm
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import oracles
import oracles_rotary
import squeezevit as sv
from squeezevit.bench.run import measure
from squeezevit.core.block import state_of
from squeezevit.core.cut import description_of
from squeezevit.core.reducer import Reducer
from squeezevit.errors import UnsupportedError
from squeezevit.families import multihead

SIZE, PATCH, DIM, DEPTH, HEADS, HIDDEN, CLASSES = 64, 8, 48, 4, 4, 192, 7  # torch fuses attention of an even number of heads only
PATCHES = (SIZE // PATCH) ** 2
TIMM = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS, "num_classes": CLASSES}
HUGGING_FACE = {
    "hidden_size": DIM,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
    "image_size": SIZE,
    "patch_size": PATCH,
    "layer_norm_eps": 1e-6,
}
METHODS = {
    "etps": sv.ETPS(keep=0.6),
    "etps-mass": sv.ETPS(keep=0.6, mass=True),
    "tome": sv.ToMe(r=9),
    "dtps": sv.DTPS(keep=0.6),
}
Read = Callable[[nn.Module, Tensor], Tensor]  # what to compare of a model's output


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Seeded weights, none degenerate: unit-variance linear maps, scales around 1, tokens and positions of size 0.5."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(_weights(module, name, noise))
    return model.eval()


def _weights(module: nn.Module, name: str, noise: Tensor) -> Tensor:
    if noise.dim() > 1 and name.endswith("weight") and not isinstance(module, nn.Embedding):
        return noise * noise[0].numel() ** -0.5
    if noise.dim() == 1 and name.startswith(("weight", "gamma", "lambda")):
        return 1 + 0.2 * noise
    return noise * (0.1 if name.endswith("bias") else 0.5)


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def output(model: nn.Module, x: Tensor, name: str | None = None) -> Tensor:
    """The model's output, or what it calls `name`; nothing recorded for a backward."""
    with torch.no_grad():
        out = model(x)
    return out if name is None else getattr(out, name)


def features(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.forward_features(x)


def hugging_face(name: str, **options: Any) -> Any:
    """A tiny model of the class `name`, with a configuration of its own kind, or of a vision tower and a text tower."""
    model_class = getattr(transformers, name)
    config_class, values = model_class.config_class, {**HUGGING_FACE, "num_labels": CLASSES, **options}
    if "vision_config" in config_class.sub_configs and "vision_config" not in options:
        values = {"vision_config": values, "num_labels": CLASSES}
    return randomize(model_class(config_class(**values)))


def reduce(model: nn.Module, reducer: Reducer) -> nn.Module:
    """`reduce_`, with score heads that are the same in every model and tell tokens well apart."""
    sv.reduce_(model, reducer)
    if reducer.learned:
        randomize(model.token_reducer, seed=100)
    return model


# The same weights under the names of several libraries


def renamed(state: dict[str, Tensor], *rules: tuple[str, str], split: str = "") -> dict[str, Tensor]:
    """Entries under other names, by regular expressions in order; fused projections split into `split` (names of q, k, v)."""
    if split:
        for name in [n for n in state if ".qkv." in n]:
            for part, value in zip(split.split(), state.pop(name).chunk(3), strict=True):
                state[name.replace("qkv", part)] = value
    for pattern, replacement in rules:
        state = {re.sub(pattern, replacement, name): value for name, value in state.items()}
    return state


def filled(model: nn.Module, state: dict[str, Tensor], unused: tuple[str, ...] = ()) -> nn.Module:
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and not [name for name in missing if not name.endswith(unused or ("-",))], (missing, unexpected)
    return model.eval()


HF_EMBEDDINGS = (
    (r"^(cls_token|reg_token)", r"embeddings.\1"),
    (r"^pos_embed", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
    (r"^embeddings\.reg_token", "embeddings.register_tokens"),
)
HF_VIT = (
    *HF_EMBEDDINGS,
    (r"^dist_token", "embeddings.distillation_token"),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.", "layers."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.attn\.", ".attention."),
)
HF_DINO = (
    *HF_EMBEDDINGS,
    (r"^norm\.", "layernorm."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.ls([12])\.gamma", r".layer_scale\1.lambda1"),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.attn\.", ".attention."),
)
HF_DINOV3 = (
    (r"^patch_embed\.proj", "embeddings.patch_embeddings"),
    (r"^blocks\.", "model.layer."),
    (r"\.gamma_([12])", r".layer_scale\1.lambda1"),
    (r"\.mlp\.fc1", ".mlp.up_proj"),
    (r"\.mlp\.fc2", ".mlp.down_proj"),
    (r"^reg_token", "embeddings.register_tokens"),
    (r"^cls_token", "embeddings.cls_token"),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.attn\.([qv])_bias", r".attention.\1_proj.bias"),
    (r"\.attn\.", ".attention."),
)
HF_CLIP = (
    (r"^patch_embed\.proj", "embeddings.patch_embedding"),
    (r"^cls_token", "embeddings.class_embedding"),
    (r"^pos_embed", "embeddings.position_embedding.weight"),
    (r"^norm_pre\.", "pre_layrnorm."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.proj\.", ".self_attn.out_proj."),
    (r"\.attn\.", ".self_attn."),
)
TORCHVISION = (
    (r"^cls_token", "class_token"),
    (r"^pos_embed", "encoder.pos_embedding"),
    (r"^patch_embed\.proj", "conv_proj"),
    (r"^norm\.", "encoder.ln."),
    (r"^head\.", "heads.head."),
    (r"^blocks\.", "encoder.layers.encoder_layer_"),
    (r"\.norm([12])\.", r".ln_\1."),
    (r"\.attn\.qkv\.", ".self_attention.in_proj_"),
    (r"\.attn\.proj\.", ".self_attention.out_proj."),
    (r"\.mlp\.fc1", ".mlp.0"),
    (r"\.mlp\.fc2", ".mlp.3"),
)
OPEN_CLIP = (
    (r"^cls_token", "class_embedding"),
    (r"^pos_embed", "positional_embedding"),
    (r"^patch_embed\.proj", "conv1"),
    (r"^norm_pre\.", "ln_pre."),
    (r"^norm\.", "ln_post."),
    (r"^blocks\.", "transformer.resblocks."),
    (r"\.norm([12])\.", r".ln_\1."),
    (r"\.attn\.qkv\.", ".attn.in_proj_"),
    (r"\.attn\.proj\.", ".attn.out_proj."),
    (r"\.mlp\.fc1", ".mlp.c_fc"),
    (r"\.mlp\.fc2", ".mlp.c_proj"),
)
Models = list[tuple[nn.Module, Read]]
logits = partial(output, name="logits")
last_hidden_state = partial(output, name="last_hidden_state")
pooler_output = partial(output, name="pooler_output")


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def hf_head(state: dict[str, Tensor], backbone: str, **heads: str) -> dict[str, Tensor]:
    """What is under `head` in timm goes under a classifier, everything else under the backbone."""
    return {
        next((n.replace(f"{a}.", f"{b}.") for a, b in heads.items() if n.startswith(f"{a}.")), backbone + n): v
        for n, v in state.items()
    }


def vit() -> Models:
    """timm, Hugging Face and torchvision."""
    model = randomize(VisionTransformer(**TIMM))
    state = renamed(model.state_dict(), *HF_VIT, split="q_proj k_proj v_proj")
    theirs = filled(hugging_face("ViTForImageClassification"), hf_head(state, "vit.", head="classifier"))
    third = torchvision.models.VisionTransformer(SIZE, PATCH, DEPTH, HEADS, DIM, HIDDEN, num_classes=CLASSES)
    return [(model, output), (theirs, logits), (filled(third, renamed(model.state_dict(), *TORCHVISION)), output)]


def distilled() -> Models:
    model = randomize(VisionTransformerDistilled(**TIMM))
    state = renamed(model.state_dict(), *HF_VIT, split="q_proj k_proj v_proj")
    state = hf_head(state, "deit.", head="cls_classifier", head_dist="distillation_classifier")
    theirs = filled(hugging_face("DeiTForImageClassificationWithTeacher"), state, ("mask_token",))
    return [(model, output), (theirs, logits)]


def dinov2() -> Models:
    """With LayerScale."""
    model = randomize(VisionTransformer(**TIMM | {"num_classes": 0}, init_values=1.0))
    state = renamed(model.state_dict(), *HF_DINO, split="q_proj k_proj v_proj")
    return [(model, features), (filled(hugging_face("Dinov2Model"), state, ("mask_token",)), last_hidden_state)]


def dinov2_registers() -> Models:
    """timm folds the class token's position into the token."""
    options = TIMM | {"num_classes": 0, "init_values": 1.0, "reg_tokens": 4, "no_embed_class": True}
    model = randomize(VisionTransformer(**options))
    state = renamed(model.state_dict(), *HF_DINO, split="q_proj k_proj v_proj")
    place = "embeddings.position_embeddings"
    state[place] = torch.cat([torch.zeros(1, 1, DIM), state[place]], dim=1)
    theirs = hugging_face("Dinov2WithRegistersModel", num_register_tokens=4)
    return [(model, features), (filled(theirs, state, ("mask_token",)), last_hidden_state)]


def timm_dinov3() -> nn.Module:
    options = {
        "init_values": 1.0,
        "rope_type": "dinov3",
        "rope_temperature": 100,
        "rope_rotate_half": True,
        "use_rot_pos_emb": True,
    }
    options |= {"use_abs_pos_emb": False, "num_reg_tokens": 4, "global_pool": "token", "norm_layer": partial(LayerNorm, eps=1e-6)}
    return randomize(Eva(**TIMM | {"num_classes": 0}, **options))


def dinov3() -> Models:
    model = timm_dinov3()
    state = renamed(model.state_dict(), *HF_DINOV3, split="q_proj k_proj v_proj")
    theirs = filled(hugging_face("DINOv3ViTModel", num_register_tokens=4), state, ("mask_token",))
    return [(model, features), (theirs, last_hidden_state)]


def clip() -> Models:
    """timm, open_clip and Hugging Face, with the activation that OpenAI trained with."""
    options = {"pre_norm": True, "act_layer": "quick_gelu", "norm_layer": partial(nn.LayerNorm, eps=1e-5)}
    model = randomize(VisionTransformer(**TIMM | {"num_classes": 0}, **options))
    state = {n: v.flatten(0, -2).squeeze(0) if n in ("cls_token", "pos_embed") else v for n, v in model.state_dict().items()}
    second = OpenClipTower(SIZE, PATCH, DIM, DEPTH, HEADS, HIDDEN / DIM, output_dim=DIM, act_layer=QuickGELU)
    second.proj = None
    hf_state = renamed(dict(state), *HF_CLIP, split="q_proj k_proj v_proj")
    theirs = filled(hugging_face("CLIPVisionModel", layer_norm_eps=1e-5), hf_state)
    return [(model, output), (filled(second, renamed(state, *OPEN_CLIP)), output), (theirs, pooler_output)]


def siglip() -> Models:
    """No class token, pooling by attention; torch's own attention there in Hugging Face, another in timm."""
    model = randomize(VisionTransformer(**TIMM | {"num_classes": 0}, class_token=False, global_pool="map", act_layer="gelu_tanh"))
    state = {n: v.squeeze(0) if n == "pos_embed" else v for n, v in model.state_dict().items()}
    pool = {n.removeprefix("attn_pool."): state.pop(n) for n in list(state) if n.startswith("attn_pool.")}
    for kind in ("weight", "bias"):
        pool[f"attention.in_proj_{kind}"] = torch.cat([pool.pop(f"q.{kind}"), pool.pop(f"kv.{kind}")])
    pool = renamed(pool, (r"^latent", "probe"), (r"^proj\.", "attention.out_proj."), (r"^norm\.", "layernorm."))
    state = renamed(state, *HF_CLIP, split="q_proj k_proj v_proj") | under("head.", pool)
    return [(model, output), (filled(hugging_face("SiglipVisionModel"), state), pooler_output)]


SAME = (vit, distilled, dinov2, dinov2_registers, dinov3, clip, siglip)


def assert_same_reduction(models: Models, reducer: Reducer, x: Tensor, tolerance: float = 1e-4) -> None:
    """Outputs, and which tokens go where, are those of the first model."""
    found = []
    for model, read in models:
        reduce(model, reducer)
        with sv.trace(model) as t:
            found.append((read(model, x), t.stages))
    expected, stages = found[0]
    assert len(stages) > 1
    for values, their_stages in found[1:]:
        torch.testing.assert_close(values, expected, rtol=tolerance, atol=tolerance)
        for ours, theirs in zip(stages, their_stages, strict=True):
            assert (ours.block, ours.n, ours.n_out) == (theirs.block, theirs.n, theirs.n_out)
            for name in ("kept", "pruned", "hosts"):
                assert torch.equal(getattr(ours, name), getattr(theirs, name)), (ours.block, name)


@pytest.mark.parametrize("models", SAME, ids=lambda f: f.__name__)
def test_layouts_agree_unreduced(models):
    expected, *others = [read(model, images()) for model, read in models()]
    for values in others:
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("models", SAME, ids=lambda f: f.__name__)
def test_same_weights_same_reduction(models, method):
    assert_same_reduction(models(), METHODS[method], images())


@pytest.mark.parametrize(
    "models",
    SAME,
    ids=lambda f: f.__name__,
)
def test_traced_tokens_agree(models):
    found = []
    for model, read in models():
        reduce(model, METHODS["etps-mass"])
        with sv.trace(model) as t:
            read(model, images())
        found.append(t.tokens)
    for tokens in found[1:]:
        torch.testing.assert_close(tokens, found[0], rtol=1e-4, atol=1e-4)


def timm_eva02() -> nn.Module:
    """SwiGLU, absolute and axial rotary positions, interleaved."""
    options = {"swiglu_mlp": True, "mlp_ratio": 8 / 3, "use_rot_pos_emb": True, "ref_feat_shape": (16, 16), "global_pool": "token"}
    return randomize(Eva(**TIMM | {"num_classes": 0}, **options))


def timm_mixed() -> nn.Module:
    """Every head of every block has frequencies of its own."""
    options = {"attn_type": "rope", "rope_type": "mixed", "rope_grid_indexing": "xy", "rope_temperature": 10.0}
    options |= {"use_rot_pos_emb": True, "use_abs_pos_emb": False, "init_values": 1.0, "global_pool": "token"}
    return randomize(Eva(**TIMM | {"num_classes": 0}, **options))


def hf_dinov3(**options: Any) -> nn.Module:
    return hugging_face("DINOv3ViTModel", num_register_tokens=4, **options)


def hf_dinov3_gated() -> nn.Module:
    return hf_dinov3(use_gated_mlp=True, pos_embed_rescale=None, num_attention_heads=2)


ROTARY = pytest.mark.parametrize(
    "build", [timm_dinov3, timm_eva02, timm_mixed, hf_dinov3, hf_dinov3_gated], ids=lambda f: f.__name__
)


def tokens_of(model: nn.Module, x: Tensor) -> Tensor:
    """All tokens after the final norm."""
    return features(model, x) if isinstance(model, Eva) else last_hidden_state(model, x)


def distance_from_full_grid(model: nn.Module, reducer: Reducer, squeeze: str | None) -> float:
    """Largest difference to an oracle in which no token ever leaves its place; TopK's choices are judged as well."""
    plain, x = copy.deepcopy(model), images(2)
    reduce(model, reducer)
    with sv.trace(model) as t:
        found = tokens_of(model, x)
    expected = oracles_rotary.forward(plain, x, t.stages, squeeze)
    assert len(t.stages) > 1 and found.shape == expected.tokens.shape
    if squeeze is None:
        for stage, scores in zip(t.stages, expected.scores, strict=True):
            assert stage.kept.tolist() == [oracles.split(row, stage.n_out)[0] for row in scores]
    return (found - expected.tokens).abs().max().item()


@ROTARY
def test_kept_patches_keep_their_rotary_position(build):
    assert distance_from_full_grid(build(), sv.TopK(keep=0.6, at=(0, 1, 3)), None) < 1e-4


@ROTARY
@pytest.mark.parametrize(("method", "squeeze"), [("etps", "tps"), ("etps-mass", "mass"), ("tome", "mass")])
def test_hosts_keep_their_rotary_position(build, method, squeeze):
    assert distance_from_full_grid(build(), METHODS[method], squeeze) < 1e-4


@ROTARY
def test_positions_of_the_first_patches_would_be_wrong(build, monkeypatch):
    def first_rows(table: Tensor, positions: Tensor) -> Tensor:
        return (table if table.dim() == 4 else table[None])[..., : positions.shape[1], :]

    monkeypatch.setattr(sv.ops, "at_positions", first_rows)
    with pytest.raises(AssertionError):  # TopK then also chooses others
        distance_from_full_grid(build(), sv.TopK(keep=0.6, at=(0, 1, 3)), None)
    assert distance_from_full_grid(build(), METHODS["etps-mass"], "mass") > 1e-2


# Masses, wherever tokens are averaged or pooled


def hf_classifier(name: str, **options: Any) -> tuple[nn.Module, Read]:
    return hugging_face(name, **options), logits


def pooled_by_class_and_mean(prefix: int, model: Any, tokens: Tensor) -> Tensor:
    return model.classifier(torch.cat([tokens[:, 0], tokens[:, prefix:].mean(dim=1)], dim=1))


def pooled_by_mean(prefix: int, model: Any, tokens: Tensor) -> Tensor:
    return model.classifier(tokens[:, prefix:].mean(dim=1))


def open_clip(**options: Any) -> tuple[nn.Module, Read]:
    tower = OpenClipTower(SIZE, PATCH, DIM, DEPTH, HEADS, HIDDEN / DIM, output_dim=DIM, **options)
    return randomize(tower), output


def open_clip_attentional(**options: Any) -> tuple[nn.Module, Read]:
    return open_clip(attentional_pool=True, attn_pooler_queries=5, attn_pooler_heads=HEADS, **options)


def eva(pooling: str) -> tuple[nn.Module, Read]:
    return randomize(Eva(**TIMM, global_pool=pooling)), output


def _open_clip_pool(model: Any, tokens: Tensor) -> Tensor:
    return model._pool(tokens)[0] @ model.proj


POOLED = {  # model, name of the module whose output is pooled, and the host's pooling of full-length tokens
    "dinov2": (lambda: hf_classifier("Dinov2ForImageClassification"), "dinov2.layernorm", partial(pooled_by_class_and_mean, 1)),
    "dinov2-registers": (
        lambda: hf_classifier("Dinov2WithRegistersForImageClassification", num_register_tokens=3),
        "dinov2_with_registers.layernorm",
        partial(pooled_by_class_and_mean, 4),
    ),
    "clip": (lambda: hf_classifier("CLIPForImageClassification"), "vision_model.encoder.layers.3", partial(pooled_by_mean, 1)),
    "siglip": (lambda: hf_classifier("SiglipForImageClassification"), "vision_model.post_layernorm", partial(pooled_by_mean, 0)),
    "ijepa": (lambda: hf_classifier("IJepaForImageClassification"), "ijepa.layernorm", partial(pooled_by_mean, 0)),
    "siglip-attention": (
        lambda: (hugging_face("SiglipVisionModel"), pooler_output),
        "post_layernorm",
        lambda model, tokens: model.head(tokens),
    ),
    "open_clip-average": (lambda: open_clip(pool_type="avg"), "transformer", _open_clip_pool),
    "open_clip-average-norm": (lambda: open_clip(pool_type="avg", final_ln_after_pool=True), "transformer", _open_clip_pool),
    "open_clip-attention": (open_clip_attentional, "transformer", _open_clip_pool),
    "open_clip-attention-average": (lambda: open_clip_attentional(pool_type="avg"), "transformer", _open_clip_pool),
    "eva-average": (lambda: eva("avg"), "norm", lambda model, tokens: model.forward_head(tokens)),
    "eva-attention": (lambda: eva("map"), "norm", lambda model, tokens: model.forward_head(tokens)),
}
WEIGHED = pytest.mark.parametrize("method", ["etps-mass", "tome"])


@WEIGHED
@pytest.mark.parametrize("name", list(POOLED))
def test_pooling_weighs_by_mass(name, method):
    """With and without gradients, what comes out is the host's own pooling of every token repeated mass times."""
    build, final, pool = POOLED[name]
    model, read = build()
    reduce(model, METHODS[method])
    seen = []
    handle = model.get_submodule(final).register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    with sv.trace(model) as t:
        found = read(model, images())
    handle.remove()
    with_grad = model(images())
    found_with_grad = with_grad if isinstance(with_grad, Tensor) else getattr(with_grad, read.keywords["name"])
    assert found_with_grad.requires_grad
    sv.restore_(model)
    prefix = seen[0].shape[1] - t.stages[-1].n_out
    with torch.no_grad():
        repeated = [_repeated(x, groups, prefix) for x, groups in zip(seen[0], t.groups, strict=True)]
        expected = torch.cat([pool(model, many[None]) for many in repeated])
        unweighted = pool(model, seen[0])
    assert (expected - unweighted).abs().max() > 1e-2  # or this would prove nothing
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_with_grad.detach(), expected, rtol=1e-5, atol=1e-5)


def _repeated(x: Tensor, groups: Tensor, prefix: int) -> Tensor:
    """Each token as often as it has patches: [T, C] -> [P + N0, C]."""
    repeats = torch.cat([groups.new_ones(prefix), groups.bincount(minlength=x.shape[0] - prefix)])
    many = x.repeat_interleave(repeats, dim=0)
    assert many.shape[0] == prefix + PATCHES
    return many


TWINS = {
    **{name: build for name, (build, _, _) in POOLED.items()},
    "torchvision": lambda: vit()[2],
    "hugging-face-vit": lambda: vit()[1],
    "timm-vit": lambda: vit()[0],
    "clip-tower": lambda: (hugging_face("CLIPVisionModel"), pooler_output),
    "mae": lambda: (hugging_face("ViTMAEModel", mask_ratio=0.0), unshuffled_class_token),
}


def unshuffled_class_token(model: nn.Module, x: Tensor) -> Tensor:
    """ViTMAEModel shuffles patches by noise, also where it masks none."""
    with torch.no_grad():
        return model(x, noise=torch.arange(PATCHES).expand(len(x), -1)).last_hidden_state[:, 0]


@pytest.mark.parametrize("name", list(TWINS))
def test_merging_twins_by_mass_changes_nothing(name):
    """Pairs of equal patches, merged in the first block: attention that counts and pooling that counts cannot tell."""
    model, read = TWINS[name]()
    _pair_positions(model)
    x = images().unflatten(3, (-1, 2, PATCH))  # pairs of neighbouring patches
    x = x[..., :1, :].expand_as(x).flatten(3)
    expected = read(model, x)
    sv.reduce_(model, sv.ToMe(r=(PATCHES // 2, 0, 0, 0)))
    with sv.trace(model) as t:
        found = read(model, x)
    assert t.stages[0].n_out == PATCHES // 2
    assert torch.equal(t.groups[:, 0::2], t.groups[:, 1::2])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@torch.no_grad()
def _pair_positions(model: nn.Module) -> None:
    """The same position embedding for both patches of a pair."""
    for name, value in model.named_parameters():
        if re.search("pos", name) and value.dim() > 1:
            patches = value.view(-1, DIM)[-PATCHES:]
            patches[1::2] = patches[0::2]


# torch's own attention, whose fused kernel of evaluation knows masks of booleans only


@WEIGHED
@pytest.mark.parametrize("build", [lambda: vit()[2][0], lambda: open_clip()[0]], ids=["torchvision", "open_clip"])
def test_masses_are_respected_with_and_without_gradients(build, method):
    model = reduce(build(), METHODS[method])
    torch.testing.assert_close(output(model, images()), model(images()).detach(), rtol=1e-5, atol=1e-5)


def test_a_family_whose_masses_hide_tokens_is_refused(monkeypatch):
    """What that kernel would do to log(mass), were it given it; without the proof the result is another."""

    def naive(mha: nn.MultiheadAttention, x: Tensor, bias: Tensor | None) -> Tensor:
        hidden = None if bias is None else bias[:, 0, 0] != 0
        return mha(x, x, x, key_padding_mask=hidden, need_weights=False)[0]

    model = reduce(vit()[2][0], METHODS["etps-mass"])
    expected = output(model, images())
    monkeypatch.setattr(multihead, "attend", naive)
    assert (output(model, images()) - expected).abs().max() > 1e-2
    with pytest.raises(UnsupportedError, match=r"EncoderBlock, cannot be reduced: its attention does not take an additive bias"):
        sv.reduce_(model, METHODS["etps-mass"])


# Real weights, real photographs


@pytest.fixture(scope="module")
def dinov2_small() -> tuple[Models, Tensor]:
    """DINOv2 ViT-S/14 in timm's and in Hugging Face's layout, one position table for both, and four photographs."""
    data, dinov2_data = pytest.importorskip("skimage.data"), pytest.importorskip("squeezevit.data.dinov2")
    try:
        model = dinov2_data.dinov2_vit_small(224)
    except sv.errors.MissingExtraError as error:
        pytest.skip(str(error))
    config = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 224, "patch_size": 14}
    state = renamed(model.state_dict(), *HF_DINO, split="q_proj k_proj v_proj")
    theirs = filled(hugging_face("Dinov2Model", **config), state, ("mask_token",))
    photos = [_photograph(getattr(data, name)()) for name in ("astronaut", "chelsea", "coffee", "rocket")]
    return [(model, features), (theirs, last_hidden_state)], torch.stack(photos)


def _photograph(array: Any) -> Tensor:
    """The middle of a photograph, as ImageNet's models see it: [H, W, 3] of bytes -> [3, 224, 224]."""
    image = torch.from_numpy(array.copy()).permute(2, 0, 1)[None].float() / 255
    side = min(image.shape[2:])
    image = torchvision.transforms.functional.center_crop(image, [side, side])
    image = F.interpolate(image, (224, 224), mode="bicubic", antialias=True)[0]
    return torchvision.transforms.functional.normalize(image, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize("mass", [False, True])
def test_dinov2_on_photographs(dinov2_small, mass):
    """An eighth of the patches is left; features of both layouts differ by less than a thousandth of their size."""
    models, photos = dinov2_small
    plain = features(models[0][0], photos[:1])
    found = []
    for model, read in models:
        sv.reduce_(model, sv.ETPS(keep=0.5, mass=mass))
        with sv.trace(model) as t:
            found.append((read(model, photos), t.groups))
        sv.restore_(model)
    (expected, groups), (values, their_groups) = found
    assert expected.shape == (4, 33, 384)
    assert ((values - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < 1e-3
    assert torch.equal(groups, their_groups)
    assert F.cosine_similarity(expected[0, 0], plain[0, 0], dim=0) > 0.8  # still the photograph's


# Refusals


def timm_model(name: str, **options: Any) -> nn.Module:
    return timm.create_model(name, img_size=SIZE, num_classes=CLASSES, **options)


def timm_swin() -> nn.Module:
    return timm_model("swin_tiny_patch4_window7_224", depths=(1, 1), num_heads=(2, 2), embed_dim=16, window_size=4)


def parallel_blocks() -> nn.Module:
    return VisionTransformer(**TIMM, block_fn=ParallelScalingBlock)


def torchvision_swin() -> nn.Module:
    return torchvision.models.SwinTransformer([4, 4], 16, [1, 1], [2, 2], [4, 4], num_classes=CLASSES)


def two_towers() -> nn.Module:
    model = hugging_face("SiglipVisionModel")
    model.other = hugging_face("CLIPVisionModel")
    return model


def hf_swin() -> nn.Module:
    return transformers.SwinModel(
        transformers.SwinConfig(image_size=SIZE, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
    )


def clip_text() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes))


def blocks_first_tokens_second() -> nn.Module:
    model = open_clip()[0]
    model.transformer.batch_first = False
    return model


REFUSED = {
    "hf-swin": (hf_swin, ["SwinModel", "windows of the grid"]),
    "hf-mae-decoder": (
        partial(hugging_face, "ViTMAEForPreTraining"),
        ["ViTMAEForPreTraining", "is not known to take fewer tokens", "give grid=True"],
    ),
    "hf-masked-image": (
        partial(hugging_face, "ViTForMaskedImageModeling"),
        ["ViTForMaskedImageModeling", "is not known to take fewer tokens", "give grid=True"],
    ),
    "hf-backbone": (partial(hugging_face, "Dinov2Backbone"), ["Dinov2Backbone", "lays tokens out as images", "give grid=True"]),
    "hf-text": (clip_text, ["CLIPTextModel has 0 vision towers", "register squeezevit.extend.describe"]),
    "hf-two-towers": (
        two_towers,
        ["SiglipVisionModel has 2 vision towers", "goes into one: sv.reduce_(model.other, sv.ETPS(), grid=True)"],
    ),
    "timm-swin": (timm_swin, ["SwinTransformer", "windows of the grid"]),
    "timm-parallel": (parallel_blocks, ["block 1", "ParallelScalingBlock", "register attn_half, mlp_half and attention"]),
    "torchvision-swin": (torchvision_swin, ["SwinTransformer", "windows of the grid"]),
    "open_clip-tokens-first": (blocks_first_tokens_second, ["VisionTransformer", "batch_first=True"]),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_refused_by_name_with_a_remedy(name):
    build, words = REFUSED[name]
    model = build()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(UnsupportedError) as error:
        sv.reduce_(model, sv.ETPS())
    assert all(word in str(error.value) for word in words), str(error.value)
    assert classes == [type(module) for module in model.modules()]


def test_what_a_refusal_advises_works():
    """The tower that is named, and the class whose weights the refused one shares."""
    model = two_towers()
    sv.reduce_(model.other, sv.ETPS())
    for name, reason in next(f for f in sv.families() if f.library == "transformers").refused.items():
        if "load its weights as" in reason:
            refused = hugging_face(name)
            wanted = re.search(r"load its weights as (\w+) instead", reason)[1]
            loaded = getattr(transformers, wanted)(refused.config)
            own = {key.removeprefix("model.") for key in loaded.state_dict()}
            shared = {key.removeprefix(f"{refused.base_model_prefix}.").removeprefix("model.") for key in refused.state_dict()}
            assert len(own & shared) >= 0.8 * len(own), f"{wanted} does not take the weights of {name}"
            with torch.no_grad(), sv.trace(sv.reduce_(loaded.eval(), sv.ETPS())) as t:
                loaded(torch.randn(1, 3, SIZE, SIZE))
            assert t.scatter_back(t.tokens).shape == (1, t.stages[0].n, DIM)


def siglip2_inputs(padded: int) -> dict[str, Tensor]:
    """Two images of 7 x 8 patches, rows of pixels; the second's last `padded` patches are padding."""
    patches = torch.randn(2, 56, 3 * PATCH**2, generator=torch.Generator().manual_seed(2))
    mask = torch.ones(2, 56, dtype=torch.long)
    mask[1, 56 - padded :] = 0
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor([[7, 8], [7 - padded // 8, 8]])}


def siglip2() -> nn.Module:
    return hugging_face("Siglip2VisionModel", num_patches=PATCHES)


def test_siglip2_of_any_size_without_padding():
    model = reduce(siglip2(), METHODS["etps-mass"])
    with torch.no_grad():
        assert model(**siglip2_inputs(padded=0)).last_hidden_state.shape == (2, 13, DIM)  # 56 -> 34 -> 21 -> 13


def test_siglip2_is_counted_and_timed():
    """Its inputs are patches; images of its size are laid out for it. Multiply-adds are those of a real forward."""
    model = siglip2()
    model.set_attn_implementation("eager")  # torch's counter learned of the CPU's fused attention after 2.9
    patches = siglip2_inputs(padded=0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**{k: v[:1] for k, v in patches.items()})
    assert sv.macs(model, (7 * PATCH, 8 * PATCH)) * 2 == counter.get_total_flops()
    dense = sv.macs(model)
    assert sv.macs(sv.reduce_(model, METHODS["etps"])) < 0.8 * dense
    (speed,) = measure(model, [METHODS["etps"]], 2, rounds=1)
    assert speed.tokens[0] == PATCHES and speed.images_per_second > 0


def test_images_are_laid_out_as_siglip2s_own_processor_does():
    image = images(1)
    processor = transformers.Siglip2ImageProcessor(
        patch_size=PATCH, max_num_patches=PATCHES, do_resize=False, do_rescale=False, do_normalize=False
    )
    expected = processor(images=[image[0]], return_tensors="pt", input_data_format="channels_first")
    pixels, _, shapes = description_of(siglip2()).inputs(image)
    torch.testing.assert_close(pixels, expected["pixel_values"])
    assert torch.equal(shapes, expected["spatial_shapes"].long()) and expected["pixel_attention_mask"].all()


def test_siglip2_with_padding_is_refused():
    model = reduce(siglip2(), METHODS["etps"])
    with pytest.raises(UnsupportedError, match=r"block 1, Siglip2EncoderLayer, .* mask \(attention_mask\).* sv.restore_ it"):
        model(**siglip2_inputs(padded=16))
    sv.restore_(model)(**siglip2_inputs(padded=16))


@pytest.mark.parametrize("name", ["ViTModel", "Dinov2Model"])
def test_mask_of_the_caller_is_refused(name):
    model = reduce(hugging_face(name), METHODS["etps"])
    mask = torch.ones(3, PATCHES + 1, dtype=torch.long)
    mask[:, 3:9] = 0
    with pytest.raises(UnsupportedError, match=r"block 1, \w+Layer, was called with a mask \(attention_mask\)"):
        model(images(), attention_mask=mask)


def test_masked_patches_are_reduced_like_others():
    """Patches that the caller replaces by the mask token are tokens all the same."""
    model = reduce(hugging_face("Dinov2Model"), METHODS["etps"])
    hidden = torch.zeros(3, PATCHES, dtype=torch.bool)
    hidden[:, 5:20] = True
    with torch.no_grad():
        found = model(images(), bool_masked_pos=hidden).last_hidden_state

    def mask(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return torch.where(hidden[..., None], model.embeddings.mask_token, out)

    model.embeddings.patch_embeddings.register_forward_hook(mask)
    torch.testing.assert_close(found, last_hidden_state(model, images()))


WITHOUT_HOSTS = """
import os, sys
import torch
for missing in ("timm", "transformers", "torchvision", "open_clip"):
    child = os.fork()  # torch is imported once
    if not child:
        sys.modules[missing] = None
        import squeezevit as sv
        try:
            {verb}
        except sv.errors.UnsupportedError as error:
            os._exit("is not a model that SqueezeViT knows" not in str(error))
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise SystemExit("without " + missing)
"""


@pytest.mark.parametrize(
    "verb",
    [
        "sv.restore_(torch.nn.Identity())",
        "sv.reduce_(torch.nn.Identity(), sv.ETPS())",
    ],
)
def test_missing_hosts_break_nothing(verb):
    """Each of the four made impossible to import, in a process of its own."""
    run = subprocess.run([sys.executable, "-c", WITHOUT_HOSTS.format(verb=verb)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr


# Hugging Face's own ways


def with_implementation(name: str, implementation: str, **options: Any) -> nn.Module:
    model = hugging_face(name, **options)
    model.set_attn_implementation(implementation)
    return model


TOWERS = {
    "ViTModel": {},
    "DeiTModel": {},
    "ViTMSNModel": {},
    "IJepaModel": {},
    "Dinov2Model": {},
    "Dinov2WithRegistersModel": {},
    "DINOv3ViTModel": {"num_register_tokens": 4},
    "CLIPVisionModel": {},
    "SiglipVisionModel": {},
}


@pytest.mark.parametrize("name", list(TOWERS))
def test_eager_and_fused_attention_agree(name):
    found = []
    for implementation in ("sdpa", "eager"):
        model = reduce(with_implementation(name, implementation, **TOWERS[name]), METHODS["etps-mass"])
        found.append(last_hidden_state(model, images()))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", list(TOWERS))
def test_hidden_states_have_the_lengths_that_are_left(name):
    """Entry i left i blocks; stages at blocks 1, 2, 3. What is not asked to shrink is bit-equal."""
    model = hugging_face(name, **TOWERS[name])
    with torch.no_grad():
        full = model(images(), output_hidden_states=True).hidden_states
        sv.reduce_(model, sv.ETPS(keep=0.5))
        out = model(images(), output_hidden_states=True)
    prefix = full[0].shape[1] - PATCHES
    assert [x.shape[1] - prefix for x in out.hidden_states] == [64, 64, 32, 16, 8]
    assert torch.equal(out.hidden_states[1], full[1])
    assert out.last_hidden_state.shape[1] == prefix + 8


@pytest.mark.parametrize(
    "name", ["ViTForImageClassification", "Dinov2ForImageClassification", "SiglipVisionModel", "CLIPVisionModel"]
)
def test_tuples_hold_what_outputs_do(name):
    model = reduce(hugging_face(name), METHODS["etps-mass"])
    with torch.no_grad():
        named = model(images(), output_hidden_states=True)
        plain = model(images(), output_hidden_states=True, return_dict=False)
    for found, expected in zip(plain, named.to_tuple(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_pipeline_takes_a_reduced_model():
    pil = pytest.importorskip("PIL.Image")
    processor = transformers.ViTImageProcessor(size={"height": SIZE, "width": SIZE})
    model = reduce(hugging_face("ViTForImageClassification"), METHODS["etps-mass"])
    pipe = transformers.pipeline("image-classification", model=model, image_processor=processor)
    picture = pil.fromarray(((images(1)[0].permute(1, 2, 0) * 40) + 128).clamp(0, 255).byte().numpy())
    answers = {a["label"]: a["score"] for a in pipe(picture, top_k=CLASSES)}
    expected = logits(model, processor(picture, return_tensors="pt")["pixel_values"]).softmax(dim=-1)[0]
    assert answers == pytest.approx({f"LABEL_{i}": p.item() for i, p in enumerate(expected)}, rel=1e-4)


def test_auto_model_is_reduced_like_its_own_class():
    config = transformers.Dinov2Config(**HUGGING_FACE)
    models = [randomize(transformers.AutoModel.from_config(config)), randomize(transformers.Dinov2Model(config))]
    found = [last_hidden_state(reduce(model, METHODS["etps"]), images()) for model in models]
    assert torch.equal(*found) and found[0].shape[1] == 16


HOST_DEPRECATES = pytest.mark.filterwarnings("ignore:`(is_gradient_checkpointing|gradient_checkpointing_enable)` is:FutureWarning")
LAST_NORM = {
    "Dinov2ForImageClassification": "dinov2.encoder.layer.3.norm2",
    "SiglipForImageClassification": "vision_model.encoder.layers.3.layer_norm2",
}


@HOST_DEPRECATES
@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("name", list(LAST_NORM))
def test_gradient_checkpointing_changes_nothing(name, method, no_gumbel_noise):
    gradients = []
    for checkpointing in (False, True):
        model = reduce(hugging_face(name), METHODS[method]).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        runs = []
        model.get_submodule(LAST_NORM[name]).register_forward_pre_hook(lambda module, args, runs=runs: runs.append(1))
        model(images(), labels=torch.tensor([0, 1, 2])).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert len(runs) == 1 + checkpointing
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        torch.testing.assert_close(
            gradients[0][name], gradients[1][name], rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_clip_and_siglip_pairs_keep_their_text_tower():
    """The pair's image embeddings are those of its vision tower reduced alone; text is untouched."""
    for name in ("CLIPModel", "SiglipModel"):
        text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
        options = {"projection_dim": DIM} if name == "CLIPModel" else {}
        text |= {"projection_size": DIM} if name == "SiglipModel" else {}
        model_class = getattr(transformers, name)
        model = randomize(model_class(model_class.config_class(text_config=text, vision_config=HUGGING_FACE, **options)))
        words = torch.tensor([[3, 4, 5, 49]])
        before = _without_grad(model, input_ids=words, pixel_values=images())
        tower = reduce(copy.deepcopy(model.vision_model), METHODS["etps-mass"])
        after = _without_grad(reduce(model, METHODS["etps-mass"]), input_ids=words, pixel_values=images())
        assert torch.equal(before.text_embeds, after.text_embeds)
        assert torch.equal(after.vision_model_output.last_hidden_state, last_hidden_state(tower, images()))
        assert (before.image_embeds - after.image_embeds).abs().max() > 1e-3


def _without_grad(model: nn.Module, **inputs: Any) -> Any:
    with torch.no_grad():
        return model(**inputs)


# Inside a vision-language model


IMAGE_TOKEN = 40


@pytest.fixture
def llava() -> Any:
    """A CLIP tower, read before its last block and without its class token, and a small Llama."""
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**HUGGING_FACE),
        text_config=transformers.LlamaConfig(**text, pad_token_id=0, bos_token_id=1, eos_token_id=2),
        image_token_id=IMAGE_TOKEN,
    )
    return randomize(transformers.LlavaForConditionalGeneration(config))


def prompts(image_tokens: int) -> Tensor:
    row = torch.tensor([3, *[IMAGE_TOKEN] * image_tokens, 5, 6])
    return row.expand(3, -1)


def image_features(model: Any) -> Tensor:
    with torch.no_grad():
        return torch.stack(tuple(model.get_image_features(pixel_values=images()).pooler_output))


@pytest.mark.parametrize("whole", [False, True], ids=["tower", "whole-model"])
def test_llava_is_handed_fewer_image_tokens(llava, whole):
    """Stages at blocks 1, 2 and 3; the language model reads what leaves block 2: 64 -> 32 -> 16."""
    tower = copy.deepcopy(llava.model.vision_tower)
    reducer = sv.ETPS(keep=0.5, mass=True)
    sv.reduce_(tower, reducer)
    sv.reduce_(llava if whole else llava.model.vision_tower, reducer)
    out = _without_grad(llava, input_ids=prompts(16), pixel_values=images())
    assert out.logits.shape == (3, 19, 50)
    given = out.image_hidden_states  # a list of images since transformers 5.24
    hidden = _without_grad(tower, pixel_values=images(), output_hidden_states=True).hidden_states[-2]
    expected = llava.model.multi_modal_projector(hidden[:, 1:]).detach()
    torch.testing.assert_close(torch.cat(tuple(given)).view_as(expected), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(image_features(llava), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="Image features and image tokens do not match, tokens: 192, features: 1536"):
        llava(input_ids=prompts(64), pixel_values=images())


@pytest.mark.parametrize("reducer", [sv.ETPS(keep=0.5, mass=True), sv.ToMe(r=9), sv.TopK(keep=0.5)], ids=repr)
def test_llava_gets_its_usual_grid_back(llava, reducer):
    """Every patch holds the token it ended in by the layer that is read; the usual prompt works, and text follows."""
    tower = llava.model.vision_tower
    plain = sv.reduce_(copy.deepcopy(tower), reducer)
    sv.reduce_(tower, reducer, grid=True)
    with sv.trace(plain) as t:
        hidden = _without_grad(plain, pixel_values=images(), output_hidden_states=True).hidden_states[-2][:, 1:]
    stages_before = sum(s.block < DEPTH - 1 for s in t.stages)
    groups = t.groups_after(stages_before - 1)[..., None]
    grid = hidden.gather(1, groups.clamp(min=0).expand(-1, -1, DIM)) * (groups >= 0)
    expected = llava.model.multi_modal_projector(grid).detach()
    torch.testing.assert_close(image_features(llava), expected, rtol=1e-5, atol=1e-5)
    assert _without_grad(llava, input_ids=prompts(PATCHES), pixel_values=images()).logits.shape == (3, PATCHES + 3, 50)
    written = llava.generate(input_ids=prompts(PATCHES), pixel_values=images(), max_new_tokens=3, do_sample=False)
    assert written.shape[1] <= PATCHES + 6 and torch.equal(written[:, : PATCHES + 3], prompts(PATCHES))


@pytest.mark.parametrize("name", ["ViTModel", "CLIPVisionModel", "SiglipVisionModel", "DINOv3ViTModel"])
@pytest.mark.parametrize("return_dict", [True, False])
def test_grid_is_that_of_scatter_back(name, return_dict):
    """Tokens and hidden states, named or in a tuple."""
    reducer, model = sv.ETPS(keep=0.5, mass=True), hugging_face(name)
    plain = sv.reduce_(copy.deepcopy(model), reducer)
    with sv.trace(plain) as t:
        tokens = last_hidden_state(plain, images())
    sv.reduce_(model, reducer, grid=True)
    out = _without_grad(model, pixel_values=images(), output_hidden_states=True, return_dict=return_dict)
    states = out.hidden_states if return_dict else next(x for x in out if isinstance(x, tuple))
    prefix = tokens.shape[1] - t.stages[-1].n_out
    expected = torch.cat([tokens[:, :prefix], t.scatter_back(tokens[:, prefix:])], dim=1)
    torch.testing.assert_close(out[0], expected, rtol=1e-5, atol=1e-5)
    assert [x.shape[1] for x in states] == [prefix + PATCHES] * (DEPTH + 1)
    assert model.squeezevit_state.trace is None


def test_grid_of_a_classifier_leaves_its_pooling_right():
    """The mean over the full grid is the mean by mass."""
    model = hugging_face("Dinov2ForImageClassification")
    expected = logits(sv.reduce_(copy.deepcopy(model), METHODS["etps-mass"]), images())
    found = logits(sv.reduce_(model, METHODS["etps-mass"], grid=True), images())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# Among other libraries


def with_lora(model: Any) -> Any:
    """peft's wrapper around a model whose query and value projections have adapters of noticeable size, in place."""
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return wrapped.eval()


@HOST_DEPRECATES
@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("order", ["adapter-first", "reducer-first"])
def test_lora_equals_merged_weights(method, order):
    model = hugging_face("ViTForImageClassification")
    plain = logits(reduce(copy.deepcopy(model), METHODS[method]), images())
    if order == "reducer-first":
        wrapped = with_lora(reduce(model, METHODS[method]))
    else:
        wrapped = with_lora(model)
        reduce(model, METHODS[method])
    found = logits(wrapped, images())
    merged = copy.deepcopy(wrapped).merge_and_unload()
    torch.testing.assert_close(logits(merged, images()), found, rtol=1e-4, atol=1e-5)
    afresh = reduce(sv.restore_(merged), METHODS[method])
    torch.testing.assert_close(logits(afresh, images()), found, rtol=1e-4, atol=1e-5)
    assert (found - plain).abs().max() > 1e-2


@HOST_DEPRECATES
def test_lora_learns_in_a_reduced_model():
    wrapped = with_lora(reduce(hugging_face("ViTForImageClassification"), METHODS["etps-mass"])).train()
    wrapped(images(), labels=torch.tensor([0, 1, 2])).loss.backward()
    learnt = {n for n, p in wrapped.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert len(learnt) == 2 * 2 * DEPTH and all("lora_" in n for n in learnt)


@pytest.mark.parametrize("method", list(METHODS))
def test_int8_weights_before_and_after(method):
    """The same either way, and near the model of full weights."""
    quantization = pytest.importorskip("torchao.quantization")
    found = []
    for first in (True, False):
        model = hugging_face("ViTForImageClassification")
        if first:
            quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        sv.reduce_(model, METHODS[method])
        if METHODS[method].learned:
            randomize(model.token_reducer, seed=100)
        if not first:
            quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=_is_hosts_linear)
        assert type(model.vit.layers[1].attention.k_proj.weight) is not nn.Parameter
        found.append(logits(model, images()))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    full = logits(reduce(hugging_face("ViTForImageClassification"), METHODS[method]), images())
    assert F.cosine_similarity(found[0], full).min() > 0.9


def _is_hosts_linear(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "token_reducer" not in name


@pytest.mark.parametrize("method", list(METHODS))
def test_accelerate_prepares_and_trains(method):
    accelerate = pytest.importorskip("accelerate")
    model = reduce(hugging_face("ViTForImageClassification"), METHODS[method])
    expected = logits(model, images())
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert torch.equal(logits(prepared, images()), expected)
    accelerator.backward(prepared.train()(images(), labels=torch.tensor([0, 1, 2])).loss)
    optimizer.step()
    assert (logits(prepared.eval(), images()) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["etps-mass", "dtps"])
def test_accelerate_dispatches_a_reduced_model(method):
    """Hooks that move a block's inputs, as with a map of devices."""
    accelerate = pytest.importorskip("accelerate")
    model = reduce(hugging_face("ViTForImageClassification"), METHODS[method])
    expected = logits(model, images())
    devices = dict.fromkeys(["vit.embeddings", "vit.layernorm", "classifier", *(f"vit.layers.{i}" for i in range(DEPTH))], "cpu")
    devices |= {"token_reducer": "cpu"} if METHODS[method].learned else {}
    accelerate.dispatch_model(model, devices, main_device="cpu", force_hooks=True)
    assert hasattr(model.vit.layers[1], "_hf_hook")
    assert torch.equal(logits(model, images()), expected)


def test_accelerate_hooks_on_blocks_come_second():
    accelerate = pytest.importorskip("accelerate")
    model = hugging_face("ViTForImageClassification")
    accelerate.hooks.attach_align_device_hook_on_blocks(model, {f"vit.layers.{i}": "cpu" for i in range(DEPTH)})
    with pytest.raises(UnsupportedError, match=r"block 1, .*ViTLayer, has a forward of its own set on the instance"):
        sv.reduce_(model, METHODS["etps"])


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize(
    "build", [lambda: vit()[:1], lambda: vit()[1:2], lambda: dinov3()[1:]], ids=["timm", "hugging-face", "rotary"]
)
def test_moving_average_of_a_reduced_model(build, method):
    model, read = build()[0]
    reduce(model, METHODS[method])
    average = timm.utils.ModelEmaV3(model, decay=0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    assert not torch.equal(read(average.module, images()), read(model, images()))
    average.update(model)
    assert torch.equal(read(average.module, images()), read(model, images()))
    assert state_of(average.module) is not state_of(model)


# Sharded over two processes; `torch.distributed.run` runs this file


def wrap_ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def wrap_fsdp2(model: nn.Module) -> nn.Module:
    for block in description_of(model).blocks:
        fsdp.fully_shard(block)
    return fsdp.fully_shard(model)


SHARDED = {"timm": 0, "hugging-face": 1}


def compare_sharded(wrap: Callable[[nn.Module], nn.Module], which: int, method: str, rank: int) -> None:
    """A wrapped model's output is the unsharded one's, and its gradients are those of both processes' images."""
    model, read = vit()[which]
    reduce(model, METHODS[method])
    single, shares = copy.deepcopy(model), images(4).chunk(2)
    wrapped = wrap(model)
    torch.testing.assert_close(read(wrapped, shares[rank]), read(single, shares[rank]), rtol=1e-5, atol=1e-5)
    for module in (single, wrapped):
        module.train()
    (sum(_loss(single, share, seed) for seed, share in enumerate(shares)) / 2).backward()
    _loss(wrapped, shares[rank], rank).backward()
    expected = {n: p.grad for n, p in single.named_parameters() if p.grad is not None}
    found = {n.removeprefix("module."): p.grad for n, p in wrapped.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and len(found) > 20
    assert any(name.startswith("token_reducer") for name in found) == METHODS[method].learned
    for name, gradient in found.items():
        gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def _loss(model: nn.Module, x: Tensor, seed: int) -> Tensor:
    torch.manual_seed(seed)  # of what score heads sample
    out = model(x)
    return (out if isinstance(out, Tensor) else out.logits).square().mean()


def sharded() -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    for wrap, (name, which), method in product((wrap_ddp, wrap_fsdp2), SHARDED.items(), ("etps-mass", "dtps")):
        compare_sharded(wrap, which, method, rank)
        sys.stdout.write(f"{rank} {wrap.__name__} {name} {method}\n")
    with pytest.raises(UnsupportedError, match="is sharded already; reduce the model first, and call fully_shard after it"):
        reduce(wrap_fsdp2(vit()[0][0]), METHODS["etps"])
    sys.stdout.write(f"{rank} refused\n")
    torch.distributed.destroy_process_group()


def test_ddp_and_fsdp2_on_two_processes():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    run = subprocess.run(command, capture_output=True, text=True, timeout=400)
    # each comparison says so when it held; how gloo's threads end afterwards is not asked about
    assert run.stdout.count("wrap_") == 2 * 2 * 2 * 2 and run.stdout.count("refused") == 2, run.stderr


if __name__ == "__main__":
    sharded()
