"""The flags of cli/sample.py, and the settings that they come to."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from diffexp_jax import command
from diffexp_jax.errors import InputError
from diffexp_jax.limits import LORA_SCALE, SEED, check_number, whole
from diffexp_jax.models.precision import DTYPES
from diffexp_jax.prompts.units import UNITS
from diffexp_jax.settings import Settings, sampling_settings
from diffexp_jax.settings.training import SCOPES


def arguments(about: str, words: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of a command line, whose help begins with `about`; words None: the program's own."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--prompt", action="append", default=[], help="a prompt (repeat for several)")
    add("--prompts", help="a built-in prompt set or a file, after the --prompt ones")
    add("--num_images", type=int, default=1, help="images of each prompt")
    add("--lora", type=Path, help="a LoRA file or folder, or the workdir of a run")
    add("--lora_scale", type=float, help="factor of the LoRA: 0 is the untuned model, 1 the tuned one (default: 1)")
    add("--checkpoint", help="of the run that --lora names: newest, best, or an iteration's number (default: its end)")
    add("--out", type=Path, required=True, help="folder for NNNN.png, prompts.csv and grid.png")
    add("--save_npy", action="store_true", help="also write images.npy, float32 [N,H,W,3] in [0,1]")
    add(
        "--latents",
        type=Path,
        help="float32 .npy [N,h,w,c], standard normal: the noise to start from, one for each image",
    )
    add("--batch", type=int, default=16, help="images at once")
    add(
        "--explore",
        action="store_true",
        help="also draw the same seeds with each part of exploration, and with both",
    )
    add("--samplers", action="store_true", help="show guidance low, high and scheduled on the same seeds (Fig. 3)")
    group = parser.add_argument_group("settings (default: the run's that --lora names, else as said below)")
    add = group.add_argument
    add("--model", help="emoji (default), a folder in the diffusers pipeline format, a single file, or a hub id")
    add("--revision", help="of the hub's repository: a branch, tag or commit")
    add("--variant", help="fp16: take the half-precision weight files")
    add("--tokenizer", help="of a model that is a single file: a folder with CLIP's vocab.json and merges.txt")
    add(
        "--scheduler",
        action="append",
        metavar="KEY=VALUE",
        help="otherwise than the model's scheduler_config.json, e.g. timestep_spacing=trailing (repeat for more)",
    )
    add("--dtype", choices=DTYPES, help="of the weights and networks (default: float32)")
    add("--image_size", type=int, help="pixels of a side (default: what the model was trained at)")
    add("--t5_tokens", type=int, help="tokens that T5 reads of a prompt (default: as published)")
    add("--steps", type=int, help="sampling steps, 1..1000 (default: 50)")
    add("--guidance", type=float, help="classifier-free guidance scale; 1 is none (default: 7.5)")
    add("--negative_prompt", help="what guidance leads away from (default: from no prompt)")
    add("--eta", type=float, help="noise of the steps, of DDIM 0..1 (default: 0)")
    add("--seed", type=int, help="(default: 0)")
    add("--w_low", type=float, help="with --explore, --samplers: guidance while t > --t_thresh (Eq. 7)")
    add("--t_thresh", type=int, help="with --explore, --samplers: in training timesteps, 0..1000")
    add("--weight_range", type=float, nargs=2, help="with --explore: of a unit's weight (Eq. 8)")
    add("--unit", choices=UNITS, help="with --explore: what is weighted together")
    add("--scope", choices=SCOPES, help="with --explore: what has a draw of its own")
    return parser.parse_args(words)


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings to sample by: those of the run that --lora names, or the defaults, and what flags say instead.

    Raises:
      InputError: a flag that cannot work.
    """
    run = Path(args.lora) if args.lora and Path(args.lora, "config.json").is_file() else None
    settings = sampling_settings(run, vars(args), written="--{} ")
    if args.seed is not None:
        check_number("--seed ", args.seed, SEED)
    check_number("--batch ", args.batch, whole(1, 2**20))
    check_number("--num_images ", args.num_images, whole(1, 2**20))
    if args.lora_scale is not None:
        check_number("--lora_scale ", args.lora_scale, LORA_SCALE)
        if not args.lora:
            raise InputError(f"--lora_scale {args.lora_scale:g}: wants a LoRA, by --lora")
    if args.checkpoint and run is None:
        raise InputError(f"--checkpoint {args.checkpoint}: wants the workdir of a run, by --lora")
    if args.lora and not Path(args.lora).exists():
        raise InputError(f"--lora {args.lora}: no such file or folder")
    command.check_writable(Path(args.out), "--out")
    return settings
