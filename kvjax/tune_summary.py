"""What a search came to, for the report, for the terminal and for the docstring of the config."""

import dataclasses
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.table import Table

from kvjax.grammar import parse_policy
from kvjax.policy import Policy
from kvjax.search import Found

_WIDTH = 116


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """A finished search.

    Attributes:
      found: its trials.
      rows: of the held-out half, `full` among them.
      verdicts: the winner against policies that are one codec or one selection alone (`kvjax/verdict.py`).
      limit: most bytes a token.
      sizes: policy -> its bytes a token, and uncompressed ones.
    """

    found: Found
    rows: list[dict[str, Any]]
    verdicts: list[dict[str, Any]]
    limit: float
    sizes: Callable[[Policy], tuple[float, float]]

    def facts(self) -> dict[str, Any]:
        """What the report says beside trials and rows."""
        winner = self.found.best()
        size, uncompressed = self.sizes(parse_policy(winner.policy))
        return {
            "policy": winner.policy,
            "kind": winner.kind,
            "limit": self.limit,
            "bytes_per_token": size,
            "uncompressed_bytes_per_token": uncompressed,
            "front": [trial.policy for trial in self.found.front()],
            "verdicts": self.verdicts,
            "refused": self.found.refused,
        }

    def table(self) -> Table:
        """The trials that no other beats in quality and bytes both."""
        uncompressed = self.sizes(Policy())[1]
        title = f"search half, best of {len(self.found.trials)} policies, at most {self.limit:,.1f} bytes a token"
        table = Table(title=title, title_justify="left")
        for column in ("policy", "bytes a token", "times smaller", "accuracy", "KL"):
            table.add_column(column, justify="left" if column == "policy" else "right", overflow="fold")
        for trial in self.found.front():
            size, score = trial.bytes_per_token, trial.score
            numbers = f"{size:,.1f}", f"{uncompressed / size:.2f}", f"{score.accuracy:.1%}", f"{score.kl:.5f}"
            table.add_row(trial.policy, *numbers)
        return table

    def sentences(self) -> list[str]:
        """The winner against its rivals on the held-out half."""
        kind = self.found.best().kind
        alone = [] if kind == "mixed" else [f"The best policy that was found is one {kind} alone."]
        return [*alone, *(f"Held-out half: {verdict['words']}" for verdict in self.verdicts)]

    def notes(self, head: dict[str, Any], *, command: str) -> list[str]:
        """Paragraphs for the config.

        Args:
          head: of the report.
          command: what was typed.
        """
        facts = self.facts()
        ratio = facts["uncompressed_bytes_per_token"] / facts["bytes_per_token"]
        tried = (
            f"The best of {len(self.found.trials)} policies on {', '.join(head['settings']['cells'])}, "
            f"{self.rows[0]['examples']} examples each. A row's cache takes {facts['bytes_per_token']:,.1f} bytes a "
            f"token where the limit is {self.limit:,.1f}, {ratio:.2f} times less than uncompressed. On examples that "
            "the search has not seen (mean accuracy, divergence from the uncompressed cache, bytes a token):"
        )
        return [
            f"Found on {head['date'][:10]} at commit {head['commit']}, {head['device']['kind']}, by",
            f"    {command}",
            textwrap.fill(tried, _WIDTH),
            "\n".join(self._held_out()),
            *(textwrap.fill(line, _WIDTH, break_long_words=False) for line in self.sentences()),
        ]

    def _held_out(self) -> list[str]:
        """A line for each policy on the held-out half."""
        lines = []
        for policy in dict.fromkeys(row["policy"] for row in self.rows):
            own = [row for row in self.rows if row["policy"] == policy]
            right = float(np.mean([row.get("accuracy", row["top1_agreement"]) for row in own]))
            nats, size = float(np.mean([row["kl_mean"] for row in own])), self.sizes(parse_policy(policy))[0]
            lines.append(f"    {right:7.1%}  {nats:.5f}  {size:9,.1f}  {policy}")
        return lines
