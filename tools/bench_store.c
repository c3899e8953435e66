/*
 * How fast the store is, beside its limit (a bare append of the same bytes
 * with fdatasync) and its peers (LMDB, SQLite, LevelDB, where tools/bench_store
 * finds them), all on the same disk in one run: keys of 16 random bytes,
 * values of 500 bytes.
 *
 *     tools/bench_store [DIR [N [BIG]]]
 *
 * N durable puts (default 50000), BIG records for the reading part (default
 * 1000000). The durable parts of all are run in turns, since a disk is not
 * equally fast from one minute to the next.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "../cube.h"
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
    static char path[4][700];
    static int turn;

    turn = (turn + 1) % 4;
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

static long rss_kb(void)
{
    char line[200];
    long kb = 0;
    FILE *f = fopen("/proc/self/status", "r");

    while (f && fgets(line, sizeof line, f)) {
        if (sscanf(line, "VmRSS: %ld", &kb) == 1)
            break;
    }
    if (f)
        fclose(f);
    return kb;
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

static struct cube_store *cube;
static struct cube_err cube_error;
static struct cube_buf cube_value;

static void cube_open(size_t cache_bytes, bool is_durable)
{
    struct cube_store_options o = {.cache_bytes = cache_bytes};

    (void)is_durable;
    cube = cube_store_open(NULL, path_of("cube"), &o, &cube_error);
    if (!cube)
        die(cube_error.text);
}

static void cube_put(const unsigned char *key)
{
    if (cube_store_put(cube, "t", key, KEY, val, VAL, &cube_error) < 0)
        die(cube_error.text);
}

static void cube_commit(void)
{
    if (cube_store_commit(cube, &cube_error) < 0)
        die(cube_error.text);
}

static bool cube_get(const unsigned char *key)
{
    return cube_store_get(cube, "t", key, KEY, &cube_value, &cube_error) == 1;
}

static uint64_t cube_scan(void)
{
    struct cube_cursor *c = cube_cursor_open(cube, "t", NULL);
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

static void cube_close(void)
{
    cube_store_close(cube);
    cube_buf_free(&cube_value);
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
static leveldb_readoptions_t *lv_r;
static leveldb_writebatch_t *lv_b;
static leveldb_cache_t *lv_c;

static void lv_open(size_t cache_bytes, bool is_durable)
{
    char *e = NULL;

    lv_o = leveldb_options_create();
    lv_w = leveldb_writeoptions_create();
    lv_r = leveldb_readoptions_create();
    lv_b = leveldb_writebatch_create();
    lv_c = leveldb_cache_create_lru(cache_bytes ? cache_bytes : 8 << 20);
    leveldb_options_set_create_if_missing(lv_o, 1);
    leveldb_options_set_cache(lv_o, lv_c);
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

static bool lv_get(const unsigned char *key)
{
    char *e = NULL;
    size_t len;
    char *v = leveldb_get(lv, lv_r, (const char *)key, KEY, &len, &e);

    leveldb_free(v);
    return v != NULL;
}

static uint64_t lv_scan(void)
{
    leveldb_iterator_t *i = leveldb_create_iterator(lv, lv_r);
    uint64_t n = 0;
    size_t len;

    for (leveldb_iter_seek_to_first(i); leveldb_iter_valid(i);
         leveldb_iter_next(i))
        n += *(const unsigned char *)leveldb_iter_value(i, &len) == val[0];
    leveldb_iter_destroy(i);
    return n;
}

static void lv_close(void)
{
    leveldb_close(lv);
    leveldb_cache_destroy(lv_c);
    leveldb_writebatch_destroy(lv_b);
    leveldb_options_destroy(lv_o);
    leveldb_writeoptions_destroy(lv_w);
    leveldb_readoptions_destroy(lv_r);
}
#endif

static const struct engine engines[] = {
    {"bare", bare_open, bare_put, bare_commit, NULL, NULL, bare_close},
    {"cube", cube_open, cube_put, cube_commit, cube_get, cube_scan,
     cube_close},
#ifdef WITH_LMDB
    {"lmdb", lm_open, lm_put, lm_commit, lm_get, lm_scan, lm_close},
#endif
#ifdef WITH_LEVELDB
    {"leveldb", lv_open, lv_put, lv_commit, lv_get, lv_scan, lv_close},
#endif
#ifdef WITH_SQLITE
    {"sqlite", sq_open, sq_put, sq_commit, sq_get, sq_scan, sq_close},
#endif
};

#define ENGINES (sizeof engines / sizeof engines[0])

/* ---- What is measured ---- */

/* n durable puts, batch of them a commit, all engines in turns. */
static void bench_puts(uint64_t n, uint64_t batch, const char *what)
{
    double took[ENGINES] = {0};
    uint64_t rounds = 10, each = n / rounds / batch * batch;

    for (size_t e = 0; e < ENGINES; e++) {
        wipe(engines[e].name);
        engines[e].open(64 << 20, true);
    }
    for (uint64_t r = 0; r < rounds; r++) {
        for (size_t e = 0; e < ENGINES; e++) {
            double start = now();

            for (uint64_t i = 0; i < each; i++) {
                unsigned char key[KEY];

                key_of(r * each + i, key);
                engines[e].put(key);
                if (i % batch == batch - 1)
                    engines[e].commit();
            }
            took[e] += now() - start;
        }
    }
    printf("%s, puts a second:\n", what);
    for (size_t e = 0; e < ENGINES; e++) {
        engines[e].close();
        printf("    %-10s %10.0f   %.2f of bare\n", engines[e].name,
               (double)(each * rounds) / took[e], took[0] / took[e]);
    }
}

static void load(const struct engine *e, uint64_t n, size_t cache)
{
    double start = now();

    wipe(e->name);
    e->open(cache, false);
    for (uint64_t i = 0; i < n; i++) {
        unsigned char key[KEY];

        key_of(i, key);
        e->put(key);
        if (i % 1000 == 999)
            e->commit();
    }
    e->commit();
    printf("    %-10s loaded in %.1f s, file %.0f MB\n", e->name,
           now() - start, file_bytes(e->name) / 1e6);
}

static void read_all(const struct engine *e, uint64_t n, const char *cache)
{
    double start, scan;
    uint64_t rnd = 1, count;

    for (int warm = 0; warm < 1; warm++)
        (void)e->scan();
    start = now();
    count = e->scan();
    scan = now() - start;
    if (count != n)
        die("the scan saw another number of records");
    for (int round = 0; round < 2; round++) {
        start = now();
        for (uint64_t i = 0; i < n; i++) {
            unsigned char key[KEY];

            rnd = rnd * 6364136223846793005u + 1442695040888963407u;
            key_of((rnd >> 24) % n, key);
            if (!e->get(key))
                die("a key is missing");
        }
    }
    printf("    %-10s %s: scan %9.0f/s, random get %9.0f/s, memory %ld MB\n",
           e->name, cache, (double)n / scan, (double)n / (now() - start),
           rss_kb() / 1024);
}

static void bench_reads(uint64_t n)
{
    size_t data = (size_t)n * (KEY + VAL);

    printf("%llu records:\n", (unsigned long long)n);
    for (size_t e = 1; e < ENGINES; e++) {
        const struct engine *g = &engines[e];
        double start;

        load(g, n, data * 2);
        if (g->open == cube_open) {
            start = now();
            g->close();
            printf("    cube       closed in %.1f ms\n",
                   (now() - start) * 1e3);
            start = now();
            g->open(data * 2, false);
            printf("    cube       opened in %.2f ms\n",
                   (now() - start) * 1e3);
            read_all(g, n, "as loaded      ");
            start = now();
            if (cube_store_compact(cube, &cube_error) < 0)
                die(cube_error.text);
            printf("    cube       compacted in %.1f s: file %.3f of the "
                   "bytes of keys and values\n", now() - start,
                   file_bytes("cube") / (double)data);
        }
        g->close();
        g->open(data * 2, false);
        read_all(g, n, "cache for all  ");
        g->close();
        g->open(data / 10, false);
        read_all(g, n, "cache for tenth");
        g->close();
        wipe(g->name);
    }
}

int main(int argc, char **argv)
{
    uint64_t n = argc > 2 ? strtoull(argv[2], NULL, 10) : 50000;
    uint64_t big = argc > 3 ? strtoull(argv[3], NULL, 10) : 1000000;

    dir = argc > 1 ? argv[1] : ".";
    for (int i = 0; i < VAL; i++)
        val[i] = (unsigned char)(i * 7 + 1);
    setvbuf(stdout, NULL, _IOLBF, 0);
    bench_puts(n, 1, "one put a commit");
    bench_puts(n * 4, 64, "64 puts a commit (as group commit makes of 64 "
               "clients)");
    bench_puts(n * 4, 100, "100 puts a commit");
    for (size_t e = 0; e < ENGINES; e++)
        wipe(engines[e].name);
    bench_reads(big / 10);
    bench_reads(big);
    return 0;
}
