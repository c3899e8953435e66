/*
 * Makes an engine's image out of one static binary, so that `make demo` has a
 * task to run in a container and needs no registry, no base image and no
 * command of the engine's: a tar of one file, written in memory, is posted to
 * the engine's socket.
 *
 *     cc -o mkimage tools/mkimage.c cube.c -lpthread
 *     ./mkimage unix:///var/run/docker.sock cube-demo/echo:1 ./echo \
 *         'EXPOSE 7777'
 *
 * The binary becomes /echo, and the image's command; what follows are further
 * changes as a Dockerfile has them. Docker and Podman.
 */
#include "../cube.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TAR_BLOCK 512

/* One request, and whether it went well; then the image's ID, if it has one. */
struct post {
    struct cube_loop *loop;
    bool is_ok;
    char id[80];
};

/*
 * A ustar entry (POSIX.1-1988): a header of one block, then the file, padded
 * to whole blocks. Numbers are octal text, times and owners zero, so that the
 * same binary makes the same image.
 *
 *      0 name   100 mode   108 uid   116 gid   124 size   136 mtime
 *    148 checksum: the sum of the header's bytes, itself counted as blanks
 *    156 type '0': a file     257 "ustar" NUL "00"
 */
static void tar_add(struct cube_buf *tar, const char *name, const void *data,
                    size_t len)
{
    static const char zeros[TAR_BLOCK];
    char head[TAR_BLOCK] = {0};
    unsigned sum = 0;

    (void)snprintf(head, 100, "%s", name);
    (void)snprintf(head + 100, 8, "%07o", 0755u);
    (void)snprintf(head + 108, 8, "%07o", 0u);
    (void)snprintf(head + 116, 8, "%07o", 0u);
    (void)snprintf(head + 124, 12, "%011llo", (unsigned long long)len);
    (void)snprintf(head + 136, 12, "%011o", 0u);
    memset(head + 148, ' ', 8);
    head[156] = '0';
    memcpy(head + 257, "ustar\0" "00", 8);
    for (size_t i = 0; i < sizeof head; i++)
        sum += (unsigned char)head[i];
    (void)snprintf(head + 148, 8, "%06o", sum);
    cube_buf_add(tar, head, sizeof head);
    cube_buf_add(tar, data, len);
    cube_buf_add(tar, zeros, (TAR_BLOCK - len % TAR_BLOCK) % TAR_BLOCK);
}

/* Two blocks of zeros end a tar. */
static void tar_end(struct cube_buf *tar)
{
    static const char zeros[2 * TAR_BLOCK];

    cube_buf_add(tar, zeros, sizeof zeros);
}

static int read_file(const char *path, struct cube_buf *out)
{
    char bytes[65536];
    size_t n;
    FILE *f = fopen(path, "rb");

    if (!f)
        return -1;
    while ((n = fread(bytes, 1, sizeof bytes, f)) > 0)
        cube_buf_add(out, bytes, n);
    n = ferror(f) ? 1 : 0;
    (void)fclose(f);
    return n ? -1 : 0;
}

static void add_change(struct cube_buf *target, const char *change)
{
    cube_buf_puts(target, "&changes=");
    cube_http_encode(target, change);
}

/* POST /images/create?fromSrc=-&changes=... */
static void import_target(struct cube_buf *target, const char *name,
                          char **changes)
{
    struct cube_buf text = {0};

    cube_buf_puts(target, "/images/create?fromSrc=-");
    cube_buf_printf(&text, "CMD [\"/%s\"]", name);
    add_change(target, text.data);
    cube_buf_free(&text);
    for (; *changes; changes++)
        add_change(target, *changes);
}

/* POST /images/{id}/tag?repo=...&tag=...: a request of its own, since Podman
 * forgets the tag of an import. */
static void tag_target(struct cube_buf *target, const char *id,
                       const char *image)
{
    const char *slash = strrchr(image, '/');
    const char *colon = strrchr(slash ? slash : image, ':');
    struct cube_buf name = {0};

    cube_buf_add(&name, image,
                 colon ? (size_t)(colon - image) : strlen(image));
    cube_buf_printf(target, "/images/%s/tag?repo=", id);
    cube_http_encode(target, name.data);
    cube_buf_puts(target, "&tag=");
    cube_http_encode(target, colon ? colon + 1 : "latest");
    cube_buf_free(&name);
}

/* A failure can be a status, and a line of a 200 as well; a success of an
 * import is {"status":"sha256:..."}. */
static void on_done(void *arg, const struct cube_http_answer *a)
{
    struct post *p = arg;
    const char *id = strstr(a->body, "sha256:");

    p->is_ok = !a->err && a->status / 100 == 2 &&
               !strstr(a->body, "\"error\"");
    if (a->err)
        fprintf(stderr, "mkimage: %s\n", a->err->text);
    else if (!p->is_ok)
        fprintf(stderr, "mkimage: the engine says: %s\n", a->body);
    if (id)
        (void)snprintf(p->id, sizeof p->id, "%.71s", id);
    cube_loop_stop(p->loop);
}

static void post(struct post *p, struct cube_http_client *c,
                 const char *target, const struct cube_buf *body)
{
    static const char *const headers[] = {"Content-Type", "application/x-tar",
                                          NULL};
    struct cube_http_request r = {0};
    struct cube_err err;

    p->is_ok = false;
    r.method = "POST";
    r.target = target;
    r.headers = headers;
    r.body = body ? body->data : NULL;
    r.body_len = body ? body->len : 0;
    r.timeout_ms = 60000;
    r.on_done = on_done;
    r.arg = p;
    (void)cube_http_call(c, &r);
    if (cube_loop_run(p->loop, &err) < 0)
        fprintf(stderr, "mkimage: %s\n", err.text);
}

static bool make(const char *where, const char *image, const char *import,
                 const struct cube_buf *tar)
{
    struct cube_err err;
    struct post p = {cube_loop_new(cube_world_real(), &err), false, ""};
    struct cube_http_client *c =
        p.loop ? cube_http_client_new(p.loop, where, NULL, &err) : NULL;
    struct cube_buf target = {0};

    if (c) {
        post(&p, c, import, tar);
        tag_target(&target, p.id, image);
        if (p.is_ok)
            post(&p, c, target.data, NULL);
    } else {
        fprintf(stderr, "mkimage: %s\n", err.text);
    }
    cube_buf_free(&target);
    cube_http_client_free(c);
    cube_loop_free(p.loop);
    return p.is_ok;
}

int main(int argc, char **argv)
{
    struct cube_buf binary = {0}, tar = {0}, target = {0};
    const char *name;
    bool is_ok;

    if (argc < 4) {
        fprintf(stderr, "usage: mkimage ENGINE IMAGE BINARY [CHANGE...]\n");
        return 2;
    }
    if (read_file(argv[3], &binary) < 0) {
        fprintf(stderr, "mkimage: cannot read %s\n", argv[3]);
        return 1;
    }
    name = strrchr(argv[3], '/') ? strrchr(argv[3], '/') + 1 : argv[3];
    tar_add(&tar, name, binary.data, binary.len);
    tar_end(&tar);
    import_target(&target, name, argv + 4);
    is_ok = make(argv[1], argv[2], target.data, &tar);
    cube_buf_free(&binary);
    cube_buf_free(&tar);
    cube_buf_free(&target);
    return is_ok ? 0 : 1;
}
