// The fake's libibverbs.

#include <fcntl.h>
#include <string.h>

#include "fake_state.h"

namespace fake {

namespace {

ibv::Device** get_device_list(int* count) {
    if (now().enter("get_device_list") != 0) return nullptr;
    const auto& cards = now().cards;
    auto** list = new ibv::Device*[cards.size() + 1]();
    for (size_t i = 0; i < cards.size(); ++i) {
        list[i] = reinterpret_cast<ibv::Device*>(cards[i].get());
    }
    *count = int(cards.size());
    now().change("device list", 1);
    return list;
}

void free_device_list(ibv::Device** list) {
    now().change("device list", -1);
    delete[] list;
}

const char* get_device_name(ibv::Device* device) {
    return reinterpret_cast<World::Card*>(device)->name.c_str();
}

ibv::Context* open_plain(ibv::Device*) { return refuse<ibv::Context>(EOPNOTSUPP); }

int close_device(ibv::Context* context) {
    now().change("context", -1);
    delete reinterpret_cast<Context*>(context);
    return 0;
}

int query_device(ibv::Context* context, ibv::DeviceAttr* out) {
    const CardOptions& card = card_of(context)->options;
    out->phys_port_cnt = 1;
    out->max_qp_rd_atom = card.max_qp_rd_atom;
    out->max_qp_init_rd_atom = card.max_qp_init_rd_atom;
    out->atomic_cap = ibv::AtomicCap(card.atomics ? 1 : 0);
    return now().enter("query_device");
}

int query_port(ibv::Context* context, uint8_t port, ibv::PortAttr* out) {
    if (port != 1) return EINVAL;
    const CardOptions& card = card_of(context)->options;
    out->state = ibv::PortState(card.active ? 4 : 1);
    out->active_mtu = out->max_mtu = ibv::Mtu(card.active_mtu);
    out->gid_tbl_len = 4;
    out->lid = card.network == kInfiniband ? card.lid : 0;
    out->link_layer = card.network == kInfiniband ? 1 : 2;
    out->flags = card.needs_global ? 1 : 0;
    return now().enter("query_port");
}

int query_gid(ibv::Context* context, uint8_t, int index, ibv::Gid* out) {
    *out = {};
    const World::Card* card = card_of(context);
    // On Ethernet the address is not the first.
    if (index == (card->options.network == kInfiniband ? 0 : 3)) *out = card->gid;
    return 0;
}

ibv::Pd* alloc_pd(ibv::Context* context) {
    if (const int error = now().enter("alloc_pd")) return refuse<ibv::Pd>(error);
    now().change("protection domain", 1);
    return reinterpret_cast<ibv::Pd*>(new World::Card*(card_of(context)));
}

int dealloc_pd(ibv::Pd* pd) {
    now().change("protection domain", -1);
    delete reinterpret_cast<World::Card**>(pd);
    return 0;
}

ibv::Mr* make_mr(ibv::Pd* pd, uint64_t address, uint64_t bytes, int access) {
    World::Card* card = *reinterpret_cast<World::Card**>(pd);
    auto* mr = new ibv::Mr();
    mr->pd = pd;
    mr->lkey = mr->rkey = world->pause([&] {
        return world->network().add_memory(card->nic, reinterpret_cast<void*>(address), bytes,
                                           uint32_t(access));
    });
    now().change("memory region", 1);
    return mr;
}

ibv::Mr* reg_mr(ibv::Pd* pd, void* start, size_t bytes, int access) {
    const int error = now().enter("reg_mr", uint64_t(start), bytes, uint64_t(access));
    if (error != 0) return refuse<ibv::Mr>(error);
    return make_mr(pd, uint64_t(start), bytes, access);
}

ibv::Mr* reg_dmabuf_mr(ibv::Pd* pd, uint64_t offset, size_t bytes, uint64_t iova, int fd,
                       int access) {
    const int error = now().enter("reg_dmabuf_mr", offset, bytes, uint64_t(access));
    if (error != 0 || fcntl(fd, F_GETFD) < 0) return refuse<ibv::Mr>(error != 0 ? error : EBADF);
    return make_mr(pd, iova, bytes, access);
}

int dereg_mr(ibv::Mr* mr) {
    now().change("memory region", -1);
    delete mr;
    return 0;
}

ibv::Ah* create_ah(ibv::Pd* pd, ibv::AddressAttr* path) {
    const int error = now().enter("create_ah", path->is_global, path->grh.sgid_index);
    if (error != 0) return refuse<ibv::Ah>(error);
    auto* ah = new Ah();
    ah->card = *reinterpret_cast<World::Card**>(pd);
    for (const auto& card : now().cards) {
        if (memcmp(card->gid.raw, path->grh.dgid.raw, 16) == 0) {
            memcpy(ah->vector.mac, card->mac, sizeof card->mac);
        }
    }
    now().change("address handle", 1);
    return reinterpret_cast<ibv::Ah*>(ah);
}

int destroy_ah(ibv::Ah* ah) {
    now().change("address handle", -1);
    delete reinterpret_cast<Ah*>(ah);
    return 0;
}

}  // namespace

const ibv::Library& verbs_table() {
    static ibv::Library table = [] {
        ibv::Library t{};
        t.get_device_list = get_device_list;
        t.free_device_list = free_device_list;
        t.get_device_name = get_device_name;
        t.open_device = open_plain;
        t.close_device = close_device;
        t.query_device = query_device;
        t.query_port = query_port;
        t.query_gid = query_gid;
        t.alloc_pd = alloc_pd;
        t.dealloc_pd = dealloc_pd;
        t.reg_mr = reg_mr;
        t.dereg_mr = dereg_mr;
        t.create_ah = create_ah;
        t.destroy_ah = destroy_ah;
        t.reg_dmabuf_mr = reg_dmabuf_mr;
        return t;
    }();
    return table;
}

}  // namespace fake

namespace epcomm::fabric::ibv {

const Library& library() { return fake::verbs_table(); }

}  // namespace epcomm::fabric::ibv
