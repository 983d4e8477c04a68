"""`python -m benchmarks.bench_engine` and the like: what their help tells, and what they refuse."""

from __future__ import annotations

import pytest

from benchmarks import bench_attention, bench_engine, engine_cpu, engine_cuda


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


@pytest.mark.parametrize("device", ["cpu:1", "gpu", "cuda:x", "auto"])
def test_a_device_is_looked_at_before_its_options(
    device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An option of the CPU's was said to be unknown, as though the device were a GPU."""
    with pytest.raises(SystemExit, match="2"):
        bench_engine.main(["--device", device, "--only", "decode"])
    assert f"--device is {device!r}, expected cpu, cuda or cuda:N" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rounds", "0"], "--rounds is 0, expected at least 1"),
        (
            ["--only", "nonsense"],
            "--only is 'nonsense', expected a part of one of 0.5B prefill 512",
        ),
    ],
)
def test_a_table_without_rows_is_refused(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its heading was printed, with nothing below it."""
    with pytest.raises(SystemExit, match="2"):
        bench_attention.main(arguments)
    assert says in capsys.readouterr().err
    assert len(bench_attention.shape_names()) == 9
