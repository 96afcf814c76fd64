// Splitting work over OpenMP threads.

// Calls body(begin, end) on disjoint ranges that cover [0, n): one range a thread, on one thread where a thread would
// get fewer than `grain` items (a parallel region costs 4 to 10 us).
template <class Body>
INLINE void parallel_for(int64_t n, int64_t grain, int threads, const Body& body) {
  if (n <= 0) return;
  int64_t most = std::max<int64_t>(1, n / std::max<int64_t>(1, grain));
  int team = static_cast<int>(std::min<int64_t>(threads, most));
  if (team <= 1) {
    body(int64_t{0}, n);
    return;
  }
#pragma omp parallel num_threads(team)
  {
    int64_t count = omp_get_num_threads(), id = omp_get_thread_num();
    int64_t chunk = (n + count - 1) / count;
    int64_t begin = std::min(n, id * chunk), end = std::min(n, begin + chunk);
    if (begin < end) body(begin, end);
  }
}

// Elements that one thread should at least have in a memory-bound pass.
constexpr int64_t kGrain = 16384;

// Elements that are never split between threads in a pointwise pass.
constexpr int64_t kElementBlock = 64;

// Results of this many bytes are written past the caches: most of it would have left them before anything reads it.
constexpr int64_t kPastCaches = 32 << 20;

// Calls body(pointer tag) with the C++ type of `dtype`.
template <class Body>
INLINE void with_type(DType dtype, const Body& body) {
  if (dtype == DType::kBFloat16) {
    body(BFloat16{});
  } else {
    body(float{});
  }
}

// A float buffer of a thread's own for one row or task; products have theirs (product.inl).
INLINE float* scratch(int64_t floats) { return static_cast<float*>(thread_memory<4>(floats * int64_t{sizeof(float)})); }
