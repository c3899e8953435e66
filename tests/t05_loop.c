/* Chapter 5: the order of a turn; watches, timers, deferred calls, jobs; the
 * commit point. */
#include "test.h"
#include "store_disk.h"
#include <poll.h>

/* ---- A world whose clock the test turns ---- */

static int64_t clock_ms;

static int64_t virtual_now_ms(void *ctx)
{
    (void)ctx;
    return clock_ms;
}

static struct cube_world virtual_world(void)
{
    struct cube_world w = *cube_world_real();

    clock_ms = 1000000;
    w.now_ms = virtual_now_ms;
    return w;
}

/* What ran, as text: each callback adds its letter. */
static char trace[4096];

static void note(const char *text)
{
    strncat(trace, text, sizeof trace - strlen(trace) - 1);
}

static void note_it(void *arg)
{
    note(arg);
}

static struct cube_loop *open_loop(const struct cube_world *w)
{
    trace[0] = 0;
    return cube_loop_new(w, NULL);
}

/* ---- Timers ---- */

#define TIMERS 300

struct numbered {
    struct cube_timer timer;
    int64_t at_ms;   /* the model: when it is due, and its place among equals */
    int order, number;
    bool is_set;
};

static int fired[TIMERS], fired_count;

static void fire(void *arg)
{
    struct numbered *n = arg;

    n->is_set = false;
    fired[fired_count++] = n->number;
}

static int by_time_then_order(const void *a, const void *b)
{
    const struct numbered *x = *(struct numbered *const *)a;
    const struct numbered *y = *(struct numbered *const *)b;

    if (x->at_ms != y->at_ms)
        return x->at_ms < y->at_ms ? -1 : 1;
    return x->order < y->order ? -1 : 1;
}

TEST(timers_run_by_time_and_equal_ones_in_the_order_set)
{
    struct cube_world w = virtual_world();
    struct cube_loop *l = open_loop(&w);
    static struct numbered all[TIMERS];
    struct numbered *sorted[TIMERS];
    int count = 0;

    memset(all, 0, sizeof all);
    fired_count = 0;
    for (int step = 0; step < 3000; step++) {   /* set, move and clear */
        struct numbered *n = &all[test_below(TIMERS)];

        n->number = (int)(n - all);
        n->is_set = test_below(4) != 0;
        if (!n->is_set) {
            cube_timer_clear(l, &n->timer);
            continue;
        }
        n->at_ms = test_below(50);
        n->order = step;
        cube_timer_set(l, &n->timer, n->at_ms, fire, n);
    }
    for (int i = 0; i < TIMERS; i++) {
        CHECK_INT(cube_timer_is_set(&all[i].timer), all[i].is_set);
        if (all[i].is_set)
            sorted[count++] = &all[i];
    }
    qsort(sorted, (size_t)count, sizeof *sorted, by_time_then_order);
    for (; clock_ms <= 1000060; clock_ms += 7)
        CHECK_INT(cube_loop_turn(l, 0, NULL), 0);
    CHECK_INT(fired_count, count);
    for (int i = 0; i < count && i < fired_count; i++)
        CHECK_INT(fired[i], sorted[i]->number);
    cube_loop_free(l);
}

static void check_heap(const struct cube_loop *l, const char *want)
{
    char text[100] = "";

    for (size_t i = 0; i < l->heap_len; i++)
        (void)snprintf(text + strlen(text), sizeof text - strlen(text),
                       " %d", (int)(l->heap[i]->at_ms - clock_ms));
    CHECK_STR(text, want);
}

/* The drawing at cube_heap_settle. */
TEST(a_timer_leaves_the_heap_as_it_is_drawn)
{
    static const int in_ms[] = {10, 30, 40, 70, 50, 90};
    struct cube_world w = virtual_world();
    struct cube_loop *l = open_loop(&w);
    struct cube_timer timers[6] = {0};

    for (int i = 0; i < 6; i++)
        cube_timer_set(l, &timers[i], in_ms[i], note_it, "");
    check_heap(l, " 10 30 40 70 50 90");
    cube_timer_clear(l, &timers[0]);
    check_heap(l, " 30 50 40 70 90");
    cube_loop_free(l);
}

struct rearm {
    struct cube_loop *loop;
    struct cube_timer timer, victim;
};

static void arm_for_now(void *arg)
{
    struct rearm *r = arg;

    note("r");
    cube_timer_clear(r->loop, &r->victim);
    cube_timer_set(r->loop, &r->timer, 0, arm_for_now, r);
}

TEST(a_timer_set_for_now_by_a_timer_waits_for_the_next_turn)
{
    struct cube_world w = virtual_world();
    struct rearm r = {.loop = open_loop(&w)};
    struct cube_timer other = {0};

    cube_timer_set(r.loop, &r.timer, 10, arm_for_now, &r);
    cube_timer_set(r.loop, &r.victim, 10, note_it, "v");
    cube_timer_set(r.loop, &other, 10, note_it, "o");
    clock_ms += 9;
    CHECK_INT(cube_loop_timeout_ms(r.loop), 1);
    cube_loop_turn(r.loop, 0, NULL);
    CHECK_STR(trace, "");         /* a millisecond early is early */
    clock_ms += 1;
    cube_loop_turn(r.loop, 0, NULL);
    CHECK_STR(trace, "ro");       /* the victim was cleared by the first */
    CHECK_INT(cube_loop_timeout_ms(r.loop), 0);
    cube_loop_turn(r.loop, -1, NULL);
    CHECK_STR(trace, "ror");
    cube_loop_free(r.loop);
}

TEST(a_loop_with_nothing_to_do_has_no_timeout)
{
    struct cube_world w = virtual_world();
    struct cube_loop *l = open_loop(&w);
    struct cube_timer t = {0};

    CHECK_INT(cube_loop_timeout_ms(l), -1);
    cube_timer_set(l, &t, 250, note_it, "t");
    CHECK_INT(cube_loop_timeout_ms(l), 250);
    clock_ms += 1000;
    CHECK_INT(cube_loop_timeout_ms(l), 0);
    cube_timer_set(l, &t, (int64_t)1 << 40, note_it, "t");
    CHECK_INT(cube_loop_timeout_ms(l), INT_MAX);
    cube_timer_set(l, &t, -5, note_it, "t");   /* the past is now */
    CHECK_INT(cube_loop_timeout_ms(l), 0);
    cube_timer_clear(l, &t);
    cube_timer_clear(l, &t);
    CHECK_INT(cube_loop_timeout_ms(l), -1);
    cube_loop_free(l);
}

/* ---- Deferred calls ---- */

struct again {
    struct cube_loop *loop;
    struct cube_defer self, later, victim;
};

static void defer_more(void *arg)
{
    struct again *a = arg;

    note("a");
    cube_defer_set(a->loop, &a->self, defer_more, a);
    cube_defer_set(a->loop, &a->later, note_it, "l");
    cube_defer_clear(a->loop, &a->victim);
}

TEST(deferred_calls_run_in_order_and_later_ones_in_the_next_turn)
{
    struct cube_world w = virtual_world();
    struct again a = {.loop = open_loop(&w)};
    struct cube_defer first = {0}, last = {0};

    cube_defer_set(a.loop, &first, note_it, "1");
    cube_defer_set(a.loop, &a.self, defer_more, &a);
    cube_defer_set(a.loop, &a.victim, note_it, "v");
    cube_defer_set(a.loop, &last, note_it, "2");
    cube_defer_set(a.loop, &first, note_it, "1");   /* queued once */
    CHECK_INT(cube_loop_timeout_ms(a.loop), 0);
    CHECK_STR(trace, "");         /* never before the call has returned */
    cube_loop_turn(a.loop, -1, NULL);
    CHECK_STR(trace, "1a2");
    cube_loop_turn(a.loop, -1, NULL);
    CHECK_STR(trace, "1a2al");
    cube_defer_clear(a.loop, &a.later);
    cube_defer_clear(a.loop, &a.self);
    cube_defer_clear(a.loop, &a.self);
    CHECK_INT(cube_loop_timeout_ms(a.loop), -1);
    cube_defer_set(a.loop, &first, note_it, "3");   /* the queue still works */
    cube_loop_turn(a.loop, -1, NULL);
    CHECK_STR(trace, "1a2al3");
    cube_loop_free(a.loop);
}

/* ---- Watches ---- */

struct ear {
    struct cube_loop *loop;
    struct cube_watch watch, *victim;
    const char *name;
    unsigned events;
};

static void hear(void *arg, unsigned events)
{
    struct ear *e = arg;

    note(e->name);
    e->events = events;
    if (e->victim)
        cube_watch_clear(e->loop, e->victim);
}

TEST(a_turn_does_descriptors_then_timers_then_deferred_calls)
{
    struct cube_world w = virtual_world();
    struct ear e = {.loop = open_loop(&w), .name = "w"};
    struct cube_timer t = {0};
    struct cube_defer d = {0};
    int fd[2];

    REQUIRE(socketpair(AF_UNIX, SOCK_STREAM, 0, fd) == 0);
    CHECK_INT(cube_watch_set(e.loop, &e.watch, fd[0], CUBE_READ, hear, &e), 0);
    cube_defer_set(e.loop, &d, note_it, "d");
    cube_timer_set(e.loop, &t, 0, note_it, "t");
    CHECK(write(fd[1], "x", 1) == 1);
    cube_loop_turn(e.loop, -1, NULL);
    CHECK_STR(trace, "wtd");
    CHECK_INT(e.events, CUBE_READ);
    cube_watch_clear(e.loop, &e.watch);
    close(fd[0]);
    close(fd[1]);
    cube_loop_free(e.loop);
}

TEST(a_watch_reports_what_it_was_set_for)
{
    struct cube_world w = virtual_world();
    struct ear e = {.loop = open_loop(&w), .name = "e"};
    int fd[2];

    REQUIRE(socketpair(AF_UNIX, SOCK_STREAM, 0, fd) == 0);
    cube_watch_set(e.loop, &e.watch, fd[0], CUBE_READ, hear, &e);
    cube_loop_turn(e.loop, 0, NULL);
    CHECK_STR(trace, "");         /* nothing to read yet */
    cube_watch_set(e.loop, &e.watch, fd[0], CUBE_WRITE, hear, &e);
    cube_loop_turn(e.loop, 0, NULL);
    CHECK_INT(e.events, CUBE_WRITE);
    close(fd[1]);
    cube_watch_set(e.loop, &e.watch, fd[0], CUBE_READ, hear, &e);
    cube_loop_turn(e.loop, 0, NULL);
    CHECK(e.events & CUBE_READ);  /* its end can be read */
    CHECK(e.events & CUBE_HANGUP);
    cube_watch_clear(e.loop, &e.watch);
    cube_watch_clear(e.loop, &e.watch);
    cube_loop_turn(e.loop, 0, NULL);
    CHECK_STR(trace, "ee");
    close(fd[0]);
    cube_loop_free(e.loop);
}

TEST(a_watch_cleared_in_the_same_batch_is_not_called)
{
    struct cube_world w = virtual_world();
    struct cube_loop *l = open_loop(&w);
    struct ear a = {.loop = l, .name = "x"}, b = {.loop = l, .name = "x"};
    int fd[2];

    a.victim = &b.watch;          /* whichever is first clears the other */
    b.victim = &a.watch;
    REQUIRE(socketpair(AF_UNIX, SOCK_STREAM, 0, fd) == 0);
    cube_watch_set(l, &a.watch, fd[0], CUBE_WRITE, hear, &a);
    cube_watch_set(l, &b.watch, fd[1], CUBE_WRITE, hear, &b);
    cube_loop_turn(l, 0, NULL);
    CHECK_STR(trace, "x");
    cube_watch_clear(l, &a.watch);
    cube_watch_clear(l, &b.watch);
    close(fd[0]);
    close(fd[1]);
    cube_loop_free(l);
}

/* Closes the other's descriptor and opens another, which gets its number:
 * what was collected for the old one must not reach the new one. */
struct swap {
    struct cube_loop *loop;
    struct swap *other;
    struct cube_watch watch;
    struct ear heir;
    int fd;
    bool is_done;
};

static void swap_other(void *arg, unsigned events)
{
    struct swap *s = arg;
    int spare[2];

    (void)events;
    note("s");
    if (s->is_done)
        return;
    s->is_done = s->other->is_done = true;
    cube_watch_clear(s->loop, &s->other->watch);
    close(s->other->fd);
    if (pipe(spare) < 0)          /* [0] takes the free number */
        abort();
    CHECK_INT(spare[0], s->other->fd);
    s->heir.name = "h";
    cube_watch_set(s->loop, &s->heir.watch, spare[0], CUBE_READ, hear,
                   &s->heir);
    close(spare[1]);
    s->other->fd = spare[0];
}

TEST(a_reused_descriptor_number_is_not_mistaken_for_the_old_one)
{
    struct cube_world w = virtual_world();
    struct cube_loop *l = open_loop(&w);
    struct swap a = {.loop = l}, b = {.loop = l, .other = &a};
    int fd[2];

    a.other = &b;
    REQUIRE(socketpair(AF_UNIX, SOCK_STREAM, 0, fd) == 0);
    a.fd = fd[0];
    b.fd = fd[1];
    cube_watch_set(l, &a.watch, a.fd, CUBE_WRITE, swap_other, &a);
    cube_watch_set(l, &b.watch, b.fd, CUBE_WRITE, swap_other, &b);
    cube_loop_turn(l, 0, NULL);
    CHECK_STR(trace, "s");
    cube_loop_turn(l, 0, NULL);
    CHECK_HAS(trace, "h");        /* the new one's own events do come */
    cube_watch_clear(l, &a.watch);
    cube_watch_clear(l, &b.watch);
    cube_watch_clear(l, &a.heir.watch);
    cube_watch_clear(l, &b.heir.watch);
    close(a.fd);
    close(b.fd);
    cube_loop_free(l);
}

/* ---- Running ---- */

static void stop_loop(void *arg)
{
    cube_loop_stop(arg);
}

static void *wake_from_thread(void *arg)
{
    cube_loop_wake(arg);
    return NULL;
}

TEST(run_ends_with_stop_and_wake_comes_from_any_thread)
{
    struct cube_loop *l = open_loop(cube_world_real());
    struct cube_timer t = {0};
    pthread_t thread;

    cube_timer_set(l, &t, 1, stop_loop, l);
    CHECK_INT(cube_loop_run(l, NULL), 0);
    REQUIRE(pthread_create(&thread, NULL, wake_from_thread, l) == 0);
    CHECK_INT(cube_loop_turn(l, -1, NULL), 0);   /* returns at all */
    pthread_join(thread, NULL);
    cube_loop_free(l);
}

TEST(a_main_loop_of_ones_own_can_drive_it)
{
    struct cube_loop *l = open_loop(cube_world_real());
    struct ear e = {.loop = l, .name = "e"};
    struct pollfd p = {.fd = cube_loop_fd(l), .events = POLLIN};
    int fd[2];

    REQUIRE(socketpair(AF_UNIX, SOCK_STREAM, 0, fd) == 0);
    cube_watch_set(l, &e.watch, fd[0], CUBE_READ, hear, &e);
    CHECK_INT(poll(&p, 1, 0), 0);
    CHECK(write(fd[1], "x", 1) == 1);
    CHECK_INT(poll(&p, 1, 1000), 1);
    cube_loop_turn(l, 0, NULL);
    CHECK_STR(trace, "e");
    cube_watch_clear(l, &e.watch);
    close(fd[0]);
    close(fd[1]);
    cube_loop_free(l);
}

static void keep_log(void *arg, enum cube_level level, const char *text)
{
    (void)arg;
    note(level == CUBE_WARN ? "warn:" : "?");
    note(text);
}

TEST(words_for_the_operator_go_where_they_are_wanted)
{
    struct cube_loop *l = open_loop(cube_world_real());

    cube_log(l, CUBE_WARN, "nobody hears %d", 1);
    cube_loop_set_log(l, keep_log, NULL);
    cube_log(l, CUBE_WARN, "node %s is lost", "a");
    CHECK_STR(trace, "warn:node a is lost");
    cube_loop_free(l);
}

/* Nobody waits for a compaction, so nobody was told once that it failed. */
TEST(background_work_of_a_store_that_fails_is_told_once_a_minute)
{
    static struct disk d;
    static char val[100000];
    struct cube_world w = virtual_world();
    struct cube_loop *l = open_loop(&w);
    struct cube_commit *c;
    struct cube_store *s;

    disk_init(&d);
    d.is_forgetful = false;
    s = must_open(&d.world, "t");
    while (!cube_store_comp_is_due(s)) {
        CHECK_INT(cube_store_put(s, "t", "a", 1, val, sizeof val, NULL), 0);
        commit(s);
    }
    cube_loop_set_log(l, keep_log, NULL);
    c = cube_commit_open(l, s);
    d.fail_at = d.calls + 1;
    d.is_fail_forever = true;
    d.fail_errno = ENOSPC;
    for (int i = 0; i < 5; i++)
        REQUIRE(cube_loop_turn(l, 0, NULL) == 0);
    CHECK_HAS(trace, "warn:background work on the store failed");
    CHECK_HAS(trace, "No space left on device");
    CHECK(!strstr(trace + 1, "warn:"));
    (void)cube_fail(&s->last, CUBE_EIO, "another reason");
    REQUIRE(cube_loop_turn(l, 0, NULL) == 0);
    CHECK(!strstr(trace, "another reason"));
    clock_ms += CUBE_COMPLAIN_MS;
    REQUIRE(cube_loop_turn(l, 0, NULL) == 0);
    CHECK_HAS(trace, "another reason");
    cube_commit_close(c);
    cube_loop_free(l);
    cube_store_close(s);
    disk_free(&d);
}

/* ---- Jobs ---- */

struct work {
    struct cube_loop *loop;
    struct cube_loop_job *victim;
    struct cube_loop_job job;
    int done, result;
};

static void job_done(void *arg, struct cube_job *job)
{
    struct work *work = arg;

    work->done++;
    work->result = job->result;
    note("j");
    if (work->victim) {
        cube_loop_job_cancel(work->loop, work->victim);
        memset(work->victim, 0xee, sizeof *work->victim);   /* as freed */
    }
}

static void turn_until_done(struct work *work)
{
    while (!work->done)
        REQUIRE(cube_loop_turn(work->loop, -1, NULL) == 0);
}

TEST(a_sync_is_reported_later_and_once)
{
    struct work work = {.loop = open_loop(cube_world_real())};
    char path[400];
    int fd;

    snprintf(path, sizeof path, "%s/f", test_dir());
    fd = open(path, O_RDWR | O_CREAT, 0600);
    REQUIRE(fd >= 0 && write(fd, "x", 1) == 1);
    work.job.job.kind = CUBE_JOB_SYNC;
    work.job.job.fd = fd;
    CHECK_INT(cube_loop_job_start(work.loop, &work.job, job_done, &work), 0);
    CHECK_INT(work.done, 0);
    turn_until_done(&work);
    CHECK_INT(work.result, 0);
    cube_loop_turn(work.loop, 0, NULL);
    CHECK_INT(work.done, 1);
    work.done = 0;
    work.job.job.fd = -1;
    CHECK_INT(cube_loop_job_start(work.loop, &work.job, job_done, &work), 0);
    turn_until_done(&work);
    CHECK_INT(work.result, -EBADF);
    close(fd);
    cube_loop_free(work.loop);
}

TEST(names_become_addresses)
{
    static const struct { const char *host; int want; const char *why; }
    rows[] = {
        { "127.0.0.1", 1, "a literal" },
        { "::1", 1, "a literal of the other kind" },
        { "localhost", 1, "a name" },
        { "no such name", 0, "no name at all" },
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct work work = {.loop = open_loop(cube_world_real())};

        test_row("%s: %s", rows[i].host, rows[i].why);
        CHECK_INT(cube_resolve_start(work.loop, &work.job, rows[i].host,
                                     job_done, &work), 0);
        turn_until_done(&work);
        CHECK_INT(work.job.job.addr_count > 0, rows[i].want);
        CHECK_INT(work.result == 0, rows[i].want);
        if (i == 0) {
            CHECK_INT(work.job.job.addrs[0].kind, CUBE_ADDR_IP4);
            CHECK_MEM(work.job.job.addrs[0].ip, "\x7f\x00\x00\x01", 4);
        }
        cube_loop_free(work.loop);
    }
}

TEST(a_cancelled_job_is_never_reported)
{
    struct work work = {.loop = open_loop(cube_world_real())};
    struct work next = {.loop = work.loop};

    CHECK_INT(cube_resolve_start(work.loop, &work.job, "localhost", job_done,
                                 &work), 0);
    cube_loop_job_cancel(work.loop, &work.job);
    cube_loop_job_cancel(work.loop, &work.job);
    memset(&work.job, 0xee, sizeof work.job);
    /* one helper does them in turn, so after this one the first is done */
    CHECK_INT(cube_resolve_start(work.loop, &next.job, "localhost", job_done,
                                 &next), 0);
    turn_until_done(&next);
    cube_loop_turn(work.loop, 0, NULL);
    CHECK_INT(work.done, 0);
    cube_loop_free(work.loop);
}

/* The real world's, but it waits until two jobs can be reported at once. */
static int poll_two(void *ctx, struct cube_poll *p, struct cube_ready *out,
                    int max, int timeout_ms)
{
    int n = 0;

    while (n >= 0 && n < 2 && timeout_ms != 0) {
        int more = cube_world_real()->poll_wait(ctx, p, out + n, max - n,
                                                timeout_ms);
        n = more < 0 ? more : n + more;
    }
    return n;
}

TEST(a_job_cancelled_by_another_of_its_batch_is_not_reported)
{
    struct cube_world w = *cube_world_real();
    struct work a = {0}, b = {0};

    w.poll_wait = poll_two;
    a.loop = b.loop = open_loop(&w);
    a.victim = &b.job;            /* whichever is first cancels the other */
    b.victim = &a.job;
    CHECK_INT(cube_resolve_start(a.loop, &a.job, "127.0.0.1", job_done, &a),
              0);
    CHECK_INT(cube_resolve_start(b.loop, &b.job, "127.0.0.1", job_done, &b),
              0);
    cube_loop_turn(a.loop, -1, NULL);
    CHECK_STR(trace, "j");
    CHECK_INT(a.done + b.done, 1);
    cube_loop_free(a.loop);
}

TEST(a_loop_may_be_freed_while_a_job_is_under_way)
{
    for (int i = 0; i < 50; i++) {
        struct work work = {.loop = open_loop(cube_world_real())};

        CHECK_INT(cube_resolve_start(work.loop, &work.job, "localhost",
                                     job_done, &work), 0);
        if (i % 2)
            cube_loop_job_cancel(work.loop, &work.job);
        cube_loop_free(work.loop);
        CHECK_INT(work.done, 0);
    }
}

/* ---- The commit point ---- */

/* The syncs of this world are done when the test says so. */
static struct cube_job *sync_job;
static int syncs;
static bool is_sync_done;
static int write_error;

static int held_job_start(void *ctx, struct cube_poll *p, struct cube_job *job)
{
    (void)ctx;
    (void)p;
    sync_job = job;
    syncs++;
    return 0;
}

static void held_job_cancel(void *ctx, struct cube_poll *p,
                            struct cube_job *job)
{
    (void)ctx;
    (void)p;
    if (sync_job == job)
        sync_job = NULL;
}

static int held_poll_wait(void *ctx, struct cube_poll *p,
                          struct cube_ready *out, int max, int timeout_ms)
{
    if (!sync_job || !is_sync_done)
        return cube_world_real()->poll_wait(ctx, p, out, max, timeout_ms);
    memset(out, 0, sizeof *out);
    out->job = sync_job;
    sync_job = NULL;
    is_sync_done = false;
    return 1;
}

static int64_t failing_pwrite(void *ctx, int fd, const void *buf, size_t len,
                              int64_t at)
{
    return write_error ? write_error
                       : cube_world_real()->pwrite(ctx, fd, buf, len, at);
}

/* A store in a file of the test's directory, or in memory, and its commits. */
struct ledger {
    struct cube_world w;
    struct cube_loop *loop;
    struct cube_store *store;
    struct cube_commit *commit;
};

static void open_commits(struct ledger *t, bool is_file)
{
    struct cube_store_options o = {.is_sync_split = true};
    char path[512];

    sync_job = NULL;
    syncs = write_error = 0;
    is_sync_done = false;
    t->w = virtual_world();
    t->w.job_start = held_job_start;
    t->w.job_cancel = held_job_cancel;
    t->w.poll_wait = held_poll_wait;
    t->w.pwrite = failing_pwrite;
    t->loop = open_loop(&t->w);
    if (is_file)
        snprintf(path, sizeof path, "%s/a.cube", test_dir());
    t->store = cube_store_open(&t->w, is_file ? path : NULL, &o, NULL);
    REQUIRE(t->store);
    t->commit = cube_commit_open(t->loop, t->store);
}

static void close_commits(struct ledger *t)
{
    cube_commit_close(t->commit);
    cube_store_close(t->store);
    cube_loop_free(t->loop);
}

static void stage(struct ledger *t, const char *key)
{
    CHECK_INT(cube_store_put(t->store, "t", key, strlen(key), "1", 1, NULL),
              0);
}

static bool has(struct ledger *t, const char *key)
{
    struct cube_buf value = {0};
    int r = cube_store_get(t->store, "t", key, strlen(key), &value, NULL);

    cube_buf_free(&value);
    return r == 1;
}

/* Who waits; "a" in the trace when it is told that all went well, "a!7" when
 * it is told of an error of code 7. One with `again` stages that key, and waits
 * once more, from inside its callback. */
struct waiter {
    struct cube_commit_wait wait;
    struct ledger *ledger;
    const char *name, *again;
};

static void wait_for(struct ledger *t, struct waiter *w, const char *name);

static void told(void *arg, const struct cube_err *err)
{
    struct waiter *w = arg;
    const char *again = w->again;
    char text[32];

    snprintf(text, sizeof text, err ? "%s!%d " : "%s ", w->name,
             err ? (int)err->code : 0);
    note(text);
    if (again) {
        w->again = NULL;
        stage(w->ledger, again);
        wait_for(w->ledger, w, again);
    }
}

static void wait_for(struct ledger *t, struct waiter *w, const char *name)
{
    w->ledger = t;
    w->name = name;
    cube_commit_wait(t->commit, &w->wait, told, w);
}

static void finish_sync(struct ledger *t, int result)
{
    REQUIRE(sync_job);
    sync_job->result = result;
    is_sync_done = true;
    cube_loop_turn(t->loop, 0, NULL);
}

TEST(all_that_a_turn_stages_is_one_commit_and_the_next_one_fills_meanwhile)
{
    struct ledger t;
    struct waiter a = {0}, b = {0}, c = {0}, d = {0};

    open_commits(&t, true);
    stage(&t, "a");
    wait_for(&t, &a, "a");
    stage(&t, "b");
    wait_for(&t, &b, "b");
    CHECK_INT(syncs, 0);
    cube_loop_turn(t.loop, 0, NULL);    /* turn 1 of the drawing */
    CHECK_INT(syncs, 1);
    stage(&t, "c");
    wait_for(&t, &c, "c");
    cube_loop_turn(t.loop, 0, NULL);    /* turn 2 */
    stage(&t, "d");
    wait_for(&t, &d, "d");
    CHECK_INT(syncs, 1);
    CHECK_STR(trace, "");
    finish_sync(&t, 0);                 /* turn 3 */
    CHECK_STR(trace, "a b ");
    CHECK_INT(syncs, 2);
    finish_sync(&t, 0);
    CHECK_STR(trace, "a b c d ");
    CHECK_INT(cube_loop_timeout_ms(t.loop), -1);
    close_commits(&t);
}

TEST(who_waits_while_nothing_is_staged_is_told_at_the_end_of_the_turn)
{
    struct ledger t;
    struct waiter a = {0}, b = {0};

    open_commits(&t, true);
    wait_for(&t, &a, "a");
    wait_for(&t, &b, "b");
    cube_commit_forget(&b.wait);
    CHECK_STR(trace, "");
    cube_loop_turn(t.loop, 0, NULL);
    CHECK_STR(trace, "a ");
    CHECK_INT(syncs, 0);
    close_commits(&t);
}

TEST(a_commit_that_fails_is_dropped_whole_and_all_are_told)
{
    struct ledger t;
    struct waiter a = {0}, b = {0}, c = {0};
    struct cube_err why;
    char want[64];

    open_commits(&t, true);
    stage(&t, "a");
    wait_for(&t, &a, "a");
    write_error = -ENOSPC;              /* nothing can be written */
    cube_loop_turn(t.loop, 0, NULL);
    snprintf(want, sizeof want, "a!%d ", (int)CUBE_ENOSPC);
    CHECK_STR(trace, want);
    CHECK(!has(&t, "a"));
    write_error = 0;

    trace[0] = 0;                       /* a part could not be staged */
    stage(&t, "a");
    wait_for(&t, &a, "a");
    cube_fail(&why, CUBE_ETOOBIG, "too much");
    cube_commit_refuse(t.commit, &why);
    cube_fail(&why, CUBE_EINVAL, "the first reason counts");
    cube_commit_refuse(t.commit, &why);
    cube_loop_turn(t.loop, 0, NULL);
    snprintf(want, sizeof want, "a!%d ", (int)CUBE_ETOOBIG);
    CHECK_STR(trace, want);
    CHECK(!has(&t, "a"));
    CHECK_INT(syncs, 0);

    trace[0] = 0;                       /* nobody knows of a, b was built on */
    stage(&t, "a");
    wait_for(&t, &a, "a");
    cube_loop_turn(t.loop, 0, NULL);
    stage(&t, "b");
    wait_for(&t, &b, "b");
    cube_loop_turn(t.loop, 0, NULL);
    finish_sync(&t, -EIO);
    snprintf(want, sizeof want, "a!%d b!%d ", (int)CUBE_ESYNC,
             (int)CUBE_ESYNC);
    CHECK_STR(trace, want);
    CHECK(!has(&t, "a") && !has(&t, "b"));

    trace[0] = 0;                       /* the end of it all */
    wait_for(&t, &c, "c");
    close_commits(&t);
    snprintf(want, sizeof want, "c!%d ", (int)CUBE_ECANCELED);
    CHECK_STR(trace, want);
}

/* Callbacks of a commit that needs no sync run at the very end of a turn: what
 * they ask for lay there until something else woke the loop. */
TEST(who_waits_again_when_told_is_told_without_anything_else_happening)
{
    static const struct {
        bool is_file;
        int error;
        const char *reason;
    } rows[] = {
        {false, 0, "in memory"},
        {true, -ENOSPC, "not written"},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct waiter a = {.again = "b"};
        struct ledger t;

        test_row("row %zu, %s", i, rows[i].reason);
        open_commits(&t, rows[i].is_file);
        write_error = rows[i].error;
        stage(&t, "a");
        wait_for(&t, &a, "a");
        cube_loop_turn(t.loop, 0, NULL);
        CHECK_INT(trace[0], 'a');
        write_error = 0;
        CHECK(!strchr(trace, 'b'));     /* it waits for the next commit */
        CHECK_INT(cube_loop_timeout_ms(t.loop), 0);
        cube_loop_turn(t.loop, 0, NULL);
        if (rows[i].is_file)
            finish_sync(&t, 0);
        CHECK_HAS(trace, "b ");
        CHECK(has(&t, "b"));
        CHECK_INT(cube_loop_timeout_ms(t.loop), -1);
        close_commits(&t);
    }
}

/* The world of a loop that must not wait for the disk. */
static int syncs_here;

static int sync_here(void *ctx, int fd)
{
    syncs_here++;
    return cube_world_real()->sync(ctx, fd);
}

static int sync_dir_here(void *ctx, const char *path)
{
    syncs_here++;
    return cube_world_real()->sync_dir(ctx, path);
}

/* Commits as fast as it is told, each time the same key. */
static struct {
    struct ledger ledger;
    struct cube_commit_wait wait;
    char value[1 << 16];
    int told;
} writer;

static void write_again(void *arg, const struct cube_err *err)
{
    struct ledger *t = &writer.ledger;

    (void)arg;
    CHECK(!err);
    writer.told++;
    writer.value[0]++;
    CHECK_INT(cube_store_put(t->store, "t", "k", 1, writer.value,
                             sizeof writer.value, NULL), 0);
    cube_commit_wait(t->commit, &writer.wait, write_again, NULL);
}

/* The last sync of a compaction's file and that of the directory were done in
 * the turn that swapped: tens of milliseconds on a disk that was busy. And the
 * first one was begun in a turn without a commit only: where each follows at
 * once upon the one before there is none, and the file grew for ever. */
TEST(a_compaction_syncs_nothing_in_a_turn_however_busy_its_store_is)
{
    struct ledger *t = &writer.ledger;
    struct cube_store_options o = {.is_sync_split = true};
    struct cube_store_stats stats = {0};
    char path[512];

    memset(&writer, 0, sizeof writer);
    t->w = *cube_world_real();
    t->w.sync = sync_here;
    t->w.sync_dir = sync_dir_here;
    t->loop = open_loop(&t->w);
    snprintf(path, sizeof path, "%s/a.cube", test_dir());
    t->store = cube_store_open(&t->w, path, &o, NULL);
    REQUIRE(t->store);
    t->commit = cube_commit_open(t->loop, t->store);
    syncs_here = 0;
    cube_commit_wait(t->commit, &writer.wait, write_again, NULL);
    while (stats.compactions < 3 && writer.told < 1000) {
        cube_loop_turn(t->loop, -1, NULL);
        cube_store_stats(t->store, &stats);
        if (stats.file_bytes > 2 * sizeof writer.value + (8 << 20))
            FAIL("%llu bytes", (unsigned long long)stats.file_bytes);
    }
    CHECK_INT((int)stats.compactions, 3);
    CHECK_INT(syncs_here, 0);
    cube_commit_forget(&writer.wait);
    close_commits(t);
}
