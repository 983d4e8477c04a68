"""`python -m benchmarks.bench_engine`: what its help tells."""

from __future__ import annotations

import pytest

from benchmarks import bench_engine, engine_cpu, engine_cuda


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_without_a_device_lists_both(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It was the CPU's alone, as though there were no other."""
    assert bench_engine.main([flag]) == 0
    told = capsys.readouterr().out
    assert bench_engine.__doc__ is not None and bench_engine.__doc__ in told
    for module in (engine_cpu, engine_cuda):
        assert module.parser().format_help() in told


@pytest.mark.parametrize(("device", "module"), [("cpu", engine_cpu), ("cuda", engine_cuda)])
def test_help_after_a_device_is_that_ones(
    device: str, module: object, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        bench_engine.main(["--device", device, "--help"])
    assert capsys.readouterr().out == module.parser().format_help()  # type: ignore[attr-defined]
