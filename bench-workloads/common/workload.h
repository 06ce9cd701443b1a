/* What every workload shares: its log, its clock and its random numbers.
 *
 * The log is /log/<name>.jsonl, one JSON object a line, each appended by a single write so that no line is ever torn by the
 * workload itself. The clock is a thread that does nothing but look at the time: the longest time between two looks is the
 * longest time the container did not run. */

#ifndef WORKLOAD_H
#define WORKLOAD_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* Opens /log/<name>.jsonl for appending. First of all. */
void log_open(const char *name);

/* Appends one line. A workload that cannot speak must not look healthy: it ends. */
__attribute__((format(printf, 1, 2))) void log_line(const char *format, ...);

/* Says what is wrong and ends the process with an error. */
__attribute__((format(printf, 1, 2), noreturn)) void fail(const char *format, ...);

/* Gaps of the clock above this get a line in the log: 20 ms unless said. Before the clock is started. */
void log_gaps_above(double milliseconds);

/* Starts the clock's thread, with all signals blocked in it: they are for the threads that work. */
void start_clock(void);

/* The longest the clock has stood still since it was started, by CLOCK_MONOTONIC and by CLOCK_REALTIME. The first misses the
 * time between CRIU's dump and its restore: a restored container's monotonic clock goes on where it was dumped. */
double longest_gap_ms(void);
double longest_realtime_gap_ms(void);

/* Calls `tell` every so many milliseconds on a thread of its own, with the seconds since its last call: progress is told also
 * while the threads that work wait for memory. */
void start_reports(uint64_t milliseconds, void (*tell)(double elapsed));

/* SIGUSR1 asks for a verdict: counted by its handler, answered by the workload's loop. */
void take_requests(void);
extern volatile sig_atomic_t verdicts_asked;

/* The time of a clock in seconds. */
double seconds(clockid_t clock);

/* Waits so many milliseconds, less when a signal comes. */
void pause_ms(long milliseconds);

/* Mixes three numbers into one; the finalizer of splitmix64 after each. */
static inline uint64_t mix(uint64_t a, uint64_t b, uint64_t c)
{
	uint64_t parts[3] = {a, b, c}, mixed = 0x9e3779b97f4a7c15;
	for (int i = 0; i < 3; i++) {
		mixed += parts[i] + 0x9e3779b97f4a7c15;
		mixed = (mixed ^ (mixed >> 30)) * 0xbf58476d1ce4e5b9;
		mixed = (mixed ^ (mixed >> 27)) * 0x94d049bb133111eb;
		mixed ^= mixed >> 31;
	}
	return mixed;
}

/* xorshift64*: `state` must not be zero. */
static inline uint64_t next_random(uint64_t *state)
{
	*state ^= *state >> 12;
	*state ^= *state << 25;
	*state ^= *state >> 27;
	return *state * 0x2545f4914f6cdd1d;
}

#endif
