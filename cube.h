/*
 * Cube: a container orchestrator in one C file. This is its API and its
 * manual. The smallest cluster, a manager and a worker in one process:
 *
 *     #define CUBE_IMPLEMENTATION
 *     #include "cube.h"
 *     #include <stdio.h>
 *
 *     int main(void)
 *     {
 *         struct cube_err err = {CUBE_OK, ""};
 *         struct cube_loop *l = cube_loop_new(cube_world_real(), &err);
 *         struct cube_worker_options worker = {.data_dir = "data",
 *                                              .runtime = "process"};
 *         struct cube_manager_options manager = {.data_dir = "data"};
 *
 *         if (l && cube_worker_new(l, &worker, &err) &&
 *             cube_manager_new(l, &manager, &err))
 *             return cube_loop_run(l, &err);
 *         fprintf(stderr, "%s\n", err.text);
 *         return 1;
 *     }
 *
 *     cc -o tiny tiny.c && ./tiny &
 *     curl -d '{"Cmd":["sleep","60"]}' localhost:5555/tasks
 *
 * Three ways to compile it, none of which needs a flag:
 *
 *   two files     cc app.c cube.c             for more than one C file, and C++
 *   header only   CUBE_IMPLEMENTATION, as above, before the first system
 *                 header, in one C file
 *   one header    `make single` writes both into build/cube_single.h, which is
 *                 used like that
 *
 * What holds for all functions:
 *
 *   errors    0 or -1, or a pointer or NULL; the last parameter, which may be
 *             NULL, is told what was tried on what, and a code
 *   options   zero, or NULL, is the default; texts are copied
 *   memory    what has a _new or an _open is the caller's to _free or _close,
 *             which accept NULL; const char * is borrowed for the call, unless
 *             it says otherwise. When memory is gone, the process ends:
 *             CUBE_OOM, CUBE_MALLOC and others can be replaced (see the
 *             Preface of cube.c)
 *   callbacks run from cube_loop_turn, and never before the call that asked
 *             for them has returned; of an asynchronous call exactly once
 *   threads   none that you can see: a loop and what lives on it belong to one
 *             thread. Only cube_loop_wake may be called from another one, or
 *             from a signal handler
 *   process   no signal handler, no waiting for children that are not its
 *             own, no SIGPIPE, no output: words go to cube_loop_set_log
 *
 * A main loop of your own waits for cube_loop_fd, at most cube_loop_timeout_ms,
 * and then calls cube_loop_turn(l, 0, &err).
 *
 * Managers and workers are spoken to over HTTP, in one process too: by the
 * calls of the Client, which turn the loop until the answer is there, or from
 * callbacks by cube_http_call. What they answer stands at each of them.
 *
 * In the order of the chapters of cube.c: World (system calls, replaceable),
 * Ground (errors, buffers, times), Store, Loop, HTTP, Tasks, Machine, Runtimes,
 * Schedulers, Worker, Manager, Client. Each part stands for itself: a program
 * may use the store, or the web server, and nothing else.
 */
#ifndef CUBE_H
#define CUBE_H

/* The implementation is compiled in this file: it needs the GNU names, which
 * the first system header fixes. */
#if defined(CUBE_IMPLEMENTATION) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define CUBE_VERSION "0.1.0"

#ifdef __cplusplus
extern "C" {
#endif

#ifndef CUBE_API
#define CUBE_API
#endif

/* ==== Chapter 1. World ==== */

/*
 * Every request that Cube makes of the machine goes through this table. The
 * real one is cube_world_real(); a test can pass another and run a cluster on
 * a virtual clock. The first argument of each function is `ctx`.
 *
 * A function that can fail returns a negative errno value (-EAGAIN, -ENOSPC);
 * zero and above is success. Sockets never block and are closed on exec.
 * Times: milliseconds of a clock that never goes back and that counts
 * suspends (`now_ms`), nanoseconds since 1970 of the clock on the wall
 * (`wall_ns`), which can jump.
 */
enum cube_addr_kind {
    CUBE_ADDR_UNIX = 1,
    CUBE_ADDR_IP4 = 4,
    CUBE_ADDR_IP6 = 6
};

/* One place to connect to or to listen on. */
struct cube_addr {
    enum cube_addr_kind kind;
    uint16_t port;         /* host order; 0 for unix sockets */
    uint32_t scope;        /* IPv6 scope, else 0 */
    unsigned char ip[16];  /* network order; the first 4 for IPv4 */
    char path[108];        /* unix sockets */
};

#define CUBE_READ 1u  /* readable, or at its end */
#define CUBE_WRITE 2u /* writable, or connected */
#define CUBE_HANGUP 4u /* the other side is gone, or an error waits */

#define CUBE_JOB_ADDRS 8

/* A system call that can stall for seconds, done beside the loop. The caller
 * owns it and keeps it until it is reported by `poll_wait` or cancelled. */
struct cube_job {
    enum { CUBE_JOB_SYNC, CUBE_JOB_RESOLVE } kind;
    int fd;            /* SYNC: a file, its data are on disk after; or a
                          directory, its names are */
    char host[256];    /* RESOLVE: the name */
    int result;        /* 0 or a negative errno value */
    int addr_count;
    struct cube_addr addrs[CUBE_JOB_ADDRS]; /* RESOLVE: found, port 0 */
    struct cube_job *next;                  /* the world's, while it works */
    bool is_dir;                            /* the world's: `fd` is one */
};

/* What `poll_wait` reports: a descriptor's readiness, or a job that is done
 * (then `job` is set and the rest is 0). */
struct cube_ready {
    uint64_t token;
    unsigned events;
    struct cube_job *job;
};

struct cube_poll; /* a set of watched descriptors; the world's */

#define CUBE_OPEN_WRITE 1u  /* for reading and writing, else reading only */
#define CUBE_OPEN_CREATE 2u
#define CUBE_OPEN_TRUNC 4u
#define CUBE_OPEN_EXCL 8u

/* Room on a file system, in bytes and inodes. */
struct cube_space {
    uint64_t all, free, free_inodes;
};

/* A command to run under a supervisor of its own, which writes what becomes
 * of it into files in `dir`; their formats stand in chapter 1 of cube.c. All
 * borrowed for the call. */
struct cube_spawn {
    const char *dir;         /* lock, log, exit; the command starts in work */
    const char *const *argv; /* ends with NULL; [0] is looked up in PATH */
    const char *const *env;  /* ends with NULL; its whole environment */
    const char *cgroups[2];  /* directories to join, then to remove, or NULL */
    uint64_t data_bytes;     /* RLIMIT_DATA of each process; 0: none */
    int64_t log_bytes;       /* a log file that would grow larger is rotated */
    int log_files;           /* so many are kept, 2 or more */
};

struct cube_world {
    void *ctx;

    int64_t (*now_ms)(void *ctx);
    int64_t (*wall_ns)(void *ctx);
    int (*random)(void *ctx, void *buf, size_t len);
    const char *(*env)(void *ctx, const char *name); /* borrowed; NULL: unset */
    unsigned (*uid)(void *ctx);                      /* effective user */

    int (*listen)(void *ctx, const struct cube_addr *addr); /* descriptor */
    int (*accept)(void *ctx, int fd, struct cube_addr *peer);
    /* in progress; closing it drops what has not gone over the network */
    int (*connect)(void *ctx, const struct cube_addr *addr);
    int (*connected)(void *ctx, int fd); /* once writable: how it went */
    int (*local_addr)(void *ctx, int fd, struct cube_addr *addr);
    int (*recv)(void *ctx, int fd, void *buf, size_t len);
    int (*send)(void *ctx, int fd, const void *buf, size_t len);
    int (*shut)(void *ctx, int fd); /* no more from this side */
    int (*close)(void *ctx, int fd);

    struct cube_poll *(*poll_open)(void *ctx); /* NULL: no descriptor left */
    void (*poll_close)(void *ctx, struct cube_poll *p);
    int (*poll_fd)(void *ctx, struct cube_poll *p); /* readable: turn me */
    int (*poll_add)(void *ctx, struct cube_poll *p, int fd, unsigned events,
                    uint64_t token);
    int (*poll_change)(void *ctx, struct cube_poll *p, int fd,
                       unsigned events, uint64_t token);
    int (*poll_remove)(void *ctx, struct cube_poll *p, int fd);
    int (*poll_wait)(void *ctx, struct cube_poll *p, struct cube_ready *out,
                     int max, int timeout_ms); /* how many; -1 waits on */
    void (*poll_wake)(void *ctx, struct cube_poll *p); /* from any thread */
    int (*job_start)(void *ctx, struct cube_poll *p, struct cube_job *job);
    void (*job_cancel)(void *ctx, struct cube_poll *p, struct cube_job *job);

    int (*open)(void *ctx, const char *path, unsigned flags);
    int64_t (*pread)(void *ctx, int fd, void *buf, size_t len, int64_t at);
    int64_t (*pwrite)(void *ctx, int fd, const void *buf, size_t len,
                      int64_t at);
    int (*truncate)(void *ctx, int fd, int64_t size);
    int64_t (*size)(void *ctx, int fd);
    int (*sync)(void *ctx, int fd); /* fdatasync; fsync of a directory */
    int (*sync_dir)(void *ctx, const char *path);  /* of a directory */
    int (*lock)(void *ctx, int fd); /* for this open file alone; -EBUSY */
    int (*rename)(void *ctx, const char *from, const char *to);
    int (*unlink)(void *ctx, const char *path);
    int (*mkdir)(void *ctx, const char *path); /* mode 0700 */
    int (*rmdir)(void *ctx, const char *path);
    int (*list)(void *ctx, const char *dir, /* each name, in sorted order */
                void (*each)(void *arg, const char *name), void *arg);
    int (*space)(void *ctx, const char *path, struct cube_space *out);

    /* Supervised processes (Linux). `spawn` returns 0 once the command runs
     * and its supervisor holds the lock; above 0, an errno value, when the
     * command cannot be executed; below, when it cannot be supervised. A
     * supervisor takes SIGTERM (passed on to the command and its group) and
     * SIGUSR1 (kills them). `lock_owner` tells the PID that holds a lock
     * file, or 0. `pid_close` closes what `pid_open` gave, and collects the
     * process if it has ended and became a child of this one. */
    int (*spawn)(void *ctx, const struct cube_spawn *spec);
    int (*lock_owner)(void *ctx, const char *path);
    int (*pid_open)(void *ctx, int pid); /* readable once it has ended */
    int (*pid_signal)(void *ctx, int pid_fd, int signal_number);
    int (*pid_close)(void *ctx, int pid_fd);
};

/* The machine itself. */
CUBE_API const struct cube_world *cube_world_real(void);


/* ==== Chapter 2. Ground ==== */

/* What went wrong, by kind; the text says it in words. */
enum cube_code {
    CUBE_OK = 0,
    CUBE_EINVAL,   /* the caller's input is wrong */
    CUBE_EIO,      /* the machine failed */
    CUBE_ENOENT,   /* there is no such thing */
    CUBE_EEXIST,   /* there is one already, and it differs */
    CUBE_EBUSY,    /* somebody else has it */
    CUBE_ENOSPC,   /* no room (disk full, quota) */
    CUBE_ECORRUPT, /* stored data are damaged */
    CUBE_ESYNC,    /* a sync failed: the outcome is unknown */
    CUBE_ETIMEOUT, /* no answer in time */
    CUBE_ECONN,    /* the other side cannot be reached, or hung up */
    CUBE_EPROTO,   /* the other side said what makes no sense */
    CUBE_EACCES,   /* not allowed */
    CUBE_ETOOBIG,  /* beyond a named limit */
    CUBE_ECANCELED /* given up by the caller, or at shutdown */
};

/* The caller's; each function that takes one accepts NULL. */
struct cube_err {
    enum cube_code code;
    char text[500];
};

/* Bytes that grow. Zero-initialised is empty; `data` is NUL-terminated
 * whenever it is not NULL, and the NUL is not counted in `len`. */
struct cube_buf {
    char *data;
    size_t len, cap;
};

CUBE_API void cube_buf_free(struct cube_buf *b); /* and is empty again */
/* Each of these adds at the end. `p` must not point into the buffer itself.
 *
 *     struct cube_buf b = {NULL, 0, 0};
 *     cube_buf_printf(&b, "%d tasks", 3);
 *     puts(b.data);
 *     cube_buf_free(&b);
 */
CUBE_API void cube_buf_add(struct cube_buf *b, const void *p, size_t len);
CUBE_API void cube_buf_puts(struct cube_buf *b, const char *text);
CUBE_API void cube_buf_printf(struct cube_buf *b, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* A point in time as RFC 3339 has it: seconds since the year 1, so that all
 * zeros is the unset time of the wire, `0001-01-01T00:00:00Z`. */
struct cube_time {
    int64_t sec;        /* since 0001-01-01T00:00:00 UTC */
    int32_t nsec;       /* 0 .. 999999999 */
    int16_t offset_min; /* of the zone it was written in */
};

#define CUBE_TIME_TEXT 40 /* holds every formatted time */
#define CUBE_UUID_TEXT 37 /* 36 characters and a NUL */

/* From and to nanoseconds since 1970. A time beyond what 64 bits of them hold
 * (1677 to 2262), the unset one too, becomes the nearer end. */
CUBE_API struct cube_time cube_time_from_ns(int64_t unix_ns);
CUBE_API int64_t cube_time_to_ns(const struct cube_time *t);
/* Is it anything but all zeros? */
CUBE_API bool cube_time_is_set(const struct cube_time *t);
/* Formats as RFC 3339, trailing zeros of the fraction cut. */
CUBE_API void cube_time_format(const struct cube_time *t,
                               char out[CUBE_TIME_TEXT]);
/* RFC 3339; digits of a fraction beyond nine count as 0, and the offset is
 * kept. -1: it is no time. */
CUBE_API int cube_time_parse(const char *text, size_t len,
                             struct cube_time *out);

/* A random (version 4) UUID, RFC 9562. Ends the process when the machine has no
 * random bytes: identities would collide. */
CUBE_API void cube_uuid_new(const struct cube_world *w,
                            char out[CUBE_UUID_TEXT]);
/* Accepts the plain form, `urn:uuid:...`, braces, and 32 hex digits; writes
 * the plain one in lower case. -1: it is none of these. */
CUBE_API int cube_uuid_parse(const char *text, size_t len,
                             char out[CUBE_UUID_TEXT]);


/* ==== Chapter 3. JSON ==== */

/* Nothing of it is public: tasks, events and metrics have functions of their
 * own below that read and print them (cube_task_parse, cube_task_print). */


/* ==== Chapter 4. Store ==== */

/* A store is an ordered map from keys to values that survives crashes: one
 * file, several named trees in it, changed together by commits or not at all.
 *
 *     struct cube_store *s = cube_store_open(NULL, "app.cube", NULL, &err);
 *     cube_store_put(s, "users", "ada", 3, "countess", 8, &err);
 *     cube_store_put(s, "count", "users", 5, "1", 1, &err);
 *     if (cube_store_commit(s, &err) < 0) ...    both are on disk, or none
 *     cube_store_close(s);
 *
 * One thread. Bytes go in and come out as they are; keys are ordered as
 * memcmp orders them, a prefix before what it begins. Every function that can
 * fail returns -1 or NULL and says in err what it tried on which file. */

/* Caps; more than this is refused. */
#ifndef CUBE_STORE_KEY_MAX
#define CUBE_STORE_KEY_MAX 1024               /* bytes of a key, at least 1 */
#endif
#ifndef CUBE_STORE_VALUE_MAX
#define CUBE_STORE_VALUE_MAX (16u << 20)      /* bytes of a value */
#endif
#ifndef CUBE_STORE_COMMIT_MAX
#define CUBE_STORE_COMMIT_MAX (256u << 20)    /* bytes of one commit */
#endif
#define CUBE_STORE_TREES_MAX 32               /* named trees in a file */
#define CUBE_STORE_NAME_MAX 31                /* bytes of a tree's name */

struct cube_store;         /* an object: cube_store_open .. cube_store_close */
struct cube_store_snap;    /* a pinned commit */
struct cube_cursor;        /* a place in a tree */

/* Zero means the default. */
struct cube_store_options {
    size_t cache_bytes;   /* memory for pages, values and the overlay of
                             recent changes; default 8 MiB, at least 256 KiB */
    bool is_read_only;    /* never write, not even to repair a torn tail */
    bool is_sync_split;   /* the caller does the syncs of compaction as well:
                             see cube_store_slice_fd */
};

struct cube_store_stats {
    uint64_t file_bytes;     /* size of the file, zeros ahead included */
    uint64_t used_bytes;     /* up to the end of the last record */
    uint64_t live_bytes;     /* keys and values, as of the last checkpoint */
    uint64_t records;        /* keys in all trees, as of the last checkpoint */
    uint64_t overlay_bytes;  /* memory of what is not in the trees yet */
    uint64_t cache_bytes;    /* memory of cached pages and values */
    uint64_t commits;        /* number of the last commit; grows for ever */
    uint64_t checkpoints;    /* done since opening */
    uint64_t compactions;    /* done since opening */
    uint64_t dropped_bytes;  /* of an unfinished commit, found at opening */
    bool is_broken;          /* a sync failed: reads only, until a new file
                                has been written (cube_store_slice tries) */
};

/* Opens the store in the file at path, and creates it if there is none; with
 * path NULL, a store in memory that has the same functions and forgets all
 * when it is closed. world NULL is the real one. Holds an exclusive lock on
 * path + ".lock" until it is closed; to read only, that file is not made.
 * path + ".new" is written by compactions, and removed when it was left over.
 * Errors: CUBE_EBUSY (another store, of this process or another, has it),
 * CUBE_ECORRUPT (damage that no crash explains; names file and offset), and
 * what the file system says. What a crash left unfinished is cut off, and
 * told in stats.dropped_bytes. */
CUBE_API struct cube_store *cube_store_open(const struct cube_world *world,
        const char *path, const struct cube_store_options *options,
        struct cube_err *err);

/* Drops what is staged, frees all; NULL is allowed. After many changes it may
 * write and sync, so that the next opening is quick. Cursors and snapshots must
 * have been closed before. */
CUBE_API void cube_store_close(struct cube_store *store);

/* Stages a change of the open batch: it is seen at once by whoever reads
 * without a snapshot, and by nobody else before the commit. key and value are
 * copied. Putting a key again replaces; deleting a key that is not there is
 * fine. A tree exists from its first put on. After an error the batch is as
 * it was before the call. */
CUBE_API int cube_store_put(struct cube_store *store, const char *tree,
        const void *key, size_t key_len, const void *value, size_t value_len,
        struct cube_err *err);
CUBE_API int cube_store_del(struct cube_store *store, const char *tree,
        const void *key, size_t key_len, struct cube_err *err);

/* The name of the i-th tree, from 0 on, in the order of their first puts; NULL
 * behind the last one. */
CUBE_API const char *cube_store_tree(const struct cube_store *store, int i);

/* Is anything staged that a commit would write? */
CUBE_API bool cube_store_is_dirty(const struct cube_store *store);

/* Forgets what is staged in the open batch. */
CUBE_API void cube_store_rollback(struct cube_store *store);

/* Commits what is staged, in one step that may wait for the disk. */
CUBE_API int cube_store_commit(struct cube_store *store,
        struct cube_err *err);

/* The same in two steps, for a caller that waits elsewhere: begin writes the
 * batch and returns
 *    1   fdatasync(cube_store_fd(store)) is needed, then cube_store_commit_end
 *        with its result; until then more may be staged, for the commit
 *        after this one, but no second commit begun;
 *    0   all is committed already (nothing staged, or a store in memory);
 *   -1   it failed (CUBE_ENOSPC, CUBE_EIO...): what was staged is dropped, the
 *        last commit stands, the store goes on; with CUBE_ESYNC, as below; with
 *        CUBE_ECORRUPT its trees are damaged, and it takes no more changes;
 *        but with CUBE_EBUSY (one is in flight, or the caller syncs the store's
 *        directory) it is all still staged: begin it later.
 * end (sync_result: 0 or a negative errno value) makes the batch visible to
 * new snapshots. When the sync failed it returns -1 with CUBE_ESYNC: nobody
 * knows whether this commit will be found after a crash, all staged changes
 * (of the batch that has been filled meanwhile, too) are dropped, and the
 * store can only be read until cube_store_slice has managed to write what is
 * certain to a new file. */
CUBE_API int cube_store_commit_begin(struct cube_store *store,
        struct cube_err *err);
CUBE_API int cube_store_commit_end(struct cube_store *store, int sync_result,
        struct cube_err *err);
CUBE_API int cube_store_fd(const struct cube_store *store);

/* Does what waits in the background (a checkpoint, a compaction, a new file
 * after a failed sync), for about budget_ms. Returns true when there is more
 * to do: call again soon, at best once a turn of the loop. A store that is
 * never sliced does this work inside of commits. Failures are no error here:
 * they are tried again later, and cube_store_last_error tells the last. */
CUBE_API bool cube_store_slice(struct cube_store *store, int budget_ms);
CUBE_API const char *cube_store_last_error(const struct cube_store *store);

/* With options.is_sync_split: the descriptor that the background work wants
 * to have synced, or -1: a file, or, after a rename, its directory, which
 * needs fsync. Call cube_store_slice_synced with 0 or a negative errno value
 * once it is; cube_store_slice does nothing for compaction until then. Commits
 * may be made while it is a file: the new one gets them, and wants one more
 * sync; not while it is a directory, since they would be on disk under no name.
 * After a directory's sync that failed, the store can only be read until there
 * is another new file, as after that of a commit. */
CUBE_API int cube_store_slice_fd(const struct cube_store *store);
CUBE_API void cube_store_slice_synced(struct cube_store *store,
        int sync_result);

/* Compacts now, all in one go; what is staged is dropped. CUBE_EBUSY while a
 * commit is in flight, or a directory is being synced by the caller. After an
 * error what was committed is still there, in the old file or in the new. */
CUBE_API int cube_store_compact(struct cube_store *store,
        struct cube_err *err);

/* Pins the last commit: whoever reads with it sees that state, whatever is
 * committed later. It keeps the file of its time open, so close it soon. */
CUBE_API struct cube_store_snap *cube_store_snapshot(
        struct cube_store *store);
CUBE_API void cube_store_snapshot_close(struct cube_store_snap *snap);

/* Copies the value of a key into a buffer of the caller's, in place of what
 * was in it: 1 found, 0 no such key (or tree), -1 error (CUBE_ECORRUPT,
 * CUBE_EIO). The first reads what the next commit would leave, staged changes
 * included; the second what the snapshot sees. */
CUBE_API int cube_store_get(struct cube_store *store, const char *tree,
        const void *key, size_t key_len, struct cube_buf *value,
        struct cube_err *err);
CUBE_API int cube_store_snapshot_get(struct cube_store_snap *snap,
        const char *tree, const void *key, size_t key_len,
        struct cube_buf *value, struct cube_err *err);

/* Walks a tree in order:
 *
 *     struct cube_cursor *c = cube_cursor_open(s, "users", &err);
 *     for (int r = cube_cursor_first(c, &err); r > 0;
 *          r = cube_cursor_next(c, &err)) {
 *         const void *key = cube_cursor_key(c, &key_len);
 *         if (cube_cursor_value(c, &value, &value_len, &err) < 0) ...
 *     }
 *     cube_cursor_close(c);
 *
 * It sees one state: the last commit as of now; or with staged what is staged
 * by now as well (whether it sees what is staged later is not said); or what
 * a snapshot sees, which may be closed before the cursor. Never NULL; the
 * caller closes it, before the store. */
CUBE_API struct cube_cursor *cube_cursor_open(struct cube_store *store,
        const char *tree, struct cube_err *err);
CUBE_API struct cube_cursor *cube_cursor_open_staged(
        struct cube_store *store, const char *tree, struct cube_err *err);
CUBE_API struct cube_cursor *cube_cursor_open_snapshot(
        struct cube_store_snap *snap, const char *tree,
        struct cube_err *err);
CUBE_API void cube_cursor_close(struct cube_cursor *cursor);

/* Each moves and returns 1 when it stands on a key, 0 when there is none that
 * way, -1 on an error. seek goes to the first key that is not less than the
 * one given. After 0 or -1 only first, last and seek go anywhere. */
CUBE_API int cube_cursor_first(struct cube_cursor *cursor,
        struct cube_err *err);
CUBE_API int cube_cursor_last(struct cube_cursor *cursor,
        struct cube_err *err);
CUBE_API int cube_cursor_next(struct cube_cursor *cursor,
        struct cube_err *err);
CUBE_API int cube_cursor_prev(struct cube_cursor *cursor,
        struct cube_err *err);
CUBE_API int cube_cursor_seek(struct cube_cursor *cursor, const void *key,
        size_t key_len, struct cube_err *err);

/* What the cursor stands on; both are the cursor's, good until it moves or is
 * closed. */
CUBE_API const void *cube_cursor_key(const struct cube_cursor *cursor,
        size_t *key_len);
CUBE_API int cube_cursor_value(struct cube_cursor *cursor,
        const void **value, size_t *value_len, struct cube_err *err);

/* Reads the whole committed state from the file, past the cache, and checks
 * all that is promised about it: checksums, order, depths, counts. 0 or -1
 * with CUBE_ECORRUPT, naming file and offset; CUBE_EBUSY if it was opened to
 * read only, and a writer came since. Slow on purpose. */
CUBE_API int cube_store_check(struct cube_store *store,
        struct cube_err *err);

CUBE_API void cube_store_stats(const struct cube_store *store,
        struct cube_store_stats *stats);


/* ==== Chapter 5. Loop ==== */

/*
 * One thread that waits for descriptors, timers and deferred work, and calls
 * back. All other objects live on a loop; free them before it.
 *
 *     struct cube_timer t = {0};
 *
 *     cube_timer_set(l, &t, 1000, on_second, arg);
 *     cube_loop_run(l, &err);                 on_second runs, in a second
 *
 * A turn does, in this order: what is ready, timers that are due, deferred
 * calls, and one commit of all that was staged meanwhile.
 */
struct cube_loop;

enum cube_level { CUBE_DEBUG, CUBE_INFO, CUBE_WARN, CUBE_ERROR };

/* A line of words, without its end; borrowed. */
typedef void cube_log_fn(void *arg, enum cube_level level, const char *text);
/* `events` are CUBE_READ, CUBE_WRITE and CUBE_HANGUP, added up. */
typedef void cube_watch_fn(void *arg, unsigned events);
typedef void cube_call_fn(void *arg);

/* A watched descriptor. The caller's memory; zeroed is unused. */
struct cube_watch {
    int fd;
    unsigned events, generation;
    cube_watch_fn *fn;
    void *arg;
};

/* A point in time to be called at. The caller's memory; zeroed is unset. */
struct cube_timer {
    int64_t at_ms;
    uint64_t order;   /* of equal times, the one set first is first */
    size_t slot;      /* in the heap + 1; 0: not set */
    cube_call_fn *fn;
    void *arg;
};

/* A call that is made later in this turn, or in the next one. The caller's
 * memory; zeroed is unused. */
struct cube_defer {
    cube_call_fn *fn;
    void *arg;
    struct cube_defer *next;
    bool is_queued;
};

/* A loop in world `w` (cube_world_real() for the machine itself); NULL when
 * the machine has no descriptors left. The caller frees it. */
CUBE_API struct cube_loop *cube_loop_new(const struct cube_world *w,
                                         struct cube_err *err);
CUBE_API void cube_loop_free(struct cube_loop *l);

/* Where words for the operator go; none by default. `fn` NULL: nowhere again.
 */
CUBE_API void cube_loop_set_log(struct cube_loop *l, cube_log_fn *fn,
                                void *arg);

/* For programs with a main loop of their own: wait until cube_loop_fd is
 * readable, at most cube_loop_timeout_ms (-1: no limit), then turn. */
CUBE_API int cube_loop_fd(struct cube_loop *l);
CUBE_API int cube_loop_timeout_ms(struct cube_loop *l);
/* Waits at most `timeout_ms` (-1: as long as it takes, 0: not at all) for
 * something to do, and does it. -1: waiting failed, and nothing was done. Must
 * not be called from a callback. */
CUBE_API int cube_loop_turn(struct cube_loop *l, int timeout_ms,
                            struct cube_err *err);
/* Turns until cube_loop_stop: 0; or until a turn fails: -1. */
CUBE_API int cube_loop_run(struct cube_loop *l, struct cube_err *err);
/* Ends cube_loop_run behind the present turn. From a callback; elsewhere, set
 * something that a callback looks at, and wake. */
CUBE_API void cube_loop_stop(struct cube_loop *l);
/* Makes a waiting turn return. From any thread or signal handler. */
CUBE_API void cube_loop_wake(struct cube_loop *l);

CUBE_API const struct cube_world *cube_loop_world(struct cube_loop *l);
/* The world's clock, asked at this moment. */
CUBE_API int64_t cube_loop_now_ms(struct cube_loop *l);

/* `fn` runs when `fd` is ready; it may also run without cause, so use calls
 * that do not block. Watching again changes the events. -1: the machine
 * refuses to watch it. Clear the watch before the descriptor is closed. */
CUBE_API int cube_watch_set(struct cube_loop *l, struct cube_watch *watch,
                            int fd, unsigned events, cube_watch_fn *fn,
                            void *arg);
CUBE_API void cube_watch_clear(struct cube_loop *l, struct cube_watch *watch);
/* Sets or moves a timer to `in_ms` from now; `fn` runs once. Clearing one that
 * is not set is fine, for all three. */
CUBE_API void cube_timer_set(struct cube_loop *l, struct cube_timer *timer,
                             int64_t in_ms, cube_call_fn *fn, void *arg);
CUBE_API void cube_timer_clear(struct cube_loop *l, struct cube_timer *timer);
/* `fn` runs once, later in this turn or in the next one. Set again before that,
 * it keeps its place and runs the new function. */
CUBE_API void cube_defer_set(struct cube_loop *l, struct cube_defer *defer,
                             cube_call_fn *fn, void *arg);
CUBE_API void cube_defer_clear(struct cube_loop *l, struct cube_defer *defer);


/* ==== Chapter 6. HTTP ==== */

/*
 * HTTP/1.1 (RFC 9110, RFC 9112) over TCP and unix sockets, server and client,
 * both on a loop and without waiting.
 *
 * Where a server listens, or a client connects to, is a text:
 *
 *     127.0.0.1:5555   [::1]:5555   localhost:5555   host.example:5555
 *     :5555 (all addresses)   unix:/run/cube.sock
 *
 * and for a client also http://HOST:PORT, tcp://HOST:PORT, unix:///PATH.
 * Port 0 lets the kernel choose one to listen on.
 */
struct cube_http_server;
struct cube_http_req;
struct cube_http_client;
struct cube_http_call;
struct cube_http_head;

/* Zero is the default of each field. */
struct cube_http_options {
    /* With one of these each request needs `Authorization: Bearer` and one of
     * the two. They are copied, as all texts here. */
    const char *tokens[2];
    /* Names beside localhost, IP addresses and the one listened on that a
     * Host field may hold; ends with NULL. Others get 403, as do requests
     * with an Origin: no web page may drive this server. */
    const char *const *host_names;
    bool is_public;         /* web pages may: no look at Origin and Host */
    bool is_open_health;    /* GET /healthz needs no token */
    size_t max_body;        /* of a request, in bytes; 1 MiB */
    int idle_timeout_ms;    /* between two requests; 2 minutes */
    int head_timeout_ms;    /* first to last byte of a head; 10 s */
    int body_timeout_ms;    /* whole body, or a stalled reader; 30 s */
    int max_connections;    /* 1000; further ones wait to be accepted. Readers
                             * of a manager's events, and of logs, have three
                             * in four of them, and then get 429 */
};

/* Called when a whole request is there; `arg` is the server's. */
typedef void cube_http_handler(void *arg, struct cube_http_req *req);

/* `{id}` in a path stands for one segment, which is not empty. The first
 * route that matches wins. A route for GET serves HEAD as well. */
struct cube_http_route {
    const char *method, *path;
    cube_http_handler *fn;
};

/* Listens. `routes` ends with a NULL method and is borrowed until the server
 * is closed; `arg` is handed to the handlers. When `where` holds a name other
 * than localhost, this waits for the name server. CUBE_EBUSY: somebody has
 * that port, or serves that unix socket; CUBE_EINVAL: `where` makes no sense;
 * or what the machine says. A socket file that nobody serves is replaced.
 *
 *     static void hello(void *arg, struct cube_http_req *req)
 *     {
 *         cube_http_reply(req, 200, "text/plain", "hello\n", 6);
 *     }
 *     static const struct cube_http_route routes[] = {
 *         {"GET", "/hello", hello}, {NULL, NULL, NULL}};
 *
 *     server = cube_http_listen(l, ":8080", routes, NULL, NULL, &err);
 */
CUBE_API struct cube_http_server *
cube_http_listen(struct cube_loop *l, const char *where,
                 const struct cube_http_route *routes, void *arg,
                 const struct cube_http_options *options,
                 struct cube_err *err);
/* Closes all connections. For each request that is still open its `on_gone`
 * is called before this returns; those without one stay valid until they are
 * answered. May be called by a handler. NULL is fine. */
CUBE_API void cube_http_close(struct cube_http_server *s);
/* The port that it listens on; 0 for a unix socket. */
CUBE_API uint16_t cube_http_port(const struct cube_http_server *s);

/*
 * A request belongs to its handler until it is answered, which can be now or
 * at any later time, exactly once: cube_http_reply, cube_http_reply_error, or
 * cube_http_stream and its end. Texts are borrowed until then.
 */
CUBE_API const char *cube_http_method(const struct cube_http_req *req);
/* Without the query; still percent-encoded. */
CUBE_API const char *cube_http_path(const struct cube_http_req *req);
/* What stood for `{name}`, percent-decoded; NULL when the route has none. */
CUBE_API const char *cube_http_param(const struct cube_http_req *req,
                                     const char *name);
/* The first `name=` of the query, decoded; "" for a bare `name`, else NULL. */
CUBE_API const char *cube_http_query(const struct cube_http_req *req,
                                     const char *name);
/* The first field of that name, in any case; NULL when there is none. */
CUBE_API const char *cube_http_header(const struct cube_http_req *req,
                                      const char *name);
/* Never NULL; a NUL follows. */
CUBE_API const char *cube_http_body(const struct cube_http_req *req,
                                    size_t *len);

/* Calls once if the peer goes away, or the server is closed, before the
 * answer is complete. After that call the request is gone. */
CUBE_API void cube_http_on_gone(struct cube_http_req *req, cube_call_fn *fn,
                                void *arg);
/* Adds a field to the answer; before it is begun. */
CUBE_API void cube_http_reply_header(struct cube_http_req *req,
                                     const char *name, const char *value);
/* The whole answer. `type` is its Content-Type or NULL; `body` is copied. */
CUBE_API void cube_http_reply(struct cube_http_req *req, int status,
                              const char *type, const void *body,
                              size_t len);
/* {"HTTPStatusCode":404,"Message":"..."} */
CUBE_API void cube_http_reply_error(struct cube_http_req *req, int status,
                                    const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* Begins an answer of unknown length. Then any number of writes, each sent
 * soon, and one end; an abort cuts the connection instead, so that the reader
 * can tell. `on_drain` is called each time all that was written has left.
 * A reader that lets CUBE_HTTP_MAX_BACKLOG bytes pile up is cut off. */
CUBE_API void cube_http_stream(struct cube_http_req *req, int status,
                               const char *type);
CUBE_API void cube_http_stream_write(struct cube_http_req *req,
                                     const void *data, size_t len);
/* Bytes that were written and have not left. */
CUBE_API size_t cube_http_stream_backlog(const struct cube_http_req *req);
CUBE_API void cube_http_stream_on_drain(struct cube_http_req *req,
                                        cube_call_fn *fn, void *arg);
/* Its reader may stall for as long as it likes: a log in a pager. For those
 * who write no more than has left; `body_timeout_ms` cuts all others. */
CUBE_API void cube_http_stream_patient(struct cube_http_req *req);
CUBE_API void cube_http_stream_end(struct cube_http_req *req);
CUBE_API void cube_http_stream_abort(struct cube_http_req *req);

/*
 * A client of one server. It keeps idle connections for the next call, and
 * finds addresses and connects anew by itself.
 */

/* `token` (may be NULL) is sent as `Authorization: Bearer`. NULL and
 * CUBE_EINVAL: `base` makes no sense. Nothing is sent before the first call.
 */
CUBE_API struct cube_http_client *
cube_http_client_new(struct cube_loop *l, const char *base,
                     const char *token, struct cube_err *err);
/* Open calls end with CUBE_ECANCELED before this returns; in those `on_done`
 * do not call anew. May be called by a callback of a call. NULL is fine. */
CUBE_API void cube_http_client_free(struct cube_http_client *c);

/* What came of a call; borrowed, until on_done returns. `err` is of these:
 * CUBE_ECONN (cannot be reached, or closed too early), CUBE_ETIMEOUT,
 * CUBE_EPROTO (that is no HTTP), CUBE_ETOOBIG (beyond max_body), CUBE_EINVAL
 * (what was asked for cannot be sent), CUBE_EIO, CUBE_ECANCELED. */
struct cube_http_answer {
    int status;                        /* 0: none came */
    const char *body;                  /* collected; a NUL follows */
    size_t body_len;
    const struct cube_http_head *head; /* NULL: none came */
    const struct cube_err *err;        /* NULL: the answer is complete */
};

/* Everything is copied but `arg`; zero is "none" or the default. */
struct cube_http_request {
    const char *method;  /* GET */
    const char *target;  /* "/tasks?x=1", percent-encoded */
    const char *const *headers; /* name, value, ..., NULL */
    const void *body;    /* sent as application/json, unless headers say */
    size_t body_len;
    int timeout_ms;      /* for all of it */
    int idle_timeout_ms; /* longest silence */
    size_t max_body;     /* to collect; 16 MiB */
    void (*on_head)(void *arg, const struct cube_http_head *head);
    /* When set, the body is handed over as it comes and not collected. */
    void (*on_data)(void *arg, const char *data, size_t len);
    void (*on_done)(void *arg, const struct cube_http_answer *answer);
    void *arg;
};

/* Sends a request. `on_done` runs exactly once, later. Never NULL; the call
 * is gone when `on_done` has returned. A kept connection that turns out to be
 * dead is replaced once, when that cannot do a thing twice. */
CUBE_API struct cube_http_call *
cube_http_call(struct cube_http_client *c,
               const struct cube_http_request *request);
/* Reads no more of the answer, until it is let go: what a slow receiver does
 * not want yet stays with the sender. A little that had been read already may
 * still come. `timeout_ms` goes on, `idle_timeout_ms` does not. */
CUBE_API void cube_http_call_hold(struct cube_http_call *call, bool is_held);
/* Gives it up: no callback of it runs any more. */
CUBE_API void cube_http_call_cancel(struct cube_http_call *call);

/* 200, 404, ... */
CUBE_API int cube_http_head_status(const struct cube_http_head *head);
/* The first field of that name; NULL when there is none. */
CUBE_API const char *cube_http_head_get(const struct cube_http_head *head,
                                        const char *name);
/* Appends `text` percent-encoded, so that it fits any part of a target. */
CUBE_API void cube_http_encode(struct cube_buf *out, const char *text);


/* ==== Chapter 7. Tasks ==== */

/* What is observed of a task. */
enum cube_state {
    CUBE_PENDING,   /* no node has it yet; `error` says why */
    CUBE_SCHEDULED, /* a node was told to run it */
    CUBE_RUNNING,
    CUBE_COMPLETED, /* ended with exit code 0, or stopped */
    CUBE_FAILED     /* ended otherwise; `error` says how */
};

/* What was asked for. */
enum cube_wanted { CUBE_WANT_UNSET, CUBE_WANT_RUN, CUBE_WANT_STOP };

/* On the wire a missing map is `null` and an empty one `{}`: `is_null`. */
struct cube_texts {
    char **list;
    size_t count;
    bool is_null;
};

/* Where the engine has put a container's port. */
struct cube_binding {
    char *ip, *port;
};
struct cube_port {
    char *port; /* "7777/tcp" */
    struct cube_binding *bindings;
    size_t count;
    bool is_null; /* its list of bindings is null on the wire */
};
struct cube_ports {
    struct cube_port *list; /* sorted by port, no two alike */
    size_t count;
    bool is_null;
};

/* Where the user wants it: container port to host port. */
struct cube_publish {
    char *port, *host_port; /* "7777/tcp", "8080"; "": any free one */
};
struct cube_publishes {
    struct cube_publish *list; /* sorted by port, no two alike */
    size_t count;
    bool is_null;
};

/*
 * A task: what the user asked for, and what became of it. All texts are owned
 * by it and never NULL; "" is unset. The first sixteen fields travel as the
 * Go implementation has them; the rest are Cube's own and are written only
 * when they are set. Comments name the JSON key where it is another word.
 */
struct cube_task {
    char id[CUBE_UUID_TEXT]; /* "": none yet */
    char *container_id, *name;
    enum cube_state state;
    char *image;
    double cpu;                          /* cores */
    int64_t mem_bytes, disk_bytes;       /* "Memory", "Disk" */
    struct cube_ports host_ports;        /* as observed */
    struct cube_texts exposed_ports;     /* "7777/tcp"; sorted, no two alike */
    struct cube_publishes port_bindings; /* as asked for */
    char *restart_policy; /* "", no, on-failure, always, unless-stopped */
    struct cube_time start_time, finish_time;
    char *health_check; /* a path: "/health" */
    int64_t restart_count;

    struct cube_texts cmd, env;   /* env: "NAME=value" */
    bool has_exit_code;
    int64_t exit_code;
    char *node;                   /* name of the node that it is assigned to */
    enum cube_wanted wanted;
    int64_t attempt;              /* number of the assignment, from 1 on */
    char *error;                  /* why it is not as wished, in words */
    struct cube_time restart_time; /* set while it waits to be started again;
                                      Failed without it has given up */
    int64_t grace_ms;             /* "StopGrace"; 0: 10 s */
    int64_t health_start_ms;      /* "HealthStart" ...; 0: 30 s, in which */
    int64_t health_interval_ms;   /* failures do not count, 10 s */
    int64_t health_timeout_ms;    /* 5 s */
    int64_t health_retries;       /* 3 in a row are a failure */
    char *progress;               /* of a pull, in words, while it lasts */
    struct cube_time created_time;
};

/* A wish or a delivery: a task, and what it is to become. */
struct cube_event {
    char id[CUBE_UUID_TEXT]; /* "": none yet */
    enum cube_state state;   /* CUBE_RUNNING: run it; CUBE_COMPLETED: stop */
    struct cube_time timestamp;
    struct cube_task *task;  /* owned; NULL: the event came without one */
    /* Cube's own, in what a manager delivers to a worker: */
    char cluster[CUBE_UUID_TEXT]; /* "": a delivery of a Go manager */
    int64_t epoch;
    int64_t budget; /* restarts that are left to the worker; -1: the policy's */
};

/* An empty task or event: nulls, no ID, Pending, budget -1. Free it. */
CUBE_API struct cube_task *cube_task_new(void);
/* All of it, down to the last text; the caller frees it. */
CUBE_API struct cube_task *cube_task_copy(const struct cube_task *t);
CUBE_API void cube_task_free(struct cube_task *t);
CUBE_API struct cube_event *cube_event_new(void);
CUBE_API void cube_event_free(struct cube_event *e);

/*
 * From JSON. Keys match without regard to case, the last of equal ones wins,
 * a null changes nothing, UUIDs may be in any of their forms. Unknown keys
 * are an error when `is_strict` (a manager's side) and else left out. On
 * success 0 and the caller frees `*out`; on error -1 and CUBE_EINVAL, with
 * the name of the field. Whether the values make sense is another question:
 * cube_task_check.
 */
CUBE_API int cube_task_parse(const char *json, size_t len, bool is_strict,
                             struct cube_task **out, struct cube_err *err);
CUBE_API int cube_event_parse(const char *json, size_t len, bool is_strict,
                              struct cube_event **out, struct cube_err *err);
/* Either of both: a bare task becomes an event that asks to run it. */
CUBE_API int cube_task_or_event_parse(const char *json, size_t len,
                                      bool is_strict, struct cube_event **out,
                                      struct cube_err *err);

/* As compact JSON, added to `out`, without a newline. */
CUBE_API void cube_task_print(const struct cube_task *t, struct cube_buf *out);
CUBE_API void cube_event_print(const struct cube_event *e,
                               struct cube_buf *out);

/* Can this ever run? -1 and CUBE_EINVAL names the field that cannot be. */
CUBE_API int cube_task_check(const struct cube_task *t, struct cube_err *err);
/* Do both ask for the same? Compares what the user sets, and no more. */
CUBE_API bool cube_task_same_spec(const struct cube_task *a,
                                  const struct cube_task *b);
/* Completed, or Failed for good. */
CUBE_API bool cube_task_is_finished(const struct cube_task *t);

/* Replaces a text of a task: cube_task_set(&t->name, "web"). NULL is "". */
CUBE_API void cube_task_set(char **text, const char *value);
/* Adds a word to `cmd` or `env`. */
CUBE_API void cube_task_add(struct cube_texts *texts, const char *value);
/* Adds a port ("80", "80/tcp"), in its place, and is known if it was there. */
CUBE_API void cube_task_expose(struct cube_task *t, const char *port);
CUBE_API void cube_task_publish(struct cube_task *t, const char *port,
                                const char *host_port);
/* Adds a binding to the host ports; `ip` NULL adds the port with none. */
CUBE_API void cube_task_bind(struct cube_task *t, const char *port,
                             const char *ip, const char *host_port);
/* Forgets the host ports: null again. */
CUBE_API void cube_task_unbind(struct cube_task *t);

/* As people read it: "Pending"; a constant. */
CUBE_API const char *cube_state_name(enum cube_state state);
/* May a task go from one state to the other? To the same one only where the
 * table says so. */
CUBE_API bool cube_state_may(enum cube_state from, enum cube_state to);
/* "7777/tcp" to 7777 and "tcp", a constant; a bare number is tcp. -1: no port.
 */
CUBE_API int cube_port_parse(const char *text, int *number,
                             const char **protocol);



/* ==== Chapter 8. Machine ==== */

/*
 * What a machine has and what of it is in use. On the wire this is the answer
 * of a worker's GET /stats: first what the Go implementation sends, in its
 * order, then Cube's own, each only when it is set.
 */

/* The fields of `struct cube_mem`: the name, which is also the key on the
 * wire, and the line of /proc/meminfo. All in kB (the counts of huge pages in
 * pages); 0 where the kernel has no such line. */
#define CUBE_MEM_FIELDS(X)                                                   \
    X(mem_total, "MemTotal")                                                 \
    X(mem_free, "MemFree")                                                   \
    X(mem_available, "MemAvailable")                                         \
    X(buffers, "Buffers")                                                    \
    X(cached, "Cached")                                                      \
    X(swap_cached, "SwapCached")                                             \
    X(active, "Active")                                                      \
    X(inactive, "Inactive")                                                  \
    X(active_anon, "Active(anon)")                                           \
    X(inactive_anon, "Inactive(anon)")                                       \
    X(active_file, "Active(file)")                                           \
    X(inactive_file, "Inactive(file)")                                       \
    X(unevictable, "Unevictable")                                            \
    X(mlocked, "Mlocked")                                                    \
    X(swap_total, "SwapTotal")                                               \
    X(swap_free, "SwapFree")                                                 \
    X(dirty, "Dirty")                                                        \
    X(write_back, "Writeback")                                               \
    X(anon_pages, "AnonPages")                                               \
    X(mapped, "Mapped")                                                      \
    X(shmem, "Shmem")                                                        \
    X(slab, "Slab")                                                          \
    X(s_reclaimable, "SReclaimable")                                         \
    X(s_unclaim, "SUnreclaim")                                               \
    X(kernel_stack, "KernelStack")                                           \
    X(page_tables, "PageTables")                                             \
    X(nfs_unstable, "NFS_Unstable")                                          \
    X(bounce, "Bounce")                                                      \
    X(writeback_tmp, "WritebackTmp")                                         \
    X(commit_limit, "CommitLimit")                                           \
    X(committed_as, "Committed_AS")                                          \
    X(vmalloc_total, "VmallocTotal")                                         \
    X(vmalloc_used, "VmallocUsed")                                           \
    X(vmalloc_chunk, "VmallocChunk")                                         \
    X(hardware_corrupted, "HardwareCorrupted")                               \
    X(anon_huge_pages, "AnonHugePages")                                      \
    X(huge_pages_total, "HugePages_Total")                                   \
    X(huge_pages_free, "HugePages_Free")                                     \
    X(huge_pages_rsvd, "HugePages_Rsvd")                                     \
    X(huge_pages_surp, "HugePages_Surp")                                     \
    X(hugepagesize, "Hugepagesize")                                          \
    X(direct_map_4k, "DirectMap4k")                                          \
    X(direct_map_2M, "DirectMap2M")                                          \
    X(direct_map_1G, "DirectMap1G")

struct cube_mem {
#define CUBE_MEM_FIELD(name, line) uint64_t name;
    CUBE_MEM_FIELDS(CUBE_MEM_FIELD)
#undef CUBE_MEM_FIELD
};

/* The file system that holds the root directory; bytes, and inodes. */
struct cube_disk {
    uint64_t all, used, free, free_inodes;
};

/* All CPUs together, in ticks (mostly of 10 ms) since the machine started. */
struct cube_cpu {
    uint64_t user, nice, system, idle, iowait, irq, softirq, steal, guest,
        guest_nice;
};

struct cube_load {
    double last1min, last5min, last15min;
    uint64_t process_running, process_total, last_pid;
};

/* No number is above INT64_MAX. Plain memory: copy it as you like. */
struct cube_stats {
    struct cube_mem mem;
    struct cube_disk disk;
    struct cube_cpu cpu;
    struct cube_load load;
    int64_t task_count;
    /* Cube's own; empty or 0 from a worker of the Go implementation: */
    char machine[40]; /* "Machine": equal for workers on one machine */
    char engine[120]; /* "Engine": equal for workers on one engine */
    char runtime[20]; /* "Runtime": docker, podman, process */
    double cpu_use;   /* "CpuUse": busy share of the last interval, 0 .. 1 */
    int64_t cpus;     /* "Cpus": how many there are; 0: unknown */
};

/*
 * Reads the metrics of the machine it runs on (Linux). Remembers the reading
 * before, since CPU use is a difference. Borrows the world; the caller frees.
 */
struct cube_machine;
CUBE_API struct cube_machine *cube_machine_new(const struct cube_world *w);
CUBE_API void cube_machine_free(struct cube_machine *m);
/*
 * Fills all but `task_count`, `engine` and `runtime`, which it leaves as they
 * are. What could not be read is 0; then it returns -1 and says what. The
 * file system is the one that `path` is on ("/" on the wire).
 */
CUBE_API int cube_machine_read(struct cube_machine *m, const char *path,
                               struct cube_stats *out, struct cube_err *err);

/* As compact JSON, added to `out`, without a newline. */
CUBE_API void cube_stats_print(const struct cube_stats *s,
                               struct cube_buf *out);
/*
 * From JSON, ours or the Go implementation's: missing keys are 0, unknown
 * ones are left out. A number that is none is CUBE_EPROTO and named.
 */
CUBE_API int cube_stats_parse(const char *json, size_t len,
                              struct cube_stats *out, struct cube_err *err);



/* ==== Chapter 9. Runtimes ==== */

/*
 * What runs a task: a container engine, or the machine itself. One interface
 * for all of them, so that a worker does not know which it has, and a program
 * can bring one of its own.
 *
 * All functions but `free` are asynchronous on the runtime's loop. A callback
 * runs exactly once and never before the call that started it returned; what
 * it is given is borrowed and lives until it returns. After `free`, which no
 * callback may call, none runs any more; after `logs_cancel`, not that one.
 *
 * An error is one of two kinds, and cube_runtime_is_trouble tells them apart:
 * the runtime is in trouble (it cannot be reached, hangs, has lost its mind:
 * nothing is known about the container, wait and ask again), or the runtime
 * says no (there is no such image, the port is taken: its own words are in
 * the text, and asking again in the same way is in vain).
 */

/* A container or a process, as it was just now. The receiver's to read only:
 * texts are never NULL, "" is unknown. */
enum cube_box_state {
    CUBE_BOX_CREATED, /* made, never started */
    CUBE_BOX_RUNNING,
    CUBE_BOX_EXITED
};

struct cube_container {
    char *id;             /* the engine's */
    char *name;
    char *task;           /* labels, as they were given to `start` */
    char *cluster;
    char *worker;
    int64_t attempt, restart;
    char *spec;           /* the task's JSON as it was given to `start` */
    enum cube_box_state state;
    bool has_exit;        /* exit_code is known */
    int exit_code;        /* 128 + signal number for a signal */
    bool is_oom_killed;
    bool is_interrupted;  /* somebody else ended it, as an engine does that
                             stops: no exit of its own, costs it nothing */
    char *error;          /* why it ended or did not start, in words */
    struct cube_time started, finished;
    struct cube_ports ports; /* where its ports are on the host */
};

/* What to start. The runtime copies what it keeps. */
struct cube_start {
    const struct cube_task *task;
    const char *cluster, *worker; /* UUIDs; "" is none */
    int64_t attempt;
    /* May be NULL. In words, whenever they change: "pulling nginx:latest: 3
     * of 5 layers, 12.3 MB". Comes any number of times before the end. */
    void (*progress)(void *arg, const char *words);
};

struct cube_logs_options {
    bool is_following; /* goes on until the container ends */
    int64_t tail;      /* so many last lines; below 0: all */
};

struct cube_logs; /* a log stream; the runtime's */
struct cube_runtime;

/* `err` is NULL for success; `c` is NULL for a failure. */
typedef void cube_container_fn(void *arg, const struct cube_container *c,
                               const struct cube_err *err);
typedef void cube_containers_fn(void *arg, const struct cube_container *list,
                                size_t count, const struct cube_err *err);
typedef void cube_text_fn(void *arg, const char *text, size_t len,
                          const struct cube_err *err);
typedef void cube_done_fn(void *arg, const struct cube_err *err);
/* Output and errors of the task, as they come. */
typedef void cube_data_fn(void *arg, const char *p, size_t len);
/* The container of the task with this ID may have changed: inspect it. NULL:
 * anything may have changed (events were missed): list. */
typedef void cube_change_fn(void *arg, const char *task);

struct cube_runtime_ops {
    /* Makes and starts a container for the task, having pulled the image if
     * there is none, and reports it as it then is, host ports included. A
     * start that ended in trouble can be repeated: what this worker's earlier
     * start of the same task, attempt and restart count left behind is used
     * (also if it has run and ended meanwhile), and what is left of an older
     * attempt or restart is removed. After a `no` nothing is left of it. */
    void (*start)(struct cube_runtime *rt, const struct cube_start *what,
                  cube_container_fn *fn, void *arg);
    /* Gives up a start that has not reported yet, if there is one: it then
     * reports CUBE_ECANCELED (or, when that came too late, success). */
    void (*start_cancel)(struct cube_runtime *rt, const char *task);
    /* Asks it to end, and kills it after `grace_ms`; reports when it has
     * ended. Success as well when it had already, or is gone. */
    void (*stop)(struct cube_runtime *rt, const char *id, int64_t grace_ms,
                 cube_done_fn *fn, void *arg);
    /* Kills it at once, if it runs. Success when it had ended, or is gone. */
    void (*kill)(struct cube_runtime *rt, const char *id, cube_done_fn *fn,
                 void *arg);
    /* Removes it with its log, running or not. Success when it is gone. */
    void (*remove)(struct cube_runtime *rt, const char *id, cube_done_fn *fn,
                   void *arg);
    /* All that carry a task's label, with the worker's, or of all workers
     * (NULL), running or not, each as `inspect` gives it. */
    void (*list)(struct cube_runtime *rt, const char *worker,
                 cube_containers_fn *fn, void *arg);
    /* CUBE_ENOENT: there is none (any more). */
    void (*inspect)(struct cube_runtime *rt, const char *id,
                    cube_container_fn *fn, void *arg);
    /* The engine's own JSON of it. */
    void (*inspect_json)(struct cube_runtime *rt, const char *id,
                         cube_text_fn *fn, void *arg);
    /* Never NULL. `on_end` once, unless it was cancelled. */
    struct cube_logs *(*logs)(struct cube_runtime *rt, const char *id,
                              const struct cube_logs_options *options,
                              cube_data_fn *on_data, cube_done_fn *on_end,
                              void *arg);
    /* No more for now, or go on: whoever reads it is slow. A little may still
     * come. May be NULL; then a reader that is too slow is cut off. */
    void (*logs_hold)(struct cube_runtime *rt, struct cube_logs *logs,
                      bool is_held);
    void (*logs_cancel)(struct cube_runtime *rt, struct cube_logs *logs);
    /* Reports changes of containers with this worker's label, or of all
     * (NULL), from now on, first a NULL; `fn` NULL ends it. */
    void (*watch)(struct cube_runtime *rt, const char *worker,
                  cube_change_fn *fn, void *arg);
    void (*free)(struct cube_runtime *rt);
};

/* The part that all runtimes share; theirs follows it in memory. */
struct cube_runtime {
    const struct cube_runtime_ops *ops;
    struct cube_loop *loop;
    const char *name; /* "docker", "podman", "process" */
    char *words;      /* "Docker Engine 20.10.24 at /var/run/docker.sock" */
    char *engine_id;  /* who shares it shares its containers; "" unknown yet */
    char *host;       /* that has its host ports; NULL: this machine */
    bool is_up;       /* it answered the last time it was asked */
};

/* The runtime is in trouble: wait and ask again; it has not said no. */
CUBE_API bool cube_runtime_is_trouble(const struct cube_err *err);

/* Frees any runtime; NULL is fine. Containers stay as they are. */
CUBE_API void cube_runtime_free(struct cube_runtime *rt);

/* A Docker Engine or a Podman at `where`: "unix:///run/docker.sock",
 * "tcp://10.0.0.7:2375". Connects when it is first used, and again whenever
 * it has to. NULL when `where` makes no sense. */
CUBE_API struct cube_runtime *cube_docker_new(struct cube_loop *l,
                                              const char *where,
                                              struct cube_err *err);

/* Processes of this machine, each supervised by one of its own, their files
 * in `dir`, which is made. NULL: it cannot be, or this kernel cannot tell when
 * a process ends (Linux before 5.3). Supervisors become children of process 1:
 * a program that is it, in a container of its own, has them collected by
 * SA_NOCLDWAIT for SIGCHLD, or stays with a zombie now and then. */
CUBE_API struct cube_runtime *cube_process_new(struct cube_loop *l,
                                               const char *dir,
                                               struct cube_err *err);

/* `rt` is the caller's to free; NULL with `err` when there is none. `words`
 * say which was taken and why. */
typedef void cube_runtime_fn(void *arg, struct cube_runtime *rt,
                             const char *words, const struct cube_err *err);

/* Finds a runtime. `which` is "docker", "podman" or "process", which asks for
 * that one, or "auto": Docker where it answers (DOCKER_HOST, else
 * /var/run/docker.sock), else Podman (CONTAINER_HOST, else the socket of the
 * user or of root), else processes. An engine that is asked for by name and
 * does not answer is given all the same: it may be just restarting. The
 * search is gone when it has called back. */
struct cube_runtime_search;
CUBE_API struct cube_runtime_search *
cube_runtime_find(struct cube_loop *l, const char *which, const char *dir,
                  cube_runtime_fn *fn, void *arg);
/* Gives a search up: it does not call back. NULL is fine. */
CUBE_API void cube_runtime_find_cancel(struct cube_runtime_search *search);


/* ==== Chapter 10. Schedulers ==== */

/*
 * A scheduler chooses the node that a task runs on, in three steps: which
 * nodes can take it (candidates), how good each of those is (score), and
 * which of them it is to be (pick). Each step is a function that a program
 * can write itself; where it leaves one out, the built-in one is used.
 *
 *    static double most_free_disk(void *ctx, const struct cube_placement *p,
 *                                 const struct cube_node *node)
 *    {
 *        return -(double)node->stats->disk.free;       // the lowest wins
 *    }
 *    struct cube_scheduler mine = {.name = "disk", .score = most_free_disk};
 *    const struct cube_node *where = cube_schedule(&mine, &placement, &why);
 */

/* A host port that one of a node's tasks has. */
struct cube_node_port {
    int number;
    const char *protocol; /* "tcp", "udp", "sctp"; a constant */
    char id[CUBE_UUID_TEXT]; /* the task's */
    char *task;              /* its name, for words; owned */
};

/* What is promised to the tasks of a node, whether they use it by now or
 * not. Counted by cube_node_promise. */
struct cube_promise {
    double cpu; /* cores */
    int64_t mem_bytes, disk_bytes;
    int64_t tasks;
    int64_t cpu_open, mem_open; /* of these: tasks that asked for no cores,
                                   for no memory in particular */
};

/* A node, as far as placing tasks goes. Zeroed is empty. */
struct cube_node {
    const char *name;               /* "host:port"; no two alike */
    bool is_up;                     /* it answers, and may be given tasks */
    const char *why_down;           /* in words, when it is not; or NULL */
    const struct cube_stats *stats; /* its latest; NULL: it sent none yet */
    struct cube_promise promised;
    struct cube_node_port *ports;   /* owned; see cube_node_clear */
    size_t port_count;
};

/* Adds a task to what its node has promised. Everything that is needed is
 * copied. The task that is being placed should not be among them: its own
 * ports do not hinder it, but its own memory and cores count twice. */
CUBE_API void cube_node_promise(struct cube_node *node,
                                const struct cube_task *task);
/* Takes back all promises, to count anew, or before the node is dropped. */
CUBE_API void cube_node_clear(struct cube_node *node);

/* What one decision is about. All borrowed. */
struct cube_placement {
    const struct cube_task *task;
    const struct cube_node *nodes;
    size_t node_count;
    const char *avoid; /* name of a node where it has failed, or NULL */
    int64_t most_tasks; /* on one machine; cube_schedule fills it in for the
                           scores, since each needs it */
};

/* A candidate and its score. */
struct cube_choice {
    const struct cube_node *node;
    double score;
};

/* All functions get `ctx` first. Zero is the built-in step. */
struct cube_scheduler {
    const char *name;
    void *ctx;
    /* Can this node take the task? When not, `why` gets the reason. Asked more
     * often than one is picked. NULL: cube_schedule_fits, which a function of
     * yours may also call. */
    bool (*candidate)(void *ctx, const struct cube_placement *p,
                      const struct cube_node *node, struct cube_buf *why);
    /* How good is this candidate? Lower is better; never a NaN. NULL: all
     * are equal. */
    double (*score)(void *ctx, const struct cube_placement *p,
                    const struct cube_node *node);
    /* Which of them? An index; `count` or beyond: none of them for now. NULL:
     * the lowest score, of equal ones the node with the fewest tasks, of
     * those the first by name. */
    size_t (*pick)(void *ctx, const struct cube_placement *p,
                   const struct cube_choice *choices, size_t count);
};

/*
 * One of the built-in schedulers, by its name:
 *   roundrobin   one node after the other, by name
 *   greedy       the node that is least loaded with the task on it
 *   epvm         the node where it costs least (Amir et al. 2000)
 * NULL: there is none of that name. It remembers what it needs from one
 * decision to the next, so give each manager its own. The caller frees it.
 * The `score` of greedy and epvm can be called from one of yours, with the
 * scheduler's `ctx`.
 */
CUBE_API struct cube_scheduler *cube_scheduler_new(const char *name,
                                                   struct cube_err *err);
CUBE_API void cube_scheduler_free(struct cube_scheduler *s);

/*
 * Decides. NULL when no node can take the task; then `why` (may be NULL) gets
 * the reason for each, such as "node a:5556: needs 8 GiB of memory, 2.1 GiB
 * left; node b:5557: host port 8080 is taken by task web".
 */
CUBE_API const struct cube_node *cube_schedule(const struct cube_scheduler *s,
                                               const struct cube_placement *p,
                                               struct cube_buf *why);

/*
 * Does the node answer, run what the task is, and have the memory, cores,
 * disk and host ports that it asks for? Workers on one machine, or on one
 * engine, share all of these. When not, `why` gets the first reason.
 */
CUBE_API bool cube_schedule_fits(const struct cube_placement *p,
                                 const struct cube_node *node,
                                 struct cube_buf *why);



/* ==== Chapter 11. Worker ==== */

/*
 * A worker runs tasks on this machine and keeps them true to what was asked.
 * Over HTTP, mostly for its manager (errors as at the Manager):
 *
 *    POST   /tasks             an event; 201 and the task, once on disk
 *    GET    /tasks             200 and a list of its tasks
 *    GET    /tasks/{id}        200 and what the engine says of its container
 *    DELETE /tasks/{id}        204: it will be stopped
 *    GET    /tasks/{id}/logs   what it has written; ?follow=1&tail=100
 *    GET    /stats             the machine: cube_stats_parse
 *    GET    /events            each change, a line of JSON; ?after= resumes
 *    GET    /healthz           200, without a token too
 *
 * Zero or NULL is the default. Texts are copied.
 */
struct cube_worker_options {
    const char *name;     /* of its file and its containers; "worker" */
    const char *listen;   /* "127.0.0.1:5556" */
    const char *data_dir; /* where its file and its processes live; "." */
    const char *store;    /* "persistent", or "memory" */
    const char *runtime;  /* "auto", "docker", "podman", "process" */
    struct cube_runtime *own_runtime; /* or one's own; the worker frees it */
    const char *join;     /* a manager's host:port to register with */
    const char *advertise; /* host:port for managers, if `listen` is not it */
    const char *tokens[2]; /* one of them is asked for; [0] is sent */
    const char *const *host_names; /* accepted in Host; NULL-terminated */
    bool take_over;       /* take orders from another cluster from now on */
    int64_t keep_ms;      /* finished tasks are kept that long; 168 h */
};

struct cube_worker;

/* Opens its store, listens, and goes on where it was. NULL: CUBE_EBUSY (its
 * port or its file is in use), CUBE_EINVAL, CUBE_EIO, CUBE_ECORRUPT. */
CUBE_API struct cube_worker *
cube_worker_new(struct cube_loop *l, const struct cube_worker_options *o,
                struct cube_err *err);
/* Ends the worker, not its tasks: they run on, and the next one adopts them. */
CUBE_API void cube_worker_free(struct cube_worker *w);
/* The port that it listens on, if `listen` ends with :0. */
CUBE_API uint16_t cube_worker_port(struct cube_worker *w);


/* ==== Chapter 12. Manager ==== */

/*
 * A manager accepts tasks, places each on a worker, and watches over it. Over
 * HTTP, with tasks and events as cube_task_print and cube_event_print write
 * them:
 *
 *    POST   /tasks               a task, or an event that has one; 201 and the
 *                                task as accepted, once it is on disk
 *    GET    /tasks               200 and a list; ?at=TIME (RFC 3339): of then
 *    GET    /tasks/{id}          200 and the task
 *    DELETE /tasks/{id}          204: it will be stopped; with ?forget=1 its
 *                                record is removed, if it is finished
 *    GET    /tasks/{id}/logs     what it has written; ?follow=1&tail=100
 *    GET    /tasks/{id}/inspect  what its engine says of its container
 *    GET    /tasks/{id}/history  each change, a line of JSON
 *    GET    /nodes               200 and a list; ?at=TIME: of then
 *    POST   /nodes               a worker joins
 *    DELETE /nodes/{host:port}   204: it is forgotten
 *    GET    /events              each change, a line of JSON; ?task=, ?after=
 *    GET    /backup              its store, for cube_client_backup
 *    GET    /healthz             200, without a token too
 *
 * Errors are {"HTTPStatusCode":409,"Message":"..."}: 400 that can never run,
 * 401 and 403 not allowed, 404 unknown (of tasks without a body), 409 it is
 * there and differs, or is not over, 507 the disk is full, 503 a sync failed
 * and the outcome is unknown.
 *
 * Zero or NULL is the default. Texts are copied.
 */
struct cube_manager_options {
    const char *listen;    /* "127.0.0.1:5555" */
    const char *data_dir;  /* where its file lives; "." */
    const char *store;     /* "persistent", or "memory" */
    const char *workers;   /* "a:5556,b:5557"; "localhost:5556" */
    const char *scheduler_name;             /* "roundrobin", ... ; "epvm" */
    const struct cube_scheduler *scheduler; /* or one's own; borrowed */
    const char *tokens[2]; /* one of them is asked for; [0] is sent */
    const char *const *host_names; /* accepted in Host; NULL-terminated */
    int64_t keep_ms;       /* finished tasks and events; 168 h */
    int64_t lost_after_ms; /* without a sign of life; 5 s, at least 2 s */
    int64_t epoch;         /* at least: for a copy of a store, where workers
                              that know a later one cannot be asked */
};

struct cube_manager;

/* Opens its store, listens, and goes on where it was. NULL: CUBE_EBUSY (its
 * port or its file is in use), CUBE_EINVAL, CUBE_EIO, CUBE_ECORRUPT. */
CUBE_API struct cube_manager *
cube_manager_new(struct cube_loop *l, const struct cube_manager_options *o,
                 struct cube_err *err);
/* Ends the manager; workers and tasks run on. */
CUBE_API void cube_manager_free(struct cube_manager *m);
/* The port that it listens on, if `listen` ends with :0. */
CUBE_API uint16_t cube_manager_port(struct cube_manager *m);


/* ==== Chapter 13. Client ==== */

/*
 * What a program needs that talks to a manager as a person would: each call
 * asks, turns the loop until the answer is there, and returns it. So it must
 * not be called from a callback of the same loop; whatever else lives on that
 * loop is served meanwhile.
 *
 *     struct cube_client *c =
 *         cube_client_new(loop, "localhost:5555", NULL, &err);
 *     struct cube_task_list l;
 *
 *     if (c && cube_client_tasks(c, &l, &err) == 0) {
 *         for (size_t i = 0; i < l.count; i++)
 *             printf("%s %s\n", l.list[i]->id,
 *                    cube_state_name(l.list[i]->state));
 *         cube_task_list_free(&l);
 *     }
 *     cube_client_free(c);
 *
 * All functions return 0 or -1. No manager answered: CUBE_ECONN, or
 * CUBE_ETIMEOUT. The manager refused: CUBE_EINVAL (400), CUBE_EACCES (401,
 * 403), CUBE_ENOENT (404), CUBE_EEXIST (409), CUBE_EBUSY (429), CUBE_ENOSPC
 * (507), CUBE_ESYNC (503), else CUBE_EPROTO, with the manager's own words.
 */
struct cube_client;

/* `where` is "host:port", or a URL with http:// or https://; the latter needs
 * a library built with CUBE_WITH_CURL=1. `token` may be NULL. Nothing is
 * connected yet. CUBE_EINVAL: `where` cannot be right. */
CUBE_API struct cube_client *cube_client_new(struct cube_loop *l,
                                             const char *where,
                                             const char *token,
                                             struct cube_err *err);
CUBE_API void cube_client_free(struct cube_client *c);
/* How long an answer may take; 30 s by default. Streams may be silent as
 * long. */
CUBE_API void cube_client_set_timeout(struct cube_client *c, int timeout_ms);

/* One request. `body` may be NULL; the answer is added to `answer`, which may
 * be NULL too. The calls below are built on it. */
CUBE_API int cube_client_call(struct cube_client *c, const char *method,
                              const char *target, const char *body,
                              size_t body_len, struct cube_buf *answer,
                              struct cube_err *err);

/* Owns its tasks. */
struct cube_task_list {
    struct cube_task **list;
    size_t count;
};
/* GET /tasks, in the manager's order. Free the list after a success. */
CUBE_API int cube_client_tasks(struct cube_client *c,
                               struct cube_task_list *out,
                               struct cube_err *err);
/* As they were at that time, the one that changed last first; as long as the
 * manager keeps its history (keep_ms). CUBE_ENOENT: it does not reach back so
 * far, and says how far. */
CUBE_API int cube_client_tasks_at(struct cube_client *c,
                                  const struct cube_time *at,
                                  struct cube_task_list *out,
                                  struct cube_err *err);
CUBE_API void cube_task_list_free(struct cube_task_list *l);

/* A node as the manager tells of it. Texts are never NULL; what a Go manager
 * does not tell is "". */
struct cube_node_info {
    char *name, *api, *role;
    char *state;  /* "up", "lost", "refuses", "unknown"; in the last event of
                     one that was removed "forgotten" */
    char *worker; /* its UUID */
    char *runtime, *error;
    int64_t mem_kb, disk_bytes, task_count;
    double cpu_use; /* 0 .. 1, of all cores; below 0: unknown */
    char *json;     /* all of it */
};
struct cube_node_list {
    struct cube_node_info *list;
    size_t count;
};
/* GET /nodes. Free the list after a success. */
CUBE_API int cube_client_nodes(struct cube_client *c,
                               struct cube_node_list *out,
                               struct cube_err *err);
/* As they were at that time. Metrics, and what is allocated, are those of the
 * node's last change before it. */
CUBE_API int cube_client_nodes_at(struct cube_client *c,
                                  const struct cube_time *at,
                                  struct cube_node_list *out,
                                  struct cube_err *err);
CUBE_API void cube_node_list_free(struct cube_node_list *l);

/* POST /tasks. `*out`, which may be NULL, is the accepted task; free it. An
 * event whose task has an ID can be submitted again when the outcome is
 * unknown: the same ID with the same specification is the same task. */
CUBE_API int cube_client_submit(struct cube_client *c,
                                const struct cube_event *e,
                                struct cube_task **out, struct cube_err *err);
/* Asks that the task be stopped; it is later. CUBE_ENOENT: unknown. */
CUBE_API int cube_client_stop(struct cube_client *c, const char *task_id,
                              struct cube_err *err);
/* Removes a finished task from the records. CUBE_EEXIST: it is not over. */
CUBE_API int cube_client_remove(struct cube_client *c, const char *task_id,
                                struct cube_err *err);
/* Forgets a node. CUBE_EEXIST: it is up and has tasks. A worker that joins by
 * itself comes back, as does one of the manager's own list at its next start.
 */
CUBE_API int cube_client_node_remove(struct cube_client *c, const char *name,
                                     struct cube_err *err);
/* What the engine says of the task's container, as its JSON. */
CUBE_API int cube_client_inspect(struct cube_client *c, const char *task_id,
                                 struct cube_buf *json, struct cube_err *err);

/* A piece of a stream; false: enough, the call then returns 0. */
typedef bool cube_client_data_fn(void *arg, const char *data, size_t len);
/* What the task has written; the last `tail` lines of it (below 0: all). With
 * `is_following` until the task ends. CUBE_ECONN: cut off before the end. */
CUBE_API int cube_client_logs(struct cube_client *c, const char *task_id,
                              bool is_following, long tail,
                              cube_client_data_fn *fn, void *arg,
                              struct cube_err *err);

enum cube_notice_type {
    CUBE_NOTICE_HELLO,  /* the first */
    CUBE_NOTICE_RESET,  /* forget what you know: the full list follows */
    CUBE_NOTICE_LISTED, /* that was the list; from here on it is changes */
    CUBE_NOTICE_TASK,   /* `task`: as it is now */
    CUBE_NOTICE_GONE,   /* `id`: its record was removed */
    CUBE_NOTICE_NODE,   /* `node`: as it is now */
    CUBE_NOTICE_BEAT    /* a sign of life; and what this version ignores */
};
/* One line of GET /events; borrowed, until the callback returns. */
struct cube_notice {
    enum cube_notice_type type;
    const char *cursor;   /* where to resume behind it; NULL: where before */
    struct cube_time time;
    const struct cube_task *task;
    const struct cube_node_info *node;
    const char *id;
    const char *why;      /* it changed, in words; NULL: it does not say */
    const char *line;     /* the JSON */
    size_t len;
};
/* false: enough, the call then returns 0. */
typedef bool cube_client_notice_fn(void *arg, const struct cube_notice *n);
/* The events of one task, or of all for NULL, behind `after` (a cursor) or
 * from a full list on for NULL, until `fn` says false. CUBE_ECONN,
 * CUBE_ETIMEOUT: the stream broke; resume behind the last cursor. */
CUBE_API int cube_client_events(struct cube_client *c, const char *task_id,
                                const char *after, cube_client_notice_fn *fn,
                                void *arg, struct cube_err *err);
/* GET /backup: writes all that the manager has on disk when it is asked to a
 * new store at `path`, while the manager works; `*records` (may be NULL) is
 * how many keys that has. The file is there when all of it has come, was read
 * through and is on disk, or not at all. CUBE_EEXIST: there is a file, and not
 * `is_replacing`; CUBE_EBUSY: a store has it open. */
CUBE_API int cube_client_backup(struct cube_client *c, const char *path,
                                bool is_replacing, uint64_t *records,
                                struct cube_err *err);
/* What became of a task: each change (TASK, GONE) since it was submitted, or
 * since the manager keeps history, oldest first; also of one that is removed.
 * None at all: it is unknown. */
CUBE_API int cube_client_history(struct cube_client *c, const char *task_id,
                                 cube_client_notice_fn *fn, void *arg,
                                 struct cube_err *err);



#ifdef __cplusplus
}
#endif
#endif /* CUBE_H */

#if defined(CUBE_IMPLEMENTATION) && !defined(CUBE_C)
#if defined(__cplusplus)
#error "Cube is C: compile cube.c with a C compiler and link cube.o"
#elif defined(__GLIBC__) && !defined(__USE_GNU)
#error "a system header came first: put this #include above all others, or \
#define _GNU_SOURCE (or pass -D_GNU_SOURCE) before them"
#else
#include "cube.c"
#endif
#endif
