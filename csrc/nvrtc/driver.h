// How the module hands kernels to a compiler.
#pragma once

#include <functional>
#include <string>
#include <utility>

namespace fastgpt::nvrtc {

// (the kernel as C++ names it, the device's compute capability) -> (its name in the machine code, the machine code)
using Compiler = std::function<std::pair<std::string, std::string>(const std::string&, int, int)>;
void set_compiler(Compiler compiler);

}  // namespace fastgpt::nvrtc
