#include "base/machine.h"

#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* ---- small files of /proc and /sys ---- */

#define PATH_BYTES 512

/* The first number of a file; false where there is none ("max" included). */
static bool read_number(const char *path, double *value)
{
    FILE *file = fopen(path, "re");
    if (file == NULL)
        return false;
    bool found = fscanf(file, "%lf", value) == 1;
    (void)fclose(file);
    return found;
}

/* The number after `key` at the start of a line. */
static bool read_keyed(const char *path, const char *key, double *value)
{
    FILE *file = fopen(path, "re");
    if (file == NULL)
        return false;
    char line[256];
    bool found = false;
    size_t length = strlen(key);
    while (!found && fgets(line, sizeof line, file) != NULL)
        found = strncmp(line, key, length) == 0 && sscanf(line + length, "%lf", value) == 1;
    (void)fclose(file);
    return found;
}

/* ---- control groups ---- */

typedef struct cgroup {
    char root[64];         /* where the controller's tree is mounted */
    char path[PATH_BYTES]; /* this process's group in it, "" for the root */
} cgroup;

static bool has_controller(const char *list, const char *controller)
{
    size_t length = strlen(controller);
    for (const char *at = list; at != NULL; at = strchr(at, ',')) {
        at += *at == ',';
        if (strncmp(at, controller, length) == 0 && (at[length] == ',' || at[length] == '\0'))
            return true;
    }
    return false;
}

/* This process's group for a controller: "" is version 2's single tree. False: none. */
static bool find_cgroup(cgroup *group, const char *controller)
{
    FILE *file = fopen("/proc/self/cgroup", "re");
    if (file == NULL)
        return false;
    char line[PATH_BYTES + 128];
    bool found = false;
    while (!found && fgets(line, sizeof line, file) != NULL) {
        line[strcspn(line, "\n")] = '\0';
        char *list = strchr(line, ':');
        char *path = list == NULL ? NULL : strchr(list + 1, ':');
        if (path == NULL)
            continue;
        *path++ = '\0';
        list++;
        found = controller[0] == '\0' ? list[0] == '\0' : has_controller(list, controller);
        if (found) {
            snprintf(group->root, sizeof group->root, "/sys/fs/cgroup%s%s",
                     list[0] == '\0' ? "" : "/", list[0] == '\0' ? "" : controller);
            snprintf(group->path, sizeof group->path, "%s", strcmp(path, "/") == 0 ? "" : path);
        }
    }
    (void)fclose(file);
    return found;
}

/* A limit holds for all groups below, so each level up to the root is asked. In a container the
 * path may name levels that are not mounted; those are passed over. */
typedef double (*level_fn)(const char *directory);

static double least_of_levels(const char *controller, level_fn level)
{
    cgroup group;
    double least = 0;
    if (!find_cgroup(&group, controller))
        return 0;
    for (;;) {
        char directory[sizeof group.root + PATH_BYTES];
        snprintf(directory, sizeof directory, "%s%s", group.root, group.path);
        double value = level(directory);
        if (value > 0 && (least == 0 || value < least))
            least = value;
        char *slash = strrchr(group.path, '/');
        if (slash == NULL)
            return least;
        *slash = '\0';
    }
}

static double least(double a, double b)
{
    if (a == 0 || b == 0)
        return a + b;
    return a < b ? a : b;
}

static bool read_in(const char *directory, const char *name, double *value)
{
    char path[2 * PATH_BYTES];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    return read_number(path, value);
}

static double quota_v2(const char *directory)
{
    char path[2 * PATH_BYTES];
    snprintf(path, sizeof path, "%s/cpu.max", directory);
    FILE *file = fopen(path, "re");
    if (file == NULL)
        return 0;
    double quota;
    double period;
    bool found = fscanf(file, "%lf %lf", &quota, &period) == 2 && period > 0;
    (void)fclose(file);
    return found ? quota / period : 0;
}

static double quota_v1(const char *directory)
{
    double quota;
    double period;
    if (!read_in(directory, "cpu.cfs_quota_us", &quota) ||
        !read_in(directory, "cpu.cfs_period_us", &period) || quota <= 0 || period <= 0)
        return 0;
    return quota / period;
}

double mil_cgroup_cpus(void)
{
    return least(least_of_levels("", quota_v2), least_of_levels("cpu", quota_v1));
}

static double limit_v2(const char *directory)
{
    double value;
    return read_in(directory, "memory.max", &value) ? value : 0;
}

static double limit_v1(const char *directory)
{
    double value;
    return read_in(directory, "memory.limit_in_bytes", &value) ? value : 0;
}

/* What a group may still take; 0 would mean "no limit", so a full group has one byte left. */
static double left_of(const char *directory, double limit, const char *usage_name,
                      const char *cache_key)
{
    char path[2 * PATH_BYTES];
    double usage;
    double cache = 0;
    snprintf(path, sizeof path, "%s/memory.stat", directory);
    if (limit == 0 || !read_in(directory, usage_name, &usage))
        return 0;
    (void)read_keyed(path, cache_key, &cache);
    double left = limit - usage + cache;
    return left > 1 ? left : 1;
}

static double left_v2(const char *directory)
{
    return left_of(directory, limit_v2(directory), "memory.current", "file ");
}

static double left_v1(const char *directory)
{
    return left_of(directory, limit_v1(directory), "memory.usage_in_bytes", "total_cache ");
}

uint64_t mil_memory_limit_bytes(void)
{
    double physical = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE);
    double limit = least(least_of_levels("", limit_v2), least_of_levels("memory", limit_v1));
    return (uint64_t)least(physical, limit);
}

uint64_t mil_memory_free_bytes(void)
{
    double available_kib = 0;
    (void)read_keyed("/proc/meminfo", "MemAvailable:", &available_kib);
    double left = least(least_of_levels("", left_v2), least_of_levels("memory", left_v1));
    return (uint64_t)least(available_kib * 1024, left);
}

/* ---- processors ---- */

static bool read_affinity(cpu_set_t *set)
{
    CPU_ZERO(set);
    return sched_getaffinity(0, sizeof *set, set) == 0 && CPU_COUNT(set) > 0;
}

int32_t mil_cpus_allowed(void)
{
    cpu_set_t set;
    if (read_affinity(&set))
        return CPU_COUNT(&set);
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online > 0 ? (int32_t)online : 1;
}

/* The first logical CPU of cpu's core: the core's name. */
static int32_t core_of(int32_t cpu)
{
    char path[PATH_BYTES];
    double first;
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
    return read_number(path, &first) ? (int32_t)first : cpu;
}

/* One CPU of each core of the mask. */
static int32_t one_per_core(const cpu_set_t *allowed, int32_t *cpus, int32_t max)
{
    cpu_set_t cores;
    CPU_ZERO(&cores);
    int32_t n = 0;
    for (int32_t cpu = 0; cpu < CPU_SETSIZE && n < max; cpu++) {
        if (!CPU_ISSET((size_t)cpu, allowed))
            continue;
        int32_t core = core_of(cpu);
        if (core < 0 || core >= CPU_SETSIZE || CPU_ISSET((size_t)core, &cores))
            continue;
        CPU_SET((size_t)core, &cores);
        cpus[n++] = cpu;
    }
    return n;
}

int32_t mil_cpus_usable(int32_t *cpus, int32_t max)
{
    cpu_set_t allowed;
    int32_t n = 0;
    if (read_affinity(&allowed))
        n = one_per_core(&allowed, cpus, max);
    if (n == 0) {
        cpus[0] = 0;
        return 1;
    }
    double quota = mil_cgroup_cpus();
    if (quota > 0 && quota < n) {
        int32_t whole = (int32_t)quota;
        n = whole + (quota > whole);
    }
    return n > 0 ? n : 1;
}
