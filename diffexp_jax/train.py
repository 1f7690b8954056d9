"""Reward fine-tuning from the command line.

    python -m diffexp_jax.train --config configs/alignprop.py:model=emoji,explore=true --workdir runs/x

`run` is the table of contents of a training run; the same command continues a run that was stopped, bit for bit.
"""

from diffexp_jax import command

if __name__ == "__main__":
    command.quiet_interrupt()  # the imports take seconds

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from diffexp_jax import backend, parallel, paths, report
from diffexp_jax.algorithms import Inputs
from diffexp_jax.errors import RewardError, Stopped
from diffexp_jax.evaluator import Evaluator
from diffexp_jax.experiment import Experiment
from diffexp_jax.models.lora import LORA_FILE, save_lora
from diffexp_jax.programs import Programs, make_programs
from diffexp_jax.report.about import describe
from diffexp_jax.run import workdir as workdirs
from diffexp_jax.run.checkpoint import Checkpoints
from diffexp_jax.run.lease import Lease
from diffexp_jax.run.metrics import MetricsWriter, check_finite, score_of
from diffexp_jax.run.progress import Progress
from diffexp_jax.run.stopping import StopRequests
from diffexp_jax.sampling import Steps
from diffexp_jax.settings import Settings, as_dict, check, parsed


class Run(NamedTuple):
    """What stays the same from the first iteration to the last; arrays are on the devices."""

    settings: Settings
    workdir: Path
    experiment: Experiment
    programs: Programs
    evaluator: Evaluator  # without a LoRA
    frozen: Any
    steps: Mapping[tuple[bool, int], Steps]  # by whether it explores, and `Experiment.noise_from`; on the devices
    evaluations: Any  # `Sampler.count_evaluations`
    lease: Lease | None  # of the workdir; the first host's


def run(config: ConfigDict | Settings, workdir: Path) -> None:
    """Trains from `config`, or continues what `workdir` holds; everything it makes is in `workdir`."""
    # ------------------------------------------------------------------------------------------------------- settings
    settings = parallel.together(lambda: parsed(config))
    if settings.deterministic:
        backend.ask_for_determinism()
    parallel.together(lambda: check(settings))
    settings, changes = parallel.from_first(lambda: workdirs.plan(workdir, settings))
    if cache := settings.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(paths.local("compilation_cache=", cache)))

    # --------------------------------------------------------------------- model, rewards, prompts, compiled programs
    print(f"{settings.algorithm} on {settings.model.path}: loading the model, the rewards and the prompts")
    experiment = parallel.together(lambda: Experiment.build(settings))
    if settings.exploration.enabled:
        experiment.sampler.warn_of_no_schedule()
    lora, identity = experiment.initial_lora(), experiment.identity()
    parallel.check_same("model, reward or prompts", str(identity))
    with parallel.on_first(lambda: workdirs.claim(workdir, settings, identity, describe(experiment))) as lease:
        programs, frozen = make_programs(experiment), parallel.share(experiment.frozen)
        steps = {kind: parallel.replicate(steps) for kind, steps in experiment.all_steps().items()}
        evaluator, count = Evaluator.of_experiment(experiment, programs, frozen), experiment.sampler.count_evaluations()
        this = Run(settings, workdir, experiment, programs, evaluator, frozen, steps, count, lease)
        state = resume_and_train(this, jax.device_get(programs.algorithm.init(lora)), changes)

        # ----------------------------------------------------------------------------------------------------- report
        if parallel.is_first():
            prefix = experiment.sampler.pipeline.lora_prefix
            save_lora(workdir / LORA_FILE, parallel.first(state.tuned), alpha=settings.lora.alpha, prefix=prefix)
            print(report.finish(workdir))


def resume_and_train(run: Run, state: Any, changes: list[str]) -> Any:
    """Trains from `state`, or from the newest checkpoint; the last state, on the devices."""
    settings, log, best = run.settings, run.settings.log, run.settings.checkpoint.best
    wandb = as_dict(settings) if log.wandb else None
    with (
        StopRequests(grace=settings.stop_grace) as stop,
        Checkpoints(run.workdir, keep=settings.checkpoint.keep) as checkpoints,
        MetricsWriter(run.workdir, tensorboard=log.tensorboard, wandb=wandb) as writer,
    ):
        stop.last_resort = checkpoints.save_held
        start, state = parallel.from_first(lambda: checkpoints.restore_newest(state) or (None, state))
        writer.continue_from(start, checkpoints.rows_of(start))
        state = parallel.replicate(state)
        if start is None:
            if settings.eval.every or log.images_every:
                print("compiling, and evaluating the untuned model: a minute or more", flush=True)
            values = evaluate_and_draw(run, state.tuned, 0)
            writer.write(0, values)
            checkpoints.save(0, parallel.first(state), rows=writer.recent, score=score_of(values, best))
        else:
            print("\n  ".join([f"continuing from iteration {start}", *changes]))
        return train(run, state, start or 0, checkpoints, writer, stop)


def train(run: Run, state: Any, start: int, checkpoints: Checkpoints, writer: MetricsWriter, stop: StopRequests) -> Any:
    """The iterations from `start` on, and what is due after each; the last state.

    Raises:
      Stopped: a signal has asked for it; RewardError: a reward on the host failed. What was trained is saved.
    """
    every, end, held = run.settings.checkpoint.every, run.settings.iterations, parallel.first(state)
    print(f"an iteration: {run.experiment.batch_in_words()}")
    print("compiling: the first iteration takes longer than the others, on a large model by minutes", flush=True)
    bar = Progress(start, end)
    for it in bar:
        if it <= start + 1:
            backend.give_back_memory()  # of compiling what evaluates, then what trains
        checkpoints.hold(it, held, rows=writer.recent)
        try:
            state, values = iterate(run, state, it)
        except RewardError:
            checkpoints.save_held()
            raise
        held = parallel.first(state)  # the only copy to the host: for a checkpoint that is due, and for `hold`
        bar.show(it + 1, values)
        failed, due = None, (it + 1) % every == 0 or it + 1 == end
        try:
            values |= evaluate_and_draw(run, state.tuned, it + 1)
        except RewardError as error:
            failed = error  # the row is without its evaluation
        workdirs.check(run.lease)
        writer.write(it + 1, values)
        number, score = parallel.agree(stop.number()), score_of(values, run.settings.checkpoint.best)
        if due or number or failed or checkpoints.is_best(score):
            checkpoints.save(it + 1, held, rows=writer.recent, score=score)
        checkpoints.check()
        ended = failed or (Stopped(it + 1, number) if number and it + 1 < end else None)
        if not ended:
            workdirs.check(run.lease)
        if (due or ended) and parallel.is_first():
            report.refresh(run.workdir, at_once=ended is not None)
        if ended:
            raise ended
    return state


def iterate(run: Run, state: Any, it: int) -> tuple[Any, dict[str, Any]]:
    """One iteration: the next state and its metrics.

    Raises:
      FloatingPointError: the loss or the gradient is not finite.
    """
    clock, explore, split = time.perf_counter(), run.experiment.explores(it), run.experiment.split
    steps = run.steps[explore, run.experiment.noise_from(it)]
    batch = run.experiment.draw_batch(it, run.programs.explore if explore else None)
    sample = run.programs.sample
    samples = jax.block_until_ready(sample(state, run.frozen, batch, steps)) if sample else None
    sampled = time.perf_counter()
    key = parallel.replicate(parallel.stream(run.settings.seed, "update", it))
    state, metrics = run.programs.update(state, run.frozen, Inputs(batch, steps, key, samples))
    values: dict[str, Any] = {name: float(value) for name, value in parallel.first(metrics).items()}
    parallel.together(lambda: check_finite(it + 1, values, run.workdir))
    sampled_chains = split.samples * run.settings.method.chains
    values |= {"reward_queries": (it + 1) * split.samples, "unet_evaluations": run.evaluations(it + 1) * sampled_chains}
    return state, values | {"time/sample": sampled - clock, "time/train": time.perf_counter() - sampled}


def evaluate_and_draw(run: Run, lora: Any, iteration: int) -> dict[str, float]:
    """What is due after this many iterations: saves the image grid, and gives the means of evaluation."""
    settings, model = run.settings, run.evaluator.with_lora(lora)

    def due(every):
        return every and (iteration == settings.iterations or iteration % every == 0)

    if (n := settings.log.images) and due(settings.log.images_every):
        shown = run.experiment.train.grid(n)
        images, _ = model.evaluate(shown, seed=settings.seed, keep=range(n))
        if parallel.is_first():
            report.save_images(run.workdir, iteration, images, shown.texts)
    return model.means(run.experiment.evals, settings.eval, seed=settings.seed) if due(settings.eval.every) else {}


if __name__ == "__main__":
    from diffexp_jax.cli import train  # which imports this module by its name

    train.start()
