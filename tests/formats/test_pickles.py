"""PyTorch's pickled checkpoints, read without torch: what torch wrote comes back, and what is hostile does not run."""

import builtins
import io
import os
import pickle
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from diffexp_jax.errors import InputError
from diffexp_jax.formats import pickle_steps, pickles
from diffexp_jax.formats.pickles import open_checkpoint
from diffexp_jax.rewards import aesthetic

torch = pytest.importorskip("torch")


def tensors():
    x = torch.arange(24.0).reshape(4, 6)
    return {
        "transposed": x.T[1:, ::2],  # shares its storage, with an offset and strides
        "bfloat16": x.bfloat16(),
        "half": torch.nn.Parameter(x.half()),
        "ids": torch.arange(5),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3.0),
    }


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"state_dict": x, "epoch": 3, "optimizer": {"lr": 0.1}}])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_what_torch_saves(tmp_path, zipped, wrap, prefix):
    path, written = tmp_path / "model.pt", {prefix + name: x for name, x in tensors().items()}
    torch.save(wrap(written), path, _use_new_zipfile_serialization=zipped)
    read = open_checkpoint(path)
    assert set(read) == set(tensors())
    for name, value in read.items():
        expected = written[prefix + name].detach()
        assert str(value.dtype) == str(expected.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(np.asarray(value, np.float64), expected.double().numpy(), err_msg=name)


def test_a_module_s_state_dict(tmp_path):
    """With the `_metadata` that torch hangs on it, and by data-parallel names."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    torch.save(torch.nn.DataParallel(model).state_dict(), tmp_path / "model.pth")
    read = open_checkpoint(tmp_path / "model.pth")
    assert list(read) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    np.testing.assert_array_equal(read["0.weight"], model[0].weight.detach())


def test_safetensors_too(tmp_path):
    save_file({"a": np.arange(3)}, tmp_path / "a.safetensors")
    np.testing.assert_array_equal(open_checkpoint(tmp_path / "a.safetensors")["a"], np.arange(3))


# -------------------------------------------------------------------------------------------------------- hostile files


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Built(Call):
    """The same with a state for what comes out."""

    def __reduce__(self):
        return *self.call, {"x": 1}


def touch(path):
    return Call(os.system, f"touch {path}")


HOSTILE = {
    "os.system": touch,
    "nested": lambda path: {"state_dict": {"w": [1, (touch(path),)]}},
    "eval": lambda path: Call(eval, f"__import__('pathlib').Path({str(path)!r}).touch()"),
    "exec": lambda path: Call(exec, f"open({str(path)!r}, 'w')"),
    "open": lambda path: Call(open, str(path), "w"),
    "getattr": lambda path: Call(Call(getattr, os, "system"), f"touch {path}"),
    "getattr of an allowed one": lambda path: Call(getattr, torch._utils._rebuild_tensor_v2, "__globals__"),
    "import": lambda path: Call(builtins.__import__, "os"),
    "torch's own loader": lambda path: Call(torch.storage._load_from_bytes, b"x"),
    "numpy": lambda path: np.zeros(3),
    "state": lambda path: Built(os.system, f"touch {path}"),
}


def zipped(content: bytes, path: Path, entries=()):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in ({"archive/data.pkl": content} | dict(entries)).items():
            archive.writestr(name, data)


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("kind", ["zip", "legacy", "bare"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_hostile_pickles_are_refused(tmp_path, name, kind, protocol):
    path, payload = tmp_path / "evil.pt", tmp_path / "ran"
    try:
        content = pickle.dumps(HOSTILE[name](payload), protocol)
    except (pickle.PicklingError, TypeError):  # getattr's first argument is a module
        content = b"cbuiltins\ngetattr\n(cos\nsystem\nX\x08\x00\x00\x00__call__tR."
    if kind == "zip":
        zipped(content, path)
    elif kind == "legacy":
        start = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
        path.write_bytes(b"".join(pickle.dumps(x, 2) for x in start) + content)
    else:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        open_checkpoint(path)
    message = str(error.value)
    assert message.startswith(f"{path}: refused: it asks for ") and "\n" not in message
    assert not payload.exists()


def stacked(*operations: bytes) -> bytes:
    return b"\x80\x02" + b"".join(operations) + b"."


REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"


@pytest.mark.parametrize(
    "content",
    [
        stacked(REBUILD, b"}X\x01\x00\x00\x00xK\x01sb"),  # a state for the function
        stacked(REBUILD, b"N}X\x09\x00\x00\x00_functionK\x01s\x86b"),  # the same as slots
        stacked(REBUILD, b")\x81"),  # taken for a class
        stacked(b"}X\x01\x00\x00\x00w", REBUILD, b"(", STORAGE, b"K\x00K\x05\x85K\x01\x85\x89Nt", b"Rs"),  # 5 of 4
        stacked(b"}X\x01\x00\x00\x00w", REBUILD, b"(", STORAGE, b"K\x02K\x03\x85K\x01\x85\x89Nt", b"Rs"),  # 2..4 of 4
        stacked(b"}X\x01\x00\x00\x00w", REBUILD, b"(", STORAGE, b"J\xff\xff\xff\xffK\x01\x85K\x01\x85\x89Nt", b"Rs"),
        stacked(b"}X\x01\x00\x00\x00w", REBUILD, b"(", STORAGE, b"K\x00K\x05\x85K\x00\x85\x89Nt", b"Rs"),  # stride 0
        stacked(b"}X\x01\x00\x00\x00w", REBUILD, b"(", STORAGE, b"K\x00K\x04\x85K\x01\x85\x89Nt", b"Rs"),  # 3 in file
        b"\x80\x02]",
        b"",
    ],
)
def test_broken_and_lying_files(tmp_path, content):
    zipped(content, tmp_path / "a.pt", {"archive/data/0": np.zeros(3, np.float32).tobytes()})
    with pytest.raises(InputError, match="a.pt: not a readable PyTorch checkpoint") as error:
        open_checkpoint(tmp_path / "a.pt")
    assert "\n" not in str(error.value)


BOMBS = {
    "a table of 2^26 objects": stacked(b"Nr\xff\xff\xff\x03"),
    "a table, in text": stacked(b"Np67108863\n"),
    "2^40 bytes": b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".",
    "a string of 2^40": b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b".",
    "a text of 2^40": b"\x80\x04\x8d" + (2**40).to_bytes(8, "little") + b".",
}


KINDS = [(kind, name) for name in [*BOMBS, "too long"] for kind in ("zip", "legacy")]


@pytest.mark.parametrize("kind, name", [*KINDS, ("zip", "a deflated one")])
def test_memory_is_in_proportion_to_the_file(monkeypatch, tmp_path, name, kind):
    """Python's own count of what is allocated at once; the first of them took 512 MB."""
    steps = 2**18  # a quarter of the limit, to be done sooner: a list of them would take 2 MB
    monkeypatch.setattr(pickle_steps, "_MOST_STEPS", steps)
    path, content = tmp_path / "a.pt", BOMBS.get(name, b"\x80\x02" + b"N0" * (steps // 2) + b"}.")
    if kind == "legacy":
        start = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
        path.write_bytes(b"".join(pickle.dumps(x, 2) for x in start) + content)
    elif name == "a deflated one":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", content)
        assert path.stat().st_size < 10_000
    else:
        zipped(content, path)
    tracemalloc.start()
    with pytest.raises(InputError, match="a.pt: not a readable PyTorch checkpoint"):
        open_checkpoint(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20 + 3 * (path.stat().st_size if name == "too long" else 0)


# Sixty tuples, each of the one before, twice: as a tree they have 2^60 leaves
SHARED = b")" + b"2\x86" * 60
ORDERED = b"ccollections\nOrderedDict\n"
# What hashes, compares or writes it as text, and takes as long as it has leaves
HASHED = {
    "a key": stacked(b"}", SHARED, b"Ns"),
    "one of several keys": stacked(b"}(K\x01N", SHARED, b"Nu"),
    "a key taken from the table": stacked(SHARED, b"q\x000}h\x00Ns"),
    "a key that was doubled": stacked(b"}", SHARED, b"2s"),
    "a dict of marks": stacked(b"(", SHARED, b"Nd"),
    "a set": stacked(b"\x8f(", SHARED, b"\x90"),
    "a frozenset": stacked(b"(", SHARED, b"\x91"),
    "OrderedDict": stacked(ORDERED, b"](](", SHARED, b"Neea\x85R"),
    "OrderedDict's item": stacked(ORDERED, b")R", SHARED, b"Ns"),
    "a storage's name": stacked(STORAGE.replace(b"X\x01\x00\x00\x000", SHARED)),
    "a storage": stacked(b"(", SHARED, b"NNNNtQ"),
    "a storage's type": stacked(b"(X\x07\x00\x00\x00storage", SHARED, b"NNNtQ"),
    "a function's argument": stacked(REBUILD, SHARED, b"R"),
    "a shape": stacked(REBUILD, b"(", STORAGE, b"K\x00", SHARED, SHARED, b"tR"),
    "an attribute's name": stacked(ORDERED, b")RN}", SHARED, b"Ns\x86b"),
}


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare", "legacy keys"])
@pytest.mark.parametrize("name", HASHED)
def test_shared_tuples_are_not_hashed(tmp_path, name, kind):
    """One line at once: such a file of 353 bytes was hashed for years, and Ctrl-C did not end it."""
    path, content = tmp_path / "a.pt", HASHED[name]
    if kind == "zip":
        zipped(content, path)
    else:
        start = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
        begin = b"".join(pickle.dumps(x, 2) for x in start) if kind != "bare" else b""
        if kind == "legacy keys":
            begin += pickle.dumps({}, 2)
            content = stacked(b"](", SHARED, b"e")
        path.write_bytes(begin + content)
    with pytest.raises(InputError, match="a.pt: not a readable PyTorch checkpoint") as error:
        open_checkpoint(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize(
    "content",
    [
        stacked(b"}\x8a\x09", (2**61 - 1).to_bytes(9, "little"), b"Ns"),  # a number that collides with 0
        stacked(b"}L", b"9" * 20, b"L\nNs"),
        stacked(b"}\x8b", (300).to_bytes(4, "little"), b"\x01" * 300, b"Ns"),  # a number of any length
        stacked(b"h\x05"),
        stacked(b"(0N0"),
        stacked(b"(N\x85\x86"),  # below its mark
        stacked(b"q\x00"),
        stacked(ORDERED, b"}\x85R"),
        stacked(ORDERED, b"](](K\x01Neea\x85R"),
    ],
)
def test_steps_that_no_checkpoint_has(tmp_path, content):
    zipped(content, tmp_path / "a.pt")
    with pytest.raises(InputError, match="a.pt: (not a readable PyTorch checkpoint|holds no tensors by name)"):
        open_checkpoint(tmp_path / "a.pt")


def tensor_of(shape: bytes, strides: bytes) -> bytes:
    """A state dict of a tensor "w" with the steps of its shape and strides, of a storage of four numbers."""
    return stacked(b"}X\x01\x00\x00\x00w", REBUILD, b"(", STORAGE, b"K\x00", shape, strides, b"\x89Nt", b"Rs")


NUMBER = b"\x8a\x08" + (2**62).to_bytes(8, "little")


@pytest.mark.parametrize(
    "shape, strides",
    [
        (b"K\x00" + NUMBER + b"\x86", b"K\x01K\x01\x86"),
        (b"(" + b"K\x00" + b"J\xff\xff\xff\x7f" * 3 + b"t", b"(" + b"K\x01" * 4 + b"t"),
        (b"(" + b"K\x01" * 100 + b"t", b"(" + b"K\x01" * 100 + b"t"),
        (b"(" + b"K\x00" * 33 + b"t", b"(" + b"K\x01" * 33 + b"t"),
        (b"K\x01\x85", b"\x8a\x20" + b"\x7f" * 32 + b"\x85"),
        (b"K\x01K\x02\x86", b"K\x01\x85"),
        (b"]K\x01a", b"]K\x01a"),
        (b"X\x01\x00\x00\x001", b"X\x01\x00\x00\x001"),
        (b"N", b"N"),
    ],
)
def test_shapes_that_no_array_has(tmp_path, shape, strides):
    zipped(tensor_of(shape, strides), tmp_path / "a.pt", {"archive/data/0": np.zeros(4, np.float32).tobytes()})
    with pytest.raises(InputError, match="a.pt: not a readable PyTorch checkpoint .a tensor") as error:
        open_checkpoint(tmp_path / "a.pt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape, strides", [(b"K\x01\x85", NUMBER.replace(b"@", b"\x01") + b"\x85"), (b")", b")")])
def test_strides_of_an_axis_of_one(tmp_path, shape, strides):
    """Any number stands there, as in torch."""
    numbers = np.arange(4, dtype=np.float32)
    zipped(tensor_of(shape, strides), tmp_path / "a.pt", {"archive/data/0": numbers.tobytes()})
    assert np.asarray(open_checkpoint(tmp_path / "a.pt")["w"]).sum() == 0.0


def test_an_empty_array_of_large_axes(tmp_path):
    shape = b"K\x00J\xff\xff\xff\x7f\x86"
    zipped(tensor_of(shape, b"K\x01K\x01\x86"), tmp_path / "a.pt", {"archive/data/0": bytes(16)})
    assert open_checkpoint(tmp_path / "a.pt")["w"].shape == (0, 2**31 - 1)


def test_a_dict_as_python_2_wrote_it(tmp_path):
    """Pairs in a list, which is taken once: given to a thousand dicts it does not become a thousand copies."""
    pair = b"](X\x01\x00\x00\x00w" + REBUILD + b"(" + STORAGE + b"K\x00K\x02\x85K\x01\x85\x89NtRe"
    content = stacked(ORDERED, b"](", pair, b"e\x85R")
    zipped(content, tmp_path / "a.pt", {"archive/data/0": np.arange(4, dtype=np.float32).tobytes()})
    np.testing.assert_array_equal(open_checkpoint(tmp_path / "a.pt")["w"], [0.0, 1.0])
    shared = pickles._Dict(pairs := [["a", 1]])
    assert shared == {"a": 1} and pickles._Dict(pairs) == {}


def test_keys_that_checkpoints_have(tmp_path):
    """Of optimizers: small numbers, and large ones where parameters were named by their addresses."""
    other = {0: 1, 140_234_000_111: 2, None: 3, True: 4, 0.5: (0.9, 0.9), "x": (1, (2, (3,)))}
    torch.save({"state_dict": {"w": torch.ones(2)}, "optimizer": other}, tmp_path / "a.pt")
    np.testing.assert_array_equal(open_checkpoint(tmp_path / "a.pt")["w"], [1.0, 1.0])


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.pt", None, "the file is missing"),
        ("a.pt", b"<html>", "not a readable PyTorch checkpoint"),
        ("a.pt", pickle.dumps(3), "not a readable PyTorch checkpoint"),
        ("a.npz", b"", "wants a file ending in .safetensors, .pt, .pth, .bin, .ckpt"),
    ],
)
def test_other_files(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        open_checkpoint(tmp_path / name)


def test_cut_short_and_without_tensors(tmp_path):
    for zipped_file in (True, False):
        buffer = io.BytesIO()
        torch.save({"a": torch.zeros(1000)}, buffer, _use_new_zipfile_serialization=zipped_file)
        (tmp_path / "a.pt").write_bytes(buffer.getvalue()[:-2500])
        with pytest.raises(InputError, match="a.pt: not a readable PyTorch checkpoint"):
            open_checkpoint(tmp_path / "a.pt")
    torch.save({"epoch": 3}, tmp_path / "b.pt")
    with pytest.raises(InputError, match="b.pt: holds no tensors by name; wants a state dict"):
        open_checkpoint(tmp_path / "b.pt")


# ------------------------------------------------------------------------------------------------------- the LAION head


def test_the_published_head():
    """Golden values; needs sac+logos+ava1-l14-linearMSE.pth, named by DIFFEXP_LAION_HEAD."""
    if not (path := os.environ.get("DIFFEXP_LAION_HEAD")):
        pytest.skip("DIFFEXP_LAION_HEAD does not name the LAION head")
    tensors = open_checkpoint(Path(path))
    head = {name: {"kernel": tensors[f"{name}.weight"].T, "bias": tensors[f"{name}.bias"]} for name in aesthetic.LAYERS}
    features = np.stack([np.ones(768), np.eye(768)[0]]).astype(np.float32)
    np.testing.assert_allclose(aesthetic.rating(head, features), [4.88328485, 4.5450524], atol=1e-5)
