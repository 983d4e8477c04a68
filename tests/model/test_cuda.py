"""The demo model on a GPU: the CPU's tokens but for near-ties; graphs and single ops agree."""

from __future__ import annotations

import pytest

from milpy import _C, LLM, RequestOutput, SamplingParams, demo

NEAR_TIE = 0.25  # of logits, as the goldens' bound
ANSWER = SamplingParams(temperature=0, max_tokens=96, logprobs=3)
N_REQUESTS = 60


def has_cuda() -> str:
    """Why there is none, or nothing."""
    if not demo.BASE.is_dir():
        return f"no demo model in {demo.BASE}"
    try:
        with LLM(demo.BASE, device="cuda", progress=False, enforce_eager=True):
            return ""
    except Exception as problem:
        return str(problem)


@pytest.fixture(scope="module")
def cuda() -> None:
    reason = has_cuda()
    if reason:
        pytest.skip(reason)


pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda")]


def serve(device: str, **options: object) -> list[RequestOutput]:
    texts = [request["text"] for request in demo.requests()][:N_REQUESTS]
    pairs = [(text, voice) for text in texts for voice in demo.VOICES]
    with LLM(demo.BASE, device=device, adapters=demo.ADAPTERS, progress=False, **options) as llm:
        return llm.generate(
            [demo.format_request(text) for text, _ in pairs],
            ANSWER,
            adapter=[None if voice == "base" else voice for _, voice in pairs],
            use_tqdm=False,
        )


def ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def bits(outputs: list[RequestOutput]) -> list[list[tuple[int, float]]]:
    """Tokens and their logprobs, which show any difference of logits."""
    return [
        [(token, row[token].logprob) for token, row in zip(c.token_ids, c.logprobs, strict=True)]
        for c in (output.outputs[0] for output in outputs)
    ]


def test_tokens_are_the_cpus_but_for_near_ties() -> None:
    ours, theirs = serve("cuda"), serve("cpu")
    n_tokens = n_apart = 0
    for got, want in zip(ours, theirs, strict=True):
        a, b = list(got.outputs[0].token_ids), list(want.outputs[0].token_ids)
        n_tokens += len(b)
        if a == b:
            continue
        n_apart += 1
        at = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
        best = sorted((v.logprob for v in want.outputs[0].logprobs[at].values()), reverse=True)
        assert best[0] - best[1] < NEAR_TIE, f"token {at}: found {a[at]}, expected {b[at]}"
    assert n_apart <= 0.005 * n_tokens


def test_graphs_and_ops_one_by_one_give_the_same_tokens() -> None:
    replayed, eager = serve("cuda"), serve("cuda", enforce_eager=True)
    assert ids(replayed) == ids(eager)
    # Batches of one bucket pick one product kernel, batches by op another: close, not equal.
    for a, b in zip(bits(replayed), bits(eager), strict=True):
        assert all(abs(x - y) < 0.05 for (_, x), (_, y) in zip(a, b, strict=True))


def test_batch_mates_change_no_bit_of_a_deterministic_engine() -> None:
    """Many at once, replayed from graphs, against one after the other."""
    together = serve("cuda", deterministic=True)
    alone = serve("cuda", deterministic=True, max_num_seqs=1)
    assert bits(together) == bits(alone)


def test_a_small_engine_preempts_and_gives_the_same() -> None:
    few = serve("cuda", max_num_seqs=7, kv_cache_bytes=2 << 20, max_num_batched_tokens=64)
    assert ids(few) == ids(serve("cuda"))


def test_an_unknown_ordinal_is_refused_by_name() -> None:
    with pytest.raises(Exception, match="cuda:99"):
        LLM(demo.BASE, device="cuda:99", progress=False)
    assert _C is not None
