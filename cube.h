#ifndef CUBE_H
#define CUBE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#ifndef CUBE_API
#define CUBE_API
#endif

/* ==== Chapter 1. World ==== */



/* ==== Chapter 2. Ground ==== */



/* ==== Chapter 3. JSON ==== */



/* ==== Chapter 4. Store ==== */



/* ==== Chapter 5. Loop ==== */



/* ==== Chapter 6. HTTP ==== */



/* ==== Chapter 7. Tasks ==== */



/* ==== Chapter 8. Machine ==== */



/* ==== Chapter 9. Runtimes ==== */



/* ==== Chapter 10. Schedulers ==== */



/* ==== Chapter 11. Worker ==== */



/* ==== Chapter 12. Manager ==== */



/* ==== Chapter 13. Client ==== */



#ifdef __cplusplus
}
#endif
#endif /* CUBE_H */

#if defined(CUBE_IMPLEMENTATION) && !defined(CUBE_C)
#include "cube.c"
#endif
