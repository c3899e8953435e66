/* ==== Chapter 0. Preface ==== uses: nothing ==== */
/*
 * Cube is a container orchestrator. You tell its manager what shall run; the
 * manager chooses a machine, the worker there starts a container (or, where
 * there is no engine, a process), and both see to it that it keeps running:
 * when it fails, when a worker fails, when a whole machine is gone. All of
 * that is this one file, on libc and POSIX sockets. cube.h is its manual.
 *
 *      you ---- cube run, status, stop
 *       |  HTTP
 *       v
 *     manager ------------- its store: what is wanted, what was observed
 *       |     \                        (a file; on disk before an answer)
 *       |HTTP  \ HTTP
 *       v       v
 *     worker   worker ----- its store: what it was asked for
 *       |       |
 *     Docker   Podman       or plain processes
 *
 * It is meant to be read, as a book about how an orchestrator works, and
 * a book is read from the front: each chapter stands on those before it and
 * knows nothing of those behind it. A chapter opens with an essay: what the
 * problem is, what the simplest solution would be and where it fails, what
 * was chosen, and what was left naive on purpose. Who wants to know first
 * what it is all good for reads 11 and 12 before the rest, and 10 for
 * pleasure; who wants to write a database, 4; a web server, 6.
 *
 * Contents (`grep '^/\* ====' cube.c` finds them)
 *
 *   1  World        every request to the machine, through one table
 *   2  Ground       errors, memory, buffers, maps, UUIDs, times: what C lacks
 *   3  JSON         text to tree and back
 *   4  Store        a B+tree in a file that only grows; commits; compaction
 *   5  Loop         one thread that waits for everything; the end of a turn
 *   6  HTTP         bytes to messages; the server and the client
 *   7  Tasks        what a task is, on the wire and in its states
 *   8  Machine      how much memory, CPU and disk there is
 *   9  Runtimes     Docker, Podman, and processes under a supervisor
 *   10  Schedulers   which node a task runs on
 *   11  Worker       keeps its tasks true to what was asked of them
 *   12  Manager      accepts, places, watches and moves tasks
 *   13  Client       what a command line needs of a manager
 *
 * Four ideas hold it together.
 *
 * One table of system calls. Chapter 1 is the only one that talks to the
 * kernel; the rest asks through `struct cube_world`. With another table a
 * cluster, its network and its disks run inside one test, on a clock that is
 * a variable and with faults that a seed chooses, and do so again.
 *
 * One thread. A loop calls back whoever has something to do, and nobody
 * waits inside such a call. There are no locks, no mutable variables at file
 * scope, and so any number of managers and workers in one process.
 *
 * One loop of reconciliation. Worker and manager compare what is wanted with
 * what is observed, and act on the difference. A restart, a lost message or
 * a lost machine is no case of its own: it is a difference.
 *
 * Disk first. What a manager has answered with 201 is on disk; no byte that
 * depends on a change leaves the process before that change is.
 *
 * The life of a task, with the function that does it, and its chapter:
 *
 *   asked for   cube_client_submit (13) sends POST /tasks;
 *               cube_manager_post (12) reads it (cube_task_or_event_parse, 7),
 *               refuses what can never run (cube_task_check, 7), and writes
 *               a record: Pending (cube_manager_accept, 12)
 *   kept        the turn ends: one commit for all its changes
 *               (cube_commit_turn, 5), the disk syncs beside the loop
 *               (cube_world_job_start, 1), and only then the 201 leaves
 *               (cube_reply_kept, 7)
 *   placed      cube_charge_reconcile (12) sees a record without a node and
 *               asks cube_schedule (10); cube_charge_assign (12) writes node
 *               and attempt: Scheduled. On disk as well, before
 *   delivered   cube_charge_deliver (12) sends it to the worker, which keeps
 *               it in the same way (cube_worker_order, cube_worker_take, 11)
 *   started     cube_unit_reconcile (11) sees a record without a container:
 *               cube_unit_start has the runtime (9) pull, create and start
 *               one; cube_unit_started writes what came of it: Running
 *   told        the change is a line in the worker's feed (cube_feed_push, 7),
 *               cube_member_on_task (12) reads it, cube_charge_copy writes it
 *               to the manager's record, whose own feed shows it to whoever
 *               waits for it, such as `cube run`
 *   watched     cube_health_check (7) asks it for its health. Sick or exited
 *               it is Failed (cube_unit_record_exit, 11), and after a while
 *               started again (cube_unit_record_restart, 11)
 *   moved       five seconds of silence and its node is lost
 *               (cube_member_lose, 12): Pending (cube_charge_displace), then
 *               as above, with the next attempt; when the node comes back,
 *               the old one is stopped (cube_charge_see_strays, 12)
 *   stopped     cube_manager_delete (12) writes the wish, then 204;
 *               cube_report_stop tells the worker, cube_unit_dispose (11)
 *               stops and removes the container: Completed
 *   forgotten   a week later: cube_worker_sweep (11), cube_manager_sweep (12)
 *
 * Words. A task is what shall run; a node is a machine's worker as a manager
 * sees it; an attempt is one assignment of a task to a node, numbered. A
 * function's name says its chapter: cube_store_commit is of chapter 4. What
 * is public is marked CUBE_API and described in cube.h; all else is static.
 *
 * Simple on purpose. There is one manager, and no election of another: its
 * store can be copied, and what runs goes on while it is away. There are no
 * volumes, no networks between tasks, no TLS of its own. Limits are macros
 * with names. Each chapter says what it has left naive, and when that stops
 * being fine.
 *
 * What can be set, by -D or before the include:
 *
 *   CUBE_MALLOC, CUBE_REALLOC, CUBE_FREE   another allocator: all or none
 *   CUBE_OOM()        runs when memory is gone; must not return
 *   CUBE_ASSERT(x)    checks of Cube on itself; assert by default
 *   CUBE_API          before each public function: `static`, an export ...
 *   CUBE_JSON_H       '"json.h"': sheredom's own file instead of chapter 3
 *   CUBE_WITH_CURL    1: chapter 13 can talk to https, by libcurl
 *
 * The platform is Linux, by gcc or clang, with glibc or musl. What needs it:
 * epoll, eventfd and pidfd in chapter 1, the supervisor of processes, /proc
 * in chapter 8, control groups in chapter 9.
 */

#define CUBE_C
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "cube.h"




/* ==== Chapter 1. World ==== uses: nothing ==== */
/*
 * The problem. An orchestrator is wrong in its seams: a message that comes
 * late, a disk that is full, a process that dies between two steps. None of
 * that can be tested while time, network and disk are asked for all over the
 * program.
 *
 * The simplest thing that works is a table of functions, as SQLite's VFS is
 * for files: `struct cube_world` in cube.h. All chapters above ask through it
 * and this one, the only one that makes system calls, fills it for Linux.
 * Another table puts a whole cluster into one process with a virtual clock.
 *
 *      chapters 2 .. 13
 *            |  w->send(w->ctx, fd, ...)      one table, passed down from
 *            v                                the program's main()
 *      struct cube_world
 *        /           \
 *   this chapter    a test's world: virtual clock, faults from a seed
 *        |
 *     Linux
 *
 * What a function of the table promises:
 *
 *   - it returns a negative errno value when it fails, so that no errno is
 *     read far from the call that set it;
 *   - it is never interrupted half way: EINTR is retried here, where a retry
 *     is right;
 *   - sockets do not block, are closed on exec, and never raise SIGPIPE.
 *
 * Two system calls stall for seconds, and no flag prevents it: fdatasync on a
 * busy disk, getaddrinfo on a slow name server. Those are jobs: a helper
 * thread of each kind does them one after the other and reports through the
 * poll's wake descriptor. Nothing above this chapter sees a thread.
 *
 *    loop                         helper of that kind
 *     | job_start(job) ---queue-->  |  fdatasync(fd)
 *     | ... turns ...               |
 *     | <---- done list, eventfd ---|
 *     | poll_wait reports job       v
 *
 * The helper works on a copy, so a job can be cancelled, and its memory freed,
 * while the system call is still stuck: the result is then dropped. A poll
 * that is closed leaves its helpers to end by themselves; the last one to
 * leave frees what they shared.
 *
 * Naive on purpose: one helper of each kind, so many stores on one loop sync
 * in turn. With more than a few disks that would want a helper for each.
 */

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <dirent.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define CUBE_LISTEN_BACKLOG 512

/* ---- Clocks, randomness, environment ---- */

/* Milliseconds since boot, time asleep included: a laptop that was shut for an
 * hour has its timers due, and no change of the date moves them. */
static int64_t cube_world_now_ms(void *ctx)
{
    struct timespec t;

    (void)ctx;
    clock_gettime(CLOCK_BOOTTIME, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* Nanoseconds since 1970, for people and files. It may jump either way, so no
 * timer is set by it. */
static int64_t cube_world_wall_ns(void *ctx)
{
    struct timespec t;

    (void)ctx;
    clock_gettime(CLOCK_REALTIME, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Fills all of `buf` or fails. getrandom gives less than it was asked for when
 * a signal comes, and waits only until the kernel has its first entropy after
 * boot. */
static int cube_world_random(void *ctx, void *buf, size_t len)
{
    unsigned char *p = buf;

    (void)ctx;
    while (len > 0) {
        ssize_t n = getrandom(p, len, 0);

        if (n < 0 && errno != EINTR)
            return -errno;
        if (n > 0) {
            p += n;
            len -= (size_t)n;
        }
    }
    return 0;
}

/* Borrowed from the environment, valid until the program changes it; NULL when
 * there is none of that name. */
static const char *cube_world_env(void *ctx, const char *name)
{
    (void)ctx;
    return getenv(name);
}

/* The effective one: it decides what we may do, not who called us. */
static unsigned cube_world_uid(void *ctx)
{
    (void)ctx;
    return (unsigned)geteuid();
}

/* ---- Sockets ---- */

/* The kernel's form of an address; returns its length. A path that fills its
 * array to the end is cut by the last byte, so that the kernel always sees a
 * NUL. */
static socklen_t cube_world_to_sockaddr(const struct cube_addr *a,
                                        struct sockaddr_storage *out)
{
    memset(out, 0, sizeof *out);
    if (a->kind == CUBE_ADDR_UNIX) {
        struct sockaddr_un *u = (struct sockaddr_un *)out;

        u->sun_family = AF_UNIX;
        memcpy(u->sun_path, a->path, sizeof u->sun_path);
        u->sun_path[sizeof u->sun_path - 1] = 0;
        return sizeof *u;
    }
    if (a->kind == CUBE_ADDR_IP6) {
        struct sockaddr_in6 *s = (struct sockaddr_in6 *)out;

        s->sin6_family = AF_INET6;
        s->sin6_port = htons(a->port);
        s->sin6_scope_id = a->scope;
        memcpy(&s->sin6_addr, a->ip, 16);
        return sizeof *s;
    }
    struct sockaddr_in *s = (struct sockaddr_in *)out;

    s->sin_family = AF_INET;
    s->sin_port = htons(a->port);
    memcpy(&s->sin_addr, a->ip, 4);
    return sizeof *s;
}

/* The other way. The path of a UNIX socket's peer is left out: those who
 * connect have none, as a rule, and nobody asks. */
static void cube_world_from_sockaddr(const struct sockaddr_storage *s,
                                     struct cube_addr *out)
{
    memset(out, 0, sizeof *out);
    if (s->ss_family == AF_INET6) {
        const struct sockaddr_in6 *i = (const struct sockaddr_in6 *)s;

        out->kind = CUBE_ADDR_IP6;
        out->port = ntohs(i->sin6_port);
        out->scope = i->sin6_scope_id;
        memcpy(out->ip, &i->sin6_addr, 16);
    } else if (s->ss_family == AF_INET) {
        const struct sockaddr_in *i = (const struct sockaddr_in *)s;

        out->kind = CUBE_ADDR_IP4;
        out->port = ntohs(i->sin_port);
        memcpy(out->ip, &i->sin_addr, 4);
    } else {
        out->kind = CUBE_ADDR_UNIX;
    }
}

/* A stream socket of the family of the address, not bound to anything; the
 * caller closes it. The flags go in with the call: set afterwards, a clone in
 * another thread could inherit the descriptor in between. */
static int cube_world_socket(const struct cube_addr *a)
{
    int family = a->kind == CUBE_ADDR_UNIX ? AF_UNIX
                 : a->kind == CUBE_ADDR_IP6 ? AF_INET6 : AF_INET;
    int fd = socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

    return fd < 0 ? -errno : fd;
}

/* Requests and answers are written whole, so waiting for more only delays. */
static void cube_world_no_delay(int fd)
{
    int on = 1;

    (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

/* A listening socket for `addr` (port 0: any), or a negative errno value, with
 * nothing left open. An address in TIME_WAIT from our last run is taken over,
 * and an IPv6 address means IPv6 alone, so that "::" and "0.0.0.0" can be
 * listened on side by side, whatever /proc/sys/net/ipv6/bindv6only says. */
static int cube_world_listen(void *ctx, const struct cube_addr *addr)
{
    struct sockaddr_storage s;
    socklen_t len = cube_world_to_sockaddr(addr, &s);
    int on = 1;
    int fd = cube_world_socket(addr);

    (void)ctx;
    if (fd < 0)
        return fd;
    (void)setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (addr->kind == CUBE_ADDR_IP6)
        (void)setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof on);
    if (bind(fd, (struct sockaddr *)&s, len) < 0 ||
        listen(fd, CUBE_LISTEN_BACKLOG) < 0) {
        int e = errno;

        close(fd);
        return -e;
    }
    return fd;
}

/* One connection, or -EAGAIN when none waits. Who has given up again while it
 * waited in the queue (ECONNABORTED) is passed over: it would tell the caller
 * only to call once more. */
static int cube_world_accept(void *ctx, int fd, struct cube_addr *peer)
{
    struct sockaddr_storage s;
    socklen_t len = sizeof s;
    int got;

    (void)ctx;
    memset(&s, 0, sizeof s);
    do
        got = accept4(fd, (struct sockaddr *)&s, &len,
                      SOCK_NONBLOCK | SOCK_CLOEXEC);
    while (got < 0 && (errno == EINTR || errno == ECONNABORTED));
    if (got < 0)
        return -errno;
    cube_world_from_sockaddr(&s, peer);
    if (peer->kind != CUBE_ADDR_UNIX)
        cube_world_no_delay(got);
    return got;
}

/* Begins a connection and returns its descriptor at once. It is there, or has
 * failed, when the descriptor is writable; cube_world_connected then says
 * which. A connect that a signal interrupts goes on in the kernel, and calling
 * it again would give EALREADY, so EINTR counts as begun. */
static int cube_world_connect(void *ctx, const struct cube_addr *addr)
{
    struct sockaddr_storage s;
    socklen_t len = cube_world_to_sockaddr(addr, &s);
    int fd = cube_world_socket(addr);

    (void)ctx;
    if (fd < 0)
        return fd;
    if (addr->kind != CUBE_ADDR_UNIX)
        cube_world_no_delay(fd);
    if (connect(fd, (struct sockaddr *)&s, len) < 0 && errno != EINPROGRESS &&
        errno != EINTR) {
        int e = errno;

        close(fd);
        return -e;
    }
    return fd;
}

/* Reading SO_ERROR clears it: ask once. */
static int cube_world_connected(void *ctx, int fd)
{
    int e = 0;
    socklen_t len = sizeof e;

    (void)ctx;
    if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &e, &len) < 0)
        return -errno;
    return -e;
}

/* Where a listening socket ended up, once it was told port 0. */
static int cube_world_local_addr(void *ctx, int fd, struct cube_addr *addr)
{
    struct sockaddr_storage s;
    socklen_t len = sizeof s;

    (void)ctx;
    memset(&s, 0, sizeof s);
    if (getsockname(fd, (struct sockaddr *)&s, &len) < 0)
        return -errno;
    cube_world_from_sockaddr(&s, addr);
    return 0;
}

/* The number of bytes, 0 at the end of the stream, -EAGAIN when there is
 * nothing yet. INT_MAX is the most that the result can say. */
static int cube_world_recv(void *ctx, int fd, void *buf, size_t len)
{
    ssize_t n;

    (void)ctx;
    do
        n = recv(fd, buf, len > INT_MAX ? INT_MAX : len, 0);
    while (n < 0 && errno == EINTR);
    return n < 0 ? -errno : (int)n;
}

/* How many bytes the kernel took, often fewer than `len`. A peer that is gone
 * is -EPIPE and no signal: the program may not have heard of SIGPIPE. */
static int cube_world_send(void *ctx, int fd, const void *buf, size_t len)
{
    ssize_t n;

    (void)ctx;
    do
        n = send(fd, buf, len > INT_MAX ? INT_MAX : len, MSG_NOSIGNAL);
    while (n < 0 && errno == EINTR);
    return n < 0 ? -errno : (int)n;
}

/* Says that no more will be sent; what the peer sends can still be
 * received. */
static int cube_world_shut(void *ctx, int fd)
{
    (void)ctx;
    return shutdown(fd, SHUT_WR) < 0 ? -errno : 0;
}

/* Never retried: on Linux the descriptor is free even if close says EINTR, and
 * a second close could hit one that another thread has just got. */
static int cube_world_close(void *ctx, int fd)
{
    (void)ctx;
    return close(fd) < 0 ? -errno : 0;
}

/* ---- Jobs: the two calls that stall ---- */

/* Who owns what here: a job is its starter's, from first to last. While it is
 * queued, worked on or done, the lists below only link it; job_cancel unlinks
 * it from wherever it is, and from then on nobody touches it. */
#define CUBE_JOB_KINDS 2

/* One thread of one kind. `current` is what it works on, NULL when that job
 * was cancelled meanwhile. */
struct cube_helper {
    struct cube_jobs *jobs;
    struct cube_job *first, *last, *current;
    pthread_cond_t has_work;
    bool is_started;
};

/*
 * What a poll shares with its helpers; freed by whoever leaves last.
 *
 *      poll open                1 user
 *      first sync job           2 users: poll, sync helper
 *      first resolve job        3 users
 *      poll closed, one helper  1 user: that helper, stuck in fdatasync
 *      still at work
 *      fdatasync returns        0 users: freed by the helper
 *
 * The lock guards everything but `wake_fd`, which never changes.
 */
struct cube_jobs {
    pthread_mutex_t lock;
    struct cube_helper helpers[CUBE_JOB_KINDS];
    struct cube_job *done;
    int wake_fd;
    int users; /* the poll and each started helper */
    bool is_closed;
};

struct cube_poll {
    int epoll_fd;
    struct cube_jobs *jobs;
};

/* The token of the wake descriptor itself; callers may use any other. */
#define CUBE_WAKE_TOKEN UINT64_MAX

/* Makes the poll's wait return. From any thread. */
static void cube_jobs_ring(struct cube_jobs *jobs)
{
    uint64_t one = 1;

    /* A full counter (EAGAIN) is as good: it is readable then. */
    if (write(jobs->wake_fd, &one, sizeof one) < 0)
        return;
}

/* Call with the lock held; gives it back. */
static void cube_jobs_leave(struct cube_jobs *jobs)
{
    bool is_last = --jobs->users == 0;

    pthread_mutex_unlock(&jobs->lock);
    if (!is_last)
        return;
    for (int i = 0; i < CUBE_JOB_KINDS; i++)
        pthread_cond_destroy(&jobs->helpers[i].has_work);
    pthread_mutex_destroy(&jobs->lock);
    close(jobs->wake_fd);
    free(jobs);
}

/* getaddrinfo has codes of its own. A name that does not exist and a name
 * without an address are the same to whoever wants to connect: -ENOENT. */
static int cube_job_resolve_error(int code)
{
    switch (code) {
    case EAI_AGAIN:
        return -EAGAIN;
    case EAI_MEMORY:
        return -ENOMEM;
    case EAI_SYSTEM:
        return errno ? -errno : -EIO;
    default:
        return -ENOENT;
    }
}

/* Fills `addrs` with at most CUBE_JOB_ADDRS addresses, in the order in which
 * RFC 6724 has them tried. Ports are 0 in them; SOCK_STREAM is asked for so
 * that each address comes once and not once per protocol. */
static void cube_job_resolve(struct cube_job *job)
{
    struct addrinfo hints, *found = NULL;
    int code;

    memset(&hints, 0, sizeof hints);
    hints.ai_socktype = SOCK_STREAM;
    code = getaddrinfo(job->host, NULL, &hints, &found);
    if (code != 0) {
        job->result = cube_job_resolve_error(code);
        return;
    }
    job->addr_count = 0;
    for (struct addrinfo *a = found; a; a = a->ai_next) {
        struct sockaddr_storage s;

        if (job->addr_count == CUBE_JOB_ADDRS || a->ai_addrlen > sizeof s)
            continue;
        memset(&s, 0, sizeof s);
        memcpy(&s, a->ai_addr, a->ai_addrlen);
        cube_world_from_sockaddr(&s, &job->addrs[job->addr_count++]);
    }
    freeaddrinfo(found);
    job->result = job->addr_count > 0 ? 0 : -ENOENT;
}

/* The stalling call itself, without the lock; the outcome is in
 * `job->result`. */
static void cube_job_do(struct cube_job *job)
{
    int r;

    if (job->kind == CUBE_JOB_RESOLVE) {
        cube_job_resolve(job);
        return;
    }
    do
        r = fdatasync(job->fd);
    while (r < 0 && errno == EINTR);
    job->result = r < 0 ? -errno : 0;
}

/* A helper's life: take a job, do it on a copy, report it unless it was
 * cancelled, until the poll is closed. */
static void *cube_helper_main(void *arg)
{
    struct cube_helper *h = arg;
    struct cube_jobs *jobs = h->jobs;

    pthread_mutex_lock(&jobs->lock);
    while (!jobs->is_closed) {
        struct cube_job copy;

        if (!h->first) {
            pthread_cond_wait(&h->has_work, &jobs->lock);
            continue;
        }
        h->current = h->first;
        h->first = h->first->next;
        copy = *h->current;
        pthread_mutex_unlock(&jobs->lock);
        cube_job_do(&copy);
        pthread_mutex_lock(&jobs->lock);
        if (h->current && !jobs->is_closed) {
            copy.next = jobs->done;
            *h->current = copy;
            jobs->done = h->current;
            cube_jobs_ring(jobs);
        }
        h->current = NULL;
    }
    cube_jobs_leave(jobs);
    return NULL;
}

/* Signals are the program's: a helper takes none. Call with the lock held. It
 * is detached, not joined: a poll must be able to close while a helper hangs
 * in a dead disk. */
static int cube_helper_start(struct cube_helper *h)
{
    pthread_t thread;
    sigset_t all, before;
    int e;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    e = pthread_create(&thread, NULL, cube_helper_main, h);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (e != 0)
        return -e;
    pthread_detach(thread);
    h->is_started = true;
    h->jobs->users++;
    return 0;
}

/* Queues a job; its poll reports it once, and not before this has returned. On
 * failure (no thread to be had) the job was never queued. */
static int cube_world_job_start(void *ctx, struct cube_poll *p,
                                struct cube_job *job)
{
    struct cube_helper *h = &p->jobs->helpers[job->kind];
    int r = 0;

    (void)ctx;
    job->next = NULL;
    job->result = 0;
    pthread_mutex_lock(&p->jobs->lock);
    if (!h->is_started)
        r = cube_helper_start(h);
    if (r == 0) {
        if (h->first)
            h->last->next = job;
        else
            h->first = job;
        h->last = job;
        pthread_cond_signal(&h->has_work);
    }
    pthread_mutex_unlock(&p->jobs->lock);
    return r;
}

/* Whether it was in that list. */
static bool cube_job_unlink(struct cube_job **list, struct cube_job *job)
{
    for (; *list; list = &(*list)->next) {
        if (*list == job) {
            *list = job->next;
            return true;
        }
    }
    return false;
}

/* After this the job is reported no more, and its memory is the caller's
 * again. Harmless for one that was reported already. The system call itself
 * cannot be called back: a helper that is at it loses its `current` and drops
 * the result. */
static void cube_world_job_cancel(void *ctx, struct cube_poll *p,
                                  struct cube_job *job)
{
    struct cube_helper *h = &p->jobs->helpers[job->kind];

    (void)ctx;
    pthread_mutex_lock(&p->jobs->lock);
    if (h->current == job)
        h->current = NULL;
    if (cube_job_unlink(&h->first, job)) {
        for (h->last = h->first; h->last && h->last->next;)
            h->last = h->last->next;
    }
    cube_job_unlink(&p->jobs->done, job);
    pthread_mutex_unlock(&p->jobs->lock);
}

/* ---- Readiness ---- */

/* One user, the poll; no thread yet. Helpers start with the first job of their
 * kind, so a program without a store has no threads. */
static struct cube_jobs *cube_jobs_new(void)
{
    struct cube_jobs *jobs = calloc(1, sizeof *jobs);

    if (!jobs)
        return NULL;
    jobs->wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (jobs->wake_fd < 0) {
        free(jobs);
        return NULL;
    }
    pthread_mutex_init(&jobs->lock, NULL);
    for (int i = 0; i < CUBE_JOB_KINDS; i++) {
        pthread_cond_init(&jobs->helpers[i].has_work, NULL);
        jobs->helpers[i].jobs = jobs;
    }
    jobs->users = 1;
    return jobs;
}

/* EPOLLRDHUP goes with reading: a peer that has closed is something to read
 * about. Hangups and errors come unasked. */
static uint32_t cube_world_epoll_events(unsigned events)
{
    return (events & CUBE_READ ? (uint32_t)EPOLLIN | EPOLLRDHUP : 0) |
           (events & CUBE_WRITE ? (uint32_t)EPOLLOUT : 0);
}

/* Level-triggered: what is not dealt with now is reported again, so a turn may
 * stop reading after its share without losing anything. */
static int cube_world_epoll_ctl(struct cube_poll *p, int op, int fd,
                                unsigned events, uint64_t token)
{
    struct epoll_event e;

    memset(&e, 0, sizeof e);
    e.events = cube_world_epoll_events(events);
    e.data.u64 = token;
    return epoll_ctl(p->epoll_fd, op, fd, &e) < 0 ? -errno : 0;
}

static int cube_world_poll_add(void *ctx, struct cube_poll *p, int fd,
                               unsigned events, uint64_t token)
{
    (void)ctx;
    return cube_world_epoll_ctl(p, EPOLL_CTL_ADD, fd, events, token);
}

static int cube_world_poll_change(void *ctx, struct cube_poll *p, int fd,
                                  unsigned events, uint64_t token)
{
    (void)ctx;
    return cube_world_epoll_ctl(p, EPOLL_CTL_MOD, fd, events, token);
}

static int cube_world_poll_remove(void *ctx, struct cube_poll *p, int fd)
{
    (void)ctx;
    return cube_world_epoll_ctl(p, EPOLL_CTL_DEL, fd, 0, 0);
}

/* Jobs that are still queued are never reported; helpers are told to leave and
 * not waited for. */
static void cube_world_poll_close(void *ctx, struct cube_poll *p)
{
    (void)ctx;
    if (!p)
        return;
    close(p->epoll_fd);
    pthread_mutex_lock(&p->jobs->lock);
    p->jobs->is_closed = true;
    for (int i = 0; i < CUBE_JOB_KINDS; i++)
        pthread_cond_signal(&p->jobs->helpers[i].has_work);
    cube_jobs_leave(p->jobs);
    free(p);
}

/* NULL when descriptors or memory ran out. What was opened is closed by
 * then. */
static struct cube_poll *cube_world_poll_open(void *ctx)
{
    struct cube_poll *p = calloc(1, sizeof *p);

    (void)ctx;
    if (!p)
        return NULL;
    p->jobs = cube_jobs_new();
    p->epoll_fd = p->jobs ? epoll_create1(EPOLL_CLOEXEC) : -1;
    if (p->epoll_fd < 0) {
        if (p->jobs) {
            pthread_mutex_lock(&p->jobs->lock);
            cube_jobs_leave(p->jobs);
        }
        free(p);
        return NULL;
    }
    (void)cube_world_epoll_ctl(p, EPOLL_CTL_ADD, p->jobs->wake_fd, CUBE_READ,
                               CUBE_WAKE_TOKEN);
    return p;
}

/* Readable when poll_wait would have something to say: so the loop can be hung
 * into another one. */
static int cube_world_poll_fd(void *ctx, struct cube_poll *p)
{
    (void)ctx;
    return p->epoll_fd;
}

/* The one function of a poll that any thread may call. */
static void cube_world_poll_wake(void *ctx, struct cube_poll *p)
{
    (void)ctx;
    cube_jobs_ring(p->jobs);
}

/* Takes up to `max` done jobs; what is left rings again. */
static int cube_jobs_collect(struct cube_jobs *jobs, struct cube_ready *out,
                             int max)
{
    uint64_t count;
    int n = 0;

    /* Reading sets the counter to 0 before the list is looked at: a job that
     * is done in between rings again, which costs a turn and loses nothing. */
    if (read(jobs->wake_fd, &count, sizeof count) < 0)
        return 0;
    pthread_mutex_lock(&jobs->lock);
    for (; jobs->done && n < max; n++) {
        memset(&out[n], 0, sizeof out[n]);
        out[n].job = jobs->done;
        jobs->done = jobs->done->next;
    }
    if (jobs->done)
        cube_jobs_ring(jobs);
    pthread_mutex_unlock(&jobs->lock);
    return n;
}

/* Events taken at once. What is beyond is reported by the next wait: epoll
 * goes round, so that nobody starves. */
#define CUBE_POLL_MAX 64

/* Waits for at most `timeout_ms` (-1: for ever) and fills `out` with what is
 * ready, descriptors first, then done jobs (`job` is set, the rest is 0). 0:
 * the time is over, or a signal came, or somebody woke us; the caller cannot
 * tell and looks at its clock. */
static int cube_world_poll_wait(void *ctx, struct cube_poll *p,
                                struct cube_ready *out, int max,
                                int timeout_ms)
{
    struct epoll_event got[CUBE_POLL_MAX];
    int n, used = 0;
    bool is_woken = false;

    (void)ctx;
    if (max > CUBE_POLL_MAX)
        max = CUBE_POLL_MAX;
    n = epoll_wait(p->epoll_fd, got, max, timeout_ms);
    if (n < 0)
        return errno == EINTR ? 0 : -errno;
    for (int i = 0; i < n; i++) {
        uint32_t e = got[i].events;

        if (got[i].data.u64 == CUBE_WAKE_TOKEN) {
            is_woken = true;
            continue;
        }
        out[used].token = got[i].data.u64;
        out[used].job = NULL;
        out[used++].events = (e & (EPOLLIN | EPOLLRDHUP) ? CUBE_READ : 0) |
                             (e & EPOLLOUT ? CUBE_WRITE : 0) |
                             (e & (EPOLLHUP | EPOLLERR) ? CUBE_HANGUP : 0);
    }
    if (is_woken)
        used += cube_jobs_collect(p->jobs, out + used, max - used);
    return used;
}

/* ---- Files ---- */

/* A descriptor, closed on exec, or a negative errno value. New files are for
 * their owner alone: they hold tasks, with the secrets in their
 * environment. */
static int cube_world_open(void *ctx, const char *path, unsigned flags)
{
    int mode = (flags & CUBE_OPEN_WRITE ? O_RDWR : O_RDONLY) | O_CLOEXEC |
               (flags & CUBE_OPEN_CREATE ? O_CREAT : 0) |
               (flags & CUBE_OPEN_TRUNC ? O_TRUNC : 0) |
               (flags & CUBE_OPEN_EXCL ? O_EXCL : 0);
    int fd;

    (void)ctx;
    do
        fd = open(path, mode, 0600);
    while (fd < 0 && errno == EINTR);
    return fd < 0 ? -errno : fd;
}

/* As many bytes as there are, up to `len`; 0 beyond the end of the file. */
static int64_t cube_world_pread(void *ctx, int fd, void *buf, size_t len,
                                int64_t at)
{
    ssize_t n;

    (void)ctx;
    do
        n = pread(fd, buf, len, at);
    while (n < 0 && errno == EINTR);
    return n < 0 ? -errno : n;
}

/* May write less than `len` on a disk that is nearly full; the next call says
 * -ENOSPC. */
static int64_t cube_world_pwrite(void *ctx, int fd, const void *buf,
                                 size_t len, int64_t at)
{
    ssize_t n;

    (void)ctx;
    do
        n = pwrite(fd, buf, len, at);
    while (n < 0 && errno == EINTR);
    return n < 0 ? -errno : n;
}

static int cube_world_truncate(void *ctx, int fd, int64_t size)
{
    (void)ctx;
    return ftruncate(fd, size) < 0 ? -errno : 0;
}

static int64_t cube_world_size(void *ctx, int fd)
{
    struct stat s;

    (void)ctx;
    return fstat(fd, &s) < 0 ? -errno : (int64_t)s.st_size;
}

/* The job's work, done here and now: for small files at the start of a
 * program, where there is no loop yet. fdatasync suffices for them: the size
 * of a file that has grown is synced with it, times are not, and nobody needs
 * those. */
static int cube_world_sync(void *ctx, int fd)
{
    struct cube_job job;

    (void)ctx;
    memset(&job, 0, sizeof job);
    job.kind = CUBE_JOB_SYNC;
    job.fd = fd;
    cube_job_do(&job);
    return job.result;
}

/* What makes a new name or a rename survive a power cut: syncing the file
 * writes its bytes, the name is the directory's. */
static int cube_world_sync_dir(void *ctx, const char *path)
{
    int r, fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

    (void)ctx;
    if (fd < 0)
        return -errno;
    do
        r = fsync(fd);
    while (r < 0 && errno == EINTR);
    r = r < 0 ? -errno : 0;
    close(fd);
    return r;
}

/* Of the open file and not of the process (flock), so that two stores in one
 * program shut each other out, too. It goes when the last descriptor is
 * closed, also by a crash. -EBUSY: somebody has it; never waits. */
static int cube_world_lock(void *ctx, int fd)
{
    (void)ctx;
    if (flock(fd, LOCK_EX | LOCK_NB) == 0)
        return 0;
    return errno == EWOULDBLOCK ? -EBUSY : -errno;
}

/* Replaces `to` if it is there: whoever opens it finds the old file or the
 * new. */
static int cube_world_rename(void *ctx, const char *from, const char *to)
{
    (void)ctx;
    return rename(from, to) < 0 ? -errno : 0;
}

static int cube_world_unlink(void *ctx, const char *path)
{
    (void)ctx;
    return unlink(path) < 0 ? -errno : 0;
}

/* For its owner alone, as the files in it. */
static int cube_world_mkdir(void *ctx, const char *path)
{
    (void)ctx;
    return mkdir(path, 0700) < 0 ? -errno : 0;
}

static int cube_world_rmdir(void *ctx, const char *path)
{
    (void)ctx;
    return rmdir(path) < 0 ? -errno : 0;
}

/* By bytes: alphasort would follow the locale that a program has set. */
static int cube_world_by_bytes(const struct dirent **a,
                               const struct dirent **b)
{
    return strcmp((*a)->d_name, (*b)->d_name);
}

/* Calls `each` with every name but "." and "..", sorted, so that a run of the
 * same program on the same files does the same. `name` is valid in the call
 * only. On failure `each` was not called. */
static int cube_world_list(void *ctx, const char *dir,
                           void (*each)(void *arg, const char *name),
                           void *arg)
{
    struct dirent **names;
    int n = scandir(dir, &names, NULL, cube_world_by_bytes);

    (void)ctx;
    if (n < 0)
        return -errno;
    for (int i = 0; i < n; i++) {
        const char *name = names[i]->d_name;

        if (strcmp(name, ".") != 0 && strcmp(name, "..") != 0)
            each(arg, name);
        free(names[i]);
    }
    free(names);
    return 0;
}

/* Bytes of the file system that `path` is on. `free` includes what is reserved
 * for root. */
static int cube_world_space(void *ctx, const char *path,
                            struct cube_space *out)
{
    struct statvfs s;

    (void)ctx;
    if (statvfs(path, &s) < 0)
        return -errno;
    out->all = (uint64_t)s.f_blocks * s.f_frsize;
    out->free = (uint64_t)s.f_bfree * s.f_frsize;
    out->free_inodes = s.f_ffree;
    return 0;
}

/* ---- Supervised processes ---- */

/*
 * A task that is a process must outlive the worker that started it, and its
 * exit code must not be lost while no worker looks. So each has a small
 * supervisor as its parent, which belongs to nobody:
 *
 *      worker --clone--> middle --clone--> supervisor --clone--> command
 *        |                 |                   |        (a group of its own)
 *        |<--- _exit ------+                   |  a session of its own,
 *        |                                     |  subreaper of all below
 *        |<--- report: started, or errno ------+
 *
 * What the supervisor knows is in the task's directory, for whoever asks:
 *
 *   lock      write-locked (POSIX) by the supervisor as long as it lives, so
 *             that F_GETLK tells its PID and no reused PID can pose as it;
 *             holds "started NANOSECONDS" once it was held, and then "pid
 *             NUMBER" of the command
 *   log       output, standard and error, in the order it came. When it is
 *             full it is renamed to log.1, the next one to log.2: a number is
 *             used once, so a reader that follows knows where it is. Older
 *             ones are removed. What a full disk refuses is lost and counted,
 *             and the command never waits for the disk
 *   exit      written beside as exit.new, synced, renamed: exists whole or
 *             not at all
 *   work/     where the command starts
 *
 *      exit:  code 137           128 + signal, if it was a signal
 *             signal 9           0: it ended by itself
 *             oom 1              the kernel killed it for its memory
 *             error 0            the errno value if it could not be executed
 *             started 1700000000123456789     nanoseconds since 1970
 *             finished 1700000003123456789
 *
 *      held lock, no exit    it runs
 *      free lock, exit       it has ended as `exit` says
 *      free lock, no exit    the supervisor was killed, and with it the
 *                            command (PR_SET_PDEATHSIG), or the machine fell
 *
 * The 512 bytes of exit.new are taken from the disk before the command runs:
 * a disk that is full by the time it ends still has room for its exit code.
 *
 * A life of a supervisor:
 *
 *      prepare --fails--> report errno, end
 *         |
 *      clone, exec --fails--> exit file with 127 or 126, report errno, end
 *         |
 *      report 0; copy output to log; SIGTERM and SIGUSR1 go to the command
 *         |
 *      the command has ended: its group is killed, then its descendants that
 *      left the group (they became our children) until none is left
 *         |
 *      rest of the output; exit file; cgroups removed; end, lock free
 *
 * The caller may have threads, which a clone leaves behind with whatever
 * locks they held. So nothing below cube_sup_ allocates or formats with
 * libc: system calls and memory that was there before.
 *
 * The clone to the middle asks for no signal at its end, so the program
 * around us sees no SIGCHLD, and its waitpid(-1) no stranger.
 *
 * Naive on purpose: the supervisor is a copy of the caller, so it keeps the
 * pages that the caller has changed since; a program of its own would have to
 * be installed somewhere. All signals stay blocked in it, so only SIGKILL
 * ends it early.
 */

#define CUBE_SUP_REPORT 3     /* the descriptor of the report in it */
#define CUBE_SUP_CHUNK 16384  /* output copied at once */
#define CUBE_SUP_SWEEPS 500   /* of 10 ms: then what is stuck stays */
#define CUBE_SUP_EXIT 512     /* room for the exit file */
#define CUBE_SUP_WAIT_MS 10000 /* for the report */

/*
 * All that a supervisor knows, in memory that the caller took before the
 * clone: each process has its copy, and nobody frees the supervisor's. Its
 * descriptors once it runs:
 *
 *    0 1 2   /dev/null
 *    3       the report, a pipe that the caller reads: one int
 *    4       the task's directory
 *    5 ..    lock, log, exit.new, signalfd, pipe of the output
 */
struct cube_sup {
    const struct cube_spawn *spec;
    int report_fd, dir_fd, exit_fd, log_fd, pipe_fd, signal_fd;
    pid_t child;
    bool has_ended;
    int status;          /* as waitpid gave it, once it has ended */
    int exec_error;      /* as `spawn` returns it; 0 if it went well */
    int64_t started, finished;
    int64_t log_size, lost; /* bytes in log; bytes that no disk took */
    int64_t log_number;     /* how many logs were full before this one */
    int lock_fd;
    size_t lock_len;        /* of the text in it */
    char chunk[CUBE_SUP_CHUNK];
};

/* A fork without the handlers of pthread_atfork, which are the program's. */
static pid_t cube_sup_clone(int exit_signal)
{
    return (pid_t)syscall(SYS_clone, exit_signal, NULL, NULL, NULL, NULL);
}

/* Puts `text` at `at` without a NUL and returns where it ends. The callers
 * know that it fits; nothing here checks. */
static size_t cube_sup_put(char *out, size_t at, const char *text)
{
    size_t len = strlen(text);

    memcpy(out + at, text, len);
    return at + len;
}

/* The same with a number, which must not be negative. Nineteen digits hold
 * INT64_MAX. */
static size_t cube_sup_put_number(char *out, size_t at, int64_t number)
{
    char digits[20];
    size_t n = 0;

    do
        digits[n++] = (char)('0' + number % 10);
    while ((number /= 10) > 0);
    while (n > 0)
        out[at++] = digits[--n];
    return at;
}

/* Adds a line "NAME NUMBER". */
static size_t cube_sup_put_line(char *out, size_t at, const char *name,
                                int64_t number)
{
    at = cube_sup_put(out, at, name);
    at = cube_sup_put(out, at, " ");
    at = cube_sup_put_number(out, at, number);
    return cube_sup_put(out, at, "\n");
}

/* Closes all from `first` on. close_range is in Linux since 5.9. Before, each
 * number is tried, of a million at most: with no limit set, trying them all
 * would take minutes. */
static void cube_sup_close_from(int first)
{
    struct rlimit most;

    if (syscall(SYS_close_range, (unsigned)first, ~0u, 0u) == 0)
        return;
    if (getrlimit(RLIMIT_NOFILE, &most) < 0 || most.rlim_cur > 1u << 20)
        most.rlim_cur = 1u << 20;
    for (int fd = first; fd < (int)most.rlim_cur; fd++)
        close(fd);
}

/* Leaves behind what was the caller's: session, handlers, descriptors,
 * directory. The signals have been blocked before the clone. On return 0, 1
 * and 2 are /dev/null, 3 is the report, 4 the directory, and no other
 * descriptor is open: a listening socket that a supervisor inherited would
 * keep the worker's port taken after the worker is gone. It stands in "/" so
 * that it keeps no file system from being unmounted. */
static int cube_sup_shed(struct cube_sup *s)
{
    struct sigaction standard;
    int fd;

    memset(&standard, 0, sizeof standard);
    standard.sa_handler = SIG_DFL;
    for (int i = 1; i < NSIG; i++)
        (void)sigaction(i, &standard, NULL);
    (void)setsid();
    (void)prctl(PR_SET_NAME, "cube-task");
    if (prctl(PR_SET_CHILD_SUBREAPER, 1) < 0)
        return -errno;
    fd = open(s->spec->dir, O_RDONLY | O_DIRECTORY);
    s->dir_fd = CUBE_SUP_REPORT + 1;
    if (fd < 0 || dup2(fd, s->dir_fd) < 0)
        return -errno;
    cube_sup_close_from(s->dir_fd + 1);
    fd = open("/dev/null", O_RDWR);
    if (fd < 0)
        return -errno;
    for (int i = 0; i < 3; i++)
        (void)dup2(fd, i);
    if (fd > s->dir_fd)
        close(fd);
    return fcntl(s->dir_fd, F_SETFD, FD_CLOEXEC) < 0 || chdir("/") < 0
               ? -errno
               : 0;
}

/* Adds a line to the lock file. A line at a time with one pwrite, so a reader
 * sees whole lines. */
static int cube_sup_note(struct cube_sup *s, const char *name, int64_t number)
{
    char text[64];
    size_t len = cube_sup_put_line(text, 0, name, number);

    if (pwrite(s->lock_fd, text, len, (off_t)s->lock_len) != (ssize_t)len)
        return errno ? -errno : -ENOSPC;
    s->lock_len += len;
    return 0;
}

/* Takes the lock, for life, and writes the time into its file. -EBUSY: another
 * supervisor has this directory, and its task; nothing of it was touched. A
 * POSIX lock and not flock, because F_GETLK tells who holds it. It belongs to
 * the process, is not inherited by the command, and would go with any close of
 * this file in the supervisor: so it is opened only here. */
static int cube_sup_lock(struct cube_sup *s)
{
    struct flock lock;

    s->lock_fd = openat(s->dir_fd, "lock", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (s->lock_fd < 0)
        return -errno;
    memset(&lock, 0, sizeof lock);
    lock.l_type = F_WRLCK;
    if (fcntl(s->lock_fd, F_SETLK, &lock) < 0)
        return errno == EACCES || errno == EAGAIN ? -EBUSY : -errno;
    s->started = cube_world_wall_ns(NULL);
    return cube_sup_note(s, "started", s->started);
}

/* A log that is there goes on: O_APPEND and its present size. */
static int cube_sup_open_log(struct cube_sup *s)
{
    struct stat st;

    s->log_fd = openat(s->dir_fd, "log",
                       O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (s->log_fd < 0)
        return -errno;
    s->log_size = fstat(s->log_fd, &st) < 0 ? 0 : (int64_t)st.st_size;
    return 0;
}

/* Everything that can fail before the command exists: lock, log, the room for
 * the exit file, and the descriptor through which signals are read. Zeros are
 * written, not a hole made with ftruncate, since only written blocks are ours
 * on a full disk. */
static int cube_sup_prepare(struct cube_sup *s)
{
    static const char zeros[CUBE_SUP_EXIT];
    sigset_t set;
    int r = cube_sup_lock(s);

    if (r == 0)
        r = cube_sup_open_log(s);
    if (r < 0)
        return r;
    s->exit_fd = openat(s->dir_fd, "exit.new",
                        O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (s->exit_fd < 0)
        return -errno;
    if (pwrite(s->exit_fd, zeros, sizeof zeros, 0) != sizeof zeros)
        return errno ? -errno : -ENOSPC;
    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGUSR1);
    s->signal_fd = signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);
    return s->signal_fd < 0 ? -errno : 0;
}

/* ---- Supervised processes: the command's side of the clone ---- */

/*
 * Tries each directory of PATH in turn, as execvp does; returns the errno
 * value that says most: a file that is there but refused beats none. Returns
 * only when it failed. The PATH is the command's own, from `env`; an empty
 * part of it, which would mean the current directory, is passed over.
 *
 *    PATH=/a:/b, "web":  /a/web is no file (ENOENT), /b/web not executable
 *                        (EACCES)   ->  EACCES, which is what to tell
 */
static int cube_sup_exec(const struct cube_spawn *spec)
{
    char *const *argv = (char *const *)(uintptr_t)spec->argv;
    char *const *env = (char *const *)(uintptr_t)spec->env;
    const char *name = spec->argv[0], *path = "/usr/bin:/bin";
    char full[PATH_MAX];
    int best = ENOENT;

    if (strchr(name, '/')) {
        execve(name, argv, env);
        return errno;
    }
    for (size_t i = 0; spec->env[i]; i++) {
        if (strncmp(spec->env[i], "PATH=", 5) == 0)
            path = spec->env[i] + 5;
    }
    while (path && *name) {
        size_t len = strcspn(path, ":");

        if (len > 0 && len + strlen(name) + 2 <= sizeof full) {
            memcpy(full, path, len);
            full[len] = '/';
            full[cube_sup_put(full, len + 1, name)] = 0;
            execve(full, argv, env);
            if (errno != ENOENT && errno != ENOTDIR)
                best = errno;
        }
        path = path[len] ? path + len + 1 : NULL;
    }
    return best;
}

/* Moves the caller of this into a cgroup, and all that it will start: "0" in
 * cgroup.procs is whoever writes it. Returns a positive errno value or 0. */
static int cube_sup_join(const char *cgroup)
{
    int dir = open(cgroup, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int fd = dir < 0 ? -1 : openat(dir, "cgroup.procs", O_WRONLY | O_CLOEXEC);

    return fd < 0 || write(fd, "0", 1) != 1 ? errno : 0;
}

/* Into its cgroups, of which there may be none, and under its limit of data.
 * Returns a positive errno value or 0. Done in the command's process before
 * the exec, so that it never runs a moment without limits. */
static int cube_sup_limit(const struct cube_spawn *spec)
{
    struct rlimit data;
    int e = 0;

    for (size_t i = 0; i < 2 && e == 0; i++) {
        if (spec->cgroups[i])
            e = cube_sup_join(spec->cgroups[i]);
    }
    if (e != 0 || spec->data_bytes == 0)
        return e;
    data.rlim_cur = data.rlim_max = (rlim_t)spec->data_bytes;
    return setrlimit(RLIMIT_DATA, &data) < 0 ? errno : 0;
}

/* Becomes the command, or tells the errno value through `error_fd`: negative
 * if it was not the command's fault. Never returns. The pipe behind `error_fd`
 * closes on exec, so that its end without a byte means: it runs. 127 and 126
 * are a shell's codes for a command that is not there and one that cannot be
 * executed. */
static void cube_sup_become(struct cube_sup *s, pid_t parent, int output,
                            int error_fd)
{
    sigset_t none;
    int e = 0;

    /* Both sides do this, here and in cube_sup_start: whoever is first, the
     * group is there before anybody signals it. */
    (void)setpgid(0, 0);
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0 || getppid() != parent)
        _exit(127); /* the parent died before it could be noticed */
    if (dup2(output, 1) < 0 || dup2(output, 2) < 0 ||
        fchdir(s->dir_fd) < 0 || chdir("work") < 0)
        e = -errno;
    if (e == 0)
        e = -cube_sup_limit(s->spec);
    sigemptyset(&none);
    (void)sigprocmask(SIG_SETMASK, &none, NULL);
    if (e == 0)
        e = cube_sup_exec(s->spec);
    while (write(error_fd, &e, sizeof e) < 0 && errno == EINTR)
        continue;
    _exit(e == ENOENT ? 127 : 126);
}

/* Clones the command; 0 when it runs or `exec_error` says why it does not. A
 * negative errno value when there could not even be a process. Waits for the
 * exec, which is over in a moment: the read ends with the error or with the
 * pipe. */
static int cube_sup_start(struct cube_sup *s)
{
    int output[2], error[2];
    pid_t self = getpid();

    if (pipe2(output, O_CLOEXEC) < 0 || pipe2(error, O_CLOEXEC) < 0)
        return -errno;
    s->child = cube_sup_clone(SIGCHLD);
    if (s->child < 0)
        return -errno;
    if (s->child == 0)
        cube_sup_become(s, self, output[1], error[1]);
    (void)setpgid(s->child, s->child);
    (void)cube_sup_note(s, "pid", s->child);
    close(output[1]);
    close(error[1]);
    s->pipe_fd = output[0];
    (void)fcntl(s->pipe_fd, F_SETFL, O_NONBLOCK);
    if (read(error[0], &s->exec_error, sizeof s->exec_error) !=
        sizeof s->exec_error)
        s->exec_error = 0;
    close(error[0]);
    return 0;
}

/* ---- Supervised processes: the supervisor at work ---- */

/* The name of the full log of that number. */
static void cube_sup_log_name(char out[32], int64_t number)
{
    out[cube_sup_put_number(out, cube_sup_put(out, 0, "log."), number)] = 0;
}

/*
 * A full log gets its number, and the oldest one goes. With three files:
 *
 *    log   log.1  log.2          full: log -> log.3, log.1 removed
 *    log   log.2  log.3          full: log -> log.4, log.2 removed
 *
 * Numbers only grow, so a name stands for the same bytes as long as it exists.
 */
static void cube_sup_rotate(struct cube_sup *s)
{
    char name[32];

    cube_sup_log_name(name, s->log_number + 1);
    if (renameat(s->dir_fd, "log", s->dir_fd, name) < 0)
        return; /* it grows, then, and is tried again */
    s->log_number++;
    close(s->log_fd);
    if (s->log_number >= s->spec->log_files) {
        cube_sup_log_name(name, s->log_number - s->spec->log_files + 1);
        (void)unlinkat(s->dir_fd, name, 0);
    }
    (void)cube_sup_open_log(s);
}

/* Says in the log how much of it is missing; false if that fails, too. A line
 * that was written in part is taken back, to be written whole when the disk
 * has room again. */
static bool cube_sup_confess(struct cube_sup *s)
{
    char text[128];
    size_t len = cube_sup_put(text, 0, "[cube: ");
    ssize_t n;

    len = cube_sup_put_number(text, len, s->lost);
    len = cube_sup_put(text, len, " bytes of output could not be written]\n");
    n = write(s->log_fd, text, len);
    if (n != (ssize_t)len) {
        if (n > 0 && ftruncate(s->log_fd, s->log_size) < 0)
            s->log_size += n;
        return false;
    }
    s->lost = 0;
    s->log_size += n;
    return true;
}

/* Appends output to the log, rotating first when it would grow beyond its
 * size. Never waits and never fails: what does not fit on the disk is added to
 * `lost`. */
static void cube_sup_log(struct cube_sup *s, const char *p, size_t len)
{
    if (s->log_fd >= 0 && s->log_size > 0 &&
        s->log_size + (int64_t)len > s->spec->log_bytes)
        cube_sup_rotate(s);
    if (s->log_fd < 0)
        (void)cube_sup_open_log(s);
    if (s->log_fd >= 0 && (s->lost == 0 || cube_sup_confess(s))) {
        while (len > 0) {
            ssize_t n = write(s->log_fd, p, len);

            if (n <= 0)
                break;
            p += n;
            len -= (size_t)n;
            s->log_size += n;
        }
    }
    s->lost += (int64_t)len;
}

/* Copies what output there is; forgets the pipe at its end. One chunk at a
 * time: between two, signals are looked at, so that a command that never stops
 * printing can still be stopped. */
static void cube_sup_copy(struct cube_sup *s)
{
    ssize_t n = read(s->pipe_fd, s->chunk, sizeof s->chunk);

    if (n > 0) {
        cube_sup_log(s, s->chunk, (size_t)n);
    } else if (n == 0) {
        close(s->pipe_fd);
        s->pipe_fd = -1;
    }
}

/* Collects all children that have ended. The command's group is killed while
 * its leader is not collected yet, so that its number is still its own.
 * Returns whether there are children left. */
static bool cube_sup_reap(struct cube_sup *s)
{
    for (;;) {
        siginfo_t info;
        int status;

        info.si_pid = 0;
        /* WNOWAIT looks without collecting: until waitpid, the PID and with it
         * the number of the group cannot be given to somebody else. */
        if (waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT) < 0)
            return errno != ECHILD;
        if (info.si_pid == 0)
            return true;
        if (info.si_pid == s->child)
            (void)kill(-s->child, SIGKILL);
        if (waitpid(info.si_pid, &status, 0) == s->child) {
            s->has_ended = true;
            s->status = status;
            s->finished = cube_world_wall_ns(NULL);
        }
    }
}

/* To the command and its group. It may have left the group. */
static void cube_sup_signal(struct cube_sup *s, int number)
{
    if (s->has_ended)
        return;
    (void)kill(-s->child, number);
    if (getpgid(s->child) != s->child)
        (void)kill(s->child, number);
}

/* What the worker wants is said by signals to the supervisor, whose PID the
 * lock proves: SIGTERM to ask the command to stop, SIGUSR1 to kill it. SIGCHLD
 * needs no action: it was there to end the poll. */
static void cube_sup_take_signals(struct cube_sup *s)
{
    struct signalfd_siginfo got;

    while (read(s->signal_fd, &got, sizeof got) == sizeof got) {
        if (got.ssi_signo == SIGTERM)
            cube_sup_signal(s, SIGTERM);
        if (got.ssi_signo == SIGUSR1)
            cube_sup_signal(s, SIGKILL);
    }
}

/* Until the command has ended. When cube_sup_reap finds no children at all
 * before the command was seen to end, this ends too: there is nothing left to
 * wait for. */
static void cube_sup_attend(struct cube_sup *s)
{
    while (cube_sup_reap(s) && !s->has_ended) {
        struct pollfd fds[2];

        memset(fds, 0, sizeof fds);
        fds[0].fd = s->signal_fd;
        fds[1].fd = s->pipe_fd; /* -1 is skipped */
        fds[0].events = fds[1].events = POLLIN;
        if (poll(fds, 2, -1) < 0)
            continue;
        if (fds[0].revents)
            cube_sup_take_signals(s);
        if (fds[1].revents)
            cube_sup_copy(s);
    }
}

/* Kills our children. CONFIG_PROC_CHILDREN, which all distributions set. Pids
 * stand there in decimal with a space behind each. Those beyond a chunk are
 * left to the next sweep. */
static void cube_sup_kill_children(struct cube_sup *s)
{
    int fd = open("/proc/thread-self/children", O_RDONLY | O_CLOEXEC);
    ssize_t len = fd < 0 ? 0 : read(fd, s->chunk, sizeof s->chunk - 1);
    pid_t pid = 0;

    for (ssize_t i = 0; i < len; i++) {
        if (s->chunk[i] >= '0' && s->chunk[i] <= '9') {
            pid = pid * 10 + (s->chunk[i] - '0');
            continue;
        }
        if (pid > 1)
            (void)kill(pid, SIGKILL);
        pid = 0;
    }
    if (fd >= 0)
        close(fd);
}

/* Each killed child hands its own children to us: so until none is left, or
 * one cannot die. One that cannot die hangs in the kernel, on a network file
 * system say. It is given up after CUBE_SUP_SWEEPS times 10 ms; the exit code
 * of the command is worth more than waiting for it. */
static void cube_sup_sweep(struct cube_sup *s)
{
    for (int i = 0; i < CUBE_SUP_SWEEPS && cube_sup_reap(s); i++) {
        struct pollfd fds[1] = {{s->signal_fd, POLLIN, 0}};

        cube_sup_kill_children(s);
        (void)poll(fds, 1, 10);
        cube_sup_take_signals(s);
    }
}

/* Whether the kernel's killer came for memory: "oom_kill N" in a file that is
 * called memory.events in version 2 of cgroups. Version 1 says it in
 * memory.oom_control. Asked only after a SIGKILL, since the count is of the
 * whole cgroup: a helper that was killed while the command went on does not
 * make its later end one for lack of memory. */
static bool cube_sup_is_oom(struct cube_sup *s)
{
    for (size_t i = 0; i < 2; i++) {
        const char *cgroup = s->spec->cgroups[i], *at;
        int dir = cgroup ? open(cgroup, O_RDONLY | O_CLOEXEC) : -1;
        int fd = dir < 0 ? -1 : openat(dir, "memory.events", O_RDONLY);
        ssize_t n;

        if (dir >= 0 && fd < 0)
            fd = openat(dir, "memory.oom_control", O_RDONLY);
        n = fd < 0 ? 0 : read(fd, s->chunk, sizeof s->chunk - 1);
        s->chunk[n < 0 ? 0 : n] = 0;
        at = strstr(s->chunk, "oom_kill ");
        if (at && at[9] > '0' && at[9] <= '9')
            return true;
        if (fd >= 0)
            close(fd);
        if (dir >= 0)
            close(dir);
    }
    return false;
}

/* The steps are those of any file that must be whole: bytes, size, sync,
 * rename, sync of the directory. The blocks were taken in cube_sup_prepare, so
 * of these only an I/O error can keep the exit code from the disk. */
static void cube_sup_write_exit(struct cube_sup *s)
{
    char text[CUBE_SUP_EXIT];
    size_t len = 0;
    int number = WIFSIGNALED(s->status) ? WTERMSIG(s->status) : 0;
    int code = number ? 128 + number : WEXITSTATUS(s->status);
    bool is_oom = code == 128 + SIGKILL && cube_sup_is_oom(s);

    len = cube_sup_put_line(text, len, "code", code);
    len = cube_sup_put_line(text, len, "signal", number);
    len = cube_sup_put_line(text, len, "oom", is_oom);
    len = cube_sup_put_line(text, len, "error",
                            s->exec_error < 0 ? -s->exec_error
                                              : s->exec_error);
    len = cube_sup_put_line(text, len, "started", s->started);
    len = cube_sup_put_line(text, len, "finished", s->finished);
    if (pwrite(s->exit_fd, text, len, 0) != (ssize_t)len ||
        ftruncate(s->exit_fd, (off_t)len) < 0)
        return; /* no room even so: then it counts as killed */
    (void)fsync(s->exit_fd);
    (void)renameat(s->dir_fd, "exit.new", s->dir_fd, "exit");
    (void)fsync(s->dir_fd);
}

/* The caller may be gone, or have given up: then nobody reads it, and SIGPIPE
 * is blocked. */
static void cube_sup_report(int fd, int result)
{
    while (write(fd, &result, sizeof result) < 0 && errno == EINTR)
        continue;
    close(fd);
}

/* The order is the promise: who sees `exit` knows that no process of the task
 * is left and that its log is complete. */
static void cube_sup_finish(struct cube_sup *s)
{
    cube_sup_sweep(s);
    for (ssize_t n = 1; n > 0 && s->pipe_fd >= 0;) {
        n = read(s->pipe_fd, s->chunk, sizeof s->chunk);
        if (n > 0)
            cube_sup_log(s, s->chunk, (size_t)n);
    }
    if (s->lost > 0 && s->log_fd >= 0)
        (void)cube_sup_confess(s);
    cube_sup_write_exit(s);
    for (size_t i = 0; i < 2; i++) {
        if (s->spec->cgroups[i])
            (void)rmdir(s->spec->cgroups[i]);
    }
}

/* Whoever gets the report of a failure finds the lock free and can try again
 * in the same directory. 0 was reported already, when the command ran. */
static void cube_sup_end(struct cube_sup *s, int result)
{
    close(s->lock_fd);
    if (result != 0)
        cube_sup_report(CUBE_SUP_REPORT, result);
    _exit(0);
}

/* The supervisor's life; the descriptor of the report is `report_fd`. Never
 * returns. A failure before the command exists empties the lock file: no
 * "started" in it means that this attempt has not begun. */
static void cube_sup_main(struct cube_sup *s)
{
    int r;

    if (dup2(s->report_fd, CUBE_SUP_REPORT) < 0)
        _exit(1);
    (void)fcntl(CUBE_SUP_REPORT, F_SETFD, FD_CLOEXEC);
    r = cube_sup_shed(s);
    if (r == 0)
        r = cube_sup_prepare(s);
    if (r == 0)
        r = cube_sup_start(s);
    if (r < 0) {
        if (r != -EBUSY && s->lock_fd > 0)
            (void)ftruncate(s->lock_fd, 0); /* it has never begun */
        cube_sup_end(s, r);
    }
    if (s->exec_error == 0)
        cube_sup_report(CUBE_SUP_REPORT, 0);
    cube_sup_attend(s);
    cube_sup_finish(s);
    cube_sup_end(s, s->exec_error);
}

/* ---- Supervised processes: the caller's side ---- */

/* The PID that holds a POSIX lock on the file, or 0 when it is free: so a
 * worker that was restarted finds its tasks' supervisors again. -ESRCH: held,
 * but by a process of another PID namespace, which cannot be signalled from
 * here. */
static int cube_world_lock_owner(void *ctx, const char *path)
{
    struct flock lock;
    int r, fd = open(path, O_RDWR | O_CLOEXEC);

    (void)ctx;
    if (fd < 0)
        return -errno;
    memset(&lock, 0, sizeof lock);
    lock.l_type = F_WRLCK;
    r = fcntl(fd, F_GETLK, &lock) < 0 ? -errno : 0;
    close(fd);
    if (r < 0 || lock.l_type == F_UNLCK)
        return r;
    return lock.l_pid > 0 ? (int)lock.l_pid : -ESRCH; /* not among our PIDs */
}

/* A descriptor that means this process and no later one with its number, and
 * becomes readable when it ends. -ENOSYS before Linux 5.3. */
static int cube_world_pid_open(void *ctx, int pid)
{
    long fd = syscall(SYS_pidfd_open, pid, 0);

    (void)ctx;
    return fd < 0 ? -errno : (int)fd;
}

/* -ESRCH when it has ended. */
static int cube_world_pid_signal(void *ctx, int pid_fd, int signal_number)
{
    (void)ctx;
    return syscall(SYS_pidfd_send_signal, pid_fd, signal_number, NULL, 0) < 0
               ? -errno
               : 0;
}

/* Closes the descriptor of a process, and collects it if it ended as our
 * child. It can be one: an orphan's parent is the next subreaper, else process
 * 1, and in a container that can be us. */
static int cube_world_pid_close(void *ctx, int pid_fd)
{
    siginfo_t info;

    (void)ctx;
    (void)waitid((idtype_t)3 /* P_PIDFD */, (id_t)pid_fd, &info,
                 WEXITED | WNOHANG);
    return close(pid_fd) < 0 ? -errno : 0;
}

/* What the supervisor reports; its death without a word is an I/O error. 0
 * when the command runs; a positive errno value when it could not be executed,
 * a negative one when the supervisor could not do its part. */
static int cube_world_spawn_report(int fd)
{
    struct pollfd fds[1] = {{fd, POLLIN, 0}};
    int r, result;

    do
        r = poll(fds, 1, CUBE_SUP_WAIT_MS);
    while (r < 0 && errno == EINTR);
    if (r == 0)
        return -ETIMEDOUT;
    return read(fd, &result, sizeof result) == sizeof result ? result : -EIO;
}

/* The middle's life: the supervisor must not be the caller's child. It ends at
 * once, and so gives its child to process 1 or a subreaper: no worker has to
 * collect it, none's end takes it along. Never returns. */
static void cube_world_spawn_middle(struct cube_sup *s)
{
    pid_t pid = cube_sup_clone(SIGCHLD);

    if (pid == 0)
        cube_sup_main(s);
    if (pid < 0)
        cube_sup_report(s->report_fd, -errno);
    _exit(0);
}

/* Starts a command under a supervisor and waits, 10 seconds at most, until it
 * runs or cannot. `spec` is read by the copies and not kept. Returns as
 * cube_world_spawn_report does; whatever is returned, the middle is collected
 * and no descriptor stays open here. All signals are blocked over the clone,
 * so that no handler of the program ever runs in a copy of it. */
static int cube_world_spawn(void *ctx, const struct cube_spawn *spec)
{
    struct cube_sup *s = calloc(1, sizeof *s);
    sigset_t all, before;
    int ends[2], r = 0;
    pid_t middle;

    (void)ctx;
    if (!s || pipe2(ends, O_CLOEXEC) < 0) {
        r = s ? -errno : -ENOMEM;
        free(s);
        return r;
    }
    s->spec = spec;
    s->report_fd = ends[1];
    s->pipe_fd = s->log_fd = -1;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    middle = cube_sup_clone(0);
    if (middle == 0)
        cube_world_spawn_middle(s);
    if (middle < 0)
        r = -errno;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    close(ends[1]);
    /* A clone without an exit signal is waited for only with __WALL. */
    while (middle > 0 && waitpid(middle, NULL, __WALL) < 0 && errno == EINTR)
        continue;
    if (r == 0)
        r = cube_world_spawn_report(ends[0]);
    close(ends[0]);
    free(s);
    return r;
}

/* ---- The table ---- */

/* Linux itself. `ctx` stays NULL: its functions need none. */
CUBE_API const struct cube_world *cube_world_real(void)
{
    static const struct cube_world real = {
        .now_ms = cube_world_now_ms,
        .wall_ns = cube_world_wall_ns,
        .random = cube_world_random,
        .env = cube_world_env,
        .uid = cube_world_uid,
        .listen = cube_world_listen,
        .accept = cube_world_accept,
        .connect = cube_world_connect,
        .connected = cube_world_connected,
        .local_addr = cube_world_local_addr,
        .recv = cube_world_recv,
        .send = cube_world_send,
        .shut = cube_world_shut,
        .close = cube_world_close,
        .poll_open = cube_world_poll_open,
        .poll_close = cube_world_poll_close,
        .poll_fd = cube_world_poll_fd,
        .poll_add = cube_world_poll_add,
        .poll_change = cube_world_poll_change,
        .poll_remove = cube_world_poll_remove,
        .poll_wait = cube_world_poll_wait,
        .poll_wake = cube_world_poll_wake,
        .job_start = cube_world_job_start,
        .job_cancel = cube_world_job_cancel,
        .open = cube_world_open,
        .pread = cube_world_pread,
        .pwrite = cube_world_pwrite,
        .truncate = cube_world_truncate,
        .size = cube_world_size,
        .sync = cube_world_sync,
        .sync_dir = cube_world_sync_dir,
        .lock = cube_world_lock,
        .rename = cube_world_rename,
        .unlink = cube_world_unlink,
        .mkdir = cube_world_mkdir,
        .rmdir = cube_world_rmdir,
        .list = cube_world_list,
        .space = cube_world_space,
        .spawn = cube_world_spawn,
        .lock_owner = cube_world_lock_owner,
        .pid_open = cube_world_pid_open,
        .pid_signal = cube_world_pid_signal,
        .pid_close = cube_world_pid_close,
    };

    return &real;
}


/* ==== Chapter 2. Ground ==== uses: 1 ==== */
/*
 * The ground that all other chapters stand on: what C lacks and every program
 * of this kind needs. Nothing here knows what an orchestrator is.
 *
 *   errors    cube_fail(err, CODE, "open %s: %s", path, why), one idiom
 *   memory    cube_alloc, cube_resize, cube_free: never NULL, see below
 *   texts     cube_text_dup, cube_text_is, numbers with nothing behind them
 *   buffers   struct cube_buf: bytes that grow, and are given away
 *   lists     struct cube_list: doubly linked, the links inside the members
 *   maps      struct cube_map: from a text to a pointer, in insertion order
 *   UUIDs, SHA-256, base64, times as text
 *   files     read one whole, replace one whole
 *
 * Memory. When none is left, CUBE_OOM() runs: by default it says so and
 * aborts. Acknowledged state is on disk by then, so nothing is lost but the
 * time of a restart, and no function here needs a path for a failure that is
 * never tested. The price is that everything that comes from outside is
 * capped, by a macro with a name, before it is kept. CUBE_MALLOC,
 * CUBE_REALLOC and CUBE_FREE can be replaced, all three or none.
 *
 * Errors. Functions return 0 or -1, or a pointer or NULL, and explain
 * themselves in a struct cube_err that the caller owns. It has a fixed size:
 * an explanation that is cut is better than one that can fail in turn.
 *
 * Maps. An index of slots (open addressing) over an array of entries in the
 * order of their insertion:
 *
 *    slots    [ 2 | - | 0 | - | 1 | - | - | - ]     hash(key) & mask
 *               |       |       |
 *    entries  [ "web" ][ "db" ][ "cache" ]          0, 1, 2
 *
 * so that a walk gives the same order on every run, as the simulator needs.
 * Removal leaves a hole that the next growth closes. The hash is SipHash
 * with a key of the map's own, since keys come from strangers.
 *
 * Naive on purpose: a list for anything short, a linear search where the
 * text beside it says how many there can be.
 */

#if defined(CUBE_MALLOC) != defined(CUBE_FREE) || \
    defined(CUBE_MALLOC) != defined(CUBE_REALLOC)
#error "define all of CUBE_MALLOC, CUBE_REALLOC and CUBE_FREE, or none"
#endif
#ifndef CUBE_MALLOC
#define CUBE_MALLOC(size) malloc(size)
#define CUBE_REALLOC(p, size) realloc(p, size)
#define CUBE_FREE(p) free(p)
#endif
#ifndef CUBE_OOM
#define CUBE_OOM() cube_oom()
#endif
#ifndef CUBE_ASSERT
#include <assert.h>
#define CUBE_ASSERT(claim) assert(claim)
#endif

#define CUBE_COUNT(array) (sizeof(array) / sizeof(array)[0])
#define CUBE_UNUSED __attribute__((unused))

/* ---- Errors ---- */

/*
 * Explains a failure in `err` (may be NULL) and returns -1, so that a function
 * can fail in one statement. A text that is too long is cut. An argument may
 * not be `err->text` itself: it is written while it is read.
 *
 *      return cube_fail(err, CUBE_EIO, "open %s: %s", path, why);
 */
__attribute__((format(printf, 3, 4))) static int
cube_fail(struct cube_err *err, enum cube_code code, const char *format, ...)
{
    va_list args;

    if (!err)
        return -1;
    err->code = code;
    va_start(args, format);
    (void)vsnprintf(err->text, sizeof err->text, format, args);
    va_end(args);
    return -1;
}

/* The words for a negative errno value, as the World returns them. Not
 * thread-safe where strerror is not: only the loop's thread comes here. */
static const char *cube_errno_text(int64_t negative)
{
    return strerror((int)-negative);
}

/* The kind of a negative errno value. Many values, few kinds: a kind is what a
 * caller acts upon, the number itself goes into the words. What no caller
 * tells apart is CUBE_EIO. */
static enum cube_code cube_errno_code(int64_t negative)
{
    switch (-negative) {
    case ENOENT:
        return CUBE_ENOENT;
    case EEXIST:
        return CUBE_EEXIST;
    case EACCES:
    case EPERM:
        return CUBE_EACCES;
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
        return CUBE_ENOSPC;
    case EBUSY:
    case EADDRINUSE:
        return CUBE_EBUSY;
    case ETIMEDOUT:
        return CUBE_ETIMEOUT;
    case ECONNREFUSED:
    case ECONNRESET:
    case EPIPE:
    case EHOSTUNREACH:
    case ENETUNREACH:
        return CUBE_ECONN;
    default:
        return CUBE_EIO;
    }
}

/* ---- Memory ---- */

/* Does not format, since that might allocate. */
CUBE_UNUSED static void cube_oom(void)
{
    static const char words[] = "cube: out of memory\n";

    if (write(2, words, sizeof words - 1) < 0)
        abort();
    abort();
}

/* Zeroed memory of the object's lifetime; never NULL. 0 bytes are one, so that
 * the result can be told from a failure. */
static void *cube_alloc(size_t size)
{
    void *p = CUBE_MALLOC(size ? size : 1);

    if (!p)
        CUBE_OOM();
    memset(p, 0, size);
    return p;
}

/* The bytes beyond the old size are not zeroed; `old` may be NULL. Never
 * NULL. */
static void *cube_resize(void *old, size_t size)
{
    void *p = CUBE_REALLOC(old, size ? size : 1);

    if (!p)
        CUBE_OOM();
    return p;
}

/* NULL is fine, as everywhere in Cube. */
static void cube_free(void *p)
{
    CUBE_FREE(p);
}

/* ---- Texts ---- */

/* A copy of `len` bytes with a NUL behind them; the caller frees it. `text`
 * may be NULL if `len` is 0. */
static char *cube_text_ndup(const char *text, size_t len)
{
    char *copy = cube_alloc(len + 1);

    if (len > 0)
        memcpy(copy, text, len);
    return copy;
}

/* NULL in, NULL out. */
static char *cube_text_dup(const char *text)
{
    return text ? cube_text_ndup(text, strlen(text)) : NULL;
}

/* Frees what `*slot` holds and puts a copy of `text` (may be NULL) there. The
 * copy is made first: `text` may be a part of what `*slot` holds. */
static void cube_text_set(char **slot, const char *text)
{
    char *copy = cube_text_dup(text);

    cube_free(*slot);
    *slot = copy;
}

/* Is this run of bytes that text? */
static bool cube_text_is(const char *p, size_t len, const char *text)
{
    return strlen(text) == len && memcmp(p, text, len) == 0;
}

/* Not tolower, which follows the program's locale: in a Turkish one, header
 * names with an I would match no more. */
static char cube_lower(char c)
{
    return c >= 'A' && c <= 'Z' ? (char)(c - 'A' + 'a') : c;
}

/* The same without regard to the case of ASCII letters. */
static bool cube_text_is_nocase(const char *p, size_t len, const char *text)
{
    if (strlen(text) != len)
        return false;
    for (size_t i = 0; i < len; i++) {
        if (cube_lower(p[i]) != cube_lower(text[i]))
            return false;
    }
    return true;
}

static bool cube_text_starts(const char *text, const char *prefix)
{
    return strncmp(text, prefix, strlen(prefix)) == 0;
}

/*
 * Decimal digits and nothing else, at most `max`. No sign, no space, leading
 * zeros are fine. -1 leaves `*out` as it was.
 *
 * The check comes before the multiplication, since afterwards nothing could be
 * told: v * 10 + digit <= max is asked as v <= (max - digit) / 10.
 */
static int cube_text_u64(const char *p, size_t len, uint64_t max,
                         uint64_t *out)
{
    uint64_t v = 0;

    if (len == 0)
        return -1;
    for (size_t i = 0; i < len; i++) {
        uint64_t digit = (uint64_t)(p[i] - '0');

        if (p[i] < '0' || p[i] > '9' || v > (max - digit) / 10 ||
            digit > max)
            return -1;
        v = v * 10 + digit;
    }
    *out = v;
    return 0;
}

/* ---- Buffers ---- */

/*
 * Makes room for `more` bytes and the NUL behind them. Capacities are 64, 128,
 * 256, ...: a buffer that is filled byte by byte copies less than two
 * bytes for each byte in it, all growths taken together.
 *
 *    len 60, cap 64    "add 10"   need 71, so cap 128
 *    |<------ len ------>|NUL|<-- free -->|
 *    data                                 data + cap
 */
static void cube_buf_reserve(struct cube_buf *b, size_t more)
{
    size_t need = b->len + more + 1;
    size_t cap = b->cap ? b->cap : 64;

    if (need <= b->cap)
        return;
    while (cap < need)
        cap *= 2;
    b->data = cube_resize(b->data, cap);
    b->cap = cap;
}

/* Leaves an empty buffer that can be used again. */
CUBE_API void cube_buf_free(struct cube_buf *b)
{
    cube_free(b->data);
    memset(b, 0, sizeof *b);
}

/* `p` must not point into the buffer, which may move. Whatever the bytes are,
 * a NUL stands behind them, so that `data` is a C string as soon as there was
 * one addition. */
CUBE_API void cube_buf_add(struct cube_buf *b, const void *p, size_t len)
{
    cube_buf_reserve(b, len);
    if (len > 0)
        memcpy(b->data + b->len, p, len);
    b->len += len;
    b->data[b->len] = 0;
}

static void cube_buf_addc(struct cube_buf *b, char c)
{
    cube_buf_add(b, &c, 1);
}

CUBE_API void cube_buf_puts(struct cube_buf *b, const char *text)
{
    cube_buf_add(b, text, strlen(text));
}

/* Formats twice: once to learn the size, once into its place. Shorter than a
 * guess with a second try, and no text here is long enough to make it
 * matter. */
CUBE_API void cube_buf_printf(struct cube_buf *b, const char *format, ...)
{
    va_list args, again;
    int n;

    va_start(args, format);
    va_copy(again, args);
    n = vsnprintf(NULL, 0, format, args);
    va_end(args);
    CUBE_ASSERT(n >= 0);
    cube_buf_reserve(b, (size_t)n);
    (void)vsnprintf(b->data + b->len, (size_t)n + 1, format, again);
    va_end(again);
    b->len += (size_t)n;
}

/* Removes the first `len` bytes. Moves the rest to the front: linear. Callers
 * that consume much at a time keep an offset and call this once. */
static void cube_buf_drop(struct cube_buf *b, size_t len)
{
    CUBE_ASSERT(len <= b->len);
    /* an empty buffer has no data, not even a NUL to move */
    if (len == 0)
        return;
    memmove(b->data, b->data + len, b->len - len + 1);
    b->len -= len;
}

/* Empties it and keeps the memory. */
static void cube_buf_clear(struct cube_buf *b)
{
    b->len = 0;
    if (b->data)
        b->data[0] = 0;
}

/* Gives the bytes away: the caller frees them. Never NULL. The buffer is empty
 * after this. */
static char *cube_buf_take(struct cube_buf *b)
{
    char *data;

    cube_buf_reserve(b, 0);
    data = b->data;
    data[b->len] = 0;
    memset(b, 0, sizeof *b);
    return data;
}

/* ---- Lists ---- */

/*
 * A ring through its head: an empty list is a head that points to itself.
 *
 *      +--> head <--> web <--> db <--+        first: head.next
 *      |                             |        last:  head.prev
 *      +-----------------------------+
 *
 * The links stand inside the members, so that adding and removing need neither
 * memory nor a search, and nothing can fail. A member of two lists has two
 * links. To remove members during a walk, take `next` before.
 */
struct cube_list {
    struct cube_list *next, *prev;
};

/*
 * The member of type `type` whose field `field` is the link `link`. Steps back
 * from the link to the struct around it:
 *
 *      struct x { int a; struct cube_list link; };
 *               ^        ^
 *               |        p
 *               CUBE_OF(p, struct x, link)
 */
#define CUBE_OF(link, type, field) \
    ((type *)(void *)((char *)(link) - offsetof(type, field)))

static void cube_list_init(struct cube_list *head)
{
    head->next = head->prev = head;
}

static bool cube_list_is_empty(const struct cube_list *head)
{
    return head->next == head;
}

/* Adds at the end. */
static void cube_list_add(struct cube_list *head, struct cube_list *link)
{
    link->prev = head->prev;
    link->next = head;
    head->prev->next = link;
    head->prev = link;
}

/* Takes it out of the list it is in; harmless for one that is in none, if it
 * was initialised or zeroed. A link that was removed points to itself and can
 * be removed or added again. */
static void cube_list_remove(struct cube_list *link)
{
    if (!link->next)
        return;
    link->prev->next = link->next;
    link->next->prev = link->prev;
    cube_list_init(link);
}

/* ---- Maps ---- */

/* The hash is kept so that growing needs no key, and a search compares texts
 * only where they are almost certainly equal. */
struct cube_map_entry {
    char *key; /* NULL: a hole */
    void *value;
    uint64_t hash;
};

/*
 * From texts to pointers; the keys are copied, the values are borrowed.
 *
 *                          entries              used  count
 *      put web, db, cache  web  db  cache        3     3
 *      remove db           web  -   cache        3     2
 *      put log             web  -   cache  log   4     3
 *      growth              web  cache  log       3     3
 *
 * A removal clears the key and leaves slot and entry where they are: other
 * keys were put behind that slot when it was taken, and a search that found
 * it free would stop before them. When the entries are full, the holes are
 * closed and all slots are written anew.
 */
struct cube_map {
    struct cube_map_entry *entries;
    uint32_t *slots;      /* index into entries + 1; 0 is free */
    size_t used, cap;     /* of entries, holes included */
    size_t count;         /* without holes */
    size_t slot_count;    /* a power of two, at least twice `cap` */
    uint64_t seed;
};

/* `by` is 1 to 63: a shift by 64 would be undefined. */
static uint64_t cube_rotl(uint64_t x, int by)
{
    return x << by | x >> (64 - by);
}

/* One SipRound: additions, rotations and exclusive ors over the four words of
 * the state. It has no table, so nothing about the key shows in the time. */
static void cube_sip_round(uint64_t v[4])
{
    v[0] += v[1];
    v[1] = cube_rotl(v[1], 13) ^ v[0];
    v[0] = cube_rotl(v[0], 32);
    v[2] += v[3];
    v[3] = cube_rotl(v[3], 16) ^ v[2];
    v[0] += v[3];
    v[3] = cube_rotl(v[3], 21) ^ v[0];
    v[2] += v[1];
    v[1] = cube_rotl(v[1], 17) ^ v[2];
    v[2] = cube_rotl(v[2], 32);
}

/* `len` bytes, at most 8, little-endian; the missing high ones are 0. */
static uint64_t cube_le64(const unsigned char *p, size_t len)
{
    uint64_t v = 0;

    for (size_t i = 0; i < len; i++)
        v |= (uint64_t)p[i] << (8 * i);
    return v;
}

/*
 * SipHash-2-4 (Aumasson and Bernstein, 2012) of `len` bytes under the key k0,
 * k1: two rounds for each word of 8 bytes, four at the end. The last word
 * holds what is left and, in its highest byte, the length modulo 256:
 *
 *      "hello cubes"    "hello cu"  |  'b' 'e' 's' 0 0 0 0 11
 *
 * A length that is a multiple of 8 gets a last word, too, with no bytes in it.
 */
static uint64_t cube_siphash(uint64_t k0, uint64_t k1, const void *data,
                             size_t len)
{
    const unsigned char *p = data;
    uint64_t v[4] = {k0 ^ 0x736f6d6570736575u, k1 ^ 0x646f72616e646f6du,
                     k0 ^ 0x6c7967656e657261u, k1 ^ 0x7465646279746573u};
    size_t left = len;

    for (;;) {
        size_t n = left >= 8 ? 8 : left;
        uint64_t m = cube_le64(p, n);

        if (n < 8)
            m |= (uint64_t)len << 56;
        v[3] ^= m;
        cube_sip_round(v);
        cube_sip_round(v);
        v[0] ^= m;
        if (n < 8)
            break;
        p += 8;
        left -= 8;
    }
    v[2] ^= 0xff;
    for (int i = 0; i < 4; i++)
        cube_sip_round(v);
    return v[0] ^ v[1] ^ v[2] ^ v[3];
}

/* A zeroed map is a map with seed 0. The seed should be random where keys come
 * from outside: who can compute the hashes could send keys that all meet in
 * one slot. */
static void cube_map_init(struct cube_map *m, uint64_t seed)
{
    memset(m, 0, sizeof *m);
    m->seed = seed;
}

/* The values are the caller's, who walks the map before. Ready for use
 * again. */
static void cube_map_free(struct cube_map *m)
{
    for (size_t i = 0; i < m->used; i++)
        cube_free(m->entries[i].key);
    cube_free(m->entries);
    cube_free(m->slots);
    cube_map_init(m, m->seed);
}

/* Puts the entry's number into the first free slot from its hash on. There is
 * one: at most half of them are taken. */
static void cube_map_index(struct cube_map *m, size_t entry)
{
    size_t mask = m->slot_count - 1;
    size_t i = m->entries[entry].hash & mask;

    while (m->slots[i])
        i = (i + 1) & mask;
    m->slots[i] = (uint32_t)entry + 1;
}

/* Closes the holes and makes room for as many entries again. Room for twice as
 * many as are left without the holes, so a map of which as much is removed as
 * put keeps its size, and a put costs a constant on average. Entries move:
 * pointers to them do not survive this. */
static void cube_map_grow(struct cube_map *m)
{
    size_t n = 0;

    for (size_t i = 0; i < m->used; i++) {
        if (m->entries[i].key)
            m->entries[n++] = m->entries[i];
    }
    m->used = n;
    m->cap = n < 4 ? 8 : n * 2;
    m->entries = cube_resize(m->entries, m->cap * sizeof *m->entries);
    for (m->slot_count = 16; m->slot_count < m->cap * 2;)
        m->slot_count *= 2;
    cube_free(m->slots);
    m->slots = cube_alloc(m->slot_count * sizeof *m->slots);
    for (size_t i = 0; i < n; i++)
        cube_map_index(m, i);
}

/* Ends at a free slot. A hole is passed: its key is NULL. */
static struct cube_map_entry *cube_map_find(const struct cube_map *m,
                                            const char *key, size_t len)
{
    uint64_t hash = cube_siphash(m->seed, ~m->seed, key, len);
    size_t mask = m->slot_count - 1;

    if (m->count == 0)
        return NULL;
    for (size_t i = hash & mask; m->slots[i]; i = (i + 1) & mask) {
        struct cube_map_entry *e = &m->entries[m->slots[i] - 1];

        if (e->key && e->hash == hash && cube_text_is(key, len, e->key))
            return e;
    }
    return NULL;
}

/* The value, or NULL; a NULL that was put cannot be told from none. */
static void *cube_map_getn(const struct cube_map *m, const char *key,
                           size_t len)
{
    struct cube_map_entry *e = cube_map_find(m, key, len);

    return e ? e->value : NULL;
}

static void *cube_map_get(const struct cube_map *m, const char *key)
{
    return cube_map_getn(m, key, strlen(key));
}

/* Puts `value` there and returns what was there before, or NULL. A key that is
 * there keeps its place in the order. */
static void *cube_map_put(struct cube_map *m, const char *key, void *value)
{
    size_t len = strlen(key);
    struct cube_map_entry *e = cube_map_find(m, key, len);

    if (e) {
        void *old = e->value;

        e->value = value;
        return old;
    }
    if (m->used == m->cap)
        cube_map_grow(m);
    e = &m->entries[m->used];
    e->key = cube_text_ndup(key, len);
    e->value = value;
    e->hash = cube_siphash(m->seed, ~m->seed, key, len);
    cube_map_index(m, m->used++);
    m->count++;
    return NULL;
}

/* Removes it and returns its value, or NULL. Safe during a walk. What the walk
 * has not reached yet is still found by it. */
static void *cube_map_remove(struct cube_map *m, const char *key)
{
    struct cube_map_entry *e = cube_map_find(m, key, strlen(key));

    if (!e)
        return NULL;
    cube_free(e->key);
    e->key = NULL;
    m->count--;
    return e->value;
}

/* Walks in insertion order: start with `*at` 0; false at the end. Nothing may
 * be put during a walk. `key` may be NULL. */
static bool cube_map_next(const struct cube_map *m, size_t *at,
                          const char **key, void **value)
{
    while (*at < m->used) {
        struct cube_map_entry *e = &m->entries[(*at)++];

        if (!e->key)
            continue;
        if (key)
            *key = e->key;
        *value = e->value;
        return true;
    }
    return false;
}

/* ---- Hex, base64, SHA-256 ---- */

/* 0 to 15; -1 for what is none. Both cases. */
static int cube_hex_digit(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    c = cube_lower(c);
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* Writes 2 * len digits and a NUL. */
static void cube_hex(const unsigned char *p, size_t len, char *out)
{
    static const char digits[] = "0123456789abcdef";

    for (size_t i = 0; i < len; i++) {
        out[2 * i] = digits[p[i] >> 4];
        out[2 * i + 1] = digits[p[i] & 15];
    }
    out[2 * len] = 0;
}

static const char cube_base64_digits[] =
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/*
 * Adds RFC 4648 section 4, or with `is_url` section 5, both padded. Three
 * bytes are 24 bits are four digits of 6; what is missing of three is 0 in the
 * digits and `=` where a digit has no bit of it at all:
 *
 *      M        a        n          left  digits
 *      01001101 01100001 01101110   3     010011 010110 000101 101110   TWFu
 *      01001101 01100001            2     010011 010110 000100          TWE=
 *      01001101                     1     010011 010000                 TQ==
 */
static void cube_base64_encode(struct cube_buf *out, const void *data,
                               size_t len, bool is_url)
{
    const unsigned char *p = data;

    for (size_t i = 0; i < len; i += 3) {
        size_t left = len - i;
        uint32_t v = (uint32_t)p[i] << 16 |
                     (left > 1 ? (uint32_t)p[i + 1] << 8 : 0) |
                     (left > 2 ? (uint32_t)p[i + 2] : 0);

        for (size_t k = 0; k < 4; k++) {
            char c = cube_base64_digits[v >> (18 - 6 * k) & 63];

            if (is_url)
                c = c == '+' ? '-' : c == '/' ? '_' : c;
            cube_buf_addc(out, k > left ? '=' : c);
        }
    }
}

/* Both alphabets, padded or not; -1 for anything else. The bits wait in `v`
 * until there are eight of them. One digit alone is less than a byte, so an
 * end with 6 bits left over cannot have been written by anybody. What was
 * decoded before an error stays in `out`. */
static int cube_base64_decode(struct cube_buf *out, const char *text,
                              size_t len)
{
    uint32_t v = 0;
    int bits = 0;

    while (len > 0 && text[len - 1] == '=')
        len--;
    for (size_t i = 0; i < len; i++) {
        char c = text[i] == '-' ? '+' : text[i] == '_' ? '/' : text[i];
        const char *digit = c ? strchr(cube_base64_digits, c) : NULL;

        if (!digit)
            return -1;
        v = v << 6 | (uint32_t)(digit - cube_base64_digits);
        bits += 6;
        if (bits >= 8) {
            bits -= 8;
            cube_buf_addc(out, (char)(v >> bits & 255));
        }
    }
    return bits == 6 ? -1 : 0;
}

/* The first 32 bits of the fractional parts of the cube roots of the first 64
 * primes: numbers that nobody could have chosen for a purpose. */
static const uint32_t cube_sha256_k[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1,
    0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3,
    0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786,
    0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147,
    0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13,
    0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b,
    0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a,
    0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208,
    0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

static uint32_t cube_rotr32(uint32_t x, int by)
{
    return x >> by | x << (32 - by);
}

/* One block of FIPS 180-4 section 6.2.2. `v` holds the working variables a ..
 * h; the shift of all eight, which the standard writes as eight assignments,
 * is the memmove. */
static void cube_sha256_block(uint32_t h[8], const unsigned char *p)
{
    uint32_t w[64], v[8];

    for (int i = 0; i < 16; i++)
        w[i] = (uint32_t)p[4 * i] << 24 | (uint32_t)p[4 * i + 1] << 16 |
               (uint32_t)p[4 * i + 2] << 8 | p[4 * i + 3];
    for (int i = 16; i < 64; i++) {
        uint32_t a = w[i - 15], b = w[i - 2];

        w[i] = w[i - 16] + w[i - 7] +
               (cube_rotr32(a, 7) ^ cube_rotr32(a, 18) ^ a >> 3) +
               (cube_rotr32(b, 17) ^ cube_rotr32(b, 19) ^ b >> 10);
    }
    memcpy(v, h, sizeof v);
    for (int i = 0; i < 64; i++) {
        uint32_t e = v[4], a = v[0];
        uint32_t t1 = v[7] + cube_sha256_k[i] + w[i] +
                      (cube_rotr32(e, 6) ^ cube_rotr32(e, 11) ^
                       cube_rotr32(e, 25)) + ((e & v[5]) ^ (~e & v[6]));
        uint32_t t2 = (cube_rotr32(a, 2) ^ cube_rotr32(a, 13) ^
                       cube_rotr32(a, 22)) +
                      ((a & v[1]) ^ (a & v[2]) ^ (v[1] & v[2]));

        memmove(v + 1, v, 7 * sizeof v[0]);
        v[4] += t1;
        v[0] = t1 + t2;
    }
    for (int i = 0; i < 8; i++)
        h[i] += v[i];
}

/*
 * The last one or two blocks are made here: the rest of the text, a one bit,
 * zeros, and the length in bits as eight bytes, big-endian. Nine bytes must
 * fit behind the rest, or there are two blocks:
 *
 *      rest 55   [ 55 bytes | 80 | length 8 ]                         64
 *      rest 56   [ 56 bytes | 80 | 0 ... ] [ 0 ... 0 | length 8 ]     128
 */
static void cube_sha256(const void *data, size_t len, unsigned char out[32])
{
    uint32_t h[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                     0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    const unsigned char *p = data;
    unsigned char last[128] = {0};
    size_t whole = len / 64 * 64, rest = len - whole;
    size_t end = rest < 56 ? 64 : 128;

    for (size_t i = 0; i < whole; i += 64)
        cube_sha256_block(h, p + i);
    if (rest > 0)
        memcpy(last, p + whole, rest);
    last[rest] = 0x80;
    for (int i = 0; i < 8; i++)
        last[end - 1 - (size_t)i] = (unsigned char)((uint64_t)len * 8 >> 8 * i);
    for (size_t i = 0; i < end; i += 64)
        cube_sha256_block(h, last + i);
    for (int i = 0; i < 32; i++)
        out[i] = (unsigned char)(h[i / 4] >> (24 - 8 * (i % 4)));
}

/* Are the two the same? Takes the same time wherever they differ, and tells
 * nothing of the length of the secret: both are hashed first. */
static bool cube_secret_is(const char *p, size_t len, const char *secret)
{
    unsigned char a[32], b[32], differ = 0;

    cube_sha256(p, len, a);
    cube_sha256(secret, strlen(secret), b);
    for (int i = 0; i < 32; i++)
        differ |= a[i] ^ b[i];
    return differ == 0;
}

/* ---- UUIDs ---- */

/* Five groups of 4, 2, 2, 2 and 6 bytes, in lower case. Everywhere in Cube an
 * ID has this form, so IDs are compared as texts. */
static void cube_uuid_write(const unsigned char id[16],
                            char out[CUBE_UUID_TEXT])
{
    char hex[33];

    cube_hex(id, 16, hex);
    (void)snprintf(out, CUBE_UUID_TEXT, "%.8s-%.4s-%.4s-%.4s-%.12s", hex,
                   hex + 8, hex + 12, hex + 16, hex + 20);
}

/*
 * RFC 9562 version 4: 122 random bits, 4 that say the version, 2 the variant.
 *
 *      efeadce0-d016-4a39-882a-d2c5196cce1c
 *                    ^    ^
 *                    4    8, 9, a or b
 */
CUBE_API void cube_uuid_new(const struct cube_world *w,
                            char out[CUBE_UUID_TEXT])
{
    unsigned char id[16];

    /* Without randomness identities collide, and tasks with them. */
    if (w->random(w->ctx, id, sizeof id) < 0)
        abort();
    id[6] = (unsigned char)(0x40 | (id[6] & 0x0f));
    id[8] = (unsigned char)(0x80 | (id[8] & 0x3f));
    cube_uuid_write(id, out);
}

/*
 * The forms that Go's package reads, since its users' files have them; the
 * result is always the first. -1 for anything else, with `out` as it was.
 *
 *      efeadce0-d016-4a39-882a-d2c5196cce1c             36 characters
 *      urn:uuid:efeadce0-d016-4a39-882a-d2c5196cce1c    45
 *      {efeadce0-d016-4a39-882a-d2c5196cce1c}           38
 *      efeadce0d0164a39882ad2c5196cce1c                 32
 *
 * Version and variant are not looked at: other programs' IDs are IDs. In front
 * of 32 plain digits the other two would have a length that is not listed, so
 * "{...}" and "urn:uuid:" go with dashes alone.
 */
CUBE_API int cube_uuid_parse(const char *text, size_t len,
                             char out[CUBE_UUID_TEXT])
{
    unsigned char id[16];
    bool is_plain;
    size_t n = 0;

    if (len == 45 && cube_text_is_nocase(text, 9, "urn:uuid:")) {
        text += 9;
        len -= 9;
    } else if (len == 38 && text[0] == '{' && text[37] == '}') {
        text++;
        len -= 2;
    }
    is_plain = len == 36;
    if (!is_plain && len != 32)
        return -1;
    for (size_t i = 0; i < len; i++) {
        int digit = cube_hex_digit(text[i]);

        if (is_plain && (i == 8 || i == 13 || i == 18 || i == 23)) {
            if (text[i] != '-')
                return -1;
            continue;
        }
        if (digit < 0)
            return -1;
        id[n / 2] = (unsigned char)(n % 2 ? id[n / 2] | digit : digit << 4);
        n++;
    }
    cube_uuid_write(id, out);
    return 0;
}

/* ---- Times ---- */

/* 719162 days from 0001-01-01, where Go's time begins, to 1970-01-01. Counting
 * from there makes an unset time all zeros, here as in Go. */
#define CUBE_SEC_TO_1970 62135596800

/* In UTC. C's division rounds towards 0, so before 1970 a second is borrowed:
 * -1 ns is 23:59:59.999999999. */
CUBE_API struct cube_time cube_time_from_ns(int64_t unix_ns)
{
    struct cube_time t = {0, 0, 0};
    int64_t sec = unix_ns / 1000000000, nsec = unix_ns % 1000000000;

    if (nsec < 0) {
        nsec += 1000000000;
        sec--;
    }
    t.sec = sec + CUBE_SEC_TO_1970;
    t.nsec = (int32_t)nsec;
    return t;
}

/* 64 bits of nanoseconds reach from 1677 to 2262. Times outside, an unset one
 * too, give the end they lie beyond, so that comparing still orders them. */
CUBE_API int64_t cube_time_to_ns(const struct cube_time *t)
{
    int64_t sec = t->sec - CUBE_SEC_TO_1970;

    if (sec > INT64_MAX / 1000000000 - 1)
        return INT64_MAX;
    if (sec < INT64_MIN / 1000000000 + 1)
        return INT64_MIN;
    return sec * 1000000000 + t->nsec;
}

CUBE_API bool cube_time_is_set(const struct cube_time *t)
{
    return t->sec != 0 || t->nsec != 0;
}

/*
 * Days since 0001-01-01 in the Gregorian calendar. March is taken as the first
 * month, so that the leap day is the last of its year and moves nothing behind
 * it. Then the days before month m are (153 m + 2) / 5, rounded down, since
 * from March on five months have 153 days, again and again:
 *
 *      m       0   1   2   3   4   5   6   7   8   9   10  11
 *      month   Mar Apr May Jun Jul Aug Sep Oct Nov Dec Jan Feb
 *      days    31  30  31  30  31  31  30  31  30  31  31  28 or 29
 *      before  0   31  61  92  122 153 184 214 245 275 306 337
 *
 * 2000-03-01: y 2000, m 0, so 730000 + 500 - 20 + 5 + 0 + 1 - 307 = 730179.
 * January and February belong to the year before; 307 makes 0001-01-01 day 0.
 */
static int64_t cube_days_of(int64_t year, int month, int day)
{
    int64_t y = month <= 2 ? year - 1 : year;
    int m = month <= 2 ? month + 9 : month - 3;

    return y * 365 + y / 4 - y / 100 + y / 400 + (153 * m + 2) / 5 + day -
           307;
}

static bool cube_year_is_leap(int64_t y)
{
    return (y % 4 == 0 && y % 100 != 0) || y % 400 == 0;
}

/* `month` is 1 to 12. */
static int cube_days_in(int64_t year, int month)
{
    static const int days[] = {31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31};

    return days[month - 1] + (month == 2 && cube_year_is_leap(year));
}

/* The date of a day number, which must not be negative. The year is guessed
 * from years of 366 days, which is never too late, and corrected by what is
 * left: a step brings it much nearer, so a few steps do for any year. The
 * months are counted off. */
static void cube_date_of(int64_t days, int64_t *year, int *month, int *day)
{
    int64_t y = days / 366 + 1;
    int m = 1;

    while (cube_days_of(y + 1, 1, 1) <= days)
        y += (days - cube_days_of(y + 1, 1, 1)) / 366 + 1;
    days -= cube_days_of(y, 1, 1);
    while (days >= cube_days_in(y, m))
        days -= cube_days_in(y, m++);
    *year = y;
    *month = m;
    *day = (int)days + 1;
}

/* Writes `digits` decimal digits of `v` and returns what is behind them. */
static char *cube_time_put(char *out, int v, int digits)
{
    for (int i = digits; i-- > 0; v /= 10)
        out[i] = (char)('0' + v % 10);
    return out + digits;
}

/*
 * RFC 3339 as Go's RFC3339Nano has it: at the time's own offset, fractions of
 * a second without the zeros at their end and without the point when there are
 * none.
 *
 *      2025-03-01T10:11:12Z     2025-03-01T12:11:12.5+02:00
 *
 * What lies before year 1 at that offset is written as its first instant: four
 * digits cannot say more.
 */
CUBE_API void cube_time_format(const struct cube_time *t,
                               char out[CUBE_TIME_TEXT])
{
    static const char marks[] = "--T::"; /* between the six numbers */
    int64_t local = t->sec + (int64_t)t->offset_min * 60;
    int64_t days = local >= 0 ? local / 86400 : 0;
    int sec = (int)(local >= 0 ? local % 86400 : 0);
    int64_t year;
    int v[6], away = abs(t->offset_min);

    cube_date_of(days, &year, &v[1], &v[2]);
    v[0] = (int)(year % 10000);
    v[3] = sec / 3600;
    v[4] = sec / 60 % 60;
    v[5] = sec % 60;
    for (int i = 0; i < 6; i++) {
        out = cube_time_put(out, v[i], i == 0 ? 4 : 2);
        if (i < 5)
            *out++ = marks[i];
    }
    if (t->nsec > 0) {
        *out++ = '.';
        out = cube_time_put(out, (int)t->nsec, 9);
        while (out[-1] == '0')
            out--;
    }
    if (t->offset_min == 0) {
        *out++ = 'Z';
    } else {
        *out++ = t->offset_min < 0 ? '-' : '+';
        out = cube_time_put(out, away / 60, 2);
        *out++ = ':';
        out = cube_time_put(out, away % 60, 2);
    }
    *out = 0;
}

/* Reads exactly `digits` decimal digits; -1 when there are others. The caller
 * knows that so many bytes are there. */
static int cube_time_digits(const char *p, int digits)
{
    int v = 0;

    for (int i = 0; i < digits; i++) {
        if (p[i] < '0' || p[i] > '9')
            return -1;
        v = v * 10 + (p[i] - '0');
    }
    return v;
}

/* The `+02:00` or `Z` at the end. To minutes east of Greenwich. A small z is
 * refused, as Go does. */
static int cube_time_parse_zone(const char *p, size_t len, int16_t *out)
{
    int hours, minutes;

    *out = 0;
    if (len == 1 && p[0] == 'Z')
        return 0;
    if (len != 6 || (p[0] != '+' && p[0] != '-') || p[3] != ':')
        return -1;
    hours = cube_time_digits(p + 1, 2);
    minutes = cube_time_digits(p + 4, 2);
    if (hours < 0 || hours > 23 || minutes < 0 || minutes > 59)
        return -1;
    *out = (int16_t)((hours * 60 + minutes) * (p[0] == '-' ? -1 : 1));
    return 0;
}

/*
 * RFC 3339, and only dates that exist: no 30 February, no second 60, which no
 * clock here shows. -1 for anything else. The offset is kept, so that a time
 * is printed as it was written.
 *
 *      0    5  8  11 14 17 19
 *      2025-03-01T10:11:12.25+02:00
 *
 * `text` need not end with a NUL, so 20 bytes are asked for before any is
 * read: 19 and at least the Z.
 */
CUBE_API int cube_time_parse(const char *text, size_t len,
                             struct cube_time *out)
{
    int v[6], at[6] = {0, 5, 8, 11, 14, 17};
    size_t i = 19;
    int32_t nsec = 0, unit = 100000000;

    if (len < 20 || text[4] != '-' || text[7] != '-' || text[10] != 'T' ||
        text[13] != ':' || text[16] != ':')
        return -1;
    for (int k = 0; k < 6; k++) {
        v[k] = cube_time_digits(text + at[k], k == 0 ? 4 : 2);
        if (v[k] < 0)
            return -1;
    }
    if (v[0] < 1 || v[1] < 1 || v[1] > 12 || v[2] < 1 ||
        v[2] > cube_days_in(v[0], v[1]) || v[3] > 23 || v[4] > 59 ||
        v[5] > 59)
        return -1;
    if (text[i] == '.') {
        size_t first = ++i;

        for (; i < len && text[i] >= '0' && text[i] <= '9'; i++, unit /= 10)
            nsec += (text[i] - '0') * unit; /* digits beyond nine count 0 */
        if (i == first)
            return -1;
    }
    if (cube_time_parse_zone(text + i, len - i, &out->offset_min) < 0)
        return -1;
    out->sec = cube_days_of(v[0], v[1], v[2]) * 86400 + v[3] * 3600 +
               v[4] * 60 + v[5] - out->offset_min * 60;
    out->nsec = nsec;
    return 0;
}

/* ---- Files ---- */

/* Reads a whole file, /proc included, of at most `cap` bytes. What `out` held
 * is gone; after a failure its content is anything. The size is not asked for:
 * files in /proc have none and grow while they are read. One that is larger
 * than `cap` is an error and not cut: half a file means something else. */
static int cube_file_read(const struct cube_world *w, const char *path,
                          struct cube_buf *out, size_t cap,
                          struct cube_err *err)
{
    int fd = w->open(w->ctx, path, 0);
    int64_t n = 1;

    if (fd < 0)
        return cube_fail(err, cube_errno_code(fd), "open %s: %s", path,
                         cube_errno_text(fd));
    cube_buf_clear(out);
    /* a read beyond the cap is how a file that is too large is told from one
     * that just fits */
    while (n > 0 && out->len <= cap) {
        cube_buf_reserve(out, 4096);
        n = w->pread(w->ctx, fd, out->data + out->len, 4096,
                     (int64_t)out->len);
        if (n > 0)
            out->len += (size_t)n;
        out->data[out->len] = 0;
    }
    w->close(w->ctx, fd);
    if (n < 0)
        return cube_fail(err, CUBE_EIO, "read %s: %s", path,
                         cube_errno_text(n));
    if (out->len > cap)
        return cube_fail(err, CUBE_ETOOBIG, "%s is larger than %zu bytes",
                         path, cap);
    return 0;
}

/* The directory that `path` is in, "." if it names none. "/a/b" is in "/a",
 * "/a" in "/", "a" in ".". */
static void cube_path_dir(const char *path, struct cube_buf *out)
{
    const char *slash = strrchr(path, '/');

    cube_buf_clear(out);
    if (!slash)
        cube_buf_puts(out, ".");
    else
        cube_buf_add(out, path, slash == path ? 1 : (size_t)(slash - path));
}

/* Writes all of it; a negative errno value when it cannot. Calls until it is
 * done: a single write may take only a part. */
static int cube_file_write_all(const struct cube_world *w, int fd,
                               const void *data, size_t len, int64_t at)
{
    const char *p = data;

    while (len > 0) {
        int64_t n = w->pwrite(w->ctx, fd, p, len, at);

        if (n < 0)
            return (int)n;
        p += n;
        at += n;
        len -= (size_t)n;
    }
    return 0;
}

/*
 * Replaces the file by these bytes, or leaves it as it was, whenever the power
 * goes:
 *
 *      write PATH.new     old file; a PATH.new of any content
 *      sync it            old file; PATH.new whole
 *      rename             old file or new file
 *      sync directory     new file
 *
 * Only after the last step may anybody be told. A PATH.new that a crash has
 * left is overwritten by the next call. When the last step fails, the new file
 * may be there already: the caller is told -1 and may try again.
 */
static int cube_file_replace(const struct cube_world *w, const char *path,
                             const void *data, size_t len,
                             struct cube_err *err)
{
    struct cube_buf beside = {0}, dir = {0};
    int fd, r;

    cube_buf_printf(&beside, "%s.new", path);
    cube_path_dir(path, &dir);
    fd = w->open(w->ctx, beside.data,
                 CUBE_OPEN_WRITE | CUBE_OPEN_CREATE | CUBE_OPEN_TRUNC);
    r = fd < 0 ? fd : cube_file_write_all(w, fd, data, len, 0);
    if (r >= 0)
        r = w->sync(w->ctx, fd);
    if (fd >= 0)
        w->close(w->ctx, fd);
    if (r >= 0)
        r = w->rename(w->ctx, beside.data, path);
    if (r >= 0)
        r = w->sync_dir(w->ctx, dir.data);
    if (r < 0)
        (void)cube_fail(err, cube_errno_code(r), "write %s: %s", path,
                        cube_errno_text(r));
    cube_buf_free(&beside);
    cube_buf_free(&dir);
    return r < 0 ? -1 : 0;
}

/* Makes a directory and those above it; one that exists is fine. Each prefix
 * that ends before a slash is made in turn, "/a", "/a/b", "/a/b/c": asking
 * first whether it is there would be one more call and no safer. A prefix that
 * is a file shows when the next one is made, or when the directory is used.
 * What was made stays after a failure. */
static int cube_dir_make(const struct cube_world *w, const char *path,
                         struct cube_err *err)
{
    char *copy = cube_text_dup(path);
    int r = 0;

    for (char *p = copy + 1; *copy && r >= 0; p++) {
        char was = *p;

        if (was != '/' && was != 0)
            continue;
        *p = 0;
        r = w->mkdir(w->ctx, copy);
        if (r == -EEXIST)
            r = 0;
        *p = was;
        if (was == 0)
            break;
    }
    cube_free(copy);
    if (r < 0)
        return cube_fail(err, cube_errno_code(r), "make directory %s: %s",
                         path, cube_errno_text(r));
    return 0;
}


/* ==== Chapter 3. JSON ==== uses: 2 ==== */
/*
 * JSON, RFC 8259, with the interface of sheredom/json.h: the same functions,
 * types, error numbers and positions, so that either can stand in for the
 * other. `-DCUBE_JSON_H='"json.h"'` takes upstream's file instead of this
 * chapter, and so does a program that has included it before. For that reason
 * nothing outside this chapter may use more of it than upstream offers; the
 * cube_json_ functions at its end are built on that interface alone.
 *
 * The problem is input from strangers. The simplest thing that works, one
 * recursive function and one malloc per value, overflows the stack on a
 * megabyte of `[`, and leaves a tree whose release is another recursion. What
 * was chosen instead: two passes over the text and one allocation.
 *
 *    text    {"a":[1,"\n"]}
 *              |
 *              |  pass 1, scan: checks every byte, adds up two sizes
 *              v
 *    block   [ structs, in the order of the text    | texts, each with a NUL ]
 *            ^                                      ^
 *            root; free() of it frees all of it     dom_size bytes further on
 *              |
 *              |  pass 2, build: cannot fail, since all was checked
 *              v
 *    tree    value -> object -> element "a" -> value -> array -> ...
 *
 * Neither pass recurses. What is open is kept in an array of
 * JSON_MAX_RECURSION entries (in pass 1, one bit each: object or array), and
 * a text that nests deeper is refused. Each byte is looked at a fixed number
 * of times, so time is linear whatever the text is.
 *
 *                    +-------- '[' or '{' key ':' ---------+
 *                    v                                     |
 *    start ------> value ----- scalar, '[]', '{}' ----> after ----> end
 *                    ^                                   |  ^   (none open)
 *                    +-------- ',' or ',' key ':' -------+  |
 *                                                        +--+ ']' or '}'
 *
 * Errors. The numbers and offsets are upstream's, also where they look odd,
 * since programs compare them: whatever is wrong with a key is
 * invalid_string; a newline in a string is an invalid escape sequence; a
 * string without an end is reported at the last byte there is. We are
 * stricter where upstream leaves the RFC: a lone minus is no number, control
 * characters must be escaped, and text must be UTF-8.
 *
 * Invariants: the build writes exactly dom_size and data_size bytes; every
 * string and number of a tree ends in a NUL that its size does not count;
 * keys keep their order and their duplicates.
 *
 * Memory comes from CUBE_MALLOC unless the caller brings an allocator, so
 * with the default a tree is released by free(), as upstream promises; a
 * program that replaces CUBE_MALLOC releases it by its CUBE_FREE.
 *
 * A typical sequence:
 *
 *    struct json_value_s *root = cube_json_parse(text, size, err);
 *    struct json_value_s *name = cube_json_get(root, "Name");
 *    const char *s = cube_json_str(name, &len);      NULL: not a string
 *    cube_json_free(root);
 *
 *    cube_buf_puts(&out, "{\"Name\":");
 *    cube_json_put_str(&out, s, len);
 *    cube_buf_puts(&out, "}");
 *
 * Naive on purpose: members are found by linear search. Objects here have a
 * few dozen; for thousands of them, walk the list once and fill a map.
 */

/* ---- Characters ---- */

/*
 * Strings are scanned eight bytes at a time, in a word whose lowest byte is
 * the first one. Bytes that are looked for are marked by their bit 7. The
 * lowest mark is always right; above a right one there can be false ones.
 * Zero bytes are found as in Anderson's "Bit Twiddling Hacks".
 */
static const uint64_t cube_json_ones = UINT64_C(0x0101010101010101);

static inline uint64_t cube_json_load(const unsigned char *p)
{
    return (uint64_t)p[0] | (uint64_t)p[1] << 8 | (uint64_t)p[2] << 16 |
           (uint64_t)p[3] << 24 | (uint64_t)p[4] << 32 |
           (uint64_t)p[5] << 40 | (uint64_t)p[6] << 48 |
           (uint64_t)p[7] << 56;
}

/* Marks the bytes of this value. */
static inline uint64_t cube_json_has(uint64_t w, unsigned char byte)
{
    uint64_t x = w ^ (cube_json_ones * byte);

    return (x - cube_json_ones) & ~x & (cube_json_ones << 7);
}

/* Marks what does not stand for itself in a string: quotes, backslashes,
 * control characters (less 0x20 borrows), and all but ASCII. */
static inline uint64_t cube_json_marks(uint64_t w)
{
    uint64_t control = (w - cube_json_ones * 0x20) & ~w;

    return ((w | control) & (cube_json_ones << 7)) | cube_json_has(w, '"') |
           cube_json_has(w, '\\');
}

/* The place of the lowest mark. */
static inline size_t cube_json_first(uint64_t marks)
{
    return (size_t)__builtin_ctzll(marks) / 8;
}

/*
 * How many bytes has the character at `p`, by RFC 3629? 0: it is malformed.
 *
 *    00..7F
 *    C2..DF  80..BF
 *    E0      A0..BF  80..BF            shorter forms of these are refused,
 *    E1..EF  80..BF  80..BF            and ED A0..BF, the surrogates
 *    F0      90..BF  80..BF  80..BF
 *    F1..F3  80..BF  80..BF  80..BF
 *    F4      80..8F  80..BF  80..BF
 */
static size_t cube_json_utf8(const unsigned char *p, size_t left)
{
    unsigned char low = 0x80, high = 0xbf;
    size_t n;

    if (left == 0)
        return 0;
    if (p[0] < 0x80)
        return 1;
    if (p[0] < 0xc2 || p[0] > 0xf4)
        return 0;
    n = p[0] < 0xe0 ? 2 : p[0] < 0xf0 ? 3 : 4;
    if (p[0] == 0xe0)
        low = 0xa0;
    else if (p[0] == 0xf0)
        low = 0x90;
    else if (p[0] == 0xed)
        high = 0x9f;
    else if (p[0] == 0xf4)
        high = 0x8f;
    if (left < n || p[1] < low || p[1] > high)
        return 0;
    for (size_t i = 2; i < n; i++) {
        if (p[i] < 0x80 || p[i] > 0xbf)
            return 0;
    }
    return n;
}

/* Four hex digits; -1 when they are none. */
static int32_t cube_json_hex4(const unsigned char *p)
{
    int32_t v = 0;

    for (int i = 0; i < 4; i++) {
        int digit = cube_hex_digit((char)p[i]);

        if (digit < 0)
            return -1;
        v = v * 16 + digit;
    }
    return v;
}

#ifdef CUBE_JSON_H
#include CUBE_JSON_H
#elif !defined(SHEREDOM_JSON_H_INCLUDED)
/* Our names are upstream's: its file, included later, has to stay away. */
#define SHEREDOM_JSON_H_INCLUDED

#ifndef JSON_MAX_RECURSION
#define JSON_MAX_RECURSION 1000
#endif

/* ---- The interface's types ---- */

enum json_type_e {
    json_type_string,
    json_type_number,
    json_type_object,
    json_type_array,
    json_type_true,
    json_type_false,
    json_type_null
};

struct json_string_s {
    const char *string; /* UTF-8, escapes resolved; may hold NULs */
    size_t string_size; /* in bytes, without the NUL behind it */
};

struct json_number_s {
    const char *number; /* the text as it stood */
    size_t number_size;
};

/*
 * A tree of `{"a":[1]}`; `...` is the rest of a struct:
 *
 *    value    { payload, json_type_object }
 *                  |
 *    object   { start, length 1 }
 *                  |
 *    element  { name, value, next NULL }
 *                 |      |
 *         { "a", 1 }   value { payload, json_type_array }
 *                                 |
 *                      array { start, length 1 }
 *                                 |
 *                      element { value, next NULL }
 *                                  |
 *                                value { payload, json_type_number }
 *                                           |
 *                                        { "1", 1 }
 */
struct json_value_s {
    void *payload; /* by type; NULL for true, false and null */
    size_t type;   /* enum json_type_e */
};

struct json_object_element_s {
    struct json_string_s *name;
    struct json_value_s *value;
    struct json_object_element_s *next;
};

struct json_object_s {
    struct json_object_element_s *start;
    size_t length;
};

struct json_array_element_s {
    struct json_value_s *value;
    struct json_array_element_s *next;
};

struct json_array_s {
    struct json_array_element_s *start;
    size_t length;
};

enum json_parse_flags_e { json_parse_flags_default = 0 };

enum json_parse_error_e {
    json_parse_error_none,
    json_parse_error_expected_comma_or_closing_bracket,
    json_parse_error_expected_colon,
    json_parse_error_expected_opening_quote,
    json_parse_error_invalid_string_escape_sequence,
    json_parse_error_invalid_number_format,
    json_parse_error_invalid_value,
    json_parse_error_premature_end_of_buffer,
    json_parse_error_invalid_string,
    json_parse_error_allocator_failed,
    json_parse_error_unexpected_trailing_characters,
    json_parse_error_recursion,
    json_parse_error_unknown
};

struct json_parse_result_s {
    size_t error;         /* enum json_parse_error_e */
    size_t error_offset;  /* in bytes, from 0 */
    size_t error_line_no; /* from 1 */
    size_t error_row_no;  /* bytes since the newline before, or the start */
};

/* ---- Strings: plain runs, escapes ---- */

/* How many bytes at `p` stand for themselves: printable ASCII, neither quote
 * nor backslash? */
static inline size_t cube_json_plain(const unsigned char *p, size_t left)
{
    size_t n = 0;

    for (; left - n >= 8; n += 8) {
        uint64_t marks = cube_json_marks(cube_json_load(p + n));

        if (marks)
            return n + cube_json_first(marks);
    }
    while (n < left && p[n] >= 0x20 && p[n] < 0x80 && p[n] != '"' &&
           p[n] != '\\')
        n++;
    return n;
}

/* Writes a code point below 0x110000 as UTF-8; returns its 1 to 4 bytes. */
static size_t cube_json_encode(uint32_t point, char out[4])
{
    static const unsigned char lead[] = {0, 0, 0xc0, 0xe0, 0xf0};
    size_t n = point < 0x80 ? 1 : point < 0x800 ? 2 : point < 0x10000 ? 3 : 4;

    for (size_t i = n; i-- > 1; point >>= 6)
        out[i] = (char)(0x80 | (point & 0x3f));
    out[0] = (char)(lead[n] | point);
    return n;
}

struct cube_json_escape {
    size_t taken; /* bytes of the escape; when it is bad, where, from its \ */
    size_t size;  /* bytes that it stands for; 0: it is bad */
    char text[4];
};

/* The `\u` escape at `p`, surrogates in pairs. The byte behind it has to be
 * there too, since a string does not end without a quote. */
static struct cube_json_escape cube_json_unescape_u(const unsigned char *p,
                                                    size_t left)
{
    struct cube_json_escape e = {1, 0, {0}};
    int32_t high = left >= 7 ? cube_json_hex4(p + 2) : -1, low;

    if (high < 0 || (high >= 0xdc00 && high <= 0xdfff))
        return e;
    if (high < 0xd800 || high > 0xdfff) {
        e.taken = 6;
        e.size = cube_json_encode((uint32_t)high, e.text);
        return e;
    }
    if (left < 12 || p[6] != '\\' || p[7] != 'u')
        return e;
    e.taken = 7;
    low = left >= 13 ? cube_json_hex4(p + 8) : -1;
    if (low < 0xdc00 || low > 0xdfff)
        return e;
    e.taken = 12;
    e.size = cube_json_encode(0x10000 + ((uint32_t)(high - 0xd800) << 10) +
                                  (uint32_t)(low - 0xdc00),
                              e.text);
    return e;
}

/* The escape whose backslash is at `p`; there is a byte behind it. */
static struct cube_json_escape cube_json_unescape(const unsigned char *p,
                                                  size_t left)
{
    static const char letters[] = "\"\\/bfnrt", bytes[] = "\"\\/\b\f\n\r\t";
    struct cube_json_escape e = {1, 0, {0}};
    const char *at;

    if (p[1] == 'u')
        return cube_json_unescape_u(p, left);
    at = p[1] ? strchr(letters, p[1]) : NULL;
    if (at) {
        e.taken = 2;
        e.size = 1;
        e.text[0] = bytes[at - letters];
    }
    return e;
}

/* ---- Pass 1: check and measure ---- */

struct cube_json_scan {
    const unsigned char *src;
    size_t size, offset;
    size_t line_no, line_offset; /* line_offset: of the newline before */
    uint64_t dom_size, data_size;
    enum json_parse_error_e error;
    size_t depth;
    unsigned char is_object[JSON_MAX_RECURSION / 8 + 1]; /* a bit a level */
};

/* What follows in the scan: the drawing's states, or an error. */
enum cube_json_state {
    CUBE_JSON_FAILED,
    CUBE_JSON_VALUE,
    CUBE_JSON_AFTER,
    CUBE_JSON_END
};

static int cube_json_wrong(struct cube_json_scan *s,
                           enum json_parse_error_e error, size_t offset)
{
    s->error = error;
    s->offset = offset;
    return -1;
}

static int cube_json_skip_space(struct cube_json_scan *s)
{
    for (; s->offset < s->size; s->offset++) {
        switch (s->src[s->offset]) {
        case '\n':
            s->line_no++;
            s->line_offset = s->offset;
            break;
        case ' ':
        case '\t':
        case '\r':
            break;
        default:
            return 0;
        }
    }
    return cube_json_wrong(s, json_parse_error_premature_end_of_buffer,
                           s->size);
}

/* Goes to the next byte that is no white space; -1: there is none. What
 * programs have written has none, so that case is looked at first. */
static inline int cube_json_scan_space(struct cube_json_scan *s)
{
    return s->offset < s->size && s->src[s->offset] > ' '
               ? 0
               : cube_json_skip_space(s);
}

/* One character of a string that is not plain: an escape, or UTF-8. */
static int cube_json_scan_char(struct cube_json_scan *s, size_t *at)
{
    const unsigned char *p = s->src + *at;
    size_t left = s->size - *at, n;

    if (*p == '\\') {
        struct cube_json_escape e;

        if (left < 2)
            return cube_json_wrong(
                s, json_parse_error_premature_end_of_buffer, s->size);
        e = cube_json_unescape(p, left);
        *at += e.taken;
        s->data_size += e.size;
        return e.size ? 0
                      : cube_json_wrong(
                            s,
                            json_parse_error_invalid_string_escape_sequence,
                            *at);
    }
    if (*p == '\n' || *p == '\r')
        return cube_json_wrong(
            s, json_parse_error_invalid_string_escape_sequence, *at);
    n = *p < 0x20 ? 0 : cube_json_utf8(p, left);
    if (n == 0)
        return cube_json_wrong(s, json_parse_error_invalid_string, *at);
    *at += n;
    s->data_size += n;
    return 0;
}

static int cube_json_scan_string(struct cube_json_scan *s)
{
    size_t at = s->offset + 1, run;

    if (s->src[s->offset] != '"')
        return cube_json_wrong(s, json_parse_error_expected_opening_quote,
                               s->offset);
    for (;;) {
        run = cube_json_plain(s->src + at, s->size - at);
        at += run;
        s->data_size += run;
        if (at == s->size)
            return cube_json_wrong(
                s, json_parse_error_premature_end_of_buffer, s->size - 1);
        if (s->src[at] == '"')
            break;
        if (cube_json_scan_char(s, &at))
            return -1;
    }
    s->offset = at + 1;
    s->data_size++;
    s->dom_size += sizeof(struct json_string_s);
    return 0;
}

/* At least one digit from `*at` on. */
static int cube_json_scan_digits(struct cube_json_scan *s, size_t *at)
{
    size_t start = *at;

    while (*at < s->size && s->src[*at] >= '0' && s->src[*at] <= '9')
        ++*at;
    return *at > start
               ? 0
               : cube_json_wrong(s, json_parse_error_invalid_number_format,
                                 start);
}

/* number = [ "-" ] ( "0" / 1-9 digits ) [ "." digits ] [ e [ sign ] digits ],
 * and behind it a byte that can follow a value. */
static int cube_json_scan_number(struct cube_json_scan *s)
{
    const unsigned char *src = s->src;
    size_t at = s->offset, size = s->size;

    if (src[at] == '-')
        at++;
    if (at < size && src[at] == '0')
        at++;
    else if (cube_json_scan_digits(s, &at))
        return -1;
    if (at < size && src[at] == '.') {
        at++;
        if (cube_json_scan_digits(s, &at))
            return -1;
    }
    if (at < size && (src[at] == 'e' || src[at] == 'E')) {
        at++;
        if (at < size && (src[at] == '+' || src[at] == '-'))
            at++;
        if (cube_json_scan_digits(s, &at))
            return -1;
    }
    if (at < size && (!src[at] || !strchr(" \t\r\n},]", src[at])))
        return cube_json_wrong(s, json_parse_error_invalid_number_format, at);
    s->dom_size += sizeof(struct json_number_s);
    s->data_size += at - s->offset + 1;
    s->offset = at;
    return 0;
}

/* Which of the three words is at `p`? Returns its length, 0 for none. */
static size_t cube_json_word(const unsigned char *p, size_t left,
                             size_t *type)
{
    static const struct {
        const char *text;
        size_t len, type;
    } words[] = {{"true", 4, json_type_true},
                 {"false", 5, json_type_false},
                 {"null", 4, json_type_null}};

    for (size_t i = 0; i < CUBE_COUNT(words); i++) {
        if (left >= words[i].len && !memcmp(p, words[i].text, words[i].len)) {
            *type = words[i].type;
            return words[i].len;
        }
    }
    return 0;
}

static int cube_json_scan_scalar(struct cube_json_scan *s)
{
    unsigned char c = s->src[s->offset];
    size_t type, len;

    if (c == '"')
        return cube_json_scan_string(s);
    if (c == '-' || (c >= '0' && c <= '9'))
        return cube_json_scan_number(s);
    len = cube_json_word(s->src + s->offset, s->size - s->offset, &type);
    if (len == 0)
        return cube_json_wrong(s,
                               c == '+' || c == '.'
                                   ? json_parse_error_invalid_number_format
                                   : json_parse_error_invalid_value,
                               s->offset);
    s->offset += len;
    return 0;
}

static inline bool cube_json_in_object(const struct cube_json_scan *s)
{
    size_t level = s->depth - 1;

    return s->is_object[level / 8] >> level % 8 & 1;
}

/* In front of an element's value: the key and the colon of a member. */
static enum cube_json_state cube_json_scan_element(struct cube_json_scan *s)
{
    if (!cube_json_in_object(s)) {
        s->dom_size += sizeof(struct json_array_element_s);
        return CUBE_JSON_VALUE;
    }
    s->dom_size += sizeof(struct json_object_element_s);
    if (cube_json_scan_string(s)) {
        s->error = json_parse_error_invalid_string;
        return CUBE_JSON_FAILED;
    }
    if (cube_json_scan_space(s))
        return CUBE_JSON_FAILED;
    if (s->src[s->offset] != ':') {
        s->error = json_parse_error_expected_colon;
        return CUBE_JSON_FAILED;
    }
    s->offset++;
    return CUBE_JSON_VALUE;
}

/* '[' or '{': one level deeper, to its first element if it has one. */
static enum cube_json_state cube_json_scan_open(struct cube_json_scan *s)
{
    bool is_object = s->src[s->offset] == '{';
    size_t level = s->depth;
    unsigned char bit = (unsigned char)(1u << level % 8);

    if (s->depth == JSON_MAX_RECURSION) {
        s->error = json_parse_error_recursion;
        return CUBE_JSON_FAILED;
    }
    if (is_object)
        s->is_object[level / 8] |= bit;
    else
        s->is_object[level / 8] &= (unsigned char)~bit;
    s->depth++;
    s->offset++;
    s->dom_size += is_object ? sizeof(struct json_object_s)
                             : sizeof(struct json_array_s);
    if (cube_json_scan_space(s))
        return CUBE_JSON_FAILED;
    if (s->src[s->offset] == (is_object ? '}' : ']'))
        return CUBE_JSON_AFTER;
    return cube_json_scan_element(s);
}

static enum cube_json_state cube_json_scan_value(struct cube_json_scan *s)
{
    if (cube_json_scan_space(s))
        return CUBE_JSON_FAILED;
    s->dom_size += sizeof(struct json_value_s);
    if (s->src[s->offset] == '{' || s->src[s->offset] == '[')
        return cube_json_scan_open(s);
    return cube_json_scan_scalar(s) ? CUBE_JSON_FAILED : CUBE_JSON_AFTER;
}

/* Behind a value: its container ends or goes on. */
static enum cube_json_state cube_json_scan_after(struct cube_json_scan *s)
{
    if (s->depth == 0)
        return CUBE_JSON_END;
    if (cube_json_scan_space(s))
        return CUBE_JSON_FAILED;
    if (s->src[s->offset] == (cube_json_in_object(s) ? '}' : ']')) {
        s->depth--;
        s->offset++;
        return CUBE_JSON_AFTER;
    }
    if (s->src[s->offset] != ',') {
        s->error = json_parse_error_expected_comma_or_closing_bracket;
        return CUBE_JSON_FAILED;
    }
    s->offset++;
    if (cube_json_scan_space(s))
        return CUBE_JSON_FAILED;
    return cube_json_scan_element(s);
}

/* The whole text; -1 with `error` and the position set. */
static int cube_json_scan(struct cube_json_scan *s)
{
    enum cube_json_state state = CUBE_JSON_VALUE;

    while (state == CUBE_JSON_VALUE || state == CUBE_JSON_AFTER)
        state = state == CUBE_JSON_VALUE ? cube_json_scan_value(s)
                                         : cube_json_scan_after(s);
    if (state == CUBE_JSON_FAILED)
        return -1;
    if (cube_json_scan_space(s) == 0)
        return cube_json_wrong(
            s, json_parse_error_unexpected_trailing_characters, s->offset);
    s->error = json_parse_error_none;
    return 0;
}

/* ---- Pass 2: build ---- */

/* Where the next element of an open container is to be linked. */
struct cube_json_open {
    size_t *length;
    struct json_object_element_s **member; /* NULL: it is an array */
    struct json_array_element_s **item;
};

/* Hands out one block, front part to structs and back part to texts. Used by
 * the parser and by json_extract_value_ex. */
struct cube_json_build {
    unsigned char *dom;
    char *data, *end;
    struct json_value_s *value; /* the one to be filled next */
    size_t depth;
    struct cube_json_open open[JSON_MAX_RECURSION];
};

static inline void *cube_json_build_struct(struct cube_json_build *b,
                                           size_t size)
{
    void *p = b->dom;

    b->dom += size;
    return p;
}

static void cube_json_build_start(struct cube_json_build *b, void *block,
                                  uint64_t dom_size, uint64_t data_size)
{
    b->dom = block;
    b->data = (char *)block + dom_size;
    b->end = b->data + data_size;
    b->depth = 0;
    b->value = cube_json_build_struct(b, sizeof *b->value);
}

/* Both parts are used up, to the byte. */
static void cube_json_build_end(const struct cube_json_build *b,
                                const void *block, uint64_t dom_size)
{
    CUBE_ASSERT(b->dom == (const unsigned char *)block + dom_size);
    CUBE_ASSERT(b->data == b->end);
    (void)b;
    (void)block;
    (void)dom_size;
}

/* Makes the due value an empty container and steps into it. */
static void cube_json_build_open(struct cube_json_build *b, size_t type)
{
    struct cube_json_open *open = &b->open[b->depth++];

    b->value->type = type;
    memset(open, 0, sizeof *open);
    if (type == json_type_object) {
        struct json_object_s *object =
            cube_json_build_struct(b, sizeof *object);

        b->value->payload = object;
        object->start = NULL;
        open->length = &object->length;
        open->member = &object->start;
    } else {
        struct json_array_s *array = cube_json_build_struct(b, sizeof *array);

        b->value->payload = array;
        array->start = NULL;
        open->length = &array->length;
        open->item = &array->start;
    }
    *open->length = 0;
}

/* Adds an element to the open container, whose value is due then. Returns
 * where its name goes, or NULL in an array. */
static struct json_string_s *cube_json_build_next(struct cube_json_build *b)
{
    struct cube_json_open *open = &b->open[b->depth - 1];
    struct json_string_s *name = NULL;

    ++*open->length;
    if (open->member) {
        struct json_object_element_s *member =
            cube_json_build_struct(b, sizeof *member);

        name = cube_json_build_struct(b, sizeof *name);
        member->name = name;
        member->next = NULL;
        *open->member = member;
        open->member = &member->next;
        b->value = cube_json_build_struct(b, sizeof *b->value);
        member->value = b->value;
    } else {
        struct json_array_element_s *item =
            cube_json_build_struct(b, sizeof *item);

        item->next = NULL;
        *open->item = item;
        open->item = &item->next;
        b->value = cube_json_build_struct(b, sizeof *b->value);
        item->value = b->value;
    }
    return name;
}

static const char *cube_json_build_text(struct cube_json_build *b,
                                        const void *p, size_t size)
{
    char *text = b->data;

    if (size > 0)
        memcpy(text, p, size);
    text[size] = 0;
    b->data += size + 1;
    return text;
}

static void cube_json_build_string(struct cube_json_build *b, const char *p,
                                   size_t size)
{
    struct json_string_s *string = cube_json_build_struct(b, sizeof *string);

    string->string = cube_json_build_text(b, p, size);
    string->string_size = size;
    b->value->type = json_type_string;
    b->value->payload = string;
}

static void cube_json_build_number(struct cube_json_build *b, const void *p,
                                   size_t size)
{
    struct json_number_s *number = cube_json_build_struct(b, sizeof *number);

    number->number = cube_json_build_text(b, p, size);
    number->number_size = size;
    b->value->type = json_type_number;
    b->value->payload = number;
}

static void cube_json_build_word(struct cube_json_build *b, size_t type)
{
    b->value->type = type;
    b->value->payload = NULL;
}

/* Copies the plain bytes at `p` to `*text`; returns what is behind them.
 * Where there is room, whole words are copied and the surplus is overwritten
 * by what comes next. */
static const unsigned char *cube_json_fill_plain(const unsigned char *p,
                                                 const unsigned char *end,
                                                 char **text,
                                                 const char *text_end)
{
    size_t run;

    while (end - p >= 8 && text_end - *text >= 8) {
        uint64_t marks = cube_json_marks(cube_json_load(p));

        memcpy(*text, p, 8);
        run = marks ? cube_json_first(marks) : 8;
        *text += run;
        p += run;
        if (marks)
            return p;
    }
    run = cube_json_plain(p, (size_t)(end - p));
    memcpy(*text, p, run);
    *text += run;
    return p + run;
}

/* The string at `p`, a quote; returns what is behind it. The text has been
 * checked: each run ends at a quote, an escape or a longer character. */
static const unsigned char *cube_json_fill_string(struct cube_json_build *b,
                                                  const unsigned char *p,
                                                  const unsigned char *end,
                                                  struct json_string_s *out)
{
    char *text = b->data;

    out->string = text;
    for (p++;;) {
        p = cube_json_fill_plain(p, end, &text, b->end);
        if (*p == '"')
            break;
        if (*p == '\\') {
            struct cube_json_escape e =
                cube_json_unescape(p, (size_t)(end - p));

            memcpy(text, e.text, e.size);
            text += e.size;
            p += e.taken;
        } else {
            do
                *text++ = (char)*p++;
            while (*p >= 0x80);
        }
    }
    *text = 0;
    out->string_size = (size_t)(text - b->data);
    b->data = text + 1;
    return p + 1;
}

/* Fills the due value from the text at `p`; returns what is behind it, for a
 * container behind its bracket. */
static const unsigned char *cube_json_fill_value(struct cube_json_build *b,
                                                 const unsigned char *p,
                                                 const unsigned char *end)
{
    const unsigned char *start = p;
    size_t type = json_type_null, len;

    if (*p == '{' || *p == '[') {
        cube_json_build_open(b, *p == '{' ? json_type_object
                                          : json_type_array);
        return p + 1;
    }
    if (*p == '"') {
        b->value->type = json_type_string;
        b->value->payload =
            cube_json_build_struct(b, sizeof(struct json_string_s));
        return cube_json_fill_string(b, p, end, b->value->payload);
    }
    if (*p >= 'a') {
        len = cube_json_word(p, (size_t)(end - p), &type);
        cube_json_build_word(b, type);
        return p + len;
    }
    while (p < end && (*p == '+' || *p == '-' || *p == '.' || *p == 'e' ||
                       *p == 'E' || (*p >= '0' && *p <= '9')))
        p++;
    cube_json_build_number(b, start, (size_t)(p - start));
    return p;
}

/* White space, and the two marks that say nothing in a checked text. */
static inline const unsigned char *cube_json_fill_gap(const unsigned char *p)
{
    while (*p == ' ' || *p == '\t' || *p == '\n' || *p == '\r' ||
           *p == ',' || *p == ':')
        p++;
    return p;
}

/* Behind a checked value that is not the root there is always a bracket, so
 * only the gap before the root and after it could run off the end. */
static void cube_json_fill(struct cube_json_build *b, const unsigned char *p,
                           const unsigned char *end)
{
    p = cube_json_fill_value(b, cube_json_fill_gap(p), end);
    while (b->depth > 0) {
        p = cube_json_fill_gap(p);
        if (*p == ']' || *p == '}') {
            b->depth--;
            p++;
        } else {
            struct json_string_s *name = cube_json_build_next(b);

            if (name) {
                p = cube_json_fill_string(b, p, end, name);
                p = cube_json_fill_gap(p);
            }
            p = cube_json_fill_value(b, p, end);
        }
    }
}

/* ---- The interface: parsing ---- */

/* A block for both parts of a tree; NULL when there is none that large. */
static void *cube_json_block(uint64_t dom_size, uint64_t data_size,
                             void *(*alloc)(void *user, size_t size),
                             void *user)
{
    uint64_t size = dom_size + data_size;

    if (size > SIZE_MAX)
        return NULL;
    return alloc ? alloc(user, (size_t)size) : CUBE_MALLOC((size_t)size);
}

CUBE_UNUSED static struct json_value_s *
json_parse_ex(const void *src, size_t src_size, size_t flags_bitset,
              void *(*alloc_func_ptr)(void *, size_t), void *user_data,
              struct json_parse_result_s *result)
{
    struct cube_json_scan scan = {0};
    struct cube_json_build build;
    struct json_parse_result_s unused;
    void *block;

    result = result ? result : &unused;
    memset(result, 0, sizeof *result);
    if (!src)
        return NULL;
    scan.src = src;
    scan.size = src_size;
    scan.line_no = 1;
    if (flags_bitset != json_parse_flags_default)
        scan.error = json_parse_error_unknown;
    if (scan.error || cube_json_scan(&scan)) {
        result->error = scan.error;
        result->error_offset = scan.offset;
        result->error_line_no = scan.line_no;
        result->error_row_no = scan.offset - scan.line_offset;
        return NULL;
    }
    block = cube_json_block(scan.dom_size, scan.data_size, alloc_func_ptr,
                            user_data);
    if (!block) {
        result->error = json_parse_error_allocator_failed;
        return NULL;
    }
    cube_json_build_start(&build, block, scan.dom_size, scan.data_size);
    cube_json_fill(&build, src, scan.src + src_size);
    cube_json_build_end(&build, block, scan.dom_size);
    return block;
}

CUBE_UNUSED static struct json_value_s *json_parse(const void *src,
                                                   size_t src_size)
{
    return json_parse_ex(src, src_size, json_parse_flags_default, NULL, NULL,
                         NULL);
}

/* ---- A walk over a tree ---- */

enum cube_json_event {
    CUBE_JSON_LEAF,     /* a value without elements, also [] and {} */
    CUBE_JSON_OPEN,     /* a container; its elements follow, then CLOSE */
    CUBE_JSON_CLOSE,
    CUBE_JSON_DONE,
    CUBE_JSON_UNFIT     /* nested too deep, or of a type that there is not */
};

/* One level: the container, and which element of it comes next. */
struct cube_json_level {
    const struct json_value_s *value;
    const struct json_object_element_s *member;
    const struct json_array_element_s *item;
};

/* Visits all values in the order of the text, without recursion. */
struct cube_json_walk {
    const struct json_value_s *value; /* of the last event, or the root */
    const struct json_string_s *name; /* of the value, in an object */
    bool is_later;                    /* the value has a sibling before it */
    size_t depth;                     /* open containers, after the event */
    struct cube_json_level levels[JSON_MAX_RECURSION];
};

/* The event of the value that the walk has just come to. */
static enum cube_json_event cube_json_walk_enter(struct cube_json_walk *w)
{
    struct cube_json_level level = {w->value, NULL, NULL};

    if (!w->value || w->value->type > json_type_null ||
        (!w->value->payload && w->value->type <= json_type_array))
        return CUBE_JSON_UNFIT;
    if (w->value->type == json_type_object)
        level.member = ((const struct json_object_s *)w->value->payload)->start;
    else if (w->value->type == json_type_array)
        level.item = ((const struct json_array_s *)w->value->payload)->start;
    if (!level.member && !level.item)
        return CUBE_JSON_LEAF;
    if (w->depth == JSON_MAX_RECURSION)
        return CUBE_JSON_UNFIT;
    w->levels[w->depth++] = level;
    return CUBE_JSON_OPEN;
}

static enum cube_json_event cube_json_walk_start(struct cube_json_walk *w,
                                                 const struct json_value_s *v)
{
    w->value = v;
    w->name = NULL;
    w->is_later = false;
    w->depth = 0;
    return cube_json_walk_enter(w);
}

static enum cube_json_event cube_json_walk_next(struct cube_json_walk *w,
                                                enum cube_json_event last)
{
    struct cube_json_level *level;

    if (w->depth == 0)
        return CUBE_JSON_DONE;
    level = &w->levels[w->depth - 1];
    w->is_later = last != CUBE_JSON_OPEN;
    w->name = NULL;
    if (level->member) {
        w->name = level->member->name;
        w->value = level->member->value;
        level->member = level->member->next;
        return w->name ? cube_json_walk_enter(w) : CUBE_JSON_UNFIT;
    }
    if (level->item) {
        w->value = level->item->value;
        level->item = level->item->next;
        return cube_json_walk_enter(w);
    }
    w->value = level->value;
    w->depth--;
    return CUBE_JSON_CLOSE;
}

/* ---- The interface: copies ---- */

/* What the copy of this event's value takes. */
static void cube_json_extract_size(const struct cube_json_walk *w,
                                   uint64_t *dom_size, uint64_t *data_size)
{
    bool is_root = *dom_size == 0;
    const struct json_string_s *string = w->value->payload;
    const struct json_number_s *number = w->value->payload;

    *dom_size += sizeof(struct json_value_s);
    if (w->name) {
        *dom_size += sizeof(struct json_object_element_s) +
                     sizeof(struct json_string_s);
        *data_size += (uint64_t)w->name->string_size + 1;
    } else if (!is_root) {
        *dom_size += sizeof(struct json_array_element_s);
    }
    if (w->value->type == json_type_string) {
        *dom_size += sizeof *string;
        *data_size += (uint64_t)string->string_size + 1;
    } else if (w->value->type == json_type_number) {
        *dom_size += sizeof *number;
        *data_size += (uint64_t)number->number_size + 1;
    } else if (w->value->type == json_type_object) {
        *dom_size += sizeof(struct json_object_s);
    } else if (w->value->type == json_type_array) {
        *dom_size += sizeof(struct json_array_s);
    }
}

static int cube_json_extract_measure(const struct json_value_s *value,
                                     uint64_t *dom_size, uint64_t *data_size)
{
    struct cube_json_walk walk;
    enum cube_json_event event = cube_json_walk_start(&walk, value);

    for (; event != CUBE_JSON_DONE;
         event = cube_json_walk_next(&walk, event)) {
        if (event == CUBE_JSON_UNFIT)
            return -1;
        if (event != CUBE_JSON_CLOSE)
            cube_json_extract_size(&walk, dom_size, data_size);
    }
    return 0;
}

/* Copies this event's value into the due one. */
static void cube_json_extract_one(struct cube_json_build *b,
                                  const struct cube_json_walk *w,
                                  enum cube_json_event event)
{
    const struct json_value_s *value = w->value;
    const struct json_string_s *string = value->payload;
    const struct json_number_s *number = value->payload;

    if (value->type == json_type_string)
        cube_json_build_string(b, string->string, string->string_size);
    else if (value->type == json_type_number)
        cube_json_build_number(b, number->number, number->number_size);
    else if (value->type > json_type_array)
        cube_json_build_word(b, value->type);
    else
        cube_json_build_open(b, value->type);
    if (event == CUBE_JSON_LEAF &&
        (value->type == json_type_object || value->type == json_type_array))
        b->depth--;
}

static void cube_json_extract_fill(struct cube_json_build *b,
                                   const struct json_value_s *value)
{
    struct cube_json_walk walk;
    enum cube_json_event event = cube_json_walk_start(&walk, value);

    for (; event != CUBE_JSON_DONE;
         event = cube_json_walk_next(&walk, event)) {
        if (event == CUBE_JSON_CLOSE) {
            b->depth--;
            continue;
        }
        if (b->depth > 0) {
            struct json_string_s *name = cube_json_build_next(b);

            if (name) {
                name->string_size = walk.name->string_size;
                name->string = cube_json_build_text(b, walk.name->string,
                                                    name->string_size);
            }
        }
        cube_json_extract_one(b, &walk, event);
    }
}

CUBE_UNUSED static struct json_value_s *
json_extract_value_ex(const struct json_value_s *value,
                      void *(*alloc_func_ptr)(void *, size_t),
                      void *user_data)
{
    uint64_t dom_size = 0, data_size = 0;
    struct cube_json_build build;
    void *block;

    if (!value || cube_json_extract_measure(value, &dom_size, &data_size))
        return NULL;
    block = cube_json_block(dom_size, data_size, alloc_func_ptr, user_data);
    if (!block)
        return NULL;
    cube_json_build_start(&build, block, dom_size, data_size);
    cube_json_extract_fill(&build, value);
    cube_json_build_end(&build, block, dom_size);
    return block;
}

CUBE_UNUSED static struct json_value_s *
json_extract_value(const struct json_value_s *value)
{
    return json_extract_value_ex(value, NULL, NULL);
}

/* ---- The interface: payloads ---- */

CUBE_UNUSED static struct json_string_s *
json_value_as_string(struct json_value_s *const value)
{
    return value && value->type == json_type_string ? value->payload : NULL;
}

CUBE_UNUSED static struct json_number_s *
json_value_as_number(struct json_value_s *const value)
{
    return value && value->type == json_type_number ? value->payload : NULL;
}

CUBE_UNUSED static struct json_object_s *
json_value_as_object(struct json_value_s *const value)
{
    return value && value->type == json_type_object ? value->payload : NULL;
}

CUBE_UNUSED static struct json_array_s *
json_value_as_array(struct json_value_s *const value)
{
    return value && value->type == json_type_array ? value->payload : NULL;
}

CUBE_UNUSED static int json_value_is_true(const struct json_value_s *value)
{
    return value && value->type == json_type_true;
}

CUBE_UNUSED static int json_value_is_false(const struct json_value_s *value)
{
    return value && value->type == json_type_false;
}

CUBE_UNUSED static int json_value_is_null(const struct json_value_s *value)
{
    return value && value->type == json_type_null;
}

/* ---- The interface: printing ---- */

/* Where a print goes. Run twice, it measures first and writes then. */
struct cube_json_print {
    char *at; /* NULL: only count */
    size_t size;
    const char *indent, *newline, *colon; /* empty texts: minified */
};

static void cube_json_print_add(struct cube_json_print *o, const void *p,
                                size_t size)
{
    if (o->at && size > 0) {
        memcpy(o->at, p, size);
        o->at += size;
    }
    o->size += size;
}

/* The escape of a byte that may not stand for itself; returns its length. */
static size_t cube_json_escape_byte(unsigned char c, char out[6])
{
    static const char bytes[] = "\"\\\b\f\n\r\t", letters[] = "\"\\bfnrt";
    static const char hex[] = "0123456789abcdef";
    const char *at = c ? strchr(bytes, c) : NULL;

    out[0] = '\\';
    if (at) {
        out[1] = letters[at - bytes];
        return 2;
    }
    memcpy(out + 1, "u00", 3);
    out[4] = hex[c >> 4];
    out[5] = hex[c & 15];
    return 6;
}

static void cube_json_print_string(struct cube_json_print *o,
                                   const struct json_string_s *string)
{
    const unsigned char *p = (const unsigned char *)string->string;
    size_t left = string->string_size, n;
    char escape[6];

    cube_json_print_add(o, "\"", 1);
    while (left > 0) {
        n = cube_json_plain(p, left);
        if (n == 0 && *p >= 0x80)
            n = cube_json_utf8(p, left);
        cube_json_print_add(o, p, n);
        if (n == 0 && *p >= 0x80)
            cube_json_print_add(o, "\xef\xbf\xbd", 3); /* U+FFFD */
        else if (n == 0)
            cube_json_print_add(o, escape, cube_json_escape_byte(*p, escape));
        n = n ? n : 1;
        p += n;
        left -= n;
    }
    cube_json_print_add(o, "\"", 1);
}

static void cube_json_print_line(struct cube_json_print *o, size_t depth)
{
    size_t indent_size = strlen(o->indent);

    cube_json_print_add(o, o->newline, strlen(o->newline));
    for (size_t i = 0; i < depth && indent_size > 0; i++)
        cube_json_print_add(o, o->indent, indent_size);
}

/* A value without elements. */
static void cube_json_print_leaf(struct cube_json_print *o,
                                 const struct json_value_s *value)
{
    /* in the order of enum json_type_e; the first two have a payload */
    static const char *const words[] = {"",     "",      "{}",  "[]",
                                        "true", "false", "null"};
    const struct json_number_s *number = value->payload;

    if (value->type == json_type_string)
        cube_json_print_string(o, value->payload);
    else if (value->type == json_type_number)
        cube_json_print_add(o, number->number, number->number_size);
    else
        cube_json_print_add(o, words[value->type], strlen(words[value->type]));
}

static int cube_json_print_tree(struct cube_json_print *o,
                                const struct json_value_s *value)
{
    struct cube_json_walk walk;
    enum cube_json_event event = cube_json_walk_start(&walk, value);

    for (; event != CUBE_JSON_DONE;
         event = cube_json_walk_next(&walk, event)) {
        bool is_object = walk.value && walk.value->type == json_type_object;
        size_t depth = walk.depth - (event == CUBE_JSON_OPEN);

        if (event == CUBE_JSON_UNFIT)
            return -1;
        if (event != CUBE_JSON_CLOSE && walk.is_later)
            cube_json_print_add(o, ",", 1);
        if (depth > 0 || event == CUBE_JSON_CLOSE)
            cube_json_print_line(o, depth);
        if (walk.name) {
            cube_json_print_string(o, walk.name);
            cube_json_print_add(o, o->colon, strlen(o->colon));
        }
        if (event == CUBE_JSON_OPEN)
            cube_json_print_add(o, is_object ? "{" : "[", 1);
        else if (event == CUBE_JSON_CLOSE)
            cube_json_print_add(o, is_object ? "}" : "]", 1);
        else
            cube_json_print_leaf(o, walk.value);
    }
    return 0;
}

static void *cube_json_print_all(struct cube_json_print style,
                                 const struct json_value_s *value,
                                 size_t *out_size)
{
    struct cube_json_print o = style;
    char *text;

    if (!value || cube_json_print_tree(&o, value))
        return NULL;
    text = CUBE_MALLOC(o.size + 1);
    if (!text)
        return NULL;
    text[o.size] = 0;
    if (out_size)
        *out_size = o.size + 1;
    o = style;
    o.at = text;
    (void)cube_json_print_tree(&o, value);
    return text;
}

CUBE_UNUSED static void *json_write_minified(const struct json_value_s *value,
                                             size_t *out_size)
{
    struct cube_json_print style = {NULL, 0, "", "", ":"};

    return cube_json_print_all(style, value, out_size);
}

CUBE_UNUSED static void *json_write_pretty(const struct json_value_s *value,
                                           const char *indent,
                                           const char *newline,
                                           size_t *out_size)
{
    struct cube_json_print style = {NULL, 0, indent ? indent : "  ",
                                    newline ? newline : "\n", " : "};

    return cube_json_print_all(style, value, out_size);
}

#endif /* CUBE_JSON_H, SHEREDOM_JSON_H_INCLUDED */

/* ---- Reading: short ways to what a tree holds ----
 *
 * Built on upstream's interface alone. All take NULL for a value that is not
 * there, so that calls can be nested. */

static void *cube_json_alloc(void *unused, size_t size)
{
    (void)unused;
    return CUBE_MALLOC(size);
}

/*
 * Copies JSON, with U+FFFD in the place of what is no UTF-8 and of surrogates
 * without their other half. Go's decoder reads them so, and what it takes on
 * one side of the wire we should take on the other.
 */
static void cube_json_repair(const unsigned char *p, size_t left,
                             struct cube_buf *out)
{
    while (left > 0) {
        size_t n = *p == '\\' ? (left > 1 ? 2 : 1) : cube_json_utf8(p, left);
        const void *text = n ? (const void *)p : "\xef\xbf\xbd";
        size_t size = n ? n : 3;

        if (n == 2 && p[0] == '\\' && p[1] == 'u' && left >= 6) {
            int32_t point = cube_json_hex4(p + 2);
            int32_t low = left >= 12 && p[6] == '\\' && p[7] == 'u'
                              ? cube_json_hex4(p + 8)
                              : -1;

            if (point >= 0xd800 && point < 0xdc00 && low >= 0xdc00 &&
                low <= 0xdfff) {
                n = size = 12;
            } else if (point >= 0xd800 && point <= 0xdfff) {
                text = "\\ufffd";
                n = size = 6;
            }
        }
        cube_buf_add(out, text, size);
        n = n ? n : 1;
        p += n;
        left -= n;
    }
}

/* Parses with our allocator; free with cube_json_free. The error says where
 * and what, in words. */
CUBE_UNUSED static struct json_value_s *
cube_json_parse(const void *src, size_t size, struct cube_err *err)
{
    static const char *const words[] = {
        "no JSON",
        "expected a comma or a closing bracket",
        "expected a colon",
        "expected a quote",
        "invalid escape in a string",
        "invalid number",
        "invalid value",
        "it ends too early",
        "invalid string",
        "out of memory",
        "more text behind the value",
        "nested too deep",
        "cannot be parsed",
    };
    struct cube_buf repaired = {0};
    struct json_parse_result_s result;
    struct json_value_s *root =
        json_parse_ex(src, size, json_parse_flags_default, cube_json_alloc,
                      NULL, &result);

    if (result.error == json_parse_error_invalid_string ||
        result.error == json_parse_error_invalid_string_escape_sequence) {
        cube_json_repair(src, size, &repaired);
        root = json_parse_ex(repaired.data, repaired.len,
                             json_parse_flags_default, cube_json_alloc, NULL,
                             NULL);
        cube_buf_free(&repaired);
    }
    if (root)
        return root;
    (void)cube_fail(err, CUBE_EINVAL, "JSON, line %zu, byte %zu: %s",
                    result.error_line_no, result.error_offset,
                    words[result.error < CUBE_COUNT(words) ? result.error
                                                           : 0]);
    return NULL;
}

/* Frees a root that cube_json_parse returned. */
CUBE_UNUSED static void cube_json_free(struct json_value_s *root)
{
    CUBE_FREE(root);
}

/* The first member of an object, or NULL. */
CUBE_UNUSED static struct json_object_element_s *
cube_json_members(struct json_value_s *value)
{
    struct json_object_s *object = value ? json_value_as_object(value) : NULL;

    return object ? object->start : NULL;
}

/* The first item of an array, or NULL. */
CUBE_UNUSED static struct json_array_element_s *
cube_json_items(struct json_value_s *value)
{
    struct json_array_s *array = value ? json_value_as_array(value) : NULL;

    return array ? array->start : NULL;
}

/* The value of a key, the last one when there are several; NULL: none. */
CUBE_UNUSED static struct json_value_s *
cube_json_get(struct json_value_s *value, const char *key)
{
    struct json_value_s *found = NULL;

    for (struct json_object_element_s *m = cube_json_members(value); m;
         m = m->next) {
        if (cube_text_is(m->name->string, m->name->string_size, key))
            found = m->value;
    }
    return found;
}

/* The same without regard to the case of ASCII letters, and without nulls:
 * on the wire, a null leaves what an earlier key said. */
CUBE_UNUSED static struct json_value_s *
cube_json_get_nocase(struct json_value_s *value, const char *key)
{
    struct json_value_s *found = NULL;

    for (struct json_object_element_s *m = cube_json_members(value); m;
         m = m->next) {
        if (cube_text_is_nocase(m->name->string, m->name->string_size, key) &&
            !json_value_is_null(m->value))
            found = m->value;
    }
    return found;
}

/* The bytes of a string, which a NUL follows, or NULL; `len` may be NULL. */
CUBE_UNUSED static const char *cube_json_str(struct json_value_s *value,
                                             size_t *len)
{
    struct json_string_s *string = value ? json_value_as_string(value) : NULL;

    if (len)
        *len = string ? string->string_size : 0;
    return string ? string->string : NULL;
}

/* An integer written as one: digits, no fraction, no exponent; -1 for
 * everything else, and for what does not fit. */
CUBE_UNUSED static int cube_json_i64(struct json_value_s *value, int64_t *out)
{
    struct json_number_s *number = value ? json_value_as_number(value) : NULL;
    uint64_t max = INT64_MAX, magnitude;
    bool is_negative;

    if (!number || number->number_size == 0)
        return -1;
    is_negative = number->number[0] == '-';
    if (cube_text_u64(number->number + is_negative,
                      number->number_size - is_negative, max + is_negative,
                      &magnitude))
        return -1;
    *out = is_negative && magnitude > 0 ? -(int64_t)(magnitude - 1) - 1
                                        : (int64_t)magnitude;
    return 0;
}

#define CUBE_JSON_NUMBER_MAX 1000 /* characters of a number's text */

/*
 * The double nearest to a number's text. strtod reads the decimal point of
 * the program's locale, so it is given the digits without a point, and an
 * exponent that makes up for it: 1.25e3 is 125e1.
 */
static int cube_json_text_f64(const char *p, size_t size, double *out)
{
    char text[CUBE_JSON_NUMBER_MAX + 24];
    size_t len = 0, i = 0;
    long exponent = 0, fraction = 0, sign = 1;

    if (size == 0 || size > CUBE_JSON_NUMBER_MAX)
        return -1;
    for (; i < size && p[i] != 'e' && p[i] != 'E'; i++) {
        if (p[i] == '.')
            fraction = (long)(size - i - 1);
        else
            text[len++] = p[i];
    }
    if (fraction > 0)
        fraction -= (long)(size - i);
    if (i < size && i + 1 < size && (p[i + 1] == '-' || p[i + 1] == '+'))
        sign = p[++i] == '-' ? -1 : 1;
    for (i++; i < size && exponent < 100000; i++)
        exponent = exponent * 10 + (p[i] - '0');
    (void)snprintf(text + len, sizeof text - len, "e%ld",
                   sign * exponent - fraction);
    *out = strtod(text, NULL);
    return *out - *out == 0 ? 0 : -1; /* neither infinite nor NaN */
}

/* A number that fits a double; -1 otherwise. */
CUBE_UNUSED static int cube_json_f64(struct json_value_s *value, double *out)
{
    struct json_number_s *number = value ? json_value_as_number(value) : NULL;

    return number ? cube_json_text_f64(number->number, number->number_size,
                                       out)
                  : -1;
}

CUBE_UNUSED static int cube_json_bool(struct json_value_s *value, bool *out)
{
    if (!value || (value->type != json_type_true &&
                   value->type != json_type_false))
        return -1;
    *out = value->type == json_type_true;
    return 0;
}

/* ---- Writing: texts and numbers into a buffer ----
 *
 * What has a fixed shape is written directly, without a tree: the shape as
 * constant text, and between it these. */

/* Must the byte at `p` be written in another way than as itself? */
static bool cube_json_is_special(unsigned char c)
{
    return c < 0x20 || c >= 0x80 || c == '"' || c == '\\' || c == '<' ||
           c == '>' || c == '&';
}

/* How many bytes at `p` are not special? */
static size_t cube_json_harmless(const unsigned char *p, size_t left)
{
    size_t n = 0;

    for (; left - n >= 8; n += 8) {
        uint64_t w = cube_json_load(p + n);
        /* '<' is 0x3c and '>' 0x3e: they differ in one bit */
        uint64_t marks = cube_json_marks(w) | cube_json_has(w, '&') |
                         cube_json_has(w & ~(cube_json_ones * 2), '<');

        if (marks)
            return n + cube_json_first(marks);
    }
    while (n < left && !cube_json_is_special(p[n]))
        n++;
    return n;
}

/* Writes what stands for the special character at `p` and returns how many
 * bytes of it are done. */
static size_t cube_json_put_special(struct cube_buf *b, const unsigned char *p,
                                    size_t left)
{
    static const char bytes[] = "\"\\\n\r\t", letters[] = "\"\\nrt";
    const char *at = *p ? strchr(bytes, *p) : NULL;
    size_t n = cube_json_utf8(p, left);

    if (n == 0) {
        cube_buf_puts(b, "\\ufffd");
        return 1;
    }
    if (at) {
        cube_buf_addc(b, '\\');
        cube_buf_addc(b, letters[at - bytes]);
    } else if (n == 1) {
        cube_buf_printf(b, "\\u%04x", *p);
    } else if (n == 3 && p[0] == 0xe2 && p[1] == 0x80 &&
               (p[2] == 0xa8 || p[2] == 0xa9)) {
        cube_buf_printf(b, "\\u202%x", p[2] & 15);
    } else {
        cube_buf_add(b, p, n);
    }
    return n;
}

/*
 * A string as the wire has it: besides what JSON asks for, `&`, `<`, `>` and
 * the line separators U+2028 and U+2029 are escaped, so that the text can
 * stand inside HTML and JavaScript; bytes that are not UTF-8 become U+FFFD.
 */
CUBE_UNUSED static void cube_json_put_str(struct cube_buf *b, const char *s,
                                          size_t len)
{
    const unsigned char *p = (const unsigned char *)s;

    cube_buf_reserve(b, len + 3);
    b->data[b->len++] = '"';
    for (;;) {
        size_t n = cube_json_harmless(p, len);

        cube_buf_reserve(b, len + 2);
        if (n > 0)
            memcpy(b->data + b->len, p, n);
        b->len += n;
        if (n == len)
            break;
        n += cube_json_put_special(b, p + n, len - n);
        p += n;
        len -= n;
    }
    b->data[b->len++] = '"';
    b->data[b->len] = 0;
}

/* The same of a C string; NULL is written as "". */
CUBE_UNUSED static void cube_json_put_text(struct cube_buf *b, const char *s)
{
    cube_json_put_str(b, s ? s : "", s ? strlen(s) : 0);
}

CUBE_UNUSED static void cube_json_put_i64(struct cube_buf *b, int64_t v)
{
    char text[20];
    size_t at = sizeof text;
    uint64_t rest = v < 0 ? 0 - (uint64_t)v : (uint64_t)v;

    do
        text[--at] = (char)('0' + rest % 10);
    while ((rest /= 10) > 0);
    if (v < 0)
        text[--at] = '-';
    cube_buf_add(b, text + at, sizeof text - at);
}

/* The fewest digits that read back as `v` (which is above 0), and where the
 * decimal point is: 0.d1d2d3... * 10^point. */
static size_t cube_json_digits(double v, char digits[20], int *point)
{
    char text[40];
    double back;

    for (int precision = 0;; precision++) {
        size_t len = 0, i = 0;

        (void)snprintf(text, sizeof text, "%.*e", precision, v);
        for (; text[i] != 'e'; i++) {
            if (text[i] >= '0' && text[i] <= '9') /* not the locale's point */
                digits[len++] = text[i];
        }
        *point = atoi(text + i + 1) + 1;
        digits[len] = 0;
        (void)snprintf(text, sizeof text, "%se%d", digits,
                       *point - (int)len);
        if (precision == 16 ||
            (cube_json_text_f64(text, strlen(text), &back) == 0 && back == v))
            return len;
    }
}

/* Three decimals, without the zeros at their end: most numbers of cores and
 * loads. Of up to 15 digits, no two texts read as the same double, so this
 * one is the shortest if it reads back. */
static void cube_json_put_thousandths(struct cube_buf *b, int64_t v)
{
    char text[4] = {'.', (char)('0' + v / 100 % 10), (char)('0' + v / 10 % 10),
                    (char)('0' + v % 10)};
    size_t len = sizeof text;

    cube_json_put_i64(b, v / 1000);
    while (text[len - 1] == '0')
        len--;
    cube_buf_add(b, text, len);
}

/*
 * A number as the wire has it: the shortest text that reads back, with an
 * exponent only below 1e-6 and from 1e21 on: 0.000001, 1e-7, 1e+21. JSON has
 * no infinities and no NaN; they are written as null.
 */
CUBE_UNUSED static void cube_json_put_f64(struct cube_buf *b, double v)
{
    char digits[20];
    double size = v < 0 ? -v : v;
    int point, len;

    if (v - v != 0) {
        cube_buf_puts(b, "null");
        return;
    }
    if (size < 1e15 && v == (double)(int64_t)v && (v != 0 || 1 / v > 0)) {
        cube_json_put_i64(b, (int64_t)v);
        return;
    }
    if (v < 0 || (v == 0 && 1 / v < 0))
        cube_buf_addc(b, '-');
    if (v == 0) {
        cube_buf_addc(b, '0');
        return;
    }
    if (size < 1e9 && size >= 1e-3 &&
        (double)(int64_t)(size * 1e3) / 1e3 == size) {
        cube_json_put_thousandths(b, (int64_t)(size * 1e3));
        return;
    }
    len = (int)cube_json_digits(size, digits, &point);
    if (size < 1e-6 || size >= 1e21) {
        cube_buf_printf(b, "%c%s%se%+d", digits[0], len > 1 ? "." : "",
                        digits + 1, point - 1);
    } else if (point <= 0) {
        cube_buf_printf(b, "0.%.*s%s", -point, "000000", digits);
    } else if (point >= len) {
        cube_buf_printf(b, "%s%.*s", digits, point - len,
                        "000000000000000000000");
    } else {
        cube_buf_printf(b, "%.*s.%s", point, digits, digits + point);
    }
}




/* ==== Chapter 4. Store ==== uses: 1 2 ==== */
/*
 * A store keeps what was promised. Its problem: a write that the system has
 * taken is in memory, a sync costs about as much as 64 kB of writing, and a
 * crash leaves any part of what was written since the last sync, in any order
 * and torn at 512 bytes.
 *
 * The simplest thing that works is a log: each commit appends its changes and
 * syncs. Nothing that was promised is ever written over, so no crash can harm
 * it, and what is torn can only be at the end. A log alone would have to be
 * read whole at each start, and kept whole in memory. So at times the changes
 * are merged into trees, whose pages are appended to the same file; opening
 * needs the last trees and the little of the log that came after.
 *
 *   records, each with the checksum of the one before:
 *
 *   +------+---+---+---+---+-----+---+-----+---+---+---+- - - - -
 *   | head | R | B | B | B |  P  | B |  P  | R | B | B | 0 0 0 0
 *   +------+---+---+---+---+-----+---+-----+---+---+---+- - - - -
 *            |   1   2   3    |    4    |    |   5   6
 *         no trees            |         |  trees with 1 to 3; replay from
 *                   pages, 1 to 3 merged in  4 on over them
 *
 *   B  a batch: the changes of one commit     P  pages of trees
 *   R  roots: where each named tree begins    0  zeros, laid out ahead
 *
 * A tree is never changed but copied: a changed leaf is written anew, and so
 * are its parents, up to the root; all else is shared with the tree before.
 *
 *   before:     [a m]              after, m=2:     [a m]   ->  [a m]'
 *              /     \                            /     \    /      \
 *        [a b c]    [m=1 n]                 [a b c]<-----\--+    [m=2 n]
 *                                                    [m=1 n]
 *
 * So the old tree stays whole for whoever reads it (a snapshot costs nothing)
 * and for whoever opens the file when the new one is torn.
 *
 * One fdatasync a commit is enough, where a tree that is changed in place
 * needs two (the journal first, then the pages; or the pages first, then the
 * root): a batch needs no second place to be true. Either its checksums hold,
 * and those of each record before it back to trees that were synced earlier;
 * or it is not there, and nobody was told that it was. A record says which
 * part of the file was on disk when it was written. Damage before that point
 * is damage, and told with its offset; a broken record behind it is a commit
 * that was torn, and cut off.
 *
 * What was refused: pages written at each commit (the ancestor of LMDB wrote
 * 21 kB for one put); a fixed page size (half of a tree would be air: here a
 * page is as long as what is in it); values moved with their leaves (500
 * bytes stay where the batch put them, a leaf only refers to them, until a
 * compaction brings them into order beside their keys); levels of files, as
 * LevelDB has (a read asks each of them).
 *
 * What is paid: the file grows with each change. When half of it is garbage a
 * compaction copies what lives to a new file: at a steady load each byte is
 * written about three times in its life, in slices, beside the commits.
 *
 * What always holds:
 *   - a record, once synced, never changes; files are replaced by rename;
 *   - a reference leads to a smaller offset than its own, and says length and
 *     checksum of what is there: no read is believed unchecked, no chain of
 *     references is endless;
 *   - trees are used only when they are on disk; until then their changes
 *     are in the overlay too. So after a sync that failed all that is
 *     believed was synced before or is in memory, and can be written to a new
 *     file. It must be: the system marks pages clean that it failed to write,
 *     so that a second sync succeeds, and reads find what the disk never got;
 *   - a commit is seen by readers when it is on disk, not before.
 *
 * The life of a change: cube_store_put puts it into the overlay, under the
 * number of a commit to come, and into the open batch; cube_store_commit_begin
 * appends the batch (the caller syncs); cube_store_commit_end makes its number
 * the one that readers see. When the overlay is full it is frozen, and
 * cube_store_slice merges it into the trees, and later copies them.
 *
 * Naive on purpose: one writer, one thread, at most 32 trees, neighbours joined
 * only when rewritten, an overlay that walks backwards by searching. For
 * queries, several writing processes or values of gigabytes take SQLite; to
 * share reads between processes take LMDB.
 */

/* ---- Sizes ---- */

#define CUBE_STORE_HEAD 64     /* bytes of the file's and a record's header */
#define CUBE_STORE_ALIGN 16    /* records start at multiples of this */
#define CUBE_STORE_PAGE 4096   /* bytes that a page is filled to */
#define CUBE_STORE_PAGE_MAX 16384 /* bytes that no page ever has */
#define CUBE_STORE_PAGE_HEAD 4
#define CUBE_STORE_INLINE 1024 /* larger values never stand in a leaf */
#define CUBE_STORE_SMALL 64    /* smaller ones always do */
#define CUBE_STORE_DEPTH 32    /* levels of a tree */
#define CUBE_STORE_GROUP 65536 /* bytes of pages that one record gathers */
#define CUBE_STORE_EXTENT_MIN (64u << 10) /* zeros laid out ahead at once */
#define CUBE_STORE_EXTENT_MAX (1u << 20)
#define CUBE_STORE_SLACK (4u << 20)        /* garbage that bothers nobody */
#define CUBE_STORE_SLACK_MEMORY (256u << 10)
#define CUBE_STORE_CACHE (8u << 20)        /* default of cache_bytes */
#define CUBE_STORE_CACHE_MIN (256u << 10)
#define CUBE_STORE_MEM_MAX (4u << 20)      /* of an overlay, at most */
#define CUBE_STORE_TAIL_SMALL 65536        /* to replay at opening: fine */
#define CUBE_STORE_DEBT (1u << 20)         /* background work put off */
#define CUBE_STORE_RETRY_MS 1000           /* after a failed compaction */
#define CUBE_STORE_LIMIT (6u << 20)        /* garbage that stops commits */
#ifndef CUBE_STORE_POLYNOMIAL /* a fuzzer's: 0, and all checksums are right */
#define CUBE_STORE_POLYNOMIAL 0x82f63b78u
#endif
#define CUBE_STORE_RECORD_MAX (CUBE_STORE_COMMIT_MAX + (64u << 20))

_Static_assert(CUBE_STORE_PAGE * 2 + CUBE_STORE_KEY_MAX + CUBE_STORE_INLINE +
               64 <= CUBE_STORE_PAGE_MAX, "an overfull page must be legal");
_Static_assert(CUBE_STORE_PAGE_MAX < 65536, "offsets in a page have 16 bits");

/* ---- Bytes ---- */

/* Integers stand in the file byte by byte, the lowest first, whatever the
 * machine does; compilers make one load of it. */
static uint32_t cube_store_get16(const uint8_t *p)
{
    return (uint32_t)p[0] | (uint32_t)p[1] << 8;
}

static uint32_t cube_store_get32(const uint8_t *p)
{
    return cube_store_get16(p) | cube_store_get16(p + 2) << 16;
}

static uint64_t cube_store_get64(const uint8_t *p)
{
    return cube_store_get32(p) | (uint64_t)cube_store_get32(p + 4) << 32;
}

static void cube_store_put16(uint8_t *p, uint32_t v)
{
    p[0] = (uint8_t)v;
    p[1] = (uint8_t)(v >> 8);
}

static void cube_store_put32(uint8_t *p, uint32_t v)
{
    cube_store_put16(p, v & 0xffff);
    cube_store_put16(p + 2, v >> 16);
}

static void cube_store_put64(uint8_t *p, uint64_t v)
{
    cube_store_put32(p, (uint32_t)v);
    cube_store_put32(p + 4, (uint32_t)(v >> 32));
}

/* Little numbers take one byte: 7 bits a byte, the lowest first, the top bit
 * set on all but the last (LEB128). 300 = 0x12c is ac 02. A number takes 1 to
 * 5 bytes:
 *
 *     below 128  1      below 2^14  2      below 2^21  3      else 4 or 5
 *
 * p has room for 5; the count that was used is returned. */
static size_t cube_store_put_var(uint8_t *p, uint32_t v)
{
    size_t n = 0;

    while (v >= 0x80) {
        p[n++] = (uint8_t)(v | 0x80);
        v >>= 7;
    }
    p[n++] = (uint8_t)v;
    return n;
}

static void cube_store_add_var(struct cube_buf *b, uint32_t v)
{
    uint8_t p[5];

    cube_buf_add(b, p, cube_store_put_var(p, v));
}

/* Reads a number that is known to be whole; moves *p behind it. Only for pages
 * that cube_store_page_ok has seen, and for what this chapter built itself. */
static uint32_t cube_store_get_var(const uint8_t **p)
{
    uint32_t v = **p & 0x7f;

    for (int shift = 7; *(*p)++ & 0x80; shift += 7)
        v |= (uint32_t)(**p & 0x7f) << shift;
    return v;
}

/* The same from bytes that nobody has checked; false if it runs past end or
 * does not fit. */
static bool cube_store_read_var(const uint8_t **p, const uint8_t *end,
                                uint32_t *out)
{
    uint64_t v = 0;

    for (int shift = 0; *p < end && shift < 35; shift += 7) {
        uint8_t byte = *(*p)++;

        v |= (uint64_t)(byte & 0x7f) << shift;
        if (!(byte & 0x80)) {
            *out = (uint32_t)v;
            return v <= UINT32_MAX;
        }
    }
    return false;
}

/* The next place where a record may start. */
static uint64_t cube_store_align(uint64_t at)
{
    return (at + CUBE_STORE_ALIGN - 1) & ~(uint64_t)(CUBE_STORE_ALIGN - 1);
}

/* The order of keys: as memcmp has it, a prefix first. Never an equality of
 * different bytes: what is equal is one key. There is no collation; who wants
 * numbers in order writes them with the highest byte first. */
static int cube_store_order(const uint8_t *a, size_t a_len, const uint8_t *b,
                            size_t b_len)
{
    int r = memcmp(a, b, a_len < b_len ? a_len : b_len);

    return r ? r : (a_len > b_len) - (a_len < b_len);
}

/* CRC-32C (Castagnoli 1993), eight bytes a step (Kounavis and Berry 2005). The
 * tables are a store's own, since nothing here outlives its owner. A checksum
 * of two pieces is that of the second, begun with that of the first:
 * crc(crc(0, a), b) = crc(0, ab). "123456789" gives e3069283. */
struct cube_store_crc {
    uint32_t t[8][256];
};

/* t[0][b] is what the byte b does to a checksum; t[k][b] what it does when k
 * zero bytes follow, so that eight lookups take eight bytes at once. The
 * polynomial is 0x1edc6f41, here with its bits reversed. */
static void cube_store_crc_init(struct cube_store_crc *crc)
{
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t v = i;

        for (int bit = 0; bit < 8; bit++)
            v = v >> 1 ^ (v & 1 ? CUBE_STORE_POLYNOMIAL : 0);
        crc->t[0][i] = v;
    }
    for (int k = 1; k < 8; k++) {
        for (int i = 0; i < 256; i++) {
            uint32_t v = crc->t[k - 1][i];

            crc->t[k][i] = v >> 8 ^ crc->t[0][v & 0xff];
        }
    }
}

/* Continues a checksum; start with 0. */
static uint32_t cube_store_crc(const struct cube_store_crc *crc,
                               uint32_t seed, const void *data, size_t len)
{
    const uint8_t *p = data;
    uint32_t v = ~seed;

    for (; len >= 8; len -= 8, p += 8) {
        uint32_t a = cube_store_get32(p) ^ v, b = cube_store_get32(p + 4);

        v = crc->t[7][a & 0xff] ^ crc->t[6][a >> 8 & 0xff] ^
            crc->t[5][a >> 16 & 0xff] ^ crc->t[4][a >> 24] ^
            crc->t[3][b & 0xff] ^ crc->t[2][b >> 8 & 0xff] ^
            crc->t[1][b >> 16 & 0xff] ^ crc->t[0][b >> 24];
    }
    while (len-- > 0)
        v = v >> 8 ^ crc->t[0][(v ^ *p++) & 0xff];
    return ~v;
}

/* ---- The file ----
 *
 * One file, or its twin in memory: bytes that are read anywhere and written
 * at the end. An object with a count of holders, since a snapshot keeps the
 * file of its time after a compaction has put another in its place. */
struct cube_store_file {
    int refs;
    const struct cube_world *world;
    const struct cube_store_crc *crc;
    char *path;            /* for words */
    int fd;                /* -1: in memory */
    struct cube_buf bytes; /* in memory */
    uint32_t number;       /* tells files apart in the cache */
    uint8_t id[16];
    uint64_t size;     /* bytes from end to here are zeros on disk */
    uint64_t end;      /* where the next record goes */
    uint32_t last_crc; /* the checksum of the last record's header */
    uint64_t base;     /* offset of the newest root that is on disk, or 0 */
    uint64_t synced;   /* all before this is on disk */
};

/* Where a page or a value stands, and what it must be. len 0: nowhere. It
 * vouches for what it leads to, so a tree needs no checksums inside of its
 * pages. */
struct cube_store_ref {
    uint64_t at;
    uint32_t len, crc;
};

/* One holder less; the last one closes it. NULL is allowed. */
static void cube_store_file_drop(struct cube_store_file *f)
{
    if (!f || --f->refs > 0)
        return;
    if (f->fd >= 0)
        f->world->close(f->world->ctx, f->fd);
    cube_buf_free(&f->bytes);
    cube_free(f->path);
    cube_free(f);
}

/* The words of every complaint about damage: which file, where, what. Always
 * -1, so that a caller can return it. Nothing is repaired and nothing
 * forgotten here: what was read before stays valid. */
static int cube_store_corrupt(const struct cube_store_file *f, uint64_t at,
                              const char *what, struct cube_err *err)
{
    return cube_fail(err, CUBE_ECORRUPT, "%s: offset %llu: %s", f->path,
                     (unsigned long long)at, what);
}

/* How many of these bytes the file has; a negative errno value. Fewer than
 * asked for means that the file ends there. An interrupted call is repeated, a
 * short one continued; in memory the bytes are copied too, so that both kinds
 * have one way of ownership. */
static int64_t cube_store_pread(const struct cube_store_file *f, uint64_t at,
                                void *data, size_t len)
{
    uint8_t *p = data;
    size_t got = 0;

    if (f->fd < 0) {
        if (at >= f->bytes.len)
            return 0;
        if (len > f->bytes.len - at)
            len = (size_t)(f->bytes.len - at);
        memcpy(p, f->bytes.data + at, len);
        return (int64_t)len;
    }
    while (got < len) {
        int64_t n = f->world->pread(f->world->ctx, f->fd, p + got, len - got,
                                    (int64_t)(at + got));

        if (n == -EINTR)
            continue;
        if (n < 0)
            return n;
        if (n == 0)
            break;
        got += (size_t)n;
    }
    return (int64_t)got;
}

/* Reads all of it, or fails. After a failure data is undefined. A file that is
 * too short is damage, with the offset of the first byte that is missing,
 * since nobody asks for bytes to which no reference leads. */
static int cube_store_read(const struct cube_store_file *f, uint64_t at,
                           void *data, size_t len, struct cube_err *err)
{
    int64_t n = cube_store_pread(f, at, data, len);

    if (n < 0)
        return cube_fail(err, cube_errno_code(n), "read %s at %llu: %s",
                         f->path, (unsigned long long)at, cube_errno_text(n));
    if ((size_t)n < len)
        return cube_store_corrupt(f, at + (uint64_t)n,
                                  "the file ends too early", err);
    return 0;
}

/* Writes all of it; a negative errno value when it cannot. A failure may leave
 * any part of it written; the file's end does not move, so the next write goes
 * over it. In memory a write also cuts off what was behind it. */
static int cube_store_write(struct cube_store_file *f, uint64_t at,
                            const void *data, size_t len)
{
    const uint8_t *p = data;

    if (f->fd < 0) {
        CUBE_ASSERT(at <= f->bytes.len);
        f->bytes.len = (size_t)at;
        cube_buf_add(&f->bytes, data, len);
        return 0;
    }
    while (len > 0) {
        int64_t n = f->world->pwrite(f->world->ctx, f->fd, p, len,
                                     (int64_t)at);

        if (n == -EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? (int)n : -EIO;
        p += n;
        at += (uint64_t)n;
        len -= (size_t)n;
    }
    return 0;
}

/* Zeros from .. to-1, in pieces that end where the system's pages end. A
 * failure leaves some of them written, which harms nobody: what is behind the
 * end is not believed anyway. */
static int cube_store_write_zeros(struct cube_store_file *f, uint64_t from,
                                  uint64_t to)
{
    static const uint8_t zeros[4096];
    int r = 0;

    while (from < to && r == 0) {
        size_t len = sizeof zeros - from % sizeof zeros;

        if (len > to - from)
            len = (size_t)(to - from);
        r = cube_store_write(f, from, zeros, len);
        from += len;
    }
    return r;
}

/* Lays out zeros ahead, an eighth of the file within bounds, so that syncing
 * the next records has no new size and no new blocks to record, which costs as
 * much again as the data. Where it cannot, the record itself may still fit. A
 * record larger than an extent is written without: its sync costs more than
 * the new size does. It never fails: the room is a favour to later syncs, not
 * a promise.
 *
 *      end                size           to, a multiple of 4096
 *       |  need  |         |              |
 *     --+--------+---------+--------------+
 *       |  record  0 0 0 0 | new zeros    |
 */
static void cube_store_make_room(struct cube_store_file *f, uint64_t need)
{
    uint64_t extent = f->end / 8, to;

    if (f->fd < 0 || f->end + need <= f->size)
        return;
    if (extent < CUBE_STORE_EXTENT_MIN)
        extent = CUBE_STORE_EXTENT_MIN;
    if (extent > CUBE_STORE_EXTENT_MAX)
        extent = CUBE_STORE_EXTENT_MAX;
    if (need >= extent)
        return;
    to = (f->end + need + extent) & ~(uint64_t)4095;
    if (cube_store_write_zeros(f, f->size, to) == 0)
        f->size = to;
}

/* fdatasync, for background work; a commit leaves it to the caller. It blocks
 * for as long as the disk takes. A failure is final for this file: the system
 * may have marked the pages clean that it lost, so the caller must not try
 * again but write a new file. */
static int cube_store_sync(struct cube_store_file *f, struct cube_err *err)
{
    int r = f->fd < 0 ? 0 : f->world->sync(f->world->ctx, f->fd);

    if (r < 0)
        return cube_fail(err, CUBE_ESYNC, "sync %s: %s", f->path,
                         cube_errno_text(r));
    return 0;
}

/* The file's header, written once.
 *
 *     offset size
 *          0   16  "cube store 1\n" and zeros; the 1 is the format's version
 *         16   16  the file's ID, random: seeds every record's checksum, so
 *                  that no record of another file, and no value that a user
 *                  makes up, passes for a record of this one
 *         32   28  zeros
 *         60    4  CRC-32C of the 60 bytes before
 */
#define CUBE_STORE_MAGIC "cube store 1\n\0\0"

/* The 64 bytes of the file's header. */
static void cube_store_file_head(const struct cube_store_file *f,
                                 uint8_t out[CUBE_STORE_HEAD])
{
    memset(out, 0, CUBE_STORE_HEAD);
    memcpy(out, CUBE_STORE_MAGIC, 16);
    memcpy(out + 16, f->id, 16);
    cube_store_put32(out + 60, cube_store_crc(f->crc, 0, out, 60));
}

/* Checks them, and takes the ID over. A file that is too short to hold them is
 * none of ours: ours get their name only when they are whole. f->id and
 * nothing else is changed; every record's checksum depends on it. */
static int cube_store_file_read_head(struct cube_store_file *f,
                                     struct cube_err *err)
{
    uint8_t p[CUBE_STORE_HEAD];
    int64_t n = cube_store_pread(f, 0, p, sizeof p);

    if (n < 0)
        return cube_fail(err, cube_errno_code(n), "read %s: %s", f->path,
                         cube_errno_text(n));
    if (n < CUBE_STORE_HEAD || memcmp(p, CUBE_STORE_MAGIC, 16) != 0)
        return cube_store_corrupt(f, 0, "this is no cube store of a version "
                                  "that this program knows", err);
    if (cube_store_get32(p + 60) != cube_store_crc(f->crc, 0, p, 60))
        return cube_store_corrupt(f, 0, "the file's header is damaged", err);
    memcpy(f->id, p + 16, 16);
    return 0;
}

/* ---- Records ----
 *
 * After its header the file is a chain of records without a gap, each from a
 * multiple of 16 on. A record's header:
 *
 *     offset size
 *          0    3  "cur"
 *          3    1  kind: 'B' a batch of changes (one commit), 'P' pages,
 *                  'R' roots: the end of a checkpoint
 *          4    4  bytes of the body, which follows the header
 *          8    8  the record's own offset in the file
 *         16    8  base: offset of the newest 'R' that was on disk when this
 *                  was written; opening starts there
 *         24    8  synced: all before this offset was on disk by then, so
 *                  damage there is damage and not a torn commit
 *         32    8  number of the commit that this record is, or that its
 *                  roots are the state after
 *         40    4  the checksum of the previous record's header (offset 60
 *                  there; the file's header for the first)
 *         44    4  CRC-32C of the body
 *         48   12  zeros
 *         60    4  CRC-32C of the file's ID and the 60 bytes before
 *
 * The body is padded with zeros to a multiple of 16.
 * A record is believed when four things agree: the letters, the place it says
 * it has, its own checksum, and (when the chain is followed) the checksum of
 * the one before. The place stops a copy of a record elsewhere, say inside a
 * value, from passing for one. */
struct cube_store_rec {
    uint8_t kind;
    uint32_t len;
    uint64_t at, base, synced, commit;
    uint32_t prev, body_crc, crc;
};

/* The checksum at offset 60, also what the next record repeats. */
static uint32_t cube_store_rec_crc(const struct cube_store_file *f,
                                   const uint8_t *head)
{
    uint32_t seed = cube_store_crc(f->crc, 0, f->id, 16);

    return cube_store_crc(f->crc, seed, head, 60);
}

/* Where the record after this one starts. */
static uint64_t cube_store_rec_end(const struct cube_store_rec *r)
{
    return cube_store_align(r->at + CUBE_STORE_HEAD + r->len);
}

/* Writes the header, and leaves its checksum in r. p has room for 64 bytes.
 * The body's checksum is in r already; it is covered by the header's, so that
 * one number vouches for both. */
static void cube_store_rec_encode(const struct cube_store_file *f,
                                  struct cube_store_rec *r, uint8_t *p)
{
    memset(p, 0, CUBE_STORE_HEAD);
    memcpy(p, "cur", 3);
    p[3] = r->kind;
    cube_store_put32(p + 4, r->len);
    cube_store_put64(p + 8, r->at);
    cube_store_put64(p + 16, r->base);
    cube_store_put64(p + 24, r->synced);
    cube_store_put64(p + 32, r->commit);
    cube_store_put32(p + 40, r->prev);
    cube_store_put32(p + 44, r->body_crc);
    r->crc = cube_store_rec_crc(f, p);
    cube_store_put32(p + 60, r->crc);
}

/* Are these 64 bytes, which stand at this offset, a record's header? Its body
 * is not looked at. r is changed even where the answer is no. */
static bool cube_store_rec_decode(const struct cube_store_file *f,
                                  uint64_t at, const uint8_t *p,
                                  struct cube_store_rec *r)
{
    if (memcmp(p, "cur", 3) != 0 || cube_store_get64(p + 8) != at)
        return false;
    r->kind = p[3];
    r->len = cube_store_get32(p + 4);
    r->at = at;
    r->base = cube_store_get64(p + 16);
    r->synced = cube_store_get64(p + 24);
    r->commit = cube_store_get64(p + 32);
    r->prev = cube_store_get32(p + 40);
    r->body_crc = cube_store_get32(p + 44);
    r->crc = cube_store_get32(p + 60);
    return r->len <= CUBE_STORE_RECORD_MAX &&
           r->crc == cube_store_rec_crc(f, p);
}

/* A record under construction: a buffer that begins with room for the
 * header. */
static void cube_store_rec_begin(struct cube_buf *b)
{
    cube_buf_clear(b);
    cube_buf_reserve(b, CUBE_STORE_HEAD);
    memset(b->data, 0, CUBE_STORE_HEAD);
    b->len = CUBE_STORE_HEAD;
}

/* Writes a record at the end of the file, not yet synced. After a failure the
 * file ends where it did; what was written of it will be written over. On
 * success f->end, f->size and f->last_crc have moved; f->base and f->synced
 * have not, they only move after a sync. b keeps the record, and the caller
 * begins it anew. */
static int cube_store_rec_append(struct cube_store_file *f, uint8_t kind,
                                 struct cube_buf *b, uint64_t commit,
                                 struct cube_err *err)
{
    static const uint8_t zeros[CUBE_STORE_ALIGN];
    struct cube_store_rec r = {0};
    size_t body = b->len - CUBE_STORE_HEAD;
    int n;

    r.kind = kind;
    r.len = (uint32_t)body;
    r.at = f->end;
    r.base = f->base;
    r.synced = f->synced;
    r.commit = commit;
    r.prev = f->last_crc;
    r.body_crc = cube_store_crc(f->crc, 0, b->data + CUBE_STORE_HEAD, body);
    cube_store_rec_encode(f, &r, (uint8_t *)b->data);
    cube_buf_add(b, zeros, (size_t)(cube_store_rec_end(&r) - r.at) - b->len);
    cube_store_make_room(f, b->len);
    n = cube_store_write(f, f->end, b->data, b->len);
    if (n < 0)
        return cube_fail(err, cube_errno_code(n), "write %s at %llu: %s",
                         f->path, (unsigned long long)f->end,
                         cube_errno_text(n));
    f->end += b->len;
    if (f->size < f->end)
        f->size = f->end;
    f->last_crc = r.crc;
    return 0;
}

/* Reads the header of the record at this offset: 1, or 0 if there is none, or
 * -1. A header that is torn or is no header at all is not a failure: the end
 * of the log looks like that. */
static int cube_store_rec_head(const struct cube_store_file *f, uint64_t at,
                               struct cube_store_rec *r, struct cube_err *err)
{
    uint8_t p[CUBE_STORE_HEAD];
    int64_t n = cube_store_pread(f, at, p, sizeof p);

    if (n < 0)
        return cube_fail(err, cube_errno_code(n), "read %s at %llu: %s",
                         f->path, (unsigned long long)at, cube_errno_text(n));
    return n == CUBE_STORE_HEAD && cube_store_rec_decode(f, at, p, r);
}

/* Reads its body into out: 1, or 0 if it is not whole, or -1. The buffer is
 * the caller's; its old content is lost in each case. "Not whole" covers a
 * body that is cut short and one whose checksum does not match: which of them
 * is damage depends on where it stands, so the caller judges. */
static int cube_store_rec_body(const struct cube_store_file *f,
                               const struct cube_store_rec *r,
                               struct cube_buf *out, struct cube_err *err)
{
    int64_t n;

    cube_buf_clear(out);
    if (r->at + CUBE_STORE_HEAD + r->len > f->size)
        return 0;
    cube_buf_reserve(out, r->len);
    n = cube_store_pread(f, r->at + CUBE_STORE_HEAD, out->data, r->len);
    if (n < 0)
        return cube_fail(err, cube_errno_code(n), "read %s at %llu: %s",
                         f->path, (unsigned long long)r->at,
                         cube_errno_text(n));
    out->len = (size_t)n;
    return (uint64_t)n == r->len &&
           cube_store_crc(f->crc, 0, out->data, out->len) == r->body_crc;
}

/* ---- Pages ----
 *
 * A page is as long as what is in it: nothing is padded, and the reference
 * that leads to it (offset, length, checksum) stands in its parent, so that
 * one checked root vouches for the whole tree.
 *
 *     offset size
 *          0    1  level: 0 a leaf, else a branch with children of level-1
 *          1    1  zero
 *          2    2  n, the number of entries
 *          4   2n  where each entry starts, in the order of their keys
 *       4+2n       the entries, then the values that stand in the page
 *
 *     every entry:   length of the key (1 or 2 bytes, LEB128), the key, then
 *     in a branch:   offset 8, length 4, checksum 4 of the child; the key is
 *                    the first one in it
 *     in a leaf:     twice the value's length (LEB128), then 2 bytes: where in
 *                    the page it starts; or twice the length plus 1, then
 *                    offset 8 and checksum 4 of the value, which stands
 *                    somewhere before in the file
 *
 * A leaf that holds "a" = "1" and "bc" = "xyz":
 *
 *     00 00 02 00  08 00 0d 00  01 61 02 13 00  02 62 63 06 14 00  31 78 79 7a
 *     level 0, n=2 at 8 and 13  1 a  2*1 at 19  2 b  c  2*3 at 20  1  x  y  z
 *
 * Keys stand close together, apart from the values, since a search looks at
 * several keys and at one value: what it touches is a few lines of the
 * processor's cache.
 * Borrowed: all of it leads into a page that must stay pinned as long as the
 * item is looked at. */
struct cube_store_item {
    const uint8_t *key, *val; /* val: NULL unless it stands in the page */
    uint32_t key_len, val_len;
    struct cube_store_ref ref; /* of the child, or of the value */
};

/* How many entries the page has. */
static uint32_t cube_store_page_count(const uint8_t *page)
{
    return cube_store_get16(page + 2);
}

/* The key of entry i, in place. */
static const uint8_t *cube_store_page_key(const uint8_t *page, uint32_t i,
                                          uint32_t *len)
{
    const uint8_t *p = page + cube_store_get16(page + CUBE_STORE_PAGE_HEAD +
                                               2 * (size_t)i);

    *len = cube_store_get_var(&p);
    return p;
}

/* All of entry i; pointers lead into the page. The page has passed
 * cube_store_page_ok, so nothing is checked again. Which of val and ref is set
 * says where the value is: val in this page, else ref elsewhere in the file. */
static void cube_store_page_item(const uint8_t *page, uint32_t i,
                                 struct cube_store_item *out)
{
    const uint8_t *p;

    out->key = cube_store_page_key(page, i, &out->key_len);
    p = out->key + out->key_len;
    out->val = NULL;
    if (page[0] > 0) {
        out->ref.at = cube_store_get64(p);
        out->ref.len = cube_store_get32(p + 8);
        out->ref.crc = cube_store_get32(p + 12);
        return;
    }
    out->val_len = cube_store_get_var(&p);
    if (out->val_len & 1) {
        out->ref.at = cube_store_get64(p);
        out->ref.len = out->val_len >> 1;
        out->ref.crc = cube_store_get32(p + 8);
    } else {
        out->val = page + cube_store_get16(p);
    }
    out->val_len >>= 1;
}

/* The first entry whose key is not less than this one; all, if none. In a
 * page of a, d, f: 1 for d, 2 for e, 3 for g. */
static uint32_t cube_store_page_find(const uint8_t *page, const uint8_t *key,
                                     size_t key_len, bool *is_equal)
{
    uint32_t lo = 0, hi = cube_store_page_count(page);

    *is_equal = false;
    while (lo < hi) {
        uint32_t mid = (lo + hi) / 2, len;
        const uint8_t *k = cube_store_page_key(page, mid, &len);
        int r = cube_store_order(k, len, key, key_len);

        if (r < 0) {
            lo = mid + 1;
        } else {
            hi = mid;
            *is_equal = *is_equal || r == 0;
        }
    }
    return lo;
}

/* The child that a key belongs to: the last one that begins at or before it,
 * else the first. In a branch of a, d, f: 1 for d and for e, 2 for g. Keys
 * before the first one belong to the first child: a tree has no page left of
 * it, and a new smallest key goes there. */
static uint32_t cube_store_page_child(const uint8_t *page,
                                      const uint8_t *key, size_t key_len)
{
    bool is_equal;
    uint32_t i = cube_store_page_find(page, key, key_len, &is_equal);

    return is_equal || i == 0 ? i : i - 1;
}

/* Is this entry whole, within the page? It must end before the page does, and
 * so must a value that stands in the page. References are not followed:
 * whoever does so checks them (cube_store_load). */
static bool cube_store_page_entry_ok(const uint8_t *page, size_t len,
                                     uint32_t i)
{
    const uint8_t *end = page + len, *p;
    uint32_t at = cube_store_get16(page + CUBE_STORE_PAGE_HEAD +
                                   2 * (size_t)i);
    uint32_t key_len, val_len, rest = 16;

    if (at >= len)
        return false;
    p = page + at;
    if (!cube_store_read_var(&p, end, &key_len) || key_len == 0 ||
        key_len > CUBE_STORE_KEY_MAX || key_len > (size_t)(end - p))
        return false;
    p += key_len;
    if (page[0] == 0) {
        if (!cube_store_read_var(&p, end, &val_len) ||
            val_len >> 1 > CUBE_STORE_VALUE_MAX)
            return false;
        rest = val_len & 1 ? 12 : 2;
        if (!(val_len & 1) && (end - p < 2 ||
                               cube_store_get16(p) + (val_len >> 1) > len))
            return false;
    }
    return rest <= (size_t)(end - p);
}

/* Can the rest of this chapter trust the shape of these bytes? A checksum
 * tells accidents; a file made up by somebody has right checksums. It looks at
 * each entry once, when the page is read; after that every search may rely on
 * it. Keys must rise strictly, since a binary search over unsorted ones would
 * find nothing and say so. */
static bool cube_store_page_ok(const uint8_t *page, size_t len)
{
    const uint8_t *last = NULL;
    uint32_t count, last_len = 0;

    if (len < CUBE_STORE_PAGE_HEAD || page[0] >= CUBE_STORE_DEPTH ||
        page[1] != 0)
        return false;
    count = cube_store_page_count(page);
    if (count == 0 || CUBE_STORE_PAGE_HEAD + 2 * (size_t)count > len)
        return false;
    for (uint32_t i = 0; i < count; i++) {
        const uint8_t *key;
        uint32_t key_len;

        if (!cube_store_page_entry_ok(page, len, i))
            return false;
        key = cube_store_page_key(page, i, &key_len);
        if (last && cube_store_order(last, last_len, key, key_len) >= 0)
            return false;
        last = key;
        last_len = key_len;
    }
    return true;
}

/* ---- The cache ----
 *
 * Pages and values that were read and found right, by file and offset; a hash
 * table with chains. When it is over its size a hand goes round the table and
 * frees what was not used since it last came by (the clock algorithm). What
 * is pinned stays.
 * Freed when it is neither pinned nor cached. A pin is a promise to a pointer:
 * who holds one may read data, and nobody frees or moves it meanwhile.
 *
 *                   fetch              shrink, forget
 *      (on disk) ---------> cached ----------------------> freed
 *                           |    ^                           ^
 *                     fetch |    | unpin                     |
 *                           v    |        forget             | last
 *                        cached, pinned ---------> pinned ---+ unpin
 */
struct cube_store_ext {
    struct cube_store_ext *next;
    uint64_t at;
    uint32_t file, len;
    uint32_t pins;
    bool is_hot;    /* used since the hand came by */
    bool is_page;   /* and well formed */
    bool is_cached; /* else freed with its last pin */
    uint8_t data[];
};

/* An object's: it belongs to the store and lasts as long. Its bytes count the
 * table too, so that max_bytes is an honest figure. */
struct cube_store_cache {
    struct cube_store_ext **slots;
    size_t slot_count, count, hand; /* slot_count: a power of two */
    size_t bytes, max_bytes;
};

/* What it costs the cache. */
static size_t cube_store_ext_bytes(const struct cube_store_ext *e)
{
    return sizeof *e + e->len + 16; /* and what malloc keeps for itself */
}

/* The chain for this place. Offsets have patterns, so they are multiplied by
 * 2^64 over the golden ratio and the middle bits taken (Knuth 6.4). */
static struct cube_store_ext **cube_store_cache_slot(
        const struct cube_store_cache *c, uint32_t file, uint64_t at)
{
    uint64_t h = (at ^ (uint64_t)file << 48) * 0x9e3779b97f4a7c15u;

    return &c->slots[(h >> 20) & (c->slot_count - 1)];
}

/* Twice as many chains, so that they stay about one entry long. */
static void cube_store_cache_grow(struct cube_store_cache *c)
{
    struct cube_store_cache old = *c;

    c->slot_count = old.slot_count ? old.slot_count * 2 : 64;
    c->slots = cube_alloc(c->slot_count * sizeof *c->slots);
    for (size_t i = 0; i < old.slot_count; i++) {
        while (old.slots[i]) {
            struct cube_store_ext *e = old.slots[i];
            struct cube_store_ext **slot =
                cube_store_cache_slot(c, e->file, e->at);

            old.slots[i] = e->next;
            e->next = *slot;
            *slot = e;
        }
    }
    c->bytes += (c->slot_count - old.slot_count) * sizeof *c->slots;
    c->hand = 0;
    cube_free(old.slots);
}

/* Takes *at out of its chain; freed now or with its last pin. Afterwards *at
 * leads to the one behind it, so a loop over a chain goes on without a step. */
static void cube_store_cache_remove(struct cube_store_cache *c,
                                    struct cube_store_ext **at)
{
    struct cube_store_ext *e = *at;

    *at = e->next;
    c->bytes -= cube_store_ext_bytes(e);
    c->count--;
    e->is_cached = false;
    if (e->pins == 0)
        cube_free(e);
}

/* Frees until the cache is within its size, or all that is left is pinned: two
 * rounds of the hand find whatever can go. The first round takes away the
 * marks of what was hot, the second takes what nobody has used since. It may
 * end above the limit: pinned entries stay, and their number is bounded by the
 * cursors that are open. */
static void cube_store_cache_shrink(struct cube_store_cache *c)
{
    for (size_t i = 0; c->bytes > c->max_bytes && c->count > 0 &&
         i < 2 * c->slot_count; i++) {
        struct cube_store_ext **at = &c->slots[c->hand];

        c->hand = (c->hand + 1) & (c->slot_count - 1);
        while (*at) {
            if (!(*at)->is_hot && (*at)->pins == 0) {
                cube_store_cache_remove(c, at);
                continue;
            }
            (*at)->is_hot = false;
            at = &(*at)->next;
        }
    }
}

/* Forgets what is of this file; of all files with number 0. What is pinned
 * loses its place in the table only; its holders keep the bytes. */
static void cube_store_cache_forget(struct cube_store_cache *c,
                                    uint32_t file)
{
    for (size_t i = 0; i < c->slot_count; i++) {
        struct cube_store_ext **at = &c->slots[i];

        while (*at) {
            if (file == 0 || (*at)->file == file)
                cube_store_cache_remove(c, at);
            else
                at = &(*at)->next;
        }
    }
}

/* The counterpart of load and fetch; NULL is allowed. */
static void cube_store_unpin(struct cube_store_ext *e)
{
    if (e && --e->pins == 0 && !e->is_cached)
        cube_free(e);
}

/* Reads what a reference names, past the cache; the caller unpins it. All of
 * it must stand before limit, the place of what referred to it, so that no
 * chain of references can go in a circle. NULL: the reference leads out of the
 * file or behind limit, the read failed, or the checksum did not match; err
 * says which and at what offset. Nothing is kept of it then. */
static struct cube_store_ext *cube_store_load(
        const struct cube_store_file *f, struct cube_store_ref ref,
        uint64_t limit, struct cube_err *err)
{
    struct cube_store_ext *e;

    if (ref.at < CUBE_STORE_HEAD || ref.len > CUBE_STORE_VALUE_MAX ||
        ref.at > limit || ref.len > limit - ref.at || limit > f->size) {
        (void)cube_store_corrupt(f, limit, "a reference leads astray", err);
        return NULL;
    }
    e = cube_alloc(sizeof *e + ref.len);
    e->at = ref.at;
    e->file = f->number;
    e->len = ref.len;
    e->pins = 1;
    e->is_hot = true;
    if (cube_store_read(f, ref.at, e->data, ref.len, err) < 0) {
        cube_free(e);
        return NULL;
    }
    if (cube_store_crc(f->crc, 0, e->data, e->len) != ref.crc) {
        (void)cube_store_corrupt(f, ref.at, "the checksum does not match",
                                 err);
        cube_free(e);
        return NULL;
    }
    return e;
}

/* The same through the cache. What would take more than a quarter of the cache
 * is read past it, so that one large value does not push out every page; it is
 * freed with its pin. A hit is compared by file, place and length, not by
 * checksum: what stands in the cache was checked when it came in. */
static struct cube_store_ext *cube_store_fetch(
        struct cube_store_cache *c, const struct cube_store_file *f,
        struct cube_store_ref ref, uint64_t limit, struct cube_err *err)
{
    struct cube_store_ext *e = c->slot_count > 0
        ? *cube_store_cache_slot(c, f->number, ref.at) : NULL;

    while (e && (e->at != ref.at || e->file != f->number))
        e = e->next;
    if (e && e->len == ref.len) {
        e->pins++;
        e->is_hot = true;
        return e;
    }
    e = cube_store_load(f, ref, limit, err);
    if (!e || cube_store_ext_bytes(e) > c->max_bytes / 4)
        return e;
    if (c->count >= c->slot_count)
        cube_store_cache_grow(c);
    e->next = *cube_store_cache_slot(c, f->number, ref.at);
    *cube_store_cache_slot(c, f->number, ref.at) = e;
    e->is_cached = true;
    c->count++;
    c->bytes += cube_store_ext_bytes(e);
    cube_store_cache_shrink(c);
    return e;
}

/* A page of this level. Where cache is NULL, past it. The shape is checked
 * once for each time that it is read from the file. A level other than the
 * parent expects is damage, and it is also what bounds the depth: it sinks by
 * one at each step. */
static struct cube_store_ext *cube_store_fetch_page(
        struct cube_store_cache *c, const struct cube_store_file *f,
        struct cube_store_ref ref, uint64_t limit, int level,
        struct cube_err *err)
{
    struct cube_store_ext *e;

    if (ref.len < CUBE_STORE_PAGE_HEAD || ref.len > CUBE_STORE_PAGE_MAX) {
        (void)cube_store_corrupt(f, limit, "no page has such a size", err);
        return NULL;
    }
    e = c ? cube_store_fetch(c, f, ref, limit, err)
          : cube_store_load(f, ref, limit, err);
    if (!e)
        return NULL;
    e->is_page = e->is_page || cube_store_page_ok(e->data, e->len);
    if (e->is_page && e->data[0] == level)
        return e;
    (void)cube_store_corrupt(f, ref.at, "this is no page of its level", err);
    cube_store_unpin(e);
    return NULL;
}

/* ---- The overlay ----
 *
 * The changes since the last checkpoint, sorted by tree, key and commit: a
 * skip list (Pugh 1990), whose nodes never move and live as long as the list.
 * A key may be there several times, the latest commit first, so that a reader
 * sees the commit that it pinned by leaving out what is later.
 *
 *     head [2] ------------------------> b@7 ------------------------> nil
 *          [1] ------> a@5 ------------> b@7 ------------> c@6 ------> nil
 *          [0] ------> a@5 --> a@3 ----> b@7 --> b@2 ----> c@6 ------> nil
 *
 * A reader of commit 6 finds a@5, b@2 and c@6. Staged changes have the number
 * of the commit to come, so that nobody sees them who does not ask for it, and
 * a batch that fails is taken out by its nodes.
 *
 * It only grows: what was replaced is freed with the whole list, after the
 * next checkpoint. That is what makes a snapshot free of charge. */
#define CUBE_STORE_TOWER 12

/* One allocation of the overlay's: the struct, height links, the key. val is a
 * piece of its own, since a later change of the same commit may replace it. */
struct cube_store_node {
    uint64_t commit;
    uint64_t place;       /* of the value in the file, or 0 */
    const uint8_t *val;
    uint32_t val_len;
    uint16_t key_len;
    uint8_t tree, height;
    bool is_del;
    struct cube_store_node *batch; /* the next one of the same commit */
    struct cube_store_node *next[]; /* height of them, then the key */
};

struct cube_store_chunk {
    struct cube_store_chunk *next;
    size_t used, size;
    _Alignas(8) uint8_t data[];
};

/* An object's, counted: the view that is current, each snapshot and cursor,
 * and a walk that merges it hold it. Nodes are only freed with the whole. */
struct cube_store_mem {
    int refs;
    struct cube_store_chunk *chunks;
    size_t bytes;          /* of memory */
    uint64_t random;       /* decides heights; the same at each run */
    uint64_t last_commit;  /* the latest one in it */
    uint64_t upto;         /* frozen: where the records after it begin */
    uint32_t upto_crc;     /* frozen: the checksum they continue from */
    struct cube_store_node *head[CUBE_STORE_TOWER];
};

/* An empty overlay with one holder. */
static struct cube_store_mem *cube_store_mem_new(void)
{
    struct cube_store_mem *m = cube_alloc(sizeof *m);

    m->refs = 1;
    m->random = 0x9e3779b97f4a7c15u;
    m->bytes = sizeof *m;
    return m;
}

/* One holder less; the last one frees it with all of its nodes. */
static void cube_store_mem_drop(struct cube_store_mem *m)
{
    if (!m || --m->refs > 0)
        return;
    while (m->chunks) {
        struct cube_store_chunk *c = m->chunks;

        m->chunks = c->next;
        cube_free(c);
    }
    cube_free(m);
}

/* Memory that lives as long as the overlay. The first chunk is small, for
 * stores that hardly change. */
static void *cube_store_mem_alloc(struct cube_store_mem *m, size_t len)
{
    struct cube_store_chunk *c = m->chunks;
    uint8_t *p;

    len = (len + 7) & ~(size_t)7;
    if (!c || len > c->size - c->used) {
        size_t size = c ? 32768 : 2048;

        if (size < len)
            size = len;
        c = CUBE_MALLOC(sizeof *c + size);
        if (!c)
            CUBE_OOM();
        c->next = m->chunks;
        c->used = 0;
        c->size = size;
        m->chunks = c;
        m->bytes += sizeof *c + size;
    }
    p = c->data + c->used;
    c->used += len;
    return p;
}

/* Its key stands behind its links. */
static const uint8_t *cube_store_node_key(const struct cube_store_node *n)
{
    return (const uint8_t *)(n->next + n->height);
}

/* Where (tree, key, commit) stands to a node: less than 0, before it. */
static int cube_store_node_order(unsigned tree, const uint8_t *key,
                                 size_t key_len, uint64_t commit,
                                 const struct cube_store_node *n)
{
    int r = (tree > n->tree) - (tree < n->tree);

    if (r == 0)
        r = cube_store_order(key, key_len, cube_store_node_key(n),
                             n->key_len);
    return r ? r : (commit < n->commit) - (commit > n->commit);
}

/* Fills prev with the links that lead past the last node before the place;
 * returns the node at or after it, or NULL. prev may be NULL. A few
 * comparisons for each fourfold of nodes.
 *
 *      find c@9 in the drawing above: level 2 goes to b and sees nil, level
 *      1 sees c@6, which is behind c@9 (later commits stand first): down to
 *      level 0, and there c@6 is the answer; prev[0] is b@2's link
 *
 * UINT64_MAX as the commit so means "before all versions of the key". */
static struct cube_store_node *cube_store_mem_find(
        struct cube_store_mem *m, unsigned tree, const uint8_t *key,
        size_t key_len, uint64_t commit, struct cube_store_node ***prev)
{
    struct cube_store_node **links = m->head;

    for (int i = CUBE_STORE_TOWER - 1; i >= 0; i--) {
        while (links[i] && cube_store_node_order(tree, key, key_len, commit,
                                                 links[i]) > 0)
            links = links[i]->next;
        if (prev)
            prev[i] = &links[i];
    }
    return links[0];
}

/* 1 in three of four cases, 2 in three of sixteen, and so on (xorshift). */
static int cube_store_mem_height(struct cube_store_mem *m)
{
    int height = 1;

    m->random ^= m->random << 13;
    m->random ^= m->random >> 7;
    m->random ^= m->random << 17;
    for (uint64_t r = m->random >> 8; (r & 3) == 0 &&
         height < CUBE_STORE_TOWER; r >>= 2)
        height++;
    return height;
}

/* Puts a change in, or over what the same commit said of the key before; the
 * bytes are copied. *is_new tells which. Never fails (out of memory ends the
 * program). A node that is in the list keeps its place and its height; only
 * its value changes. */
static struct cube_store_node *cube_store_mem_put(
        struct cube_store_mem *m, const struct cube_store_node *what,
        const uint8_t *key, bool *is_new)
{
    struct cube_store_node **prev[CUBE_STORE_TOWER];
    struct cube_store_node *n = cube_store_mem_find(
        m, what->tree, key, what->key_len, what->commit, prev);
    uint8_t *val = NULL;

    if (what->val_len > 0) {
        val = cube_store_mem_alloc(m, what->val_len);
        memcpy(val, what->val, what->val_len);
    }
    *is_new = !n || cube_store_node_order(what->tree, key, what->key_len,
                                          what->commit, n) != 0;
    if (*is_new) { /* else readers of this commit see the new value at once */
        int height = cube_store_mem_height(m);

        n = cube_store_mem_alloc(m, sizeof *n + (size_t)height *
                                 sizeof n->next[0] + what->key_len);
        *n = *what;
        n->height = (uint8_t)height;
        memcpy(n->next + height, key, what->key_len);
        for (int i = 0; i < height; i++) {
            n->next[i] = *prev[i];
            *prev[i] = n;
        }
    }
    n->val = val;
    n->val_len = what->val_len;
    n->place = what->place;
    n->is_del = what->is_del;
    if (m->last_commit < what->commit)
        m->last_commit = what->commit;
    return n;
}

/* Takes a node out; whoever stands on it can still go on from it. Its own
 * links stay as they are, and its memory lives as long as the overlay. A node
 * that is not in this list is left alone, so the caller need not know in which
 * of two overlays it stands. */
static void cube_store_mem_unlink(struct cube_store_mem *m,
                                  const struct cube_store_node *n)
{
    struct cube_store_node **prev[CUBE_STORE_TOWER];

    if (cube_store_mem_find(m, n->tree, cube_store_node_key(n), n->key_len,
                            n->commit, prev) != n)
        return;
    for (int i = 0; i < n->height; i++)
        *prev[i] = n->next[i];
}

/* The first node of the tree, at n or after it, that is the version of its key
 * which this commit sees; NULL if none. A deletion is a version like others:
 * the caller looks at is_del. */
static struct cube_store_node *cube_store_mem_visible(
        struct cube_store_node *n, unsigned tree, uint64_t commit)
{
    while (n && n->tree == tree && n->commit > commit)
        n = n->next[0];
    return n && n->tree == tree ? n : NULL;
}

/* The same for the keys after the one that n has. */
static struct cube_store_node *cube_store_mem_next(
        const struct cube_store_node *n, uint64_t commit)
{
    struct cube_store_node *m = n->next[0];

    while (m && m->tree == n->tree && m->key_len == n->key_len &&
           memcmp(cube_store_node_key(m), cube_store_node_key(n),
                  n->key_len) == 0)
        m = m->next[0];
    return cube_store_mem_visible(m, n->tree, commit);
}

/* The same for the last key before this one; key NULL: the last of all. A list
 * without links backwards searches once per step. A key all of whose versions
 * are later than commit is passed over, and the search goes on before it; that
 * is the loop. Looking for the tree after this one finds the end of this one.
 */
static struct cube_store_node *cube_store_mem_prev(
        struct cube_store_mem *m, unsigned tree, const uint8_t *key,
        size_t key_len, uint64_t commit)
{
    for (;;) {
        struct cube_store_node **prev[CUBE_STORE_TOWER], *n;
        static const uint8_t none[1];

        (void)cube_store_mem_find(m, key ? tree : tree + 1,
                                  key ? key : none, key_len, UINT64_MAX,
                                  prev);
        if (prev[0] == &m->head[0])
            return NULL;
        n = CUBE_OF(prev[0], struct cube_store_node, next);
        if (n->tree != tree)
            return NULL;
        key = cube_store_node_key(n);
        key_len = n->key_len;
        n = cube_store_mem_find(m, tree, key, key_len, commit, NULL);
        if (n && n->tree == tree && n->key_len == key_len &&
            memcmp(cube_store_node_key(n), key, key_len) == 0)
            return n;
    }
}

/* ---- Roots ----
 *
 * What a checkpoint leaves: for each tree its root page, and where the
 * records begin that came after it. The body of an 'R' record:
 *
 *     offset size
 *          0    8  offset of the first record to replay over these trees
 *          8    4  the checksum that this record continues from
 *         12    4  number of trees; then for each of them, by its number:
 *
 *          0   32  name, padded with zeros
 *         32    8  offset of its root page    \
 *         40    4  length of that page         | all zero: an empty tree
 *         44    4  CRC-32C of that page       /
 *         48    4  levels
 *         52    4  zeros
 *         56    8  number of keys
 *         64    8  bytes of keys and values
 */
#define CUBE_STORE_ROOT_HEAD 16
#define CUBE_STORE_ROOT_TREE 72

struct cube_store_tree {
    char name[CUBE_STORE_NAME_MAX + 1];
    struct cube_store_ref root;
    int levels;
    uint64_t count, bytes;
};

/* Held by the view, by snapshots and cursors, and by walks; never changed once
 * it is in use. It keeps its file open, so a snapshot reads on from a file
 * that a compaction has replaced and the directory no longer names. */
struct cube_store_roots {
    int refs;
    struct cube_store_file *file;
    uint64_t at;      /* of the record; the pages stand before it */
    uint64_t commit;  /* the trees are the state after this one */
    uint64_t replay;  /* the records from here on come on top */
    uint32_t replay_crc;
    int count;
    struct cube_store_tree trees[CUBE_STORE_TREES_MAX];
};

/* Roots of no trees, in this file, with one holder. */
static struct cube_store_roots *cube_store_roots_new(
        struct cube_store_file *file)
{
    struct cube_store_roots *r = cube_alloc(sizeof *r);

    r->refs = 1;
    r->file = file;
    file->refs++;
    return r;
}

/* One holder less; the last one frees it. NULL is allowed. */
static void cube_store_roots_drop(struct cube_store_roots *r)
{
    if (!r || --r->refs > 0)
        return;
    cube_store_file_drop(r->file);
    cube_free(r);
}

/* Builds the record in b. */
static void cube_store_roots_encode(const struct cube_store_roots *r,
                                    struct cube_buf *b)
{
    cube_store_rec_begin(b);
    cube_buf_reserve(b, CUBE_STORE_ROOT_HEAD +
                     (size_t)r->count * CUBE_STORE_ROOT_TREE);
    for (int i = -1; i < r->count; i++) {
        uint8_t p[CUBE_STORE_ROOT_TREE] = {0};

        if (i < 0) {
            cube_store_put64(p, r->replay);
            cube_store_put32(p + 8, r->replay_crc);
            cube_store_put32(p + 12, (uint32_t)r->count);
            cube_buf_add(b, p, CUBE_STORE_ROOT_HEAD);
            continue;
        }
        memcpy(p, r->trees[i].name, CUBE_STORE_NAME_MAX);
        cube_store_put64(p + 32, r->trees[i].root.at);
        cube_store_put32(p + 40, r->trees[i].root.len);
        cube_store_put32(p + 44, r->trees[i].root.crc);
        cube_store_put32(p + 48, (uint32_t)r->trees[i].levels);
        cube_store_put64(p + 56, r->trees[i].count);
        cube_store_put64(p + 64, r->trees[i].bytes);
        cube_buf_add(b, p, sizeof p);
    }
}

/* The counterpart; false: these bytes are no roots. Root pages are not looked
 * at before somebody reads them. What is checked is the shape: lengths, the
 * number of trees, levels. After false r is not to be used. */
static bool cube_store_roots_decode(struct cube_store_roots *r,
                                    const struct cube_buf *b)
{
    const uint8_t *p = (const uint8_t *)b->data;

    if (b->len < CUBE_STORE_ROOT_HEAD ||
        cube_store_get32(p + 12) > CUBE_STORE_TREES_MAX)
        return false;
    r->replay = cube_store_get64(p);
    r->replay_crc = cube_store_get32(p + 8);
    r->count = (int)cube_store_get32(p + 12);
    if (b->len != CUBE_STORE_ROOT_HEAD +
                  (size_t)r->count * CUBE_STORE_ROOT_TREE)
        return false;
    p += CUBE_STORE_ROOT_HEAD;
    for (int i = 0; i < r->count; i++, p += CUBE_STORE_ROOT_TREE) {
        struct cube_store_tree *t = &r->trees[i];

        memcpy(t->name, p, CUBE_STORE_NAME_MAX);
        t->root.at = cube_store_get64(p + 32);
        t->root.len = cube_store_get32(p + 40);
        t->root.crc = cube_store_get32(p + 44);
        t->levels = (int)cube_store_get32(p + 48);
        t->count = cube_store_get64(p + 56);
        t->bytes = cube_store_get64(p + 64);
        if (t->levels < 0 || t->levels > CUBE_STORE_DEPTH ||
            (t->levels == 0) != (t->root.len == 0))
            return false;
    }
    return true;
}

/* Bytes of keys and values in all trees, and their number. */
static uint64_t cube_store_roots_sum(const struct cube_store_roots *r,
                                     uint64_t *count)
{
    uint64_t bytes = 0;

    *count = 0;
    for (int i = 0; i < r->count; i++) {
        bytes += r->trees[i].bytes;
        *count += r->trees[i].count;
    }
    return bytes;
}

/* ---- Walking a tree ----
 *
 * The way from the root to an entry of a leaf, every page on it pinned. No
 * leaf knows its neighbour, since a copied leaf would have to tell it: next
 * goes up until there is something to the right, and down again. */
struct cube_store_step {
    struct cube_store_ext *page;
    uint32_t i; /* the entry of the page that the way goes through */
};

/* A call's, or a cursor's. It is what makes a position cheap to move: the next
 * entry mostly is one more in the same page. At most CUBE_STORE_DEPTH pages
 * are pinned by it. */
struct cube_store_path {
    struct cube_store_cache *cache; /* NULL: past the cache */
    struct cube_store_roots *roots; /* borrowed */
    struct cube_store_step steps[CUBE_STORE_DEPTH];
    int depth; /* 0: it stands nowhere */
};

enum cube_store_aim { CUBE_STORE_FIRST, CUBE_STORE_LAST, CUBE_STORE_SEEK };

/* Stands nowhere; nothing is pinned. */
static void cube_store_path_clear(struct cube_store_path *p)
{
    while (p->depth > 0)
        cube_store_unpin(p->steps[--p->depth].page);
}

/* Puts a page below the way so far. -1 leaves the way as it was; the caller
 * clears it. The page must stand before the one that leads to it, the root
 * before its record. */
static int cube_store_path_push(struct cube_store_path *p,
                                struct cube_store_ref ref, int level,
                                struct cube_err *err)
{
    uint64_t limit = p->depth > 0 ? p->steps[p->depth - 1].page->at
                                  : p->roots->at;
    struct cube_store_ext *page = cube_store_fetch_page(
        p->cache, p->roots->file, ref, limit, level, err);

    if (!page)
        return -1;
    p->steps[p->depth].page = page;
    p->steps[p->depth++].i = 0;
    return 0;
}

/* From the page that was pushed last down to a leaf: to its first or last
 * entry, or to where the key is or would be, which may be behind the last.
 * After -1 the way is shorter than it should be and only good for clearing. */
static int cube_store_path_down(struct cube_store_path *p,
                                enum cube_store_aim aim, const uint8_t *key,
                                size_t key_len, struct cube_err *err)
{
    for (;;) {
        struct cube_store_step *s = &p->steps[p->depth - 1];
        const uint8_t *page = s->page->data;
        struct cube_store_item item;
        bool is_equal;

        if (aim == CUBE_STORE_FIRST)
            s->i = 0;
        else if (aim == CUBE_STORE_LAST)
            s->i = cube_store_page_count(page) - 1;
        else if (page[0] > 0)
            s->i = cube_store_page_child(page, key, key_len);
        else
            s->i = cube_store_page_find(page, key, key_len, &is_equal);
        if (page[0] == 0)
            return 0;
        cube_store_page_item(page, s->i, &item);
        if (cube_store_path_push(p, item.ref, page[0] - 1, err) < 0)
            return -1;
    }
}

/* From the root down; 1, or 0 for an empty tree. A tree that has no number in
 * these roots is empty: it was named later. key is only looked at with
 * CUBE_STORE_SEEK. */
static int cube_store_path_start(struct cube_store_path *p, int tree,
                                 enum cube_store_aim aim, const uint8_t *key,
                                 size_t key_len, struct cube_err *err)
{
    const struct cube_store_tree *t = &p->roots->trees[tree];

    cube_store_path_clear(p);
    if (tree >= p->roots->count || t->levels == 0)
        return 0;
    if (cube_store_path_push(p, t->root, t->levels - 1, err) < 0 ||
        cube_store_path_down(p, aim, key, key_len, err) < 0)
        return -1;
    return 1;
}

/* One entry on (by is +1) or back (-1): 1, or 0 and the way is cleared. In a
 * tree [a e] over [a b] and [e f], standing on b:
 *
 *      +1: leaf has no more -> up to the root, entry 0 -> entry 1 -> down
 *          to the first of [e f]
 *
 * Each page is read once when one goes through the whole tree. */
static int cube_store_path_move(struct cube_store_path *p, int by,
                                struct cube_err *err)
{
    while (p->depth > 0) {
        struct cube_store_step *s = &p->steps[p->depth - 1];
        const uint8_t *page = s->page->data;
        struct cube_store_item item;

        if (by > 0 ? s->i + 1 >= cube_store_page_count(page) : s->i == 0) {
            cube_store_unpin(s->page);
            p->depth--;
            continue;
        }
        s->i += (uint32_t)by;
        if (page[0] == 0)
            return 1;
        cube_store_page_item(page, s->i, &item);
        if (cube_store_path_push(p, item.ref, page[0] - 1, err) < 0 ||
            cube_store_path_down(p, by > 0 ? CUBE_STORE_FIRST
                                           : CUBE_STORE_LAST, NULL, 0,
                                 err) < 0)
            return -1;
        return 1;
    }
    return 0;
}

/* To the first entry at or after the key (by +1), or the last one before it
 * (by -1). 1: it stands on an entry; 0: there is none in that direction, and
 * nothing is pinned; -1. A seek may end behind the last entry of a leaf, since
 * the key would belong there; the entry wanted is then the first one of the
 * next leaf, which a move from the last entry finds. */
static int cube_store_path_seek(struct cube_store_path *p, int tree,
                                const uint8_t *key, size_t key_len, int by,
                                struct cube_err *err)
{
    int r = cube_store_path_start(p, tree, CUBE_STORE_SEEK, key, key_len,
                                  err);
    struct cube_store_step *s = &p->steps[p->depth > 0 ? p->depth - 1 : 0];

    if (r <= 0)
        return r;
    if (by > 0 && s->i < cube_store_page_count(s->page->data))
        return 1;
    if (by > 0)
        s->i--;
    return cube_store_path_move(p, by, err);
}

/* The entry of the leaf that it stands on. */
static void cube_store_path_item(const struct cube_store_path *p,
                                 struct cube_store_item *out)
{
    const struct cube_store_step *s = &p->steps[p->depth - 1];

    cube_store_page_item(s->page->data, s->i, out);
}

/* The offset of the leaf, before which its values stand. */
static uint64_t cube_store_path_at(const struct cube_store_path *p)
{
    return p->steps[p->depth - 1].page->at;
}

/* ---- Views ----
 *
 * What a reader reads: trees, the overlays on top of them, and the last
 * commit that it sees.
 * While it is held nothing that it reads is freed, moved or written over,
 * whatever checkpoints and compactions do. Overlays may grow under it; later
 * commits have higher numbers than it looks at. */
struct cube_store_view {
    struct cube_store_roots *roots;
    struct cube_store_mem *mem[2]; /* the newer one first; the other or NULL */
    uint64_t commit;
};

/* Another holder of the same; give it back with drop. */
static struct cube_store_view cube_store_view_hold(
        const struct cube_store_view *v)
{
    v->roots->refs++;
    v->mem[0]->refs++;
    if (v->mem[1])
        v->mem[1]->refs++;
    return *v;
}

/* Gives back all that it holds. */
static void cube_store_view_drop(struct cube_store_view *v)
{
    cube_store_roots_drop(v->roots);
    cube_store_mem_drop(v->mem[0]);
    cube_store_mem_drop(v->mem[1]);
    memset(v, 0, sizeof *v);
}

/* The node that decides about the key, if an overlay does. The overlay that
 * fills is asked first: what it says is newer than anything in the frozen one.
 * A deletion decides as well. */
static const struct cube_store_node *cube_store_view_node(
        const struct cube_store_view *v, int tree, const uint8_t *key,
        size_t key_len)
{
    for (int i = 0; i < 2; i++) {
        const struct cube_store_node *n;

        if (!v->mem[i] || !v->mem[i]->head[0])
            continue;
        n = cube_store_mem_find(v->mem[i], (unsigned)tree, key, key_len,
                                v->commit, NULL);
        if (n && n->tree == tree && n->key_len == key_len &&
            memcmp(cube_store_node_key(n), key, key_len) == 0)
            return n;
    }
    return NULL;
}

/* The entry of a tree, copied to out: 1, 0, -1. No failure leaves a page
 * pinned; out may hold part of something after -1. */
static int cube_store_view_lookup(const struct cube_store_view *v,
                                  struct cube_store_cache *cache, int tree,
                                  const uint8_t *key, size_t key_len,
                                  struct cube_buf *out, struct cube_err *err)
{
    struct cube_store_path path;
    struct cube_store_step *s;
    struct cube_store_item item;
    struct cube_store_ext *e;
    int r;

    path.cache = cache;
    path.roots = v->roots;
    path.depth = 0;
    r = cube_store_path_start(&path, tree, CUBE_STORE_SEEK, key, key_len,
                              err);
    if (r <= 0)
        goto out;
    s = &path.steps[path.depth - 1];
    r = 0;
    if (s->i >= cube_store_page_count(s->page->data))
        goto out;
    cube_store_path_item(&path, &item);
    if (item.key_len != key_len || memcmp(item.key, key, key_len) != 0)
        goto out;
    r = 1;
    if (item.val) {
        cube_buf_add(out, item.val, item.val_len);
        goto out;
    }
    e = cube_store_fetch(cache, v->roots->file, item.ref,
                         cube_store_path_at(&path), err);
    if (e)
        cube_buf_add(out, e->data, e->len);
    r = e ? 1 : -1;
    cube_store_unpin(e);
out:
    cube_store_path_clear(&path);
    return r;
}

/* The value of a key, copied to out: 1, or 0 if there is none, or -1. The
 * newest word counts: the overlay, then the frozen one, then the tree. */
static int cube_store_view_get(const struct cube_store_view *v,
                               struct cube_store_cache *cache, int tree,
                               const uint8_t *key, size_t key_len,
                               struct cube_buf *out, struct cube_err *err)
{
    const struct cube_store_node *n =
        cube_store_view_node(v, tree, key, key_len);

    cube_buf_clear(out);
    if (n && n->is_del)
        return 0;
    if (n) {
        cube_buf_add(out, n->val, n->val_len);
        return 1;
    }
    return cube_store_view_lookup(v, cache, tree, key, key_len, out, err);
}

/* ---- Writing trees ----
 *
 * One walk does both a checkpoint and a compaction: it goes through the old
 * tree from left to right, together with the sorted changes, and fills new
 * pages from left to right, a pack of entries for each level. What no change
 * falls into is taken over by its reference, whole subtrees at once; a
 * compaction takes nothing over and so packs all of it.
 *
 *     old:        [a e k]            changes: f=1, g deleted
 *               /    |    \
 *         [a b c] [e g h] [k l]
 *
 *     [a b c] is taken over; [e g h] is merged to e f h; then, since no
 *     change is left, the pack is flushed as a page, [k l] taken over, and
 *     in the end the pack of level 1 becomes the new root:
 *
 *     new:        [a e k]'
 *               /    |    \
 *         [a b c] [e f h]' [k l]
 *
 * A pack gives a full page away when it holds two; at a flush, what is more
 * than one page is cut into halves. So keys that come in order fill pages,
 * and no page is made of one left-over entry. A page never takes anything
 * from a neighbour that is not being rewritten, but one that would be small
 * pulls its right neighbour in.
 * An object's, of the walk that fills it. Entries lie one behind another with
 * their values, and at[] says where each begins: what is still to be cut into
 * pages need not be in a page's order.
 *
 *      before:  pack of leaves, over two pages' worth   pack above
 *               | a b c d e f g h i j k l |             | (empty) |
 *      after:   | f g h i j k l |                       | a -> page [a..e] |
 */
struct cube_store_pack {
    struct cube_buf data; /* entries, each with its value behind it */
    uint32_t count;
    uint16_t at[4096];
};

/* It runs in steps between which commits go on, and looks at nothing that they
 * change: from is immutable, ops is frozen, and the file only grows. Freed at
 * any time, it leaves garbage behind, never damage. */
struct cube_store_walk {
    struct cube_store_cache *cache;
    struct cube_store_roots *from, *to; /* held; to->file is written */
    struct cube_store_mem *ops;         /* held, or NULL */
    bool is_copy;                       /* take nothing over */
    bool is_in_tree;
    int tree;
    const struct cube_store_node *op; /* the next change */
    struct cube_store_path path;
    struct cube_store_pack *packs[CUBE_STORE_DEPTH];
    struct cube_buf group; /* the 'P' record that is being filled */
    uint64_t done_bytes;   /* written by the last step */
};

/* Enough entries for any pack: it is emptied beyond two pages, and an entry
 * takes at least 3 bytes and its offset 2. */
_Static_assert((2 * CUBE_STORE_PAGE + CUBE_STORE_PAGE) / 5 < 4096,
               "a pack has places for all of its entries");

/* A walk from these trees to new ones in out, with these changes (or NULL).
 * Whoever starts it sets in to: commit, count, names, replay. Takes its own
 * hold of from, out and ops. A copy reads past the cache: each page is wanted
 * once, and would push out what readers use. */
static struct cube_store_walk *cube_store_walk_new(
        struct cube_store_cache *cache, struct cube_store_roots *from,
        struct cube_store_file *out, struct cube_store_mem *ops,
        bool is_copy)
{
    struct cube_store_walk *w = cube_alloc(sizeof *w);

    w->cache = cache;
    w->from = from;
    from->refs++;
    w->to = cube_store_roots_new(out);
    w->ops = ops;
    if (ops)
        ops->refs++;
    w->is_copy = is_copy;
    w->path.cache = is_copy ? NULL : cache;
    w->path.roots = from;
    cube_store_rec_begin(&w->group);
    return w;
}

/* Frees it, done or not. What it wrote so far is garbage, if nobody took to. */
static void cube_store_walk_free(struct cube_store_walk *w)
{
    if (!w)
        return;
    cube_store_path_clear(&w->path);
    for (int i = 0; i < CUBE_STORE_DEPTH; i++) {
        if (w->packs[i])
            cube_buf_free(&w->packs[i]->data);
        cube_free(w->packs[i]);
    }
    cube_buf_free(&w->group);
    cube_store_roots_drop(w->from);
    cube_store_roots_drop(w->to);
    cube_store_mem_drop(w->ops);
    cube_free(w);
}

/* The pack of a level, made when first needed. */
static struct cube_store_pack *cube_store_walk_pack(
        struct cube_store_walk *w, int level)
{
    CUBE_ASSERT(level < CUBE_STORE_DEPTH);
    if (!w->packs[level])
        w->packs[level] = cube_alloc(sizeof *w->packs[level]);
    return w->packs[level];
}

/* Bytes of a page with the entries from .. to-1 of a pack. */
static size_t cube_store_pack_bytes(const struct cube_store_pack *p,
                                    uint32_t from, uint32_t to)
{
    size_t end = to < p->count ? p->at[to] : p->data.len;
    size_t start = from < p->count ? p->at[from] : p->data.len;

    return CUBE_STORE_PAGE_HEAD + 2 * (size_t)(to - from) + end - start;
}

/* Where the next byte that is put into the group will stand in the file. Right
 * only until the group is written, and the group is not written before its
 * step ends; both are why no batch may be appended in the middle of a step. */
static uint64_t cube_store_walk_at(const struct cube_store_walk *w)
{
    return w->to->file->end + w->group.len;
}

/* Bytes of the value that stands behind this entry of a pack; *head is the
 * length of the entry before it. */
static size_t cube_store_pack_value(const struct cube_store_pack *p,
                                    int level, uint32_t i, size_t *head)
{
    const uint8_t *start = (const uint8_t *)p->data.data + p->at[i];
    size_t len = (i + 1 < p->count ? p->at[i + 1] : p->data.len) - p->at[i];
    const uint8_t *e = start;
    uint32_t key_len = cube_store_get_var(&e), twice = 1;

    e += key_len;
    if (level == 0)
        twice = cube_store_get_var(&e);
    *head = twice & 1 ? len : (size_t)(e - start) + 2;
    return len - *head;
}

/* Lays a page out at the end of the group: the first n entries of a pack, the
 * table of their places before them and their values behind. Values go behind
 * all entries, so the keys of a page stand close together. */
static void cube_store_walk_layout(struct cube_store_walk *w, int level,
                                   uint32_t n)
{
    const struct cube_store_pack *p = w->packs[level];
    size_t len = cube_store_pack_bytes(p, 0, n), start = w->group.len;
    size_t at = CUBE_STORE_PAGE_HEAD + 2 * (size_t)n, val_at = len, head;
    uint8_t *page;

    cube_buf_reserve(&w->group, len);
    page = (uint8_t *)w->group.data + start;
    w->group.len += len;
    page[0] = (uint8_t)level;
    page[1] = 0;
    cube_store_put16(page + 2, n);
    for (uint32_t i = 0; i < n; i++)
        val_at -= cube_store_pack_value(p, level, i, &head);
    for (uint32_t i = 0; i < n; i++) {
        const char *e = p->data.data + p->at[i];
        size_t val_len = cube_store_pack_value(p, level, i, &head);

        cube_store_put16(page + CUBE_STORE_PAGE_HEAD + 2 * (size_t)i,
                         (uint32_t)at);
        memcpy(page + at, e, head);
        memcpy(page + val_at, e + head, val_len);
        at += head;
        if (val_len > 0)
            cube_store_put16(page + at - 2, (uint32_t)val_at);
        val_at += val_len;
    }
}

/* Writes the first n entries of a pack as a page; leaves in entry what its
 * parent says of it. Returns the length of that. n is at least 1. The entries
 * that remain move to the pack's start, with their places counted anew. */
static size_t cube_store_walk_emit(struct cube_store_walk *w, int level,
                                   uint32_t n,
                                   uint8_t entry[CUBE_STORE_KEY_MAX + 32])
{
    struct cube_store_pack *p = cube_store_walk_pack(w, level);
    size_t len = cube_store_pack_bytes(p, 0, n), start = w->group.len;
    size_t used = n < p->count ? p->at[n] : p->data.len;
    const uint8_t *first = (const uint8_t *)p->data.data, *key = first;
    uint64_t at = cube_store_walk_at(w);
    uint32_t key_len = cube_store_get_var(&key);
    size_t head = (size_t)(key - first) + key_len;

    cube_store_walk_layout(w, level, n);
    memcpy(entry, first, head);
    cube_store_put64(entry + head, at);
    cube_store_put32(entry + head + 8, (uint32_t)len);
    cube_store_put32(entry + head + 12,
                     cube_store_crc(w->to->file->crc, 0,
                                    w->group.data + start, len));
    cube_buf_drop(&p->data, used);
    p->count -= n;
    for (uint32_t i = 0; i < p->count; i++)
        p->at[i] = (uint16_t)(p->at[i + n] - used);
    return head + 16;
}

/* Adds an entry to the pack of a level. A pack that holds two pages gives one
 * away, whose entry then goes to the level above. A page that is given away
 * here is as full as entries let it be; two pages' worth is kept back so that
 * the rest never makes a page that is nearly empty. */
static void cube_store_walk_add(struct cube_store_walk *w, int level,
                                const uint8_t *entry, size_t len)
{
    uint8_t above[CUBE_STORE_KEY_MAX + 32];

    for (;; level++) {
        struct cube_store_pack *p = cube_store_walk_pack(w, level);
        uint32_t n = 1;

        p->at[p->count++] = (uint16_t)p->data.len;
        cube_buf_add(&p->data, entry, len);
        if (cube_store_pack_bytes(p, 0, p->count) <= 2 * CUBE_STORE_PAGE)
            return;
        while (cube_store_pack_bytes(p, 0, n + 1) <= CUBE_STORE_PAGE)
            n++;
        len = cube_store_walk_emit(w, level, n, above);
        entry = above;
    }
}

/* Empties a pack into one page, or two halves. A pack never holds more than
 * two pages' worth, so halves are legal pages. Afterwards it is empty. */
static void cube_store_walk_flush(struct cube_store_walk *w, int level)
{
    struct cube_store_pack *p = cube_store_walk_pack(w, level);
    uint8_t above[CUBE_STORE_KEY_MAX + 32];

    while (p->count > 0) {
        size_t all = cube_store_pack_bytes(p, 0, p->count), len;
        uint32_t n = 1;

        if (all <= CUBE_STORE_PAGE)
            n = p->count;
        while (n < p->count && cube_store_pack_bytes(p, 0, n) < all / 2)
            n++;
        len = cube_store_walk_emit(w, level, n, above);
        cube_store_walk_add(w, level + 1, above, len);
    }
}

/* Adds a key with its value to the leaves. The value stays where it is (at
 * place, if it stands in this file), or goes into the leaf, or before it.
 *      value of ..        stands in a batch or page     is in memory only
 *      up to 64 bytes     copied into the leaf          into the leaf
 *      up to 1024         stays, by reference           into the leaf
 *      more               stays, by reference           before the leaf
 */
static void cube_store_walk_put(struct cube_store_walk *w,
                                const uint8_t *key, uint32_t key_len,
                                const uint8_t *val, uint32_t val_len,
                                uint64_t place)
{
    uint8_t e[CUBE_STORE_KEY_MAX + CUBE_STORE_INLINE + 32];
    size_t n = cube_store_put_var(e, key_len);

    memcpy(e + n, key, key_len);
    n += key_len;
    if (val_len <= (place > 0 ? CUBE_STORE_SMALL : CUBE_STORE_INLINE)) {
        n += cube_store_put_var(e + n, val_len << 1);
        cube_store_put16(e + n, 0); /* its place in the page, later */
        n += 2;
        if (val_len > 0)
            memcpy(e + n, val, val_len);
        cube_store_walk_add(w, 0, e, n + val_len);
        return;
    }
    if (place == 0) {
        place = cube_store_walk_at(w);
        cube_buf_add(&w->group, val, val_len);
    }
    n += cube_store_put_var(e + n, val_len << 1 | 1);
    cube_store_put64(e + n, place);
    cube_store_put32(e + n + 8,
                     cube_store_crc(w->to->file->crc, 0, val, val_len));
    cube_store_walk_add(w, 0, e, n + 12);
}

/* Takes an entry of an old leaf over. In the same file its value stays where
 * it is: the bytes of a page that no tree has any more are still there. A copy
 * reads every value, and so notices damage in any of them before the old file
 * is given up. -1: such a value could not be read. */
static int cube_store_walk_keep(struct cube_store_walk *w,
                                const struct cube_store_ext *page,
                                const struct cube_store_item *i,
                                struct cube_err *err)
{
    bool is_same = w->from->file == w->to->file;
    struct cube_store_ext *e;
    uint8_t entry[CUBE_STORE_KEY_MAX + 32];
    size_t n;

    if (i->val) {
        cube_store_walk_put(w, i->key, i->key_len, i->val, i->val_len,
                            is_same && !w->is_copy
                            ? page->at + (uint64_t)(i->val - page->data)
                            : 0);
        return 0;
    }
    if (is_same && !w->is_copy) {
        n = cube_store_put_var(entry, i->key_len);
        memcpy(entry + n, i->key, i->key_len);
        n += i->key_len;
        n += cube_store_put_var(entry + n, i->val_len << 1 | 1);
        cube_store_put64(entry + n, i->ref.at);
        cube_store_put32(entry + n + 8, i->ref.crc);
        cube_store_walk_add(w, 0, entry, n + 12);
        return 0;
    }
    e = cube_store_load(w->from->file, i->ref, page->at, err);
    if (!e)
        return -1;
    cube_store_walk_put(w, i->key, i->key_len, e->data, e->len, 0);
    cube_store_unpin(e);
    return 0;
}

/* Applies the next change; old is the entry that it replaces, or NULL. The
 * counts of the tree follow each change, so that the roots need no pass of
 * their own to know them. */
static void cube_store_walk_change(struct cube_store_walk *w,
                                   const struct cube_store_item *old)
{
    struct cube_store_tree *t = &w->to->trees[w->tree];
    const struct cube_store_node *n = w->op;

    if (old) {
        t->count--;
        t->bytes -= old->key_len + old->val_len;
    }
    if (!n->is_del) {
        t->count++;
        t->bytes += (uint64_t)n->key_len + n->val_len;
        cube_store_walk_put(w, cube_store_node_key(n), n->key_len, n->val,
                            n->val_len, n->place);
    }
    w->op = cube_store_mem_next(n, UINT64_MAX);
}

/* Where what is below step d ends: the key of the next entry there or
 * further up. NULL: it has no end. */
static const uint8_t *cube_store_walk_bound(const struct cube_store_walk *w,
                                            int d, uint32_t *len)
{
    for (; d >= 0; d--) {
        const struct cube_store_step *s = &w->path.steps[d];

        if (s->i + 1 < cube_store_page_count(s->page->data))
            return cube_store_page_key(s->page->data, s->i + 1, len);
    }
    return NULL;
}

/* Does the next change fall before this bound? */
static bool cube_store_walk_is_due(const struct cube_store_walk *w,
                                   const uint8_t *bound, uint32_t len)
{
    return w->op && (!bound ||
                     cube_store_order(cube_store_node_key(w->op),
                                      w->op->key_len, bound, len) < 0);
}

/* Goes back to the parent, to its next child. */
static void cube_store_walk_up(struct cube_store_walk *w)
{
    cube_store_unpin(w->path.steps[--w->path.depth].page);
    if (w->path.depth > 0)
        w->path.steps[w->path.depth - 1].i++;
}

/* Merges some entries of the leaf with the changes that fall into it. At most
 * 128 entries, so that a step stays short. It can be left in the middle: the
 * place in the leaf is the path's, the next change is w->op. */
static int cube_store_walk_leaf(struct cube_store_walk *w,
                                struct cube_err *err)
{
    struct cube_store_step *s = &w->path.steps[w->path.depth - 1];
    uint32_t n = cube_store_page_count(s->page->data), len = 0;
    const uint8_t *bound = cube_store_walk_bound(w, w->path.depth - 2, &len);

    /* r: the next change stands before (-1), at (0) or behind (1) the next
     * entry. Without an entry a change that is due stands before. */
    for (int i = 0; i < 128 && w->group.len < CUBE_STORE_GROUP; i++) {
        bool is_due = cube_store_walk_is_due(w, bound, len);
        struct cube_store_item item;
        int r = -1;

        if (s->i >= n && !is_due) {
            cube_store_walk_up(w);
            return 0;
        }
        if (s->i < n) {
            cube_store_page_item(s->page->data, s->i, &item);
            r = is_due ? cube_store_order(cube_store_node_key(w->op),
                                          w->op->key_len, item.key,
                                          item.key_len) : 1;
        }
        if (r > 0 && cube_store_walk_keep(w, s->page, &item, err) < 0)
            return -1;
        if (r <= 0)
            cube_store_walk_change(w, r == 0 ? &item : NULL);
        if (r >= 0)
            s->i++;
    }
    return 0;
}

/* Takes children over until one has to be gone into, or none is left. A child
 * is gone into when a change falls into it, when all is copied, or when what
 * was packed below is less than a quarter of a page and wants more entries.
 * Before one is taken over all lower packs are flushed, since their keys stand
 * before its keys. */
static int cube_store_walk_branch(struct cube_store_walk *w,
                                  struct cube_err *err)
{
    struct cube_store_step *s = &w->path.steps[w->path.depth - 1];
    const uint8_t *page = s->page->data;
    int level = page[0];
    struct cube_store_pack *below = cube_store_walk_pack(w, level - 1);

    for (; s->i < cube_store_page_count(page); s->i++) {
        uint8_t entry[CUBE_STORE_KEY_MAX + 32];
        struct cube_store_item item;
        uint32_t len = 0;
        const uint8_t *bound = cube_store_walk_bound(w, w->path.depth - 1,
                                                     &len);
        size_t n;

        cube_store_page_item(page, s->i, &item);
        if (w->is_copy || cube_store_walk_is_due(w, bound, len) ||
            (below->count > 0 && cube_store_pack_bytes(below, 0, below->count)
             < CUBE_STORE_PAGE / 4))
            return cube_store_path_push(&w->path, item.ref, level - 1, err);
        for (int i = 0; i < level; i++)
            cube_store_walk_flush(w, i);
        n = cube_store_put_var(entry, item.key_len);
        memcpy(entry + n, item.key, item.key_len);
        n += item.key_len;
        cube_store_put64(entry + n, item.ref.at);
        cube_store_put32(entry + n + 8, item.ref.len);
        cube_store_put32(entry + n + 12, item.ref.crc);
        cube_store_walk_add(w, level, entry, n + 16);
    }
    cube_store_walk_up(w);
    return 0;
}

/* Begins with the next tree; one without changes is taken over. */
static int cube_store_walk_start(struct cube_store_walk *w,
                                 struct cube_err *err)
{
    struct cube_store_tree *to = &w->to->trees[w->tree];
    static const struct cube_store_tree none;
    const struct cube_store_tree *t = w->tree < w->from->count
        ? &w->from->trees[w->tree] : &none;

    to->count = t->count;
    to->bytes = t->bytes;
    w->op = NULL;
    if (w->ops)
        w->op = cube_store_mem_visible(
            cube_store_mem_find(w->ops, (unsigned)w->tree,
                                (const uint8_t *)"", 0, UINT64_MAX, NULL),
            (unsigned)w->tree, UINT64_MAX);
    if (!w->op && !w->is_copy) {
        to->root = t->root;
        to->levels = t->levels;
        w->tree++;
        return 0;
    }
    w->is_in_tree = true;
    if (t->levels == 0)
        return 0;
    return cube_store_path_push(&w->path, t->root, t->levels - 1, err);
}

/* The highest level whose pack holds something; -1 if none does. */
static int cube_store_walk_top(const struct cube_store_walk *w)
{
    int top = CUBE_STORE_DEPTH - 1;

    while (top >= 0 && (!w->packs[top] || w->packs[top]->count == 0))
        top--;
    return top;
}

/* Writes the packs that are left, from the leaves up, until one entry alone is
 * at the top: that is the root. A branch with a single child is no use, so the
 * level above the last page of all is the root's reference itself. A tree that
 * has lost its last key has no levels and no root. */
static void cube_store_walk_finish(struct cube_store_walk *w)
{
    struct cube_store_tree *t = &w->to->trees[w->tree];
    int top, level = 0;

    t->levels = 0;
    memset(&t->root, 0, sizeof t->root);
    while ((top = cube_store_walk_top(w)) >= 0) {
        struct cube_store_pack *p = w->packs[top];

        if (top > 0 && level >= top && p->count == 1) {
            const uint8_t *e = (const uint8_t *)p->data.data;
            uint32_t key_len = cube_store_get_var(&e);

            e += key_len;
            t->levels = top;
            t->root.at = cube_store_get64(e);
            t->root.len = cube_store_get32(e + 8);
            t->root.crc = cube_store_get32(e + 12);
            cube_buf_clear(&p->data);
            p->count = 0;
        } else {
            cube_store_walk_flush(w, level++);
        }
    }
    w->is_in_tree = false;
    w->tree++;
}

/* Changes beyond an old tree that is empty. */
static void cube_store_walk_rest(struct cube_store_walk *w)
{
    for (int i = 0; i < 128 && w->op && w->group.len < CUBE_STORE_GROUP; i++)
        cube_store_walk_change(w, NULL);
}

/* The smallest step: a branch page until one child has to be gone into, or
 * some entries of a leaf, or the end of a tree. */
static int cube_store_walk_unit(struct cube_store_walk *w,
                                struct cube_err *err)
{
    if (!w->is_in_tree)
        return cube_store_walk_start(w, err);
    if (w->path.depth > 0 &&
        w->path.steps[w->path.depth - 1].page->data[0] > 0)
        return cube_store_walk_branch(w, err);
    if (w->path.depth > 0)
        return cube_store_walk_leaf(w, err);
    if (w->op)
        cube_store_walk_rest(w);
    else
        cube_store_walk_finish(w);
    return 0;
}

/* Goes on for a while and writes the pages that are full. to->count says how
 * many trees there are. 1: there is more to do; 0: to is complete. After -1
 * the walk can only be freed. A step writes at most one 'P' record, and adds
 * nothing to it beyond about 32 kB; that bounds how long it keeps a commit
 * waiting. */
static int cube_store_walk_step(struct cube_store_walk *w,
                                struct cube_err *err)
{
    for (int i = 0; i < 16 && w->tree < w->to->count &&
         w->group.len < CUBE_STORE_GROUP / 2; i++) {
        if (cube_store_walk_unit(w, err) < 0)
            return -1;
    }
    w->done_bytes = w->group.len;
    if (w->group.len > CUBE_STORE_HEAD) {
        if (cube_store_rec_append(w->to->file, 'P', &w->group,
                                  w->to->commit, err) < 0)
            return -1;
        cube_store_rec_begin(&w->group);
    }
    return w->tree < w->to->count;
}

/* ---- The store ---- */

/* What a compaction does next. Each step that is not the last of its phase
 * stays in it; any failure drops all.
 *
 *     COPY --> CATCH --> TAIL --> SYNCING --> SWAP --> (done: the new file)
 */
enum cube_store_phase {
    CUBE_STORE_COPY,   /* the old trees, as of when it began */
    CUBE_STORE_CATCH,  /* what was committed since, merged in big bites */
    CUBE_STORE_TAIL,   /* the rest, record by record */
    CUBE_STORE_SYNCING, /* waits for the caller's sync */
    CUBE_STORE_SWAP    /* the last records, rename */
};

/* A compaction on its way: a new file beside the old one. An object's, at most
 * one per store. Nothing in it is seen by readers before the swap, so it can
 * be dropped at any point. */
struct cube_store_comp {
    enum cube_store_phase phase;
    struct cube_store_file *out;
    struct cube_store_roots *from, *to; /* to: NULL before the first walk is
                                           done */
    struct cube_store_walk *walk;
    struct cube_store_mem *mem; /* CATCH: the bite; later: the new overlay */
    uint64_t at, tail_at;       /* the next record of the old file to read;
                                   where the bite began */
    uint32_t crc, tail_crc;
    struct cube_buf buf;
};

struct cube_store {
    const struct cube_world *world;
    char *path;   /* NULL: in memory */
    int lock_fd;  /* -1: none */
    struct cube_store_options options;
    struct cube_store_crc crc;
    struct cube_store_cache cache;
    size_t mem_max; /* an overlay of more is frozen */
    struct cube_store_file *file;
    uint32_t file_number;
    struct cube_store_view view; /* the last commit */
    uint64_t done_end;           /* where its record ends */

    char names[CUBE_STORE_TREES_MAX][CUBE_STORE_NAME_MAX + 1];
    uint64_t named[CUBE_STORE_TREES_MAX]; /* by which commit; 0: by none */
    int name_count;

    /* The open batch: staged changes, in the overlay and as a record. */
    struct cube_buf batch;
    struct cube_store_node *batch_nodes;
    uint64_t batch_commit; /* the number that it will have */

    /* The batch that is being synced. */
    struct cube_store_node *flight_nodes;
    uint64_t flight_commit, flight_end; /* 0: none */

    struct cube_store_walk *checkpoint;
    struct cube_store_roots *pending; /* a checkpoint that is written, */
    uint64_t pending_end;             /* and on disk once all to here is */
    struct cube_store_comp *comp;
    uint64_t debt;     /* background bytes that commits have run up */
    uint64_t retry_at; /* no compaction before the file ends here, */
    int64_t retry_ms;  /* nor before this time */

    bool is_stuck;     /* a checkpoint failed, and no write since worked */
    bool is_broken;    /* a sync failed: only reads */
    bool is_dir_dirty; /* the rename to path is not known to be on disk */
    struct cube_err last;
    uint64_t checkpoints, compactions, dropped;
};

/* Then nothing is synced, locked or renamed. */
static bool cube_store_is_memory(const struct cube_store *s)
{
    return !s->path;
}

/* The number of a tree, or -1. */
static int cube_store_tree_find(const struct cube_store *s, const char *name)
{
    for (int i = 0; i < s->name_count; i++) {
        if (strcmp(s->names[i], name) == 0)
            return i;
    }
    return -1;
}

/* Gives a tree its name, as of a commit; 0: as of none yet. The name is not
 * checked here: it came from cube_store_may_stage, or out of a batch whose
 * lengths were. */
static void cube_store_tree_name(struct cube_store *s, int tree,
                                 const char *name, size_t len,
                                 uint64_t commit)
{
    memset(s->names[tree], 0, sizeof s->names[tree]);
    memcpy(s->names[tree], name, len);
    s->named[tree] = commit;
    if (s->name_count <= tree)
        s->name_count = tree + 1;
}

/* What a reader without a snapshot sees: the staged changes too. */
static struct cube_store_view cube_store_staged_view(
        const struct cube_store *s)
{
    struct cube_store_view v = s->view;

    v.commit = UINT64_MAX;
    return v;
}

/* ---- Batches ----
 *
 * The body of a 'B' record is the changes of one commit, one after another:
 *
 *     'T'  tree  length of its name, name           gives a number its name
 *     'P'  tree  length of key, length of value, key, value
 *     'D'  tree  length of key, key
 *
 * tree is one byte, lengths are LEB128. The batch that puts "a" = "1" into
 * "t", the first tree of a store:
 *
 *     54 00 01 74   50 00 01 01 61 31
 *     T  0  1  t    P  0  1  1  a  1
 *
 * A body without changes is a mark that something was synced. */
struct cube_store_change {
    char kind;
    uint8_t tree;
    const uint8_t *key, *val;
    uint32_t key_len, val_len;
};

/* Reads the change at *p and moves behind it; false if there is none. The
 * pointers lead into the bytes that were read. Every length is checked against
 * its limit and against what is left, so no file can make it read beyond end.
 */
static bool cube_store_change_read(const uint8_t **p, const uint8_t *end,
                                   struct cube_store_change *c)
{
    if (end - *p < 2)
        return false;
    memset(c, 0, sizeof *c);
    c->kind = (char)*(*p)++;
    c->tree = *(*p)++;
    if ((c->kind != 'T' && c->kind != 'P' && c->kind != 'D') ||
        c->tree >= CUBE_STORE_TREES_MAX ||
        !cube_store_read_var(p, end, &c->key_len) || c->key_len == 0 ||
        c->key_len > (c->kind == 'T' ? CUBE_STORE_NAME_MAX
                                     : CUBE_STORE_KEY_MAX) ||
        (c->kind == 'P' && !cube_store_read_var(p, end, &c->val_len)) ||
        c->val_len > CUBE_STORE_VALUE_MAX ||
        (size_t)c->key_len + c->val_len > (size_t)(end - *p))
        return false;
    c->key = *p;
    c->val = *p + c->key_len;
    *p = c->val + c->val_len;
    return true;
}

/* Applies a batch to an overlay. place is where its body stands in the file
 * that the overlay belongs to, or 0. false: these bytes are no batch. After
 * false the changes before the bad one are applied, which is why the caller
 * gives the whole store up. */
static bool cube_store_batch_apply(struct cube_store *s,
                                   struct cube_store_mem *mem,
                                   const struct cube_buf *body,
                                   uint64_t commit, uint64_t place)
{
    const uint8_t *start = (const uint8_t *)body->data, *p = start;
    const uint8_t *end;
    struct cube_store_change c;

    if (body->len == 0)
        return true;
    end = start + body->len;
    while (p < end) {
        struct cube_store_node n = {0};
        bool is_new;

        if (!cube_store_change_read(&p, end, &c))
            return false;
        if (c.kind == 'T') {
            cube_store_tree_name(s, c.tree, (const char *)c.key, c.key_len,
                                 commit);
            continue;
        }
        n.commit = commit;
        n.tree = c.tree;
        n.is_del = c.kind == 'D';
        n.key_len = (uint16_t)c.key_len;
        n.val = c.val;
        n.val_len = c.val_len;
        n.place = place > 0 && !n.is_del ? place + (uint64_t)(c.val - start)
                                         : 0;
        (void)cube_store_mem_put(mem, &n, c.key, &is_new);
    }
    return true;
}

/* Takes a batch's changes out of the overlays again. The nodes' memory stays
 * with the overlay until that is freed; *nodes is NULL afterwards. The freeze
 * at the end of a begin moves a batch from the first overlay to the second, so
 * both are searched. */
static void cube_store_undo(struct cube_store *s,
                            struct cube_store_node **nodes)
{
    for (struct cube_store_node *n = *nodes; n; n = n->batch) {
        cube_store_mem_unlink(s->view.mem[0], n);
        if (s->view.mem[1])
            cube_store_mem_unlink(s->view.mem[1], n);
    }
    *nodes = NULL;
}

/* Forgets names that no commit gave. */
static void cube_store_undo_names(struct cube_store *s, uint64_t from_commit)
{
    for (int i = 0; i < s->name_count; i++) {
        if (s->named[i] >= from_commit)
            s->named[i] = 0;
    }
}

/* Drops the open batch alone: one that is in flight goes on. Its changes are
 * seen by nobody after this. Trees that it named keep their numbers, and are
 * named again by the next batch that uses them. */
CUBE_API void cube_store_rollback(struct cube_store *s)
{
    cube_store_undo(s, &s->batch_nodes);
    cube_store_undo_names(s, s->batch_commit);
    cube_store_rec_begin(&s->batch);
}

/* ---- Files of a store ---- */

/* An object for a file that is opened by whoever calls. */
static struct cube_store_file *cube_store_file_new(struct cube_store *s,
                                                   const char *path)
{
    struct cube_store_file *f = cube_alloc(sizeof *f);

    f->refs = 1;
    f->world = s->world;
    f->crc = &s->crc;
    f->path = cube_text_dup(path ? path : "(memory)");
    f->fd = -1;
    f->number = ++s->file_number;
    return f;
}

/* A new file with a new ID, "PATH.new" until it is renamed; or in memory. NULL
 * after a failure, and then nothing is open; an unfinished PATH.new may be
 * left, which the next one truncates. The first record will continue the
 * checksum of the head, so the head is part of the chain. */
static struct cube_store_file *cube_store_file_create(struct cube_store *s,
                                                      struct cube_err *err)
{
    struct cube_store_file *f = cube_store_file_new(s, s->path);
    uint8_t head[CUBE_STORE_HEAD];
    struct cube_buf beside = {0};
    int r = s->world->random(s->world->ctx, f->id, sizeof f->id);

    cube_buf_printf(&beside, "%s.new", f->path);
    if (r >= 0 && s->path)
        r = f->fd = s->world->open(s->world->ctx, beside.data,
                                   CUBE_OPEN_WRITE | CUBE_OPEN_CREATE |
                                   CUBE_OPEN_TRUNC);
    cube_store_file_head(f, head);
    f->end = f->size = CUBE_STORE_HEAD;
    f->last_crc = cube_store_get32(head + 60);
    if (r >= 0)
        r = cube_store_write(f, 0, head, sizeof head);
    if (r < 0) {
        (void)cube_fail(err, cube_errno_code(r), "create %s: %s",
                        beside.data, cube_errno_text(r));
        cube_store_file_drop(f);
        f = NULL;
    }
    cube_buf_free(&beside);
    return f;
}

/* Puts the last rename on disk. Until that has worked no commit may be told
 * to anybody: a crash could bring the old file back. */
static int cube_store_dir_sync(struct cube_store *s, struct cube_err *err)
{
    struct cube_buf dir = {0};
    int r = 0;

    if (!s->path)
        return 0;
    cube_path_dir(s->path, &dir);
    r = s->world->sync_dir(s->world->ctx, dir.data);
    s->is_dir_dirty = r < 0;
    if (r < 0)
        (void)cube_fail(err, CUBE_EIO, "sync directory %s: %s", dir.data,
                        cube_errno_text(r));
    cube_buf_free(&dir);
    return r < 0 ? -1 : 0;
}

/* Gives a new file, synced by now, the store's name. When the rename is done
 * but the directory not synced, no commit will be acknowledged before it. */
static int cube_store_file_rename(struct cube_store *s, struct cube_err *err)
{
    struct cube_buf beside = {0};
    int r;

    if (!s->path)
        return 0;
    cube_buf_printf(&beside, "%s.new", s->path);
    r = s->world->rename(s->world->ctx, beside.data, s->path);
    if (r < 0)
        (void)cube_fail(err, cube_errno_code(r), "rename %s to %s: %s",
                        beside.data, s->path, cube_errno_text(r));
    cube_buf_free(&beside);
    if (r < 0)
        return -1;
    s->is_dir_dirty = true;
    return 0;
}

/* Writes the record that makes walked trees the ones to open. In a new file
 * (is_first) it is its own base, since that file has no name before all of it
 * is on disk. It is not synced here. After a failure the file's base is what
 * it was. */
static int cube_store_roots_write(struct cube_store_roots *r, bool is_first,
                                  struct cube_err *err)
{
    struct cube_buf b = {0};
    uint64_t base = r->file->base;
    int n;

    r->at = r->file->end;
    if (is_first) {
        r->replay = r->at;
        r->replay_crc = r->file->last_crc;
        r->file->base = r->at;
    }
    cube_store_roots_encode(r, &b);
    n = cube_store_rec_append(r->file, 'R', &b, r->commit, err);
    if (n < 0)
        r->file->base = base;
    cube_buf_free(&b);
    return n;
}

/* Adds the trees that were named by the commit of these roots. */
static void cube_store_roots_name(const struct cube_store *s,
                                  struct cube_store_roots *r)
{
    for (int i = 0; i < s->name_count; i++) {
        bool is_named = s->named[i] > 0 && s->named[i] <= r->commit;

        if (is_named)
            memcpy(r->trees[i].name, s->names[i], sizeof s->names[i]);
        if (is_named && r->count <= i)
            r->count = i + 1;
    }
}

/* ---- Checkpoints ----
 *
 * An overlay that is full is frozen; a walk merges it into the trees, in
 * steps, its pages in 'P' records between the batches of that time; an 'R'
 * record ends it. The new trees are used, and the frozen overlay freed, only
 * when a sync has put them on disk: what a failed sync may have eaten is then
 * never the only copy.
 *
 *     overlay full        walk done           next commit synced
 *          |                  |                       |
 *     -----+------------------+-----------------------+----------------> time
 *     filling | frozen, being merged | roots written  | trees replaced,
 *             | (a new one fills)    | ("pending")    | overlay freed
 *
 * Readers see the same all the time: overlay, frozen overlay and old trees
 * hold together what new overlay and new trees do. */

/* The walk from the trees in use, over the frozen overlay. */
static int cube_store_checkpoint_start(struct cube_store *s)
{
    struct cube_store_mem *frozen = s->view.mem[1];
    struct cube_store_walk *w = cube_store_walk_new(
        &s->cache, s->view.roots, s->file, frozen, false);

    w->to->commit = frozen->last_commit;
    w->to->replay = frozen->upto;
    w->to->replay_crc = frozen->upto_crc;
    w->to->count = s->view.roots->count;
    for (int i = 0; i < w->to->count; i++)
        memcpy(w->to->trees[i].name, s->view.roots->trees[i].name,
               sizeof w->to->trees[i].name);
    cube_store_roots_name(s, w->to);
    s->checkpoint = w;
    return 1;
}

/* Forgets a checkpoint, even one that is written and not synced: the frozen
 * overlay is still there to begin anew. */
static void cube_store_checkpoint_abort(struct cube_store *s)
{
    cube_store_walk_free(s->checkpoint);
    s->checkpoint = NULL;
    cube_store_roots_drop(s->pending);
    s->pending = NULL;
}

/* 1: there is more to do; 0: not now; -1. It waits (0) while a batch of the
 * frozen overlay is not on disk, since a walk must not make changes part of
 * the trees that may still be undone. After a failure nothing is tried again
 * before a commit has been written: on a full disk that would only burn time.
 */
static int cube_store_checkpoint_step(struct cube_store *s,
                                      struct cube_err *err)
{
    struct cube_store_walk *w = s->checkpoint;
    int r;

    if (s->is_broken || s->is_stuck || s->pending || !s->view.mem[1] ||
        s->view.mem[1]->last_commit > s->view.commit)
        return 0;
    if (!w)
        return cube_store_checkpoint_start(s);
    r = cube_store_walk_step(w, err);
    s->debt -= s->debt < w->done_bytes ? s->debt : w->done_bytes;
    if (r == 0) {
        r = cube_store_roots_write(w->to, false, err);
        if (r == 0) {
            s->pending = w->to;
            s->pending->refs++;
            s->pending_end = s->file->end;
            cube_store_walk_free(w);
            s->checkpoint = NULL;
            return 0;
        }
    }
    if (r < 0) {
        cube_store_checkpoint_abort(s);
        s->is_stuck = true;
    }
    return r;
}

/* After a sync of all before end. The moment at which trees are replaced.
 * Readers who hold the old view keep the old trees and the old overlay; the
 * others see the same keys in the new ones. */
static void cube_store_checkpoint_synced(struct cube_store *s, uint64_t end)
{
    if (s->file->synced < end)
        s->file->synced = end;
    if (!s->pending || s->pending_end > end)
        return;
    cube_store_roots_drop(s->view.roots);
    cube_store_mem_drop(s->view.mem[1]);
    s->view.roots = s->pending;
    s->view.mem[1] = NULL;
    s->file->base = s->pending->at;
    s->pending = NULL;
    s->checkpoints++;
}

/* Freezes the overlay; all of it is in records that end at the file's end.
 * Called between two batches only, and only when no frozen one is there. */
static void cube_store_freeze(struct cube_store *s)
{
    s->view.mem[0]->upto = s->file->end;
    s->view.mem[0]->upto_crc = s->file->last_crc;
    s->view.mem[1] = s->view.mem[0];
    s->view.mem[0] = cube_store_mem_new();
}

/* ---- Compaction ----
 *
 * A new file is filled beside the old one while commits go on in that:
 *
 *     COPY     the trees as of now are walked, values and all
 *     CATCH    the batches of the old file since then are read and merged
 *              into the new trees, an overlay full at a time, until fewer
 *              than that are left
 *     TAIL     roots, then the batches that are left, as records
 *     SYNCING  the new file is synced; commits may go on meanwhile
 *     SWAP     with no commit in flight: the last batches, a short sync,
 *              rename, sync of the directory; from here on it is the file
 *
 *     old file   [ trees ][ b1 b2 b3 ... b90 | b91 b92 ]  <- commits go on
 *                    |             |             |
 *                  COPY          CATCH       TAIL, SWAP
 *                    v             v             v
 *     new file   [ trees     +  merged ][ R ][ b91 b92 ]
 *
 * A failure at any point drops the new file and changes nothing. After a
 * failed sync of the old file the same way leads to a file that can be
 * trusted again: only that nothing is read of the old one but its trees, all
 * on disk since an earlier sync; the batches come from the overlays. */

/* Forgets a compaction; the new file, if it is not in use by now, is closed. */
static void cube_store_comp_free(struct cube_store *s)
{
    struct cube_store_comp *c = s->comp;

    if (!c)
        return;
    cube_store_walk_free(c->walk);
    cube_store_file_drop(c->out);
    cube_store_roots_drop(c->from);
    cube_store_roots_drop(c->to);
    cube_store_mem_drop(c->mem);
    cube_buf_free(&c->buf);
    cube_free(c);
    s->comp = NULL;
}

/* Not again before the file has grown some, and a second has passed. */
static void cube_store_comp_postpone(struct cube_store *s)
{
    s->retry_at = s->file->end + CUBE_STORE_EXTENT_MAX;
    s->retry_ms = s->world->now_ms(s->world->ctx) + CUBE_STORE_RETRY_MS;
}

/* Drops the new file: nothing of the old one has changed. */
static void cube_store_comp_abort(struct cube_store *s)
{
    struct cube_buf beside = {0};

    if (!s->comp)
        return;
    cube_store_comp_free(s);
    cube_store_comp_postpone(s);
    if (!s->path)
        return;
    cube_buf_printf(&beside, "%s.new", s->path);
    (void)s->world->unlink(s->world->ctx, beside.data);
    cube_buf_free(&beside);
}

/* A walk of the compaction: from trees, over changes or whole. */
static void cube_store_comp_walk(struct cube_store *s,
                                 struct cube_store_roots *from,
                                 struct cube_store_mem *ops, uint64_t commit)
{
    struct cube_store_comp *c = s->comp;
    struct cube_store_roots *to;

    c->walk = cube_store_walk_new(&s->cache, from, c->out, ops, !ops);
    to = c->walk->to;
    to->commit = commit;
    to->count = from->count;
    for (int i = 0; i < to->count; i++)
        memcpy(to->trees[i].name, from->trees[i].name,
               sizeof to->trees[i].name);
    cube_store_roots_name(s, to);
}

/* Makes the new file and begins to copy the trees as of now. The old batches
 * to catch up with begin where those trees were frozen. */
static int cube_store_comp_start(struct cube_store *s, struct cube_err *err)
{
    struct cube_store_file *out = cube_store_file_create(s, err);
    struct cube_store_comp *c;

    if (!out)
        return -1;
    c = s->comp = cube_alloc(sizeof *c);
    c->out = out;
    c->from = s->view.roots;
    c->from->refs++;
    c->at = c->tail_at = c->from->replay;
    c->crc = c->tail_crc = c->from->replay_crc;
    c->mem = cube_store_mem_new();
    cube_store_comp_walk(s, c->from, NULL, c->from->commit);
    return 1;
}

/* Goes on with the walk; when it is done its trees are the ones so far. The
 * root record is not written yet, so their pages are before the end. 1 as long
 * as anything is left to do in the compaction; -1. */
static int cube_store_comp_walk_step(struct cube_store *s,
                                     struct cube_err *err)
{
    struct cube_store_comp *c = s->comp;
    int r = cube_store_walk_step(c->walk, err);

    s->debt -= s->debt < c->walk->done_bytes ? s->debt
                                             : c->walk->done_bytes;
    if (r != 0)
        return r;
    cube_store_roots_drop(c->to);
    c->to = c->walk->to;
    c->to->refs++;
    c->to->at = c->out->end;
    cube_store_walk_free(c->walk);
    c->walk = NULL;
    if (c->phase == CUBE_STORE_COPY)
        c->phase = CUBE_STORE_CATCH;
    return 1;
}

/* Reads the next batch of the old file into c->buf: 1; 0: there is none that
 * is committed; -1. Moves behind it. It stops at the end of the last commit
 * that was acknowledged, so a batch in flight, which may yet fail, never gets
 * into the new file. */
static int cube_store_comp_read(struct cube_store *s,
                                struct cube_store_rec *rec,
                                struct cube_err *err)
{
    struct cube_store_comp *c = s->comp;
    struct cube_store_file *f = c->from->file;

    while (c->at < s->done_end) {
        int r = cube_store_rec_head(f, c->at, rec, err);

        if (r > 0 && rec->kind == 'B')
            r = cube_store_rec_body(f, rec, &c->buf, err);
        if (r < 0)
            return -1;
        if (r == 0 || rec->prev != c->crc)
            return cube_store_corrupt(f, c->at, "a committed record is "
                                      "damaged", err);
        c->at = cube_store_rec_end(rec);
        c->crc = rec->crc;
        if (rec->kind == 'B')
            return 1;
    }
    return 0;
}

/* Begins the new file's tail: roots, and an empty overlay over them. The bite
 * that is not full is read again and not merged: as records in the tail it
 * costs less than a walk would. */
static int cube_store_comp_tail(struct cube_store *s, struct cube_err *err)
{
    struct cube_store_comp *c = s->comp;

    if (cube_store_roots_write(c->to, true, err) < 0)
        return -1;
    cube_store_mem_drop(c->mem);
    c->mem = cube_store_mem_new();
    c->at = c->tail_at;
    c->crc = c->tail_crc;
    c->phase = CUBE_STORE_TAIL;
    return 1;
}

/* Reads one batch, or goes on merging the bite that is full. */
static int cube_store_comp_catch(struct cube_store *s, struct cube_err *err)
{
    struct cube_store_comp *c = s->comp;
    struct cube_store_rec rec;
    int r;

    if (c->walk)
        return cube_store_comp_walk_step(s, err);
    if (c->mem->bytes > s->mem_max) {
        cube_store_comp_walk(s, c->to, c->mem, c->mem->last_commit);
        cube_store_mem_drop(c->mem);
        c->mem = cube_store_mem_new();
        c->tail_at = c->at;
        c->tail_crc = c->crc;
        return 1;
    }
    r = s->is_broken ? 0 : cube_store_comp_read(s, &rec, err);
    if (r == 0)
        return cube_store_comp_tail(s, err);
    if (r > 0 && !cube_store_batch_apply(s, c->mem, &c->buf, rec.commit, 0))
        return cube_store_corrupt(c->from->file, rec.at, "this is no batch",
                                  err);
    return r;
}

/* Appends c->buf to the new file as a batch, and to its overlay. */
static int cube_store_comp_append(struct cube_store *s, uint64_t commit,
                                  struct cube_err *err)
{
    struct cube_store_comp *c = s->comp;
    uint64_t place = c->out->end + CUBE_STORE_HEAD;
    struct cube_buf rec = {0};
    int r;

    cube_store_rec_begin(&rec);
    cube_buf_add(&rec, c->buf.data, c->buf.len);
    r = cube_store_rec_append(c->out, 'B', &rec, commit, err);
    cube_buf_free(&rec);
    if (r < 0)
        return -1;
    if (!cube_store_batch_apply(s, c->mem, &c->buf, commit, place))
        return cube_store_corrupt(c->from->file, c->at, "this is no batch",
                                  err);
    return 1;
}

/* Appends one change to a batch. */
static void cube_store_add_change(struct cube_buf *b, char kind, int tree,
                                  const void *key, size_t key_len,
                                  const void *val, size_t val_len)
{
    uint8_t head[2] = {(uint8_t)kind, (uint8_t)tree};

    cube_buf_add(b, head, 2);
    cube_store_add_var(b, (uint32_t)key_len);
    if (kind == 'P')
        cube_store_add_var(b, (uint32_t)val_len);
    cube_buf_add(b, key, key_len);
    if (val_len > 0)
        cube_buf_add(b, val, val_len);
}

/* After a failed sync: the committed changes of the overlays as one batch, the
 * older overlay first. For each key the newest version alone, which is all
 * that anybody can still ask for: batches that failed have been taken out by
 * now. Snapshots have their own hold on the old overlays. */
static int cube_store_comp_rescue(struct cube_store *s, struct cube_err *err)
{
    struct cube_store_comp *c = s->comp;

    cube_buf_clear(&c->buf);
    for (int i = 0; i < s->name_count; i++) {
        if (s->named[i] > 0)
            cube_store_add_change(&c->buf, 'T', i, s->names[i],
                                  strlen(s->names[i]), NULL, 0);
    }
    for (int i = 1; i >= 0; i--) {
        const struct cube_store_mem *m = s->view.mem[i];

        for (const struct cube_store_node *n = m ? m->head[0] : NULL; n;) {
            unsigned tree = n->tree;
            const struct cube_store_node *next;

            cube_store_add_change(&c->buf, n->is_del ? 'D' : 'P', n->tree,
                                  cube_store_node_key(n), n->key_len, n->val,
                                  n->val_len);
            next = cube_store_mem_next(n, UINT64_MAX);
            while (n && !next && n->tree == tree)
                n = n->next[0];
            n = next ? next : n;
        }
    }
    return cube_store_comp_append(s, s->view.commit, err);
}

/* Appends the batches that the new file lacks: 1, it has all; 0: it was one
 * of many; -1. */
static int cube_store_comp_append_next(struct cube_store *s,
                                       struct cube_err *err)
{
    struct cube_store_rec rec;
    int r = cube_store_comp_read(s, &rec, err);

    if (r <= 0)
        return r < 0 ? -1 : 1;
    return cube_store_comp_append(s, rec.commit, err) < 0 ? -1 : 0;
}

/* From here on the new file is the store. Staged changes, which are in no file
 * yet, move to the new overlay; snapshots keep the old file open. Nothing in
 * it can fail: by now the name leads to the new file. The open batch keeps its
 * number. */
static void cube_store_comp_swap(struct cube_store *s)
{
    struct cube_store_comp *c = s->comp;
    struct cube_store_node *n = s->batch_nodes;
    uint32_t old = s->file->number;

    cube_store_checkpoint_abort(s);
    s->batch_nodes = NULL;
    for (; n; n = n->batch) {
        bool is_new;
        struct cube_store_node *m = cube_store_mem_put(
            c->mem, n, cube_store_node_key(n), &is_new);

        m->batch = s->batch_nodes;
        s->batch_nodes = m;
    }
    cube_store_roots_drop(s->view.roots);
    cube_store_mem_drop(s->view.mem[0]);
    cube_store_mem_drop(s->view.mem[1]);
    cube_store_file_drop(s->file);
    s->view.mem[1] = NULL;
    s->view.roots = c->to;
    s->view.mem[0] = c->mem;
    s->file = c->out;
    s->file->synced = s->file->end;
    s->done_end = s->file->end;
    c->to = NULL;
    c->mem = NULL;
    c->out = NULL;
    cube_store_cache_forget(&s->cache, old);
    cube_store_comp_free(s);
    s->is_broken = false;
    s->retry_at = 0;
    s->debt = 0;
    s->compactions++;
}

/* The last step: with nothing in flight. 0 while a commit is in flight: its
 * record may have to come along. When the sync of the directory fails the swap
 * stands nevertheless, and commits wait until that sync has worked. */
static int cube_store_comp_finish(struct cube_store *s, struct cube_err *err)
{
    struct cube_store_comp *c = s->comp;
    uint64_t end = c->out->end;
    int r = s->is_broken ? 1 : 0;

    if (s->flight_commit > 0)
        return 0;
    while (r == 0)
        r = cube_store_comp_append_next(s, err);
    if (r < 0)
        return -1;
    if (c->out->end > end && cube_store_sync(c->out, err) < 0)
        return -1;
    if (cube_store_file_rename(s, err) < 0)
        return -1;
    cube_store_comp_swap(s);
    (void)cube_store_dir_sync(s, &s->last);
    return 1;
}

/* The new file's first sync, here or by the caller. 0 with may_wait: a thread
 * of the caller's syncs cube_store_slice_fd and tells cube_store_slice_synced,
 * so that no loop stands still for it. */
static int cube_store_comp_sync(struct cube_store *s, bool may_wait,
                                struct cube_err *err)
{
    if (s->comp->out->fd >= 0 && may_wait)
        return 0;
    if (cube_store_sync(s->comp->out, err) < 0)
        return -1;
    s->comp->phase = CUBE_STORE_SWAP;
    return 1;
}

/* One step of the phase it is in: 1, 0 (waits for somebody), -1. */
static int cube_store_comp_phase(struct cube_store *s, bool may_wait,
                                 struct cube_err *err)
{
    int r;

    switch (s->comp->phase) {
    case CUBE_STORE_COPY:
        return cube_store_comp_walk_step(s, err);
    case CUBE_STORE_CATCH:
        return cube_store_comp_catch(s, err);
    case CUBE_STORE_TAIL:
        r = s->is_broken ? cube_store_comp_rescue(s, err)
                         : cube_store_comp_append_next(s, err);
        if (r > 0)
            s->comp->phase = CUBE_STORE_SYNCING;
        return r < 0 ? -1 : 1;
    case CUBE_STORE_SYNCING:
        return cube_store_comp_sync(s, may_wait, err);
    case CUBE_STORE_SWAP:
        return cube_store_comp_finish(s, err);
    }
    return 0;
}

/* Is the garbage worth the copying? Yes, when the file is longer than one and
 * a half times what lives, plus what is normal for a tail and its overlays. A
 * store whose sync failed always wants one, as soon as the pause since the
 * last try is over. */
static bool cube_store_comp_is_due(const struct cube_store *s)
{
    uint64_t count, live = cube_store_roots_sum(s->view.roots, &count);
    uint64_t slack = cube_store_is_memory(s) ? CUBE_STORE_SLACK_MEMORY
                                             : CUBE_STORE_SLACK;

    if (s->retry_ms > 0 && s->world->now_ms(s->world->ctx) < s->retry_ms)
        return false;
    if (s->is_broken || s->retry_at > s->file->end)
        return s->is_broken;
    return s->file->end > live + live / 2 + slack + s->view.mem[0]->bytes +
                          (s->view.mem[1] ? s->view.mem[1]->bytes : 0);
}

/* 1: there is more to do; 0: not now; -1: it failed, and was dropped. */
static int cube_store_comp_step(struct cube_store *s, bool may_wait,
                                struct cube_err *err)
{
    int r;

    if (!s->comp) {
        if (!cube_store_comp_is_due(s))
            return 0;
        r = cube_store_comp_start(s, err);
        if (r < 0)
            cube_store_comp_postpone(s);
        return r;
    }
    r = cube_store_comp_phase(s, may_wait, err);
    if (r < 0)
        cube_store_comp_abort(s);
    return r;
}

/* One step of whatever waits: 1, more; 0, nothing now; -1, it failed. */
static int cube_store_work(struct cube_store *s, bool may_wait,
                           struct cube_err *err)
{
    int r;

    if (s->options.is_read_only)
        return 0;
    r = cube_store_checkpoint_step(s, err);
    return r ? r : cube_store_comp_step(s, may_wait, err);
}

/* ---- Opening ----
 *
 * A file after a crash, the commit of b7 torn:
 *
 *     | head | ... P P R | b4 b5 P b6 | b7 xxxx 0000 xx | 0 0 0 0 0
 *                      ^    ^      ^    ^             ^
 *                      |    |      |    |             last byte that is not 0
 *                      |    |      |    its checksum fails: cut off here
 *                      |    |      last whole record, found from the end
 *                      |    synced, as b6 says: damage up to here is damage
 *                      base, as b6 says: these trees are on disk
 *
 *   1. Backwards from the end, find a whole record (b6).
 *   2. Read the roots that it calls its base.
 *   3. From where these say, go from record to record as long as each
 *      continues the one before; apply the batches, pass over the rest.
 *   4. If that ends before what is known to be on disk, say so and stop.
 *   5. Write what no later record vouches for once more, clear what is behind
 *      the end, sync. Only then is anything told to anybody.
 *
 * The way back in 1 is as long as the zeros ahead and what the last commit
 * wrote, the way forward in 3 as the overlays can be large; neither grows
 * with the number of keys. */
#define CUBE_STORE_CHUNK 65536

/* Looks for the last whole record, backwards from the end of the file. Leaves
 * its body in body; *used is the end of the last byte that is not zero. 1, 0
 * or -1. Headers can only begin at multiples of 16, so those are looked at,
 * and a place is a candidate only if its letters, its own offset and its
 * checksum agree; a user's value can forge the first two, but not the
 * checksum, which the file's random ID seeds. */
static int cube_store_scan(const struct cube_store_file *f,
                           struct cube_store_rec *rec, struct cube_buf *body,
                           uint64_t *used, struct cube_err *err)
{
    uint8_t *p = cube_alloc(CUBE_STORE_CHUNK + CUBE_STORE_HEAD);
    uint64_t lo = f->size & ~(uint64_t)(CUBE_STORE_CHUNK - 1);
    int r = 0;

    *used = 0;
    for (; r == 0; lo -= CUBE_STORE_CHUNK) {
        int64_t n = cube_store_pread(f, lo, p,
                                     CUBE_STORE_CHUNK + CUBE_STORE_HEAD);
        int64_t i = n;

        if (n < 0)
            r = cube_fail(err, cube_errno_code(n), "read %s: %s", f->path,
                          cube_errno_text(n));
        while (i > 0 && p[i - 1] == 0) /* zeros laid out ahead */
            i--;
        if (i > 0 && *used == 0)
            *used = lo + (uint64_t)i;
        /* What begins behind the chunk was looked at in the round before; its
         * first bytes are read again for headers that stand across. */
        if (i > CUBE_STORE_CHUNK - 1)
            i = CUBE_STORE_CHUNK - 1;
        for (i &= ~(int64_t)(CUBE_STORE_ALIGN - 1); i >= 0 && r == 0;
             i -= CUBE_STORE_ALIGN) {
            if (i + CUBE_STORE_HEAD <= n &&
                cube_store_rec_decode(f, lo + (uint64_t)i, p + i, rec))
                r = cube_store_rec_body(f, rec, body, err);
        }
        if (lo == 0)
            break;
    }
    cube_free(p);
    return r;
}

/* Reads the roots that the record at this offset has. The caller has one hold
 * of what is returned, NULL after a failure. */
static struct cube_store_roots *cube_store_roots_read(
        struct cube_store_file *f, uint64_t at, struct cube_err *err)
{
    struct cube_store_roots *roots = cube_store_roots_new(f);
    struct cube_buf body = {0};
    struct cube_store_rec rec;
    int r = cube_store_rec_head(f, at, &rec, err);

    if (r > 0)
        r = cube_store_rec_body(f, &rec, &body, err);
    if (r == 0 || (r > 0 && (rec.kind != 'R' ||
                             !cube_store_roots_decode(roots, &body))))
        r = cube_store_corrupt(f, at, "the roots are damaged", err);
    if (r < 0) {
        cube_store_roots_drop(roots);
        roots = NULL;
    } else {
        roots->at = at;
        roots->commit = rec.commit;
    }
    cube_buf_free(&body);
    return roots;
}

/* Applies the record after s->file->end, if a whole one stands there: 1, it
 * did; 0, none; -1. A record that does not continue the one before ends the
 * replay, even if it is whole in itself: it is left over from a commit that
 * was cut off at an earlier opening. */
static int cube_store_replay_next(struct cube_store *s, struct cube_buf *body,
                                  struct cube_err *err)
{
    struct cube_store_file *f = s->file;
    struct cube_store_rec rec;
    int r = cube_store_rec_head(f, f->end, &rec, err);

    if (r > 0 && (rec.prev != f->last_crc ||
                  rec.at + CUBE_STORE_HEAD + rec.len > f->size))
        r = 0;
    if (r > 0 && rec.kind == 'B')
        r = cube_store_rec_body(f, &rec, body, err);
    if (r <= 0)
        return r;
    if (rec.kind == 'B' &&
        !cube_store_batch_apply(s, s->view.mem[0], body, rec.commit,
                                rec.at + CUBE_STORE_HEAD))
        return cube_store_corrupt(f, rec.at, "this is no batch", err);
    if (rec.kind == 'B')
        s->view.commit = rec.commit;
    f->end = cube_store_rec_end(&rec);
    f->last_crc = rec.crc;
    return 1;
}

/* Makes sure of what a reader will see: the records that no later one vouches
 * for are written once more and synced. They may be in the system's memory
 * only, and, if a sync failed before, look as if they were on disk. What an
 * unfinished commit left behind them becomes zeros. */
static int cube_store_repair(struct cube_store *s, uint64_t from,
                             uint64_t used, struct cube_err *err)
{
    struct cube_store_file *f = s->file;
    uint8_t *p = cube_alloc(CUBE_STORE_CHUNK);
    int r = 0;

    while (from < f->end && r == 0) {
        size_t len = f->end - from < CUBE_STORE_CHUNK
                     ? (size_t)(f->end - from) : CUBE_STORE_CHUNK;
        int64_t n = cube_store_pread(f, from, p, len);

        r = n < 0 ? (int)n : cube_store_write(f, from, p, (size_t)n);
        from += len;
    }
    cube_free(p);
    if (r == 0 && used > f->end)
        r = cube_store_write_zeros(f, f->end, used);
    if (r < 0)
        return cube_fail(err, cube_errno_code(r), "write %s: %s", f->path,
                         cube_errno_text(r));
    if (f->size < f->end)
        f->size = f->end;
    return cube_store_sync(f, err);
}

/* From the bytes of the file to the state after its last whole commit. -1
 * leaves s to be closed, and the file as it was, unless the repair itself had
 * begun. The bytes that were cut off are counted in s->dropped. */
static int cube_store_recover(struct cube_store *s, struct cube_buf *body,
                              struct cube_err *err)
{
    struct cube_store_file *f = s->file;
    struct cube_store_rec last;
    uint64_t used;
    int r = cube_store_scan(f, &last, body, &used, err);

    if (r <= 0)
        return r < 0 ? -1 : cube_store_corrupt(f, CUBE_STORE_HEAD,
                                               "there is no whole record",
                                               err);
    s->view.roots = cube_store_roots_read(f, last.base, err);
    if (!s->view.roots)
        return -1;
    f->base = last.base;
    f->end = s->view.roots->replay;
    f->last_crc = s->view.roots->replay_crc;
    s->view.commit = s->view.roots->commit;
    for (int i = 0; i < s->view.roots->count; i++)
        cube_store_tree_name(s, i, s->view.roots->trees[i].name,
                             strlen(s->view.roots->trees[i].name),
                             s->view.commit);
    do
        r = cube_store_replay_next(s, body, err);
    while (r > 0);
    if (r < 0)
        return -1;
    if (f->end < last.synced || f->end <= f->base)
        return cube_store_corrupt(f, f->end, "a record is damaged that was "
                                  "on disk once", err);
    s->dropped = used > f->end ? used - f->end : 0;
    if (!s->options.is_read_only && (s->dropped > 0 || last.len > 0 ||
                                     last.kind != 'B') &&
        cube_store_repair(s, last.synced, used, err) < 0)
        return -1;
    f->synced = s->done_end = f->end;
    return 0;
}

/* The store of a file that exists. The caller frees s after a failure. The
 * file owns fd from the first line on, also when this fails. */
static int cube_store_open_file(struct cube_store *s, int fd,
                                struct cube_err *err)
{
    struct cube_buf body = {0};
    int64_t size;
    int r;

    s->file = cube_store_file_new(s, s->path);
    s->file->fd = fd;
    size = s->world->size(s->world->ctx, fd);
    if (size < 0)
        return cube_fail(err, cube_errno_code(size), "read %s: %s", s->path,
                         cube_errno_text(size));
    s->file->size = (uint64_t)size;
    if (cube_store_file_read_head(s->file, err) < 0)
        return -1;
    r = cube_store_recover(s, &body, err);
    cube_buf_free(&body);
    return r;
}

/* A new store: the roots of no trees, under its name only when on disk. */
static int cube_store_open_new(struct cube_store *s, struct cube_err *err)
{
    s->file = cube_store_file_create(s, err);
    if (!s->file)
        return -1;
    s->view.roots = cube_store_roots_new(s->file);
    if (cube_store_roots_write(s->view.roots, true, err) < 0 ||
        cube_store_sync(s->file, err) < 0 ||
        cube_store_file_rename(s, err) < 0 || cube_store_dir_sync(s, err) < 0)
        return -1;
    s->file->synced = s->done_end = s->file->end;
    return 0;
}

/* A lock on a file beside, which stays when compaction replaces the store's.
 * The system drops it with the process, however that ends. The lock file stays
 * when the store is closed: removing it would let two processes lock two files
 * of one name. */
static int cube_store_lock(struct cube_store *s, struct cube_err *err)
{
    struct cube_buf path = {0};
    int r;

    cube_buf_printf(&path, "%s.lock", s->path);
    r = s->lock_fd = s->world->open(s->world->ctx, path.data,
                                    CUBE_OPEN_WRITE | CUBE_OPEN_CREATE);
    if (r >= 0)
        r = s->world->lock(s->world->ctx, s->lock_fd);
    if (r < 0 && s->lock_fd < 0 && s->options.is_read_only)
        r = 0; /* where nothing can be written, nobody writes */
    if (r == -EBUSY)
        (void)cube_fail(err, CUBE_EBUSY, "open %s: another process, or "
                        "another store of this one, has it open", s->path);
    else if (r < 0)
        (void)cube_fail(err, cube_errno_code(r), "lock %s: %s", path.data,
                        cube_errno_text(r));
    cube_buf_free(&path);
    return r < 0 ? -1 : 0;
}

/* Divides the memory: a quarter for two overlays, the rest for the cache. */
static void cube_store_set_options(struct cube_store *s,
                                   const struct cube_store_options *o)
{
    size_t bytes;

    if (o)
        s->options = *o;
    bytes = s->options.cache_bytes;
    if (bytes == 0)
        bytes = CUBE_STORE_CACHE;
    if (bytes < CUBE_STORE_CACHE_MIN)
        bytes = CUBE_STORE_CACHE_MIN;
    s->mem_max = bytes / 8;
    if (s->mem_max > CUBE_STORE_MEM_MAX)
        s->mem_max = CUBE_STORE_MEM_MAX;
    s->cache.max_bytes = bytes - 2 * s->mem_max;
}

/* ---- Changes and commits ----
 *
 * Two batches at most are on their way, the open one and the one in flight:
 *
 *                put, del                     begin
 *     (empty) ------------> open, number n ----------> in flight ---> commit
 *        ^                     |    ^ put, del: n + 1     |    end, 0   n
 *        |   rollback, or      |    |                     |
 *        +---------------------+    +- - - - - - - - - - -+
 *        |   begin failed                                 |  end, an error
 *        |                                                v
 *        +-------------------------------------------- broken: reads only,
 *             slice has written a new file             both batches dropped
 *
 * The batch that is staged on top of one that fails goes with it: it was made
 * by somebody who saw the other's changes. */

/* Checks what a caller passes, and gives the tree a number. Returns the tree's
 * number, or -1 and nothing has changed. A new name gets the next number at
 * once, but is written with the first change that uses it. */
static int cube_store_may_stage(struct cube_store *s, const char *tree,
                                size_t key_len, size_t val_len,
                                struct cube_err *err)
{
    size_t name_len = strlen(tree);
    int i = cube_store_tree_find(s, tree);

    if (s->options.is_read_only)
        return cube_fail(err, CUBE_EACCES, "put into %s: it was opened for "
                         "reading only", s->file->path);
    if (key_len == 0 || key_len > CUBE_STORE_KEY_MAX)
        return cube_fail(err, CUBE_EINVAL, "put into %s: a key has 1 to %d "
                         "bytes, not %zu", s->file->path, CUBE_STORE_KEY_MAX,
                         key_len);
    if (val_len > CUBE_STORE_VALUE_MAX ||
        s->batch.len + key_len + val_len > CUBE_STORE_COMMIT_MAX)
        return cube_fail(err, CUBE_ETOOBIG, "put %zu bytes into %s: a value "
                         "has at most %u, all of a commit %u", val_len,
                         s->file->path, CUBE_STORE_VALUE_MAX,
                         CUBE_STORE_COMMIT_MAX);
    if (i >= 0)
        return i;
    if (name_len == 0 || name_len > CUBE_STORE_NAME_MAX ||
        s->name_count == CUBE_STORE_TREES_MAX)
        return cube_fail(err, CUBE_EINVAL, "tree \"%s\" in %s: a name has 1 "
                         "to %d bytes, and a store %d trees", tree,
                         s->file->path, CUBE_STORE_NAME_MAX,
                         CUBE_STORE_TREES_MAX);
    cube_store_tree_name(s, s->name_count, tree, name_len, 0);
    return s->name_count - 1;
}

/* Stages a change: into the record of the open batch, and into the overlay,
 * where its place is counted from the start of that record. */
static int cube_store_stage(struct cube_store *s, const char *tree,
                            const void *key, size_t key_len, const void *val,
                            size_t val_len, bool is_del, struct cube_err *err)
{
    struct cube_store_node n = {0}, *node;
    bool is_new;
    int t = cube_store_may_stage(s, tree, key_len, val_len, err);

    if (t < 0)
        return -1;
    if (s->named[t] == 0) {
        s->named[t] = s->batch_commit;
        cube_store_add_change(&s->batch, 'T', t, tree, strlen(tree), NULL, 0);
    }
    cube_store_add_change(&s->batch, is_del ? 'D' : 'P', t, key, key_len,
                          val, val_len);
    n.commit = s->batch_commit;
    n.tree = (uint8_t)t;
    n.key_len = (uint16_t)key_len;
    n.is_del = is_del;
    n.val = val;
    n.val_len = (uint32_t)val_len;
    n.place = is_del ? 0 : s->batch.len - val_len;
    node = cube_store_mem_put(s->view.mem[0], &n, key, &is_new);
    if (is_new) {
        node->batch = s->batch_nodes;
        s->batch_nodes = node;
    }
    return 0;
}

/* A copy of key and value is taken. After -1 the batch is as it was. */
CUBE_API int cube_store_put(struct cube_store *s, const char *tree,
                            const void *key, size_t key_len,
                            const void *value, size_t value_len,
                            struct cube_err *err)
{
    return cube_store_stage(s, tree, key, key_len, value, value_len, false,
                            err);
}

/* Deleting what is not there is no error, and still a change: the tree is not
 * read to find out. Only a tree that has no name yet is left alone. */
CUBE_API int cube_store_del(struct cube_store *s, const char *tree,
                            const void *key, size_t key_len,
                            struct cube_err *err)
{
    if (cube_store_tree_find(s, tree) < 0)
        return 0;
    return cube_store_stage(s, tree, key, key_len, NULL, 0, true, err);
}

CUBE_API bool cube_store_is_dirty(const struct cube_store *s)
{
    return s->batch.len > CUBE_STORE_HEAD;
}

CUBE_API int cube_store_fd(const struct cube_store *s)
{
    return s->file->fd;
}

/* Has background work fallen behind what commits run up? True when a commit
 * must do background work itself before it may go on: both overlays are full,
 * the debt is too large, or the file has grown beyond twice what lives and a
 * compaction is due. */
static bool cube_store_is_behind(const struct cube_store *s, size_t more)
{
    uint64_t count, live = cube_store_roots_sum(s->view.roots, &count);

    if (s->view.mem[1] && s->view.mem[0]->bytes > s->mem_max)
        return true;
    if (s->comp && s->comp->phase == CUBE_STORE_SWAP)
        return true;
    return s->debt > CUBE_STORE_DEBT || (cube_store_comp_is_due(s) &&
           s->file->end + more > 2 * live + CUBE_STORE_LIMIT);
}

/* Pays with the time of a commit for the background work that nobody did in
 * slices, so that neither the overlay nor the file grows without bound. While
 * such work waits a batch is charged three times its length: it is written
 * again by a checkpoint, and again by a compaction, along with its neighbours.
 * When the work fails or has to wait the debt is waived; a commit never fails
 * because of it. */
static void cube_store_catch_up(struct cube_store *s)
{
    if (s->view.mem[1] || s->comp || cube_store_comp_is_due(s))
        s->debt += 3 * (uint64_t)s->batch.len;
    else
        s->debt = 0;
    while (cube_store_is_behind(s, s->batch.len)) {
        if (cube_store_work(s, false, &s->last) <= 0) {
            s->debt = 0;
            return;
        }
    }
}

/* Drops the batch that could not be written or synced, and what was staged on
 * top of it. Numbers that were given to it are given again: nobody has seen a
 * state with them, and the record on disk, if any, is written over. */
static void cube_store_fail_commit(struct cube_store *s)
{
    cube_store_undo(s, &s->batch_nodes);
    cube_store_undo(s, &s->flight_nodes);
    cube_store_undo_names(s, s->view.commit + 1);
    cube_store_rec_begin(&s->batch);
    s->flight_commit = 0;
    s->batch_commit = s->view.commit + 1;
}

/* After a failed sync: what it should have put on disk may read well and not
 * be there, and a later sync may succeed without it. From here on
 * cube_store_slice writes a new file from what is known to be good: trees that
 * were synced earlier and the overlays in memory. */
static void cube_store_distrust(struct cube_store *s)
{
    cube_store_checkpoint_abort(s);
    cube_store_comp_abort(s);
    s->retry_ms = 0;
    s->is_broken = true;
}

/* The batch is on disk, or needs no disk. */
static void cube_store_land(struct cube_store *s)
{
    s->view.commit = s->flight_commit;
    s->flight_commit = 0;
    s->flight_nodes = NULL;
    s->done_end = s->flight_end;
    cube_store_checkpoint_synced(s, s->flight_end);
}

/* Appends the open batch and makes it the one in flight; opens the next one.
 * A full overlay is frozen here, between two batches, so that what is in it
 * is exactly what is in the records so far. */
static int cube_store_commit_write(struct cube_store *s, struct cube_err *err)
{
    uint64_t at = s->file->end;

    if (cube_store_rec_append(s->file, 'B', &s->batch, s->batch_commit,
                              err) < 0) {
        cube_store_fail_commit(s);
        return -1;
    }
    for (struct cube_store_node *n = s->batch_nodes; n; n = n->batch)
        n->place += n->is_del ? 0 : at;
    s->flight_nodes = s->batch_nodes;
    s->flight_commit = s->batch_commit;
    s->flight_end = s->file->end;
    s->batch_nodes = NULL;
    s->batch_commit++;
    s->is_stuck = false;
    if (s->batch.cap > CUBE_STORE_EXTENT_MAX)
        cube_buf_free(&s->batch);
    cube_store_rec_begin(&s->batch);
    if (s->view.mem[0]->bytes > s->mem_max && !s->view.mem[1])
        cube_store_freeze(s);
    return 0;
}

/* 1: the caller syncs cube_store_fd and then calls cube_store_commit_end; 0:
 * there is nothing to wait for. -1 drops the batch, but for CUBE_EBUSY, after
 * which it is still open and can be begun later. */
CUBE_API int cube_store_commit_begin(struct cube_store *s,
                                     struct cube_err *err)
{
    if (!cube_store_is_dirty(s))
        return 0;
    if (s->flight_commit > 0)
        return cube_fail(err, CUBE_EBUSY, "commit to %s: one is in flight",
                         s->file->path);
    if (s->is_broken) {
        cube_store_fail_commit(s);
        return cube_fail(err, CUBE_ESYNC, "commit to %s: a sync failed, and "
                         "there is no new file yet: %s", s->file->path,
                         s->last.text);
    }
    cube_store_catch_up(s);
    if (s->is_dir_dirty && cube_store_dir_sync(s, err) < 0) {
        cube_store_fail_commit(s);
        return -1;
    }
    if (cube_store_commit_write(s, err) < 0)
        return -1;
    if (!cube_store_is_memory(s))
        return 1;
    cube_store_land(s);
    return 0;
}

/* sync_result is 0 or an errno value of either sign. After a failure the
 * changes are gone for all readers here, but may be found after a crash: the
 * error says "unknown", not "no". */
CUBE_API int cube_store_commit_end(struct cube_store *s, int sync_result,
                                   struct cube_err *err)
{
    if (s->flight_commit == 0)
        return 0;
    if (sync_result == 0) {
        cube_store_land(s);
        return 0;
    }
    (void)cube_fail(&s->last, CUBE_ESYNC, "sync %s: %s: whether this commit "
                    "is on disk is unknown", s->file->path,
                    strerror(sync_result < 0 ? -sync_result : sync_result));
    if (err)
        *err = s->last;
    cube_store_fail_commit(s);
    cube_store_distrust(s);
    return -1;
}

CUBE_API int cube_store_commit(struct cube_store *s, struct cube_err *err)
{
    int r = cube_store_commit_begin(s, err);

    if (r <= 0)
        return r;
    return cube_store_commit_end(s, s->world->sync(s->world->ctx,
                                                   s->file->fd), err);
}

/* ---- Background work ---- */

/* It may end later than budget_ms by one step, and by a sync where the caller
 * does not split those off. False: nothing to do now, or a step failed (then
 * cube_store_last_error says why, and it is tried again later). */
CUBE_API bool cube_store_slice(struct cube_store *s, int budget_ms)
{
    int64_t until = s->world->now_ms(s->world->ctx) + budget_ms;

    do {
        if (cube_store_work(s, s->options.is_sync_split, &s->last) <= 0)
            return false;
    } while (s->world->now_ms(s->world->ctx) < until);
    return true;
}

CUBE_API const char *cube_store_last_error(const struct cube_store *s)
{
    return s->last.text;
}

CUBE_API int cube_store_slice_fd(const struct cube_store *s)
{
    if (!s->comp || s->comp->phase != CUBE_STORE_SYNCING)
        return -1;
    return s->comp->out->fd;
}

CUBE_API void cube_store_slice_synced(struct cube_store *s, int sync_result)
{
    if (cube_store_slice_fd(s) < 0)
        return;
    if (sync_result == 0) {
        s->comp->phase = CUBE_STORE_SWAP;
        return;
    }
    (void)cube_fail(&s->last, CUBE_ESYNC, "sync %s.new: %s", s->path,
                    strerror(sync_result < 0 ? -sync_result : sync_result));
    cube_store_comp_abort(s);
}

/* Brings all that is committed into the trees, and those to disk. Twice, since
 * there can be a frozen overlay when it begins: the first round finishes that,
 * the second one takes what has been filled since. */
static int cube_store_settle(struct cube_store *s, struct cube_err *err)
{
    for (int i = 0; i < 2; i++) {
        int r = 1;

        s->is_stuck = false;
        if (!s->view.mem[1] && s->view.mem[0]->head[0])
            cube_store_freeze(s);
        while (r > 0)
            r = cube_store_checkpoint_step(s, err);
        if (r < 0)
            return -1;
        if (cube_store_sync(s->file, err) < 0) {
            cube_store_distrust(s);
            return -1;
        }
        cube_store_checkpoint_synced(s, s->file->end);
        s->done_end = s->file->end;
    }
    return 0;
}

CUBE_API int cube_store_compact(struct cube_store *s, struct cube_err *err)
{
    int r = 1;

    if (s->flight_commit > 0 || s->options.is_read_only)
        return cube_fail(err, CUBE_EBUSY, "compact %s: %s", s->file->path,
                         s->flight_commit > 0 ? "a commit is in flight"
                                              : "it is open for reading");
    cube_store_rollback(s);
    if (!s->is_broken && cube_store_settle(s, err) < 0)
        return -1;
    cube_store_comp_abort(s);
    if (cube_store_comp_start(s, err) < 0)
        return -1;
    while (r > 0 && s->comp)
        r = cube_store_comp_step(s, false, err);
    return r < 0 ? -1 : 0;
}

/* At the end of a store's life: with a long tail, it is brought into the
 * trees, and marked as synced, so that the next opening is quick. Failures are
 * not told: everything acknowledged is on disk already, only the next opening
 * will be slower. */
static void cube_store_leave(struct cube_store *s)
{
    cube_store_rollback(s);
    if (s->options.is_read_only || s->is_broken || !s->path || !s->file ||
        s->flight_commit > 0 ||
        s->view.mem[0]->bytes + (s->view.mem[1] ? s->view.mem[1]->bytes : 0) <
            CUBE_STORE_TAIL_SMALL)
        return;
    if (cube_store_settle(s, NULL) == 0 &&
        cube_store_rec_append(s->file, 'B', &s->batch, s->view.commit,
                              NULL) == 0)
        (void)cube_store_sync(s->file, NULL);
}

/* Staged changes are dropped, the lock is released. */
CUBE_API void cube_store_close(struct cube_store *s)
{
    if (!s)
        return;
    cube_store_leave(s);
    cube_store_comp_abort(s);
    cube_store_checkpoint_abort(s);
    cube_store_view_drop(&s->view);
    cube_store_file_drop(s->file);
    cube_store_cache_forget(&s->cache, 0);
    cube_free(s->cache.slots);
    cube_buf_free(&s->batch);
    if (s->lock_fd >= 0)
        s->world->close(s->world->ctx, s->lock_fd);
    cube_free(s->path);
    cube_free(s);
}

/* A failure is cleaned up by close itself; it is made read-only for that, so
 * that it writes nothing to a file that it did not understand. */
CUBE_API struct cube_store *cube_store_open(
        const struct cube_world *world, const char *path,
        const struct cube_store_options *options, struct cube_err *err)
{
    struct cube_store *s = cube_alloc(sizeof *s);
    int r = 0, fd = -ENOENT;

    s->world = world ? world : cube_world_real();
    s->path = cube_text_dup(path);
    s->lock_fd = -1;
    s->view.mem[0] = cube_store_mem_new();
    cube_store_crc_init(&s->crc);
    cube_store_set_options(s, options);
    cube_store_rec_begin(&s->batch);
    if (path)
        r = cube_store_lock(s, err);
    if (r == 0 && path)
        fd = s->world->open(s->world->ctx, path, s->options.is_read_only
                            ? 0 : CUBE_OPEN_WRITE);
    if (r == 0 && fd >= 0)
        r = cube_store_open_file(s, fd, err);
    else if (r == 0 && fd == -ENOENT && !s->options.is_read_only)
        r = cube_store_open_new(s, err);
    else if (r == 0)
        r = cube_fail(err, cube_errno_code(fd), "open %s: %s", path,
                      cube_errno_text(fd));
    s->batch_commit = s->view.commit + 1;
    if (r == 0)
        return s;
    s->options.is_read_only = true;
    cube_store_close(s);
    return NULL;
}

/* ---- Reading ---- */

struct cube_store_snap {
    struct cube_store *store;
    struct cube_store_view view;
};

CUBE_API struct cube_store_snap *cube_store_snapshot(struct cube_store *s)
{
    struct cube_store_snap *snap = cube_alloc(sizeof *snap);

    snap->store = s;
    snap->view = cube_store_view_hold(&s->view);
    return snap;
}

CUBE_API void cube_store_snapshot_close(struct cube_store_snap *snap)
{
    if (!snap)
        return;
    cube_store_view_drop(&snap->view);
    cube_free(snap);
}

/* A key that cannot exist is not there. 1, 0 or -1; value is cleared in each
 * case, and the caller's. */
static int cube_store_get_in(struct cube_store *s,
                             const struct cube_store_view *v,
                             const char *tree, const void *key,
                             size_t key_len, struct cube_buf *value,
                             struct cube_err *err)
{
    int t = cube_store_tree_find(s, tree);

    cube_buf_clear(value);
    if (t < 0 || key_len == 0 || key_len > CUBE_STORE_KEY_MAX)
        return 0;
    return cube_store_view_get(v, &s->cache, t, key, key_len, value, err);
}

CUBE_API int cube_store_get(struct cube_store *s, const char *tree,
                            const void *key, size_t key_len,
                            struct cube_buf *value, struct cube_err *err)
{
    struct cube_store_view v = cube_store_staged_view(s);

    return cube_store_get_in(s, &v, tree, key, key_len, value, err);
}

CUBE_API int cube_store_snapshot_get(struct cube_store_snap *snap,
                                     const char *tree, const void *key,
                                     size_t key_len, struct cube_buf *value,
                                     struct cube_err *err)
{
    return cube_store_get_in(snap->store, &snap->view, tree, key, key_len,
                             value, err);
}

/* Three sorted sources, merged: the two overlays and the tree. Each stands on
 * a key at or beyond the cursor's, in the direction of the last move; those
 * that stand on the cursor's own are `at`, the newest of them decides.
 *
 *     overlay          c deleted       f      the cursor is at d: the overlay
 *     frozen       b           d=2            stands at f already, the frozen
 *     tree     a       c       d=1  e         one and the tree are at d, and
 *                              ^              d=2 is what it shows
 *
 * A step moves those that are at the key, and takes the least (backwards: the
 * greatest) of the three; over a deletion it goes on. Turning round places
 * all three anew, since those that are ahead are on the wrong side. */
struct cube_cursor {
    struct cube_store *store;
    struct cube_store_view view; /* held */
    int tree;                    /* -1: there is none of that name */
    int way;                     /* +1 or -1; 0: it stands nowhere */
    const struct cube_store_node *nodes[2];
    struct cube_store_path path;
    bool at[3];
    int winner;
    struct cube_store_item item; /* of the path, when that wins */
    struct cube_buf key;         /* while it turns round */
    struct cube_store_ext *value; /* what cube_cursor_value gave out */
};

/* Holds its view, so that neither checkpoint nor compaction moves anything
 * under it. */
static struct cube_cursor *cube_store_cursor_new(
        struct cube_store *s, const struct cube_store_view *v,
        const char *tree)
{
    struct cube_cursor *c = cube_alloc(sizeof *c);

    c->store = s;
    c->view = cube_store_view_hold(v);
    c->tree = cube_store_tree_find(s, tree);
    c->path.cache = &s->cache;
    c->path.roots = c->view.roots;
    return c;
}

CUBE_API struct cube_cursor *cube_cursor_open(struct cube_store *s,
                                              const char *tree,
                                              struct cube_err *err)
{
    (void)err;
    return cube_store_cursor_new(s, &s->view, tree);
}

CUBE_API struct cube_cursor *cube_cursor_open_staged(struct cube_store *s,
                                                     const char *tree,
                                                     struct cube_err *err)
{
    struct cube_store_view v = cube_store_staged_view(s);

    (void)err;
    return cube_store_cursor_new(s, &v, tree);
}

CUBE_API struct cube_cursor *cube_cursor_open_snapshot(
        struct cube_store_snap *snap, const char *tree, struct cube_err *err)
{
    (void)err;
    return cube_store_cursor_new(snap->store, &snap->view, tree);
}

CUBE_API void cube_cursor_close(struct cube_cursor *c)
{
    if (!c)
        return;
    cube_store_path_clear(&c->path);
    cube_store_unpin(c->value);
    cube_store_view_drop(&c->view);
    cube_buf_free(&c->key);
    cube_free(c);
}

/* Moves the sources that stand on the cursor's key one on. After it each
 * source is beyond the key that was shown, in the direction of c->way. */
static int cube_store_cursor_advance(struct cube_cursor *c,
                                     struct cube_err *err)
{
    for (int i = 0; i < 2; i++) {
        const struct cube_store_node *n = c->nodes[i];

        if (!c->at[i] || !n)
            continue;
        c->nodes[i] = c->way > 0
            ? cube_store_mem_next(n, c->view.commit)
            : cube_store_mem_prev(c->view.mem[i], (unsigned)c->tree,
                                  cube_store_node_key(n), n->key_len,
                                  c->view.commit);
    }
    if (c->at[2] && c->path.depth > 0)
        return cube_store_path_move(&c->path, c->way, err);
    return 0;
}

/* Finds which sources stand on the first key in the direction of the cursor;
 * false: none stands on any. The order of the three matters: when keys are
 * equal the first source stays the winner, and the first is the newest. */
static bool cube_store_cursor_pick(struct cube_cursor *c)
{
    const uint8_t *best = NULL;
    size_t best_len = 0;

    c->winner = -1;
    if (c->path.depth > 0)
        cube_store_path_item(&c->path, &c->item);
    for (int i = 0; i < 3; i++) {
        const uint8_t *key = NULL;
        size_t len = 0;
        int r = -1;

        c->at[i] = false;
        if (i < 2 && c->nodes[i]) {
            key = cube_store_node_key(c->nodes[i]);
            len = c->nodes[i]->key_len;
        } else if (i == 2 && c->path.depth > 0) {
            key = c->item.key;
            len = c->item.key_len;
        }
        if (!key)
            continue;
        if (best)
            r = c->way * cube_store_order(key, len, best, best_len);
        if (r > 0)
            continue;
        c->at[i] = true;
        if (r == 0)
            continue;
        for (int j = 0; j < i; j++)
            c->at[j] = false;
        best = key;
        best_len = len;
        c->winner = i;
    }
    return best != NULL;
}

/* Goes on to the first key that is not deleted. 1: it stands on a key; 0:
 * beyond the last one, way is 0; -1. The value that was lent out is given back
 * first, since a value is promised until the next move only. */
static int cube_store_cursor_settle(struct cube_cursor *c,
                                    struct cube_err *err)
{
    cube_store_unpin(c->value);
    c->value = NULL;
    while (cube_store_cursor_pick(c)) {
        if (c->winner == 2 || !c->nodes[c->winner]->is_del)
            return 1;
        if (cube_store_cursor_advance(c, err) < 0) {
            c->way = 0;
            return -1;
        }
    }
    c->way = 0;
    return 0;
}

/* Puts every source at the first key at or after this one (way +1), or at the
 * last one before it (-1; of all, with NULL), and goes on from there. A cursor
 * over a tree that nobody has named is over an empty one, not an error. */
static int cube_store_cursor_place(struct cube_cursor *c, int way,
                                   const uint8_t *key, size_t key_len,
                                   struct cube_err *err)
{
    int r;

    if (c->tree < 0)
        return 0;
    c->way = way;
    for (int i = 0; i < 2; i++) {
        struct cube_store_mem *m = c->view.mem[i];

        c->nodes[i] = NULL;
        if (m && way < 0)
            c->nodes[i] = cube_store_mem_prev(m, (unsigned)c->tree, key,
                                              key_len, c->view.commit);
        else if (m)
            c->nodes[i] = cube_store_mem_visible(
                cube_store_mem_find(m, (unsigned)c->tree, key, key_len,
                                    UINT64_MAX, NULL),
                (unsigned)c->tree, c->view.commit);
    }
    if (key)
        r = cube_store_path_seek(&c->path, c->tree, key, key_len, way, err);
    else
        r = cube_store_path_start(&c->path, c->tree, CUBE_STORE_LAST, NULL, 0,
                                  err);
    if (r < 0) {
        c->way = 0;
        return -1;
    }
    return cube_store_cursor_settle(c, err);
}

CUBE_API int cube_cursor_first(struct cube_cursor *c, struct cube_err *err)
{
    return cube_store_cursor_place(c, 1, (const uint8_t *)"", 0, err);
}

CUBE_API int cube_cursor_last(struct cube_cursor *c, struct cube_err *err)
{
    return cube_store_cursor_place(c, -1, NULL, 0, err);
}

CUBE_API int cube_cursor_seek(struct cube_cursor *c, const void *key,
                              size_t key_len, struct cube_err *err)
{
    return cube_store_cursor_place(c, 1, key, key_len, err);
}

CUBE_API const void *cube_cursor_key(const struct cube_cursor *c,
                                     size_t *key_len)
{
    CUBE_ASSERT(c->way != 0);
    if (c->winner == 2) {
        *key_len = c->item.key_len;
        return c->item.key;
    }
    *key_len = c->nodes[c->winner]->key_len;
    return cube_store_node_key(c->nodes[c->winner]);
}

/* One on, turning round before that if need be. Turning backwards, the place
 * before the key is where the sources already stand after being placed;
 * turning forwards they stand on the key itself, and one step more is due. */
static int cube_store_cursor_move(struct cube_cursor *c, int way,
                                  struct cube_err *err)
{
    size_t len;
    const void *key;

    if (c->way == 0)
        return 0;
    if (c->way != way) {
        key = cube_cursor_key(c, &len);
        cube_buf_clear(&c->key);
        cube_buf_add(&c->key, key, len);
        if (cube_store_cursor_place(c, way, (uint8_t *)c->key.data, len,
                                    err) < 0)
            return -1;
        if (way < 0)
            return c->way != 0;
    }
    if (cube_store_cursor_advance(c, err) < 0) {
        c->way = 0;
        return -1;
    }
    return cube_store_cursor_settle(c, err);
}

CUBE_API int cube_cursor_next(struct cube_cursor *c, struct cube_err *err)
{
    return cube_store_cursor_move(c, 1, err);
}

CUBE_API int cube_cursor_prev(struct cube_cursor *c, struct cube_err *err)
{
    return cube_store_cursor_move(c, -1, err);
}

/* The bytes are the store's, and valid until the cursor moves or is closed.
 * Most values cost nothing here: they stand in the overlay or in the leaf that
 * is pinned; only one elsewhere in the file is read, once. */
CUBE_API int cube_cursor_value(struct cube_cursor *c, const void **value,
                               size_t *value_len, struct cube_err *err)
{
    CUBE_ASSERT(c->way != 0);
    if (c->winner < 2) {
        *value = c->nodes[c->winner]->val;
        *value_len = c->nodes[c->winner]->val_len;
    } else if (c->item.val) {
        *value = c->item.val;
        *value_len = c->item.val_len;
    } else {
        if (!c->value)
            c->value = cube_store_fetch(&c->store->cache, c->view.roots->file,
                                        c->item.ref,
                                        cube_store_path_at(&c->path), err);
        if (!c->value)
            return -1;
        *value = c->value->data;
        *value_len = c->value->len;
    }
    if (*value_len == 0)
        *value = "";
    return 0;
}

/* ---- Checking ----
 *
 * What must hold of every page of every tree: its bytes are those that its
 * parent's checksum names; it is of its level; its keys rise, also from leaf
 * to leaf; it begins with the key that its parent has for it; its values are
 * what their checksums say; and in the end there are as many keys and bytes
 * as the roots count. That no page is reached twice follows: keys rise. That
 * no way is endless: a child stands before its parent. */

/* Is each page on the way begun by the key that its parent knows it by? Asked
 * at the first entry of a leaf, when the whole way to it is new. */
static bool cube_store_check_way(const struct cube_store_path *p)
{
    for (int d = 1; d < p->depth; d++) {
        const struct cube_store_step *up = &p->steps[d - 1];
        uint32_t a_len, b_len;
        const uint8_t *a = cube_store_page_key(up->page->data, up->i, &a_len);
        const uint8_t *b = cube_store_page_key(p->steps[d].page->data, 0,
                                               &b_len);

        if (cube_store_order(a, a_len, b, b_len) != 0)
            return false;
    }
    return true;
}

/* One entry of a leaf: its way, its order after the last key, its value.
 * Values are read past the cache, since the file is what is checked. */
static int cube_store_check_item(const struct cube_store_path *p,
                                 struct cube_buf *last, uint64_t *bytes,
                                 struct cube_err *err)
{
    const struct cube_store_file *f = p->roots->file;
    uint64_t at = cube_store_path_at(p);
    struct cube_store_item item;

    cube_store_path_item(p, &item);
    if (p->steps[p->depth - 1].i == 0 && !cube_store_check_way(p))
        return cube_store_corrupt(f, at, "a page begins with another key "
                                  "than its parent says", err);
    if (cube_store_order((uint8_t *)last->data, last->len, item.key,
                         item.key_len) >= 0)
        return cube_store_corrupt(f, at, "keys are out of order", err);
    cube_buf_clear(last);
    cube_buf_add(last, item.key, item.key_len);
    *bytes += (uint64_t)item.key_len + item.val_len;
    if (!item.val) {
        struct cube_store_ext *e = cube_store_load(f, item.ref, at, err);

        if (!e)
            return -1;
        cube_store_unpin(e);
    }
    return 0;
}

/* Walks one tree from the file, past the cache. -1 with the offset of the
 * first page or value that is wrong. It reads the whole tree: for tests and
 * for tools, not for each opening. */
static int cube_store_check_tree(struct cube_store_roots *roots, int tree,
                                 struct cube_err *err)
{
    const struct cube_store_tree *t = &roots->trees[tree];
    struct cube_store_path path;
    struct cube_buf last = {0};
    uint64_t count = 0, bytes = 0;
    int r;

    path.cache = NULL;
    path.roots = roots;
    path.depth = 0;
    cube_buf_puts(&last, "");
    r = cube_store_path_start(&path, tree, CUBE_STORE_FIRST, NULL, 0, err);
    while (r > 0) {
        count++;
        r = cube_store_check_item(&path, &last, &bytes, err);
        if (r == 0)
            r = cube_store_path_move(&path, 1, err);
    }
    if (r == 0 && (count != t->count || bytes != t->bytes))
        r = cube_store_corrupt(roots->file, roots->at, "the roots count "
                               "other keys than there are", err);
    cube_store_path_clear(&path);
    cube_buf_free(&last);
    return r;
}

/* The records since the last checkpoint, from the file. Only up to the last
 * acknowledged commit; what is behind that may be in the middle of being
 * written. */
static int cube_store_check_tail(struct cube_store *s, struct cube_err *err)
{
    const struct cube_store_file *f = s->file;
    uint64_t at = s->view.roots->replay;
    uint32_t crc = s->view.roots->replay_crc;
    struct cube_buf body = {0};
    struct cube_store_rec rec;
    int r = 1;

    while (r > 0 && at < s->done_end) {
        r = cube_store_rec_head(f, at, &rec, err);
        if (r > 0 && rec.kind == 'B')
            r = cube_store_rec_body(f, &rec, &body, err);
        if (r == 0 || (r > 0 && rec.prev != crc))
            r = cube_store_corrupt(f, at, "a record is damaged", err);
        at = cube_store_rec_end(&rec);
        crc = rec.crc;
    }
    cube_buf_free(&body);
    return r < 0 ? -1 : 0;
}

/* An overlay is sorted, each level a part of the one below. */
static int cube_store_check_mem(const struct cube_store *s,
                                const struct cube_store_mem *m,
                                struct cube_err *err)
{
    for (int i = 0; m && i < CUBE_STORE_TOWER; i++) {
        for (const struct cube_store_node *n = m->head[i]; n && n->next[i];
             n = n->next[i]) {
            if (cube_store_node_order(n->tree, cube_store_node_key(n),
                                      n->key_len, n->commit, n->next[i]) >= 0)
                return cube_store_corrupt(s->file, s->done_end, "the overlay "
                                          "is out of order", err);
        }
    }
    return 0;
}

CUBE_API int cube_store_check(struct cube_store *s, struct cube_err *err)
{
    for (int i = 0; i < s->view.roots->count; i++) {
        if (cube_store_check_tree(s->view.roots, i, err) < 0)
            return -1;
    }
    for (int i = 0; i < 2; i++) {
        if (cube_store_check_mem(s, s->view.mem[i], err) < 0)
            return -1;
    }
    return cube_store_check_tail(s, err);
}

CUBE_API void cube_store_stats(const struct cube_store *s,
                               struct cube_store_stats *out)
{
    memset(out, 0, sizeof *out);
    out->file_bytes = s->file->size;
    out->used_bytes = s->file->end;
    out->live_bytes = cube_store_roots_sum(s->view.roots, &out->records);
    for (int i = 0; i < 2; i++)
        out->overlay_bytes += s->view.mem[i] ? s->view.mem[i]->bytes : 0;
    out->cache_bytes = s->cache.bytes;
    out->commits = s->view.commit;
    out->checkpoints = s->checkpoints;
    out->compactions = s->compactions;
    out->dropped_bytes = s->dropped;
    out->is_broken = s->is_broken;
}


/* ==== Chapter 5. Loop ==== uses: 1 2 4 ==== */
/*
 * The problem. A manager talks to many workers, each of which may be slow,
 * and to many clients, each of which may be silent. Threads would need locks
 * around everything that this program knows.
 *
 * The simplest thing that works is one thread that asks the kernel which
 * descriptors are ready, calls back whoever watches them, and never blocks
 * anywhere else. One round of that is a turn:
 *
 *     wait            at most until the next timer is due
 *       |
 *     descriptors     watches that are ready; jobs that are done
 *       |
 *     timers          all that are due, earliest first
 *       |
 *     deferred        calls put off to the end of the turn
 *       |
 *     commit point    for each store: all that the turn has staged is one
 *                     commit; who waited for the last one is told
 *
 * Timers stand in a binary heap ordered by (time, order of setting), so that
 * two runs with the same inputs do the same things in the same order. Their
 * memory is the caller's, inside the object that waits; so is that of watches
 * and deferred calls. Nothing is allocated for waiting, and clearing one that
 * is not set is harmless.
 *
 * A callback may clear, or free with its object, any watch, timer or deferred
 * call, its own included. Readiness that was already collected for a watch
 * that is gone is recognised by its generation: a descriptor number is reused
 * at once, a generation never.
 *
 *     token of a watch:  | generation, 32 bits | descriptor, 32 bits |
 *
 * Invariants: a callback never runs before the call that asked for it has
 * returned; a turn runs each deferred call that was queued before its
 * deferred phase and leaves later ones to the next; whatever takes longer than
 * 5 ms is cut into slices by whoever does it.
 *
 * Interface:
 *   cube_loop_new, cube_loop_turn, cube_loop_run, cube_loop_stop
 *   cube_watch_set, cube_timer_set, cube_defer_set and their _clear
 *   cube_resolve_start      a name to addresses, beside the loop
 *   cube_commit_open        group commit of one store
 *   cube_commit_wait        call me when what is staged is on disk
 *   cube_log                words for the operator
 *
 * A typical sequence:
 *   struct cube_loop *l = cube_loop_new(cube_world_real(), &err);
 *   cube_timer_set(l, &t, 1000, tick, NULL);
 *   cube_loop_run(l, &err);          until somebody calls cube_loop_stop(l)
 *
 * Naive on purpose: the watches are an array indexed by descriptor. Linux
 * gives the lowest free number, so the array is as long as the most
 * descriptors that were ever open at once.
 */

#define CUBE_LOOP_BATCH 64  /* ready descriptors taken at once */
#define CUBE_SLICE_MS 5     /* the most that background work takes of a turn */

struct cube_loop {
    const struct cube_world *world;
    struct cube_poll *poll;
    struct cube_watch **watches; /* by descriptor; NULL where none */
    size_t watch_cap;
    unsigned generation;
    struct cube_timer **heap;    /* [0] is due first */
    size_t heap_len, heap_cap;
    uint64_t timer_order;
    struct cube_defer *first_defer, *last_defer;
    struct cube_ready ready[CUBE_LOOP_BATCH]; /* this turn's */
    int ready_count;
    struct cube_list commits;    /* of struct cube_commit */
    bool has_slices;             /* background work is left over */
    bool is_stopped;
    cube_log_fn *log;
    void *log_arg;
};

CUBE_API struct cube_loop *cube_loop_new(const struct cube_world *w,
                                         struct cube_err *err)
{
    struct cube_loop *l = cube_alloc(sizeof *l);

    l->world = w;
    l->poll = w->poll_open(w->ctx);
    cube_list_init(&l->commits);
    if (!l->poll) {
        cube_free(l);
        (void)cube_fail(err, CUBE_EIO, "open a loop: no descriptors left");
        return NULL;
    }
    return l;
}

CUBE_API void cube_loop_free(struct cube_loop *l)
{
    if (!l)
        return;
    CUBE_ASSERT(cube_list_is_empty(&l->commits));
    l->world->poll_close(l->world->ctx, l->poll);
    cube_free(l->watches);
    cube_free(l->heap);
    cube_free(l);
}

CUBE_API const struct cube_world *cube_loop_world(struct cube_loop *l)
{
    return l->world;
}

CUBE_API int64_t cube_loop_now_ms(struct cube_loop *l)
{
    return l->world->now_ms(l->world->ctx);
}

CUBE_API void cube_loop_set_log(struct cube_loop *l, cube_log_fn *fn,
                                void *arg)
{
    l->log = fn;
    l->log_arg = arg;
}

__attribute__((format(printf, 3, 4))) static void
cube_log(struct cube_loop *l, enum cube_level level, const char *format, ...)
{
    struct cube_buf text = {0};
    char line[1000];
    va_list args;

    if (!l->log)
        return;
    va_start(args, format);
    (void)vsnprintf(line, sizeof line, format, args);
    va_end(args);
    cube_buf_puts(&text, line);
    l->log(l->log_arg, level, text.data);
    cube_buf_free(&text);
}

/* ---- Watches ---- */

/* What the poll reports back for this watch; see the essay. */
static uint64_t cube_watch_token(const struct cube_watch *watch)
{
    return (uint64_t)watch->generation << 32 | (uint32_t)watch->fd;
}

/* Is this very watch in force? Its descriptor may have been closed and given
 * out again meanwhile, to another watch. */
static bool cube_watch_is_set(struct cube_loop *l,
                              const struct cube_watch *watch)
{
    return watch->generation != 0 && (size_t)watch->fd < l->watch_cap &&
           l->watches[watch->fd] == watch;
}

/* Registers a descriptor under a generation of its own. Returns what the world
 * said; on failure the watch is unused, as it was. */
static int cube_watch_add(struct cube_loop *l, struct cube_watch *watch,
                          int fd, unsigned events)
{
    size_t at = (size_t)fd;
    int r;

    if (at >= l->watch_cap) {
        size_t cap = at < 64 ? 128 : at * 2;

        l->watches = cube_resize(l->watches, cap * sizeof *l->watches);
        memset(l->watches + l->watch_cap, 0,
               (cap - l->watch_cap) * sizeof *l->watches);
        l->watch_cap = cap;
    }
    CUBE_ASSERT(!l->watches[at]);
    if (++l->generation == 0)
        l->generation = 1;
    watch->fd = fd;
    watch->generation = l->generation;
    r = l->world->poll_add(l->world->ctx, l->poll, fd, events,
                           cube_watch_token(watch));
    if (r < 0) {
        watch->generation = 0;
        return r;
    }
    l->watches[at] = watch;
    return 0;
}

CUBE_API int cube_watch_set(struct cube_loop *l, struct cube_watch *watch,
                            int fd, unsigned events, cube_watch_fn *fn,
                            void *arg)
{
    int r = 0;

    watch->fn = fn;
    watch->arg = arg;
    if (!cube_watch_is_set(l, watch))
        r = cube_watch_add(l, watch, fd, events);
    else if (watch->events != events)
        r = l->world->poll_change(l->world->ctx, l->poll, fd, events,
                                  cube_watch_token(watch));
    if (r >= 0)
        watch->events = events;
    return r < 0 ? -1 : 0;
}

CUBE_API void cube_watch_clear(struct cube_loop *l, struct cube_watch *watch)
{
    if (!cube_watch_is_set(l, watch))
        return;
    l->watches[watch->fd] = NULL;
    l->world->poll_remove(l->world->ctx, l->poll, watch->fd);
    watch->generation = 0;
}

/* ---- Timers ---- */

/* The order of the heap: earlier first, and of equal times the one that was
 * set first. */
static bool cube_timer_is_before(const struct cube_timer *a,
                                 const struct cube_timer *b)
{
    return a->at_ms != b->at_ms ? a->at_ms < b->at_ms : a->order < b->order;
}

/* Puts a timer at a place of the heap, and tells it where it is. */
static void cube_heap_put(struct cube_loop *l, size_t at, struct cube_timer *t)
{
    l->heap[at] = t;
    t->slot = at + 1;
}

/* Moves `t` from the hole `at` up or down to where it belongs. */
static void cube_heap_settle(struct cube_loop *l, size_t at,
                             struct cube_timer *t)
{
    while (at > 0 && cube_timer_is_before(t, l->heap[(at - 1) / 2])) {
        cube_heap_put(l, at, l->heap[(at - 1) / 2]);
        at = (at - 1) / 2;
    }
    for (;;) {
        size_t child = 2 * at + 1;

        if (child + 1 < l->heap_len &&
            cube_timer_is_before(l->heap[child + 1], l->heap[child]))
            child++;
        if (child >= l->heap_len || !cube_timer_is_before(l->heap[child], t))
            break;
        cube_heap_put(l, at, l->heap[child]);
        at = child;
    }
    cube_heap_put(l, at, t);
}

CUBE_API void cube_timer_clear(struct cube_loop *l, struct cube_timer *timer)
{
    size_t at = timer->slot - 1;
    struct cube_timer *last;

    if (timer->slot == 0)
        return;
    timer->slot = 0;
    last = l->heap[--l->heap_len];
    if (last != timer)
        cube_heap_settle(l, at, last);
}

CUBE_API void cube_timer_set(struct cube_loop *l, struct cube_timer *timer,
                             int64_t in_ms, cube_call_fn *fn, void *arg)
{
    cube_timer_clear(l, timer);
    timer->at_ms = cube_loop_now_ms(l) + (in_ms > 0 ? in_ms : 0);
    timer->order = ++l->timer_order;
    timer->fn = fn;
    timer->arg = arg;
    if (l->heap_len == l->heap_cap) {
        l->heap_cap = l->heap_cap ? l->heap_cap * 2 : 16;
        l->heap = cube_resize(l->heap, l->heap_cap * sizeof *l->heap);
    }
    cube_heap_settle(l, l->heap_len++, timer);
}

CUBE_UNUSED static bool cube_timer_is_set(const struct cube_timer *timer)
{
    return timer->slot != 0;
}

/* Those set by a callback, even for now, wait for the next turn: `last` is
 * the newest that this turn may run. */
static void cube_loop_run_timers(struct cube_loop *l)
{
    int64_t now = cube_loop_now_ms(l);
    uint64_t last = l->timer_order;

    while (l->heap_len > 0 && l->heap[0]->at_ms <= now &&
           l->heap[0]->order <= last) {
        struct cube_timer *t = l->heap[0];

        cube_timer_clear(l, t);
        t->fn(t->arg);
    }
}

/* ---- Deferred calls ---- */

CUBE_API void cube_defer_set(struct cube_loop *l, struct cube_defer *defer,
                             cube_call_fn *fn, void *arg)
{
    defer->fn = fn;
    defer->arg = arg;
    if (defer->is_queued)
        return;
    defer->is_queued = true;
    defer->next = NULL;
    if (l->first_defer)
        l->last_defer->next = defer;
    else
        l->first_defer = defer;
    l->last_defer = defer;
}

/* Linear: few calls are ever put off at once. */
CUBE_API void cube_defer_clear(struct cube_loop *l, struct cube_defer *defer)
{
    struct cube_defer *before = NULL;

    if (!defer->is_queued)
        return;
    defer->is_queued = false;
    for (struct cube_defer *d = l->first_defer; d != defer; d = d->next)
        before = d;
    if (before)
        before->next = defer->next;
    else
        l->first_defer = defer->next;
    if (l->last_defer == defer)
        l->last_defer = before;
}

/* Runs those queued by now: a mark at the end of the queue says where to
 * stop, whatever the calls add or clear. */
static void cube_loop_run_deferred(struct cube_loop *l)
{
    struct cube_defer mark = {0};

    if (!l->first_defer)
        return;
    cube_defer_set(l, &mark, NULL, NULL);
    while (l->first_defer != &mark) {
        struct cube_defer *d = l->first_defer;

        cube_defer_clear(l, d);
        d->fn(d->arg);
    }
    cube_defer_clear(l, &mark);
}

/* ---- Jobs beside the loop ---- */

typedef void cube_job_fn(void *arg, struct cube_job *job);

/* A job and whom to tell. The caller's memory; zeroed is unused. */
struct cube_loop_job {
    struct cube_job job; /* first, so that the world's pointer leads here */
    cube_job_fn *fn;
    void *arg;
    bool is_started;
};

/* Starts `j->job`, whose kind and input are set; `fn` runs once, later. */
static int cube_loop_job_start(struct cube_loop *l, struct cube_loop_job *j,
                               cube_job_fn *fn, void *arg)
{
    int r;

    j->fn = fn;
    j->arg = arg;
    r = l->world->job_start(l->world->ctx, l->poll, &j->job);
    j->is_started = r >= 0;
    return r;
}

/* After this `fn` does not run any more, also when the job is done already
 * and only waits for its place in this turn. */
static void cube_loop_job_cancel(struct cube_loop *l, struct cube_loop_job *j)
{
    if (!j->is_started)
        return;
    l->world->job_cancel(l->world->ctx, l->poll, &j->job);
    for (int i = 0; i < l->ready_count; i++) {
        if (l->ready[i].job == &j->job)
            memset(&l->ready[i], 0, sizeof l->ready[i]);
    }
    j->is_started = false;
}

/* Finds the addresses of a name; see struct cube_job for the result. */
static int cube_resolve_start(struct cube_loop *l, struct cube_loop_job *j,
                              const char *host, cube_job_fn *fn, void *arg)
{
    memset(&j->job, 0, sizeof j->job);
    j->job.kind = CUBE_JOB_RESOLVE;
    (void)snprintf(j->job.host, sizeof j->job.host, "%s", host);
    return cube_loop_job_start(l, j, fn, arg);
}

/* ---- The commit point ---- */

/*
 * A handler stages its changes in the store and asks to be told. At the end
 * of the turn all that was staged, by whomever, is written as one commit and
 * synced beside the loop; meanwhile the next one fills.
 *
 *      turn 1     turn 2     turn 3     turn 4
 *    stage a,b   stage c    stage d      ...
 *        |begin      |          |begin(c,d)
 *        +---- sync(a,b) -------+---- sync(c,d) ----
 *                               |end: tell a and b
 *
 * Whoever waits while nothing is staged is told at the end of the same turn.
 */

/* Told with NULL when the changes are on disk, else with why they are not:
 * CUBE_ESYNC if nobody can say, any other code if they were dropped. */
typedef void cube_commit_fn(void *arg, const struct cube_err *err);

/* Somebody who waits. The caller's memory; zeroed is unused. */
struct cube_commit_wait {
    struct cube_list link;
    cube_commit_fn *fn;
    void *arg;
};

struct cube_commit {
    struct cube_loop *loop;
    struct cube_store *store;
    struct cube_list link;     /* in the loop */
    struct cube_list filling;  /* wait for what is staged */
    struct cube_list syncing;  /* wait for what is in flight */
    struct cube_loop_job job;
    uint64_t number;           /* of the commit that fills now */
    bool is_syncing;
    struct cube_loop_job slice_job; /* the sync of a compaction */
    bool is_slice_syncing;
};

/* Group commit for `store`, which stays the caller's. */
static struct cube_commit *cube_commit_open(struct cube_loop *l,
                                            struct cube_store *store)
{
    struct cube_commit *c = cube_alloc(sizeof *c);

    c->loop = l;
    c->store = store;
    cube_list_init(&c->filling);
    cube_list_init(&c->syncing);
    cube_list_add(&l->commits, &c->link);
    return c;
}

/* Has `fn` called once, in a later step of the loop, when all that is staged by
 * now is durable or dropped. Waiting again with the same memory forgets the
 * wait before. */
static void cube_commit_wait(struct cube_commit *c, struct cube_commit_wait *w,
                             cube_commit_fn *fn, void *arg)
{
    cube_list_remove(&w->link);
    w->fn = fn;
    w->arg = arg;
    cube_list_add(&c->filling, &w->link);
}

/* After this `fn` does not run; harmless for one who does not wait. */
static void cube_commit_forget(struct cube_commit_wait *w)
{
    cube_list_remove(&w->link);
}

/* The number of the commit that what is staged now will be part of. */
static uint64_t cube_commit_number(const struct cube_commit *c)
{
    return c->number;
}

/* Tells all of a list. A callback may wait again, or close what it likes but
 * this commit: the list is emptied from the front, and what is added while it
 * is told waits behind a mark. */
static void cube_commit_tell(struct cube_list *list,
                             const struct cube_err *err)
{
    struct cube_list told;

    if (cube_list_is_empty(list))
        return;
    cube_list_add(list, &told); /* the same ring under another head */
    cube_list_remove(list);
    while (!cube_list_is_empty(&told)) {
        struct cube_commit_wait *w =
            CUBE_OF(told.next, struct cube_commit_wait, link);

        cube_list_remove(&w->link);
        w->fn(w->arg, err);
    }
}

/* Whoever still waits is told CUBE_ECANCELED. Close the store after this. */
static void cube_commit_close(struct cube_commit *c)
{
    struct cube_err err;

    if (!c)
        return;
    (void)cube_fail(&err, CUBE_ECANCELED, "shutting down");
    cube_loop_job_cancel(c->loop, &c->job);
    cube_loop_job_cancel(c->loop, &c->slice_job);
    cube_list_remove(&c->link);
    cube_commit_tell(&c->syncing, &err);
    cube_commit_tell(&c->filling, &err);
    cube_free(c);
}

/* The sync is over: the store takes note, and whoever waited for that commit is
 * told, in the order in which they came. */
static void cube_commit_synced(void *arg, struct cube_job *job)
{
    struct cube_commit *c = arg;
    struct cube_err err;
    int r;

    c->is_syncing = false;
    r = cube_store_commit_end(c->store, job->result, &err);
    cube_commit_tell(&c->syncing, r < 0 ? &err : NULL);
    if (r < 0) { /* what was staged since stands on what is gone */
        cube_store_rollback(c->store);
        c->number++;
        cube_commit_tell(&c->filling, &err);
    }
}

/* The batch has been written: who waited for it waits for its sync now, and the
 * next batch fills meanwhile. */
static void cube_commit_sync(struct cube_commit *c)
{
    int r;

    while (!cube_list_is_empty(&c->filling)) {
        struct cube_list *link = c->filling.next;

        cube_list_remove(link);
        cube_list_add(&c->syncing, link);
    }
    memset(&c->job.job, 0, sizeof c->job.job);
    c->job.job.kind = CUBE_JOB_SYNC;
    c->job.job.fd = cube_store_fd(c->store);
    c->is_syncing = true;
    r = cube_loop_job_start(c->loop, &c->job, cube_commit_synced, c);
    if (r < 0) { /* no thread to be had: sync here, slow but right */
        const struct cube_world *w = c->loop->world;

        c->job.job.result = w->sync(w->ctx, c->job.job.fd);
        cube_commit_synced(c, &c->job.job);
    }
}

static void cube_commit_slice_synced(void *arg, struct cube_job *job)
{
    struct cube_commit *c = arg;

    c->is_slice_syncing = false;
    cube_store_slice_synced(c->store, job->result);
}

/* A slice of the store's background work. Where that wants a sync, it is done
 * beside the loop like that of a commit, and the work waits for it. Returns
 * whether there is more to do at once. */
static bool cube_commit_slice(struct cube_commit *c)
{
    bool has_more;

    if (c->is_syncing || c->is_slice_syncing)
        return false;
    has_more = cube_store_slice(c->store, CUBE_SLICE_MS);
    if (cube_store_slice_fd(c->store) < 0)
        return has_more;
    memset(&c->slice_job.job, 0, sizeof c->slice_job.job);
    c->slice_job.job.kind = CUBE_JOB_SYNC;
    c->slice_job.job.fd = cube_store_slice_fd(c->store);
    c->is_slice_syncing =
        cube_loop_job_start(c->loop, &c->slice_job, cube_commit_slice_synced,
                            c) >= 0;
    return !c->is_slice_syncing; /* no thread to be had: try again */
}

/* One store at the end of a turn. While a sync is under way nothing new is
 * written: what is staged gathers, and becomes one commit. */
static void cube_commit_turn(struct cube_commit *c)
{
    struct cube_err err;
    int r;

    if (c->is_syncing)
        return;
    r = cube_store_commit_begin(c->store, &err);
    c->number++;
    if (r > 0)
        cube_commit_sync(c);
    else
        cube_commit_tell(&c->filling, r < 0 ? &err : NULL);
}

/* The end of a turn: every store with staged changes commits them, then a
 * slice of background work for each. */
static void cube_loop_commit(struct cube_loop *l)
{
    struct cube_list *link, *next;

    l->has_slices = false;
    for (link = l->commits.next; link != &l->commits; link = next) {
        struct cube_commit *c = CUBE_OF(link, struct cube_commit, link);

        next = link->next;
        cube_commit_turn(c);
        if (cube_commit_slice(c))
            l->has_slices = true;
    }
}

/* ---- Turns ---- */

CUBE_API int cube_loop_fd(struct cube_loop *l)
{
    return l->world->poll_fd(l->world->ctx, l->poll);
}

CUBE_API int cube_loop_timeout_ms(struct cube_loop *l)
{
    int64_t in_ms;

    if (l->first_defer || l->has_slices)
        return 0;
    if (l->heap_len == 0)
        return -1;
    in_ms = l->heap[0]->at_ms - cube_loop_now_ms(l);
    return in_ms < 0 ? 0 : in_ms > INT_MAX ? INT_MAX : (int)in_ms;
}

CUBE_API void cube_loop_wake(struct cube_loop *l)
{
    l->world->poll_wake(l->world->ctx, l->poll);
}

/* Calls back for one thing that the poll reported, if whom it concerns is still
 * there. */
static void cube_loop_dispatch(struct cube_loop *l,
                               const struct cube_ready *ready)
{
    size_t fd = (size_t)(uint32_t)ready->token;
    struct cube_watch *watch;

    if (ready->job) {
        struct cube_loop_job *j = (struct cube_loop_job *)(void *)ready->job;

        j->is_started = false;
        j->fn(j->arg, &j->job);
        return;
    }
    watch = fd < l->watch_cap ? l->watches[fd] : NULL;
    if (watch && watch->generation == (unsigned)(ready->token >> 32))
        watch->fn(watch->arg, ready->events);
}

CUBE_API int cube_loop_turn(struct cube_loop *l, int timeout_ms,
                            struct cube_err *err)
{
    int own_ms = cube_loop_timeout_ms(l);
    int n;

    if (own_ms >= 0 && (timeout_ms < 0 || own_ms < timeout_ms))
        timeout_ms = own_ms;
    n = l->world->poll_wait(l->world->ctx, l->poll, l->ready,
                            CUBE_LOOP_BATCH, timeout_ms);
    if (n < 0)
        return cube_fail(err, CUBE_EIO, "wait for descriptors: %s",
                         cube_errno_text(n));
    l->ready_count = n;
    for (int i = 0; i < n; i++)
        cube_loop_dispatch(l, &l->ready[i]);
    l->ready_count = 0;
    cube_loop_run_timers(l);
    cube_loop_run_deferred(l);
    cube_loop_commit(l);
    return 0;
}

CUBE_API void cube_loop_stop(struct cube_loop *l)
{
    l->is_stopped = true;
    cube_loop_wake(l);
}

CUBE_API int cube_loop_run(struct cube_loop *l, struct cube_err *err)
{
    l->is_stopped = false;
    while (!l->is_stopped) {
        if (cube_loop_turn(l, -1, err) < 0)
            return -1;
    }
    return 0;
}


/* ==== Chapter 6. HTTP ==== uses: 1 2 3 5 ==== */
/*
 * The problem. Client and manager, manager and worker, worker and engine: all
 * of them speak HTTP/1.1, over TCP or a unix socket. The peers are slow,
 * gone, or hostile; an answer may be due minutes after its question, or never
 * end at all. One thread serves them, so nothing here may wait.
 *
 * The simplest thing that works is a parser that knows nothing of sockets:
 * bytes in, events out, wherever the bytes were cut.
 *
 *     feed    "GET /tasks HT" | "TP/1.1\r\nHost: a\r\n\r\n"
 *     events             MORE |                 HEAD, END, MORE
 *
 *     feed    "...chunked\r\n\r\n5\r\nhel" | "lo\r\n0\r\n\r\n"
 *     events                HEAD, DATA hel | DATA lo, END, MORE
 *
 * A head is gathered line by line in one text, where each line is cut up in
 * place; what is found is kept as offsets, since the text moves as it grows.
 *
 *     text    G E T 0 / t a s k s 0 H T T P / 1 . 1 0 n H o s t 0   a 0 n
 *             ^method ^target                           ^name       ^value
 *
 * (0 is a NUL where a space, a colon or the CR stood, n is the LF).
 *
 * Server and client are two users of that parser. Each has one function that
 * looks at a connection as it is and does what comes next
 * (cube_http_settle, cube_http_link_read); whatever happens, an event, a
 * timer, an answer from elsewhere, changes the state and lets that function
 * look. An answer given outside a turn of its connection therefore never
 * calls back into its giver: errors are noted, and seen later in the turn.
 *
 * Smuggling. Two readers of one byte stream must agree where a message ends.
 * Where RFC 9112 leaves a choice, this parser refuses: Content-Length beside
 * Transfer-Encoding, two lengths, a chunk size with anything around it, a
 * space before the colon, a folded line, a line that ends in a bare LF, and
 * any coding but chunked. After a refusal the connection is closed, since
 * nobody knows what its next byte means. Answers are read with the same
 * rules but one: their heads may end lines with LF, as scripts write them,
 * and the connection is then not used again.
 *
 * Invariants:
 *   - of one connection one request is open at a time; further ones wait,
 *     unparsed, and beyond CUBE_HTTP_MAX_AHEAD bytes the socket is not read;
 *   - a request is freed when both its handler and its connection are done
 *     with it, in whichever order;
 *   - handlers and callbacks may answer, cancel, close and free anything;
 *     whoever calls them is marked busy and looks again afterwards;
 *   - every wait for a peer has a deadline, but that for a handler's answer
 *     and for the next event of a stream.
 *
 * Interface:
 *   cube_http_parse            bytes to events (pure)
 *   cube_http_listen, _close   a server: routes, access, limits
 *   cube_http_reply, _stream   answer a request, now or later
 *   cube_http_client_new, cube_http_call, cube_http_call_cancel
 *
 * A typical sequence of a server, and of a client:
 *
 *   listen -> handler(req) -> ... commit ... -> reply(req, 201, ...)
 *   listen -> handler(req) -> stream, write, write, on_gone
 *   client_new -> call(GET /tasks) -> on_head -> on_data... -> on_done
 *
 * Naive on purpose: fields and routes are searched linearly, at most
 * CUBE_HTTP_MAX_FIELDS and a dozen of them. There is no TLS, no compression,
 * no proxying and no HTTP/2: whoever needs those puts a proxy in front.
 */

#include <arpa/inet.h>

#define CUBE_HTTP_MAX_LINE 8192    /* request line; beyond it is a 414 */
#define CUBE_HTTP_MAX_HEAD 32768   /* a head; chunk extensions and trailers */
#define CUBE_HTTP_MAX_FIELDS 100
#define CUBE_HTTP_MAX_CHUNK_LINE 256
#define CUBE_HTTP_MAX_BLANKS 4     /* empty lines before a request */
#define CUBE_HTTP_MAX_SEGMENTS 16  /* of a path */
#define CUBE_HTTP_MAX_QUERY 32     /* parameters */
#define CUBE_HTTP_MAX_AHEAD 65536  /* bytes of requests that wait */
#ifndef CUBE_HTTP_MAX_BACKLOG
#define CUBE_HTTP_MAX_BACKLOG (16 << 20) /* bytes of a stream unsent */
#endif
#define CUBE_HTTP_READ 16384       /* bytes taken from a socket at once */
#define CUBE_HTTP_KEEP 16384       /* larger buffers are freed when idle */

/* ---- Characters ---- */

/* HTTP is a protocol of characters, and most of its holes are characters that
 * one reader took for something else. So each place has its own class, asked
 * for by name; nothing here depends on the locale, as isalnum and friends do.
 *
 *    class       where it may stand                   RFC
 *    token       method, field name, list items       9110, 5.6.2
 *    visible     request target, Host                 9112, 3
 *    text        field values, chunk extensions       9110, 5.5
 *    blank       around values and list items (OWS)   9110, 5.6.3
 *    digit       versions, statuses, lengths          5234, B.1
 */

/* A token character of RFC 9110, section 5.6.2: letters, digits and
 * !#$%&'*+-.^_`|~ as a bit for each of 0 .. 127. */
static bool cube_http_is_token(char c)
{
    static const uint32_t bits[4] = {0, 0x03ff6cfa, 0xc7fffffe, 0x57ffffff};
    unsigned char u = (unsigned char)c;

    return u < 128 && (bits[u / 32] >> u % 32 & 1);
}

/* Optional white space, OWS: a space or a tab. No other byte counts as blank,
 * vertical tabs least of all: some readers pass over those, and so can be
 * told another story than we are. */
static bool cube_http_is_blank(char c)
{
    return c == ' ' || c == '\t';
}

/* An ASCII digit. Lengths and statuses have no sign and no blank. */
static bool cube_http_is_digit(char c)
{
    return c >= '0' && c <= '9';
}

/* Are all bytes of one class? True for no bytes at all. NULs count, which is
 * why this takes a length: a text with a NUL inside is as long as its line
 * was. */
static bool cube_http_all(const char *p, size_t len, bool (*is)(char c))
{
    for (size_t i = 0; i < len; i++) {
        if (!is(p[i]))
            return false;
    }
    return true;
}

/* Visible ASCII: what a request target is made of. */
static bool cube_http_is_visible(char c)
{
    return c > ' ' && c < 127;
}

/* What a field value may hold: no control but the tab. */
static bool cube_http_is_text(char c)
{
    unsigned char u = (unsigned char)c;

    return u == '\t' || (u >= ' ' && u != 127);
}

/* The next item of a comma-separated list, blanks cut off; NULL at the end.
 * Empty items are passed over, RFC 9110, section 5.6.1. */
static const char *cube_http_item(const char **list, size_t *len)
{
    const char *p = *list, *end;

    while (*p == ',' || cube_http_is_blank(*p))
        p++;
    if (!*p)
        return NULL;
    end = p + strcspn(p, ",");
    *list = end;
    while (cube_http_is_blank(end[-1]))
        end--;
    *len = (size_t)(end - p);
    return p;
}

/* ---- Heads ---- */

/* A head is what both sides look up fields in: the server's handlers through
 * cube_http_header, the client's callbacks through cube_http_head_get. Fields
 * are kept in the order they came in, under the names they came with; a name
 * that comes twice is found at its first place. Those few fields that have to
 * do with framing are not looked up: the parser has judged them when they
 * came. */

/* Offsets into the head's text. */
struct cube_http_field {
    uint32_t name, value;
};

/* A request line or status line and the fields after it. */
struct cube_http_head {
    struct cube_buf text;
    struct cube_http_field fields[CUBE_HTTP_MAX_FIELDS];
    size_t field_count;
    size_t target; /* of a request, an offset; its method is at 0 */
    int status;    /* of an answer */
    int minor;     /* HTTP/1.x; higher ones count as 1 */
};

/* For the client: the head of an answer. */
CUBE_API int cube_http_head_status(const struct cube_http_head *head)
{
    return head->status;
}

/* Linear, over at most CUBE_HTTP_MAX_FIELDS fields: a handler asks for one or
 * two of them, so an index would cost more than it saves. The text is
 * borrowed from the head. */
CUBE_API const char *cube_http_head_get(const struct cube_http_head *head,
                                        const char *name)
{
    const char *text = head->text.data;

    for (size_t i = 0; i < head->field_count; i++) {
        const char *found = text + head->fields[i].name;

        if (cube_text_is_nocase(found, strlen(found), name))
            return text + head->fields[i].value;
    }
    return NULL;
}

/* ---- The parser ---- */

/* The parser is a state and a function for each state, called in a loop until
 * one of them has something to say. A function takes from the input what it
 * understands and moves the input on; it keeps what it must remember in the
 * parser, since its next call may be in another turn.
 *
 * A typical use:
 *
 *    struct cube_http_parser p = {0};
 *    struct cube_http_input in = {bytes, count};
 *
 *    for (;;)
 *        switch (cube_http_parse(&p, &in)) {
 *        case CUBE_HTTP_MORE:  wait for more bytes, all of these are used
 *        case CUBE_HTTP_HEAD:  look at p.head, p.has_body, p.is_kept
 *        case CUBE_HTTP_DATA:  take p.piece, p.piece_len
 *        case CUBE_HTTP_END:   act; then cube_http_parser_reset(&p)
 *        case CUBE_HTTP_ERROR: answer p.status, say p.words, close
 *        }
 *
 * Nothing is allocated but the head's text, and that is capped. A body is
 * never held by the parser: it is handed over in the pieces in which it came.
 */

enum cube_http_event {
    CUBE_HTTP_MORE,  /* all bytes are used up */
    CUBE_HTTP_HEAD,  /* the head is complete */
    CUBE_HTTP_DATA,  /* a piece of the body */
    CUBE_HTTP_END,   /* the message is complete; again until reset */
    CUBE_HTTP_ERROR, /* refused; again until reset */
    CUBE_HTTP_GO_ON  /* inside the parser: look at the new state */
};

/*
 *   START -> FIELDS -+-> SIZED -------------------------------+-> DONE
 *    ^ blank line    +-> TO_CLOSE ------------- end of input -+
 *                    +-> SIZE -> CHUNK -> CHUNK_END --+       |
 *                    |    ^                           |       |
 *                    |    +---------------------------+       |
 *                    |   SIZE with 0 -> TRAILERS -------------+
 *                    +-> (no body) ---------------------------+
 *   any -> BAD
 */
enum cube_http_state {
    CUBE_HTTP_START,
    CUBE_HTTP_FIELDS,
    CUBE_HTTP_SIZED,
    CUBE_HTTP_TO_CLOSE,
    CUBE_HTTP_SIZE,
    CUBE_HTTP_CHUNK,
    CUBE_HTTP_CHUNK_END,
    CUBE_HTTP_TRAILERS,
    CUBE_HTTP_DONE,
    CUBE_HTTP_BAD
};

/* What is fed: the parser moves `data` and `len` on over what it has used. */
struct cube_http_input {
    const char *data;
    size_t len;
};

/* Zeroed, and with the first two set, it is ready. Free its head's text. */
struct cube_http_parser {
    bool is_answer;         /* reads answers, else requests */
    bool is_to_head;        /* the answer is to a HEAD: it has no body */
    enum cube_http_state state;
    struct cube_http_head head;
    size_t line;            /* where in the text the open line begins */
    size_t line_len;        /* of the line read last, without its end */
    uint64_t left;          /* bytes of the body or of the chunk to come */
    uint64_t length;        /* Content-Length */
    size_t extra;           /* chunk extensions and trailers so far */
    int blanks, hosts;
    bool has_length, has_coding, is_chunked, has_other_coding;
    bool says_close, says_keep, says_continue, says_other_expect;
    bool has_bare_lf;
    bool has_body;          /* after HEAD: bytes of a body will come */
    bool is_kept;           /* after HEAD: the connection can be used again */
    const char *piece;      /* DATA: borrowed from the input */
    size_t piece_len;
    int status;             /* ERROR: what to answer */
    const char *words;      /* ERROR: why */
};

/* Ready for the next message; keeps the memory of a usual head. */
static void cube_http_parser_reset(struct cube_http_parser *p)
{
    struct cube_buf text = p->head.text;
    bool is_answer = p->is_answer;

    memset(p, 0, sizeof *p);
    p->is_answer = is_answer;
    p->head.text = text;
    if (text.cap > CUBE_HTTP_KEEP)
        cube_buf_free(&p->head.text);
    cube_buf_clear(&p->head.text);
}

/* Nothing of a message has come yet: a connection that ends here ends well.
 * Empty lines before a request do not count. */
static bool cube_http_parser_is_fresh(const struct cube_http_parser *p)
{
    return p->state == CUBE_HTTP_START && p->head.text.len == 0;
}

/* Refuses the message: `status` is what a server answers, `words` say why.
 * From here on only ERROR comes, until a reset; and since nobody knows where
 * the next message begins, the connection cannot be kept. */
static enum cube_http_event cube_http_bad(struct cube_http_parser *p,
                                          int status, const char *words)
{
    p->state = CUBE_HTTP_BAD;
    p->status = status;
    p->words = words;
    p->is_kept = false;
    return CUBE_HTTP_ERROR;
}

/* Gathers a line. MORE: it is not whole yet. GO_ON: it stands at the
 * returned `line`, NUL-terminated, its end cut off, and the next line will
 * begin behind it. ERROR: longer than `max`, or it ends in a bare LF. */
static enum cube_http_event cube_http_line(struct cube_http_parser *p,
                                           struct cube_http_input *in,
                                           size_t max, char **line)
{
    struct cube_buf *text = &p->head.text;
    const char *lf = in->len ? memchr(in->data, '\n', in->len) : NULL;
    size_t n = lf ? (size_t)(lf - in->data) + 1 : in->len;
    size_t end;

    if (text->len - p->line + n > max)
        return cube_http_bad(p, p->state == CUBE_HTTP_START ? 414
                                : p->state == CUBE_HTTP_FIELDS ? 431 : 400,
                             "a line is too long");
    cube_buf_add(text, in->data, n);
    in->data += n;
    in->len -= n;
    if (!lf)
        return CUBE_HTTP_MORE;
    end = text->len - 1;
    if (end > p->line && text->data[end - 1] == '\r')
        end--;
    else if (p->is_answer && p->state <= CUBE_HTTP_FIELDS)
        p->has_bare_lf = true;
    else
        return cube_http_bad(p, 400, "a line ends in a bare LF");
    text->data[end] = 0;
    *line = text->data + p->line;
    p->line_len = end - p->line;
    p->line = text->len;
    return CUBE_HTTP_GO_ON;
}

/* Forgets the line that was read last: its text is not kept. */
static void cube_http_forget_line(struct cube_http_parser *p, const char *line)
{
    p->line = p->head.text.len = (size_t)(line - p->head.text.data);
}

/* "HTTP/1.1": sets the minor version. 0, or the status to refuse it with. */
static int cube_http_version(struct cube_http_parser *p, const char *text)
{
    if (strlen(text) != 8 || memcmp(text, "HTTP/", 5) != 0 ||
        !cube_http_is_digit(text[5]) || text[6] != '.' ||
        !cube_http_is_digit(text[7]))
        return 400;
    if (text[5] != '1')
        return 505;
    p->head.minor = text[7] != '0';
    return 0;
}

/* "GET /tasks HTTP/1.1": single spaces, RFC 9112, section 3. */
static enum cube_http_event cube_http_request_line(struct cube_http_parser *p,
                                                   char *line)
{
    char *target = strchr(line, ' ');
    char *version = target ? strchr(target + 1, ' ') : NULL;
    int status;

    if (!version || target == line || version == target + 1)
        return cube_http_bad(p, 400, "the request line is not METHOD TARGET "
                                     "VERSION");
    *target++ = *version++ = 0;
    if (!cube_http_all(line, strlen(line), cube_http_is_token))
        return cube_http_bad(p, 400, "the method is not a token");
    if (!cube_http_all(target, strlen(target), cube_http_is_visible))
        return cube_http_bad(p, 400, "the target holds a character that must "
                                     "be percent-encoded");
    status = cube_http_version(p, version);
    if (status)
        return cube_http_bad(p, status, status == 505
                             ? "this server speaks HTTP/1.1"
                             : "the request line does not end in HTTP/1.1");
    p->head.target = (size_t)(target - line);
    return CUBE_HTTP_GO_ON;
}

/* "HTTP/1.1 200 OK"; the words, and the space before them, may be missing. */
static enum cube_http_event cube_http_status_line(struct cube_http_parser *p,
                                                  char *line)
{
    const char *code = line + 9;

    if (strlen(line) < 12 || line[8] != ' ' ||
        !cube_http_all(code, 3, cube_http_is_digit) || code[0] == '0' ||
        (code[3] && code[3] != ' '))
        return cube_http_bad(p, 400, "the status line is not VERSION STATUS "
                                     "WORDS");
    line[8] = 0;
    if (cube_http_version(p, line) != 0)
        return cube_http_bad(p, 400, "the answer is not of HTTP/1.1");
    p->head.status = (code[0] - '0') * 100 + (code[1] - '0') * 10 +
                     (code[2] - '0');
    return CUBE_HTTP_GO_ON;
}

/* The first line. A NUL in it would end the text early for us and not for
 * others, so it is looked for by length. */
static enum cube_http_event cube_http_step_start(struct cube_http_parser *p,
                                                 struct cube_http_input *in)
{
    char *line;
    enum cube_http_event e;

    /* Whoever speaks TLS here should hear so at once, not in ten seconds. */
    if (p->head.text.len == 0 && in->len > 0 && in->data[0] != '\r' &&
        in->data[0] != '\n' && !cube_http_is_token(in->data[0]))
        return cube_http_bad(p, 400, "this is not HTTP");
    e = cube_http_line(p, in, CUBE_HTTP_MAX_LINE, &line);
    if (e != CUBE_HTTP_GO_ON)
        return e;
    if (!*line && !p->is_answer && ++p->blanks <= CUBE_HTTP_MAX_BLANKS) {
        cube_http_forget_line(p, line);
        return CUBE_HTTP_GO_ON;
    }
    if (strlen(line) != p->line_len)
        return cube_http_bad(p, 400, "the first line holds a NUL");
    p->state = CUBE_HTTP_FIELDS;
    return p->is_answer ? cube_http_status_line(p, line)
                        : cube_http_request_line(p, line);
}

/* ---- Fields that decide where a message ends ---- */

/* Five fields are looked at when they come, whatever a handler does with
 * them. Each has a function that returns the words of a refusal, or NULL. The
 * rules that need more than one field are checked at the end of the head.
 *
 *    field               what is refused
 *    Content-Length      no number, two numbers (400)
 *    Transfer-Encoding   chunked not last or twice (400), others (501)
 *    both of them        400
 *    Host                two of them, none in HTTP/1.1, odd characters (400)
 *    Connection, Expect  nothing
 */

/* Digits, or a list of the same digits (RFC 9110, section 8.6). A number
 * beyond 64 bits is a number all the same: the largest. */
static const char *cube_http_on_length(struct cube_http_parser *p,
                                       const char *value)
{
    const char *item;
    size_t len, count = 0;

    while ((item = cube_http_item(&value, &len))) {
        uint64_t n;

        if (!cube_http_all(item, len, cube_http_is_digit))
            return "Content-Length is not a number";
        if (cube_text_u64(item, len, INT64_MAX, &n) < 0)
            n = INT64_MAX;
        if (p->has_length && p->length != n)
            return "there are two lengths";
        p->length = n;
        p->has_length = true;
        count++;
    }
    return count ? NULL : "Content-Length is empty";
}

/* The codings of all such fields make one list, in order. Chunked ends it:
 * what comes after would be applied to the chunks, and no end would be known.
 * Parameters are not told from names: "chunked;q=1" is another coding. */
static const char *cube_http_on_coding(struct cube_http_parser *p,
                                       const char *value)
{
    const char *item;
    size_t len;

    p->has_coding = true;
    while ((item = cube_http_item(&value, &len))) {
        if (p->is_chunked)
            return "chunked is not the last transfer coding";
        if (cube_text_is_nocase(item, len, "chunked"))
            p->is_chunked = true;
        else
            p->has_other_coding = true;
    }
    return p->is_chunked || p->has_other_coding
               ? NULL : "Transfer-Encoding is empty";
}

/* Only two options of the list mean something here. Their names are taken in
 * any case, as clients of the last century wrote "Keep-Alive". */
static const char *cube_http_on_connection(struct cube_http_parser *p,
                                           const char *value)
{
    const char *item;
    size_t len;

    while ((item = cube_http_item(&value, &len))) {
        if (cube_text_is_nocase(item, len, "close"))
            p->says_close = true;
        else if (cube_text_is_nocase(item, len, "keep-alive"))
            p->says_keep = true;
    }
    return NULL;
}

/* More than one Host is refused also when they agree: whoever sends two wants
 * two readers to pick different ones. Who may be named is the business of the
 * server, in its access check. */
static const char *cube_http_on_host(struct cube_http_parser *p,
                                     const char *value)
{
    if (!cube_http_all(value, strlen(value), cube_http_is_visible))
        return "Host is not a host";
    return ++p->hosts > 1 ? "there are two Host fields" : NULL;
}

/* Noted only: the answer, 100 or 417, is the server's. */
static const char *cube_http_on_expect(struct cube_http_parser *p,
                                       const char *value)
{
    if (cube_text_is_nocase(value, strlen(value), "100-continue"))
        p->says_continue = true;
    else
        p->says_other_expect = true;
    return NULL;
}

static const struct {
    const char *name;
    size_t len;
    const char *(*fn)(struct cube_http_parser *p, const char *value);
} cube_http_framing[] = {
    {"content-length", 14, cube_http_on_length},
    {"transfer-encoding", 17, cube_http_on_coding},
    {"connection", 10, cube_http_on_connection},
    {"host", 4, cube_http_on_host},
    {"expect", 6, cube_http_on_expect},
};

/* Cuts "Name: value", of `len` bytes, in two; returns what is wrong with it
 * or NULL. */
static const char *cube_http_cut_field(char *line, size_t len, char **value)
{
    size_t n = 0;

    if (cube_http_is_blank(line[0]))
        return "a field is folded over two lines";
    while (cube_http_is_token(line[n]))
        n++;
    if (n == 0 || line[n] != ':')
        return cube_http_is_blank(line[n]) ? "space before a colon"
                                           : "a field is not NAME: VALUE";
    line[n++] = 0;
    while (cube_http_is_blank(line[n]))
        n++;
    *value = line + n;
    if (!cube_http_all(line + n, len - n, cube_http_is_text))
        return "a field holds a control character";
    while (len > n && cube_http_is_blank(line[len - 1]))
        line[--len] = 0;
    return NULL;
}

/* Adds a field to the head. The pointers into the line become offsets, since
 * the text may move when the next line comes. */
static enum cube_http_event cube_http_field(struct cube_http_parser *p,
                                            char *line)
{
    struct cube_http_head *h = &p->head;
    const char *words;
    char *value;
    size_t len;

    if (h->field_count == CUBE_HTTP_MAX_FIELDS)
        return cube_http_bad(p, 431, "there are too many fields");
    words = cube_http_cut_field(line, p->line_len, &value);
    if (words)
        return cube_http_bad(p, 400, words);
    h->fields[h->field_count].name = (uint32_t)(line - h->text.data);
    h->fields[h->field_count++].value = (uint32_t)(value - h->text.data);
    len = strlen(line);
    for (size_t i = 0; i < CUBE_COUNT(cube_http_framing) && !words; i++) {
        if (len == cube_http_framing[i].len &&
            cube_text_is_nocase(line, len, cube_http_framing[i].name))
            words = cube_http_framing[i].fn(p, value);
    }
    return words ? cube_http_bad(p, 400, words) : CUBE_HTTP_GO_ON;
}

/* The state after a head: RFC 9112, section 6.3, where it is read strictly. */
static enum cube_http_event cube_http_frame(struct cube_http_parser *p)
{
    bool has_none = p->is_answer &&
                    (p->is_to_head || p->head.status < 200 ||
                     p->head.status == 204 || p->head.status == 304);

    p->left = p->length;
    if (has_none)
        p->state = CUBE_HTTP_DONE;
    else if (p->is_chunked)
        p->state = CUBE_HTTP_SIZE;
    else if (p->has_length || !p->is_answer)
        p->state = p->left ? CUBE_HTTP_SIZED : CUBE_HTTP_DONE;
    else
        p->state = CUBE_HTTP_TO_CLOSE;
    p->has_body = p->state != CUBE_HTTP_DONE;
    p->is_kept = p->state != CUBE_HTTP_TO_CLOSE && !p->has_bare_lf &&
                 (p->head.minor ? !p->says_close : p->says_keep);
    return CUBE_HTTP_HEAD;
}

/* The head is complete: what its fields say together. Some of these could be
 * repaired, as RFC 9112 allows (a coding beats a length); a repair is what
 * smugglers count on. */
static enum cube_http_event cube_http_judge(struct cube_http_parser *p)
{
    if (!p->is_answer && p->head.minor > 0 && p->hosts == 0)
        return cube_http_bad(p, 400, "there is no Host");
    if (p->has_coding && p->has_length)
        return cube_http_bad(p, 400, "there are Content-Length and "
                                     "Transfer-Encoding");
    if (p->has_coding && p->head.minor == 0)
        return cube_http_bad(p, 400, "HTTP/1.0 has no Transfer-Encoding");
    if (p->has_other_coding)
        return cube_http_bad(p, 501, "no transfer coding but chunked is "
                                     "known here");
    return cube_http_frame(p);
}

/* One line after the other, until an empty one. The cap is on the head as a
 * whole, first line included. */
static enum cube_http_event cube_http_step_fields(struct cube_http_parser *p,
                                                  struct cube_http_input *in)
{
    char *line;
    enum cube_http_event e =
        cube_http_line(p, in, CUBE_HTTP_MAX_HEAD - p->line, &line);

    if (e != CUBE_HTTP_GO_ON)
        return e;
    if (p->line_len > 0)
        return cube_http_field(p, line);
    return cube_http_judge(p);
}

/* ---- Bodies ---- */

/* A chunked body, byte by byte, for "hello world" in two chunks with an
 * extension and a trailer (RFC 9112, section 7.1):
 *
 *    5 ; x = y CR LF      size in hexadecimal, extensions   SIZE
 *    h e l l o            that many bytes                   CHUNK
 *    CR LF                and a line end                    CHUNK_END
 *    6 CR LF                                                SIZE
 *    _ w o r l d CR LF                                      CHUNK, CHUNK_END
 *    0 CR LF              the last one                      SIZE
 *    S u m : _ 1 CR LF    trailers, if any                  TRAILERS
 *    CR LF                the end                           DONE
 *
 * Extensions mean nothing to us and are passed over, but they count: a peer
 * that sends more of them than a head may hold is up to something. Trailers
 * are checked and dropped, as RFC 9110, section 6.5.1 advises: who merges
 * them into the head lets the end of a message change its beginning. */

/* SIZED, CHUNK and TO_CLOSE: hands over what there is, at most `left`. */
static enum cube_http_event cube_http_step_data(struct cube_http_parser *p,
                                                struct cube_http_input *in)
{
    size_t n = in->len;

    if (p->state != CUBE_HTTP_TO_CLOSE) {
        if (p->left == 0) {
            p->state = p->state == CUBE_HTTP_CHUNK ? CUBE_HTTP_CHUNK_END
                                                   : CUBE_HTTP_DONE;
            return CUBE_HTTP_GO_ON;
        }
        if (n > p->left)
            n = (size_t)p->left;
        p->left -= n;
    }
    if (n == 0)
        return CUBE_HTTP_MORE;
    p->piece = in->data;
    p->piece_len = n;
    in->data += n;
    in->len -= n;
    return CUBE_HTTP_DATA;
}

/* "1a2b" or "1a2b;name=value": the size, or -1. */
static int64_t cube_http_chunk_size(const char *line, size_t len)
{
    int64_t size = 0;
    size_t n = 0;

    for (; n < len && cube_hex_digit(line[n]) >= 0; n++) {
        if (size > INT64_MAX >> 4)
            return -1;
        size = size << 4 | cube_hex_digit(line[n]);
    }
    if (n == 0 || (n < len && line[n] != ';') ||
        !cube_http_all(line + n, len - n, cube_http_is_text))
        return -1;
    return size;
}

/* The line before a chunk. It is forgotten once it is read, so that a body of
 * a million chunks takes the memory of one. */
static enum cube_http_event cube_http_step_size(struct cube_http_parser *p,
                                                struct cube_http_input *in)
{
    char *line;
    enum cube_http_event e =
        cube_http_line(p, in, CUBE_HTTP_MAX_CHUNK_LINE, &line);
    int64_t size;

    if (e != CUBE_HTTP_GO_ON)
        return e;
    size = cube_http_chunk_size(line, p->line_len);
    if (size < 0)
        return cube_http_bad(p, 400, "a chunk size is not a hexadecimal "
                                     "number");
    p->extra += strchr(line, ';') ? p->line_len : 0;
    if (p->extra > CUBE_HTTP_MAX_HEAD)
        return cube_http_bad(p, 400, "there are too many chunk extensions");
    cube_http_forget_line(p, line);
    p->left = (uint64_t)size;
    p->state = size ? CUBE_HTTP_CHUNK : CUBE_HTTP_TRAILERS;
    return CUBE_HTTP_GO_ON;
}

/* The line end behind a chunk: CR and LF and nothing else. The first byte is
 * looked at as soon as it is here, so that a chunk longer than its size is
 * refused at once and not when a line end happens to come. */
static enum cube_http_event cube_http_step_end(struct cube_http_parser *p,
                                               struct cube_http_input *in)
{
    char *line;
    enum cube_http_event e = cube_http_line(p, in, 2, &line);

    if (e == CUBE_HTTP_ERROR || (e == CUBE_HTTP_GO_ON && *line) ||
        (p->head.text.len > p->line && p->head.text.data[p->line] != '\r'))
        return cube_http_bad(p, 400, "a chunk does not end where it should");
    if (e != CUBE_HTTP_GO_ON)
        return e;
    cube_http_forget_line(p, line);
    p->state = CUBE_HTTP_SIZE;
    return CUBE_HTTP_GO_ON;
}

/* Fields after the last chunk: they must be well formed, and are dropped. */
static enum cube_http_event cube_http_step_trailers(struct cube_http_parser *p,
                                                    struct cube_http_input *in)
{
    char *line, *value;
    const char *words;
    enum cube_http_event e =
        cube_http_line(p, in, CUBE_HTTP_MAX_HEAD, &line);

    if (e != CUBE_HTTP_GO_ON)
        return e;
    p->extra += p->line_len;
    if (p->extra > CUBE_HTTP_MAX_HEAD)
        return cube_http_bad(p, 431, "the trailers are too long");
    if (p->line_len == 0) {
        p->state = CUBE_HTTP_DONE;
        return CUBE_HTTP_GO_ON;
    }
    words = cube_http_cut_field(line, p->line_len, &value);
    if (words)
        return cube_http_bad(p, 400, words);
    cube_http_forget_line(p, line);
    return CUBE_HTTP_GO_ON;
}

/* DONE and BAD: there is nothing to read any more. */
static enum cube_http_event cube_http_step_done(struct cube_http_parser *p,
                                                struct cube_http_input *in)
{
    (void)in;
    return p->state == CUBE_HTTP_DONE ? CUBE_HTTP_END : CUBE_HTTP_ERROR;
}

/* Takes bytes from `in` until something is to be said. */
static enum cube_http_event cube_http_parse(struct cube_http_parser *p,
                                            struct cube_http_input *in)
{
    static enum cube_http_event (*const steps[])(
        struct cube_http_parser *, struct cube_http_input *) = {
        [CUBE_HTTP_START] = cube_http_step_start,
        [CUBE_HTTP_FIELDS] = cube_http_step_fields,
        [CUBE_HTTP_SIZED] = cube_http_step_data,
        [CUBE_HTTP_TO_CLOSE] = cube_http_step_data,
        [CUBE_HTTP_SIZE] = cube_http_step_size,
        [CUBE_HTTP_CHUNK] = cube_http_step_data,
        [CUBE_HTTP_CHUNK_END] = cube_http_step_end,
        [CUBE_HTTP_TRAILERS] = cube_http_step_trailers,
        [CUBE_HTTP_DONE] = cube_http_step_done,
        [CUBE_HTTP_BAD] = cube_http_step_done,
    };
    enum cube_http_event e;

    do
        e = steps[p->state](p, in);
    while (e == CUBE_HTTP_GO_ON);
    return e;
}

/* The input has ended: END if that ends the message, else ERROR. */
static enum cube_http_event cube_http_parse_eof(struct cube_http_parser *p)
{
    if (p->state == CUBE_HTTP_TO_CLOSE || p->state == CUBE_HTTP_DONE) {
        p->state = CUBE_HTTP_DONE;
        return CUBE_HTTP_END;
    }
    return cube_http_bad(p, 400, "it ends early");
}

/* ---- Addresses as text ---- */

/* Where to listen and where to connect are written in one way, in flags,
 * files and on the wire. A place is such a text taken apart; its addresses
 * are found in three ways:
 *
 *    10.0.0.7, [::1]     are addresses already
 *    localhost           127.0.0.1, then ::1, whatever /etc/hosts thinks
 *    anything else       is asked of the machine's resolver, beside the loop
 *
 * That localhost needs no name server is a matter of safety as well: RFC
 * 6761, section 6.3, since a resolver that answers for it can send a token
 * abroad. */

/* "10.0.0.1:80", "[::1]:80", "/run/x.sock". */
static void cube_http_addr_text(const struct cube_addr *a, char *out,
                                size_t size)
{
    char ip[INET6_ADDRSTRLEN] = "";

    if (a->kind == CUBE_ADDR_UNIX) {
        (void)snprintf(out, size, "%s", a->path);
        return;
    }
    (void)inet_ntop(a->kind == CUBE_ADDR_IP6 ? AF_INET6 : AF_INET, a->ip, ip,
                    sizeof ip);
    (void)snprintf(out, size, a->kind == CUBE_ADDR_IP6 ? "[%s]:%u" : "%s:%u",
                   ip, (unsigned)a->port);
}

/* The address first.0.0.last, port 0: 127.0.0.1 or 0.0.0.0. */
static struct cube_addr cube_http_ip4(unsigned char first, unsigned char last)
{
    struct cube_addr a;

    memset(&a, 0, sizeof a);
    a.kind = CUBE_ADDR_IP4;
    a.ip[0] = first;
    a.ip[3] = last;
    return a;
}

/* The address ::last, port 0: ::1 or ::. */
static struct cube_addr cube_http_ip6(unsigned char last)
{
    struct cube_addr a;

    memset(&a, 0, sizeof a);
    a.kind = CUBE_ADDR_IP6;
    a.ip[15] = last;
    return a;
}

/* Reads an address written in digits; false when it is anything else. */
static bool cube_http_ip(const char *host, struct cube_addr *out)
{
    *out = cube_http_ip4(0, 0);
    if (inet_pton(AF_INET, host, out->ip) == 1)
        return true;
    *out = cube_http_ip6(0);
    return inet_pton(AF_INET6, host, out->ip) == 1;
}

/* Where to listen or to connect. */
struct cube_http_place {
    bool is_unix;
    char host[256]; /* without brackets; of a unix socket, its path */
    uint16_t port;
};

/* Splits "host:port", "[::1]:port", ":port"; the port may be missing. */
static int cube_http_split_place(const char *text,
                                 struct cube_http_place *out)
{
    bool is_bracketed = text[0] == '[';
    const char *end = is_bracketed ? strchr(text, ']') : strchr(text, ':');
    const char *rest;
    size_t len;
    uint64_t port;

    if (is_bracketed)
        text++;
    if (!end)
        end = text + strlen(text);
    len = (size_t)(end - text);
    rest = is_bracketed && *end ? end + 1 : end;
    if (len >= sizeof out->host || (is_bracketed && !*end) ||
        !cube_http_all(text, len, cube_http_is_visible) ||
        strcspn(text, "/?#@") < len)
        return -1;
    memcpy(out->host, text, len);
    out->host[len] = 0;
    if (!*rest)
        return 0;
    if (*rest != ':' ||
        cube_text_u64(rest + 1, strlen(rest + 1), 65535, &port) < 0)
        return -1;
    out->port = (uint16_t)port;
    return 0;
}

/* Reads all forms that cube.h lists for this chapter. */
static int cube_http_place_parse(const char *text,
                                 struct cube_http_place *out,
                                 struct cube_err *err)
{
    const char *path = cube_text_starts(text, "unix://") ? text + 7
                       : cube_text_starts(text, "unix:") ? text + 5 : NULL;
    const char *rest = cube_text_starts(text, "http://") ? text + 7
                       : cube_text_starts(text, "tcp://") ? text + 6 : text;
    char host[300];
    struct cube_addr a;

    memset(out, 0, sizeof *out);
    if (path) {
        if (strlen(path) == 0 || strlen(path) >= sizeof a.path)
            return cube_fail(err, CUBE_EINVAL, "the path of a unix socket "
                             "has 1 to %zu bytes: %s", sizeof a.path - 1,
                             text);
        out->is_unix = true;
        (void)snprintf(out->host, sizeof out->host, "%s", path);
        return 0;
    }
    (void)snprintf(host, sizeof host, "%s", rest);
    if (rest != text) {
        out->port = cube_text_starts(text, "http://") ? 80 : 2375;
        if (*host && host[strlen(host) - 1] == '/')
            host[strlen(host) - 1] = 0;
    }
    if (strlen(rest) >= sizeof host || cube_http_split_place(host, out) < 0)
        return cube_fail(err, CUBE_EINVAL, "not HOST:PORT or unix:PATH: %s",
                         text);
    return 0;
}

/* The addresses that need no name server; 0 for a name that does. Of no
 * host those to listen on, everywhere. */
static int cube_http_place_known(const struct cube_http_place *place,
                                 struct cube_addr out[CUBE_JOB_ADDRS])
{
    const char *host = place->host;
    int count = 1;

    if (place->is_unix) {
        memset(&out[0], 0, sizeof out[0]);
        out[0].kind = CUBE_ADDR_UNIX;
        memcpy(out[0].path, host, strlen(host) + 1);
    } else if (!*host || strcmp(host, "*") == 0) {
        out[0] = cube_http_ip4(0, 0);
        out[1] = cube_http_ip6(0);
        count = 2;
    } else if (cube_text_is_nocase(host, strlen(host), "localhost")) {
        out[0] = cube_http_ip4(127, 1);
        out[1] = cube_http_ip6(1);
        count = 2;
    } else if (!cube_http_ip(host, &out[0])) {
        count = 0;
    }
    for (int i = 0; i < count; i++)
        out[i].port = place->port;
    return count;
}

/* ---- Percent-encoding ---- */

/* A target is cut up first and decoded afterwards, RFC 3986, section 2.4: in
 * /tasks/a%2Fb the second segment is "a/b", and no third one comes into
 * being. A plus sign is a space in queries, where forms write it so, and a
 * plus elsewhere. */

/* Means itself everywhere in a URI: RFC 3986, section 2.3. */
static bool cube_http_is_unreserved(char c)
{
    return cube_http_is_digit(c) ||
           (cube_lower(c) >= 'a' && cube_lower(c) <= 'z') || c == '-' ||
           c == '.' || c == '_' || c == '~';
}

/* Everything but the unreserved characters, so that the result fits a path
 * segment as well as a query value. UTF-8 goes byte by byte. */
CUBE_API void cube_http_encode(struct cube_buf *out, const char *text)
{
    for (; *text; text++) {
        unsigned char c = (unsigned char)*text;
        char hex[3];

        cube_hex(&c, 1, hex);
        if (cube_http_is_unreserved(*text))
            cube_buf_addc(out, *text);
        else
            cube_buf_printf(out, "%%%s", hex);
    }
}

/* Appends the decoded text and a NUL. -1: a broken escape, or a NUL. */
static int cube_http_decode(struct cube_buf *out, const char *p, size_t len,
                            bool is_query)
{
    for (size_t i = 0; i < len; i++) {
        char c = p[i];

        if (c == '%') {
            int high = i + 2 < len ? cube_hex_digit(p[i + 1]) : -1;
            int low = high >= 0 ? cube_hex_digit(p[i + 2]) : -1;

            if (low < 0 || (high == 0 && low == 0))
                return -1;
            c = (char)(high << 4 | low);
            i += 2;
        } else if (c == '+' && is_query) {
            c = ' ';
        }
        cube_buf_addc(out, c);
    }
    cube_buf_addc(out, 0);
    return 0;
}

/* ---- The server: its types ---- */

/*
 * A connection, as it is seen between two events:
 *
 *    READING --request complete--> HANDLING --stream--> STREAMING
 *      ^  |                          |                     |
 *      |  | refused                  | reply               | end
 *      |  +------------------------->+<--------------------+
 *      |                             |
 *      +----- kept alive ------------+---- not kept --> CLOSING
 *                                                         | all is sent
 *                               (closed) <-- end, time -- LINGERING
 *
 * LINGERING has shut its own direction and reads on for a moment: closing a
 * socket with unread bytes resets it, and takes the answer along.
 * OVER: the handler is done, and so is the connection.
 */
enum cube_http_phase {
    CUBE_HTTP_READING,
    CUBE_HTTP_HANDLING,
    CUBE_HTTP_STREAMING,
    CUBE_HTTP_CLOSING,
    CUBE_HTTP_LINGERING,
    CUBE_HTTP_OVER
};

/* What a connection waits for, and so which deadline holds. */
enum cube_http_wait {
    CUBE_HTTP_WAIT_UNSET, /* something moved: count anew */
    CUBE_HTTP_WAIT_IDLE,  /* for the first byte of a request */
    CUBE_HTTP_WAIT_HEAD,
    CUBE_HTTP_WAIT_BODY,
    CUBE_HTTP_WAIT_SEND,  /* for the peer to read */
    CUBE_HTTP_WAIT_LINGER,
    CUBE_HTTP_WAIT_NOTHING
};

#define CUBE_HTTP_LINGER_MS 2000
#define CUBE_HTTP_ACCEPT_PAUSE_MS 100
#define CUBE_HTTP_GRACE_MS 1000 /* idle for less: it may have just spoken */
#define CUBE_HTTP_ACCEPT_BATCH 64

struct cube_http_listener {
    struct cube_http_server *server;
    struct cube_watch watch;
    struct cube_addr addr;
    int fd;
};

/* An object; ends with cube_http_close. */
struct cube_http_server {
    struct cube_loop *loop;
    const struct cube_world *world;
    const struct cube_http_route *routes;
    void *arg;
    struct cube_http_options options; /* its texts are our own */
    char **host_names;                /* ends with NULL */
    struct cube_http_listener listeners[CUBE_JOB_ADDRS];
    int listener_count;
    struct cube_list conns;  /* of struct cube_http_req; idle longest first */
    int conn_count;
    struct cube_timer pause; /* until accepting is tried again */
    bool is_paused;
    int64_t date_sec;        /* of the text below */
    char date[40];
};

/*
 * A connection and the request that it is about: one object, since a
 * connection has one open request at a time. It is freed when the socket is
 * closed (fd -1), no handler has it (phase OVER), and nobody on the stack
 * works on it (is_busy).
 */
struct cube_http_req {
    struct cube_http_server *server; /* NULL once the socket is closed */
    struct cube_list link;
    struct cube_watch watch;
    struct cube_timer timer;
    struct cube_defer defer;
    int fd;
    enum cube_http_phase phase;
    enum cube_http_wait wait;
    int64_t deadline_ms;
    bool is_unix;
    bool is_busy;
    bool is_eof;       /* the peer sends no more */
    bool is_broken;    /* reading or writing failed */
    bool must_close;   /* after this answer */
    bool is_chunked;   /* the answer is */
    bool is_drain_due; /* bytes were written since on_drain ran */

    struct cube_http_parser parser;
    struct cube_buf ahead;  /* read, not parsed */
    struct cube_buf out;    /* to be sent from out_at on */
    size_t out_at;
    struct cube_buf body;
    struct cube_buf extra;  /* fields for the answer */

    const struct cube_http_route *route;
    struct cube_buf words;  /* path, its segments, the query: NUL-ended */
    uint32_t segments[CUBE_HTTP_MAX_SEGMENTS];
    size_t segment_count;
    struct cube_http_field query[CUBE_HTTP_MAX_QUERY];
    size_t query_count;

    cube_call_fn *on_gone, *on_drain;
    void *gone_arg, *drain_arg;
};

/* ---- Sending ---- */

/* An answer is put together in `out` and sent from there. What the socket
 * does not take stays, and the descriptor is watched for room:
 *
 *    out    [ sent ............ | to be sent .............. ]
 *                             out_at                      len
 *
 * Nothing that sends reports an error to who called it. A handler that
 * answers has no use for the news that its peer is gone, and being called
 * back from inside its own call would be worse than useless: is_broken is
 * noted, and the next look at the connection, in the same turn, finds it. */

/* How many bytes of answers the peer has not taken yet. */
static size_t cube_http_pending(const struct cube_http_req *req)
{
    return req->out.len - req->out_at;
}

/* Sends what can be sent now. Failure is noted and seen by settle. */
static void cube_http_flush(struct cube_http_req *req)
{
    const struct cube_world *w;

    if (req->fd < 0 || req->is_broken)
        return;
    w = req->server->world;
    while (cube_http_pending(req) > 0) {
        int n = w->send(w->ctx, req->fd, req->out.data + req->out_at,
                        cube_http_pending(req));

        if (n <= 0) {
            req->is_broken = n != -EAGAIN;
            break;
        }
        req->out_at += (size_t)n;
        req->wait = CUBE_HTTP_WAIT_UNSET;
    }
    if (cube_http_pending(req) == 0) {
        req->out_at = 0;
        cube_buf_clear(&req->out);
        if (req->out.cap > CUBE_HTTP_KEEP)
            cube_buf_free(&req->out);
    } else if (req->out_at > req->out.len / 2) {
        cube_buf_drop(&req->out, req->out_at);
        req->out_at = 0;
    }
}

/* Sends or queues. What is large, and can go at once, is not copied. */
static void cube_http_push(struct cube_http_req *req, const char *data,
                           size_t len)
{
    if (req->fd < 0 || req->is_broken)
        return;
    if (len >= CUBE_HTTP_KEEP) {
        const struct cube_world *w = req->server->world;
        int n = 0;

        cube_http_flush(req);
        if (cube_http_pending(req) == 0 && !req->is_broken)
            n = w->send(w->ctx, req->fd, data, len);
        if (n > 0) {
            data += n;
            len -= (size_t)n;
            req->wait = CUBE_HTTP_WAIT_UNSET;
        }
    }
    cube_buf_add(&req->out, data, len);
}

/* A number in decimal, or in lower-case hexadecimal: what snprintf could do,
 * at a tenth of the cost, three times in each answer. */
static void cube_http_put_u64(struct cube_buf *b, uint64_t v, unsigned base)
{
    char text[24], *p = text + sizeof text;

    do
        *--p = "0123456789abcdef"[v % base];
    while (v /= base);
    cube_buf_add(b, p, (size_t)(text + sizeof text - p));
}

/* "Sun, 06 Nov 1994 08:49:37 GMT" (RFC 9110, section 5.6.7), made once a
 * second. */
static const char *cube_http_date(struct cube_http_server *s)
{
    static const char days[] = "MonTueWedThuFriSatSun";
    static const char months[] = "JanFebMarAprMayJunJulAugSepOctNovDec";
    int64_t sec = s->world->wall_ns(s->world->ctx) / 1000000000 +
                  CUBE_SEC_TO_1970;
    int64_t day_number = sec / 86400, year;
    int month, day, at = (int)(sec % 86400);

    if (sec == s->date_sec || sec < 0)
        return s->date;
    s->date_sec = sec;
    cube_date_of(day_number, &year, &month, &day);
    (void)snprintf(s->date, sizeof s->date,
                   "%.3s, %02d %.3s %04d %02d:%02d:%02d GMT",
                   days + 3 * (day_number % 7), day, months + 3 * (month - 1),
                   (int)(year % 10000), at / 3600, at / 60 % 60, at % 60);
    return s->date;
}

/* The words behind a status; for people only, as RFC 9112, section 4 has it.
 * A handler may use statuses that are not in the list. */
static const char *cube_http_reason(int status)
{
    static const struct {
        int status;
        const char *words;
    } reasons[] = {
        {200, "OK"}, {201, "Created"}, {202, "Accepted"},
        {204, "No Content"}, {206, "Partial Content"}, {304, "Not Modified"},
        {400, "Bad Request"}, {401, "Unauthorized"}, {403, "Forbidden"},
        {404, "Not Found"}, {405, "Method Not Allowed"},
        {408, "Request Timeout"}, {409, "Conflict"}, {410, "Gone"},
        {411, "Length Required"}, {413, "Content Too Large"},
        {414, "URI Too Long"}, {417, "Expectation Failed"},
        {429, "Too Many Requests"},
        {431, "Request Header Fields Too Large"},
        {500, "Internal Server Error"}, {501, "Not Implemented"},
        {502, "Bad Gateway"}, {503, "Service Unavailable"},
        {504, "Gateway Timeout"}, {505, "HTTP Version Not Supported"},
        {507, "Insufficient Storage"},
    };

    for (size_t i = 0; i < CUBE_COUNT(reasons); i++) {
        if (reasons[i].status == status)
            return reasons[i].words;
    }
    return "Unknown";
}

/* A HEAD is answered like a GET, but the body stays here. */
static bool cube_http_is_head(const struct cube_http_req *req)
{
    return strcmp(cube_http_method(req), "HEAD") == 0;
}

/* May this status have a body at all? RFC 9112, section 6.3. */
static bool cube_http_has_content(int status)
{
    return status >= 200 && status != 204 && status != 304;
}

/* The caller answers for name and value: no line end in either. */
static void cube_http_put_field(struct cube_buf *b, const char *name,
                                const char *value)
{
    cube_buf_puts(b, name);
    cube_buf_add(b, ": ", 2);
    cube_buf_puts(b, value);
    cube_buf_add(b, "\r\n", 2);
}

/* The head of an answer; `len` -1: it is a stream. */
static void cube_http_put_head(struct cube_http_req *req, int status,
                               const char *type, int64_t len)
{
    struct cube_buf *b = &req->out;
    bool is_old = req->parser.head.minor == 0;

    if (req->fd < 0)
        return;
    cube_buf_puts(b, "HTTP/1.1 ");
    cube_http_put_u64(b, (uint64_t)status, 10);
    cube_buf_addc(b, ' ');
    cube_buf_puts(b, cube_http_reason(status));
    cube_buf_add(b, "\r\n", 2);
    cube_http_put_field(b, "Date", cube_http_date(req->server));
    if (type)
        cube_http_put_field(b, "Content-Type", type);
    if (len >= 0 && cube_http_has_content(status)) {
        cube_buf_puts(b, "Content-Length: ");
        cube_http_put_u64(b, (uint64_t)len, 10);
        cube_buf_add(b, "\r\n", 2);
    }
    if (req->is_chunked)
        cube_http_put_field(b, "Transfer-Encoding", "chunked");
    if (!req->parser.is_kept || req->must_close)
        cube_http_put_field(b, "Connection", "close");
    else if (is_old)
        cube_http_put_field(b, "Connection", "keep-alive");
    cube_buf_add(b, req->extra.data ? req->extra.data : "", req->extra.len);
    cube_buf_add(b, "\r\n", 2);
}

/* ---- The life of a connection ---- */

/* Who may free it. A request has two owners, its connection and its handler,
 * and they leave in either order:
 *
 *    peer goes, then handler answers     drop: socket closed; phase stays
 *                                        HANDLING; reply frees it
 *    peer goes, handler asked to hear    drop: on_gone is the handler's end
 *    handler answers, peer stays         the connection lives on
 *    server closes during a handler      drop marks, who is on the stack
 *                                        (is_busy) frees when it is back
 *
 * cube_http_release looks at all three conditions; everybody who takes one
 * away calls it, and nobody frees by himself. */

/* The end of its memory. Called by release alone. */
static void cube_http_free_req(struct cube_http_req *req)
{
    cube_buf_free(&req->parser.head.text);
    cube_buf_free(&req->ahead);
    cube_buf_free(&req->out);
    cube_buf_free(&req->body);
    cube_buf_free(&req->extra);
    cube_buf_free(&req->words);
    cube_free(req);
}

/* Does a handler have this request, and owe the rest of an answer? */
static bool cube_http_is_open(const struct cube_http_req *req)
{
    return req->phase == CUBE_HTTP_HANDLING ||
           req->phase == CUBE_HTTP_STREAMING;
}

/* Frees it, if neither its socket, nor a handler, nor the stack needs it. */
static void cube_http_release(struct cube_http_req *req)
{
    if (req->fd < 0 && !req->is_busy && !cube_http_is_open(req))
        cube_http_free_req(req);
}

/* Mutual recursion: a listener accepts connections, and one that ends lets
 * its listener accept again; an answer lets settle look, which runs handlers,
 * which answer. */
static void cube_http_listen_on(struct cube_http_server *s, bool is_on);
static void cube_http_settle(void *arg);

/* Closes the socket, and tells the handler of an open request. */
static void cube_http_drop(struct cube_http_req *req)
{
    struct cube_http_server *s = req->server;
    bool was_busy = req->is_busy;

    cube_watch_clear(s->loop, &req->watch);
    cube_timer_clear(s->loop, &req->timer);
    cube_defer_clear(s->loop, &req->defer);
    cube_list_remove(&req->link);
    s->conn_count--;
    s->world->close(s->world->ctx, req->fd);
    req->fd = -1;
    req->server = NULL;
    if (s->is_paused)
        cube_http_listen_on(s, true);
    if (cube_http_is_open(req) && req->on_gone) {
        req->phase = CUBE_HTTP_OVER;
        req->is_busy = true;
        req->on_gone(req->gone_arg);
        req->is_busy = was_busy;
    }
    cube_http_release(req);
}

/* After a change from outside: send what can be sent, look again later in
 * the turn. While we are busy with the connection we look anyway. */
static void cube_http_touch(struct cube_http_req *req)
{
    if (req->fd < 0 || req->is_busy)
        return;
    cube_http_flush(req);
    cube_defer_set(req->server->loop, &req->defer, cube_http_settle, req);
}

/* The answer is complete: on to the next request, or to the end. A request
 * whose peer has gone is freed by this. */
static void cube_http_finish(struct cube_http_req *req)
{
    bool is_kept = req->parser.is_kept && !req->must_close;

    req->wait = CUBE_HTTP_WAIT_UNSET;
    req->on_gone = req->on_drain = NULL;
    req->is_chunked = false;
    if (req->fd < 0) {
        req->phase = CUBE_HTTP_OVER;
        cube_http_release(req);
        return;
    }
    req->phase = is_kept ? CUBE_HTTP_READING : CUBE_HTTP_CLOSING;
    cube_list_remove(&req->link);
    cube_list_add(&req->server->conns, &req->link);
    if (is_kept) {
        cube_http_parser_reset(&req->parser);
        cube_buf_clear(&req->extra);
        cube_buf_clear(&req->words);
        cube_buf_clear(&req->body);
        if (req->body.cap > CUBE_HTTP_KEEP)
            cube_buf_free(&req->body);
    }
    cube_http_touch(req);
}

/* ---- What handlers call ---- */

/* These run inside a handler, or minutes later from somewhere else, on a
 * connection that may be gone by then. Each one first brings its own state in
 * order and then, outside a handler, asks for a look (cube_http_touch);
 * inside one the look comes anyway when the handler returns. */

/* "" before a request line was read. */
CUBE_API const char *cube_http_method(const struct cube_http_req *req)
{
    const char *text = req->parser.head.text.data;

    return text ? text : "";
}

/* The copy in `words`, which begins with it: the target itself has no end
 * there, a query may follow. */
CUBE_API const char *cube_http_path(const struct cube_http_req *req)
{
    return req->words.data;
}

/* `{name}` of this length is that name. */
static bool cube_http_is_variable(const char *segment, size_t len,
                                  const char *name)
{
    return len >= 2 && segment[0] == '{' &&
           (!name || cube_text_is(segment + 1, len - 2, name));
}

/* The route says which segment has that name. Segments of route and request
 * correspond one to one, or the route would not have matched. */
CUBE_API const char *cube_http_param(const struct cube_http_req *req,
                                     const char *name)
{
    const char *p = req->route->path;

    for (size_t i = 0; *p == '/'; i++) {
        size_t len = strcspn(++p, "/");

        if (cube_http_is_variable(p, len, name))
            return req->words.data + req->segments[i];
        p += len;
    }
    return NULL;
}

/* All pairs were decoded when the head came, so that a broken escape in any
 * of them was refused then and needs no answer here. */
CUBE_API const char *cube_http_query(const struct cube_http_req *req,
                                     const char *name)
{
    for (size_t i = 0; i < req->query_count; i++) {
        if (strcmp(req->words.data + req->query[i].name, name) == 0)
            return req->words.data + req->query[i].value;
    }
    return NULL;
}

/* Fields of the request. There is no way to ask for the second of two equal
 * ones; no handler here wants to. */
CUBE_API const char *cube_http_header(const struct cube_http_req *req,
                                      const char *name)
{
    return cube_http_head_get(&req->parser.head, name);
}

/* The whole body: handlers run when it is complete. */
CUBE_API const char *cube_http_body(const struct cube_http_req *req,
                                    size_t *len)
{
    if (len)
        *len = req->body.len;
    return req->body.data ? req->body.data : "";
}

/* The last call counts; NULL takes it back. */
CUBE_API void cube_http_on_gone(struct cube_http_req *req, cube_call_fn *fn,
                                void *arg)
{
    req->on_gone = fn;
    req->gone_arg = arg;
}

/* A value may come from outside: a line end in it must not begin a line. */
CUBE_API void cube_http_reply_header(struct cube_http_req *req,
                                     const char *name, const char *value)
{
    size_t at;

    cube_buf_puts(&req->extra, name);
    cube_buf_add(&req->extra, ": ", 2);
    at = req->extra.len;
    cube_buf_puts(&req->extra, value);
    for (; at < req->extra.len; at++) {
        if (!cube_http_is_text(req->extra.data[at]))
            req->extra.data[at] = ' ';
    }
    cube_buf_add(&req->extra, "\r\n", 2);
}

/* In one go: head, body, done. A small body is copied behind its head, so
 * that both leave in one system call; a large one goes to the socket from
 * where it stands, and only the rest of it is copied. */
CUBE_API void cube_http_reply(struct cube_http_req *req, int status,
                              const char *type, const void *body, size_t len)
{
    CUBE_ASSERT(req->phase == CUBE_HTTP_HANDLING);
    cube_http_put_head(req, status, type, (int64_t)len);
    if (!cube_http_is_head(req) && cube_http_has_content(status))
        cube_http_push(req, body, len);
    cube_http_finish(req);
}

/* The error body that all of Cube's servers answer with, as the Go program
 * does:
 *
 *    {"HTTPStatusCode":404,"Message":"there is no /x here"}
 *
 * The words are cut at 1000 bytes, and escaped as task texts are. */
CUBE_API void cube_http_reply_error(struct cube_http_req *req, int status,
                                    const char *format, ...)
{
    struct cube_buf body = {0};
    char words[1000];
    va_list args;

    va_start(args, format);
    (void)vsnprintf(words, sizeof words, format, args);
    va_end(args);
    cube_buf_printf(&body, "{\"HTTPStatusCode\":%d,\"Message\":", status);
    cube_json_put_text(&body, words);
    cube_buf_puts(&body, "}\n");
    cube_http_reply(req, status, "application/json", body.data, body.len);
    cube_buf_free(&body);
}

/* An HTTP/1.0 peer knows no chunks: for it the end is the end of the
 * connection. To a HEAD there is nothing after the head; the connection ends
 * there, since the handler does not know and might stream for hours. */
CUBE_API void cube_http_stream(struct cube_http_req *req, int status,
                               const char *type)
{
    bool is_head = cube_http_is_head(req);

    CUBE_ASSERT(req->phase == CUBE_HTTP_HANDLING);
    req->is_chunked = req->parser.head.minor > 0 && !is_head;
    if (!req->is_chunked)
        req->must_close = true;
    cube_http_put_head(req, status, type, -1);
    req->phase = CUBE_HTTP_STREAMING;
    cube_http_touch(req);
}

/* Each write becomes one chunk, and a write of nothing none, since an empty
 * chunk is the end. Writes of one turn leave together at its end: a stream of
 * small events costs one system call a turn, not one each. */
CUBE_API void cube_http_stream_write(struct cube_http_req *req,
                                     const void *data, size_t len)
{
    CUBE_ASSERT(req->phase == CUBE_HTTP_STREAMING);
    if (req->fd < 0 || req->is_broken || len == 0 || cube_http_is_head(req))
        return;
    if (cube_http_pending(req) + len > CUBE_HTTP_MAX_BACKLOG) {
        req->is_broken = true;
    } else {
        req->is_drain_due = true;
        if (req->is_chunked) {
            cube_http_put_u64(&req->out, len, 16);
            cube_buf_add(&req->out, "\r\n", 2);
        }
        cube_http_push(req, data, len);
        if (req->is_chunked)
            cube_buf_add(&req->out, "\r\n", 2);
    }
    if (!req->is_busy)
        cube_defer_set(req->server->loop, &req->defer, cube_http_settle, req);
}

/* Chunk framing included, so never exactly what was written. */
CUBE_API size_t cube_http_stream_backlog(const struct cube_http_req *req)
{
    return cube_http_pending(req);
}

/* For writers that have more than fits: write a piece, wait for this, write
 * the next. It comes from the loop, never from inside a write. */
CUBE_API void cube_http_stream_on_drain(struct cube_http_req *req,
                                        cube_call_fn *fn, void *arg)
{
    req->on_drain = fn;
    req->drain_arg = arg;
}

/* The reader learns that this was all: by the last chunk, or, if it speaks
 * HTTP/1.0, by the end of the connection. */
CUBE_API void cube_http_stream_end(struct cube_http_req *req)
{
    CUBE_ASSERT(req->phase == CUBE_HTTP_STREAMING);
    if (req->is_chunked && req->fd >= 0)
        cube_buf_add(&req->out, "0\r\n\r\n", 5);
    cube_http_finish(req);
}

/* What was written is still sent; then the connection ends without a last
 * chunk, which a reader must take for a cut (RFC 9112, section 8). */
CUBE_API void cube_http_stream_abort(struct cube_http_req *req)
{
    CUBE_ASSERT(req->phase == CUBE_HTTP_STREAMING);
    req->must_close = true;
    cube_http_finish(req);
}

/* ---- What a request asks for ---- */

/* The target is cut up once, when the head comes, into `words`:
 *
 *    GET /tasks/a%2Fb/logs?tail=10&follow HTTP/1.1
 *
 *    words     /tasks/a%2Fb/logs 0 tasks 0 a/b 0 logs 0 tail 0 10 0 follow 0 0
 *              ^path               ^[0]    ^[1]  ^[2]   ^query[0]   ^query[1]
 *
 * so that matching, variables and queries are all comparisons of plain texts.
 */

/* Refuses: answers, and closes if the peer may still be sending a body.
 * False, for who asks whether to go on. */
__attribute__((format(printf, 3, 4))) static bool
cube_http_refuse(struct cube_http_req *req, int status, const char *format,
                 ...)
{
    char words[600];
    va_list args;

    va_start(args, format);
    (void)vsnprintf(words, sizeof words, format, args);
    va_end(args);
    if (req->parser.state != CUBE_HTTP_DONE)
        req->must_close = true;
    req->phase = CUBE_HTTP_HANDLING;
    cube_http_reply_error(req, status, "%s", words);
    return false;
}

/* "a%20b=c&d": decoded pairs into `words`. */
static int cube_http_cut_query(struct cube_http_req *req, const char *p)
{
    for (; *p; p += *p == '&') {
        size_t len = strcspn(p, "&"), name_len = strcspn(p, "&=");
        struct cube_http_field *q = &req->query[req->query_count];

        if (len == 0)
            continue;
        if (req->query_count++ == CUBE_HTTP_MAX_QUERY)
            return -1;
        q->name = (uint32_t)req->words.len;
        if (cube_http_decode(&req->words, p, name_len, true) < 0)
            return -1;
        p += name_len + (name_len < len);
        len -= name_len + (name_len < len);
        q->value = (uint32_t)req->words.len;
        if (cube_http_decode(&req->words, p, len, true) < 0)
            return -1;
        p += len;
    }
    return 0;
}

/* Cuts the target into path, segments and query. A slash at the end of the
 * path makes no segment. `p` begins with the path. */
static int cube_http_cut_target(struct cube_http_req *req, const char *p)
{
    const char *end = p + strcspn(p, "?");

    req->segment_count = req->query_count = 0;
    cube_buf_clear(&req->words);
    cube_buf_add(&req->words, p, (size_t)(end - p));
    cube_buf_addc(&req->words, 0);
    while (p < end && p + 1 < end) {
        size_t len = strcspn(++p, "/?");

        if (req->segment_count == CUBE_HTTP_MAX_SEGMENTS)
            return -1;
        req->segments[req->segment_count++] = (uint32_t)req->words.len;
        if (cube_http_decode(&req->words, p, len, false) < 0)
            return -1;
        p += len;
    }
    return *end ? cube_http_cut_query(req, end + 1) : 0;
}

/* Segment by segment: a literal one must be equal after decoding, a variable
 * takes anything but nothing. */
static bool cube_http_route_fits(const struct cube_http_req *req,
                                 const struct cube_http_route *route)
{
    const char *p = route->path;
    size_t i = 0;

    for (; *p == '/' && p[1]; i++) {
        size_t len = strcspn(++p, "/");
        const char *segment;

        if (i == req->segment_count)
            return false;
        segment = req->words.data + req->segments[i];
        if (cube_http_is_variable(p, len, NULL) ? !*segment
                                                : !cube_text_is(p, len,
                                                                segment))
            return false;
        p += len;
    }
    return i == req->segment_count;
}

/* Does that route's method serve this request's? */
static bool cube_http_route_serves(const struct cube_http_req *req,
                                   const struct cube_http_route *route)
{
    const char *method = cube_http_method(req);

    return strcmp(route->method, method) == 0 ||
           (strcmp(method, "HEAD") == 0 && strcmp(route->method, "GET") == 0);
}

/* Refuses what no route serves, with 404 or 405. */
static bool cube_http_refuse_path(struct cube_http_req *req)
{
    const struct cube_http_route *r = req->server->routes;
    struct cube_buf allow = {0};

    for (; r->method; r++) {
        if (cube_http_route_fits(req, r))
            cube_buf_printf(&allow, "%s%s%s", allow.len ? ", " : "",
                            r->method,
                            strcmp(r->method, "GET") ? "" : ", HEAD");
    }
    if (allow.len > 0) {
        cube_http_reply_header(req, "Allow", allow.data);
        cube_http_refuse(req, 405, "%s is not done to %s, but %s",
                         cube_http_method(req), cube_http_path(req),
                         allow.data);
    } else {
        cube_http_refuse(req, 404, "there is no %s here",
                         cube_http_path(req));
    }
    cube_buf_free(&allow);
    return false;
}

/* Routes are asked in their order, a dozen of them at most; the methods are
 * compared first, as that is cheaper. */
static bool cube_http_find_route(struct cube_http_req *req)
{
    const struct cube_http_route *r = req->server->routes;

    for (; r->method; r++) {
        if (cube_http_route_serves(req, r) && cube_http_route_fits(req, r)) {
            req->route = r;
            return true;
        }
    }
    return cube_http_refuse_path(req);
}

/* ---- Access ---- */

/* Three checks, in this order, before a body is read or a route is looked
 * for, so that a stranger does not even learn which paths exist:
 *
 *    Origin present                     403   a web page is asking
 *    Host not known here                403   a web page has renamed us
 *    no token, or another one           401   GET /healthz may be open
 *
 * The first two exist because a browser on the operator's machine can reach
 * 127.0.0.1 and is steered by whoever wrote the page. It always says the
 * page's origin when it writes, and says the page's idea of our name when it
 * reads: DNS rebinding points evil.example to 127.0.0.1, but cannot make the
 * Host field say so. On a unix socket there are no browsers, and any Host
 * will do. */

/* A Host that no web page can have: an address, localhost, a known name. */
static bool cube_http_host_is_known(const struct cube_http_server *s,
                                    const char *text)
{
    struct cube_http_place place = {0};
    struct cube_addr addr;

    if (cube_http_split_place(text, &place) < 0)
        return false;
    if (text[0] == '[' || cube_http_ip(place.host, &addr))
        return cube_http_ip(place.host, &addr);
    for (size_t i = 0; s->host_names[i]; i++) {
        if (cube_text_is_nocase(place.host, strlen(place.host),
                                s->host_names[i]))
            return true;
    }
    return false;
}

/* Both tokens are compared whatever the first one gave, and each by its hash:
 * the time taken tells nothing about how much of a guess was right. Two
 * tokens are accepted so that one can be replaced without a pause. */
static bool cube_http_has_token(const struct cube_http_req *req)
{
    const struct cube_http_options *o = &req->server->options;
    const char *field = cube_http_header(req, "Authorization");
    bool is_first, is_second;

    if (!o->tokens[0] && !o->tokens[1])
        return true;
    if (!field || strlen(field) < 7 ||
        !cube_text_is_nocase(field, 7, "Bearer "))
        return false;
    field += 7 + strspn(field + 7, " ");
    is_first = o->tokens[0] &&
               cube_secret_is(field, strlen(field), o->tokens[0]);
    is_second = o->tokens[1] &&
                cube_secret_is(field, strlen(field), o->tokens[1]);
    return is_first || is_second;
}

/* GET /healthz, where that needs no token. */
static bool cube_http_is_health(const struct cube_http_req *req)
{
    return req->server->options.is_open_health && req->segment_count == 1 &&
           strcmp(req->words.data + req->segments[0], "healthz") == 0 &&
           (strcmp(cube_http_method(req), "GET") == 0 ||
            cube_http_is_head(req));
}

/* Refuses with 403 or 401 who may not ask. `host` is NULL for none. */
static bool cube_http_check_access(struct cube_http_req *req,
                                   const char *host)
{
    const char *token = cube_http_header(req, "Authorization");
    bool is_public = req->server->options.is_public;

    if (!is_public && cube_http_header(req, "Origin"))
        return cube_http_refuse(req, 403, "requests of web pages (with an "
                                          "Origin) are not served");
    if (!is_public && host && !req->is_unix &&
        !cube_http_host_is_known(req->server, host))
        return cube_http_refuse(req, 403, "this server is not known as "
                                "'%.200s': use its address, or add the name "
                                "to its host names", host);
    if (cube_http_is_health(req) || cube_http_has_token(req))
        return true;
    cube_http_reply_header(req, "WWW-Authenticate", "Bearer");
    return cube_http_refuse(req, 401, "%s", token
                            ? "the token is not the one of this server"
                            : "this server wants a token");
}

/* ---- From bytes to handlers ---- */

/*    socket --recv--> [ 16 KiB on the stack ] --parse--> head, body, handler
 *                             |
 *                             | what a busy connection cannot take yet
 *                             v
 *                          ahead --parse, once it is free--> ...
 *
 * Usually `ahead` is empty and no byte is copied before the parser sees it.
 * It fills when a client sends its next requests before the present one is
 * answered; at CUBE_HTTP_MAX_AHEAD the socket is left unread, and the
 * kernel's window tells the client to wait. */

/* The path of the target: what follows http://authority of the absolute
 * form, whose authority then stands for Host (RFC 9112, section 3.2.2). */
static const char *cube_http_origin(const char *target, char *host,
                                    size_t size)
{
    size_t len;

    if (strncmp(target, "http://", 7) != 0)
        return target;
    target += 7;
    len = strcspn(target, "/?");
    (void)snprintf(host, size, "%.*s", (int)(len < size ? len : 0), target);
    return target[len] ? target + len : "/";
}

/* The head is here: refuses what can be refused before the body comes. */
static bool cube_http_on_head(struct cube_http_req *req)
{
    struct cube_http_parser *p = &req->parser;
    const char *target = p->head.text.data + p->head.target;
    size_t max_body = req->server->options.max_body;
    char authority[300] = "";

    target = cube_http_origin(target, authority, sizeof authority);
    if (*target != '/' || cube_http_cut_target(req, target) < 0)
        return cube_http_refuse(req, 400, "the target is no path with a "
                                          "query: %.300s", target);
    if (!cube_http_check_access(req, *authority ? authority
                                     : cube_http_header(req, "Host")) ||
        !cube_http_find_route(req))
        return false;
    if (p->says_other_expect)
        return cube_http_refuse(req, 417, "Expect: only 100-continue");
    if (p->has_length && p->length > max_body)
        return cube_http_refuse(req, 413, "a body has at most %zu bytes here",
                                max_body);
    if (p->has_body && p->says_continue && p->head.minor > 0)
        cube_buf_puts(&req->out, "HTTP/1.1 100 Continue\r\n\r\n");
    return true;
}

/* Gathers the body. A chunked one says its length only by ending, so the cap
 * is looked at with each piece. */
static bool cube_http_on_data(struct cube_http_req *req)
{
    size_t max_body = req->server->options.max_body;

    if (req->body.len + req->parser.piece_len > max_body)
        return cube_http_refuse(req, 413, "a body has at most %zu bytes here",
                                max_body);
    cube_buf_add(&req->body, req->parser.piece, req->parser.piece_len);
    return true;
}

/* Feeds the parser and runs handlers, until the input is used up, a handler
 * wants time, or the peer does not read its answers. */
static void cube_http_pump(struct cube_http_req *req,
                           struct cube_http_input *in)
{
    req->is_busy = true;
    while (req->phase == CUBE_HTTP_READING && req->fd >= 0 &&
           cube_http_pending(req) < CUBE_HTTP_MAX_AHEAD) {
        switch (cube_http_parse(&req->parser, in)) {
        case CUBE_HTTP_HEAD:
            cube_http_on_head(req);
            break;
        case CUBE_HTTP_DATA:
            cube_http_on_data(req);
            break;
        case CUBE_HTTP_END:
            req->phase = CUBE_HTTP_HANDLING;
            req->route->fn(req->server->arg, req);
            break;
        case CUBE_HTTP_ERROR:
            cube_http_refuse(req, req->parser.status, "%s",
                             req->parser.words);
            break;
        case CUBE_HTTP_MORE:
        case CUBE_HTTP_GO_ON:
            req->is_busy = false;
            return;
        }
    }
    req->is_busy = false;
}

/* New bytes: those before them first, if any wait. */
static void cube_http_take(struct cube_http_req *req, const char *data,
                           size_t len)
{
    struct cube_http_input in = {data, len};

    if (req->phase == CUBE_HTTP_CLOSING || req->phase == CUBE_HTTP_LINGERING)
        return;
    if (req->ahead.len > 0 || req->phase != CUBE_HTTP_READING) {
        cube_buf_add(&req->ahead, data, len);
        return;
    }
    cube_http_pump(req, &in);
    if (in.len > 0 && req->fd >= 0)
        cube_buf_add(&req->ahead, in.data, in.len);
}

/* Bytes that came while a handler had the request before them. Handlers never
 * touch `ahead`, so it can be fed from where it stands. */
static void cube_http_pump_ahead(struct cube_http_req *req)
{
    struct cube_http_input in = {req->ahead.data, req->ahead.len};

    cube_http_pump(req, &in);
    cube_buf_drop(&req->ahead, req->ahead.len - in.len);
    if (req->ahead.len == 0 && req->ahead.cap > 0)
        cube_buf_free(&req->ahead);
}

/* One recv a look: readiness is told again while there is more, and so a
 * connection that sends without end cannot starve the others. */
static void cube_http_read(struct cube_http_req *req)
{
    const struct cube_world *w = req->server->world;
    char bytes[CUBE_HTTP_READ];
    int n = w->recv(w->ctx, req->fd, bytes, sizeof bytes);

    if (n == 0)
        req->is_eof = true;
    else if (n < 0)
        req->is_broken = n != -EAGAIN;
    else
        cube_http_take(req, bytes, (size_t)n);
}

/* ---- What comes next ---- */

/* Waiting. Each thing that a peer owes us has a limit, and a timer that is
 * moved as seldom as possible:
 *
 *    wait      begins with                  limit                then
 *    IDLE      the end of an answer         idle_timeout_ms      closed
 *    HEAD      the first byte               head_timeout_ms      408
 *    BODY      the end of the head          body_timeout_ms      408
 *    SEND      the last progress            body_timeout_ms      closed
 *    LINGER    our own end                  CUBE_HTTP_LINGER_MS  closed
 *    NOTHING   (a handler is at work, or a stream has nothing to say)
 *
 * HEAD and BODY are counted from their beginning, not from the last byte: a
 * peer that sends one byte a second would hold its connection for ever. */

/* What the peer owes us, with the time that it has for it. */
static enum cube_http_wait cube_http_waits_for(const struct cube_http_req *req)
{
    if (req->phase == CUBE_HTTP_LINGERING)
        return CUBE_HTTP_WAIT_LINGER;
    if (cube_http_pending(req) > 0)
        return CUBE_HTTP_WAIT_SEND;
    if (req->phase != CUBE_HTTP_READING)
        return CUBE_HTTP_WAIT_NOTHING;
    if (cube_http_parser_is_fresh(&req->parser))
        return CUBE_HTTP_WAIT_IDLE;
    return req->parser.state <= CUBE_HTTP_FIELDS ? CUBE_HTTP_WAIT_HEAD
                                                 : CUBE_HTTP_WAIT_BODY;
}

/* The limit column above; -1 for none. */
static int64_t cube_http_patience(const struct cube_http_options *o,
                                  enum cube_http_wait wait)
{
    switch (wait) {
    case CUBE_HTTP_WAIT_IDLE:
        return o->idle_timeout_ms;
    case CUBE_HTTP_WAIT_HEAD:
        return o->head_timeout_ms;
    case CUBE_HTTP_WAIT_BODY:
    case CUBE_HTTP_WAIT_SEND:
        return o->body_timeout_ms;
    case CUBE_HTTP_WAIT_LINGER:
        return CUBE_HTTP_LINGER_MS;
    case CUBE_HTTP_WAIT_UNSET:
    case CUBE_HTTP_WAIT_NOTHING:
        break;
    }
    return -1;
}

/* The timer. It is not moved at each request, only the deadline is: when it
 * comes too early it is set again. */
static void cube_http_on_time(void *arg)
{
    struct cube_http_req *req = arg;
    struct cube_http_server *s = req->server;
    int64_t left = req->deadline_ms - cube_loop_now_ms(s->loop);

    if (req->wait == CUBE_HTTP_WAIT_NOTHING)
        return;
    if (left > 0) {
        cube_timer_set(s->loop, &req->timer, left, cube_http_on_time, req);
        return;
    }
    if (req->wait == CUBE_HTTP_WAIT_HEAD || req->wait == CUBE_HTTP_WAIT_BODY)
        cube_http_refuse(req, 408, "the request took too long to come");
    else
        req->is_broken = true;
    cube_http_settle(req);
}

/* Sets the deadline anew when the wait is another one, or something has
 * moved. The timer itself is only touched when it would come too late. */
static void cube_http_set_deadline(struct cube_http_req *req)
{
    struct cube_http_server *s = req->server;
    enum cube_http_wait wait = cube_http_waits_for(req);
    int64_t patience = cube_http_patience(&s->options, wait);

    if (wait == req->wait)
        return;
    req->wait = wait;
    if (patience < 0)
        return;
    req->deadline_ms = cube_loop_now_ms(s->loop) + patience;
    if (!cube_timer_is_set(&req->timer) ||
        req->timer.at_ms > req->deadline_ms)
        cube_timer_set(s->loop, &req->timer, patience, cube_http_on_time,
                       req);
}

/* Mutual recursion: being ready is seen by settle, which waits for it. */
static void cube_http_on_ready(void *arg, unsigned events);

/* Reads while there is room, writes while there is something to write. A
 * descriptor at its end stays readable: it is not watched for that then. */
static void cube_http_set_watch(struct cube_http_req *req)
{
    bool is_full = req->ahead.len >= CUBE_HTTP_MAX_AHEAD &&
                   req->phase != CUBE_HTTP_LINGERING;
    unsigned events = (req->is_eof || is_full ? 0 : CUBE_READ) |
                      (cube_http_pending(req) > 0 ? CUBE_WRITE : 0);

    if (cube_watch_set(req->server->loop, &req->watch, req->fd, events,
                       cube_http_on_ready, req) < 0)
        req->is_broken = true;
}

/* The end of what the peer says, seen by each phase. A peer that has only
 * shut its own direction still gets its answer, unless the handler asked to
 * hear when it goes: then it has gone. True: nothing more to do here. */
static bool cube_http_is_at_end(struct cube_http_req *req)
{
    switch (req->phase) {
    case CUBE_HTTP_READING:
        if (req->ahead.len > 0)
            return false;
        if (cube_http_parser_is_fresh(&req->parser))
            return cube_http_pending(req) == 0;
        cube_http_refuse(req, 400, "the request ends early");
        return false;
    case CUBE_HTTP_HANDLING:
        return req->on_gone != NULL;
    case CUBE_HTTP_STREAMING:
    case CUBE_HTTP_LINGERING:
        return true;
    case CUBE_HTTP_CLOSING:
        return cube_http_pending(req) == 0;
    case CUBE_HTTP_OVER:
        break;
    }
    return true;
}

/* All is sent: tells the stream, ends what is to be ended. */
static void cube_http_on_sent(struct cube_http_req *req)
{
    const struct cube_world *w = req->server->world;

    if (req->phase == CUBE_HTTP_STREAMING && cube_http_is_head(req)) {
        req->is_broken = true;
    } else if (req->phase == CUBE_HTTP_STREAMING && req->is_drain_due) {
        req->is_drain_due = false;
        if (!req->on_drain)
            return;
        req->is_busy = true;
        req->on_drain(req->drain_arg);
        req->is_busy = false;
        if (cube_http_pending(req) > 0 || req->phase != CUBE_HTTP_STREAMING)
            cube_http_touch(req);
    } else if (req->phase == CUBE_HTTP_CLOSING && !req->is_eof) {
        w->shut(w->ctx, req->fd);
        req->phase = CUBE_HTTP_LINGERING;
    } else if (req->phase == CUBE_HTTP_CLOSING) {
        req->is_broken = true;
    }
}

/* Looks at the connection as it is, and does what comes next. */
static void cube_http_settle(void *arg)
{
    struct cube_http_req *req = arg;

    if (req->ahead.len > 0 && !req->is_broken)
        cube_http_pump_ahead(req);
    cube_http_flush(req);
    if (req->fd >= 0 && req->is_eof && !req->is_broken)
        req->is_broken = cube_http_is_at_end(req);
    if (req->fd >= 0 && !req->is_broken && cube_http_pending(req) == 0)
        cube_http_on_sent(req);
    if (req->fd < 0) {
        cube_http_release(req);
        return;
    }
    if (!req->is_broken)
        cube_http_set_watch(req);
    if (req->is_broken) {
        cube_http_drop(req);
        return;
    }
    cube_http_set_deadline(req);
    if (req->phase == CUBE_HTTP_READING && req->ahead.len > 0 &&
        cube_http_pending(req) < CUBE_HTTP_MAX_AHEAD)
        cube_http_touch(req);
}

/* The descriptor has something. A hang-up counts only when there is nothing
 * to read before it: what was said last is still a request. */
static void cube_http_on_ready(void *arg, unsigned events)
{
    struct cube_http_req *req = arg;

    if (events & CUBE_READ)
        cube_http_read(req);
    else if (events & CUBE_HANGUP)
        req->is_broken = true;
    cube_http_settle(req);
}
/* ---- Accepting ---- */

/* Two things can run out. Connections have a cap of their own: at the cap,
 * the one that has been idle longest makes room, and when all are busy the
 * new ones wait in the kernel's queue, where they cost us nothing.
 * Descriptors belong to the whole process: when accept fails for the lack of
 * them, the listener stays readable, and a loop that goes on asking takes all
 * of the CPU to learn the same again. In both cases the listeners are not
 * watched for a moment. */

/* The first look adds it to the loop and sets its deadline. */
static void cube_http_add_conn(struct cube_http_server *s, int fd,
                               const struct cube_addr *peer)
{
    struct cube_http_req *req = cube_alloc(sizeof *req);

    req->server = s;
    req->fd = fd;
    req->is_unix = peer->kind == CUBE_ADDR_UNIX;
    cube_list_add(&s->conns, &req->link);
    s->conn_count++;
    cube_http_settle(req);
}

/* Closes the connection that has been idle longest; false if none is. One
 * that is idle for a moment may have a request on its way. */
static bool cube_http_make_room(struct cube_http_server *s)
{
    int64_t until = cube_loop_now_ms(s->loop) - CUBE_HTTP_GRACE_MS +
                    s->options.idle_timeout_ms;
    struct cube_list *at;

    for (at = s->conns.next; at != &s->conns; at = at->next) {
        struct cube_http_req *req = CUBE_OF(at, struct cube_http_req, link);

        if (!req->is_busy && req->wait == CUBE_HTTP_WAIT_IDLE &&
            req->deadline_ms <= until) {
            cube_http_drop(req);
            return true;
        }
    }
    return false;
}

/* The pause is over: whoever waits is seen in this turn or the next. */
static void cube_http_resume(void *arg)
{
    cube_http_listen_on(arg, true);
}

/* Leaves the listeners alone for CUBE_HTTP_ACCEPT_PAUSE_MS, or until a
 * connection ends. */
static void cube_http_pause(struct cube_http_server *s)
{
    cube_http_listen_on(s, false);
    cube_timer_set(s->loop, &s->pause, CUBE_HTTP_ACCEPT_PAUSE_MS,
                   cube_http_resume, s);
}

/* Without descriptors the kernel would report the listener ready for ever:
 * it is left alone for a moment. True: there is one again. */
static bool cube_http_is_short(struct cube_http_server *s, int r)
{
    if (r != -EMFILE && r != -ENFILE && r != -ENOBUFS && r != -ENOMEM)
        return false;
    if (cube_http_make_room(s))
        return true;
    cube_log(s->loop, CUBE_WARN, "accept a connection: %s",
             cube_errno_text(r));
    cube_http_pause(s);
    return false;
}

/* At least one connection waits. With as many as there may be, an idle one
 * makes room for it, or it waits. */
static void cube_http_on_accept(void *arg, unsigned events)
{
    struct cube_http_listener *l = arg;
    struct cube_http_server *s = l->server;
    int max = s->options.max_connections;

    (void)events;
    if (s->conn_count >= max && !cube_http_make_room(s)) {
        cube_http_pause(s);
        return;
    }
    for (int i = 0; i < CUBE_HTTP_ACCEPT_BATCH && s->conn_count < max; i++) {
        struct cube_addr peer;
        int fd = s->world->accept(s->world->ctx, l->fd, &peer);

        if (fd >= 0)
            cube_http_add_conn(s, fd, &peer);
        else if (!cube_http_is_short(s, fd))
            break;
    }
}

/* Watches the listeners, or does not. When the loop cannot watch one (no
 * memory in the kernel) it is tried again later. */
static void cube_http_listen_on(struct cube_http_server *s, bool is_on)
{
    s->is_paused = !is_on;
    cube_timer_clear(s->loop, &s->pause);
    for (int i = 0; i < s->listener_count; i++) {
        struct cube_http_listener *l = &s->listeners[i];

        if (!is_on)
            cube_watch_clear(s->loop, &l->watch);
        else if (cube_watch_set(s->loop, &l->watch, l->fd, CUBE_READ,
                                cube_http_on_accept, l) < 0)
            cube_timer_set(s->loop, &s->pause, CUBE_HTTP_ACCEPT_PAUSE_MS,
                           cube_http_resume, s);
    }
}

/* ---- Listening ---- */

/* One server may have several listeners: localhost is two addresses, and so
 * can be any name. All have one port. Binding happens at once and its errors
 * are the caller's, since a program that cannot listen should not start. */

/* A socket file stays when its server dies. If nobody answers there it is
 * removed; anything else in its place is left alone. True: try again. */
static bool cube_http_remove_stale(const struct cube_world *w,
                                   const struct cube_addr *addr)
{
    int fd = w->open(w->ctx, addr->path, 0);

    if (fd != -ENXIO) { /* a socket cannot be opened, all else can */
        if (fd >= 0)
            w->close(w->ctx, fd);
        return false;
    }
    fd = w->connect(w->ctx, addr);
    if (fd >= 0)
        w->close(w->ctx, fd);
    return fd == -ECONNREFUSED && w->unlink(w->ctx, addr->path) >= 0;
}

/* A negative errno value, or 0 and one listener more. The kernel is asked
 * which port it gave. */
static int cube_http_add_listener(struct cube_http_server *s,
                                  const struct cube_addr *addr)
{
    struct cube_http_listener *l = &s->listeners[s->listener_count];
    const struct cube_world *w = s->world;
    int fd = w->listen(w->ctx, addr);

    if (fd == -EADDRINUSE && addr->kind == CUBE_ADDR_UNIX &&
        cube_http_remove_stale(w, addr))
        fd = w->listen(w->ctx, addr);
    if (fd < 0)
        return fd;
    l->server = s;
    l->fd = fd;
    l->addr = *addr;
    if (addr->kind != CUBE_ADDR_UNIX)
        (void)w->local_addr(w->ctx, fd, &l->addr);
    s->listener_count++;
    return 0;
}

/* Unix sockets leave a file, which is removed: the next server should find
 * nothing, not a stale one. */
static void cube_http_close_listeners(struct cube_http_server *s)
{
    const struct cube_world *w = s->world;

    for (int i = 0; i < s->listener_count; i++) {
        struct cube_http_listener *l = &s->listeners[i];

        cube_watch_clear(s->loop, &l->watch);
        w->close(w->ctx, l->fd);
        if (l->addr.kind == CUBE_ADDR_UNIX)
            w->unlink(w->ctx, l->addr.path);
    }
    s->listener_count = 0;
}

/* Listens on all of them, on one port. A machine without IPv6 has none of
 * those addresses: they are passed over as long as one is left. A port that
 * the kernel chose for the first can be taken for the second: -EADDRINUSE. */
static int cube_http_listen_all(struct cube_http_server *s,
                                const struct cube_addr *addrs, int count,
                                const struct cube_addr **failed)
{
    int first = 0;

    for (int i = 0; i < count; i++) {
        struct cube_addr addr = addrs[i];
        int r;

        if (addr.port == 0 && s->listener_count > 0)
            addr.port = s->listeners[0].addr.port;
        r = cube_http_add_listener(s, &addr);
        if (r == -EADDRNOTAVAIL || r == -EAFNOSUPPORT) {
            first = first ? first : r;
        } else if (r < 0) {
            cube_http_close_listeners(s);
            *failed = &addrs[i];
            return r;
        }
    }
    *failed = &addrs[0];
    return s->listener_count > 0 ? 0 : first;
}

#define CUBE_HTTP_RESOLVE_MS 10000
#define CUBE_HTTP_PORT_TRIES 16

/* Asks for the addresses of a name and waits for them. A server that starts
 * has nothing else to do; on a loop that runs, names are asked for by
 * cube_resolve_start. */
static int cube_http_resolve(const struct cube_world *w,
                             struct cube_job *job, const char *host)
{
    struct cube_poll *p = w->poll_open(w->ctx);
    int64_t until = w->now_ms(w->ctx) + CUBE_HTTP_RESOLVE_MS;
    struct cube_ready ready = {0, 0, NULL};
    int r;

    if (!p)
        return -EMFILE;
    memset(job, 0, sizeof *job);
    job->kind = CUBE_JOB_RESOLVE;
    (void)snprintf(job->host, sizeof job->host, "%s", host);
    r = w->job_start(w->ctx, p, job);
    while (r >= 0 && !ready.job && w->now_ms(w->ctx) < until)
        r = w->poll_wait(w->ctx, p, &ready, 1, 1000);
    if (r >= 0)
        r = ready.job ? job->result : -ETIMEDOUT;
    if (!ready.job)
        w->job_cancel(w->ctx, p, job);
    w->poll_close(w->ctx, p);
    return r;
}

/* Finds the addresses and listens on them, and says what went wrong in words
 * that name the address, since "localhost" may have two. */
static int cube_http_bind(struct cube_http_server *s,
                          const struct cube_http_place *place,
                          const char *where, struct cube_err *err)
{
    struct cube_job job;
    struct cube_addr known[CUBE_JOB_ADDRS], *addrs = known;
    const struct cube_addr *failed = NULL;
    int count = cube_http_place_known(place, known);
    char text[128] = "";
    int r = 0;

    if (count == 0) {
        r = cube_http_resolve(s->world, &job, place->host);
        if (r < 0)
            return cube_fail(err, cube_errno_code(r),
                             "listen on %s: find its address: %s", where,
                             cube_errno_text(r));
        addrs = job.addrs;
        count = job.addr_count;
        for (int i = 0; i < count; i++)
            addrs[i].port = place->port;
    }
    for (int i = 0; i < CUBE_HTTP_PORT_TRIES; i++) {
        r = cube_http_listen_all(s, addrs, count, &failed);
        if (r != -EADDRINUSE || place->port != 0 || place->is_unix)
            break;
    }
    if (r >= 0)
        return 0;
    cube_http_addr_text(failed, text, sizeof text);
    if (r == -EADDRINUSE)
        return cube_fail(err, CUBE_EBUSY, "listen on %s: %s is in use by "
                         "another program", where, text);
    return cube_fail(err, cube_errno_code(r), "listen on %s: %s: %s", where,
                     text, cube_errno_text(r));
}

/* Copies what the caller may free, and puts the defaults in. */
static void cube_http_set_options(struct cube_http_server *s,
                                  const struct cube_http_options *from,
                                  const char *own_host)
{
    struct cube_http_options *o = &s->options;
    size_t count = 0, n = 0;

    if (from)
        *o = *from;
    for (int i = 0; i < 2; i++)
        o->tokens[i] = cube_text_dup(o->tokens[i]);
    while (o->host_names && o->host_names[count])
        count++;
    s->host_names = cube_alloc((count + 3) * sizeof *s->host_names);
    s->host_names[n++] = cube_text_dup("localhost");
    if (*own_host)
        s->host_names[n++] = cube_text_dup(own_host);
    for (size_t i = 0; i < count; i++)
        s->host_names[n++] = cube_text_dup(o->host_names[i]);
    o->host_names = NULL;
    o->max_body = o->max_body ? o->max_body : 1 << 20;
    o->idle_timeout_ms = o->idle_timeout_ms ? o->idle_timeout_ms : 120000;
    o->head_timeout_ms = o->head_timeout_ms ? o->head_timeout_ms : 10000;
    o->body_timeout_ms = o->body_timeout_ms ? o->body_timeout_ms : 30000;
    o->max_connections = o->max_connections ? o->max_connections : 1000;
}

/* Listeners first, so that nobody new comes in while the connections are
 * told. An on_gone may answer nothing more, but may free what it holds. */
CUBE_API void cube_http_close(struct cube_http_server *s)
{
    if (!s)
        return;
    cube_timer_clear(s->loop, &s->pause);
    cube_http_close_listeners(s);
    s->is_paused = false;
    while (!cube_list_is_empty(&s->conns))
        cube_http_drop(CUBE_OF(s->conns.next, struct cube_http_req, link));
    for (size_t i = 0; s->host_names[i]; i++)
        cube_free(s->host_names[i]);
    cube_free(s->host_names);
    for (int i = 0; i < 2; i++)
        cube_free((char *)(uintptr_t)s->options.tokens[i]);
    cube_free(s);
}

CUBE_API struct cube_http_server *
cube_http_listen(struct cube_loop *l, const char *where,
                 const struct cube_http_route *routes, void *arg,
                 const struct cube_http_options *options,
                 struct cube_err *err)
{
    struct cube_http_server *s;
    struct cube_http_place place;

    if (cube_http_place_parse(where, &place, err) < 0)
        return NULL;
    s = cube_alloc(sizeof *s);
    s->loop = l;
    s->world = cube_loop_world(l);
    s->routes = routes;
    s->arg = arg;
    cube_list_init(&s->conns);
    cube_http_set_options(s, options, place.is_unix ? "" : place.host);
    if (cube_http_bind(s, &place, where, err) < 0) {
        cube_http_close(s);
        return NULL;
    }
    cube_http_listen_on(s, true);
    return s;
}

/* Of the first listener; all have the same. 0 for a unix socket. */
CUBE_API uint16_t cube_http_port(const struct cube_http_server *s)
{
    return s->listeners[0].addr.port;
}

/* ---- The client: its types ---- */

/* A client is a base, a pool of idle connections to it, and the calls that
 * are on their way. HTTP/1.1 has one answer on a connection at a time, so a
 * call has a connection of its own while it lasts:
 *
 *    calls   [GET /tasks]--link--socket      [GET /events]--link--socket
 *    idle    link--socket, link--socket      at most CUBE_HTTP_MAX_IDLE
 *
 * How many connections are open is up to who calls: twenty calls at once are
 * twenty connections, of which eight are kept afterwards. */

#define CUBE_HTTP_MAX_IDLE 8        /* kept connections of one client */
#define CUBE_HTTP_IDLE_MS 60000     /* less than servers keep theirs */
#define CUBE_HTTP_CONNECT_MS 3000   /* before the next address is tried */
#define CUBE_HTTP_AGAIN_MS 10       /* a unix socket's queue was full */
#define CUBE_HTTP_MAX_ANSWER (16 << 20)

/* An object; ends with cube_http_client_free. */
struct cube_http_client {
    struct cube_loop *loop;
    const struct cube_world *world;
    struct cube_http_place place;
    char *base;              /* as it was given, for words */
    char *host;              /* the Host field */
    char *token;             /* or NULL */
    struct cube_list calls;  /* of struct cube_http_call, in order of birth */
    struct cube_list idle;   /* of struct cube_http_link; last used is last */
    int idle_count;
    bool is_closing;
};

/*
 * One connection of a client, and while it has a call, that call's:
 *
 *    connecting -> call --answer complete--> idle --next call--> call
 *         |          |                        |
 *         +----------+------- closed ---------+
 *
 * Freed when it is closed and nobody on the stack works on it.
 */
struct cube_http_link {
    struct cube_http_client *client;
    struct cube_http_call *call;  /* NULL: idle, or closed */
    struct cube_list link;        /* in client->idle */
    struct cube_watch watch;
    struct cube_timer timer;      /* connecting, or idle for too long */
    int fd;                       /* -1: closed */
    bool is_connecting;
    bool is_busy;
    struct cube_http_parser parser;
};

/* Ends with its on_done, or when it is cancelled. */
struct cube_http_call {
    struct cube_http_client *client;
    struct cube_list link;         /* in client->calls; alone: it is done */
    struct cube_http_link *conn;   /* NULL: none yet */
    struct cube_http_request want; /* its callbacks and limits */
    char *what;                    /* "GET http://...", for words */
    struct cube_buf out;           /* the request; sent up to out_at */
    size_t out_at;
    struct cube_buf body;          /* of the answer, collected */
    struct cube_http_head head;    /* of the answer, once it is done */
    struct cube_defer defer;
    struct cube_timer timer;       /* all of it */
    struct cube_timer silence;     /* nothing comes, or goes */
    struct cube_timer again;       /* until a connect is tried again */
    struct cube_loop_job *job;     /* asks for the addresses */
    struct cube_addr addrs[CUBE_JOB_ADDRS];
    int addr_count, addr_next;
    bool is_to_head;
    bool is_repeatable;            /* RFC 9110, section 9.2.2 */
    bool is_reused;                /* on a connection that had another call */
    bool is_retried;
    bool has_head;
    struct cube_err err;           /* what went wrong last */
};

/* ---- Connections of a client ---- */

/* A kept connection may have died in its sleep. Most deaths are seen by the
 * loop, as an idle connection that becomes readable is at its end; the rest
 * when it is taken, by a read that must find nothing. What remains is the
 * server that closes while our request is on its way: see
 * cube_http_call_lost. */

/* Frees it when it is closed and nobody on the stack works on it. */
static void cube_http_link_release(struct cube_http_link *k)
{
    if (k->fd >= 0 || k->is_busy)
        return;
    cube_buf_free(&k->parser.head.text);
    cube_free(k);
}

/* Takes it out of the pool of idle ones, if it is there. */
static void cube_http_link_wake(struct cube_http_link *k)
{
    if (k->call || cube_list_is_empty(&k->link))
        return;
    cube_list_remove(&k->link);
    k->client->idle_count--;
}

/* Closes the socket and lets go of call and pool. What happens to the call is
 * for the caller to say. */
static void cube_http_link_close(struct cube_http_link *k)
{
    struct cube_http_client *c = k->client;

    if (k->fd < 0)
        return;
    cube_http_link_wake(k);
    cube_watch_clear(c->loop, &k->watch);
    cube_timer_clear(c->loop, &k->timer);
    c->world->close(c->world->ctx, k->fd);
    k->fd = -1;
    if (k->call)
        k->call->conn = NULL;
    k->call = NULL;
    cube_http_link_release(k);
}

/* Idle for CUBE_HTTP_IDLE_MS. Servers keep theirs longer, so that it is
 * rarely they who close first. */
static void cube_http_link_expire(void *arg)
{
    cube_http_link_close(arg);
}

/* An idle connection says nothing: if it does, it has ended. */
static void cube_http_link_on_idle(void *arg, unsigned events)
{
    (void)events;
    cube_http_link_close(arg);
}

/* After its call: to the pool, where the oldest may have to leave. */
static void cube_http_link_keep(struct cube_http_link *k)
{
    struct cube_http_client *c = k->client;

    k->call = NULL;
    if (cube_watch_set(c->loop, &k->watch, k->fd, CUBE_READ,
                       cube_http_link_on_idle, k) < 0) {
        cube_http_link_close(k);
        return;
    }
    cube_timer_set(c->loop, &k->timer, CUBE_HTTP_IDLE_MS,
                   cube_http_link_expire, k);
    cube_list_add(&c->idle, &k->link);
    if (++c->idle_count > CUBE_HTTP_MAX_IDLE)
        cube_http_link_close(CUBE_OF(c->idle.next, struct cube_http_link,
                                     link));
}

/* A kept connection that still seems alive, the last used one first. */
static struct cube_http_link *cube_http_link_take(struct cube_http_client *c)
{
    while (!cube_list_is_empty(&c->idle)) {
        struct cube_http_link *k =
            CUBE_OF(c->idle.prev, struct cube_http_link, link);
        char byte;

        if (c->world->recv(c->world->ctx, k->fd, &byte, 1) == -EAGAIN) {
            cube_http_link_wake(k);
            cube_timer_clear(c->loop, &k->timer);
            cube_http_parser_reset(&k->parser);
            return k;
        }
        cube_http_link_close(k);
    }
    return NULL;
}

/* ---- The end of a call ---- */

/* A call ends in exactly one of three ways, and each goes through
 * cube_http_call_stop, which takes it out of everything it waits for:
 *
 *    done      with or without an error: on_done, then freed
 *    cancel    freed, on_done does not run
 *    client    freed with its calls open: each is done with CUBE_ECANCELED
 *
 * During on_done the call is in no list any more; by that it is known, and so
 * cancelling it there does nothing. */

/* Ends what the call has going on, its connection included. */
static void cube_http_call_stop(struct cube_http_call *call)
{
    struct cube_loop *l = call->client->loop;

    cube_list_remove(&call->link);
    cube_defer_clear(l, &call->defer);
    cube_timer_clear(l, &call->timer);
    cube_timer_clear(l, &call->silence);
    cube_timer_clear(l, &call->again);
    if (call->job)
        cube_loop_job_cancel(l, call->job);
    cube_free(call->job);
    call->job = NULL;
    if (call->conn)
        cube_http_link_close(call->conn);
}

/* The end of its memory; stopped before. */
static void cube_http_call_free(struct cube_http_call *call)
{
    cube_buf_free(&call->out);
    cube_buf_free(&call->body);
    cube_buf_free(&call->head.text);
    cube_free(call->what);
    cube_free(call);
}

/* From inside on_head or on_data too: the reader notices that its connection
 * has no call any more. */
CUBE_API void cube_http_call_cancel(struct cube_http_call *call)
{
    if (cube_list_is_empty(&call->link))
        return; /* its on_done is running */
    cube_http_call_stop(call);
    cube_http_call_free(call);
}

/* Tells the caller how it went; `err` NULL: well. The head is taken from the
 * connection, so that what becomes of that does not matter. */
static void cube_http_call_done(struct cube_http_call *call,
                                const struct cube_err *err)
{
    struct cube_http_answer answer;

    if (call->has_head && call->conn) {
        call->head = call->conn->parser.head;
        memset(&call->conn->parser.head, 0, sizeof call->head);
    }
    if (!err && call->conn && call->conn->parser.is_kept &&
        call->out_at == call->out.len) {
        struct cube_http_link *k = call->conn;

        call->conn = NULL;
        cube_http_link_keep(k);
    }
    cube_http_call_stop(call);
    memset(&answer, 0, sizeof answer);
    answer.status = call->has_head ? call->head.status : 0;
    answer.head = call->has_head ? &call->head : NULL;
    answer.body = call->body.data ? call->body.data : "";
    answer.body_len = call->body.len;
    answer.err = err;
    if (call->want.on_done)
        call->want.on_done(call->want.arg, &answer);
    cube_http_call_free(call);
}

/* Ends a call with an error, whose words begin with what was asked of whom:
 * "GET http://a:5555/tasks: ". */
__attribute__((format(printf, 3, 4))) static void
cube_http_call_fail(struct cube_http_call *call, enum cube_code code,
                    const char *format, ...)
{
    struct cube_err err;
    char words[300];
    va_list args;

    va_start(args, format);
    (void)vsnprintf(words, sizeof words, format, args);
    va_end(args);
    (void)cube_fail(&err, code, "%s: %s", call->what, words);
    cube_http_call_done(call, &err);
}

/* ---- Reading an answer ---- */

/*    100 .. 199    passed over, another head follows
 *    the head      on_head
 *    the body      on_data, or gathered up to max_body
 *    the end       the connection goes to the pool, on_done
 *
 * An answer with an error status is an answer: what 404 means, the caller
 * knows. */

/* Mutual recursion: a connection that is refused or lost leads to the next
 * one, whose events lead back here. */
static void cube_http_call_connect(struct cube_http_call *call);
static void cube_http_call_try(void *arg);
static void cube_http_link_on_ready(void *arg, unsigned events);

/* The connection ended or failed before the answer was complete. If it was a
 * kept one and nothing has come, its server had closed it before it saw this
 * request: then another one may bring it, unless a POST could be done twice.
 * `r` is a negative errno value, or 0 for an end. */
static void cube_http_call_lost(struct cube_http_call *call, int r)
{
    bool is_first = !call->has_head &&
                    cube_http_parser_is_fresh(&call->conn->parser);

    if (call->is_reused && !call->is_retried && is_first &&
        (call->is_repeatable || call->out_at == 0)) {
        call->is_retried = true;
        call->is_reused = false;
        call->out_at = 0;
        cube_http_link_close(call->conn);
        cube_http_call_connect(call);
    } else if (r < 0) {
        cube_http_call_fail(call, cube_errno_code(r), "%s",
                            cube_errno_text(r));
    } else {
        cube_http_call_fail(call, CUBE_ECONN, "the connection was closed %s",
                            is_first ? "without an answer"
                                     : "in the middle of the answer");
    }
}

/* To the caller as it comes, or to the collection. */
static void cube_http_call_on_data(struct cube_http_call *call,
                                   const char *data, size_t len)
{
    if (call->want.on_data)
        call->want.on_data(call->want.arg, data, len);
    else if (call->body.len + len > call->want.max_body)
        cube_http_call_fail(call, CUBE_ETOOBIG, "the answer has more than "
                            "%zu bytes", call->want.max_body);
    else
        cube_buf_add(&call->body, data, len);
}

/* 1xx answers come before the one that counts; 101 would change the protocol,
 * which nobody asked for. */
static void cube_http_call_on_head(struct cube_http_call *call,
                                   struct cube_http_parser *p)
{
    if (p->head.status == 101) {
        cube_http_call_fail(call, CUBE_EPROTO, "the other side wants to "
                                               "speak another protocol");
    } else if (p->head.status < 200) {
        cube_http_parser_reset(p);
        p->is_to_head = call->is_to_head;
    } else {
        call->has_head = true;
        if (call->want.on_head)
            call->want.on_head(call->want.arg, &p->head);
    }
}

/* Feeds the parser and calls back. Each callback may cancel its call: then
 * the connection has none any more. */
static void cube_http_link_feed(struct cube_http_link *k,
                                struct cube_http_input *in)
{
    while (k->call) {
        switch (cube_http_parse(&k->parser, in)) {
        case CUBE_HTTP_HEAD:
            cube_http_call_on_head(k->call, &k->parser);
            break;
        case CUBE_HTTP_DATA:
            cube_http_call_on_data(k->call, k->parser.piece,
                                   k->parser.piece_len);
            break;
        case CUBE_HTTP_END:
            if (in->len > 0) /* nobody asked for that: not to be reused */
                k->parser.is_kept = false;
            cube_http_call_done(k->call, NULL);
            return;
        case CUBE_HTTP_ERROR:
            cube_http_call_fail(k->call, CUBE_EPROTO, "the answer is not "
                                "HTTP: %s", k->parser.words);
            return;
        case CUBE_HTTP_MORE:
        case CUBE_HTTP_GO_ON:
            return;
        }
    }
}

/* Nothing came for idle_timeout_ms: of a stream with a heartbeat that means
 * that its server, or the way to it, is gone. */
static void cube_http_call_on_silence(void *arg)
{
    struct cube_http_call *call = arg;

    cube_http_call_fail(call, CUBE_ETIMEOUT, "nothing came for %d ms",
                        call->want.idle_timeout_ms);
}

/* Something was heard, so the silence begins anew. It begins with the call
 * itself: connecting is silence too. */
static void cube_http_call_hear(struct cube_http_call *call)
{
    if (call->want.idle_timeout_ms > 0)
        cube_timer_set(call->client->loop, &call->silence,
                       call->want.idle_timeout_ms, cube_http_call_on_silence,
                       call);
}

/* One recv a look, as in the server. An end of input is the end of an answer
 * only where the answer has no other. */
static void cube_http_link_read(struct cube_http_link *k)
{
    const struct cube_world *w = k->client->world;
    char bytes[CUBE_HTTP_READ];
    int n = w->recv(w->ctx, k->fd, bytes, sizeof bytes);
    struct cube_http_input in = {bytes, n > 0 ? (size_t)n : 0};

    if (n == -EAGAIN)
        return;
    if (n > 0) {
        cube_http_call_hear(k->call);
        cube_http_link_feed(k, &in);
    } else if (n == 0 && !cube_http_parser_is_fresh(&k->parser) &&
               cube_http_parse_eof(&k->parser) == CUBE_HTTP_END) {
        cube_http_call_done(k->call, NULL);
    } else {
        cube_http_call_lost(k->call, n);
    }
}

/* ---- Sending a request ---- */

/* A request is one buffer, head and body, written when the call is made; a
 * retry begins it again from the front. There are no Accept-Encoding, no
 * cookies and no redirects: an orchestrator talks to those that it was told
 * of. */

/* Sends what can be sent. A server may answer, and close, without reading all
 * of a request: so a failure to send is only noted here as the end of
 * sending, and reading tells the outcome. */
static void cube_http_link_send(struct cube_http_link *k)
{
    struct cube_http_call *call = k->call;
    const struct cube_world *w = k->client->world;
    unsigned events = CUBE_READ;

    while (call->out_at < call->out.len) {
        int n = w->send(w->ctx, k->fd, call->out.data + call->out_at,
                        call->out.len - call->out_at);

        if (n <= 0) {
            events |= n == -EAGAIN ? CUBE_WRITE : 0;
            break;
        }
        call->out_at += (size_t)n;
    }
    if (cube_watch_set(k->client->loop, &k->watch, k->fd, events,
                       cube_http_link_on_ready, k) < 0)
        cube_http_call_fail(call, CUBE_EIO, "watch its connection");
}

/* The connection is there: the request goes out on it. */
static void cube_http_link_begin(struct cube_http_link *k)
{
    cube_timer_clear(k->client->loop, &k->timer);
    k->is_connecting = false;
    k->parser.is_answer = true;
    k->parser.is_to_head = k->call->is_to_head;
    cube_http_link_send(k);
}

/* ---- Connecting ---- */

/*    places known? --no--> resolver, beside the loop --none--> fails
 *         | yes                    |
 *         +<-----------------------+
 *         v
 *    next address --connect--> in progress --writable--> request goes out
 *         ^                        |
 *         +--- refused, or 3 s ----+        no address left: fails with
 *                                           the words of the last one
 *
 * Addresses are tried one after the other. RFC 8305 (Happy Eyeballs) would
 * race them; in a cluster a name has one address, or two of one machine. */

/* That address did not work: on to the next one. */
static void cube_http_call_refused(struct cube_http_call *call, int r)
{
    char text[128];

    cube_http_addr_text(&call->addrs[call->addr_next - 1], text, sizeof text);
    (void)cube_fail(&call->err, cube_errno_code(r), "connect to %s: %s", text,
                    cube_errno_text(r));
    if (call->conn)
        cube_http_link_close(call->conn);
}

/* Whether it worked out is asked of the socket, since readiness may be told
 * without cause. */
static void cube_http_link_connected(struct cube_http_link *k,
                                     unsigned events)
{
    const struct cube_world *w = k->client->world;
    struct cube_http_call *call = k->call;
    int r = events & (CUBE_WRITE | CUBE_HANGUP) ? w->connected(w->ctx, k->fd)
                                                : -EAGAIN;

    if (r == 0) {
        cube_http_link_begin(k);
    } else if (r != -EAGAIN) {
        cube_http_call_refused(call, r);
        cube_http_call_try(call);
    }
}

/* The one entry from the loop while a call is on: connecting, writing or
 * reading. Busy all the while, as each of them may end call, connection and
 * client. */
static void cube_http_link_on_ready(void *arg, unsigned events)
{
    struct cube_http_link *k = arg;

    k->is_busy = true;
    if (k->is_connecting) {
        cube_http_link_connected(k, events);
    } else {
        if (events & CUBE_WRITE)
            cube_http_link_send(k);
        if (k->call && events & (CUBE_READ | CUBE_HANGUP))
            cube_http_link_read(k);
    }
    k->is_busy = false;
    cube_http_link_release(k);
}

/* Only set while there is another address to try; the last one has the time
 * that the call has. */
static void cube_http_link_too_slow(void *arg)
{
    struct cube_http_link *k = arg;
    struct cube_http_call *call = k->call;

    cube_http_call_refused(call, -ETIMEDOUT);
    cube_http_call_try(call);
}

/* Waits for a connection in progress. While there are other addresses, one
 * that does not answer is left after a moment. */
static int cube_http_call_open(struct cube_http_call *call, int fd)
{
    struct cube_http_client *c = call->client;
    struct cube_http_link *k = cube_alloc(sizeof *k);

    cube_list_init(&k->link);
    k->client = c;
    k->call = call;
    k->fd = fd;
    k->is_connecting = true;
    call->conn = k;
    if (call->addr_next < call->addr_count)
        cube_timer_set(c->loop, &k->timer, CUBE_HTTP_CONNECT_MS,
                       cube_http_link_too_slow, k);
    return cube_watch_set(c->loop, &k->watch, fd, CUBE_WRITE,
                          cube_http_link_on_ready, k);
}

/* Connects to the next address; the call fails when none is left. */
static void cube_http_call_try(void *arg)
{
    struct cube_http_call *call = arg;
    const struct cube_world *w = call->client->world;

    while (call->addr_next < call->addr_count) {
        int fd = w->connect(w->ctx, &call->addrs[call->addr_next]);

        if (fd == -EAGAIN) {
            cube_timer_set(call->client->loop, &call->again,
                           CUBE_HTTP_AGAIN_MS, cube_http_call_try, call);
            return;
        }
        call->addr_next++;
        if (fd >= 0 && cube_http_call_open(call, fd) == 0)
            return;
        cube_http_call_refused(call, fd < 0 ? fd : -ENOMEM);
    }
    cube_http_call_fail(call, call->err.code, "%s", call->err.text);
}

/* Names have no port: that comes from the base. */
static void cube_http_call_on_resolved(void *arg, struct cube_job *job)
{
    struct cube_http_call *call = arg;

    if (job->result < 0) {
        cube_http_call_fail(call, CUBE_ECONN, "find the address of %s: %s",
                            call->client->place.host,
                            cube_errno_text(job->result));
        return;
    }
    memcpy(call->addrs, job->addrs, sizeof call->addrs);
    call->addr_count = job->addr_count;
    for (int i = 0; i < call->addr_count; i++)
        call->addrs[i].port = call->client->place.port;
    cube_free(call->job);
    call->job = NULL;
    cube_http_call_try(call);
}

/* From the first address on. Nothing is remembered from call to call:
 * addresses change, and resolvers have caches. */
static void cube_http_call_connect(struct cube_http_call *call)
{
    struct cube_http_client *c = call->client;
    int r;

    call->addr_next = 0;
    call->addr_count = cube_http_place_known(&c->place, call->addrs);
    if (call->addr_count > 0) {
        cube_http_call_try(call);
        return;
    }
    call->job = cube_alloc(sizeof *call->job);
    r = cube_resolve_start(c->loop, call->job, c->place.host,
                           cube_http_call_on_resolved, call);
    if (r < 0)
        cube_http_call_fail(call, CUBE_EIO, "find the address of %s: %s",
                            c->place.host, cube_errno_text(r));
}

/* ---- The client's interface ---- */

/* Making a call does nothing but write it down: it begins at the end of the
 * turn, so that no callback can run before cube_http_call has returned, and a
 * call that cannot be right fails in the same way as one that went wrong. */

/* timeout_ms is over. What was wrong with the addresses tried so far is said
 * too, as it is usually the reason. */
static void cube_http_call_on_time(void *arg)
{
    struct cube_http_call *call = arg;

    cube_http_call_fail(call, CUBE_ETIMEOUT, "no %sanswer within %d ms%s%s",
                        call->has_head ? "complete " : "",
                        call->want.timeout_ms, *call->err.text ? "; " : "",
                        call->err.text);
}

/* The first step, in the turn after the call. */
static void cube_http_call_start(void *arg)
{
    struct cube_http_call *call = arg;
    struct cube_http_link *k;

    if (call->err.code) {
        cube_http_call_fail(call, call->err.code, "%s", call->err.text);
        return;
    }
    cube_http_call_hear(call);
    k = cube_http_link_take(call->client);
    if (!k) {
        cube_http_call_connect(call);
        return;
    }
    k->call = call;
    call->conn = k;
    call->is_reused = true;
    cube_http_link_begin(k);
}

/* The caller's fields. A line end in one of them would begin another field,
 * or another request: the call then fails instead. */
static void cube_http_call_put_fields(struct cube_http_call *call,
                                      const char *const *fields)
{
    bool has_type = false;

    for (; fields && fields[0]; fields += 2) {
        if (!cube_http_all(fields[0], strlen(fields[0]),
                           cube_http_is_token) ||
            !cube_http_all(fields[1], strlen(fields[1]), cube_http_is_text))
            (void)cube_fail(&call->err, CUBE_EINVAL,
                            "the field %s holds a control character",
                            fields[0]);
        cube_http_put_field(&call->out, fields[0], fields[1]);
        has_type |= cube_text_is_nocase(fields[0], strlen(fields[0]),
                                        "Content-Type");
    }
    if (call->want.body_len > 0 && !has_type)
        cube_http_put_field(&call->out, "Content-Type", "application/json");
}

/* The request as it goes out. A POST without a body says so, with length 0:
 * some servers wait for one otherwise. */
static void cube_http_call_put_request(struct cube_http_call *call,
                                       const struct cube_http_request *r)
{
    struct cube_http_client *c = call->client;
    const char *method = call->want.method;
    bool has_body = r->body_len > 0 || strcmp(method, "POST") == 0 ||
                    strcmp(method, "PUT") == 0 ||
                    strcmp(method, "PATCH") == 0;

    if (*call->want.target != '/' ||
        !cube_http_all(call->want.target, strlen(call->want.target),
                       cube_http_is_visible))
        (void)cube_fail(&call->err, CUBE_EINVAL, "that is no target");
    cube_buf_puts(&call->out, method);
    cube_buf_addc(&call->out, ' ');
    cube_buf_puts(&call->out, call->want.target);
    cube_buf_puts(&call->out, " HTTP/1.1\r\n");
    cube_http_put_field(&call->out, "Host", c->host);
    if (c->token)
        cube_buf_printf(&call->out, "Authorization: Bearer %s\r\n", c->token);
    cube_http_call_put_fields(call, r->headers);
    if (has_body)
        cube_buf_printf(&call->out, "Content-Length: %zu\r\n", r->body_len);
    cube_buf_puts(&call->out, "\r\n");
    cube_buf_add(&call->out, r->body, r->body_len);
}

/* Idempotent by RFC 9110, section 9.2.2: doing it twice is like doing it
 * once. */
static bool cube_http_is_repeatable(const char *method)
{
    static const char *const methods[] = {"GET", "HEAD", "PUT", "DELETE",
                                          "OPTIONS", "TRACE"};

    for (size_t i = 0; i < CUBE_COUNT(methods); i++) {
        if (strcmp(method, methods[i]) == 0)
            return true;
    }
    return false;
}

/* Copies what was borrowed; what remains of the request is its callbacks and
 * limits. */
CUBE_API struct cube_http_call *
cube_http_call(struct cube_http_client *c, const struct cube_http_request *r)
{
    struct cube_http_call *call = cube_alloc(sizeof *call);
    struct cube_buf what = {0};

    CUBE_ASSERT(!c->is_closing);
    call->client = c;
    call->want = *r;
    call->want.method = r->method ? r->method : "GET";
    call->want.target = r->target ? r->target : "/";
    if (r->max_body == 0)
        call->want.max_body = CUBE_HTTP_MAX_ANSWER;
    cube_buf_printf(&what, "%s %s%s%s", call->want.method, c->base,
                    c->place.is_unix ? " " : "", call->want.target);
    call->what = cube_buf_take(&what);
    call->is_to_head = strcmp(call->want.method, "HEAD") == 0;
    call->is_repeatable = cube_http_is_repeatable(call->want.method);
    cube_http_call_put_request(call, r);
    call->want.method = call->want.target = NULL; /* were borrowed */
    call->want.headers = NULL;
    call->want.body = NULL;
    cube_list_add(&c->calls, &call->link);
    if (r->timeout_ms > 0)
        cube_timer_set(c->loop, &call->timer, r->timeout_ms,
                       cube_http_call_on_time, call);
    cube_defer_set(c->loop, &call->defer, cube_http_call_start, call);
    return call;
}

/* The Host field: RFC 9110, section 7.2. */
static char *cube_http_host_field(const struct cube_http_place *place)
{
    struct cube_buf b = {0};
    bool is_ip6 = strchr(place->host, ':') != NULL;

    if (place->is_unix) {
        cube_buf_puts(&b, "localhost");
    } else {
        cube_buf_printf(&b, is_ip6 ? "[%s]" : "%s", place->host);
        if (place->port != 80)
            cube_buf_printf(&b, ":%u", (unsigned)place->port);
    }
    return cube_buf_take(&b);
}

/* Only looks at its texts: a server that is not there yet is no error here. */
CUBE_API struct cube_http_client *
cube_http_client_new(struct cube_loop *l, const char *base,
                     const char *token, struct cube_err *err)
{
    struct cube_http_client *c;
    struct cube_http_place place;

    if (cube_text_starts(base, "https://")) {
        (void)cube_fail(err, CUBE_EINVAL, "%s: there is no TLS here", base);
        return NULL;
    }
    if (cube_http_place_parse(base, &place, err) < 0)
        return NULL;
    if (!place.is_unix && (!*place.host || place.port == 0)) {
        (void)cube_fail(err, CUBE_EINVAL, "%s names no host and port", base);
        return NULL;
    }
    if (token && !cube_http_all(token, strlen(token), cube_http_is_visible)) {
        (void)cube_fail(err, CUBE_EINVAL, "a token holds a character that is "
                                          "not visible ASCII");
        return NULL;
    }
    c = cube_alloc(sizeof *c);
    c->loop = l;
    c->world = cube_loop_world(l);
    c->place = place;
    c->base = cube_text_dup(base);
    if (!place.is_unix && base[strlen(base) - 1] == '/')
        c->base[strlen(base) - 1] = 0;
    c->host = cube_http_host_field(&place);
    c->token = cube_text_dup(token);
    cube_list_init(&c->calls);
    cube_list_init(&c->idle);
    return c;
}

/* Calls first: each leaves the list before its on_done runs, which may cancel
 * others of them. */
CUBE_API void cube_http_client_free(struct cube_http_client *c)
{
    if (!c)
        return;
    c->is_closing = true;
    while (!cube_list_is_empty(&c->calls))
        cube_http_call_fail(CUBE_OF(c->calls.next, struct cube_http_call,
                                    link), CUBE_ECANCELED, "given up");
    while (!cube_list_is_empty(&c->idle))
        cube_http_link_close(CUBE_OF(c->idle.next, struct cube_http_link,
                                     link));
    cube_free(c->base);
    cube_free(c->host);
    cube_free(c->token);
    cube_free(c);
}


/* ==== Chapter 7. Tasks ==== uses: 1 2 3 4 5 6 ==== */
/*
 * A task is the unit of everything: a container, or a process, that should
 * run somewhere, and the record of what became of it. An event is a wish about
 * a task. Both travel as JSON between Cube and the Go implementation, byte
 * for byte in the same form, and rest in the store in that form too.
 *
 * The problem is that one record needs half a dozen operations (read, print,
 * copy, compare, free, make empty) over some thirty fields. The simplest
 * thing that works, a function per operation that names every field, puts
 * each field in six places that drift apart. Here each field stands in one
 * table, in the order of the wire, and each kind of field (a text, a time, a
 * map of ports) has one set of functions:
 *
 *    cube_task_fields                          a kind
 *    +---------------+--------+------+         +-----------------------+
 *    | "ID"          | id     | uuid | ------> | read, print, is_set,  |
 *    | "ContainerID" | text   |      |         | init, copy, free      |
 *    | ...           |        |      |         +-----------------------+
 *    | "Cmd"         | words  | own  |   own:  written only when set, since
 *    +---------------+--------+------+         a Go manager refuses keys that
 *         key          kind     flags          it does not know
 *                                        spec: the user's; compared when the
 *                                              same ID is submitted again
 *
 * On the wire (`...` stands for the other fields):
 *
 *    {"ID":"efeadce0-d016-4a39-882a-d2c5196cce1c","ContainerID":"",
 *     "Name":"web","State":2, ...
 *     "HostPorts":{"80/tcp":[{"HostIp":"0.0.0.0","HostPort":"32771"}]},
 *     "ExposedPorts":{"80/tcp":{}},"PortBindings":{"80/tcp":"8080"}, ...
 *     "StartTime":"0001-01-01T00:00:00Z", ... "RestartCount":0}
 *
 *    {"ID":"<uuid>","State":2,"Timestamp":"...","Task":{...}}
 *
 * Reading follows Go's decoder, since its users' files were written for it:
 * keys match without regard to case, of equal keys the last one wins, a null
 * leaves the field as it was, integers are written as integers. A manager is
 * strict and refuses unknown keys (a misspelt "Imgae" should be told); a
 * worker is lax, since its manager may be newer.
 *
 * Reading says whether the JSON is a task. cube_task_check says whether an
 * engine could ever run it, with the name of the field that it could not:
 * what cannot be right is refused at once, before it has an ID that somebody
 * waits for. What only one engine on one day can know (is there such an
 * image, is that port free) is left to the engine and its own words.
 *
 * Invariants: texts are never NULL; ports are sorted, no two alike, so that
 * printing needs no memory and equal tasks print alike; a task that was read
 * prints as it was written, but for the order and case of its keys.
 *
 * A typical sequence:
 *
 *    struct cube_event *e;
 *    if (cube_task_or_event_parse(body, len, true, &e, err) ||
 *        cube_task_check(e->task, err))
 *        ... 400 with err->text ...
 *    cube_task_print(e->task, &out);
 *    cube_event_free(e);
 *
 * Naive on purpose: a key is found by walking the table, from behind the key
 * before it, so that what we wrote ourselves is found at the first look.
 */

#define CUBE_TASK_NAME_MAX 255   /* characters of a name, or an image's */
#define CUBE_TASK_PORTS_MAX 1024 /* ports in one map of a task */
#define CUBE_TASK_CPU_MAX 1e6    /* cores; engines count in 10^-9 of one */

/* ---- States ----
 *
 *    submitted            placed                  it runs
 *   ----------> PENDING -----------> SCHEDULED -----------> RUNNING --+
 *                ^ | ^                | ^ | ^ |             | ^ | |   | looks
 *                | | |   node lost    | | | +-+ told again  | +-+-|---+ the
 *                | | +----------------+ | |                 |     |     same
 *                | | |                  | +-----------------|---+ |
 *                | | +-- node lost -----|-------------------+   | |
 *                | |                    | restart, move         v v
 *                | |                    +-------------------- FAILED
 *                | +-----------+                              | |
 *                +-------------|--- nothing fits -------------+ |
 *                              v                                |
 *                          COMPLETED <--- stopped --------------+
 *                     (also from SCHEDULED when stopped, and from RUNNING
 *                      when it ends with 0; nothing leaves COMPLETED)
 */
CUBE_API bool cube_state_may(enum cube_state from, enum cube_state to)
{
    /* a row: from; a column: to Pending, Scheduled, Running, ... */
    static const bool table[5][5] = {
        [CUBE_PENDING] = {false, true, false, true, false},
        [CUBE_SCHEDULED] = {true, true, true, true, true},
        [CUBE_RUNNING] = {true, true, true, true, true},
        [CUBE_COMPLETED] = {false, false, false, false, false},
        [CUBE_FAILED] = {true, true, false, true, false},
    };

    return table[from][to];
}

CUBE_API const char *cube_state_name(enum cube_state state)
{
    static const char *const names[] = {"Pending", "Scheduled", "Running",
                                        "Completed", "Failed"};

    return names[state];
}

/* ---- Ports and lists ---- */

CUBE_API int cube_port_parse(const char *text, int *number,
                             const char **protocol)
{
    static const char *const endings[] = {"", "/tcp", "/udp", "/sctp"};
    static const char *const protocols[] = {"tcp", "tcp", "udp", "sctp"};
    size_t digits = strspn(text, "0123456789");
    uint64_t value;

    if (cube_text_u64(text, digits, 65535, &value) || value == 0)
        return -1;
    for (size_t i = 0; i < CUBE_COUNT(endings); i++) {
        if (!strcmp(text + digits, endings[i])) {
            *number = (int)value;
            *protocol = protocols[i];
            return 0;
        }
    }
    return -1;
}

/* How a key of a port map begins, whatever else is in the entry; so that one
 * search serves the three kinds of map. */
static const char *cube_ports_key(const void *list, size_t size, size_t i)
{
    const char *key;

    memcpy(&key, (const char *)list + i * size, sizeof key);
    return key;
}

/*
 * The entry of `key` in a sorted list of entries of `size` bytes that begin
 * with their key: the one that is there, or a new one of zeros and the key.
 * NULL: the list is full. `list` is the address of the pointer to it.
 */
static void *cube_ports_slot(void *list, size_t *count, size_t size,
                             const char *key)
{
    size_t low = 0, high = *count;
    char *entries, *copy;

    memcpy(&entries, list, sizeof entries);
    while (low < high) {
        size_t middle = (low + high) / 2;
        int order = strcmp(cube_ports_key(entries, size, middle), key);

        if (order == 0)
            return entries + middle * size;
        if (order < 0)
            low = middle + 1;
        else
            high = middle;
    }
    if (*count == CUBE_TASK_PORTS_MAX)
        return NULL;
    entries = cube_resize(entries, (*count + 1) * size);
    memcpy(list, &entries, sizeof entries);
    entries += low * size;
    memmove(entries + size, entries, (*count - low) * size);
    memset(entries, 0, size);
    copy = cube_text_dup(key);
    memcpy(entries, &copy, sizeof copy);
    ++*count;
    return entries;
}

static void *cube_texts_slot(struct cube_texts *t, const char *key)
{
    t->is_null = false;
    return cube_ports_slot(&t->list, &t->count, sizeof *t->list, key);
}

static struct cube_publish *cube_publishes_slot(struct cube_publishes *p,
                                                const char *key)
{
    p->is_null = false;
    return cube_ports_slot(&p->list, &p->count, sizeof *p->list, key);
}

static struct cube_port *cube_port_slot(struct cube_ports *p, const char *key)
{
    p->is_null = false;
    return cube_ports_slot(&p->list, &p->count, sizeof *p->list, key);
}

static void cube_port_add(struct cube_port *p, const char *ip,
                          const char *host_port)
{
    struct cube_binding *b;

    p->bindings =
        cube_resize(p->bindings, (p->count + 1) * sizeof *p->bindings);
    b = &p->bindings[p->count++];
    b->ip = cube_text_dup(ip ? ip : "");
    b->port = cube_text_dup(host_port ? host_port : "");
}

static void cube_port_clear(struct cube_port *p)
{
    for (size_t i = 0; i < p->count; i++) {
        cube_free(p->bindings[i].ip);
        cube_free(p->bindings[i].port);
    }
    cube_free(p->bindings);
    p->bindings = NULL;
    p->count = 0;
    p->is_null = false;
}

/* ---- Kinds of fields ---- */

/*
 * What can be done with a field. `field` points at it. `read` gets a value
 * that is no null; -1: it is not what `expects` says (a kind without that
 * explains itself). After a failed read the field can still be freed.
 */
struct cube_kind {
    const char *expects;
    int (*read)(void *field, struct json_value_s *v, bool is_strict,
                struct cube_err *err);
    void (*print)(const void *field, struct cube_buf *out);
    bool (*is_set)(const void *field);
    void (*init)(void *field);                   /* NULL: zeros are right */
    void (*copy)(void *field, const void *from); /* NULL: the bytes will do */
    void (*free)(void *field);                   /* NULL: nothing is owned */
};

/* A string as a C string; NULL when it is none, or has a NUL inside. */
static const char *cube_kind_text(struct json_value_s *v)
{
    size_t len;
    const char *s = cube_json_str(v, &len);

    return s && strlen(s) == len ? s : NULL;
}

/* Texts: char *, owned, never NULL. */

static int cube_text_read(void *field, struct json_value_s *v, bool is_strict,
                          struct cube_err *err)
{
    const char *s = cube_kind_text(v);

    (void)is_strict;
    (void)err;
    if (!s)
        return -1;
    cube_text_set(field, s);
    return 0;
}

static void cube_text_print(const void *field, struct cube_buf *out)
{
    cube_json_put_text(out, *(char *const *)field);
}

static bool cube_text_is_set(const void *field)
{
    return **(char *const *)field != 0;
}

static void cube_text_init(void *field)
{
    *(char **)field = cube_text_dup("");
}

static void cube_text_copy(void *field, const void *from)
{
    *(char **)field = cube_text_dup(*(char *const *)from);
}

static void cube_text_free(void *field)
{
    cube_free(*(char **)field);
}

static const struct cube_kind cube_kind_of_text = {
    "a text without NUL bytes", cube_text_read, cube_text_print,
    cube_text_is_set, cube_text_init, cube_text_copy, cube_text_free};

/* UUIDs: char[CUBE_UUID_TEXT]. Go writes an ID that was not given as zeros,
 * so zeros are none. */
static const char cube_uuid_zero[] = "00000000-0000-0000-0000-000000000000";

static int cube_id_read(void *field, struct json_value_s *v, bool is_strict,
                        struct cube_err *err)
{
    size_t len;
    const char *s = cube_json_str(v, &len);

    (void)is_strict;
    (void)err;
    if (!s || cube_uuid_parse(s, len, field))
        return -1;
    if (!strcmp(field, cube_uuid_zero))
        *(char *)field = 0;
    return 0;
}

static void cube_id_print(const void *field, struct cube_buf *out)
{
    cube_json_put_text(out, *(const char *)field ? field : cube_uuid_zero);
}

static bool cube_id_is_set(const void *field)
{
    return *(const char *)field != 0;
}

static const struct cube_kind cube_kind_of_id = {
    "a UUID", cube_id_read, cube_id_print, cube_id_is_set, NULL, NULL, NULL};

/* Integers: int64_t. */

static int cube_i64_read(void *field, struct json_value_s *v, bool is_strict,
                         struct cube_err *err)
{
    (void)is_strict;
    (void)err;
    return cube_json_i64(v, field);
}

static void cube_i64_print(const void *field, struct cube_buf *out)
{
    cube_json_put_i64(out, *(const int64_t *)field);
}

static bool cube_i64_is_set(const void *field)
{
    return *(const int64_t *)field != 0;
}

static const struct cube_kind cube_kind_of_i64 = {
    "an integer", cube_i64_read, cube_i64_print, cube_i64_is_set, NULL, NULL,
    NULL};

/* A budget: an integer that is unset at -1. */

static bool cube_budget_is_set(const void *field)
{
    return *(const int64_t *)field != -1;
}

static void cube_budget_init(void *field)
{
    *(int64_t *)field = -1;
}

static const struct cube_kind cube_kind_of_budget = {
    "an integer", cube_i64_read, cube_i64_print, cube_budget_is_set,
    cube_budget_init, NULL, NULL};

/* Numbers: double. */

static int cube_f64_read(void *field, struct json_value_s *v, bool is_strict,
                         struct cube_err *err)
{
    (void)is_strict;
    (void)err;
    return cube_json_f64(v, field);
}

static void cube_f64_print(const void *field, struct cube_buf *out)
{
    cube_json_put_f64(out, *(const double *)field);
}

static bool cube_f64_is_set(const void *field)
{
    return *(const double *)field != 0;
}

static const struct cube_kind cube_kind_of_f64 = {
    "a number", cube_f64_read, cube_f64_print, cube_f64_is_set, NULL, NULL,
    NULL};

/* Times: struct cube_time. */

static int cube_json_time(struct json_value_s *v, struct cube_time *out)
{
    size_t len;
    const char *s = cube_json_str(v, &len);

    return s ? cube_time_parse(s, len, out) : -1;
}

static void cube_json_put_time(struct cube_buf *out, const struct cube_time *t)
{
    char text[CUBE_TIME_TEXT];

    if (!cube_time_is_set(t)) {
        cube_buf_puts(out, "\"0001-01-01T00:00:00Z\"");
        return;
    }
    cube_time_format(t, text);
    cube_buf_addc(out, '"');
    cube_buf_puts(out, text);
    cube_buf_addc(out, '"');
}

static int cube_time_read(void *field, struct json_value_s *v, bool is_strict,
                          struct cube_err *err)
{
    (void)is_strict;
    (void)err;
    return cube_json_time(v, field);
}

static void cube_time_print(const void *field, struct cube_buf *out)
{
    cube_json_put_time(out, field);
}

static bool cube_time_field_is_set(const void *field)
{
    return cube_time_is_set(field);
}

static const struct cube_kind cube_kind_of_time = {
    "a time like 2025-03-01T10:11:12Z", cube_time_read, cube_time_print,
    cube_time_field_is_set, NULL, NULL, NULL};

/* States: enum cube_state, as integers. */

static int cube_state_read(void *field, struct json_value_s *v, bool is_strict,
                           struct cube_err *err)
{
    int64_t i;

    (void)is_strict;
    (void)err;
    if (cube_json_i64(v, &i) || i < CUBE_PENDING || i > CUBE_FAILED)
        return -1;
    *(enum cube_state *)field = (enum cube_state)i;
    return 0;
}

static void cube_state_print(const void *field, struct cube_buf *out)
{
    cube_json_put_i64(out, *(const enum cube_state *)field);
}

static bool cube_state_is_set(const void *field)
{
    return *(const enum cube_state *)field != CUBE_PENDING;
}

static const struct cube_kind cube_kind_of_state = {
    "0 (Pending), 1 (Scheduled), 2 (Running), 3 (Completed) or 4 (Failed)",
    cube_state_read, cube_state_print, cube_state_is_set, NULL, NULL, NULL};

/* Wishes: enum cube_wanted. */

static int cube_wanted_read(void *field, struct json_value_s *v,
                            bool is_strict, struct cube_err *err)
{
    const char *s = cube_kind_text(v);

    (void)is_strict;
    (void)err;
    if (!s || (strcmp(s, "run") && strcmp(s, "stop")))
        return -1;
    *(enum cube_wanted *)field =
        strcmp(s, "run") ? CUBE_WANT_STOP : CUBE_WANT_RUN;
    return 0;
}

static void cube_wanted_print(const void *field, struct cube_buf *out)
{
    cube_json_put_text(out, *(const enum cube_wanted *)field == CUBE_WANT_RUN
                                ? "run"
                                : "stop");
}

static bool cube_wanted_is_set(const void *field)
{
    return *(const enum cube_wanted *)field != CUBE_WANT_UNSET;
}

static const struct cube_kind cube_kind_of_wanted = {
    "run or stop", cube_wanted_read, cube_wanted_print, cube_wanted_is_set,
    NULL, NULL, NULL};

/* The exit code: two members; its field is the whole task. */

static int cube_exit_read(void *field, struct json_value_s *v, bool is_strict,
                          struct cube_err *err)
{
    struct cube_task *t = field;

    (void)is_strict;
    (void)err;
    if (cube_json_i64(v, &t->exit_code))
        return -1;
    t->has_exit_code = true;
    return 0;
}

static void cube_exit_print(const void *field, struct cube_buf *out)
{
    cube_json_put_i64(out, ((const struct cube_task *)field)->exit_code);
}

static bool cube_exit_is_set(const void *field)
{
    return ((const struct cube_task *)field)->has_exit_code;
}

static const struct cube_kind cube_kind_of_exit = {
    "an integer", cube_exit_read, cube_exit_print, cube_exit_is_set, NULL,
    NULL, NULL};

/* Lists of words: struct cube_texts, an array on the wire. */

CUBE_API void cube_task_add(struct cube_texts *texts, const char *value)
{
    size_t cap = texts->count;

    /* Grown at the powers of two, so that no capacity need be kept. */
    if ((cap & (cap - 1)) == 0)
        texts->list =
            cube_resize(texts->list, (cap ? cap * 2 : 1) * sizeof(char *));
    texts->list[texts->count++] = cube_text_dup(value ? value : "");
    texts->is_null = false;
}

static void cube_words_init(void *field)
{
    ((struct cube_texts *)field)->is_null = true;
}

static void cube_words_free(void *field)
{
    struct cube_texts *t = field;

    for (size_t i = 0; i < t->count; i++)
        cube_free(t->list[i]);
    cube_free(t->list);
    memset(t, 0, sizeof *t);
    t->is_null = true;
}

static int cube_words_read(void *field, struct json_value_s *v, bool is_strict,
                           struct cube_err *err)
{
    (void)is_strict;
    (void)err;
    if (!json_value_as_array(v))
        return -1;
    cube_words_free(field);
    ((struct cube_texts *)field)->is_null = false;
    for (struct json_array_element_s *e = cube_json_items(v); e; e = e->next) {
        const char *s = cube_kind_text(e->value);

        if (!s)
            return -1;
        cube_task_add(field, s);
    }
    return 0;
}

static void cube_words_print(const void *field, struct cube_buf *out)
{
    const struct cube_texts *t = field;

    cube_buf_addc(out, '[');
    for (size_t i = 0; i < t->count; i++) {
        if (i > 0)
            cube_buf_addc(out, ',');
        cube_json_put_text(out, t->list[i]);
    }
    cube_buf_addc(out, ']');
}

static bool cube_words_is_set(const void *field)
{
    return ((const struct cube_texts *)field)->count > 0;
}

static void cube_words_copy(void *field, const void *from)
{
    const struct cube_texts *t = from;
    struct cube_texts copy = {NULL, 0, t->is_null};

    for (size_t i = 0; i < t->count; i++)
        cube_task_add(&copy, t->list[i]);
    *(struct cube_texts *)field = copy;
}

static const struct cube_kind cube_kind_of_words = {
    "a list of texts without NUL bytes",
    cube_words_read,
    cube_words_print,
    cube_words_is_set,
    cube_words_init,
    cube_words_copy,
    cube_words_free};

/* Sets of ports: struct cube_texts, an object of empty objects on the wire:
 * {"7777/tcp":{}}. */

static int cube_exposed_read(void *field, struct json_value_s *v,
                             bool is_strict, struct cube_err *err)
{
    (void)err;
    if (!json_value_as_object(v))
        return -1;
    cube_words_free(field);
    ((struct cube_texts *)field)->is_null = false;
    for (struct json_object_element_s *m = cube_json_members(v); m;
         m = m->next) {
        bool is_object = json_value_as_object(m->value) != NULL;

        if ((!is_object && !json_value_is_null(m->value)) ||
            (is_strict && cube_json_members(m->value)) ||
            strlen(m->name->string) != m->name->string_size ||
            !cube_texts_slot(field, m->name->string))
            return -1;
    }
    return 0;
}

static void cube_exposed_print(const void *field, struct cube_buf *out)
{
    const struct cube_texts *t = field;

    if (t->is_null) {
        cube_buf_puts(out, "null");
        return;
    }
    cube_buf_addc(out, '{');
    for (size_t i = 0; i < t->count; i++) {
        if (i > 0)
            cube_buf_addc(out, ',');
        cube_json_put_text(out, t->list[i]);
        cube_buf_puts(out, ":{}");
    }
    cube_buf_addc(out, '}');
}

/* Made by cube_texts_slot, which grows differently from cube_task_add. */
static void cube_exposed_copy(void *field, const void *from)
{
    const struct cube_texts *t = from;
    struct cube_texts copy = {NULL, 0, t->is_null};

    if (t->count > 0)
        copy.list = cube_alloc(t->count * sizeof *copy.list);
    for (; copy.count < t->count; copy.count++)
        copy.list[copy.count] = cube_text_dup(t->list[copy.count]);
    *(struct cube_texts *)field = copy;
}

static const struct cube_kind cube_kind_of_exposed = {
    "ports like {\"80/tcp\":{}}, at most 1024",
    cube_exposed_read,
    cube_exposed_print,
    cube_words_is_set,
    cube_words_init,
    cube_exposed_copy,
    cube_words_free};

/* Port bindings: struct cube_publishes; {"7777/tcp":"8080"}. */

static void cube_publishes_init(void *field)
{
    ((struct cube_publishes *)field)->is_null = true;
}

static void cube_publishes_free(void *field)
{
    struct cube_publishes *p = field;

    for (size_t i = 0; i < p->count; i++) {
        cube_free(p->list[i].port);
        cube_free(p->list[i].host_port);
    }
    cube_free(p->list);
    memset(p, 0, sizeof *p);
    p->is_null = true;
}

static int cube_publishes_read(void *field, struct json_value_s *v,
                               bool is_strict, struct cube_err *err)
{
    (void)is_strict;
    (void)err;
    if (!json_value_as_object(v))
        return -1;
    cube_publishes_free(field);
    ((struct cube_publishes *)field)->is_null = false;
    for (struct json_object_element_s *m = cube_json_members(v); m;
         m = m->next) {
        const char *s =
            json_value_is_null(m->value) ? "" : cube_kind_text(m->value);
        struct cube_publish *slot;

        if (!s || strlen(m->name->string) != m->name->string_size)
            return -1;
        slot = cube_publishes_slot(field, m->name->string);
        if (!slot)
            return -1;
        cube_text_set(&slot->host_port, s);
    }
    return 0;
}

static void cube_publishes_print(const void *field, struct cube_buf *out)
{
    const struct cube_publishes *p = field;

    if (p->is_null) {
        cube_buf_puts(out, "null");
        return;
    }
    cube_buf_addc(out, '{');
    for (size_t i = 0; i < p->count; i++) {
        if (i > 0)
            cube_buf_addc(out, ',');
        cube_json_put_text(out, p->list[i].port);
        cube_buf_addc(out, ':');
        cube_json_put_text(out, p->list[i].host_port);
    }
    cube_buf_addc(out, '}');
}

static bool cube_publishes_is_set(const void *field)
{
    return ((const struct cube_publishes *)field)->count > 0;
}

static void cube_publishes_copy(void *field, const void *from)
{
    const struct cube_publishes *p = from;
    struct cube_publishes copy = {NULL, 0, p->is_null};

    if (p->count > 0)
        copy.list = cube_alloc(p->count * sizeof *copy.list);
    for (; copy.count < p->count; copy.count++) {
        struct cube_publish *to = &copy.list[copy.count];

        to->port = cube_text_dup(p->list[copy.count].port);
        to->host_port = cube_text_dup(p->list[copy.count].host_port);
    }
    *(struct cube_publishes *)field = copy;
}

static const struct cube_kind cube_kind_of_publishes = {
    "ports like {\"80/tcp\":\"8080\"}, at most 1024",
    cube_publishes_read,
    cube_publishes_print,
    cube_publishes_is_set,
    cube_publishes_init,
    cube_publishes_copy,
    cube_publishes_free};

/* Host ports: struct cube_ports;
 * {"7777/tcp":[{"HostIp":"0.0.0.0","HostPort":"32771"}]}. */

static void cube_ports_init(void *field)
{
    ((struct cube_ports *)field)->is_null = true;
}

static void cube_ports_free(void *field)
{
    struct cube_ports *p = field;

    for (size_t i = 0; i < p->count; i++) {
        cube_free(p->list[i].port);
        cube_port_clear(&p->list[i]);
    }
    cube_free(p->list);
    memset(p, 0, sizeof *p);
    p->is_null = true;
}

/* One {"HostIp":...,"HostPort":...}, or null. */
static int cube_binding_read(struct cube_port *port, struct json_value_s *v,
                             bool is_strict)
{
    static const char *const keys[] = {"HostIp", "HostPort"};
    const char *values[2] = {"", ""};

    if (!json_value_is_null(v) && !json_value_as_object(v))
        return -1;
    for (struct json_object_element_s *m = cube_json_members(v); m;
         m = m->next) {
        bool is_known = false;

        for (size_t i = 0; i < CUBE_COUNT(keys); i++) {
            if (!cube_text_is_nocase(m->name->string, m->name->string_size,
                                     keys[i]))
                continue;
            is_known = true;
            if (!json_value_is_null(m->value))
                values[i] = cube_kind_text(m->value);
            if (!values[i])
                return -1;
        }
        if (is_strict && !is_known)
            return -1;
    }
    cube_port_add(port, values[0], values[1]);
    return 0;
}

static int cube_ports_read(void *field, struct json_value_s *v, bool is_strict,
                           struct cube_err *err)
{
    (void)err;
    if (!json_value_as_object(v))
        return -1;
    cube_ports_free(field);
    ((struct cube_ports *)field)->is_null = false;
    for (struct json_object_element_s *m = cube_json_members(v); m;
         m = m->next) {
        struct cube_port *slot;

        if (strlen(m->name->string) != m->name->string_size ||
            (!json_value_is_null(m->value) && !json_value_as_array(m->value)))
            return -1;
        slot = cube_port_slot(field, m->name->string);
        if (!slot)
            return -1;
        cube_port_clear(slot);
        slot->is_null = json_value_is_null(m->value);
        for (struct json_array_element_s *e = cube_json_items(m->value); e;
             e = e->next) {
            if (cube_binding_read(slot, e->value, is_strict))
                return -1;
        }
    }
    return 0;
}

static void cube_port_print(const struct cube_port *p, struct cube_buf *out)
{
    cube_json_put_text(out, p->port);
    if (p->is_null && p->count == 0) {
        cube_buf_puts(out, ":null");
        return;
    }
    cube_buf_puts(out, ":[");
    for (size_t i = 0; i < p->count; i++) {
        cube_buf_puts(out, i > 0 ? ",{\"HostIp\":" : "{\"HostIp\":");
        cube_json_put_text(out, p->bindings[i].ip);
        cube_buf_puts(out, ",\"HostPort\":");
        cube_json_put_text(out, p->bindings[i].port);
        cube_buf_addc(out, '}');
    }
    cube_buf_addc(out, ']');
}

static void cube_ports_print(const void *field, struct cube_buf *out)
{
    const struct cube_ports *p = field;

    if (p->is_null) {
        cube_buf_puts(out, "null");
        return;
    }
    cube_buf_addc(out, '{');
    for (size_t i = 0; i < p->count; i++) {
        if (i > 0)
            cube_buf_addc(out, ',');
        cube_port_print(&p->list[i], out);
    }
    cube_buf_addc(out, '}');
}

static bool cube_ports_is_set(const void *field)
{
    return ((const struct cube_ports *)field)->count > 0;
}

static void cube_ports_copy(void *field, const void *from)
{
    const struct cube_ports *p = from;
    struct cube_ports copy = {NULL, 0, p->is_null};

    if (p->count > 0)
        copy.list = cube_alloc(p->count * sizeof *copy.list);
    for (; copy.count < p->count; copy.count++) {
        const struct cube_port *source = &p->list[copy.count];
        struct cube_port *to = &copy.list[copy.count];

        to->port = cube_text_dup(source->port);
        to->is_null = source->is_null;
        for (size_t i = 0; i < source->count; i++)
            cube_port_add(to, source->bindings[i].ip,
                          source->bindings[i].port);
    }
    *(struct cube_ports *)field = copy;
}

static const struct cube_kind cube_kind_of_ports = {
    "ports like {\"80/tcp\":[{\"HostIp\":\"::\",\"HostPort\":\"8080\"}]}, "
    "at most 1024",
    cube_ports_read,
    cube_ports_print,
    cube_ports_is_set,
    cube_ports_init,
    cube_ports_copy,
    cube_ports_free};

/* ---- Records: tables of fields ---- */

struct cube_field {
    const char *name, *key; /* key: as it is printed, `,"Name":` */
    size_t name_len, key_len;
    const struct cube_kind *kind;
    size_t at; /* offset of the field in its struct */
    bool is_own, is_spec;
};

#define CUBE_FIELD(name, kind, at, is_own, is_spec)                         \
    {                                                                       \
        name, ",\"" name "\":", sizeof name - 1, sizeof name + 3, &kind, at, \
            is_own, is_spec                                                 \
    }
/* A field of the Go implementation, of ours, of ours and the user's. */
#define CUBE_TASK_GO(name, kind, member)                                   \
    CUBE_FIELD(name, kind, offsetof(struct cube_task, member), false, false)
#define CUBE_TASK_GO_SPEC(name, kind, member)                              \
    CUBE_FIELD(name, kind, offsetof(struct cube_task, member), false, true)
#define CUBE_TASK_OWN(name, kind, member)                                  \
    CUBE_FIELD(name, kind, offsetof(struct cube_task, member), true, false)
#define CUBE_TASK_OWN_SPEC(name, kind, member)                             \
    CUBE_FIELD(name, kind, offsetof(struct cube_task, member), true, true)

static const struct cube_field cube_task_fields[] = {
    CUBE_TASK_GO("ID", cube_kind_of_id, id),
    CUBE_TASK_GO("ContainerID", cube_kind_of_text, container_id),
    CUBE_TASK_GO_SPEC("Name", cube_kind_of_text, name),
    CUBE_TASK_GO("State", cube_kind_of_state, state),
    CUBE_TASK_GO_SPEC("Image", cube_kind_of_text, image),
    CUBE_TASK_GO_SPEC("Cpu", cube_kind_of_f64, cpu),
    CUBE_TASK_GO_SPEC("Memory", cube_kind_of_i64, mem_bytes),
    CUBE_TASK_GO_SPEC("Disk", cube_kind_of_i64, disk_bytes),
    CUBE_TASK_GO("HostPorts", cube_kind_of_ports, host_ports),
    CUBE_TASK_GO_SPEC("ExposedPorts", cube_kind_of_exposed, exposed_ports),
    CUBE_TASK_GO_SPEC("PortBindings", cube_kind_of_publishes, port_bindings),
    CUBE_TASK_GO_SPEC("RestartPolicy", cube_kind_of_text, restart_policy),
    CUBE_TASK_GO("StartTime", cube_kind_of_time, start_time),
    CUBE_TASK_GO("FinishTime", cube_kind_of_time, finish_time),
    CUBE_TASK_GO_SPEC("HealthCheck", cube_kind_of_text, health_check),
    CUBE_TASK_GO("RestartCount", cube_kind_of_i64, restart_count),

    CUBE_TASK_OWN_SPEC("Cmd", cube_kind_of_words, cmd),
    CUBE_TASK_OWN_SPEC("Env", cube_kind_of_words, env),
    CUBE_FIELD("ExitCode", cube_kind_of_exit, 0, true, false),
    CUBE_TASK_OWN("Node", cube_kind_of_text, node),
    CUBE_TASK_OWN("Wanted", cube_kind_of_wanted, wanted),
    CUBE_TASK_OWN("Attempt", cube_kind_of_i64, attempt),
    CUBE_TASK_OWN("Error", cube_kind_of_text, error),
    CUBE_TASK_OWN("RestartTime", cube_kind_of_time, restart_time),
    CUBE_TASK_OWN_SPEC("StopGrace", cube_kind_of_i64, grace_ms),
    CUBE_TASK_OWN_SPEC("HealthStart", cube_kind_of_i64, health_start_ms),
    CUBE_TASK_OWN_SPEC("HealthInterval", cube_kind_of_i64,
                       health_interval_ms),
    CUBE_TASK_OWN_SPEC("HealthTimeout", cube_kind_of_i64, health_timeout_ms),
    CUBE_TASK_OWN_SPEC("HealthRetries", cube_kind_of_i64, health_retries),
    CUBE_TASK_OWN("Progress", cube_kind_of_text, progress),
    CUBE_TASK_OWN("CreatedTime", cube_kind_of_time, created_time),
};

static void cube_record_init(const struct cube_field *fields, size_t count,
                             void *record)
{
    for (size_t i = 0; i < count; i++) {
        if (fields[i].kind->init)
            fields[i].kind->init((char *)record + fields[i].at);
    }
}

static void cube_record_free(const struct cube_field *fields, size_t count,
                             void *record)
{
    for (size_t i = 0; i < count; i++) {
        if (fields[i].kind->free)
            fields[i].kind->free((char *)record + fields[i].at);
    }
}

static void cube_record_print(const struct cube_field *fields, size_t count,
                              const void *record, struct cube_buf *out)
{
    size_t comma = 1; /* the first key leaves out its comma */

    cube_buf_addc(out, '{');
    for (size_t i = 0; i < count; i++) {
        const struct cube_field *f = &fields[i];
        const void *field = (const char *)record + f->at;

        if (f->is_own && !f->kind->is_set(field))
            continue;
        cube_buf_add(out, f->key + comma, f->key_len - comma);
        f->kind->print(field, out);
        comma = 0;
    }
    cube_buf_addc(out, '}');
}

/* The field of a key, looked for from `*from` on; `*from` moves behind it. */
static const struct cube_field *
cube_record_field(const struct cube_field *fields, size_t count,
                  const struct json_string_s *name, size_t *from)
{
    for (size_t n = 0; n < count; n++) {
        size_t i = (*from + n) % count;

        if (fields[i].name_len == name->string_size &&
            cube_text_is_nocase(name->string, name->string_size,
                                fields[i].name)) {
            *from = i + 1;
            return &fields[i];
        }
    }
    return NULL;
}

/* Reads an object into a record that was made empty. `what` names it in
 * errors: "Task". */
static int cube_record_read(const struct cube_field *fields, size_t count,
                            const char *what, void *record,
                            struct json_value_s *v, bool is_strict,
                            struct cube_err *err)
{
    size_t from = 0;

    if (!v || !json_value_as_object(v))
        return cube_fail(err, CUBE_EINVAL, "%s: expected an object", what);
    for (struct json_object_element_s *m = cube_json_members(v); m;
         m = m->next) {
        const struct cube_field *f =
            cube_record_field(fields, count, m->name, &from);

        if (!f && is_strict)
            return cube_fail(err, CUBE_EINVAL, "%s: unknown field \"%.100s\"",
                             what, m->name->string);
        if (!f || json_value_is_null(m->value))
            continue;
        if (f->kind->read((char *)record + f->at, m->value, is_strict, err))
            return f->kind->expects
                       ? cube_fail(err, CUBE_EINVAL, "%s: %s: expected %s",
                                   what, f->name, f->kind->expects)
                       : -1;
    }
    return 0;
}

/* ---- Tasks ---- */

CUBE_API struct cube_task *cube_task_new(void)
{
    struct cube_task *t = cube_alloc(sizeof *t);

    cube_record_init(cube_task_fields, CUBE_COUNT(cube_task_fields), t);
    return t;
}

CUBE_API void cube_task_free(struct cube_task *t)
{
    if (!t)
        return;
    cube_record_free(cube_task_fields, CUBE_COUNT(cube_task_fields), t);
    cube_free(t);
}

CUBE_API struct cube_task *cube_task_copy(const struct cube_task *t)
{
    struct cube_task *copy = cube_alloc(sizeof *copy);

    *copy = *t;
    for (size_t i = 0; i < CUBE_COUNT(cube_task_fields); i++) {
        const struct cube_field *f = &cube_task_fields[i];

        if (f->kind->copy)
            f->kind->copy((char *)copy + f->at, (const char *)t + f->at);
    }
    return copy;
}

CUBE_API void cube_task_print(const struct cube_task *t, struct cube_buf *out)
{
    cube_record_print(cube_task_fields, CUBE_COUNT(cube_task_fields), t, out);
}

/* The task in a tree; NULL and an error that names the field. */
static struct cube_task *cube_task_from_json(struct json_value_s *v,
                                             bool is_strict,
                                             struct cube_err *err)
{
    struct cube_task *t = cube_task_new();

    if (!cube_record_read(cube_task_fields, CUBE_COUNT(cube_task_fields),
                          "Task", t, v, is_strict, err))
        return t;
    cube_task_free(t);
    return NULL;
}

CUBE_API int cube_task_parse(const char *json, size_t len, bool is_strict,
                             struct cube_task **out, struct cube_err *err)
{
    struct json_value_s *root = cube_json_parse(json, len, err);

    *out = root ? cube_task_from_json(root, is_strict, err) : NULL;
    cube_json_free(root);
    return *out ? 0 : -1;
}

CUBE_API bool cube_task_same_spec(const struct cube_task *a,
                                  const struct cube_task *b)
{
    struct cube_buf texts[2] = {{NULL, 0, 0}, {NULL, 0, 0}};
    bool is_same = true;

    for (size_t i = 0; is_same && i < CUBE_COUNT(cube_task_fields); i++) {
        const struct cube_field *f = &cube_task_fields[i];
        const void *of_a = (const char *)a + f->at;
        const void *of_b = (const char *)b + f->at;

        /* `null` and `{}` ask for the same: nothing */
        if (!f->is_spec || (!f->kind->is_set(of_a) && !f->kind->is_set(of_b)))
            continue;
        cube_buf_clear(&texts[0]);
        cube_buf_clear(&texts[1]);
        f->kind->print(of_a, &texts[0]);
        f->kind->print(of_b, &texts[1]);
        is_same = texts[0].len == texts[1].len &&
                  !memcmp(texts[0].data, texts[1].data, texts[0].len);
    }
    cube_buf_free(&texts[0]);
    cube_buf_free(&texts[1]);
    return is_same;
}

CUBE_API bool cube_task_is_finished(const struct cube_task *t)
{
    return t->state == CUBE_COMPLETED ||
           (t->state == CUBE_FAILED && !cube_time_is_set(&t->restart_time));
}

CUBE_API void cube_task_set(char **text, const char *value)
{
    cube_text_set(text, value ? value : "");
}

/* A port with its protocol: "80" is "80/tcp". */
static void cube_port_full(const char *port, char out[64])
{
    (void)snprintf(out, 64, "%.50s%s", port, strchr(port, '/') ? "" : "/tcp");
}

CUBE_API void cube_task_expose(struct cube_task *t, const char *port)
{
    char full[64];

    cube_port_full(port, full);
    (void)cube_texts_slot(&t->exposed_ports, full);
}

CUBE_API void cube_task_publish(struct cube_task *t, const char *port,
                                const char *host_port)
{
    struct cube_publish *slot;
    char full[64];

    cube_port_full(port, full);
    slot = cube_publishes_slot(&t->port_bindings, full);
    if (slot)
        cube_text_set(&slot->host_port, host_port ? host_port : "");
}

CUBE_API void cube_task_bind(struct cube_task *t, const char *port,
                             const char *ip, const char *host_port)
{
    struct cube_port *slot;
    char full[64];

    cube_port_full(port, full);
    slot = cube_port_slot(&t->host_ports, full);
    if (!slot)
        return;
    if (ip)
        cube_port_add(slot, ip, host_port);
    slot->is_null = slot->count == 0;
}

CUBE_API void cube_task_unbind(struct cube_task *t)
{
    cube_ports_free(&t->host_ports);
}

/* ---- Events ---- */

static int cube_event_task_read(void *field, struct json_value_s *v,
                                bool is_strict, struct cube_err *err)
{
    struct cube_task *t = cube_task_from_json(v, is_strict, err);

    if (!t)
        return -1;
    cube_task_free(*(struct cube_task **)field);
    *(struct cube_task **)field = t;
    return 0;
}

static void cube_event_task_print(const void *field, struct cube_buf *out)
{
    const struct cube_task *t = *(struct cube_task *const *)field;

    if (t)
        cube_task_print(t, out);
    else
        cube_buf_puts(out, "null");
}

static bool cube_event_task_is_set(const void *field)
{
    return *(struct cube_task *const *)field != NULL;
}

static void cube_event_task_free(void *field)
{
    cube_task_free(*(struct cube_task **)field);
}

static const struct cube_kind cube_kind_of_task = {
    NULL, cube_event_task_read, cube_event_task_print, cube_event_task_is_set,
    NULL, NULL, cube_event_task_free};

#define CUBE_EVENT_GO(name, kind, member)                                  \
    CUBE_FIELD(name, kind, offsetof(struct cube_event, member), false, false)
#define CUBE_EVENT_OWN(name, kind, member)                                 \
    CUBE_FIELD(name, kind, offsetof(struct cube_event, member), true, false)

static const struct cube_field cube_event_fields[] = {
    CUBE_EVENT_GO("ID", cube_kind_of_id, id),
    CUBE_EVENT_GO("State", cube_kind_of_state, state),
    CUBE_EVENT_GO("Timestamp", cube_kind_of_time, timestamp),
    CUBE_EVENT_GO("Task", cube_kind_of_task, task),
    CUBE_EVENT_OWN("Cluster", cube_kind_of_id, cluster),
    CUBE_EVENT_OWN("Epoch", cube_kind_of_i64, epoch),
    CUBE_EVENT_OWN("Budget", cube_kind_of_budget, budget),
};

CUBE_API struct cube_event *cube_event_new(void)
{
    struct cube_event *e = cube_alloc(sizeof *e);

    cube_record_init(cube_event_fields, CUBE_COUNT(cube_event_fields), e);
    return e;
}

CUBE_API void cube_event_free(struct cube_event *e)
{
    if (!e)
        return;
    cube_record_free(cube_event_fields, CUBE_COUNT(cube_event_fields), e);
    cube_free(e);
}

CUBE_API void cube_event_print(const struct cube_event *e,
                               struct cube_buf *out)
{
    cube_record_print(cube_event_fields, CUBE_COUNT(cube_event_fields), e,
                      out);
}

static struct cube_event *cube_event_from_json(struct json_value_s *v,
                                               bool is_strict,
                                               struct cube_err *err)
{
    struct cube_event *e = cube_event_new();

    if (!cube_record_read(cube_event_fields, CUBE_COUNT(cube_event_fields),
                          "TaskEvent", e, v, is_strict, err))
        return e;
    cube_event_free(e);
    return NULL;
}

CUBE_API int cube_event_parse(const char *json, size_t len, bool is_strict,
                              struct cube_event **out, struct cube_err *err)
{
    struct json_value_s *root = cube_json_parse(json, len, err);

    *out = root ? cube_event_from_json(root, is_strict, err) : NULL;
    cube_json_free(root);
    return *out ? 0 : -1;
}

/* A bare task as the event that asks to run it. */
static struct cube_event *cube_event_of_task(struct json_value_s *v,
                                             bool is_strict,
                                             struct cube_err *err)
{
    struct cube_task *t = cube_task_from_json(v, is_strict, err);
    struct cube_event *e;

    if (!t)
        return NULL;
    e = cube_event_new();
    e->state = CUBE_RUNNING;
    e->task = t;
    return e;
}

CUBE_API int cube_task_or_event_parse(const char *json, size_t len,
                                      bool is_strict, struct cube_event **out,
                                      struct cube_err *err)
{
    struct json_value_s *root = cube_json_parse(json, len, err);

    *out = NULL;
    if (root && (cube_json_get_nocase(root, "Task") ||
                 cube_json_get_nocase(root, "Timestamp")))
        *out = cube_event_from_json(root, is_strict, err);
    else if (root)
        *out = cube_event_of_task(root, is_strict, err);
    cube_json_free(root);
    return *out ? 0 : -1;
}

/* ---- Could it ever run? ---- */

static bool cube_is_alnum(char c)
{
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') ||
           (c >= 'A' && c <= 'Z');
}

/* Of letters, digits and `others` alone? */
static bool cube_text_consists(const char *p, size_t len, const char *others)
{
    for (size_t i = 0; i < len; i++) {
        if (!cube_is_alnum(p[i]) && (!p[i] || !strchr(others, p[i])))
            return false;
    }
    return true;
}

/* One part of an image's path: lower case letters and digits, between them
 * `.`, `_`, `__` or any number of `-`. */
static bool cube_image_part_ok(const char *p, size_t len)
{
    size_t i = 0;

    for (;;) {
        size_t run = i;

        while (i < len && cube_is_alnum(p[i]) && (p[i] < 'A' || p[i] > 'Z'))
            i++;
        if (i == run)
            return false;
        if (i == len)
            return true;
        if (p[i] == '-') {
            while (i < len && p[i] == '-')
                i++;
        } else if (p[i] == '_' && i + 1 < len && p[i + 1] == '_') {
            i += 2;
        } else if (p[i] == '.' || p[i] == '_') {
            i++;
        } else {
            return false;
        }
    }
}

/* Is the part before the first slash a registry's host, not a path? */
static bool cube_image_is_host(const char *p, size_t len)
{
    if (cube_text_is(p, len, "localhost"))
        return true;
    for (size_t i = 0; i < len; i++) {
        if (p[i] == '.' || p[i] == ':' || (p[i] >= 'A' && p[i] <= 'Z'))
            return true;
    }
    return false;
}

/* host, host:port, [ipv6]:port */
static bool cube_image_host_ok(const char *p, size_t len)
{
    const char *bracket = p[0] == '[' ? memchr(p, ']', len) : NULL;
    size_t host = 0;
    uint64_t port;

    if (bracket) {
        host = (size_t)(bracket - p) + 1;
        if (!cube_text_consists(p + 1, host - 2, ":"))
            return false;
    } else {
        while (host < len && p[host] != ':')
            host++;
        if (host == 0 || !cube_text_consists(p, host, ".-") ||
            !cube_is_alnum(p[0]) || !cube_is_alnum(p[host - 1]))
            return false;
    }
    return host == len ||
           (p[host] == ':' &&
            !cube_text_u64(p + host + 1, len - host - 1, 65535, &port));
}

/* [host[:port]/]part[/part...] */
static bool cube_image_name_ok(const char *p, size_t len)
{
    const char *slash = memchr(p, '/', len);
    const char *end = p + len;

    if (len == 0 || len > CUBE_TASK_NAME_MAX)
        return false;
    if (slash && cube_image_is_host(p, (size_t)(slash - p))) {
        if (!cube_image_host_ok(p, (size_t)(slash - p)))
            return false;
        p = slash + 1;
    }
    for (;;) {
        slash = memchr(p, '/', (size_t)(end - p));
        if (!cube_image_part_ok(p, (size_t)((slash ? slash : end) - p)))
            return false;
        if (!slash)
            return true;
        p = slash + 1;
    }
}

/* algorithm:hex, as in sha256:9f86d081... */
static bool cube_image_digest_ok(const char *p)
{
    const char *colon = strchr(p, ':');
    size_t len = colon ? strlen(colon + 1) : 0;

    if (!colon || colon == p || len < 32 ||
        !cube_text_consists(p, (size_t)(colon - p), "+._-"))
        return false;
    for (size_t i = 0; i < len; i++) {
        if (cube_hex_digit(colon[1 + i]) < 0)
            return false;
    }
    return true;
}

/* name[:tag][@digest], the distribution reference grammar. */
static bool cube_image_ok(const char *image)
{
    size_t len = strcspn(image, "@"), name = len;

    if (image[len] && !cube_image_digest_ok(image + len + 1))
        return false;
    while (name > 0 && image[name - 1] != ':' && image[name - 1] != '/')
        name--;
    if (name == 0 || image[name - 1] == '/')
        return cube_image_name_ok(image, len);
    return len > name && len - name <= 128 && image[name] != '.' &&
           image[name] != '-' &&
           cube_text_consists(image + name, len - name, "_.-") &&
           cube_image_name_ok(image, name - 1);
}

static int cube_task_check_texts(const struct cube_task *t,
                                 struct cube_err *err)
{
    static const char *const policies[] = {"", "no", "on-failure", "always",
                                           "unless-stopped"};
    size_t len = strlen(t->name), i = 0;

    if (len > CUBE_TASK_NAME_MAX || !cube_text_consists(t->name, len, "_.-") ||
        (len > 0 && !cube_is_alnum(t->name[0])))
        return cube_fail(err, CUBE_EINVAL,
                         "Name: \"%.100s\" is none: letters, digits, _ . and "
                         "-, the first a letter or digit, at most %d",
                         t->name, CUBE_TASK_NAME_MAX);
    if (!t->image[0] && t->cmd.count == 0)
        return cube_fail(err, CUBE_EINVAL,
                         "Image: there is none (and no Cmd either)");
    if (t->image[0] && !cube_image_ok(t->image))
        return cube_fail(err, CUBE_EINVAL,
                         "Image: \"%.100s\" is no image's name, as in "
                         "registry:5000/path/name:tag, lower case",
                         t->image);
    while (i < CUBE_COUNT(policies) && strcmp(policies[i], t->restart_policy))
        i++;
    if (i == CUBE_COUNT(policies))
        return cube_fail(err, CUBE_EINVAL,
                         "RestartPolicy: \"%.100s\" is none of no, "
                         "on-failure, always, unless-stopped",
                         t->restart_policy);
    len = strlen(t->health_check);
    for (i = 0; i < len; i++) {
        if (t->health_check[0] != '/' || t->health_check[i] <= ' ' ||
            t->health_check[i] == 0x7f)
            return cube_fail(err, CUBE_EINVAL,
                             "HealthCheck: \"%.100s\" is no path, as in "
                             "/health",
                             t->health_check);
    }
    return 0;
}

static int cube_task_check_numbers(const struct cube_task *t,
                                   struct cube_err *err)
{
    const struct {
        const char *name;
        int64_t value;
    } rows[] = {
        {"Memory", t->mem_bytes},
        {"Disk", t->disk_bytes},
        {"RestartCount", t->restart_count},
        {"Attempt", t->attempt},
        {"StopGrace", t->grace_ms},
        {"HealthStart", t->health_start_ms},
        {"HealthInterval", t->health_interval_ms},
        {"HealthTimeout", t->health_timeout_ms},
        {"HealthRetries", t->health_retries},
    };

    if (!(t->cpu >= 0 && t->cpu <= CUBE_TASK_CPU_MAX))
        return cube_fail(err, CUBE_EINVAL,
                         "Cpu: %g is no number of cores", t->cpu);
    for (size_t i = 0; i < CUBE_COUNT(rows); i++) {
        if (rows[i].value < 0)
            return cube_fail(err, CUBE_EINVAL, "%s: %lld is negative",
                             rows[i].name, (long long)rows[i].value);
    }
    return 0;
}

static int cube_task_check_ports(const struct cube_task *t,
                                 struct cube_err *err)
{
    const char *protocol;
    uint64_t value;
    int number;

    for (size_t i = 0; i < t->exposed_ports.count; i++) {
        if (cube_port_parse(t->exposed_ports.list[i], &number, &protocol))
            return cube_fail(err, CUBE_EINVAL,
                             "ExposedPorts: \"%.100s\" is no port, as in "
                             "80/tcp",
                             t->exposed_ports.list[i]);
    }
    for (size_t i = 0; i < t->port_bindings.count; i++) {
        const struct cube_publish *p = &t->port_bindings.list[i];

        if (cube_port_parse(p->port, &number, &protocol))
            return cube_fail(err, CUBE_EINVAL,
                             "PortBindings: \"%.100s\" is no port, as in "
                             "80/tcp",
                             p->port);
        if (p->host_port[0] && cube_text_u64(p->host_port,
                                             strlen(p->host_port), 65535,
                                             &value))
            return cube_fail(err, CUBE_EINVAL,
                             "PortBindings: \"%.100s\" is no port of a host",
                             p->host_port);
    }
    return 0;
}

static int cube_task_check_words(const struct cube_task *t,
                                 struct cube_err *err)
{
    if (t->cmd.count > 0 && !t->cmd.list[0][0])
        return cube_fail(err, CUBE_EINVAL, "Cmd: the first word is empty");
    for (size_t i = 0; i < t->env.count; i++) {
        if (t->env.list[i][0] == '=' || !strchr(t->env.list[i], '='))
            return cube_fail(err, CUBE_EINVAL,
                             "Env: \"%.100s\" is not NAME=value",
                             t->env.list[i]);
    }
    return 0;
}

CUBE_API int cube_task_check(const struct cube_task *t, struct cube_err *err)
{
    if (!t)
        return cube_fail(err, CUBE_EINVAL, "Task: there is none");
    if (cube_task_check_texts(t, err) || cube_task_check_numbers(t, err) ||
        cube_task_check_ports(t, err) || cube_task_check_words(t, err))
        return -1;
    return 0;
}

/* ---- The ledger: records in two versions ---- */

/*
 * A keeper of tasks (worker or manager) must never let out what is not on
 * disk. So each record has one version that is committed, which is all that
 * is ever shown or acted upon, and up to two that are on their way: one in
 * the commit that syncs, one in the commit that fills.
 *
 *    cube_record_edit ------> pending: [ in flight ] -> [ filling ]
 *                                          |  durable
 *    now: [ committed ] <------------------+     then on_change(before, now)
 *
 * An edit starts as a copy of the newest version. A commit that fails drops
 * all that is pending, and the record is what it was: memory follows the
 * disk, never the other way round.
 *
 * On disk a record is one line of JSON under its number (eight bytes,
 * big-endian, so that keys come in the order of submission):
 *
 *    {"Number":7,"Cluster":"...","Epoch":3,...,"Task":{...}}
 */

/* What a keeper knows of a task beside the task. */
struct cube_keep {
    int64_t number;   /* order of arrival, and the key */
    int64_t epoch;    /* worker: of the manager's start that assigned it */
    int64_t budget;   /* worker: restarts allowed here; -1: the policy's */
    int64_t restarts; /* worker: used up, since the last long run */
    int64_t moves;    /* manager: to another node, after restarts ran out */
    bool follows;     /* worker: given by a manager that restarts by itself */
    bool is_hidden;   /* manager: removed by its user, kept as a tombstone */
    char cluster[CUBE_UUID_TEXT]; /* worker: whose assignment it is */
    char avoid[CUBE_UUID_TEXT];   /* manager: the worker it failed on */
};

struct cube_version {
    struct cube_task *task; /* owned */
    struct cube_keep keep;
    bool is_gone;           /* this version is the absence of the record */
    char *line;             /* for the feed, or NULL; owned */
    uint64_t commit;        /* the number of the commit it is part of */
    struct cube_version *next;
};

struct cube_record {
    char id[CUBE_UUID_TEXT];
    struct cube_version *now;     /* committed; NULL: not yet */
    struct cube_version *pending; /* oldest first, at most two */
    struct cube_list changed;     /* in the ledger, while pending */
    void *owner;                  /* the keeper's */
};

/* After a commit: `rec->now` is new, `before` is what it was (NULL: it was
 * not there). When `rec->now->is_gone`, the record is freed after this. */
typedef void cube_ledger_fn(void *arg, struct cube_record *rec,
                            const struct cube_version *before);
/* After all records of a commit: it is on disk, or (`err`) it was dropped,
 * with all that was staged since. */
typedef void cube_ledger_end_fn(void *arg, uint64_t commit,
                                const struct cube_err *err);

/* A record that never was on disk is dropped: its owner goes with it. */
typedef void cube_ledger_drop_fn(void *arg, struct cube_record *rec);

struct cube_ledger;

struct cube_ledger_wait {
    struct cube_commit_wait wait;
    struct cube_ledger *ledger;
    uint64_t commit;
    bool is_waiting;
};

struct cube_ledger {
    struct cube_loop *loop;
    struct cube_store *store;   /* borrowed */
    struct cube_commit *commit; /* borrowed */
    struct cube_map records;    /* by task ID, in order of arrival */
    struct cube_list changed;
    struct cube_ledger_wait waits[2]; /* in flight and filling */
    int64_t last_number;
    cube_ledger_fn *on_change;
    cube_ledger_end_fn *on_commit;
    cube_ledger_drop_fn *on_drop;
    void *arg;
};

#define CUBE_TREE_TASKS "tasks"
#define CUBE_TREE_META "meta"
#define CUBE_RESTARTS 3                     /* of policy on-failure */
#define CUBE_KEEP_MS (168LL * 3600 * 1000)  /* what has ended, and events */

/* Is it restarted without limit, also after a success? */
static bool cube_task_is_endless(const struct cube_task *t)
{
    return strcmp(t->restart_policy, "always") == 0 ||
           strcmp(t->restart_policy, "unless-stopped") == 0;
}

/* A text of the meta tree; false when it is not there. */
static bool cube_meta_get(struct cube_store *s, const char *key,
                          struct cube_buf *out)
{
    cube_buf_clear(out);
    return cube_store_get(s, CUBE_TREE_META, key, strlen(key), out, NULL) > 0;
}

static int cube_meta_put(struct cube_store *s, const char *key,
                         const char *text, struct cube_err *err)
{
    return cube_store_put(s, CUBE_TREE_META, key, strlen(key), text,
                          strlen(text), err);
}

static void cube_version_free(struct cube_version *v)
{
    if (!v)
        return;
    cube_task_free(v->task);
    cube_free(v->line);
    cube_free(v);
}

static void cube_record_drop(struct cube_record *rec)
{
    cube_version_free(rec->now);
    while (rec->pending) {
        struct cube_version *v = rec->pending;

        rec->pending = v->next;
        cube_version_free(v);
    }
    cube_list_remove(&rec->changed);
    cube_free(rec);
}

/* The newest version, committed or not; NULL when there is none. */
static struct cube_version *cube_record_latest(const struct cube_record *rec)
{
    struct cube_version *v = rec->pending;

    while (v && v->next)
        v = v->next;
    return v ? v : rec->now;
}

/* The numbers of a keep, by their names on disk. */
static const struct cube_keep_field {
    const char *name;
    size_t offset;
} cube_keep_fields[] = {
    {"Number", offsetof(struct cube_keep, number)},
    {"Epoch", offsetof(struct cube_keep, epoch)},
    {"Budget", offsetof(struct cube_keep, budget)},
    {"Restarts", offsetof(struct cube_keep, restarts)},
    {"Moves", offsetof(struct cube_keep, moves)},
};

static void cube_version_print(const struct cube_version *v,
                               struct cube_buf *out)
{
    const char *keep = (const char *)&v->keep;

    cube_buf_puts(out, "{");
    for (size_t i = 0; i < CUBE_COUNT(cube_keep_fields); i++) {
        int64_t n;

        memcpy(&n, keep + cube_keep_fields[i].offset, sizeof n);
        cube_buf_printf(out, "\"%s\":%lld,", cube_keep_fields[i].name,
                        (long long)n);
    }
    cube_buf_printf(out, "\"Follows\":%d,\"Hidden\":%d,\"Cluster\":\"%s\","
                    "\"Avoid\":\"%s\",\"Task\":", v->keep.follows,
                    v->keep.is_hidden, v->keep.cluster, v->keep.avoid);
    cube_task_print(v->task, out);
    cube_buf_puts(out, "}");
}

/* Reads a UUID, or leaves the empty text for anything else. */
static void cube_json_uuid(struct json_value_s *v, char out[CUBE_UUID_TEXT])
{
    size_t len;
    const char *text = cube_json_str(v, &len);

    if (!text || cube_uuid_parse(text, len, out) < 0)
        out[0] = 0;
}

static struct cube_version *cube_version_parse(const struct cube_buf *text,
                                               struct cube_err *err)
{
    struct json_value_s *root = cube_json_parse(text->data, text->len, err);
    struct cube_version *v;
    int64_t flag = 0;

    if (!root)
        return NULL;
    v = cube_alloc(sizeof *v);
    for (size_t i = 0; i < CUBE_COUNT(cube_keep_fields); i++) {
        const struct cube_keep_field *f = &cube_keep_fields[i];
        int64_t n = 0;

        (void)cube_json_i64(cube_json_get(root, f->name), &n);
        memcpy((char *)&v->keep + f->offset, &n, sizeof n);
    }
    v->keep.follows =
        cube_json_i64(cube_json_get(root, "Follows"), &flag) == 0 && flag;
    v->keep.is_hidden =
        cube_json_i64(cube_json_get(root, "Hidden"), &flag) == 0 && flag;
    cube_json_uuid(cube_json_get(root, "Cluster"), v->keep.cluster);
    cube_json_uuid(cube_json_get(root, "Avoid"), v->keep.avoid);
    v->task = cube_task_from_json(cube_json_get(root, "Task"), false, err);
    cube_json_free(root);
    if (!v->task) {
        cube_version_free(v);
        return NULL;
    }
    return v;
}

static void cube_number_key(int64_t number, unsigned char key[8])
{
    for (int i = 0; i < 8; i++)
        key[i] = (unsigned char)((uint64_t)number >> (56 - 8 * i));
}

static int64_t cube_number_of_key(const unsigned char *key, size_t len)
{
    uint64_t n = 0;

    for (size_t i = 0; i < len && i < 8; i++)
        n = n << 8 | key[i];
    return (int64_t)n;
}

static struct cube_record *cube_ledger_find(const struct cube_ledger *g,
                                            const char *id)
{
    return cube_map_get(&g->records, id);
}

/* A record without a version; edit and stage it in the same turn. */
static struct cube_record *cube_ledger_add(struct cube_ledger *g,
                                           const char *id)
{
    struct cube_record *rec = cube_alloc(sizeof *rec);

    (void)snprintf(rec->id, sizeof rec->id, "%s", id);
    cube_list_init(&rec->changed);
    cube_map_put(&g->records, id, rec);
    return rec;
}

/* The next record in order of arrival that has a committed version. */
static struct cube_record *cube_ledger_next(const struct cube_ledger *g,
                                            size_t *at)
{
    void *value;

    while (cube_map_next(&g->records, at, NULL, &value)) {
        struct cube_record *rec = value;

        if (rec->now)
            return rec;
    }
    return NULL;
}

/* A pending version became the record, which may be its end. */
static void cube_record_promote(struct cube_ledger *g, struct cube_record *rec)
{
    struct cube_version *before = rec->now;

    rec->now = rec->pending;
    rec->pending = rec->now->next;
    rec->now->next = NULL;
    if (!rec->pending)
        cube_list_remove(&rec->changed);
    g->on_change(g->arg, rec, before);
    cube_version_free(before);
    if (rec->now->is_gone && !rec->pending) {
        cube_map_remove(&g->records, rec->id);
        cube_record_drop(rec);
    }
}

/* Drops what is pending; a record that never was is no more. */
static void cube_record_revert(struct cube_ledger *g, struct cube_record *rec)
{
    while (rec->pending) {
        struct cube_version *v = rec->pending;

        rec->pending = v->next;
        cube_version_free(v);
    }
    cube_list_remove(&rec->changed);
    if (!rec->now) {
        g->on_drop(g->arg, rec);
        cube_map_remove(&g->records, rec->id);
        cube_record_drop(rec);
    }
}

static void cube_ledger_committed(void *arg, const struct cube_err *err)
{
    struct cube_ledger_wait *w = arg;
    struct cube_ledger *g = w->ledger;
    struct cube_list *link, *next;

    w->is_waiting = false;
    for (link = g->changed.next; link != &g->changed; link = next) {
        struct cube_record *rec = CUBE_OF(link, struct cube_record, changed);

        next = link->next;
        if (err)
            cube_record_revert(g, rec);
        else if (rec->pending->commit == w->commit)
            cube_record_promote(g, rec);
    }
    g->on_commit(g->arg, w->commit, err);
}

/* Makes sure that the ledger hears of the commit that fills, before anybody
 * who waits for it after this call. */
static void cube_ledger_join(struct cube_ledger *g)
{
    uint64_t number = cube_commit_number(g->commit);
    struct cube_ledger_wait *w = &g->waits[number & 1];

    if (w->is_waiting && w->commit == number)
        return;
    w->ledger = g;
    w->commit = number;
    w->is_waiting = true;
    cube_commit_wait(g->commit, &w->wait, cube_ledger_committed, w);
}

/* A version to be changed at will and then staged with cube_record_stage. A
 * record without one gets an empty task and the next number. */
static struct cube_version *cube_record_edit(struct cube_ledger *g,
                                             struct cube_record *rec)
{
    struct cube_version *old = cube_record_latest(rec), *v;
    uint64_t number = cube_commit_number(g->commit);
    struct cube_version **end = &rec->pending;

    if (old && old != rec->now && old->commit == number)
        return old;
    v = cube_alloc(sizeof *v);
    if (old) {
        v->keep = old->keep;
        v->task = cube_task_copy(old->task);
    } else {
        v->task = cube_task_new();
        v->keep.budget = -1;
        v->keep.number = ++g->last_number;
        memcpy(v->task->id, rec->id, sizeof rec->id);
    }
    v->commit = number;
    while (*end)
        end = &(*end)->next;
    *end = v;
    if (rec->pending == v)
        cube_list_add(&g->changed, &rec->changed);
    cube_ledger_join(g);
    return v;
}

/* Puts the version that is being edited into the commit that fills. */
static void cube_record_stage(struct cube_ledger *g, struct cube_record *rec)
{
    struct cube_version *v = cube_record_latest(rec);
    unsigned char key[8];
    struct cube_buf text = {0};
    struct cube_err err;
    int r;

    cube_number_key(v->keep.number, key);
    if (v->is_gone) {
        r = cube_store_del(g->store, CUBE_TREE_TASKS, key, sizeof key, &err);
    } else {
        cube_version_print(v, &text);
        r = cube_store_put(g->store, CUBE_TREE_TASKS, key, sizeof key,
                           text.data, text.len, &err);
        cube_buf_free(&text);
    }
    /* The store refuses a change only when it is read-only after a failed
     * sync; the commit that fills then fails too, and says why. */
    if (r < 0)
        cube_log(g->loop, CUBE_ERROR, "store task %s: %s", rec->id, err.text);
}

/* Stages the record's removal. */
static void cube_record_remove(struct cube_ledger *g, struct cube_record *rec)
{
    cube_record_edit(g, rec)->is_gone = true;
    cube_record_stage(g, rec);
}

static int cube_ledger_load(struct cube_ledger *g, struct cube_err *err)
{
    struct cube_cursor *c = cube_cursor_open(g->store, CUBE_TREE_TASKS, err);
    int r = c ? cube_cursor_first(c, err) : -1;

    for (; r > 0; r = cube_cursor_next(c, err)) {
        struct cube_buf text = {0};
        struct cube_version *v;
        size_t len;
        const void *key = cube_cursor_key(c, &len);
        int64_t number = cube_number_of_key(key, len);
        const void *value;

        if (cube_cursor_value(c, &value, &len, err) < 0) {
            r = -1;
            break;
        }
        cube_buf_add(&text, value, len);
        v = cube_version_parse(&text, err);
        cube_buf_free(&text);
        if (!v) {
            r = cube_fail(err, CUBE_ECORRUPT,
                          "task number %lld in the store cannot be read",
                          (long long)number);
            break;
        }
        cube_ledger_add(g, v->task->id)->now = v;
        g->last_number = number;
    }
    cube_cursor_close(c);
    return r < 0 ? -1 : 0;
}

static void cube_ledger_close(struct cube_ledger *g)
{
    void *value;

    if (!g)
        return;
    for (int i = 0; i < 2; i++)
        cube_commit_forget(&g->waits[i].wait);
    for (size_t at = 0; cube_map_next(&g->records, &at, NULL, &value);)
        cube_record_drop(value);
    cube_map_free(&g->records);
    cube_free(g);
}

/* Reads all records of `store`. NULL when one cannot be read. */
static struct cube_ledger *
cube_ledger_open(struct cube_loop *l, struct cube_store *store,
                 struct cube_commit *commit, cube_ledger_fn *on_change,
                 cube_ledger_end_fn *on_commit, cube_ledger_drop_fn *on_drop,
                 void *arg, struct cube_err *err)
{
    struct cube_ledger *g = cube_alloc(sizeof *g);
    uint64_t seed = 0;

    g->loop = l;
    g->store = store;
    g->commit = commit;
    g->on_change = on_change;
    g->on_commit = on_commit;
    g->on_drop = on_drop;
    g->arg = arg;
    cube_list_init(&g->changed);
    (void)l->world->random(l->world->ctx, &seed, sizeof seed);
    cube_map_init(&g->records, seed);
    if (cube_ledger_load(g, err) < 0) {
        cube_ledger_close(g);
        return NULL;
    }
    return g;
}

/* An answer that waits for the commit that fills. */
struct cube_vow {
    struct cube_commit_wait wait;
    struct cube_http_req *req;
    struct cube_buf body;
    int status;
    cube_call_fn *kept; /* called when it is on disk, before the answer */
    void *kept_arg;
};

static void cube_vow_free(void *arg)
{
    struct cube_vow *p = arg;

    cube_commit_forget(&p->wait);
    cube_buf_free(&p->body);
    cube_free(p);
}

/* The words for a commit that failed, and its status: 507 when there was no
 * room, 503 when nobody can say what is on disk. */
static void cube_reply_unkept(struct cube_http_req *req,
                              const struct cube_err *err)
{
    int status = err->code == CUBE_ENOSPC  ? 507
                 : err->code == CUBE_ESYNC ? 503
                                           : 500;

    cube_http_reply_error(req, status, "%s%s",
                          status == 503 ? "outcome unknown: " : "", err->text);
}

static void cube_vow_keep(void *arg, const struct cube_err *err)
{
    struct cube_vow *p = arg;

    if (!err && p->kept)
        p->kept(p->kept_arg);
    if (p->req) {
        cube_http_on_gone(p->req, NULL, NULL);
        if (err)
            cube_reply_unkept(p->req, err);
        else
            cube_http_reply(p->req, p->status,
                            p->body.len ? "application/json" : NULL,
                            p->body.data, p->body.len);
    }
    cube_vow_free(p);
}

static void cube_vow_gone(void *arg)
{
    struct cube_vow *p = arg;

    p->req = NULL;
}

/* Answers `status` with `body` (may be NULL; its bytes are taken over) once
 * all that is staged now is on disk, or with why it is not. */
static struct cube_vow *cube_reply_kept(struct cube_commit *c,
                                            struct cube_http_req *req,
                                            int status, struct cube_buf *body)
{
    struct cube_vow *p = cube_alloc(sizeof *p);

    p->req = req;
    p->status = status;
    if (body) {
        p->body = *body;
        memset(body, 0, sizeof *body);
    }
    if (req)
        cube_http_on_gone(req, cube_vow_gone, p);
    cube_commit_wait(c, &p->wait, cube_vow_keep, p);
    return p;
}

/* ---- Answers that both keepers give ---- */

static void cube_reply_task(struct cube_http_req *req, int status,
                            const struct cube_task *t)
{
    struct cube_buf body = {0};

    cube_task_print(t, &body);
    cube_buf_puts(&body, "\n");
    cube_http_reply(req, status, "application/json", body.data, body.len);
    cube_buf_free(&body);
}

static void cube_reply_healthy(void *arg, struct cube_http_req *req)
{
    static const char body[] = "{\"Status\":\"ok\"}\n";

    (void)arg;
    cube_http_reply(req, 200, "application/json", body, sizeof body - 1);
}

/* A list of all tasks that is being sent, from one commit of the store. */
struct cube_listing {
    struct cube_loop *loop;
    struct cube_http_req *req;
    struct cube_cursor *cursor;
    struct cube_defer next;
    bool has_one;
};

#define CUBE_LISTING_SLICE 128                /* records a turn */
#define CUBE_LISTING_BACKLOG (1024 * 1024)    /* bytes that wait to be sent */

static void cube_listing_free(void *arg)
{
    struct cube_listing *g = arg;

    cube_defer_clear(g->loop, &g->next);
    cube_cursor_close(g->cursor);
    cube_free(g);
}

/* A record's value ends with its task, printed as it is on the wire. Hidden
 * ones are left out. */
static void cube_listing_add(struct cube_listing *g, const char *value,
                             size_t len, struct cube_buf *out)
{
    static const char hidden[] = "\"Hidden\":1,", task[] = ",\"Task\":";
    const char *at = memmem(value, len, task, sizeof task - 1);
    const char *mark = memmem(value, len, hidden, sizeof hidden - 1);

    if (!at || (mark && mark < at))
        return;
    at += sizeof task - 1;
    if (g->has_one)
        cube_buf_puts(out, ",");
    g->has_one = true;
    cube_buf_add(out, at, (size_t)(value + len - 1 - at));
}

static void cube_listing_slice(void *arg)
{
    struct cube_listing *g = arg;
    struct cube_buf out = {0};
    int more = 1;

    if (cube_http_stream_backlog(g->req) > CUBE_LISTING_BACKLOG)
        return; /* its drain callback goes on */
    for (int i = 0; more > 0 && i < CUBE_LISTING_SLICE; i++) {
        const void *value;
        size_t len;

        more = cube_cursor_value(g->cursor, &value, &len, NULL) < 0 ? -1 : 1;
        if (more > 0) {
            cube_listing_add(g, value, len, &out);
            more = cube_cursor_next(g->cursor, NULL);
        }
    }
    if (more == 0)
        cube_buf_puts(&out, "]\n");
    cube_http_stream_write(g->req, out.data, out.len);
    cube_buf_free(&out);
    if (more > 0) {
        cube_defer_set(g->loop, &g->next, cube_listing_slice, g);
        return;
    }
    cube_http_on_gone(g->req, NULL, NULL);
    if (more < 0) /* the file cannot be read: the reader sees it cut short */
        cube_http_stream_abort(g->req);
    else
        cube_http_stream_end(g->req);
    cube_listing_free(g);
}

static void cube_listing_drained(void *arg)
{
    struct cube_listing *g = arg;

    cube_defer_set(g->loop, &g->next, cube_listing_slice, g);
}

/* Answers with all tasks, as one commit has them, in slices. */
static void cube_ledger_reply(struct cube_ledger *l, struct cube_http_req *req)
{
    struct cube_err err;
    struct cube_cursor *c = cube_cursor_open(l->store, CUBE_TREE_TASKS, &err);
    int more = c ? cube_cursor_first(c, &err) : -1;
    struct cube_listing *g;

    if (more <= 0) {
        cube_cursor_close(c);
        if (more < 0)
            cube_http_reply_error(req, 500, "%s", err.text);
        else
            cube_http_reply(req, 200, "application/json", "[]\n", 3);
        return;
    }
    g = cube_alloc(sizeof *g);
    g->loop = l->loop;
    g->req = req;
    g->cursor = c;
    cube_http_stream(req, 200, "application/json");
    cube_http_on_gone(req, cube_listing_free, g);
    cube_http_stream_on_drain(req, cube_listing_drained, g);
    cube_http_stream_write(req, "[", 1);
    cube_listing_slice(g);
}

/* ---- The feed: changes, pushed ---- */

/*
 * Who follows a feed gets each change once and in order, or is told that it
 * missed some. The last lines are kept in a ring; each follower has a place
 * in it of its own, so that a slow one costs no memory and delays nobody.
 *
 *    ring     [ 41 | 42 | 43 | 44 | 45 ]          45 is the newest
 *                    ^         ^      ^
 *     follower:    slow      busy    up to date
 *
 *    GET /events?after=S:41   S is this stream, 42 is in the ring
 *        {"Type":"hello",...}  then 42, 43, ...
 *    GET /events              or S is another stream, or 42 is gone
 *        {"Type":"hello",...}  {"Type":"reset",...}
 *        {"Type":"task",...}   ... one for each task there is
 *        {"Type":"listed",...} then what changed since the reset
 *
 * A follower whose connection is full is left alone until it has drained; if
 * the ring has moved past its place by then, it gets a reset. Beats (the
 * newest statistics, say) are sent to whoever is up to date and are not kept.
 */

#define CUBE_FEED_RING 4096             /* lines kept for those who come back */
#define CUBE_FEED_BACKLOG (256 * 1024)  /* bytes waiting in one connection */
#define CUBE_FEED_SLICE 64              /* records listed at once */

/* Adds the line of the record after `*at` to `out`; false at the end. */
typedef bool cube_feed_list_fn(void *arg, size_t *at, struct cube_buf *out);
/* Adds the members of the hello that are the keeper's: `,"Epoch":3`. */
typedef void cube_feed_hello_fn(void *arg, struct cube_buf *out);

struct cube_feed {
    struct cube_loop *loop;
    char stream[CUBE_UUID_TEXT];
    uint64_t last;                 /* the newest number; 0: none yet */
    uint64_t first;                /* the oldest in the ring */
    char *ring[CUBE_FEED_RING];    /* by number modulo its size */
    struct cube_list followers;
    cube_feed_list_fn *list;
    cube_feed_hello_fn *hello;
    void *arg;
    struct cube_defer pump;
};

struct cube_follower {
    struct cube_feed *feed;
    struct cube_list link;
    struct cube_http_req *req;
    uint64_t next;      /* the number of the line to send next */
    bool is_listing;
    size_t list_at;
};

static void cube_feed_init(struct cube_feed *f, struct cube_loop *l,
                           const char *stream, uint64_t last)
{
    memset(f, 0, sizeof *f);
    f->loop = l;
    (void)snprintf(f->stream, sizeof f->stream, "%s", stream);
    f->last = last;
    f->first = last + 1;
    cube_list_init(&f->followers);
}

static void cube_follower_free(struct cube_follower *w)
{
    cube_list_remove(&w->link);
    cube_free(w);
}

static void cube_follower_gone(void *arg)
{
    cube_follower_free(arg);
}

static void cube_feed_close(struct cube_feed *f)
{
    cube_defer_clear(f->loop, &f->pump);
    while (!cube_list_is_empty(&f->followers)) {
        struct cube_follower *w =
            CUBE_OF(f->followers.next, struct cube_follower, link);

        cube_http_on_gone(w->req, NULL, NULL);
        cube_http_stream_abort(w->req);
        cube_follower_free(w);
    }
    for (size_t i = 0; i < CUBE_FEED_RING; i++)
        cube_free(f->ring[i]);
}

static void cube_follower_reset(struct cube_follower *w)
{
    struct cube_buf line = {0};

    w->is_listing = true;
    w->list_at = 0;
    w->next = w->feed->last + 1;
    cube_buf_printf(&line, "{\"Type\":\"reset\",\"Stream\":\"%s\","
                    "\"Seq\":%llu}\n", w->feed->stream,
                    (unsigned long long)w->feed->last);
    cube_http_stream_write(w->req, line.data, line.len);
    cube_buf_free(&line);
}

/* The next slice of the full list. */
static void cube_follower_list(struct cube_follower *w)
{
    struct cube_feed *f = w->feed;
    struct cube_buf out = {0};

    for (int i = 0; i < CUBE_FEED_SLICE && w->is_listing; i++)
        w->is_listing = f->list(f->arg, &w->list_at, &out);
    if (!w->is_listing)
        cube_buf_printf(&out, "{\"Type\":\"listed\",\"Stream\":\"%s\","
                        "\"Seq\":%llu}\n", f->stream,
                        (unsigned long long)(w->next - 1));
    cube_http_stream_write(w->req, out.data, out.len);
    cube_buf_free(&out);
}

static bool cube_follower_is_current(const struct cube_follower *w)
{
    return !w->is_listing && w->next > w->feed->last;
}

/* Sends what fits: list, then lines. True when there is more to send and
 * room for it. */
static bool cube_follower_pump(struct cube_follower *w)
{
    struct cube_feed *f = w->feed;

    if (cube_http_stream_backlog(w->req) >= CUBE_FEED_BACKLOG)
        return false; /* its drain callback goes on */
    if (w->next < f->first)
        cube_follower_reset(w);
    if (w->is_listing) {
        cube_follower_list(w);
        return true;
    }
    while (w->next <= f->last &&
           cube_http_stream_backlog(w->req) < CUBE_FEED_BACKLOG) {
        const char *line = f->ring[w->next++ % CUBE_FEED_RING];

        cube_http_stream_write(w->req, line, strlen(line));
    }
    return false;
}

static void cube_feed_pump(void *arg)
{
    struct cube_feed *f = arg;
    struct cube_list *link, *next;
    bool has_more = false;

    for (link = f->followers.next; link != &f->followers; link = next) {
        next = link->next;
        has_more |= cube_follower_pump(
            CUBE_OF(link, struct cube_follower, link));
    }
    if (has_more)
        cube_defer_set(f->loop, &f->pump, cube_feed_pump, f);
}

static void cube_follower_drained(void *arg)
{
    struct cube_follower *w = arg;

    cube_defer_set(w->feed->loop, &w->feed->pump, cube_feed_pump, w->feed);
}

/* Puts the line with number `last + 1` into the ring; takes it over. */
static void cube_feed_push(struct cube_feed *f, char *line)
{
    char **slot = &f->ring[++f->last % CUBE_FEED_RING];

    cube_free(*slot);
    *slot = line;
    if (f->last - f->first >= CUBE_FEED_RING)
        f->first = f->last - CUBE_FEED_RING + 1;
    cube_defer_set(f->loop, &f->pump, cube_feed_pump, f);
}

/* `after` is "stream:number", as the lines have them. */
static bool cube_feed_can_resume(const struct cube_feed *f, const char *after,
                                 uint64_t *next)
{
    size_t len = strlen(f->stream);
    uint64_t seq;

    if (!after || strncmp(after, f->stream, len) != 0 || after[len] != ':' ||
        cube_text_u64(after + len + 1, strlen(after + len + 1), INT64_MAX,
                      &seq) < 0)
        return false;
    *next = seq + 1;
    return seq <= f->last && seq + 1 >= f->first;
}

/* Answers GET /events: hello, and from then on all that happens. */
static void cube_feed_follow(struct cube_feed *f, struct cube_http_req *req)
{
    struct cube_follower *w = cube_alloc(sizeof *w);
    const char *after = cube_http_query(req, "after");
    struct cube_buf line = {0};
    bool can_resume = cube_feed_can_resume(f, after, &w->next);

    w->feed = f;
    w->req = req;
    cube_list_add(&f->followers, &w->link);
    cube_http_stream(req, 200, "application/x-ndjson");
    cube_http_on_gone(req, cube_follower_gone, w);
    cube_http_stream_on_drain(req, cube_follower_drained, w);
    cube_buf_printf(&line, "{\"Type\":\"hello\",\"Stream\":\"%s\","
                    "\"Seq\":%llu", f->stream, (unsigned long long)f->last);
    f->hello(f->arg, &line);
    cube_buf_puts(&line, "}\n");
    cube_http_stream_write(req, line.data, line.len);
    cube_buf_free(&line);
    if (!can_resume)
        cube_follower_reset(w);
    cube_defer_set(f->loop, &f->pump, cube_feed_pump, f);
}

/* A line that is not kept, for those who are up to date: a sign of life. */
static void cube_feed_beat(struct cube_feed *f, const char *line, size_t len)
{
    struct cube_list *link;

    for (link = f->followers.next; link != &f->followers; link = link->next) {
        struct cube_follower *w = CUBE_OF(link, struct cube_follower, link);

        if (cube_follower_is_current(w) &&
            cube_http_stream_backlog(w->req) < CUBE_FEED_BACKLOG)
            cube_http_stream_write(w->req, line, len);
    }
}

/* The line of a task's change, under the number that it will have. */
static void cube_feed_task_line(const struct cube_feed *f, uint64_t seq,
                                const struct cube_task *t, bool is_gone,
                                struct cube_buf *out)
{
    const struct cube_world *w = f->loop->world;
    struct cube_time now = cube_time_from_ns(w->wall_ns(w->ctx));
    char text[CUBE_TIME_TEXT];

    cube_time_format(&now, text);
    cube_buf_printf(out, "{\"Type\":\"%s\",\"Stream\":\"%s\",\"Seq\":%llu,"
                    "\"Time\":\"%s\",", is_gone ? "gone" : "task", f->stream,
                    (unsigned long long)seq, text);
    if (is_gone) {
        cube_buf_printf(out, "\"ID\":\"%s\"}\n", t->id);
        return;
    }
    cube_buf_puts(out, "\"Task\":");
    cube_task_print(t, out);
    cube_buf_puts(out, "}\n");
}

/* ---- Health ---- */

/*
 * A task with a HealthCheck is asked GET on that path, on the host port of
 * its lowest container port. It has a start period in which failures do not
 * count, ended early by the first success; then so many failures in a row
 * make it sick.
 *
 *    start period          from the first success on
 *    |--x--x--x--ok-------|--ok---x---x---ok---x---x---x--> sick
 */

#define CUBE_HEALTH_START_MS 30000
#define CUBE_HEALTH_INTERVAL_MS 10000
#define CUBE_HEALTH_TIMEOUT_MS 5000
#define CUBE_HEALTH_RETRIES 3
#define CUBE_HEALTH_EAGER_MS 1000 /* between checks until the first success */

/* In words why it is sick; the watch has ended by then. */
typedef void cube_sick_fn(void *arg, const char *words);

/* The watch over one running task; zeroed is off. */
struct cube_health {
    struct cube_loop *loop;
    struct cube_timer timer;
    struct cube_http_client *client;
    struct cube_http_call *call;
    char *path;
    int64_t start_ms, interval_ms, timeout_ms, retries; /* of the task */
    int64_t since_ms, failures;
    bool has_succeeded, is_on;
    cube_sick_fn *on_sick;
    void *arg;
};

static int64_t cube_or(int64_t value, int64_t otherwise)
{
    return value > 0 ? value : otherwise;
}

static void cube_health_stop(struct cube_health *h)
{
    if (!h->is_on)
        return;
    cube_timer_clear(h->loop, &h->timer);
    if (h->call)
        cube_http_call_cancel(h->call);
    cube_http_client_free(h->client);
    cube_free(h->path);
    memset(h, 0, sizeof *h);
}

/* The host port of the lowest container port (TCP); 0: it has none. */
static int cube_health_port(const struct cube_task *t, const char **ip)
{
    int lowest = 65536, found = 0;

    for (size_t i = 0; i < t->host_ports.count; i++) {
        const struct cube_port *p = &t->host_ports.list[i];
        const char *text = p->count > 0 ? p->bindings[0].port : "";
        const char *protocol;
        uint64_t number;
        int port;

        if (cube_port_parse(p->port, &port, &protocol) < 0 ||
            strcmp(protocol, "tcp") != 0 || port >= lowest ||
            cube_text_u64(text, strlen(text), 65535, &number) < 0)
            continue;
        lowest = port;
        found = (int)number;
        *ip = p->bindings[0].ip;
    }
    return found;
}

static void cube_health_check(void *arg); /* mutual recursion */

static void cube_health_again(struct cube_health *h)
{
    bool is_eager = !h->has_succeeded && h->interval_ms > CUBE_HEALTH_EAGER_MS;

    cube_timer_set(h->loop, &h->timer,
                   is_eager ? CUBE_HEALTH_EAGER_MS : h->interval_ms,
                   cube_health_check, h);
}

static void cube_health_sick(struct cube_health *h, const char *why)
{
    struct cube_buf words = {0};
    cube_sick_fn *fn = h->on_sick;
    void *arg = h->arg;

    cube_buf_printf(&words, "health check GET %s failed %lld times: %s",
                    h->path, (long long)h->failures, why);
    cube_health_stop(h);
    fn(arg, words.data);
    cube_buf_free(&words);
}

static void cube_health_answered(void *arg, const struct cube_http_answer *a)
{
    struct cube_health *h = arg;
    char status[40];

    h->call = NULL;
    if (!a->err && a->status >= 200 && a->status < 400) {
        h->has_succeeded = true;
        h->failures = 0;
    } else if (h->has_succeeded ||
               cube_loop_now_ms(h->loop) - h->since_ms >= h->start_ms) {
        h->failures++;
    }
    (void)snprintf(status, sizeof status, "status %d", a->status);
    if (h->failures >= h->retries)
        cube_health_sick(h, a->err ? a->err->text : status);
    else
        cube_health_again(h);
}

static void cube_health_check(void *arg)
{
    struct cube_health *h = arg;
    struct cube_http_request r;

    memset(&r, 0, sizeof r);
    r.method = "GET";
    r.target = h->path;
    r.timeout_ms = (int)h->timeout_ms;
    r.on_done = cube_health_answered;
    r.arg = h;
    h->call = cube_http_call(h->client, &r);
}

/* Watches a running task at `host` (NULL: this machine), if it wants that
 * and has a port; nothing changes when it is watched already. */
static void cube_health_start(struct cube_health *h, struct cube_loop *l,
                              const struct cube_task *t, const char *host,
                              cube_sick_fn *on_sick, void *arg)
{
    struct cube_buf base = {0};
    const char *ip = "";
    int port = cube_health_port(t, &ip);

    if (h->is_on || !*t->health_check || port == 0)
        return;
    if (!host)
        host = !*ip || strcmp(ip, "0.0.0.0") == 0 || strcmp(ip, "::") == 0
                   ? "127.0.0.1"
                   : ip;
    cube_buf_printf(&base, strchr(host, ':') && *host != '['
                               ? "http://[%s]:%d" : "http://%s:%d",
                    host, port);
    h->client = cube_http_client_new(l, base.data, NULL, NULL);
    cube_buf_free(&base);
    if (!h->client)
        return;
    h->is_on = true;
    h->loop = l;
    h->path = cube_text_dup(t->health_check);
    h->start_ms = cube_or(t->health_start_ms, CUBE_HEALTH_START_MS);
    h->interval_ms = cube_or(t->health_interval_ms, CUBE_HEALTH_INTERVAL_MS);
    h->timeout_ms = cube_or(t->health_timeout_ms, CUBE_HEALTH_TIMEOUT_MS);
    h->retries = cube_or(t->health_retries, CUBE_HEALTH_RETRIES);
    h->since_ms = cube_loop_now_ms(l);
    h->on_sick = on_sick;
    h->arg = arg;
    cube_health_again(h);
}


/* ==== Chapter 8. Machine ==== uses: 1 2 3 ==== */
/*
 * What a machine has, and what of it is in use: the numbers that schedulers
 * decide by and that `cube node` shows.
 *
 * Linux tells it in text files. The problem is less to read them than to say
 * seventy numbers the same way in four places: in a struct, out of /proc, out
 * as JSON, and back in at the manager. The simplest thing that works, seventy
 * lines in each of four functions, is wrong in one of 280 lines and nobody
 * sees it. So each number stands in one table, with its key on the wire, its
 * line in /proc and its place in the struct, and four loops do the rest.
 *
 *    /proc/meminfo   MemTotal:       24684096 kB         -> mem
 *                    Active(anon):       1644 kB
 *    /proc/stat      cpu  87060 0 14858 106606 1419 ...  -> cpu  (all CPUs)
 *                    cpu0 43530 0 7429 53303 709 ...     -> counted: cpus
 *    /proc/loadavg   1.99 2.92 1.73 8/195 23382          -> load
 *    statvfs("/")    blocks, free blocks, free inodes    -> disk
 *
 *                     cube_machine_groups
 *    struct          +-------------+-----------------+          JSON
 *    cube_stats <--- | "MemStats"  | mem_total, ...  | ---> {"MemStats":{
 *               ---> | "DiskStats" | all, used, ...  | <---  "mem_total":...
 *                    | "CpuStats"  | user, nice, ... |
 *                    | "LoadStats" | last1min, ...   |
 *                    +-------------+-----------------+
 *
 * The parsers take a buffer and no more, so they are tested with texts of
 * machines that nobody here owns. They forgive: a line that is not known is
 * left out, one that is missing leaves 0. Kernels differ, and a worker that
 * refuses to start for a line of /proc helps nobody. The manager does not
 * forgive a worker numbers that are none, since it places tasks by them.
 *
 * CPU use. The ticks of /proc/stat count from the start of the machine. Their
 * ratio is the average since then, which says nothing about now: a machine
 * that idled for a month looks idle. What was chosen is the difference between
 * two readings, at least CUBE_MACHINE_INTERVAL_MS apart, since a short one
 * has few ticks and much noise. The first answer, before there are two, is
 * that average after all.
 *
 *    ticks    user nice system irq softirq steal | idle iowait
 *             busy: work, or taken by the host   | not busy
 *
 *    guest time is counted within user, and so is left out. Single counters
 *    can step back (iowait does on some kernels); that counts as no change.
 *
 * Which machine. Two workers on one machine share its memory and its ports,
 * and only the machine can say that it is the same one: /etc/machine-id, or
 * where there is none (a container, a small image) the kernel's boot ID.
 *
 *    struct cube_machine *m = cube_machine_new(w);
 *    cube_machine_read(m, "/", &stats, err);      every second or so
 *    stats.task_count = ...;
 *    cube_stats_print(&stats, &out);              GET /stats, heartbeats
 *    cube_stats_parse(text, len, &stats, err);    at the manager
 *
 * Naive on purpose: a key is found by trying all of a group, about two
 * thousand short comparisons a reading, some 20 microseconds. Machines that
 * were cloned with their /etc/machine-id pass for one; give each its own.
 * The numbers are the whole machine's, also inside a cgroup with less.
 */

#define CUBE_MACHINE_FILE_MAX (4u << 20) /* bytes of a file in /proc */
#define CUBE_MACHINE_INTERVAL_MS 500     /* shortest for CPU use */

/* ---- The table of all numbers ---- */

struct cube_machine_field {
    const char *key;  /* on the wire */
    const char *line; /* of /proc/meminfo; NULL for the others */
    size_t at;        /* in the struct of its group */
    bool is_float;    /* a double, else a uint64_t */
};

#define CUBE_MACHINE_FIELD(name, line)                                        \
    {#name, line, offsetof(struct cube_mem, name), false},
#define CUBE_MACHINE_CPU(name)                                                \
    {#name, NULL, offsetof(struct cube_cpu, name), false}
#define CUBE_MACHINE_LOAD(name, is_float)                                     \
    {#name, NULL, offsetof(struct cube_load, name), is_float}

static const struct cube_machine_field cube_machine_mem[] = {
    CUBE_MEM_FIELDS(CUBE_MACHINE_FIELD)
};

static const struct cube_machine_field cube_machine_disk[] = {
    {"all", NULL, offsetof(struct cube_disk, all), false},
    {"used", NULL, offsetof(struct cube_disk, used), false},
    {"free", NULL, offsetof(struct cube_disk, free), false},
    {"freeInodes", NULL, offsetof(struct cube_disk, free_inodes), false},
};

/* In the order of the line in /proc/stat. */
static const struct cube_machine_field cube_machine_cpu[] = {
    CUBE_MACHINE_CPU(user),    CUBE_MACHINE_CPU(nice),
    CUBE_MACHINE_CPU(system),  CUBE_MACHINE_CPU(idle),
    CUBE_MACHINE_CPU(iowait),  CUBE_MACHINE_CPU(irq),
    CUBE_MACHINE_CPU(softirq), CUBE_MACHINE_CPU(steal),
    CUBE_MACHINE_CPU(guest),   CUBE_MACHINE_CPU(guest_nice),
};

/* In the order of /proc/loadavg. */
static const struct cube_machine_field cube_machine_load[] = {
    CUBE_MACHINE_LOAD(last1min, true),
    CUBE_MACHINE_LOAD(last5min, true),
    CUBE_MACHINE_LOAD(last15min, true),
    CUBE_MACHINE_LOAD(process_running, false),
    CUBE_MACHINE_LOAD(process_total, false),
    CUBE_MACHINE_LOAD(last_pid, false),
};

struct cube_machine_group {
    const char *key;
    const char *lead; /* the first member, when it is a constant */
    const struct cube_machine_field *fields;
    size_t count;
    size_t at; /* in struct cube_stats */
};

static const struct cube_machine_group cube_machine_groups[] = {
    {"MemStats", "", cube_machine_mem, CUBE_COUNT(cube_machine_mem),
     offsetof(struct cube_stats, mem)},
    {"DiskStats", "", cube_machine_disk, CUBE_COUNT(cube_machine_disk),
     offsetof(struct cube_stats, disk)},
    {"CpuStats", "\"id\":\"cpu\",", cube_machine_cpu,
     CUBE_COUNT(cube_machine_cpu), offsetof(struct cube_stats, cpu)},
    {"LoadStats", "", cube_machine_load, CUBE_COUNT(cube_machine_load),
     offsetof(struct cube_stats, load)},
};

/* Sets a field from its text; what is no number leaves it as it was. */
static int cube_machine_set(const struct cube_machine_field *f, void *base,
                            const char *p, size_t len)
{
    char *at = (char *)base + f->at;
    uint64_t number;
    double real;

    if (f->is_float) {
        if (cube_json_text_f64(p, len, &real) || real < 0)
            return -1;
        memcpy(at, &real, sizeof real);
        return 0;
    }
    if (cube_text_u64(p, len, INT64_MAX, &number))
        return -1;
    memcpy(at, &number, sizeof number);
    return 0;
}

/* ---- /proc, parsed from buffers ---- */

/* What is still to be read of a text. */
struct cube_machine_text {
    const char *p;
    size_t left;
};

/* Takes the characters up to the first of `ends`, and skips all such. False:
 * nothing is left. */
static bool cube_machine_take(struct cube_machine_text *t, const char *ends,
                              struct cube_machine_text *out)
{
    *out = *t;
    while (t->left > 0 && !strchr(ends, *t->p))
        t->p++, t->left--;
    out->left -= t->left;
    while (t->left > 0 && strchr(ends, *t->p))
        t->p++, t->left--;
    return out->left > 0 || t->left > 0;
}

/* /proc/meminfo: a line is `Name:`, spaces, a number, and often ` kB`. */
static void cube_machine_parse_mem(const char *p, size_t len,
                                   struct cube_mem *out)
{
    struct cube_machine_text all = {p, len}, line, name, value;

    memset(out, 0, sizeof *out);
    while (cube_machine_take(&all, "\n", &line)) {
        if (!cube_machine_take(&line, ": ", &name) ||
            !cube_machine_take(&line, " ", &value))
            continue;
        for (size_t i = 0; i < CUBE_COUNT(cube_machine_mem); i++) {
            if (cube_text_is(name.p, name.left, cube_machine_mem[i].line)) {
                (void)cube_machine_set(&cube_machine_mem[i], out, value.p,
                                       value.left);
                break;
            }
        }
    }
}

/* Digits and points: what a number in /proc is made of. JSON's numbers were
 * checked when they were parsed; these were not. */
static bool cube_machine_is_number(const struct cube_machine_text *t)
{
    for (size_t i = 0; i < t->left; i++) {
        if (t->p[i] != '.' && (t->p[i] < '0' || t->p[i] > '9'))
            return false;
    }
    return t->left > 0;
}

/* Numbers between spaces, as many as there are, into a group's fields. */
static void cube_machine_parse_row(struct cube_machine_text row,
                                   const char *ends,
                                   const struct cube_machine_field *fields,
                                   size_t count, void *base)
{
    struct cube_machine_text word;

    for (size_t i = 0; i < count; i++) {
        if (!cube_machine_take(&row, ends, &word))
            break;
        if (cube_machine_is_number(&word))
            (void)cube_machine_set(&fields[i], base, word.p, word.left);
    }
}

/* /proc/stat: the line `cpu` is the sum; those of `cpu0` and on are counted.
 * They come first, so the reading ends at the first other line. */
static void cube_machine_parse_cpu(const char *p, size_t len,
                                   struct cube_cpu *out, int64_t *cpus)
{
    struct cube_machine_text all = {p, len}, line, name;

    memset(out, 0, sizeof *out);
    *cpus = 0;
    while (cube_machine_take(&all, "\n", &line) &&
           cube_machine_take(&line, " ", &name)) {
        if (name.left < 3 || memcmp(name.p, "cpu", 3))
            break;
        if (name.left > 3)
            ++*cpus;
        else
            cube_machine_parse_row(line, " ", cube_machine_cpu,
                                   CUBE_COUNT(cube_machine_cpu), out);
    }
}

/* /proc/loadavg: `1.99 2.92 1.73 8/195 23382` */
static void cube_machine_parse_load(const char *p, size_t len,
                                    struct cube_load *out)
{
    struct cube_machine_text all = {p, len};

    memset(out, 0, sizeof *out);
    cube_machine_parse_row(all, " /\n", cube_machine_load,
                           CUBE_COUNT(cube_machine_load), out);
}

/* ---- CPU use ---- */

static uint64_t cube_machine_ticks(const struct cube_cpu *c, bool is_idle)
{
    return is_idle ? c->idle + c->iowait
                   : c->user + c->nice + c->system + c->irq + c->softirq +
                         c->steal;
}

/*
 * The busy share of the time between two readings, 0 to 1, or -1 when the
 * clock did not tick between them. A manager also uses this for workers that
 * send ticks and no share.
 */
static double cube_machine_use(const struct cube_cpu *before,
                               const struct cube_cpu *after)
{
    uint64_t part[2];

    for (int is_idle = 0; is_idle < 2; is_idle++) {
        uint64_t old = cube_machine_ticks(before, is_idle);
        uint64_t new = cube_machine_ticks(after, is_idle);

        part[is_idle] = new > old ? new - old : 0;
    }
    if (part[0] + part[1] == 0)
        return -1;
    return (double)part[0] / (double)(part[0] + part[1]);
}

/* ---- Reading a machine ---- */

/* An object; `_new` and `_free`. */
struct cube_machine {
    const struct cube_world *w;
    char id[40];           /* the machine's, for `machine` */
    struct cube_cpu cpu;   /* the reading that CPU use is counted from */
    int64_t at_ms;         /* when that was */
    double cpu_use;
    bool has_use;          /* cpu_use is of an interval, or of a start */
    struct cube_buf text;  /* of the file being read */
};

/* Reads the first line of a file if it can be an ID. */
static bool cube_machine_read_id(struct cube_machine *m, const char *path)
{
    size_t len;

    if (cube_file_read(m->w, path, &m->text, 4096, NULL))
        return false;
    len = strspn(m->text.data, "0123456789abcdefABCDEF-");
    if (len < 32 || len >= sizeof m->id)
        return false; /* "uninitialized", on a machine that is being set up */
    memcpy(m->id, m->text.data, len);
    m->id[len] = 0;
    return true;
}

CUBE_API struct cube_machine *cube_machine_new(const struct cube_world *w)
{
    struct cube_machine *m = cube_alloc(sizeof *m);

    m->w = w;
    if (!cube_machine_read_id(m, "/etc/machine-id"))
        (void)cube_machine_read_id(m, "/proc/sys/kernel/random/boot_id");
    return m;
}

CUBE_API void cube_machine_free(struct cube_machine *m)
{
    if (!m)
        return;
    cube_buf_free(&m->text);
    cube_free(m);
}

/* Counts the use since the last reading that is old enough. The first time
 * that is the start of the machine, where all ticks were 0. */
static double cube_machine_count(struct cube_machine *m,
                                 const struct cube_cpu *now)
{
    int64_t now_ms = m->w->now_ms(m->w->ctx);
    double use;

    if (m->has_use && now_ms - m->at_ms < CUBE_MACHINE_INTERVAL_MS)
        return m->cpu_use;
    use = cube_machine_use(&m->cpu, now);
    if (use >= 0) {
        m->cpu_use = use;
        m->has_use = true;
        m->cpu = *now;
        m->at_ms = now_ms;
    }
    return m->cpu_use;
}

/* The text of a file in /proc; empty when it cannot be read, which is noted
 * in `is_failed` and said in `err`. Lives until the next one. */
static struct cube_machine_text cube_machine_file(struct cube_machine *m,
                                                  const char *path,
                                                  bool *is_failed,
                                                  struct cube_err *err)
{
    struct cube_machine_text text = {"", 0};

    if (cube_file_read(m->w, path, &m->text, CUBE_MACHINE_FILE_MAX, err)) {
        *is_failed = true;
        return text;
    }
    text.p = m->text.data;
    text.left = m->text.len;
    return text;
}

CUBE_API int cube_machine_read(struct cube_machine *m, const char *path,
                               struct cube_stats *out, struct cube_err *err)
{
    struct cube_space space = {0, 0, 0};
    struct cube_machine_text text;
    bool is_failed = false;
    int status;

    text = cube_machine_file(m, "/proc/meminfo", &is_failed, err);
    cube_machine_parse_mem(text.p, text.left, &out->mem);
    text = cube_machine_file(m, "/proc/stat", &is_failed, err);
    cube_machine_parse_cpu(text.p, text.left, &out->cpu, &out->cpus);
    text = cube_machine_file(m, "/proc/loadavg", &is_failed, err);
    cube_machine_parse_load(text.p, text.left, &out->load);
    status = m->w->space(m->w->ctx, path, &space);
    if (status) {
        is_failed = true;
        (void)cube_fail(err, cube_errno_code(status), "space on %s: %s", path,
                        cube_errno_text(status));
    }
    out->disk.all = space.all;
    out->disk.free = space.free;
    out->disk.used = space.all - space.free;
    out->disk.free_inodes = space.free_inodes;
    out->cpu_use = cube_machine_count(m, &out->cpu);
    memcpy(out->machine, m->id, sizeof out->machine);
    return is_failed ? -1 : 0;
}

/* ---- JSON ----
 *
 *    {"MemStats":{"mem_total":24684096, ... 44 numbers},
 *     "DiskStats":{"all":270553174016,"used":...,"free":...,"freeInodes":...},
 *     "CpuStats":{"id":"cpu","user":87060, ... 10 numbers},
 *     "LoadStats":{"last1min":1.99, ... 3 more and 3 integers},
 *     "TaskCount":0
 *     ,"Machine":"3d12...","Engine":"...","Runtime":"docker",    when set
 *     "CpuUse":0.25,"Cpus":4}                                    when Cpus > 0
 */

static void cube_stats_print_group(const struct cube_machine_group *g,
                                   const void *base, struct cube_buf *out)
{
    cube_buf_printf(out, "\"%s\":{%s", g->key, g->lead);
    for (size_t i = 0; i < g->count; i++) {
        const struct cube_machine_field *f = &g->fields[i];
        const char *at = (const char *)base + f->at;
        int64_t number;
        double real;

        cube_buf_printf(out, "%s\"%s\":", i > 0 ? "," : "", f->key);
        if (f->is_float) {
            memcpy(&real, at, sizeof real);
            cube_json_put_f64(out, real);
        } else {
            memcpy(&number, at, sizeof number);
            cube_json_put_i64(out, number);
        }
    }
    cube_buf_puts(out, "},");
}

static void cube_stats_print_text(const char *key, const char *text,
                                  struct cube_buf *out)
{
    if (!text[0])
        return;
    cube_buf_printf(out, ",\"%s\":", key);
    cube_json_put_text(out, text);
}

CUBE_API void cube_stats_print(const struct cube_stats *s,
                               struct cube_buf *out)
{
    cube_buf_puts(out, "{");
    for (size_t i = 0; i < CUBE_COUNT(cube_machine_groups); i++)
        cube_stats_print_group(&cube_machine_groups[i],
                               (const char *)s + cube_machine_groups[i].at,
                               out);
    cube_buf_puts(out, "\"TaskCount\":");
    cube_json_put_i64(out, s->task_count);
    cube_stats_print_text("Machine", s->machine, out);
    cube_stats_print_text("Engine", s->engine, out);
    cube_stats_print_text("Runtime", s->runtime, out);
    if (s->cpus > 0) {
        cube_buf_puts(out, ",\"CpuUse\":");
        cube_json_put_f64(out, s->cpu_use);
        cube_buf_puts(out, ",\"Cpus\":");
        cube_json_put_i64(out, s->cpus);
    }
    cube_buf_puts(out, "}");
}

/* The fields of one group; a group that is missing or null is all 0. */
static int cube_stats_read_group(const struct cube_machine_group *g,
                                 struct json_value_s *group, void *base,
                                 struct cube_err *err)
{
    for (size_t i = 0; i < g->count; i++) {
        struct json_value_s *v = cube_json_get_nocase(group, g->fields[i].key);
        struct json_number_s *n = v ? json_value_as_number(v) : NULL;

        if (v && (!n || cube_machine_set(&g->fields[i], base, n->number,
                                         n->number_size)))
            return cube_fail(err, CUBE_EPROTO,
                             "stats: %s.%s is no number that it can have",
                             g->key, g->fields[i].key);
    }
    return 0;
}

/* A text that must fit; one that is too long could pass for another. */
static int cube_stats_read_text(struct json_value_s *root, const char *key,
                                char *out, size_t size, struct cube_err *err)
{
    struct json_value_s *v = cube_json_get_nocase(root, key);
    size_t len;
    const char *text = cube_json_str(v, &len);

    if (!v)
        return 0;
    if (!text || len >= size)
        return cube_fail(err, CUBE_EPROTO,
                         "stats: %s is no text of less than %zu bytes", key,
                         size);
    memcpy(out, text, len);
    return 0;
}

static int cube_stats_read_own(struct json_value_s *root,
                               struct cube_stats *out, struct cube_err *err)
{
    struct json_value_s *count = cube_json_get_nocase(root, "TaskCount");
    struct json_value_s *use = cube_json_get_nocase(root, "CpuUse");
    struct json_value_s *cpus = cube_json_get_nocase(root, "Cpus");

    if ((count && cube_json_i64(count, &out->task_count)) ||
        out->task_count < 0)
        return cube_fail(err, CUBE_EPROTO, "stats: TaskCount is no count");
    if ((cpus && cube_json_i64(cpus, &out->cpus)) || out->cpus < 0)
        return cube_fail(err, CUBE_EPROTO, "stats: Cpus is no count");
    if ((use && cube_json_f64(use, &out->cpu_use)) || out->cpu_use < 0 ||
        out->cpu_use > 1)
        return cube_fail(err, CUBE_EPROTO, "stats: CpuUse is not 0 to 1");
    if (cube_stats_read_text(root, "Machine", out->machine,
                             sizeof out->machine, err) ||
        cube_stats_read_text(root, "Engine", out->engine, sizeof out->engine,
                             err) ||
        cube_stats_read_text(root, "Runtime", out->runtime,
                             sizeof out->runtime, err))
        return -1;
    return 0;
}

/* From a tree that the caller has, such as that of an event. */
static int cube_stats_from_json(struct json_value_s *root,
                                struct cube_stats *out, struct cube_err *err)
{
    memset(out, 0, sizeof *out);
    if (!root || !json_value_as_object(root))
        return cube_fail(err, CUBE_EPROTO, "stats: this is no object");
    for (size_t i = 0; i < CUBE_COUNT(cube_machine_groups); i++) {
        const struct cube_machine_group *g = &cube_machine_groups[i];
        struct json_value_s *group = cube_json_get_nocase(root, g->key);

        if (cube_stats_read_group(g, group, (char *)out + g->at, err))
            return -1;
    }
    return cube_stats_read_own(root, out, err);
}

CUBE_API int cube_stats_parse(const char *json, size_t len,
                              struct cube_stats *out, struct cube_err *err)
{
    struct json_value_s *root = cube_json_parse(json, len, err);
    int status;

    if (!root)
        return -1;
    status = cube_stats_from_json(root, out, err);
    cube_json_free(root);
    return status;
}



/* ==== Chapter 9. Runtimes ==== uses: 1 2 3 5 6 7 ==== */
/*
 * What runs a task is somebody else's program: Docker's, Podman's, or the
 * kernel. This chapter is the distance between what a worker wants to say
 * ("run this, tell me when it ends") and what those speak.
 *
 * The problem is not the happy path, which is three requests (create, start,
 * inspect). It is that each of them can be lost, half done or refused, and
 * that two sorts of failure look alike and must not be treated alike:
 *
 *    the engine says no       no such image, port taken, no such command:
 *                             the task fails, in the engine's own words
 *    the engine is in trouble it restarts, hangs, answers 500 to everything:
 *                             nothing is known; wait, and ask again later
 *
 * A lost answer leaves a container behind that nobody knows of. The simplest
 * thing that works is not to remember anything, and to write on the container
 * itself whose it is:
 *
 *    cube.task      the task's ID               cube.attempt  which assignment
 *    cube.worker    the worker that started it  cube.restart  which restart
 *    cube.cluster   its store                   cube.spec     the task's JSON
 *
 * A start begins with a look for those labels, and so can be repeated until it
 * gets through; a worker that lost all its files adopts what runs from them.
 * What was refused: names as identity (people rename, and two tasks may have
 * one name), a file of container IDs (it is stale exactly when it is needed),
 * and the engine's own restart policies (uncounted, and after a reboot they
 * bring back what by then runs elsewhere).
 *
 * One start, from left to right; each word is a request, `look` and `make`
 * answer for what an earlier try left behind:
 *
 *            old ones           404: no such image
 *           +--- clear       +------- pull ---+
 *           v      |         |                v
 *    ---> look ----+------> make (create) ----+--> start --> inspect --> done
 *           |                ^  |   409: next name    | no
 *           |  ours          +--+                     v
 *           +--------------> start or inspect       check --> discard --> no
 *
 * An engine's 5xx is a no only if the engine is otherwise well: after one,
 * a harmless question (`probe`, `check`) is asked, and if that fails too the
 * 5xx was trouble; if its words are not known to be about the container, the
 * start is repeated twice before they are believed. The image is not asked
 * for first: a create that finds none says so, which also serves an image
 * that is deleted between two requests.
 *
 * Versions. Each request carries one in its path, and engines refuse what is
 * too old or too new for them. The first thing said is GET /_ping, which
 * needs none; from then on it is the smaller of the engine's and ours. A 400
 * that speaks of old or new asks again: engines are upgraded under us.
 *
 * Events are hints, not facts. An event names a task to look at; a stream
 * that was cut is opened again with a growing delay, and then anything may
 * have happened: "look at everything". So no event has to be trusted or
 * counted, and none that was lost matters.
 *
 * Podman speaks the same interface with an accent, known by a header of its
 * ping: a taken name is a 500, an event filter on a label's name finds
 * nothing (so events are filtered here), a failed start keeps its port until
 * the container is deleted (so it is), a pull's errors come inside a 200.
 *
 * A typical sequence:
 *
 *    rt->ops->watch(rt, on_change, worker);
 *    rt->ops->start(rt, &what, on_started, worker);    later: on_started
 *    ... on_change(worker, task) ...
 *    rt->ops->inspect(rt, id, on_inspected, worker);   later: on_inspected
 *    rt->ops->stop(rt, id, 10000, on_stopped, worker);
 *    rt->ops->remove(rt, id, on_removed, worker);
 *
 * Naive on purpose: `list` inspects one container after the other, a
 * millisecond each on Docker; with thousands on one engine that would want a
 * few at a time.
 */

#define CUBE_DOCKER_API 1044            /* 1.44, the newest that we speak */
#define CUBE_DOCKER_BODY_MAX (64 << 20) /* bytes of one answer */
#define CUBE_DOCKER_OBJECT_MAX (1 << 20) /* bytes of one streamed object */
#define CUBE_DOCKER_LAYERS_MAX 512      /* layers of an image that we count */
#define CUBE_DOCKER_CONFIG_MAX (1 << 20) /* bytes of ~/.docker/config.json */
#define CUBE_DOCKER_KILLED_MAX 4096 /* containers that were sent a signal */
#define CUBE_DOCKER_LABEL "cube.task"

/* How long each kind of call may take before the engine counts as hung. */
#define CUBE_DOCKER_PING_MS 10000
#define CUBE_DOCKER_ASK_MS 30000    /* inspect, list */
#define CUBE_DOCKER_DO_MS 120000    /* create, start, kill, remove */
#define CUBE_DOCKER_PULL_MS 300000  /* silence of a pull */
#define CUBE_DOCKER_PROGRESS_MS 300 /* between two words on a pull */
#define CUBE_DOCKER_CHECK_MS 15000  /* between two pings while we watch */
#define CUBE_DOCKER_AGAIN_MS 100    /* first delay of a reconnect, doubled */
#define CUBE_DOCKER_AGAIN_MAX_MS 5000

/* ---- The interface ---- */

/* A log stream's part that all runtimes share; theirs follows it. */
struct cube_logs {
    cube_data_fn *on_data;
    cube_done_fn *on_end;
    void *arg;
};

/* The kinds that say nothing about the container: not reached, no answer in
 * time, an answer that makes no sense, a machine that failed. */
CUBE_API bool cube_runtime_is_trouble(const struct cube_err *err)
{
    return err && (err->code == CUBE_ECONN || err->code == CUBE_ETIMEOUT ||
                   err->code == CUBE_EIO || err->code == CUBE_EPROTO);
}

CUBE_API void cube_runtime_free(struct cube_runtime *rt)
{
    if (rt)
        rt->ops->free(rt);
}

/* An empty container: all texts "", no ports known. Any runtime fills one of
 * these; cube_container_clear frees it. */
static void cube_container_init(struct cube_container *c)
{
    char **texts[] = {&c->id, &c->name, &c->task, &c->cluster, &c->worker,
                      &c->spec, &c->error};

    memset(c, 0, sizeof *c);
    for (size_t i = 0; i < CUBE_COUNT(texts); i++)
        *texts[i] = cube_text_dup("");
    c->ports.is_null = true;
}

/* Frees what a container owns. It is all zeros then, and needs another init
 * before it is used again. */
static void cube_container_clear(struct cube_container *c)
{
    char *texts[] = {c->id, c->name, c->task, c->cluster, c->worker, c->spec,
                     c->error};

    for (size_t i = 0; i < CUBE_COUNT(texts); i++)
        cube_free(texts[i]);
    cube_ports_free(&c->ports);
    memset(c, 0, sizeof *c);
}

/* ---- A stream of JSON objects ----
 *
 * Events and pulls are objects, one after another, with or without newlines
 * between them, in chunks that end where they like. Only braces outside of
 * strings count; whether the object between them makes sense is the parser's
 * question.
 *
 *    chunk 1            chunk 2
 *    {"status":"Pu      lling"}{"status":"}"}
 *                             ^1            ^2   each() at 1 and at 2
 */
struct cube_objects {
    struct cube_buf buf; /* the object that is not complete yet */
    int depth;
    bool is_string, is_escaped;
};

typedef void cube_object_fn(void *arg, struct json_value_s *object);

/* Forgets a piece that a cut stream has left. */
static void cube_objects_reset(struct cube_objects *o)
{
    cube_buf_clear(&o->buf);
    o->depth = 0;
    o->is_string = o->is_escaped = false;
}

/* Takes one byte; is an object complete with it? */
static bool cube_objects_step(struct cube_objects *o, char c)
{
    if (o->is_string) {
        if (!o->is_escaped && c == '"')
            o->is_string = false;
        o->is_escaped = !o->is_escaped && c == '\\';
        return false;
    }
    if (c == '"')
        o->is_string = true;
    else if (c == '{')
        o->depth++;
    else if (c == '}' && o->depth > 0)
        return --o->depth == 0;
    return false;
}

/* Feeds the next bytes; `each` gets every object that they complete. Objects
 * beyond the limit are cut out, and so are those that are no JSON. */
static void cube_objects_feed(struct cube_objects *o, const char *p,
                              size_t len, cube_object_fn *each, void *arg)
{
    size_t from = 0;

    for (size_t i = 0; i < len; i++) {
        struct json_value_s *object;

        if (!cube_objects_step(o, p[i]))
            continue;
        cube_buf_add(&o->buf, p + from, i + 1 - from);
        from = i + 1;
        object = cube_json_parse(o->buf.data, o->buf.len, NULL);
        cube_buf_clear(&o->buf);
        if (object)
            each(arg, object);
        cube_json_free(object);
    }
    if (o->buf.len + (len - from) <= CUBE_DOCKER_OBJECT_MAX)
        cube_buf_add(&o->buf, p + from, len - from);
}

/* ---- Containers, as an engine describes them ----
 *
 * What is read of GET /containers/{id}/json; all of it may be missing or null.
 *
 *    {"Id":"4e5f..","Name":"/web",
 *     "State":{"Status":"exited","Running":false,"OOMKilled":true,
 *              "ExitCode":137,"Error":"","StartedAt":"2025-...","FinishedAt":
 *              "2025-..."},
 *     "Config":{"Tty":false,"Labels":{"cube.task":"...","cube.spec":"..."}},
 *     "NetworkSettings":{"Ports":{"80/tcp":[{"HostIp":"0.0.0.0",
 *                                            "HostPort":"32768"}]}}}
 */

/* The text of a key, or "". */
static const char *cube_docker_text(struct json_value_s *object,
                                    const char *key)
{
    const char *s = cube_json_str(cube_json_get(object, key), NULL);

    return s ? s : "";
}

/* Labels are texts; one that is no number, or missing, counts as 0, which is
 * older than anything that we start. */
static int64_t cube_docker_number(const char *text)
{
    uint64_t n;

    return cube_text_u64(text, strlen(text), INT64_MAX, &n) ? 0 : (int64_t)n;
}

/* Is that key there, and true? */
static bool cube_docker_is(struct json_value_s *object, const char *key)
{
    bool is = false;

    return !cube_json_bool(cube_json_get(object, key), &is) && is;
}

/* What we wrote on it. Also read of containers of other workers, and of
 * people who like our labels: nothing here may be believed beyond its type. */
static void cube_docker_read_labels(struct cube_container *c,
                                    struct json_value_s *labels)
{
    cube_text_set(&c->task, cube_docker_text(labels, CUBE_DOCKER_LABEL));
    cube_text_set(&c->cluster, cube_docker_text(labels, "cube.cluster"));
    cube_text_set(&c->worker, cube_docker_text(labels, "cube.worker"));
    cube_text_set(&c->spec, cube_docker_text(labels, "cube.spec"));
    c->attempt = cube_docker_number(cube_docker_text(labels, "cube.attempt"));
    c->restart = cube_docker_number(cube_docker_text(labels, "cube.restart"));
}

/* An engine has more words than we need: "paused" runs, "dead" does not. */
static enum cube_box_state cube_docker_state(const char *status,
                                             bool is_running)
{
    static const char *const before[] = {"created", "configured",
                                         "initialized"};

    if (is_running || !strcmp(status, "running") || !strcmp(status, "paused"))
        return CUBE_BOX_RUNNING;
    for (size_t i = 0; i < CUBE_COUNT(before); i++) {
        if (!strcmp(status, before[i]))
            return CUBE_BOX_CREATED;
    }
    return CUBE_BOX_EXITED;
}

/* OOMKilled is also set when a child was killed and the main process went on
 * and ended well, so it becomes the reason only beside a code that is not 0.
 * `State.Error` is the reason of a start that failed. */
static void cube_docker_read_state(struct cube_container *c,
                                   struct json_value_s *state)
{
    int64_t code = 0;

    c->state = cube_docker_state(cube_docker_text(state, "Status"),
                                 cube_docker_is(state, "Running"));
    (void)cube_json_i64(cube_json_get(state, "ExitCode"), &code);
    c->exit_code = (int)code;
    c->has_exit = c->state == CUBE_BOX_EXITED;
    c->is_oom_killed = cube_docker_is(state, "OOMKilled");
    cube_text_set(&c->error, c->is_oom_killed && c->has_exit && code != 0
                                 ? "killed: out of memory"
                                 : cube_docker_text(state, "Error"));
    (void)cube_json_time(cube_json_get(state, "StartedAt"), &c->started);
    (void)cube_json_time(cube_json_get(state, "FinishedAt"), &c->finished);
    /* Engines note the two in two threads: a short one "ends" first. */
    if (c->has_exit && cube_time_is_set(&c->started) &&
        cube_time_to_ns(&c->finished) < cube_time_to_ns(&c->started))
        c->finished = c->started;
}

/* Host ports by container port. A port that is exposed and not published has
 * null, or an empty list. Podman leaves the address of "everywhere" empty. */
static void cube_docker_read_ports(struct cube_container *c,
                                   struct json_value_s *ports)
{
    for (struct json_object_element_s *m = cube_json_members(ports); m;
         m = m->next) {
        struct cube_port *port = cube_port_slot(&c->ports, m->name->string);

        if (!port)
            return;
        port->is_null = json_value_is_null(m->value);
        for (struct json_array_element_s *i = cube_json_items(m->value); i;
             i = i->next) {
            const char *ip = cube_docker_text(i->value, "HostIp");

            cube_port_add(port, *ip ? ip : "0.0.0.0",
                          cube_docker_text(i->value, "HostPort"));
        }
    }
}

/* Fills an initialised container from an inspection. */
static int cube_docker_read(struct cube_container *c, const char *json,
                            size_t len, struct cube_err *err)
{
    struct cube_err why;
    struct json_value_s *root = cube_json_parse(json, len, &why);
    struct json_value_s *config = cube_json_get(root, "Config");
    struct json_value_s *network = cube_json_get(root, "NetworkSettings");
    const char *name = cube_docker_text(root, "Name");

    if (!root)
        return cube_fail(err, CUBE_EPROTO, "inspect: %s", why.text);
    cube_text_set(&c->id, cube_docker_text(root, "Id"));
    cube_text_set(&c->name, *name == '/' ? name + 1 : name);
    cube_docker_read_labels(c, cube_json_get(config, "Labels"));
    cube_docker_read_state(c, cube_json_get(root, "State"));
    if (c->state == CUBE_BOX_RUNNING)
        cube_docker_read_ports(c, cube_json_get(network, "Ports"));
    cube_json_free(root);
    if (!*c->id)
        return cube_fail(err, CUBE_EPROTO, "inspect: no Id in the answer");
    return 0;
}

/* ---- What to create ---- */

/* The container's name for a task's: `web`, then `web-1a2b3c4d` when somebody
 * has that, then "", which lets the engine choose. Engines want two characters
 * at least of [a-zA-Z0-9][a-zA-Z0-9_.-]*. */
static void cube_docker_name(const struct cube_task *t, int try,
                             struct cube_buf *out)
{
    static const char plain[] = "abcdefghijklmnopqrstuvwxyz"
                                "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-";

    cube_buf_clear(out);
    cube_buf_puts(out, "");
    if (try > 1)
        return;
    for (const char *p = t->name; *p && out->len < 200; p++)
        cube_buf_addc(out, strchr(plain, *p) ? *p : '-');
    while (out->len > 0 && strchr("_.-", *out->data))
        cube_buf_drop(out, 1);
    if (out->len == 0)
        cube_buf_puts(out, "cube");
    if (try > 0 || out->len < 2 || !*t->name)
        cube_buf_printf(out, "-%.8s", t->id);
}

/* ,"Cmd":["a","b"]; nothing when there are none, so that the image's own
 * stands. */
static void cube_docker_put_texts(struct cube_buf *out, const char *key,
                                  const struct cube_texts *texts)
{
    if (texts->count == 0)
        return;
    cube_buf_printf(out, ",\"%s\":", key);
    for (size_t i = 0; i < texts->count; i++) {
        cube_buf_addc(out, i == 0 ? '[' : ',');
        cube_json_put_text(out, texts->list[i]);
    }
    cube_buf_addc(out, ']');
}

/* Where the task wants that container port on the host: a port, "" for any,
 * NULL when it does not say. "80" and "80/tcp" are the same port. */
static const char *cube_docker_host_port(const struct cube_task *t,
                                         const char *port)
{
    char full[64], other[64];

    cube_port_full(port, full);
    for (size_t i = 0; i < t->port_bindings.count; i++) {
        cube_port_full(t->port_bindings.list[i].port, other);
        if (!strcmp(full, other))
            return t->port_bindings.list[i].host_port;
    }
    return NULL;
}

/* Each port of the task once: those exposed, then those only published. */
static void cube_docker_put_exposed(struct cube_buf *out,
                                    const struct cube_task *t)
{
    const char *comma = "";
    char full[64];

    cube_buf_puts(out, ",\"ExposedPorts\":{");
    for (size_t i = 0; i < t->exposed_ports.count; i++) {
        if (cube_docker_host_port(t, t->exposed_ports.list[i]))
            continue;
        cube_port_full(t->exposed_ports.list[i], full);
        cube_buf_puts(out, comma);
        cube_json_put_text(out, full);
        cube_buf_puts(out, ":{}");
        comma = ",";
    }
    for (size_t i = 0; i < t->port_bindings.count; i++) {
        cube_port_full(t->port_bindings.list[i].port, full);
        cube_buf_puts(out, comma);
        cube_json_put_text(out, full);
        cube_buf_puts(out, ":{}");
        comma = ",";
    }
    cube_buf_addc(out, '}');
}

/* Does the engine have to choose host ports? For a port that is exposed and
 * not published, and, as the Go program has it, for those that the image
 * exposes when the task says nothing about ports. */
static bool cube_docker_is_publishing_all(const struct cube_task *t)
{
    for (size_t i = 0; i < t->exposed_ports.count; i++) {
        if (!cube_docker_host_port(t, t->exposed_ports.list[i]))
            return true;
    }
    return t->port_bindings.count == 0;
}

/* ,"HostConfig":{...}: limits, and what the host shares. No RestartPolicy in
 * it, ever: restarts are the worker's. Cores count in 10^-9 of one. */
static void cube_docker_put_host(struct cube_buf *out,
                                 const struct cube_task *t)
{
    char full[64];

    cube_buf_printf(out, ",\"HostConfig\":{\"PublishAllPorts\":%s",
                    cube_docker_is_publishing_all(t) ? "true" : "false");
    if (t->mem_bytes > 0)
        cube_buf_printf(out, ",\"Memory\":%lld", (long long)t->mem_bytes);
    if (t->cpu > 0)
        cube_buf_printf(out, ",\"NanoCpus\":%lld",
                        (long long)(t->cpu * 1e9 + 0.5));
    cube_buf_puts(out, ",\"PortBindings\":{");
    for (size_t i = 0; i < t->port_bindings.count; i++) {
        cube_port_full(t->port_bindings.list[i].port, full);
        if (i > 0)
            cube_buf_addc(out, ',');
        cube_json_put_text(out, full);
        cube_buf_puts(out, ":[{\"HostPort\":");
        cube_json_put_text(out, t->port_bindings.list[i].host_port);
        cube_buf_puts(out, "}]");
    }
    cube_buf_puts(out, "}}");
}

/* ,"Labels":{...}: who it is, for whoever finds it. All values are texts. */
static void cube_docker_put_labels(struct cube_buf *out,
                                   const struct cube_start *what)
{
    struct cube_buf spec = {0};

    cube_task_print(what->task, &spec);
    cube_buf_printf(out, ",\"Labels\":{\"" CUBE_DOCKER_LABEL "\":\"%s\"",
                    what->task->id);
    cube_buf_puts(out, ",\"cube.cluster\":");
    cube_json_put_text(out, what->cluster);
    cube_buf_puts(out, ",\"cube.worker\":");
    cube_json_put_text(out, what->worker);
    cube_buf_printf(out, ",\"cube.attempt\":\"%lld\",\"cube.restart\":\"%lld\"",
                    (long long)what->attempt,
                    (long long)what->task->restart_count);
    cube_buf_puts(out, ",\"cube.spec\":");
    cube_json_put_str(out, spec.data, spec.len);
    cube_buf_addc(out, '}');
    cube_buf_free(&spec);
}

/* The body of a create:
 *
 *    {"Image":"nginx","Cmd":[..],"Env":[..],"Labels":{..},
 *     "ExposedPorts":{"80/tcp":{}},"HostConfig":{"PublishAllPorts":false,
 *     "Memory":67108864,"NanoCpus":500000000,
 *     "PortBindings":{"80/tcp":[{"HostPort":"8080"}]}}}
 */
static void cube_docker_spec(const struct cube_start *what,
                             struct cube_buf *out)
{
    cube_buf_clear(out);
    cube_buf_puts(out, "{\"Image\":");
    cube_json_put_text(out, what->task->image);
    cube_docker_put_texts(out, "Cmd", &what->task->cmd);
    cube_docker_put_texts(out, "Env", &what->task->env);
    cube_docker_put_labels(out, what);
    cube_docker_put_exposed(out, what->task);
    cube_docker_put_host(out, what->task);
    cube_buf_addc(out, '}');
}

/* ---- Images and credentials ---- */

/* The query that pulls an image: "nginx" is its tag latest, a digest goes
 * where the tag goes. */
static void cube_docker_put_image(struct cube_buf *out, const char *image)
{
    const char *slash = strrchr(image, '/');
    const char *at = strchr(image, '@');
    const char *colon = strrchr(slash ? slash : image, ':');
    struct cube_buf name = {0};

    if (at)
        colon = memchr(slash ? slash : image, ':',
                       (size_t)(at - (slash ? slash : image)));
    cube_buf_add(&name, image,
                 colon ? (size_t)(colon - image)
                       : at ? (size_t)(at - image) : strlen(image));
    cube_buf_puts(out, "fromImage=");
    cube_http_encode(out, name.data);
    cube_buf_puts(out, "&tag=");
    cube_http_encode(out, at ? at + 1 : colon ? colon + 1 : "latest");
    cube_buf_free(&name);
}

/* The registry of an image: what stands before the first slash, if it looks
 * like a host, else Docker's own. */
static void cube_registry_of(const char *image, struct cube_buf *out)
{
    size_t len = strcspn(image, "/");
    bool is_host = image[len] == '/' &&
                   (memchr(image, '.', len) || memchr(image, ':', len) ||
                    cube_text_is(image, len, "localhost"));

    cube_buf_clear(out);
    if (is_host && !cube_text_is(image, len, "docker.io"))
        cube_buf_add(out, image, len);
    else
        cube_buf_puts(out, "index.docker.io");
}

/* Keys of `auths` are hosts or addresses: "https://index.docker.io/v1/". */
static bool cube_registry_is(const char *key, const char *registry)
{
    const char *host = strstr(key, "://");

    host = host ? host + 3 : key;
    return cube_text_is(host, strcspn(host, "/"), registry);
}

/*
 * The header X-Registry-Auth: base64url of {"username","password",
 * "serveraddress"}, made of an entry of `auths`, which has user and password
 * as base64 of "user:password", or in two fields, or as a token.
 */
static void cube_registry_header(struct json_value_s *entry,
                                 const char *registry, struct cube_buf *out)
{
    const char *auth = cube_docker_text(entry, "auth"), *colon;
    const char *token = cube_docker_text(entry, "identitytoken");
    struct cube_buf plain = {0}, json = {0};

    if (*auth && !cube_base64_decode(&plain, auth, strlen(auth)) &&
        plain.len > 0 && (colon = memchr(plain.data, ':', plain.len)))
        plain.data[colon - plain.data] = 0;
    else
        colon = NULL;
    cube_buf_puts(&json, "{\"username\":");
    cube_json_put_text(&json, colon ? plain.data
                                    : cube_docker_text(entry, "username"));
    cube_buf_puts(&json, ",\"password\":");
    cube_json_put_text(&json, colon ? colon + 1
                                    : cube_docker_text(entry, "password"));
    cube_buf_puts(&json, ",\"serveraddress\":");
    cube_json_put_text(&json, registry);
    if (*token) {
        cube_buf_puts(&json, ",\"identitytoken\":");
        cube_json_put_text(&json, token);
    }
    cube_buf_addc(&json, '}');
    cube_base64_encode(out, json.data, json.len, true);
    cube_buf_free(&plain);
    cube_buf_free(&json);
}

/* What the user of this process has told `docker login` about the registry of
 * `image`; leaves `out` empty when that is nothing. Read at each pull: people
 * log in while we run. */
static void cube_registry_auth(const struct cube_world *w, const char *image,
                               struct cube_buf *out)
{
    const char *dir = w->env(w->ctx, "DOCKER_CONFIG");
    const char *home = w->env(w->ctx, "HOME");
    struct cube_buf path = {0}, text = {0}, registry = {0};
    struct json_value_s *root = NULL;

    cube_buf_printf(&path, "%s%s/config.json", dir ? dir : home ? home : "",
                    dir ? "" : "/.docker");
    if (!cube_file_read(w, path.data, &text, CUBE_DOCKER_CONFIG_MAX, NULL))
        root = cube_json_parse(text.data, text.len, NULL);
    cube_registry_of(image, &registry);
    for (struct json_object_element_s *m =
             cube_json_members(cube_json_get(root, "auths"));
         m && out->len == 0; m = m->next) {
        if (cube_registry_is(m->name->string, registry.data))
            cube_registry_header(m->value, registry.data, out);
    }
    cube_json_free(root);
    cube_buf_free(&path);
    cube_buf_free(&text);
    cube_buf_free(&registry);
}

/* ---- A pull's progress ----
 *
 *    {"status":"Pulling from library/nginx","id":"latest"}
 *    {"status":"Pulling fs layer","progressDetail":{},"id":"a2abf6c4d29d"}
 *    {"status":"Downloading","progressDetail":{"current":262,"total":9100},
 *     "id":"a2abf6c4d29d"}
 *    {"status":"Pull complete","progressDetail":{},"id":"a2abf6c4d29d"}
 *    {"errorDetail":{"message":"..."},"error":"..."}
 */
struct cube_layer {
    char *id;
    int64_t bytes; /* downloaded */
    bool is_done;
};

struct cube_pull {
    struct cube_objects objects;
    struct cube_layer *layers;
    size_t count;
    char *error; /* NULL: none came */
    bool is_podman; /* which says no more of a layer once it has come */
};

/* Forgets a pull, so that another one can begin. */
static void cube_pull_clear(struct cube_pull *p)
{
    for (size_t i = 0; i < p->count; i++)
        cube_free(p->layers[i].id);
    cube_free(p->layers);
    cube_free(p->error);
    cube_buf_free(&p->objects.buf);
    memset(p, 0, sizeof *p);
}

/* Linear search: an image has a dozen layers. */
static struct cube_layer *cube_pull_layer(struct cube_pull *p, const char *id)
{
    for (size_t i = 0; i < p->count; i++) {
        if (!strcmp(p->layers[i].id, id))
            return &p->layers[i];
    }
    if (p->count == CUBE_DOCKER_LAYERS_MAX)
        return NULL;
    p->layers = cube_resize(p->layers, (p->count + 1) * sizeof *p->layers);
    p->layers[p->count] = (struct cube_layer){cube_text_dup(id), 0, false};
    return &p->layers[p->count++];
}

/* One line of a pull. Only the first error counts: what follows is usually its
 * consequence. Bytes are those downloaded; the numbers of an extraction are
 * another count of the same bytes. */
static void cube_pull_line(void *arg, struct json_value_s *line)
{
    struct cube_pull *p = arg;
    const char *status = cube_docker_text(line, "status");
    const char *id = cube_docker_text(line, "id");
    struct json_value_s *detail = cube_json_get(line, "progressDetail");
    struct cube_layer *layer;

    if (cube_json_get(line, "error")) {
        const char *error = cube_docker_text(line, "error");

        if (!p->error)
            p->error = cube_text_dup(*error ? error : "it failed");
        return;
    }
    if (!*id || cube_text_starts(status, "Pulling from"))
        return;
    layer = cube_pull_layer(p, id);
    if (!layer)
        return;
    if (!strcmp(status, "Downloading"))
        (void)cube_json_i64(cube_json_get(detail, "current"), &layer->bytes);
    if (!strcmp(status, "Pull complete") ||
        !strcmp(status, "Already exists") ||
        (p->is_podman && !strcmp(status, "Download complete")))
        layer->is_done = true;
}

/* "pulling nginx:latest: 3 of 5 layers, 12.3 MB": layers that are there, of
 * those heard of so far, and what has come over the wire. */
static void cube_pull_words(const struct cube_pull *p, const char *image,
                            struct cube_buf *out)
{
    size_t done = 0;
    double bytes = 0;

    for (size_t i = 0; i < p->count; i++) {
        done += p->layers[i].is_done;
        bytes += (double)p->layers[i].bytes;
    }
    cube_buf_clear(out);
    cube_buf_printf(out, "pulling %s", image);
    if (p->count > 0)
        cube_buf_printf(out, ": %zu of %zu layer%s", done, p->count,
                        p->count == 1 ? "" : "s");
    if (bytes >= 1e5)
        cube_buf_printf(out, ", %.1f MB", bytes / 1e6);
}

/* ---- Talking to an engine ----
 *
 * An op is something that was asked of the engine and takes one request after
 * another, never two at once. It waits while the version is not known, and is
 * called back with each answer until it ends itself:
 *
 *            ask                version known            answer
 *    (idle) -----> (waiting) ------------------> (sent) ---------> on_answer
 *       ^             ^                             |                 |
 *       |             +---- 400: other version -----+                 |
 *       +---------------------- ask the next one <--------------------+
 */
struct cube_docker;
struct cube_docker_op;

/* `trouble` set: no (complete) answer came, and nothing else counts. */
struct cube_docker_answer {
    int status;
    const char *body;
    size_t len;
    const struct cube_http_head *head;
    const struct cube_err *trouble;
};

typedef void cube_docker_answer_fn(struct cube_docker_op *op,
                                   const struct cube_docker_answer *a);
typedef void cube_docker_piece_fn(struct cube_docker_op *op, const char *p,
                                  size_t len);

/* The first part of each struct below; lives in docker->ops. */
struct cube_docker_op {
    struct cube_list link;
    struct cube_docker *d;
    void (*free)(struct cube_docker_op *op); /* of the whole struct */
    cube_docker_answer_fn *on_answer;
    cube_docker_piece_fn *on_piece; /* set: a 200's body comes in pieces */
    struct cube_http_call *call;    /* sent */
    bool is_waiting;                /* for the version */
    bool is_again;                  /* its version was refused once */
    unsigned round;                 /* of the waiting */
    const char *method;
    struct cube_buf target, body, auth;
    struct cube_buf said; /* the body of a streamed answer that is no 200 */
    int timeout_ms, idle_timeout_ms;
    int status;           /* of a streamed answer whose head has come */
};

/* What is asked of events; one a runtime. */
struct cube_docker_watch {
    struct cube_docker_op op, ping;
    struct cube_timer again, check;
    int64_t delay_ms;
    bool is_open; /* its head has come */
    bool is_late; /* a ping was answered while it had not */
    struct cube_objects objects;
    cube_change_fn *fn; /* NULL: nobody watches */
    void *arg;
};

/* A time in which the engine did not answer, in wall time; zeros: unused. */
struct cube_docker_away {
    int64_t from_ns, to_ns;
};

#define CUBE_DOCKER_AWAYS 4
/* A shutdown is noticed late, and the last is stamped when it is back. */
#define CUBE_DOCKER_AWAY_BEFORE_NS 3000000000
#define CUBE_DOCKER_AWAY_AFTER_NS 2000000000

struct cube_docker {
    struct cube_runtime rt;
    struct cube_http_client *client;
    char *where;
    struct cube_list ops;
    struct cube_docker_op hello; /* asks for version and name */
    int version;                 /* 1041 is 1.41; 0: not known */
    int least;                   /* the engine refused what is below */
    bool is_podman;
    bool is_down;                /* and it was said in the log */
    bool is_keeping;             /* its containers outlive its restarts */
    struct cube_map killed;      /* IDs that somebody sent a signal to */
    struct cube_docker_away away[CUBE_DOCKER_AWAYS]; /* the last is newest */
    unsigned round;
    struct cube_docker_watch watch;
};

/* Mutual recursion: a request may first need the version, and the version is
 * asked for by a request. */
static void cube_docker_greet(struct cube_docker *d);

/* The engine behind a runtime of this kind. */
static struct cube_docker *cube_docker_of(struct cube_runtime *rt)
{
    return CUBE_OF(rt, struct cube_docker, rt);
}

/* An op that has asked nothing yet. `free` is called when the runtime goes
 * before the op has ended. */
static void cube_docker_op_init(struct cube_docker *d,
                                struct cube_docker_op *op,
                                cube_docker_answer_fn *on_answer,
                                void (*free)(struct cube_docker_op *op))
{
    memset(op, 0, sizeof *op);
    op->d = d;
    op->on_answer = on_answer;
    op->free = free;
    cube_list_add(&d->ops, &op->link);
}

/* Gives up what it has asked; no answer comes. */
static void cube_docker_op_cancel(struct cube_docker_op *op)
{
    if (op->call)
        cube_http_call_cancel(op->call);
    op->call = NULL;
    op->is_waiting = false;
}

/* Frees what an op holds, but not the struct it is in. */
static void cube_docker_op_clear(struct cube_docker_op *op)
{
    cube_docker_op_cancel(op);
    cube_list_remove(&op->link);
    cube_buf_free(&op->target);
    cube_buf_free(&op->body);
    cube_buf_free(&op->auth);
    cube_buf_free(&op->said);
}

/* Notes when the engine went away, or (`is_back`) came back. */
static void cube_docker_note_away(struct cube_docker *d, bool is_back)
{
    const struct cube_world *w = cube_loop_world(d->rt.loop);
    int64_t now = w->wall_ns(w->ctx);
    struct cube_docker_away *last = &d->away[CUBE_DOCKER_AWAYS - 1];

    if (is_back) {
        last->to_ns = now + CUBE_DOCKER_AWAY_AFTER_NS;
        return;
    }
    memmove(d->away, d->away + 1, sizeof d->away - sizeof d->away[0]);
    last->from_ns = now - CUBE_DOCKER_AWAY_BEFORE_NS;
    last->to_ns = INT64_MAX;
}

/*
 * Was its end none of its own? A Docker Engine that stops ends all containers
 * (unless it is told to keep them), by signals that its events tell of, and
 * answers meanwhile as if nothing were; one that comes back after it was
 * killed ends what it finds, before it answers. So: somebody sent a signal, or
 * the end falls into a time when the engine was away. Podman leaves its
 * containers alone.
 */
static bool cube_docker_is_interrupted(const struct cube_docker *d,
                                       const struct cube_container *c)
{
    int64_t end = cube_time_to_ns(&c->finished);

    if (c->has_exit && cube_map_get(&d->killed, c->id))
        return true;
    if (d->is_podman || d->is_keeping || !c->has_exit)
        return false;
    for (size_t i = 0; i < CUBE_DOCKER_AWAYS; i++) {
        if (d->away[i].from_ns <= end && end <= d->away[i].to_ns)
            return true;
    }
    return false;
}

/* Fills an initialised container from an answer to an inspection. */
static int cube_docker_take(const struct cube_docker *d,
                            struct cube_container *c,
                            const struct cube_docker_answer *a,
                            struct cube_err *err)
{
    if (cube_docker_read(c, a->body, a->len, err))
        return -1;
    c->is_interrupted = cube_docker_is_interrupted(d, c);
    return 0;
}

/* Says in the log, once each time, that the engine is gone or back. */
static void cube_docker_notice(struct cube_docker *d,
                               const struct cube_docker_answer *a)
{
    d->rt.is_up = !a->trouble && a->status < 500;
    if (a->trouble && !d->is_down) {
        cube_log(d->rt.loop, CUBE_WARN, "the engine at %s does not answer: %s",
                 d->where, a->trouble->text);
        d->is_down = true;
        d->version = 0; /* what comes back may be another one */
        cube_docker_note_away(d, false);
    } else if (d->rt.is_up && d->is_down) {
        cube_log(d->rt.loop, CUBE_INFO, "the engine at %s answers again",
                 d->where);
        d->is_down = false;
        cube_docker_note_away(d, true);
    }
}

/* "1.41" is 1041; 0 for what is no version. */
static int cube_docker_version(const char *text)
{
    size_t major = strspn(text, "0123456789");
    size_t minor;
    uint64_t a, b;

    if (text[major] != '.')
        return 0;
    minor = strspn(text + major + 1, "0123456789");
    if (cube_text_u64(text, major, 1000, &a) ||
        cube_text_u64(text + major + 1, minor, 999, &b))
        return 0;
    return (int)(a * 1000 + b);
}

/* Does this 400 refuse our version? Then it may say, in JSON or in plain
 * text, which one the engine wants: "client version 1.12 is too old. Minimum
 * supported API version is 1.44, please upgrade". */
static bool cube_docker_is_other_version(struct cube_docker *d,
                                         const struct cube_docker_answer *a)
{
    static const char least[] = "Minimum supported API version is ";
    const char *found;

    if (a->trouble || a->status != 400)
        return false;
    if (!strstr(a->body, "is too old") && !strstr(a->body, "is too new"))
        return false;
    found = strstr(a->body, least);
    d->least = found ? cube_docker_version(found + sizeof least - 1) : 0;
    return true;
}

/* Of a streamed answer. That it begins is told as a piece of no bytes: an
 * event stream may say nothing for hours, and is there all the same. */
static void cube_docker_on_head(void *arg, const struct cube_http_head *head)
{
    struct cube_docker_op *op = arg;
    struct cube_docker_answer a = {cube_http_head_status(head), "", 0, head,
                                   NULL};

    cube_docker_notice(op->d, &a);
    op->status = a.status;
    if (op->status == 200)
        op->on_piece(op, "", 0);
}

/* A streamed 200 goes on to the op; of anything else the words are kept, up to
 * a limit, for the error. */
static void cube_docker_on_data(void *arg, const char *p, size_t len)
{
    struct cube_docker_op *op = arg;

    if (op->status == 200)
        op->on_piece(op, p, len);
    else if (op->said.len + len <= CUBE_DOCKER_OBJECT_MAX)
        cube_buf_add(&op->said, p, len);
}

/* Whatever keeps an answer from coming is trouble of the engine, a socket that
 * is not there and one that we may not open included. */
static void cube_docker_on_done(void *arg, const struct cube_http_answer *from)
{
    struct cube_docker_op *op = arg;
    struct cube_docker_answer a = {from->status, from->body, from->body_len,
                                   from->head, NULL};
    struct cube_err trouble;

    op->call = NULL;
    if (op->on_piece && op->said.len > 0) {
        a.body = op->said.data;
        a.len = op->said.len;
    }
    if (from->err) {
        trouble = *from->err;
        if (!cube_runtime_is_trouble(&trouble))
            trouble.code = CUBE_ECONN;
        a.trouble = &trouble;
    }
    if (!op->is_again && op != &op->d->hello &&
        cube_docker_is_other_version(op->d, &a)) {
        op->is_again = op->is_waiting = true;
        op->round = op->d->round;
        op->d->version = 0;
        cube_docker_greet(op->d);
        return;
    }
    cube_docker_notice(op->d, &a);
    op->on_answer(op, &a);
}

/* Sends what the op asks, with the version that is agreed on; the ping that
 * finds one out goes without. */
static void cube_docker_send(struct cube_docker_op *op)
{
    struct cube_docker *d = op->d;
    const char *headers[] = {"X-Registry-Auth", op->auth.data, NULL};
    struct cube_http_request r = {0};
    struct cube_buf target = {0};

    if (op == &d->hello && d->version == 0)
        cube_buf_puts(&target, op->target.data);
    else
        cube_buf_printf(&target, "/v%d.%d%s", d->version / 1000,
                        d->version % 1000, op->target.data);
    r.method = op->method;
    r.target = target.data;
    r.headers = op->auth.len > 0 ? headers : NULL;
    r.body = op->body.data;
    r.body_len = op->body.len;
    r.timeout_ms = op->timeout_ms;
    r.idle_timeout_ms = op->idle_timeout_ms;
    r.max_body = CUBE_DOCKER_BODY_MAX;
    r.on_head = op->on_piece ? cube_docker_on_head : NULL;
    r.on_data = op->on_piece ? cube_docker_on_data : NULL;
    r.on_done = cube_docker_on_done;
    r.arg = op;
    op->status = 0;
    cube_buf_clear(&op->said);
    op->call = cube_http_call(d->client, &r);
    cube_buf_free(&target);
}

/* Sends what op->method, target, body and auth say, once the version is
 * known. */
static void cube_docker_ask(struct cube_docker_op *op, int timeout_ms,
                            int idle_timeout_ms)
{
    op->timeout_ms = timeout_ms;
    op->idle_timeout_ms = idle_timeout_ms;
    op->is_again = false;
    if (op->d->version > 0) {
        cube_docker_send(op);
        return;
    }
    op->is_waiting = true;
    op->round = op->d->round;
    cube_docker_greet(op->d);
}

/* The plain case: a method, "/containers/%s/json" and the ID. */
static void cube_docker_ask_id(struct cube_docker_op *op, const char *method,
                               const char *before, const char *id,
                               const char *after, int timeout_ms)
{
    op->method = method;
    cube_buf_clear(&op->target);
    cube_buf_clear(&op->body);
    cube_buf_clear(&op->auth);
    cube_buf_puts(&op->target, before);
    cube_http_encode(&op->target, id);
    cube_buf_puts(&op->target, after);
    cube_docker_ask(op, timeout_ms, 0);
}

/* ---- The engine's words ---- */

/* What an answer that is no success says: `message` of its JSON, else the
 * text itself, else its number. */
static void cube_docker_words(const struct cube_docker_answer *a,
                              struct cube_buf *out)
{
    struct json_value_s *root = cube_json_parse(a->body, a->len, NULL);
    const char *message = cube_docker_text(root, "message");

    cube_buf_clear(out);
    cube_buf_puts(out, *message ? message : root ? "" : a->body);
    while (out->len > 0 && strchr("\r\n ", out->data[out->len - 1]))
        out->data[--out->len] = 0;
    if (out->len == 0)
        cube_buf_printf(out, "the engine answered with status %d", a->status);
    cube_json_free(root);
}

/* The error that an answer is: trouble as it came, a 5xx as trouble, else a
 * no of its kind. Always -1. */
static int cube_docker_fail(const struct cube_docker_answer *a,
                            const char *what, struct cube_err *err)
{
    struct cube_buf words = {0};
    enum cube_code code = CUBE_EINVAL;

    if (a->trouble) {
        *err = *a->trouble;
        return -1;
    }
    if (a->status >= 500)
        code = CUBE_EIO;
    else if (a->status == 404)
        code = CUBE_ENOENT;
    else if (a->status == 409)
        code = CUBE_EBUSY;
    else if (a->status == 401 || a->status == 403)
        code = CUBE_EACCES;
    else if (a->status < 400) /* not what this call answers with */
        code = CUBE_EPROTO;
    cube_docker_words(a, &words);
    (void)cube_fail(err, code, "%s: %s", what, words.data);
    cube_buf_free(&words);
    return -1;
}

/* ---- Greeting: version and name ---- */

/* Lets those go on that waited for the version; `a` set: there is none. Only
 * those that waited before this, since a callback may ask anew. */
static void cube_docker_wait_over(struct cube_docker *d,
                                  const struct cube_docker_answer *a)
{
    unsigned round = d->round++;
    struct cube_list *at = d->ops.next;

    while (at != &d->ops) {
        struct cube_docker_op *op = CUBE_OF(at, struct cube_docker_op, link);

        at = at->next;
        if (!op->is_waiting || op->round != round)
            continue;
        op->is_waiting = false;
        if (!a) {
            cube_docker_send(op);
            continue;
        }
        op->on_answer(op, a);
        at = d->ops.next; /* that may have freed any of them */
    }
}

/* GET /info tells who it is; nothing but words depends on it. Podman makes up
 * an ID for each answer, so there its storage on its host is who it is. */
static void cube_docker_on_info(struct cube_docker_op *op,
                                const struct cube_docker_answer *a)
{
    struct cube_docker *d = op->d;
    struct json_value_s *root = NULL;
    struct cube_buf text = {0};

    if (!a->trouble && a->status == 200)
        root = cube_json_parse(a->body, a->len, NULL);
    cube_buf_printf(&text, "%s %s at %s",
                    d->is_podman ? "Podman" : "Docker Engine",
                    cube_docker_text(root, "ServerVersion"), d->where);
    if (root)
        cube_text_set(&d->rt.words, text.data);
    d->is_keeping = cube_docker_is(root, "LiveRestoreEnabled");
    cube_buf_clear(&text);
    cube_buf_printf(&text, "podman:%s:%s", cube_docker_text(root, "Name"),
                    cube_docker_text(root, "DockerRootDir"));
    if (root)
        cube_text_set(&d->rt.engine_id, d->is_podman
                                            ? text.data
                                            : cube_docker_text(root, "ID"));
    cube_buf_free(&text);
    cube_json_free(root);
    cube_docker_wait_over(d, NULL);
}

/* The ping is answered: the version is the smaller of both, unless the engine
 * has said that it takes nothing that old. Then it is asked for its name. */
static void cube_docker_on_hello(struct cube_docker_op *op,
                                 const struct cube_docker_answer *a)
{
    struct cube_docker *d = op->d;
    struct cube_docker_answer no = *a;
    struct cube_err err;
    const char *text;

    if (a->trouble || a->status != 200) {
        (void)cube_docker_fail(a, "greet the engine", &err);
        if (!cube_runtime_is_trouble(&err))
            err.code = CUBE_EPROTO;
        no.trouble = &err;
        cube_docker_wait_over(d, &no);
        return;
    }
    text = cube_http_head_get(a->head, "Api-Version");
    d->version = text ? cube_docker_version(text) : 0;
    if (d->version == 0 || d->version > CUBE_DOCKER_API)
        d->version = CUBE_DOCKER_API;
    if (d->version < d->least)
        d->version = d->least;
    d->is_podman = cube_http_head_get(a->head, "Libpod-Api-Version") != NULL;
    d->rt.name = d->is_podman ? "podman" : "docker";
    op->on_answer = cube_docker_on_info;
    cube_buf_clear(&op->target);
    cube_buf_puts(&op->target, "/info");
    op->timeout_ms = CUBE_DOCKER_ASK_MS;
    cube_docker_send(op);
}

/* Asks for the version, unless that is under way. */
static void cube_docker_greet(struct cube_docker *d)
{
    struct cube_docker_op *op = &d->hello;

    if (op->call)
        return;
    op->on_answer = cube_docker_on_hello;
    op->method = "GET";
    cube_buf_clear(&op->target);
    cube_buf_puts(&op->target, "/_ping");
    op->timeout_ms = CUBE_DOCKER_PING_MS;
    cube_docker_send(op);
}

/* ---- Plain questions: stop, kill, remove, inspect ---- */

/* What answers count as success beside 2xx, and what the words begin with. */
struct cube_docker_verb {
    const char *name;
    int fine[3];
};

static const struct cube_docker_verb cube_docker_stop_verb = {
    "stop", {304, 404, 0}}; /* ended already; gone */
static const struct cube_docker_verb cube_docker_kill_verb = {
    "kill", {409, 404, 0}}; /* does not run; gone */
static const struct cube_docker_verb cube_docker_remove_verb = {
    "remove", {404, 0, 0}};
static const struct cube_docker_verb cube_docker_inspect_verb = {
    "inspect", {0, 0, 0}};

/* One of the callbacks is set. */
struct cube_docker_plain {
    struct cube_docker_op op;
    const struct cube_docker_verb *verb;
    char *id;
    cube_done_fn *on_done;
    cube_container_fn *on_container;
    cube_text_fn *on_text;
    void *arg;
};

static void cube_docker_plain_free(struct cube_docker_op *op)
{
    struct cube_docker_plain *p = CUBE_OF(op, struct cube_docker_plain, op);

    cube_docker_op_clear(op);
    cube_free(p->id);
    cube_free(p);
}

/* Reports, and is gone. */
static void cube_docker_plain_end(struct cube_docker_plain *p,
                                  const struct cube_docker_answer *a,
                                  const struct cube_err *err)
{
    struct cube_container c;
    struct cube_err why;

    cube_container_init(&c);
    if (!err && p->on_container && cube_docker_take(p->op.d, &c, a, &why))
        err = &why;
    if (p->on_done)
        p->on_done(p->arg, err);
    else if (p->on_text)
        p->on_text(p->arg, err ? NULL : a->body, err ? 0 : a->len, err);
    else
        p->on_container(p->arg, err ? NULL : &c, err);
    cube_container_clear(&c);
    cube_docker_plain_free(&p->op);
}

/* Is this what was wanted, or at least as good? */
static bool cube_docker_is_fine(const struct cube_docker_verb *verb,
                                const struct cube_docker_answer *a)
{
    if (a->trouble)
        return false;
    if (a->status / 100 == 2)
        return true;
    for (size_t i = 0; i < CUBE_COUNT(verb->fine) && verb->fine[i]; i++) {
        if (a->status == verb->fine[i])
            return true;
    }
    return false;
}

/* After a kill that the engine failed: if the container does not run, it is
 * as well. (Podman answers so, with a 500, for one that has ended.) */
static void cube_docker_on_kill_check(struct cube_docker_op *op,
                                      const struct cube_docker_answer *a)
{
    struct cube_docker_plain *p = CUBE_OF(op, struct cube_docker_plain, op);
    struct cube_container c;
    struct cube_err err;
    bool is_ended = !a->trouble && a->status == 404;

    cube_container_init(&c);
    if (!a->trouble && a->status == 200 &&
        !cube_docker_take(op->d, &c, a, NULL))
        is_ended = c.state != CUBE_BOX_RUNNING;
    cube_container_clear(&c);
    if (!is_ended && (a->trouble || a->status != 200))
        (void)cube_docker_fail(a, "kill", &err);
    else
        (void)cube_fail(&err, CUBE_EIO, "kill: it still runs");
    cube_docker_plain_end(p, a, is_ended ? NULL : &err);
}

/* An answer to any of them. A kill that failed is looked into; a removal that
 * somebody else is at (409) counts as trouble, so that it is asked again. */
static void cube_docker_on_plain(struct cube_docker_op *op,
                                 const struct cube_docker_answer *a)
{
    struct cube_docker_plain *p = CUBE_OF(op, struct cube_docker_plain, op);
    struct cube_err err;

    if (cube_docker_is_fine(p->verb, a)) {
        cube_docker_plain_end(p, a, NULL);
        return;
    }
    if (p->verb == &cube_docker_kill_verb && !a->trouble) {
        op->on_answer = cube_docker_on_kill_check;
        cube_docker_ask_id(op, "GET", "/containers/", p->id, "/json",
                           CUBE_DOCKER_ASK_MS);
        return;
    }
    (void)cube_docker_fail(a, p->verb->name, &err);
    if (p->verb == &cube_docker_remove_verb && err.code == CUBE_EBUSY)
        err.code = CUBE_EIO; /* somebody else is at it: ask again */
    cube_docker_plain_end(p, a, &err);
}

static struct cube_docker_plain *
cube_docker_plain_new(struct cube_runtime *rt,
                      const struct cube_docker_verb *verb, const char *id,
                      void *arg)
{
    struct cube_docker_plain *p = cube_alloc(sizeof *p);

    cube_docker_op_init(cube_docker_of(rt), &p->op, cube_docker_on_plain,
                        cube_docker_plain_free);
    p->verb = verb;
    p->id = cube_text_dup(id);
    p->arg = arg;
    return p;
}

/* The engine counts the grace in seconds, and answers when it is over. */
static void cube_docker_stop(struct cube_runtime *rt, const char *id,
                             int64_t grace_ms, cube_done_fn *fn, void *arg)
{
    struct cube_docker_plain *p =
        cube_docker_plain_new(rt, &cube_docker_stop_verb, id, arg);
    int64_t seconds = grace_ms <= 0         ? 0
                      : grace_ms > 86400000 ? 86400
                                            : (grace_ms + 999) / 1000;
    char after[40];

    p->on_done = fn;
    (void)snprintf(after, sizeof after, "/stop?t=%d", (int)seconds);
    cube_docker_ask_id(&p->op, "POST", "/containers/", id, after,
                       (int)seconds * 1000 + CUBE_DOCKER_DO_MS);
}

static void cube_docker_kill(struct cube_runtime *rt, const char *id,
                             cube_done_fn *fn, void *arg)
{
    struct cube_docker_plain *p =
        cube_docker_plain_new(rt, &cube_docker_kill_verb, id, arg);

    p->on_done = fn;
    cube_docker_ask_id(&p->op, "POST", "/containers/", id, "/kill",
                       CUBE_DOCKER_DO_MS);
}

static void cube_docker_remove(struct cube_runtime *rt, const char *id,
                               cube_done_fn *fn, void *arg)
{
    struct cube_docker_plain *p =
        cube_docker_plain_new(rt, &cube_docker_remove_verb, id, arg);

    p->on_done = fn;
    cube_docker_ask_id(&p->op, "DELETE", "/containers/", id, "?force=1&v=1",
                       CUBE_DOCKER_DO_MS);
}

static void cube_docker_inspect(struct cube_runtime *rt, const char *id,
                                cube_container_fn *fn, void *arg)
{
    struct cube_docker_plain *p =
        cube_docker_plain_new(rt, &cube_docker_inspect_verb, id, arg);

    p->on_container = fn;
    cube_docker_ask_id(&p->op, "GET", "/containers/", id, "/json",
                       CUBE_DOCKER_ASK_MS);
}

static void cube_docker_inspect_json(struct cube_runtime *rt, const char *id,
                                     cube_text_fn *fn, void *arg)
{
    struct cube_docker_plain *p =
        cube_docker_plain_new(rt, &cube_docker_inspect_verb, id, arg);

    p->on_text = fn;
    cube_docker_ask_id(&p->op, "GET", "/containers/", id, "/json",
                       CUBE_DOCKER_ASK_MS);
}

/* ---- Start ----
 *
 * The steps are drawn at the opening of the chapter. Each has a function that
 * asks and one that takes the answer; the answer's name is the step's.
 */
struct cube_docker_start {
    struct cube_docker_op op;
    struct cube_task *task;
    char *cluster, *worker;
    int64_t attempt;
    void (*progress)(void *arg, const char *words);
    cube_container_fn *fn;
    void *arg;

    char *id;               /* the container, once there is one; or NULL */
    bool is_found;          /* it was made by an earlier try */
    int name_try;           /* which name: cube_docker_name */
    int pulls, tries;       /* how often the image, the container was made */
    int doubts;             /* how often a 5xx was not believed */
    struct cube_timer again; /* set: waits before it looks again */
    struct cube_err why;    /* what it will have failed of */
    bool is_cancelled;
    bool can_cancel_now;    /* what is asked can be cut short */
    struct cube_defer defer;
    struct cube_pull pull;
    struct cube_buf words;  /* the last progress told */
    int64_t told_ms;
};

#define CUBE_DOCKER_PULLS_MAX 2 /* an image may go between pull and create */
#define CUBE_DOCKER_TRIES_MAX 8 /* containers removed under our hands */
#define CUBE_DOCKER_DOUBTS_MAX 2
#define CUBE_DOCKER_DOUBT_MS 2000

/* Mutual recursion: the steps are a graph with three ways back. */
static void cube_docker_look(struct cube_docker_start *s);
static void cube_docker_clear(struct cube_docker_start *s);
static void cube_docker_make(struct cube_docker_start *s);

static struct cube_docker_start *cube_docker_start_of(struct cube_docker_op *op)
{
    return CUBE_OF(op, struct cube_docker_start, op);
}

static void cube_docker_start_free(struct cube_docker_op *op)
{
    struct cube_docker_start *s = cube_docker_start_of(op);

    cube_defer_clear(op->d->rt.loop, &s->defer);
    cube_timer_clear(op->d->rt.loop, &s->again);
    cube_docker_op_clear(op);
    cube_pull_clear(&s->pull);
    cube_buf_free(&s->words);
    cube_task_free(s->task);
    cube_free(s->cluster);
    cube_free(s->worker);
    cube_free(s->id);
    cube_free(s);
}

/* Reports, and is gone. `c` NULL: for the reason in s->why. */
static void cube_docker_start_end(struct cube_docker_start *s,
                                  const struct cube_container *c)
{
    s->fn(s->arg, c, c ? NULL : &s->why);
    cube_docker_start_free(&s->op);
}

/* Reports what an answer says, as it stands. */
static void cube_docker_start_fail(struct cube_docker_start *s,
                                   const struct cube_docker_answer *a,
                                   const char *what)
{
    (void)cube_docker_fail(a, what, &s->why);
    cube_docker_start_end(s, NULL);
}

/* Asks GET, POST or DELETE of "/containers/{id}..." for one step. */
static void cube_docker_step(struct cube_docker_start *s, const char *method,
                             const char *after, int timeout_ms,
                             cube_docker_answer_fn *answer)
{
    s->op.on_answer = answer;
    s->op.on_piece = NULL;
    s->can_cancel_now = false;
    cube_docker_ask_id(&s->op, method, "/containers/", s->id, after,
                       timeout_ms);
}

/* The same of a target that stands in op->target; it changes nothing there,
 * or can be done in part, and so can be cut short. */
static void cube_docker_query(struct cube_docker_start *s, const char *method,
                              int timeout_ms, cube_docker_answer_fn *answer)
{
    s->op.on_answer = answer;
    s->op.on_piece = NULL;
    s->op.method = method;
    cube_buf_clear(&s->op.body);
    cube_buf_clear(&s->op.auth);
    s->can_cancel_now = true;
    cube_docker_ask(&s->op, timeout_ms, 0);
}

/* discard: whatever the engine says to it, the reason of the failure stands;
 * only trouble replaces it, since then a repeated start finds the rest. */
static void cube_docker_discarded(struct cube_docker_op *op,
                                  const struct cube_docker_answer *a)
{
    struct cube_docker_start *s = cube_docker_start_of(op);

    if (a->trouble || a->status >= 500)
        (void)cube_docker_fail(a, "remove", &s->why);
    cube_docker_start_end(s, NULL);
}

/* Removes what it has made, and then reports s->why. Podman holds the host
 * ports of a failed start until then. */
static void cube_docker_discard(struct cube_docker_start *s)
{
    cube_docker_step(s, "DELETE", "?force=1&v=1", CUBE_DOCKER_DO_MS,
                     cube_docker_discarded);
}

/* At the begin of each answer: was it cancelled meanwhile? Then it ends here,
 * and the caller returns at once. */
static bool cube_docker_is_over(struct cube_docker_start *s)
{
    if (!s->is_cancelled)
        return false;
    (void)cube_fail(&s->why, CUBE_ECANCELED, "start of %s: cancelled",
                    s->task->id);
    if (s->id)
        cube_docker_discard(s);
    else
        cube_docker_start_end(s, NULL);
    return true;
}

/* inspect: the end of a start that went well. */
static void cube_docker_inspected(struct cube_docker_op *op,
                                  const struct cube_docker_answer *a)
{
    struct cube_docker_start *s = cube_docker_start_of(op);
    struct cube_container c;

    if (cube_docker_is_over(s))
        return;
    if (a->trouble || a->status != 200) {
        cube_docker_start_fail(s, a, "inspect");
        return;
    }
    cube_container_init(&c);
    if (cube_docker_take(op->d, &c, a, &s->why))
        cube_docker_start_end(s, NULL);
    else
        cube_docker_start_end(s, &c);
    cube_container_clear(&c);
}

/*
 * Is a 5xx of an engine that is otherwise well to be doubted? One that shuts
 * down goes on answering for a second or two: inspections as ever, starts with
 * whatever its parts say while they go away ("transport is closing", "failed
 * to update the store state of sandbox"). So unless the words are known to be
 * about the container, it is asked again, a little later, before it is
 * believed.
 */
static bool cube_docker_is_doubtful(struct cube_docker_start *s)
{
    static const char *const known[] = {"already allocated", "already in use",
                                        "OCI runtime", "unexpected EOF"};

    if (s->why.code != CUBE_EIO || s->doubts == CUBE_DOCKER_DOUBTS_MAX)
        return false;
    for (size_t i = 0; i < CUBE_COUNT(known); i++) {
        if (strstr(s->why.text, known[i]))
            return false;
    }
    return true;
}

static void cube_docker_look_again(void *arg)
{
    cube_docker_look(arg);
}

/* Not believed: from the look on again, in a while. */
static void cube_docker_doubt(struct cube_docker_start *s)
{
    s->doubts++;
    s->pulls = 0;
    s->can_cancel_now = true;
    cube_free(s->id); /* is found again, if it is still there */
    s->id = NULL;
    cube_timer_set(s->op.d->rt.loop, &s->again, CUBE_DOCKER_DOUBT_MS,
                   cube_docker_look_again, s);
}

/* probe: after a 5xx to create or pull. The engine is well: it was a no. */
static void cube_docker_probed(struct cube_docker_op *op,
                               const struct cube_docker_answer *a)
{
    struct cube_docker_start *s = cube_docker_start_of(op);

    if (cube_docker_is_over(s))
        return;
    if (!a->trouble && a->status == 200) {
        if (cube_docker_is_doubtful(s)) {
            cube_docker_doubt(s);
            return;
        }
        s->why.code = CUBE_EINVAL;
    }
    cube_docker_start_end(s, NULL);
}

/* The step `what` failed with an answer: a no, unless it needs a probe. */
static void cube_docker_refused(struct cube_docker_start *s,
                                const struct cube_docker_answer *a,
                                const char *what)
{
    (void)cube_docker_fail(a, what, &s->why);
    if (a->trouble || a->status < 500) {
        cube_docker_start_end(s, NULL);
        return;
    }
    cube_buf_clear(&s->op.target);
    cube_buf_puts(&s->op.target, "/containers/json?limit=1");
    cube_docker_query(s, "GET", CUBE_DOCKER_ASK_MS, cube_docker_probed);
}

/* check: after a start that failed. Is it there, does it run after all, or
 * did the engine mean its no? One that an earlier try left behind may be half
 * started for good ("task ...: already exists", when the engine was killed
 * over it): that is no fault of the task's, and another one is made. */
static void cube_docker_checked(struct cube_docker_op *op,
                                const struct cube_docker_answer *a)
{
    struct cube_docker_start *s = cube_docker_start_of(op);
    struct cube_container c;

    if (cube_docker_is_over(s))
        return;
    if (!a->trouble && a->status == 404 && s->tries < CUBE_DOCKER_TRIES_MAX) {
        cube_free(s->id); /* removed by somebody: make another one */
        s->id = NULL;
        cube_docker_make(s);
        return;
    }
    if (a->trouble || a->status != 200) {
        cube_docker_start_fail(s, a, "inspect");
        return;
    }
    cube_container_init(&c);
    if (cube_docker_take(op->d, &c, a, &s->why)) {
        cube_docker_start_end(s, NULL);
    } else if (c.state == CUBE_BOX_RUNNING) {
        cube_docker_start_end(s, &c);
    } else if (s->is_found) {
        cube_docker_clear(s);
    } else if (cube_docker_is_doubtful(s)) {
        cube_docker_doubt(s);
    } else {
        if (s->why.code == CUBE_EIO)
            s->why.code = CUBE_EINVAL;
        cube_docker_discard(s);
    }
    cube_container_clear(&c);
}

/* start: 304 says that it runs already. */
static void cube_docker_started(struct cube_docker_op *op,
                                const struct cube_docker_answer *a)
{
    struct cube_docker_start *s = cube_docker_start_of(op);

    if (cube_docker_is_over(s))
        return;
    if (a->trouble) {
        cube_docker_start_fail(s, a, "start");
        return;
    }
    if (a->status / 100 == 2 || a->status == 304) {
        cube_docker_step(s, "GET", "/json", CUBE_DOCKER_ASK_MS,
                         cube_docker_inspected);
        return;
    }
    (void)cube_docker_fail(a, "start", &s->why);
    cube_docker_step(s, "GET", "/json", CUBE_DOCKER_ASK_MS,
                     cube_docker_checked);
}

/* The container is there and has not run: start it. */
static void cube_docker_run(struct cube_docker_start *s)
{
    cube_docker_step(s, "POST", "/start", CUBE_DOCKER_DO_MS,
                     cube_docker_started);
}

/* pull: its success is a 200 without an error among its lines. */
static void cube_docker_pulled(struct cube_docker_op *op,
                               const struct cube_docker_answer *a)
{
    struct cube_docker_start *s = cube_docker_start_of(op);
    struct cube_buf what = {0};

    if (cube_docker_is_over(s))
        return;
    cube_buf_printf(&what, "pull %s", s->task->image);
    if (a->trouble || a->status != 200) {
        cube_docker_refused(s, a, what.data);
    } else if (s->pull.error) {
        /* "context canceled" are the last words of an engine that stops. */
        (void)cube_fail(&s->why, strstr(s->pull.error, "context canceled")
                                     ? CUBE_EIO : CUBE_ENOENT,
                        "%s: %s", what.data, s->pull.error);
        cube_docker_start_end(s, NULL);
    } else {
        cube_docker_make(s);
    }
    cube_buf_free(&what);
}

/* Tells how far it is, when that has changed, and not too often. */
static void cube_docker_pull_tell(struct cube_docker_start *s)
{
    int64_t now = cube_loop_now_ms(s->op.d->rt.loop);
    struct cube_buf words = {0};

    if (!s->progress || (s->words.len > 0 &&
                         now - s->told_ms < CUBE_DOCKER_PROGRESS_MS))
        return;
    cube_pull_words(&s->pull, s->task->image, &words);
    if (s->words.len == 0 || strcmp(words.data, s->words.data)) {
        s->told_ms = now;
        cube_buf_clear(&s->words);
        cube_buf_add(&s->words, words.data, words.len);
        s->progress(s->arg, s->words.data);
    }
    cube_buf_free(&words);
}

/* Some bytes of the pull's lines; the first, empty piece tells that it has
 * begun. */
static void cube_docker_pull_piece(struct cube_docker_op *op, const char *p,
                                   size_t len)
{
    struct cube_docker_start *s = cube_docker_start_of(op);

    cube_objects_feed(&s->pull.objects, p, len, cube_pull_line, &s->pull);
    if (!s->is_cancelled)
        cube_docker_pull_tell(s);
}

/* Pulls the image. The engine does the work, and stops when we hang up. No
 * limit on the whole: an image may be large and the line thin; only silence
 * ends it. */
static void cube_docker_pull(struct cube_docker_start *s)
{
    struct cube_docker_op *op = &s->op;

    s->pulls++;
    cube_pull_clear(&s->pull);
    s->pull.is_podman = op->d->is_podman;
    op->on_answer = cube_docker_pulled;
    op->on_piece = cube_docker_pull_piece;
    op->method = "POST";
    cube_buf_clear(&op->target);
    cube_buf_puts(&op->target, "/images/create?");
    cube_docker_put_image(&op->target, s->task->image);
    cube_buf_clear(&op->body);
    cube_buf_clear(&op->auth);
    cube_registry_auth(cube_loop_world(op->d->rt.loop), s->task->image,
                       &op->auth);
    s->can_cancel_now = true;
    cube_docker_ask(op, 0, CUBE_DOCKER_PULL_MS);
}

/* A 409, or Podman's 500: "... the container name "web" is already in use". */
static bool cube_docker_is_name_taken(const struct cube_docker_answer *a)
{
    return a->status == 409 ||
           (a->status == 500 && strstr(a->body, "name") &&
            strstr(a->body, "already in use"));
}

/* make (create): a container, or no image, or no name. */
static void cube_docker_made(struct cube_docker_op *op,
                             const struct cube_docker_answer *a)
{
    struct cube_docker_start *s = cube_docker_start_of(op);
    struct json_value_s *root;

    if (!a->trouble && a->status / 100 == 2) {
        root = cube_json_parse(a->body, a->len, NULL);
        if (*cube_docker_text(root, "Id"))
            cube_text_set(&s->id, cube_docker_text(root, "Id"));
        cube_json_free(root);
    }
    if (cube_docker_is_over(s))
        return;
    if (s->id)
        cube_docker_run(s);
    else if (!a->trouble && a->status == 404 &&
             s->pulls < CUBE_DOCKER_PULLS_MAX)
        cube_docker_pull(s);
    else if (!a->trouble && s->name_try < 2 && cube_docker_is_name_taken(a)) {
        s->name_try++;
        cube_docker_make(s);
    } else
        cube_docker_refused(s, a, "create");
}

/* Creates the container, under the next name that was not refused. */
static void cube_docker_make(struct cube_docker_start *s)
{
    struct cube_start what = {s->task, s->cluster, s->worker, s->attempt,
                              NULL};
    struct cube_docker_op *op = &s->op;
    struct cube_buf name = {0};

    s->tries++;
    cube_docker_name(s->task, s->name_try, &name);
    op->on_answer = cube_docker_made;
    op->on_piece = NULL;
    op->method = "POST";
    cube_buf_clear(&op->target);
    cube_buf_puts(&op->target, "/containers/create");
    if (name.len > 0)
        cube_buf_printf(&op->target, "?name=%s", name.data);
    cube_buf_clear(&op->auth);
    cube_docker_spec(&what, &op->body);
    s->can_cancel_now = false;
    cube_docker_ask(op, CUBE_DOCKER_DO_MS, 0);
    cube_buf_free(&name);
}

/* clear: an older container of this task is gone; look again. */
static void cube_docker_cleared(struct cube_docker_op *op,
                                const struct cube_docker_answer *a)
{
    struct cube_docker_start *s = cube_docker_start_of(op);

    cube_free(s->id);
    s->id = NULL;
    if (cube_docker_is_over(s))
        return;
    if (a->trouble || (a->status / 100 != 2 && a->status != 404)) {
        (void)cube_docker_fail(a, "remove", &s->why);
        if (!a->trouble)
            s->why.code = CUBE_EIO; /* it may be at it: ask again later */
        cube_docker_start_end(s, NULL);
        return;
    }
    cube_docker_look(s);
}

/* Removes the container in s->id, to look again afterwards. */
static void cube_docker_clear(struct cube_docker_start *s)
{
    cube_docker_step(s, "DELETE", "?force=1&v=1", CUBE_DOCKER_DO_MS,
                     cube_docker_cleared);
}

/* What was found of this task: the container that this very start, or an
 * earlier try of it, has made (1), an older one of ours (-1), or nothing that
 * matters (0). */
static int cube_docker_judge(const struct cube_docker_start *s,
                             struct json_value_s *labels)
{
    const char *worker = cube_docker_text(labels, "cube.worker");
    const char *task = cube_docker_text(labels, CUBE_DOCKER_LABEL);
    int64_t attempt, restart;

    if (strcmp(worker, s->worker) || strcmp(task, s->task->id))
        return 0;
    attempt = cube_docker_number(cube_docker_text(labels, "cube.attempt"));
    restart = cube_docker_number(cube_docker_text(labels, "cube.restart"));
    if (attempt != s->attempt)
        return attempt < s->attempt ? -1 : 0;
    if (restart != s->task->restart_count)
        return restart < s->task->restart_count ? -1 : 0;
    return 1;
}

/* look: GET /containers/json gives for each `Id`, `Labels`, `State`. */
static void cube_docker_looked(struct cube_docker_op *op,
                               const struct cube_docker_answer *a)
{
    struct cube_docker_start *s = cube_docker_start_of(op);
    struct json_value_s *root = NULL;
    enum cube_box_state state = CUBE_BOX_EXITED;
    int found = 0;

    if (cube_docker_is_over(s))
        return;
    if (a->trouble || a->status != 200 || ++s->tries > CUBE_DOCKER_TRIES_MAX ||
        !(root = cube_json_parse(a->body, a->len, NULL))) {
        cube_docker_start_fail(s, a, "list");
        return;
    }
    for (struct json_array_element_s *i = cube_json_items(root);
         i && found >= 0; i = i->next) {
        int is = cube_docker_judge(s, cube_json_get(i->value, "Labels"));

        if (is == 0)
            continue;
        found = is;
        cube_text_set(&s->id, cube_docker_text(i->value, "Id"));
        state = cube_docker_state(cube_docker_text(i->value, "State"), false);
    }
    cube_json_free(root);
    s->is_found = found > 0;
    if (found < 0)
        cube_docker_clear(s);
    else if (found == 0)
        cube_docker_make(s);
    else if (state == CUBE_BOX_CREATED)
        cube_docker_run(s);
    else
        cube_docker_step(s, "GET", "/json", CUBE_DOCKER_ASK_MS,
                         cube_docker_inspected);
}

/* The query of a list: all containers that carry these labels. */
static void cube_docker_put_filter(struct cube_buf *target, const char *a,
                                   const char *b)
{
    struct cube_buf filter = {0};

    cube_buf_clear(target);
    cube_buf_puts(target, "/containers/json?all=1&filters=");
    cube_buf_puts(&filter, "{\"label\":[");
    cube_json_put_text(&filter, a);
    if (b) {
        cube_buf_addc(&filter, ',');
        cube_json_put_text(&filter, b);
    }
    cube_buf_puts(&filter, "]}");
    cube_http_encode(target, filter.data);
    cube_buf_free(&filter);
}

/* Asks for all containers of this task, whoever started them; the judge
 * sorts them out. A millisecond, which makes every start repeatable. */
static void cube_docker_look(struct cube_docker_start *s)
{
    struct cube_buf label = {0};

    cube_buf_printf(&label, CUBE_DOCKER_LABEL "=%s", s->task->id);
    cube_docker_put_filter(&s->op.target, label.data, NULL);
    cube_docker_query(s, "GET", CUBE_DOCKER_ASK_MS, cube_docker_looked);
    cube_buf_free(&label);
}

/* cube_runtime_ops.start: a copy of everything, and the first step. */
static void cube_docker_start(struct cube_runtime *rt,
                              const struct cube_start *what,
                              cube_container_fn *fn, void *arg)
{
    struct cube_docker_start *s = cube_alloc(sizeof *s);

    cube_docker_op_init(cube_docker_of(rt), &s->op, cube_docker_looked,
                        cube_docker_start_free);
    s->task = cube_task_copy(what->task);
    s->cluster = cube_text_dup(what->cluster ? what->cluster : "");
    s->worker = cube_text_dup(what->worker ? what->worker : "");
    s->attempt = what->attempt;
    s->progress = what->progress;
    s->fn = fn;
    s->arg = arg;
    cube_docker_look(s);
}

/* The cancelled start reports from here, not from within the call. */
static void cube_docker_start_give_up(void *arg)
{
    (void)cube_docker_is_over(arg);
}

/* A pull is cut short, which makes the engine drop it too; a create or start
 * on its way is waited for, since its container has to be removed. */
static void cube_docker_start_cancel(struct cube_runtime *rt, const char *task)
{
    struct cube_docker *d = cube_docker_of(rt);

    for (struct cube_list *at = d->ops.next; at != &d->ops; at = at->next) {
        struct cube_docker_op *op = CUBE_OF(at, struct cube_docker_op, link);
        struct cube_docker_start *s;

        if (op->free != cube_docker_start_free)
            continue;
        s = cube_docker_start_of(op);
        if (strcmp(s->task->id, task) || s->is_cancelled)
            continue;
        s->is_cancelled = true;
        if (!s->can_cancel_now && !op->is_waiting)
            continue;
        cube_docker_op_cancel(op);
        cube_timer_clear(rt->loop, &s->again);
        cube_defer_set(rt->loop, &s->defer, cube_docker_start_give_up, s);
    }
}

/* ---- List ---- */

/* First the IDs, then an inspection of each: the engine's list lacks exit
 * codes, times and reasons. */
struct cube_docker_list {
    struct cube_docker_op op;
    char **ids;
    size_t id_count, at; /* inspected so far */
    struct cube_container *found;
    size_t count;
    cube_containers_fn *fn;
    void *arg;
};

static void cube_docker_list_free(struct cube_docker_op *op)
{
    struct cube_docker_list *l = CUBE_OF(op, struct cube_docker_list, op);

    cube_docker_op_clear(op);
    for (size_t i = 0; i < l->id_count; i++)
        cube_free(l->ids[i]);
    for (size_t i = 0; i < l->count; i++)
        cube_container_clear(&l->found[i]);
    cube_free(l->ids);
    cube_free(l->found);
    cube_free(l);
}

/* Reports all, or why not: half a list would look like lost containers. */
static void cube_docker_list_end(struct cube_docker_list *l,
                                 const struct cube_err *err)
{
    l->fn(l->arg, err ? NULL : l->found, err ? 0 : l->count, err);
    cube_docker_list_free(&l->op);
}

/* Asks for the next one that was listed, or reports. */
static void cube_docker_list_next(struct cube_docker_list *l)
{
    if (l->at == l->id_count)
        cube_docker_list_end(l, NULL);
    else
        cube_docker_ask_id(&l->op, "GET", "/containers/", l->ids[l->at],
                           "/json", CUBE_DOCKER_ASK_MS);
}

/* One that was removed since it was listed is none. */
static void cube_docker_list_inspected(struct cube_docker_op *op,
                                       const struct cube_docker_answer *a)
{
    struct cube_docker_list *l = CUBE_OF(op, struct cube_docker_list, op);
    struct cube_err err;

    l->at++;
    if (!a->trouble && a->status == 404) {
        cube_docker_list_next(l);
        return;
    }
    cube_container_init(&l->found[l->count]);
    l->count++;
    if (a->trouble || a->status != 200)
        (void)cube_docker_fail(a, "inspect", &err);
    else if (!cube_docker_take(op->d, &l->found[l->count - 1], a, &err)) {
        cube_docker_list_next(l);
        return;
    }
    cube_docker_list_end(l, &err);
}

/* The list has come; `null` and entries without an ID are accepted. */
static void cube_docker_list_listed(struct cube_docker_op *op,
                                    const struct cube_docker_answer *a)
{
    struct cube_docker_list *l = CUBE_OF(op, struct cube_docker_list, op);
    struct json_value_s *root = NULL;
    struct cube_err err;
    size_t count = 0;

    if (a->trouble || a->status != 200 ||
        !(root = cube_json_parse(a->body, a->len, NULL))) {
        (void)cube_docker_fail(a, "list", &err);
        cube_docker_list_end(l, &err);
        return;
    }
    for (struct json_array_element_s *i = cube_json_items(root); i;
         i = i->next)
        count++;
    l->ids = cube_alloc(count * sizeof *l->ids);
    l->found = cube_alloc(count * sizeof *l->found);
    for (struct json_array_element_s *i = cube_json_items(root); i;
         i = i->next) {
        const char *id = cube_docker_text(i->value, "Id");

        if (*id)
            l->ids[l->id_count++] = cube_text_dup(id);
    }
    cube_json_free(root);
    op->on_answer = cube_docker_list_inspected;
    cube_docker_list_next(l);
}

static void cube_docker_list(struct cube_runtime *rt, const char *worker,
                             cube_containers_fn *fn, void *arg)
{
    struct cube_docker_list *l = cube_alloc(sizeof *l);
    struct cube_buf label = {0};

    cube_docker_op_init(cube_docker_of(rt), &l->op, cube_docker_list_listed,
                        cube_docker_list_free);
    l->fn = fn;
    l->arg = arg;
    l->op.method = "GET";
    if (worker)
        cube_buf_printf(&label, "cube.worker=%s", worker);
    cube_docker_put_filter(&l->op.target, CUBE_DOCKER_LABEL, label.data);
    cube_buf_free(&label);
    cube_docker_ask(&l->op, CUBE_DOCKER_ASK_MS, 0);
}

/* ---- Logs ----
 *
 * Without a terminal, output and errors share the stream in frames; a frame,
 * its head as well, may be cut anywhere by the chunks that carry it:
 *
 *      0      1   2   3      4          8
 *    +--------+---+---+---+-----------+------------- - - -
 *    | stream | 0 | 0 | 0 | length BE | payload
 *    +--------+---+---+---+-----------+------------- - - -
 *      1 out, 2 err                     01 000000 00000004 "out\n"
 *
 * With a terminal there are no frames. Ours have none, but who knows what the
 * container is that somebody wants the log of: so it is inspected first.
 */
struct cube_docker_logs {
    struct cube_logs logs;
    struct cube_docker_op op;
    struct cube_logs_options options;
    char *id;
    bool is_raw;
    unsigned char head[8];
    size_t have;   /* bytes of the head */
    uint32_t left; /* bytes of the payload still to come */
    bool is_busy;  /* inside on_data, which may cancel */
    bool is_cancelled;
};

static void cube_docker_logs_free(struct cube_docker_op *op)
{
    struct cube_docker_logs *l = CUBE_OF(op, struct cube_docker_logs, op);

    cube_docker_op_clear(op);
    cube_free(l->id);
    cube_free(l);
}

/* Takes some of `len` bytes, and says how many. */
static size_t cube_docker_logs_take(struct cube_docker_logs *l, const char *p,
                                    size_t len)
{
    size_t n = l->is_raw || l->left > len ? len : l->left;

    if (!l->is_raw && l->left == 0) {
        n = sizeof l->head - l->have < len ? sizeof l->head - l->have : len;
        memcpy(l->head + l->have, p, n);
        l->have += n;
        if (l->have == sizeof l->head) {
            l->left = (uint32_t)l->head[4] << 24 | (uint32_t)l->head[5] << 16 |
                      (uint32_t)l->head[6] << 8 | l->head[7];
            l->have = 0;
        }
        return n;
    }
    if (!l->is_raw)
        l->left -= (uint32_t)n;
    l->logs.on_data(l->logs.arg, p, n);
    return n;
}

/* Unwraps what came. The receiver may give the log up in the middle of it. */
static void cube_docker_logs_piece(struct cube_docker_op *op, const char *p,
                                   size_t len)
{
    struct cube_docker_logs *l = CUBE_OF(op, struct cube_docker_logs, op);

    l->is_busy = true;
    while (len > 0 && !l->is_cancelled) {
        size_t n = cube_docker_logs_take(l, p, len);

        p += n;
        len -= n;
    }
    l->is_busy = false;
    if (l->is_cancelled)
        cube_docker_logs_free(op);
}

static void cube_docker_logs_end(struct cube_docker_logs *l,
                                 const struct cube_err *err)
{
    l->is_busy = true;
    l->logs.on_end(l->logs.arg, err);
    cube_docker_logs_free(&l->op);
}

/* The stream has ended, well or not; or there was none. */
static void cube_docker_logs_over(struct cube_docker_op *op,
                                  const struct cube_docker_answer *a)
{
    struct cube_docker_logs *l = CUBE_OF(op, struct cube_docker_logs, op);
    struct cube_err err;

    if (!a->trouble && a->status == 200) {
        cube_docker_logs_end(l, NULL);
        return;
    }
    (void)cube_docker_fail(a, "logs", &err);
    cube_docker_logs_end(l, &err);
}

/* It is known now whether there are frames: ask for the log itself. It has no
 * time limit; a container may say nothing for days. */
static void cube_docker_logs_inspected(struct cube_docker_op *op,
                                       const struct cube_docker_answer *a)
{
    struct cube_docker_logs *l = CUBE_OF(op, struct cube_docker_logs, op);
    struct json_value_s *root;
    char after[80], tail[24] = "all";

    if (a->trouble || a->status != 200) {
        cube_docker_logs_over(op, a);
        return;
    }
    root = cube_json_parse(a->body, a->len, NULL);
    l->is_raw = cube_docker_is(cube_json_get(root, "Config"), "Tty");
    cube_json_free(root);
    if (l->options.tail >= 0)
        (void)snprintf(tail, sizeof tail, "%lld", (long long)l->options.tail);
    (void)snprintf(after, sizeof after, "/logs?stdout=1&stderr=1%s&tail=%s",
                   l->options.is_following ? "&follow=1" : "", tail);
    op->on_answer = cube_docker_logs_over;
    op->on_piece = cube_docker_logs_piece;
    cube_docker_ask_id(op, "GET", "/containers/", l->id, after, 0);
}

static struct cube_logs *
cube_docker_logs(struct cube_runtime *rt, const char *id,
                 const struct cube_logs_options *options,
                 cube_data_fn *on_data, cube_done_fn *on_end, void *arg)
{
    struct cube_docker_logs *l = cube_alloc(sizeof *l);

    cube_docker_op_init(cube_docker_of(rt), &l->op,
                        cube_docker_logs_inspected, cube_docker_logs_free);
    l->logs.on_data = on_data;
    l->logs.on_end = on_end;
    l->logs.arg = arg;
    l->options = *options;
    l->id = cube_text_dup(id);
    cube_docker_ask_id(&l->op, "GET", "/containers/", id, "/json",
                       CUBE_DOCKER_ASK_MS);
    return &l->logs;
}

static void cube_docker_logs_cancel(struct cube_runtime *rt,
                                    struct cube_logs *logs)
{
    struct cube_docker_logs *l = CUBE_OF(logs, struct cube_docker_logs, logs);

    (void)rt;
    l->is_cancelled = true;
    cube_docker_op_cancel(&l->op);
    if (!l->is_busy)
        cube_docker_logs_free(&l->op);
}

/* ---- Events ----
 *
 *    {"Type":"container","Action":"die","Actor":{"ID":"4e5f...","Attributes":
 *     {"cube.task":"efeadce0-...","exitCode":"3","image":"...",...}},...}
 *
 *             head came            cut, or no ping
 *    (away) ------------> (open) ------------------> (away)
 *       ^    says NULL       | says the task            |
 *       +---- delay: 100 ms, doubled, at most 5 s ------+
 */

/* Mutual recursion: what was cut is opened again, and may be cut again. */
static void cube_docker_watch_open(void *arg);

/* A signal is remembered until the container is gone, or starts again. */
static void cube_docker_note_signal(struct cube_docker *d, const char *action,
                                    const char *id)
{
    if (d->killed.count >= CUBE_DOCKER_KILLED_MAX) {
        cube_map_free(&d->killed);
        cube_map_init(&d->killed, 0);
    }
    if (!strcmp(action, "kill"))
        (void)cube_map_put(&d->killed, id, d);
    else if (!strcmp(action, "start") || !strcmp(action, "destroy") ||
             !strcmp(action, "remove"))
        (void)cube_map_remove(&d->killed, id);
}

/* One event. What is executed inside a container (health checks of the
 * engine's own) is none of ours, and frequent. */
static void cube_docker_event(void *arg, struct json_value_s *event)
{
    struct cube_docker *d = arg;
    struct json_value_s *actor = cube_json_get(event, "Actor");
    const char *task = cube_docker_text(cube_json_get(actor, "Attributes"),
                                        CUBE_DOCKER_LABEL);

    if (*task)
        cube_docker_note_signal(d, cube_docker_text(event, "Action"),
                                cube_docker_text(actor, "ID"));
    if (d->watch.fn && *task &&
        !cube_text_starts(cube_docker_text(event, "Action"), "exec_"))
        d->watch.fn(d->watch.arg, task);
}

/* Bytes of the stream. It begins with a look at everything, since nobody knows
 * what happened before it was open. */
static void cube_docker_watch_piece(struct cube_docker_op *op, const char *p,
                                    size_t len)
{
    struct cube_docker *d = op->d;

    if (len > 0) {
        cube_objects_feed(&d->watch.objects, p, len, cube_docker_event, d);
        return;
    }
    d->watch.delay_ms = 0; /* the head: it is open */
    d->watch.is_open = true;
    d->watch.is_late = false;
    if (d->watch.fn)
        d->watch.fn(d->watch.arg, NULL);
}

/* It is cut, or could not be opened: again, after a while. The reason does not
 * matter, and has been logged if it is news. */
static void cube_docker_watch_cut(struct cube_docker_op *op,
                                  const struct cube_docker_answer *a)
{
    struct cube_docker *d = op->d;
    int64_t delay = d->watch.delay_ms * 2;

    (void)a;
    if (delay < CUBE_DOCKER_AGAIN_MS)
        delay = CUBE_DOCKER_AGAIN_MS;
    if (delay > CUBE_DOCKER_AGAIN_MAX_MS)
        delay = CUBE_DOCKER_AGAIN_MAX_MS;
    d->watch.delay_ms = delay;
    d->watch.is_open = d->watch.is_late = false;
    cube_timer_set(d->rt.loop, &d->watch.again, delay, cube_docker_watch_open,
                   d);
}

/* Opens the stream. The engine is asked for containers only, not for our
 * label: Podman 4.3 finds nothing by a label without its value. */
static void cube_docker_watch_open(void *arg)
{
    struct cube_docker *d = arg;
    struct cube_docker_op *op = &d->watch.op;

    cube_objects_reset(&d->watch.objects);
    op->method = "GET";
    cube_buf_clear(&op->target);
    cube_buf_puts(&op->target, "/events?filters=");
    cube_http_encode(&op->target, "{\"type\":[\"container\"]}");
    cube_docker_ask(op, 0, 0);
}

/* Mutual recursion: a ping's answer sets the time of the next one. */
static void cube_docker_watch_check(void *arg);

/* A stream that says nothing can be a quiet engine or a dead one; the ping
 * tells. One that has not even begun at the second ping never will. */
static void cube_docker_watch_pinged(struct cube_docker_op *op,
                                     const struct cube_docker_answer *a)
{
    struct cube_docker *d = op->d;
    struct cube_docker_watch *w = &d->watch;

    if (w->op.call && (a->trouble || w->is_late)) {
        cube_docker_op_cancel(&w->op);
        cube_docker_watch_cut(&w->op, a);
    }
    w->is_late = w->op.call && !w->is_open;
    cube_timer_set(d->rt.loop, &d->watch.check, CUBE_DOCKER_CHECK_MS,
                   cube_docker_watch_check, d);
}

/* Time for a ping. */
static void cube_docker_watch_check(void *arg)
{
    struct cube_docker *d = arg;
    struct cube_docker_op *op = &d->watch.ping;

    op->method = "GET";
    cube_buf_clear(&op->target);
    cube_buf_puts(&op->target, "/_ping");
    cube_docker_ask(op, CUBE_DOCKER_PING_MS, 0);
}

static void cube_docker_watch(struct cube_runtime *rt, cube_change_fn *fn,
                              void *arg)
{
    struct cube_docker *d = cube_docker_of(rt);
    struct cube_docker_watch *w = &d->watch;

    cube_docker_op_cancel(&w->op);
    cube_docker_op_cancel(&w->ping);
    cube_timer_clear(rt->loop, &w->again);
    cube_timer_clear(rt->loop, &w->check);
    w->fn = fn;
    w->arg = arg;
    w->delay_ms = 0;
    w->is_open = w->is_late = false;
    if (!fn)
        return;
    cube_timer_set(rt->loop, &w->again, 0, cube_docker_watch_open, d);
    cube_timer_set(rt->loop, &w->check, CUBE_DOCKER_CHECK_MS,
                   cube_docker_watch_check, d);
}

/* ---- Docker and Podman: the whole ---- */

/* Gives up all that is under way, without a word, and closes the client. */
static void cube_docker_free(struct cube_runtime *rt)
{
    struct cube_docker *d = cube_docker_of(rt);

    cube_docker_watch(rt, NULL, NULL);
    while (!cube_list_is_empty(&d->ops)) {
        struct cube_docker_op *op =
            CUBE_OF(d->ops.next, struct cube_docker_op, link);

        op->free(op);
    }
    cube_buf_free(&d->watch.objects.buf);
    cube_map_free(&d->killed);
    cube_http_client_free(d->client);
    cube_free(d->where);
    cube_free(d->rt.words);
    cube_free(d->rt.engine_id);
    cube_free(d);
}

static const struct cube_runtime_ops cube_docker_ops = {
    .start = cube_docker_start,
    .start_cancel = cube_docker_start_cancel,
    .stop = cube_docker_stop,
    .kill = cube_docker_kill,
    .remove = cube_docker_remove,
    .list = cube_docker_list,
    .inspect = cube_docker_inspect,
    .inspect_json = cube_docker_inspect_json,
    .logs = cube_docker_logs,
    .logs_cancel = cube_docker_logs_cancel,
    .watch = cube_docker_watch,
    .free = cube_docker_free,
};

CUBE_API struct cube_runtime *cube_docker_new(struct cube_loop *l,
                                              const char *where,
                                              struct cube_err *err)
{
    struct cube_http_client *client =
        cube_http_client_new(l, where, NULL, err);
    struct cube_docker *d;

    if (!client)
        return NULL;
    d = cube_alloc(sizeof *d);
    d->client = client;
    d->where = cube_text_dup(where);
    d->rt.ops = &cube_docker_ops;
    d->rt.loop = l;
    d->rt.name = "docker";
    d->rt.words = cube_text_dup(where);
    d->rt.engine_id = cube_text_dup("");
    cube_map_init(&d->killed, 0); /* keys are the engine's, no stranger's */
    cube_list_init(&d->ops);
    cube_docker_op_init(d, &d->hello, cube_docker_on_hello,
                        cube_docker_op_clear);
    cube_docker_op_init(d, &d->watch.op, cube_docker_watch_cut,
                        cube_docker_op_clear);
    cube_docker_op_init(d, &d->watch.ping, cube_docker_watch_pinged,
                        cube_docker_op_clear);
    d->watch.op.on_piece = cube_docker_watch_piece;
    return &d->rt;
}


/* ---- Processes ---- */

/*
 * A machine without an engine can run tasks, too: `Cmd` is executed as a
 * process, under a supervisor of its own (chapter 1) that outlives us. Cheap
 * and instructive, and no isolation: a process sees the machine as we do.
 *
 * What an engine would know stands in directories:
 *
 *   DIR/run/<worker>/<task>-<attempt>-<restart>/
 *        spec       who it is and what it was told, as JSON, drawn below
 *        lock, log, log.N, exit, work/       as chapter 1 draws them
 *   DIR/run/<worker>/.gone-...               removed, its files not yet
 *
 * The name of the directory is the container's ID. The directory is the
 * truth: what we keep in memory is a copy of `spec`, which never changes, and
 * a descriptor of the supervisor to see it end. After a restart of the worker
 * all is read again:
 *
 *      lock         exit     is
 *      held         -        running
 *      free         whole    exited, as it says
 *      free         none     exited: the supervisor was killed. What is left
 *                            of the task is killed now (found by its
 *                            environment, which children inherit), and an
 *                            exit file written, with a line "lost 1"
 *      none, empty  none     created: whoever made it died before the start
 *
 *   spec: {"Name":"web","Cluster":"...","Worker":"...","Attempt":1,
 *          "Restart":0,"Created":"2025-...Z","Limits":"memory by ...",
 *          "Ports":{"80/tcp":[{"HostIp":"0.0.0.0","HostPort":"8080"}]},
 *          "Task":{...}}
 *
 * A process binds its ports by itself. It is told which: CUBE_PORT_80=8080
 * for container port 80/tcp, CUBE_PORT_53_UDP for 53/udp, PORT for the lowest
 * one. Between our look whether a port is free and the process's bind somebody
 * else can take it; ports that running processes were promised are not given
 * away, whether they have bound them or not. Only TCP ports are looked at.
 *
 * Limits: a cgroup for each task that has any, in version 2 (one tree) or 1
 * (a tree for memory, one for CPU), where we may make one:
 *
 *   /sys/fs/cgroup/cube/<id>                         version 2
 *   /sys/fs/cgroup/memory/cube/<id>, .../cpu/...     version 1
 *
 * Else memory is limited for each process by RLIMIT_DATA, and CPU not at all:
 * rlimits know a sum of CPU time, no rate. The words of the runtime and of
 * each process say which it is.
 *
 * Every call becomes a `struct cube_process_op` whose step runs from the
 * loop, later; a step that waits for a process to end runs again then.
 *
 *      stop:   SIGTERM --grace--> SIGUSR1 (kill) --15 s--> error
 *                 \__ended_________/__ended: success
 *
 * Naive on purpose: who follows a log looks every 100 ms whether it has
 * grown; only as long as somebody follows, so an idle task costs nothing.
 */

#define CUBE_PROCESS_LOG_BYTES (10 << 20) /* of one log file */
#define CUBE_PROCESS_LOG_FILES 3
#define CUBE_PROCESS_SPEC_MAX (4 << 20)
#define CUBE_PROCESS_FOLLOW_MS 100
#define CUBE_PROCESS_DEAD_MS 15000 /* a killed process is gone by then */
#define CUBE_PROCESS_CGROUPS "/sys/fs/cgroup"
#define CUBE_PROCESS_ID "CUBE_CONTAINER_ID=" /* in each environment */

/* Where cgroups can be made; NULL: they cannot. In version 2 both are one. */
struct cube_process_limits {
    int version;
    char *memory, *cpu;
};

struct cube_process {
    struct cube_runtime rt; /* first */
    const struct cube_world *w;
    char *root;             /* DIR/run */
    struct cube_map boxes;  /* ID to struct cube_process_box */
    struct cube_list ops, logs;
    struct cube_process_limits limits;
    cube_change_fn *change;
    void *change_arg;
    struct cube_defer change_defer;
    bool has_spawned;       /* in this turn; the next one may again */
    struct cube_defer spawn_defer;
};

/* What we know of one directory. */
struct cube_process_box {
    struct cube_process *p;
    struct cube_container c;
    char *dir, *command, *limits;
    struct cube_time created;
    int64_t pid;             /* of the command */
    int pid_fd;              /* of the supervisor; -1: not watched */
    struct cube_watch watch;
    bool is_seen;            /* by the present scan */
};

/* A call that has not been answered yet. */
struct cube_process_op {
    struct cube_list link;
    struct cube_process *p;
    char *id; /* of the container that it is about */
    void (*step)(struct cube_process_op *op);
    struct cube_defer defer;
    struct cube_timer timer;
    bool is_waiting; /* for `id` to end, or the timer */
    bool is_late;    /* the timer came first */
    int phase;
    struct cube_err err; /* code CUBE_OK: none */
    cube_container_fn *on_container; /* one of these, or none */
    cube_containers_fn *on_list;
    cube_text_fn *on_text;
    cube_done_fn *on_done;
    void *arg;
    struct cube_task *task; /* start: what to start */
    char *cluster, *worker; /* start; list: of whom, NULL for all */
    int64_t attempt, grace_ms;
    struct cube_buf path;   /* remove: where it is */
    size_t path_len;        /* remove: of the part that is removed last */
};

/* ---- Processes: files ---- */

static char *cube_process_path(const char *dir, const char *name)
{
    struct cube_buf path = {0};

    cube_buf_printf(&path, "%s/%s", dir, name);
    return cube_buf_take(&path);
}

/* CUBE_OK, CUBE_ENOENT, or what else went wrong. */
static enum cube_code cube_process_file(struct cube_process *p,
                                        const char *dir, const char *name,
                                        struct cube_buf *out)
{
    char *path = cube_process_path(dir, name);
    struct cube_err err = {CUBE_OK, ""};

    (void)cube_file_read(p->w, path, out, CUBE_PROCESS_SPEC_MAX, &err);
    cube_free(path);
    return err.code;
}

/* Writes into a file that is there, as those of a cgroup are. */
static int cube_process_put(struct cube_process *p, const char *dir,
                            const char *name, const char *text)
{
    char *path = cube_process_path(dir, name);
    int fd = p->w->open(p->w->ctx, path, CUBE_OPEN_WRITE);
    int r = fd < 0 ? fd : cube_file_write_all(p->w, fd, text, strlen(text), 0);

    if (fd >= 0)
        p->w->close(p->w->ctx, fd);
    cube_free(path);
    return r;
}

/* The number in the line "NAME NUMBER"; `none` if there is no such line. */
static int64_t cube_process_number(const struct cube_buf *text,
                                   const char *name, int64_t none)
{
    size_t len = strlen(name);

    for (const char *p = text->data; p && *p;) {
        size_t line = strcspn(p, "\n");
        uint64_t number;

        if (line > len && !strncmp(p, name, len) && p[len] == ' ' &&
            !cube_text_u64(p + len + 1, line - len - 1, INT64_MAX, &number))
            return (int64_t)number;
        p += line + (p[line] == '\n');
    }
    return none;
}

static bool cube_process_is_id(const char *id)
{
    return *id && *id != '.' && !strchr(id, '/') && strlen(id) < 200;
}

/* ---- Processes: limits ---- */

/* Version 2: our own part of the tree, its controllers passed down to it. */
static void cube_process_probe_2(struct cube_process *p, const char *root)
{
    struct cube_buf text = {0};
    char *own = cube_process_path(root, "cube");
    int r = p->w->mkdir(p->w->ctx, own);

    if (r == 0 || r == -EEXIST) {
        (void)cube_process_put(p, root, "cgroup.subtree_control",
                               "+memory +cpu");
        (void)cube_process_put(p, own, "cgroup.subtree_control",
                               "+memory +cpu");
        (void)cube_process_file(p, own, "cgroup.subtree_control", &text);
    }
    if (text.data && strstr(text.data, "memory"))
        p->limits.memory = cube_text_dup(own);
    if (text.data && strstr(text.data, "cpu"))
        p->limits.cpu = cube_text_dup(own);
    cube_buf_free(&text);
    cube_free(own);
}

static char *cube_process_probe_1(struct cube_process *p, const char *root,
                                  const char *controller)
{
    struct cube_buf path = {0};
    int r;

    cube_buf_printf(&path, "%s/%s/cube", root, controller);
    r = p->w->mkdir(p->w->ctx, path.data);
    if (r == 0 || r == -EEXIST)
        return cube_buf_take(&path);
    cube_buf_free(&path);
    return NULL;
}

/* Finds out what we may do, and says it. */
static void cube_process_probe(struct cube_process *p, const char *root)
{
    char *sign = cube_process_path(root, "cgroup.controllers");
    int fd = p->w->open(p->w->ctx, sign, 0);
    struct cube_buf words = {0};

    p->limits.version = fd >= 0 ? 2 : 1;
    if (fd >= 0) {
        p->w->close(p->w->ctx, fd);
        cube_process_probe_2(p, root);
    } else {
        p->limits.memory = cube_process_probe_1(p, root, "memory");
        p->limits.cpu = cube_process_probe_1(p, root, "cpu");
    }
    cube_free(sign);
    cube_buf_printf(&words, "processes in %s, ", p->root);
    if (p->limits.memory && p->limits.cpu)
        cube_buf_printf(&words, "memory and CPU limited by cgroup "
                                "(version %d)", p->limits.version);
    else
        cube_buf_printf(&words, "memory limited by %s, CPU %s",
                        p->limits.memory ? "cgroup" : "rlimit",
                        p->limits.cpu ? "by cgroup"
                                      : "not limited (no right to make a "
                                        "cgroup for it)");
    p->rt.words = cube_buf_take(&words);
}

/* A cgroup of its own for `id` in `base`; NULL if that fails. */
static char *cube_process_cgroup(struct cube_process *p, const char *base,
                                 const char *id)
{
    char *dir = base ? cube_process_path(base, id) : NULL;
    int r = dir ? p->w->mkdir(p->w->ctx, dir) : -ENOENT;

    if (r == 0 || r == -EEXIST)
        return dir;
    cube_free(dir);
    return NULL;
}

static bool cube_process_limit_memory(struct cube_process *p, const char *dir,
                                      int64_t bytes)
{
    char text[32];
    bool is_new = p->limits.version == 2;

    (void)snprintf(text, sizeof text, "%lld", (long long)bytes);
    if (cube_process_put(p, dir, is_new ? "memory.max"
                                        : "memory.limit_in_bytes", text) < 0)
        return false;
    /* No way around the limit by swapping; not all kernels can count that. */
    (void)cube_process_put(p, dir, is_new ? "memory.swap.max"
                                          : "memory.memsw.limit_in_bytes",
                           is_new ? "0" : text);
    return true;
}

static bool cube_process_limit_cpu(struct cube_process *p, const char *dir,
                                   double cores)
{
    char text[64];
    double quota = cores * 100000 < 1000 ? 1000 : cores * 100000;

    if (p->limits.version == 2) {
        (void)snprintf(text, sizeof text, "%.0f 100000", quota);
        return cube_process_put(p, dir, "cpu.max", text) >= 0;
    }
    (void)snprintf(text, sizeof text, "%.0f", quota);
    return cube_process_put(p, dir, "cpu.cfs_period_us", "100000") >= 0 &&
           cube_process_put(p, dir, "cpu.cfs_quota_us", text) >= 0;
}

/* Removes the cgroups of `id`; the supervisor does, unless it was killed. */
static void cube_process_unlimit(struct cube_process *p, const char *id)
{
    const char *bases[2] = {p->limits.memory, p->limits.cpu};

    for (size_t i = 0; i < 2; i++) {
        char *dir = bases[i] ? cube_process_path(bases[i], id) : NULL;

        if (dir)
            (void)p->w->rmdir(p->w->ctx, dir);
        cube_free(dir);
    }
}

/* Sets up the limits of a task; `words` say by what. The directories in
 * `spawn` are then the caller's to free. */
static void cube_process_limit(struct cube_process *p, const char *id,
                               const struct cube_task *t,
                               struct cube_spawn *spawn,
                               struct cube_buf *words)
{
    char *memory = NULL, *cpu = NULL;

    if (t->mem_bytes > 0) {
        memory = cube_process_cgroup(p, p->limits.memory, id);
        if (!memory || !cube_process_limit_memory(p, memory, t->mem_bytes)) {
            spawn->data_bytes = (uint64_t)t->mem_bytes;
            cube_buf_puts(words, "memory by rlimit");
        } else {
            cube_buf_printf(words, "memory by cgroup (version %d)",
                            p->limits.version);
        }
    }
    if (t->cpu > 0) {
        cpu = cube_process_cgroup(p, p->limits.cpu, id);
        cube_buf_puts(words, words->len > 0 ? ", " : "");
        if (!cpu || !cube_process_limit_cpu(p, cpu, t->cpu))
            cube_buf_puts(words, "CPU not limited");
        else
            cube_buf_printf(words, "CPU by cgroup (version %d)",
                            p->limits.version);
    }
    if (memory && cpu && strcmp(memory, cpu) == 0) {
        cube_free(cpu);
        cpu = NULL;
    }
    spawn->cgroups[0] = memory;
    spawn->cgroups[1] = cpu;
}

/* ---- Processes: what a directory says ---- */

static void cube_process_box_free(struct cube_process_box *box)
{
    struct cube_container *c = &box->c;
    const struct cube_world *w = box->p->w;

    cube_watch_clear(box->p->rt.loop, &box->watch);
    if (box->pid_fd >= 0)
        w->pid_close(w->ctx, box->pid_fd);
    cube_free(c->id);
    cube_free(c->name);
    cube_free(c->task);
    cube_free(c->cluster);
    cube_free(c->worker);
    cube_free(c->spec);
    cube_free(c->error);
    cube_ports_free(&c->ports);
    cube_free(box->dir);
    cube_free(box->command);
    cube_free(box->limits);
    cube_free(box);
}

/* A text of the object, "" if there is none. */
static char *cube_process_text(struct json_value_s *object, const char *key)
{
    size_t len = 0;
    const char *s = cube_json_str(cube_json_get(object, key), &len);

    return cube_text_ndup(s, s ? len : 0);
}

static int cube_process_read_spec(struct cube_process_box *box,
                                  struct json_value_s *root)
{
    struct cube_container *c = &box->c;
    struct json_value_s *ports = cube_json_get(root, "Ports");
    struct json_value_s *from = cube_json_get(root, "Task");
    struct cube_task *t = from ? cube_task_from_json(from, false, NULL) : NULL;
    struct cube_buf spec = {0};

    if (!t)
        return -1;
    cube_task_print(t, &spec);
    c->spec = cube_buf_take(&spec);
    c->task = cube_text_dup(t->id);
    box->command = cube_text_dup(t->cmd.count > 0 ? t->cmd.list[0] : "");
    cube_task_free(t);
    c->name = cube_process_text(root, "Name");
    c->cluster = cube_process_text(root, "Cluster");
    c->worker = cube_process_text(root, "Worker");
    c->error = cube_text_dup("");
    box->limits = cube_process_text(root, "Limits");
    if (cube_json_i64(cube_json_get(root, "Attempt"), &c->attempt) < 0 ||
        cube_json_i64(cube_json_get(root, "Restart"), &c->restart) < 0 ||
        cube_json_time(cube_json_get(root, "Created"), &box->created) < 0)
        return -1;
    return ports && ports->type != json_type_null
               ? cube_ports_read(&c->ports, ports, false, NULL)
               : 0;
}

/* The box of a directory; NULL if it is none of ours, or half made, and if it
 * cannot be read, which `trouble` then says. */
static struct cube_process_box *cube_process_load(struct cube_process *p,
                                                  const char *dir,
                                                  const char *id,
                                                  bool *trouble)
{
    struct cube_process_box *box = cube_alloc(sizeof *box);
    struct cube_buf text = {0};
    struct json_value_s *root = NULL;
    enum cube_code code;

    box->p = p;
    box->pid_fd = -1;
    box->dir = cube_text_dup(dir);
    box->c.id = cube_text_dup(id);
    cube_ports_init(&box->c.ports);
    code = cube_process_file(p, dir, "spec", &text);
    if (code == CUBE_OK)
        root = cube_json_parse(text.data, text.len, NULL);
    *trouble = code == CUBE_EIO || code == CUBE_EACCES;
    if (!root || cube_process_read_spec(box, root) < 0) {
        cube_process_box_free(box);
        box = NULL;
    }
    cube_json_free(root);
    cube_buf_free(&text);
    return box;
}

/* ---- Processes: what became of it ---- */

/* Why a command could not be executed, as Docker says it. */
static void cube_process_exec_words(const char *command, int64_t number,
                                    char *out, size_t size)
{
    if (number == ENOENT && !strchr(command, '/'))
        (void)snprintf(out, size, "exec: \"%.200s\": executable file not "
                       "found in $PATH", command);
    else
        (void)snprintf(out, size, "exec: \"%.200s\": %s", command,
                       cube_errno_text(-number));
}

static void cube_process_read_exit(struct cube_process_box *box,
                                   const struct cube_buf *text)
{
    struct cube_container *c = &box->c;
    int64_t number = cube_process_number(text, "error", 0);
    char words[300] = "";

    c->state = CUBE_BOX_EXITED;
    c->has_exit = cube_process_number(text, "lost", 0) == 0;
    c->exit_code = (int)cube_process_number(text, "code", 255);
    c->is_oom_killed = cube_process_number(text, "oom", 0) != 0;
    c->started = cube_time_from_ns(cube_process_number(text, "started", 0));
    c->finished = cube_time_from_ns(cube_process_number(text, "finished", 0));
    if (!c->has_exit)
        (void)snprintf(words, sizeof words,
                       "the process was lost: its supervisor was killed, or "
                       "the machine went down");
    else if (number != 0)
        cube_process_exec_words(box->command, number, words, sizeof words);
    cube_text_set(&c->error, words);
}

struct cube_process_sweep {
    struct cube_process *p;
    const char *id;
};

static bool cube_process_has_env(const struct cube_buf *env, const char *id)
{
    size_t name = sizeof CUBE_PROCESS_ID - 1;

    for (size_t at = 0; at < env->len; at += strlen(env->data + at) + 1) {
        if (cube_text_starts(env->data + at, CUBE_PROCESS_ID) &&
            strcmp(env->data + at + name, id) == 0)
            return true;
    }
    return false;
}

/* Opened before it is looked at, so that it cannot be another by then. */
static void cube_process_sweep_one(void *arg, const char *name)
{
    struct cube_process_sweep *s = arg;
    const struct cube_world *w = s->p->w;
    struct cube_buf env = {0};
    char dir[64];
    uint64_t pid;
    int fd;

    if (cube_text_u64(name, strlen(name), INT_MAX, &pid) < 0)
        return;
    fd = w->pid_open(w->ctx, (int)pid);
    if (fd < 0)
        return;
    (void)snprintf(dir, sizeof dir, "/proc/%.20s", name);
    if (cube_process_file(s->p, dir, "environ", &env) == CUBE_OK &&
        cube_process_has_env(&env, s->id))
        (void)w->pid_signal(w->ctx, fd, SIGKILL);
    w->pid_close(w->ctx, fd);
    cube_buf_free(&env);
}

/* A supervisor was killed: what it left is killed, and its exit file written
 * in its place. */
static void cube_process_bury(struct cube_process_box *box,
                              const struct cube_buf *lock)
{
    struct cube_process *p = box->p;
    struct cube_process_sweep sweep = {p, box->c.id};
    struct cube_buf text = {0};
    char *path = cube_process_path(box->dir, "exit");
    struct cube_err err = {CUBE_OK, ""};

    (void)p->w->list(p->w->ctx, "/proc", cube_process_sweep_one, &sweep);
    cube_buf_printf(&text, "code 137\nsignal 9\noom 0\nerror 0\n"
                    "started %lld\nfinished %lld\nlost 1\n",
                    (long long)cube_process_number(lock, "started", 0),
                    (long long)p->w->wall_ns(p->w->ctx));
    if (cube_file_replace(p->w, path, text.data, text.len, &err) < 0)
        cube_log(p->rt.loop, CUBE_WARN, "%s", err.text);
    cube_process_read_exit(box, &text);
    cube_buf_free(&text);
    cube_free(path);
}

/* mutual recursion: it looks again, and looking watches */
static void cube_process_ended(void *arg, unsigned events);

/* Watches the supervisor. `owner` was its PID a moment ago: if the lock is
 * still held by that PID once it is open, then it is the one. */
static bool cube_process_watch(struct cube_process_box *box, int owner)
{
    const struct cube_world *w = box->p->w;
    char *lock = cube_process_path(box->dir, "lock");
    int fd = w->pid_open(w->ctx, owner);
    bool is_it = fd >= 0 && w->lock_owner(w->ctx, lock) == owner;

    cube_free(lock);
    if (is_it && cube_watch_set(box->p->rt.loop, &box->watch, fd, CUBE_READ,
                                cube_process_ended, box) == 0) {
        box->pid_fd = fd;
        return true;
    }
    if (fd >= 0)
        w->pid_close(w->ctx, fd);
    return false;
}

/* The lock is free: is it over, lost, or has it never begun? False: a file
 * cannot be read now, so that is not known. */
static bool cube_process_read_end(struct cube_process_box *box)
{
    struct cube_buf exit = {0}, lock = {0};
    enum cube_code code = cube_process_file(box->p, box->dir, "exit", &exit);
    bool is_known = code == CUBE_OK || code == CUBE_ENOENT;

    if (code == CUBE_OK)
        cube_process_read_exit(box, &exit);
    else if (code == CUBE_ENOENT)
        code = cube_process_file(box->p, box->dir, "lock", &lock);
    if (box->c.state != CUBE_BOX_EXITED) {
        is_known = is_known && (code == CUBE_OK || code == CUBE_ENOENT);
        if (is_known && lock.len > 0)
            cube_process_bury(box, &lock);
        else if (is_known)
            box->c.state = CUBE_BOX_CREATED;
    }
    cube_buf_free(&exit);
    cube_buf_free(&lock);
    return is_known;
}

static void cube_process_read_lock(struct cube_process_box *box)
{
    struct cube_buf lock = {0};

    box->c.state = CUBE_BOX_RUNNING;
    if (box->pid == 0 &&
        cube_process_file(box->p, box->dir, "lock", &lock) == CUBE_OK) {
        box->pid = cube_process_number(&lock, "pid", 0);
        box->c.started =
            cube_time_from_ns(cube_process_number(&lock, "started", 0));
    }
    cube_buf_free(&lock);
}

/* Brings the box up to date. What has ended stays ended. A supervisor that
 * ends between two looks is seen at the next. */
static void cube_process_refresh(struct cube_process_box *box)
{
    const struct cube_world *w = box->p->w;
    char *lock = cube_process_path(box->dir, "lock");
    int owner = 0;

    if (box->c.state == CUBE_BOX_EXITED) {
        cube_free(lock);
        return;
    }
    for (int i = 0; i < 3; i++) {
        owner = w->lock_owner(w->ctx, lock);
        if (owner <= 0 || box->pid_fd >= 0 || cube_process_watch(box, owner))
            break;
    }
    if ((owner != 0 && owner != -ENOENT) || !cube_process_read_end(box))
        cube_process_read_lock(box); /* in doubt it runs */
    cube_free(lock);
}

/* ---- Processes: calls that are answered later ---- */

static void cube_process_op_free(struct cube_process_op *op)
{
    cube_list_remove(&op->link);
    cube_defer_clear(op->p->rt.loop, &op->defer);
    cube_timer_clear(op->p->rt.loop, &op->timer);
    cube_task_free(op->task);
    cube_free(op->cluster);
    cube_free(op->worker);
    cube_free(op->id);
    cube_buf_free(&op->path);
    cube_free(op);
}

static void cube_process_op_run(void *arg)
{
    struct cube_process_op *op = arg;

    op->step(op);
}

static void cube_process_op_late(void *arg)
{
    struct cube_process_op *op = arg;

    op->is_waiting = false;
    op->is_late = true;
    op->step(op);
}

static struct cube_process_op *
cube_process_op_new(struct cube_process *p, const char *id,
                    void (*step)(struct cube_process_op *op), void *arg)
{
    struct cube_process_op *op = cube_alloc(sizeof *op);

    op->p = p;
    op->id = cube_text_dup(id);
    op->step = step;
    op->arg = arg;
    cube_list_add(&p->ops, &op->link);
    cube_defer_set(p->rt.loop, &op->defer, cube_process_op_run, op);
    return op;
}

/* The step runs again when the container has ended, or after that time. */
static void cube_process_op_wait(struct cube_process_op *op, int64_t ms)
{
    op->is_waiting = true;
    cube_timer_set(op->p->rt.loop, &op->timer, ms, cube_process_op_late, op);
}

/* Answers and ends the call. The callback may free the runtime. */
static void cube_process_op_end(struct cube_process_op *op,
                                const struct cube_container *c)
{
    const struct cube_err *err = op->err.code == CUBE_OK ? NULL : &op->err;
    struct cube_process_op last = *op;

    op->task = NULL;
    op->cluster = op->worker = op->id = NULL;
    memset(&op->path, 0, sizeof op->path);
    cube_process_op_free(op);
    if (err)
        err = &last.err;
    if (last.on_container)
        last.on_container(last.arg, err ? NULL : c, err);
    else if (last.on_list)
        last.on_list(last.arg, NULL, 0, err);
    else if (last.on_text)
        last.on_text(last.arg, NULL, 0, err);
    else if (last.on_done)
        last.on_done(last.arg, err);
    else if (err) /* a removal that nobody waits for */
        cube_log(last.p->rt.loop, CUBE_WARN, "%s", err->text);
    cube_task_free(last.task);
    cube_free(last.cluster);
    cube_free(last.worker);
    cube_free(last.id);
    cube_buf_free(&last.path);
}

/* Those who wait for the end of `id` go on. */
static void cube_process_resume(struct cube_process *p, const char *id)
{
    for (struct cube_list *at = p->ops.next; at != &p->ops; at = at->next) {
        struct cube_process_op *op = CUBE_OF(at, struct cube_process_op, link);

        if (!op->is_waiting || strcmp(op->id, id) != 0)
            continue;
        op->is_waiting = false;
        cube_timer_clear(p->rt.loop, &op->timer);
        cube_defer_set(p->rt.loop, &op->defer, cube_process_op_run, op);
    }
}

/* ---- Processes: all directories ---- */

struct cube_process_scan {
    struct cube_process *p;
    const char *dir; /* of one worker */
    int error;
};

static void cube_process_scan_one(void *arg, const char *id)
{
    struct cube_process_scan *s = arg;
    struct cube_process_box *box = cube_map_get(&s->p->boxes, id);
    bool is_trouble = false;
    char *dir;

    if (!cube_process_is_id(id))
        return;
    if (!box) {
        dir = cube_process_path(s->dir, id);
        box = cube_process_load(s->p, dir, id, &is_trouble);
        cube_free(dir);
        if (is_trouble)
            s->error = -EIO;
        if (!box)
            return;
        cube_map_put(&s->p->boxes, id, box);
    }
    box->is_seen = true;
    cube_process_refresh(box);
}

static void cube_process_scan_worker(void *arg, const char *name)
{
    struct cube_process_scan *s = arg;
    char *dir = cube_process_path(s->p->root, name);
    int r;

    s->dir = dir;
    r = s->p->w->list(s->p->w->ctx, dir, cube_process_scan_one, s);
    if (r < 0 && r != -ENOENT && r != -ENOTDIR)
        s->error = r;
    cube_free(dir);
}

static void cube_process_drop(struct cube_process_box *box)
{
    cube_map_remove(&box->p->boxes, box->c.id);
    cube_process_resume(box->p, box->c.id);
    cube_process_box_free(box);
}

/* Reads what is there. A directory that somebody has removed is a container
 * that somebody has removed: if it still runs, it is killed. */
static int cube_process_scan(struct cube_process *p, struct cube_err *err)
{
    struct cube_process_scan scan = {p, NULL, 0};
    size_t at = 0;
    void *each;
    int r;

    while (cube_map_next(&p->boxes, &at, NULL, &each))
        ((struct cube_process_box *)each)->is_seen = false;
    r = p->w->list(p->w->ctx, p->root, cube_process_scan_worker, &scan);
    if (r >= 0)
        r = scan.error;
    if (r < 0)
        return cube_fail(err, CUBE_EIO, "list %s: %s", p->root,
                         cube_errno_text(r));
    for (at = 0; cube_map_next(&p->boxes, &at, NULL, &each);) {
        struct cube_process_box *box = each;

        if (box->is_seen)
            continue;
        if (box->pid_fd >= 0)
            (void)p->w->pid_signal(p->w->ctx, box->pid_fd, SIGUSR1);
        cube_process_drop(box);
    }
    return 0;
}

/* The box of `id` as it now is. NULL: there is none, or, if `err` has a code
 * then, it cannot be known. */
static struct cube_process_box *cube_process_find(struct cube_process *p,
                                                  const char *id,
                                                  struct cube_err *err)
{
    struct cube_process_box *box = cube_map_get(&p->boxes, id);
    char *spec = box ? cube_process_path(box->dir, "spec") : NULL;
    int fd = box ? p->w->open(p->w->ctx, spec, 0) : -ENOENT;

    cube_free(spec);
    if (fd >= 0)
        p->w->close(p->w->ctx, fd);
    if (fd != -ENOENT) {
        cube_process_refresh(box);
        return box;
    }
    if (!cube_process_is_id(id) || cube_process_scan(p, err) < 0)
        return NULL;
    return cube_map_get(&p->boxes, id);
}

/* ---- Processes: the end of one ---- */

/* The supervisor has ended: those who wait for it go on, then the watcher is
 * told. */
static void cube_process_ended(void *arg, unsigned events)
{
    struct cube_process_box *box = arg;
    struct cube_process *p = box->p;
    char task[CUBE_UUID_TEXT];

    (void)events;
    cube_watch_clear(p->rt.loop, &box->watch);
    p->w->pid_close(p->w->ctx, box->pid_fd);
    box->pid_fd = -1;
    cube_process_refresh(box);
    cube_process_resume(p, box->c.id);
    (void)snprintf(task, sizeof task, "%s", box->c.task);
    if (p->change)
        p->change(p->change_arg, task);
}

static void cube_process_signal(struct cube_process_box *box, int number)
{
    if (box->pid_fd >= 0)
        (void)box->p->w->pid_signal(box->p->w->ctx, box->pid_fd, number);
}

/* ---- Processes: removing ---- */

/* One pass over one directory of a tree that goes. */
struct cube_process_pass {
    struct cube_process *p;
    struct cube_buf *path;
    int left;  /* entries that this pass may remove */
    int error;
    bool is_deeper; /* `path` is now a directory within */
};

static void cube_process_clean_one(void *arg, const char *name)
{
    struct cube_process_pass *c = arg;
    const struct cube_world *w = c->p->w;
    size_t len = c->path->len;
    int r;

    if (c->is_deeper || c->error < 0 || c->left-- <= 0)
        return;
    cube_buf_printf(c->path, "/%s", name);
    r = w->unlink(w->ctx, c->path->data);
    if (r == -EISDIR || r == -EPERM)
        r = w->rmdir(w->ctx, c->path->data);
    if (r == -ENOTEMPTY || r == -EEXIST) {
        c->is_deeper = true;
        return;
    }
    if (r < 0 && r != -ENOENT)
        c->error = r;
    c->path->len = len;
    c->path->data[len] = 0;
}

/* One pass: 1 when all is gone, 0 to go on, or a negative errno value. */
static int cube_process_clean_pass(struct cube_process_op *op)
{
    struct cube_process_pass c = {op->p, &op->path, 256, 0, false};
    const struct cube_world *w = op->p->w;
    int r = w->list(w->ctx, op->path.data, cube_process_clean_one, &c);

    if (r == -ENOENT)
        return 1;
    if (r < 0 || c.error < 0)
        return r < 0 ? r : c.error;
    if (c.is_deeper || c.left <= 0)
        return 0;
    r = w->rmdir(w->ctx, op->path.data);
    if (r < 0 && r != -ENOENT)
        return r;
    if (op->path.len == op->path_len)
        return 1;
    op->path.len = (size_t)(strrchr(op->path.data, '/') - op->path.data);
    op->path.data[op->path.len] = 0;
    return 0;
}

/* Removes the tree in slices. */
static void cube_process_clean_step(struct cube_process_op *op)
{
    struct cube_loop *l = op->p->rt.loop;
    int64_t until = cube_loop_now_ms(l) + CUBE_SLICE_MS;
    int r = 0;

    while (r == 0 && cube_loop_now_ms(l) < until)
        r = cube_process_clean_pass(op);
    if (r == 0) {
        cube_defer_set(l, &op->defer, cube_process_op_run, op);
        return;
    }
    if (r < 0)
        (void)cube_fail(&op->err, CUBE_EACCES, "remove %s: %s", op->path.data,
                        cube_errno_text(r));
    cube_process_op_end(op, NULL);
}

/* Removes a tree, and nobody waits for it. */
static void cube_process_clean(struct cube_process *p, const char *dir)
{
    struct cube_process_op *op =
        cube_process_op_new(p, "", cube_process_clean_step, NULL);

    cube_buf_puts(&op->path, dir);
    op->path_len = op->path.len;
}

/* Takes the box away under another name, and turns `op` into the removal of
 * its files. */
static void cube_process_discard(struct cube_process_box *box,
                                 struct cube_process_op *op)
{
    struct cube_process *p = box->p;
    size_t len = strlen(box->dir) - strlen(box->c.id);
    int r;

    cube_buf_clear(&op->path);
    cube_buf_printf(&op->path, "%.*s.gone-%s-%lld", (int)len, box->dir,
                    box->c.id, (long long)p->w->wall_ns(p->w->ctx));
    op->path_len = op->path.len;
    op->step = cube_process_clean_step;
    cube_process_unlimit(p, box->c.id);
    r = p->w->rename(p->w->ctx, box->dir, op->path.data);
    if (r < 0 && r != -ENOENT)
        (void)cube_fail(&op->err, cube_errno_code(r), "remove %s: %s",
                        box->dir, cube_errno_text(r));
    if (r >= 0 || r == -ENOENT)
        cube_process_drop(box);
}

static void cube_process_remove_step(struct cube_process_op *op)
{
    struct cube_process_box *box =
        cube_process_find(op->p, op->id, &op->err);

    if (box && box->c.state == CUBE_BOX_RUNNING) {
        if (op->is_late) {
            (void)cube_fail(&op->err, CUBE_ETIMEOUT,
                            "remove %s: it was killed and does not die",
                            op->id);
            cube_process_op_end(op, NULL);
            return;
        }
        cube_process_signal(box, SIGUSR1);
        cube_process_op_wait(op, CUBE_PROCESS_DEAD_MS);
        return;
    }
    if (box)
        cube_process_discard(box, op);
    if (!box || op->err.code != CUBE_OK)
        cube_process_op_end(op, NULL);
    else
        op->step(op);
}

static void cube_process_remove(struct cube_runtime *rt, const char *id,
                                cube_done_fn *fn, void *arg)
{
    struct cube_process *p = (struct cube_process *)rt;

    cube_process_op_new(p, id, cube_process_remove_step, arg)->on_done = fn;
}

/* What an earlier runtime had removed, but not to its end. */
static void cube_process_clean_old(void *arg, const char *name)
{
    struct cube_process_scan *s = arg;
    char *dir;

    if (!cube_text_starts(name, ".gone-"))
        return;
    dir = cube_process_path(s->dir, name);
    cube_process_clean(s->p, dir);
    cube_free(dir);
}

static void cube_process_clean_worker(void *arg, const char *name)
{
    struct cube_process_scan *s = arg;
    char *dir = cube_process_path(s->p->root, name);

    s->dir = dir;
    (void)s->p->w->list(s->p->w->ctx, dir, cube_process_clean_old, s);
    cube_free(dir);
}

/* ---- Processes: ports ---- */

/* The ports of one start: what is chosen, and the listeners that keep others
 * from choosing the same until all are. */
struct cube_process_ports {
    struct cube_process *p;
    struct cube_ports *chosen;
    int *fds;
    size_t count;
};

/* Was the port promised to a process that runs? It may not have bound it
 * yet. */
static bool cube_process_is_promised(struct cube_process *p, const char *port)
{
    size_t at = 0;
    void *each;

    while (cube_map_next(&p->boxes, &at, NULL, &each)) {
        const struct cube_container *c = &((struct cube_process_box *)each)->c;

        if (c->state != CUBE_BOX_RUNNING)
            continue;
        for (size_t i = 0; i < c->ports.count; i++) {
            const struct cube_port *one = &c->ports.list[i];

            if (one->count > 0 && strcmp(one->bindings[0].port, port) == 0)
                return true;
        }
    }
    return false;
}

/* Listens on all addresses of one kind; keeps the descriptor. A machine
 * without IPv6 has no port of it that could be taken. */
static int cube_process_listen(struct cube_process_ports *s,
                               enum cube_addr_kind kind, uint16_t port)
{
    const struct cube_world *w = s->p->w;
    struct cube_addr addr;
    int fd;

    memset(&addr, 0, sizeof addr);
    addr.kind = kind;
    addr.port = port;
    fd = w->listen(w->ctx, &addr);
    if (fd < 0)
        return kind == CUBE_ADDR_IP6 && fd != -EADDRINUSE ? 0 : fd;
    s->fds = cube_resize(s->fds, (s->count + 1) * sizeof *s->fds);
    s->fds[s->count++] = fd;
    if (port == 0 && w->local_addr(w->ctx, fd, &addr) < 0)
        return -EIO;
    return addr.port;
}

/* A port that is free now; a negative errno value when there is none. */
static int cube_process_free_port(struct cube_process_ports *s)
{
    for (int i = 0; i < 100; i++) {
        int port = cube_process_listen(s, CUBE_ADDR_IP4, 0);
        char text[16];

        if (port <= 0)
            return port < 0 ? port : -EIO;
        (void)snprintf(text, sizeof text, "%d", port);
        if (!cube_process_is_promised(s->p, text) &&
            cube_process_listen(s, CUBE_ADDR_IP6, (uint16_t)port) >= 0)
            return port;
    }
    return -EADDRINUSE;
}

static int cube_process_port(struct cube_process_ports *s, const char *port,
                             const char *wanted, struct cube_err *err)
{
    struct cube_port *slot = cube_port_slot(s->chosen, port);
    uint64_t number = 0;
    char text[16];
    int r;

    (void)cube_text_u64(wanted, strlen(wanted), 65535, &number);
    (void)snprintf(text, sizeof text, "%d", (int)number);
    if (number == 0)
        r = cube_process_free_port(s);
    else if (cube_process_is_promised(s->p, text))
        r = -EADDRINUSE;
    else
        r = cube_process_listen(s, CUBE_ADDR_IP4, (uint16_t)number);
    if (r > 0 && number != 0 &&
        cube_process_listen(s, CUBE_ADDR_IP6, (uint16_t)number) < 0)
        r = -EADDRINUSE;
    if (r == -EADDRINUSE)
        return cube_fail(err, CUBE_EBUSY, "Bind for 0.0.0.0:%s failed: port "
                         "is already allocated", text);
    if (r < 0)
        return cube_fail(err, cube_errno_code(r), "Bind for 0.0.0.0:%s "
                         "failed: %s", text, cube_errno_text(r));
    (void)snprintf(text, sizeof text, "%d", r);
    if (slot)
        cube_port_add(slot, "0.0.0.0", text);
    return 0;
}

/* Chooses all ports of a task: those it asks for, free ones for the rest. */
static int cube_process_choose(struct cube_process *p,
                               const struct cube_task *t,
                               struct cube_ports *out, struct cube_err *err)
{
    struct cube_process_ports s = {p, out, NULL, 0};
    int r = 0;

    for (size_t i = 0; i < t->port_bindings.count && r == 0; i++)
        r = cube_process_port(&s, t->port_bindings.list[i].port,
                              t->port_bindings.list[i].host_port, err);
    for (size_t i = 0; i < t->exposed_ports.count && r == 0; i++) {
        const char *port = t->exposed_ports.list[i];
        bool is_bound = false;

        for (size_t k = 0; k < out->count && !is_bound; k++)
            is_bound = strcmp(out->list[k].port, port) == 0;
        if (!is_bound)
            r = cube_process_port(&s, port, "", err);
    }
    for (size_t i = 0; i < s.count; i++)
        p->w->close(p->w->ctx, s.fds[i]);
    cube_free(s.fds);
    return r;
}

/* ---- Processes: starting ---- */

/* Sets NAME=VALUE, in the place of an earlier one. */
__attribute__((format(printf, 2, 3))) static void
cube_process_env(struct cube_texts *env, const char *format, ...)
{
    struct cube_buf text = {0};
    char small[1];
    va_list args, again;
    size_t name;
    int len;

    va_start(args, format);
    va_copy(again, args);
    len = vsnprintf(small, sizeof small, format, args);
    cube_buf_reserve(&text, (size_t)len + 1);
    (void)vsnprintf(text.data, (size_t)len + 1, format, again);
    va_end(again);
    va_end(args);
    name = strcspn(text.data, "=") + 1;
    for (size_t i = 0; i < env->count; i++) {
        if (strncmp(env->list[i], text.data, name) == 0) {
            cube_text_set(&env->list[i], text.data);
            cube_buf_free(&text);
            return;
        }
    }
    cube_task_add(env, text.data);
    cube_buf_free(&text);
}

/* From the weakest to the strongest: what we have, what the task says, what
 * it cannot know. */
static void cube_process_environment(struct cube_process *p, const char *id,
                                     const struct cube_task *t,
                                     const struct cube_ports *ports,
                                     struct cube_texts *env)
{
    static const char *const inherited[] = {"PATH", "HOME", "LANG"};
    int lowest = 65536, number;
    const char *protocol;

    cube_process_env(env, "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:"
                          "/usr/bin:/sbin:/bin");
    for (size_t i = 0; i < CUBE_COUNT(inherited); i++) {
        const char *value = p->w->env(p->w->ctx, inherited[i]);

        if (value)
            cube_process_env(env, "%s=%s", inherited[i], value);
    }
    for (size_t i = 0; i < ports->count; i++) {
        if (cube_port_parse(ports->list[i].port, &number, &protocol) == 0 &&
            number < lowest) {
            lowest = number;
            cube_process_env(env, "PORT=%s", ports->list[i].bindings[0].port);
        }
    }
    for (size_t i = 0; i < t->env.count; i++)
        cube_process_env(env, "%s", t->env.list[i]);
    for (size_t i = 0; i < ports->count; i++) {
        if (cube_port_parse(ports->list[i].port, &number, &protocol) == 0)
            cube_process_env(env, "CUBE_PORT_%d%s=%s", number,
                             strcmp(protocol, "tcp") == 0   ? ""
                             : strcmp(protocol, "udp") == 0 ? "_UDP"
                                                            : "_SCTP",
                             ports->list[i].bindings[0].port);
    }
    cube_process_env(env, "CUBE_TASK_ID=%s", t->id);
    cube_process_env(env, "CUBE_TASK_NAME=%s", t->name);
    cube_process_env(env, CUBE_PROCESS_ID "%s", id);
}

static void cube_process_print_spec(const struct cube_process_op *op,
                                    const struct cube_ports *ports,
                                    const char *limits, struct cube_buf *out)
{
    const struct cube_world *w = op->p->w;
    struct cube_time now = cube_time_from_ns(w->wall_ns(w->ctx));

    cube_buf_puts(out, "{\"Name\":");
    cube_json_put_text(out, op->task->name);
    cube_buf_puts(out, ",\"Cluster\":");
    cube_json_put_text(out, op->cluster);
    cube_buf_puts(out, ",\"Worker\":");
    cube_json_put_text(out, op->worker);
    cube_buf_printf(out, ",\"Attempt\":%lld,\"Restart\":%lld,\"Created\":",
                    (long long)op->attempt,
                    (long long)op->task->restart_count);
    cube_json_put_time(out, &now);
    cube_buf_puts(out, ",\"Limits\":");
    cube_json_put_text(out, limits);
    cube_buf_puts(out, ",\"Ports\":");
    cube_ports_print(ports, out);
    cube_buf_puts(out, ",\"Task\":");
    cube_task_print(op->task, out);
    cube_buf_puts(out, "}\n");
}

/* Writes the spec whole or not at all. Not synced: a process does not outlive
 * a machine that falls. */
static int cube_process_write_spec(struct cube_process *p, const char *dir,
                                   const struct cube_buf *text,
                                   struct cube_err *err)
{
    char *beside = cube_process_path(dir, "spec.new");
    char *path = cube_process_path(dir, "spec");
    int fd = p->w->open(p->w->ctx, beside,
                        CUBE_OPEN_WRITE | CUBE_OPEN_CREATE | CUBE_OPEN_TRUNC);
    int r = fd < 0 ? fd
                   : cube_file_write_all(p->w, fd, text->data, text->len, 0);

    if (fd >= 0)
        p->w->close(p->w->ctx, fd);
    if (r >= 0)
        r = p->w->rename(p->w->ctx, beside, path);
    if (r < 0)
        (void)cube_fail(err, cube_errno_code(r), "write %s: %s", path,
                        cube_errno_text(r));
    cube_free(beside);
    cube_free(path);
    return r < 0 ? -1 : 0;
}

/* What `spawn` answered, as an error. */
static int cube_process_spawn_error(int r, const char *command,
                                    struct cube_err *err)
{
    char words[300];

    if (r < 0)
        return cube_fail(err, r == -ETIMEDOUT ? CUBE_ETIMEOUT
                                              : cube_errno_code(r),
                         "start the supervisor: %s", cube_errno_text(r));
    cube_process_exec_words(command, r, words, sizeof words);
    /* Out of processes or memory: later it may work. */
    if (r == EAGAIN || r == ENOMEM || r == ENFILE || r == EIO)
        return cube_fail(err, CUBE_EIO, "%s", words);
    return cube_fail(err, CUBE_EINVAL, "%s (exit code %d)", words,
                     r == ENOENT ? 127 : 126);
}

/* A list that ends with NULL, of borrowed texts. */
static const char **cube_process_vector(const struct cube_texts *texts)
{
    const char **out = cube_alloc((texts->count + 1) * sizeof *out);

    for (size_t i = 0; i < texts->count; i++)
        out[i] = texts->list[i];
    return out;
}

/* Spawns the command in its directory, which is there. */
static int cube_process_spawn(struct cube_process_op *op, const char *dir,
                              const struct cube_ports *ports,
                              struct cube_err *err)
{
    struct cube_process *p = op->p;
    struct cube_texts env = {NULL, 0, false};
    struct cube_buf limits = {0}, text = {0};
    struct cube_spawn spawn;
    const char **argv = cube_process_vector(&op->task->cmd), **envp;
    int r;

    memset(&spawn, 0, sizeof spawn);
    cube_buf_puts(&limits, "");
    cube_process_limit(p, op->id, op->task, &spawn, &limits);
    cube_process_print_spec(op, ports, limits.data, &text);
    cube_process_environment(p, op->id, op->task, ports, &env);
    envp = cube_process_vector(&env);
    spawn.dir = dir;
    spawn.argv = argv;
    spawn.env = envp;
    spawn.log_bytes = CUBE_PROCESS_LOG_BYTES;
    spawn.log_files = CUBE_PROCESS_LOG_FILES;
    r = cube_process_write_spec(p, dir, &text, err);
    if (r == 0)
        r = p->w->spawn(p->w->ctx, &spawn);
    else
        r = -ECANCELED; /* `err` is set */
    cube_free((void *)(uintptr_t)spawn.cgroups[0]);
    cube_free((void *)(uintptr_t)spawn.cgroups[1]);
    cube_words_free(&env);
    cube_free(argv);
    cube_free(envp);
    cube_buf_free(&limits);
    cube_buf_free(&text);
    /* Busy: somebody else's start of the same came first. */
    if (r == 0 || r == -EBUSY || r == -ECANCELED)
        return r == -ECANCELED ? -1 : 0;
    return cube_process_spawn_error(r, op->task->cmd.list[0], err);
}

static int cube_process_make_dirs(struct cube_process_op *op, char **dir)
{
    struct cube_buf path = {0};
    char *work;
    int r;

    cube_buf_printf(&path, "%s/%s/%s", op->p->root,
                    cube_process_is_id(op->worker) ? op->worker : "none",
                    op->id);
    *dir = cube_buf_take(&path);
    work = cube_process_path(*dir, "work");
    r = cube_dir_make(op->p->w, work, &op->err);
    cube_free(work);
    return r;
}

/* Is the box an older one of the same task and worker? */
static bool cube_process_is_older(const struct cube_process_box *box,
                                  const struct cube_process_op *op)
{
    const struct cube_container *c = &box->c;

    return strcmp(c->task, op->task->id) == 0 &&
           strcmp(c->worker, op->worker) == 0 &&
           (c->attempt < op->attempt ||
            (c->attempt == op->attempt &&
             c->restart < op->task->restart_count));
}

/* Removes older ones. Those that run are killed: `*running` is one of them,
 * which must end first, since it may hold the ports. */
static void cube_process_clear_older(struct cube_process_op *op,
                                     struct cube_process_box **running)
{
    struct cube_process *p = op->p;
    size_t at = 0;
    void *each;

    *running = NULL;
    while (cube_map_next(&p->boxes, &at, NULL, &each)) {
        struct cube_process_box *box = each;

        if (!cube_process_is_older(box, op))
            continue;
        if (box->c.state == CUBE_BOX_RUNNING) {
            cube_process_signal(box, SIGUSR1);
            *running = box;
        } else {
            cube_process_discard(box, cube_process_op_new(
                                          p, box->c.id,
                                          cube_process_clean_step, NULL));
        }
    }
}

/* Makes the directory and starts the command; the box, or NULL. */
static struct cube_process_box *cube_process_make(struct cube_process_op *op)
{
    struct cube_process *p = op->p;
    struct cube_ports ports = {NULL, 0, true};
    struct cube_process_box *box;
    bool is_trouble;
    char *dir = NULL;
    int r;

    r = cube_process_choose(p, op->task, &ports, &op->err);
    if (r == 0)
        r = cube_process_make_dirs(op, &dir);
    if (r == 0)
        r = cube_process_spawn(op, dir, &ports, &op->err);
    box = cube_map_get(&p->boxes, op->id); /* one that was only created */
    if (box)
        cube_process_drop(box);
    box = dir ? cube_process_load(p, dir, op->id, &is_trouble) : NULL;
    if (box) {
        cube_map_put(&p->boxes, op->id, box);
        cube_process_refresh(box);
    } else if (r == 0) {
        r = cube_fail(&op->err, CUBE_EIO, "read %s/spec", dir);
    } else if (dir) { /* no box, so there is no spec: half made */
        cube_process_unlimit(p, op->id);
        cube_process_clean(p, dir);
    }
    cube_ports_free(&ports);
    cube_free(dir);
    return r == 0 ? box : NULL;
}

/* After a `no` nothing is left of the start. */
static void cube_process_start_failed(struct cube_process_op *op)
{
    struct cube_process_box *box = cube_map_get(&op->p->boxes, op->id);

    if (box && box->c.state != CUBE_BOX_RUNNING &&
        !cube_runtime_is_trouble(&op->err))
        cube_process_discard(box, cube_process_op_new(op->p, op->id,
                                                      cube_process_clean_step,
                                                      NULL));
    cube_process_op_end(op, NULL);
}

/* The container's ID; kept apart from `op->id`, which names what it waits
 * for. */
static void cube_process_start_id(struct cube_process_op *op)
{
    char id[128];

    (void)snprintf(id, sizeof id, "%s-%lld-%lld", op->task->id,
                   (long long)op->attempt,
                   (long long)op->task->restart_count);
    cube_text_set(&op->id, id);
}

/* Is the way free? Else it waits, or there is an error. */
static bool cube_process_start_clear(struct cube_process_op *op)
{
    struct cube_process_box *running;

    cube_process_clear_older(op, &running);
    if (!running)
        return true;
    if (op->is_late) {
        (void)cube_fail(&op->err, CUBE_ETIMEOUT,
                        "start: %s was killed and does not die",
                        running->c.id);
        return false;
    }
    cube_text_set(&op->id, running->c.id);
    cube_process_op_wait(op, CUBE_PROCESS_DEAD_MS);
    return false;
}

static void cube_process_next_spawn(void *arg)
{
    struct cube_process *p = arg;

    p->has_spawned = false;
}

/* A spawn waits for its supervisor's report, some milliseconds: one a turn,
 * so that many starts at once do not stop the loop. */
static void cube_process_start_step(struct cube_process_op *op)
{
    struct cube_process *p = op->p;
    struct cube_process_box *box = NULL;

    if (p->has_spawned) {
        cube_defer_set(p->rt.loop, &op->defer, cube_process_op_run, op);
        return;
    }
    cube_process_start_id(op);
    if (op->err.code == CUBE_OK && op->task->cmd.count == 0)
        (void)cube_fail(&op->err, CUBE_EINVAL,
                        "Cmd: there is none, and this worker runs processes: "
                        "it has no engine to run an image%s%.200s",
                        op->task->image[0] ? " like " : "", op->task->image);
    if (op->err.code == CUBE_OK && cube_process_scan(p, &op->err) == 0 &&
        cube_process_start_clear(op)) {
        box = cube_map_get(&p->boxes, op->id);
        if (!box || box->c.state == CUBE_BOX_CREATED) {
            p->has_spawned = true;
            cube_defer_set(p->rt.loop, &p->spawn_defer,
                           cube_process_next_spawn, p);
            box = cube_process_make(op);
        }
    }
    if (op->is_waiting)
        return;
    if (box)
        cube_process_op_end(op, &box->c);
    else
        cube_process_start_failed(op);
}

static void cube_process_start(struct cube_runtime *rt,
                               const struct cube_start *what,
                               cube_container_fn *fn, void *arg)
{
    struct cube_process *p = (struct cube_process *)rt;
    struct cube_process_op *op =
        cube_process_op_new(p, "", cube_process_start_step, arg);

    op->on_container = fn;
    op->task = cube_task_copy(what->task);
    op->cluster = cube_text_dup(what->cluster ? what->cluster : "");
    op->worker = cube_text_dup(what->worker ? what->worker : "");
    op->attempt = what->attempt;
}

/* A start takes one turn, unless it waits for an older one to end. */
static void cube_process_start_cancel(struct cube_runtime *rt,
                                      const char *task)
{
    struct cube_process *p = (struct cube_process *)rt;

    for (struct cube_list *at = p->ops.next; at != &p->ops; at = at->next) {
        struct cube_process_op *op = CUBE_OF(at, struct cube_process_op, link);

        if (!op->task || strcmp(op->task->id, task) != 0 ||
            op->err.code != CUBE_OK)
            continue;
        (void)cube_fail(&op->err, CUBE_ECANCELED, "start: given up");
        op->is_waiting = false;
        cube_timer_clear(p->rt.loop, &op->timer);
        cube_defer_set(p->rt.loop, &op->defer, cube_process_op_run, op);
    }
}

/* ---- Processes: stopping ---- */

static void cube_process_stop_step(struct cube_process_op *op)
{
    struct cube_process_box *box =
        cube_process_find(op->p, op->id, &op->err);

    if (!box || box->c.state != CUBE_BOX_RUNNING) {
        cube_process_op_end(op, NULL);
        return;
    }
    if (op->phase == 0 && op->grace_ms > 0) {
        op->phase = 1;
        cube_process_signal(box, SIGTERM);
        cube_process_op_wait(op, op->grace_ms);
    } else if (op->phase < 2) {
        op->phase = 2;
        cube_process_signal(box, SIGUSR1);
        cube_process_op_wait(op, CUBE_PROCESS_DEAD_MS);
    } else {
        (void)cube_fail(&op->err, CUBE_ETIMEOUT,
                        "stop %s: it was killed and does not die", op->id);
        cube_process_op_end(op, NULL);
    }
}

static void cube_process_stop(struct cube_runtime *rt, const char *id,
                              int64_t grace_ms, cube_done_fn *fn, void *arg)
{
    struct cube_process *p = (struct cube_process *)rt;
    struct cube_process_op *op =
        cube_process_op_new(p, id, cube_process_stop_step, arg);

    op->on_done = fn;
    op->grace_ms = grace_ms;
}

static void cube_process_kill(struct cube_runtime *rt, const char *id,
                              cube_done_fn *fn, void *arg)
{
    cube_process_stop(rt, id, 0, fn, arg);
}

/* ---- Processes: asking ---- */

static void cube_process_list_step(struct cube_process_op *op)
{
    struct cube_process *p = op->p;
    struct cube_container *list;
    cube_containers_fn *fn = op->on_list;
    void *arg = op->arg, *each;
    size_t at = 0, count = 0;

    if (cube_process_scan(p, &op->err) < 0) {
        cube_process_op_end(op, NULL);
        return;
    }
    list = cube_alloc((p->boxes.count + 1) * sizeof *list);
    while (cube_map_next(&p->boxes, &at, NULL, &each)) {
        struct cube_process_box *box = each;

        if (!op->worker || strcmp(op->worker, box->c.worker) == 0)
            list[count++] = box->c;
    }
    cube_process_op_free(op);
    fn(arg, list, count, NULL);
    cube_free(list);
}

static void cube_process_list(struct cube_runtime *rt, const char *worker,
                              cube_containers_fn *fn, void *arg)
{
    struct cube_process *p = (struct cube_process *)rt;
    struct cube_process_op *op =
        cube_process_op_new(p, "", cube_process_list_step, arg);

    op->on_list = fn;
    op->worker = worker ? cube_text_dup(worker) : NULL;
}

static struct cube_process_box *cube_process_need(struct cube_process_op *op)
{
    struct cube_process_box *box =
        cube_process_find(op->p, op->id, &op->err);

    if (!box && op->err.code == CUBE_OK)
        (void)cube_fail(&op->err, CUBE_ENOENT, "No such process: %.200s",
                        op->id);
    return box;
}

static void cube_process_inspect_step(struct cube_process_op *op)
{
    struct cube_process_box *box = cube_process_need(op);

    cube_process_op_end(op, box ? &box->c : NULL);
}

static void cube_process_inspect(struct cube_runtime *rt, const char *id,
                                 cube_container_fn *fn, void *arg)
{
    struct cube_process *p = (struct cube_process *)rt;

    cube_process_op_new(p, id, cube_process_inspect_step, arg)->on_container =
        fn;
}

static void cube_process_json_text(struct cube_buf *out, const char *key,
                                   const char *value)
{
    cube_buf_printf(out, "\"%s\":", key);
    cube_json_put_text(out, value);
}

static void cube_process_json_words(struct cube_buf *out, const char *key,
                                    const struct cube_texts *words, size_t i)
{
    cube_buf_printf(out, "\"%s\":[", key);
    for (size_t first = i; i < words->count; i++) {
        if (i > first)
            cube_buf_addc(out, ',');
        cube_json_put_text(out, words->list[i]);
    }
    cube_buf_addc(out, ']');
}

static void cube_process_json_state(const struct cube_process_box *box,
                                    struct cube_buf *out)
{
    static const char *const words[] = {"created", "running", "exited"};
    const struct cube_container *c = &box->c;
    bool is_up = c->state == CUBE_BOX_RUNNING;

    cube_buf_printf(out, "\"State\":{\"Status\":\"%s\",\"Running\":%s,"
                    "\"Paused\":false,\"Restarting\":false,\"OOMKilled\":%s,"
                    "\"Dead\":false,\"Pid\":%lld,\"ExitCode\":%d,",
                    words[c->state], is_up ? "true" : "false",
                    c->is_oom_killed ? "true" : "false",
                    is_up ? (long long)box->pid : 0, c->exit_code);
    cube_process_json_text(out, "Error", c->error);
    cube_buf_puts(out, ",\"StartedAt\":");
    cube_json_put_time(out, &c->started);
    cube_buf_puts(out, ",\"FinishedAt\":");
    cube_json_put_time(out, &c->finished);
    cube_buf_addc(out, '}');
}

/* "HostConfig" and "Config": what was asked for. */
static void cube_process_json_config(const struct cube_process_box *box,
                                     const struct cube_task *t,
                                     struct cube_buf *out)
{
    const struct cube_container *c = &box->c;

    cube_buf_printf(out, "\"HostConfig\":{\"Memory\":%lld,\"NanoCpus\":%.0f,",
                    (long long)t->mem_bytes, t->cpu * 1e9);
    cube_process_json_text(out, "Limits", box->limits);
    cube_buf_puts(out, ",\"PortBindings\":");
    cube_ports_print(&c->ports, out);
    cube_buf_puts(out, "},\"Config\":{");
    cube_process_json_words(out, "Env", &t->env, 0);
    cube_buf_addc(out, ',');
    cube_process_json_words(out, "Cmd", &t->cmd, 0);
    cube_buf_addc(out, ',');
    cube_process_json_text(out, "Image", t->image);
    cube_buf_puts(out, ",\"ExposedPorts\":{");
    for (size_t i = 0; i < c->ports.count; i++) {
        if (i > 0)
            cube_buf_addc(out, ',');
        cube_json_put_text(out, c->ports.list[i].port);
        cube_buf_puts(out, ":{}");
    }
    cube_buf_puts(out, "},\"Labels\":{");
    cube_process_json_text(out, "cube.task", c->task);
    cube_buf_addc(out, ',');
    cube_process_json_text(out, "cube.cluster", c->cluster);
    cube_buf_addc(out, ',');
    cube_process_json_text(out, "cube.worker", c->worker);
    cube_buf_printf(out, ",\"cube.attempt\":\"%lld\"}}",
                    (long long)c->attempt);
}

/* The shape of Docker's inspection, with what there is. */
static void cube_process_print(const struct cube_process_box *box,
                               const struct cube_task *t,
                               struct cube_buf *out)
{
    const struct cube_container *c = &box->c;
    struct cube_buf path = {0};

    cube_buf_addc(out, '{');
    cube_process_json_text(out, "Id", c->id);
    cube_buf_puts(out, ",\"Created\":");
    cube_json_put_time(out, &box->created);
    cube_buf_addc(out, ',');
    cube_process_json_text(out, "Path", box->command);
    cube_buf_addc(out, ',');
    cube_process_json_words(out, "Args", &t->cmd, 1);
    cube_buf_addc(out, ',');
    cube_process_json_state(box, out);
    cube_buf_addc(out, ',');
    cube_process_json_text(out, "Image", t->image);
    cube_buf_printf(&path, "%s/log", box->dir);
    cube_buf_addc(out, ',');
    cube_process_json_text(out, "LogPath", path.data);
    cube_buf_clear(&path);
    cube_buf_printf(&path, "/%s", c->name);
    cube_buf_addc(out, ',');
    cube_process_json_text(out, "Name", path.data);
    cube_buf_printf(out, ",\"RestartCount\":%lld,\"Driver\":\"process\",",
                    (long long)c->restart);
    cube_process_json_config(box, t, out);
    cube_buf_puts(out, ",\"NetworkSettings\":{\"Ports\":");
    cube_ports_print(&c->ports, out);
    cube_buf_puts(out, "}}");
    cube_buf_free(&path);
}

static void cube_process_inspect_json_step(struct cube_process_op *op)
{
    struct cube_process_box *box = cube_process_need(op);
    struct cube_task *t = NULL;
    struct cube_buf text = {0};
    cube_text_fn *fn = op->on_text;
    void *arg = op->arg;

    if (!box || cube_task_parse(box->c.spec, strlen(box->c.spec), false, &t,
                                &op->err) < 0) {
        cube_process_op_end(op, NULL);
        return;
    }
    cube_process_print(box, t, &text);
    cube_task_free(t);
    cube_process_op_free(op);
    fn(arg, text.data, text.len, NULL);
    cube_buf_free(&text);
}

static void cube_process_inspect_json(struct cube_runtime *rt, const char *id,
                                      cube_text_fn *fn, void *arg)
{
    struct cube_process *p = (struct cube_process *)rt;

    cube_process_op_new(p, id, cube_process_inspect_json_step, arg)->on_text =
        fn;
}

/* ---- Processes: logs ---- */

/*
 * A log is a row of files, numbered from 1 on; the newest is called `log`
 * until it is full and gets its number. A reader is at byte `at` of file
 * `number`.
 *
 *      log.7      log.8      log (will be log.9)
 *      [......]   [...|..]   [...           ]
 *                     `- number 8, at 3
 *
 * "So many last lines" are found backwards from the end, in slices; then the
 * reader reads forwards.
 */
struct cube_process_logs {
    struct cube_list link;
    struct cube_process *p;
    char *id, *dir;
    cube_data_fn *on_data;
    cube_done_fn *on_end;
    void *arg;
    bool is_following;
    int64_t tail; /* lines still to find; below 0: no more */
    bool has_seen_end;          /* tail: the last byte was looked at */
    int64_t number, at;
    int fd;                     /* -1: not open */
    bool is_full, is_over;      /* no more will be added: to the file, to all */
    bool is_busy, is_cancelled; /* within on_data; and then given up */
    struct cube_defer defer;
    struct cube_timer timer;
};

#define CUBE_PROCESS_BLOCK 65536 /* read at once, 4 to 16 times a turn */

/* The smallest and largest number of a full log; 0: there is none. */
struct cube_process_range {
    int64_t first, last;
};

static void cube_process_range_one(void *arg, const char *name)
{
    struct cube_process_range *r = arg;
    uint64_t number;

    if (!cube_text_starts(name, "log.") ||
        cube_text_u64(name + 4, strlen(name + 4), INT32_MAX, &number) < 0)
        return;
    if (r->first == 0 || (int64_t)number < r->first)
        r->first = (int64_t)number;
    if ((int64_t)number > r->last)
        r->last = (int64_t)number;
}

static struct cube_process_range
cube_process_range(const struct cube_process_logs *l)
{
    struct cube_process_range r = {0, 0};

    (void)l->p->w->list(l->p->w->ctx, l->dir, cube_process_range_one, &r);
    return r;
}

static void cube_process_logs_close(struct cube_process_logs *l)
{
    if (l->fd >= 0)
        l->p->w->close(l->p->w->ctx, l->fd);
    l->fd = -1;
}

/* Opens file `number`, or the oldest that there still is. `log` can get its
 * number between two steps: then it is tried again. */
static int cube_process_logs_open(struct cube_process_logs *l)
{
    const struct cube_world *w = l->p->w;

    for (int i = 0; i < 10 && l->fd < 0; i++) {
        struct cube_process_range r = cube_process_range(l);
        char name[32] = "log", *path;

        if (l->number < r.first)
            l->number = r.first;
        l->is_full = l->number <= r.last;
        if (l->is_full)
            (void)snprintf(name, sizeof name, "log.%lld",
                           (long long)l->number);
        path = cube_process_path(l->dir, name);
        l->fd = w->open(w->ctx, path, 0);
        cube_free(path);
        if (l->fd >= 0 && !l->is_full &&
            cube_process_range(l).last >= l->number)
            cube_process_logs_close(l);
    }
    return l->fd < 0 ? -1 : 0;
}

static void cube_process_logs_free(struct cube_process_logs *l)
{
    cube_free(l->id);
    cube_free(l->dir);
    cube_free(l);
}

/* Takes it out of the runtime; what is left is its memory. */
static void cube_process_logs_leave(struct cube_process_logs *l)
{
    cube_process_logs_close(l);
    cube_list_remove(&l->link);
    cube_defer_clear(l->p->rt.loop, &l->defer);
    cube_timer_clear(l->p->rt.loop, &l->timer);
}

static void cube_process_logs_end(struct cube_process_logs *l,
                                  const struct cube_err *err)
{
    cube_process_logs_leave(l);
    l->on_end(l->arg, err);
    cube_process_logs_free(l);
}

static bool cube_process_is_running(struct cube_process *p, const char *id)
{
    struct cube_err err = {CUBE_OK, ""};
    struct cube_process_box *box = cube_process_find(p, id, &err);

    return err.code != CUBE_OK || (box && box->c.state == CUBE_BOX_RUNNING);
}

/* mutual recursion: a step sets the timer of the next */
static void cube_process_logs_forward(void *arg);

static void cube_process_logs_later(struct cube_process_logs *l)
{
    cube_timer_set(l->p->rt.loop, &l->timer, CUBE_PROCESS_FOLLOW_MS,
                   cube_process_logs_forward, l);
}

/* At the end of a file. What is known to be full, or over, was known before
 * the read that found the end, so nothing is missed. False: it has ended. */
static bool cube_process_logs_turn(struct cube_process_logs *l)
{
    if (l->is_full) {
        cube_process_logs_close(l);
        l->number++;
        l->at = 0;
        l->is_full = false;
        return true;
    }
    if (cube_process_range(l).last >= l->number) {
        l->is_full = true;
        return true;
    }
    if (l->is_over || !l->is_following) {
        cube_process_logs_end(l, NULL);
        return false;
    }
    l->is_over = !cube_process_is_running(l->p, l->id);
    if (l->is_over)
        return true;
    cube_process_logs_later(l);
    return false;
}

/* Hands out what there is. */
static void cube_process_logs_forward(void *arg)
{
    struct cube_process_logs *l = arg;
    char *block = cube_alloc(CUBE_PROCESS_BLOCK);
    const struct cube_world *w = l->p->w;

    for (int i = 0; i < 4; i++) {
        int64_t n;

        if (l->fd < 0 && cube_process_logs_open(l) < 0) {
            cube_process_logs_end(l, NULL); /* removed meanwhile */
            break;
        }
        n = w->pread(w->ctx, l->fd, block, CUBE_PROCESS_BLOCK, l->at);
        if (n > 0) {
            l->at += n;
            l->is_busy = true;
            l->on_data(l->arg, block, (size_t)n);
            l->is_busy = false;
        }
        if (n > 0 && l->is_cancelled) {
            cube_process_logs_free(l);
            break;
        }
        if (n <= 0 && !cube_process_logs_turn(l))
            break;
        if (i == 3)
            cube_defer_set(l->p->rt.loop, &l->defer,
                           cube_process_logs_forward, l);
    }
    cube_free(block);
}

/* Counts lines backwards in one block; true when the place is found. A line
 * feed at the very end ends the last line, and begins none. */
static bool cube_process_logs_count(struct cube_process_logs *l,
                                    const char *block, int64_t len)
{
    for (int64_t i = len; i > 0; i--) {
        bool is_end = !l->has_seen_end;

        l->has_seen_end = true;
        if (block[i - 1] == '\n' && !is_end && --l->tail == 0)
            return true;
        l->at--;
    }
    return false;
}

/* Goes backwards to where the last `tail` lines begin. */
static void cube_process_logs_backward(void *arg)
{
    struct cube_process_logs *l = arg;
    char *block = cube_alloc(CUBE_PROCESS_BLOCK);
    const struct cube_world *w = l->p->w;
    bool is_done = l->tail == 0;

    for (int i = 0; i < 16 && !is_done; i++) {
        int64_t len = l->at < CUBE_PROCESS_BLOCK ? l->at : CUBE_PROCESS_BLOCK;

        if (len > 0) {
            is_done = w->pread(w->ctx, l->fd, block, (size_t)len,
                               l->at - len) != len ||
                      cube_process_logs_count(l, block, len);
            continue;
        }
        is_done = l->number <= 1 || l->number <= cube_process_range(l).first;
        if (is_done)
            continue;
        cube_process_logs_close(l);
        l->number--;
        is_done = cube_process_logs_open(l) < 0;
        l->at = is_done ? 0 : w->size(w->ctx, l->fd);
    }
    cube_free(block);
    if (is_done)
        cube_process_logs_forward(l);
    else
        cube_defer_set(l->p->rt.loop, &l->defer, cube_process_logs_backward,
                       l);
}

static void cube_process_logs_begin(void *arg)
{
    struct cube_process_logs *l = arg;
    struct cube_err err = {CUBE_OK, ""};
    struct cube_process_box *box = cube_process_find(l->p, l->id, &err);

    if (!box) {
        if (err.code == CUBE_OK)
            (void)cube_fail(&err, CUBE_ENOENT, "No such process: %.200s",
                            l->id);
        cube_process_logs_end(l, &err);
        return;
    }
    l->dir = cube_text_dup(box->dir);
    l->is_over = box->c.state != CUBE_BOX_RUNNING;
    l->number = l->tail < 0 ? 1 : cube_process_range(l).last + 1;
    if (l->tail < 0) {
        cube_process_logs_forward(l);
        return;
    }
    if (cube_process_logs_open(l) == 0)
        l->at = l->p->w->size(l->p->w->ctx, l->fd);
    cube_process_logs_backward(l);
}

static struct cube_logs *
cube_process_logs(struct cube_runtime *rt, const char *id,
                  const struct cube_logs_options *options,
                  cube_data_fn *on_data, cube_done_fn *on_end, void *arg)
{
    struct cube_process *p = (struct cube_process *)rt;
    struct cube_process_logs *l = cube_alloc(sizeof *l);

    l->p = p;
    l->id = cube_text_dup(id);
    l->on_data = on_data;
    l->on_end = on_end;
    l->arg = arg;
    l->is_following = options->is_following;
    l->tail = options->tail;
    l->fd = -1;
    cube_list_add(&p->logs, &l->link);
    cube_defer_set(rt->loop, &l->defer, cube_process_logs_begin, l);
    return (struct cube_logs *)(void *)l;
}

static void cube_process_logs_cancel(struct cube_runtime *rt,
                                     struct cube_logs *logs)
{
    struct cube_process_logs *l = (struct cube_process_logs *)(void *)logs;

    (void)rt;
    cube_process_logs_leave(l);
    l->is_cancelled = true;
    if (!l->is_busy)
        cube_process_logs_free(l);
}

/* ---- Processes: the runtime ---- */

static void cube_process_report(void *arg)
{
    struct cube_process *p = arg;

    (void)cube_process_scan(p, NULL);
    if (p->change)
        p->change(p->change_arg, NULL);
}

static void cube_process_on_change(struct cube_runtime *rt,
                                   cube_change_fn *fn, void *arg)
{
    struct cube_process *p = (struct cube_process *)rt;

    p->change = fn;
    p->change_arg = arg;
    if (fn)
        cube_defer_set(rt->loop, &p->change_defer, cube_process_report, p);
    else
        cube_defer_clear(rt->loop, &p->change_defer);
}

static void cube_process_free(struct cube_runtime *rt)
{
    struct cube_process *p = (struct cube_process *)rt;
    size_t at = 0;
    void *each;

    while (!cube_list_is_empty(&p->ops))
        cube_process_op_free(
            CUBE_OF(p->ops.next, struct cube_process_op, link));
    while (!cube_list_is_empty(&p->logs)) {
        struct cube_process_logs *l =
            CUBE_OF(p->logs.next, struct cube_process_logs, link);

        cube_process_logs_cancel(rt, (struct cube_logs *)(void *)l);
    }
    while (cube_map_next(&p->boxes, &at, NULL, &each))
        cube_process_box_free(each);
    cube_map_free(&p->boxes);
    cube_defer_clear(rt->loop, &p->change_defer);
    cube_defer_clear(rt->loop, &p->spawn_defer);
    if (p->limits.memory)
        (void)p->w->rmdir(p->w->ctx, p->limits.memory);
    if (p->limits.cpu)
        (void)p->w->rmdir(p->w->ctx, p->limits.cpu);
    cube_free(p->limits.memory);
    cube_free(p->limits.cpu);
    cube_free(p->root);
    cube_free(rt->words);
    cube_free(rt->engine_id);
    cube_free(p);
}

static const struct cube_runtime_ops cube_process_ops = {
    .start = cube_process_start,
    .start_cancel = cube_process_start_cancel,
    .stop = cube_process_stop,
    .kill = cube_process_kill,
    .remove = cube_process_remove,
    .list = cube_process_list,
    .inspect = cube_process_inspect,
    .inspect_json = cube_process_inspect_json,
    .logs = cube_process_logs,
    .logs_cancel = cube_process_logs_cancel,
    .watch = cube_process_on_change,
    .free = cube_process_free,
};

/* Whether the end of a process that is no child of ours can be seen. */
static int cube_process_can_watch(struct cube_process *p, struct cube_err *err)
{
    int fd = p->w->pid_open(p->w->ctx, 1); /* there is always one */

    if (fd == -ENOSYS)
        return cube_fail(err, CUBE_EINVAL, "run processes: this kernel has "
                         "no pidfd_open; Linux has it from 5.3 on");
    if (fd >= 0)
        p->w->pid_close(p->w->ctx, fd);
    return 0;
}

/* `cgroups` is where they are mounted. */
static struct cube_runtime *cube_process_open(struct cube_loop *l,
                                              const char *dir,
                                              const char *cgroups,
                                              struct cube_err *err)
{
    struct cube_process *p = cube_alloc(sizeof *p);
    struct cube_process_scan scan = {p, NULL, 0};

    p->rt.ops = &cube_process_ops;
    p->rt.loop = l;
    p->rt.name = "process";
    p->rt.is_up = true;
    p->w = cube_loop_world(l);
    p->root = cube_process_path(dir, "run");
    p->rt.engine_id = cube_text_dup(p->root);
    cube_list_init(&p->ops);
    cube_list_init(&p->logs);
    if (cube_process_can_watch(p, err) < 0 ||
        cube_dir_make(p->w, p->root, err) < 0) {
        cube_process_free(&p->rt);
        return NULL;
    }
    cube_process_probe(p, cgroups);
    (void)p->w->list(p->w->ctx, p->root, cube_process_clean_worker, &scan);
    return &p->rt;
}

CUBE_API struct cube_runtime *cube_process_new(struct cube_loop *l,
                                               const char *dir,
                                               struct cube_err *err)
{
    return cube_process_open(l, dir, CUBE_PROCESS_CGROUPS, err);
}




/* ---- Finding a runtime ---- */

#define CUBE_SEARCH_MAX 4 /* places to look at */

/* A search: each place is greeted, one after the other. */
struct cube_runtime_search {
    struct cube_loop *loop;
    char *which, *dir;
    cube_runtime_fn *fn;
    void *arg;
    char *places[CUBE_SEARCH_MAX];
    size_t count, at;
    struct cube_runtime *rt;   /* the one that is being greeted */
    struct cube_docker_op op;  /* its ping; part of that runtime's ops */
    bool has_answered;
    struct cube_buf why;       /* why not the ones before */
    struct cube_defer defer;
};

/* Adds a place to try: a scheme, and what follows it. */
static void cube_search_add(struct cube_runtime_search *s, const char *scheme,
                            const char *value)
{
    struct cube_buf place = {0};

    cube_buf_puts(&place, scheme);
    cube_buf_puts(&place, value);
    s->places[s->count++] = cube_buf_take(&place);
}

/* Where engines listen when nobody says anything else. */
static void cube_search_places(struct cube_runtime_search *s)
{
    const struct cube_world *w = cube_loop_world(s->loop);
    const char *host = w->env(w->ctx, "DOCKER_HOST");
    const char *run = w->env(w->ctx, "XDG_RUNTIME_DIR");
    struct cube_buf own = {0};
    bool is_auto = !strcmp(s->which, "auto");

    if (is_auto || !strcmp(s->which, "docker"))
        cube_search_add(s, "", host && *host ? host
                                             : "unix:///var/run/docker.sock");
    if (!is_auto && strcmp(s->which, "podman"))
        return;
    host = w->env(w->ctx, "CONTAINER_HOST");
    if (host && *host) {
        cube_search_add(s, "", host);
        return;
    }
    if (run && w->uid(w->ctx) != 0) {
        cube_buf_printf(&own, "%s/podman/podman.sock", run);
        cube_search_add(s, "unix://", own.data);
        cube_buf_free(&own);
    }
    cube_search_add(s, "unix://", "/run/podman/podman.sock");
}

static void cube_search_free(struct cube_runtime_search *s)
{
    cube_defer_clear(s->loop, &s->defer);
    for (size_t i = 0; i < s->count; i++)
        cube_free(s->places[i]);
    cube_buf_free(&s->why);
    cube_free(s->which);
    cube_free(s->dir);
    cube_free(s);
}

/* Reports, and is gone. */
static void cube_search_end(struct cube_runtime_search *s,
                            struct cube_runtime *rt,
                            const struct cube_err *err)
{
    struct cube_buf words = {0};

    cube_buf_puts(&words, rt ? rt->words : "");
    if (rt && s->why.len > 0)
        cube_buf_puts(&words, s->has_answered || !strcmp(rt->name, "process")
                                  ? ", since " : ", for which we wait: ");
    if (s->why.len > 0)
        cube_buf_puts(&words, s->why.data);
    s->fn(s->arg, rt, words.data, err);
    cube_buf_free(&words);
    cube_search_free(s);
}

/* No engine answers: processes, unless an engine was asked for by name; that
 * one is waited for, since it may be just restarting. */
static void cube_search_without(struct cube_runtime_search *s)
{
    struct cube_runtime *rt = NULL;
    struct cube_err err;

    memset(&err, 0, sizeof err);
    if (!strcmp(s->which, "auto") || !strcmp(s->which, "process"))
        rt = cube_process_new(s->loop, s->dir, &err);
    else if (s->count > 0)
        rt = cube_docker_new(s->loop, s->places[0], &err);
    else
        (void)cube_fail(&err, CUBE_EINVAL, "%s is no runtime: auto, docker, "
                        "podman and process are", s->which);
    if (rt && s->count > 0 && !strcmp(s->which, "podman"))
        rt->name = "podman"; /* until it says so itself */
    cube_search_end(s, rt, rt ? NULL : &err);
}

/* Mutual recursion: a place that does not answer leads to the next one. */
static void cube_search_next(void *arg);

/* Later than the answer itself, since an engine cannot be freed from within
 * its own callback. */
static void cube_search_answered(void *arg)
{
    struct cube_runtime_search *s = arg;
    struct cube_runtime *rt = s->rt;

    cube_docker_op_clear(&s->op);
    if (s->has_answered) {
        cube_search_end(s, rt, NULL);
        return;
    }
    s->rt = NULL;
    cube_runtime_free(rt);
    cube_search_next(s);
}

/* An engine that has answered a versioned ping has told its name before. */
static void cube_search_on_answer(struct cube_docker_op *op,
                                  const struct cube_docker_answer *a)
{
    struct cube_runtime_search *s = CUBE_OF(op, struct cube_runtime_search, op);
    struct cube_err err;

    s->has_answered = !a->trouble && a->status == 200;
    if (!s->has_answered) {
        (void)cube_docker_fail(a, "greet", &err);
        cube_buf_printf(&s->why, "%s%s", s->why.len > 0 ? "; " : "",
                        err.text);
    }
    cube_defer_set(s->loop, &s->defer, cube_search_answered, s);
}

/* Greets the next place; one that makes no sense is a reason, too. */
static void cube_search_next(void *arg)
{
    struct cube_runtime_search *s = arg;
    struct cube_err err;

    s->rt = NULL;
    while (!s->rt && s->at < s->count) {
        s->rt = cube_docker_new(s->loop, s->places[s->at++], &err);
        if (!s->rt)
            cube_buf_printf(&s->why, "%s%s", s->why.len > 0 ? "; " : "",
                            err.text);
    }
    if (!s->rt) {
        cube_search_without(s);
        return;
    }
    cube_docker_op_init(cube_docker_of(s->rt), &s->op, cube_search_on_answer,
                        cube_docker_op_clear);
    s->op.method = "GET";
    cube_buf_puts(&s->op.target, "/_ping");
    cube_docker_ask(&s->op, CUBE_DOCKER_PING_MS, 0);
}

CUBE_API struct cube_runtime_search *
cube_runtime_find(struct cube_loop *l, const char *which, const char *dir,
                  cube_runtime_fn *fn, void *arg)
{
    struct cube_runtime_search *s = cube_alloc(sizeof *s);

    s->loop = l;
    s->which = cube_text_dup(which && *which ? which : "auto");
    s->dir = cube_text_dup(dir ? dir : ".");
    s->fn = fn;
    s->arg = arg;
    cube_search_places(s);
    cube_defer_set(l, &s->defer, cube_search_next, s);
    return s;
}

CUBE_API void cube_runtime_find_cancel(struct cube_runtime_search *s)
{
    if (!s)
        return;
    if (s->rt)
        cube_docker_op_clear(&s->op);
    cube_runtime_free(s->rt);
    cube_search_free(s);
}


/* ==== Chapter 10. Schedulers ==== uses: 2 3 7 8 ==== */
/*
 * Where shall a task run? The manager asks once for each task that waits, and
 * gets a node, or the reason for each node why it cannot be that one.
 *
 * The simplest thing that works is to hand out nodes in turn, until a task
 * does not fit or a node is gone. So a decision has three steps, each a
 * function that a program can replace:
 *
 *    task, nodes
 *        |  candidates   can it take the task at all?   no: a reason, in words
 *        v
 *    nodes that fit
 *        |  score        a number for each; the lower, the better
 *        v
 *    (node, score) ...
 *        |  pick         one of them
 *        v
 *      node
 *
 * Candidates. What a task asks for is compared with what remains of the total
 * after all promises, since a task that just started does not use its memory
 * yet; and with what is free now, since a machine runs more than our tasks.
 * Workers whose stats name one machine, or one engine, share all they have:
 * the promises of either count for both. Workers of the Go implementation
 * name none; for them the host in their name must do, and their cores, which
 * nobody knows, are not counted.
 *
 * Scores use the metrics that were pushed within the last second; nothing is
 * asked for, nobody waits. Between two pushes many tasks can be placed, and
 * measured use alone would send them all to one node. Hence load is the larger
 * of what is measured and what is promised, and a task that asked for nothing
 * counts as a little (CUBE_SCHED_CPU, CUBE_SCHED_MEM); as shares:
 *
 *    before   max(in use now, promised) / total
 *    added    what the task asks for, or that little / total
 *
 *   roundrobin  does without. The candidate that comes next by name after the
 *               one that had the last task.
 *   greedy      max over memory and CPU of (before + added): the load of the
 *               node's scarcest resource, with the task on it.
 *   epvm        Amir, Awerbuch, Barak, Borgstrom, Keren: "An Opportunity Cost
 *               Approach for Job Assignment in a Scalable Computing Cluster",
 *               IEEE Transactions on Parallel and Distributed Systems, 2000.
 *
 * E-PVM gives memory and CPU one currency. A node costs the sum of n^load over
 * its resources, n being the number of nodes; a task goes where it adds least:
 *
 *    cost
 *     ^                          .   the same `added` costs more on a node
 *     |                        . |   that is fuller: the curve keeps tasks off
 *     |                    . '   |   whatever is scarce there
 *     |       _ _ . . - '        | n^(before + added) - n^before
 *     +---------------------------> load
 *     0                          1
 *
 * How this differs from the paper: its job has no stated need for CPU, so the
 * CPU's load is its number of jobs over L, the smallest power of two above
 * the most that any machine ever had. We keep that term (it spreads tasks of
 * which nobody knows anything), but from the jobs there are now, and add a
 * term for the cores that are measured and promised. The paper also moves
 * jobs later; we do not. How it differs from the Go program: that one uses
 * a constant near 1.54 for n, adds and subtracts the same measured CPU load,
 * so that its CPU term is always zero, sleeps three seconds a node to measure
 * it, and gives a node that does not answer the lowest cost of all.
 *
 * Invariants: no built-in scheduler names a node that cube_schedule_fits
 * refuses; equal input gives an equal answer (ties go to fewer tasks, then to
 * the name), but for the round robin, which has a memory.
 *
 *    struct cube_scheduler *s = cube_scheduler_new("epvm", err);
 *    for each node: cube_node_clear(&n), cube_node_promise(&n, task) ...
 *    where = cube_schedule(s, &placement, &why);
 *    where ? assign(task, where) : wait(task, why.data);
 *    cube_scheduler_free(s);
 *
 * Naive on purpose: who shares a machine is found by comparing each node with
 * each (0.2 ms a decision for 100 nodes, 13 ms for 1,000, which want a map).
 * A machine's other work and its promises are not added up, so it can be
 * promised too much.
 */

#define CUBE_SCHED_CPU 0.1            /* cores of a task that names none */
#define CUBE_SCHED_MEM (64 << 20)     /* bytes of one that names none */
#define CUBE_SCHED_WHY_MAX 4000       /* bytes of all reasons together */

/* ---- What nodes have promised ---- */

/* Sums stay at the largest number instead of wrapping. */
static int64_t cube_sched_add(int64_t a, int64_t b)
{
    return b > 0 && a > INT64_MAX - b ? INT64_MAX : a + b;
}

/* Notes a host port of a task, unless it is noted or none. */
static void cube_node_add_port(struct cube_node *node, const char *port,
                               const char *host_port,
                               const struct cube_task *task)
{
    const char *name = task->name[0] ? task->name : task->id;
    struct cube_node_port *slot;
    const char *protocol;
    uint64_t number;
    int inner;

    if (cube_text_u64(host_port, strlen(host_port), 65535, &number) ||
        number == 0 || cube_port_parse(port, &inner, &protocol))
        return;
    for (size_t i = 0; i < node->port_count; i++) {
        if (node->ports[i].number == (int)number &&
            !strcmp(node->ports[i].protocol, protocol))
            return;
    }
    node->ports = cube_resize(node->ports, (node->port_count + 1) *
                                               sizeof *node->ports);
    slot = &node->ports[node->port_count++];
    slot->number = (int)number;
    slot->protocol = protocol;
    memcpy(slot->id, task->id, sizeof slot->id);
    slot->task = cube_text_dup(name);
}

CUBE_API void cube_node_promise(struct cube_node *node,
                                const struct cube_task *task)
{
    struct cube_promise *p = &node->promised;

    p->cpu += task->cpu;
    p->mem_bytes = cube_sched_add(p->mem_bytes, task->mem_bytes);
    p->disk_bytes = cube_sched_add(p->disk_bytes, task->disk_bytes);
    p->tasks++;
    p->cpu_open += task->cpu > 0 ? 0 : 1;
    p->mem_open += task->mem_bytes > 0 ? 0 : 1;
    for (size_t i = 0; i < task->port_bindings.count; i++)
        cube_node_add_port(node, task->port_bindings.list[i].port,
                           task->port_bindings.list[i].host_port, task);
    for (size_t i = 0; i < task->host_ports.count; i++) {
        const struct cube_port *port = &task->host_ports.list[i];

        for (size_t j = 0; j < port->count; j++)
            cube_node_add_port(node, port->port, port->bindings[j].port, task);
    }
}

CUBE_API void cube_node_clear(struct cube_node *node)
{
    for (size_t i = 0; i < node->port_count; i++)
        cube_free(node->ports[i].task);
    cube_free(node->ports);
    node->ports = NULL;
    node->port_count = 0;
    memset(&node->promised, 0, sizeof node->promised);
}

/* ---- Who shares a machine ---- */

static bool cube_sched_is_same_id(const char *a, const char *b)
{
    return a[0] == b[0] && a[0] && !strcmp(a, b);
}

/* "host:5556" and "host:5557" */
static bool cube_sched_is_same_host(const char *a, const char *b)
{
    const char *a_end = strrchr(a, ':'), *b_end = strrchr(b, ':');
    size_t a_len = a_end ? (size_t)(a_end - a) : strlen(a);
    size_t b_len = b_end ? (size_t)(b_end - b) : strlen(b);

    return a_len == b_len && !memcmp(a, b, a_len);
}

/* A node shares with itself. IDs decide where both have one. */
static bool cube_sched_shares(const struct cube_node *a,
                              const struct cube_node *b)
{
    const struct cube_stats *x = a->stats, *y = b->stats;

    if (a == b)
        return true;
    if (x && y && cube_sched_is_same_id(x->engine, y->engine))
        return true;
    if (x && y && x->machine[0] && y->machine[0])
        return cube_sched_is_same_id(x->machine, y->machine);
    return cube_sched_is_same_host(a->name, b->name);
}

/* All promises of those who share with `node`, its own among them. */
static struct cube_promise cube_sched_promised(const struct cube_placement *p,
                                               const struct cube_node *node)
{
    struct cube_promise sum = {0, 0, 0, 0, 0, 0};

    for (size_t i = 0; i < p->node_count; i++) {
        const struct cube_promise *one = &p->nodes[i].promised;

        if (one->tasks == 0 || !cube_sched_shares(node, &p->nodes[i]))
            continue;
        sum.cpu += one->cpu;
        sum.mem_bytes = cube_sched_add(sum.mem_bytes, one->mem_bytes);
        sum.disk_bytes = cube_sched_add(sum.disk_bytes, one->disk_bytes);
        sum.tasks += one->tasks;
        sum.cpu_open += one->cpu_open;
        sum.mem_open += one->mem_open;
    }
    return sum;
}

/* ---- Numbers in words ---- */

/* `hundredths` of something, without zeros at the end: 1.5, 8 */
static void cube_sched_put_hundredths(struct cube_buf *out, int64_t hundredths)
{
    int64_t whole = hundredths / 100, part = hundredths % 100;

    cube_json_put_i64(out, whole);
    if (part > 0)
        cube_buf_printf(out, part % 10 ? ".%02d" : ".%d",
                        (int)(part % 10 ? part : part / 10));
}

/* Rounded up for what is needed and down for what is left, so that nothing
 * seems to fit that did not. */
static void cube_sched_put_cores(struct cube_buf *out, double cores,
                                 bool is_need)
{
    double exact = cores < 0 ? 0 : cores > 1e9 ? 1e11 : cores * 100;
    int64_t hundredths = (int64_t)(exact + 1e-6);

    if (is_need && (double)hundredths < exact - 1e-6)
        hundredths++;
    cube_sched_put_hundredths(out, hundredths);
}

static void cube_sched_put_bytes(struct cube_buf *out, int64_t bytes,
                                 bool is_need)
{
    static const char *const units[] = {"bytes", "KiB", "MiB", "GiB", "TiB",
                                        "PiB"};
    int64_t unit = 1, tenths, left = bytes > 0 ? bytes : 0;
    size_t i = 0;

    while (i + 1 < CUBE_COUNT(units) && left / 1024 >= unit) {
        unit *= 1024;
        i++;
    }
    tenths = left % unit * 10;
    tenths = tenths / unit + (is_need && tenths % unit > 0 ? 1 : 0);
    cube_sched_put_hundredths(out, left / unit * 100 + tenths * 10);
    cube_buf_printf(out, " %s", units[i]);
}

/* ---- Candidates ----
 *
 * Each check is a function; the first that says no is the reason. */

/* What a check is about: the decision, one node, and what is promised by all
 * who share with it. */
struct cube_sched_case {
    const struct cube_placement *p;
    const struct cube_node *node;
    struct cube_promise promised;
    struct cube_buf *why;
};

static bool cube_sched_is_up(const struct cube_sched_case *c)
{
    const struct cube_node *n = c->node;

    if (!n->is_up)
        cube_buf_puts(c->why, n->why_down ? n->why_down : "does not answer");
    else if (!n->stats)
        cube_buf_puts(c->why, "has sent no metrics yet");
    else if (c->p->avoid && !strcmp(c->p->avoid, n->name))
        cube_buf_puts(c->why, "the task has failed there");
    else
        return true;
    return false;
}

/* A worker that does not name its runtime is one of the Go implementation,
 * and has an engine. */
static bool cube_sched_runs_it(const struct cube_sched_case *c)
{
    bool is_process = !strcmp(c->node->stats->runtime, "process");

    if (is_process && c->p->task->cmd.count == 0)
        cube_buf_puts(c->why, "has no engine, and the task no Cmd that could "
                              "run as a process");
    else if (!is_process && !c->p->task->image[0])
        cube_buf_puts(c->why, "runs containers, and the task has no Image");
    else
        return true;
    return false;
}

/* Is there room for `need`, of something that is called `what`? */
static bool cube_sched_has_room(const struct cube_sched_case *c, int64_t need,
                                int64_t total, int64_t promised, int64_t now,
                                const char *what)
{
    int64_t left = total > promised ? total - promised : 0;

    if (now < left)
        left = now;
    if (need <= 0 || need <= left)
        return true;
    cube_buf_puts(c->why, "needs ");
    cube_sched_put_bytes(c->why, need, true);
    cube_buf_printf(c->why, " of %s, ", what);
    cube_sched_put_bytes(c->why, left, false);
    cube_buf_puts(c->why, " left");
    return false;
}

/* kB of the stats in bytes. */
static int64_t cube_sched_bytes(uint64_t kb)
{
    return kb > INT64_MAX / 1024 ? INT64_MAX : (int64_t)kb * 1024;
}

/* What could be had now; kernels before 3.14 do not say so themselves. */
static int64_t cube_sched_mem_available(const struct cube_mem *m)
{
    return cube_sched_bytes(m->mem_available > 0
                                ? m->mem_available
                                : m->mem_free + m->buffers + m->cached);
}

static bool cube_sched_has_mem(const struct cube_sched_case *c)
{
    const struct cube_mem *m = &c->node->stats->mem;

    return cube_sched_has_room(c, c->p->task->mem_bytes,
                               cube_sched_bytes(m->mem_total),
                               c->promised.mem_bytes,
                               cube_sched_mem_available(m), "memory");
}

static bool cube_sched_has_disk(const struct cube_sched_case *c)
{
    const struct cube_disk *d = &c->node->stats->disk;

    return cube_sched_has_room(c, c->p->task->disk_bytes, (int64_t)d->all,
                               c->promised.disk_bytes, (int64_t)d->free,
                               "disk");
}

static bool cube_sched_has_cpu(const struct cube_sched_case *c)
{
    int64_t cpus = c->node->stats->cpus;
    double need = c->p->task->cpu, left = (double)cpus - c->promised.cpu;

    /* ten times 0.1 is a little less than 1 */
    if (need <= 0 || cpus == 0 || need <= left + 1e-9)
        return true;
    cube_buf_puts(c->why, "needs ");
    cube_sched_put_cores(c->why, need, true);
    cube_buf_puts(c->why, " cores, ");
    cube_sched_put_cores(c->why, left, false);
    cube_buf_puts(c->why, " left");
    return false;
}

/* The task that has this port on a node, or NULL. It may be the one that is
 * placed, which moves to another worker of its machine: then it is free. */
static const char *cube_sched_port_owner(const struct cube_node *node,
                                         int number, const char *protocol,
                                         const struct cube_task *task)
{
    for (size_t i = 0; i < node->port_count; i++) {
        const struct cube_node_port *port = &node->ports[i];

        if (port->number == number && !strcmp(port->protocol, protocol) &&
            !(task->id[0] && !strcmp(port->id, task->id)))
            return port->task;
    }
    return NULL;
}

/* One port of the task against all who share with the node. */
static bool cube_sched_has_port(const struct cube_sched_case *c, int number,
                                const char *protocol)
{
    for (size_t i = 0; i < c->p->node_count; i++) {
        const struct cube_node *other = &c->p->nodes[i];
        const char *owner = cube_sched_port_owner(other, number, protocol,
                                                  c->p->task);

        if (!owner || !cube_sched_shares(c->node, other))
            continue;
        cube_buf_printf(c->why, "host port %d%s%s is taken by task %s", number,
                        strcmp(protocol, "tcp") ? "/" : "",
                        strcmp(protocol, "tcp") ? protocol : "", owner);
        return false;
    }
    return true;
}

static bool cube_sched_has_ports(const struct cube_sched_case *c)
{
    const struct cube_publishes *want = &c->p->task->port_bindings;

    for (size_t i = 0; i < want->count; i++) {
        const char *host_port = want->list[i].host_port, *protocol;
        uint64_t number;
        int inner;

        if (cube_text_u64(host_port, strlen(host_port), 65535, &number) ||
            number == 0 ||
            cube_port_parse(want->list[i].port, &inner, &protocol))
            continue; /* any free one will do */
        if (!cube_sched_has_port(c, (int)number, protocol))
            return false;
    }
    return true;
}

CUBE_API bool cube_schedule_fits(const struct cube_placement *p,
                                 const struct cube_node *node,
                                 struct cube_buf *why)
{
    static bool (*const checks[])(const struct cube_sched_case *) = {
        cube_sched_is_up,   cube_sched_runs_it, cube_sched_has_mem,
        cube_sched_has_cpu, cube_sched_has_disk, cube_sched_has_ports,
    };
    struct cube_sched_case c = {p, node, cube_sched_promised(p, node), why};

    for (size_t i = 0; i < CUBE_COUNT(checks); i++) {
        if (!checks[i](&c))
            return false;
    }
    return true;
}

/* ---- Load ---- */

/* Shares of a machine: 0 is idle, 1 is full, more is promised too much. */
struct cube_sched_load {
    double mem, cpu;             /* before the task */
    double mem_added, cpu_added; /* by the task */
    double jobs;                 /* how many there are before it */
};

static double cube_sched_max(double a, double b)
{
    return a > b ? a : b;
}

/* Something whose total is not known counts as full. */
static double cube_sched_share(double part, double total)
{
    return total > 0 ? part / total : 1;
}

static struct cube_sched_load cube_sched_load(const struct cube_placement *p,
                                              const struct cube_node *node)
{
    const struct cube_stats *s = node->stats;
    struct cube_promise sum = cube_sched_promised(p, node);
    double total = (double)cube_sched_bytes(s->mem.mem_total);
    double free_now = (double)cube_sched_mem_available(&s->mem);
    double cores = s->cpus > 0 ? (double)s->cpus : 1;
    double mem = (double)sum.mem_bytes + (double)sum.mem_open * CUBE_SCHED_MEM;
    double cpu = sum.cpu + (double)sum.cpu_open * CUBE_SCHED_CPU;
    double task_mem = p->task->mem_bytes > 0 ? (double)p->task->mem_bytes
                                             : CUBE_SCHED_MEM;
    double task_cpu = p->task->cpu > 0 ? p->task->cpu : CUBE_SCHED_CPU;
    struct cube_sched_load load;

    load.mem = cube_sched_share(cube_sched_max(mem, total - free_now), total);
    load.mem_added = cube_sched_share(task_mem, total);
    load.cpu = cube_sched_max(cpu / cores, s->cpu_use);
    load.cpu_added = task_cpu / cores;
    load.jobs = (double)sum.tasks;
    return load;
}

/* ---- Greedy ---- */

static double cube_sched_greedy(void *ctx, const struct cube_placement *p,
                                const struct cube_node *node)
{
    struct cube_sched_load load = cube_sched_load(p, node);

    (void)ctx;
    return cube_sched_max(load.mem + load.mem_added,
                          load.cpu + load.cpu_added);
}

/* ---- E-PVM ---- */

/* The natural logarithm of v >= 1: halved into 3/4 .. 3/2, where the series
 * 2 (z + z^3/3 + z^5/5 ...), z = (v - 1) / (v + 1), ends after few terms. */
static double cube_sched_ln(double v)
{
    const double ln2 = 0.69314718055994530942;
    double halvings = 0, sum = 0, z, power;

    for (; v > 1.5; v /= 2)
        halvings += 1;
    z = (v - 1) / (v + 1);
    power = z;
    for (int i = 1; i < 27; i += 2) {
        sum += power / i;
        power *= z * z;
    }
    return 2 * sum + halvings * ln2;
}

/*
 * base^x for base >= 1 and 0 <= x <= 40, to 13 digits: whole powers by
 * squaring, the fraction by the series of e^y. libm would do, but then
 * every program with Cube in it needs -lm.
 */
static double cube_sched_pow(double base, double x)
{
    unsigned whole = (unsigned)x;
    double y = (x - whole) * cube_sched_ln(base);
    double result = 1, square = base, term = 1, sum = 1;

    for (; whole > 0; whole >>= 1) {
        if (whole & 1)
            result *= square;
        square *= square;
    }
    for (int i = 1; term > sum * 1e-17; i++) {
        term *= y / i;
        sum += term;
    }
    return result * sum;
}

/* n^(before + added) - n^before; beyond 40 times full, loads are equal. */
static double cube_sched_marginal(double n, double before, double added)
{
    double b = before < 40 ? before : 40;
    double a = added < 40 ? added : 40;

    return cube_sched_pow(n, b) * (cube_sched_pow(n, a) - 1);
}

static double cube_sched_epvm(void *ctx, const struct cube_placement *p,
                              const struct cube_node *node)
{
    struct cube_sched_load load = cube_sched_load(p, node);
    int64_t most = 0;
    double n = 0, jobs_max = 1;

    (void)ctx;
    for (size_t i = 0; i < p->node_count; i++) {
        n += p->nodes[i].is_up ? 1 : 0;
        if (p->nodes[i].is_up && p->nodes[i].promised.tasks > most)
            most = p->nodes[i].promised.tasks;
    }
    n = cube_sched_max(n, 2); /* 1 to any power is 1 */
    while (jobs_max <= (double)most)
        jobs_max *= 2;
    return cube_sched_marginal(n, load.mem, load.mem_added) +
           cube_sched_marginal(n, load.cpu, load.cpu_added) +
           cube_sched_marginal(n, load.jobs / jobs_max, 1 / jobs_max);
}

/* ---- Round robin ---- */

/* An object; its `base` is what the program sees. */
struct cube_sched_own {
    struct cube_scheduler base;
    char *last; /* round robin: name of the node that had the last task */
};

/* The first name behind the last one, or the first of all. */
static size_t cube_sched_next(void *ctx, const struct cube_placement *p,
                              const struct cube_choice *choices, size_t count)
{
    struct cube_sched_own *own = ctx;
    size_t first = 0, next = count;

    (void)p;
    for (size_t i = 0; i < count; i++) {
        const char *name = choices[i].node->name;

        if (strcmp(name, choices[first].node->name) < 0)
            first = i;
        if (own->last && strcmp(name, own->last) > 0 &&
            (next == count || strcmp(name, choices[next].node->name) < 0))
            next = i;
    }
    if (next == count)
        next = first;
    cube_text_set(&own->last, choices[next].node->name);
    return next;
}

/* ---- The interface ---- */

CUBE_API struct cube_scheduler *cube_scheduler_new(const char *name,
                                                   struct cube_err *err)
{
    static const struct cube_scheduler all[] = {
        {"roundrobin", NULL, NULL, NULL, cube_sched_next},
        {"greedy", NULL, NULL, cube_sched_greedy, NULL},
        {"epvm", NULL, NULL, cube_sched_epvm, NULL},
    };

    for (size_t i = 0; i < CUBE_COUNT(all); i++) {
        struct cube_sched_own *own;

        if (strcmp(name, all[i].name))
            continue;
        own = cube_alloc(sizeof *own);
        own->base = all[i];
        own->base.ctx = own;
        return &own->base;
    }
    (void)cube_fail(err, CUBE_EINVAL, "there is no scheduler \"%s\", only "
                                      "roundrobin, greedy and epvm", name);
    return NULL;
}

CUBE_API void cube_scheduler_free(struct cube_scheduler *s)
{
    struct cube_sched_own *own = s ? s->ctx : NULL;

    if (!own)
        return;
    cube_free(own->last);
    cube_free(own);
}

/* Is `a` the better choice: by score, number of tasks, name? */
static bool cube_sched_is_better(const struct cube_choice *a,
                                 const struct cube_choice *b)
{
    int64_t x = a->node->promised.tasks, y = b->node->promised.tasks;

    if (a->score < b->score || b->score < a->score)
        return a->score < b->score;
    if (x != y)
        return x < y;
    return strcmp(a->node->name, b->node->name) < 0;
}

static size_t cube_sched_best(const struct cube_choice *choices, size_t count)
{
    size_t best = 0;

    for (size_t i = 1; i < count; i++) {
        if (cube_sched_is_better(&choices[i], &choices[best]))
            best = i;
    }
    return best;
}

/* Adds one node's reason. Past the limit, nodes are only counted. */
static void cube_sched_refuse(struct cube_buf *why, const char *name,
                              const struct cube_buf *reason, size_t *unsaid)
{
    if (*unsaid > 0 || why->len + strlen(name) + reason->len >
                           CUBE_SCHED_WHY_MAX) {
        ++*unsaid;
        return;
    }
    cube_buf_printf(why, "%snode %s: %s", why->len > 0 ? "; " : "", name,
                    reason->len > 0 ? reason->data : "refused");
}

/* Step one: fills `choices`, and `why` for the nodes that are none. */
static size_t cube_sched_candidates(const struct cube_scheduler *s,
                                    const struct cube_placement *p,
                                    struct cube_choice *choices,
                                    struct cube_buf *why)
{
    struct cube_buf reason = {NULL, 0, 0};
    size_t count = 0, unsaid = 0;

    for (size_t i = 0; i < p->node_count; i++) {
        const struct cube_node *node = &p->nodes[i];

        cube_buf_clear(&reason);
        if (s->candidate ? s->candidate(s->ctx, p, node, &reason)
                         : cube_schedule_fits(p, node, &reason))
            choices[count++].node = node;
        else
            cube_sched_refuse(why, node->name, &reason, &unsaid);
    }
    if (unsaid > 0)
        cube_buf_printf(why, "; and %zu more nodes", unsaid);
    if (p->node_count == 0)
        cube_buf_puts(why, "there is no node yet");
    cube_buf_free(&reason);
    return count;
}

CUBE_API const struct cube_node *cube_schedule(const struct cube_scheduler *s,
                                               const struct cube_placement *p,
                                               struct cube_buf *why)
{
    struct cube_choice *choices =
        cube_alloc((p->node_count + 1) * sizeof *choices);
    struct cube_buf reasons = {NULL, 0, 0};
    size_t count = cube_sched_candidates(s, p, choices, &reasons);
    size_t at = count;
    const struct cube_node *node = NULL;

    for (size_t i = 0; i < count; i++)
        choices[i].score = s->score ? s->score(s->ctx, p, choices[i].node) : 0;
    if (count > 0)
        at = s->pick ? s->pick(s->ctx, p, choices, count)
                     : cube_sched_best(choices, count);
    if (at < count)
        node = choices[at].node;
    else if (count > 0)
        cube_buf_printf(&reasons, "%sscheduler %s chose none of %zu nodes",
                        reasons.len > 0 ? "; " : "",
                        s->name ? s->name : "(no name)", count);
    if (!node && why)
        cube_buf_add(why, reasons.data, reasons.len);
    cube_buf_free(&reasons);
    cube_free(choices);
    return node;
}



/* ==== Chapter 11. Worker ==== uses: 1 2 3 4 5 6 7 8 9 ==== */
/*
 * The problem. A worker is told to run tasks, and from then on everything
 * changes behind its back: containers exit, engines restart, somebody removes
 * a container by hand, the worker itself is killed between two steps, and the
 * message that told it comes twice.
 *
 * The simplest thing that works is to never act on a message. A message only
 * changes what is wanted; what an engine says only changes what is observed;
 * one function compares the two and takes one step towards agreement:
 *
 *      POST, DELETE          the engine's list, inspect and events
 *           |                               |
 *           v                               v
 *    wanted (a record             observed (a container, in
 *    in the ledger, on disk)      memory, asked for again at will)
 *            \                             /
 *             +--> cube_unit_reconcile <--+      one step, then wait for
 *                          |                     what comes of it
 *        edit the record, or start, stop, remove a container
 *
 * After a crash there is nothing to repair: the records are read, the engine
 * is asked, the same function runs. There is no other path.
 *
 *   wanted   observed            the step
 *   ------   -----------------   -------------------------------------------
 *   run      nothing             start it, if its state is Scheduled; a
 *                                Running one was removed by somebody: Failed
 *   run      runs                record that it does; watch its health
 *   run      runs, but Failed    stop it (its health check failed)
 *   run      ended               record how; restart it when that is due
 *   run      an older attempt    stop and remove it, then as with nothing
 *   stop     runs                stop it, with its grace period
 *   stop     ended, created      remove it
 *   stop     nothing             Completed
 *   (none)   runs                adopt it: write a record from its labels
 *
 * Invariants. A unit (a task, here) does one thing at a time: while a step is
 * under way, or a change of its record is not on disk, it is left alone. The
 * restart count is on disk before the restart. When the engine is in trouble,
 * nothing is known any more: all units wait until it has listed its
 * containers again, and no task pays for it.
 *
 * Who owns what. A record carries the cluster, the epoch and the attempt of
 * its assignment, and so do the labels of its container. An order with an
 * older attempt, or of another cluster, changes nothing. Nothing is removed
 * because nobody knows it. An order without any of these comes from a manager
 * of the Go program, which restarts and checks health by itself: the unit
 * then `follows`.
 *
 * Interface: cube_worker_new, cube_worker_free, and over HTTP:
 *
 *    POST   /tasks               run this task (an event, with assignment)
 *    GET    /tasks               all it has
 *    GET    /tasks/{id}          the engine's inspection of its container
 *    DELETE /tasks/{id}          stop it (?attempt=n: that one or older;
 *                                &forget=1: and remove it once it has)
 *    GET    /tasks/{id}/logs     what it printed (?follow=1&tail=n)
 *    GET    /stats               the machine
 *    GET    /events              the feed of chapter 7
 *    GET    /healthz             200
 *
 * Naive on purpose: health checks are made by this process, one connection
 * each; a worker with thousands of tasks would want them spread over time.
 */

#define CUBE_BACKOFF_MS 1000                /* before the first restart */
#define CUBE_BACKOFF_MAX_MS (5 * 60 * 1000)
#define CUBE_LONG_RUN_MS (10 * 60 * 1000)   /* earns a new budget */
#define CUBE_GRACE_MS 10000                 /* from SIGTERM to SIGKILL */
#define CUBE_BEAT_MS 1000
#define CUBE_FIRST_BEAT_MS 20               /* to who begins to follow */
#define CUBE_LOOK_MAX_MS 10000              /* between two tries to list */
#define CUBE_LOOK_SLOW_MS 60000             /* a look without cause */
#define CUBE_JOIN_MS 5000
#define CUBE_SWEEP_MS 30000
#define CUBE_RETRY_COMMIT_MS 1000
#define CUBE_REST_MS 2000                   /* after a step was refused */

struct cube_worker {
    struct cube_loop *loop;
    const struct cube_world *world;
    char *name, *listen, *data_dir, *join, *advertise, *token;
    int64_t keep_ms;
    bool take_over;
    char uuid[CUBE_UUID_TEXT];
    char cluster[CUBE_UUID_TEXT]; /* "": of none yet */
    int64_t epoch;                /* the highest that gave an order */
    char next_cluster[CUBE_UUID_TEXT]; /* staged, not on disk yet */
    int64_t next_epoch;

    struct cube_store *store;
    struct cube_commit *commit;
    struct cube_ledger *ledger;
    struct cube_feed feed;
    struct cube_http_server *server;
    struct cube_machine *machine;
    struct cube_stats stats;

    char *runtime_name, *run_dir;
    struct cube_runtime_search *finding;
    struct cube_runtime *runtime; /* NULL until one is found */
    bool is_listed;               /* what is observed can be believed */
    bool is_listing;
    int look_tries;               /* in vain, since the last that worked */
    struct cube_timer look;

    struct cube_list dirty;       /* units to reconcile */
    struct cube_defer pass;
    struct cube_timer beat, sweep, rejoin, retry;
    struct cube_list peeks, askers; /* who waits for the engine */
    struct cube_http_client *joiner;
    struct cube_http_call *joining;
    bool has_joined;
};

/* A task on this worker: its record, and what is observed of it. */
struct cube_unit {
    struct cube_worker *worker;
    struct cube_record *rec;
    struct cube_list dirty;
    struct cube_container *box;    /* of the record's attempt, or NULL */
    struct cube_container *stray;  /* of another attempt: to be removed */
    bool is_busy;                  /* a step is under way */
    bool is_starting;              /* and it is a start */
    int64_t attempt;               /* that the last start was for */
    bool is_ahead;                 /* of the list that is under way */
    struct cube_timer rest;        /* after a step that was refused */
    bool is_due;                   /* its time to be started again has come */
    struct cube_timer due;
    struct cube_health health;
    char *progress;                /* of a pull, not on the record yet */
    struct cube_timer progress_timer;
};

static void cube_worker_pass(void *arg); /* mutual recursion */
static void cube_worker_look(void *arg); /* mutual recursion */

/* ---- Units ---- */

/* NULL is fine. */
static void cube_box_free(struct cube_container *box)
{
    if (!box)
        return;
    cube_free(box->id);
    cube_free(box->name);
    cube_free(box->task);
    cube_free(box->cluster);
    cube_free(box->worker);
    cube_free(box->spec);
    cube_free(box->error);
    cube_ports_free(&box->ports);
    cube_free(box);
}

/* What a callback lends, to keep. */
static struct cube_container *cube_box_copy(const struct cube_container *from)
{
    struct cube_container *box = cube_alloc(sizeof *box);

    *box = *from;
    box->id = cube_text_dup(from->id);
    box->name = cube_text_dup(from->name);
    box->task = cube_text_dup(from->task);
    box->cluster = cube_text_dup(from->cluster);
    box->worker = cube_text_dup(from->worker);
    box->spec = cube_text_dup(from->spec);
    box->error = cube_text_dup(from->error);
    memset(&box->ports, 0, sizeof box->ports);
    cube_ports_copy(&box->ports, &from->ports);
    return box;
}

/* The unit of a record, made when it is first asked for. */
static struct cube_unit *cube_unit_of(struct cube_worker *w,
                                      struct cube_record *rec)
{
    struct cube_unit *u = rec->owner;

    if (u)
        return u;
    u = cube_alloc(sizeof *u);
    u->worker = w;
    u->rec = rec;
    cube_list_init(&u->dirty);
    rec->owner = u;
    return u;
}

/* Has it looked at, later in this turn or in the next one. */
static void cube_unit_touch(struct cube_unit *u)
{
    struct cube_worker *w = u->worker;

    cube_list_remove(&u->dirty);
    cube_list_add(&w->dirty, &u->dirty);
    cube_defer_set(w->loop, &w->pass, cube_worker_pass, w);
}

/* Its steps must be over, or their runtime freed before. */
static void cube_unit_free(struct cube_unit *u)
{
    if (!u)
        return;
    cube_health_stop(&u->health);
    cube_timer_clear(u->worker->loop, &u->due);
    cube_timer_clear(u->worker->loop, &u->progress_timer);
    cube_timer_clear(u->worker->loop, &u->rest);
    cube_list_remove(&u->dirty);
    cube_box_free(u->box);
    cube_box_free(u->stray);
    cube_free(u->progress);
    cube_free(u);
}

/* Is the container of an older (below 0), of this (0), or of a newer start
 * than the task says? Attempts count first, restarts within them second. */
static int cube_box_compare(const struct cube_container *box,
                            const struct cube_task *t)
{
    if (box->attempt != t->attempt)
        return box->attempt < t->attempt ? -1 : 1;
    if (box->restart != t->restart_count)
        return box->restart < t->restart_count ? -1 : 1;
    return 0;
}

/* What was observed last; NULL: there is no container. Copied. */
static void cube_unit_set_box(struct cube_unit *u,
                              const struct cube_container *box)
{
    struct cube_container *copy = box ? cube_box_copy(box) : NULL;

    cube_box_free(u->box);
    u->box = copy;
}

/* The wall's time, for records. Never used to measure how long something took.
 */
static struct cube_time cube_worker_now(struct cube_worker *w)
{
    return cube_time_from_ns(w->world->wall_ns(w->world->ctx));
}

/* ---- The engine in trouble ---- */

/* Nothing is known until the containers have been listed again: soon, then
 * at growing intervals. */
static void cube_worker_doubt(struct cube_worker *w)
{
    int64_t in_ms = 100;

    for (int i = 0; i < w->look_tries && in_ms < CUBE_LOOK_MAX_MS; i++)
        in_ms *= 2;
    w->is_listed = false;
    cube_timer_set(w->loop, &w->look,
                   in_ms < CUBE_LOOK_MAX_MS ? in_ms : CUBE_LOOK_MAX_MS,
                   cube_worker_look, w);
}

/* ---- Restarts ---- */

/* 1 s before the first restart, doubled for each one after, up to 5 min. */
static int64_t cube_backoff_ms(int64_t restarts)
{
    int64_t ms = CUBE_BACKOFF_MS;

    while (restarts-- > 0 && ms < CUBE_BACKOFF_MAX_MS)
        ms *= 2;
    return ms < CUBE_BACKOFF_MAX_MS ? ms : CUBE_BACKOFF_MAX_MS;
}

/* May this version be started again by the worker? */
static bool cube_version_may_restart(const struct cube_version *v)
{
    if (v->keep.follows || v->task->wanted == CUBE_WANT_STOP ||
        strcmp(v->task->restart_policy, "no") == 0)
        return false;
    if (cube_task_is_endless(v->task) && v->keep.budget < 0)
        return true;
    return v->keep.restarts <
           (v->keep.budget >= 0 ? v->keep.budget : CUBE_RESTARTS);
}

/* Sets when it is to be started again, if it is. */
static void cube_version_plan(struct cube_worker *w, struct cube_version *v)
{
    int64_t ns = w->world->wall_ns(w->world->ctx);

    memset(&v->task->restart_time, 0, sizeof v->task->restart_time);
    if (cube_version_may_restart(v))
        v->task->restart_time = cube_time_from_ns(
            ns + cube_backoff_ms(v->keep.restarts) * 1000000);
}

/* Failed, in these words, now; and when it starts again, if it does. The
 * caller stages the version. */
static void cube_version_fail(struct cube_worker *w, struct cube_version *v,
                              const char *words)
{
    v->task->state = CUBE_FAILED;
    v->task->finish_time = cube_worker_now(w);
    cube_task_set(&v->task->error, words);
    cube_task_set(&v->task->progress, "");
    cube_version_plan(w, v);
}

/* The same as a change of the record on its own. What has run for long has
 * earned a new budget, however it came to its end. */
static void cube_unit_fail(struct cube_unit *u, const char *words)
{
    struct cube_worker *w = u->worker;
    struct cube_version *v = cube_record_edit(w->ledger, u->rec);
    int64_t since = cube_time_to_ns(&v->task->start_time);

    if (v->task->state == CUBE_RUNNING &&
        w->world->wall_ns(w->world->ctx) - since >=
            CUBE_LONG_RUN_MS * 1000000LL)
        v->keep.restarts = 0;
    cube_version_fail(w, v, words);
    cube_record_stage(w->ledger, u->rec);
}

/* ---- Steps: what is done with containers ---- */

/* It may try again what the engine has refused. */
static void cube_unit_rested(void *arg)
{
    struct cube_unit *u = arg;

    u->is_busy = false;
    cube_unit_touch(u);
}

/* A stop or removal that the engine refuses, though it is well, is tried
 * again, but not at once. */
static void cube_unit_rest(struct cube_unit *u, const struct cube_err *err)
{
    cube_log(u->worker->loop, CUBE_WARN, "task %s: %s", u->rec->id, err->text);
    cube_timer_set(u->worker->loop, &u->rest, CUBE_REST_MS, cube_unit_rested,
                   u);
}

/* A step is over: the unit may take the next one. When it ended in trouble,
 * nothing that was observed is believed any more. A list of containers that
 * is under way may be older than what the step has done. */
static void cube_unit_step_ends(struct cube_unit *u,
                                const struct cube_err *err)
{
    u->is_ahead = u->worker->is_listing;
    if (err && !u->is_starting && !cube_runtime_is_trouble(err)) {
        cube_unit_rest(u, err);
        return;
    }
    u->is_busy = u->is_starting = false;
    if (err && cube_runtime_is_trouble(err)) {
        cube_log(u->worker->loop, CUBE_WARN, "task %s: %s", u->rec->id,
                 err->text);
        cube_worker_doubt(u->worker);
    }
    cube_unit_touch(u);
}

/* Puts a word about a start that waits for the engine on the record. */
static void cube_unit_explain(struct cube_unit *u, const char *words)
{
    struct cube_ledger *g = u->worker->ledger;
    struct cube_version *v = cube_record_latest(u->rec);

    if (strcmp(v->task->error, words) == 0)
        return;
    v = cube_record_edit(g, u->rec);
    cube_task_set(&v->task->error, words);
    cube_record_stage(g, u->rec);
}

/* A start is over. Trouble costs nothing: the task stays Scheduled, and the
 * next look at the engine tells whether the container came to be after all.
 * That the start of an older attempt was refused says nothing of this one. */
static void cube_unit_started(void *arg, const struct cube_container *box,
                              const struct cube_err *err)
{
    struct cube_unit *u = arg;
    const struct cube_task *t = cube_record_latest(u->rec)->task;

    cube_timer_clear(u->worker->loop, &u->progress_timer);
    if (box)
        cube_unit_set_box(u, box);
    if (err && cube_runtime_is_trouble(err))
        cube_unit_explain(u, err->text);
    else if (err && err->code != CUBE_ECANCELED && t->attempt == u->attempt)
        cube_unit_fail(u, err->text);
    cube_unit_step_ends(u, err);
}

/* Puts the last words about a pull on the record, where `cube run` sees them.
 */
static void cube_unit_show_progress(void *arg)
{
    struct cube_unit *u = arg;
    struct cube_ledger *g = u->worker->ledger;
    struct cube_version *v = cube_record_edit(g, u->rec);

    cube_task_set(&v->task->progress, u->progress);
    cube_record_stage(g, u->rec);
}

/* At most one change of the record in half a second. */
static void cube_unit_progressed(void *arg, const char *words)
{
    struct cube_unit *u = arg;

    cube_text_set(&u->progress, words);
    if (!cube_timer_is_set(&u->progress_timer))
        cube_timer_set(u->worker->loop, &u->progress_timer, 500,
                       cube_unit_show_progress, u);
}

/* The step from nothing to a container. What it is given are the record's
 * committed version and its numbers, which become the container's labels. */
static void cube_unit_start(struct cube_unit *u)
{
    struct cube_worker *w = u->worker;
    const struct cube_version *v = u->rec->now;
    struct cube_start what;

    memset(&what, 0, sizeof what);
    what.task = v->task;
    what.cluster = v->keep.cluster;
    what.worker = w->uuid;
    what.attempt = v->task->attempt;
    what.progress = cube_unit_progressed;
    u->attempt = v->task->attempt;
    u->is_busy = u->is_starting = true;
    w->runtime->ops->start(w->runtime, &what, cube_unit_started, u);
}

/* A stop is over. Its container is not gone yet: the next step removes it. */
static void cube_unit_stopped(void *arg, const struct cube_err *err)
{
    struct cube_unit *u = arg;

    struct cube_container *box = u->stray ? u->stray : u->box;

    if (!err && box)
        box->state = CUBE_BOX_EXITED;
    cube_unit_step_ends(u, err);
}

/* A removal is over; a stray goes before the container that is meant. */
static void cube_unit_removed(void *arg, const struct cube_err *err)
{
    struct cube_unit *u = arg;

    if (!err && u->stray) {
        cube_box_free(u->stray);
        u->stray = NULL;
    } else if (!err) {
        cube_unit_set_box(u, NULL);
    }
    cube_unit_step_ends(u, err);
}

/* Stops what runs, removes what does not: the next step to be rid of it. */
static void cube_unit_dispose(struct cube_unit *u, struct cube_container *box)
{
    struct cube_worker *w = u->worker;
    int64_t grace_ms = u->rec->now->task->grace_ms;

    cube_health_stop(&u->health);
    u->is_busy = true;
    if (box->state == CUBE_BOX_RUNNING)
        w->runtime->ops->stop(w->runtime, box->id,
                              grace_ms > 0 ? grace_ms : CUBE_GRACE_MS,
                              cube_unit_stopped, u);
    else
        w->runtime->ops->remove(w->runtime, box->id, cube_unit_removed, u);
}

/* ---- Records: what is said about containers ---- */

/* Copies where the engine has put the ports to the task. */
static void cube_task_show_ports(struct cube_task *t,
                                 const struct cube_container *box)
{
    cube_task_unbind(t);
    for (size_t i = 0; i < box->ports.count; i++) {
        const struct cube_port *p = &box->ports.list[i];

        if (p->count == 0)
            cube_task_bind(t, p->port, NULL, NULL);
        for (size_t k = 0; k < p->count; k++)
            cube_task_bind(t, p->port, p->bindings[k].ip, p->bindings[k].port);
    }
    t->host_ports.is_null = false;
}

/* All that a running container says about its task. */
static void cube_task_show_running(struct cube_task *t,
                                   const struct cube_container *box)
{
    t->state = CUBE_RUNNING;
    cube_task_set(&t->container_id, box->id);
    cube_task_set(&t->error, "");
    cube_task_set(&t->progress, "");
    t->start_time = box->started;
    memset(&t->finish_time, 0, sizeof t->finish_time);
    memset(&t->restart_time, 0, sizeof t->restart_time);
    t->has_exit_code = false;
    cube_task_show_ports(t, box);
}

/* Running, on the record. */
static void cube_unit_record_running(struct cube_unit *u)
{
    struct cube_ledger *g = u->worker->ledger;

    cube_task_show_running(cube_record_edit(g, u->rec)->task, u->box);
    cube_record_stage(g, u->rec);
}

/* How it ended: in the engine's words, if it has any, else by its exit code. A
 * process that a signal ended has 128 and the signal's number. */
static void cube_unit_exit_words(const struct cube_container *box,
                                 struct cube_buf *out)
{
    if (box->error && *box->error)
        cube_buf_puts(out, box->error);
    else if (box->is_oom_killed)
        cube_buf_puts(out, "killed: out of memory");
    else if (box->exit_code > 128 && box->exit_code < 160)
        cube_buf_printf(out, "exited with code %d (signal %d)",
                        (int)box->exit_code, (int)box->exit_code - 128);
    else
        cube_buf_printf(out, "exited with code %d", (int)box->exit_code);
}

/* It has ended by itself: record how, and when it starts again. */
static void cube_unit_record_exit(struct cube_unit *u)
{
    struct cube_worker *w = u->worker;
    struct cube_version *v = cube_record_edit(w->ledger, u->rec);
    struct cube_task *t = v->task;
    struct cube_buf words = {0};
    const struct cube_container *box = u->box;

    cube_task_set(&t->container_id, box->id);
    if (cube_time_is_set(&box->started))
        t->start_time = box->started;
    if (cube_time_to_ns(&box->finished) - cube_time_to_ns(&t->start_time) >=
        CUBE_LONG_RUN_MS * 1000000LL)
        v->keep.restarts = 0;
    cube_unit_exit_words(box, &words);
    cube_version_fail(w, v, words.data);
    cube_buf_free(&words);
    t->has_exit_code = box->has_exit;
    t->exit_code = box->exit_code;
    if (cube_time_is_set(&box->finished))
        t->finish_time = box->finished;
    if (box->has_exit && box->exit_code == 0 && !box->is_oom_killed &&
        !cube_task_is_endless(t)) {
        t->state = CUBE_COMPLETED;
        cube_task_set(&t->error, "");
        memset(&t->restart_time, 0, sizeof t->restart_time);
    }
    cube_record_stage(w->ledger, u->rec);
}

/* Its engine took it along, or a hand stopped it: it is put away and started
 * again, and that counts as nothing. */
static void cube_unit_record_interrupted(struct cube_unit *u)
{
    struct cube_ledger *g = u->worker->ledger;
    struct cube_task *t;

    if (u->rec->now->task->state == CUBE_SCHEDULED) {
        cube_unit_dispose(u, u->box);
        return;
    }
    t = cube_record_edit(g, u->rec)->task;
    t->state = CUBE_SCHEDULED;
    cube_task_set(&t->error, "it was stopped by its engine, or by hand");
    cube_task_unbind(t);
    cube_record_stage(g, u->rec);
}

/* Its stop is true now. */
static void cube_unit_record_stopped(struct cube_unit *u)
{
    struct cube_worker *w = u->worker;
    struct cube_task *t = cube_record_edit(w->ledger, u->rec)->task;

    t->state = CUBE_COMPLETED;
    t->finish_time = cube_worker_now(w);
    memset(&t->restart_time, 0, sizeof t->restart_time);
    cube_task_set(&t->error, "");
    cube_task_set(&t->progress, "");
    cube_record_stage(w->ledger, u->rec);
}

/* The count goes to disk; the start follows once it is there. */
static void cube_unit_record_restart(struct cube_unit *u)
{
    struct cube_ledger *g = u->worker->ledger;
    struct cube_version *v = cube_record_edit(g, u->rec);

    u->is_due = false;
    v->keep.restarts++;
    v->task->restart_count++;
    v->task->state = CUBE_SCHEDULED;
    memset(&v->task->restart_time, 0, sizeof v->task->restart_time);
    cube_record_stage(g, u->rec);
}

/* ---- Health ---- */

/* Failed on the record; the next steps stop it and start it again. */
static void cube_unit_sick(void *arg, const char *words)
{
    struct cube_unit *u = arg;

    if (!u->rec->pending) /* else it changes anyhow, and is watched anew */
        cube_unit_fail(u, words);
}

/* ---- Reconciliation ---- */

/* Its time to be started again has come. */
static void cube_unit_due(void *arg)
{
    struct cube_unit *u = arg;

    u->is_due = true;
    cube_unit_touch(u);
}

/* It waits for its time, or its time has come. */
static void cube_unit_await_restart(struct cube_unit *u)
{
    struct cube_worker *w = u->worker;
    const struct cube_version *v = u->rec->now;
    int64_t most_ms = cube_backoff_ms(v->keep.restarts);
    int64_t in_ms = (cube_time_to_ns(&v->task->restart_time) -
                     w->world->wall_ns(w->world->ctx)) / 1000000;

    if (u->is_due && u->box)
        cube_unit_dispose(u, u->box);
    else if (u->is_due)
        cube_unit_record_restart(u);
    else if (!cube_timer_is_set(&u->due)) /* the wall clock may have jumped */
        cube_timer_set(w->loop, &u->due, in_ms < most_ms ? in_ms : most_ms,
                       cube_unit_due, u);
}

/* Health is the worker's matter, unless the manager sees to it itself. */
static void cube_unit_watch(struct cube_unit *u)
{
    if (!u->rec->now->keep.follows)
        cube_health_start(&u->health, u->worker->loop, u->rec->now->task, NULL,
                          cube_unit_sick, u);
}

/* What there is to see of a task that should run. */
static void cube_unit_keep_running(struct cube_unit *u)
{
    const struct cube_task *t = u->rec->now->task;
    const struct cube_container *box = u->box;
    bool is_active = t->state == CUBE_SCHEDULED || t->state == CUBE_RUNNING;

    if (is_active && box && box->is_interrupted &&
        !u->rec->now->keep.follows)
        cube_unit_record_interrupted(u);
    else if (is_active && box && box->state == CUBE_BOX_EXITED)
        cube_unit_record_exit(u);
    else if (is_active && box && box->state == CUBE_BOX_CREATED)
        cube_unit_dispose(u, u->box);
    else if (t->state == CUBE_RUNNING && !box)
        cube_unit_fail(u, "its container was removed by somebody else");
    else if (t->state == CUBE_SCHEDULED && !box)
        cube_unit_start(u);
    else if (t->state == CUBE_SCHEDULED ||
             (is_active && strcmp(t->container_id, box->id) != 0))
        cube_unit_record_running(u);
    else if (t->state == CUBE_RUNNING)
        cube_unit_watch(u);
    else if (box && box->state == CUBE_BOX_RUNNING)
        cube_unit_dispose(u, u->box);
    else if (cube_time_is_set(&t->restart_time))
        cube_unit_await_restart(u);
}

/* The one place where wanted and observed meet; takes at most one step. */
static void cube_unit_reconcile(struct cube_unit *u)
{
    struct cube_worker *w = u->worker;
    const struct cube_task *t;

    if (u->is_busy || u->rec->pending || !u->rec->now || !w->is_listed)
        return;
    t = u->rec->now->task;
    if (u->stray)
        cube_unit_dispose(u, u->stray);
    else if (u->box && (t->wanted == CUBE_WANT_STOP ||
                        cube_box_compare(u->box, t) != 0))
        cube_unit_dispose(u, u->box);
    else if (t->wanted != CUBE_WANT_STOP)
        cube_unit_keep_running(u);
    else if (!cube_task_is_finished(t))
        cube_unit_record_stopped(u);
    else if (u->rec->now->keep.is_hidden)
        cube_record_remove(w->ledger, u->rec);
}

/* Looks at each unit that was touched. A step may touch others, or the same
 * one again: then the pass goes on until none is left. */
static void cube_worker_pass(void *arg)
{
    struct cube_worker *w = arg;

    while (!cube_list_is_empty(&w->dirty)) {
        struct cube_unit *u = CUBE_OF(w->dirty.next, struct cube_unit, dirty);

        cube_list_remove(&u->dirty);
        cube_unit_reconcile(u);
    }
}

/* A change is on disk: tell those who follow, and look at what it asks for. */
static void cube_worker_changed(void *arg, struct cube_record *rec,
                                const struct cube_version *before)
{
    struct cube_worker *w = arg;
    struct cube_unit *u = cube_unit_of(w, rec);
    struct cube_buf line = {0};

    (void)before;
    cube_feed_task_line(&w->feed, w->feed.last + 1, rec->now->task,
                        rec->now->is_gone, &line);
    cube_feed_push(&w->feed, cube_buf_take(&line));
    if (rec->now->is_gone && !rec->pending) {
        cube_unit_free(u);
        rec->owner = NULL;
        return;
    }
    if (rec->now->task->state != CUBE_RUNNING)
        cube_health_stop(&u->health);
    if (u->is_starting && rec->now->task->wanted == CUBE_WANT_STOP)
        w->runtime->ops->start_cancel(w->runtime, rec->id);
    if (!cube_time_is_set(&rec->now->task->restart_time)) {
        cube_timer_clear(w->loop, &u->due);
        u->is_due = false;
    }
    cube_unit_touch(u);
}

/* A task whose first commit failed never was. */
static void cube_worker_dropped(void *arg, struct cube_record *rec)
{
    (void)arg;
    cube_unit_free(rec->owner);
}

/* Has every unit looked at. */
static void cube_worker_touch_all(void *arg)
{
    struct cube_worker *w = arg;
    struct cube_record *rec;

    for (size_t at = 0; (rec = cube_ledger_next(w->ledger, &at));)
        cube_unit_touch(cube_unit_of(w, rec));
}

/* A commit that failed leaves everything as it was: try again in a while. */
static void cube_worker_committed(void *arg, uint64_t commit,
                                  const struct cube_err *err)
{
    struct cube_worker *w = arg;

    (void)commit;
    if (!err)
        return;
    memcpy(w->next_cluster, w->cluster, sizeof w->next_cluster);
    w->next_epoch = w->epoch;
    cube_log(w->loop, CUBE_ERROR, "commit: %s", err->text);
    cube_timer_set(w->loop, &w->retry, CUBE_RETRY_COMMIT_MS,
                   cube_worker_touch_all, w);
}

/* ---- Looking: what the engine has ---- */

/* A container that nobody here knows, with our label: the store was lost, or
 * is older than it. Its labels say what it is. */
static void cube_worker_adopt(struct cube_worker *w,
                              const struct cube_container *box)
{
    struct cube_record *rec;
    struct cube_version *v;
    struct cube_task *t = NULL;
    struct cube_err err;

    if (cube_task_parse(box->spec, strlen(box->spec), false, &t, &err) < 0) {
        cube_log(w->loop, CUBE_WARN, "container %s: its label cube.spec: %s",
                 box->id, err.text);
        return;
    }
    rec = cube_ledger_find(w->ledger, t->id);
    if (!rec)
        rec = cube_ledger_add(w->ledger, t->id);
    v = cube_record_edit(w->ledger, rec);
    cube_task_free(v->task);
    v->task = t;
    t->attempt = box->attempt;
    t->restart_count = box->restart;
    t->wanted = CUBE_WANT_RUN;
    t->state = CUBE_SCHEDULED;
    (void)snprintf(v->keep.cluster, sizeof v->keep.cluster, "%s",
                   box->cluster);
    v->keep.follows = !*box->cluster;
    if (box->state == CUBE_BOX_RUNNING)
        cube_task_show_running(t, box);
    cube_unit_set_box(cube_unit_of(w, rec), box);
    cube_record_stage(w->ledger, rec);
    cube_log(w->loop, CUBE_INFO, "adopted task %s (%s)", t->id, t->name);
}

/* Gives a container to the unit it belongs to. Of two of one start the one
 * that runs is it; what is left over is a stray. */
static void cube_worker_assign(struct cube_worker *w,
                               const struct cube_container *box)
{
    struct cube_record *rec = cube_ledger_find(w->ledger, box->task);
    struct cube_version *v = rec ? cube_record_latest(rec) : NULL;
    int order = v && !v->is_gone ? cube_box_compare(box, v->task) : 1;
    struct cube_unit *u;

    if (order > 0) {
        if (!rec || !rec->pending)
            cube_worker_adopt(w, box);
        return;
    }
    u = cube_unit_of(w, rec);
    if (order == 0 && (!u->box || (u->box->state != CUBE_BOX_RUNNING &&
                                   box->state == CUBE_BOX_RUNNING))) {
        if (u->box && !u->stray)
            u->stray = cube_box_copy(u->box);
        cube_unit_set_box(u, box);
    } else if (!u->stray) {
        u->stray = cube_box_copy(box);
    }
}

/* Is every container that the engine was asked for accounted for. */
static void cube_worker_seen(void *arg, const struct cube_container *list,
                             size_t count, const struct cube_err *err)
{
    struct cube_worker *w = arg;
    struct cube_record *rec;

    w->is_listing = false;
    if (err) {
        if (w->look_tries++ == 0)
            cube_log(w->loop, CUBE_WARN, "list containers: %s", err->text);
        cube_worker_doubt(w);
        return;
    }
    w->look_tries = 0;
    w->is_listed = true;
    (void)snprintf(w->stats.engine, sizeof w->stats.engine, "%s",
                   w->runtime->engine_id);
    for (size_t at = 0; (rec = cube_ledger_next(w->ledger, &at));) {
        struct cube_unit *u = cube_unit_of(w, rec);

        if (u->is_busy || u->is_ahead) /* its step knows better */
            continue;
        cube_unit_set_box(u, NULL);
        cube_box_free(u->stray);
        u->stray = NULL;
    }
    for (size_t i = 0; i < count; i++) {
        struct cube_record *of = cube_ledger_find(w->ledger, list[i].task);
        struct cube_unit *u = of ? of->owner : NULL;

        if (!u || !(u->is_busy || u->is_ahead))
            cube_worker_assign(w, &list[i]);
    }
    cube_worker_touch_all(w);
    cube_timer_set(w->loop, &w->look, CUBE_LOOK_SLOW_MS, cube_worker_look, w);
}

/* Asks the engine for all containers that carry this worker's label, whatever
 * is known. Once at a time. */
static void cube_worker_look(void *arg)
{
    struct cube_worker *w = arg;
    struct cube_record *rec;

    if (w->is_listing || !w->runtime)
        return;
    w->is_listing = true;
    for (size_t at = 0; (rec = cube_ledger_next(w->ledger, &at));)
        cube_unit_of(w, rec)->is_ahead = false;
    w->runtime->ops->list(w->runtime, w->uuid, cube_worker_seen, w);
}

/* An inspection of a container that the engine said something about. */
struct cube_peek {
    struct cube_worker *worker;
    struct cube_list link;
    char id[CUBE_UUID_TEXT];
    char *box_id;
};

/* Its inspection must be over, or its runtime freed before. */
static void cube_peek_free(struct cube_peek *p)
{
    cube_list_remove(&p->link);
    cube_free(p->box_id);
    cube_free(p);
}

/* An inspection is over. It may be old news: the container may have been
 * replaced while it was under way, so its ID is compared. */
static void cube_worker_peeked(void *arg, const struct cube_container *box,
                               const struct cube_err *err)
{
    struct cube_peek *p = arg;
    struct cube_worker *w = p->worker;
    struct cube_record *rec = cube_ledger_find(w->ledger, p->id);
    struct cube_unit *u = rec ? rec->owner : NULL;

    if (err && cube_runtime_is_trouble(err)) {
        cube_worker_doubt(w);
    } else if (u && !u->is_busy && u->box &&
               strcmp(u->box->id, p->box_id) == 0) {
        cube_unit_set_box(u, box); /* NULL: it is gone */
        cube_unit_touch(u);
    }
    cube_peek_free(p);
}

/* The engine says that something changed: at one task, or (NULL) anywhere. */
static void cube_worker_stirred(void *arg, const char *task_id)
{
    struct cube_worker *w = arg;
    struct cube_record *rec = task_id ? cube_ledger_find(w->ledger, task_id)
                                      : NULL;
    struct cube_unit *u = rec ? rec->owner : NULL;
    struct cube_peek *p;

    if (u && u->is_busy)
        return;
    if (!u || !u->box) {
        cube_timer_set(w->loop, &w->look, 50, cube_worker_look, w);
        return;
    }
    p = cube_alloc(sizeof *p);
    p->worker = w;
    memcpy(p->id, rec->id, sizeof p->id);
    p->box_id = cube_text_dup(u->box->id);
    cube_list_add(&w->peeks, &p->link);
    w->runtime->ops->inspect(w->runtime, p->box_id, cube_worker_peeked, p);
}

/* ---- Its API ---- */

/* The record that a path names; answers 404 and returns NULL without one. */
static struct cube_record *cube_ledger_of(struct cube_ledger *g,
                                          struct cube_http_req *req)
{
    const char *text = cube_http_param(req, "id");
    char id[CUBE_UUID_TEXT];
    struct cube_record *rec = NULL;

    if (text && cube_uuid_parse(text, strlen(text), id) == 0)
        rec = cube_ledger_find(g, id);
    if (!rec || !rec->now || rec->now->is_gone)
        rec = NULL;
    if (!rec)
        cube_http_reply(req, 404, NULL, NULL, 0);
    return rec;
}

/* May this manager give orders? Answers 409 if not, with what the worker
 * knows, so that a manager of an older copy can learn of its age. An order
 * that is on its way to the disk counts already: a later one must not
 * overwrite its epoch with a lower one. The answer waits for it. */
static bool cube_worker_obeys(struct cube_worker *w, struct cube_http_req *req,
                              const char *cluster, int64_t epoch)
{
    struct cube_buf body = {0};

    if (!*w->next_cluster || w->take_over ||
        (strcmp(cluster, w->next_cluster) == 0 && epoch >= w->next_epoch))
        return true;
    cube_buf_printf(&body, "{\"HTTPStatusCode\":409,\"Message\":\"worker %s "
                    "belongs to cluster %s, epoch %lld: ", w->name,
                    w->next_cluster, (long long)w->next_epoch);
    if (strcmp(cluster, w->next_cluster) != 0)
        cube_buf_puts(&body, "start it with --take-over to change that");
    else
        cube_buf_printf(&body, "epoch %lld is over", (long long)epoch);
    cube_buf_printf(&body, "\",\"Cluster\":\"%s\",\"Epoch\":%lld}\n",
                    w->next_cluster, (long long)w->next_epoch);
    cube_reply_kept(w->commit, req, 409, &body);
    return false;
}

/* Whose orders it takes is on disk: from now on it knows. */
static void cube_worker_belongs(void *arg)
{
    struct cube_worker *w = arg;

    w->take_over = false;
    memcpy(w->cluster, w->next_cluster, sizeof w->cluster);
    w->epoch = w->next_epoch;
}

/* Stages whose orders it takes, in the commit that fills. */
static void cube_worker_note_cluster(struct cube_worker *w,
                                     const char *cluster, int64_t epoch)
{
    char number[24];

    (void)snprintf(w->next_cluster, sizeof w->next_cluster, "%s", cluster);
    w->next_epoch = epoch;
    if (strcmp(w->cluster, cluster) == 0 && w->epoch == epoch)
        return;
    (void)snprintf(number, sizeof number, "%lld", (long long)epoch);
    (void)cube_meta_put(w->store, "cluster", cluster, NULL);
    (void)cube_meta_put(w->store, "epoch", number, NULL);
    cube_ledger_join(w->ledger);
}

/* Makes a record, new or not, what the event asks for. */
static void cube_worker_take(struct cube_worker *w, struct cube_event *e)
{
    struct cube_record *rec = cube_ledger_find(w->ledger, e->task->id);
    struct cube_version *v;
    struct cube_task *t = e->task;

    if (!rec)
        rec = cube_ledger_add(w->ledger, t->id);
    v = cube_record_edit(w->ledger, rec);
    cube_task_free(v->task);
    v->task = t;
    e->task = NULL;
    v->is_gone = false;
    v->keep.is_hidden = false;
    v->keep.follows = !*e->cluster;
    v->keep.epoch = e->epoch;
    v->keep.budget = e->budget;
    v->keep.restarts = 0;
    memcpy(v->keep.cluster, e->cluster, sizeof v->keep.cluster);
    t->state = CUBE_SCHEDULED;
    t->wanted = CUBE_WANT_RUN;
    cube_task_set(&t->container_id, "");
    cube_task_set(&t->error, "");
    cube_task_set(&t->progress, "");
    t->has_exit_code = false;
    memset(&t->finish_time, 0, sizeof t->finish_time);
    memset(&t->restart_time, 0, sizeof t->restart_time);
    cube_task_unbind(t);
    cube_record_stage(w->ledger, rec);
    cube_unit_of(w, rec);
}

/* Stages the wish to stop, and with `forget` the wish to have its record
 * removed after. Said twice, it changes nothing. */
static void cube_worker_want_stop(struct cube_worker *w,
                                  struct cube_record *rec, bool forget)
{
    struct cube_version *v = cube_record_latest(rec);

    if (v->task->wanted == CUBE_WANT_STOP && (v->keep.is_hidden || !forget))
        return; /* it was told before */
    v = cube_record_edit(w->ledger, rec);
    v->task->wanted = CUBE_WANT_STOP;
    v->keep.is_hidden |= forget;
    cube_record_stage(w->ledger, rec);
}

/* An order of a manager that numbers no attempts: its State is the wish, and
 * the same task again means start it again. */
static void cube_worker_follow(struct cube_worker *w,
                               struct cube_http_req *req, struct cube_event *e)
{
    struct cube_record *rec = cube_ledger_find(w->ledger, e->task->id);
    struct cube_version *v = rec ? cube_record_latest(rec) : NULL;
    char id[CUBE_UUID_TEXT];
    struct cube_buf body = {0};
    bool is_stop = e->task->state == CUBE_COMPLETED ||
                   e->state == CUBE_COMPLETED;

    memcpy(id, e->task->id, sizeof id);
    if (is_stop && (!v || v->is_gone)) {
        cube_http_reply_error(req, 404, "task %s is unknown", id);
        return;
    }
    if (is_stop) {
        cube_worker_want_stop(w, rec, false);
    } else {
        e->task->attempt = v ? v->task->attempt + 1 : 1;
        cube_worker_take(w, e);
    }
    rec = cube_ledger_find(w->ledger, id);
    cube_task_print(cube_record_latest(rec)->task, &body);
    cube_buf_puts(&body, "\n");
    cube_reply_kept(w->commit, req, 201, &body);
}

/* An order of a manager of ours. Who may give it and whether it is news is
 * decided by cluster, epoch and attempt; the answer waits for the disk. */
static void cube_worker_order(struct cube_worker *w, struct cube_http_req *req,
                              struct cube_event *e)
{
    struct cube_record *rec = cube_ledger_find(w->ledger, e->task->id);
    struct cube_version *v = rec ? cube_record_latest(rec) : NULL;
    char id[CUBE_UUID_TEXT];
    struct cube_buf body = {0};
    struct cube_vow *p;

    if (!cube_worker_obeys(w, req, e->cluster, e->epoch))
        return;
    memcpy(id, e->task->id, sizeof id);
    if (v && !v->is_gone && v->task->attempt > e->task->attempt) {
        cube_http_reply_error(req, 409, "task %s: attempt %lld is over, this "
                              "worker has attempt %lld", id,
                              (long long)e->task->attempt,
                              (long long)v->task->attempt);
        return;
    }
    cube_worker_note_cluster(w, e->cluster, e->epoch);
    if (!v || v->is_gone || v->task->attempt < e->task->attempt)
        cube_worker_take(w, e); /* else it came twice: nothing changes */
    rec = cube_ledger_find(w->ledger, id);
    cube_task_print(cube_record_latest(rec)->task, &body);
    cube_buf_puts(&body, "\n");
    p = cube_reply_kept(w->commit, req, 201, &body);
    p->kept = cube_worker_belongs;
    p->kept_arg = w;
}

/* POST /tasks. Unknown fields are accepted, as the Go worker does; a body that
 * is no order is refused with 400 and changes nothing. */
static void cube_worker_post(void *arg, struct cube_http_req *req)
{
    struct cube_worker *w = arg;
    struct cube_event *e = NULL;
    struct cube_err err;
    size_t len;
    const char *body = cube_http_body(req, &len);

    if (cube_event_parse(body, len, false, &e, &err) < 0 ||
        (!e->task && cube_fail(&err, CUBE_EINVAL, "the event has no Task")) ||
        (!*e->task->id && cube_fail(&err, CUBE_EINVAL, "Task.ID is missing")) ||
        cube_task_check(e->task, &err) < 0)
        cube_http_reply_error(req, 400, "%s", err.text);
    else if (*e->cluster)
        cube_worker_order(w, req, e);
    else
        cube_worker_follow(w, req, e);
    cube_event_free(e);
}

/* DELETE /tasks/{id}: 204 once the wish is on disk, also for an attempt that
 * is over already; 404 for a task that is not here. */
static void cube_worker_delete(void *arg, struct cube_http_req *req)
{
    struct cube_worker *w = arg;
    struct cube_record *rec = cube_ledger_of(w->ledger, req);
    const char *attempt = cube_http_query(req, "attempt");
    const char *cluster = cube_http_query(req, "cluster");
    const char *epoch = cube_http_query(req, "epoch");
    uint64_t n = INT64_MAX, e = 0;

    if (!rec)
        return;
    if (attempt)
        (void)cube_text_u64(attempt, strlen(attempt), INT64_MAX, &n);
    if (epoch)
        (void)cube_text_u64(epoch, strlen(epoch), INT64_MAX, &e);
    if (cluster && !cube_worker_obeys(w, req, cluster, (int64_t)e))
        return;
    if (cube_record_latest(rec)->task->attempt <= (int64_t)n)
        cube_worker_want_stop(w, rec, cube_http_query(req, "forget") != NULL);
    cube_reply_kept(w->commit, req, 204, NULL);
}

/* A caller who waits for the engine, and may go away meanwhile. */
struct cube_asker {
    struct cube_worker *worker;
    struct cube_list link;
    struct cube_http_req *req; /* NULL: gone */
    struct cube_logs *logs;    /* what it reads, if it reads logs */
};

/* Takes it off the list of those who wait. */
static void cube_asker_free(struct cube_asker *a)
{
    cube_list_remove(&a->link);
    cube_free(a);
}

/* The caller went away: a log stream ends with it, an inspection runs on and
 * is then thrown away. */
static void cube_asker_gone(void *arg)
{
    struct cube_asker *a = arg;
    struct cube_runtime *rt = a->worker->runtime;

    a->req = NULL;
    if (!a->logs)
        return; /* the inspection's callback frees it */
    rt->ops->logs_cancel(rt, a->logs);
    cube_asker_free(a);
}

/* Keeps a request until the engine has answered. */
static struct cube_asker *cube_asker_new(struct cube_worker *w,
                                         struct cube_http_req *req)
{
    struct cube_asker *a = cube_alloc(sizeof *a);

    a->worker = w;
    a->req = req;
    cube_list_add(&w->askers, &a->link);
    cube_http_on_gone(req, cube_asker_gone, a);
    return a;
}

/* The engine's inspection goes out as it came; no container is 404, an engine
 * in trouble 502. */
static void cube_worker_inspected(void *arg, const char *json, size_t len,
                                  const struct cube_err *err)
{
    struct cube_asker *a = arg;

    if (a->req) {
        cube_http_on_gone(a->req, NULL, NULL);
        if (err)
            cube_http_reply_error(a->req, err->code == CUBE_ENOENT ? 404 : 502,
                                  "%s", err->text);
        else
            cube_http_reply(a->req, 200, "application/json", json, len);
    }
    cube_asker_free(a);
}

/* GET /tasks/{id}, for which the Go worker answers the engine's inspection. */
static void cube_worker_inspect(void *arg, struct cube_http_req *req)
{
    struct cube_worker *w = arg;
    struct cube_record *rec = cube_ledger_of(w->ledger, req);
    struct cube_unit *u = rec ? rec->owner : NULL;

    if (!rec)
        return;
    if (!u || !u->box || !w->runtime) {
        cube_http_reply_error(req, 404, "task %s has no container now: it is "
                              "%s%s%s", rec->id,
                              cube_state_name(rec->now->task->state),
                              *rec->now->task->error ? ": " : "",
                              rec->now->task->error);
        return;
    }
    w->runtime->ops->inspect_json(w->runtime, u->box->id,
                                  cube_worker_inspected,
                                  cube_asker_new(w, req));
}

/* A piece of a log, on to whoever reads it. */
static void cube_worker_log_data(void *arg, const char *p, size_t len)
{
    struct cube_asker *a = arg;

    cube_http_stream_write(a->req, p, len);
}

/* The log is over. After an error the connection is cut, so that the reader
 * does not take what came for all of it. */
static void cube_worker_log_end(void *arg, const struct cube_err *err)
{
    struct cube_asker *a = arg;

    cube_http_on_gone(a->req, NULL, NULL);
    if (err)
        cube_http_stream_abort(a->req);
    else
        cube_http_stream_end(a->req);
    cube_asker_free(a);
}

/* GET /tasks/{id}/logs. Without a container there is no log: 404 says so. */
static void cube_worker_logs(void *arg, struct cube_http_req *req)
{
    struct cube_worker *w = arg;
    struct cube_record *rec = cube_ledger_of(w->ledger, req);
    struct cube_unit *u = rec ? rec->owner : NULL;
    const char *tail = cube_http_query(req, "tail");
    const char *follow = cube_http_query(req, "follow");
    struct cube_logs_options options;
    struct cube_asker *a;
    uint64_t n = 0;

    if (!rec)
        return;
    if (tail && cube_text_u64(tail, strlen(tail), INT32_MAX, &n) < 0) {
        cube_http_reply_error(req, 400, "tail=%s is not a number", tail);
        return;
    }
    if (!u || !u->box || !w->runtime) {
        cube_http_reply_error(req, 404, "task %s has no container now, so "
                              "no logs", rec->id);
        return;
    }
    a = cube_asker_new(w, req);
    cube_http_stream(req, 200, "text/plain; charset=utf-8");
    memset(&options, 0, sizeof options);
    options.is_following = follow && strcmp(follow, "0") != 0;
    options.tail = tail ? (int64_t)n : -1;
    a->logs = w->runtime->ops->logs(w->runtime, u->box->id, &options,
                                    cube_worker_log_data, cube_worker_log_end,
                                    a);
}

/* GET /tasks. */
static void cube_worker_list(void *arg, struct cube_http_req *req)
{
    struct cube_worker *w = arg;

    cube_ledger_reply(w->ledger, req);
}

/* GET /stats: the reading of the last beat, at most a second old. */
static void cube_worker_stats(void *arg, struct cube_http_req *req)
{
    struct cube_worker *w = arg;
    struct cube_buf body = {0};

    cube_stats_print(&w->stats, &body);
    cube_buf_puts(&body, "\n");
    cube_http_reply(req, 200, "application/json", body.data, body.len);
    cube_buf_free(&body);
}

/* GET /events: the feed of chapter 7. */
static void cube_worker_events(void *arg, struct cube_http_req *req)
{
    struct cube_worker *w = arg;

    cube_feed_follow(&w->feed, req);
}

static const struct cube_http_route cube_worker_routes[] = {
    {"POST", "/tasks", cube_worker_post},
    {"GET", "/tasks", cube_worker_list},
    {"GET", "/tasks/{id}", cube_worker_inspect},
    {"DELETE", "/tasks/{id}", cube_worker_delete},
    {"GET", "/tasks/{id}/logs", cube_worker_logs},
    {"GET", "/stats", cube_worker_stats},
    {"GET", "/events", cube_worker_events},
    {"GET", "/healthz", cube_reply_healthy},
    {NULL, NULL, NULL},
};

/* ---- Signs of life ---- */

/* One task of the full list that a reset is followed by. */
static bool cube_worker_feed_list(void *arg, size_t *at, struct cube_buf *out)
{
    struct cube_worker *w = arg;
    struct cube_record *rec = cube_ledger_next(w->ledger, at);

    if (rec && !rec->now->is_gone)
        cube_feed_task_line(&w->feed, w->feed.last, rec->now->task, false,
                            out);
    return rec != NULL;
}

/* Tasks that hold, or are about to hold, a part of the machine. */
static int64_t cube_worker_count(struct cube_worker *w)
{
    struct cube_record *rec;
    int64_t n = 0;

    for (size_t at = 0; (rec = cube_ledger_next(w->ledger, &at));)
        n += !cube_task_is_finished(rec->now->task);
    return n;
}

/* Once a second: the machine's metrics, to all who follow. It is the sign of
 * life by which a manager knows that this worker is there. */
static void cube_worker_beat(void *arg)
{
    struct cube_worker *w = arg;
    struct cube_buf line = {0};
    struct cube_err err;

    if (cube_machine_read(w->machine, "/", &w->stats, &err) < 0)
        cube_log(w->loop, CUBE_WARN, "%s", err.text);
    w->stats.task_count = cube_worker_count(w);
    cube_buf_puts(&line, "{\"Type\":\"stats\",\"Stats\":");
    cube_stats_print(&w->stats, &line);
    cube_buf_puts(&line, "}\n");
    cube_feed_beat(&w->feed, line.data, line.len);
    cube_buf_free(&line);
    cube_timer_set(w->loop, &w->beat, CUBE_BEAT_MS, cube_worker_beat, w);
}

/* What the feed says first to who begins to follow. A worker that waits to be
 * taken over belongs to nobody. A manager gives no tasks to a worker before it
 * has seen its stats, so these come soon after. */
static void cube_worker_hello(void *arg, struct cube_buf *out)
{
    struct cube_worker *w = arg;

    cube_buf_printf(out, ",\"Worker\":\"%s\",\"Cluster\":\"%s\","
                    "\"Epoch\":%lld", w->uuid,
                    w->take_over ? "" : w->cluster,
                    w->take_over ? 0 : (long long)w->epoch);
    cube_timer_set(w->loop, &w->beat, CUBE_FIRST_BEAT_MS, cube_worker_beat, w);
}

/* What ended longer ago than `keep_ms` is forgotten, container and all. */
static void cube_worker_sweep(void *arg)
{
    struct cube_worker *w = arg;
    int64_t old = w->world->wall_ns(w->world->ctx) - w->keep_ms * 1000000;
    struct cube_record *rec;

    for (size_t at = 0; (rec = cube_ledger_next(w->ledger, &at));) {
        const struct cube_task *t = rec->now->task;

        if (!rec->pending && cube_task_is_finished(t) &&
            cube_time_to_ns(&t->finish_time) < old && !rec->now->is_gone)
            cube_worker_want_stop(w, rec, true);
    }
    cube_timer_set(w->loop, &w->sweep, CUBE_SWEEP_MS, cube_worker_sweep, w);
}

/* ---- Joining a manager ---- */

static void cube_worker_rejoin(void *arg); /* mutual recursion */

/* The manager's answer. A refusal is said once for each try, with its reason:
 * a wrong token, say, can be mended while the worker waits. */
static void cube_worker_joined(void *arg, const struct cube_http_answer *a)
{
    struct cube_worker *w = arg;
    bool is_in = !a->err && a->status == 201;

    w->joining = NULL;
    if (is_in && !w->has_joined)
        cube_log(w->loop, CUBE_INFO, "joined manager %s", w->join);
    else if (!is_in)
        cube_log(w->loop, CUBE_WARN, "join manager %s: %s%.*s", w->join,
                 a->err ? a->err->text : "it refused: ",
                 a->err ? 0 : (int)(a->body_len < 300 ? a->body_len : 300),
                 a->body ? a->body : "");
    w->has_joined = is_in;
    cube_timer_set(w->loop, &w->rejoin, CUBE_JOIN_MS, cube_worker_rejoin, w);
}

/* Registers, and again whenever no manager has followed us for a while. */
static void cube_worker_rejoin(void *arg)
{
    struct cube_worker *w = arg;
    struct cube_buf body = {0};
    struct cube_http_request r;

    if (w->has_joined && !cube_list_is_empty(&w->feed.followers)) {
        cube_timer_set(w->loop, &w->rejoin, CUBE_JOIN_MS, cube_worker_rejoin,
                       w);
        return;
    }
    cube_buf_printf(&body, "{\"Name\":\"%s\",\"Worker\":\"%s\"}",
                    w->advertise, w->uuid);
    memset(&r, 0, sizeof r);
    r.method = "POST";
    r.target = "/nodes";
    r.body = body.data;
    r.body_len = body.len;
    r.timeout_ms = CUBE_JOIN_MS;
    r.on_done = cube_worker_joined;
    r.arg = w;
    w->joining = cube_http_call(w->joiner, &r);
    cube_buf_free(&body);
}

/* Can only this machine reach "host:port"? */
static bool cube_host_is_loopback(const char *where)
{
    return cube_text_starts(where, "127.") ||
           cube_text_starts(where, "localhost") ||
           cube_text_starts(where, "[::1]");
}

/* Does "host:port" mean all addresses, so that it names none? */
static bool cube_host_is_any(const char *where)
{
    return where[0] == ':' || cube_text_starts(where, "0.0.0.0") ||
           cube_text_starts(where, "[::]");
}

/* Where managers find this worker: what was said, or where it listens. */
static int cube_worker_plan_join(struct cube_worker *w, struct cube_err *err)
{
    struct cube_buf base = {0};

    if (!w->advertise) {
        const char *colon = strrchr(w->listen, ':');
        struct cube_buf at = {0};

        if (cube_host_is_any(w->listen))
            return cube_fail(err, CUBE_EINVAL, "join %s: the worker listens "
                             "on all addresses: say with --advertise "
                             "host:port at which the manager finds it",
                             w->join);
        cube_buf_add(&at, w->listen, (size_t)(colon - w->listen));
        cube_buf_printf(&at, ":%u", cube_http_port(w->server));
        w->advertise = cube_buf_take(&at);
    }
    if (cube_host_is_loopback(w->advertise) && !cube_host_is_loopback(w->join))
        return cube_fail(err, CUBE_EINVAL, "join %s: the worker is at %s, "
                         "which no other machine can reach: let it listen "
                         "elsewhere with --host", w->join, w->advertise);
    cube_buf_printf(&base, "http://%s", w->join);
    w->joiner = cube_http_client_new(w->loop, base.data, w->token, err);
    cube_buf_free(&base);
    if (!w->joiner)
        return -1;
    cube_timer_set(w->loop, &w->rejoin, 0, cube_worker_rejoin, w);
    return 0;
}

/* ---- Beginning and end ---- */

/* Its UUID. A worker whose file is gone is still the same to its containers,
 * so a new one is derived from what stays: machine, name, place. */
static void cube_worker_derive(struct cube_worker *w)
{
    struct cube_buf from = {0};
    unsigned char hash[32];

    cube_buf_printf(&from, "%s\n%s\n%s", w->stats.machine, w->name,
                    w->data_dir);
    cube_sha256(from.data, from.len, hash);
    hash[6] = (unsigned char)(0x80 | (hash[6] & 0x0f)); /* RFC 9562: custom */
    hash[8] = (unsigned char)(0x80 | (hash[8] & 0x3f));
    cube_uuid_write(hash, w->uuid);
    cube_buf_free(&from);
}

/* Who this worker is, and whose: from its store, or derived anew. */
static void cube_worker_identify(struct cube_worker *w)
{
    struct cube_buf text = {0};
    uint64_t epoch;

    if (cube_meta_get(w->store, "worker", &text) &&
        cube_uuid_parse(text.data, text.len, w->uuid) == 0) {
        if (cube_meta_get(w->store, "cluster", &text))
            (void)cube_uuid_parse(text.data, text.len, w->cluster);
        if (cube_meta_get(w->store, "epoch", &text) &&
            cube_text_u64(text.data, text.len, INT64_MAX, &epoch) == 0)
            w->epoch = (int64_t)epoch;
        memcpy(w->next_cluster, w->cluster, sizeof w->next_cluster);
        w->next_epoch = w->epoch;
    } else {
        cube_worker_derive(w);
        (void)cube_meta_put(w->store, "worker", w->uuid, NULL);
    }
    cube_buf_free(&text);
}

/* Opens the worker's file (or its twin in memory) and reads what is in it. */
static int cube_worker_open_store(struct cube_worker *w, const char *kind,
                                  struct cube_err *err)
{
    struct cube_buf path = {0};
    struct cube_store_options options;
    bool is_memory = kind && strcmp(kind, "memory") == 0;

    if (kind && !is_memory && strcmp(kind, "persistent") != 0)
        return cube_fail(err, CUBE_EINVAL, "store %s: there are persistent "
                         "and memory", kind);
    if (cube_dir_make(w->world, w->data_dir, err) < 0)
        return -1;
    cube_buf_printf(&path, "%s/worker-%s.cube", w->data_dir, w->name);
    memset(&options, 0, sizeof options);
    options.is_sync_split = true;
    w->store = cube_store_open(w->world, is_memory ? NULL : path.data,
                               &options, err);
    cube_buf_free(&path);
    if (!w->store)
        return -1;
    w->commit = cube_commit_open(w->loop, w->store);
    cube_worker_identify(w);
    w->ledger = cube_ledger_open(w->loop, w->store, w->commit,
                                 cube_worker_changed, cube_worker_committed,
                                 cube_worker_dropped, w, err);
    return w->ledger ? 0 : -1;
}

/* From here on there is a runtime: look at what it has. */
static void cube_worker_use(struct cube_worker *w, struct cube_runtime *rt)
{
    w->runtime = rt;
    (void)snprintf(w->stats.runtime, sizeof w->stats.runtime, "%s", rt->name);
    rt->ops->watch(rt, cube_worker_stirred, w);
    cube_worker_look(w);
}

static void cube_worker_find(void *arg); /* mutual recursion */

/* The search for a runtime is over. */
static void cube_worker_found(void *arg, struct cube_runtime *rt,
                              const char *words, const struct cube_err *err)
{
    struct cube_worker *w = arg;

    w->finding = NULL;
    cube_log(w->loop, rt ? CUBE_INFO : CUBE_ERROR, "runtime: %s",
             rt ? words : err->text);
    if (!rt) { /* the engine that was asked for may come later */
        cube_timer_set(w->loop, &w->look, CUBE_LOOK_MAX_MS, cube_worker_find,
                       w);
        return;
    }
    cube_worker_use(w, rt);
}

/* Looks for the runtime that was asked for, or for the best there is. */
static void cube_worker_find(void *arg)
{
    struct cube_worker *w = arg;

    w->finding = cube_runtime_find(w->loop, w->runtime_name, w->run_dir,
                                   cube_worker_found, w);
}

/* Opens its port. The name that it tells managers to call it by is one that it
 * must answer to, besides those that it was given. */
static int cube_worker_listen(struct cube_worker *w,
                              const struct cube_worker_options *o,
                              struct cube_err *err)
{
    struct cube_http_options http;
    const char *name = w->advertise ? w->advertise : "localhost";
    char *host = cube_text_ndup(name, strcspn(name, ":"));
    const char **names;
    size_t count = 0;

    while (o->host_names && o->host_names[count])
        count++;
    names = cube_alloc((count + 2) * sizeof *names);
    names[0] = host;
    for (size_t i = 0; i < count; i++)
        names[i + 1] = o->host_names[i];
    memset(&http, 0, sizeof http);
    http.tokens[0] = o->tokens[0];
    http.tokens[1] = o->tokens[1];
    http.host_names = names;
    http.is_open_health = true;
    w->server = cube_http_listen(w->loop, w->listen, cube_worker_routes, w,
                                 &http, err);
    cube_free(names);
    cube_free(host);
    return w->server ? 0 : -1;
}

/* The steps of cube_worker_new that can fail; cube_worker_free frees what they
 * leave behind. */
static int cube_worker_start(struct cube_worker *w,
                             const struct cube_worker_options *o,
                             struct cube_err *err)
{
    struct cube_record *rec;

    w->machine = cube_machine_new(w->world);
    if (cube_machine_read(w->machine, "/", &w->stats, err) < 0 ||
        cube_worker_open_store(w, o->store, err) < 0)
        return -1;
    for (size_t at = 0; (rec = cube_ledger_next(w->ledger, &at));)
        cube_unit_of(w, rec);
    if (cube_worker_listen(w, o, err) < 0 ||
        (w->join && cube_worker_plan_join(w, err) < 0))
        return -1;
    if (o->own_runtime)
        cube_worker_use(w, o->own_runtime);
    else
        cube_worker_find(w);
    cube_worker_beat(w);
    cube_worker_sweep(w);
    return 0;
}

CUBE_API struct cube_worker *
cube_worker_new(struct cube_loop *l, const struct cube_worker_options *o,
                struct cube_err *err)
{
    struct cube_worker *w = cube_alloc(sizeof *w);
    char stream[CUBE_UUID_TEXT];
    struct cube_buf run_dir = {0};

    w->loop = l;
    w->world = cube_loop_world(l);
    w->name = cube_text_dup(o->name ? o->name : "worker");
    w->listen = cube_text_dup(o->listen ? o->listen : "127.0.0.1:5556");
    w->data_dir = cube_text_dup(o->data_dir ? o->data_dir : ".");
    w->runtime_name = cube_text_dup(o->runtime ? o->runtime : "auto");
    cube_buf_printf(&run_dir, "%s/worker-%s", w->data_dir, w->name);
    w->run_dir = cube_buf_take(&run_dir);
    w->join = cube_text_dup(o->join);
    w->advertise = cube_text_dup(o->advertise);
    w->token = cube_text_dup(o->tokens[0]);
    w->keep_ms = o->keep_ms > 0 ? o->keep_ms : CUBE_KEEP_MS;
    w->take_over = o->take_over;
    cube_list_init(&w->dirty);
    cube_list_init(&w->peeks);
    cube_list_init(&w->askers);
    cube_uuid_new(w->world, stream);
    cube_feed_init(&w->feed, l, stream, 0);
    w->feed.list = cube_worker_feed_list;
    w->feed.hello = cube_worker_hello;
    w->feed.arg = w;
    if (cube_worker_start(w, o, err) < 0) {
        cube_worker_free(w);
        return NULL;
    }
    return w;
}

/* The ledger knows the records; what hangs on them is the worker's. */
static void cube_worker_free_units(struct cube_worker *w)
{
    void *value;

    for (size_t at = 0;
         w->ledger && cube_map_next(&w->ledger->records, &at, NULL, &value);)
        cube_unit_free(((struct cube_record *)value)->owner);
}

/* Who waits for the engine waits in vain: its callbacks do not run. */
static void cube_worker_free_askers(struct cube_worker *w)
{
    while (!cube_list_is_empty(&w->peeks))
        cube_peek_free(CUBE_OF(w->peeks.next, struct cube_peek, link));
    while (!cube_list_is_empty(&w->askers))
        cube_asker_free(CUBE_OF(w->askers.next, struct cube_asker, link));
}

/* All that cube_worker_new copied. */
static void cube_worker_free_texts(struct cube_worker *w)
{
    cube_free(w->name);
    cube_free(w->listen);
    cube_free(w->data_dir);
    cube_free(w->runtime_name);
    cube_free(w->run_dir);
    cube_free(w->join);
    cube_free(w->advertise);
    cube_free(w->token);
}

CUBE_API void cube_worker_free(struct cube_worker *w)
{
    if (!w)
        return;
    cube_feed_close(&w->feed);
    cube_http_close(w->server); /* cancels the logs that are being read */
    cube_runtime_find_cancel(w->finding);
    cube_runtime_free(w->runtime);
    cube_worker_free_askers(w);
    cube_timer_clear(w->loop, &w->beat);
    cube_timer_clear(w->loop, &w->sweep);
    cube_timer_clear(w->loop, &w->look);
    cube_timer_clear(w->loop, &w->rejoin);
    cube_timer_clear(w->loop, &w->retry);
    if (w->joining)
        cube_http_call_cancel(w->joining);
    cube_http_client_free(w->joiner);
    cube_worker_free_units(w);
    cube_defer_clear(w->loop, &w->pass);
    cube_ledger_close(w->ledger);
    cube_commit_close(w->commit);
    cube_store_close(w->store);
    cube_machine_free(w->machine);
    cube_worker_free_texts(w);
    cube_free(w);
}

CUBE_API uint16_t cube_worker_port(struct cube_worker *w)
{
    return cube_http_port(w->server);
}


/* ==== Chapter 12. Manager ==== uses: 1 2 3 4 5 6 7 8 10 ==== */
/*
 * The problem. Users say what should run; workers come, go, and come back
 * with work that by then runs elsewhere; messages are late, lost and doubled;
 * and the manager itself may be killed at any moment after it has said 201.
 *
 * The simplest thing that works is what the worker does, one floor higher:
 * what is wanted stands in records on disk, what is observed is what workers
 * report, and one function compares both and takes one step:
 *
 *     POST, DELETE                 GET /events of each worker
 *          |                                |
 *          v                                v
 *     record (ledger, disk)        report (memory, by node and task)
 *          \                                /
 *           +---> cube_charge_reconcile <--+
 *                          |
 *        edit the record, or send an order to one worker
 *
 *   record               its node's report      the step
 *   ------------------   --------------------   ----------------------------
 *   run, Pending         -                      place it: node, attempt + 1
 *   run, on a node       (node lost)            Pending again
 *   run, on a node       none, older attempt    deliver it
 *   run, on a node       of its attempt         copy what it says
 *   run, on a node       gave up                one move, then Failed
 *   run, on a node       newer attempt          adopt it (an older copy of
 *                                               the store was restored)
 *   stop, Pending        -                      Completed
 *   stop, on a node      active                 order the stop
 *   stop, on a node      ended, or none         Completed
 *   (none)               active                 adopt it
 *   finished, elsewhere  active                 order the stop of that attempt
 *
 * Who may say what. Each start of a manager raises its epoch on disk first,
 * and each placement raises the task's attempt on disk before it is
 * delivered. A worker obeys the newest of both, so an order that was late
 * changes nothing, and an order may be repeated until it is answered.
 *
 *        manager            worker a           worker b
 *          | attempt 1 ------> runs 1
 *          |        x----------- (link cut: a is lost after 5 s)
 *          | attempt 2 -------------------------> runs 2
 *          | <---- "I run 1" -- (link back)
 *          | stop <= 1 ------> stops 1            runs 2
 *
 * A lost node is one that gave no sign of life for 5 s. A manager that was
 * itself asleep (its own clock tells: more than 2 s between two ticks) blames
 * itself and gives every node a new grace. When at least three nodes and more
 * than half of them vanish at once the fault is more likely here or in
 * between, and moves are paced.
 *
 * Events. Each change is a line in the tree `events` under its number, in the
 * same commit as the change; the feed shows it once it is on disk. The
 * stream's name is the cluster, so those who follow can resume across
 * restarts of the manager.
 *
 * Workers of the Go program know no events: they answer 404, and are asked
 * for tasks and stats every two seconds. They neither restart nor check
 * health, so for their tasks the manager does.
 *
 * Interface: cube_manager_new, cube_manager_free, and over HTTP:
 *
 *    POST   /tasks                 an event or a task: 201 when it is on disk
 *    GET    /tasks, /tasks/{id}    what is known
 *    DELETE /tasks/{id}            stop it; with ?forget=1 remove what ended
 *    GET    /tasks/{id}/logs       from its worker
 *    GET    /tasks/{id}/inspect    from its worker
 *    GET    /nodes                 the workers
 *    POST   /nodes                 a worker joins
 *    DELETE /nodes/{name}          forget a worker
 *    GET    /events, /healthz
 *
 * Naive on purpose: each pass over waiting tasks adds up what is promised to
 * every node anew. That is linear in the tasks, and fine for tens of
 * thousands of them.
 */

#define CUBE_TREE_NODES "nodes"
#define CUBE_TREE_EVENTS "events"
#define CUBE_LOST_MS 5000
#define CUBE_TICK_MS 250
#define CUBE_ASLEEP_MS 2000     /* between two ticks: it was us */
#define CUBE_DIAL_MS 200        /* before a worker is called again */
#define CUBE_DIAL_MAX_MS 2000
#define CUBE_ORDER_MS 10000     /* for a worker to answer an order */
#define CUBE_RETRY_MS 500       /* before an order is repeated; doubles */
#define CUBE_RETRY_MAX_MS 8000
#define CUBE_POLL_MS 2000       /* of a worker without events */
#define CUBE_QUEUE_MS 60000     /* such a worker has for each order */
#define CUBE_EXPLAIN_MS 30000   /* between two new reasons to wait */
#define CUBE_PACED_MS 1000      /* between two moves when many nodes vanish */
#define CUBE_LINE_MAX (4 << 20) /* of a worker's event */
#define CUBE_NODES_MAX 10000
#define CUBE_SWEEP_EVENTS 1000  /* old events removed in one second */

struct cube_manager {
    struct cube_loop *loop;
    const struct cube_world *world;
    char *data_dir, *token;
    int64_t keep_ms, lost_after_ms;
    char cluster[CUBE_UUID_TEXT];
    int64_t epoch;

    struct cube_store *store;
    struct cube_commit *commit;
    struct cube_ledger *ledger;
    struct cube_feed feed;
    uint64_t staged_seq;            /* the newest number given to an event */
    struct cube_list lines;         /* of struct cube_line, not on disk yet */
    struct cube_http_server *server;
    const struct cube_scheduler *scheduler;
    struct cube_scheduler *own_scheduler; /* what is freed with it */

    struct cube_list members;
    size_t member_count;
    struct cube_list dirty;         /* charges to reconcile */
    struct cube_defer pass;
    struct cube_timer tick;
    int64_t last_tick_ms, last_move_ms, last_sweep_ms;
    bool is_paced;                  /* many nodes vanished at once */
    bool has_room;                  /* something changed for those who wait */
    struct cube_promises *promises; /* of this pass, or NULL */
};

/* An event that is staged; shown when its commit is on disk. */
struct cube_line {
    struct cube_list link;
    uint64_t commit;
    char *text;
};

/* What a worker says of a task. */
struct cube_report {
    struct cube_task *task;
    bool is_seen;                  /* in the listing that is under way */
    struct cube_http_call *order;  /* a stop that is under way */
    int64_t next_ms;               /* not to be ordered again before */
    int64_t queued_ms;             /* polled: until then the order counts,
                                      though the worker does not show it */
    int tries;
    struct cube_member *member;
};

enum cube_member_state { CUBE_NODE_NEW, CUBE_NODE_UP, CUBE_NODE_LOST };

/* A worker, as its manager knows it. */
struct cube_member {
    struct cube_manager *manager;
    struct cube_list link;
    char *name, *api;
    char uuid[CUBE_UUID_TEXT];
    bool is_default;      /* nobody named it: shown once it has answered */
    bool is_polled;       /* a worker of the Go program */
    bool is_doubted;      /* it may be another program by now */
    bool is_told;         /* its events come; else what comes is an error */
    bool is_listed;       /* its reports are complete */
    char *refusal;        /* why it takes no orders from us, or NULL */
    enum cube_member_state state;
    int64_t last_sign_ms;
    struct cube_http_client *client;
    struct cube_http_call *call;   /* events, or a poll */
    struct cube_timer dial;
    int64_t dial_ms;
    struct cube_buf text;          /* of an event's line so far */
    char stream[CUBE_UUID_TEXT];
    uint64_t seq;
    struct cube_stats stats;
    bool has_stats;
    struct cube_map reports;       /* by task ID */
};

/* A task that the manager has in its charge: its record, and the order that
 * is under way for it. */
struct cube_charge {
    struct cube_manager *manager;
    struct cube_record *rec;
    struct cube_list dirty;
    struct cube_http_call *order;
    struct cube_timer retry;
    int tries;
    int64_t explained_ms;
    struct cube_health health;     /* of a task on a polled worker */
};

static void cube_manager_pass(void *arg); /* mutual recursion */

/* ---- Charges ---- */

/* The charge of a record, made when it is first asked for. */
static struct cube_charge *cube_charge_of(struct cube_manager *m,
                                          struct cube_record *rec)
{
    struct cube_charge *c = rec->owner;

    if (c)
        return c;
    c = cube_alloc(sizeof *c);
    c->manager = m;
    c->rec = rec;
    cube_list_init(&c->dirty);
    rec->owner = c;
    return c;
}

/* Has it looked at, later in this turn or in the next one. */
static void cube_charge_touch(struct cube_charge *c)
{
    struct cube_manager *m = c->manager;

    cube_list_remove(&c->dirty);
    cube_list_add(&m->dirty, &c->dirty);
    cube_defer_set(m->loop, &m->pass, cube_manager_pass, m);
}

/* An order that is under way is given up; the worker may still take it, and
 * reports it then. */
static void cube_charge_free(struct cube_charge *c)
{
    if (!c)
        return;
    cube_health_stop(&c->health);
    cube_timer_clear(c->manager->loop, &c->retry);
    if (c->order)
        cube_http_call_cancel(c->order);
    cube_list_remove(&c->dirty);
    cube_free(c);
}

/* Has the task of that ID looked at, if there is one. */
static void cube_manager_touch(struct cube_manager *m, const char *id)
{
    struct cube_record *rec = cube_ledger_find(m->ledger, id);

    if (rec)
        cube_charge_touch(cube_charge_of(m, rec));
}

/* Has every task looked at: something changed that may concern all. */
static void cube_manager_touch_all(struct cube_manager *m)
{
    struct cube_record *rec;

    for (size_t at = 0; (rec = cube_ledger_next(m->ledger, &at));)
        cube_charge_touch(cube_charge_of(m, rec));
}

/* The wall's time, for records. Never used to measure how long something took.
 */
static struct cube_time cube_manager_now(struct cube_manager *m)
{
    return cube_time_from_ns(m->world->wall_ns(m->world->ctx));
}

/* ---- Events ---- */

/* Stages a line for the feed in the commit that fills; takes it over. */
static void cube_manager_log_event(struct cube_manager *m,
                                   struct cube_buf *text)
{
    struct cube_line *line = cube_alloc(sizeof *line);
    unsigned char key[8];

    cube_number_key((int64_t)++m->staged_seq, key);
    (void)cube_store_put(m->store, CUBE_TREE_EVENTS, key, sizeof key,
                         text->data, text->len, NULL);
    line->commit = cube_commit_number(m->commit);
    line->text = cube_buf_take(text);
    cube_list_add(&m->lines, &line->link);
    cube_ledger_join(m->ledger);
}

/* Stages a record that was edited, with its event. */
static void cube_manager_stage(struct cube_manager *m, struct cube_record *rec)
{
    const struct cube_version *v = cube_record_latest(rec);
    struct cube_buf text = {0};

    cube_record_stage(m->ledger, rec);
    cube_feed_task_line(&m->feed, m->staged_seq + 1, v->task,
                        v->is_gone || v->keep.is_hidden, &text);
    cube_manager_log_event(m, &text);
}

/* mutual recursion */
static void cube_member_print(struct cube_member *n, struct cube_buf *out);

/* Stages an event that tells a node's state. */
static void cube_manager_log_node(struct cube_manager *m,
                                  struct cube_member *n)
{
    struct cube_buf text = {0};
    char now[CUBE_TIME_TEXT];
    struct cube_time t = cube_manager_now(m);

    cube_time_format(&t, now);
    cube_buf_printf(&text, "{\"Type\":\"node\",\"Stream\":\"%s\","
                    "\"Seq\":%llu,\"Time\":\"%s\",\"Node\":", m->feed.stream,
                    (unsigned long long)m->staged_seq + 1, now);
    cube_member_print(n, &text);
    cube_buf_puts(&text, "}\n");
    cube_manager_log_event(m, &text);
}

/* A commit is done: show its events, or drop all that was staged. */
static void cube_manager_committed(void *arg, uint64_t commit,
                                   const struct cube_err *err)
{
    struct cube_manager *m = arg;

    while (!cube_list_is_empty(&m->lines)) {
        struct cube_line *line =
            CUBE_OF(m->lines.next, struct cube_line, link);

        if (!err && line->commit != commit)
            break;
        cube_list_remove(&line->link);
        if (err)
            cube_free(line->text);
        else
            cube_feed_push(&m->feed, line->text);
        cube_free(line);
    }
    if (!err)
        return;
    m->staged_seq = m->feed.last;
    m->has_room = true; /* the next tick looks at all of them again */
    cube_log(m->loop, CUBE_ERROR, "commit: %s", err->text);
}

/* ---- Members ---- */

/* Linear: a cluster has few nodes, next to what each of them says. */
static struct cube_member *cube_manager_member(struct cube_manager *m,
                                               const char *name)
{
    struct cube_list *link;

    for (link = m->members.next; link != &m->members; link = link->next) {
        struct cube_member *n = CUBE_OF(link, struct cube_member, link);

        if (strcmp(n->name, name) == 0)
            return n;
    }
    return NULL;
}

/* A stop that is under way is given up. */
static void cube_report_free(struct cube_report *r)
{
    if (r->order)
        cube_http_call_cancel(r->order);
    cube_task_free(r->task);
    cube_free(r);
}

/* What this worker says of a task, or NULL; `n` may be NULL. */
static struct cube_report *cube_member_report(struct cube_member *n,
                                              const char *id)
{
    return n ? cube_map_get(&n->reports, id) : NULL;
}

/* The worker does not have that task any more. */
static void cube_member_drop(struct cube_member *n, const char *id)
{
    struct cube_report *r = cube_map_remove(&n->reports, id);

    if (r)
        cube_report_free(r);
    cube_manager_touch(n->manager, id);
}

/* Forgets all reports, or those that a listing has not shown, unless it is
 * too early for that. */
static void cube_member_forget(struct cube_member *n, bool unseen_only)
{
    const char *id;
    void *value;

    for (size_t at = 0; cube_map_next(&n->reports, &at, &id, &value);) {
        struct cube_report *r = value;
        char copy[CUBE_UUID_TEXT];

        if (unseen_only &&
            (r->is_seen || r->queued_ms > cube_loop_now_ms(n->manager->loop)))
            continue;
        (void)snprintf(copy, sizeof copy, "%s", id);
        cube_member_drop(n, copy);
    }
}

/* Takes it off the list. Its tasks stay where their records say. */
static void cube_member_free(struct cube_member *n)
{
    struct cube_manager *m = n->manager;

    cube_timer_clear(m->loop, &n->dial);
    if (n->call)
        cube_http_call_cancel(n->call);
    cube_member_forget(n, false);
    cube_map_free(&n->reports);
    cube_http_client_free(n->client);
    cube_list_remove(&n->link);
    m->member_count--;
    cube_buf_free(&n->text);
    cube_free(n->name);
    cube_free(n->api);
    cube_free(n->refusal);
    cube_free(n);
}

/* As GET /nodes has it. */
static const char *cube_member_state_name(const struct cube_member *n)
{
    if (n->state == CUBE_NODE_LOST)
        return "lost";
    if (n->state == CUBE_NODE_NEW)
        return "unknown";
    return n->refusal ? "refuses" : "up";
}

static bool cube_member_is_same(const struct cube_member *a,
                                const struct cube_member *b)
{
    return a == b || (a && b && *a->uuid && strcmp(a->uuid, b->uuid) == 0);
}

/* Has the worker behind the default name also joined, under its own? */
static bool cube_member_is_twin(struct cube_member *n)
{
    struct cube_list *head = &n->manager->members, *link;

    for (link = head->next; n->is_default && link != head; link = link->next) {
        struct cube_member *o = CUBE_OF(link, struct cube_member, link);

        if (o != n && o->state == CUBE_NODE_UP && cube_member_is_same(o, n))
            return true;
    }
    return false;
}

/* A task counts for a node from its placement to its end. */
static bool cube_task_holds(const struct cube_task *t, const char *node)
{
    return !cube_task_is_finished(t) && t->state != CUBE_PENDING &&
           strcmp(t->node, node) == 0;
}

/* The node as the Go program prints it, then what is Cube's own. What is
 * allocated is what its tasks were promised, not what they use. */
static void cube_member_print(struct cube_member *n, struct cube_buf *out)
{
    struct cube_manager *m = n->manager;
    int64_t mem = 0, disk = 0, tasks = 0;
    struct cube_record *rec;

    for (size_t at = 0; (rec = cube_ledger_next(m->ledger, &at));) {
        const struct cube_task *t = rec->now->task;

        if (!cube_task_holds(t, n->name))
            continue;
        mem += t->mem_bytes / 1024;
        disk += t->disk_bytes;
        tasks++;
    }
    cube_buf_puts(out, "{\"Name\":");
    cube_json_put_str(out, n->name, strlen(n->name));
    cube_buf_puts(out, ",\"Ip\":\"\",\"Api\":");
    cube_json_put_str(out, n->api, strlen(n->api));
    cube_buf_printf(out, ",\"Memory\":%lld,\"MemoryAllocated\":%lld,"
                    "\"Disk\":%lld,\"DiskAllocated\":%lld,\"Stats\":",
                    (long long)n->stats.mem.mem_total, (long long)mem,
                    (long long)n->stats.disk.all, (long long)disk);
    cube_stats_print(&n->stats, out);
    cube_buf_printf(out, ",\"Role\":\"worker\",\"TaskCount\":%lld,"
                    "\"State\":\"%s\",\"Worker\":\"%s\"", (long long)tasks,
                    cube_member_state_name(n), n->uuid);
    if (n->refusal) {
        cube_buf_puts(out, ",\"Error\":");
        cube_json_put_str(out, n->refusal, strlen(n->refusal));
    }
    cube_buf_puts(out, "}");
}

/* It gave a sign of life. */
static void cube_member_lives(struct cube_member *n)
{
    struct cube_manager *m = n->manager;

    n->last_sign_ms = cube_loop_now_ms(m->loop);
    n->dial_ms = CUBE_DIAL_MS;
    if (n->state == CUBE_NODE_UP)
        return;
    cube_log(m->loop, CUBE_INFO, "node %s is %s", n->name,
             n->state == CUBE_NODE_LOST ? "back" : "up");
    n->state = CUBE_NODE_UP;
    m->has_room = true;
    cube_manager_log_node(m, n);
}

/* ---- What workers say ---- */

/* Takes a task over as the newest word on it. */
static void cube_member_heard(struct cube_member *n, struct cube_task *t)
{
    struct cube_report *r = cube_map_get(&n->reports, t->id);

    if (!r) {
        r = cube_alloc(sizeof *r);
        r->member = n;
        cube_map_put(&n->reports, t->id, r);
    }
    cube_task_free(r->task);
    r->task = t;
    r->is_seen = true;
    cube_manager_touch(n->manager, t->id);
}

/* Does it run, or is it about to? One whose stop is wished does not count: it
 * is on its way out. */
static bool cube_task_is_active(const struct cube_task *t)
{
    return !cube_task_is_finished(t) && t->wanted != CUBE_WANT_STOP;
}

/* A task that this manager does not know runs on a worker of its cluster:
 * the store was lost, or is older than the task. It is kept, not killed. */
static void cube_manager_adopt(struct cube_manager *m, struct cube_member *n,
                               const struct cube_task *t)
{
    struct cube_record *rec = cube_ledger_add(m->ledger, t->id);
    struct cube_version *v = cube_record_edit(m->ledger, rec);

    cube_task_free(v->task);
    v->task = cube_task_copy(t);
    v->task->wanted = CUBE_WANT_RUN;
    if (v->task->attempt < 1)
        v->task->attempt = 1;
    cube_task_set(&v->task->node, n->name);
    cube_manager_stage(m, rec);
    cube_log(m->loop, CUBE_INFO, "adopted task %s (%s) from node %s", t->id,
             t->name, n->name);
}

/* All that it has is known now: adopt what is new, look at all the rest. */
static void cube_member_listed(struct cube_member *n)
{
    struct cube_manager *m = n->manager;
    const char *id;
    void *value;

    n->is_listed = true;
    cube_member_forget(n, true);
    for (size_t at = 0; cube_map_next(&n->reports, &at, &id, &value);) {
        struct cube_report *r = value;

        if (!cube_ledger_find(m->ledger, id) && cube_task_is_active(r->task) &&
            !n->refusal)
            cube_manager_adopt(m, n, r->task);
    }
    cube_manager_touch_all(m);
}

/* mutual recursion */
static void cube_member_raise_epoch(struct cube_member *n, int64_t seen);

/* The first line: which worker answers at this address, and whose it is. A
 * worker of another cluster keeps its tasks and gets none of ours. */
static void cube_member_on_hello(struct cube_member *n,
                                 struct json_value_s *line)
{
    struct cube_manager *m = n->manager;
    char uuid[CUBE_UUID_TEXT], cluster[CUBE_UUID_TEXT];
    int64_t epoch = 0;

    cube_json_uuid(cube_json_get(line, "Worker"), uuid);
    cube_json_uuid(cube_json_get(line, "Cluster"), cluster);
    (void)cube_json_i64(cube_json_get(line, "Epoch"), &epoch);
    if (strcmp(uuid, n->uuid) != 0) { /* another worker has its address */
        n->is_listed = false;
        cube_member_forget(n, false);
    }
    memcpy(n->uuid, uuid, sizeof uuid);
    cube_free(n->refusal);
    n->refusal = NULL;
    if (*cluster && strcmp(cluster, m->cluster) != 0) {
        struct cube_buf why = {0};

        cube_buf_printf(&why, "it belongs to cluster %s; start it with "
                        "--take-over to change that", cluster);
        n->refusal = cube_buf_take(&why);
        cube_log(m->loop, CUBE_WARN, "node %s: %s", n->name, n->refusal);
    } else if (epoch > m->epoch) {
        cube_member_raise_epoch(n, epoch);
    }
}

/* The full list follows. Until it is complete nothing is concluded from a task
 * that is missing. */
static void cube_member_on_reset(struct cube_member *n,
                                 struct json_value_s *line)
{
    void *value;

    (void)line;
    n->is_listed = false;
    for (size_t at = 0; cube_map_next(&n->reports, &at, NULL, &value);)
        ((struct cube_report *)value)->is_seen = false;
}

/* A task of the list, or a change. */
static void cube_member_on_task(struct cube_member *n,
                                struct json_value_s *line)
{
    struct cube_manager *m = n->manager;
    struct cube_err err;
    struct cube_task *t =
        cube_task_from_json(cube_json_get(line, "Task"), false, &err);

    if (!t) {
        cube_log(m->loop, CUBE_WARN, "node %s: %s", n->name, err.text);
        return;
    }
    if (n->is_listed && !cube_ledger_find(m->ledger, t->id) &&
        cube_task_is_active(t) && !n->refusal)
        cube_manager_adopt(m, n, t);
    cube_member_heard(n, t);
}

/* The worker has removed a record. */
static void cube_member_on_gone(struct cube_member *n,
                                struct json_value_s *line)
{
    char id[CUBE_UUID_TEXT];

    cube_json_uuid(cube_json_get(line, "ID"), id);
    cube_member_drop(n, id);
}

/* The list is complete. */
static void cube_member_on_listed(struct cube_member *n,
                                  struct json_value_s *line)
{
    (void)line;
    cube_member_listed(n);
}

/* The beat: its machine's metrics. A worker whose metrics make no sense stays,
 * but is not given what its room is unknown for. */
static void cube_member_on_stats(struct cube_member *n,
                                 struct json_value_s *line)
{
    struct json_value_s *stats = cube_json_get(line, "Stats");

    if (!n->has_stats)
        n->manager->has_room = true;
    n->has_stats = stats && cube_stats_from_json(stats, &n->stats, NULL) == 0;
}

static const struct cube_saying {
    const char *type;
    void (*fn)(struct cube_member *n, struct json_value_s *line);
} cube_sayings[] = {
    {"hello", cube_member_on_hello},   {"reset", cube_member_on_reset},
    {"task", cube_member_on_task},     {"gone", cube_member_on_gone},
    {"listed", cube_member_on_listed}, {"stats", cube_member_on_stats},
};

/* One line of its events. The place in the stream is noted after the line
 * was taken in, so that a resumed stream misses nothing. */
static int cube_member_line(struct cube_member *n, const char *text,
                            size_t len)
{
    struct cube_err err;
    struct json_value_s *line = cube_json_parse(text, len, &err);
    const char *type = line ? cube_json_str(cube_json_get(line, "Type"), NULL)
                            : NULL;
    int64_t seq;

    if (!type) {
        cube_log(n->manager->loop, CUBE_WARN, "node %s: an event that is no "
                 "event: %s", n->name, line ? "it has no Type" : err.text);
        cube_json_free(line);
        return -1;
    }
    cube_member_lives(n);
    for (size_t i = 0; i < CUBE_COUNT(cube_sayings); i++) {
        if (strcmp(type, cube_sayings[i].type) == 0)
            cube_sayings[i].fn(n, line);
    }
    if (cube_json_get(line, "Stream") && strcmp(type, "hello") != 0 &&
        cube_json_i64(cube_json_get(line, "Seq"), &seq) == 0) {
        cube_json_uuid(cube_json_get(line, "Stream"), n->stream);
        n->seq = n->is_listed ? (uint64_t)seq : 0;
    }
    cube_json_free(line);
    return 0;
}

static void cube_member_dial(void *arg); /* mutual recursion */

/* Ends what is said on the line, and dials again. */
static void cube_member_hang_up(struct cube_member *n)
{
    if (n->call)
        cube_http_call_cancel(n->call);
    n->call = NULL;
    cube_buf_clear(&n->text);
    cube_timer_set(n->manager->loop, &n->dial, n->dial_ms, cube_member_dial,
                   n);
}

/* Bytes of the event stream, cut anywhere. A line may hang up, so the buffer
 * is not touched after that. */
static void cube_member_data(void *arg, const char *p, size_t len)
{
    struct cube_member *n = arg;
    size_t start = 0;

    if (!n->is_told)
        return;
    cube_buf_add(&n->text, p, len);
    for (;;) {
        char *line = n->text.data + start;
        char *end = memchr(line, '\n', n->text.len - start);

        if (!end)
            break;
        start = (size_t)(end - n->text.data) + 1;
        if (cube_member_line(n, line, (size_t)(end - line)) < 0) {
            cube_member_hang_up(n);
            return;
        }
    }
    cube_buf_drop(&n->text, start);
    if (n->text.len > CUBE_LINE_MAX)
        cube_member_hang_up(n);
}

/* ---- Workers that are asked, not told by ---- */

/*
 * An order goes into its queue, of which it takes one each ten seconds; only
 * then does its list show what came of it. Until then there is no such task
 * in the list, or, at a restart, one with the container that is to go:
 *
 *    list        (none)     old, Failed   old, Completed   new, Running
 *    report      Scheduled  Scheduled     Scheduled        Running
 *                ^ as the answer to the order said
 *
 * Does the list still show what was there before the order?
 */
static bool cube_report_is_ahead(const struct cube_report *r,
                                 const struct cube_task *t, int64_t now)
{
    return r->queued_ms > now && *r->task->container_id &&
           strcmp(r->task->container_id, t->container_id) == 0;
}

/* What it does not say: the number of the attempt, and times and reasons as
 * they were seen first. */
static void cube_member_complete(struct cube_member *n, struct cube_task *t,
                                 const struct cube_report *r)
{
    struct cube_record *rec = cube_ledger_find(n->manager->ledger, t->id);
    const struct cube_task *known = rec && rec->now ? rec->now->task : NULL;
    bool is_same = known && known->state == t->state &&
                   strcmp(known->container_id, t->container_id) == 0;
    struct cube_time now = cube_manager_now(n->manager);

    t->attempt = r ? r->task->attempt : known ? known->attempt : 1;
    if (known && strcmp(known->container_id, t->container_id) == 0 &&
        !cube_time_is_set(&t->start_time))
        t->start_time = known->start_time;
    if (t->state == CUBE_RUNNING && !cube_time_is_set(&t->start_time))
        t->start_time = now;
    if (cube_task_is_finished(t) && !cube_time_is_set(&t->finish_time))
        t->finish_time = is_same ? known->finish_time : now;
    if (t->state == CUBE_FAILED && !*t->error)
        cube_task_set(&t->error, "it failed there; this worker does not say "
                                 "why");
}

/* Takes over one task of its list. */
static void cube_member_see(struct cube_member *n, struct cube_task *t)
{
    struct cube_report *r = cube_member_report(n, t->id);

    if (r && cube_report_is_ahead(r, t, cube_loop_now_ms(n->manager->loop))) {
        r->is_seen = true;
        cube_task_free(t);
        return;
    }
    cube_member_complete(n, t, r);
    if (r)
        r->queued_ms = 0;
    cube_member_heard(n, t);
}

/* The answer to an order counts until the list shows what came of it: a
 * minute, and one more for each order that is waiting there before it. */
static void cube_member_believe(struct cube_member *n, const char *id)
{
    int64_t now = cube_loop_now_ms(n->manager->loop), orders = 1;
    struct cube_report *own = cube_member_report(n, id);
    void *value;

    for (size_t at = 0; cube_map_next(&n->reports, &at, NULL, &value);)
        orders += ((struct cube_report *)value)->queued_ms > now;
    own->queued_ms = now + orders * CUBE_QUEUE_MS;
}

/* GET /tasks of a polled worker is a list and its end in one. */
static int cube_member_take_list(struct cube_member *n, const char *body,
                                 size_t len)
{
    struct json_value_s *root = cube_json_parse(body, len, NULL);
    struct json_array_element_s *item;

    if (!root)
        return -1;
    cube_member_on_reset(n, NULL);
    for (item = cube_json_items(root); item; item = item->next) {
        struct cube_task *t = cube_task_from_json(item->value, false, NULL);

        if (t)
            cube_member_see(n, t);
    }
    cube_json_free(root);
    cube_member_listed(n);
    return 0;
}

/* Its metrics came, or did not: the next round in two seconds. */
static void cube_member_polled(void *arg, const struct cube_http_answer *a)
{
    struct cube_member *n = arg;
    struct cube_stats last = n->stats; /* all 0 before the first */
    double use;

    n->call = NULL;
    if (!a->err && a->status == 200 &&
        cube_stats_parse(a->body, a->body_len, &n->stats, NULL) == 0) {
        n->has_stats = true;
        use = cube_machine_use(&last.cpu, &n->stats.cpu);
        n->stats.cpu_use = use < 0 ? last.cpu_use : use;
    }
    n->dial_ms = CUBE_POLL_MS;
    cube_timer_set(n->manager->loop, &n->dial, n->dial_ms, cube_member_dial,
                   n);
}

static struct cube_http_call *
cube_member_get(struct cube_member *n, const char *target,
                void (*fn)(void *arg, const struct cube_http_answer *a))
{
    struct cube_http_request r;

    memset(&r, 0, sizeof r);
    r.method = "GET";
    r.target = target;
    r.timeout_ms = CUBE_ORDER_MS;
    r.on_done = fn;
    r.arg = n;
    return cube_http_call(n->client, &r);
}

/* Its tasks came: that is its sign of life. */
static void cube_member_poll_tasks(void *arg, const struct cube_http_answer *a)
{
    struct cube_member *n = arg;

    n->call = NULL;
    if (!a->err && a->status == 200 &&
        cube_member_take_list(n, a->body, a->body_len) == 0) {
        cube_member_lives(n);
        n->call = cube_member_get(n, "/stats", cube_member_polled);
        return;
    }
    n->is_doubted = true;
    cube_timer_set(n->manager->loop, &n->dial, CUBE_POLL_MS, cube_member_dial,
                   n);
}

/* ---- The line to a worker ---- */

/* A body comes: events, or the words of an error. */
static void cube_member_head(void *arg, const struct cube_http_head *h)
{
    struct cube_member *n = arg;

    n->is_told = cube_http_head_status(h) == 200;
    if (n->is_told)
        n->is_polled = n->is_doubted = false;
}

/* The stream has ended. 404 means a worker without events; other refusals are
 * kept, since `cube node` shows them. */
static void cube_member_cut(void *arg, const struct cube_http_answer *a)
{
    struct cube_member *n = arg;

    n->call = NULL;
    cube_buf_clear(&n->text);
    if (!a->err && a->status == 404) {
        n->is_polled = true;
        n->is_doubted = false;
        n->dial_ms = 0;
    } else if (a->status != 200 && !a->err) {
        cube_free(n->refusal);
        n->refusal = cube_text_dup(a->status == 401 || a->status == 403
                                       ? "it does not accept our token"
                                       : "it does not answer GET /events");
    }
    cube_timer_set(n->manager->loop, &n->dial, n->dial_ms, cube_member_dial,
                   n);
    if (n->dial_ms < CUBE_DIAL_MAX_MS)
        n->dial_ms = n->dial_ms * 2 + 1;
}

/* Opens the event stream, from where the last one broke off if that is known.
 */
static void cube_member_dial(void *arg)
{
    struct cube_member *n = arg;
    struct cube_http_request r;
    char target[100] = "/events";

    n->is_told = false;
    if (n->is_polled && !n->is_doubted) {
        n->call = cube_member_get(n, "/tasks", cube_member_poll_tasks);
        return;
    }
    if (*n->stream && n->seq > 0)
        (void)snprintf(target, sizeof target, "/events?after=%s:%llu",
                       n->stream, (unsigned long long)n->seq);
    memset(&r, 0, sizeof r);
    r.method = "GET";
    r.target = target;
    r.idle_timeout_ms = (int)n->manager->lost_after_ms;
    r.on_head = cube_member_head;
    r.on_data = cube_member_data;
    r.on_done = cube_member_cut;
    r.arg = n;
    n->call = cube_http_call(n->client, &r);
}

/* A worker at "host:port"; dialled at once. NULL when that is no address. */
static struct cube_member *cube_member_new(struct cube_manager *m,
                                           const char *name,
                                           struct cube_err *err)
{
    struct cube_member *n;
    struct cube_buf api = {0};
    struct cube_http_client *client;

    cube_buf_printf(&api, "http://%s", name);
    client = cube_http_client_new(m->loop, api.data, m->token, err);
    if (!client) {
        cube_buf_free(&api);
        return NULL;
    }
    n = cube_alloc(sizeof *n);
    n->manager = m;
    n->name = cube_text_dup(name);
    n->api = cube_buf_take(&api);
    n->client = client;
    n->last_sign_ms = cube_loop_now_ms(m->loop);
    n->dial_ms = CUBE_DIAL_MS;
    cube_list_add(&m->members, &n->link);
    m->member_count++;
    cube_timer_set(m->loop, &n->dial, 0, cube_member_dial, n);
    return n;
}

/* ---- Orders ---- */

/* 0.5 s before the first repetition, doubled up to 8 s. */
static int64_t cube_retry_ms(int tries)
{
    int64_t ms = CUBE_RETRY_MS;

    while (tries-- > 1 && ms < CUBE_RETRY_MAX_MS)
        ms *= 2;
    return ms;
}

/* A worker has orders of a later start: this store is an older copy. The
 * number goes up, on disk, before the next order. */
static void cube_member_raise_epoch(struct cube_member *n, int64_t seen)
{
    struct cube_manager *m = n->manager;
    char text[24];

    if (seen < m->epoch)
        return;
    m->epoch = seen + 1;
    (void)snprintf(text, sizeof text, "%lld", (long long)m->epoch);
    (void)cube_meta_put(m->store, "epoch", text, NULL);
    cube_ledger_join(m->ledger);
    cube_log(m->loop, CUBE_WARN, "node %s has seen epoch %lld: this store is "
             "an older copy; epoch is %lld now", n->name, (long long)seen,
             (long long)m->epoch);
}

/* A worker said 409: it learned of another cluster, or of a later epoch. */
static void cube_member_refused(struct cube_member *n,
                                const struct cube_http_answer *a)
{
    struct json_value_s *root = cube_json_parse(a->body, a->body_len, NULL);
    char cluster[CUBE_UUID_TEXT];
    int64_t epoch = 0;

    cube_json_uuid(cube_json_get(root, "Cluster"), cluster);
    if (cube_json_i64(cube_json_get(root, "Epoch"), &epoch) == 0 &&
        strcmp(cluster, n->manager->cluster) == 0)
        cube_member_raise_epoch(n, epoch);
    else if (*cluster)
        cube_text_set(&n->refusal, cube_json_str(
            cube_json_get(root, "Message"), NULL));
    cube_json_free(root);
}

/* An order may be repeated now. */
static void cube_charge_retry(void *arg)
{
    cube_charge_touch(arg);
}

/* The order was not answered well: again, but later each time. */
static void cube_charge_later(struct cube_charge *c)
{
    cube_timer_set(c->manager->loop, &c->retry, cube_retry_ms(++c->tries),
                   cube_charge_retry, c);
}

/* The words in an answer's {"Message":"..."}, or its first bytes. */
static void cube_answer_words(const struct cube_http_answer *a,
                              struct cube_buf *out)
{
    struct json_value_s *root =
        a->body_len ? cube_json_parse(a->body, a->body_len, NULL) : NULL;
    const char *words = cube_json_str(cube_json_get(root, "Message"), NULL);

    if (words)
        cube_buf_puts(out, words);
    else if (a->err)
        cube_buf_puts(out, a->err->text);
    else
        cube_buf_printf(out, "status %d", a->status);
    cube_json_free(root);
}

/* The worker will never take this task: Failed, with the worker's reason. */
static void cube_charge_reject(struct cube_charge *c, struct cube_member *n,
                               const struct cube_http_answer *a)
{
    struct cube_manager *m = c->manager;
    struct cube_task *t = cube_record_edit(m->ledger, c->rec)->task;
    struct cube_buf words = {0};

    cube_buf_printf(&words, "node %s: ", n->name);
    cube_answer_words(a, &words);
    t->state = CUBE_FAILED;
    t->finish_time = cube_manager_now(m);
    cube_task_set(&t->error, words.data);
    cube_buf_free(&words);
    cube_manager_stage(m, c->rec);
}

/* A delivery was answered, or was not. Only 201 means that the worker has it
 * on disk; after anything else it may or may not have it, and the delivery is
 * repeated until a report says which. */
static void cube_charge_delivered(void *arg, const struct cube_http_answer *a)
{
    struct cube_charge *c = arg;
    struct cube_manager *m = c->manager;
    const struct cube_version *v = cube_record_latest(c->rec);
    struct cube_member *n = cube_manager_member(m, v->task->node);
    struct cube_report *r = cube_member_report(n, c->rec->id);
    struct cube_task *t = NULL;

    c->order = NULL;
    if (n && !a->err && a->status == 201 &&
        cube_task_parse(a->body, a->body_len, false, &t, NULL) == 0) {
        c->tries = 0;
        if (n->is_polled)
            t->attempt = v->task->attempt;
        /* The stream may have been faster than this answer. */
        if (r && r->task->attempt >= t->attempt) {
            cube_task_free(t);
            return;
        }
        cube_member_heard(n, t);
        if (n->is_polled)
            cube_member_believe(n, c->rec->id);
        return;
    }
    if (n && !a->err && a->status == 409)
        cube_member_refused(n, a);
    if (n && !a->err && a->status == 400 && !c->rec->pending)
        cube_charge_reject(c, n, a);
    cube_charge_later(c);
}

/* Sends the task to its node. It may be sent again: the attempt tells. */
static void cube_charge_deliver(struct cube_charge *c, struct cube_member *n)
{
    struct cube_manager *m = c->manager;
    const struct cube_version *v = c->rec->now;
    const struct cube_report *had = cube_member_report(n, c->rec->id);
    struct cube_event *e = cube_event_new();
    struct cube_buf body = {0};
    struct cube_http_request r;

    cube_uuid_new(m->world, e->id);
    e->state = CUBE_RUNNING;
    e->timestamp = cube_manager_now(m);
    e->task = cube_task_copy(v->task);
    e->task->state = CUBE_SCHEDULED;
    if (n->is_polled)
        cube_task_set(&e->task->container_id,
                      had ? had->task->container_id : "");
    memcpy(e->cluster, m->cluster, sizeof e->cluster);
    e->epoch = m->epoch;
    e->budget = v->keep.budget;
    cube_event_print(e, &body);
    cube_event_free(e);
    cube_buf_puts(&body, "\n");
    memset(&r, 0, sizeof r);
    r.method = "POST";
    r.target = "/tasks";
    r.body = body.data;
    r.body_len = body.len;
    r.timeout_ms = CUBE_ORDER_MS;
    r.on_done = cube_charge_delivered;
    r.arg = c;
    c->order = cube_http_call(n->client, &r);
    cube_buf_free(&body);
}

/* A stop was answered. 204 means that the wish is on the worker's disk; that it
 * has stopped will be reported. */
static void cube_report_stopped(void *arg, const struct cube_http_answer *a)
{
    struct cube_report *r = arg;
    struct cube_member *n = r->member;
    struct cube_manager *m = n->manager;
    char id[CUBE_UUID_TEXT];

    r->order = NULL;
    memcpy(id, r->task->id, sizeof id);
    r->next_ms = cube_loop_now_ms(m->loop) + cube_retry_ms(++r->tries);
    if (!a->err && a->status == 404 &&
        r->queued_ms <= cube_loop_now_ms(m->loop)) /* else it is to come */
        cube_member_drop(n, id);
    else if (!a->err && a->status == 409)
        cube_member_refused(n, a);
}

/* Orders a worker to stop what it reported, and, with `forget`, to remove it.
 * Repeated, at growing intervals, as long as it is still reported. */
static void cube_report_stop(struct cube_report *r, bool forget)
{
    struct cube_member *n = r->member;
    struct cube_manager *m = n->manager;
    struct cube_http_request q;
    char target[200];

    if (r->order || n->refusal || cube_loop_now_ms(m->loop) < r->next_ms)
        return;
    (void)snprintf(target, sizeof target, "/tasks/%s?attempt=%lld&cluster=%s"
                   "&epoch=%lld%s", r->task->id, (long long)r->task->attempt,
                   m->cluster, (long long)m->epoch, forget ? "&forget=1" : "");
    memset(&q, 0, sizeof q);
    q.method = "DELETE";
    q.target = target;
    q.timeout_ms = CUBE_ORDER_MS;
    q.on_done = cube_report_stopped;
    q.arg = r;
    r->order = cube_http_call(n->client, &q);
}

/* ---- Placing ---- */

/* What is promised to each node, added up once for a pass. */
struct cube_promises {
    struct cube_node *nodes;
    struct cube_member **members; /* the same order */
    size_t count;
};

/* NULL is fine. */
static void cube_promises_free(struct cube_promises *p)
{
    if (!p)
        return;
    for (size_t i = 0; i < p->count; i++)
        cube_node_clear(&p->nodes[i]);
    cube_free(p->nodes);
    cube_free(p->members);
    cube_free(p);
}

/* Adds up what every node has promised, staged placements included: two tasks
 * of one pass must not be given the same port. */
static struct cube_promises *cube_promises_new(struct cube_manager *m)
{
    struct cube_promises *p = cube_alloc(sizeof *p);
    struct cube_list *link;
    struct cube_record *rec;
    void *value;

    p->nodes = cube_alloc((m->member_count + 1) * sizeof *p->nodes);
    p->members = cube_alloc((m->member_count + 1) * sizeof(void *));
    for (link = m->members.next; link != &m->members; link = link->next) {
        struct cube_member *n = CUBE_OF(link, struct cube_member, link);
        struct cube_node *node = &p->nodes[p->count];

        if (n->is_default && n->state == CUBE_NODE_NEW)
            continue;
        node->name = n->name;
        node->is_up = n->state == CUBE_NODE_UP && n->is_listed &&
                      !n->refusal && !cube_member_is_twin(n);
        node->why_down = cube_member_is_twin(n) ? "has joined by another name"
                                                : n->refusal;
        node->stats = n->has_stats ? &n->stats : NULL;
        p->members[p->count++] = n;
    }
    for (size_t at = 0;
         cube_map_next(&m->ledger->records, &at, NULL, &value);) {
        rec = value;
        const struct cube_task *t = cube_record_latest(rec)->task;

        for (size_t i = 0; i < p->count; i++) {
            if (cube_task_holds(t, p->nodes[i].name))
                cube_node_promise(&p->nodes[i], t);
        }
    }
    return p;
}

/* The name of the node that a worker is, or NULL. */
static const char *cube_manager_name_of(struct cube_manager *m,
                                        const char *uuid)
{
    struct cube_list *link;

    for (link = m->members.next; *uuid && link != &m->members;
         link = link->next) {
        struct cube_member *n = CUBE_OF(link, struct cube_member, link);

        if (strcmp(n->uuid, uuid) == 0)
            return n->name;
    }
    return NULL;
}

/* The node for a task, or NULL with the reasons in `why`. */
static struct cube_member *cube_charge_place(struct cube_charge *c,
                                             const char *avoid,
                                             struct cube_buf *why)
{
    struct cube_manager *m = c->manager;
    struct cube_placement p;
    const struct cube_node *node;

    if (!m->promises)
        m->promises = cube_promises_new(m);
    p.task = c->rec->now->task;
    p.nodes = m->promises->nodes;
    p.node_count = m->promises->count;
    p.avoid = cube_manager_name_of(m, avoid);
    node = cube_schedule(m->scheduler, &p, why);
    return node ? m->promises->members[node - m->promises->nodes] : NULL;
}

/* Stages a placement: the attempt goes up with it, on disk, before the worker
 * hears of it. */
static void cube_charge_assign(struct cube_charge *c, struct cube_member *n,
                               const char *words)
{
    struct cube_manager *m = c->manager;
    struct cube_version *v = cube_record_edit(m->ledger, c->rec);
    struct cube_task *t = v->task;

    t->state = CUBE_SCHEDULED;
    t->attempt++;
    cube_task_set(&t->node, n->name);
    cube_task_set(&t->container_id, "");
    cube_task_set(&t->error, words);
    cube_task_unbind(t);
    memset(&t->finish_time, 0, sizeof t->finish_time);
    memset(&t->restart_time, 0, sizeof t->restart_time);
    t->has_exit_code = false;
    cube_manager_stage(m, c->rec);
    c->tries = 0;
    for (size_t i = 0; i < m->promises->count; i++) {
        if (m->promises->members[i] == n)
            cube_node_promise(&m->promises->nodes[i], t);
    }
}

/* Are two reasons the same, but for the bytes and cores that they count? */
static bool cube_reason_is_same(const char *a, const char *b)
{
    static const char digits[] = "0123456789.";

    for (;;) {
        a += strspn(a, digits);
        b += strspn(b, digits);
        if (*a != *b || !*a)
            return *a == *b;
        a++;
        b++;
    }
}

/* Says on the record why it waits: at once when there is another reason, but
 * not with every byte that it counts. */
static void cube_charge_explain(struct cube_charge *c, const char *why)
{
    struct cube_manager *m = c->manager;
    const struct cube_task *t = c->rec->now->task;
    int64_t now = cube_loop_now_ms(m->loop);

    if (strcmp(t->error, why) == 0 ||
        (cube_reason_is_same(t->error, why) && c->explained_ms > 0 &&
         now - c->explained_ms < CUBE_EXPLAIN_MS))
        return;
    c->explained_ms = now;
    cube_task_set(&cube_record_edit(m->ledger, c->rec)->task->error, why);
    cube_manager_stage(m, c->rec);
}

/* Places a waiting task, or says on its record why it waits. */
static void cube_charge_schedule(struct cube_charge *c)
{
    struct cube_buf why = {0};
    struct cube_member *n =
        cube_charge_place(c, c->rec->now->keep.avoid, &why);

    if (n)
        cube_charge_assign(c, n, "");
    else
        cube_charge_explain(c, why.len ? why.data : "there is no node yet");
    cube_buf_free(&why);
}

/* ---- Reconciliation ---- */

/* Its node is gone: it waits for another one. */
static void cube_charge_displace(struct cube_charge *c, const char *why)
{
    struct cube_manager *m = c->manager;
    int64_t now = cube_loop_now_ms(m->loop);
    struct cube_task *t;

    if (m->is_paced && now - m->last_move_ms < CUBE_PACED_MS)
        return; /* the next tick looks again */
    m->last_move_ms = now;
    t = cube_record_edit(m->ledger, c->rec)->task;
    t->state = CUBE_PENDING;
    cube_task_set(&t->error, why);
    cube_task_set(&t->progress, "");
    cube_task_unbind(t);
    cube_manager_stage(m, c->rec);
}

/* The fields that a report tells. */
static void cube_task_observe(struct cube_task *t, const struct cube_task *r)
{
    struct cube_task *from = cube_task_copy(r);
    struct cube_ports ports = t->host_ports;

    t->host_ports = from->host_ports;
    from->host_ports = ports;
    t->start_time = from->start_time;
    t->finish_time = from->finish_time;
    t->restart_time = from->restart_time;
    t->restart_count = from->restart_count;
    t->has_exit_code = from->has_exit_code;
    t->exit_code = from->exit_code;
    cube_task_set(&t->container_id, from->container_id);
    cube_task_set(&t->error, from->error);
    cube_task_set(&t->progress, from->progress);
    cube_task_free(from);
}

/* Does the report tell anything that the record does not say yet? The two
 * are printed and compared: there are many fields, and this is rare. */
static bool cube_report_is_news(const struct cube_task *t,
                                const struct cube_task *r)
{
    struct cube_task *copy = cube_task_copy(t);
    struct cube_buf a = {0}, b = {0};
    bool is_news;

    cube_task_print(t, &a);
    cube_task_observe(copy, r);
    copy->state = r->state;
    cube_task_print(copy, &b);
    is_news = a.len != b.len || memcmp(a.data, b.data, a.len) != 0;
    cube_task_free(copy);
    cube_buf_free(&a);
    cube_buf_free(&b);
    return is_news;
}

/* Copies a report to the record. Where the state machine knows no way from
 * one state to the other, a step was missed, and Scheduled lies between. */
static void cube_charge_copy(struct cube_charge *c, const struct cube_task *r)
{
    struct cube_manager *m = c->manager;
    struct cube_task *t;

    if (!cube_report_is_news(c->rec->now->task, r))
        return;
    t = cube_record_edit(m->ledger, c->rec)->task;
    if (t->state != r->state && !cube_state_may(t->state, r->state)) {
        t->state = CUBE_SCHEDULED;
    } else {
        t->state = r->state;
        cube_task_observe(t, r);
    }
    cube_manager_stage(m, c->rec);
}

/* A worker has given up on a task. Another one may try once, with one start;
 * true when it was sent there. */
static bool cube_charge_move(struct cube_charge *c, struct cube_member *n,
                             const struct cube_task *r)
{
    struct cube_manager *m = c->manager;
    const struct cube_version *v = c->rec->now;
    struct cube_buf why = {0};
    struct cube_member *to;

    if (v->keep.moves > 0 || v->keep.budget >= 0 || n->is_polled ||
        strcmp(v->task->restart_policy, "no") == 0 || r->restart_count == 0)
        return false;
    to = cube_charge_place(c, n->uuid, &why);
    cube_buf_clear(&why);
    if (to) {
        struct cube_version *edit = cube_record_edit(m->ledger, c->rec);

        edit->keep.moves = 1;
        edit->keep.budget = 0;
        memcpy(edit->keep.avoid, n->uuid, sizeof n->uuid);
        cube_task_observe(edit->task, r);
        cube_buf_printf(&why, "moved off node %s: %s", n->name, r->error);
        cube_charge_assign(c, to, why.data);
    }
    cube_buf_free(&why);
    return to != NULL;
}

/* What runs is taken for what should run: a newer attempt than ours, since
 * this store is an older copy, or one whose node came back in time. */
static void cube_charge_catch_up(struct cube_charge *c, struct cube_member *n,
                                 const struct cube_task *r)
{
    struct cube_manager *m = c->manager;
    struct cube_task *t = cube_record_edit(m->ledger, c->rec)->task;

    t->state = CUBE_SCHEDULED;
    t->attempt = r->attempt;
    cube_task_set(&t->node, n->name);
    cube_manager_stage(m, c->rec);
}

/* mutual recursion */
static void cube_charge_follow_polled(struct cube_charge *c,
                                      struct cube_member *n,
                                      const struct cube_task *r);

/* The rows of the table above that begin with `run`. */
static void cube_charge_keep_running(struct cube_charge *c,
                                     struct cube_member *n,
                                     struct cube_report *r)
{
    const struct cube_task *t = c->rec->now->task;

    if (t->state == CUBE_PENDING && r && n->is_listed &&
        r->task->attempt == t->attempt && cube_task_is_active(r->task))
        cube_charge_catch_up(c, n, r->task); /* back before it was moved */
    else if (t->state == CUBE_PENDING)
        cube_charge_schedule(c);
    else if (!n || n->state == CUBE_NODE_LOST)
        cube_charge_displace(c, "its node was lost");
    else if (n->state != CUBE_NODE_UP || !n->is_listed)
        return; /* nothing is known of it yet */
    else if (n->refusal && !r)
        cube_charge_displace(c, n->refusal);
    else if (!r || r->task->attempt < t->attempt) {
        if (!c->order && !cube_timer_is_set(&c->retry))
            cube_charge_deliver(c, n);
    } else if (n->is_polled)
        cube_charge_follow_polled(c, n, r->task);
    else if (r->task->state != CUBE_FAILED ||
             cube_time_is_set(&r->task->restart_time) ||
             !cube_charge_move(c, n, r->task))
        cube_charge_copy(c, r->task);
}

/* Stages the end of a task that was stopped. */
static void cube_charge_complete(struct cube_charge *c, const char *words)
{
    struct cube_manager *m = c->manager;
    struct cube_task *t = cube_record_edit(m->ledger, c->rec)->task;

    t->state = CUBE_COMPLETED;
    t->finish_time = cube_manager_now(m);
    memset(&t->restart_time, 0, sizeof t->restart_time);
    cube_task_set(&t->error, words);
    cube_task_set(&t->progress, "");
    cube_manager_stage(m, c->rec);
}

/* The rows of the table above that begin with `stop`. */
static void cube_charge_keep_stopped(struct cube_charge *c,
                                     struct cube_member *n,
                                     struct cube_report *r)
{
    const struct cube_task *t = c->rec->now->task;

    if (t->state == CUBE_PENDING || !n)
        cube_charge_complete(c, "");
    else if (n->state == CUBE_NODE_LOST)
        cube_charge_complete(c, "its node was lost before it stopped; it is "
                             "stopped when the node comes back");
    else if (n->state != CUBE_NODE_UP || !n->is_listed || c->order)
        return;
    else if (!r || r->task->attempt < t->attempt)
        cube_charge_complete(c, "");
    else if (!cube_task_is_finished(r->task))
        cube_report_stop(r, false);
    else if (r->task->state == CUBE_COMPLETED)
        cube_charge_copy(c, r->task);
    else
        cube_charge_complete(c, r->task->error);
}

/* Is this report of the copy that should run? A worker can be here under two
 * names, such as that of --workers and the one that it joined by. One of the
 * Go program knows no attempts, so that a stop of the older one would hit the
 * newer one as well: there, the order to run it names the container that is
 * to go. */
static bool cube_charge_is_home(const struct cube_charge *c,
                                const struct cube_report *r)
{
    const struct cube_task *t = c->rec->now->task;

    return (r->task->attempt == t->attempt || r->member->is_polled) &&
           cube_member_is_same(cube_manager_member(c->manager, t->node),
                               r->member);
}

/* Does a worker have what is to be removed? One of the Go program removes
 * nothing, so that what has ended there does not count. */
static bool cube_report_is_in_the_way(const struct cube_report *r)
{
    return r && !(r->member->is_polled && cube_task_is_finished(r->task));
}

/* Looks at the copies elsewhere: a newer one is taken for the right one (and
 * then true), those of older attempts and of what has ended are stopped. */
static bool cube_charge_see_strays(struct cube_charge *c)
{
    struct cube_manager *m = c->manager;
    const struct cube_version *v = c->rec->now;
    bool is_over = cube_task_is_finished(v->task);
    struct cube_list *link;

    for (link = m->members.next; link != &m->members; link = link->next) {
        struct cube_member *n = CUBE_OF(link, struct cube_member, link);
        struct cube_report *r = cube_member_report(n, c->rec->id);

        if (!r || n->state != CUBE_NODE_UP || n->refusal)
            continue;
        if (v->keep.is_hidden && cube_report_is_in_the_way(r)) {
            cube_report_stop(r, true);
        } else if (!is_over && cube_task_is_active(r->task) &&
                   r->task->attempt > v->task->attempt) {
            cube_charge_catch_up(c, n, r->task);
            return true;
        } else if ((is_over || !cube_charge_is_home(c, r)) &&
                   !cube_task_is_finished(r->task)) {
            cube_report_stop(r, false);
        }
    }
    return false;
}

/* The one place where wanted and observed meet. */
static void cube_charge_reconcile(struct cube_charge *c)
{
    struct cube_manager *m = c->manager;
    const struct cube_version *v = c->rec->now;
    struct cube_member *n;
    struct cube_report *r;

    if (!v || c->rec->pending)
        return;
    if (cube_charge_see_strays(c))
        return;
    if (cube_task_is_finished(v->task)) {
        cube_health_stop(&c->health);
        return;
    }
    n = cube_manager_member(m, v->task->node);
    r = cube_member_report(n, c->rec->id);
    if (v->task->wanted == CUBE_WANT_STOP)
        cube_charge_keep_stopped(c, n, r);
    else
        cube_charge_keep_running(c, n, r);
}

static void cube_manager_pass(void *arg)
{
    struct cube_manager *m = arg;

    while (!cube_list_is_empty(&m->dirty)) {
        struct cube_charge *c =
            CUBE_OF(m->dirty.next, struct cube_charge, dirty);

        cube_list_remove(&c->dirty);
        cube_charge_reconcile(c);
    }
    cube_promises_free(m->promises);
    m->promises = NULL;
}

/* A change is on disk: what it asks for can be done now. */
static void cube_manager_changed(void *arg, struct cube_record *rec,
                                 const struct cube_version *before)
{
    struct cube_manager *m = arg;
    struct cube_charge *c = cube_charge_of(m, rec);

    if (rec->now->is_gone && !rec->pending) {
        cube_charge_free(c);
        rec->owner = NULL;
        return;
    }
    if (!before || before->task->attempt != rec->now->task->attempt)
        cube_timer_clear(m->loop, &c->retry);
    if (cube_task_is_finished(rec->now->task))
        m->has_room = true;
    cube_charge_touch(c);
}

/* A task whose first commit failed never was. */
static void cube_manager_dropped(void *arg, struct cube_record *rec)
{
    (void)arg;
    cube_charge_free(rec->owner);
}

/* ---- Tasks on workers of the Go program ---- */

/* Starts it again there, if its policy lets us: the same task once more, with
 * the container that is to go. Else it has failed for good. */
static void cube_charge_fail_polled(struct cube_charge *c,
                                    const struct cube_task *r,
                                    const char *why)
{
    struct cube_manager *m = c->manager;
    struct cube_version *v = cube_record_edit(m->ledger, c->rec);
    struct cube_task *t = v->task;

    cube_health_stop(&c->health);
    cube_task_observe(t, r);
    cube_task_set(&t->error, why);
    if (cube_task_is_endless(t) ||
        (strcmp(t->restart_policy, "no") != 0 &&
         v->keep.restarts < CUBE_RESTARTS)) {
        v->keep.restarts++;
        t->restart_count++;
        t->attempt++;
        t->state = CUBE_SCHEDULED;
    } else {
        t->state = CUBE_FAILED;
        if (!cube_time_is_set(&t->finish_time))
            t->finish_time = cube_manager_now(m);
    }
    cube_manager_stage(m, c->rec);
}

/* Its health check failed: a worker of the Go program is told to start it
 * again. */
static void cube_charge_sick(void *arg, const char *why)
{
    struct cube_charge *c = arg;
    struct cube_member *n =
        cube_manager_member(c->manager, c->rec->now->task->node);
    struct cube_report *r = cube_member_report(n, c->rec->id);

    if (r && !c->rec->pending)
        cube_charge_fail_polled(c, r->task, why);
}

/* What a polled worker says, and what it does not do itself: restarts and
 * health checks. */
static void cube_charge_follow_polled(struct cube_charge *c,
                                      struct cube_member *n,
                                      const struct cube_task *r)
{
    const char *colon = strrchr(n->name, ':');
    struct cube_buf host = {0};

    if (r->state == CUBE_FAILED) {
        cube_charge_fail_polled(c, r, r->error);
        return;
    }
    cube_charge_copy(c, r);
    if (r->state != CUBE_RUNNING || c->rec->pending)
        return;
    cube_buf_add(&host, n->name, (size_t)(colon - n->name));
    cube_health_start(&c->health, c->manager->loop, c->rec->now->task,
                      host.data, cube_charge_sick, c);
    cube_buf_free(&host);
}

/* ---- Time ---- */

/* Its connection is given up with it: after a partition, TCP would go on as if
 * nothing had happened, and the list would not come anew. */
static void cube_member_lose(struct cube_member *n)
{
    struct cube_manager *m = n->manager;

    n->state = CUBE_NODE_LOST;
    n->is_listed = false;
    n->seq = 0; /* what it has is listed anew when it is back */
    cube_member_hang_up(n);
    cube_log(m->loop, CUBE_WARN, "node %s is lost: no sign of life for "
             "%lld ms", n->name, (long long)m->lost_after_ms);
    cube_manager_log_node(m, n);
}

/* Nodes that have been silent for too long; true when many went at once. */
static void cube_manager_count_lost(struct cube_manager *m, int64_t now)
{
    struct cube_list *link;
    size_t lost = 0, known = 0;
    bool has_lost = false;

    for (link = m->members.next; link != &m->members; link = link->next) {
        struct cube_member *n = CUBE_OF(link, struct cube_member, link);

        if (n->state != CUBE_NODE_LOST && !(n->is_default && !n->has_stats) &&
            now - n->last_sign_ms > m->lost_after_ms) {
            cube_member_lose(n);
            has_lost = true;
        }
        known++;
        lost += n->state == CUBE_NODE_LOST;
    }
    m->is_paced = lost >= 3 && lost * 2 > known;
    if (has_lost || m->is_paced)
        m->has_room = true;
}

/* Was it we who slept? Then nobody else is to blame. */
static void cube_manager_grace(struct cube_manager *m, int64_t now)
{
    struct cube_list *link;

    cube_log(m->loop, CUBE_WARN, "this manager was asleep for %lld ms: every "
             "node gets a new grace", (long long)(now - m->last_tick_ms));
    for (link = m->members.next; link != &m->members; link = link->next) {
        struct cube_member *n = CUBE_OF(link, struct cube_member, link);

        n->last_sign_ms = now;
    }
}

/* When an event's line was written; INT64_MIN when it does not say. */
static int64_t cube_event_line_ns(const char *line, size_t len)
{
    static const char mark[] = "\"Time\":\"";
    const char *at = memmem(line, len, mark, sizeof mark - 1);
    const char *end;
    struct cube_time t;

    if (!at)
        return INT64_MIN;
    at += sizeof mark - 1;
    end = memchr(at, '"', (size_t)(line + len - at));
    if (!end || cube_time_parse(at, (size_t)(end - at), &t) < 0)
        return INT64_MIN;
    return cube_time_to_ns(&t);
}

/* Old events are removed, some at a time. */
static void cube_manager_sweep_events(struct cube_manager *m, int64_t old_ns)
{
    struct cube_cursor *c =
        cube_cursor_open(m->store, CUBE_TREE_EVENTS, NULL);
    int more = c ? cube_cursor_first(c, NULL) : 0;

    for (int i = 0; more > 0 && i < CUBE_SWEEP_EVENTS; i++) {
        size_t len = 0, key_len;
        const void *line = NULL, *key = cube_cursor_key(c, &key_len);

        if (cube_cursor_value(c, &line, &len, NULL) < 0 ||
            cube_event_line_ns(line, len) >= old_ns)
            break;
        (void)cube_store_del(m->store, CUBE_TREE_EVENTS, key, key_len, NULL);
        more = cube_cursor_next(c, NULL);
    }
    cube_cursor_close(c);
}

/* Does nobody have this task any more? A home that cannot be asked may. */
static bool cube_charge_is_confirmed(struct cube_charge *c)
{
    struct cube_list *link;

    for (link = c->manager->members.next; link != &c->manager->members;
         link = link->next) {
        struct cube_member *n = CUBE_OF(link, struct cube_member, link);

        if (cube_report_is_in_the_way(cube_member_report(n, c->rec->id)) ||
            (!n->is_listed && strcmp(n->name, c->rec->now->task->node) == 0))
            return false;
    }
    return true;
}

/* What has ended is kept for a while; what its user has removed, until all
 * that know of it have removed it too. */
static void cube_manager_sweep(struct cube_manager *m)
{
    int64_t old = m->world->wall_ns(m->world->ctx) - m->keep_ms * 1000000;
    struct cube_record *rec;

    cube_manager_sweep_events(m, old);
    for (size_t at = 0; (rec = cube_ledger_next(m->ledger, &at));) {
        const struct cube_version *v = rec->now;
        bool is_old = cube_time_to_ns(&v->task->finish_time) < old;

        if (rec->pending || v->is_gone || !cube_task_is_finished(v->task))
            continue;
        if (v->keep.is_hidden &&
            (is_old || cube_charge_is_confirmed(cube_charge_of(m, rec)))) {
            cube_record_remove(m->ledger, rec);
        } else if (v->keep.is_hidden) {
            cube_charge_touch(cube_charge_of(m, rec));
        } else if (is_old) {
            cube_record_edit(m->ledger, rec)->keep.is_hidden = true;
            cube_manager_stage(m, rec);
        }
    }
}

/* Four times a second: who is lost, who may be asked again, what is old. */
static void cube_manager_tick(void *arg)
{
    struct cube_manager *m = arg;
    int64_t now = cube_loop_now_ms(m->loop);
    static const char beat[] = "{\"Type\":\"beat\"}\n";

    if (now - m->last_tick_ms > CUBE_ASLEEP_MS)
        cube_manager_grace(m, now);
    m->last_tick_ms = now;
    cube_manager_count_lost(m, now);
    if (now - m->last_sweep_ms >= 1000) {
        m->last_sweep_ms = now;
        m->has_room = true; /* statistics have changed, orders are due again */
        cube_manager_sweep(m);
        cube_feed_beat(&m->feed, beat, sizeof beat - 1);
    }
    if (m->has_room) {
        m->has_room = false;
        cube_manager_touch_all(m);
    }
    cube_timer_set(m->loop, &m->tick, CUBE_TICK_MS, cube_manager_tick, m);
}

/* ---- Its API: tasks ---- */

/* A new task, or one whose user removed it before: it waits to be placed. */
static void cube_manager_accept(struct cube_manager *m,
                                struct cube_record *rec, struct cube_task *t)
{
    int64_t attempt = 0;
    struct cube_version *v;

    if (rec && cube_record_latest(rec))
        attempt = cube_record_latest(rec)->task->attempt;
    if (!rec)
        rec = cube_ledger_add(m->ledger, t->id);
    v = cube_record_edit(m->ledger, rec);
    cube_task_free(v->task);
    v->task = t;
    v->is_gone = false;
    v->keep.is_hidden = false;
    v->keep.moves = v->keep.restarts = 0;
    v->keep.budget = -1;
    v->keep.avoid[0] = 0;
    t->state = CUBE_PENDING;
    t->wanted = CUBE_WANT_RUN;
    t->attempt = attempt;
    t->restart_count = 0;
    t->has_exit_code = false;
    t->created_time = cube_manager_now(m);
    memset(&t->start_time, 0, sizeof t->start_time);
    memset(&t->finish_time, 0, sizeof t->finish_time);
    memset(&t->restart_time, 0, sizeof t->restart_time);
    cube_task_set(&t->container_id, "");
    cube_task_set(&t->node, "");
    cube_task_set(&t->error, "");
    cube_task_set(&t->progress, "");
    cube_task_unbind(t);
    cube_manager_stage(m, rec);
}

/* Submitting a task that is there already. */
static void cube_manager_resubmit(struct cube_manager *m,
                                  struct cube_http_req *req,
                                  const struct cube_version *v,
                                  const struct cube_task *t)
{
    struct cube_buf body = {0};

    if (cube_task_is_finished(v->task)) {
        cube_http_reply_error(req, 409, "task %s has ended (%s): to run it "
                              "again, remove it first (cube rm %s), or leave "
                              "its ID out", t->id,
                              cube_state_name(v->task->state), t->id);
        return;
    }
    if (!cube_task_same_spec(v->task, t)) {
        cube_http_reply_error(req, 409, "task %s exists with another "
                              "specification: stop and remove it first, or "
                              "leave the ID out", t->id);
        return;
    }
    cube_task_print(v->task, &body);
    cube_buf_puts(&body, "\n");
    cube_reply_kept(m->commit, req, 201, &body);
}

/* Stages the wish to stop; nothing changes for a task that has ended. */
static void cube_manager_want_stop(struct cube_manager *m,
                                   struct cube_record *rec)
{
    if (cube_task_is_finished(cube_record_latest(rec)->task) ||
        cube_record_latest(rec)->task->wanted == CUBE_WANT_STOP)
        return;
    cube_record_edit(m->ledger, rec)->task->wanted = CUBE_WANT_STOP;
    cube_manager_stage(m, rec);
}

/* An event that was understood. The newest version counts, committed or not:
 * two requests of one turn must not both be the first. */
static void cube_manager_submit(struct cube_manager *m,
                                struct cube_http_req *req,
                                struct cube_event *e)
{
    struct cube_task *t = e->task;
    struct cube_record *rec;
    const struct cube_version *v;
    struct cube_buf body = {0};

    if (!*t->id)
        cube_uuid_new(m->world, t->id);
    rec = cube_ledger_find(m->ledger, t->id);
    v = rec ? cube_record_latest(rec) : NULL;
    if (v && (v->is_gone || v->keep.is_hidden))
        v = NULL;
    if (e->state == CUBE_COMPLETED && !v) {
        cube_http_reply_error(req, 404, "task %s is unknown", t->id);
        return;
    }
    if (v && e->state != CUBE_COMPLETED) {
        cube_manager_resubmit(m, req, v, t);
        return;
    }
    if (v) {
        cube_manager_want_stop(m, rec);
    } else {
        e->task = NULL;
        cube_manager_accept(m, rec, t);
        rec = cube_ledger_find(m->ledger, t->id);
    }
    cube_task_print(cube_record_latest(rec)->task, &body);
    cube_buf_puts(&body, "\n");
    cube_reply_kept(m->commit, req, 201, &body);
}

/* POST /tasks. Unknown fields are refused: a misspelt one would be ignored in
 * silence otherwise. */
static void cube_manager_post(void *arg, struct cube_http_req *req)
{
    struct cube_manager *m = arg;
    struct cube_event *e = NULL;
    struct cube_err err;
    size_t len;
    const char *body = cube_http_body(req, &len);

    if (cube_task_or_event_parse(body, len, true, &e, &err) < 0 ||
        (!e->task && cube_fail(&err, CUBE_EINVAL, "the event has no Task")) ||
        (e->state != CUBE_RUNNING && e->state != CUBE_COMPLETED &&
         cube_fail(&err, CUBE_EINVAL, "State is %d: an event asks for 2 (run) "
                   "or 3 (stop)", (int)e->state)) ||
        (e->state == CUBE_RUNNING && cube_task_check(e->task, &err) < 0))
        cube_http_reply_error(req, 400, "%s", err.text);
    else
        cube_manager_submit(m, req, e);
    cube_event_free(e);
}

/* The record that a path names, unless its user has removed it. */
static struct cube_record *cube_manager_find(struct cube_manager *m,
                                             struct cube_http_req *req)
{
    const char *text = cube_http_param(req, "id");
    char id[CUBE_UUID_TEXT];
    struct cube_record *rec = NULL;
    const struct cube_version *v;

    if (text && cube_uuid_parse(text, strlen(text), id) == 0)
        rec = cube_ledger_find(m->ledger, id);
    v = rec ? cube_record_latest(rec) : NULL;
    if (v && !v->is_gone && !v->keep.is_hidden)
        return rec;
    cube_http_reply(req, 404, NULL, NULL, 0);
    return NULL;
}

/* DELETE /tasks/{id}: 204 once the wish is on disk. With ?forget=1 a task that
 * has ended is hidden at once, and its record goes when no worker has it. */
static void cube_manager_delete(void *arg, struct cube_http_req *req)
{
    struct cube_manager *m = arg;
    struct cube_record *rec = cube_manager_find(m, req);
    const struct cube_version *v = rec ? cube_record_latest(rec) : NULL;

    if (!rec)
        return;
    if (!cube_http_query(req, "forget")) {
        cube_manager_want_stop(m, rec);
    } else if (!cube_task_is_finished(v->task)) {
        cube_http_reply_error(req, 409, "task %s is %s: stop it first "
                              "(cube stop %s)", rec->id,
                              cube_state_name(v->task->state), rec->id);
        return;
    } else {
        cube_record_edit(m->ledger, rec)->keep.is_hidden = true;
        cube_manager_stage(m, rec);
    }
    cube_reply_kept(m->commit, req, 204, NULL);
}

/* GET /tasks. */
static void cube_manager_list(void *arg, struct cube_http_req *req)
{
    struct cube_manager *m = arg;

    cube_ledger_reply(m->ledger, req);
}

/* GET /tasks/{id}. */
static void cube_manager_get(void *arg, struct cube_http_req *req)
{
    struct cube_manager *m = arg;
    struct cube_record *rec = cube_manager_find(m, req);

    if (rec && rec->now)
        cube_reply_task(req, 200, rec->now->task);
    else if (rec)
        cube_http_reply(req, 404, NULL, NULL, 0);
}

/* GET /events: the feed of chapter 7. */
static void cube_manager_events(void *arg, struct cube_http_req *req)
{
    struct cube_manager *m = arg;

    cube_feed_follow(&m->feed, req);
}

/* ---- Its API: what only the worker knows ---- */

#ifndef CUBE_RELAY_REFUSAL_MAX
#define CUBE_RELAY_REFUSAL_MAX (64u << 10) /* bytes */
#endif

/* A request that is passed on to a worker, and its answer back. */
struct cube_relay {
    struct cube_http_req *req;
    struct cube_http_call *call;
    int status;              /* of the worker's answer, once its head is here */
    struct cube_buf refusal; /* what a worker says that has no stream to give */
    bool is_stream;
};

static void cube_relay_free(struct cube_relay *y)
{
    cube_buf_free(&y->refusal);
    cube_free(y);
}

/* Who asked went away: so does the question. */
static void cube_relay_gone(void *arg)
{
    struct cube_relay *y = arg;

    cube_http_call_cancel(y->call);
    cube_relay_free(y);
}

static void cube_relay_head(void *arg, const struct cube_http_head *head)
{
    struct cube_relay *y = arg;

    y->status = cube_http_head_status(head);
}

/* The first bytes of a stream begin the answer; an error before them can still
 * have a status of its own, and a refusal is no stream. */
static void cube_relay_data(void *arg, const char *p, size_t len)
{
    struct cube_relay *y = arg;

    if (y->status != 200) {
        if (len <= CUBE_RELAY_REFUSAL_MAX - y->refusal.len)
            cube_buf_add(&y->refusal, p, len);
        return;
    }
    if (!y->is_stream) {
        cube_http_stream(y->req, 200, "text/plain; charset=utf-8");
        y->is_stream = true;
    }
    cube_http_stream_write(y->req, p, len);
}

/* The worker's answer is over; a stream that broke is cut, not ended. */
static void cube_relay_done(void *arg, const struct cube_http_answer *a)
{
    struct cube_relay *y = arg;

    cube_http_on_gone(y->req, NULL, NULL);
    if (y->is_stream && a->err)
        cube_http_stream_abort(y->req);
    else if (y->is_stream)
        cube_http_stream_end(y->req);
    else if (a->err)
        cube_http_reply_error(y->req, 502, "%s", a->err->text);
    else if (y->refusal.len)
        cube_http_reply(y->req, a->status, "application/json",
                        y->refusal.data, y->refusal.len);
    else
        cube_http_reply(y->req, a->status,
                        a->status == 200 ? "application/json" : NULL, a->body,
                        a->body_len);
    cube_relay_free(y);
}

/* Passes a request on to the task's worker: /tasks/{id} and `tail`. */
static void cube_manager_relay(struct cube_manager *m,
                               struct cube_http_req *req, const char *tail,
                               bool is_stream)
{
    struct cube_record *rec = cube_manager_find(m, req);
    struct cube_member *n;
    struct cube_http_request q;
    struct cube_relay *y;
    struct cube_buf target = {0};

    if (!rec)
        return;
    n = cube_manager_member(m, cube_record_latest(rec)->task->node);
    if (!n || n->state != CUBE_NODE_UP) {
        cube_http_reply_error(req, n ? 502 : 404, "task %s: %s%s", rec->id,
                              n ? "no answer from node " : "it has no node",
                              n ? n->name : "");
        return;
    }
    cube_buf_printf(&target, "/tasks/%s%s", rec->id, tail);
    y = cube_alloc(sizeof *y);
    memset(y, 0, sizeof *y);
    y->req = req;
    memset(&q, 0, sizeof q);
    q.method = "GET";
    q.target = target.data;
    q.on_head = is_stream ? cube_relay_head : NULL;
    q.timeout_ms = is_stream ? 0 : CUBE_ORDER_MS;
    q.on_data = is_stream ? cube_relay_data : NULL;
    q.on_done = cube_relay_done;
    q.max_body = 8 << 20;
    q.arg = y;
    y->call = cube_http_call(n->client, &q);
    cube_http_on_gone(req, cube_relay_gone, y);
    cube_buf_free(&target);
}

/* GET /tasks/{id}/inspect. */
static void cube_manager_inspect(void *arg, struct cube_http_req *req)
{
    cube_manager_relay(arg, req, "", false);
}

/* GET /tasks/{id}/logs; the query is checked here and written anew. */
static void cube_manager_logs(void *arg, struct cube_http_req *req)
{
    const char *tail = cube_http_query(req, "tail");
    const char *follow = cube_http_query(req, "follow");
    struct cube_buf query = {0};
    uint64_t n;

    cube_buf_printf(&query, "/logs?follow=%d",
                    follow && strcmp(follow, "0") != 0);
    if (tail && cube_text_u64(tail, strlen(tail), INT32_MAX, &n) < 0) {
        cube_http_reply_error(req, 400, "tail=%s is not a number", tail);
        cube_buf_free(&query);
        return;
    }
    if (tail)
        cube_buf_printf(&query, "&tail=%s", tail);
    cube_manager_relay(arg, req, query.data, true);
    cube_buf_free(&query);
}

/* ---- Its API: nodes ---- */

/* GET /nodes. */
static void cube_manager_nodes(void *arg, struct cube_http_req *req)
{
    struct cube_manager *m = arg;
    struct cube_buf body = {0};
    struct cube_list *link;

    cube_buf_puts(&body, "[");
    for (link = m->members.next; link != &m->members; link = link->next) {
        struct cube_member *n = CUBE_OF(link, struct cube_member, link);

        if ((n->is_default && n->state == CUBE_NODE_NEW) ||
            cube_member_is_twin(n))
            continue;
        if (body.len > 1)
            cube_buf_puts(&body, ",");
        cube_member_print(n, &body);
    }
    cube_buf_puts(&body, "]\n");
    cube_http_reply(req, 200, "application/json", body.data, body.len);
    cube_buf_free(&body);
}

/* "host:port", with a port that can be. */
static int cube_node_name_check(const char *name, struct cube_err *err)
{
    const char *colon = strrchr(name, ':');
    uint64_t port;

    if (!colon || colon == name || strlen(name) > 255 ||
        strpbrk(name, "/ \t\r\n\"\\") ||
        cube_text_u64(colon + 1, strlen(colon + 1), 65535, &port) < 0 ||
        port == 0)
        return cube_fail(err, CUBE_EINVAL,
                         "node %s: expected host:port", name);
    return 0;
}

/* A join or a removal that is on disk. */
struct cube_joining {
    struct cube_manager *manager;
    struct cube_commit_wait wait;
    char *name;
    char uuid[CUBE_UUID_TEXT];
    bool is_removal;
};

/* A join or a removal is on disk: do it. When it is not, nothing has changed.
 */
static void cube_manager_joined(void *arg, const struct cube_err *err)
{
    struct cube_joining *j = arg;
    struct cube_manager *m = j->manager;
    struct cube_member *n = cube_manager_member(m, j->name);

    if (!err && j->is_removal && n)
        cube_member_free(n);
    else if (!err && !j->is_removal && !n)
        n = cube_member_new(m, j->name, NULL);
    if (!err && !j->is_removal && n)
        n->is_default = false;
    if (!err)
        m->has_room = true;
    cube_free(j->name);
    cube_free(j);
}

/* Stages a join or a removal. */
static void cube_manager_note_node(struct cube_manager *m, const char *name,
                                   const char *uuid, bool is_removal)
{
    struct cube_joining *j = cube_alloc(sizeof *j);

    j->manager = m;
    j->name = cube_text_dup(name);
    j->is_removal = is_removal;
    if (is_removal)
        (void)cube_store_del(m->store, CUBE_TREE_NODES, name, strlen(name),
                             NULL);
    else
        (void)cube_store_put(m->store, CUBE_TREE_NODES, name, strlen(name),
                             uuid, strlen(uuid), NULL);
    cube_commit_wait(m->commit, &j->wait, cube_manager_joined, j);
}

/* POST /nodes. A worker repeats it until a manager follows its events, so one
 * that is known already is an ordinary case. */
static void cube_manager_join(void *arg, struct cube_http_req *req)
{
    struct cube_manager *m = arg;
    struct cube_err err;
    size_t len;
    const char *body = cube_http_body(req, &len);
    struct json_value_s *root = cube_json_parse(body, len, &err);
    const char *name = cube_json_str(cube_json_get(root, "Name"), NULL);
    char uuid[CUBE_UUID_TEXT];

    cube_json_uuid(cube_json_get(root, "Worker"), uuid);
    if (!root || (!name && cube_fail(&err, CUBE_EINVAL, "Name is missing")) ||
        (!*uuid && cube_fail(&err, CUBE_EINVAL, "Worker is no UUID")) ||
        cube_node_name_check(name, &err) < 0)
        cube_http_reply_error(req, 400, "%s", err.text);
    else if (!cube_manager_member(m, name) && m->member_count >= CUBE_NODES_MAX)
        cube_http_reply_error(req, 409, "there are %d nodes already",
                              CUBE_NODES_MAX);
    else {
        cube_manager_note_node(m, name, uuid, false);
        cube_reply_kept(m->commit, req, 201, NULL);
    }
    cube_json_free(root);
}

/* DELETE /nodes/{name}. A node that is up and has tasks is not forgotten: they
 * would run on, unwatched, beside their successors. */
static void cube_manager_forget(void *arg, struct cube_http_req *req)
{
    struct cube_manager *m = arg;
    const char *name = cube_http_param(req, "name");
    struct cube_member *n = name ? cube_manager_member(m, name) : NULL;
    struct cube_record *rec;

    if (!n) {
        cube_http_reply_error(req, 404, "there is no such node");
        return;
    }
    for (size_t at = 0; n->state == CUBE_NODE_UP &&
                        (rec = cube_ledger_next(m->ledger, &at));) {
        if (!cube_task_holds(rec->now->task, name))
            continue;
        cube_http_reply_error(req, 409, "node %s is up and runs task %s: stop "
                              "its tasks, or the worker, first", name, rec->id);
        return;
    }
    cube_manager_note_node(m, name, "", true);
    cube_reply_kept(m->commit, req, 204, NULL);
}

static const struct cube_http_route cube_manager_routes[] = {
    {"POST", "/tasks", cube_manager_post},
    {"GET", "/tasks", cube_manager_list},
    {"GET", "/tasks/{id}", cube_manager_get},
    {"DELETE", "/tasks/{id}", cube_manager_delete},
    {"GET", "/tasks/{id}/logs", cube_manager_logs},
    {"GET", "/tasks/{id}/inspect", cube_manager_inspect},
    {"GET", "/nodes", cube_manager_nodes},
    {"POST", "/nodes", cube_manager_join},
    {"DELETE", "/nodes/{name}", cube_manager_forget},
    {"GET", "/events", cube_manager_events},
    {"GET", "/healthz", cube_reply_healthy},
    {NULL, NULL, NULL},
};

/* ---- Beginning and end ---- */

/* One task of the full list that a reset is followed by. */
static bool cube_manager_feed_list(void *arg, size_t *at, struct cube_buf *out)
{
    struct cube_manager *m = arg;
    struct cube_record *rec = cube_ledger_next(m->ledger, at);

    if (rec && !rec->now->is_gone && !rec->now->keep.is_hidden)
        cube_feed_task_line(&m->feed, m->feed.last, rec->now->task, false,
                            out);
    return rec != NULL;
}

static void cube_manager_hello(void *arg, struct cube_buf *out)
{
    struct cube_manager *m = arg;

    cube_buf_printf(out, ",\"Cluster\":\"%s\",\"Epoch\":%lld", m->cluster,
                    (long long)m->epoch);
}

/*
 * The cluster and its epoch. With the persistent store both stand in its meta
 * tree; a manager whose store is in memory keeps them in a small file, since
 * without them no worker would take its orders after a restart. On disk
 * before anything else is said.
 */
static int cube_manager_identify(struct cube_manager *m, bool is_memory,
                                 struct cube_err *err)
{
    struct cube_buf text = {0}, path = {0};
    uint64_t epoch = 0;
    int r;

    cube_buf_printf(&path, "%s/manager.id", m->data_dir);
    if (is_memory &&
        cube_file_read(m->world, path.data, &text, 100, NULL) == 0 &&
        text.len > 37)
        (void)cube_text_u64(text.data + 37, text.len - 37, INT64_MAX, &epoch);
    else if (!is_memory && cube_meta_get(m->store, "epoch", &text))
        (void)cube_text_u64(text.data, text.len, INT64_MAX, &epoch);
    if (!is_memory)
        (void)cube_meta_get(m->store, "cluster", &text);
    if (text.len < 36 || cube_uuid_parse(text.data, 36, m->cluster) < 0)
        cube_uuid_new(m->world, m->cluster);
    m->epoch = (int64_t)epoch + 1;
    cube_buf_clear(&text);
    if (is_memory) {
        cube_buf_printf(&text, "%s %lld", m->cluster, (long long)m->epoch);
        r = cube_file_replace(m->world, path.data, text.data, text.len, err);
    } else {
        cube_buf_printf(&text, "%lld", (long long)m->epoch);
        r = cube_meta_put(m->store, "cluster", m->cluster, err) < 0 ||
            cube_meta_put(m->store, "epoch", text.data, err) < 0 ||
            cube_store_commit(m->store, err) < 0 ? -1 : 0;
    }
    cube_buf_free(&text);
    cube_buf_free(&path);
    return r;
}

/* The last events of the store fill the ring, so that streams resume. */
static int cube_manager_load_events(struct cube_manager *m,
                                    struct cube_err *err)
{
    struct cube_cursor *c = cube_cursor_open(m->store, CUBE_TREE_EVENTS, err);
    uint64_t last = 0;
    size_t len;
    unsigned char key[8];
    int r = c ? cube_cursor_last(c, err) : -1;

    if (r > 0) {
        const void *k = cube_cursor_key(c, &len);

        last = (uint64_t)cube_number_of_key(k, len);
    }
    cube_feed_init(&m->feed, m->loop, m->cluster,
                   last > CUBE_FEED_RING ? last - CUBE_FEED_RING : 0);
    cube_number_key((int64_t)m->feed.first, key);
    if (r > 0)
        r = cube_cursor_seek(c, key, sizeof key, err);
    for (; r > 0; r = cube_cursor_next(c, err)) {
        const void *k = cube_cursor_key(c, &len);
        uint64_t seq = (uint64_t)cube_number_of_key(k, len);
        const void *line;

        if (cube_cursor_value(c, &line, &len, err) < 0) {
            r = -1;
            break;
        }
        if (seq != m->feed.last + 1) { /* older ones were removed */
            m->feed.last = seq - 1;
            m->feed.first = seq;
        }
        cube_feed_push(&m->feed, cube_text_ndup(line, len));
    }
    m->staged_seq = m->feed.last;
    cube_cursor_close(c);
    return r < 0 ? -1 : 0;
}

/* The workers that have joined before. */
static int cube_manager_load_nodes(struct cube_manager *m,
                                   struct cube_err *err)
{
    struct cube_cursor *c = cube_cursor_open(m->store, CUBE_TREE_NODES, err);
    int r = c ? cube_cursor_first(c, err) : -1;

    for (; r > 0; r = cube_cursor_next(c, err)) {
        size_t len;
        const char *key = cube_cursor_key(c, &len);
        char *name = cube_text_ndup(key, len);

        if (!cube_manager_member(m, name) && !cube_member_new(m, name, err))
            r = -1;
        cube_free(name);
        if (r < 0)
            break;
    }
    cube_cursor_close(c);
    return r < 0 ? -1 : 0;
}

/* "a:5556,b:5557" */
static int cube_manager_add_workers(struct cube_manager *m, const char *list,
                                    struct cube_err *err)
{
    const char *p = list ? list : "localhost:5556";
    int r = 0;

    while (*p && r == 0) {
        size_t len = strcspn(p, ",");
        char *name = cube_text_ndup(p, len);
        struct cube_member *n = NULL;

        if (len > 0)
            r = cube_node_name_check(name, err);
        if (len > 0 && r == 0 && !cube_manager_member(m, name)) {
            n = cube_member_new(m, name, err);
            r = n ? 0 : -1;
        }
        if (n)
            n->is_default = !list;
        cube_free(name);
        p += len + (p[len] == ',');
    }
    return r;
}

/* Opens the manager's file (or its twin in memory) and reads what is in it. */
static int cube_manager_open_store(struct cube_manager *m, const char *kind,
                                   struct cube_err *err)
{
    bool is_memory = kind && strcmp(kind, "memory") == 0;
    struct cube_store_options options;
    struct cube_buf path = {0};

    if (kind && !is_memory && strcmp(kind, "persistent") != 0)
        return cube_fail(err, CUBE_EINVAL, "store %s: there are persistent "
                         "and memory", kind);
    if (cube_dir_make(m->world, m->data_dir, err) < 0)
        return -1;
    cube_buf_printf(&path, "%s/manager.cube", m->data_dir);
    memset(&options, 0, sizeof options);
    options.is_sync_split = true;
    m->store = cube_store_open(m->world, is_memory ? NULL : path.data,
                               &options, err);
    cube_buf_free(&path);
    if (!m->store || cube_manager_identify(m, is_memory, err) < 0 ||
        cube_manager_load_events(m, err) < 0)
        return -1;
    m->feed.list = cube_manager_feed_list;
    m->feed.hello = cube_manager_hello;
    m->feed.arg = m;
    m->commit = cube_commit_open(m->loop, m->store);
    m->ledger = cube_ledger_open(m->loop, m->store, m->commit,
                                 cube_manager_changed, cube_manager_committed,
                                 cube_manager_dropped, m, err);
    return m->ledger ? 0 : -1;
}

/* The steps of cube_manager_new that can fail; cube_manager_free frees what
 * they leave behind. Nothing is answered before all was read. */
static int cube_manager_start(struct cube_manager *m,
                              const struct cube_manager_options *o,
                              struct cube_err *err)
{
    struct cube_http_options http;
    const char *name = o->scheduler_name ? o->scheduler_name : "epvm";

    m->scheduler = o->scheduler;
    if (!m->scheduler) {
        m->own_scheduler = cube_scheduler_new(name, err);
        m->scheduler = m->own_scheduler;
    }
    if (!m->scheduler || cube_manager_open_store(m, o->store, err) < 0)
        return -1;
    memset(&http, 0, sizeof http);
    http.tokens[0] = o->tokens[0];
    http.tokens[1] = o->tokens[1];
    http.host_names = o->host_names;
    http.is_open_health = true;
    m->server = cube_http_listen(m->loop,
                                 o->listen ? o->listen : "127.0.0.1:5555",
                                 cube_manager_routes, m, &http, err);
    if (!m->server || cube_manager_load_nodes(m, err) < 0 ||
        cube_manager_add_workers(m, o->workers, err) < 0)
        return -1;
    m->last_tick_ms = cube_loop_now_ms(m->loop);
    cube_manager_tick(m);
    return 0;
}

CUBE_API struct cube_manager *
cube_manager_new(struct cube_loop *l, const struct cube_manager_options *o,
                 struct cube_err *err)
{
    struct cube_manager *m = cube_alloc(sizeof *m);

    m->loop = l;
    m->world = cube_loop_world(l);
    m->data_dir = cube_text_dup(o->data_dir ? o->data_dir : ".");
    m->token = cube_text_dup(o->tokens[0]);
    m->keep_ms = o->keep_ms > 0 ? o->keep_ms : CUBE_KEEP_MS;
    m->lost_after_ms = o->lost_after_ms > 0 ? o->lost_after_ms : CUBE_LOST_MS;
    cube_list_init(&m->members);
    cube_list_init(&m->dirty);
    cube_list_init(&m->lines);
    cube_feed_init(&m->feed, l, "", 0);
    if (cube_manager_start(m, o, err) < 0) {
        cube_manager_free(m);
        return NULL;
    }
    return m;
}

/* What it holds for each record and line. */
static void cube_manager_free_parts(struct cube_manager *m)
{
    void *value;

    while (!cube_list_is_empty(&m->lines)) {
        struct cube_line *line =
            CUBE_OF(m->lines.next, struct cube_line, link);

        cube_list_remove(&line->link);
        cube_free(line->text);
        cube_free(line);
    }
    for (size_t at = 0;
         m->ledger && cube_map_next(&m->ledger->records, &at, NULL, &value);)
        cube_charge_free(((struct cube_record *)value)->owner);
}

CUBE_API void cube_manager_free(struct cube_manager *m)
{
    if (!m)
        return;
    cube_timer_clear(m->loop, &m->tick);
    cube_feed_close(&m->feed);
    cube_http_close(m->server);
    while (!cube_list_is_empty(&m->members))
        cube_member_free(CUBE_OF(m->members.next, struct cube_member, link));
    cube_manager_free_parts(m);
    cube_defer_clear(m->loop, &m->pass);
    cube_ledger_close(m->ledger);
    cube_commit_close(m->commit);
    cube_store_close(m->store);
    cube_scheduler_free(m->own_scheduler);
    cube_free(m->data_dir);
    cube_free(m->token);
    cube_free(m);
}

CUBE_API uint16_t cube_manager_port(struct cube_manager *m)
{
    return cube_http_port(m->server);
}


/* ==== Chapter 13. Client ==== uses: 1 2 3 5 6 7 ==== */
/*
 * The problem. A command line has one question at a time, and nothing to do
 * until it is answered. Everything below this chapter is callbacks.
 *
 * The simplest thing that works: start the request, turn the loop until its
 * callback has run, return what came. All of the chapter is built on that one
 * wait, and on two ways to read what comes: whole, or piece by piece.
 *
 *      cube_client_tasks(c, &list, err)           the program
 *            |  cube_client_call("GET", "/tasks")
 *            v
 *      cube_client_exchange: start; turn, turn, turn ...; done
 *            |                        ^
 *            v                        | on_head, on_data, on_done
 *      chapter 6's client  - - -  the loop  - - -  whatever else lives there
 *
 * The loop is the program's own, so a program can put a manager on it and ask
 * that manager in the same thread; the tests do. The price: a call must not
 * be made from within a callback of that loop, since it would turn the loop
 * inside itself.
 *
 * What went wrong is told in three kinds, which a command line turns into its
 * exit codes: no manager answered (CUBE_ECONN, CUBE_ETIMEOUT), whatever the
 * reason; the manager refused, in its own words, which are the best there
 * are; or what answered is no manager (CUBE_EPROTO).
 *
 * Events come as lines of JSON in pieces of any size:
 *
 *      piece 1  {"Type":"hello","Stream":"5f..","Seq":7}\n{"Type":"ta
 *      piece 2  sk","Stream":"5f..","Seq":8,"Task":{...}}\n
 *      piece 3  \n                                     an empty line is none
 *
 * The bytes behind the last line end wait for the next piece. What a line
 * says is checked no more than needed: a type that this version does not know
 * counts as a sign of life, so that a newer manager can say more.
 *
 * A stream may be silent only as long as an answer may take: the manager
 * sends a beat each second, so silence means that it, or the way to it, is
 * gone. Logs have no beats; a task may say nothing for days, so they wait.
 *
 * HTTPS is libcurl's, if it was built in with CUBE_WITH_CURL=1, since a TLS
 * of one's own would be longer than this whole file. It blocks the loop
 * meanwhile, which is right for a command line and wrong for a server; no
 * server uses it. CURL_CA_BUNDLE names the certificates to trust, as it does
 * for curl itself.
 *
 * Naive on purpose: a list is held whole, as text and as records, which is
 * fine for the tens of thousands of tasks that a manager of this kind has.
 */

#ifndef CUBE_WITH_CURL
#define CUBE_WITH_CURL 0
#endif
#if CUBE_WITH_CURL
#include <curl/curl.h>
#endif

/* What comes from outside is capped. An answer of 256 MiB is half a million
 * tasks; an event holds one task, whose body the manager capped before. */
#define CUBE_CLIENT_TIMEOUT_MS 30000
#define CUBE_CLIENT_ANSWER_MAX (256u << 20) /* bytes of a whole answer */
#define CUBE_CLIENT_LINE_MAX (4u << 20)     /* bytes of one event */

/* The object's lifetime; it borrows the loop and owns the rest. */
struct cube_client {
    struct cube_loop *loop;
    struct cube_http_client *http; /* NULL: libcurl's */
    char *base, *token;
    int timeout_ms;
};

/*
 * One exchange: on the stack of the call that waits for it, which is safe
 * since that call does not return before no callback can run any more. It
 * ends in one of four ways:
 *
 *      is_done, err CUBE_OK    the answer is complete, whatever its status
 *      is_done, err set        none came, or not all of it
 *      is_enough               `fn` has what it wanted; the call is cancelled
 *      err set, not is_done    we do not want more of it (too large)
 */
struct cube_client_wait {
    struct cube_client *client;
    cube_client_data_fn *fn; /* NULL: collect all */
    void *arg;
    int status;
    bool is_done, is_enough;
    struct cube_buf body; /* collected; of a stream only a refusal's */
    struct cube_err err;  /* why no answer came, or not all of it */
};

/* ---- One exchange ---- */

/*
 * Takes a piece of the answer; false: no more is wanted. Only a success is
 * handed to a stream's reader: the body of a refusal is the manager's reason,
 * and belongs into the error.
 */
static bool cube_client_take(struct cube_client_wait *w, const char *data,
                             size_t len)
{
    if (w->fn && w->status == 200) {
        w->is_enough = !w->fn(w->arg, data, len);
        return !w->is_enough;
    }
    if (len > CUBE_CLIENT_ANSWER_MAX - w->body.len) {
        (void)cube_fail(&w->err, CUBE_ETOOBIG, "an answer beyond %u bytes",
                        CUBE_CLIENT_ANSWER_MAX);
        return false;
    }
    cube_buf_add(&w->body, data, len);
    return true;
}

/* The kind of a refusal. Whatever is not in the table is not what a manager
 * says: a proxy's 502, a redirect, a file server's 200-odd. */
static enum cube_code cube_client_code(int status)
{
    static const struct {
        int status;
        enum cube_code code;
    } codes[] = {{400, CUBE_EINVAL}, {401, CUBE_EACCES}, {403, CUBE_EACCES},
                 {404, CUBE_ENOENT}, {409, CUBE_EEXIST}, {413, CUBE_ETOOBIG},
                 {503, CUBE_ESYNC},  {507, CUBE_ENOSPC}};

    for (size_t i = 0; i < CUBE_COUNT(codes); i++) {
        if (codes[i].status == status)
            return codes[i].code;
    }
    return CUBE_EPROTO;
}

/*
 * Turns a refusal into an error: the message in its JSON, else its text, and
 * the status behind it in any case, by which it can be looked up.
 *
 *      409 {"HTTPStatusCode":409,"Message":"task 5f.. is Running"}
 *       -> CUBE_EEXIST, "task 5f.. is Running (409)"
 */
static int cube_client_refused(struct cube_client_wait *w,
                               struct cube_err *err)
{
    const char *text = w->body.data ? w->body.data : "";
    struct json_value_s *root = cube_json_parse(text, w->body.len, NULL);
    const char *message =
        cube_json_str(cube_json_get_nocase(root, "Message"), NULL);

    (void)cube_fail(err, cube_client_code(w->status), "%.400s%s(%d)",
                    message ? message : text, message || *text ? " " : "",
                    w->status);
    cube_json_free(root);
    return -1;
}

/*
 * What an exchange that has ended means for the call. A stream that breaks
 * after its first bytes is no success with less in it: chunked bodies say
 * where they end, so the difference is known, and told.
 */
static int cube_client_outcome(struct cube_client_wait *w,
                               struct cube_err *err)
{
    if (w->is_enough)
        return 0;
    if (w->err.code == CUBE_ETIMEOUT || w->err.code == CUBE_ETOOBIG)
        return cube_fail(err, w->err.code, "%s", w->err.text);
    if (w->err.code != CUBE_OK || w->status == 0)
        return cube_fail(err, CUBE_ECONN, "%s", w->err.text);
    if (w->status < 200 || w->status > 299)
        return cube_client_refused(w, err);
    return 0;
}

/* The status decides where the body goes, and comes before it. */
static void cube_client_on_head(void *arg, const struct cube_http_head *head)
{
    struct cube_client_wait *w = arg;

    w->status = cube_http_head_status(head);
}

/* Pieces can still come in the turn in which it was enough. */
static void cube_client_on_data(void *arg, const char *data, size_t len)
{
    struct cube_client_wait *w = arg;

    if (!w->is_enough && w->err.code == CUBE_OK)
        (void)cube_client_take(w, data, len);
}

/* Once for each call that is not cancelled. What was wrong before (an answer
 * too large) is the better reason. */
static void cube_client_on_done(void *arg, const struct cube_http_answer *a)
{
    struct cube_client_wait *w = arg;

    w->is_done = true;
    w->status = a->status;
    if (a->err && w->err.code == CUBE_OK)
        w->err = *a->err;
}

/*
 * By chapter 6: turns the loop until the callbacks above have what they
 * wanted. Only the end of the call is waited for, not that of the loop: what
 * else lives there is served in the same turns. A call that has not reported
 * is cancelled, so that none of its callbacks can find `w` gone.
 */
static int cube_client_by_loop(struct cube_client_wait *w,
                               const struct cube_http_request *r,
                               struct cube_err *err)
{
    struct cube_http_call *call = cube_http_call(w->client->http, r);
    int result = 0;

    while (!w->is_done && !w->is_enough && w->err.code == CUBE_OK &&
           result == 0)
        result = cube_loop_turn(w->client->loop, -1, err);
    if (!w->is_done)
        cube_http_call_cancel(call);
    return result;
}

#if CUBE_WITH_CURL
/* Taking less than what came is how libcurl is told to stop. */
static size_t cube_client_on_curl(char *data, size_t size, size_t count,
                                  void *arg)
{
    struct cube_client_wait *w = arg;
    size_t len = size * count;

    return cube_client_take(w, data, len) ? len : 0;
}

/* Called for each line of the head. "HTTP/1.1 200 OK" and "HTTP/2 200" both
 * have the status behind the first space; an interim answer (100) is followed
 * by another status line, and the last one holds. */
static size_t cube_client_on_curl_head(char *line, size_t size, size_t count,
                                       void *arg)
{
    struct cube_client_wait *w = arg;
    size_t len = size * count, i = 0;

    while (i < len && line[i] != ' ')
        i++;
    if (len > 5 && memcmp(line, "HTTP/", 5) == 0 && len - i > 3)
        w->status = (line[i + 1] - '0') * 100 + (line[i + 2] - '0') * 10 +
                    (line[i + 3] - '0');
    return len;
}

/* The header fields; curl_slist_free_all frees them. An empty `Expect:` takes
 * away a round trip that libcurl would make for larger bodies. */
static struct curl_slist *cube_client_curl_fields(struct cube_client *c)
{
    struct cube_buf field = {NULL, 0, 0};
    struct curl_slist *list =
        curl_slist_append(NULL, "Content-Type: application/json");

    list = curl_slist_append(list, "Expect:");
    if (c->token) {
        cube_buf_printf(&field, "Authorization: Bearer %s", c->token);
        list = curl_slist_append(list, field.data);
    }
    cube_buf_free(&field);
    return list;
}

/* libcurl knows no longest silence, but a lowest speed over a time, in whole
 * seconds: one byte in that time is the same. NOSIGNAL, since a library must
 * not use SIGALRM for its timeouts. */
static void cube_client_curl_options(CURL *curl, struct cube_client_wait *w,
                                     const struct cube_http_request *r)
{
    const struct cube_world *world = cube_loop_world(w->client->loop);
    const char *authorities = world->env(world->ctx, "CURL_CA_BUNDLE");

    if (authorities && *authorities)
        curl_easy_setopt(curl, CURLOPT_CAINFO, authorities);
    curl_easy_setopt(curl, CURLOPT_CUSTOMREQUEST, r->method);
    if (r->body) {
        curl_easy_setopt(curl, CURLOPT_POSTFIELDS, (const char *)r->body);
        curl_easy_setopt(curl, CURLOPT_POSTFIELDSIZE_LARGE,
                         (curl_off_t)r->body_len);
    }
    curl_easy_setopt(curl, CURLOPT_NOSIGNAL, 1L);
    curl_easy_setopt(curl, CURLOPT_TIMEOUT_MS, (long)r->timeout_ms);
    if (r->idle_timeout_ms > 0) {
        curl_easy_setopt(curl, CURLOPT_LOW_SPEED_LIMIT, 1L);
        curl_easy_setopt(curl, CURLOPT_LOW_SPEED_TIME,
                         (long)r->idle_timeout_ms / 1000 + 1);
    }
    curl_easy_setopt(curl, CURLOPT_WRITEFUNCTION, cube_client_on_curl);
    curl_easy_setopt(curl, CURLOPT_WRITEDATA, w);
    curl_easy_setopt(curl, CURLOPT_HEADERFUNCTION, cube_client_on_curl_head);
    curl_easy_setopt(curl, CURLOPT_HEADERDATA, w);
}

/* By libcurl, which waits by itself, and verifies the certificate and the
 * host's name as it does by default. One connection a request: a command line
 * makes two or three. */
static int cube_client_by_curl(struct cube_client_wait *w,
                               const struct cube_http_request *r,
                               struct cube_err *err)
{
    struct curl_slist *fields = cube_client_curl_fields(w->client);
    struct cube_buf url = {NULL, 0, 0};
    CURL *curl = curl_easy_init();
    CURLcode code = CURLE_FAILED_INIT;

    cube_buf_printf(&url, "%s%s", w->client->base, r->target);
    if (curl && fields) {
        curl_easy_setopt(curl, CURLOPT_URL, url.data);
        curl_easy_setopt(curl, CURLOPT_HTTPHEADER, fields);
        cube_client_curl_options(curl, w, r);
        code = curl_easy_perform(curl);
    }
    if (code != CURLE_OK && !w->is_enough && w->err.code == CUBE_OK)
        (void)cube_fail(&w->err,
                        code == CURLE_OPERATION_TIMEDOUT ? CUBE_ETIMEOUT
                                                         : CUBE_ECONN,
                        "%s: %s", w->client->base, curl_easy_strerror(code));
    curl_easy_cleanup(curl);
    curl_slist_free_all(fields);
    cube_buf_free(&url);
    (void)err;
    return 0;
}
#else
static int cube_client_by_curl(struct cube_client_wait *w,
                               const struct cube_http_request *r,
                               struct cube_err *err)
{
    (void)r;
    return cube_fail(err, CUBE_EINVAL, "%s: built without libcurl",
                     w->client->base);
}
#endif

/* One request, until it is answered, refused, or nobody answers. An answer
 * that is collected has `patience_ms` for all of it; one that is streamed, for
 * each silence (0: any). */
static int cube_client_exchange(struct cube_client_wait *w,
                                const char *method, const char *target,
                                const char *body, size_t body_len,
                                int patience_ms, struct cube_err *err)
{
    struct cube_http_request r;
    int result;

    memset(&r, 0, sizeof r);
    r.method = method;
    r.target = target;
    r.body = body;
    r.body_len = body_len;
    r.timeout_ms = w->fn ? 0 : patience_ms;
    r.idle_timeout_ms = w->fn ? patience_ms : 0;
    r.on_head = cube_client_on_head;
    r.on_data = cube_client_on_data;
    r.on_done = cube_client_on_done;
    r.arg = w;
    result = w->client->http ? cube_client_by_loop(w, &r, err)
                             : cube_client_by_curl(w, &r, err);
    return result ? result : cube_client_outcome(w, err);
}

/* ---- A client ---- */

/* Whom to ask, by libcurl where it has to be. A wrong address is found now,
 * a host that is not there only by the first request. */
static int cube_client_connect(struct cube_client *c, struct cube_err *err)
{
    if (!cube_text_starts(c->base, "https://")) {
        c->http = cube_http_client_new(c->loop, c->base, c->token, err);
        return c->http ? 0 : -1;
    }
    if (CUBE_WITH_CURL)
        return 0;
    return cube_fail(err, CUBE_EINVAL, "%s: this program was built without "
                     "libcurl, which https needs; build it with "
                     "CUBE_WITH_CURL=1", c->base);
}

/* Slashes at the end of a URL are dropped, since each target begins with
 * one. */
CUBE_API struct cube_client *cube_client_new(struct cube_loop *l,
                                             const char *where,
                                             const char *token,
                                             struct cube_err *err)
{
    struct cube_client *c = cube_alloc(sizeof *c);
    size_t len = strlen(where);

    while (len > 0 && where[len - 1] == '/')
        len--;
    c->loop = l;
    c->base = cube_text_ndup(where, len);
    c->token = cube_text_dup(token);
    c->timeout_ms = CUBE_CLIENT_TIMEOUT_MS;
    if (cube_client_connect(c, err) == 0)
        return c;
    cube_client_free(c);
    return NULL;
}

CUBE_API void cube_client_free(struct cube_client *c)
{
    if (!c)
        return;
    cube_http_client_free(c->http);
    cube_free(c->base);
    cube_free(c->token);
    cube_free(c);
}

CUBE_API void cube_client_set_timeout(struct cube_client *c, int timeout_ms)
{
    c->timeout_ms = timeout_ms;
}

/* ---- Lists ---- */

/* Nothing is added to `answer` unless all of it has come. */
CUBE_API int cube_client_call(struct cube_client *c, const char *method,
                              const char *target, const char *body,
                              size_t body_len, struct cube_buf *answer,
                              struct cube_err *err)
{
    struct cube_client_wait w;
    int result;

    memset(&w, 0, sizeof w);
    w.client = c;
    result = cube_client_exchange(&w, method, target, body, body_len,
                                  c->timeout_ms, err);
    if (result == 0 && answer && w.body.len > 0)
        cube_buf_add(answer, w.body.data, w.body.len);
    cube_buf_free(&w.body);
    return result;
}

/*
 * Asks for JSON. NULL: an error; else the caller frees it with
 * cube_json_free. `text`, which may be NULL, keeps the answer's bytes. What
 * is no JSON did not come from a manager: the port may be somebody else's.
 */
static struct json_value_s *cube_client_get(struct cube_client *c,
                                            const char *target,
                                            struct cube_buf *text,
                                            struct cube_err *err)
{
    struct cube_buf own = {NULL, 0, 0};
    struct cube_buf *b = text ? text : &own;
    struct json_value_s *root = NULL;
    struct cube_err why;

    if (cube_client_call(c, "GET", target, NULL, 0, b, err) == 0) {
        root = cube_json_parse(b->data ? b->data : "", b->len, &why);
        if (!root)
            (void)cube_fail(err, CUBE_EPROTO, "%s%s: no answer of a manager: "
                            "%s", c->base, target, why.text);
    }
    cube_buf_free(&own);
    return root;
}

CUBE_API void cube_task_list_free(struct cube_task_list *l)
{
    for (size_t i = 0; i < l->count; i++)
        cube_task_free(l->list[i]);
    cube_free(l->list);
    memset(l, 0, sizeof *l);
}

/* How many items an array has; -1 for what is neither array nor null. The Go
 * implementation writes an empty list as null. */
static int cube_client_count(struct json_value_s *root, size_t *out)
{
    *out = 0;
    if (json_value_is_null(root))
        return 0;
    if (!json_value_as_array(root))
        return -1;
    *out = json_value_as_array(root)->length;
    return 0;
}

/* All or none: one task that makes no sense spoils the list, since a list
 * with a hole in it looks like a task that is gone. Unknown fields are left
 * out, so that a newer manager can be asked. */
CUBE_API int cube_client_tasks(struct cube_client *c,
                               struct cube_task_list *out,
                               struct cube_err *err)
{
    struct json_value_s *root = cube_client_get(c, "/tasks", NULL, err);
    struct cube_err why = {CUBE_EPROTO, "no array"};
    size_t count;
    int result;

    memset(out, 0, sizeof *out);
    if (!root)
        return -1;
    result = cube_client_count(root, &count);
    out->list = cube_alloc(count * sizeof(struct cube_task *));
    for (struct json_array_element_s *i = cube_json_items(root);
         i && result == 0; i = i->next) {
        struct cube_task *t = cube_task_from_json(i->value, false, &why);

        if (t)
            out->list[out->count++] = t;
        else
            result = -1;
    }
    cube_json_free(root);
    if (result == 0)
        return 0;
    cube_task_list_free(out);
    return cube_fail(err, CUBE_EPROTO, "%s/tasks: no tasks of a manager: %s",
                     c->base, why.text);
}

/* ---- Nodes ---- */

/* A copy of the text of a key; "" where there is none. */
static void cube_client_text(char **out, struct json_value_s *object,
                             const char *key)
{
    const char *text = cube_json_str(cube_json_get_nocase(object, key), NULL);

    *out = cube_text_dup(text ? text : "");
}

/* What it holds, not itself: it is an element of a list, or on a stack. */
static void cube_node_info_free(struct cube_node_info *n)
{
    char *const texts[] = {n->name, n->api, n->role, n->state,
                           n->worker, n->runtime, n->error, n->json};

    for (size_t i = 0; i < CUBE_COUNT(texts); i++)
        cube_free(texts[i]);
}

/*
 * Reads one node; `json` is its text, which is kept, so that a program can
 * show what this version has no field for. `v` may be NULL: all is empty.
 *
 *      {"Name":"a:5556","Api":"http://a:5556","Memory":24684096, ...
 *       "Stats":{... "Runtime":"docker","CpuUse":0.25,"Cpus":4},
 *       "Role":"worker","TaskCount":3,"State":"up","Worker":"5f..."}
 *
 * A manager of the Go implementation ends after TaskCount, and its Stats
 * before Runtime; they can be null too.
 */
static void cube_node_info_read(struct cube_node_info *n,
                                struct json_value_s *v, const char *json,
                                size_t len)
{
    const struct {
        char **out;
        const char *key;
    } texts[] = {{&n->name, "Name"},   {&n->api, "Api"},
                 {&n->role, "Role"},   {&n->state, "State"},
                 {&n->worker, "Worker"}, {&n->error, "Error"}};
    struct json_value_s *stats = cube_json_get_nocase(v, "Stats");

    memset(n, 0, sizeof *n);
    for (size_t i = 0; i < CUBE_COUNT(texts); i++)
        cube_client_text(texts[i].out, v, texts[i].key);
    cube_client_text(&n->runtime, stats, "Runtime");
    (void)cube_json_i64(cube_json_get_nocase(v, "Memory"), &n->mem_kb);
    (void)cube_json_i64(cube_json_get_nocase(v, "Disk"), &n->disk_bytes);
    (void)cube_json_i64(cube_json_get_nocase(v, "TaskCount"),
                        &n->task_count);
    if (cube_json_f64(cube_json_get_nocase(stats, "CpuUse"), &n->cpu_use))
        n->cpu_use = -1;
    n->json = cube_text_ndup(json, len);
}

/*
 * The text of the next object or array in an array whose parsing went well,
 * from `*at` on, which starts at 0; false at its end.
 *
 *      [ {"a":[1]} , {"b":"]"} ]
 *      1 2    3 2 1  2       1 0      depth behind each bracket
 *        ^-------^   ^-------^        from where it becomes 2 to where it
 *                                     falls to 1 again
 *
 * Brackets in strings do not count. The text is known to be whole, so each
 * string has an end.
 */
static bool cube_client_slice(const char *text, size_t len, size_t *at,
                              const char **item, size_t *item_len)
{
    int depth = *at > 0; /* inside the array, or in front of it */
    size_t begin = 0;

    for (size_t i = *at; i < len; i++) {
        char ch = text[i];

        if (ch == '"') {
            for (i++; text[i] != '"'; i++)
                i += text[i] == '\\';
        } else if (ch == '{' || ch == '[') {
            if (++depth == 2)
                begin = i;
        } else if ((ch == '}' || ch == ']') && --depth == 1) {
            *item = text + begin;
            *item_len = i + 1 - begin;
            *at = i + 1;
            return true;
        }
    }
    return false;
}

/* Items of the tree and slices of the text go side by side; both skip what is
 * no object, since a slice begins at a bracket only. */
CUBE_API int cube_client_nodes(struct cube_client *c,
                               struct cube_node_list *out,
                               struct cube_err *err)
{
    struct cube_buf text = {NULL, 0, 0};
    struct json_value_s *root = cube_client_get(c, "/nodes", &text, err);
    size_t at = 0, len, count;
    const char *item;
    int result = -1;

    memset(out, 0, sizeof *out);
    if (root)
        result = cube_client_count(root, &count);
    if (root && result)
        (void)cube_fail(err, CUBE_EPROTO, "%s/nodes: no nodes of a manager",
                        c->base);
    if (result == 0) {
        out->list = cube_alloc(count * sizeof *out->list);
        for (struct json_array_element_s *i = cube_json_items(root); i;
             i = i->next) {
            if (json_value_as_object(i->value) &&
                cube_client_slice(text.data, text.len, &at, &item, &len))
                cube_node_info_read(&out->list[out->count++], i->value, item,
                                    len);
        }
    }
    cube_json_free(root);
    cube_buf_free(&text);
    return result;
}

CUBE_API void cube_node_list_free(struct cube_node_list *l)
{
    for (size_t i = 0; i < l->count; i++)
        cube_node_info_free(&l->list[i]);
    cube_free(l->list);
    memset(l, 0, sizeof *l);
}

/* ---- Requests about one thing ---- */

/* A path or query, and in its middle a name with what it needs to be
 * encoded. */
static void cube_client_target(struct cube_buf *b, const char *before,
                               const char *name, const char *after)
{
    cube_buf_puts(b, before);
    cube_http_encode(b, name);
    cube_buf_puts(b, after);
}

/* A request without a body about `name`, which can hold anything: names of
 * nodes come from the command line. */
static int cube_client_about(struct cube_client *c, const char *method,
                             const char *before, const char *name,
                             const char *after, struct cube_buf *answer,
                             struct cube_err *err)
{
    struct cube_buf target = {NULL, 0, 0};
    int result;

    cube_client_target(&target, before, name, after);
    result = cube_client_call(c, method, target.data, NULL, 0, answer, err);
    cube_buf_free(&target);
    return result;
}

/* A 201 whose body cannot be read was accepted all the same; the error then
 * says that what answered is no manager, which is the more likely thing. */
CUBE_API int cube_client_submit(struct cube_client *c,
                                const struct cube_event *e,
                                struct cube_task **out, struct cube_err *err)
{
    struct cube_buf body = {NULL, 0, 0}, answer = {NULL, 0, 0};
    struct cube_task *t = NULL;
    struct cube_err why;
    int result;

    cube_event_print(e, &body);
    result = cube_client_call(c, "POST", "/tasks", body.data, body.len,
                              &answer, err);
    if (result == 0 &&
        cube_task_parse(answer.data ? answer.data : "", answer.len, false, &t,
                        &why))
        result = cube_fail(err, CUBE_EPROTO, "%s/tasks: no answer of a "
                           "manager: %s", c->base, why.text);
    if (result == 0 && out)
        *out = t;
    else
        cube_task_free(t);
    cube_buf_free(&body);
    cube_buf_free(&answer);
    return result;
}

/* 204 says that the wish is on disk, not that the task has ended: the wish
 * holds through every crash from then on. Events tell when it is true. */
CUBE_API int cube_client_stop(struct cube_client *c, const char *task_id,
                              struct cube_err *err)
{
    return cube_client_about(c, "DELETE", "/tasks/", task_id, "", NULL, err);
}

CUBE_API int cube_client_remove(struct cube_client *c, const char *task_id,
                                struct cube_err *err)
{
    return cube_client_about(c, "DELETE", "/tasks/", task_id, "?forget=1",
                             NULL, err);
}

CUBE_API int cube_client_node_remove(struct cube_client *c, const char *name,
                                     struct cube_err *err)
{
    return cube_client_about(c, "DELETE", "/nodes/", name, "", NULL, err);
}

CUBE_API int cube_client_inspect(struct cube_client *c, const char *task_id,
                                 struct cube_buf *json, struct cube_err *err)
{
    return cube_client_about(c, "GET", "/tasks/", task_id, "/inspect", json,
                             err);
}

/* ---- Streams ---- */

/* A GET whose answer goes to `fn` piece by piece. 0 when it has ended as it
 * should, or when `fn` had enough; the two can be told apart by what `fn`
 * noted. */
static int cube_client_stream(struct cube_client *c, const char *target,
                              cube_client_data_fn *fn, void *arg,
                              int silence_ms, struct cube_err *err)
{
    struct cube_client_wait w;
    int result;

    memset(&w, 0, sizeof w);
    w.client = c;
    w.fn = fn;
    w.arg = arg;
    result = cube_client_exchange(&w, "GET", target, NULL, 0, silence_ms,
                                  err);
    cube_buf_free(&w.body);
    return result;
}

CUBE_API int cube_client_logs(struct cube_client *c, const char *task_id,
                              bool is_following, long tail,
                              cube_client_data_fn *fn, void *arg,
                              struct cube_err *err)
{
    struct cube_buf target = {NULL, 0, 0};
    int result;

    cube_client_target(&target, "/tasks/", task_id, "/logs");
    cube_buf_puts(&target, is_following ? "?follow=1" : "?follow=0");
    if (tail >= 0)
        cube_buf_printf(&target, "&tail=%ld", tail);
    result = cube_client_stream(c, target.data, fn, arg,
                                is_following ? 0 : c->timeout_ms, err);
    cube_buf_free(&target);
    return result;
}

/*
 * The reader of an event stream; on the stack of the call.
 *
 *      bytes  ->  rest  ->  whole lines  ->  notices  ->  fn
 *                 a line's beginning waits here for its end
 */
struct cube_client_lines {
    cube_client_notice_fn *fn;
    void *arg;
    struct cube_buf rest; /* of a line that is not whole yet */
    bool is_enough;
    struct cube_err err;
};

/* The names are in the order of the enum. What is not among them (the stats
 * of a worker's stream, what a newer manager tells) is a sign of life. */
static enum cube_notice_type cube_client_notice_type(struct json_value_s *v)
{
    static const char *const names[] = {"hello", "reset", "listed",
                                        "task",  "gone",  "node"};
    size_t len;
    const char *type = cube_json_str(cube_json_get(v, "Type"), &len);

    for (size_t i = 0; type && i < CUBE_COUNT(names); i++) {
        if (cube_text_is(type, len, names[i]))
            return (enum cube_notice_type)i;
    }
    return CUBE_NOTICE_BEAT;
}

/* "stream:seq", where the line has both: what `?after=` takes. A manager that
 * has started anew has another stream, says so by "reset", and lists all. */
static void cube_client_cursor(struct json_value_s *v, struct cube_buf *out)
{
    const char *stream = cube_json_str(cube_json_get(v, "Stream"), NULL);
    int64_t seq;

    if (stream && cube_json_i64(cube_json_get(v, "Seq"), &seq) == 0)
        cube_buf_printf(out, "%.64s:%lld", stream, (long long)seq);
}

/* Fills what lines of all types have. Borrows from `v` and `cursor`. */
static void cube_client_notice(struct cube_notice *n, struct json_value_s *v,
                               struct cube_buf *cursor)
{
    size_t len;
    const char *time = cube_json_str(cube_json_get(v, "Time"), &len);

    n->type = cube_client_notice_type(v);
    cube_client_cursor(v, cursor);
    n->cursor = cursor->data;
    n->id = cube_json_str(cube_json_get(v, "ID"), NULL);
    if (!time || cube_time_parse(time, len, &n->time))
        memset(&n->time, 0, sizeof n->time);
}

/*
 * Hands one line on as a notice; -1: it makes no sense, and then so may the
 * next ones: the stream is given up, and what follows a reconnection can be
 * trusted. A record that cannot be read is not skipped for the same reason.
 */
static int cube_client_line(struct cube_client_lines *l, const char *line,
                            size_t len)
{
    struct json_value_s *v = cube_json_parse(line, len, &l->err);
    struct cube_notice n = {.line = line, .len = len};
    struct cube_buf cursor = {NULL, 0, 0};
    struct cube_node_info node;
    struct cube_task *task = NULL;

    if (!v)
        return -1;
    cube_client_notice(&n, v, &cursor);
    cube_node_info_read(&node, cube_json_get(v, "Node"), "", 0);
    if (n.type == CUBE_NOTICE_TASK)
        task = cube_task_from_json(cube_json_get(v, "Task"), false, &l->err);
    if (n.type == CUBE_NOTICE_GONE && !n.id)
        (void)cube_fail(&l->err, CUBE_EPROTO, "\"gone\" without an ID");
    n.task = task;
    n.node = &node;
    if (l->err.code == CUBE_OK)
        l->is_enough = !l->fn(l->arg, &n);
    cube_task_free(task);
    cube_node_info_free(&node);
    cube_buf_free(&cursor);
    cube_json_free(v);
    return l->err.code == CUBE_OK ? 0 : -1;
}

/* Takes a piece of the stream: as many whole lines as there are by now. What
 * was handed on is dropped at once, so a busy stream needs no more memory
 * than its longest line and one piece. */
static bool cube_client_on_lines(void *arg, const char *data, size_t len)
{
    struct cube_client_lines *l = arg;
    size_t at = 0;
    char *end;

    cube_buf_add(&l->rest, data, len);
    while (!l->is_enough && l->err.code == CUBE_OK &&
           (end = memchr(l->rest.data + at, '\n', l->rest.len - at))) {
        size_t n = (size_t)(end - l->rest.data) - at;

        if (n > 0 && cube_client_line(l, l->rest.data + at, n))
            break;
        at += n + 1;
    }
    cube_buf_drop(&l->rest, at);
    if (l->rest.len > CUBE_CLIENT_LINE_MAX)
        (void)cube_fail(&l->err, CUBE_ETOOBIG, "an event beyond %u bytes",
                        CUBE_CLIENT_LINE_MAX);
    return !l->is_enough && l->err.code == CUBE_OK;
}

/* An event stream has no end of its own, so one that ends was cut: by a
 * manager that stops in peace as much as by one that was killed. */
CUBE_API int cube_client_events(struct cube_client *c, const char *task_id,
                                const char *after, cube_client_notice_fn *fn,
                                void *arg, struct cube_err *err)
{
    struct cube_client_lines l;
    struct cube_buf target = {NULL, 0, 0};
    int result;

    memset(&l, 0, sizeof l);
    l.fn = fn;
    l.arg = arg;
    cube_buf_puts(&target, "/events");
    if (task_id)
        cube_client_target(&target, "?task=", task_id, "");
    if (after)
        cube_client_target(&target, task_id ? "&after=" : "?after=", after,
                           "");
    result = cube_client_stream(c, target.data, cube_client_on_lines, &l,
                                c->timeout_ms, err);
    if (result == 0 && !l.is_enough && l.err.code != CUBE_OK)
        result = cube_fail(err, CUBE_EPROTO, "%s%s: %s", c->base, target.data,
                           l.err.text);
    else if (result == 0 && !l.is_enough)
        result = cube_fail(err, CUBE_ECONN, "%s ended the events", c->base);
    cube_buf_free(&l.rest);
    cube_buf_free(&target);
    return result;
}


