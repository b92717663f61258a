r"""The value of a formula in LaTeX: numbers, fractions, roots, powers, functions, letters with values of their own.

    sum      product (+ product | - product)*
    product  factor (* factor | / factor | factor)*           side by side means times
    factor   -factor | +factor | function factors | atom !? (^ argument)?
    atom     number | letter | (sum) | {sum} | |sum| | \frac argument argument | \sqrt[argument] argument

Two formulas that agree at a few points of their letters are taken for equal; nothing is simplified.
"""

import cmath
import math
import random
import re
from collections.abc import Callable

_NUMBER = re.compile(r"\d+\.?\d*|\.\d+")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_MIXED = re.compile(r"(?=\\frac(?:\d\s*\d|\s*\{\d+\}\s*\{\d+\})(?!\d))")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
_CONSTANTS = {"\\pi": math.pi, "\\infty": math.inf, "e": math.e, "i": 1j}
_GREEK = re.compile(r"\\(?:alpha|beta|gamma|delta|epsilon|theta|lambda|mu|nu|rho|sigma|tau|phi|varphi|omega)")
_FUNCTIONS: dict[str, Callable[[complex], complex]] = {
    **{"\\sin": cmath.sin, "\\cos": cmath.cos, "\\tan": cmath.tan, "\\exp": cmath.exp},
    **{"\\arcsin": cmath.asin, "\\arccos": cmath.acos, "\\arctan": cmath.atan, "\\ln": cmath.log, "\\log": cmath.log},
    **{"\\cot": lambda x: 1 / cmath.tan(x), "\\sec": lambda x: 1 / cmath.cos(x), "\\csc": lambda x: 1 / cmath.sin(x)},
}
_LONGEST = 400
_CLOSING = {"(": ")", "{": "}", "[": "]", "|": "|"}


def evaluate(text: str, *, point: int = 0) -> complex:
    r"""The value of a formula.

    Args:
      text: without spaces that stand for digits' groups, units and `\left`, `\right`.
      point: which values letters have; i and e are the constants.

    Raises:
      ValueError: it is no formula that this module knows, or has no value.
    """
    if len(text) > _LONGEST or _WORD.search(text):
        raise ValueError(f"'{text[:_LONGEST]}' is no short formula")
    parser = _Parser(text, point)
    try:
        value = parser.sum()
    except (ArithmeticError, RecursionError, ValueError) as error:
        raise ValueError(f"'{text}' has no value") from error
    if parser.rest() or cmath.isnan(value):
        raise ValueError(f"'{text}' has no value")
    return value


class _Parser:
    """Recursive descent over a text; each method reads what it is named after and moves on."""

    def __init__(self, text: str, point: int):
        self._text, self._place, self._point = text, 0, point

    def rest(self) -> str:
        """What was not read yet."""
        self._place += len(self._text[self._place :]) - len(self._text[self._place :].lstrip())
        return self._text[self._place :]

    def _take(self, *options: str) -> str:
        """The first option that comes next, or ""."""
        rest = self.rest()
        found = next((option for option in options if rest.startswith(option)), "")
        self._place += len(found)
        return found

    def _match(self, pattern: re.Pattern) -> str:
        match = pattern.match(self.rest())
        self._place += match.end() if match else 0
        return match[0] if match else ""

    def sum(self) -> complex:
        """A sum."""
        value = self._product()
        while sign := self._take("+", "-"):
            value = value + self._product() if sign == "+" else value - self._product()
        return value

    def _product(self) -> complex:
        value = self._factor()
        while True:
            if self._take("*"):
                value *= self._factor()
            elif self._take("/"):
                value /= self._factor()
            elif self._begins_factor():
                value *= self._factor()
            else:
                return value

    def _begins_factor(self) -> bool:
        """Whether something stands side by side with what was read; digits after digits do not mean times."""
        rest = self.rest()
        return bool(re.match(r"[A-Za-z(\\{]", rest))

    def _factor(self) -> complex:
        if sign := self._take("+", "-"):
            return self._factor() if sign == "+" else 0j - self._factor()  # not -0j, across the cut of roots
        before = self._place
        name = self._match(_COMMAND)
        if name in _FUNCTIONS:
            return self._call(name)
        self._place = before
        value = self._atom()
        if self._take("!"):
            if value != int(value.real) or not 0 <= value.real <= 20:
                raise ValueError(self._text)
            value = complex(math.factorial(int(value.real)))
        return _power(value, self._argument()) if self._take("^") else value

    def _call(self, name: str) -> complex:
        """A function of the factors that follow it, of one in parentheses alone."""
        base = self._argument() if name == "\\log" and self._take("_") else None
        exponent = self._argument() if self._take("^") else 1.0 + 0j
        closed = self.rest()[:1] in ("(", "{")
        value = self._factor()
        while not closed and self._begins_factor() and not self.rest().startswith(tuple(_FUNCTIONS)):
            value *= self._factor()
        result = _FUNCTIONS[name](value)
        return _power(result if base is None else result / cmath.log(base), exponent)

    def _argument(self) -> complex:
        """What stands in braces, or one digit, letter or command."""
        digit = self._match(re.compile(r"\d"))
        return complex(digit) if digit else self._atom()

    def _atom(self) -> complex:
        if number := self._match(_NUMBER):
            mixed = number.isdecimal() and _MIXED.match(self.rest())  # 1\frac{4}{5}
            return complex(float(number)) + (self._atom() if mixed else 0)
        if opening := self._take("(", "{", "|"):
            value = self.sum()
            if not self._take(_CLOSING[opening]):
                raise ValueError(self._text)
            return complex(abs(value)) if opening == "|" else value
        name = self._match(_COMMAND) or self._match(re.compile("[A-Za-z]"))
        if name == "\\frac":
            return self._argument() / self._argument()
        if name == "\\sqrt":
            return self._root()
        if name in _CONSTANTS:
            return complex(_CONSTANTS[name])
        if len(name) == 1 or _GREEK.fullmatch(name):
            return complex(random.Random(f"{name} {self._point}").uniform(0.5, 2.0))
        raise ValueError(self._text)

    def _root(self) -> complex:
        degree = 2.0 + 0j
        if self._take("["):
            degree = self.sum()
            if not self._take("]"):
                raise ValueError(self._text)
        value = self._argument()
        odd = degree == int(degree.real) and int(degree.real) % 2
        if odd and not value.imag and value.real < 0:  # the real root
            return -(complex(abs(value)) ** (1 / degree))
        return value ** (1 / degree) if degree != 2 else cmath.sqrt(value)


def _power(base: complex, exponent: complex) -> complex:
    if abs(exponent) > 1000:
        raise ValueError("a power too large to tell")
    return base**exponent
