"""scripts/sample.py: bad input, pictures against diffusers', exploration, and the files that it writes."""

import argparse
import csv
from argparse import Namespace
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from configs import base
from diffexp_jax import backend, sampler, settings
from diffexp_jax.cli import sample as cli_sample
from diffexp_jax.cli import sample_flags
from diffexp_jax.cli import score as cli_score
from diffexp_jax.errors import InputError
from diffexp_jax.models.lora import save_lora
from diffexp_jax.pipelines import load_pipeline
from diffexp_jax.prompts import PromptSet


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--prompt=a dog", "--steps=1001"], "--steps 1001: wants 1..1000"),
        (["--prompt=a dog", "--t_thresh=-1"], "--t_thresh -1: wants 0..1000"),
        (["--prompt=a dog", "--weight_range", "2", "1"], "--weight_range (2.0, 1.0): wants (low, high) with"),
        (["--prompt=a dog", "--eta=20"], "--eta 20.0: wants 0..10"),
        (["--prompt=a dog", "--batch=0"], "--batch 0: wants 1..1048576"),
        (["--prompt=a dog", "--image_size=12"], "--image_size 12: wants a multiple of 8, 8..8192"),
        ([], "nothing to sample: give --prompt or --prompts"),
        (["--prompts=plants"], "unknown prompt set 'plants'; accepted: animals,"),
        (["--prompt=a dog", "--model=no/such"], "model 'no/such': no such folder"),
        (["--prompt=a dog", "--lora=no/such"], "--lora no/such: no such file or folder"),
        (["--prompt=a dog", "--lora=other.safetensors"], "has shape (4, 16), the model's layer"),
        (["--prompt=a dog", "--lora_scale=0.5"], "--lora_scale 0.5: wants a LoRA, by --lora"),
        (["--prompt=a dog", "--lora=x", "--lora_scale=nan"], "--lora_scale nan: wants -100..100"),
        (["--prompt=a dog", "--latents=no.npy"], "--latents no.npy: not a readable .npy file"),
        (["--prompt=a dog", "--latents=text.npy"], "--latents text.npy: not a readable .npy file"),
        (["--prompt=a dog", "--latents=two.npz"], "--latents two.npz: wants one array of float32"),
        (["--prompt=a dog", "--latents=int.npy"], "--latents int.npy: wants one array of float32"),
        (["--prompt=a dog", "--num_images=3", "--latents=x.npy"], "shape (2, 8, 8, 4); wants (3, 8, 8, 4): one for"),
        (["--prompt=a dog", "--latents=nan.npy"], "--latents nan.npy: holds numbers that are not finite"),
    ],
)
def test_bad_input_of_sample(fails, script, tiny_model, lora, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    x = np.zeros((2, 8, 8, 4), np.float32)
    np.save("x.npy", x)
    np.save("int.npy", x.astype(np.int32))
    np.save("nan.npy", x * np.nan)
    np.savez("two.npz", x=x, y=x)
    Path("text.npy").write_text("no array")
    other = {"mid_block.attentions.0": {"transformer_blocks.0": {"attn1": {"to_q": {}}}}}
    other["mid_block.attentions.0"]["transformer_blocks.0"]["attn1"]["to_q"] = {
        "A": np.zeros((16, 4), np.float32),
        "B": np.zeros((4, 16), np.float32),
    }
    save_lora("other.safetensors", other, alpha=4.0)
    model = [] if any(argument.startswith("--model") for argument in arguments) else [f"--model={tiny_model}"]
    assert said in fails(2, script, "sample", *model, *arguments, "--out=out")
    assert not Path("out").exists()


def test_sample_is_diffusers_with_and_without_lora(script, workdir, tiny_model, tmp_path, capsys):
    """20 steps, guidance 7.5, the same latents; the LoRA exported here and loaded by load_lora_weights."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    prompts = ["a dog riding a bike", "an ant", "a zebra"]
    latents = np.random.default_rng(3).standard_normal((3, 8, 8, 4)).astype(np.float32)
    np.save(tmp_path / "x.npy", latents)
    (tmp_path / "p.txt").write_text("\n".join(prompts[1:]))
    file = tmp_path / "exported" / "pytorch_lora_weights.safetensors"
    script("export_lora", f"--workdir={workdir}", f"--out={file}")
    assert "the LoRA after iteration 7" in capsys.readouterr().out

    arguments = [f"--model={tiny_model}", f"--prompt={prompts[0]}", f"--prompts={tmp_path / 'p.txt'}", "--steps=20"]
    arguments += ["--guidance=7.5", "--batch=2", f"--latents={tmp_path / 'x.npy'}", "--save_npy"]
    ours = {}
    half = [f"--lora={file}", "--lora_scale=0.5"]
    for name, more in (("plain", []), ("lora", [f"--lora={file}"]), ("half", half)):
        script("sample", *arguments, f"--out={tmp_path / name}", *more)
        ours[name] = np.load(tmp_path / name / "images.npy")
        assert ours[name].shape == (3, 16, 16, 3) and ours[name].dtype == np.float32
        files = {path.name for path in (tmp_path / name).iterdir()}
        pngs = {f"000{i}{suffix}.png" for i in range(3) for suffix in ("", "-base")[: 1 + (name != "plain")]}
        assert files == {*pngs, "grid.png", "images.npy", "prompts.csv"}
        with Image.open(tmp_path / name / "0002.png") as image:
            np.testing.assert_allclose(np.asarray(image) / 255, ours[name][2], atol=0.5 / 255 + 1e-6)

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_model)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.tensor(latents.transpose(0, 3, 1, 2))
    kwargs = dict(num_inference_steps=20, guidance_scale=7.5, output_type="np")
    theirs = {"plain": pipe(prompts, latents=noise, **kwargs).images}
    pipe.load_lora_weights(str(file.parent))
    theirs["lora"] = pipe(prompts, latents=noise, **kwargs).images
    theirs["half"] = pipe(prompts, latents=noise, cross_attention_kwargs={"scale": 0.5}, **kwargs).images
    for name in ours:
        assert np.abs(ours[name] - theirs[name]).max() <= 2e-3, name
    for one, other in (("lora", "plain"), ("lora", "half"), ("half", "plain")):
        assert np.abs(ours[one] - ours[other]).max() > 0.02  # it is not a no-op
    with Image.open(tmp_path / "lora" / "0001-base.png") as image:  # beside it, the model without the LoRA
        np.testing.assert_allclose(np.asarray(image) / 255, ours["plain"][1], atol=1.5 / 255)


def test_a_threshold_that_no_step_reaches(tiny_model, caplog):
    """Few steps may have none above the usual threshold: said, unless there is to be no schedule."""
    for changes, warned in (({"steps": 5}, True), ({"steps": 5, "t_thresh": 1000}, False), ({"steps": 20}, False)):
        caplog.clear()
        asked = sample_settings(model=str(tiny_model), **changes)
        sampler.Sampler.build(asked).evaluating(asked).warn_of_no_schedule()
        assert ("t_thresh 900 is above all 5 steps, of which the first is at t=801" in caplog.text) == warned


def test_sample_explore(script, tiny_model, tmp_path, capsys, caplog):
    """One seed under the guidance schedule, a prompt weight, both: each does what it does in training."""
    arguments = [f"--model={tiny_model}", "--prompt=a dog riding a bike", "--steps=20", "--guidance=7", "--seed=3"]
    options = ["--explore", "--w_low=2", "--t_thresh=700", "--weight_range", "3", "3", "--unit=word", "--save_npy"]
    script("sample", *arguments, f"--out={tmp_path / 'x'}", *options)
    said = capsys.readouterr().out
    assert "guidance: 2 in the first 6 of 20 steps, then 7" in said  # 951, 901, ... 701
    names = ("", "-schedule", "-weights", "-both")
    pictures = {name: np.asarray(Image.open(tmp_path / "x" / f"0000{name}.png"), int) for name in names}
    with Image.open(tmp_path / "x" / "grid.png") as grid:
        assert grid.size[0] > 4 * 128 > grid.size[1] * 2
    options = ["--samplers", "--w_low=2", "--t_thresh=0"]  # scheduled: low in all steps
    script("sample", *arguments, f"--out={tmp_path / 'plain'}", "--save_npy", *options)
    found = {path.stem: np.asarray(Image.open(path), int) for path in (tmp_path / "plain").glob("0*.png")}
    assert found.keys() == {"0000", "0000-low", "0000-schedule"}
    np.testing.assert_array_equal(found["0000-low"], found["0000-schedule"])
    assert np.abs(found["0000-low"] - found["0000"]).max() > 2
    plain, asked = (np.load(tmp_path / folder / "images.npy") for folder in ("plain", "x"))
    np.testing.assert_array_equal(plain, asked)
    for one in names:
        for other in names:
            assert one == other or np.abs(pictures[one] - pictures[other]).max() > 2, (one, other)
    assert not caplog.text


@pytest.mark.slow
def test_exploration_of_nothing_changes_nothing(script, tiny_model, tmp_path):
    """A threshold that no step reaches, and weights of 1."""
    arguments = [f"--model={tiny_model}", "--prompt=a dog riding a bike", "--steps=20", "--guidance=7", "--seed=3"]
    script("sample", *arguments, f"--out={tmp_path}", "--explore", "--t_thresh=1000", "--weight_range", "1", "1")
    plain = np.asarray(Image.open(tmp_path / "0000.png"))
    for name in ("-schedule", "-weights", "-both"):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / f"0000{name}.png")), plain)


@pytest.mark.parametrize("scope, draws", [(None, 4), ("prompt", 2)])
def test_sample_explores_images_or_prompts(tiny_model, scope, draws):
    """Two images of each of two prompts: a draw of Eq. 8 each, or one for both."""
    built = sampler.Sampler.build(sample_settings(model=str(tiny_model), scope=scope))
    prompts, rows = PromptSet("sample", ("a dog", "a zebra"), (("dog",), ("zebra",))), np.array([0, 0, 1, 1])
    cond = jax.tree.map(lambda x: x[rows], built.encode(prompts))
    _, words = built.reweighted(prompts, rows, cond, seed=0)
    assert len(set(words)) == draws and (words[0] == words[1]) == (words[2] == words[3]) == (draws == 2)


def sample_settings(**flags):
    """What scripts/sample.py samples by, with these flags and no others."""
    usual = dict.fromkeys([*settings.SAMPLED, "seed"]) | {
        "lora": None,
        "checkpoint": None,
        "lora_scale": None,
        "batch": 16,
        "num_images": 1,
        "out": "out",
    }
    return sample_flags.settings_of(Namespace(**usual | flags))


def test_sample_with_another_scheduler(tiny_model):
    """--scheduler KEY=VALUE is the config's model.scheduler.KEY, which the model is loaded with."""
    said = ["timestep_spacing=trailing", "set_alpha_to_one=False", "steps_offset=0"]
    config = sample_settings(model=str(tiny_model), scheduler=said)
    overrides = config.model.scheduler.overrides
    assert overrides == {"timestep_spacing": "trailing", "set_alpha_to_one": False, "steps_offset": 0}
    loaded = load_pipeline(config.model.path, weights=False, **sampler.pipeline_options(config))
    assert loaded.process.timesteps(4).tolist() == [999, 749, 499, 249]
    for wrong, message in (
        ("x=1", "wants KEY=VALUE; accepted: clip_sample, prediction_type, "),
        ("steps_offset", "wants KEY=VALUE"),
        ("set_alpha_to_one=2.5", "the value is of another type"),
    ):
        with pytest.raises(InputError, match=f"^--scheduler {wrong}: {message}"):
            sample_settings(model="no/such", scheduler=[wrong])
    with pytest.raises(InputError, match="model.scheduler.steps_offset=True: wants 0..1000"):
        sample_settings(model="no/such", scheduler=["steps_offset=true"])
    with pytest.raises(InputError, match="model.scheduler.timestep_spacing='odd': accepted: None, leading, trailing"):
        sample_settings(model="no/such", scheduler=["timestep_spacing=odd"])


def steps_guidance_eta(config):
    return config.eval_sampling.steps, config.eval_sampling.guidance, config.eval_sampling.eta


def test_sample_by_the_settings_of_the_run(workdir, tiny_model, lora, tmp_path):
    """Of --lora RUN: its model, steps, guidance and eta, unless a flag says otherwise; of a LoRA file the defaults."""
    config = sample_settings(lora=str(workdir))
    assert steps_guidance_eta(config) == (4, 3.0, 0.0)
    assert config.model.path == str(tiny_model) and config.exploration.t_thresh == 500
    assert config.sampling.negative_prompt == ""
    assert sample_settings(negative_prompt="a, b").sampling.negative_prompt == "a, b"
    with pytest.raises(InputError, match="^--negative_prompt ' ': wants words"):
        sample_settings(negative_prompt=" ")
    config = sample_settings(lora=str(workdir), steps=7, eta=0.5, w_low=2.0, weight_range=[1.0, 3.0])
    assert steps_guidance_eta(config) == (7, 3.0, 0.5)
    assert config.exploration.w_low == 2.0 and config.exploration.weight_range == (1.0, 3.0)
    save_lora(tmp_path / "l.safetensors", lora, alpha=4.0)
    config = sample_settings(lora=str(tmp_path / "l.safetensors"))
    assert steps_guidance_eta(config) == (50, 7.5, 0.0)
    assert config.model.path == "emoji" and config.model.dtype == "float32"


FLAGS = ("image_size", "steps", "guidance", "eta", "seed", "w_low", "t_thresh", "batch", "num_images")


@pytest.mark.parametrize("flag", [*FLAGS, "weight_range"])
def test_flags_of_sample_that_make_no_sense(flag):
    """Negative, zero where that is nothing, not finite, absurdly large; before a model is looked for."""
    whole = flag not in ("guidance", "eta", "w_low", "weight_range")
    values = [-1, 10**30] if whole else [-1.0, 1e30, np.nan, np.inf]
    values += [0] if flag in ("image_size", "steps", "batch", "num_images") else []
    for value in values:
        given = [value, value] if flag == "weight_range" else value
        with pytest.raises(InputError, match=f"^--{flag} .*: wants [^\n]*$"):
            sample_settings(model="no/such", **{flag: given})


def test_a_line_of_a_file_is_an_image(tmp_path):
    """Also a line that is there twice; and any text goes through prompts.csv to scripts/score.py."""
    sample, score = (vars(program) for program in (cli_sample, cli_score))
    (tmp_path / "p.txt").write_text("a dog\na cat\na dog\n")
    odd = 'a "big" dog,\nin\u2028rain'
    texts = sample["chosen_prompts"](argparse.Namespace(prompt=[odd], prompts=str(tmp_path / "p.txt"))).texts
    assert texts == (odd, "a dog", "a cat", "a dog")
    args, images = argparse.Namespace(out=tmp_path / "x", save_npy=False), np.zeros((4, 8, 8, 3), np.float32)
    sample["write"](args, [sample["Variant"]("", texts, None, None, None)], texts, [images])
    paths = score["find_images"]([tmp_path / "x"])
    assert score["known_prompts"](None, paths) == list(texts)
    with pytest.raises(InputError, match=r"^--prompt: .* holds U\+DCFF, half a character"):
        sample["chosen_prompts"](argparse.Namespace(prompt=["a \udcff dog"], prompts=None))


def test_more_images_than_fit_in_memory(script, fails, tiny_model, tmp_path, monkeypatch):
    """Said before the prompts are encoded: 16 x 16 pixels are 3,840 bytes an image."""
    monkeypatch.setattr(backend, "host_memory", lambda: 1_000_000)
    given = [f"--model={tiny_model}", "--prompt=a dog", "--num_images=131", f"--out={tmp_path / 'x'}"]
    said = fails(2, script, "sample", *given)
    assert "131 images would take at least 0.0 GiB" in said and "wants at most 130 at once, half of it" in said


@pytest.mark.slow
def test_several_images_of_a_prompt(script, tiny_model, tmp_path):
    """As many as --num_images says or, of one prompt, as there are latents; each with its own noise, and its prompt."""
    latents = np.random.default_rng(0).standard_normal((3, 8, 8, 4)).astype(np.float32)
    np.save(tmp_path / "x.npy", latents)
    common = [f"--model={tiny_model}", "--steps=3", "--save_npy"]
    script("sample", *common, "--prompt=a dog", f"--latents={tmp_path / 'x.npy'}", f"--out={tmp_path / 'one'}")
    images = np.load(tmp_path / "one" / "images.npy")
    assert len(images) == 3 and np.abs(images[0] - images[1]).max() > 0.02
    script("sample", *common, "--prompt=a dog", "--prompt=a cat", "--num_images=2", f"--out={tmp_path / 'two'}")
    assert len(np.load(tmp_path / "two" / "images.npy")) == 4
    with open(tmp_path / "two" / "prompts.csv", newline="") as file:
        rows = list(csv.reader(file))
    names = [f"{i:04d}.png" for i in range(4)]
    expected = zip(names, ["a dog"] * 2 + ["a cat"] * 2, strict=True)
    assert rows == [["image", "prompt"], *map(list, expected)]


def test_samples_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """A disk that is full halfway through a file leaves the one that was there."""
    script = vars(cli_sample)
    variant = script["Variant"]("", ["a dog"], None, None, None)

    def sample(value):
        images = np.full((1, 16, 16, 3), value, np.float32)
        script["write"](Namespace(out=str(tmp_path), save_npy=True), [variant], ["a dog"], [images])

    def half(self, path, **kwargs):
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    sample(0.0)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(InputError, match="cannot be written .No space left on device"):
        sample(1.0)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_a_grid_shows_of_many():
    shown_rows = vars(cli_sample)["shown_rows"]
    assert shown_rows(5, 4).tolist() == [0, 1, 2, 3, 4]
    assert len(shown_rows(135, 4)) == 12 and shown_rows(135, 2)[[0, -1]].tolist() == [0, 134]
    assert len(shown_rows(500, 1)) == 64


def test_sample_explores_as_training_does(tiny_model):
    """Without flags by the numbers of configs/base.py."""
    usual, e = sample_settings(model=str(tiny_model)).exploration, base.default().exploration
    names = ("w_low", "t_thresh", "weight_range", "unit", "scope")
    assert {name: getattr(usual, name) for name in names} == {name: e[name] for name in names}
    assert (e.w_low, e.t_thresh) == (1.0, 900)
