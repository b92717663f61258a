"""What benchmarks measure beside ours: cases, and other libraries in processes of their own."""

import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from kvjax.errors import UserError, unknown

PEERS = ("transformers",)
_INSTALL = "pip install torch==2.13.0 transformers (in an environment of their own, then --peer_python=PATH)"


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured: `batch` rows that have seen `context` tokens decode new ones."""

    batch: int
    context: int

    def __str__(self) -> str:
        return f"batch {self.batch}, context {self.context}"


def parse_case(text: str) -> Case:
    """Reads "8x1024", batch times context."""
    batch, _, context = text.partition("x")
    if not (batch.isdigit() and context.isdigit() and int(batch) and int(context)):
        raise UserError(f"The case '{text}' is not BATCHxCONTEXT, such as 8x1024.")
    return Case(int(batch), int(context))


class Transformers:
    """Hugging Face transformers, in a process of its own that answers one case at a time."""

    name = "transformers"
    cache_bytes = None

    def __init__(self, python: str, model: Path):
        self._model = str(model)
        script = Path(__file__).with_name("peer_transformers.py")
        self._faults = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in close); what the peer says when it fails
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._faults}
        try:
            self._process = subprocess.Popen([python, str(script)], text=True, **pipes)
        except OSError as error:
            self._faults.close()
            raise UserError(f"There is no Python '{python}' to run transformers with: {error.strerror}.") from error
        hello = json.loads(self._process.stdout.readline() or '{"missing": "a working Python"}')
        self.missing: str | None = hello.get("missing")
        self.versions: dict[str, str] = hello.get("ready", {})

    def seconds_per_step(self, case: Case, new_tokens: int) -> float:
        """Seconds of one decode step, prefill and first token apart."""
        asked = {"model": self._model, "batch": case.batch, "context": case.context, "new_tokens": new_tokens}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            self._faults.seek(0)
            said = self._faults.read().strip().splitlines() or ["it said nothing"]
            raise UserError(f"transformers failed on {case}: {said[-1]}")
        return json.loads(answer)["seconds_per_step"]

    def close(self) -> None:
        """Ends the process."""
        with self._faults, self._process:  # closes the pipes and waits
            self._process.stdin.close()


def start_peers(names: list[str], python: str, folder: Path) -> list[Transformers]:
    """Starts the peers that are there; names those that are not."""
    started = []
    for name in names:
        if name not in PEERS:
            raise unknown("peer", name, PEERS)
        peer = Transformers(python, folder)
        if peer.missing:
            print(f"skipped {name}: {python} lacks {peer.missing}. To install: {_INSTALL}", file=sys.stderr)
            peer.close()
        else:
            started.append(peer)
    return started
