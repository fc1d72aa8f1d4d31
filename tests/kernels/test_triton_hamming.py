"""`hamming` of the Triton kernels: bit by bit that of the reference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from native_scenes import laid_out
from triton_scenes import FEW, here, kernels, there

from loki_attn.errors import LokiAttnError
from loki_attn.kernels import backends, ops, reference
from loki_attn.kernels.triton import tuning
from loki_attn.kernels.triton.tuning import Cut

pytestmark = pytest.mark.usefixtures("quick_interpreter")


def words(*shape, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, generator=draw).to(torch.int32)


def view(codes):
    """The same words with poison beside them; `laid_out` fills with NaN, which words have not."""
    return laid_out(codes.view(torch.float32), "view").view(torch.int32)


def check(query, codes):
    found = here(kernels.hamming(*there((query, codes))))
    assert found.dtype == torch.float32
    assert torch.equal(found, reference.hamming(query, codes))


@FEW
@given(
    sizes=st.tuples(*(st.integers(1, n) for n in (2, 3, 4, 3))),
    seq=st.one_of(st.integers(1, 40), st.sampled_from([256, 257, 300])),
    count=st.sampled_from([1, 2, 3, 4, 5, 8, 33]),
    layout=st.sampled_from([torch.Tensor.contiguous, view]),
    seed=st.integers(0, 2**31),
)
def test_hamming_is_that_of_the_reference(sizes, seq, count, layout, seed):
    batch, kv_heads, group, q_len = sizes
    query = words(batch, kv_heads * group, q_len, count, seed=seed)
    codes = words(batch, kv_heads, seq, count, seed=seed + 1)
    check(layout(query), layout(codes))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 16, 33, 256])
def test_codes_of_any_length(count):
    check(words(2, 4, 2, count), words(2, 2, 70, count, seed=1))


def test_hamming_of_the_ends_of_the_range():
    """All bits, no bits, and the sign bit alone: nothing overflows."""
    numbers = [0, -1, -(2**31), 2**31 - 1, 1, 0x55555555, 0x0F0F0F0F]
    codes = torch.tensor(numbers, dtype=torch.int32)[None, None, :, None]
    check(codes, codes)
    found = here(kernels.hamming(*there((codes[:, :, :2], codes[:, :, :2]))))
    assert found.tolist() == [[[[0.0, 32.0], [32.0, 0.0]]]]


@pytest.mark.parametrize("q_len", [1, 3, 5])
def test_blocks_of_queries_and_rows_make_no_difference(monkeypatch, q_len):
    """Rows and queries before, at and behind the end of a block."""
    monkeypatch.setattr(tuning, "HAMMING_QUERIES", 4)
    monkeypatch.setattr(tuning, "hamming_cut", lambda _: Cut(block=32, warps=1))
    query = words(1, 6, q_len, 4)
    for seq in (1, 31, 32, 33, 64):
        check(query, words(1, 2, seq, 4, seed=seq))


ASKED, CODES = words(2, 4, 3, 3), words(2, 2, 20, 3, seed=1)
REFUSED = {
    "codes of 64 bits": {"codes": CODES.long()},
    "a query of 64 bits": {"query_codes": ASKED.long()},
    "meta codes": {"codes": CODES.to("meta")},
    "a meta query": {"query_codes": ASKED.to("meta")},
    "codes of other words": {"codes": CODES[..., :2]},
    "codes of another batch": {"codes": CODES[:1]},
    "no codes": {"codes": CODES[:, :, :0]},
    "flat codes": {"codes": CODES[0]},
    "scattered codes": {"codes": CODES.mT.contiguous().mT},
    "codes of heads that cannot share": {"query_codes": ASKED[:, :3]},
    "long codes": {"query_codes": words(2, 4, 3, 257), "codes": words(2, 2, 20, 257)},
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_served_is_refused_before_anything_is_done(monkeypatch, case):
    """Asked for by name, it is an error that says why."""
    monkeypatch.setattr(kernels.columns, "count_bits", None)  # nothing may be launched
    args = {"query_codes": ASKED, "codes": CODES, **REFUSED[case]}
    args = [codes if codes.is_meta else there(codes) for codes in args.values()]
    with pytest.raises(backends.Unserved) as why:
        kernels.hamming(*args)
    with pytest.raises(LokiAttnError) as refused:
        ops("triton").hamming(*args)
    assert str(refused.value) == (
        f"Backend 'triton' was asked for, and cannot run 'hamming' here because {why.value}; "
        "drop the request to let plain torch serve it."
    )


def test_several_queries_come_to_the_kernels(monkeypatch):
    """Ops of one query token go to plain torch with more; this does not."""
    asked = []
    monkeypatch.setattr(kernels, "hamming", lambda *_: asked.append("hamming"))
    ops.cache_clear()
    try:
        ops("triton").hamming(ASKED, CODES)
    finally:
        monkeypatch.undo()
        ops.cache_clear()
    assert asked == ["hamming"]
