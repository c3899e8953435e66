/*
 * Fuzz target of the JSON chapter and of tasks. Whatever parses must survive
 * printing, copying and parsing again; whatever is a task must print to a
 * text that is the same task.
 *
 *     clang -fsanitize=fuzzer,address,undefined -I. tests/fuzz_json.c
 *     cc -DFUZZ_MAIN -I. tests/fuzz_json.c && ./a.out FILE...
 *
 * The second form runs each file once, without libFuzzer.
 */
#include "../cube.c"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void fuzz_require(bool claim)
{
    if (!claim)
        abort();
}

static void fuzz_tree(struct json_value_s *root)
{
    size_t first_size = 0, size = 0;
    char *first = json_write_minified(root, &first_size), *second;
    struct json_value_s *copy = json_extract_value(root), *again;
    char *pretty = json_write_pretty(copy, NULL, NULL, &size);

    fuzz_require(first && copy && pretty && first_size == strlen(first) + 1);
    again = json_parse(pretty, size - 1);
    fuzz_require(again != NULL);
    second = json_write_minified(again, &size);
    fuzz_require(size == first_size && !memcmp(first, second, size));
    CUBE_FREE(first);
    CUBE_FREE(second);
    CUBE_FREE(pretty);
    CUBE_FREE(copy);
    CUBE_FREE(again);
}

static void fuzz_task(const char *text, size_t size, bool is_strict)
{
    struct cube_buf first = {0}, second = {0};
    struct cube_event *e, *again;
    struct cube_err err = {0};

    if (cube_task_or_event_parse(text, size, is_strict, &e, &err)) {
        fuzz_require(err.code == CUBE_EINVAL && err.text[0]);
        return;
    }
    (void)cube_task_check(e->task, &err);
    cube_event_print(e, &first);
    fuzz_require(!cube_event_parse(first.data, first.len, true, &again, NULL));
    cube_event_print(again, &second);
    fuzz_require(!strcmp(first.data, second.data));
    if (e->task) {
        struct cube_task *copy = cube_task_copy(e->task);

        fuzz_require(cube_task_same_spec(e->task, copy));
        fuzz_require(cube_task_same_spec(e->task, again->task));
        cube_task_free(copy);
    }
    cube_event_free(e);
    cube_event_free(again);
    cube_buf_free(&first);
    cube_buf_free(&second);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char *text = CUBE_MALLOC(size ? size : 1); /* ends where it ends */
    struct json_parse_result_s result;
    struct cube_buf out = {0};
    struct json_value_s *root;

    if (size > 0)
        memcpy(text, data, size);
    root = json_parse_ex(text, size, json_parse_flags_default, NULL, NULL,
                         &result);
    fuzz_require((root != NULL) == (result.error == json_parse_error_none));
    fuzz_require(result.error_offset <= size);
    if (root)
        fuzz_tree(root);
    CUBE_FREE(root);

    fuzz_task(text, size, true);
    fuzz_task(text, size, false);

    cube_json_put_str(&out, text, size);
    root = json_parse(out.data, out.len);
    fuzz_require(root && root->type == json_type_string);
    CUBE_FREE(root);
    cube_buf_free(&out);
    CUBE_FREE(text);
    return 0;
}

#ifdef FUZZ_MAIN
int main(int argc, char **argv)
{
    static uint8_t data[1 << 20];

    for (int i = 1; i < argc; i++) {
        FILE *f = fopen(argv[i], "rb");
        size_t size = f ? fread(data, 1, sizeof data, f) : 0;

        if (!f) {
            perror(argv[i]);
            return 1;
        }
        fclose(f);
        (void)LLVMFuzzerTestOneInput(data, size);
    }
    printf("%d inputs\n", argc - 1);
    return 0;
}
#endif
