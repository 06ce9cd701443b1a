/* Memory of every kind, changed all the time. 5 of the 40. */

#include "zoo.h"

static void must(bool ok, const char *what)
{
	if (!ok)
		fail("%s: %s", what, strerror(errno));
}

/* Fills and checks a page whose content follows from two numbers. */
static void write_page(void *at, uint64_t which, uint64_t version)
{
	uint64_t *words = at;
	for (uint64_t i = 0; i < PAGE_BYTES / 8; i++)
		words[i] = mix(which, version, i);
}

static bool page_is(const void *at, uint64_t which, uint64_t version)
{
	const uint64_t *words = at;
	for (uint64_t i = 0; i < PAGE_BYTES / 8; i++)
		if (words[i] != mix(which, version, i))
			return false;
	return true;
}

static bool page_is_zero(const void *at)
{
	const uint64_t *words = at;
	for (uint64_t i = 0; i < PAGE_BYTES / 8; i++)
		if (words[i] != 0)
			return false;
	return true;
}

/* Two processes that change the same memory in turn, kept apart by a lock in that memory. */
#define SHARED_PAGES 64

static struct {
	pthread_mutex_t lock;
	uint64_t versions[SHARED_PAGES], writes;
	unsigned char pages[SHARED_PAGES][PAGE_BYTES] __attribute__((aligned(PAGE_BYTES)));
} *shared;

static void change_shared(void)
{
	pthread_mutex_lock(&shared->lock);
	uint64_t page = mix(shared->writes++, 0, 0) % SHARED_PAGES;
	write_page(shared->pages[page], page, ++shared->versions[page]);
	pthread_mutex_unlock(&shared->lock);
}

static void check_shared(char *complaint)
{
	uint64_t sum = 0;
	pthread_mutex_lock(&shared->lock);
	for (uint64_t page = 0; page < SHARED_PAGES; page++) {
		sum += shared->versions[page];
		if (shared->versions[page] > 0 && !page_is(shared->pages[page], page, shared->versions[page]))
			complain("shared page %lu is wrong", page);
	}
	if (sum != shared->writes)
		complain("%lu writes make %lu versions", shared->writes, sum);
	pthread_mutex_unlock(&shared->lock);
}

static void sharer(void) { live("sharer", change_shared, check_shared); }

static void start_sharers(void)
{
	shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	must(shared != MAP_FAILED, "shared memory");
	pthread_mutexattr_t between_processes;
	pthread_mutexattr_init(&between_processes);
	pthread_mutexattr_setpshared(&between_processes, PTHREAD_PROCESS_SHARED);
	pthread_mutex_init(&shared->lock, &between_processes);
	start(sharer);
	start(sharer);
}

/* Mappings of files: private with some pages changed, shared, and of a file that has no name any more. */
#define FILE_PAGES 32

static unsigned char (*private_map)[PAGE_BYTES], (*shared_map)[PAGE_BYTES];
static uint64_t private_versions[FILE_PAGES], shared_versions[FILE_PAGES], file_steps;
static int shared_file, nameless;

static int fill_file(const char *path)
{
	int file = open(path, O_RDWR | O_CREAT | O_EXCL, 0600);
	must(file >= 0, path);
	unsigned char page[PAGE_BYTES];
	for (uint64_t i = 0; i < FILE_PAGES; i++) {
		write_page(page, i, 0);
		must(write(file, page, sizeof page) == sizeof page, path);
	}
	return file;
}

static void change_maps(void)
{
	/* The first half of the private mapping is never written: it stays the file's. */
	uint64_t page = file_steps++ % (FILE_PAGES / 2);
	write_page(private_map[FILE_PAGES / 2 + page], FILE_PAGES / 2 + page, ++private_versions[FILE_PAGES / 2 + page]);
	write_page(shared_map[page], page, ++shared_versions[page]);
}

static void check_maps(char *complaint)
{
	unsigned char page[PAGE_BYTES];
	for (uint64_t i = 0; i < FILE_PAGES; i++) {
		if (!page_is(private_map[i], i, private_versions[i]))
			complain("page %lu of the private mapping is wrong", i);
		if (!page_is(shared_map[i], i, shared_versions[i]))
			complain("page %lu of the shared mapping is wrong", i);
		if (pread(shared_file, page, sizeof page, (off_t)(i * PAGE_BYTES)) != sizeof page ||
		    !page_is(page, i, shared_versions[i]))
			complain("page %lu of the shared file is wrong", i);
		if (pread(nameless, page, sizeof page, (off_t)(i * PAGE_BYTES)) != sizeof page || !page_is(page, i, 0))
			complain("page %lu of the deleted file is wrong", i);
	}
	if (lseek(nameless, 0, SEEK_CUR) != 12345)
		complain("the deleted file stands at %ld", (long)lseek(nameless, 0, SEEK_CUR));
}

static void file_mapper(void)
{
	int file = fill_file("/tmp/zoo-private");
	shared_file = fill_file("/tmp/zoo-shared");
	nameless = fill_file("/tmp/zoo-nameless");
	must(unlink("/tmp/zoo-nameless") == 0 && lseek(nameless, 12345, SEEK_SET) == 12345, "deleted file");
	private_map = mmap(NULL, FILE_PAGES * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
	shared_map = mmap(NULL, FILE_PAGES * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, shared_file, 0);
	must(private_map != MAP_FAILED && shared_map != MAP_FAILED, "file mapping");
	close(file);
	live("file mapper", change_maps, check_maps);
}

/* Regions that come, grow, move, are dropped and go, and the heap's end that moves. */
#define REGIONS 8
#define REGION_PAGES 32

static struct region {
	unsigned char (*at)[PAGE_BYTES];
	uint64_t pages, versions[REGION_PAGES];
} regions[REGIONS];
static uint64_t moves, heap_pages, heap_start;

static void fill_region(struct region *region, uint64_t from)
{
	for (uint64_t i = from; i < region->pages; i++)
		write_page(region->at[i], (uint64_t)(region - regions) * REGION_PAGES + i, region->versions[i] = ++moves);
}

static void move_regions(void)
{
	struct region *region = &regions[mix(moves, 1, 0) % REGIONS];
	uint64_t choice = mix(++moves, 2, 0) % 5;
	if (region->at == NULL) {
		region->pages = REGION_PAGES / 2;
		region->at = mmap(NULL, region->pages * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		must(region->at != MAP_FAILED, "mmap");
		fill_region(region, 0);
	} else if (choice == 0) {
		munmap(region->at, region->pages * PAGE_BYTES);
		region->at = NULL;
	} else if (choice == 1) {
		/* Zero from now on, which no write tells of. */
		uint64_t from = region->pages / 2;
		madvise(region->at[from], (region->pages - from) * PAGE_BYTES, MADV_DONTNEED);
		memset(&region->versions[from], 0, (region->pages - from) * sizeof *region->versions);
	} else if (choice == 2) {
		/* To a place of our choice, so that it surely moves. */
		void *place = mmap(NULL, REGION_PAGES * PAGE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		uint64_t pages = region->pages == REGION_PAGES ? REGION_PAGES / 2 : REGION_PAGES;
		void *moved = mremap(region->at, region->pages * PAGE_BYTES, pages * PAGE_BYTES,
				     MREMAP_MAYMOVE | MREMAP_FIXED, place);
		must(moved == place, "mremap");
		if (pages < REGION_PAGES)
			munmap((char *)place + pages * PAGE_BYTES, (REGION_PAGES - pages) * PAGE_BYTES);
		uint64_t had = region->pages;
		region->at = moved;
		region->pages = pages;
		fill_region(region, had);
	} else if (choice == 3) {
		/* The heap's end goes up eight pages and, when it is high, all the way down. */
		if (heap_pages > 64) {
			must(brk((void *)heap_start) == 0, "brk down");
			heap_pages = 0;
		} else {
			must(brk((void *)(heap_start + (heap_pages + 8) * PAGE_BYTES)) == 0, "brk up");
			for (uint64_t i = heap_pages; i < heap_pages + 8; i++)
				write_page((void *)(heap_start + i * PAGE_BYTES), 1000 + i, 1);
			heap_pages += 8;
		}
	} else {
		fill_region(region, region->pages / 2);
	}
}

static void check_regions(char *complaint)
{
	for (uint64_t r = 0; r < REGIONS; r++)
		for (uint64_t i = 0; regions[r].at != NULL && i < regions[r].pages; i++)
			if (regions[r].versions[i] == 0 ? !page_is_zero(regions[r].at[i])
							: !page_is(regions[r].at[i], r * REGION_PAGES + i, regions[r].versions[i]))
				complain("page %lu of region %lu at %p is wrong", i, r, (void *)regions[r].at[i]);
	for (uint64_t i = 0; i < heap_pages; i++)
		if (!page_is((void *)(heap_start + i * PAGE_BYTES), 1000 + i, 1))
			complain("page %lu of the heap is wrong", i);
}

static void mover(void)
{
	/* Nothing here uses malloc: the heap's end is ours. */
	heap_start = ((uint64_t)sbrk(0) + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;
	live("mover", move_regions, check_regions);
}

/* Pages that are forbidden most of the time, with guards that always are and others that may only be read or executed. */
#define GUARDED_PAGES 16

static unsigned char (*guarded)[PAGE_BYTES];
static uint64_t guarded_versions[GUARDED_PAGES], guarded_steps;

static void change_guarded(void)
{
	uint64_t page = 1 + guarded_steps++ % (GUARDED_PAGES - 2);
	must(mprotect(guarded[page], PAGE_BYTES, PROT_READ | PROT_WRITE) == 0, "mprotect");
	write_page(guarded[page], page, ++guarded_versions[page]);
	static const int protections[] = {PROT_NONE, PROT_READ, PROT_READ | PROT_EXEC};
	must(mprotect(guarded[page], PAGE_BYTES, protections[guarded_steps % 3]) == 0, "mprotect");
}

static void check_guarded(char *complaint)
{
	/* Through the kernel, which refuses where a load would be fatal. */
	int pipe_ends[2];
	must(pipe(pipe_ends) == 0, "pipe");
	if (write(pipe_ends[1], guarded[0], 1) != -1 || write(pipe_ends[1], guarded[GUARDED_PAGES - 1], 1) != -1)
		complain("a guard page can be read");
	close(pipe_ends[0]);
	close(pipe_ends[1]);
	for (uint64_t page = 1; page < GUARDED_PAGES - 1; page++) {
		if (guarded_versions[page] == 0)
			continue;
		must(mprotect(guarded[page], PAGE_BYTES, PROT_READ) == 0, "mprotect");
		if (!page_is(guarded[page], page, guarded_versions[page]))
			complain("guarded page %lu is wrong", page);
		must(mprotect(guarded[page], PAGE_BYTES, PROT_NONE) == 0, "mprotect");
	}
}

static void guard(void)
{
	guarded = mmap(NULL, GUARDED_PAGES * PAGE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	must(guarded != MAP_FAILED, "mmap");
	live("guard", change_guarded, check_guarded);
}

void start_mappings(void)
{
	start_sharers();
	start(file_mapper);
	start(mover);
	start(guard);
}
