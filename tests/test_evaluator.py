"""Evaluation: scores of any number of images, of which a batch at a time is held; what is drawn is kept."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffexp_jax import parallel
from diffexp_jax.evaluator import Evaluator
from diffexp_jax.experiment import Task
from diffexp_jax.pipelines import Pipeline
from diffexp_jax.rewards.scoring import Scorers
from diffexp_jax.sampler import Exploration, Sampler
from diffexp_jax.sampling import load_process

PIPELINE = Pipeline(*[None] * len(Pipeline._fields))._replace(process=load_process({}))
NUMBERS = Exploration(False, 1.0, 900, (1.0, 1.0), "word", "sample", 0.5, None)
SAMPLER = Sampler(PIPELINE, None, None, n_steps=2, guidance=1.0, eta=0.0, exploration=NUMBERS)
PROMPTS, EACH, BATCH = 7, 5, 8  # 35 images: four batches and a part of one


@pytest.fixture
def evaluate(monkeypatch):
    """Evaluates without a model: an image is its number in the set; says how many were held at once."""
    made, most = [], []

    class Images(np.ndarray):
        """What can be referred to weakly."""

    def unshard(images, original=parallel.unshard):
        batch = original(images).view(Images)
        gc.collect()
        made.append(weakref.ref(batch))
        most.append(sum(len(there()) for there in made if there() is not None))
        return batch

    monkeypatch.setattr(parallel, "unshard", unshard)
    cond = np.arange(PROMPTS, dtype=np.float32)[:, None]
    task = Task("set", tuple(map(str, range(PROMPTS))), cond, {"score": np.arange(PROMPTS)})

    def generate(params, lora, context, keys, steps, x_T):
        data = jax.random.key_data(keys).reshape(*keys.shape, -1)[..., -1] % 200
        return jnp.broadcast_to(data[..., None, None, None], (*keys.shape, 2, 2, 3)).astype(jnp.uint8)

    def score(images, tokens):
        return {"": images[:, 0, 0, 0].astype(float) + 1000.0 * tokens, "size": np.full(len(images), 1.0)}

    def run(batch=BATCH, **options):
        most.clear()
        model = Evaluator(SAMPLER, None, None, generate, batch, Scorers({}, {"score": score}, batch), strict=False)
        return *model.evaluate(task, seed=1, samples_per_prompt=EACH, **options), max(most)

    return run


def test_a_batch_at_a_time_is_held(evaluate):
    images, scores, held = evaluate()
    assert held == BATCH and images.shape == (0, 2, 2, 3)
    assert scores["score"].shape == scores["score/size"].shape == (PROMPTS * EACH,)


def test_the_same_as_all_at_once(evaluate):
    """Scores bit for bit, in the order of the prompts; the images that are kept are those asked for."""
    whole, together, held = evaluate(batch=40, keep=range(PROMPTS * EACH))
    assert held >= PROMPTS * EACH
    measures = {"brightness": lambda images: images.mean((1, 2, 3)), "features": lambda images: images[:, 0, 0]}
    images, scores, held = evaluate(keep=[0, 7, 8, 34], measures=measures)
    assert held < 2 * BATCH
    np.testing.assert_array_equal(images, whole[[0, 7, 8, 34]])
    np.testing.assert_array_equal(scores["score"], together["score"])
    assert (scores["score"] // 1000).tolist() == np.repeat(np.arange(PROMPTS), EACH).tolist()
    np.testing.assert_array_equal(scores["brightness"], whole.mean((1, 2, 3)))
    np.testing.assert_array_equal(scores["features"], whole[:, 0, 0])
