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
