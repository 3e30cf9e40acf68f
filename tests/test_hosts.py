"""Towers that are a row in a table, dense backbones, and what is around them: equality, counts, the full grid or a refusal."""

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
import transformers
from timm.models.beit import Beit
from timm.models.qwen3_vit import Qwen3VitClassifier, Qwen3VitEncoder
from timm.models.vision_transformer_relpos import ResPostRelPosBlock, VisionTransformerRelPos
from torch import Tensor, nn

import squeezevit as sv
import zoo
from squeezevit.bench.run import measure
from squeezevit.core.cut import description_of
from squeezevit.core.running import images as images_of
from squeezevit.core.supported import ANY_COUNT, BACKBONES, TOWERS
from squeezevit.errors import UnsupportedError

DEPTH, SIDE = 6, 8  # blocks, and patches a side
VIT = {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": DEPTH, "intermediate_size": 96}
VIT |= {"image_size": 56, "patch_size": 7, "num_channels": 3}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
LANGUAGE = {**TEXT, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {"num_key_value_heads_per_layer": [4, 4, 2, 2, 2, 4], "num_register_tokens": 3}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

TOWERS_IN_ROWS: dict[str, tuple[str, str, dict[str, Any]]] = {  # in which module of transformers.models, its configuration, options
    "Aimv2VisionModel": ("aimv2", "Aimv2VisionConfig", VIT),
    "AltCLIPVisionModel": ("altclip", "AltCLIPVisionConfig", VIT),
    "ASTModel": (
        "audio_spectrogram_transformer",
        "ASTConfig",
        {**VIT, "patch_size": 8, "frequency_stride": 4, "time_stride": 4, "max_length": 64, "num_mel_bins": 16},
    ),
    "BlipVisionModel": ("blip", "BlipVisionConfig", VIT),
    "Blip2VisionModel": ("blip_2", "Blip2VisionConfig", VIT),
    "ChineseCLIPVisionModel": ("chinese_clip", "ChineseCLIPVisionConfig", VIT),
    "CLIPSegVisionModel": ("clipseg", "CLIPSegVisionConfig", VIT),
    "DPTModel": ("dpt", "DPTConfig", {**VIT, "is_hybrid": False, "backbone_out_indices": [0, 1, 2, 3]}),
    "GitVisionModel": ("git", "GitVisionConfig", VIT),
    "Idefics2VisionTransformer": ("idefics2", "Idefics2VisionConfig", VIT),
    "Idefics3VisionTransformer": ("idefics3", "Idefics3VisionConfig", VIT),
    "InstructBlipVisionModel": ("instructblip", "InstructBlipVisionConfig", VIT),
    "InstructBlipVideoVisionModel": ("instructblipvideo", "InstructBlipVideoVisionConfig", VIT),
    "InternVLVisionModel": ("internvl", "InternVLVisionConfig", {**VIT, "use_qk_norm": True, "layer_scale_init_value": 0.5}),
    "JanusVisionModel": ("janus", "JanusVisionConfig", VIT),
    "Kosmos2VisionModel": ("kosmos2", "Kosmos2VisionConfig", VIT),
    "MetaClip2VisionModel": ("metaclip_2", "MetaClip2VisionConfig", VIT),
    "OwlViTVisionModel": ("owlvit", "OwlViTVisionConfig", VIT),
    "Owlv2VisionModel": ("owlv2", "Owlv2VisionConfig", VIT),
    "PixioModel": ("pixio", "PixioConfig", VIT),
    "Sapiens2Model": ("sapiens2", "Sapiens2Config", {**VIT, **GROUPED, "use_qk_norm": True}),
    "SmolVLMVisionTransformer": ("smolvlm", "SmolVLMVisionConfig", VIT),
    "Tipsv2VisionModel": ("tipsv2", "Tipsv2VisionConfig", VIT),
    "VideoMAEModel": ("videomae", "VideoMAEConfig", {**VIT, "num_frames": 4, "tubelet_size": 2}),
    "VivitModel": ("vivit", "VivitConfig", {**VIT, "num_frames": 4, "tubelet_size": [2, 7, 7]}),
}
STAGED = sv.ETPS(keep=0.5, at=(2, 4))
REDUCERS = {
    "etps": STAGED,
    "etps-mass": sv.ETPS(keep=0.5, at=(2, 4), mass=True),
    "dtps": sv.DTPS(keep=0.5, at=(2, 4)),
    "tome": sv.ToMe(r=6),
    "topk": sv.TopK(keep=0.5, at=(2, 4)),
}


UNMASKED = ("Blip", "Blip2", "InstructBlip", "InstructBlipVideo", "VideoMAE", "DPT")  # whose attention takes no mask


def refused(name: str, reducer: Any) -> str:
    """Why, in a few words; "" where it is not."""
    if name.removesuffix("Model").removesuffix("Vision") in UNMASKED and (reducer.weighs or reducer.masks):
        return "takes no mask, .* choose a reducer without masses"
    return "Aimv2AttentionPoolingHead pools tokens as if" if name.startswith("Aimv2") and reducer.weighs else ""


def tower(name: str) -> Any:
    package, config_class, options = TOWERS_IN_ROWS[name]
    module = getattr(transformers.models, package)
    config = getattr(getattr(module, f"configuration_{package}"), config_class)(**options)
    config._attn_implementation = "eager" if package in ("git", "blip", "blip_2", "instructblip", "instructblipvideo") else "sdpa"
    return zoo.randomize(getattr(getattr(module, f"modeling_{package}"), name)(config)).eval()


def test_windows_are_found_where_no_mask_is_taken():
    """A layer whose tokens see their half alone is the same in two halves, and takes no bias that would show it."""
    model = tower("VideoMAEModel")
    inside = model.encoder.layer[3].attention.attention
    whole = type(inside).forward

    def in_windows(x: Tensor) -> tuple[Tensor, None]:
        half = x.shape[1] // 2
        return torch.cat([whole(inside, part)[0] for part in (x[:, :half], x[:, half:])], dim=1), None

    inside.forward = in_windows
    with pytest.raises(UnsupportedError, match=r"block 3, .*VideoMAELayer, cannot be reduced: its attention depends on the order"):
        sv.reduce_(model, sv.Random(keep=0.5, at=(1,)))


def tokens(model: nn.Module, x: Tensor) -> Tensor:
    about = description_of(model)
    with torch.no_grad():
        return (about.tower or model)(*about.given(x), **about.named(x)).last_hidden_state


def test_every_row_is_tried():
    """The rest are kinds of the zoo."""
    named = {type(m).__name__ for name in TOWERS_IN_ROWS for m in tower(name).modules()} | {*TOWERS_IN_ROWS}
    zoos = {type(m).__name__ for kind in zoo.KINDS if kind.startswith("hf-") for m in zoo.build(kind).modules()}
    assert set(TOWERS) <= named | zoos
    assert set(BACKBONES) == {*DENSE}


@pytest.mark.parametrize("name", list(TOWERS_IN_ROWS))
def test_a_tower_in_a_row(name):
    model = tower(name)
    about = description_of(model)
    x = images_of(model, 2)
    dense = tokens(model, x)
    patches = dense.shape[1] - about.prefix
    assert torch.equal(tokens(sv.reduce_(model, sv.ETPS(keep=1.0)), x), dense)
    for reducer in REDUCERS.values():
        if reason := refused(name, reducer):
            with pytest.raises(UnsupportedError, match=reason):
                sv.reduce_(model, reducer)
            continue
        zoo.reduce(sv.restore_(model), reducer)
        with sv.trace(model) as t:
            plain = tokens(model, x)
        assert t.stages[0].n == patches and plain.shape[1] == about.prefix + t.stages[-1].n_out < dense.shape[1]
        full = sv.reduce_(copy.deepcopy(model), reducer, grid=True)
        expected = torch.cat([plain[:, : about.prefix], t.scatter_back(plain[:, about.prefix :])], dim=1)
        torch.testing.assert_close(tokens(full, x), expected, **CLOSE)
    unreduced = sv.macs(sv.restore_(copy.deepcopy(model)))
    assert sv.macs(model) < unreduced
    assert torch.equal(tokens(sv.restore_(model), x), dense)


# Relative positions: a bias for each pair of tokens of the full grid

SIZES = {"img_size": 56, "patch_size": 7, "embed_dim": 48, "depth": DEPTH, "num_heads": 4, "init_values": 1.0}
KINDS_OF_BIAS = [(True, False), (False, True), (True, True), (False, False)]  # each layer's own, and one for all layers


def beit(own: bool, shared: bool) -> nn.Module:
    return Beit(**SIZES, use_abs_pos_emb=False, use_rel_pos_bias=own, use_shared_rel_pos_bias=shared)


def hf_relative(name: str, own: bool, shared: bool) -> Any:
    model_class = getattr(transformers, f"{name}ForImageClassification")
    relative = {"use_relative_position_bias": own, "use_shared_relative_position_bias": shared}
    return model_class(model_class.config_class(**VIT, **relative, layer_scale_init_value=1.0))


RELATIVE: dict[str, Callable[[], nn.Module]] = {
    **{f"beit-{own}-{shared}": partial(beit, own, shared) for own, shared in KINDS_OF_BIAS},
    **{
        f"{name}-{own}-{shared}": partial(hf_relative, name, own, shared)
        for name in ("Beit", "Data2VecVision")
        for own, shared in KINDS_OF_BIAS
    },
    **{
        f"relpos-{kind}-{shared}-{token}": partial(
            VisionTransformerRelPos, **SIZES, rel_pos_type=kind, shared_rel_pos=shared, class_token=token
        )
        for kind, shared, token in (("mlp", False, False), ("bias", True, True), ("mlpswin", False, True), ("bias", False, False))
    },
    "relpos-post-norm": partial(VisionTransformerRelPos, **SIZES, block_fn=ResPostRelPosBlock),
}


@pytest.mark.parametrize("name", list(RELATIVE))
def test_relative_positions_are_those_of_the_tokens_that_are_left(name, monkeypatch):
    """The model's own layers on all tokens, those that were removed masked: what is left is the same."""
    model = zoo.randomize(RELATIVE[name]()).eval()
    about, x = description_of(model), torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    patches, prefix, blocks, at = SIDE * SIDE, about.prefix, list(about.blocks), (1, 3)

    def last_tokens() -> Tensor:
        seen: list[Any] = []
        handle = blocks[-1].register_forward_hook(lambda module, args, out: seen.append(out))
        zoo.run(model, x)
        handle.remove()
        return seen[0][0] if isinstance(seen[0], tuple) else seen[0]

    dense = last_tokens()
    assert dense.shape[1] == prefix + patches
    sv.reduce_(model, sv.TopK(keep=1.0, at=at))
    assert torch.equal(last_tokens(), dense)
    sv.reduce_(model, sv.TopK(keep=0.5, at=at))
    with sv.trace(model) as t:
        found = last_tokens()
    sv.restore_(model)
    left, biases = torch.arange(patches).expand(2, -1), []
    for i in range(DEPTH):
        hidden = torch.ones(2, prefix + patches, dtype=torch.bool)
        hidden[:, :prefix] = False
        biases.append(torch.zeros(hidden.shape).masked_fill(hidden.scatter(1, left + prefix, False), -1e9)[:, None, None])
        if i in at:
            left = left.gather(1, t.stages[at.index(i)].kept)
    real, running = nn.functional.scaled_dot_product_attention, [-1]

    def masked(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        own = biases[running[0]]
        return real(q, k, v, attn_mask=own if attn_mask is None else attn_mask + own, **options)

    def count(*_: Any) -> None:
        running[0] += 1

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", masked)
    handles = [block.register_forward_pre_hook(count) for block in blocks]
    whole = last_tokens()
    for handle in handles:
        handle.remove()
    index = torch.cat([torch.arange(prefix).expand(2, -1), left + prefix], dim=1)
    torch.testing.assert_close(found, whole.gather(1, index[..., None].expand(-1, -1, whole.shape[2])), **CLOSE)


def test_what_a_relative_tower_cannot_be_called_with():
    model, x = zoo.build("hf-beit"), zoo.images(2)
    sv.reduce_(model, sv.ETPS(keep=0.5))
    with pytest.raises(UnsupportedError, match=r"BeitModel was called with a mask \(attention_mask\)"):
        model.beit(x, attention_mask=torch.ones(2, 65))
    with pytest.raises(UnsupportedError, match=r"a bias of shape .* for pairs of tokens, but these images have 65 tokens"):
        model.beit.layers[1](torch.randn(2, 65, 48), resolution=(32, 32))
    model = sv.reduce_(zoo.build("hf-data2vec"), sv.ETPS(keep=0.5))
    with pytest.raises(UnsupportedError, match="was asked for its attention maps"):
        model(x, output_attentions=True)


# timm's Qwen3 towers, whose tokens are laid out as a grid after the last block

QWEN3 = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": DEPTH, "num_heads": 3}
QWEN3_MODELS: dict[str, Callable[[], nn.Module]] = {
    **{f"encoder-{pool}": partial(Qwen3VitEncoder, **QWEN3, global_pool=pool, out_features=10) for pool in ("merge", "avg", "")},
    "classifier": partial(Qwen3VitClassifier, **QWEN3, num_classes=5),
    "classifier-merge": partial(Qwen3VitClassifier, **QWEN3, num_classes=5, encoder_pool="merge"),
}


@pytest.mark.parametrize("name", list(QWEN3_MODELS))
@pytest.mark.parametrize("reducer", [sv.TopK(keep=0.5, at=(1, 3)), sv.ToMe(r=5), sv.ETPS(keep=0.5, at=(1, 3))], ids=str)
def test_a_tower_that_lays_its_tokens_out_after_the_last_block(name, reducer):
    model, x = zoo.randomize(QWEN3_MODELS[name]()).eval(), zoo.images(2, (48, 64))
    dense = zoo.run(model, x)
    with pytest.raises(UnsupportedError, match=r"lays its tokens out as a grid after the last block.*grid=True"):
        sv.reduce_(model, reducer)
    assert torch.equal(zoo.run(sv.reduce_(model, sv.ETPS(keep=1.0), grid=True), x), dense)
    sv.reduce_(model, reducer, grid=True)
    encoder: Any = getattr(model, "encoder", model)
    with torch.no_grad(), sv.trace(model) as t:
        out = model(x)
        features = encoder.forward_features(x)
        final, maps = encoder.forward_intermediates(x, [0, 2])
        only = encoder.forward_intermediates(x, [0, 2], intermediates_only=True)
    assert out.shape == dense.shape and not torch.equal(out, dense)
    left = t.stages[-1].n_out
    assert features.shape == (2, 6, 8, 48) and torch.equal(final, features) and all(map(torch.equal, maps, only))
    for image, groups in zip(features.flatten(1, 2), t.groups, strict=True):
        there = image[groups >= 0]
        assert len(there.unique(dim=0)) == left and not image[groups < 0].any()
        assert all(
            torch.equal(there[groups[groups >= 0] == g], there[groups[groups >= 0] == g][:1].expand(n, -1))
            for g, n in counted(groups)
        )
    if name in ("encoder-avg", "classifier"):  # what was discarded does not count in the mean
        mean = torch.stack([image[groups >= 0].mean(dim=0) for image, groups in zip(features.flatten(1, 2), t.groups, strict=True)])
        expected = mean if name == "encoder-avg" else model.head(model.norm(mean))
        torch.testing.assert_close(out, expected, **CLOSE)


def counted(groups: Tensor) -> list[tuple[int, int]]:
    """Groups of one image and how many patches are in each."""
    which, counts = groups[groups >= 0].unique(return_counts=True)
    return list(zip(which.tolist(), counts.tolist(), strict=True))


# Backbones, which put out what left some of their blocks as images

DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "BeitBackbone": ("BeitConfig", {"use_relative_position_bias": True, "reshape_hidden_states": True}),
    "Dinov2Backbone": ("Dinov2Config", {}),
    "Dinov2WithRegistersBackbone": ("Dinov2WithRegistersConfig", {"num_register_tokens": 3}),
    "DINOv3ViTBackbone": ("DINOv3ViTConfig", {"num_register_tokens": 3}),
    "PixioBackbone": ("PixioConfig", {}),
    "Sapiens2Backbone": ("Sapiens2Config", GROUPED),
    "Tipsv2VisionBackbone": ("Tipsv2VisionConfig", {}),
}
BLOCKS = [2, 3, 6]  # maps that are read, by how many blocks they left


def backbone(name: str, **options: Any) -> Any:
    config_class, own = DENSE[name]
    config = getattr(transformers, config_class)(**VIT, **own, out_indices=BLOCKS, **options)
    return zoo.randomize(getattr(transformers, name)(config)).eval()


def timm_backbone(**options: Any) -> nn.Module:
    sizes = {"img_size": 56, "patch_size": 7, "embed_dim": 48, "depth": DEPTH, "num_heads": 4}
    model = timm.create_model("vit_tiny_patch16_224", **sizes, features_only=True, out_indices=[b - 1 for b in BLOCKS], **options)
    return zoo.randomize(model).eval()


def wrapped_backbone() -> Any:
    """transformers' class around timm's."""
    config = transformers.TimmBackboneConfig(backbone="vit_tiny_patch16_224", out_indices=[1, 2, 5], features_only=True)
    return zoo.randomize(transformers.TimmBackbone(config, img_size=56, patch_size=7, depth=DEPTH)).eval()


def maps(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        out = model(x)
    return list(getattr(out, "feature_maps", out))


BUILDERS: dict[str, Callable[[], Any]] = {
    **{name: lambda name=name: backbone(name) for name in DENSE},
    "timm": timm_backbone,
    "TimmBackbone": wrapped_backbone,
}


@pytest.mark.parametrize("name", list(BUILDERS))
def test_maps_of_a_backbone(name):
    """Before the first stage bit for bit the unreduced ones; later exactly as many different tokens as are left, where traced."""
    model, x = BUILDERS[name](), torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    sv.macs(model)  # which runs the model without values and without hooks, and must leave those of its library
    dense = maps(model, x)
    with pytest.raises(UnsupportedError, match=r"as images, which reduced tokens do not fill; give grid=True"):
        sv.reduce_(model, STAGED)
    off = maps(sv.reduce_(model, sv.ETPS(keep=1.0), grid=True), x)
    assert all(torch.equal(a, b) for a, b in zip(off, dense, strict=True))
    zoo.reduce(sv.restore_(model), sv.Identity())
    for reducer, counts in ((STAGED, [64, 32, 16]), (sv.ToMe(r=6), [52, 46, 28]), (sv.DTPS(keep=0.5, at=(2, 4)), [64, 32, 16])):
        sv.reduce_(model, reducer, grid=True)
        with sv.trace(model) as t:
            found = maps(model, x)
        assert [f.shape for f in found] == [d.shape for d in dense]
        for out, full, count, block in zip(found, dense, counts, BLOCKS, strict=True):
            places = out.flatten(2).transpose(1, 2)  # (B, N0, C)
            assert [len(p.unique(dim=0)) for p in places] == [count, count]
            done = sum(s.block < block for s in t.stages)
            if not done:
                assert torch.equal(out, full)
                continue
            groups = t.groups_after(done - 1)
            first = torch.stack([torch.stack([(g == i).int().argmax() for i in range(count)]) for g in groups])  # of each group
            expected = places.gather(1, first.gather(1, groups)[..., None].expand_as(places))
            assert torch.equal(places, expected)


@pytest.mark.parametrize("kind", ["plain", "dinov3", "open_clip-tower"])
def test_intermediates_in_every_form(kind):
    """NCHW and NLC, with prefix tokens, alone or beside the final features: what `NLC` gives without the grid, scattered back."""
    case = zoo.build(kind)
    x, reducer = zoo.images(), sv.ETPS(keep=0.6, at=(1, 2))
    plain = sv.reduce_(copy.deepcopy(case), reducer)
    sv.reduce_(case, reducer, grid=True)
    extra = "output_extra_tokens" if kind.startswith("open") else "return_prefix_tokens"

    def intermediates(model: Any, **options: Any) -> Any:
        with torch.no_grad():
            out = model.forward_intermediates(x, indices=[0, 1, 3], **options)
        return out["image_intermediates"] if isinstance(out, dict) else out

    with sv.trace(plain) as t:
        few = intermediates(plain, output_fmt="NLC", intermediates_only=True)
    expected = [few[0], t.scatter_back(few[1], stage=0), t.scatter_back(few[2])]
    side = zoo.SIZE // zoo.PATCH
    for fmt in ("NLC", "NCHW"):
        found = intermediates(case, output_fmt=fmt, intermediates_only=True)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.flatten(2).transpose(1, 2) if fmt == "NCHW" else a, b, **CLOSE)
            assert fmt == "NLC" or a.shape[2:] == (side, side)
    if not kind.startswith("open"):
        pairs = intermediates(case, intermediates_only=True, **{extra: True})
        final, both = intermediates(case)
        assert [p.shape[1] for _, p in pairs] == [zoo.prefix(case)] * 3 and len(both) == 3
        with torch.no_grad():
            torch.testing.assert_close(final, case.forward_features(x), **CLOSE)
            assert final.shape[1] == zoo.prefix(case) + zoo.PATCHES
    if kind == "plain":
        named = case.forward_intermediates(x, indices=1, output_dict=True)
        assert named["image_features"].shape == final.shape and len(named["image_intermediates"]) == 1


@pytest.mark.parametrize("kind", ["average-pool", "attention-pool", "hf-dinov2"])
@pytest.mark.parametrize("reducer", [sv.TopK(keep=0.5, at=(1, 2)), sv.EViT(keep=0.5, at=(1, 2))], ids=["topk", "evit"])
def test_what_was_discarded_does_not_count_in_pooling(kind, reducer):
    """Patches without a token hold zeros on the full grid; the mean is of those that have one."""
    x, case = zoo.images(), zoo.KINDS[kind]
    model = sv.reduce_(zoo.build(kind), reducer, grid=True)
    twin = sv.reduce_(zoo.build(kind), reducer)
    with torch.no_grad(), sv.trace(twin) as t:
        plain = case.call(twin, x)
        found = case.call(model, x)
    if isinstance(reducer, sv.TopK):
        torch.testing.assert_close(found, plain, **CLOSE)  # each kept token has one patch
    else:
        assert all(s.hosts is not None for s in t.stages) and not torch.allclose(found, plain)  # by sizes


# Models around towers and backbones


def dense_head(name: str, **options: Any) -> Any:
    model_class = getattr(transformers, name)
    inside = transformers.Dinov2Config(**VIT, out_indices=[1, 2, 4, 6], reshape_hidden_states=name.startswith("UperNet"))
    sizes = {"backbone_config": inside, "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8, **options}
    return model_class(model_class.config_class(**sizes))


RESIZE = {"reassemble_factors": [4, 2, 1, 0.5]}
ANYTHING = {"patch_size": 7, "reassemble_hidden_size": 48, "head_hidden_size": 8}
TWO = {"vision_config": VIT, "text_config": TEXT, "projection_dim": 32}
HEADS: dict[str, tuple[Callable[[], Any], dict[str, Tensor]]] = {  # and what else they are called with
    "DepthAnything": (lambda: dense_head("DepthAnythingForDepthEstimation", **ANYTHING), {}),
    "PromptDepthAnything": (
        lambda: dense_head("PromptDepthAnythingForDepthEstimation", **ANYTHING),
        {"prompt_depth": torch.rand(2, 1, 8, 8)},
    ),
    "DPT": (lambda: dense_head("DPTForDepthEstimation", **RESIZE), {}),
    "ZoeDepth": (
        lambda: dense_head(
            "ZoeDepthForDepthEstimation", **RESIZE, bottleneck_features=8, bin_embedding_dim=8, num_attractors=[4, 2, 2, 1]
        ),
        {},
    ),
    "UperNet": (
        lambda: dense_head(
            "UperNetForSemanticSegmentation",
            hidden_size=16,
            num_labels=5,
            auxiliary_in_channels=48,
            auxiliary_channels=8,
            pool_scales=[1, 2],
        ),
        {},
    ),
    "OwlViT": (
        lambda: transformers.OwlViTForObjectDetection(transformers.OwlViTConfig(**TWO)),
        {"input_ids": torch.ones(4, 5, dtype=torch.long)},
    ),
    "CLIPSeg": (
        lambda: transformers.CLIPSegForImageSegmentation(
            transformers.CLIPSegConfig(**TWO | {"projection_dim": 48}, extract_layers=[1, 2, 4], reduce_dim=16)
        ),
        {"input_ids": torch.ones(2, 5, dtype=torch.long)},
    ),
    "masked-image": (lambda: transformers.ViTForMaskedImageModeling(transformers.ViTConfig(**VIT, encoder_stride=7)), {}),
}


def assert_needs_the_grid(model: nn.Module, run: Callable[[], Tensor], reason: str) -> Tensor:
    """Refused without; equal at keep = 1; and with stages another output of the same shape, which is returned."""
    dense = run()
    with pytest.raises(UnsupportedError, match=reason):
        sv.reduce_(model, STAGED)
    sv.reduce_(model, sv.ETPS(keep=1.0), grid=True)
    assert torch.equal(run(), dense)
    sv.reduce_(model, STAGED, grid=True)
    found = run()
    assert found.shape == dense.shape and 1e-4 < (found - dense).abs().max() / dense.abs().max() < 2
    return found


@pytest.mark.parametrize("name", list(HEADS))
def test_a_dense_head_needs_the_grid(name):
    build, beside = HEADS[name]
    model = zoo.randomize(build()).eval()
    x = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))

    def run() -> Tensor:
        with torch.no_grad():
            out = model(pixel_values=x, **beside)
        return next(v for v in out.values() if isinstance(v, Tensor))

    assert_needs_the_grid(model, run, r"(lays tokens out|is not known to take fewer).*sv.reduce_\(model, .*grid=True\)")
    with sv.trace(model) as t:
        run()
    assert [s.n_out for s in t.stages] == [32, 16]
    assert sv.macs(model) < sv.macs(sv.restore_(copy.deepcopy(model)))


BY_TWO = {"vision_config": VIT, "text_config": {**TEXT, "pad_token_id": 0}, "projection_dim": 32}
AROUND: dict[str, dict[str, Any]] = {  # configurations of what takes any number of tokens; of the others that of a classifier
    **{name: BY_TWO for name in ("CLIPModel", "SiglipModel", "Siglip2Model", "MetaClip2Model", "AltCLIPModel", "ChineseCLIPModel")},
    **{name: BY_TWO for name in ("CLIPSegModel", "OwlViTModel", "Owlv2Model", "BlipForConditionalGeneration")},
    **{f"{name}ForImageClassification": {"vision_config": VIT} for name in ("CLIP", "Siglip", "MetaClip2")},
    "Blip2ForConditionalGeneration": {
        "vision_config": VIT,
        "qformer_config": {**TEXT, "encoder_hidden_size": 48},
        "text_config": transformers.OPTConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, ffn_dim=32, vocab_size=50
        ),
        "image_token_index": 40,
    },
    "ASTForAudioClassification": TOWERS_IN_ROWS["ASTModel"][2],
    "VideoMAEForVideoClassification": TOWERS_IN_ROWS["VideoMAEModel"][2],
    "VivitForVideoClassification": TOWERS_IN_ROWS["VivitModel"][2],
}
ELSEWHERE = ("Llava", "PaliGemma", "VisionTextDualEncoder", "Kosmos2Vision", "GitVision")  # tried as others, or by what is in them


@pytest.mark.parametrize("name", [name for name in ANY_COUNT if not name.startswith(ELSEWHERE)])
def test_what_takes_any_number_of_tokens(name):
    """Its output has the shape that it has unreduced."""
    model_class = getattr(transformers, name)
    options = dict(AROUND.get(name, VIT))
    if name.startswith("Siglip"):
        options["text_config"] = {**options.get("text_config", {}), "projection_size": 48}
    if name.startswith("Siglip2"):
        sides = {key: value for key, value in VIT.items() if key != "image_size"} | {"num_patches": 64}
        options = {**options, "vision_config": sides}
    model = zoo.randomize(model_class(model_class.config_class(**options))).eval()
    about, parameters = description_of(model), inspect.signature(model.forward).parameters
    x = torch.randn(2, about.channels, *about.image_size, generator=torch.Generator().manual_seed(0))
    images = dict(zip([p for p in parameters if p.startswith(("pixel_v", "input_v"))], about.given(x), strict=False))
    if name.startswith("Siglip2"):
        images |= {"pixel_attention_mask": torch.ones(2, 64, dtype=torch.long), "spatial_shapes": torch.tensor([[8, 8]] * 2)}
    words = torch.tensor([[3, 4, 5, 49]] * 2)
    if name.startswith("Blip2"):
        words = torch.tensor([[40] * model.config.num_query_tokens + [3, 4]] * 2)
    images |= {"input_ids": words} if "input_ids" in parameters else {}

    def run() -> Tensor:
        with torch.no_grad():
            out = model(**images)
        return next(out[key] for key in ("logits", "logits_per_image", "image_embeds", "pooler_output") if out.get(key) is not None)

    dense = run()
    sv.reduce_(model, STAGED)
    with sv.trace(model) as t:
        found = run()
    assert [s.n_out for s in t.stages][-1] < t.stages[0].n / 3
    assert found.shape == dense.shape and not torch.equal(found, dense)


def vlm(name: str, config_name: str, vision: Any, text: Any, **options: Any) -> Any:
    config = getattr(transformers, config_name)(vision_config=vision, text_config=text, **options)
    return zoo.randomize(getattr(transformers, name)(config)).eval()


CLIP, SIGLIP = transformers.CLIPVisionConfig(**VIT), transformers.SiglipVisionConfig(**VIT, vision_use_head=False)
LLAMA = transformers.LlamaConfig(**LANGUAGE)
TILES = [[56, 112], [112, 56], [112, 112]]
ONE = {"pixel_values": torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(3))}
FIVE = {"pixel_values": torch.randn(1, 5, 3, 56, 56), "image_sizes": torch.tensor([[112, 112]])}
COUNTING: dict[str, tuple[Callable[[], Any], dict[str, Tensor]]] = {
    "Gemma3": (
        lambda: vlm(
            "Gemma3ForConditionalGeneration", "Gemma3Config", SIGLIP.to_dict(),
            transformers.Gemma3TextConfig(**LANGUAGE, head_dim=8), mm_tokens_per_image=16,
        ),
        ONE,
    ),
    "AyaVision": (
        lambda: vlm(
            "AyaVisionForConditionalGeneration", "AyaVisionConfig", SIGLIP, transformers.Cohere2Config(**LANGUAGE),
            downsample_factor=2,
        ),
        ONE,
    ),
    "LlavaNext": (
        lambda: vlm("LlavaNextForConditionalGeneration", "LlavaNextConfig", CLIP, LLAMA, image_grid_pinpoints=TILES),
        FIVE,
    ),
    "LlavaOnevision": (
        lambda: vlm(
            "LlavaOnevisionForConditionalGeneration", "LlavaOnevisionConfig", SIGLIP, transformers.Qwen2Config(**LANGUAGE),
            image_grid_pinpoints=TILES,
        ),
        FIVE,
    ),
    "VipLlava": (
        lambda: vlm("VipLlavaForConditionalGeneration", "VipLlavaConfig", CLIP, LLAMA, vision_feature_layers=[-2, -3, -4]),
        ONE,
    ),
    "Llava of several layers": (
        lambda: vlm("LlavaForConditionalGeneration", "LlavaConfig", CLIP, LLAMA, vision_feature_layer=[-2, -4]),
        ONE,
    ),
    "InternVL": (
        lambda: vlm(
            "InternVLForConditionalGeneration", "InternVLConfig",
            {**VIT, "image_size": [56, 56], "patch_size": [7, 7]}, transformers.Qwen2Config(**LANGUAGE), downsample_ratio=0.5,
        ),
        ONE,
    ),
    "SmolVLM": (
        lambda: vlm("SmolVLMForConditionalGeneration", "SmolVLMConfig", VIT, LLAMA, scale_factor=2),
        {"pixel_values": ONE["pixel_values"][:, None]},
    ),
    "Idefics3": (
        lambda: vlm("Idefics3ForConditionalGeneration", "Idefics3Config", VIT, LLAMA, scale_factor=2),
        {"pixel_values": ONE["pixel_values"][:, None]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(COUNTING))
def test_a_host_that_counts_tokens_needs_the_grid(name):
    """Also where its tower alone was reduced: it is told when the host calls it, before anything is wrong."""
    build, inputs = COUNTING[name]
    model = build()

    def features() -> Tensor:
        with torch.no_grad():
            out = model.model.get_image_features(**inputs, return_dict=True).pooler_output
        return torch.cat([v.flatten(0, -2) for v in ([out] if isinstance(out, Tensor) else out)])

    found = assert_needs_the_grid(model, features, r"is not known to take fewer tokens .* give grid=True")
    inside = description_of(sv.restore_(model)).tower
    sv.reduce_(inside, STAGED)
    with pytest.raises(UnsupportedError, match=r"was reduced alone, and is called by .*; reduce it with grid=True"):
        features()
    sv.reduce_(inside, STAGED, grid=True)
    torch.testing.assert_close(features(), found, **CLOSE)


@pytest.mark.parametrize("before", [False, True])
def test_a_host_that_averages_must_know_what_it_averages(before):
    """Its tower alone, reduced before the host or after it, would be pooled as if each token were one patch."""
    model = zoo.build("hf-dinov2")
    if before:
        sv.reduce_(model, sv.ToMe(r=2))
    sv.reduce_(model.dinov2, sv.ToMe(r=2))
    with (
        pytest.raises(UnsupportedError, match=r"takes the mean of its patch tokens, each as one; reduce that model"),
        torch.no_grad(),
    ):
        model(zoo.images())
    sv.restore_(model.dinov2)
    with torch.no_grad():
        assert sv.reduce_(model, sv.ToMe(r=2))(zoo.images()).logits.isfinite().all()  # what the message says


def test_every_tower_of_a_model_with_several():
    """DepthPro takes the largest square number of the last tokens for an image, however many there are."""
    options = {**VIT, "num_hidden_layers": 4}
    encoders = {f"{what}_model_config": transformers.Dinov2Config(**options) for what in ("image", "patch", "fov")}
    config = transformers.DepthProConfig(
        **encoders, fusion_hidden_size=16, patch_size=56, intermediate_hook_ids=[3, 1], intermediate_feature_dims=[8, 8],
        scaled_images_ratios=[0.5, 1.0], scaled_images_overlap_ratios=[0.0, 0.2], scaled_images_feature_dims=[8, 8],
        use_fov_model=False,
    )  # fmt: skip
    model, x = zoo.randomize(transformers.DepthProForDepthEstimation(config)).eval(), torch.randn(1, 3, 112, 112)
    with pytest.raises(UnsupportedError) as caught:
        sv.reduce_(model, STAGED)
    remedy = str(caught.value).split("a reducer goes into one: ")[1].split(", which")[0]
    assert remedy == "sv.reduce_(model.depth_pro.encoder.patch_encoder.model, sv.ETPS(), grid=True)"
    inside = model.depth_pro.encoder.patch_encoder.model
    with torch.no_grad():
        dense = model(pixel_values=x).predicted_depth
        sv.reduce_(inside, sv.ETPS(keep=0.5, at=(1,)))
        with pytest.raises(UnsupportedError, match=r"Dinov2Model was reduced alone, and is called by DepthProModel"):
            model(pixel_values=x)
        eval(remedy)
        found = model(pixel_values=x).predicted_depth
    assert found.shape == dense.shape and not torch.equal(found, dense)


def test_a_mask_that_hides_nothing_is_no_mask():
    """ModernVBert hands one to its tower; one that hides something is refused."""
    config = transformers.ModernVBertConfig(
        vision_config=SIGLIP,
        text_config=transformers.ModernBertConfig(**TEXT, pad_token_id=0),
        image_token_id=40,
        pixel_shuffle_factor=2,
    )
    model = zoo.randomize(transformers.ModernVBertModel(config)).eval()
    x = torch.randn(1, 1, 3, 56, 56)

    def features() -> Tensor:
        with torch.no_grad():
            return model.get_image_features(x, return_dict=True).pooler_output[0]

    dense = features()
    sv.reduce_(model, sv.ETPS(keep=1.0), grid=True)
    torch.testing.assert_close(features(), dense, **CLOSE)
    sv.reduce_(model, STAGED, grid=True)
    assert features().shape == dense.shape
    tower_alone = sv.reduce_(zoo.build("hf-siglip2"), sv.ETPS(keep=0.5))
    about = description_of(tower_alone)
    patches, _, shapes = about.given(zoo.images())
    seen = torch.ones(3, zoo.PATCHES, dtype=torch.long)
    with torch.no_grad():
        tower_alone(patches, seen, shapes)
        seen[1, -9:] = 0
        with pytest.raises(UnsupportedError, match="was called with a mask"):
            tower_alone(patches, seen, shapes)


def test_timm_inside_transformers():
    """What AutoModelForImageClassification makes of a timm checkpoint."""
    config = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", num_labels=10, model_args={"img_size": 56, "patch_size": 7, "depth": DEPTH}
    )
    model = zoo.randomize(transformers.TimmWrapperForImageClassification(config)).eval()
    x, alone = ONE["pixel_values"], copy.deepcopy(model.timm_model)
    for reducer in (sv.ETPS(keep=1.0), STAGED, sv.DTPS(keep=0.5), sv.ETPS(keep=0.5, mass=True)):
        zoo.reduce(model, reducer)
        zoo.reduce(alone, reducer)
        with torch.no_grad(), sv.trace(model) as t:
            logits = model(x).logits
            assert torch.equal(logits, alone(x))
        assert len(t.stages) == len(reducer.stages(DEPTH))
    assert sv.macs(model) == sv.macs(alone)


def test_patches_with_coordinates_are_refused():
    """timm's NaFlexVit takes them with a mask of what is padding."""
    model = sv.reduce_(zoo.build("naflex"), sv.ETPS(keep=0.5))
    given = {"patches": torch.randn(2, 64, 192), "patch_coord": torch.zeros(2, 64, 2, dtype=torch.long)}
    given |= {"patch_valid": torch.ones(2, 64, dtype=torch.bool)}
    for run in (model, model.forward_intermediates):
        with pytest.raises(UnsupportedError, match=r"NaFlexVit was given patches with coordinates, .* give images of one size"):
            run(given)


def test_hybrids_are_counted():
    """Their stem's channels are not those of their images."""
    model = timm.create_model("vit_tiny_r_s16_p8_224")
    assert sv.macs(sv.reduce_(model, sv.ETPS(keep=0.5))) < sv.macs(sv.restore_(copy.deepcopy(model)))


def test_the_grid_is_saved_with_the_reducer(tmp_path):
    model = sv.reduce_(backbone("Dinov2Backbone"), STAGED, grid=True)
    x = ONE["pixel_values"]
    model.save_pretrained(tmp_path)
    assert not hasattr(model.config, "squeezevit") and not hasattr(model.config, "squeezevit_grid")
    again = sv.from_pretrained(transformers.Dinov2Backbone, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(maps(again, x), maps(model, x), strict=True))
    assert not hasattr(again.config, "squeezevit_grid")


def test_budgets_of_a_model_that_needs_the_grid():
    model = backbone("Dinov2Backbone")
    dense, reducer = sv.macs(model), sv.plan(model, sv.ETPS(), macs=0.6)
    assert sv.macs(sv.reduce_(model, reducer, grid=True)) / dense == pytest.approx(0.6, abs=0.05)
    speeds = measure(model, [reducer], batch_size=1, rounds=1, limits=False)
    assert [s.reducer for s in speeds] == [repr(reducer)] and speeds[0].speedup > 0
