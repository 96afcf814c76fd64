#include "bind.h"
#include "cuda/swiglu_launch.cuh"

using namespace fastgpt::cuda;

// type, kind, gate, up or null (the gate is then (rows, 2 cols) and holds both), grad or null, y or dgate, dup or null,
// rows, cols
EMU_BIND(swiglu) {
  const auto type = static_cast<Type>(a.integer(0));
  const int64_t rows = a.integer(7), cols = a.integer(8), half = cols * (type == Type::kFloat32 ? 4 : 2);
  char *gate = a.pointer<char>(2), *up = a.pointer<char>(3), *out = a.pointer<char>(5), *dup = a.pointer<char>(6);
  const bool backward = a.pointer<void>(4) != nullptr;
  const int64_t stride = up == nullptr ? 2 * cols : cols;
  const SwigluArgs args = {gate,
                           up == nullptr ? gate + half : up,
                           a.pointer<void>(4),
                           out,
                           dup == nullptr ? out + half : dup,
                           stride,
                           stride,
                           backward ? stride : cols,
                           rows,
                           cols,
                           static_cast<Activation>(a.integer(1))};
  with_type(type, [&](auto tag) {
    using T = decltype(tag);
    backward ? launch_swiglu<T, true>(args, nullptr) : launch_swiglu<T, false>(args, nullptr);
  });
}
