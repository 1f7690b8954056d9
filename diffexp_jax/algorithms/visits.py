"""In which order an iteration's updates visit its minibatches, and what is done there.

One loop makes all visits, so all log-probs come of the same machine code: XLA fuses two programs differently, and on an
accelerator that alone moves log-probs by more than the clip. A visit that does not learn skips the backward pass.

Of two updates, "sampled" and "current":     "recomputed":                    "recomputed", with `weigh`:

    minibatch  learns  notes old             minibatch  learns  notes old     minibatch  learns  notes old
        0       yes       no                     1        no       yes            1        no       yes
        1       yes       no                     0       yes       yes            0       yes       yes
                                                 1       yes       no             1        no       no
                                                                                  1       yes       no

"recomputed": the first minibatch finds its old log-probs in its own first update, before which nothing has moved; the
others are visited once before it. So each of them costs a forward pass more. With `weigh` each update but the first
costs one more, which finds the log-probs of all steps and samples that it weighs by; the first one's are of sampling.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Int


class Visit(NamedTuple):
    """A row of the schedule, or all of it as columns [V]."""

    minibatch: Int[Array | np.ndarray, "*V"]  # which one
    learns: Bool[Array | np.ndarray, "*V"]  # takes an optimizer step; else it finds log-probs alone
    notes_old: Bool[Array | np.ndarray, "*V"]  # its log-probs are the old ones: the LoRA is the one that sampled


def schedule(n_updates: int, epochs: int, *, recomputes: bool, weighs: bool) -> Visit:
    """The visits of an iteration in which each of `n_updates` minibatches is learnt from `epochs` times."""
    rows = [(i, False, True) for i in range(1, n_updates)] if recomputes else []
    for update in range(n_updates * epochs):
        i, notes_old = update % n_updates, recomputes and update == 0
        rows += [(i, False, False)] if weighs and update else []
        rows += [(i, True, notes_old)]
    minibatch, *flags = zip(*rows, strict=True)
    return Visit(np.array(minibatch, np.int32), *(np.array(flag, bool) for flag in flags))
