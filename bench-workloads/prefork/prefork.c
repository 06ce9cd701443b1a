/* A prefork server: a first process fills a large table, forks workers that share it copy-on-write, and asks them for records
 * one after another. Each worker rewrites a share of the table and has memory of its own, and knows what every page it can
 * see should hold: what another worker wrote must not be seen, what nobody wrote must be as it was.
 *
 *   --table-mib=N      the table (128)
 *   --workers=N        workers (8)
 *   --rewritten=N      each worker rewrites one page in N of the table, none the same as another's (64)
 *   --private-mib=N    memory that each worker fills for itself (4)
 *   --requests-per-s=N records asked for a second, over all workers (2000)
 *
 * The table is written by the first process, or not at all after the fork. */

#include "workload.h"
#include <getopt.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>

#define PAGE_BYTES 4096
#define PAGE_WORDS (PAGE_BYTES / 8)
#define MOST_WORKERS 64

static uint64_t table_mib = 128, workers = 8, rewritten = 64, private_mib = 4, requests_per_s = 2000;
static uint64_t *table, *private;
static uint64_t table_pages, private_pages;

/* A record asked for, or a verdict. */
#define VERDICT UINT64_MAX
static int line[MOST_WORKERS];

static void serve(uint64_t self) __attribute__((noreturn));

static uint64_t *memory(uint64_t pages)
{
	void *at = mmap(NULL, pages * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (at == MAP_FAILED)
		fail("no memory");
	madvise(at, pages * PAGE_BYTES, MADV_NOHUGEPAGE);
	return at;
}

/* Whose a page of the table is, as worker `self` sees it: 0 is the first process, worker n is n + 1. */
static uint64_t owner_of(uint64_t page, uint64_t self) { return page % rewritten == self ? self + 1 : 0; }

static void write_page(uint64_t *at, uint64_t page, uint64_t owner)
{
	uint64_t random = mix(page, owner, 1) | 1;
	for (int i = 0; i < PAGE_WORDS; i++)
		at[page * PAGE_WORDS + i] = next_random(&random);
}

static bool page_is_right(const uint64_t *at, uint64_t page, uint64_t owner)
{
	uint64_t random = mix(page, owner, 1) | 1, wrong = 0;
	for (int i = 0; i < PAGE_WORDS; i++)
		wrong |= at[page * PAGE_WORDS + i] ^ next_random(&random);
	return wrong == 0;
}

static uint64_t wrong_pages(uint64_t self)
{
	uint64_t errors = 0;
	for (uint64_t page = 0; page < table_pages; page++)
		errors += !page_is_right(table, page, owner_of(page, self));
	for (uint64_t page = 0; page < private_pages; page++)
		errors += !page_is_right(private, page, workers + 1 + self);
	return errors;
}

static void tell(int to, uint64_t what)
{
	if (write(to, &what, sizeof what) != sizeof what)
		fail("the line to the other end is broken");
}

static uint64_t hear(int from)
{
	uint64_t what;
	ssize_t got;
	while ((got = read(from, &what, sizeof what)) < 0 && errno == EINTR)
		;
	if (got != sizeof what)
		fail("the line from the other end is broken");
	return what;
}

static void serve(uint64_t self)
{
	for (uint64_t page = self; page < table_pages; page += rewritten)
		write_page(table, page, self + 1);
	private = memory(private_pages);
	for (uint64_t page = 0; page < private_pages; page++)
		write_page(private, page, workers + 1 + self);
	tell(line[self], 0);
	for (;;) {
		uint64_t asked = hear(line[self]);
		if (asked == VERDICT)
			tell(line[self], wrong_pages(self));
		else
			tell(line[self], table[asked * PAGE_WORDS]);
	}
}

static uint64_t served, errors_served;

/* Asks a worker for a record, and looks whether the answer is what that worker should see. */
static void ask(uint64_t random)
{
	uint64_t worker = random % workers, page = (random >> 16) % table_pages;
	tell(line[worker], page);
	uint64_t expected = mix(page, owner_of(page, worker), 1) | 1;
	if (hear(line[worker]) != next_random(&expected))
		errors_served++;
	served++;
}

static void parse(int argc, char **argv)
{
	static const struct option options[] = {
		{"table-mib", required_argument, NULL, 't'}, {"workers", required_argument, NULL, 'w'},
		{"rewritten", required_argument, NULL, 'r'}, {"private-mib", required_argument, NULL, 'p'},
		{"requests-per-s", required_argument, NULL, 'q'}, {0}};
	for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;) {
		uint64_t *wanted = option == 't'   ? &table_mib
				   : option == 'w' ? &workers
				   : option == 'r' ? &rewritten
				   : option == 'p' ? &private_mib
						   : &requests_per_s;
		if (option == '?' || (*wanted = strtoull(optarg, NULL, 10)) == 0)
			fail("a number above 0 is needed");
	}
	if (workers > MOST_WORKERS || rewritten < workers)
		fail("at most %d workers, and no more than pages between two rewritten ones", MOST_WORKERS);
}

int main(int argc, char **argv)
{
	log_open("prefork");
	parse(argc, argv);
	table_pages = table_mib << 20 >> 12;
	private_pages = private_mib << 20 >> 12;
	table = memory(table_pages);
	for (uint64_t page = 0; page < table_pages; page++)
		write_page(table, page, 0);
	for (uint64_t worker = 0; worker < workers; worker++) {
		int ends[2];
		if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0)
			fail("socketpair");
		pid_t pid = fork();
		if (pid < 0)
			fail("fork");
		line[worker] = ends[pid == 0];
		close(ends[pid != 0]);
		if (pid == 0)
			serve(worker);
	}
	for (uint64_t worker = 0; worker < workers; worker++)
		hear(line[worker]);
	take_requests();
	start_clock();
	log_line("{\"ready\":true,\"table_mib\":%lu,\"workers\":%lu}", table_mib, workers);

	uint64_t random = mix(1, 2, 3);
	sig_atomic_t given = 0;
	for (;;) {
		for (uint64_t n = 0; n < (requests_per_s + 999) / 1000; n++)
			ask(next_random(&random));
		if (given < verdicts_asked) {
			given++;
			uint64_t errors = errors_served;
			for (uint64_t page = 0; page < table_pages; page++)
				errors += !page_is_right(table, page, 0);
			for (uint64_t worker = 0; worker < workers; worker++) {
				tell(line[worker], VERDICT);
				uint64_t wrong = hear(line[worker]);
				if (wrong > 0)
					log_line("{\"worker\":%lu,\"wrong_pages\":%lu}", worker, wrong);
				errors += wrong;
			}
			log_line("{\"verified\":%s,\"pages\":%lu,\"errors\":%lu,\"longest_gap_ms\":%.1f,"
				 "\"longest_gap_realtime_ms\":%.1f,\"seq\":%lu}",
				 errors == 0 ? "true" : "false", table_pages + workers * (table_pages + private_pages), errors,
				 longest_gap_ms(), longest_realtime_gap_ms(), served);
		}
		pause_ms(1);
	}
}
