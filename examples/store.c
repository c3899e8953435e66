/*
 * The store alone: a notebook in one file that survives any crash.
 *
 *     store FILE set NAME TEXT     writes a note
 *     store FILE get NAME          prints it
 *     store FILE rm NAME           removes it
 *     store FILE list              prints all, in order
 *     store FILE count             prints how many changes there have been
 *
 *     cc -o store examples/store.c cube.c
 *
 * What it shows: two trees in one file (the notes, and a counter) that change
 * together in one commit, or not at all. When `set` has returned, both are on
 * disk; when the power fails before, neither is.
 */
#include "../cube.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int fail(const struct cube_err *err)
{
    fprintf(stderr, "store: %s\n", err->text);
    return 1;
}

/* Stages the counter's next value: it is part of the same commit. */
static int count_up(struct cube_store *s, struct cube_err *err)
{
    struct cube_buf value = {NULL, 0, 0};
    int found = cube_store_get(s, "counts", "changes", 7, &value, err);
    char text[24];

    if (found < 0)
        return -1;
    snprintf(text, sizeof text, "%ld",
             (found > 0 ? strtol(value.data, NULL, 10) : 0) + 1);
    cube_buf_free(&value);
    return cube_store_put(s, "counts", "changes", 7, text, strlen(text), err);
}

static int change(struct cube_store *s, const char *name, const char *text)
{
    struct cube_err err;
    int status = text ? cube_store_put(s, "notes", name, strlen(name), text,
                                       strlen(text), &err)
                      : cube_store_del(s, "notes", name, strlen(name), &err);

    if (status < 0 || count_up(s, &err) < 0 || cube_store_commit(s, &err) < 0)
        return fail(&err);
    return 0;
}

static int get(struct cube_store *s, const char *tree, const char *name)
{
    struct cube_err err;
    struct cube_buf value = {NULL, 0, 0};
    int found = cube_store_get(s, tree, name, strlen(name), &value, &err);

    if (found < 0)
        return fail(&err);
    if (found == 0)
        fprintf(stderr, "store: there is no \"%s\"\n", name);
    else
        printf("%.*s\n", (int)value.len, value.len > 0 ? value.data : "");
    cube_buf_free(&value);
    return found > 0 ? 0 : 1;
}

static int list(struct cube_store *s)
{
    struct cube_err err;
    struct cube_cursor *c = cube_cursor_open(s, "notes", &err);
    const void *value;
    size_t key_len, len;
    int more;

    if (!c)
        return fail(&err);
    for (more = cube_cursor_first(c, &err); more > 0;
         more = cube_cursor_next(c, &err)) {
        const char *key = cube_cursor_key(c, &key_len);

        if (cube_cursor_value(c, &value, &len, &err) < 0) {
            more = -1;
            break;
        }
        printf("%.*s: %.*s\n", (int)key_len, key, (int)len,
               (const char *)value);
    }
    cube_cursor_close(c);
    return more < 0 ? fail(&err) : 0;
}

int main(int argc, char **argv)
{
    const char *what = argc > 2 ? argv[2] : "";
    struct cube_store *s;
    struct cube_err err;
    int status = 2;

    s = argc > 2 ? cube_store_open(NULL, argv[1], NULL, &err) : NULL;
    if (argc > 2 && !s)
        return fail(&err);
    if (argc == 5 && !strcmp(what, "set"))
        status = change(s, argv[3], argv[4]);
    else if (argc == 4 && !strcmp(what, "get"))
        status = get(s, "notes", argv[3]);
    else if (argc == 4 && !strcmp(what, "rm"))
        status = change(s, argv[3], NULL);
    else if (argc == 3 && !strcmp(what, "list"))
        status = list(s);
    else if (argc == 3 && !strcmp(what, "count"))
        status = get(s, "counts", "changes");
    else
        fprintf(stderr, "usage: store FILE set NAME TEXT | get NAME | "
                        "rm NAME | list | count\n");
    cube_store_close(s);
    return status;
}
