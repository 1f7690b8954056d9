"""Reward fine-tuning from the command line.

    python -m diffexp_jax.train --config configs/alignprop.py:model=emoji,explore=true --workdir runs/x

`run` is the table of contents of a training run; the same command continues a run that was stopped, bit for bit.
"""

import re
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from diffexp_jax import (
    InputError,
    RewardError,
    backend,
    check,
    checkpoint,
    command,
    evaluation,
    exploration,
    parallel,
    report,
)
from diffexp_jax.dry_run import dry_run
from diffexp_jax.metrics import MetricsWriter, read_metrics
from diffexp_jax.models import lora as lora_lib
from diffexp_jax.problem import (
    Problem,
    draw_batch,
    frozen_arrays,
    load_problem,
    make_explore,
    sampling_steps,
)
from diffexp_jax.programs import make_programs, make_scorers


def run(config: ConfigDict, workdir: Path) -> None:
    """Trains from `config`, or continues what `workdir` holds; everything it makes is in `workdir`."""
    # ------------------------------------------------------------------------------------------------------- settings
    if config.deterministic:
        backend.ask_for_determinism()
    check.check_config(config)
    checkpoint.check_workdir(workdir, config.to_dict())
    if config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(Path(config.compilation_cache).expanduser()))

    # ------------------------------------------------------------------------------------ model, rewards, and prompts
    problem = load_problem(config)
    frozen = frozen_arrays(problem)
    plain_steps, explored_steps = (sampling_steps(config, problem.model.process, explore=on) for on in (False, True))
    check.check_noise(config, plain_steps)

    # ------------------------------------------------------------------------------------------------------- programs
    algorithm, sample, update, generate = make_programs(config, problem)
    scorers, explore = make_scorers(config, problem, frozen), make_explore(config)

    # -------------------------------------------------------------------------------------------------- state, resume
    key = parallel.stream(config.seed, "lora")
    lora = lora_lib.initial_lora(
        key, problem.model.params["unet"], rank=config.lora.rank, alpha=config.lora.alpha, path=config.lora.path
    )
    state = jax.device_get(algorithm.init(lora))
    checkpoint.open_workdir(workdir, config.to_dict())
    checkpoints = checkpoint.Checkpoints(workdir, keep=config.checkpoint.keep)
    restored = checkpoints.restore_newest(state)
    start, state = restored or (0, state)
    if restored:
        print(f"continuing from iteration {start}")
    state = parallel.replicate(state)
    writer = MetricsWriter(workdir, start=start if restored else -1, tensorboard=config.log.tensorboard)

    def look(iteration: int, values: dict[str, Any]) -> dict[str, Any]:
        """Adds what is due at this iteration: evaluations, image grid."""
        last = iteration == config.iterations
        lora = state.lora
        if config.log.images and config.log.images_every and (last or iteration % config.log.images_every == 0):
            images, captions = fixed_samples(config, problem, generate, frozen, lora, plain_steps)
            report.save_grid(workdir / "images" / f"{iteration:06d}.png", images, captions)
        if config.eval.every and (last or iteration % config.eval.every == 0):
            values |= evaluate_all(config, problem, generate, scorers, frozen, lora, plain_steps)
        return values

    # ----------------------------------------------------------------------------------------------------------- loop
    if not restored:
        writer.write(0, look(0, {}))
        checkpoints.save(0, parallel.first(state))
    n_steps, n_samples, seconds = config.sampling.steps, config.batch.samples, []
    bar = tqdm(range(start, config.iterations), initial=start, total=config.iterations, unit="it", desc="fine-tuning")
    try:
        for it in bar:
            clock = time.perf_counter()
            active = config.exploration.enabled and exploration.exploration_active(
                it, n_iterations=config.iterations, fraction=config.exploration.fraction
            )
            steps = explored_steps if active else plain_steps
            batch = draw_batch(config, problem, it, explore if active else None)
            samples = jax.block_until_ready(sample(state, frozen, batch, steps)) if sample else None
            sampled = time.perf_counter()
            key = parallel.replicate(parallel.stream(config.seed, "update", it))
            state, metrics, _ = update(state, frozen, batch, steps, key, samples)
            values = {name: float(value) for name, value in parallel.first(metrics).items()}
            if not (np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"])):
                raise FloatingPointError(
                    f"iteration {it + 1}: loss {values['loss']}, gradient norm {values['grad_norm']}: stopped; "
                    f"the last checkpoint is untouched in {workdir / 'checkpoints'}"
                )
            values |= {"reward_queries": (it + 1) * n_samples, "unet_evaluations": (it + 1) * n_samples * n_steps * 2}
            values |= {"time/sample": sampled - clock, "time/train": time.perf_counter() - sampled}
            bar.set_postfix_str(f"reward {values['reward/mean']:.3f}")
            seconds.append(values["time/sample"] + values["time/train"])
            if len(seconds) == 5 and it + 1 < config.iterations:
                tqdm.write(expected_time(seconds[1:], config.iterations - it - 1))  # the first compiled
            try:
                values = look(it + 1, values)
            finally:  # without its evaluation if that failed
                writer.write(it + 1, values)
            if (it + 1) % config.checkpoint.every == 0 or it + 1 == config.iterations:
                checkpoints.save(it + 1, parallel.first(state))
                report.save_curves(workdir)
    except RewardError:
        checkpoints.save(int(parallel.first(state.iteration)), parallel.first(state))
        raise
    finally:
        checkpoints.close()

    # --------------------------------------------------------------------------------------------------------- report
    lora_lib.save_lora(
        workdir / "pytorch_lora_weights.safetensors", parallel.first(state.lora), alpha=config.lora.alpha
    )
    report.save_curves(workdir)
    lines = report.summary(read_metrics(workdir))
    report.save_html(workdir, f"{config.algorithm} on {config.reward}", lines)
    print("\n".join([*lines, f"look at {workdir / 'report.html'}, {workdir / 'images'}, {workdir / 'curves.png'}"]))


# ------------------------------------------------------------------------------------------------------------ parts


def evaluate_all(config: ConfigDict, problem: Problem, generate, scorers, frozen, lora, steps) -> dict[str, float]:
    """Mean of every reward and part over every evaluation prompt set, without exploration."""
    values = {}
    for task in problem.evals:
        _, scores = evaluation.evaluate(
            generate,
            scorers,
            frozen,
            lora,
            task,
            problem.uncond,
            steps,
            seed=config.seed,
            batch=config.batch.samples,
            samples_per_prompt=config.eval.samples_per_prompt,
        )
        values |= {f"eval/{task.name}/{name}": float(score.mean()) for name, score in scores.items()}
    return values


def expected_time(seconds: list[float], iterations: int) -> str:
    """What the first iterations say of the rest."""
    each = float(np.mean(seconds))
    return (
        f"iterations take about {each:.1f} s on this machine: about {iterations * each / 60:.1f} minutes more for the "
        f"{iterations} that are left, besides evaluations"
    )


def fixed_samples(config: ConfigDict, problem: Problem, generate, frozen, lora, steps):
    """Images of evenly spaced training prompts, of a few several each, on fixed seeds; and their prompts."""
    rows = np.linspace(0, len(problem.train.texts) - 1, config.log.images).round().astype(int)
    texts = tuple(problem.train.texts[i] for i in rows)
    task = evaluation.Task("grid", texts, jax.tree.map(lambda x: x[rows], problem.train.cond), {})
    images, _ = evaluation.evaluate(
        generate, {}, frozen, lora, task, problem.uncond, steps, seed=config.seed, batch=config.batch.samples
    )
    return images, texts


# -------------------------------------------------------------------------------------------------------- command line

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for everything that the run makes.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Compile the run's programs without weights, print their size, exit.")
_CONFIG = config_flags.DEFINE_config_file("config", None, "configs/NAME.py:key=value,...", lock_config=True)


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise InputError(f"unexpected argument {argv[1]!r}; settings are given as --config.KEY=VALUE")
    if _CONFIG.value is None or (_WORKDIR.value is None and not _DRY_RUN.value):
        raise InputError("wants --config configs/NAME.py:... and --workdir DIR (or --dry_run)")
    if _DRY_RUN.value:
        dry_run(_CONFIG.value)
    else:
        run(_CONFIG.value, Path(_WORKDIR.value))


def parse_flags(argv: list[str]) -> list[str]:
    """absl's flag parsing, with a mistake in a config reported in one line."""
    try:
        rest = flags.FLAGS(argv)
        getattr(_CONFIG.value, "algorithm", None)  # a config file that is missing is an error only once it is used
        return rest
    except Exception as error:
        while "Error whilst parsing config file" in str(error):  # a traceback around what get_config said
            error = error.__context__
        if isinstance(error, KeyError | AttributeError):
            found = re.search(r'Did you mean "(.+?)" instead of "(.+?)"', str(error))
            said = f"no such key {found[2]!r}; did you mean {found[1]!r}?" if found else error
            error = InputError(f"config: {said}")
        if isinstance(error, OSError):  # a line for each place where the file was looked for
            error = InputError(f"config: {str(error).splitlines()[-1].strip()}")
        command.fail(2, error)


if __name__ == "__main__":
    app.run(lambda argv: command.guarded(main, argv), flags_parser=parse_flags)
