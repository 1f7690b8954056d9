"""Bad input, made by mutating good input: a valid result or one InputError line; nothing else, no hang, bounded memory.

The functions behind the command line, in this process: a few inputs of each kind, thousands with `-m slow`; and a
sample through the real programs.
"""

import contextlib
import csv
import io
import json
import pickle
import resource
import shutil
import signal
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file, save_file

from diffexp_jax import command
from diffexp_jax.cli import score as cli_score
from diffexp_jax.cli import train as cli_train
from diffexp_jax.errors import InputError
from diffexp_jax.experiment import check_files
from diffexp_jax.formats.files import Weights, read_json
from diffexp_jax.formats.pickles import open_checkpoint
from diffexp_jax.formats.pictures import read_picture
from diffexp_jax.models import blip, clip_config, open_clip, unet_config, vae
from diffexp_jax.models.classifier import ClassifierConfig
from diffexp_jax.models.lora import init_lora, load_lora, save_lora
from diffexp_jax.pipelines import families, load_pipeline, single_file, stable_diffusion
from diffexp_jax.prompts import load_prompts
from diffexp_jax.prompts.files import read_named_prompts
from diffexp_jax.rewards import processor
from diffexp_jax.rewards.host import host_reward
from diffexp_jax.sampling import ddim, flow
from diffexp_jax.settings import check_config, cpu_devices, default_config, read_config
from tests.conftest import INDEX, ROOT, SCHEDULER, TOWER, UNET, VAE, VISION, as_flags, nonzero_lora
from tests.test_command_line import run_program
from tests.test_structure import KEYS

EXAMPLES = pytest.mark.parametrize("examples", [15, pytest.param(300, marks=pytest.mark.slow)])
MOST_GROWTH = 512 * 2**20  # bytes of memory, over all examples of a test
PATIENCE = 60  # seconds after which an example hangs


def fuzz(strategy: st.SearchStrategy, check: Callable, examples: int) -> None:
    """check(example) returns, or raises an InputError of one line, for so many examples: the same ones each time."""

    @settings(max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=HealthCheck)
    @given(strategy)
    def run(example):
        before = signal.signal(signal.SIGALRM, hangs)
        signal.alarm(PATIENCE)
        try:
            check(example)
        except InputError as error:
            line = command.one_line(error)
            assert line != "InputError" and line.isprintable(), error
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pictures that are very large
        run()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most < MOST_GROWTH / 1024


def hangs(number, frame):
    raise AssertionError("an example hangs")


# ----------------------------------------------------------------------------------------------------------- mutations


def changed(content: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    """The bytes after some changes; a place is a fraction of the length."""
    for kind, place, other in changes:
        at = int(place * len(content))
        span = max(len(other), 1)
        content = {
            "cut": lambda c, at, other, span: c[:at],
            "drop": lambda c, at, other, span: c[:at] + c[at + span :],
            "insert": lambda c, at, other, span: c[:at] + other + c[at:],
            "replace": lambda c, at, other, span: c[:at] + other + c[at + span :],
            "repeat": lambda c, at, other, span: c[: at + 8 * span] + c[at:],
            "flip": lambda c, at, other, span: c[:at] + bytes([c[at] ^ (1 << span % 8)]) + c[at + 1 :] if c else c,
        }[kind](content, min(at, max(len(content) - 1, 0)), other, span)
    return content


PIECES = [b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"'", b"\r", b"\n\n", b"\t", b",", b"[", b"{", b"-1", b"1e999"]
PIECES += [b"99999999999999999999", b"NaN", b"null", b"true", b"\xf0\x9f\x98\x80", b"a" * 5000, b"[" * 3000]
KINDS = st.sampled_from(["cut", "drop", "insert", "replace", "repeat", "flip"])
# Places near the beginning, where headers are, as often as elsewhere
PLACES = st.floats(0.0, 1.0) | st.floats(0.0, 0.02)
CHANGES = st.lists(st.tuples(KINDS, PLACES, st.sampled_from(PIECES) | st.binary(max_size=9)), min_size=1, max_size=4)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([10**400, -1, 2**63]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


# ------------------------------------------------------------------------------------------------------------- settings


@EXAMPLES
def test_config_json(examples, tmp_path):
    """Keys with any values, keys that there are not, and broken text."""
    good = default_config().to_dict()
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
        config, _ = read_config(tmp_path / "config.json")
        check_config(config)
        cpu_devices(config)

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
    algorithms = st.sampled_from(["ddpo", "dpok", "alignprop", "draft"])

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
                check_config(config)
                cpu_devices(config)
                check_files(config, weights=False)
                load_prompts(config.prompts)
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


# -------------------------------------------------------------------------------------------------------------- weights


@pytest.fixture(scope="module")
def base(tiny_model):
    return load_pipeline(tiny_model).base


@EXAMPLES
def test_lora_files(examples, base, tmp_path):
    path = tmp_path / "l.safetensors"
    save_lora(path, nonzero_lora(init_lora(jax.random.key(0), base, rank=2)), alpha=2.0)
    good = path.read_bytes()
    size = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + size])
    adapters = st.fixed_dictionaries({"unet.lora_alpha": VALUES, "unet.alpha_pattern": VALUES, "unet.r": VALUES})
    names = st.lists(st.tuples(st.sampled_from(sorted(header)), st.text(max_size=30)), max_size=2)

    def read(example):
        adapter, renamed, changes = example
        entries = dict(header)
        if adapter is not None:
            entries["__metadata__"] = {"lora_adapter_metadata": json.dumps(adapter)}
        for old, new in renamed:
            entries[new] = entries.pop(old, {})
        text = json.dumps(entries).encode()
        content = len(text).to_bytes(8, "little") + text + good[8 + size :]
        path.write_bytes(changed(content, changes))
        lora, scale = load_lora(path, base)
        assert np.isfinite(scale) and all(np.isfinite(x).all() for x in jax.tree.leaves(lora))

    fuzz(st.tuples(st.none() | adapters, names, CHANGES | st.just([])), read, examples)


@pytest.fixture(scope="module")
def dialects(base, tmp_path_factory) -> dict[str, Path]:
    """Folders with the same LoRA as other programs write it."""
    torch = pytest.importorskip("torch")
    root = tmp_path_factory.mktemp("dialects")
    save_lora(
        root / "diffusers" / "pytorch_lora_weights.safetensors", init_lora(jax.random.key(0), base, rank=2), alpha=2.0
    )
    tensors = load_file(root / "diffusers" / "pytorch_lora_weights.safetensors")
    tensors = {name.removeprefix("unet."): x + np.float32(0.1) for name, x in tensors.items()}
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {}, "alpha_pattern": {"to_k": 3}}
    for name, suffix in (("peft", ""), ("named", ".default")):
        (root / name).mkdir()
        renamed = {f"base_model.model.{k.removesuffix('.weight')}{suffix}.weight": x for k, x in tensors.items()}
        save_file(renamed, root / name / "adapter_model.safetensors")
        (root / name / "adapter_config.json").write_text(json.dumps(settings))
    kohya = {
        "lora_unet_" + k.replace(".lora_A", "#lora_down").replace(".lora_B", "#lora_up").replace(".", "_"): x
        for k, x in tensors.items()
    }
    kohya = {k.replace("#", ".").replace("_weight", ".weight"): x for k, x in kohya.items()}
    (root / "kohya").mkdir()
    save_file(kohya, root / "kohya" / "style.safetensors")
    for name, zipped in (("pickled", True), ("legacy", False)):
        (root / name).mkdir()
        state = {k: torch.from_numpy(x) for k, x in tensors.items()}
        torch.save(state, root / name / "pytorch_lora_weights.bin", _use_new_zipfile_serialization=zipped)
    for folder in root.iterdir():
        load_lora(folder, base)
    return {folder.name: folder for folder in root.iterdir()}


@EXAMPLES
def test_lora_folders(examples, base, dialects, tmp_path):
    """Damaged tensors, settings and names of every dialect, given as a folder or as a file."""
    keys = st.sampled_from(["r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias", "x"])

    def read(example):
        name, changes, settings, broken, direct, other = example
        folder = tmp_path / "x"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(dialects[name], folder)
        weights = next(path for path in folder.iterdir() if path.suffix != ".json")
        weights.write_bytes(changed(weights.read_bytes(), changes))
        if (file := folder / "adapter_config.json").is_file():
            content = json.loads(file.read_text()) | settings
            file.write_bytes(changed(json.dumps(content).encode(), broken))
        if other:
            weights = weights.rename(folder / other)
        lora, scale = load_lora(weights if direct else folder, base)
        assert np.isfinite(scale) and all(np.isfinite(x).all() for x in jax.tree.leaves(lora))

    names = st.sampled_from(["", "", "adapter_model.bin", "x.safetensors", "x.ckpt", "x"])
    changes = CHANGES | st.just([])
    example = (st.sampled_from(sorted(dialects)), changes, st.dictionaries(keys, VALUES, max_size=2), changes)
    fuzz(st.tuples(*example, st.booleans(), names), read, examples)


@EXAMPLES
def test_single_files(examples, tmp_path):
    """What a damaged or odd file is taken for, by its names and a few tensors."""
    path = tmp_path / "x.safetensors"
    unet, one = "model.diffusion_model.", np.ones((1, 1), np.float32)
    names = [f"{unet}out.2.bias", "first_stage_model.x", "vae.x", "global_step", "v_pred", "ztsnr", "control_model.x"]
    names += [
        "cond_stage_model.model.x",
        "cond_stage_model.transformer.x",
        "conditioner.embedders.1.model.x",
        "decoder.x",
    ]
    names += ["conditioner.embedders.0.transformer.x", "x.lora_A.weight", "down_blocks.0.x", "model_ema.x"]
    shapes = st.sampled_from([(), (2,), (2, 4, 3, 3), (2, 9, 3, 3), (0, 4)])

    def read(example):
        first, chosen, shape, said, changes = example
        tensors = {name: np.zeros(shape) for name in chosen} | {f"{unet}input_blocks.0.0.weight": np.zeros(first)}
        save_file(tensors | {"other": one}, path, {"modelspec.prediction_type": said})
        path.write_bytes(changed(path.read_bytes(), changes))
        single_file.read(path)

    said = st.sampled_from(["v", "epsilon", "", "x"])
    chosen = st.sets(st.sampled_from(names), max_size=6)
    fuzz(st.tuples(shapes, chosen, shapes, said, CHANGES | st.just([])), read, examples)


@EXAMPLES
def test_safetensors_headers(examples, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": np.arange(6.0).reshape(2, 3), "b": np.zeros(0, np.float16), "c": np.array(1)}, path)
    good = path.read_bytes()
    size = int.from_bytes(good[:8], "little")
    numbers = st.integers(-(2**65), 2**65) | st.integers(-1, 100)
    entry = st.fixed_dictionaries(
        {"dtype": st.sampled_from(["F32", "F64", "BF16", "F8_E4M3", "BOOL", "I64", "X", ""]) | VALUES}
        | {"shape": st.lists(numbers, max_size=3) | VALUES, "data_offsets": st.lists(numbers, max_size=3) | VALUES}
    )

    def read(example):
        entries, length, changes = example
        text = json.dumps(json.loads(good[8 : 8 + size]) | entries).encode()
        length = len(text) if length is None else length
        path.write_bytes(changed(length.to_bytes(8, "little") + text + good[8 + size :], changes))
        weights = Weights([path])
        assert all(isinstance(x, np.ndarray) for x in weights.values())

    lengths = st.none() | st.integers(0, 2**64 - 1)
    entries = st.dictionaries(st.sampled_from(["a", "b", "c", "", "__metadata__"]), entry | VALUES, max_size=2)
    fuzz(st.tuples(entries, lengths, CHANGES | st.just([])), read, examples)


def pickled(folder: Path) -> dict[str, bytes]:
    """Checkpoints as torch writes them, in both forms, and pickles of other things."""
    torch = pytest.importorskip("torch")
    tensors = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.zeros(0, 2), "c": torch.ones(3).bfloat16()}
    files = {}
    for name, zipped in (("zip", True), ("legacy", False)):
        torch.save({"state_dict": tensors, "epoch": 3}, folder / name, _use_new_zipfile_serialization=zipped)
        files[name] = (folder / name).read_bytes()
    files["list"] = pickle.dumps([1, {"a": 2.0}, b"x"])
    return files


@EXAMPLES
def test_pickles(examples, tmp_path):
    files = pickled(tmp_path)
    path = tmp_path / "x.pt"

    def read(example):
        name, inner, changes = example
        content = files[name]
        if inner and name == "zip":  # the pickle in the archive, whose checksum is then right
            old, new = zipfile.ZipFile(io.BytesIO(content)), io.BytesIO()
            with zipfile.ZipFile(new, "w") as archive:
                for info in old.infolist():
                    data = old.read(info)
                    archive.writestr(info.filename, changed(data, changes) if info.filename.endswith(".pkl") else data)
            path.write_bytes(new.getvalue())
        else:
            path.write_bytes(changed(content, changes))
        tensors = open_checkpoint(path)
        assert all(np.asarray(x).size < 10**6 for x in tensors.values())

    fuzz(st.tuples(st.sampled_from(["zip", "legacy", "list"]), st.booleans(), CHANGES), read, examples)


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
    content = json.dumps(default_config().to_dict()).encode()
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
