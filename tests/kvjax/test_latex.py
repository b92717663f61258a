"""Values of formulas in LaTeX."""

import cmath
import math

import pytest

from kvjax.latex import evaluate


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2", 2),
        (" 3.5 ", 3.5),
        (".25", 0.25),
        ("2.", 2),
        ("-2+3*4", 10),
        ("2-3-4", -5),
        ("12/4/3", 1),
        ("-3^2", -9),
        ("(-3)^2", 9),
        ("2^{-1}", 0.5),
        ("3(4+1)", 15),
        ("5!", 120),
        ("0!", 1),
        ("|{-3}|", 3),
        ("|2-5|+1", 4),
        (r"\frac{1}{4}", 0.25),
        (r"\frac14", 0.25),
        (r"\frac{270}7", 270 / 7),
        (r"\frac 59", 5 / 9),
        (r"-\frac{35}{9}", -35 / 9),
        (r"\frac{11+9}{20}", 1),
        (r"1\frac{4}{5}", 1.8),
        (r"137 \frac{1}{2}", 137.5),
        (r"2\frac{\pi}{4}", math.pi / 2),
        (r"\sqrt{2}", math.sqrt(2)),
        (r"3\sqrt2", 3 * math.sqrt(2)),
        (r"\sqrt{-4}", 2j),
        (r"\sqrt[3]{27}", 3),
        (r"\sqrt[3]{-8}", -2),
        (r"\sqrt[4]{16}", 2),
        (r"\pi", math.pi),
        (r"\frac{\pi^2}{8}", math.pi**2 / 8),
        (r"\infty", math.inf),
        (r"-\infty", -math.inf),
        ("e^{i*3.141592653589793}", -1),
        ("6-5i", 6 - 5j),
        ("i^2", -1),
        (r"\sin\frac{\pi}{6}", 0.5),
        (r"\sin{0}+1", 1),
        (r"\cos(0)x^0", 1),
        (r"\sin^2 1 + \cos^2 1", 1),
        (r"\tan 1 \cot 1", 1),
        (r"\sec 1 \cos 1", 1),
        (r"\sin 1 \csc 1", 1),
        (r"\arctan 1", math.pi / 4),
        (r"\ln e^2", 2),
        (r"\log_2 8", 3),
        (r"\log_{10}(100)", 2),
        (r"\exp(0)", 1),
    ],
)
def test_values(text, value):
    assert evaluate(text) == pytest.approx(complex(value), rel=1e-12, abs=1e-12)


def test_letters_have_values_of_their_own_that_depend_on_the_point():
    values = {letter: evaluate(letter) for letter in ("x", "y", "X", r"\theta")}
    assert len(set(values.values())) == 4
    assert all(0.5 <= value.real <= 2 and not value.imag for value in values.values())
    assert evaluate("x") == values["x"] != evaluate("x", point=1)
    x, y = values["x"], values["y"]
    assert evaluate("2xy^2-x/y") == pytest.approx(2 * x * y * y - x / y)
    assert evaluate(r"\sin 2x") == pytest.approx(cmath.sin(2 * x))
    assert evaluate(r"\frac x y") == pytest.approx(x / y)


@pytest.mark.parametrize(
    "text",
    [
        *("", "()", "(2", "2)", "2+", "*2", "2 3", "1 000", "[2]", "52_8", "2,3", "2=2", "x&y", "{2", "|2"),
        *("east", "3 cats", r"\foo", r"\frac1", r"\frac{1}{0}", "1/0", r"\infty-\infty", "2.5!", "(-1)!", "30!"),
        *(
            "9^{9^9}",
            "9^{1001}",
            "0^{-1}",
            r"\sqrt[3{8}",
            r"\log 0",
            "2^",
            "2^3^2",
            "(" * 300 + "1" + ")" * 50,
            "1+" * 300 + "1",
        ),
        "(" * 199 + "1" + ")" * 199,
    ],
)
def test_what_has_no_value(text):
    with pytest.raises(ValueError, match="has no value|is no short formula"):
        evaluate(text)
