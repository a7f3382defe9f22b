#include "cuda_convert.hpp"
#include "sample.hpp"

namespace fastpix2pix {
namespace {

constexpr int kBlock = 128;     // threads along a row; neighbours read and write neighbouring bytes
constexpr int kColumns = 1024;  // of the crop, summed at once: 12 KB; 1080p to 256 x 256 needs 971

// One thread for each pixel of the network's input, without a resize.
template <Format kFormat, class T>
__global__ void input_kernel(T* network,         // [3, H, W] or [H, W, 3], units
                             ConstPlanes frame,  // of kFormat
                             InputSampler sampler) {
  const TensorShape& shape = sampler.spec.network;
  const int x = blockIdx.x * kBlock + threadIdx.x, y = blockIdx.y;
  if (x >= shape.width) return;
  const int column = sampler.column(x), row = sampler.row(y);
  const Rect& crop = sampler.spec.crop;
  const bool filled = column < 0 || row < 0;
  store_pixel(
      network, shape, x, y,
      filled ? sampler.fill() : sampler.units<kFormat>(sampler.at<kFormat>(frame, crop.x + column, crop.y + row)));
}

// With a resize: the pixels of a block share their columns of the crop, which are summed over the rows once.
template <Format kFormat, class T>
__global__ void resized_input_kernel(T* network, ConstPlanes frame, InputSampler sampler) {
  __shared__ int first, last;  // the columns that the block needs, [first, last)
  __shared__ Pixel sums[kColumns];
  const TensorShape& shape = sampler.spec.network;
  const TapsView& columns = sampler.columns;
  const int x = blockIdx.x * kBlock + threadIdx.x, y = blockIdx.y;
  const int column = x < shape.width ? sampler.column(x) : -1, row = sampler.row(y);
  const bool filled = column < 0 || row < 0;
  if (threadIdx.x == 0) first = sampler.spec.crop.width, last = 0;
  __syncthreads();
  if (!filled) {
    atomicMin(&first, columns.first[column]);
    atomicMax(&last, columns.first[column] + columns.count);
  }
  __syncthreads();
  Pixel sum{};
  for (int begin = first; begin < last; begin += kColumns) {
    const int end = min(begin + kColumns, last);
    for (int i = begin + threadIdx.x; i < end; i += kBlock) sums[i - begin] = sampler.down<kFormat>(frame, i, row);
    __syncthreads();
    if (!filled) sampler.across(sums, begin, end, column, sum);
    __syncthreads();
  }
  if (x < shape.width) store_pixel(network, shape, x, y, filled ? sampler.fill() : sampler.units<kFormat>(sum));
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
    const auto launch = [&](auto* units) {
      if (spec_.resized()) {
        resized_input_kernel<format><<<blocks, kBlock, 0, stream>>>(units, frame, sampler);
      } else {
        input_kernel<format><<<blocks, kBlock, 0, stream>>>(units, frame, sampler);
      }
    };
    if (spec_.network.half) {
      launch(static_cast<DeviceHalf*>(network));
    } else {
      launch(static_cast<float*>(network));
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
