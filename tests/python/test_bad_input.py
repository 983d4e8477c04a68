"""What bad input gets: an error by name with found and expected, nothing held, nobody disturbed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.safetensors_file import write_safetensors
from helpers.tiny_llama import write_adapter, write_tiny_llama
from helpers.tiny_tokenizer import VOCAB, byte_bpe, write_tokenizer

from milpy import _C, LLM, SamplingParams
from milpy.checkpoint import open_checkpoint
from milpy.config import read_model_config
from milpy.errors import (
    AdapterError,
    AnswerError,
    CheckpointError,
    ConfigError,
    HubError,
    MilpyError,
    RequestError,
    TokenizerError,
)

NAN, INF = float("nan"), float("inf")


class Named:
    """As torch.device, whose text is a device's name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


GREEDY = SamplingParams(temperature=0, max_tokens=6, logprobs=1, ignore_eos=True)


def edit(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text())
    values |= changes
    path.write_text(json.dumps(values))


def cut(path: Path, n_bytes: int) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - n_bytes])


# ---- models ----


def no_weights(m: Path) -> None:
    (m / "model.safetensors").unlink()


def pickle_only(m: Path) -> None:
    (m / "model.safetensors").rename(m / "pytorch_model.bin")


def truncated(m: Path) -> None:
    cut(m / "model.safetensors", 100)


def other_shape(m: Path) -> None:
    edit(m / "config.json", intermediate_size=136)


def unknown_architecture(m: Path) -> None:
    edit(m / "config.json", architectures=["MambaForCausalLM"])


def unknown_rope(m: Path) -> None:
    edit(m / "config.json", rope_parameters={"rope_type": "yarn", "factor": 2.0})


def no_config(m: Path) -> None:
    (m / "config.json").unlink()


def too_many_ids(m: Path) -> None:
    tokenizer = byte_bpe()
    tokenizer.add_tokens([f"word{i}" for i in range(VOCAB)])
    write_tokenizer(m, tokenizer)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (no_weights, CheckpointError, "expected model.safetensors"),
        (pickle_only, CheckpointError, "pytorch_model.bin.*pickles"),
        (truncated, CheckpointError, "model.safetensors.*expected"),
        (other_shape, CheckpointError, r"shape is \[.*128.*\], expected \[.*136.*\]"),
        (unknown_architecture, ConfigError, "MambaForCausalLM.*expected.*LlamaForCausalLM"),
        (unknown_rope, ConfigError, '"yarn", expected one of .*"llama3"'),
        (no_config, ConfigError, "config.json"),
        (too_many_ids, TokenizerError, f"expected ids below the model's vocab_size, {VOCAB}"),
    ],
)
def test_a_spoilt_model_is_named_and_nothing_is_held(
    model: Path, tmp_path: Path, spoil: Callable[[Path], None], error: type, message: str
) -> None:
    shutil.copytree(model, tmp_path / "m")
    spoil(tmp_path / "m")
    before = _C.memory_held()
    with pytest.raises(error, match=message):
        LLM(tmp_path / "m", progress=False)
    assert _C.memory_held() <= before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "tpu"}, RequestError, 'device is "tpu", expected auto, cpu, cuda or cuda:N'),
        ({"device": "cuda:+1"}, RequestError, r'device is "cuda:\+1", expected auto, cpu, cuda or'),
        ({"device": "cuda:01"}, RequestError, 'device is "cuda:01", expected auto, cpu, cuda or'),
        ({"dtype": "float16"}, RequestError, 'dtype is "float16", expected .*not built yet'),
        ({"dtype": "float32"}, RequestError, 'dtype is "float32", expected .*not built yet'),
        ({"load_format": "pt"}, RequestError, 'load_format is "pt", expected auto or dummy'),
        ({"device": 0}, RequestError, "device is 0, expected auto, cpu, cuda or cuda:N"),
        ({"device": Named("cpu")}, RequestError, "device is cpu, expected auto, cpu, cuda or cuda"),
        (
            {"device": "cuda:\u0663"},
            RequestError,
            "device is .*, expected auto, cpu, cuda or cuda:N",
        ),
        ({"tensor_parallel_size": None}, RequestError, "tensor_parallel_size is None, expected"),
        ({"tensor_parallel_size": 0}, RequestError, "tensor_parallel_size is 0, expected"),
        ({"tensor_parallel_size": 3}, MilpyError, "3"),
        ({"max_model_len": 4097}, RequestError, r"max_model_len is 4097, expected 2\.\.4096"),
        ({"max_model_len": 1}, RequestError, r"max_model_len is 1, expected .* in 2\.\.16777216"),
        ({"max_num_seqs": 0}, RequestError, "max_num_seqs is 0, expected"),
        ({"page_size": 48}, RequestError, "page_size is 48, expected one of 16, 32"),
        ({"page_size": 16.0}, RequestError, "page_size is 16.0"),
        ({"kv_cache_bytes": 100}, MilpyError, "100"),
        ({"n_threads": -1}, RequestError, "n_threads is -1, expected"),
        ({"n_threads": True}, RequestError, "n_threads is True, expected"),
        ({"seed": -1}, RequestError, "seed is -1, expected"),
        ({"revision": "main"}, HubError, "expected no revision"),
        ({"tokenizer": "/nowhere"}, HubError, "/nowhere: no such folder"),
        ({"gpu_memory_utilization": 0}, RequestError, "gpu_memory_utilization is 0, expected"),
        ({"gpu_memory_utilization": "all"}, RequestError, 'is "all", expected a number'),
        ({"gpu_memory_utilization": NAN}, RequestError, "is nan, expected a number above 0"),
        ({"gpu_memory_utilization": INF}, RequestError, "is inf, expected a number above 0"),
        ({"gpu_memory_utilization": np.float32(NAN)}, RequestError, r"is .*nan.*, expected"),
        ({"gpu_memory_utilization": -0.5}, RequestError, "is -0.5, expected a number above 0"),
        ({"gpu_memory_utilization": 1.01}, RequestError, "is 1.01, expected .* up to 1"),
        ({"gpu_memory_utilization": True}, RequestError, "is True, expected a number above 0"),
        ({"gpu_memory_utilization": 10**400}, RequestError, "expected a number above 0"),
        ({"progress": "no"}, RequestError, 'progress is "no", expected True or False'),
        ({"deterministic": 0}, RequestError, "deterministic is 0, expected True or False"),
        ({"enforce_eager": 1}, RequestError, "enforce_eager is 1, expected True or False"),
        ({"adapters": ["a"]}, RequestError, r"adapters is \['a'\], expected a dict"),
        ({"adapters": {"a b": "x"}}, RequestError, 'adapter name is "a b", expected'),
        ({"adapters": {"a": "/nowhere"}}, HubError, "/nowhere: no such folder"),
    ],
)
def test_an_option_out_of_range_is_named_and_nothing_is_held(
    model: Path, options: dict[str, Any], error: type, message: str
) -> None:
    before = _C.memory_held()
    with pytest.raises(error, match=message):
        LLM(model, **{"progress": False, **options})
    assert _C.memory_held() <= before


@pytest.mark.parametrize(
    "name",
    """tensor_parallel_size seed max_model_len max_num_seqs max_num_batched_tokens kv_cache_bytes
    page_size n_threads""".split(),
)
def test_a_count_is_an_integer_in_its_range(model: Path, name: str) -> None:
    values = [-1, 2**70, 10**5000, 16.0, NAN, INF, True, np.True_, np.float32(16), "16", [16]]
    for value in [*values, np.array([16]), np.int64(-1)]:
        with pytest.raises(RequestError, match=f"^{name} is .*, expected an integer in"):
            LLM(model, progress=False, **{name: value})


def test_options_may_be_numpys_scalars(model: Path) -> None:
    counts = {
        "tensor_parallel_size": 1, "seed": 2**64 - 1, "max_model_len": 64, "max_num_seqs": 2,
        "max_num_batched_tokens": 32, "kv_cache_bytes": 1 << 20, "page_size": 16, "n_threads": 1,
    }  # fmt: skip
    others: dict[str, Any] = {name: np.uint64(value) for name, value in counts.items()}
    others |= {name: np.False_ for name in ("deterministic", "enforce_eager", "progress")}
    others |= {"gpu_memory_utilization": np.float32(0.5), "load_format": "dummy", "device": "cpu"}
    with LLM(model, **others) as llm:
        stats = llm.stats()
    found = {name: stats[name] for name in counts if name in stats}
    assert found == {name: counts[name] for name in found} and len(found) == 5


def test_no_such_model_is_named() -> None:
    with pytest.raises(HubError, match="/no/such/folder: no such folder"):
        LLM("/no/such/folder")


@pytest.mark.parametrize("name", ["MILPY_CHECK", "MILPY_POISON"])
@pytest.mark.parametrize("value", ["on", "yes", "2", " 1"])
def test_a_switch_that_is_neither_on_nor_off_is_refused_and_nothing_is_held(
    model: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """Anything but 1 was taken for off, as nobody meant it who wrote it."""
    before = _C.memory_held()
    monkeypatch.setenv(name, value)
    with pytest.raises(RequestError, match=f'^{name} is "{value}", expected 0 or 1$'):
        LLM(model, progress=False)
    assert _C.memory_held() <= before


# ---- requests ----


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, r"prompts\[1\] is empty"),
        ([[1], ""], {}, r"prompts\[1\] is empty"),
        ([[1], [2, VOCAB]], {}, rf"prompts\[1\]: token 1 is {VOCAB}, expected an id in 0"),
        ([[1], [-1]], {}, r"prompts\[1\]: token 0 is -1"),
        ([[1], [1] * 256], {}, r"prompts\[1\] has 256 tokens, expected at most 255"),
        ([[1], 2.5], {}, r"prompts\[1\] is a float"),
        ([[1], [2]], {"adapter": [None, "zz"]}, 'adapter is "zz", expected one of "a", "b"'),
        ([[1], [2]], {"adapter": "zz"}, 'adapter is "zz"'),
        ([[1], [2]], {"adapter": ["a"]}, "adapter has 1 entries, expected 2"),
        ([[1], [2]], {"adapter": [None, 7]}, r"adapter\[1\] is 7, expected str or None"),
        ([[1], [2]], {"adapter": 7}, "adapter is 7, expected str"),
        ([[1]], {"sampling_params": [GREEDY] * 2}, "sampling_params has 2 entries, expected 1"),
        (
            [[1]],
            {"sampling_params": {"top_k": 1}},
            "sampling_params is .*, expected SamplingParams",
        ),
        (
            [[1], [1, 2]],
            {"sampling_params": SamplingParams(max_tokens=255)},
            r"prompts\[1\] has 2 tokens and max_tokens is 255, expected at most 254",
        ),
        (
            [[1]],
            {"sampling_params": SamplingParams(stop_token_ids=[VOCAB])},
            rf"prompts\[0\]: stop_token_ids is {VOCAB}, expected an id in 0",
        ),
    ],
)
def test_one_bad_request_submits_nothing(
    llm: LLM, prompts: Any, options: dict[str, Any], message: str
) -> None:
    before = llm.stats()
    with pytest.raises(RequestError, match=message):
        llm.generate(prompts, use_tqdm=False, **options)
    after = llm.stats()
    assert after == before, "the engine saw something of it"


def test_bad_requests_leave_a_running_one_alone(llm: LLM) -> None:
    (expected,) = llm.generate([[1, 2, 3]], GREEDY, adapter="a", use_tqdm=False)
    stream = llm.stream([1, 2, 3], GREEDY, adapter="a")
    next(stream)
    for prompt, adapter in (([], None), ([9999], None), ([1], "zz"), ([1] * 999, "b")):
        with pytest.raises(RequestError):
            llm.generate([prompt], GREEDY, adapter=adapter, use_tqdm=False)
    *_, last = stream
    assert last.outputs == expected.outputs


def test_text_without_a_tokenizer_is_named_and_ids_work(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "m")
    with LLM(tmp_path / "m", progress=False, n_threads=1) as llm:
        with pytest.raises(RequestError, match=r"prompts\[0\] is text, .*has no tokenizer\.json"):
            llm.generate("hello")
        with pytest.raises(RequestError, match=r"has no tokenizer\.json"):
            llm.chat([{"role": "user", "content": "hello"}])
        with pytest.raises(RequestError, match=r'stop is "x", expected none: .*tokenizer\.json'):
            llm.generate([1, 2], SamplingParams(stop="x"))
        with pytest.raises(RequestError, match=r"has no tokenizer\.json"):
            llm.get_tokenizer()
        assert len(llm.generate([1, 2], GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == 6


def test_a_chat_without_a_template_is_named(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "m")
    write_tokenizer(tmp_path / "m", template=None)
    with (
        LLM(tmp_path / "m", progress=False, n_threads=1) as llm,
        pytest.raises(TokenizerError, match="has no chat template"),
    ):
        llm.chat([{"role": "user", "content": "hello"}])


@pytest.mark.parametrize("messages", ["hello", 7, [[]], [[7]], [7], [{"role": "user"}]])
def test_messages_of_another_form_are_refused(llm: LLM, messages: Any) -> None:
    with pytest.raises(RequestError, match="messages"):
        llm.chat(messages)


# ---- adapters ----


def other_base(root: Path) -> Path:
    write_tiny_llama(root / "wide", hidden=96, vocab=VOCAB)
    write_adapter(root / "bad", root / "wide")
    return root / "bad"


def no_match(root: Path) -> Path:
    folder = root / "bad"
    shutil.copytree(root / "good", folder)
    rank, width = 4, 64
    tensors = {
        f"base_model.model.model.layers.9.self_attn.q_proj.lora_{side}.weight": value
        for side, value in (
            ("A", np.ones((rank, width), np.float32)),
            ("B", np.ones((128, rank), np.float32)),
        )
    }
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    return folder


def rank_mismatch(root: Path) -> Path:
    shutil.copytree(root / "good", root / "bad")
    edit(root / "bad" / "adapter_config.json", r=5)
    return root / "bad"


def not_finite(root: Path) -> Path:
    write_adapter(root / "bad", root / "model", rank=4, gain=float("nan"))
    return root / "bad"


def test_logits_that_are_not_finite_end_their_request_alone(
    llm: LLM, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Once the pump waited for ever for the engine to die of it, and every other caller with it."""
    write_adapter(tmp_path / "huge", model, rank=4, gain=1e36)  # finite, but not what comes of it
    llm.load_adapter("huge", tmp_path / "huge")
    (expected,) = llm.generate([[1, 2]], GREEDY, adapter="a", use_tqdm=False)
    other = llm.stream([1, 2], GREEDY, adapter="a")
    with pytest.raises(AnswerError, match='"huge" are not finite, expected'):
        list(llm.stream([1, 2], GREEDY, adapter="huge"))
    bad, good = llm.generate([[1, 2]] * 2, GREEDY, adapter=["huge", "a"], use_tqdm=False)
    assert bad.finished and bad.outputs[0].finish_reason == "error"
    assert bad.outputs[0].token_ids == [] and '"huge" are not finite' in bad.outputs[0].error
    assert good.outputs == expected.outputs and good.outputs[0].error is None
    assert [r.levelname for r in caplog.records if "not finite" in r.message] == ["ERROR"]
    *_, last = other
    assert last.outputs == expected.outputs
    assert llm.generate([[1, 2]], GREEDY, adapter="a", use_tqdm=False)[0].outputs == last.outputs
    llm.unload_adapter("huge")


def dora(root: Path) -> Path:
    shutil.copytree(root / "good", root / "bad")
    edit(root / "bad" / "adapter_config.json", use_dora=True)
    return root / "bad"


def pickled(root: Path) -> Path:
    shutil.copytree(root / "good", root / "bad")
    (root / "bad" / "adapter_model.safetensors").rename(root / "bad" / "adapter_model.bin")
    return root / "bad"


def test_an_unknown_key_is_refused_and_can_be_allowed(
    llm: LLM, model: Path, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "new", model, rank=4, config_extra={"use_novelty": True})
    with pytest.raises(AdapterError, match=r'allow_adapter_keys=\["use_novelty"\]'):
        llm.load_adapter("new", tmp_path / "new")
    llm.load_adapter("new", tmp_path / "new", allow_adapter_keys=["use_novelty"])
    llm.unload_adapter("new")


def short_file(root: Path) -> Path:
    shutil.copytree(root / "good", root / "bad")
    cut(root / "bad" / "adapter_model.safetensors", 8)
    return root / "bad"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (other_base, r"shape is \[.*\], expected \[.*\]"),
        (no_match, "layers.9.*expected"),
        (rank_mismatch, r"shape is \[4, 64\], expected \[5, 64\]"),
        (not_finite, "NaN|nan|not finite|finite"),
        (dora, "use_dora is true, expected"),
        (pickled, "adapter_model.bin.*pickles"),
        (short_file, "adapter_model.safetensors.*expected"),
    ],
)
def test_a_bad_adapter_is_named_and_nothing_of_it_is_held(
    llm: LLM, model: Path, tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    shutil.copytree(model, tmp_path / "model")
    write_adapter(tmp_path / "good", model, rank=4)
    folder = make(tmp_path)
    (expected,) = llm.generate([[1, 2]], GREEDY, adapter="a", use_tqdm=False)
    held, names = _C.memory_held(), llm.adapters
    with pytest.raises(AdapterError, match=message):
        llm.load_adapter("bad", folder)
    # Less where the loop has only now let go of the answered request.
    assert llm.adapters == names and _C.memory_held() <= held
    (found,) = llm.generate([[1, 2]], GREEDY, adapter="a", use_tqdm=False)
    assert found.outputs == expected.outputs
    before = _C.memory_held()
    with pytest.raises(AdapterError, match=message):
        LLM(model, adapters={"good": tmp_path / "good", "bad": folder}, progress=False)
    assert _C.memory_held() <= before


@pytest.mark.parametrize("n_before", [0, 1])
def test_a_message_that_is_cut_inside_a_letter_is_told_as_far_as_it_goes(
    model: Path, n_before: int
) -> None:
    """The core's messages have an end, which once fell between the bytes of a letter."""
    config = read_model_config(model)
    name = "x" * n_before + "ü" * 2000
    with pytest.raises(RequestError, match=f"device is '{name[:100]}"):
        _C.Model(config, open_checkpoint(model, config), max_position=64, device=name, n_threads=1)
