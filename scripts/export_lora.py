"""Writes the LoRA of a run's newest or best checkpoint as a file that diffusers' `load_lora_weights` reads.

python scripts/export_lora.py --workdir runs/x --out pytorch_lora_weights.safetensors
"""

from diffexp_jax import command

if __name__ == "__main__":
    command.quiet_interrupt()  # the imports take seconds

import argparse
from pathlib import Path

from diffexp_jax import InputError, checkpoint, settings
from diffexp_jax.models.lora import save_lora


def main(args: argparse.Namespace) -> None:
    config, _ = settings.read_config(args.workdir / "config.json")
    iteration, lora = checkpoint.read_lora(args.workdir, args.checkpoint)
    try:
        save_lora(args.out, lora, alpha=config.lora.alpha)
    except OSError as error:
        raise InputError(f"--out {args.out}: cannot be written ({error.strerror or error})") from None
    print(f"the LoRA after iteration {iteration}: {args.out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--workdir", type=Path, required=True, help="of the run")
    add("--checkpoint", default=checkpoint.NEWEST, help="of the run: newest, best, or the number of an iteration")
    add("--out", type=Path, required=True, help="the .safetensors file to write")
    command.guarded(main, parser.parse_args())
