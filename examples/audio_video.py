"""Sound and video: the same call on models that see spectrograms, or frames. Tiny random models here, so that it runs anywhere."""

import torch
import transformers

import squeezevit as sv

SIZES = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96}
torch.manual_seed(0)

# Audio Spectrogram Transformer: patches of a spectrogram of 64 frames and 16 mel bins, which overlap
config = transformers.ASTConfig(
    **SIZES, patch_size=8, frequency_stride=4, time_stride=4, max_length=64, num_mel_bins=16, num_labels=5
)
listener = transformers.ASTForAudioClassification(config).eval()
sv.reduce_(listener, sv.preset("training-free", macs=0.5, model=listener))
with torch.inference_mode(), sv.trace(listener) as t:
    logits = listener(torch.randn(1, 64, 16)).logits  # (B, frames, mel bins)
print("sound:", tuple(logits.shape), "patches after each stage:", [s.n_out for s in t.stages])

# VideoMAE: tubelets of 2 frames; its attention takes no mask, so the reducer is one without masses
config = transformers.VideoMAEConfig(**SIZES, image_size=56, patch_size=7, num_frames=4, tubelet_size=2, num_labels=5)
watcher = transformers.VideoMAEForVideoClassification(config).eval()
sv.reduce_(watcher, sv.ETPS(keep=0.5, at=(1, 2)))
with torch.inference_mode(), sv.trace(watcher) as t:
    logits = watcher(torch.randn(1, 4, 3, 56, 56)).logits  # (B, frames, channels, height, width)
print("video:", tuple(logits.shape), "tubelets after each stage:", [s.n_out for s in t.stages])
