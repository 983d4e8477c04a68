"""What figures are judged by: roofs as the peer's own table has them, and the floors."""

from __future__ import annotations

import pytest

from benchmarks.engine_cuda import ON_ITS_OWN, ON_ONE_MODEL, names, parser
from benchmarks.h200 import FLOORS, decode_bytes, decode_roof_ms
from benchmarks.shapes import EIGHT_B

# "bytes alone at 4.55 TB/s, ms" beside vLLM's figures, for 1,024 in / 256 out.
BYTES_ALONE_MS = {1: 3.33, 8: 3.56, 32: 4.36, 64: 5.42, 128: 7.55, 256: 11.79}


@pytest.mark.parametrize(("batch", "ms"), BYTES_ALONE_MS.items())
def test_bytes_alone_are_those_of_the_peers_table(batch: int, ms: float) -> None:
    assert decode_roof_ms(EIGHT_B, batch) == pytest.approx(ms, abs=0.006)


def test_an_adapter_of_rank_16_has_84_megabytes() -> None:
    one = decode_bytes(EIGHT_B, 64, 1) - decode_bytes(EIGHT_B, 64)
    assert one == pytest.approx(83.9e6, rel=1e-3)
    off = decode_bytes(EIGHT_B, 64)
    assert off / decode_bytes(EIGHT_B, 64, 64) == pytest.approx(0.82, abs=0.005)


def test_a_floor_is_met_from_its_own_side() -> None:
    assert FLOORS["decode 1"].is_met_by(195.0) and not FLOORS["decode 1"].is_met_by(194.9)
    assert FLOORS["gap"].is_met_by(0.02) and not FLOORS["gap"].is_met_by(0.021)


def test_rows_are_named_with_commas_and_unknown_ones_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert names("ttft,lora") == ["ttft", "lora"]
    assert sorted(names("all")) == sorted([*ON_ONE_MODEL, *ON_ITS_OWN, "gap"])
    assert "d1" in parser().parse_args([]).rows
    with pytest.raises(SystemExit):
        parser().parse_args(["--rows", "ttft,speed"])
    assert "found 'speed', expected some of start, decode" in capsys.readouterr().err
