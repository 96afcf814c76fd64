#include "bind.h"
#include "cuda/launch.cuh"
#include "cuda/rows.cuh"

EMU_BIND(row_softmax) {
  const int rows = a.integer(2), columns = a.integer(3);
  launch(row_softmax_kernel, dim3(rows), dim3(kRowThreads), columns * sizeof(float), nullptr, a.pointer<const float>(0),
         a.pointer<float>(1), rows, columns);
}

EMU_BIND(staged_copy) {
  const int vectors = a.integer(2), threads = a.integer(3);
  launch(staged_copy_kernel, dim3(1), dim3(threads), 32 * threads, nullptr, a.pointer<const uint4>(0),
         a.pointer<uint4>(1), vectors);
}
