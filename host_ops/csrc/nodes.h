// The memory nodes of the machine, and large arrays on them.
//
// Any thread of the pool may read any block, so an array that lies on one node would be read through
// that node's controllers alone, by the threads of the other nodes over their link.

#ifndef FLUXION_NODES_H_
#define FLUXION_NODES_H_

#include <cstdint>
#include <vector>

namespace fluxion {

// Those that have memory; one where the system does not tell.
std::vector<int> memory_nodes();

// Lays the pages that lie wholly within the bytes on the nodes in turn: pages not touched yet when
// they are, others by moving them. Contents stay. Returns false where the system refuses.
bool interleave(void* address, int64_t bytes, const std::vector<int>& nodes);

}  // namespace fluxion

#endif  // FLUXION_NODES_H_
