"""The files of a sweep's runs, without the runs."""

import json
from pathlib import Path

SET, OTHER = "train", "unseen"


def final(rewards, shares, n=2) -> dict:
    """A final.json: per-prompt rewards and shares of success, the same on both prompt sets."""
    per_prompt = {"pickscore": rewards, "emoji_judge": shares, "luminance": [0.5] * len(rewards)}
    means = {what: {"mean": sum(x) / len(x), "standard_error": 0.0} for what, x in per_prompt.items()}
    content = {"means": means, "prompts": [f"prompt {i}" for i in range(len(rewards))], "per_prompt": per_prompt}
    return {
        "samples_per_prompt": n,
        "many_per_prompt": 0,
        "machine": {"devices": "1 x a CPU", "python": "3.11", "jax": "0.10", "numpy": "2.0"},
        "plain": {SET: content, OTHER: content},
    }


def write_run(folder: Path, config, curve, last, *, until=4, shares=None, groups=False) -> None:
    """A run with these evaluated rewards; the training reward is 1, 2, 3, 4 times the second.

    Args:
      shares: evaluated shares of success (default: a tenth of the iteration).
      groups: whether there are metrics of groups: their std is 1, 2, 3, 4, their best reward twice that; the share
        of groups with a success is a tenth of the std's numbers, as the gradient's signal to noise always is.

    Iterations take 1, 2, 3, 4 seconds.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    rows = []
    for it in range(until + 1):
        row = {"iteration": it}
        if it:
            row |= {"reward_queries": 8 * it, "unet_evaluations": 64 * it, "reward/mean": it * curve[1]}
            row |= {"grad_snr": 0.1 * it}
            row |= {"reward/std_in_group": it, "reward/best_in_group": 2 * it} if groups else {}
            row |= {"reward/emoji_judge/best_in_group": 0.1 * it} if groups else {}
            row |= {"time/sample": 0.25 * it, "time/train": 0.75 * it}
        if it % 2 == 0:
            row |= {f"eval/{name}/pickscore": curve[it // 2] for name in (SET, OTHER)}
            row |= {f"eval/{name}/emoji_judge": shares[it // 2] if shares else 0.1 * it for name in (SET, OTHER)}
        rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "final.json").write_text(json.dumps(last))
