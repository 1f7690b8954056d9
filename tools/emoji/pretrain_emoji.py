"""Makes every weight of the emoji world from nothing, with this package's own networks.

    python tools/emoji/pretrain_emoji.py --workdir runs/pretrain \\
        --stages vae,diffusion,diffusion_hard,flow,flow_hard,clip,aesthetic,judge

Stages run in the order given; each needs the ones before it. A stage that was stopped continues from its newest
checkpoint in the workdir, bit for bit. Finished networks are exported in the published formats (float16 safetensors)
to --out, by default the folder inside the package, and `log.jsonl` in the workdir keeps the loss curves.

Every device gets a batch of its own. On a CPU two virtual devices are a fifth faster than one with two threads:
XLA_FLAGS=--xla_force_host_platform_device_count=2 and half the batch (--batch).
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from tqdm import tqdm

from diffexp_jax import command, parallel
from diffexp_jax.emoji import flow_stages, pretraining, reward_stages
from diffexp_jax.errors import InputError

STAGES = pretraining.STAGES | flow_stages.STAGES | reward_stages.STAGES


def train(stage: pretraining.Stage, workdir: Path, *, seed: int, steps: int, save_every: int):
    """Runs (or continues) one stage; returns the averaged parameters."""
    horizon = max(steps, stage.horizon or steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            optax.warmup_cosine_decay_schedule(0.0, stage.learning_rate, min(300, steps // 5), horizon, end_value=1e-6),
            b2=0.99,
            weight_decay=stage.weight_decay,
        ),
    )

    def init(key):
        params = stage.init(key)
        return {"params": params, "ema": params, "opt": optimizer.init(params), "step": jnp.zeros((), jnp.int32)}

    def update(state, data):
        key = jax.random.fold_in(jax.random.key(seed + 1), state["step"])
        if jax.device_count() > 1:
            key = jax.random.fold_in(key, jax.lax.axis_index(parallel.AXIS))
        grad_fn = jax.value_and_grad(stage.loss, has_aux=True)
        (loss, metrics), grads = grad_fn(state["params"], data, key)
        loss, metrics, grads = jax.lax.pmean((loss, metrics, grads), parallel.AXIS)
        updates, opt = optimizer.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        decay = jnp.minimum(stage.ema, (1.0 + state["step"]) / (10.0 + state["step"]))
        ema = optax.incremental_update(params, state["ema"], 1.0 - decay)
        state = {"params": params, "ema": ema, "opt": opt, "step": state["step"] + 1}
        return state, {"loss": loss, **metrics}

    state = jax.jit(init)(jax.random.key(seed))
    options = ocp.CheckpointManagerOptions(max_to_keep=1)
    with ocp.CheckpointManager((workdir / stage.name).absolute(), options=options) as manager:
        if manager.latest_step() is not None:
            state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state))
        first, start = int(state["step"]), time.time()
        update = parallel.pmap(update, donate_argnums=0)
        state, data = parallel.replicate((state, stage.data))
        for step in (bar := tqdm(range(first, steps), desc=stage.name, unit="step", mininterval=2)):
            state, metrics = update(state, data)
            if (step + 1) % 50 == 0 or step + 1 == steps:
                row = {k: round(float(v), 6) for k, v in parallel.first(metrics).items()}
                row = {"stage": stage.name, "step": step + 1} | row
                if not math.isfinite(row["loss"]):
                    raise SystemExit(f"{stage.name}: the loss is not finite at step {step + 1}")
                bar.set_postfix(loss=row["loss"])
                with open(workdir / "log.jsonl", "a") as log:
                    log.write(json.dumps(row | {"seconds": round(time.time() - start)}) + "\n")
            if (step + 1) % save_every == 0 or step + 1 == steps:
                manager.save(step + 1, args=ocp.args.StandardSave(parallel.first(state)))
    return parallel.first(state["ema"])


def main(args: argparse.Namespace) -> None:
    names = args.stages.split(",")
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        raise InputError(f"--stages: unknown {', '.join(unknown)}; accepted: {', '.join(STAGES)}")
    args.workdir.mkdir(parents=True, exist_ok=True)
    for name in names:
        batch = {"batch": args.batch} if args.batch else {}
        stage = STAGES[name](args.out, from_shipped=args.from_shipped, **batch)
        steps = args.steps or stage.steps
        params = train(stage, args.workdir, seed=args.seed, steps=steps, save_every=args.save_every)
        stage.export(params, args.out)
        tqdm.write(f"{name}: exported to {args.out}")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--stages",
        default="vae,diffusion,diffusion_hard,flow,flow_hard,clip,aesthetic,judge",
        help="in order; vae_decoder, diffusion_hard and flow_hard continue from finished ones",
    )
    add("--workdir", type=Path, default=Path("runs/pretrain_emoji"), help="where checkpoints and the log go")
    add("--out", type=Path, default=pretraining.ASSETS, help="where the finished weights go")
    add("--steps", type=int, help="optimizer steps of each stage (default: the stage's own)")
    add("--batch", type=int, help="samples a step and a device (default: the stage's own)")
    add("--from_shipped", action="store_true", help="start from the exported weights instead of from nothing")
    add("--seed", type=int, default=0, help="of weights and data")
    add("--save_every", type=int, default=500, help="optimizer steps between checkpoints")
    return parser.parse_args(argv)


if __name__ == "__main__":
    command.guarded(main, parse())
