"""Says whether this machine is ready: its devices, the kernels they take, and whether they compute what they should.

    python scripts/check_machine.py --out check_machine.json
    python scripts/check_machine.py --full          # and an iteration of SD 1.5 and SDXL at real size, random weights

Every row is one check: what was found, what is wanted, and where it failed, what to do. Results are compared with those
of float32 on a CPU, stored beside this file (`--write_reference` makes them anew). Exit code 1 if anything failed.
"""

import argparse
import datetime
import functools
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffexp_jax import backend, command, dry_run, evaluation, parallel
from diffexp_jax.algorithms import Batch, Policy
from diffexp_jax.algorithms.alignprop import alignprop
from diffexp_jax.algorithms.ddpo import ddpo
from diffexp_jax.models import families, layers, lora, stable_diffusion
from diffexp_jax.sampling import rollout
from diffexp_jax.state import TrainState

REFERENCE = Path(__file__).with_suffix(".npz")
GIB = 2**30


class Found(NamedTuple):
    """What one check came to; `ok` None: it was not done here."""

    name: str
    found: str
    wanted: str
    ok: bool | None


class Check(NamedTuple):
    name: str
    run: Callable[[], Iterable[Found]]
    advice: str  # where it failed


def relative(ours: Any, theirs: Any) -> float:
    """Euclidean distance from theirs, over theirs' length; trees are flattened."""
    a, b = (np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(t)]) for t in (ours, theirs))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def near(name: str, ours: Any, theirs: Any, most: float) -> Found:
    """Whether the relative distance is at most `most`; a NaN is not."""
    error = relative(ours, theirs)
    return Found(name, f"{error:.1e} from the stored", f"at most {most:g}", bool(error <= most))


def half_types() -> tuple[str, ...]:
    """The 16-bit types that this device is used with: none on a CPU, whose models are float32."""
    return {"cpu": (), "tpu": ("bfloat16",)}.get(backend.platform(), ("bfloat16", "float16"))


# ---------------------------------------------------------------------------------------------------------- the machine


def machine() -> dict[str, Any]:
    device = jax.local_devices()[0]
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "platform": backend.platform(),
        "device": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cuda_capability": backend.cuda_capability(),
        "driver": device.client.platform_version.replace("\n", ", "),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "python": sys.version.split()[0],
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }


def products() -> Iterable[Found]:
    """float32 matrices, in full and by default."""
    a, b = np.random.default_rng(0).standard_normal((2, 512, 512)).astype(np.float32)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    full, default = (relative(jnp.matmul(a, b, precision=p), exact) for p in ("highest", None))
    yield Found("float32 products in full", f"{full:.1e} from float64", "at most 1e-06", full <= 1e-6)
    kind = "full" if default <= 1e-6 else "TF32 or bfloat16 passes"
    yield Found("float32 products by default", f"{default:.1e} from float64 ({kind})", "as it is", True)


ATTENTIONS = {  # where: queries, keys, heads, width of a head
    "SD 1.5, 4096 pixels": (4096, 4096, 8, 40),
    "SD 1.5, 1024 pixels": (1024, 1024, 8, 80),
    "SD 1.5, 4096 pixels to 77 tokens": (4096, 77, 8, 40),
    "SDXL, 1024 pixels": (1024, 1024, 20, 64),
    "CLIP, 257 patches": (257, 257, 16, 64),
}


def attentions() -> Iterable[Found]:
    """Which are fused here; those that are, against the plain product, with their gradients."""
    for where, (lq, lk, heads, width) in ATTENTIONS.items():
        fused = lq * lk >= layers.MIN_FUSED_LOGITS and layers.has_fused_attention(jnp.bfloat16, width)
        name = f"attention: {where}"
        if not fused:
            yield Found(name, "not fused", "as it is", None)
            continue
        rng = np.random.default_rng(0)
        q, k, v = (jnp.asarray(rng.standard_normal((1, n, heads, width)), jnp.bfloat16) for n in (lq, lk, lk))

        def both(attend, q=q, k=k, v=v):
            def loss(q, k, v):
                return jnp.sum(jnp.sin(attend(q, k, v).astype(jnp.float32)))

            return attend(q, k, v), jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)

        ours = both(functools.partial(layers.attention_of_even_length, implementation="cudnn"))
        error = max(map(relative, ours, both(jax.nn.dot_product_attention)))
        yield Found(name, f"cuDNN, {error:.1e} from the plain product", "at most 0.05", bool(error <= 0.05))


# --------------------------------------------------------------------------------------------------------------- models

UNET = {"block_out_channels": [32, 64], "layers_per_block": 1, "in_channels": 4, "out_channels": 4, "sample_size": 32}
UNET |= {"norm_num_groups": 8, "attention_head_dim": [2, 4]}
VAE = {"block_out_channels": [8, 16], "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"vocab_size": 1000, "eos_token_id": 999, "projection_dim": 16, "hidden_act": "quick_gelu"}
SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "set_alpha_to_one": False}
SCHEDULER |= {"steps_offset": 1}
CROSS, PLAIN = ["CrossAttnDownBlock2D", "DownBlock2D"], ["UpBlock2D", "CrossAttnUpBlock2D"]
PROBE = "tiny SD 1.5 of 8 x 8"  # DDPO learns brightness on it in seconds
TINY = {  # pipelines of the published topologies: class, UNet, text encoders
    "tiny SD 1.5": (
        "StableDiffusionPipeline",
        UNET | {"down_block_types": CROSS, "up_block_types": PLAIN, "cross_attention_dim": 32},
        (TEXT,),
    ),
    "tiny SDXL": (
        "StableDiffusionXLPipeline",
        UNET
        | {"down_block_types": CROSS, "up_block_types": PLAIN, "cross_attention_dim": 64, "addition_time_embed_dim": 8}
        | {"addition_embed_type": "text_time", "use_linear_projection": True, "transformer_layers_per_block": [2, 1]},
        (TEXT, TEXT | {"hidden_act": "gelu"}),
    ),
}
TINY[PROBE] = (TINY["tiny SD 1.5"][0], TINY["tiny SD 1.5"][1] | {"sample_size": 8}, (TEXT,))


def tiny(name: str, dtype: str) -> stable_diffusion.StableDiffusion:
    """A pipeline of random weights, the same on every machine (numpy's generators are)."""
    kind, unet, texts = TINY[name]
    parts = {"unet": unet, "vae": VAE, "scheduler": SCHEDULER}
    parts |= dict(zip(("text_encoder", "text_encoder_2"), texts, strict=False))
    config = families.model_config({"_class_name": kind}, parts)
    rng = np.random.default_rng(0)

    def draw(path, shape):
        if path[-1].key in ("scale", "bias"):
            return np.full(shape.shape, float(path[-1].key == "scale"), dtype)
        fan_in = int(np.prod(shape.shape[:-1])) if path[-1].key == "kernel" else 1
        return (rng.standard_normal(shape.shape, np.float32) / np.sqrt(fan_in)).astype(dtype)

    params = jax.tree_util.tree_map_with_path(draw, stable_diffusion.abstract_params(config))
    return stable_diffusion.build(config, dtype=dtype)._replace(params=params)


def context_of(model: stable_diffusion.StableDiffusion, name: str, n: int):
    """n prompts' conditioning."""
    if name == "emoji":
        texts = ["a dog riding a bike", "a cat", "an ant playing chess", "a fox washing the dishes"]
        cond, _ = evaluation.encode_prompts(model, [texts[i % 4] for i in range(n)])
        return evaluation.make_context(cond, evaluation.encode_empty(model))
    ids = np.random.default_rng(1).integers(1, 999, (len(TINY[name][2]), n + 1, 77)).astype(np.int32)
    rows = jax.device_get(jax.jit(model.encode)(model.params, ids))
    return evaluation.make_context(jax.tree.map(lambda x: x[1:], rows), jax.tree.map(lambda x: x[0], rows))


def steps_of(model: stable_diffusion.StableDiffusion, n: int, eta: float):
    t = model.process.timesteps(n)
    return model.process.make_steps(t, np.full(n, 5.0, np.float32), eta=eta)


@functools.cache
def load(name: str, dtype: str) -> stable_diffusion.StableDiffusion:
    return stable_diffusion.load("emoji", dtype=dtype) if name == "emoji" else tiny(name, dtype)


def latents(name: str, dtype: str) -> np.ndarray:
    """x_0 of a few prompts after 8 steps, without a LoRA."""
    model, n = load(name, dtype), 4 if name == "emoji" else 1
    frozen = jax.device_put({"model": {"unet": model.params["unet"]}})
    x_T = np.random.default_rng(2).standard_normal((n, *model.latent_shape)).astype(np.float32)
    steps, keys = steps_of(model, 8, 0.0), parallel.sample_keys(jax.random.key(0), n)

    @jax.jit
    def sample(frozen, x_T, context, steps, keys):
        return rollout(model.process, evaluation.denoiser(model, frozen, None), x_T, context, steps, keys)[0]

    return np.asarray(sample(frozen, x_T, context_of(model, name, n), steps, keys))


def parity(reference: dict[str, np.ndarray]) -> Iterable[Found]:
    """Sampling against the stored float32 results."""
    exact = 1e-4 if backend.platform() == "cpu" else 1e-3
    for name in ("emoji", "tiny SD 1.5", "tiny SDXL"):
        yield near(f"sampling, {name}, float32", latents(name, "float32"), reference[f"latents {name}"], exact)
    for dtype in half_types():
        yield near(f"sampling, emoji, {dtype}", latents("emoji", dtype), reference["latents emoji"], 0.1)


# ----------------------------------------------------------------------------------------------------------- algorithms

N_STEPS = 4


class Learner(NamedTuple):
    """An algorithm that is rewarded for brightness, with its learning rate in its state."""

    model: str
    algorithm: Any
    sample: Callable | None
    update: Callable
    frozen: Any
    steps: Any
    context: Any

    def state(self, rate: float) -> Any:
        state = self.algorithm.init(start_lora(self.model))
        state.opt_state.hyperparams["learning_rate"] = jnp.float32(rate)
        return parallel.replicate(state)

    def batch(self, seed: int) -> Batch:
        """Fresh noise on always the same prompts, four of them."""
        n = len(self.context.cond)
        ids, keys = np.arange(n, dtype=np.int32) % 4, parallel.sample_keys(jax.random.key(seed), n)
        return parallel.shard(Batch(ids, self.context, np.zeros((n, 0), np.int32), keys), n)

    def iterate(self, state: Any, seed: int = 0) -> tuple[Any, dict[str, Any]]:
        key, batch = parallel.replicate(jax.random.key(0)), self.batch(seed)
        samples = self.sample(state, self.frozen, batch, self.steps) if self.sample else None
        state, metrics, _ = self.update(state, self.frozen, batch, self.steps, key, samples)
        return state, parallel.first(metrics)


@functools.cache
def start_lora(name: str) -> Any:
    """A small LoRA of rank 2 whose every part has a gradient."""
    unet = load(name, "float32").params["unet"]
    shapes, rng = jax.eval_shape(lambda: lora.init_lora(jax.random.key(0), unet, rank=2)), np.random.default_rng(3)
    sizes = {"A": 0.5, "B": 0.02}
    return jax.tree_util.tree_map_with_path(
        lambda path, s: sizes[path[-1].key] * rng.standard_normal(s.shape).astype(np.float32), shapes
    )


def brightness(images):
    return images.mean((1, 2, 3))


@functools.cache
def learner(method: str, dtype: str) -> Learner:
    """AlignProp through every step of the emoji model, or DDPO on the probe."""
    name, n = ("emoji", 8) if method == "alignprop" else (PROBE, 32)
    model, n = load(name, dtype), n * jax.device_count()
    policy = Policy(
        denoise=lambda frozen, lora: evaluation.denoiser(model, frozen, lora),
        decode=lambda frozen, x_0: model.decode(frozen["model"], x_0),
        score=lambda frozen, images, tokens: (brightness(images), {}),
        latent_shape=model.latent_shape,
        process=model.process,
    )
    if method == "ddpo":
        optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=0.0)
        settings = dict(n_prompts=4, n_updates=2, n_chunks=2, inner_epochs=1, clip=1e-2, advantage_clip=5.0)
        settings |= dict(stats_buffer=32, stats_min_count=16, old_log_prob="recomputed")
        algorithm = ddpo(policy, optimizer, **settings)
    else:
        optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.0)
        settings = dict(n_chunks=1, loss_coefficient=1.0, reward_target=None, truncation="fixed", truncation_k=N_STEPS)
        algorithm = alignprop(policy, optimizer, **settings)
    frozen = parallel.replicate({"model": {part: model.params[part] for part in ("unet", "vae")}})
    steps = parallel.replicate(steps_of(model, N_STEPS, 1.0 if method == "ddpo" else 0.0))
    sample = algorithm.sample and parallel.pmap(algorithm.sample)
    return Learner(name, algorithm, sample, parallel.pmap(algorithm.update), frozen, steps, context_of(model, name, n))


RATE = 100.0  # of the step that shows the gradient: a difference of LoRAs is rounded


def alignprop_gradient(dtype: str) -> Any:
    """The reward's gradient in the LoRA, through all steps."""
    state, _ = learner("alignprop", dtype).iterate(learner("alignprop", dtype).state(RATE))
    return jax.tree.map(lambda before, after: (before - after) / RATE, start_lora("emoji"), parallel.first(state.lora))


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(leaf, np.float32)) for leaf in jax.tree.leaves(tree)])


def gradients(reference: dict[str, np.ndarray]) -> Iterable[Found]:
    """AlignProp's, against the stored one, which is of one device's samples."""
    stored = reference["alignprop gradient"]
    if jax.device_count() > 1:
        yield Found("AlignProp's gradient", "stored for one device", "one device", None)
        return
    found = flat(alignprop_gradient("float32"))
    yield near("AlignProp's gradient, float32", found, stored, 1e-3 if backend.platform() == "cpu" else 1e-2)
    for dtype in half_types():
        found = flat(alignprop_gradient(dtype)).astype(np.float64)
        cosine = float(found @ stored / (np.linalg.norm(found) * np.linalg.norm(stored)))
        yield Found(f"AlignProp's gradient, {dtype}", f"cosine {cosine:.4f}", "at least 0.95", bool(cosine >= 0.95))


def ratios() -> Iterable[Found]:
    """DDPO's ratio over two updates that change nothing."""
    for dtype in ("float32", *half_types()[:1]):
        ddpo_learner = learner("ddpo", dtype)
        _, metrics = ddpo_learner.iterate(ddpo_learner.state(0.0))
        largest = float(metrics["ratio/max_abs_log"])
        yield Found(f"DDPO's log-ratio before an update, {dtype}", f"{largest:g}", "0", largest == 0.0)


def learning() -> Iterable[Found]:
    """Brightness as the reward: some iterations must raise it, on the same prompts and noise before and after."""
    for method, rate, count, wanted in (("ddpo", 5e-3, 20, 0.003), ("alignprop", 5.0, 5, 0.01)):
        one = learner(method, "float32")
        state, (_, before) = one.state(rate), one.iterate(one.state(rate))
        for i in range(count):
            state, _ = one.iterate(state, seed=1 + i)
        _, after = one.iterate(state)
        first, last = (float(metrics["reward/mean"]) for metrics in (before, after))
        name = f"{method} raises brightness in {count} iterations"
        yield Found(name, f"{first:.4f} -> {last:.4f}", f"+ {wanted}", last >= first + wanted)


# ------------------------------------------------------------------------------------------------------------ full size


def full_size() -> Iterable[Found]:
    """An iteration of the published models at their own size, of random weights."""
    if backend.platform() == "cpu":
        yield Found("full size", "a CPU", "a GPU or a TPU", None)
        return
    sys.path.append(str(Path(__file__).parents[1]))
    from configs import alignprop as alignprop_config
    from configs import ddpo as ddpo_config

    for family in ("sd15", "sdxl"):
        for method, module in (("ddpo", ddpo_config), ("alignprop", alignprop_config)):
            config = module.get_config(f"model={family}")
            config.batch.samples = 4 * jax.device_count()
            config.reward, config.eval.every = "jax:check_machine:brightness", 0
            yield from timed_programs(f"{family}, {method}", config)


def timed_programs(name: str, config: Any) -> Iterable[Found]:
    """Seconds and memory of each of a run's programs, compiled and called on random numbers."""
    problem, samples = dry_run.abstract_problem(config), None
    for program in dry_run.programs_of(config, problem):
        start = time.perf_counter()
        compiled = program.function.lower(*program.args).compile()
        memory, compiling = compiled.memory_analysis(), time.perf_counter() - start
        planned = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
        seconds = []
        for _ in range(2):
            args = jax.block_until_ready(filled(program.args))
            if isinstance(args[0], TrainState):  # Adam's mean of squares is never negative
                nothing = jax.tree.map(jnp.zeros_like, args[0].opt_state)
                args = (args[0].replace(opt_state=nothing), *args[1:])
            if program.name == "update":
                args = (*args[:-1], samples)
            start = time.perf_counter()
            out = jax.block_until_ready(program.function(*args))
            seconds.append(time.perf_counter() - start)
        samples = out if program.name == "sample" else None
        floats = [x for x in jax.tree.leaves(out) if jnp.issubdtype(x.dtype, jnp.floating)]
        finite = all(bool(jnp.isfinite(x).all()) for x in floats)
        stats = jax.local_devices()[0].memory_stats() or {}
        planned = (planned - memory.alias_size_in_bytes) / GIB
        peak = f", peak so far {stats['peak_bytes_in_use'] / GIB:.2f} GiB" if "peak_bytes_in_use" in stats else ""
        found = f"{seconds[-1]:.1f} s (compiled in {compiling:.0f} s), {planned:.2f} GiB by XLA's analysis"
        yield Found(f"{name}: {program.name}", found + peak, "finite numbers", finite)


def filled(args: Any) -> Any:
    """Random small numbers on the devices in the place of shapes; arrays as they are."""
    key = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(args))))

    def fill(leaf):
        own = next(key)
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        return 0.02 * jax.random.normal(own, leaf.shape, leaf.dtype)

    return jax.tree.map(fill, args)


# --------------------------------------------------------------------------------------------------------------- report


def checks(reference: dict[str, np.ndarray], full: bool) -> list[Check]:
    precision = "float32 is not float32 here: set model.matmul_precision=float32, and report the versions above"
    listed = [
        Check("products", products, precision),
        Check("attention", attentions, "cuDNN's attention is wrong here: update jax's CUDA plugin and cuDNN"),
        Check("parity", lambda: parity(reference), precision),
        Check(
            "ratio", ratios, "DDPO would learn from rounding here: take ddpo.updates=1, or ddpo.old_log_prob=current"
        ),
        Check("gradient", lambda: gradients(reference), "try model.dtype=float32; if that is right, 16 bits are not"),
        Check("learning", learning, "training does not learn here: look at the rows above first"),
    ]
    memory = "if memory ran out: smaller batch.samples_per_forward, model.remat=block, model.vae_slice=1"
    return [*listed, Check("full size", full_size, memory)] if full else listed


def run_all(listed: list[Check]) -> list[dict[str, Any]]:
    """Runs the checks, prints a row for each result as it comes, and returns the rows. An exception is a failed row."""
    rows = []
    for check in listed:
        start = time.perf_counter()
        try:
            for found in check.run():
                rows.append(found._asdict() | {"seconds": round(time.perf_counter() - start, 1)})
                print_row(rows[-1], check.advice)
                start = time.perf_counter()
        except Exception as error:  # whatever a device does wrong, the other checks still tell something
            said = (f"{error}".strip().splitlines() or [""])[0][:160]
            found = Found(check.name, f"{type(error).__name__}: {said}", "no error", False)
            rows.append(found._asdict() | {"seconds": round(time.perf_counter() - start, 1)})
            print_row(rows[-1], check.advice)
    return rows


def print_row(row: dict[str, Any], advice: str) -> None:
    verdict = {True: "ok", False: "FAILED", None: "-"}[row["ok"]]
    print(f"{verdict:7}{row['name']:52}{row['found']}  (wanted: {row['wanted']}; {row['seconds']} s)", flush=True)
    if row["ok"] is False:
        print(f"       -> {advice}", flush=True)


def write_reference() -> None:
    stored = {f"latents {name}": latents(name, "float32") for name in ("emoji", "tiny SD 1.5", "tiny SDXL")}
    stored["alignprop gradient"] = flat(alignprop_gradient("float32"))
    np.savez_compressed(REFERENCE, **stored)
    print(f"written: {REFERENCE}")


def main(args: argparse.Namespace) -> None:
    if args.write_reference:
        write_reference()
        return
    if args.out:
        command.check_writable(args.out.parent, "--out")
    here = machine()
    print("\n".join(f"{key:16}{value}" for key, value in here.items()), flush=True)
    with np.load(REFERENCE) as stored:
        reference = dict(stored)
    rows = run_all(checks(reference, args.full))
    if args.out:
        args.out.write_text(json.dumps({"machine": here, "checks": rows}, indent=2) + "\n")
    failed = sum(row["ok"] is False for row in rows)
    print(f"{failed} of {len(rows)} checks failed" if failed else f"ready: {len(rows)} checks, none failed")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--full", action="store_true", help="also an iteration of SD 1.5 and SDXL at real size (GPU or TPU)")
    add("--out", type=Path, help="also write the results to this .json file")
    add("--write_reference", action="store_true", help="store this machine's float32 results: on a CPU, by developers")
    command.guarded(main, parser.parse_args())
