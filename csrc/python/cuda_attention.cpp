// Attention in the module fastgpt._cuda; shapes and dtypes are checked by fastgpt/ops/cuda_attention.py.
#include "python/cuda_attention.h"

#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cuda/kernels.cuh"

namespace py = pybind11;

namespace fastgpt::cuda {
namespace {

using Address = std::uintptr_t;
using Stride = std::array<int64_t, 3>;  // of batch, head and row, in elements

void* at(Address address) { return reinterpret_cast<void*>(address); }

attention::Strides strides(const Stride& s) { return {s[0], s[1], s[2]}; }

attention::Params params(Address query, const Stride& query_stride, Address key, const Stride& key_stride,
                         Address value, const Stride& value_stride, Address out, const Stride& out_stride, Address lse,
                         const std::array<int, 6>& sizes, float scale, bool causal) {
  attention::Params p = {};
  p.query = at(query), p.key = at(key), p.value = at(value), p.out = at(out), p.lse = static_cast<float*>(at(lse));
  p.query_stride = strides(query_stride), p.key_stride = strides(key_stride);
  p.value_stride = strides(value_stride), p.out_stride = strides(out_stride);
  p.batch = sizes[0], p.heads = sizes[1], p.kv_heads = sizes[2], p.queries = sizes[3], p.keys = sizes[4];
  p.dim = sizes[5], p.scale = scale, p.causal = causal;
  return p;
}

// window_left, window_right; first_queries, first_keys (or 0), sequences, plan; seed (or 0), threshold, keep_factor: as
// in attention_params.cuh.
using Options = std::tuple<int, int, Address, Address, int, Address, Address, uint32_t, float>;

void set_options(attention::Params& p, int chip, const Options& options) {
  Address first_queries, first_keys, plan, seed;
  std::tie(p.window_left, p.window_right, first_queries, first_keys, p.sequences, plan, seed, p.threshold,
           p.keep_factor) = options;
  p.first_queries = static_cast<const int*>(at(first_queries)), p.first_keys = static_cast<const int*>(at(first_keys));
  p.plan = static_cast<int*>(at(plan)), p.seed = static_cast<const int64_t*>(at(seed));
  if (chip == 80 && (p.window_left >= 0 || p.window_right >= 0 || p.first_queries != nullptr || p.seed != nullptr)) {
    throw std::invalid_argument("options: windows, packed sequences and dropout are for chip 90");
  }
}

[[noreturn]] void unknown(int chip) {
  throw std::invalid_argument("chip: expected 80 or 90, got " + std::to_string(chip));
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def(
      "attention",
      [](int chip, int type, Address query, const Stride& query_stride, Address key, const Stride& key_stride,
         Address value, const Stride& value_stride, Address out, const Stride& out_stride, Address lse,
         const std::array<int, 6>& sizes, float scale, bool causal, const Options& options, Address stream) {
        attention::Params p = params(query, query_stride, key, key_stride, value, value_stride, out, out_stride, lse,
                                     sizes, scale, causal);
        if (chip != 80 && chip != 90) unknown(chip);
        set_options(p, chip, options);
        (chip == 80 ? attention_sm80 : attention_sm90)(static_cast<Type>(type), p, stream);
      },
      "sizes: batch, heads, kv_heads, queries, keys, dim. options: window_left, window_right, first_queries, "
      "first_keys, "
      "sequences, plan, seed, threshold, keep_factor. Writes out and lse.",
      py::arg("chip"), py::arg("type"), py::arg("query"), py::arg("query_stride"), py::arg("key"),
      py::arg("key_stride"), py::arg("value"), py::arg("value_stride"), py::arg("out"), py::arg("out_stride"),
      py::arg("lse"), py::arg("sizes"), py::arg("scale"), py::arg("causal"), py::arg("options"), py::arg("stream"));
  m.def(
      "attention_backward",
      [](int chip, int type, Address query, const Stride& query_stride, Address key, const Stride& key_stride,
         Address value, const Stride& value_stride, Address out, const Stride& out_stride, Address lse,
         const std::array<int, 6>& sizes, float scale, bool causal, const Options& options, Address grad,
         const Stride& grad_stride, Address grad_query, const Stride& grad_query_stride, Address grad_key,
         const Stride& grad_key_stride, Address grad_value, const Stride& grad_value_stride, Address delta,
         Address sums, Address stream) {
        attention::Params p = params(query, query_stride, key, key_stride, value, value_stride, out, out_stride, lse,
                                     sizes, scale, causal);
        p.grad = at(grad), p.grad_query = at(grad_query), p.grad_key = at(grad_key), p.grad_value = at(grad_value);
        p.delta = static_cast<float*>(at(delta)), p.grad_stride = strides(grad_stride);
        p.grad_query_stride = strides(grad_query_stride), p.grad_key_stride = strides(grad_key_stride);
        p.grad_value_stride = strides(grad_value_stride);
        p.grad_query_sums = static_cast<float*>(at(sums));
        if (chip != 80 && chip != 90) unknown(chip);
        set_options(p, chip, options);
        (chip == 80 ? attention_backward_sm80 : attention_backward_sm90)(static_cast<Type>(type), p, stream);
      },
      "Writes grad_query, grad_key, grad_value; delta is scratch, (batch, heads, queries) of float32. With sums (chip "
      "90; "
      "zeros of float32, 64 rows of dim for each head and started 64 queries of a sequence) dQ is added there first.",
      py::arg("chip"), py::arg("type"), py::arg("query"), py::arg("query_stride"), py::arg("key"),
      py::arg("key_stride"), py::arg("value"), py::arg("value_stride"), py::arg("out"), py::arg("out_stride"),
      py::arg("lse"), py::arg("sizes"), py::arg("scale"), py::arg("causal"), py::arg("options"), py::arg("grad"),
      py::arg("grad_stride"), py::arg("grad_query"), py::arg("grad_query_stride"), py::arg("grad_key"),
      py::arg("grad_key_stride"), py::arg("grad_value"), py::arg("grad_value_stride"), py::arg("delta"),
      py::arg("sums"), py::arg("stream"));
  m.def(
      "attention_decode",
      [](int type, Address query, const Stride& query_stride, Address key, const Stride& key_stride, Address value,
         const Stride& value_stride, Address out, const Stride& out_stride, Address lse,
         const std::array<int, 6>& sizes, float scale, bool causal, int splits, int keys_per_split, Address part,
         Address part_lse, Address stream) {
        const attention::DecodeParams d = {params(query, query_stride, key, key_stride, value, value_stride, out,
                                                  out_stride, lse, sizes, scale, causal),
                                           static_cast<float*>(at(part)), static_cast<float*>(at(part_lse)), splits,
                                           keys_per_split};
        attention_decode(static_cast<Type>(type), d, stream);
      },
      "As attention, the keys in `splits` parts; part and part_lse are scratch where there are several.",
      py::arg("type"), py::arg("query"), py::arg("query_stride"), py::arg("key"), py::arg("key_stride"),
      py::arg("value"), py::arg("value_stride"), py::arg("out"), py::arg("out_stride"), py::arg("lse"),
      py::arg("sizes"), py::arg("scale"), py::arg("causal"), py::arg("splits"), py::arg("keys_per_split"),
      py::arg("part"), py::arg("part_lse"), py::arg("stream"));
}

}  // namespace fastgpt::cuda
