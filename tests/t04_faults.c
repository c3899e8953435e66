/*
 * Chapter 4, the store: what damage to its file and a disk that fails may do
 * to it.
 */
#include "store_small.h"
#define KEYS 40
#include "test.h"
#include "store_disk.h"

/* ---- Damage ---- */

#define SMALL_KEYS 40

/* A small file, for tests that go through every byte of it: keys k00 .. k29,
 * a checkpoint or a compaction, then l00 .. l09, each in a commit of its own,
 * so that the number of keys tells the commit. */
struct small {
    struct cube_buf bytes;
    size_t ends[SMALL_KEYS + 1]; /* where the record of the n-th commit ends */
    size_t first; /* a file that ends before this has never been one */
};

static const char small_value[] = "a value that is more than a few bytes "
    "long, so that it can stand outside of a page";

static void small_key(int n, char key[8])
{
    snprintf(key, 8, "%c%02d", n < 30 ? 'k' : 'l', n % 30);
}

static void small_make(struct small *f, int compact_at)
{
    static struct disk d;
    struct cube_store_stats stats;
    struct cube_store *s;
    char key[8];

    memset(f, 0, sizeof *f);
    disk_init(&d);
    s = must_open(&d.world, "t");
    for (int i = 0; i < SMALL_KEYS; i++) {
        cube_store_stats(s, &stats);
        if (i == 0)
            f->first = f->ends[0] = stats.used_bytes;
        small_key(i, key);
        put(s, key, small_value);
        commit(s);
        cube_store_stats(s, &stats);
        f->ends[i + 1] = stats.used_bytes;
        if (i == compact_at || i == 29)
            CHECK_INT(i == 29 ? cube_store_settle(s, NULL)
                              : cube_store_compact(s, NULL), 0);
        if (i == compact_at) {
            cube_store_stats(s, &stats);
            for (int j = 0; j <= i + 1; j++)
                f->ends[j] = stats.used_bytes;
            f->first = stats.used_bytes;
        }
    }
    cube_buf_add(&f->bytes, disk_file(&d, "t")->now.data,
                 disk_file(&d, "t")->now.len);
    cube_store_close(s);
    disk_free(&d);
}

/* Reads all keys, one way and another: their number if they are those of some
 * commit, -1 if an error was told; fails for anything else. */
static int small_read(struct cube_store *s, struct cube_err *err)
{
    struct cube_cursor *c = cube_cursor_open(s, "t", err);
    struct cube_buf got = {0};
    const void *val;
    size_t len;
    char key[8];
    int n = 0, r;

    for (r = cube_cursor_first(c, err); r > 0; r = cube_cursor_next(c, err)) {
        small_key(n, key);
        CHECK_MEM(cube_cursor_key(c, &len), key, 3);
        if ((r = cube_cursor_value(c, &val, &len, err)) < 0)
            break;
        CHECK_UINT(len, sizeof small_value - 1);
        CHECK_MEM(val, small_value, sizeof small_value - 1);
        if ((r = cube_store_get(s, "t", key, 3, &got, err)) < 0)
            break;
        CHECK_STR(got.data, small_value);
        n++;
    }
    cube_cursor_close(c);
    cube_buf_free(&got);
    if (r == 0 && cube_store_check(s, err) < 0)
        r = -1;
    return r < 0 ? -1 : n;
}

/* Opens these bytes and reads all; where there is a state, a commit is taken
 * and found again. *dropped: what opening said that it cut off. */
static int small_open(const void *bytes, size_t len, struct cube_err *err,
                      uint64_t *dropped)
{
    static struct disk d;
    struct cube_store_options o = {.cache_bytes = 1};
    struct cube_store_stats stats;
    struct cube_store *s;
    int n = -1;

    disk_init(&d);
    d.is_forgetful = false;
    disk_close(&d, disk_open(&d, "t", CUBE_OPEN_CREATE));
    if (len > 0)
        cube_buf_add(&disk_file(&d, "t")->now, bytes, len);
    test_heap_peak = test_heap_bytes;
    s = cube_store_open(&d.world, "t", &o, err);
    if (s) {
        cube_store_stats(s, &stats);
        *dropped = stats.dropped_bytes;
        n = small_read(s, err);
    }
    if (n >= 0) {
        CHECK_INT(cube_store_put(s, "u", "goes", 4, "on", 2, NULL), 0);
        commit(s);
        cube_store_close(s);
        s = must_open(&d.world, "t");
        CHECK_INT(small_read(s, err), n);
    }
    cube_store_close(s);
    disk_free(&d);
    return n;
}

/* An error of damage names the file, and an offset not behind the damage. */
static void check_words(const struct cube_err *err, size_t at)
{
    const char *p = strstr(err->text, "offset ");

    CHECK_INT(err->code, CUBE_ECORRUPT);
    CHECK_HAS(err->text, "t: offset ");
    if (p && strtoull(p + 7, NULL, 10) > at)
        FAIL("damage at %zu is told as %s", at, err->text);
}

/* Is this offset between two records, or in the zeros before the second? */
static bool small_is_between(const struct small *f, size_t at)
{
    const uint8_t *p = (const uint8_t *)f->bytes.data;
    size_t edge = CUBE_STORE_HEAD;

    while (edge < at && memcmp(p + edge, "cur", 3) == 0)
        edge = (size_t)cube_store_align(edge + CUBE_STORE_HEAD +
                                        cube_store_get32(p + edge + 4));
    return edge >= at && edge < at + CUBE_STORE_ALIGN;
}

/* Where a cut falls between two records nothing is left that could tell: such
 * a file is a copy of an earlier moment. Else what is cut off is counted. */
TEST(file_cut_at_every_byte_opens_with_the_last_whole_commit)
{
    for (int row = 0; row < 2; row++) {
        struct small f;

        small_make(&f, row == 0 ? -1 : 20);
        for (size_t cut = 0; cut <= f.ends[SMALL_KEYS]; cut++) {
            struct cube_err err = {0};
            uint64_t dropped = 0;
            int n = small_open(f.bytes.data, cut, &err, &dropped), whole = 0;

            test_row("cut at %zu of %zu", cut, f.ends[SMALL_KEYS]);
            while (whole < SMALL_KEYS && f.ends[whole + 1] <= cut)
                whole++;
            if (n < 0) {
                CHECK(cut < f.first);
                CHECK_INT(err.code, CUBE_ECORRUPT);
                CHECK_HAS(err.text, "t: offset ");
                continue;
            }
            CHECK(cut + CUBE_STORE_ALIGN > f.first);
            /* the zeros that fill a record up are no loss */
            if (n < whole || cut + CUBE_STORE_ALIGN <= f.ends[n])
                FAIL("%d keys, not %d", n, whole);
            CHECK(cut <= f.ends[n] || dropped > 0 || small_is_between(&f, cut));
        }
        cube_buf_free(&f.bytes);
    }
}

/* Every byte of a file, in four ways. In the last commit it may cost that, and
 * opening says so; before, it is an error. Only zeros that fill up, and the
 * pages that no tree uses, may change without a word. */
TEST(every_changed_byte_is_told_or_harmless)
{
    struct small f;
    int told = 0, cost = 0, harmless = 0;
    long heap = test_heap_bytes, most = 0;

    small_make(&f, 20);
    for (size_t at = 0; at < f.ends[SMALL_KEYS] + 100; at++) {
        char was = f.bytes.data[at];
        char to[4] = {(char)(was ^ 1 << at % 8), (char)~was, 0,
                      (char)(was + 1)};

        for (size_t i = 0; i < COUNT(to); i++) {
            struct cube_err err = {0};
            uint64_t dropped = 0;
            int n;

            if (to[i] == was)
                continue;
            test_row("byte %zu of %zu, from %02x to %02x", at,
                     f.ends[SMALL_KEYS], was & 0xff, to[i] & 0xff);
            f.bytes.data[at] = to[i];
            n = small_open(f.bytes.data, f.bytes.len, &err, &dropped);
            f.bytes.data[at] = was;
            if (most < test_heap_peak - heap)
                most = test_heap_peak - heap;
            if (n < 0) {
                check_words(&err, at);
                told++;
            } else if (n < SMALL_KEYS) {
                CHECK_INT(n, SMALL_KEYS - 1);
                CHECK(at >= f.ends[SMALL_KEYS - 1] &&
                      at < f.ends[SMALL_KEYS]);
                CHECK(dropped > 0);
                cost++;
            } else {
                harmless++;
            }
        }
    }
    printf("damage: %d told, %d cost the last commit, %d harmless; %ld bytes "
           "of memory at most\n", told, cost, harmless, most);
    CHECK(told > 5000);
    CHECK(cost > 200);
    CHECK(harmless < told / 2);
    CHECK(most < (1 << 20));
    cube_buf_free(&f.bytes);
}

/* ---- Disks that fail ---- */

/* Without a fault, which would be one of reading. */
static bool reads_as(struct cube_store *s, struct disk *d,
                     const struct model *want)
{
    int fail_at = d->fail_at, calls = d->calls;
    bool same;

    d->fail_at = 0;
    same = store_is(s, want);
    d->fail_at = fail_at;
    d->calls = calls;
    return same;
}

/* Each call fails once, or from then on: the error is told, the last commit
 * stands, and after the fault the store writes again. */
static void fail_each_call(int fail_errno, bool is_forever, int code)
{
    static struct disk d;
    static struct model want;
    int fail_at = 0, failed = 0;
    bool is_reached = true;

    while (is_reached && fail_at < 3000) {
        struct cube_err err = {0};
        struct cube_store *s;

        fail_at++;
        test_row("%s: call %d fails%s", strerror(fail_errno), fail_at,
                 is_forever ? " and all after it" : "");
        disk_init(&d);
        memset(&want, 0, sizeof want);
        s = must_open(&d.world, "t");
        REQUIRE(s);
        d.fail_errno = fail_errno;
        d.is_fail_forever = is_forever;
        d.calls = 0;
        d.fail_at = fail_at;
        for (int i = 0; i < 8; i++) {
            struct model staged = want;

            for (int n = 0; n < 6; n++)
                change(s, &staged);
            if (cube_store_commit(s, &err) == 0) {
                want = staged;
            } else {
                failed++;
                CHECK(err.code == (enum cube_code)code ||
                      err.code == CUBE_ESYNC || err.code == CUBE_EIO);
            }
            if (i % 4 == 3 && cube_store_compact(s, &err) < 0)
                failed++;
            (void)cube_store_slice(s, 1);
            if (i % 4 == 3 && !reads_as(s, &d, &want))
                FAIL("the last commit is not what it was");
        }
        is_reached = d.calls >= fail_at;
        d.fail_at = 0; /* there is room again */
        d.clock_ms += 2 * CUBE_STORE_RETRY_MS;
        while (cube_store_slice(s, 1000))
            ;
        CHECK(store_is(s, &want));
        CHECK(!s->is_broken);
        change(s, &want);
        if (cube_store_commit(s, &err) < 0)
            FAIL("after the fault: %s", err.text);
        CHECK_INT(cube_store_check(s, &err), 0);
        cube_store_close(s);
        s = must_open(&d.world, "t");
        REQUIRE(s);
        CHECK(store_is(s, &want));
        cube_store_close(s);
        disk_free(&d);
    }
    CHECK(fail_at > 60);
    CHECK(failed > 40);
    CHECK(fail_at < 3000);
}

TEST(full_disk_is_told_and_survived)
{
    fail_each_call(ENOSPC, false, CUBE_ENOSPC);
    fail_each_call(ENOSPC, true, CUBE_ENOSPC);
}

TEST(broken_disk_is_told_and_survived)
{
    fail_each_call(EIO, false, CUBE_EIO);
    fail_each_call(EIO, true, CUBE_EIO);
}

/* The rescue once wrote out what was only staged, as if it were committed. */
TEST(what_is_staged_while_the_file_is_written_anew_is_not_committed_by_that)
{
    static struct disk d;
    struct cube_store *s;
    struct cube_buf got = {0};

    disk_init(&d);
    s = must_open(&d.world, "t");
    put(s, "a", "1");
    commit(s);
    put(s, "a", "2");
    commit(s);
    put(s, "b", "1");
    CHECK_INT(cube_store_commit_begin(s, NULL), 1);
    CHECK_INT(cube_store_commit_end(s, -EIO, NULL), -1);
    (void)cube_store_put(s, "t", "staged", 6, "x", 1, NULL);
    (void)cube_store_put(s, "u", "staged", 6, "x", 1, NULL);
    for (int i = 0; i < 1000 && cube_store_slice(s, 5); i++)
        ;
    cube_store_rollback(s);
    for (int round = 0; round < 2; round++) {
        CHECK_INT(cube_store_get(s, "t", "staged", 6, &got, NULL), 0);
        CHECK_INT(cube_store_get(s, "u", "staged", 6, &got, NULL), 0);
        CHECK_INT(cube_store_get(s, "t", "a", 1, &got, NULL), 1);
        CHECK_STR(got.data, "2");
        CHECK_INT(cube_store_check(s, NULL), 0);
        cube_store_close(s);
        s = must_open(&d.world, "t");
    }
    cube_store_close(s);
    cube_buf_free(&got);
    disk_free(&d);
}

/* A commit that had fallen behind once did the sync itself, while the thread
 * of the caller did the same: the system tells an error to one of the two. */
TEST(sync_that_the_caller_does_is_his_also_when_commits_fall_behind)
{
    static struct disk d;
    static struct model want;
    struct cube_store_options o = {.cache_bytes = 1, .is_sync_split = true};
    struct cube_store *s;

    disk_init(&d);
    memset(&want, 0, sizeof want);
    s = cube_store_open(&d.world, "t", &o, NULL);
    REQUIRE(s);
    for (int i = 0; i < 10000 && cube_store_slice_fd(s) < 0; i++) {
        change(s, &want);
        commit(s);
        (void)cube_store_slice(s, 0);
    }
    CHECK(cube_store_slice_fd(s) >= 0);
    for (int i = 0; i < 500; i++) {
        change(s, &want);
        commit(s);
        CHECK(cube_store_slice_fd(s) >= 0);
    }
    d.sync_fails = 1;
    cube_store_slice_synced(s, disk_sync(&d, cube_store_slice_fd(s)));
    CHECK(cube_store_slice_fd(s) < 0);
    CHECK(!disk_file(&d, "t.new"));
    CHECK(store_is(s, &want));
    cube_store_close(s);
    s = must_open(&d.world, "t");
    CHECK(store_is(s, &want));
    cube_store_close(s);
    disk_free(&d);
}
