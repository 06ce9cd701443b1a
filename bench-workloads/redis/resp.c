#include "resp.h"
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#define BUFFER_BYTES (256 * 1024)

static int connection = -1;
static char out[BUFFER_BYTES], in[BUFFER_BYTES];
static size_t out_bytes, in_start, in_end;

void resp_connect(void)
{
	const struct sockaddr_in server = {
		.sin_family = AF_INET, .sin_port = htons(6379), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	connection = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	for (int tries = 0; connect(connection, (const struct sockaddr *)&server, sizeof server) != 0; tries++) {
		if (tries > 600)
			fail("redis does not listen: %s", strerror(errno));
		pause_ms(100);
	}
	setsockopt(connection, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
}

static void append(const void *bytes, size_t count)
{
	if (out_bytes + count > BUFFER_BYTES)
		resp_flush();
	if (count > BUFFER_BYTES)
		fail("a command of %zu bytes", count);
	memcpy(out + out_bytes, bytes, count);
	out_bytes += count;
}

static void append_argument(const void *bytes, size_t count)
{
	char head[32];
	append(head, (size_t)snprintf(head, sizeof head, "$%zu\r\n", count));
	append(bytes, count);
	append("\r\n", 2);
}

void resp_command(const char *const *arguments, int count, const void *last, size_t last_bytes)
{
	char head[32];
	append(head, (size_t)snprintf(head, sizeof head, "*%d\r\n", count + (last != NULL)));
	for (int i = 0; i < count; i++)
		append_argument(arguments[i], strlen(arguments[i]));
	if (last != NULL)
		append_argument(last, last_bytes);
}

void resp_flush(void)
{
	for (size_t sent = 0; sent < out_bytes;) {
		ssize_t count = send(connection, out + sent, out_bytes - sent, MSG_NOSIGNAL);
		if (count < 0 && errno == EINTR)
			continue;
		if (count <= 0)
			fail("the connection to redis broke while sending: %s", strerror(errno));
		sent += (size_t)count;
	}
	out_bytes = 0;
}

/* Makes at least `count` bytes available in one piece from in_start. */
static void need(size_t count)
{
	if (in_start + count > BUFFER_BYTES) {
		memmove(in, in + in_start, in_end - in_start);
		in_end -= in_start;
		in_start = 0;
	}
	if (count > BUFFER_BYTES)
		fail("a reply of %zu bytes", count);
	while (in_end - in_start < count) {
		ssize_t got = recv(connection, in + in_end, BUFFER_BYTES - in_end, 0);
		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0)
			fail("the connection to redis broke while receiving: %s", got == 0 ? "closed" : strerror(errno));
		in_end += (size_t)got;
	}
}

struct reply resp_reply(void)
{
	size_t length = 0;
	do
		need(++length);
	while (in[in_start + length - 1] != '\n');
	in[in_start + length - 2] = 0;
	struct reply reply = {.kind = in[in_start], .bytes = in + in_start + 1};
	reply.number = atoll(reply.bytes);
	in_start += length;
	if (reply.kind == '-')
		fail("redis says %s", reply.bytes);
	if (reply.kind == '$' && reply.number >= 0) {
		need((size_t)reply.number + 2);
		reply.bytes = in + in_start;
		in_start += (size_t)reply.number + 2;
	}
	return reply;
}

void resp_expect_ok(void)
{
	struct reply reply = resp_reply();
	if (reply.kind != '+' || strcmp(reply.bytes, "OK") != 0)
		fail("expected OK, redis says %c%.40s", reply.kind, reply.bytes);
}

void resp_expect_number(long long number, const char *of_what)
{
	struct reply reply = resp_reply();
	if (reply.kind != ':' || reply.number != number)
		fail("%s should be %lld, redis says %c%.40s", of_what, number, reply.kind, reply.bytes);
}
