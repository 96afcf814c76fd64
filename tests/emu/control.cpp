// The settings of a launch, for ctypes.
#include "core.h"

extern "C" void emu_configure(int schedule, int completion, uint64_t seed, int planted) {
  emu::configure(emu::Schedule(schedule), emu::Completion(completion), seed);
  emu::planted = planted;
}
