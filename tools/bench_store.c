/*
 * How fast the store is, each figure beside its bar: the limit (a bare append
 * of the same bytes with fdatasync into zero-filled space) and the peers
 * (LMDB, SQLite, LevelDB, where tools/bench_store finds them), all on the same
 * disk in one run. Keys of 16 random bytes, values of 500 bytes.
 *
 *     tools/bench_store            all rows, about five minutes
 *     tools/bench_store get scan   these rows; tools/bench_store -h lists them
 *
 * Set in the environment: BENCH_DIR (where the files go, default build/bench),
 * BENCH_PUTS (durable puts, default 50000), BENCH_BIG (records of the large
 * trees, default 1000000).
 *
 * Engines take turns, and of the turns the median counts, since neither disk
 * nor processor is equally fast from one second to the next.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <malloc.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

/* Memory that counts: what the store has, and the most that it had. */
static long heap, heap_peak;

static void *heap_count(void *p, long sign)
{
    long n = __atomic_add_fetch(
        &heap, sign * (long)(p ? malloc_usable_size(p) : 0),
        __ATOMIC_RELAXED);

    if (n > heap_peak)
        heap_peak = n;
    return p;
}

static void *heap_realloc(void *p, size_t size)
{
    heap_count(p, -1);
    return heap_count(realloc(p, size), 1);
}

static void heap_free(void *p)
{
    heap_count(p, -1);
    free(p);
}

#define CUBE_MALLOC(size) heap_count(malloc(size), 1)
#define CUBE_REALLOC(p, size) heap_realloc(p, size)
#define CUBE_FREE(p) heap_free(p)
#include "../cube.c" /* the commit point of a loop is not in cube.h */

#include <sys/stat.h>
#include <sys/wait.h>

#ifdef WITH_LMDB
#include <lmdb.h>
#endif
#ifdef WITH_SQLITE
#include <sqlite3.h>
#endif
#ifdef WITH_LEVELDB
#include <leveldb/c.h>
#endif

#define KEY 16
#define VAL 500

static const char *dir;
static unsigned char val[VAL];

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* Of the processor alone: for what waits for nothing, where others use the
 * machine too. */
static double cpu(void)
{
    struct timespec t;

    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void die(const char *what)
{
    fprintf(stderr, "bench_store: %s\n", what);
    exit(1);
}

/* The i-th key: random bytes, the same in each run (splitmix64). */
static void key_of(uint64_t i, unsigned char key[KEY])
{
    for (int half = 0; half < 2; half++) {
        uint64_t z = (i * 2 + (uint64_t)half + 1) * 0x9e3779b97f4a7c15u;

        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        z ^= z >> 31;
        memcpy(key + 8 * half, &z, 8);
    }
}

static const char *path_of(const char *name)
{
    static char path[8][700];
    static int turn;

    turn = (turn + 1) % 8;
    snprintf(path[turn], sizeof path[0], "%s/%s", dir, name);
    return path[turn];
}

static void wipe(const char *name)
{
    char cmd[800];

    snprintf(cmd, sizeof cmd, "rm -rf '%s' '%s.lock' '%s-lock' '%s-wal' "
             "'%s-shm'", path_of(name), path_of(name), path_of(name),
             path_of(name), path_of(name));
    if (system(cmd) != 0)
        die("rm");
}

static double file_bytes(const char *name)
{
    struct stat s;

    return stat(path_of(name), &s) == 0 ? (double)s.st_size : 0;
}

/* One engine: opened with a cache size (0: its default), closed, and so on;
 * put stages, commit makes durable. */
struct engine {
    const char *name;
    void (*open)(size_t cache_bytes, bool is_durable);
    void (*put)(const unsigned char *key);
    void (*commit)(void);
    bool (*get)(const unsigned char *key);
    uint64_t (*scan)(void);
    void (*close)(void);
};

/* ---- The limit ---- */

static int bare_fd;
static off_t bare_at, bare_end;

static void bare_open(size_t cache_bytes, bool is_durable)
{
    (void)cache_bytes;
    (void)is_durable;
    bare_fd = open(path_of("bare"), O_RDWR | O_CREAT, 0600);
    bare_at = bare_end = 0;
}

static void bare_put(const unsigned char *key)
{
    static char zeros[1 << 20], buf[600];

    memcpy(buf, key, KEY);
    memcpy(buf + KEY, val, VAL);
    if (bare_at + 600 > bare_end) {
        if (pwrite(bare_fd, zeros, sizeof zeros, bare_end) < 0)
            die("write");
        bare_end += (off_t)sizeof zeros;
    }
    if (pwrite(bare_fd, buf, 600, bare_at) != 600)
        die("write");
    bare_at += 600;
}

static void bare_commit(void)
{
    if (fdatasync(bare_fd) < 0)
        die("fdatasync");
}

static void bare_close(void)
{
    close(bare_fd);
}

/* ---- Cube ---- */

static struct cube_store *our;
static struct cube_err our_error;
static struct cube_buf our_value;
static bool our_is_durable;

static void our_open(size_t cache_bytes, bool is_durable)
{
    struct cube_store_options o = {.cache_bytes = cache_bytes};

    our_is_durable = is_durable;
    our = cube_store_open(NULL, path_of("cube"), &o, &our_error);
    if (!our)
        die(our_error.text);
}

static void our_put(const unsigned char *key)
{
    if (cube_store_put(our, "t", key, KEY, val, VAL, &our_error) < 0)
        die(our_error.text);
}

static void our_commit(void)
{
    int r = cube_store_commit_begin(our, &our_error);

    if (r > 0 && our_is_durable)
        r = -fdatasync(cube_store_fd(our));
    if (r < 0 || cube_store_commit_end(our, 0, &our_error) < 0)
        die(our_error.text);
}

static bool our_get(const unsigned char *key)
{
    return cube_store_get(our, "t", key, KEY, &our_value, &our_error) == 1;
}

static uint64_t our_scan(void)
{
    struct cube_cursor *c = cube_cursor_open(our, "t", NULL);
    uint64_t n = 0;
    const void *v;
    size_t len;

    for (int r = cube_cursor_first(c, NULL); r > 0;
         r = cube_cursor_next(c, NULL)) {
        if (cube_cursor_value(c, &v, &len, NULL) < 0)
            die("value");
        n += len > 0 && *(const unsigned char *)v == val[0];
    }
    cube_cursor_close(c);
    return n;
}

static void our_close(void)
{
    cube_store_close(our);
    cube_buf_free(&our_value);
}

/* ---- LMDB ---- */

#ifdef WITH_LMDB
static MDB_env *lm;
static MDB_txn *lm_txn;
static MDB_dbi lm_dbi;

static void lm_open(size_t cache_bytes, bool is_durable)
{
    (void)cache_bytes;
    mdb_env_create(&lm);
    mdb_env_set_mapsize(lm, (size_t)8 << 30);
    if (mdb_env_open(lm, path_of("lmdb"),
                     MDB_NOSUBDIR | (is_durable ? 0 : MDB_NOSYNC), 0600))
        die("lmdb");
    mdb_txn_begin(lm, NULL, 0, &lm_txn);
    mdb_dbi_open(lm_txn, NULL, 0, &lm_dbi);
    mdb_txn_commit(lm_txn);
    lm_txn = NULL;
}

static void lm_put(const unsigned char *key)
{
    MDB_val k = {KEY, (void *)(uintptr_t)key}, v = {VAL, val};

    if (!lm_txn)
        mdb_txn_begin(lm, NULL, 0, &lm_txn);
    if (mdb_put(lm_txn, lm_dbi, &k, &v, 0))
        die("lmdb put");
}

static void lm_commit(void)
{
    if (lm_txn && mdb_txn_commit(lm_txn))
        die("lmdb commit");
    lm_txn = NULL;
}

static bool lm_get(const unsigned char *key)
{
    MDB_val k = {KEY, (void *)(uintptr_t)key}, v;
    static unsigned char copy[VAL];

    if (!lm_txn)
        mdb_txn_begin(lm, NULL, MDB_RDONLY, &lm_txn);
    if (mdb_get(lm_txn, lm_dbi, &k, &v))
        return false;
    memcpy(copy, v.mv_data, v.mv_size); /* as the others do */
    return true;
}

static uint64_t lm_scan(void)
{
    MDB_cursor *c;
    MDB_val k, v;
    uint64_t n = 0;

    if (!lm_txn)
        mdb_txn_begin(lm, NULL, MDB_RDONLY, &lm_txn);
    mdb_cursor_open(lm_txn, lm_dbi, &c);
    while (mdb_cursor_get(c, &k, &v, MDB_NEXT) == 0)
        n += *(unsigned char *)v.mv_data == val[0];
    mdb_cursor_close(c);
    return n;
}

static void lm_close(void)
{
    if (lm_txn)
        mdb_txn_abort(lm_txn);
    lm_txn = NULL;
    mdb_env_close(lm);
}
#endif

/* ---- SQLite ---- */

#ifdef WITH_SQLITE
static sqlite3 *sq;
static sqlite3_stmt *sq_ins, *sq_sel;
static bool sq_is_open;

static void sq_do(const char *sql)
{
    if (sqlite3_exec(sq, sql, NULL, NULL, NULL) != SQLITE_OK)
        die(sqlite3_errmsg(sq));
}

static void sq_open(size_t cache_bytes, bool is_durable)
{
    char sql[100];

    if (sqlite3_open(path_of("sqlite"), &sq) != SQLITE_OK)
        die("sqlite");
    sq_do("pragma journal_mode=wal");
    sq_do(is_durable ? "pragma synchronous=full" : "pragma synchronous=off");
    snprintf(sql, sizeof sql, "pragma cache_size=-%zu",
             cache_bytes ? cache_bytes / 1024 : 2000);
    sq_do(sql);
    sq_do("create table if not exists t(k blob primary key, v blob) "
          "without rowid");
    sqlite3_prepare_v2(sq, "insert or replace into t values(?,?)", -1,
                       &sq_ins, NULL);
    sqlite3_prepare_v2(sq, "select v from t where k=?", -1, &sq_sel, NULL);
}

static void sq_put(const unsigned char *key)
{
    if (!sq_is_open)
        sq_do("begin");
    sq_is_open = true;
    sqlite3_bind_blob(sq_ins, 1, key, KEY, SQLITE_STATIC);
    sqlite3_bind_blob(sq_ins, 2, val, VAL, SQLITE_STATIC);
    if (sqlite3_step(sq_ins) != SQLITE_DONE)
        die(sqlite3_errmsg(sq));
    sqlite3_reset(sq_ins);
}

static void sq_commit(void)
{
    if (sq_is_open)
        sq_do("commit");
    sq_is_open = false;
}

static bool sq_get(const unsigned char *key)
{
    static unsigned char copy[VAL];
    bool found;

    sqlite3_bind_blob(sq_sel, 1, key, KEY, SQLITE_STATIC);
    found = sqlite3_step(sq_sel) == SQLITE_ROW;
    if (found)
        memcpy(copy, sqlite3_column_blob(sq_sel, 0),
               (size_t)sqlite3_column_bytes(sq_sel, 0));
    sqlite3_reset(sq_sel);
    return found;
}

static uint64_t sq_scan(void)
{
    sqlite3_stmt *st;
    uint64_t n = 0;

    sqlite3_prepare_v2(sq, "select k, v from t", -1, &st, NULL);
    while (sqlite3_step(st) == SQLITE_ROW)
        n += *(const unsigned char *)sqlite3_column_blob(st, 1) == val[0];
    sqlite3_finalize(st);
    return n;
}

static void sq_close(void)
{
    sqlite3_finalize(sq_ins);
    sqlite3_finalize(sq_sel);
    sqlite3_close(sq);
}
#endif

/* ---- LevelDB ---- */

#ifdef WITH_LEVELDB
static leveldb_t *lv;
static leveldb_options_t *lv_o;
static leveldb_writeoptions_t *lv_w;
static leveldb_writebatch_t *lv_b;

static void lv_open(size_t cache_bytes, bool is_durable)
{
    char *e = NULL;

    (void)cache_bytes;
    lv_o = leveldb_options_create();
    lv_w = leveldb_writeoptions_create();
    lv_b = leveldb_writebatch_create();
    leveldb_options_set_create_if_missing(lv_o, 1);
    leveldb_writeoptions_set_sync(lv_w, is_durable);
    lv = leveldb_open(lv_o, path_of("leveldb"), &e);
    if (e)
        die(e);
}

static void lv_put(const unsigned char *key)
{
    leveldb_writebatch_put(lv_b, (const char *)key, KEY, (char *)val, VAL);
}

static void lv_commit(void)
{
    char *e = NULL;

    leveldb_write(lv, lv_w, lv_b, &e);
    if (e)
        die(e);
    leveldb_writebatch_clear(lv_b);
}

static void lv_close(void)
{
    leveldb_close(lv);
    leveldb_writebatch_destroy(lv_b);
    leveldb_options_destroy(lv_o);
    leveldb_writeoptions_destroy(lv_w);
}
#endif

static const struct engine engines[] = {
    {"bare", bare_open, bare_put, bare_commit, NULL, NULL, bare_close},
    {"cube", our_open, our_put, our_commit, our_get, our_scan,
     our_close},
#ifdef WITH_LMDB
    {"lmdb", lm_open, lm_put, lm_commit, lm_get, lm_scan, lm_close},
#endif
#ifdef WITH_LEVELDB
    {"leveldb", lv_open, lv_put, lv_commit, NULL, NULL, lv_close},
#endif
#ifdef WITH_SQLITE
    {"sqlite", sq_open, sq_put, sq_commit, sq_get, sq_scan, sq_close},
#endif
};

#define ENGINES (sizeof engines / sizeof engines[0])

/* ---- Figures and bars ---- */

static int missed;

/* A figure without a bar, for whoever wants to know. */
__attribute__((format(printf, 1, 2))) static void note(const char *format, ...)
{
    va_list args;

    va_start(args, format);
    fputs("    ", stdout);
    vprintf(format, args);
    putchar('\n');
    va_end(args);
}

/* A figure beside its bar: is_least says on which side it has to be. */
static void judge(const char *what, double figure, bool is_least, double bar)
{
    bool holds = is_least ? figure >= bar : figure <= bar;

    printf("  %-50s %10.2f  %s %-7g %s\n", what, figure,
           is_least ? "at least" : "at most ", bar,
           holds ? "holds" : "MISSES");
    missed += !holds;
}

static int double_order(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

static double median(double *v, size_t n)
{
    qsort(v, n, sizeof *v, double_order);
    return n % 2 ? v[n / 2] : (v[n / 2 - 1] + v[n / 2]) / 2;
}

static const struct engine *engine_of(const char *name)
{
    for (size_t e = 0; e < ENGINES; e++) {
        if (strcmp(engines[e].name, name) == 0)
            return &engines[e];
    }
    return NULL;
}

/* A call's time: what it took on the clock, and of the processor. */
struct span {
    double wall, cpu;
};

static int span_order(const void *a, const void *b)
{
    return double_order(&((const struct span *)a)->wall,
                        &((const struct span *)b)->wall);
}

static struct span span_begin(void)
{
    struct span s = {now(), cpu()};

    return s;
}

static struct span span_end(struct span s)
{
    s.wall = (now() - s.wall) * 1e3;
    s.cpu = (cpu() - s.cpu) * 1e3;
    return s;
}

/* ---- Durable puts ---- */

#define ROUNDS 9

#define TURN 100 /* puts that one engine does before the next one's turn */

/* n durable puts, batch of them a commit, all engines in turns that are short
 * beside what the disk and others on the machine do to each of them. rate: of
 * each engine, the median of the rounds. */
static void bench_puts(uint64_t n, uint64_t batch, double rate[ENGINES])
{
    double took[ENGINES][ROUNDS] = {{0}};
    uint64_t turns = n / ROUNDS / TURN + 1, each = turns * TURN;

    for (size_t e = 0; e < ENGINES; e++) {
        wipe(engines[e].name);
        engines[e].open(64 << 20, true);
    }
    for (uint64_t t = 0; t < turns * ROUNDS; t++) {
        for (size_t e = 0; e < ENGINES; e++) {
            double start = now();

            for (uint64_t i = 0; i < TURN; i++) {
                unsigned char key[KEY];

                key_of(t * TURN + i, key);
                engines[e].put(key);
                if (i % batch == batch - 1)
                    engines[e].commit();
            }
            took[e][t / turns] += now() - start;
        }
    }
    for (size_t e = 0; e < ENGINES; e++) {
        engines[e].close();
        rate[e] = (double)each / median(took[e], ROUNDS);
        note("%-8s %9.0f puts a second", engines[e].name, rate[e]);
        wipe(engines[e].name);
    }
}

static void judge_puts(const double rate[ENGINES], const char *peers)
{
    char what[100];

    for (size_t e = 2; e < ENGINES; e++) {
        if (!strstr(peers, engines[e].name))
            continue;
        snprintf(what, sizeof what, "of %s", engines[e].name);
        judge(what, rate[1] / rate[e], true, 1);
    }
}

static void bench_put(uint64_t n)
{
    double rate[ENGINES];

    printf("put: one a commit, durable, %llu of them\n",
           (unsigned long long)n);
    bench_puts(n, 1, rate);
    judge("of a bare writer of 600 bytes", rate[1] / rate[0], true, 0.9);
    judge_puts(rate, "lmdb leveldb sqlite");
}

static void bench_batch(uint64_t n)
{
    double rate[ENGINES];

    printf("batch: 100 puts a commit, durable, %llu of them\n",
           (unsigned long long)n * 4);
    bench_puts(n * 4, 100, rate);
    judge_puts(rate, "lmdb sqlite");
}

/* ---- 64 outstanding puts ---- */

/* Clients of one loop, each with one put at a time: the next one when the last
 * is on disk. */
struct client {
    struct cube_commit_wait wait;
};

static struct cube_commit *group;
static uint64_t group_next, group_done, group_end;

static void client_put(struct client *c);

static void client_told(void *arg, const struct cube_err *err)
{
    if (err)
        die(err->text);
    group_done++;
    client_put(arg);
}

static void client_put(struct client *c)
{
    unsigned char key[KEY];

    if (group_next == group_end)
        return;
    key_of(group_next++, key);
    our_put(key);
    cube_commit_wait(group, &c->wait, client_told, c);
}

static void group_puts(struct cube_loop *l, uint64_t n)
{
    static struct client clients[64];

    group_end = group_next + n;
    for (int i = 0; i < 64; i++)
        client_put(&clients[i]);
    cube_loop_wake(l); /* a turn waits first, and commits at its end */
    while (group_done < group_end) {
        if (cube_loop_turn(l, -1, &our_error) < 0)
            die(our_error.text);
    }
}

static void bench_group(uint64_t n)
{
    struct cube_loop *l = cube_loop_new(cube_world_real(), &our_error);
    struct cube_store_options o = {.cache_bytes = 64 << 20,
                                   .is_sync_split = true};
    double one[ROUNDS], many[ROUNDS];
    uint64_t single = n / 50 + 1;

    printf("group: 64 outstanding puts on one loop, durable\n");
    wipe("cube");
    our = cube_store_open(NULL, path_of("cube"), &o, &our_error);
    if (!our || !l)
        die(our_error.text);
    our_is_durable = true;
    group = cube_commit_open(l, our);
    for (int r = 0; r < ROUNDS; r++) {
        double start = now();

        for (uint64_t i = 0; i < single; i++) {
            unsigned char key[KEY];

            key_of(group_next++, key);
            our_put(key);
            our_commit();
        }
        group_done = group_next;
        one[r] = (now() - start) / (double)single;
        start = now();
        group_puts(l, n / 3);
        many[r] = (now() - start) / (double)(n / 3);
    }
    cube_commit_close(group);
    cube_loop_free(l);
    our_close();
    wipe("cube");
    note("one      %9.0f puts a second", 1 / median(one, ROUNDS));
    note("64       %9.0f puts a second", 1 / median(many, ROUNDS));
    judge("of one put a commit", median(one, ROUNDS) / median(many, ROUNDS),
          true, 15);
}

/* ---- Reading ---- */

static uint64_t rnd = 1;

/* Both in seconds of the processor: all that is read is in memory. */
static double time_gets(const struct engine *e, uint64_t n, uint64_t of)
{
    double start = cpu();

    for (uint64_t i = 0; i < n; i++) {
        unsigned char key[KEY];

        rnd = rnd * 6364136223846793005u + 1442695040888963407u;
        key_of((rnd >> 24) % of, key);
        if (!e->get(key))
            die("a key is missing");
    }
    return (cpu() - start) / (double)n;
}

static double time_scan(const struct engine *e, uint64_t of)
{
    double start = cpu();

    if (e->scan() != of)
        die("the scan saw another number of records");
    return (cpu() - start) / (double)of;
}

static unsigned char (*sorted)[KEY];

static int key_cmp(const void *a, const void *b)
{
    return memcmp(a, b, KEY);
}

/* SQLite is loaded in the order of its keys: at random a million records take
 * it minutes. Its tree is the better for it. */
static void load(const struct engine *e, uint64_t n, size_t cache)
{
    double start;
    bool is_in_order = strcmp(e->name, "sqlite") == 0;

    wipe(e->name);
    if (is_in_order) {
        sorted = malloc(n * KEY);
        for (uint64_t i = 0; i < n; i++)
            key_of(i, sorted[i]);
        qsort(sorted, n, KEY, key_cmp);
    }
    e->open(cache, false);
    start = now();
    for (uint64_t i = 0; i < n; i++) {
        unsigned char key[KEY];

        key_of(i, key);
        e->put(is_in_order ? sorted[i] : key);
        if (i % 100 == 99)
            e->commit();
    }
    e->commit();
    note("%-8s loaded in %.1f s%s, file %.0f MB", e->name, now() - start,
         is_in_order ? " (in order)" : "", file_bytes(e->name) / 1e6);
    free(sorted);
    sorted = NULL;
}

/* What a store that crashes leaves at worst: both overlays nearly full, and a
 * commit that was not synced. */
static void crash(size_t cache)
{
    struct cube_store_stats s;
    pid_t pid = fork();
    int status;

    if (pid == 0) {
        our_open(cache, false);
        for (uint64_t i = 0; i < 200000; i++) {
            unsigned char key[KEY];

            key_of(i, key);
            our_put(key);
            if (i % 20 != 19)
                continue;
            cube_store_stats(our, &s);
            if (s.overlay_bytes > our->mem_max * 15 / 10)
                break;
            our_commit();
        }
        (void)fdatasync(cube_store_fd(our));
        our_commit();
        _exit(0);
    }
    if (waitpid(pid, &status, 0) != pid || status != 0)
        die("the child that was to crash failed otherwise");
}

/* The median of openings, each by a process of its own; after a crash each of
 * them crashes again. */
static double time_open(size_t cache, bool is_crash)
{
    struct span took[9];

    for (int i = 0; i < 9; i++) {
        int p[2];

        if (is_crash)
            crash(cache);
        if (pipe(p) < 0)
            die("pipe");
        if (fork() == 0) {
            struct span s = span_begin();

            our_open(cache, false);
            s = span_end(s);
            if (write(p[1], &s, sizeof s) < 0)
                _exit(1);
            our_close();
            _exit(0);
        }
        if (read(p[0], &took[i], sizeof took[i]) != sizeof took[i])
            die("the child did not open the store");
        close(p[0]);
        close(p[1]);
        while (wait(NULL) > 0) {}
    }
    qsort(took, 9, sizeof took[0], span_order);
    note("%.2f ms, %.2f of the processor", took[4].wall, took[4].cpu);
    return took[4].wall;
}

static void bench_open(uint64_t n)
{
    printf("open: with %llu records, milliseconds\n", (unsigned long long)n);
    (void)malloc_trim(0); /* what a child inherits costs it copies of pages */
    judge("after it was closed", time_open(0, false), false, 10);
    judge("after a crash, worst tail, default cache", time_open(0, true),
          false, 10);
    judge("after a crash, worst tail, largest overlay",
          time_open((size_t)1 << 30, true), false, 10);
}

enum { DO_GET = 1, DO_SCAN = 2 };

/* Gets and scans of all engines in turns; figures go to t[engine][0 or 1]. */
static void turns(const struct engine *const *who, size_t count, uint64_t n,
                  int what, double t[][2])
{
    double got[4][ROUNDS], scanned[4][ROUNDS];

    for (size_t e = 0; e < count; e++) {
        (void)who[e]->scan(); /* whatever caches there are know all now */
        (void)time_gets(who[e], n < 100000 ? n : 100000, n);
    }
    for (int r = 0; r < ROUNDS; r++) {
        for (size_t e = 0; e < count; e++) {
            if (what & DO_GET)
                got[e][r] = time_gets(who[e], 30000, n);
            if (what & DO_SCAN)
                scanned[e][r] = time_scan(who[e], n);
        }
    }
    for (size_t e = 0; e < count; e++) {
        t[e][0] = what & DO_GET ? median(got[e], ROUNDS) : 1;
        t[e][1] = what & DO_SCAN ? median(scanned[e], ROUNDS) : 1;
    }
}

static void bench_read(uint64_t n, int what, bool is_open)
{
    size_t data = (size_t)n * (KEY + VAL), count = 0;
    const struct engine *who[4], *cube = engine_of("cube");
    double t[4][2], tenth[1][2], start;

    printf("read: %llu records\n", (unsigned long long)n);
    for (size_t e = 1; e < ENGINES; e++) {
        if (!engines[e].get)
            continue;
        load(&engines[e], n, data * 2);
        if (&engines[e] != cube)
            engines[e].close();
        who[count++] = &engines[e];
    }
    start = now();
    if (cube_store_compact(our, &our_error) < 0)
        die(our_error.text);
    note("cube     compacted in %.1f s", now() - start);
    our_close();
    for (size_t e = 0; e < count; e++)
        who[e]->open(data * 2, false);
    turns(who, count, n, what, t);
    our_close();
    our_open(data / 10, false);
    turns(who, 1, n, what, tenth);
    for (size_t e = 0; e < count; e++) {
        char words[100];

        who[e]->close();
        if (what & DO_GET)
            note("%-8s %9.0f gets a second", who[e]->name, 1 / t[e][0]);
        if (what & DO_SCAN)
            note("%-8s %9.0f records a second scanned", who[e]->name,
                 1 / t[e][1]);
        snprintf(words, sizeof words, "random get, of %s", who[e]->name);
        if (e > 0 && what & DO_GET)
            judge(words, t[0][0] / t[e][0] > 0 ? t[e][0] / t[0][0] : 0, true,
                  strcmp(who[e]->name, "lmdb") == 0 ? 0.8 : 5);
        if (strcmp(who[e]->name, "lmdb") == 0 && what & DO_SCAN)
            judge("full scan, of lmdb", t[e][1] / t[0][1], true, 0.8);
    }
    if (what & DO_GET)
        note("cube     %9.0f gets a second with a cache of a tenth",
             1 / tenth[0][0]);
    if (what & DO_SCAN)
        note("cube     %9.0f records a second scanned with that",
             1 / tenth[0][1]);
    if (is_open)
        bench_open(n);
    for (size_t e = 0; e < count; e++)
        wipe(who[e]->name);
}

/* ---- What is bounded ---- */

static void bench_file(void)
{
    size_t data = 100000 * (KEY + VAL);

    printf("file: 100000 records in random order, then compaction\n");
    load(engine_of("cube"), 100000, 0);
    if (cube_store_compact(our, &our_error) < 0)
        die(our_error.text);
    our_close();
    judge("times the bytes of keys and values",
          file_bytes("cube") / (double)data, false, 1.25);
    wipe("cube");
}

/* The most that the store ever has on the heap beyond its cache, while records
 * are loaded, read, scanned, overwritten and compacted. */
static void bench_memory(void)
{
    static const size_t caches[] = {8 << 20, 64 << 20};

    for (size_t i = 0; i < 2; i++) {
        size_t cache = caches[i];

        printf("memory: beyond a cache of %zu MiB, in MiB\n", cache >> 20);
        cube_buf_free(&our_value);
        heap_peak = heap;
        load(engine_of("cube"), 200000, cache);
        (void)time_gets(engine_of("cube"), 200000, 200000);
        (void)time_scan(engine_of("cube"), 200000);
        for (uint64_t n = 0; n < 100000; n++) {
            unsigned char key[KEY];

            key_of(n, key);
            our_put(key);
            if (n % 64 == 63)
                our_commit();
        }
        our_commit();
        if (cube_store_compact(our, &our_error) < 0)
            die(our_error.text);
        our_close();
        judge("at the peak", ((double)heap_peak - (double)cache) / (1 << 20),
              false, 1);
        wipe("cube");
    }
}

static void judge_spans(const char *what, struct span *v, size_t n)
{
    double most_cpu = 0;
    char words[100];

    for (size_t i = 0; i < n; i++)
        most_cpu = v[i].cpu > most_cpu ? v[i].cpu : most_cpu;
    qsort(v, n, sizeof *v, span_order);
    note("%-8s %zu calls: median %.3f ms, of a thousand %.3f ms, longest "
         "%.3f ms", what, n, v[n / 2].wall, v[n - 1 - n / 1000].wall,
         v[n - 1].wall);
    snprintf(words, sizeof words, "longest %s, ms of the processor", what);
    judge(words, most_cpu, false, 5);
}

/* What a turn of a loop has to wait for the store, over a load of overwrites
 * with compactions in it, as the loop's commit point does it: a slice when
 * nothing is in flight, the syncs elsewhere. */
static void bench_slice(uint64_t n)
{
    struct cube_store_options o = {.cache_bytes = 64 << 20,
                                   .is_sync_split = true};
    size_t turns_max = 60000, slices = 0, commits = 0;
    struct span *slice = malloc(turns_max * sizeof *slice);
    struct span *commit = malloc(turns_max * sizeof *commit);
    struct cube_store_stats s = {0};

    printf("slice: %llu records, 20 overwritten a turn, milliseconds\n",
           (unsigned long long)n);
    load(engine_of("cube"), n, 64 << 20);
    our_close();
    our = cube_store_open(NULL, path_of("cube"), &o, &our_error);
    if (!our)
        die(our_error.text);
    while (commits < turns_max && (s.compactions < 2 || commits < 2000)) {
        int fd;

        for (int i = 0; i < 20; i++) {
            unsigned char key[KEY];

            rnd = rnd * 6364136223846793005u + 1442695040888963407u;
            key_of((rnd >> 24) % n, key);
            our_put(key);
        }
        commit[commits] = span_begin();
        if (cube_store_commit_begin(our, &our_error) < 0)
            die(our_error.text);
        commit[commits] = span_end(commit[commits]);
        commits++;
        if (commits % 8 == 0) /* what is measured is not the disk */
            (void)fdatasync(cube_store_fd(our));
        if (cube_store_commit_end(our, 0, &our_error) < 0)
            die(our_error.text);
        slice[slices] = span_begin();
        (void)cube_store_slice(our, CUBE_SLICE_MS);
        slice[slices] = span_end(slice[slices]);
        slices++;
        fd = cube_store_slice_fd(our);
        if (fd >= 0)
            cube_store_slice_synced(our, cube_world_real()->sync(NULL, fd));
        cube_store_stats(our, &s);
    }
    note("%llu checkpoints, %llu compactions",
         (unsigned long long)s.checkpoints,
         (unsigned long long)s.compactions);
    judge_spans("slice", slice, slices);
    judge_spans("commit", commit, commits);
    our_close();
    wipe("cube");
    free(slice);
    free(commit);
}

/* ---- The rows ---- */

static uint64_t number(const char *name, uint64_t otherwise)
{
    const char *text = getenv(name);

    return text ? strtoull(text, NULL, 10) : otherwise;
}

static const char *const rows[] = {"put", "group", "batch", "get", "scan",
                                   "open", "file", "memory", "slice"};

#define ROWS (sizeof rows / sizeof rows[0])

int main(int argc, char **argv)
{
    uint64_t puts = number("BENCH_PUTS", 50000);
    uint64_t big = number("BENCH_BIG", 1000000);
    bool is_on[ROWS];
    int what;

    for (size_t i = 0; i < ROWS; i++) {
        is_on[i] = argc < 2;
        for (int a = 1; a < argc; a++)
            is_on[i] = is_on[i] || strcmp(argv[a], rows[i]) == 0;
    }
    for (int a = 1; a < argc; a++) {
        bool is_known = false;

        for (size_t i = 0; i < ROWS; i++)
            is_known = is_known || strcmp(argv[a], rows[i]) == 0;
        if (!is_known) {
            fprintf(stderr, "usage: bench_store [ROW...], of: put group batch "
                    "get scan open file memory slice\n");
            return 2;
        }
    }
    dir = getenv("BENCH_DIR") ? getenv("BENCH_DIR") : "build/bench";
    for (int i = 0; i < VAL; i++)
        val[i] = (unsigned char)(i * 7 + 1);
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (is_on[0])
        bench_put(puts);
    if (is_on[1])
        bench_group(puts);
    if (is_on[2])
        bench_batch(puts);
    what = (is_on[3] ? DO_GET : 0) | (is_on[4] ? DO_SCAN : 0);
    if (what)
        bench_read(big / 10, what, false);
    if (what)
        bench_read(big, what, is_on[5]);
    else if (is_on[5]) {
        load(engine_of("cube"), big, (size_t)big * 2 * (KEY + VAL));
        our_close();
        bench_open(big);
        wipe("cube");
    }
    if (is_on[6])
        bench_file();
    if (is_on[7])
        bench_memory();
    if (is_on[8])
        bench_slice(big / 5);
    printf("%d bars missed\n", missed);
    return 0;
}
