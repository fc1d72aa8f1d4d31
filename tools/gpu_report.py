"""Measure decode steps on the GPU of this machine: all cells of the table, important ones first.

    PYTHONPATH=src python tools/gpu_report.py --minutes 9

Rows go to docs/results/gpu-<device>.jsonl as soon as a cell is done, and the page beside them is
written anew. A second run goes on where the first one stopped: it passes over what was measured of
the same commit. A cell that takes the process down with it is tried once more, in a new process.
Where git does not know the sources, say which they are: --commit 1a2b3c4.
"""

import argparse
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from gpu_page import write_page

from loki_attn.bench.decode import DecodeBench, Outcome, measure_decode, place_named
from loki_attn.bench.place import Place
from loki_attn.bench.shapes import shape_named
from loki_attn.errors import LokiAttnError
from loki_attn.evaluate.results import append_rows, read_rows
from loki_attn.provenance import provenance

FOLDER = Path("docs/results")
AMOUNTS = ("512", "2048", "T/8")
PLANES = ("int8", "bf16", "int4")
ATTEMPTS = 2
DONE, NO_DEVICE, BROKEN, OUT_OF_TIME = 0, 2, 3, 4
# A cell is begun if it has this many times as long as the slowest one so far.
MARGIN = 1.5


@dataclass(frozen=True)
class Cell:
    """A shape, a batch and a context."""

    shape: str
    batch: int
    context: int

    @property
    def command(self) -> str:
        """What measures it alone."""
        return (
            f"loki-attn bench decode --device cuda --shape {self.shape} --batch {self.batch} "
            f"--contexts {self.context} --k {','.join(AMOUNTS)} --planes {','.join(PLANES)}"
        )

    @property
    def title(self) -> str:
        """What news call it."""
        return f"{self.shape}, batch {self.batch}, {self.context:,} tokens"


def cells() -> list[Cell]:
    """All of them: first those that the aims speak of, then the larger batches and contexts."""
    gqa, mha, short, middle, long = "llama-3.1-8b", "llama-2-7b", 8192, 32768, 131072
    order = [
        *((gqa, 8, middle), (mha, 8, middle), (mha, 1, middle), (gqa, 1, middle)),
        *((gqa, 32, middle), (gqa, 8, long), (gqa, 1, long), (gqa, 32, long)),
        *((mha, 32, middle), (mha, 1, long), (mha, 8, long)),
        *((gqa, 32, short), (gqa, 8, short), (mha, 32, short), (mha, 8, short)),
        *((gqa, 1, short), (mha, 1, short), (mha, 32, long)),
    ]
    return [Cell(*one) for one in order]


@dataclass
class Journal:
    """What happened to each cell, in a file beside the rows, a line for each beginning and end.

    Attributes:
        path: The file.
        commit: Only lines of this commit count.
    """

    path: Path
    commit: str
    lines: list[Mapping[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Read what there is."""
        found = read_rows(self.path) if self.path.is_file() else ()
        self.lines = [line for line in found if line.get("commit") == self.commit]

    def note(self, cell: Cell, state: str, **more: Any) -> None:
        """Add a line, at once."""
        line = {"cell": asdict(cell), "commit": self.commit, "state": state, **more}
        self.lines.append(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, sort_keys=True) + "\n")

    def wants(self, cell: Cell) -> bool:
        """Whether a cell is neither done nor given up."""
        own = [line["state"] for line in self.lines if line["cell"] == asdict(cell)]
        return "done" not in own and own.count("begun") < ATTEMPTS + own.count("stopped")


@dataclass(frozen=True)
class Run:
    """One run over the cells that are left.

    Attributes:
        place: Where.
        name: Of the device, as files are called.
        folder: Where rows and page go.
        commit: Of the sources.
        deadline_s: When no cell may still run, by `clock`; infinity for never.
        settings: What every bench has in common.
        clock: Seconds.
    """

    place: Place
    name: str
    folder: Path
    commit: str
    deadline_s: float = float("inf")
    settings: Mapping[str, Any] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic

    @property
    def rows(self) -> Path:
        """The file of rows."""
        return self.folder / f"gpu-{self.name}.jsonl"

    @property
    def journal(self) -> Journal:
        """What happened to the cells."""
        return Journal(self.folder / f"gpu-{self.name}.cells.jsonl", self.commit)

    def measure(self, wanted: Sequence[Cell]) -> int:
        """Measure what is left of these cells; returns the exit code."""
        journal, slowest_s = self.journal, 0.0
        left = [cell for cell in wanted if journal.wants(cell)]
        for cell in left:
            began_s = self.clock()
            if began_s + MARGIN * slowest_s >= self.deadline_s:
                say(f"out of time before {cell.title}; run again to go on")
                return OUT_OF_TIME
            journal.note(cell, "begun")
            try:
                outcome = self._measure(cell)
            except KeyboardInterrupt:
                journal.note(cell, "stopped")
                raise
            # Whatever it was, other cells are worth measuring on a machine that is lent, but the
            # device may be beyond use for this process.
            except Exception as error:  # noqa: BLE001
                reason = f"{type(error).__name__}: {error}".split("\n")[0]
                journal.note(cell, "broken", reason=reason)
                say(f"{cell.title} broke off: {reason}")
                return BROKEN
            slowest_s = max(slowest_s, self.clock() - began_s)
            said = {"left_out": outcome.left_out, "failures": outcome.failures}
            journal.note(cell, "done", **said, seconds=round(self.clock() - began_s, 1))
            self.page()
        return DONE

    def _measure(self, cell: Cell) -> Outcome:
        bench = DecodeBench(
            shape=shape_named(cell.shape),
            batch=cell.batch,
            contexts=(cell.context,),
            device="cuda",
            command=cell.command,
            **{"amounts": AMOUNTS, "planes": PLANES, **self.settings},
        )
        say(f"== {cell.title}")
        outcome = measure_decode(bench, say, quiet, self.place)
        rows = [
            replace(row, provenance={**row.provenance, "commit": self.commit})
            for row in outcome.rows
        ]
        if rows:
            append_rows(self.rows, rows)
        for what in (outcome.failures, outcome.left_out):
            for name, why in what.items():
                say(f"  {name}: {why}")
        for row in rows:
            if row.kind == "loki" and row.part is None and row.ratio_best_dense:
                say(
                    f"  {row.contender}: {row.median_us:.1f} us, {row.ratio_best_dense:.2f} x "
                    f"{row.best_dense}, {row.share_of_byte_limit:.0%} of the byte limit"
                )
        return outcome

    def page(self) -> None:
        """Write the page anew from the rows that there are."""
        if self.rows.is_file():
            write_page(self.rows, self.journal.lines)


def say(news: str) -> None:
    """Print at once: a machine that is lent may end in the middle."""
    print(news, flush=True)


@contextmanager
def quiet(title: str, turns: int) -> Any:
    """Show no progress within a cell."""
    del title, turns
    yield lambda done, name: None


def file_name(device: str) -> str:
    """The name of a device as a part of a file's name: "NVIDIA H200" becomes "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def supervise(run: Callable[[], int], most: int) -> int:
    """Run until it is done or out of time, at most `most` times.

    Args:
        run: Runs once, in a process of its own; returns its exit code.
        most: Processes, so that a machine that breaks every cell is given up.
    """
    code = DONE
    for _ in range(most):
        code = run()
        # A signal that ended the process is a negative code.
        if code != BROKEN and code >= 0:
            break
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the options; measure in processes that may die."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, help="begin no cell that may last longer")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--commit", help="of the sources, where git does not know them")
    parser.add_argument("--repeats", type=int, default=20, help="samples of each contender")
    parser.add_argument("--parts", action="store_true", help="time score, choose, attend as well")
    parser.add_argument("--only", type=int, help="so many cells at the most")
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.deadline is None:
        last = float("inf") if given.minutes is None else time.time() + 60 * given.minutes
        own = list(sys.argv[1:] if arguments is None else arguments)
        command = [sys.executable, __file__, *own, f"--deadline={last}"]
        return supervise(
            lambda: subprocess.run(command, check=False).returncode, ATTEMPTS * len(cells())
        )
    try:
        place = place_named("cuda")
    except LokiAttnError as error:
        say(f"error: {error}")
        return NO_DEVICE
    # A command that is cut off notes it, so that the cell does not count as broken.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    facts = place.facts()
    say(json.dumps(facts))
    commit = given.commit or provenance()["commit"] or "unknown"
    settings = {"repeats": given.repeats, "parts": given.parts}
    name = file_name(str(facts["gpu"]))
    return Run(place, name, given.folder, commit, given.deadline, settings, time.time).measure(
        cells()[: given.only]
    )


if __name__ == "__main__":
    sys.exit(main())
