"""Traces of what caches hold, against sets by hand."""

import json

import numpy as np
import pytest

from kvjax.companions import with_companions
from kvjax.errors import UserError
from kvjax.grammar import parse_policy
from kvjax.tracing import evenly, first_evicting, trace_kept, trace_of
from tests.tiny import tiny_model

STREAMING = "streaming(budget=12)+exact(sinks=2,window=4,round=8)"
TOKENS = np.random.default_rng(0).integers(0, 64, 40).tolist()


@pytest.fixture(scope="module")
def streaming():
    """A prompt of 24 tokens, a question of 3, an answer of 8, looked into after every 3."""
    then, answer = TOKENS[24:27], TOKENS[27:35]
    return trace_kept(tiny_model(), STREAMING, TOKENS[:24], then=then, answer=answer, max_tokens=40, every=3)


def test_streaming_keeps_sinks_and_the_newest(streaming):
    """The first round behind the prompt comes with token 30, and leaves the four newest exact and six before them."""
    assert streaming.seen == (24, 27, 30, 33, 35)
    assert (streaming.prompt_tokens, streaming.layers, streaming.heads) == (24, (0, 1), (0, 1))
    assert streaming.kept.shape == (5, 2, 2, 35)
    for moment, seen, oldest in zip(streaming.kept, streaming.seen, (12, 12, 12, 20, 20), strict=True):
        np.testing.assert_array_equal(np.flatnonzero(moment[0, 0]), [0, 1, *range(oldest, seen)])
        assert (moment == moment[0, 0]).all()  # every layer and head the same


def test_a_record_gives_the_trace_again(streaming):
    again = trace_of(json.loads(json.dumps(streaming.record())))
    np.testing.assert_array_equal(again.kept, streaming.kept)
    assert again.record() == streaming.record()


def test_what_cannot_be_traced_is_refused():
    model = tiny_model()
    with pytest.raises(UserError, match="has 12 tokens and the cache room for 10"):
        trace_kept(model, STREAMING, TOKENS[:4], answer=TOKENS[:8], max_tokens=10)
    with pytest.raises(UserError, match="prompt is empty"):
        trace_kept(model, STREAMING, [], answer=TOKENS[:8], max_tokens=10)
    with pytest.raises(UserError, match="every is 0"):
        trace_kept(model, STREAMING, TOKENS[:4], answer=TOKENS[:8], max_tokens=16, every=0)


def test_evenly():
    assert evenly(2, 4) == (0, 1)
    assert evenly(36, 4) == (0, 12, 23, 35)
    assert evenly(5, 1) == (0,)


@pytest.mark.parametrize(
    ("policies", "expected"),
    [
        (("int4", "h2o(budget=256)", "snapkv(budget=256)"), "h2o(budget=256)"),
        (("streaming(budget=256)", "int4"), "random(budget=256)"),
        (("streaming(budget=256)+int4",), "streaming(budget=256)+int4"),
        (("int4",), None),
    ],
)
def test_the_first_that_evicts_comes_before_its_companions(policies, expected):
    found = first_evicting(with_companions([parse_policy(policy) for policy in policies]))
    assert (found and str(found)) == expected
