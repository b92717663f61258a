"""The choice of an implementation."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from kernels_pallas._dispatch import Choice, choose, device_kind, device_of, on_each_device, spread, unspread
from kernels_pallas._tpu import not_a_tpu

ANSWERS = {"best": "it wants 128 lanes", "good": None, "reference": None}


def test_the_first_that_serves_is_chosen_with_the_reasons_against_better_ones():
    assert choose("select", ANSWERS) == Choice("good", ("best: it wants 128 lanes",))
    assert choose("select", {"best": None, "reference": None}) == Choice("best")


def test_a_named_one_serves_or_says_why_not():
    assert choose("select", ANSWERS, implementation="reference") == Choice("reference")
    with pytest.raises(ValueError, match="select: best cannot serve this: it wants 128 lanes"):
        choose("select", ANSWERS, implementation="best")
    with pytest.raises(ValueError, match="select has no implementation 'fast': give one of best, good, reference"):
        choose("select", ANSWERS, implementation="fast")


def test_where_none_serves_all_reasons_are_given():
    with pytest.raises(ValueError, match="select has no implementation for this: best: it wants 128 lanes"):
        choose("select", {"best": ANSWERS["best"]})


def test_the_device_is_that_of_the_mesh_or_the_one_jax_runs_on():
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    assert device_kind(mesh) == device_kind(None) == "cpu"
    with jax.default_device(jax.devices()[3]):
        assert device_of(None) == jax.devices()[3]
    with jax.default_device("cpu"):
        assert device_of(None) == jax.devices()[0]


def test_kernels_for_tpus_want_one_that_they_were_compiled_for():
    assert not_a_tpu("TPU v5 lite") is None
    assert not_a_tpu("TPU7x") is None
    assert not_a_tpu("TPU v4") == "it has not been compiled for TPU v4"
    assert not_a_tpu("cpu") == "it runs on TPUs, and this is cpu"


def test_of_several_devices_somebody_must_say_which():
    assert unspread(None, None) == f"the mesh over {len(jax.devices())} devices is not given"
    assert unspread(jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,)), None) is None
    assert unspread(None, "mosaic_tpu") is None


def test_sequences_and_heads_lie_over_axes_that_divide_them():
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    assert spread(mesh, 4, 2) == ("data", "model")
    assert spread(mesh, 3, 2) == (None, "model")
    assert spread(mesh, 1, 1) == (None, None)
    assert spread(None, 4, 2) == (None, None)


def test_each_device_has_its_part_of_the_arrays_and_one_has_all():
    array, spec = jnp.arange(8.0).reshape(4, 2), PartitionSpec("data")
    how = {"in_specs": (spec,), "out_specs": spec}
    mesh = jax.make_mesh((2, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def sum_of_all(array):
        return jnp.full_like(array, array.sum())

    ours = on_each_device(sum_of_all, (array,), mesh=mesh, **how)
    assert ours[:, 0].tolist() == [6.0, 6.0, 22.0, 22.0]
    single = jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    for alone in (None, single):
        assert on_each_device(sum_of_all, (array,), mesh=alone, **how)[0, 0] == 28.0
