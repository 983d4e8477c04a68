from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_tokenizer import VOCAB

from milpy.errors import RequestError
from milpy.prompts import PromptReader, prompt_list
from milpy.tokenizer import Tokenizer


@pytest.fixture
def reader(model: Path) -> PromptReader:
    return PromptReader(Tokenizer(model), "", VOCAB, 16)


def test_integers_alone_are_one_prompt() -> None:
    assert prompt_list([1, 2, 3]) == [[1, 2, 3]]
    assert prompt_list((1, 2)) == [(1, 2)]
    assert len(prompt_list(np.array([1, 2, 3]))) == 1
    assert len(prompt_list(np.array([[1, 2], [3, 4]]))) == 2
    assert prompt_list("hello") == ["hello"]
    assert prompt_list({"prompt": "hello"}) == [{"prompt": "hello"}]
    assert prompt_list([[1, 2], "hello"]) == [[1, 2], "hello"]
    assert prompt_list([]) == []


def test_every_form_gives_the_same_ids(reader: PromptReader) -> None:
    ids = reader.read("hello", "p").token_ids
    assert reader.read("hello", "p").text == "hello"
    for form in (ids.tolist(), tuple(ids), ids.astype(np.uint16), {"prompt_token_ids": list(ids)}):
        prompt = reader.read(form, "p")
        assert prompt.text is None
        assert prompt.token_ids.dtype == np.int32 and np.array_equal(prompt.token_ids, ids)
    both = reader.read({"prompt": "as it was", "prompt_token_ids": ids}, "p")
    assert both.text == "as it was" and np.array_equal(both.token_ids, ids)


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ([], "p is empty, expected at least one token"),
        ({"prompt_token_ids": []}, "p is empty"),
        ("", "p is empty, expected text"),
        ([1, VOCAB], rf"p: token 1 is {VOCAB}, expected an id in 0..{VOCAB - 1}"),
        ([-1], r"p: token 0 is -1, expected an id in 0"),
        ([1, 1 << 40], "p: token 1 is 1099511627776, expected an id in 0"),
        ([1, 1 << 70], "p: token 1 is 1180591620717411303424"),
        ([1, 2.0], r"p: token 1 is 2\.0, expected an integer"),
        ([1, "2"], 'p: token 1 is "2", expected an integer'),
        ([True, False], "p: token 0 is True, expected an integer"),
        ([1, None], "p: token 1 is None"),
        ([[1, 2]], r"p: token 0 is \[1, 2\]"),
        (np.array([1.5]), r"p: token 0 is .*1\.5.*, expected an integer"),
        (np.ones((2, 2), int), "p: token 0 is .*, expected an integer"),
        ([1] * 16, "p has 16 tokens, expected at most 15: the context holds 16"),
        (7, "p is an integer, expected text, a list"),
        (None, "p is None, expected text, a list"),
        (b"hello", "p is bytes, expected text, a list"),
        ({}, "p has neither prompt nor prompt_token_ids"),
        ({"prompt": 7}, "p: prompt is an integer, expected text"),
        ({"prompt": "x", "multi_modal_data": {}}, r"p has \['multi_modal_data'\], expected"),
        ("ab\udc00", "lone surrogate at character 2"),
    ],
)
def test_a_prompt_of_another_form_is_named(
    reader: PromptReader, prompt: object, found: str
) -> None:
    with pytest.raises(RequestError, match=found):
        reader.read(prompt, "p")


@pytest.mark.parametrize("prompts", [7, None, 1.5, object()])
def test_what_is_no_list_of_prompts_is_named(prompts: object) -> None:
    with pytest.raises(RequestError, match="prompts is .*, expected text"):
        prompt_list(prompts)


def test_text_needs_a_tokenizer_and_ids_do_not() -> None:
    bare = PromptReader(None, "no tokenizer.json in m", VOCAB, 16)
    with pytest.raises(RequestError, match=r"p is text, expected token ids: no tokenizer\.json"):
        bare.read("hello", "p")
    assert len(bare.read([1, 2], "p").token_ids) == 2
