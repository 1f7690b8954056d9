"""Counts the floating-point operations of a program in its trace.

XLA's own count takes the body of a loop once, whatever the loop's length; and sampling is a loop in a loop.
"""

import math
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters import partial_eval


def of(function: Any, *args: Any) -> float:
    """Operations of function(*args): matrix products and convolutions, a multiply-add is two.

    What nobody reads is not counted: a compiler leaves it out, as it does the gradients of weights that are frozen.

    Args may be shapes. Loops count by their length (a `while` once: its length is not known), of branches the dearest
    counts; what is mapped over devices counts for one of them.
    """
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    return _count(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def _count(jaxpr: Jaxpr) -> float:
    return sum(_operations(eqn) for eqn in jaxpr.eqns)


def _operations(eqn: Any) -> float:
    name, shapes = eqn.primitive.name, [getattr(var.aval, "shape", ()) for var in eqn.invars]
    if name == "dot_general":
        contracted = math.prod(shapes[0][axis] for axis in eqn.params["dimension_numbers"][0][0])
        return 2 * math.prod(eqn.outvars[0].aval.shape) * contracted
    if name == "conv_general_dilated":
        features = shapes[1][eqn.params["dimension_numbers"].rhs_spec[0]]
        return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shapes[1]) / features
    if name.startswith(("dot_product_attention_fwd", "dot_product_attention_bwd")):  # cuDNN's fused attention
        logits = math.prod(shapes[0]) * shapes[1][1]  # [B, Lq, heads, d] x Lk
        return (4 if "_fwd" in name else 10) * logits  # two products, and five
    if name == "cond":
        return max(_count(branch.jaxpr) for branch in eqn.params["branches"])
    inner = [_count(body) for value in eqn.params.values() for body in _bodies(value)]
    return eqn.params.get("length", 1) * sum(inner) if name == "scan" else sum(inner)


def _bodies(value: Any) -> list[Jaxpr]:
    """The programs in an equation's parameter."""
    if isinstance(value, ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, Jaxpr):
        return [value]
    return [body for item in value for body in _bodies(item)] if isinstance(value, tuple | list) else []
