"""Says whether this machine is ready: what it has, whether it computes what it should, whether training learns on it.

    python scripts/check_machine.py --out check_machine.json     # minutes, on a CPU, a GPU or a TPU
    python scripts/check_machine.py --full                       # and SD 1.5, SDXL, SD 3.5 medium at real size

It prints a row for each check, with what to do below one that failed, and writes all of it as JSON. The exit code is 1
if any failed. Results are compared with those of a CPU in float32, which are stored in tools/machine/; they are made
again by `JAX_PLATFORMS=cpu python scripts/check_machine.py --write_reference`. Random numbers come from numpy's
RandomState, whose streams numpy has frozen (those of its newer generators it has not), and from jax.random, which is
the same on every device.
"""

import argparse
import datetime
import json
import re
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from diffexp_jax import backend, command
from diffexp_jax.errors import InputError

MACHINE = Path(__file__).parents[1] / "tools" / "machine"
sys.path.append(str(MACHINE))

import machine_checks  # noqa: E402
import machine_models as models  # noqa: E402
import machine_tiny  # noqa: E402
from machine_checks import CUDNN, Outcome  # noqa: E402

REFERENCE = MACHINE / "check_machine.npz"

# What to do about an exception: of the first pattern that its text has.
ADVICE = {
    "RESOURCE_EXHAUSTED|[Oo]ut of memory": "out of memory: lower batch.samples_per_forward or set model.remat=block; "
    "nvidia-smi says whether another program holds the device's memory",
    "(?i)cudnn": CUDNN,
    "(?i)ptxas|nvlink|cuda|nccl": "CUDA: jax[cuda13] wants NVIDIA driver 580 or newer, jax[cuda12] 525; see nvidia-smi",
    "No module named": "run it from a checkout with requirements.txt installed, configs/ beside scripts/",
}


class Check(NamedTuple):
    name: str
    run: Callable[[], Outcome]


def run_check(chosen: Check) -> dict[str, Any]:
    """The check's row. Whatever it raises is a finding too, so that the other checks still run."""
    start, error = time.perf_counter(), {}
    try:
        outcome = chosen.run()
    except Exception as raised:
        first = (str(raised).strip().splitlines() or [""])[0][:200]
        unknown = "not a known problem: report it with the JSON file, which holds the whole error"
        advice = next((what for pattern, what in ADVICE.items() if re.search(pattern, str(raised))), unknown)
        outcome, error = Outcome(f"{type(raised).__name__}: {first}", "no error", False, advice), traceback.format_exc()
        error = {"error": error}
    status = {True: "ok", False: "FAILED", None: "skipped"}[outcome.ok]
    return {"check": chosen.name, **outcome._asdict(), "status": status, "seconds": time.perf_counter() - start} | error


def table_row(name: str, found: str, wanted: str, status: str, seconds: str) -> str:
    return f"{name:42}  {found:38}  {wanted:28}  {status:7} {seconds:>7}"


def show(row: dict[str, Any]) -> None:
    line = table_row(row["check"], row["found"], row["wanted"], row["status"], f"{row['seconds']:.1f} s")
    advice = f"\n    what to do: {row['advice']}" if row["status"] == "FAILED" else ""
    tqdm.write(line + advice, file=sys.stdout)
    sys.stdout.flush()


# -------------------------------------------------------------------------------------------------------- command line


def all_checks(reference: dict[str, np.ndarray], *, full: bool) -> list[Check]:
    half = ("bfloat16", "float16") if backend.platform() == "gpu" else ("bfloat16",)
    tiny = ("float32",) if backend.platform() == "cpu" else ("float32", *half)
    checks = []

    def add(name, check, *args):
        checks.append(Check(name, partial(check, *args)))

    add("devices", machine_checks.check_devices)
    add("versions", machine_checks.check_versions)
    add("float32 products, as the package asks", machine_checks.check_full_products)
    add("float32 products, by default", machine_checks.check_default_products)
    for name, shape in machine_checks.ATTENTIONS.items():
        add(f"attention, {name}", machine_checks.check_attention, *shape)
    for name in machine_tiny.TINY:
        for dtype in tiny:
            add(
                f"tiny {name}, {dtype}",
                models.check_parity,
                partial(machine_tiny.tiny_results, name, dtype),
                reference,
                dtype,
            )
    for dtype in ("float32", *half):
        compute = partial(models.emoji_images, dtype)
        add(f"emoji model's images, {dtype}", models.check_parity, compute, reference, dtype)
        add(f"AlignProp's gradient, {dtype}", models.check_gradient, reference, dtype)
    for dtype in ("float32", "bfloat16"):
        add(f"DDPO's ratio before an update, {dtype}", models.check_ratio, dtype)
    for method, numbers in models.LEARNING.items():
        add(f"{numbers[0]} iterations of {method} raise brightness", models.check_learning, method, *numbers)
    for model in ("sd15", "sdxl", "sd35m") if full else ():
        for method in models.LEARNING:
            add(f"{model} by {method} at real size", models.check_full_size, model, method)
    return checks


def write_reference() -> None:
    if backend.platform() != "cpu":
        raise InputError("--write_reference: wants a CPU, whose float32 is the reference: JAX_PLATFORMS=cpu")
    images, gradient = models.emoji_results("float32")
    arrays = images | {"emoji/gradient": gradient}
    for name in machine_tiny.TINY:
        arrays |= machine_tiny.tiny_results(name, "float32")
    arrays = {name: np.asarray(x, np.float32) for name, x in arrays.items()}
    arrays["emoji/settings"] = np.asarray(json.dumps(models.decisive_settings(), sort_keys=True))
    np.savez_compressed(REFERENCE, **arrays)
    print(f"written: {REFERENCE}, {REFERENCE.stat().st_size / 1000:.0f} kB")


def main(args: argparse.Namespace) -> None:
    if args.write_reference:
        return write_reference()
    command.check_writable(args.out.parent, "--out")
    try:
        re.compile(args.only)
    except re.error as error:
        raise InputError(f"--only {args.only}: wants a regular expression ({error})") from None
    if not REFERENCE.is_file():
        raise InputError(f"{REFERENCE}: the file is missing; it belongs to the repository")
    start, rows = time.perf_counter(), []
    print(table_row("check", "found", "wanted", "", "seconds"), flush=True)
    with np.load(REFERENCE) as stored:
        checks = [each for each in all_checks(dict(stored), full=args.full) if re.search(args.only, each.name)]
        bar = tqdm(checks, unit="check", leave=False)
    for chosen in bar:
        bar.set_description(chosen.name)
        rows.append(run_check(chosen))
        show(rows[-1])
    if not rows:
        raise InputError(f"--only {args.only}: no check has such a name")
    failed, seconds = sum(row["status"] == "FAILED" for row in rows), time.perf_counter() - start
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    report = {"ready": not failed, "date": date, "command": " ".join(sys.argv), "seconds": seconds}
    report |= {"machine": machine_checks.machine(), "checks": rows}
    args.out.write_text(json.dumps(report, indent=2, default=float) + "\n")
    said = (
        f"not ready: {failed} of {len(rows)} checks failed" if failed else f"ready: none of {len(rows)} checks failed"
    )
    print(f"{said}; {seconds:.0f} s; all of it is in {args.out}", flush=True)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("check_machine.json"), help="the .json file to write")
    add("--full", action="store_true", help="also run SD 1.5, SDXL and SD 3.5 medium at real size, on an accelerator")
    add("--only", default="", metavar="REGEX", help="run the checks alone whose names have such a part")
    add("--write_reference", action="store_true", help="make the stored float32 results again, on a CPU")
    command.guarded(main, parser.parse_args())
