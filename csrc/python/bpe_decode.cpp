// From ids to bytes and text.
#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "python/bpe.h"

namespace fastgpt::bpe {
namespace {

[[noreturn]] void throw_bad_id(py::handle id) {
  PyErr_SetObject(PyExc_KeyError, py::str("token id {} is not in the vocabulary").format(id).ptr());
  throw py::error_already_set();
}

}  // namespace

TokenBytes::TokenBytes(const Vocabulary& vocabulary, const Special& special_tokens) {
  size_t slots = vocabulary.slots();
  for (const auto& [text, id] : special_tokens) slots = std::max<size_t>(slots, id + size_t{1});
  pieces_.resize(slots);
  for (uint32_t id = 0; id < vocabulary.slots(); ++id) pieces_[id] = vocabulary.bytes(id);
  size_t special_bytes = Vocabulary::kPadding;
  for (const auto& [text, id] : special_tokens) special_bytes += text.size();
  special_arena_.reserve(special_bytes);  // so that it does not move
  for (const auto& [text, id] : special_tokens) {
    if (!vocabulary.bytes(id).empty()) {
      throw std::invalid_argument("the special token " + text + " has the id " + std::to_string(id) +
                                  " of another token");
    }
    if (!pieces_[id].empty()) continue;  // a second name of the id
    special_arena_ += text;
    pieces_[id] = std::string_view(special_arena_).substr(special_arena_.size() - text.size());
  }
  special_arena_.append(Vocabulary::kPadding, '\0');
}

std::string_view TokenBytes::of(py::handle id) const {
  size_t value;
  if (PyLong_CheckExact(id.ptr())) {
    int overflow;
    const long long number = PyLong_AsLongLongAndOverflow(id.ptr(), &overflow);
    if (overflow || number < 0) throw_bad_id(id);
    value = static_cast<size_t>(number);
  } else if (PyLong_Check(id.ptr())) {
    value = PyLong_AsSize_t(id.ptr());
  } else {
    PyObject* const index = PyNumber_Index(id.ptr());
    if (!index) {
      PyErr_Clear();
      throw py::type_error("ids: got " + type_name(id) + ", expected int");
    }
    value = PyLong_AsSize_t(index);
    Py_DECREF(index);
  }
  if (value == static_cast<size_t>(-1) && PyErr_Occurred()) {
    PyErr_Clear();  // negative or too large
    throw_bad_id(id);
  }
  if (value >= pieces_.size() || pieces_[value].empty()) throw_bad_id(id);
  return pieces_[value];
}

// Copies a piece; both ends have kPadding bytes behind it, so that short ones are copied without a loop.
char* TokenBytes::put(char* out, std::string_view piece) {
  static_assert(Vocabulary::kPadding == 16);
  std::memcpy(out, piece.data(), 16);
  if (__builtin_expect(piece.size() > 16, 0)) std::memcpy(out + 16, piece.data() + 16, piece.size() - 16);
  return out + piece.size();
}

template <class T, class Room>
void TokenBytes::join_values(const py::array_t<T, py::array::c_style>& ids, const Room& room) const {
  const T* const data = ids.data();
  const size_t n = static_cast<size_t>(ids.size());
  size_t total = 0;
  for (size_t i = 0; i < n; ++i) {
    const uint64_t id = static_cast<uint64_t>(data[i]);
    if (id >= pieces_.size() || pieces_[id].empty()) throw_bad_id(py::int_(data[i]));
    total += pieces_[id].size();
  }
  char* out = room(total);
  for (size_t i = 0; i < n; ++i) out = put(out, pieces_[static_cast<size_t>(data[i])]);
}

// Writes the bytes of all ids of a one-dimensional integer array to room(how many), which has kPadding more; false
// for what is no array.
template <class Room>
bool TokenBytes::join_array(py::handle ids, const Room& room) const {
  if (!py::isinstance<py::array>(ids)) return false;
  const py::array array = py::reinterpret_borrow<py::array>(ids);
  const char kind = array.dtype().kind();
  if ((kind != 'i' && kind != 'u') || array.ndim() != 1) {
    throw py::type_error("ids: got a " + std::to_string(array.ndim()) + "-dimensional array of kind '" +
                         std::string(1, kind) + "', expected a 1-dimensional one of integers");
  }
  if (array.dtype().equal(py::dtype::of<uint32_t>())) {
    join_values<uint32_t>(array, room);
  } else if (array.dtype().equal(py::dtype::of<uint16_t>())) {
    join_values<uint16_t>(array, room);
  } else if (kind == 'u') {
    join_values<uint64_t>(array, room);
  } else {
    join_values<int64_t>(array, room);  // negative ones become too large
  }
  return true;
}

// The bytes of all ids of a sequence of ints.
std::string TokenBytes::join(py::handle ids) const {
  if (PyUnicode_Check(ids.ptr()) || PyBytes_Check(ids.ptr())) {
    throw py::type_error("ids: got " + type_name(ids) + ", expected a sequence of int");
  }
  PyObject* const fast = PySequence_Fast(ids.ptr(), "");
  if (!fast) {
    PyErr_Clear();
    throw py::type_error("ids: got " + type_name(ids) + ", expected a sequence of int");
  }
  const py::object keep = py::reinterpret_steal<py::object>(fast);
  const Py_ssize_t n = PySequence_Fast_GET_SIZE(fast);
  std::string text;
  size_t size = 0;
  for (Py_ssize_t i = 0; i < n; ++i) {
    const std::string_view piece = of(PySequence_Fast_GET_ITEM(fast, i));
    if (text.size() < size + piece.size() + Vocabulary::kPadding) {
      text.resize(size + piece.size() + Vocabulary::kPadding + size / 2 + static_cast<size_t>(n - i) * 5);
    }
    put(text.data() + size, piece);
    size += piece.size();
  }
  text.resize(size);
  return text;
}

py::bytes TokenBytes::decode_bytes(py::handle ids) const {
  PyObject* bytes = nullptr;
  const bool is_array = join_array(ids, [&](size_t room) {
    bytes = PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(room + Vocabulary::kPadding));
    if (!bytes) throw py::error_already_set();
    return PyBytes_AS_STRING(bytes);
  });
  if (!is_array) {
    const std::string text = join(ids);
    return py::bytes(text);
  }
  const Py_ssize_t size = PyBytes_GET_SIZE(bytes) - static_cast<Py_ssize_t>(Vocabulary::kPadding);
  if (_PyBytes_Resize(&bytes, size)) throw py::error_already_set();
  return py::reinterpret_steal<py::bytes>(bytes);
}

py::str TokenBytes::decode(py::handle ids, const char* errors) const {
  std::unique_ptr<char[]> buffer;  // not initialised, unlike a string's
  std::string joined;
  std::string_view text;
  const bool is_array = join_array(ids, [&](size_t room) {
    buffer.reset(new char[room + Vocabulary::kPadding]);
    text = {buffer.get(), room};
    return buffer.get();
  });
  if (!is_array) text = joined = join(ids);
  PyObject* const object = PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), errors);
  if (!object) throw py::error_already_set();
  return py::reinterpret_steal<py::str>(object);
}

}  // namespace fastgpt::bpe
