"""_C.pyi lists the whole extension, and nothing that is not there."""

import ast
import inspect
from pathlib import Path

import pytest

import milpy
from milpy import _C

STUB = Path(milpy.__file__).with_name("_C.pyi")


def declared() -> dict[str, set[str]]:
    """Public names of the stub; classes with their methods."""
    names: dict[str, set[str]] = {}
    for node in ast.parse(STUB.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            names[node.name] = set()
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names[node.target.id] = set()
        elif isinstance(node, ast.ClassDef):
            names[node.name] = {f.name for f in node.body if isinstance(f, ast.FunctionDef)}
    return {name: body for name, body in names.items() if not name.startswith("_")}


def test_the_stub_and_the_extension_have_the_same_names() -> None:
    assert set(declared()) == {name for name in dir(_C) if not name.startswith("_")}


def test_each_class_has_the_same_methods() -> None:
    for name, methods in declared().items():
        value = getattr(_C, name)
        if inspect.isclass(value):
            found = {method for method in vars(value) if not method.startswith("_")}
            assert found == {m for m in methods if not m.startswith("_")}, name
            assert ("__new__" in methods) == ("__new__" in vars(value)), name


def fields() -> dict[str, set[str]]:
    """The keys of each TypedDict."""
    return {
        node.name: {f.target.id for f in node.body
                    if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)}
        for node in ast.parse(STUB.read_text()).body if isinstance(node, ast.ClassDef)
    }  # fmt: skip


def test_reports_have_the_keys_that_the_stub_declares() -> None:
    assert set(_C.machine_report()) == fields()["_MachineReport"]


@pytest.mark.gpu
def test_a_gpus_report_has_the_keys_that_the_stub_declares() -> None:
    assert all(set(gpu) == fields()["_GpuReport"] for gpu in _C.gpu_reports())


def test_constants_are_those_that_python_counts_on() -> None:
    from milpy import sampling  # noqa: PLC0415

    assert sampling.MAX_LOGPROBS == _C.MAX_LOGPROBS
    # EOS tokens and stop tokens go to the core as one list.
    assert sampling.MAX_STOPS + 32 <= _C.MAX_STOP_TOKENS
