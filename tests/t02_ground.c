/* Chapter 2: errors, texts, buffers, maps, UUIDs, hashes, times, files. */
#include "test.h"

/* ---- Errors ---- */

TEST(a_failure_says_what_and_why)
{
    struct cube_err err = {0};
    char longer[2000];

    CHECK_INT(cube_fail(&err, CUBE_EIO, "open %s: %s", "/x", "gone"), -1);
    CHECK_INT(err.code, CUBE_EIO);
    CHECK_STR(err.text, "open /x: gone");
    CHECK_INT(cube_fail(NULL, CUBE_EIO, "nobody listens"), -1);
    memset(longer, 'x', sizeof longer - 1);
    longer[sizeof longer - 1] = 0;
    (void)cube_fail(&err, CUBE_EIO, "%s", longer);
    CHECK_UINT(strlen(err.text), sizeof err.text - 1);
}

TEST(errno_values_become_kinds)
{
    static const struct { int number; enum cube_code code; } rows[] = {
        { ENOENT, CUBE_ENOENT }, { EEXIST, CUBE_EEXIST },
        { EACCES, CUBE_EACCES }, { EPERM, CUBE_EACCES },
        { ENOSPC, CUBE_ENOSPC }, { EDQUOT, CUBE_ENOSPC },
        { EBUSY, CUBE_EBUSY },   { EADDRINUSE, CUBE_EBUSY },
        { ETIMEDOUT, CUBE_ETIMEOUT },
        { ECONNREFUSED, CUBE_ECONN }, { EPIPE, CUBE_ECONN },
        { EIO, CUBE_EIO }, { EMFILE, CUBE_EIO },
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        test_row("%s", strerror(rows[i].number));
        CHECK_INT(cube_errno_code(-rows[i].number), rows[i].code);
    }
}

/* ---- Texts ---- */

TEST(a_number_is_digits_and_nothing_else)
{
    static const struct {
        const char *text;
        uint64_t max;
        int result;
        uint64_t value;
    } rows[] = {
        { "0", 9, 0, 0 },
        { "65535", 65535, 0, 65535 },
        { "65536", 65535, -1, 0 },                   /* one too many */
        { "00080", 65535, 0, 80 },
        { "18446744073709551615", UINT64_MAX, 0, UINT64_MAX },
        { "18446744073709551616", UINT64_MAX, -1, 0 },
        { "99999999999999999999", UINT64_MAX, -1, 0 },
        { "7", 3, -1, 0 },                           /* a digit above max */
        { "", 9, -1, 0 },
        { "-1", 9, -1, 0 }, { "+1", 9, -1, 0 }, { " 1", 9, -1, 0 },
        { "1 ", 9, -1, 0 }, { "0x1", 99, -1, 0 }, { "1.0", 99, -1, 0 },
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        uint64_t v = 0;

        test_row("\"%s\" up to %llu", rows[i].text,
                 (unsigned long long)rows[i].max);
        CHECK_INT(cube_text_u64(rows[i].text, strlen(rows[i].text),
                                rows[i].max, &v), rows[i].result);
        CHECK_UINT(v, rows[i].value);
    }
}

TEST(texts_compare_by_length_and_case)
{
    char *slot = NULL, *copy;

    CHECK(cube_text_is("abc", 3, "abc"));
    CHECK(!cube_text_is("abc", 2, "abc"));
    CHECK(!cube_text_is("abd", 3, "abc"));
    CHECK(cube_text_is("", 0, ""));
    CHECK(cube_text_is_nocase("ABc", 3, "abC"));
    CHECK(!cube_text_is_nocase("[", 1, "{"));  /* 0x20 apart, no letters */
    CHECK(!cube_text_is_nocase("ab", 2, "abc"));
    CHECK(cube_text_starts("unix:///x", "unix://"));
    CHECK(!cube_text_starts("uni", "unix://"));
    CHECK(cube_text_dup(NULL) == NULL);
    copy = cube_text_ndup("abcdef", 3);
    CHECK_STR(copy, "abc");
    cube_text_set(&slot, copy);
    cube_text_set(&slot, slot);   /* from itself: copied before the free */
    CHECK_STR(slot, "abc");
    cube_text_set(&slot, NULL);
    CHECK(slot == NULL);
    cube_free(copy);
}

/* ---- Buffers ---- */

TEST(a_buffer_follows_its_model)
{
    struct cube_buf b = {0};
    char model[20000];
    size_t len = 0;

    for (int step = 0; step < 2000; step++) {
        char piece[64];
        size_t n = test_below(sizeof piece);

        memset(piece, 'a' + step % 26, sizeof piece);
        if (test_below(3) == 0) {
            n = n < len ? n : len;
            memmove(model, model + n, len - n);
            len -= n;
            cube_buf_drop(&b, n);
        } else if (len + n < sizeof model) {
            memcpy(model + len, piece, n);
            len += n;
            cube_buf_add(&b, piece, n);
        }
        REQUIRE(b.len == len && b.len <= b.cap);
        REQUIRE(len == 0 || memcmp(b.data, model, len) == 0);
        REQUIRE(!b.data || b.data[len] == 0);
    }
    cube_buf_free(&b);
    CHECK(b.data == NULL && b.len == 0 && b.cap == 0);
}

TEST(a_buffer_prints_and_is_given_away)
{
    struct cube_buf b = {0};
    char *mine;

    mine = cube_buf_take(&b);
    CHECK_STR(mine, "");       /* never NULL, also when nothing was added */
    cube_free(mine);
    cube_buf_puts(&b, "x=");
    cube_buf_printf(&b, "%d %0200d", 42, 7);
    cube_buf_addc(&b, '!');
    CHECK_UINT(b.len, 2 + 3 + 200 + 1);
    CHECK_MEM(b.data, "x=42 000", 8);
    cube_buf_clear(&b);
    CHECK_STR(b.data, "");
    cube_buf_puts(&b, "y");
    mine = cube_buf_take(&b);
    CHECK_STR(mine, "y");
    CHECK(b.data == NULL);
    cube_free(mine);
}

/* ---- Lists and maps ---- */

struct bead {
    int number;
    struct cube_list link;
};

TEST(a_list_keeps_order_and_forgets_what_is_removed)
{
    struct cube_list head;
    struct bead beads[5] = {{0}}, loose = {0};
    int at = 0;

    cube_list_init(&head);
    CHECK(cube_list_is_empty(&head));
    for (int i = 0; i < 5; i++) {
        beads[i].number = i;
        cube_list_add(&head, &beads[i].link);
    }
    cube_list_remove(&beads[2].link);
    cube_list_remove(&beads[2].link);   /* twice is harmless */
    cube_list_remove(&loose.link);      /* and so is one that is in none */
    for (struct cube_list *l = head.next; l != &head; l = l->next) {
        static const int want[] = { 0, 1, 3, 4 };

        CHECK_INT(CUBE_OF(l, struct bead, link)->number, want[at++]);
    }
    CHECK_INT(at, 4);
}

#define KEYS 200

TEST(a_map_follows_its_model)
{
    struct cube_map m;
    int values[KEYS], order[KEYS], used = 0;
    bool is_in[KEYS] = {false};

    cube_map_init(&m, test_random());
    for (int step = 0; step < 20000; step++) {
        int k = (int)test_below(KEYS);
        char key[16];

        snprintf(key, sizeof key, "task-%d", k);
        if (test_below(2)) {
            void *old = cube_map_put(&m, key, &values[k]);

            CHECK(old == (is_in[k] ? &values[k] : NULL));
            if (!is_in[k])
                order[used++] = k;
            is_in[k] = true;
        } else {
            CHECK(cube_map_remove(&m, key) == (is_in[k] ? &values[k] : NULL));
            for (int i = 0; is_in[k] && i < used; i++) {
                if (order[i] == k) {
                    memmove(order + i, order + i + 1,
                            (size_t)(--used - i) * sizeof *order);
                    break;
                }
            }
            is_in[k] = false;
        }
        REQUIRE(m.count == (size_t)used);
        CHECK(cube_map_get(&m, key) == (is_in[k] ? &values[k] : NULL));
        if (step % 100 == 0) {
            size_t at = 0;
            void *value;
            int i = 0;

            while (cube_map_next(&m, &at, NULL, &value))
                REQUIRE(i < used && value == &values[order[i++]]);
            CHECK_INT(i, used);
        }
    }
    cube_map_free(&m);
}

TEST(a_map_may_lose_entries_while_it_is_walked)
{
    struct cube_map m;
    size_t at = 0;
    const char *key;
    void *value;
    int left = 0;

    cube_map_init(&m, 1);
    CHECK(cube_map_get(&m, "") == NULL);
    CHECK(cube_map_remove(&m, "x") == NULL);
    for (char c = 'a'; c <= 'z'; c++)
        cube_map_put(&m, (char[]){ c, 0 }, &m);
    while (cube_map_next(&m, &at, &key, &value)) {
        if (key[0] % 2)
            cube_map_remove(&m, (char[]){ key[0], 0 });
    }
    for (at = 0; cube_map_next(&m, &at, &key, &value); left++)
        CHECK(key[0] % 2 == 0);
    CHECK_INT(left, 13);
    CHECK(cube_map_getn(&m, "bc", 1) == &m);
    cube_map_free(&m);
}

/* ---- Hashes and codes ---- */

TEST(siphash_is_that_of_its_paper)
{
    unsigned char in[15];

    for (unsigned char i = 0; i < sizeof in; i++)
        in[i] = i;
    /* Aumasson and Bernstein 2012, appendix A */
    CHECK_UINT(cube_siphash(0x0706050403020100u, 0x0f0e0d0c0b0a0908u, in, 15),
               0xa129ca6149be45e5u);
}

TEST(sha256_is_that_of_the_standard)
{
    static const struct { size_t len; const char *hex; } rows[] = {
        /* bytes 0, 1, .. 250, 0, ..: lengths around the block borders */
        { 0, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852"
             "b855" },
        { 3, "ae4b3280e56e2faf83f414a6e3dabe9d5fbe18976544c05fed121accb85b"
             "53fc" },
        { 55, "463eb28e72f82e0a96c0a4cc53690c571281131f672aa229e0d45ae59b59"
              "8b59" },
        { 56, "da2ae4d6b36748f2a318f23e7ab1dfdf45acdc9d049bd80e59de82a60895"
              "f562" },
        { 63, "29af2686fd53374a36b0846694cc342177e428d1647515f078784d69cdb9"
              "e488" },
        { 64, "fdeab9acf3710362bd2658cdc9a29e8f9c757fcf9811603a8c447cd1d915"
              "1108" },
        { 65, "4bfd2c8b6f1eec7a2afeb48b934ee4b2694182027e6d0fc075074f2fabb3"
              "1781" },
        { 119, "da18797ed7c3a777f0847f429724a2d8cd5138e6ed2895c3fa1a6d39d18"
               "f7ec6" },
        { 120, "f52b23db1fbb6ded89ef42a23ce0c8922c45f25c50b568a93bf1c075420"
               "bbb7c" },
        { 1000, "4e4c294b331f7a2099a379bec34b9f9fc03dc46ab465d998f4d683da53"
                "487e6d" },
    };
    unsigned char data[1000], hash[32];
    char hex[65];

    for (size_t i = 0; i < sizeof data; i++)
        data[i] = (unsigned char)(i % 251);
    for (size_t i = 0; i < COUNT(rows); i++) {
        test_row("%zu bytes", rows[i].len);
        cube_sha256(data, rows[i].len, hash);
        cube_hex(hash, 32, hex);
        CHECK_STR(hex, rows[i].hex);
    }
    cube_sha256("abc", 3, hash);   /* FIPS 180-4 */
    cube_hex(hash, 32, hex);
    CHECK_STR(hex, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61"
                   "f20015ad");
}

TEST(base64_is_that_of_rfc_4648)
{
    static const struct { const char *plain, *coded; } rows[] = {
        { "", "" },             { "f", "Zg==" },
        { "fo", "Zm8=" },       { "foo", "Zm9v" },
        { "foob", "Zm9vYg==" }, { "fooba", "Zm9vYmE=" },
        { "foobar", "Zm9vYmFy" },
    };
    static const char *const bad[] = { "Z", "Zg=x", "Zm9v\n", "Z g=", "Zm9vY",
                                       "Zm%v" };
    struct cube_buf b = {0};

    for (size_t i = 0; i < COUNT(rows); i++) {
        const char *plain = rows[i].plain, *coded = rows[i].coded;

        test_row("\"%s\"", plain);
        cube_buf_clear(&b);
        cube_base64_encode(&b, plain, strlen(plain), false);
        CHECK_MEM(b.len ? b.data : "", coded, strlen(coded));
        CHECK_UINT(b.len, strlen(coded));
        cube_buf_clear(&b);
        CHECK_INT(cube_base64_decode(&b, coded, strlen(coded)), 0);
        CHECK_UINT(b.len, strlen(plain));
        CHECK_MEM(b.len ? b.data : "", plain, strlen(plain));
        cube_buf_clear(&b);     /* without its padding as well */
        CHECK_INT(cube_base64_decode(&b, coded, strcspn(coded, "=")), 0);
        CHECK_UINT(b.len, strlen(plain));
    }
    for (size_t i = 0; i < COUNT(bad); i++) {
        test_row("\"%s\"", bad[i]);
        CHECK_INT(cube_base64_decode(&b, bad[i], strlen(bad[i])), -1);
    }
    test_row("%s", "");
    cube_buf_clear(&b);
    cube_base64_encode(&b, "\xfb\xff\xbf", 3, false);
    cube_base64_encode(&b, "\xfb\xff\xbf", 3, true);
    CHECK_STR(b.data, "+/+/-_-_");
    cube_buf_free(&b);
}

TEST(base64_gives_back_any_bytes)
{
    struct cube_buf coded = {0}, plain = {0};

    for (size_t len = 0; len < 200; len++) {
        unsigned char data[200];

        for (size_t i = 0; i < len; i++)
            data[i] = (unsigned char)test_random();
        cube_buf_clear(&coded);
        cube_buf_clear(&plain);
        cube_base64_encode(&coded, data, len, len % 2);
        CHECK_UINT(coded.len, (len + 2) / 3 * 4);
        CHECK_INT(cube_base64_decode(&plain, coded.data, coded.len), 0);
        REQUIRE(plain.len == len);
        CHECK(len == 0 || memcmp(plain.data, data, len) == 0);
    }
    cube_buf_free(&coded);
    cube_buf_free(&plain);
}

TEST(a_secret_is_compared_whole)
{
    CHECK(cube_secret_is("token", 5, "token"));
    CHECK(!cube_secret_is("toke", 4, "token"));
    CHECK(!cube_secret_is("tokeX", 5, "token"));
    CHECK(!cube_secret_is("token\0", 6, "token"));
    CHECK(!cube_secret_is("", 0, "token"));
}

/* ---- UUIDs ---- */

#define PLAIN "f47ac10b-58cc-4372-a567-0e02b2c3d479"

TEST(a_uuid_is_read_in_four_forms)
{
    static const struct { const char *in; int result; const char *why; }
    rows[] = {
        { PLAIN, 0, "the plain one" },
        { "F47AC10B-58CC-4372-A567-0E02B2C3D479", 0, "capitals" },
        { "urn:uuid:" PLAIN, 0, "as URN" },
        { "URN:UUID:" PLAIN, 0, "whose prefix has no case" },
        { "{" PLAIN "}", 0, "in braces" },
        { "f47ac10b58cc4372a5670e02b2c3d479", 0, "without dashes" },
        { "", -1, "empty" },
        { "f47ac10b-58cc-4372-a567-0e02b2c3d47", -1, "a digit short" },
        { PLAIN "0", -1, "a digit long" },
        { "f47ac10b-58cc-4372-a567-0e02b2c3d47g", -1, "g is no digit" },
        { "f47ac10b058cc-4372-a567-0e02b2c3d479", -1, "a dash misplaced" },
        { "f47ac10b-58cc-4372-a567-0e02b2c3-479", -1, "a dash too many" },
        { "{" PLAIN ")", -1, "braces that do not match" },
        { "urn:guid:" PLAIN, -1, "another URN" },
        { " " PLAIN, -1, "space" },
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        char out[CUBE_UUID_TEXT] = "";

        test_row("%s: %s", rows[i].why, rows[i].in);
        CHECK_INT(cube_uuid_parse(rows[i].in, strlen(rows[i].in), out),
                  rows[i].result);
        if (rows[i].result == 0)
            CHECK_STR(out, PLAIN);
    }
}

TEST(a_new_uuid_is_random_and_says_so)
{
    char a[CUBE_UUID_TEXT], b[CUBE_UUID_TEXT], again[CUBE_UUID_TEXT];

    for (int i = 0; i < 100; i++) {
        cube_uuid_new(cube_world_real(), a);
        cube_uuid_new(cube_world_real(), b);
        CHECK(strcmp(a, b) != 0);
        CHECK_UINT(strlen(a), 36);
        CHECK_INT(a[14], '4');                    /* RFC 9562: version 4 */
        CHECK(strchr("89ab", a[19]) != NULL);     /* and its variant */
        CHECK_INT(cube_uuid_parse(a, 36, again), 0);
        CHECK_STR(again, a);
    }
}

/* ---- Times ---- */

TEST(times_are_read_as_rfc_3339)
{
    static const struct {
        const char *in;
        int result;
        int64_t unix_sec;
        int32_t nsec;
        int offset;
        const char *out;   /* NULL: as it came in */
    } rows[] = {
        { "1970-01-01T00:00:00Z", 0, 0, 0, 0, NULL },
        { "2024-02-29T12:34:56Z", 0, 1709210096, 0, 0, NULL },
        { "2024-02-29T12:34:56.5Z", 0, 1709210096, 500000000, 0, NULL },
        { "2024-02-29T12:34:56.123456789Z", 0, 1709210096, 123456789, 0,
          NULL },
        { "2024-02-29T12:34:56.120000000Z", 0, 1709210096, 120000000, 0,
          "2024-02-29T12:34:56.12Z" },
        { "2024-02-29T12:34:56.1234567899Z", 0, 1709210096, 123456789, 0,
          "2024-02-29T12:34:56.123456789Z" },
        { "2024-02-29T12:34:56.000000001Z", 0, 1709210096, 1, 0, NULL },
        { "2024-02-29T14:34:56+02:00", 0, 1709210096, 0, 120, NULL },
        { "2024-02-29T07:04:56-05:30", 0, 1709210096, 0, -330, NULL },
        { "2024-02-29T12:34:56+00:00", 0, 1709210096, 0, 0,
          "2024-02-29T12:34:56Z" },
        { "2000-02-29T00:00:00Z", 0, 951782400, 0, 0, NULL },
        { "9999-12-31T23:59:59Z", 0, 253402300799, 0, 0, NULL },
        { "0001-01-01T00:00:00Z", 0, -62135596800, 0, 0, NULL },
        { "0000-01-01T00:00:00Z", -1, 0, 0, 0, NULL },
        { "1900-02-29T00:00:00Z", -1, 0, 0, 0, NULL },  /* no leap year */
        { "2023-02-29T00:00:00Z", -1, 0, 0, 0, NULL },
        { "2024-02-30T00:00:00Z", -1, 0, 0, 0, NULL },
        { "2024-04-31T00:00:00Z", -1, 0, 0, 0, NULL },
        { "2024-13-01T00:00:00Z", -1, 0, 0, 0, NULL },
        { "2024-00-01T00:00:00Z", -1, 0, 0, 0, NULL },
        { "2024-01-00T00:00:00Z", -1, 0, 0, 0, NULL },
        { "2024-01-01T24:00:00Z", -1, 0, 0, 0, NULL },
        { "2024-01-01T00:60:00Z", -1, 0, 0, 0, NULL },
        { "2024-01-01T00:00:60Z", -1, 0, 0, 0, NULL },
        { "2024-01-01T00:00:00", -1, 0, 0, 0, NULL },   /* no zone */
        { "2024-01-01 00:00:00Z", -1, 0, 0, 0, NULL },
        { "2024-01-01T00:00:00.Z", -1, 0, 0, 0, NULL },
        { "2024-01-01T00:00:00Zx", -1, 0, 0, 0, NULL },
        { "2024-01-01T00:00:00+0200", -1, 0, 0, 0, NULL },
        { "2024-01-01T00:00:00+24:00", -1, 0, 0, 0, NULL },
        { "2024-01-01T00:00:00+02:60", -1, 0, 0, 0, NULL },
        { "24-01-01T00:00:00Z", -1, 0, 0, 0, NULL },
        { "", -1, 0, 0, 0, NULL },
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct cube_time t = {0};
        char out[CUBE_TIME_TEXT];

        test_row("%s", rows[i].in);
        CHECK_INT(cube_time_parse(rows[i].in, strlen(rows[i].in), &t),
                  rows[i].result);
        if (rows[i].result < 0)
            continue;
        CHECK_INT(t.sec, rows[i].unix_sec + CUBE_SEC_TO_1970);
        CHECK_INT(t.nsec, rows[i].nsec);
        CHECK_INT(t.offset_min, rows[i].offset);
        cube_time_format(&t, out);
        CHECK_STR(out, rows[i].out ? rows[i].out : rows[i].in);
    }
}

TEST(the_unset_time_is_that_of_the_wire)
{
    struct cube_time t = {0};
    char out[CUBE_TIME_TEXT];

    CHECK(!cube_time_is_set(&t));
    cube_time_format(&t, out);
    CHECK_STR(out, "0001-01-01T00:00:00Z");
    t = cube_time_from_ns(0);
    CHECK(cube_time_is_set(&t));
    CHECK_INT(cube_time_to_ns(&t), 0);
}

TEST(times_agree_with_the_c_library)
{
    for (int i = 0; i < 5000; i++) {
        time_t sec = (time_t)(test_random() % 253402300800u);
        int64_t ns;
        struct cube_time t, back;
        struct tm tm;
        char want[64], out[CUBE_TIME_TEXT];

        if (i % 2)
            sec = -(time_t)(test_random() % 62135596800u);
        gmtime_r(&sec, &tm);
        snprintf(want, sizeof want, "%04d-%02d-%02dT%02d:%02d:%02dZ",
                 tm.tm_year + 1900, tm.tm_mon + 1, tm.tm_mday, tm.tm_hour,
                 tm.tm_min, tm.tm_sec);
        t = (struct cube_time){ sec + CUBE_SEC_TO_1970, 0, 0 };
        cube_time_format(&t, out);
        CHECK_STR(out, want);
        CHECK_INT(cube_time_parse(out, strlen(out), &back), 0);
        CHECK_INT(back.sec, t.sec);
        ns = (int64_t)test_random() / 2;
        t = cube_time_from_ns(ns);
        CHECK_INT(cube_time_to_ns(&t), ns);
        CHECK(t.nsec >= 0 && t.nsec < 1000000000);
    }
}

/* ---- Files ---- */

static const char *in_dir(const char *name)
{
    static char path[400];

    snprintf(path, sizeof path, "%s/%s", test_dir(), name);
    return path;
}

TEST(delays_double_up_to_a_limit)
{
    static const int64_t want[] = {100, 200, 400, 500, 500};

    for (size_t i = 0; i < COUNT(want); i++)
        CHECK_INT(cube_doubled(100, (int64_t)i, 500), want[i]);
    CHECK_INT(cube_doubled(100, -1, 500), 100);
    CHECK_INT(cube_doubled(100, INT64_MAX, INT64_MAX), INT64_MAX);
}

TEST(a_file_is_replaced_whole_and_read_back)
{
    const struct cube_world *w = cube_world_real();
    struct cube_err err = {0};
    struct cube_buf b = {0};
    char big[10000];

    memset(big, 'b', sizeof big);
    CHECK_INT(cube_file_replace(w, in_dir("f"), big, sizeof big, &err), 0);
    CHECK_INT(cube_file_read(w, in_dir("f"), &b, sizeof big, &err), 0);
    CHECK_UINT(b.len, sizeof big);
    CHECK_INT(cube_file_read(w, in_dir("f"), &b, sizeof big - 1, &err), -1);
    CHECK_INT(err.code, CUBE_ETOOBIG);
    CHECK_INT(cube_file_replace(w, in_dir("f"), "x", 1, &err), 0);
    CHECK_INT(cube_file_read(w, in_dir("f"), &b, 100, &err), 0);
    CHECK_STR(b.data, "x");
    CHECK(access(in_dir("f.new"), F_OK) != 0);
    CHECK_INT(cube_file_read(w, in_dir("none"), &b, 100, &err), -1);
    CHECK_INT(err.code, CUBE_ENOENT);
    CHECK_HAS(err.text, "none");
    CHECK_INT(cube_file_replace(w, in_dir("no/f"), "x", 1, &err), -1);
    CHECK_INT(cube_file_read(w, "/proc/self/status", &b, 1 << 20, &err), 0);
    CHECK_HAS(b.data, "State:");   /* whose size reads as 0 */
    cube_buf_free(&b);
}

TEST(directories_are_made_with_those_above)
{
    const struct cube_world *w = cube_world_real();
    struct cube_err err = {0};
    struct stat st;

    CHECK_INT(cube_dir_make(w, in_dir("a/b/c"), &err), 0);
    CHECK_INT(cube_dir_make(w, in_dir("a/b/c"), &err), 0);
    CHECK_INT(cube_dir_make(w, in_dir("a/d/"), &err), 0);
    CHECK_INT(stat(in_dir("a/b/c"), &st), 0);
    CHECK(S_ISDIR(st.st_mode));
    CHECK_INT(st.st_mode & 0777, 0700);
    CHECK_INT(stat(in_dir("a/d"), &st), 0);
    CHECK_INT(cube_file_replace(w, in_dir("a/f"), "x", 1, &err), 0);
    CHECK_INT(cube_dir_make(w, in_dir("a/f/g"), &err), -1);
    CHECK_HAS(err.text, "a/f/g");
}

TEST(memory_comes_zeroed_and_grows)
{
    char *p = cube_alloc(1000);

    for (int i = 0; i < 1000; i++)
        CHECK_INT(p[i], 0);
    p[999] = 'x';
    p = cube_resize(p, 100000);
    CHECK_INT(p[999], 'x');
    cube_free(p);
    cube_free(NULL);
    cube_free(cube_alloc(0));
}

/* ---- Drawings ---- */

TEST(drawing_of_a_buffers_room_is_true)
{
    struct cube_buf b = {0};

    for (int i = 0; i < 250; i++)
        cube_buf_addc(&b, 'x');
    CHECK_UINT(b.cap, 256);
    cube_buf_add(&b, "0123456789", 10);
    CHECK_UINT(b.cap, 512);
    CHECK_INT(b.data[260], 0);
    cube_buf_free(&b);
}

static void check_map(const struct cube_map *m, const char *keys, size_t used,
                      size_t count)
{
    struct cube_buf seen = {0};

    for (size_t i = 0; i < m->used; i++)
        cube_buf_printf(&seen, "%s ",
                        m->entries[i].key ? m->entries[i].key : "-");
    CHECK_STR(seen.data, keys);
    CHECK_UINT(m->used, used);
    CHECK_UINT(m->count, count);
    cube_buf_free(&seen);
}

TEST(drawing_of_a_maps_entries_is_true)
{
    struct cube_map m = {0};

    cube_map_put(&m, "web", &m);
    cube_map_put(&m, "db", &m);
    cube_map_put(&m, "cache", &m);
    check_map(&m, "web db cache ", 3, 3);
    cube_map_remove(&m, "db");
    check_map(&m, "web - cache ", 3, 2);
    cube_map_put(&m, "log", &m);
    check_map(&m, "web - cache log ", 4, 3);
    cube_map_grow(&m);
    check_map(&m, "web cache log ", 3, 3);
    CHECK_UINT(m.moved, 1);
    cube_map_free(&m);
}

TEST(drawings_of_base64_and_of_months_are_true)
{
    static const int before[] = {0,   31,  61,  92,  122, 153,
                                 184, 214, 245, 275, 306, 337};
    static const char *const texts[] = {"TQ==", "TWE=", "TWFu"};
    int64_t march = cube_days_of(2000, 3, 1);

    for (size_t n = 1; n <= 3; n++) {
        struct cube_buf b = {0};

        cube_base64_encode(&b, "Man", n, false);
        CHECK_STR(b.data, texts[n - 1]);
        cube_buf_free(&b);
    }
    CHECK_INT(march, 730179);
    CHECK_INT(cube_days_of(1, 1, 1), 0);
    for (int m = 0; m < 12; m++)
        CHECK_INT(cube_days_of(2000 + m / 10, (m + 2) % 12 + 1, 1) - march,
                  before[m]);
}
