/* Holds the file argv[2] as argv[1] says, and does what the lines on stdin ask for:
 *   map         mapped shared and writable, through a descriptor that is closed
 *   open        open for reading and writing
 *   lease       open for reading, under a write lease, at position 3
 *   blind       open for writing, under a write lease
 *   swap        nothing is held: trades argv[2] and argv[3] without end
 * "OFFSET VALUE" stores a byte through the mapping; "pos" says the position of the descriptor. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	struct stat st;
	char line[64];
	unsigned long offset;
	unsigned int value;
	volatile unsigned char *map = NULL;
	int fd, lease = 0;

	if (argc < 3)
		return 1;
	if (!strcmp(argv[1], "swap")) {
		puts("ready");
		fflush(stdout);
		for (;;)
			renameat2(AT_FDCWD, argv[2], AT_FDCWD, argv[3], RENAME_EXCHANGE);
	}
	lease = !strcmp(argv[1], "lease") || !strcmp(argv[1], "blind");
	fd = open(argv[2], !lease ? O_RDWR : argv[1][0] == 'l' ? O_RDONLY : O_WRONLY);
	if (fd < 0 || fstat(fd, &st))
		return 1;
	if (!strcmp(argv[1], "map")) {
		map = mmap(NULL, st.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		if (map == MAP_FAILED)
			return 1;
		close(fd);
	}
	/* No handler: the signal that tells of another opener ends the process. */
	if (lease && (fcntl(fd, F_SETLEASE, F_WRLCK) || lseek(fd, 3, SEEK_SET) != 3))
		return 1;
	puts("ready");
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		if (!strcmp(line, "pos\n"))
			printf("%ld\n", (long)lseek(fd, 0, SEEK_CUR));
		else if (sscanf(line, "%lu %u", &offset, &value) == 2) {
			map[offset] = value;
			puts("stored");
		}
		fflush(stdout);
	}
	return 0;
}
