"""What a search has come to so far, in a file: a search that was stopped reads it and judges nothing twice."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from kvjax.errors import UserError
from kvjax.policy import Policy
from kvjax.report import check_target, write_json
from kvjax.search import Score, Trial


class TrialRecord:
    """Trials and rows of the held-out half, written as they come.

    Args:
      path: of the JSON file.
      head: what stands before them; its `settings` must be those of what is there already.

    Raises:
      UserError: the file is another program's, or of a search with other settings.
    """

    def __init__(self, path: Path, head: dict[str, Any]):
        check_target(path)
        self._path, self._head = path, json.loads(json.dumps(head))
        self._scores: dict[str, Score] = {}
        self._trials: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            self._read()

    def _read(self) -> None:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            settings, self._trials, self.rows = dict(found["settings"]), list(found["trials"]), list(found["rows"])
            self._scores = {trial["policy"]: Score(**trial["score"]) for trial in self._trials}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self._path} is no record of this program; give another --work.") from error
        here = self._head["settings"]
        changed = sorted(name for name in {*settings, *here} if settings.get(name) != here.get(name))
        if changed:
            listed = ", ".join(changed)
            raise UserError(f"{self._path} is of a search with other settings ({listed}); give another --work.")

    def score(self, policy: Policy) -> Score | None:
        """What a judge said of a policy, in this run or before it."""
        return self._scores.get(str(policy))

    def add_trial(self, trial: Trial) -> None:
        """Writes a trial, unless it is there."""
        if trial.policy in self._scores:
            return
        self._trials.append(dataclasses.asdict(trial))
        self._scores[trial.policy] = trial.score
        self._write()

    def row(self, task: str, question: str, policy: str) -> dict[str, Any] | None:
        """A row of the held-out half that is there already."""
        wanted = task, question, policy
        return next((row for row in self.rows if (row["task"], row["question"], row["policy"]) == wanted), None)

    def add_row(self, row: dict[str, Any]) -> None:
        """Writes a row of the held-out half."""
        self.rows.append(row)
        self._write()

    def finish(self, **facts: Any) -> None:
        """Writes what came of it."""
        self._head |= facts
        self._write()

    def _write(self) -> None:
        write_json(self._path, {**self._head, "trials": self._trials, "rows": self.rows})
