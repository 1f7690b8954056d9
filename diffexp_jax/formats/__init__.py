"""Files that models are published in: safetensors, pickles, tokenizers, and the names of tensors in them."""
