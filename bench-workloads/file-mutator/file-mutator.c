/* Files that change all the time, and a memory of what they should be.
 *
 * A small tree below /work: files are made, written in places, grown, cut, renamed, linked, deleted, given modes, attributes and
 * times; directories are renamed with all that is in them. A verdict walks the tree and compares it with memory: nothing
 * missing, nothing more, every byte, size, mode, link count, attribute and time.
 *
 *   --ops-per-s=N    changes a second (200)
 */

#include "workload.h"
#include <dirent.h>
#include <getopt.h>
#include <sys/stat.h>
#include <sys/xattr.h>

#define DIRECTORIES 8
#define NAMES 256
#define FILES 256
#define BLOCK_BYTES 4096
#define MOST_BLOCKS 16
#define ATTRIBUTE "user.migrate"

/* A file's content: block by block a version, 0 for one never written (a hole). Block content follows from file and version. */
static struct file {
	uint32_t links, mode, attribute;
	uint32_t bytes, versions[MOST_BLOCKS];
	/* Known only while nothing was written since it was set. */
	struct timespec time;
	bool time_known;
} files[FILES];

/* A name: of a file, or of a symbolic link that points to its own number. */
static struct name {
	bool used, symbolic;
	uint32_t directory, file;
} names[NAMES];

static uint32_t renames[DIRECTORIES], last_version;
static uint64_t changes, random_state;

static void change(void);
static uint64_t verify(uint64_t *seen);

int main(int argc, char **argv)
{
	static const struct option options[] = {{"ops-per-s", required_argument, NULL, 'o'}, {0}};
	long per_second = 200;
	log_open("file-mutator");
	for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;)
		if (option != 'o' || (per_second = atol(optarg)) <= 0 || per_second > 1000)
			fail("usage: file-mutator [--ops-per-s=N], N from 1 to 1000");
	random_state = mix(4, 5, 6);
	if (mkdir("/work", 0755) != 0)
		fail("mkdir /work: %s", strerror(errno));
	for (uint32_t i = 0; i < DIRECTORIES; i++) {
		char path[64];
		snprintf(path, sizeof path, "/work/%u.0", i);
		if (mkdir(path, 0755) != 0)
			fail("mkdir %s: %s", path, strerror(errno));
	}
	for (int i = 0; i < 1000; i++)
		change();
	take_requests();
	start_clock();
	log_line("{\"ready\":true}");

	double second = seconds(CLOCK_MONOTONIC);
	for (sig_atomic_t given = 0;;) {
		change();
		if (given < verdicts_asked) {
			given++;
			uint64_t seen = 0, errors = verify(&seen);
			log_line("{\"verified\":%s,\"names\":%lu,\"errors\":%lu,\"longest_gap_ms\":%.1f,"
				 "\"longest_gap_realtime_ms\":%.1f,\"seq\":%lu}",
				 errors == 0 ? "true" : "false", seen, errors, longest_gap_ms(), longest_realtime_gap_ms(), changes);
		}
		double now = seconds(CLOCK_MONOTONIC);
		if (now - second >= 1.0) {
			log_line("{\"t\":%.3f,\"seq\":%lu,\"longest_gap_ms\":%.1f}", seconds(CLOCK_REALTIME), changes, longest_gap_ms());
			second = now;
		}
		pause_ms(1000 / per_second);
	}
}

static uint64_t below(uint64_t limit) { return next_random(&random_state) % limit; }

static void must(bool ok, const char *doing, const char *path)
{
	if (!ok)
		fail("%s %s: %s", doing, path, strerror(errno));
}

static const char *path_of(uint32_t name, char path[64])
{
	snprintf(path, 64, "/work/%u.%u/%u", names[name].directory, renames[names[name].directory], name);
	return path;
}

static void block_content(uint64_t *words, uint32_t file, uint32_t block, uint32_t version)
{
	uint64_t random = mix((uint64_t)file << 32 | block, version, 0) | 1;
	for (int i = 0; i < BLOCK_BYTES / 8; i++)
		words[i] = version == 0 ? 0 : next_random(&random);
}

/* Bytes of a block that lie within the file. */
static uint32_t bytes_of_block(const struct file *file, uint32_t block)
{
	uint32_t start = block * BLOCK_BYTES;
	return file->bytes <= start ? 0 : file->bytes - start < BLOCK_BYTES ? file->bytes - start : BLOCK_BYTES;
}

static void write_block(int fd, uint32_t file, uint32_t block)
{
	uint64_t words[BLOCK_BYTES / 8];
	uint32_t bytes = bytes_of_block(&files[file], block);
	if (bytes == 0)
		return;
	block_content(words, file, block, files[file].versions[block] = ++last_version);
	must(pwrite(fd, words, bytes, (off_t)block * BLOCK_BYTES) == (ssize_t)bytes, "writing", "a block");
	files[file].time_known = false;
}

/* What is cut off is gone, what is grown over is a hole, and a block cut in two is written anew so that no tail of zeros is in
 * the middle of a version. */
static void resize(int fd, uint32_t file, uint32_t bytes)
{
	uint32_t before = files[file].bytes, cut = before < bytes ? before : bytes;
	must(ftruncate(fd, bytes) == 0, "truncating", "a file");
	files[file].bytes = bytes;
	files[file].time_known = false;
	for (uint32_t block = (cut + BLOCK_BYTES - 1) / BLOCK_BYTES; block < MOST_BLOCKS; block++)
		files[file].versions[block] = 0;
	if (cut % BLOCK_BYTES != 0)
		write_block(fd, file, cut / BLOCK_BYTES);
}

static uint32_t some_name(bool used)
{
	for (uint32_t tries = 0; tries < NAMES * 4; tries++) {
		uint32_t name = (uint32_t)below(NAMES);
		if (names[name].used == used)
			return name;
	}
	return NAMES;
}

static void make_file(uint32_t name)
{
	char path[64];
	uint32_t file = 0;
	while (files[file].links != 0)
		file++;
	names[name] = (struct name){.used = true, .directory = (uint32_t)below(DIRECTORIES), .file = file};
	int fd = open(path_of(name, path), O_RDWR | O_CREAT | O_EXCL, 0644);
	must(fd >= 0, "creating", path);
	files[file] = (struct file){.links = 1, .mode = 0644};
	resize(fd, file, (uint32_t)below(MOST_BLOCKS * BLOCK_BYTES + 1));
	/* Some blocks stay holes. */
	for (uint32_t block = 0; block < MOST_BLOCKS; block++)
		if (below(4) != 0)
			write_block(fd, file, block);
	close(fd);
}

static void make_symbolic(uint32_t name)
{
	char path[64], target[16];
	names[name] = (struct name){.used = true, .symbolic = true, .directory = (uint32_t)below(DIRECTORIES)};
	snprintf(target, sizeof target, "to-%u", name);
	must(symlink(target, path_of(name, path)) == 0, "linking", path);
}

static void make_hard(uint32_t name, uint32_t from)
{
	char path[64], old[64];
	names[name] = (struct name){.used = true, .directory = (uint32_t)below(DIRECTORIES), .file = names[from].file};
	must(link(path_of(from, old), path_of(name, path)) == 0, "linking", path);
	files[names[from].file].links++;
}

static void delete(uint32_t name)
{
	char path[64];
	must(unlink(path_of(name, path)) == 0, "deleting", path);
	names[name].used = false;
	if (!names[name].symbolic)
		files[names[name].file].links--;
}

static void move(uint32_t name)
{
	char from[64], to[64];
	path_of(name, from);
	names[name].directory = (uint32_t)below(DIRECTORIES);
	must(rename(from, path_of(name, to)) == 0, "renaming", from);
}

static void move_directory(uint32_t directory)
{
	char from[64], to[64];
	snprintf(from, sizeof from, "/work/%u.%u", directory, renames[directory]);
	snprintf(to, sizeof to, "/work/%u.%u", directory, ++renames[directory]);
	must(rename(from, to) == 0, "renaming", from);
}

static void change_content(uint32_t name, uint64_t choice)
{
	char path[64];
	uint32_t file = names[name].file;
	int fd = open(path_of(name, path), O_RDWR);
	must(fd >= 0, "opening", path);
	if (choice < 3)
		write_block(fd, file, (uint32_t)below(MOST_BLOCKS));
	else
		resize(fd, file, (uint32_t)below(MOST_BLOCKS * BLOCK_BYTES + 1));
	close(fd);
}

static void change_properties(uint32_t name, uint64_t choice)
{
	char path[64];
	struct file *file = &files[names[name].file];
	path_of(name, path);
	if (choice == 0) {
		file->mode = 0600 | (uint32_t)below(0200);
		must(chmod(path, file->mode) == 0, "changing the mode of", path);
	} else if (choice == 1) {
		file->attribute = (uint32_t)changes + 1;
		must(setxattr(path, ATTRIBUTE, &file->attribute, sizeof file->attribute, 0) == 0, "setting an attribute of", path);
	} else {
		file->time = (struct timespec){.tv_sec = (time_t)below(2000000000), .tv_nsec = (long)below(1000000000)};
		file->time_known = true;
		const struct timespec both[2] = {file->time, file->time};
		must(utimensat(AT_FDCWD, path, both, 0) == 0, "setting the time of", path);
	}
}

static void change(void)
{
	uint64_t choice = below(20);
	uint32_t used = some_name(true), unused = some_name(false);
	changes++;
	if (choice == 0) {
		move_directory((uint32_t)below(DIRECTORIES));
	} else if (used == NAMES || (choice <= 4 && unused != NAMES)) {
		make_file(unused);
	} else if (choice == 5 && unused != NAMES) {
		make_symbolic(unused);
	} else if (choice == 6 && unused != NAMES && !names[used].symbolic) {
		make_hard(unused, used);
	} else if (choice <= 10) {
		delete(used);
	} else if (choice <= 12) {
		move(used);
	} else if (!names[used].symbolic) {
		if (choice <= 16)
			change_content(used, choice - 13);
		else
			change_properties(used, choice - 17);
	}
}

/* What is wrong with one name, NULL for nothing. */
static const char *wrong_with(uint32_t name)
{
	char path[64], target[32], expected[32];
	struct stat about;
	if (lstat(path_of(name, path), &about) != 0)
		return "it is missing";
	if (names[name].symbolic) {
		snprintf(expected, sizeof expected, "to-%u", name);
		ssize_t length = readlink(path, target, sizeof target);
		return length == (ssize_t)strlen(expected) && memcmp(target, expected, (size_t)length) == 0 ? NULL : "it points elsewhere";
	}
	const struct file *file = &files[names[name].file];
	if (!S_ISREG(about.st_mode) || (about.st_mode & 07777) != file->mode)
		return "it has another mode";
	if (about.st_nlink != file->links)
		return "it has another number of links";
	if (about.st_size != file->bytes)
		return "it has another size";
	if (file->time_known && (about.st_mtim.tv_sec != file->time.tv_sec || about.st_mtim.tv_nsec != file->time.tv_nsec))
		return "it has another time";
	uint32_t attribute = 0;
	if (getxattr(path, ATTRIBUTE, &attribute, sizeof attribute) < 0 && errno != ENODATA)
		return "its attribute cannot be read";
	if (attribute != file->attribute)
		return "it has another attribute";

	int fd = open(path, O_RDONLY);
	if (fd < 0)
		return "it cannot be opened";
	const char *wrong = NULL;
	for (uint32_t block = 0; wrong == NULL && block < MOST_BLOCKS; block++) {
		uint64_t got[BLOCK_BYTES / 8], words[BLOCK_BYTES / 8];
		uint32_t bytes = bytes_of_block(file, block);
		block_content(words, names[name].file, block, file->versions[block]);
		if (pread(fd, got, sizeof got, (off_t)block * BLOCK_BYTES) != (ssize_t)bytes || memcmp(got, words, bytes) != 0)
			wrong = "its content is wrong";
	}
	close(fd);
	return wrong;
}

static uint64_t entries_in(const char *path)
{
	uint64_t count = 0;
	DIR *directory = opendir(path);
	if (directory == NULL)
		return 0;
	for (struct dirent *entry; (entry = readdir(directory)) != NULL;)
		count += strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0;
	closedir(directory);
	return count;
}

/* How many names are wrong, missing or too many. `seen` counts those looked at. */
static uint64_t verify(uint64_t *seen)
{
	char path[64];
	uint64_t errors = 0, in_directory[DIRECTORIES] = {0};
	for (uint32_t name = 0; name < NAMES; name++) {
		if (!names[name].used)
			continue;
		++*seen;
		in_directory[names[name].directory]++;
		const char *wrong = wrong_with(name);
		if (wrong != NULL && errors++ < 10)
			log_line("{\"wrong\":\"%s\",\"complaint\":\"%s\"}", path_of(name, path), wrong);
	}
	for (uint32_t i = 0; i < DIRECTORIES; i++) {
		snprintf(path, sizeof path, "/work/%u.%u", i, renames[i]);
		uint64_t there = entries_in(path);
		if (there != in_directory[i]) {
			errors++;
			log_line("{\"wrong\":\"%s\",\"entries\":%lu,\"expected\":%lu}", path, there, in_directory[i]);
		}
	}
	if (entries_in("/work") != DIRECTORIES) {
		errors++;
		log_line("{\"wrong\":\"/work\",\"entries\":%lu,\"expected\":%d}", entries_in("/work"), DIRECTORIES);
	}
	return errors;
}
