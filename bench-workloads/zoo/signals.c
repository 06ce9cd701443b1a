/* Threads, timers and signals that wait. 3 of the 40. */

#include "zoo.h"
#include <sys/time.h>
#include <sys/timerfd.h>

/* A process of eight threads, each with its own thread-local memory and a share of one sum. */
#define THREADS 8

static __thread struct { uint64_t seed, count, words[64]; } local;
static pthread_mutex_t sum_lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t sum, counts[THREADS], counts_before[THREADS];
static char thread_complaint[COMPLAINT_BYTES];

static void *count_alone(void *argument)
{
	uint64_t which = (uint64_t)argument;
	local.seed = which;
	for (;;) {
		local.count++;
		local.words[local.count % 64] = mix(which, local.count, 3);
		pthread_mutex_lock(&sum_lock);
		sum++;
		counts[which]++;
		bool right = local.seed == which && local.count == counts[which];
		for (uint64_t back = 0; back < 64 && back < local.count; back++)
			right = right && local.words[(local.count - back) % 64] == mix(which, local.count - back, 3);
		if (!right)
			snprintf(thread_complaint, sizeof thread_complaint, "thread %lu has another's memory", which);
		pthread_mutex_unlock(&sum_lock);
		pause_ms(5);
	}
	return NULL;
}

/* One more that sleeps for an hour. When the sleep is interrupted the kernel writes how much of it is left, at a moment when
 * nobody expects memory to change any more; a restored sleep is always an interrupted one. */
static void *sleep_long(void *unused)
{
	static struct timespec left;
	(void)unused;
	for (;;) {
		const struct timespec hour = {.tv_sec = 3600};
		left = (struct timespec){.tv_sec = -7, .tv_nsec = -7};
		if (nanosleep(&hour, &left) == 0 || left.tv_sec < 0 || left.tv_sec > 3600 || left.tv_nsec < 0) {
			pthread_mutex_lock(&sum_lock);
			snprintf(thread_complaint, sizeof thread_complaint, "of an hour's sleep %ld s and %ld ns were left", left.tv_sec,
				 left.tv_nsec);
			pthread_mutex_unlock(&sum_lock);
		}
	}
	return NULL;
}

static void check_threads(char *complaint)
{
	/* Long enough for every thread to get its turn, even on a busy machine. */
	for (int tries = 0; tries < 200; tries++) {
		bool all = true;
		pthread_mutex_lock(&sum_lock);
		for (int i = 0; i < THREADS; i++)
			all = all && counts[i] > counts_before[i];
		pthread_mutex_unlock(&sum_lock);
		if (all)
			break;
		pause_ms(5);
	}
	uint64_t together = 0;
	pthread_mutex_lock(&sum_lock);
	for (int i = 0; i < THREADS; i++) {
		if (counts[i] <= counts_before[i])
			complain("thread %d stands still", i);
		together += counts_before[i] = counts[i];
	}
	if (together != sum)
		complain("the threads' counts add up to %lu, not %lu", together, sum);
	if (thread_complaint[0] != 0)
		complain("%s", thread_complaint);
	pthread_mutex_unlock(&sum_lock);
}

static void threads(void)
{
	for (uint64_t i = 0; i < THREADS; i++) {
		pthread_t thread;
		if (pthread_create(&thread, NULL, count_alone, (void *)i) != 0)
			fail("pthread_create");
	}
	pthread_t sleeper;
	if (pthread_create(&sleeper, NULL, sleep_long, NULL) != 0)
		fail("pthread_create");
	live("threads", NULL, check_threads);
}

/* One timer of each kind, all of which must go on ticking at their pace. */
#define INTERVAL_MS 20

static volatile sig_atomic_t alarms, timer_signals;
static timer_t posix_timer;
static int timer_fd;

static const struct timespec once = {.tv_nsec = INTERVAL_MS * 1000000};

/* Shot by shot and not periodic: CRIU (4.2) disarms a periodic timerfd whose last tick has not been read, because the kernel
 * shows no time left for it until it is. */
static bool shoot(void) { return timerfd_settime(timer_fd, 0, &(struct itimerspec){.it_value = once}, NULL) == 0; }

static void count_alarm(int signal) { (void)signal; alarms++; }
static void count_timer(int signal) { (void)signal; timer_signals++; }

static void check_timers(char *complaint)
{
	sig_atomic_t alarms_before = alarms, signals_before = timer_signals;
	uint64_t expired, ticks = 0;
	for (int tries = 0; tries < 100 && (alarms == alarms_before || timer_signals == signals_before || ticks == 0); tries++) {
		pause_ms(INTERVAL_MS);
		if (read(timer_fd, &expired, sizeof expired) == sizeof expired && shoot())
			ticks += expired;
	}
	if (alarms == alarms_before || timer_signals == signals_before || ticks == 0)
		complain("ticks: setitimer %d, timer_create %d, timerfd %lu", alarms - alarms_before,
			 timer_signals - signals_before, ticks);
	struct itimerval real;
	struct itimerspec posix;
	getitimer(ITIMER_REAL, &real);
	timer_gettime(posix_timer, &posix);
	if (real.it_interval.tv_usec != INTERVAL_MS * 1000 || posix.it_interval.tv_nsec != once.tv_nsec)
		complain("intervals: setitimer %ld µs, timer_create %ld ns", real.it_interval.tv_usec, posix.it_interval.tv_nsec);
}

static void timers(void)
{
	const struct timeval coarse = {.tv_usec = INTERVAL_MS * 1000};
	sigaction(SIGALRM, &(struct sigaction){.sa_handler = count_alarm, .sa_flags = SA_RESTART}, NULL);
	sigaction(SIGRTMIN + 2, &(struct sigaction){.sa_handler = count_timer, .sa_flags = SA_RESTART}, NULL);
	setitimer(ITIMER_REAL, &(struct itimerval){coarse, coarse}, NULL);
	struct sigevent by_signal = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN + 2};
	if (timer_create(CLOCK_MONOTONIC, &by_signal, &posix_timer) != 0 ||
	    timer_settime(posix_timer, 0, &(struct itimerspec){once, once}, NULL) != 0)
		fail("timer_create: %s", strerror(errno));
	timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
	if (timer_fd < 0 || !shoot())
		fail("timerfd: %s", strerror(errno));
	live("timers", NULL, check_timers);
}

/* Signals that are blocked and wait: one of the old kind, three of the new in order and with values. */
#define QUEUED 3

static sigset_t waiting;
static char alternate_stack[64 * 1024];

static void send_all(void)
{
	kill(getpid(), SIGUSR2);
	for (int i = 1; i <= QUEUED; i++)
		sigqueue(getpid(), SIGRTMIN + 3, (union sigval){.sival_int = i * 11});
}

static void check_pending(char *complaint)
{
	const struct timespec now = {0};
	sigset_t usr2, queued;
	siginfo_t about;
	sigemptyset(&usr2);
	sigaddset(&usr2, SIGUSR2);
	sigemptyset(&queued);
	sigaddset(&queued, SIGRTMIN + 3);
	if (sigtimedwait(&usr2, &about, &now) != SIGUSR2)
		complain("SIGUSR2 does not wait");
	for (int i = 1; i <= QUEUED; i++)
		if (sigtimedwait(&queued, &about, &now) != SIGRTMIN + 3 || about.si_value.sival_int != i * 11)
			complain("queued signal %d has value %d", i, about.si_value.sival_int);
	if (sigtimedwait(&waiting, &about, &now) != -1)
		complain("signal %d came twice", about.si_signo);
	send_all();

	stack_t stack;
	struct sigaction action;
	sigaltstack(NULL, &stack);
	if (stack.ss_sp != alternate_stack || stack.ss_size != sizeof alternate_stack)
		complain("the signal stack is at %p", stack.ss_sp);
	sigaction(SIGHUP, NULL, &action);
	if (action.sa_handler != count_alarm || (action.sa_flags & SA_ONSTACK) == 0)
		complain("SIGHUP has another handler");
}

static void signal_keeper(void)
{
	sigemptyset(&waiting);
	sigaddset(&waiting, SIGUSR2);
	sigaddset(&waiting, SIGRTMIN + 3);
	sigprocmask(SIG_BLOCK, &waiting, NULL);
	sigaltstack(&(stack_t){.ss_sp = alternate_stack, .ss_size = sizeof alternate_stack}, NULL);
	sigaction(SIGHUP, &(struct sigaction){.sa_handler = count_alarm, .sa_flags = SA_ONSTACK | SA_RESTART}, NULL);
	send_all();
	live("signal keeper", NULL, check_pending);
}

void start_signals(void)
{
	start(threads);
	start(timers);
	start(signal_keeper);
}
