// The class Trainer of fastgpt._bpe.
#include <pybind11/functional.h>

#include "bpe/trainer.h"
#include "python/bpe.h"

namespace fastgpt::bpe {
namespace {

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

}  // namespace

void bind_trainer(py::module_& m) {
  py::class_<PyTrainer>(m, "Trainer")
      .def(py::init<const std::optional<std::string>&, size_t>(), py::arg("pattern"), py::arg("threads"))
      .def("feed", &PyTrainer::feed, py::arg("texts"))
      .def("feed_spans", &PyTrainer::feed_spans, py::arg("text"), py::arg("begins"), py::arg("ends"))
      .def("train", &PyTrainer::train, py::arg("merges"), py::arg("min_frequency"), py::arg("progress"))
      .def_property_readonly("distinct_words", &PyTrainer::distinct_words);
}

}  // namespace fastgpt::bpe
