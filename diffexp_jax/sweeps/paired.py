"""The tables of an experiment of several methods, each with variants, as without and with DiffExp."""

from collections.abc import Mapping, Sequence
from typing import Any

from diffexp_jax.report import Table
from diffexp_jax.sweeps.cells import OF_GRADIENT, WITH_SUCCESS, WITHIN_GROUPS, bin_name, cell, telling_reward

_LABELS = {"diffexp": "with DiffExp"}


def methods_of(results: Mapping[str, Any]) -> list[str]:
    """The arms that others are compared with, of which there are runs."""
    return [arm for arm in results["arms"] if arm in results["pairs"].values()]


def variants_of(results: Mapping[str, Any]) -> list[str]:
    """What the names of the other arms add to those of the methods, in order."""
    return list(dict.fromkeys(arm.removeprefix(f"{method}_") for arm, method in results["pairs"].items()))


def sides_of(results: Mapping[str, Any], method: str) -> list[str]:
    """The method's arm and those of its variants, whether or not they have run."""
    return [method, *(f"{method}_{variant}" for variant in variants_of(results))]


def labels_of(results: Mapping[str, Any]) -> list[str]:
    """What the columns of `sides_of` are called."""
    variants = variants_of(results)
    first = "without" if variants == ["diffexp"] else "as configured"
    return [first, *(_LABELS.get(variant, variant) for variant in variants)]


def prompt_sets(results: Mapping[str, Any]) -> Sequence[str]:
    return results["prompts"], *results["unseen"]


def final(results: Mapping[str, Any], arm: str, prompts: str, what: str) -> Sequence[float | None] | None:
    """The estimate of an arm's final models; None where there is none."""
    content = results["arms"].get(arm)
    return content and content["summary"]["final"].get(prompts, {}).get(what)


# -------------------------------------------------------------------------------------------------------------- tables


def paired_tables(results: Mapping[str, Any]) -> dict[str, Table]:
    """{caption: table}: what tells most of each set of prompts, what it cost, and where exploration helps."""
    what = telling_reward(results)
    found = {f"{what}, {prompts}": success_table(results, prompts, what) for prompts in prompt_sets(results)}
    found |= {
        "Diversity of the images of a prompt": diversity_table(results),
        "Cost of a run": cost_table(results),
        "Rewards of a prompt's images in training, while it explores": training_table(results, WITHIN_GROUPS),
        "Groups of a prompt's images that have a success, while it explores": training_table(results, WITH_SUCCESS),
        "How far the newest gradients agree, while it explores": training_table(results, OF_GRADIENT),
    }
    pooled = "Gain of DiffExp, pooled over the methods, by how often the base model succeeds"
    return found | ({pooled: pooled_table(results)} if variants_of(results) == ["diffexp"] else {})


def success_table(results: Mapping[str, Any], prompts: str, what: str) -> Table:
    """A row for each method, and one for the model before fine-tuning.

    Where there is one variant also the difference, and in how many of the seeds that both have it is above 0.
    """
    base, labels = results["base"].get(prompts, {}).get(what), labels_of(results)
    compares = len(labels) == 2
    empty = [""] * (len(labels) - 1 + 2 * compares)
    rows = [] if base is None else [["before", "-", cell([base, None, None], what), *empty]]
    for method in methods_of(results):
        sides = sides_of(results, method)
        summaries = [results["arms"][arm]["summary"] for arm in sides if arm in results["arms"]]
        cells = [cell(final(results, arm, prompts, what), what) for arm in sides]
        if compares:
            of_pair = summaries[1]["difference"].get(prompts, {}).get(what) if len(summaries) == 2 else None
            cells += [cell(of_pair, what, signed=True), gaining_cell(results, sides, prompts, what)]
        rows.append([method, seeds_cell(results, sides), *cells])
    return Table(["method", "seeds", *labels, *["difference", "seeds that gain"] * compares], rows)


def gaining_cell(results: Mapping[str, Any], sides: Sequence[str], prompts: str, what: str) -> str:
    """ "2 of 3": with how many seeds the second arm ends higher than the first; "-" where they share none."""
    runs = [results["arms"][arm]["seeds"] if arm in results["arms"] else {} for arm in sides]
    evaluated = [{seed: run["final"].get("plain", {}).get(prompts, {}) for seed, run in arm.items()} for arm in runs]
    finals = [{seed: means[what] for seed, means in of_arm.items() if what in means} for of_arm in evaluated]
    gains = [finals[1][seed] - finals[0][seed] for seed in finals[0] if seed in finals[1]]
    return f"{sum(gain > 0.0 for gain in gains)} of {len(gains)}" if gains else "-"


def seeds_cell(results: Mapping[str, Any], sides: Sequence[str]) -> str:
    """How many seeds have run: "3" where all arms that have run agree, else of each column, as "5, 3, -"."""
    counts = [len(results["arms"][arm]["summary"]["seeds"]) if arm in results["arms"] else 0 for arm in sides]
    shown = [str(n or "-") for n in counts]
    return shown[0] if len({n for n in counts if n}) == 1 else ", ".join(shown)


def diversity_table(results: Mapping[str, Any]) -> Table:
    """How far the images of a prompt are apart, and how many kinds they are of."""
    signs, prompts = {"diversity/distance": "distance", "diversity/vendi": "Vendi score"}, results["prompts"]
    base, labels = results["base"].get(prompts, {}), labels_of(results)
    first = [cell([base[sign], None, None], sign) if sign in base else "-" for sign in signs]
    rows = [["before", *(text for x in first for text in (x, *[""] * (len(labels) - 1)))]] if base else []
    for method in methods_of(results):
        sides = sides_of(results, method)
        rows.append([method, *(cell(final(results, arm, prompts, sign), sign) for sign in signs for arm in sides)])
    return Table(["method", *(f"{title}, {label}" for title in signs.values() for label in labels)], rows)


def cost_table(results: Mapping[str, Any]) -> Table:
    """Queries to half of what the best arm gains; and of the method alone the network's evaluations and the time."""
    rows, costs, labels = [], results["costs"], labels_of(results)
    compared = labels if len(labels) == 2 else labels[:1]  # learning rates evaluate alike
    for method in methods_of(results):
        sides = sides_of(results, method)
        queries = [queries_cell(costs.get(arm)) for arm in sides]
        evaluations = [f"{costs[arm]['evaluations']['all']:.0f}" if arm in costs else "-" for arm in sides]
        gradient = f"{costs[method]['evaluations']['gradient']:.0f}"
        rows.append([method, *queries, *evaluations[: len(compared)], gradient, side_cell(costs[method], "seconds")])
    queries = [f"queries to half of the best gain, {label}" for label in labels]
    evaluations = [f"evaluations a query, {label}" for label in compared]
    return Table(["method", *queries, *evaluations, "with a gradient", "seconds of training"], rows)


def training_table(results: Mapping[str, Any], titles: Mapping[str, str]) -> Table:
    """Metrics of training in the methods that have them; `titles` is what each is called."""
    rows, training = [], results["training"]
    for method in methods_of(results):
        sides = [training.get(arm, {}) for arm in sides_of(results, method)]
        if any(name in side for name in titles for side in sides):
            rows.append([method, *(cell(side.get(name), name) for name in titles for side in sides)])
    labels = labels_of(results)
    return Table(["method", *(f"{title}, {label}" for title in titles.values() for label in labels)], rows)


def queries_cell(cost: Mapping[str, Any] | None) -> str:
    """ "410 [380, 450]"; where not all seeds came there, "at least": the others count with all they spent."""
    if cost is None:
        return "-"
    reached, seeds = cost["reached"], cost["seeds"]
    if not reached:
        return "not reached"
    queries = side_cell(cost, "queries")
    return queries if reached == seeds else f"at least {queries} ({reached} of {seeds})"


def side_cell(cost: Mapping[str, Any], name: str) -> str:
    """A whole number, with its interval where there is one."""
    if cost[name] is None:
        return "-"
    mean, low, high = (None if x is None else f"{x:.0f}" for x in cost[name])
    return mean if low is None else f"{mean} [{low}, {high}]"


def pooled_table(results: Mapping[str, Any]) -> Table:
    """Every pair of runs of every method, by how often the base model succeeds with a prompt."""
    rows = []
    for prompts, content in results["pooled"].items():
        for one in content["bins"]:
            cells = cell(one["baseline"], content["what"]), cell(one["gain"], content["what"], signed=True)
            rows.append([prompts, bin_name(one), str(one["prompts"]), *cells])
    return Table(["prompts", "base model succeeds in", "prompts there", "without", "gain of DiffExp"], rows)
