#include "kernels/tensor_map.h"

#include "kernels/device.h"

#define BOX_COLUMNS 64 /* of 16 bits: one swizzled row of 128 bytes */

mil_status mil_cuda_tensor_map_find(mil_queue *queue)
{
    return mil_cuda_driver_find(&queue->encode_tiled, "cuTensorMapEncodeTiled");
}

mil_status mil_cuda_tensor_map(CUtensorMap *out, const mil_queue *queue, const void *base,
                               mil_dtype dtype, int32_t columns, uint64_t rows, int32_t box_rows)
{
    const CUtensorMapDataType type =
        dtype == MIL_DTYPE_F16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const __typeof__(&cuTensorMapEncodeTiled) encode = queue->encode_tiled;
    const cuuint64_t size[2] = {(cuuint64_t)columns, rows};
    const cuuint64_t row_bytes[1] = {(cuuint64_t)columns * sizeof(uint16_t)};
    const cuuint32_t box[2] = {BOX_COLUMNS, (cuuint32_t)box_rows};
    const cuuint32_t steps[2] = {1, 1};
    CUresult result = encode(out, type, 2, (void *)base, size, row_bytes, box, steps,
                             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS)
        return mil_fail(MIL_ERR_DEVICE,
                        "%s: the driver refused a tensor map of %llu rows of %d %s at %p (error "
                        "%d), which wants at most 2^32 rows, aligned to 16 bytes",
                        queue->label, (unsigned long long)rows, columns, mil_dtype_name(dtype),
                        base, (int)result);
    return MIL_OK;
}
