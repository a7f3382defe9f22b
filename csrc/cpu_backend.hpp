// The frame runtime's work on the CPU: convert and compute when launched, convert back when finished.
#pragma once

#include <memory>
#include <vector>

#include "convert.hpp"
#include "runtime.hpp"

namespace fastpix2pix {

// The network's tensors of one slot.
struct SlotTensors {
  void *input, *output;
};

// engine empty: the input is the output (to test and to measure everything else).
// tensors: memory of each slot, which whoever gives it keeps as long as `engine`; empty: the backend makes its own.
std::unique_ptr<Backend> make_cpu_backend(const InputSpec& input, const OutputSpec& output, Engine engine, int slots,
                                          int threads, const std::vector<SlotTensors>& tensors = {});

}  // namespace fastpix2pix
