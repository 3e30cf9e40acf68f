"""A quarter of the image tokens in transformers' own pipeline; a tiny model with random weights stands in for yours."""

import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

import squeezevit as sv

words = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "what", "is", "in", "the", "picture", "?", "a", "cat", "dog"]
tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
processor = hf.LlavaProcessor(
    hf.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=["<image>"], **special),
    patch_size=7,
    vision_feature_select_strategy="default",
    num_additional_image_tokens=1,
)
size = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 4}
tower = hf.CLIPVisionConfig(**size, image_size=56, patch_size=7)
text = hf.LlamaConfig(**size, vocab_size=len(words), pad_token_id=0, bos_token_id=1, eos_token_id=2)
model = hf.LlavaForConditionalGeneration(hf.LlavaConfig(vision_config=tower, text_config=text, image_token_index=4)).eval()

picture, question = Image.effect_noise((80, 60), 100).convert("RGB"), "<image> what is in the picture ?"
vlm = sv.VLM(model, keep=0.25)
prompt = vlm.squeeze(processor(images=picture, text=question, return_tensors="pt"))
print(prompt)
print("the first image token stands for patches", prompt.images[0].members(0).tolist())
ask = hf.pipeline("image-text-to-text", model=vlm, processor=processor)
print(ask(images=picture, text=question, max_new_tokens=4)[0]["generated_text"])
