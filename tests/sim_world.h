/* A machine room in one process: hosts with disks, processes and clocks, and
 * the network between them, all on one virtual clock and all from one seed.
 * Each simulated process gets a `struct cube_world` of its own; the code above
 * chapter 1 that runs on it is the code that ships.
 *
 *      room_run
 *         |  earliest of: an event, a process that is due
 *         +--> event: a segment arrives, a sync is done, a fault, a script
 *         +--> process: its `turn` runs, which turns its loop once
 *
 * Time is in microseconds. A turn takes some, so that whoever spins is seen to
 * use time. Nothing here blocks and nothing asks the machine for anything.
 *
 * Network. A connection has two ends; each keeps what was sent by it and has
 * not arrived (its flight) and what has arrived and was not read. A segment
 * that finds its way barred is sent again after 0.2 s, 0.4 s ... as TCP would,
 * so a partition delays and does not lose. A host that has crashed answers
 * nothing, and once it is back it answers what it does not know with a reset.
 *
 *      send ---> flight ---latency, jitter, bandwidth---> rx ---> recv
 *                  |
 *                  +-- barred? again later (rto doubles)
 *
 * Disk. What is written is seen at once, and kept beside as an operation until
 * a sync makes it last. When the host crashes each 512 bytes of what was not
 * synced is kept or lost by lot, in any order; of the names made, renamed and
 * removed in a directory that was not synced, only a first part is kept. A
 * sync that fails may leave writes that can be read and are never on disk.
 *
 * Include after test.h or its like: it needs cube.h and the names of libc. */
#ifndef SIM_WORLD_H
#define SIM_WORLD_H

#define ROOM_HOSTS 12
#define ROOM_WINDOW 65536      /* bytes sent and not yet read */
#define ROOM_SECTOR 512
#define ROOM_SEC INT64_C(1000000)
#define ROOM_NEVER INT64_MAX
#define ROOM_BACKLOG 512

struct room;
struct room_proc;
struct room_conn;

typedef void room_fn(struct room *s, void *arg, int64_t number);

struct room_event {
    int64_t at_us;
    uint64_t order;
    room_fn *fn;
    void *arg;
    int64_t number;
};

/* A change of a file that is not on disk yet. */
struct room_write {
    struct room_write *next;
    uint64_t seq;
    bool is_truncate; /* to `at` bytes */
    bool is_lost;     /* a sync has failed over it: seen, never on disk */
    int64_t at;
    size_t len;
    char *bytes;
};

struct room_bytes {
    char *p;
    size_t len, cap;
};

struct room_file {
    int refs;                 /* names, names on disk, descriptors, syncs */
    struct room_bytes now, disk;
    struct room_write *first, **last;
    uint64_t seq;
    bool is_locked, is_socket;
    char *dir;                /* it is this directory, opened to be synced */
};

/* A path and what it names; of the running system, or of the disk. */
struct room_name {
    struct room_name *next;
    char *path;
    struct room_file *file;
};

/* A change of names that is not on disk yet. `file` NULL: removed. */
struct room_naming {
    struct room_naming *next;
    char *path;
    struct room_file *file;
    uint64_t seq;
    bool is_with_next;        /* both halves of a rename, or none */
};

/* From one host to another. */
struct room_link {
    int barred;               /* so many faults bar it */
    int64_t extra_us;         /* more latency */
};

struct room_host {
    char name[16];
    int number;
    bool is_down;
    int64_t boot_us;          /* its now_ms counts from here */
    int64_t wall_ns;          /* its wall clock is so much ahead */
    struct room_name *names, *disk;
    struct room_naming *namings, **last_naming;
    uint64_t naming_seq;
    int full, failing;        /* faults: no room; reads and writes fail */
    int no_names;             /* names cannot be looked up */
    int64_t bytes_per_sec;    /* fault: a thin way; 0: the seed's network */
    int sync_fails;           /* so many syncs from now on fail */
    int64_t sync_us;          /* a sync takes so much longer */
};

enum room_kind { ROOM_FREE, ROOM_LISTENER, ROOM_END, ROOM_FILE, ROOM_TEXT };

struct room_fd {
    enum room_kind kind;
    void *ptr;
    bool is_watched, has_lock;
    unsigned events;
    uint64_t token;
};

enum room_segment_kind {
    ROOM_DATA, ROOM_SYN, ROOM_SYNACK, ROOM_FIN, ROOM_RST
};

struct room_segment {
    struct room_segment *next;
    enum room_segment_kind kind;
    int64_t at_us;
    size_t len;
    char bytes[];
};

struct room_end {
    struct room_conn *conn;
    struct room_end *peer;
    struct room_host *host;
    struct room_proc *proc;    /* NULL: no descriptor */
    struct room_listener *waits; /* to be accepted */
    bool is_open, is_connected, has_fin, has_shut;
    int err;                  /* to be told once */
    bool is_dead;             /* reset: nothing comes or goes any more */
    struct room_bytes rx;
    size_t rx_at;
    struct room_segment *first, *last; /* in flight from here */
    size_t in_flight;
    bool is_moving;
    int64_t rto_us, free_us;
    struct cube_addr peer_addr;
};

struct room_conn {
    struct room_end end[2];    /* 0 has connected, 1 was connected to */
    struct room_conn *next, **link;
    struct cube_addr to;
    bool is_local;            /* a unix socket */
    bool is_cut;              /* fault: nothing arrives, nobody is told */
    int number;
};

struct room_listener {
    struct room_listener *next;
    struct room_proc *proc;
    struct cube_addr addr;
    struct room_end *queue[ROOM_BACKLOG];
    int count;
};

/* A job that is under way. */
struct room_work {
    struct room_work *next;
    struct room_proc *proc;    /* NULL: nobody waits for it any more */
    struct room_host *host;
    struct cube_job *job;
    struct room_file *file;
    uint64_t seq;             /* what was written by then is synced */
    bool is_done;
};

struct room_proc {
    struct cube_world table;
    struct room *room;
    struct room_host *host;
    char name[24];
    bool is_up;               /* false: every call fails, nothing happens */
    bool is_stopped;          /* SIGSTOP */
    bool is_woken;
    struct room_fd *fds;
    int fd_count;             /* beyond, none is in use */
    int fd_cap;
    struct room_work *done;
    int64_t wake_us, free_us;
    void (*turn)(void *arg);  /* turns its loop; returns when to turn again */
    struct cube_loop *loop;
    void *arg;
    const char *const *env;   /* NAME=value, ends with NULL; or NULL */
    long heap_bytes, heap_peak, heap_blocks;
    /* what it did, for those who count */
    uint64_t turns, connects, syncs, seen_turns, seen_connects;
};

struct room {
    uint64_t seed, random;
    int64_t now_us;
    uint64_t hash, order;
    bool is_loud;
    struct room_event *heap;
    size_t heap_len, heap_cap;
    struct room_host hosts[ROOM_HOSTS];
    int host_count;
    struct room_link links[ROOM_HOSTS][ROOM_HOSTS];
    struct room_proc *procs[32];
    int proc_count;
    struct room_listener *listeners;
    struct room_conn *conns;
    struct room_work *works;
    int conn_count;
    /* of this seed's network and machines */
    int64_t latency_us, jitter_us, turn_us, sync_us;
    int64_t bytes_per_sec;
    uint32_t short_of;        /* one in so many calls is short; 0: none */
    uint64_t steps, short_calls, resets, torn, unsynced_names;
    /* told of each connection over the network that is asked for, or NULL */
    void (*on_connect)(void *arg, struct room_proc *p,
                       const struct cube_addr *addr);
    void *connect_arg;
};

/* Whose memory is being used; see room_malloc. */
static struct room_proc *room_running;

/* ---- Memory that is counted by process ---- */

static void room_heap_count(void *p, int sign)
{
    struct room_proc *proc = room_running;

    if (!proc || !p)
        return;
    proc->heap_bytes += sign * (long)malloc_usable_size(p);
    proc->heap_blocks += sign;
    if (proc->heap_bytes > proc->heap_peak)
        proc->heap_peak = proc->heap_bytes;
}

static void *room_malloc(size_t size)
{
    void *p = malloc(size);

    room_heap_count(p, 1);
    return p;
}

static void room_free(void *p)
{
    room_heap_count(p, -1);
    free(p);
}

static void *room_realloc(void *p, size_t size)
{
    room_heap_count(p, -1);
    p = realloc(p, size);
    room_heap_count(p, 1);
    return p;
}

/* The simulation's own; never NULL, zeroed. */
static void *room_new(size_t size)
{
    void *p = calloc(1, size);

    if (!p)
        abort();
    return p;
}

static void room_bytes_size(struct room_bytes *b, size_t len)
{
    if (len > b->cap) {
        b->cap = len < 4096 ? 4096 : len * 2;
        b->p = realloc(b->p, b->cap);
        if (!b->p)
            abort();
    }
    if (len > b->len)
        memset(b->p + b->len, 0, len - b->len);
    b->len = len;
}

/* ---- Randomness, trace ---- */

/* splitmix64 (Steele et al. 2014) */
static uint64_t room_mix(uint64_t *state)
{
    uint64_t z = (*state += 0x9e3779b97f4a7c15u);

    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static uint64_t room_random(struct room *s)
{
    return room_mix(&s->random);
}

/* 0 .. limit - 1; 0 for a limit of 0 */
static int64_t room_below(struct room *s, int64_t limit)
{
    return limit <= 0 ? 0 : (int64_t)(room_random(s) % (uint64_t)limit);
}

static bool room_one_in(struct room *s, uint32_t n)
{
    return n > 0 && room_below(s, n) == 0;
}

static void room_hash(struct room *s, uint64_t value)
{
    s->hash = (s->hash ^ value) * 0x9e3779b97f4a7c15u;
    s->hash ^= s->hash >> 29;
}

static void room_hash_bytes(struct room *s, const void *p, size_t len)
{
    const char *at = p;
    uint64_t word;

    for (; len >= 8; at += 8, len -= 8) {
        memcpy(&word, at, 8);
        room_hash(s, word);
    }
    word = 0;
    memcpy(&word, at, len);
    room_hash(s, word ^ len);
}

/* A line of the readable trace; part of the hash whether it is read or not. */
__attribute__((format(printf, 3, 4)))
static void room_say(struct room *s, const char *who, const char *format, ...)
{
    char line[700];
    va_list args;

    va_start(args, format);
    (void)vsnprintf(line, sizeof line, format, args);
    va_end(args);
    room_hash(s, (uint64_t)s->now_us);
    room_hash_bytes(s, line, strlen(line));
    if (s->is_loud)
        printf("%10.6f %-4s %s\n", (double)s->now_us / 1e6, who, line);
}

/* ---- Events ---- */

static bool room_event_is_before(const struct room_event *a,
                                const struct room_event *b)
{
    return a->at_us != b->at_us ? a->at_us < b->at_us : a->order < b->order;
}

/* Has `fn` called at that time; those of one time in the order of asking. */
static void room_at(struct room *s, int64_t at_us, room_fn *fn, void *arg,
                   int64_t number)
{
    struct room_event e = {at_us, ++s->order, fn, arg, number};
    size_t at;

    if (s->heap_len == s->heap_cap) {
        s->heap_cap = s->heap_cap ? s->heap_cap * 2 : 256;
        s->heap = realloc(s->heap, s->heap_cap * sizeof *s->heap);
        if (!s->heap)
            abort();
    }
    for (at = s->heap_len++; at > 0; at = (at - 1) / 2) {
        if (!room_event_is_before(&e, &s->heap[(at - 1) / 2]))
            break;
        s->heap[at] = s->heap[(at - 1) / 2];
    }
    s->heap[at] = e;
}

static struct room_event room_take(struct room *s)
{
    struct room_event top = s->heap[0], e = s->heap[--s->heap_len];
    size_t at = 0, child;

    while ((child = 2 * at + 1) < s->heap_len) {
        if (child + 1 < s->heap_len &&
            room_event_is_before(&s->heap[child + 1], &s->heap[child]))
            child++;
        if (!room_event_is_before(&s->heap[child], &e))
            break;
        s->heap[at] = s->heap[child];
        at = child;
    }
    s->heap[at] = e;
    return top;
}

/* ---- Descriptors ---- */

/* Something happened that this process may wait for. */
static void room_poke(struct room_proc *p)
{
    if (p && p->wake_us > p->room->now_us)
        p->wake_us = p->room->now_us;
}

/* The lowest free one, as Linux gives it. */
static int room_fd_new(struct room_proc *p, enum room_kind kind, void *ptr)
{
    int fd = 3;

    while (fd < p->fd_cap && p->fds[fd].kind != ROOM_FREE)
        fd++;
    if (fd >= p->fd_cap) {
        int had = p->fd_cap;

        p->fd_cap = fd * 2 + 16;
        p->fds = realloc(p->fds, (size_t)p->fd_cap * sizeof *p->fds);
        if (!p->fds)
            abort();
        memset(p->fds + had, 0, (size_t)(p->fd_cap - had) * sizeof *p->fds);
    }
    memset(&p->fds[fd], 0, sizeof p->fds[fd]);
    p->fds[fd].kind = kind;
    p->fds[fd].ptr = ptr;
    if (fd >= p->fd_count)
        p->fd_count = fd + 1;
    return fd;
}

/* What a descriptor stands for, if it is of that kind; else NULL. */
static void *room_fd_get(struct room_proc *p, int fd, enum room_kind kind)
{
    return p->is_up && fd >= 0 && fd < p->fd_count && p->fds[fd].kind == kind
               ? p->fds[fd].ptr : NULL;
}

/* ---- The network: segments ---- */

static int room_conn_close_end(struct room_end *e, bool is_silent);

/* When both ends are closed and nothing is under way. */
static void room_conn_settle(struct room_conn *c)
{
    for (int i = 0; i < 2; i++)
        if (c->end[i].is_open || c->end[i].is_moving)
            return;
    *c->link = c->next;
    if (c->next)
        c->next->link = c->link;
    for (int i = 0; i < 2; i++)
        free(c->end[i].rx.p);
    free(c);
}

static void room_flight_clear(struct room_end *e)
{
    while (e->first) {
        struct room_segment *seg = e->first;

        e->first = seg->next;
        free(seg);
    }
    e->in_flight = 0;
}

static void room_arrive(struct room *s, void *arg, int64_t number);

/* How thin a fault has made the way from this end, at either host; 0: it is
 * as wide as the seed's network. */
static int64_t room_thin(const struct room_end *from)
{
    int64_t own = from->host->bytes_per_sec;
    int64_t other = from->peer->host->bytes_per_sec;

    return own == 0 || (other > 0 && other < own) ? other : own;
}

/* Looks for the first segment when it is due; on a thin way soon in any case,
 * since that may become a wide one meanwhile (room_hasten). */
static void room_arrive_later(struct room *s, struct room_end *from)
{
    int64_t at = from->first->at_us, soon = s->now_us + ROOM_SEC / 10;

    at = at > s->now_us ? at : s->now_us + 1;
    room_at(s, at > soon && room_thin(from) ? soon : at, room_arrive, from, 0);
}

/* The ways from and to a host are wide again, but for those that are thin at
 * their other ends: what had queued up for them is through at once. What waits
 * to be sent again waits on. */
static void room_hasten(struct room *s, const struct room_host *host)
{
    for (struct room_conn *c = s->conns; c; c = c->next) {
        for (int i = 0; i < 2 && !c->is_local; i++) {
            struct room_end *e = &c->end[i];

            if ((e->host != host && e->peer->host != host) || e->rto_us > 0 ||
                room_thin(e))
                continue;
            if (e->free_us > s->now_us)
                e->free_us = s->now_us;
            for (struct room_segment *seg = e->first; seg; seg = seg->next)
                if (seg->at_us > s->now_us + s->latency_us)
                    seg->at_us = s->now_us + s->latency_us;
        }
    }
}

/* Sends a segment on its way. They arrive in order. */
static void room_transmit(struct room *s, struct room_end *from,
                          enum room_segment_kind kind, const void *bytes,
                          size_t len)
{
    struct room_segment *seg = room_new(sizeof *seg + len);
    struct room_link *link =
        &s->links[from->host->number][from->peer->host->number];
    int64_t thin = room_thin(from), at;

    if (from->conn->is_local) {
        at = s->now_us + 5 + room_below(s, 20);
    } else {
        if (from->free_us < s->now_us)
            from->free_us = s->now_us;
        from->free_us += (int64_t)(len + 60) * ROOM_SEC /
                         (thin ? thin : s->bytes_per_sec);
        at = from->free_us + s->latency_us + link->extra_us +
             room_below(s, s->jitter_us);
    }
    if (from->last && from->first && from->last->at_us > at)
        at = from->last->at_us;
    seg->kind = kind;
    seg->at_us = at;
    seg->len = len;
    if (len)
        memcpy(seg->bytes, bytes, len);
    if (from->first)
        from->last->next = seg;
    else
        from->first = seg;
    from->last = seg;
    from->in_flight += len;
    if (!from->is_moving) {
        from->is_moving = true;
        room_arrive_later(s, from);
    }
}

/* This end is reset: what was on its way from it is gone, and what has come can
 * still be read, as from a kernel. */
static void room_end_reset(struct room_end *e, int err)
{
    e->err = err;
    e->is_dead = true;
    room_flight_clear(e);
    room_poke(e->proc);
}

static struct room_host *room_host_of(struct room *s, struct room_host *own,
                                      const struct cube_addr *a)
{
    int n = a->ip[3] - 1;

    if (a->kind == CUBE_ADDR_UNIX || a->ip[0] == 127)
        return own;
    return a->kind == CUBE_ADDR_IP4 && a->ip[0] == 10 && n >= 0 &&
                   n < s->host_count ? &s->hosts[n] : NULL;
}

static struct room_listener *room_listener_at(struct room *s,
                                            const struct room_host *h,
                                            const struct cube_addr *a)
{
    for (struct room_listener *l = s->listeners; l; l = l->next) {
        if (l->proc->host == h && l->addr.kind == a->kind &&
            l->addr.port == a->port && !strcmp(l->addr.path, a->path))
            return l;
    }
    return NULL;
}

/* A connection is wanted: it waits at the listener, or is refused. */
static bool room_syn(struct room *s, struct room_end *to)
{
    struct room_listener *l = room_listener_at(s, to->host, &to->conn->to);

    if (to->is_open || to->is_dead) /* the first SYN came through before */
        return true;
    if (!l || l->count == ROOM_BACKLOG)
        return false;
    to->is_open = to->is_connected = true;
    to->waits = l;
    l->queue[l->count++] = to;
    room_poke(l->proc);
    room_transmit(s, to, ROOM_SYNACK, NULL, 0);
    return true;
}

/* A segment has come. Who knows nothing of the connection says so. */
static void room_deliver(struct room *s, struct room_end *to,
                        const struct room_segment *seg)
{
    size_t len = to->rx.len;

    if (seg->kind == ROOM_RST) {
        if (to->is_open && !to->is_dead)
            room_end_reset(to, to->is_connected ? ECONNRESET : ECONNREFUSED);
        return;
    }
    if (seg->kind == ROOM_SYN ? !room_syn(s, to)
                             : (!to->is_open || to->is_dead) &&
                                   seg->kind != ROOM_FIN &&
                                   seg->kind != ROOM_SYNACK) {
        room_transmit(s, to, ROOM_RST, NULL, 0);
        return;
    }
    if (!to->is_open || to->is_dead)
        return;
    if (seg->kind == ROOM_SYNACK)
        to->is_connected = true;
    if (seg->kind == ROOM_FIN)
        to->has_fin = true;
    if (seg->kind == ROOM_DATA) {
        room_bytes_size(&to->rx, len + seg->len);
        memcpy(to->rx.p + len, seg->bytes, seg->len);
        room_hash_bytes(s, seg->bytes, seg->len);
    }
    room_hash(s, (uint64_t)to->conn->number * 8 + (uint64_t)seg->kind);
    room_poke(to->proc);
}

/* May something get from one end to the other now? */
static bool room_is_barred(struct room *s, const struct room_end *from)
{
    if (from->conn->is_local)
        return false;
    return from->conn->is_cut || from->host->is_down ||
           from->peer->host->is_down ||
           s->links[from->host->number][from->peer->host->number].barred;
}

/* The next segments of a flight, if their time has come and the way is free. */
static void room_arrive(struct room *s, void *arg, int64_t number)
{
    struct room_end *from = arg;
    int64_t first_rto = from->is_connected ? ROOM_SEC / 5 : ROOM_SEC;

    (void)number;
    while (from->first && from->first->at_us <= s->now_us) {
        struct room_segment *seg = from->first;

        if (room_is_barred(s, from)) {
            if (!from->is_open && from == from->conn->end) {
                room_flight_clear(from); /* closed: not sent again */
                break;
            }
            from->rto_us = from->rto_us ? from->rto_us * 2 : first_rto;
            seg->at_us = s->now_us + from->rto_us;
            break;
        }
        from->rto_us = 0;
        from->first = seg->next;
        from->in_flight -= seg->len;
        room_deliver(s, from->peer, seg);
        free(seg);
        room_poke(from->proc); /* there may be room to send more */
    }
    from->is_moving = from->first != NULL;
    if (from->is_moving)
        room_arrive_later(s, from);
    else
        room_conn_settle(from->conn);
}

/* ---- The network: calls ---- */

static int room_listen(void *ctx, const struct cube_addr *addr)
{
    struct room_proc *p = ctx;
    struct room_listener *l;
    struct room_name *n;

    if (!p->is_up)
        return -EIO;
    if (room_listener_at(p->room, p->host, addr))
        return -EADDRINUSE;
    for (n = p->host->names; addr->kind == CUBE_ADDR_UNIX && n; n = n->next)
        if (!strcmp(n->path, addr->path))
            return -EADDRINUSE;
    if (addr->kind == CUBE_ADDR_UNIX) {
        n = room_new(sizeof *n);
        n->path = strdup(addr->path);
        n->file = room_new(sizeof *n->file);
        n->file->last = &n->file->first;
        n->file->refs = 1;
        n->file->is_socket = true;
        n->next = p->host->names;
        p->host->names = n;
    }
    l = room_new(sizeof *l);
    l->proc = p;
    l->addr = *addr;
    l->next = p->room->listeners;
    p->room->listeners = l;
    return room_fd_new(p, ROOM_LISTENER, l);
}

static int room_accept(void *ctx, int fd, struct cube_addr *peer)
{
    struct room_proc *p = ctx;
    struct room_listener *l = room_fd_get(p, fd, ROOM_LISTENER);
    struct room_end *e;

    if (!l)
        return -EBADF;
    if (l->count == 0)
        return -EAGAIN;
    e = l->queue[0];
    memmove(l->queue, l->queue + 1, (size_t)--l->count * sizeof *l->queue);
    e->waits = NULL;
    e->proc = p;
    *peer = e->peer_addr;
    return room_fd_new(p, ROOM_END, e);
}

static struct room_conn *room_conn_new(struct room_proc *p,
                                       struct room_host *to,
                                       const struct cube_addr *addr)
{
    struct room_conn *c = room_new(sizeof *c);
    struct room *s = p->room;

    c->to = *addr;
    c->is_local = addr->kind == CUBE_ADDR_UNIX;
    c->number = ++s->conn_count;
    for (int i = 0; i < 2; i++) {
        c->end[i].conn = c;
        c->end[i].peer = &c->end[1 - i];
    }
    c->end[0].host = p->host;
    c->end[0].proc = p;
    c->end[0].is_open = true;
    c->end[1].host = to;
    c->end[1].peer_addr.kind = addr->kind;
    c->end[1].peer_addr.ip[0] = 10;
    c->end[1].peer_addr.ip[3] = (unsigned char)(p->host->number + 1);
    c->next = s->conns;
    c->link = &s->conns;
    if (c->next)
        c->next->link = &c->next;
    s->conns = c;
    return c;
}

static int room_connect(void *ctx, const struct cube_addr *addr)
{
    struct room_proc *p = ctx;
    struct room *s = p->room;
    struct room_host *to = room_host_of(s, p->host, addr);
    struct room_listener *l = to ? room_listener_at(s, to, addr) : NULL;
    struct room_name *n;
    struct room_conn *c;

    if (!p->is_up)
        return -EIO;
    if (!to)
        return -ENETUNREACH;
    if (addr->kind == CUBE_ADDR_UNIX && (!l || l->count == ROOM_BACKLOG)) {
        for (n = p->host->names; n && strcmp(n->path, addr->path);)
            n = n->next;
        return l ? -EAGAIN : n ? -ECONNREFUSED : -ENOENT;
    }
    p->connects++;
    if (s->on_connect)
        s->on_connect(s->connect_arg, p, addr);
    c = room_conn_new(p, to, addr);
    room_hash(s, (uint64_t)c->number);
    if (c->is_local) {
        (void)room_syn(s, &c->end[1]);
        c->end[0].is_connected = true;
    } else {
        room_transmit(s, &c->end[0], ROOM_SYN, NULL, 0);
    }
    return room_fd_new(p, ROOM_END, &c->end[0]);
}

static int room_connected(void *ctx, int fd)
{
    struct room_end *e = room_fd_get(ctx, fd, ROOM_END);
    int err = e ? e->err : EBADF;

    if (e)
        e->err = 0;
    return e && !err && e->is_dead ? -ENOTCONN : -err;
}

static int room_local_addr(void *ctx, int fd, struct cube_addr *addr)
{
    struct room_listener *l = room_fd_get(ctx, fd, ROOM_LISTENER);

    if (!l)
        return -EBADF;
    *addr = l->addr;
    return 0;
}

/* By lot, fewer bytes than were asked for. */
static size_t room_shorten(struct room *s, size_t len)
{
    if (len < 2 || !room_one_in(s, s->short_of))
        return len;
    s->short_calls++;
    return 1 + (size_t)room_below(s, (int64_t)len - 1);
}

static int room_recv(void *ctx, int fd, void *buf, size_t len)
{
    struct room_proc *p = ctx;
    struct room_end *e = room_fd_get(p, fd, ROOM_END);
    size_t left;
    int err;

    if (!e)
        return -EBADF;
    left = e->rx.len - e->rx_at;
    if (left == 0 && e->err) {
        err = e->err;
        e->err = 0;
        return -err;
    }
    if (left == 0)
        return e->has_fin || e->is_dead ? 0 : -EAGAIN;
    len = len < left ? len : left;
    len = room_shorten(p->room, len);
    memcpy(buf, e->rx.p + e->rx_at, len);
    e->rx_at += len;
    if (e->rx_at == e->rx.len)
        e->rx.len = e->rx_at = 0;
    room_poke(e->peer->proc);
    return (int)len;
}

static size_t room_room(const struct room_end *e)
{
    size_t used = e->in_flight + e->peer->rx.len - e->peer->rx_at;

    return used < ROOM_WINDOW ? ROOM_WINDOW - used : 0;
}

static int room_send(void *ctx, int fd, const void *buf, size_t len)
{
    struct room_proc *p = ctx;
    struct room_end *e = room_fd_get(p, fd, ROOM_END);
    size_t room;
    int err;

    if (!e)
        return -EBADF;
    err = e->err;
    e->err = 0;
    if (err)
        return -err;
    if (e->is_dead || e->has_shut)
        return -EPIPE;
    if (e->conn->is_local && !e->peer->is_open)
        return -EPIPE;
    room = room_room(e);
    if (!e->is_connected || room == 0)
        return -EAGAIN;
    len = room_shorten(p->room, len < room ? len : room);
    room_transmit(p->room, e, ROOM_DATA, buf, len);
    return (int)len;
}

static int room_shut(void *ctx, int fd)
{
    struct room_proc *p = ctx;
    struct room_end *e = room_fd_get(p, fd, ROOM_END);

    if (!e)
        return -EBADF;
    if (!e->has_shut && !e->is_dead)
        room_transmit(p->room, e, ROOM_FIN, NULL, 0);
    e->has_shut = true;
    return 0;
}

/* Who has begun a connection closes it: what waits to be sent is dropped (the
 * real World's SO_LINGER), and what the network has by now arrives. */
static void room_flight_drop(struct room *s, struct room_end *e)
{
    struct room_link *link =
        &s->links[e->host->number][e->peer->host->number];
    int64_t reach = s->now_us + s->latency_us + link->extra_us + s->jitter_us;
    struct room_segment **at = &e->first, *seg;

    e->last = NULL;
    while ((seg = *at) && e->rto_us == 0 && seg->at_us <= reach) {
        e->last = seg;
        at = &seg->next;
    }
    while ((seg = *at)) {
        *at = seg->next;
        e->in_flight -= seg->len;
        free(seg);
    }
    e->free_us = s->now_us;
}

/* The end has no descriptor any more. Unread bytes make it a reset, as the
 * kernel does, and so does having begun the connection; a host that crashes
 * says nothing at all. */
static int room_conn_close_end(struct room_end *e, bool is_silent)
{
    struct room *s = e->proc ? e->proc->room : NULL;
    bool is_first = e == e->conn->end && !e->conn->is_local;

    e->is_open = false;
    e->proc = NULL;
    if (s && !e->is_dead && !is_silent) {
        if (is_first)
            room_flight_drop(s, e);
        if (e->rx.len > e->rx_at || is_first)
            room_transmit(s, e, ROOM_RST, NULL, 0);
        else if (!e->has_shut)
            room_transmit(s, e, ROOM_FIN, NULL, 0);
    }
    if (is_silent)
        room_flight_clear(e);
    e->has_shut = true;
    if (!e->is_moving)
        room_conn_settle(e->conn);
    return 0;
}

static void room_listener_close(struct room_listener *l, bool is_silent)
{
    struct room_listener **at = &l->proc->room->listeners;

    while (l->count > 0) {
        struct room_end *e = l->queue[--l->count];

        e->proc = l->proc;
        e->waits = NULL;
        if (!is_silent && !e->is_dead)
            room_transmit(l->proc->room, e, ROOM_RST, NULL, 0);
        e->has_shut = true;
        e->is_dead = true;
        (void)room_conn_close_end(e, is_silent);
    }
    while (*at != l)
        at = &(*at)->next;
    *at = l->next;
    free(l);
}

/* ---- Files ---- */

static void room_file_drop(struct room_file *f)
{
    if (!f || --f->refs > 0)
        return;
    while (f->first) {
        struct room_write *w = f->first;

        f->first = w->next;
        free(w->bytes);
        free(w);
    }
    free(f->now.p);
    free(f->disk.p);
    free(f->dir);
    free(f);
}

static struct room_name **room_name_find(struct room_name **list,
                                       const char *path)
{
    while (*list && strcmp((*list)->path, path))
        list = &(*list)->next;
    return list;
}

/* Makes the path name this file, or nothing (NULL). */
static void room_name_set(struct room_name **list, const char *path,
                         struct room_file *file)
{
    struct room_name **at = room_name_find(list, path), *n = *at;

    if (file)
        file->refs++;
    if (n) {
        room_file_drop(n->file);
        n->file = file;
    } else if (file) {
        n = *at = room_new(sizeof *n);
        n->path = strdup(path);
        n->file = file;
    }
    if (n && !file) {
        *at = n->next;
        free(n->path);
        free(n);
    }
}

/* Changes a name, and notes it for the directory's next sync. */
static void room_rename_note(struct room_host *h, const char *path,
                            struct room_file *file, bool is_with_next)
{
    struct room_naming *n = room_new(sizeof *n);

    n->path = strdup(path);
    n->file = file;
    n->seq = ++h->naming_seq;
    n->is_with_next = is_with_next;
    if (file)
        file->refs++;
    room_name_set(&h->names, path, file);
    *h->last_naming = n;
    h->last_naming = &n->next;
}

/* The first change of names is on disk, or is forgotten. */
static void room_naming_end(struct room_host *h, bool is_kept)
{
    struct room_naming *n = h->namings;

    h->namings = n->next;
    if (!h->namings)
        h->last_naming = &h->namings;
    if (is_kept)
        room_name_set(&h->disk, n->path, n->file);
    room_file_drop(n->file);
    free(n->path);
    free(n);
}

static struct room_file *room_file_new(void)
{
    struct room_file *f = room_new(sizeof *f);

    f->last = &f->first;
    return f;
}

/* What /proc and /etc say. */
static char *room_text(struct room_proc *p, const char *path)
{
    long long up_s = (long long)(p->room->now_us - p->host->boot_us) /
                     ROOM_SEC;
    char text[600] = "";

    if (!strcmp(path, "/etc/machine-id"))
        (void)snprintf(text, sizeof text, "%032d\n", p->host->number + 1);
    else if (!strcmp(path, "/proc/meminfo"))
        (void)snprintf(text, sizeof text,
                       "MemTotal:       16384000 kB\n"
                       "MemFree:        12288000 kB\n"
                       "MemAvailable:   14336000 kB\n");
    else if (!strcmp(path, "/proc/stat"))
        (void)snprintf(text, sizeof text,
                       "cpu  %lld00 0 0 %lld00 0 0 0 0 0 0\n"
                       "cpu0 1 0 1 1 0 0 0 0 0 0\ncpu1 1 0 1 1 0 0 0 0 0 0\n"
                       "cpu2 1 0 1 1 0 0 0 0 0 0\ncpu3 1 0 1 1 0 0 0 0 0 0\n",
                       up_s, 3 * up_s); /* a quarter of it in use */
    else if (!strcmp(path, "/proc/loadavg"))
        (void)snprintf(text, sizeof text, "0.10 0.20 0.30 1/100 4321\n");
    return *text ? strdup(text) : NULL;
}

/* Is this path in that directory, and not deeper? */
static bool room_is_in(const char *path, const char *dir)
{
    size_t len = strlen(dir);

    return strncmp(path, dir, len) == 0 && path[len] == '/' &&
           !strchr(path + len + 1, '/');
}

/* A directory is there when something is in it. */
static struct room_file *room_dir_new(const struct room_host *h,
                                      const char *path)
{
    for (const struct room_name *n = h->names; n; n = n->next) {
        struct room_file *f;

        if (!room_is_in(n->path, path))
            continue;
        f = room_file_new();
        f->dir = strdup(path);
        return f;
    }
    return NULL;
}

static int room_open(void *ctx, const char *path, unsigned flags)
{
    struct room_proc *p = ctx;
    struct room_host *h = p->host;
    struct room_name *n = *room_name_find(&h->names, path);
    struct room_file *f = n ? n->file : NULL;
    char *text;

    if (!p->is_up)
        return -EIO;
    text = flags == 0 && !n ? room_text(p, path) : NULL;
    if (text)
        return room_fd_new(p, ROOM_TEXT, text);
    if (f && f->is_socket)
        return -ENXIO;
    if (f && (flags & CUBE_OPEN_EXCL))
        return -EEXIST;
    f = f || flags != 0 ? f : room_dir_new(h, path);
    if (!f && !(flags & CUBE_OPEN_CREATE))
        return -ENOENT;
    if (!f && h->full)
        return -ENOSPC;
    if (!f) {
        f = room_file_new();
        room_rename_note(h, path, f, false);
    } else if (flags & CUBE_OPEN_TRUNC) {
        struct room_write *w = room_new(sizeof *w);

        w->is_truncate = true;
        w->seq = ++f->seq;
        *f->last = w;
        f->last = &w->next;
        f->now.len = 0;
    }
    f->refs++;
    return room_fd_new(p, ROOM_FILE, f);
}

static int64_t room_pread(void *ctx, int fd, void *buf, size_t len, int64_t at)
{
    struct room_proc *p = ctx;
    const char *text = room_fd_get(p, fd, ROOM_TEXT);
    struct room_file *f = room_fd_get(p, fd, ROOM_FILE);
    size_t size = text ? strlen(text) : f ? f->now.len : 0;

    if (!text && !f)
        return -EBADF;
    if (f && p->host->failing)
        return -EIO;
    if (at < 0 || (size_t)at >= size)
        return 0;
    if (len > size - (size_t)at)
        len = size - (size_t)at;
    len = room_shorten(p->room, len);
    memcpy(buf, (text ? text : f->now.p) + at, len);
    return (int64_t)len;
}

static int64_t room_pwrite(void *ctx, int fd, const void *buf, size_t len,
                          int64_t at)
{
    struct room_proc *p = ctx;
    struct room_file *f = room_fd_get(p, fd, ROOM_FILE);
    struct room_write *w;

    if (!f)
        return -EBADF;
    if (p->host->failing)
        return -EIO;
    if (p->host->full) { /* what is there can be written over */
        if ((size_t)at >= f->now.len)
            return -ENOSPC;
        if (len > f->now.len - (size_t)at)
            len = f->now.len - (size_t)at;
    }
    len = room_shorten(p->room, len);
    w = room_new(sizeof *w);
    w->seq = ++f->seq;
    w->at = at;
    w->len = len;
    w->bytes = malloc(len ? len : 1);
    if (!w->bytes)
        abort();
    memcpy(w->bytes, buf, len);
    *f->last = w;
    f->last = &w->next;
    if ((size_t)at + len > f->now.len)
        room_bytes_size(&f->now, (size_t)at + len);
    memcpy(f->now.p + at, buf, len);
    return (int64_t)len;
}

static int room_truncate(void *ctx, int fd, int64_t size)
{
    struct room_proc *p = ctx;
    struct room_file *f = room_fd_get(p, fd, ROOM_FILE);
    struct room_write *w;

    if (!f)
        return -EBADF;
    if (p->host->failing)
        return -EIO;
    if (p->host->full && (size_t)size > f->now.len)
        return -ENOSPC;
    w = room_new(sizeof *w);
    w->seq = ++f->seq;
    w->is_truncate = true;
    w->at = size;
    *f->last = w;
    f->last = &w->next;
    room_bytes_size(&f->now, (size_t)size);
    return 0;
}

static int64_t room_size(void *ctx, int fd)
{
    struct room_file *f = room_fd_get(ctx, fd, ROOM_FILE);

    return f ? (int64_t)f->now.len : -EBADF;
}

/* Puts a part of an operation onto the disk. */
static void room_write_apply(struct room_file *f, const struct room_write *w,
                            size_t from, size_t to)
{
    if (w->is_truncate) {
        room_bytes_size(&f->disk, (size_t)w->at);
        return;
    }
    if ((size_t)w->at + to > f->disk.len)
        room_bytes_size(&f->disk, (size_t)w->at + to);
    memcpy(f->disk.p + (size_t)w->at + from, w->bytes + from, to - from);
}

/* What was written up to `seq` is on disk; or, when the sync fails, each
 * write is by lot, is still to come, or is lost though it can be read. */
static int room_file_sync(struct room *s, struct room_host *h,
                         struct room_file *f, uint64_t seq)
{
    struct room_write **at = &f->first;
    bool fails = h->sync_fails > 0;

    if (fails)
        h->sync_fails--;
    while (*at && (*at)->seq <= seq) {
        struct room_write *w = *at;

        if (fails && !w->is_lost && room_one_in(s, 2))
            w->is_lost = true;
        if (fails || w->is_lost) {
            at = &w->next;
            continue;
        }
        room_write_apply(f, w, 0, w->len);
        *at = w->next;
        if (!*at)
            f->last = at;
        free(w->bytes);
        free(w);
    }
    return fails ? -EIO : 0;
}

static int64_t room_sync_time(struct room *s, const struct room_host *h)
{
    return s->sync_us / 2 + room_below(s, s->sync_us) + h->sync_us;
}

static int room_sync(void *ctx, int fd)
{
    struct room_proc *p = ctx;
    struct room_file *f = room_fd_get(p, fd, ROOM_FILE);

    if (!f)
        return -EBADF;
    p->free_us += room_sync_time(p->room, p->host);
    return room_file_sync(p->room, p->host, f, f->seq);
}

/* Names in that directory, up to the change `seq`, are on disk, or not. Linux
 * keeps one journal for all directories: syncing one of them puts all that was
 * before it there, too. Only the given one is promised. */
static int room_names_sync(struct room_host *h, const char *dir, uint64_t seq)
{
    struct room_naming *last = NULL;

    if (h->sync_fails > 0) {
        h->sync_fails--;
        return -EIO;
    }
    for (struct room_naming *n = h->namings; n && n->seq <= seq; n = n->next)
        if (room_is_in(n->path, dir))
            last = n;
    while (last) {
        bool is_last = h->namings == last;

        room_naming_end(h, true);
        if (is_last)
            break;
    }
    return 0;
}

static int room_sync_dir(void *ctx, const char *path)
{
    struct room_proc *p = ctx;
    int r = p->is_up ? room_names_sync(p->host, path, p->host->naming_seq)
                     : -EIO;

    if (r == 0)
        p->free_us += room_sync_time(p->room, p->host);
    return r;
}

static int room_lock(void *ctx, int fd)
{
    struct room_proc *p = ctx;
    struct room_file *f = room_fd_get(p, fd, ROOM_FILE);

    if (!f)
        return -EBADF;
    if (f->is_locked && !p->fds[fd].has_lock)
        return -EBUSY;
    f->is_locked = p->fds[fd].has_lock = true;
    return 0;
}

static int room_rename(void *ctx, const char *from, const char *to)
{
    struct room_proc *p = ctx;
    struct room_name *n = *room_name_find(&p->host->names, from);
    struct room_file *f = n ? n->file : NULL;

    if (!p->is_up)
        return -EIO;
    if (!f)
        return -ENOENT;
    f->refs++;
    room_rename_note(p->host, to, f, true);
    room_rename_note(p->host, from, NULL, false);
    room_file_drop(f);
    return 0;
}

static int room_unlink(void *ctx, const char *path)
{
    struct room_proc *p = ctx;

    if (!p->is_up)
        return -EIO;
    if (!*room_name_find(&p->host->names, path))
        return -ENOENT;
    room_rename_note(p->host, path, NULL, false);
    return 0;
}

/* Directories are always there. */
static int room_mkdir(void *ctx, const char *path)
{
    (void)path;
    return ((struct room_proc *)ctx)->is_up ? -EEXIST : -EIO;
}

static int room_rmdir(void *ctx, const char *path)
{
    (void)ctx;
    (void)path;
    return -ENOENT;
}

static int room_list(void *ctx, const char *dir,
                    void (*each)(void *arg, const char *name), void *arg)
{
    (void)ctx;
    (void)dir;
    (void)each;
    (void)arg;
    return -ENOENT;
}

static int room_space(void *ctx, const char *path, struct cube_space *out)
{
    struct room_proc *p = ctx;

    (void)path;
    out->all = UINT64_C(200) << 30;
    out->free = p->host->full ? 0 : UINT64_C(150) << 30;
    out->free_inodes = 1000000;
    return p->is_up ? 0 : -EIO;
}

/* ---- Descriptors: closing, readiness ---- */

static int room_fd_close(struct room_proc *p, int fd, bool is_silent)
{
    struct room_fd was = p->fds[fd];

    p->fds[fd].kind = ROOM_FREE;
    p->fds[fd].is_watched = false;
    while (p->fd_count > 0 && p->fds[p->fd_count - 1].kind == ROOM_FREE)
        p->fd_count--;
    switch (was.kind) {
    case ROOM_FREE:
        return -EBADF;
    case ROOM_LISTENER:
        room_listener_close(was.ptr, is_silent);
        break;
    case ROOM_END:
        (void)room_conn_close_end(was.ptr, is_silent);
        break;
    case ROOM_FILE:
        if (was.has_lock)
            ((struct room_file *)was.ptr)->is_locked = false;
        room_file_drop(was.ptr);
        break;
    case ROOM_TEXT:
        free(was.ptr);
        break;
    }
    return 0;
}

static int room_close(void *ctx, int fd)
{
    struct room_proc *p = ctx;

    if (!p->is_up)
        return 0;
    if (fd < 0 || fd >= p->fd_count)
        return -EBADF;
    return room_fd_close(p, fd, false);
}

static unsigned room_readiness(const struct room_fd *f)
{
    const struct room_end *e = f->ptr;

    if (f->kind == ROOM_LISTENER)
        return ((struct room_listener *)f->ptr)->count > 0 ? CUBE_READ : 0;
    if (f->kind != ROOM_END)
        return 0;
    if (e->err || e->is_dead)
        return CUBE_READ | CUBE_WRITE | CUBE_HANGUP;
    return (e->rx.len > e->rx_at || e->has_fin ? CUBE_READ : 0) |
           (e->is_connected && room_room(e) > 0 ? CUBE_WRITE : 0) |
           (e->has_fin && e->has_shut ? CUBE_HANGUP : 0);
}

static struct cube_poll *room_poll_open(void *ctx)
{
    return ctx; /* a process has one, and it needs no memory of its own */
}

static void room_poll_close(void *ctx, struct cube_poll *poll)
{
    (void)ctx;
    (void)poll;
}

static int room_poll_fd(void *ctx, struct cube_poll *poll)
{
    (void)ctx;
    (void)poll;
    return -1;
}

static int room_poll_add(void *ctx, struct cube_poll *poll, int fd,
                        unsigned events, uint64_t token)
{
    struct room_proc *p = ctx;

    (void)poll;
    if (!p->is_up)
        return -EIO;
    if (fd < 0 || fd >= p->fd_count || p->fds[fd].kind == ROOM_FREE)
        return -EBADF;
    p->fds[fd].is_watched = true;
    p->fds[fd].events = events;
    p->fds[fd].token = token;
    return 0;
}

static int room_poll_remove(void *ctx, struct cube_poll *poll, int fd)
{
    struct room_proc *p = ctx;

    (void)poll;
    if (p->is_up && fd < p->fd_count)
        p->fds[fd].is_watched = false;
    return 0;
}

/* What is reported of a watched descriptor: what was asked for, and hangups
 * unasked. */
static unsigned room_reported(const struct room_fd *f)
{
    return f->is_watched
               ? room_readiness(f) & (f->events | CUBE_HANGUP) : 0;
}

/* Begins anywhere, so that no order of descriptors is relied on. */
static int room_poll_wait(void *ctx, struct cube_poll *poll,
                         struct cube_ready *out, int max, int timeout_ms)
{
    struct room_proc *p = ctx;
    int n = 0, from = (int)room_below(p->room, p->fd_count);

    (void)poll;
    (void)timeout_ms;
    if (!p->is_up)
        return 0;
    p->is_woken = false;
    for (int i = 0; i < p->fd_count && n < max; i++) {
        const struct room_fd *f = &p->fds[(from + i) % p->fd_count];
        unsigned events = room_reported(f);

        if (!events)
            continue;
        out[n].token = f->token;
        out[n].events = events;
        out[n++].job = NULL;
    }
    while (p->done && n < max) {
        struct room_work *w = p->done;

        p->done = w->next;
        memset(&out[n], 0, sizeof out[n]);
        out[n++].job = w->job;
        free(w);
    }
    return n;
}

/* Is there anything that a turn would find? */
static bool room_is_ready(const struct room_proc *p)
{
    if (p->done || p->is_woken)
        return true;
    for (int fd = 3; fd < p->fd_count; fd++)
        if (room_reported(&p->fds[fd]))
            return true;
    return false;
}

static void room_poll_wake(void *ctx, struct cube_poll *poll)
{
    struct room_proc *p = ctx;

    (void)poll;
    p->is_woken = true;
    room_poke(p);
}

/* ---- Jobs ---- */

static void room_work_unlink(struct room_work **list, struct room_work *w)
{
    while (*list && *list != w)
        list = &(*list)->next;
    if (*list)
        *list = w->next;
}

/* Names are those of hosts. */
static void room_resolve(struct room *s, const struct room_host *asker,
                         struct cube_job *job)
{
    job->result = asker->no_names ? -EAGAIN : -ENOENT;
    job->addr_count = 0;
    for (int i = 0; i < s->host_count && !asker->no_names; i++) {
        if (strcmp(s->hosts[i].name, job->host))
            continue;
        memset(&job->addrs[0], 0, sizeof job->addrs[0]);
        job->addrs[0].kind = CUBE_ADDR_IP4;
        job->addrs[0].ip[0] = 10;
        job->addrs[0].ip[3] = (unsigned char)(i + 1);
        job->addr_count = 1;
        job->result = 0;
    }
}

/* It is done: the disk has it, or not, whether anybody waits or not. */
static void room_work_done(struct room *s, void *arg, int64_t number)
{
    struct room_work *w = arg;
    int result = 0;

    (void)number;
    room_work_unlink(&s->works, w);
    if (w->file) {
        result = w->file->dir
                     ? room_names_sync(w->host, w->file->dir, w->seq)
                     : room_file_sync(s, w->host, w->file, w->seq);
        room_file_drop(w->file);
    }
    if (!w->proc) {
        free(w);
        return;
    }
    if (w->job->kind == CUBE_JOB_RESOLVE)
        room_resolve(s, w->host, w->job);
    else
        w->job->result = result;
    room_hash(s, (uint64_t)(result + 7));
    w->next = w->proc->done;
    w->proc->done = w;
    room_poke(w->proc);
}

static int room_job_start(void *ctx, struct cube_poll *poll,
                         struct cube_job *job)
{
    struct room_proc *p = ctx;
    struct room *s = p->room;
    struct room_work *w;

    (void)poll;
    if (!p->is_up)
        return -EAGAIN;
    w = room_new(sizeof *w);
    w->proc = p;
    w->host = p->host;
    w->job = job;
    if (job->kind == CUBE_JOB_SYNC) {
        w->file = room_fd_get(p, job->fd, ROOM_FILE);
        if (w->file) {
            w->file->refs++;
            w->seq = w->file->dir ? p->host->naming_seq : w->file->seq;
        }
        p->syncs++;
    }
    w->next = s->works;
    s->works = w;
    room_at(s, s->now_us + (job->kind == CUBE_JOB_SYNC
                               ? room_sync_time(s, p->host)
                               : 100 + room_below(s, 3000)),
           room_work_done, w, 0);
    return 0;
}

static void room_job_cancel(void *ctx, struct cube_poll *poll,
                           struct cube_job *job)
{
    struct room_proc *p = ctx;

    (void)poll;
    for (struct room_work *w = p->room->works; w; w = w->next)
        if (w->job == job && w->proc == p)
            w->proc = NULL;
    for (struct room_work *w = p->done; w; w = w->next) {
        if (w->job == job) {
            room_work_unlink(&p->done, w);
            free(w);
            return;
        }
    }
}

/* ---- Clocks and the rest ---- */

static int64_t room_now_ms(void *ctx)
{
    struct room_proc *p = ctx;

    return (p->room->now_us - p->host->boot_us) / 1000;
}

#define ROOM_SINCE_NS INT64_C(1750000000000000000)

static int64_t room_wall_ns(void *ctx)
{
    struct room_proc *p = ctx;

    return ROOM_SINCE_NS + p->room->now_us * 1000 + p->host->wall_ns;
}

static int room_fill(void *ctx, void *buf, size_t len)
{
    struct room_proc *p = ctx;
    unsigned char *at = buf;

    for (; len > 0; len--)
        *at++ = (unsigned char)(room_random(p->room) >> 32);
    return 0;
}

static const char *room_env(void *ctx, const char *name)
{
    const struct room_proc *p = ctx;
    size_t len = strlen(name);

    for (const char *const *e = p->env; e && *e; e++)
        if (strncmp(*e, name, len) == 0 && (*e)[len] == '=')
            return *e + len + 1;
    return NULL;
}

static unsigned room_uid(void *ctx)
{
    (void)ctx;
    return 0;
}

/* ---- Processes without Linux: none can be supervised here ---- */

static int room_spawn(void *ctx, const struct cube_spawn *spec)
{
    (void)ctx;
    (void)spec;
    return -ENOSYS;
}

static int room_lock_owner(void *ctx, const char *path)
{
    (void)ctx;
    (void)path;
    return 0;
}

static int room_pid_open(void *ctx, int pid)
{
    (void)ctx;
    (void)pid;
    return -ESRCH;
}

static int room_pid_signal(void *ctx, int fd, int number)
{
    (void)ctx;
    (void)fd;
    (void)number;
    return -ESRCH;
}

static const struct cube_world room_table = {
    NULL, room_now_ms, room_wall_ns, room_fill, room_env, room_uid,
    room_listen, room_accept, room_connect, room_connected, room_local_addr,
    room_recv, room_send, room_shut, room_close, room_poll_open,
    room_poll_close, room_poll_fd, room_poll_add, room_poll_add,
    room_poll_remove, room_poll_wait, room_poll_wake, room_job_start,
    room_job_cancel, room_open, room_pread, room_pwrite, room_truncate,
    room_size, room_sync, room_sync_dir, room_lock, room_rename, room_unlink,
    room_mkdir, room_rmdir, room_list, room_space, room_spawn,
    room_lock_owner, room_pid_open, room_pid_signal, room_close
};

/* ---- Hosts and processes ---- */

static struct room_host *room_host_add(struct room *s, const char *name)
{
    struct room_host *h = &s->hosts[s->host_count];

    h->number = s->host_count++;
    h->last_naming = &h->namings;
    h->boot_us = -(ROOM_SEC + room_below(s, 1000000 * ROOM_SEC));
    (void)snprintf(h->name, sizeof h->name, "%s", name);
    return h;
}

/* A place for a process; nothing runs in it yet. */
static struct room_proc *room_proc_add(struct room *s, struct room_host *h,
                                     const char *name)
{
    struct room_proc *p = room_new(sizeof *p);

    p->room = s;
    p->host = h;
    p->table = room_table;
    p->table.ctx = p;
    p->wake_us = ROOM_NEVER;
    (void)snprintf(p->name, sizeof p->name, "%s", name);
    s->procs[s->proc_count++] = p;
    return p;
}

/* It runs from now on: make its loop with the world &p->table. */
static void room_proc_begin(struct room_proc *p)
{
    p->is_up = true;
    p->is_stopped = p->is_woken = false;
    p->free_us = p->wake_us = p->room->now_us;
    p->heap_peak = p->heap_bytes;
}

/* The kernel's part of a death: descriptors are closed, locks dropped. The
 * owner frees the process's objects after this, which has no effect on
 * anything: every call of its world fails. A host that loses its power says
 * nothing to anybody. */
static void room_proc_end(struct room_proc *p, bool is_silent)
{
    for (struct room_work *w = p->room->works; w; w = w->next)
        if (w->proc == p)
            w->proc = NULL;
    while (p->done) {
        struct room_work *w = p->done;

        p->done = w->next;
        free(w);
    }
    for (int fd = p->fd_count - 1; fd >= 3; fd--)
        if (p->fds[fd].kind != ROOM_FREE)
            (void)room_fd_close(p, fd, is_silent);
    p->is_up = false;
    p->wake_us = ROOM_NEVER;
}

/* What the disk has after a power cut: of what was not synced, some. */
static void room_file_crash(struct room *s, struct room_file *f)
{
    while (f->first) {
        struct room_write *w = f->first;

        for (size_t from = 0; !w->is_lost && from < w->len;) {
            size_t to = from + ROOM_SECTOR -
                        ((size_t)w->at + from) % ROOM_SECTOR;

            to = to < w->len ? to : w->len;
            if (room_one_in(s, 2))
                room_write_apply(f, w, from, to);
            else
                s->torn++;
            from = to;
        }
        if (w->is_truncate && !w->is_lost && room_one_in(s, 2))
            room_write_apply(f, w, 0, 0);
        f->first = w->next;
        free(w->bytes);
        free(w);
    }
    f->last = &f->first;
    f->now.len = 0;
    room_bytes_size(&f->now, f->disk.len);
    if (f->disk.len)
        memcpy(f->now.p, f->disk.p, f->disk.len);
}

/* The power is gone. Its processes must have been ended, silently, before. */
static void room_host_crash(struct room *s, struct room_host *h)
{
    int count = 0, kept;

    h->is_down = true;
    for (struct room_work *w = s->works; w; w = w->next) {
        if (w->host == h && w->file) { /* this sync never ends */
            room_file_drop(w->file);
            w->file = NULL;
        }
    }
    for (struct room_naming *n = h->namings; n; n = n->next)
        count++;
    for (kept = (int)room_below(s, count + 1); h->namings; kept--) {
        bool is_with_next = h->namings->is_with_next;

        s->unsynced_names += kept <= 0;
        room_naming_end(h, kept > 0);
        if (is_with_next) /* a rename is one change */
            room_naming_end(h, kept > 0);
    }
    while (h->names)
        room_name_set(&h->names, h->names->path, NULL);
    for (struct room_name *n = h->disk; n; n = n->next) {
        room_file_crash(s, n->file);
        room_name_set(&h->names, n->path, n->file);
    }
}

static void room_host_boot(struct room *s, struct room_host *h)
{
    h->is_down = false;
    h->boot_us = s->now_us - 5 * ROOM_SEC;
}

/* ---- Running ---- */

/* The process that is due first, or NULL. */
static struct room_proc *room_next_proc(struct room *s, int64_t *at_us)
{
    struct room_proc *first = NULL;

    *at_us = ROOM_NEVER;
    for (int i = 0; i < s->proc_count; i++) {
        struct room_proc *p = s->procs[i];
        int64_t at = p->wake_us > p->free_us ? p->wake_us : p->free_us;

        if (p->is_up && !p->is_stopped && p->wake_us < ROOM_NEVER &&
            at < *at_us) {
            *at_us = at;
            first = p;
        }
    }
    return first;
}

/* One turn of a process, and when it is due again. */
static void room_turn(struct room *s, struct room_proc *p)
{
    int wait_ms;

    p->turns++;
    p->wake_us = ROOM_NEVER;
    p->free_us = s->now_us;
    room_running = p;
    p->turn(p->arg);
    room_running = NULL;
    if (!p->is_up)
        return;
    p->free_us += s->turn_us / 2 + room_below(s, s->turn_us);
    wait_ms = cube_loop_timeout_ms(p->loop);
    if (room_is_ready(p))
        p->wake_us = s->now_us;
    else if (wait_ms >= 0) {
        int64_t at = p->host->boot_us +
                     (room_now_ms(p) + wait_ms) * 1000;

        p->wake_us = wait_ms == 0 ? s->now_us : at;
    }
    room_hash(s, (uint64_t)s->now_us);
}

/* Lets the simulation run until that time, or until `is_over` says so. */
static void room_run(struct room *s, int64_t until_us, const bool *is_over)
{
    while (!*is_over) {
        int64_t at;
        struct room_proc *p = room_next_proc(s, &at);

        if (s->heap_len > 0 && s->heap[0].at_us <= at) {
            struct room_event e = s->heap[0];

            if (e.at_us > until_us)
                break;
            (void)room_take(s);
            if (e.at_us > s->now_us)
                s->now_us = e.at_us;
            e.fn(s, e.arg, e.number);
        } else {
            if (!p || at > until_us)
                break;
            if (at > s->now_us)
                s->now_us = at;
            room_turn(s, p);
        }
        s->steps++;
    }
    if (s->now_us < until_us && !*is_over)
        s->now_us = until_us;
}

static void room_open_world(struct room *s, uint64_t seed)
{
    memset(s, 0, sizeof *s);
    s->seed = seed;
    s->random = seed * 0x2545f4914f6cdd1du + 1;
    (void)room_random(s);
    s->latency_us = 50 + room_below(s, 2000);
    s->jitter_us = 1 + room_below(s, 3 * s->latency_us);
    s->turn_us = 10 + room_below(s, 100);
    s->sync_us = 100 + room_below(s, 5000);
    s->bytes_per_sec = 1000000 + room_below(s, 100000000);
    s->short_of = room_one_in(s, 3) ? 2 + (uint32_t)room_below(s, 30) : 0;
}

/* All processes must have ended, and their objects been freed. */
static void room_close_world(struct room *s)
{
    for (size_t i = 0; i < s->heap_len; i++) {
        if (s->heap[i].fn == room_work_done) {
            struct room_work *w = s->heap[i].arg;

            room_file_drop(w->file);
            free(w);
        }
    }
    while (s->conns) {
        struct room_conn *c = s->conns;

        for (int i = 0; i < 2; i++) {
            room_flight_clear(&c->end[i]);
            c->end[i].is_moving = c->end[i].is_open = false;
        }
        room_conn_settle(c);
    }
    for (int i = 0; i < s->host_count; i++) {
        struct room_host *h = &s->hosts[i];

        while (h->namings)
            room_naming_end(h, false);
        while (h->names)
            room_name_set(&h->names, h->names->path, NULL);
        while (h->disk)
            room_name_set(&h->disk, h->disk->path, NULL);
    }
    for (int i = 0; i < s->proc_count; i++) {
        free(s->procs[i]->fds);
        free(s->procs[i]);
    }
    free(s->heap);
}

#endif
