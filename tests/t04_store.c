/*
 * Chapter 4, the store: a model first (random transactions against a plain
 * array), then what a crash, a damaged file and a failing disk may do to it.
 */
#include "test.h"

#include <sys/wait.h>

/* ---- A disk that forgets, in memory ----
 *
 * Files of a world of this test. What is written and not synced is kept
 * apart by sectors, so that a crash can leave any part of it; what is renamed
 * lasts only once the directory is synced. Each call can be made to fail. */

#define SECTOR 512
#define DISK_FILES 8

struct inode {
    struct cube_buf now;     /* what a reader sees */
    struct cube_buf safe;    /* what surely survives */
};

struct disk {
    struct cube_world world;
    struct inode inodes[64];
    int inode_count;
    struct { char name[600]; int inode; } names[DISK_FILES], safe[DISK_FILES];
    int name_count, safe_count;
    int fds[64]; /* inode of each descriptor + 1 */
    bool is_locked;
    /* Faults: call number fail_at, and all after it if is_fail_forever. */
    int calls, fail_at, fail_errno;
    bool is_fail_forever, is_short;
    int64_t clock_ms;
    bool is_forgetful; /* false: syncs do nothing, for long tests */
    void (*before)(struct disk *d); /* each change of the disk */
};

static int disk_fault(struct disk *d)
{
    d->calls++;
    if (d->fail_at > 0 && (d->calls == d->fail_at ||
                           (d->is_fail_forever && d->calls > d->fail_at)))
        return -d->fail_errno;
    return 0;
}

static int disk_find(struct disk *d, const char *name)
{
    for (int i = 0; i < d->name_count; i++) {
        if (strcmp(d->names[i].name, name) == 0)
            return i;
    }
    return -1;
}

/* One that no name and no descriptor leads to any more, or a new one. */
static int disk_new_inode(struct disk *d)
{
    for (int n = 0; n < 64; n++) {
        bool is_used = false;

        for (int i = 0; i < DISK_FILES; i++)
            is_used |= (i < d->name_count && d->names[i].inode == n) ||
                       (i < d->safe_count && d->safe[i].inode == n);
        for (int i = 0; i < 64; i++)
            is_used |= d->fds[i] == n + 1;
        if (is_used)
            continue;
        cube_buf_free(&d->inodes[n].now);
        cube_buf_free(&d->inodes[n].safe);
        if (d->inode_count <= n)
            d->inode_count = n + 1;
        return n;
    }
    FAIL("too many files for this disk");
    return 0;
}

static int disk_open(void *ctx, const char *path, unsigned flags)
{
    struct disk *d = ctx;
    int i = disk_find(d, path), r = disk_fault(d), fd = 3;

    if (r < 0)
        return r;
    if (i < 0 && !(flags & CUBE_OPEN_CREATE))
        return -ENOENT;
    if (i < 0 || flags & CUBE_OPEN_TRUNC) {
        if (i < 0)
            i = d->name_count++;
        d->names[i].inode = -1;
        snprintf(d->names[i].name, sizeof d->names[i].name, "%s", path);
        d->names[i].inode = disk_new_inode(d);
    }
    while (d->fds[fd])
        fd++;
    d->fds[fd] = d->names[i].inode + 1;
    return fd;
}

static int disk_close(void *ctx, int fd)
{
    ((struct disk *)ctx)->fds[fd] = 0;
    return 0;
}

static struct inode *disk_inode(struct disk *d, int fd)
{
    return &d->inodes[d->fds[fd] - 1];
}

static int64_t disk_pread(void *ctx, int fd, void *buf, size_t len, int64_t at)
{
    struct inode *n = disk_inode(ctx, fd);
    int r = disk_fault(ctx);

    if (r < 0)
        return r;
    if ((size_t)at >= n->now.len)
        return 0;
    if (len > n->now.len - (size_t)at)
        len = n->now.len - (size_t)at;
    memcpy(buf, n->now.data + at, len);
    return (int64_t)len;
}

static void buf_put(struct cube_buf *b, const void *p, size_t len, size_t at)
{
    static const char zeros[4096];

    while (b->len < at + len) {
        size_t more = at + len - b->len;

        cube_buf_add(b, zeros, more < sizeof zeros ? more : sizeof zeros);
    }
    memcpy(b->data + at, p, len);
}

static int64_t disk_pwrite(void *ctx, int fd, const void *buf, size_t len,
                           int64_t at)
{
    struct disk *d = ctx;
    int r = disk_fault(d);

    if (r < 0)
        return r;
    if (d->before)
        d->before(d);
    if (d->is_short && len > 7)
        len = len / 2;
    buf_put(&disk_inode(d, fd)->now, buf, len, (size_t)at);
    return (int64_t)len;
}

static int64_t disk_size(void *ctx, int fd)
{
    return (int64_t)disk_inode(ctx, fd)->now.len;
}

static int disk_sync(void *ctx, int fd)
{
    struct disk *d = ctx;
    struct inode *n = disk_inode(d, fd);
    int r = disk_fault(d);

    if (r < 0)
        return r;
    if (d->before)
        d->before(d);
    if (!d->is_forgetful)
        return 0;
    cube_buf_clear(&n->safe);
    cube_buf_add(&n->safe, n->now.data, n->now.len);
    return 0;
}

static int disk_sync_dir(void *ctx, const char *path)
{
    struct disk *d = ctx;
    int r = disk_fault(d);

    (void)path;
    if (r < 0)
        return r;
    if (d->before)
        d->before(d);
    memcpy(d->safe, d->names, sizeof d->safe);
    d->safe_count = d->name_count;
    return 0;
}

static int disk_lock(void *ctx, int fd)
{
    (void)ctx;
    (void)fd;
    return 0;
}

static int disk_unlink(void *ctx, const char *path)
{
    struct disk *d = ctx;
    int i = disk_find(d, path);

    if (i < 0)
        return -ENOENT;
    d->names[i] = d->names[--d->name_count];
    return 0;
}

static int disk_rename(void *ctx, const char *from, const char *to)
{
    struct disk *d = ctx;
    int r = disk_fault(d), i = disk_find(d, from), inode;

    if (r < 0)
        return r;
    if (d->before)
        d->before(d);
    inode = d->names[i].inode;
    d->names[i] = d->names[--d->name_count];
    i = disk_find(d, to);
    if (i < 0)
        i = d->name_count++;
    snprintf(d->names[i].name, sizeof d->names[i].name, "%s", to);
    d->names[i].inode = inode;
    return 0;
}

static int disk_random(void *ctx, void *buf, size_t len)
{
    (void)ctx;
    for (size_t i = 0; i < len; i++)
        ((uint8_t *)buf)[i] = (uint8_t)test_random();
    return 0;
}

static int64_t disk_now_ms(void *ctx)
{
    return ((struct disk *)ctx)->clock_ms++;
}

static void disk_init(struct disk *d)
{
    memset(d, 0, sizeof *d);
    d->is_forgetful = true;
    d->world = *cube_world_real();
    d->world.ctx = d;
    d->world.open = disk_open;
    d->world.close = disk_close;
    d->world.pread = disk_pread;
    d->world.pwrite = disk_pwrite;
    d->world.size = disk_size;
    d->world.sync = disk_sync;
    d->world.sync_dir = disk_sync_dir;
    d->world.lock = disk_lock;
    d->world.unlink = disk_unlink;
    d->world.rename = disk_rename;
    d->world.random = disk_random;
    d->world.now_ms = disk_now_ms;
}

static void disk_free(struct disk *d)
{
    for (int i = 0; i < 64; i++) {
        cube_buf_free(&d->inodes[i].now);
        cube_buf_free(&d->inodes[i].safe);
    }
}

/* ---- A model: the state that a store should have ---- */

#define TREES 3
#define KEYS 400 /* of a tree */

static const char *const tree_names[TREES] = {"tasks", "events", "meta"};

/* Values are made of a number, so that the model keeps only that; 0: none. */
struct model {
    uint32_t v[TREES][KEYS];
};

/* The keys, of several shapes, in order: key k is the k-th. */
static char keys[KEYS][24];

static int key_order(const void *a, const void *b)
{
    return strcmp(a, b);
}

static const char *key_of(unsigned k)
{
    static const char *const shapes[] = {"%u", "key-%05u", "a/%u/b", "%08x-%%"};

    if (!keys[0][0]) {
        for (unsigned i = 0; i < KEYS; i++)
            snprintf(keys[i], sizeof keys[i], shapes[i % COUNT(shapes)],
                     i * 7919u % 100003u);
        qsort(keys, KEYS, sizeof keys[0], key_order);
    }
    return keys[k];
}

/* Sizes that fall to all sides of what is inline, small, and a page. */
static size_t value_size(uint32_t v)
{
    static const size_t sizes[] = {0, 1, 20, 64, 65, 300, 500, 1024, 1025,
                                   5000};

    return v % 50 == 0 ? 40000 : sizes[v % COUNT(sizes)];
}

static void make_value(uint32_t v, struct cube_buf *out)
{
    size_t n = value_size(v);
    uint32_t x = v * 2654435761u;

    cube_buf_clear(out);
    cube_buf_reserve(out, n);
    for (size_t i = 0; i < n; i++) {
        x = x * 1664525u + 1013904223u;
        cube_buf_addc(out, (char)(x >> 24));
    }
}

static bool is_value(const void *p, size_t len, uint32_t v)
{
    struct cube_buf want = {0};
    bool same;

    make_value(v, &want);
    same = len == want.len && (len == 0 || memcmp(p, want.data, len) == 0);
    cube_buf_free(&want);
    return same;
}

static bool cursor_is(struct cube_cursor *c, unsigned k, uint32_t v)
{
    struct cube_err err;
    size_t len, val_len;
    const void *val, *key = cube_cursor_key(c, &len);

    if (len != strlen(key_of(k)) || memcmp(key, key_of(k), len) != 0)
        return false;
    return cube_cursor_value(c, &val, &val_len, &err) == 0 &&
           is_value(val, val_len, v);
}

/* Does a cursor see what the array has, forwards and backwards? */
static bool cursor_sees(struct cube_cursor *c, const uint32_t v[KEYS])
{
    struct cube_err err;
    int r = cube_cursor_first(c, &err);

    for (unsigned k = 0; k < KEYS; k++) {
        if (v[k] == 0)
            continue;
        if (r <= 0 || !cursor_is(c, k, v[k]))
            return false;
        r = cube_cursor_next(c, &err);
    }
    if (r != 0)
        return false;
    r = cube_cursor_last(c, &err);
    for (unsigned k = KEYS; k-- > 0;) {
        if (v[k] == 0)
            continue;
        if (r <= 0 || !cursor_is(c, k, v[k]))
            return false;
        r = cube_cursor_prev(c, &err);
    }
    return r == 0;
}

/* Is the committed state of the store the model's? */
static bool store_is(struct cube_store *s, const struct model *m)
{
    bool same = true;

    for (int t = 0; t < TREES && same; t++) {
        struct cube_cursor *c = cube_cursor_open(s, tree_names[t], NULL);

        same = cursor_sees(c, m->v[t]);
        cube_cursor_close(c);
    }
    return same;
}

static uint32_t next_v = 1;

/* Stages one random change in both. */
static void change(struct cube_store *s, struct model *m)
{
    int t = (int)test_below(TREES);
    unsigned k = (unsigned)test_below(KEYS);
    const char *key = key_of(k);
    size_t len = strlen(key);
    struct cube_buf val = {0};
    struct cube_err err;

    if (test_below(3) == 0) {
        CHECK_INT(cube_store_del(s, tree_names[t], key, len, &err), 0);
        m->v[t][k] = 0;
    } else {
        m->v[t][k] = next_v++;
        make_value(m->v[t][k], &val);
        CHECK_INT(cube_store_put(s, tree_names[t], key, len, val.data, val.len,
                                 &err), 0);
    }
    cube_buf_free(&val);
}

static bool get_is(struct cube_store *s, int t, unsigned k, uint32_t v)
{
    struct cube_buf val = {0};
    const char *key = key_of(k);
    int r = cube_store_get(s, tree_names[t], key, strlen(key), &val, NULL);
    bool same = r == (v != 0) && (v == 0 || is_value(val.data, val.len, v));

    cube_buf_free(&val);
    return same;
}

static struct cube_store *must_open(const struct cube_world *w,
                                    const char *path)
{
    struct cube_store_options o = {.cache_bytes = 1}; /* the least */
    struct cube_err err = {0};
    struct cube_store *s = cube_store_open(w, path, &o, &err);

    if (!s)
        FAIL("%s", err.text);
    return s;
}

static const char *test_path(void)
{
    static char path[600];

    snprintf(path, sizeof path, "%s/t.cube", test_dir());
    return path;
}

/* Random transactions with everything else among them. */
static void run_model(const char *path, int rounds)
{
    static struct model committed, staged;
    struct cube_store *s = must_open(NULL, path);
    struct cube_store_stats stats;
    struct cube_err err = {0};
    uint64_t compactions = 0, checkpoints = 0;

    REQUIRE(s);
    memset(&committed, 0, sizeof committed);
    for (int i = 0; i < rounds; i++) {
        test_row("round %d", i);
        staged = committed;
        for (int n = (int)test_below(12); n >= 0; n--)
            change(s, &staged);
        for (int n = 0; n < 5; n++) {
            int t = (int)test_below(TREES);
            unsigned k = (unsigned)test_below(KEYS);

            CHECK(get_is(s, t, k, staged.v[t][k]));
        }
        if (test_below(10) == 0) {
            cube_store_rollback(s);
        } else {
            CHECK_INT(cube_store_commit(s, &err), 0);
            committed = staged;
        }
        if (test_below(2) == 0)
            (void)cube_store_slice(s, 0);
        if (test_below(300) == 0)
            CHECK_INT(cube_store_compact(s, &err), 0);
        if (path && test_below(100) == 0) {
            cube_store_stats(s, &stats);
            compactions += stats.compactions;
            checkpoints += stats.checkpoints;
            cube_store_close(s);
            s = must_open(NULL, path);
            REQUIRE(s);
        }
        if (i % 16 == 0)
            CHECK(store_is(s, &committed));
        if (i % 16 == 0 && cube_store_check(s, &err) < 0)
            FAIL("check: %s", err.text);
    }
    CHECK(store_is(s, &committed));
    cube_store_stats(s, &stats);
    CHECK(compactions + stats.compactions > 3);
    CHECK(checkpoints + stats.checkpoints > 3);
    cube_store_close(s);
}

TEST(random_transactions_leave_what_a_sorted_array_holds)
{
    run_model(test_path(), 1000);
}

TEST(memory_store_is_the_twin_of_the_file)
{
    run_model(NULL, 1000);
}

/* ---- Snapshots and two commits at once ---- */

static void put(struct cube_store *s, const char *key, const char *val)
{
    struct cube_err err = {0};

    if (cube_store_put(s, "t", key, strlen(key), val, strlen(val), &err) < 0)
        FAIL("%s", err.text);
}

static void commit(struct cube_store *s)
{
    struct cube_err err = {0};

    if (cube_store_commit(s, &err) < 0)
        FAIL("%s", err.text);
}

/* The value as text, "-" if there is none, "!" after an error. */
static const char *get(struct cube_store *s, struct cube_store_snap *snap,
                       const char *key)
{
    static char text[100];
    struct cube_buf val = {0};
    int r = snap ? cube_store_snapshot_get(snap, "t", key, strlen(key), &val,
                                           NULL)
                 : cube_store_get(s, "t", key, strlen(key), &val, NULL);

    snprintf(text, sizeof text, "%s",
             r > 0 ? val.data : r == 0 ? "-" : "!");
    cube_buf_free(&val);
    return text;
}

TEST(snapshot_sees_its_commit_and_nothing_later)
{
    struct cube_store *s = must_open(NULL, test_path());
    struct cube_store_snap *a, *b;
    struct cube_cursor *c;

    put(s, "k", "one");
    commit(s);
    a = cube_store_snapshot(s);
    put(s, "k", "two");
    CHECK_STR(get(s, NULL, "k"), "two"); /* the writer sees what is staged */
    CHECK_STR(get(s, a, "k"), "one");
    commit(s);
    b = cube_store_snapshot(s);
    c = cube_cursor_open_snapshot(a, "t", NULL);
    CHECK_INT(cube_store_del(s, "t", "k", 1, NULL), 0);
    commit(s);
    CHECK_INT(cube_store_compact(s, NULL), 0); /* the file is another now */
    CHECK_STR(get(s, NULL, "k"), "-");
    CHECK_STR(get(s, a, "k"), "one");
    CHECK_STR(get(s, b, "k"), "two");
    cube_store_snapshot_close(a);
    CHECK_INT(cube_cursor_first(c, NULL), 1);
    cube_cursor_close(c);
    cube_store_snapshot_close(b);
    cube_store_close(s);
}

TEST(next_commit_fills_while_one_is_synced)
{
    struct cube_store *s = must_open(NULL, test_path());
    struct cube_store_snap *snap;

    put(s, "a", "1");
    CHECK_INT(cube_store_commit_begin(s, NULL), 1);
    put(s, "b", "2");
    put(s, "a", "3");
    snap = cube_store_snapshot(s);
    CHECK_STR(get(s, snap, "a"), "-"); /* not on disk yet */
    cube_store_snapshot_close(snap);
    CHECK_STR(get(s, NULL, "a"), "3");
    CHECK_INT(cube_store_commit_begin(s, NULL), -1); /* one at a time */
    CHECK_INT(cube_store_commit_end(s, 0, NULL), 0);
    snap = cube_store_snapshot(s);
    CHECK_STR(get(s, snap, "a"), "1");
    CHECK_STR(get(s, snap, "b"), "-");
    cube_store_snapshot_close(snap);
    CHECK_INT(cube_store_commit_begin(s, NULL), 1);
    CHECK_INT(cube_store_commit_end(s, 0, NULL), 0);
    CHECK_INT(cube_store_commit_begin(s, NULL), 0); /* nothing to do */
    snap = cube_store_snapshot(s);
    CHECK_STR(get(s, snap, "a"), "3");
    CHECK_STR(get(s, snap, "b"), "2");
    cube_store_snapshot_close(snap);
    cube_store_close(s);
    s = must_open(NULL, test_path());
    CHECK_STR(get(s, NULL, "a"), "3");
    cube_store_close(s);
}

TEST(what_is_staged_when_the_store_closes_is_gone)
{
    struct cube_store *s = must_open(NULL, test_path());

    put(s, "a", "1");
    commit(s);
    put(s, "a", "2");
    cube_store_close(s);
    s = must_open(NULL, test_path());
    CHECK_STR(get(s, NULL, "a"), "1");
    cube_store_close(s);
}

TEST(cursor_turns_round_and_seeks_anywhere)
{
    struct cube_store *s = must_open(NULL, test_path());
    struct cube_cursor *c;
    struct cube_err err;
    size_t len;
    char key[16];

    for (int i = 0; i < 1000; i++) {
        snprintf(key, sizeof key, "%04d", 2 * i);
        put(s, key, "x");
        if (i == 600) {
            commit(s);
            CHECK_INT(cube_store_compact(s, &err), 0);
        }
    }
    commit(s);
    c = cube_cursor_open(s, "t", &err);
    for (int i = 0; i < 500; i++) {
        int k = (int)test_below(1990);

        test_row("seek %d", k);
        snprintf(key, sizeof key, "%04d", k);
        REQUIRE(cube_cursor_seek(c, key, 4, &err) == 1);
        k = (k + 1) / 2 * 2;
        for (int step = 0; step < 6; step++) {
            snprintf(key, sizeof key, "%04d", k);
            CHECK_MEM(cube_cursor_key(c, &len), key, 4);
            if (k >= 4 && test_below(2) == 0) {
                k -= 2;
                CHECK_INT(cube_cursor_prev(c, &err), 1);
            } else if (k < 1998) {
                k += 2;
                CHECK_INT(cube_cursor_next(c, &err), 1);
            }
        }
    }
    CHECK_INT(cube_cursor_seek(c, "2", 1, &err), 0); /* behind the last */
    CHECK_INT(cube_cursor_next(c, &err), 0);
    CHECK_INT(cube_cursor_last(c, &err), 1);
    CHECK_MEM(cube_cursor_key(c, &len), "1998", 4);
    CHECK_INT(cube_cursor_next(c, &err), 0);
    cube_cursor_close(c);
    c = cube_cursor_open(s, "no such tree", &err);
    CHECK_INT(cube_cursor_first(c, &err), 0);
    cube_cursor_close(c);
    cube_store_close(s);
}

TEST(what_is_beyond_a_limit_is_refused_with_words)
{
    static char big[CUBE_STORE_KEY_MAX + 1];
    struct cube_store *s = must_open(NULL, NULL);
    static const struct {
        const char *tree;
        size_t key_len, val_len;
        int code;
        const char *words;
    } rows[] = {
        {"t", 0, 1, CUBE_EINVAL, "a key has 1 to 1024 bytes, not 0"},
        {"t", sizeof big, 1, CUBE_EINVAL, "not 1025"},
        {"t", 1, CUBE_STORE_VALUE_MAX + 1, CUBE_ETOOBIG, "at most 16777216"},
        {"", 1, 1, CUBE_EINVAL, "a name has"},
        {"a-name-of-thirty-two-bytes-so-no", 1, 1, CUBE_EINVAL, "a name has"},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct cube_err err = {0};

        test_row("row %zu", i);
        CHECK_INT(cube_store_put(s, rows[i].tree, big, rows[i].key_len, big,
                                 rows[i].val_len, &err), -1);
        CHECK_INT(err.code, rows[i].code);
        CHECK_HAS(err.text, rows[i].words);
        CHECK(!cube_store_is_dirty(s));
    }
    CHECK_INT(cube_store_put(s, "t", big, CUBE_STORE_KEY_MAX, big, 0, NULL),
              0);
    cube_store_close(s);
}

TEST(second_opener_is_refused_with_words)
{
    struct cube_store *s = must_open(NULL, test_path());
    struct cube_err err = {0};

    CHECK(cube_store_open(NULL, test_path(), NULL, &err) == NULL);
    CHECK_INT(err.code, CUBE_EBUSY);
    CHECK_HAS(err.text, "has it open");
    CHECK_INT(cube_store_compact(s, &err), 0); /* another file, same lock */
    CHECK(cube_store_open(NULL, test_path(), NULL, &err) == NULL);
    CHECK_INT(err.code, CUBE_EBUSY);
    cube_store_close(s);
    s = must_open(NULL, test_path());
    cube_store_close(s);
}

/* ---- Bytes ---- */

static struct cube_buf slurp(const char *path)
{
    struct cube_buf b = {0};

    if (cube_file_read(cube_world_real(), path, &b, 64 << 20, NULL) < 0)
        FAIL("read %s", path);
    return b;
}

TEST(bytes_are_as_drawn)
{
    static const uint8_t leaf[] = {
        0x00, 0x00, 0x02, 0x00, 0x08, 0x00, 0x0d, 0x00,
        0x01, 0x61, 0x02, 0x13, 0x00, 0x02, 0x62, 0x63, 0x06, 0x14, 0x00,
        0x31, 0x78, 0x79, 0x7a};
    static const uint8_t batch[] = {0x54, 0x00, 0x01, 0x74, 0x50,
                                    0x00, 0x01, 0x01, 0x61, 0x31};
    struct cube_store *s = must_open(NULL, test_path());
    struct cube_store_rec rec;
    struct cube_buf b;
    uint8_t *p, var[5];
    uint64_t at;

    put(s, "a", "1");
    commit(s);
    b = slurp(test_path());
    p = (uint8_t *)b.data;
    CHECK_MEM(p, "cube store 1\n\0\0", 16);
    CHECK_MEM(p + 16, s->file->id, 16);
    CHECK_UINT(cube_store_get32(p + 60), cube_store_crc(&s->crc, 0, p, 60));
    CHECK(cube_store_rec_decode(s->file, 64, p + 64, &rec));
    CHECK_INT(rec.kind, 'R');
    CHECK_UINT(rec.base, 64); /* a new file's first roots are their own */
    CHECK_UINT(rec.prev, cube_store_get32(p + 60));
    at = cube_store_rec_end(&rec);
    CHECK_UINT(at, 64 + 64 + 16); /* roots of no trees */
    CHECK_MEM(p + at, "curB", 4);
    CHECK_UINT(cube_store_get32(p + at + 4), sizeof batch);
    CHECK_UINT(cube_store_get64(p + at + 8), at);
    CHECK_UINT(cube_store_get64(p + at + 16), 64);
    CHECK_UINT(cube_store_get64(p + at + 24), at); /* synced */
    CHECK_UINT(cube_store_get64(p + at + 32), 1);  /* commit */
    CHECK_UINT(cube_store_get32(p + at + 40), rec.crc);
    CHECK_MEM(p + at + 64, batch, sizeof batch);
    cube_buf_free(&b);
    put(s, "bc", "xyz");
    commit(s);
    CHECK_INT(cube_store_compact(s, NULL), 0);
    b = slurp(test_path());
    at = s->view.roots->trees[0].root.at;
    CHECK_UINT(s->view.roots->trees[0].root.len, sizeof leaf);
    CHECK_MEM(b.data + at, leaf, sizeof leaf);
    cube_buf_free(&b);
    CHECK_UINT(cube_store_put_var(var, 300), 2);
    CHECK_MEM(var, "\xac\x02", 2);
    CHECK_UINT(cube_store_crc(&s->crc, 0, "123456789", 9), 0xe3069283u);
    cube_store_close(s);
}

TEST(instruction_and_tables_give_the_same_checksum)
{
    struct cube_store_crc fast, slow;
    uint8_t bytes[100];

    cube_store_crc_init(&fast);
    slow = fast;
    slow.is_by_instruction = false;
    for (size_t i = 0; i < sizeof bytes; i++)
        bytes[i] = (uint8_t)test_random();
    for (size_t from = 0; from < 9; from++) {
        for (size_t len = 0; from + len <= sizeof bytes; len++)
            CHECK_UINT(cube_store_crc(&fast, 7, bytes + from, len),
                       cube_store_crc(&slow, 7, bytes + from, len));
    }
    CHECK_UINT(cube_store_crc(&slow, 0, "123456789", 9), 0xe3069283u);
}

/* Keys k0 .. k29, each in a commit of its own, so that the number of keys
 * tells the commit. Small enough for tests that go through every byte. */
static struct cube_buf small_file(int compact_at, size_t *used)
{
    static struct disk d;
    struct inode *file;
    struct cube_store *s;
    struct cube_buf b = {0};
    struct cube_store_stats stats;
    char key[16];

    disk_init(&d);
    s = must_open(&d.world, "t");
    for (int i = 0; i < 30; i++) {
        snprintf(key, sizeof key, "k%02d", i);
        put(s, key, "a value that is more than a few bytes long, so that it "
                    "can stand outside of a page");
        commit(s);
        if (i == compact_at)
            CHECK_INT(cube_store_compact(s, NULL), 0);
    }
    CHECK_INT(cube_store_settle(s, NULL), 0);
    for (int i = 0; i < 10; i++) {
        snprintf(key, sizeof key, "l%02d", i);
        put(s, key, "after the checkpoint");
        commit(s);
    }
    cube_store_stats(s, &stats);
    *used = (size_t)stats.used_bytes;
    cube_store_close(s);
    file = &d.inodes[d.names[disk_find(&d, "t")].inode];
    cube_buf_add(&b, file->now.data, file->now.len);
    disk_free(&d);
    return b;
}

/* The number of keys, if they are those of some commit; -1 if an error was
 * told; fails for anything else. */
static int keys_of_bytes(const void *bytes, size_t len, struct cube_err *err,
                         uint64_t *dropped)
{
    static struct disk d;
    struct cube_store_options o = {.cache_bytes = 1};
    struct cube_store *s;
    struct cube_store_stats stats;
    struct cube_cursor *c;
    int n = 0, r;

    disk_init(&d);
    disk_close(&d, disk_open(&d, "t", CUBE_OPEN_CREATE));
    cube_buf_add(&d.inodes[0].now, bytes, len);
    s = cube_store_open(&d.world, "t", &o, err);
    if (!s) {
        disk_free(&d);
        return -1;
    }
    cube_store_stats(s, &stats);
    *dropped = stats.dropped_bytes;
    c = cube_cursor_open(s, "t", err);
    for (r = cube_cursor_first(c, err); r > 0; r = cube_cursor_next(c, err)) {
        char want[16];
        const void *val;
        size_t n_bytes;

        snprintf(want, sizeof want, "%c%02d", n < 30 ? 'k' : 'l', n % 30);
        CHECK_MEM(cube_cursor_key(c, &n_bytes), want, 3);
        if ((r = cube_cursor_value(c, &val, &n_bytes, err)) < 0)
            break;
        CHECK_MEM(val, n < 30 ? "a value that" : "after the ch", 12);
        n++;
    }
    cube_cursor_close(c);
    if (r == 0 && cube_store_check(s, err) < 0)
        r = -1;
    cube_store_close(s);
    disk_free(&d);
    return r < 0 ? -1 : n;
}

TEST(file_cut_at_every_byte_opens_with_the_last_whole_commit)
{
    size_t used;
    struct cube_buf b = small_file(-1, &used);
    int last = 0;

    for (size_t cut = 0; cut <= used; cut++) {
        struct cube_err err = {0};
        uint64_t dropped = 0;
        int n;

        test_row("cut at %zu of %zu", cut, used);
        n = keys_of_bytes(b.data, cut, &err, &dropped);
        if (cut < 64 + 64 + 16) { /* the header and the first roots */
            CHECK_INT(err.code, CUBE_ECORRUPT);
            continue;
        }
        if (n < last || n > last + 1)
            FAIL("%d keys after %d: %s", n, last, err.text);
        last = n;
    }
    CHECK_INT(last, 40);
    cube_buf_free(&b);
}

TEST(every_flipped_byte_is_told_or_harmless)
{
    size_t used;
    struct cube_buf b = small_file(20, &used);
    int told = 0, cost = 0, harmless = 0;

    for (size_t at = 0; at < used + 200; at++) {
        struct cube_err err = {0};
        uint64_t dropped = 0;
        int n, bit = 1 << test_below(8);

        test_row("byte %zu of %zu", at, used);
        b.data[at] = (char)(b.data[at] ^ bit);
        n = keys_of_bytes(b.data, b.len, &err, &dropped);
        b.data[at] = (char)(b.data[at] ^ bit);
        if (n < 0) {
            CHECK_INT(err.code, CUBE_ECORRUPT);
            CHECK_HAS(err.text, "t: ");
            CHECK_HAS(err.text, "offset");
            told++;
        } else if (n < 40) { /* only the last commit, and it is told */
            CHECK_INT(n, 39);
            CHECK(dropped > 0);
            cost++;
        } else {
            harmless++;
        }
    }
    CHECK(told > 1000);
    CHECK(cost > 50);
    CHECK(harmless > 200);
    cube_buf_free(&b);
}

/* ---- Every crash ---- */

enum fate { LOST, KEPT, TORN };

/* What a crash leaves of a file: each sector that differs from the safe one
 * is the new, the old, or, in one of them, first part new and rest old. */
static void crash_file(const struct inode *n, enum fate fate,
                       struct cube_buf *out)
{
    cube_buf_clear(out);
    cube_buf_add(out, n->safe.data ? n->safe.data : "", n->safe.len);
    if (fate == LOST)
        return;
    for (size_t at = 0; at < n->now.len; at += SECTOR) {
        size_t len = n->now.len - at < SECTOR ? n->now.len - at : SECTOR;

        if (at + len <= n->safe.len &&
            memcmp(n->now.data + at, n->safe.data + at, len) == 0)
            continue;
        if (fate == KEPT || test_below(2) == 0)
            buf_put(out, n->now.data + at, len, at);
    }
}

/* Another disk: this one after a crash. */
static void crash(const struct disk *d, enum fate fate, bool is_dir_safe,
                  struct disk *out)
{
    disk_init(out);
    out->name_count = is_dir_safe ? d->safe_count : d->name_count;
    memcpy(out->names, is_dir_safe ? d->safe : d->names, sizeof out->names);
    for (int i = 0; i < out->name_count; i++) {
        struct inode *n = &out->inodes[out->inode_count];

        crash_file(&d->inodes[out->names[i].inode], fate, &n->now);
        cube_buf_add(&n->safe, n->now.data, n->now.len);
        out->names[i].inode = out->inode_count++;
    }
    memcpy(out->safe, out->names, sizeof out->safe);
    out->safe_count = out->name_count;
}

#define HISTORY 70

static struct crash_run {
    struct model states[HISTORY]; /* after each commit */
    int acked, begun;             /* the states that it must be between */
    long checked;
    bool is_created;
} run;

/* The state after a crash is that of a commit which is not older than the
 * last one acknowledged; and the store goes on from there. */
static void check_crash(struct disk *d)
{
    struct cube_err err = {0};
    struct cube_store *s = cube_store_open(&d->world, "t", NULL, &err);
    int i;

    run.checked++;
    if (!s) {
        FAIL("after commit %d: %s", run.acked, err.text);
        return;
    }
    for (i = run.begun; i >= run.acked && !store_is(s, &run.states[i]); i--)
        ;
    if (i < run.acked)
        FAIL("not a state between commits %d and %d", run.acked, run.begun);
    if (cube_store_check(s, &err) < 0)
        FAIL("check: %s", err.text);
    put(s, "goes", "on");
    commit(s);
    cube_store_close(s);
    s = cube_store_open(&d->world, "t", NULL, &err);
    if (!s || strcmp(get(s, NULL, "goes"), "on") != 0)
        FAIL("the commit after the crash: %s", err.text);
    cube_store_close(s);
}

/* Crashes here, in several ways. Not the same for each byte of the program,
 * but for each call that changes the disk. */
static void crash_here(struct disk *d)
{
    static struct disk after;

    if (!run.is_created)
        return;
    for (int i = 0; i < 6; i++) {
        crash(d, i == 0 ? LOST : i == 1 ? KEPT : TORN, i % 2 == 0, &after);
        check_crash(&after);
        disk_free(&after);
    }
}

TEST(every_crash_leaves_a_commit_not_older_than_the_last_acknowledged)
{
    static struct disk d;
    struct cube_store *s;

    memset(&run, 0, sizeof run);
    disk_init(&d);
    s = must_open(&d.world, "t");
    REQUIRE(s);
    run.is_created = true;
    d.before = crash_here;
    for (int i = 1; i < HISTORY; i++) {
        test_row("commit %d", i);
        run.states[i] = run.states[i - 1];
        for (int n = (int)test_below(8); n >= 0; n--)
            change(s, &run.states[i]);
        run.begun = i;
        commit(s);
        run.acked = i;
        if (test_below(4) == 0)
            (void)cube_store_slice(s, 0);
        if (test_below(25) == 0)
            CHECK_INT(cube_store_compact(s, NULL), 0);
        if (test_below(25) == 0)
            CHECK_INT(cube_store_settle(s, NULL), 0);
    }
    d.before = NULL;
    CHECK(run.checked > 800);
    cube_store_close(s);
    disk_free(&d);
}

/* ---- Disks that fail ---- */

/* Without a fault, which would be one of reading. */
static bool reads_as(struct cube_store *s, struct disk *d,
                     const struct model *want)
{
    int fail_at = d->fail_at, calls = d->calls;
    bool same;

    d->fail_at = 0;
    same = store_is(s, want);
    d->fail_at = fail_at;
    d->calls = calls;
    return same;
}

/* Each call fails once, or from then on: the error is told, the last commit
 * stands, and after the fault the store writes again. */
static void fail_each_call(int fail_errno, bool is_forever, int code)
{
    static struct disk d;
    static struct model want;
    int fail_at = 0, failed = 0;
    bool is_reached = true;

    while (is_reached && fail_at < 3000) {
        struct cube_err err = {0};
        struct cube_store *s;

        fail_at++;
        test_row("%s: call %d fails%s", strerror(fail_errno), fail_at,
                 is_forever ? " and all after it" : "");
        disk_init(&d);
        memset(&want, 0, sizeof want);
        s = must_open(&d.world, "t");
        REQUIRE(s);
        d.fail_errno = fail_errno;
        d.is_fail_forever = is_forever;
        d.calls = 0;
        d.fail_at = fail_at;
        for (int i = 0; i < 8; i++) {
            struct model staged = want;

            for (int n = 0; n < 6; n++)
                change(s, &staged);
            if (cube_store_commit(s, &err) == 0) {
                want = staged;
            } else {
                failed++;
                CHECK(err.code == (enum cube_code)code ||
                      err.code == CUBE_ESYNC || err.code == CUBE_EIO);
            }
            if (i % 4 == 3 && cube_store_compact(s, &err) < 0)
                failed++;
            (void)cube_store_slice(s, 1);
            if (i % 4 == 3 && !reads_as(s, &d, &want))
                FAIL("the last commit is not what it was");
        }
        is_reached = d.calls >= fail_at;
        d.fail_at = 0; /* there is room again */
        d.clock_ms += 2 * CUBE_STORE_RETRY_MS;
        while (cube_store_slice(s, 1000))
            ;
        CHECK(store_is(s, &want));
        CHECK(!s->is_broken);
        change(s, &want);
        if (cube_store_commit(s, &err) < 0)
            FAIL("after the fault: %s", err.text);
        CHECK_INT(cube_store_check(s, &err), 0);
        cube_store_close(s);
        s = must_open(&d.world, "t");
        REQUIRE(s);
        CHECK(store_is(s, &want));
        cube_store_close(s);
        disk_free(&d);
    }
    CHECK(fail_at > 60);
    CHECK(failed > 40);
    CHECK(fail_at < 3000);
}

TEST(full_disk_is_told_and_survived)
{
    fail_each_call(ENOSPC, false, CUBE_ENOSPC);
    fail_each_call(ENOSPC, true, CUBE_ENOSPC);
}

TEST(broken_disk_is_told_and_survived)
{
    fail_each_call(EIO, false, CUBE_EIO);
    fail_each_call(EIO, true, CUBE_EIO);
}

/* ---- Bounds ---- */

TEST(file_never_grows_past_twice_its_live_bytes_and_8_mib)
{
    static struct disk d;
    static const struct {
        int keys;
        size_t len, total;
        bool is_sliced;
    } rows[] = {
        {3000, 1500, 48 << 20, true},  /* a loop that slices */
        {3000, 1500, 48 << 20, false}, /* and one that does not */
        {100, 500, 24 << 20, false},   /* a manager with few tasks */
        {10000, 20, 6 << 20, false},   /* little records */
        {20, 200000, 48 << 20, false}, /* large ones */
    };
    static char val[200000];

    for (size_t i = 0; i < COUNT(rows); i++) {
        size_t live = (size_t)rows[i].keys * (rows[i].len + 4), most = 0;
        size_t written = 0;
        struct cube_store *s;
        struct cube_store_stats stats;

        test_row("row %zu", i);
        disk_init(&d);
        d.is_forgetful = false;
        s = must_open(&d.world, "t");
        for (int n = 0; written < rows[i].total; n++) {
            uint32_t k = n < rows[i].keys ? (uint32_t)n
                : (uint32_t)test_below((unsigned)rows[i].keys);

            if (cube_store_put(s, "t", &k, 4, val, rows[i].len, NULL) < 0)
                FAIL("put");
            written += rows[i].len + 12;
            if (n % 8 != 7)
                continue;
            commit(s);
            if (rows[i].is_sliced)
                (void)cube_store_slice(s, 5);
            cube_store_stats(s, &stats);
            if (most < stats.file_bytes)
                most = (size_t)stats.file_bytes;
        }
        if (most > 2 * live + (8 << 20))
            FAIL("%zu bytes for %zu live ones", most, live);
        CHECK(stats.compactions > 0);
        CHECK_INT(cube_store_check(s, NULL), 0);
        cube_store_close(s);
        disk_free(&d);
    }
}

TEST(memory_stays_within_the_cache_and_a_mebibyte)
{
    static struct disk d;
    struct cube_store_options o = {.cache_bytes = 4 << 20};
    struct cube_store *s;
    struct cube_buf got = {0};
    static char val[500];
    long before, most = 0;

    disk_init(&d);
    d.is_forgetful = false;
    s = cube_store_open(&d.world, "t", &o, NULL);
    REQUIRE(s);
    before = test_heap_bytes;
    for (int n = 0; n < 100000; n++) {
        uint32_t k = (uint32_t)test_random();

        if (cube_store_put(s, "t", &k, 4, val, sizeof val, NULL) < 0 ||
            cube_store_get(s, "t", &k, 4, &got, NULL) != 1)
            FAIL("put and get");
        if (n % 8 == 7) {
            long disk_bytes = 0;

            commit(s);
            for (int i = 0; i < d.inode_count; i++)
                disk_bytes += (long)d.inodes[i].now.cap;
            if (most < test_heap_bytes - disk_bytes)
                most = test_heap_bytes - disk_bytes;
        }
    }
    (void)before;
    CHECK(most < (5 << 20));
    cube_buf_free(&got);
    cube_store_close(s);
    disk_free(&d);
}

TEST(idle_store_writes_nothing)
{
    static struct disk d;
    struct cube_store *s;
    int calls;

    disk_init(&d);
    s = must_open(&d.world, "t");
    put(s, "a", "1");
    commit(s);
    calls = d.calls;
    for (int i = 0; i < 100; i++) {
        CHECK(!cube_store_slice(s, 5));
        commit(s);
    }
    CHECK_INT(d.calls, calls);
    cube_store_close(s);
    s = must_open(&d.world, "t");
    cube_store_close(s);
    disk_free(&d);
}

/* The rescue once wrote out what was only staged, as if it were committed. */
TEST(what_is_staged_while_the_file_is_written_anew_is_not_committed_by_that)
{
    static struct disk d;
    struct cube_store *s;
    struct cube_buf got = {0};

    disk_init(&d);
    s = must_open(&d.world, "t");
    put(s, "a", "1");
    commit(s);
    put(s, "a", "2");
    commit(s);
    put(s, "b", "1");
    CHECK_INT(cube_store_commit_begin(s, NULL), 1);
    CHECK_INT(cube_store_commit_end(s, -EIO, NULL), -1);
    (void)cube_store_put(s, "t", "staged", 6, "x", 1, NULL);
    (void)cube_store_put(s, "u", "staged", 6, "x", 1, NULL);
    for (int i = 0; i < 1000 && cube_store_slice(s, 5); i++)
        ;
    cube_store_rollback(s);
    for (int round = 0; round < 2; round++) {
        CHECK_INT(cube_store_get(s, "t", "staged", 6, &got, NULL), 0);
        CHECK_INT(cube_store_get(s, "u", "staged", 6, &got, NULL), 0);
        CHECK_INT(cube_store_get(s, "t", "a", 1, &got, NULL), 1);
        CHECK_STR(got.data, "2");
        CHECK_INT(cube_store_check(s, NULL), 0);
        cube_store_close(s);
        s = must_open(&d.world, "t");
    }
    cube_store_close(s);
    cube_buf_free(&got);
    disk_free(&d);
}

/* ---- The real disk ---- */

/* Puts n, n + 1, ... into commits of their own, and says so after each. */
static void write_until_killed(const char *path, uint32_t n, int out)
{
    struct cube_store_options o = {.cache_bytes = 1};
    struct cube_store *s = cube_store_open(NULL, path, &o, NULL);
    char val[3000] = "", key[16];

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

    for (int i = 0; i < (rounds ? atoi(rounds) : 10); i++) {
        uint32_t acked = next, last = 0, n;
        int pipe_fds[2], acks = 1 + (int)test_below(60), status;
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
        REQUIRE(s);
        CHECK_INT(cube_store_check(s, NULL), 0);
        REQUIRE(cube_store_get(s, "t", "last", 4, &got, NULL) == 1);
        memcpy(&last, got.data, 4);
        CHECK(last + 1 == acked || last == acked); /* or one more */
        next = last + 1;
        for (n = 0; n < next; n++) {
            snprintf(key, sizeof key, "%08u", n);
            if (cube_store_get(s, "t", key, 8, &got, NULL) != 1 ||
                got.len != n % 3000)
                FAIL("key %u is gone", n);
        }
        cube_buf_free(&got);
        cube_store_close(s);
    }
}
