/* Debian's redis-server under load, in three processes: a first one that starts the others and ends when either does, the
 * server, and a writer that knows every key's value.
 *
 * The writer has one TCP connection over loopback for its whole life. Each of its steps raises a counter, appends the number to
 * a list and rewrites one record, all checked reply by reply; a verdict reads back every record and the whole list.
 *
 *   --data-mib=N        records to load before it is ready (64)
 *   --writes-per-s=N    steps a second (500)
 *   --report-ms=N       time between two lines in the log (1000)
 */

#include "resp.h"
#include <getopt.h>
#include <sys/wait.h>

/* A record's key number, version, and bytes that follow from both. */
#define RECORD_WORDS 512
#define RECORD_BYTES (RECORD_WORDS * 8)
/* Commands sent ahead of their replies while loading and reading back. */
#define AHEAD 16
#define LIST_CHUNK 1000

static uint64_t data_mib = 64, writes_per_s = 500, report_ms = 1000;
static uint32_t *versions;
static uint64_t records;
/* Steps begun. Also read by the thread that tells progress. */
static _Atomic uint64_t sequence;

static void write_forever(void);
static void load(void);
static void step(uint64_t record);
static void tell_progress(double elapsed);
static uint64_t verify(void);

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{"data-mib", required_argument, NULL, 'd'}, {"writes-per-s", required_argument, NULL, 'w'},
		{"report-ms", required_argument, NULL, 'r'}, {0}};
	log_open("redis");
	for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;) {
		uint64_t *wanted = option == 'd' ? &data_mib : option == 'w' ? &writes_per_s : &report_ms;
		if (option == '?' || (*wanted = strtoull(optarg, NULL, 10)) == 0)
			fail("usage: redis [--data-mib=N] [--writes-per-s=N] [--report-ms=N], all above 0");
	}

	pid_t server = fork();
	if (server == 0) {
		execl("/bin/redis-server", "redis-server", "/etc/redis.conf", (char *)NULL);
		fail("cannot execute redis-server: %s", strerror(errno));
	}
	take_requests();
	pid_t writer = fork();
	if (writer == 0)
		write_forever();
	if (server < 0 || writer < 0)
		fail("fork: %s", strerror(errno));

	for (sig_atomic_t passed_on = 0;;) {
		int status;
		pid_t ended = waitpid(-1, &status, WNOHANG);
		if (ended == server || ended == writer)
			fail("the %s ended with status %x", ended == server ? "server" : "writer", status);
		if (passed_on < verdicts_asked) {
			passed_on++;
			kill(writer, SIGUSR1);
		}
		pause_ms(20);
	}
}

static void write_forever(void)
{
	resp_connect();
	load();
	start_clock();
	log_line("{\"ready\":true,\"keys\":%lu}", records);
	start_reports(report_ms, tell_progress);

	double start = seconds(CLOCK_MONOTONIC), next = start, interval = 1.0 / (double)writes_per_s;
	uint64_t random = mix(1, 2, 3);
	for (sig_atomic_t given = 0;;) {
		step(next_random(&random) % records);
		double now = seconds(CLOCK_MONOTONIC);
		if (given < verdicts_asked) {
			given++;
			uint64_t errors = verify();
			log_line("{\"verified\":%s,\"keys\":%lu,\"errors\":%lu,\"longest_gap_ms\":%.1f,"
				 "\"longest_gap_realtime_ms\":%.1f,\"seq\":%lu,\"throughput_mb_s\":%.2f}",
				 errors == 0 ? "true" : "false", records, errors, longest_gap_ms(), longest_realtime_gap_ms(),
				 sequence, (double)sequence * RECORD_BYTES / 1e6 / (now - start));
		}
		/* Time in which the container did not run is not caught up on. */
		next = next + interval > now - 0.1 ? next + interval : now;
		if (next > now)
			nanosleep(&(struct timespec){.tv_nsec = (long)((next - now) * 1e9)}, NULL);
	}
}

static void tell_progress(double elapsed)
{
	static uint64_t then;
	uint64_t now = sequence;
	log_line("{\"t\":%.3f,\"seq\":%lu,\"writes_per_s\":%.1f,\"longest_gap_ms\":%.1f}", seconds(CLOCK_REALTIME), now,
		 (double)(now - then) / elapsed, longest_gap_ms());
	then = now;
}

static void make_record(uint64_t *words, uint64_t record, uint64_t version)
{
	uint64_t random = mix(record, version, 0) | 1;
	words[0] = record;
	words[1] = version;
	for (int i = 2; i < RECORD_WORDS; i++)
		words[i] = next_random(&random);
}

static void send_record(uint64_t record)
{
	uint64_t words[RECORD_WORDS];
	char key[32];
	snprintf(key, sizeof key, "record:%lu", record);
	make_record(words, record, ++versions[record]);
	resp_command((const char *[]){"SET", key}, 2, words, sizeof words);
}

static void load(void)
{
	records = (data_mib << 20) / RECORD_BYTES;
	versions = calloc(records, sizeof *versions);
	if (versions == NULL)
		fail("no memory");
	for (uint64_t record = 0; record < records; record += AHEAD) {
		uint64_t count = records - record < AHEAD ? records - record : AHEAD;
		for (uint64_t i = 0; i < count; i++)
			send_record(record + i);
		resp_flush();
		for (uint64_t i = 0; i < count; i++)
			resp_expect_ok();
	}
}

static void step(uint64_t record)
{
	char number[32];
	snprintf(number, sizeof number, "%lu", ++sequence);
	resp_command((const char *[]){"INCR", "counter"}, 2, NULL, 0);
	resp_command((const char *[]){"RPUSH", "sequence", number}, 3, NULL, 0);
	send_record(record);
	resp_flush();
	resp_expect_number((long long)sequence, "the counter");
	resp_expect_number((long long)sequence, "the length of the sequence");
	resp_expect_ok();
}

static uint64_t wrong_records(void)
{
	uint64_t errors = 0, expected[RECORD_WORDS];
	char key[32];
	for (uint64_t record = 0; record < records; record += AHEAD) {
		uint64_t count = records - record < AHEAD ? records - record : AHEAD;
		for (uint64_t i = 0; i < count; i++) {
			snprintf(key, sizeof key, "record:%lu", record + i);
			resp_command((const char *[]){"GET", key}, 2, NULL, 0);
		}
		resp_flush();
		for (uint64_t i = 0; i < count; i++) {
			struct reply reply = resp_reply();
			make_record(expected, record + i, versions[record + i]);
			if (reply.kind == '$' && reply.number == RECORD_BYTES && memcmp(reply.bytes, expected, RECORD_BYTES) == 0)
				continue;
			if (errors++ < 10)
				log_line("{\"wrong_record\":%lu,\"length\":%lld,\"expected_version\":%u}", record + i, reply.number,
					 versions[record + i]);
		}
	}
	return errors;
}

static uint64_t wrong_places(void)
{
	uint64_t errors = 0;
	char from[32], to[32];
	for (uint64_t place = 0; place < sequence; place += LIST_CHUNK) {
		snprintf(from, sizeof from, "%lu", place);
		snprintf(to, sizeof to, "%lu", place + LIST_CHUNK - 1);
		resp_command((const char *[]){"LRANGE", "sequence", from, to}, 4, NULL, 0);
		resp_flush();
		struct reply array = resp_reply();
		uint64_t expected = sequence - place < LIST_CHUNK ? sequence - place : LIST_CHUNK;
		if (array.kind != '*' || (uint64_t)array.number != expected)
			errors++;
		for (long long i = 0; i < array.number; i++) {
			struct reply reply = resp_reply();
			if (strtoull(reply.bytes, NULL, 10) != place + (uint64_t)i + 1 && errors++ < 10)
				log_line("{\"sequence_place\":%lu,\"holds\":\"%.20s\"}", place + (uint64_t)i + 1, reply.bytes);
		}
	}
	return errors;
}

/* How many things are wrong: records, places in the sequence, further keys, further connections. */
static uint64_t verify(void)
{
	uint64_t errors = wrong_records() + wrong_places();
	resp_command((const char *[]){"DBSIZE"}, 1, NULL, 0);
	resp_command((const char *[]){"INFO", "stats"}, 2, NULL, 0);
	resp_flush();
	struct reply size = resp_reply();
	if (size.kind != ':' || (uint64_t)size.number != records + 2) {
		errors++;
		log_line("{\"keys\":%lld,\"expected\":%lu}", size.number, records + 2);
	}
	struct reply stats = resp_reply();
	const char *connections = memmem(stats.bytes, (size_t)stats.number, "total_connections_received:", 27);
	if (connections == NULL || atoi(connections + 27) != 1) {
		errors++;
		log_line("{\"connections\":%d,\"expected\":1}", connections == NULL ? -1 : atoi(connections + 27));
	}
	return errors;
}
