"""The offline face on tiny models. What the tokens should be is judged by tests/model; here each
answer is judged against the same request asked another way."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_llama import write_adapter, write_tiny_llama
from helpers.tiny_tokenizer import VOCAB

import milpy
from milpy import _C, LLM, LoRARequest, RequestOutput, SamplingParams, adapter_table
from milpy.errors import EngineError, MilpyError, RequestError

GREEDY = SamplingParams(temperature=0, max_tokens=12, logprobs=3, ignore_eos=True)
PROMPTS = [[1, 2, 3], [7] * 40, [5], list(range(100, 164))]


def tokens(output: RequestOutput) -> list[int]:
    return output.outputs[0].token_ids


def facts(output: RequestOutput) -> object:
    """All that must not depend on how a request was asked."""
    return output.outputs


# ---- answers ----


def test_results_come_in_order_with_vllms_names(llm: LLM) -> None:
    outputs = llm.generate(["hello", [1, 2, 3], {"prompt": "world"}], GREEDY, use_tqdm=False)
    assert [output.prompt for output in outputs] == ["hello", None, "world"]
    assert outputs[1].prompt_token_ids == [1, 2, 3]
    assert len({output.request_id for output in outputs}) == 3
    for output in outputs:
        (answer,) = output.outputs
        assert output.finished and answer.finish_reason == "length" and answer.stop_reason is None
        assert len(answer.token_ids) == 12
        assert answer.text == llm.get_tokenizer().decode(answer.token_ids)
        assert answer.logprobs is not None and len(answer.logprobs) == 12
        for token, entry in zip(answer.token_ids, answer.logprobs, strict=True):
            assert entry[token].rank == 1 and 3 <= len(entry) <= 4
        assert answer.cumulative_logprob == sum(
            entry[token].logprob
            for token, entry in zip(answer.token_ids, answer.logprobs, strict=True)
        )


def test_one_prompt_in_any_form_is_one_result(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode("hello")
    forms = ["hello", ids, {"prompt": "hello"}, {"prompt_token_ids": ids}, ["hello"], [ids]]
    results = [llm.generate(form, GREEDY, use_tqdm=False) for form in forms]  # type: ignore[arg-type]
    assert all(len(result) == 1 for result in results)
    assert all(facts(result[0]) == facts(results[0][0]) for result in results)
    assert llm.generate([], GREEDY) == []


def test_a_mixed_batch_gives_each_row_what_it_gets_alone(llm: LLM) -> None:
    adapters = [None, "a", "b", "a"]
    together = llm.generate(PROMPTS, GREEDY, adapter=adapters, use_tqdm=False)
    for prompt, adapter, output in zip(PROMPTS, adapters, together, strict=True):
        (alone,) = llm.generate([prompt], GREEDY, adapter=adapter, use_tqdm=False)
        assert facts(alone) == facts(output)
        assert output.adapter == adapter
    voices = [tokens(llm.generate([[1, 2, 3]], GREEDY, adapter=v)[0]) for v in (None, "a", "b")]
    assert len({tuple(voice) for voice in voices}) == 3, "adapters changed nothing"


@pytest.mark.parametrize("adapter", [None, "b"])
def test_small_steps_and_scarce_pages_change_no_bit(folders: Path, llm: LLM, adapter: str) -> None:
    expected = llm.generate(PROMPTS, GREEDY, adapter=adapter, use_tqdm=False)
    kv_bytes_per_token = 2 * 2 * 2 * 32 * 2
    with LLM(
        folders / "model",
        adapters={"b": folders / "b"},
        max_model_len=96,
        max_num_seqs=3,
        max_num_batched_tokens=16,
        kv_cache_bytes=kv_bytes_per_token * 128,
        n_threads=1,
        progress=False,
    ) as other:
        for _ in range(3):
            found = other.generate(PROMPTS, GREEDY, adapter=adapter, use_tqdm=False)
            assert list(map(facts, found)) == list(map(facts, expected))
        stats = other.stats()
        assert stats["n_free_pages"] == stats["n_pages"]


def test_a_context_cut_to_the_memory_is_said(
    folders: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kv_bytes_per_token = 2 * 2 * 2 * 32 * 2
    options = {"kv_cache_bytes": kv_bytes_per_token * 64, "progress": False}
    with LLM(folders / "model", max_model_len=40, **options):
        assert "the context is" not in caplog.text
    with LLM(folders / "model", **options) as cut:
        length = cut.stats()["max_model_len"]
        assert f"the context is {length} tokens, cut from the model's" in caplog.text


def test_a_seed_gives_the_same_tokens_in_any_batch(llm: LLM) -> None:
    params = SamplingParams(temperature=1.5, max_tokens=16, seed=7, ignore_eos=True)
    (alone,) = llm.generate([PROMPTS[0]], params, use_tqdm=False)
    mixed = [params, SamplingParams(max_tokens=20), params]
    batch = llm.generate([PROMPTS[0], [9, 9], PROMPTS[0]], mixed, use_tqdm=False)
    assert tokens(batch[0]) == tokens(batch[2]) == tokens(alone)
    other = SamplingParams(temperature=1.5, max_tokens=16, seed=8, ignore_eos=True)
    assert tokens(llm.generate([PROMPTS[0]], other)[0]) != tokens(alone)


def test_top_k_above_the_vocabulary_is_all_of_it(llm: LLM) -> None:
    every, more = (SamplingParams(max_tokens=20, seed=1, top_k=k) for k in (VOCAB, 1 << 30))
    a, b = llm.generate([PROMPTS[0]] * 2, [every, more], use_tqdm=False)
    assert tokens(a) == tokens(b)


def test_without_a_seed_each_request_draws_its_own(llm: LLM) -> None:
    params = SamplingParams(temperature=2.0, max_tokens=16, ignore_eos=True)
    found = {tuple(tokens(o)) for o in llm.generate([[1, 2, 3]] * 8, params, use_tqdm=False)}
    assert len(found) > 1


def test_without_max_tokens_the_context_is_the_end(llm: LLM) -> None:
    params = SamplingParams(temperature=0, ignore_eos=True)
    (output,) = llm.generate([[1, 2, 3]], params, use_tqdm=False)
    assert len(tokens(output)) == llm.stats()["max_model_len"] - 3
    assert output.outputs[0].finish_reason == "length"


# ---- endings ----


def first_at(answer: list[int], least: int) -> int:
    """Where the first token stands that has not come before, at `least` or later."""
    return next(i for i in range(least, len(answer)) if answer[i] not in answer[:i])


def test_eos_ends_the_answer_by_the_generation_config(
    folders: Path, llm: LLM, tmp_path: Path
) -> None:
    free = tokens(llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)[0])
    at = first_at(free, 2)
    shutil.copytree(folders / "model", tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps({"eos_token_id": [free[at]]}))
    with LLM(tmp_path / "m", progress=False, n_threads=1) as other:
        (output,) = other.generate([[1, 2, 3]], SamplingParams(temperature=0), use_tqdm=False)
        assert tokens(output) == free[: at + 1]
        assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", None)
        assert output.outputs[0].text == other.get_tokenizer().decode(free[:at])
        assert tokens(other.generate([[1, 2, 3]], GREEDY, use_tqdm=False)[0]) == free


def test_a_stop_token_ends_the_answer_and_is_named(llm: LLM) -> None:
    free = tokens(llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)[0])
    at = first_at(free, 3)
    params = SamplingParams(temperature=0, stop_token_ids=[free[at]])
    (output,) = llm.generate([[1, 2, 3]], params, use_tqdm=False)
    assert tokens(output) == free[: at + 1]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", free[at])


def ascii_answer(llm: LLM) -> tuple[list[int], RequestOutput]:
    """A prompt whose free answer has four letters in a row to stop at."""
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    for start in range(40):
        (output,) = llm.generate([[start, 1]], params, use_tqdm=False)
        if any(run.isascii() and run.isprintable() for run in windows(output.outputs[0].text)):
            return [start, 1], output
    raise AssertionError("no answer with letters")


def windows(text: str) -> list[str]:
    return [text[i : i + 4] for i in range(len(text) - 3)]


def test_a_stop_string_trims_the_text_and_frees_the_engine(llm: LLM) -> None:
    prompt, free = ascii_answer(llm)
    text = free.outputs[0].text
    stop = next(run for run in windows(text) if run.isascii() and run.isprintable())
    params = SamplingParams(temperature=0, stop=[stop], ignore_eos=True)
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    (answer,) = output.outputs
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
    assert answer.text == text[: text.index(stop)]
    n = len(answer.token_ids)
    assert answer.token_ids == tokens(free)[:n]
    decode = llm.get_tokenizer().decode
    assert stop in decode(answer.token_ids) and stop not in decode(answer.token_ids[:-1])
    stats = llm.stats()
    assert stats["n_running"] == stats["n_waiting"] == 0
    assert stats["n_free_pages"] == stats["n_pages"]


# ---- chat and streams ----


def test_a_chat_is_its_rendered_prompt(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hello"}]
    (chat,) = llm.chat(messages, GREEDY, adapter="a", use_tqdm=False)
    assert chat.prompt == "<s><|user|>hello<|end|><|assistant|>"
    (plain,) = llm.generate([chat.prompt], GREEDY, adapter="a", use_tqdm=False)
    assert facts(chat) == facts(plain)
    assert chat.prompt_token_ids == plain.prompt_token_ids
    two = llm.chat([messages, messages], GREEDY, adapter=["a", None], use_tqdm=False)
    assert len(two) == 2 and facts(two[0]) == facts(chat) != facts(two[1])


def test_a_stream_grows_to_the_finished_answer(llm: LLM) -> None:
    (whole,) = llm.generate(["hello"], GREEDY, adapter="b", use_tqdm=False)
    text, seen = "", []
    for output in llm.stream("hello", GREEDY, adapter="b"):
        assert output.outputs[0].text.startswith(text)
        text = output.outputs[0].text
        seen.append(output.finished)
    assert facts(output) == facts(whole)
    assert seen == [False] * (len(seen) - 1) + [True] and len(seen) > 1


def wait_until_idle(llm: LLM) -> None:
    """A request that is queued behind a cancelled one ends after it."""
    llm.generate([[1]], SamplingParams(max_tokens=1), use_tqdm=False)
    while llm.stats()["n_running"]:
        llm.generate([[1]], SamplingParams(max_tokens=1), use_tqdm=False)


def test_leaving_a_stream_cancels_it(model: Path) -> None:
    with LLM(model, progress=False, n_threads=1) as llm:
        stream = llm.stream([1, 2, 3], SamplingParams(ignore_eos=True))
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        wait_until_idle(llm)
        stats = llm.stats()
        assert stats["n_free_pages"] == stats["n_pages"]
        assert stats["n_generated_tokens"] < stats["max_model_len"] - 3


# ---- adapters ----


def test_the_same_content_is_in_memory_once(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "a", tmp_path / "copy")
    with LLM(folders / "model", progress=False, n_threads=1) as llm:
        llm.load_adapter("a", folders / "a")
        before = _C.memory_held()
        llm.load_adapter("a", folders / "a")
        llm.load_adapter("other", tmp_path / "copy")
        assert (llm.stats()["n_adapters"], _C.memory_held()) == (1, before)
        assert llm.adapters == ["a", "other"]
        llm.unload_adapter("a")
        assert llm.stats()["n_adapters"] == 1
        one, two = (llm.generate([[1, 2]], GREEDY, adapter=v)[0] for v in ("other", None))
        assert facts(one) != facts(two)
        llm.unload_adapter("other")
        assert llm.stats()["n_adapters"] == 0 and llm.adapters == []


def test_a_name_is_repointed_while_old_requests_end_on_the_old(folders: Path, llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    old, new = (llm.generate([[1, 2]], params, adapter=v)[0] for v in ("a", "b"))
    assert facts(old) != facts(new)
    llm.load_adapter("x", folders / "a")
    stream = llm.stream([1, 2], params, adapter="x")
    next(stream)
    llm.load_adapter("x", folders / "b")
    assert facts(llm.generate([[1, 2]], params, adapter="x")[0]) == facts(new)
    llm.unload_adapter("x")
    *_, last = stream
    assert facts(last) == facts(old)
    with pytest.raises(RequestError, match='adapter is "x", expected one of "a", "b"'):
        llm.generate([[1, 2]], params, adapter="x")


def test_a_failed_load_leaves_the_name_as_it_was(folders: Path, llm: LLM, tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "wide", hidden=96, vocab=VOCAB)
    write_adapter(tmp_path / "bad", tmp_path / "wide")
    before = facts(llm.generate([[1, 2]], GREEDY, adapter="a")[0])
    held = _C.memory_held()
    with pytest.raises(MilpyError, match="shape is"):
        llm.load_adapter("a", tmp_path / "bad")
    assert _C.memory_held() <= held
    assert facts(llm.generate([[1, 2]], GREEDY, adapter="a")[0]) == before


def test_a_lora_request_loads_on_demand(folders: Path, model: Path) -> None:
    with LLM(model, progress=False, n_threads=1) as llm:
        with pytest.raises(RequestError, match='adapter is "sql", expected one of none'):
            llm.generate([[1, 2]], GREEDY, lora_request=LoRARequest("sql", 1))
        request = LoRARequest("sql", 1, str(folders / "a"))
        (output,) = llm.generate([[1, 2]], GREEDY, lora_request=request)
        assert (output.adapter, output.lora_request) == ("sql", request)
        assert facts(output) == facts(llm.generate([[1, 2]], GREEDY, adapter="sql")[0])
        assert facts(output) != facts(llm.generate([[1, 2]], GREEDY)[0])
        with pytest.raises(RequestError, match="both given"):
            llm.generate([[1, 2]], adapter="sql", lora_request=request)


# ---- life ----


def test_close_gives_all_memory_back(folders: Path) -> None:
    before = _C.memory_held()
    with LLM(folders / "model", adapters={"a": folders / "a"}, progress=False) as llm:
        llm.generate(PROMPTS, GREEDY, adapter="a", use_tqdm=False)
        assert _C.memory_held() > before
    assert _C.memory_held() <= before
    llm.close()
    for call in (llm.stats, lambda: llm.generate([[1]]), lambda: llm.load_adapter("a", "b")):
        with pytest.raises(EngineError, match="closed"):
            call()


def test_closing_waits_for_an_adapter_that_is_being_loaded(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, go_on = threading.Event(), threading.Event()
    read_adapter = adapter_table.read_adapter

    def slow(*arguments: Any, **options: Any) -> Any:
        reading.set()
        go_on.wait()
        return read_adapter(*arguments, **options)

    monkeypatch.setattr(adapter_table, "read_adapter", slow)
    before = _C.memory_held()
    llm = LLM(folders / "model", progress=False, n_threads=1)
    loader = threading.Thread(target=llm.load_adapter, args=("a", folders / "a"))
    loader.start()
    reading.wait()
    closer = threading.Thread(target=llm.close)
    closer.start()
    go_on.set()
    loader.join()
    closer.join()
    assert _C.memory_held() <= before
    with pytest.raises(EngineError, match="closed"):
        llm.load_adapter("a", folders / "a")


def test_a_forgotten_llm_gives_its_memory_back(model: Path) -> None:
    before = _C.memory_held()
    llm = LLM(model, progress=False, n_threads=1)
    pump = llm._core._pump
    del llm
    pump.join(60)
    assert not pump.is_alive() and _C.memory_held() == before


def test_closing_ends_a_call_of_another_thread(model: Path) -> None:
    llm = LLM(model, progress=False, n_threads=1)
    problems: list[BaseException] = []

    def work() -> None:
        try:
            while True:
                llm.generate([[1]] * 8, SamplingParams(ignore_eos=True), use_tqdm=False)
        except EngineError as problem:
            problems.append(problem)

    thread = threading.Thread(target=work)
    thread.start()
    while llm.stats()["n_running"] == 0:
        pass
    llm.close()
    thread.join(60)
    assert "closed" in str(problems[0])


def test_two_models_in_one_process(folders: Path, llm: LLM, tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "m", vocab=VOCAB, heads=8, kv_heads=8, seed=3)
    expected = facts(llm.generate([[1, 2, 3]], GREEDY, adapter="a")[0])
    with LLM(tmp_path / "m", progress=False, n_threads=1) as other:
        streams = [other.stream([1, 2, 3], GREEDY), llm.stream([1, 2, 3], GREEDY, adapter="a")]
        last = [output for outputs in zip(*streams, strict=False) for output in outputs]
        assert facts(last[-2]) != facts(last[-1])
        assert facts(other.generate([[1, 2, 3]], GREEDY)[0]) == facts(last[-2])
        assert other.adapters == [] and llm.adapters == ["a", "b"]
    assert facts(llm.generate([[1, 2, 3]], GREEDY, adapter="a")[0]) == expected


def test_threads_share_an_llm(llm: LLM) -> None:
    expected = [facts(output) for output in llm.generate(PROMPTS, GREEDY, adapter="a")]
    found: dict[int, list[object]] = {}

    def work(i: int) -> None:
        outputs = llm.generate(PROMPTS, GREEDY, adapter="a", use_tqdm=False)
        found[i] = [facts(output) for output in outputs]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[i] == expected for i in range(4))


def test_two_ranks_answer_as_one_to_rounding(folders: Path, llm: LLM) -> None:
    first = SamplingParams(temperature=0, max_tokens=1, logprobs=0)
    adapters = {"a": folders / "a"}
    with LLM(folders / "model", adapters=adapters, tensor_parallel_size=2, progress=False) as two:
        assert two.stats()["world"] == 2
        for adapter in (None, "a"):
            one = llm.generate(PROMPTS, first, adapter=adapter, use_tqdm=False)
            split = two.generate(PROMPTS, first, adapter=adapter, use_tqdm=False)
            for a, b in zip(one, split, strict=True):
                assert a.outputs[0].cumulative_logprob == pytest.approx(
                    b.outputs[0].cumulative_logprob, abs=0.05
                )


def test_dummy_weights_come_from_the_config_and_the_seed(model: Path, tmp_path: Path) -> None:
    shutil.copy(model / "config.json", tmp_path)

    def answer(seed: int) -> list[int]:
        with LLM(tmp_path, load_format="dummy", seed=seed, progress=False, n_threads=1) as llm:
            return tokens(llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)[0])

    assert answer(0) == answer(0) != answer(1)


def test_a_conversion_of_weights_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tiny_llama(tmp_path / "m", dtype="F32")
    with caplog.at_level(logging.INFO, "milpy"), LLM(tmp_path / "m", progress=False):
        pass
    assert "computes in bfloat16 (dtype is auto)" in caplog.text
    assert "F32 weights are converted to bfloat16" in caplog.text


# ---- interrupts, forks, exits ----


def test_ctrl_c_ends_the_batch_and_the_llm_stays_usable(model: Path) -> None:
    with LLM(model, progress=False, n_threads=1) as llm:
        expected = facts(llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)[0])

        def press() -> None:
            while llm.stats()["n_running"] == 0:
                pass
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=press)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            llm.generate([[1]] * 200, SamplingParams(ignore_eos=True), use_tqdm=False)
        thread.join()
        stats = llm.stats()
        assert stats["n_running"] == stats["n_waiting"] == 0
        assert stats["n_free_pages"] == stats["n_pages"]
        assert facts(llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)[0]) == expected
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def run_script(body: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A script in a process of its own; the limit is there so that a hang is a failure."""
    environment = {**os.environ, "PYTHONPATH": str(Path(milpy.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(body), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )


def test_a_forked_child_is_told_and_ends_cleanly(model: Path) -> None:
    result = run_script(
        """
        import os, sys, warnings
        warnings.simplefilter("ignore")
        import milpy
        llm = milpy.LLM(sys.argv[1], progress=False, n_threads=2)
        llm.generate([[1, 2]], milpy.SamplingParams(max_tokens=2), use_tqdm=False)
        child = os.fork()
        if child == 0:
            for call in (lambda: llm.generate([[1, 2]]), llm.stats):
                try:
                    call()
                except milpy.errors.EngineError as problem:
                    print(problem, flush=True)
            llm.close()
            del llm
            sys.exit(7)
        _, status = os.waitpid(child, 0)
        llm.generate([[1, 2]], milpy.SamplingParams(max_tokens=2), use_tqdm=False)
        sys.exit(os.waitstatus_to_exitcode(status))
        """,
        model,
    )
    assert result.returncode == 7, result.stderr
    assert result.stdout.count("does not survive a fork") == 2


def test_the_interpreter_ends_with_an_open_llm_at_work(model: Path) -> None:
    result = run_script(
        """
        import sys, threading
        import milpy
        llm = milpy.LLM(sys.argv[1], progress=False)
        def work():
            while True:
                llm.generate([[1]] * 8, milpy.SamplingParams(ignore_eos=True), use_tqdm=False)
        threading.Thread(target=work, daemon=True).start()
        while llm.stats()["n_running"] == 0:
            pass
        print("bye")
        """,
        model,
    )
    assert (result.returncode, result.stdout) == (0, "bye\n"), result.stderr


def test_importing_milpy_imports_nothing_heavy() -> None:
    result = run_script(
        """
        import sys
        import milpy
        heavy = {"numpy", "tokenizers", "jinja2", "huggingface_hub", "tqdm", "torch", "milpy._C"}
        print(sorted(heavy & set(sys.modules)), milpy.__version__)
        milpy.LLM, milpy.SamplingParams, milpy.LoRARequest, milpy.AsyncEngine
        print(sorted((heavy - {"numpy", "milpy._C"}) & set(sys.modules)))
        """
    )
    assert result.stdout == f"[] {milpy.__version__}\n[]\n", result.stderr
