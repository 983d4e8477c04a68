"""Which tests this machine can run: what cannot run here is skipped with its reason."""

import os
from importlib.util import find_spec

import pytest
from helpers.devices import gpu_count
from helpers.gpu import must_have_gpu
from helpers.order_workload import use_extension

# Freed KV pages are NaN in every served test, and every plan is checked before it runs.
os.environ.setdefault("MILPY_POISON", "1")

# Another build of the C core, as MILPY_SHIM is of the shim: tools/test_gpu.py's stage ptx.
if os.environ.get("MILPY_EXTENSION"):
    use_extension(os.environ["MILPY_EXTENSION"])

REF_MODULES = ("torch", "transformers", "peft", "safetensors")


def reason_to_skip(item: pytest.Item) -> str | None:
    """Why `item` cannot run here; None when it can."""
    gpus = gpu_count()
    # Where there must be a GPU, its tests fail by their own words.
    if item.get_closest_marker("gpu") and gpus < 1 and not must_have_gpu():
        return "needs a GPU: found no /dev/nvidia0, and no driver that shows one"
    if item.get_closest_marker("multigpu") and gpus < 2:
        return f"needs 2 GPUs or more: found {gpus}"
    if item.get_closest_marker("net") and os.environ.get("MILPY_TEST_NET") != "1":
        return "needs the network: MILPY_TEST_NET=1 is not set"
    # CI sets MILPY_TEST_REF: there a missing oracle must fail, not skip.
    if item.get_closest_marker("ref") and os.environ.get("MILPY_TEST_REF") != "1":
        missing = [name for name in REF_MODULES if find_spec(name) is None]
        if missing:
            return f"needs the [ref] extra: found no {', '.join(missing)}"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        reason = reason_to_skip(item)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason), append=False)
