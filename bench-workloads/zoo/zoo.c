/* Forty processes with one of everything a kernel offers, each of which knows what it should find.
 *
 * The first process opens the zoo, waits until every animal has its slot on a board in shared memory, and on SIGUSR1 asks all
 * of them whether they are as they were. An animal that finds something wrong says what; one that dies ends the zoo.
 *
 *   --churn      two more processes keep forking, executing and ending
 *   --leaf N     what they execute: ends with status N
 */

#include "zoo.h"

#define SLOTS 64
#define ANSWER_SECONDS 20

static struct board {
	_Atomic uint32_t taken, asked;
	struct slot {
		_Atomic uint32_t answered;
		_Atomic uint64_t steps;
		pid_t pid;
		char kind[24];
		char complaint[COMPLAINT_BYTES];
	} slots[SLOTS];
} *board;

bool churn;

static void watch_for_deaths(void);
static void give_verdict(void);

int main(int argc, char **argv)
{
	if (argc == 3 && strcmp(argv[1], "--leaf") == 0)
		return atoi(argv[2]);
	churn = argc == 2 && strcmp(argv[1], "--churn") == 0;
	log_open("zoo");
	board = mmap(NULL, sizeof *board, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (board == MAP_FAILED)
		fail("no board");

	start_family();
	start_channels();
	start_mappings();
	start_signals();
	take_requests();
	start_clock();
	/* The first process and the zombie take no slot. */
	uint32_t expected = PROCESSES - 2 + (churn ? 1 : 0);
	for (int waited = 0; atomic_load(&board->taken) < expected; waited++) {
		watch_for_deaths();
		if (waited > 1000)
			fail("only %u of %u animals came", atomic_load(&board->taken), expected);
		pause_ms(10);
	}
	log_line("{\"ready\":true,\"processes\":%d}", PROCESSES);

	for (sig_atomic_t given = 0;;) {
		watch_for_deaths();
		if (given < verdicts_asked) {
			given++;
			give_verdict();
		}
		pause_ms(10);
	}
}

/* Reaps what ends. Orphans may end; animals may not. */
static void watch_for_deaths(void)
{
	int status;
	for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;)
		for (uint32_t i = 0; i < atomic_load(&board->taken); i++)
			if (board->slots[i].pid == pid)
				fail("%s (process %d) ended with status %x", board->slots[i].kind, pid, status);
}

static void give_verdict(void)
{
	uint32_t asked = atomic_fetch_add(&board->asked, 1) + 1, animals = atomic_load(&board->taken);
	double deadline = seconds(CLOCK_MONOTONIC) + ANSWER_SECONDS;
	uint64_t errors = 0, steps = 0;
	for (uint32_t i = 0; i < animals; i++) {
		struct slot *slot = &board->slots[i];
		while (atomic_load(&slot->answered) < asked && seconds(CLOCK_MONOTONIC) < deadline)
			pause_ms(1);
		if (atomic_load(&slot->answered) < asked) {
			errors++;
			log_line("{\"silent\":\"%s\",\"pid\":%d}", slot->kind, slot->pid);
		} else if (slot->complaint[0] != 0) {
			errors++;
			log_line("{\"wrong\":\"%s\",\"pid\":%d,\"complaint\":\"%s\"}", slot->kind, slot->pid, slot->complaint);
		}
		steps += atomic_load(&slot->steps);
	}
	log_line("{\"verified\":%s,\"processes\":%u,\"errors\":%lu,\"longest_gap_ms\":%.1f,\"longest_gap_realtime_ms\":%.1f,"
		 "\"seq\":%lu}",
		 errors == 0 ? "true" : "false", animals + 2, errors, longest_gap_ms(), longest_realtime_gap_ms(), steps);
}

pid_t start(void (*body)(void))
{
	pid_t pid = fork();
	if (pid < 0)
		fail("fork: %s", strerror(errno));
	if (pid == 0) {
		body();
		_exit(4);
	}
	return pid;
}

/* Memory every animal has besides what makes it what it is: a page at a time is written anew, all are known. */
#define OWN_PAGES 8

static uint64_t (*own)[PAGE_BYTES / 8];
static uint64_t own_versions[OWN_PAGES];

static void write_own(uint64_t page, pid_t pid)
{
	own_versions[page]++;
	for (uint64_t i = 0; i < PAGE_BYTES / 8; i++)
		own[page][i] = mix((uint64_t)pid << 32 | page, own_versions[page], i);
}

static bool own_is_right(pid_t pid)
{
	for (uint64_t page = 0; page < OWN_PAGES; page++)
		for (uint64_t i = 0; i < PAGE_BYTES / 8; i++)
			if (own[page][i] != mix((uint64_t)pid << 32 | page, own_versions[page], i))
				return false;
	return true;
}

void live(const char *kind, void (*step)(void), void (*check)(char *complaint))
{
	/* Asked for once: a pid that changes on the way is found out by its memory. */
	pid_t pid = getpid();
	own = mmap(NULL, OWN_PAGES * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (own == MAP_FAILED)
		fail("%s has no memory", kind);
	for (uint64_t page = 0; page < OWN_PAGES; page++)
		write_own(page, pid);

	uint32_t place = atomic_fetch_add(&board->taken, 1);
	if (place >= SLOTS)
		fail("the board is full");
	struct slot *slot = &board->slots[place];
	snprintf(slot->kind, sizeof slot->kind, "%s", kind);
	slot->pid = pid;
	uint32_t answered = 0;
	for (uint64_t steps = 1;; steps++) {
		write_own(steps % OWN_PAGES, getpid());
		if (step != NULL)
			step();
		atomic_store(&slot->steps, steps);
		if (answered < atomic_load(&board->asked)) {
			char complaint[COMPLAINT_BYTES] = "";
			if (check != NULL)
				check(complaint);
			if (!own_is_right(pid))
				complain("its own memory is wrong");
			memcpy(slot->complaint, complaint, sizeof complaint);
			answered++;
			atomic_store(&slot->answered, answered);
		}
		pause_ms(10);
	}
}
