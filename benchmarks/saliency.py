"""The decoder that the demo's weights were trained under: from patch tokens to how much each pixel draws the eye."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from squeezevit.data import dinov2

SIZE = 224


class Decoder(nn.Module):
    """Patch tokens [B, N, 384] of a square grid -> saliency [B, SIZE, SIZE], as in the ONNX file."""

    def __init__(self) -> None:
        super().__init__()
        wide = (384, 256, 128, 64)
        for i in (1, 2, 3):
            setattr(self, f"upconv{i}", nn.ConvTranspose2d(wide[i - 1], wide[i], 4, stride=2, padding=1))
            setattr(self, f"bn{i}", nn.BatchNorm2d(wide[i]))
        self.final_conv = nn.Conv2d(64, 1, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = tokens.transpose(1, 2).unflatten(2, (math.isqrt(tokens.shape[1]), -1))
        for i in (1, 2, 3):
            x = getattr(self, f"bn{i}")(getattr(self, f"upconv{i}")(x)).relu()
        return F.interpolate(self.final_conv(x), (SIZE, SIZE), mode="bilinear")[:, 0].sigmoid()


def decoder() -> Decoder:
    import onnx

    graph = onnx.load(str(dinov2.weights_path())).graph
    arrays = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer if i.name.startswith("decoder.")}
    model = Decoder().eval()
    state = {n.removeprefix("decoder."): torch.from_numpy(a.copy()) for n, a in arrays.items()}
    found = model.load_state_dict(state, strict=False)
    if found.unexpected_keys or not all(key.endswith("num_batches_tracked") for key in found.missing_keys):
        raise ValueError(f"the decoder in the file is another one: {found}")
    return model
