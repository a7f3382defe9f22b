// Owners of everything that CUDA hands out, and the check of everything that it returns.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <memory>
#include <string>

#include "frame.hpp"

namespace fastpix2pix {

inline std::string cuda_message(cudaError_t code) {
  return std::string(cudaGetErrorName(code)) + ": " + cudaGetErrorString(code);
}

// Raises Failed with CUDA's own message. An error of earlier asynchronous work comes out of whichever call is next.
inline void check(cudaError_t code, const char* doing) {
  if (code == cudaSuccess) return;
  cudaGetLastError();  // what can be forgotten is forgotten
  throw Failed(std::string("CUDA failed to ") + doing + ": " + cuda_message(code));
}

// What a destructor can do about an error is nothing: the work that it belongs to has raised it already.
template <auto kRelease>
struct CudaDeleter {
  template <class T>
  void operator()(T* handle) const noexcept {
    static_cast<void>(kRelease(handle));
  }
};

using CudaStream = std::unique_ptr<CUstream_st, CudaDeleter<cudaStreamDestroy>>;
using CudaEvent = std::unique_ptr<CUevent_st, CudaDeleter<cudaEventDestroy>>;
using CudaGraph = std::unique_ptr<CUgraph_st, CudaDeleter<cudaGraphDestroy>>;
using CudaGraphExec = std::unique_ptr<CUgraphExec_st, CudaDeleter<cudaGraphExecDestroy>>;

template <class T>
using DeviceMemory = std::unique_ptr<T, CudaDeleter<cudaFree>>;
template <class T>
using PinnedMemory = std::unique_ptr<T, CudaDeleter<cudaFreeHost>>;

// Waits for no other stream, the default one included.
inline CudaStream make_stream() {
  cudaStream_t stream;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "create a stream");
  return CudaStream(stream);
}

inline CudaEvent make_event(unsigned flags = cudaEventDefault) {
  cudaEvent_t event;
  check(cudaEventCreateWithFlags(&event, flags), "create an event");
  return CudaEvent(event);
}

// Zeros, as a network that is tried on them must not meet a NaN.
template <class T>
DeviceMemory<T> device_memory(std::size_t bytes) {
  void* memory;
  check(cudaMalloc(&memory, bytes), "allocate memory on the GPU");
  DeviceMemory<T> owner(static_cast<T*>(memory));
  check(cudaMemset(memory, 0, bytes), "clear memory on the GPU");
  return owner;
}

template <class T>
PinnedMemory<T> pinned_memory(std::size_t bytes) {
  void* memory;
  check(cudaHostAlloc(&memory, bytes, cudaHostAllocDefault), "allocate pinned memory");
  return PinnedMemory<T>(static_cast<T*>(memory));
}

inline CudaGraph make_graph() {
  cudaGraph_t graph;
  check(cudaGraphCreate(&graph, 0), "create a graph");
  return CudaGraph(graph);
}

// For threads of the runtime. They never go back to another device: choosing one makes a context there.
inline void use_device(int device) { check(cudaSetDevice(device), "choose a device"); }

// A function of the driver, since CUDA 4. Not linked, as the module must import where there is no driver.
template <class Function>
Function* driver_function(const char* name) {
  void* found = nullptr;
#if CUDART_VERSION >= 12050
  check(cudaGetDriverEntryPointByVersion(name, &found, 4000, cudaEnableDefault), "find a function of the driver");
#else
  check(cudaGetDriverEntryPoint(name, &found, cudaEnableDefault), "find a function of the driver");
#endif
  return reinterpret_cast<Function*>(found);
}

// The device of this thread for a while, where the thread is the caller's. What comes back is the context that was
// current, or none: cudaSetDevice would make one on a GPU that nobody uses.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    if (driver().get(&before_) != CUDA_SUCCESS) before_ = nullptr;  // nobody has used the driver yet
    use_device(device);
  }
  ~OnDevice() { static_cast<void>(driver().set(before_)); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  struct Driver {
    decltype(cuCtxGetCurrent)* get = driver_function<decltype(cuCtxGetCurrent)>("cuCtxGetCurrent");
    decltype(cuCtxSetCurrent)* set = driver_function<decltype(cuCtxSetCurrent)>("cuCtxSetCurrent");
  };
  static const Driver& driver() {
    static const Driver found;
    return found;
  }

  CUcontext before_ = nullptr;
};

}  // namespace fastpix2pix
