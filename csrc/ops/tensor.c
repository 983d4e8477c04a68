#include "ops/tensor.h"

size_t mil_dtype_bytes(mil_dtype dtype)
{
    return dtype == MIL_DTYPE_BF16 || dtype == MIL_DTYPE_F16 ? 2 : 4;
}

const char *mil_dtype_name(mil_dtype dtype)
{
    switch (dtype) {
    case MIL_DTYPE_F32:
        return "float32";
    case MIL_DTYPE_BF16:
        return "bfloat16";
    case MIL_DTYPE_F16:
        return "float16";
    case MIL_DTYPE_I32:
        return "int32";
    }
    return "unknown";
}

const char *mil_projection_name(mil_projection projection)
{
    static const char *const names[MIL_N_PROJECTIONS] = {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"};
    return projection >= 0 && projection < MIL_N_PROJECTIONS ? names[projection] : "unknown";
}
