"""Writes the LoRA of a run's newest or best checkpoint as a file that diffusers' `load_lora_weights` reads.

python scripts/export_lora.py --workdir runs/x --out pytorch_lora_weights.safetensors
python scripts/export_lora.py --workdir runs/x --card --out card                 # with a model card (README.md)
python scripts/export_lora.py --workdir runs/x --push_to_hub ORGANISATION/NAME   # that folder, to the Hugging Face hub
"""

import argparse
import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from diffexp_jax import command
from diffexp_jax.errors import InputError, first_line
from diffexp_jax.models.lora import BESIDE, LORA_FILE, file_beside, save_lora
from diffexp_jax.report import card
from diffexp_jax.report.run import lora_prefix
from diffexp_jax.run import checkpoint
from diffexp_jax.settings import read_config


def main(args: argparse.Namespace) -> None:
    settings, _ = read_config(args.workdir / "config.json")
    repository, with_card = args.push_to_hub or "", args.card or args.push_to_hub
    if repository and not card.is_hub_id(repository):
        raise InputError(f"--push_to_hub {repository}: wants ORGANISATION/NAME")
    if args.private and not repository:
        raise InputError("--private: is for --push_to_hub")
    if with_card and args.out and args.out.suffix:
        raise InputError(f"--out {args.out}: wants a folder, for {LORA_FILE} and {card.README}")
    if args.card and not args.out and not repository:
        raise InputError(f"--out: wants a folder, for {LORA_FILE} and {card.README}")
    if not with_card and not args.out:
        raise InputError("--out: wants the .safetensors file to write")
    iteration, lora = checkpoint.read_lora(args.workdir, args.checkpoint)
    with folder_for(args.out if with_card else None) as folder:
        file = folder / LORA_FILE if with_card else args.out
        try:
            if with_card:
                reward = settings.trained_reward.without_locations
                card.write(
                    args.workdir, folder, iteration=iteration, reward=reward, lora_file=file.name, repository=repository
                )
            save_lora(file, lora, alpha=settings.lora.alpha, prefix=lora_prefix(args.workdir))
        except OSError as error:
            raise InputError(f"--out {file}: cannot be written ({error.strerror or error})") from None
        if args.out:
            print(f"the LoRA after iteration {iteration}: {file}")
        if repository:
            print(f"the LoRA after iteration {iteration}: {push(folder, repository, iteration, private=args.private)}")


@contextlib.contextmanager
def folder_for(out: Path | None) -> Iterator[Path]:
    """`out`, or a folder that is there for as long as the context lasts."""
    if out is not None:
        yield out
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def push(folder: Path, repository: str, iteration: int, *, private: bool) -> str:
    """Uploads what was written to the hub's repository, which may be new; its address.

    Raises:
      InputError: the hub does not take it, or is not there.
    """
    import huggingface_hub  # a second to import: only where it is used

    api = huggingface_hub.HfApi()
    try:
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        names = [LORA_FILE, *(file_beside(Path(LORA_FILE), name).name for name in BESIDE), card.README, *card.PICTURES]
        message = f"LoRA after iteration {iteration}"
        api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=names, commit_message=message)
    except Exception as error:  # of many libraries: no login, no right to write there, no network, offline
        raise InputError(
            f"--push_to_hub {repository}: not uploaded ({first_line(error)}); is there a login (hf auth login)?"
        ) from None
    return str(url)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of a command line; None: the program's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--workdir", type=Path, required=True, help="of the run")
    add("--checkpoint", default=checkpoint.NEWEST, help="of the run: newest, best, or the number of an iteration")
    add("--out", type=Path, help="the .safetensors file to write; with a card the folder")
    add("--card", action="store_true", help="also write a model card from the run's settings, metrics and pictures")
    add("--push_to_hub", help="ORGANISATION/NAME: upload LoRA and card to this repository of the Hugging Face hub")
    add("--private", action="store_true", help="with --push_to_hub: a new repository is private")
    return parser.parse_args(words)


def run() -> None:
    command.guarded(main, arguments())
