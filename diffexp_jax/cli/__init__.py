"""Programs that a user types, one file each: their flags, and what they write. `diffexp_jax/train.py` is one more."""
