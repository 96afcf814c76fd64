// A call of one binding read from a file, for the builds with a sanitizer, which do not go into Python's process.
//
// The file: a line `name schedule completion seed planted count`, then for each argument a line `i VALUE`, `d VALUE`,
// `n` (null) or `p BYTES` and the bytes. What the kernel left in the pointers' bytes is written to FILE.out.
#include <dlfcn.h>

#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "bind.h"

int main(int count, char** arguments) {
  FILE* in = count == 2 ? fopen(arguments[1], "rb") : nullptr;
  char name[256];
  int schedule, completion, planted, n;
  unsigned long long seed;
  if (!in || fscanf(in, "%255s %d %d %llu %d %d", name, &schedule, &completion, &seed, &planted, &n) != 6) return 2;
  std::vector<emu::Value> values(n);
  std::vector<std::pair<void*, size_t>> memory;
  for (emu::Value& v : values) {
    char kind;
    size_t bytes;
    if (fscanf(in, " %c", &kind) != 1) return 2;
    if (kind == 'i' && fscanf(in, "%" SCNd64, &v.integer) != 1) return 2;
    if (kind == 'd' && fscanf(in, "%lf", &v.number) != 1) return 2;
    if (kind == 'n') v.pointer = nullptr;
    if (kind == 'p') {
      if (fscanf(in, "%zu", &bytes) != 1 || fgetc(in) != '\n') return 2;
      v.pointer = malloc(bytes ? bytes : 1);
      if (fread(v.pointer, 1, bytes, in) != bytes) return 2;
      memory.push_back({v.pointer, bytes});
    }
  }
  fclose(in);
  auto binding = reinterpret_cast<const char* (*)(const emu::Value*, int)>(dlsym(RTLD_DEFAULT, name));
  if (!binding) return 2;
  emu::configure(emu::Schedule(schedule), emu::Completion(completion), seed);
  emu::planted = planted;
  if (const char* error = binding(values.data(), n)) {
    printf("%s\n", error);
    fflush(stdout);
    _Exit(3);
  }
  FILE* out = fopen((std::string(arguments[1]) + ".out").c_str(), "wb");
  for (const auto& [pointer, bytes] : memory) {
    fwrite(pointer, 1, bytes, out);
    free(pointer);
  }
  fclose(out);
}
