"""torch on a GPU, op by op: cuBLAS by torch.mm, cuDNN's attention, argmax.

Importing it fails where torch is missing. Timed as bench_ops.c times ours: calls captured in a
graph, weights and KV in rotation past the L2, replays between CUDA events, the median. Logits lie
where they lie in a step, in L2 as far as they fit; so do ours.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

ROTATED = 256 << 20
GRAPH_US, WARM_US, TIMED_US = 1500.0, 25000.0, 50000.0
MIN_ROUNDS, MAX_ROUNDS = 7, 60
N_HEADS, N_KV_HEADS = 32, 8
bf16 = torch.bfloat16

Call = Callable[[int], object]  # queue one call that reads set i


def is_usable() -> bool:
    return torch.cuda.is_available()


def versions() -> str:
    return f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"


def cublaslt_path() -> str | None:
    """The cuBLASLt that torch has loaded, so that ours can load the same."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "libcublasLt.so" in line:
            return line.split(maxsplit=5)[-1]
    return None


def _sets(n_bytes: int) -> int:
    return min(-(-ROTATED // n_bytes), 2048)


def _random(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=bf16, device="cuda").uniform_(-1, 1)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def _estimate_us(call: Call, n_sets: int) -> float:
    """Outside a graph, on a stream of its own as capture asks, after what loads kernels."""
    begin, end = _event(), _event()
    n_calls = min(n_sets, 16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(2):
            call(i % n_sets)
        begin.record()
        for i in range(n_calls):
            call(i)
        end.record()
    torch.cuda.synchronize()
    return max(begin.elapsed_time(end) * 1e3 / n_calls, 0.5)


def _graph_us(call: Call, n_sets: int) -> float:
    us = _estimate_us(call, n_sets)
    n_calls = n_sets * max(1, min(int(GRAPH_US / (us * n_sets)), 4096 // n_sets))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(n_calls):
            call(i % n_sets)
    n_warm = max(2, min(int(WARM_US / (us * n_calls)), MAX_ROUNDS))
    n_rounds = max(MIN_ROUNDS, min(int(TIMED_US / (us * n_calls)), MAX_ROUNDS))
    events = [_event() for _ in range(n_rounds + 1)]
    for _ in range(n_warm):
        graph.replay()
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]
    return statistics.median(times) * 1e3 / n_calls


def product_us(N: int, K: int, M: int) -> float:
    """bf16 in and out, whatever cuBLAS that torch chooses."""
    n_sets = _sets(2 * N * K)
    x, w = _random(M, K), _random(n_sets, N, K)
    y = torch.empty(M, N, dtype=bf16, device="cuda")
    return _graph_us(lambda i: torch.mm(x, w[i].t(), out=y), n_sets)


def attention_us(n_seqs: int, query: int, keys: int, D: int) -> float:
    """cuDNN over contiguous KV; causal where there is more than one query."""
    n_sets = _sets(2 * 2 * n_seqs * keys * N_KV_HEADS * D)
    q = _random(n_seqs, N_HEADS, query, D)
    k, v = (_random(n_sets, n_seqs, N_KV_HEADS, keys, D) for _ in range(2))

    def call(i: int) -> object:
        return scaled_dot_product_attention(q, k[i], v[i], is_causal=query > 1, enable_gqa=True)

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _graph_us(call, n_sets)


def argmax_us(n_rows: int, vocab: int) -> float:
    logits = torch.randn(n_rows, vocab, device="cuda")
    return _graph_us(lambda _: torch.argmax(logits, dim=-1), 1)


def forget() -> None:
    """Give back what the last figure took."""
    torch.cuda.empty_cache()
