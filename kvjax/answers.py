"""Answers out of what a model wrote, and whether two of them are the same: numbers, formulas in LaTeX, words.

A chain of thought up to `</think>` is passed over. An answer that was never given is none: a number that merely stands
last in a text cut off at its limit does not count.
"""

import cmath
import decimal
import re
from collections.abc import Callable, Sequence

from kvjax.latex import evaluate

_NUMBER = re.compile(r"-?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|-?\$?\.\d+")
_FRACTION = re.compile(r"\\[dtc]?frac|\d\s*/\s*\d")
_HASHES = re.compile(r"####[ \t*]*(?=-?\$?\.?\d)(\S+)")
_SAYS = re.compile(r"\banswer\b(?:\s+is\b|\s*(?=[:=]))\s*[:=]?\s*(\S.*)", re.IGNORECASE)
_REPLACED = {
    **{"−": "-", "–": "-", "π": "\\pi ", "∞": "\\infty ", "√": "\\sqrt ", "∪": "\\cup ", "×": "*", "·": "*", "°": ""},
    **{"\\times": "*", "\\cdot": "*", "\\div": "/", "\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\cfrac": "\\frac"},
    **{"\\lbrace": "\\{", "\\rbrace": "\\}", "\\le": "<=", "\\leq": "<=", "\\ge": ">=", "\\geq": ">="},
    **{"\\quad": " ", "\\displaystyle": " ", "\\degree": "", "\\degrees": ""},
}
_COMMAND = re.compile(r"\\[A-Za-z]+|[^\x00-\x7f]")
_TEXT = r"\\(?:text|textbf|textrm|mbox|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}"
_EXPONENT = r"(?:\^(?:\d|\{\d+\}))?"
_THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_MATRIX = re.compile(r"\\begin\{([pbvBV]?)matrix\}(.*)\\end\{\1matrix\}", re.DOTALL)
_POINTS = 3


def without_thoughts(text: str) -> str:
    """What comes after the last `</think>`; all of a text without one."""
    return text.rpartition("</think>")[2]


def boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` (or `\fbox`) that is closed and not empty; None if there is none."""
    for start in reversed([match.end() for match in re.finditer(r"\\f?box(?:ed)?\s*\{", text)]):
        depth = 1
        for place in range(start, len(text)):
            depth += (text[place] == "{") - (text[place] == "}")
            if not depth:
                if text[start:place].strip():
                    return text[start:place].strip()
                break
    return None


def final_answer(text: str) -> str | None:
    """What is boxed, or stands behind the last "answer is" or "answer:" in its line; None if neither is there."""
    text = without_thoughts(text)
    said = _SAYS.findall(text)
    return boxed(text) or (re.split(r"\.(?:\s|$)", said[-1])[0].strip(" *") if said else None)


def final_number(text: str, *, anywhere: bool = False) -> decimal.Decimal | None:
    """The number that a text gives as its answer.

    Args:
      text: a number behind the first "####" counts; then one that is boxed or said to be the answer.
      anywhere: whether, failing these, the last number of the text counts.
    """
    text = without_thoughts(text)
    hashed = _HASHES.search(text)
    said = hashed[1] if hashed else final_answer(text)
    if said is not None:
        numbers = [] if _FRACTION.search(said) else _NUMBER.findall(said.rpartition("=")[2])
        return _decimal(numbers[0]) if numbers else None
    numbers = _NUMBER.findall(text) if anywhere else []
    return _decimal(numbers[-1]) if numbers else None


def plain_words(text: str) -> str:
    """Lower-case words and numbers of a text, single spaces between them, without punctuation and English articles."""
    words = re.findall(r"(?<!\w)-?\d+(?:[.,:/]\d+)*|\w+", text.casefold())
    plain = [word.replace(",", "") if _THOUSANDS.fullmatch(word) else word for word in words]
    return " ".join(word for word in plain if word not in ("a", "an", "the"))


def contains_words(text: str, part: str) -> bool:
    """Whether the words of one text stand in the other, in a row; signs without words must stand there as they are."""
    words = plain_words(part)
    if not words:
        return part.strip() in text
    return re.search(rf"(?<![a-z0-9]){re.escape(words)}(?![a-z0-9])", plain_words(text)) is not None


def same_formula(given: str, expected: str) -> bool:
    """Whether two answers mean the same: equal in normal form, in value, or part by part.

    Args:
      given: LaTeX or plain text; units, `$` and a name before `=` do not count.
      expected: the like.
    """
    left, right = normal_form(given), normal_form(expected)
    return _spaceless(left) == _spaceless(right) or _same(left, right)


def normal_form(text: str) -> str:
    """An answer without what says how it looks: sizes, spacing, signs of money and percent, degrees, units, names."""
    text = text.strip().strip("$").strip().rstrip(".")
    text = re.sub(r"\\text\s*\{\s*(?:or|and)\s*\}", ",", text)
    text = re.sub(r",\\!\s*|\{,\}", "", text)
    text = re.sub(r"\^\s*(?:\\circ\b|\{\s*\\circ\s*\})|\\circ\b", "", text)
    text = _COMMAND.sub(lambda match: _REPLACED.get(match[0], match[0]), text)
    text = re.sub(r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])", "", text)
    text = re.sub(r"\\[()\[\]]|\\?[$%]", "", text)
    text = re.sub(r"(?<!\\)\\[!,;: ]|~", " ", text)
    text = re.sub(rf"(?<=[^\s(,=])\s*{_TEXT}{_EXPONENT}\s*$", "", text)
    text = re.sub(_TEXT, r"\1", text).strip()
    text = re.sub(rf"(?<=[\d}}])\s+[A-Za-z]{{3,}}(?:\s+[A-Za-z]+)*{_EXPONENT}$", "", text)
    text = re.sub(r"_\{(\w)\}", r"_\1", text)
    if text.count("=") == 1:
        text = re.sub(r"^\s*[A-Za-z](?:\([A-Za-z]\))?\s*=(?!=)\s*", "", text)
    text = re.sub(r"^\s*[A-Za-z]\s*\\in(?![A-Za-z])\s*", "", text)
    text = text.replace(",", "") if _THOUSANDS.fullmatch(text) else text
    if re.fullmatch(r"\(?[A-Za-z]\)?|[A-Za-z\s]{3,}", text):  # a choice, or words
        text = text.strip("()").casefold()
    return text.strip()


def _same(left: str, right: str) -> bool:
    """Whether two normal forms are equal, part by part where they have parts."""
    if _spaceless(left) == _spaceless(right):
        return True
    for parts_of, ordered in ((_rows, True), (_united, True), (_bracketed, True), (_members, False), (_listed, False)):
        parts, others = parts_of(left), parts_of(right)
        if len(parts) > 1 or len(others) > 1:
            return len(parts) == len(others) and (_pairwise if ordered else _in_any_order)(parts, others, _same)
    if left.count("=") == right.count("=") == 1:
        (a, b), (c, d) = left.split("="), right.split("=")
        return _equal(f"({a})-({b})", f"({c})-({d})") or _equal(f"({a})-({b})", f"({d})-({c})")
    return _equal(left, right)


def _rows(text: str) -> list[str]:
    """The shape of a matrix and its cells; nothing of another text."""
    match = _MATRIX.fullmatch(text.strip())
    if not match:
        return []
    rows = [row.split("&") for row in re.split(r"\\\\", match[2]) if row.strip()]
    return [f"{len(rows)} x {len(rows[0])}", *(cell.strip() for row in rows for cell in row)]


def _united(text: str) -> list[str]:
    """The parts of a union."""
    return [part.strip() for part in text.split("\\cup")]


def _bracketed(text: str) -> list[str]:
    """Brackets and members of a tuple or an interval; nothing of another text."""
    parts = _split_commas(text[1:-1])
    if len(parts) < 2 or text[0] not in "([" or text[-1] not in ")]" or None in parts:
        return []
    return [f"bracket {text[0]}", *parts, f"bracket {text[-1]}"]


def _members(text: str) -> list[str]:
    """The members of a set, with a mark that it is one; nothing of another text."""
    if not (text.startswith("\\{") and text.endswith("\\}")):
        return []
    return ["set of", *_listed(text[2:-2])]


def _listed(text: str) -> list[str]:
    """The members of a list without brackets, both values for each plus-minus."""
    parts = [re.sub(r"^[A-Za-z]\s*=(?!=)\s*", "", part) for part in _split_commas(text)]
    signs = [("+", "-") if "\\pm" in part else ("",) for part in parts]
    return [part.replace("\\pm", sign) for part, both in zip(parts, signs, strict=True) for sign in both]


def _split_commas(text: str) -> list[str]:
    """The pieces between commas outside brackets; the whole where brackets do not match."""
    pieces, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return [text]
        if character == "," and not depth:
            pieces.append("")
        else:
            pieces[-1] += character
    return [piece.strip() for piece in pieces]


def _pairwise(left: Sequence[str], right: Sequence[str], same: Callable[[str, str], bool]) -> bool:
    return all(map(same, left, right))


def _in_any_order(left: Sequence[str], right: Sequence[str], same: Callable[[str, str], bool]) -> bool:
    remaining = list(right)
    for one in left:
        match = next((place for place, other in enumerate(remaining) if same(one, other)), None)
        if match is None:
            return False
        del remaining[match]
    return True


def _equal(left: str, right: str) -> bool:
    """Whether two formulas have the same value wherever their letters are tried."""
    if re.fullmatch(r"-?\d+", left) and re.fullmatch(r"-?\d+", right):
        return decimal.Decimal(left) == decimal.Decimal(right)  # exact, and of any length
    try:
        values = [(evaluate(left, point=point), evaluate(right, point=point)) for point in range(_POINTS)]
    except ValueError:
        return False
    return all(cmath.isclose(a, b, rel_tol=1e-9) for a, b in values)


def _decimal(text: str) -> decimal.Decimal:
    return decimal.Decimal(re.sub(r"[$,]", "", text))


def _spaceless(text: str) -> str:
    return re.sub(r"\s+", "", text)
