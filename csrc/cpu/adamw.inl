// The norm of all gradients, and AdamW (arXiv 1711.05101, algorithm 2) with clipping, each in one pass over all
// parameters.
//
//   g = grad * grad_scale                        (clipping: grad_scale = min(1, max_norm / norm))
//   p = p - lr * weight_decay * p
//   m = m + (1 - beta1) (g - m),  v = beta2 v + (1 - beta2) g^2
//   p = p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//
// On the way it can write p rounded to bf16 and set the gradients to zero: their lines are in the cache already.
//
// Work is cut into blocks of elements that do not depend on the number of threads; the norm's blocks are summed in
// order.

constexpr int64_t kAdamWBlock = 16384;

INLINE Vec sqrt(Vec v) {
#if FASTGPT_LANES == 16
  return (Vec)_mm512_maskz_sqrt_ps(0xffff, (__m512)v);  // the unmasked form warns falsely in g++ 12
#elif FASTGPT_LANES == 8
  return (Vec)_mm256_sqrt_ps((__m256)v);
#else
  for (int i = 0; i < kLanes; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

// Calls body(tensor, begin, end, block) for every block of every tensor, blocks numbered through.
template <class Sizes, class Body>
INLINE void for_each_block(int64_t count, const Sizes& size_of, int threads, const Body& body) {
  std::vector<int64_t> first(count + 1, 0);  // block
  for (int64_t i = 0; i < count; ++i) first[i + 1] = first[i] + (size_of(i) + kAdamWBlock - 1) / kAdamWBlock;
  parallel_for(first[count], 1, threads, [&](int64_t begin, int64_t end) {
    int64_t tensor = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (int64_t block = begin; block < end; ++block) {
      while (block >= first[tensor + 1]) ++tensor;
      const int64_t from = (block - first[tensor]) * kAdamWBlock;
      body(tensor, from, std::min(size_of(tensor), from + kAdamWBlock), block);
    }
  });
}

double grad_norm(const float* const* grads, const int64_t* sizes, int64_t count, int threads) {
  int64_t blocks = 0;
  for (int64_t i = 0; i < count; ++i) blocks += (sizes[i] + kAdamWBlock - 1) / kAdamWBlock;
  std::vector<double> sums(blocks);
  for_each_block(
      count, [&](int64_t i) { return sizes[i]; }, threads,
      [&](int64_t tensor, int64_t begin, int64_t end, int64_t block) {
        const float* g = grads[tensor];
        Vec parts[4] = {};
        int64_t i = begin;
        for (; i + 4 * kLanes <= end; i += 4 * kLanes) {
          for (int k = 0; k < 4; ++k) {
            Vec v = load(g + i + k * kLanes);
            parts[k] = fma(v, v, parts[k]);
          }
        }
        Vec total = (parts[0] + parts[1]) + (parts[2] + parts[3]);
        for (; i < end; i += kLanes) {
          Vec v = load_part(g + i, static_cast<int>(std::min<int64_t>(kLanes, end - i)));
          total = fma(v, v, total);
        }
        sums[block] = sum(total);
      });
  double total = 0;
  for (double part : sums) total += part;
  return std::sqrt(total);
}

void adamw(const AdamWArgs& a, int threads) {
  const Vec rest1 = splat(static_cast<float>(1.0 - a.beta1)), rest2 = splat(static_cast<float>(1.0 - a.beta2));
  const Vec keep2 = splat(static_cast<float>(a.beta2));
  const double correction1 = 1.0 - std::pow(a.beta1, static_cast<double>(a.step));
  const double correction2 = 1.0 - std::pow(a.beta2, static_cast<double>(a.step));
  const float rate = static_cast<float>(a.lr / correction1);
  const float inverse_root = static_cast<float>(1.0 / std::sqrt(correction2));
  for_each_block(
      a.count, [&](int64_t i) { return a.tensors[i].size; }, threads,
      [&](int64_t tensor, int64_t begin, int64_t end, int64_t) {
        const AdamWTensor& t = a.tensors[tensor];
        const float decay = static_cast<float>(1.0 - a.lr * t.weight_decay);
        BFloat16* shadow = static_cast<BFloat16*>(t.shadow);
        for (int64_t i = begin; i < end; i += kLanes) {
          const int n = static_cast<int>(std::min<int64_t>(kLanes, end - i));
          Vec g = load_part(t.grad + i, n) * a.grad_scale;
          Vec m = load_part(t.exp_avg + i, n);
          m = fma(g - m, rest1, m);
          Vec v = fma(load_part(t.exp_avg_sq + i, n), keep2, rest2 * (g * g));
          Vec p = load_part(t.param + i, n) * decay;
          p = p - rate * m / fma(sqrt(v), splat(inverse_root), splat(a.eps));
          store_part(t.exp_avg + i, m, n);
          store_part(t.exp_avg_sq + i, v, n);
          store_part(t.param + i, p, n);
          if (shadow != nullptr) store_part(shadow + i, p, n);
          if (a.zero_grads) store_part(t.grad + i, Vec{}, n);
        }
      });
}
