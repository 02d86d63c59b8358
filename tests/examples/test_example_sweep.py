"""`examples/sweep` on a tiny random model: no network, no real weights."""

import jax
import numpy as np
import pytest

from examples.sentiment.data import Examples
from examples.sentiment.model import BertConfig, SentenceClassifier
from examples.sentiment.task import LENGTH, Task
from examples.sweep import sweep

pytestmark = pytest.mark.once

SIZES = BertConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=LENGTH,
)


@pytest.mark.slow
def test_adapters_of_the_sweep_differ_and_learn(tmp_path, capsys, standard_dtypes):
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 40, (24, LENGTH)).astype(np.int32)
    examples = Examples(ids, np.ones(ids.shape, bool), ids[:, 0] % 2)
    model = SentenceClassifier(SIZES, 2)
    variables = model.init(jax.random.key(0), ids[:1], ids[:1] > 0)
    task = Task(model, variables, examples, examples, {})
    options = sweep.parse(
        ["--ranks", "1", "3", "--lrs", "0.001", "0.03", "--steps", "20"]
    )
    with jax.numpy_rank_promotion("allow"):
        losses, accuracies = sweep.run(task, options)
    assert losses.shape == (20, 4)
    np.testing.assert_allclose(losses[0], losses[0, 0], rtol=1e-4)  # B is zero
    assert len(set(np.round(losses[-1], 5))) == 4
    assert losses[-5:].mean() < losses[:5].mean()
    assert accuracies.shape == (4,)
    assert "step 20 of 20" in capsys.readouterr().out
    sweep.plot(tmp_path / "curves.png", options, losses)
    assert (tmp_path / "curves.png").exists()
