/* Embedding with another json.h by its name: -DCUBE_JSON_H='"json.h"'. */
#define CUBE_JSON_H "tests/json_stand_in.h"
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
