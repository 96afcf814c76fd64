// Kernels that NVRTC compiles at their first launch, by CUDA's driver, which is loaded when it is first needed: the
// module itself links with nothing of CUDA. A kernel is known by the address of its (empty) function here, whose
// symbol says what it is.
#include "nvrtc/driver.h"

#include <cuda.h>
#include <cuda_runtime.h>
#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>

namespace fastgpt::nvrtc {
namespace {

using Function = struct CUfunc_st*;
using Module = struct CUmod_st*;
using Context = struct CUctx_st*;

constexpr int kNoDriver = 35;  // cudaErrorInsufficientDriver
constexpr int kCapabilityMajor = 75, kCapabilityMinor = 76;

// FASTGPT_CUDA_DRIVER names another library: a driver in an unusual place, or the one of the tests.
const char* driver_name() {
  const char* name = std::getenv("FASTGPT_CUDA_DRIVER");
  return name == nullptr ? "libcuda.so.1" : name;
}

struct Driver {
  void* library = dlopen(driver_name(), RTLD_NOW | RTLD_LOCAL);
  int (*init)(unsigned) = nullptr;
  int (*device_count)(int*) = nullptr;
  int (*device)(int*, int) = nullptr;
  int (*current_context)(Context*) = nullptr;
  int (*retain_context)(Context*, int) = nullptr;
  int (*set_context)(Context) = nullptr;
  int (*current_device)(int*) = nullptr;
  int (*device_attribute)(int*, int, int) = nullptr;
  int (*load)(Module*, const void*) = nullptr;
  int (*function)(Function*, Module, const char*) = nullptr;
  int (*function_attribute)(Function, int, int) = nullptr;
  int (*launch)(Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, cudaStream_t, void**,
                void**) = nullptr;
  int (*error_string)(int, const char**) = nullptr;

  Driver() {
    if (library == nullptr) return;
    find(init, "cuInit"), find(device_count, "cuDeviceGetCount"), find(device, "cuDeviceGet");
    find(current_context, "cuCtxGetCurrent"), find(retain_context, "cuDevicePrimaryCtxRetain");
    find(set_context, "cuCtxSetCurrent");
    find(current_device, "cuCtxGetDevice"), find(device_attribute, "cuDeviceGetAttribute");
    find(load, "cuModuleLoadData"), find(function, "cuModuleGetFunction");
    find(function_attribute, "cuFuncSetAttribute"), find(launch, "cuLaunchKernel");
    find(error_string, "cuGetErrorString");
    if (library != nullptr && init(0) != 0) library = nullptr;
  }
  template <class F>
  void find(F& pointer, const char* name) {
    pointer = library == nullptr ? nullptr : reinterpret_cast<F>(dlsym(library, name));
    if (pointer == nullptr) library = nullptr;  // too old to be used
  }
};

const Driver& driver() {
  static const Driver d;
  return d;
}

struct Loaded {
  Function function;
  int shared_bytes = 48 << 10;
};

std::mutex guard;
Compiler compile;
std::map<std::pair<Context, const void*>, Loaded> loaded;
thread_local cudaError_t last_error = 0;

// The kernel as C++ names it: its symbol without the result and the parameters.
std::string expression_of(const void* kernel) {
  Dl_info info;
  if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr || info.dli_saddr != kernel) {
    throw std::runtime_error("a CUDA kernel has no symbol in fastgpt._cuda");
  }
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> text(abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status),
                                                    std::free);
  if (status != 0) throw std::runtime_error(std::string("no C++ name: ") + info.dli_sname);
  std::string name = text.get();
  if (name.rfind("void ", 0) == 0) name.erase(0, 5);  // only templates name their result
  int depth = 0;
  for (size_t i = 0; i < name.size(); ++i) {
    depth += name[i] == '<' ? 1 : name[i] == '>' ? -1 : 0;
    if (name[i] == '(' && depth == 0) return name.substr(0, i);
  }
  return name;
}

void check(int error, const std::string& what) {
  if (error != 0) throw std::runtime_error(what + ": " + cudaGetErrorString(error));
}

// The thread's context. A thread that has called nothing of CUDA yet has none, and gets what the runtime would give it:
// that of the first device, which is every thread's device until it says otherwise.
int thread_context(Context* context) {
  const Driver& d = driver();
  int error = d.current_context(context), device = 0;
  if (error != 0 || *context != nullptr) return error;
  if ((error = d.device(&device, 0)) != 0 || (error = d.retain_context(context, device)) != 0) return error;
  return d.set_context(*context);
}

Loaded& load(const void* kernel) {
  const std::string name = expression_of(kernel);
  const Driver& d = driver();
  if (d.library == nullptr) throw std::runtime_error(name + ": " + cudaGetErrorString(kNoDriver));
  Context context = nullptr;
  check(thread_context(&context), name);
  Compiler compiler;
  {
    const std::lock_guard<std::mutex> lock(guard);
    const auto found = loaded.find({context, kernel});
    if (found != loaded.end()) return found->second;
    compiler = compile;
  }
  if (!compiler) throw std::runtime_error(name + ": fastgpt._cuda has no compiler (set_compiler)");
  int device = 0, major = 0, minor = 0;
  check(d.current_device(&device), name);
  check(d.device_attribute(&major, kCapabilityMajor, device), name);
  check(d.device_attribute(&minor, kCapabilityMinor, device), name);
  // Without the lock: the compiler is Python's, and whoever waited for the lock with Python's own would wait for ever.
  const auto [symbol, code] = compiler(name, major, minor);
  Module module = nullptr;
  Loaded result = {};
  check(d.load(&module, code.data()), name);
  check(d.function(&result.function, module, symbol.c_str()), name);
  const std::lock_guard<std::mutex> lock(guard);
  return loaded.emplace(std::pair(context, kernel), result).first->second;  // the first one's, where two compiled it
}

}  // namespace

void set_compiler(Compiler compiler) {
  const std::lock_guard<std::mutex> lock(guard);
  compile = std::move(compiler);
}

void launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, void** arguments) {
  const Loaded& k = load(kernel);
  check(driver().launch(k.function, grid.x, grid.y, grid.z, block.x, block.y, block.z,
                        static_cast<unsigned>(shared_bytes), stream, arguments, nullptr),
        expression_of(kernel));
}

cudaError_t set_shared_bytes(const void* kernel, int bytes) {
  Loaded& k = load(kernel);
  if (bytes <= k.shared_bytes) return cudaSuccess;
  const int error = driver().function_attribute(k.function, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == 0) k.shared_bytes = bytes;
  return error;
}

}  // namespace fastgpt::nvrtc

using fastgpt::nvrtc::driver;
using fastgpt::nvrtc::kNoDriver;
using fastgpt::nvrtc::last_error;

const char* cudaGetErrorString(cudaError_t error) {
  const char* text = nullptr;
  if (error == kNoDriver) return "there is no CUDA driver, or it is too old";
  return driver().library != nullptr && driver().error_string(error, &text) == 0 ? text : "unknown error";
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, 0); }

cudaError_t cudaGetDeviceCount(int* count) {
  return last_error = driver().library == nullptr ? kNoDriver : driver().device_count(count);
}

cudaError_t cudaGetDevice(int* device) {
  fastgpt::nvrtc::Context context = nullptr;
  if (driver().library == nullptr) return last_error = kNoDriver;
  const int error = fastgpt::nvrtc::thread_context(&context);
  return last_error = error != 0 ? error : driver().current_device(device);
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  return last_error = driver().library == nullptr ? kNoDriver : driver().device_attribute(value, attribute, device);
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  *function = driver().library == nullptr ? nullptr : dlsym(driver().library, name);
  *found = *function != nullptr ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
