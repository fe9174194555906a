#!/usr/bin/env bash
# launch/sanitize.sh [--native] [memcheck] [racecheck] [synccheck] [initcheck]: run compute-sanitizer's
# tools (by default memcheck and racecheck) over a few calls of the CUDA back end, with one rank, with
# two in a node and with two nodes over every kind of fabric that one GPU can have.
# --native: memcheck, or what is named, over the kernel of the emulated network cards itself, which the
# runs of ranks leave out. racecheck knows barriers only, and names there what flags keep in order.
# Needs a GPU, and compute-sanitizer on PATH or under CUDA_HOME. Status: 0 if no tool found anything.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$EPCOMM_ROOT"

sanitizer=
for place in "$(command -v compute-sanitizer || true)" \
    "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" \
    "${CUDA_HOME:-/usr/local/cuda}/compute-sanitizer/compute-sanitizer"; do
    if [[ -x $place ]]; then
        sanitizer=$place
        break
    fi
done
if [[ -z $sanitizer ]]; then
    echo "sanitize.sh: compute-sanitizer is neither on PATH nor under CUDA_HOME" >&2
    exit 2
fi

native='' by_default=(memcheck racecheck)
if [[ ${1:-} == --native ]]; then
    native=1 by_default=(memcheck)
    shift
fi
tools=("$@")
[[ ${#tools[@]} -gt 0 ]] || tools=("${by_default[@]}")
bad=()
export PYTHONPATH=$EPCOMM_ROOT${PYTHONPATH:+:$PYTHONPATH}

over_ranks() {
    local tool=$1 run name
    for run in "1" "2" "2 nodes"; do
        name="$tool, $run"
        printf '\n=== %s\n' "$name"
        # Instrumented kernels take registers and time: few blocks, and deadlines that suit them.
        # Only epcomm's kernels are looked at, torch's own cost time and are not ours, and only in
        # the ranks: the emulated network cards of their carriers never end.
        # shellcheck disable=SC2086
        bash launch/gpu.sh -n "${run%% *}" --sms 4 --timeout "${SANITIZE_TIMEOUT:-240}" \
            "$sanitizer" --tool "$tool" --error-exitcode 9 --print-limit 20 \
            --target-processes application-only --kernel-name kernel_substring=epcomm \
            python -m mpi4py tests/gpu/short_run.py ${run#[12]} || bad+=("$name")
    done
}

# The tools let kernels run one by one: so one that posts, then the cards' kernel, which ends by
# itself, then one that compares.
over_native() {
    local tool=$1
    printf '\n=== %s, native\n' "$tool"
    EPCOMM_TEST_SLOWNESS=${SANITIZE_SLOWNESS:-10} timeout -k 10 "${SANITIZE_TIMEOUT:-240}" \
        "$sanitizer" --tool "$tool" --error-exitcode 9 --print-limit 20 \
        "$programs/emulated_resident_alone" everything_was_posted_before || bad+=("$tool, native")
}

if [[ -n $native ]]; then
    programs=$(mktemp -d)
    trap 'rm -rf "$programs"' EXIT
    python tests/jobs/gpu_programs.py "$programs" emulated_resident_alone >/dev/null
fi
for tool in "${tools[@]}"; do
    if [[ -n $native ]]; then
        over_native "$tool"
    else
        over_ranks "$tool"
    fi
done
echo
if [[ ${#bad[@]} -gt 0 ]]; then
    printf 'failed: %s\n' "${bad[@]}"
    exit 1
fi
echo "${tools[*]}: nothing found"
