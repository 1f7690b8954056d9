"""How much of DDPO's importance ratio is signal, and how much rounding, in each precision: on the emoji model's UNet.

python tools/studies/measure_precision.py --out precision.json

An optimizer step changes the policy a little, and with it the log-probability of every sampled step. The script takes
one Adam step on half of a batch, as DDPO does, and asks of the other half: how much did log-probabilities change
(in float32), how much do they seem to change in another precision, whose gradient of the clipped objective is then
closer to float32's: that of the ratio, or that without one (`ddpo.old_log_prob="current"`)? Cosines are with float32's
gradient of the ratio; in brackets, without a ratio on both sides: what the backward pass loses.

"tf32" and "bf16_products" are float32 networks whose matrix products round their factors, as NVIDIA GPUs and TPUs
do by default: simulated, so that the table is the same on any machine. On a GPU or a TPU the rows are its own.
"""

import argparse
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from tqdm import tqdm

from diffexp_jax import command, parallel
from diffexp_jax.algorithms.ddpo import clipped_ratio_loss
from diffexp_jax.models import lora
from diffexp_jax.pipelines import encode_empty, encode_prompts, load_pipeline, make_context
from diffexp_jax.prompts import load_prompts
from diffexp_jax.sampling import initial_latents, rollout, step_log_prob

# name: (type of the networks, type that the factors of float32 products are rounded to)
PRECISIONS = {
    "float32": ("float32", None),
    "tf32": ("float32", "tf32"),
    "bf16_products": ("float32", "bf16"),
    "float16": ("float16", None),
    "bfloat16": ("bfloat16", None),
}

# -------------------------------------------------------------------------------------------------- simulated products

_MANTISSA = {"tf32": 10, "bf16": 7}  # bits


def rounded(x: jax.Array, kind: str) -> jax.Array:
    """float32 numbers rounded to a mantissa of fewer bits; others as they are."""
    if x.dtype != jnp.float32:
        return x
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=_MANTISSA[kind])


def with_rounded_products(function, kind: str):
    """`function` with the factors of its products rounded, but where it asks for full ones."""

    def run(*args):
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        out = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args), kind)
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    return run


def _evaluate(jaxpr: Jaxpr, consts, args, kind: str) -> list:
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    for eqn in jaxpr.eqns:
        inputs = [x.val if isinstance(x, Literal) else values[x] for x in eqn.invars]
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            full = eqn.params["precision"] in (jax.lax.Precision.HIGHEST, (jax.lax.Precision.HIGHEST,) * 2)
            out = eqn.primitive.bind(*(x if full else rounded(x, kind) for x in inputs), **eqn.params)
        elif (inner := _body(eqn)) is not None:
            out = _evaluate(inner.jaxpr, inner.consts, inputs, kind)
        elif eqn.primitive.name in ("scan", "while", "cond"):
            raise NotImplementedError(f"products inside {eqn.primitive.name} would not be rounded")
        else:
            out = eqn.primitive.bind(*inputs, **eqn.params)
        values |= zip(eqn.outvars, out if eqn.primitive.multiple_results else [out], strict=True)
    return [x.val if isinstance(x, Literal) else values[x] for x in jaxpr.outvars]


def _body(eqn) -> ClosedJaxpr | None:
    """The program of an equation that only calls one: of jit, checkpoint, custom gradients."""
    if eqn.primitive.name in ("scan", "while", "cond"):
        return None
    bodies = [x for x in eqn.params.values() if isinstance(x, ClosedJaxpr | Jaxpr)]
    if len(bodies) != 1:
        return None
    return bodies[0] if isinstance(bodies[0], ClosedJaxpr) else ClosedJaxpr(bodies[0], ())


# --------------------------------------------------------------------------------------------------------- measurement


def sampled(args: argparse.Namespace):
    """A batch of chains sampled by the untuned float32 model, as DDPO samples; (trajectory, prompts' context)."""
    model = load_pipeline("emoji")
    t = model.process.timesteps(args.steps)
    w_t = np.full(len(t), args.guidance, np.float32)
    steps = model.process.make_steps(t, w_t, eta=1.0)
    texts = load_prompts("animal_activities").texts
    rows = np.asarray(jax.random.randint(parallel.stream(args.seed, "prompts"), (args.samples,), 0, len(texts)))
    cond, _ = encode_prompts(model, [texts[row] for row in rows])
    context = make_context(cond, model.unconditional(encode_empty(model)))
    keys = parallel.sample_keys(parallel.stream(args.seed, "noise"), args.samples)
    params = jax.device_put({model.trainable: model.base})

    @jax.jit
    def sample(params, context, keys):
        x_T = initial_latents(keys, model.latent_shape)
        denoise = functools.partial(model.network(w_t), params, None)
        return rollout(model.process, denoise, x_T, context, steps, keys, keep_trajectory=True)[1]

    return model, sample(params, context, keys)


def make_programs(precision: str):
    """(log_prob, gradient) of one step, compiled: functions of (frozen, lora, x_t, x_tm1, step, context, ...)."""
    dtype, products = PRECISIONS[precision]
    model = load_pipeline("emoji", dtype=dtype)
    params = jax.device_put({model.trainable: model.base})

    def log_prob(params, lora, x_t, x_tm1, step, context):
        denoise = functools.partial(model.network().guided, params, lora)
        return step_log_prob(model.process, denoise, x_t, x_tm1, step, context)

    def gradient(params, lora, x_t, x_tm1, step, context, old, adv, clip):
        def loss(lora):
            new = log_prob(params, lora, x_t, x_tm1, step, context)
            return clipped_ratio_loss(new, jax.lax.stop_gradient(new) if old is None else old, adv, clip=clip)

        return jax.grad(loss)(lora)

    if products:
        log_prob, gradient = (with_rounded_products(f, products) for f in (log_prob, gradient))
    return functools.partial(jax.jit(log_prob), params), functools.partial(jax.jit(gradient), params)


def flat(tree) -> np.ndarray:
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-30))


def measure(args: argparse.Namespace) -> dict:
    model, trajectory = sampled(args)
    half = args.samples // 2
    adv = np.random.default_rng(args.seed).standard_normal(args.samples).astype(np.float32)
    start = lora.init_lora(parallel.stream(args.seed, "lora"), model.base, rank=4)
    steps = range(len(trajectory.steps.t))

    def rows(i, part):
        """The arrays of step i, of half of the samples."""
        step = jax.tree.map(lambda x: x[i], trajectory.steps)
        context = jax.tree.map(lambda x: x[part], trajectory.context)
        return trajectory.x_t(i)[part], trajectory.x_tm1[i, part], step, context

    first, second = slice(0, half), slice(half, None)
    bar = tqdm(total=len(PRECISIONS) * len(steps), desc="measuring", unit="step")
    programs = {name: make_programs(name) for name in PRECISIONS}
    log_prob, gradient = programs["float32"]
    grads = [gradient(start, *rows(i, first), None, adv[first], args.clip) for i in steps]
    optimizer = optax.adamw(args.lr, weight_decay=1e-4)
    mean = jax.tree.map(lambda *x: sum(x) / len(x), *grads)
    updates, _ = optimizer.update(mean, optimizer.init(start), start)
    moved = optax.apply_updates(start, updates)

    results: dict[str, dict] = {}
    for name, (log_prob, gradient) in programs.items():
        ratios, with_ratio, without = [], 0.0, 0.0
        for i in steps:
            old, new = (np.asarray(log_prob(x, *rows(i, second)), np.float64) for x in (start, moved))
            ratios.append(new - old)
            old = jnp.asarray(old, jnp.float32)
            with_ratio = with_ratio + flat(gradient(moved, *rows(i, second), old, adv[second], args.clip))
            without = without + flat(gradient(moved, *rows(i, second), None, adv[second], args.clip))
            bar.update()
        results[name] = {"log_ratio": np.stack(ratios), "with": with_ratio, "without": without}
    bar.close()
    return summary(results, np.asarray(trajectory.steps.t), args)


def summary(results: dict, t: np.ndarray, args: argparse.Namespace) -> dict:
    """Plain numbers: log-ratios by thirds of the steps, and the cosines of gradients with float32's."""
    true = results["float32"]
    thirds = dict(zip(("early", "middle", "late"), np.array_split(np.arange(len(t)), 3), strict=True))
    rows = {}
    for name, found in results.items():
        error = found["log_ratio"] - true["log_ratio"]
        row = {}
        for third, i in thirds.items():
            row[f"true_change_{third}"] = float(np.sqrt(np.square(true["log_ratio"][i]).mean()))
            row[f"error_{third}"] = float(np.sqrt(np.square(error[i]).mean()))
            row[f"bias_{third}"] = float(error[i].mean())
        row["bias_last_two_steps"] = float(error[-2:].mean())
        row["clipped"] = float((np.abs(np.expm1(found["log_ratio"])) > args.clip).mean())
        row["cosine_with_ratio"] = cosine(found["with"], true["with"])
        row["cosine_without_ratio"] = cosine(found["without"], true["with"])
        row["cosine_of_both_without"] = cosine(found["without"], true["without"])
        rows[name] = row
    settings = {name: getattr(args, name) for name in ("samples", "steps", "guidance", "lr", "clip", "seed")}
    return {"settings": settings | {"t": [int(x) for x in t]}, "rows": rows}


def table(rows: dict) -> str:
    lines = [
        "| networks | true change | error, early | middle | late | bias, last two steps | clipped "
        "| gradient with ratio | without |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        changes = " / ".join(f"{row[f'true_change_{third}']:.1e}" for third in ("early", "middle", "late"))
        errors = " | ".join(f"{row[f'error_{third}']:.1e}" for third in ("early", "middle", "late"))
        lines.append(
            f"| {name} | {changes} | {errors} | {row['bias_last_two_steps']:.1e} | {100 * row['clipped']:.0f} % "
            f"| {row['cosine_with_ratio']:.2f} "
            f"| {row['cosine_without_ratio']:.2f} ({row['cosine_of_both_without']:.2f}) |"
        )
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    command.check_writable(args.out.parent, "--out")
    results = measure(args)
    args.out.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results["rows"]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--samples", type=int, default=32, help="images; the step is taken on half of them, the other half is measured")
    add("--steps", type=int, default=50, help="DDIM steps")
    add("--guidance", type=float, default=5.0)
    add("--lr", type=float, default=3e-4, help="of the Adam step")
    add("--clip", type=float, default=1e-4, help="of the ratio")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("precision.json"))
    command.guarded(main, parser.parse_args())
