/* Embedding in C++: cube.h is valid C++, and the C object is linked. */
#include "../cube.h"

#include "embed.h"

int main()
{
    return embed_main();
}
