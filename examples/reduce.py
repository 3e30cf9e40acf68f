"""A timm ViT with half the multiply-adds, and back again."""

import timm
import torch

import squeezevit as sv

model = timm.create_model("deit_tiny_patch16_224", pretrained=False).eval()  # pretrained=True where a hub is reachable
images = torch.randn(2, 3, 224, 224)
print(f"unreduced {sv.macs(model) / 1e9:.2f} GMACs")

sv.reduce_(model, sv.ETPS(keep=0.5, at=(3, 6, 9)))
print(f"{sv.ETPS(keep=0.5)}: {sv.macs(model) / 1e9:.2f} GMACs, logits {tuple(model(images).shape)}")

sv.restore_(model)
print(f"restored {sv.macs(model) / 1e9:.2f} GMACs")
