/* Chapter 1: the real machine behind the table. */
#include "test.h"
#include <poll.h>
#include <sched.h>
#include <sys/mount.h>

static const struct cube_world *world(void)
{
    return cube_world_real();
}

/* ---- Waiting without sleeping: poll(2) on what will happen ---- */

static bool readable_within(int fd, int timeout_ms)
{
    struct pollfd one = {fd, POLLIN, 0};

    return poll(&one, 1, timeout_ms) == 1;
}

static void write_file(const char *path, const char *text)
{
    FILE *f = fopen(path, "w");

    REQUIRE(f != NULL);
    fputs(text, f);
    fclose(f);
}

/* The whole file in static memory, "" if there is none. */
static const char *read_text(const char *path)
{
    static char text[1 << 20];
    FILE *f = fopen(path, "r");
    size_t n = f ? fread(text, 1, sizeof text - 1, f) : 0;

    text[n] = 0;
    if (f)
        fclose(f);
    return text;
}

/* ---- Clocks and randomness ---- */

TEST(the_clock_never_goes_back_and_random_bytes_differ)
{
    const struct cube_world *w = world();
    int64_t before = w->now_ms(w->ctx);
    unsigned char a[32] = {0}, b[32] = {0};

    CHECK(w->now_ms(w->ctx) >= before);
    CHECK(w->wall_ns(w->ctx) > INT64_C(1700000000) * 1000000000);
    CHECK_INT(w->random(w->ctx, a, sizeof a), 0);
    CHECK_INT(w->random(w->ctx, b, sizeof b), 0);
    CHECK(memcmp(a, b, sizeof a) != 0);
    CHECK(w->env(w->ctx, "CUBE_TEST_NO_SUCH_VARIABLE") == NULL);
    CHECK_UINT(w->uid(w->ctx), geteuid());
}

/* ---- Sockets ---- */

static struct cube_addr loopback(enum cube_addr_kind kind)
{
    struct cube_addr a;

    memset(&a, 0, sizeof a);
    a.kind = kind;
    if (kind == CUBE_ADDR_IP4)
        memcpy(a.ip, "\x7f\0\0\1", 4);
    else if (kind == CUBE_ADDR_IP6)
        a.ip[15] = 1;
    else
        snprintf(a.path, sizeof a.path, "%s/socket", test_dir());
    return a;
}

TEST(bytes_go_through_a_socket_of_each_kind)
{
    static const struct {
        enum cube_addr_kind kind;
        const char *name;
    } rows[] = {
        {CUBE_ADDR_IP4, "IPv4"}, {CUBE_ADDR_IP6, "IPv6"},
        {CUBE_ADDR_UNIX, "unix"},
    };
    const struct cube_world *w = world();

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct cube_addr at = loopback(rows[i].kind), peer;
        char buf[8];
        int listener = w->listen(w->ctx, &at), there, here;

        test_row("%s", rows[i].name);
        if (listener == -EADDRNOTAVAIL || listener == -EAFNOSUPPORT)
            continue; /* a machine without IPv6 */
        REQUIRE(listener >= 0);
        CHECK_INT(w->accept(w->ctx, listener, &peer), -EAGAIN);
        if (rows[i].kind != CUBE_ADDR_UNIX) {
            CHECK_INT(w->local_addr(w->ctx, listener, &at), 0);
            CHECK(at.port != 0);
        }
        there = w->connect(w->ctx, &at);
        REQUIRE(there >= 0);
        CHECK(readable_within(listener, 5000));
        here = w->accept(w->ctx, listener, &peer);
        REQUIRE(here >= 0);
        CHECK_INT(peer.kind, rows[i].kind);
        CHECK_INT(w->connected(w->ctx, there), 0);
        CHECK_INT(w->recv(w->ctx, here, buf, sizeof buf), -EAGAIN);
        CHECK_INT(w->send(w->ctx, there, "hello", 5), 5);
        CHECK(readable_within(here, 5000));
        CHECK_INT(w->recv(w->ctx, here, buf, sizeof buf), 5);
        CHECK_MEM(buf, "hello", 5);
        CHECK_INT(w->shut(w->ctx, there), 0);
        CHECK(readable_within(here, 5000));
        CHECK_INT(w->recv(w->ctx, here, buf, sizeof buf), 0);
        CHECK(fcntl(here, F_GETFD) & FD_CLOEXEC);
        w->close(w->ctx, there);
        w->close(w->ctx, here);
        w->close(w->ctx, listener);
    }
}

static int option(int fd, int level, int name)
{
    int value = 0;
    socklen_t len = sizeof value;

    CHECK_INT(getsockopt(fd, level, name, &value, &len), 0);
    return value;
}

/* Who followed the log of a silent task and lost its network kept a connection
 * of the manager's, and one of the worker's, for ever: nobody had anything to
 * send by which to notice. Both ends of a connection have the kernel ask. */
TEST(a_peer_that_vanishes_is_noticed_by_who_only_waits)
{
    const struct cube_world *w = world();
    struct cube_addr at = loopback(CUBE_ADDR_IP4), peer;
    int listener = w->listen(w->ctx, &at), ends[2];

    REQUIRE(w->local_addr(w->ctx, listener, &at) == 0);
    ends[0] = w->connect(w->ctx, &at);
    CHECK(readable_within(listener, 5000));
    ends[1] = w->accept(w->ctx, listener, &peer);
    for (int i = 0; i < 2; i++) {
        test_row("end %d", i);
        CHECK_INT(option(ends[i], SOL_SOCKET, SO_KEEPALIVE), 1);
        CHECK(option(ends[i], IPPROTO_TCP, TCP_KEEPIDLE) +
              option(ends[i], IPPROTO_TCP, TCP_KEEPINTVL) *
              option(ends[i], IPPROTO_TCP, TCP_KEEPCNT) <= 120);
        w->close(w->ctx, ends[i]);
    }
    w->close(w->ctx, listener);
}

/* An order that was given up came through when a partition ended, and started
 * a task that had been removed meanwhile. */
TEST(what_was_given_up_does_not_arrive_later)
{
    const struct cube_world *w = world();
    struct cube_addr at = loopback(CUBE_ADDR_IP4), peer;
    static char bytes[65536];
    int listener = w->listen(w->ctx, &at), here, there, n;
    int64_t sent = 0, came = 0;

    REQUIRE(w->local_addr(w->ctx, listener, &at) == 0);
    there = w->connect(w->ctx, &at);
    CHECK(readable_within(listener, 5000));
    here = w->accept(w->ctx, listener, &peer);
    while ((n = w->send(w->ctx, there, bytes, sizeof bytes)) > 0)
        sent += n;
    CHECK_INT(n, -EAGAIN);
    w->close(w->ctx, there);
    CHECK(readable_within(here, 5000));
    while ((n = w->recv(w->ctx, here, bytes, sizeof bytes)) > 0)
        came += n;
    CHECK_INT(n, -ECONNRESET);
    CHECK(came < sent);
    w->close(w->ctx, here);
    w->close(w->ctx, listener);
}

TEST(a_broken_socket_is_an_error_and_no_signal)
{
    const struct cube_world *w = world();
    struct cube_addr at = loopback(CUBE_ADDR_UNIX), peer;
    int listener = w->listen(w->ctx, &at);
    int there = w->connect(w->ctx, &at);
    int here = w->accept(w->ctx, listener, &peer);

    REQUIRE(listener >= 0 && there >= 0 && here >= 0);
    w->close(w->ctx, here);
    CHECK_INT(w->send(w->ctx, there, "x", 1), -EPIPE);
    w->close(w->ctx, there);
    w->close(w->ctx, listener);
}

TEST(a_port_can_be_taken_once_and_a_closed_one_refuses)
{
    const struct cube_world *w = world();
    struct cube_addr at = loopback(CUBE_ADDR_IP4);
    int listener = w->listen(w->ctx, &at), fd;
    struct pollfd one;

    REQUIRE(listener >= 0);
    w->local_addr(w->ctx, listener, &at);
    CHECK_INT(w->listen(w->ctx, &at), -EADDRINUSE);
    w->close(w->ctx, listener);
    fd = w->connect(w->ctx, &at);
    if (fd >= 0) {
        one = (struct pollfd){fd, POLLOUT, 0};
        CHECK_INT(poll(&one, 1, 5000), 1);
        CHECK_INT(w->connected(w->ctx, fd), -ECONNREFUSED);
        w->close(w->ctx, fd);
    } else {
        CHECK_INT(fd, -ECONNREFUSED);
    }
}

/* ---- Readiness and jobs ---- */

TEST(a_poll_reports_readiness_with_its_token)
{
    const struct cube_world *w = world();
    struct cube_poll *p = w->poll_open(w->ctx);
    struct cube_ready ready[4];
    int ends[2];

    REQUIRE(p != NULL && pipe(ends) == 0);
    CHECK_INT(w->poll_add(w->ctx, p, ends[0], CUBE_READ, 77), 0);
    CHECK_INT(w->poll_wait(w->ctx, p, ready, 4, 0), 0);
    CHECK_INT(write(ends[1], "x", 1), 1);
    CHECK_INT(w->poll_wait(w->ctx, p, ready, 4, 5000), 1);
    CHECK_UINT(ready[0].token, 77);
    CHECK_UINT(ready[0].events, CUBE_READ);
    CHECK(ready[0].job == NULL);
    CHECK_INT(w->poll_change(w->ctx, p, ends[0], 0, 78), 0);
    CHECK_INT(w->poll_wait(w->ctx, p, ready, 4, 0), 0);
    close(ends[1]);
    CHECK_INT(w->poll_wait(w->ctx, p, ready, 4, 5000), 1);
    CHECK_UINT(ready[0].token, 78);
    CHECK(ready[0].events & CUBE_HANGUP);
    CHECK_INT(w->poll_remove(w->ctx, p, ends[0]), 0);
    CHECK_INT(w->poll_wait(w->ctx, p, ready, 4, 0), 0);
    close(ends[0]);
    w->poll_close(w->ctx, p);
}

TEST(a_wake_ends_a_wait_and_reports_nothing)
{
    const struct cube_world *w = world();
    struct cube_poll *p = w->poll_open(w->ctx);
    struct cube_ready ready[4];

    REQUIRE(p != NULL);
    w->poll_wake(w->ctx, p);
    w->poll_wake(w->ctx, p);
    CHECK(readable_within(w->poll_fd(w->ctx, p), 5000));
    CHECK_INT(w->poll_wait(w->ctx, p, ready, 4, -1), 0);
    CHECK(!readable_within(w->poll_fd(w->ctx, p), 0));
    w->poll_close(w->ctx, p);
}

/* Waits for one job; the helper reports in the background. */
static struct cube_job *next_job(struct cube_poll *p)
{
    const struct cube_world *w = world();
    int64_t until = w->now_ms(w->ctx) + 10000;
    struct cube_ready ready[4];

    while (w->now_ms(w->ctx) < until) {
        if (w->poll_wait(w->ctx, p, ready, 4, 1000) > 0)
            return ready[0].job;
    }
    return NULL;
}

/* A poll that is closed leaves its helpers to end by themselves; the test
 * waits for them so that its count of descriptors is the same as before. */
static void close_poll(struct cube_poll *p)
{
    const struct cube_world *w = world();
    int64_t until = w->now_ms(w->ctx) + 10000;
    int wake = p->jobs->wake_fd;

    w->poll_close(w->ctx, p);
    while (fcntl(wake, F_GETFD) >= 0 && w->now_ms(w->ctx) < until)
        sched_yield();
}

TEST(jobs_are_done_beside_and_reported_once)
{
    const struct cube_world *w = world();
    struct cube_poll *p = w->poll_open(w->ctx);
    struct cube_job sync = {.kind = CUBE_JOB_SYNC};
    struct cube_job name = {.kind = CUBE_JOB_RESOLVE, .host = "localhost"};
    struct cube_job bad = {.kind = CUBE_JOB_SYNC, .fd = -1};
    struct cube_ready ready[4];
    char path[300];

    snprintf(path, sizeof path, "%s/file", test_dir());
    sync.fd = w->open(w->ctx, path, CUBE_OPEN_WRITE | CUBE_OPEN_CREATE);
    REQUIRE(p != NULL && sync.fd >= 0);
    CHECK_INT(w->pwrite(w->ctx, sync.fd, "data", 4, 0), 4);
    CHECK_INT(w->job_start(w->ctx, p, &sync), 0);
    CHECK(next_job(p) == &sync);
    CHECK_INT(sync.result, 0);
    CHECK_INT(w->job_start(w->ctx, p, &bad), 0);
    CHECK(next_job(p) == &bad);
    CHECK_INT(bad.result, -EBADF);
    CHECK_INT(w->job_start(w->ctx, p, &name), 0);
    CHECK(next_job(p) == &name);
    CHECK_INT(name.result, 0);
    CHECK(name.addr_count > 0);
    CHECK_INT(w->poll_wait(w->ctx, p, ready, 4, 0), 0);
    w->close(w->ctx, sync.fd);
    close_poll(p);
}

TEST(a_cancelled_job_is_not_reported)
{
    const struct cube_world *w = world();
    struct cube_poll *p = w->poll_open(w->ctx);
    struct cube_job first = {.kind = CUBE_JOB_SYNC, .fd = -1};
    struct cube_job second = first, third = first;

    REQUIRE(p != NULL);
    CHECK_INT(w->job_start(w->ctx, p, &first), 0);
    CHECK_INT(w->job_start(w->ctx, p, &second), 0);
    w->job_cancel(w->ctx, p, &first);
    w->job_cancel(w->ctx, p, &second);
    w->job_cancel(w->ctx, p, &second); /* harmless */
    memset(&first, 0x55, sizeof first);
    CHECK_INT(w->job_start(w->ctx, p, &third), 0);
    CHECK(next_job(p) == &third);
    w->job_cancel(w->ctx, p, &third); /* too late, and harmless */
    close_poll(p);
}

TEST(a_poll_can_be_closed_while_a_job_waits)
{
    const struct cube_world *w = world();
    struct cube_poll *p = w->poll_open(w->ctx);
    struct cube_job jobs[20];

    REQUIRE(p != NULL);
    memset(jobs, 0, sizeof jobs);
    for (size_t i = 0; i < COUNT(jobs); i++) {
        jobs[i].kind = CUBE_JOB_SYNC;
        jobs[i].fd = -1;
        CHECK_INT(w->job_start(w->ctx, p, &jobs[i]), 0);
    }
    for (size_t i = 0; i < COUNT(jobs); i++)
        w->job_cancel(w->ctx, p, &jobs[i]);
    close_poll(p);
}

/* ---- Files ---- */

static void count_names(void *arg, const char *name)
{
    char *all = arg;

    strcat(all, name);
    strcat(all, " ");
}

TEST(files_are_written_read_renamed_and_listed_in_order)
{
    const struct cube_world *w = world();
    const char *dir = test_dir();
    char a[300], b[300], sub[300], names[200] = "", buf[8];
    struct cube_space space;
    int fd;

    snprintf(a, sizeof a, "%s/a", dir);
    snprintf(b, sizeof b, "%s/b", dir);
    snprintf(sub, sizeof sub, "%s/Z", dir);
    CHECK_INT(w->open(w->ctx, a, 0), -ENOENT);
    fd = w->open(w->ctx, a, CUBE_OPEN_WRITE | CUBE_OPEN_CREATE);
    REQUIRE(fd >= 0);
    CHECK_INT(w->pwrite(w->ctx, fd, "hello", 5, 3), 5);
    CHECK_INT(w->size(w->ctx, fd), 8);
    CHECK_INT(w->pread(w->ctx, fd, buf, sizeof buf, 0), 8);
    CHECK_MEM(buf, "\0\0\0hello", 8);
    CHECK_INT(w->pread(w->ctx, fd, buf, sizeof buf, 8), 0);
    CHECK_INT(w->truncate(w->ctx, fd, 4), 0);
    CHECK_INT(w->size(w->ctx, fd), 4);
    CHECK_INT(w->sync(w->ctx, fd), 0);
    CHECK_INT(w->sync_dir(w->ctx, dir), 0);
    w->close(w->ctx, fd);
    fd = w->open(w->ctx, dir, 0);       /* or by its descriptor */
    CHECK_INT(w->sync(w->ctx, fd), 0);
    w->close(w->ctx, fd);
    CHECK_INT(w->open(w->ctx, a, CUBE_OPEN_WRITE | CUBE_OPEN_CREATE |
                                     CUBE_OPEN_EXCL), -EEXIST);
    CHECK_INT(w->rename(w->ctx, a, b), 0);
    CHECK_INT(w->mkdir(w->ctx, sub), 0);
    CHECK_INT(w->mkdir(w->ctx, sub), -EEXIST);
    CHECK_INT(w->list(w->ctx, dir, count_names, names), 0);
    CHECK_STR(names, "Z b ");
    CHECK_INT(w->list(w->ctx, a, count_names, names), -ENOENT);
    CHECK_INT(w->rmdir(w->ctx, sub), 0);
    CHECK_INT(w->unlink(w->ctx, b), 0);
    CHECK_INT(w->unlink(w->ctx, b), -ENOENT);
    CHECK_INT(w->space(w->ctx, dir, &space), 0);
    CHECK(space.all > 0 && space.free <= space.all);
}

TEST(a_file_lock_excludes_a_second_open_of_the_file)
{
    const struct cube_world *w = world();
    char path[300];
    int one, two;

    snprintf(path, sizeof path, "%s/file", test_dir());
    one = w->open(w->ctx, path, CUBE_OPEN_WRITE | CUBE_OPEN_CREATE);
    two = w->open(w->ctx, path, CUBE_OPEN_WRITE);
    REQUIRE(one >= 0 && two >= 0);
    CHECK_INT(w->lock(w->ctx, one), 0);
    CHECK_INT(w->lock(w->ctx, two), -EBUSY);
    w->close(w->ctx, one);
    CHECK_INT(w->lock(w->ctx, two), 0);
    w->close(w->ctx, two);
}

/* ---- Supervised processes ---- */

/* A directory for one supervised command, and what to run in it. */
struct run {
    char dir[400];
    struct cube_spawn spec;
    const char *argv[4], *env[6];
    int pid_fd;
};

static char *at(const struct run *r, const char *name)
{
    static char path[4][500];
    static int next;
    char *p = path[next++ % 4];

    snprintf(p, sizeof path[0], "%s/%s", r->dir, name);
    return p;
}

static void need_pidfd(void)
{
    int fd = world()->pid_open(NULL, getpid());

    if (fd == -ENOSYS)
        SKIP("no pidfd_open: an old kernel, or valgrind");
    close(fd);
}

/* Prepares `/bin/sh -c script` in directory `name` of the test. */
static void prepare(struct run *r, const char *base, const char *script)
{
    static int number;

    need_pidfd();
    memset(r, 0, sizeof *r);
    snprintf(r->dir, sizeof r->dir, "%s/run%d", base, number++);
    REQUIRE(mkdir(r->dir, 0700) == 0);
    REQUIRE(mkdir(at(r, "work"), 0700) == 0);
    r->argv[0] = "sh";
    r->argv[1] = "-c";
    r->argv[2] = script;
    r->env[0] = "PATH=/nowhere:/usr/bin:/bin";
    r->spec.dir = r->dir;
    r->spec.argv = r->argv;
    r->spec.env = r->env;
    r->spec.log_bytes = 100000;
    r->spec.log_files = 3;
    r->pid_fd = -1;
}

/* Starts it and opens its supervisor, whose end `ends` waits for. */
static int start(struct run *r)
{
    const struct cube_world *w = world();
    int result = w->spawn(w->ctx, &r->spec);
    int owner = w->lock_owner(w->ctx, at(r, "lock"));

    if (owner > 0)
        r->pid_fd = w->pid_open(w->ctx, owner);
    return result;
}

static void ends(struct run *r)
{
    const struct cube_world *w = world();

    if (r->pid_fd < 0)
        return;
    CHECK(readable_within(r->pid_fd, 20000));
    CHECK_INT(w->pid_close(w->ctx, r->pid_fd), 0);
    CHECK_INT(w->lock_owner(w->ctx, at(r, "lock")), 0);
}

static void run(struct run *r, const char *script)
{
    prepare(r, test_dir(), script);
    REQUIRE(start(r) == 0);
    ends(r);
}

static void tell(struct run *r, int number)
{
    const struct cube_world *w = world();

    CHECK_INT(w->pid_signal(w->ctx, r->pid_fd, number), 0);
}

/* The number behind `name` in the exit file, -1 if there is none. */
static long exit_field(const struct run *r, const char *name)
{
    const char *p = strstr(read_text(at(r, "exit")), name);

    return p ? atol(p + strlen(name) + 1) : -1;
}

/* Waits until the file has a whole line; returns its number. */
static int number_in(const char *path)
{
    const struct cube_world *w = world();
    int64_t until = w->now_ms(w->ctx) + 10000;

    while (w->now_ms(w->ctx) < until) {
        const char *text = read_text(path);

        if (strchr(text, '\n'))
            return atoi(text);
        sched_yield();
    }
    return 0;
}

/* Whether that process runs; a zombie of another parent does not. */
static bool is_alive(int pid)
{
    char path[64];
    const char *p;

    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    p = strrchr(read_text(path), ')');
    return p && p[2] != 'Z' && p[2] != 'X';
}

static bool dies(int pid)
{
    const struct cube_world *w = world();
    int64_t until = w->now_ms(w->ctx) + 10000;

    while (is_alive(pid) && w->now_ms(w->ctx) < until)
        sched_yield();
    return !is_alive(pid);
}

TEST(the_exit_file_says_how_a_command_ended)
{
    static const struct {
        const char *script;
        int code, number;
    } rows[] = {
        {"true", 0, 0}, {"exit 3", 3, 0}, {"exit 255", 255, 0},
        {"kill -TERM $$", 143, 15}, {"kill -KILL $$", 137, 9},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct run r;

        test_row("%s", rows[i].script);
        run(&r, rows[i].script);
        CHECK_INT(exit_field(&r, "code"), rows[i].code);
        CHECK_INT(exit_field(&r, "signal"), rows[i].number);
        CHECK_INT(exit_field(&r, "oom"), 0);
        CHECK_INT(exit_field(&r, "error"), 0);
        CHECK(exit_field(&r, "started") > 1700000000L * 1000000000L);
        CHECK(exit_field(&r, "finished") >= exit_field(&r, "started"));
        CHECK(access(at(&r, "exit.new"), F_OK) != 0);
    }
}

TEST(the_exit_file_is_as_drawn)
{
    struct run r;
    long code, number, oom, error, started, finished;
    char more;

    run(&r, "exit 9");
    CHECK_INT(sscanf(read_text(at(&r, "exit")),
                     "code %ld\nsignal %ld\noom %ld\nerror %ld\n"
                     "started %ld\nfinished %ld\n%c", &code, &number, &oom,
                     &error, &started, &finished, &more), 6);
    CHECK_INT(code, 9);
    CHECK_INT(exit_field(&r, "started"), started);
    CHECK_INT(sscanf(read_text(at(&r, "lock")), "started %ld\npid %ld\n%c",
                     &finished, &code, &more), 2);
    CHECK_INT(finished, started);
}

TEST(output_of_both_kinds_goes_to_the_log_in_order)
{
    struct run r;

    run(&r, "echo one; echo two >&2; echo three; printf end");
    CHECK_STR(read_text(at(&r, "log")), "one\ntwo\nthree\nend");
}

TEST(a_command_has_its_directory_and_its_environment_only)
{
    struct run r;
    char want[600];

    prepare(&r, test_dir(), "pwd; echo \"$A\"; env | wc -l");
    r.env[1] = "A=b c";
    r.env[2] = "PWD=/";
    r.env[3] = "SHLVL=0";
    r.env[4] = "_=x";
    REQUIRE(start(&r) == 0);
    ends(&r);
    snprintf(want, sizeof want, "%s/work\nb c\n5\n", r.dir);
    CHECK_STR(read_text(at(&r, "log")), want);
}

TEST(a_command_inherits_no_descriptor_and_no_signal_state)
{
    struct run r;
    int extra[40];
    const char *text;

    need_pidfd();
    for (size_t i = 0; i < COUNT(extra); i++)
        extra[i] = open("/dev/null", O_RDONLY); /* open across exec */
    signal(SIGHUP, SIG_IGN);
    run(&r, "ls /proc/self/fd | tr '\\n' ' '; readlink /proc/self/fd/0;"
            "grep -E 'SigBlk|SigIgn' /proc/self/status");
    signal(SIGHUP, SIG_DFL);
    for (size_t i = 0; i < COUNT(extra); i++)
        close(extra[i]);
    text = read_text(at(&r, "log"));
    CHECK_HAS(text, "0 1 2 3 /dev/null\n"); /* 3: the directory ls reads */
    CHECK_HAS(text, "SigBlk:\t0000000000000000");
    /* Without signals 32 and 33: they are the C library's own, no program can
     * set them, and its posix_spawn (make's, say) leaves them ignored. */
    text = strstr(text, "SigIgn:\t");
    REQUIRE(text != NULL);
    CHECK_UINT(strtoull(text + 8, NULL, 16) & ~(3ull << 31), 0);
}

TEST(a_supervisor_keeps_nothing_of_its_caller)
{
    struct run r;
    char path[64], link[300], all[4000] = "";
    int extra[20], owner;
    ssize_t n;

    need_pidfd();
    for (size_t i = 0; i < COUNT(extra); i++)
        extra[i] = open("/dev/zero", O_RDONLY);

    prepare(&r, test_dir(), "read never < fifo");
    REQUIRE(mkfifo(at(&r, "work/fifo"), 0600) == 0);
    REQUIRE(start(&r) == 0);
    owner = world()->lock_owner(NULL, at(&r, "lock"));
    for (int fd = 0; fd < 100; fd++) {
        snprintf(path, sizeof path, "/proc/%d/fd/%d", owner, fd);
        n = readlink(path, link, sizeof link - 1);
        if (n > 0) {
            link[n] = 0;
            strcat(strcat(all, link), "\n");
        }
    }
    CHECK(strstr(all, "/dev/zero") == NULL);
    CHECK(strstr(all, "socket") == NULL);
    CHECK_INT(getsid(owner), owner);
    CHECK(getppid() != owner);
    for (size_t i = 0; i < COUNT(extra); i++)
        close(extra[i]);
    tell(&r, SIGUSR1);
    ends(&r);
}

TEST(what_cannot_be_executed_is_an_errno_value_and_an_exit_code)
{
    static const struct {
        const char *name;
        int result, code;
    } rows[] = {
        {"cube-no-such-command", ENOENT, 127},
        {"/no/such/command", ENOENT, 127},
        {"./here", EACCES, 126},   /* a file that is not executable */
        {"/etc", EACCES, 126},     /* a directory */
        {"./text", ENOEXEC, 126},  /* executable, and no program */
        {"", ENOENT, 127},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct run r;

        test_row("\"%s\"", rows[i].name);
        prepare(&r, test_dir(), "");
        write_file(at(&r, "work/here"), "");
        write_file(at(&r, "work/text"), "nothing\n");
        REQUIRE(chmod(at(&r, "work/text"), 0700) == 0);
        r.argv[0] = rows[i].name;
        CHECK_INT(start(&r), rows[i].result);
        ends(&r);
        CHECK_INT(exit_field(&r, "code"), rows[i].code);
        CHECK_INT(exit_field(&r, "error"), rows[i].result);
    }
}

TEST(what_cannot_be_supervised_leaves_nothing_behind)
{
    struct run r;

    prepare(&r, test_dir(), "true");
    r.spec.dir = "/no/such/directory";
    CHECK_INT(world()->spawn(NULL, &r.spec), -ENOENT);
    prepare(&r, test_dir(), "true");
    REQUIRE(mkdir(at(&r, "lock"), 0700) == 0);
    CHECK_INT(world()->spawn(NULL, &r.spec), -EISDIR);
    prepare(&r, test_dir(), "true");
    REQUIRE(mkdir(at(&r, "exit.new"), 0700) == 0);
    CHECK_INT(world()->spawn(NULL, &r.spec), -EISDIR);
    CHECK_STR(read_text(at(&r, "lock")), ""); /* it has never begun */
    CHECK(waitpid(-1, NULL, WNOHANG | __WALL) < 0 && errno == ECHILD);
}

TEST(a_second_supervisor_of_one_directory_is_refused)
{
    struct run r;

    prepare(&r, test_dir(), "exec sleep 1000");
    REQUIRE(start(&r) == 0);
    CHECK_INT(world()->spawn(NULL, &r.spec), -EBUSY);
    tell(&r, SIGTERM);
    ends(&r);
    CHECK_INT(exit_field(&r, "signal"), SIGTERM);
}

TEST(sigterm_reaches_the_whole_group)
{
    struct run r;
    int inner;

    prepare(&r, test_dir(),
            "trap 'wait; exit 6' TERM; "
            "sh -c 'trap \"echo 15 > got; exit\" TERM; echo $$ > inner; "
            "while :; do sleep 0.01; done' & wait");
    REQUIRE(start(&r) == 0);
    inner = number_in(at(&r, "work/inner"));
    REQUIRE(inner > 0);
    tell(&r, SIGTERM);
    ends(&r);
    CHECK(!is_alive(inner));
    CHECK_INT(number_in(at(&r, "work/got")), 15); /* told, not just killed */
    CHECK_INT(exit_field(&r, "code"), 6);
}

TEST(a_command_that_ignores_sigterm_is_killed_by_sigusr1)
{
    struct run r;

    prepare(&r, test_dir(),
            "trap '' TERM; echo 1 > ready; while :; do sleep 1000; done");
    REQUIRE(start(&r) == 0);
    REQUIRE(number_in(at(&r, "work/ready")) == 1);
    tell(&r, SIGTERM);
    CHECK(!readable_within(r.pid_fd, 100)); /* it goes on */
    tell(&r, SIGUSR1);
    ends(&r);
    CHECK_INT(exit_field(&r, "code"), 137);
}

TEST(descendants_that_left_group_and_session_die_with_the_command)
{
    struct run r;
    int daemon;

    prepare(&r, test_dir(),
            "sh -c \"" "setsid sh -c 'echo \\$\\$ > daemon; trap : TERM; "
            "while :; do sleep 1000; done' & \"; "
            "until [ -s daemon ]; do :; done; exit 5");
    REQUIRE(start(&r) == 0);
    daemon = number_in(at(&r, "work/daemon"));
    REQUIRE(daemon > 0);
    ends(&r);
    CHECK(!is_alive(daemon)); /* before the exit file, not some time after */
    CHECK_INT(exit_field(&r, "code"), 5);
}

TEST(a_supervisor_that_is_killed_takes_its_command_along)
{
    struct run r;
    int pid;

    prepare(&r, test_dir(), "echo $$ > pid; exec sleep 1000");
    REQUIRE(start(&r) == 0);
    pid = number_in(at(&r, "work/pid"));
    REQUIRE(pid > 0 && is_alive(pid));
    tell(&r, SIGKILL);
    ends(&r);
    CHECK(dies(pid));
    CHECK(access(at(&r, "exit"), F_OK) != 0);
}

TEST(logs_rotate_and_only_so_many_are_kept)
{
    struct run r;
    struct stat st;
    char name[40];
    int last = 1, kept = 0;

    /* 130 kB: at least eight pieces, however much of it is read at once */
    prepare(&r, test_dir(),
            "i=0; while [ $i -lt 12000 ]; do echo line $i; i=$((i+1)); done");
    r.spec.log_bytes = 4000;
    REQUIRE(start(&r) == 0);
    ends(&r);
    CHECK_HAS(read_text(at(&r, "log")), "line 11999\n");
    for (int i = 1; i < 100; i++) {
        snprintf(name, sizeof name, "log.%d", i);
        if (stat(at(&r, name), &st) < 0)
            continue;
        CHECK(st.st_size <= 4000 || st.st_size <= CUBE_SUP_CHUNK);
        last = i;
        kept++;
    }
    CHECK_INT(kept, 2); /* and log itself */
    CHECK(last > 2);    /* numbers are not used again */
    snprintf(name, sizeof name, "log.%d", last - 1);
    CHECK(access(at(&r, name), F_OK) == 0);
}

TEST(rotated_logs_join_without_a_gap)
{
    struct run r;
    char all[90000] = "", line[40], name[40];
    const char *p;
    int first;

    prepare(&r, test_dir(),
            "i=0; while [ $i -lt 4000 ]; do echo line $i; i=$((i+1)); done");
    r.spec.log_bytes = 4000;
    REQUIRE(start(&r) == 0);
    ends(&r);
    for (int i = 1; i < 100; i++) {
        snprintf(name, sizeof name, "log.%d", i);
        strcat(all, read_text(at(&r, name)));
    }
    strcat(all, read_text(at(&r, "log")));
    p = strchr(all, '\n') + 1; /* the oldest kept line may be cut */
    REQUIRE(sscanf(p, "line %d", &first) == 1);
    for (; first < 4000; first++) {
        int len = snprintf(line, sizeof line, "line %d\n", first);

        REQUIRE(strncmp(p, line, (size_t)len) == 0);
        p += len;
    }
    CHECK_STR(p, "");
}

/* A small file system of the test's own, or a skip. */
static const char *small_disk(const char *options)
{
    static char path[300];

    need_pidfd();
    snprintf(path, sizeof path, "%s/disk", test_dir());
    REQUIRE(mkdir(path, 0700) == 0);
    if (mount("cube", path, "tmpfs", 0, options) < 0)
        SKIP("no right to mount a file system");
    return path;
}

/* A supervisor that has reported may need a moment more to be gone. */
static void unmount(const char *disk)
{
    int64_t until = world()->now_ms(NULL) + 10000;

    while (umount(disk) < 0 && world()->now_ms(NULL) < until)
        sched_yield();
    CHECK(umount(disk) < 0 && errno == EINVAL); /* not mounted any more */
}

TEST(a_full_disk_costs_output_and_neither_task_nor_exit_code)
{
    const char *disk = small_disk("size=128k");
    struct run r;
    struct stat st;

    prepare(&r, disk, "head -c 1000000 /dev/zero; "
                      "until [ -e ../go ]; do sleep 0.01; done; "
                      "echo later; exit 7");
    r.spec.log_bytes = 100000000;
    REQUIRE(start(&r) == 0);
    /* all of it was read from the pipe, and most of it found no room */
    for (int i = 0; i < 1000 && !(stat(at(&r, "log"), &st) == 0 &&
                                  st.st_size > 90000); i++)
        poll(NULL, 0, 10);
    write_file(at(&r, "go"), "");
    ends(&r);
    CHECK_INT(exit_field(&r, "code"), 7);
    unmount(disk);
}

TEST(what_a_full_disk_refused_is_counted_in_the_log)
{
    const char *disk = small_disk("size=256k");
    struct run r;
    char ballast[400];
    FILE *f;

    snprintf(ballast, sizeof ballast, "%s/ballast", disk);
    prepare(&r, disk, "until [ -e ../one ]; do sleep 0.01; done; "
                      /* a pipe holds 64 kB of it, the disk less than 60 */
                      "printf %0300000d 0; echo 1 > said;"
                      "until [ -e ../two ]; do sleep 0.01; done; "
                      "echo later; exit 7");
    r.spec.log_bytes = 100000000;
    REQUIRE(start(&r) == 0);
    f = fopen(ballast, "w");
    for (int i = 0; i < 200 * 1024; i++)
        putc('x', f);
    fclose(f);
    write_file(at(&r, "one"), "");
    while (access(at(&r, "work/said"), F_OK) != 0)
        poll(NULL, 0, 5);
    CHECK_INT(unlink(ballast), 0);
    write_file(at(&r, "two"), "");
    ends(&r);
    CHECK_HAS(read_text(at(&r, "log")),
              " bytes of output could not be written]\n");
    CHECK_HAS(strstr(read_text(at(&r, "log")), " could not be"), "later\n");
    CHECK_INT(exit_field(&r, "code"), 7);
    unmount(disk);
}

TEST(a_disk_that_is_full_at_the_start_is_an_error)
{
    const char *disk = small_disk("size=16k");
    struct run r;
    char ballast[400];
    FILE *f;

    prepare(&r, disk, "true");
    snprintf(ballast, sizeof ballast, "%s/ballast", disk);
    f = fopen(ballast, "w");
    setvbuf(f, NULL, _IONBF, 0);
    for (int i = 0; i < 16 * 1024; i++)
        putc('x', f);
    fclose(f);
    CHECK_INT(start(&r), -ENOSPC);
    ends(&r);
    CHECK(access(at(&r, "exit"), F_OK) != 0);
    unmount(disk);
}

TEST(a_lock_is_not_faked_by_whoever_writes_its_file)
{
    struct run r;
    int fd;

    prepare(&r, test_dir(), "true");
    CHECK_INT(world()->lock_owner(NULL, at(&r, "lock")), -ENOENT);
    write_file(at(&r, "lock"), "started 1\n"); /* a PID in it says nothing */
    CHECK_INT(world()->lock_owner(NULL, at(&r, "lock")), 0);
    fd = open(at(&r, "lock"), O_RDWR);
    CHECK_INT(flock(fd, LOCK_EX), 0); /* the other kind of lock */
    CHECK_INT(world()->lock_owner(NULL, at(&r, "lock")), 0);
    close(fd);
}

TEST(a_memory_limit_by_rlimit_holds_for_the_command)
{
    struct run r;

    prepare(&r, test_dir(), "ulimit -d; exec awk 'BEGIN { s = \"x\"; "
                            "while (length(s) < 1e9) s = s s; }'");
    r.spec.data_bytes = 64 << 20;
    REQUIRE(start(&r) == 0);
    ends(&r);
    CHECK_HAS(read_text(at(&r, "log")), "65536\n");
    CHECK(exit_field(&r, "code") != 0);
}

TEST(a_cgroup_is_joined_before_the_command_runs_and_then_removed)
{
    struct run r;
    char group[100], want[130];

    snprintf(group, sizeof group, "/sys/fs/cgroup/memory/cube-test-%d",
             getpid());
    need_pidfd();
    if (mkdir(group, 0700) < 0)
        SKIP("no right to make a cgroup (version 1)");
    snprintf(want, sizeof want, "%s/memory.limit_in_bytes", group);
    write_file(want, "33554432");
    prepare(&r, test_dir(), "cat /proc/self/cgroup; exec awk 'BEGIN { "
            "s = \"x\"; while (length(s) < 1e9) s = s s; }'");
    r.spec.cgroups[0] = group;
    REQUIRE(start(&r) == 0);
    ends(&r);
    snprintf(want, sizeof want, ":memory:/cube-test-%d\n", getpid());
    CHECK_HAS(read_text(at(&r, "log")), want);
    CHECK_INT(exit_field(&r, "code"), 137);
    CHECK_INT(exit_field(&r, "oom"), 1);
    CHECK(access(group, F_OK) != 0);
}

/* This program as a task that forks without end, each in a session of its own;
 * the first ends once there are as many as there may be. */
__attribute__((constructor)) static void fork_without_end(void)
{
    int ends[2];
    char byte;

    if (!getenv("CUBE_TEST_FORKS") || pipe(ends) < 0)
        return;
    (void)fcntl(ends[1], F_SETFL, O_NONBLOCK);
    if (fork() > 0)
        _exit(read(ends[0], &byte, 1) == 1 ? 5 : 1);
    (void)signal(SIGPIPE, SIG_IGN);
    (void)setsid();
    for (;;) {
        pid_t pid = fork();

        if (pid == 0)
            (void)setsid();
        else if (pid < 0)
            (void)!write(ends[1], "", 1);
    }
}

/* Makes a cgroup; false: it cannot be, or that file of it cannot be written. */
static bool make_cgroup(char path[100], const char *base, const char *file,
                        const char *text)
{
    snprintf(path, 100, "%s/cube-test-%d", base, (int)getpid());
    if (mkdir(path, 0755) < 0 && errno != EEXIST)
        return false;
    if (cube_sup_tell(path, file, text) == 0)
        return true;
    (void)rmdir(path);
    return false;
}

TEST(what_forks_without_end_dies_with_its_cgroup)
{
    static const char *const bases[] = {"/sys/fs/cgroup",
                                        "/sys/fs/cgroup/unified"};
    char own[100], pids[100] = "";
    struct run r;
    size_t i = 0;

    while (i < COUNT(bases) && !make_cgroup(own, bases[i], "cgroup.kill", "1"))
        i++;
    if (i == COUNT(bases))
        SKIP("no right to make a cgroup of version 2, or none can be killed");
    if (cube_sup_tell(own, "pids.max", "60") != 0 &&
        !make_cgroup(pids, "/sys/fs/cgroup/pids", "pids.max", "60")) {
        (void)rmdir(own);
        SKIP("no right to limit the number of processes by a cgroup");
    }
    prepare(&r, test_dir(), "");
    r.argv[0] = "/proc/self/exe";
    r.argv[1] = NULL;
    r.env[1] = "CUBE_TEST_FORKS=1";
    r.spec.cgroups[0] = own;
    r.spec.cgroups[1] = *pids ? pids : NULL;
    CHECK_INT(start(&r), 0);
    ends(&r);
    CHECK_INT(exit_field(&r, "code"), 5);
    CHECK(access(own, F_OK) != 0); /* empty, so it could be removed */
    (void)cube_sup_tell(own, "cgroup.kill", "1");
}

TEST(a_cgroup_that_cannot_be_joined_stops_the_start)
{
    struct run r;

    prepare(&r, test_dir(), "true");
    r.spec.cgroups[1] = "/no/such/cgroup";
    CHECK_INT(start(&r), -ENOENT);
    ends(&r);
    CHECK_INT(exit_field(&r, "error"), ENOENT);
}

static volatile sig_atomic_t child_signals;

static void count_child(int number)
{
    (void)number;
    child_signals++;
}

TEST(the_program_around_sees_no_child_and_no_signal_of_ours)
{
    struct run r;

    need_pidfd();
    child_signals = 0;
    signal(SIGCHLD, count_child);
    run(&r, "exit 3");
    CHECK_INT(child_signals, 0);
    CHECK(waitpid(-1, NULL, WNOHANG | __WALL) < 0 && errno == ECHILD);
    signal(SIGCHLD, SIG_DFL);
}

TEST(a_supervisor_that_became_our_child_leaves_no_zombie)
{
    struct run r;

    need_pidfd();
    REQUIRE(prctl(PR_SET_CHILD_SUBREAPER, 1) == 0);
    run(&r, "sleep 0.5; exit 3"); /* it is opened before it ends */
    CHECK(waitpid(-1, NULL, WNOHANG | __WALL) < 0 && errno == ECHILD);
    CHECK_INT(exit_field(&r, "code"), 3);
    CHECK_INT(prctl(PR_SET_CHILD_SUBREAPER, 0), 0);
}
