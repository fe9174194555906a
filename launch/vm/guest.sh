#!/usr/bin/env bash
# Runs in the virtual machine, as root: makes the Soft-RoCE device, runs the command, writes its status.
set -uo pipefail
control=/run/vm-control
result=70
uptime() { cut -d' ' -f1 /proc/uptime; }
# shellcheck disable=SC2317,SC2329  # called by the trap
end() { printf '%s %s\n' "$result" "${boot:-$(uptime)}" >"$control/status"; }
trap end EXIT

export HOME=/root TERM=dumb LANG=C.UTF-8 EPCOMM_VM_OUT=/run/vm-out EPCOMM_IN_VM=1
ulimit -l unlimited
hostname vm
# A network of one: the loopback interface for sockets, and two with an address for RoCE. An MTU of
# 4200 lets a device use its largest payload, 4096 bytes.
ip link set lo up
for number in 0 1; do
    [[ -e /sys/class/net/dummy$number ]] || ip link add "dummy$number" type dummy
    ip link set "dummy$number" mtu 4200 up
    ip address add "10.77.$number.1/24" dev "dummy$number"
    rdma link add "rxe$number" type rxe netdev "dummy$number" \
        || { echo "vm: no Soft-RoCE device" >&2; exit 70; }
done
boot=$(uptime)

# shellcheck source=/dev/null
source "$control/command"
result=0
# shellcheck disable=SC2154  # in the file
"${command[@]}" || result=$?
