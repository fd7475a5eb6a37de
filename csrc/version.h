// dcdet/ops/compiled.py asks both libraries for it: one of another checkout is not used.
#pragma once

#include <cstdint>

constexpr int64_t VERSION = 2;
