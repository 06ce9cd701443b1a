/* Processes and how they belong together. 20 of the 40, and the churn. */

#include "zoo.h"

static pid_t expected_parent, expected_session, expected_group, children[2];
static int depth;

static void check_relations(char *complaint)
{
	if (getppid() != expected_parent)
		complain("parent is %d, not %d", getppid(), expected_parent);
	if (getsid(0) != expected_session)
		complain("session is %d, not %d", getsid(0), expected_session);
	if (getpgrp() != expected_group)
		complain("group is %d, not %d", getpgrp(), expected_group);
	for (int i = 0; i < 2; i++)
		if (children[i] != 0 && waitpid(children[i], NULL, WNOHANG) != 0)
			complain("child %d is gone", children[i]);
}

static void note_relations(void)
{
	expected_parent = getppid();
	expected_session = getsid(0);
	expected_group = getpgrp();
}

/* A tree three deep: 7 processes. */
static void tree(void)
{
	children[0] = children[1] = 0;
	note_relations();
	if (depth-- > 0)
		for (int i = 0; i < 2; i++)
			children[i] = start(tree);
	live("tree", NULL, check_relations);
}

static void group_leader(void)
{
	children[0] = children[1] = 0;
	setpgid(0, 0);
	note_relations();
	live("group", NULL, check_relations);
}

/* A session of its own with two groups below its leader's: 3 processes. */
static void session(void)
{
	children[0] = children[1] = 0;
	if (setsid() < 0)
		fail("setsid: %s", strerror(errno));
	note_relations();
	for (int i = 0; i < 2; i++)
		children[i] = start(group_leader);
	live("session", NULL, check_relations);
}

/* A process whose parent ended: the first process is its parent now, its session's leader is gone. */
static void orphan(void)
{
	while (getppid() != 1)
		pause_ms(1);
	note_relations();
	live("orphan", NULL, check_relations);
}

static void orphan_maker(void)
{
	setsid();
	start(orphan);
	_exit(0);
}

static pid_t zombie;

static void check_zombie(char *complaint)
{
	siginfo_t about = {0};
	if (waitid(P_PID, (id_t)zombie, &about, WEXITED | WNOHANG | WNOWAIT) != 0)
		complain("the zombie is gone: %s", strerror(errno));
	else if (about.si_pid != zombie || about.si_code != CLD_EXITED || about.si_status != 42)
		complain("the zombie is %d, code %d, status %d", about.si_pid, about.si_code, about.si_status);
}

static void die_at_once(void) { _exit(42); }

/* Has a child that has ended and has not been waited for: 2 processes. */
static void zombie_holder(void)
{
	zombie = start(die_at_once);
	siginfo_t about;
	waitid(P_PID, (id_t)zombie, &about, WEXITED | WNOWAIT);
	live("zombie holder", NULL, check_zombie);
}

static uint64_t born;
static char birth_complaint[COMPLAINT_BYTES];

/* Forks a child that executes this very program, or only ends, and knows how each must end. */
static void give_birth(void)
{
	int wanted = (int)(born % 100), status;
	pid_t pid = fork();
	if (pid < 0)
		fail("fork: %s", strerror(errno));
	if (pid == 0) {
		char number[16];
		snprintf(number, sizeof number, "%d", wanted);
		if (born % 2 == 0)
			_exit(wanted);
		execl("/proc/self/exe", "zoo", "--leaf", number, (char *)NULL);
		_exit(127);
	}
	if (waitpid(pid, &status, 0) != pid || !WIFEXITED(status) || WEXITSTATUS(status) != wanted)
		snprintf(birth_complaint, sizeof birth_complaint, "child %lu ended with %x, not %d", born, status, wanted);
	born++;
}

static void check_births(char *complaint)
{
	if (birth_complaint[0] != 0)
		complain("%s", birth_complaint);
}

static void breeder(void) { live("breeder", give_birth, check_births); }

void start_family(void)
{
	depth = 2;
	start(tree);
	for (int i = 0; i < 3; i++)
		start(session);
	start(orphan_maker);
	start(zombie_holder);
	if (churn)
		start(breeder);
}
