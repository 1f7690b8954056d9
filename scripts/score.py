"""Scores pictures; `diffexp_jax/cli/score.py` has the flags."""

from diffexp_jax import command

if __name__ == "__main__":
    command.quiet_interrupt()  # the imports take seconds

    from diffexp_jax.cli import score

    score.run()
