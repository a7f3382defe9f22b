// The GPU's way from a source frame to the network's input, and from its output to a frame: one kernel each, which runs
// the pixel functions of sample.hpp. Plans own the tables of their resize; nothing is allocated when they enqueue.
#pragma once

#include "cuda_handles.hpp"
#include "spec.hpp"

namespace fastpix2pix {

// Taps in the memory of the device that was current when they were made.
class DeviceTaps {
 public:
  explicit DeviceTaps(const Taps& taps);
  TapsView view() const { return {first_.get(), weight_.get(), count_, out_}; }

 private:
  DeviceMemory<std::int32_t> first_;
  DeviceMemory<float> weight_;
  int count_, out_;
};

class CudaInputPlan {
 public:
  explicit CudaInputPlan(const InputSpec& spec) : CudaInputPlan(spec, make_resize(spec)) {}
  // network and frame lie on the device and stay as they are until the stream gets past this.
  void enqueue(void* network, const ConstPlanes& frame, cudaStream_t stream) const;

 private:
  CudaInputPlan(const InputSpec& spec, const Resize& resize)
      : spec_(spec), rows_(resize.rows), columns_(resize.columns) {}

  InputSpec spec_;
  DeviceTaps rows_, columns_;
};

class CudaOutputPlan {
 public:
  explicit CudaOutputPlan(const OutputSpec& spec) : CudaOutputPlan(spec, make_resize(spec)) {}
  void enqueue(const Planes& frame, const void* network, cudaStream_t stream) const;

 private:
  CudaOutputPlan(const OutputSpec& spec, const Resize& resize)
      : spec_(spec), rows_(resize.rows), columns_(resize.columns) {}

  OutputSpec spec_;
  DeviceTaps rows_, columns_;
};

}  // namespace fastpix2pix
