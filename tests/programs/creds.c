/* Everything about a process that is neither memory nor a descriptor: who it is, what it may do, how it is treated.
 * All of it is set to something unusual once; then it must stay. Started as root it drops most of what root has. */
#include "check.h"

#include <grp.h>
#include <limits.h>
#include <linux/capability.h>
#include <linux/securebits.h>
#include <sched.h>
#include <sys/personality.h>
#include <sys/resource.h>
#include <sys/syscall.h>

enum { FACTS = 64, CAPS = 1u << CAP_NET_BIND_SERVICE | 1u << CAP_KILL };

struct facts {
    unsigned count;
    const char *names[FACTS];
    uint64_t values[FACTS];
};

static void note(struct facts *facts, const char *name, uint64_t value)
{
    facts->names[facts->count] = name;
    facts->values[facts->count++] = value;
}
#define NOTE(value) note(facts, #value, (uint64_t)(value))

/* A short hash for what is not a number. */
static uint64_t digest(const void *bytes, size_t length)
{
    uint64_t hash = 0xcbf29ce484222325u;

    for (size_t i = 0; i < length; i++)
        hash = (hash ^ ((const uint8_t *)bytes)[i]) * 0x100000001b3u;
    return hash;
}

static void note_identity(struct facts *facts)
{
    gid_t groups[NGROUPS_MAX > 64 ? 64 : NGROUPS_MAX];
    uid_t ids[6];
    int count = getgroups(64, groups);

    MUST(getresuid(&ids[0], &ids[1], &ids[2]));
    MUST(getresgid(&ids[3], &ids[4], &ids[5]));
    for (unsigned i = 0; i < 6; i++)
        NOTE(ids[i]);
    NOTE(syscall(SYS_setfsuid, -1));
    NOTE(syscall(SYS_setfsgid, -1));
    NOTE(digest(groups, (size_t)count * sizeof *groups));
}

static void note_capabilities(struct facts *facts)
{
    struct __user_cap_header_struct header = { .version = _LINUX_CAPABILITY_VERSION_3 };
    struct __user_cap_data_struct sets[2];
    uint64_t bounding = 0, ambient = 0;

    MUST(syscall(SYS_capget, &header, sets));
    for (unsigned long cap = 0; cap < 64; cap++) {
        bounding |= (uint64_t)(prctl(PR_CAPBSET_READ, cap) == 1) << cap;
        ambient |= (uint64_t)(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET, cap, 0, 0) == 1) << cap;
    }
    NOTE(digest(sets, sizeof sets));
    NOTE(bounding);
    NOTE(ambient);
    NOTE(prctl(PR_GET_SECUREBITS));
    NOTE(prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0));
}

static void note_process(struct facts *facts)
{
    char path[PATH_MAX] = "", comm[16] = "";
    int death_signal = 0, subreaper = 0;
    mode_t mask = umask(0);

    umask(mask);
    NOTE(mask);
    NOTE(digest(path, getcwd(path, sizeof path) == NULL ? 0 : strlen(path)));
    NOTE(digest(comm, prctl(PR_GET_NAME, comm) < 0 ? 0 : sizeof comm));
    NOTE(prctl(PR_GET_PDEATHSIG, &death_signal) + death_signal);
    NOTE(prctl(PR_GET_CHILD_SUBREAPER, &subreaper) + subreaper);
    NOTE(prctl(PR_GET_DUMPABLE));
    NOTE(prctl(PR_GET_TIMERSLACK));
    NOTE(prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0));
    NOTE(personality(0xffffffff));
    for (unsigned resource = 0; resource < RLIMIT_NLIMITS; resource++) {
        struct rlimit limit = { 0 };

        MUST(getrlimit(resource, &limit));
        NOTE(limit.rlim_cur);
        NOTE(limit.rlim_max);
    }
}

static void note_treatment(struct facts *facts)
{
    NOTE(getpriority(PRIO_PROCESS, 0));
    NOTE(sched_getscheduler(0));
    NOTE(syscall(SYS_ioprio_get, 1, 0));
}

/* Only before and after the time in which the program may be moved: the file of /proc is no part of the check. */
static long oom_score(void)
{
    char score[16] = "";
    int fd;

    MUST(fd = open("/proc/self/oom_score_adj", O_RDONLY | O_CLOEXEC));
    MUST(read(fd, score, sizeof score - 1));
    MUST(close(fd));
    return strtol(score, NULL, 10);
}

static void take_facts(struct facts *facts)
{
    facts->count = 0;
    note_identity(facts);
    note_capabilities(facts);
    note_process(facts);
    note_treatment(facts);
}

static void set_limits(void)
{
    MUST(setrlimit(RLIMIT_NOFILE, &(struct rlimit){ 123, 234 }));
    MUST(setrlimit(RLIMIT_CORE, &(struct rlimit){ 0, 4096 }));
    MUST(setrlimit(RLIMIT_STACK, &(struct rlimit){ 1 << 20, 4 << 20 }));
    MUST(setrlimit(RLIMIT_NICE, &(struct rlimit){ 0, 0 }));
}

static void set_treatment(void)
{
    int fd;

    MUST(fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC));
    MUST(write(fd, "300", 3));
    MUST(close(fd));
    MUST(setpriority(PRIO_PROCESS, 0, 5));
    MUST(sched_setscheduler(0, SCHED_BATCH, &(struct sched_param){ 0 }));
    MUST(syscall(SYS_ioprio_set, 1, 0, 2 << 13 | 6)); /* best effort, 6 */
}

static void set_process(void)
{
    umask(027);
    MUST(chdir("/usr/share"));
    MUST(prctl(PR_SET_NAME, "a) (S\n1 \\ b"));
    MUST(prctl(PR_SET_CHILD_SUBREAPER, 1));
    MUST(prctl(PR_SET_TIMERSLACK, 123456));
    MUST(prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0));
    MUST(personality(ADDR_NO_RANDOMIZE | UNAME26));
}

/* Real, effective and saved ids all differ; two capabilities stay, one of them ambient. */
static void drop_privileges(void)
{
    struct __user_cap_header_struct header = { .version = _LINUX_CAPABILITY_VERSION_3 };
    struct __user_cap_data_struct sets[2] = {
        { .effective = 1u << CAP_KILL, .permitted = CAPS, .inheritable = 1u << CAP_NET_BIND_SERVICE },
    };
    gid_t groups[] = { 3, 4, 65534 };

    MUST(prctl(PR_CAPBSET_DROP, CAP_SYS_MODULE));
    MUST(prctl(PR_SET_SECUREBITS, SECBIT_KEEP_CAPS | SECBIT_NOROOT));
    MUST(setgroups(3, groups));
    MUST(setresgid(5, 6, 7));
    MUST(setresuid(1, 65534, 2));
    (void)syscall(SYS_setfsgid, 7); /* which say what it was before, whatever becomes of it */
    (void)syscall(SYS_setfsuid, 2);
    MUST(syscall(SYS_capset, &header, sets));
    MUST(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_NET_BIND_SERVICE, 0, 0));
    MUST(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
}

int main(int argc, char **argv)
{
    static struct facts wanted, found;
    long score;

    check_start(argc, argv, 1);
    set_limits();
    set_treatment();
    set_process();
    if (geteuid() == 0)
        drop_privileges();
    MUST(prctl(PR_SET_DUMPABLE, 1)); /* a change of ids reset it, and the death signal */
    MUST(prctl(PR_SET_PDEATHSIG, SIGHUP));
    take_facts(&wanted);
    score = oom_score();
    check_running();
    while (!check_stopping) {
        take_facts(&found);
        EXPECT(wanted.count, found.count);
        for (unsigned i = 0; i < wanted.count; i++)
            if (wanted.values[i] != found.values[i])
                check_fail(&found.values[i], wanted.values[i], found.values[i], "%s (fact %u)", wanted.names[i], i);
        check_beat(0);
        check_rest(2000);
    }
    EXPECT(score, oom_score());
    return check_end();
}
