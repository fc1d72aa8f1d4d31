"""On the device: how many bits of the codes of queries and rows differ."""

import triton
import triton.language as tl


@triton.jit
def _set_bits(words):
    """How many bits of each word are set: sums of neighbours of 1, 2, 4, then of its 4 bytes.

    The compiler knows this sequence and makes it one instruction.
    """
    bits = words.to(tl.uint32, bitcast=True)
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    return ((bits * 0x01010101) >> 24).to(tl.int32)


@triton.jit(do_not_specialize=["asked", "q_len", "seq"])
def count_bits(
    out, query, query_b, query_h, query_q, codes, codes_b, codes_h, codes_t, asked, q_len, seq,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, WORDS: tl.constexpr, WP: tl.constexpr,
    QUERIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write float32 [batch, heads, q_len, T] for a block of rows and some queries of their group.

    Grid: blocks of rows, batch * kv_heads, blocks of the `asked` = GROUP * q_len queries. The codes
    of the rows are read once and stay in registers.
    """
    row = tl.program_id(1).to(tl.int64)
    b = row // KV_HEADS
    kv = row % KV_HEADS
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    words = tl.arange(0, WP)
    inside = (t < seq)[:, None] & (words < WORDS)[None, :]
    at = codes + b * codes_b + kv * codes_h + t.to(tl.int64)[:, None] * codes_t
    held = tl.load(at + words[None, :], mask=inside, other=0)
    first = tl.program_id(2) * QUERIES
    for n in range(first, tl.minimum(first + QUERIES, asked)):
        head = kv * GROUP + n // q_len
        there = query + b * query_b + head * query_h + (n % q_len).to(tl.int64) * query_q
        code = tl.load(there + words, mask=words < WORDS, other=0)
        apart = tl.sum(_set_bits(held ^ code[None, :]), 1)
        to = out + (row * asked + n) * seq + t
        tl.store(to, apart.to(tl.float32), mask=t < seq)
