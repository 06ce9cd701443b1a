/* One connection to redis and as much of its protocol (RESP 2) as a checking client needs. Anything unexpected ends the
 * process: a connection that breaks is a failure of whoever moved it. */

#ifndef RESP_H
#define RESP_H

#include "workload.h"

/* Connects to 127.0.0.1:6379, waiting up to a minute for the server to listen. */
void resp_connect(void);

/* Adds a command to what resp_flush sends. The last argument may hold any bytes. */
void resp_command(const char *const *arguments, int count, const void *last, size_t last_bytes);
void resp_flush(void);

/* The next reply. Text is valid until the next call. */
struct reply {
	char kind; /* '+' text, ':' number, '$' bytes, '*' array: its `number` elements are the next replies */
	long long number;  /* of '$' the length, -1 for nothing */
	const char *bytes;
};
struct reply resp_reply(void);

/* The next reply, which must be "+OK" or the given number. */
void resp_expect_ok(void);
void resp_expect_number(long long number, const char *of_what);

#endif
