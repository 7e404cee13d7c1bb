/* A stand-in for NVIDIA's libraries (CUDA 13, cuBLAS, cuDNN), of a device that runs no kernel and whose memory is the process's own.

   onnxruntime-gpu opens a graph with it as with a GPU: it optimises, and says which nodes its CUDA provider takes. What
   runs on it computes nothing, so results are worthless. What compiles it adds an empty definition of every other
   function that onnxruntime's provider imports. */

#include <stdlib.h>
#include <string.h>

typedef int Status;
typedef void *Handle;

static char handle[4096];
static Status give(Handle *made) { *made = handle; return 0; }
static Status take(void **made, size_t bytes) { *made = aligned_alloc(256, bytes / 256 * 256 + 256); return *made == NULL; }
static void set(char *properties, size_t offset, int value) { memcpy(properties + offset, &value, sizeof value); }
static Status number(int *value, int is) { *value = is; return 0; }

/* An A100's shape, as far as anything asks: sizes in bytes and offsets of CUDA 13's cudaDeviceProp. */
Status cudaGetDeviceProperties(char *properties) {
  memset(properties, 0, 1008);
  strcpy(properties, "stand-in");
  *(size_t *)(properties + 288) = (size_t)80 << 30; /* totalGlobalMem */
  *(size_t *)(properties + 296) = 49152;            /* sharedMemPerBlock */
  *(size_t *)(properties + 672) = 166912;           /* sharedMemPerBlockOptin */
  set(properties, 304, 65536);                      /* regsPerBlock */
  set(properties, 308, 32);                         /* warpSize */
  set(properties, 320, 1024);                       /* maxThreadsPerBlock */
  set(properties, 360, 8);                          /* major */
  set(properties, 384, 108);                        /* multiProcessorCount */
  set(properties, 604, 2048);                       /* maxThreadsPerMultiProcessor */
  return 0;
}

Status cudaGetDevice(int *device) { return number(device, 0); }
Status cudaGetDeviceCount(int *count) { return number(count, 1); }
Status cudaDeviceGetAttribute(int *value, int attribute, int device) { (void)device; return number(value, attribute == 75 ? 8 : 1); }
Status cudaDriverGetVersion(int *version) { return number(version, 13000); }
Status cudaRuntimeGetVersion(int *version) { return number(version, 13000); }
Status cudaStreamIsCapturing(Handle stream, int *status) { (void)stream; return number(status, 0); }
Status cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks) { return number(blocks, 2); }
Status cudaMemGetInfo(size_t *left, size_t *total) { *left = *total = (size_t)80 << 30; return 0; }
Status cudaEventElapsedTime(float *milliseconds) { *milliseconds = 1; return 0; }
const char *cudaGetErrorName(Status status) { (void)status; return "none"; }
const char *cudaGetErrorString(Status status) { (void)status; return "none"; }
const char *cudnnGetErrorString(Status status) { (void)status; return "none"; }
size_t cudnnGetVersion(void) { return 91000; }

Status cudaMalloc(void **made, size_t bytes) { return take(made, bytes); }
Status cudaMallocHost(void **made, size_t bytes) { return take(made, bytes); }
Status cudaHostAlloc(void **made, size_t bytes) { return take(made, bytes); }
Status cudaMallocFromPoolAsync(void **made, size_t bytes) { return take(made, bytes); }
Status cudaFree(void *memory) { free(memory); return 0; }
Status cudaFreeHost(void *memory) { free(memory); return 0; }
Status cudaFreeAsync(void *memory) { free(memory); return 0; }
Status cudaMemcpy(void *to, const void *from, size_t bytes) { memmove(to, from, bytes); return 0; }
Status cudaMemcpyAsync(void *to, const void *from, size_t bytes) { memmove(to, from, bytes); return 0; }
Status cudaMemset(void *to, int value, size_t bytes) { memset(to, value, bytes); return 0; }
Status cudaMemsetAsync(void *to, int value, size_t bytes) { memset(to, value, bytes); return 0; }
Status cudaPointerGetAttributes(int *attributes, void *memory) {
  memset(attributes, 0, 88);
  attributes[0] = 2; /* of a device */
  memcpy((char *)attributes + 8, &memory, sizeof memory);
  return 0;
}
Status cudaFuncGetAttributes(void *attributes) { memset(attributes, 0, 144); return 0; }

Status cudaStreamCreate(Handle *made) { return give(made); }
Status cudaStreamCreateWithFlags(Handle *made) { return give(made); }
Status cudaEventCreate(Handle *made) { return give(made); }
Status cudaEventCreateWithFlags(Handle *made) { return give(made); }
Status cudaMemPoolCreate(Handle *made) { return give(made); }
Status cublasCreate_v2(Handle *made) { return give(made); }
Status cublasLtCreate(Handle *made) { return give(made); }
Status cudnnCreate(Handle *made) { return give(made); }
Status cudnnDestroy(Handle used) { (void)used; return 0; }
Status cudnnSetStream(Handle used) { (void)used; return 0; }
void **__cudaRegisterFatBinary(void) { return (void **)handle; }
