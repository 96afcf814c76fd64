// The module fastgpt._bpe: the tokenizer's encoder, decoder and trainer for Python. Bindings only: formats, names of
// encodings and the public classes are in fastgpt/tokenizer.
#include <Python.h>
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "bpe/encoder.h"
#include "bpe/special.h"
#include "bpe/trainer.h"
#include "bpe/unicode_tables.h"

namespace py = pybind11;
using namespace fastgpt::bpe;

namespace {

using Ids = py::array_t<uint32_t>;
using Offsets = py::array_t<uint64_t, py::array::c_style | py::array::forcecast>;

constexpr size_t kReleaseBytes = 2048;  // shorter texts are done before another thread could take the GIL

std::string type_name(py::handle object) { return Py_TYPE(object.ptr())->tp_name; }

// A str as UTF-8. Surrogates that have no UTF-8 are first replaced as tiktoken does: pairs are joined, lone ones become
// U+FFFD.
class Utf8 {
 public:
  explicit Utf8(py::handle text) {
    if (!PyUnicode_Check(text.ptr())) throw py::type_error("text: got " + type_name(text) + ", expected str");
    Py_ssize_t size;
    const char* data = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
    if (__builtin_expect(!data, 0)) {
      if (!PyErr_ExceptionMatches(PyExc_UnicodeEncodeError)) throw py::error_already_set();
      PyErr_Clear();
      fixed_ = text.attr("encode")("utf-16", "surrogatepass").attr("decode")("utf-16", "replace");
      data = PyUnicode_AsUTF8AndSize(fixed_.ptr(), &size);
      if (!data) throw py::error_already_set();
    }
    view_ = {data, static_cast<size_t>(size)};
  }
  std::string_view view() const { return view_; }

 private:
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

Ids to_numpy(IdBuffer& ids) {
  ids.shrink();
  if (!ids.size()) return Ids(0);
  auto owner = std::make_unique<IdBuffer>(std::move(ids));
  const IdBuffer& kept = *owner;
  const py::capsule capsule(owner.get(), [](void* p) { delete static_cast<IdBuffer*>(p); });
  owner.release();
  return Ids({kept.size()}, {sizeof(uint32_t)}, kept.data(), capsule);
}

py::array_t<uint64_t> to_numpy(const std::vector<uint64_t>& values) {
  return py::array_t<uint64_t>(values.size(), values.data());
}

std::optional<Pattern> optional_pattern(const std::optional<std::string>& name) {
  if (!name) return std::nullopt;
  return pattern_from_name(*name);
}

[[noreturn]] void throw_bad_id(py::handle id) {
  PyErr_SetObject(PyExc_KeyError, py::str("token id {} is not in the vocabulary").format(id).ptr());
  throw py::error_already_set();
}

// Spans in characters of a UTF-8 text, as spans in bytes. They ascend, so one walk over the text finds them all.
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

class Bpe {
 public:
  Bpe(const py::dict& tokens, const std::vector<std::pair<std::string, uint32_t>>& special_tokens,
      const std::vector<std::pair<uint32_t, uint32_t>>& merges, const std::optional<std::string>& pattern,
      bool whole_first)
      : encoder_(Vocabulary(token_list(tokens), merges), optional_pattern(pattern), whole_first),
        special_tokens_(special_tokens),
        all_special_(check_special(special_tokens)) {
    const Vocabulary& vocabulary = encoder_.vocabulary();
    size_t slots = vocabulary.slots();
    for (const auto& [text, id] : special_tokens_) slots = std::max<size_t>(slots, id + size_t{1});
    pieces_.resize(slots);
    for (uint32_t id = 0; id < vocabulary.slots(); ++id) pieces_[id] = vocabulary.bytes(id);
    size_t special_bytes = Vocabulary::kPadding;
    for (const auto& [text, id] : special_tokens_) special_bytes += text.size();
    special_arena_.reserve(special_bytes);  // so that it does not move
    for (const auto& [text, id] : special_tokens_) {
      if (!vocabulary.bytes(id).empty()) {
        throw std::invalid_argument("the special token " + text + " has the id " + std::to_string(id) +
                                    " of another token");
      }
      if (!pieces_[id].empty()) continue;  // a second name of the id
      special_arena_ += text;
      pieces_[id] = std::string_view(special_arena_).substr(special_arena_.size() - text.size());
    }
    special_arena_.append(Vocabulary::kPadding, '\0');
    ints_.resize(slots);
  }

  ~Bpe() {
    for (PyObject* object : ints_) Py_XDECREF(object);
  }
  Bpe(const Bpe&) = delete;
  Bpe& operator=(const Bpe&) = delete;

  py::list encode_ordinary(py::handle text) const {
    const Utf8 utf8(text);
    const std::string_view view = utf8.view();
    if (view.size() > kReleaseBytes) return to_list(encode_text(view));
    uint32_t ids[kReleaseBytes + Encoder::kShortSlack];
    static_assert(kReleaseBytes <= Encoder::kShortBytes);
    return to_list(ids, encoder_.encode_short(view, ids));
  }

  Ids encode_ordinary_numpy(py::handle text) const {
    IdBuffer ids = encode_text(Utf8(text).view());
    return to_numpy(ids);
  }

  py::list encode_bytes(py::handle data) const { return to_list(encode_text(Bytes(data).view())); }

  Ids encode_bytes_numpy(py::handle data) const {
    IdBuffer ids = encode_text(Bytes(data).view());
    return to_numpy(ids);
  }

  // The special tokens named in `allowed` get their ids; all others are ordinary text.
  IdBuffer encode_allowed(py::handle object, const py::iterable& allowed) const {
    std::vector<std::pair<std::string, uint32_t>> chosen;
    for (const auto& name : allowed) {
      const std::string text = py::cast<std::string>(name);
      for (const auto& special : special_tokens_) {
        if (special.first == text) chosen.push_back(special);
      }
    }
    const SpecialFinder some(chosen.size() == special_tokens_.size() ? decltype(chosen){} : chosen);
    const SpecialFinder& finder = chosen.size() == special_tokens_.size() ? all_special_ : some;
    const Utf8 utf8(object);
    const std::string_view text = utf8.view();
    IdBuffer ids;
    py::gil_scoped_release release;
    for (size_t at = 0; at <= text.size();) {
      const SpecialFinder::Match match = finder.find(text, at);
      encoder_.encode(text.substr(at, match.begin == SpecialFinder::npos ? match.begin : match.begin - at), ids);
      if (match.begin == SpecialFinder::npos) break;
      ids.push_back(match.id);
      at = match.end;
    }
    return ids;
  }

  py::list encode(py::handle text, const py::iterable& allowed) const { return to_list(encode_allowed(text, allowed)); }

  Ids encode_numpy(py::handle text, const py::iterable& allowed) const {
    IdBuffer ids = encode_allowed(text, allowed);
    return to_numpy(ids);
  }

  // The special token that occurs first in the text, or None.
  std::optional<std::string> find_special(py::handle text) const {
    const Utf8 utf8(text);
    const SpecialFinder::Match match = all_special_.find(utf8.view(), 0);
    if (match.begin == SpecialFinder::npos) return std::nullopt;
    return std::string(utf8.view().substr(match.begin, match.end - match.begin));
  }

  // Ids of the pre-tokens [begins[i], ends[i]), counted in characters of the text.
  Ids encode_spans(py::handle text, const Offsets& begins, const Offsets& ends) const {
    const Utf8 utf8(text);
    const auto [from, to] = byte_spans(utf8.view(), begins, ends);
    IdBuffer ids;
    {
      py::gil_scoped_release release;
      encoder_.encode_spans(utf8.view(), from.data(), to.data(), from.size(), ids);
    }
    return to_numpy(ids);
  }

  py::list encode_piece(py::handle piece) const {
    const Bytes bytes(piece);
    IdBuffer ids;
    encoder_.encode_piece(bytes.view(), ids);
    return to_list(ids);
  }

  size_t count(py::handle text) const {
    const Utf8 utf8(text);
    py::gil_scoped_release release;
    return encoder_.count(utf8.view());
  }

  size_t prefix_bytes(py::handle text, size_t max_ids) const {
    const Utf8 utf8(text);
    py::gil_scoped_release release;
    return encoder_.prefix_bytes(utf8.view(), max_ids);
  }

  py::tuple encode_batch_numpy(const py::list& texts, size_t threads) const {
    auto [ids, ends] = batch(texts, threads);
    std::vector<uint64_t> offsets{0};
    offsets.insert(offsets.end(), ends.begin(), ends.end());
    return py::make_tuple(to_numpy(ids), to_numpy(offsets));
  }

  py::list encode_batch(const py::list& texts, size_t threads) const {
    const auto [ids, ends] = batch(texts, threads);
    py::list lists(ends.size());
    for (size_t i = 0, at = 0; i < ends.size(); at = ends[i++]) {
      PyList_SET_ITEM(lists.ptr(), i, to_list(ids.data() + at, ends[i] - at).release().ptr());
    }
    return lists;
  }

  py::array_t<uint64_t> pretokens(py::handle text) const {
    const Utf8 utf8(text);
    std::vector<uint64_t> ends;
    encoder_.pretokens(utf8.view(), ends);
    return to_numpy(ends);
  }

  std::optional<uint32_t> find_token(py::handle bytes) const {
    const uint32_t id = encoder_.vocabulary().find(Bytes(bytes).view());
    if (id == kNone) return std::nullopt;
    return id;
  }

  py::bytes token_bytes(py::handle id) const {
    const std::string_view piece = piece_of(id);
    return py::bytes(piece.data(), piece.size());
  }

  py::bytes decode_bytes(py::handle ids) const {
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

  py::str decode(py::handle ids, const char* errors) const {
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

  size_t cache_bytes() const { return encoder_.cache_bytes(); }
  size_t slots() const { return pieces_.size(); }
  size_t token_count() const { return encoder_.vocabulary().count(); }
  size_t max_token_bytes() const { return encoder_.vocabulary().max_token_bytes(); }

 private:
  static std::vector<std::pair<std::string, uint32_t>> token_list(const py::dict& tokens) {
    std::vector<std::pair<std::string, uint32_t>> list;
    list.reserve(tokens.size());
    for (const auto& [bytes, id] : tokens) {
      if (!PyBytes_Check(bytes.ptr())) {
        throw py::type_error("tokens: got a key of type " + type_name(bytes) + ", expected bytes");
      }
      list.emplace_back(py::cast<std::string>(bytes), py::cast<uint32_t>(id));
    }
    return list;
  }

  static SpecialFinder check_special(const std::vector<std::pair<std::string, uint32_t>>& tokens) {
    for (const auto& [text, id] : tokens) {
      if (text.empty()) throw std::invalid_argument("special_tokens: one of them is empty");
      if (id > kMaxId) throw std::invalid_argument("special_tokens: the id of " + text + " is above 2^30 - 1");
    }
    return SpecialFinder(tokens);
  }

  IdBuffer encode_text(std::string_view text) const {
    IdBuffer ids;
    if (text.size() < kReleaseBytes) {
      encoder_.encode(text, ids);
    } else {
      py::gil_scoped_release release;
      encoder_.encode(text, ids);
    }
    return ids;
  }

  std::pair<IdBuffer, std::vector<uint64_t>> batch(const py::list& texts, size_t threads) const {
    std::vector<Utf8> owners;
    std::vector<std::string_view> views;
    owners.reserve(texts.size());
    views.reserve(texts.size());
    for (const auto& text : texts) views.push_back(owners.emplace_back(text).view());
    IdBuffer ids;
    std::vector<uint64_t> ends;
    {
      py::gil_scoped_release release;
      encoder_.encode_batch(views, threads, ids, ends);
    }
    return {std::move(ids), std::move(ends)};
  }

  py::list to_list(const IdBuffer& ids) const { return to_list(ids.data(), ids.size()); }

  // Every id's int object is made once and then shared: 3 ns an item instead of 15.
  py::list to_list(const uint32_t* ids, size_t size) const {
    py::list list(size);
    for (size_t i = 0; i < size; ++i) {
      PyObject*& object = ints_[ids[i]];
      if (!object) {
        object = PyLong_FromUnsignedLong(ids[i]);
        if (!object) throw py::error_already_set();
      }
      PyList_SET_ITEM(list.ptr(), i, Py_NewRef(object));
    }
    return list;
  }

  std::string_view piece_of(py::handle id) const {
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
  static char* put(char* out, std::string_view piece) {
    static_assert(Vocabulary::kPadding == 16);
    std::memcpy(out, piece.data(), 16);
    if (__builtin_expect(piece.size() > 16, 0)) std::memcpy(out + 16, piece.data() + 16, piece.size() - 16);
    return out + piece.size();
  }

  template <class T, class Room>
  void join_values(const py::array_t<T, py::array::c_style>& ids, const Room& room) const {
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
  bool join_array(py::handle ids, const Room& room) const {
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
  std::string join(py::handle ids) const {
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
      const std::string_view piece = piece_of(PySequence_Fast_GET_ITEM(fast, i));
      if (text.size() < size + piece.size() + Vocabulary::kPadding) {
        text.resize(size + piece.size() + Vocabulary::kPadding + size / 2 + static_cast<size_t>(n - i) * 5);
      }
      put(text.data() + size, piece);
      size += piece.size();
    }
    text.resize(size);
    return text;
  }

  Encoder encoder_;
  std::vector<std::pair<std::string, uint32_t>> special_tokens_;
  SpecialFinder all_special_;
  std::vector<std::string_view> pieces_;  // by id, special tokens included; empty: no such id
  std::string special_arena_;
  mutable std::vector<PyObject*> ints_;  // by id; null until it is needed
};

class PyTrainer {
 public:
  PyTrainer(const std::optional<std::string>& pattern, size_t threads) : trainer_(optional_pattern(pattern), threads) {}

  void feed(const py::list& texts) {
    std::vector<Utf8> owners;
    std::vector<std::string_view> views;
    owners.reserve(texts.size());
    for (const auto& text : texts) views.push_back(owners.emplace_back(text).view());
    py::gil_scoped_release release;
    trainer_.feed(views);
  }

  // Spans count characters of the text.
  void feed_spans(py::handle text, const Offsets& begins, const Offsets& ends) {
    const Utf8 utf8(text);
    const auto [from, to] = byte_spans(utf8.view(), begins, ends);
    py::gil_scoped_release release;
    trainer_.feed_spans(utf8.view(), from.data(), to.data(), from.size());
  }

  std::vector<std::pair<uint32_t, uint32_t>> train(size_t merges, uint64_t min_frequency, const py::object& progress) {
    auto report = [&](size_t done) {
      py::gil_scoped_acquire acquire;
      if (PyErr_CheckSignals()) throw py::error_already_set();
      if (!progress.is_none()) progress(done, merges);
    };
    py::gil_scoped_release release;
    return trainer_.train(merges, min_frequency, report);
  }

  size_t distinct_words() const { return trainer_.distinct_words(); }

 private:
  Trainer trainer_;
};

// The largest certain pre-token boundary in data[:limit], 0 for none: see csrc/bpe/scanner.h.
size_t py_safe_cut(py::handle data, size_t limit) {
  const Bytes bytes(data);
  return safe_cut(reinterpret_cast<const uint8_t*>(bytes.view().data()), bytes.view().size(), limit);
}

// The ends of the pre-tokens of UTF-8 bytes, by the scanner of one instruction set.
py::array_t<uint64_t> pretoken_ends(py::handle data, const std::string& pattern, const std::string& isa) {
  const ScanFn scan = scanner_for(pattern_from_name(pattern), isa);
  const Bytes bytes(data);
  const uint8_t* const text = reinterpret_cast<const uint8_t*>(bytes.view().data());
  const size_t size = bytes.view().size();
  if (size > kMaxScanBytes) throw std::length_error("data: more than 1 GiB");
  std::vector<uint64_t> found;
  uint32_t ends[kMinScanCapacity];
  for (size_t pos = 0; pos < size; pos = found.back()) {
    const size_t n = scan(text, size, pos, ends, kMinScanCapacity);
    found.insert(found.end(), ends, ends + n);
  }
  return to_numpy(found);
}

}  // namespace

// Bpe.encode_ordinary as a plain method of the C API: for a short string the dispatch of pybind11 takes as long as the
// encoding.
PyObject* encode_ordinary(PyObject* self, PyObject* text) {
  const auto* const instance = reinterpret_cast<const py::detail::instance*>(self);
  if (!instance->simple_layout || !instance->simple_holder_constructed) {
    PyErr_SetString(PyExc_TypeError, "self: a Bpe whose __init__ was not called");
    return nullptr;
  }
  try {
    return static_cast<const Bpe*>(instance->simple_value_holder[0])->encode_ordinary(text).release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::length_error& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

PyMethodDef kEncodeOrdinary = {"encode_ordinary", encode_ordinary, METH_O,
                               "encode_ordinary($self, text, /)\n--\n\nThe ids of a text, as a list."};

PYBIND11_MODULE(_bpe, m) {
  m.doc() = "Byte-level BPE: encoder, decoder, trainer. See fastgpt.tokenizer.";
  m.attr("unicode_version") = kUnicodeVersion;
  m.def("isa", &scanner_isa, "The instruction set of the scanners: portable, avx2 or avx512.");
  m.def("safe_cut", &py_safe_cut, py::arg("data"), py::arg("limit"));

  m.def("pretoken_ends", &pretoken_ends, py::arg("data"), py::arg("pattern"), py::arg("isa"));

  auto bpe = py::class_<Bpe>(m, "Bpe");
  bpe.def(py::init<const py::dict&, const std::vector<std::pair<std::string, uint32_t>>&,
                   const std::vector<std::pair<uint32_t, uint32_t>>&, const std::optional<std::string>&, bool>(),
          py::arg("tokens"), py::arg("special_tokens"), py::arg("merges"), py::arg("pattern"), py::arg("whole_first"))
      .def("encode_ordinary_numpy", &Bpe::encode_ordinary_numpy, py::arg("text"))
      .def("encode_bytes", &Bpe::encode_bytes, py::arg("data"))
      .def("encode_bytes_numpy", &Bpe::encode_bytes_numpy, py::arg("data"))
      .def("encode", &Bpe::encode, py::arg("text"), py::arg("allowed"))
      .def("encode_numpy", &Bpe::encode_numpy, py::arg("text"), py::arg("allowed"))
      .def("find_special", &Bpe::find_special, py::arg("text"))
      .def("encode_spans", &Bpe::encode_spans, py::arg("text"), py::arg("begins"), py::arg("ends"))
      .def("encode_piece", &Bpe::encode_piece, py::arg("piece"))
      .def("count", &Bpe::count, py::arg("text"))
      .def("prefix_bytes", &Bpe::prefix_bytes, py::arg("text"), py::arg("max_ids"))
      .def("encode_batch", &Bpe::encode_batch, py::arg("texts"), py::arg("threads"))
      .def("encode_batch_numpy", &Bpe::encode_batch_numpy, py::arg("texts"), py::arg("threads"))
      .def("pretokens", &Bpe::pretokens, py::arg("text"))
      .def("find_token", &Bpe::find_token, py::arg("token"))
      .def("token_bytes", &Bpe::token_bytes, py::arg("id"))
      .def("decode_bytes", &Bpe::decode_bytes, py::arg("ids"))
      .def("decode", &Bpe::decode, py::arg("ids"), py::arg("errors"))
      .def("cache_bytes", &Bpe::cache_bytes)
      .def_property_readonly("slots", &Bpe::slots)
      .def_property_readonly("token_count", &Bpe::token_count)
      .def_property_readonly("max_token_bytes", &Bpe::max_token_bytes);
  bpe.attr("encode_ordinary") = py::reinterpret_steal<py::object>(
      PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(bpe.ptr()), &kEncodeOrdinary));

  py::class_<PyTrainer>(m, "Trainer")
      .def(py::init<const std::optional<std::string>&, size_t>(), py::arg("pattern"), py::arg("threads"))
      .def("feed", &PyTrainer::feed, py::arg("texts"))
      .def("feed_spans", &PyTrainer::feed_spans, py::arg("text"), py::arg("begins"), py::arg("ends"))
      .def("train", &PyTrainer::train, py::arg("merges"), py::arg("min_frequency"), py::arg("progress"))
      .def_property_readonly("distinct_words", &PyTrainer::distinct_words);
}
