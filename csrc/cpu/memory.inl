// Included inside an anonymous namespace: by engine.inl, and by what orders the kernels.

// Memory of the calling thread's own, aligned to a cache line, one block for each kWhich. It keeps its size between
// calls, not its content.
template <int kWhich>
void* thread_memory(int64_t bytes) {
  constexpr size_t kLineBytes = 64;
  static thread_local std::vector<float> buffer;
  const size_t floats = (static_cast<size_t>(bytes) + kLineBytes) / sizeof(float) + 1;
  if (buffer.size() < floats) buffer = std::vector<float>(floats);
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(buffer.data()) + kLineBytes - 1) & ~(kLineBytes - 1));
}
