"""The loss beside numpy, what decays, a step that learns, and checkpoints that restore it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from kvjax.errors import UserError
from kvjax.learning import Checkpoints, Place, TrainState, make_optimizer, make_step, right_tokens, weighted_loss
from tests.tiny import tiny_model, whole_pass

CONFIG = ConfigDict({"max_gradient_norm": 1.0, "beta1": 0.9, "beta2": 0.98, "weight_decay": 0.1})
ROWS = np.random.default_rng(0).integers(0, 64, (3, 13)).astype(np.int32)


@pytest.fixture(autouse=True)
def ordinary_promotion():
    """optax multiplies integers and floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def model(**kwargs):
    return tiny_model(**{"layers": 1, **kwargs})


@jax.jit
def fresh_state(one):
    """A state that may be donated."""
    return TrainState(jax.tree.map(jnp.copy, one), make_optimizer(CONFIG).init(one))


loss_of = jax.jit(weighted_loss)
take_step = make_step(make_optimizer(CONFIG))


def logits():
    return np.stack([whole_pass(model(), row[:-1]) for row in ROWS]).astype(np.float64)


def test_the_loss_is_the_weighted_mean_of_cross_entropies():
    weights = np.random.default_rng(1).random(ROWS.shape, np.float32)
    log_sums = np.log(np.sum(np.exp(logits()), axis=-1))
    losses = log_sums - np.take_along_axis(logits(), ROWS[:, 1:, None], axis=-1)[..., 0]
    expected = np.average(losses, weights=weights[:, 1:])
    found = loss_of(model(), jnp.asarray(ROWS), jnp.asarray(weights))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    weights[:, 0] = 1000.0  # nothing comes before the first token
    np.testing.assert_array_equal(found, loss_of(model(), jnp.asarray(ROWS), jnp.asarray(weights)))


def test_rows_without_weight_have_no_loss():
    assert loss_of(model(), jnp.asarray(ROWS), jnp.zeros(ROWS.shape)) == 0.0


def test_tokens_are_right_where_they_are_the_most_likely_ones():
    best = np.argmax(logits(), axis=-1)
    rows = ROWS.copy()
    rows[:, -1] = best[:, -1]
    rows[0, -1] = (best[0, -1] + 1) % 64
    found = np.asarray(right_tokens(model(), jnp.asarray(rows)))
    np.testing.assert_array_equal(found, best == rows[:, 1:])
    assert found[:, -1].tolist() == [False, True, True]


def is_matrix_of_a_layer(path, leaf):
    return "layers" in jax.tree_util.keystr(path) and leaf.ndim > 1


def test_the_matrices_of_layers_decay_and_nothing_else():
    optimizer, one = make_optimizer(CONFIG), model()
    updates, _ = jax.jit(optimizer.update)(jax.tree.map(jnp.zeros_like, one), optimizer.init(one), one)
    matrices = jax.tree.leaves(jax.tree_util.tree_map_with_path(is_matrix_of_a_layer, one))
    for leaf, update, decays in zip(jax.tree.leaves(one), jax.tree.leaves(updates), matrices, strict=True):
        np.testing.assert_allclose(update, -0.1 * leaf if decays else jnp.zeros_like(leaf), rtol=1e-6)
    assert set(matrices) == {True, False}


def test_updates_of_the_matrices_of_layers_have_equal_singular_values():
    optimizer, one = make_optimizer(ConfigDict(dict(CONFIG, weight_decay=0.0))), model()
    rng = np.random.default_rng(5)
    gradients = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), one)
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(one), one)
    attention = updates.layers[0].attention
    for update, num_inputs in ((attention.query, 1), (attention.output, 2), (updates.layers[0].feed_forward.up, 1)):
        leaf = np.asarray(update.kernel[...])
        matrix = leaf.reshape(int(np.prod(leaf.shape[:num_inputs])), -1)
        singular = np.linalg.svd(matrix, compute_uv=False) / (0.2 * max(matrix.shape) ** 0.5)
        np.testing.assert_allclose(singular, 1.0, atol=0.4)  # where five steps of Newton and Schulz lead


def test_steps_learn_a_batch_by_heart():
    state = fresh_state(model())
    rows, weights = jnp.asarray(ROWS), jnp.ones(ROWS.shape)
    losses = []
    for _ in range(30):
        state, loss = take_step(state, rows, weights, jnp.float32(1e-2))
        losses.append(float(loss))
    assert losses[-1] < 0.2 * losses[0]


def test_a_learning_rate_of_zero_changes_no_weight():
    state, _ = take_step(fresh_state(model()), jnp.asarray(ROWS), jnp.ones(ROWS.shape), jnp.float32(0.0))
    for leaf, before in zip(jax.tree.leaves(state.model), jax.tree.leaves(model()), strict=True):
        np.testing.assert_array_equal(leaf, before)


def test_checkpoints_restore_place_and_state(tmp_path):
    state = fresh_state(model())
    state, _ = take_step(state, jnp.asarray(ROWS), jnp.ones(ROWS.shape), jnp.float32(1e-2))
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save(Place(7, 1, 3), state)
    checkpoints.close()

    checkpoints = Checkpoints(tmp_path / "run")
    place, restored = checkpoints.restore(fresh_state(model()))
    checkpoints.close()
    assert place == Place(step=7, stage=1, stage_step=3)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for leaf, saved in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(leaf, saved)


def test_the_newest_of_two_checkpoints_counts(tmp_path):
    checkpoints, state = Checkpoints(tmp_path), fresh_state(model())
    for number in (4, 8, 12):
        checkpoints.save(Place(number, 0, number), state)
    assert checkpoints.restore(state)[0] == Place(12, 0, 12)
    checkpoints.close()
    assert {path.name for path in tmp_path.iterdir() if path.name.isdigit()} == {"8", "12"}


def test_without_checkpoints_a_run_begins(tmp_path):
    checkpoints, state = Checkpoints(tmp_path), fresh_state(model())
    place, same = checkpoints.restore(state)
    checkpoints.close()
    assert place == Place(0, 0, 0)
    assert same is state


@pytest.mark.parametrize("other", [{"width": 16}, {"layers": 2}])
def test_checkpoints_of_another_model_are_refused(tmp_path, other):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(Place(1, 0, 1), fresh_state(model()))
    with pytest.raises(UserError, match="are of another model: set config.checkpoint_folder to a new folder"):
        checkpoints.restore(fresh_state(model(**other)))
    checkpoints.close()
