// The weights of a separable resize: which source positions make one output position.
//
// Pillow's definition, with which training data is resized: the filter grows with the scale when reducing, so that
// nothing aliases (and flickers). bilinear is the triangle, bicubic Keys' kernel with a = -0.5, area the exact overlap.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace fastpix2pix {

enum class Filter { bilinear, bicubic, area };

// What loops and kernels see of Taps: output i is the sum over k < count of weight[k * out + i] * source[first[i] + k].
struct TapsView {
  const std::int32_t* first;  // [out]
  const float* weight;        // [count, out]; shorter windows are filled up with zeros
  int count, out;
};

struct Taps {
  std::vector<std::int32_t> first;
  std::vector<float> weight;
  int count = 0;

  TapsView view() const { return {first.data(), weight.data(), count, static_cast<int>(first.size())}; }
};

inline double filter_value(Filter filter, double x) {
  x = std::fabs(x);
  if (filter == Filter::bilinear) return std::max(0.0, 1.0 - x);
  constexpr double a = -0.5;
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
  return x < 2.0 ? (((x - 5.0) * x + 8.0) * x - 4.0) * a : 0.0;
}

inline Taps make_taps(int in, int out, Filter filter) {
  const double scale = static_cast<double>(in) / out;
  const double stretch = std::max(scale, 1.0);
  const double support = (filter == Filter::bicubic ? 2.0 : 1.0) * stretch;
  std::vector<std::vector<double>> windows(out);
  Taps taps;
  taps.first.resize(out);
  for (int i = 0; i < out; ++i) {
    const double centre = (i + 0.5) * scale;
    const double low = filter == Filter::area ? i * scale : centre - support;
    const double high = filter == Filter::area ? (i + 1) * scale : centre + support;
    const int begin = std::max(0, static_cast<int>(std::floor(low)));
    const int end = std::min(in, static_cast<int>(std::ceil(high)));
    int first = -1;
    double total = 0.0;
    for (int j = begin; j < end; ++j) {
      const double w = filter == Filter::area ? std::min(j + 1.0, high) - std::max<double>(j, low)
                                              : filter_value(filter, (j + 0.5 - centre) / stretch);
      if (first < 0 && std::fabs(w) < 1e-9) continue;  // a window begins where it weighs something
      if (first < 0) first = j;
      windows[i].push_back(w);
      total += w;
    }
    while (std::fabs(windows[i].back()) < 1e-9) windows[i].pop_back();
    for (double& w : windows[i]) w /= total;
    taps.first[i] = first;
    taps.count = std::max(taps.count, static_cast<int>(windows[i].size()));
  }
  taps.weight.assign(static_cast<std::size_t>(out) * taps.count, 0.0f);
  for (int i = 0; i < out; ++i) {
    const int shift = std::max(0, taps.first[i] + taps.count - in);  // every window lies inside the line
    taps.first[i] -= shift;
    for (std::size_t k = 0; k < windows[i].size(); ++k) {
      taps.weight[(k + shift) * out + i] = static_cast<float>(windows[i][k]);
    }
  }
  return taps;
}

}  // namespace fastpix2pix
