/*
 * One HTTP request from a script: tools/demo asks its task for a page and an
 * engine for an image with it, since a machine with nothing but gcc and make
 * has no curl.
 *
 *     fetch http://127.0.0.1:8080 /health
 *     fetch -X POST -d FILE unix:///var/run/docker.sock '/images/create?...'
 *
 * Prints the body. Exit code 0 for an answer of 200 to 299, 1 for another
 * one, 3 when nobody answered.
 */
#define _POSIX_C_SOURCE 200809L
#include "../cube.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

static int read_all(const char *path, struct cube_buf *out)
{
    FILE *f = fopen(path, "rb");
    char piece[65536];
    size_t n;

    if (!f)
        return -1;
    while ((n = fread(piece, 1, sizeof piece, f)) > 0)
        cube_buf_add(out, piece, n);
    fclose(f);
    return 0;
}

int main(int argc, char **argv)
{
    const char *method = "GET", *file = NULL;
    struct cube_buf body = {NULL, 0, 0}, answer = {NULL, 0, 0};
    struct cube_client *client = NULL;
    struct cube_loop *loop;
    struct cube_err err = {CUBE_OK, ""};
    int option, result = -1;

    while ((option = getopt(argc, argv, "X:d:")) != -1) {
        method = option == 'X' ? optarg : method;
        file = option == 'd' ? optarg : file;
    }
    if (argc - optind != 2 || (file && read_all(file, &body))) {
        fprintf(stderr, "usage: fetch [-X METHOD] [-d FILE] BASE TARGET\n");
        return 2;
    }
    loop = cube_loop_new(cube_world_real(), &err);
    if (loop)
        client = cube_client_new(loop, argv[optind], NULL, &err);
    if (client)
        result = cube_client_call(client, method, argv[optind + 1], body.data,
                                  body.len, &answer, &err);
    if (result == 0)
        fwrite(answer.data ? answer.data : "", 1, answer.len, stdout);
    else
        fprintf(stderr, "fetch %s%s: %s\n", argv[optind], argv[optind + 1],
                err.text);
    cube_client_free(client);
    cube_loop_free(loop);
    cube_buf_free(&body);
    cube_buf_free(&answer);
    if (result == 0)
        return 0;
    return err.code == CUBE_ECONN || err.code == CUBE_ETIMEOUT ? 3 : 1;
}
