#include "base/file.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

_Static_assert(sizeof(off_t) == 8, "offsets into checkpoints need 64 bits");

static mil_status check_open(const mil_file *file, uint64_t expected_bytes)
{
    struct stat found;
    if (fstat(file->fd, &found) != 0)
        return mil_fail(MIL_ERR_FILE, "%s: fstat failed: %m", file->path);
    if (!S_ISREG(found.st_mode))
        return mil_fail(MIL_ERR_FILE, "%s: found mode %o, expected a regular file", file->path,
                        (unsigned)found.st_mode);
    if ((uint64_t)found.st_size != expected_bytes)
        return mil_fail(MIL_ERR_FILE,
                        "%s: found %lld bytes, expected %" PRIu64
                        " (its size when its header was read)",
                        file->path, (long long)found.st_size, expected_bytes);
    return MIL_OK;
}

mil_status mil_file_open(mil_file *file, const char *path, uint64_t expected_bytes)
{
    memset(file, 0, sizeof *file);
    /* O_NONBLOCK: opening a FIFO would wait for its writer. Regular files ignore it. */
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (fd < 0)
        return mil_fail(MIL_ERR_FILE, "%s: cannot be opened: %m", path);
    *file = (mil_file){.path = path, .n_bytes = expected_bytes, .fd = fd};
    mil_status status = check_open(file, expected_bytes);
    if (status != MIL_OK)
        mil_file_close(file);
    return status;
}

void mil_file_close(mil_file *file)
{
    if (file->path != NULL)
        (void)close(file->fd);
    memset(file, 0, sizeof *file);
}

static mil_status fail_shrunk(const mil_file *file)
{
    struct stat found;
    if (fstat(file->fd, &found) != 0)
        return mil_fail(MIL_ERR_FILE, "%s: fstat failed: %m", file->path);
    return mil_fail(MIL_ERR_FILE,
                    "%s: shrank while it was read: found %lld bytes, expected %" PRIu64, file->path,
                    (long long)found.st_size, file->n_bytes);
}

mil_status mil_file_read(const mil_file *file, void *out, uint64_t offset, size_t n_bytes)
{
    if (offset > file->n_bytes || n_bytes > file->n_bytes - offset)
        return mil_fail(MIL_ERR_FILE,
                        "%s: found %" PRIu64 " bytes, expected %zu more from %" PRIu64 " on",
                        file->path, file->n_bytes, n_bytes, offset);
    size_t done = 0;
    while (done < n_bytes) {
        ssize_t n = pread(file->fd, (char *)out + done, n_bytes - done, (off_t)(offset + done));
        if (n > 0)
            done += (size_t)n;
        else if (n == 0)
            return fail_shrunk(file);
        else if (errno != EINTR)
            return mil_fail(MIL_ERR_FILE, "%s: reading %zu bytes at %" PRIu64 " failed: %m",
                            file->path, n_bytes - done, offset + done);
    }
    return MIL_OK;
}
