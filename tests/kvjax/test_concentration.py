"""How far queries gather: extremes by construction, and the published statistics of a real model."""

import dataclasses
import json

import numpy as np
import pytest

from kvjax.concentration import concentration
from kvjax.statistics import LayerStatistics, Moments, Statistics
from kvjax.triattention_file import load_triattention
from models.hf_config import parse_config
from tests.fitted import normal, shape_of, statistics_of, turned

SHAPE = shape_of(head_size=16)


def of_queries(queries):
    """R of one layer's queries before RoPE, `B N S D`."""
    layer = statistics_of(SHAPE, normal(1, 2, queries.shape[2], 16), queries=turned(SHAPE, queries))
    return concentration(Statistics((layer,), SHAPE))


def of_bands(*layers):
    """R of layers given as numbers: mean vectors `N D` and mean lengths `N D/2`."""
    nothing = {field.name: None for field in dataclasses.fields(LayerStatistics)}
    made = (
        LayerStatistics(
            **nothing
            | {"queries": Moments(mean=mean, second=None), "queries_norm": norm, "num_tokens": 1, "rope": SHAPE.rope}
        )
        for mean, norm in layers
    )
    return concentration(Statistics(tuple(made), SHAPE))


@pytest.mark.parametrize(("away", "expected"), [(0, 1.0), (10, 0.5), (20, 0.0)])
def test_equal_queries_are_a_point_and_opposite_ones_a_circle(away, expected):
    """40 queries, some of which are the negative of the others."""
    signs = np.where(np.arange(40) < 40 - away, 1.0, -1.0).astype(np.float32)
    found = of_queries(normal(1, 4, 1, 16) * signs[None, None, :, None])
    assert found["bands"] == pytest.approx(expected, abs=1e-3)
    assert found["strongest"] == pytest.approx(expected, abs=1e-3)
    assert found["above"] == (expected == 1.0)


def test_queries_in_random_directions_have_little():
    assert of_queries(normal(1, 4, 400, 16))["bands"] < 0.1


def test_the_strongest_band_is_that_of_the_longest_queries():
    """Two layers of two heads: R is 0 in all bands but one; that one is the longest of one head of each layer."""
    mean, norm = np.zeros((2, 16)), np.ones((2, 8))
    mean[0, 3], mean[0, 3 + 8], norm[0, 3] = 3.0, 4.0, 5.0
    mean[1, 6], norm[1, 2] = 0.9, 2.0
    found = of_bands((mean, norm), (2 * mean, 2 * norm))
    assert found["layers"] == [[1.0, 0.0], [1.0, 0.0]]
    assert found["strongest"] == found["above"] == 0.5
    assert found["bands"] == pytest.approx((1.0 + 0.9) / 16)
    wanted = "R of the queries: 0.12 over all bands, 0.50 in each head's strongest, above 0.95 there in 50% of the "
    assert found["summary"] == f"{wanted}heads."
    assert json.loads(json.dumps(found)) == found


def test_bands_in_which_no_query_ever_was_are_no_fault():
    found = of_bands((np.zeros((2, 16)), np.zeros((2, 8))))
    assert (found["bands"], found["strongest"], found["above"]) == (0.0, 0.0, 0.0)


def test_without_statistics_of_queries_there_is_none():
    layer = statistics_of(SHAPE, normal(1, 2, 8, 16))
    assert concentration(None) is None
    for missing in ("queries", "queries_norm"):
        assert concentration(Statistics((layer, dataclasses.replace(layer, **{missing: None})), SHAPE)) is None
    assert concentration(Statistics((layer, layer), SHAPE)) is not None


def test_a_model_of_eight_billion_parameters(shared_data):
    """The numbers of the published Qwen3-8B statistics."""
    path = shared_data / "triattention-stats" / "qwen3_8b.aime24.pt"
    if not path.exists():
        pytest.skip(f"needs {path}, which is not part of the tree")
    fields = json.loads((shared_data / "model-configs" / "qwen3-8b.json").read_text())
    shape = parse_config(fields, source="Qwen3-8B").cache_shape("bfloat16")
    found = concentration(load_triattention(path, shape))
    assert [round(found[name], 3) for name in ("bands", "strongest", "above")] == [0.643, 0.993, 0.988]
    assert np.shape(found["layers"]) == (36, 32)
