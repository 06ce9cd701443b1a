// The program whose memory tests/tracker.rs follows: it changes its memory in every way a program can.
//
// Commands come as lines on standard input, each is answered with one line. It calls no malloc after the start, so that
// brk is its own. Started as `work` it changes its memory for ever; as `flood PID COUNT` it sends signals; as
// `collapse PID BLOCK` it does to that program what khugepaged may do.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define HUGE (2UL << 20)

static const char *self;

static void die(const char *what) {
	perror(what);
	_exit(99);
}

static void say(const char *format, ...) {
	char line[256];
	va_list args;
	va_start(args, format);
	int n = vsnprintf(line, sizeof line - 1, format, args);
	va_end(args);
	line[n++] = '\n';
	if (write(1, line, n) != n)
		_exit(98);
}

// ---- random steps ------------------------------------------------------------------------------------------------

static uint64_t seed = 1;

static uint64_t rnd(uint64_t below) {
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return seed % below;
}

struct arena {
	char *at;
	size_t pages;
	int closed; // PROT_NONE at the moment
};

#define ARENAS 24
static struct arena arenas[ARENAS];
static char *brk_start;
static int backing = -1; // a file of 64 pages, mapped privately

static void *map(size_t bytes) {
	void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (at == MAP_FAILED)
		die("mmap");
	return at;
}

static void scribble(char *at, size_t pages, int count) {
	while (count-- > 0) {
		char *page = at + rnd(pages) * PAGE;
		if (rnd(4) == 0)
			memset(page, (int)rnd(256), PAGE);
		else
			*(volatile uint64_t *)(page + rnd(PAGE / 8) * 8) = seed;
	}
}

static struct arena *any_arena(void) {
	for (int tries = 0; tries < 100; tries++) {
		struct arena *a = &arenas[rnd(ARENAS)];
		if (a->at && !a->closed)
			return a;
	}
	return NULL;
}

static void drop_arena(struct arena *a) {
	if (a->at && munmap(a->at, a->pages * PAGE))
		die("munmap");
	a->at = NULL;
	a->closed = 0;
}

static void new_arena(void) {
	struct arena *a = &arenas[rnd(ARENAS)];
	drop_arena(a);
	a->pages = 1 + rnd(200);
	switch (rnd(3)) {
	case 0: // transparent huge pages
		a->pages = 2 * HUGE / PAGE;
		a->at = map(a->pages * PAGE);
		madvise(a->at, a->pages * PAGE, MADV_HUGEPAGE);
		break;
	case 1: // a private file mapping
		a->pages = 64;
		a->at = mmap(NULL, a->pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, backing, 0);
		if (a->at == MAP_FAILED)
			die("mmap of a file");
		break;
	default:
		a->at = map(a->pages * PAGE);
	}
	scribble(a->at, a->pages, 1 + (int)rnd(a->pages));
}

// A range in which something was mapped anew may be several mappings, the more so while a userfaultfd tracks it. mremap
// refuses such ranges, or moves a part of them; either way the arena is given up.
static void grow_or_shrink(struct arena *a) {
	size_t pages = 1 + rnd(2 * a->pages);
	if (pages > 1024)
		pages = 1024;
	char *at = mremap(a->at, a->pages * PAGE, pages * PAGE, MREMAP_MAYMOVE);
	if (at == MAP_FAILED) {
		drop_arena(a);
		return;
	}
	a->at = at;
	a->pages = pages;
}

static void move(struct arena *a) {
	char *to = map(a->pages * PAGE);
	char *at = mremap(a->at, a->pages * PAGE, a->pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to);
	if (at == MAP_FAILED) {
		munmap(to, a->pages * PAGE);
		drop_arena(a);
		return;
	}
	a->at = at;
	if (rnd(2))
		scribble(a->at, a->pages < 64 ? a->pages : 64, 3);
}

static void part(struct arena *a, char **at, size_t *pages) {
	size_t first = rnd(a->pages);
	*at = a->at + first * PAGE;
	*pages = 1 + rnd(a->pages - first);
}

static void protect(char *at, size_t pages, int access) {
	if (mprotect(at, pages * PAGE, access))
		die("mprotect");
}

static void move_brk(void) {
	char *now = sbrk(0);
	if (now - brk_start > (ptrdiff_t)(100 * PAGE) && rnd(2)) {
		sbrk(-(intptr_t)((1 + rnd(90)) * PAGE));
	} else {
		size_t pages = 1 + rnd(60);
		char *at = sbrk((intptr_t)(pages * PAGE));
		if (at == (void *)-1)
			die("sbrk");
		memset(at, (int)rnd(256), pages * PAGE);
	}
}

static void steps(int count);

static void child_of(int count, int exec) {
	pid_t child = fork();
	if (child < 0)
		die("fork");
	if (child == 0) {
		seed += (uint64_t)getpid();
		steps(count);
		if (exec) {
			execl(self, self, "work", NULL);
			die("exec");
		}
		_exit(0);
	}
}

static void vfork_exec(int pause_ms) {
	pid_t child = vfork();
	if (child < 0)
		die("vfork");
	if (child == 0) {
		// On the parent's memory.
		struct arena *a = any_arena();
		if (a && a->pages >= 64)
			*(volatile uint64_t *)a->at = seed;
		if (pause_ms)
			usleep((useconds_t)pause_ms * 1000);
		execl("/bin/true", "true", NULL);
		_exit(97);
	}
	while (waitpid(child, NULL, 0) < 0 && errno == EINTR)
		;
}

static void reap(void) {
	while (waitpid(-1, NULL, WNOHANG) > 0)
		;
}

// A file mapping may have been grown past its end, where touching is SIGBUS.
static void guard(int signal) {
	(void)signal;
	_exit(96);
}

static void step(void) {
	struct arena *a = any_arena();
	uint64_t what = rnd(100);
	if (!a || what < 6) {
		new_arena();
		return;
	}
	char *at;
	size_t pages;
	part(a, &at, &pages);
	int file = a->pages == 64; // never resized, so that it stays within its file
	if (what < 60) {
		scribble(a->at, a->pages, 1 + (int)rnd(4));
	} else if (what < 64) {
		drop_arena(a);
	} else if (what < 68) {
		if (!file) {
			grow_or_shrink(a);
			if (a->at && a->pages == 64)
				drop_arena(a);
		}
	} else if (what < 72) {
		move(a);
	} else if (what < 78) {
		madvise(at, pages * PAGE, MADV_DONTNEED);
		if (rnd(2))
			(void)*(volatile char *)at;
	} else if (what < 80) {
		madvise(at, pages * PAGE, MADV_FREE);
	} else if (what < 84) {
		move_brk();
	} else if (what < 88) {
		protect(at, pages, PROT_NONE);
		if (rnd(2))
			usleep(300);
		protect(at, pages, PROT_READ | PROT_WRITE);
		scribble(at, pages, 2);
	} else if (what < 91) {
		a->closed = 1;
		protect(a->at, a->pages, PROT_NONE);
	} else if (what < 95) {
		for (int i = 0; i < ARENAS; i++) {
			if (arenas[i].at && arenas[i].closed) {
				arenas[i].closed = 0;
				protect(arenas[i].at, arenas[i].pages, PROT_READ | PROT_WRITE);
				scribble(arenas[i].at, arenas[i].pages, 1);
				break;
			}
		}
	} else if (what < 99) {
		if (mmap(at, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED)
			die("mmap over");
		scribble(at, pages, 2);
	} else if (rnd(4) == 0) {
		vfork_exec(0);
	}
}

static void steps(int count) {
	for (int i = 0; i < count; i++)
		step();
}

static void work_for_ever(void) {
	for (int round = 0;; round++) {
		steps(20);
		usleep(500);
		if (round % 256 == 255)
			child_of(200, 0);
		reap();
	}
}

// ---- threads -----------------------------------------------------------------------------------------------------

static char *shared_block;
#define BLOCK_PAGES 2048

static void *writer(void *arg) {
	uint64_t state = (uint64_t)(uintptr_t)arg * 0x9e3779b97f4a7c15ULL | 1;
	for (;;) {
		for (int i = 0; i < 200; i++) {
			state = state * 6364136223846793005ULL + 1442695040888963407ULL;
			*(volatile uint64_t *)(shared_block + (state >> 33) % BLOCK_PAGES * PAGE + (state >> 20) % 512 * 8) = state;
		}
		usleep(300);
	}
	return NULL;
}

static void start_threads(int count) {
	if (!shared_block)
		shared_block = map(BLOCK_PAGES * PAGE);
	for (int i = 0; i < count; i++) {
		pthread_t thread;
		if (pthread_create(&thread, NULL, writer, (void *)(uintptr_t)(i + 1)))
			die("pthread_create");
	}
}

// ---- signals -----------------------------------------------------------------------------------------------------

static volatile sig_atomic_t caught;

static void count_signal(int signal) {
	(void)signal;
	__atomic_add_fetch(&caught, 1, __ATOMIC_RELAXED); // two threads may be in here
}

static double seconds(void) {
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

// The longest time a thread that never rests stood still, in nanoseconds.
static volatile long longest_gap, ticks;

static void *watch(void *unused) {
	(void)unused;
	double last = seconds();
	for (;;) {
		double now = seconds();
		long gap = (long)((now - last) * 1e9);
		if (gap > longest_gap)
			longest_gap = gap;
		last = now;
		ticks++;
	}
	return NULL;
}

// ---- a container's confinement -------------------------------------------------------------------------------------

// Own network, no privileges, and a filter that kills for anything but reading, writing and stopping.
static void jail(void) {
	if (unshare(CLONE_NEWNET))
		die("unshare");
	if (setresgid(65534, 65534, 65534) || setresuid(65534, 65534, 65534))
		die("setresuid");
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
		die("no_new_privs");
	struct sock_filter filter[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_read, 4, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_write, 3, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_restart_syscall, 2, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_exit_group, 1, 0),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = { sizeof filter / sizeof *filter, filter };
	if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program, 0, 0))
		die("seccomp");
}

// ---- commands ----------------------------------------------------------------------------------------------------

static char *block; // of the commands fill and poke
static size_t block_pages;

static void *answer_commands(void *);

static void obey(char *line) {
	long n = 0, m = 0;
	char *space = strchr(line, ' ');
	if (space) {
		*space++ = 0;
		n = strtol(space, &space, 10);
		m = strtol(space, NULL, 10);
	}
	if (!strcmp(line, "fill")) { // a block of n MiB
		block_pages = (size_t)n << 8;
		block = map(block_pages * PAGE);
		madvise(block, block_pages * PAGE, m ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
		for (size_t i = 0; i < block_pages; i++)
			*(volatile uint64_t *)(block + i * PAGE + i % 512 * 8) = i + 1;
		say("%lx", (unsigned long)block);
		return;
	} else if (!strcmp(line, "file")) { // a private mapping of a file instead, written as a whole
		block_pages = 64;
		block = mmap(NULL, block_pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, backing, 0);
		if (block == MAP_FAILED)
			die("mmap of a file");
		for (size_t i = 0; i < block_pages; i++)
			*(volatile uint64_t *)(block + i * PAGE) = ~i;
	} else if (!strcmp(line, "drop")) { // m pages from page n, not looked at again
		if (madvise(block + (size_t)n * PAGE, (size_t)m * PAGE, MADV_DONTNEED))
			die("madvise");
	} else if (!strcmp(line, "poke")) { // m pages from page n of the block
		for (long i = n; i < n + m; i++)
			*(volatile uint64_t *)(block + (size_t)i * PAGE + 8) += 1;
	} else if (!strcmp(line, "pace")) { // writes every nth page of the block: says how many and in how many ns
		size_t pages = 0;
		double start = seconds();
		for (size_t i = 0; i < block_pages; i += (size_t)n, pages++)
			*(volatile uint64_t *)(block + i * PAGE + 8) += 1;
		say("%ld %ld", (long)pages, (long)((seconds() - start) * 1e9));
		return;
	} else if (!strcmp(line, "watch")) { // from now on a thread watches for gaps
		pthread_t thread;
		if (pthread_create(&thread, NULL, watch, NULL))
			die("pthread_create");
	} else if (!strcmp(line, "gap")) { // the longest gap since the last question, in ns
		// Where it stands still at this moment, it has not seen it yet.
		for (long now = ticks; ticks < now + 2;)
			usleep(10);
		long gap = longest_gap;
		longest_gap = 0;
		say("%ld", gap);
		return;
	} else if (!strcmp(line, "executable")) {
		if (mprotect(block, block_pages * PAGE, PROT_READ | PROT_WRITE | PROT_EXEC))
			die("mprotect");
	} else if (!strcmp(line, "renew")) { // another block in its place, of which a page in 512 is there
		if (mmap(block, block_pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != block)
			die("mmap over the block");
		madvise(block, block_pages * PAGE, MADV_NOHUGEPAGE);
		for (size_t i = 7; i < block_pages; i += 512)
			*(volatile uint64_t *)(block + i * PAGE) = ~i;
		madvise(block, block_pages * PAGE, MADV_HUGEPAGE);
	} else if (!strcmp(line, "drop-and-read")) {
		for (long i = n; i < n + m; i++) {
			madvise(block + (size_t)i * PAGE, PAGE, MADV_DONTNEED);
			(void)*(volatile char *)(block + (size_t)i * PAGE);
		}
	} else if (!strcmp(line, "move")) { // the block elsewhere
		char *to = map(block_pages * PAGE);
		block = mremap(block, block_pages * PAGE, block_pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to);
		if (block == MAP_FAILED)
			die("mremap");
		say("%lx", (unsigned long)block);
		return;
	} else if (!strcmp(line, "steps")) {
		steps((int)n);
	} else if (!strcmp(line, "threads")) {
		start_threads((int)n);
	} else if (!strcmp(line, "workers")) { // children that go on for ever
		for (long i = 0; i < n; i++) {
			pid_t child = fork();
			if (child < 0)
				die("fork");
			if (child == 0) {
				seed += (uint64_t)getpid();
				if (i % 2)
					execl(self, self, "work", NULL);
				work_for_ever();
			}
		}
	} else if (!strcmp(line, "fork")) { // n children that do m steps and stay
		for (long i = 0; i < n; i++) {
			pid_t child = fork();
			if (child < 0)
				die("fork");
			if (child == 0) {
				seed += (uint64_t)getpid();
				steps((int)m);
				for (;;)
					pause();
			}
		}
	} else if (!strcmp(line, "exec")) {
		execl(self, self, "again", NULL);
		die("exec");
	} else if (!strcmp(line, "vfork")) { // the child waits n ms on our memory before its exec
		say("ok");
		vfork_exec((int)n);
		return;
	} else if (!strcmp(line, "hugetlb")) { // n huge pages, touched if m
		char *at = mmap(NULL, (size_t)n * HUGE, PROT_READ | PROT_WRITE,
				MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | (m ? 0 : MAP_NORESERVE), -1, 0);
		if (at == MAP_FAILED) {
			say("none");
			return;
		}
		if (m)
			memset(at, 7, (size_t)n * HUGE);
		say("%lx", (unsigned long)at);
		return;
	} else if (!strcmp(line, "nap")) { // n ms in a restartable sleep: says what it returned and how long it took
		struct timespec time = { n / 1000, n % 1000 * 1000000 };
		say("ok");
		double start = seconds();
		int slept = nanosleep(&time, NULL);
		say("%d %ld", slept, (long)((seconds() - start) * 1000));
		return;
	} else if (!strcmp(line, "listen")) { // waits in sigsuspend for one SIGUSR1, otherwise blocked
		sigset_t usr1, all_but;
		sigemptyset(&usr1);
		sigaddset(&usr1, SIGUSR1);
		sigprocmask(SIG_BLOCK, &usr1, NULL);
		sigfillset(&all_but);
		sigdelset(&all_but, SIGUSR1);
		struct sigaction action = { .sa_handler = count_signal };
		sigaction(SIGUSR1, &action, NULL);
		say("ok");
		sigsuspend(&all_but);
		sigset_t now;
		sigprocmask(SIG_BLOCK, NULL, &now);
		say("%d %d", (int)caught, sigismember(&now, SIGUSR1));
		return;
	} else if (!strcmp(line, "count")) { // from now on counts SIGRTMIN
		struct sigaction action = { .sa_handler = count_signal, .sa_flags = SA_RESTART };
		sigaction(SIGRTMIN, &action, NULL);
		caught = 0;
	} else if (!strcmp(line, "counted")) {
		say("%d", (int)caught);
		return;
	} else if (!strcmp(line, "headless")) { // go on in another thread; the leader exits
		pthread_t thread;
		if (pthread_create(&thread, NULL, answer_commands, NULL))
			die("pthread_create");
		say("ok");
		pthread_exit(NULL);
	} else if (!strcmp(line, "jail")) {
		jail(); // from here on waitpid would be death
		say("ok");
		return;
	} else {
		say("what is %s?", line);
		return;
	}
	reap();
	say("ok");
}

static void jailed_obey(char *line) {
	// Without waitpid, which the jail forbids.
	long n = 0, m = 1;
	sscanf(line, "%*s %ld %ld", &n, &m);
	for (long i = n; i < n + m; i++)
		*(volatile uint64_t *)(block + (size_t)i * PAGE + 8) += 1;
	say("ok");
}

static int jailed;

static void *answer_commands(void *unused) {
	(void)unused;
	static char line[128];
	size_t length = 0;
	for (;;) {
		char c;
		ssize_t got = read(0, &c, 1);
		if (got < 0)
			say("read failed with %d", errno); // an interrupted read must restart by itself
		if (got <= 0)
			_exit(0);
		if (c != '\n') {
			if (length < sizeof line - 1)
				line[length++] = c;
			continue;
		}
		line[length] = 0;
		length = 0;
		if (jailed) {
			jailed_obey(line);
		} else {
			jailed = !strcmp(line, "jail");
			obey(line);
		}
	}
}

int main(int argc, char **argv) {
	self = "/proc/self/exe";
	if (argc > 3 && !strcmp(argv[1], "flood")) { // PID COUNT: so many SIGRTMIN, which queue and are never merged
		for (int i = atoi(argv[3]); i > 0; i--) {
			if (kill(atoi(argv[2]), SIGRTMIN))
				die("kill");
			usleep(100);
		}
		return 0;
	}
	if (argc > 3 && !strcmp(argv[1], "collapse")) { // PID BLOCK: the first 2 MiB that can be a huge page become one
		int process = (int)syscall(SYS_pidfd_open, atoi(argv[2]), 0);
		uintptr_t at = (strtoul(argv[3], NULL, 16) + HUGE - 1) & ~(HUGE - 1);
		struct iovec range = { (void *)at, HUGE };
		if (syscall(SYS_process_madvise, process, &range, 1, 25 /* MADV_COLLAPSE */, 0) != (long)HUGE)
			die("collapse");
		return 0;
	}
	signal(SIGBUS, guard);
	if (prctl(PR_SET_PDEATHSIG, SIGKILL))
		die("pdeathsig");
	char name[] = "/tmp/dirtier-XXXXXX";
	backing = mkstemp(name);
	if (backing < 0 || ftruncate(backing, 64 * PAGE))
		die("backing file");
	for (unsigned i = 0; i < 64; i++) {
		char page[PAGE];
		memset(page, (int)i + 1, PAGE);
		if (pwrite(backing, page, PAGE, i * PAGE) != PAGE)
			die("backing file");
	}
	unlink(name);
	seed = (uint64_t)getpid() * 2654435761u + 1;
	// What malloc will ever need (the tables of threads) it takes now, below the part of brk that moves.
	free(malloc(64000));
	brk_start = sbrk(0);
	for (int i = 0; i < 8; i++)
		new_arena();
	if (argc > 1 && !strcmp(argv[1], "work"))
		work_for_ever();
	say("ready");
	answer_commands(NULL);
}
