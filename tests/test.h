/*
 * The test harness: one header, no library.
 *
 * A test file includes it FIRST. It defines a CUBE_MALLOC that counts, and
 * then includes ../cube.c, so that a test reaches every static function:
 *
 *     #include "test.h"
 *
 *     TEST(commit_survives_torn_root)
 *     {
 *         static const struct { const char *in; int want; } rows[] = ...;
 *         for (size_t i = 0; i < COUNT(rows); i++) {
 *             test_row("input %s", rows[i].in);
 *             CHECK_INT(parse(rows[i].in), rows[i].want);
 *         }
 *     }
 *
 * There is no list of tests and no main to write: TEST registers itself.
 * Define TEST_WITHOUT_CUBE before the include for a test that wants cube.h
 * alone, or nothing of Cube.
 *
 *     CHECK(cond)              CHECK_INT(got, want)   CHECK_UINT(got, want)
 *     CHECK_STR(got, want)     CHECK_MEM(got, want, size)
 *     CHECK_HAS(text, part)    FAIL("words %d", n)
 *     REQUIRE(cond)            like CHECK, but leaves the test at once
 *     SKIP("why")              leaves the test, which counts as skipped
 *
 * A failed CHECK is printed with its place and values, and the test goes
 * on. Around each test the harness counts open descriptors and live blocks
 * of memory: a test that leaves one more than it found has failed.
 *
 * Each test starts its random numbers anew from the seed (TEST_SEED, fixed
 * by default), so that it behaves the same alone as among the others:
 * test_random(), test_below(n). test_dir() is an empty directory of the
 * running test, removed after it.
 *
 *     build/tests/t04_store               all tests
 *     build/tests/t04_store NAME...       these tests
 *     build/tests/t04_store -l            the list
 *
 * TEST_TIMEOUT is the number of seconds that one test may take (120).
 */
#ifndef CUBE_TEST_H
#define CUBE_TEST_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dirent.h>
#include <ftw.h>
#include <malloc.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define TEST_UNUSED __attribute__((unused))
#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

/* ---- Memory that counts ---- */

/* Live blocks and bytes; atomic, since the World has a helper thread. */
static long test_heap_blocks;
static long test_heap_bytes;
static long test_heap_peak;   /* largest value of bytes since the test began */

static void test_heap_count(void *ptr, int sign)
{
    long size = ptr ? (long)malloc_usable_size(ptr) : 0;
    long now = __atomic_add_fetch(&test_heap_bytes, sign * size,
                                  __ATOMIC_RELAXED);

    if (ptr)
        __atomic_add_fetch(&test_heap_blocks, sign, __ATOMIC_RELAXED);
    if (now > __atomic_load_n(&test_heap_peak, __ATOMIC_RELAXED))
        __atomic_store_n(&test_heap_peak, now, __ATOMIC_RELAXED);
}

static TEST_UNUSED void *test_malloc(size_t size)
{
    void *ptr = malloc(size);

    test_heap_count(ptr, 1);
    return ptr;
}

static TEST_UNUSED void test_free(void *ptr)
{
    test_heap_count(ptr, -1);
    free(ptr);
}

static TEST_UNUSED void *test_realloc(void *ptr, size_t size)
{
    void *fresh;

    test_heap_count(ptr, -1);
    fresh = realloc(ptr, size);
    test_heap_count(fresh, 1);
    return fresh;
}

#if !defined(TEST_WITHOUT_CUBE) && !defined(CUBE_C)
#define CUBE_MALLOC(size) test_malloc(size)
#define CUBE_REALLOC(ptr, size) test_realloc(ptr, size)
#define CUBE_FREE(ptr) test_free(ptr)
#include "../cube.c"
#endif

/* ---- The list of tests and the state of the running one ---- */

struct test_case {
    const char *name;
    void (*run)(void);
    struct test_case *next;
};

static struct test_case *test_first;
static struct test_case **test_last = &test_first;

static struct {
    const char *program;
    const char *name;      /* the running test */
    char row[256];         /* the running row of its table, "" for none */
    char dir[256];         /* its directory, "" until it asks for one */
    int faults;            /* failed checks of this test */
    bool skipped;
    uint64_t seed;
    uint64_t random;
    jmp_buf leave;
} test_now;

static TEST_UNUSED void test_register(struct test_case *one)
{
    *test_last = one;
    test_last = &one->next;
}

#define TEST(sentence)                                                      \
    static void sentence(void);                                             \
    __attribute__((constructor)) static void test_add_##sentence(void)      \
    {                                                                       \
        static struct test_case one = { #sentence, sentence, NULL };        \
        test_register(&one);                                                \
    }                                                                       \
    static void sentence(void)

/* ---- Checks ---- */

#define TEST_FAULTS_SHOWN 10

/* Counts a failed check and prints it, unless there were too many. */
__attribute__((format(printf, 3, 4)))
static void test_fault(const char *file, int line, const char *format, ...)
{
    va_list args;

    if (++test_now.faults > TEST_FAULTS_SHOWN)
        return;
    if (test_now.faults == 1)
        printf("FAILED %s\n", test_now.name);
    printf("  %s:%d: ", file, line);
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    printf("%s%s%s\n", test_now.row[0] ? " (" : "", test_now.row,
           test_now.row[0] ? ")" : "");
    if (test_now.faults == TEST_FAULTS_SHOWN)
        printf("  (more failed checks of this test are not shown)\n");
    fflush(stdout);
}

/* Prints at most 200 bytes with what is not printable escaped. */
static const char *test_show(char out[1024], const void *data, size_t size)
{
    const unsigned char *p = data;
    size_t at = 0;

    if (!data)
        return "NULL";
    for (size_t i = 0; i < size && i < 200; i++)
        if (p[i] >= 32 && p[i] < 127 && p[i] != '\\')
            out[at++] = (char)p[i];
        else
            at += (size_t)snprintf(out + at, 5, "\\x%02x", p[i]);
    snprintf(out + at, 4, "%s", size > 200 ? "..." : "");
    return out;
}

static TEST_UNUSED void test_bytes(const char *file, int line,
                                   const char *what,
                                   const void *got, size_t got_size,
                                   const void *want, size_t want_size)
{
    char a[1024], b[1024];

    if (got && want && got_size == want_size &&
        (want_size == 0 || memcmp(got, want, want_size) == 0))
        return;
    if (!got && !want)
        return;
    test_fault(file, line, "%s is \"%s\", not \"%s\"", what,
               test_show(a, got, got_size), test_show(b, want, want_size));
}

static TEST_UNUSED void test_str(const char *file, int line, const char *what,
                                 const char *got, const char *want)
{
    test_bytes(file, line, what, got, got ? strlen(got) : 0,
               want, want ? strlen(want) : 0);
}

static TEST_UNUSED void test_has(const char *file, int line, const char *what,
                                 const char *got, const char *part)
{
    char a[1024];

    if (!got || !strstr(got, part))
        test_fault(file, line, "%s is \"%s\", without \"%s\"", what,
                   test_show(a, got, got ? strlen(got) : 0), part);
}

static TEST_UNUSED void test_int(const char *file, int line, const char *what,
                                 long long got, long long want)
{
    if (got != want)
        test_fault(file, line, "%s is %lld, not %lld", what, got, want);
}

static TEST_UNUSED void test_uint(const char *file, int line,
                                  const char *what, unsigned long long got,
                                  unsigned long long want)
{
    if (got != want)
        test_fault(file, line, "%s is %llu, not %llu", what, got, want);
}

#define CHECK(cond)                                                         \
    ((cond) ? (void)0 : test_fault(__FILE__, __LINE__, "not so: %s", #cond))
#define CHECK_INT(got, want)                                                \
    test_int(__FILE__, __LINE__, #got, (long long)(got), (long long)(want))
#define CHECK_UINT(got, want)                                               \
    test_uint(__FILE__, __LINE__, #got, (unsigned long long)(got),          \
              (unsigned long long)(want))
#define CHECK_STR(got, want) test_str(__FILE__, __LINE__, #got, got, want)
#define CHECK_HAS(text, part) test_has(__FILE__, __LINE__, #text, text, part)
#define CHECK_MEM(got, want, size)                                          \
    test_bytes(__FILE__, __LINE__, #got, got, size, want, size)
#define FAIL(...) test_fault(__FILE__, __LINE__, __VA_ARGS__)
#define REQUIRE(cond)                                                       \
    ((cond) ? (void)0                                                       \
            : (test_fault(__FILE__, __LINE__, "not so: %s", #cond),         \
               longjmp(test_now.leave, 1)))
#define SKIP(why) test_skip(why)

/* Leaves the running test. What it had opened must be closed before. */
__attribute__((noreturn))
static TEST_UNUSED void test_skip(const char *why)
{
    printf("SKIPPED %s: %s\n", test_now.name, why);
    test_now.skipped = true;
    longjmp(test_now.leave, 1);
}

/* Names the row of a table that is being checked; printed on failure. */
__attribute__((format(printf, 1, 2)))
static TEST_UNUSED void test_row(const char *format, ...)
{
    va_list args;

    va_start(args, format);
    vsnprintf(test_now.row, sizeof(test_now.row), format, args);
    va_end(args);
}

/* ---- Random numbers (splitmix64, Steele et al. 2014) ---- */

static TEST_UNUSED uint64_t test_random(void)
{
    uint64_t z = (test_now.random += 0x9e3779b97f4a7c15u);

    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* 0 to limit - 1; slightly biased, which no test minds. */
static TEST_UNUSED uint32_t test_below(uint32_t limit)
{
    return (uint32_t)((test_random() >> 32) * limit >> 32);
}

/* ---- Descriptors and directories ---- */

static int test_descriptors(void)
{
    DIR *dir = opendir("/proc/self/fd");
    int count = 0;

    if (!dir)
        return 0;
    while (readdir(dir))
        count++;
    closedir(dir);
    return count;
}

/* For a failure: what each open descriptor is. */
static void test_list_descriptors(void)
{
    char path[64], target[256];

    for (int fd = 3; fd < 256; fd++) {
        snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
        ssize_t size = readlink(path, target, sizeof(target) - 1);
        if (size > 0)
            printf("    open: %d %.*s\n", fd, (int)size, target);
    }
}

/* The running test's own directory; removed with what is in it. */
static TEST_UNUSED const char *test_dir(void)
{
    const char *base = getenv("TMPDIR");

    if (test_now.dir[0])
        return test_now.dir;
    snprintf(test_now.dir, sizeof(test_now.dir), "%s/cube-test-XXXXXX",
             base && base[0] ? base : "/tmp");
    if (!mkdtemp(test_now.dir)) {
        perror(test_now.dir);
        exit(1);
    }
    return test_now.dir;
}

static int test_remove_one(const char *path, const struct stat *st, int flag,
                           struct FTW *ftw)
{
    (void)st;
    (void)flag;
    (void)ftw;
    return remove(path);
}

/* ---- Running them ---- */

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define TEST_ASAN 1
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define TEST_ASAN 1
#endif

/* A test that dies or hangs still says which one it was. */
static void test_dies(int number)
{
    char text[512];
    int size = snprintf(text, sizeof(text),
                        "FAILED %s: %s\n  run it alone: "
                        "TEST_SEED=%llu %s %s\n", test_now.name,
                        number == SIGALRM ? "took too long" :
                        number == SIGABRT ? "aborted" : "crashed",
                        (unsigned long long)test_now.seed, test_now.program,
                        test_now.name);

    if (write(STDOUT_FILENO, text, (size_t)size) < 0)
        _exit(2);
    signal(number, SIG_DFL);
    raise(number);
}

/* The test proper, between setjmp and longjmp; nothing local lives on. */
static void test_enter(void (*run)(void))
{
    if (setjmp(test_now.leave) == 0)
        run();
}

/* A helper thread that was told to end may need a moment: at most a second,
 * and none at all for a test that starts no thread. */
static void test_settle(int descriptors, long blocks)
{
    for (int i = 0; i < 200; i++) {
        if (test_descriptors() <= descriptors &&
            __atomic_load_n(&test_heap_blocks, __ATOMIC_SEQ_CST) <= blocks)
            return;
        usleep(5000);
    }
}

static void test_run(const struct test_case *one)
{
    int descriptors = test_descriptors();
    long blocks = test_heap_blocks;
    const char *limit = getenv("TEST_TIMEOUT");

    test_now.name = one->name;
    test_now.row[0] = test_now.dir[0] = '\0';
    test_now.faults = 0;
    test_now.skipped = false;
    test_now.random = test_now.seed;
    test_heap_peak = test_heap_bytes;
    alarm(limit ? (unsigned)atoi(limit) : 120);
    test_enter(one->run);
    alarm(0);
    test_now.row[0] = '\0';
    if (test_now.dir[0])
        nftw(test_now.dir, test_remove_one, 16, FTW_DEPTH | FTW_PHYS);
    test_settle(descriptors, blocks);
    if (test_now.faults == 0 && test_descriptors() != descriptors) {
        FAIL("%d descriptors more than before",
             test_descriptors() - descriptors);
        test_list_descriptors();
    }
    if (test_now.faults == 0 && test_heap_blocks != blocks)
        FAIL("%ld blocks of memory more than before",
             test_heap_blocks - blocks);
    if (test_now.faults)
        printf("  run it alone: TEST_SEED=%llu %s %s\n",
               (unsigned long long)test_now.seed, test_now.program, one->name);
}

static bool test_wanted(const char *name, int argc, char **argv)
{
    for (int i = 1; i < argc; i++)
        if (strcmp(argv[i], name) == 0)
            return true;
    return argc < 2;
}

int main(int argc, char **argv)
{
    const char *seed = getenv("TEST_SEED");
    bool list = argc > 1 && strcmp(argv[1], "-l") == 0;
    int passed = 0, failed = 0, skipped = 0;

    test_now.program = argv[0];
    test_now.seed = seed && seed[0] ? strtoull(seed, NULL, 0) : 20240229;
    setvbuf(stdout, NULL, _IOLBF, 0);
    signal(SIGABRT, test_dies);
    signal(SIGALRM, test_dies);
#ifndef TEST_ASAN /* which has a better report of its own */
    signal(SIGSEGV, test_dies);
    signal(SIGBUS, test_dies);
#endif
    tzset();
    for (struct test_case *one = test_first; one; one = one->next) {
        if (list)
            puts(one->name);
        if (list || !test_wanted(one->name, argc, argv))
            continue;
        test_run(one);
        failed += test_now.faults > 0;
        skipped += test_now.faults == 0 && test_now.skipped;
        passed += test_now.faults == 0 && !test_now.skipped;
    }
    if (list)
        return 0;
    if (passed + failed + skipped == 0)
        printf("%s: no such test (-l lists them)\n", argv[0]);
    printf("%d passed, %d failed, %d skipped\n", passed, failed, skipped);
    return failed > 0 || passed + skipped == 0;
}

#endif /* CUBE_TEST_H */
