#!/usr/bin/env bash
# launch/compile_cuda.sh: compile the CUDA sources for every architecture they must compile for, one
# on each core, and fail where a hot kernel spills registers. Needs nvcc, but no GPU.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$EPCOMM_ROOT"

nvcc=$(python -c 'import runpy, sys; sys.argv = ["setup.py", "--version"]
print(runpy.run_path("setup.py")["find_nvcc"]() or "")' 2>/dev/null | tail -n 1)
if [[ -z $nvcc ]]; then
    say "skipped: there is no nvcc that can compile them ('pip install nvidia-cuda-nvcc' provides one)"
    exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# check ARCHITECTURE SOURCE. Only the architecture whose registers are looked at is worth the
# assembler's time.
check() {
    local effort=-O1 report
    [[ $1 != 90a ]] || effort=-O3
    report=$work/$1-${2//\//-}
    "$nvcc" -std=c++17 -O3 "-gencode=arch=compute_$1,code=sm_$1" -Icsrc/include -Xptxas -v,$effort \
        -c "$2" -o "$report.o" >"$report" 2>&1 || { cat "$report"; die "$2, sm_$1"; }
    [[ $1 == 90a ]] || return 0
    # Not hot kernels: the combine for more than 8 rows a token (its second flag), and those that
    # move lanes off dead planes, which save registers around what they call for that.
    local spills
    spills=$(awk '/Compiling entry/ { name = $0 }
        /bytes spill/ && !/ 0 bytes spill stores, 0 bytes spill loads/ &&
            name !~ /combine_kernelILb[01]ELb1E|8ByPlanes/ { print name; print }' "$report")
    [[ -z $spills ]] || { echo "$spills"; die "$2 spills on sm_$1"; }
}
export -f check say die
export nvcc work

# Those that take longest, first.
shopt -s extglob
sources=(csrc/kernels/two_hop_*.cu csrc/kernels/!(two_hop_*).cu csrc/{fabric,emulated}/*.cu
    csrc/{fabric,emulated,carrier}/*_cuda.cc tests/native/*.cu)
for arch in 90a 80 100; do
    for source in "${sources[@]}"; do printf '%s %s\n' "$arch" "$source"; done
done | xargs -P "$(nproc)" -L 1 bash -c 'set -euo pipefail; check "$@"' check
say "compiled ${#sources[@]} files for sm_90a, sm_80 and sm_100"
