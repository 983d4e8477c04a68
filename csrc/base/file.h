/* A regular file, opened once and read by position. Never mapped, so that a file that shrinks under
 * us is an error and not a signal. */
#pragma once

#include "base/status.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct mil_file {
    const char *path; /* borrowed; NULL: closed */
    uint64_t n_bytes;
    int fd;
} mil_file;

/* Open path for reading; it must be a regular file of expected_bytes. Keeps the pointer to path. On
 * failure *file is zeroed (closed). */
mil_status mil_file_open(mil_file *file, const char *path, uint64_t expected_bytes) MIL_WARN_UNUSED;
/* Zeroes the struct; a closed one is fine. */
void mil_file_close(mil_file *file);
/* Exactly n_bytes from offset on; MIL_ERR_FILE where the file ends before. Thread-safe. */
mil_status mil_file_read(const mil_file *file, void *out, uint64_t offset, size_t n_bytes)
    MIL_WARN_UNUSED;

#ifdef __cplusplus
}
#endif
