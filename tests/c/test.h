/* The whole C test harness: four macros and their runner. A test file is TEST(...) bodies and one
 * TEST_MAIN() at its end; tests register themselves in file order, so none can be forgotten. */
#pragma once

#include <setjmp.h>
#include <stdio.h>
#include <string.h>

typedef struct test_case {
    const char *name;
    void (*body)(void);
    struct test_case *next;
} test_case;

static test_case *test_first, **test_tail = &test_first;
static jmp_buf test_abandon;

static inline void test_register(test_case *test)
{
    *test_tail = test;
    test_tail = &test->next;
}

/* Define a test. Its name states the behaviour: TEST(shared_block_survives_first_owner) { ... } */
#define TEST(id)                                                                                   \
    static void id(void);                                                                          \
    __attribute__((constructor)) static void test_register_##id(void)                              \
    {                                                                                              \
        static test_case test = {#id, id, NULL};                                                   \
        test_register(&test);                                                                      \
    }                                                                                              \
    static void id(void)

/* Fail the running test here unless cond holds. Good in helpers too, on the test's own thread. */
#define CHECK(cond)                                                                                \
    do {                                                                                           \
        if (!(cond)) {                                                                             \
            printf("%s:%d: %s is false\n", __FILE__, __LINE__, #cond);                             \
            longjmp(test_abandon, 1);                                                              \
        }                                                                                          \
    } while (0)

/* Fail the running test here unless two integers are equal; both are printed. */
#define CHECK_INT(found, expected)                                                                 \
    do {                                                                                           \
        long long found_ = (long long)(found), expected_ = (long long)(expected);                  \
        if (found_ != expected_) {                                                                 \
            printf("%s:%d: %s is %lld, expected %lld\n", __FILE__, __LINE__, #found, found_,       \
                   expected_);                                                                     \
            longjmp(test_abandon, 1);                                                              \
        }                                                                                          \
    } while (0)

/* Run one test: 1 when it passed. */
static inline int test_run(const test_case *test)
{
    if (setjmp(test_abandon) != 0) {
        printf("FAILED %s\n", test->name);
        return 0;
    }
    test->body();
    return 1;
}

/* main: every test, or the one named on the command line. The last line is the count. */
#define TEST_MAIN()                                                                                \
    int main(int argc, char **argv)                                                                \
    {                                                                                              \
        int passed = 0, failed = 0;                                                                \
        for (const test_case *test = test_first; test != NULL; test = test->next) {                \
            if (argc > 1 && strcmp(argv[1], test->name) != 0)                                      \
                continue;                                                                          \
            if (test_run(test))                                                                    \
                passed++;                                                                          \
            else                                                                                   \
                failed++;                                                                          \
        }                                                                                          \
        printf("%d passed, %d failed\n", passed, failed);                                          \
        return failed != 0 || passed == 0;                                                         \
    }
