// The program that tests/tracker.rs lets an engine make a userfaultfd in, while it does all it can to get hold of the descriptor.
//
// `thief` starts threads that copy every descriptor that comes into their table, a process of its own that shares the memory and
// the table, and one that shares neither and reaches for the descriptors of the first by pidfd_getfd. Further threads close and
// replace what is in the table by pipes, so that whoever takes a descriptor back may get another. Started as `thief exec` it has
// threads, of which one after the other calls exec for ever. "ready" is said when all of them
// are at work; "caught" is answered with how many descriptors of a userfaultfd and of its device they have got hold of.
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

// In memory that also the forked process shares.
static struct {
	unsigned long caught, rounds[4];
} *seen;

static pid_t victim;

static void look_at(int fd)
{
	char path[64], link[128];
	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	long length = readlink(path, link, sizeof link - 1);
	link[length > 0 ? length : 0] = 0;
	if (strstr(link, "userfaultfd"))
		__atomic_add_fetch(&seen->caught, 1, __ATOMIC_RELAXED);
}

enum { FIRST = 3, LAST = 8, COPIES = 100 };

static void *copy(void *number)
{
	for (;;) {
		for (int fd = FIRST; fd < LAST; fd++) {
			int copied = fcntl(fd, F_DUPFD_CLOEXEC, COPIES);
			if (copied >= 0) {
				look_at(copied);
				close(copied);
			}
		}
		seen->rounds[(long)number]++;
	}
	return 0;
}

// Nobody else's descriptors are closed: what is open below LAST is what was put here, or somebody else's who should not.
static void *replace(void *number)
{
	int pipes[2];
	if (pipe2(pipes, O_CLOEXEC) != 0)
		exit(1);
	int far = fcntl(pipes[0], F_DUPFD_CLOEXEC, COPIES * 2);
	close(pipes[0]);
	for (;;) {
		for (int fd = FIRST + 3; fd < LAST; fd++) {
			dup3(far, fd, O_CLOEXEC);
			close(fd);
		}
		seen->rounds[(long)number]++;
	}
	return 0;
}

static int share(void *number)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	copy(number);
	return 0;
}

static void reach(long number)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	int process = syscall(SYS_pidfd_open, victim, 0);
	for (;;) {
		for (int fd = FIRST; fd < LAST; fd++) {
			int taken = syscall(SYS_pidfd_getfd, process, fd, 0);
			if (taken >= 0) {
				look_at(taken);
				close(taken);
			}
		}
		seen->rounds[number]++;
	}
}

static void *rest(void *unused)
{
	(void)unused;
	for (;;)
		pause();
	return 0;
}

// The leader and another thread in turn.
static void *exec_on(void *round)
{
	char next[24];
	snprintf(next, sizeof next, "%ld", (long)round + 1);
	execl("/proc/self/exe", "thief", "exec", next, (char *)0);
	exit(1);
}

static void exec_for_ever(long round)
{
	pthread_t thread;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	for (int i = 0; i < 3; i++)
		pthread_create(&thread, 0, rest, 0);
	if (round == 0) {
		puts("ready");
		fflush(stdout);
	}
	if (round % 2 == 0)
		exec_on((void *)round);
	pthread_create(&thread, 0, exec_on, (void *)round);
	rest(0);
}

int main(int argc, char **argv)
{
	char line[64];
	if (argc > 1 && !strcmp(argv[1], "exec"))
		exec_for_ever(argc > 2 ? atol(argv[2]) : 0);
	pthread_t thread;
	seen = mmap(0, sizeof *seen, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	victim = getpid();
	prctl(PR_SET_DUMPABLE, 1);
	setvbuf(stdout, 0, _IOLBF, 0);
	if (fork() == 0)
		reach(0);
	char *stack = malloc(1 << 16);
	if (clone(share, stack + (1 << 16), CLONE_VM | CLONE_FILES | CLONE_FS | SIGCHLD, (void *)1L) < 0)
		return 1;
	pthread_create(&thread, 0, copy, (void *)2L);
	pthread_create(&thread, 0, replace, (void *)3L);
	for (int i = 0; i < 4; i++)
		while (__atomic_load_n(&seen->rounds[i], __ATOMIC_RELAXED) < 10)
			usleep(1000);
	puts("ready");
	while (fgets(line, sizeof line, stdin)) {
		if (strcmp(line, "caught\n") == 0)
			printf("%lu\n", __atomic_load_n(&seen->caught, __ATOMIC_RELAXED));
		else
			puts("ok");
	}
	return 0;
}
