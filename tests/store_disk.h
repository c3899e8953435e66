/*
 * A disk in memory that forgets, and a model of what a store should hold.
 * Include after test.h.
 *
 * The disk is a World table. What is written and not synced is kept apart by
 * sectors, in the order of the writes, so that a crash can leave any part of
 * it; what is created, renamed or removed lasts only once the directory is
 * synced. Each call can be made to fail.
 *
 *     write      the file as it is read, and an item for each sector touched
 *     sync       items of that file go into what surely survives
 *     sync fails its items are lost causes: read back (or not, if the system
 *                drops the pages), never written by a later sync, and after
 *                a crash there or not
 *     sync_dir   the names as they are now are what surely survives; the same
 *                by a sync of the directory's descriptor
 */
#ifndef STORE_DISK_H
#define STORE_DISK_H

#define SECTOR 512
#define DISK_INODES 64
#define DISK_NAMES 6
#define DISK_DIRS 12
#define DISK_DIRECTORY (-1)

struct inode {
    struct cube_buf now;     /* what a reader sees */
    struct cube_buf safe;    /* what surely survives */
};

struct sector {
    int inode;
    bool is_lost; /* a sync of it failed */
    size_t at, len;
    uint8_t bytes[SECTOR];
};

struct dir {
    int count;
    struct { char name[24]; int inode; } e[DISK_NAMES];
};

struct disk {
    struct cube_world world;
    struct inode inodes[DISK_INODES];
    int inode_count;
    struct dir dirs[DISK_DIRS]; /* [0] survives, the last is now */
    int dir_count;
    int fds[64]; /* inode of each descriptor + 1, or DISK_DIRECTORY */
    struct sector *items;
    int item_count, item_cap;
    /* Faults: call number fail_at, and all after it if is_fail_forever. */
    int calls, fail_at, fail_errno;
    bool is_fail_forever, is_short, is_interrupted;
    int sync_fails, dir_sync_fails; /* so many from now on, with EIO */
    bool is_evicting;           /* and what they lost reads as it was */
    int64_t clock_ms;
    bool is_forgetful;          /* false: all is safe at once, to save time */
    bool is_writing;            /* the change that is being made */
    long reads, read_bytes, changes;
    void (*before)(struct disk *d); /* each change of the disk */
};

static TEST_UNUSED int disk_fault(struct disk *d)
{
    d->calls++;
    if (d->fail_at > 0 && (d->calls == d->fail_at ||
                           (d->is_fail_forever && d->calls > d->fail_at)))
        return -d->fail_errno;
    return 0;
}

/* A call that changes the disk; it fails before it has done anything. */
static int disk_change(struct disk *d)
{
    int r = disk_fault(d);

    if (r < 0)
        return r;
    d->changes++;
    if (d->before)
        d->before(d);
    return 0;
}

static struct dir *disk_dir(struct disk *d)
{
    return &d->dirs[d->dir_count - 1];
}

/* The directory to change: a copy, so that a crash can leave the one before.
 * When there are too many of those the system has written the first ones. */
static struct dir *disk_dir_next(struct disk *d)
{
    if (d->dir_count == DISK_DIRS || !d->is_forgetful) {
        int gone = d->is_forgetful ? 1 : d->dir_count - 1;

        memmove(d->dirs, d->dirs + gone,
                (size_t)(d->dir_count - gone) * sizeof d->dirs[0]);
        d->dir_count -= gone;
    }
    d->dirs[d->dir_count] = d->dirs[d->dir_count - 1];
    return &d->dirs[d->dir_count++];
}

static int dir_find(const struct dir *dir, const char *name)
{
    for (int i = 0; i < dir->count; i++) {
        if (strcmp(dir->e[i].name, name) == 0)
            return i;
    }
    return -1;
}

static void dir_set(struct dir *dir, const char *name, int inode)
{
    int i = dir_find(dir, name);

    if (i < 0)
        i = dir->count++;
    snprintf(dir->e[i].name, sizeof dir->e[i].name, "%s", name);
    dir->e[i].inode = inode;
}

/* The file of this name, NULL if there is none. */
static TEST_UNUSED struct inode *disk_file(struct disk *d, const char *name)
{
    int i = dir_find(disk_dir(d), name);

    return i < 0 ? NULL : &d->inodes[disk_dir(d)->e[i].inode];
}

/* Forgets the items of an inode that are not lost (or all of them), and those
 * that were lost where a later one now is safe. */
static void disk_forget(struct disk *d, int inode, bool is_all)
{
    int n = 0;

    for (int i = 0; i < d->item_count; i++) {
        struct sector *s = &d->items[i];
        bool goes = s->inode == inode && (is_all || !s->is_lost);

        for (int j = i + 1; s->inode == inode && j < d->item_count; j++)
            goes |= d->items[j].inode == inode && !d->items[j].is_lost &&
                    d->items[j].at == s->at;
        if (!goes && n++ < i)
            d->items[n - 1] = *s;
    }
    d->item_count = n;
}

/* One that no name and no descriptor leads to any more, or a new one. */
static int disk_new_inode(struct disk *d)
{
    for (int n = 0; n < DISK_INODES; n++) {
        bool is_used = false;

        for (int i = 0; i < d->dir_count; i++) {
            for (int j = 0; j < d->dirs[i].count; j++)
                is_used |= d->dirs[i].e[j].inode == n;
        }
        for (int i = 0; i < 64; i++)
            is_used |= d->fds[i] == n + 1;
        if (is_used)
            continue;
        disk_forget(d, n, true);
        cube_buf_clear(&d->inodes[n].now);
        cube_buf_clear(&d->inodes[n].safe);
        if (d->inode_count <= n)
            d->inode_count = n + 1;
        return n;
    }
    FAIL("too many files for this disk");
    return 0;
}

static int disk_open(void *ctx, const char *path, unsigned flags)
{
    struct disk *d = ctx;
    bool is_dir = strcmp(path, ".") == 0;
    int i = dir_find(disk_dir(d), path), r = disk_fault(d), fd = 3;

    if (r < 0)
        return r;
    if (!is_dir && i < 0 && !(flags & CUBE_OPEN_CREATE))
        return -ENOENT;
    if (!is_dir && (i < 0 || flags & CUBE_OPEN_TRUNC)) {
        int inode = disk_new_inode(d);

        if (d->before)
            d->before(d);
        dir_set(disk_dir_next(d), path, inode);
        i = dir_find(disk_dir(d), path);
    }
    while (d->fds[fd])
        fd++;
    d->fds[fd] = is_dir ? DISK_DIRECTORY : disk_dir(d)->e[i].inode + 1;
    return fd;
}

static int disk_close(void *ctx, int fd)
{
    ((struct disk *)ctx)->fds[fd] = 0;
    return 0;
}

static struct inode *disk_inode(struct disk *d, int fd)
{
    if (fd < 0 || fd >= 64 || d->fds[fd] <= 0) {
        FAIL("descriptor %d is not open", fd);
        return &d->inodes[0];
    }
    return &d->inodes[d->fds[fd] - 1];
}

static int64_t disk_pread(void *ctx, int fd, void *buf, size_t len, int64_t at)
{
    struct disk *d = ctx;
    struct inode *n = disk_inode(d, fd);
    int r = disk_fault(d);

    if (r < 0)
        return r;
    d->reads++;
    if ((size_t)at >= n->now.len)
        return 0;
    if (d->is_interrupted && d->calls % 3 == 0)
        return -EINTR;
    if (d->is_short && len > 7)
        len = len / 2;
    if (len > n->now.len - (size_t)at)
        len = n->now.len - (size_t)at;
    d->read_bytes += (long)len;
    memcpy(buf, n->now.data + at, len);
    return (int64_t)len;
}

static void buf_put(struct cube_buf *b, const void *p, size_t len, size_t at)
{
    if (b->len < at + len) {
        size_t old = b->len;

        cube_buf_reserve(b, at + len - old);
        memset(b->data + old, 0, at + len - old);
        b->len = at + len;
    }
    memcpy(b->data + at, p, len);
}

static struct sector *disk_item(struct disk *d)
{
    if (d->item_count == d->item_cap) {
        d->item_cap = d->item_cap ? 2 * d->item_cap : 64;
        d->items = cube_resize(d->items,
                               (size_t)d->item_cap * sizeof *d->items);
    }
    return &d->items[d->item_count++];
}

/* Notes each sector that a write has touched, as it is now. */
static void disk_note(struct disk *d, int inode, size_t at, size_t len)
{
    const struct cube_buf *b = &d->inodes[inode].now;

    for (size_t s = at / SECTOR * SECTOR; s < at + len; s += SECTOR) {
        struct sector *i = disk_item(d);

        i->inode = inode;
        i->is_lost = false;
        i->at = s;
        i->len = b->len - s < SECTOR ? b->len - s : SECTOR;
        memcpy(i->bytes, b->data + s, i->len);
    }
}

static int64_t disk_pwrite(void *ctx, int fd, const void *buf, size_t len,
                           int64_t at)
{
    struct disk *d = ctx;
    struct inode *n = disk_inode(d, fd);
    int r;

    d->is_writing = true;
    r = disk_change(d);
    d->is_writing = false;
    if (r < 0)
        return r;
    if (d->is_interrupted && d->calls % 3 == 0)
        return -EINTR;
    if (d->is_short && len > 7)
        len = len / 2;
    buf_put(&n->now, buf, len, (size_t)at);
    if (d->is_forgetful)
        disk_note(d, (int)(n - d->inodes), (size_t)at, len);
    return (int64_t)len;
}

static int disk_truncate(void *ctx, int fd, int64_t size)
{
    struct disk *d = ctx;
    struct inode *n = disk_inode(d, fd);
    int r = disk_change(d);

    for (int i = 0; i < d->dir_count; i++) {
        for (int e = 0; e < d->dirs[i].count; e++) {
            if (&d->inodes[d->dirs[i].e[e].inode] == n)
                FAIL("a file is cut off that a crash could bring back");
        }
    }
    if (r == 0 && (size_t)size < n->now.len)
        n->now.len = (size_t)size;
    return r;
}

static int64_t disk_size(void *ctx, int fd)
{
    int r = disk_fault(ctx);

    return r < 0 ? r : (int64_t)disk_inode(ctx, fd)->now.len;
}

/* A sync that fails loses what it should have written, and says so once. */
static void disk_lose(struct disk *d, int inode)
{
    struct inode *n = &d->inodes[inode];

    for (int i = 0; i < d->item_count; i++) {
        struct sector *s = &d->items[i];

        if (s->inode != inode)
            continue;
        s->is_lost = true;
        if (!d->is_evicting)
            continue;
        memset(n->now.data + s->at, 0, s->len);
        if (s->at < n->safe.len)
            memcpy(n->now.data + s->at, n->safe.data + s->at,
                   n->safe.len - s->at < s->len ? n->safe.len - s->at
                                                : s->len);
    }
}

static int disk_sync_dir(void *ctx, const char *path)
{
    struct disk *d = ctx;
    int r = disk_change(d);

    (void)path;
    if (r == 0 && d->dir_sync_fails > 0) {
        d->dir_sync_fails--;
        r = -EIO;
    }
    if (r < 0)
        return r;
    d->dirs[0] = *disk_dir(d);
    d->dir_count = 1;
    return 0;
}

static int disk_sync(void *ctx, int fd)
{
    struct disk *d = ctx;
    struct cube_buf *safe;
    int inode, r;

    if (fd >= 0 && fd < 64 && d->fds[fd] == DISK_DIRECTORY)
        return disk_sync_dir(d, ".");
    inode = (int)(disk_inode(d, fd) - d->inodes);
    safe = &d->inodes[inode].safe;
    r = disk_change(d);
    if (r == 0 && d->sync_fails > 0) {
        d->sync_fails--;
        r = -EIO;
    }
    if (r < 0) {
        disk_lose(d, inode);
        return r;
    }
    if (!d->is_forgetful)
        return 0;
    for (int i = 0; i < d->item_count; i++) {
        const struct sector *s = &d->items[i];

        if (s->inode == inode && !s->is_lost)
            buf_put(safe, s->bytes, s->len, s->at);
    }
    disk_forget(d, inode, false);
    return 0;
}

static int disk_lock(void *ctx, int fd)
{
    (void)fd;
    return disk_fault(ctx);
}

static int disk_unlink(void *ctx, const char *path)
{
    struct disk *d = ctx;
    int i = dir_find(disk_dir(d), path), r;
    struct dir *dir;

    if (i < 0)
        return -ENOENT;
    r = disk_change(d);
    if (r < 0)
        return r;
    dir = disk_dir_next(d);
    dir->e[i] = dir->e[--dir->count];
    return 0;
}

static int disk_rename(void *ctx, const char *from, const char *to)
{
    struct disk *d = ctx;
    int i = dir_find(disk_dir(d), from), r, inode;
    struct dir *dir;

    if (i < 0)
        return -ENOENT;
    r = disk_change(d);
    if (r < 0)
        return r;
    dir = disk_dir_next(d);
    inode = dir->e[i].inode;
    dir->e[i] = dir->e[--dir->count];
    dir_set(dir, to, inode);
    return 0;
}

static int disk_random(void *ctx, void *buf, size_t len)
{
    int r = disk_fault(ctx);

    for (size_t i = 0; i < len; i++)
        ((uint8_t *)buf)[i] = (uint8_t)test_random();
    return r;
}

static int64_t disk_now_ms(void *ctx)
{
    return ((struct disk *)ctx)->clock_ms++;
}

/* An empty disk; buffers that it had are kept. */
static void disk_reset(struct disk *d)
{
    memset(d->fds, 0, sizeof d->fds);
    for (int i = 0; i < d->inode_count; i++) {
        cube_buf_clear(&d->inodes[i].now);
        cube_buf_clear(&d->inodes[i].safe);
    }
    d->inode_count = d->item_count = 0;
    d->dir_count = 1;
    d->dirs[0].count = 0;
    d->calls = d->fail_at = d->sync_fails = d->dir_sync_fails = 0;
    d->reads = d->read_bytes = d->changes = 0;
    d->is_fail_forever = d->is_short = d->is_interrupted = false;
    d->before = NULL;
}

static TEST_UNUSED void disk_init(struct disk *d)
{
    memset(d, 0, sizeof *d);
    disk_reset(d);
    d->is_forgetful = true;
    d->world = *cube_world_real();
    d->world.ctx = d;
    d->world.open = disk_open;
    d->world.close = disk_close;
    d->world.pread = disk_pread;
    d->world.pwrite = disk_pwrite;
    d->world.truncate = disk_truncate;
    d->world.size = disk_size;
    d->world.sync = disk_sync;
    d->world.sync_dir = disk_sync_dir;
    d->world.lock = disk_lock;
    d->world.unlink = disk_unlink;
    d->world.rename = disk_rename;
    d->world.random = disk_random;
    d->world.now_ms = disk_now_ms;
}

/* Another disk: this one, as another process finds it when this one has died
 * and the machine has not. */
static TEST_UNUSED void disk_copy(const struct disk *d, struct disk *out)
{
    disk_reset(out);
    out->inode_count = d->inode_count;
    out->dir_count = d->dir_count;
    memcpy(out->dirs, d->dirs, sizeof out->dirs);
    for (int i = 0; i < d->inode_count; i++) {
        const struct inode *n = &d->inodes[i];

        cube_buf_clear(&out->inodes[i].now);
        cube_buf_clear(&out->inodes[i].safe);
        if (n->now.len > 0)
            cube_buf_add(&out->inodes[i].now, n->now.data, n->now.len);
        if (n->safe.len > 0)
            cube_buf_add(&out->inodes[i].safe, n->safe.data, n->safe.len);
    }
    for (int i = 0; i < d->item_count; i++)
        *disk_item(out) = d->items[i];
}

static TEST_UNUSED void disk_free(struct disk *d)
{
    for (int i = 0; i < DISK_INODES; i++) {
        cube_buf_free(&d->inodes[i].now);
        cube_buf_free(&d->inodes[i].safe);
    }
    cube_free(d->items);
    memset(d, 0, sizeof *d);
}

/* ---- A model: the state that a store should have ---- */

#define TREES 3
#ifndef KEYS
#define KEYS 400 /* of a tree */
#endif

static const char *const tree_names[TREES] = {"tasks", "events", "meta"};

/* Values are made of a number, so that the model keeps only that; 0: none. */
struct model {
    uint32_t v[TREES][KEYS];
};

/* The keys, of several shapes, in order: key k is the k-th. */
static char keys[KEYS][24];

static int key_order(const void *a, const void *b)
{
    return strcmp(a, b);
}

static const char *key_of(unsigned k)
{
    static const char *const shapes[] = {"%u", "key-%05u", "a/%u/b", "%08x-%%"};

    if (!keys[0][0]) {
        for (unsigned i = 0; i < KEYS; i++)
            snprintf(keys[i], sizeof keys[i], shapes[i % COUNT(shapes)],
                     i * 7919u % 100003u);
        qsort(keys, KEYS, sizeof keys[0], key_order);
    }
    return keys[k];
}

/* Sizes that fall to all sides of what is inline, small, and a page. */
static size_t value_size(uint32_t v)
{
#ifdef STORE_SMALL_H
    static const size_t sizes[] = {0, 1, 8, 20, 64, 65, 90, 12, 200, 30};

    return v % 40 == 0 ? 1100 : sizes[v % COUNT(sizes)];
#else
    static const size_t sizes[] = {0, 1, 20, 64, 65, 300, 500, 1024, 1025,
                                   5000};

    return v % 50 == 0 ? 40000 : sizes[v % COUNT(sizes)];
#endif
}

static void make_value(uint32_t v, struct cube_buf *out)
{
    size_t n = value_size(v);
    uint32_t x = v * 2654435761u;

    cube_buf_clear(out);
    cube_buf_reserve(out, n);
    for (size_t i = 0; i < n; i++) {
        x = x * 1664525u + 1013904223u;
        cube_buf_addc(out, (char)(x >> 24));
    }
}

static bool is_value(const void *p, size_t len, uint32_t v)
{
    const uint8_t *bytes = p;
    uint32_t x = v * 2654435761u;

    if (len != value_size(v))
        return false;
    for (size_t i = 0; i < len; i++) {
        x = x * 1664525u + 1013904223u;
        if (bytes[i] != x >> 24)
            return false;
    }
    return true;
}

static bool cursor_is(struct cube_cursor *c, unsigned k, uint32_t v)
{
    struct cube_err err;
    size_t len, val_len;
    const void *val, *key = cube_cursor_key(c, &len);

    if (len != strlen(key_of(k)) || memcmp(key, key_of(k), len) != 0)
        return false;
    return cube_cursor_value(c, &val, &val_len, &err) == 0 &&
           is_value(val, val_len, v);
}

/* Does a cursor see what the array has, forwards or backwards? */
static bool cursor_sees(struct cube_cursor *c, const uint32_t v[KEYS],
                        bool is_back)
{
    int r = is_back ? cube_cursor_last(c, NULL) : cube_cursor_first(c, NULL);

    for (unsigned i = 0; i < KEYS; i++) {
        unsigned k = is_back ? KEYS - 1 - i : i;

        if (v[k] == 0)
            continue;
        if (r <= 0 || !cursor_is(c, k, v[k]))
            return false;
        r = is_back ? cube_cursor_prev(c, NULL) : cube_cursor_next(c, NULL);
    }
    return r == 0;
}

/* Is the committed state of the store the model's? */
static TEST_UNUSED bool store_is(struct cube_store *s, const struct model *m)
{
    bool same = true;

    for (int t = 0; t < TREES && same; t++) {
        struct cube_cursor *c = cube_cursor_open(s, tree_names[t], NULL);

        same = cursor_sees(c, m->v[t], false) && cursor_sees(c, m->v[t], true);
        cube_cursor_close(c);
    }
    return same;
}

static uint32_t next_v = 1;

/* Stages one random change in both. */
static TEST_UNUSED void change(struct cube_store *s, struct model *m)
{
    int t = (int)test_below(TREES);
    unsigned k = (unsigned)test_below(KEYS);
    const char *key = key_of(k);
    size_t len = strlen(key);
    struct cube_buf val = {0};
    struct cube_err err;

    if (test_below(3) == 0) {
        CHECK_INT(cube_store_del(s, tree_names[t], key, len, &err), 0);
        m->v[t][k] = 0;
    } else {
        m->v[t][k] = next_v++;
        make_value(m->v[t][k], &val);
        CHECK_INT(cube_store_put(s, tree_names[t], key, len, val.data, val.len,
                                 &err), 0);
    }
    cube_buf_free(&val);
}

static struct cube_store *must_open(const struct cube_world *w,
                                    const char *path)
{
    struct cube_store_options o = {.cache_bytes = 1}; /* the least */
    struct cube_err err = {0};
    struct cube_store *s = cube_store_open(w, path, &o, &err);

    if (!s)
        FAIL("%s", err.text);
    return s;
}

static TEST_UNUSED void put(struct cube_store *s, const char *key,
                            const char *val)
{
    struct cube_err err = {0};

    if (cube_store_put(s, "t", key, strlen(key), val, strlen(val), &err) < 0)
        FAIL("%s", err.text);
}

static TEST_UNUSED void commit(struct cube_store *s)
{
    struct cube_err err = {0};

    if (cube_store_commit(s, &err) < 0)
        FAIL("%s", err.text);
}

/* The value as text, "-" if there is none, "!" after an error. */
static TEST_UNUSED const char *get(struct cube_store *s,
                                   struct cube_store_snap *snap,
                                   const char *key)
{
    static char text[100];
    struct cube_buf val = {0};
    int r = snap ? cube_store_snapshot_get(snap, "t", key, strlen(key), &val,
                                           NULL)
                 : cube_store_get(s, "t", key, strlen(key), &val, NULL);

    snprintf(text, sizeof text, "%s",
             r > 0 ? val.data : r == 0 ? "-" : "!");
    cube_buf_free(&val);
    return text;
}

static TEST_UNUSED const char *test_path(void)
{
    static char path[600];

    snprintf(path, sizeof path, "%s/t.cube", test_dir());
    return path;
}

#endif
