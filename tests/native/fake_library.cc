// Linked with the library's sources instead of what opens the vendors' libraries: a libepcomm on a
// machine that seems to have two ConnectX cards, mlx5_0 and mlx5_1, which work.

#include "fake_mlx5.h"

namespace {

const bool made = [] {
    fake::CardOptions card;
    card.network = fake::kRoceV2;
    // Until the process ends: ends may be closed as late as that.
    (new fake::World({card, card}))->start();
    return true;
}();

}  // namespace
