import pytest

from milpy import CompletionOutput, Logprob, LoRARequest, RequestOutput
from milpy.errors import RequestError


def test_names_are_vllms() -> None:
    names = "index text token_ids cumulative_logprob logprobs finish_reason stop_reason".split()
    assert all(hasattr(CompletionOutput(), name) for name in names)
    output = RequestOutput("1", "hi", [1], [CompletionOutput()], False)
    names = "request_id prompt prompt_token_ids outputs finished lora_request adapter".split()
    assert all(hasattr(output, name) for name in names)
    logprob = Logprob(-1.0, 1)
    assert (logprob.logprob, logprob.rank, logprob.decoded_token) == (-1.0, 1, None)


def test_a_lora_request_takes_vllms_positions() -> None:
    request = LoRARequest("sql", 7, "/path")
    assert (request.lora_name, request.lora_int_id, request.lora_path) == ("sql", 7, "/path")
    assert (request.name, request.path) == ("sql", "/path")


@pytest.mark.parametrize("name", ["", "a/b", "a b", "x" * 65, "é", "a\n", 7, None])
def test_a_name_that_cannot_be_an_adapters_is_refused(name: object) -> None:
    with pytest.raises(RequestError, match="adapter name is .*, expected 1 to 64"):
        LoRARequest(name)  # type: ignore[arg-type]
