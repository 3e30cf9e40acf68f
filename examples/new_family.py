"""A transformer that SqueezeViT has never heard of, supported from outside: see the last lines."""

import torch
from torch import nn

import squeezevit as sv
from squeezevit.extend import Description, attn_half, describe, mlp_half, multihead


class MyBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), nn.MultiheadAttention(dim, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(x)


class MyModel(nn.Sequential):
    def forward(self, images):
        x = self[0](images).flatten(2).mT
        return self[2](self[1](torch.cat([x.mean(dim=1, keepdim=True), x], dim=1))[:, 0])


attn_half.register(MyBlock, lambda block, x, bias=None: x + multihead.attend(block.attn, block.norm1(x), bias))
mlp_half.register(MyBlock, lambda block, x: x + block.mlp(x))
describe.register(MyModel, lambda m: Description(m[1], prefix=1, class_token=True, dim=64, channels=3, image_size=(224, 224)))

model = MyModel(nn.Conv2d(3, 64, 16, 16), nn.Sequential(*(MyBlock(64) for _ in range(8))), nn.Linear(64, 10)).eval()
sv.reduce_(model, sv.DTPS(keep=0.5))  # with `attention` registered, too, sv.ETPS and all others
with torch.inference_mode(), sv.trace(model) as t:
    model(torch.randn(2, 3, 224, 224))
print([stage.n_out for stage in t.stages], f"{sv.macs(model) / sv.macs(sv.restore_(model)):.0%} of the multiply-adds")
