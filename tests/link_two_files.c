/* Embedding with two files: this one and cube.c, which is compiled alone. */
#include "../cube.h"

#include "embed.h"

int main(void)
{
    return embed_main();
}
