"""How work is cut into programs: the few numbers that decide speed, and why they are what they are.

There is no autotuner: a table of this size can be read, and a captured graph must never meet a
search. Every number is a power of two; results never depend on any of them but for the order of
float sums.
"""

from dataclasses import dataclass
from typing import Final, final

# Splits of one row that meet again: `rank_rows` and `merge` hold one number of each in a program.
MOST_SPLITS: Final = 64


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


def score_cut(kind: str, heads: int) -> Cut:
    """For kernels that stream the lead.

    Tiles: 4 rows to a thread, so that a load of a line is 16 bytes and all lines of a block are in
    flight at once; more heads mean more registers per row, so fewer rows. Plain rows go through
    the tensor cores, 128 rows at a time, with loads in a pipeline of 3.
    """
    if kind == "rows":
        return Cut(block=128, warps=4, stages=3)
    block = min(512, max(64, 2048 // heads))
    return Cut(block=block, warps=max(1, block // 128))


# Compacting reads 4 bytes a row: long blocks, for few scans.
CHOOSE: Final = Cut(block=1024, warps=4)
# One program refines a whole row's candidates, which all wait for it: many warps.
REFINE: Final = Cut(block=4096, warps=16)
EDGES: Final = Cut(block=4096, warps=8)
APPEND: Final = Cut(block=16, warps=4)


def attend_cut(head_dim: int) -> Cut:
    """For exact attention: 64 gathered rows in flight twice over; fewer where rows are long."""
    return Cut(block=64, warps=4, stages=3) if head_dim <= 128 else Cut(block=32, warps=4, stages=2)


def splits_of(rows: int, choosers: int, block: int, programs: int) -> tuple[int, int]:
    """Cut `rows` rows of each of `choosers` into splits of whole blocks.

    Args:
        rows: Rows of a list or a cache.
        choosers: Lists that are cut alike.
        block: Rows that a program handles at a time.
        programs: Programs that keep the device busy.

    Returns:
        The number of splits, 1 to 64, and the rows of each.
    """
    blocks = max(1, -(-rows // block))
    wanted = min(MOST_SPLITS, blocks, max(1, -(-programs // max(choosers, 1))))
    each = -(-blocks // wanted)
    return -(-blocks // each), each * block
