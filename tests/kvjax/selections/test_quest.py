"""quest: all tokens stay, and pages are chosen at reading (tests/kvjax/test_pages.py)."""

import pytest

from kvjax.errors import UserError
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
