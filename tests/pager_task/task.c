/*
 * A task as CRIU restores it lazily: it maps memory at a fixed address, opens a userfaultfd with CRIU's features, hands it
 * over on CRIU's connection (file descriptor 0), registers the memory as missing and forgets the userfaultfd. Then
 * it does what it is told on file descriptor 1, one line a command, one line an answer.
 *
 * usage: task VPID BASE PAGES DELAY_MS     BASE: address in hex; DELAY_MS: between handing over and registering
 *        task connect SOCKET               connects; exit code 0: nothing was said to it before the end
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ul
#define WORDS (PAGE / 8)
#define ZERO (-1L)
#define NONE (-2L)
/* And below: written by the task itself, each time with another number. */
#define WRITTEN (-3L)

static char *base;
static long pages;

static void die(const char *what)
{
	dprintf(1, "error %s: %s\n", what, strerror(errno));
	exit(1);
}

/* The contents of a page at the dump. Every seventh page is zero, as are the pages of the last eighth. */
static uint64_t word(long home, unsigned long i)
{
	if (home <= WRITTEN)
		return (uint64_t)home * 0xd6e8feb86659fd93ull + i;
	if (home == ZERO || home % 7 == 3 || home >= pages - pages / 8)
		return 0;
	return ((uint64_t)home * 0x9e3779b97f4a7c15ull + i * 0xbf58476d1ce4e5b9ull) | 1;
}

/* 0: the page at `page` has the contents of page `home` of the dump. */
static int differs(long page, long home)
{
	volatile uint64_t *p = (volatile uint64_t *)(base + page * PAGE);
	for (unsigned long i = 0; i < WORDS; i++)
		if (p[i] != word(home, i))
			return 1;
	return 0;
}

static long first_wrong(long page, long n, long home)
{
	for (long i = 0; i < n; i++)
		if (differs(page + i, home == ZERO ? ZERO : home + i))
			return page + i;
	return -1;
}

static void answer_wrong(long wrong)
{
	if (wrong < 0)
		dprintf(1, "ok\n");
	else
		dprintf(1, "wrong page %ld: %016lx\n", wrong, *(uint64_t *)(base + wrong * PAGE));
}

static void send_fd(int sock, int fd)
{
	char dummy = 0, control[CMSG_SPACE(sizeof(int))] = {0};
	struct iovec iov = {&dummy, 1};
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
	struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
	c->cmsg_level = SOL_SOCKET;
	c->cmsg_type = SCM_RIGHTS;
	c->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(c), &fd, sizeof(int));
	if (sendmsg(sock, &msg, 0) != 1)
		die("sendmsg");
}

static int compare(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
	return x < y ? -1 : x > y;
}

static uint64_t rng;
static unsigned long draw(unsigned long below)
{
	rng ^= rng << 13;
	rng ^= rng >> 7;
	rng ^= rng << 17;
	return rng % below;
}

/* Touches random pages and reports how long each first touch took. */
static void latency(long count)
{
	uint64_t *took = calloc(count, sizeof(*took));
	for (long i = 0; i < count; i++) {
		long page = draw(pages);
		struct timespec a, b;
		clock_gettime(CLOCK_MONOTONIC, &a);
		uint64_t seen = *(volatile uint64_t *)(base + page * PAGE);
		clock_gettime(CLOCK_MONOTONIC, &b);
		if (seen != word(page, 0)) {
			dprintf(1, "wrong page %ld: %016lx\n", page, seen);
			return;
		}
		took[i] = (b.tv_sec - a.tv_sec) * 1000000000ull + b.tv_nsec - a.tv_nsec;
	}
	/* Touches under a microsecond met no fault. */
	qsort(took, count, sizeof(*took), compare);
	long first = 0;
	while (first < count && took[first] < 1000)
		first++;
	long faults = count - first;
	if (!faults)
		dprintf(1, "latency 0 0 0 0\n");
	else
		dprintf(1, "latency %ld %lu %lu %lu\n", faults, took[first + faults / 2], took[first + faults * 99 / 100],
			took[count - 1]);
	free(took);
}

static int wait_for(pid_t child)
{
	int status;
	if (waitpid(child, &status, 0) != child)
		die("waitpid");
	return !(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

/*
 * Random removals, moves, unmappings, writes and forks, against a model of what each page must contain. Written pages are
 * kept apart from the pages of the dump by numbers above all of those.
 */
static void stress(long ops)
{
	long *home = malloc(pages * sizeof(long));
	int bad = 0;
	long at = -1;
	for (long i = 0; i < pages; i++)
		home[i] = i;
	for (long op = 0; op < ops && !bad; op++) {
		long n = 1 + draw(64), from = draw(pages - n);
		int mapped = 1;
		for (long i = from; i < from + n; i++)
			mapped &= home[i] != NONE;
		switch (draw(8)) {
		case 0:
			if (!mapped)
				break;
			if (madvise(base + from * PAGE, n * PAGE, MADV_DONTNEED))
				die("dontneed");
			for (long i = from; i < from + n; i++)
				home[i] = ZERO;
			break;
		case 1: {
			long to = draw(pages - n);
			if (!mapped || labs(to - from) < n)
				break;
			/* mremap moves one mapping only; earlier moves may have split this one. */
			if (mremap(base + from * PAGE, n * PAGE, n * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, base + to * PAGE) == MAP_FAILED) {
				/* The target may be unmapped already; then so it is in the model. */
				if (errno != EFAULT)
					die("mremap");
				for (long i = 0; i < n; i++) {
					unsigned char vec;
					if (mincore(base + (to + i) * PAGE, PAGE, &vec))
						home[to + i] = NONE;
				}
				break;
			}
			for (long i = 0; i < n; i++) {
				home[to + i] = home[from + i];
				home[from + i] = NONE;
			}
			break;
		}
		case 2:
			if (draw(4))
				break;
			if (munmap(base + from * PAGE, n * PAGE))
				die("munmap");
			for (long i = from; i < from + n; i++)
				home[i] = NONE;
			break;
		case 3:
			if (draw(8))
				break;
			{
				pid_t child = fork();
				if (child < 0)
					die("fork");
				if (!child) {
					for (int k = 0; k < 2000; k++) {
						long i = draw(pages);
						if (home[i] != NONE && differs(i, home[i]))
							_exit(1);
					}
					_exit(0);
				}
				if (draw(2) && mapped) {
					/* While the child still misses them. */
					if (madvise(base + from * PAGE, n * PAGE, MADV_DONTNEED))
						die("dontneed");
					for (long i = from; i < from + n; i++)
						home[i] = ZERO;
				}
				if (wait_for(child)) {
					bad = 1;
					at = -2;
				}
			}
			break;
		default:
			for (long i = from; i < from + n && !bad; i++)
				if (home[i] != NONE && differs(i, home[i])) {
					bad = 1;
					at = i;
				}
		}
	}
	for (long i = 0; i < pages && !bad; i++)
		if (home[i] != NONE && differs(i, home[i])) {
			bad = 1;
			at = i;
		}
	if (bad && at == -2)
		dprintf(1, "wrong in a child\n");
	else if (bad)
		dprintf(1, "wrong page %ld home %ld: %016lx\n", at, home[at], *(uint64_t *)(base + at * PAGE));
	else
		dprintf(1, "ok\n");
	free(home);
}

/*
 * Whole mappings on the move: blocks of the memory and of a spare place behind it are moved over each other and over nothing,
 * swapped, moved with their addresses kept, shrunk and grown again, thrown away, written and forked, mostly without a look at
 * them, so that changes come as fast as the kernel can make them. A model says what each page must contain.
 */
#define BLOCK 128l
#define SPARE 6l

static void *move_to(long from, long to, int flags)
{
	return mremap(base + from * BLOCK * PAGE, BLOCK * PAGE, BLOCK * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED | flags, base + to * BLOCK * PAGE);
}

static void shuffle(long ops)
{
	long blocks = (pages + BLOCK - 1) / BLOCK + SPARE, cut = pages / 3 / BLOCK, written = WRITTEN;
	long *home = malloc(blocks * BLOCK * sizeof(long)), *swap = malloc(BLOCK * sizeof(long));
	for (long i = 0; i < blocks * BLOCK; i++)
		home[i] = i < pages ? i : NONE;
	for (long op = 0; op < ops; op++) {
		long a = draw(blocks), b = draw(blocks), spare = blocks - 1, n = 1 + draw(BLOCK), *x = home + a * BLOCK, *y = home + b * BLOCK;
		/* The last is for swapping, and across the cut there are two mappings. */
		if (a == b || a == spare || b == spare || a == cut || b == cut || x[0] == NONE)
			continue;
		switch (draw(20)) {
		default: {
			/* The look lets the pager go on, and the way back comes while it places pages. */
			long seen = draw(BLOCK);
			if (move_to(a, spare, 0) == MAP_FAILED)
				die("there");
			int wrong = differs(spare * BLOCK + seen, x[seen]);
			if (move_to(spare, a, 0) == MAP_FAILED)
				die("back");
			if (wrong) {
				dprintf(1, "wrong page %ld home %ld on its way, op %ld\n", a * BLOCK + seen, x[seen], op);
				return;
			}
			if (!draw(4))
				usleep(draw(200));
			break;
		}
		case 0:
		case 1:
			if (y[0] != NONE && draw(4))
				break;
			if (move_to(a, b, 0) == MAP_FAILED)
				die("mremap");
			memcpy(y, x, BLOCK * sizeof(long));
			for (long i = 0; i < BLOCK; i++)
				x[i] = NONE;
			break;
		case 2:
		case 3:
		case 4:
			if (y[0] == NONE)
				break;
			if (move_to(a, spare, 0) == MAP_FAILED || move_to(b, a, 0) == MAP_FAILED || move_to(spare, b, 0) == MAP_FAILED)
				die("swap");
			memcpy(swap, x, BLOCK * sizeof(long));
			memcpy(x, y, BLOCK * sizeof(long));
			memcpy(y, swap, BLOCK * sizeof(long));
			break;
		case 5:
			if (y[0] != NONE)
				break;
			if (move_to(a, b, MREMAP_DONTUNMAP) == MAP_FAILED)
				die("mremap that keeps its place");
			memcpy(y, x, BLOCK * sizeof(long));
			for (long i = 0; i < BLOCK; i++)
				x[i] = ZERO;
			break;
		case 6:
			if (mremap(base + a * BLOCK * PAGE, BLOCK * PAGE, n * PAGE, 0) == MAP_FAILED ||
			    mremap(base + a * BLOCK * PAGE, n * PAGE, BLOCK * PAGE, 0) == MAP_FAILED)
				die("mremap to another length");
			for (long i = n; i < BLOCK; i++)
				x[i] = ZERO;
			break;
		case 7:
			if (madvise(base + a * BLOCK * PAGE, n * PAGE, MADV_DONTNEED))
				die("dontneed");
			for (long i = 0; i < n; i++)
				x[i] = ZERO;
			break;
		case 8:
			x[n - 1] = --written;
			for (unsigned long i = 0; i < WORDS; i++)
				((uint64_t *)(base + (a * BLOCK + n - 1) * PAGE))[i] = word(written, i);
			break;
		case 9:
			if (!draw(40)) {
				pid_t child = fork();
				if (child < 0)
					die("fork");
				if (!child) {
					/* Moves as well, over its own copy. */
					if (y[0] == NONE && move_to(a, b, 0) != MAP_FAILED)
						for (long i = 0; i < BLOCK; i++) {
							y[i] = x[i];
							x[i] = NONE;
						}
					for (int k = 0; k < 2000; k++) {
						long i = draw(blocks * BLOCK);
						if (home[i] != NONE && differs(i, home[i]))
							_exit(1);
					}
					_exit(0);
				}
				/* Goes on while the child still misses them. */
				for (long k = 0; k < 3; k++)
					if (move_to(a, spare, 0) == MAP_FAILED || move_to(spare, a, 0) == MAP_FAILED)
						die("there and back");
				if (wait_for(child)) {
					dprintf(1, "wrong in a child, op %ld\n", op);
					return;
				}
			} else if (!draw(4) && differs(a * BLOCK + n - 1, x[n - 1])) {
				dprintf(1, "wrong page %ld home %ld, op %ld\n", a * BLOCK + n - 1, x[n - 1], op);
				return;
			}
		}
	}
	for (long i = 0; i < blocks * BLOCK; i++)
		if (home[i] != NONE && differs(i, home[i])) {
			dprintf(1, "wrong page %ld home %ld, at the end: %016lx\n", i, home[i], *(uint64_t *)(base + i * PAGE));
			return;
		}
	dprintf(1, "ok\n");
	free(home);
	free(swap);
}

static volatile sig_atomic_t signals;
static void on_signal(int number)
{
	signals = number;
}

static int connects_in_vain(const char *path)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	char byte;
	int sock = socket(AF_UNIX, SOCK_STREAM, 0);
	strncpy(address.sun_path, path, sizeof(address.sun_path) - 1);
	if (sock < 0 || connect(sock, (struct sockaddr *)&address, sizeof(address)))
		return 2;
	return read(sock, &byte, 1) > 0;
}

int main(int argc, char **argv)
{
	if (argc == 3 && !strcmp(argv[1], "connect"))
		return connects_in_vain(argv[2]);
	if (argc != 5)
		return 2;
	int vpid = atoi(argv[1]);
	base = (char *)strtoul(argv[2], NULL, 16);
	pages = atol(argv[3]);
	int delay = atoi(argv[4]);

	if (mmap(base, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE | MAP_NORESERVE, -1, 0) != base)
		die("mmap");
	int uffd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	if (uffd < 0)
		die("userfaultfd");
	struct uffdio_api api = {.api = UFFD_API,
				 .features = UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_UNMAP |
					     UFFD_FEATURE_EVENT_REMOVE};
	if (ioctl(uffd, UFFDIO_API, &api))
		die("UFFDIO_API");
	if (send(0, &vpid, sizeof(vpid), 0) != sizeof(vpid))
		die("send");
	send_fd(0, uffd);
	usleep(delay * 1000);
	/* In two mappings, so that runs of pages cross a mapping's end. */
	long cut = pages / 3;
	struct uffdio_register reg = {.range = {(unsigned long)base, cut * PAGE}, .mode = UFFDIO_REGISTER_MODE_MISSING};
	if (ioctl(uffd, UFFDIO_REGISTER, &reg))
		die("UFFDIO_REGISTER");
	usleep(delay * 1000);
	if (mprotect(base + cut * PAGE, PAGE, PROT_READ))
		die("mprotect");
	reg.range.start = (unsigned long)base + cut * PAGE;
	reg.range.len = (pages - cut) * PAGE;
	if (ioctl(uffd, UFFDIO_REGISTER, &reg))
		die("UFFDIO_REGISTER");
	close(uffd);
	dprintf(1, "registered\n");

	FILE *in = fdopen(dup(1), "r");
	char line[256];
	while (fgets(line, sizeof(line), in)) {
		long a, b, c;
		if (sscanf(line, "check %ld %ld %ld", &a, &b, &c) == 3) {
			answer_wrong(first_wrong(a, b, c));
		} else if (sscanf(line, "dontneed %ld %ld", &a, &b) == 2) {
			if (madvise(base + a * PAGE, b * PAGE, MADV_DONTNEED))
				die("dontneed");
			dprintf(1, "ok\n");
		} else if (sscanf(line, "unmap %ld %ld", &a, &b) == 2) {
			if (munmap(base + a * PAGE, b * PAGE))
				die("munmap");
			dprintf(1, "ok\n");
		} else if (sscanf(line, "remap %ld %ld %ld", &a, &b, &c) == 3) {
			if (mremap(base + a * PAGE, b * PAGE, b * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, base + c * PAGE) == MAP_FAILED)
				die("mremap");
			dprintf(1, "ok\n");
		} else if (sscanf(line, "forkdrop %ld %ld", &a, &b) == 2) {
			/* The child must see the pages, although the parent throws them away before the child looks. */
			int go[2];
			if (pipe(go))
				die("pipe");
			pid_t child = fork();
			if (child < 0)
				die("fork");
			if (!child) {
				char byte;
				if (read(go[0], &byte, 1) != 1)
					_exit(2);
				_exit(first_wrong(a, b, a) >= 0);
			}
			if (madvise(base + a * PAGE, b * PAGE, MADV_DONTNEED))
				die("dontneed");
			if (write(go[1], "", 1) != 1)
				die("write");
			int wrong = wait_for(child);
			close(go[0]);
			close(go[1]);
			if (wrong)
				dprintf(1, "wrong in the child\n");
			else
				answer_wrong(first_wrong(a, b, ZERO));
		} else if (sscanf(line, "forkboth %ld %ld", &a, &b) == 2) {
			/* Parent and child look at the same pages at the same time. */
			pid_t child = fork();
			if (child < 0)
				die("fork");
			if (!child)
				_exit(first_wrong(a, b, a) >= 0);
			long wrong = first_wrong(a, b, a);
			if (wait_for(child))
				dprintf(1, "wrong in the child\n");
			else
				answer_wrong(wrong);
		} else if (sscanf(line, "forkmany %ld %ld", &a, &b) == 2) {
			/* So many children look at one page each, b pages apart. */
			int wrong = 0;
			for (long i = 0; i < a; i++) {
				pid_t child = fork();
				if (child < 0)
					die("fork");
				if (!child)
					_exit(differs(i * b, i * b));
			}
			for (long i = 0; i < a; i++) {
				int status;
				if (wait(&status) < 0)
					die("wait");
				wrong |= status;
			}
			dprintf(1, wrong ? "wrong in a child\n" : "ok\n");
		} else if (sscanf(line, "signalwrite %ld", &a) == 1) {
			/* The kernel itself meets the missing page, and a signal comes while it waits. */
			struct sigaction action = {.sa_handler = on_signal};
			int through[2];
			uint64_t got[WORDS];
			if (sigaction(SIGALRM, &action, NULL) || pipe(through))
				die("sigaction or pipe");
			ualarm(100000, 0);
			ssize_t wrote = write(through[1], base + a * PAGE, PAGE);
			if (wrote != PAGE)
				dprintf(1, "wrote %zd: %s\n", wrote, strerror(errno));
			else if (read(through[0], got, PAGE) != PAGE || got[1] != word(a, 1))
				dprintf(1, "wrong page\n");
			else
				dprintf(1, signals ? "ok\n" : "no signal\n");
		} else if (sscanf(line, "latency %ld %ld", &a, &b) == 2) {
			rng = b;
			latency(a);
		} else if (sscanf(line, "stress %ld %ld", &a, &b) == 2) {
			rng = b;
			stress(a);
		} else if (sscanf(line, "shuffle %ld %ld", &a, &b) == 2) {
			rng = b;
			shuffle(a);
		} else if (sscanf(line, "forkwithout %ld %ld", &a, &b) == 2) {
			/* The child has no copy of them. */
			if (madvise(base + a * PAGE, b * PAGE, MADV_DONTFORK))
				die("dontfork");
			pid_t child = fork();
			if (child < 0)
				die("fork");
			if (!child)
				_exit(first_wrong(0, a, 0) >= 0);
			dprintf(1, wait_for(child) ? "wrong in the child\n" : "ok\n");
		} else if (!strncmp(line, "churn", 5)) {
			/* Events without end, until killed; says so first. */
			dprintf(1, "ok\n");
			for (;;)
				madvise(base, PAGE, MADV_DONTNEED);
		} else {
			dprintf(1, "error unknown command\n");
		}
	}
	return 0;
}
