"""Fewer image tokens for the language model of a vision-language model: `squeeze_prompt`, and `VLM` around `generate`.

prompt.py    a processor's output -> a shorter one
host.py      what is asked of a model of transformers, by signature and never by class
groups.py    which features of an image stay, and what becomes of the others
tower.py     scores from the attention of the vision tower
question.py  scores from the attention of the language model
wrapper.py   `generate` that takes and returns what the unreduced model does
both.py      tower and prompt with one budget
"""

from squeezevit.vlm.both import reduce_vlm_
from squeezevit.vlm.groups import Groups
from squeezevit.vlm.host import Image
from squeezevit.vlm.prompt import ImageTokens, Prompt, squeeze_prompt
from squeezevit.vlm.wrapper import VLM

__all__ = ["VLM", "Groups", "Image", "ImageTokens", "Prompt", "reduce_vlm_", "squeeze_prompt"]
