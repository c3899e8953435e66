/*
 * A stand-in for sheredom's json.h: its guard, its names, its types, and as
 * little behind them as Cube uses. With it the tests show that the JSON
 * chapter steps back where a program brings upstream's file, and that no
 * chapter uses more than upstream offers.
 *
 * It believes its input: for tests only.
 */
#ifndef SHEREDOM_JSON_H_INCLUDED
#define SHEREDOM_JSON_H_INCLUDED

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

enum json_type_e {
    json_type_string, json_type_number, json_type_object, json_type_array,
    json_type_true, json_type_false, json_type_null
};
enum json_parse_flags_e { json_parse_flags_default = 0 };
enum json_parse_error_e {
    json_parse_error_none,
    json_parse_error_expected_comma_or_closing_bracket,
    json_parse_error_expected_colon,
    json_parse_error_expected_opening_quote,
    json_parse_error_invalid_string_escape_sequence,
    json_parse_error_invalid_number_format,
    json_parse_error_invalid_value,
    json_parse_error_premature_end_of_buffer,
    json_parse_error_invalid_string,
    json_parse_error_allocator_failed,
    json_parse_error_unexpected_trailing_characters,
    json_parse_error_recursion,
    json_parse_error_unknown
};

struct json_string_s { const char *string; size_t string_size; };
struct json_number_s { const char *number; size_t number_size; };
struct json_value_s { void *payload; size_t type; };
struct json_object_element_s {
    struct json_string_s *name;
    struct json_value_s *value;
    struct json_object_element_s *next;
};
struct json_object_s { struct json_object_element_s *start; size_t length; };
struct json_array_element_s {
    struct json_value_s *value;
    struct json_array_element_s *next;
};
struct json_array_s { struct json_array_element_s *start; size_t length; };
struct json_parse_result_s {
    size_t error, error_offset, error_line_no, error_row_no;
};

/* Set by a parse, so that a test can tell whose parser ran. */
static int json_stand_in_parses;

/* One block for the whole tree: a byte of input never needs more than
 * JSON_STAND_IN_ROOM bytes of it. */
#define JSON_STAND_IN_ROOM 160

struct json_stand_in {
    const char *at, *end;
    char *free_room;
};

static void *json_stand_in_take(struct json_stand_in *s, size_t size)
{
    void *room = s->free_room;

    s->free_room += (size + 15) / 16 * 16;
    return memset(room, 0, size);
}

static char json_stand_in_next(struct json_stand_in *s)
{
    while (s->at < s->end && strchr(" \t\r\n", *s->at))
        s->at++;
    return s->at < s->end ? *s->at : '\0';
}

/* From quote to quote; \" and \\ are resolved, no other escape. */
static struct json_string_s *json_stand_in_string(struct json_stand_in *s)
{
    struct json_string_s *text = json_stand_in_take(s, sizeof *text);
    const char *begin = ++s->at;
    char *copy;

    while (s->at < s->end && *s->at != '"')
        s->at += *s->at == '\\' ? 2 : 1;
    copy = json_stand_in_take(s, (size_t)(s->at - begin) + 1);
    text->string = copy;
    for (; begin < s->at; begin++) {
        begin += *begin == '\\';
        copy[text->string_size++] = *begin;
    }
    s->at++;
    return text;
}

static struct json_number_s *json_stand_in_number(struct json_stand_in *s)
{
    struct json_number_s *number = json_stand_in_take(s, sizeof *number);
    const char *begin = s->at;
    char *copy;

    while (s->at < s->end && strchr("+-.0123456789eE", *s->at))
        s->at++;
    number->number_size = (size_t)(s->at - begin);
    copy = json_stand_in_take(s, number->number_size + 1);
    memcpy(copy, begin, number->number_size);
    number->number = copy;
    return number->number_size ? number : NULL;
}

static struct json_value_s *json_stand_in_value(struct json_stand_in *s,
                                                int depth);

static struct json_object_s *json_stand_in_object(struct json_stand_in *s,
                                                  int depth)
{
    struct json_object_s *object = json_stand_in_take(s, sizeof *object);
    struct json_object_element_s **last = &object->start;

    s->at++;
    while (json_stand_in_next(s) == '"') {
        struct json_object_element_s *e = json_stand_in_take(s, sizeof *e);

        e->name = json_stand_in_string(s);
        if (json_stand_in_next(s) != ':')
            return NULL;
        s->at++;
        e->value = json_stand_in_value(s, depth + 1);
        if (!e->value)
            return NULL;
        *last = e;
        last = &e->next;
        object->length++;
        if (json_stand_in_next(s) == ',')
            s->at++;
    }
    return json_stand_in_next(s) == '}' ? (s->at++, object) : NULL;
}

static struct json_array_s *json_stand_in_array(struct json_stand_in *s,
                                                int depth)
{
    struct json_array_s *array = json_stand_in_take(s, sizeof *array);
    struct json_array_element_s **last = &array->start;

    s->at++;
    while (json_stand_in_next(s) && json_stand_in_next(s) != ']') {
        struct json_array_element_s *e = json_stand_in_take(s, sizeof *e);

        e->value = json_stand_in_value(s, depth + 1);
        if (!e->value)
            return NULL;
        *last = e;
        last = &e->next;
        array->length++;
        if (json_stand_in_next(s) == ',')
            s->at++;
    }
    return json_stand_in_next(s) == ']' ? (s->at++, array) : NULL;
}

static struct json_value_s *json_stand_in_word(struct json_stand_in *s,
                                               struct json_value_s *v)
{
    static const char *const words[] = { "true", "false", "null" };

    for (size_t i = 0; i < 3; i++) {
        size_t size = strlen(words[i]);

        if ((size_t)(s->end - s->at) >= size &&
            memcmp(s->at, words[i], size) == 0) {
            v->type = json_type_true + i;
            s->at += size;
            return v;
        }
    }
    return NULL;
}

static struct json_value_s *json_stand_in_value(struct json_stand_in *s,
                                                int depth)
{
    struct json_value_s *v = json_stand_in_take(s, sizeof *v);
    char c = json_stand_in_next(s);

    if (depth > 100)
        return NULL;
    if (strchr("tfn", c) && c)
        return json_stand_in_word(s, v);
    v->type = c == '"' ? json_type_string : c == '{' ? json_type_object
              : c == '[' ? json_type_array : json_type_number;
    v->payload = c == '"' ? (void *)json_stand_in_string(s)
                 : c == '{' ? (void *)json_stand_in_object(s, depth)
                 : c == '[' ? (void *)json_stand_in_array(s, depth)
                 : (void *)json_stand_in_number(s);
    return v->payload ? v : NULL;
}

static struct json_value_s *
json_parse_ex(const void *src, size_t src_size, size_t flags_bitset,
              void *(*alloc_func_ptr)(void *, size_t), void *user_data,
              struct json_parse_result_s *result)
{
    size_t size = (src_size + 1) * JSON_STAND_IN_ROOM;
    struct json_stand_in s;
    struct json_value_s *root;

    (void)flags_bitset;
    json_stand_in_parses++;
    s.at = src;
    s.end = s.at + src_size;
    s.free_room = alloc_func_ptr ? alloc_func_ptr(user_data, size)
                                 : malloc(size);
    root = json_stand_in_value(&s, 0);
    if (result) {
        memset(result, 0, sizeof *result);
        result->error = root && !json_stand_in_next(&s)
                            ? json_parse_error_none
                            : json_parse_error_invalid_value;
    }
    return root;
}

static struct json_string_s *json_value_as_string(struct json_value_s *v)
{
    return v->type == json_type_string ? v->payload : NULL;
}

static struct json_number_s *json_value_as_number(struct json_value_s *v)
{
    return v->type == json_type_number ? v->payload : NULL;
}

static struct json_object_s *json_value_as_object(struct json_value_s *v)
{
    return v->type == json_type_object ? v->payload : NULL;
}

static struct json_array_s *json_value_as_array(struct json_value_s *v)
{
    return v->type == json_type_array ? v->payload : NULL;
}

static int json_value_is_null(const struct json_value_s *v)
{
    return v->type == json_type_null;
}

#endif /* SHEREDOM_JSON_H_INCLUDED */
