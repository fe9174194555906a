// Which network cards a rank takes, which address it uses there, and which options are refused:
// over a made-up tree of PCI devices.

#include <arpa/inet.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <stdexcept>

#include "../../csrc/fabric/verbs/device.h"
#include "../../csrc/fabric/verbs/failure.h"
#include "check.h"

using namespace epcomm::fabric;
namespace fs = std::filesystem;

namespace {

// Two processors. Below the first: a switch with GPU 1b and card mlx5_10, one with GPU 1c and cards
// mlx5_2 and mlx5_3. Below the second: GPU 9b and card mlx5_4. rxe0 is no PCI device.
class Tree {
 public:
    Tree() {
        char name[] = "/tmp/epcomm-nics-XXXXXX";
        sysfs_.root = mkdtemp(name);
        gpu("pci0000:00/0000:00:01.0/0000:1b:00.0", 0);
        card("mlx5_10", "pci0000:00/0000:00:01.0/0000:1a:00.0", 0);
        gpu("pci0000:00/0000:00:02.0/0000:1c:00.0", 0);
        card("mlx5_2", "pci0000:00/0000:00:02.0/0000:1d:00.0", 0);
        card("mlx5_3", "pci0000:00/0000:00:02.0/0000:1e:00.0", 0);
        gpu("pci0000:80/0000:80:01.0/0000:9b:00.0", 1);
        card("mlx5_4", "pci0000:80/0000:80:01.0/0000:9a:00.0", 1);
        fs::create_directories(sysfs_.root + "/class/infiniband/rxe0");
    }
    ~Tree() { fs::remove_all(sysfs_.root); }

    std::string chosen(const std::string& options) const {
        std::string names;
        for (const NicName& nic : choose_nics(sysfs_, devices_, parse_verbs_options(options))) {
            names += (names.empty() ? "" : " ") + nic.device;
            if (nic.port != 0) names += ":" + std::to_string(nic.port);
        }
        return names;
    }

 private:
    std::string device(const std::string& path, int processor) {
        const std::string folder = sysfs_.root + "/devices/" + path;
        fs::create_directories(folder);
        std::ofstream(folder + "/numa_node") << processor << "\n";
        return folder;
    }
    void gpu(const std::string& path, int processor) {
        fs::create_directories(sysfs_.root + "/bus/pci/devices");
        fs::create_symlink(device(path, processor),
                           sysfs_.root + "/bus/pci/devices/" + fs::path(path).filename().string());
    }
    void card(const std::string& name, const std::string& path, int processor) {
        fs::create_directories(sysfs_.root + "/class/infiniband/" + name);
        fs::create_symlink(device(path, processor),
                           sysfs_.root + "/class/infiniband/" + name + "/device");
    }

    Sysfs sysfs_;
    std::vector<std::string> devices_ = {"mlx5_10", "mlx5_2", "mlx5_3", "mlx5_4", "rxe0"};
};

GidEntry gid(int32_t index, const char* address, const char* type) {
    GidEntry entry{index, {}, type};
    inet_pton(AF_INET6, address, entry.gid.raw);
    return entry;
}

}  // namespace

TEST(nearest_card_of_each_gpu) {
    const Tree tree;
    CHECK(tree.chosen("pci=0000:1b:00.0") == "mlx5_10");
    CHECK(tree.chosen("pci=0000:1b:00.0 local_rank=3") == "mlx5_10");
    CHECK(tree.chosen("pci=0000:9b:00.0") == "mlx5_4");
}

TEST(equally_near_cards_in_turn_by_local_rank) {
    const Tree tree;
    CHECK(tree.chosen("pci=0000:1c:00.0 local_rank=0") == "mlx5_2");
    CHECK(tree.chosen("pci=0000:1c:00.0 local_rank=1") == "mlx5_3");
    CHECK(tree.chosen("pci=0000:1c:00.0 local_rank=2") == "mlx5_2");
}

TEST(several_cards_nearest_first_other_processor_last) {
    const Tree tree;
    CHECK(tree.chosen("pci=0000:1c:00.0 nics_per_rank=3") == "mlx5_2 mlx5_3 mlx5_10");
    CHECK(tree.chosen("pci=0000:9b:00.0 nics_per_rank=9") == "mlx5_4 mlx5_2 mlx5_3 mlx5_10 rxe0");
}

TEST(without_a_gpu_cards_in_turn_by_number) {
    const Tree tree;
    CHECK(tree.chosen("local_rank=0") == "rxe0");
    CHECK(tree.chosen("local_rank=1") == "mlx5_2");
    CHECK(tree.chosen("local_rank=4") == "mlx5_10");
    CHECK(tree.chosen("local_rank=5") == "rxe0");
}

TEST(explicit_choice_wins) {
    const Tree tree;
    CHECK(tree.chosen("pci=0000:1b:00.0 nic=mlx5_4:2+mlx5_2") == "mlx5_4:2 mlx5_2");
    CHECK(tree.chosen("nic_map=mlx5_2,mlx5_3+mlx5_4 local_rank=1") == "mlx5_3 mlx5_4");
}

TEST(devices_that_do_not_exist_are_named) {
    const Tree tree;
    CHECK(has(refusal([&] { tree.chosen("nic=mlx5_7"); }), "no device \"mlx5_7\" here"));
    CHECK(has(refusal([&] { tree.chosen("nic=mlx5_2:0"); }), "\"mlx5_2:0\""));
    CHECK(has(refusal([&] { tree.chosen("nic_map=mlx5_2 local_rank=1"); }), "local rank 1"));
    CHECK(has(refusal([] { choose_nics(Sysfs(), {}, VerbsOptions()); }), "no RDMA device"));
}

TEST(best_address_of_a_port) {
    const GidEntry link_local = gid(0, "fe80::1", "IB/RoCE v1");
    const GidEntry link_local2 = gid(1, "fe80::1", "RoCE v2");
    const GidEntry first = gid(2, "::ffff:10.0.0.1", "IB/RoCE v1");
    const GidEntry routable = gid(4, "2001:db8::1", "RoCE v2");
    const GidEntry second = gid(7, "::ffff:10.0.0.1", "RoCE v2");
    CHECK(choose_gid({link_local, link_local2, first, routable, second}) == 7);
    CHECK(choose_gid({link_local, link_local2, first, routable}) == 4);
    CHECK(choose_gid({link_local, link_local2, first}) == 1);
    CHECK(choose_gid({link_local, first}) == 2);
    CHECK(choose_gid({gid(0, "::", "RoCE v2")}) == -1);
    CHECK(choose_gid({}) == -1);
}

TEST(options_are_checked) {
    CHECK(parse_verbs_options("sl=3 tc=106 timeout=14").traffic_class == 106);
    const char* const bad[] = {"sl=16",  "tc=-1", "timeout=x", "retries=8",    "gid=1.5",
                               "depth=", "nic=",  "color=1",   "signal=flags", "mtu"};
    for (const char* option : bad) {
        const std::string text = refusal([option] { parse_verbs_options(option); });
        CHECK(has(text, "expected"));
        CHECK(has(text, std::string(option).substr(0, std::string(option).find('=')).c_str()));
    }
}

TEST(a_failure_says_what_was_sent_to_whom) {
    Failure failure{};
    failure.command.op = EPCOMM_FABRIC_PUT_SIGNAL;
    failure.command.peer = 3;
    failure.command.channel = 2;
    failure.command.signal = 9;
    failure.command.bytes = 4096;
    failure.status = ibv::kRetriesExceeded;
    failure.vendor = 0x81;
    failure.queue_pair = 77;
    failure.sent = true;
    failure.nic = "mlx5_0";
    std::string text = describe(failure, VerbsOptions());
    for (const char* part : {"4096 bytes", "node 3", "channel 2", "queue pair 77", "mlx5_0",
                             "retries exceeded", "status 12", "0x81", "at least 8.6"}) {
        CHECK(has(text, part));
    }
    failure.of_signal = true;
    CHECK(has(describe(failure, VerbsOptions()), "raising signal 9"));
}
