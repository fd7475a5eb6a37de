// The GPU library's version. Its operators are those of ../bindings.cpp, in the CPU library.
#include <torch/csrc/stable/library.h>

#include "../version.h"

namespace {
int64_t version() { return VERSION; }
}  // namespace

STABLE_TORCH_LIBRARY(dcdet_CUDA, m) { m.def("version() -> int"); }

STABLE_TORCH_LIBRARY_IMPL(dcdet_CUDA, CompositeExplicitAutograd, m) {
  m.impl("version", TORCH_BOX(&version));
}
