"""The flags of cli/sample.py, and the settings that they come to."""

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from diffexp_jax import command, settings
from diffexp_jax.errors import InputError
from diffexp_jax.formats.json_text import parse_json
from diffexp_jax.limits import LORA_SCALE, check_number, whole
from diffexp_jax.models.precision import DTYPES
from diffexp_jax.prompts.units import UNITS
from diffexp_jax.settings.training import SCOPES

# What a flag sets of a run's settings
KEYS = {
    "model": "model.path",
    "revision": "model.revision",
    "variant": "model.variant",
    "tokenizer": "model.tokenizer",
    "dtype": "model.dtype",
    "image_size": "model.image_size",
    "steps": "sampling.steps",
    "guidance": "sampling.guidance",
    "eta": "sampling.eta",
    "negative_prompt": "sampling.negative_prompt",
    "w_low": "exploration.w_low",
    "t_thresh": "exploration.t_thresh",
    "weight_range": "exploration.weight_range",
    "unit": "exploration.unit",
    "scope": "exploration.scope",
    "seed": "seed",
}
# Where there is no run: the defaults of diffusers' pipelines
WITHOUT_RUN = {"model.dtype": "float32", "sampling.steps": 50, "sampling.guidance": 7.5, "sampling.eta": 0.0}


def arguments(about: str, words: Sequence[str] | None = None) -> argparse.Namespace:
    """Of the command line, whose help begins with `about`; words None: those of the program."""
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
    add("--explore", action="store_true", help="show what exploration does to the same seeds")
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
    add("--steps", type=int, help="DDIM steps, 1..1000 (default: 50)")
    add("--guidance", type=float, help="classifier-free guidance scale; 1 is none (default: 7.5)")
    add("--negative_prompt", help="what guidance leads away from (default: from no prompt)")
    add("--eta", type=float, help="noise of the DDIM steps, 0..1 (default: 0)")
    add("--seed", type=int, help="(default: 0)")
    add("--w_low", type=float, help="with --explore, --samplers: guidance while t > --t_thresh (Eq. 7)")
    add("--t_thresh", type=int, help="with --explore, --samplers: in training timesteps, 0..1000")
    add("--weight_range", type=float, nargs=2, help="with --explore: of a unit's weight (Eq. 8)")
    add("--unit", choices=UNITS, help="with --explore: what is weighted together")
    add("--scope", choices=SCOPES, help="with --explore: what has a draw of its own")
    return parser.parse_args(words)


def settings_of(args: argparse.Namespace) -> ConfigDict:
    """The settings to sample by: those of the run that --lora names, or the defaults, and what flags say instead.

    Raises:
      InputError: a flag that cannot work.
    """
    run = Path(args.lora, "config.json") if args.lora else None
    if run is not None and run.is_file():
        config, _ = settings.read_config(run)
        config.seed = 0  # of the pictures, not of the run
    else:
        config = settings.default_config()
        config.update_from_flattened_dict(WITHOUT_RUN)
    given = {KEYS[flag]: value for flag, value in vars(args).items() if flag in KEYS and value is not None}
    config.update_from_flattened_dict({k: tuple(x) if isinstance(x, list) else x for k, x in given.items()})
    set_scheduler(config, vars(args).get("scheduler") or [])
    settings.check_values(config, {key: f"--{flag} " for flag, key in KEYS.items() if key in given})
    check_number("--batch ", args.batch, whole(1, 2**20))
    check_number("--num_images ", args.num_images, whole(1, 2**20))
    if args.lora_scale is not None:
        check_number("--lora_scale ", args.lora_scale, LORA_SCALE)
        if not args.lora:
            raise InputError(f"--lora_scale {args.lora_scale:g}: wants a LoRA, by --lora")
    if args.checkpoint and (run is None or not run.is_file()):
        raise InputError(f"--checkpoint {args.checkpoint}: wants the workdir of a run, by --lora")
    if args.lora and not Path(args.lora).exists():
        raise InputError(f"--lora {args.lora}: no such file or folder")
    command.check_writable(Path(args.out), "--out")
    return config


def set_scheduler(config: ConfigDict, given: Sequence[str]) -> None:
    """Enters what --scheduler says, KEY=VALUE each.

    Raises:
      InputError: no such key, or a value of another type.
    """
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or key not in config.model.scheduler:
            accepted = ", ".join(config.model.scheduler)
            raise InputError(f"--scheduler {text}: wants KEY=VALUE; accepted: {accepted}")
        with contextlib.suppress(ValueError):
            value = parse_json(value.lower())  # a number, true, false; else a word
        try:
            config.model.scheduler[key] = value
        except TypeError:
            raise InputError(f"--scheduler {text}: the value is of another type; configs/base.py says which") from None
