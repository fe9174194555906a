// Linked with the library's sources instead of what opens the vendors' libraries: a libepcomm on a
// machine that seems to have two ConnectX cards, mlx5_0 and mlx5_1, which work. They have no
// atomics where EPCOMM_FAKE_WITHOUT_ATOMICS is set.

#include <stdlib.h>

#include "fake_mlx5.h"

namespace {

const bool made = [] {
    fake::CardOptions card;
    card.network = fake::kRoceV2;
    card.atomics = getenv("EPCOMM_FAKE_WITHOUT_ATOMICS") == nullptr;
    // Until the process ends: ends may be closed as late as that.
    (new fake::World({card, card}))->start();
    return true;
}();

}  // namespace
