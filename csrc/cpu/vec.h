// The SIMD vector: GCC/Clang vector extensions of FASTNN_VECTOR_BYTES, so that one text serves SSE2, AVX2, AVX-512 and
// NEON. Included inside an ISA region (see isa.h); everything lives in fastnn::cpu::<isa>.
//
// Storage types (float, double, BFloat16, Float16) become the compute type (float, or double for double) on load and
// are rounded to nearest even on store.
#pragma once

#include "cpu/isa.h"

namespace fastnn::cpu::FASTNN_ISA {

template <class C>
struct VecOf {
  typedef C type __attribute__((vector_size(FASTNN_VECTOR_BYTES)));
};
template <class C>
using Vec = typename VecOf<C>::type;
template <class C>
inline constexpr int kLanes = FASTNN_VECTOR_BYTES / static_cast<int>(sizeof(C));

// The integer lane of the same width, for masks and bit patterns.
template <class C>
using Bits = std::conditional_t<sizeof(C) == 4, int32_t, int64_t>;

template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

// As many 16-bit lanes as a vector of float has.
typedef uint16_t Half16 __attribute__((vector_size(FASTNN_VECTOR_BYTES / 2)));

template <class C>
FASTNN_INLINE Vec<C> splat(C x) {
  return x - Vec<C>{};
}
template <class C>
FASTNN_INLINE Vec<C> zero() {
  return Vec<C>{};
}

// a·b + c, contracted to one FMA where the ISA has it (-ffp-contract=fast).
template <class V>
FASTNN_INLINE V fma(V a, V b, V c) {
  return a * b + c;
}
template <class V, class M>
FASTNN_INLINE V select(M mask, V a, V b) {
  return mask ? a : b;
}
// Where a comparison with NaN is false these return the second argument: pass the value that may be NaN second.
template <class V>
FASTNN_INLINE V vmin(V a, V b) {
  return a < b ? a : b;
}
template <class V>
FASTNN_INLINE V vmax(V a, V b) {
  return a > b ? a : b;
}
template <class To, class From>
FASTNN_INLINE To bitcast(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  __builtin_memcpy(&y, &x, sizeof y);
  return y;
}
template <class C>
FASTNN_INLINE Vec<C> vabs(Vec<C> x) {
  using I = Vec<Bits<C>>;
  return bitcast<Vec<C>>(bitcast<I>(x) & std::numeric_limits<Bits<C>>::max());
}
template <class C>
FASTNN_INLINE Vec<C> copysign(Vec<C> magnitude, Vec<C> sign) {
  using I = Vec<Bits<C>>;
  constexpr Bits<C> rest = std::numeric_limits<Bits<C>>::max();
  return bitcast<Vec<C>>((bitcast<I>(magnitude) & rest) | (bitcast<I>(sign) & ~rest));
}

// ---- 16-bit formats ------------------------------------------------------------------------------------------------

FASTNN_INLINE Vec<float> widen_bfloat16(Half16 h) {
  return bitcast<Vec<float>>(__builtin_convertvector(h, Vec<uint32_t>) << 16);
}
FASTNN_INLINE Half16 narrow_bfloat16(Vec<float> x) {
  const Vec<uint32_t> bits = bitcast<Vec<uint32_t>>(x);
  const Vec<uint32_t> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Vec<uint32_t> quiet = (bits >> 16) | 0x40;  // NaN stays NaN: rounding could carry its payload into infinity
  return __builtin_convertvector(x == x ? rounded : quiet, Half16);
}
FASTNN_INLINE Vec<float> widen_float16(Half16 h) {
#if defined(__AVX512F__) && FASTNN_VECTOR_BYTES == 64
  return bitcast<Vec<float>>(_mm512_cvtph_ps(bitcast<__m256i>(h)));
#elif defined(__F16C__) && FASTNN_VECTOR_BYTES == 32
  return bitcast<Vec<float>>(_mm256_cvtph_ps(bitcast<__m128i>(h)));
#else
  const Vec<uint32_t> wide = __builtin_convertvector(h, Vec<uint32_t>);
  // Shifted into place the exponent is 112 too small; the multiplication mends it and makes subnormals normal.
  const Vec<float> scaled = bitcast<Vec<float>>((wide & 0x7fff) << 13) * 0x1p112f;
  const Vec<uint32_t> special = (wide & 0x7c00) == 0x7c00 ? splat<uint32_t>(0x7f800000) : zero<uint32_t>();
  return bitcast<Vec<float>>(bitcast<Vec<uint32_t>>(scaled) | special | ((wide & 0x8000) << 16));
#endif
}
FASTNN_INLINE Half16 narrow_float16(Vec<float> x) {
#if defined(__AVX512F__) && FASTNN_VECTOR_BYTES == 64
  return bitcast<Half16>(_mm512_cvtps_ph(bitcast<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__) && FASTNN_VECTOR_BYTES == 32
  return bitcast<Half16>(_mm256_cvtps_ph(bitcast<__m256>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const Vec<uint32_t> bits = bitcast<Vec<uint32_t>>(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  const Vec<uint32_t> normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  // Below 2^-14 the sum with 0.5 rounds at the spacing of float16's subnormals.
  const Vec<uint32_t> tiny = bitcast<Vec<uint32_t>>(bitcast<Vec<float>>(magnitude) + 0.5f) - bitcast<uint32_t>(0.5f);
  Vec<uint32_t> out = magnitude < 0x38800000u ? tiny : normal;
  out = magnitude >= 0x477ff000u ? splat<uint32_t>(0x7c00) : out;
  out = magnitude > 0x7f800000u ? splat<uint32_t>(0x7e00) : out;
  return __builtin_convertvector(out | sign, Half16);
#endif
}

// ---- memory --------------------------------------------------------------------------------------------------------

FASTNN_INLINE Vec<float> load(const float* p) {
  Vec<float> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
FASTNN_INLINE Vec<double> load(const double* p) {
  Vec<double> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
FASTNN_INLINE Vec<float> load(const BFloat16* p) {
  Half16 h;
  __builtin_memcpy(&h, p, sizeof h);
  return widen_bfloat16(h);
}
FASTNN_INLINE Vec<float> load(const Float16* p) {
  Half16 h;
  __builtin_memcpy(&h, p, sizeof h);
  return widen_float16(h);
}
FASTNN_INLINE void store(float* p, Vec<float> v) { __builtin_memcpy(p, &v, sizeof v); }
FASTNN_INLINE void store(double* p, Vec<double> v) { __builtin_memcpy(p, &v, sizeof v); }
FASTNN_INLINE void store(BFloat16* p, Vec<float> v) {
  const Half16 h = narrow_bfloat16(v);
  __builtin_memcpy(p, &h, sizeof h);
}
FASTNN_INLINE void store(Float16* p, Vec<float> v) {
  const Half16 h = narrow_float16(v);
  __builtin_memcpy(p, &h, sizeof h);
}

// The first `count` lanes (0 … lanes), nothing beyond them touched; other lanes load as zero.
template <class T>
FASTNN_INLINE Vec<Compute<T>> load_first(const T* p, int64_t count) {
  if (count >= kLanes<Compute<T>>) return load(p);
  alignas(64) T buffer[kLanes<Compute<T>>] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = p[i];
  return load(buffer);
}
template <class T>
FASTNN_INLINE void store_first(T* p, Vec<Compute<T>> v, int64_t count) {
  if (count >= kLanes<Compute<T>>) return store(p, v);
  alignas(64) T buffer[kLanes<Compute<T>>];
  store(buffer, v);
  for (int64_t i = 0; i < count; ++i) p[i] = buffer[i];
}

// One element, converted with the same rounding as a vector's lane.
template <class T>
FASTNN_INLINE Compute<T> load_one(const T* p) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return bitcast<float>(static_cast<uint32_t>(p->bits) << 16);
  } else if constexpr (std::is_same_v<T, Float16>) {
    Half16 h = {};
    h[0] = p->bits;
    return widen_float16(h)[0];
  } else {
    return *p;
  }
}
template <class T>
FASTNN_INLINE void store_one(T* p, Compute<T> x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    p->bits = narrow_bfloat16(splat<float>(x))[0];
  } else if constexpr (std::is_same_v<T, Float16>) {
    p->bits = narrow_float16(splat<float>(x))[0];
  } else {
    *p = x;
  }
}

// ---- across lanes, always in the same order --------------------------------------------------------------------------

// Lane i of the result is lane i ^ DISTANCE. The mask is a constant of the program text: GCC would fill one in at run time
// if it were made in a loop.
template <int DISTANCE, class C, int... LANE>
FASTNN_INLINE Vec<C> swap_lanes(Vec<C> v, std::integer_sequence<int, LANE...>) {
  return __builtin_shuffle(v, Vec<Bits<C>>{static_cast<Bits<C>>(LANE ^ DISTANCE)...});
}
template <int DISTANCE, class C>
FASTNN_INLINE Vec<C> swap_lanes(Vec<C> v) {
  return swap_lanes<DISTANCE, C>(v, std::make_integer_sequence<int, kLanes<C>>{});
}
template <class C, int HALF = kLanes<C> / 2>
FASTNN_INLINE C reduce_add(Vec<C> v) {
  v += swap_lanes<HALF, C>(v);
  if constexpr (HALF > 1) return reduce_add<C, HALF / 2>(v);
  return v[0];
}
template <class C, int HALF = kLanes<C> / 2>
FASTNN_INLINE C reduce_max(Vec<C> v) {
  v = vmax(swap_lanes<HALF, C>(v), v);
  if constexpr (HALF > 1) return reduce_max<C, HALF / 2>(v);
  return v[0];
}

}  // namespace fastnn::cpu::FASTNN_ISA
