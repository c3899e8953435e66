/*
 * Chapter 4, the store: a model first (random transactions against a plain
 * array), then what a crash, a damaged file and a failing disk may do to it.
 */
#include "test.h"

/* ---- A model: the state that a store should have ---- */

#define TREES 3
#define KEYS 400 /* of a tree */

static const char *const tree_names[TREES] = {"tasks", "events", "meta"};

/* Values are made of a number, so that the model keeps only that; 0: none. */
struct model {
    uint32_t v[TREES][KEYS];
};

static size_t make_key(unsigned k, char out[64])
{
    static const char *const shapes[] = {"%u", "key-%05u", "a/%u/b", "%08x-%%"};

    snprintf(out, 64, shapes[k % COUNT(shapes)], k * 7919u % 100003u);
    return strlen(out);
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

struct pair {
    char key[64];
    size_t len;
    uint32_t v;
};

static int pair_order(const void *a, const void *b)
{
    const struct pair *x = a, *y = b;

    return cube_store_order((const uint8_t *)x->key, x->len,
                            (const uint8_t *)y->key, y->len);
}

/* The sorted array: what a tree of the model holds. */
static size_t model_sorted(const struct model *m, int tree, struct pair *out)
{
    size_t n = 0;

    for (unsigned k = 0; k < KEYS; k++) {
        if (m->v[tree][k] == 0)
            continue;
        out[n].len = make_key(k, out[n].key);
        out[n++].v = m->v[tree][k];
    }
    qsort(out, n, sizeof *out, pair_order);
    return n;
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

static bool cursor_is(struct cube_cursor *c, const struct pair *p)
{
    struct cube_err err;
    size_t len, val_len;
    const void *val, *key = cube_cursor_key(c, &len);

    if (len != p->len || memcmp(key, p->key, len) != 0)
        return false;
    return cube_cursor_value(c, &val, &val_len, &err) == 0 &&
           is_value(val, val_len, p->v);
}

/* Does a cursor see the sorted array, forwards and backwards? */
static bool cursor_sees(struct cube_cursor *c, const struct pair *pairs,
                        size_t n)
{
    struct cube_err err;
    size_t i = 0;
    int r;

    for (r = cube_cursor_first(c, &err); r > 0; r = cube_cursor_next(c, &err)) {
        if (i >= n || !cursor_is(c, &pairs[i]))
            return false;
        i++;
    }
    if (r < 0 || i != n)
        return false;
    for (r = cube_cursor_last(c, &err); r > 0; r = cube_cursor_prev(c, &err)) {
        if (i == 0 || !cursor_is(c, &pairs[i - 1]))
            return false;
        i--;
    }
    return r == 0 && i == 0;
}

/* Is the committed state of the store the model's? */
static bool store_is(struct cube_store *s, const struct model *m)
{
    static struct pair pairs[KEYS];
    bool same = true;

    for (int t = 0; t < TREES && same; t++) {
        size_t n = model_sorted(m, t, pairs);
        struct cube_cursor *c = cube_cursor_open(s, tree_names[t], NULL);

        same = cursor_sees(c, pairs, n);
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
    char key[64];
    size_t len = make_key(k, key);
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
    char key[64];
    size_t len = make_key(k, key);
    int r = cube_store_get(s, tree_names[t], key, len, &val, NULL);
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
    char key[8];

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

static void spill(const char *path, const void *p, size_t len)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);

    if (fd < 0 || write(fd, p, len) != (ssize_t)len)
        FAIL("write %s", path);
    close(fd);
}

TEST(bytes_are_as_drawn)
{
    static const uint8_t leaf[] = {
        0x00, 0x00, 0x02, 0x00, 0x08, 0x00, 0x0c, 0x00, 0x01, 0x61,
        0x02, 0x31, 0x02, 0x62, 0x63, 0x06, 0x78, 0x79, 0x7a};
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

/* Keys k0 .. k29, each in a commit of its own, so that the number of keys
 * tells the commit. Small enough for tests that go through every byte. */
static struct cube_buf small_file(int compact_at, size_t *used)
{
    struct cube_store *s = must_open(NULL, test_path());
    struct cube_store_stats stats;
    char key[16];

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
    return slurp(test_path());
}

/* The number of keys, if they are those of some commit; -1 if an error was
 * told; fails for anything else. */
static int keys_in(const char *path, struct cube_err *err, uint64_t *dropped)
{
    struct cube_store *s = cube_store_open(NULL, path, NULL, err);
    struct cube_store_stats stats;
    struct cube_cursor *c;
    int n = 0, r;

    if (!s)
        return -1;
    cube_store_stats(s, &stats);
    *dropped = stats.dropped_bytes;
    c = cube_cursor_open(s, "t", err);
    for (r = cube_cursor_first(c, err); r > 0; r = cube_cursor_next(c, err)) {
        char want[16];
        const void *val;
        size_t len;

        snprintf(want, sizeof want, "%c%02d", n < 30 ? 'k' : 'l', n % 30);
        CHECK_MEM(cube_cursor_key(c, &len), want, 3);
        if ((r = cube_cursor_value(c, &val, &len, err)) < 0)
            break;
        CHECK_MEM(val, n < 30 ? "a value that" : "after the ch", 12);
        n++;
    }
    cube_cursor_close(c);
    if (r == 0 && cube_store_check(s, err) < 0)
        r = -1;
    cube_store_close(s);
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
        spill(test_path(), b.data, cut);
        n = keys_in(test_path(), &err, &dropped);
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
        spill(test_path(), b.data, b.len);
        b.data[at] = (char)(b.data[at] ^ bit);
        n = keys_in(test_path(), &err, &dropped);
        if (n < 0) {
            CHECK_INT(err.code, CUBE_ECORRUPT);
            CHECK_HAS(err.text, test_path());
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
