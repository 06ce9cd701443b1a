/* Memory that knows what it should hold.
 *
 * Every page holds its own number, a version, and content that follows from both and the seed. Which version it should hold
 * is kept apart, so a page of an older round is found out as surely as a torn or foreign one; the sum of all versions is the
 * number of writes ever done, so that record cannot have gone back in time with its pages.
 *
 *   --memory-mib=N      memory to fill (64)
 *   --dirty-mb-s=N      megabytes rewritten a second (0)
 *   --check-mb-s=N      megabytes checked a second at random, or "max": every moment that is left (20)
 *   --order=O           which pages are rewritten: random | sequential (random)
 *   --working-set-mib=N rewrite only the first N MiB (all)
 *   --content=C         incompressible | compressible (incompressible)
 *   --zero-mib=N        further memory that was written and is zero again (0)
 *   --huge              ask for transparent huge pages
 *   --small             ask for none
 *   --report-ms=N       time between two lines in the log (1000)
 *   --slow-us=N         count the pages whose first byte took longer than this to read: where post-copy waits (0: do not look)
 *   --gap-ms=N          log every time above this that it did not run (20)
 *   --seed=N            (1)
 *   --watched           hold a userfaultfd of its own: neither CRIU nor an engine that uses one can take it along
 *   --leaderless        start a process whose first thread ends while another goes on, which CRIU cannot dump
 *
 * Ends with an error, and says why in the log, as soon as anything is wrong. */

#include "workload.h"
#include <getopt.h>
#include <linux/userfaultfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#define PAGE_BYTES 4096
#define CONTENT_WORDS ((PAGE_BYTES - 3 * 8) / 8)

struct page {
	uint64_t number;
	uint64_t version;
	uint64_t check;
	uint64_t content[CONTENT_WORDS];
};
_Static_assert(sizeof(struct page) == PAGE_BYTES, "a page is a page");

static struct {
	uint64_t memory_mib, dirty_mb_s, check_mb_s, working_set_mib, zero_mib, report_ms, slow_us, seed;
	bool check_max, sequential, compressible, huge, small, watched, leaderless;
} wanted = {.memory_mib = 64, .check_mb_s = 20, .report_ms = 1000, .seed = 1};

static struct page *pages;
static uint32_t *versions;
static uint64_t page_count, working_pages, zero_pages;
static unsigned char *zeros;

/* Writes and checks done since the start, in pages. Also read by the thread that tells progress. */
static _Atomic uint64_t writes, checks;

/* The same when progress was told last. */
static uint64_t writes_then, checks_then;

/* How long each slow page took, in microseconds; those that find no place any more are only counted. */
#define SLOW_KEPT (1 << 18)
static uint32_t slow_us[SLOW_KEPT];
static uint64_t slow_pages;

static void parse(int argc, char **argv);
static void fill(void);
static void write_page(uint64_t number);
static void touch(uint64_t number);
static void tell_progress(double elapsed);
static void tell_slow_pages(void);
static bool page_is_right(uint64_t number);
static uint64_t verify_all(void);

/* How many pages may be handled now at a rate, without catching up on time in which the container did not run. */
struct allowance {
	double pages_per_second, pages, since;
};

static uint64_t take(struct allowance *allowance, double now)
{
	allowance->pages += (now - allowance->since) * allowance->pages_per_second;
	allowance->since = now;
	double most = allowance->pages_per_second * 0.01 + 1;
	if (allowance->pages > most)
		allowance->pages = most;
	uint64_t whole = (uint64_t)allowance->pages;
	allowance->pages -= (double)whole;
	return whole;
}

static void *wait_for_ever(void *unused)
{
	(void)unused;
	for (;;)
		pause();
	return NULL;
}

static void start_leaderless(void)
{
	pid_t child = fork();
	if (child < 0)
		fail("fork");
	if (child > 0)
		return;
	pthread_t thread;
	if (pthread_create(&thread, NULL, wait_for_ever, NULL) != 0)
		fail("pthread_create");
	syscall(SYS_exit, 0);
}

int main(int argc, char **argv)
{
	log_open("memory-writer");
	parse(argc, argv);
	if (wanted.watched && syscall(SYS_userfaultfd, UFFD_USER_MODE_ONLY) < 0)
		fail("userfaultfd");
	if (wanted.leaderless)
		start_leaderless();
	fill();
	take_requests();
	start_clock();

	double start = seconds(CLOCK_MONOTONIC);
	uint64_t random = mix(wanted.seed, 0, 1), next = 0;
	struct allowance to_write = {.pages_per_second = (double)wanted.dirty_mb_s * 1e6 / PAGE_BYTES, .since = start};
	struct allowance to_check = {.pages_per_second = (double)wanted.check_mb_s * 1e6 / PAGE_BYTES, .since = start};
	sig_atomic_t verdicts_given = 0;
	log_line("{\"ready\":true,\"memory_mib\":%lu,\"dirty_mb_s\":%lu}", wanted.memory_mib, wanted.dirty_mb_s);
	writes_then = writes;
	start_reports(wanted.report_ms, tell_progress);

	for (;;) {
		double now = seconds(CLOCK_MONOTONIC);
		for (uint64_t n = take(&to_write, now); n > 0; n--) {
			uint64_t number = wanted.sequential ? next++ % working_pages : next_random(&random) % working_pages;
			touch(number);
			write_page(number);
		}
		for (uint64_t n = wanted.check_max ? 16 : take(&to_check, now); n > 0; n--) {
			uint64_t number = next_random(&random) % page_count;
			touch(number);
			checks++;
			if (!page_is_right(number))
				fail("page %lu should have version %u, it has number %lu, version %lu", number, versions[number],
				     pages[number].number, pages[number].version);
		}

		if (verdicts_given < verdicts_asked) {
			verdicts_given++;
			if (wanted.slow_us > 0)
				tell_slow_pages();
			uint64_t errors = verify_all();
			log_line("{\"verified\":%s,\"pages\":%lu,\"errors\":%lu,\"longest_gap_ms\":%.1f,"
				 "\"longest_gap_realtime_ms\":%.1f,\"seq\":%lu,\"throughput_mb_s\":%.1f}",
				 errors == 0 ? "true" : "false", page_count + zero_pages, errors, longest_gap_ms(),
				 longest_realtime_gap_ms(), writes,
				 (double)writes * PAGE_BYTES / 1e6 / (seconds(CLOCK_MONOTONIC) - start));
			if (errors > 0)
				fail("%lu pages are wrong", errors);
		}
		if (!wanted.check_max)
			pause_ms(1);
	}
}

static void tell_progress(double elapsed)
{
	uint64_t writes_now = writes, checks_now = checks;
	log_line("{\"t\":%.3f,\"seq\":%lu,\"written_mb_s\":%.1f,\"checked_mb_s\":%.1f,\"longest_gap_ms\":%.1f}",
		 seconds(CLOCK_REALTIME), writes_now, (double)(writes_now - writes_then) * PAGE_BYTES / 1e6 / elapsed,
		 (double)(checks_now - checks_then) * PAGE_BYTES / 1e6 / elapsed, longest_gap_ms());
	writes_then = writes_now;
	checks_then = checks_now;
}

/* Looks at a page before it is used, and at the time that takes. */
static void touch(uint64_t number)
{
	if (wanted.slow_us == 0)
		return;
	double before = seconds(CLOCK_MONOTONIC);
	(void)*(volatile uint64_t *)&pages[number].number;
	double took_us = (seconds(CLOCK_MONOTONIC) - before) * 1e6;
	if (took_us <= (double)wanted.slow_us)
		return;
	if (slow_pages < SLOW_KEPT)
		slow_us[slow_pages] = (uint32_t)took_us;
	slow_pages++;
}

static int by_size(const void *a, const void *b)
{
	uint32_t left = *(const uint32_t *)a, right = *(const uint32_t *)b;
	return (left > right) - (left < right);
}

/* Of all slow pages up to the verdict, whose own reading does not count. */
static void tell_slow_pages(void)
{
	uint64_t kept = slow_pages < SLOW_KEPT ? slow_pages : SLOW_KEPT;
	qsort(slow_us, kept, sizeof *slow_us, by_size);
	log_line("{\"slow_pages\":%lu,\"slow_p50_us\":%u,\"slow_p99_us\":%u,\"slow_max_us\":%u,\"t\":%.3f}", slow_pages,
		 kept ? slow_us[kept / 2] : 0, kept ? slow_us[kept * 99 / 100] : 0, kept ? slow_us[kept - 1] : 0,
		 seconds(CLOCK_REALTIME));
	slow_pages = 0;
}

static void *memory(uint64_t bytes)
{
	void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (at == MAP_FAILED)
		fail("no memory for %lu bytes: %s", bytes, strerror(errno));
	if (wanted.huge)
		madvise(at, bytes, MADV_HUGEPAGE);
	if (wanted.small)
		madvise(at, bytes, MADV_NOHUGEPAGE);
	return at;
}

static void fill(void)
{
	page_count = wanted.memory_mib << 20 >> 12;
	working_pages = wanted.working_set_mib ? wanted.working_set_mib << 20 >> 12 : page_count;
	if (page_count == 0 || working_pages > page_count)
		fail("the working set must be part of the memory");
	pages = memory(page_count * PAGE_BYTES);
	versions = memory(page_count * sizeof *versions);
	for (uint64_t number = 0; number < page_count; number++)
		write_page(number);
	zero_pages = wanted.zero_mib << 20 >> 12;
	if (zero_pages > 0) {
		zeros = memory(zero_pages * PAGE_BYTES);
		memset(zeros, 1, zero_pages * PAGE_BYTES);
		memset(zeros, 0, zero_pages * PAGE_BYTES);
	}
}

/* The word at `index` of what a page should hold. Compressible is three small numbers for each random one: about what a heap
 * full of records gives. */
static inline uint64_t content_word(uint64_t *random, int index)
{
	if (!wanted.compressible || index % 4 == 0)
		return next_random(random);
	return (uint64_t)index;
}

static void write_page(uint64_t number)
{
	struct page *page = &pages[number];
	uint64_t version = ++versions[number], random = mix(wanted.seed, number, version) | 1;
	page->number = number;
	page->version = version;
	page->check = random;
	for (int i = 0; i < CONTENT_WORDS; i++)
		page->content[i] = content_word(&random, i);
	writes++;
}

static bool page_is_right(uint64_t number)
{
	const struct page *page = &pages[number];
	uint64_t random = mix(wanted.seed, number, versions[number]) | 1, wrong = 0;
	wrong |= page->number ^ number;
	wrong |= page->version ^ versions[number];
	wrong |= page->check ^ random;
	for (int i = 0; i < CONTENT_WORDS; i++)
		wrong |= page->content[i] ^ content_word(&random, i);
	return wrong == 0;
}

/* How many pages are wrong, plus one if the versions do not add up to the writes done. Names the first ten. */
static uint64_t verify_all(void)
{
	uint64_t errors = 0, sum = 0;
	for (uint64_t number = 0; number < page_count; number++) {
		sum += versions[number];
		if (page_is_right(number))
			continue;
		if (errors++ < 10)
			log_line("{\"corrupt_page\":%lu,\"address\":\"%p\",\"expected_version\":%u,\"number\":%lu,\"version\":%lu}",
				 number, (void *)&pages[number], versions[number], pages[number].number, pages[number].version);
	}
	for (uint64_t page = 0; page < zero_pages; page++) {
		const unsigned char *at = zeros + page * PAGE_BYTES;
		if (at[0] != 0 || memcmp(at, at + 1, PAGE_BYTES - 1) != 0)
			errors++;
	}
	if (sum != writes) {
		errors++;
		log_line("{\"versions\":%lu,\"writes\":%lu}", sum, writes);
	}
	return errors;
}

static uint64_t number_of(const char *text)
{
	char *end;
	uint64_t number = strtoull(text, &end, 10);
	if (*text == 0 || *end != 0)
		fail("not a number: %s", text);
	return number;
}

static void parse(int argc, char **argv)
{
	static const struct option options[] = {
		{"memory-mib", required_argument, NULL, 'm'}, {"dirty-mb-s", required_argument, NULL, 'd'},
		{"check-mb-s", required_argument, NULL, 'c'}, {"order", required_argument, NULL, 'o'},
		{"working-set-mib", required_argument, NULL, 'w'}, {"content", required_argument, NULL, 't'},
		{"zero-mib", required_argument, NULL, 'z'}, {"huge", no_argument, NULL, 'h'},
		{"small", no_argument, NULL, 'n'},
		{"report-ms", required_argument, NULL, 'r'}, {"gap-ms", required_argument, NULL, 'g'}, {"slow-us", required_argument, NULL, 'f'}, {"seed", required_argument, NULL, 's'},
		{"watched", no_argument, NULL, 'u'}, {"leaderless", no_argument, NULL, 'l'}, {0},
	};
	for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;) {
		switch (option) {
		case 'm': wanted.memory_mib = number_of(optarg); break;
		case 'd': wanted.dirty_mb_s = number_of(optarg); break;
		case 'c':
			wanted.check_max = strcmp(optarg, "max") == 0;
			if (!wanted.check_max)
				wanted.check_mb_s = number_of(optarg);
			break;
		case 'o': wanted.sequential = strcmp(optarg, "sequential") == 0; break;
		case 'w': wanted.working_set_mib = number_of(optarg); break;
		case 't': wanted.compressible = strcmp(optarg, "compressible") == 0; break;
		case 'z': wanted.zero_mib = number_of(optarg); break;
		case 'h': wanted.huge = true; break;
		case 'n': wanted.small = true; break;
		case 'r': wanted.report_ms = number_of(optarg); break;
		case 'g': log_gaps_above((double)number_of(optarg)); break;
		case 'f': wanted.slow_us = number_of(optarg); break;
		case 's': wanted.seed = number_of(optarg); break;
		case 'u': wanted.watched = true; break;
		case 'l': wanted.leaderless = true; break;
		default: fail("unknown option");
		}
	}
}
