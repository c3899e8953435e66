/*
 * Chapter 4, the store: what it costs at most: bytes of the file, memory, work
 * when nothing happens and when it opens.
 */
#include "test.h"
#include "store_disk.h"

TEST(file_never_grows_past_twice_its_live_bytes_and_8_mib)
{
    static struct disk d;
    static const struct {
        int keys;
        size_t len, total;
        bool is_sliced;
    } rows[] = {
        {3000, 1500, 48 << 20, true},  /* a loop that slices */
        {3000, 1500, 48 << 20, false}, /* and one that does not */
        {100, 500, 24 << 20, false},   /* a manager with few tasks */
        {10000, 20, 6 << 20, false},   /* little records */
        {20, 200000, 48 << 20, false}, /* large ones */
    };
    static char val[200000];

    for (size_t i = 0; i < COUNT(rows); i++) {
        size_t live = (size_t)rows[i].keys * (rows[i].len + 4), most = 0;
        size_t written = 0;
        struct cube_store *s;
        struct cube_store_stats stats;

        test_row("row %zu", i);
        disk_init(&d);
        d.is_forgetful = false;
        s = must_open(&d.world, "t");
        for (int n = 0; written < rows[i].total; n++) {
            uint32_t k = n < rows[i].keys ? (uint32_t)n
                : (uint32_t)test_below((unsigned)rows[i].keys);

            if (cube_store_put(s, "t", &k, 4, val, rows[i].len, NULL) < 0)
                FAIL("put");
            written += rows[i].len + 12;
            if (n % 8 != 7)
                continue;
            commit(s);
            if (rows[i].is_sliced)
                (void)cube_store_slice(s, 5);
            cube_store_stats(s, &stats);
            if (most < stats.file_bytes)
                most = (size_t)stats.file_bytes;
        }
        if (most > 2 * live + (8 << 20))
            FAIL("%zu bytes for %zu live ones", most, live);
        CHECK(stats.compactions > 0);
        CHECK_INT(cube_store_check(s, NULL), 0);
        cube_store_close(s);
        disk_free(&d);
    }
}

TEST(memory_stays_within_the_cache_and_a_mebibyte)
{
    static struct disk d;
    struct cube_store_options o = {.cache_bytes = 4 << 20};
    struct cube_store *s;
    struct cube_buf got = {0};
    static char val[500];
    long before, most = 0;

    disk_init(&d);
    d.is_forgetful = false;
    s = cube_store_open(&d.world, "t", &o, NULL);
    REQUIRE(s);
    before = test_heap_bytes;
    for (int n = 0; n < 100000; n++) {
        uint32_t k = (uint32_t)test_random();

        if (cube_store_put(s, "t", &k, 4, val, sizeof val, NULL) < 0 ||
            cube_store_get(s, "t", &k, 4, &got, NULL) != 1)
            FAIL("put and get");
        if (n % 8 == 7) {
            long disk_bytes = 0;

            commit(s);
            for (int i = 0; i < d.inode_count; i++)
                disk_bytes += (long)d.inodes[i].now.cap;
            if (most < test_heap_bytes - disk_bytes)
                most = test_heap_bytes - disk_bytes;
        }
    }
    (void)before;
    CHECK(most < (5 << 20));
    cube_buf_free(&got);
    cube_store_close(s);
    disk_free(&d);
}

TEST(idle_store_writes_nothing)
{
    static struct disk d;
    struct cube_store *s;
    int calls;

    disk_init(&d);
    s = must_open(&d.world, "t");
    put(s, "a", "1");
    commit(s);
    calls = d.calls;
    for (int i = 0; i < 100; i++) {
        CHECK(!cube_store_slice(s, 5));
        commit(s);
    }
    CHECK_INT(d.calls, calls);
    cube_store_close(s);
    s = must_open(&d.world, "t");
    cube_store_close(s);
    disk_free(&d);
}
