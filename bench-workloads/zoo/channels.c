/* Ways for bytes to travel, all with bytes on the way whenever the container is stopped. 12 of the 40. */

#include "zoo.h"
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/un.h>

/* One end of a channel. The writer keeps it full, the reader takes less than it could: something is always queued. */
static struct {
	int fd;
	uint64_t which, place;
	char complaint[COMPLAINT_BYTES];
} end;

static void check_end(char *complaint)
{
	if (end.complaint[0] != 0)
		complain("%s", end.complaint);
	if (fcntl(end.fd, F_GETFD) < 0)
		complain("the channel is closed");
}

static void write_stream(void)
{
	unsigned char bytes[4096];
	for (size_t i = 0; i < sizeof bytes; i++)
		bytes[i] = stream_byte(end.which, end.place + i);
	ssize_t written = send(end.fd, bytes, sizeof bytes, MSG_DONTWAIT | MSG_NOSIGNAL);
	if (written < 0 && errno == ENOTSOCK)
		written = write(end.fd, bytes, sizeof bytes);
	if (written > 0)
		end.place += (uint64_t)written;
	else if (errno != EAGAIN && errno != EINTR)
		snprintf(end.complaint, sizeof end.complaint, "writing: %s", strerror(errno));
}

static void read_stream(void)
{
	unsigned char bytes[3000];
	/* Nothing to read is a fault of the writer's, found out by its own steps; here it only means waiting. */
	ssize_t got = read(end.fd, bytes, sizeof bytes);
	if (got == 0)
		snprintf(end.complaint, sizeof end.complaint, "the other end is closed");
	for (ssize_t i = 0; i < got; i++, end.place++)
		if (bytes[i] != stream_byte(end.which, end.place) && end.complaint[0] == 0)
			snprintf(end.complaint, sizeof end.complaint, "byte %lu is wrong", end.place);
}

/* Messages: each has its number and a length that follows from it, so that lost, doubled and torn ones are found. */
struct message {
	uint64_t number;
	unsigned char bytes[500];
};

static size_t message_bytes(uint64_t number) { return sizeof number + mix(end.which, number, 1) % 500; }

static void write_message(void)
{
	struct message message = {.number = end.place};
	for (size_t i = 0; i < sizeof message.bytes; i++)
		message.bytes[i] = stream_byte(end.which, end.place * 512 + i);
	if (send(end.fd, &message, message_bytes(end.place), MSG_DONTWAIT | MSG_NOSIGNAL) >= 0)
		end.place++;
	else if (errno != EAGAIN && errno != EINTR && errno != ENOBUFS)
		snprintf(end.complaint, sizeof end.complaint, "sending: %s", strerror(errno));
}

static void read_message(void)
{
	struct message message;
	/* Every third step only, so that the queue stays full. */
	static int step;
	if (step++ % 3 != 0)
		return;
	ssize_t got = recv(end.fd, &message, sizeof message, MSG_DONTWAIT);
	if (got < 0)
		return;
	bool right = (size_t)got == message_bytes(end.place) && message.number == end.place;
	for (ssize_t i = 0; right && i < got - (ssize_t)sizeof message.number; i++)
		right = message.bytes[i] == stream_byte(end.which, end.place * 512 + (uint64_t)i);
	if (!right && end.complaint[0] == 0)
		snprintf(end.complaint, sizeof end.complaint, "message %lu came as %lu with %zd bytes", end.place,
			 message.number, got);
	end.place++;
}

static void stream_writer(void) { live("stream writer", write_stream, check_end); }
static void stream_reader(void) { live("stream reader", read_stream, check_end); }
static void message_writer(void) { live("message writer", write_message, check_end); }
static void message_reader(void) { live("message reader", read_message, check_end); }

/* Starts a process at each end, and lets go of both. */
static void start_ends(int write_fd, int read_fd, void (*writer)(void), void (*reader)(void))
{
	end.which++;
	fcntl(write_fd, F_SETFL, fcntl(write_fd, F_GETFL) | O_NONBLOCK);
	fcntl(read_fd, F_SETFL, fcntl(read_fd, F_GETFL) | O_NONBLOCK);
	end.fd = write_fd;
	start(writer);
	end.fd = read_fd;
	start(reader);
	close(write_fd);
	close(read_fd);
}

static void must(bool ok, const char *what)
{
	if (!ok)
		fail("%s: %s", what, strerror(errno));
}

static void start_pipes(void)
{
	int ends[2];
	must(pipe(ends) == 0, "pipe");
	start_ends(ends[1], ends[0], stream_writer, stream_reader);
	must(pipe(ends) == 0, "pipe");
	fcntl(ends[1], F_SETPIPE_SZ, 256 * 1024);
	start_ends(ends[1], ends[0], stream_writer, stream_reader);
}

/* A connection through a listening socket with a name, which stays open in both. */
static void start_named_stream(void)
{
	struct sockaddr_un name = {.sun_family = AF_UNIX, .sun_path = "/run/zoo-stream"};
	int listener = socket(AF_UNIX, SOCK_STREAM, 0), client = socket(AF_UNIX, SOCK_STREAM, 0);
	must(bind(listener, (struct sockaddr *)&name, sizeof name) == 0, "bind");
	must(listen(listener, 4) == 0, "listen");
	must(connect(client, (struct sockaddr *)&name, sizeof name) == 0, "connect");
	int server = accept(listener, NULL, NULL);
	must(server >= 0, "accept");
	start_ends(client, server, stream_writer, stream_reader);
	close(listener);
}

static void start_named_datagrams(void)
{
	struct sockaddr_un name = {.sun_family = AF_UNIX, .sun_path = "/run/zoo-datagram"};
	int receiver = socket(AF_UNIX, SOCK_DGRAM, 0), sender = socket(AF_UNIX, SOCK_DGRAM, 0);
	must(bind(receiver, (struct sockaddr *)&name, sizeof name) == 0, "bind");
	must(connect(sender, (struct sockaddr *)&name, sizeof name) == 0, "connect");
	start_ends(sender, receiver, message_writer, message_reader);
}

static void start_pair(void)
{
	int ends[2];
	must(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, ends) == 0, "socketpair");
	start_ends(ends[0], ends[1], message_writer, message_reader);
}

/* One process that waits for many things at once. */
static int epoll, event, watch, watched;
static uint64_t touched;

#define EVENTS_PENDING 7
#define EVENT_MARK 0xfeedfacecafebeefULL

static void check_watcher(char *complaint)
{
	struct epoll_event ready[4];
	int count = epoll_wait(epoll, ready, 4, 0);
	if (count != 1 || ready[0].data.u64 != EVENT_MARK)
		complain("epoll tells of %d events, the first marked %lx", count, count > 0 ? ready[0].data.u64 : 0);
	uint64_t pending = 0;
	if (read(event, &pending, sizeof pending) != sizeof pending || pending != EVENTS_PENDING)
		complain("the eventfd holds %lu", pending);
	if (write(event, &(uint64_t){EVENTS_PENDING}, sizeof(uint64_t)) != sizeof(uint64_t))
		complain("the eventfd takes nothing");

	char path[64], happened[1024];
	snprintf(path, sizeof path, "/dev/shm/zoo/%lu", touched++);
	int made = open(path, O_CREAT | O_EXCL | O_WRONLY, 0600);
	if (made < 0)
		complain("creating %s: %s", path, strerror(errno));
	close(made);
	unlink(path);
	ssize_t got = read(watch, happened, sizeof happened);
	const struct inotify_event *first = (const struct inotify_event *)happened;
	if (got < (ssize_t)sizeof *first)
		complain("inotify saw nothing: %s", strerror(errno));
	else if (first->wd != watched || strcmp(first->name, strrchr(path, '/') + 1) != 0)
		complain("inotify saw %.40s by watch %d", first->name, first->wd);
}

static void watcher(void)
{
	must(mkdir("/dev/shm/zoo", 0700) == 0, "mkdir");
	epoll = epoll_create1(0);
	event = eventfd(EVENTS_PENDING, EFD_NONBLOCK);
	watch = inotify_init1(IN_NONBLOCK);
	watched = inotify_add_watch(watch, "/dev/shm/zoo", IN_CREATE);
	must(epoll >= 0 && event >= 0 && watched >= 0, "epoll, eventfd or inotify");
	must(epoll_ctl(epoll, EPOLL_CTL_ADD, event, &(struct epoll_event){.events = EPOLLIN, .data.u64 = EVENT_MARK}) == 0 &&
	     epoll_ctl(epoll, EPOLL_CTL_ADD, watch, &(struct epoll_event){.events = EPOLLIN, .data.u64 = 2}) == 0, "epoll_ctl");
	live("watcher", NULL, check_watcher);
}

/* One process that holds both ends of a FIFO, with a message in it that it never takes for long. */
static int fifo;
static const char kept[] = "what was put in must come out";

static void check_fifo(char *complaint)
{
	char got[64] = "";
	if (read(fifo, got, sizeof got) != sizeof kept || memcmp(got, kept, sizeof kept) != 0)
		complain("the FIFO held '%.40s'", got);
	if (write(fifo, kept, sizeof kept) != sizeof kept)
		complain("the FIFO takes nothing: %s", strerror(errno));
}

static void fifo_holder(void)
{
	must(mkfifo("/run/zoo-fifo", 0600) == 0, "mkfifo");
	fifo = open("/run/zoo-fifo", O_RDWR | O_NONBLOCK);
	must(fifo >= 0 && write(fifo, kept, sizeof kept) == sizeof kept, "FIFO");
	live("fifo holder", NULL, check_fifo);
}

void start_channels(void)
{
	start_pipes();
	start_named_stream();
	start_named_datagrams();
	start_pair();
	start(watcher);
	start(fifo_holder);
}
