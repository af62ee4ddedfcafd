// N:M masks of weight tensors: in each group of m consecutive elements along one axis, the n of
// largest magnitude are kept; ties go to the lower index. One pass makes the mask and uses it.
//
// A plain C interface on pointers, for ctypes: no Python and no torch headers, so the library fits
// every version of both. secateur/kernels/twin.py does the same in PyTorch, bit for bit.
//
// Magnitudes are compared as integers, which orders IEEE numbers of one sign; -0.0 becomes 0, and
// every NaN the same key above infinity. With keys k, element i is beaten by
//   #{j > i : k[j] > k[i]} + #{j < i : k[j] >= k[i]}
// others and is kept if that is less than n: m(m-1)/2 comparisons per group, no branches, eight
// groups at a time. A group at the end of an axis may be shorter; then it has fewer rivals.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define HAVE_AVX2 1
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2")))
#define AVX2_INLINE __attribute__((target("avx2"), always_inline)) inline
#endif

namespace {

constexpr int ABI = 3;         // as in native.py
constexpr int MAX_M = 64;      // as in native.py
constexpr int LANES = 8;       // groups that are worked on at a time
constexpr int64_t GRAIN = 1 << 18;  // elements that are worth a thread

enum Operation { APPLY, MASK, DECAY, PART };
enum Status { OK, BAD_ARGUMENT, FAILED };

// The bits of a floating point format: as signed integers, and those of infinity.
template <typename Integer, Integer INFINITY_BITS>
struct Format {
  using Bits = Integer;
  static Bits magnitude(Bits bits) {
    constexpr Bits nan = INFINITY_BITS + 1;
    const Bits absolute = static_cast<Bits>(bits & std::numeric_limits<Bits>::max());
    return absolute < nan ? absolute : nan;
  }
};
using Half = Format<int16_t, 0x7C00>;
using BFloat16 = Format<int16_t, 0x7F80>;
using Float = Format<int32_t, 0x7F800000>;
using Double = Format<int64_t, 0x7FF0000000000000>;

// What to do. Memory is (outer, length, inner); groups run along length.
struct Task {
  const void* weight;
  void* out;  // DECAY adds to it, and it may be the weight; for PART it is the weight, of which it
              // leaves what is kept; otherwise it shares no memory with it
  float factor;  // of the weight in DECAY, of rest in PART
  int64_t outer, length, inner;
  int n, m;
  float* rest = nullptr;  // PART: added to the weight by its factor, then it takes what is not kept
  uint8_t* mask = nullptr;  // PART: 1 where something is kept

  int64_t groups() const { return (length + m - 1) / m; }  // along one length
  int64_t slabs() const { return outer * groups(); }

  // How many whole groups follow one another in memory from a slab on, where inner is 1.
  int64_t stretch(int64_t index) const {
    return length == m ? outer - index : length / m - index % groups();
  }
};

// One group of rows for all inner positions: contiguous memory, rows * inner elements.
struct Slab {
  int64_t start;
  int rows;

  Slab(const Task& task, int64_t index) {
    const int64_t group = index % task.groups() * task.m;
    start = (index / task.groups() * task.length + group) * task.inner;
    rows = static_cast<int>(std::min<int64_t>(task.m, task.length - group));
  }
};

template <typename T>
T read(const void* from, int64_t at) {
  T value;
  std::memcpy(&value, static_cast<const char*>(from) + at * sizeof(T), sizeof(T));
  return value;
}

template <typename T>
void write(void* to, int64_t at, T value) {
  std::memcpy(static_cast<char*>(to) + at * sizeof(T), &value, sizeof(T));
}

// ------------------------------------------------------------------------------------- portable

// The bits of an element whose magnitude counts.
template <Operation OP, class F>
typename F::Bits element(const Task& task, int64_t at) {
  if constexpr (OP == PART) {
    const float sum = read<float>(task.weight, at) + task.factor * task.rest[at];
    return read<int32_t>(&sum, 0);
  } else {
    return read<typename F::Bits>(task.weight, at);
  }
}

template <Operation OP, class F>
void emit(const Task& task, int64_t at, bool keep) {
  using Bits = typename F::Bits;
  if constexpr (OP == MASK) {
    write<uint8_t>(task.out, at, keep);
  } else if constexpr (OP == APPLY || OP == PART) {
    const Bits bits = element<OP, F>(task, at);
    const bool survives = keep & (F::magnitude(bits) != 0);  // no branch: keeps are random
    write<Bits>(task.out, at, static_cast<Bits>(bits & -static_cast<Bits>(survives)));
    if constexpr (OP == PART) {
      write<Bits>(task.rest, at, static_cast<Bits>(bits & -static_cast<Bits>(!survives)));
      task.mask[at] = survives;
    }
  } else {
    const float now = read<float>(task.out, at);
    const float pulled = now + task.factor * read<float>(task.weight, at);
    write<float>(task.out, at, keep ? now : pulled);
  }
}

// One to LANES groups of the same number of rows; group l begins at base[l].
template <Operation OP, class F>
void tile(const Task& task, const int64_t* base, int lanes, int rows) {
  using Bits = typename F::Bits;
  Bits key[MAX_M][LANES], beaten[MAX_M][LANES];
  for (int i = 0; i < rows; i++)
    for (int l = 0; l < LANES; l++) {
      const int64_t begin = base[l < lanes ? l : 0];  // lanes to spare repeat the first
      key[i][l] = F::magnitude(element<OP, F>(task, begin + i * task.inner));
      beaten[i][l] = static_cast<Bits>(i);
    }
  for (int j = 1; j < rows; j++)
    for (int i = 0; i < j; i++)
      for (int l = 0; l < LANES; l++) {
        const Bits wins = key[j][l] > key[i][l];
        beaten[i][l] = static_cast<Bits>(beaten[i][l] + wins);
        beaten[j][l] = static_cast<Bits>(beaten[j][l] - wins);
      }
  for (int i = 0; i < rows; i++)
    for (int l = 0; l < lanes; l++)
      emit<OP, F>(task, base[l] + i * task.inner, beaten[i][l] < task.n);
}

template <Operation OP, class F>
void portable(const Task& task, int64_t first, int64_t last) {
  int64_t base[LANES];
  int lanes = 0, rows = 0;
  for (int64_t index = first; index < last; index++) {
    const Slab slab(task, index);
    if (lanes && slab.rows != rows) {
      tile<OP, F>(task, base, lanes, rows);
      lanes = 0;
    }
    rows = slab.rows;
    for (int64_t column = 0; column < task.inner; column++) {
      base[lanes++] = slab.start + column;
      if (lanes == LANES) {
        tile<OP, F>(task, base, lanes, rows);
        lanes = 0;
      }
    }
  }
  if (lanes) tile<OP, F>(task, base, lanes, rows);
}

// ----------------------------------------------------------------------------------------- AVX2

#ifdef HAVE_AVX2

AVX2_INLINE __m256i load(const void* from, int64_t at) {
  return _mm256_loadu_si256(
      reinterpret_cast<const __m256i*>(static_cast<const char*>(from) + at * 4));
}

AVX2_INLINE __m256 load_floats(const void* from, int64_t at) {
  return _mm256_castsi256_ps(load(from, at));
}

// factor: of rest in PART, of the weight in DECAY, by lane; otherwise unused.
template <Operation OP>
AVX2_INLINE __m256i element8(const Task& task, int64_t at, __m256 factor) {
  if constexpr (OP == PART) {
    const __m256 rest = _mm256_mul_ps(factor, load_floats(task.rest, at));
    return _mm256_castps_si256(_mm256_add_ps(load_floats(task.weight, at), rest));
  } else {
    return load(task.weight, at);
  }
}

AVX2_INLINE void store(void* to, int64_t at, __m256i bits) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<char*>(to) + at * 4), bits);
}

// One byte, 1 where the lane is all ones.
AVX2_INLINE void store_mask(void* to, int64_t at, __m256i keep) {
  const __m256i ones = _mm256_srli_epi32(keep, 31);
  const __m128i words =
      _mm_packs_epi32(_mm256_castsi256_si128(ones), _mm256_extracti128_si256(ones, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(static_cast<uint8_t*>(to) + at),
                   _mm_packs_epi16(words, words));
}

AVX2_INLINE __m256i absolute(__m256i bits) {
  return _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF));
}

AVX2_INLINE __m256i magnitude(__m256i bits) {
  return _mm256_min_epi32(absolute(bits), _mm256_set1_epi32(0x7F800001));
}

// key[i]: element i of eight groups. Overwrites it with all ones where it is kept, else zeros.
template <int M>
AVX2_INLINE void choose(__m256i* key, int rows, int n) {
  constexpr int capacity = M ? M : MAX_M;
  const int count = M ? M : rows;
  if (n == 1) {  // the first of the largest
    __m256i largest = key[0], earlier = _mm256_setzero_si256();
    for (int i = 1; i < count; i++) largest = _mm256_max_epi32(largest, key[i]);
    for (int i = 0; i < count; i++) {
      key[i] = _mm256_andnot_si256(earlier, _mm256_cmpeq_epi32(key[i], largest));
      earlier = _mm256_or_si256(earlier, key[i]);
    }
    return;
  }
  const __m256i limit = _mm256_set1_epi32(n);
  __m256i beaten[capacity];
  for (int i = 0; i < count; i++) beaten[i] = _mm256_set1_epi32(i);
  for (int j = 1; j < count; j++)
    for (int i = 0; i < j; i++) {
      const __m256i wins = _mm256_cmpgt_epi32(key[j], key[i]);  // -1 where so
      beaten[i] = _mm256_sub_epi32(beaten[i], wins);
      beaten[j] = _mm256_add_epi32(beaten[j], wins);
    }
  for (int i = 0; i < count; i++) key[i] = _mm256_cmpgt_epi32(limit, beaten[i]);
}

template <Operation OP>
AVX2_INLINE void emit8(const Task& task, int64_t at, __m256i keep, __m256 factor) {
  if constexpr (OP == MASK) {
    store_mask(task.out, at, keep);
  } else if constexpr (OP == APPLY || OP == PART) {
    const __m256i bits = element8<OP>(task, at, factor);
    const __m256i nonzero = _mm256_cmpgt_epi32(absolute(bits), _mm256_setzero_si256());
    const __m256i survives = _mm256_and_si256(keep, nonzero);
    store(task.out, at, _mm256_and_si256(bits, survives));
    if constexpr (OP == PART) {
      store(task.rest, at, _mm256_andnot_si256(survives, bits));
      store_mask(task.mask, at, survives);
    }
  } else {
    const __m256 now = load_floats(task.out, at);
    const __m256 pulled = _mm256_add_ps(now, _mm256_mul_ps(factor, load_floats(task.weight, at)));
    _mm256_storeu_ps(static_cast<float*>(task.out) + at,
                     _mm256_blendv_ps(pulled, now, _mm256_castsi256_ps(keep)));
  }
}

// Groups of neighbouring columns side by side. The last eight overlap those before if they must;
// what is done is done again, but for DECAY, which leaves it as it is, and PART, which adds up what
// it took apart.
template <Operation OP, int M>
AVX2_INLINE void columns(const Task& task, const Slab& slab) {
  constexpr int capacity = M ? M : MAX_M;
  const int rows = M ? M : slab.rows;
  for (int64_t column = 0; column < task.inner; column += LANES) {
    const int64_t from = std::min(column, task.inner - LANES), start = slab.start + from;
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i again = _mm256_set1_epi32(static_cast<int>(column - from));
    const __m256i done = _mm256_cmpgt_epi32(again, lane);
    __m256 factor = _mm256_set1_ps(task.factor);
    if (OP == PART) factor = _mm256_blendv_ps(factor, _mm256_set1_ps(1), _mm256_castsi256_ps(done));
    __m256i key[capacity];
    for (int i = 0; i < rows; i++)
      key[i] = magnitude(element8<OP>(task, start + i * task.inner, factor));
    choose<M>(key, rows, task.n);
    if (OP == DECAY)
      for (int i = 0; i < rows; i++) key[i] = _mm256_or_si256(key[i], done);
    for (int i = 0; i < rows; i++) emit8<OP>(task, start + i * task.inner, key[i], factor);
  }
}

// Transposes the 4x4 matrices in the lower and in the upper halves of four registers.
AVX2_INLINE void transpose4(__m256i* v) {
  const __m256i a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpackhi_epi32(v[0], v[1]);
  const __m256i c = _mm256_unpacklo_epi32(v[2], v[3]), d = _mm256_unpackhi_epi32(v[2], v[3]);
  v[0] = _mm256_unpacklo_epi64(a, c);
  v[1] = _mm256_unpackhi_epi64(a, c);
  v[2] = _mm256_unpacklo_epi64(b, d);
  v[3] = _mm256_unpackhi_epi64(b, d);
}

AVX2_INLINE void transpose8(__m256i* v) {
  transpose4(v);
  transpose4(v + 4);
  for (int i = 0; i < 4; i++) {
    const __m256i upper = v[i], lower = v[i + 4];
    v[i] = _mm256_permute2x128_si256(upper, lower, 0x20);
    v[i + 4] = _mm256_permute2x128_si256(upper, lower, 0x31);
  }
}

// Eight whole groups of M, one after the other in memory. Both transpositions undo themselves, so
// that masks take the way back that keys came; which register lane is which group is no matter.
template <Operation OP, int M>
AVX2_INLINE void contiguous(const Task& task, int64_t start) {
  constexpr int block = M < LANES ? M : LANES;
  const __m256 factor = _mm256_set1_ps(task.factor);
  __m256i key[M];
  for (int b = 0; b < M; b += block) {
    for (int i = 0; i < block; i++)
      key[b + i] =
          magnitude(element8<OP>(task, M < LANES ? start + i * LANES : start + i * M + b, factor));
    M < LANES ? transpose4(key) : transpose8(key + b);
  }
  choose<M>(key, M, task.n);
  for (int b = 0; b < M; b += block) {
    M < LANES ? transpose4(key) : transpose8(key + b);
    for (int i = 0; i < block; i++)
      emit8<OP>(task, M < LANES ? start + i * LANES : start + i * M + b, key[b + i], factor);
  }
}

// M: the size of groups if it is one that is compiled for itself, else 0.
template <Operation OP, int M>
AVX2 void avx2(const Task& task, int64_t first, int64_t last) {
  if (task.inner >= LANES) {
    for (; first < last; first++) {
      const Slab slab(task, first);
      if (M && slab.rows == M)
        columns<OP, M>(task, slab);
      else
        columns<OP, 0>(task, slab);
    }
  }
  if constexpr (M != 0) {
    while (task.inner == 1 && first < last) {
      const int64_t end = std::min(last, first + task.stretch(first));
      int64_t start = Slab(task, first).start;
      for (; first + LANES <= end; first += LANES, start += LANES * M)
        contiguous<OP, M>(task, start);
      const int64_t next = std::min(last, end + 1);  // with the shorter group, if there is one
      portable<OP, Float>(task, first, next);
      first = next;
    }
  }
  portable<OP, Float>(task, first, last);
}

template <Operation OP>
void avx2_by_size(const Task& task, int64_t first, int64_t last) {
  switch (task.m) {
    case 4: return avx2<OP, 4>(task, first, last);
    case 8: return avx2<OP, 8>(task, first, last);
    case 16: return avx2<OP, 16>(task, first, last);
    default: return avx2<OP, 0>(task, first, last);
  }
}

#endif

// ------------------------------------------------------------------------------------- dispatch

bool has_avx2() {
#ifdef HAVE_AVX2
  static const bool found = __builtin_cpu_supports("avx2");
  return found;
#else
  return false;
#endif
}

using Work = void (*)(const Task&, int64_t first, int64_t last);

template <Operation OP>
Work for_floats() {
#ifdef HAVE_AVX2
  if (has_avx2()) return avx2_by_size<OP>;
#endif
  return portable<OP, Float>;
}

template <Operation OP>
Work for_format(int format) {
  switch (format) {
    case 0: return for_floats<OP>();
    case 1: return portable<OP, Half>;
    case 2: return portable<OP, BFloat16>;
    case 3: return portable<OP, Double>;
    default: return nullptr;
  }
}

Work find(int operation, int format) {
  switch (operation) {
    case APPLY: return for_format<APPLY>(format);
    case MASK: return for_format<MASK>(format);
    case DECAY: return format == 0 ? for_floats<DECAY>() : nullptr;
    default: return nullptr;
  }
}

// Threads live as long as the call: nothing is left behind that a fork could break.
void share(Work work, const Task& task, int threads) {
  const int64_t elements = task.outer * task.length * task.inner, slabs = task.slabs();
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, elements / GRAIN));
  const int64_t each = (slabs / parts + LANES) / LANES * LANES;
  std::vector<std::thread> helpers;
  helpers.reserve(parts);
  int64_t first = 0;
  try {
    for (; first + each < slabs; first += each)
      helpers.emplace_back(work, std::cref(task), first, first + each);
  } catch (const std::system_error&) {
    // no more threads to be had: this one does what is left
  }
  work(task, first, slabs);
  for (std::thread& helper : helpers) helper.join();
}

int run(Work work, Task task, int threads) {
  if (!work || task.outer < 0 || task.length < 0 || task.inner < 0 || task.n < 1 ||
      task.n >= task.m || task.m > MAX_M || threads < 1)
    return BAD_ARGUMENT;
  if (task.outer == 0 || task.length == 0 || task.inner == 0) return OK;
  if (task.length % task.m == 0) {  // the same memory as groups that follow one another
    task.outer *= task.length / task.m;
    task.length = task.m;
  }
  try {
    share(work, task, threads);
  } catch (const std::bad_alloc&) {
    return FAILED;
  }
  return OK;
}

}  // namespace

extern "C" {

int secateur_nm_abi() { return ABI; }

int secateur_nm_has_avx2() { return has_avx2(); }

// operation: 0 writes the weights with zeros where they are not kept (no zero is negative), 1 one
// byte per weight, 1 where it is kept, 2 (float32 only) adds decay * weight to out where the weight
// is not kept; then out may be the weight. format: 0 float32, 1 float16, 2 bfloat16, 3 float64.
// Returns 0, or 1 if an argument is out of range, or 2 if memory ran out.
int secateur_nm(int operation, int format, const void* weight, void* out, float decay,
                int64_t outer, int64_t length, int64_t inner, int n, int m, int threads) {
  return run(find(operation, format), Task{weight, out, decay, outer, length, inner, n, m},
             threads);
}

// Takes weight + factor * rest apart again, in place: what is kept of it goes to weight, all else to
// rest, a byte to mask, 1 where a weight is kept that is not 0. Returns as secateur_nm does.
int secateur_nm_part(float* weight, float* rest, uint8_t* mask, float factor, int64_t outer,
                      int64_t length, int64_t inner, int n, int m, int threads) {
  const Task task{weight, weight, factor, outer, length, inner, n, m, rest, mask};
  return run(for_floats<PART>(), task, threads);
}
}
