"""tools/machine/compile_for.py: the settings of its words, and what it compiles."""

import jax
import pytest

from diffexp_jax import backend
from diffexp_jax.experiment import Experiment
from diffexp_jax.settings import checked


@pytest.fixture
def script():
    import compile_for

    return compile_for


def test_settings_of_words(script):
    changes = ["batch.samples=16", "batch.samples_per_forward=8", "sampling.eta=0.5", "model.dtype=bfloat16"]
    settings = script.settings_of("ddpo:model=sd15,reward=aesthetic,explore=false", changes)
    assert (settings.batch.samples, settings.batch.samples_per_forward, settings.sampling.eta) == (16, 8, 0.5)
    assert settings.model.dtype == "bfloat16" and not settings.exploration.enabled


@pytest.mark.slow
def test_the_network_alone(script, make_config, tmp_path):
    """Compiled for this machine as if it were not there: the gradient has the network's products, and more. So has the
    reward's program those of its CLIP, and the end of a chain the convolutions of the VAE beside them."""
    there = backend.Absent("cpu", None, (jax.devices()[0],), 2**34, {}, "1 x none")
    with backend.absent(there):
        experiment = Experiment.build(checked(make_config("ddpo")), weights=False)
        for program in script.network_programs(experiment):
            said = script.compile_and_write(program, tmp_path / program.name)
            assert "temporaries 0.0" in said
    texts = [(tmp_path / name).read_text() for name in script.OF_NETWORK]
    network, gradient, reward, end = (text.count(" dot(") for text in texts)
    assert 0 < network < gradient and 0 < reward <= end
    assert texts[-1].count(" convolution(") > texts[-2].count(" convolution(")
