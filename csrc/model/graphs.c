#include "model/graphs.h"

#include <string.h>

/* From 64 on eight sizes to a doubling, so that padding is a ninth of a step at most; four where
 * there would be too many to capture. */
static int32_t next_size(int32_t size)
{
    int32_t power = 8;
    if (size < power)
        return 2 * size;
    while (power <= size / 2)
        power *= 2;
    int32_t step = power / (power < 2048 ? 8 : 4);
    return size + (step > 8 ? step : 8);
}

void mil_graphs_init(mil_graphs *graphs, int32_t max_seqs)
{
    memset(graphs, 0, sizeof *graphs);
    for (int32_t size = 1; size < max_seqs; size = next_size(size))
        graphs->sizes[graphs->n_buckets++] = size;
    graphs->sizes[graphs->n_buckets++] = max_seqs;
}

void mil_graphs_deinit(mil_graphs *graphs, const mil_device *device, struct mil_queue *queue)
{
    for (int32_t i = 0; i < graphs->n_buckets && device->graph_free != NULL; i++) {
        device->graph_free(queue, graphs->forward[i][0]);
        device->graph_free(queue, graphs->forward[i][1]);
        device->graph_free(queue, graphs->choice[i]);
    }
    memset(graphs, 0, sizeof *graphs);
}

int32_t mil_graphs_find(const mil_graphs *graphs, int32_t n)
{
    for (int32_t i = 0; i < graphs->n_buckets; i++)
        if (n <= graphs->sizes[i])
            return i;
    return -1;
}
