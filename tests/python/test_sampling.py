import pickle
from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest

from milpy import SamplingParams
from milpy.errors import MilpyError, RequestError

NAN, INF = float("nan"), float("inf")


def test_defaults_are_vllms_but_for_max_tokens() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_k, params.top_p, params.n) == (1.0, 0, 1.0, 1)
    assert params.max_tokens is None
    assert params.seed is None and params.logprobs is None
    assert params.stop == () and params.stop_token_ids == ()
    assert params.skip_special_tokens and not params.include_stop_str_in_output


def test_is_frozen_and_can_be_replaced() -> None:
    params = SamplingParams(stop="x", temperature=0.5)
    with pytest.raises((FrozenInstanceError, TypeError)):
        params.temperature = 1.0  # type: ignore[misc]
    other = replace(params, top_k=5)
    assert (other.stop, other.temperature, other.top_k) == (("x",), 0.5, 5)
    assert {field.name for field in fields(params)} >= {"n", "seed", "stop", "logprobs"}


def test_can_be_compared_hashed_and_pickled() -> None:
    params = SamplingParams(stop=["a"], seed=3)
    assert pickle.loads(pickle.dumps(params)) == params == SamplingParams(stop="a", seed=3)
    assert len({params, SamplingParams(stop="a", seed=3), SamplingParams()}) == 2


def test_values_are_normalised() -> None:
    params = SamplingParams(top_k=-1, stop=["a", "b", "a"], stop_token_ids=[np.int64(3), 3])
    assert params.top_k == 0
    assert params.stop == ("a", "b")
    assert params.stop_token_ids == (3,)
    assert SamplingParams(temperature=np.float32(0.5)).temperature == 0.5
    assert SamplingParams(seed=(1 << 64) - 1).seed == (1 << 64) - 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", v) for v in (NAN, INF, -INF, -0.1, 1e-7, 101.0, "1", True, None)],
        *[("top_p", v) for v in (NAN, INF, 0, -0.1, 1.0001, 1e-40, "1", False)],
        *[("top_k", v) for v in (-2, 1 << 31, 1.0, NAN, True, "4")],
        *[("seed", v) for v in (-1, 1 << 64, 0.5, True)],
        *[("max_tokens", v) for v in (0, -1, 1 << 31, 2.0, True)],
        *[("logprobs", v) for v in (-1, 21, 1.0, True)],
        *[("n", v) for v in (0, 2, True, 1.0)],
        *[("stop", v) for v in ("", [""], [1], 7, ["a"] * 65, "x" * 1025)],
        *[("stop_token_ids", v) for v in ("12", [-1], [1.0], [True], 5, list(range(65)))],
        *[("ignore_eos", v) for v in (1, None, "yes")],
        ("skip_special_tokens", 0),
        ("include_stop_str_in_output", 1),
    ],
)
def test_a_value_out_of_range_is_named_with_found_and_expected(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"{name} is .*, expected ") as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert isinstance(caught.value, MilpyError) and isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "name",
    ["min_p", "presence_penalty", "repetition_penalty", "best_of", "logit_bias", "bad_words"],
)
def test_what_is_not_built_is_refused_by_name(name: str) -> None:
    with pytest.raises(RequestError, match=f"{name} is 0.5: not built yet"):
        SamplingParams(**{name: 0.5})  # type: ignore[arg-type]


def test_an_unknown_name_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=0.5)
