/* Embedding where the program has included upstream's json.h before: here a
 * stand-in with its guard and names. Cube uses that one, and does not define
 * the names a second time. The stand-in includes system headers, so that the
 * GNU names have to be asked for first. */
#define _GNU_SOURCE
#include "json_stand_in.h"

#define CUBE_IMPLEMENTATION
#include "../cube.h"

#include "embed.h"

int main(void)
{
    int result = embed_main();

    if (json_stand_in_parses == 0) {
        printf("Cube has parsed with its own chapter\n");
        printf("0 passed, 1 failed, 0 skipped\n");
        return 1;
    }
    return result;
}
