/*
 * Fuzz target of the Machine chapter: the files of /proc, and stats as JSON.
 * No parser may read beyond its text; no number may be above INT64_MAX; what
 * is stats must print to a text that is the same stats.
 *
 *     clang -fsanitize=fuzzer,address,undefined -I. tests/fuzz_machine.c
 *     cc -DFUZZ_MAIN -I. tests/fuzz_machine.c && ./a.out FILE...
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

static void fuzz_round_trip(const struct cube_stats *s)
{
    struct cube_buf first = {NULL, 0, 0}, second = {NULL, 0, 0};
    struct cube_stats again;

    cube_stats_print(s, &first);
    fuzz_require(cube_stats_parse(first.data, first.len, &again, NULL) == 0);
    cube_stats_print(&again, &second);
    fuzz_require(first.len == second.len &&
                 !memcmp(first.data, second.data, first.len));
    cube_buf_free(&first);
    cube_buf_free(&second);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const char *text = (const char *)data;
    struct cube_stats s;
    double use;

    if (cube_stats_parse(text, size, &s, NULL) == 0)
        fuzz_round_trip(&s);
    memset(&s, 0, sizeof s);
    cube_machine_parse_mem(text, size, &s.mem);
    cube_machine_parse_cpu(text, size, &s.cpu, &s.cpus);
    cube_machine_parse_load(text, size, &s.load);
    fuzz_require(s.cpus >= 0 && (size_t)s.cpus <= size);
    use = cube_machine_use(&(struct cube_cpu){0}, &s.cpu);
    fuzz_require(use == -1 || (use >= 0 && use <= 1));
    fuzz_round_trip(&s);
    return 0;
}

#ifdef FUZZ_MAIN
int main(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        struct cube_buf text = {NULL, 0, 0};

        if (cube_file_read(cube_world_real(), argv[i], &text, 64 << 20, NULL))
            return 1;
        LLVMFuzzerTestOneInput((const uint8_t *)text.data, text.len);
        cube_buf_free(&text);
    }
    return 0;
}
#endif
