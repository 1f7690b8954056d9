"""Loading pipeline folders: the layouts that people have, and what is wrong with broken ones."""

import gc
import json
import shutil
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffexp_jax import sampler
from diffexp_jax.errors import InputError
from diffexp_jax.experiment import Experiment
from diffexp_jax.formats import files, tokenizers
from diffexp_jax.pipelines import all_parts, encode_prompts, load_pipeline, stable_diffusion
from diffexp_jax.rewards import load_reward
from diffexp_jax.run.fingerprint import fingerprint
from diffexp_jax.settings import checked

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A copy of the tiny pipeline folder that a test may break."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def trees_equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def test_sharded_weights_equal_single(folder, tiny_model):
    tensors = load_file(folder / UNET_FILE)
    names = sorted(tensors)
    index = {}
    for n, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        shard = f"diffusion_pytorch_model-0000{n}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / "unet" / shard)
        index |= dict.fromkeys(part, shard)
    (folder / UNET_FILE).unlink()
    index_file = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert trees_equal(load_pipeline(folder).params, load_pipeline(tiny_model).params)

    (folder / "unet" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="00002-of-00002.safetensors: the file is missing"):
        load_pipeline(folder)


def test_fp16_variant_is_used_when_it_is_all_there_is(folder):
    tensors = {name: value.astype(np.float16) for name, value in load_file(folder / UNET_FILE).items()}
    save_file(tensors, folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    (folder / UNET_FILE).unlink()
    kernel = load_pipeline(folder).params["unet"]["conv_in"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, tensors["conv_in.weight"].astype(np.float32).transpose(2, 3, 1, 0))


def test_old_attention_names_of_a_vae():
    old = ["query.weight", "key.weight", "value.bias", "proj_attn.weight", "group_norm.weight"]
    tensors = {f"decoder.mid_block.attentions.0.{name}": np.full(1, n) for n, name in enumerate(old)}
    new = stable_diffusion.modern_attention_names(tensors)
    today = ["to_q.weight", "to_k.weight", "to_v.bias", "to_out.0.weight", "group_norm.weight"]
    assert {name: int(value[0]) for name, value in new.items()} == {
        f"decoder.mid_block.attentions.0.{name}": n for n, name in enumerate(today)
    }


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_missing_subfolder(folder, part):
    shutil.rmtree(folder / part)
    with pytest.raises(InputError, match=f"{part}/ is missing"):
        load_pipeline(folder)


@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
    ],
)
def test_missing_file(folder, file):
    (folder / file).unlink()
    with pytest.raises(InputError, match=f"{file}: the file is missing"):
        load_pipeline(folder)


def test_missing_and_pickled_weights(folder):
    (folder / UNET_FILE).unlink()
    with pytest.raises(InputError, match="no weights; wants diffusion_pytorch_model.safetensors"):
        load_pipeline(folder)
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match="only pickled weights .*safe_serialization=True"):
        load_pipeline(folder)


@pytest.mark.parametrize("size", [0, 5, 1000])
def test_truncated_weights(folder, size):
    path = folder / UNET_FILE
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match="not a whole safetensors file") as error:
        load_pipeline(folder)
    assert "\n" not in str(error.value)


def rewritten_header(path, change):
    """The same data under a header that `change` was applied to."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + content[8 + size :])


@pytest.mark.parametrize(
    "lie, said",
    [
        ({"shape": [16, 4, 3, 4]}, "not a whole safetensors file"),  # more numbers than there are bytes
        ({"data_offsets": [0, 10**9]}, "not a whole safetensors file"),
        ({"dtype": "I32"}, "conv_in.weight holds int32"),  # other numbers of the same size
        ({"dtype": "F99"}, "not a whole safetensors file"),
        ({"shape": [4, 16, 3, 3]}, "conv_in.weight is (4, 16, 3, 3), the config wants (16, 4, 3, 3)"),
    ],
)
def test_a_lying_header(folder, lie, said):
    rewritten_header(folder / UNET_FILE, lambda header: header["conv_in.weight"].update(lie))
    with pytest.raises(InputError) as error:
        load_pipeline(folder)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_type_without_numbers_of_numpy(folder):
    tensors = load_file(folder / UNET_FILE)
    n = tensors["conv_in.weight"].nbytes

    def half_as_wide(header):  # 8-bit numbers: four times as many in the same bytes
        header["conv_in.weight"].update({"dtype": "F8_E4M3", "shape": [n]})

    rewritten_header(folder / UNET_FILE, half_as_wide)
    with pytest.raises(InputError, match="conv_in.weight"):
        load_pipeline(folder)


def test_a_file_cut_short_after_it_was_opened(folder):
    weights = files.open_weights(folder / "unet")
    path = folder / UNET_FILE
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(InputError, match="is not readable") as error:
        for name in weights:
            weights[name]
    assert "\n" not in str(error.value)


def test_bfloat16_files(folder):
    tensors = {name: value.astype(ml_dtypes.bfloat16) for name, value in load_file(folder / UNET_FILE).items()}
    save_file(tensors, folder / UNET_FILE)
    for dtype in (jnp.float32, jnp.bfloat16):
        kernel = load_pipeline(folder, dtype=dtype).params["unet"]["conv_in"]["kernel"]
        assert kernel.dtype == dtype
        np.testing.assert_array_equal(kernel, tensors["conv_in.weight"].astype(dtype).transpose(2, 3, 1, 0))


@pytest.mark.parametrize("variant, value", [(None, 1.0), ("fp16", 2.0)])
def test_variant_chooses_between_files(folder, variant, value):
    tensors = load_file(folder / UNET_FILE)
    for end, number in (("", 1.0), (".fp16", 2.0)):
        changed = tensors | {"conv_out.bias": np.full(4, number, np.float32)}
        save_file(changed, folder / f"unet/diffusion_pytorch_model{end}.safetensors")
    params = load_pipeline(folder, variant=variant).params
    np.testing.assert_array_equal(params["unet"]["conv_out"]["bias"], value)


# ---- the hub


@pytest.fixture
def hub(monkeypatch, tmp_path, tiny_model):
    """A cache of the hub that holds org/tiny at one commit, and no network."""
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(tiny_model, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return repository / "snapshots" / commit


@pytest.mark.parametrize("offline", [True, False])
def test_a_cached_model_needs_no_network(hub, monkeypatch, tiny_model, offline):
    no_network(monkeypatch, offline)
    assert files.model_folder("org/tiny", ["unet"]) == hub
    assert trees_equal(load_pipeline("org/tiny").params, load_pipeline(tiny_model).params)


def no_network(monkeypatch, offline):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize("path, revision", [("org/unknown", None), ("org/tiny", "another")])
def test_a_hub_id_without_network(hub, monkeypatch, path, revision, offline):
    no_network(monkeypatch, offline)
    with pytest.raises(InputError) as error:
        load_pipeline(path, revision=revision)
    said = f"model '{path}': no such folder, no copy in the hub's cache, and it could not be downloaded ("
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


def test_a_cached_reward(hub, monkeypatch, tiny_clip):
    """The weights of a reward may be a repository of the hub too, where it is asked for; a missing folder never is."""
    no_network(monkeypatch, offline=True)
    for path in hub.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(tiny_clip, hub, dirs_exist_ok=True)
    assert files.file_or_folder(str(tiny_clip), what="reward") == tiny_clip
    texts, images = ["a dog"], np.full((1, 16, 16, 3), 0.5, np.float32)
    cached, local = (load_reward(f"pickscore:{place}") for place in ("hub:org/tiny", tiny_clip))
    ours, theirs = (jax.jit(x.score)(x.params, images, x.tokenize(texts))[0] for x in (cached, local))
    np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(
        InputError, match="^reward 'pickscore:hub:org/other': no such folder, no copy in the hub's cache"
    ):
        load_reward("pickscore:hub:org/other")
    with pytest.raises(InputError, match="org/tiny: no such file or folder; the hub's repository .* is hub:org/tiny$"):
        load_reward("pickscore:org/tiny")
    with pytest.raises(InputError, match="^reward 'pickscore:hub:a/b/c': wants hub:ORGANISATION/NAME$"):
        load_reward("pickscore:hub:a/b/c")


def test_a_missing_folder_is_no_repository(hub, monkeypatch, tmp_path, capsys):
    """models/tiny where models/ is a folder here is a path; who means the hub says so."""
    no_network(monkeypatch, offline=True)
    monkeypatch.chdir(tmp_path)
    assert files.model_folder("hub:org/tiny", ["unet"]) == hub
    assert capsys.readouterr().out == "model 'hub:org/tiny': the hub's repository org/tiny\n"
    (tmp_path / "org").mkdir()
    with pytest.raises(InputError, match="no such folder in org, which is a folder here; .* is hub:org/tiny$"):
        files.model_folder("org/tiny", ["unet"])
    with pytest.raises(InputError, match=r"^model './tiny': no such folder; accepted"):
        files.model_folder("./tiny", ["unet"])
    assert files.model_folder("hub:org/tiny", ["unet"]) == hub


def test_the_hubs_words_are_not_cut_within_one(monkeypatch):
    import huggingface_hub

    def download(*args, **kwargs):
        raise ValueError("of the hub " * 40)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(InputError, match=r"\((of the hub )+of( the)?( hub)?\.\.\.\); give"):
        files.model_folder("org/name", ["unet"])


def test_only_what_is_needed_is_downloaded(monkeypatch, tmp_path):
    """Of the published repositories' files, by huggingface_hub's own filter."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    there = ["README.md", "model_index.json", "unet/config.json", "tokenizer_2/merges.txt", "tokenizer/vocab.json"]
    plain = ["unet/diffusion_pytorch_model.safetensors", "text_encoder_2/model.safetensors"]
    fp16 = ["unet/diffusion_pytorch_model.fp16.safetensors", "text_encoder_2/model.fp16.safetensors"]
    other = ["vae_1_0/diffusion_pytorch_model.safetensors", "safety_checker/model.safetensors", "unet/model.onnx"]
    fp16 += ["vae/diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "vae/model-00001-of-00002.fp16.safetensors"]
    other += ["sd_xl_base_1.0.safetensors", "text_encoder/pytorch_model.bin", "unet/x.non_ema.safetensors"]
    shard = ["unet/diffusion_pytorch_model-00001-of-00002.safetensors"]
    asked = {}

    def download(path, *, revision, allow_patterns):
        asked["files"] = set(
            filter_repo_objects([*there, *plain, *fp16, *other, *shard], allow_patterns=allow_patterns)
        )
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for variant, weights in ((None, [*plain, *shard]), ("fp16", fp16)):
        assert files.model_folder("org/name", all_parts(), variant=variant) == tmp_path
        assert asked["files"] - {"README.md"} == {*there[1:], *weights} and "README.md" not in asked["files"]


def test_broken_json(folder):
    (folder / "unet/config.json").write_text("{")
    with pytest.raises(InputError, match="unet/config.json: not readable as json"):
        load_pipeline(folder)
    (folder / "unet/config.json").write_text("[]")
    with pytest.raises(InputError, match="wants a json object, found a list"):
        load_pipeline(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("act_fn", "gelu"), ("down_block_types", ["AttnDownBlock2D", "DownBlock2D"]), ("class_embed_type", "timestep")],
)
def test_unsupported_unet(folder, key, value):
    path = folder / "unet/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(InputError, match=f"{key}.*accepted"):
        load_pipeline(folder)


def test_unknown_folder():
    with pytest.raises(
        InputError,
        match="no such folder; accepted: emoji, emoji_hard, emoji_flow, a folder in diffusers' format",
    ):
        load_pipeline("nowhere/at/all")


def test_tensors_are_read_when_asked_for(folder):
    weights = files.open_weights(folder / "unet")
    assert len(weights) == len(load_file(folder / UNET_FILE)) and "conv_in.weight" in weights
    np.testing.assert_array_equal(weights["conv_in.weight"], load_file(folder / UNET_FILE)["conv_in.weight"])


def test_token_ids_names_what_was_cut(tiny_model):
    tokenizer = tokenizers.load_tokenizer(tiny_model / "tokenizer")
    length = tokenizer.model_max_length
    fits, long = "dog " * (length - 2), "dog " * (length - 1)
    ids, cut = tokenizers.token_ids(tokenizer, [fits, long, ""])
    assert ids.shape == (3, length) and cut == [long]
    np.testing.assert_array_equal(ids[0], ids[1])
    assert list(ids[2, :2]) == [tokenizer.bos_token_id, tokenizer.eos_token_id]


def test_a_run_drops_its_text_encoder(make_config, monkeypatch):
    """Once all prompts are encoded nothing holds it, on the host or the devices; identity.json covers it still."""
    held = []

    def load(*args, **kwargs):
        pipeline = load_pipeline(*args, **kwargs)
        held.extend(weakref.ref(x) for x in jax.tree.leaves(pipeline.params["text_encoder"]))
        return pipeline

    config = make_config("ddpo", {"sampling.negative_prompt": "a dog"})
    whole = load_pipeline(config.model.path)
    table = whole.params["text_encoder"]["embeddings.token_embedding"]["embedding"].shape
    live = sum(x.shape == table for x in jax.live_arrays())
    monkeypatch.setattr(sampler, "load_pipeline", load)
    experiment = Experiment.build(checked(config))
    gc.collect()
    assert held and not any(ref() is not None for ref in held)
    assert sum(x.shape == table for x in jax.live_arrays()) <= live
    assert experiment.identity()["model"] == fingerprint(whole.params)
    assert experiment.frozen.model.keys() == experiment.sampler.pipeline.params.keys() == {"unet", "vae"}
    with pytest.raises(ValueError, match="^text_encoder: dropped when all of the run's prompts were encoded"):
        encode_prompts(experiment.sampler.pipeline, ["a dog"])
