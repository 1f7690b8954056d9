"""A process that believes to be on another kind of device, for tracing and lowering: nothing can run there."""

import jax
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from diffexp_jax import backend

PLATFORMS = {"gpu": "cuda", "tpu": "tpu"}  # by jax's name of the device and of what is lowered for


def believe(patch: pytest.MonkeyPatch, device: str) -> None:
    """On an H100, or on a TPU; replaced is only the detection of the device."""
    patch.setattr(backend, "platform", lambda: device)
    if device == "gpu":
        patch.setattr(backend, "cuda_capability", lambda: (9, 0))
        patch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
        patch.setattr(cudnn, "check_compute_capability", lambda capability: True)
        patch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)


def lower(device: str, function, *args) -> str:
    """The program's text, lowered for the device."""
    return jax.jit(function).trace(*args).lower(lowering_platforms=(PLATFORMS[device],)).as_text()
