/*
 * Chapter 4, the store: what it costs at most: bytes of the file, memory, work
 * when nothing happens and when it opens.
 */
#include "test.h"
#include "store_disk.h"

static char bytes[200000]; /* of values; what they are does not matter */

/* ---- The file ---- */

/* A load that goes on and on, with about as much live data all the time. */
enum load {
    OVERWRITE, /* random keys, the same size */
    WINDOW,    /* new keys in order, the oldest go: what retention does */
    SIZES,     /* random keys and sizes up to len */
    HOT        /* many keys that nobody touches, and ten that change */
};

#define LOAD_KEYS 10000

static struct load_run {
    enum load load;
    int keys;
    size_t len, total;
    bool is_sliced, is_pinned, is_split;
    uint32_t sizes[LOAD_KEYS]; /* key and value; 0: not there */
    size_t live;
} run;

static void load_put(struct cube_store *s, const char *tree, uint32_t key,
                     size_t len, uint32_t *slot)
{
    uint8_t text[8];

    cube_number_key(key, text);
    if (cube_store_put(s, tree, text, 8, bytes, len, NULL) < 0)
        FAIL("put");
    run.live += len + 8 - *slot;
    *slot = (uint32_t)len + 8;
}

/* Change number n. The first ones fill the store. */
static void load_change(struct cube_store *s, uint32_t n)
{
    uint32_t keys_n = (uint32_t)run.keys, k = n % keys_n;
    uint8_t text[8];

    if (run.load != WINDOW && n >= keys_n)
        k = run.load == HOT ? test_below(10) : test_below(keys_n);
    if (run.load == WINDOW && n >= keys_n) {
        cube_number_key(n - keys_n, text);
        if (cube_store_del(s, "window", text, 8, NULL) < 0)
            FAIL("delete");
    }
    load_put(s, run.load == HOT && k < 10 ? "hot" : "window",
             run.load == WINDOW ? n : k,
             run.load == SIZES ? test_below((uint32_t)run.len) : run.len,
             &run.sizes[k]);
}

/* What a loop does at the end of its turn. */
static void load_slice(struct cube_store *s, struct disk *d)
{
    (void)cube_store_slice(s, 5);
    if (cube_store_slice_fd(s) >= 0)
        cube_store_slice_synced(s, disk_sync(d, cube_store_slice_fd(s)));
}

static void check_load(void)
{
    static struct disk d;
    struct cube_store_options o = {.is_sync_split = run.is_split};
    struct cube_store *s;
    struct cube_store_stats stats;
    struct cube_cursor *c = NULL;
    size_t most = 0, written = 0;

    disk_init(&d);
    d.is_forgetful = false;
    s = cube_store_open(&d.world, "t", &o, NULL);
    REQUIRE(s);
    for (uint32_t n = 0; written < run.total; n++) {
        load_change(s, n);
        written += run.len + 12;
        if (n % 8 != 7)
            continue;
        commit(s);
        if (run.is_sliced)
            load_slice(s, &d);
        if (run.is_pinned && n / 8 == (uint32_t)run.keys / 8) {
            c = cube_cursor_open(s, "window", NULL);
            CHECK_INT(cube_cursor_first(c, NULL), 1);
        }
        cube_store_stats(s, &stats);
        if (stats.file_bytes > 2 * run.live + (8 << 20) &&
            stats.file_bytes > most)
            FAIL("%llu bytes for %zu live ones",
                 (unsigned long long)stats.file_bytes, run.live);
        if (most < stats.file_bytes)
            most = (size_t)stats.file_bytes;
    }
    CHECK(stats.compactions > 0);
    CHECK(!run.is_pinned || c);
    cube_cursor_close(c);
    CHECK_INT(cube_store_check(s, NULL), 0);
    cube_store_close(s);
    disk_free(&d);
}

TEST(file_never_grows_past_twice_its_live_bytes_and_8_mib)
{
    static const struct {
        enum load load;
        int keys;
        size_t len, total;
        bool is_sliced, is_pinned, is_split;
    } rows[] = {
        {OVERWRITE, 3000, 1500, 16 << 20, true, false, false},
        {OVERWRITE, 3000, 1500, 16 << 20, true, false, true}, /* a loop */
        {OVERWRITE, 3000, 1500, 16 << 20, false, false, false},
        {OVERWRITE, 3000, 1500, 16 << 20, true, true, true},
        {OVERWRITE, 100, 500, 10 << 20, false, false, false},
        {OVERWRITE, 10000, 20, 5 << 20, false, false, false},
        {OVERWRITE, 20, 200000, 32 << 20, false, false, false},
        {WINDOW, 4000, 700, 14 << 20, true, false, true},
        {WINDOW, 4000, 700, 14 << 20, false, true, false},
        {SIZES, 300, 20000, 40 << 20, true, false, true},
        {SIZES, 300, 20000, 40 << 20, false, false, false},
        {HOT, 3000, 1500, 16 << 20, true, false, true},
        {HOT, 3000, 1500, 16 << 20, false, true, false},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        memset(&run, 0, sizeof run);
        run.load = rows[i].load;
        run.keys = rows[i].keys;
        run.len = rows[i].len;
        run.total = rows[i].total;
        run.is_sliced = rows[i].is_sliced;
        run.is_pinned = rows[i].is_pinned;
        run.is_split = rows[i].is_split;
        test_row("row %zu", i);
        check_load();
    }
}

/* ---- Memory ---- */

static long most_memory;

/* Sampled before each change of the disk, whose own bytes do not count. */
static void sample_memory(struct disk *d)
{
    long own = 0;

    for (int i = 0; i < DISK_INODES; i++)
        own += (long)d->inodes[i].now.cap + (long)d->inodes[i].safe.cap;
    if (most_memory < test_heap_bytes - own)
        most_memory = test_heap_bytes - own;
}

TEST(memory_stays_within_the_cache_and_a_mebibyte)
{
    static const struct {
        size_t cache, len;
        int keys, rounds;
    } rows[] = {
        {256 << 10, 100, 20000, 30000},
        {256 << 10, 2000, 2000, 6000}, /* values that stand alone */
        {4 << 20, 500, 1 << 30, 30000},
        {16 << 20, 1000, 20000, 40000},
    };
    static struct disk d;

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct cube_store_options o = {.cache_bytes = rows[i].cache};
        struct cube_store *s;
        struct cube_buf got = {0};

        disk_init(&d);
        d.is_forgetful = false;
        d.before = sample_memory;
        s = cube_store_open(&d.world, "t", &o, NULL);
        REQUIRE(s);
        most_memory = 0;
        for (int n = 0; n < rows[i].rounds; n++) {
            uint32_t k = test_below((uint32_t)rows[i].keys), j;

            if (cube_store_put(s, "t", &k, 4, bytes, rows[i].len, NULL) < 0)
                FAIL("put");
            j = test_below((uint32_t)rows[i].keys);
            if (cube_store_get(s, "t", &k, 4, &got, NULL) != 1 ||
                cube_store_get(s, "t", &j, 4, &got, NULL) < 0)
                FAIL("get");
            if (n % 8 == 7)
                commit(s);
            if (n % 8 == 7 && n % 5 == 0)
                (void)cube_store_slice(s, 5);
        }
        test_row("a cache of %zu", rows[i].cache);
        printf("memory: %ld bytes with a cache of %zu\n", most_memory,
               rows[i].cache);
        CHECK(most_memory < (long)rows[i].cache + (1 << 20));
        CHECK(most_memory > (long)rows[i].cache / 2); /* and is made use of */
        cube_buf_free(&got);
        cube_store_close(s);
        disk_free(&d);
    }
}

/* What was staged and dropped once took memory until the next checkpoint, which
 * on a full disk never comes. */
TEST(changes_that_are_dropped_take_no_memory)
{
    static const char *const rows[] = {"rolled back", "refused"};
    static struct disk d;

    for (int row = 0; row < 2; row++) {
        struct cube_cursor *c;
        struct cube_store *s;
        long heap;

        test_row("%s", rows[row]);
        disk_init(&d);
        d.is_forgetful = false;
        s = must_open(&d.world, "t");
        put(s, "a", "1");
        commit(s);
        put(s, "a", "2");
        commit(s);
        c = cube_cursor_open(s, "t", NULL);
        d.fail_at = row == 1;
        d.is_fail_forever = true;
        d.fail_errno = ENOSPC;
        heap = test_heap_bytes;
        for (uint32_t n = 0; n < 20000; n++) {
            if (cube_store_put(s, "t", &n, 4, bytes, 1000, NULL) < 0)
                FAIL("put");
            if (row == 0)
                cube_store_rollback(s);
            else
                CHECK_INT(cube_store_commit(s, NULL), -1);
        }
        CHECK(test_heap_bytes - heap < (1 << 20));
        d.fail_at = 0;
        d.clock_ms += 2 * CUBE_STORE_RETRY_MS;
        while (cube_store_slice(s, 5)) /* reads failed as well: a new file */
            ;
        CHECK_STR(get(s, NULL, "a"), "2");
        CHECK_INT(cube_cursor_first(c, NULL), 1);
        CHECK_INT(cube_cursor_next(c, NULL), 0);
        cube_cursor_close(c);
        put(s, "b", "3");
        commit(s);
        CHECK_INT(cube_store_check(s, NULL), 0);
        cube_store_close(s);
        s = must_open(&d.world, "t");
        CHECK_STR(get(s, NULL, "a"), "2");
        CHECK_STR(get(s, NULL, "b"), "3");
        cube_store_close(s);
        disk_free(&d);
    }
}

/* ---- Work ---- */

/* Once what waits is done, hours pass without a call to the disk. */
TEST(idle_store_writes_nothing)
{
    static struct disk d;
    struct cube_store *s;
    struct model want;
    int calls;

    disk_init(&d);
    d.is_forgetful = false;
    memset(&want, 0, sizeof want);
    s = must_open(&d.world, "t");
    for (int i = 0; i < 3000; i++) {
        change(s, &want);
        commit(s);
    }
    while (cube_store_slice(s, 5))
        ;
    calls = d.calls;
    for (int i = 0; i < 1000; i++) {
        d.clock_ms += 60000;
        CHECK(!cube_store_slice(s, 5));
        commit(s);
    }
    CHECK_INT(d.calls, calls);
    CHECK(store_is(s, &want));
    cube_store_close(s);
    disk_free(&d);
}

/* Reads the zeros laid out ahead, the last commit, the roots, and as many
 * changes as overlays hold: a constant, whatever else is in the file. */
TEST(opening_reads_no_more_of_a_large_store_than_of_a_small_one)
{
    static struct disk d, after;

    disk_init(&after);
    for (int records = 2000; records <= 200000; records *= 10) {
        struct cube_store_options o = {.cache_bytes = 1};
        struct cube_store_stats stats;
        struct cube_store *s;

        test_row("%d records", records);
        disk_init(&d);
        d.is_forgetful = false;
        s = must_open(&d.world, "t");
        for (int n = 0; n < records; n++) {
            uint8_t key[8];

            cube_number_key(n, key);
            if (cube_store_put(s, "t", key, 8, bytes, 16, NULL) < 0)
                FAIL("put");
            if (n % 100 == 99)
                commit(s);
        }
        cube_store_stats(s, &stats);
        for (int round = 0; round < 2; round++) { /* killed; closed */
            struct cube_store *t;

            if (round == 1)
                cube_store_close(s);
            disk_copy(&d, &after);
            t = cube_store_open(&after.world, "t", &o, NULL);
            REQUIRE(t);
            printf("opening: %d records, %s: %ld reads, %ld bytes of %llu\n",
                   records, round ? "closed" : "killed", after.reads,
                   after.read_bytes, (unsigned long long)stats.file_bytes);
            CHECK(after.reads < 8000);
            CHECK(after.read_bytes < (3 << 20));
            cube_store_close(t);
        }
        disk_free(&d);
    }
    disk_free(&after);
}

/* It once wrote all of the file again, as if nothing of it were on disk. */
TEST(opening_after_a_compaction_does_not_write_the_file_again)
{
    static struct disk d;
    static char val[1000];
    struct cube_store *s;
    int calls;

    disk_init(&d);
    s = must_open(&d.world, "t");
    for (uint32_t k = 0; k < 3000; k++)
        CHECK_INT(cube_store_put(s, "t", &k, 4, val, sizeof val, NULL), 0);
    commit(s);
    CHECK_INT(cube_store_compact(s, NULL), 0);
    cube_store_close(s);
    calls = d.calls;
    s = must_open(&d.world, "t");
    CHECK(d.calls - calls < 40);
    cube_store_close(s);
    disk_free(&d);
}
