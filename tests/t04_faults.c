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
            f->first = stats.used_bytes - CUBE_STORE_HEAD; /* but the mark */
            for (int j = 0; j <= i + 1; j++)
                f->ends[j] = f->first;
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

/* How calls fail: number k alone, or all from then on. */
static const struct fault {
    int fail_errno;
    bool is_forever, is_short, is_interrupted;
    int code;
} faults[] = {
    {ENOSPC, false, false, false, CUBE_ENOSPC},
    {ENOSPC, true, false, false, CUBE_ENOSPC},
    {ENOSPC, false, true, false, CUBE_ENOSPC}, /* in the midst of a record */
    {EDQUOT, true, true, true, CUBE_ENOSPC},
    {EIO, false, false, false, CUBE_EIO},
    {EIO, true, false, true, CUBE_EIO},
};

static void fault_row(const struct fault *f, int k, const char *what)
{
    test_row("%s: call %d%s fails with %s%s%s", what, k,
             f->is_forever ? " and all after it" : "", strerror(f->fail_errno),
             f->is_short ? ", short writes" : "",
             f->is_interrupted ? ", interrupted ones" : "");
}

static void fault_begin(struct disk *d, const struct fault *f, int k)
{
    d->calls = 0;
    d->fail_at = k;
    d->fail_errno = f->fail_errno;
    d->is_fail_forever = f->is_forever;
    d->is_short = f->is_short;
    d->is_interrupted = f->is_interrupted;
}

/* Was call k reached? From here on nothing fails. */
static bool fault_end(struct disk *d, int k)
{
    bool is_reached = d->calls >= k;

    d->fail_at = 0;
    d->is_short = d->is_interrupted = false;
    return is_reached;
}

static bool is_code_of(const struct fault *f, const struct cube_err *err)
{
    return err->text[0] && (err->code == (enum cube_code)f->code ||
                            err->code == CUBE_ESYNC);
}

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

/* What another process finds that opens the file: the last commit, or the one
 * of which nobody knows (a sync failed), never one that was refused. */
static void check_found(const struct disk *d, const struct model *want,
                        const struct model *unknown)
{
    static struct disk after;
    struct cube_store *s;

    disk_init(&after);
    disk_copy(d, &after);
    s = must_open(&after.world, "t");
    if (s && !store_is(s, want) && !(unknown && store_is(s, unknown)))
        FAIL("opened anew it holds another state than the last commit");
    cube_store_close(s);
    disk_free(&after);
}

/* One commit that may fail; want is the state before and after it. */
static void fault_commit(struct cube_store *s, struct disk *d,
                         struct model *want, const struct fault *f,
                         int *failed)
{
    struct model staged = *want;
    struct cube_err err = {0};

    for (int n = 0; n < 6; n++)
        change(s, &staged);
    if (cube_store_commit(s, &err) == 0) {
        *want = staged;
        return;
    }
    ++*failed;
    CHECK(is_code_of(f, &err));
    CHECK(reads_as(s, d, want));
    if (err.code != CUBE_ESYNC)
        check_found(d, want, NULL);
}

/* After the fault: all is as it was, and goes on. */
static void check_goes_on(struct cube_store *s, struct disk *d,
                          struct model *want)
{
    struct cube_store_stats stats;
    struct cube_err err = {0};

    d->clock_ms += 2 * CUBE_STORE_RETRY_MS;
    while (cube_store_slice(s, 1000))
        ;
    cube_store_stats(s, &stats);
    CHECK(!stats.is_broken);
    CHECK(store_is(s, want));
    change(s, want);
    if (cube_store_commit(s, &err) < 0)
        FAIL("after the fault: %s", err.text);
    CHECK(store_is(s, want));
    if (cube_store_check(s, &err) < 0)
        FAIL("after the fault: %s", err.text);
    check_found(d, want, NULL);
    if (cube_store_compact(s, &err) < 0)
        FAIL("after the fault: %s", err.text);
}

/* Commits, checkpoints and compactions, with call k failing. */
static bool fail_at_work(const struct fault *f, int k, int *failed)
{
    static struct disk d;
    static struct model want;
    struct cube_err err = {0};
    struct cube_store *s;
    bool is_reached;

    fault_row(f, k, "work");
    disk_init(&d);
    memset(&want, 0, sizeof want);
    s = must_open(&d.world, "t");
    fault_begin(&d, f, k);
    for (int i = 0; i < 8; i++) {
        fault_commit(s, &d, &want, f, failed);
        (void)cube_store_slice(s, 1);
        if (i % 4 == 3 && cube_store_compact(s, &err) < 0) {
            ++*failed;
            CHECK(is_code_of(f, &err));
            CHECK(reads_as(s, &d, &want));
        }
    }
    is_reached = fault_end(&d, k);
    check_goes_on(s, &d, &want);
    cube_store_close(s);
    s = must_open(&d.world, "t");
    CHECK(store_is(s, &want));
    cube_store_close(s);
    disk_free(&d);
    return is_reached;
}

TEST(commits_checkpoints_and_compactions_tell_each_fault_and_go_on_after_it)
{
    for (size_t i = 0; i < COUNT(faults); i++) {
        int k = 1, failed = 0;

        while (k < 3000 && fail_at_work(&faults[i], k, &failed) &&
               test_now.faults == 0)
            k++;
        CHECK(k > 60);
        CHECK(k < 3000);
        CHECK(failed > 40);
    }
}

/* Opening with call k failing: a file that a crash has left with half of a
 * commit, so that it is repaired; or none, so that it is made. */
static bool fail_at_opening(const struct disk *image, struct model *want,
                            const struct fault *f, int k, int *failed)
{
    static struct disk d;
    struct model still = *want;
    struct cube_store_options o = {.cache_bytes = 1};
    struct cube_err err = {0};
    struct cube_store *s;
    bool is_reached;

    fault_row(f, k, image->inode_count > 0 ? "opening" : "creating");
    disk_init(&d);
    disk_copy(image, &d);
    fault_begin(&d, f, k);
    s = cube_store_open(&d.world, "t", &o, &err);
    is_reached = fault_end(&d, k);
    if (!s) {
        ++*failed;
        CHECK(is_code_of(f, &err));
        CHECK_HAS(err.text, "t");
        s = must_open(&d.world, "t");
    }
    CHECK(store_is(s, &still));
    check_goes_on(s, &d, &still);
    cube_store_close(s);
    disk_free(&d);
    return is_reached;
}

TEST(opening_tells_each_fault_and_works_after_it)
{
    static struct disk image, none;
    static struct model want;
    struct cube_store_stats stats;
    struct cube_store *s;

    disk_init(&none);
    disk_init(&image);
    memset(&want, 0, sizeof want);
    s = must_open(&image.world, "t");
    for (int i = 0; i < 12; i++) {
        change(s, &want);
        commit(s);
    }
    put(s, "torn", small_value);
    CHECK_INT(cube_store_commit_begin(s, NULL), 1);
    cube_store_stats(s, &stats);
    disk_file(&image, "t")->now.data[stats.used_bytes - 20] ^= 1;
    cube_store_close(s);
    for (size_t i = 0; i < 2 * COUNT(faults); i++) {
        static struct model empty;
        int k = 1, failed = 0;

        while (k < 1000 && test_now.faults == 0 &&
               fail_at_opening(i % 2 ? &none : &image, i % 2 ? &empty : &want,
                               &faults[i / 2], k, &failed))
            k++;
        CHECK(k > 5);
        CHECK(k < 1000);
        CHECK(failed > 4);
    }
    disk_free(&image);
    disk_free(&none);
}

/* Reads of all that is there, with call k failing. */
static bool fail_at_reading(struct cube_store *s, struct disk *d,
                            const struct model *want, int k, int *failed)
{
    struct cube_buf got = {0};
    struct cube_err err = {0};
    bool is_reached;

    fault_row(&faults[4], k, "reading");
    cube_store_cache_forget(&s->cache);
    fault_begin(d, &faults[4], k);
    for (int t = 0; t < TREES; t++) {
        struct cube_cursor *c = cube_cursor_open(s, tree_names[t], NULL);
        const void *val;
        size_t len;
        int r = cube_cursor_first(c, &err);

        while (r > 0 && (r = cube_cursor_value(c, &val, &len, &err)) == 0)
            r = cube_cursor_next(c, &err);
        *failed += r < 0;
        CHECK(r == 0 || err.code == CUBE_EIO);
        cube_cursor_close(c);
        for (unsigned i = 0; i < KEYS; i++) {
            const char *key = key_of(i);

            r = cube_store_get(s, tree_names[t], key, strlen(key), &got,
                               &err);
            *failed += r < 0;
            CHECK(r == (want->v[t][i] != 0) ||
                  (r < 0 && err.code == CUBE_EIO));
        }
    }
    is_reached = fault_end(d, k);
    cube_buf_free(&got);
    CHECK(store_is(s, want));
    return is_reached;
}

TEST(read_that_fails_is_told_and_can_be_repeated)
{
    static struct disk d;
    static struct model want;
    struct cube_store *s;
    int k = 1, failed = 0;

    disk_init(&d);
    memset(&want, 0, sizeof want);
    s = must_open(&d.world, "t");
    for (int i = 0; i < 200; i++)
        change(s, &want);
    commit(s);
    CHECK_INT(cube_store_compact(s, NULL), 0);
    while (k < 1000 && fail_at_reading(s, &d, &want, k, &failed) &&
           test_now.faults == 0)
        k++;
    CHECK_INT(failed, k - 1);
    CHECK(k > 20);
    CHECK(k < 1000);
    cube_store_close(s);
    disk_free(&d);
}

/* Nobody is told of those: calls are repeated, writes continued. */
TEST(interrupted_and_short_calls_are_no_faults)
{
    static struct disk d;
    static struct model want;
    struct cube_store *s;

    disk_init(&d);
    memset(&want, 0, sizeof want);
    d.is_short = d.is_interrupted = true;
    s = must_open(&d.world, "t");
    for (int i = 0; i < 60; i++) {
        for (int n = 0; n < 4; n++)
            change(s, &want);
        commit(s);
        CHECK(cube_store_slice(s, 1) || !cube_store_last_error(s)[0]);
        if (i % 20 == 19) {
            CHECK_INT(cube_store_compact(s, NULL), 0);
            cube_store_close(s);
            s = must_open(&d.world, "t");
        }
        CHECK(store_is(s, &want));
    }
    CHECK_STR(cube_store_last_error(s), "");
    CHECK_INT(cube_store_check(s, NULL), 0);
    cube_store_close(s);
    disk_free(&d);
}

/* While no sync works there is no commit, and all that was acknowledged is
 * read; each try is told as a failed sync. Once a sync works the next slices
 * write a new file, and what that holds outlasts the machine. */
TEST(store_whose_syncs_fail_is_read_only_until_it_has_a_new_file)
{
    static struct disk d, after;
    static struct model want;
    struct model staged;
    struct cube_store_stats stats;
    struct cube_err err = {0};
    struct cube_store *s;

    disk_init(&d);
    memset(&want, 0, sizeof want);
    s = must_open(&d.world, "t");
    for (int i = 0; i < 50; i++) {
        change(s, &want);
        commit(s);
    }
    d.sync_fails = 1000000;
    d.is_evicting = true;
    for (int i = 0; i < 20; i++) {
        staged = want;
        change(s, &staged);
        CHECK_INT(cube_store_commit(s, &err), -1);
        CHECK_INT(err.code, CUBE_ESYNC);
        CHECK_HAS(err.text, i == 0 ? "unknown" : "a sync failed");
        cube_store_stats(s, &stats);
        CHECK(stats.is_broken);
        CHECK(store_is(s, &want));
        d.clock_ms += CUBE_STORE_RETRY_MS;
        for (int n = 0; n < 1000 && cube_store_slice(s, 1); n++)
            ;
        CHECK_HAS(cube_store_last_error(s), "sync");
    }
    d.sync_fails = 0;
    check_goes_on(s, &d, &want);
    cube_store_stats(s, &stats);
    CHECK_UINT(stats.compactions, 2); /* the new file, and that of the check */
    disk_init(&after); /* the machine dies: what surely survives is enough */
    disk_copy(&d, &after);
    for (int i = 0; i < after.inode_count; i++) {
        cube_buf_clear(&after.inodes[i].now);
        if (after.inodes[i].safe.len > 0)
            cube_buf_add(&after.inodes[i].now, after.inodes[i].safe.data,
                         after.inodes[i].safe.len);
    }
    after.dir_count = 1;
    cube_store_close(s);
    s = must_open(&after.world, "t");
    CHECK(store_is(s, &want));
    cube_store_close(s);
    disk_free(&after);
    disk_free(&d);
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

/* All that is rescued was once one record, which no opening would read when it
 * was longer than a record may be. */
TEST(what_is_rescued_is_written_in_records_of_some_size)
{
    static struct disk d;
    static char val[1000];
    struct cube_store_rec rec;
    struct cube_store *s;
    uint64_t at, batches = 0;

    disk_init(&d);
    s = must_open(&d.world, "t");
    for (uint32_t i = 0; i < 100; i++)
        CHECK_INT(cube_store_put(s, "t", &i, 4, val, sizeof val, NULL), 0);
    commit(s);
    put(s, "lost", "x");
    CHECK_INT(cube_store_commit_begin(s, NULL), 1);
    CHECK_INT(cube_store_commit_end(s, -EIO, NULL), -1);
    for (int i = 0; i < 1000 && s->is_broken; i++)
        (void)cube_store_slice(s, 5);
    for (at = s->file->base; cube_store_rec_head(s->file, at, &rec, NULL) > 0;
         at = cube_store_rec_end(&rec)) {
        CHECK(rec.len < CUBE_STORE_EXTENT_MAX + sizeof val + 16);
        batches += rec.kind == 'B' && rec.len > 0;
    }
    CHECK_UINT(at, s->file->end);
    CHECK(batches > 4);
    for (int round = 0; round < 2; round++) {
        struct cube_cursor *c = cube_cursor_open(s, "t", NULL);
        int n = 0;

        for (int r = cube_cursor_first(c, NULL); r > 0;
             r = cube_cursor_next(c, NULL))
            n++;
        CHECK_INT(n, 100);
        cube_cursor_close(c);
        CHECK_INT(cube_store_check(s, NULL), 0);
        cube_store_close(s);
        s = must_open(&d.world, "t");
    }
    cube_store_close(s);
    disk_free(&d);
}

/* Each commit once tried to merge again, and left behind the pages up to the
 * damage, while the overlay grew. */
TEST(store_with_a_damaged_tree_tells_its_writers_and_stays_small)
{
    static struct disk d;
    static struct model want;
    struct cube_err err = {0};
    struct cube_store_stats stats;
    struct cube_store *s;
    uint64_t size;
    int taken = 0;

    disk_init(&d);
    d.is_forgetful = false;
    memset(&want, 0, sizeof want);
    s = must_open(&d.world, "t");
    for (int i = 0; i < 400; i++)
        change(s, &want);
    commit(s);
    CHECK_INT(cube_store_compact(s, NULL), 0);
    for (int i = 0; i < s->view.roots->count; i++) {
        const struct cube_store_ref *r = &s->view.roots->trees[i].root;

        disk_file(&d, "t")->now.data[r->at + r->len - 1] ^= 1;
    }
    cube_store_cache_forget(&s->cache);
    cube_store_stats(s, &stats);
    size = stats.file_bytes;
    for (int i = 0; i < 3000; i++) {
        d.clock_ms += 500;
        change(s, &want);
        taken += cube_store_commit(s, &err) == 0;
        while (cube_store_slice(s, 5))
            ;
        cube_store_stats(s, &stats);
        CHECK(stats.file_bytes < size + (256 << 10));
        CHECK(stats.overlay_bytes < (32u << 10));
    }
    CHECK(taken > 10 && taken < 200);
    CHECK_INT(err.code, CUBE_ECORRUPT);
    CHECK_HAS(err.text, "cannot be merged: t: offset ");
    cube_store_close(s);
    disk_free(&d);
}

/* Records that say that they go on to the end of the file, each of which was
 * once read to there. */
TEST(file_of_many_broken_records_is_read_a_few_times_only)
{
    static struct disk d;
    struct cube_store_options o = {.cache_bytes = 1};
    struct cube_err err = {0};
    struct cube_store *s;
    struct cube_buf *bytes;
    struct cube_store_rec rec = {.kind = 'B', .body_crc = 1};

    disk_init(&d);
    d.is_forgetful = false;
    s = must_open(&d.world, "t");
    bytes = &disk_file(&d, "t")->now;
    buf_put(bytes, "", 0, 256 << 10);
    for (rec.at = CUBE_STORE_HEAD; rec.at < bytes->len; rec.at += 64) {
        rec.len = (uint32_t)(bytes->len - rec.at - CUBE_STORE_HEAD);
        cube_store_rec_encode(s->file, &rec, (uint8_t *)bytes->data + rec.at);
    }
    cube_store_close(s);
    d.read_bytes = 0;
    s = cube_store_open(&d.world, "t", &o, &err);
    CHECK(!s);
    CHECK_INT(err.code, CUBE_ECORRUPT);
    CHECK(d.read_bytes < 4 * (256 << 10));
    cube_store_close(s);
    disk_free(&d);
}

/* A tree of so many levels would grow beyond what can be walked. */
TEST(roots_of_more_levels_than_a_file_can_have_are_damage)
{
    static struct disk d;
    struct cube_store *s;
    struct cube_buf b = {0}, body = {0};

    disk_init(&d);
    s = must_open(&d.world, "t");
    put(s, "a", "1");
    commit(s);
    CHECK_INT(cube_store_compact(s, NULL), 0);
    for (int levels = 1; levels < 40; levels++) {
        struct cube_store_roots *r = cube_store_roots_new(s->file);

        s->view.roots->trees[0].levels = levels;
        cube_store_roots_encode(s->view.roots, &b);
        cube_buf_clear(&body);
        cube_buf_add(&body, b.data + CUBE_STORE_HEAD, b.len - CUBE_STORE_HEAD);
        CHECK_INT(cube_store_roots_decode(r, &body),
                  levels <= CUBE_STORE_DEPTH - 8);
        cube_store_roots_drop(r);
    }
    s->view.roots->trees[0].levels = 1;
    cube_buf_free(&b);
    cube_buf_free(&body);
    cube_store_close(s);
    disk_free(&d);
}

/* A crash in a compaction once left the new file for the next one to find,
 * which on a disk that it had filled up could not begin. */
TEST(opening_removes_what_an_unfinished_compaction_has_left)
{
    static struct disk d;
    struct cube_store_options o = {.is_read_only = true};
    struct cube_store *s;

    disk_init(&d);
    s = must_open(&d.world, "t");
    put(s, "a", "1");
    commit(s);
    cube_store_close(s);
    CHECK(d.world.open(&d, "t.new", CUBE_OPEN_WRITE | CUBE_OPEN_CREATE) >= 0);
    disk_file(&d, "t")->now.data[0] ^= 1;
    CHECK(!cube_store_open(&d.world, "t", NULL, NULL));
    CHECK(disk_file(&d, "t.new")); /* it may be all that is left */
    disk_file(&d, "t")->now.data[0] ^= 1;
    s = cube_store_open(&d.world, "t", &o, NULL);
    REQUIRE(s);
    CHECK(disk_file(&d, "t.new")); /* it is not a reader's to remove */
    cube_store_close(s);
    s = must_open(&d.world, "t");
    CHECK(!disk_file(&d, "t.new"));
    cube_store_close(s);
    disk_free(&d);
}

/* What was staged and dropped once kept the overlay from being merged at the
 * end, as if a commit of it were still to come; the next opening replayed it.
 */
TEST(close_merges_what_was_committed_also_after_a_rollback)
{
    static struct disk d;
    static struct model want;
    struct cube_store_stats stats;
    struct cube_store *s;

    disk_init(&d);
    memset(&want, 0, sizeof want);
    s = must_open(&d.world, "t");
    while (s->view.mem[0]->bytes < CUBE_STORE_TAIL_SMALL || s->view.mem[1]) {
        change(s, &want);
        commit(s);
    }
    put(s, "dropped", "x");
    cube_store_rollback(s);
    cube_store_close(s);
    s = must_open(&d.world, "t");
    cube_store_stats(s, &stats);
    CHECK(!s->view.mem[0]->head[0]);
    CHECK(stats.records > 0);
    CHECK(store_is(s, &want));
    cube_store_close(s);
    disk_free(&d);
}

static int refuse_lock_file(void *ctx, const char *path, unsigned flags)
{
    return strstr(path, ".lock") ? -EACCES : disk_open(ctx, path, flags);
}

/* A checker once left a lock file beside each file that it looked at; and where
 * it could not make one it went on as if nobody had the file open, also when
 * there was one that it may not open. */
TEST(reader_makes_no_file_and_wants_no_lock_where_there_is_none)
{
    static struct disk d;
    static struct model want;
    struct cube_store_options o = {.is_read_only = true};
    struct cube_store *s, *reader;
    struct cube_err err = {0};

    disk_init(&d);
    memset(&want, 0, sizeof want);
    s = must_open(&d.world, "t");
    for (int i = 0; i < 400; i++) {
        change(s, &want);
        commit(s);
    }
    cube_store_close(s);
    CHECK(disk_file(&d, "t.lock"));
    d.world.open = refuse_lock_file;
    CHECK(!cube_store_open(&d.world, "t", &o, &err));
    CHECK_INT(err.code, CUBE_EACCES);
    CHECK_HAS(err.text, "lock t.lock");
    d.world.open = disk_open;
    CHECK_INT(d.world.unlink(&d, "t.lock"), 0);
    d.changes = 0;
    reader = cube_store_open(&d.world, "t", &o, &err);
    REQUIRE(reader);
    CHECK(store_is(reader, &want));
    CHECK_INT(cube_store_check(reader, &err), 0);
    CHECK_INT(d.changes, 0);
    CHECK(!disk_file(&d, "t.lock"));

    s = must_open(&d.world, "t"); /* a writer comes, and cuts its file off */
    CHECK_INT(cube_store_compact(s, &err), 0);
    CHECK_INT(cube_store_check(reader, &err), 0);
    while (cube_store_slice(s, 5))
        ;
    for (int i = 0; i < 3; i++) {
        CHECK_INT(cube_store_check(reader, &err), -1);
        CHECK_INT(err.code, CUBE_EBUSY);
        CHECK_HAS(err.text, "check t: another process has opened it");
        cube_store_close(i ? NULL : s);
    }
    cube_store_close(reader);
    disk_free(&d);
}

/* A store whose new file has its name, and whose directory the caller syncs:
 * changed until it is so. */
static struct cube_store *open_renamed(struct disk *d, struct model *want)
{
    struct cube_store_options o = {.cache_bytes = 1, .is_sync_split = true};
    struct cube_store *s;

    disk_init(d);
    memset(want, 0, sizeof *want);
    s = cube_store_open(&d->world, "t", &o, NULL);
    REQUIRE(s);
    for (int i = 0; i < 10000 && s->dir_fd < 0; i++) {
        int fd = cube_store_slice_fd(s);

        if (fd >= 0)
            cube_store_slice_synced(s, disk_sync(d, fd));
        else if (!s->comp) {
            change(s, want);
            commit(s);
        }
        (void)cube_store_slice(s, 0);
    }
    CHECK(s->dir_fd >= 0);
    return s;
}

/* A commit once synced the directory itself, on the caller's loop, and beside
 * the caller's own thread; and after that had failed it did so again, though
 * the system may say that it is well what it has given up. Now the one waits,
 * with all that is staged, and the other is for a new file. */
TEST(directory_is_synced_by_nobody_twice)
{
    static struct disk d;
    static struct model want;
    struct model staged;
    struct cube_err err = {0};
    struct cube_store *s = open_renamed(&d, &want);
    const void *before = disk_file(&d, "t");

    staged = want;
    change(s, &staged);
    d.dir_sync_fails = 2; /* the caller's, and one that nobody may ask for */
    CHECK_INT(cube_store_commit_begin(s, &err), -1);
    CHECK_INT(err.code, CUBE_EBUSY);
    CHECK(cube_store_is_dirty(s));
    cube_store_slice_synced(s, disk_sync(&d, cube_store_slice_fd(s)));
    CHECK_INT(cube_store_commit_begin(s, &err), -1);
    CHECK_INT(err.code, CUBE_ESYNC);
    CHECK_HAS(err.text, "sync the directory of t");
    CHECK(!cube_store_slice(s, 1)); /* not at once, for ever */
    CHECK_INT(d.dir_sync_fails, 1);
    CHECK(reads_as(s, &d, &want));
    d.dir_sync_fails = 0;
    d.clock_ms += CUBE_STORE_RETRY_MS;
    for (int i = 0; i < 10000 && s->is_broken; i++) {
        (void)cube_store_slice(s, 0);
        if (cube_store_slice_fd(s) >= 0)
            cube_store_slice_synced(s, disk_sync(&d, cube_store_slice_fd(s)));
    }
    CHECK(disk_file(&d, "t") != before);
    check_goes_on(s, &d, &want);
    cube_store_close(s);
    disk_free(&d);
}

/* The power goes, and of all names those are left that were synced. */
static void lose_power(struct disk *d)
{
    d->dir_count = 1;
    memset(d->fds, 0, sizeof d->fds);
    for (int i = 0; i < d->inode_count; i++) {
        struct inode *n = &d->inodes[i];

        cube_buf_clear(&n->now);
        if (n->safe.len > 0)
            cube_buf_add(&n->now, n->safe.data, n->safe.len);
    }
}

/* A process renamed the new file and ended before the directory was synced, or
 * could not sync it. The next one took the file for what it was called, said
 * that its commits were on disk, and the power took them away with the name. */
TEST(who_opens_a_store_puts_its_name_on_disk_before_the_first_commit)
{
    static struct disk d;
    static struct model want;

    for (int fails = 0; fails < 2; fails++) {
        struct cube_err err = {0};
        struct cube_store *s = open_renamed(&d, &want);

        test_row("the sync %s", fails ? "failed" : "was not made");
        d.dir_sync_fails = fails;
        if (fails)
            cube_store_slice_synced(s, disk_sync(&d, cube_store_slice_fd(s)));
        CHECK_INT(s->is_broken, fails);
        cube_store_close(s);
        d.dir_sync_fails = 1;
        CHECK(!cube_store_open(&d.world, "t", NULL, &err));
        CHECK_HAS(err.text, "sync directory");
        s = must_open(&d.world, "t");
        put(s, "told", "yes");
        CHECK_INT(cube_store_commit(s, &err), 0);
        cube_store_close(s);
        lose_power(&d);
        s = must_open(&d.world, "t");
        CHECK_STR(get(s, NULL, "told"), "yes");
        cube_store_close(s);
        disk_free(&d);
    }
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
