/* A libcuda.so.1 that launches nothing: as much as Triton's driver and launcher ask for, on a machine without a GPU.
   It refuses what CUDA's driver refuses, by the CUDA Driver API's documentation of cuTensorMapEncodeTiled and
   cuLaunchKernelEx and the limits of an H100, and counts what would have run. */

#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { OK = 0, INVALID_VALUE = 1 };
enum { SHARED_OPTIN = 232448, SHARED_DEFAULT = 49152, THREADS = 1024, GRID_X = 2147483647, GRID_YZ = 65535 };

static long launches, maps, refused;
static char reason[256];

long stub_launches(void) { return launches; }
long stub_maps(void) { return maps; }
long stub_refused(void) { return refused; }
const char *stub_reason(void) { return reason; }

static int refuse(const char *format, unsigned at, unsigned long value) {
  refused++;
  snprintf(reason, sizeof reason, format, at, value);
  return INVALID_VALUE;
}

int cuInit(unsigned flags) { return OK; }
int cuGetErrorString(int code, const char **text) { *text = reason; return OK; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return OK; }
int cuCtxSetCurrent(void *context) { return OK; }
int cuCtxGetLimit(size_t *value, int limit) { *value = 1 << 20; return OK; }
int cuCtxSetLimit(int limit, size_t value) { return OK; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return OK; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return OK; }
int cuModuleLoadData(void **module, const void *image) { *module = (void *)1; return OK; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = (void *)1; return OK; }
int cuFuncSetCacheConfig(void *function, int config) { return OK; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return OK; }
int cuOccupancyMaxActiveClusters(int *clusters, void *function, const void *config) { *clusters = 1; return OK; }
int cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) { *(uint64_t *)data = pointer; return OK; }

int cuFuncGetAttribute(int *value, int attribute, void *function) {
  *value = attribute == 0 ? THREADS : 0; /* CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK; registers, local and shared bytes */
  return OK;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) { /* by the numbers of CUdevice_attribute */
  switch (attribute) {
  case 8: *value = SHARED_DEFAULT; break;  /* MAX_SHARED_MEMORY_PER_BLOCK */
  case 10: *value = 32; break;             /* WARP_SIZE */
  case 12: case 82: *value = 65536; break; /* MAX_REGISTERS_PER_BLOCK, _PER_MULTIPROCESSOR */
  case 16: *value = 132; break;            /* MULTIPROCESSOR_COUNT */
  case 75: *value = 9; break;              /* COMPUTE_CAPABILITY_MAJOR */
  case 76: *value = 0; break;              /* COMPUTE_CAPABILITY_MINOR */
  case 81: *value = 233472; break;         /* MAX_SHARED_MEMORY_PER_MULTIPROCESSOR */
  case 97: *value = SHARED_OPTIN; break;   /* MAX_SHARED_MEMORY_PER_BLOCK_OPTIN */
  default: *value = 1024;
  }
  return OK;
}

int cuTensorMapEncodeTiled(void *map, int type, uint32_t rank, void *address, const uint64_t *dims,
                           const uint64_t *strides, const uint32_t *box, const uint32_t *steps, int interleave,
                           int swizzle, int l2, int fill) {
  static const unsigned sizes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4}; /* bytes, by CUtensorMapDataType */
  unsigned size = type < 13 ? sizes[type] : 1, widest = swizzle == 1 ? 32 : swizzle == 2 ? 64 : 128;
  unsigned long inner = (unsigned long)box[0] * size;
  maps++;
  if ((uintptr_t)address % 16)
    return refuse("tensor map %u: its base %#lx is no multiple of 16", 0, (unsigned long)(uintptr_t)address);
  if (rank < 1 || rank > 5)
    return refuse("tensor map %u: rank %lu", 0, rank);
  for (uint32_t i = 0; i < rank; i++) {
    if (dims[i] == 0 || dims[i] > (1ull << 32))
      return refuse("tensor map: dimension %u has size %lu", i, (unsigned long)dims[i]);
    if (box[i] == 0 || box[i] > 256)
      return refuse("tensor map: dimension %u of the box has size %lu", i, box[i]);
    if (steps[i] == 0 || steps[i] > 8)
      return refuse("tensor map: element stride %u is %lu", i, steps[i]);
  }
  for (uint32_t i = 0; i + 1 < rank; i++) /* strides[i] are the bytes of dimension i + 1 */
    if (strides[i] % 16 || strides[i] >= (1ull << 40) || strides[i] < dims[i] * (i ? 1 : size))
      return refuse("tensor map: stride %u is %lu bytes", i, (unsigned long)strides[i]);
  if (inner % 16)
    return refuse("tensor map: dimension %u of the box has %lu bytes, no multiple of 16", 0, inner);
  if (interleave == 0 && swizzle != 0 && inner > widest)
    return refuse("tensor map: dimension %u of the box has %lu bytes, wider than its swizzle", 0, inner);
  memset(map, 0, 128);
  return OK;
}

typedef struct { /* CUlaunchConfig */
  unsigned grid[3], block[3], shared;
  void *stream, *attributes;
  unsigned count;
} Config;

int cuLaunchKernelEx(const Config *config, void *function, void **parameters, void **extra) {
  launches++;
  for (unsigned i = 0; i < 3; i++)
    if (config->grid[i] == 0 || config->grid[i] > (i ? GRID_YZ : GRID_X))
      return refuse("launch: dimension %u of the grid has size %lu", i, config->grid[i]);
  if (config->block[0] * config->block[1] * config->block[2] > THREADS)
    return refuse("launch %u: %lu threads", 0, config->block[0]);
  if (config->shared > SHARED_OPTIN)
    return refuse("launch %u: %lu bytes of shared memory", 0, config->shared);
  return OK;
}
