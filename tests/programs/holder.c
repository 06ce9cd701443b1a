/*
 * Holds patterned memory for somebody to read, as a frozen process does: maps PAGES pages at BASE, fills them, says
 * "ready" and waits until its input ends. Every seventh page is zero.
 *
 * usage: holder BASE PAGES SEED     BASE: address in hex
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096ul

int main(int argc, char **argv)
{
	if (argc != 4)
		return 2;
	char *base = (char *)strtoul(argv[1], NULL, 16);
	unsigned long pages = strtoul(argv[2], NULL, 10), seed = strtoul(argv[3], NULL, 10);
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE;
	if (mmap(base, pages * PAGE, PROT_READ | PROT_WRITE, flags, -1, 0) != base) {
		perror("mmap");
		return 1;
	}
	for (unsigned long page = 0; page < pages; page++) {
		uint64_t *word = (uint64_t *)(base + page * PAGE);
		int zero = page % 7 == 3;
		for (unsigned long i = 0; i < PAGE / 8; i++)
			word[i] = zero ? 0
				       : (((page + seed) * 0x9e3779b97f4a7c15ull +
					   i * 0xbf58476d1ce4e5b9ull) | 1);
	}
	puts("ready");
	fflush(stdout);
	char end;
	while (read(0, &end, 1) > 0)
		;
	return 0;
}
