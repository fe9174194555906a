#!/usr/bin/env bash
# launch/bench.sh [--cpu] [options]: run the benchmark. Where a GPU is found, among ranks on the
# machine's GPUs (several on one under a CUDA MPS of its own), with --nodes 2 or more as that many
# virtual nodes; otherwise, or with --cpu, by default as 2 nodes of 4 ranks on this machine's cores.
# --help lists the options of the one that would run.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$EPCOMM_ROOT"

cpu='' help='' between='' arguments=()
while [[ $# -gt 0 ]]; do
    case $1 in
        --cpu) cpu=1 ;;
        -h | --help) help=1 ;;
        --nodes | --nodes=*)
            nodes=${1#--nodes=}
            arguments+=("$1")
            if [[ $1 == --nodes && $# -gt 1 ]]; then
                nodes=$2
                arguments+=("$2")
                shift
            fi
            [[ $nodes == 1 ]] || between=1
            ;;
        *) arguments+=("$1") ;;
    esac
    shift
done
set -- ${arguments[@]+"${arguments[@]}"}

if [[ -z $cpu ]] && gpu_job; then
    options=benchmarks.gpu.${between:+nodes_}options
    [[ -z $help ]] || exec python -m "$options" 0 0 --help
    read -r gpus sms _ < <(find_gpus)
    launch=$(python -m "$options" "$gpus" "$sms" "$@")
    read -r ranks rank_sms settings <<<"$launch"
    warm_up
    if [[ -n $between ]]; then
        exec bash launch/gpu.sh -n "$ranks" --sms "$rank_sms" python -m mpi4py \
            -m benchmarks.gpu_between "$@"
    fi
    # shellcheck disable=SC2086  # one word for each setting
    exec bash launch/gpu.sh -n "$ranks" --sms "$rank_sms" python -m mpi4py \
        -m benchmarks.gpu_inside "$@" --settings $settings
fi

[[ -z $help ]] || exec python -m benchmarks.main --help
# MPICH's own default while waiting, sched_yield: a flat all-to-all is fastest with it, and epcomm does
# not depend on it.
export MPIR_CVAR_ENABLE_HEAVY_YIELD=${MPIR_CVAR_ENABLE_HEAVY_YIELD:-0}
ranks=$(python -m benchmarks.options "$@")
exec bash launch/mpirun.sh "$ranks" -m benchmarks.main "$@"
