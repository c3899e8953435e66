/* A world whose clocks jump: the machine's sockets, files and threads, but
 * when nothing is ready and no job is under way, time goes straight to the
 * next timer. Everything must live on one loop of one process. Include after
 * test.h. */
#ifndef JUMP_WORLD_H
#define JUMP_WORLD_H

#include <sched.h>

struct jump_world {
    struct cube_world table; /* pass &this->table; its ctx is this struct */
    int64_t now_ms;
    int64_t ahead_ns;        /* what somebody added to the wall clock */
    int jobs;                /* under way */
    bool has_sent;           /* something that may be on its way */
    int full;                /* this errno value ends each write to a file */
    int refused;             /* writes that ended so */
    int sync_fails;          /* so many syncs from now on end with EIO */
};

#define JUMP_SINCE_NS INT64_C(1750000000000000000)

static int64_t jump_now_ms(void *ctx)
{
    return ((struct jump_world *)ctx)->now_ms;
}

static int64_t jump_wall_ns(void *ctx)
{
    const struct jump_world *w = ctx;

    return JUMP_SINCE_NS + w->now_ms * 1000000 + w->ahead_ns;
}

static int jump_job_start(void *ctx, struct cube_poll *p, struct cube_job *job)
{
    int r = cube_world_real()->job_start(NULL, p, job);

    if (r >= 0)
        ((struct jump_world *)ctx)->jobs++;
    return r;
}

static void jump_job_cancel(void *ctx, struct cube_poll *p,
                            struct cube_job *job)
{
    cube_world_real()->job_cancel(NULL, p, job);
    ((struct jump_world *)ctx)->jobs--;
}

static int jump_connect(void *ctx, const struct cube_addr *addr)
{
    ((struct jump_world *)ctx)->has_sent = true;
    return cube_world_real()->connect(NULL, addr);
}

static int jump_send(void *ctx, int fd, const void *buf, size_t len)
{
    ((struct jump_world *)ctx)->has_sent = true;
    return cube_world_real()->send(NULL, fd, buf, len);
}

static int jump_poll_wait(void *ctx, struct cube_poll *p,
                          struct cube_ready *out, int max, int timeout_ms)
{
    struct jump_world *w = ctx;
    int n = cube_world_real()->poll_wait(NULL, p, out, max,
                                         timeout_ms == 0 ? 0 : 1);

    /* What was sent comes at once, but on a machine that is busy only when the
     * kernel's own threads have had their turn. */
    for (int i = 0; n == 0 && w->has_sent && i < 8 && timeout_ms > 0; i++) {
        (void)sched_yield();
        n = cube_world_real()->poll_wait(NULL, p, out, max, 1);
    }
    w->has_sent = w->has_sent && n > 0;
    while (n == 0 && w->jobs > 0 && timeout_ms != 0)
        n = cube_world_real()->poll_wait(NULL, p, out, max, 50);
    for (int i = 0; i < n; i++) {
        w->jobs -= out[i].job != NULL;
        if (out[i].job && out[i].job->kind == CUBE_JOB_SYNC &&
            w->sync_fails > 0) {
            w->sync_fails--;
            out[i].job->result = -EIO;
        }
    }
    if (n == 0 && timeout_ms > 0)
        w->now_ms += timeout_ms;
    return n;
}

static int64_t jump_pwrite(void *ctx, int fd, const void *buf, size_t len,
                           int64_t at)
{
    struct jump_world *w = ctx;

    w->refused += w->full != 0;
    return w->full ? -w->full
                   : cube_world_real()->pwrite(NULL, fd, buf, len, at);
}

static void jump_world_init(struct jump_world *w)
{
    memset(w, 0, sizeof *w);
    w->table = *cube_world_real();
    w->table.ctx = w;
    w->now_ms = 1000000;
    w->table.now_ms = jump_now_ms;
    w->table.wall_ns = jump_wall_ns;
    w->table.job_start = jump_job_start;
    w->table.job_cancel = jump_job_cancel;
    w->table.poll_wait = jump_poll_wait;
    w->table.connect = jump_connect;
    w->table.send = jump_send;
    w->table.pwrite = jump_pwrite;
}

#endif
