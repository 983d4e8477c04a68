/* Names of devices: what LLM's and milpy.ops' both parse. */
#include "ops/device.h"

#include "test.h"

TEST(a_device_is_named_with_or_without_its_number)
{
    static const struct {
        const char *name;
        bool is_cuda;
        int32_t ordinal;
    } known[] = {{"cpu", false, 0},   {"cuda", true, 0},     {"cuda:0", true, 0},
                 {"cuda:9", true, 9}, {"cuda:10", true, 10}, {"cuda:2147483647", true, INT32_MAX}};
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        bool is_cuda;
        int32_t ordinal;
        CHECK(mil_device_parse(&is_cuda, &ordinal, known[i].name));
        CHECK_INT(is_cuda, known[i].is_cuda);
        CHECK_INT(ordinal, known[i].ordinal);
    }
}

/* "cuda:+1" and "cuda: 1" were the second GPU, "cpu:3" the CPU, "cuda:4294967297" a device. */
TEST(a_number_is_plain_and_the_cpu_has_none)
{
    static const char *const others[] = {"",
                                         "cpu:0",
                                         "cpu:3",
                                         "cp",
                                         "cpu ",
                                         "CUDA",
                                         "cudas",
                                         "cud",
                                         "cuda:",
                                         "cuda:+1",
                                         "cuda:-1",
                                         "cuda: 1",
                                         "cuda:1 ",
                                         "cuda:01",
                                         "cuda:00",
                                         "cuda:1.0",
                                         "cuda:x",
                                         "cuda:1:2",
                                         "cuda 1",
                                         " cuda",
                                         "cuda:0x1",
                                         "cuda:2147483648",
                                         "cuda:4294967297",
                                         "cuda:99999999999999999999999999"};
    for (size_t i = 0; i < sizeof others / sizeof others[0]; i++) {
        bool is_cuda;
        int32_t ordinal;
        if (mil_device_parse(&is_cuda, &ordinal, others[i]))
            printf("\"%s\" is taken\n", others[i]);
        CHECK(!mil_device_parse(&is_cuda, &ordinal, others[i]));
    }
}

TEST_MAIN()
