/* Bare memory: each block is an allocation of its own and of exactly its size, and nothing has been
 * written to it. What leans on a guard or on a fill is then seen by what knows every allocation's
 * end and every byte's first write: compute-sanitizer, valgrind, ASan. */
#include "shim.h"

#include <stdlib.h>
#include <string.h>

#define ALIGN 64 /* as ops are promised */

/* cudart's, where CUDA is linked in: a device's alloc zeroes what it gives. They work on device 0
 * where the calling thread has chosen none, and the shim's queue is on that one. */
int cudaMalloc(void **out, size_t n_bytes) __attribute__((weak));
int cudaFree(void *data) __attribute__((weak));
int cudaGetLastError(void) __attribute__((weak));

mil_status shim_bare_take(bool is_host, mil_slab *slab, size_t n_bytes, const char *what)
{
    /* An empty array is not NULL. */
    size_t n_taken = n_bytes > 0 ? n_bytes : 1;
    void *data = NULL;
    int error = is_host ? posix_memalign(&data, ALIGN, n_taken) : cudaMalloc(&data, n_taken);
    memset(slab, 0, sizeof *slab);
    if (error == 0) {
        *slab = (mil_slab){data, n_taken};
        return MIL_OK;
    }
    if (!is_host)
        (void)cudaGetLastError(); /* or the next launch would find it */
    return mil_fail(MIL_ERR_MEMORY, "shim: %s: %s refused %zu bytes (error %d)", what,
                    is_host ? "the host" : "cuda", n_taken, error);
}

void shim_bare_give(bool is_host, mil_slab *slab)
{
    if (is_host)
        free(slab->data);
    else if (slab->data != NULL && cudaFree(slab->data) != 0) /* after a fault every call fails */
        (void)cudaGetLastError();
    memset(slab, 0, sizeof *slab);
}
