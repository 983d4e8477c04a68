/* A backend that only packs, row-major: what a loader put where can be read off. Its conversions
 * are the test's own. */
#pragma once

#include "checkpoint.h"
#include "ops/backend.h"

static size_t fake_packed_bytes(int32_t N, int32_t K)
{
    return (size_t)N * (size_t)K * 2;
}

static mil_status fake_pack(struct mil_queue *queue, mil_weight *weight, int32_t part, int32_t row,
                            int32_t n_rows, void *src, mil_dtype dtype, int64_t src_stride)
{
    (void)queue;
    for (int32_t r = 0; r < n_rows; r++) {
        uint16_t *out = (uint16_t *)weight->data +
                        (size_t)mil_weight_row(weight, part, row + r) * (size_t)weight->K;
        const char *in = (const char *)src + (size_t)(r * src_stride) * mil_dtype_bytes(dtype);
        for (int32_t k = 0; k < weight->K; k++)
            out[k] = test_bf16_of(test_double_of(in + (size_t)k * mil_dtype_bytes(dtype), dtype));
    }
    return MIL_OK;
}

/* A keeps its shape, B too, each behind one word with its rank, so that sizes are odd. */
static size_t fake_lora_a_bytes(int32_t rank, int32_t in)
{
    return 2 + (size_t)rank * (size_t)in * 2;
}

static size_t fake_lora_b_bytes(int32_t out, int32_t rank)
{
    return fake_lora_a_bytes(rank, out);
}

static void fake_lora_pack(void *packed, const uint16_t *matrix, int64_t stride, int32_t rows,
                           int32_t cols, int32_t rank)
{
    uint16_t *out = packed;
    out[0] = (uint16_t)rank;
    for (int32_t r = 0; r < rows; r++)
        memcpy(out + 1 + (size_t)r * (size_t)cols, matrix + r * stride, (size_t)cols * 2);
}

static void fake_lora_pack_a(void *packed, const uint16_t *a, int64_t stride, int32_t rank,
                             int32_t in)
{
    fake_lora_pack(packed, a, stride, rank, in, rank);
}

static void fake_lora_pack_b(void *packed, const uint16_t *b, int64_t stride, int32_t out,
                             int32_t rank)
{
    fake_lora_pack(packed, b, stride, out, rank, rank);
}

static mil_status fake_alloc(struct mil_queue *queue, mil_slab *slab, size_t n_bytes,
                             const char *what)
{
    (void)queue;
    return mil_slab_init(slab, n_bytes, what);
}

static void fake_give_back(struct mil_queue *queue, mil_slab *slab)
{
    (void)queue;
    mil_slab_deinit(slab);
}

static uint64_t fake_free_bytes = UINT64_MAX;

static mil_status fake_memory(struct mil_queue *queue, mil_device_memory *memory)
{
    (void)queue;
    *memory = (mil_device_memory){"fake", fake_free_bytes, UINT64_MAX, fake_free_bytes};
    return MIL_OK;
}

static const mil_device fake_host = {.name = "fake",
                                     .is_host = true,
                                     .memory = fake_memory,
                                     .alloc = fake_alloc,
                                     .free = fake_give_back,
                                     .alloc_host = fake_alloc,
                                     .free_host = fake_give_back};

static const mil_backend fake_backend = {.name = "fake",
                                         .device = &fake_host,
                                         .lora_rank_multiple = 16,
                                         .packed_bytes = fake_packed_bytes,
                                         .pack = fake_pack,
                                         .lora_a_bytes = fake_lora_a_bytes,
                                         .lora_b_bytes = fake_lora_b_bytes,
                                         .lora_pack_a = fake_lora_pack_a,
                                         .lora_pack_b = fake_lora_pack_b};
