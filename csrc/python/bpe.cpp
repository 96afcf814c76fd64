// The module fastgpt._bpe: the tokenizer's encoder, decoder and trainer for Python. Bindings only: formats, names of
// encodings and the public classes are in fastgpt/tokenizer.
#include "python/bpe.h"

#include <cstring>
#include <new>
#include <stdexcept>

#include "bpe/special.h"
#include "bpe/unicode_tables.h"

namespace py = pybind11;
using namespace fastgpt::bpe;

namespace {

constexpr size_t kReleaseBytes = 2048;  // shorter texts are done before another thread could take the GIL
static_assert(kReleaseBytes <= Encoder::kShortBytes);
using ShortIds = uint32_t[kReleaseBytes + Encoder::kShortSlack];  // of such a text

class Bpe {
 public:
  Bpe(const py::dict& tokens, const std::vector<std::pair<std::string, uint32_t>>& special_tokens,
      const std::vector<std::pair<uint32_t, uint32_t>>& merges, const std::optional<std::string>& pattern,
      bool whole_first)
      : encoder_(Vocabulary(token_list(tokens), merges), optional_pattern(pattern), whole_first),
        special_tokens_(special_tokens),
        all_special_(check_special(special_tokens)),
        tokens_(encoder_.vocabulary(), special_tokens_) {
    ints_.resize(tokens_.slots());
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
    ShortIds ids;
    return to_list(ids, encoder_.encode_short(view, ids));
  }

  Ids encode_ordinary_numpy(py::handle text) const {
    const Utf8 utf8(text);
    const std::string_view view = utf8.view();
    if (view.size() > kReleaseBytes) {
      IdBuffer ids = encode_text(view);
      return to_numpy(ids);
    }
    ShortIds ids;
    return to_numpy(ids, encoder_.encode_short(view, ids));
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
    const std::string_view piece = tokens_.of(id);
    return py::bytes(piece.data(), piece.size());
  }

  const TokenBytes& tokens() const { return tokens_; }
  size_t cache_bytes() const { return encoder_.cache_bytes(); }
  size_t slots() const { return tokens_.slots(); }
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

  Encoder encoder_;
  std::vector<std::pair<std::string, uint32_t>> special_tokens_;
  SpecialFinder all_special_;
  TokenBytes tokens_;
  mutable std::vector<PyObject*> ints_;  // by id; null until it is needed
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

// A method of Bpe that takes a text, as a plain method of the C API: for a short string the dispatch of pybind11 takes
// as long as the encoding.
template <auto kMethod>
PyObject* plain_method(PyObject* self, PyObject* text) {
  const auto* const instance = reinterpret_cast<const py::detail::instance*>(self);
  if (!instance->simple_layout || !instance->simple_holder_constructed) {
    PyErr_SetString(PyExc_TypeError, "self: a Bpe whose __init__ was not called");
    return nullptr;
  }
  try {
    return (static_cast<const Bpe*>(instance->simple_value_holder[0])->*kMethod)(text).release().ptr();
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

PyMethodDef kPlainMethods[] = {
    {"encode_ordinary", plain_method<&Bpe::encode_ordinary>, METH_O,
     "encode_ordinary($self, text, /)\n--\n\nThe ids of a text, as a list."},
    {"encode_ordinary_numpy", plain_method<&Bpe::encode_ordinary_numpy>, METH_O,
     "encode_ordinary_numpy($self, text, /)\n--\n\nThe ids of a text, as a uint32 array."},
};

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
      .def(
          "decode_bytes", [](const Bpe& bpe, py::handle ids) { return bpe.tokens().decode_bytes(ids); }, py::arg("ids"))
      .def(
          "decode", [](const Bpe& bpe, py::handle ids, const char* errors) { return bpe.tokens().decode(ids, errors); },
          py::arg("ids"), py::arg("errors"))
      .def("cache_bytes", &Bpe::cache_bytes)
      .def_property_readonly("slots", &Bpe::slots)
      .def_property_readonly("token_count", &Bpe::token_count)
      .def_property_readonly("max_token_bytes", &Bpe::max_token_bytes);
  for (PyMethodDef& method : kPlainMethods) {
    bpe.attr(method.ml_name) =
        py::reinterpret_steal<py::object>(PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(bpe.ptr()), &method));
  }

  bind_trainer(m);
}
