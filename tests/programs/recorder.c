// A program that changes its memory at random and keeps an exact record of it: what tests/support/agreement.rs holds trackers to.
//
// The record is a log of page ranges in order: written, gone (dropped or unmapped), may (not) be huge. What a page holds has
// a stamp, new with every write and carried along when the page is moved, so that a page that is moved away and back, or
// written and made zeros again, is known to be unchanged. It lies, like all the
// program's bookkeeping, in shared mappings, which no tracker follows; so whatever else the program dirties is a page of its
// stack, of its data or of the C library. Each process has a log of its own, in the file DIR/record-PID.
//
// Commands come as lines on standard input and are answered with one line when every process has done its part and rests.
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096UL
#define HUGE (2UL << 20)
#define ARENAS 16
#define ARENA_PAGES 1024
#define LOG 65534
#define CHILDREN 16
#define ABSENT 0
#define ZEROS 1
#define STACK_PAGES 48

enum kind { PLAIN, SMALL, TRANSPARENT, FILE_COPY, KINDS };

struct entry {
	uint32_t what; // 'w' written, 'g' gone, 'h' may be huge, 's' is of small pages again
	uint32_t pages;
	uint64_t first; // page number
	uint64_t stamp; // of what is written
};

// What a process knows of itself; the log comes first, for the reader.
struct self {
	uint64_t entries;
	uint64_t lost; // entries there was no room for
	struct entry log[LOG];
	uint64_t seed;
	uint64_t last_stamp;
	char *brk_start;
	struct arena {
		char *at;
		size_t pages;
		enum kind kind;
		uint64_t stamps[ARENA_PAGES]; // of pages that are the process's own, else ABSENT
	} arenas[ARENAS];
};

// What all processes share.
struct order {
	volatile int round, steps;
	volatile int done[CHILDREN + 1];
};

static struct self *self;
static struct order *order;
static int backing;
static const char *directory;

static void die(const char *what) {
	perror(what);
	_exit(99);
}

static void say(const char *line) {
	if (write(1, line, strlen(line)) < 0)
		_exit(98);
}

static uint64_t rnd(uint64_t below) {
	self->seed ^= self->seed << 13;
	self->seed ^= self->seed >> 7;
	self->seed ^= self->seed << 17;
	return self->seed % below;
}

// ---- the record --------------------------------------------------------------------------------------------------

static void record(char what, const void *at, size_t pages, uint64_t stamp) {
	uint64_t first = (uint64_t)(uintptr_t)at / PAGE;
	if (self->entries == LOG)
		self->lost++;
	else
		self->log[self->entries++] = (struct entry){ (uint32_t)what, (uint32_t)pages, first, stamp };
}

static void record_content(const void *page, uint64_t stamp) {
	record(stamp == ABSENT ? 'g' : 'w', page, 1, stamp);
}

static uint64_t write_page(char *page) {
	*(volatile uint64_t *)(page + rnd(PAGE / 8) * 8) = self->seed | 1;
	record_content(page, ++self->last_stamp);
	return self->last_stamp;
}

// ---- mappings ----------------------------------------------------------------------------------------------------

static void scribble(struct arena *a, size_t count) {
	while (count-- > 0) {
		size_t page = rnd(a->pages);
		a->stamps[page] = write_page(a->at + page * PAGE);
	}
}

// An aligned place of `pages` pages, nothing of it touched.
static char *place(size_t pages) {
	char *at = mmap(NULL, pages * PAGE + HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (at == MAP_FAILED)
		die("mmap");
	char *aligned = (char *)(((uintptr_t)at + HUGE - 1) & ~(HUGE - 1));
	if (aligned > at && munmap(at, (size_t)(aligned - at)))
		die("munmap");
	if (munmap(aligned + pages * PAGE, (size_t)(at + HUGE - aligned)))
		die("munmap");
	return aligned;
}

static void unmap(struct arena *a) {
	if (!a->at)
		return;
	if (munmap(a->at, a->pages * PAGE))
		die("munmap");
	record('g', a->at, a->pages, 0);
	record('s', a->at, a->pages, 0);
	a->at = NULL;
}

static void map_anew(struct arena *a) {
	unmap(a);
	a->kind = (enum kind)rnd(KINDS);
	memset(a->stamps, 0, sizeof a->stamps);
	switch (a->kind) {
	case FILE_COPY:
		a->pages = 64;
		a->at = mmap(NULL, a->pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, backing, 0);
		if (a->at == MAP_FAILED)
			die("mmap of a file");
		break;
	case PLAIN: // anywhere, any size, whatever the host thinks of huge pages
		a->pages = 1 + rnd(200);
		a->at = mmap(NULL, a->pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (a->at == MAP_FAILED)
			die("mmap");
		break;
	default: // whole page tables of small pages, or huge pages
		a->pages = ARENA_PAGES;
		a->at = place(a->pages);
		madvise(a->at, a->pages * PAGE, a->kind == TRANSPARENT ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
	}
	if (a->kind == TRANSPARENT || a->kind == PLAIN)
		record('h', a->at, a->pages, 0);
	scribble(a, 1 + rnd(a->pages));
}

// Moves the whole arena. What it has of its own is, at the new address, as good as written.
static void move(struct arena *a) {
	char *to;
	if (a->kind == SMALL || a->kind == TRANSPARENT) {
		to = place(a->pages);
	} else {
		to = mmap(NULL, a->pages * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (to == MAP_FAILED)
			die("mmap");
	}
	char *from = a->at;
	char *at = mremap(from, a->pages * PAGE, a->pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to);
	if (at == MAP_FAILED) { // it has become several mappings
		munmap(to, a->pages * PAGE);
		map_anew(a);
		return;
	}
	record('g', from, a->pages, 0);
	record('s', from, a->pages, 0);
	a->at = at;
	if (a->kind == TRANSPARENT || a->kind == PLAIN)
		record('h', at, a->pages, 0);
	for (size_t i = 0; i < a->pages; i++)
		if (a->stamps[i] != ABSENT)
			record_content(at + i * PAGE, a->stamps[i]);
}

// Two arenas of small pages change places: the addresses stay mapped, as whole page tables go to and fro.
static void swap(struct arena *a, struct arena *b) {
	if (a == b || a->kind != SMALL || b->kind != SMALL || !a->at || !b->at)
		return;
	char *here = a->at, *there = b->at;
	size_t bytes = a->pages * PAGE;
	char *aside = place(a->pages);
	if (mremap(here, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, aside) == MAP_FAILED ||
	    mremap(there, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, here) == MAP_FAILED ||
	    mremap(aside, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, there) == MAP_FAILED)
		die("mremap");
	for (size_t i = 0; i < a->pages; i++) {
		uint64_t stamp = a->stamps[i];
		a->stamps[i] = b->stamps[i];
		b->stamps[i] = stamp;
		record_content(here + i * PAGE, a->stamps[i]);
		record_content(there + i * PAGE, b->stamps[i]);
	}
}

static void drop(struct arena *a) {
	size_t first = rnd(a->pages), pages = 1 + rnd(a->pages - first);
	int read_after = (int)rnd(2);
	if (madvise(a->at + first * PAGE, pages * PAGE, MADV_DONTNEED))
		die("madvise");
	record('g', a->at + first * PAGE, pages, 0);
	for (size_t i = first; i < first + pages; i++) {
		a->stamps[i] = ABSENT;
		if (read_after) {
			(void)*(volatile char *)(a->at + i * PAGE);
			// Zeros; in a mapping of a file its own content, which is not the process's.
			if (a->kind != FILE_COPY) {
				a->stamps[i] = ZEROS;
				record_content(a->at + i * PAGE, ZEROS);
			}
		}
	}
}

static void map_over(struct arena *a) {
	if (a->kind == FILE_COPY)
		return;
	size_t first = rnd(a->pages), pages = 1 + rnd(a->pages - first);
	char *at = a->at + first * PAGE;
	if (mmap(at, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED)
		die("mmap over");
	madvise(at, pages * PAGE, a->kind == SMALL ? MADV_NOHUGEPAGE : MADV_HUGEPAGE);
	record('g', at, pages, 0);
	if (a->kind != SMALL)
		record('h', at, pages, 0);
	memset(a->stamps + first, 0, pages * sizeof *a->stamps);
	scribble(a, 3);
	a->kind = a->kind == SMALL ? PLAIN : a->kind; // no longer one mapping
}

static void move_brk(void) {
	char *now = sbrk(0);
	size_t pages = 1 + rnd(60);
	if ((size_t)(now - self->brk_start) > 100 * PAGE && rnd(2)) {
		if (sbrk(-(intptr_t)(pages * PAGE)) == (void *)-1)
			die("sbrk");
		record('g', now - pages * PAGE, pages, 0);
	} else {
		if (sbrk((intptr_t)(pages * PAGE)) == (void *)-1)
			die("sbrk");
		for (size_t i = 0; i < pages; i++)
			write_page(now + i * PAGE);
	}
}

// Pages of the stack far below where it is used otherwise.
static __attribute__((noinline)) void write_stack(void) {
	char deep[(STACK_PAGES + 1) * PAGE];
	char *first = (char *)(((uintptr_t)deep + PAGE - 1) & ~(PAGE - 1));
	for (int i = 0; i < 4; i++)
		write_page(first + rnd(STACK_PAGES) * PAGE);
}

static void step(void) {
	struct arena *a = &self->arenas[rnd(ARENAS)];
	uint64_t what = rnd(100);
	if (!a->at || what < 4)
		map_anew(a);
	else if (what < 70)
		scribble(a, 1 + rnd(4));
	else if (what < 74)
		unmap(a);
	else if (what < 79)
		move(a);
	else if (what < 82)
		swap(a, &self->arenas[rnd(ARENAS)]);
	else if (what < 89)
		drop(a);
	else if (what < 92)
		map_over(a);
	else if (what < 96)
		move_brk();
	else
		write_stack();
}

// ---- processes ---------------------------------------------------------------------------------------------------

// Bookkeeping of this process's own, at the address the parent had it at, begun with what the parent knew.
static void keep_record(const struct self *known) {
	char name[256];
	snprintf(name, sizeof name, "%s/record-%d", directory, (int)getpid());
	int file = open(name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	if (file < 0 || ftruncate(file, sizeof *self))
		die(name);
	if (known && write(file, known, sizeof *known) != (ssize_t)sizeof *known)
		die(name);
	void *at = mmap(self, sizeof *self, PROT_READ | PROT_WRITE, MAP_SHARED | (self ? MAP_FIXED : 0), file, 0);
	if (at == MAP_FAILED)
		die("mmap of the record");
	close(file);
	self = at;
	self->seed = ((uint64_t)getpid() * 2654435761u) | 1;
}

static void take_part(int number) {
	if (prctl(PR_SET_PDEATHSIG, SIGKILL))
		die("pdeathsig");
	keep_record(self);
	self->entries = 0;
	order->done[number] = order->round; // the parent may change its bookkeeping again
	for (int round = order->round;; round = order->round) {
		if (order->done[number] != round) {
			for (int i = order->steps; i > 0; i--)
				step();
			order->done[number] = round;
		}
		usleep(1000);
	}
}

static void wait_for(int child) {
	while (order->done[child] != order->round) {
		if (waitpid(-1, NULL, WNOHANG) > 0)
			die("a child has died");
		usleep(1000);
	}
}

int main(int argc, char **argv) {
	if (argc != 2)
		die("usage: recorder DIRECTORY");
	directory = argv[1];
	if (prctl(PR_SET_PDEATHSIG, SIGKILL))
		die("pdeathsig");
	char name[256], page[PAGE];
	snprintf(name, sizeof name, "%s/backing", directory);
	backing = open(name, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	for (int i = 0; i < 64; i++) {
		memset(page, i + 1, PAGE);
		if (write(backing, page, PAGE) != (ssize_t)PAGE)
			die(name);
	}
	order = mmap(NULL, sizeof *order, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (order == MAP_FAILED)
		die("mmap");
	keep_record(NULL);
	self->last_stamp = ZEROS;
	self->brk_start = (char *)(((uintptr_t)sbrk(0) + PAGE - 1) & ~(PAGE - 1));
	if (brk(self->brk_start))
		die("brk");
	say("ready\n");
	int children = 0;
	char line[64];
	for (;;) {
		size_t length = 0;
		while (length == 0 || line[length - 1] != '\n') { // a line may come in pieces
			if (length == sizeof line - 1 || read(0, line + length, 1) != 1)
				_exit(0);
			length++;
		}
		line[length] = 0;
		int n = atoi(line + 5);
		if (!strncmp(line, "fork ", 5)) { // n children, which take part from the next steps on
			for (; n > 0 && children < CHILDREN; n--) {
				order->done[++children] = order->round - 1;
				pid_t child = fork();
				if (child < 0)
					die("fork");
				if (child == 0)
					take_part(children);
				wait_for(children);
			}
		} else if (!strncmp(line, "step ", 5)) { // n of them, in every process
			order->steps = n;
			order->round++;
			for (int i = n; i > 0; i--)
				step();
			for (int i = 1; i <= children; i++)
				wait_for(i);
		} else {
			die("command");
		}
		say("ok\n");
	}
}
