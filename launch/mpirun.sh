#!/usr/bin/env bash
# launch/mpirun.sh N arguments...: run 'python -m mpi4py arguments...' on N ranks.
#
# 'python -m mpi4py' aborts all ranks when one of them ends with an error, instead of leaving the
# others in a collective. More ranks than cores is fine, and so is running as root in a container.
#
#   EPCOMM_MPIRUN_ARGS  further arguments of mpirun, such as --hostfile hosts
#   MPIEXEC_TIMEOUT     seconds after which mpirun ends everything (default 900)
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

[[ $# -ge 2 && $1 =~ ^[1-9][0-9]*$ ]] || die "usage: launch/mpirun.sh RANKS ARGUMENTS_OF_PYTHON..."
ranks=$1
shift

# Cores this process may use: the affinity mask, or less where a container has a quota.
cores() {
    local count quota period
    count=$(env -u OMP_NUM_THREADS nproc)
    if read -r quota period </sys/fs/cgroup/cpu.max && [[ $quota != max ]]; then
        quota=$(((quota + period - 1) / period))
        ((count < quota)) || count=$quota
    fi 2>/dev/null
    printf '%s\n' "$count"
}

warm_up

cores=$(cores)
threads=$((cores > ranks ? cores / ranks : 1))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads} MKL_NUM_THREADS=${MKL_NUM_THREADS:-$threads}
export NUMBA_NUM_THREADS=${NUMBA_NUM_THREADS:-$threads}
export MPIEXEC_TIMEOUT=${MPIEXEC_TIMEOUT:-900}

arguments=(-n "$ranks")
case $(mpirun --version 2>&1) in
    *"Open MPI"* | *OpenRTE* | *prrte*)
        # Version 4 reads the OMPI names, version 5 the PRTE names.
        export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
        export PRTE_ALLOW_RUN_AS_ROOT=1 PRTE_ALLOW_RUN_AS_ROOT_CONFIRM=1
        if ((ranks > cores)); then
            export OMPI_MCA_rmaps_base_oversubscribe=true OMPI_MCA_hwloc_base_binding_policy=none
            export PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
            export PRTE_MCA_hwloc_default_binding_policy=none
            export OMPI_MCA_mpi_yield_when_idle=true
        fi
        ;;
    *HYDRA* | *MPICH* | *Intel*)
        # Without a batch system everything runs here, and no ssh daemon is needed for that.
        if [[ -z ${SLURM_JOB_ID:-} && -z ${EPCOMM_MPIRUN_ARGS:-} ]]; then
            export HYDRA_LAUNCHER=${HYDRA_LAUNCHER:-fork}
        fi
        if ((ranks > cores)); then
            # Waiting ranks sleep. With the default, sched_yield, a rank that works keeps only its
            # even share of the cores: 8 ranks on 2 cores, 7 of them waiting, made it 4 times slower.
            export MPIR_CVAR_ENABLE_HEAVY_YIELD=${MPIR_CVAR_ENABLE_HEAVY_YIELD:-1}
        fi
        ;;
    *) say "unknown MPI '$(command -v mpirun)': its defaults apply" ;;
esac

read -ra extra <<<"${EPCOMM_MPIRUN_ARGS:-}"
exec mpirun "${arguments[@]}" ${extra[@]+"${extra[@]}"} python -m mpi4py "$@"
