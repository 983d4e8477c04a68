#include "model/graphs.h"

#include <string.h>

#define LARGEST 512

static int32_t next_size(int32_t size)
{
    if (size < 8)
        return 2 * size;
    return size + (size < 128 ? 8 : size < 256 ? 16 : 32);
}

void mil_graphs_init(mil_graphs *graphs, int32_t max_seqs)
{
    memset(graphs, 0, sizeof *graphs);
    int32_t most = max_seqs < LARGEST ? max_seqs : LARGEST;
    for (int32_t size = 1; size < most; size = next_size(size))
        graphs->sizes[graphs->n_buckets++] = size;
    graphs->sizes[graphs->n_buckets++] = most;
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
