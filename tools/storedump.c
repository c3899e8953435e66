/*
 * Prints a store's file record by record and page by page, in the words of
 * chapter 4: for whoever reads that chapter with a real file beside it, and
 * for whoever wants to know what a damaged file still holds. It takes no lock
 * and believes nothing that does not check.
 *
 *     cc -o build/storedump tools/storedump.c && build/storedump FILE
 *     build/storedump -t FILE     trees only, from the newest whole roots
 */
#include "../cube.c"

#include <stdio.h>

/* Up to 40 bytes as text, others than letters escaped. */
static void print_bytes(const uint8_t *p, size_t len)
{
    putchar('"');
    for (size_t i = 0; i < len && i < 40; i++) {
        if (p[i] >= 0x20 && p[i] < 0x7f && p[i] != '"' && p[i] != '\\')
            putchar(p[i]);
        else
            printf("\\x%02x", p[i]);
    }
    printf(len > 40 ? "\"... (%zu)" : "\"", len);
}

static void print_batch(const struct cube_buf *body)
{
    const uint8_t *p = (const uint8_t *)body->data, *end = p + body->len;
    struct cube_store_change c;

    if (body->len == 0)
        printf("      no change: a mark that all before is on disk\n");
    while (p < end) {
        if (!cube_store_change_read(&p, end, &c)) {
            printf("      and %zu bytes that are no change\n",
                   (size_t)(end - p));
            return;
        }
        printf("      %s tree %u ", c.kind == 'T' ? "name  " :
               c.kind == 'P' ? "put   " : "delete", c.tree);
        print_bytes(c.key, c.key_len);
        if (c.kind == 'P') {
            printf(" = ");
            print_bytes(c.val, c.val_len);
        }
        putchar('\n');
    }
}

static void print_roots(const struct cube_store_roots *r)
{
    printf("      replay from %llu on\n", (unsigned long long)r->replay);
    for (int i = 0; i < r->count; i++) {
        const struct cube_store_tree *t = &r->trees[i];

        printf("      tree %d \"%s\": %llu keys, %llu bytes, ", i, t->name,
               (unsigned long long)t->count, (unsigned long long)t->bytes);
        if (t->levels == 0)
            printf("empty\n");
        else
            printf("%d levels, root page %llu+%u\n", t->levels,
                   (unsigned long long)t->root.at, t->root.len);
    }
}

static void print_page(const struct cube_store_ext *e, int depth)
{
    uint32_t n = cube_store_page_count(e->data);

    printf("%*s%s %llu+%u: %u entries\n", 4 + 2 * depth, "",
           e->data[0] > 0 ? "branch" : "leaf", (unsigned long long)e->at,
           e->len, n);
    for (uint32_t i = 0; i < n && e->data[0] == 0; i++) {
        struct cube_store_item item;

        cube_store_page_item(e->data, i, &item);
        printf("%*s", 6 + 2 * depth, "");
        print_bytes(item.key, item.key_len);
        printf(" = ");
        if (item.val)
            print_bytes(item.val, item.val_len);
        else
            printf("(%u bytes at %llu)", item.val_len,
                   (unsigned long long)item.ref.at);
        putchar('\n');
    }
}

/* A page and those below it; depth is bounded by the level. */
static void print_tree(const struct cube_store_file *f,
                       struct cube_store_ref ref, uint64_t limit, int level,
                       int depth)
{
    struct cube_err err;
    struct cube_store_ext *e = cube_store_fetch_page(NULL, f, ref, limit,
                                                     level, &err);

    if (!e) {
        printf("%*s%s\n", 4 + 2 * depth, "", err.text);
        return;
    }
    print_page(e, depth);
    for (uint32_t i = 0; level > 0 && i < cube_store_page_count(e->data);
         i++) {
        struct cube_store_item item;

        cube_store_page_item(e->data, i, &item);
        print_tree(f, item.ref, e->at, level - 1, depth + 1);
    }
    cube_store_unpin(e);
}

static void print_trees(struct cube_store_file *f, uint64_t at)
{
    struct cube_err err;
    struct cube_store_roots *r = at ? cube_store_roots_read(f, at, &err)
                                    : NULL;

    if (!r) {
        printf("no whole roots\n");
        return;
    }
    for (int i = 0; i < r->count; i++) {
        printf("  tree %d \"%s\"\n", i, r->trees[i].name);
        if (r->trees[i].levels > 0)
            print_tree(f, r->trees[i].root, r->at, r->trees[i].levels - 1, 0);
    }
    cube_store_roots_drop(r);
}

/* Prints the record, and returns the offset of the next one. */
static uint64_t print_record(struct cube_store_file *f,
                             const struct cube_store_rec *rec, uint32_t crc,
                             bool is_quiet)
{
    struct cube_buf body = {0};
    struct cube_err err;
    bool is_whole = cube_store_rec_body(f, rec, &body, &err) == 1;

    if (!is_quiet)
        printf("%10llu %c %s: %u bytes, commit %llu, base %llu, synced to "
               "%llu%s%s\n", (unsigned long long)rec->at, rec->kind,
               rec->kind == 'B' ? "batch" : rec->kind == 'P' ? "pages"
                                                              : "roots",
               rec->len, (unsigned long long)rec->commit,
               (unsigned long long)rec->base, (unsigned long long)rec->synced,
               is_whole ? "" : "  NOT WHOLE",
               rec->prev == crc ? "" : "  NOT AFTER THE ONE BEFORE");
    if (!is_quiet && is_whole && rec->kind == 'B')
        print_batch(&body);
    if (!is_quiet && is_whole && rec->kind == 'R') {
        struct cube_store_roots *r = cube_store_roots_read(f, rec->at, &err);

        if (r)
            print_roots(r);
        cube_store_roots_drop(r);
    }
    cube_buf_free(&body);
    return cube_store_rec_end(rec);
}

static int dump(struct cube_store_file *f, bool is_quiet)
{
    struct cube_store_rec rec;
    struct cube_err err;
    uint64_t at = CUBE_STORE_HEAD, roots = 0;
    uint8_t head[CUBE_STORE_HEAD];
    uint32_t crc;

    if (cube_store_file_read_head(f, &err) < 0) {
        fprintf(stderr, "storedump: %s\n", err.text);
        return 1;
    }
    cube_store_file_head(f, head);
    crc = cube_store_get32(head + 60);
    while (cube_store_rec_head(f, at, &rec, &err) > 0) {
        if (rec.kind == 'R')
            roots = rec.at;
        at = print_record(f, &rec, crc, is_quiet);
        crc = rec.crc;
    }
    printf("%10llu end of the records; %llu bytes follow\n",
           (unsigned long long)at, (unsigned long long)(f->size - at));
    printf("trees of the roots at %llu:\n", (unsigned long long)roots);
    print_trees(f, roots);
    return 0;
}

int main(int argc, char **argv)
{
    static struct cube_store_crc crc;
    struct cube_store_file f = {0};
    const struct cube_world *w = cube_world_real();
    bool is_quiet = argc == 3 && strcmp(argv[1], "-t") == 0;

    if (argc != 2 && !is_quiet) {
        fprintf(stderr, "usage: storedump [-t] FILE\n");
        return 2;
    }
    cube_store_crc_init(&crc);
    f.world = w;
    f.crc = &crc;
    f.path = argv[argc - 1];
    f.refs = 1;
    f.fd = w->open(w->ctx, f.path, 0);
    if (f.fd < 0) {
        fprintf(stderr, "storedump: %s: %s\n", f.path, strerror(-f.fd));
        return 1;
    }
    f.size = (uint64_t)w->size(w->ctx, f.fd);
    return dump(&f, is_quiet);
}
