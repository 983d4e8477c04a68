/* y[m, n] = sum over k of x[m, k] W[n, k] (+ bias[n]): our own product, with bits fixed per row.
 *
 *   x [M, ldx] bf16, W [N][K] bf16 row-major, bias [N] fp32 or NULL, y [M, ldy] bf16 or fp32
 *
 * K is cut into mil_cuda_product_splits(N, K) splits. An output is, in each split, one fp32
 * accumulator that mma.sync.m16n8k16 adds to, 16 k at a time and ascending, and then the sum of its
 * splits in order; the bias is added in fp32 and the result is rounded once. Both kernels below
 * follow this with weights as operand A and rows of x as operand B, so M, the tile and the place in
 * it leave the bits alone.
 *
 * Few rows are bound by the weights' bytes: they are streamed once, past L2's other contents,
 * through a ring of cp.async stages; blocks enough to keep some 64 KiB per SM in flight all run at
 * once, so that no wave is left over. The weights' first stages are fetched before the previous
 * kernel has ended. Many rows are bound by flops: a plain tile of 128 x 128. Of cuBLAS on an H200
 * (2026-11-29, bench_ops): 0.93 to 1.11 at one row, 0.62 to 0.96 at 64, 0.35 to 0.44 at 8,192. */
#include "kernels/product.h"

#include "kernels/common.cuh"

/* k of one stage: 128 bytes of a row, one line of cache. */
#define STEP 64
/* 16-byte chunks of a row in one stage. */
#define CHUNKS (STEP / 8)
/* Two blocks or so per SM of a large GPU, in tiles of 64 weights. A constant: bits may not depend
 * on the device. */
#define MIN_TILE 64
#define WANTED_BLOCKS 288
/* Below this a split spends its time on filling the ring. */
#define MIN_SPLIT_STEPS 8
#define MAX_SPLITS 8
#define FEW_ROWS 64
/* Where K is split, a second pass over the weights costs less than leaving SMs idle with large
 * tiles (reckoned from bytes and flops). */
#define MAX_PASSES 3

#define FEW_THREADS 128
#define MANY_THREADS 256
#define MANY_TILE 128
#define MANY_STAGES 3
/* Tiles of x that share L2 while all weights pass by: 1024 rows. */
#define MANY_GROUP 8
/* fp32 a row of the tile that is turned round; the 4 spread rows over banks. */
#define TURNED_STRIDE (MANY_TILE + 4)

typedef struct product {
    const uint16_t *x;
    const uint16_t *w;
    const float *bias;
    void *y;
    float *partials; /* [n_splits][M][N], few rows of several splits only */
    int64_t ldx, ldy;
    int32_t M, N, K;
    int32_t n_steps; /* K / STEP, rounded up */
    int32_t n_splits;
    bool is_f32;       /* y */
    bool y_is_aligned; /* every eighth element of a row on 16 bytes */
} product;

/* ---- shared memory ---- */

/* Element of a stage's tile, [rows][STEP], where chunk `chunk` of a row begins. Chunks of 8 rows
 * that ldmatrix reads together lie in different banks. */
static __device__ __forceinline__ int place(int row, int chunk)
{
    return row * STEP + (chunk ^ (row & 7)) * 8;
}

/* As mil_copy16, leaving other data in L2: weights are read once a step. */
static __device__ __forceinline__ void copy16_once(void *shared, const void *global, bool is_inside)
{
    uint64_t policy;
    int n = is_inside ? 16 : 0;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(
                     mil_shared_address(shared)),
                 "l"(global), "r"(n), "l"(policy)
                 : "memory");
}

/* Eight elements of one row from element k on, by single loads; zeros from n on. */
static __device__ __forceinline__ void copy_singly(uint16_t *shared, const uint16_t *row, int n)
{
#pragma unroll
    for (int i = 0; i < 8; i++)
        shared[i] = i < n ? row[i] : 0;
}

/* k of one step of `rows` rows into one stage: rows first .. of the n_rows at `from`, zeros past
 * the last row and past K. A thread keeps its chunk and takes every n_threads / CHUNKS-th row. */
enum how { HOW_ONCE, HOW_KEPT, HOW_SINGLY };
template <int rows, int n_threads, how kind>
static __device__ __forceinline__ void fetch(uint16_t *stage, const uint16_t *from, int64_t stride,
                                             int first, int n_rows, int step, int K)
{
    constexpr int apart = n_threads / CHUNKS;
    static_assert(rows % apart == 0 && apart % 8 == 0, "each thread has whole turns");
    int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS, k = step * STEP + chunk * 8;
    const uint16_t *at = from + (first + row) * stride + k;
    uint16_t *to = stage + place(row, chunk);
#pragma unroll
    for (int i = 0; i < rows; i += apart) {
        bool is_inside = first + row + i < n_rows && k < K;
        if (kind == HOW_ONCE)
            copy16_once(to + i * STEP, at + i * stride, is_inside);
        else if (kind == HOW_KEPT)
            mil_copy16(to + i * STEP, at + i * stride, is_inside);
        else
            copy_singly(to + i * STEP, at + i * stride, is_inside ? K - k : 0);
    }
}

/* The same for a first stage, by loads that no group of cp.async waits for. */
template <int rows, int n_threads>
static __device__ __forceinline__ void fetch_now(uint16_t *stage, const uint16_t *from,
                                                 int64_t stride, int n_rows, int step, int K)
{
    constexpr int apart = n_threads / CHUNKS;
    int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS, k = step * STEP + chunk * 8;
    const uint16_t *at = from + row * stride + k;
#pragma unroll
    for (int i = 0; i < rows; i += apart) {
        uint4 v = make_uint4(0, 0, 0, 0);
        if (row + i < n_rows && k < K)
            v = *(const uint4 *)(at + i * stride);
        *(uint4 *)(stage + place(row, chunk) + i * STEP) = v;
    }
}

/* ---- sums ---- */

static __device__ __forceinline__ int split_begin(const product &p, int split)
{
    return (int)((int64_t)p.n_steps * split / p.n_splits);
}

/* One stage: acc[m][n] += the warp's 16 m_tiles weights from w_row on, times 8 n_tiles rows of x
 * from x_row on. k ascends; the order of m and n does not matter. */
template <int m_tiles, int n_tiles>
static __device__ __forceinline__ void multiply(float (&acc)[m_tiles][n_tiles][4],
                                                const uint16_t *w, int w_row, const uint16_t *x,
                                                int x_row)
{
    int lane = threadIdx.x % MIL_WARP;
#pragma unroll
    for (int k16 = 0; k16 < STEP / 16; k16++) {
        uint32_t a[m_tiles][4], b[n_tiles / 2][4];
#pragma unroll
        for (int m = 0; m < m_tiles; m++)
            mil_ldmatrix4(a[m], w + place(w_row + m * 16 + lane % 16, k16 * 2 + lane / 16));
#pragma unroll
        for (int n = 0; n < n_tiles / 2; n++)
            mil_ldmatrix4(
                b[n], x + place(x_row + n * 16 + lane / 16 * 8 + lane % 8, k16 * 2 + lane / 8 % 2));
#pragma unroll
        for (int m = 0; m < m_tiles; m++)
#pragma unroll
            for (int n = 0; n < n_tiles; n++)
                mil_mma(acc[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
    }
}

/* Where element e of an accumulator tile lies in it: 16 weights by 8 rows of x. */
static __device__ __forceinline__ int tile_weight(int e)
{
    return threadIdx.x % MIL_WARP / 4 + e / 2 * 8;
}

static __device__ __forceinline__ int tile_row(int e)
{
    return threadIdx.x % 4 * 2 + e % 2;
}

static __device__ __forceinline__ void store(const product &p, int row, int column, float sum)
{
    if (p.bias != NULL)
        sum += p.bias[column];
    int64_t at = row * p.ldy + column;
    if (p.is_f32)
        ((float *)p.y)[at] = sum;
    else
        ((uint16_t *)p.y)[at] = mil_round(sum);
}

/* Grid (tiles of weights, splits). Four warps, each with a quarter of the tile's weights and all
 * rows. */
template <int tile, int rows, int n_stages>
static __global__ void __launch_bounds__(FEW_THREADS) few_rows_kernel(const product p)
{
    constexpr int m_tiles = tile / 64, n_tiles = rows / 8;
    extern __shared__ __align__(128) uint16_t shared[];
    uint16_t *w_stages = shared, *x_stages = shared + n_stages * tile * STEP;
    int first = blockIdx.x * tile, split = blockIdx.y;
    int begin = split_begin(p, split), n = split_begin(p, split + 1) - begin;
    int n_first = min(n, n_stages - 1);
    int w_row = threadIdx.x / MIL_WARP * 16 * m_tiles;
    float acc[m_tiles][n_tiles][4] = {};

#pragma unroll
    for (int i = 0; i < n_stages - 1; i++) {
        if (i < n_first)
            fetch<tile, FEW_THREADS, HOW_ONCE>(w_stages + i * tile * STEP, p.w, p.K, first, p.N,
                                               begin + i, p.K);
        mil_copy_commit();
    }
    mil_wait_for_previous();
    mil_let_next_start();
#pragma unroll
    for (int i = 0; i < n_stages - 1; i++)
        if (i < n_first)
            fetch_now<rows, FEW_THREADS>(x_stages + i * rows * STEP, p.x, p.ldx, p.M, begin + i,
                                         p.K);

    for (int i = 0, slot = 0, fill = n_stages - 1; i < n; i++) {
        mil_copy_wait<n_stages - 2>();
        __syncthreads(); /* stage i is there, and all have left the slot that is filled now */
        if (i + n_stages - 1 < n) {
            int step = begin + i + n_stages - 1;
            fetch<tile, FEW_THREADS, HOW_ONCE>(w_stages + fill * tile * STEP, p.w, p.K, first, p.N,
                                               step, p.K);
            fetch<rows, FEW_THREADS, HOW_KEPT>(x_stages + fill * rows * STEP, p.x, p.ldx, 0, p.M,
                                               step, p.K);
        }
        mil_copy_commit();
        multiply(acc, w_stages + slot * tile * STEP, w_row, x_stages + slot * rows * STEP, 0);
        slot = slot + 1 == n_stages ? 0 : slot + 1;
        fill = fill + 1 == n_stages ? 0 : fill + 1;
    }

#pragma unroll
    for (int m = 0; m < m_tiles; m++)
#pragma unroll
        for (int t = 0; t < n_tiles; t++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int column = first + w_row + m * 16 + tile_weight(e), row = t * 8 + tile_row(e);
                if (column >= p.N || row >= p.M)
                    continue;
                if (p.n_splits == 1)
                    store(p, row, column, acc[m][t][e]);
                else
                    p.partials[((int64_t)split * p.M + row) * p.N + column] = acc[m][t][e];
            }
}

/* Grid (columns, rows): the splits' sums, in order. */
static __global__ void combine_kernel(const product p)
{
    int column = blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.y;
    mil_wait_for_previous();
    mil_let_next_start();
    if (column >= p.N)
        return;
    const float *at = p.partials + (int64_t)row * p.N + column;
    int64_t stride = (int64_t)p.M * p.N;
    float part[MAX_SPLITS];
#pragma unroll
    for (int i = 0; i < MAX_SPLITS; i++)
        part[i] = i < p.n_splits ? at[i * stride] : 0;
    float sum = part[0];
#pragma unroll
    for (int i = 1; i < MAX_SPLITS; i++)
        if (i < p.n_splits)
            sum += part[i];
    store(p, row, column, sum);
}

/* Tile of weights and of x of block `id`: groups of MANY_GROUP tiles of x, weights in turn in each.
 */
static __device__ __forceinline__ void many_tiles(const product &p, int64_t id, int *w_tile,
                                                  int *x_tile)
{
    int n_w = mil_ceil_div(p.N, MANY_TILE), n_x = mil_ceil_div(p.M, MANY_TILE);
    int group = (int)(id / ((int64_t)MANY_GROUP * n_w));
    int rest = (int)(id - (int64_t)group * MANY_GROUP * n_w);
    int size = min(MANY_GROUP, n_x - group * MANY_GROUP);
    *w_tile = rest / size;
    *x_tile = group * MANY_GROUP + rest % size;
}

/* y of one tile, from sums turned round in shared memory: [x row][weight] fp32. */
static __device__ __forceinline__ void store_turned(const product &p, const float *turned,
                                                    int w_first, int x_first)
{
    for (int i = threadIdx.x; i < MANY_TILE * MANY_TILE / 8; i += MANY_THREADS) {
        int row = x_first + i / (MANY_TILE / 8), column = w_first + i % (MANY_TILE / 8) * 8;
        const float *from = turned + (row - x_first) * TURNED_STRIDE + (column - w_first);
        if (row >= p.M || column >= p.N)
            continue;
        if (!p.y_is_aligned || column + 8 > p.N) {
            for (int e = 0; e < 8 && column + e < p.N; e++)
                store(p, row, column + e, from[e]);
            continue;
        }
        float v[8];
#pragma unroll
        for (int e = 0; e < 8; e++)
            v[e] = p.bias != NULL ? from[e] + p.bias[column + e] : from[e];
        int64_t at = row * p.ldy + column;
        if (p.is_f32) {
            float *y = (float *)p.y + at;
            *(float4 *)y = make_float4(v[0], v[1], v[2], v[3]);
            *(float4 *)(y + 4) = make_float4(v[4], v[5], v[6], v[7]);
        } else {
            mil_store8((uint16_t *)p.y + at, v);
        }
    }
}

/* One block per 128 weights by 128 rows of x, all of K; eight warps of 64 weights by 32 rows. */
template <bool is_quick>
static __global__ void __launch_bounds__(MANY_THREADS) many_rows_kernel(const product p)
{
    constexpr int n_elements = MANY_TILE * STEP;
    constexpr how kind = is_quick ? HOW_KEPT : HOW_SINGLY;
    extern __shared__ __align__(128) uint16_t shared[];
    uint16_t *w_stages = shared, *x_stages = shared + MANY_STAGES * n_elements;
    int warp = threadIdx.x / MIL_WARP, w_row = warp % 2 * 64, x_row = warp / 2 * 32;
    int w_tile, x_tile;
    many_tiles(p, blockIdx.x, &w_tile, &x_tile);
    int w_first = w_tile * MANY_TILE, x_first = x_tile * MANY_TILE;
    float acc[4][4][4] = {}, sum[4][4][4] = {};

    mil_wait_for_previous();
    mil_let_next_start();
#pragma unroll
    for (int i = 0; i < MANY_STAGES - 1; i++) {
        if (i < p.n_steps) {
            fetch<MANY_TILE, MANY_THREADS, kind>(w_stages + i * n_elements, p.w, p.K, w_first, p.N,
                                                 i, p.K);
            fetch<MANY_TILE, MANY_THREADS, kind>(x_stages + i * n_elements, p.x, p.ldx, x_first,
                                                 p.M, i, p.K);
        }
        mil_copy_commit();
    }
    int split = 0, end = split_begin(p, 1);
    for (int i = 0; i < p.n_steps; i++) {
        mil_copy_wait<MANY_STAGES - 2>();
        __syncthreads();
        int next = i + MANY_STAGES - 1, fill = next % MANY_STAGES * n_elements;
        if (next < p.n_steps) {
            fetch<MANY_TILE, MANY_THREADS, kind>(w_stages + fill, p.w, p.K, w_first, p.N, next,
                                                 p.K);
            fetch<MANY_TILE, MANY_THREADS, kind>(x_stages + fill, p.x, p.ldx, x_first, p.M, next,
                                                 p.K);
        }
        mil_copy_commit();
        int slot = i % MANY_STAGES * n_elements;
        multiply(acc, w_stages + slot, w_row, x_stages + slot, x_row);
        if (i + 1 < end)
            continue;
#pragma unroll
        for (int m = 0; m < 4; m++)
#pragma unroll
            for (int t = 0; t < 4; t++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float part = acc[m][t][e];
                    sum[m][t][e] = split == 0 ? part : sum[m][t][e] + part;
                    acc[m][t][e] = 0;
                }
        split++;
        end = split_begin(p, split + 1);
    }
    __syncthreads();
    float *turned = (float *)shared;
#pragma unroll
    for (int m = 0; m < 4; m++)
#pragma unroll
        for (int t = 0; t < 4; t++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                turned[(x_row + t * 8 + tile_row(e)) * TURNED_STRIDE + w_row + m * 16 +
                       tile_weight(e)] = sum[m][t][e];
    __syncthreads();
    store_turned(p, turned, w_first, x_first);
}

/* ---- launch ---- */

int32_t mil_cuda_product_splits(int32_t N, int32_t K)
{
    int32_t wanted = WANTED_BLOCKS / mil_ceil_div(N, MIN_TILE);
    int32_t most = mil_ceil_div(K, STEP) / MIN_SPLIT_STEPS;
    wanted = wanted < most ? wanted : most;
    wanted = wanted < MAX_SPLITS ? wanted : MAX_SPLITS;
    return wanted > 1 ? wanted : 1;
}

/* Splits times N is at most WANTED_BLOCKS * MIN_TILE where there are several. */
size_t mil_cuda_product_workspace(void)
{
    return (size_t)FEW_ROWS * WANTED_BLOCKS * MIN_TILE * sizeof(float);
}

template <typename Kernel>
static mil_status allow_shared(Kernel kernel, size_t n_bytes)
{
    return mil_cuda_status(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)n_bytes),
        "product: shared memory");
}

template <int tile, int rows, int n_stages>
static mil_status few_rows(const mil_queue *queue, const product &p)
{
    constexpr size_t n_bytes = (size_t)n_stages * (tile + rows) * STEP * sizeof(uint16_t);
    dim3 grid(mil_ceil_div(p.N, tile), p.n_splits);
    MIL_TRY(allow_shared(few_rows_kernel<tile, rows, n_stages>, n_bytes));
    MIL_TRY(mil_launch(queue, "product of few rows", few_rows_kernel<tile, rows, n_stages>, grid,
                       dim3(FEW_THREADS), n_bytes, p));
    if (p.n_splits == 1)
        return MIL_OK;
    return mil_launch(queue, "product's splits", combine_kernel, dim3(mil_ceil_div(p.N, 256), p.M),
                      dim3(256), 0, p);
}

/* Stages: four blocks of tiles of 64 fit on an SM with 227 KiB, two of 128; every kernel here fits
 * one with 99 KiB. Large tiles halve how often x is read, which counts from some 64 rows on. */
static mil_status few_rows_pass(const mil_queue *queue, const product &p)
{
    if (p.M <= 16)
        return few_rows<64, 16, 5>(queue, p);
    if (p.M <= 32)
        return few_rows<64, 32, 4>(queue, p);
    return few_rows<128, 64, 4>(queue, p);
}

static mil_status few_rows_passes(const mil_queue *queue, product p)
{
    int32_t M = p.M;
    size_t y_bytes = p.is_f32 ? sizeof(float) : sizeof(uint16_t);
    for (int32_t row = 0; row < M; row += FEW_ROWS) {
        product pass = p;
        pass.M = M - row < FEW_ROWS ? M - row : FEW_ROWS;
        pass.x += row * p.ldx;
        pass.y = (char *)p.y + row * p.ldy * y_bytes;
        MIL_TRY(few_rows_pass(queue, pass));
    }
    return MIL_OK;
}

template <bool is_quick>
static mil_status many_rows(const mil_queue *queue, const product &p)
{
    constexpr size_t n_bytes = (size_t)MANY_STAGES * 2 * MANY_TILE * STEP * sizeof(uint16_t);
    static_assert(n_bytes >= (size_t)MANY_TILE * TURNED_STRIDE * sizeof(float), "the turned tile");
    int64_t n_blocks = (int64_t)mil_ceil_div(p.M, MANY_TILE) * mil_ceil_div(p.N, MANY_TILE);
    if (n_blocks > INT32_MAX)
        return mil_fail(MIL_ERR_UNSUPPORTED,
                        "linear: %d rows by %d columns take %lld blocks, expected <= %d", p.M, p.N,
                        (long long)n_blocks, INT32_MAX);
    MIL_TRY(allow_shared(many_rows_kernel<is_quick>, n_bytes));
    return mil_launch(queue, "product of many rows", many_rows_kernel<is_quick>,
                      dim3((unsigned)n_blocks), dim3(MANY_THREADS), n_bytes, p);
}

static bool is_aligned(const void *address)
{
    return (uintptr_t)address % 16 == 0;
}

/* A kernel is loaded when the runtime is first asked about it. */
template <typename Kernel>
static mil_status load(Kernel kernel)
{
    cudaFuncAttributes unused;
    return mil_cuda_status(cudaFuncGetAttributes(&unused, kernel), "product: loading a kernel");
}

extern "C" mil_status mil_cuda_product_load(void)
{
    MIL_TRY(load(few_rows_kernel<64, 16, 5>));
    MIL_TRY(load(few_rows_kernel<64, 32, 4>));
    MIL_TRY(load(few_rows_kernel<128, 64, 4>));
    MIL_TRY(load(combine_kernel));
    MIL_TRY(load(many_rows_kernel<true>));
    return load(many_rows_kernel<false>);
}

extern "C" mil_status mil_cuda_product(mil_context *context, const mil_linear_args *args)
{
    const mil_weight *weight = args->weight;
    product p = {};
    p.x = args->x;
    p.w = (const uint16_t *)weight->data;
    p.bias = weight->bias;
    p.y = args->y;
    p.partials = (float *)context->workspace;
    p.ldx = args->ldx;
    p.ldy = args->ldy;
    p.M = args->M;
    p.N = weight->N;
    p.K = weight->K;
    p.n_steps = mil_ceil_div(p.K, STEP);
    p.n_splits = mil_cuda_product_splits(p.N, p.K);
    p.is_f32 = args->y_dtype == MIL_DTYPE_F32;
    p.y_is_aligned = is_aligned(p.y) && p.ldy % 8 == 0;
    bool is_quick = p.K % 8 == 0 && p.ldx % 8 == 0 && is_aligned(p.x) && is_aligned(p.w);
    bool has_room = p.n_splits == 1 || context->workspace_bytes >= mil_cuda_product_workspace();
    int32_t most_rows = p.n_splits == 1 ? FEW_ROWS : FEW_ROWS * MAX_PASSES;
    if (p.M <= 0 || p.N <= 0)
        return MIL_OK;
    if (!is_quick)
        return many_rows<false>(context->queue, p);
    if (has_room && p.M <= most_rows)
        return few_rows_passes(context->queue, p);
    return many_rows<true>(context->queue, p);
}
