// Do the arguments of fastnn::conv2d fit, and which algorithm runs?
#include "bindings/conv2d.h"

namespace fastnn::bindings {

std::optional<Conv2dAlgorithm> forced_conv2d;
std::atomic<bool> winograd_allowed{true};

Conv2dProblem check_conv2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride,
                           IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
#define FASTNN_CHECK(condition, ...) TORCH_CHECK(condition, "fastnn.conv2d: ", __VA_ARGS__, ".")
  FASTNN_CHECK(input.dim() == 3 || input.dim() == 4, "input must be [C, H, W] or [N, C, H, W]; got ", input.sizes());
  FASTNN_CHECK(weight.dim() == 4, "weight must be [K, C / groups, R, S]; got ", weight.sizes());
  check_same("conv2d", "weight", weight, input, "input");
  FASTNN_CHECK(stride.size() == 2 && stride[0] > 0 && stride[1] > 0, "stride must be positive; got ", stride);
  FASTNN_CHECK(dilation.size() == 2 && dilation[0] > 0 && dilation[1] > 0, "dilation must be positive; got ", dilation);
  FASTNN_CHECK(padding.size() == 4, "padding must be top, bottom, left, right; got ", padding);
  for (const int64_t pad : padding) FASTNN_CHECK(pad >= 0, "padding must not be negative; got ", padding);
  FASTNN_CHECK(groups > 0, "groups must be positive; got ", groups);
  Conv2dProblem p;
  p.batched = input.dim() == 4;
  p.input = p.batched ? input : input.unsqueeze(0);
  Conv2dShape& s = p.shape;
  s.N = p.input.size(0), s.C = p.input.size(1), s.H = p.input.size(2), s.W = p.input.size(3);
  s.K = weight.size(0), s.R = weight.size(2), s.S = weight.size(3);
  s.groups = groups;
  s.stride_h = stride[0], s.stride_w = stride[1];
  s.pad_top = padding[0], s.pad_left = padding[2];
  s.dilation_h = dilation[0], s.dilation_w = dilation[1];
  FASTNN_CHECK(s.K > 0 && s.K % groups == 0, "weight must have a positive multiple of groups = ", groups,
               " output channels; got ", weight.sizes());
  FASTNN_CHECK(s.C == weight.size(1) * groups, "input must have ", weight.size(1) * groups, " channels (weight is ",
               weight.sizes(), ", groups = ", groups, "); got ", input.sizes());
  FASTNN_CHECK(s.R > 0 && s.S > 0, "weight must have a kernel size above zero; got ", weight.sizes());
  FASTNN_CHECK((s.H > 0 && s.W > 0) || s.N == 0 || s.C == 0,
               "input must not be empty but for its batch or channels; got ", input.sizes());
  const int64_t rows = s.H + padding[0] + padding[1], columns = s.W + padding[2] + padding[3];
  const int64_t reach_h = (s.R - 1) * s.dilation_h + 1, reach_w = (s.S - 1) * s.dilation_w + 1;
  FASTNN_CHECK(rows >= reach_h && columns >= reach_w, "input with its padding (", rows, " x ", columns,
               ") must be no smaller than the dilated kernel; got a kernel of ", reach_h, " x ", reach_w);
  s.OH = (rows - reach_h) / s.stride_h + 1, s.OW = (columns - reach_w) / s.stride_w + 1;
  if (bias && bias->defined()) {
    check_same("conv2d", "bias", *bias, input, "input");
    FASTNN_CHECK(bias->dim() == 1 && bias->size(0) == s.K, "bias must be [", s.K, "]; got ", bias->sizes());
    p.bias = bias->contiguous();
  }
#undef FASTNN_CHECK
  p.format = p.input.suggest_memory_format();
  if (p.format != at::MemoryFormat::ChannelsLast) p.format = weight.suggest_memory_format();
  if (p.format != at::MemoryFormat::ChannelsLast) p.format = at::MemoryFormat::Contiguous;
  s.channels_last = p.format == at::MemoryFormat::ChannelsLast;
  p.output_shape = {s.N, s.C == 0 ? 0 : s.K, s.OH, s.OW};  // torch gives no channels where it gets none
  return p;
}

Conv2dAlgorithm choose(const Conv2dShape& s, bool winograd, bool frozen) {
  if (!forced_conv2d) return conv2d_algorithm(s, winograd && winograd_allowed.load(std::memory_order_relaxed), frozen);
  const bool fits = is_winograd(*forced_conv2d)                    ? winograd && s.winograd()
                    : *forced_conv2d == Conv2dAlgorithm::Pointwise ? s.pointwise()
                                                                   : *forced_conv2d != Conv2dAlgorithm::Linear;
  return fits ? *forced_conv2d : Conv2dAlgorithm::Implicit;
}

// An image and a filter are rows of the same order in memory.
static bool linear_fits(const Conv2dProblem& q, const Tensor& weight) {
  return q.shape.whole() && q.input.is_contiguous(q.format) && weight.is_contiguous(q.format);
}
Conv2dAlgorithm choose(const Conv2dProblem& q, const Tensor& weight, bool frozen) {
  const bool free = !forced_conv2d || *forced_conv2d == Conv2dAlgorithm::Linear;
  if (free && linear_fits(q, weight)) return Conv2dAlgorithm::Linear;
  return choose(q.shape, winograd_suits(*dtype_of(weight)), frozen);
}

Conv2dAlgorithm conv2d_algorithm_named(std::string_view name) {
  return algorithm_of<Conv2dAlgorithm>("conv2d", kConv2dAlgorithmNames, name);
}

Conv2dParams pack_params(IntArrayRef weight_sizes, DType dtype, int64_t groups, bool channels_last, Name algorithm) {
  Conv2dParams p{};
  p.dtype = dtype;
  p.shape.K = weight_sizes[0], p.shape.C = weight_sizes[1] * groups;
  p.shape.R = weight_sizes[2], p.shape.S = weight_sizes[3];
  p.shape.groups = groups;
  p.shape.stride_h = p.shape.stride_w = p.shape.dilation_h = p.shape.dilation_w = 1;
  p.shape.channels_last = channels_last;
  p.algorithm = algorithm ? conv2d_algorithm_named(*algorithm) : choose(p.shape, forced_conv2d.has_value(), true);
  TORCH_CHECK_VALUE(p.algorithm != Conv2dAlgorithm::Linear && (!is_winograd(p.algorithm) || p.shape.winograd()),
                    "fastnn.conv2d_pack: algorithm must fit the weight ", weight_sizes, "; got '",
                    kConv2dAlgorithmNames[static_cast<int>(p.algorithm)], "'.");
  p.threads = num_threads();
  return p;
}

std::vector<int64_t> packed_shape(const Conv2dParams& p) {
  const int64_t size = cpu::conv2d_packed_size(p);
  if (is_winograd(p.algorithm)) {
    const int64_t points = p.algorithm == Conv2dAlgorithm::Winograd2 ? 16 : 36, in = p.shape.group_in();
    const int64_t width = cpu::conv2d_panel_width(p);
    return {points, p.shape.groups, in ? size / (points * p.shape.groups * in * width) : 0, in, width};
  }
  if (!p.shape.channels_last) return {size};
  const int64_t depth = p.shape.group_in() * p.shape.R * p.shape.S;
  const int64_t lines = p.algorithm == Conv2dAlgorithm::Direct ? 1 : p.shape.groups;
  return {depth, lines, depth ? size / (depth * lines) : 0};
}

}  // namespace fastnn::bindings
