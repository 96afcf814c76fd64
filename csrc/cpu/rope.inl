// Rotary position embedding (arXiv 2104.09864, equation 34): pairs of a head's elements turn by the angle of their
// position.
//
//   y1 = x1 cos - x2 sin,  y2 = x2 cos + x1 sin;   the inverse (and the gradient) has -sin
//
// The pairs of the first `rotary` elements are (i, i + rotary / 2), as in GPT-NeoX and Llama, or (2i, 2i + 1); the
// elements after them are copied.

// The shuffle whose lane i is lane index(i) of two vectors side by side.
template <class Index>
INLINE VecInt lanes_of(const Index& index) {
  VecInt lanes = {};
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) lanes[i] = index(i);
  return lanes;
}

template <class T>
INLINE void rope_halves(const T* x, T* y, const float* cos, const float* sin, int64_t pairs, float sign) {
  const auto part = [&](int64_t i, int n) {
    const Vec c = load_part(cos + i, n), s = sign * load_part(sin + i, n);
    const Vec a = load_part(x + i, n), b = load_part(x + pairs + i, n);
    store_part(y + i, fma(a, c, -(b * s)), n);
    store_part(y + pairs + i, fma(b, c, a * s), n);
  };
  int64_t i = 0;
  for (; i + kLanes <= pairs; i += kLanes) part(i, kLanes);
  if (i < pairs) part(i, static_cast<int>(pairs - i));
}

template <class T>
INLINE void rope_interleaved(const T* x, T* y, const float* cos, const float* sin, int64_t pairs, float sign) {
  const VecInt even = lanes_of([](int i) { return 2 * i; }), odd = lanes_of([](int i) { return 2 * i + 1; });
  const VecInt low = lanes_of([](int i) { return i / 2 + (i % 2) * kLanes; });
  const VecInt high = lanes_of([](int i) { return i / 2 + (i % 2) * kLanes + kLanes / 2; });
  int64_t i = 0;
  for (; i + kLanes <= pairs; i += kLanes) {
    const Vec c = load(cos + i), s = sign * load(sin + i);
    const Vec left = load(x + 2 * i), right = load(x + 2 * i + kLanes);
    const Vec a = __builtin_shuffle(left, right, even), b = __builtin_shuffle(left, right, odd);
    const Vec first = fma(a, c, -(b * s)), second = fma(b, c, a * s);
    store(y + 2 * i, __builtin_shuffle(first, second, low));
    store(y + 2 * i + kLanes, __builtin_shuffle(first, second, high));
  }
  for (; i < pairs; ++i) {
    const float c = cos[i], s = sign * sin[i], a = to_float(x[2 * i]), b = to_float(x[2 * i + 1]);
    y[2 * i] = from_float<T>(a * c - b * s);
    y[2 * i + 1] = from_float<T>(b * c + a * s);
  }
}

void rope(const RopeArgs& args, int threads) {
  const int64_t pairs = args.rotary / 2, work = std::max<int64_t>(1, args.heads * args.dim);
  const float sign = args.inverse ? -1.0f : 1.0f;
  with_type(args.dtype, [&](auto tag) {
    using T = decltype(tag);
    parallel_for(args.batch * args.time, std::max<int64_t>(1, kGrain / work), threads, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t b = r / args.time, t = r % args.time;
        const float* cos = args.cos + t * pairs;
        const float* sin = args.sin + t * pairs;
        for (int64_t h = 0; h < args.heads; ++h) {
          const auto row = [&](const AttentionTensor& of) {
            return static_cast<T*>(of.data) + b * of.stride_b + h * of.stride_h + t * of.stride_t;
          };
          const T* x = row(args.x);
          T* y = row(args.y);
          args.interleaved ? rope_interleaved(x, y, cos, sin, pairs, sign) : rope_halves(x, y, cos, sin, pairs, sign);
          if (args.rotary < args.dim)
            std::memcpy(y + args.rotary, x + args.rotary, sizeof(T) * (args.dim - args.rotary));
        }
      }
    });
  });
}
