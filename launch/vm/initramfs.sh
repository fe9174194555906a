# Sourced by vm.sh: makes the first file system of the virtual machine, which holds busybox, the
# kernel modules and `init`. Sets VM_INITRAMFS.
#
# shellcheck shell=bash

VM_INITRAMFS=$VM_CACHE/initramfs

# In the order in which they are loaded. crc32_generic: rdma_rxe asks the kernel's crypto interface
# for it by name, so no dependency of the module shows it.
vm_modules=(crc32_generic virtio_pci virtio_rng 9pnet_virtio 9p overlay dummy ib_uverbs rdma_rxe)

# Modules as files that any busybox can load.
decompress_modules() {
    local modules=$1
    if compgen -G "$modules/kernel/fs/9p/*.zst" >/dev/null; then
        command -v zstd >/dev/null || skip "zstd is needed to unpack this distribution's kernel modules"
        find "$modules" -name '*.ko.zst' -exec zstd --quiet --decompress --rm {} +
    elif compgen -G "$modules/kernel/fs/9p/*.xz" >/dev/null; then
        find "$modules" -name '*.ko.xz' -exec "$busybox" unxz {} +
    fi
}

# A module, after everything it needs, as paths below the modules' folder.
with_dependencies() {
    awk -v name="$2" -F: '
        { file = $1; sub(/.*\//, "", file); sub(/\.ko$/, "", file); gsub(/-/, "_", file) }
        file == name { n = split($2, needs, " "); while (n) print needs[n--]; print $1 }' "$1/modules.dep"
}

make_initramfs() {
    local busybox=$VM_TREE/usr/bin/busybox modules=$VM_TREE/usr/lib/modules/$VM_KERNEL_VERSION
    local folder init=$VM_ROOT/launch/vm/init name path
    # A newer `init` means a newer image.
    [[ ! -s $VM_INITRAMFS || $init -nt $VM_INITRAMFS || ${BASH_SOURCE[0]} -nt $VM_INITRAMFS ]] || return 0
    decompress_modules "$modules"
    "$busybox" depmod -b "$VM_TREE/usr" "$VM_KERNEL_VERSION"
    folder=$(mktemp -d)
    mkdir -p "$folder"/{bin,modules,dev,proc,sys,host,packages,memory,control,out,root}
    cp "$busybox" "$folder/bin/busybox"
    cp "$init" "$folder/init"
    chmod +x "$folder/init"
    for name in "${vm_modules[@]}"; do
        with_dependencies "$modules" "$name"
    done | awk '!seen[$0]++' >"$folder/paths"
    while read -r path; do
        cp "$modules/$path" "$folder/modules/"
        printf '%s\n' "${path##*/}" >>"$folder/modules/order"
    done <"$folder/paths"
    (cd "$folder" && find . | "$busybox" cpio -o -H newc 2>/dev/null) >"$VM_INITRAMFS.new"
    mv "$VM_INITRAMFS.new" "$VM_INITRAMFS"
    rm -rf "$folder"
}
