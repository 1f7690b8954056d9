"""Counts the floating-point operations of a program in its trace.

XLA's own count takes the body of a loop once, whatever the loop's length; and sampling is a loop in a loop.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.interpreters import partial_eval


def of(function: Any, *args: Any) -> float:
    """Operations of function(*args): matrix products and convolutions, a multiply-add is two.

    What nobody reads is not counted: a compiler leaves it out, as it does the gradients of weights that are frozen.
    What is the same in every turn of a loop counts once: XLA takes it out, so prompts' keys and values in sampling.

    Args may be shapes. Loops count by their length (a `while` once: its length is not known), of branches the dearest
    counts; what is mapped over devices counts for one of them.
    """
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    return sum(_count(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0], []))


def _count(jaxpr: Jaxpr, fixed: Sequence[bool]) -> tuple[float, float]:
    """(operations on fixed values alone, all others), where the first inputs may be `fixed`: the same in every turn."""
    known = {var for var, is_fixed in zip(jaxpr.invars, fixed, strict=False) if is_fixed}
    once, others = 0.0, 0.0
    for eqn in jaxpr.eqns:
        inputs = [isinstance(var, Literal) or var in known for var in eqn.invars]
        if all(inputs):
            known.update(eqn.outvars)
            once += sum(_operations(eqn, inputs))
        else:
            more_once, more = _operations(eqn, inputs)
            once, others = once + more_once, others + more
    return once, others


def _operations(eqn: Any, fixed: Sequence[bool]) -> tuple[float, float]:
    """Counts as `_count` does, for an equation whose inputs are `fixed` or not."""
    name, shapes = eqn.primitive.name, [getattr(var.aval, "shape", ()) for var in eqn.invars]
    if name == "dot_general":
        contracted = math.prod(shapes[0][axis] for axis in eqn.params["dimension_numbers"][0][0])
        return 0.0, 2 * math.prod(eqn.outvars[0].aval.shape) * contracted
    if name == "conv_general_dilated":
        features = shapes[1][eqn.params["dimension_numbers"].rhs_spec[0]]
        return 0.0, 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shapes[1]) / features
    if name.startswith(("dot_product_attention_fwd", "dot_product_attention_bwd")):  # cuDNN's fused attention
        logits = math.prod(shapes[0]) * shapes[1][1]  # [B, Lq, heads, d] x Lk
        return 0.0, (4 if "_fwd" in name else 10) * logits  # two products, and five
    if name == "cond":  # nothing is taken out of a branch, which may not be run
        return 0.0, max(sum(_count(branch.jaxpr, [])) for branch in eqn.params["branches"])
    bodies = [body for value in eqn.params.values() for body in _bodies(value)]
    if name == "pallas_call":  # a kernel, of each block
        return 0.0, math.prod(eqn.params["grid_mapping"].grid) * sum(map(sum, (_count(body, []) for body in bodies)))
    if name == "scan":
        consts = _same_in_every_turn(eqn, bodies[0])
        outside, _ = _count(bodies[0], fixed[:consts])
        inside, others = _count(bodies[0], [True] * consts)
        return outside, inside - outside + eqn.params["length"] * others
    of_bodies = [_count(body, fixed if len(body.invars) == len(fixed) else []) for body in bodies]
    return sum(once for once, _ in of_bodies), sum(others for _, others in of_bodies)


def _same_in_every_turn(scan: Any, body: Jaxpr) -> int:
    """How many of a scan's inputs are: the first, before what it carries and the rows that it goes through.

    Told by shapes, since the names of a scan's parameters differ between versions of jax.
    """
    rows_in, rows_out = (
        sum(var.aval.ndim > turn.aval.ndim for var, turn in zip(whole, of_turn, strict=True))
        for whole, of_turn in ((scan.invars, body.invars), (scan.outvars, body.outvars))
    )
    carried = len(scan.outvars) - rows_out
    return len(scan.invars) - rows_in - carried


def _bodies(value: Any) -> list[Jaxpr]:
    """The programs in an equation's parameter."""
    if isinstance(value, ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, Jaxpr):
        return [value]
    return [body for item in value for body in _bodies(item)] if isinstance(value, tuple | list) else []
