#include "base/switch.h"
#include "test.h"

#include <stdlib.h>

#define NAME "MILPY_TEST_SWITCH"

TEST(a_switch_is_0_or_1_and_else_what_it_is_without_one)
{
    for (int otherwise = 0; otherwise < 2; otherwise++) {
        bool is_on = !otherwise;
        (void)unsetenv(NAME);
        CHECK_INT(mil_switch_read(&is_on, NAME, otherwise), MIL_OK);
        CHECK_INT(is_on, otherwise);
        is_on = !otherwise;
        CHECK_INT(setenv(NAME, "", 1), 0);
        CHECK_INT(mil_switch_read(&is_on, NAME, otherwise), MIL_OK);
        CHECK_INT(is_on, otherwise);
        for (int value = 0; value < 2; value++) {
            CHECK_INT(setenv(NAME, value ? "1" : "0", 1), 0);
            CHECK_INT(mil_switch_read(&is_on, NAME, otherwise), MIL_OK);
            CHECK_INT(is_on, value);
        }
    }
    (void)unsetenv(NAME);
}

TEST(a_switch_of_another_value_is_refused_with_its_name)
{
    static const char *const others[] = {"on", "yes", "true", "2", "01", "10", " 1", "1 ", "-"};
    for (size_t i = 0; i < sizeof others / sizeof others[0]; i++) {
        char expected[64];
        bool is_on = true;
        CHECK_INT(setenv(NAME, others[i], 1), 0);
        CHECK_INT(mil_switch_read(&is_on, NAME, false), MIL_ERR_ARGUMENT);
        (void)snprintf(expected, sizeof expected, NAME " is \"%s\", expected 0 or 1", others[i]);
        CHECK(strcmp(mil_status_message(), expected) == 0);
        CHECK(is_on);
    }
    (void)unsetenv(NAME);
}

TEST_MAIN()
