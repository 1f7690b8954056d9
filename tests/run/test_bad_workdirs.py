"""Workdirs that cannot be written, or that hold another run: one line, and nothing there is touched."""

import shutil

from diffexp_jax import command, train
from diffexp_jax.run import workdir as workdirs
from diffexp_jax.settings import parsed
from tests.support.runs import contents


def test_unwritable_workdirs(fails, make_config, tmp_path):
    (tmp_path / "file").write_text("kept")
    for workdir in (tmp_path / "file", tmp_path / "file" / "below" / "run"):
        said = fails(2, command.guarded, train.run, make_config("alignprop"), workdir)
        assert f"workdir {workdir}: cannot be written ({tmp_path / 'file'} is not a folder)" in said
    assert (tmp_path / "file").read_text() == "kept"


def test_a_workdir_of_another_config(fails, make_config, workdir):
    before = contents(workdir)
    config = make_config("alignprop", {"lora.alpha": 8.0, "optim.lr": 0.5, "sampling.steps": 3})
    said = fails(2, command.guarded, train.run, config, workdir)
    assert "holds a run of another config: optim.lr (0.01 there, 0.5 here), sampling.steps (4 there, 3 here);" in said
    config = make_config("alignprop", {"lora.alpha": 8.0, "lora.targets": ("attention", "feed_forward")})
    said = fails(2, command.guarded, train.run, config, workdir)
    assert 'another config: lora.targets (["attention"] there, ["attention", "feed_forward"] here);' in said
    assert contents(workdir) == before


def test_a_continued_run_may_change_what_does_not_matter(make_config, workdir):
    changes = {"lora.alpha": 8.0, "iterations": 9, "eval.every": 5, "log.images": 2, "checkpoint.every": 3}
    _, notes = workdirs.plan(workdir, parsed(make_config("alignprop", changes)))
    assert "iterations is 9, was 4" in notes and "eval.every is 5, was 3" in notes


def test_a_workdir_whose_config_is_broken(fails, make_config, workdir):
    (workdir / "config.json").write_text('{"seed":')
    said = fails(2, command.guarded, train.run, make_config("alignprop"), workdir)
    assert "config.json: not readable as json" in said


def test_checkpoints_without_a_config(fails, make_config, workdir):
    """A run of other settings would go on with them."""
    (workdir / "config.json").unlink()
    said = fails(2, command.guarded, train.run, make_config("alignprop"), workdir)
    assert "has checkpoints and no config.json, so of which run is not known; move them away" in said


def test_a_workdir_without_a_checkpoint_is_free(make_config, workdir):
    """A run that failed before its first checkpoint leaves nothing that could be lost."""
    shutil.rmtree(workdir / "checkpoints")
    assert workdirs.plan(workdir, parsed(make_config("ddpo"))).notes == []
    (workdir / "checkpoints" / "0.orbax-checkpoint-tmp-1").mkdir(parents=True)  # killed while it wrote the first one
    assert workdirs.plan(workdir, parsed(make_config("ddpo"))).notes == []
