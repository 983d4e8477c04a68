/* milpy's public C API, whole.
 *
 * A mil_model holds weights and adapters, split over one or more ranks. A mil_engine drives it with
 * a scheduler of its own: submit requests, lend a thread to mil_engine_run, poll batches of events.
 * A mil_stepper drives it step by step for a caller who owns pages and order. Both may share a
 * model; their steps exclude each other.
 *
 * Ownership: who creates frees, through the matching verb; freeing NULL is fine. Structs passed in
 * are read during the call only. Functions return mil_status and leave a message
 * (mil_status_message). Threads: every function may be called from any thread unless it says
 * otherwise. Nothing here prints, exits or calls back. */
#pragma once

#include "base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- what a model is ---- */

typedef enum mil_dtype {
    MIL_DTYPE_F32 = 0,
    MIL_DTYPE_BF16,
    MIL_DTYPE_F16,
    MIL_DTYPE_I32,
} mil_dtype;

size_t mil_dtype_bytes(mil_dtype dtype);
const char *mil_dtype_name(mil_dtype dtype); /* "float32", "bfloat16", ... */

typedef enum mil_architecture { MIL_ARCHITECTURE_LLAMA = 0 } mil_architecture;

typedef enum mil_rope_kind {
    MIL_ROPE_DEFAULT = 0,
    MIL_ROPE_LINEAR, /* position / factor */
    MIL_ROPE_LLAMA3, /* Llama 3.1's frequency bands */
} mil_rope_kind;

/* `dynamic` is MIL_ROPE_DEFAULT with max_position cut to the original length, by the reader. */
typedef struct mil_rope_config {
    mil_rope_kind kind;
    double theta;
    double factor;                 /* linear, llama3 */
    double low_freq_factor;        /* llama3 */
    double high_freq_factor;       /* llama3 */
    int64_t original_max_position; /* llama3 */
} mil_rope_config;

typedef struct mil_config {
    mil_architecture architecture;
    int32_t hidden;       /* H */
    int32_t ffn;          /* F */
    int32_t n_layers;     /* L */
    int32_t n_heads;      /* N */
    int32_t n_kv_heads;   /* K */
    int32_t head_dim;     /* D: a multiple of 8, 32..256 */
    int32_t vocab;        /* V */
    int32_t max_position; /* longest context that the rope kind serves */
    float rms_eps;
    bool tie_embeddings;
    bool attention_bias; /* q, k, v and o carry a bias */
    mil_rope_config rope;
} mil_config;

/* ---- where its bytes are ---- */

typedef struct mil_file_info {
    const char *path;
    uint64_t n_bytes; /* as the header reader saw it; the file must still have this size */
} mil_file_info;

typedef struct mil_tensor_info {
    const char *name; /* as Hugging Face names it, "model.layers.0.mlp.up_proj.weight" */
    mil_dtype dtype;
    int32_t rank;
    int64_t shape[2]; /* rank 1: shape[1] is 1 */
    int32_t file;     /* index into files */
    uint64_t begin;   /* absolute byte range in the file */
    uint64_t end;
} mil_tensor_info;

typedef struct mil_checkpoint_info {
    const mil_file_info *files; /* [n_files] */
    int32_t n_files;
    const mil_tensor_info *tensors; /* [n_tensors] */
    int32_t n_tensors;
    bool is_dummy; /* no files: seeded random weights from the config alone */
    uint64_t dummy_seed;
} mil_checkpoint_info;

typedef enum mil_projection {
    MIL_PROJECTION_Q = 0,
    MIL_PROJECTION_K,
    MIL_PROJECTION_V,
    MIL_PROJECTION_O,
    MIL_PROJECTION_GATE,
    MIL_PROJECTION_UP,
    MIL_PROJECTION_DOWN,
    MIL_N_PROJECTIONS,
} mil_projection;

const char *mil_projection_name(mil_projection projection); /* "q_proj", ... */

typedef struct mil_adapter_module_info {
    int32_t layer;
    mil_projection projection;
    int32_t rank;      /* R, 1..512 */
    float scale;       /* alpha / R, or alpha / sqrt(R): as PEFT computes it */
    mil_tensor_info a; /* [R, in] */
    mil_tensor_info b; /* [out, R] */
} mil_adapter_module_info;

typedef struct mil_adapter_info {
    const mil_file_info *files;
    int32_t n_files;
    const mil_adapter_module_info *modules; /* [n_modules], each (layer, projection) once */
    int32_t n_modules;
    bool is_dummy; /* seeded random A and B of the given ranks; tensors' byte ranges are not read */
    uint64_t dummy_seed;
} mil_adapter_info;

/* Written by a load, read (and cancelled) from another thread. */
typedef struct mil_progress mil_progress;
mil_status mil_progress_create(mil_progress **out) MIL_WARN_UNUSED;
void mil_progress_free(mil_progress *progress);
void mil_progress_read(const mil_progress *progress, uint64_t *done_bytes, uint64_t *total_bytes);
void mil_progress_cancel(mil_progress *progress); /* the load returns MIL_ERR_CLOSED soon */

/* ---- model ---- */

typedef struct mil_model mil_model;

typedef struct mil_model_options {
    const char *device; /* "cpu", "cuda", "cuda:1"; "auto": CUDA where there is a GPU, else cpu */
    int32_t tensor_parallel; /* world size, >= 1 */
    int32_t n_threads;       /* over all ranks; 0: from affinity mask and cgroup quota */
    mil_progress *progress;  /* may be NULL */
    /* Weights that would take a device beyond this share of its memory are refused before they are
     * loaded; 0: what is free decides. For a model that an engine of this share is to follow. */
    double gpu_memory_utilization;
} mil_model_options;

/* Load a model. Checks every byte range against its file before it allocates; on failure nothing is
 * held. Caller frees with mil_model_free, after every engine and stepper on it. */
mil_status mil_model_open(mil_model **out, const mil_config *config,
                          const mil_checkpoint_info *checkpoint, const mil_model_options *options)
    MIL_WARN_UNUSED;
void mil_model_free(mil_model *model);

typedef struct mil_model_report {
    size_t weight_bytes;  /* over all ranks */
    size_t adapter_bytes; /* over all ranks, contents now held */
    int32_t n_adapters;   /* contents now held */
    int32_t world;
    int32_t n_threads;
    const char *device;  /* "cpu", "cuda" */
    const char *isa;     /* of this CPU: "avx512bf16", "avx512", "avx2", "scalar" */
    const char *no_cuda; /* why device "auto" became "cpu", the model's own text; else "" */
} mil_model_report;

void mil_model_report_get(const mil_model *model, mil_model_report *report);

/* Load an adapter's content; *content is its id (>= 0, never reused while held). The caller holds
 * one reference; each request that names it holds another. It is freed when the last one goes. */
mil_status mil_model_add_adapter(mil_model *model, const mil_adapter_info *info, int32_t *content)
    MIL_WARN_UNUSED;
/* Drop the caller's reference. */
mil_status mil_model_release_adapter(mil_model *model, int32_t content) MIL_WARN_UNUSED;

/* ---- requests ---- */

#define MIL_MAX_LOGPROBS 20
#define MIL_MAX_STOP_TOKENS 256
#define MIL_NO_ADAPTER (-1)

typedef struct mil_sampling {
    float temperature; /* 0: greedy */
    int32_t top_k;     /* 0: off */
    float top_p;       /* 1: off; in (0, 1] */
    int32_t
        n_logprobs; /* -1: none; 0: of the chosen token; n <= MIL_MAX_LOGPROBS: and the n best */
    uint64_t seed;  /* a draw is a pure function of (seed, position, purpose) */
} mil_sampling;

typedef struct mil_token_logprob {
    int32_t token;
    float logprob; /* natural log, of the unscaled distribution (before temperature and filters) */
} mil_token_logprob;

/* What sampling one row gave. */
typedef struct mil_sample {
    int32_t token;
    int32_t n_top; /* entries of top in use, best first */
    float logprob; /* of token; 0 unless n_logprobs >= 0 */
    int32_t rank;  /* 1-based rank of token among the logits; 0 unless n_logprobs >= 0 */
    mil_token_logprob top[MIL_MAX_LOGPROBS];
} mil_sample;

/* ---- engine: our scheduler owns pages and order ---- */

typedef struct mil_engine mil_engine;

#define MIL_GPU_MEMORY_UTILIZATION 0.9 /* an engine's default */

typedef struct mil_engine_options {
    /* Prompt and answer. 0: the model's, cut to what the KV holds; else at most both. */
    int32_t max_model_len;
    /* 0: 64 on the CPU and 256 on a device, cut to max_num_batched_tokens where that is given. */
    int32_t max_num_seqs;
    /* Tokens of one step, all requests; at least max_num_seqs. 0: 512 on the CPU and 8192 on a
     * device, or max_num_seqs if more. */
    int32_t max_num_batched_tokens;
    int32_t page_size; /* 0: 16 on the CPU, 64 on a device; else 16, 32, 64, 128, 256 */
    /* Over all ranks. 0: on the CPU half of the memory that this process may still use (cgroup
     * limits counted) once weights and workspace are in, on a device all that
     * gpu_memory_utilization leaves; no more than max_num_seqs full contexts need. */
    uint64_t kv_cache_bytes;
    /* Share of a device's whole memory that may be in use once the engine is up, in (0, 1]; 0: 0.9.
     * What anyone uses counts: this engine, others of the process, other processes. Weights,
     * adapters held by then, workspace, libraries and graphs come first, and are measured; pages
     * take the rest of the share. kv_cache_bytes overrules it. Adapters that are loaded later take
     * of what is then free. */
    double gpu_memory_utilization;
    /* Batch mates and graph replay do not change a row's bits, save by preemption: where mates take
     * a request's pages, the tokens that it gave are computed anew as a prompt's are. The CPU's
     * never do. On a device it costs speed (products by kernels of our own), and no prompt is cut
     * into a piece of one token: at most max_num_batched_tokens - 2 requests run at once, which the
     * defaults above heed. */
    bool deterministic;
    bool enforce_eager; /* run decode op by op where graphs would serve it (tests, less memory) */
    bool poison;        /* fill freed pages with NaN (tests) */
} mil_engine_options;

mil_status mil_engine_create(mil_engine **out, mil_model *model, const mil_engine_options *options)
    MIL_WARN_UNUSED;
/* Needs mil_engine_run to have returned (or never been called). */
void mil_engine_free(mil_engine *engine);

typedef struct mil_request_options {
    const int32_t *tokens; /* [n_tokens], copied */
    int32_t n_tokens;
    /* New tokens; 0: until the end or the context. A number that the context cannot hold beside the
     * prompt (n_tokens + max_tokens > max_model_len) is an error, not a shorter answer. */
    int32_t max_tokens;
    const int32_t *stop_tokens; /* [n_stop_tokens], copied: a token that ends the answer */
    int32_t n_stop_tokens;      /* <= MIL_MAX_STOP_TOKENS */
    int32_t adapter;            /* a content id, or MIL_NO_ADAPTER */
    mil_sampling sampling;
} mil_request_options;

/* Queue a request; *id names it in events (> 0, never reused). Every check is made here: a bad
 * request is an error now and never reaches the loop. Thread-safe, does not wait for a step. */
mil_status mil_engine_submit(mil_engine *engine, const mil_request_options *request, uint64_t *id)
    MIL_WARN_UNUSED;
/* End a request; its last event has MIL_FINISH_CANCELLED. Unknown or finished ids are no error. */
void mil_engine_cancel(mil_engine *engine, uint64_t id);

typedef enum mil_finish {
    MIL_FINISH_NONE = 0,  /* more to come */
    MIL_FINISH_STOP,      /* a stop token, which is the event's token */
    MIL_FINISH_LENGTH,    /* max_tokens or the context */
    MIL_FINISH_CANCELLED, /* no token */
    MIL_FINISH_ERROR,     /* no token: the engine has died, and its error says why */
    MIL_FINISH_NUMERICS,  /* no token: its logits are not finite; the engine goes on */
} mil_finish;

typedef struct mil_event {
    uint64_t id;
    mil_finish finish;
    bool has_sample;
    mil_sample sample;
} mil_event;

/* Run steps until mil_engine_close; sleeps when there is no work. One thread at a time. An error is
 * a device fault or a bug: every open request has then got MIL_FINISH_ERROR and the engine is dead.
 */
mil_status mil_engine_run(mil_engine *engine) MIL_WARN_UNUSED;
/* Make run return after the step in flight; open requests get MIL_FINISH_CANCELLED. Idempotent. */
void mil_engine_close(mil_engine *engine);

/* Move up to max events to events[], in order; waits up to timeout_ms (0: not at all, < 0: for
 * ever) for the first one. *n is 0 on time-out. MIL_ERR_CLOSED once the loop has ended and none are
 * left. */
mil_status mil_engine_poll(mil_engine *engine, mil_event *events, int32_t max, int32_t timeout_ms,
                           int32_t *n) MIL_WARN_UNUSED;

typedef struct mil_engine_stats {
    int32_t n_waiting;
    int32_t n_running;
    int32_t n_pages;
    int32_t n_free_pages;
    int32_t page_size;
    int32_t max_model_len;
    int32_t max_num_seqs;
    int32_t max_num_batched_tokens;
    uint64_t n_steps;
    uint64_t n_preemptions;
    uint64_t n_prompt_tokens;    /* computed, recomputed ones included */
    uint64_t n_generated_tokens; /* delivered */
    /* Where the time of the thread in mil_engine_run went, over all steps. What is not in it, the
     * thread slept for want of work. */
    uint64_t fill_ns;   /* choosing who runs and writing the plan */
    uint64_t submit_ns; /* handing it to the device; where the host computes, all of the step */
    uint64_t wait_ns;   /* for the oldest step on the device */
    uint64_t retire_ns; /* its tokens to requests and events */
    /* Before the first step: capturing every decode step, the dry run that is measured included. */
    uint64_t capture_ns;
    size_t kv_bytes;
    size_t workspace_bytes;
} mil_engine_stats;

void mil_engine_stats_get(mil_engine *engine, mil_engine_stats *stats);

/* What the memory where an engine's model lies went to, over all ranks. The rows sum up to
 * total_bytes; of a device's, what was taken is exact to the byte that was asked for, and the
 * driver's rounding is in graph_bytes. */
typedef struct mil_memory_report {
    const char *device; /* "cpu", "cuda:0 (NVIDIA H200)"; the model's own text */
    uint64_t weight_bytes;
    uint64_t kv_bytes;
    uint64_t adapter_bytes;   /* contents that the model now holds */
    uint64_t workspace_bytes; /* activations, attention's partial results, slots, rope tables */
    uint64_t graph_bytes;     /* CUDA graphs, kernels, libraries and their workspace: measured */
    uint64_t other_bytes;     /* all else: the CUDA context, other engines, other processes */
    uint64_t free_bytes;      /* a host's: promised to no row above */
    uint64_t total_bytes;     /* a host's: that this process may use */
    uint64_t pinned_bytes;    /* in no sum: host memory that the device reads and writes in place */
} mil_memory_report;

/* From any thread, while the engine runs too. */
mil_status mil_engine_memory_get(mil_engine *engine, mil_memory_report *report) MIL_WARN_UNUSED;

/* ---- stepper: the caller owns pages and order ---- */

typedef struct mil_stepper mil_stepper;
typedef struct mil_seq mil_seq;

typedef struct mil_stepper_options {
    int32_t n_pages; /* page ids the caller may use: 0 .. n_pages - 1 */
    int32_t page_size;
    int32_t max_seqs;
    int32_t max_tokens;        /* of one step */
    int32_t max_pages_per_seq; /* length of a page list */
} mil_stepper_options;

mil_status mil_stepper_create(mil_stepper **out, mil_model *model,
                              const mil_stepper_options *options) MIL_WARN_UNUSED;
void mil_stepper_free(mil_stepper *stepper); /* frees its sequences as well */

/* A sequence with its sampling parameters and adapter (a content id or MIL_NO_ADAPTER). */
mil_status mil_seq_create(mil_seq **out, mil_stepper *stepper, const mil_sampling *sampling,
                          int32_t adapter) MIL_WARN_UNUSED;
void mil_seq_free(mil_seq *seq);

typedef struct mil_step_item {
    mil_seq *seq;
    const int32_t *tokens; /* [n_tokens]; NULL with n_tokens == 1: the token sampled last */
    int32_t n_tokens;
    int32_t n_past;       /* tokens whose KV is already in the pages */
    const int32_t *pages; /* [n_pages]; may be longer than needed, may be shared */
    int32_t n_pages;
    bool all_logits; /* a row for each token, else for the last one */
} mil_step_item;

/* One step over any subset of sequences in any order; results come in the caller's order. samples
 * [sum of rows] and logits [sum of rows, V] may be NULL. Nothing runs after it returns. */
mil_status mil_stepper_step(mil_stepper *stepper, const mil_step_item *items, int32_t n_items,
                            mil_sample *samples, float *logits) MIL_WARN_UNUSED;

/* ---- the machine ---- */

typedef struct mil_machine_report {
    const char *isa;           /* the path that would run, MILPY_CPU_ISA honoured */
    const char *isa_available; /* all this machine has, space-separated, best first */
    int32_t n_threads;         /* that a model would use */
    int32_t n_cpus_affinity;
    double cgroup_cpus;    /* 0: no quota */
    uint64_t memory_bytes; /* that this process may use: physical, cut by cgroup limits */
    uint64_t memory_free_bytes;
} mil_machine_report;

mil_status mil_machine_report_get(mil_machine_report *report) MIL_WARN_UNUSED;

#ifdef __cplusplus
}
#endif
