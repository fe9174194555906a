// How code that waits lets others go on where kernels run on the host: the threads of a block are
// coroutines of one thread of the operating system. Elsewhere, such as in an engine's thread, that
// thread gives way.
#pragma once

namespace emulation {

void give_way();

/// Now and then, where threads race for the same thing; nothing outside a block.
void maybe_give_way();

}  // namespace emulation
