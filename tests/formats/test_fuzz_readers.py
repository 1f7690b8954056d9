"""Bad input as in test_fuzz.py for the readers of json, tokenizers and pickles' steps."""

import contextlib
import gzip
import json
import shutil
import zipfile

import pytest
from hypothesis import strategies as st

from diffexp_jax.emoji.tokenizer import write_tokenizer
from diffexp_jax.formats import tokenizers
from diffexp_jax.formats.json_text import parse_json
from diffexp_jax.formats.pickles import open_checkpoint
from diffexp_jax.formats.tokenizers import OPEN_CLIP_VOCABULARY, check_size, load_tokenizer
from tests.support.fuzz import CHANGES, EXAMPLES, KINDS, PIECES, PLACES, VALUES, changed, fuzz

pytest.importorskip("transformers")

STEPS = [b")", b"}", b"]", b"(", b"N", b"K\x01", b"2", b"0", b"1", b"\x85", b"\x86", b"\x87", b"t", b"l", b"d", b"s"]
STEPS += [b"u", b"\x8f", b"\x90", b"\x91", b"\x94", b"q\x00", b"h\x00", b"q\x01", b"h\x01", b"a", b"e", b"b", b"R"]
STEPS += [b"Q", b"\x81", b"X\x01\x00\x00\x00a", b"ccollections\nOrderedDict\n"]
STEPS += [b"ctorch._utils\n_rebuild_tensor_v2\n"]


@EXAMPLES
def test_steps_of_pickles(examples, tmp_path):
    """Any sequence of steps that make, share, pack and hash objects."""
    shared = st.just([b")", *[b"2\x86"] * 40])
    path = tmp_path / "x.pt"

    def read(parts):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02" + b"".join(b"".join(part) for part in parts) + b".")
        open_checkpoint(path)

    fuzz(st.lists(shared | st.lists(st.sampled_from(STEPS), max_size=8), max_size=8), read, examples)


@EXAMPLES
def test_json(examples):
    """Anything that Python's reader takes or fails in; what is read can be written again, in UTF-8."""
    good = json.dumps({"a": [1, -2.5, None, True, "é\U0001f600"], "b": {"c": []}}).encode()
    pieces = [b"[" * 3000, b"9" * 5000, b"1e999", b"NaN", b"-Infinity", b'"\\ud800"', b'"a": 2,', b"{" * 70, b"\xff"]
    changes = st.lists(st.tuples(KINDS, PLACES, st.sampled_from(pieces + PIECES)), max_size=3)

    def read(example):
        wanted, changes = example
        with contextlib.suppress(ValueError):
            content = parse_json(changed(good if wanted is None else json.dumps(wanted).encode(), changes).decode())
            try:
                json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
            except ValueError as error:
                raise AssertionError(f"{content!r} is read, and cannot be written") from error

    fuzz(st.tuples(st.none() | VALUES, changes), read, examples)


@EXAMPLES
def test_tokenizers(examples, tmp_path):
    """Damaged files, of both formats, and text that is cut at the end of a line: one line, or the same tokens."""
    write_tokenizer(tmp_path / "parts")
    good = load_tokenizer(tmp_path / "parts")
    good.save_pretrained(tmp_path / "one")
    files = [(folder, path.name) for folder in ("parts", "one") for path in sorted((tmp_path / folder).iterdir())]
    texts = ["a dog riding a bike, washing the dishes", "Zebra 12"]
    tokens = good(texts).input_ids

    def read(example):
        (kind, name), changes = example
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / kind, folder)
        content = (folder / name).read_bytes()
        lines = content.split(b"\n")
        cut = b"\n".join(lines[: int(changes * len(lines))]) if isinstance(changes, float) else None
        (folder / name).write_bytes(changed(content, changes) if cut is None else cut)
        tokenizer = load_tokenizer(folder)
        check_size(tokenizer, len(good), folder)
        if name in ("merges.txt", "vocab.json"):  # others are settings, which may be others
            assert tokenizer(texts).input_ids == tokens

    fuzz(st.tuples(st.sampled_from(files), CHANGES | st.floats(0.0, 1.0)), read, examples)


@EXAMPLES
def test_gzip_vocabularies(examples, tmp_path):
    good = gzip.compress(b"version\nd o\ndo g</w>\nc a\nca t</w>\n")

    def read(changes):
        (tmp_path / OPEN_CLIP_VOCABULARY).write_bytes(changed(good, changes))
        check_size(tokenizers._clip_tokenizer(tmp_path), 518, tmp_path)

    fuzz(CHANGES, read, examples)
