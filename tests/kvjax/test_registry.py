"""The registry: found by listing, no duplicates, known names on an unknown one."""

import pytest

from kvjax.errors import UserError
from kvjax.registry import Registry


def test_duplicates_are_refused():
    registry = Registry("thing", package="models.families")
    registry.register("one", 1)
    with pytest.raises(ValueError, match="The thing 'one' is registered twice: 1 and 2"):
        registry.register("one", 2)


def test_unknown_names_list_the_known_ones():
    registry = Registry("thing", package="models.families")
    registry.register("one", 1)
    registry.register("two", 2)
    assert registry.names() == ("one", "two")
    assert registry.get("two") == 2
    with pytest.raises(UserError, match="Unknown thing 'tow'. Did you mean 'two'"):
        registry.get("tow")
