"""Compares the base model with a run's LoRA on the same seeds; `diffexp_jax/cli/evaluate.py` has the flags."""

from diffexp_jax import command

if __name__ == "__main__":
    command.quiet_interrupt()  # the imports take seconds

    from diffexp_jax.cli import evaluate

    evaluate.run()
