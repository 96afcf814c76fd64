// The async proxy on the emulator: shared memory as copies and products see it, and what threads send out of it in
// bulk.
#pragma once

#include <cstdint>

#include "hopper.h"

namespace emu {

// The byte of the second copy of dynamic shared memory. Copies write both; what threads wrote comes here by the fence.
unsigned char* async_byte(uint32_t address);
void fence_proxy_async();

void tensor_store(const CUtensorMap& map, uint32_t shared, const int (&at)[4]);
void bulk_add_float(float* global, uint32_t shared, uint32_t bytes);
void bulk_commit();
void bulk_wait(unsigned in_flight);

}  // namespace emu
