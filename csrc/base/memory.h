/* Host memory: small objects from the heap, big slabs from mmap with huge pages.
 *
 * Every allocation of the core goes through here, so that tests can fail the k-th one and count
 * allocator calls over steps. Sizes are computed by the checked helpers below. */
#pragma once

#include "base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Zeroed memory for n items of item_bytes, alignment 64; NULL (and no message) when there is none
 * or the product overflows. Caller frees with mil_free. n * item_bytes == 0 gives a valid pointer.
 */
void *mil_alloc(size_t n, size_t item_bytes);
/* Free what mil_alloc gave; NULL is fine. */
void mil_free(void *memory);

/* As mil_alloc, as a status: *out is set on MIL_OK only. what names the object in the message. */
mil_status mil_alloc_checked(void **out, size_t n, size_t item_bytes, const char *what)
    MIL_WARN_UNUSED;

/* One big block. Pages come zeroed from the kernel; huge pages are asked for, not required. */
typedef struct mil_slab {
    void *data;
    size_t n_bytes;
} mil_slab;

/* Take n_bytes (> 0) from the kernel. On failure *slab is zeroed; the message gives what and bytes.
 */
mil_status mil_slab_init(mil_slab *slab, size_t n_bytes, const char *what) MIL_WARN_UNUSED;
/* Give the block back and zero the struct; a zeroed struct is fine. */
void mil_slab_deinit(mil_slab *slab);
/* Bytes of the block that nothing has touched yet: promised to it, and still free in the system. */
size_t mil_slab_untouched_bytes(const mil_slab *slab);

/* n_bytes for people, "640 bytes", "1.50 MiB": good to the end of the full expression it is in. */
typedef struct mil_memory_text {
    char text[32];
} mil_memory_text;

mil_memory_text mil_memory_show(uint64_t n_bytes);

/* *out = a * b or a + b; false on overflow, *out untouched then. */
static inline bool mil_mul(size_t a, size_t b, size_t *out)
{
    size_t product;
    if (__builtin_mul_overflow(a, b, &product))
        return false;
    *out = product;
    return true;
}

static inline bool mil_add(size_t a, size_t b, size_t *out)
{
    size_t sum;
    if (__builtin_add_overflow(a, b, &sum))
        return false;
    *out = sum;
    return true;
}

static inline size_t mil_round_up(size_t value, size_t multiple)
{
    return (value + multiple - 1) / multiple * multiple;
}

/* ---- for tests ---- */

/* Calls of mil_alloc, mil_slab_init and a device's allocators since the process began, all threads.
 */
uint64_t mil_memory_calls(void);
/* For allocators of a device's memory: counts a call; true where mil_memory_fail_at wants it to
 * fail. */
bool mil_memory_refuses(void);
/* Bytes now held through mil_alloc and mil_slab_init. */
size_t mil_memory_held_bytes(void);
/* Make the k-th allocation from now fail (1 = the next), once; 0 turns it off. All threads count.
 */
void mil_memory_fail_at(uint64_t k);

#ifdef __cplusplus
}
#endif
