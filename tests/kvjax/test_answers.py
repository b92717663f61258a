"""Answers are found in what a model wrote, and compared: right ones in many spellings, wrong ones that look alike."""

import decimal
import json

import pytest

from kvjax.answers import (
    boxed,
    contains_words,
    final_answer,
    final_number,
    normal_form,
    plain_words,
    same_formula,
    without_thoughts,
)


def test_thoughts_are_passed_over():
    assert without_thoughts("<think>a</think>b</think> c") == " c"
    assert without_thoughts("<think>a") == "<think>a"


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{3} and \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{3} and \boxed{4", "3"),
        (r"\boxed{3} and \boxed{} or \boxed{ }", "3"),
        (r"\fbox{x} ", "x"),
        (r"\boxed {\{1,2\}}", r"\{1,2\}"),
        ("boxed{3}", None),
        ("", None),
    ],
)
def test_the_last_box(text, content):
    assert boxed(text) == content


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"The answer is 3. \boxed{4}", "4"),
        ("The answer is 3.5 metres. Done.", "3.5 metres"),
        ("the answer is 3\nThe final answer: **12**\nbye", "12"),
        ("Answer is: $x$.", "$x$"),
        ("Answer:\n  7", "7"),
        (r"<think>\boxed{1}</think> none", None),
        ("The answers are 3", None),
        ("I answer 3", None),
    ],
)
def test_the_final_answer(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so it is\n#### 18", "18"),
        ("#### $1,234,567.50 dollars", "1234567.5"),
        ("#### -3", "-3"),
        ("####.5", "0.5"),
        ("#### **12**", "12"),
        ("#### NUMBER ... #### 7\n\nQuestion: ... #### 8", "7"),
        (r"#### 5 and \boxed{6}", "5"),
        (r"<think>#### 5</think> \boxed{\$6}", "6"),
        (r"\boxed{x = 12}", "12"),
        ("The answer is 3 + 4 = 7 eggs.", "7"),
        ("The answer is 42.", "42"),
        ("#### 1/2", None),
        (r"\boxed{\frac{1}{2}}", None),
        ("we get 7", None),
        ("", None),
    ],
)
def test_the_final_number(text, number):
    assert final_number(text) == (None if number is None else decimal.Decimal(number))


def test_the_last_number_counts_where_it_may():
    assert final_number("3 + 4 is 7.", anywhere=True) == 7
    assert final_number("#### 3, not 7", anywhere=True) == 3
    assert final_number("1,000 or -2.50", anywhere=True) == decimal.Decimal("-2.5")
    assert final_number("none", anywhere=True) is None


def test_plain_words():
    assert plain_words("The  1,000 Cats!") == "1000 cats"
    assert plain_words("An apple, a pear; Ada's") == "apple pear ada s"
    assert plain_words("-5 is not 5") == "-5 is not 5"
    assert plain_words("covid-19 at 3.50") == "covid 19 at 3.50"
    assert plain_words("ÉTÉ 你好") == "été 你好"
    assert plain_words("+ -") == ""


def test_words_in_a_text():
    assert contains_words("It is the rusty violin.", "Rusty Violin")
    assert contains_words("我住在北京市", "北京")
    assert contains_words("use C++ or +", "+")
    assert not contains_words("rusty violins", "rusty violin")
    assert not contains_words("violin, rusty", "rusty violin")
    assert not contains_words("1234", "23")
    assert not contains_words("x", "+")


SAME = [
    (r"\frac{1}{2}", "0.5"),
    ("1/2", r"\dfrac12"),
    (r"\sqrt{8}", r"2\sqrt2"),
    ("x=5", "5"),
    ("f(x) = 2x", "2x"),
    ("y=3+2x", "y = 2x + 3"),
    (r"\frac{-1}{2}", r"-\frac{1}{2}"),
    ("q-p", "-p+q"),
    ("2(k+1)", "2k+2"),
    ("x^3-6+3x", "x^3+3x-6"),
    (r"\frac{\cos x}{\sin x}", r"\cot x"),
    ("9/5", r"1\frac{4}{5}"),
    (r"6.72\times10^{-5}", ".0000672"),
    ("-5i+6", "6 - 5i"),
    ("145°", r"145^\circ"),
    (r"90^{\circ}", "90"),
    (r"\frac{270}{7}", r"\frac{270}7\text{ degrees}"),
    (r"\$32{,}348", r"\$32,\!348"),
    ("32348", r"\$32,\!348"),
    ("58500", "58,500"),
    ("11111111100", r"11,\! 111,\! 111,\! 100"),
    ("864 inches^2", r"864 \mbox{ inches}^2"),
    ("15", r"15\mbox{ cm}^2"),
    ("50\\%", "50"),
    ("$18.90", r"\$18.90"),
    (r"$\frac{3}{4}$.", r"\frac34"),
    ("C", r"\text{(C)}"),
    (r"\text{Even}", "even"),
    (r"\textbf{east}", r"\text{east}"),
    ("52_{8}", "52_8"),
    (r"\left(3,\frac\pi2\right)", r"\left( 3, \frac{\pi}{2} \right)"),
    ("[-2,7]", r"x \in [-2,7]"),
    (r"(0, 9)\cup(9,36)", r"(0,9) \cup (9,36)"),
    (r"(-∞, 0]", r"(-\infty, 0]"),
    ("x=3, x=-1", "-1,3"),
    (r"x=1\text{ or }x=2", "1,2"),
    (r"1+\sqrt{19}, 1-\sqrt{19}", r"1 \pm \sqrt{19}"),
    (r"\{-2,1+\sqrt5,1-\sqrt5\}", r"\{1\pm\sqrt{5},-2\}"),
    (r"\left\{1,2\right\}", r"\{2,1\}"),
    (r"\begin{bmatrix}-1/3\\ \frac23 \\ 5/3\end{bmatrix}", r"\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix}"),
    (r"\begin{pmatrix}-1&0\\0&-1\end{pmatrix}", r"\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}"),
    ("-7y+5x+11z+4=0", "5x - 7y + 11z + 4 = 0"),
    ("0=5x-7y+11z+4", "5x - 7y + 11z + 4 = 0"),
    ("9" * 5000, "9" * 5000),
]
DIFFERENT = [
    ("0.333", r"\frac13"),
    ("3", "-3"),
    ("", "5"),
    ("5,000", "5"),
    ("1 000", "0"),
    ("12345678901234567891", "12345678901234567890"),
    ("9" * 5000, "9" * 4999 + "8"),
    ("52", "52_8"),
    ("x", "y"),
    ("2k", "2m"),
    ("X", "2x"),
    (r"\frac{1}{0}", "5"),
    ("((((", "5"),
    ("seat", r"\text{east}"),
    ("west", r"\text{east}"),
    ("D", r"\text{(C)}"),
    ("(4,3]", "(3,4]"),
    ("(3,4)", "(3,4]"),
    ("(2,1)", "(1,2)"),
    ("(1,2,3)", "(1,2)"),
    ("(1,2)", "1,2"),
    (r"\{1,2\}", "(1,2)"),
    ("1", "1,-2"),
    ("1,1", "1,2"),
    (r"1+\sqrt{19}", r"1 \pm \sqrt{19}"),
    (r"(2,\infty)", "(2,4)"),
    (r"(-\infty,2)", r"(\infty,2)"),
    ("(0,36)", r"(0,9) \cup (9,36)"),
    (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\begin{pmatrix}1\\3\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ("5x - 7y + 11z = 0", "5x - 7y + 11z + 4 = 0"),
]


@pytest.mark.parametrize(("given", "expected"), SAME)
def test_the_same_in_other_words(given, expected):
    assert same_formula(given, expected)
    assert same_formula(expected, given)


@pytest.mark.parametrize(("given", "expected"), DIFFERENT)
def test_what_looks_alike_and_is_not_the_same(given, expected):
    assert not same_formula(given, expected)
    assert not same_formula(expected, given)


def test_normal_forms_are_normal():
    for pair in SAME:
        for text in pair:
            assert normal_form(normal_form(text)) == normal_form(text)


def test_published_solutions_end_in_the_published_answers(shared_data):
    problems = json.loads((shared_data / "math500" / "math500.json").read_text())
    assert len(problems) == 500
    for problem in problems:
        assert same_formula(final_answer(problem["solution"]), problem["answer"])


def test_published_answers_that_pass_for_each_other(shared_data):
    """No two of the first thirty but those that differ in unit, spelling or order."""
    problems = json.loads((shared_data / "math500" / "math500.json").read_text())[:30]
    answers = sorted({problem["answer"] for problem in problems})
    pairs = [(one, other) for one in answers for other in answers if one < other and same_formula(one, other)]
    assert pairs == [("5", "x=5")]
