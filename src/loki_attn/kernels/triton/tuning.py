"""How work is cut into programs: the few numbers that decide speed, and why they are what they are.

There is no autotuner: a table of this size can be read, and a captured graph must never meet a
search. Results never depend on any of these numbers but for the order of float sums.
"""

from dataclasses import dataclass
from typing import Any, Final, final

from loki_attn.kernels.triton.request import power_of_two

# Splits of one list, at most: a program of `merge` holds a part of the output for each.
MERGED_SPLITS: Final = 64
# Splits of one row that is ranked: every program of `compact` reads the bins of all of them, 2 KiB
# each, so more of them would soon cost more than the lead.
RANK_SPLITS: Final = 32


# A product and a sum become one instruction, whatever the default of a Triton is.
_FUSED: Final[dict[str, Any]] = {"enable_fp_fusion": True}


@final
@dataclass(frozen=True)
class Cut:
    """How one kernel is launched.

    Attributes:
        block: Rows that a program handles at a time.
        warps: Warps of a program.
        stages: Depth of the load pipeline, where the kernel loads in a loop.
    """

    block: int
    warps: int
    stages: int = 1

    @property
    def launch(self) -> dict[str, Any]:
        """What a launch is told beside its arguments."""
        return {"num_warps": self.warps, "num_stages": self.stages, **_FUSED}


def score_cut(kind: str, heads: int, row_bytes: int) -> Cut:
    """For kernels that stream the lead.

    Tiles: all lines of a block are in flight at once, 4 rows to a thread; every head keeps a
    product, a peak and a sum of each row in registers, so more heads mean fewer rows. Plain rows go
    through the tensor cores, in a pipeline: blocks are as long as the smaller GPUs have shared
    memory for, which is 99 KiB a program.

    Args:
        kind: What ranks the rows, as in `LeadForm`.
        heads: Padded heads of a chooser.
        row_bytes: Bytes of a padded row, for plain rows.
    """
    if kind == "rows":
        if row_bytes <= 128:
            return Cut(block=128, warps=4, stages=3)
        return Cut(block=64, warps=4, stages=3) if row_bytes <= 256 else Cut(32, 4, stages=2)
    return Cut(block=128 * max(1, min(4, 16 // heads)), warps=4)


# Compacting reads 4 bytes a row: long blocks, for few scans.
CHOOSE: Final = Cut(block=1024, warps=4)
# One program refines a whole row's candidates, which all wait for it: many warps.
REFINE: Final = Cut(block=4096, warps=16)
APPEND: Final = Cut(block=16, warps=4)
# A program each for what is small: the query of a chooser, the splits of a head.
MAP: Final = Cut(block=16, warps=4)
MERGE: Final = Cut(block=1, warps=4)


def map_block(rank: int) -> int:
    """Dimensions that are mapped at a time, for maps of a padded rank: 32 KiB of a map."""
    return max(16, min(64, 8192 // rank))


def attend_cut(row_bytes: int) -> Cut:
    """For exact attention: 64 gathered rows in flight twice over; of long rows 32 to more warps."""
    return Cut(64, warps=4, stages=3) if row_bytes <= 256 else Cut(32, warps=8, stages=2)


def splits_of(rows: int, choosers: int, block: int, programs: int, most: int) -> tuple[int, int]:
    """Cut `rows` rows of each of `choosers` into splits of whole blocks.

    Args:
        rows: Rows of a list or a cache.
        choosers: Lists that are cut alike.
        block: Rows that a program handles at a time.
        programs: Programs that keep the device busy.
        most: Splits at most.

    Returns:
        The number of splits and the rows of each.
    """
    blocks = max(1, -(-rows // block))
    wanted = min(most, blocks, max(1, -(-programs // max(choosers, 1))))
    each = -(-blocks // wanted)
    return -(-blocks // each), each * block


@final
@dataclass(frozen=True)
class Pane:
    """How a kernel is launched that meets queries with rows in blocks of both.

    Attributes:
        queries: Queries of a block.
        rows: Rows of a block.
        warps: Warps of a program.
        stages: Depth of the pipeline that loads the blocks of the loop.
        registers: The most that a thread may take; None for what the compiler likes.
    """

    queries: int
    rows: int
    warps: int
    stages: int
    registers: int | None = None

    @property
    def launch(self) -> dict[str, Any]:
        """What a launch is told beside its arguments."""
        own = {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}
        return {**own, **_FUSED}


# float32 numbers become three products on tensor cores, whose parts fill the registers of small
# blocks already.
_WIDE_PANE: Final = Pane(queries=16, rows=64, warps=8, stages=2)


def query_pane(counted: int, head_dim: int, itemsize: int, *, masked: bool) -> Pane:
    """For the soft-max sums of queries: a program holds its queries and streams the rows.

    128 queries read a row half as often as 64; a mask takes the registers of those. Two programs
    of 8 warps fit a multiprocessor, so that one's exponentials meet the other's products.
    """
    if itemsize > 2:
        return _WIDE_PANE
    side = _side(counted)
    if head_dim > 128:
        return Pane(min(side, 64), rows=64, warps=8, stages=2)
    if masked or side <= 64:
        return Pane(min(side, 64), rows=128, warps=8, stages=2)
    return Pane(128, rows=64, warps=8, stages=3)


def row_pane(counted: int, head_dim: int, itemsize: int, *, plain: bool) -> Pane:
    """For what rows receive: a program holds its rows and streams the queries; see above.

    Plain means without mask and bias: the compiler then needs no more than 128 registers, though
    it likes more, and again two programs fit a multiprocessor.
    """
    if itemsize > 2:
        return _WIDE_PANE
    side = min(_side(counted), 64)
    if head_dim > 128:
        return Pane(side, rows=64, warps=8, stages=2)
    return Pane(side, rows=128, warps=8, stages=3, registers=128 if plain else None)


def _side(size: int) -> int:
    """The least power of two that is at least `size` and fills a side of a tensor-core product."""
    return max(16, power_of_two(size))


# One pass over the numbers of each query of a head.
SETTLE: Final = Cut(block=128, warps=4)
# Queries that a program of `hamming` compares with the rows that it holds: enough that rows are
# read seldom, few enough that a prompt's queries spread over programs.
HAMMING_QUERIES: Final = 64


def hamming_cut(words: int) -> Cut:
    """For codes held in registers, 16 words to a thread at most; 256 rows of codes of 128 bits."""
    return Cut(block=min(256, max(32, 2048 // words)), warps=4)
