#include "bind.h"
#include "cuda/activation_launch.cuh"
#include "cuda/dropout_launch.cuh"

using namespace fastgpt::cuda;

// type, kind, x or gradient, kept (backward) or null, y, n
EMU_BIND(activation) {
  const ActivationArgs args = {a.pointer<void>(2), a.pointer<void>(3), a.pointer<void>(4), a.integer(5),
                               static_cast<Activation>(a.integer(1))};
  with_type(static_cast<Type>(a.integer(0)), [&](auto tag) {
    using T = decltype(tag);
    args.kept != nullptr ? launch_activation<T, true>(args, nullptr) : launch_activation<T, false>(args, nullptr);
  });
}

// x's type, the result's type, x, residual or null, y, n, seed, threshold, scale, elements to skip first
EMU_BIND(dropout) {
  const auto type = static_cast<Type>(a.integer(0));
  const int64_t skip = a.integer(9) * (type == Type::kFloat32 ? 4 : 2);  // an address that is not aligned
  const DropoutArgs args = {
      a.pointer<char>(2) + skip,           a.pointer<void>(3), a.pointer<void>(4), a.integer(5), a.pointer<int64_t>(6),
      static_cast<uint32_t>(a.integer(7)), a.number(8)};
  launch_dropout(type, static_cast<Type>(a.integer(1)), args, nullptr);
}
