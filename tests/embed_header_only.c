/* Embedding, header-only: one C file, one #include, nothing to link. */
#define CUBE_IMPLEMENTATION
#include "../cube.h"

#include "embed.h"

int main(void)
{
    return embed_main();
}
