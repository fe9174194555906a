#!/usr/bin/env bash
# launch/netns.sh [options] RANKS arguments...: as launch/mpirun.sh, but on two network hosts.
#
# The hosts are namespaces of this machine: each has a network, a name, processes and a /dev/shm of
# its own. MPI and gloo reach the other one only over the interface e0, a veth pair with delay and
# loss. A second one, m0, reaches mpirun and stays when a program cuts e0. The first half of the
# ranks is on one host, the second on the other.
#
#   --delay MS      one way, default 1
#   --loss PERCENT  of the frames of each direction, default 0.5
#   --seed N        which frames are lost, default 1
#   --link KIND     netem, forwarder (netns_link.py) or auto, the default: netem where tc has it
#
# Needs root, or user namespaces for everybody. Nothing has to be removed: all of it is gone with the
# last process, and the kernel ends all processes when this script ends, however it ends.
# Exit status: the program's; 2 for wrong arguments; 77 where two hosts cannot be made.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

delay=1 loss=0.5 seed=1 link=auto inside=
usage() { sed -n '2,17s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
cannot() { say "cannot make two hosts: $*"; exit 77; }
while [[ ${1:-} == --* ]]; do
    case $1 in
        --inside) inside=1; shift; continue ;;
        --delay) delay=${2:-} ;;
        --loss) loss=${2:-} ;;
        --seed) seed=${2:-} ;;
        --link) link=${2:-} ;;
        *) usage ;;
    esac
    shift 2 || usage
done
number='^[0-9]+(\.[0-9]+)?$'
[[ $delay =~ $number && $loss =~ $number && $seed =~ ^[0-9]+$ ]] || usage
[[ $link == auto || $link == netem || $link == forwarder ]] || usage
[[ $# -ge 2 && $1 =~ ^[1-9][0-9]*$ && $(($1 % 2)) -eq 0 ]] || usage

own=(--net --uts --ipc --mount --pid)
first=(--fork --mount-proc --kill-child)

# The script becomes a shell that starts the script again, as the first process of namespaces of its
# own, and waits for it. When that shell ends, even by SIGKILL, the kernel kills the first process,
# and with it all others.
enter() {
    local tool reason wait_for
    for tool in unshare nsenter setpriv ip tc; do
        command -v "$tool" >/dev/null || cannot "'$tool' is missing (packages util-linux, iproute2)"
    done
    [[ $(mpirun --version 2>&1) =~ HYDRA|MPICH|Intel ]] \
        || cannot "it takes MPICH's mpirun to start ranks on them, not $(command -v mpirun)"
    if ! unshare "${own[@]}" "${first[@]}" true 2>/dev/null; then
        own+=(--user --map-root-user)
        reason=$(unshare "${own[@]}" "${first[@]}" true 2>&1) \
            || cannot "not root, and user namespaces do not help: ${reason:-unshare failed}"
    fi
    warm_up
    wait_for='trap "exit 143" TERM; trap "exit 130" INT; setpriv --pdeathsig KILL "$@" <&0 & wait $!'
    exec unshare "${own[@]}" bash -c "$wait_for" wait_for bash "${BASH_SOURCE[0]}" --inside \
        --delay "$delay" --loss "$loss" --seed "$seed" --link "$link" "$@"
}

[[ -n $inside ]] || enter "$@"

on() {
    local host=$1
    shift
    nsenter --target "$host" --net --uts --ipc --mount --pid --wd="$PWD" -- "$@"
}

# make_host NUMBER: sets 'host' to the process that keeps its namespaces.
make_host() {
    local name
    name=epcomm-$1-$(od -An -N4 -tx4 /dev/urandom | tr -d ' ')
    # The name tells that the rest is done. UCX looks for network devices in /sys; each mount of it
    # shows those of one namespace.
    unshare "${own[@]}" "${first[@]}" sh -ec "mount -t tmpfs tmpfs /dev/shm
        mount -t sysfs sysfs /sys; hostname $name; exec sleep infinity" &
    local keeper=$!
    until [[ -n ${host:-} && $(nsenter --target "$host" --uts hostname 2>/dev/null) == "$name" ]]; do
        kill -0 "$keeper" 2>/dev/null || cannot "unshare failed, see above"
        sleep 0.01
        # Its only child is the first process of the new host.
        read -r host <"/proc/$keeper/task/$keeper/children" || true
    done
    on "$host" ip link set lo up
    # mpirun's way to the host.
    ip link add "c$1" type veth peer name m0 netns "$host"
    ip address add 10.77.0.254 peer "10.77.0.$1" dev "c$1"
    ip link set "c$1" up
    on "$host" ip address add "10.77.0.$1" peer 10.77.0.254 dev m0
    on "$host" ip link set m0 up
}

# A veth pair from host to host; the kernel delays and drops. Fails where tc has no netem.
join_by_netem() {
    local side
    ip link add w1 type veth peer name w2
    ip link set w1 netns "${hosts[0]}" name e0
    ip link set w2 netns "${hosts[1]}" name e0
    for side in 0 1; do
        on "${hosts[side]}" tc qdisc add dev e0 root netem delay "${delay}ms" loss "$loss%" \
            2>/dev/null || { on "${hosts[0]}" ip link delete e0; return 1; }
    done
    carrier="tc netem"
}

# A veth pair from each host to this process, which carries the frames.
join_by_forwarder() {
    local side ready
    for side in 1 2; do
        ip link add "w$side" type veth peer name e0 netns "${hosts[side - 1]}"
        ip link set "w$side" up
    done
    exec {ready}< <(exec python "$EPCOMM_ROOT/launch/netns_link.py" w1 w2 "$delay" "$loss" "$seed")
    read -r -t 30 <&"$ready" || cannot "netns_link.py did not start"
    carrier="netns_link.py, seed $seed"
}

mount -t proc proc /proc || cannot "a new namespace cannot have its own /proc"
ip link set lo up || cannot "the network of a new namespace cannot be set up"
mount -t tmpfs tmpfs /dev/shm || cannot "a new namespace cannot have its own /dev/shm"
hosts=()
for n in 1 2; do
    host=
    make_host "$n"
    hosts+=("$host")
done
case $link in
    netem) join_by_netem || cannot "tc has no netem here" ;;
    forwarder) join_by_forwarder ;;
    auto) join_by_netem || join_by_forwarder ;;
esac
for n in 1 2; do
    on "${hosts[n - 1]}" ip address add "10.77.1.$n/24" dev e0
    on "${hosts[n - 1]}" ip link set e0 up
done
say "two hosts joined by $carrier: delay $delay ms, loss $loss %"

# mpirun starts a process on a host as ssh would: options, the host's name, the command.
cat >/dev/shm/enter <<ENTER
#!/usr/bin/env bash
while [[ \$1 != 10.77.0.* ]]; do shift; done
case \$1 in 10.77.0.1) host=${hosts[0]} ;; *) host=${hosts[1]} ;; esac
shift
exec nsenter --target \$host --net --uts --ipc --mount --pid --wd="\$PWD" -- bash -c "\$*"
ENTER
chmod +x /dev/shm/enter
start="-launcher ssh -launcher-exec /dev/shm/enter -localhost 10.77.0.254"
where="-hosts 10.77.0.1,10.77.0.2 -ppn $(($1 / 2))"
use_e0="-genv UCX_TLS tcp,self -genv UCX_NET_DEVICES e0 -genv FI_PROVIDER tcp -genv FI_TCP_IFACE e0
 -genv GLOO_SOCKET_IFNAME e0"
export EPCOMM_MPIRUN_ARGS="$start $where ${use_e0/$'\n'/} ${EPCOMM_MPIRUN_ARGS:-}"
# Not exec: the first process of a namespace has to outlive what it waits for.
status=0
bash "$EPCOMM_ROOT/launch/mpirun.sh" "$@" || status=$?
exit "$status"
