// Calls a libFuzzer target with mutated inputs, for compilers without libFuzzer. It knows nothing of coverage: inputs
// are pieces of the seed files, spliced and changed, and strings of characters at which tokenizers turn.
//
//   driver SECONDS SEED LAST_INPUT [seed file ...]     runs; LAST_INPUT is a file that holds the input at hand, so that
//                                                      what crashed can be run again
//   driver replay FILE                                 runs the target on one file
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

constexpr size_t kMaxBytes = 8000;

const std::vector<std::string> kTurns = {
    " ",      "  ",         "\n",     "\r\n",   "\t",     "'s",     "'LL",          "'\u017f",  "'",
    "\"",     "a",          "Z",      "1",      "1234",   "!",      "//",           "/\n",      "_",
    "\u00e9", "\u00c9",     "中",     "\u0301", "\u00b2", "\u2167", "\u3000",       "\u180e",   "\u200b",
    "\u0085", "\U0001f642", "<|a|>",  "<|a",    "\xff",   "\xc3",   "\xed\xa0\x80", "\xf0\x9f", std::string(1, '\0'),
    "\ufeff", "\u01c5",     "\u02b0", "the",
};

class Inputs {
 public:
  Inputs(uint64_t seed, std::vector<std::string> files) : random_(seed), files_(std::move(files)) {}

  std::string next() {
    std::string text;
    switch (below(5)) {
      case 0:
        text = turns(1 + below(60));
        break;
      case 1:
        text = piece() + piece();
        break;
      case 2:
        text = std::string(1 + below(300), static_cast<char>(below(256))) + piece();
        break;
      case 3:
        text = scripts();
        break;
      default:
        text = piece();
    }
    for (size_t changes = below(6); changes; --changes) mutate(text);
    text.resize(std::min(text.size(), kMaxBytes));
    std::string header;
    for (int i = 0; i < 3; ++i) header += static_cast<char>(below(256));
    return header + text;
  }

 private:
  size_t below(size_t n) { return std::uniform_int_distribution<size_t>(0, n - 1)(random_); }

  std::string turns(size_t count) {
    std::string text;
    while (count--) text += kTurns[below(kTurns.size())];
    return text;
  }

  // Runs of characters that are near one another, from all of Unicode, with others between.
  std::string scripts() {
    std::string text;
    for (size_t runs = 1 + below(8); runs; --runs) {
      const size_t first = below(3) ? below(0x3400) : below(0x110000), spread = size_t{1} << below(9);
      for (size_t left = 1 + below(size_t{2} << below(7)); left; --left) {
        text += utf8(std::min<size_t>(first + below(spread), 0x10FFFF));
      }
      text += kTurns[below(kTurns.size())];
    }
    return text;
  }

  // Surrogates too, which are not well-formed.
  static std::string utf8(size_t code_point) {
    if (code_point < 0x80) return std::string(1, static_cast<char>(code_point));
    std::string bytes;
    size_t left = code_point, lead = 0x3F;
    for (; left > lead; left >>= 6, lead >>= 1) bytes.insert(0, 1, static_cast<char>(0x80 | (left & 0x3F)));
    return bytes.insert(0, 1, static_cast<char>((~lead << 1 & 0xFF) | left));
  }

  // Some bytes of a seed file, mostly few.
  std::string piece() {
    if (files_.empty()) return turns(1 + below(30));
    const std::string& file = files_[below(files_.size())];
    const size_t longest = size_t{1} << (2 + below(11));
    return file.substr(below(file.size()), 1 + below(longest));
  }

  void mutate(std::string& text) {
    const size_t at = below(text.size() + 1), left = text.size() - at;
    const size_t n = left ? below(std::min<size_t>(left, 64)) : 0;
    switch (below(6)) {
      case 0:
        text.insert(at, kTurns[below(kTurns.size())]);
        break;
      case 1:
        text.erase(at, n);
        break;
      case 2:
        text.insert(at, text.substr(at, n));
        break;
      case 3:
        if (left) text[at] = static_cast<char>(below(256));
        break;
      case 4:
        if (left) text.insert(at, std::string(below(100), text[at]));
        break;
      default:
        text.replace(at, n, piece().substr(0, 64));
    }
  }

  std::mt19937_64 random_;
  std::vector<std::string> files_;
};

std::string read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    std::fprintf(stderr, "fuzz: cannot read %s\n", path);
    std::exit(2);
  }
  return {std::istreambuf_iterator<char>(file), {}};
}

int run(const std::string& input) {
  return LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(input.data()), input.size());
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 3 && !std::strcmp(arguments[1], "replay")) return run(read(arguments[2]));
  if (count < 4) {
    std::fprintf(stderr, "usage: %s SECONDS SEED LAST_INPUT [seed file ...], or %s replay FILE\n", arguments[0],
                 arguments[0]);
    return 2;
  }
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(std::atol(arguments[1]));
  const uint64_t seed = std::strtoull(arguments[2], nullptr, 10);
  std::vector<std::string> files;
  for (int i = 4; i < count; ++i) {
    if (std::string text = read(arguments[i]); !text.empty()) files.push_back(std::move(text));
  }
  // Mapped, so that what was written last is in the file however the process ends.
  const size_t room = kMaxBytes + 3;
  const int last = open(arguments[3], O_RDWR | O_CREAT | O_TRUNC, 0644);
  void* mapped = MAP_FAILED;
  if (last >= 0 && !ftruncate(last, static_cast<off_t>(room))) {
    mapped = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_SHARED, last, 0);
  }
  if (mapped == MAP_FAILED) {
    std::perror(arguments[3]);
    return 2;
  }
  Inputs inputs(seed, std::move(files));
  size_t runs = 0, bytes = 0;
  for (; std::chrono::steady_clock::now() < end; ++runs) {
    const std::string input = inputs.next();
    if (ftruncate(last, static_cast<off_t>(input.size()))) return 2;
    std::memcpy(mapped, input.data(), input.size());
    run(input);
    bytes += input.size();
  }
  std::printf("fuzz: %zu inputs, %.1f MB, seed %llu: no difference, no fault\n", runs, static_cast<double>(bytes) / 1e6,
              static_cast<unsigned long long>(seed));
  return 0;
}
