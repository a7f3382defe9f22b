#include "cuda_convert.hpp"
#include "sample.hpp"

namespace fastpix2pix {
namespace {

constexpr int kBlock = 128;  // threads along a row; neighbours read and write neighbouring bytes

// One thread for each pixel of the network's input.
template <Format kFormat, class T>
__global__ void input_kernel(T* network,         // [3, H, W] or [H, W, 3], units
                             ConstPlanes frame,  // of kFormat
                             InputSampler sampler) {
  const TensorShape& shape = sampler.spec.network;
  const int x = blockIdx.x * kBlock + threadIdx.x, y = blockIdx.y;
  if (x < shape.width) store_pixel(network, shape, x, y, sampler.template operator()<kFormat>(frame, x, y));
}

// One thread for each pixel of the frame, or for each 2x2 block of it where a block shares its chroma.
template <Format kFormat, class T>
__global__ void output_kernel(Planes frame,      // of kFormat
                              const T* network,  // [3, H, W] or [H, W, 3], units
                              OutputSampler sampler) {
  const FrameShape& shape = sampler.spec.frame;
  const int x = blockIdx.x * kBlock + threadIdx.x, y = blockIdx.y;
  if constexpr (is_yuv(kFormat)) {
    if (x < (shape.width + 1) / 2) store_yuv_block<kFormat>(sampler, frame, network, x, y);
  } else {
    if (x < shape.width) store_packed_pixel<kFormat>(frame, x, y, sampler(network, x, y));
  }
}

dim3 grid(int width, int height) {
  return dim3(static_cast<unsigned>((width + kBlock - 1) / kBlock), static_cast<unsigned>(height));
}

template <class T>
DeviceMemory<T> on_device(const std::vector<T>& values) {
  if (values.empty()) return nullptr;
  DeviceMemory<T> memory = device_memory<T>(values.size() * sizeof(T));
  check(cudaMemcpy(memory.get(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice),
        "copy the weights of a resize to the GPU");
  return memory;
}

}  // namespace

DeviceTaps::DeviceTaps(const Taps& taps)
    : first_(on_device(taps.first)),
      weight_(on_device(taps.weight)),
      count_(taps.count),
      out_(static_cast<int>(taps.first.size())) {}

void CudaInputPlan::enqueue(void* network, const ConstPlanes& frame, cudaStream_t stream) const {
  const InputSampler sampler{spec_, rows_.view(), columns_.view()};
  const dim3 blocks = grid(spec_.network.width, spec_.network.height);
  with_format(spec_.frame.format, [&](auto constant) {
    constexpr Format format = decltype(constant)::value;
    if (spec_.network.half) {
      input_kernel<format><<<blocks, kBlock, 0, stream>>>(static_cast<DeviceHalf*>(network), frame, sampler);
    } else {
      input_kernel<format><<<blocks, kBlock, 0, stream>>>(static_cast<float*>(network), frame, sampler);
    }
  });
  check(cudaGetLastError(), "convert a frame to the network's input");
}

void CudaOutputPlan::enqueue(const Planes& frame, const void* network, cudaStream_t stream) const {
  const OutputSampler sampler{spec_, rows_.view(), columns_.view()};
  const FrameShape& shape = spec_.frame;
  const int block = is_yuv(shape.format) ? 2 : 1;
  const dim3 blocks = grid((shape.width + block - 1) / block, (shape.height + block - 1) / block);
  with_format(shape.format, [&](auto constant) {
    constexpr Format format = decltype(constant)::value;
    if (spec_.network.half) {
      output_kernel<format><<<blocks, kBlock, 0, stream>>>(frame, static_cast<const DeviceHalf*>(network), sampler);
    } else {
      output_kernel<format><<<blocks, kBlock, 0, stream>>>(frame, static_cast<const float*>(network), sampler);
    }
  });
  check(cudaGetLastError(), "convert the network's output to a frame");
}

}  // namespace fastpix2pix
