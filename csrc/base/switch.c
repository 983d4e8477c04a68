#include "base/switch.h"

#include <stdlib.h>
#include <string.h>

mil_status mil_switch_read(bool *is_on, const char *name, bool otherwise)
{
    const char *value = getenv(name);
    bool is_set = value != NULL && value[0] != '\0';
    if (is_set && strcmp(value, "0") != 0 && strcmp(value, "1") != 0)
        return mil_fail(MIL_ERR_ARGUMENT, "%s is \"%s\", expected 0 or 1", name, value);
    *is_on = is_set ? value[0] == '1' : otherwise;
    return MIL_OK;
}
