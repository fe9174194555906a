#!/usr/bin/env bash
# launch/compile_cuda.sh: compile the CUDA sources for every architecture they must compile for, and
# fail where a hot kernel spills registers. Needs nvcc, but no GPU.
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

# Only the architecture whose registers are looked at is worth the assembler's time.
compile() {
    local effort=-O1
    [[ $1 != 90a ]] || effort=-O3
    "$nvcc" -std=c++17 -O3 "-gencode=arch=compute_$1,code=sm_$1" -Icsrc/include -Xptxas -v,$effort \
        -c "$2" -o "$work/object.o" 2>&1
}

for arch in 80 90a 100; do
    for source in csrc/{kernels,fabric,emulated}/*.cu csrc/{fabric,emulated,carrier}/*_cuda.cc \
        tests/native/*.cu; do
        compile "$arch" "$source" >"$work/report" || { cat "$work/report"; die "$source, sm_$arch"; }
        # Not hot kernels: the combine for more than 8 rows a token (its second flag), and those that
        # move lanes off dead planes, which save registers around what they call for that.
        spills=$(awk '/Compiling entry/ { name = $0 }
            /bytes spill/ && !/ 0 bytes spill stores, 0 bytes spill loads/ &&
                name !~ /combine_kernelILb[01]ELb1E|8ByPlanes/ { print name; print }' "$work/report")
        [[ -z $spills || $arch != 90a ]] || { echo "$spills"; die "$source spills on sm_$arch"; }
    done
    echo "compiled for sm_$arch"
done
