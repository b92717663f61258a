"""Terms are read, written and refused; separators inside parentheses and quotes are none."""

import dataclasses

import pytest

from kvjax.errors import UserError
from kvjax.terms import Term, convert_arguments, read_term, split_list, split_outside


def read(text):
    return read_term(text, kind="thing", joint=";")


@dataclasses.dataclass
class Thing:
    size: int = 1
    share: float = 0.5
    budget: int | float = 3
    loud: bool = False
    file: str = ""
    layer: int = 0


@pytest.mark.parametrize(
    ("text", "term"),
    [
        ("a", Term("a", [], {})),
        (" a () ", Term("a", [], {})),
        ("a(4, x ,b = 2)", Term("a", ["4", "x"], {"b": "2"})),
        ('a(file="x, y (1).json",b=2)', Term("a", [], {"file": "x, y (1).json", "b": "2"})),
        ('a("x=1")', Term("a", ["x=1"], {})),
        ("a(file=../x-1.json)", Term("a", [], {"file": "../x-1.json"})),
        ("a(file=x=y)", Term("a", [], {"file": "x=y"})),
        ('a(file="")', Term("a", [], {"file": ""})),
        ("a(b=,,)", Term("a", [], {"b": ""})),
    ],
)
def test_terms_are_read_and_written_so_that_they_read_back(text, term):
    assert read(text) == term
    assert read(str(term)) == term


def test_values_are_quoted_where_they_must_be():
    assert str(Term("a", ["4"], {"b": "0.5", "file": "x/y.json"})) == "a(4,b=0.5,file=x/y.json)"
    assert str(Term("a", [], {"b": "x y", "c": "1,2", "d": "", "e": "p+q", "f": "x=1"})) == (
        'a(b="x y",c="1,2",d="",e="p+q",f="x=1")'
    )
    assert str(Term("a", [], {})) == "a"


@pytest.mark.parametrize("wrong", ["", "a b", "a(b", "a)b(", "a(b(c))", 'a(b="c)', "a(1)(2)", "a(1) b", "-a"])
def test_other_shapes_are_refused(wrong):
    with pytest.raises(UserError, match=r"is no thing: write NAME or NAME\(argument=value, ...\), joined by ';'"):
        read(wrong)


def test_messages_stay_on_one_line():
    with pytest.raises(UserError, match="^'a b c' is no thing"):
        read("a\nb  c")
    with pytest.raises(UserError, match=r"^'a\(b=1, b=2\)' gives b twice"):
        read("a(b=1,\nb=2)")


def test_splitting_outside_parentheses_and_quotes():
    assert split_list('a,b(1,2); c(d="x,)y;")\n;, ') == ["a", "b(1,2)", 'c(d="x,)y;")']
    assert split_outside("a+b(1+2)", "+") == ["a", "b(1+2)"]
    assert split_outside("a)+b", "+") == ["a)", "b"]
    assert split_outside("", "+") == [""]


def test_arguments_have_the_types_that_the_signature_asks_for():
    given = {"size": "2", "share": "1", "budget": "7", "loud": "True", "file": "3"}
    assert convert_arguments("a", Thing, given) == {"size": 2, "share": 1.0, "budget": 7, "loud": True, "file": "3"}
    assert convert_arguments("a", Thing, {"budget": "0.25", "loud": "false"}) == {"budget": 0.25, "loud": False}


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"sise": "2"}, "Unknown argument of a 'sise'. Did you mean 'size'"),
        ({"layer": "2"}, "Unknown argument of a 'layer'"),
        ({"size": "2.5"}, r"a\(size\) is '2.5'; it must be a whole number"),
        ({"share": "x"}, r"a\(share\) is 'x'; it must be a number"),
        ({"budget": ""}, r"a\(budget\) is ''; it must be a number"),
        ({"loud": "1"}, r"a\(loud\) is '1'; it must be true or false"),
    ],
)
def test_other_arguments_are_refused(named, message):
    with pytest.raises(UserError, match=message):
        convert_arguments("a", Thing, named, hidden=("layer",))
