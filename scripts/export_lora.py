"""Writes a run's LoRA as a file that diffusers reads; `diffexp_jax/cli/export_lora.py` has the flags."""

from diffexp_jax import command

if __name__ == "__main__":
    command.quiet_interrupt()  # the imports take seconds

    from diffexp_jax.cli import export_lora

    export_lora.run()
