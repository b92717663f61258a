"""Colours and markers, and what the themes promise."""

import itertools

import pytest

from kvjax.pictures.names import names_of
from kvjax.pictures.style import NEUTRAL, THEMES, styles_of


def light_of(colour):
    """Relative luminance of a colour "#rrggbb" (WCAG 2)."""
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in parts]
    return sum(weight * one for weight, one in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize(("shade", "paper", "inks"), [("light", 1.0, 2.4), ("dark", light_of("#0d1117"), 3.0)])
def test_inks_are_seen_on_their_paper(shade, paper, inks):
    theme = THEMES[shade]

    def contrast(colour):
        dark, light = sorted((light_of(colour), paper))
        return (light + 0.05) / (dark + 0.05)

    assert min(map(contrast, (theme.text, theme.muted))) >= 4.5
    assert min(map(contrast, theme.hues)) >= inks


def test_neutral_styles_are_fixed_and_usual_methods_keep_their_hue():
    alone = styles_of(names_of(["h2o(budget=8)"]))
    found = styles_of(
        names_of(["full", "random(budget=8)", "tova(budget=8)", "triattention(budget=8)", "h2o(budget=8)"])
    )
    assert found["h2o"] == alone["h2o"]
    assert (found["full"], found["random"]) == (NEUTRAL["full"], NEUTRAL["random"])
    assert len({found[one].hue for one in ("tova", "triattention", "h2o")}) == 3


def test_families_of_a_method_share_its_hue():
    found = styles_of(names_of(["h2o(budget=8)", "h2o(budget=16)+int4", "int4"]))
    assert found["h2o"].hue == found["h2o + int4"].hue != found["int4"].hue
    assert (found["h2o"].hollow, found["h2o + int4"].hollow) == (False, True)


def test_many_methods_are_still_told_apart():
    methods = ("tova", "rkv", "knorm", "lagkv", "kvzip", "adakv", "duo", "keydiff", "snapkv", "h2o", "triattention")
    found = styles_of(names_of([f"{method}(budget=8)" for method in methods]))
    for one, other in itertools.combinations(found.values(), 2):
        assert (one.hue, one.marker) != (other.hue, other.marker)
