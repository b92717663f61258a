"""quest: all tokens stay, and pages are chosen at reading (tests/kvjax/test_pages.py)."""

import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.errors import UserError
from tests.contract.codecs import model, random_tokens, statistics
from tests.views import fitted, random_view


def test_it_evicts_nothing_and_reads_pages():
    selection, arrays = fitted("quest", page=32, layer=2)
    assert (selection.page, selection.budget, selection.layer, arrays) == (32, 1024, 2, {})
    assert fitted("quest")[0].page == 16
    assert (selection.numbers, selection.num_queries, selection.waits) == ((), 0, False)
    with pytest.raises(NotImplementedError):
        selection.score(random_view())


@pytest.mark.parametrize("page", [0, 2048])
def test_pages_of_no_sensible_size(page):
    with pytest.raises(UserError, match=rf"quest\(page\) is {page}; it must be at least 1 and at most 1024\."):
        fitted("quest", page=page)


def test_pages_need_not_fill_bytes_by_themselves():
    """Three of four tokens, of which single bits fill one byte and a half."""
    policy = "quest(budget=22,page=4)+turboquant(bits=3)+exact(sinks=2,window=8,round=8)"
    cache = kvjax.init_cache(model(), policy, batch=1, max_tokens=60, statistics=statistics())
    tokens = jnp.asarray(random_tokens(1, 60))
    _, cache = kvjax.prefill(model(), cache, tokens[:, :40])
    logits, _ = kvjax.compressed_decode(model(), cache, tokens[:, 40:])
    assert np.isfinite(logits).all()
