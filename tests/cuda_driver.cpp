// Stands for the CUDA driver in tests/test_cuda_nvrtc.py: a driver without a device, which writes what it is asked to a
// file (FASTGPT_TEST_DRIVER_LOG), and finds a function where the machine code that was loaded holds its name.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

namespace {

struct Module {
  std::string code;
};

size_t size_of_elf(const unsigned char* image) {  // its tables of sections come last, or those of segments
  unsigned long long sections, segments;
  unsigned short section_size, section_count, segment_size, segment_count;
  std::memcpy(&segments, image + 32, 8), std::memcpy(&sections, image + 40, 8);
  std::memcpy(&segment_size, image + 54, 2), std::memcpy(&segment_count, image + 56, 2);
  std::memcpy(&section_size, image + 58, 2), std::memcpy(&section_count, image + 60, 2);
  const unsigned long long a = sections + section_size * section_count, b = segments + segment_size * segment_count;
  return a > b ? a : b;
}

FILE* log() {
  static FILE* file = std::fopen(std::getenv("FASTGPT_TEST_DRIVER_LOG"), "w");
  return file;
}

std::string context;
thread_local void* current = nullptr;  // of a thread that the runtime knows; FASTGPT_TEST_NO_CONTEXT: none is

}  // namespace

extern "C" {
int cuInit(unsigned) { return 0; }
int cuDeviceGetCount(int* count) { return *count = 1, 0; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, 0; }
int cuCtxGetCurrent(void** found) {
  if (std::getenv("FASTGPT_TEST_NO_CONTEXT") == nullptr) current = &context;
  return *found = current, 0;
}
int cuDevicePrimaryCtxRetain(void** found, int) { return *found = &context, 0; }
int cuCtxSetCurrent(void* given) { return current = given, 0; }
int cuCtxGetDevice(int* device) { return *device = 0, current == nullptr ? 201 : 0; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
  const char* chip = std::getenv("FASTGPT_TEST_CHIP");  // such as "90"
  *value = attribute == 75 ? chip[0] - '0' : attribute == 76 ? chip[1] - '0' : 132;
  return 0;
}
int cuModuleLoadData(Module** module, const void* image) {
  const auto* bytes = static_cast<const unsigned char*>(image);
  if (std::memcmp(bytes, "\177ELF", 4) != 0) return 200;
  *module = new Module{std::string(reinterpret_cast<const char*>(bytes), size_of_elf(bytes))};
  std::fprintf(log(), "load\n"), std::fflush(log());
  return 0;
}
int cuModuleGetFunction(std::string** function, Module* module, const char* name) {
  if (module->code.find(std::string(".text.") + name) == std::string::npos) return 500;
  *function = new std::string(name);
  return 0;
}
int cuFuncSetAttribute(std::string*, int attribute, int value) {
  std::fprintf(log(), "attribute %d %d\n", attribute, value), std::fflush(log());
  return 0;
}
int cuLaunchKernel(std::string* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** arguments, void**) {
  // The first 8 bytes of the first argument: of a struct of pointers the first pointer.
  unsigned long long first;
  std::memcpy(&first, arguments[0], 8);
  std::fprintf(log(), "launch %s %u %u %u %u %u %u %u %llu %llu\n", function->c_str(), gx, gy, gz, bx, by, bz, shared,
               reinterpret_cast<unsigned long long>(stream), first);
  std::fflush(log());
  return std::getenv("FASTGPT_TEST_FAIL") != nullptr ? 719 : 0;
}
int cuGetErrorString(int error, const char** text) {
  *text = error == 719 ? "unspecified launch failure" : "some error";
  return 0;
}
int cuTensorMapEncodeTiled(unsigned char* map, int type, unsigned rank, ...) {
  std::memset(map, type, 128);
  std::fprintf(log(), "map %d %u\n", type, rank), std::fflush(log());
  return 0;
}
}
