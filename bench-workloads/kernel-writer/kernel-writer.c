/* Memory that the kernel writes, behind the back of whoever tracks writes by page faults.
 *
 * Readers read blocks of a file into a pool of buffers, past the page cache (O_DIRECT): the device writes into pages that were pinned
 * when the read began. Which block a buffer holds is kept apart, and what a block holds follows from its number. Waiters wait
 * for signals of timers, and the kernel writes what came into a page that was filled with something else.
 *
 *   --file-mib=N      the file that is read (32)
 *   --memory-mib=N    the pool (64)
 *   --readers=N       threads that read (16)
 *   --waiters=N       threads that wait for signals (16)
 *   --ring            hold an io_uring
 *   --late-ring       make an io_uring when SIGUSR2 comes
 *   --late-aio        do the same as --aio, when SIGUSR2 comes
 *   --aio             hold a libaio context, and the file open for direct I/O
 *   --idle-aio        hold a libaio context, and no file open for direct I/O: needs --readers=0
 *
 * Ends with an error, and says why in the log, as soon as anything is wrong. */

#include "workload.h"
#include <getopt.h>
#include <linux/aio_abi.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#define BLOCK (64 << 10)
#define FILE_NAME "/blocks"
#define IN_FLIGHT (-1)
#define NEVER_READ (-2)

static struct {
	uint64_t file_mib, memory_mib, readers, waiters;
	bool ring, late_ring, aio, late_aio, idle_aio;
} wanted = {.file_mib = 32, .memory_mib = 64, .readers = 16, .waiters = 16};

static unsigned char *pool;
static int *holds;
static uint64_t blocks, buffers;
static _Atomic uint64_t reads, waits, wrong_waits;
static atomic_bool rest;
static _Atomic uint64_t resting;
static volatile sig_atomic_t late_asked;

static uint64_t word(uint64_t block, uint64_t index)
{
	return mix(block, index, 7) | 1;
}

static void make_ring(void)
{
	struct { uint32_t fields[30]; } parameters = {0};
	if (syscall(SYS_io_uring_setup, 8, &parameters) < 0)
		fail("io_uring_setup: %s", strerror(errno));
}

static void make_aio(void)
{
	aio_context_t context = 0;
	if (syscall(SYS_io_setup, 8, &context) < 0)
		fail("io_setup: %s", strerror(errno));
}

static void make_direct_aio(void)
{
	make_aio();
	if (open(FILE_NAME, O_RDONLY | O_DIRECT) < 0)
		fail("opening " FILE_NAME " for direct I/O: %s", strerror(errno));
}

static void write_file(void)
{
	static uint64_t block[BLOCK / 8];
	int file = open(FILE_NAME, O_CREAT | O_WRONLY | O_TRUNC, 0644);
	for (uint64_t number = 0; number < blocks; number++) {
		for (uint64_t i = 0; i < BLOCK / 8; i++)
			block[i] = word(number, i);
		if (write(file, block, BLOCK) != BLOCK)
			fail("writing " FILE_NAME ": %s", strerror(errno));
	}
	if (fsync(file) != 0 || close(file) != 0)
		fail("writing " FILE_NAME ": %s", strerror(errno));
}

/* Each reader has every n-th buffer to itself. */
static void *read_blocks(void *argument)
{
	uint64_t first = (uint64_t)(uintptr_t)argument, random = mix(first, 1, 1) | 1;
	int file = open(FILE_NAME, O_RDONLY | O_DIRECT);
	if (file < 0)
		fail("opening " FILE_NAME " for direct I/O: %s", strerror(errno));
	for (uint64_t buffer = first;; buffer += wanted.readers) {
		if (buffer >= buffers)
			buffer = first;
		if (atomic_load(&rest)) {
			resting++;
			while (atomic_load(&rest))
				pause_ms(1);
			resting--;
		}
		uint64_t block = next_random(&random) % blocks;
		holds[buffer] = IN_FLIGHT;
		if (pread(file, pool + buffer * BLOCK, BLOCK, (off_t)(block * BLOCK)) != BLOCK)
			fail("reading " FILE_NAME ": %s", strerror(errno));
		holds[buffer] = (int)block;
		reads++;
	}
}

/* Its signal comes every few milliseconds; what the kernel says of it is to be in the page. */
static void *wait_for_signals(void *argument)
{
	uint64_t number = (uint64_t)(uintptr_t)argument;
	int signal = SIGRTMIN + 1 + (int)(number % 20);
	siginfo_t *said = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (said == MAP_FAILED)
		fail("no page for a waiter");
	sigset_t own;
	sigemptyset(&own);
	sigaddset(&own, signal);
	struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = signal};
	event._sigev_un._tid = (pid_t)syscall(SYS_gettid);
	timer_t timer;
	long period = 5000000 + (long)number * 100000;
	struct itimerspec every = {{0, period}, {0, period}};
	if (timer_create(CLOCK_MONOTONIC, &event, &timer) != 0 || timer_settime(timer, 0, &every, NULL) != 0)
		fail("a timer: %s", strerror(errno));
	for (;;) {
		memset(said, 0x5a, sizeof *said);
		struct timespec long_enough = {10, 0};
		int came = sigtimedwait(&own, said, &long_enough);
		if (came < 0)
			continue;
		if (said->si_signo != came || said->si_code != SI_TIMER)
			wrong_waits++;
		waits++;
	}
}

static void ask_for_late(int signal)
{
	(void)signal;
	late_asked = 1;
}

static uint64_t verify_all(void)
{
	uint64_t errors = 0;
	atomic_store(&rest, true);
	while (resting < wanted.readers)
		pause_ms(1);
	for (uint64_t buffer = 0; buffer < buffers; buffer++) {
		if (holds[buffer] < 0)
			continue;
		const uint64_t *at = (const uint64_t *)(pool + buffer * BLOCK);
		uint64_t wrong = 0;
		for (uint64_t i = 0; i < BLOCK / 8; i++)
			wrong += at[i] != word((uint64_t)holds[buffer], i);
		if (wrong > 0 && errors++ < 10)
			log_line("{\"wrong_buffer\":%lu,\"block\":%d,\"wrong_words\":%lu}", buffer, holds[buffer], wrong);
	}
	atomic_store(&rest, false);
	return errors + wrong_waits;
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
		{"file-mib", required_argument, NULL, 'f'}, {"memory-mib", required_argument, NULL, 'm'},
		{"readers", required_argument, NULL, 'r'}, {"waiters", required_argument, NULL, 'w'},
		{"ring", no_argument, NULL, 'u'}, {"late-ring", no_argument, NULL, 'l'},
		{"aio", no_argument, NULL, 'a'}, {"late-aio", no_argument, NULL, 'b'}, {"idle-aio", no_argument, NULL, 'i'}, {0},
	};
	for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;) {
		switch (option) {
		case 'f': wanted.file_mib = number_of(optarg); break;
		case 'm': wanted.memory_mib = number_of(optarg); break;
		case 'r': wanted.readers = number_of(optarg); break;
		case 'w': wanted.waiters = number_of(optarg); break;
		case 'u': wanted.ring = true; break;
		case 'l': wanted.late_ring = true; break;
		case 'a': wanted.aio = true; break;
		case 'b': wanted.late_aio = true; break;
		case 'i': wanted.idle_aio = true; break;
		default: fail("an option is not known");
		}
	}
}

static void start(void *(*work)(void *), uint64_t number)
{
	pthread_t thread;
	if (pthread_create(&thread, NULL, work, (void *)(uintptr_t)number) != 0)
		fail("pthread_create");
}

int main(int argc, char **argv)
{
	log_open("kernel-writer");
	parse(argc, argv);
	blocks = (wanted.file_mib << 20) / BLOCK;
	buffers = (wanted.memory_mib << 20) / BLOCK;
	write_file();
	/* Small pages: of a huge one the least write would bring all of it again. */
	pool = mmap(NULL, buffers * BLOCK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	holds = calloc(buffers, sizeof *holds);
	if (pool == MAP_FAILED || holds == NULL)
		fail("no memory");
	madvise(pool, buffers * BLOCK, MADV_NOHUGEPAGE);
	for (uint64_t buffer = 0; buffer < buffers; buffer++)
		holds[buffer] = NEVER_READ;
	if (wanted.ring)
		make_ring();
	if (wanted.idle_aio)
		make_aio();
	if (wanted.aio)
		make_direct_aio();

	/* For the waiters: blocked before there is a thread. */
	sigset_t blocked;
	sigemptyset(&blocked);
	for (int signal = SIGRTMIN + 1; signal <= SIGRTMIN + 20; signal++)
		sigaddset(&blocked, signal);
	sigaddset(&blocked, SIGUSR1);
	sigaddset(&blocked, SIGUSR2);
	pthread_sigmask(SIG_BLOCK, &blocked, NULL);
	start_clock();
	for (uint64_t number = 0; number < wanted.readers; number++)
		start(read_blocks, number);
	for (uint64_t number = 0; number < wanted.waiters; number++)
		start(wait_for_signals, number);
	sigemptyset(&blocked);
	sigaddset(&blocked, SIGUSR1);
	sigaddset(&blocked, SIGUSR2);
	pthread_sigmask(SIG_UNBLOCK, &blocked, NULL);
	struct sigaction on_late = {.sa_handler = ask_for_late};
	sigaction(SIGUSR2, &on_late, NULL);
	take_requests();
	/* Every buffer has been read into once. */
	while (reads < (wanted.readers > 0 ? buffers : 0))
		pause_ms(1);
	log_line("{\"ready\":true,\"memory_mib\":%lu}", wanted.memory_mib);

	for (sig_atomic_t verdicts_given = 0;;) {
		if (late_asked) {
			late_asked = 0;
			if (wanted.late_ring)
				make_ring();
			if (wanted.late_aio)
				make_direct_aio();
			log_line("{\"late\":true}");
		}
		if (verdicts_given < verdicts_asked) {
			verdicts_given++;
			uint64_t errors = verify_all();
			log_line("{\"verified\":%s,\"errors\":%lu,\"longest_gap_ms\":%.1f,\"seq\":%lu,\"waits\":%lu,\"wrong_waits\":%lu}",
				 errors == 0 ? "true" : "false", errors, longest_gap_ms(), reads + waits, waits, wrong_waits);
		}
		pause_ms(1);
	}
}
