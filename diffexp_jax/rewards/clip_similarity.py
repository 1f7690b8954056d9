"""CLIP similarity (Radford et al. 2021): the cosine of image and prompt to any CLIP, untuned."""

from functools import partial

from diffexp_jax.rewards import pickscore
from diffexp_jax.rewards.reward import Builtin

# The folder of a CLIPModel with its tokenizer, as transformers writes them (openai/clip-vit-large-patch14, say): what
# PickScore is a tuned one of, and its cosine is all there is to it. CLIPScore (Hessel et al. 2021) is 2.5 times that,
# where it is above 0. The weight in a sum is that of the other cosine.
BUILTINS = {
    "clip_similarity": Builtin(
        "the cosine of picture and prompt to any CLIP (Radford et al. 2021)",
        partial(pickscore.load, scale="cosine"),
        weight=10.0,
        on_white=True,
    )
}
