// How long frames take, without storing them: a histogram with eight buckets per doubling.
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdint>

namespace fastpix2pix {

class Latency {
 public:
  using Duration = std::chrono::nanoseconds;

  void add(Duration duration) {
    const auto ns = static_cast<std::uint64_t>(std::max<Duration::rep>(duration.count(), 0));
    ++buckets_[bucket(ns)];
    ++count_;
    max_ = std::max(max_, ns);
  }

  std::uint64_t count() const { return count_; }
  double max_ms() const { return static_cast<double>(max_) * 1e-6; }

  // The upper end of the bucket that holds the quantile (0 < q <= 1), at most 1/8 above the true one; 0 without frames.
  double quantile_ms(double q) const {
    const auto wanted = static_cast<std::uint64_t>(std::ceil(q * static_cast<double>(count_)));
    std::uint64_t seen = 0;
    for (int i = 0; i < kBuckets; ++i) {
      seen += buckets_[i];
      if (seen >= wanted && seen > 0) return static_cast<double>(std::min(upper(i), max_)) * 1e-6;
    }
    return 0.0;
  }

 private:
  static constexpr int kBuckets = 8 * 62;

  // Values below 8 have a bucket each; above, the three bits after the leading one choose among eight.
  static int bucket(std::uint64_t ns) {
    if (ns < 8) return static_cast<int>(ns);
    const int exponent = 63 - __builtin_clzll(ns);  // >= 3
    return std::min(kBuckets - 1, 8 * (exponent - 2) + static_cast<int>((ns >> (exponent - 3)) & 7));
  }
  static std::uint64_t upper(int i) {
    if (i < 8) return static_cast<std::uint64_t>(i);
    const int shift = i / 8 - 1;
    return ((static_cast<std::uint64_t>(8 + i % 8) + 1) << shift) - 1;
  }

  std::array<std::uint64_t, kBuckets> buckets_{};
  std::uint64_t count_ = 0, max_ = 0;
};

}  // namespace fastpix2pix
