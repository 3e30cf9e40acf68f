"""Fine-tune dTPS with Hugging Face's Trainer: a module that returns the loss, with the keep ratio's part in it."""

import tempfile

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import squeezevit as sv


class Reduced(nn.Module):
    def __init__(self, reducer: sv.DTPS) -> None:
        super().__init__()
        model = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8, depth=4, num_classes=2)
        self.model, self.reducer = sv.reduce_(model, reducer), reducer

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        with sv.trace(self.model) as t:
            logits = self.model(pixel_values)
        loss = F.cross_entropy(logits, labels)
        if self.training:
            loss = loss + 2 * sv.losses.keep_ratio_loss(t.decisions, self.reducer.targets(3))
        return {"loss": loss, "logits": logits}


class Noise(Dataset):
    """Your own dataset here."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(i)), "labels": torch.tensor(i % 2)}


with tempfile.TemporaryDirectory() as folder:
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True}
    settings = TrainingArguments(
        folder, num_train_epochs=1, per_device_train_batch_size=8, learning_rate=1e-3, use_cpu=True, **quiet
    )
    trainer = Trainer(Reduced(sv.DTPS(keep=0.5)), settings, train_dataset=Noise(), eval_dataset=Noise())
    trainer.train()
    print(trainer.evaluate())
