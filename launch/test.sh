#!/usr/bin/env bash
# launch/test.sh [--quick] [--cpu | --gpu | --only-gpu] [pytest arguments]: set-up, lint, compilation
# of the CUDA kernels, unit tests, whole jobs (two at once; two network hosts), then the tests that
# need several ranks, under mpirun, in worlds of several sizes, then the fabric, also with real verbs
# in a virtual machine; where a GPU is found, those of the CUDA back end as well, several ranks on a
# GPU under a CUDA MPS of their own. The last line is the total.
#
#   --quick     one world instead of all (on GPUs two), no whole jobs and no virtual machine
#   --cpu       nothing on GPUs
#   --gpu       fail where the tests on GPUs cannot run
#   --only-gpu  nothing but the tests on GPUs, and fail where they cannot run
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$EPCOMM_ROOT"

# One rank, one node of several, odd counts, several nodes; tests choose the nodes in each.
worlds=(1 2 3 4 6 8)
# The largest first: it finds most.
gpu_worlds=(8 1 2 3 4 6)
gpu_node_worlds=(8 4)
mode='' jobs=1 vm=1
while [[ ${1:-} =~ ^--(quick|cpu|gpu|only-gpu)$ ]]; do
    case $1 in
        --quick) worlds=(4) gpu_worlds=(8 3) gpu_node_worlds=(8) jobs='' vm='' ;;
        *) mode=${1#--} ;;
    esac
    shift
done
pytest_args=("$@")

log=$(mktemp)
trap 'rm -f "$log"' EXIT
passed=0 failed=0 skipped=0
bad=()

# The number before a word in pytest's closing line.
count() { { tail -n 1 "$log" | grep -aoE "[0-9]+ $1" || echo 0; } | cut -d' ' -f1; }

stage() {
    local name=$1
    shift
    printf '\n=== %s\n' "$name"
    "$@" || { bad+=("$name"); failed=$((failed + 1)); }
}

# A pytest stage: adds its counts to the total. Status 5 means that the caller's arguments, such as
# -k, selected nothing here.
test_stage() {
    local name=$1 status=0
    shift
    printf '\n=== %s\n' "$name"
    "$@" ${pytest_args[@]+"${pytest_args[@]}"} 2>&1 | tee "$log" || status=$?
    grep -aE '[0-9]+ (passed|failed|skipped|deselected|error)' "$log" | tail -n 1 >"$log.last" || true
    mv "$log.last" "$log"
    passed=$((passed + $(count passed)))
    skipped=$((skipped + $(count skipped)))
    local wrong=$(($(count failed) + $(count error)))
    if [[ $status -eq 5 && ${#pytest_args[@]} -gt 0 ]]; then
        status=0
    fi
    # A stage that this machine cannot run said why.
    if [[ $status -eq 77 ]]; then
        skipped=$((skipped + 1)) status=0
    fi
    if [[ $status -ne 0 ]]; then
        bad+=("$name")
        # A stage that died before pytest could count still counts as one failure.
        failed=$((failed + (wrong > 0 ? wrong : 1)))
    fi
}

if [[ $mode != only-gpu ]]; then
    stage "lint" bash launch/lint.sh
    stage "CUDA kernels" bash launch/compile_cuda.sh
    test_stage "unit tests" python -m pytest --color=no tests/unit
    test_stage "kernels run on the host" python -m pytest --color=no tests/emulation
    if [[ -n $jobs ]]; then
        test_stage "whole jobs" python -m pytest --color=no -m "not gpu" tests/jobs
    fi
    # Just before the timeout of a test, every rank prints where it is: the rank that is late is
    # seldom the one whose timeout ends the run.
    for size in "${worlds[@]}"; do
        test_stage "$size ranks" bash launch/mpirun.sh "$size" -m pytest --color=no --with-mpi \
            -o faulthandler_timeout=115 tests/mpi
    done
    test_stage "fabric" python -m pytest --color=no -m "not gpu" tests/fabric
    if [[ -n $vm ]]; then
        test_stage "fabric, real verbs in a virtual machine" bash launch/vm_test.sh
    fi
fi
if [[ $mode != cpu ]] && gpu_job; then
    warm_up
    for size in "${gpu_worlds[@]}"; do
        test_stage "$size ranks on GPUs" bash launch/gpu.sh -n "$size" python -m mpi4py -m pytest \
            --color=no --with-mpi -o faulthandler_timeout=115 tests/gpu
    done
    # SMs are left to the ranks' emulated network cards.
    for size in "${gpu_node_worlds[@]}"; do
        test_stage "$size ranks in virtual nodes on GPUs" bash launch/gpu.sh -n "$size" --sms 12 \
            python -m mpi4py -m pytest --color=no --with-mpi -o faulthandler_timeout=115 tests/gpu_nodes
    done
    # Ranks are forked by the tests, at most 3 of them, and share one GPU, for which there is MPS.
    test_stage "fabric on a GPU" env CUDA_VISIBLE_DEVICES=0 bash launch/gpu.sh -n 3 --once \
        python -m pytest --color=no -m gpu -o faulthandler_timeout=115 tests/fabric
    test_stage "jobs on GPUs" python -m pytest --color=no -m gpu tests/jobs
elif [[ $mode == *gpu ]]; then
    stage "tests on GPUs: no GPU that can be used" false
fi

echo
[[ ${#bad[@]} -eq 0 ]] || printf 'failed: %s\n' "${bad[@]}"
echo "$passed passed, $failed failed, $skipped skipped"
[[ ${#bad[@]} -eq 0 ]]
