/* What the animals of the zoo have in common: a slot on the shared board, a little memory of their own, a loop. */

#ifndef ZOO_H
#define ZOO_H

#include "workload.h"
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>

#define PAGE_BYTES 4096
#define COMPLAINT_BYTES 120

/* Processes the zoo has when it is complete, the first one and the zombie included. */
#define PROCESSES 40

/* Takes a slot, then lives until the container ends: now and then a step, and on request a check. A check writes what is
 * wrong into its argument, and nothing when all is right. Either function may be NULL. Never returns. */
__attribute__((noreturn)) void live(const char *kind, void (*step)(void), void (*check)(char *complaint));

/* Forks; the child runs `body`, which must not return. Returns the child's pid. */
pid_t start(void (*body)(void));

/* Notes that something is wrong, to be told at the next check and to end the process. */
#define complain(...) snprintf(complaint, COMPLAINT_BYTES, __VA_ARGS__)

/* The byte at a place of an endless stream; `which` tells streams apart. */
static inline unsigned char stream_byte(uint64_t which, uint64_t place) { return (unsigned char)mix(which, place, 7); }

/* The kinds. Each starts its processes and returns to the first process of the zoo. */
void start_family(void);   /* family.c:   fork trees, sessions, groups, an orphan, a zombie, forks and execs */
void start_channels(void); /* channels.c: pipes, sockets, a FIFO, all with data on the way; epoll, eventfd, inotify */
void start_mappings(void); /* mappings.c: shared, private, of files, moved, dropped, forbidden; deleted files */
void start_signals(void);  /* signals.c:  threads with TLS, timers of every kind, pending signals */

/* With --churn: children keep forking and executing. */
extern bool churn;

#endif
