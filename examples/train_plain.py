"""Fine-tune dTPS in a plain PyTorch loop: the losses of the paper, with the unreduced model as teacher."""

import copy

import timm
import torch
import torch.nn.functional as F
from skimage import data

import squeezevit as sv


def crops(count: int, size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Random crops of two photographs, and which of the two each is from."""
    photos = [torch.from_numpy(photo).permute(2, 0, 1) / 127.5 - 1 for photo in (data.coffee(), data.chelsea())]
    labels = torch.arange(count) % 2
    corners = (torch.rand(count, 2) * (300 - size)).int().tolist()  # the smaller photograph is 300 pixels high
    return torch.stack([photos[k][:, y : y + size, x : x + size] for k, (y, x) in zip(labels, corners, strict=True)]), labels


torch.manual_seed(0)
model = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8, depth=4, num_classes=2)  # pretrained=True with a hub
teacher = copy.deepcopy(model).eval()
reducer = sv.DTPS(keep=0.5)
sv.reduce_(model, reducer).train()
heads = [p for name, p in model.named_parameters() if name.startswith("token_reducer.")]
rest = [p for name, p in model.named_parameters() if not name.startswith("token_reducer.")]
optimizer = torch.optim.AdamW([{"params": heads, "lr": 1e-3}, {"params": rest, "lr": 1e-4}])

for step in range(8):
    images, labels = crops(16)
    with sv.trace(model) as t:
        logits = model(images)
    with torch.no_grad():
        tokens = teacher.forward_features(images)
        expected = teacher.forward_head(tokens)
    keep = sv.losses.keep_ratio_loss(t.decisions, reducer.targets(3))
    distill = sv.losses.distillation_loss(logits, expected, t.tokens, tokens[:, 1:], t.decisions[-1])
    loss = F.cross_entropy(logits, labels) + 2 * keep + 0.5 * distill
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}, kept {[round(d.mean().item(), 2) for d in t.decisions]}")

model.eval()  # tokens really leave now
print(f"{sv.macs(model) / sv.macs(teacher):.0%} of the multiply-adds; logits {tuple(model(images).shape)}")
