/*
 * Chapter 4, the store: what is committed stays committed.
 *
 * Random transactions run on a disk in memory (store_disk.h), with slices,
 * compactions, checkpoints, failing calls and openings among them. Before
 * each call that changes the disk the machine crashes, in many ways: of the
 * sectors that are written and not synced each subset may be there (64 random
 * ones, where there are more than 6), and of the names any state since the
 * directory was synced. What then opens must be the state after the last
 * acknowledged commit, or after one that was under way; it must pass the
 * check, take a commit, and open with that. The process alone may die as well:
 * then all that was written is read, and once it was read it must outlast the
 * machine.
 *
 *     CRASH_STATES   crash states to check, in one run after another, each
 *                    with a seed of its own (make crash N=...)
 *     CRASH_SUBSETS  how many random subsets in the midst of writing; before
 *                    a sync, a rename, a sync of the directory it is 64
 *     CRASH_AT       point.variant: this crash alone, as a failure names it
 *     TEST_KILLS     rounds of the kill -9 loop
 */
#include "store_small.h"
#define KEYS 40
#include "test.h"
#include "store_disk.h"

#include <sys/wait.h>

#ifdef TEST_ASAN
#define TRANSACTIONS 100 /* of one run */
#define STATES 10000
#define KILLS 50
#else
#define TRANSACTIONS 250
#define STATES 40000
#define KILLS 200
#endif
#define TRIED 8

static struct crash_run {
    uint64_t seed;
    struct disk disk, after, again; /* again: crashed while it was opened */
    struct model acked;             /* what surely is there */
    struct model tried[TRIED];      /* what may be instead: commits that were */
    int tried_count;                /* begun, and not refused */
    long point, checked, compactions, checkpoints, failed_syncs, refused;
    long split_syncs, split_dir_syncs;
    int subsets;
    long only_point;                /* -1: all */
    int only_variant;
} run;

/* ---- A crash ---- */

/* What stands in a sector that the file has got and nobody has written: zeros,
 * or what another file left there. */
static void crash_fill(const struct disk *d, const struct sector *s,
                       struct cube_buf *out)
{
    int other = (int)test_below((unsigned)d->inode_count);
    const struct cube_buf *old = &d->inodes[other].now;

    if (s->at >= out->len || other == s->inode)
        return;
    for (size_t i = s->at; i < s->at + s->len && i < out->len; i++)
        out->data[i] = i < old->len ? old->data[i] : (char)test_random();
}

/* The bytes of a file after a crash. keep: of each item, is it there? */
static void crash_file(const struct disk *d, int inode, const bool *keep,
                       struct cube_buf *out)
{
    const struct inode *n = &d->inodes[inode];
    bool has_garbage = test_below(4) == 0, has_length = test_below(4) == 0;

    cube_buf_clear(out);
    if (n->safe.len > 0)
        cube_buf_add(out, n->safe.data, n->safe.len);
    for (int i = 0; i < d->item_count; i++) {
        const struct sector *s = &d->items[i];

        if (s->inode == inode && keep[i])
            buf_put(out, s->bytes, s->len, s->at);
    }
    if (has_length && n->now.len > out->len)
        buf_put(out, "", 0, n->now.len);
    for (int i = 0; has_garbage && i < d->item_count; i++) {
        const struct sector *s = &d->items[i];

        if (s->inode == inode && !keep[i] && s->at >= n->safe.len)
            crash_fill(d, s, out);
    }
    for (int i = 0; has_garbage && i < d->item_count; i++) {
        const struct sector *s = &d->items[i]; /* over the garbage */

        if (s->inode == inode && keep[i])
            buf_put(out, s->bytes, s->len, s->at);
    }
}

/* Another disk: this one after a crash. */
static void crash(const struct disk *d, int dir, const bool *keep,
                  struct disk *out)
{
    const struct dir *names = &d->dirs[dir];

    disk_reset(out);
    for (int i = 0; i < names->count; i++) {
        struct inode *n = &out->inodes[out->inode_count];

        crash_file(d, names->e[i].inode, keep, &n->now);
        cube_buf_clear(&n->safe);
        if (n->now.len > 0)
            cube_buf_add(&n->safe, n->now.data, n->now.len);
        dir_set(&out->dirs[0], names->e[i].name, out->inode_count++);
    }
}

/* How many ways a crash has here: each subset of the sectors with each state
 * of the directory, or the two extremes and some. Few of those will do where
 * a write comes next: what it leaves to choose from contains all of this. */
static int crash_ways(const struct disk *d)
{
    if (d->item_count <= 6)
        return (1 << d->item_count) * d->dir_count;
    return 2 * d->dir_count + (d->is_writing ? run.subsets : 64);
}

/* Way number i of them. */
static void crash_in_way(const struct disk *d, int i, struct disk *out)
{
    bool *keep = cube_alloc((size_t)d->item_count + 1);
    int n = d->item_count, dir = i % d->dir_count, density, from;

    if (n <= 6) {
        for (int j = 0; j < n; j++)
            keep[j] = i / d->dir_count >> j & 1;
    } else if (i < 2 * d->dir_count) {
        memset(keep, i / d->dir_count, (size_t)n);
    } else {
        static const int densities[] = {8, 8, 2, 14};

        dir = (int)test_below((unsigned)d->dir_count);
        density = densities[test_below(COUNT(densities))];
        from = test_below(2) ? (int)test_below((unsigned)n) : 0;
        for (int j = 0; j < n; j++) /* what was first is there more often */
            keep[j] = j < from || (int)test_below(16) < density;
    }
    crash(d, dir, keep, out);
    cube_free(keep);
}

/* ---- What must hold after it ---- */

static bool is_state(struct cube_store *s, const struct model *m)
{
    bool same = true;

    for (int t = 0; t < TREES && same; t++) {
        struct cube_cursor *c = cube_cursor_open(s, tree_names[t], NULL);

        same = cursor_sees(c, m->v[t], run.checked % 2 == 0);
        cube_cursor_close(c);
    }
    return same;
}

/* The state that the store has, if it is one that it may have; or NULL. */
static const struct model *state_of(struct cube_store *s)
{
    if (is_state(s, &run.acked))
        return &run.acked;
    for (int i = 0; i < run.tried_count; i++) {
        if (is_state(s, &run.tried[i]))
            return &run.tried[i];
    }
    return NULL;
}

/* Opens what a crash has left; says in m which state that is. */
static void check_opens(struct disk *d, const struct model **m)
{
    struct cube_err err = {0};
    struct cube_store_options o = {.cache_bytes = 1};
    struct cube_store *s = cube_store_open(&d->world, "t", &o, &err);

    *m = NULL;
    run.checked++;
    if (!s) {
        FAIL("open: %s", err.text);
        return;
    }
    *m = state_of(s);
    if (!*m)
        FAIL("neither the last acknowledged commit nor one under way");
    if (cube_store_check(s, &err) < 0)
        FAIL("check: %s", err.text);
    cube_store_close(s);
}

/* Once a state was read by somebody no crash may take it away again; and
 * without one there is nothing left to drop. */
static void check_stays(struct disk *d, const struct model *m, bool is_lost)
{
    struct cube_store_stats stats;
    struct cube_store *s;
    struct cube_err err = {0};

    if (is_lost) {
        bool *keep = cube_alloc((size_t)d->item_count + 1);

        crash(d, 0, keep, &run.again);
        cube_free(keep);
        d = &run.again;
    }
    s = cube_store_open(&d->world, "t", NULL, &err);
    if (!s || !is_state(s, m))
        FAIL("another state when opened again: %s", err.text);
    if (s) {
        cube_store_stats(s, &stats);
        CHECK(is_lost || stats.dropped_bytes == 0);
        put(s, "goes", "on");
        commit(s);
    }
    cube_store_close(s);
    s = cube_store_open(&d->world, "t", NULL, &err);
    if (!s || !is_state(s, m) || strcmp(get(s, NULL, "goes"), "on") != 0)
        FAIL("the commit after the crash: %s", err.text);
    cube_store_close(s);
}

/* Crashes in the middle of the opening after a crash. */
static void crash_again(struct disk *d)
{
    const struct model *m;

    for (int i = 0; i < 3; i++) {
        int ways = crash_ways(d);

        crash_in_way(d, i < 2 ? i * (ways - 1)
                              : (int)test_below((unsigned)ways), &run.again);
        check_opens(&run.again, &m);
    }
}

/* One crash. Its random numbers depend on nothing but the seed and its name,
 * so that it can be repeated alone. */
static void crash_once(struct disk *d, int way)
{
    const struct model *m;
    char row[128];

    test_now.random = run.seed * 1000003 + (uint64_t)run.point * 509 +
                      (uint64_t)way;
    snprintf(row, sizeof row, "TEST_SEED=%llu CRASH_AT=%ld.%d",
             (unsigned long long)run.seed, run.point, way);
    test_row("%s", row);
    if (way < crash_ways(d))
        crash_in_way(d, way, &run.after);
    else
        disk_copy(d, &run.after);
    if (test_below(20) == 0)
        run.after.before = crash_again;
    check_opens(&run.after, &m);
    run.after.before = NULL;
    if (m)
        check_stays(&run.after, m, way == crash_ways(d) ||
                                   test_below(2) == 0);
}

static void crash_here(struct disk *d)
{
    uint64_t random = test_now.random;
    int ways = crash_ways(d), fails = d->sync_fails;

    run.point++;
    for (int i = 0; i <= ways; i++) { /* the last: the process dies */
        if (run.only_point >= 0 && (run.point != run.only_point ||
                                    i != run.only_variant))
            continue;
        if (test_now.faults == 0)
            crash_once(d, i);
    }
    d->sync_fails = fails;
    test_now.random = random;
}

/* ---- Transactions ---- */

static struct cube_store *run_open(void)
{
    struct cube_store_options o = {.cache_bytes = 1};
    struct cube_err err = {0};
    struct cube_store *s;

    o.is_sync_split = test_below(4) > 0;
    s = cube_store_open(&run.disk.world, "t", &o, &err);
    if (!s)
        FAIL("point %ld: %s", run.point, err.text);
    return s;
}

static void run_stats(struct cube_store *s)
{
    struct cube_store_stats stats;

    cube_store_stats(s, &stats);
    run.compactions += (long)stats.compactions;
    run.checkpoints += (long)stats.checkpoints;
}

/* What is found by a reader is certain from then on. */
static struct cube_store *run_reopen(struct cube_store *s)
{
    const struct model *m;

    run_stats(s);
    cube_store_close(s);
    s = run_open();
    if (!s)
        return NULL;
    m = state_of(s);
    if (!m) {
        FAIL("point %ld: opened with another state", run.point);
        return s;
    }
    run.acked = *m;
    run.tried_count = 0;
    return s;
}

static void run_slice(struct cube_store *s)
{
    struct disk *d = &run.disk;

    (void)cube_store_slice(s, test_below(4) == 0 ? 40 : 0);
    if (cube_store_slice_fd(s) < 0 || test_below(3) == 0)
        return;
    run.split_syncs++;
    run.split_dir_syncs += s->dir_fd >= 0;
    if (test_below(4) == 0)
        *(s->dir_fd >= 0 ? &d->dir_sync_fails : &d->sync_fails) = 1;
    cube_store_slice_synced(s, disk_sync(d, cube_store_slice_fd(s)));
}

/* Some of the disk's moods, for the next calls. */
static void run_weather(void)
{
    struct disk *d = &run.disk;

    d->clock_ms += test_below(2000);
    d->is_short = test_below(20) == 0;
    d->is_interrupted = test_below(20) == 0;
    d->is_evicting = test_below(2) == 0;
    d->fail_at = test_below(20) == 0 ? d->calls + 1 + (int)test_below(12) : 0;
    d->fail_errno = test_below(2) == 0 ? ENOSPC : EIO;
    d->sync_fails = test_below(30) == 0;
    d->dir_sync_fails = test_below(10) == 0;
}

/* Commits what is staged. A commit that was refused must not be found; one
 * whose sync failed may be. staged is what the store then has, with what was
 * staged on top meanwhile. */
static void run_commit(struct cube_store *s, struct model *staged)
{
    struct disk *d = &run.disk;
    struct model flight = *staged;
    struct cube_err err;
    int r;

    CHECK(run.tried_count < TRIED);
    if (run.tried_count < TRIED)
        run.tried[run.tried_count++] = flight;
    r = cube_store_commit_begin(s, &err);
    if (r < 0) {
        run.refused++;
        run.tried_count--;
        if (err.code == CUBE_EBUSY) /* it may be begun later */
            return;
        *staged = run.acked;
        return;
    }
    if (r > 0) {
        while (test_below(3) > 0)
            run_slice(s);
        while (test_below(3) == 0)
            change(s, staged);
        r = cube_store_commit_end(s, disk_sync(d, cube_store_fd(s)), NULL);
    }
    run.failed_syncs += r < 0;
    if (r < 0) {
        *staged = run.acked;
        return;
    }
    run.acked = flight;
    run.tried_count = 0;
}

/* Back to fair weather, so that a store that is broken gets a new file. */
static void run_mend(struct cube_store *s)
{
    struct disk *d = &run.disk;

    d->fail_at = d->sync_fails = d->dir_sync_fails = 0;
    for (int i = 0; i < 10000 && s->is_broken; i++) {
        d->clock_ms += 100;
        (void)cube_store_slice(s, 0);
        if (cube_store_slice_fd(s) >= 0)
            cube_store_slice_synced(s, disk_sync(d, cube_store_slice_fd(s)));
    }
    CHECK(!s->is_broken);
}

static void run_transactions(void)
{
    struct model staged = run.acked;
    struct cube_store *s = run_open();

    for (int i = 0; s && i < TRANSACTIONS && test_now.faults == 0; i++) {
        run_weather();
        for (int n = (int)test_below(8); n >= 0; n--)
            change(s, &staged);
        while (test_below(3) > 0)
            run_slice(s);
        if (test_below(12) == 0) {
            cube_store_rollback(s);
            staged = run.acked;
        } else {
            run_commit(s, &staged);
        }
        if (s->is_broken && (test_below(3) == 0 ||
                             run.tried_count == TRIED))
            run_mend(s);
        if (test_below(30) == 0) {
            (void)cube_store_compact(s, NULL);
            staged = run.acked;
        }
        run.disk.fail_at = run.disk.sync_fails = 0;
        run.disk.dir_sync_fails = 0;
        if (!state_of(s))
            FAIL("point %ld: readers do not see the last commit", run.point);
        if (test_below(25) == 0) {
            s = run_reopen(s);
            staged = run.acked;
        }
    }
    if (s) {
        run_stats(s);
        cube_store_close(s);
    }
    crash_here(&run.disk);
}

/* One run from its seed. */
static void run_from(uint64_t seed)
{
    run.seed = test_now.random = seed;
    run.point = run.tried_count = 0;
    memset(&run.acked, 0, sizeof run.acked);
    disk_reset(&run.disk);
    run.disk.before = crash_here;
    run_transactions();
    disk_reset(&run.disk);
}

TEST(every_crash_leaves_a_commit_not_older_than_the_last_acknowledged)
{
    const char *states = getenv("CRASH_STATES"), *at = getenv("CRASH_AT");
    const char *subsets = getenv("CRASH_SUBSETS");
    long want = STATES;
    int runs = 0;

    if (states && states[0])
        want = atol(states);
    memset(&run, 0, sizeof run);
    disk_init(&run.disk);
    disk_init(&run.after);
    disk_init(&run.again);
    run.only_point = -1;
    run.subsets = subsets ? atoi(subsets) : 8;
    if (at && sscanf(at, "%ld.%d", &run.only_point, &run.only_variant) == 2)
        want = 1;
    do
        run_from(test_now.seed + (uint64_t)runs++);
    while ((run.checked < want ||
            ((run.split_syncs < 4 || run.split_dir_syncs < 1 ||
              run.refused < 1) && runs < 8)) &&
           test_now.faults == 0 && run.only_point < 0);
    printf("crash: %ld states of %d runs; %ld checkpoints, %ld compactions, "
           "%ld syncs of theirs by us, %ld of those of the directory, %ld "
           "failed syncs, %ld refused commits among them\n", run.checked, runs,
           run.checkpoints, run.compactions, run.split_syncs,
           run.split_dir_syncs, run.failed_syncs, run.refused);
    if (run.only_point < 0 && test_now.faults == 0) {
        CHECK(run.checkpoints > TRANSACTIONS / 20);
        CHECK(run.compactions > TRANSACTIONS / 50);
        CHECK(run.split_syncs > 0);
        CHECK(run.split_dir_syncs > 0);
        CHECK(run.failed_syncs > 0);
        CHECK(run.refused > 0);
    }
    disk_free(&run.disk);
    disk_free(&run.after);
    disk_free(&run.again);
}

/* After a compaction, or at the end, a mark says that all before it is on disk,
 * and is not synced itself. The next process once built upon it: when the mark
 * was lost in a crash, and what came behind it was not, that was damage. */
TEST(a_mark_that_never_came_to_the_disk_is_not_missed)
{
    static struct disk d, next, after;

    for (size_t len = 0; len < 2 * SECTOR; len += CUBE_STORE_ALIGN) {
        static char val[1500];
        struct cube_store_stats stats;
        struct cube_store *s, *t;
        struct cube_buf got = {0};
        bool *keep;
        int marks;

        test_row("a value of %zu bytes", len);
        disk_init(&d);
        disk_init(&next);
        disk_init(&after);
        s = must_open(&d.world, "t");
        CHECK_INT(cube_store_put(s, "t", "a", 1, val, len, NULL), 0);
        commit(s);
        CHECK_INT(cube_store_compact(s, NULL), 0);
        disk_copy(&d, &next); /* the process dies, and the next one goes on */
        marks = next.item_count;
        t = must_open(&next.world, "t");
        CHECK_INT(cube_store_put(t, "t", "b", 1, val, sizeof val, NULL), 0);
        CHECK_INT(cube_store_commit_begin(t, NULL), 1);
        keep = cube_alloc((size_t)next.item_count);
        memset(keep + marks, 1, (size_t)(next.item_count - marks));
        crash(&next, 0, keep, &after); /* and so does the machine */
        cube_store_close(t);
        cube_store_close(s);
        s = must_open(&after.world, "t");
        REQUIRE(s);
        CHECK_INT(cube_store_check(s, NULL), 0);
        CHECK_INT(cube_store_get(s, "t", "a", 1, &got, NULL), 1);
        CHECK_UINT(got.len, len);
        cube_store_stats(s, &stats);
        CHECK_UINT(stats.commits, 2);
        put(s, "goes", "on");
        commit(s);
        CHECK_INT(cube_store_check(s, NULL), 0);
        cube_store_close(s);
        cube_buf_free(&got);
        cube_free(keep);
        disk_free(&d);
        disk_free(&next);
        disk_free(&after);
    }
}

/* ---- The real disk ----
 *
 * A writer is killed at a time of its own choosing: somewhere in or after the
 * commit that follows the one whose key was read last. */

/* Puts n, n + 1, ... into commits of their own, and says so after each. */
static void write_until_killed(const char *path, uint32_t n, int out)
{
    struct cube_store_options o = {.cache_bytes = 1};
    struct cube_store *s = cube_store_open(NULL, path, &o, NULL);
    char val[300] = "", key[16];

    for (; s; n++) {
        snprintf(key, sizeof key, "%08u", n);
        if (cube_store_put(s, "t", key, 8, val, n % sizeof val, NULL) < 0 ||
            cube_store_put(s, "t", "last", 4, &n, 4, NULL) < 0 ||
            cube_store_commit(s, NULL) < 0 ||
            write(out, &n, sizeof n) != (ssize_t)sizeof n)
            break;
        (void)cube_store_slice(s, 1);
    }
    _exit(1);
}

TEST(kill_9_loses_nothing_that_was_acknowledged)
{
    const char *rounds = getenv("TEST_KILLS"), *path = test_path();
    uint32_t next = 0;

    for (int i = 0; i < (rounds ? atoi(rounds) : KILLS); i++) {
        uint32_t acked = next, last = 0, n;
        int pipe_fds[2], acks = 1 + (int)test_below(12), status;
        struct cube_buf got = {0};
        struct cube_store *s;
        char key[16];
        pid_t pid;

        test_row("round %d, killed after %d commits", i, acks);
        REQUIRE(pipe(pipe_fds) == 0);
        pid = fork();
        if (pid == 0)
            write_until_killed(path, next, pipe_fds[1]);
        close(pipe_fds[1]);
        while (read(pipe_fds[0], &n, sizeof n) == (ssize_t)sizeof n) {
            acked = n + 1;
            if (--acks == 0)
                kill(pid, SIGKILL);
        }
        waitpid(pid, &status, 0);
        close(pipe_fds[0]);
        CHECK(WIFSIGNALED(status));
        s = must_open(NULL, path);
        REQUIRE(s); /* its lock went with the process */
        CHECK_INT(cube_store_check(s, NULL), 0);
        REQUIRE(cube_store_get(s, "t", "last", 4, &got, NULL) == 1);
        memcpy(&last, got.data, 4);
        CHECK(last + 1 == acked || last == acked); /* or one more */
        next = last + 1;
        for (n = 0; n < next; n++) {
            snprintf(key, sizeof key, "%08u", n);
            if (cube_store_get(s, "t", key, 8, &got, NULL) != 1 ||
                got.len != n % 300)
                FAIL("key %u is gone", n);
        }
        cube_buf_free(&got);
        cube_store_close(s);
    }
}
