"""What the TPU compiler makes of each kernel: cycles of its static schedule beside cycles of its memory traffic.

    python -m kernels_pallas.schedule --chip=v6e
    python -m kernels_pallas.schedule --chip=v5e --cases=decode_attention.int4.g8
    python -m kernels_pallas.schedule --write      # every chip and case, into kernels_pallas/schedule.tsv; half an hour

libtpu compiles for chips that are not there (pip install 'kvjax[aot]'). A TPU core issues one bundle a cycle, so the
bundles of a kernel's grid loop are the cycles of one step, waits for memory apart; a step's bytes over the bandwidth
are the cycles that memory takes. A ratio below 1 says that memory is what it waits for. The first loops within a step
count as often as the case says that they run; others are for what is rare (ties, values of empty slots).
"""

import argparse
import concurrent.futures
import csv
import dataclasses
import glob
import importlib.metadata
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from kernels_pallas._tpu import LIBTPU
from kernels_pallas.decode_attention import cases as decode_attention
from kernels_pallas.encode import cases as encode
from kernels_pallas.score import cases as score
from kernels_pallas.select import cases as select
from kernels_pallas.slots import cases as slots

_CONTROL = 12  # bundles in a row; between two loops there are more
TABLE = Path(__file__).with_name("schedule.tsv")


@runtime_checkable
class Case(Protocol):
    """A named shape of an operation; the kernel bears the name's first part."""

    @property
    def name(self) -> str:
        """Operation, a dot, and what is special."""

    def loop_trips(self, device: str) -> tuple[tuple[int, ...], ...]:
        """How often the first loops within a step run, each with one within it; empty if all are for what is rare."""

    def runs_on(self, device: str) -> bool:
        """Whether the kernel serves a kind of device."""

    def step_bytes(self, device: str) -> float:
        """What one step of the grid reads and writes."""

    def build(self, mesh: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """A function to compile for the device of a mesh, and the shapes of its arguments."""


CASES: dict[str, Case] = {
    case.name: case for operation in (decode_attention, encode, score, select, slots) for case in operation.CASES
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak numbers as published; a chip with two cores shares its memory between them.

    Attributes:
      topology: that libtpu compiles for.
      device: its kind, as JAX names it.
      hbm: bytes a second.
      clock: cycles a second.
      cores: of a chip.
    """

    topology: str
    device: str
    hbm: float
    clock: float
    cores: int = 1


CHIPS = {
    "v5e": Chip("v5e:2x2", "TPU v5 lite", 8.19e11, 1.5e9),
    "v5p": Chip("v5p:2x2x1", "TPU v5", 2.765e12, 1.75e9, 2),
    "v6e": Chip("v6e:2x2", "TPU v6 lite", 1.64e12, 1.75e9),
    "tpu7x": Chip(
        "tpu7x:2x2x1", "TPU7x", 7.37e12, 1.75e9, 2
    ),  # its clock is not published: compare ratios of one chip only
}


@dataclasses.dataclass(frozen=True)
class Row:
    """What was found for one case on one chip.

    Attributes:
      chip: name.
      case: name.
      compute: cycles of a step.
      memory: cycles that its bytes take.
      ratio: compute over memory.
      spills: registers that a step writes to memory for lack of room.
      jax: version.
      libtpu: version.
    """

    chip: str
    case: str
    compute: int
    memory: int
    ratio: float
    spills: int
    jax: str
    libtpu: str


def compile_case(case: Case, topology: str) -> Any:
    """One case, compiled; to be called in a process of its own, which libtpu's flags are for."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    topology = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    mesh = Mesh(np.array(topology.devices)[:1].reshape(1, 1), ("data", "model"))
    placed = NamedSharding(mesh, PartitionSpec())
    function, shapes = case.build(mesh)
    return jax.jit(function, in_shardings=placed, out_shardings=placed).lower(*shapes).compile()


def measure(name: str, chip: str) -> Row:
    """Compiles one case in a process of its own and reads the schedule.

    Raises:
      RuntimeError: the compiler refused the kernel.
    """
    case, facts = CASES[name], CHIPS[chip]
    with tempfile.TemporaryDirectory() as folder:
        environment = dict(
            os.environ,
            JAX_PLATFORMS="cpu",
            LIBTPU_INIT_ARGS=f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
            **LIBTPU,
        )
        command = [sys.executable, "-m", "kernels_pallas.schedule", f"--chip={chip}", f"--compile={name}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{name} does not compile for {chip}:\n{done.stderr[-3000:]}")
        compute, spills = read_schedule(folder, name.split(".")[0], trips=case.loop_trips(facts.device))
    memory = case.step_bytes(facts.device) / (facts.hbm / facts.cores) * facts.clock
    versions = [importlib.metadata.version(package) for package in ("jax", "libtpu")]
    return Row(chip, name, compute, round(memory), round(compute / memory, 3), spills, *versions)


def read_schedule(folder: str, kernel: str, *, trips: tuple[tuple[int, ...], ...]) -> tuple[int, int]:
    """Bundles of a kernel's grid loop, and the spills among them, from the compiler's dump.

    Args:
      folder: of the dump.
      kernel: name.
      trips: of the first loops within a step, each with those of the one within it.
    """
    (bundles,) = [path for path in glob.glob(f"{folder}/*{kernel}*-final_bundles.txt") if "analysis" not in path]
    stem = re.sub(r"-\d+-final_bundles\.txt$", "", bundles)
    (use,) = glob.glob(glob.escape(stem) + "-*-final_hlo-static-per-bundle-utilization.txt")
    found = (
        re.match(r"^\s*(?:0x)?[0-9a-f]+\s+(?:[A-Z]{2})?\s*:\s*((?:>\s*)*)\{", line)
        for line in Path(bundles).read_text().splitlines()
    )
    depths = [match.group(1).count(">") for match in found if match]
    lines = Path(use).read_text().splitlines()
    spill = [name.strip() for name in lines[1].split(",")].index("VSTORE:SPILL")
    spills = [int(row.split()[spill]) for row in lines[4:] if row.strip()]
    times = [int(depth == 1) for depth in depths]
    for number, loop in enumerate(_loops(depths)):
        for index in loop:
            within = depths[index] - 1 if depths[index] > 1 else 1  # a bundle of control is listed further out
            times[index] = math.prod(trips[number][:within]) if number < len(trips) else 0
    return sum(times), sum(spilled * often for spilled, often in zip(spills, times, strict=False))


def _loops(depths: list[int]) -> list[range]:
    """Bundles of each deeper loop, with the few of control among them that are listed further out."""
    loops: list[range] = []
    for index in (index for index, depth in enumerate(depths) if depth > 1):
        if loops and index - loops[-1].stop < _CONTROL:
            loops[-1] = range(loops[-1].start, index + 1)
        else:
            loops.append(range(index, index + 1))
    return loops


def show(row: Row) -> None:
    """Prints a row."""
    bound = "memory" if row.ratio <= 1 else "COMPUTE"
    print(
        f"{row.chip:6} {row.case:32} {row.compute:6} compute {row.memory:6} memory cycles a step, "
        f"ratio {row.ratio:.2f}, bound by {bound}, {row.spills} spills",
        flush=True,
    )


def read() -> dict[tuple[str, str], dict[str, str]]:
    """The committed table: (chip, case) -> row."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        return {(row["chip"], row["case"]): row for row in csv.DictReader(file, delimiter="\t")}


def in_markdown() -> str:
    """Ratios of the committed table, and registers spilled in a step, case by case; README repeats it."""
    known, chips = read(), list(CHIPS)
    lines = [f"| case | {' | '.join(chips)} | spills |", "| --- " * (len(chips) + 2) + "|"]
    for case in CASES:
        found = [known.get((chip, case)) for chip in chips]
        ratios = ["-" if row is None else f"{float(row['ratio']):.2f}" for row in found]
        spills = ["-" if row is None else row["spills"] for row in found]
        lines.append(f"| `{case}` | {' | '.join(ratios)} | {' '.join(spills)} |")
    return "\n".join(lines)


def write(rows: list[Row]) -> None:
    """Puts rows into the table; those of other chips and cases stay."""
    names = [field.name for field in dataclasses.fields(Row)]
    known = read() if TABLE.exists() else {}
    table = {
        (chip, case): known.get((chip, case))
        for chip, facts in CHIPS.items()
        for case in CASES
        if CASES[case].runs_on(facts.device)
    }
    table |= {(row.chip, row.case): dataclasses.asdict(row) for row in rows}
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for row in table.values() if row is not None)


def main() -> int:
    """Runs the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=sorted(CHIPS), help="only this one")
    parser.add_argument("--cases", help="names, separated by commas; all if not given")
    parser.add_argument("--write", action="store_true", help="put what is measured into the committed table")
    parser.add_argument("--markdown", action="store_true", help="print the committed table, and compile nothing")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.compile:
        compile_case(CASES[given.compile], CHIPS[given.chip].topology)
        return 0
    if given.markdown:
        print(in_markdown())
        return 0
    names = given.cases.split(",") if given.cases else list(CASES)
    if unknown := [name for name in names if name not in CASES]:
        print(f"error: Unknown case '{unknown[0]}'. Known: {', '.join(CASES)}.", file=sys.stderr)
        return 2
    chips = [given.chip] if given.chip else list(CHIPS)
    wanted = [(name, chip) for chip in chips for name in names if CASES[name].runs_on(CHIPS[chip].device)]
    rows = []
    with concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for row in pool.map(lambda pair: measure(*pair), wanted):
            rows.append(row)
            show(row)
    if given.write:
        write(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
