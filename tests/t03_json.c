/*
 * Chapter 3, JSON: what is accepted, each error with its number and place,
 * the shape of a tree, printing, and the short ways to read and write.
 *
 * Every text is parsed where it ends at an unreadable page, so that a look
 * behind the end is a crash.
 */
#include "test.h"
#include <locale.h>
#include <sys/mman.h>

/* ---- Texts that end at a guard page ---- */

struct guarded {
    char *map;
    size_t mapped;
    char *text;
};

static struct guarded guarded_copy(const void *text, size_t size)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    struct guarded g;

    g.mapped = (size + page - 1) / page * page + page;
    g.map = mmap(NULL, g.mapped, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(g.map != MAP_FAILED);
    mprotect(g.map + g.mapped - page, page, PROT_NONE);
    g.text = g.map + g.mapped - page - size;
    if (size > 0)
        memcpy(g.text, text, size);
    return g;
}

static void guarded_free(struct guarded *g)
{
    munmap(g->map, g->mapped);
}

static struct json_value_s *parse_guarded(const void *text, size_t size,
                                          struct json_parse_result_s *result)
{
    struct guarded g = guarded_copy(text, size);
    struct json_value_s *root = json_parse_ex(
        g.text, size, json_parse_flags_default, NULL, NULL, result);

    guarded_free(&g);
    return root;
}

/* Expects a text to parse and to print, minified, as `want`. */
static void check_minified(const char *text, const char *want)
{
    struct json_parse_result_s result;
    struct json_value_s *root = parse_guarded(text, strlen(text), &result);
    size_t size = 0;
    char *printed;

    CHECK_UINT(result.error, 0);
    REQUIRE(root != NULL);
    printed = json_write_minified(root, &size);
    CHECK_STR(printed, want);
    CHECK_UINT(size, strlen(want) + 1);
    CUBE_FREE(printed);
    CUBE_FREE(root);
}

/* ---- Parsing ---- */

TEST(texts_of_the_grammar_parse)
{
    static const struct {
        const char *text, *minified;
    } rows[] = {
        {"{}", "{}"},
        {" [ ] ", "[]"},
        {"null", "null"},
        {"\t\r\n true \n", "true"},
        {"false", "false"},
        {"\"\"", "\"\""},
        {"0", "0"},
        {"-0", "-0"},
        {"-0.0e-0", "-0.0e-0"},
        {"123456789012345678901234567890", "123456789012345678901234567890"},
        {"1E+5", "1E+5"},
        {"1.25e-3 ", "1.25e-3"},
        {"[1 , 2,[ ],{ } , \"a\"]", "[1,2,[],{},\"a\"]"},
        {"{\"a\" : 1 , \"b\":{\"c\":[null]}}",
         "{\"a\":1,\"b\":{\"c\":[null]}}"},
        {"{\"\":0}", "{\"\":0}"},
        {"{\"a\":1,\"a\":2,\"0\":3}", "{\"a\":1,\"a\":2,\"0\":3}"},
        {"\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"", "\"\\\"\\\\/\\b\\f\\n\\r\\t\""},
        {"\"\\u0041\\u00e9\\u20AC\\uD83D\\uDE00\"",
         "\"A\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\""},
        {"\"\\u0000\\u001f\\u007f\"", "\"\\u0000\\u001f\x7f\""},
        {"\"\\uffff\\ud800\\udc00\\udbff\\udfff\"",
         "\"\xef\xbf\xbf\xf0\x90\x80\x80\xf4\x8f\xbf\xbf\""},
        {"\"\x7f\xc2\x80\xdf\xbf\xe0\xa0\x80\xed\x9f\xbf\xee\x80\x80\"",
         "\"\x7f\xc2\x80\xdf\xbf\xe0\xa0\x80\xed\x9f\xbf\xee\x80\x80\""},
        {"\"0123456\\n89abcdef0123456\xc3\xa9 tail\"",
         "\"0123456\\n89abcdef0123456\xc3\xa9 tail\""},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        test_row("%s", rows[i].text);
        check_minified(rows[i].text, rows[i].minified);
    }
}

#define E_COMMA json_parse_error_expected_comma_or_closing_bracket
#define E_COLON json_parse_error_expected_colon
#define E_ESCAPE json_parse_error_invalid_string_escape_sequence
#define E_NUMBER json_parse_error_invalid_number_format
#define E_VALUE json_parse_error_invalid_value
#define E_END json_parse_error_premature_end_of_buffer
#define E_STRING json_parse_error_invalid_string
#define E_TRAIL json_parse_error_unexpected_trailing_characters

TEST(errors_have_their_number_and_place)
{
    static const struct {
        const char *text;
        size_t error, offset, line, row;
    } rows[] = {
        {"", E_END, 0, 1, 0},
        {"  \n ", E_END, 4, 2, 2},
        {"\xef\xbb\xbf{}", E_VALUE, 0, 1, 0}, /* a byte-order mark */
        {"{} x", E_TRAIL, 3, 1, 3},
        {"1 2", E_TRAIL, 2, 1, 2},
        {"true\nfalse", E_TRAIL, 5, 2, 1},
        {"nul", E_VALUE, 0, 1, 0},
        {"True", E_VALUE, 0, 1, 0},
        {"'a'", E_VALUE, 0, 1, 0},
        {"NaN", E_VALUE, 0, 1, 0},
        {"/**/1", E_VALUE, 0, 1, 0},
        /* containers */
        {"[", E_END, 1, 1, 1},
        {"[1", E_END, 2, 1, 2},
        {"[1,", E_END, 3, 1, 3},
        {"[1 2]", E_COMMA, 3, 1, 3},
        {"[1,]", E_VALUE, 3, 1, 3},
        {"[,1]", E_VALUE, 1, 1, 1},
        {"[1}", E_COMMA, 2, 1, 2},
        {"]", E_VALUE, 0, 1, 0},
        {"[truex]", E_COMMA, 5, 1, 5},
        {"{", E_END, 1, 1, 1},
        {"{\"a\"", E_END, 4, 1, 4},
        {"{\"a\":", E_END, 5, 1, 5},
        {"{\"a\":1", E_END, 6, 1, 6},
        {"{\"a\":1,", E_END, 7, 1, 7},
        {"{\"a\" 1}", E_COLON, 5, 1, 5},
        {"{\"a\":}", E_VALUE, 5, 1, 5},
        {"{\"a\":1 \"b\":2}", E_COMMA, 7, 1, 7},
        {"{\"a\":1]", E_COMMA, 6, 1, 6},
        {"{\n \"a\" :\n  x}", E_VALUE, 11, 3, 3},
        /* whatever is wrong with a key is an invalid string */
        {"{1:2}", E_STRING, 1, 1, 1},
        {"{a:1}", E_STRING, 1, 1, 1},
        {"{,}", E_STRING, 1, 1, 1},
        {"{\"a\":1,}", E_STRING, 7, 1, 7},
        {"{\"a", E_STRING, 2, 1, 2},
        {"{\"\\x\":1}", E_STRING, 3, 1, 3},
        /* strings */
        {"\"", E_END, 0, 1, 0},
        {"\"abc", E_END, 3, 1, 3},
        {"\"a\\", E_END, 3, 1, 3},
        {"\"\\x\"", E_ESCAPE, 2, 1, 2},
        {"\"\\U0041\"", E_ESCAPE, 2, 1, 2},
        {"\"\\u00", E_ESCAPE, 2, 1, 2},
        {"\"\\u0041", E_ESCAPE, 2, 1, 2},
        {"\"\\u00g0\"", E_ESCAPE, 2, 1, 2},
        {"\"\\ud800\"", E_ESCAPE, 2, 1, 2},
        {"\"\\ud800abcdef\"", E_ESCAPE, 2, 1, 2},
        {"\"\\udc00\"", E_ESCAPE, 2, 1, 2},
        {"\"\\ud800\\u0041\"", E_ESCAPE, 8, 1, 8},
        {"\"\\ud800\\ud800\"", E_ESCAPE, 8, 1, 8},
        {"\"\\ud83d\\ude00", E_ESCAPE, 8, 1, 8},
        {"\"a\nb\"", E_ESCAPE, 2, 1, 2},
        {"\"a\rb\"", E_ESCAPE, 2, 1, 2},
        {"\"a\tb\"", E_STRING, 2, 1, 2},
        {"\"a\x01\"", E_STRING, 2, 1, 2},
        {"\"01234567\x1f\"", E_STRING, 9, 1, 9},
        {"\"a\x80\"", E_STRING, 2, 1, 2},
        {"\"\xc0\x80\"", E_STRING, 1, 1, 1},
        {"\"\xc3\"", E_STRING, 1, 1, 1},
        {"\"\xc3", E_STRING, 1, 1, 1},
        {"\"\xe0\x9f\xbf\"", E_STRING, 1, 1, 1},
        {"\"\xed\xa0\x80\"", E_STRING, 1, 1, 1}, /* a surrogate */
        {"\"\xf4\x90\x80\x80\"", E_STRING, 1, 1, 1},
        {"\"\xf5\x80\x80\x80\"", E_STRING, 1, 1, 1},
        /* numbers */
        {"-", E_NUMBER, 1, 1, 1},
        {"-a", E_NUMBER, 1, 1, 1},
        {"+1", E_NUMBER, 0, 1, 0},
        {".5", E_NUMBER, 0, 1, 0},
        {"01", E_NUMBER, 1, 1, 1},
        {"-01", E_NUMBER, 2, 1, 2},
        {"1.", E_NUMBER, 2, 1, 2},
        {"1.e5", E_NUMBER, 2, 1, 2},
        {"1e", E_NUMBER, 2, 1, 2},
        {"1e+", E_NUMBER, 3, 1, 3},
        {"1e5.5", E_NUMBER, 3, 1, 3},
        {"0x10", E_NUMBER, 1, 1, 1},
        {"1a", E_NUMBER, 1, 1, 1},
        {"[1:2]", E_NUMBER, 2, 1, 2},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct json_parse_result_s result;

        test_row("%s", rows[i].text);
        CHECK(!parse_guarded(rows[i].text, strlen(rows[i].text), &result));
        CHECK_UINT(result.error, rows[i].error);
        CHECK_UINT(result.error_offset, rows[i].offset);
        CHECK_UINT(result.error_line_no, rows[i].line);
        CHECK_UINT(result.error_row_no, rows[i].row);
    }
}

TEST(a_nul_is_no_space_and_no_end)
{
    static const struct {
        const char *text;
        size_t size, error, offset;
    } rows[] = {
        {"1\0", 2, E_NUMBER, 1},
        {"{}\0", 3, E_TRAIL, 2},
        {"\"a\0b\"", 5, E_STRING, 2},
        {"[\0]", 3, E_VALUE, 1},
        {"\"\\\0\"", 4, E_ESCAPE, 2},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct json_parse_result_s result;

        test_row("row %zu", i);
        CHECK(!parse_guarded(rows[i].text, rows[i].size, &result));
        CHECK_UINT(result.error, rows[i].error);
        CHECK_UINT(result.error_offset, rows[i].offset);
    }
}

TEST(no_text_is_no_error)
{
    struct json_parse_result_s result = {9, 9, 9, 9};

    CHECK(!json_parse_ex(NULL, 5, json_parse_flags_default, NULL, NULL,
                         &result));
    CHECK_UINT(result.error, json_parse_error_none);
    CHECK_UINT(result.error_offset + result.error_line_no +
                   result.error_row_no,
               0);
    CHECK(!json_parse(NULL, 0));
    CHECK(!json_parse("[", 1));
}

/* Every text cut short is an error, and nothing behind the cut is read. */
TEST(prefixes_of_documents_do_not_parse)
{
    static const char *const texts[] = {
        ("{\"a\":[1.5e+3,true,null,\"\\u00e9\\ud83d\\ude00\\n"
         "\xf0\x9f\x98\x80\"],\"b\":{\"c\":{}}}"),
        "[false,-0.1E-2,[[],{}],\"0123456789abcdef\\\"\"]",
        "\"\\\\\\/\\b a longer text in a string \xe2\x82\xac\"",
    };

    for (size_t i = 0; i < COUNT(texts); i++) {
        for (size_t size = 0; size < strlen(texts[i]); size++) {
            struct json_parse_result_s result;

            test_row("%zu bytes of text %zu", size, i);
            CHECK(!parse_guarded(texts[i], size, &result));
            CHECK(result.error != json_parse_error_none);
            CHECK(result.error_offset <= size);
        }
        check_minified(texts[i], texts[i][0] == '"'
                                     ? "\"\\\\/\\b a longer text in a string "
                                       "\xe2\x82\xac\""
                                 : i == 0
                                     ? "{\"a\":[1.5e+3,true,null,\"\xc3\xa9"
                                       "\xf0\x9f\x98\x80\\n\xf0\x9f\x98\x80\""
                                       "],\"b\":{\"c\":{}}}"
                                     : texts[i]);
    }
}

/* Which sequences of bytes are UTF-8, counted against Unicode's own figures:
 * 0x110000 code points less 0x800 surrogates. */
TEST(all_of_utf8_and_no_more)
{
    unsigned char p[4];
    size_t two = 0, three = 0, four = 0;

    for (int a = 0x80; a < 0x100; a++) {
        for (int b = 0; b < 0x100; b++) {
            p[0] = (unsigned char)a;
            p[1] = (unsigned char)b;
            two += cube_json_utf8(p, 2) == 2;
            for (int c = 0; c < 0x100; c++) {
                p[2] = (unsigned char)c;
                three += cube_json_utf8(p, 3) == 3;
                /* of the last byte, only its bounds */
                p[3] = 0x80;
                four += cube_json_utf8(p, 4) == 4;
                p[3] = 0xbf;
                four += cube_json_utf8(p, 4) == 4;
                p[3] = 0x7f;
                CHECK(cube_json_utf8(p, 4) != 4);
                p[3] = 0xc0;
                CHECK(cube_json_utf8(p, 4) != 4);
            }
        }
    }
    CHECK_UINT(two, 0x800 - 0x80);
    CHECK_UINT(three, 0x10000 - 0x800 - 0x800);
    CHECK_UINT(four, 0x100000 / 64 * 2);
}

TEST(code_points_are_encoded_as_they_are_recognised)
{
    for (uint32_t point = 0; point < 0x110000; point++) {
        char text[4];
        size_t n = cube_json_encode(point, text);
        bool is_surrogate = point >= 0xd800 && point < 0xe000;

        CHECK(cube_json_utf8((unsigned char *)text, n) ==
              (is_surrogate ? 0 : n));
    }
}

/* ---- The tree ---- */

struct arena {
    size_t calls, size;
    bool is_empty;
    char *block; /* of arena_guarded */
};

static void *arena_alloc(void *user, size_t size)
{
    struct arena *arena = user;

    arena->calls++;
    arena->size = size;
    return arena->is_empty ? NULL : CUBE_MALLOC(size);
}

/* The same with bytes behind the block that must stay as they are. */
static const char arena_fence[16] = "behind the block";

static void *arena_guarded(void *user, size_t size)
{
    struct arena *arena = user;

    arena->size = size;
    arena->block = CUBE_MALLOC(size + sizeof arena_fence);
    memcpy(arena->block + size, arena_fence, sizeof arena_fence);
    return arena->block;
}

TEST(a_tree_is_one_allocation)
{
    static const char text[] = "{\"a\":[1,\"\\n\",{\"b\":null}],\"c\":\"d\"}";
    struct arena arena = {0};
    struct json_parse_result_s result;
    struct json_value_s *root, *copy;

    root = json_parse_ex(text, sizeof text - 1, 0, arena_alloc, &arena,
                         &result);
    CHECK(root != NULL);
    CHECK_UINT(arena.calls, 1);
    CHECK_UINT(result.error, 0);
    arena.calls = 0;
    copy = json_extract_value_ex(root, arena_alloc, &arena);
    CHECK(copy != NULL);
    CHECK_UINT(arena.calls, 1);
    CUBE_FREE(root);
    CUBE_FREE(copy);

    root = json_parse_ex("{}", 2, 0, arena_alloc, &arena, NULL);
    CHECK(arena.size <= 128);
    CUBE_FREE(root);
}

TEST(an_allocator_without_memory_is_an_error_of_its_own)
{
    struct arena arena = {.is_empty = true};
    struct json_parse_result_s result;
    struct json_value_s *root = json_parse("[1]", 3);

    CHECK(!json_parse_ex("\n[1]", 4, 0, arena_alloc, &arena, &result));
    CHECK_UINT(result.error, json_parse_error_allocator_failed);
    CHECK_UINT(result.error_offset + result.error_line_no +
                   result.error_row_no,
               0);
    CHECK(!json_extract_value_ex(root, arena_alloc, &arena));
    CHECK_UINT(arena.calls, 2);
    CUBE_FREE(root);
}

/* The drawing at struct json_value_s. */
TEST(the_tree_is_as_it_is_drawn)
{
    struct json_value_s *root = json_parse("{\"a\":[1]}", 9);
    struct json_object_element_s *member;
    struct json_array_element_s *item;
    struct json_number_s *number;

    REQUIRE(json_value_as_object(root) != NULL);
    CHECK_UINT(root->type, json_type_object);
    CHECK_UINT(json_value_as_object(root)->length, 1);
    member = json_value_as_object(root)->start;
    CHECK_STR(member->name->string, "a");
    CHECK_UINT(member->name->string_size, 1);
    CHECK(member->next == NULL);
    REQUIRE(json_value_as_array(member->value) != NULL);
    CHECK_UINT(json_value_as_array(member->value)->length, 1);
    item = json_value_as_array(member->value)->start;
    CHECK(item->next == NULL);
    number = json_value_as_number(item->value);
    REQUIRE(number != NULL);
    CHECK_STR(number->number, "1");
    CHECK_UINT(number->number_size, 1);
    /* the order in the block is the order of the text */
    CHECK((char *)root < (char *)root->payload);
    CHECK((char *)member < (char *)member->value);
    CHECK((char *)item < (char *)item->value);
    CHECK((char *)number < member->name->string);
    CHECK(member->name->string < number->number);
    CUBE_FREE(root);
}

/* The drawing at struct cube_json_build, whose offsets are those of a machine
 * with 64-bit pointers. */
TEST(the_block_is_as_it_is_drawn)
{
    static const char text[] = "{\"a\":[1,\"\\n\"]}";
    struct arena arena = {0};
    char *block = (char *)json_parse_ex(text, sizeof text - 1, 0, arena_alloc,
                                        &arena, NULL);
    struct json_object_element_s *member;
    struct json_array_element_s *item;

    if (sizeof(void *) != 8)
        SKIP("drawn for 64-bit pointers");
    REQUIRE(block != NULL);
    CHECK_UINT(arena.size, 214);
    member = cube_json_members((struct json_value_s *)block);
    CHECK_INT((char *)member - block, 32);
    CHECK_INT((char *)member->name - block, 56);
    CHECK_INT((char *)member->value - block, 72);
    CHECK_INT((char *)member->value->payload - block, 88);
    item = cube_json_items(member->value);
    CHECK_INT((char *)item - block, 104);
    CHECK_INT((char *)item->value->payload - block, 136);
    CHECK_INT((char *)item->next - block, 152);
    CHECK_INT((char *)item->next->value->payload - block, 184);
    CHECK(memcmp(block + 200, "a\0" "1\0" "\n", 6) == 0);
    CUBE_FREE(block);
}

/* Strings are copied in words, eight bytes wherever one begins. Whatever they
 * are and wherever they stop to be plain, nothing is written behind the block
 * and each text ends in a NUL. */
TEST(a_tree_stays_in_its_block)
{
    static const struct {
        const char *text, *means;
    } odd[] = {{"", ""},
               {"\\n", "\n"},
               {"\\u20ac", "\xe2\x82\xac"},
               {"\\ud83d\\ude00", "\xf0\x9f\x98\x80"},
               {"\xc3\xa9", "\xc3\xa9"}};
    static const char letters[] = "abcdefghijklmnopqrstuvwxyz";

    for (size_t i = 0; i < COUNT(odd) * 20 * 20; i++) {
        size_t kind = i % COUNT(odd);
        int before = (int)(i / COUNT(odd) % 20);
        int after = (int)(i / COUNT(odd) / 20);
        struct arena arena = {0};
        struct cube_buf text = {0}, means = {0};
        struct json_array_element_s *items;
        struct guarded g;

        test_row("%d bytes, %s, %d bytes", before, odd[kind].text, after);
        cube_buf_printf(&text, "[12,\"%.*s%s%.*s\"]", before, letters,
                        odd[kind].text, after, letters);
        cube_buf_printf(&means, "%.*s%s%.*s", before, letters,
                        odd[kind].means, after, letters);
        g = guarded_copy(text.data, text.len);
        items = cube_json_items(json_parse_ex(g.text, text.len, 0,
                                              arena_guarded, &arena, NULL));
        REQUIRE(items != NULL);
        CHECK_STR(cube_json_str(items->next->value, NULL), means.data);
        CHECK(memcmp(arena.block + arena.size, arena_fence,
                     sizeof arena_fence) == 0);
        CUBE_FREE(arena.block);
        guarded_free(&g);
        cube_buf_free(&text);
        cube_buf_free(&means);
    }
}

/* The drawing at struct cube_json_scan. */
TEST(the_sizes_grow_as_they_are_drawn)
{
    static const struct {
        size_t offset, dom, data;
    } rows[] = {{7, 152, 4}, {8, 168, 4}, {9, 200, 6}, {11, 200, 6}};
    static const char text[] = "{\"a\":[1,2]}";
    struct cube_json_scan s = {0};
    const unsigned char *p = (const unsigned char *)text;

    if (sizeof(void *) != 8)
        SKIP("drawn for 64-bit pointers");
    s.src = p;
    s.end = p + sizeof text - 1;
    for (size_t i = 0; i < COUNT(rows); i++) {
        p = i % 2 ? cube_json_scan_after(&s, p) : cube_json_scan_value(&s, p);
        REQUIRE(p != NULL);
        CHECK_INT(p - s.src, rows[i].offset);
        CHECK_UINT(s.dom_size, rows[i].dom);
        CHECK_UINT(s.data_size, rows[i].data);
    }
    CHECK_UINT(s.depth, 0);
}

/* The drawing of the search in a word. */
TEST(marks_in_a_word_are_as_drawn)
{
    uint64_t w = cube_json_load((const unsigned char *)"ab\"cdefg");
    uint64_t turned = w ^ cube_json_ones * 2;
    uint64_t marks = cube_json_marks(w);

    CHECK_UINT(w & 0xffffffff, 0x63226261);
    CHECK_UINT(turned & 0xffffffff, 0x61206063);
    CHECK_UINT((turned - cube_json_ones * 0x21) & 0xffffffff, 0x3fff3f42);
    CHECK_UINT(marks & 0xffffffff, 0x00800000);
    CHECK_UINT(cube_json_first(marks), 2);
}

/* The drawing at enum cube_json_event: a letter for each event. */
TEST(a_walk_goes_as_it_is_drawn)
{
    struct json_value_s *root = json_parse("{\"a\":[],\"b\":[1]}", 16);
    struct cube_json_walk walk;
    enum cube_json_event event = cube_json_walk_start(&walk, root);
    char seen[16];
    size_t n = 0;

    for (; event != CUBE_JSON_DONE && n < sizeof seen - 1;
         event = cube_json_walk_next(&walk, event))
        seen[n++] = "LOCDU"[event];
    seen[n] = 0;
    CHECK_STR(seen, "OLOLCC");
    CUBE_FREE(root);
}

TEST(types_have_upstreams_numbers_and_payloads)
{
    static const struct {
        const char *text;
        size_t type;
    } rows[] = {
        {"\"\"", 0}, {"1", 1},     {"{}", 2},   {"[]", 3},
        {"true", 4}, {"false", 5}, {"null", 6},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct json_value_s *v = json_parse(rows[i].text,
                                            strlen(rows[i].text));

        test_row("%s", rows[i].text);
        REQUIRE(v != NULL);
        CHECK_UINT(v->type, rows[i].type);
        CHECK_INT(v->payload != NULL, i < 4);
        CHECK_INT(json_value_as_string(v) != NULL, i == 0);
        CHECK_INT(json_value_as_number(v) != NULL, i == 1);
        CHECK_INT(json_value_as_object(v) != NULL, i == 2);
        CHECK_INT(json_value_as_array(v) != NULL, i == 3);
        CHECK_INT(json_value_is_true(v), i == 4);
        CHECK_INT(json_value_is_false(v), i == 5);
        CHECK_INT(json_value_is_null(v), i == 6);
        CUBE_FREE(v);
    }
}

TEST(error_numbers_are_upstreams)
{
    CHECK_INT(json_parse_error_none, 0);
    CHECK_INT(json_parse_error_expected_comma_or_closing_bracket, 1);
    CHECK_INT(json_parse_error_expected_colon, 2);
    CHECK_INT(json_parse_error_expected_opening_quote, 3);
    CHECK_INT(json_parse_error_invalid_string_escape_sequence, 4);
    CHECK_INT(json_parse_error_invalid_number_format, 5);
    CHECK_INT(json_parse_error_invalid_value, 6);
    CHECK_INT(json_parse_error_premature_end_of_buffer, 7);
    CHECK_INT(json_parse_error_invalid_string, 8);
    CHECK_INT(json_parse_error_allocator_failed, 9);
    CHECK_INT(json_parse_error_unexpected_trailing_characters, 10);
    CHECK_INT(json_parse_error_recursion, 11);
    CHECK_INT(json_parse_error_unknown, 12);
}

/* `depth` containers in one another, every second one an object. */
static void nest(struct cube_buf *out, size_t depth)
{
    cube_buf_clear(out);
    for (size_t i = 0; i < depth; i++)
        cube_buf_puts(out, i % 2 ? "{\"k\":" : "[");
    cube_buf_puts(out, "1");
    for (size_t i = depth; i-- > 0;)
        cube_buf_puts(out, i % 2 ? "}" : "]");
}

TEST(a_thousand_levels_parse_and_one_more_does_not)
{
    struct cube_buf text = {0};
    struct json_parse_result_s result;
    struct json_value_s *root, *copy;
    char *printed;

    nest(&text, JSON_MAX_RECURSION);
    root = parse_guarded(text.data, text.len, &result);
    REQUIRE(root != NULL);
    copy = json_extract_value(root);
    CUBE_FREE(root);
    printed = json_write_minified(copy, NULL);
    CHECK_STR(printed, text.data);
    CUBE_FREE(printed);
    CUBE_FREE(copy);

    nest(&text, JSON_MAX_RECURSION + 1);
    CHECK(!parse_guarded(text.data, text.len, &result));
    CHECK_UINT(result.error, json_parse_error_recursion);
    cube_buf_clear(&text);
    for (int i = 0; i <= JSON_MAX_RECURSION; i++)
        cube_buf_puts(&text, "[");
    CHECK(!parse_guarded(text.data, text.len, &result));
    CHECK_UINT(result.error, json_parse_error_recursion);
    CHECK_UINT(result.error_offset, JSON_MAX_RECURSION);
    cube_buf_free(&text);
}

/* Trees that no parser made: too deep, broken, of unknown type. */
TEST(trees_that_cannot_be_printed_give_null)
{
    enum { DEPTH = JSON_MAX_RECURSION + 1 };
    static struct json_value_s values[DEPTH + 1];
    static struct json_array_s arrays[DEPTH];
    static struct json_array_element_s items[DEPTH];
    struct json_value_s odd = {NULL, 7}, empty = {NULL, json_type_string};
    size_t size = 5;

    for (size_t i = 0; i < DEPTH; i++) {
        values[i].type = json_type_array;
        values[i].payload = &arrays[i];
        arrays[i].start = &items[i];
        arrays[i].length = 1;
        items[i].value = &values[i + 1];
    }
    values[DEPTH].type = json_type_null;
    CHECK(!json_write_minified(values, &size));
    CHECK(!json_write_pretty(values, NULL, NULL, &size));
    CHECK(!json_extract_value(values));
    CHECK(!json_write_minified(&odd, &size));
    CHECK(!json_extract_value(&odd));
    CHECK(!json_write_minified(&empty, &size));
    CHECK(!json_write_minified(NULL, &size));
    CHECK(!json_write_pretty(NULL, NULL, NULL, &size));
    CHECK(!json_extract_value(NULL));
    CHECK(!json_extract_value_ex(NULL, NULL, NULL));
}

/* A size that no text can have is refused before a byte of it is looked at,
 * be it of a string, a number or a key: no sum of such sizes may wrap. */
TEST(sizes_that_no_text_has_give_null)
{
    static const size_t sizes[] = {SIZE_MAX, SIZE_MAX - 1, SIZE_MAX - 2,
                                   (size_t)1 << (sizeof(size_t) * 8 - 1)};

    for (size_t i = 0; i < COUNT(sizes); i++) {
        struct json_string_s name = {"a", 1}, text = {"b", sizes[i]};
        struct json_number_s number = {"1", sizes[i]};
        struct json_value_s string_value = {&text, json_type_string};
        struct json_value_s number_value = {&number, json_type_number};
        struct json_object_element_s member = {&name, &string_value, NULL};
        struct json_object_s object = {&member, 1};
        struct json_value_s root = {&object, json_type_object};

        test_row("%zx", sizes[i]);
        CHECK(!json_write_minified(&root, NULL));
        CHECK(!json_extract_value(&root));
        member.value = &number_value;
        CHECK(!json_write_minified(&root, NULL));
        CHECK(!json_extract_value(&root));
        name.string_size = sizes[i];
        text.string_size = number.number_size = 1;
        CHECK(!json_write_minified(&root, NULL));
        CHECK(!json_extract_value(&root));
    }
}

/* ---- Printing ---- */

TEST(pretty_is_indented_by_two_spaces_or_as_asked)
{
    static const char text[] = "{\"a\":[1,{\"b\":true}],\"c\":{},\"d\":[]}";
    struct json_value_s *root = json_parse(text, sizeof text - 1);
    size_t size;
    char *printed = json_write_pretty(root, NULL, NULL, &size);

    CHECK_STR(printed, "{\n"
                       "  \"a\" : [\n"
                       "    1,\n"
                       "    {\n"
                       "      \"b\" : true\n"
                       "    }\n"
                       "  ],\n"
                       "  \"c\" : {},\n"
                       "  \"d\" : []\n"
                       "}");
    CHECK_UINT(size, strlen(printed) + 1);
    CUBE_FREE(printed);
    printed = json_write_pretty(root, "\t", "\r\n", &size);
    CHECK_HAS(printed, "{\r\n\t\"a\" : [\r\n\t\t1,\r\n");
    CUBE_FREE(printed);
    printed = json_write_pretty(root, "", "", NULL);
    CHECK_STR(printed, "{\"a\" : [1,{\"b\" : true}],\"c\" : {},\"d\" : []}");
    CUBE_FREE(printed);
    CUBE_FREE(root);
}

TEST(printed_strings_are_json_whatever_the_bytes)
{
    static const char bytes[] = "a\x01\x1f\"\\/\b\f\n\r\t\x7f\xc3\xa9\xff\xc3";
    struct json_string_s string = {bytes, sizeof bytes - 1};
    struct json_value_s value = {&string, json_type_string};
    char *printed = json_write_minified(&value, NULL);

    CHECK_STR(printed, "\"a\\u0001\\u001f\\\"\\\\/\\b\\f\\n\\r\\t\x7f"
                       "\xc3\xa9\xef\xbf\xbd\xef\xbf\xbd\"");
    CUBE_FREE(printed);
}

/* A random text of JSON: a model that knows no tree. */
static void random_string(struct cube_buf *out)
{
    static const char *const pieces[] = {
        "a",      "key",    "0123456789", "\xc3\xa9", "\xf0\x9f\x98\x80",
        "\\\\",   "\\\"",   "\\n",        "\\u0001",  "/",
        "\\b\\f", "\\r\\t", "\xe2\x82\xac", " ",
    };

    cube_buf_puts(out, "\"");
    for (uint32_t n = test_below(6); n > 0; n--)
        cube_buf_puts(out, pieces[test_below(COUNT(pieces))]);
    cube_buf_puts(out, "\"");
}

static void random_value(struct cube_buf *out, int depth)
{
    static const char *const scalars[] = {
        "true", "false", "null", "0", "-1", "3.25e-7", "1E+9", "[]", "{}",
    };
    bool is_object = test_below(2);
    uint32_t count = test_below(5) + 1;

    if (depth == 0 || test_below(3) == 0) {
        if (test_below(3) == 0)
            random_string(out);
        else
            cube_buf_puts(out, scalars[test_below(COUNT(scalars))]);
        return;
    }
    cube_buf_puts(out, is_object ? "{" : "[");
    for (uint32_t i = 0; i < count; i++) {
        if (i > 0)
            cube_buf_puts(out, ",");
        if (is_object) {
            random_string(out);
            cube_buf_puts(out, ":");
        }
        random_value(out, depth - 1);
    }
    cube_buf_puts(out, is_object ? "}" : "]");
}

TEST(random_documents_survive_parsing_copying_and_printing)
{
    for (int round = 0; round < 2000; round++) {
        struct cube_buf text = {0};
        struct json_value_s *root, *copy, *again;
        char *minified, *pretty, *last;
        size_t size;

        random_value(&text, 6);
        root = parse_guarded(text.data, text.len, NULL);
        REQUIRE(root != NULL);
        minified = json_write_minified(root, &size);
        CHECK_STR(minified, text.data);
        CHECK_UINT(size, text.len + 1);
        copy = json_extract_value(root);
        CUBE_FREE(root);
        pretty = json_write_pretty(copy, NULL, NULL, &size);
        CUBE_FREE(copy);
        again = parse_guarded(pretty, size - 1, NULL);
        REQUIRE(again != NULL);
        last = json_write_minified(again, NULL);
        CHECK_STR(last, text.data);
        CUBE_FREE(again);
        CUBE_FREE(minified);
        CUBE_FREE(pretty);
        CUBE_FREE(last);
        cube_buf_free(&text);
    }
}

/* Damaged documents: any answer but a crash, and an accepted one prints. */
TEST(damaged_documents_are_refused_or_consistent)
{
    for (int round = 0; round < 5000; round++) {
        struct cube_buf text = {0};
        struct json_parse_result_s result;
        struct json_value_s *root;

        random_value(&text, 4);
        for (uint32_t n = test_below(3) + 1; n > 0; n--)
            text.data[test_below((uint32_t)text.len)] = (char)test_below(256);
        root = parse_guarded(text.data, text.len, &result);
        CHECK_INT(root != NULL, result.error == json_parse_error_none);
        if (root) {
            char *printed = json_write_minified(root, NULL);
            struct json_value_s *again =
                parse_guarded(printed, strlen(printed), &result);

            CHECK_UINT(result.error, 0);
            CUBE_FREE(again);
            CUBE_FREE(printed);
        }
        CUBE_FREE(root);
        cube_buf_free(&text);
    }
}

/* ---- Linear time ---- */

/* The best of some runs, in processor time. */
static double parse_seconds(const char *text, size_t size, int runs)
{
    double best = 1e9;

    for (int i = 0; i < runs; i++) {
        struct timespec a, b;
        double took;

        clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &a);
        CUBE_FREE(json_parse(text, size));
        clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &b);
        took = (double)(b.tv_sec - a.tv_sec) +
               (double)(b.tv_nsec - a.tv_nsec) / 1e9;
        best = took < best ? took : best;
    }
    return best;
}

/* `size` bytes of opening, repetitions and end. */
static void fill_text(struct cube_buf *out, const char *const parts[3],
                      size_t size)
{
    size_t step = strlen(parts[1]);

    cube_buf_clear(out);
    cube_buf_puts(out, parts[0]);
    while (out->len + step < size)
        cube_buf_add(out, parts[1], step);
    cube_buf_puts(out, parts[2]);
}

TEST(time_grows_with_the_size_whatever_the_text)
{
    static const struct {
        const char *parts[3], *what;
        bool parses;
    } rows[] = {
        {{"", "[", ""}, "brackets", false},
        {{"[", "[],", "0]"}, "empty lists", true},
        {{"\"", "\\n", "\""}, "escapes", true},
        {{"\"", "\\ud83d\\ude00", "\""}, "pairs", true},
        {{"{\"b\":0", ",\"a\":1", "}"}, "one-letter keys", true},
        {{"\"", "a", "\""}, "one string", true},
        {{"\"", "\xc3\xa9", "\""}, "UTF-8", true},
        {{"", " ", "0"}, "spaces", true},
        {{"", "\n", "0"}, "lines", true},
        {{"", "1", ""}, "one number", true},
        {{"[0", ",1", "]"}, "numbers", true},
        {{"\"", "\\\\", ""}, "a string without an end", false},
    };
    const size_t small = 640 << 10, large = 10 << 20;
    struct cube_buf text = {0};

#ifdef __GLIBC__ /* or each large tree is mapped anew, which can take longer
                  * than the parsing, and a small one is not */
    mallopt(M_MMAP_MAX, 0);
    mallopt(M_TRIM_THRESHOLD, 1 << 30);
#endif
    for (size_t i = 0; i < COUNT(rows); i++) {
        double t_small, t_large;
        struct json_value_s *root;

        test_row("%s", rows[i].what);
        fill_text(&text, rows[i].parts, small);
        root = json_parse(text.data, text.len);
        CHECK_INT(root != NULL, rows[i].parses);
        CUBE_FREE(root);
        t_small = parse_seconds(text.data, text.len, 3);
        fill_text(&text, rows[i].parts, large);
        t_large = parse_seconds(text.data, text.len, 1);
        /* sixteen times the size; quadratic would be 256 times the time. A
         * machine that was busy elsewhere gets a second chance. */
        if (t_large > 64 * t_small + 0.005)
            t_large = parse_seconds(text.data, text.len, 4);
        if (t_large > 64 * t_small + 0.005)
            FAIL("%g s for 640 KiB, %g s for 10 MiB", t_small, t_large);
    }
    cube_buf_free(&text);
}

/* ---- Short ways to read ---- */

TEST(readers_find_the_last_of_equal_keys)
{
    static const char text[] = "{\"a\":1,\"A\":2,\"b\":3,\"a\":null}";
    struct json_value_s *root = cube_json_parse(text, sizeof text - 1, NULL);
    int64_t i;

    CHECK(json_value_is_null(cube_json_get(root, "a")));
    REQUIRE(cube_json_i64(cube_json_get(root, "A"), &i) == 0);
    CHECK_INT(i, 2);
    REQUIRE(cube_json_i64(cube_json_get_nocase(root, "a"), &i) == 0);
    CHECK_INT(i, 2);
    REQUIRE(cube_json_i64(cube_json_get_nocase(root, "B"), &i) == 0);
    CHECK_INT(i, 3);
    CHECK(!cube_json_get(root, "c"));
    CHECK(!cube_json_get(NULL, "c"));
    CHECK(!cube_json_get(cube_json_get(root, "b"), "c"));
    CHECK(!cube_json_items(root));
    cube_json_free(root);
}

TEST(integers_are_read_when_they_are_written_as_such)
{
    static const struct {
        const char *text;
        int64_t value;
        int result;
    } rows[] = {
        {"0", 0, 0},
        {"-0", 0, 0},
        {"-17", -17, 0},
        {"9223372036854775807", INT64_MAX, 0},
        {"-9223372036854775808", INT64_MIN, 0},
        {"9223372036854775808", 0, -1},
        {"-9223372036854775809", 0, -1},
        {"1.0", 0, -1},
        {"1e3", 0, -1},
        {"\"1\"", 0, -1},
        {"true", 0, -1},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct json_value_s *v =
            cube_json_parse(rows[i].text, strlen(rows[i].text), NULL);
        int64_t got = 0;

        test_row("%s", rows[i].text);
        CHECK_INT(cube_json_i64(v, &got), rows[i].result);
        CHECK_INT(got, rows[i].value);
        cube_json_free(v);
    }
    CHECK_INT(cube_json_i64(NULL, NULL), -1);
}

TEST(readers_refuse_other_types)
{
    struct json_value_s *root = cube_json_parse("[true,\"a\\u0000b\",2.5]",
                                                21, NULL);
    struct json_array_element_s *e = cube_json_items(root);
    bool b = false;
    double d = 0;
    size_t len = 9;

    REQUIRE(e != NULL);
    CHECK_INT(cube_json_bool(e->value, &b), 0);
    CHECK(b);
    CHECK(!cube_json_str(e->value, &len));
    CHECK_UINT(len, 0);
    CHECK_INT(cube_json_f64(e->value, &d), -1);
    e = e->next;
    CHECK_INT(cube_json_bool(e->value, &b), -1);
    CHECK_MEM(cube_json_str(e->value, &len), "a\0b", 4);
    CHECK_UINT(len, 3);
    e = e->next;
    CHECK_INT(cube_json_f64(e->value, &d), 0);
    CHECK(d == 2.5);
    CHECK_INT(cube_json_bool(NULL, &b), -1);
    CHECK(!cube_json_str(NULL, NULL));
    cube_json_free(root);
}

TEST(errors_are_told_in_words)
{
    struct cube_err err = {0};

    CHECK(!cube_json_parse("{\n\"a\" 1}", 8, &err));
    CHECK_INT(err.code, CUBE_EINVAL);
    CHECK_STR(err.text, "JSON, line 2, column 5: expected a colon");
    CHECK(!cube_json_parse(NULL, 0, &err));
    CHECK_HAS(err.text, "no JSON");
}

/* What Go's decoder reads, we read: with U+FFFD for what is no character. */
TEST(broken_characters_are_repaired)
{
    static const struct {
        const char *text, *want;
    } rows[] = {
        {"\"\xff" "a\"", "\xef\xbf\xbd" "a"},
        {"\"\\ud800\"", "\xef\xbf\xbd"},
        {"\"\\udc00\\ud83d\\ude00\"", "\xef\xbf\xbd\xf0\x9f\x98\x80"},
        {"\"\\ud800\\ud83d\\ude00\"", "\xef\xbf\xbd\xf0\x9f\x98\x80"},
        {"\"\\\\ud800\xc3\"", "\\ud800\xef\xbf\xbd"},
        {"\"\\x\xff\"", NULL}, /* still wrong */
        {"\"\\", NULL},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct guarded g = guarded_copy(rows[i].text, strlen(rows[i].text));
        struct json_value_s *v =
            cube_json_parse(g.text, strlen(rows[i].text), NULL);
        const char *got = cube_json_str(v, NULL);

        test_row("row %zu", i);
        CHECK_STR(got ? got : "refused",
                  rows[i].want ? rows[i].want : "refused");
        cube_json_free(v);
        guarded_free(&g);
    }
}

/* ---- Short ways to write ---- */

TEST(strings_are_written_as_the_wire_has_them)
{
    static const struct {
        const char *text;
        size_t size;
        const char *want;
    } rows[] = {
        {"", 0, "\"\""},
        {"plain text, longer than eight", 29,
         "\"plain text, longer than eight\""},
        {"<a href=\"x\">&\\</a>", 18,
         "\"\\u003ca href=\\\"x\\\"\\u003e\\u0026\\\\\\u003c/a\\u003e\""},
        {"1234567<", 8, "\"1234567\\u003c\""},
        {"a<b & \"c\"\t\1\xff", 12,
         "\"a\\u003cb \\u0026 \\\"c\\\"\\t\\u0001\\ufffd\""},
        {">1234567", 8, "\"\\u003e1234567\""},
        {"=:;?~\x7f", 6, "\"=:;?~\x7f\""},
        {"\n\r\t\b\f\x01\x1f", 7, "\"\\n\\r\\t\\u0008\\u000c\\u0001\\u001f\""},
        {"\0", 1, "\"\\u0000\""},
        {"\xe2\x80\xa7\xe2\x80\xa8\xe2\x80\xa9\xe2\x80\xaa", 12,
         "\"\xe2\x80\xa7\\u2028\\u2029\xe2\x80\xaa\""},
        {"\xff\xc3\xa9\xc3", 4, "\"\\ufffd\xc3\xa9\\ufffd\""},
        {"\xed\xa0\x80", 3, "\"\\ufffd\\ufffd\\ufffd\""},
        {"\xf0\x9f\x98\x80", 4, "\"\xf0\x9f\x98\x80\""},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct guarded g = guarded_copy(rows[i].text, rows[i].size);
        struct cube_buf out = {0};

        test_row("row %zu", i);
        cube_json_put_str(&out, g.text, rows[i].size);
        CHECK_STR(out.data, rows[i].want);
        cube_buf_free(&out);
        guarded_free(&g);
    }
}

/* The test of eight bytes at once against the test of one. */
TEST(special_bytes_are_found_at_every_place)
{
    for (int round = 0; round < 200000; round++) {
        unsigned char p[24];
        size_t size = test_below(sizeof p) + 1, special = 0, plain = 0;

        for (size_t i = 0; i < size; i++)
            p[i] = (unsigned char)(test_below(8) ? 0x20 + test_below(0x60)
                                                 : test_below(256));
        while (special < size && !cube_json_is_special(p[special]))
            special++;
        while (plain < size && p[plain] >= 0x20 && p[plain] < 0x80 &&
               p[plain] != '"' && p[plain] != '\\')
            plain++;
        CHECK_UINT(cube_json_harmless(p, size), special);
        CHECK_INT(cube_json_plain(p, p + size) - p, plain);
    }
}

TEST(integers_are_written_to_their_limits)
{
    static const struct {
        int64_t value;
        const char *want;
    } rows[] = {
        {0, "0"},
        {-1, "-1"},
        {1234567890, "1234567890"},
        {INT64_MAX, "9223372036854775807"},
        {INT64_MIN, "-9223372036854775808"},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct cube_buf out = {0};

        cube_json_put_i64(&out, rows[i].value);
        CHECK_STR(out.data, rows[i].want);
        cube_buf_free(&out);
    }
}

TEST(numbers_are_written_in_their_shortest_form)
{
    static const struct {
        double value;
        const char *want;
    } rows[] = {
        {0, "0"},
        {-0.0, "-0"},
        {1, "1"},
        {-2.5, "-2.5"},
        {0.1, "0.1"},
        {0.30000000000000004, "0.30000000000000004"},
        {2.15, "2.15"},
        {123456.789, "123456.789"},
        {0.000001, "0.000001"},
        {0.00000123, "0.00000123"},
        {1e-7, "1e-7"},
        {-1.5e-9, "-1.5e-9"},
        {1e-10, "1e-10"},
        {1e15, "1000000000000000"},
        {9007199254740992, "9007199254740992"},
        {1e20, "100000000000000000000"},
        {123456789012345680000.0, "123456789012345680000"},
        {1e21, "1e+21"},
        {1.5e300, "1.5e+300"},
        {5e-324, "5e-324"},
        {1.7976931348623157e308, "1.7976931348623157e+308"},
        {1e308 * 10, "null"},
        {1e308 * 10 * 0, "null"},
    };

    for (size_t i = 0; i < COUNT(rows); i++) {
        struct cube_buf out = {0};

        test_row("%g", rows[i].value);
        cube_json_put_f64(&out, rows[i].value);
        CHECK_STR(out.data, rows[i].want);
        cube_buf_free(&out);
    }
}

/* Any number comes back, and is never longer than 17 digits make it. */
static void check_round_trips(int rounds)
{
    for (int round = 0; round < rounds; round++) {
        uint64_t bits = test_random();
        struct cube_buf out = {0};
        double value, back = 0;

        if (round % 2)
            value = (double)test_below(1000000) / 1000;
        else
            memcpy(&value, &bits, sizeof value);
        if (value - value != 0)
            continue;
        cube_json_put_f64(&out, value);
        CHECK_INT(cube_json_text_f64(out.data, out.len, &back), 0);
        if (memcmp(&back, &value, sizeof back) != 0)
            FAIL("%.17g reads back as %.17g: %s", value, back, out.data);
        CHECK(out.len <= 26);
        cube_buf_free(&out);
    }
}

TEST(numbers_read_back_as_they_were)
{
    check_round_trips(20000);
}

TEST(numbers_of_any_length_are_read)
{
    static const struct {
        const char *text;
        double value;
    } rows[] = {
        {"1.25e3", 1250},
        {"125E-2", 1.25},
        {"0.5e+1", 5},
        {"-0.0", 0},
        {"100000000000000000000000000000000000000e-38", 1},
        {"0.00000000000000000000000000000000000001e38", 1},
        {"0e999999999999999999", 0},
        {"1e-999999999999999999", 0},
        {"9007199254740993", 9007199254740992},
        {"9007199254740993.0000000000000000000000001", 9007199254740994},
    };
    struct cube_buf text = {0};
    double got;

    for (size_t i = 0; i < COUNT(rows); i++) {
        test_row("%s", rows[i].text);
        REQUIRE(!cube_json_text_f64(rows[i].text, strlen(rows[i].text),
                                    &got));
        if (got != rows[i].value)
            FAIL("%.17g", got);
    }
    CHECK_INT(cube_json_text_f64("1e400", 5, &got), -1);
    for (int i = 0; i <= CUBE_JSON_NUMBER_MAX; i++)
        cube_buf_puts(&text, "1");
    CHECK_INT(cube_json_text_f64(text.data, text.len, &got), -1);
    cube_buf_free(&text);
}

/* Some countries write 1,5. JSON does not. */
/* The examples at cube_json_digits and cube_json_text_f64. */
TEST(digits_are_as_they_are_drawn)
{
    static const struct {
        double v;
        const char *digits;
        int point;
    } rows[] = {{0.1, "1", 0},
                {123.456, "123456", 3},
                {0.1 + 0.2, "30000000000000004", 0}};
    double d = 0;

    for (size_t i = 0; i < COUNT(rows); i++) {
        char digits[20];
        int point;

        CHECK_UINT(cube_json_digits(rows[i].v, digits, &point),
                   strlen(rows[i].digits));
        CHECK_STR(digits, rows[i].digits);
        CHECK_INT(point, rows[i].point);
    }
    CHECK_INT(cube_json_text_f64("1.25e3", 6, &d), 0);
    CHECK(d == 1250);
    CHECK_INT(cube_json_text_f64("-0.5", 4, &d), 0);
    CHECK(d == -0.5);
}

TEST(numbers_do_not_follow_the_locale)
{
    static const char *const names[] = {"de_DE.UTF-8", "de_DE", "fr_FR.UTF-8",
                                        "fr_FR", "nl_NL.UTF-8"};
    struct cube_buf out = {0};
    size_t i = 0;
    double back = 0;

    while (i < COUNT(names) && !setlocale(LC_NUMERIC, names[i]))
        i++;
    if (i == COUNT(names))
        SKIP("no locale with a decimal comma is installed");
    cube_json_put_f64(&out, 2.75);
    CHECK_STR(out.data, "2.75");
    CHECK_INT(cube_json_text_f64("2.75", 4, &back), 0);
    CHECK(back == 2.75);
    check_round_trips(1000);
    setlocale(LC_NUMERIC, "C");
    cube_buf_free(&out);
}
