"""From a model's name to a loaded model: options checked, files read, weights brought in.

The C core loads on a thread of its own, so that Ctrl-C works and a bar can be drawn meanwhile.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from os.path import exists
from pathlib import Path

from milpy import _C
from milpy.checkpoint import Checkpoint, open_checkpoint
from milpy.config import (
    MAX_POSITION,
    MIN_CONTEXT,
    ModelConfig,
    eos_token_ids,
    read_generation_config,
    read_model_config,
)
from milpy.errors import RequestError
from milpy.hub import resolve_model
from milpy.interrupt import HeldInterrupt
from milpy.outputs import check_adapter_name
from milpy.scalars import (
    MAX_UINT64,
    check_flag,
    check_integer,
    check_real,
    refuse,
    show_argument,
)
from milpy.tokenizer import TOKENIZER_FILE, Tokenizer
from milpy.wheels import add_library_dirs

POLL_SECONDS = 0.05
PAGE_SIZES = (16, 32, 64, 128, 256)
OPTIONAL_COUNTS = {
    "max_model_len": (MIN_CONTEXT, MAX_POSITION),
    "max_num_seqs": (1, 1 << 20),
    "max_num_batched_tokens": (1, 1 << 24),
    "kv_cache_bytes": (1, 1 << 48),
    "page_size": (PAGE_SIZES[0], PAGE_SIZES[-1]),
    "n_threads": (1, 4096),
}
COUNTS = {"tensor_parallel_size": (1, 1024), "seed": (0, MAX_UINT64), **OPTIONAL_COUNTS}
DEVICE_FILES = Path("/dev")  # NVIDIA's driver puts one for each GPU there

_log = logging.getLogger("milpy")


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What LLM and AsyncEngine take beside the model; LLM's doc string says what each means."""

    device: str = "auto"
    dtype: str = "auto"
    adapters: Mapping[str, str | Path] | None = None
    tensor_parallel_size: int = 1
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_cache_bytes: int | None = None
    page_size: int | None = None
    gpu_memory_utilization: float | None = None
    deterministic: bool = False
    enforce_eager: bool = False
    n_threads: int | None = None
    load_format: str = "auto"
    seed: int = 0
    revision: str | None = None
    tokenizer: str | Path | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        """Check each, and keep numbers and flags as Python's own: the core takes no others."""
        device: object = self.device
        if not isinstance(device, str) or not re.fullmatch(
            r"auto|cpu|cuda(:(0|[1-9][0-9]{0,2}))?", device
        ):
            refuse("device", device, "auto, cpu, cuda or cuda:N")
        if self.dtype not in ("auto", "bfloat16"):
            raise RequestError(
                f"dtype is {show_argument(self.dtype)}, expected auto or bfloat16: computing in "
                "another dtype is not built yet"
            )
        if self.load_format not in ("auto", "dummy"):
            refuse("load_format", self.load_format, "auto or dummy")
        for name, (low, high) in COUNTS.items():
            value = getattr(self, name)
            if value is not None or name not in OPTIONAL_COUNTS:
                self._settle(name, check_integer(name, value, low, high))
        if self.page_size is not None and self.page_size not in PAGE_SIZES:
            refuse("page_size", self.page_size, f"one of {', '.join(map(str, PAGE_SIZES))}")
        if self.gpu_memory_utilization is not None:
            self._settle("gpu_memory_utilization", _share(self.gpu_memory_utilization))
        for name in ("deterministic", "enforce_eager", "progress"):
            self._settle(name, check_flag(name, getattr(self, name)))
        if self.adapters is not None and not isinstance(self.adapters, Mapping):
            refuse("adapters", self.adapters, "a dict of names and folders")
        for name in self.adapters or {}:
            check_adapter_name(name)  # before the weights are read

    def _settle(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


def _share(value: object) -> float:
    name, expected = "gpu_memory_utilization", "a number above 0 and up to 1"
    share = check_real(name, value, expected)
    if not 0.0 < share <= 1.0:
        refuse(name, value, expected)
    return share


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory and what Python knows of it. The caller closes `model`."""

    folder: Path
    config: ModelConfig
    eos_token_ids: tuple[int, ...]
    tokenizer: Tokenizer | None
    missing_tokenizer: str  # why there is none, for messages
    model: _C.Model


def load(model: str | Path, options: EngineOptions) -> LoadedModel:
    """Read, check and load. On an error nothing is held."""
    if options.device != "cpu":
        add_library_dirs(_C.add_library_dir)
    folder = resolve_model(model, options.revision)
    config = read_model_config(folder)
    generation = read_generation_config(folder, vocab_size=config.vocab_size)
    context = config.context_length(options.max_model_len)
    checkpoint = None if options.load_format == "dummy" else open_checkpoint(folder, config)
    tokenizer, missing = _open_tokenizer(folder, options.tokenizer, config.vocab_size)
    _log_dtype(folder, checkpoint, options.dtype)
    loaded = _load_weights(folder.resolve().name, config, checkpoint, context, options)
    _log_device(loaded.report()["no_cuda"])
    return LoadedModel(
        folder=folder,
        config=config,
        eos_token_ids=eos_token_ids(config, generation),
        tokenizer=tokenizer,
        missing_tokenizer=missing,
        model=loaded,
    )


def _open_tokenizer(
    folder: Path, given: str | Path | None, vocab_size: int
) -> tuple[Tokenizer | None, str]:
    """The tokenizer, or None and why: a folder needs none while prompts are ids."""
    if given is not None:
        return Tokenizer(resolve_model(given), vocab_size=vocab_size), ""
    if exists(folder / TOKENIZER_FILE):
        return Tokenizer(folder, vocab_size=vocab_size), ""
    return None, f"{folder} has no {TOKENIZER_FILE}"


def _log_dtype(folder: Path, checkpoint: Checkpoint | None, dtype: str) -> None:
    _log.info("%s: computes in bfloat16 (dtype is %s)", folder, dtype)
    if checkpoint is None:
        _log.warning("%s: load_format is dummy: random weights", folder)
        return
    others = sorted({tensor.dtype for tensor in checkpoint.tensors.values()} - {"BF16"})
    if others:
        _log.warning("%s: %s weights are converted to bfloat16", folder, " and ".join(others))


def _log_device(no_cuda: str) -> None:
    """Why device auto is the CPU: worth a warning where there is a GPU that could be used."""
    if not no_cuda:
        return
    has_gpu = any(DEVICE_FILES.glob("nvidia[0-9]*")) or (DEVICE_FILES / "dxg").exists()
    level = logging.WARNING if has_gpu else logging.INFO
    _log.log(level, "device auto is the CPU: %s", no_cuda)


def _load_weights(
    name: str,
    config: ModelConfig,
    checkpoint: Checkpoint | None,
    context: int,
    options: EngineOptions,
) -> _C.Model:
    # KV bytes that are given overrule the share: then what is free decides.
    is_shared = options.kv_cache_bytes is None
    share = (options.gpu_memory_utilization or _C.GPU_MEMORY_UTILIZATION) if is_shared else 0.0
    progress = _C.Progress()
    done = threading.Event()
    models: list[_C.Model] = []
    problems: list[BaseException] = []

    def work() -> None:
        try:
            models.append(
                _C.Model(
                    config,
                    checkpoint,
                    max_position=context,
                    device=options.device,
                    tensor_parallel=options.tensor_parallel_size,
                    n_threads=options.n_threads or 0,
                    progress=progress,
                    dummy_seed=options.seed,
                    gpu_memory_utilization=share,
                )
            )
        except BaseException as problem:
            problems.append(problem)
        finally:
            done.set()

    with HeldInterrupt() as interrupt:
        worker = threading.Thread(target=work, name="milpy-load", daemon=True)
        worker.start()
        try:
            _watch(name, progress, done, interrupt, shown=options.progress)
        except BaseException:
            progress.cancel()
            worker.join()
            for model in models:
                model.close()
            raise
        worker.join()
    if problems:
        raise problems.pop()  # left in the list, it would be in a cycle with this very frame
    return models[0]


def _watch(
    name: str,
    progress: _C.Progress,
    done: threading.Event,
    interrupt: HeldInterrupt,
    *,
    shown: bool,
) -> None:
    """Draw the bar until the load is done. On a terminal only."""
    from tqdm import tqdm  # noqa: PLC0415 - 30 ms of import

    with tqdm(
        desc=f"loading {name} as bfloat16",
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=None if shown else True,
    ) as bar:
        is_done = False
        while not is_done:
            is_done = done.wait(POLL_SECONDS)
            interrupt.check()
            n_done, bar.total = progress.read()
            bar.update(n_done - bar.n)
