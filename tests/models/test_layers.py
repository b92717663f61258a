"""The parts of a layer against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax.sharding import Placement
from models.layers import Build, FeedForward, Projection, RMSNorm
from tests.tiny import tiny_config, tiny_model

BUILD = Build(placement=Placement(), dtype=jnp.dtype("float32"))


def normal(*shape):
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def test_rms_norm_takes_the_mean_of_squares_in_float32():
    norm = RMSNorm(8, axis="D", epsilon=1e-5, build=BUILD)
    norm.scale = norm.scale.replace(jnp.arange(1.0, 9.0))
    inputs = normal(2, 3, 4, 8) * 100
    expected = inputs / np.sqrt((inputs**2).mean(-1, keepdims=True) + 1e-5) * np.arange(1.0, 9.0)
    np.testing.assert_allclose(norm(jnp.asarray(inputs)), expected, rtol=1e-5)
    low = RMSNorm(8, axis="D", epsilon=1e-5, build=Build(placement=Placement(), dtype=jnp.dtype("float16")))
    large = low(jnp.full((1, 1, 8), 300, jnp.float16))  # 300**2 is more than float16 holds
    np.testing.assert_allclose(large.astype(jnp.float32), 1.0, rtol=0.01)


@pytest.mark.parametrize(
    ("axes", "shape", "inputs", "outputs", "equation"),
    [
        ("M N D", (6, 4, 2), 1, (4, 2), "btm,mnd->btnd"),
        ("N D M", (4, 2, 6), 2, (6,), "btnd,ndm->btm"),
        ("M F", (6, 5), 1, (5,), "btm,mf->btf"),
    ],
)
def test_projections(axes, shape, inputs, outputs, equation):
    projection = Projection(axes, shape, num_inputs=inputs, bias=True, build=BUILD)
    kernel, bias, given = normal(*shape), normal(*outputs), normal(2, 3, *shape[:inputs])
    assert projection.bias[...].shape == outputs
    projection.kernel, projection.bias = (
        old.replace(jnp.asarray(new)) for old, new in ((projection.kernel, kernel), (projection.bias, bias))
    )
    np.testing.assert_allclose(
        projection(jnp.asarray(given)), np.einsum(equation, given, kernel) + bias, rtol=1e-4, atol=1e-5
    )


def test_on_a_gpu_one_row_is_multiplied_as_two(monkeypatch):
    """Numbers stay; what XLA sees is no vector."""
    projection = Projection("M F", (6, 5), num_inputs=1, bias=False, build=BUILD)
    projection.kernel = projection.kernel.replace(jnp.asarray(normal(6, 5)))
    given = jnp.asarray(normal(1, 1, 6))
    rows = []
    for kind in ("cpu", "NVIDIA H200"):
        monkeypatch.setattr(Placement, "device_kind", kind)
        equations = jax.make_jaxpr(functools.partial(projection))(given).eqns  # a new function: nothing is remembered
        (product,) = [one for one in equations if one.primitive.name == "dot_general"]
        rows.append(product.invars[0].aval.shape[0])
        np.testing.assert_allclose(projection(given), given @ projection.kernel[...], rtol=1e-6)
    assert rows == [1, 2]


def test_feed_forward_is_swiglu():
    block: FeedForward = tiny_model().layers[0].feed_forward
    gate, up, down = (np.asarray(part.kernel[...]) for part in (block.gate, block.up, block.down))
    inputs = normal(1, 2, 32)
    wide = inputs @ gate
    expected = (wide / (1 + np.exp(-wide)) * (inputs @ up)) @ down
    np.testing.assert_allclose(block(jnp.asarray(inputs)), expected, rtol=1e-4, atol=1e-4)


def test_parameters_carry_their_axes():
    axes = {path[-1]: leaf.axes for path, leaf in nnx.to_flat_state(nnx.state(tiny_model().layers[0].attention.query))}
    assert axes == {"kernel": "M N D"}
    assert tiny_config().qk_norm
