#include "base/status.h"

#include <stdarg.h>
#include <stdio.h>

static _Thread_local char message[1024];

mil_status mil_fail(mil_status code, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    (void)vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    return code;
}

const char *mil_status_message(void)
{
    return message;
}

const char *mil_status_name(mil_status status)
{
    switch (status) {
    case MIL_OK:
        return "MIL_OK";
    case MIL_ERR_ARGUMENT:
        return "MIL_ERR_ARGUMENT";
    case MIL_ERR_SHAPE:
        return "MIL_ERR_SHAPE";
    case MIL_ERR_FILE:
        return "MIL_ERR_FILE";
    case MIL_ERR_MEMORY:
        return "MIL_ERR_MEMORY";
    case MIL_ERR_UNSUPPORTED:
        return "MIL_ERR_UNSUPPORTED";
    case MIL_ERR_NOT_FOUND:
        return "MIL_ERR_NOT_FOUND";
    case MIL_ERR_BUSY:
        return "MIL_ERR_BUSY";
    case MIL_ERR_CLOSED:
        return "MIL_ERR_CLOSED";
    case MIL_ERR_DEVICE:
        return "MIL_ERR_DEVICE";
    case MIL_ERR_NUMERICS:
        return "MIL_ERR_NUMERICS";
    case MIL_ERR_INTERNAL:
        return "MIL_ERR_INTERNAL";
    }
    return "MIL_ERR_UNKNOWN";
}
