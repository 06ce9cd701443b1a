#include "workload.h"

/* A gap shorter than this gets no line of its own. Below the default gaps are ordinary scheduling. */
static double gap_worth_a_line_ms = 20.0;

static int log_fd = -1;

void log_open(const char *name)
{
	char path[256];
	snprintf(path, sizeof path, "/log/%s.jsonl", name);
	log_fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
	if (log_fd < 0)
		fail("cannot open %s: %s", path, strerror(errno));
}

void log_line(const char *format, ...)
{
	char line[1024];
	va_list arguments;
	va_start(arguments, format);
	int length = vsnprintf(line, sizeof line - 1, format, arguments);
	va_end(arguments);
	if (length < 0 || length > (int)sizeof line - 2)
		length = sizeof line - 2;
	line[length++] = '\n';
	if (write(log_fd, line, (size_t)length) != length)
		_exit(3);
}

void fail(const char *format, ...)
{
	char what[512];
	va_list arguments;
	va_start(arguments, format);
	vsnprintf(what, sizeof what, format, arguments);
	va_end(arguments);
	if (log_fd >= 0)
		log_line("{\"failed\":\"%s\",\"pid\":%d}", what, (int)getpid());
	else
		fprintf(stderr, "%s\n", what);
	_exit(1);
}

double seconds(clockid_t clock)
{
	struct timespec now;
	clock_gettime(clock, &now);
	return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

void pause_ms(long milliseconds)
{
	nanosleep(&(struct timespec){.tv_sec = milliseconds / 1000, .tv_nsec = milliseconds % 1000 * 1000000}, NULL);
}

/* Both in microseconds, written by the clock's thread only. */
static _Atomic uint64_t longest_gap_us, longest_realtime_gap_us;

double longest_gap_ms(void) { return (double)atomic_load(&longest_gap_us) / 1000; }

double longest_realtime_gap_ms(void) { return (double)atomic_load(&longest_realtime_gap_us) / 1000; }

static void *clock_loop(void *unused)
{
	(void)unused;
	/* Longer than a look takes, far shorter than any gap of interest: a spinning clock would take a processor from the
	 * migration it measures. */
	const struct timespec step = {.tv_nsec = 200 * 1000};
	double monotonic = seconds(CLOCK_MONOTONIC), realtime = seconds(CLOCK_REALTIME);
	for (;;) {
		nanosleep(&step, NULL);
		double monotonic_now = seconds(CLOCK_MONOTONIC), realtime_now = seconds(CLOCK_REALTIME);
		double gap = monotonic_now - monotonic, realtime_gap = realtime_now - realtime;
		if (gap * 1e6 > (double)atomic_load(&longest_gap_us))
			atomic_store(&longest_gap_us, (uint64_t)(gap * 1e6));
		if (realtime_gap * 1e6 > (double)atomic_load(&longest_realtime_gap_us))
			atomic_store(&longest_realtime_gap_us, (uint64_t)(realtime_gap * 1e6));
		if (gap * 1000 > gap_worth_a_line_ms || realtime_gap * 1000 > gap_worth_a_line_ms) {
			log_line("{\"gap_ms\":%.1f,\"gap_realtime_ms\":%.1f,\"t\":%.3f}", gap * 1000, realtime_gap * 1000,
				 realtime_now);
			/* Writing the line is no gap. */
			monotonic_now = seconds(CLOCK_MONOTONIC);
			realtime_now = seconds(CLOCK_REALTIME);
		}
		monotonic = monotonic_now;
		realtime = realtime_now;
	}
	return NULL;
}

void log_gaps_above(double milliseconds) { gap_worth_a_line_ms = milliseconds; }

/* Starts a thread that takes no signal: they are for the threads that work. */
static void start_aside(void *(*loop)(void *))
{
	pthread_t thread;
	sigset_t all, before;
	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &before);
	if (pthread_create(&thread, NULL, loop, NULL) != 0)
		fail("cannot start a thread");
	pthread_sigmask(SIG_SETMASK, &before, NULL);
}

void start_clock(void) { start_aside(clock_loop); }

static uint64_t report_ms;
static void (*tell_progress)(double elapsed);

static void *report_loop(void *unused)
{
	(void)unused;
	/* Not the monotonic clock: CRIU gives a restored container a time namespace, in which that one does not go on while the
	 * container is away. */
	double then = seconds(CLOCK_REALTIME);
	for (;;) {
		pause_ms((long)report_ms);
		double now = seconds(CLOCK_REALTIME);
		tell_progress(now - then);
		then = now;
	}
	return NULL;
}

void start_reports(uint64_t milliseconds, void (*tell)(double elapsed))
{
	report_ms = milliseconds;
	tell_progress = tell;
	start_aside(report_loop);
}

volatile sig_atomic_t verdicts_asked;

static void ask_verdict(int signal)
{
	(void)signal;
	verdicts_asked++;
}

void take_requests(void)
{
	struct sigaction action = {.sa_handler = ask_verdict, .sa_flags = SA_RESTART};
	sigaction(SIGUSR1, &action, NULL);
}
