/* ==== Chapter 0. Preface ==== uses: nothing ==== */

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

static int64_t cube_world_now_ms(void *ctx)
{
    struct timespec t;

    (void)ctx;
    clock_gettime(CLOCK_BOOTTIME, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static int64_t cube_world_wall_ns(void *ctx)
{
    struct timespec t;

    (void)ctx;
    clock_gettime(CLOCK_REALTIME, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

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

static const char *cube_world_env(void *ctx, const char *name)
{
    (void)ctx;
    return getenv(name);
}

static unsigned cube_world_uid(void *ctx)
{
    (void)ctx;
    return (unsigned)geteuid();
}

/* ---- Sockets ---- */

/* The kernel's form of an address; returns its length. */
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

static int cube_world_connected(void *ctx, int fd)
{
    int e = 0;
    socklen_t len = sizeof e;

    (void)ctx;
    if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &e, &len) < 0)
        return -errno;
    return -e;
}

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

static int cube_world_recv(void *ctx, int fd, void *buf, size_t len)
{
    ssize_t n;

    (void)ctx;
    do
        n = recv(fd, buf, len > INT_MAX ? INT_MAX : len, 0);
    while (n < 0 && errno == EINTR);
    return n < 0 ? -errno : (int)n;
}

static int cube_world_send(void *ctx, int fd, const void *buf, size_t len)
{
    ssize_t n;

    (void)ctx;
    do
        n = send(fd, buf, len > INT_MAX ? INT_MAX : len, MSG_NOSIGNAL);
    while (n < 0 && errno == EINTR);
    return n < 0 ? -errno : (int)n;
}

static int cube_world_shut(void *ctx, int fd)
{
    (void)ctx;
    return shutdown(fd, SHUT_WR) < 0 ? -errno : 0;
}

static int cube_world_close(void *ctx, int fd)
{
    (void)ctx;
    return close(fd) < 0 ? -errno : 0;
}

/* ---- Jobs: the two calls that stall ---- */

#define CUBE_JOB_KINDS 2

/* One thread of one kind. `current` is what it works on, NULL when that job
 * was cancelled meanwhile. */
struct cube_helper {
    struct cube_jobs *jobs;
    struct cube_job *first, *last, *current;
    pthread_cond_t has_work;
    bool is_started;
};

/* What a poll shares with its helpers; freed by whoever leaves last. */
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

#define CUBE_WAKE_TOKEN UINT64_MAX

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

/* Signals are the program's: a helper takes none. */
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

static uint32_t cube_world_epoll_events(unsigned events)
{
    return (events & CUBE_READ ? (uint32_t)EPOLLIN | EPOLLRDHUP : 0) |
           (events & CUBE_WRITE ? (uint32_t)EPOLLOUT : 0);
}

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

static int cube_world_poll_fd(void *ctx, struct cube_poll *p)
{
    (void)ctx;
    return p->epoll_fd;
}

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

#define CUBE_POLL_MAX 64

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

static int cube_world_lock(void *ctx, int fd)
{
    (void)ctx;
    if (flock(fd, LOCK_EX | LOCK_NB) == 0)
        return 0;
    return errno == EWOULDBLOCK ? -EBUSY : -errno;
}

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

static int cube_world_list(void *ctx, const char *dir,
                           void (*each)(void *arg, const char *name),
                           void *arg)
{
    struct dirent **names;
    int n = scandir(dir, &names, NULL, alphasort);

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
    if (r < 0)
        return r;
    return lock.l_type == F_UNLCK ? 0 : (int)lock.l_pid;
}

static int cube_world_pid_open(void *ctx, int pid)
{
    long fd = syscall(SYS_pidfd_open, pid, 0);

    (void)ctx;
    return fd < 0 ? -errno : (int)fd;
}

static int cube_world_pid_signal(void *ctx, int pid_fd, int signal_number)
{
    (void)ctx;
    return syscall(SYS_pidfd_send_signal, pid_fd, signal_number, NULL, 0) < 0
               ? -errno
               : 0;
}

static int cube_world_spawn(void *ctx, const struct cube_spawn *spec)
{
    (void)ctx;
    (void)spec;
    return -ENOSYS;
}

/* ---- The table ---- */

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

/* The words for a negative errno value, as the World returns them. */
static const char *cube_errno_text(int64_t negative)
{
    return strerror((int)-negative);
}

/* The kind of a negative errno value. */
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

CUBE_UNUSED static void cube_oom(void)
{
    static const char words[] = "cube: out of memory\n";

    if (write(2, words, sizeof words - 1) < 0)
        abort();
    abort();
}

/* Zeroed memory of the object's lifetime; never NULL. */
static void *cube_alloc(size_t size)
{
    void *p = CUBE_MALLOC(size ? size : 1);

    if (!p)
        CUBE_OOM();
    memset(p, 0, size);
    return p;
}

static void *cube_resize(void *old, size_t size)
{
    void *p = CUBE_REALLOC(old, size ? size : 1);

    if (!p)
        CUBE_OOM();
    return p;
}

static void cube_free(void *p)
{
    CUBE_FREE(p);
}

/* ---- Texts ---- */

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

/* Frees what `*slot` holds and puts a copy of `text` (may be NULL) there. */
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

/* Decimal digits and nothing else, at most `max`. */
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

/* Makes room for `more` bytes and the NUL behind them. */
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

CUBE_API void cube_buf_free(struct cube_buf *b)
{
    cube_free(b->data);
    memset(b, 0, sizeof *b);
}

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

/* Removes the first `len` bytes. */
static void cube_buf_drop(struct cube_buf *b, size_t len)
{
    CUBE_ASSERT(len <= b->len);
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

/* Gives the bytes away: the caller frees them. Never NULL. */
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

/* A ring through its head: an empty list is a head that points to itself. */
struct cube_list {
    struct cube_list *next, *prev;
};

/* The member of type `type` whose field `field` is the link `link`. */
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
 * was initialised or zeroed. */
static void cube_list_remove(struct cube_list *link)
{
    if (!link->next)
        return;
    link->prev->next = link->next;
    link->next->prev = link->prev;
    cube_list_init(link);
}

/* ---- Maps ---- */

struct cube_map_entry {
    char *key; /* NULL: a hole */
    void *value;
    uint64_t hash;
};

/* From texts to pointers; the keys are copied, the values are borrowed. */
struct cube_map {
    struct cube_map_entry *entries;
    uint32_t *slots;      /* index into entries + 1; 0 is free */
    size_t used, cap;     /* of entries, holes included */
    size_t count;         /* without holes */
    size_t slot_count;    /* a power of two, at least twice `cap` */
    uint64_t seed;
};

static uint64_t cube_rotl(uint64_t x, int by)
{
    return x << by | x >> (64 - by);
}

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

static uint64_t cube_le64(const unsigned char *p, size_t len)
{
    uint64_t v = 0;

    for (size_t i = 0; i < len; i++)
        v |= (uint64_t)p[i] << (8 * i);
    return v;
}

/* SipHash-2-4 (Aumasson and Bernstein, 2012) of a text. */
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

/* A zeroed map is a map with seed 0. */
static void cube_map_init(struct cube_map *m, uint64_t seed)
{
    memset(m, 0, sizeof *m);
    m->seed = seed;
}

static void cube_map_free(struct cube_map *m)
{
    for (size_t i = 0; i < m->used; i++)
        cube_free(m->entries[i].key);
    cube_free(m->entries);
    cube_free(m->slots);
    cube_map_init(m, m->seed);
}

static void cube_map_index(struct cube_map *m, size_t entry)
{
    size_t mask = m->slot_count - 1;
    size_t i = m->entries[entry].hash & mask;

    while (m->slots[i])
        i = (i + 1) & mask;
    m->slots[i] = (uint32_t)entry + 1;
}

/* Closes the holes and makes room for as many entries again. */
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

/* Puts `value` there and returns what was there before, or NULL. */
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

/* Removes it and returns its value, or NULL. Safe during a walk. */
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

/* RFC 4648 section 4, or with `is_url` section 5, both padded. */
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

/* Both alphabets, padded or not; -1 for anything else. */
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

/* One block of FIPS 180-4 section 6.2.2. */
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

static void cube_uuid_write(const unsigned char id[16],
                            char out[CUBE_UUID_TEXT])
{
    char hex[33];

    cube_hex(id, 16, hex);
    (void)snprintf(out, CUBE_UUID_TEXT, "%.8s-%.4s-%.4s-%.4s-%.12s", hex,
                   hex + 8, hex + 12, hex + 16, hex + 20);
}

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

#define CUBE_SEC_TO_1970 62135596800

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

/* Days since 0001-01-01 in the Gregorian calendar. March is taken as the
 * first month, so that the leap day is the last of its year. */
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

static int cube_days_in(int64_t year, int month)
{
    static const int days[] = {31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31};

    return days[month - 1] + (month == 2 && cube_year_is_leap(year));
}

/* The date of a day number; the year is guessed and corrected. */
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

CUBE_API void cube_time_format(const struct cube_time *t,
                               char out[CUBE_TIME_TEXT])
{
    int64_t local = t->sec + (int64_t)t->offset_min * 60;
    int64_t days = local >= 0 ? local / 86400 : 0;
    int sec = (int)(local >= 0 ? local % 86400 : 0);
    int64_t year;
    int month, day, n, away = abs(t->offset_min);

    cube_date_of(days, &year, &month, &day);
    n = snprintf(out, CUBE_TIME_TEXT, "%04d-%02d-%02dT%02d:%02d:%02d",
                 (int)(year % 10000), month, day, sec / 3600,
                 sec / 60 % 60, sec % 60);
    if (t->nsec > 0) {
        n += snprintf(out + n, 11, ".%09d", (int)t->nsec);
        while (out[n - 1] == '0')
            n--;
    }
    if (t->offset_min == 0)
        (void)snprintf(out + n, 2, "Z");
    else
        (void)snprintf(out + n, 7, "%c%02d:%02d",
                       t->offset_min < 0 ? '-' : '+', away / 60 % 100,
                       away % 60);
}

/* Reads exactly `digits` decimal digits; -1 when there are others. */
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

/* The `+02:00` or `Z` at the end. */
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

/* Reads a whole file, /proc included, of at most `cap` bytes. */
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

/* The directory that `path` is in, "." if it names none. */
static void cube_path_dir(const char *path, struct cube_buf *out)
{
    const char *slash = strrchr(path, '/');

    cube_buf_clear(out);
    if (!slash)
        cube_buf_puts(out, ".");
    else
        cube_buf_add(out, path, slash == path ? 1 : (size_t)(slash - path));
}

/* Writes all of it; a negative errno value when it cannot. */
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

/* Replaces the file by these bytes, or leaves it as it was: written beside
 * it, synced, renamed, and the directory synced. */
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

/* Makes a directory and those above it; one that exists is fine. */
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




/* ==== Chapter 4. Store ==== uses: 1 2 ==== */




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

static uint64_t cube_watch_token(const struct cube_watch *watch)
{
    return (uint64_t)watch->generation << 32 | (uint32_t)watch->fd;
}

static bool cube_watch_is_set(struct cube_loop *l,
                              const struct cube_watch *watch)
{
    return watch->generation != 0 && (size_t)watch->fd < l->watch_cap &&
           l->watches[watch->fd] == watch;
}

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

static bool cube_timer_is_before(const struct cube_timer *a,
                                 const struct cube_timer *b)
{
    return a->at_ms != b->at_ms ? a->at_ms < b->at_ms : a->order < b->order;
}

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

/* After this `fn` does not run any more. */
static void cube_loop_job_cancel(struct cube_loop *l, struct cube_loop_job *j)
{
    if (j->is_started)
        l->world->job_cancel(l->world->ctx, l->poll, &j->job);
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

static void cube_loop_commit(struct cube_loop *l)
{
    l->has_slices = false;
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
    struct cube_ready ready[CUBE_LOOP_BATCH];
    int own_ms = cube_loop_timeout_ms(l);
    int n;

    if (own_ms >= 0 && (timeout_ms < 0 || own_ms < timeout_ms))
        timeout_ms = own_ms;
    n = l->world->poll_wait(l->world->ctx, l->poll, ready, CUBE_LOOP_BATCH,
                            timeout_ms);
    if (n < 0)
        return cube_fail(err, CUBE_EIO, "wait for descriptors: %s",
                         cube_errno_text(n));
    for (int i = 0; i < n; i++)
        cube_loop_dispatch(l, &ready[i]);
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


/* ==== Chapter 6. HTTP ==== uses: 1 2 5 ==== */




/* ==== Chapter 7. Tasks ==== uses: 1 2 3 4 5 ==== */




/* ==== Chapter 8. Machine ==== uses: 1 2 3 ==== */




/* ==== Chapter 9. Runtimes ==== uses: 1 2 3 5 6 7 ==== */




/* ==== Chapter 10. Schedulers ==== uses: 1 2 7 8 ==== */




/* ==== Chapter 11. Worker ==== uses: 1 2 3 4 5 6 7 8 9 ==== */




/* ==== Chapter 12. Manager ==== uses: 1 2 3 4 5 6 7 8 10 ==== */




/* ==== Chapter 13. Client ==== uses: 1 2 3 5 6 7 ==== */



