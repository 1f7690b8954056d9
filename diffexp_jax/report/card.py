"""The model card (README.md) of a run's LoRA, for the Hugging Face hub, made of what is in the run's folder."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffexp_jax.errors import InputError
from diffexp_jax.formats.files import replaced, write_whole
from diffexp_jax.report.results import before_and_after
from diffexp_jax.report.run import RunFiles, read_run
from diffexp_jax.run.metrics import grid_path

README = "README.md"
PICTURES = ("before.png", "after.png")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_FILE = re.compile(r"(.*/)?([^/]*\.(txt|csv|tsv|json)\b.*)")  # a prompt set that is a file
_PAPER = "https://arxiv.org/abs/2502.14070"
_MISSING = "_BASE_MODEL_"  # where the base model has no name on the hub


def is_hub_id(name: str) -> bool:
    """Whether this may be a repository's name, ORGANISATION/NAME."""
    return bool(_HUB_ID.fullmatch(name)) and ".." not in name and len(name) <= 96


def write(workdir: Path, out: Path, *, iteration: int, reward: str, lora_file: str, repository: str = "") -> None:
    """Writes README.md, and the first and the last image grid up to the iteration, beside a LoRA file.

    Args:
      workdir: the run's.
      out: the folder for them.
      iteration: after which the LoRA was taken.
      reward: the name of what was maximised, without the places of its files.
      lora_file: the file's name in the folder.
      repository: ORGANISATION/NAME on the hub, where that is known.

    Raises:
      InputError: the run's folder is damaged, or README.md is there already.
      OSError: a picture cannot be copied.
    """
    if (out / README).exists():
        raise InputError(f"{out / README}: is there already; wants a folder without one, so that nobody's text is lost")
    run = read_run(workdir)
    drawn, pictures = [frame.iteration for frame in run.frames.frames if frame.iteration <= iteration], {}
    for name, i in zip(PICTURES, (drawn[0], drawn[-1]), strict=True) if len(drawn) > 1 else ():
        out.mkdir(parents=True, exist_ok=True)
        with replaced(out / name) as partial:
            shutil.copyfile(grid_path(workdir, i), partial)
        pictures[name] = i
    write_whole(out / README, text(run, iteration, reward, lora_file, repository, pictures))


def text(
    run: RunFiles, iteration: int, reward: str, lora_file: str, repository: str, pictures: Mapping[str, int]
) -> str:
    """The card; `pictures` are {file name: the iteration that it is of}. See `write` for the rest."""
    path = str(run.settings["model.path"]).removeprefix("hub:")
    on_hub = is_hub_id(path) and not Path(path).exists()
    base = path if on_hub else Path(path).name
    title = repository.rpartition("/")[2] or f"{run.settings['algorithm']} on {reward}"
    tags = ["lora", "text-to-image", "diffusers", "diffexp", "reward-fine-tuning", run.settings["algorithm"]]
    lines = ["---", *([f"base_model: {json.dumps(base)}"] if on_hub else []), "library_name: diffusers"]
    lines += ["pipeline_tag: text-to-image", f"tags: {json.dumps(tags)}", "---", "", f"# {_plain(title)}", ""]
    lines += [
        f"A LoRA for {_plain(base)}, fine-tuned for {iteration} iterations to raise a reward ({_plain(reward)}) with "
        f"diffexp_jax: {_method(run.settings)}.",
        "",
        *_use(base if on_hub else _MISSING, repository, lora_file, run.settings),
        *_results(run.rows, iteration),
        *_pictures(pictures),
        "## Training",
        "",
        *_table(("setting", "value"), _settings(run, base, reward, iteration)),
        "",
        "## Limits and licence",
        "",
        "A reward is not what people want, only a measure of it: what it does not see may have become worse. Compare "
        "with the untuned model; a smaller scale of the LoRA moves back towards it.",
        "",
        "The licence of the base model, and of what the reward was trained on, applies. This card states none: add "
        "`license:` at the top once you know which it is.",
    ]
    return "\n".join(lines) + "\n"


def _method(settings: Mapping[str, Any]) -> str:
    """How it was trained, in a sentence."""
    name = settings["algorithm"]
    if not settings["exploration.enabled"]:
        return f"{name}, without exploration"
    w_low, t_thresh, unit, scope = (settings[f"exploration.{key}"] for key in ("w_low", "t_thresh", "unit", "scope"))
    (low, high), share = settings["exploration.weight_range"], settings["exploration.share"]
    of = settings.get("exploration.threshold_of", "timestep")
    t = {"timestep": "t", "noise_level": "1000 x noise level", "steps": "1000 x share of steps to come"}[of]
    return (
        f"{name} with DiffExp's exploration ([Chae et al. 2025]({_PAPER})): in the first "
        f"{settings['exploration.iterations']} iterations guidance is {w_low:g} while {t} > {t_thresh}, then "
        f"{settings['sampling.guidance']:g}, and a random {unit} of each {scope} is weighted by {low:g} to {high:g}"
        + (f", in {share:.0%} of the images" if share < 1 else "")
    )


def _use(base: str, repository: str, lora_file: str, settings: Mapping[str, Any]) -> list[str]:
    """A program that draws a picture by the run's evaluation: without a type diffusers takes that of each file."""
    steps, guidance = (_evaluated(settings, name) for name in ("steps", "guidance"))
    return [
        "```python",
        "import torch",
        "from diffusers import DiffusionPipeline",
        "",
        f"pipe = DiffusionPipeline.from_pretrained({json.dumps(base)}, torch_dtype=torch.float32)",
        f"pipe.load_lora_weights({json.dumps(repository or '.')}, weight_name={json.dumps(lora_file)})",
        f'pipe("a prompt", num_inference_steps={steps}, guidance_scale={guidance:g}).images[0].save("picture.png")',
        "```",
        "",
    ]


def _evaluated(settings: Mapping[str, Any], name: str) -> Any:
    """What evaluation has of the sampling's settings."""
    own = settings[f"eval.{name}"]
    return settings[f"sampling.{name}"] if own is None else own


def _results(rows: Sequence[dict[str, Any]], iteration: int) -> list[str]:
    """The evaluations before, and the last one up to the iteration."""
    results = before_and_after([row for row in rows if row["iteration"] <= iteration])
    if not results:
        return []
    cells = [(r.prompts, r.what, r.before, r.after) for r in results]
    words = f"Means over each prompt set, without exploration: before, and after {results[0].iterations} iterations."
    return ["## Results", "", words, "", *_table(("prompts", "what", "before", "after"), cells), ""]


def _pictures(pictures: Mapping[str, int]) -> list[str]:
    if not pictures:
        return []
    words = "The same prompts from the same noise, " + " and ".join(f"after {i} iterations" for i in pictures.values())
    return [
        "## Pictures",
        "",
        f"{words}.",
        "",
        *(f"![after {i} iterations]({name})" for name, i in pictures.items()),
        "",
    ]


def _settings(run: RunFiles, base: str, reward: str, iteration: int) -> list[tuple[str, str]]:
    s = run.settings
    queries = {row["iteration"]: row["reward_queries"] for row in run.rows if "reward_queries" in row}.get(iteration)
    evaluated = [f"{s['eval.steps']} steps"] if s["eval.steps"] is not None else []
    evaluated += [f"{name} {s[f'eval.{name}']:g}" for name in ("guidance", "eta") if s[f"eval.{name}"] is not None]
    prompts = file[2] if (file := _FILE.fullmatch(s["prompts"])) else s["prompts"]
    return [
        ("base model", base),
        ("method", s["algorithm"]),
        ("reward", reward),
        ("prompts", prompts),
        ("iterations", f"{iteration} of {s['iterations']}"),
        *([("reward queries", f"{queries:,}")] if queries is not None else []),
        ("images an iteration", str(s["batch.samples"])),
        ("sampling", f"{s['sampling.steps']} steps, guidance {s['sampling.guidance']:g}, eta {s['sampling.eta']:g}"),
        *([("evaluation", ", ".join(evaluated))] if evaluated else []),
        ("LoRA", f"rank {s['lora.rank']}, alpha {s['lora.alpha']:g}, {' and '.join(s['lora.targets'])}"),
        ("learning rate", f"{s['optim.lr']:g} ({s['optim.schedule']})"),
        ("seed", str(s["seed"])),
        *((f"{name} version", version) for name, version in run.about.get("versions", {}).items()),
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rows = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(_plain(cell) for cell in row)} |" for row in rows]


def _plain(words: str) -> str:
    """A text as one line of markdown, without a meaning of its own."""
    return re.sub(r"([|\\`*_<>\[\]])", r"\\\1", " ".join(str(words).split()))
