// Texts and arrays of Python for the tokenizer.
#include <cstring>
#include <memory>
#include <stdexcept>

#include "python/bpe.h"

namespace fastgpt::bpe {

const char* Utf8::without_surrogates(py::handle text, Py_ssize_t* size) {
  if (!PyErr_ExceptionMatches(PyExc_UnicodeEncodeError)) throw py::error_already_set();
  PyErr_Clear();
  fixed_ = text.attr("encode")("utf-16", "surrogatepass").attr("decode")("utf-16", "replace");
  const char* const data = PyUnicode_AsUTF8AndSize(fixed_.ptr(), size);
  if (!data) throw py::error_already_set();
  return data;
}

Ids to_numpy(IdBuffer& ids) {
  ids.shrink();
  if (!ids.size()) return Ids(0);
  auto owner = std::make_unique<IdBuffer>(std::move(ids));
  const IdBuffer& kept = *owner;
  const py::capsule capsule(owner.get(), [](void* p) { delete static_cast<IdBuffer*>(p); });
  owner.release();
  return Ids({kept.size()}, {sizeof(uint32_t)}, kept.data(), capsule);
}

// By NumPy's own function: pybind11's constructor takes as long as encoding a short text.
Ids to_numpy(const uint32_t* ids, size_t size) {
  const auto& numpy = py::detail::npy_api::get();
  const py::ssize_t shape = static_cast<py::ssize_t>(size);
  PyObject* const type = py::dtype::of<uint32_t>().release().ptr();  // the array keeps it
  auto array = py::reinterpret_steal<Ids>(
      numpy.PyArray_NewFromDescr_(numpy.PyArray_Type_, type, 1, &shape, nullptr, nullptr, 0, nullptr));
  if (!array) throw py::error_already_set();
  std::memcpy(array.mutable_data(), ids, size * sizeof(uint32_t));
  return array;
}

py::array_t<uint64_t> to_numpy(const std::vector<uint64_t>& values) {
  return py::array_t<uint64_t>(values.size(), values.data());
}

std::optional<Pattern> optional_pattern(const std::optional<std::string>& name) {
  if (!name) return std::nullopt;
  return pattern_from_name(*name);
}

// They ascend, so one walk over the text finds them all.
std::pair<std::vector<uint64_t>, std::vector<uint64_t>> byte_spans(std::string_view text, const Offsets& begins,
                                                                   const Offsets& ends) {
  if (begins.ndim() != 1 || ends.ndim() != 1 || begins.size() != ends.size()) {
    throw std::invalid_argument("begins and ends: expected two arrays of one length");
  }
  std::vector<uint64_t> from(begins.data(), begins.data() + begins.size());
  std::vector<uint64_t> to(ends.data(), ends.data() + ends.size());
  size_t character = 0, byte = 0;
  auto seek = [&](uint64_t& place) {
    if (place < character) throw std::invalid_argument("begins and ends: expected ascending spans");
    while (character < place) {
      if (byte >= text.size()) throw std::invalid_argument("ends: a span outside of the text");
      ++byte;
      while (byte < text.size() && (static_cast<uint8_t>(text[byte]) & 0xC0) == 0x80) ++byte;
      ++character;
    }
    place = byte;
  };
  for (size_t i = 0; i < from.size(); ++i) {
    seek(from[i]);
    seek(to[i]);
  }
  return {std::move(from), std::move(to)};
}

}  // namespace fastgpt::bpe
