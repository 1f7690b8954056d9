"""Bad input as in test_fuzz.py for files of weights: safetensors, LoRAs of each dialect, pickles."""

import io
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from diffexp_jax.formats.files import Weights
from diffexp_jax.formats.pickles import open_checkpoint
from diffexp_jax.models.lora import init_lora, load_lora, save_lora
from diffexp_jax.pipelines import single_file
from tests.support.fuzz import CHANGES, EXAMPLES, VALUES, changed, fuzz
from tests.support.tiny import nonzero_lora


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
