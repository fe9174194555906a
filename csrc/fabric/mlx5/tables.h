// What producers are given: send queues and keys, in memory of theirs.
#pragma once

#include "../ibgda.h"
#include "resources.h"

namespace epcomm::fabric::devx {

/// Fill in the tables. `remote`: keys of every node, [num_nodes][num_planes][MAX_REGIONS]. What is
/// returned lacks only what does not depend on the transport.
epcomm_ibgda fill_tables(Resources* all, const std::vector<epcomm_region_key>& remote);

/// Wait until every completion that producers have asked for has come, at most so long. Nobody
/// posts any more.
void drain(const Resources& all, int64_t timeout_ns);

}  // namespace epcomm::fabric::devx
