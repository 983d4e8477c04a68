/* Where NVIDIA's shared libraries are. Opens them; knows no symbol of theirs. */
#include "kernels/library.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PATH_BYTES 1024
#define MAX_DIRS 16
#ifdef __aarch64__
#define TARGET_LIB "targets/sbsa-linux/lib"
#else
#define TARGET_LIB "targets/x86_64-linux/lib"
#endif

/* Where a toolkit's libraries are, as tools/find_cuda.sh accepts them: NVIDIA's installer's place,
 * then those of a toolkit without it (conda's, one made of wheels). */
static const char *const layouts[] = {"lib64", "lib", TARGET_LIB};
#define LAYOUTS "{lib64,lib," TARGET_LIB "}"

/* The process's, as the system's own search path is. */
static struct {
    pthread_mutex_t lock;
    int32_t n;
    char text[MAX_DIRS][PATH_BYTES];
} added = {.lock = PTHREAD_MUTEX_INITIALIZER};

void mil_cuda_add_library_dir(const char *dir)
{
    if (dir == NULL || dir[0] == '\0' || strlen(dir) >= PATH_BYTES)
        return;
    (void)pthread_mutex_lock(&added.lock);
    bool is_there = false;
    for (int32_t i = 0; i < added.n; i++)
        is_there = is_there || strcmp(added.text[i], dir) == 0;
    if (!is_there && added.n < MAX_DIRS)
        memcpy(added.text[added.n++], dir, strlen(dir) + 1);
    (void)pthread_mutex_unlock(&added.lock);
}

/* Sized so that a message (1,023 bytes) holds both. */
typedef struct mil_search {
    char tried[500];   /* directories */
    char reasons[420]; /* why files that are there did not load */
} mil_search;

/* dlopen; notes why a file that is there did not load. */
static void *try_file(mil_search *search, const char *path)
{
    void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    const char *reason = handle == NULL ? dlerror() : NULL;
    size_t used = strlen(search->reasons);
    if (reason == NULL)
        return handle;
    /* Of a bare name that is nowhere the loader says no more than that. */
    size_t n = strlen(path);
    bool is_absent = strchr(path, '/') == NULL && strncmp(reason, path, n) == 0 && reason[n] == ':';
    if (!is_absent)
        (void)snprintf(search->reasons + used, sizeof search->reasons - used, "; %s", reason);
    return NULL;
}

static void note_place(mil_search *search, const char *dir, const char *below)
{
    size_t used = strlen(search->tried);
    (void)snprintf(search->tried + used, sizeof search->tried - used, ", %s%s", dir, below);
}

static void *try_dir(mil_search *search, const char *dir, const char *name, bool is_first)
{
    char path[2 * PATH_BYTES];
    if (is_first)
        note_place(search, dir, "");
    (void)snprintf(path, sizeof path, "%s/%s", dir, name);
    return access(path, F_OK) == 0 ? try_file(search, path) : NULL;
}

/* The first file that is there: the folders are links to one another as a rule, and a reason need
 * not be told three times. */
static void *try_toolkit(mil_search *search, const char *root, const char *name, bool is_first)
{
    char path[2 * PATH_BYTES];
    if (is_first)
        note_place(search, root, "/" LAYOUTS);
    for (size_t i = 0; i < sizeof layouts / sizeof layouts[0]; i++) {
        (void)snprintf(path, sizeof path, "%s/%s/%s", root, layouts[i], name);
        if (access(path, F_OK) == 0)
            return try_file(search, path);
    }
    return NULL;
}

static void *try_name(mil_search *search, const char *name, bool is_first)
{
    const char *home = getenv("CUDA_HOME");
    void *handle = try_file(search, name);
    if (handle == NULL && home != NULL && home[0] != '\0')
        handle = try_toolkit(search, home, name, is_first);
    if (handle == NULL)
        handle = try_toolkit(search, "/usr/local/cuda", name, is_first);
    for (int32_t i = 0; handle == NULL && i < added.n; i++)
        handle = try_dir(search, added.text[i], name, is_first);
    return handle;
}

static mil_status open_named(void **out, const char *variable, const char *path)
{
    *out = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    return *out != NULL
               ? MIL_OK
               : mil_fail(MIL_ERR_DEVICE, "cuda: %s is \"%s\": %s", variable, path, dlerror());
}

mil_status mil_cuda_library_open(void **out, const char *variable, const char *const *names)
{
    const char *path = getenv(variable);
    mil_search search = {.tried = "the system's places"};
    void *handle = NULL;
    if (path != NULL && path[0] != '\0')
        return open_named(out, variable, path);
    (void)pthread_mutex_lock(&added.lock);
    for (int32_t i = 0; handle == NULL && names[i] != NULL; i++)
        handle = try_name(&search, names[i], i == 0);
    (void)pthread_mutex_unlock(&added.lock);
    *out = handle;
    return handle != NULL
               ? MIL_OK
               : mil_fail(MIL_ERR_DEVICE, "cuda: found no %s%s%s; tried %s%s", names[0],
                          names[1] != NULL ? " or " : "", names[1] != NULL ? names[1] : "",
                          search.tried, search.reasons);
}
