# Keeper of one test host: makes it, waits until its stdin closes, then removes it.
#
# It closes when the test ends its Host, and also when the test panics, is killed or is interrupted: the keeper lives in a
# session of its own, so nothing a test can do to itself leaves a host behind.
#
#   bash -c "$this" keeper CGROUP DIR STATE_MIB STATE_FS
#
#   CGROUP     name of the host's cgroup, directly below the root of every hierarchy
#   DIR        the host's directory, made here; its disk
#   STATE_MIB  size of the host's state directory in MiB, 0 for as large as the disk below DIR
#   STATE_FS   what holds it if it has a size: tmpfs, or ext4 on a loop device
#
# Prints "ready PID" when the host can be entered through the namespaces of PID.

set -eu
shopt -s nullglob
cgroup=$1 dir=$2 state_mib=$3 state_fs=$4

# Where the cgroup hierarchies are mounted: "v1 DIR OPTIONS" or "v2 DIR", one a line.
hierarchies() {
	local _ where type options
	while read -r _ where type options _; do
		case $type in
		cgroup) echo "v1 $where $options" ;;
		cgroup2) echo "v2 $where" ;;
		esac
	done </proc/self/mounts
}

make_cgroups() {
	local version root options
	while read -r version root options; do
		[ "$version" = v1 ] || delegate "$root"
		make_cgroup "$root" "$cgroup"
	done < <(hierarchies)
}

make_cgroup() {
	mkdir "$1/$2"
	# A new v1 cpuset is empty and takes no process until it is filled.
	if [ -e "$1/$2/cpuset.cpus" ] && [ ! -e "$1/$2/cgroup.controllers" ]; then
		cat "$1/cpuset.cpus" >"$1/$2/cpuset.cpus"
		cat "$1/cpuset.mems" >"$1/$2/cpuset.mems"
	fi
}

# Passes every controller of a v2 cgroup on to its children; one that cannot be passed on is not there for containers either.
delegate() {
	local controller
	for controller in $(cat "$1/cgroup.controllers"); do
		echo "+$controller" >"$1/cgroup.subtree_control" 2>/dev/null || true
	done
}

# Inside the new namespaces: what makes them a host of its own.
furnish() {
	local version root options mounts
	# The hierarchies go away as they are and come back rooted at this host's cgroup. Mounting over them would leave
	# the old ones in mountinfo, where runc and CRIU would find them.
	mounts=$(hierarchies)
	umount -R /sys/fs/cgroup
	case $mounts in
	"v2 /sys/fs/cgroup") mount -t cgroup2 cgroup2 /sys/fs/cgroup ;;
	*)
		mount -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup
		while read -r version root options; do
			mkdir -p "$root"
			case $version in
			v1) mount -t cgroup -o "$(v1_controllers "$options")" cgroup "$root" ;;
			v2) mount -t cgroup2 cgroup2 "$root" ;;
			esac
		done <<<"$mounts"
		;;
	esac
	# The host's own processes go to "rig", containers beside it: a v2 cgroup that passes controllers on may hold no
	# process, and what the host itself costs can be told from what its containers cost.
	while read -r version root options; do
		make_cgroup "$root" rig
		echo $$ >"$root/rig/cgroup.procs"
		[ "$version" = v1 ] || delegate "$root"
	done < <(hierarchies)

	mkdir -p "$dir"/{srv,state,etc/upper,etc/work}
	mount -t overlay -o "lowerdir=/etc,upperdir=$dir/etc/upper,workdir=$dir/etc/work" etc /etc
	mount -t tmpfs -o mode=755 tmpfs /run
	mount --bind "$dir/srv" /srv
	# /var/lib may be as bare as the package left it: what is made here is made once and empty.
	mkdir -p /var/lib/migrate
	if [ "$state_mib" = 0 ]; then
		mount --bind "$dir/state" /var/lib/migrate
	elif [ "$state_fs" = ext4 ]; then
		truncate -s "${state_mib}M" "$dir/state.img"
		mkfs.ext4 -q "$dir/state.img"
		mount -o loop "$dir/state.img" /var/lib/migrate
		rmdir /var/lib/migrate/lost+found
	else
		mount -t tmpfs -o "mode=700,size=${state_mib}m" tmpfs /var/lib/migrate
	fi
	ip link set lo up
	write_enter
}

# Of "rw,relatime,cpu,cpuacct" what chooses the hierarchy.
v1_controllers() {
	local option chosen=()
	for option in ${1//,/ }; do
		case $option in
		rw | ro | relatime | noatime | nosuid | nodev | noexec | xattr | clone_children | release_agent=*) ;;
		name=*) chosen+=(none "$option") ;;
		*) chosen+=("$option") ;;
		esac
	done
	local IFS=,
	echo "${chosen[*]}"
}

# The last step of entering: joins the host's cgroups, then becomes the command.
write_enter() {
	local version root options
	{
		echo "#!/bin/sh"
		while read -r version root options; do
			echo "echo 0 >'$root/rig/cgroup.procs' || exit 125"
		done < <(hierarchies)
		echo 'exec "$@"'
	} >/run/.enter
	chmod +x /run/.enter
}

# The process whose namespaces are the host.
hold() {
	furnish
	echo "ready $$"
	exec sleep infinity
}

join_cgroups() {
	local version root options
	while read -r version root options; do
		echo "$BASHPID" >"$root/$cgroup/cgroup.procs"
	done < <(hierarchies)
}

# Kills all that lives in the host's cgroups, frozen or not, and removes them. Again and again: a process may fork while it is
# listed, and one that is listed no more keeps its cgroup busy until it has been waited for.
remove() {
	local version root options pid file left
	local give_up=$((SECONDS + 60))
	while [ $SECONDS -lt $give_up ]; do
		left=
		while read -r version root options; do
			[ -d "$root/$cgroup" ] || continue
			while read -r file; do
				for pid in $(cat "$file" 2>/dev/null); do
					kill -KILL "$pid" 2>/dev/null || true
				done
			done < <(find "$root/$cgroup" -name cgroup.procs 2>/dev/null)
			# A frozen process dies when it is thawed, children first or not.
			while read -r file; do echo THAWED >"$file" || true; done < <(find "$root/$cgroup" -name freezer.state) 2>/dev/null
			while read -r file; do echo 0 >"$file" || true; done < <(find "$root/$cgroup" -name cgroup.freeze) 2>/dev/null
			find "$root/$cgroup" -depth -type d -exec rmdir {} + 2>/dev/null || true
			[ ! -d "$root/$cgroup" ] || left=yes
		done < <(hierarchies)
		[ -n "$left" ] || break
		sleep 0.01
	done
	# The mounts went with the last process of the namespace; --one-file-system in case one has not.
	rm -rf --one-file-system "$dir"
	rmdir --ignore-fail-on-non-empty "$(dirname "$dir")" 2>/dev/null || true
}

if [ "${5:-}" = hold ]; then
	hold
fi

trap '' INT TERM HUP
trap remove EXIT
mkdir -p "$dir"
make_cgroups
(
	join_cgroups
	trap - INT TERM HUP EXIT
	exec unshare --net --mount --cgroup -- bash -c "$BASH_EXECUTION_STRING" keeper "$cgroup" "$dir" "$state_mib" "$state_fs" hold </dev/null
) &
# Else bash reports its death, which is how it ends.
disown
# Nothing is ever written: this returns when the other end is closed.
read -r _ || true
