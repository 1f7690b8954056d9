"""The analysis of experiments over seeds: from the files of runs to numbers, a figure and documents."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from diffexp_jax import command
from diffexp_jax.errors import InputError
from diffexp_jax.report import save_grid
from diffexp_jax.sweeps.runs import Names, Seed
from tests.support import ROOT
from tests.support.sweeps import OTHER, SET, final, write_run

QUERIES = [0, 16, 32]  # of the evaluations: iterations 0, 2 and 4 of 8 images


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import analyse

    from diffexp_jax.sweeps import document as results_document
    from diffexp_jax.sweeps import figure
    from diffexp_jax.sweeps import results as sweep_results
    from diffexp_jax.sweeps import runs as sweep_runs

    parts = {"document": results_document, "figure": figure, "results": sweep_results, "runs": sweep_runs}
    return SimpleNamespace(analyse=analyse, **parts)


@pytest.fixture
def sweeps(make_config, tmp_path, tiny_settings):
    """A sweep's folder: two arms with two seeds each, a third arm without a finished run."""
    sets = {"eval.every": 2, "eval.prompts": (tiny_settings["prompts"], *tiny_settings["eval.prompts"])}
    sets |= {"eval.rewards": ("emoji_judge",)}
    arms = {"baseline": {"exploration.enabled": False}, "diffexp": {}, "other": {"optim.lr": 1e-3}}
    curves = {("baseline", 0): [1.0, 2.0, 3.0], ("baseline", 1): [2.0, 4.0, 6.0]}
    curves |= {("diffexp", 0): [1.0, 3.0, 4.0], ("diffexp", 1): [2.0, 4.0, 5.0]}
    shares = {"baseline": [0.0, 0.5, 0.5], "diffexp": [0.5, 0.5, 1.0]}
    for (arm, seed), curve in curves.items():
        config = make_config("ddpo", sets | arms[arm] | {"seed": seed})
        last = final([curve[-1], curve[-1] + 1.0, curve[-1] + 2.0], shares[arm])
        if arm == "baseline":
            last["explored"] = {SET: {"means": {"pickscore": {"mean": curve[-1]}, "emoji_judge": {"mean": 0.0}}}}
        write_run(tmp_path / "runs" / arm / f"seed{seed}", config, curve, last)
    config = make_config("ddpo", sets | arms["other"])
    write_run(tmp_path / "runs" / "other" / "seed0", config, [1.0, 1.0], {}, until=3)
    base = final([0.0, 1.0, 2.0], [0.0, 0.0, 0.5]) | {"many_per_prompt": 10}
    base["many"] = {SET: final([0.0, 1.0, 2.0], [0.0, 0.1, 0.4])["plain"][SET]}
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "final.json").write_text(json.dumps(base))
    for arm in ("baseline", "diffexp"):
        for iteration in (0, 4):
            pictures = np.full((2, 8, 8, 3), 30 * iteration, np.uint8)
            save_grid(
                tmp_path / "runs" / arm / "seed0" / "images" / f"{iteration:06d}.png", pictures, ["a cat", "a dog"]
            )
    about = {"experiment": "fig4_mine", "model": "emoji", "overrides": {}, "shows": "what it shows"}
    about |= {"baseline": "baseline", "arms": {arm: f"runs/{arm}" for arm in arms}, "base": "base/final.json"}
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "fig4_mine-emoji.json").write_text(json.dumps(about))
    return tmp_path


@pytest.fixture
def results(scripts, sweeps):
    """As they are read from the file."""
    return json.loads(json.dumps(scripts.results.analyse(scripts.runs.find(sweeps, "fig4_mine"))))


def test_what_is_compared(results):
    assert list(results["arms"]) == ["baseline", "diffexp"]  # the third has no finished run
    assert (results["reward"], results["held_out"]) == ("pickscore", "emoji_judge")
    assert (results["prompts"], results["unseen"]) == (SET, [OTHER])
    assert (results["settings"]["algorithm"], results["settings"]["batch.samples"]) == ("ddpo", 8)
    assert results["arms"]["baseline"]["differs"] == {}
    explored = results["arms"]["diffexp"]["differs"]
    names = ("enabled", "w_low", "t_thresh", "threshold_of", "weight_range", "share", "unit", "scope")
    names += ("fraction",)
    assert explored.keys() == {f"exploration.{name}" for name in names}
    assert results["unfinished"] == {"other": {"0": [3, 4]}}
    assert len(results["machines"]) == 1 and results["samples_per_prompt"] == [2]


def test_curves(results):
    seeds = results["arms"]["diffexp"]["seeds"]
    assert list(seeds) == ["0", "1"]
    curves = seeds["0"]["curves"]
    assert curves["evaluation"]["iteration"] == [0, 2, 4] and curves["evaluation"]["reward_queries"] == QUERIES
    assert curves["evaluation"]["unet_evaluations"] == [0, 128, 256]
    assert curves["evaluation"][f"eval/{SET}/pickscore"] == [1.0, 3.0, 4.0]
    assert curves["training"]["reward/mean"] == [3.0, 6.0, 9.0, 12.0]


def test_the_comparison(results):
    """Final rewards are 4, 7 and 5, 6 (means of prompts); seed 0 reaches 3 at 16 of 32, seed 1 never 6."""
    plain, explored = (results["arms"][arm]["summary"] for arm in ("baseline", "diffexp"))
    assert plain["final"][SET]["pickscore"] == [5.5, 4.0, 7.0]
    assert explored["final"][SET]["pickscore"] == [5.5, 5.0, 6.0]
    assert explored["difference"][SET]["pickscore"] == [0.0, -1.0, 1.0]
    assert explored["difference"][OTHER]["emoji_judge"] == [0.333333] * 3
    assert plain["difference"][SET]["pickscore"] == [0.0, 0.0, 0.0]
    assert plain["explored_difference"][SET]["pickscore"] == [-1.0, -1.0, -1.0] and not explored["explored_difference"]
    queries = explored["ratio"]["final"]["reward_queries"]
    assert queries == {"ratio": [0.75, 0.5, 1.0], "reached": 1, "seeds": 2}
    assert explored["ratio"]["final"]["unet_evaluations"] == queries
    # 90 % of the gain: 2.8 at 14.4 of the baseline's 28.8; 5.6 never, of 28.8
    gain = explored["ratio"]["gain"]["reward_queries"]
    assert gain == {"ratio": [pytest.approx((14.4 + 32) / 57.6, rel=1e-5), 0.5, pytest.approx(32 / 28.8, rel=1e-5)]} | {
        "reached": 1,
        "seeds": 2,
    }
    # Training samples, two iterations each: 3, 7 and 4.5, 10.5, at 12 and 28 queries; the other seed: the same in both
    training = explored["training_ratio"]["final"]["reward_queries"]
    reached = 12 + 16 * (7 - 4.5) / 6
    low = pytest.approx(reached / 28, rel=1e-5)
    assert training == {"ratio": [pytest.approx((reached + 28) / 56, rel=1e-5), low, 1.0], "reached": 2, "seeds": 2}


def test_gain_by_base_share(results):
    found = results["arms"]["diffexp"]["summary"]["by_base_share"]
    assert found.keys() == {SET} and found[SET]["what"] == "emoji_judge" and found[SET]["samples_per_prompt"] == 10
    assert [(one["upto"], one["prompts"], one["gain"][0]) for one in found[SET]["bins"]] == [
        (0.0, 1, 0.5),
        (0.1, 1, 0.0),
        (0.6, 1, 0.5),
    ]
    assert results["arms"]["baseline"]["summary"]["by_base_share"] == {}


@pytest.mark.parametrize("shares, n_bins", [([0.0, 0.0], None), ([0.0, 0.5], 2)])
def test_one_bin_is_no_curve(scripts, shares, n_bins):
    """Prompts that the base model succeeds with equally often are the final models' table again."""

    def evaluated(values):
        return {SET: {"prompts": ["a", "b"], "per_prompt": {"emoji_judge": values}}}

    run = Seed(ConfigDict(), [], {"plain": evaluated([0.5, 1.0])})
    base = {"many": evaluated(shares), "many_per_prompt": 4}
    found = scripts.results.by_base_share(Names("x", "emoji_judge", SET, ()), [(run, run)], base)
    assert {name: len(content["bins"]) for name, content in found.items()} == ({} if n_bins is None else {SET: n_bins})


def test_tables(scripts, results):
    results["overrides"] = {"iterations": 4, "reward": "pickscore:my folder"}
    text = scripts.document.section(results)
    for line in (
        "What it shows. The baseline is *baseline*. Final models are judged by 2 images of each prompt.",
        "Not finished, so left out: other seed 0 (3 of 4 iterations).",
        "| before | - | 1.00 | 16.7 % | 1.00 | 16.7 % |",
        "| baseline | 2 | 5.50 [4.00, 7.00] | 33.3 [33.3, 33.3] % | 5.50 [4.00, 7.00] | 33.3 [33.3, 33.3] % |",
        "| diffexp | +0.00 [-1.00, +1.00] | +33.3 [+33.3, +33.3] % | +0.00 [-1.00, +1.00] | +33.3 [+33.3, +33.3] % |",
        "| baseline, sampled with the schedule | -1.00 [-1.00, -1.00] | -33.3 [-33.3, -33.3] % | - | - |",
        "| diffexp, evaluated | at least 0.75 [0.50, 1.00] (1 of 2) | at least 0.81 [0.50, 1.11] (1 of 2) |",
        "| diffexp, training samples | 0.83 [0.67, 1.00] (2 of 2) | 0.83 [0.67, 1.00] (2 of 2) |",
        "| diffexp | 2 | - | - | 0.500 [0.500, 0.500] | - | - |",
        "| prompts | base model succeeds in | prompts there | baseline | gain of diffexp |",
        "| train | no image | 1 | 0.0 [0.0, 0.0] % | +50.0 [+50.0, +50.0] % |",
        "| train | 30 to 60 % | 1 | 50.0 [50.0, 50.0] % | +50.0 [+50.0, +50.0] % |",
        "- Measured on 1 x a CPU, python 3.11, jax 0.10, numpy 2.0.",
        "Command: `python scripts/sweep.py --experiment fig4_mine --model emoji --config.iterations=4 "
        "'--config.reward=pickscore:my folder'`",
    ):
        assert line in text.splitlines(), f"{line}\n{text}"
    assert "queries (and UNet evaluations) to" in text
    results["arms"]["diffexp"]["differs"] = {"optim.lr": 1e-3}  # nothing of exploration: no table by what it can act on
    assert "base model succeeds in" not in scripts.document.section(results)
    ratio = results["arms"]["diffexp"]["summary"]["ratio"]
    ratio["final"]["unet_evaluations"] = {"ratio": [0.5, None, None], "reached": 2, "seeds": 2}
    text = scripts.document.section(results)
    assert (
        "| diffexp, evaluated | at least 0.75 [0.50, 1.00] (1 of 2) | 0.50 (2 of 2) |" in text
        and "(and UNet" not in text
    )


@pytest.mark.parametrize(
    "estimate, what, signed, expected",
    [
        ([19.104, 18.899, 19.309], "emoji_pickscore", False, "19.10 [18.90, 19.31]"),
        ([0.5, None, None], "emoji_judge/animal", False, "50.0 %"),
        ([-0.001, -0.02, 0.02], "hpsv2", True, "+0.00 [-0.02, +0.02]"),
        ([0.12345, 0.1, 0.2], "diversity/distance", False, "0.123 [0.100, 0.200]"),
        (None, "hpsv2", False, "-"),
    ],
)
def test_cells(scripts, estimate, what, signed, expected):
    assert scripts.document.cell(estimate, what, signed=signed) == expected


@pytest.mark.slow
def test_the_figure(scripts, results, tmp_path):
    """The same files each time; panels for two rewards on two sets, training, and the gain by base share."""
    scripts.figure.save(results, tmp_path / "a" / "x")
    scripts.figure.save(results, tmp_path / "b" / "x")
    for name in ("x.png", "x.svg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with Image.open(tmp_path / "a" / "x.png") as image:
        assert image.size == (1209, 1382)  # 2 x 3 panels of 4.2 x 3.2 inches
    prompts, what = next(iter(results["base"].items()))[0], "emoji_judge"
    scripts.figure.save_panel(results, prompts, what, tmp_path / "panel.png", title="a title")
    with Image.open(tmp_path / "panel.png") as image:
        assert image.size == (880, 396)
    assert scripts.figure.unet_evaluations_per_query(results) == 8.0


# -------------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def command_line(scripts, monkeypatch, capsys):
    """command_line(*arguments) -> (exit code, stdout, stderr) of scripts/analyse.py."""

    def run(*arguments):
        code = 0
        monkeypatch.setattr(sys, "argv", ["analyse.py", *map(str, arguments)])
        try:
            command.guarded(scripts.analyse.main, scripts.analyse.parse())
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def test_an_experiment_from_files_to_documents(command_line, sweeps, tmp_path, scripts, monkeypatch):
    monkeypatch.setattr(scripts.document, "README_ROWS", {"fig4_mine": "mine", "fig1": "not measured"})
    out, readme = tmp_path / "docs" / "evidence" / "results", tmp_path / "README.md"
    index, page = out / "index.md", out / "fig4_mine.md"
    out.mkdir(parents=True)
    index.write_text("# R\n\n<!-- results: all -->\n<!-- /results: all -->\n\nprose\n")
    readme.write_text(f"first\n{scripts.document.README[0]}\nold\n{scripts.document.README[1]}\nlast\n")
    documents = ["--out", out, "--pages", "--readme", readme]
    code, said, err = command_line("--experiment=fig4_mine", "--sweeps", sweeps, *documents)
    assert (code, err) == (0, "") and "fig4_mine other: no finished run, left out" in said
    names = [f"fig4_mine.{kind}" for kind in ("json", "md", "png", "svg")]
    assert sorted(path.name for path in out.iterdir()) == [*names, "index.md", "sweeps"]
    assert len(list((out / "sweeps").rglob("metrics.jsonl"))) == 5 and not list((out / "sweeps").rglob("*.png"))
    again = ["--experiment=fig4_mine", "--sweeps", out / "sweeps", "--out", tmp_path / "again"]
    assert command_line(*again)[0] == 0
    assert (tmp_path / "again" / "fig4_mine.json").read_text() == (out / "fig4_mine.json").read_text()
    html = (sweeps / "experiments" / "fig4_mine.html").read_text()
    assert "<h1>fig4_mine over seeds</h1>" in html and "5.50 [5.00, 6.00]" in html and html.count("<svg ") >= 3
    assert html.count("data:image/") >= 3 and "before" in html  # of the pictures below
    text = index.read_text()
    row = "2 | pickscore, train | 1.00 | 5.50 [4.00, 7.00] | 5.50 [5.00, 6.00] | +0.00 [-1.00, +1.00] |"
    for cells in (row, "2 | at least 0.75 [0.50, 1.00] (1 of 2) | 0.83 [0.67, 1.00] (2 of 2) |"):
        assert f"| [fig4_mine](fig4_mine.md) | {cells}\n" in text
    assert text.startswith("# R\n\n<!-- results: all -->\n| experiment |") and text.endswith("-->\n\nprose\n")
    assert page.read_text().startswith("# fig4_mine\n\n<!-- results: fig4_mine -->\n")
    assert "![Curves of fig4_mine](fig4_mine.png)" in page.read_text()
    assert readme.read_text().startswith("first\n") and readme.read_text().endswith("\nlast\n")
    shares = "16.7 % | 33.3 [33.3, 33.3] % | 66.7 [66.7, 66.7] % | +33.3 [+33.3, +33.3] %"
    assert readme.read_text().splitlines()[-3:-1] == [
        f"| [mine](docs/evidence/results/fig4_mine.md) | {shares} |",
        scripts.document.README[1],
    ]
    always = {"reward": "aesthetic", "held_out": "emoji_judge", "prompts": "p", "base": {"p": {"emoji_judge": 1.0}}}
    assert scripts.document.telling_reward(always) == "aesthetic"  # there is nothing to gain in the judge's
    whats = ["pickscore, train", "emoji_judge, train", "pickscore, unseen", "emoji_judge, unseen"]
    assert [what for what in whats if f" | {what} | " in text] == whats
    # prose that is added stays; writing again changes nothing
    page.write_text(page.read_text().replace("# fig4_mine\n", "# Mine\n\nWhat this says.\n"))
    edited = page.read_text()
    assert command_line(*documents)[0] == 0 and page.read_text() == edited and "What this says." in edited
    # a page whose results have gone
    (out / "gone.md").write_text("<!-- results: fig4_gone -->\n<!-- /results: fig4_gone -->\n")
    code, _, err = command_line(*documents)
    assert (
        code == 2
        and "gone.md: is of 'fig4_gone', of which there are no results; known: all, methods, fig4_mine\n" in err
    )


def test_runs_by_hand(command_line, sweeps, tmp_path):
    """Folders with seeds, or single runs."""
    runs = [f"a={sweeps / 'runs/baseline'}", f"b={sweeps / 'runs/diffexp/seed1'}"]
    assert command_line("--name=mine", "--out", tmp_path / "x", *runs)[0] == 0
    results = json.loads((tmp_path / "x" / "mine.json").read_text())
    assert results["baseline"] == "a" and results["arms"]["b"]["summary"]["seeds"] == [1]
    assert results["arms"]["b"]["summary"]["difference"][SET]["pickscore"] == [-1.0, None, None]


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "nothing to do: give --experiment, runs as NAME=FOLDER, --pages, --figures or --readme"),
        (["--experiment=fig1", "--sweeps={0}"], "--experiment fig1: {0}/experiments has no such one: fig4_mine-emoji"),
        (["--experiment=fig1", "--sweeps={0}/no"], "--experiment fig1: {0}/no/experiments has no such one: none"),
        (
            ["--experiment=fig4_mine", "--sweeps={0}", "--model=sd15"],
            "--experiment fig4_mine: {0}/experiments has no suc",
        ),
        (["a={0}", "b={0}"], "runs are given without --name"),
        (["--name=x", "a={0}"], "one arm alone is nothing to compare"),
        (["--name=x", "a={0}", "b"], "'b': wants NAME=FOLDER"),
        (["--name=x", "a={0}", "b={0}/no"], "'b={0}/no': no such folder"),
        (["--name=x", "a={0}/base", "b={0}"], "x: the baseline 'a' has no finished run in {0}/base"),
        (["--pages"], "{0}/none/index.md: the file is missing"),
        (
            ["--readme={0}/bare.md"],
            "{0}/bare.md: wants the lines <!-- results over seeds --> and <!-- /results over seeds",
        ),
    ],
)
def test_bad_input(command_line, sweeps, tmp_path, arguments, said):
    (sweeps / "bare.md").write_text("nothing\n")
    out = sweeps / "none"
    code, _, err = command_line("--out", out, *(argument.format(sweeps) for argument in arguments))
    assert code == 2 and err.startswith(f"error: {said.format(sweeps)}") and err.count("\n") == 1, err
    assert not out.exists()


def test_an_experiment_that_was_run_in_two_ways(scripts, sweeps):
    """By its name it is not clear which; by the file's name it is. Its results have another name."""
    about = json.loads((sweeps / "experiments" / "fig4_mine-emoji.json").read_text())
    other = sweeps / "experiments" / "fig4_mine-emoji-012345.json"
    other.write_text(json.dumps(about | {"overrides": {"iterations": 4}}))
    with pytest.raises(InputError, match="has several: fig4_mine-emoji, fig4_mine-emoji-012345"):
        scripts.runs.find(sweeps, "fig4_mine")
    assert scripts.runs.find(sweeps, "fig4_mine-emoji").name == "fig4_mine"
    assert scripts.runs.find(sweeps, "fig4_mine-emoji-012345").name == "fig4_mine-emoji-012345"


def test_a_base_model_on_other_prompts(scripts, sweeps):
    path = sweeps / "base" / "final.json"
    base = json.loads(path.read_text())
    base["many"][SET]["prompts"][0] = "another"
    path.write_text(json.dumps(base))
    with pytest.raises(InputError, match="train: the base model was evaluated on other prompts"):
        scripts.results.analyse(scripts.runs.find(sweeps, "fig4_mine"))


# ------------------------------------------------------------------------------------------------- committed documents


def test_the_documents_say_what_the_files_say(scripts):
    """Tables that were edited by hand, or results without their pages, are noticed."""
    folder = ROOT / "docs" / "evidence" / "results"
    every, readme = scripts.document.read_results(folder), ROOT / "README.md"
    written = scripts.document.pages(folder, every)
    written[readme] = scripts.document.readme(readme.read_text(encoding="utf-8"), every)
    assert {results["name"] for results in every} >= scripts.document.README_ROWS.keys()
    for path, text in written.items():
        assert path.exists() and path.read_text(encoding="utf-8") == text, (
            f"{path}: python scripts/analyse.py --pages --readme README.md"
        )
        assert path == readme or path.name in (folder / "index.md").read_text() or path.name == "index.md", path
    for results in every:
        assert all((folder / f"{results['name']}.{kind}").is_file() for kind in ("png", "svg"))
