#include "base/memory.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* The counters are the one exception to "no file-static mutable state": they are tests' instruments
 * and the core never reads them to decide anything but an injected failure. */
static atomic_uint_fast64_t n_calls;
static atomic_size_t held_bytes;
static atomic_uint_fast64_t fail_countdown;

/* Room for the size, so that mil_free can account for it, on a line of its own to keep alignment.
 */
#define HEADER_BYTES ((size_t)64)
#define HUGE_PAGE_BYTES ((size_t)2 << 20)
#define PAGE_BYTES ((size_t)4096)

bool mil_memory_refuses(void)
{
    atomic_fetch_add_explicit(&n_calls, 1, memory_order_relaxed);
    uint_fast64_t left = atomic_load_explicit(&fail_countdown, memory_order_relaxed);
    while (left != 0) {
        if (atomic_compare_exchange_weak_explicit(&fail_countdown, &left, left - 1,
                                                  memory_order_relaxed, memory_order_relaxed))
            return left == 1;
    }
    return false;
}

void *mil_alloc(size_t n, size_t item_bytes)
{
    size_t n_bytes;
    size_t total;
    if (mil_memory_refuses() || !mil_mul(n, item_bytes, &n_bytes) ||
        !mil_add(n_bytes, 2 * HEADER_BYTES - 1, &total))
        return NULL;
    total = total / HEADER_BYTES * HEADER_BYTES;
    char *block = aligned_alloc(HEADER_BYTES, total);
    if (block == NULL)
        return NULL;
    memset(block, 0, total);
    memcpy(block, &total, sizeof total);
    atomic_fetch_add_explicit(&held_bytes, total, memory_order_relaxed);
    return block + HEADER_BYTES;
}

void mil_free(void *memory)
{
    if (memory == NULL)
        return;
    char *block = (char *)memory - HEADER_BYTES;
    size_t total;
    memcpy(&total, block, sizeof total);
    atomic_fetch_sub_explicit(&held_bytes, total, memory_order_relaxed);
    free(block);
}

mil_status mil_alloc_checked(void **out, size_t n, size_t item_bytes, const char *what)
{
    void *memory = mil_alloc(n, item_bytes);
    if (memory == NULL)
        return mil_fail(MIL_ERR_MEMORY, "%s: no memory for %zu items of %zu bytes", what, n,
                        item_bytes);
    *out = memory;
    return MIL_OK;
}

mil_status mil_slab_init(mil_slab *slab, size_t n_bytes, const char *what)
{
    memset(slab, 0, sizeof *slab);
    size_t rounded;
    /* A small slab (an adapter of a small model, of thousands) is not worth a huge page. */
    size_t multiple = n_bytes < HUGE_PAGE_BYTES ? PAGE_BYTES : HUGE_PAGE_BYTES;
    if (!mil_add(n_bytes, multiple - 1, &rounded))
        return mil_fail(MIL_ERR_MEMORY, "%s: %zu bytes is more than an address space holds", what,
                        n_bytes);
    rounded = rounded / multiple * multiple;
    void *data = mil_memory_refuses() ? MAP_FAILED
                                      : mmap(NULL, rounded, PROT_READ | PROT_WRITE,
                                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data == MAP_FAILED)
        return mil_fail(MIL_ERR_MEMORY, "%s: the system refused %zu bytes", what, rounded);
    /* Advice only: where huge pages are off the slab works on small ones. */
    if (multiple == HUGE_PAGE_BYTES)
        (void)madvise(data, rounded, MADV_HUGEPAGE);
    slab->data = data;
    slab->n_bytes = rounded;
    atomic_fetch_add_explicit(&held_bytes, rounded, memory_order_relaxed);
    return MIL_OK;
}

void mil_slab_deinit(mil_slab *slab)
{
    if (slab->data != NULL) {
        (void)munmap(slab->data, slab->n_bytes);
        atomic_fetch_sub_explicit(&held_bytes, slab->n_bytes, memory_order_relaxed);
    }
    memset(slab, 0, sizeof *slab);
}

size_t mil_slab_untouched_bytes(const mil_slab *slab)
{
    unsigned char is_there[16384];
    const size_t window = sizeof is_there * PAGE_BYTES;
    size_t n_bytes = 0;
    for (size_t begin = 0; begin < slab->n_bytes; begin += window) {
        size_t left = slab->n_bytes - begin;
        size_t n_pages = (left < window ? left : window) / PAGE_BYTES;
        /* Where the system does not tell, all counts as touched. */
        if (mincore((char *)slab->data + begin, n_pages * PAGE_BYTES, is_there) != 0)
            return 0;
        for (size_t page = 0; page < n_pages; page++)
            n_bytes += (is_there[page] & 1) == 0 ? PAGE_BYTES : 0;
    }
    return n_bytes;
}

mil_memory_text mil_memory_show(uint64_t n_bytes)
{
    static const char *const units[] = {"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    mil_memory_text out;
    double value = (double)n_bytes / 1024;
    size_t unit = 0;
    /* 1023.995 would be shown as 1024.00. */
    while (value >= 1023.995 && unit < sizeof units / sizeof units[0] - 1) {
        value /= 1024;
        unit++;
    }
    if (n_bytes < 1024)
        (void)snprintf(out.text, sizeof out.text, "%d bytes", (int)n_bytes);
    else
        (void)snprintf(out.text, sizeof out.text, "%.2f %s", value, units[unit]);
    return out;
}

uint64_t mil_memory_calls(void)
{
    return atomic_load_explicit(&n_calls, memory_order_relaxed);
}

size_t mil_memory_held_bytes(void)
{
    return atomic_load_explicit(&held_bytes, memory_order_relaxed);
}

void mil_memory_fail_at(uint64_t k)
{
    atomic_store_explicit(&fail_countdown, k, memory_order_relaxed);
}
