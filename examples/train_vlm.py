"""Fine-tune on a quarter of the image tokens with Hugging Face's Trainer; a tiny model with random weights stands in for yours."""

import tempfile

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, Trainer, TrainingArguments

import squeezevit as sv

IMAGE = 4  # the token that waits for image features
size = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 4}
tower = CLIPVisionConfig(**size, image_size=56, patch_size=7)
text = LlamaConfig(**size, vocab_size=16, pad_token_id=0, bos_token_id=1, eos_token_id=2)
model = LlavaForConditionalGeneration(LlavaConfig(vision_config=tower, text_config=text, image_token_index=IMAGE))


class Conversations(Dataset):
    """Your own processor's output here, with labels: bright or dark?"""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        noise = torch.randn(3, 56, 56, generator=torch.Generator().manual_seed(i))
        ids = torch.tensor([1, *[IMAGE] * 64, 5, 6 + i % 2])
        labels = torch.tensor([*[-100] * 66, 6 + i % 2])
        return {"pixel_values": noise + i % 2, "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


with tempfile.TemporaryDirectory() as folder:
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "remove_unused_columns": False}
    settings = TrainingArguments(
        folder,
        num_train_epochs=2,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        use_cpu=True,
        prediction_loss_only=True,
        **quiet,
    )
    trainer = Trainer(sv.VLM(model, keep=0.25), settings, train_dataset=Conversations(), eval_dataset=Conversations())
    print("loss before", trainer.evaluate()["eval_loss"])
    trainer.train()
    print("loss after", trainer.evaluate()["eval_loss"])
    trainer.model.model.save_pretrained(folder)  # the model itself, which runs without this library
