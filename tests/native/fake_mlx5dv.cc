// The fake's libmlx5: it takes commands apart by offsets of its own.

#include <fcntl.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "fake_state.h"

namespace fake {

namespace {

const uint16_t kQuery = 0x100, kCreateCq = 0x400, kCreateQp = 0x500, kRst2Init = 0x502,
               kInit2Rtr = 0x503, kRtr2Rts = 0x504, k2Err = 0x507, kQueryQp = 0x50b;

std::string name_of(uint16_t opcode) {
    switch (opcode) {
        case kQuery: return "query_hca_cap";
        case kCreateCq: return "create_cq";
        case kCreateQp: return "create_qp";
        case kRst2Init: return "rst2init";
        case kInit2Rtr: return "init2rtr";
        case kRtr2Rts: return "rtr2rts";
        case k2Err: return "2err";
        case kQueryQp: return "query_qp";
        default: return "unknown command";
    }
}

bool is_supported(ibv::Device* device) {
    return reinterpret_cast<World::Card*>(device)->options.mlx5;
}

ibv::Context* open_device(ibv::Device* device, devx::ContextAttr* attributes) {
    const int error = now().enter("open_device", attributes->flags, attributes->comp_mask);
    if (error != 0) return refuse<ibv::Context>(error);
    auto* context = new Context();
    context->card = reinterpret_cast<World::Card*>(device);
    now().change("context", 1);
    return &context->verbs;
}

int init_obj(devx::Handles* handles, uint64_t type) {
    if (const int error = now().enter("init_obj", type)) return error;
    if (type == 1 << 6) {
        auto* card = *static_cast<World::Card**>(handles->pd.in);
        static_cast<devx::ProtectionDomain*>(handles->pd.out)->pdn = 0x700 + card->nic;
    } else if (type == 1 << 5) {
        static_cast<devx::AddressHandle*>(handles->ah.out)->av =
            &static_cast<Ah*>(handles->ah.in)->vector;
    }
    return 0;
}

/// Record a command; the error it is to end with.
int take(World::Card* card, const void* in, size_t in_bytes, void* out, size_t out_bytes,
         std::vector<uint8_t>* copy) {
    const auto* start = static_cast<const uint8_t*>(in);
    copy->assign(start, start + in_bytes);
    const auto opcode = uint16_t(bits(*copy, 0, 16));
    const int error = now().enter(name_of(opcode));
    const std::lock_guard<std::mutex> lock(now().mutex);
    now().commands.push_back({card->name, opcode, *copy, out_bytes});
    memset(out, 0, out_bytes);
    if (error != 0) {
        // What firmware says: a status and a syndrome.
        static_cast<uint8_t*>(out)[0] = 0x03;
        const uint8_t syndrome[4] = {0x00, 0x12, 0x34, 0x56};
        memcpy(static_cast<uint8_t*>(out) + 4, syndrome, sizeof syndrome);
    }
    return error;
}

void answer(void* out, size_t bytes, uint32_t offset, uint32_t width, uint64_t value) {
    std::vector<uint8_t> copy(static_cast<uint8_t*>(out), static_cast<uint8_t*>(out) + bytes);
    set_bits(&copy, offset, width, value);
    memcpy(out, copy.data(), bytes);
}

int general_cmd(ibv::Context* context, const void* in, size_t in_bytes, void* out,
                size_t out_bytes) {
    World::Card* card = card_of(context);
    std::vector<uint8_t> command;
    if (const int error = take(card, in, in_bytes, out, out_bytes, &command)) return error;
    if (bits(command, 0, 16) != kQuery || out_bytes != 0x10 + 0x1000) return EINVAL;
    const CardOptions& o = card->options;
    const auto put = [&](uint32_t offset, uint32_t width, uint64_t value) {
        answer(out, out_bytes, 0x80 + offset, width, value);
    };
    const uint64_t which = bits(command, 0x30, 16);
    if (which == 1) {
        put(0x88, 8, o.log_max_qp_sz);
        put(0xc8, 8, o.log_max_cq_sz);
        put(0x1c3, 5, o.log_max_msg);
        put(0x21d, 1, o.network != kInfiniband);
        put(0x220, 1, o.overrun_ignore);
        put(0x26b, 5, o.log_bf_reg_size);
        put(0x440, 2, o.network == kInfiniband ? o.timestamp_formats : 0);
    } else if (which == 9) {
        put(0x1e, 2, o.timestamp_formats);
    } else {
        return EINVAL;
    }
    return 0;
}

void make_queue_pair(Object* object, const std::vector<uint8_t>& in) {
    World::State& state = now();
    Umem& ring = *state.umems.at(uint32_t(bits(in, 0x840, 32)));
    Umem& record = *state.umems.at(uint32_t(bits(in, 0xc0 + 0x720, 32)));
    const auto completions = uint32_t(bits(in, 0xc0 + 0x3e8, 24));
    uint8_t* doorbell = state.registers.at(uint32_t(bits(in, 0xc0 + 0x68, 24)));
    epcomm::emulated::QueueMemory memory{};
    memory.ring = reinterpret_cast<epcomm::mlx5::Block*>(ring.start + bits(in, 0x800, 64));
    memory.record =
        reinterpret_cast<epcomm::mlx5::Be32*>(record.start + bits(in, 0xc0 + 0x500, 64));
    memory.doorbell = reinterpret_cast<uint64_t*>(doorbell);
    memory.completions =
        reinterpret_cast<epcomm::mlx5::Completion*>(state.completions.at(completions));
    memory.num_blocks = 1u << bits(in, 0xc0 + 0x51, 4);
    memory.num_completions = 1u << state.log_sizes.at(completions);
    object->number =
        world->pause([&] { return world->engine().add_queue(object->card->nic, memory); });
    state.pairs[{object->card, object->number}] = {object->card};
}

devx::Object* obj_create(ibv::Context* context, const void* in, size_t in_bytes, void* out,
                         size_t out_bytes) {
    World::Card* card = card_of(context);
    std::vector<uint8_t> command;
    if (const int error = take(card, in, in_bytes, out, out_bytes, &command)) {
        return refuse<devx::Object>(error);
    }
    auto object = std::make_unique<Object>();
    *object = {card, bits(command, 0, 16) == kCreateQp, 0, nullptr, 0};
    if (object->is_queue_pair) {
        make_queue_pair(object.get(), command);
    } else {
        Umem& memory = *now().umems.at(uint32_t(bits(command, 0x2c0, 32)));
        object->number = now().next_number++;
        now().completions[object->number] = memory.start + bits(command, 0x280, 64);
        now().log_sizes[object->number] = uint32_t(bits(command, 0x80 + 0x63, 5));
    }
    answer(out, out_bytes, 0x48, 24, object->number);
    now().change(object->is_queue_pair ? "queue pair" : "completion queue", 1);
    return reinterpret_cast<devx::Object*>(object.release());
}

/// Whom an address path leads to.
World::Card* find_peer(const World::Card& card, const std::vector<uint8_t>& in) {
    const uint32_t path = 0xc0 + 0xc0;
    for (const auto& other : now().cards) {
        const bool same = card.options.network == kInfiniband
                              ? bits(in, path + 0x30, 16) == other->options.lid
                              : memcmp(&in[(path + 0x80) / 8], other->gid.raw, 16) == 0 &&
                                    memcmp(&in[(path + 0x130) / 8], other->mac, 6) == 0;
        if (same) return other.get();
    }
    return nullptr;
}

int obj_modify(devx::Object* handle, const void* in, size_t in_bytes, void* out, size_t out_bytes) {
    auto* object = reinterpret_cast<Object*>(handle);
    std::vector<uint8_t> command;
    if (const int error = take(object->card, in, in_bytes, out, out_bytes, &command)) return error;
    if (bits(command, 0x48, 24) != object->number) return EINVAL;
    World::State::Pair& pair = now().pairs.at({object->card, object->number});
    if (bits(command, 0, 16) == kInit2Rtr) {
        pair.remote = uint32_t(bits(command, 0xc0 + 0xa8, 24));
        pair.peer = find_peer(*object->card, command);
        if (pair.peer == nullptr) return EINVAL;
    } else if (bits(command, 0, 16) == kRtr2Rts) {
        world->pause([&] {
            world->engine().connect(object->card->nic, object->number, pair.peer->nic, pair.remote);
            return 0;
        });
    }
    return 0;
}

int obj_query(devx::Object* handle, const void* in, size_t in_bytes, void* out, size_t out_bytes) {
    auto* object = reinterpret_cast<Object*>(handle);
    std::vector<uint8_t> command;
    if (const int error = take(object->card, in, in_bytes, out, out_bytes, &command)) return error;
    answer(out, out_bytes, 0xc0, 4, now().pairs.at({object->card, object->number}).state);
    return 0;
}

int obj_destroy(devx::Object* handle) {
    auto* object = reinterpret_cast<Object*>(handle);
    now().enter(object->is_queue_pair ? "destroy_qp" : "destroy_cq");
    if (object->is_queue_pair) {
        // Its memory will end.
        world->pause([object] {
            world->engine().remove_queue(object->card->nic, object->number);
            return 0;
        });
    }
    now().change(object->is_queue_pair ? "queue pair" : "completion queue", -1);
    delete object;
    return 0;
}

devx::Umem* make_umem(void* start, uint64_t bytes) {
    auto umem = std::make_unique<Umem>();
    const uint32_t id = now().next_number++;
    *umem = {{id}, static_cast<uint8_t*>(start), bytes};
    devx::Umem* out = &umem->out;
    now().umems[id] = std::move(umem);
    now().change("umem", 1);
    return out;
}

devx::Umem* umem_reg(ibv::Context*, void* start, size_t bytes, uint32_t access) {
    const int error = now().enter("umem_reg", uint64_t(start), bytes, access);
    return error != 0 ? refuse<devx::Umem>(error) : make_umem(start, bytes);
}

devx::Umem* umem_reg_ex(ibv::Context*, devx::UmemIn* in) {
    const int error = now().enter("umem_reg_ex", uint64_t(in->addr), in->size, in->comp_mask);
    if (error != 0 || fcntl(in->dmabuf_fd, F_GETFD) < 0) {
        return refuse<devx::Umem>(error != 0 ? error : EBADF);
    }
    return make_umem(reinterpret_cast<void*>(now().exported + uint64_t(in->addr)), in->size);
}

int umem_dereg(devx::Umem* umem) {
    now().change("umem", -1);
    now().umems.erase(umem->umem_id);
    return 0;
}

devx::Uar* alloc_uar(ibv::Context* context, uint32_t type) {
    World::Card* card = card_of(context);
    const int error = now().enter("alloc_uar", type);
    if (error != 0) return refuse<devx::Uar>(error);
    if (type == 1u << 31 && !card->options.dedicated_registers) {
        return refuse<devx::Uar>(EOPNOTSUPP);
    }
    // The context keeps the one for all; to give it back does nothing.
    if (type == 1 && card->one_for_all != nullptr) return card->one_for_all;
    auto* uar = new Uar{};
    uar->shared = type == 1;
    auto* page = static_cast<uint8_t*>(aligned_alloc(4096, 4096));
    memset(page, 0, 4096);
    uar->out.base_addr = page;
    uar->out.reg_addr = page + 0x800;
    uar->out.page_id = now().next_number++;
    now().registers[uar->out.page_id] = page + 0x800;
    if (uar->shared)
        card->one_for_all = &uar->out;
    else
        now().change("register", 1);
    return &uar->out;
}

void free_uar(devx::Uar* uar) {
    now().enter("free_uar");
    if (reinterpret_cast<Uar*>(uar)->shared) return;
    now().change("register", -1);
    free(uar->base_addr);
    delete reinterpret_cast<Uar*>(uar);
}

int query_eqn(ibv::Context*, uint32_t vector, uint32_t* number) {
    *number = 0x1f;
    return now().enter("query_eqn", vector);
}

devx::EventChannel* create_event_channel(ibv::Context*, int flags) {
    const int error = now().enter("create_event_channel", uint64_t(flags));
    if (error != 0) return refuse<devx::EventChannel>(error);
    auto* channel = new Channel();
    channel->out.fd = eventfd(0, EFD_SEMAPHORE | EFD_NONBLOCK);
    now().change("event channel", 1);
    return &channel->out;
}

void destroy_event_channel(devx::EventChannel* channel) {
    now().change("event channel", -1);
    close(channel->fd);
    delete reinterpret_cast<Channel*>(channel);
}

int subscribe(devx::EventChannel* channel, devx::Object* handle, uint16_t bytes, uint16_t* types,
              uint64_t cookie) {
    auto* object = reinterpret_cast<Object*>(handle);
    const int error = now().enter("subscribe", bytes, types[0], cookie);
    if (error == 0 && object->is_queue_pair) {
        World::State::Pair& pair = now().pairs.at({object->card, object->number});
        pair.cookie = cookie;
        pair.channel = reinterpret_cast<Channel*>(channel);
    }
    return error;
}

ssize_t get_event(devx::EventChannel* handle, devx::Event* out, size_t bytes) {
    auto* channel = reinterpret_cast<Channel*>(handle);
    uint64_t one;
    if (read(handle->fd, &one, sizeof one) != sizeof one || bytes < sizeof *out) return -1;
    *out = channel->events.front();
    channel->events.pop_front();
    return sizeof *out;
}

}  // namespace

const devx::Library& mlx5dv_table() {
    static devx::Library table = [] {
        devx::Library t{};
        t.is_supported = is_supported;
        t.open_device = open_device;
        t.init_obj = init_obj;
        t.devx_general_cmd = general_cmd;
        t.devx_obj_create = obj_create;
        t.devx_obj_modify = obj_modify;
        t.devx_obj_query = obj_query;
        t.devx_obj_destroy = obj_destroy;
        t.devx_umem_reg = umem_reg;
        t.devx_umem_dereg = umem_dereg;
        t.devx_alloc_uar = alloc_uar;
        t.devx_free_uar = free_uar;
        t.devx_query_eqn = query_eqn;
        t.devx_create_event_channel = create_event_channel;
        t.devx_destroy_event_channel = destroy_event_channel;
        t.devx_subscribe_devx_event = subscribe;
        t.devx_get_event = get_event;
        return t;
    }();
    table.devx_umem_reg_ex = world->has_umem_reg_ex ? umem_reg_ex : nullptr;
    return table;
}

}  // namespace fake

namespace epcomm::fabric::devx {

const Library& library() { return fake::mlx5dv_table(); }

}  // namespace epcomm::fabric::devx
