/* A program that changes one thing of itself when it is told to: `words` are its own name, the FIFO in which it says
 * that it is done, the FIFO in which it hears the name of a change, its directory, a file that it maps and one that it
 * holds. A part of tests/live/test_between.py, behind the prelude of tests/live/tracees.py. */
#include <grp.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/time.h>

#define PAGE 4096L
#define OK(x) do { if ((long)(x) == -1) _exit(__LINE__ % 90 + 2); } while (0)

static char *area, *apart, *mapped;
static int held, spare;

static void handler(int sig) { (void)sig; }

static void *idle(void *arg)
{
	for (;;)
		pause();
	return arg;
}

static char *anonymous(long pages)
{
	char *at = mmap(0, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	OK(at);
	memset(at, 1, pages * PAGE);
	return at;
}

static void map_file(const char *path, char *at, int flags)
{
	int fd = open(path, O_RDWR);

	OK(fd);
	OK(mmap(at, PAGE, PROT_READ, flags, fd, 0));
	OK(close(fd));
}

static void write_file(const char *path, int flags)
{
	int fd = open(path, O_RDWR | flags, 0600);

	OK(fd);
	OK(write(fd, "other", 5));
	OK(close(fd));
}

/* --- memory --- */
static void map(void) { anonymous(3); }
static void unmap(void) { OK(munmap(area, 8 * PAGE)); }
static void unmap_a_part(void) { OK(munmap(area + 2 * PAGE, PAGE)); }
static void protect(void) { OK(mprotect(area, 8 * PAGE, PROT_READ)); }
static void move(void) { OK(mremap(area, 8 * PAGE, 8 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, apart)); }
static void lock(void) { OK(mlock(area, 8 * PAGE)); }
static void grow_the_heap(void) { OK(sbrk(16 * PAGE)); }
static void grow_the_heap_within_a_page(void) { OK(sbrk(16)); }
static void map_shared(void) { OK(mmap(0, PAGE, PROT_READ, MAP_SHARED | MAP_ANONYMOUS, -1, 0)); }
static void map_a_file(void) { map_file(words[5], 0, MAP_SHARED); }
static void map_another_file_there(void) { map_file(words[5], mapped, MAP_SHARED | MAP_FIXED); }
static void grow_the_mapped_file(void) { OK(truncate(words[4], 3 * PAGE)); }
static void write_to_the_mapped_file(void) { write_file(words[4], 0); }
static void remove_the_mapped_file(void) { OK(unlink(words[4])); }

static void replace_the_mapped_file(void)
{
	remove_the_mapped_file();
	write_file(words[4], O_CREAT | O_EXCL);
}

static void guard_in_a_new_mapping(void)
{
	if (madvise(anonymous(4), PAGE, 102 /* MADV_GUARD_INSTALL */) < 0 && errno != EINVAL)
		_exit(98);
}

/* --- descriptors --- */
static void open_one(void) { OK(open(words[5], O_RDONLY)); }
static void close_one(void) { OK(close(held)); }
static void replace_a_descriptor(void) { OK(dup2(spare, held)); }
static void position(void) { OK(lseek(held, 2, SEEK_SET)); }
static void status_flags(void) { OK(fcntl(held, F_SETFL, O_APPEND)); }
static void close_on_exec(void) { OK(fcntl(held, F_SETFD, FD_CLOEXEC)); }
static void signal_of_a_descriptor(void) { OK(fcntl(held, F_SETSIG, SIGUSR2)); }

static void pipe_with_a_byte(void)
{
	int ends[2];

	OK(pipe(ends));
	OK(write(ends[1], "x", 1));
}

/* --- what belongs to the process --- */
static void directory(void) { OK(chdir("/usr")); }
static void file_mode_mask(void) { umask(0137); }
static void ignored(void) { OK(signal(SIGUSR1, SIG_IGN) == SIG_ERR ? -1 : 0); }
static void subreaper(void) { OK(prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)); }
static void program(void) { OK(execv(words[0], words)); }

static void action(void)
{
	struct sigaction new = { .sa_handler = handler, .sa_flags = SA_RESTART };

	OK(sigaction(SIGUSR1, &new, 0));
}

static void limit(void)
{
	struct rlimit new = { 100, 200 };

	OK(setrlimit(RLIMIT_CORE, &new));
}

static void timer(void)
{
	struct itimerval new = { { 3, 0 }, { 5, 0 } }; /* of CPU time: it stands still between two dumps */

	OK(setitimer(ITIMER_VIRTUAL, &new, 0));
}

static void root(void)
{
	OK(chroot(words[3]));
	words[1] = "/fifo";
	words[2] = "/orders";
}

static void child(void)
{
	pid_t parent = getpid(), pid = fork();

	OK(pid);
	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (getppid() != parent) /* it was killed before that was said */
			_exit(0);
		idle(0);
	}
}

/* --- what belongs to a thread --- */
static void user(void) { OK(setresuid(1, 0, 2)); }
static void capabilities(void) { OK(prctl(PR_CAPBSET_DROP, 20, 0, 0, 0)); }
static void no_new_privileges(void) { OK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)); }
static void name(void) { OK(prctl(PR_SET_NAME, "a\\b\nc\\\\n", 0, 0, 0)); }
static void nice_value(void) { OK(setpriority(PRIO_PROCESS, 0, 5)); }

static void groups(void)
{
	gid_t new[] = { 7, 9 };

	OK(setgroups(2, new));
}

static void blocked(void)
{
	sigset_t new;

	sigemptyset(&new);
	sigaddset(&new, SIGUSR1);
	OK(sigprocmask(SIG_BLOCK, &new, 0));
}

static void alternate_stack(void)
{
	static char stack[1 << 16];
	stack_t new = { .ss_sp = stack, .ss_size = sizeof(stack) };

	OK(sigaltstack(&new, 0));
}

static void processors(void)
{
	cpu_set_t new;

	CPU_ZERO(&new);
	CPU_SET(0, &new);
	OK(sched_setaffinity(0, sizeof(new), &new));
}

static void thread(void)
{
	pthread_t new;

	OK(pthread_create(&new, 0, idle, 0) ? -1 : 0);
}

#define CHANGE(name) { #name, name },
static const struct { const char *name; void (*change)(void); } changes[] = {
	CHANGE(map) CHANGE(unmap) CHANGE(unmap_a_part) CHANGE(protect) CHANGE(move) CHANGE(lock)
	CHANGE(grow_the_heap) CHANGE(grow_the_heap_within_a_page) CHANGE(map_shared) CHANGE(map_a_file)
	CHANGE(map_another_file_there) CHANGE(grow_the_mapped_file) CHANGE(write_to_the_mapped_file)
	CHANGE(remove_the_mapped_file) CHANGE(replace_the_mapped_file) CHANGE(guard_in_a_new_mapping)
	CHANGE(open_one) CHANGE(close_one) CHANGE(replace_a_descriptor) CHANGE(position) CHANGE(status_flags)
	CHANGE(close_on_exec) CHANGE(signal_of_a_descriptor) CHANGE(pipe_with_a_byte)
	CHANGE(directory) CHANGE(root) CHANGE(file_mode_mask) CHANGE(ignored) CHANGE(subreaper) CHANGE(program)
	CHANGE(action) CHANGE(limit) CHANGE(timer) CHANGE(child)
	CHANGE(user) CHANGE(capabilities) CHANGE(no_new_privileges) CHANGE(name)
	CHANGE(nice_value) CHANGE(groups) CHANGE(blocked) CHANGE(alternate_stack) CHANGE(processors) CHANGE(thread)
};

static void change(const char *what)
{
	for (size_t i = 0; i < sizeof(changes) / sizeof(*changes); i++) {
		if (!strcmp(changes[i].name, what)) {
			changes[i].change();
			return;
		}
	}
	_exit(97);
}

int main(int c, char **v)
{
	(void)c;
	words = v;
	OK(chdir(words[3]));
	area = anonymous(8);
	apart = anonymous(8);
	OK(held = open(words[5], O_RDWR));
	OK(spare = open("/dev/null", O_RDWR));
	map_file(words[4], mapped = anonymous(1), MAP_SHARED | MAP_FIXED);
	for (;;) {
		char what[64] = "";
		int fd;

		say("done\n", 0, 0, 0);
		OK(fd = open(words[2], O_RDONLY));
		OK(read(fd, what, sizeof(what) - 1));
		OK(close(fd));
		change(what);
	}
}
