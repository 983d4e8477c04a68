"""The table of memory on the CPU: rows are what was allocated, and sum up to all there is."""

from __future__ import annotations

import json
import logging
import mmap
from pathlib import Path

import pytest
from helpers.mixed_load import check_steps_allocate_nothing
from helpers.tiny_llama import llama_config

from milpy import _C, LLM, demo
from milpy.errors import EngineError, OutOfMemoryError, RequestError
from milpy.memory import MemoryReport, show_bytes

HUGE = 2 << 20


def rounded(n: int) -> int:
    """As slabs of the host are: to pages, and to huge ones from their size on."""
    unit = mmap.PAGESIZE if n < HUGE else HUGE
    return -(-n // unit) * unit


def test_rows_sum_up_to_the_total(llm: LLM) -> None:
    report = llm.memory()
    assert report.device == "cpu"
    assert sum(n for _, n in report.rows()) == report.total_bytes
    assert report.total_bytes == _C.machine_report()["memory_bytes"]
    assert 0 < report.free_bytes < report.total_bytes
    assert report.graph_bytes == report.pinned_bytes == 0


def test_rows_are_what_was_allocated(folders: Path) -> None:
    before = _C.memory_held()
    options = {"kv_cache_bytes": 8 << 20, "max_num_seqs": 4, "n_threads": 1, "progress": False}
    with LLM(folders / "model", **options) as llm:
        report, stats = llm.memory(), llm.stats()
        held = _C.memory_held() - before
        assert report.weight_bytes == stats["weight_bytes"]
        assert report.kv_bytes == rounded(stats["kv_bytes"])
        assert stats["workspace_bytes"] <= report.workspace_bytes <= held
        ours = report.weight_bytes + report.kv_bytes + report.workspace_bytes
        # The rest is small: requests, events, threads, the scheduler's lists.
        assert ours <= held < ours + (4 << 20)


def test_adapters_come_and_go_in_their_row(folders: Path) -> None:
    with LLM(folders / "model", adapters={"a": folders / "a"}, progress=False) as llm:
        one = llm.memory()
        assert one.adapter_bytes == llm.stats()["adapter_bytes"] > 0
        llm.load_adapter("b", folders / "b")
        both = llm.memory()
        assert both.adapter_bytes == llm.stats()["adapter_bytes"] > one.adapter_bytes
        llm.unload_adapter("b")
        assert llm.memory().adapter_bytes == one.adapter_bytes
        assert both.weight_bytes == one.weight_bytes and both.kv_bytes == one.kv_bytes


def test_pages_that_nothing_touched_are_not_free(folders: Path) -> None:
    """KV is promised when the engine is made, and the system gives it when it is written."""
    with LLM(folders / "model", kv_cache_bytes=512 << 20, n_threads=1, progress=False) as llm:
        report = llm.memory()
        free = _C.machine_report()["memory_free_bytes"]
        assert report.kv_bytes == 512 << 20
        # Other processes come and go meanwhile.
        assert report.free_bytes < free - (256 << 20)


def test_a_line_says_it_at_load(folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.INFO, "milpy"),
        LLM(folders / "model", kv_cache_bytes=8 << 20, progress=False),
    ):
        pass
    assert "memory of cpu, " in caplog.text
    assert "KV pages 8.00 MiB" in caplog.text


def test_a_closed_llm_has_none(folders: Path) -> None:
    llm = LLM(folders / "model", kv_cache_bytes=8 << 20, progress=False)
    llm.close()
    with pytest.raises(EngineError, match="closed"):
        llm.memory()


def test_the_text_is_a_table_of_every_row() -> None:
    report = MemoryReport("cuda", 15 << 30, 100 << 30, 0, 2 << 30, 1 << 30, 1 << 30, 9 << 30,
                          128 << 30, 5 << 20)  # fmt: skip
    assert str(report).splitlines() == [
        "weights                   15.00 GiB   11.7%",
        "KV pages                 100.00 GiB   78.1%",
        "adapters                    0 bytes    0.0%",
        "workspace                  2.00 GiB    1.6%",
        "graphs and libraries       1.00 GiB    0.8%",
        "other                      1.00 GiB    0.8%",
        "free                       9.00 GiB    7.0%",
        "total of cuda            128.00 GiB  100.0%",
    ]
    assert report.line() == (
        "memory of cuda, 128.00 GiB: weights 15.00 GiB, KV pages 100.00 GiB, workspace 2.00 GiB, "
        "graphs and libraries 1.00 GiB, other 1.00 GiB, free 9.00 GiB"
    )


def test_bytes_are_shown_in_a_unit_that_fits() -> None:
    shown = [show_bytes(n) for n in (0, 1023, 1024, (1 << 20) - 1, 3 << 29, 5 << 50)]
    assert shown == ["0 bytes", "1023 bytes", "1.00 KiB", "1.00 MiB", "1.50 GiB", "5120.00 TiB"]


def test_a_context_that_does_not_fit_says_by_how_many_bytes(folders: Path) -> None:
    with pytest.raises(RequestError, match=r"at most 2032.* needs 2105344, 1056768 more"):
        LLM(folders / "model", max_model_len=4096, kv_cache_bytes=1 << 20, progress=False)


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    config = llama_config(hidden=16384, ffn=53248, layers=126, heads=128, kv_heads=8, head_dim=128)
    (tmp_path / "config.json").write_text(json.dumps(config))
    before = _C.memory_held()
    with pytest.raises(OutOfMemoryError, match=r"weights need 7\d\d\.\d\d GiB, cpu has .* too few"):
        LLM(tmp_path, load_format="dummy", device="cpu", progress=False)
    assert _C.memory_held() <= before


@pytest.mark.skipif(not demo.BASE.is_dir(), reason=f"no demo model in {demo.BASE}")
def test_steps_allocate_nothing() -> None:
    check_steps_allocate_nothing("cpu")
