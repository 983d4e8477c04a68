"""A GPU's memory: the table against the driver's own count, the share that KV pages fill, models
and adapters that do not fit, and steps that allocate nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import pytest
from helpers import cuda_arrays
from helpers.gpu import need_cuda, need_file
from helpers.mixed_load import MixedLoad, check_steps_allocate_nothing
from helpers.tiny_llama import llama_config, write_adapter

from milpy import LLM, RequestOutput, SamplingParams, demo
from milpy.errors import OutOfMemoryError

MIB = 1 << 20
# Between two of our readings the driver rounds each block up to 2 MiB, and loads a kernel or two.
SLACK = 32 * MIB
# A GPU is full with so much left: of the last few MiB the driver gives nothing to anybody.
LEFT = 8 * MIB
# What another process on the GPU may take meanwhile: two of the driver's blocks.
NEIGHBOUR = 4 * MIB
ANSWER = SamplingParams(temperature=0, max_tokens=40)


@pytest.fixture(scope="module")
def cuda() -> None:
    """Also makes the context and loads what stays with the process, before anything is measured."""
    need_cuda()
    need_file(demo.BASE, "tools/demo_train.py")
    with LLM(demo.BASE, device="cuda", progress=False, enforce_eager=True):
        pass


pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda")]


def in_use() -> int:
    free, total = cuda_arrays.memory()
    return total - free


def write_config(folder: Path, **sizes: int) -> Path:
    """A model that exists as config.json alone, for load_format dummy."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(llama_config(**sizes)))
    return folder


@pytest.fixture
def hungry(tmp_path: Path) -> Path:
    """0.2 GB of weights, and KV of 32 KiB a token: no GPU holds all that 256 sequences could."""
    return write_config(
        tmp_path / "hungry", hidden=1024, ffn=2048, layers=8, heads=8, kv_heads=8, head_dim=128,
        vocab=8192, max_positions=65536,
    )  # fmt: skip


@contextmanager
def opened(folder: Path, share: float) -> Iterator[LLM]:
    """Deterministic, so that two of them can be compared whatever their batches were."""
    with LLM(folder, device="cuda", load_format="dummy", gpu_memory_utilization=share,
             deterministic=True, progress=False) as llm:  # fmt: skip
        yield llm


def answers(llm: LLM, adapters: list[str | None]) -> list[list[int]]:
    prompts = [[5, 6, 7 + i] for i in range(12)]
    voices = cycle(adapters)
    outputs: list[RequestOutput] = llm.generate(
        prompts, ANSWER, adapter=[next(voices) for _ in prompts], use_tqdm=False
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


# ---- the table ----


def test_rows_are_what_was_taken_and_the_driver_counts_the_same() -> None:
    before = in_use()
    with LLM(demo.BASE, device="cuda", adapters=demo.ADAPTERS, kv_cache_bytes=64 * MIB,
             progress=False) as llm:  # fmt: skip
        report, stats = llm.memory(), llm.stats()
        free, total = cuda_arrays.memory()
        assert (report.free_bytes, report.total_bytes) == (free, total)
        assert sum(n for _, n in report.rows()) == total
        assert report.weight_bytes == stats["weight_bytes"]
        assert report.kv_bytes == stats["kv_bytes"]
        assert report.adapter_bytes == stats["adapter_bytes"]
        assert report.workspace_bytes == stats["workspace_bytes"]
        assert report.graph_bytes > 0 and report.pinned_bytes > 0
        # What is not in a row of ours was there before.
        assert abs(report.other_bytes - before) < SLACK
        print(f"\n{report}")


GRAPH_BYTES = """
import sys
from milpy import LLM, demo
with LLM(demo.BASE, device="cuda", kv_cache_bytes=8 << 20, enforce_eager=sys.argv[1] == "eager",
         progress=False) as llm:
    print(llm.memory().graph_bytes)
"""


def test_graphs_are_in_their_row() -> None:
    """Each in a process of its own: in one, the driver keeps what the graphs of a closed engine
    had and gives it to the next one's, eager or not."""

    def graph_bytes(how: str) -> int:
        command = [sys.executable, "-c", GRAPH_BYTES, how]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return int(done.stdout.splitlines()[-1])

    assert graph_bytes("graphs") > graph_bytes("eager")


def test_an_adapter_that_comes_and_goes_moves_bytes_between_its_row_and_free(
    tmp_path: Path,
) -> None:
    write_adapter(tmp_path / "wide", demo.BASE, rank=256)
    with LLM(demo.BASE, device="cuda", kv_cache_bytes=8 * MIB, progress=False) as llm:
        without = llm.memory()
        llm.load_adapter("wide", tmp_path / "wide")
        with_it = llm.memory()
        n_bytes = with_it.adapter_bytes - without.adapter_bytes
        assert n_bytes > LEFT
        assert 0 <= without.free_bytes - with_it.free_bytes - n_bytes < 4 * MIB
        llm.unload_adapter("wide")
        assert llm.memory().adapter_bytes == without.adapter_bytes
        assert abs(llm.memory().free_bytes - without.free_bytes) < 4 * MIB


# ---- the share ----


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_pages_fill_the_share_and_not_more(hungry: Path, share: float) -> None:
    with opened(hungry, share) as llm:
        limit = int(cuda_arrays.memory()[1] * share)
        # The page that was there while it was measured, and chunks that the driver rounded up.
        page = llm.stats()["kv_bytes"] // llm.stats()["n_pages"]
        assert limit - SLACK - page < in_use() <= limit
        assert len(answers(llm, [None])) == 12
        assert in_use() <= limit


def two_engines(hungry: Path, expected: list[list[int]]) -> None:
    """One takes 0.3 of the GPU, then another what it leaves of 0.6; both answer, both close."""
    total = cuda_arrays.memory()[1]
    with opened(hungry, 0.3) as first:
        assert in_use() <= 0.3 * total
        with opened(hungry, 0.6) as second:
            assert in_use() <= 0.6 * total
            theirs = first.memory()
            # Each sees the other's bytes as other.
            ours = sum(n for name, n in theirs.rows() if name not in ("other", "free"))
            assert second.memory().other_bytes > ours - SLACK
            assert answers(first, [None]) == answers(second, [None]) == expected
        assert first.memory().free_bytes > 0.6 * total
        assert answers(first, [None]) == expected


def test_a_second_engine_takes_what_the_first_one_left_and_both_give_all_back(
    hungry: Path,
) -> None:
    """The driver keeps what two engines' graphs had for the next two: it grows once."""
    with opened(hungry, 0.3) as alone:
        expected = answers(alone, [None])
    used = []
    for _ in range(2):
        two_engines(hungry, expected)
        used.append(in_use())
    assert used[1] <= used[0] + NEIGHBOUR


def test_closing_gives_everything_back() -> None:
    """Kernels that are loaded stay; the same engine again adds nothing to them."""
    used = []
    for _ in range(3):
        with LLM(demo.BASE, device="cuda", adapters=demo.ADAPTERS, progress=False) as llm:
            answers(llm, [None, *demo.ADAPTERS])
        used.append(in_use())
    assert used[2] <= used[0]


# ---- what does not fit ----


def test_a_model_of_400_billion_is_refused_with_figures(tmp_path: Path) -> None:
    folder = write_config(
        tmp_path / "large", hidden=16384, ffn=53248, layers=126, heads=128, kv_heads=8,
        head_dim=128, vocab=128256,
    )  # fmt: skip
    before = in_use()
    with (
        pytest.raises(OutOfMemoryError, match=r"weights need 7\d\d\.\d\d GiB.* GiB too few"),
        opened(folder, 0.9),
    ):
        pass
    assert in_use() <= before


def test_weights_beyond_the_share_are_refused_before_they_are_loaded(hungry: Path) -> None:
    share = 1.01 * in_use() / cuda_arrays.memory()[1]
    with (
        pytest.raises(OutOfMemoryError, match=r"weights need .*gpu_memory_utilization .* too few"),
        opened(hungry, share),
    ):
        pass


def test_a_context_that_does_not_fit_says_by_how_much(tmp_path: Path) -> None:
    """4 MiB of KV a token: 512 GiB for one context."""
    folder = write_config(
        tmp_path / "deep", hidden=64, ffn=64, layers=64, heads=64, kv_heads=64, head_dim=256,
        max_positions=131072,
    )  # fmt: skip
    options = {"device": "cuda", "load_format": "dummy", "max_num_seqs": 8, "progress": False}
    with pytest.raises(
        OutOfMemoryError,
        match=r"max_model_len is 131072, expected at most \d+: it needs 512.* GiB of KV pages, "
        r".* too few \(gpu_memory_utilization 0.9",
    ):
        LLM(folder, max_model_len=131072, max_num_batched_tokens=64, **options)


def test_kv_bytes_beyond_what_is_free_are_refused_with_figures() -> None:
    total = cuda_arrays.memory()[1]
    with pytest.raises(OutOfMemoryError, match=r"KV pages and .* of workspace, cuda:0 .* few"):
        LLM(demo.BASE, device="cuda", kv_cache_bytes=total, progress=False)


def test_on_a_full_gpu_an_adapter_is_refused_and_everybody_else_goes_on(tmp_path: Path) -> None:
    write_adapter(tmp_path / "wide", demo.BASE, rank=256)
    voices = [None, *demo.ADAPTERS]
    with LLM(demo.BASE, device="cuda", adapters=demo.ADAPTERS, kv_cache_bytes=64 * MIB,
             deterministic=True, progress=False) as llm:  # fmt: skip
        expected = answers(llm, voices)
        with cuda_arrays.ballast(LEFT):
            with pytest.raises(OutOfMemoryError, match=r"adapter: needs .* MiB, cuda:0 .* few"):
                llm.load_adapter("wide", tmp_path / "wide")
            assert llm.adapters == sorted(demo.ADAPTERS)
            assert answers(llm, voices) == expected
        llm.load_adapter("wide", tmp_path / "wide")
        assert "wide" in llm.adapters


@pytest.mark.parametrize(
    ("n_left", "told"), [(LEFT, r"0\.5 GiB of a GPU"), (700 * MIB, r"cuda:0 .*(are free|few)")]
)
def test_a_process_that_opens_on_a_full_gpu_is_told_what_is_free(n_left: int, told: str) -> None:
    """With too little for a context, and with enough for one but no more than a little beside."""
    with cuda_arrays.ballast(n_left):
        command = [sys.executable, "-m", "milpy", "generate", str(demo.BASE), "--device", "cuda"]
        done = subprocess.run([*command, "--prompt", "a"], capture_output=True, text=True)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert re.search(told, done.stderr), done.stderr


# ---- steps ----


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("is_exact", [False, True])
@pytest.mark.parametrize("is_eager", [False, True])
def test_steps_allocate_nothing(is_eager: bool, is_exact: bool, page_size: int) -> None:
    """From an engine's first step on: what kernels take was taken before."""
    check_steps_allocate_nothing(
        "cuda", enforce_eager=is_eager, deterministic=is_exact, page_size=page_size
    )


def test_a_full_gpu_serves_an_engine_that_has_not_run_yet() -> None:
    load = MixedLoad("cuda")
    with cuda_arrays.ballast(LEFT):
        load.run()
    load.close()
