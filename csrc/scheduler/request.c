#include "scheduler/request.h"

#include "base/memory.h"

#include <string.h>

mil_status mil_request_create(mil_request **out, const mil_request_options *options,
                              int32_t max_new)
{
    size_t n_prompt = (size_t)options->n_tokens;
    size_t n_stop = (size_t)options->n_stop_tokens;
    /* One block: the request, then its prompt, then its stop tokens. */
    size_t n_bytes = sizeof(mil_request) + (n_prompt + n_stop) * sizeof(int32_t);
    void *block;
    MIL_TRY(mil_alloc_checked(&block, 1, n_bytes, "request"));
    mil_request *request = block;
    int32_t *prompt = (int32_t *)(request + 1);
    int32_t *stop = prompt + n_prompt;
    memcpy(prompt, options->tokens, n_prompt * sizeof *prompt);
    if (n_stop > 0)
        memcpy(stop, options->stop_tokens, n_stop * sizeof *stop);
    request->n_prompt = options->n_tokens;
    request->max_new = max_new;
    request->n_stop_tokens = options->n_stop_tokens;
    request->adapter = options->adapter;
    request->sampling = options->sampling;
    request->prompt = prompt;
    request->stop_tokens = stop;
    request->slot = -1;
    *out = request;
    return MIL_OK;
}

void mil_request_free(mil_request *request)
{
    mil_free(request);
}

bool mil_request_is_prefilling(const mil_request *request)
{
    return request->n_computed < request->n_prefill;
}

bool mil_request_is_stop(const mil_request *request, int32_t token)
{
    for (int32_t i = 0; i < request->n_stop_tokens; i++) {
        if (request->stop_tokens[i] == token)
            return true;
    }
    return false;
}

void mil_request_copy_tokens(const mil_request *request, int32_t *out, int32_t begin, int32_t n)
{
    int32_t of_prompt = request->n_prompt - begin;
    if (of_prompt > n)
        of_prompt = n;
    if (of_prompt > 0)
        memcpy(out, request->prompt + begin, (size_t)of_prompt * sizeof *out);
    else
        of_prompt = 0;
    if (of_prompt < n)
        memcpy(out + of_prompt, request->generated + (begin + of_prompt - request->n_prompt),
               (size_t)(n - of_prompt) * sizeof *out);
}

/* ---- list ---- */

void mil_request_list_push(mil_request_list *list, mil_request *request)
{
    request->prev = list->last;
    request->next = NULL;
    if (list->last != NULL)
        list->last->next = request;
    else
        list->first = request;
    list->last = request;
    list->n++;
}

void mil_request_list_remove(mil_request_list *list, mil_request *request)
{
    if (request->prev != NULL)
        request->prev->next = request->next;
    else
        list->first = request->next;
    if (request->next != NULL)
        request->next->prev = request->prev;
    else
        list->last = request->prev;
    request->prev = NULL;
    request->next = NULL;
    list->n--;
}

/* ---- index ---- */

/* Ids count up from 1, so their low bits spread evenly. */
static size_t bucket_of(uint64_t id)
{
    return (size_t)(id % MIL_REQUEST_BUCKETS);
}

void mil_request_index_add(mil_request_index *index, mil_request *request)
{
    mil_request **bucket = &index->buckets[bucket_of(request->id)];
    request->index_next = *bucket;
    *bucket = request;
}

void mil_request_index_remove(mil_request_index *index, mil_request *request)
{
    mil_request **link = &index->buckets[bucket_of(request->id)];
    while (*link != request)
        link = &(*link)->index_next;
    *link = request->index_next;
    request->index_next = NULL;
}

mil_request *mil_request_index_find(const mil_request_index *index, uint64_t id)
{
    mil_request *request = index->buckets[bucket_of(id)];
    while (request != NULL && request->id != id)
        request = request->index_next;
    return request;
}
