/*
 * Chapter 4, the store: random transactions against a plain array, snapshots,
 * limits, bytes as drawn. What crashes, damage and failing disks may do to it
 * stands in t04_crash.c and t04_faults.c, what it costs in t04_bounds.c.
 */
#include "test.h"
#include "store_disk.h"

static bool get_is(struct cube_store *s, int t, unsigned k, uint32_t v)
{
    struct cube_buf val = {0};
    const char *key = key_of(k);
    int r = cube_store_get(s, tree_names[t], key, strlen(key), &val, NULL);
    bool same = r == (v != 0) && (v == 0 || is_value(val.data, val.len, v));

    cube_buf_free(&val);
    return same;
}

static long known_seen;

/* A branch and its child know each other or neither does, only what is in the
 * cache is known, and its bytes are counted. */
static void check_cache(struct cube_store_cache *c)
{
    size_t count = 0, bytes = c->slot_count * sizeof *c->slots;

    for (size_t i = 0; i < c->slot_count; i++) {
        for (struct cube_store_ext *e = c->slots[i]; e; e = e->next) {
            struct cube_store_ext **kids = cube_store_ext_kids(e);

            CHECK(e->is_cached && (!e->known || *e->known == e));
            for (int k = 0; k < e->kid_count; k++) {
                CHECK(!kids[k] || kids[k]->known == &kids[k]);
                known_seen += kids[k] != NULL;
            }
            count++;
            bytes += cube_store_ext_bytes(e);
        }
    }
    CHECK_UINT(c->count, count);
    CHECK_UINT(c->bytes, bytes);
    CHECK(c->bytes <= c->max_bytes);
}

/* Random transactions with everything else among them. */
static void run_model(const char *path, int rounds)
{
    static struct model committed, staged;
    struct cube_store *s = must_open(NULL, path);
    struct cube_store_stats stats;
    struct cube_err err = {0};
    uint64_t compactions = 0, checkpoints = 0;

    known_seen = 0;
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
        check_cache(&s->cache);
        if (i % 16 == 0)
            CHECK(store_is(s, &committed));
        if (i % 16 == 0 && cube_store_check(s, &err) < 0)
            FAIL("check: %s", err.text);
    }
    CHECK(store_is(s, &committed));
    cube_store_stats(s, &stats);
    CHECK(compactions + stats.compactions > 3);
    CHECK(checkpoints + stats.checkpoints > 3);
    CHECK(known_seen > rounds);
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
    CHECK_INT(cube_cursor_seek(c, NULL, 0, &err), 1); /* before the first */
    CHECK_MEM(cube_cursor_key(c, &len), "0000", 4);
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

/* Turning round on a key that was deleted meanwhile once passed over the one
 * behind it. */
TEST(cursor_that_turns_on_a_deleted_key_misses_none)
{
    struct cube_store *s = must_open(NULL, NULL);
    struct cube_cursor *c;
    size_t len;

    put(s, "a", "1");
    put(s, "b", "1");
    put(s, "c", "1");
    commit(s);
    CHECK_INT(cube_store_compact(s, NULL), 0);
    c = cube_cursor_open_staged(s, "t", NULL);
    CHECK_INT(cube_cursor_last(c, NULL), 1);
    CHECK_INT(cube_cursor_prev(c, NULL), 1);
    CHECK_INT(cube_store_del(s, "t", "b", 1, NULL), 0);
    CHECK_INT(cube_cursor_next(c, NULL), 1);
    CHECK_MEM(cube_cursor_key(c, &len), "c", 1);
    CHECK_INT(cube_cursor_prev(c, NULL), 1);
    CHECK_MEM(cube_cursor_key(c, &len), "a", 1);
    CHECK_INT(cube_store_del(s, "t", "a", 1, NULL), 0);
    CHECK_INT(cube_store_del(s, "t", "c", 1, NULL), 0);
    CHECK_INT(cube_cursor_prev(c, NULL), 0);
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
    s = must_open(NULL, test_path()); /* whose first tree has no name */
    CHECK_INT(cube_store_put(s, "gone", "a", 1, "1", 1, NULL), 0);
    cube_store_rollback(s);
    put(s, "a", "1");
    commit(s);
    cube_store_close(s);
    s = must_open(NULL, test_path());
    CHECK_INT(cube_store_put(s, "", "a", 1, "1", 1, NULL), -1);
    CHECK_STR(get(s, NULL, "a"), "1");
    cube_store_close(s);
}

TEST(second_opener_is_refused_with_words)
{
    struct cube_store *s = must_open(NULL, test_path());
    struct cube_store_options o = {.is_read_only = true};
    struct cube_err err = {0};

    CHECK(cube_store_open(NULL, test_path(), NULL, &err) == NULL);
    CHECK_INT(err.code, CUBE_EBUSY);
    CHECK_HAS(err.text, "has it open");
    CHECK(cube_store_open(NULL, test_path(), &o, &err) == NULL);
    CHECK_INT(err.code, CUBE_EBUSY);
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

TEST(file_of_the_essay_is_as_drawn)
{
    static const struct { uint64_t at; char kind; uint32_t len; } want[] = {
        {64, 'P', 23}, {160, 'R', 88}, {320, 'B', 0}, {384, 'B', 6}};
    struct cube_store *s = must_open(NULL, test_path());
    struct cube_store_rec rec;

    put(s, "a", "1");
    put(s, "bc", "xyz");
    commit(s);
    CHECK_INT(cube_store_compact(s, NULL), 0);
    CHECK_UINT(s->view.roots->trees[0].root.at, 128);
    put(s, "d", "4");
    commit(s);
    for (size_t i = 0; i < COUNT(want); i++) {
        REQUIRE(cube_store_rec_head(s->file, want[i].at, &rec, NULL) == 1);
        CHECK_INT(rec.kind, want[i].kind);
        CHECK_UINT(rec.len, want[i].len);
    }
    CHECK_UINT(s->file->end, 464);
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
