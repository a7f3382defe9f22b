// The CPU's way from a source frame to the network's input, and from its output to a frame: one pass each.
#pragma once

#include <mutex>
#include <vector>

#include "parallel.hpp"
#include "rows.hpp"
#include "spec.hpp"

namespace fastpix2pix {

// Floats that one worker needs for its rows, allocated once. Rows lie behind each other: vertical sums of packed pixels
// go over several from kSums on, pixels of four floats over four from kPixels on.
class Scratch {
 public:
  static constexpr int kLine = 0, kSecondLine = 3, kSums = 6, kPixels = 9;

  Scratch(int workers, std::ptrdiff_t row) : row_(row), memory_(workers * kRows * row + 1) {}
  // Row `index` of a worker.
  float* row(int worker, int index) { return memory_.data() + (worker * kRows + index) * row_; }
  rows::Rows rows(int worker, int index) {
    return {{row(worker, index), row(worker, index + 1), row(worker, index + 2)}};
  }

 private:
  static constexpr std::ptrdiff_t kRows = 13;  // three components twice, three sums, four of pixels
  std::ptrdiff_t row_;
  std::vector<float> memory_;
};

// A plan converts one frame at a time; calls from several threads wait for each other.
class InputPlan {
 public:
  explicit InputPlan(const InputSpec& spec, int threads = 1, int grain = kGrain);
  const InputSpec& spec() const { return spec_; }
  // network: tensor_bytes(spec.network), aligned to its elements.
  void run(void* network, const ConstPlanes& frame);

 private:
  void row(int worker, int y, void* network, const ConstPlanes& frame);
  void load(int y, const ConstPlanes& frame, rows::Rows to) const;
  void load_resized(int worker, int y, const ConstPlanes& frame, rows::Rows to);
  void store(rows::Rows levels, int y, void* network) const;

  InputSpec spec_;
  Resize resize_;
  std::mutex mutex_;
  RowPool pool_;
  Scratch scratch_;
};

class OutputPlan {
 public:
  explicit OutputPlan(const OutputSpec& spec, int threads = 1, int grain = kGrain);
  const OutputSpec& spec() const { return spec_; }
  void run(const Planes& frame, const void* network);

 private:
  void load(int worker, int y, const void* network, rows::Rows to);
  template <class T>
  void load_units(int worker, int y, const T* network, rows::Rows to);

  OutputSpec spec_;
  Resize resize_;
  std::mutex mutex_;
  RowPool pool_;
  Scratch scratch_;
};

}  // namespace fastpix2pix
