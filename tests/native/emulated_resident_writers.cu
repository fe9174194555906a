// Writers with one mistake each, as kernels beside the GPU-resident engine: each must be caught for
// what it is, and harm its own queue pair only.

#include "gpu_running.cuh"
#include "writer_script.h"

using namespace gpu;
using writers::Mistake;

namespace {

/// One thread plays all writers: which step comes before which is not left to chance.
__global__ void play(const __grid_constant__ Ibgda fabric, Mistake mistake,
                     writers::Outcome* outcome) {
    const RegionKey from = fabric.local[kSend];
    const RegionKey* theirs = &fabric.remote[EPCOMM_FABRIC_MAX_REGIONS];
    const RegionKey to = theirs[kReceive], signals = theirs[kSignals];
    const writers::Script script = {
        fabric::queue_of(fabric, {1, 0}), fabric::queue_of(fabric, {1, 1}),
        {from.address, from.key},         {to.address, to.key},
        {signals.address, signals.key},   mistake};
    fabric::FabricWait wait(fabric, fabric.timeout_ns);
    *outcome = writers::Play<fabric::FabricWait>(script, wait).run();
}

void run_script(Mistake mistake, uint64_t start) {
    Options options;
    options.num_channels = 2;
    options.depth = writers::kSlots;
    options.start = start;
    options.region_bytes = 1 << 20;
    options.line.latency_ns = writers::kLatencyNs;
    Device mine;  // given back after the engines have ended
    auto* outcome = mine.zeros<writers::Outcome>(1);
    RunningWorld world(options, play);
    Node& node = world.nodes[0];
    play<<<1, 1, 0, world.stream>>>(node.fabric, mistake, outcome);
    CUDA(cudaGetLastError());
    world.wait_for_writers();
    writers::Evidence seen;
    seen.start = start;
    world.read(outcome, &seen.outcome);
    seen.received.resize(writers::kAllWords);
    world.read(world.words(1, kReceive), seen.received.data(), writers::kAllWords);
    CHECK(node.server->stop(kStopClean, 5 * kSecond));
    seen.events = node.server->events();
    World::print_events(node);
    writers::expect_caught(mistake, seen);
}

void expect_caught(Mistake mistake) {
    for (uint64_t start : {0u, 65530u}) run_script(mistake, start);
}

}  // namespace

TEST(right_writers_are_not_accused) { expect_caught(Mistake::kNone); }
TEST(a_wrong_index) { expect_caught(Mistake::kWrongIndex); }
TEST(a_slot_reused_too_early) { expect_caught(Mistake::kStoreBeforeRoom); }
TEST(no_check_for_a_free_slot) { expect_caught(Mistake::kNoRoomCheck); }
TEST(no_doorbell_record) { expect_caught(Mistake::kNoRecord); }
TEST(the_record_after_the_doorbell) { expect_caught(Mistake::kRecordAfterDoorbell); }
TEST(the_record_of_the_last_request) { expect_caught(Mistake::kRecordIsLast); }
TEST(the_receive_record) { expect_caught(Mistake::kReceiveRecord); }
TEST(the_doorbell_of_another_queue_pair) { expect_caught(Mistake::kDoorbellElsewhere); }
TEST(published_out_of_order) { expect_caught(Mistake::kPublishOutOfOrder); }
TEST(published_before_it_was_stored) { expect_caught(Mistake::kPublishBeforeStore); }
TEST(a_completion_taken_for_one_request_more) { expect_caught(Mistake::kCompletionOffByOne); }
TEST(a_signal_on_another_queue_pair) { expect_caught(Mistake::kSignalElsewhere); }
TEST(a_flush_that_leaves_one_out) { expect_caught(Mistake::kFlushOffByOne); }
