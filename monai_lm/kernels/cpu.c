// The kernels on CPUs. What each of them computes, its contract, stands in reference.py under the same name.
//
// Arrays are (B, C, X, Y, Z), float32 or half precision, pairs anywhere in memory, all else contiguous; 2D has X = 1.
// Work is cut into items that threads take in turn. No result depends on how it is cut: sums over windows are made
// directly, never by adding to a running one, and sums over volumes line by line, then over the lines in their order.
// Filters go along x first, where a row of the result needs rows of few planes; those sums of rows wait in a ring for
// the filter along y, and its rows go through the filter along z: everything but the planes lies in the nearest cache.
//
// C11 with pthreads; no other headers, no OpenMP library (`omp simd` is a hint to the compiler).

#include <pthread.h>
#include <setjmp.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
  void *data;
  int64_t pair;     // elements from one pair to the next
  int64_t size[3];  // X, Y, Z
  int32_t channels;
  int32_t type;     // FLOAT, HALF or BFLOAT
} Array;

enum { FLOAT, HALF, BFLOAT };

#define INLINE static inline __attribute__((always_inline))
#define SIMD _Pragma("omp simd")
#define SIMD_SUM(s) _Pragma(SIMD_TEXT(omp simd reduction(+ : s)))
#define SIMD_TEXT(...) #__VA_ARGS__
#define EXPORT __attribute__((visibility("default")))

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t within(int64_t i, int64_t size) { return i < 0 ? 0 : i < size ? i : size - 1; }
INLINE float clamped(float p, float last) {  // NaN becomes 0
  p = p > 0.0f ? p : 0.0f;
  return p < last ? p : last;
}
INLINE float positive(float v) { return v > 0.0f ? v : 0.0f; }

// --- threads: a pool that is started when it is needed, and forgotten in a forked process

typedef void Work(void *task, int64_t item);

static _Thread_local jmp_buf *escape;  // where an item without memory ends; what it had is lost, which is little

static int done(Work *work, void *task, int64_t item) {
  jmp_buf here;
  if (setjmp(here)) return 0;
  escape = &here;
  work(task, item);
  return 1;
}

static void *given(void *memory, int64_t bytes) {
  if (!memory && bytes) longjmp(*escape, 1);
  return memory;
}

// Memory for an item of work.
static void *get(int64_t bytes) { return given(malloc(bytes), bytes); }
static void *get_zeros(int64_t bytes) { return given(calloc(bytes, 1), bytes); }

static pthread_mutex_t owner = PTHREAD_MUTEX_INITIALIZER;
static struct {
  pthread_mutex_t lock;
  pthread_cond_t wake, done;
  int workers, wanted, running;
  uint64_t job;
  Work *work;
  void *task;
  int64_t items;
  atomic_llong next, failed;
} pool = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, PTHREAD_COND_INITIALIZER, 0, 0, 0, 0, 0, 0, 0, 0, 0};

static void take_items(Work *work, void *task, int64_t items) {
  for (int64_t item; (item = atomic_fetch_add(&pool.next, 1)) < items;)
    if (!done(work, task, item)) atomic_fetch_add(&pool.failed, 1);
}

static void *worker(void *number) {
  const int mine = (int)(intptr_t)number;
  pthread_mutex_lock(&pool.lock);
  for (uint64_t seen = 0;;) {
    while (pool.job == seen || mine >= pool.wanted) {
      seen = pool.job;
      pthread_cond_wait(&pool.wake, &pool.lock);
    }
    seen = pool.job;
    Work *work = pool.work;
    void *task = pool.task;
    const int64_t items = pool.items;
    pthread_mutex_unlock(&pool.lock);
    take_items(work, task, items);
    pthread_mutex_lock(&pool.lock);
    if (--pool.running == 0) pthread_cond_signal(&pool.done);
  }
  return NULL;
}

static void forget(void) {
  pthread_mutex_init(&owner, NULL);
  pthread_mutex_init(&pool.lock, NULL);
  pthread_cond_init(&pool.wake, NULL);
  pthread_cond_init(&pool.done, NULL);
  pool.workers = pool.running = 0;
}

static void start_workers(int count) {
  static int registered;
  if (!registered) registered = pthread_atfork(NULL, NULL, forget) == 0;
  for (; registered && pool.workers < count; pool.workers++) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, worker, (void *)(intptr_t)pool.workers)) break;
    pthread_detach(thread);
  }
}

// How many items had no memory.
static int64_t parallel(int64_t items, int threads, Work *work, void *task) {
  if (threads > items) threads = (int)items;
  if (threads < 2 || pthread_mutex_trylock(&owner)) {  // somebody else's threads are at work: this one does it all
    int64_t failed = 0;
    for (int64_t item = 0; item < items; item++) failed += !done(work, task, item);
    return failed;
  }
  pthread_mutex_lock(&pool.lock);
  start_workers(threads - 1);
  pool.wanted = pool.running = (int)least(threads - 1, pool.workers);
  pool.work = work;
  pool.task = task;
  pool.items = items;
  atomic_store(&pool.next, 0);
  atomic_store(&pool.failed, 0);
  pool.job++;
  pthread_cond_broadcast(&pool.wake);
  pthread_mutex_unlock(&pool.lock);
  take_items(work, task, items);
  pthread_mutex_lock(&pool.lock);
  while (pool.running) pthread_cond_wait(&pool.done, &pool.lock);
  pool.wanted = 0;
  pthread_mutex_unlock(&pool.lock);
  const int64_t failed = atomic_load(&pool.failed);
  pthread_mutex_unlock(&owner);
  return failed;
}

// Cut [0, size) into parts of about `length`, at least as many as threads; how many, and where the part starts.
INLINE int64_t part_count(int64_t size, int64_t length) { return most(1, (size + length / 2) / length); }
INLINE int64_t part_start(int64_t size, int64_t parts, int64_t part) { return size * part / parts; }

// --- rows

static const int BYTES[] = {4, 2, 2};

INLINE float half_value(uint16_t h) {
  union { uint32_t u; float f; } v = {(uint32_t)(h & 0x7fff) << 13};
  v.f *= 0x1p112f;
  v.u |= v.f >= 65536.0f ? 0x7f800000u : 0;
  v.u |= (uint32_t)(h & 0x8000) << 16;
  return v.f;
}

INLINE uint16_t half_bits(float f) {  // to the nearest, ties to even
  union { float f; uint32_t u; } v = {f}, small;
  const uint32_t sign = v.u & 0x80000000u, u = v.u ^ sign;
  small.u = u;
  small.f += 0.5f;
  const uint32_t tiny = small.u - 0x3f000000u;
  const uint32_t normal = (u - 0x37fff001u + ((u >> 13) & 1)) >> 13;
  const uint32_t large = u > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return (uint16_t)((u >= 0x477ff000u ? large : u < 0x38800000u ? tiny : normal) | sign >> 16);
}

INLINE float bfloat_value(uint16_t h) {
  union { uint32_t u; float f; } v = {(uint32_t)h << 16};
  return v.f;
}

INLINE uint16_t bfloat_bits(float f) {  // to the nearest, ties to even
  union { float f; uint32_t u; } v = {f};
  const uint32_t rounded = (v.u + 0x7fffu + ((v.u >> 16) & 1)) >> 16;
  return (uint16_t)((v.u & 0x7fffffffu) > 0x7f800000u ? v.u >> 16 | 0x40u : rounded);
}

INLINE void *at(const Array *a, int64_t pair, int64_t channel) {
  const int64_t volume = a->size[0] * a->size[1] * a->size[2];
  return (char *)a->data + BYTES[a->type] * (pair * a->pair + channel * volume);
}

static __attribute__((noinline)) const float *widened(const uint16_t *h, int type, int64_t Z, float *buffer) {
  if (type == HALF) {
    SIMD for (int64_t z = 0; z < Z; z++) buffer[z] = half_value(h[z]);
  } else {
    SIMD for (int64_t z = 0; z < Z; z++) buffer[z] = bfloat_value(h[z]);
  }
  return buffer;
}

static __attribute__((noinline)) void narrowed(uint16_t *h, int type, int64_t Z, const float *values) {
  if (type == HALF) {
    SIMD for (int64_t z = 0; z < Z; z++) h[z] = half_bits(values[z]);
  } else {
    SIMD for (int64_t z = 0; z < Z; z++) h[z] = bfloat_bits(values[z]);
  }
}

// A row of Z values from the element `first` on, as it is or widened into a buffer.
INLINE const float *row(const void *data, int type, int64_t first, int64_t Z, float *buffer) {
  if (type == FLOAT) return (const float *)data + first;
  return widened((const uint16_t *)data + first, type, Z, buffer);
}

INLINE void put(void *data, int type, int64_t first, int64_t Z, const float *values) {
  if (type != FLOAT) narrowed((uint16_t *)data + first, type, Z, values);
  else if ((float *)data + first != values) memcpy((float *)data + first, values, Z * sizeof(float));
}

// Where a result of Z values can be made: in its place, or in a buffer.
INLINE float *place(void *data, int type, int64_t first, float *buffer) {
  return type == FLOAT ? (float *)data + first : buffer;
}

static double summed(const double *lines, int64_t count) {
  double total = 0;
  for (int64_t i = 0; i < count; i++) total += lines[i];
  return total;
}

enum { ROWS_AT_A_TIME = 32 };

INLINE int64_t row_items(const Array *a) { return (a->size[0] * a->size[1] + ROWS_AT_A_TIME - 1) / ROWS_AT_A_TIME; }

// --- sampling

typedef struct {
  float *x, *y, *z;
} Places;  // positions of a row of voxels

static float *cut_places(Places *p, float *memory, int64_t Z) {
  p->x = memory, p->y = memory + Z, p->z = memory + 2 * Z;
  return memory + 3 * Z;
}

INLINE float value(const void *data, int32_t i, const int type) {
  return type == FLOAT ? ((const float *)data)[i]
         : type == HALF ? half_value(((const uint16_t *)data)[i])
                        : bfloat_value(((const uint16_t *)data)[i]);
}

INLINE float between(float a, float b, float f, float g) { return a * g + b * f; }  // g = 1 - f: exact at both ends

// Values of some channels at positions; all of them in one loop, which finds the voxels around a position once.
INLINE void pick_as(const void *const *data, const int count, const Places *p, const int64_t *size, int64_t Z,
                    float *const *out, const int add, const int n, const int type) {
  const int32_t sx = (int32_t)(size[1] * size[2]), sy = (int32_t)size[2];
  const float ex = (float)(size[0] - 1), ey = (float)(size[1] - 1), ez = (float)(size[2] - 1);
  const int32_t lx = (int32_t)size[0] - 2, ly = (int32_t)size[1] - 2, lz = (int32_t)size[2] - 2;
  const float *px = p->x, *py = p->y, *pz = p->z;
  SIMD for (int64_t z = 0; z < Z; z++) {
    const float qx = n == 3 ? clamped(px[z], ex) : 0, qy = clamped(py[z], ey), qz = clamped(pz[z], ez);
    int32_t ix = (int32_t)qx, iy = (int32_t)qy, iz = (int32_t)qz;
    ix = ix < lx ? ix : lx, iy = iy < ly ? iy : ly, iz = iz < lz ? iz : lz;
    if (n == 2) ix = 0;
    const float fx = qx - (float)ix, fy = qy - (float)iy, fz = qz - (float)iz;
    const float gx = 1.0f - fx, gy = 1.0f - fy, gz = 1.0f - fz;
    const int32_t b = ix * sx + iy * sy + iz, c = b + sy, d = b + sx, e = d + sy;
#pragma GCC unroll 3
    for (int k = 0; k < count; k++) {
      const void *q = data[k];
      float v = between(between(value(q, b, type), value(q, b + 1, type), fz, gz),
                        between(value(q, c, type), value(q, c + 1, type), fz, gz), fy, gy);
      if (n == 3)
        v = between(v, between(between(value(q, d, type), value(q, d + 1, type), fz, gz),
                               between(value(q, e, type), value(q, e + 1, type), fz, gz), fy, gy), fx, gx);
      out[k][z] = add ? out[k][z] + v : v;
    }
  }
}

static void pick(const Array *a, int64_t pair, int64_t channel, const Places *p, int64_t Z, float *out, int n) {
  const void *data[1] = {at(a, pair, channel)};
  float *const to[1] = {out};
  if (a->type == FLOAT && n == 3) pick_as(data, 1, p, a->size, Z, to, 0, 3, FLOAT);
  else if (a->type == FLOAT) pick_as(data, 1, p, a->size, Z, to, 0, 2, FLOAT);
  else if (a->type == HALF && n == 3) pick_as(data, 1, p, a->size, Z, to, 0, 3, HALF);
  else if (a->type == HALF) pick_as(data, 1, p, a->size, Z, to, 0, 2, HALF);
  else if (n == 3) pick_as(data, 1, p, a->size, Z, to, 0, 3, BFLOAT);
  else pick_as(data, 1, p, a->size, Z, to, 0, 2, BFLOAT);
}

// Values of a field of n components at positions, added to `to`.
static void add_field(const Array *field, int64_t pair, const Places *p, int64_t Z, float *const *to, float *buffer,
                      int n) {
  if (field->type == FLOAT) {
    const void *data[3];
    for (int c = 0; c < n; c++) data[c] = at(field, pair, c);
    if (n == 3) pick_as(data, 3, p, field->size, Z, to, 1, 3, FLOAT);
    else pick_as(data, 2, p, field->size, Z, to, 1, 2, FLOAT);
    return;
  }
  for (int c = 0; c < n; c++) {
    pick(field, pair, c, p, Z, buffer, n);
    SIMD for (int64_t z = 0; z < Z; z++) to[c][z] += buffer[z];
  }
}

// Positions of the voxels of a row, moved by a field (NULL: by nothing).
static void displaced(const Array *ddf, int64_t pair, int64_t x, int64_t y, int64_t Y, int64_t Z, Places *p,
                      float *buffer, int n) {
  float *to[3] = {p->x, p->y, p->z};
  for (int axis = 3 - n; axis < 3; axis++) {
    const float *r = ddf ? row(at(ddf, pair, axis - 3 + n), ddf->type, (x * Y + y) * Z, Z, buffer) : NULL;
    const float first = axis == 0 ? (float)x : axis == 1 ? (float)y : 0.0f, ahead = axis == 2 ? 1.0f : 0.0f;
    float *out = to[axis];
    if (r) {
      SIMD for (int64_t z = 0; z < Z; z++) out[z] = first + ahead * (float)z + r[z];
    } else {
      SIMD for (int64_t z = 0; z < Z; z++) out[z] = first + ahead * (float)z;
    }
  }
}

typedef struct {
  const Array *image, *ddf, *outer, *out;
  const float *shift, *factor;
  int n;
} Sample;

static void sample_rows(void *task, int64_t item) {
  const Sample *t = task;
  const int n = t->n;
  const int64_t Y = t->out->size[1], Z = t->out->size[2], rows = t->out->size[0] * Y, items = row_items(t->out);
  const int64_t pair = item / items, first = item % items * ROWS_AT_A_TIME;
  float *memory = get(sizeof(float) * Z * 10);
  Places p, q;
  float *buffer = cut_places(&q, cut_places(&p, memory, Z), Z), *out = buffer + Z;
  for (int64_t r = first; r < least(first + ROWS_AT_A_TIME, rows); r++) {
    displaced(t->ddf, pair, r / Y, r % Y, Y, Z, &p, buffer, n);
    if (t->outer) {
      memcpy(q.x, p.x, sizeof(float) * 3 * Z);
      float *to[3] = {n == 3 ? p.x : p.y, n == 3 ? p.y : p.z, p.z};
      add_field(t->outer, pair, &q, Z, to, buffer, n);
    }
    for (int64_t c = 0; c < t->image->channels; c++) {
      void *to = at(t->out, pair, c);
      float *values = place(to, t->out->type, r * Z, out);
      pick(t->image, pair, c, &p, Z, values, n);
      const int64_t which = pair * t->image->channels + c;
      const float shift = t->shift ? t->shift[which] : 0.0f, factor = t->factor ? t->factor[which] : 1.0f;
      if (t->shift || t->factor) {
        SIMD for (int64_t z = 0; z < Z; z++) values[z] = (values[z] - shift) * factor;
      }
      put(to, t->out->type, r * Z, Z, values);
    }
  }
  free(memory);
}

EXPORT int sample(const Array *image, const Array *ddf, const Array *outer, const float *shift, const float *factor,
                   const Array *out, int64_t pairs, int n, int threads) {
  Sample task = {image, ddf, outer, out, shift, factor, n};
  return parallel(pairs * row_items(out), threads, sample_rows, &task) > 0;
}

typedef struct {
  const Array *outer, *inner, *out;
  int n;
} Compose;

static void compose_rows(void *task, int64_t item) {
  const Compose *t = task;
  const int n = t->n;
  const int64_t Y = t->out->size[1], Z = t->out->size[2], rows = t->out->size[0] * Y, items = row_items(t->out);
  const int64_t pair = item / items, first = item % items * ROWS_AT_A_TIME;
  float *memory = get(sizeof(float) * Z * 8), *to[3];
  Places p;
  float *buffer = cut_places(&p, memory, Z);
  for (int c = 0; c < 3; c++) to[c] = buffer + (c + 1) * Z;
  for (int64_t r = first; r < least(first + ROWS_AT_A_TIME, rows); r++) {
    displaced(t->inner, pair, r / Y, r % Y, Y, Z, &p, buffer, n);
    for (int c = 0; c < n; c++) put(to[c], FLOAT, 0, Z, row(at(t->inner, pair, c), t->inner->type, r * Z, Z, buffer));
    add_field(t->outer, pair, &p, Z, to, buffer, n);
    for (int c = 0; c < n; c++) put(at(t->out, pair, c), t->out->type, r * Z, Z, to[c]);
  }
  free(memory);
}

EXPORT int compose(const Array *outer, const Array *inner, const Array *out, int64_t pairs, int n, int threads) {
  Compose task = {outer, inner, out, n};
  return parallel(pairs * row_items(out), threads, compose_rows, &task) > 0;
}

// --- filters

enum { UNROLLED = 6 };

// t = w0 rows[0] + Σ w_k (rows[k] + rows[-k]); the rows in the middle of an array of pointers
INLINE void taps_of(float *t, const float *const *rows, const float *w, const int radius, int64_t Z) {
  SIMD for (int64_t z = 0; z < Z; z++) {
    float sum = w[0] * rows[0][z];
#pragma GCC unroll 8
    for (int k = 1; k <= radius; k++) sum += w[k] * (rows[k][z] + rows[-k][z]);
    t[z] = sum;
  }
}

static void taps(float *t, const float *const *rows, const float *w, int radius, int64_t Z) {
  switch (radius) {
    case 0: taps_of(t, rows, w, 0, Z); return;
    case 1: taps_of(t, rows, w, 1, Z); return;
    case 2: taps_of(t, rows, w, 2, Z); return;
    case 3: taps_of(t, rows, w, 3, Z); return;
    case 4: taps_of(t, rows, w, 4, Z); return;
    case 5: taps_of(t, rows, w, 5, Z); return;
  }
  taps_of(t, rows, w, UNROLLED, Z);
  for (int k = UNROLLED + 1; k <= radius; k++) {
    const float *a = rows[k], *b = rows[-k], v = w[k];
    SIMD for (int64_t z = 0; z < Z; z++) t[z] += v * (a[z] + b[z]);
  }
}

// The same along a row that is continued by its radius on both sides.
static void taps_along(float *t, const float *padded, const float *w, int radius, int64_t Z, const float **rows) {
  for (int k = -radius; k <= radius; k++) rows[k] = padded + radius + k;
  taps(t, rows, w, radius, Z);
}

INLINE void continue_ends(float *padded, int radius, int64_t Z) {
  for (int k = 0; k < radius; k++) padded[k] = padded[radius], padded[radius + Z + k] = padded[radius + Z - 1];
}

typedef struct {
  const Array *x, *out;
  const float *taps[3];
  int radius[3];
  const float *bulk;    // per channel, NULL: none
  const float *weight;  // NULL: the smooth values themselves
  int64_t slabs, parts;
} Smooth;

// t += factor · (difference along a row, central, one-sided at its ends); rows have two values at least.
INLINE void add_slope(float *t, const float *r, float factor, int64_t Z) {
  const float half = 0.5f * factor;
  t[0] += factor * (r[1] - r[0]), t[Z - 1] += factor * (r[Z - 1] - r[Z - 2]);
  SIMD for (int64_t z = 1; z < Z - 1; z++) t[z] += half * (r[z + 1] - r[z - 1]);
}

INLINE void add_difference(float *t, const float *high, const float *low, float factor, int64_t Z) {
  SIMD for (int64_t z = 0; z < Z; z++) t[z] += factor * (high[z] - low[z]);
}

// Divergence of a field along a row; in 2D, x has one plane and no channel. Has three rows of `wide` to itself.
static void divergence_row(float *t, const Array *r, int64_t pair, int64_t x, int64_t y, float *wide) {
  const int64_t X = r->size[0], Y = r->size[1], Z = r->size[2];
  const int channels = r->channels;
  memset(t, 0, Z * sizeof(float));
  for (int axis = 3 - channels; axis < 2; axis++) {
    const int64_t i = axis ? y : x, end = axis ? Y : X, high = least(i + 1, end - 1), low = most(i - 1, 0);
    const void *from = at(r, pair, axis + channels - 3);
    const float *above = row(from, r->type, (axis ? x * Y + high : high * Y + y) * Z, Z, wide);
    const float *below = row(from, r->type, (axis ? x * Y + low : low * Y + y) * Z, Z, wide + Z);
    add_difference(t, above, below, 1.0f / (float)(high - low), Z);
  }
  add_slope(t, row(at(r, pair, channels - 1), r->type, (x * Y + y) * Z, Z, wide), 1.0f, Z);
}

// t += factor · (difference of the divergence along the axis of a channel); has four rows of `wide` to itself.
static void add_push(float *t, const Array *r, int64_t pair, int64_t channel, int64_t x, int64_t y, float factor,
                     float *wide) {
  const int64_t Z = r->size[2], axis = channel + 3 - r->channels;
  float *above = wide, *below = wide + Z, *rows = wide + 2 * Z;
  if (axis == 2) {
    divergence_row(above, r, pair, x, y, rows);
    add_slope(t, above, factor, Z);
    return;
  }
  const int64_t i = axis ? y : x, high = least(i + 1, r->size[axis] - 1), low = most(i - 1, 0);
  divergence_row(above, r, pair, axis ? x : high, axis ? high : y, rows);
  divergence_row(below, r, pair, axis ? x : low, axis ? low : y, rows);
  add_difference(t, above, below, factor / (float)(high - low), Z);
}

static void smooth_slab(void *task, int64_t item) {
  const Smooth *t = task;
  const int64_t X = t->x->size[0], Y = t->x->size[1], Z = t->x->size[2];
  const int rx = t->radius[0], ry = t->radius[1], rz = t->radius[2], ring = 2 * ry + 1;
  const int64_t part = item % t->parts, slab = item / t->parts % t->slabs, volume = item / t->parts / t->slabs;
  const int64_t pair = volume / t->x->channels, channel = volume % t->x->channels;
  const float weight = t->weight ? t->weight[pair] : 1.0f;
  if (weight < 0.0f) return;
  const void *from = at(t->x, pair, channel);
  void *to = at(t->out, pair, channel);
  const int64_t y0 = part_start(Y, t->parts, part), y1 = part_start(Y, t->parts, part + 1);
  const int type = t->x->type;
  const int64_t spare = most(type == FLOAT ? 1 : 2 * rx + 1, t->bulk ? 4 : 0);
  float *memory = get(sizeof(float) * ((ring + 2) * Z + 2 * rz + spare * Z));
  const float **pointers = get(sizeof(float *) * 2 * (rx + ry + rz + 1));
  float *sums = memory, *padded = memory + ring * Z, *out = padded + Z + 2 * rz, *wide = out + Z;
  for (int64_t x = part_start(X, t->slabs, slab); x < part_start(X, t->slabs, slab + 1); x++) {
    int64_t ready = most(0, y0 - ry);  // rows before it are summed along x
    for (int64_t y = y0; y < y1; y++) {
      for (; ready <= least(y + ry, Y - 1); ready++) {
        for (int k = -rx; k <= rx; k++)
          pointers[rx + k] = row(from, type, (within(x + k, X) * Y + ready) * Z, Z, wide + (rx + k) * Z);
        taps(sums + ready % ring * Z, pointers + rx, t->taps[0], rx, Z);
      }
      for (int k = -ry; k <= ry; k++) pointers[ry + k] = sums + within(y + k, Y) % ring * Z;
      taps(padded + rz, pointers + ry, t->taps[1], ry, Z);
      continue_ends(padded, rz, Z);
      float *values = place(to, t->out->type, (x * Y + y) * Z, out);
      taps_along(values, padded, t->taps[2], rz, Z, pointers + rz);
      if (t->weight) {
        const float *r = row(from, type, (x * Y + y) * Z, Z, wide);
        SIMD for (int64_t z = 0; z < Z; z++) values[z] = r[z] + weight * (values[z] - r[z]);
        if (t->bulk) add_push(values, t->x, pair, channel, x, y, weight * t->bulk[channel], wide);
      }
      put(to, t->out->type, (x * Y + y) * Z, Z, values);
    }
  }
  free(pointers);
  free(memory);
}

// Weighted by `weight` per pair it is `elastic`, else `smooth`.
EXPORT int smooth(const Array *x, const float *const *tap, const int *radius, const float *bulk, const float *weight,
                  const Array *out, int64_t pairs, int threads) {
  Smooth task = {x, out, {tap[0], tap[1], tap[2]}, {radius[0], radius[1], radius[2]}, bulk, weight, 0, 1};
  task.slabs = part_count(x->size[0], 4);
  if (x->size[0] == 1) task.parts = part_count(x->size[1], 64);
  return parallel(pairs * x->channels * task.slabs * task.parts, threads, smooth_slab, &task) > 0;
}

// --- similarity

typedef struct {
  const Array *warped, *fixed, *weight, *out;
  const float *shift, *factor;
  int radius;
  const float *taps;  // one-sided weights of a window; NULL: all are one
  float epsilon;
  int64_t slabs, parts;
  double *lines;
} Compare;

INLINE int sums_in(int64_t i, int radius, int64_t size) {
  return (int)(least(i + radius, size - 1) - most(i - radius, 0) + 1);
}

// What the voxels of a window that lie in the image weigh.
static float weight_in(int64_t i, int radius, const float *w, int64_t size) {
  if (!w) return (float)sums_in(i, radius, size);
  float sum = 0;
  for (int64_t k = most(i - radius, 0); k <= least(i + radius, size - 1); k++) sum += w[k < i ? i - k : k - i];
  return sum;
}

// Sums of 2 radius + 1 rows.
static void sum_rows(float *t, const float *const *rows, int count, int64_t Z) {
  switch (count) {
    case 1: SIMD for (int64_t z = 0; z < Z; z++) t[z] = rows[0][z]; return;
    case 3: SIMD for (int64_t z = 0; z < Z; z++) t[z] = rows[0][z] + rows[1][z] + rows[2][z]; return;
    case 5:
      SIMD for (int64_t z = 0; z < Z; z++) t[z] = (rows[0][z] + rows[1][z]) + (rows[2][z] + rows[3][z]) + rows[4][z];
      return;
    case 7:
      SIMD for (int64_t z = 0; z < Z; z++) t[z] = ((rows[0][z] + rows[1][z]) + (rows[2][z] + rows[3][z])) +
                                                  ((rows[4][z] + rows[5][z]) + rows[6][z]);
      return;
  }
  memcpy(t, rows[0], Z * sizeof(float));
  for (int k = 1; k < count; k += 2) {
    const float *a = rows[k], *b = rows[k + 1];
    SIMD for (int64_t z = 0; z < Z; z++) t[z] += a[z] + b[z];
  }
}

// The same, weighted unless the weights are NULL.
static void window_rows(float *t, const float *const *rows, const float *w, int radius, int64_t Z) {
  if (w) taps(t, rows + radius, w, radius, Z);
  else sum_rows(t, rows, 2 * radius + 1, Z);
}

// Of 2 radius + 1 values along a row with zeros on both sides.
INLINE void window_along(float *t, const float *padded, const float *w, int radius, int64_t Z, const float **rows) {
  for (int k = 0; k <= 2 * radius; k++) rows[k] = padded + k;
  window_rows(t, rows, w, radius, Z);
}

enum { MOMENTS = 5, PULLS = 3 };

// Sums along x of I, I², I J, J and J² (times a weight, and of the weight; times taps); both images are rows from a list.
INLINE void moments_of(float *const *t, const float *const *is, const float *const *js, const float *const *ws,
                       const float *g, float shift, float factor, const int count, const int weighted, const int tapped,
                       int64_t Z) {
  SIMD for (int64_t z = 0; z < Z; z++) {
    float s0 = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0, s5 = 0;
#pragma GCC unroll 8
    for (int k = 0; k < count; k++) {
      const float i = is[k][z], j = (js[k][z] - shift) * factor;
      const float tap = tapped ? g[k < count / 2 ? count / 2 - k : k - count / 2] : 1.0f;
      const float w = weighted ? tapped ? tap * ws[k][z] : ws[k][z] : tap;
      const float wi = weighted || tapped ? i * w : i, wj = weighted || tapped ? j * w : j;
      s0 += wi, s1 += wi * i, s2 += wi * j, s3 += wj, s4 += wj * j;
      if (weighted) s5 += w;
    }
    t[0][z] = s0, t[1][z] = s1, t[2][z] = s2, t[3][z] = s3, t[4][z] = s4;
    if (weighted) t[5][z] = s5;
  }
}

static void moments(float *const *t, const float **is, const float **js, const float **ws, const float *g, float shift,
                    float factor, int count, int weighted, int64_t Z) {
  if (weighted) {
    if (g) moments_of(t, is, js, ws, g, shift, factor, count, 1, 1, Z);
    else moments_of(t, is, js, ws, g, shift, factor, count, 1, 0, Z);
    return;
  }
  switch (g ? -count : count) {
    case 1: moments_of(t, is, js, ws, g, shift, factor, 1, 0, 0, Z); return;
    case 3: moments_of(t, is, js, ws, g, shift, factor, 3, 0, 0, Z); return;
    case 5: moments_of(t, is, js, ws, g, shift, factor, 5, 0, 0, Z); return;
    case 7: moments_of(t, is, js, ws, g, shift, factor, 7, 0, 0, Z); return;
    case -5: moments_of(t, is, js, ws, g, shift, factor, 5, 0, 1, Z); return;
    case -7: moments_of(t, is, js, ws, g, shift, factor, 7, 0, 1, Z); return;
    case -11: moments_of(t, is, js, ws, g, shift, factor, 11, 0, 1, Z); return;
  }
  if (g) moments_of(t, is, js, ws, g, shift, factor, count, 0, 1, Z);
  else moments_of(t, is, js, ws, g, shift, factor, count, 0, 0, Z);
}

INLINE void pulls(float *a, float *b, float *c, float *const *s, const float *w, const float *inverse_z, float inverse,
                  float epsilon, int64_t Z, double *line) {
  float loss = 0;
  if (!w) {
    SIMD_SUM(loss) for (int64_t z = 0; z < Z; z++) {
      const float k = inverse * inverse_z[z], mi = s[0][z] * k, mj = s[3][z] * k;
      const float vi = positive(s[1][z] * k - mi * mi) + epsilon, vj = positive(s[4][z] * k - mj * mj) + epsilon;
      const float cov = s[2][z] * k - mi * mj, ratio = cov / (vi * vj), pull = 2.0f * ratio * k;
      const float back = pull * cov / vi;
      loss += 1.0f - cov * ratio;
      a[z] = pull, b[z] = back, c[z] = pull * mj - back * mi;
    }
  } else {
    SIMD_SUM(loss) for (int64_t z = 0; z < Z; z++) {
      const float k = s[5][z] > 1e-6f ? 1.0f / s[5][z] : 0.0f, mi = s[0][z] * k, mj = s[3][z] * k;
      const float vi = positive(s[1][z] * k - mi * mi) + epsilon, vj = positive(s[4][z] * k - mj * mj) + epsilon;
      const float cov = s[2][z] * k - mi * mj, ratio = cov / (vi * vj), pull = 2.0f * ratio * k * w[z];
      const float back = pull * cov / vi;
      loss += (1.0f - cov * ratio) * w[z];
      a[z] = pull, b[z] = back, c[z] = pull * mj - back * mi;
    }
  }
  if (line) *line = loss;
}

static void lncc_slab(void *task, int64_t item) {
  const Compare *t = task;
  const int64_t X = t->warped->size[0], Y = t->warped->size[1], Z = t->warped->size[2];
  const int64_t part = item % t->parts, slab = item / t->parts % t->slabs, volume = item / t->parts / t->slabs;
  const int64_t channels = t->warped->channels, pair = volume / channels, channel = volume % channels;
  const int64_t x0 = part_start(X, t->slabs, slab), x1 = part_start(X, t->slabs, slab + 1);
  const int64_t y0 = part_start(Y, t->parts, part), y1 = part_start(Y, t->parts, part + 1);
  const int r = t->radius, rx = X == 1 ? 0 : r, ring = 2 * r + 1, planes = 2 * rx + 1, weighted = t->weight != NULL;
  const int64_t ya = most(0, y0 - r), yb = least(Y, y1 + r), height = yb - ya;
  const float shift = t->shift ? t->shift[volume] : 0.0f, factor = t->factor ? t->factor[volume] : 1.0f;
  const int kinds = MOMENTS + weighted;
  const float *tap = t->taps;
  const void *image = at(t->warped, pair, channel), *fixed = at(t->fixed, pair, channel);
  const void *weight = weighted ? at(t->weight, pair, 0) : NULL;
  void *to = at(t->out, pair, channel);
  const int itype = t->warped->type, ftype = t->fixed->type, wtype = weighted ? t->weight->type : FLOAT;
  const int64_t L = Z + 2 * r;
  const int64_t total = planes * PULLS * height * Z + 6 * ring * Z + 6 * Z + 6 * L + 3 * Z + 3 * planes * Z + 4 * Z;
  float *memory = get(sizeof(float) * total), *free_memory = memory;
  float *store = free_memory; free_memory += planes * PULLS * height * Z;
  float *ring_rows = free_memory; free_memory += 6 * ring * Z;
  float *sums[6], *padded[6], *wide[3];
  for (int q = 0; q < 6; q++) sums[q] = free_memory, free_memory += Z;
  for (int q = 0; q < 6; q++) padded[q] = free_memory, memset(padded[q], 0, L * sizeof(float)), free_memory += L;
  for (int q = 0; q < 3; q++) wide[q] = free_memory, free_memory += planes * Z;
  float *zeros = free_memory, *level = zeros + Z, *inverse_z = level + Z, *out = inverse_z + Z;
  for (int64_t z = 0; z < Z; z++) zeros[z] = 0, level[z] = shift, inverse_z[z] = 1.0f / weight_in(z, r, tap, Z);
  const float **is = get(sizeof(float *) * (3 * planes + ring)), **js = is + planes, **ws = js + planes;
  const float **rows = ws + planes;
  for (int64_t p = x0 - rx; p < x1 + rx; p++) {
    if (p >= 0 && p < X) {  // the pulls of plane p
      float *plane = store + p % planes * PULLS * height * Z;
      int64_t ready = most(0, ya - r);
      for (int64_t y = ya; y < yb; y++) {
        for (; ready <= least(y + r, Y - 1); ready++) {
          float *s[6];
          for (int q = 0; q < kinds; q++) s[q] = ring_rows + (q * ring + ready % ring) * Z;
          for (int k = 0; k < planes; k++) {
            const int64_t x = p + k - rx, first = (x * Y + ready) * Z;
            const int inside = x >= 0 && x < X;
            is[k] = inside ? row(image, itype, first, Z, wide[0] + k * Z) : zeros;
            js[k] = inside ? row(fixed, ftype, first, Z, wide[1] + k * Z) : level;
            ws[k] = weighted && inside ? row(weight, wtype, first, Z, wide[2] + k * Z) : zeros;
          }
          moments(s, is, js, ws, tap, shift, factor, planes, weighted, Z);
        }
        for (int q = 0; q < kinds; q++) {
          for (int k = -r; k <= r; k++)
            rows[r + k] = y + k >= 0 && y + k < Y ? ring_rows + (q * ring + (y + k) % ring) * Z : zeros;
          window_rows(padded[q] + r, rows, tap, r, Z);
          window_along(sums[q], padded[q], tap, r, Z, rows);
        }
        float *a = plane + (y - ya) * Z;
        const float inverse = 1.0f / (weight_in(p, rx, tap, X) * weight_in(y, r, tap, Y));
        const int counts = p >= x0 && p < x1 && y >= y0 && y < y1;
        const float *w = weighted ? row(weight, wtype, (p * Y + y) * Z, Z, out) : NULL;
        pulls(a, a + height * Z, a + 2 * height * Z, sums, w, inverse_z, inverse, t->epsilon, Z,
              counts ? t->lines + (volume * X + p) * Y + y : NULL);
      }
    }
    const int64_t x = p - rx;  // whose pulls are all there
    if (x < x0) continue;
    int64_t ready = ya;
    for (int64_t y = y0; y < y1; y++) {
      for (; ready <= least(y + r, yb - 1); ready++) {
        for (int q = 0; q < PULLS; q++) {
          for (int k = 0; k < planes; k++) {
            const int64_t i = x + k - rx;
            rows[k] = i >= 0 && i < X ? store + ((i % planes * PULLS + q) * height + ready - ya) * Z : zeros;
          }
          window_rows(ring_rows + (q * ring + ready % ring) * Z, rows, tap, rx, Z);
        }
      }
      for (int q = 0; q < PULLS; q++) {
        for (int k = -r; k <= r; k++)
          rows[r + k] = y + k >= 0 && y + k < Y ? ring_rows + (q * ring + (y + k) % ring) * Z : zeros;
        window_rows(padded[q] + r, rows, tap, r, Z);
        window_along(sums[q], padded[q], tap, r, Z, rows);
      }
      const int64_t first = (x * Y + y) * Z;
      const float *i = row(image, itype, first, Z, wide[0]), *j = row(fixed, ftype, first, Z, wide[1]);
      const float *w = weighted ? row(weight, wtype, first, Z, wide[2]) : NULL;
      const float share = 1.0f / (float)channels;
      float *d = place(to, t->out->type, first, out);
      SIMD for (int64_t z = 0; z < Z; z++)
        d[z] = share * (i[z] * sums[1][z] - (j[z] - shift) * factor * sums[0][z] + sums[2][z]);
      if (w) SIMD for (int64_t z = 0; z < Z; z++) d[z] *= w[z];
      put(to, t->out->type, first, Z, d);
    }
  }
  free(is);
  free(memory);
}

static void add_up(const Compare *t, int64_t pairs, double *loss) {
  const int64_t channels = t->warped->channels, rows = t->warped->size[0] * t->warped->size[1];
  for (int64_t pair = 0; pair < pairs; pair++)
    loss[pair] = summed(t->lines + pair * channels * rows, channels * rows) / (double)channels;
}

EXPORT int lncc(const Array *warped, const Array *fixed, const float *shift, const float *factor, const Array *weight,
                int radius, const float *taps, float epsilon, const Array *out, double *loss, int64_t pairs,
                int threads) {
  Compare task = {warped, fixed, weight, out, shift, factor, radius, taps, epsilon, 1, 1, NULL};
  const int64_t X = warped->size[0], Y = warped->size[1];
  task.lines = malloc(sizeof(double) * pairs * warped->channels * X * Y);
  if (!task.lines) return 1;
  const int64_t busy = pairs * warped->channels >= threads ? 1 : threads;
  task.parts = part_count(Y, most(12 * radius, 48));
  task.slabs = X == 1 ? 1 : most(part_count(X, most(12 * radius, 24)), least(busy, X / (4 * radius + 4)));
  const int64_t failed = parallel(pairs * warped->channels * task.slabs * task.parts, threads, lncc_slab, &task);
  add_up(&task, pairs, loss);
  free(task.lines);
  return failed > 0;
}

static void mse_rows(void *task, int64_t item) {
  const Compare *t = task;
  const int64_t Y = t->out->size[1], Z = t->out->size[2], rows = t->out->size[0] * Y, items = row_items(t->out);
  const int64_t volume = item / items, first = item % items * ROWS_AT_A_TIME, channels = t->out->channels;
  const int64_t pair = volume / channels, channel = volume % channels;
  const float shift = t->shift ? t->shift[volume] : 0.0f, factor = t->factor ? t->factor[volume] : 1.0f;
  const float share = 2.0f / (float)channels;
  float *memory = get(sizeof(float) * Z * 4), *wide[3] = {memory + Z, memory + 2 * Z, memory + 3 * Z};
  for (int64_t r = first; r < least(first + ROWS_AT_A_TIME, rows); r++) {
    const float *i = row(at(t->warped, pair, channel), t->warped->type, r * Z, Z, wide[0]);
    const float *j = row(at(t->fixed, pair, channel), t->fixed->type, r * Z, Z, wide[1]);
    const float *w = t->weight ? row(at(t->weight, pair, 0), t->weight->type, r * Z, Z, wide[2]) : NULL;
    float *d = place(at(t->out, pair, channel), t->out->type, r * Z, memory), loss = 0;
    SIMD_SUM(loss) for (int64_t z = 0; z < Z; z++) {
      const float difference = i[z] - (j[z] - shift) * factor, weighted = w ? difference * w[z] : difference;
      loss += difference * weighted;
      d[z] = share * weighted;
    }
    put(at(t->out, pair, channel), t->out->type, r * Z, Z, d);
    t->lines[volume * rows + r] = loss;
  }
  free(memory);
}

EXPORT int mse(const Array *warped, const Array *fixed, const float *shift, const float *factor, const Array *weight,
               const Array *out, double *loss, int64_t pairs, int threads) {
  Compare task = {warped, fixed, weight, out, shift, factor, 0, NULL, 0, 1, 1, NULL};
  task.lines = malloc(sizeof(double) * pairs * warped->channels * warped->size[0] * warped->size[1]);
  if (!task.lines) return 1;
  const int64_t failed = parallel(pairs * warped->channels * row_items(out), threads, mse_rows, &task);
  add_up(&task, pairs, loss);
  free(task.lines);
  return failed > 0;
}

enum { SIX = 6 };

static void six_sums(void *task, int64_t item) {
  const Compare *t = task;
  const int64_t Z = t->warped->size[2], rows = t->warped->size[0] * t->warped->size[1], items = row_items(t->warped);
  const int64_t volume = item / items, first = item % items * ROWS_AT_A_TIME, channels = t->warped->channels;
  const int64_t pair = volume / channels, channel = volume % channels;
  const float shift = t->shift ? t->shift[volume] : 0.0f, factor = t->factor ? t->factor[volume] : 1.0f;
  float *memory = get(sizeof(float) * Z * 3), *wide[3] = {memory, memory + Z, memory + 2 * Z};
  for (int64_t r = first; r < least(first + ROWS_AT_A_TIME, rows); r++) {
    const float *is = row(at(t->warped, pair, channel), t->warped->type, r * Z, Z, wide[0]);
    const float *js = row(at(t->fixed, pair, channel), t->fixed->type, r * Z, Z, wide[1]);
    const float *ws = t->weight ? row(at(t->weight, pair, 0), t->weight->type, r * Z, Z, wide[2]) : NULL;
    double s0 = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0, s5 = 0;
    _Pragma("omp simd reduction(+ : s0, s1, s2, s3, s4, s5)") for (int64_t z = 0; z < Z; z++) {
      const double i = is[z], j = (js[z] - shift) * factor, w = ws ? ws[z] : 1.0f;
      s0 += w, s1 += w * i, s2 += w * j, s3 += w * i * i, s4 += w * i * j, s5 += w * j * j;
    }
    double *to = t->lines + (volume * rows + r) * SIX;
    to[0] = s0, to[1] = s1, to[2] = s2, to[3] = s3, to[4] = s4, to[5] = s5;
  }
  free(memory);
}

typedef struct {
  const Compare *compare;
  const float *line;  // per volume: what I and J are multiplied by, and what is added
} Pull;

static void pull_rows(void *task, int64_t item) {
  const Pull *pull = task;
  const Compare *t = pull->compare;
  const int64_t Z = t->out->size[2], rows = t->out->size[0] * t->out->size[1], items = row_items(t->out);
  const int64_t volume = item / items, first = item % items * ROWS_AT_A_TIME, channels = t->out->channels;
  const int64_t pair = volume / channels, channel = volume % channels;
  const float *line = pull->line + 3 * volume;
  float *memory = get(sizeof(float) * Z * 4), *wide[3] = {memory + Z, memory + 2 * Z, memory + 3 * Z};
  for (int64_t r = first; r < least(first + ROWS_AT_A_TIME, rows); r++) {
    const float *i = row(at(t->warped, pair, channel), t->warped->type, r * Z, Z, wide[0]);
    const float *j = row(at(t->fixed, pair, channel), t->fixed->type, r * Z, Z, wide[1]);
    const float *w = t->weight ? row(at(t->weight, pair, 0), t->weight->type, r * Z, Z, wide[2]) : NULL;
    float *d = place(at(t->out, pair, channel), t->out->type, r * Z, memory);
    SIMD for (int64_t z = 0; z < Z; z++) d[z] = (line[0] * i[z] + line[1] * j[z] + line[2]) * (w ? w[z] : 1.0f);
    put(at(t->out, pair, channel), t->out->type, r * Z, Z, d);
  }
  free(memory);
}

EXPORT int ncc(const Array *warped, const Array *fixed, const float *shift, const float *factor, const Array *weight,
               double epsilon, const Array *out, double *loss, int64_t pairs, int threads) {
  Compare task = {warped, fixed, weight, out, shift, factor, 0, NULL, 0, 1, 1, NULL};
  const int64_t channels = warped->channels, volumes = pairs * channels, rows = warped->size[0] * warped->size[1];
  task.lines = malloc(sizeof(double) * volumes * rows * SIX);
  float *line = malloc(sizeof(float) * volumes * 3);
  if (!task.lines || !line) return free(task.lines), free(line), 1;
  int64_t failed = parallel(volumes * row_items(warped), threads, six_sums, &task);
  for (int64_t pair = 0; pair < pairs; pair++) loss[pair] = 0;
  for (int64_t volume = 0; volume < volumes; volume++) {
    double s[SIX] = {0};
    for (int64_t r = 0; r < rows; r++)
      for (int q = 0; q < SIX; q++) s[q] += task.lines[(volume * rows + r) * SIX + q];
    const double mi = s[1] / s[0], mj = s[2] / s[0], cov = s[4] / s[0] - mi * mj;
    double vi = s[3] / s[0] - mi * mi, vj = s[5] / s[0] - mj * mj;
    vi = (vi > 0 ? vi : 0) + epsilon, vj = (vj > 0 ? vj : 0) + epsilon;
    const double ratio = cov / (vi * vj), slope = cov / vi, scale = 2 * ratio / (double)channels;
    const double f = factor ? factor[volume] : 1.0, o = shift ? shift[volume] : 0.0;
    loss[volume / channels] += s[0] * (1 - cov * ratio) / (double)channels;
    line[3 * volume] = (float)(scale * slope);
    line[3 * volume + 1] = (float)(-scale * f);
    line[3 * volume + 2] = (float)(scale * (f * o + mj - slope * mi));
  }
  Pull pull = {&task, line};
  failed += parallel(volumes * row_items(out), threads, pull_rows, &pull);
  free(line);
  free(task.lines);
  return failed > 0;
}

typedef struct {
  const Compare *compare;
  int bins;
  int64_t parts;     // of a volume, by its size alone
  double *joint;    // of every part, (fixed, warped): sums of weights
  float *slope;      // of every volume and cell: six coefficients
} Mutual;

// Where the intensities of a row lie: cells of the table, and how far in them, along the warped and the fixed image.
INLINE void histogram_cells(const float *is, const float *js, float shift, float factor, int bins, int64_t Z,
                            int32_t *cell, float *t, float *s) {
  const float last = (float)(bins - 1), end = (float)(bins - 2), inner = (float)(bins - 4);
  SIMD for (int64_t z = 0; z < Z; z++) {
    const float p = clamped(is[z] * inner + 0.5f, end - 1.0f), q = clamped((js[z] - shift) * factor * last, last);
    int32_t i = (int32_t)p, j = (int32_t)q;
    i = i < bins - 4 ? i : bins - 4, j = j < bins - 2 ? j : bins - 2;
    cell[z] = j * bins + i;
    t[z] = p - (float)i, s[z] = q - (float)j;
  }
}

typedef double Four __attribute__((vector_size(32)));

static void joint_part(void *task, int64_t item) {
  const Mutual *m = task;
  const Compare *t = m->compare;
  const int bins = m->bins;
  const int64_t Z = t->warped->size[2], rows = t->warped->size[0] * t->warped->size[1], channels = t->warped->channels;
  const int64_t volume = item / m->parts, part = item % m->parts, pair = volume / channels, channel = volume % channels;
  const float shift = t->shift ? t->shift[volume] : 0.0f, factor = t->factor ? t->factor[volume] : 1.0f;
  const int64_t cells = sizeof(Four) * 2 * bins * bins;
  char *memory = get_zeros(cells + 64 + (sizeof(float) * 5 + sizeof(int32_t)) * Z);
  Four *sums = (Four *)(memory + (64 - (uintptr_t)memory % 64));
  float *buffer = (float *)((char *)sums + cells), *wide[3] = {buffer, buffer + Z, buffer + 2 * Z};
  float *along = buffer + 3 * Z, *aside = buffer + 4 * Z;
  int32_t *cell = (int32_t *)(buffer + 5 * Z);
  const Four c0 = {1 / 6., 4 / 6., 1 / 6., 0}, c1 = {-.5, 0, .5, 0}, c2 = {.5, -1, .5, 0};
  const Four c3 = {-1 / 6., .5, -.5, 1 / 6.};
  for (int64_t r = part_start(rows, m->parts, part); r < part_start(rows, m->parts, part + 1); r++) {
    const float *is = row(at(t->warped, pair, channel), t->warped->type, r * Z, Z, wide[0]);
    const float *js = row(at(t->fixed, pair, channel), t->fixed->type, r * Z, Z, wide[1]);
    const float *ws = t->weight ? row(at(t->weight, pair, 0), t->weight->type, r * Z, Z, wide[2]) : NULL;
    histogram_cells(is, js, shift, factor, bins, Z, cell, along, aside);
    for (int64_t z = 0; z < Z; z++) {
      const double w = ws ? ws[z] : 1.0, a = w * aside[z], d = along[z];
      const Four b = c0 + d * (c1 + d * (c2 + d * c3));
      Four *to = sums + 2 * cell[z];
      to[0] += b * (w - a);
      to[1] += b * a;
    }
  }
  double *joint = m->joint + item * bins * bins;
  for (int j = 0; j < bins - 1; j++)
    for (int i = 0; i < bins - 3; i++)
      for (int k = 0; k < 4; k++) {
        joint[j * bins + i + k] += sums[2 * (j * bins + i)][k];
        joint[(j + 1) * bins + i + k] += sums[2 * (j * bins + i) + 1][k];
      }
  free(memory);
}

static double logarithm(double x) {  // of a positive, normal number, to some 1e-15
  union { double d; uint64_t u; } v = {x};
  int exponent = (int)(v.u >> 52) - 1023;
  v.u = (v.u & 0xfffffffffffffull) | 0x3ff0000000000000ull;
  if (v.d > 1.4142135623730951) v.d *= 0.5, exponent++;
  const double f = (v.d - 1) / (v.d + 1), square = f * f;
  double sum = 0;
  for (int k = 23; k > 0; k -= 2) sum = sum * square + 1.0 / k;
  return 2 * f * sum + exponent * 0.6931471805599453;
}

// From the sums of a volume to its loss, and to the slopes of its cells.
static double mutual(double *joint, int bins, double share, float *slope, double *logs) {
  const double rare = 1e-14, blur = 0.86635;
  double total = 0, own = -blur, shared = 0;
  for (int k = 0; k < bins * bins; k++) total += joint[k];
  for (int i = 0; i < bins; i++) logs[i] = 0;
  if (!(total > 0)) return memset(slope, 0, sizeof(float) * 6 * bins * bins), total;
  for (int k = 0; k < bins * bins; k++) joint[k] /= total, logs[k % bins] += joint[k];
  for (int i = 0; i < bins; i++) {
    const double p = logs[i];
    logs[i] = p > rare ? logarithm(p) : 0;
    own -= p * logs[i];
  }
  for (int j = 0; j < bins; j++) {
    double fixed = 0;
    for (int i = 0; i < bins; i++) fixed += joint[j * bins + i];
    const double of_fixed = fixed > rare ? logarithm(fixed) : 0;
    for (int i = 0; i < bins; i++) {
      const double p = joint[j * bins + i], ratio = p > rare ? logarithm(p) - logs[i] : 0;
      if (p > rare) shared += p * (ratio - of_fixed);
      joint[j * bins + i] = ratio;
    }
  }
  const double known = shared > 1e-10 ? shared / own : 0, scale = shared > 1e-10 ? -share / own : 0;
  for (int k = 0; k < bins * bins; k++) joint[k] += known * logs[k % bins];
  for (int j = 0; j < bins - 1; j++)
    for (int i = 0; i < bins - 3; i++) {
      double c[2][3];
      for (int k = 0; k < 2; k++) {
        const double *T = joint + (j + k) * bins + i;
        c[k][0] = scale * 0.5 * (T[2] - T[0]);
        c[k][1] = scale * (T[0] - 2 * T[1] + T[2]);
        c[k][2] = scale * 0.5 * (3 * (T[1] - T[2]) + T[3] - T[0]);
      }
      for (int q = 0; q < 3; q++) {
        slope[6 * (j * bins + i) + 2 * q] = (float)c[0][q];
        slope[6 * (j * bins + i) + 2 * q + 1] = (float)(c[1][q] - c[0][q]);
      }
    }
  return total * (1 - known);
}

static void slope_rows(void *task, int64_t item) {
  const Mutual *m = task;
  const Compare *t = m->compare;
  const int64_t Z = t->out->size[2], rows = t->out->size[0] * t->out->size[1], items = row_items(t->out);
  const int64_t volume = item / items, first = item % items * ROWS_AT_A_TIME, channels = t->out->channels;
  const int64_t pair = volume / channels, channel = volume % channels;
  const float shift = t->shift ? t->shift[volume] : 0.0f, factor = t->factor ? t->factor[volume] : 1.0f;
  const float *slope = m->slope + volume * 6 * m->bins * m->bins, margin = 0.5f / (float)(m->bins - 4);
  float *memory = get((sizeof(float) * 6 + sizeof(int32_t)) * Z);
  float *wide[3] = {memory + Z, memory + 2 * Z, memory + 3 * Z}, *along = memory + 4 * Z, *aside = memory + 5 * Z;
  int32_t *cell = (int32_t *)(memory + 6 * Z);
  for (int64_t r = first; r < least(first + ROWS_AT_A_TIME, rows); r++) {
    const float *is = row(at(t->warped, pair, channel), t->warped->type, r * Z, Z, wide[0]);
    const float *js = row(at(t->fixed, pair, channel), t->fixed->type, r * Z, Z, wide[1]);
    const float *ws = t->weight ? row(at(t->weight, pair, 0), t->weight->type, r * Z, Z, wide[2]) : NULL;
    float *d = place(at(t->out, pair, channel), t->out->type, r * Z, memory);
    histogram_cells(is, js, shift, factor, m->bins, Z, cell, along, aside);
    for (int64_t z = 0; z < Z; z++) {
      const float *c = slope + 6 * cell[z], a = along[z], s = aside[z];
      const float value = (c[0] + s * c[1]) + a * ((c[2] + s * c[3]) + a * (c[4] + s * c[5]));
      const int inside = is[z] >= -margin && is[z] <= 1.0f + margin;
      d[z] = inside ? value * (ws ? ws[z] : 1.0f) : 0.0f;
    }
    put(at(t->out, pair, channel), t->out->type, r * Z, Z, d);
  }
  free(memory);
}

EXPORT int mi(const Array *warped, const Array *fixed, const float *shift, const float *factor, const Array *weight,
              int bins, const Array *out, double *loss, int64_t pairs, int threads) {
  Compare task = {warped, fixed, weight, out, shift, factor, 0, NULL, 0, 1, 1, NULL};
  const int64_t channels = warped->channels, volumes = pairs * channels, rows = warped->size[0] * warped->size[1];
  const int64_t table = bins * bins, parts = least(most(rows * warped->size[2] / 65536, 1), least(rows, 64));
  Mutual all = {&task, bins, parts, calloc(volumes * parts * table, sizeof(double)),
                calloc(volumes * table, sizeof(float) * 6)};
  double *logs = malloc(sizeof(double) * bins);
  int64_t failed = !all.joint || !all.slope || !logs;
  if (!failed) failed = parallel(volumes * parts, threads, joint_part, &all);
  for (int64_t pair = 0; pair < pairs; pair++) loss[pair] = 0;
  for (int64_t volume = 0; volume < volumes && !failed; volume++) {
    double *joint = all.joint + volume * parts * table;
    for (int64_t k = table; k < parts * table; k++) joint[k % table] += joint[k];
    const double share = (bins - 4) / (double)channels;
    loss[volume / channels] += mutual(joint, bins, share, all.slope + volume * 6 * table, logs) / (double)channels;
  }
  if (!failed) failed = parallel(volumes * row_items(out), threads, slope_rows, &all);
  free(logs);
  free(all.slope);
  free(all.joint);
  return failed > 0;
}

// --- gradient

typedef struct {
  const Array *warped, *derivative, *out;
  const float *taps[3];
  int radius[3], shared, ahead;  // shared: `out` is written over what is read; ahead: planes made before one is written
  int64_t slabs;
  float **saved;  // of every slab: planes around it
} Gradient;

// Planes of the images that a slab reads and others write: kept before anything is written.
static void save_around(void *task, int64_t item) {
  const Gradient *t = task;
  const int64_t X = t->out->size[0], P = t->out->size[1] * t->out->size[2];
  const int64_t slab = item % t->slabs, pair = item / t->slabs, reach = t->ahead + 1;
  const int64_t x0 = part_start(X, t->slabs, slab), x1 = part_start(X, t->slabs, slab + 1);
  float *to = t->saved[item] = get(sizeof(float) * P * 4 * reach);
  const Array *images[2] = {t->warped, t->derivative};
  for (int64_t k = 0; k < 2 * reach; k++) {
    const int64_t x = k < reach ? x0 - reach + k : x1 + k - reach;
    for (int i = 0; i < 2 && x >= 0 && x < X; i++) {
      float *plane = to + (2 * k + i) * P;
      put(plane, FLOAT, 0, P, row(at(images[i], pair, 0), images[i]->type, x * P, P, plane));
    }
  }
}

typedef struct {
  const Gradient *task;
  int64_t pair, first, last;  // planes of the slab
  const float *saved;
  float *wide;  // room for six rows
} Slab;

// A row of an image (0 warped, 1 derivative).
INLINE const float *slab_row(const Slab *s, int image, int64_t channel, int64_t x, int64_t y, int buffer) {
  const Gradient *t = s->task;
  const int64_t Y = t->out->size[1], Z = t->out->size[2], reach = t->ahead + 1;
  const Array *a = image ? t->derivative : t->warped;
  if (t->shared && x < s->first) return s->saved + ((2 * (x - s->first + reach) + image) * Y + y) * Z;
  if (t->shared && x >= s->last) return s->saved + ((2 * (x - s->last + reach) + image) * Y + y) * Z;
  return row(at(a, s->pair, channel), a->type, (x * Y + y) * Z, Z, s->wide + buffer * Z);
}

// g = d (a - b) scale, or that added to it
static void add_product(float *g, const float *d, const float *a, const float *b, float scale, int add, int64_t Z) {
  if (add) {
    SIMD for (int64_t z = 0; z < Z; z++) g[z] += d[z] * (a[z] - b[z]) * scale;
  } else {
    SIMD for (int64_t z = 0; z < Z; z++) g[z] = d[z] * (a[z] - b[z]) * scale;
  }
}

// One plane of the gradient that is not smoothed, (3, Y, Z).
static void raw_plane(const Slab *s, int64_t x, float *plane) {
  const Gradient *t = s->task;
  const int64_t X = t->out->size[0], Y = t->out->size[1], Z = t->out->size[2], xb = most(x - 1, 0), xa = least(x + 1, X - 1);
  for (int64_t y = 0; y < Y; y++) {
    const int64_t yb = most(y - 1, 0), ya = least(y + 1, Y - 1);
    float *gx = plane + y * Z, *gy = gx + Y * Z, *gz = gy + Y * Z;
    for (int64_t c = 0; c < t->warped->channels; c++) {
      const float *d = slab_row(s, 1, c, x, y, 0), *w = slab_row(s, 0, c, x, y, 1);
      if (t->out->channels == 3)
        add_product(gx, d, slab_row(s, 0, c, xa, y, 2), slab_row(s, 0, c, xb, y, 3), xa - xb == 2 ? 0.5f : 1.0f, c > 0, Z);
      add_product(gy, d, slab_row(s, 0, c, x, ya, 4), slab_row(s, 0, c, x, yb, 5), ya - yb == 2 ? 0.5f : 1.0f, c > 0, Z);
      add_product(gz + 1, d + 1, w + 2, w, 0.5f, c > 0, Z - 2);
      add_product(gz, d, w + 1, w, 1.0f, c > 0, 1);
      add_product(gz + Z - 1, d + Z - 1, w + Z - 1, w + Z - 2, 1.0f, c > 0, 1);
    }
  }
}

static void gradient_slab(void *task, int64_t item) {
  const Gradient *t = task;
  const int64_t X = t->out->size[0], Y = t->out->size[1], Z = t->out->size[2], P = Y * Z;
  const int n = t->out->channels, rx = t->radius[0], ry = t->radius[1], rz = t->radius[2], ring = 2 * ry + 1;
  const int planes = rx + t->ahead + 1;
  const int64_t slab = item % t->slabs;
  float *memory = get(sizeof(float) * ((3 * ring + 8) * Z + 2 * rz + 3 * planes * P));
  const float **pointers = get(sizeof(float *) * 2 * (rx + ry + rz + 1));
  float *sums = memory, *padded = sums + 3 * ring * Z, *out = padded + Z + 2 * rz, *wide = out + Z, *store = wide + 6 * Z;
  const Slab s = {t, item / t->slabs, part_start(X, t->slabs, slab), part_start(X, t->slabs, slab + 1), t->saved[item], wide};
  int64_t made = most(0, s.first - rx);  // planes before it are in the store
  for (int64_t x = s.first; x < s.last; x++) {
    for (; made <= least(x + t->ahead, X - 1); made++) raw_plane(&s, made, store + made % planes * 3 * P);
    int64_t ready = 0;  // rows before it are summed along x
    for (int64_t y = 0; y < Y; y++) {
      for (; ready <= least(y + ry, Y - 1); ready++) {
        for (int axis = 3 - n; axis < 3; axis++) {
          for (int k = -rx; k <= rx; k++)
            pointers[rx + k] = store + ((within(x + k, X) % planes * 3 + axis) * Y + ready) * Z;
          taps(sums + (axis * ring + ready % ring) * Z, pointers + rx, t->taps[0], rx, Z);
        }
      }
      for (int axis = 3 - n; axis < 3; axis++) {
        for (int k = -ry; k <= ry; k++) pointers[ry + k] = sums + (axis * ring + within(y + k, Y) % ring) * Z;
        taps(padded + rz, pointers + ry, t->taps[1], ry, Z);
        continue_ends(padded, rz, Z);
        void *to = at(t->out, s.pair, axis - 3 + n);
        float *values = place(to, t->out->type, (x * Y + y) * Z, out);
        taps_along(values, padded, t->taps[2], rz, Z, pointers + rz);
        put(to, t->out->type, (x * Y + y) * Z, Z, values);
      }
    }
  }
  free(pointers);
  free(memory);
}

EXPORT int gradient(const Array *warped, const Array *derivative, const float *const *tap, const int *radius,
                    const Array *out, int shared, int64_t pairs, int threads) {
  const int64_t X = out->size[0];
  const int ahead = X == 1 ? 0 : radius[0] > 1 ? radius[0] : 1;
  Gradient task = {warped, derivative, out, {tap[0], tap[1], tap[2]}, {radius[0], radius[1], radius[2]}, shared, ahead, 1, 0};
  task.slabs = most(1, least(pairs >= threads ? 1 : threads, X / (2 * (ahead + 1))));
  task.saved = calloc(pairs * task.slabs, sizeof(float *));
  int64_t failed = !task.saved;
  if (!failed && shared) failed = parallel(pairs * task.slabs, threads, save_around, &task);
  if (!failed) failed = parallel(pairs * task.slabs, threads, gradient_slab, &task);
  for (int64_t i = 0; task.saved && i < pairs * task.slabs; i++) free(task.saved[i]);
  free(task.saved);
  return failed > 0;
}

// --- the step

typedef struct {
  const Array *smooth, *residual, *warped, *derivative, *out;
  const float *unit, *radius, *damping;
  double *lines;
  int n;
} Step;

INLINE float finite(float v) { return v - v == 0.0f ? v : 0.0f; }

// Σ over the neighbours of a voxel along z, of its row and eight around it, each weighted by its hat function.
INLINE float hats(const float *const *r, int64_t b, int64_t z, int64_t a, float vx, float vy, float vz, const int n) {
  const float zb = positive(-vz), za = positive(vz), zo = 1.0f - (zb + za);
  const float yb = positive(-vy), ya = positive(vy), yo = 1.0f - (yb + ya);
  const float xb = positive(-vx), xa = positive(vx), xo = 1.0f - (xb + xa);
  float sums[3] = {0, 0, 0};
#pragma GCC unroll 3
  for (int x = 0; x < 3; x++) {
    const float *const *s = r + 3 * x;
    if (n == 3 || x == 1)
      sums[x] = yb * (zb * s[0][b] + zo * s[0][z] + za * s[0][a]) + yo * (zb * s[1][b] + zo * s[1][z] + za * s[1][a]) +
                ya * (zb * s[2][b] + zo * s[2][z] + za * s[2][a]);
  }
  return n == 3 ? xb * sums[0] + xo * sums[1] + xa * sums[2] : sums[1];
}

INLINE void near_row(const Array *residual, int64_t pair, int64_t x, int64_t y, float *const *v, float *const *to,
                     float *wide, const int n) {
  const int64_t X = residual->size[0], Y = residual->size[1], Z = residual->size[2];
  for (int c = 0; c < n; c++) {
    const void *from = at(residual, pair, c);
    const float *rows[9], *vx = v[0], *vy = v[1], *vz = v[2];
    for (int i = 0; i < 9; i++)
      rows[i] = row(from, residual->type, (within(x + i / 3 - 1, X) * Y + within(y + i % 3 - 1, Y)) * Z, Z, wide + i * Z);
    float *out = to[c];
    const float *add = v[c + 3 - n];
    out[0] = add[0] + hats(rows, 0, 0, 1, vx[0], vy[0], vz[0], n);
    SIMD for (int64_t z = 1; z < Z - 1; z++) out[z] = add[z] + hats(rows, z - 1, z, z + 1, vx[z], vy[z], vz[z], n);
    out[Z - 1] = add[Z - 1] + hats(rows, Z - 2, Z - 1, Z - 1, vx[Z - 1], vy[Z - 1], vz[Z - 1], n);
  }
}

static void step_rows(void *task, int64_t item) {
  const Step *t = task;
  const int n = t->n;
  const int64_t Y = t->out->size[1], Z = t->out->size[2], X = t->out->size[0], rows = X * Y, items = row_items(t->out);
  const int64_t pair = item / items, first = item % items * ROWS_AT_A_TIME;
  const float damping = t->damping[pair], moves = damping > 0.0f ? 1.0f : 0.0f;
  const float root = moves > 0.0f ? 1.0f / __builtin_sqrtf(damping) : 1.0f, reach = -2.0f * t->radius[pair] * moves;
  float farthest = 0, m[3] = {0, 0, 0};
  for (int axis = 3 - n; axis < 3; axis++) {
    m[axis] = t->unit[axis - 3 + n];
    farthest = m[axis] > farthest ? m[axis] : farthest;
  }
  farthest *= t->radius[pair] * moves;
  float *memory = get_zeros(Z * 23 * sizeof(float)), *v[3], *to[3];
  Places p;
  for (int c = 0; c < 3; c++) v[c] = memory + c * Z, to[c] = memory + (3 + c) * Z;
  float *wide = memory + 6 * Z, *buffer = cut_places(&p, wide + 9 * Z, Z);
  for (int64_t r = first; r < least(first + ROWS_AT_A_TIME, rows); r++) {
    const int64_t x = r / Y, y = r % Y;
    const float *g[3] = {v[0], v[0], v[0]};  // in 2D the first axis has zeros
    for (int axis = 3 - n; axis < 3; axis++)
      g[axis] = row(at(t->smooth, pair, axis - 3 + n), t->smooth->type, r * Z, Z, wide + axis * Z);
    const float k0 = m[0] * root, k1 = m[1] * root, k2 = m[2] * root;
    SIMD for (int64_t z = 0; z < Z; z++) {
      const float g0 = k0 * g[0][z], g1 = k1 * g[1][z], g2 = k2 * g[2][z];
      const float scale = reach / (g0 * g0 + g1 * g1 + g2 * g2 + 1.0f);
      v[0][z] = finite(scale * g0 * m[0]), v[1][z] = finite(scale * g1 * m[1]), v[2][z] = finite(scale * g2 * m[2]);
    }
    if (t->warped) {
      double line = 0;
      for (int64_t c = 0; c < t->warped->channels; c++) {
        const void *image = at(t->warped, pair, c);
        const float *d = row(at(t->derivative, pair, c), t->derivative->type, r * Z, Z, wide);
        for (int axis = 3 - n; axis < 3; axis++) {
          const int64_t step = axis == 0 ? Y * Z : axis == 1 ? Z : 1, at_axis = axis == 0 ? x : y;
          const int64_t size = t->out->size[axis];
          const int64_t back = axis < 2 && at_axis > 0 ? step : 0, on = axis < 2 && at_axis < size - 1 ? step : 0;
          const float *b = row(image, t->warped->type, r * Z - back, Z, wide + Z);
          const float *a = row(image, t->warped->type, r * Z + on, Z, wide + 2 * Z);
          const float half = back && on ? 0.5f : 1.0f;
          float sum = 0;
          if (axis < 2) {
            SIMD_SUM(sum) for (int64_t z = 0; z < Z; z++) sum += d[z] * (a[z] - b[z]) * half * v[axis][z];
          } else {
            SIMD_SUM(sum) for (int64_t z = 1; z < Z - 1; z++) sum += d[z] * (a[z + 1] - a[z - 1]) * 0.5f * v[2][z];
            sum += d[0] * (a[1] - a[0]) * v[2][0] + d[Z - 1] * (a[Z - 1] - a[Z - 2]) * v[2][Z - 1];
          }
          line -= sum;
        }
      }
      t->lines[pair * rows + r] = line;
    }
    if (farthest <= 1.0f) {
      if (n == 3) near_row(t->residual, pair, x, y, v, to, wide, 3);
      else near_row(t->residual, pair, x, y, v, to, wide, 2);
    } else {
      SIMD for (int64_t z = 0; z < Z; z++) {
        p.x[z] = (float)x + v[0][z], p.y[z] = (float)y + v[1][z], p.z[z] = (float)z + v[2][z];
      }
      for (int c = 0; c < n; c++) memcpy(to[c], v[c + 3 - n], Z * sizeof(float));
      add_field(t->residual, pair, &p, Z, to, buffer, n);
    }
    for (int c = 0; c < n; c++) put(at(t->out, pair, c), t->out->type, r * Z, Z, to[c]);
  }
  free(memory);
}

EXPORT int step(const Array *smooth, const Array *residual, const float *unit, const float *radius,
                const float *damping, const Array *warped, const Array *derivative, const Array *out, double *expected,
                int64_t pairs, int n, int threads) {
  Step task = {smooth, residual, warped, derivative, out, unit, radius, damping, NULL, n};
  const int64_t rows = out->size[0] * out->size[1];
  if (warped && !(task.lines = malloc(sizeof(double) * pairs * rows))) return 1;
  const int64_t failed = parallel(pairs * row_items(out), threads, step_rows, &task);
  for (int64_t pair = 0; warped && pair < pairs; pair++) expected[pair] = summed(task.lines + pair * rows, rows);
  free(task.lines);
  return failed > 0;
}

// --- sums over a volume

typedef struct {
  const Array *array;
  const float *unit;
  double *lines;
  int n;
} Sums;

enum { IMAGE_SUMS = 5, GRADIENT_SUMS = 3 };

INLINE double smaller(double a, double b) { return b < a || b != b ? b : a; }  // NaN stays
INLINE double larger(double a, double b) { return b > a || b != b ? b : a; }

static void image_rows(void *task, int64_t item) {
  const Sums *t = task;
  const Array *a = t->array;
  const int64_t X = a->size[0], Y = a->size[1], Z = a->size[2], rows = X * Y, items = row_items(a);
  const int64_t volume = item / items, first = item % items * ROWS_AT_A_TIME;
  const void *image = at(a, volume / a->channels, volume % a->channels);
  float *wide = get(sizeof(float) * Z * 2);
  for (int64_t r = first; r < least(first + ROWS_AT_A_TIME, rows); r++) {
    const float *v = row(image, a->type, r * Z, Z, wide);
    float low = v[0], high = v[0], odd = 0;
    double sum = 0, squares = 0, sizes = 0;
    _Pragma("omp simd reduction(min : low) reduction(max : high) reduction(+ : odd, sum)")
    for (int64_t z = 0; z < Z; z++) {
      low = v[z] < low ? v[z] : low, high = v[z] > high ? v[z] : high;
      odd += v[z] != v[z] ? 1.0f : 0.0f;
      sum += v[z];
    }
    if (odd > 0) low = high = __builtin_nanf("");
    for (int axis = 0; axis < 3; axis++) {
      if (axis == 0 ? r / Y + 1 >= X : axis == 1 && r % Y + 1 >= Y) continue;
      const float *w = axis == 2 ? v + 1 : row(image, a->type, (r + (axis ? 1 : Y)) * Z, Z, wide + Z);
      const int64_t count = axis == 2 ? Z - 1 : Z;
      double s = 0, u = 0;
      _Pragma("omp simd reduction(+ : s, u)") for (int64_t z = 0; z < count; z++) {
        const double d = (double)w[z] - (double)v[z];
        s += d * d, u += d > 0 ? d : -d;
      }
      squares += s, sizes += u;
    }
    double *to = t->lines + (volume * rows + r) * IMAGE_SUMS;
    to[0] = low, to[1] = high, to[2] = sum, to[3] = squares, to[4] = sizes;
  }
  free(wide);
}

EXPORT int image_sums(const Array *image, double *out, int64_t pairs, int threads) {
  const int64_t volumes = pairs * image->channels, rows = image->size[0] * image->size[1];
  Sums task = {image, NULL, malloc(sizeof(double) * volumes * rows * IMAGE_SUMS), 0};
  if (!task.lines) return 1;
  const int64_t failed = parallel(volumes * row_items(image), threads, image_rows, &task);
  for (int64_t volume = 0; volume < volumes; volume++) {
    double *to = out + volume * IMAGE_SUMS, *line = task.lines + volume * rows * IMAGE_SUMS;
    memcpy(to, line, sizeof(double) * IMAGE_SUMS);
    for (int64_t r = 1; r < rows; r++) {
      line += IMAGE_SUMS;
      to[0] = to[0] == to[0] ? smaller(to[0], line[0]) : to[0], to[1] = to[1] == to[1] ? larger(to[1], line[1]) : to[1];
      to[2] += line[2], to[3] += line[3], to[4] += line[4];
    }
  }
  free(task.lines);
  return failed > 0;
}

static void gradient_rows(void *task, int64_t item) {
  const Sums *t = task;
  const Array *a = t->array;
  const int n = t->n;
  const int64_t Z = a->size[2], rows = a->size[0] * a->size[1], items = row_items(a);
  const int64_t pair = item / items, first = item % items * ROWS_AT_A_TIME;
  float *wide = get_zeros(Z * 4 * sizeof(float));
  for (int64_t r = first; r < least(first + ROWS_AT_A_TIME, rows); r++) {
    const float *g[3] = {wide + 3 * Z, wide + 3 * Z, wide + 3 * Z};
    float m[3] = {0, 0, 0};
    for (int axis = 3 - n; axis < 3; axis++) {
      g[axis] = row(at(a, pair, axis - 3 + n), a->type, r * Z, Z, wide + axis * Z);
      m[axis] = t->unit[axis - 3 + n];
    }
    double squares = 0, lengths = 0, largest = 0;
    _Pragma("omp simd reduction(+ : squares, lengths) reduction(max : largest)") for (int64_t z = 0; z < Z; z++) {
      const double g0 = (double)m[0] * g[0][z], g1 = (double)m[1] * g[1][z], g2 = (double)m[2] * g[2][z];
      const double square = g0 * g0 + g1 * g1 + g2 * g2;
      squares += square, lengths += __builtin_sqrt(square), largest = square > largest ? square : largest;
    }
    double *to = t->lines + (pair * rows + r) * GRADIENT_SUMS;
    to[0] = squares == squares ? largest : squares, to[1] = squares, to[2] = lengths;
  }
  free(wide);
}

EXPORT int gradient_sums(const Array *gradient, const float *unit, double *out, int64_t pairs, int n, int threads) {
  const int64_t rows = gradient->size[0] * gradient->size[1];
  Sums task = {gradient, unit, malloc(sizeof(double) * pairs * rows * GRADIENT_SUMS), n};
  if (!task.lines) return 1;
  const int64_t failed = parallel(pairs * row_items(gradient), threads, gradient_rows, &task);
  for (int64_t pair = 0; pair < pairs; pair++) {
    double *to = out + pair * GRADIENT_SUMS, *line = task.lines + pair * rows * GRADIENT_SUMS;
    to[0] = to[1] = to[2] = 0;
    for (int64_t r = 0; r < rows; r++, line += GRADIENT_SUMS) {
      to[0] = to[0] == to[0] ? larger(to[0], line[0]) : to[0];
      to[1] += line[1], to[2] += line[2];
    }
    to[0] = __builtin_sqrt(to[0]);
  }
  free(task.lines);
  return failed > 0;
}

// --- folds

typedef struct {
  const Array *ddf, *outer;
  float margin;
  uint8_t *out;
  int64_t *counts;  // per item
  int n;
  int64_t slabs;
} Folds;

INLINE float determinant(const float *a, const float *b, const float *c) {
  return a[0] * (b[1] * c[2] - b[2] * c[1]) + a[1] * (b[2] * c[0] - b[0] * c[2]) + a[2] * (b[0] * c[1] - b[1] * c[0]);
}

// A cell between rows (x before and after, y before and after) of three components, and voxels b and a of them.
INLINE int folded_3d(const float *const *r, int64_t b, int64_t a, float margin) {
  float v[8][3], ex[4][3], ey[4][3], ez[4][3];  // corners, bits x y z; edges along an axis by the other two bits
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
#pragma GCC unroll 3
    for (int c = 0; c < 3; c++) v[i][c] = r[3 * (i >> 1) + c][i & 1 ? a : b];
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
#pragma GCC unroll 3
    for (int c = 0; c < 3; c++) {
      const int y = i >> 1, z = i & 1;
      ex[i][c] = v[4 + 2 * y + z][c] - v[2 * y + z][c] + (c == 0 ? 1.0f : 0.0f);
      ey[i][c] = v[4 * y + 2 + z][c] - v[4 * y + z][c] + (c == 1 ? 1.0f : 0.0f);
      ez[i][c] = v[4 * y + 2 * z + 1][c] - v[4 * y + 2 * z][c] + (c == 2 ? 1.0f : 0.0f);
    }
  }
  int bad = 0;
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    const int x = i >> 2, y = i >> 1 & 1, z = i & 1;
    bad |= !(determinant(ex[2 * y + z], ey[2 * x + z], ez[2 * x + y]) > margin);
  }
  float p[3], q[3], s[3];  // face diagonals, each the sum of two edges
#pragma GCC unroll 3
  for (int c = 0; c < 3; c++) p[c] = ey[0][c] + ez[1][c], q[c] = ex[0][c] + ez[2][c], s[c] = ex[0][c] + ey[2][c];
  bad |= !(0.5f * determinant(p, q, s) > margin);
#pragma GCC unroll 3
  for (int c = 0; c < 3; c++) p[c] = ey[3][c] + ez[2][c], q[c] = ex[3][c] + ez[1][c], s[c] = ex[3][c] + ey[1][c];
  bad |= !(0.5f * determinant(p, q, s) > margin);
  return bad;
}

INLINE int folded_2d(const float *const *r, int64_t b, int64_t a, float margin) {  // rows: y before, y after
  float v[4][2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
    for (int c = 0; c < 2; c++) v[i][c] = r[2 * (i >> 1) + c][i & 1 ? a : b];
  int bad = 0;
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const int y = i >> 1, z = i & 1;
    const float a0 = v[2 + z][0] - v[z][0] + 1.0f, a1 = v[2 + z][1] - v[z][1];
    const float b0 = v[2 * y + 1][0] - v[2 * y][0], b1 = v[2 * y + 1][1] - v[2 * y][1] + 1.0f;
    bad |= !(a0 * b1 - a1 * b0 > margin);
  }
  return bad;
}

// Look at the cells [first, last) of a pair; the map's values at their voxels are gathered first, continued at the edges.
static int64_t look(const Folds *t, int64_t pair, const int64_t *first, const int64_t *last) {
  const int n = t->n;
  const int64_t *size = t->ddf->size, Z = size[2];
  int64_t count[3], bad = 0;  // voxels, one more than cells
  for (int a = 0; a < 3; a++) count[a] = a == 0 && n == 2 ? 1 : last[a] - first[a] + 1;
  const int64_t z0 = within(first[2] - 1, Z), z1 = within(last[2] - 1, Z), W = z1 - z0 + 1, L = count[2];
  const int64_t volume = count[0] * count[1] * L;
  float *memory = get(sizeof(float) * (n * volume + 6 * W));
  uint8_t *flags = get(L);
  Places p;
  float *spare = cut_places(&p, memory + n * volume, W), *buffer = spare + W, *make[3];
  for (int64_t i = 0; i < count[0]; i++) {
    for (int64_t j = 0; j < count[1]; j++) {
      const int64_t x = n == 3 ? within(first[0] - 1 + i, size[0]) : 0, y = within(first[1] - 1 + j, size[1]);
      for (int c = 0; c < n; c++) {
        make[c] = memory + c * volume + (i * count[1] + j) * L + (z0 - first[2] + 1);
        put(make[c], FLOAT, 0, W, row(at(t->ddf, pair, c), t->ddf->type, (x * size[1] + y) * Z + z0, W, spare));
      }
      if (t->outer) {
        const float *dx = make[0], *dy = make[n - 2], *dz = make[n - 1];
        SIMD for (int64_t z = 0; z < W; z++) {
          p.x[z] = (float)x + dx[z], p.y[z] = (float)y + dy[z], p.z[z] = (float)(z0 + z) + dz[z];
        }
        add_field(t->outer, pair, &p, W, make, buffer, n);
      }
      for (int c = 0; c < n; c++) {
        float *whole = memory + c * volume + (i * count[1] + j) * L;
        if (first[2] == 0) whole[0] = whole[1];
        if (last[2] == Z + 1) whole[L - 1] = whole[L - 2];
      }
    }
  }
  const float margin = t->margin;
  for (int64_t i = 0; i < (n == 3 ? count[0] - 1 : 1); i++) {
    for (int64_t j = 0; j < count[1] - 1; j++) {
      const float *rows[12];
      for (int k = 0; k < (n == 3 ? 4 : 2); k++)
        for (int c = 0; c < n; c++) rows[n * k + c] = memory + c * volume + ((i + (k >> 1)) * count[1] + j + (k & 1)) * L;
      if (n == 3) {
        SIMD for (int64_t k = 0; k < L - 1; k++) flags[k] = (uint8_t)folded_3d(rows, k, k + 1, margin);
      } else {
        SIMD for (int64_t k = 0; k < L - 1; k++) flags[k] = (uint8_t)folded_2d(rows, k, k + 1, margin);
      }
      int64_t sum = 0;
      for (int64_t k = 0; k < L - 1; k++) sum += flags[k];
      bad += sum;
      if (t->out) {
        const int64_t plane = (pair * (n == 3 ? size[0] + 1 : 1) + (n == 3 ? first[0] + i : 0)) * (size[1] + 1);
        memcpy(t->out + (plane + first[1] + j) * (Z + 1) + first[2], flags, L - 1);
      }
    }
  }
  free(flags);
  free(memory);
  return bad;
}

static void look_at_slab(void *task, int64_t item) {
  const Folds *t = task;
  const int64_t rings = t->n == 3 ? t->ddf->size[0] + 1 : 1, slab = item % t->slabs, pair = item / t->slabs;
  const int64_t first[3] = {part_start(rings, t->slabs, slab), 0, 0};
  const int64_t last[3] = {part_start(rings, t->slabs, slab + 1), t->ddf->size[1] + 1, t->ddf->size[2] + 1};
  t->counts[item] = look(t, pair, first, last);
}

EXPORT int unfolded(const Array *ddf, const Array *outer, float margin, uint8_t *out, int64_t *count, int64_t pairs,
                    int n, int threads) {
  Folds task = {ddf, outer, margin, out, NULL, n, n == 3 ? part_count(ddf->size[0] + 1, 6) : 1};
  task.counts = malloc(sizeof(int64_t) * pairs * task.slabs);
  if (!task.counts) return 1;
  const int64_t failed = parallel(pairs * task.slabs, threads, look_at_slab, &task);
  for (int64_t pair = 0; pair < pairs; pair++) {
    count[pair] = 0;
    for (int64_t i = 0; i < task.slabs; i++) count[pair] += task.counts[pair * task.slabs + i];
  }
  free(task.counts);
  return failed > 0;
}

// --- repair: one round, tile by tile, where there are folds

enum { TILE = 24 };

typedef struct {
  int64_t first[3], last[3];
} Box;

typedef struct {
  Folds folds;
  const float *taps[3];
  int radius[3], reach;
  int64_t tiles[3], *smoothed;
  uint8_t *marked;  // per tile: whether one of its cells is folded
  Box *box;         // per tile: the voxels that are smoothed
  float **made;     // per tile: their new values, until nothing needs the old ones any more
} Mend;

INLINE int64_t box_size(const Box *b) {
  return (b->last[0] - b->first[0]) * (b->last[1] - b->first[1]) * (b->last[2] - b->first[2]);
}

static int64_t tile_of(const Mend *t, int64_t item, Box *b) {  // returns the pair
  for (int a = 2; a >= 0; item /= t->tiles[a], a--) {
    const int64_t i = item % t->tiles[a];
    b->first[a] = part_start(t->folds.ddf->size[a], t->tiles[a], i);
    b->last[a] = part_start(t->folds.ddf->size[a], t->tiles[a], i + 1);
  }
  return item;
}

static int64_t cells_of(const Mend *t, int64_t item, Box *b) {  // the last tile of an axis has the ring, too
  const int64_t pair = tile_of(t, item, b);
  for (int a = 3 - t->folds.n; a < 3; a++) b->last[a] += b->last[a] == t->folds.ddf->size[a];
  return pair;
}

static const uint8_t *flags_of(const Folds *f, int64_t pair, int64_t x, int64_t y) {
  const int64_t *size = f->ddf->size, Y1 = size[1] + 1;
  return f->out + ((pair * (f->n == 3 ? size[0] + 1 : 1) + x) * Y1 + y) * (size[2] + 1);
}

static void mark_tile(void *task, int64_t item) {
  Mend *t = task;
  Box b;
  const int64_t pair = cells_of(t, item, &b);
  const void *found = NULL;
  for (int64_t x = b.first[0]; x < b.last[0] && !found; x++)
    for (int64_t y = b.first[1]; y < b.last[1] && !found; y++)
      found = memchr(flags_of(&t->folds, pair, x, y) + b.first[2], 1, b.last[2] - b.first[2]);
  t->marked[item] = found != NULL;
}

// Whether a tile or one of those around it is marked; no fold reaches farther than the next tile.
static int near_folds(const Mend *t, int64_t item) {
  int64_t place[3], index = item;
  for (int a = 2; a >= 0; index /= t->tiles[a], a--) place[a] = index % t->tiles[a];
  for (int64_t x = most(place[0] - 1, 0); x <= least(place[0] + 1, t->tiles[0] - 1); x++)
    for (int64_t y = most(place[1] - 1, 0); y <= least(place[1] + 1, t->tiles[1] - 1); y++)
      for (int64_t z = most(place[2] - 1, 0); z <= least(place[2] + 1, t->tiles[2] - 1); z++)
        if (t->marked[((index * t->tiles[0] + x) * t->tiles[1] + y) * t->tiles[2] + z]) return 1;
  return 0;
}

// Sums of 2 radius + 1 neighbours along one axis; the result is so much shorter.
static void window_sums(const uint16_t *in, uint16_t *out, int64_t blocks, int64_t length, int64_t inner, int radius) {
  const int64_t made = (length - 2 * radius) * inner;
  for (int64_t b = 0; b < blocks; b++) {
    const uint16_t *from = in + b * length * inner;
    uint16_t *to = out + b * made;
    memcpy(to, from, made * sizeof(uint16_t));
    for (int d = 1; d <= 2 * radius; d++)
      SIMD for (int64_t i = 0; i < made; i++) to[i] = (uint16_t)(to[i] + from[i + d * inner]);
  }
}

static void box_sums(uint16_t *a, uint16_t *b, int64_t *size, const int *radius) {  // from a to b, over a
  window_sums(a, b, size[0] * size[1], size[2], 1, radius[2]);
  size[2] -= 2 * radius[2];
  window_sums(b, a, size[0], size[1], size[2], radius[1]);
  size[1] -= 2 * radius[1];
  window_sums(a, b, 1, size[0], size[1] * size[2], radius[0]);
  size[0] -= 2 * radius[0];
}

// How much each voxel of a tile is smoothed, and where that is not zero; 0 if it is nowhere.
static int weigh(const Mend *t, int64_t pair, const Box *tile, float *weight, Box *box) {
  const int64_t *first = tile->first, *last = tile->last;
  const int n = t->folds.n, reach[3] = {n == 3 ? t->reach : 0, t->reach, t->reach};
  const int64_t *size = t->folds.ddf->size;
  int64_t lo[3], hi[3], near[3];  // voxels whose marks matter
  for (int a = 0; a < 3; a++) {
    lo[a] = first[a] - 2 * reach[a], near[a] = last[a] - first[a] + 4 * reach[a], hi[a] = least(lo[a] + near[a], size[a]);
  }
  int any = 0;
  const int64_t z0 = most(lo[2], 0), x_after = n == 3;
  for (int64_t x = most(lo[0], 0); x < hi[0] + x_after && !any; x++)
    for (int64_t y = most(lo[1], 0); y <= hi[1] && !any; y++)
      any = memchr(flags_of(&t->folds, pair, x, y) + z0, 1, hi[2] + 1 - z0) != NULL;
  if (!any) return 0;
  const int64_t total = near[0] * near[1] * near[2];
  uint16_t *marks = get_zeros(2 * total * sizeof(uint16_t)), *sums = marks + total;
  uint8_t *own = get_zeros((last[0] - first[0]) * (last[1] - first[1]) * (last[2] - first[2]));
  const int64_t H = last[1] - first[1], D = last[2] - first[2];
  for (int64_t x = most(lo[0], 0); x < hi[0]; x++) {
    for (int64_t y = most(lo[1], 0); y < hi[1]; y++) {
      uint16_t *m = marks + ((x - lo[0]) * near[1] + y - lo[1]) * near[2];
      for (int64_t cx = x; cx <= x + x_after; cx++) {
        for (int64_t cy = y; cy <= y + 1; cy++) {
          const uint8_t *c = flags_of(&t->folds, pair, cx, cy);
          SIMD for (int64_t z = z0; z < hi[2]; z++) m[z - lo[2]] |= (uint16_t)(c[z] | c[z + 1]);
        }
      }
      if (x >= first[0] && x < last[0] && y >= first[1] && y < last[1])
        for (int64_t z = 0; z < D; z++)
          own[((x - first[0]) * H + y - first[1]) * D + z] = (uint8_t)m[first[2] + z - lo[2]];
    }
  }
  box_sums(marks, sums, near, reach);  // voxels near marked ones, within the grid
  for (int64_t i = 0, x = first[0] - reach[0]; x < last[0] + reach[0]; x++)
    for (int64_t y = first[1] - reach[1]; y < last[1] + reach[1]; y++)
      for (int64_t z = first[2] - reach[2]; z < last[2] + reach[2]; z++, i++)
        sums[i] = sums[i] && x >= 0 && x < size[0] && y >= 0 && y < size[1] && z >= 0 && z < size[2];
  box_sums(sums, marks, near, reach);
  for (int a = 0; a < 3; a++) box->first[a] = last[a], box->last[a] = first[a];
  for (int64_t i = 0, x = first[0]; x < last[0]; x++) {
    for (int64_t y = first[1]; y < last[1]; y++) {
      const int rows = sums_in(x, reach[0], size[0]) * sums_in(y, reach[1], size[1]);
      for (int64_t z = first[2]; z < last[2]; z++, i++) {
        const float soft = (float)marks[i] / (float)(rows * sums_in(z, reach[2], size[2]));
        weight[i] = own[i] ? 1.0f : soft;
        if (weight[i] > 0.0f) {
          const int64_t at_voxel[3] = {x, y, z};
          for (int a = 0; a < 3; a++) {
            box->first[a] = least(box->first[a], at_voxel[a]), box->last[a] = most(box->last[a], at_voxel[a] + 1);
          }
        }
      }
    }
  }
  free(own);
  free(marks);
  return box->first[0] < box->last[0];
}

static void smooth_tile(void *task, int64_t item) {
  Mend *t = task;
  const Array *ddf = t->folds.ddf;
  const int64_t *size = ddf->size, Y = size[1], Z = size[2];
  const int rx = t->radius[0], ry = t->radius[1], rz = t->radius[2], n = t->folds.n, ring = 2 * ry + 1;
  Box tile, *box = t->box + item;
  const int64_t pair = tile_of(t, item, &tile);
  t->made[item] = NULL, t->smoothed[item] = 0;
  if (!near_folds(t, item)) return;
  float *weight = get(sizeof(float) * box_size(&tile));
  if (weigh(t, pair, &tile, weight, box)) {
    const int64_t *first = box->first, *last = box->last, H = last[1] - first[1], D = last[2] - first[2];
    const int64_t whole_y = tile.last[1] - tile.first[1], whole_z = tile.last[2] - tile.first[2], count = box_size(box);
    const int64_t za = most(first[2] - rz, 0), zb = least(last[2] + rz, Z), W = zb - za;
    float *made = get(sizeof(float) * n * count);
    float *memory = get(sizeof(float) * ((ring + 1 + 2 * rx + 1) * W + D + 2 * rz + 2 * D));
    const float **pointers = get(sizeof(float *) * 2 * (rx + ry + rz + 1));
    float *sums = memory, *wide = sums + ring * W, *across = wide + (2 * rx + 1) * W, *padded = across + W;
    float *out = padded + D + 2 * rz, *old = out + D;
    for (int c = 0; c < n; c++) {
      const void *from = at(ddf, pair, c);
      for (int64_t x = first[0]; x < last[0]; x++) {
        int64_t ready = most(0, first[1] - ry);
        for (int64_t y = first[1]; y < last[1]; y++) {
          for (; ready <= least(y + ry, Y - 1); ready++) {
            for (int k = -rx; k <= rx; k++)
              pointers[rx + k] = row(from, ddf->type, (within(x + k, size[0]) * Y + ready) * Z + za, W, wide + (rx + k) * W);
            taps(sums + ready % ring * W, pointers + rx, t->taps[0], rx, W);
          }
          for (int k = -ry; k <= ry; k++) pointers[ry + k] = sums + within(y + k, Y) % ring * W;
          taps(across, pointers + ry, t->taps[1], ry, W);
          for (int64_t z = first[2] - rz; z < last[2] + rz; z++) padded[z - first[2] + rz] = across[within(z, Z) - za];
          taps_along(out, padded, t->taps[2], rz, D, pointers + rz);
          const int64_t i = ((x - first[0]) * H + y - first[1]) * D;
          const float *r = row(from, ddf->type, (x * Y + y) * Z + first[2], D, old), *w = weight;
          w += ((x - tile.first[0]) * whole_y + y - tile.first[1]) * whole_z + first[2] - tile.first[2];
          float *to = made + c * count + i;
          SIMD for (int64_t z = 0; z < D; z++) to[z] = r[z] + w[z] * (out[z] - r[z]);
        }
      }
    }
    for (int64_t i = 0; i < box_size(&tile); i++) t->smoothed[item] += weight[i] > 0.0f;
    free(pointers);
    free(memory);
    t->made[item] = made;
  }
  free(weight);
}

static void write_tile(void *task, int64_t item) {
  Mend *t = task;
  if (!t->made[item]) return;
  const Array *ddf = t->folds.ddf;
  Box tile;
  const int64_t pair = tile_of(t, item, &tile), *first = t->box[item].first, *last = t->box[item].last;
  const float *made = t->made[item];
  for (int c = 0; c < t->folds.n; c++)
    for (int64_t x = first[0]; x < last[0]; x++)
      for (int64_t y = first[1]; y < last[1]; y++, made += last[2] - first[2])
        put(at(ddf, pair, c), ddf->type, (x * ddf->size[1] + y) * ddf->size[2] + first[2], last[2] - first[2], made);
}

// The cells of a tile at voxels that have changed, which may be those of a tile before it: every cell once.
static void look_at_tile(void *task, int64_t item) {
  const Mend *t = task;
  const int64_t steps[3] = {t->tiles[1] * t->tiles[2], t->tiles[2], 1};
  int64_t index = item, place[3];
  for (int a = 2; a >= 0; index /= t->tiles[a], a--) place[a] = index % t->tiles[a];
  Box cells, found = {{INT64_MAX, INT64_MAX, INT64_MAX}, {0, 0, 0}};
  const int64_t pair = cells_of(t, item, &cells);
  for (int k = 0; k < 8; k++) {
    int64_t other = item;
    int there = 1;
    for (int a = 0; a < 3; a++)
      if (k >> a & 1) other -= steps[a], there &= place[a] > 0;
    if (!there || !t->made[other]) continue;
    for (int a = 0; a < 3; a++) {  // a voxel is a corner of the cell before it and of the one behind it
      found.first[a] = least(found.first[a], t->box[other].first[a]);
      found.last[a] = most(found.last[a], t->box[other].last[a] + (a >= 3 - t->folds.n));
    }
  }
  for (int a = 0; a < 3; a++) {
    found.first[a] = most(found.first[a], cells.first[a]), found.last[a] = least(found.last[a], cells.last[a]);
    if (found.first[a] >= found.last[a]) return;
  }
  look(&t->folds, pair, found.first, found.last);
}

EXPORT int mend(const Array *ddf, const Array *outer, uint8_t *folded, const float *const *tap, const int *radius,
                int reach, float margin, int64_t *out, int64_t pairs, int n, int threads) {
  Mend task = {{ddf, outer, margin, folded, NULL, n, 1}, {tap[0], tap[1], tap[2]}, {radius[0], radius[1], radius[2]}, reach,
               {1, 1, 1}, NULL, NULL, NULL, NULL};
  int64_t tiles = 1, cells = 1;
  for (int a = 0; a < 3; a++) {
    task.tiles[a] = part_count(ddf->size[a], most(TILE, 2 * radius[a])), tiles *= task.tiles[a];
    cells *= a == 0 && n == 2 ? 1 : ddf->size[a] + 1;
  }
  task.smoothed = malloc(sizeof(int64_t) * pairs * tiles);
  task.marked = malloc(pairs * tiles);
  task.box = malloc(sizeof(Box) * pairs * tiles);
  task.made = calloc(pairs * tiles, sizeof(float *));
  int64_t failed = !task.smoothed || !task.marked || !task.box || !task.made;
  if (!failed) failed = parallel(pairs * tiles, threads, mark_tile, &task);
  if (!failed) failed = parallel(pairs * tiles, threads, smooth_tile, &task);
  if (!failed) failed = parallel(pairs * tiles, threads, write_tile, &task);
  if (!failed) failed = parallel(pairs * tiles, threads, look_at_tile, &task);
  for (int64_t pair = 0; pair < pairs && !failed; pair++) {
    int64_t bad = 0, voxels = 0;
    const uint8_t *flags = folded + pair * cells;
    for (int64_t i = 0; i < cells; i++) bad += flags[i];
    for (int64_t i = pair * tiles; i < (pair + 1) * tiles; i++) voxels += task.smoothed[i];
    out[2 * pair] = bad, out[2 * pair + 1] = voxels;
  }
  for (int64_t i = 0; task.made && i < pairs * tiles; i++) free(task.made[i]);
  free(task.smoothed);
  free(task.marked);
  free(task.box);
  free(task.made);
  return failed > 0;
}
