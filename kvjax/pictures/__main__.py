"""Draws the pictures of a finished or interrupted evaluation again; runs nothing, loads no model.

python -m kvjax.pictures build/run
"""

import json
import sys
from pathlib import Path

from kvjax._program import Settings, run
from kvjax.errors import UserError
from kvjax.pictures import draw_pictures


def main(settings: Settings) -> int:
    """Runs the program."""
    if len(settings.words) != 1:
        raise UserError("Give the folder of one evaluation: python -m kvjax.pictures DIR.")
    folder = Path(settings.words[0])
    path = folder / "report.json"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        paths = draw_pictures(folder, rows)
    except FileNotFoundError as error:
        raise UserError(f"There is no {path}; give the --output of python -m kvjax.evaluate.") from error
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is no report of kvjax.evaluate.") from error
    for drawn in paths:
        print(drawn)
    return 0


if __name__ == "__main__":
    sys.exit(run(main, usage=__doc__, define_flags=lambda values: None, allows_words=True))
