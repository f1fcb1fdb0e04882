/* Where the userfaultfds of forked children are kept, so that they live as long as their tree and not only as long as a
 * pager does: in the queue of a socket that every process of the tree has inherited (unix(7), SCM_RIGHTS).
 *
 * A child cannot keep its own: fork(2) copies the descriptor table before the kernel makes the child's userfaultfd, which
 * then appears where the event is read (kernel/fork.c: copy_files before copy_mm). It is one socket connected to itself,
 * so nobody else can send to it. Every descriptor has an id that is never used again. No locking in here.
 */
#ifndef LAZYPROC_UFFD_CRADLE_H
#define LAZYPROC_UFFD_CRADLE_H

#include <stddef.h>
#include <stdint.h>

#define CRADLE_BATCH 128u /* descriptors in a message; the kernel takes 253 (SCM_MAX_FD) */

struct cradled {
    uint32_t id;
    int32_t uffd;
};

int cradle_open(void); /* a descriptor, or -errno */

/* One message more for each CRADLE_BATCH descriptors. -EAGAIN: the queue is full. -ETOOMANYREFS: this user may not have so many
 * under way (RLIMIT_NOFILE, unless privileged). */
int cradle_put(int cradle, uint32_t round, const struct cradled *items, size_t count);

/* Takes out what was put in before `round`. */
void cradle_forget(int cradle, uint32_t round);

/* Descriptors of our own for what lies in it, message by message from the first on; it stays there as well. `items` has
 * room for CRADLE_BATCH. How many, or -errno. -EAGAIN: these were all. -EMFILE: RLIMIT_NOFILE, and none was taken. */
int cradle_rewind(int cradle);
int cradle_next(int cradle, struct cradled *items);

#endif
