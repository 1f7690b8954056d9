"""Samples images from a model, with or without a LoRA; `diffexp_jax/cli/sample.py` has the flags."""

from diffexp_jax import command

if __name__ == "__main__":
    command.quiet_interrupt()  # the imports take seconds

    from diffexp_jax.cli import sample

    sample.run()
