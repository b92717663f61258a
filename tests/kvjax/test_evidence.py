"""What is gathered while tokens pass, against NumPy, however the tokens arrive."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.evidence import SINKS_NOT_HEARD, begin, empty_evidence, hear, last_queries, strength
from kvjax.rope import turns_at, unrotate
from kvjax.selection import SELECTIONS, Selection
from kvjax.sharding import Placement
from tests.fitted import normal, shape_of

SHAPE = shape_of(head_size=8)


def evidence_of(name, **arguments):
    sizes = {"shape": SHAPE, "batch": 2, "exact_slots": 6, "body": (2, 16), "placement": Placement()}
    return empty_evidence(SELECTIONS.get(name)(**arguments), {}, **sizes)


hear_jitted = jax.jit(hear, static_argnames="shape")


def tell(evidence, queries, lengths, chunk):
    """Feeds each row its first `lengths[i]` queries, `chunk` at a time."""
    for start in range(0, queries.shape[1], chunk):
        offsets = start + np.arange(chunk)[None]
        positions = np.where(offsets < np.asarray(lengths)[:, None], offsets, -1).astype(np.int32)
        piece = queries[:, start : start + chunk]
        evidence = hear_jitted(evidence, jnp.asarray(piece), positions=jnp.asarray(positions), shape=SHAPE)
    return evidence


@pytest.mark.parametrize("chunk", [1, 3, 12, 24])
def test_the_ring_holds_the_last_queries_oldest_first(chunk):
    queries = normal(2, 24, 4, 8)
    evidence = tell(evidence_of("snapkv", queries=5), queries, (24, 17), chunk)
    found, positions = last_queries(evidence)
    np.testing.assert_array_equal(positions, [range(19, 24), range(12, 17)])
    np.testing.assert_array_equal(found, np.stack([queries[0, 19:24], queries[1, 12:17]]))


def test_a_row_with_fewer_queries_than_the_ring_has_empty_places_first():
    evidence = tell(evidence_of("snapkv", queries=5), normal(2, 4, 4, 8), (4, 0), 4)
    _, positions = last_queries(evidence)
    np.testing.assert_array_equal(positions, [[-1, 0, 1, 2, 3], [-1] * 5])


@pytest.mark.parametrize("chunk", [1, 5, 20])
def test_moments_are_those_of_all_queries_but_the_sinks_before_rope(chunk):
    queries = normal(2, 20, 4, 8) + 1.0
    moments = tell(evidence_of("expected_attention"), queries, (20, 13), chunk).moments
    for row, length in enumerate((20, 13)):
        positions = jnp.arange(length, dtype=jnp.int32)[None]
        plain = unrotate(jnp.asarray(queries[row : row + 1, :length]), turns_at(SHAPE.rope, positions))
        plain = np.asarray(plain, np.float64)[0, SINKS_NOT_HEARD:]
        np.testing.assert_allclose(moments.mean[row], plain.mean(axis=0), atol=2e-6)
        second = np.einsum("TND,TNR->NDR", plain, plain) / len(plain)
        np.testing.assert_allclose(moments.second[row], second, atol=2e-5)
        assert moments.count[row] == length - SINKS_NOT_HEARD


def test_only_what_is_asked_for_is_there():
    plain = evidence_of("knorm")
    assert plain.exact == {}
    assert plain.body == {}
    assert plain.queries is plain.moments is plain.pages is plain.mass is None
    heavy = evidence_of("h2o")
    assert heavy.mass == "sum"
    assert heavy.exact["sum"].shape == (2, 2, 6)
    assert heavy.body["sum"].shape == (2, 2, 16)
    both = evidence_of("criticalkv", base="h2o")
    assert both.mass == "sum"
    assert set(both.exact) == {"sum", "strength"}
    assert [page.shape for page in evidence_of("quest", page=8).pages] == [(2, 2, 2, 8)] * 2


def test_new_tokens_begin_with_nothing_or_with_what_is_given():
    numbers = {"sum": jnp.asarray(normal(2, 2, 6)), "strength": jnp.asarray(normal(2, 2, 6))}
    slots = jnp.asarray([[1, 4], [0, 6]], jnp.int32)  # 6 lies outside: padding
    given = normal(2, 2, 2, seed=1)  # B T K
    found = begin(numbers, slots, {"sum": None, "strength": jnp.asarray(given)})
    expected = {name: np.array(array) for name, array in numbers.items()}
    for row, token, slot in ((0, 0, 1), (0, 1, 4), (1, 0, 0)):
        expected["sum"][row, :, slot] = 0
        expected["strength"][row, :, slot] = given[row, token]
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize("tokens", [1, 64, 150])
def test_strength_is_the_size_of_what_the_output_projection_makes_of_a_value(tokens):
    values, output = normal(2, tokens, 2, 8), normal(4, 8, 12)
    found = jax.jit(strength)(jnp.asarray(values), jnp.asarray(output))
    made = np.einsum("BTKD,KGDM->BTKGM", values.astype(np.float64), output.reshape(2, 2, 8, 12))
    np.testing.assert_allclose(found, np.abs(made).sum(-1).mean(-1), rtol=1e-5)


def test_a_selection_that_asks_for_nothing_is_a_few_lines():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Nothing(Selection):
        def score(self, view):
            return jnp.zeros(view.positions.shape, jnp.float32)

    leaves = jax.tree.leaves(
        empty_evidence(Nothing(), {}, shape=SHAPE, batch=2, exact_slots=6, body=(2, 16), placement=Placement())
    )
    assert leaves == []
