/* cuBLASLt's symbols, and the table of its algorithms.
 *
 * Refuses to time anything. Row-major y = x W^T is, column-major, y' [N, M] = (W' [K, N])^T x' [K,
 * M]: the library sees W as its A (transposed), x as its B, y as C and D. */
#include "kernels/cublas.h"

#include "kernels/cublaslt.h"
#include "kernels/device.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PATH_BYTES 1024
/* What NVIDIA recommends for Hopper. */
#define WORKSPACE_BYTES ((size_t)32 << 20)
/* Kinds of product met: some 5 weights, 30 buckets, two dtypes. A table three quarters full is
 * emptied, for callers whose shapes never repeat. */
#define N_ENTRIES 1024
#define MAX_ENTRIES (N_ENTRIES / 4 * 3)
/* Of buffers as the library is told: ours are 64-byte aligned. */
#define MOST_ALIGNMENT 64
#define LEAST_ALIGNMENT 16

#define SYMBOLS(X)                                                                                 \
    X(Create)                                                                                      \
    X(GetVersion)                                                                                  \
    X(GetStatusName)                                                                               \
    X(Matmul)                                                                                      \
    X(MatmulAlgoCheck)                                                                             \
    X(MatmulAlgoGetHeuristic)                                                                      \
    X(MatmulDescCreate)                                                                            \
    X(MatmulDescDestroy)                                                                           \
    X(MatmulDescSetAttribute)                                                                      \
    X(MatrixLayoutCreate)                                                                          \
    X(MatrixLayoutDestroy)                                                                         \
    X(MatrixLayoutSetAttribute)                                                                    \
    X(MatmulPreferenceCreate)                                                                      \
    X(MatmulPreferenceDestroy)                                                                     \
    X(MatmulPreferenceSetAttribute)

typedef struct library {
#define FIELD(name) __typeof__(&cublasLt##name) name;
    SYMBOLS(FIELD)
#undef FIELD
    char path[PATH_BYTES];
} library;

/* Goes to the next queue of its device when its own goes: cublasLtDestroy waits for the whole
 * device, which ends every capture in the process, whatever the modes of the threads. */
typedef struct lt_handle {
    struct lt_handle *next; /* of the spare ones */
    int32_t ordinal;
    __typeof__(&cublasLtCreate) create; /* tells libraries apart */
    cublasLtHandle_t lt;
} lt_handle;

static pthread_mutex_t spare_lock = PTHREAD_MUTEX_INITIALIZER;
static lt_handle *spare_handles;

/* What an algorithm is chosen by. */
typedef struct lt_key {
    int32_t N, K, rows; /* rows: a bucket */
    int64_t ldy, ldx;
    mil_dtype y_dtype;
    bool has_bias;
    int32_t in_alignment, y_alignment;
} lt_key;

typedef struct lt_entry {
    lt_key key;
    bool is_used;
    bool is_served; /* there is an algorithm */
    bool is_warm;   /* its kernel is loaded */
    int32_t M;      /* that the layouts are for and the algorithm takes; 0: neither is so */
    cublasLtMatmulAlgo_t algo;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t w, x, y;
} lt_entry;

struct mil_cublas {
    mil_queue *queue; /* whose this is */
    library lib;
    lt_handle *handle;
    cublasLtMatmulPreference_t preference;
    mil_slab workspace; /* of all products, one after another */
    int32_t n_entries;
    lt_entry entries[N_ENTRIES];
};

/* ---- create ---- */

static mil_status resolve(void *to, void *handle, const char *symbol)
{
    void *address = dlsym(handle, symbol);
    if (address == NULL)
        return mil_fail(MIL_ERR_DEVICE, "cuda: libcublasLt has no %s, expected version 12 or 13",
                        symbol);
    memcpy(to, &address, sizeof address);
    return MIL_OK;
}

/* "12.4" */
static void show_version(char *text, size_t n_bytes, int driver)
{
    (void)snprintf(text, n_bytes, "%d.%d", driver / 1000, driver % 1000 / 10);
}

/* A library wants a driver of its major version or newer, and says so only when it is used. */
static mil_status check_driver(const library *lib, int driver)
{
    size_t version = lib->GetVersion();
    char is_for[16];
    show_version(is_for, sizeof is_for, driver);
    if (version / 10000 <= (size_t)driver / 1000)
        return MIL_OK;
    return mil_fail(MIL_ERR_DEVICE,
                    "cuda: %s is cublasLt %zu, the driver is for CUDA %s, expected libcublasLt.so "
                    "of that major version or an older one",
                    lib->path, version, is_for);
}

/* The newest that the driver can run. */
static mil_status open_library(void **handle, int driver)
{
    static const char *const names[] = {"libcublasLt.so.13", "libcublasLt.so.12", NULL};
    char is_for[16], reason[900]; /* what follows it shall be told whole */
    const char *named = getenv("MILPY_CUBLASLT");
    bool is_named = named != NULL && named[0] != '\0';
    bool runs_13 = driver >= 13000;
    mil_status status =
        mil_cuda_library_open(handle, "MILPY_CUBLASLT", runs_13 ? names : names + 1);
    if (status == MIL_OK || is_named)
        return status;
    show_version(is_for, sizeof is_for, driver);
    (void)snprintf(reason, sizeof reason, "%s", mil_status_message());
    return mil_fail(status, "%s; expected one for the driver's CUDA %s, as the wheel %s has it",
                    reason, is_for, runs_13 ? "nvidia-cublas 13" : "nvidia-cublas-cu12");
}

/* The library stays loaded until the process ends: its kernels are registered with the driver. */
static mil_status load(library *lib)
{
    void *handle;
    Dl_info info;
    int driver = 0;
    MIL_CUDA_TRY(cudaDriverGetVersion(&driver));
    MIL_TRY(open_library(&handle, driver));
#define RESOLVE(name) MIL_TRY(resolve(&lib->name, handle, "cublasLt" #name));
    SYMBOLS(RESOLVE)
#undef RESOLVE
    if (dladdr(dlsym(handle, "cublasLtCreate"), &info) != 0 && info.dli_fname != NULL)
        (void)snprintf(lib->path, sizeof lib->path, "%s", info.dli_fname);
    return check_driver(lib, driver);
}

static mil_status refused_memory(const struct mil_cublas *cublas, const char *call)
{
    size_t is_free = 0, total = 0;
    (void)cudaMemGetInfo(&is_free, &total);
    (void)cudaGetLastError();
    return mil_fail(MIL_ERR_MEMORY, "%s: cublasLt%s was refused memory, %s of %s are free (%s)",
                    cublas->queue->label, call, mil_memory_show(is_free).text,
                    mil_memory_show(total).text, cublas->lib.path);
}

static mil_status answer(const struct mil_cublas *cublas, cublasStatus_t found, const char *call)
{
    if (found == CUBLAS_STATUS_SUCCESS)
        return MIL_OK;
    (void)cudaGetLastError();
    if (found == CUBLAS_STATUS_ALLOC_FAILED)
        return refused_memory(cublas, call);
    return mil_fail(MIL_ERR_DEVICE, "%s: cublasLt%s: %s (%s, version %lld)", cublas->queue->label,
                    call, cublas->lib.GetStatusName(found), cublas->lib.path,
                    (long long)mil_cublas_version(cublas));
}

#define LT_TRY(cublas, name, ...) MIL_TRY(answer((cublas), (cublas)->lib.name(__VA_ARGS__), #name))

static mil_status set_preference(struct mil_cublas *cublas, cublasLtMatmulPreferenceAttributes_t at,
                                 const void *value, size_t n_bytes)
{
    LT_TRY(cublas, MatmulPreferenceSetAttribute, cublas->preference, at, value, n_bytes);
    return MIL_OK;
}

static lt_handle *take_spare(const struct mil_cublas *cublas)
{
    pthread_mutex_lock(&spare_lock);
    lt_handle **at = &spare_handles;
    while (*at != NULL &&
           ((*at)->ordinal != cublas->queue->ordinal || (*at)->create != cublas->lib.Create))
        at = &(*at)->next;
    lt_handle *found = *at;
    if (found != NULL)
        *at = found->next;
    pthread_mutex_unlock(&spare_lock);
    return found;
}

static void leave_spare(lt_handle *handle)
{
    pthread_mutex_lock(&spare_lock);
    handle->next = spare_handles;
    spare_handles = handle;
    pthread_mutex_unlock(&spare_lock);
}

static mil_status find_handle(struct mil_cublas *cublas)
{
    lt_handle *it = take_spare(cublas);
    if (it == NULL) {
        MIL_TRY(mil_alloc_checked((void **)&it, 1, sizeof *it, "cublasLt's handle"));
        it->ordinal = cublas->queue->ordinal;
        it->create = cublas->lib.Create;
        mil_status status = answer(cublas, it->create(&it->lt), "Create");
        if (status != MIL_OK) {
            mil_free(it);
            return status;
        }
    }
    cublas->handle = it;
    return MIL_OK;
}

static mil_status fill(struct mil_cublas *cublas)
{
    uint64_t workspace = WORKSPACE_BYTES;
    /* One chain, or splits that are kept and summed in float32. */
    uint32_t reduction = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    MIL_TRY(load(&cublas->lib));
    MIL_TRY(find_handle(cublas));
    LT_TRY(cublas, MatmulPreferenceCreate, &cublas->preference);
    MIL_TRY(set_preference(cublas, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace,
                           sizeof workspace));
    MIL_TRY(set_preference(cublas, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reduction,
                           sizeof reduction));
    return mil_cuda_device.alloc(cublas->queue, &cublas->workspace, WORKSPACE_BYTES,
                                 "workspace of cublasLt");
}

static mil_status create(mil_queue *queue)
{
    struct mil_cublas *cublas;
    MIL_TRY(mil_alloc_checked((void **)&cublas, 1, sizeof *cublas, "cublasLt's table"));
    cublas->queue = queue;
    mil_status status = fill(cublas);
    if (status == MIL_OK)
        queue->cublas = cublas;
    else
        mil_cublas_free(cublas);
    return status;
}

mil_status mil_cublas_open(mil_queue *queue)
{
    mil_cuda_call it;
    if (queue->cublas != NULL)
        return MIL_OK;
    MIL_TRY(mil_cuda_begin_call(queue, &it));
    return mil_cuda_end_call(queue, &it, create(queue));
}

static void forget(const library *lib, lt_entry *entry)
{
    if (entry->desc != NULL)
        (void)lib->MatmulDescDestroy(entry->desc);
    if (entry->w != NULL)
        (void)lib->MatrixLayoutDestroy(entry->w);
    if (entry->x != NULL)
        (void)lib->MatrixLayoutDestroy(entry->x);
    if (entry->y != NULL)
        (void)lib->MatrixLayoutDestroy(entry->y);
    memset(entry, 0, sizeof *entry);
}

static void empty(struct mil_cublas *cublas)
{
    for (int32_t i = 0; i < N_ENTRIES; i++)
        forget(&cublas->lib, &cublas->entries[i]);
    cublas->n_entries = 0;
}

void mil_cublas_free(struct mil_cublas *cublas)
{
    if (cublas == NULL)
        return;
    empty(cublas);
    if (cublas->preference != NULL)
        (void)cublas->lib.MatmulPreferenceDestroy(cublas->preference);
    if (cublas->handle != NULL)
        leave_spare(cublas->handle);
    mil_cuda_device.free(cublas->queue, &cublas->workspace);
    mil_free(cublas);
}

int64_t mil_cublas_version(const struct mil_cublas *cublas)
{
    return (int64_t)cublas->lib.GetVersion();
}

const char *mil_cublas_path(const struct mil_cublas *cublas)
{
    return cublas->lib.path;
}

/* ---- the table ---- */

int32_t mil_cublas_bucket(int32_t M)
{
    int32_t power = 1;
    if (M > 16 && M <= 8192) {
        size_t multiple = M <= 128 ? 16 : M <= 512 ? 64 : M <= 2048 ? 256 : 1024;
        return (int32_t)mil_round_up((size_t)M, multiple);
    }
    while (power < M && power <= INT32_MAX / 2)
        power *= 2;
    return power < M ? INT32_MAX : power;
}

static int32_t alignment_of(uintptr_t bits)
{
    bits |= MOST_ALIGNMENT;
    return (int32_t)(bits & (~bits + 1));
}

static lt_key key_of(const mil_cublas_product *p)
{
    return (lt_key){
        .N = p->N,
        .K = p->K,
        .rows = mil_cublas_bucket(p->M),
        .ldy = p->ldy,
        .ldx = p->ldx,
        .y_dtype = p->y_dtype,
        .has_bias = p->bias != NULL,
        .in_alignment = alignment_of((uintptr_t)p->x | (uintptr_t)p->w),
        .y_alignment = alignment_of((uintptr_t)p->y),
    };
}

static bool is_same(const lt_key *a, const lt_key *b)
{
    return a->N == b->N && a->K == b->K && a->rows == b->rows && a->ldy == b->ldy &&
           a->ldx == b->ldx && a->y_dtype == b->y_dtype && a->has_bias == b->has_bias &&
           a->in_alignment == b->in_alignment && a->y_alignment == b->y_alignment;
}

/* Where the key is, or the empty place for it. */
static lt_entry *look(struct mil_cublas *cublas, const lt_key *key)
{
    uint32_t at = (uint32_t)key->N * 0x9E3779B1u ^ (uint32_t)key->K * 0x85EBCA77u ^
                  (uint32_t)key->rows * 0xC2B2AE3Du;
    at ^= at >> 15;
    while (cublas->entries[at % N_ENTRIES].is_used &&
           !is_same(&cublas->entries[at % N_ENTRIES].key, key))
        at++;
    return &cublas->entries[at % N_ENTRIES];
}

static cudaDataType_t type_of(mil_dtype dtype)
{
    return dtype == MIL_DTYPE_F32 ? CUDA_R_32F : CUDA_R_16BF;
}

static mil_status set_desc(struct mil_cublas *cublas, lt_entry *entry,
                           cublasLtMatmulDescAttributes_t at, const void *value, size_t n_bytes)
{
    LT_TRY(cublas, MatmulDescSetAttribute, entry->desc, at, value, n_bytes);
    return MIL_OK;
}

static mil_status set_bias(struct mil_cublas *cublas, lt_entry *entry, const void *bias)
{
    return set_desc(cublas, entry, CUBLASLT_MATMUL_DESC_BIAS_POINTER, (const void *)&bias,
                    sizeof bias);
}

static mil_status describe(struct mil_cublas *cublas, lt_entry *entry, const void *bias)
{
    const lt_key *key = &entry->key;
    int32_t transposed = CUBLAS_OP_T;
    uint32_t epilogue = CUBLASLT_EPILOGUE_BIAS;
    int32_t bias_type = type_of(key->y_dtype);
    uint64_t N = (uint64_t)key->N, K = (uint64_t)key->K, rows = (uint64_t)key->rows;
    LT_TRY(cublas, MatmulDescCreate, &entry->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    MIL_TRY(set_desc(cublas, entry, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed));
    LT_TRY(cublas, MatrixLayoutCreate, &entry->w, CUDA_R_16BF, K, N, (int64_t)K);
    LT_TRY(cublas, MatrixLayoutCreate, &entry->x, CUDA_R_16BF, K, rows, key->ldx);
    LT_TRY(cublas, MatrixLayoutCreate, &entry->y, type_of(key->y_dtype), N, rows, key->ldy);
    if (!key->has_bias)
        return MIL_OK;
    MIL_TRY(set_desc(cublas, entry, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue));
    MIL_TRY(
        set_desc(cublas, entry, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &bias_type, sizeof bias_type));
    return set_bias(cublas, entry, bias);
}

static mil_status set_alignments(struct mil_cublas *cublas, const lt_key *key)
{
    uint32_t in = (uint32_t)key->in_alignment, y = (uint32_t)key->y_alignment;
    MIL_TRY(set_preference(cublas, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &in, sizeof in));
    MIL_TRY(set_preference(cublas, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &in, sizeof in));
    MIL_TRY(set_preference(cublas, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &y, sizeof y));
    return set_preference(cublas, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &y, sizeof y);
}

/* The library's first choice. None is no error. */
static mil_status choose(struct mil_cublas *cublas, lt_entry *entry, const void *bias)
{
    cublasLtMatmulHeuristicResult_t result;
    int n_results = 0;
    MIL_TRY(describe(cublas, entry, bias));
    MIL_TRY(set_alignments(cublas, &entry->key));
    cublasStatus_t found = cublas->lib.MatmulAlgoGetHeuristic(
        cublas->handle->lt, entry->desc, entry->w, entry->x, entry->y, entry->y, cublas->preference,
        1, &result, &n_results);
    if (found != CUBLAS_STATUS_NOT_SUPPORTED)
        MIL_TRY(answer(cublas, found, "MatmulAlgoGetHeuristic"));
    entry->is_served =
        found == CUBLAS_STATUS_SUCCESS && n_results > 0 && result.state == CUBLAS_STATUS_SUCCESS;
    if (entry->is_served) {
        entry->algo = result.algo;
        entry->M = entry->key.rows;
    }
    return MIL_OK;
}

static mil_status find(struct mil_cublas *cublas, lt_entry **out, const mil_cublas_product *p)
{
    lt_key key = key_of(p);
    lt_entry *entry = look(cublas, &key);
    *out = entry;
    if (entry->is_used)
        return MIL_OK;
    if (cublas->n_entries == MAX_ENTRIES) {
        empty(cublas);
        *out = entry = look(cublas, &key);
    }
    entry->key = key;
    entry->is_used = true;
    cublas->n_entries++;
    mil_status status = choose(cublas, entry, p->bias);
    if (status != MIL_OK) {
        /* Put in last: no search passes over it. A failure is no refusal, and is not remembered. */
        forget(&cublas->lib, entry);
        cublas->n_entries--;
    }
    return status;
}

/* Make the entry's layouts be of M rows; false where its algorithm does not take that many. */
static bool takes(struct mil_cublas *cublas, lt_entry *entry, int32_t M)
{
    const library *lib = &cublas->lib;
    cublasLtMatmulHeuristicResult_t result;
    uint64_t rows = (uint64_t)M;
    if (!entry->is_served || entry->M == M)
        return entry->is_served;
    cublasStatus_t x =
        lib->MatrixLayoutSetAttribute(entry->x, CUBLASLT_MATRIX_LAYOUT_COLS, &rows, sizeof rows);
    cublasStatus_t y =
        lib->MatrixLayoutSetAttribute(entry->y, CUBLASLT_MATRIX_LAYOUT_COLS, &rows, sizeof rows);
    cublasStatus_t check = lib->MatmulAlgoCheck(cublas->handle->lt, entry->desc, entry->w, entry->x,
                                                entry->y, entry->y, &entry->algo, &result);
    bool is_taken = x == CUBLAS_STATUS_SUCCESS && y == CUBLAS_STATUS_SUCCESS &&
                    check == CUBLAS_STATUS_SUCCESS && result.workspaceSize <= WORKSPACE_BYTES;
    entry->M = is_taken ? M : 0;
    return is_taken;
}

/* ---- run ---- */

static bool is_aligned(const mil_cublas_product *p)
{
    uintptr_t addresses = (uintptr_t)p->x | (uintptr_t)p->w | (uintptr_t)p->bias;
    return addresses % LEAST_ALIGNMENT == 0 && p->K % 8 == 0 && p->ldx % 8 == 0;
}

/* A refusal queues nothing. It changes no entry, so that what serves M rows does not follow from
 * what ran before. */
static mil_status queue_product(mil_queue *queue, lt_entry *entry, const mil_cublas_product *p,
                                bool *is_served)
{
    static const float one = 1, zero = 0;
    struct mil_cublas *cublas = queue->cublas;
    if (p->bias != NULL)
        MIL_TRY(set_bias(cublas, entry, p->bias));
    cublasStatus_t found =
        cublas->lib.Matmul(cublas->handle->lt, entry->desc, &one, p->w, entry->w, p->x, entry->x,
                           &zero, p->y, entry->y, p->y, entry->y, &entry->algo,
                           cublas->workspace.data, WORKSPACE_BYTES, queue->stream);
    *is_served = found != CUBLAS_STATUS_NOT_SUPPORTED;
    return *is_served ? answer(cublas, found, "Matmul") : MIL_OK;
}

/* The first time the library loads a kernel, which a capture on this thread would forbid. */
static mil_status queue_first(mil_queue *queue, lt_entry *entry, const mil_cublas_product *p,
                              bool *is_served)
{
    mil_cuda_call it;
    MIL_TRY(mil_cuda_begin_call(queue, &it));
    mil_status status = mil_cuda_end_call(queue, &it, queue_product(queue, entry, p, is_served));
    entry->is_warm = status == MIL_OK && *is_served;
    return status;
}

mil_status mil_cublas_run(mil_queue *queue, const mil_cublas_product *p, bool *is_served)
{
    lt_entry *entry;
    *is_served = false;
    if (p->M <= 0 || !is_aligned(p))
        return MIL_OK;
    MIL_TRY(mil_cublas_open(queue));
    MIL_TRY(find(queue->cublas, &entry, p));
    if (!takes(queue->cublas, entry, p->M))
        return MIL_OK;
    return entry->is_warm ? queue_product(queue, entry, p, is_served)
                          : queue_first(queue, entry, p, is_served);
}
