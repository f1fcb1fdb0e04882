/* Two processes share a System V segment, one of them with a second, read-only attachment; see ring.h. Key, id,
 * permissions, size and the number of attachments are checked as well. */
#include "ring.h"

#include <sys/ipc.h>
#include <sys/shm.h>

enum { MEMBERS = 2, KEY = 0x6c7a0001, MODE = 0640 };

static struct ring *ring;
static const struct ring *window;
static int segment;

static void check_segment(void)
{
    struct shmid_ds facts;

    EXPECT(segment, shmget(KEY, 0, 0));
    EXPECT(0, shmctl(segment, IPC_STAT, &facts));
    EXPECT(sizeof *ring, facts.shm_segsz);
    EXPECT(MODE, facts.shm_perm.mode & 0777);
    EXPECT(3, facts.shm_nattch);
    if (window != NULL)
        EXPECT(ring->pages[3][0], window->pages[3][0]);
}

int main(int argc, char **argv)
{
    pid_t child;

    check_start(argc, argv, MEMBERS);
    MUST(segment = shmget(KEY, sizeof *ring, IPC_CREAT | IPC_EXCL | MODE));
    ring = shmat(segment, NULL, 0);
    if (ring == (void *)-1)
        check_die("shmat");
    child = fork_child();
    if (child == 0) {
        window = shmat(segment, NULL, SHM_RDONLY);
        if (window == (void *)-1)
            check_die("shmat");
        ring_run(ring, 1, MEMBERS, check_segment);
        _exit(status->errors != 0);
    }
    while (window == NULL) { /* the child's second attachment counts in the checks */
        struct shmid_ds facts;

        MUST(shmctl(segment, IPC_STAT, &facts));
        if (facts.shm_nattch == 3)
            break;
        check_rest(1000);
    }
    check_running();
    ring_run(ring, 0, MEMBERS, check_segment);
    ring_end(ring, &child, 1);
    MUST(shmctl(segment, IPC_RMID, NULL));
    return check_end();
}
