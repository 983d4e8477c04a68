"""What docs/numerics.md promises of bits, on whole requests: tokens and their logprobs are equal.

Replayed graphs against steps run op by op, over random lengths, page tables, adapter mixes and
paddings; alone against among mates; a prompt in chunks against whole, also where mates leave next
to nothing of a step; an engine that preempts. On the CPU all of it holds by definition, on a GPU
all but the first under deterministic=True.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.drivers import Request, Sample, open_model, serve
from helpers.order import WIDE
from helpers.tiny_llama import write_adapter, write_tiny_llama

from milpy import _C
from milpy.adapters import read_adapter
from milpy.config import read_model_config

VOCAB = 1001
RANKS = (8, 16, 64)


@dataclass(frozen=True)
class Shape:
    """Of the model."""

    heads: int
    kv_heads: int
    head_dim: int
    hidden: int = 256
    ffn: int = 512
    bias: bool = False


SHAPES = {
    "head_dim_128": Shape(4, 1, 128),
    "head_dim_80": Shape(6, 2, 80),
    "head_dim_64": Shape(4, 2, 64),
    "wide": Shape(**WIDE["cuda"], bias=True),
}


@dataclass(frozen=True)
class Size:
    """Of the traffic."""

    n_requests: int
    longest: int  # prompt
    most_new: int
    n_seqs: int
    page: int
    n_batched: int  # tokens of a step
    crowds: tuple[int, ...]


SIZES = {
    "cuda": Size(64, 2000, 200, 24, 64, 1024, (3, 17, 64)),
    "cpu": Size(12, 150, 50, 5, 16, 64, (3, 7)),
}


@dataclass(frozen=True)
class Rig:
    base: Path
    model: _C.Model
    adapters: list[int]  # -1 among them: none
    size: Size
    page_bytes: int
    has_wgmma: bool  # where the GPU has: chunks go by attention_sm90.cu

    @property
    def context(self) -> int:
        return self.size.longest + self.size.most_new

    def cache(self, n_seqs: float) -> int:
        """Bytes of pages for so many sequences at full length."""
        return (int(n_seqs * (self.context // self.size.page + 1)) + 1) * self.page_bytes

    def serve(
        self, requests: list[Request], *, n_seqs: int, **options: Any
    ) -> tuple[list[list[Sample]], dict[str, int]]:
        """With room for all of them and their prompts whole, unless options say otherwise."""
        n_tokens = sum(len(request.tokens) for request in requests)
        defaults = {
            "max_num_batched_tokens": max(n_tokens, n_seqs),
            "kv_cache_bytes": self.cache(n_seqs),
        }
        answers, stats = serve(
            self.model,
            requests,
            page_size=self.size.page,
            max_model_len=self.context,
            max_num_seqs=n_seqs,
            **{**defaults, **options},
        )
        assert [len(answer) for answer in answers] == [r.max_tokens for r in requests]
        return answers, stats

    def add_adapter(self, rank: int, seed: int) -> int:
        folder = self.base.parent / f"{rank}-{seed}"
        write_adapter(folder, self.base, rank=rank, seed=seed, gain=0.3)
        return self.model.add_adapter(read_adapter(folder, read_model_config(self.base)))

    def alone(self, requests: list[Request]) -> list[list[Sample]]:
        """One after the other, op by op."""
        return self.serve(requests, n_seqs=1, deterministic=True, enforce_eager=True)[0]


@pytest.fixture(scope="module", params=SHAPES)
def rig(
    request: pytest.FixtureRequest, device: str, tmp_path_factory: pytest.TempPathFactory
) -> Rig:
    folder = tmp_path_factory.mktemp("same_bits")
    shape, size = SHAPES[request.param], SIZES[device]
    base = folder / "base"
    write_tiny_llama(base, vocab=VOCAB, max_positions=4096, **asdict(shape))
    config = read_model_config(base)
    model = open_model(base, device)
    page_bytes = size.page * config.kv_bytes_per_token()
    made = Rig(base, model, [-1], size, page_bytes, shape.head_dim in (64, 128))
    made.adapters.extend(made.add_adapter(rank, seed) for rank in RANKS for seed in (1, 2))
    return made


def random_request(rig: Rig, rng: np.random.Generator, n_prompt: int, max_tokens: int) -> Request:
    """Half of them greedy, a third of the base."""
    is_greedy = rng.random() < 0.5
    adapter = -1 if rng.random() < 1 / 3 else int(rng.choice(rig.adapters))
    return Request(
        rng.integers(0, VOCAB, n_prompt).tolist(),
        max_tokens,
        adapter=adapter,
        temperature=0.0 if is_greedy else float(rng.uniform(0.5, 1.5)),
        top_k=int(rng.choice([0, 40])),
        top_p=float(rng.choice([1.0, 0.9])),
        seed=int(rng.integers(1 << 60)),
    )


def traffic(rig: Rig, seed: int) -> list[Request]:
    """Prompts of every length; the last ones to end are of the base, so that both families of
    graphs see few rows in large buckets and in small ones."""
    rng = np.random.default_rng(seed)
    size = rig.size
    edges = [n for n in (1, 2, 63, 64, 65, 511, 512, 513) if n <= size.longest]
    lengths = [*edges, *rng.integers(1, size.longest + 1, size.n_requests - len(edges))]
    requests = [
        random_request(rig, rng, int(n), int(rng.integers(1, size.most_new))) for n in lengths
    ]
    last = [random_request(rig, rng, int(n), size.most_new) for n in rng.integers(1, 99, 3)]
    return [*requests, *(Request(r.tokens, r.max_tokens, seed=r.seed) for r in last)]


@pytest.mark.parametrize("deterministic", [False, True], ids=["cublas", "own_products"])
def test_replayed_graphs_give_the_bits_of_ops_run_one_by_one(rig: Rig, deterministic: bool) -> None:
    """Pages for a quarter of the sequences: some are preempted, and page tables mix."""
    options: dict[str, Any] = {
        "n_seqs": rig.size.n_seqs,
        "max_num_batched_tokens": rig.size.n_batched,
        "kv_cache_bytes": rig.cache(rig.size.n_seqs / 4),
        "deterministic": deterministic,
    }
    requests = traffic(rig, 1)
    replayed, stats = rig.serve(requests, **options)
    eager, eager_stats = rig.serve(requests, enforce_eager=True, **options)
    assert stats == eager_stats, "not the same steps"
    assert stats["n_preemptions"] > 0
    assert replayed == eager


def subjects(rig: Rig, lengths: list[int]) -> list[Request]:
    rng = np.random.default_rng(2)
    lengths = [n for n in lengths if n <= rig.size.longest]
    return [random_request(rig, rng, n, rig.size.most_new // 2) for n in lengths]


def test_batch_mates_change_no_bit(rig: Rig) -> None:
    """Three texts in graphs of every bucket, with mates that come and go."""
    found = subjects(rig, [65, 20, 130, 700, 1999])[-3:]
    alone = rig.alone(found)
    for n_seqs in (1, *rig.size.crowds):
        mates = traffic(rig, n_seqs)[: n_seqs - len(found)] if n_seqs > 1 else []
        together, _ = rig.serve([*mates, *found], n_seqs=n_seqs, deterministic=True)
        assert together[len(mates) :] == alone, f"in a batch of {n_seqs}"


@pytest.mark.parametrize("rig", ["head_dim_64"], indirect=True)
def test_every_sequence_of_a_batch_may_have_an_adapter_of_its_own(rig: Rig) -> None:
    """As many segments of LoRA as rows, of ranks up to 64, in graphs and op by op."""
    rng = np.random.default_rng(4)
    n = rig.size.crowds[-1]
    adapters = [rig.add_adapter(1 + 7 * i % 64, 100 + i) for i in range(n)]
    requests = [
        Request(rng.integers(0, VOCAB, int(rng.integers(1, 99))).tolist(), 20, adapter=adapter)
        for adapter in adapters
    ]
    together, _ = rig.serve(requests, n_seqs=n, deterministic=True)
    assert together == rig.alone(requests)
    eager, _ = rig.serve(requests, n_seqs=n, deterministic=True, enforce_eager=True)
    assert together == eager
    base, _ = rig.serve(
        [Request(r.tokens, r.max_tokens) for r in requests], n_seqs=n, deterministic=True
    )
    assert all(a != b for a, b in zip(together, base, strict=True)), "an adapter changed nothing"
    for adapter in adapters:
        rig.model.release_adapter(adapter)


def test_chunks_of_a_prompt_have_the_bits_of_the_whole(rig: Rig) -> None:
    """Some are a token longer than chunks of full size: a piece of one would be a decode row."""
    lengths = [1, 2, 3, 63, 64, 65, 66, 95, 97, 130, 150, 500, 512, 514, 577, 777, 1500, 1921, 2000]
    requests = subjects(rig, lengths)
    for n_batched in (64, 96):
        chunks, _ = rig.serve(
            requests, n_seqs=1, deterministic=True, max_num_batched_tokens=n_batched
        )
        assert chunks == rig.alone(requests), f"in chunks of {n_batched}"


def test_mates_that_leave_little_of_a_step_change_no_bit(rig: Rig) -> None:
    """The story: under deterministic a prompt was cut into whatever its mates left of a step. Here
    that was one token, which is a decode row: beyond 512 keys, and on Hopper at any length, it had
    other bits than in a longer piece. Now two mates end before the prompt begins, and leave three.
    """
    for found in subjects(rig, [20, 131, 700]):
        rng = np.random.default_rng(len(found.tokens))
        n_mates = rig.size.crowds[1]
        n_new = np.full(n_mates, 2 * len(found.tokens))
        n_new[:2] = len(found.tokens)
        mates = [
            random_request(rig, rng, int(rng.integers(1, 9)), min(n, rig.context - 9))
            for n in n_new.tolist()
        ]
        together, stats = rig.serve(
            [*mates, found],
            n_seqs=n_mates + 1,
            max_num_batched_tokens=n_mates + 1,
            deterministic=True,
        )
        assert stats["n_preemptions"] == 0
        assert together[-1:] == rig.alone([found]), f"a prompt of {len(found.tokens)}"


def test_preemption_changes_no_bit_of_short_texts(rig: Rig, device: str) -> None:
    """Up to 512 keys, within which a decode row is computed as a row of a chunk is."""
    is_portable = os.environ.get("MILPY_CUDA_PATH") == "portable"
    if device == "cuda" and rig.has_wgmma and not is_portable:
        pytest.skip("chunks of this head size have other bits than decode rows on Hopper")
    rng = np.random.default_rng(3)
    n_new = rig.size.most_new
    requests = [
        random_request(rig, rng, int(n), n_new)
        for n in rng.integers(1, min(rig.size.longest, 512 - n_new), 2 * rig.size.n_seqs)
    ]
    few, stats = rig.serve(
        requests, n_seqs=rig.size.n_seqs, deterministic=True, kv_cache_bytes=rig.cache(2)
    )
    assert stats["n_preemptions"] > 0
    assert few == rig.alone(requests)
