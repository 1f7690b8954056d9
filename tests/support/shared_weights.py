"""What 4 devices compute with weights that they share out, beside what they compute with copies: run as a program.

python shared_weights.py layers OUT.json
python shared_weights.py encode OUT.json       (prompts, by emoji_flow's encoders)
python shared_weights.py train ARGUMENTS      (of diffexp_jax.train; also small kernels are shared out)
"""

import json
import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from diffexp_jax import parallel
from diffexp_jax.models import layers
from diffexp_jax.parallel import weights
from diffexp_jax.pipelines import encode_prompts, load_pipeline, on_one_device

WIDTH, DEPTH = 256, 12


def of_layers() -> dict[str, float]:
    """Differences of value and gradient, and bytes of a device, of a deep network without and with sharing."""
    layer = layers.Dense(WIDTH)
    kernels = np.random.default_rng(0).standard_normal((DEPTH, WIDTH, WIDTH)).astype(np.float32) / WIDTH**0.5
    tree = [{"kernel": kernel, "bias": np.zeros(WIDTH, np.float32)} for kernel in kernels]
    lora = {"A": np.full((WIDTH, 2), 0.01, np.float32), "B": np.full((2, WIDTH), 0.01, np.float32)}

    def network(params, lora, x):
        for of_layer in params:
            x = jnp.tanh(layer.apply({"params": of_layer, "lora": lora}, x))
        return x

    def value_and_gradient(params, lora, x):
        out, pull_back = jax.vjp(lambda lora: network(params, lora, x), lora)
        return out, pull_back(jnp.ones_like(out))[0]

    program, found = parallel.pmap(value_and_gradient), {}
    x = parallel.shard(np.random.default_rng(1).standard_normal((8, WIDTH)).astype(np.float32), 8)
    for name, params in (("copies", tree), ("parts", parallel.shared_out(tree, jax.device_count()))):
        args = parallel.share(params), parallel.replicate(lora), x
        memory = program.lower(*args).compile().memory_analysis()
        found[name] = jax.device_get(program(*args)), memory.argument_size_in_bytes, memory.temp_size_in_bytes
    (copies, *bytes_of_copies), (parts, *bytes_of_parts) = found["copies"], found["parts"]
    pairs = zip(jax.tree.leaves(copies), jax.tree.leaves(parts), strict=True)
    return {
        "difference": float(max(np.abs(a - b).max() / np.abs(a).max() for a, b in pairs)),
        "arguments": bytes_of_parts[0] / bytes_of_copies[0],
        "more temporaries": (bytes_of_parts[1] - bytes_of_copies[1]) / kernels.nbytes,
    }


def of_encoders() -> dict[str, float]:
    """The largest difference of prompts' embeddings, and how many of the encoders' kernels are shared out."""
    pipeline = load_pipeline("emoji_flow")
    texts = ["a dog riding a bike", "an ant", ""]
    ways = (on_one_device, parallel.by_all_devices)
    copies, parts = (encode_prompts(pipeline, texts, program=program)[0] for program in ways)
    pairs = zip(jax.tree.leaves(copies), jax.tree.leaves(parts), strict=True)
    tree = parallel.shared_out({part: pipeline.params[part] for part in pipeline.text_parts}, jax.device_count())
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, parallel.Part))
    return {
        "difference": float(max(np.abs(a - b).max() / np.abs(a).max() for a, b in pairs)),
        "parts": sum(isinstance(x, parallel.Part) for x in leaves),
    }


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    weights.LARGE = 64 if what == "train" else 1024
    if what != "train":
        found = {"layers": of_layers, "encode": of_encoders}[what]()
        Path(arguments[0]).write_text(json.dumps(found))
    else:
        sys.argv = ["train", *arguments]
        runpy.run_module("diffexp_jax.train", run_name="__main__")
