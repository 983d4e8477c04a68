"""Tokens to text with stop strings, judged by a search that goes character by character."""

from pathlib import Path

import pytest
from helpers.tiny_tokenizer import write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from milpy import _C, SamplingParams
from milpy.answer import Answer, AnswerStream, Chunk, Sample, StopFinder
from milpy.tokenizer import Tokenizer


def sample(token: int, logprob: float = -1.0) -> Sample:
    return (token, logprob, 1, [])


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    write_tokenizer(tmp_path)
    return Tokenizer(tmp_path)


def run(
    tokenizer: Tokenizer | None,
    ids: list[int],
    params: SamplingParams,
    *,
    last: int = _C.FINISH_LENGTH,
    eos: tuple[int, ...] = (),
) -> tuple[Answer, list[Chunk]]:
    stream = AnswerStream(params, eos, tokenizer)
    answer = Answer(has_logprobs=params.logprobs is not None)
    chunks = []
    for i, token in enumerate(ids):
        chunks.append(stream.push(sample(token), last if i == len(ids) - 1 else _C.FINISH_NONE))
        answer.add(chunks[-1])
        if stream.is_finished:
            break
    return answer, chunks


def by_character(text: str, stops: tuple[str, ...], include: bool) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            stop = max(hits, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.text("abc", max_size=4), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3, unique=True),
    st.booleans(),
)
def test_stops_are_found_as_though_character_by_character(
    pieces: list[str], stops: list[str], include: bool
) -> None:
    finder = StopFinder(tuple(stops), include=include)
    text = ""
    expected, stop = by_character("".join(pieces), tuple(stops), include)
    for piece in pieces:
        text += finder.push(piece)
        assert expected.startswith(text), "what was streamed was taken back"
        if finder.found is not None:
            break
    else:
        text += finder.flush()
    assert (text, finder.found) == (expected, stop)


def test_text_that_may_become_a_stop_is_held_back_and_no_more() -> None:
    finder = StopFinder(("\n\nQ:",))
    assert [finder.push(piece) for piece in ("yes\n", "\nQ", "uestion")] == [
        "yes",
        "",
        "\n\nQuestion",
    ]


def test_a_stop_string_over_several_tokens_is_trimmed(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello world again", add_special_tokens=False)
    answer, chunks = run(tokenizer, ids, SamplingParams(stop=["o wor"]))
    output = answer.output()
    assert (output.text, output.finish_reason, output.stop_reason) == ("hell", "stop", "o wor")
    # hello, " wor": the second token completed it and is the last that counts.
    assert output.token_ids == ids[:2]
    assert len(chunks) == 2


def test_a_stop_string_can_be_kept(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello world again", add_special_tokens=False)
    params = SamplingParams(stop=["o wor"], include_stop_str_in_output=True)
    assert run(tokenizer, ids, params)[0].output().text == "hello wor"


def test_held_back_text_comes_out_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello", add_special_tokens=False)
    answer, _ = run(tokenizer, ids, SamplingParams(stop=["lol"]))
    assert (answer.output().text, answer.output().finish_reason) == ("hello", "length")


def test_eos_is_in_the_ids_and_not_in_the_text(tokenizer: Tokenizer) -> None:
    (word,) = tokenizer.encode("hello", add_special_tokens=False)
    (eos,) = tokenizer.encode("</s>", add_special_tokens=False)
    output = run(
        tokenizer,
        [word, eos],
        SamplingParams(skip_special_tokens=False),
        last=_C.FINISH_STOP,
        eos=(eos,),
    )[0].output()
    assert (output.text, output.token_ids) == ("hello", [word, eos])
    assert (output.finish_reason, output.stop_reason) == ("stop", None)


def test_a_stop_token_is_named_as_the_reason(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello w", add_special_tokens=False)
    params = SamplingParams(stop_token_ids=[ids[-1]])
    output = run(tokenizer, ids, params, last=_C.FINISH_STOP)[0].output()
    assert (output.text, output.token_ids, output.stop_reason) == ("hello", ids, ids[-1])
    kept = SamplingParams(stop_token_ids=[ids[-1]], include_stop_str_in_output=True)
    assert run(tokenizer, ids, kept, last=_C.FINISH_STOP)[0].output().text == "hello w"


def test_without_a_tokenizer_there_are_ids_and_logprobs() -> None:
    output = run(None, [5, 6], SamplingParams(logprobs=0))[0].output()
    assert (output.text, output.token_ids) == ("", [5, 6])
    assert output.cumulative_logprob == -2.0
    assert output.logprobs is not None and output.logprobs[0][5].decoded_token is None


def test_logprobs_name_the_chosen_token_and_the_best(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello w", add_special_tokens=False)
    stream = AnswerStream(SamplingParams(logprobs=2), (), tokenizer)
    chunk = stream.push((ids[0], -3.0, 7, [(ids[1], -0.5), (1, -1.0)]), _C.FINISH_NONE)
    (entry,) = chunk.logprobs
    assert list(entry) == [ids[0], ids[1], 1]
    assert (entry[ids[0]].rank, entry[ids[0]].decoded_token) == (7, "hello")
    assert (entry[ids[1]].rank, entry[1].rank) == (1, 2)
    # Chosen and best at once: one entry.
    chunk = stream.push((ids[0], -0.5, 1, [(ids[0], -0.5), (1, -1.0)]), _C.FINISH_NONE)
    assert list(chunk.logprobs[0]) == [ids[0], 1]


def test_a_cancelled_answer_ends_as_abort(tokenizer: Tokenizer) -> None:
    stream = AnswerStream(SamplingParams(stop="lx"), (), tokenizer)
    stream.push(sample(tokenizer.encode("hell", add_special_tokens=False)[0]), _C.FINISH_NONE)
    chunk = stream.push(None, _C.FINISH_CANCELLED)
    assert (chunk.text, chunk.finish_reason, stream.is_finished) == ("l", "abort", True)


def test_an_output_is_a_copy(tokenizer: Tokenizer) -> None:
    answer = Answer(has_logprobs=False)
    answer.add(Chunk(text="a", token_ids=[1]))
    first = answer.output()
    answer.add(Chunk(text="b", token_ids=[2], finish_reason="length"))
    assert (first.text, first.token_ids, first.finished()) == ("a", [1], False)
    assert (answer.output().text, answer.output().finished()) == ("ab", True)
