/* KV pages: which are free, and how many sequences hold each.
 *
 * Page 0 is never dealt out (health probes and padding may write there), so n_pages - 1 can be
 * taken. A page has a count of holders, so that sequences may share one. Fences are not kept here:
 * a slot of the scheduler gives its pages only when the last step that names it has retired. */
#pragma once

#include "base/status.h"

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct mil_blocks {
    int32_t n_pages;
    int32_t n_free;
    int32_t *free;      /* [n_pages - 1], a stack: the page given last is taken first */
    int32_t *n_holders; /* [n_pages] */
} mil_blocks;

/* n_pages >= 2. On failure *blocks is zeroed. */
mil_status mil_blocks_init(mil_blocks *blocks, int32_t n_pages) MIL_WARN_UNUSED;
void mil_blocks_deinit(mil_blocks *blocks);

/* Pages that can be taken when nobody holds any. */
int32_t mil_blocks_n_total(const mil_blocks *blocks);
/* A page, held once. Needs n_free > 0. Its old bytes are still in it. */
int32_t mil_blocks_take(mil_blocks *blocks);
/* Hold a page that is held already once more. */
void mil_blocks_share(mil_blocks *blocks, int32_t page);
/* Drop one hold; true when it was the last, so that the page is free now. */
bool mil_blocks_give(mil_blocks *blocks, int32_t page);

#ifdef __cplusplus
}
#endif
