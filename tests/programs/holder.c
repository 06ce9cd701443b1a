/*
 * Holds patterned memory for somebody to read, as a frozen process does: maps PAGES pages at BASE, fills them, says
 * "ready" and waits until its input ends. Every seventh page is zero.
 *
 * With CHILDREN it forks as many before, each of which writes the pages anew whose number is its seed's modulo 64, and shares
 * the others. The seed of the nth is n above SEED. Their pids follow "ready".
 *
 * usage: holder BASE PAGES SEED [CHILDREN]     BASE: address in hex
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096ul

static void fill(char *base, unsigned long page, unsigned long seed)
{
	uint64_t *word = (uint64_t *)(base + page * PAGE);
	int zero = page % 7 == 3;
	for (unsigned long i = 0; i < PAGE / 8; i++)
		word[i] = zero ? 0
			       : (((page + seed) * 0x9e3779b97f4a7c15ull +
				   i * 0xbf58476d1ce4e5b9ull) | 1);
}

static void wait_for_end(void)
{
	char end;
	while (read(0, &end, 1) > 0)
		;
}

/* Gives its pid, when it has written what is its own. */
static pid_t fork_child(char *base, unsigned long pages, unsigned long seed)
{
	int done[2];
	char word;
	if (pipe(done) != 0)
		exit(1);
	pid_t pid = fork();
	if (pid < 0)
		exit(1);
	if (pid == 0) {
		for (unsigned long page = seed % 64; page < pages; page += 64)
			fill(base, page, seed);
		close(done[0]);
		close(done[1]);
		wait_for_end();
		_exit(0);
	}
	close(done[1]);
	/* Nothing is written: its end is what tells. */
	if (read(done[0], &word, 1) != 0)
		exit(1);
	close(done[0]);
	return pid;
}

int main(int argc, char **argv)
{
	if (argc != 4 && argc != 5)
		return 2;
	char *base = (char *)strtoul(argv[1], NULL, 16);
	unsigned long pages = strtoul(argv[2], NULL, 10), seed = strtoul(argv[3], NULL, 10);
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE;
	if (mmap(base, pages * PAGE, PROT_READ | PROT_WRITE, flags, -1, 0) != base) {
		perror("mmap");
		return 1;
	}
	for (unsigned long page = 0; page < pages; page++)
		fill(base, page, seed);
	unsigned long children = argc == 5 ? strtoul(argv[4], NULL, 10) : 0;
	pid_t pids[64];
	if (children > 64)
		return 2;
	for (unsigned long child = 0; child < children; child++)
		pids[child] = fork_child(base, pages, seed + child + 1);
	printf("ready");
	for (unsigned long child = 0; child < children; child++)
		printf(" %d", pids[child]);
	puts("");
	fflush(stdout);
	wait_for_end();
	return 0;
}
