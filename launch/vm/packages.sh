# Sourced by vm.sh: packages of this distribution, downloaded and unpacked into the cache. Sets
# VM_TREE (where they are unpacked), VM_QEMU and what QEMU needs to run from there, and VM_KERNEL.
#
# shellcheck shell=bash
# shellcheck disable=SC2034  # read by vm.sh

VM_TREE=$VM_CACHE/tree

# Debian's kernel has rdma_rxe; Ubuntu keeps it in the package of further modules.
kernel_packages() {
    local meta name
    for meta in linux-image-amd64 linux-image-generic; do
        name=$("${apt[@]/#apt-get/apt-cache}" depends "$meta" 2>/dev/null \
            | awk '/Depends: linux-image-[0-9]/ {print $2; exit}')
        [[ -z $name ]] || break
    done
    [[ -n $name ]] || return 1
    printf '%s\n' "$name"
    [[ $meta == linux-image-amd64 ]] || printf '%s\n' "${name/image/modules}" "${name/image/modules-extra}"
}

# What the packages need and this machine does not have. libibverbs-dev is there for its header only.
download() {
    local -a wanted=(qemu-system-x86 libibverbs1 ibverbs-providers iproute2 busybox-static) names kernel
    # Lists of its own: those of the machine may be missing or old, and only root could refresh them.
    local -a apt=(apt-get -o "Dir::State::Lists=$VM_CACHE/lists" -o "Dir::Cache=$VM_CACHE/apt"
        -o APT::Update::Error-Mode=any -o Debug::NoLocking=1 -o APT::Sandbox::User= -o Acquire::Retries=2 -qq)
    mkdir -p "$VM_CACHE/lists/partial" "$VM_CACHE/apt/archives/partial" "$VM_CACHE/debs"
    "${apt[@]}" update || skip "apt-get update failed: no network, or no package sources"
    mapfile -t names < <("${apt[@]}" --simulate --no-install-recommends install "${wanted[@]}" \
        | awk '/^Inst/ {print $2}')
    mapfile -t kernel < <(kernel_packages)
    [[ ${#kernel[@]} -gt 0 ]] || skip "this distribution has no kernel package the recipe knows"
    mapfile -t names < <(printf '%s\n' "${wanted[@]}" "${names[@]}" "${kernel[@]}" libibverbs-dev | sort -u)
    (cd "$VM_CACHE/debs" && rm -f -- *.deb && timeout 300 "${apt[@]}" download "${names[@]}") \
        || skip "the packages could not be downloaded: ${names[*]}"
    rm -rf "$VM_CACHE/lists" "$VM_CACHE/apt"
}

# Every /bin, /sbin and /lib into /usr, as both distributions have it: the tree is laid over this
# machine's root, and a folder must not hide the link of the same name.
unpack() {
    local deb folder
    rm -rf "$VM_TREE"
    mkdir -p "$VM_TREE/usr"
    for deb in "$VM_CACHE"/debs/*.deb; do
        dpkg-deb --extract "$deb" "$VM_TREE" || skip "dpkg-deb could not unpack $deb"
    done
    for folder in bin sbin lib lib64; do
        [[ -d $VM_TREE/$folder ]] || continue
        cp -a "$VM_TREE/$folder" "$VM_TREE/usr/" && rm -rf "${VM_TREE:?}/$folder"
    done
    # Most of a kernel is drivers of hardware that the virtual machine does not have.
    for folder in gpu media staging scsi usb net/wireless net/ethernet; do
        rm -rf "$VM_TREE"/usr/lib/modules/*/kernel/drivers/$folder
    done
    rm -rf "$VM_TREE/usr/share/doc" "$VM_TREE"/usr/lib/modules/*/kernel/sound "$VM_CACHE/debs"
}

fetch_packages() {
    local key tool
    for tool in apt-get apt-cache dpkg-deb; do
        command -v "$tool" >/dev/null || skip "$tool is not here: packages come from Debian or Ubuntu"
    done
    key=$(cat /etc/os-release "${BASH_SOURCE[0]}" | sha256sum | cut -d' ' -f1)
    if [[ $(cat "$VM_CACHE/packages.key" 2>/dev/null) != "$key" ]]; then
        say "downloading QEMU, a kernel and libibverbs into $VM_CACHE"
        rm -f "$VM_CACHE/packages.key" "$VM_CACHE/initramfs"
        download
        unpack
        printf '%s\n' "$key" >"$VM_CACHE/packages.key"
    fi
    local -a kernels=("$VM_TREE"/boot/vmlinuz-*)
    VM_KERNEL=${kernels[0]}
    VM_KERNEL_VERSION=${VM_KERNEL##*/vmlinuz-}
    # Not an installed QEMU, if there is one: one version is tested, with the modules and firmware
    # it came with.
    VM_QEMU=$VM_TREE/usr/bin/qemu-system-x86_64
    local libraries=$VM_TREE/usr/lib/x86_64-linux-gnu
    VM_LIBRARIES=$libraries VM_MODULES=$libraries/qemu
    # Where QEMU would look if it were installed.
    VM_FIRMWARE=("$VM_TREE"/usr/share/seabios "$VM_TREE"/usr/share/qemu "$VM_TREE"/usr/lib/ipxe/qemu)
}
