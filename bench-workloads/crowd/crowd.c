/* Many processes: some that sleep all the time, each with pages of its own that nobody else may have, and some that live for a few
 * milliseconds only, each with a look at its memory before it ends.
 *
 *   --sleepers=N       processes that sleep until they are asked what they hold (0)
 *   --pages=N          pages of each (4)
 *   --forks-per-s=N    processes forked a second (0)
 *   --lives-ms=N       how long each of those lives (200)
 *   --heap-mib=N       memory of the first process, which all others have a copy of (1)
 */

#include "workload.h"
#include <getopt.h>
#include <sys/mman.h>
#include <sys/wait.h>

#define PAGE_BYTES 4096
#define PAGE_WORDS (PAGE_BYTES / 8)
#define MOST_SLEEPERS 16384

static uint64_t sleepers, pages = 4, forks_per_s, lives_ms = 200, heap_mib = 1;
static uint64_t *heap;
/* Asked, and sent back to sleep when all have answered: else one could take another's question. */
static int asked[2], answers[2], back[2];

static uint64_t *memory(uint64_t bytes, uint64_t owner)
{
	uint64_t *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (at == MAP_FAILED)
		fail("no memory");
	uint64_t random = mix(owner, 5, 1) | 1;
	for (uint64_t i = 0; i < bytes / 8; i++)
		at[i] = next_random(&random);
	return at;
}

static bool is_right(const uint64_t *at, uint64_t bytes, uint64_t owner)
{
	uint64_t random = mix(owner, 5, 1) | 1, wrong = 0;
	for (uint64_t i = 0; i < bytes / 8; i++)
		wrong |= at[i] ^ next_random(&random);
	return wrong == 0;
}

static void put(int to, char what)
{
	if (write(to, &what, 1) != 1)
		fail("a pipe is broken");
}

static char get(int from)
{
	char what;
	ssize_t got;
	while ((got = read(from, &what, 1)) < 0 && errno == EINTR)
		;
	if (got != 1)
		fail("a pipe is broken");
	return what;
}

static void sleep_well(uint64_t self) __attribute__((noreturn));
static void sleep_well(uint64_t self)
{
	uint64_t *own = memory(pages * PAGE_BYTES, self + 1);
	put(answers[1], 0);
	for (;;) {
		get(asked[0]);
		put(answers[1], !is_right(own, pages * PAGE_BYTES, self + 1) || !is_right(heap, PAGE_BYTES, 0));
		get(back[0]);
		put(answers[1], 0);
	}
}

static void live_shortly(uint64_t number) __attribute__((noreturn));
static void live_shortly(uint64_t number)
{
	uint64_t *own = memory(16 * PAGE_BYTES, number + MOST_SLEEPERS);
	pause_ms(lives_ms + number % 50);
	_exit(!is_right(own, 16 * PAGE_BYTES, number + MOST_SLEEPERS) || !is_right(heap, heap_mib << 20, 0));
}

static uint64_t of_all(int pipe)
{
	uint64_t errors = 0;
	for (uint64_t i = 0; i < sleepers; i++)
		put(pipe, 0);
	for (uint64_t i = 0; i < sleepers; i++)
		errors += get(answers[0]);
	return errors;
}

static void parse(int argc, char **argv)
{
	static const struct option options[] = {
		{"sleepers", required_argument, NULL, 's'}, {"pages", required_argument, NULL, 'p'},
		{"forks-per-s", required_argument, NULL, 'f'}, {"lives-ms", required_argument, NULL, 'l'},
		{"heap-mib", required_argument, NULL, 'h'}, {0}};
	for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;) {
		uint64_t *wanted = option == 's'   ? &sleepers
				   : option == 'p' ? &pages
				   : option == 'f' ? &forks_per_s
				   : option == 'l' ? &lives_ms
						   : &heap_mib;
		if (option == '?' || (*wanted = strtoull(optarg, NULL, 10)) == 0)
			fail("a number above 0 is needed");
	}
	if (sleepers > MOST_SLEEPERS || forks_per_s > 1000)
		fail("at most %d sleepers, and 1000 forks a second", MOST_SLEEPERS);
}

int main(int argc, char **argv)
{
	log_open("crowd");
	parse(argc, argv);
	heap = memory(heap_mib << 20, 0);
	if (pipe(asked) || pipe(answers) || pipe(back))
		fail("pipe");
	for (uint64_t i = 0; i < sleepers; i++) {
		pid_t pid = fork();
		if (pid < 0)
			fail("fork %lu: %s", i, strerror(errno));
		if (pid == 0)
			sleep_well(i);
	}
	for (uint64_t i = 0; i < sleepers; i++)
		get(answers[0]);
	take_requests();
	start_clock();
	log_line("{\"ready\":true,\"sleepers\":%lu}", sleepers);

	sig_atomic_t given = 0;
	uint64_t forked = 0, ended = 0, errors = 0;
	double began = seconds(CLOCK_MONOTONIC);
	for (;;) {
		/* Held up, it does not catch up all at once. */
		for (int most = 0; most < 20 && forked < (seconds(CLOCK_MONOTONIC) - began) * forks_per_s; most++) {
			pid_t pid = fork();
			if (pid < 0)
				fail("fork: %s", strerror(errno));
			if (pid == 0)
				live_shortly(forked);
			forked++;
		}
		int status;
		while (waitpid(-1, &status, WNOHANG) > 0) {
			ended++;
			errors += status != 0;
		}
		if (given < verdicts_asked) {
			given++;
			errors += of_all(asked[1]);
			of_all(back[1]);
			errors += !is_right(heap, heap_mib << 20, 0);
			log_line("{\"verified\":%s,\"errors\":%lu,\"forked\":%lu,\"longest_gap_ms\":%.1f,"
				 "\"longest_gap_realtime_ms\":%.1f,\"seq\":%lu}",
				 errors == 0 ? "true" : "false", errors, forked, longest_gap_ms(), longest_realtime_gap_ms(), ended);
		}
		pause_ms(2);
	}
}
