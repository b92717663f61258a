"""The glossary is complete: every letter in an annotation or einsum of the tree stands in it."""

import re
from pathlib import Path

from kvjax import axes

ROOT = Path(__file__).resolve().parent.parent.parent
EXTRA = {
    "Q": "G T rows of one matrix, said where it is used",
    "half": "D / 2 bands",
    "*rows": "any axes before the slots",
    "units": "neighbouring slots that are kept or dropped together",
    "unit": "slots of one",
    "old": "units of a body before a round",
    "new": "units that come in a round",
    "size": "units that are listed",
    "n": "rows that are written",
    "bytes": "of packed codes",
    "pages": "p, in words",
    "count": "pages that are read",
    "chunks": "of `lag` tokens",
    "lag": "tokens of a chunk",
    "heads": "K heads of some sequences that a step or a kernel takes",
    "rows": "of a matrix",
    "slots": "S of a block",
    "block": "of slots, or of their numbers",
    "I": "rows of tokens that share bytes",
    "splits": "programs that share a head's slots",
    "blocks": "of slots",
    "tiles": "of a register's size",
    "steps": "of a kernel's grid",
    "levels": "of a table",
    "*tokens": "any axes before the numbers of a token",
    "...": "any axes",
    "_": "any size",
}


def test_every_letter_is_in_the_glossary():
    known = set(re.findall(r"^\| `(\w)` \|", axes.__doc__, flags=re.MULTILINE)) | set(EXTRA)
    assert "H" not in known
    used = set()
    for folder in ("kvjax", "models", "kernels_pallas"):
        for path in (ROOT / folder).rglob("*.py"):
            for annotation in re.findall(r'(?:Float|Int|Bool|Key)\[Array, "([^"]*)"\]', path.read_text()):
                used |= {name.removeprefix("#") for name in annotation.split()}  # "#K": K, or 1 for all heads
            for equation in re.findall(r'einsum\(\s*f?"([^"]*)"', path.read_text()):
                used |= set(re.sub(r"[^A-Za-z]", "", equation))
    unknown = {name for name in used - known if not name.isdigit()}
    assert not unknown
