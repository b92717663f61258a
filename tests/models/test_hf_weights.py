"""Our parameters beside the stored tensors: shapes, parts, and back."""

import numpy as np
import pytest

from models.hf_weights import Weight

WEIGHTS = [
    Weight("embedding", "V M", (10, 6)),
    Weight("head", "M V", (6, 10)),
    Weight("norm.scale", "M", (6,)),
    Weight("layers.3.attention.query.kernel", "M N D", (6, 4, 2)),
    Weight("layers.3.attention.key.bias", "K D", (4, 2)),
    Weight("layers.3.attention.output.kernel", "N D M", (4, 2, 6)),
    Weight("layers.3.feed_forward.down.kernel", "F M", (12, 6)),
]
TENSOR_SHAPES = [(10, 6), (10, 6), (6,), (8, 6), (8,), (6, 8), (6, 12)]


@pytest.mark.parametrize(("weight", "shape"), list(zip(WEIGHTS, TENSOR_SHAPES, strict=True)))
def test_a_stored_tensor_becomes_ours_and_goes_back(weight, shape):
    assert weight.tensor_shape == shape
    tensor = np.arange(np.prod(shape)).reshape(shape)
    value = weight.from_tensor(tensor, weight.shape)
    assert value.shape == weight.shape
    np.testing.assert_array_equal(weight.to_tensor(value), tensor)


CUTS = [(weight, axis) for weight in WEIGHTS for axis, letter in enumerate(weight.axes.split()) if letter != "D"]


@pytest.mark.parametrize(("weight", "axis"), CUTS)
def test_a_part_of_ours_comes_from_a_part_of_the_tensor(weight, axis):
    """Cutting any axis but the head size in two, as meshes do."""
    tensor = np.arange(np.prod(weight.tensor_shape)).reshape(weight.tensor_shape)
    whole = weight.from_tensor(tensor, weight.shape)
    index = [slice(None)] * len(weight.shape)
    index[axis] = slice(weight.shape[axis] // 2, weight.shape[axis])
    expected = whole[tuple(index)]
    part = weight.from_tensor(tensor[weight.tensor_slices(tuple(index))], expected.shape)
    np.testing.assert_array_equal(part, expected)


def test_names_are_those_of_transformers():
    assert [weight.tensor_name for weight in WEIGHTS] == [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.3.self_attn.q_proj.weight",
        "model.layers.3.self_attn.k_proj.bias",
        "model.layers.3.self_attn.o_proj.weight",
        "model.layers.3.mlp.down_proj.weight",
    ]
