"""Bad input, made by mutating good input: a valid result or one InputError line; nothing else, no hang, bounded memory.

The functions behind the command line, in this process: a few inputs of each kind, thousands with `-m slow`; and a
sample through the real programs.
"""

import contextlib
import csv
import io
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from diffexp_jax.algorithms import METHODS
from diffexp_jax.chosen_rewards import check_files
from diffexp_jax.cli import score as cli_score
from diffexp_jax.cli import train as cli_train
from diffexp_jax.formats.files import read_json
from diffexp_jax.formats.pictures import read_picture
from diffexp_jax.models import blip, clip_config, open_clip, unet_config, vae
from diffexp_jax.models.classifier import ClassifierConfig
from diffexp_jax.models.lora import init_lora, save_lora
from diffexp_jax.pipelines import families, stable_diffusion
from diffexp_jax.prompts import load_prompts
from diffexp_jax.prompts.files import read_named_prompts
from diffexp_jax.rewards import processor
from diffexp_jax.rewards.host import host_reward
from diffexp_jax.sampling import ddim, flow
from diffexp_jax.settings import Settings, as_dict, checked, cpu_devices, parsed, read_config
from tests.support import ROOT
from tests.support.fuzz import CHANGES, EXAMPLES, PATIENCE, VALUES, changed, fuzz
from tests.support.runs import run_program
from tests.support.settings import KEYS
from tests.support.tiny import INDEX, SCHEDULER, TOWER, UNET, VAE, VISION, as_flags, nonzero_lora

# ------------------------------------------------------------------------------------------------------------- settings


@EXAMPLES
def test_config_json(examples, tmp_path):
    """Keys with any values, keys that there are not, and broken text."""
    good = as_dict(Settings())
    good["algorithm"] = "ddpo"

    def write(example):
        values, changes = example
        content = json.loads(json.dumps(good))
        for key, value in values.items():
            *sections, leaf = key.split(".")
            section = content
            for name in sections:
                section = section.setdefault(name, {}) if isinstance(section, dict) else {}
            if isinstance(section, dict):
                section[leaf] = value
        text = json.dumps(content)
        (tmp_path / "config.json").write_bytes(changed(text.encode(), changes))
        settings, _ = read_config(tmp_path / "config.json")
        checked(settings)
        cpu_devices(parsed(settings))

    keys = st.sampled_from(sorted(KEYS)) | st.text(max_size=8)
    fuzz(st.tuples(st.dictionaries(keys, VALUES, max_size=3), CHANGES | st.just([])), write, examples)


WORDS = st.sampled_from(["", "nan", "-inf", "1e999", "None", "True", "()", "(1,", "[[]]", "{}", "a.csv:b", "jax:", "+"])
WORDS |= st.sampled_from(["textnorm(", "textnorm(textnorm(x))", "prompt:", "python:os:system", "animals", "0" * 5000])
WORDS |= st.sampled_from(
    ["gs://b/x", "file:///x", "~", "~nobody/x", "hub:", "hub:a/b", "pickscore:hub:a/b", "aesthetic:~/x"]
)
WORDS |= st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12) | VALUES.map(repr)


@EXAMPLES
def test_flags(examples, monkeypatch, tmp_path):
    """--config.KEY=VALUE with anything; what is accepted is looked up as a run does before it loads weights."""
    monkeypatch.chdir(tmp_path)
    algorithms = st.sampled_from([*METHODS])

    def parse(example):
        algorithm, values = example
        flags = [f"--config.{key}={value}" for key, value in values.items()]
        if any("\0" in flag for flag in flags):
            return  # no command line can have it
        argv = ["train", f"--config={ROOT / 'configs' / f'{algorithm}.py'}", *flags]
        said = io.StringIO()
        try:
            with flagsaver.flagsaver(), contextlib.redirect_stderr(said):
                cli_train.parse_flags(argv)
                config = cli_train._CONFIG.value
                settings = checked(config)
                cpu_devices(parsed(settings))
                check_files(settings, weights=False)
                load_prompts(settings.prompts)
        except SystemExit as stop:
            assert stop.code == 2 and len(said.getvalue().strip().splitlines()) == 1, said.getvalue()

    fuzz(st.tuples(algorithms, st.dictionaries(st.sampled_from(sorted(KEYS)), WORDS, max_size=3)), parse, examples)


# -------------------------------------------------------------------------------------------------------------- prompts

PROMPT_FILES = {
    ".txt": 'a dog\na "cat"\n\n a zebra, running \na dog\n',
    ".csv": 'Prompt,Category\n"a dog, big",Colors\na cat,"Te""xt"\n',
    ".tsv": 'Prompt\tCategory\n"a ""dog"""\tColors\na cat\tText\n',
    ".json": '["a dog", {"prompt": "a cat", "count": 2}]',
    ".jsonl": '{"prompt": "a dog", "tags": ["x", null]}\n"a cat"\n',
    ".CSV": 'prompt\na dog, riding a bike\n"a cat, ""asleep"""\n"a\ncow"\n',
    ".TSV": '\ufeffid\tprompts\r\n1\ta dog\r\n2\t"a cat"\r\n',
}
CELLS = st.text(st.sampled_from("ab ,\"'\n\r\t;\\\v\u2028\x00é😀"), max_size=8)


@EXAMPLES
def test_tables_of_prompts_go_round(examples, tmp_path):
    """What csv writes is read as it was, whatever the cells hold."""

    def goes_round(example):
        rows, named = example
        with open(tmp_path / "p.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(named.items())
        assert read_named_prompts(tmp_path / "p.csv") == {k: x for k, x in named.items() if (k + x).strip()}
        with open(tmp_path / "q.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("n", "prompt"), *((str(n), text) for n, text in enumerate(rows))])
        kept = [" ".join(text.split()) for text in rows]
        if any(kept):
            assert load_prompts(tmp_path / "q.csv").texts == tuple(text for text in kept if text)

    fuzz(st.tuples(st.lists(CELLS, max_size=4), st.dictionaries(CELLS, CELLS, max_size=4)), goes_round, examples)


@EXAMPLES
def test_prompt_files(examples, tmp_path):
    def read(example):
        suffix, filtered, changes = example
        path = tmp_path / f"p{suffix}"
        path.write_bytes(changed(PROMPT_FILES[suffix].encode(), changes))
        found = load_prompts(f"{path}{filtered}")
        assert len(found) and all(text == " ".join(text.split()) and text for text in found.texts)
        assert len(found.phrases) == len(found.ids) == len(found) and "".join(found.texts).encode()
        assert all(
            phrase in text for text, phrases in zip(found.texts, found.phrases, strict=True) for phrase in phrases
        )

    filters = st.sampled_from(["", "", ":Category=Colors|Text", ":category=", ":=", ":x=y"])
    fuzz(st.tuples(st.sampled_from(sorted(PROMPT_FILES)), filters, CHANGES), read, examples)


# -------------------------------------------------------------------------------------------------------------- rewards

NUMBERS = st.lists(st.floats(width=32) | st.integers(-9, 9), min_size=2, max_size=2)
ARRAYS = st.builds(
    lambda shape, dtype: np.full(shape, 1, dtype),
    st.sampled_from([(2,), (2, 1), (), (3,), (0,)]),
    st.sampled_from(["f2", "f8", "i1", "u8", "?", "c8", "U3", "O", "M8[s]", "m8[s]", "V2"]),
)
INFO = st.dictionaries(st.text(max_size=5) | st.integers(), VALUES | NUMBERS | ARRAYS, max_size=3)


@EXAMPLES
def test_what_rewards_return(examples):
    """Anything: numbers for the images and their means, or one line."""

    def score(returned):
        reward = host_reward(lambda images, prompts: returned, "python:m:f", timeout=PATIENCE, workers=1)
        scores, parts = reward.start(np.zeros((2, 1, 1, 3), np.uint8), reward.tokenize(["a", "b"]))()
        for x in (scores, *parts.values()):
            assert x.shape == (2,) and x.dtype == np.float32
        assert np.isfinite(scores).all()
        given = returned[0] if isinstance(returned, tuple) else returned
        np.testing.assert_array_equal(scores, np.asarray(given, np.float32))

    values = VALUES | NUMBERS | ARRAYS
    fuzz(values | st.tuples(values, INFO | VALUES), score, examples)


# -------------------------------------------------------------------------------------------------------------- configs

CONFIGS = {
    "model_index.json": (INDEX, ["_class_name", "force_zeros_for_empty_prompt"]),
    "unet/config.json": (UNET, [*unet_config.KEYS.read, *unet_config.KEYS.only]),
    "vae/config.json": (VAE, [*vae.KEYS.read, *vae.KEYS.only]),
    "text_encoder/config.json": (TOWER, [*clip_config.TEXT_KEYS.read, *clip_config.TEXT_KEYS.only]),
    "scheduler/scheduler_config.json": (SCHEDULER, [*ddim.KEYS.read, *ddim.KEYS.only, *flow.KEYS.read]),
}
SIZES = st.sampled_from([0, 1, 2, 3, 8, 64, 10**8, 10**12, 0.5, 1e-30, [1, 1], [[1], 2], [2, [2]], "64", [4] * 9])


@EXAMPLES
def test_model_configs(examples, tmp_path):
    """The json files of a pipeline's folder: keys with any values, broken text; up to the shapes of its weights."""

    def read(example):
        file, values, changes = example
        for name, (config, _) in CONFIGS.items():
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            text = json.dumps(config | values if name == file else config).encode()
            path.write_bytes(changed(text, changes if name == file else []))
        (tmp_path / "tokenizer").mkdir(exist_ok=True)
        config = families.model_config(*families.read_jsons(tmp_path))
        model = stable_diffusion.build(config)
        steps = model.process.make_steps(model.process.timesteps(2), np.ones(2), eta=1.0)
        assert all(np.isfinite(column).all() for column in steps)
        if examples > 15:
            stable_diffusion.abstract_params(config)

    def of(file):
        keys = st.sampled_from([*CONFIGS[file][1], "_class_name", "_diffusers_version"]) | st.text(max_size=8)
        return st.tuples(st.just(file), st.dictionaries(keys, VALUES | SIZES, max_size=3), CHANGES | st.just([]))

    fuzz(st.sampled_from(sorted(CONFIGS)).flatmap(of), read, examples)


@EXAMPLES
def test_configs_of_rewards(examples, tmp_path):
    """Of a CLIP in both dialects, its preprocessing, a BERT and the judge: up to their sizes."""
    tensors = {"blip.visual_encoder.patch_embed.proj.weight": np.zeros((64, 3, 2, 2), np.float32)}
    tensors |= {"blip.visual_encoder.pos_embed": np.zeros((1, 5, 64), np.float32)}
    tensors |= {f"mlp.layers.{i}.bias": np.zeros(1, np.float32) for i in (0, 2, 4, 6, 7)}
    readers = {
        "clip": (clip_config.CLIPConfig.from_dict, {"text_config": TOWER, "vision_config": VISION}),
        "open_clip": (open_clip.config_of, open_clip.VIT_H_14),
        "bert": (lambda content: blip.config_of(tensors, content, where="x"), TOWER),
        "judge": (ClassifierConfig.from_dict, {"widths": [8, 16]}),
        "processor": (lambda content: processor.statistics(tmp_path, 16), {"size": 16, "crop_size": 16, "resample": 3}),
    }
    keys = [*clip_config.TEXT_KEYS.read, *clip_config.VISION_KEYS.read, *processor.KEYS.read, *processor.KEYS.only]
    keys += [
        *open_clip.KEYS.read,
        *open_clip.VISION_KEYS.read,
        *open_clip.TEXT_KEYS.read,
        "widths",
        "size",
        "crop_size",
    ]
    keys += ["vision_cfg", "text_cfg", "text_config", "vision_config", "text_config_dict"]

    def read(example):
        name, values, inner, changes = example
        reader, good = readers[name]
        content = {**good, **values}
        content = {k: {**v, **inner} if isinstance(v, dict) and k != "size" else v for k, v in content.items()}
        path = tmp_path / "preprocessor_config.json"
        path.write_bytes(changed(json.dumps(content).encode(), changes))
        reader(read_json(path))

    some = st.dictionaries(st.sampled_from(keys) | st.text(max_size=8), VALUES | SIZES, max_size=2)
    fuzz(st.tuples(st.sampled_from(sorted(readers)), some, some, CHANGES | st.just([])), read, examples)


# ------------------------------------------------------------------------------------------------------------- pictures


def pictures() -> dict[str, bytes]:
    """The same picture in several formats and modes, and things that are no pictures under their endings."""
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 7, 3), np.uint8))
    grey, frames = pixels.convert("L"), {"save_all": True, "append_images": [pixels.rotate(180)]}
    sixteen = Image.fromarray(np.arange(63, dtype=np.uint16).reshape(9, 7) * 1000)
    saved = {suffix: (pixels, {}) for suffix in (".png", ".jpg", ".gif", ".bmp", ".webp", ".tif")}
    saved |= {"-rgba.png": (pixels.convert("RGBA"), {}), "-la.png": (grey.convert("LA"), {})}
    saved |= {"-one.png": (pixels.quantize(8), {"transparency": 0}), "-bits.png": (pixels.convert("1"), {})}
    saved |= {"-16.png": (sixteen, {}), "-16.tif": (sixteen, {"compression": "tiff_lzw"})}
    saved |= {"-float.tif": (grey.convert("F"), {}), "-lab.tif": (Image.merge("LAB", pixels.split()), {})}
    saved |= {"-cmyk.jpg": (pixels.convert("CMYK"), {}), "-ycbcr.tif": (pixels.convert("YCbCr"), {})}
    saved |= {f"-frames{suffix}": (pixels, frames) for suffix in (".png", ".gif", ".webp", ".tif")}
    saved |= {"-eps.png": (pixels, {"format": "EPS"}), "-ppm.jpg": (pixels, {"format": "PPM"})}
    found = {}
    for name, (picture, options) in saved.items():
        buffer = io.BytesIO()
        picture.save(buffer, **{"format": Image.registered_extensions()[f".{name.rpartition('.')[2]}"]} | options)
        found[name] = buffer.getvalue()
    return found


@EXAMPLES
def test_image_folders(examples, tmp_path):
    script = vars(cli_score)
    good, table = pictures(), b'image,prompt\n0.png,"a dog, big"\n1.png,a cat\n'

    def read(example):
        suffix, changes, prompts, text_changes = example
        folder = tmp_path / "images"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / f"0{suffix}").write_bytes(changed(good[suffix], changes))
        (folder / "1.png").write_bytes(good[".png"])
        file = folder / f"prompts{prompts}"
        file.write_bytes(changed(table.replace(b"0.png", f"0{suffix}".encode()), text_changes))
        paths = script["find_images"]([folder])
        with contextlib.redirect_stdout(io.StringIO()):
            script["known_prompts"](None if prompts == ".csv" else file, paths)
        assert [path for part in script["batches"](paths, 1) for path in paths[part]] == paths
        for path in paths:
            picture = read_picture(path).pixels
            assert picture.ndim == 3 and picture.shape[2] in (3, 4) and picture.dtype == np.uint8

    changes = CHANGES | st.just([])
    kinds = st.sampled_from([".csv", ".txt", ".json", ".x"])
    fuzz(st.tuples(st.sampled_from(sorted(good)), changes, kinds, changes), read, examples)


# -------------------------------------------------------------------------------------------------------- real programs


def mutations(n: int, strategy: st.SearchStrategy = CHANGES) -> list:
    """n examples of a strategy, the same ones each time."""
    found = []

    @settings(max_examples=n, derandomize=True, database=None, deadline=None, suppress_health_check=HealthCheck)
    @given(strategy)
    def collect(example):
        found.append(example)

    collect()
    return found[-n:]


def broken_input(kind: str, changes: list, folder: Path, clip: Path, lora: bytes) -> dict:
    """Makes a broken file (or flag) of this kind in the folder; the settings of a run that reads it."""
    if kind == "prompts":
        (folder / "p.csv").write_bytes(changed(PROMPT_FILES[".csv"].encode(), changes))
        return {"prompts": folder / "p.csv"}
    if kind == "lora":
        (folder / "l.safetensors").write_bytes(changed(lora, changes))
        return {"lora.path": folder / "l.safetensors"}
    if kind == "reward":
        weights = shutil.copytree(clip, folder / "clip") / "model.safetensors"
        weights.write_bytes(changed(weights.read_bytes(), changes))
        return {"reward": f"pickscore:{folder / 'clip'}"}
    if kind == "flag":
        return {"exploration.weight_range": changed(b"(1.0, 1.5)", changes).decode(errors="ignore").replace("\0", "")}
    (folder / "run" / "checkpoints" / "0").mkdir(parents=True)
    content = json.dumps(as_dict(Settings())).encode()
    (folder / "run" / "config.json").write_bytes(changed(content, changes))
    return {}


@pytest.mark.slow  # thirty programs
def test_the_real_programs(tiny_settings, tiny_clip, base, tmp_path):
    """One line and exit code 2, or a run that ends: never a traceback."""
    save_lora(tmp_path / "l.safetensors", nonzero_lora(init_lora(jax.random.key(0), base, rank=2)), alpha=2.0)
    lora, good, codes = (tmp_path / "l.safetensors").read_bytes(), pictures()[".png"], []
    usual = tiny_settings | {"iterations": 1, "eval.every": 0, "log.images": 0}
    kinds = ["prompts", "lora", "reward", "config", "flag", "images"] * 5
    for n, (kind, changes) in enumerate(zip(kinds, mutations(len(kinds)), strict=True)):
        folder = tmp_path / str(n)
        folder.mkdir()
        if kind == "images":
            (folder / "0.png").write_bytes(changed(good, changes))
            (folder / "p.txt").write_text("a dog\n")
            line = [ROOT / "scripts" / "score.py", f"--reward=pickscore:{tiny_clip}", f"--images={folder}"]
            line += [f"--prompts={folder / 'p.txt'}", f"--out={folder / 'scores.csv'}"]
        else:
            values = usual | broken_input(kind, changes, folder, tiny_clip, lora)
            line = ["-m", "diffexp_jax.train", f"--config={ROOT / 'configs' / 'ddpo.py'}", *as_flags(values)]
            line += [f"--workdir={folder / 'run'}"]
        done = run_program(*line, cwd=folder)
        codes.append(done.returncode)
        assert done.returncode in (0, 2) and "Traceback" not in done.stderr, f"{kind} {changes}\n{done.stderr}"
        said = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
        assert len(said) == (done.returncode == 2), done.stderr
    assert {0, 2} <= set(codes)
