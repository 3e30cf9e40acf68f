"""The full grid again: features of reduced tokens, scattered back for segmentation, depth or saliency heads."""

import timm
import torch

import squeezevit as sv

model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0).eval()
sv.reduce_(model, sv.ETPS(keep=0.5, mass=True))

with torch.inference_mode(), sv.trace(model) as t:
    tokens = model.forward_features(torch.randn(2, 3, 224, 224))
grid = t.scatter_back(tokens[:, t.prefix :])  # (B, N0, C): every patch holds the token it was squeezed into

for stage in t.stages:
    print(f"block {stage.block}: {stage.n} -> {stage.n_out} patch tokens")
print(f"{tokens.shape[1] - t.prefix} tokens back to a grid of {tuple(grid.unflatten(1, (14, 14)).shape)}")
