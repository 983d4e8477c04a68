"""An engine on another GPU than the first: the same bits as there, and the current device of the
thread that calls stays what it was."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import pytest
from helpers import cuda_arrays
from helpers.gpu import need_cuda, need_file, need_torch

from milpy import LLM, SamplingParams, demo

pytestmark = [pytest.mark.gpu, pytest.mark.multigpu]

KV_BYTES = 64 << 20
GREEDY = SamplingParams(temperature=0, max_tokens=48, logprobs=1)
Bits = list[list[tuple[int, float]]]  # of each answer: its tokens and their logprobs


@pytest.fixture(scope="module", autouse=True)
def cuda() -> None:
    need_cuda()
    need_file(demo.BASE, "tools/demo_train.py")


@pytest.fixture
def torch() -> Any:
    found = need_torch()
    found.cuda.set_device(0)
    return found


def opened(device: str) -> LLM:
    return LLM(
        demo.BASE, device=device, adapters=demo.ADAPTERS, kv_cache_bytes=KV_BYTES,
        deterministic=True, progress=False,
    )  # fmt: skip


def answers(llm: LLM) -> Bits:
    """Of the first requests, in every voice."""
    texts = [request["text"] for request in demo.requests()[:8]]
    pairs = [(text, voice) for text in texts for voice in demo.VOICES]
    outputs = llm.generate(
        [demo.format_request(text) for text, _ in pairs],
        GREEDY,
        adapter=[None if voice == "base" else voice for _, voice in pairs],
        use_tqdm=False,
    )
    found = [output.outputs[0] for output in outputs]
    return [
        [
            (token, row[token].logprob)
            for token, row in zip(one.token_ids, one.logprobs, strict=True)
        ]
        for one in found
    ]


def test_the_second_gpu_gives_the_firsts_bits() -> None:
    with opened("cuda:0") as first:
        expected = answers(first)
    free = cuda_arrays.memory()[0]
    with opened("cuda:1") as second:
        assert answers(second) == expected
        # It takes nothing of the first.
        assert free - cuda_arrays.memory()[0] < KV_BYTES // 2


ON_THE_SECOND_ALONE = """
import ctypes
from milpy import LLM, SamplingParams, demo
with LLM(demo.BASE, device="cuda:1", kv_cache_bytes=8 << 20, progress=False) as llm:
    llm.generate(["x"], SamplingParams(max_tokens=4), use_tqdm=False)
driver = ctypes.CDLL("libcuda.so.1")
for ordinal in (0, 1):
    flags, is_active = ctypes.c_uint(), ctypes.c_int()
    state = ctypes.byref(flags), ctypes.byref(is_active)
    assert driver.cuDevicePrimaryCtxGetState(ordinal, *state) == 0
    print(is_active.value)
"""


def test_an_engine_on_the_second_gpu_makes_no_context_on_the_first() -> None:
    """Some hundred MiB, and a failure where that GPU is another's alone."""
    command = [sys.executable, "-c", ON_THE_SECOND_ALONE]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.split()[-2:] == ["0", "1"]


def test_two_gpus_serve_at_once() -> None:
    with opened("cuda:0") as first, opened("cuda:1") as second:
        expected = answers(first)
        found: dict[str, Bits] = {}
        engines = {"cuda:0": first, "cuda:1": second}
        threads = [
            threading.Thread(target=lambda name=name, llm=llm: found.update({name: answers(llm)}))
            for name, llm in engines.items()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {name: expected for name in engines}


def test_torch_stays_on_the_first_gpu(torch: Any) -> None:
    """While an engine is made, loads an adapter, serves and closes on the second."""

    def is_on_first() -> bool:
        made = torch.ones(4, device="cuda")
        assert made.sum() == 4
        return made.device.index == 0 and torch.cuda.current_device() == 0

    with opened("cuda:1") as llm:
        assert is_on_first()
        llm.unload_adapter(demo.VOICES[1])
        llm.load_adapter(demo.VOICES[1], demo.ADAPTERS[demo.VOICES[1]])
        assert is_on_first()
        assert len(answers(llm)) == 8 * len(demo.VOICES)
        assert llm.memory().total_bytes > 0
        assert is_on_first()
    assert is_on_first()
