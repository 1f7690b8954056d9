"""Experiments whose arms come in pairs: every arm against its own baseline, tables of all pairs, a figure."""

import json

import pytest
from PIL import Image

from configs.sweeps import SWEEPS
from diffexp_jax.sweeps import document, figure, page, runs
from diffexp_jax.sweeps.plan import plan
from diffexp_jax.sweeps.results import analyse
from diffexp_jax.sweeps.tables import all_tables
from tests.support.sweeps import OTHER, SET, final, write_run

SHARES = {  # by arm and seed: what the evaluations say; the finals are twice the last
    ("ddpo", 0): [0.0, 0.1, 0.2],
    ("ddpo", 1): [0.0, 0.1, 0.3],
    ("ddpo_diffexp", 0): [0.0, 0.2, 0.4],
    ("ddpo_diffexp", 1): [0.0, 0.2, 0.5],
    ("nft", 0): [0.0, 0.0, 0.1],
    ("nft_diffexp", 0): [0.0, 0.0, 0.0],
    ("nft_diffexp", 1): [0.0, 0.4, 0.5],
}


@pytest.fixture(scope="module")
def experiment(make_config, tmp_path_factory, tiny_settings):
    """Three pairs: of nft one seed has both sides; of awm nothing has run with DiffExp."""
    tmp_path = tmp_path_factory.mktemp("sweeps")
    sets = {"eval.every": 2, "eval.prompts": (tiny_settings["prompts"], *tiny_settings["eval.prompts"])}
    sets |= {"eval.rewards": ("emoji_judge",), "batch.group": 2}
    for (arm, seed), shares in (SHARES | {("awm", 0): [0.0, 0.0, 0.1]}).items():
        method = arm.split("_")[0]
        config = make_config(method, sets | {"seed": seed, "exploration.enabled": "diffexp" in arm})
        last = final([1.0, 2.0, 3.0], [2 * shares[-1]] * 3)
        last["plain"][SET]["means"]["diversity/vendi"] = {"mean": 1.5 + seed}
        folder = tmp_path / "runs" / arm / f"seed{seed}"
        write_run(folder, config, [1.0, 2.0, 3.0], last, shares=shares, groups=method != "ddpo")
    base = final([0.0, 1.0, 2.0], [0.0, 0.0, 0.0]) | {"many_per_prompt": 10}
    base["many"] = {SET: final([0.0, 1.0, 2.0], [0.0, 0.1, 0.4])["plain"][SET]}
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "final.json").write_text(json.dumps(base))
    methods = ("ddpo", "nft", "awm")
    arms = [arm for method in methods for arm in (method, f"{method}_diffexp")]
    about = {"experiment": "methods", "model": "emoji_hard", "overrides": {}, "shows": "what each learns"}
    about |= {"baseline": "ddpo", "arms": {arm: f"runs/{arm}" for arm in arms}, "base": "base/final.json"}
    about |= {"pairs": {f"{method}_diffexp": method for method in methods}}
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "methods-emoji_hard.json").write_text(json.dumps(about))
    return runs.find(tmp_path, "methods")


@pytest.fixture(scope="module")
def results(experiment):
    """As they are read from the file."""
    return json.loads(json.dumps(analyse(experiment)))


def test_an_arm_is_compared_with_its_own_baseline(results):
    assert list(results["arms"]) == [arm for arm in ("ddpo", "ddpo_diffexp", "nft", "nft_diffexp", "awm")]
    explored = results["arms"]["nft_diffexp"]
    assert explored["summary"]["paired"] == 1  # seed 1 of nft alone has not run
    assert explored["summary"]["difference"][SET]["emoji_judge"] == [pytest.approx(-0.2), None, None]
    assert {key.split(".")[0] for key in explored["differs"]} == {"exploration"}
    assert results["arms"]["nft"]["differs"]["algorithm"] == "nft"  # against the experiment's baseline
    assert results["arms"]["ddpo_diffexp"]["summary"]["difference"][SET]["emoji_judge"][0] == pytest.approx(0.4)


def test_costs(results):
    """The best arm ends at 0.9, so half of its gain is 0.45: only two runs of DiffExp come there."""
    costs = results["costs"]
    assert (costs["ddpo"]["reached"], costs["ddpo"]["queries"][0]) == (0, 32)
    assert (costs["ddpo_diffexp"]["reached"], costs["nft_diffexp"]["reached"]) == (1, 1)
    assert costs["ddpo_diffexp"]["queries"][0] == pytest.approx((32 + 16 + 16 * 0.25 / 0.3) / 2, rel=1e-5)
    assert costs["nft"]["seconds"] == [10.0, None, None]  # of 1, 2, 3 and 4 the median, four times


def test_gains_of_all_pairs_are_pooled(results):
    """Of three pairs: +0.4, +0.4 and -0.2 with every prompt."""
    bins = results["pooled"][SET]["bins"]
    assert [one["prompts"] for one in bins if one["gain"]] == [1, 1, 1]
    assert all(one["gain"][0] == pytest.approx(0.2) for one in bins if one["gain"])


def test_tables(results):
    tables = all_tables(results)
    assert list(tables)[:2] == [f"emoji_judge, {SET}", f"emoji_judge, {OTHER}"]
    before, ddpo, nft, awm = tables[f"emoji_judge, {SET}"].rows
    assert before == ["before", "-", "0.0 %", "", "", ""]
    assert ddpo == ["ddpo", "2", "50.0 [40.0, 60.0] %", "90.0 [80.0, 100.0] %", "+40.0 [+40.0, +40.0] %", "2 of 2"]
    assert nft == ["nft", "1, 2", "20.0 %", "50.0 [0.0, 100.0] %", "-20.0 %", "0 of 1"]
    assert awm == ["awm", "1", "20.0 %", "-", "-", "-"]
    # Of a query 8 evaluations sample it; three of the four steps are learnt from
    ddpo, _, awm = tables["Cost of a run"].rows
    assert ddpo == ["ddpo", "not reached", "at least 31 [29, 32] (1 of 2)", "14", "14", "6", "10 [10, 10]"]
    assert awm[:3] == ["awm", "not reached", "-"] and awm[-1] == "10"
    diversity = tables["Diversity of the images of a prompt"].rows
    assert diversity[1] == ["ddpo", "-", "-", "2.00 [1.50, 2.50]", "2.00 [1.50, 2.50]"]
    # Iterations 1 to 3 of 4 would explore; ddpo compares no groups
    groups = tables["Rewards of a prompt's images in training, while it explores"].rows
    assert groups == [
        ["nft", "2.00", "2.00 [2.00, 2.00]", "4.00", "4.00 [4.00, 4.00]"],
        ["awm", "2.00", "-", "4.00", "-"],
    ]
    successes = tables["Groups of a prompt's images that have a success, while it explores"]
    assert successes.header == ["method", *(f"groups with a success, {side}" for side in ("without", "with DiffExp"))]
    assert successes.rows == [["nft", "0.20", "0.20 [0.20, 0.20]"], ["awm", "0.20", "-"]]
    agree = tables["How far the newest gradients agree, while it explores"].rows
    assert agree[0] == ["ddpo", "0.200 [0.200, 0.200]", "0.200 [0.200, 0.200]"] and len(agree) == 3
    section = document.section(results)
    assert "ddpo_diffexp, nft_diffexp: `exploration.enabled=True`" in section
    assert "compared with the method itself" in section
    assert "algorithm=nft" in section and "`ddpo." not in section  # nobody else reads those


def test_several_variants(results):
    """Columns for each, and no difference; what has not run is "-"."""
    arms = {"nft": results["arms"]["nft"], "nft_lr_x3": results["arms"]["nft_diffexp"]}
    costs = {"nft": results["costs"]["nft"], "nft_lr_x3": results["costs"]["nft_diffexp"]}
    rates = results | {"arms": arms, "costs": costs, "pairs": {"nft_lr_x0.33": "nft", "nft_lr_x3": "nft"}}
    table = all_tables(rates)[f"emoji_judge, {SET}"]
    assert table.header == ["method", "seeds", "as configured", "lr_x0.33", "lr_x3"]
    assert table.rows == [["before", "-", "0.0 %", "", ""], ["nft", "1, -, 2", "20.0 %", "-", "50.0 [0.0, 100.0] %"]]
    assert not any("pooled" in caption for caption in all_tables(rates))


def test_a_run_without_a_final_evaluation(results):
    """One that was stopped between its training and that: neither side counts it."""
    explored = results["arms"]["ddpo_diffexp"]
    seeds = explored["seeds"] | {seed: run | {"final": {}} for seed, run in list(explored["seeds"].items())[:1]}
    stopped = results | {"arms": results["arms"] | {"ddpo_diffexp": explored | {"seeds": seeds}}}
    assert all_tables(stopped)[f"emoji_judge, {SET}"].rows[1][-1] == "1 of 1"


def test_models_beside_each_other(results):
    """The model with most arms is on the left; a method that one of them lacks is "-" there."""
    flow = results | {"model": "flow", "arms": {arm: results["arms"][arm] for arm in ("ddpo", "awm")}}
    lines = document.methods_overview([flow, results]).splitlines()
    sides = ("without", "with DiffExp", "difference", "seeds that gain")
    hard = results["model"]
    assert lines[0] == f"| {' | '.join(['method', *(f'{model}: {x}' for model in (hard, 'flow') for x in sides)])} |"
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| before", "| ddpo", "| nft", "| awm"]
    assert lines[3].endswith("| 2 of 2 | 50.0 [40.0, 60.0] % | - | - | - |")
    assert lines[4].endswith("| -20.0 % | 0 of 1 | - | - | - | - |")
    assert document.methods_overview([results | {"experiment": "rates"}]) == document.NONE_YET


def test_the_figure(results, tmp_path):
    figure.save(results, tmp_path / "a")
    figure.save(results, tmp_path / "b")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    text = (tmp_path / "a.svg").read_text()
    assert all(word in text for word in ("<!-- ddpo -->", "<!-- nft -->", "<!-- with DiffExp -->", "<!-- before -->"))
    assert Image.open(tmp_path / "a.png").width > 1000


def test_points_of_the_figure(results):
    """Of the first panel: x is the share, each pair has its own height."""
    from matplotlib.figure import Figure

    axis, (panel, *_) = Figure().subplots(), figure.panels_of_methods(results)
    figure.draw_methods(axis, results, panel)
    without, explored = (lines[0] for lines in axis.containers)
    assert without.get_xdata() == pytest.approx([0.5, 0.2, 0.2])
    assert explored.get_xdata() == pytest.approx([0.9, 0.5])
    assert [round(y) for y in without.get_ydata()] == [0, 1, 2] and [round(y) for y in explored.get_ydata()] == [0, 1]


def test_panels_of_the_figure(results):
    """Rewards within groups and the gradient's, of pairs that have both sides; none of them for learning rates."""
    *sets, spread, best, successes, snr = figure.panels_of_methods(results)
    assert [panel.title for panel in sets] == [SET, OTHER] and all(panel.shares for panel in sets)
    assert spread.title.startswith("standard deviation of a prompt") and best.title.startswith("best of a prompt")
    assert spread.found["nft"][0] == 2.0 and spread.found["ddpo"] is None and not spread.shares
    assert successes.title == "groups with a success in training" and successes.found["nft"][0] == pytest.approx(0.2)
    assert snr.found["ddpo_diffexp"] == [0.2, 0.2, 0.2] and snr.base is None
    rates = {"arms": {arm: results["arms"][arm] for arm in ("nft", "ddpo")}, "pairs": {"nft_lr_x3": "nft"}}
    assert len(figure.panels_of_methods(results | rates)) == 2
    unpaired = {arm: results["arms"][arm] for arm in ("ddpo", "nft", "awm")}
    assert len(figure.panels_of_methods(results | {"arms": unpaired})) == 2  # nothing has run with DiffExp


def test_the_page(results, experiment, tmp_path):
    page.save(results, experiment, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert text.count("<svg") == 6 and "each method without and with DiffExp" in text


def test_the_sweeps_of_methods(tmp_path):
    """By each method's own batch, for as many queries; rates share the runs of methods."""
    sweeps = (SWEEPS["methods"], SWEEPS["rates"])
    planned, about = plan(["methods"], model="emoji_hard", seeds=[0], out=tmp_path, overrides={})
    (content,) = about.values()
    assert content["pairs"] == {f"{arm}_diffexp": arm for arm in content["arms"] if not arm.endswith("_diffexp")}
    sizes = {(run.iterations, run.changes["eval.every"], run.changes["checkpoint.every"]) for run in planned}
    assert sizes == {(12, 3, 3), (24, 6, 6)}  # of 64 and 32 images
    assert all(sweeps[0]["arms"][arm] == sweeps[1]["arms"][arm] for arm in content["pairs"].values())
    assert sweeps[1]["pairs"]["nft_lr_0.03"] == "nft"
