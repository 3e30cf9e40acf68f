"""Fine-tune eTPS with Lightning (pip install lightning): the reduced model is an ordinary module."""

import lightning
import timm
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import squeezevit as sv


class Reduced(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        model = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8, depth=4, num_classes=2)
        self.model = sv.reduce_(model, sv.ETPS(keep=0.5))  # tokens leave in training too: it gets faster as well

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


if __name__ == "__main__":
    noise = TensorDataset(torch.randn(32, 3, 64, 64), torch.arange(32) % 2)  # your own dataset here
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(Reduced(), DataLoader(noise, batch_size=8))
    print(f"trained for {trainer.global_step} steps")
