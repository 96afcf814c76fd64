// What the files of the module fastgpt._bpe share: texts and arrays of Python, and the parts that bpe.cpp puts
// together.
#pragma once

#include <Python.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bpe/encoder.h"

namespace fastgpt::bpe {

namespace py = pybind11;

using Ids = py::array_t<uint32_t>;
using Offsets = py::array_t<uint64_t, py::array::c_style | py::array::forcecast>;

inline std::string type_name(py::handle object) { return Py_TYPE(object.ptr())->tp_name; }

// A str as UTF-8. Surrogates that have no UTF-8 are first replaced as tiktoken does: pairs are joined, lone ones become
// U+FFFD.
class Utf8 {
 public:
  explicit Utf8(py::handle text) {
    if (!PyUnicode_Check(text.ptr())) throw py::type_error("text: got " + type_name(text) + ", expected str");
    Py_ssize_t size;
    const char* data = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
    if (__builtin_expect(!data, 0)) data = without_surrogates(text, &size);
    view_ = {data, static_cast<size_t>(size)};
  }
  std::string_view view() const { return view_; }

 private:
  const char* without_surrogates(py::handle text, Py_ssize_t* size);
  py::object fixed_;
  std::string_view view_;
};

// Any object with a contiguous buffer of bytes.
class Bytes {
 public:
  explicit Bytes(py::handle object) {
    if (PyObject_GetBuffer(object.ptr(), &buffer_, PyBUF_SIMPLE)) {
      PyErr_Clear();
      throw py::type_error("data: got " + type_name(object) + ", expected bytes");
    }
  }
  ~Bytes() { PyBuffer_Release(&buffer_); }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;
  std::string_view view() const { return {static_cast<const char*>(buffer_.buf), static_cast<size_t>(buffer_.len)}; }

 private:
  Py_buffer buffer_;
};

Ids to_numpy(IdBuffer& ids);
Ids to_numpy(const uint32_t* ids, size_t size);
py::array_t<uint64_t> to_numpy(const std::vector<uint64_t>& values);

std::optional<Pattern> optional_pattern(const std::optional<std::string>& name);

// Spans in characters of a UTF-8 text, as spans in bytes.
std::pair<std::vector<uint64_t>, std::vector<uint64_t>> byte_spans(std::string_view text, const Offsets& begins,
                                                                   const Offsets& ends);

// The bytes of all tokens by id, special ones included, and decoding with them.
class TokenBytes {
 public:
  using Special = std::vector<std::pair<std::string, uint32_t>>;
  // Of two special tokens with one id, the first counts. Throws std::invalid_argument where one has an ordinary
  // token's id. Keeps views of the vocabulary's bytes.
  TokenBytes(const Vocabulary& vocabulary, const Special& special_tokens);
  TokenBytes(const TokenBytes&) = delete;
  TokenBytes& operator=(const TokenBytes&) = delete;

  size_t slots() const { return pieces_.size(); }  // greatest id + 1
  // The bytes of the token with this id, a Python int. Throws KeyError or TypeError.
  std::string_view of(py::handle id) const;
  // Of all ids of an integer array or a sequence of ints, one after the other.
  py::bytes decode_bytes(py::handle ids) const;
  py::str decode(py::handle ids, const char* errors) const;

 private:
  static char* put(char* out, std::string_view piece);
  template <class T, class Room>
  void join_values(const py::array_t<T, py::array::c_style>& ids, const Room& room) const;
  template <class Room>
  bool join_array(py::handle ids, const Room& room) const;
  std::string join(py::handle ids) const;

  std::vector<std::string_view> pieces_;  // empty: no such id
  std::string special_arena_;
};

// The class Trainer.
void bind_trainer(py::module_& m);

}  // namespace fastgpt::bpe
