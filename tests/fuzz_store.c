/*
 * Fuzz target of the store: any bytes as its file. Opening, walking both ways,
 * checking, changing, compacting and opening again must neither crash nor
 * hang nor read beyond what is theirs; an error is a fine answer. Checksums
 * would stop almost every input at once, so here their polynomial is 0, and
 * each is right when it is all ones (store_small.h).
 *
 *     clang -fsanitize=fuzzer,address,undefined -I. tests/fuzz_store.c
 *     cc -DFUZZ_MAIN -I. tests/fuzz_store.c && ./a.out FILE...
 *     ./a.out -s FILE       writes an input to start from
 */
#define CUBE_STORE_POLYNOMIAL 0u
#include "store_small.h"
#include "../cube.c"

#include <stdio.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* A disk of three files: the store, its lock, and the new one beside it. */
struct fuzz_disk {
    struct cube_world world;
    struct cube_buf files[3];
};

static int fuzz_file(const char *path)
{
    size_t len = strlen(path);

    return len > 5 && strcmp(path + len - 5, ".lock") == 0 ? 1
         : len > 4 && strcmp(path + len - 4, ".new") == 0 ? 2 : 0;
}

static int fuzz_open(void *ctx, const char *path, unsigned flags)
{
    struct fuzz_disk *d = ctx;

    if (flags & CUBE_OPEN_TRUNC)
        cube_buf_clear(&d->files[fuzz_file(path)]);
    return fuzz_file(path);
}

static int fuzz_close(void *ctx, int fd)
{
    (void)ctx;
    (void)fd;
    return 0;
}

static int64_t fuzz_pread(void *ctx, int fd, void *buf, size_t len, int64_t at)
{
    const struct cube_buf *b = &((struct fuzz_disk *)ctx)->files[fd];

    if ((uint64_t)at >= b->len)
        return 0;
    if (len > b->len - (size_t)at)
        len = b->len - (size_t)at;
    memcpy(buf, b->data + at, len);
    return (int64_t)len;
}

static int64_t fuzz_pwrite(void *ctx, int fd, const void *buf, size_t len,
                           int64_t at)
{
    struct cube_buf *b = &((struct fuzz_disk *)ctx)->files[fd];

    if ((uint64_t)at > (64u << 20))
        return -ENOSPC;
    if (b->len < (size_t)at + len) {
        size_t more = (size_t)at + len - b->len;

        cube_buf_reserve(b, more);
        memset(b->data + b->len, 0, more);
        b->len += more;
    }
    memcpy(b->data + at, buf, len);
    return (int64_t)len;
}

/* Of what a compaction has replaced, whose bytes nobody reads again. */
static int fuzz_truncate(void *ctx, int fd, int64_t size)
{
    (void)ctx;
    (void)fd;
    (void)size;
    return 0;
}

static int64_t fuzz_size(void *ctx, int fd)
{
    return (int64_t)((struct fuzz_disk *)ctx)->files[fd].len;
}

static int fuzz_sync(void *ctx, int fd)
{
    (void)ctx;
    (void)fd;
    return 0;
}

static int fuzz_path(void *ctx, const char *path)
{
    (void)ctx;
    (void)path;
    return 0;
}

/* The open descriptor of the new file is the store's from here on: its bytes
 * are copied to both. */
static int fuzz_rename(void *ctx, const char *from, const char *to)
{
    struct fuzz_disk *d = ctx;

    (void)from;
    (void)to;
    cube_buf_clear(&d->files[0]);
    cube_buf_add(&d->files[0], d->files[2].data, d->files[2].len);
    return 0;
}

static int fuzz_random(void *ctx, void *buf, size_t len)
{
    (void)ctx;
    memset(buf, 7, len);
    return 0;
}

static int64_t fuzz_now(void *ctx)
{
    (void)ctx;
    return 1;
}

static void fuzz_init(struct fuzz_disk *d)
{
    memset(d, 0, sizeof *d);
    d->world.ctx = d;
    d->world.open = fuzz_open;
    d->world.close = fuzz_close;
    d->world.pread = fuzz_pread;
    d->world.pwrite = fuzz_pwrite;
    d->world.truncate = fuzz_truncate;
    d->world.size = fuzz_size;
    d->world.sync = fuzz_sync;
    d->world.lock = fuzz_sync;
    d->world.sync_dir = fuzz_path;
    d->world.unlink = fuzz_path;
    d->world.rename = fuzz_rename;
    d->world.random = fuzz_random;
    d->world.now_ms = fuzz_now;
}

static void fuzz_walk(struct cube_store *s, const char *tree)
{
    struct cube_cursor *c = cube_cursor_open(s, tree, NULL);
    struct cube_buf got = {0};
    struct cube_err err;
    const void *val;
    size_t len, sum = 0;
    int r, n = 0;

    for (r = cube_cursor_first(c, &err); r > 0 && n++ < 5000;
         r = cube_cursor_next(c, &err)) {
        const char *key = cube_cursor_key(c, &len);

        if (cube_store_get(s, tree, key, len, &got, &err) < 0)
            break;
        if (cube_cursor_value(c, &val, &len, &err) < 0)
            break;
        for (size_t i = 0; i < len; i++)
            sum += ((const uint8_t *)val)[i];
    }
    for (r = cube_cursor_last(c, &err); r > 0 && n-- > 0;
         r = cube_cursor_prev(c, &err))
        (void)cube_cursor_key(c, &len);
    if (sum == 1)
        abort(); /* no sum of these is 1; keeps the reading */
    cube_cursor_close(c);
    cube_buf_free(&got);
}

static void fuzz_use(struct cube_store *s)
{
    struct cube_err err;

    (void)cube_store_check(s, &err);
    for (int i = 0; i < s->name_count; i++)
        fuzz_walk(s, s->names[i]);
    (void)cube_store_put(s, "t", "key", 3, "value", 5, &err);
    (void)cube_store_del(s, "t", "a", 1, &err);
    (void)cube_store_commit(s, &err);
    (void)cube_store_settle(s, &err);
    (void)cube_store_compact(s, &err);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct cube_store_options o = {.cache_bytes = 1};
    struct fuzz_disk d;
    struct cube_store *s;

    fuzz_init(&d);
    cube_buf_add(&d.files[0], data, size);
    for (int round = 0; round < 2; round++) {
        s = cube_store_open(&d.world, "t", &o, NULL);
        if (s)
            fuzz_use(s);
        cube_store_close(s);
    }
    for (int i = 0; i < 3; i++)
        cube_buf_free(&d.files[i]);
    return 0;
}

#ifdef FUZZ_MAIN
/* A small file with what a file can have: trees, references, a tail. */
static void fuzz_seed(const char *path)
{
    struct fuzz_disk d;
    struct cube_store *s;
    char key[8], val[100] = "value";
    FILE *f = fopen(path, "wb");

    fuzz_init(&d);
    s = cube_store_open(&d.world, NULL, NULL, NULL);
    for (int i = 0; i < 300; i++) {
        snprintf(key, sizeof key, "%03d", i * 37 % 300);
        (void)cube_store_put(s, i % 3 ? "t" : "u", key, 3, val,
                             (size_t)i % sizeof val, NULL);
        if (i == 150)
            (void)cube_store_compact(s, NULL);
        if (i % 50 == 0)
            (void)cube_store_commit(s, NULL);
        if (i == 250)
            (void)cube_store_settle(s, NULL);
    }
    (void)cube_store_commit(s, NULL);
    if (f) {
        fwrite(s->file->bytes.data, 1, s->file->bytes.len, f);
        fclose(f);
    }
    cube_store_close(s);
}

int main(int argc, char **argv)
{
    if (argc == 3 && strcmp(argv[1], "-s") == 0) {
        fuzz_seed(argv[2]);
        return 0;
    }
    for (int i = 1; i < argc; i++) {
        struct cube_buf b = {0};

        if (cube_file_read(cube_world_real(), argv[i], &b, 64 << 20, NULL) ==
            0)
            LLVMFuzzerTestOneInput((const uint8_t *)b.data, b.len);
        cube_buf_free(&b);
    }
    return 0;
}
#endif
