"""A mutant is a whole adapter folder that milpy reads, wrong only where it says so."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from milpy import demo
from milpy.adapters import Adapter, TensorInfo, read_adapter
from milpy.config import read_model_config

pytestmark = pytest.mark.ref

Values = dict[tuple[int, str], tuple[bytes, bytes]]


def read(folder: Path) -> Adapter:
    return read_adapter(folder, read_model_config(demo.BASE))


def values(adapter: Adapter) -> Values:
    """(layer, projection) -> bytes of A and of B."""
    data = adapter.files[0].read_bytes()

    def cut(tensor: TensorInfo) -> bytes:
        return data[tensor.begin : tensor.end]

    return {(m.layer, m.projection): (cut(m.a), cut(m.b)) for m in adapter.modules}


@pytest.fixture(scope="module")
def mutants() -> ModuleType:
    """Imported late: it brings torch along."""
    found: ModuleType = pytest.importorskip("demo_mutants")
    return found


@pytest.fixture(params=demo.ADAPTERS)
def source(request: pytest.FixtureRequest) -> Path:
    return demo.ADAPTERS[request.param]


def test_louder_changes_the_scale_alone(mutants: ModuleType, source: Path, tmp_path: Path) -> None:
    stored = read(source)
    mutant = read(mutants.write_mutant(source, tmp_path / "m", mutants.louder))
    ratios = [m.scale / s.scale for m, s in zip(mutant.modules, stored.modules, strict=True)]
    assert np.allclose(ratios, 1.25)
    assert values(mutant) == values(stored)


def test_dropped_module_is_gone_in_every_layer_and_no_other(
    mutants: ModuleType, source: Path, tmp_path: Path
) -> None:
    stored = values(read(source))
    mutant = read(mutants.write_mutant(source, tmp_path / "m", mutants.one_module_dropped))
    assert values(mutant) == {key: v for key, v in stored.items() if key[1] != "down_proj"}


def test_swapped_q_and_k_exchange_a_and_keep_b(
    mutants: ModuleType, source: Path, tmp_path: Path
) -> None:
    stored = values(read(source))
    mutant = values(read(mutants.write_mutant(source, tmp_path / "m", mutants.q_and_k_swapped)))
    other = {"q_proj": "k_proj", "k_proj": "q_proj"}
    assert mutant == {
        (layer, name): (stored[layer, other.get(name, name)][0], b)
        for (layer, name), (_, b) in stored.items()
    }
