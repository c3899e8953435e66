/*
 * Fuzz target of the HTTP chapter. Bytes mean the same however they are cut;
 * what was refused stays refused; a target or a place that is accepted is
 * well formed.
 *
 *     clang -fsanitize=fuzzer,address,undefined -I. tests/fuzz_http.c
 *     cc -DFUZZ_MAIN -I. tests/fuzz_http.c && ./a.out FILE...
 *
 * The second form runs each file once, without libFuzzer. The first byte of
 * an input says what it is: 1 an answer, 2 an answer to a HEAD, else
 * requests; its higher bits say how it is cut.
 */
#include "../cube.c"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void fuzz_require(bool claim)
{
    if (!claim)
        abort();
}

/* Adds what a head says to `out`. */
static void fuzz_head(const struct cube_http_parser *p, struct cube_buf *out)
{
    const struct cube_http_head *h = &p->head;

    cube_buf_printf(out, "\n%s %d %d %d %d ", h->text.data, h->status,
                    h->minor, p->is_kept, p->has_body);
    for (size_t i = 0; i < h->field_count; i++) {
        const char *name = h->text.data + h->fields[i].name;

        fuzz_require(h->fields[i].value < h->text.len && *name);
        fuzz_require(cube_http_head_get(h, name) != NULL);
        cube_buf_printf(out, "%s=%s;", name,
                        h->text.data + h->fields[i].value);
    }
    fuzz_require(p->is_answer || !(p->has_coding && p->has_length));
    fuzz_require(p->is_answer || h->minor == 0 || p->hosts == 1);
}

/* One event into `out`; false when no more can follow from this input. */
static bool fuzz_event(struct cube_http_parser *p, enum cube_http_event e,
                       const struct cube_http_input *all,
                       struct cube_buf *out, int mode)
{
    switch (e) {
    case CUBE_HTTP_HEAD:
        fuzz_head(p, out);
        return true;
    case CUBE_HTTP_DATA:
        fuzz_require(p->piece_len > 0 && p->piece >= all->data &&
                     p->piece + p->piece_len <= all->data + all->len);
        cube_buf_add(out, p->piece, p->piece_len);
        return true;
    case CUBE_HTTP_END:
        cube_buf_puts(out, "END");
        cube_http_parser_reset(p);
        p->is_to_head = mode == 2;
        return true;
    case CUBE_HTTP_ERROR:
        fuzz_require(p->status >= 400 && p->words && !p->is_kept);
        cube_buf_printf(out, "ERROR %d %s", p->status, p->words);
        return false;
    case CUBE_HTTP_MORE:
        return false;
    case CUBE_HTTP_GO_ON:
        abort();
    }
    return false;
}

/* All of it, in pieces of `step` bytes, each in memory of its own. */
static void fuzz_parse(const uint8_t *data, size_t size, size_t step,
                       int mode, struct cube_buf *out)
{
    struct cube_http_parser p;
    enum cube_http_event e = CUBE_HTTP_MORE;

    memset(&p, 0, sizeof p);
    p.is_answer = mode == 1 || mode == 2;
    p.is_to_head = mode == 2;
    for (size_t at = 0; at < size && e != CUBE_HTTP_ERROR; at += step) {
        size_t n = size - at < step ? size - at : step;
        char *copy = malloc(n);
        struct cube_http_input in = {copy, n}, all = {copy, n};
        bool goes_on;

        memcpy(copy, data + at, n);
        do {
            e = cube_http_parse(&p, &in);
            goes_on = fuzz_event(&p, e, &all, out, mode);
        } while (goes_on && (in.len > 0 || e != CUBE_HTTP_END));
        fuzz_require(e == CUBE_HTTP_ERROR || in.len == 0);
        fuzz_require(p.head.text.len <= CUBE_HTTP_MAX_HEAD * 2);
        free(copy);
    }
    if (e == CUBE_HTTP_ERROR) {
        struct cube_http_input more = {"GET / HTTP/1.0\r\n\r\n", 18};

        fuzz_require(cube_http_parse(&p, &more) == CUBE_HTTP_ERROR);
    }
    if (p.state == CUBE_HTTP_TO_CLOSE)
        cube_buf_puts(out, "open");
    cube_buf_free(&p.head.text);
}

/* The target of a request, the place of a client, one percent-encoded. */
static void fuzz_texts(const char *text)
{
    struct cube_http_req req = {0};
    struct cube_http_place place;
    struct cube_buf code = {0}, back = {0};

    if (*text == '/' && cube_http_cut_target(&req, text) == 0) {
        for (size_t i = 0; i < req.segment_count; i++)
            fuzz_require(req.segments[i] < req.words.len);
        for (size_t i = 0; i < req.query_count; i++)
            fuzz_require(cube_http_query(&req, req.words.data +
                                               req.query[i].name) != NULL);
    }
    cube_buf_free(&req.words);
    if (cube_http_place_parse(text, &place, NULL) == 0)
        fuzz_require(strlen(place.host) < sizeof place.host);
    cube_http_encode(&code, text);
    if (code.len > 0) {
        fuzz_require(cube_http_all(code.data, code.len,
                                   cube_http_is_visible));
        fuzz_require(cube_http_decode(&back, code.data, code.len, true) == 0);
        fuzz_require(strcmp(back.data, text) == 0);
    }
    cube_buf_free(&code);
    cube_buf_free(&back);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct cube_buf whole = {0}, cut = {0};
    char *text;

    if (size == 0)
        return 0;
    fuzz_parse(data + 1, size - 1, size, data[0] & 3, &whole);
    fuzz_parse(data + 1, size - 1, 1 + (data[0] >> 2), data[0] & 3, &cut);
    fuzz_require(whole.len == cut.len);
    fuzz_require(whole.len == 0 ||
                 memcmp(whole.data, cut.data, whole.len) == 0);
    cube_buf_free(&whole);
    cube_buf_free(&cut);
    text = cube_text_ndup((const char *)data + 1, size - 1);
    fuzz_texts(text);
    cube_free(text);
    return 0;
}

#ifdef FUZZ_MAIN
int main(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        struct cube_buf input = {0};

        if (cube_file_read(cube_world_real(), argv[i], &input, 1 << 20, NULL))
            return 1;
        LLVMFuzzerTestOneInput((const uint8_t *)input.data, input.len);
        cube_buf_free(&input);
    }
    printf("%d inputs\n", argc - 1);
    return 0;
}
#endif
