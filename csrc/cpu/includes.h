// What every instruction set's file includes before its `#pragma GCC target`: nothing that the pragma would make wider.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__) && !defined(__clang__)
#define FASTGPT_X86 1
#include <immintrin.h>
#endif

#include "cpu/kernels.h"
