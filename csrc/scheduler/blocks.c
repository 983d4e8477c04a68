#include "scheduler/blocks.h"

#include "base/memory.h"

#include <assert.h>
#include <string.h>

mil_status mil_blocks_init(mil_blocks *blocks, int32_t n_pages)
{
    assert(n_pages >= 2);
    memset(blocks, 0, sizeof *blocks);
    blocks->n_pages = n_pages;
    blocks->free = mil_alloc((size_t)n_pages - 1, sizeof *blocks->free);
    blocks->n_holders = mil_alloc((size_t)n_pages, sizeof *blocks->n_holders);
    if (blocks->free == NULL || blocks->n_holders == NULL) {
        mil_blocks_deinit(blocks);
        return mil_fail(MIL_ERR_MEMORY, "blocks: no memory for the lists of %d pages", n_pages);
    }
    while (blocks->n_free < n_pages - 1) {
        blocks->free[blocks->n_free] = n_pages - 1 - blocks->n_free;
        blocks->n_free++;
    }
    return MIL_OK;
}

void mil_blocks_deinit(mil_blocks *blocks)
{
    mil_free(blocks->free);
    mil_free(blocks->n_holders);
    memset(blocks, 0, sizeof *blocks);
}

int32_t mil_blocks_n_total(const mil_blocks *blocks)
{
    return blocks->n_pages - 1;
}

int32_t mil_blocks_take(mil_blocks *blocks)
{
    assert(blocks->n_free > 0);
    int32_t page = blocks->free[--blocks->n_free];
    assert(blocks->n_holders[page] == 0);
    blocks->n_holders[page] = 1;
    return page;
}

void mil_blocks_share(mil_blocks *blocks, int32_t page)
{
    assert(page > 0 && page < blocks->n_pages && blocks->n_holders[page] > 0);
    blocks->n_holders[page]++;
}

bool mil_blocks_give(mil_blocks *blocks, int32_t page)
{
    assert(page > 0 && page < blocks->n_pages && blocks->n_holders[page] > 0);
    if (--blocks->n_holders[page] > 0)
        return false;
    blocks->free[blocks->n_free++] = page;
    return true;
}
