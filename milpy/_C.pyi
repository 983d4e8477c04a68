"""The C core. Types only: milpy.LLM and milpy.AsyncEngine are the faces to use."""

from collections.abc import Sequence
from typing import TypeAlias, TypedDict, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from milpy.adapters import Adapter
from milpy.checkpoint import Checkpoint
from milpy.config import ModelConfig

MAX_LOGPROBS: int
MAX_STOP_TOKENS: int
GPU_MEMORY_UTILIZATION: float
HAS_CUDA: bool
FINISH_NONE: int
FINISH_STOP: int
FINISH_LENGTH: int
FINISH_CANCELLED: int
FINISH_ERROR: int
FINISH_NUMERICS: int

# token, logprob, 1-based rank, and the best tokens with their logprobs
_Sample: TypeAlias = tuple[int, float, int, list[tuple[int, float]]]
# request id, one of FINISH_*, and what was sampled
_Event: TypeAlias = tuple[int, int, _Sample | None]
# sequence, tokens (None: the one sampled last), n_past, pages, whether a row per token is wanted
_StepItem: TypeAlias = (
    tuple[Seq, ArrayLike | None, int, ArrayLike]
    | tuple[Seq, ArrayLike | None, int, ArrayLike, bool]
)

class _GpuReport(TypedDict):
    name: str
    compute_capability: int
    driver_cuda: int
    build_cuda: int
    total_bytes: int
    problem: str
    free_bytes: int
    kernels: str
    cublaslt_version: int
    cublaslt_path: str

class _MachineReport(TypedDict):
    isa: str
    isa_available: str
    n_threads: int
    n_cpus_affinity: int
    cgroup_cpus: float
    memory_bytes: int
    memory_free_bytes: int

class _ModelReport(TypedDict):
    weight_bytes: int
    adapter_bytes: int
    n_adapters: int
    world: int
    n_threads: int
    device: str
    isa: str
    no_cuda: str

class _EngineStats(TypedDict):
    n_waiting: int
    n_running: int
    n_pages: int
    n_free_pages: int
    page_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    n_steps: int
    n_preemptions: int
    n_prompt_tokens: int
    n_generated_tokens: int
    fill_ns: int
    submit_ns: int
    wait_ns: int
    retire_ns: int
    capture_ns: int
    kv_bytes: int
    workspace_bytes: int

class _MemoryReport(TypedDict):
    device: str
    weight_bytes: int
    kv_bytes: int
    adapter_bytes: int
    workspace_bytes: int
    graph_bytes: int
    other_bytes: int
    free_bytes: int
    total_bytes: int
    pinned_bytes: int

def machine_report() -> _MachineReport: ...
def memory_held() -> int: ...
def memory_calls() -> int: ...
def read_switch(name: str, otherwise: bool, /) -> bool: ...
def gpu_reports() -> list[_GpuReport]: ...
def find_gpu() -> int: ...
def add_library_dir(directory: str, /) -> None: ...
def dlpack_stream(exchange_api: object, device_type: int, device_id: int, /) -> int | None: ...

# One op each, for milpy.ops: a device (None: where the arrays lie), a stream's handle, then NumPy
# arrays or DLPack capsules, which are consumed.
_Operand: TypeAlias = object

def op_rms_norm(
    device: str | None,
    stream: int,
    out: _Operand,
    x: _Operand,
    weight: _Operand,
    residual: _Operand | None,
    eps: float,
    /,
) -> None: ...
def op_silu_and_mul(
    device: str | None, stream: int, out: _Operand, gate_up: _Operand, interleave: int, /
) -> None: ...
def op_linear(
    device: str | None,
    stream: int,
    out: _Operand,
    x: _Operand,
    weight: _Operand,
    bias: _Operand | None,
    deterministic: bool,
    /,
) -> None: ...
def op_embedding(
    device: str | None, stream: int, out: _Operand, tokens: _Operand, weight: _Operand, /
) -> None: ...
def op_sample(
    device: str | None,
    stream: int,
    out: _Operand,
    logits: _Operand,
    params: _Operand,
    positions: _Operand,
    logprobs: _Operand | None,
    ranks: _Operand | None,
    top_tokens: _Operand | None,
    top_logprobs: _Operand | None,
    /,
) -> None: ...
def op_rope(
    device: str | None,
    stream: int,
    out: _Operand,
    x: _Operand,
    positions: _Operand,
    cos: _Operand,
    sin: _Operand,
    interleaved: bool,
    /,
) -> None: ...
def op_rope_and_cache(
    device: str | None,
    stream: int,
    out: _Operand,
    qkv: _Operand,
    positions: _Operand,
    cos: _Operand,
    sin: _Operand,
    k_cache: _Operand,
    v_cache: _Operand,
    page_table: _Operand,
    query_indptr: _Operand,
    kv_lengths: _Operand,
    interleaved: bool,
    /,
) -> None: ...
def op_attention(
    device: str | None,
    stream: int,
    out: _Operand,
    q: _Operand,
    k_cache: _Operand,
    v_cache: _Operand,
    page_table: _Operand,
    query_indptr: _Operand,
    kv_lengths: _Operand,
    scale: float,
    window: int,
    softcap: float,
    /,
) -> None: ...
def op_lora(
    device: str | None,
    stream: int,
    y: _Operand | None,
    x: _Operand | None,
    a: _Operand | None,
    v: _Operand | None,
    b: _Operand | None,
    segment_indptr: _Operand,
    segment_adapter: _Operand,
    rows: _Operand,
    scales: _Operand | None,
    scale: float,
    /,
) -> None: ...

@final
class Progress:
    def __new__(cls) -> Progress: ...
    def read(self) -> tuple[int, int]: ...
    def cancel(self) -> None: ...

@final
class Model:
    def __new__(
        cls,
        config: ModelConfig,
        checkpoint: Checkpoint | None,
        *,
        max_position: int,
        device: str = "auto",
        tensor_parallel: int = 1,
        n_threads: int = 0,
        progress: Progress | None = None,
        dummy_seed: int = 0,
        gpu_memory_utilization: float = 0.0,
    ) -> Model: ...
    def close(self) -> None: ...
    def report(self) -> _ModelReport: ...
    def add_adapter(self, adapter: Adapter, dummy_seed: int | None = None) -> int: ...
    def release_adapter(self, content: int, /) -> None: ...

@final
class Engine:
    def __new__(
        cls,
        model: Model,
        *,
        max_model_len: int = 0,
        max_num_seqs: int = 0,
        max_num_batched_tokens: int = 0,
        page_size: int = 0,
        kv_cache_bytes: int = 0,
        gpu_memory_utilization: float = 0.0,
        deterministic: bool = False,
        enforce_eager: bool = False,
        poison: bool = False,
    ) -> Engine: ...
    def run(self) -> None: ...
    def submit(
        self,
        tokens: ArrayLike,
        *,
        max_tokens: int = 0,
        stop_tokens: ArrayLike = (),
        adapter: int = -1,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        n_logprobs: int = -1,
        seed: int = 0,
    ) -> int: ...
    def cancel(self, id: int, /) -> None: ...
    def poll(self, timeout_ms: int = -1, max_events: int = 256) -> list[_Event]: ...
    def stop(self) -> None: ...
    def free(self) -> None: ...
    def stats(self) -> _EngineStats: ...
    def memory(self) -> _MemoryReport: ...

@final
class Stepper:
    def __new__(
        cls,
        model: Model,
        *,
        n_pages: int,
        page_size: int,
        max_seqs: int,
        max_tokens: int,
        max_pages_per_seq: int,
    ) -> Stepper: ...
    def create_seq(
        self,
        *,
        adapter: int = -1,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        n_logprobs: int = -1,
        seed: int = 0,
    ) -> Seq: ...
    def step(
        self, items: Sequence[_StepItem], logits: bool = False
    ) -> tuple[list[_Sample], NDArray[np.float32] | None]: ...

@final
class Seq: ...
