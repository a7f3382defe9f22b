// The frame runtime's work on a GPU: three streams, pinned slots, and one CUDA graph for each slot.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "runtime.hpp"

namespace fastpix2pix {

// automatic captures what the engine enqueues and goes without where that fails; on raises then; off never captures.
enum class GraphUse { automatic, on, off };

// The finished cudaGraph_t of the engine's work from `input` to `output` of a slot. May throw. Whoever gives it keeps
// the memory that it works on as long as this function exists; the graph itself is copied.
using GraphOfSlot = std::function<void*(int slot, const void* input, void* output)>;

// Does `work`, during which nobody may wait for the whole device: that breaks a capture.
using Undisturbed = std::function<void(const std::function<void()>& work)>;

// Neither engine nor graph_of_slot: the input is the output (to test and to measure everything else).
// The engine is called on the thread that makes the backend, twice for each slot and once more to capture it; later
// only where there is no graph, on the launching thread.
struct CudaOptions {
  int device = 0, slots = 2;
  GraphUse graph = GraphUse::automatic;
  Engine engine;
  GraphOfSlot graph_of_slot;
  Undisturbed undisturbed = [](const std::function<void()>& work) { work(); };  // around all captures
};

struct CudaBackendInfo {
  std::string graph;                   // "none", "captured", "child", or "none: " and why it could not be captured
  std::uintptr_t producer_stream = 0;  // device frames are submitted once this stream has been made to wait for them
};

std::unique_ptr<Backend> make_cuda_backend(const InputSpec& input, const OutputSpec& output, CudaOptions options,
                                           CudaBackendInfo& info);

// The GPU whose memory a pointer points to, or -1; asked on `device`.
int device_of(const void* pointer, int device);

// Does `work` with `device` as the current one of this thread.
void on_device(int device, const std::function<void()>& work);

// Work enqueued on `waiting` from now on comes after what `producer` has now; both are cudaStream_t of the device.
void await_stream(std::uintptr_t waiting, std::uintptr_t producer, int device);

}  // namespace fastpix2pix
