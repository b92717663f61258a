"""Errors name what came, what was expected, and the nearest right thing."""

from kvjax.errors import UserError, unknown


def test_the_nearest_name_comes_first():
    error = unknown("policy", "triatention", ["full", "triattention"])
    assert isinstance(error, UserError)
    assert str(error) == "Unknown policy 'triatention'. Did you mean 'triattention'? Known: full, triattention."


def test_nothing_near_gives_the_list_and_the_advice():
    assert str(unknown("bits", 7, ["2", "4"], advice="Use 4.")) == "Unknown bits '7'. Known: 2, 4. Use 4."
    assert str(unknown("thing", "x", [])) == "Unknown thing 'x'. Known: none."
