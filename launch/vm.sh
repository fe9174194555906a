#!/usr/bin/env bash
# launch/vm.sh COMMAND...: run a command, from the root of the repository, in a small virtual machine
# that has two Soft-RoCE devices, rxe0 and rxe1, so that real verbs run where there is no such network card.
#
# The machine's files are this machine's, read-only, under a layer in memory that takes what is
# written: the command finds Python, its packages and the repository as they are here. Only the
# folder EPCOMM_VM_OUT of the machine, given as $EPCOMM_VM_OUT in it, is written through to here.
# QEMU, a kernel and libibverbs are downloaded once, as packages of this distribution (Debian or
# Ubuntu on x86-64), and unpacked into a cache; nothing is installed and root is not needed.
#
# Status: the command's; 77 = skipped, with the reason on the last line; 70 = the machine ended before
# the command did; 124 = out of time.
#
#   EPCOMM_VM_CACHE     folder of the packages (default ~/.cache/epcomm/vm)
#   EPCOMM_VM_TIMEOUT   seconds after which the machine is ended, boot included (default 600)
#   EPCOMM_VM_CPUS      virtual processors (default 2)
#   EPCOMM_VM_MEMORY    its memory (default 4G; only what is touched is taken)
#   EPCOMM_VM_ACCEL     tcg (software emulation, the default) or kvm
#   EPCOMM_VM_OUT       folder the command's results go to (default: none are kept)
set -euo pipefail

VM_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VM_CACHE=${EPCOMM_VM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/epcomm/vm}

say() { printf '%s\n' "vm: $*" >&2; }
skip() { say "skipped: $*"; exit 77; }

# shellcheck source=launch/vm/packages.sh
source "$VM_ROOT/launch/vm/packages.sh"
# shellcheck source=launch/vm/initramfs.sh
source "$VM_ROOT/launch/vm/initramfs.sh"

[[ $# -ge 1 ]] || { say "usage: launch/vm.sh COMMAND..."; exit 2; }
[[ $(uname -m) == x86_64 ]] || skip "the machine's recipe is for x86-64, and this is $(uname -m)"
mkdir -p "$VM_CACHE" || skip "no folder $VM_CACHE (set EPCOMM_VM_CACHE)"
exec 9>"$VM_CACHE/lock"
flock 9
fetch_packages
make_initramfs
flock -u 9
exec 9>&-

started=$SECONDS
work=$(mktemp -d)
qemu=
# shellcheck disable=SC2317,SC2329  # called by the trap
end() {
    # The timer passes the signal on to QEMU; it kills it when that does not help.
    [[ -z $qemu ]] || { kill "$qemu" 2>/dev/null && wait "$qemu" 2>/dev/null; } || true
    rm -rf "$work"
}
trap end EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# What the machine must know goes through a file: a kernel's command line is short and not private.
out=${EPCOMM_VM_OUT:-$work/out}
mkdir -p "$out" "$work/control"
out=$(cd "$out" && pwd)
{
    declare -p PATH
    for name in EPCOMM_INSTALL EPCOMM_READY PYTHONPATH VIRTUAL_ENV CONDA_PREFIX \
        PYTEST_DISABLE_PLUGIN_AUTOLOAD GLOO_SOCKET_IFNAME NUMBA_CPU_NAME NUMBA_CPU_FEATURES NUMBA_CACHE_DIR; do
        [[ -z ${!name+set} ]] || declare -p "$name" | sed 's/^declare -[a-z-]* /export /'
    done
    printf 'cd %q\n' "$VM_ROOT"
    printf 'command=('
    printf ' %q' "$@"
    printf ' )\n'
} >"$work/control/command"

accel=${EPCOMM_VM_ACCEL:-tcg}
machine=(-accel "tcg,thread=multi" -cpu max)
[[ $accel == tcg ]] || machine=(-accel "$accel" -cpu host)
firmware=()
for folder in "${VM_FIRMWARE[@]}"; do
    firmware+=(-L "$folder")
done
share() {
    printf '%s\n' -fsdev "local,id=$1,path=$2,security_model=none,multidevs=remap$3" \
        -device "virtio-9p-pci,fsdev=$1,mount_tag=$1"
}
mapfile -t shares < <(
    share host / ,readonly=on
    share packages "$VM_TREE" ,readonly=on
    share control "$work/control" ""
    share out "$out" ""
)
timeout --kill-after=5 "${EPCOMM_VM_TIMEOUT:-600}" \
    env "LD_LIBRARY_PATH=$VM_LIBRARIES" "QEMU_MODULE_DIR=$VM_MODULES" \
    "$VM_QEMU" "${firmware[@]}" "${machine[@]}" -machine q35 -smp "${EPCOMM_VM_CPUS:-2}" \
    -m "${EPCOMM_VM_MEMORY:-4G}" -nodefaults -display none -monitor none -serial stdio -no-reboot \
    -kernel "$VM_KERNEL" -initrd "$VM_INITRAMFS" \
    -append "console=ttyS0 quiet loglevel=3 panic=-1 mitigations=off vm_launch=$VM_ROOT/launch/vm" \
    -device virtio-rng-pci "${shares[@]}" <"/dev/null" &
qemu=$!
status=0
wait "$qemu" || status=$?
qemu=
if [[ $status -eq 124 || $status -eq 137 ]]; then
    say "out of time after $((SECONDS - started)) s (EPCOMM_VM_TIMEOUT=${EPCOMM_VM_TIMEOUT:-600})"
    exit 124
fi
if [[ ! -s $work/control/status ]]; then
    say "the machine ended before the command did (QEMU's status $status)"
    exit 70
fi
read -r result boot <"$work/control/status"
say "up after $boot s, ended after $((SECONDS - started)) s, status $result"
exit "$result"
