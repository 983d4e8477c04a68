/* Status codes and the one error idiom of milpy's C core.
 *
 * A function that can fail returns mil_status. The message is written once, where the facts are,
 * into a per-thread buffer (as libgit2's giterr_last does); callers propagate with MIL_TRY. A
 * worker thread that fails copies its message into the job it failed. */
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

typedef enum mil_status {
    MIL_OK = 0,
    MIL_ERR_ARGUMENT,    /* a value from the caller is out of its range */
    MIL_ERR_SHAPE,       /* a shape or dtype differs from what is needed */
    MIL_ERR_FILE,        /* a file is missing, truncated or not what its header says */
    MIL_ERR_MEMORY,      /* an allocation failed, or a budget is too small */
    MIL_ERR_UNSUPPORTED, /* valid input that this build or backend does not honour */
    MIL_ERR_NOT_FOUND,   /* an unknown name, request, sequence or adapter */
    MIL_ERR_BUSY,        /* in use: the caller may try again later */
    MIL_ERR_CLOSED,      /* the engine was closed, or is dead */
    MIL_ERR_DEVICE,      /* the device or the operating system failed */
    MIL_ERR_NUMERICS,    /* a result is not finite where it must be */
    MIL_ERR_INTERNAL,    /* a broken invariant of our own */
} mil_status;

#define MIL_WARN_UNUSED __attribute__((warn_unused_result))

/* Write the message of this thread and return code. Text is cut at 1,023 bytes. */
mil_status mil_fail(mil_status code, const char *format, ...)
    __attribute__((format(printf, 2, 3), cold));

/* The message of the last mil_fail on this thread; "" if there was none. Valid until the next one.
 */
const char *mil_status_message(void);

/* "MIL_ERR_SHAPE" and so on; never NULL. */
const char *mil_status_name(mil_status status);

#define MIL_TRY(expr)                                                                              \
    do {                                                                                           \
        mil_status mil_try_status = (expr);                                                        \
        if (mil_try_status != MIL_OK)                                                              \
            return mil_try_status;                                                                 \
    } while (0)

/* For functions with something to release: needs a `mil_status status` and the label in scope. */
#define MIL_TRY_GOTO(expr, label)                                                                  \
    do {                                                                                           \
        status = (expr);                                                                           \
        if (status != MIL_OK)                                                                      \
            goto label;                                                                            \
    } while (0)

#ifdef __cplusplus
}
#endif
