// How the tests call kernels: each binding takes one array of values and hands back an error's text, or null.
#pragma once

#include <string>

#include "core.h"

namespace emu {

union Value {
  void* pointer;
  int64_t integer;
  double number;
};

struct Arguments {
  const Value* values;
  int count;
  const Value& at(int i) const {
    if (i >= count) throw Error("too few arguments");
    return values[i];
  }
  template <class T>
  T* pointer(int i) const {
    return static_cast<T*>(at(i).pointer);
  }
  int64_t integer(int i) const { return at(i).integer; }
  float number(int i) const { return static_cast<float>(at(i).number); }
};

using Binding = void (*)(const Arguments&);

inline std::string& last_error() {
  static std::string text;
  return text;
}

inline const char* call(Binding binding, const Value* values, int count) {
  try {
    binding({values, count});
    return nullptr;
  } catch (const std::exception& error) {
    last_error() = error.what();
    return last_error().c_str();
  }
}

}  // namespace emu

#define EMU_BIND(name)                                                                                \
  static void name##_binding(const emu::Arguments& a);                                                \
  extern "C" const char* name(const emu::Value* v, int n) { return emu::call(name##_binding, v, n); } \
  static void name##_binding(const emu::Arguments& a)
