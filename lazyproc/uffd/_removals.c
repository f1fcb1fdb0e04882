#define _GNU_SOURCE
#include "_removals.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/mount.h>
#include <linux/perf_event.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ul
#define RING_BYTES (64 * PAGE) /* 4096 calls on one processor */
#define ENTRY "sys_enter_madvise"
#define EXIT "sys_exit_madvise"
#define REMOVE "behavior == 9"
#define FAILED "ret < 0 && ret != -12" /* ENOMEM: there is a hole in the range, and the rest was done */

/* --- the tracepoints --------------------------------------------------------------------------------------------- */

/* tracefs, where nobody else sees it: it may be mounted nowhere in our mount namespace. */
static int mount_tracefs(void)
{
    int fs = (int)syscall(SYS_fsopen, "tracefs", FSOPEN_CLOEXEC), mount = -1, error = 0;

    if (fs < 0)
        return -errno;
    if (syscall(SYS_fsconfig, fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0) < 0)
        error = -errno;
    else if ((mount = (int)syscall(SYS_fsmount, fs, FSMOUNT_CLOEXEC, 0)) < 0)
        error = -errno;
    close(fs);
    return error ? error : mount;
}

static int64_t number_of(int tracefs, const char *name)
{
    char path[64], text[24] = {0};
    ssize_t n;
    int fd;

    snprintf(path, sizeof(path), "events/syscalls/%s/id", name);
    fd = openat(tracefs, path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    n = read(fd, text, sizeof(text) - 1);
    close(fd);
    return n < 0 ? -EIO : strtoll(text, NULL, 10);
}

static int learn_numbers(int64_t *entry, int64_t *end)
{
    int tracefs = mount_tracefs();

    if (tracefs < 0)
        return tracefs;
    *entry = number_of(tracefs, ENTRY);
    *end = number_of(tracefs, EXIT);
    close(tracefs);
    return *entry < 0 ? (int)*entry : *end < 0 ? (int)*end : 0;
}

static int open_event(int64_t number, const char *filter, int cpu)
{
    struct perf_event_attr attr = {
        .type = PERF_TYPE_TRACEPOINT,
        .size = sizeof(attr),
        .config = (uint64_t)number,
        .sample_period = 1,
        .sample_type = PERF_SAMPLE_TID | PERF_SAMPLE_TIME | PERF_SAMPLE_RAW,
        .disabled = 1,
        .use_clockid = 1,
        .clockid = CLOCK_MONOTONIC,
    };
    int fd = (int)syscall(SYS_perf_event_open, &attr, -1, cpu, -1, PERF_FLAG_FD_CLOEXEC), error;

    if (fd < 0)
        return -errno;
    if (ioctl(fd, PERF_EVENT_IOC_SET_FILTER, filter) == 0 && ioctl(fd, PERF_EVENT_IOC_ENABLE, 0) == 0)
        return fd;
    error = -errno;
    close(fd);
    return error;
}

int removals_open(int32_t *fds, uint32_t most)
{
    int64_t entry, end;
    long cpus = sysconf(_SC_NPROCESSORS_CONF);
    uint32_t count = 0;
    int error = 2 * cpus > (long)most ? -E2BIG : learn_numbers(&entry, &end);

    for (int cpu = 0; !error && cpu < cpus; cpu++) {
        fds[count] = open_event(entry, REMOVE, cpu);
        if (fds[count] == -ENODEV) /* offline */
            continue;
        error = fds[count] < 0 ? fds[count] : 0;
        if (error)
            break;
        fds[++count] = open_event(end, FAILED, cpu);
        error = fds[count] < 0 ? fds[count] : 0;
        count += !error;
    }
    if (!error)
        return (int)count;
    while (count)
        close(fds[--count]);
    return error;
}

/* What perf_event_open(2) calls PERF_RECORD_SAMPLE, with these parts; the raw one is as tracefs has it in
 * events/syscalls/sys_enter_madvise/format, or as much of it as there is at the exit. */
struct sample {
    struct perf_event_header header;
    uint32_t pid, tid;
    uint64_t time;
    uint32_t size;
    uint8_t raw[];
};

struct raw {
    uint64_t common;
    int32_t nr;
    uint32_t hole;
    uint64_t start; /* at the exit: the result */
    uint64_t length;
    uint64_t behavior;
};

/* --- records ----------------------------------------------------------------------------------------------------- */

/* One ring for both, in the order of what happened. */
static int map_ring(struct removals_ring *ring, int entry, int end)
{
    void *page = mmap(NULL, PAGE + RING_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, entry, 0);
    int error;

    if (page == MAP_FAILED)
        return -errno;
    if (ioctl(end, PERF_EVENT_IOC_SET_OUTPUT, entry) < 0) {
        error = -errno;
        munmap(page, PAGE + RING_BYTES);
        return error;
    }
    ring->page = page;
    ring->at = ring->page->data_tail;
    return 0;
}

int removals_map(struct removals *r, const int32_t *fds, uint32_t count)
{
    if (!count)
        return 0;
    r->rings = calloc(count / 2, sizeof(*r->rings));
    if (!r->rings)
        return -ENOMEM;
    for (uint32_t i = 0; i < count; i += 2) {
        int error = map_ring(&r->rings[r->count], fds[i], fds[i + 1]);

        if (error) {
            removals_unmap(r);
            return error;
        }
        r->count++;
    }
    return 0;
}

void removals_unmap(struct removals *r)
{
    for (uint32_t i = 0; i < r->count; i++)
        munmap(r->rings[i].page, PAGE + RING_BYTES);
    free(r->rings);
    *r = (struct removals){0};
}

/* A record may lie across the ring's end. */
static void copy_out(const struct removals_ring *ring, uint64_t at, void *to, uint64_t bytes)
{
    const uint8_t *data = (const uint8_t *)ring->page + PAGE;
    uint64_t from = at % RING_BYTES, first = bytes < RING_BYTES - from ? bytes : RING_BYTES - from;

    memcpy(to, data + from, first);
    memcpy((uint8_t *)to + first, data, bytes - first);
}

/* The ring's next record, which stays there. */
static bool peek(struct removals_ring *ring, struct sample *sample)
{
    uint64_t head = __atomic_load_n(&ring->page->data_head, __ATOMIC_ACQUIRE);

    for (; ring->at < head; ring->at += sample->header.size) {
        copy_out(ring, ring->at, &sample->header, sizeof(sample->header));
        if (sample->header.type != PERF_RECORD_SAMPLE)
            continue;
        copy_out(ring, ring->at, sample, sizeof(*sample));
        return true;
    }
    return false;
}

static struct removal take(struct removals_ring *ring, const struct sample *sample)
{
    struct removal removal = {.pid = sample->pid, .tid = sample->tid, .failed = sample->size < sizeof(struct raw)};
    struct raw raw;

    if (!removal.failed) {
        copy_out(ring, ring->at + offsetof(struct sample, raw), &raw, sizeof(raw));
        removal.start = raw.start;
        removal.end = (raw.start + raw.length + PAGE - 1) & ~(PAGE - 1);
    }
    ring->at += sample->header.size;
    return removal;
}

/* In the order of time: a thread that fails on one processor may have called on another. */
bool removals_next(struct removals *r, struct removal *removal)
{
    struct removals_ring *first = NULL;
    struct sample sample, oldest;

    for (uint32_t i = 0; i < r->count; i++)
        if (peek(&r->rings[i], &sample) && (!first || sample.time < oldest.time)) {
            first = &r->rings[i];
            oldest = sample;
        }
    if (first)
        *removal = take(first, &oldest);
    return first;
}

void removals_done(struct removals *r)
{
    for (uint32_t i = 0; i < r->count; i++)
        __atomic_store_n(&r->rings[i].page->data_tail, r->rings[i].at, __ATOMIC_RELEASE);
}
