/* ==== Chapter 0. Preface ==== uses: nothing ==== */

#define CUBE_C
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "cube.h"




/* ==== Chapter 1. World ==== uses: nothing ==== */




/* ==== Chapter 2. Ground ==== uses: 1 ==== */




/* ==== Chapter 3. JSON ==== uses: 2 ==== */




/* ==== Chapter 4. Store ==== uses: 1 2 ==== */




/* ==== Chapter 5. Loop ==== uses: 1 2 4 ==== */




/* ==== Chapter 6. HTTP ==== uses: 1 2 5 ==== */




/* ==== Chapter 7. Tasks ==== uses: 1 2 3 4 5 ==== */




/* ==== Chapter 8. Machine ==== uses: 1 2 3 ==== */




/* ==== Chapter 9. Runtimes ==== uses: 1 2 3 5 6 7 ==== */




/* ==== Chapter 10. Schedulers ==== uses: 1 2 7 8 ==== */




/* ==== Chapter 11. Worker ==== uses: 1 2 3 4 5 6 7 8 9 ==== */




/* ==== Chapter 12. Manager ==== uses: 1 2 3 4 5 6 7 8 10 ==== */




/* ==== Chapter 13. Client ==== uses: 1 2 3 5 6 7 ==== */



