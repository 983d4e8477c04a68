"""MILPY_SHIM_BARE: ops on memory that holds nothing and ends where arrays end give the same bits.

That such memory shows what guards and fills hide is for valgrind, ASan and compute-sanitizer to
say; tools/sanitize.sh asks the last of these."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from cpu import test_attention, test_lora, test_rope, test_sample
from helpers.cpu_shim import Array, Shim, ShimError
from helpers.linear_shim import Segments, lora_shrink


def rope_write(isa: str) -> list[Array]:
    """In a larger bucket."""
    qkv, batch, kv = test_rope.case(4, 2, 72, 16)
    batch.bucket_seqs, batch.bucket_tokens = 8, 100
    with Shim(isa, n_threads=2) as shim:
        q = shim.rope_write(qkv, *test_rope.tables(24), batch, kv, 4, 24, 1)
    return [q, kv.k, kv.v]


def attention(isa: str) -> list[Array]:
    """A row and a chunk of several splits, twice: whatever the workspace holds."""
    seq = test_attention.sequence(1300, 4, 2, 40)
    q, batch, kv = test_attention.paged([(seq, 1299, 1300), (seq, 1200, 1300)], 16)
    with Shim(isa, n_heads=4, n_kv_heads=2, head_dim=40, max_position=1300) as shim:
        return [shim.attention(q, batch, kv, 4, 0.2, layer=1) for _ in range(2)]


def sample(isa: str) -> list[Array]:
    """Rows that are not dense, in a larger bucket."""
    rows = [test_sample.options(1.0, 40, 0.9, 5, i) for i in range(3)]
    with test_sample.shim_for(isa, 8, 1000) as shim:
        samples, last = shim.sample(test_sample.logits_of(3, 1000), rows, bucket=8, ld=1003)
    return [np.frombuffer(b"".join(map(bytes, samples)), np.uint8), last]


def shrink(isa: str) -> list[Array]:
    """Where an adapter lacks a part, v keeps its NaN."""
    with Shim(isa, hidden=test_lora.K) as shim:
        weight, x, adapters = test_lora.make(shim, [40, 24, 8], 0)
        segments = Segments(weight, adapters, test_lora.ROWS_OF, len(x))
        v = lora_shrink(weight, x, segments)
    assert np.isnan(v).any()
    return [v.view(np.uint32)]


@pytest.mark.parametrize("op", [rope_write, attention, sample, shrink])
def test_bare_memory_changes_no_bits(
    isa: str, op: Callable[[str], list[Array]], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for value in ("", "0", "1"):
        monkeypatch.setenv("MILPY_SHIM_BARE", value)
        found.append(op(isa))
    for got in found[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(got, found[0], strict=True))


def test_another_value_is_refused(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILPY_SHIM_BARE", "yes")
    with pytest.raises(ShimError, match='MILPY_SHIM_BARE is "yes", expected 0 or 1'):
        Shim(isa)
