"""Writes the report of a run again, a page of two runs, or an animation; `diffexp_jax/cli/report.py` has the flags."""

from diffexp_jax import command

if __name__ == "__main__":
    command.quiet_interrupt()  # the imports take seconds

    from diffexp_jax.cli import report

    report.run()
