/* The dimension letters of the whole core, and the few numbers that shapes share.
 *
 *   T tokens in the batch     S sequences      H hidden size      N query heads   K kv heads
 *   D head dim                F ffn width      V vocabulary       P page rows     L layers
 *   R LoRA rank               G LoRA segments
 *
 * In linear.c and weight.h, N and K are also the rows and columns of one weight, M its input rows,
 * as the field writes GEMM. Residual stream, LoRA's v and logits are float32; activations that
 * enter a product, K and V are bfloat16; what a product hands to the next op is of the backend's
 * product_dtype. docs/numerics.md lists every rounding. */
#pragma once

#include "milpy.h"

#define MIL_ALIGN ((size_t)64) /* of every buffer that a backend is given */
