/* The store in little: pages, overlays, extents and slack of some hundred
 * bytes, so that a file of 50 kB has deep trees, checkpoints every few
 * commits and compactions by itself. Include before cube.c. */
#ifndef STORE_SMALL_H
#define STORE_SMALL_H

#define CUBE_STORE_PAGE 256
#define CUBE_STORE_LEAF 256
#define CUBE_STORE_GROUP 2048
#define CUBE_STORE_CHUNK 4096
#define CUBE_STORE_EXTENT_MIN 4096u
#define CUBE_STORE_EXTENT_MAX 16384u
#define CUBE_STORE_SLACK (3u << 10)
#define CUBE_STORE_LIMIT (16u << 10)
#define CUBE_STORE_TRIM 4096u
#define CUBE_STORE_NODES 1024
#define CUBE_STORE_MEM_MIN 4096u
#define CUBE_STORE_CACHE_MIN (32u << 10)
#define CUBE_STORE_TAIL_SMALL 2048
#ifndef CUBE_STORE_POLYNOMIAL
#define CUBE_STORE_POLYNOMIAL 0x82f63b78u
#endif

#endif
